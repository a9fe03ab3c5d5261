"""The report's part on FP8: what it claims, what it does not claim, and studies whose answer is known."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from probe import findings, fp8_error, fp8_findings, fp8_study, report, report_fp8, schema, store
from probe.bootstrap import MIN_DOCUMENTS
from probe.corpus import Corpus, Document
from probe.fp8_titles import Estimate
from probe.schema import ProbeError
from tests.test_report import HOSTILE, Page, recorded, refuse, written
from tests.test_report_browser import chromium  # noqa: F401

SECTIONS = ["fp8", "fp8-margins", "fp8-output", "fp8-drift", "fp8-sensitivity", "fp8-weights", "fp8-activations"]
RECIPES = ("bf16", "fp32", "meta")
LAYERS, EXPERTS = 3, 4
MODULES = ("q_proj", "router", "experts.gate_up_proj", "experts.down_proj")
ATTRIBUTES = dict.fromkeys(schema.ROOT_ATTRIBUTES, "") | {
    "schema_version": schema.SCHEMA_VERSION,
    "model": "tiny-scout",
    "device": "cpu",
    "created_at": "2026-05-04T11:22:33+00:00",
    "top_k": 1,
    "recipes": json.dumps({"meta": {"description": "routed experts only"}}),
}
KINDS = {"layer": np.arange(LAYERS), "attention_kind": np.array([0, 0, 1])}
CATEGORIES = {"attention_kind": list(schema.ATTENTION_KINDS)}


def planted(flips=(0.02, 0.01, 0.2), kl=(0.001, 0.001, 0.02), *, recipes=RECIPES, n_documents=10, domains=("a", "b"),
            names=None, head=True):  # fmt: skip
    """A study in which the same tokens of every document flip, and every document has the same KL."""
    length = 100
    n_tokens = n_documents * length
    position = np.tile(np.arange(length), n_documents)
    # Flips are the first tokens of a document, so that margins below 0.25 are where they are.
    flipped = np.stack([np.repeat(position < round(share * length), LAYERS).reshape(-1, LAYERS) for share in flips])
    margin = np.repeat(0.01 + position / length, LAYERS).reshape(-1, LAYERS)
    change = np.where(flipped, -2 * margin, 0.001).astype(np.float32)
    of_document = np.array([domains[i % len(domains)] for i in range(n_documents)])
    known = list(dict.fromkeys(domains))
    undefined = np.nan if not head else 1.0
    per_sample = np.ones((len(recipes), n_documents)) * undefined
    wobble = np.linspace(0.9, 1.1, n_documents)
    samples = schema.dataset(
        "fp8_samples",
        {
            "logit_kl": per_sample * np.array(kl)[:, None] * wobble,
            "top1_agreement": per_sample * 0.9,
            "loss_change": per_sample * 0.01,
            "reference_loss": np.full(n_documents, 2.0),
            "n_cut": np.full(n_documents, 7),
            "text_sha256": np.full(n_documents, "0"),
            "recipe": recipes,
            "sample": np.arange(n_documents),
            "name": [f"sample {i}" for i in range(n_documents)] if names is None else names,
            "domain": of_document,
            "n_tokens": np.full(n_documents, length),
        },
    )
    flips_ = schema.dataset(
        "fp8_flips",
        {
            "flipped": flipped,
            "margin_change": change,
            "router_margin": margin,
            "recipe": recipes,
            "sample": np.repeat(np.arange(n_documents), length),
            "position": position,
            "token_id": np.zeros(n_tokens, int),
            "domain": np.repeat([known.index(name) for name in of_document], length),
            **KINDS,
        },
        categories=CATEGORIES | {"domain": known},
    )
    shape = (len(recipes), LAYERS, 2, 2)
    drift = schema.dataset(
        "fp8_drift",
        {
            "sqnr": np.broadcast_to(np.array([40.0, 45.0, 30.0, 25.0])[: len(recipes), None, None, None], shape),
            "relative_error": np.full(shape, 0.01),
            "cosine": np.full(shape, 0.999),
            "logit_kl": np.array(kl) * undefined,
            "top1_agreement": np.full(len(recipes), 0.9) * undefined,
            "loss_change": np.full(len(recipes), 0.01) * undefined,
            "recipe": recipes,
            "site": ["router", "residual"],
            "mode": ["isolated", "accumulated"],
            **KINDS,
        },
        categories=CATEGORIES,
    )
    groups = {"fp8_drift": drift, "fp8_samples": samples, "fp8_flips": flips_, "fp8_weights": weights(),
              "fp8_activations": activations(), "fp8_sensitivity": sensitivity()}  # fmt: skip
    root = xr.Dataset(attrs=ATTRIBUTES)
    return xr.DataTree.from_dict({"/": root} | {f"/{name}": data for name, data in groups.items()})


def weights():
    shape = (1, LAYERS, len(MODULES), EXPERTS)
    covered = np.zeros(shape[:3], bool)
    covered[:, 1, 2:] = True
    sqnr = np.full(shape, 31.5)
    sqnr[0, 1, 3, 2] = 28.25
    return schema.dataset(
        "fp8_weights",
        {
            "sqnr": sqnr,
            "underflow": np.full(shape, 0.0025),
            "saturation": np.zeros(shape),
            "amax": np.full(shape, 0.75),
            "dynamic_range": np.full(shape, 17.0),
            "covered": covered,
            "head_sqnr": [31.25],
            "head_underflow": [0.001],
            "head_saturation": [0.0],
            "recipe": ["meta"],
            "module": MODULES,
            "expert": np.arange(EXPERTS),
            **KINDS,
        },
        categories=CATEGORIES,
    )


def activations():
    shape = (LAYERS, len(MODULES), EXPERTS)
    amax = np.full(shape, 2.0)
    amax[1, 3] = [1.0, 2.0, 12.0, np.nan]  # 12 x; the last expert saw no token
    magnitude = np.repeat(amax[..., None], 2, axis=-1) / 2
    magnitude[1, 3, :, 0] = [0.5, 0.5, 1.0, np.nan]  # 2 x
    lost = np.zeros((1, *shape))
    return schema.dataset(
        "fp8_activations",
        {
            "amax": amax,
            "magnitude": magnitude,
            "outlier_channels": np.where(np.isnan(amax), np.nan, 1),
            "n_values": np.full(shape, 640),
            "saturation": lost,
            "underflow": lost + 0.001,
            "recipe": ["meta"],
            "module": MODULES,
            "expert": np.arange(EXPERTS),
            "percentile": [99.0, 99.9],
            **KINDS,
        },
        categories=CATEGORIES,
    )


FLOOR = (0.01, 0.009, 0.011)
WHOLE = (1.0, 0.9, 1.1)
PARTS = {"attention": (400, 0.9), "routed_experts": (600, 0.3), "layer 0": (500, 0.95), "layer 1": (500, 0.2)}
"""Weights of the parts of a recipe, and the KL that is left of 1 without them."""


def sensitivity(parts=None, *, whole=WHOLE, floor=FLOOR, measure="logit_kl", uncovered=None, spread=0.1, n_texts=30):
    """``/fp8_sensitivity`` of a recipe called rowwise, over 1,000 weights; intervals are ± ``spread`` of the value."""
    parts = PARTS if parts is None else parts
    uncovered = {"router": (50, 0.5)} if uncovered is None else uncovered
    kind = {name: "layer" if name.startswith("layer") else "module" for name in (*parts, *uncovered)}
    rows = [(name, kind[name], n, True, None, left) for name, (n, left) in parts.items()]
    rows += [(name, kind[name], n, False, cost, whole[0]) for name, (n, cost) in uncovered.items()]
    rows += [("everything", "whole", 1000, True, whole, 0.0)]
    rows += [(name, "floor", 1050, False, floor, np.nan) for name in ("bf16", "fp32")]
    values = np.array(
        [[_triple(alone, spread), _triple(left, spread)] for *_, alone, left in rows]
    )  # unit, setting, value and bounds
    arrays = {}
    for name in ("loss_change", "logit_kl", "flip_share"):
        own = values if name in (measure, "flip_share") else np.full_like(values, np.nan)
        for at, suffix in enumerate(("", "_lower", "_upper")):
            arrays[f"{name}{suffix}"] = own[..., at]
    columns = zip(*(row[:4] for row in rows), strict=True)
    coords = dict(zip(("unit", "unit_kind", "n_weights", "covered"), columns, strict=True))
    data = schema.dataset("fp8_sensitivity", {**arrays, **coords, "setting": ["alone", "spared"]})
    recipes = json.dumps({"rowwise": {"description": ""}})
    return data.assign_attrs(level=0.95, n_resamples=1000, seed=0, recipes=recipes, n_texts=n_texts)


def _triple(value, spread):
    if isinstance(value, tuple):
        return value
    value = 0.5 if value is None else value
    return (value, (1 - spread) * value, (1 + spread) * value)


def changed(tree, **groups):
    """A copy with other Datasets in some groups; None leaves a group out."""
    result = tree.copy()
    for name, group in groups.items():
        if group is None:
            del result[name]
        else:
            result[name] = xr.DataTree(group)
    return result


def results_of(tree):
    return {name: compute() for name, compute in report_fp8.plan(tree).items()}


def sections_of(tree):
    return {section.anchor: section for section in report_fp8.build(tree, results_of(tree))}


def text_of(section):
    """What a reader sees of a section, without its figures."""
    figure = re.sub(r"<script.*?</script>", "", str(section.figure))
    cells = [cell for table in section.tables for row in (table.columns, *table.rows) for cell in row]
    return " ".join([section.title, section.reading, section.definition, figure, *cells])


def figures_in(section):
    scripts = re.findall(r'<script type="application/json">(.*?)</script>', str(section.figure))
    return [json.loads(script, parse_constant=refuse) for script in scripts]


def plain(text):
    return text.replace("\xa0", " ")


@pytest.fixture(scope="module")
def tree():
    return planted()


@pytest.fixture(scope="module")
def folder(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    report.write_report(tree, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "index.html").read_text(encoding="utf-8"))


# --- does it flip? ----------------------------------------------------------------------------------------------------


def told_share(tree, recipe):
    own = fp8_error.flip_share(tree, pooled=True).sel(recipe=recipe)
    value, *ends = (findings.digits(100 * float(own[name])) for name in ("flip_share", "lower", "upper"))
    return f"{value} % [{ends[0]}, {ends[1]}]"


def answer_of(*args, **options):
    tree = planted(*args, **options)
    return tree, plain(fp8_findings.answer(fp8_error.flip_share(tree, pooled=True)))


def test_flips_beyond_both_floors_are_said_to_be():
    tree, text = answer_of((0.02, 0.01, 0.2))
    assert told_share(tree, "meta").startswith("20 % [1")
    noise = told_share(tree, "bf16")
    assert text == f"Rounding flips the routing: {told_share(tree, 'meta')} under meta, BF16 itself only {noise}"


@pytest.mark.parametrize("floors", [(0.2, 0.01), (0.01, 0.2)], ids=["kernels", "float32"])
def test_flips_inside_either_floor_are_not_claimed(floors):
    tree, text = answer_of((*floors, 0.21))
    assert text.startswith(
        f"Rounding is not seen to flip the routing: {told_share(tree, 'meta')} under meta, not told from"
    )
    assert "20 %" in text


def test_fewer_flips_than_noise():
    _, text = answer_of((0.2, 0.1, 0.02))
    assert text.startswith("Rounding flips the routing no more than noise: 2.0 %") and "less than the 20 %" in text


def test_too_few_documents_claim_nothing():
    _, text = answer_of((0.02, 0.01, 0.2), n_documents=MIN_DOCUMENTS - 1, kl=(0.001,) * 3)
    assert text == ("20 % under meta of the routing flips, 2.0 % in BF16 itself: too few documents to tell these apart")


def test_of_several_recipes_each_is_judged_by_itself():
    tree, text = answer_of((0.05, 0.01, 0.06, 0.3), kl=(0.001,) * 4, recipes=("bf16", "fp32", "meta", "int4"))
    assert text == (
        f"Rounding flips the routing: {told_share(tree, 'int4')} under int4, "
        f"BF16 itself only {told_share(tree, 'bf16')}; "
        f"{told_share(tree, 'meta')} under meta is within that noise"
    )


def test_noise_floors_alone():
    _, text = answer_of((0.02, 0.01), kl=(0.001,) * 2, recipes=("bf16", "fp32"))
    assert text.startswith("Two runs in BF16 flip 2.0 %") and text.endswith("no recipe was tried")


def test_layers_that_stand_out_are_named_only_where_they_do(tree):
    by_layer = fp8_error.flip_share(tree)
    assert fp8_findings.layers_above(by_layer) == ["meta in every layer"]
    assert fp8_findings.layers_above(fp8_error.flip_share(planted((0.2, 0.2, 0.21)))) == []
    one = by_layer.where(by_layer["layer"] == 1, by_layer.sel(recipe="bf16"))
    assert fp8_findings.layers_above(one) == ["meta in layer 1"]
    two = by_layer.where(by_layer["layer"] != 1, by_layer.sel(recipe="bf16"))
    assert fp8_findings.layers_above(two) == ["meta in layers 0 and 2 ◇"]


def test_a_layer_that_no_recipe_reached_has_no_chance_in_it(tree):
    flips = tree["fp8_flips"].to_dataset().copy(deep=True)
    for name, nothing in (("flipped", False), ("margin_change", 0)):
        flips[name].loc[{"recipe": "meta", "layer": 0}] = nothing
    flips["flipped"].loc[{"recipe": "meta", "layer": 1}] = False  # margins moved, and no token flipped
    own = results_of(changed(tree, fp8_flips=flips))["fp8_flips_by_layer"].sel(recipe="meta")
    assert (float(own["lower"][0]), float(own["upper"][0])) == (0, 0)
    for layer in (1, 2):
        assert float(own["upper"][layer]) > 0


def test_close_calls(tree):
    """20 of 100 tokens flip under meta; their margins are 0.01 to 0.20 logits, and 0.125 to 0.25 is one bin."""
    (found,) = [one for one in fp8_findings.find(results_of(tree)) if one.kind == "margins"]
    assert plain(found.text) == (
        "Close calls flip: 100 % of the flips under meta happen at margins below 0.25 logits, where 24 % of the "
        "decisions are."
    )
    assert (found.value, found.null) == (1.0, 0.24)


# --- what should stay in BF16 -----------------------------------------------------------------------------------------


def at_least(left, *, n_parts, n_texts, spread=0.1):
    """What is surely gone if ``left`` ± ``spread`` is left of 1 [0.9, 1.1], all bounds widened for all parts."""
    factor = float(findings.widening(0.95, n_parts, n_texts))
    return 1 - left * (1 + spread) ** factor / 0.9**factor


def test_the_part_that_costs_more_than_its_weights_is_named():
    found = sensitivity()
    sure = at_least(0.2, n_parts=4, n_texts=30)
    assert 0.6 < sure < 0.8
    assert plain(fp8_findings.spare(found)) == (
        f"Keep layer 1 in BF16: 80 % of the damage is gone (surely {100 * sure:.0f} % or more), for 50 % of the "
        "weights that rowwise quantises"
    )
    listed = fp8_findings.worth_sparing(found)
    assert [part.unit for part in listed] == ["layer 1", "routed_experts"]
    assert listed[0].at_least == pytest.approx(sure)
    assert (listed[0].gone, listed[0].weights) == (pytest.approx(0.8), 0.5)


def test_a_part_that_only_costs_what_it_weighs_is_no_bargain():
    found = sensitivity({"attention": (200, 0.9), "routed_experts": (800, 0.4)})
    assert plain(fp8_findings.spare(found)) == (
        "No part surely costs more than its share of the weights: without routed experts 60 % of the damage is gone, "
        "at 80 % of the weights that rowwise quantises"
    )
    assert fp8_findings.best_bargain(found) is None
    perhaps = sensitivity({"attention": (500, 0.9), "routed_experts": (500, 0.45)})  # 55 % is gone, but not surely 50 %
    assert 0 < at_least(0.45, n_parts=2, n_texts=30) < 0.5
    assert fp8_findings.best_bargain(perhaps) is None


def test_a_part_whose_interval_meets_the_whole_is_not_claimed():
    found = sensitivity({"attention": (400, 0.85), "routed_experts": (600, 0.8)})
    assert fp8_findings.spare(found) == (
        "The damage of rowwise is spread: no part surely takes a share of it away by staying in BF16"
    )


def test_many_parts_take_wider_intervals():
    """What stands out from two parts does not from forty."""
    own = {"layer 0": (500, 0.6)}
    few = own | {"layer 1": (500, 0.95)}
    many = own | {f"layer {layer}": (10, 0.95) for layer in range(1, 41)}
    assert [part.unit for part in fp8_findings.worth_sparing(sensitivity(few, n_texts=6))] == ["layer 0"]
    assert fp8_findings.worth_sparing(sensitivity(many, n_texts=6)) == []


def test_what_is_all_of_a_recipe_is_no_part_of_it():
    found = sensitivity({"routed_experts": (1000, 0.0), "layer 1": (500, 0.9)})
    assert fp8_findings.parts_of(found) == ["layer 1"]
    assert "routed experts" not in fp8_findings.spare(found)


@pytest.mark.parametrize(
    ("floor", "words"),
    [
        ((0.95, 0.9, 1.0), "its whole damage is KL 1.0 [0.90, 1.1] nat, not told from the 0.95 [0.90, 1.0] nat"),
        ((2.0, 1.9, 2.1), "its whole damage is KL 1.0 [0.90, 1.1] nat, below the 2.0 [1.9, 2.1] nat"),
    ],
    ids=["inside", "below"],
)
def test_a_recipe_inside_the_noise_has_nothing_to_spare(floor, words):
    text = plain(fp8_findings.spare(sensitivity(floor=floor)))
    assert text.startswith("No part of rowwise needs to stay in BF16") and words in text
    assert fp8_findings.worth_sparing(sensitivity(floor=floor)) == []


def test_without_intervals_nothing_is_said_of_parts():
    found = sensitivity(whole=(1.0, np.nan, np.nan))
    assert fp8_findings.spare(found) == (
        "Which part of rowwise costs most is not known: too few documents for intervals"
    )
    assert fp8_findings.worth_sparing(found) == []


def test_a_model_without_a_head_is_judged_by_its_flips():
    found = sensitivity(measure="flip_share")
    assert fp8_findings.damage(found) == "flip_share"
    assert fp8_findings.spare(found).startswith("Keep layer 1 in BF16")


def test_parts_that_a_recipe_could_take_along_are_named_only_below_the_noise():
    free = {"router": (50, 0.001), "output_head": (70, 0.0105), "shared_expert": (0, 0.0001)}
    found = sensitivity(uncovered=free)
    assert fp8_findings.harmless(found) == ["router"]
    section = report_fp8.build(
        changed(planted(), fp8_sensitivity=found), results_of(changed(planted(), fp8_sensitivity=found))
    )[4]
    assert "though they alone would cost less than that noise: router." in section.reading


def test_against_floors():
    def stands(own, *floors):
        return fp8_findings.against_floors(Estimate(*own), [Estimate(*floor) for floor in floors])

    assert stands((5, 4, 6), (1, 0.5, 2), (3, 2, 3.9)) == "above"
    assert stands((5, 4, 6), (1, 0.5, 2), (3, 2, 4)) == "inside"
    assert stands((1, 0.5, 1.9), (3, 2, 4), (0.1, 0, 0.2)) == "below"
    assert stands((1, np.nan, np.nan), (3, 2, 4)) == "unknown"
    assert stands((1, 0.5, 1.9), (3, np.nan, np.nan)) == "unknown"
    assert stands((1, 0.5, 1.9)) == "unknown"


# --- activations ------------------------------------------------------------------------------------------------------


def test_how_far_the_inputs_of_experts_are_apart():
    found = activations()
    assert fp8_findings.spread_of_experts(found, "experts.down_proj") == (1, 12, 2)
    assert fp8_findings.spread_of_experts(found, "experts.gate_up_proj") == (0, 1, 1)
    assert plain(fp8_findings.experts_differ(found, "experts.down_proj")) == (
        "In layer 1 the largest input of experts.down_proj is 12 × that of another expert; the 99th percentiles differ "
        "by 2.0 ×"
    )
    alone = found.assign(amax=found["amax"].where(found["expert"] == 0))
    assert fp8_findings.spread_of_experts(alone, "experts.down_proj") is None
    assert "No layer sent tokens to two experts" in fp8_findings.experts_differ(alone, "experts.down_proj")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_a_study_has_a_page_of_its_own(folder, page):
    assert page.identifiers == ["findings", *SECTIONS]
    assert "What FP8 does to tiny-scout" in page.text["top"]
    overview = (
        "FP8: meta, on 1,000 tokens of 10 documents in 2 domains · against bfloat16 on cpu · 2026-05-04 11:22 UTC"
    )
    assert overview in page.text["top"]
    assert "10 documents cut short by 70 tokens in all" in page.text["top"]
    assert "meta: routed experts only" in page.text["findings"]
    assert len(page.scripts) == 2 and page.loaded == [] and page.handlers == []
    for anchor in page.anchors:
        assert anchor[1:] in page.identifiers if anchor.startswith("#") else (folder / anchor).is_file(), anchor


def test_the_first_sentence_is_the_answer(tree, page):
    share = told_share(tree, "meta")
    first = plain(page.text["findings"]).split("Beyond noise")[0]
    assert f"20 %Rounding flips the routing: {share} under meta, BF16 itself only" in first
    assert f"Rounding flips the routing: {share} under meta" in plain(page.text["fp8"])
    assert "Keep layer 1 in BF16: 80 % of the damage is gone" in plain(page.text["findings"])
    assert "Keep layer 1 in BF16: 80 % of the damage is gone" in plain(page.text["fp8-sensitivity"])


def test_every_section_draws_says_how_and_what_it_does_not_say(tree):
    for anchor, section in sections_of(tree).items():
        assert figures_in(section), anchor
        assert section.title and section.reading and section.source, anchor
        assert re.search(r"does not|do not|not measured|leaves out|without an interval", section.definition), anchor
        assert "nan" not in text_of(section).lower().split(), anchor
        assert "?" not in section.title, anchor


def test_tables_on_the_page_repeat_the_study(tree, page):
    flips = fp8_error.flip_share(tree)
    for name in ("flip_share", "lower", "upper"):
        for value in flips[name].values.ravel():
            assert f"{100 * value:.3g}" in page.text["fp8"]
    losses = fp8_error.loss_by_domain(tree)
    for name in ("logit_kl", "logit_kl_lower", "loss_change"):
        for value in losses[name].values.ravel():
            assert f"{value:.3g}" in page.text["fp8-output"]
    assert "28.2" in page.text["fp8-weights"] and "31.2" in page.text["fp8-weights"]  # the worst, and the head
    assert "12" in page.text["fp8-activations"]
    (table,) = sections_of(tree)["fp8-sensitivity"].tables
    (row,) = [row for row in table.rows if row[0] == "layer 1"]
    assert row[1:4] == ["yes", "50", "80"]
    assert row[5] == "0.2 [0.18, 0.22]"
    (floor,) = [row for row in table.rows if row[0] == "bf16"]
    assert floor[1:6] == ["", "", "", "0.01 [0.009, 0.011]", "–"]


def test_infinite_and_undefined_numbers_have_signs_of_their_own(tree):
    drift = tree["fp8_drift"].to_dataset().copy(deep=True)
    drift["sqnr"][2, 0] = np.inf
    drift["sqnr"][2, 1, 0] = np.nan
    tables = sections_of(changed(tree, fp8_drift=drift))["fp8-drift"].tables
    assert tables[0].rows[0][-2:] == ["∞", "∞"] and tables[0].rows[1][-2:] == ["–", "–"]


def test_tables_equal_the_study(tree, folder):
    read = {name: pd.read_parquet(folder / "tables" / f"{name}.parquet") for name in report_fp8.FUNCTIONS}
    shares = read["fp8_flips"].set_index("recipe")
    assert shares.loc["meta", "upper"] == float(fp8_error.flip_share(tree, pooled=True)["upper"].sel(recipe="meta"))
    parts = read["fp8_sensitivity"].set_index(["unit", "setting"])
    assert parts.loc[("layer 1", "spared"), "logit_kl"] == pytest.approx(0.2)
    seen = read["fp8_activations"].set_index(["layer", "module", "expert"])
    assert (1, "experts.down_proj", 3) not in seen.index and (1, "experts.down_proj", 2) in seen.index
    guide = (folder / "tables" / "README.md").read_text(encoding="utf-8")
    for name, function in report_fp8.FUNCTIONS.items():
        assert f"## {name}\n\nMade by `probe.fp8_error.{function}`." in guide
        assert callable(getattr(fp8_error, function))
    assert not (folder / "tables" / "samples.csv").exists()
    assert pd.read_csv(folder / "tables" / "fp8_samples.csv")["n_tokens"].tolist() == [100] * 10


def test_the_summary_is_strict_json(tree, folder):
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert summary["fp8"]["recipes"] == ["meta"]
    assert (summary["fp8"]["tokens"], summary["fp8"]["documents"], summary["fp8"]["domains"]) == (1000, 10, 2)
    assert summary["fp8"]["flip_share"]["meta"]["value"] == pytest.approx(0.2)
    assert summary["fp8"]["logit_kl"]["bf16"]["value"] == pytest.approx(0.001)
    assert [part["unit"] for part in summary["fp8"]["spare"]] == ["layer 1", "routed_experts"]
    kinds = [finding["kind"] for finding in summary["findings"]]
    assert kinds == ["flips", "margins", "output", "sensitivity", "weights", "activations"]
    assert "counts" not in summary


def test_a_page_from_its_own_store_is_the_same(folder, page, tmp_path):
    again = written(store.open(folder / "fp8.zarr"), tmp_path)
    assert again.text == page.text


@pytest.mark.parametrize(
    ("groups", "anchor", "words"),
    [
        (("fp8_sensitivity",), "fp8-sensitivity", "probe fp8 without --no-sensitivity"),
        (("fp8_activations",), "fp8-activations", "probe fp8 without --no-activations"),
        (("fp8_weights",), "fp8-weights", "probe.fp8_error.weight_error(model) measures it."),
        (schema.DRIFT_GROUPS, "fp8", "probe.fp8_error.drift(model, texts) measures it."),
        (schema.DRIFT_GROUPS, "fp8-margins", "Margins are there where flips were measured"),
        (schema.DRIFT_GROUPS, "fp8-output", "probe.fp8_error.drift(model, texts) measures it."),
        (schema.DRIFT_GROUPS, "fp8-drift", "probe.fp8_error.drift(model, texts) measures it."),
    ],
)
def test_what_was_not_measured_says_how_to_get_it(tree, tmp_path, groups, anchor, words):
    part = changed(tree, **dict.fromkeys(groups))
    section = sections_of(part)[anchor]
    assert words in str(section.figure) and not figures_in(section) and not section.tables
    page = written(part, tmp_path)
    assert words in page.text[anchor]
    json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)


def test_weights_alone_are_reported(tree, tmp_path):
    root = xr.Dataset(attrs=ATTRIBUTES)
    only = xr.DataTree.from_dict({"/": root, "/fp8_weights": tree["fp8_weights"].to_dataset()})
    page = written(only, tmp_path)
    assert "28" in page.text["findings"] and "intervals over documents" not in page.text["findings"]
    assert "FP8: meta · against" in page.text["top"]


@pytest.mark.parametrize(
    "options",
    [
        {"n_documents": 1},
        {"n_documents": 4},
        {"domains": ("a",)},
        {"head": False},
        {"flips": (0, 0, 0)},
        {"flips": (0.02, 0.01), "kl": (0.001, 0.001), "recipes": ("bf16", "fp32")},
    ],
    ids=["one document", "four", "one domain", "no head", "no flip", "floors alone"],
)
def test_odd_studies_are_reported(options, tmp_path):
    tree = planted(**options)
    page = written(tree, tmp_path)
    assert page.identifiers == ["findings", *SECTIONS]
    for section in sections_of(tree).values():
        assert "nan" not in text_of(section).lower().split()
        for figure in figures_in(section):
            assert figure["layout"]["height"] > 0
    if not options.get("head", True):
        assert "The model has no output head" in page.text["fp8-output"]
    if options.get("n_documents", 10) < MIN_DOCUMENTS:
        assert "There are no intervals" in page.text["fp8"]


def test_nothing_in_a_study_becomes_markup(tmp_path):
    tree = planted(recipes=("bf16", "fp32", HOSTILE), domains=(HOSTILE, "b"), names=[HOSTILE] * 10)
    tree.attrs |= {"model": HOSTILE, "recipes": json.dumps({HOSTILE: {"description": HOSTILE}})}
    page = written(tree, tmp_path)
    assert f"What FP8 does to {HOSTILE}" in page.text["top"]
    assert HOSTILE in page.text["findings"] and HOSTILE in page.text["fp8"]
    assert len(page.scripts) == 2 and page.handlers == [] and page.loaded == []
    for data in page.data:
        assert "<" not in data
        json.loads(data, parse_constant=refuse)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_every_figure(chromium, folder, scheme):  # noqa: F811
    page = chromium.new_page(viewport={"width": 700, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(120_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto((folder / "index.html").as_uri())
    for section in SECTIONS:
        page.wait_for_selector(f"#{section} .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") == 700
    assert faults == []
    page.close()


# --- beside the routing -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tree):
    return fp8_study.joined(recorded(), tree)


@pytest.fixture
def few_permutations(monkeypatch):
    """Of the routing, which takes most of the time and is not looked at here."""
    monkeypatch.setattr(report, "PERMUTATIONS", {"token_id": 2, "domain": 2})


def test_the_routing_report_has_the_part_too(whole, page, few_permutations, tmp_path):
    both = written(whole, tmp_path)
    assert both.identifiers[-8:] == [*SECTIONS, "text"]
    for name in SECTIONS[:-1]:  # behind the last one stands the foot of the page
        assert both.text[name] == page.text[name]
    assert "FP8: meta, on 1,000 tokens of 10 documents in 2 domains" in both.text["top"]
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert summary["counts"]["tokens"] == 720 and summary["fp8"]["tokens"] == 1000
    assert summary["findings"][-1]["kind"] == "flips" and len(summary["findings"]) <= findings.MAX_FINDINGS
    assert both.text["findings"].count("Rounding flips the routing") == 1
    again = store.open(tmp_path / "routing.zarr")
    assert results_of(again).keys() == results_of(whole).keys()
    schema.validate(again)


def test_the_answer_takes_the_place_of_the_last_finding(tree, monkeypatch):
    many = [findings.Finding(f"{at}", "", "", "", 0, 0, 0, None, 0) for at in range(findings.MAX_FINDINGS)]
    monkeypatch.setattr(findings, "find", lambda results: many)
    kinds = [found.kind for found in report.find(results_of(tree))]
    assert kinds == ["0", "1", "2", "3", "4", "flips"]
    assert report.find({}) == many


def test_a_recording_without_a_study_is_reported_as_before(few_permutations, tmp_path):
    (tmp_path / "tables").mkdir()
    for name in report_fp8.FUNCTIONS:  # of an earlier report
        (tmp_path / "tables" / f"{name}.csv").touch()
    page = written(recorded(), tmp_path)
    assert not set(SECTIONS) & set(page.identifiers) and "FP8:" not in page.text["top"]
    assert not list((tmp_path / "tables").glob("fp8_*"))
    assert "fp8" not in json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))


def test_the_study_of_a_recording_by_itself(whole, tree, page, tmp_path):
    own = fp8_study.alone(whole)
    assert set(own.children) == set(tree.children)
    again = written(own, tmp_path)
    for name in SECTIONS[:-1]:
        assert again.text[name] == page.text[name]
    with pytest.raises(ProbeError, match="holds no FP8 study"):
        fp8_study.alone(recorded())


# --- what is run ------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text, verbose):
        return {"input_ids": text.split()}


def corpus(**domains):
    """Documents of so many words by domain, the domains one after the other."""
    return Corpus(
        tuple(
            Document("w " * n, domain, f"{domain}{at}")
            for domain, lengths in domains.items()
            for at, n in enumerate(lengths)
        ),
        (),
    )


def chosen(texts, **options):
    selection = fp8_study.choose_documents(texts, Words(), **options)
    return [document.name for document in selection.documents], selection.max_tokens


def test_documents_are_taken_from_each_domain_in_turn():
    texts = corpus(a=[300] * 10, b=[300] * 2, c=[0, 300])
    names, limit = chosen(texts, n_tokens=1500)
    assert limit == 100  # five documents of three domains
    assert names == ["a0", "b0", "a1", "b1", "c1", *(f"a{at}" for at in range(2, 10))]
    assert chosen(texts, n_tokens=400, max_tokens=200)[0] == ["a0", "b0", "a1", "b1", "c1", "a2", "a3"]


def test_each_domain_gets_the_documents_that_an_interval_takes():
    names, limit = chosen(corpus(a=[900] * 30, b=[900] * 30), n_tokens=2000)
    assert limit == 200
    assert [name[0] for name in names].count("a") == [name[0] for name in names].count("b") == MIN_DOCUMENTS


def test_texts_are_not_cut_to_nothing_and_a_limit_is_kept():
    many = corpus(**{f"d{at}_": [100] for at in range(50)})
    assert chosen(many, n_tokens=500)[1] == fp8_study.SHORTEST_TEXT
    assert chosen(many, n_tokens=500, max_tokens=10)[1] == 10
    selection = fp8_study.choose_documents(many, Words(), n_tokens=100)
    assert (len(selection.documents), selection.n_given) == (2, 50)


def test_texts_without_a_token_are_an_error():
    with pytest.raises(ProbeError, match="no text of the corpus has a token"):
        chosen(corpus(a=[0, 0]))
