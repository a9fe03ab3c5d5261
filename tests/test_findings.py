"""Findings and titles: hand-made results in, sentences with the right numbers out."""

import numpy as np
import pytest
import xarray as xr

from probe import findings, report, routing_stats, schema, titles
from tests import planted


def layered(layers, **variables):
    """A Dataset along ``layer``, all RoPE."""
    kinds = ("layer", np.zeros(len(layers), np.uint8), {"categories": list(schema.ATTENTION_KINDS)})
    data = {name: ("layer", np.asarray(values, float)) for name, values in variables.items()}
    return xr.Dataset(data, coords={"layer": list(layers), "attention_kind": kinds}, attrs={"level": 0.95})


def loads(load, lower, upper, *, layers=(0,), n_documents=100):
    result = layered(layers)
    for name, values in (("load", load), ("lower", lower), ("upper", upper)):
        result[name] = (("layer", "expert"), np.atleast_2d(np.asarray(values, float)))
    result = result.assign_coords(expert=np.arange(np.atleast_2d(load).shape[1]))
    return result.assign(n_documents=n_documents)


def preferences(lift, lower, upper, *, n_documents, share=0.4, layers=(5,), p_value=None):
    """Lift (domain, layer, expert) of made-up domains; every share is the same."""
    names = [f"d{index}" for index in range(len(lift))]
    dims = ("domain", "layer", "expert")
    values = {"lift": lift, "lift_lower": lower, "lift_upper": upper}
    data = {name: (dims, np.asarray(value, float)) for name, value in values.items()}
    for name, value in (("share", share), ("share_lower", share * 0.9), ("share_upper", share / 0.9)):
        data[name] = (dims, np.full(np.shape(lift), value))
    data["p_value"] = (dims, np.full(np.shape(lift), 0.001) if p_value is None else np.asarray(p_value, float))
    data["n_documents"] = ("domain", n_documents)
    return layered(layers).merge(
        xr.Dataset(data, coords={"domain": names, "expert": np.arange(np.shape(lift)[2])}),
        combine_attrs="drop_conflicts",
    )


def quiet_results(**changed):
    """Results in which nothing stands out, with some of them replaced."""
    margins = layered([0], mean=[1.0])
    margins["margin"] = (("layer", "quantile"), [[0.03, 0.19, 0.45, 0.9, 1.6]])
    return {
        "load_interval": loads([0.5, 0.5], [0.4, 0.4], [0.6, 0.6]),
        "imbalance": layered(
            [0],
            max_violation=[0.1],
            max_violation_lower=[0.0],
            max_violation_upper=[0.2],
            max_violation_null_upper=[0.05],
        ),
        "repetition": layered([0], repetition=[0.52], lower=[0.48], upper=[0.56], null=[0.5]),
        "margin": margins,
    } | changed


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.414, "41 %"), (0.0414, "4.1 %"), (0.0041, "0.41 %"), (0.00004, "0.004 %"), (1, "100 %"), (0, "0 %")],
)
def test_shares_are_written_for_people(share, text):
    assert findings.percent(share) == text.replace(" ", "\u00a0")


@pytest.mark.parametrize(("ratio", "text"), [(6.24, "6.2 ×"), (12.4, "12 ×"), (0.612, "0.61 ×"), (9.96, "10 ×")])
def test_ratios_are_written_for_people(ratio, text):
    assert findings.times(ratio) == text.replace(" ", "\u00a0")
    assert findings.interval(0.36, 0.461, 100) == "[36,\u00a046]"


def test_widening_is_student_and_bonferroni():
    assert findings.widening(0.95, 1, 1e9) == pytest.approx(1)
    assert findings.widening(0.95, 1, 20) == pytest.approx(1)  # the interval is Student's already
    assert findings.widening(0.95, 100, 1e9) == pytest.approx(3.4808 / 1.95996, rel=1e-4)  # z at 1 - 0.025 / 100
    assert findings.widening(0.95, 50, 20) == pytest.approx(3.883 / 2.0930, rel=1e-3)  # t table, 0.9995 and 0.975


