"""The report's part on attention: there where attention was recorded, with the numbers of the statistics."""

import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from probe import attention_maps, findings, report, report_attention, schema, store
from probe import attention_titles as titles
from tests.attention_cases import random_recording
from tests.test_report import HOSTILE, Page, refuse, written

SECTIONS = ["attention", "heads", "distance", "chunks", "positions", "maps"]
MISSING = {
    "attention": "No statistic of single queries was recorded",
    "heads": "No statistic that tells heads apart was recorded",
    "distance": "How far back attention reaches was not recorded",
    "positions": "The entropy of attention was not recorded",
    "maps": "No map of a text was recorded",
}
MAPS_WITHOUT_STATISTICS = "No statistic was recorded that tells which heads' maps are worth a look"


def recorded(**options):
    """A whole recording of random attention."""
    tree = random_recording(**options)
    samples = tree["samples"].to_dataset()
    n_queries = np.bincount(tree["attention"]["sample"], minlength=samples.sizes["sample"]).astype(np.uint32)
    attributes = {"long_name": schema.SAMPLES["n_queries"].long_name, "units": "token"}
    return changed(tree, samples=samples.assign(n_queries=("sample", n_queries, attributes)))


@pytest.fixture(scope="module", autouse=True)
def few_permutations():
    """Of the routing, which takes most of the time and is not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PERMUTATIONS", {"token_id": 2, "domain": 2})
        yield


@pytest.fixture(scope="module")
def tree():
    return recorded()


@pytest.fixture(scope="module")
def folder(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    report.write_report(tree, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "index.html").read_text(encoding="utf-8"))


def changed(tree, **groups):
    """A copy with other Datasets in some groups; None leaves a group out."""
    result = tree.copy()
    for name, group in groups.items():
        if group is None:
            del result[name]
        else:
            result[name] = xr.DataTree(group)
    return result


def without(tree, *names):
    """A recording that lacks some variables of attention."""
    groups = {name: tree[name].to_dataset() for name in ("attention", "attention_profiles")}
    return changed(tree, **{name: group.drop_vars(names, errors="ignore") for name, group in groups.items()})


def sections_of(tree):
    """What each section says, its figure and tables among it."""
    results = {name: compute() for name, compute in report_attention.plan(tree).items()}
    return {
        section.anchor: " ".join([section.title, section.reading, section.definition, str(section.figure)])
        + " ".join(cell for table in section.tables for row in (table.columns, *table.rows) for cell in row)
        for section in report_attention.build(tree, results)
    }


def figures_in(text):
    """The figures of a section, read as strict JSON."""
    scripts = re.findall(r'<script type="application/json">(.*?)</script>', text)
    return [json.loads(script, parse_constant=refuse) for script in scripts]


def read_table(folder, name):
    return pd.read_parquet(folder / "tables" / f"{name}.parquet")


def of_kind(tree, statistic, kind):
    return attention_maps.by_kind(tree).sel(statistic=statistic, attention_kind=kind)


# --- there, and not there ---------------------------------------------------------------------------------------------


def test_a_recording_without_attention_is_reported_as_before(tree, tmp_path):
    (tmp_path / "tables").mkdir()
    for name in report_attention.FUNCTIONS:  # of an earlier report
        (tmp_path / "tables" / f"{name}.csv").touch()
    page = written(changed(tree, attention=None, attention_profiles=None), tmp_path)
    assert not set(SECTIONS) & set(page.identifiers)
    assert "attention of" not in page.text["top"] and "attention and" not in page.text["findings"]
    assert not list((tmp_path / "tables").glob("attention_*"))
    assert "attention_maps" not in (tmp_path / "tables" / "README.md").read_text(encoding="utf-8")
    assert "attention" not in json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))


def test_sections_come_in_the_order_of_the_questions_before_the_text(page):
    assert page.identifiers[-7:] == [*SECTIONS, "text"]
    assert all(len(figures_in(text)) == 1 for text in sections_of(recorded()).values())


def test_links_lead_somewhere(folder, page):
    for anchor in page.anchors:
        assert anchor[1:] in page.identifiers if anchor.startswith("#") else (folder / anchor).is_file(), anchor


def test_a_report_from_its_own_store_has_the_part_too(folder, page, tmp_path):
    again = written(store.open(folder / "routing.zarr"), tmp_path)
    assert {name: again.text[name] for name in SECTIONS} == {name: page.text[name] for name in SECTIONS}


def test_progress_has_as_many_steps_as_are_taken(tree, monkeypatch, tmp_path):
    taken, announced = [], []

    def progress(shown, n_steps):
        announced.append(n_steps)
        return nullcontext(taken.append)

    monkeypatch.setattr(report, "_progress", progress)
    report.write_report(tree, tmp_path)
    assert announced == [len(taken)]
    assert len(set(taken)) == len(taken)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_title_of_kinds_holds_the_far_mass_with_its_interval(tree, page):
    far = of_kind(tree, "far_mass", "nope")
    share = f"{100 * float(far['mean']):.0f}\xa0% [{100 * float(far['lower']):.0f},\xa0{100 * float(far['upper']):.0f}]"
    assert f"NoPE layers put {share} of their attention beyond the chunk; RoPE layers none" in page.text["attention"]


def test_the_finding_on_attention_holds_the_numbers_of_the_statistics(tree, page):
    (found,) = [finding for finding in findings.find(report.compute(tree)) if finding.kind == "attention"]
    far, nope, rope = (
        of_kind(tree, *which) for which in (("far_mass", "nope"), ("mean_distance", "nope"), ("mean_distance", "rope"))
    )
    assert (found.value, found.lower, found.upper) == tuple(float(far[name]) for name in ("mean", "lower", "upper"))
    assert found.anchor == "attention"
    for own in (nope, rope):
        numbers = [findings.digits(float(own[name])) for name in ("mean", "lower", "upper")]
        assert "{} [{},\xa0{}]".format(*numbers) in found.text
    assert found.text in page.text["findings"]


def test_tables_on_the_page_repeat_the_statistics(tree, page):
    kinds = attention_maps.by_kind(tree)
    for name in ("mean", "lower", "upper"):
        for value in kinds[name].values.ravel():
            assert f"{value:.3g}" in page.text["attention"]
    for statistic in report_attention.HEAD_STATISTICS:
        for value in attention_maps.head_mean(tree, statistic)["mean"].values.ravel():
            assert f"{value:.3g}" in page.text["heads"]
    for value in attention_maps.distance_profile(tree, by_kind=True)["distance_mass"].values.ravel():
        assert f"{value:.3g}" in page.text["distance"]
    for value in attention_maps.position_profile(tree, "entropy")["mean"].values.ravel():
        assert f"{value:.3g}" in page.text["positions"]
    reach = attention_maps.chunk_reach(tree)
    for name in ("reach", "entropy", "mean_distance", "loss"):
        for value in reach[name].values.ravel():
            assert f"{value:.3g}" in page.text["chunks"]


def test_tables_equal_the_statistics(tree, folder):
    kinds = read_table(folder, "attention_by_kind").set_index(["statistic", "attention_kind"])
    assert kinds.loc[("entropy", "nope"), "mean"] == float(of_kind(tree, "entropy", "nope")["mean"])
    heads = read_table(folder, "attention_head_mean").set_index(["statistic", "layer", "head"])
    assert set(heads.index.unique("statistic")) == set(report_attention.recorded_statistics(tree))
    for statistic in ("entropy", "far_mass", "mean_distance"):
        own = attention_maps.head_mean(tree, statistic)
        np.testing.assert_array_equal(heads.loc[statistic]["upper"], own["upper"].values.ravel())
    assert heads.loc[("entropy", 3, 0), "attention_kind"] == "nope"
    assert heads.loc[("entropy", 3, 0), "units"] == "nat"
    sinks = read_table(folder, "attention_sinks")
    np.testing.assert_array_equal(sinks["is_sink"], attention_maps.sinks(tree)["is_sink"].values.ravel())
    distances = read_table(folder, "attention_head_distance").set_index(["layer", "head", "distance_bin"]).sort_index()
    own = attention_maps.distance_profile(tree)["distance_mass"].transpose("layer", "head", "distance_bin")
    np.testing.assert_array_equal(distances["distance_mass"], own.values.ravel())


def test_every_table_says_where_it_comes_from(folder):
    guide = (folder / "tables" / "README.md").read_text(encoding="utf-8")
    for name, function in report_attention.FUNCTIONS.items():
        assert f"## {name}\n\nMade by `probe.attention_maps.{function}`." in guide
        assert callable(getattr(attention_maps, function))
    assert "Bounds: 95%, over the draw of its queries." in guide


def test_the_summary_counts_what_was_recorded(tree, folder):
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert summary["attention"] == {
        "layers": 4,
        "heads": 3,
        "queries": 54,
        "tokens": 54,
        "queries_per_text": 0,
        "seed": 0,
        "chunk_size": 4,
    }
    assert "attention" in {finding["kind"] for finding in summary["findings"]}


def test_maps_are_of_the_longest_text_and_its_most_telling_heads(tree, page):
    attention = tree["attention"].to_dataset()
    own = attention.isel(query=attention["sample"].values == 3)  # 14 tokens
    far = own["far_mass"].mean("query")
    layer, head = np.unravel_index(int(np.argmax(far.values)), far.shape)
    share = f"{100 * float(far.values[layer, head]):.0f}\xa0%"
    assert (
        f"In “sample 3” (14 tokens) head {head} of layer {layer} ◇ puts {share} of its attention" in page.text["maps"]
    )
    result = report.compute(tree)["attention_query_mean"]
    chosen = report_attention.telling_heads(result)
    assert chosen["far_mass"] == (layer, head)
    assert list(chosen) == ["far_mass", "previous_mass", "sink_mass", "entropy"]
    assert len(set(chosen.values())) == 4
    assert bool((result["lower"] == result["mean"]).all())  # all queries were recorded


def test_the_switch_shows_one_grid_at_a_time(tree, page):
    (grid,) = [
        figure
        for figure in (json.loads(text) for text in page.data if '"layout"' in text)
        if [button["label"] for button in figure["layout"].get("updatemenus", [{}])[0].get("buttons", [])]
        == list(report_attention.HEAD_STATISTICS.values())
    ]
    buttons = grid["layout"]["updatemenus"][0]["buttons"]
    cells = [trace["type"] == "heatmap" for trace in grid["data"]]
    assert sum(cells) == len(buttons) == 4
    for button, statistic in zip(buttons, report_attention.HEAD_STATISTICS, strict=True):
        visible, layout = button["args"][0]["visible"], button["args"][1]
        (shown,) = [trace for trace, is_on, own in zip(grid["data"], visible, cells, strict=True) if is_on and own]
        means = attention_maps.head_mean(tree, statistic)["mean"]
        hovers = [cell[0] for row in shown["customdata"] for cell in row]
        assert f"{float(means[0, 0]):.3g}" in hovers[0]
        least = 0.3 if statistic == "sink_mass" else 0
        assert layout["coloraxis.cmax"] == pytest.approx(max(float(means.max()), least))
        title = "entropy (nat)" if statistic == "entropy" else statistic.replace("_", " ")
        assert layout["coloraxis.colorbar.title.text"] == title
    assert [trace.get("visible", True) for trace in grid["data"]] == buttons[0]["args"][0]["visible"]


# --- sampled queries --------------------------------------------------------------------------------------------------


def test_sampled_queries_are_said_to_be():
    tree = recorded(queries=3)
    n_queries = tree["attention"].sizes["query"]
    assert n_queries == 19  # one text has a single token
    summary = report_attention.summarize(tree)
    assert report_attention.overview(summary) == f"attention of 4 layers of 3 heads, {n_queries} of 54 queries"
    sections = sections_of(tree)
    assert f"rest on {n_queries} of 54 queries, at most 3 of each text, drawn at random" in sections["attention"]
    assert "estimated from 3 of its 14 queries" in sections["maps"]


def test_recorded_in_full_says_nothing_of_a_draw(page):
    assert "attention of 4 layers of 3 heads" in page.text["top"] and "queries" not in page.text["top"]
    assert "drawn at random" not in page.text["attention"]
    assert "estimated from" not in page.text["maps"]


# --- odd and hostile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lengths": (12,)}, {"attention": "There are no intervals: 1 text of the 5 that they take."}),
        ({"layers": (0, 1, 2)}, {"attention": "None of the recorded layers is a NoPE layer"}),
        ({"layers": (3,), "n_heads": 1}, {"attention": "None of the recorded layers is a RoPE layer"}),
        ({"chunk_size": 100}, {"chunks": "the longest text has 14 tokens", "distance": "No text is longer than"}),
        ({"lengths": (1,) * 6}, {"chunks": "No text reaches a chunk border"}),
        ({"lengths": (1,), "n_heads": 1}, {"chunks": "the longest text has 1 token."}),
        ({"chunk_size": 1}, {"chunks": "behind chunk borders the entropy of RoPE layers is 0"}),
        ({"queries": 1}, {"attention": "drawn at random"}),
    ],
    ids=["one text", "no NoPE", "no RoPE", "below a chunk", "single tokens", "one token", "chunk of 1", "one query"],
)
def test_odd_recordings_of_attention_are_reported(options, words):
    sections = sections_of(recorded(**options))
    assert list(sections) == SECTIONS
    for section, text in words.items():
        assert text.lower() in sections[section].lower()
    for text in sections.values():
        assert not figures_in(text) or len(figures_in(text)) == 1
        seen = re.sub(r"<script.*?</script>", "", text)
        assert "nan" not in seen.lower().split() and "?" not in seen


def test_one_text_and_one_kind_make_no_finding():
    for options in ({"lengths": (12,)}, {"layers": (0, 1, 2)}, {"layers": (3,)}):
        tree = recorded(**options)
        assert findings._attention({"attention_by_kind": attention_maps.by_kind(tree)}) == []


def test_below_a_chunk_the_finding_is_on_distances_alone():
    result = kinds(far_mass=([0, 0], [0, 0], [0, 0]), mean_distance=([2, 5], [1.5, 4], [2.5, 6]))
    (found,) = findings._attention({"attention_by_kind": result})
    assert found.text.replace("\xa0", " ") == (
        "NoPE layers look 5.0 [4.0, 6.0] tokens back on average, RoPE layers 2.0 [1.5, 2.5]."
    )
    assert (found.value, found.lower, found.upper) == (5, 4, 6)
    alike = kinds(mean_distance=([4, 5], [3, 4], [5, 6]), difference=[(1, -0.5, 2.5)])
    assert findings._attention({"attention_by_kind": alike}) == []


@pytest.mark.parametrize(
    ("dropped", "missing"),
    [
        (
            [*report_attention.recorded_statistics(random_recording()), "map_max"],
            {"attention", "heads", "positions", "maps"},
        ),
        (["entropy"], {"positions"}),
        (["entropy", "sink_mass", "previous_mass", "far_mass", "map_max"], {"heads", "positions", "maps"}),
        (["distance_mass"], {"distance"}),
        (["map_sum"], {"maps"}),
    ],
    ids=["all statistics", "entropy", "head statistics", "distances", "maps"],
)
def test_what_was_not_recorded_is_said_and_how_to_record_it(tree, dropped, missing):
    sections = sections_of(without(tree, *dropped))
    assert list(sections) == SECTIONS
    for section, words in MISSING.items():
        assert (words in sections[section]) == (section in missing)
        assert ("AttentionSpec(statistics=" in sections[section]) == (section in missing)
        assert bool(figures_in(sections[section])) != (section in missing)


def test_a_section_without_a_figure_has_no_table(tree, tmp_path):
    page = written(without(tree, *report_attention.recorded_statistics(tree)), tmp_path)
    assert MISSING["attention"] in page.text["attention"]
    assert MAPS_WITHOUT_STATISTICS in page.text["maps"]
    assert "Definition" not in page.text["attention"] and "Data" not in page.text["attention"]
    linked = [anchor for anchor in page.anchors if not anchor.startswith("#")]
    assert linked and all((tmp_path / anchor).is_file() for anchor in linked)


def test_nothing_in_a_recording_of_attention_becomes_markup(tree, tmp_path):
    samples = tree["samples"].to_dataset()
    names = np.array([HOSTILE[:20]] * samples.sizes["sample"], np.dtypes.StringDType())
    page = written(changed(tree, samples=samples.assign(name=("sample", names, samples["name"].attrs))), tmp_path)
    assert f"In “{HOSTILE[:20]}” (14 tokens)" in page.text["maps"]
    assert len(page.scripts) == 2 and page.handlers == [] and page.loaded == []
    for data in page.data:
        assert "<" not in data
        json.loads(data, parse_constant=refuse)


def test_many_heads_stay_small():
    """320 heads: the page has no line for each of them."""
    sections = sections_of(recorded(lengths=(6,) * 6, layers=range(8), n_heads=40))
    assert sum(map(len, sections.values())) < 600_000
    assert "thin lines" not in sections["distance"]


# --- titles -----------------------------------------------------------------------------------------------------------


def kinds(*, difference=None, **statistics):
    """``by_kind`` of mean, lower and upper of (RoPE, NoPE) layers."""
    values = np.array(list(statistics.values()), float)  # statistic, number, kind
    columns = {
        name: (("statistic", "attention_kind"), values[:, at]) for at, name in enumerate(("mean", "lower", "upper"))
    }
    gaps = np.array([[gap, gap - 0.1, gap + 0.1] for gap in values[:, 0, 1] - values[:, 0, 0]])
    gaps[np.array([own[0] == own[1] for own in values[:, 0]])] = 0
    gaps = gaps if difference is None else np.array(difference, float)
    columns |= {
        name: ("statistic", gaps[:, at])
        for at, name in enumerate(("difference", "difference_lower", "difference_upper"))
    }
    units = [schema.ATTENTION[name].units for name in statistics]
    coords = {
        "statistic": list(statistics),
        "units": ("statistic", units),
        "attention_kind": list(schema.ATTENTION_KINDS),
    }
    return xr.Dataset(columns, coords, {"level": 0.95})


def plain(text):
    return text.replace("\xa0", " ")


def test_titles_of_kinds():
    far = kinds(far_mass=([0, 0.434], [0, 0.405], [0, 0.462]), mean_distance=([3, 12], [2, 11], [4, 13]))
    assert (
        plain(titles.by_kind(far))
        == "NoPE layers put 43 % [41, 46] of their attention beyond the chunk; RoPE layers none"
    )
    near = kinds(far_mass=([0, 0], [0, 0], [0, 0]), mean_distance=([3, 12], [2, 11], [4, 13]))
    assert plain(titles.by_kind(near)) == (
        "NoPE layers look 12 [11, 13] tokens back on average, RoPE layers 3.0 [2.0, 4.0] tokens"
    )
    few = kinds(entropy=([1.5, 2.5], [np.nan] * 2, [np.nan] * 2))
    assert plain(titles.by_kind(few)) == "NoPE layers have a mean entropy of 2.5 nat, RoPE layers 1.5 nat"
    rope = kinds(mean_distance=([3, np.nan], [2, np.nan], [4, np.nan]))
    assert plain(titles.by_kind(rope)) == (
        "All recorded layers are RoPE layers; they look 3.0 [2.0, 4.0] tokens back on average"
    )
    none = kinds(previous_mass=([np.nan] * 2,) * 3)
    assert titles.by_kind(none) == "Nothing about attention is defined in these texts"


def of_heads(values, **attributes):
    codes = [0] * (len(values) - 1) + [1]
    coords = {
        "layer": range(len(values)),
        "attention_kind": ("layer", codes, {"categories": list(schema.ATTENTION_KINDS)}),
        "head": range(len(values[0])),
    }
    return xr.Dataset({"sink_mass": (("layer", "head"), np.array(values, float))}, coords, attributes)


def test_titles_of_heads_count_the_sinks():
    values = [[0.1, 0.2], [0.05, 0.75]]
    sinks = of_heads(values, threshold=0.3)
    means = sinks.rename(sink_mass="mean").expand_dims(statistic=["sink_mass"])
    assert plain(titles.heads(means, sinks.assign(is_sink=sinks["sink_mass"] > 0.3))) == (
        "1 of 4 heads parks more than 30 % of its attention on the first token: head 1 of layer 1 ◇, with 75 %"
    )
    assert plain(titles.heads(means, sinks.assign(is_sink=sinks["sink_mass"] > 0.15))) == (
        "2 of 4 heads park more than 30 % of their attention on the first token, most of all: head 1 of layer 1 ◇, "
        "with 75 %"
    )
    both = xr.concat([means, means.assign_coords(statistic=["previous_mass"])], "statistic")
    assert plain(titles.heads(both, sinks.assign(is_sink=sinks["sink_mass"] > 0.8))) == (
        "No head parks more than 30 % of its attention on the first token; head 1 of layer 1 ◇ gives 75 % to the token "
        "before"
    )
    assert titles.heads(means, None) == "Of all heads, head 1 of layer 1 ◇ has the highest sink mass"


def test_title_of_distances_names_where_most_of_the_mass_is():
    mass = np.array([[0.5, 0.3, 0.2, 0], [0.1, 0.2, 0.3, 0.4]])
    dims = ("attention_kind", "distance_bin")
    coords = {"attention_kind": list(schema.ATTENTION_KINDS), "distance_bin": [0, 1, 2, 4]}
    columns = {"distance_mass": (dims, mass), "lower": (dims, mass - 0.05), "upper": (dims, mass + 0.05)}
    result = xr.Dataset(columns, coords)
    assert plain(titles.distance_profile(result)) == (
        "NoPE layers give most of all to tokens 4 to 7 back (40 % [35, 45]), RoPE layers to the token itself "
        "(50 % [45, 55])"
    )
    only = result.where(result["attention_kind"] == "rope").isel(distance_bin=[1, 2])
    assert plain(titles.distance_profile(only)) == ("RoPE layers give most of all to the token before (30 % [25, 35])")


def test_title_of_chunk_borders_says_what_falls():
    entropy = np.array([[0.5, 2, 3.5], [4.1, 4.3, 4.6]])
    dims = ("attention_kind", "chunk_position")
    columns = {
        "reach": (dims, [[1.5, 4, 8], [232.4, 250, 300]]),
        "entropy": (dims, entropy),
        "entropy_lower": (dims, entropy - 0.1),
        "entropy_upper": (dims, entropy + 0.1),
    }
    coords = {"attention_kind": list(schema.ATTENTION_KINDS), "chunk_position": [0, 3, 6]}
    result = xr.Dataset(columns, coords)
    assert plain(titles.chunk_reach(result)) == (
        "At a chunk border the entropy of RoPE layers falls from 3.5 [3.4, 3.6] to 0.50 [0.40, 0.60] nat; NoPE layers "
        "still see 232 keys"
    )
    only = result[["reach"]].where(result["attention_kind"] == "nope")
    assert titles.chunk_reach(only) == "NoPE layers still see 232 keys behind a chunk border"
    assert plain(titles.chunk_reach(result[["reach"]])).startswith(
        "At a chunk border the reach of RoPE layers falls from 8.0 to 1.5 visible keys"
    )


def test_title_of_positions_claims_a_rise_only_where_the_bounds_are_apart():
    mean = np.array([[1, 2, 1.5], [1, 2, 3]])
    dims = ("attention_kind", "position_bin")
    coords = {"attention_kind": list(schema.ATTENTION_KINDS), "position_bin": [0, 4, 8]}

    def title(reach):
        columns = {"mean": (dims, mean), "lower": (dims, mean - reach), "upper": (dims, mean + reach)}
        return plain(titles.position_profile(xr.Dataset(columns, coords)))

    assert title(0.5) == (
        "Along the text the entropy of NoPE layers rises from 1.0 [0.50, 1.5] to 3.0 [2.5, 3.5] nat, that of RoPE "
        "layers stays between 1.0 and 2.0 nat"
    )
    assert "goes from 1.0 [0, 2.0] to 3.0 [2.0, 4.0]" in title(1)


# --- what the command records -----------------------------------------------------------------------------------------


def model(n_layers=8, n_heads=4):
    config = SimpleNamespace(num_hidden_layers=n_layers, num_attention_heads=n_heads)
    config.get_text_config = lambda: config
    tokenizer = lambda text, verbose: {"input_ids": text.split()}  # noqa: E731
    return SimpleNamespace(config=config, tokenizer=tokenizer)


def test_short_texts_are_recorded_whole_and_long_ones_sampled():
    short, long = "word " * 1024, "word " * 1025
    assert report_attention.choose_spec(model(), [short, "x"]).queries is None
    assert report_attention.choose_spec(model(), [short, long]).queries == 256
    assert report_attention.choose_spec(model(), [long], max_tokens=1024).queries is None
    assert report_attention.choose_spec(model(), [long], max_tokens=1025).queries == 256
    assert report_attention.choose_spec(model(), [long], queries=7).queries == 7


def test_maps_are_recorded_where_they_fit():
    few = report_attention.choose_spec(model(), ["x"] * 216)
    assert {"map_max", "map_sum", "entropy", "distance_mass"} <= set(few.statistics)
    assert few.map_size == 32
    many = report_attention.choose_spec(model(48, 40), ["x"] * 216)
    assert "map_max" not in many.statistics and "entropy" in many.statistics
    per_map = 4 * 32 * 32
    n_texts = (1 << 28) // (2 * 48 * 40 * per_map)
    assert "map_max" in report_attention.choose_spec(model(48, 40), ["x"] * n_texts).statistics
    assert "map_max" not in report_attention.choose_spec(model(48, 40), ["x"] * (n_texts + 1)).statistics