def test_cells_are_judged_together():
    many = 10**7  # documents, so that only the number of cells widens
    bounds = [[[1.6, 1.01]]], [[[2.5, 2.2277]]]
    result = preferences([[[2.0, 1.5]]], *bounds, n_documents=[many], p_value=[[[0.01, 0.2]]])
    cells = findings.specialized_cells(result)
    factor = 2.2414 / 1.95996  # z at 1 - 0.05 / 4 over z at 1 - 0.05 / 2
    assert cells.attrs["n_compared"] == 2
    assert cells["lift_lower"].values[0, 0, 0] == pytest.approx(2 * 0.8**factor, rel=1e-4)
    assert cells["lift_upper"].values[0, 0, 0] == pytest.approx(2 * 1.25**factor, rel=1e-4)
    assert cells["settled"].values.tolist() == [[[True, False]]]  # by the p-value, which is for all cells at once


def test_a_domain_of_few_documents_makes_no_claim():
    result = preferences([[[9.0]], [[2.0]]], [[[8.0]], [[1.9]]], [[[9.5]], [[2.1]]], n_documents=[4, 100])
    cells = findings.specialized_cells(result)
    assert cells["lift_lower"].notnull().values.ravel().tolist() == [False, True]
    found = findings.find(quiet_results(specialization=result))
    assert [finding.where.get("domain") for finding in found if finding.kind == "specialization"] == ["d1"]


def test_a_preference_needs_its_interval_and_its_permutation_test():
    """The widened interval of d0 is far above 1, but whole documents that swap domains differ as much."""
    lift = np.full((2, 1, 1), 3.0)
    result = preferences(lift, lift * 0.9, lift / 0.9, n_documents=[100, 100], p_value=[[[0.3]], [[0.01]]])
    found = findings.find(quiet_results(specialization=result))
    assert [finding.where.get("domain") for finding in found if finding.kind == "specialization"] == ["d1"]


def informed(**changed):
    """Mutual information of token and domain at two layers."""
    parts = {
        "normalized": [[0.3, 0.4], [0.05, 0.06]],
        "null": [[0.1, 0.08], [0.01, 0.02]],
        "null_upper": [[0.12, 0.1], [0.02, 0.03]],
        "p_value": [[0.016, 0.016], [0.005, 0.005]],
    } | changed
    result = layered([1, 3])
    for name, values in parts.items():
        result[name] = (("label", "layer"), np.asarray(values, float))
    result["excess"] = result["normalized"] - result["null"]
    return result.assign_coords(label=["token_id", "domain"], n_permutations=("label", [60, 200]))


def test_what_explains_the_choice_is_told_beside_its_null():
    found = findings.find(quiet_results(mutual_information=informed()))[0]
    assert found.text.replace("\u00a0", " ") == (
        "In layer 3 token and expert share 40 % of their information, 8.0 % if tokens are shuffled within documents; "
        "domain and expert share 6.0 %, 2.0 % if documents swap domains."
    )
    assert (found.kind, found.anchor, found.value, found.null) == ("information", "information", 0.4, 0.08)
    assert found.strength == pytest.approx(np.log(4))
    assert found.where == {"layer": 3}
    chance = informed(p_value=[[0.016, 0.03], [0.5, 0.5]])  # two labels: below 0.025
    text = findings.find(quiet_results(mutual_information=chance))[0].text
    assert text.startswith("In layer 1 token") and "domain" not in text
    nothing = informed(p_value=[[0.2, 0.9], [0.005, 0.005]])
    assert findings.find(quiet_results(mutual_information=nothing))[0].kind == "nothing"


def test_a_preference_is_told_with_both_numbers_and_their_intervals():
    lift = np.ones((1, 1, 12))
    lift[0, 0, 11] = 6.2
    result = preferences(lift, lift * 0.9, lift / 0.9, n_documents=[10**7], share=0.41)
    found = findings.find(quiet_results(specialization=result))[0]
    reach = 0.9 ** (2.8653 / 1.95996)  # z at 1 - 0.05 / 24
    assert found.value == 6.2 and found.null == 1
    assert found.lower == pytest.approx(6.2 * reach, rel=1e-3)
    assert found.strength == pytest.approx(np.log(6.2 * reach), rel=1e-3)
    assert found.text.replace("\u00a0", " ") == (
        "Layer 5 sends 41 % [35, 48] of “d0” tokens to expert 11, 6.2 × [5.3, 7.2] its share overall."
    )
    assert found.anchor == "domains"
    assert "12 cells" in found.detail
    assert found.where == {"domain": "d0", "layer": 5, "expert": 11}


def test_an_uneven_layer_is_told_beside_chance():
    uneven = layered(
        [1, 3],
        max_violation=[1.9, 0.1],
        max_violation_lower=[1.6, 0.0],
        max_violation_upper=[2.2, 0.4],
        max_violation_null_upper=[0.06, 0.06],
    )
    shares = [[0.1, 0.725, 0.1, 0.075], [0.25] * 4]
    load = loads(shares, np.zeros((2, 4)), np.ones((2, 4)), layers=(1, 3), n_documents=10**7)
    found = findings.find(quiet_results(imbalance=uneven, load_interval=load))[0]
    assert found.text.replace("\u00a0", " ") == (
        "Layer 1 is most surely uneven: its busiest expert, 1, takes 2.9 × [2.6, 3.2] an even share; "
        "chance alone would stay below 1.06 ×."
    )
    assert found.lower == pytest.approx(2.9 - 0.3 * 2.2414 / 1.95996, rel=1e-4)
    assert found.null == pytest.approx(1.06)


def test_unused_experts_are_bounded_not_dead():
    load = loads([[0.5, 0.5, 0, 0]], [[0.4, 0.4, 0, 0]], [[0.6, 0.6, 0.002, 0.002]])
    found = findings.find(quiet_results(load_interval=load))[0]
    assert found.headline == "2 of 4"
    assert found.text.replace("\u00a0", " ") == (
        "In layer 0, 2 of 4 experts got no token at all; the load of each is at most 0.20 %, "
        "where an even share is 25 %."
    )
    assert "dead" not in found.text


@pytest.mark.parametrize(("value", "lower", "upper"), [(0.25, 0.24, 0.26), (0.04, 0.03, 0.05)])
def test_repetition_above_or_below_chance_is_a_finding(value, lower, upper):
    result = layered([7], repetition=[value], lower=[lower], upper=[upper], null=[0.09])
    found = findings.find(quiet_results(repetition=result))[0]
    assert (found.kind, found.value, found.null) == ("repetition", value, 0.09)
    assert f"{100 * value:.0f}" in found.headline
    assert found.strength > 0


def test_if_nothing_stands_out_that_is_the_finding():
    found = findings.find(quiet_results())
    assert [finding.kind for finding in found] == ["nothing", "quiet repetition", "margin"]
    assert found[0].text.startswith("Nothing stands out")
    assert "52 % [48, 56] against 50 %" in found[1].text.replace("\u00a0", " ")


def test_margins_are_described_last():
    found = findings.find(quiet_results())[-1]
    assert found.text.replace("\u00a0", " ") == (
        "The router is least sure in layer 0: the median margin is 0.45 logits (90 % of decisions: 0.03 to 1.6), "
        "and a quarter are within 0.19."
    )


def test_at_most_two_of_a_kind_and_six_in_all():
    lift = np.full((9, 1, 1), 3.0)
    result = preferences(lift, lift * 0.99, lift / 0.99, n_documents=[10**6] * 9)
    found = findings.find(quiet_results(specialization=result))
    assert [finding.kind for finding in found] == ["specialization", "specialization", "margin"]


def random_recording(seed, *, preference=0.0):
    """Uniform routing, but a share of the tokens of domain "b" goes to expert 2 of layer 0."""
    rng = np.random.default_rng(seed)
    experts = rng.integers(0, 8, size=(6000, 2))
    forced = (np.arange(6000) >= 3000) & (rng.random(6000) < preference)
    experts[forced, 0] = 2
    return planted.from_experts(experts, n_experts=8, lengths=[100] * 60, domains=["a"] * 30 + ["b"] * 30)


@pytest.mark.parametrize("seed", range(5))
def test_uniform_routing_yields_no_claim(seed):
    found = findings.find(report.compute(random_recording(seed)))
    assert [finding.kind for finding in found] == ["nothing", "quiet repetition", "margin"]


def test_a_planted_preference_is_found_with_its_number():
    tree = random_recording(0, preference=0.5)
    found = next(finding for finding in findings.find(report.compute(tree)) if finding.kind == "specialization")
    share = routing_stats.specialization(tree)["share"].sel(domain="b", layer=0, expert=2)
    assert found.where == {"domain": "b", "layer": 0, "expert": 2}
    assert f"{100 * float(share):.0f}\u00a0%" in found.text
    assert 1 < found.lower < found.value < found.upper


def test_one_document_claims_nothing():
    tree = planted.from_experts(np.zeros((50, 1), int), n_experts=4, lengths=[50])
    found = findings.find(report.compute(tree))
    assert "1 document has no interval" in found[0].text


def test_four_documents_claim_nothing():
    tree = planted.from_experts(np.zeros((48, 1), int), n_experts=4, lengths=[12] * 4)
    found = findings.find(report.compute(tree))
    assert found[0].text.startswith("Nothing can be claimed: 4 documents have no interval")


def test_rare_transitions_are_left_out():
    count = xr.DataArray([[[60, 20], [15, 5]]], dims=("layer", "expert", "next_expert"))
    enough = findings.enough_expected(xr.Dataset({"count": count}), least=10)
    # expected: 80 · 75, 80 · 25, 20 · 75, 20 · 25 over 100
    assert enough.values.tolist() == [[[True, True], [True, False]]]


# --- titles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "n_layers", "words"),
    [
        ([4], 8, "layer 4"),
        ([4, 5], 8, "layers 4 and 5"),
        ([1, 4, 5], 8, "layers 1, 4 and 5"),
        ([1, 2, 3, 4], 8, "4 of 8 layers"),
        ([0, 1], 2, "every layer"),
        ([0], 1, "layer 0"),
    ],
)
def test_layers_in_words(layers, n_layers, words):
    assert titles.layers_in_words(layers, n_layers) == words


def test_titles_say_what_one_sees():
    load = loads([[0.1, 0.9]], [[0.05, 0.8]], [[0.2, 0.95]], layers=(3,))
    assert titles.load(load) == "The busiest expert of all is number 1 of layer 3, at 1.8\u00a0× an even share"
    assert (
        titles.load(loads([[0.5, 0.5]], [[0.4, 0.4]], [[0.6, 0.6]])) == "No expert is surely busier than an even share"
    )
    imbalance = layered([0, 1], max_violation_lower=[0.2, 0.01], max_violation_null_upper=[0.1, 0.1])
    assert titles.imbalance(imbalance) == "In layer 0 the busiest expert is busier than chance would make it"
    assert (
        titles.imbalance(imbalance.isel(layer=[1]))
        == "In no layer is the busiest expert surely busier than chance would make it"
    )
    withheld = loads(
        [[0.9, 0.1], [0.4, 0.6]], [[np.nan, np.nan], [0.3, 0.55]], [[np.nan] * 2, [0.5, 0.7]], layers=(1, 3)
    )
    assert titles.load(withheld).startswith("The busiest expert whose load is certain is number 1 of layer 3")
    repetition = layered([0, 1], lower=[0.3, 0.1], null=[0.2, 0.2])
    assert titles.repetition(repetition) == "Neighbouring tokens share an expert more often than chance in layer 0"


def test_title_of_transitions_names_the_strongest_that_is_not_rare():
    experts = np.array([[0, 0]] * 30 + [[0, 1]] * 10 + [[1, 1]] * 39 + [[1, 2]])
    result = routing_stats.transition(planted.from_experts(experts, n_experts=3, lengths=[80], layers=[1, 3]))
    # 30 of expert 0's 40 tokens go to 0, whose share is 30 / 80
    assert titles.transition(result) == (
        "75\u00a0% of the tokens at layer 1's expert 0 go on to layer 3's expert 0, 2.0\u00a0× what independence gives"
    )


def test_titles_of_information_name_the_label_that_surely_tells():
    assert titles.information(informed()) == (
        "Token and expert tell about each other in every layer, most in layer 3: they share 40\u00a0% of their "
        "information, 8.0\u00a0% by chance"
    )
    only_domain = informed(p_value=[[0.9, 0.9], [0.005, 0.6]])
    assert titles.information(only_domain).startswith("Domain and expert tell about each other in layer 1: they")
    assert titles.information(informed(p_value=np.ones((2, 2)))).startswith("Nothing that was asked tells")


def test_titles_of_paths_say_when_every_token_goes_its_own_way():
    experts = np.array([[0, 0]] * 30 + [[0, 1]] * 10 + [[1, 1]] * 40)
    result = routing_stats.paths(planted.from_experts(experts, n_experts=2, lengths=[10] * 8))
    # 40 of 80 tokens; independent layers give 40 / 80 · 50 / 80
    assert titles.paths(result) == ("80 tokens take 3 paths; the most common carries 50\u00a0% of them")
    alone = routing_stats.paths(planted.from_experts(np.arange(16).reshape(16, 1), n_experts=16, lengths=[16]))
    assert titles.paths(alone) == "Nearly every token takes a path of its own: 16 tokens, 16 paths"
    same = routing_stats.paths(planted.from_experts(np.zeros((16, 2), int), n_experts=3, lengths=[16]))
    assert titles.paths(same) == "All tokens take the same path through the layers"


def test_title_of_batches_takes_a_size_at_which_half_is_open():
    experts = np.tile(np.repeat([0, 1], 8), 5)[:, None]
    result = routing_stats.distinct_experts(planted.from_experts(experts, n_experts=2, lengths=[16] * 5))
    assert titles.typical_batch(result) == (1, 1.0, 1.0, 1.0)
    result = routing_stats.distinct_experts(planted.from_experts(experts, n_experts=8, lengths=[16] * 5))
    # uniform at 256 is 8; the first of at least 4 is at 8 tokens: 8 · (1 - (7/8)^8) = 5.25
    size, unrelated, consecutive, uniform = titles.typical_batch(result)
    assert (size, consecutive) == (8, 1.0)
    assert uniform == pytest.approx(8 * (1 - (7 / 8) ** 8))
    assert unrelated == pytest.approx(2 * (1 - 0.5**8))
    assert titles.batches(result) == (
        "A batch of 8 unrelated tokens touches 2.0 experts in the median layer, 8 consecutive ones 1.0; "
        "a uniform router would touch 5.3"
    )


def test_halves_are_rounded_as_scripts_round_them():
    assert [findings.digits(value) for value in (6.25, 0.125, 12.5, 2.5, -6.25)] == ["6.3", "0.13", "13", "2.5", "-6.3"]


def test_a_cell_is_settled_only_where_its_own_interval_agrees():
    cells = {"domain": ["a"], "layer": [0], "expert": [0, 1]}
    values = {"share": 0.5, "share_lower": 0.4, "share_upper": 0.6, "lift": 2.0, "lift_upper": 3.0, "p_value": 0.001}
    result = xr.Dataset({name: (tuple(cells), np.full((1, 1, 2), value)) for name, value in values.items()}, cells)
    result["lift_lower"] = (tuple(cells), [[[1.5, 0.5]]])
    result["n_documents"] = ("domain", [9])
    assert findings.specialized_cells(result.assign_attrs(level=0.95))["settled"].values.tolist() == [[[True, False]]]
