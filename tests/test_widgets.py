"""The explorer without a browser: what it sends, what it refuses, and how its state follows the controls."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr

import probe
from probe import routing_stats, text_view, widgets
from probe.text_view import NEUTRAL, NOPE_SIGN, PALETTE
from tests import planted

HOSTILE = b"</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def chosen(*rows: list[int]) -> np.ndarray:
    """Experts (token, layer) of one row for each layer."""
    return np.array(rows).T


@pytest.fixture
def maverick() -> xr.DataTree:
    """Two documents of 4 and 2 tokens; MoE layers 1, 3, 5, 7, of which 3 and 7 are NoPE; 4 experts."""
    experts = chosen([0, 0, 0, 1, 2, 2], [1, 1, 2, 2, 3, 3], [3, 3, 3, 3, 0, 1], [0, 1, 2, 3, 0, 1])
    return planted.from_experts(
        experts,
        n_experts=4,
        lengths=[4, 2],
        layers=[1, 3, 5, 7],
        domains=["english", "python"],
        token_id=np.arange(6),
        pieces={index: f" w{index}".encode() for index in range(6)},
    )


def tokens_of(view: str) -> list[tuple[int, str]]:
    """Expert and text of every token in the HTML."""
    found = re.findall(r"<i class=c\w+ data-e=(\d+)[^>]*>(.*?)</i>", view)
    return [(int(expert), re.sub(r"<[^>]*>", "", text)) for expert, text in found]


def shown_layer(view: str) -> str:
    return re.search(r"<output>(.*?)</output>", view)[1]


def figure_of(explorer: widgets.Explorer) -> dict:
    """The figure on show, as the browser gets it."""
    (output,) = explorer._figure.outputs
    return output["data"][widgets.PLOTLY_MIMETYPE]


def test_it_begins_in_the_middle_layer_of_the_first_document(maverick):
    explorer = probe.explore(maverick)
    assert (explorer.sample, explorer.layer) == (0, 5)
    assert tokens_of(explorer._text.view) == [(3, " w0"), (3, " w1"), (3, " w2"), (3, " w3")]


def test_layers_keep_the_decoders_own_numbers_and_the_nope_sign(maverick):
    explorer = probe.explore(maverick, layer=3)
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', explorer._text.view)[1])
    assert data["layers"] == [1, 3, 5, 7]
    assert data["labels"] == ["1", f"3 {NOPE_SIGN}", "5", f"7 {NOPE_SIGN}"]
    assert shown_layer(explorer._text.view) == f"3 {NOPE_SIGN}"
    assert figure_of(explorer)["layout"]["title"]["text"].startswith(f"Layer 3 {NOPE_SIGN}:")


def test_another_sample_sends_another_document(maverick):
    explorer = probe.explore(maverick, layer=1)
    explorer.sample = 1
    assert tokens_of(explorer._text.view) == [(2, " w4"), (2, " w5")]
    assert explorer._text.sample == 1 and explorer.layer == 1


def test_a_layer_changes_the_figure_and_sends_no_text(maverick):
    explorer = probe.explore(maverick, layer=1)
    sent = explorer._text.view
    explorer.layer = 7
    assert explorer._text.layer == 7
    assert explorer._text.view is sent
    assert "Layer 7" in figure_of(explorer)["layout"]["title"]["text"]


def test_what_the_browser_sets_can_be_read_and_observed(maverick):
    explorer = probe.explore(maverick)
    seen = []
    explorer.observe(lambda change: seen.append((change["name"], change["new"])), ["sample", "layer"])
    explorer._text.set_state({"layer": 1})
    explorer._text.set_state({"sample": 1})
    assert seen == [("layer", 1), ("sample", 1)]
    assert tokens_of(explorer._text.view) == [(2, " w4"), (2, " w5")]


def test_the_choice_names_every_document(maverick):
    assert probe.explore(maverick)._text.documents == [
        {"name": "sample 0", "domain": "english", "tokens": 4},
        {"name": "sample 1", "domain": "python", "tokens": 2},
    ]


def test_bars_are_the_documents_load_and_marks_that_of_all(maverick):
    bars, marks = figure_of(probe.explore(maverick, layer=1))["data"]
    result = routing_stats.document_load(maverick, sample=0, layer=1)
    np.testing.assert_allclose(result["here"], [0.75, 0.25, 0, 0])
    np.testing.assert_allclose(result["overall"], [3 / 6, 1 / 6, 2 / 6, 0])
    assert bars["marker"]["color"] == list(PALETTE[:4])
    assert marks["name"] == "whole recording, too few documents for intervals (2 of 5)"


def test_five_documents_give_the_marks_an_interval():
    recording = planted.from_experts(chosen([0, 1, 0, 1, 1, 0, 0, 1, 0, 1]), n_experts=2, lengths=[2] * 5)
    _, marks = figure_of(probe.explore(recording))["data"]
    result = routing_stats.document_load(recording, sample=0, layer=0)
    assert (result["lower"] < result["overall"]).all() and (result["overall"] < result["upper"]).all()
    assert marks["name"] == "whole recording, 95% interval over documents"


def test_the_title_says_what_one_sees(maverick):
    title = figure_of(probe.explore(maverick, layer=1))["layout"]["title"]["text"]
    assert title == "Layer 1: expert 0 takes 75\u00a0% of this document, 50\u00a0% overall"


def test_a_single_document_is_compared_with_nothing():
    explorer = probe.explore(planted.from_experts(chosen([2, 2, 1]), n_experts=4, lengths=[3]))
    figure = figure_of(explorer)
    assert [trace["type"] for trace in figure["data"]] == ["bar"]
    assert figure["layout"]["title"]["text"] == "Layer 0: expert 2 takes 67\u00a0% of this document"


def test_a_document_without_tokens_can_be_looked_at(maverick):
    recording = planted.from_experts(chosen([0, 1]), n_experts=4, lengths=[0, 2])
    explorer = probe.explore(recording)
    assert tokens_of(explorer._text.view) == []
    assert "no token" in figure_of(explorer)["layout"]["title"]["text"]


def test_of_two_choices_the_first_gives_the_colour_and_both_count():
    experts = np.array([[[0, 1]], [[2, 1]], [[2, 3]]])  # (token, layer, slot)
    explorer = probe.explore(planted.from_experts(experts, n_experts=4, lengths=[3], pieces={0: b"x"}))
    assert tokens_of(explorer._text.view) == [(0, "x"), (2, "x"), (2, "x")]
    result = routing_stats.document_load(explorer._samples, sample=0, layer=0)
    np.testing.assert_allclose(result["here"], np.array([1, 2, 2, 1]) / 6)


def test_beyond_the_palette_the_figure_has_the_colours_of_the_text():
    experts = chosen([5] * 3 + [70] * 2 + list(range(100, 115)))
    explorer = probe.explore(planted.from_experts(experts, n_experts=128, lengths=[20]))
    colours = figure_of(explorer)["data"][0]["marker"]["color"]
    assert colours[5] == PALETTE[0] and colours[70] == PALETTE[1] and colours[0] == NEUTRAL
    assert f"data-e={5}" in explorer._text.view and "class=c0 data-e=5" in explorer._text.view


def test_hostile_text_stays_text():
    recording = planted.from_experts(
        chosen([0, 1]), n_experts=4, lengths=[2], domains=[HOSTILE.decode()], pieces={0: HOSTILE}
    )
    explorer = probe.explore(recording)
    bundle = explorer._repr_mimebundle_()
    for html in (explorer._text.view, bundle["text/html"]):
        assert "<script>alert" not in html and "<img" not in html
        assert "&lt;img" in html
    # The choice of documents crosses as JSON, and the script sets it as text, never as markup.
    assert explorer._text._esm.count(".innerHTML") == 1 and 'host.innerHTML = model.get("view")' in explorer._text._esm


def test_a_long_document_is_cut_and_says_so(monkeypatch):
    recording = planted.from_experts(np.zeros((50, 1), int), n_experts=4, lengths=[50])
    monkeypatch.setattr(widgets, "TOKENS_SHOWN", 10)
    explorer = probe.explore(recording)
    assert len(tokens_of(explorer._text.view)) == 10
    assert "The first 10 of 50 tokens." in explorer._text.view


def test_eight_thousand_tokens_of_48_layers_are_sent_whole_in_few_bytes():
    experts = np.zeros((8000, 48), int)
    view = probe.explore(planted.from_experts(experts, n_experts=16, lengths=[8000]))._text.view
    assert len(tokens_of(view)) == 8000
    assert len(view) < 4_000_000


def test_what_stays_without_a_widget_is_the_text_itself(maverick):
    explorer = probe.explore(maverick, sample=1, layer=7)
    bundle = explorer._repr_mimebundle_()
    assert bundle["text/plain"] == "Explorer(sample=1, layer=7)"
    assert "application/vnd.jupyter.widget-view+json" in bundle
    static = bundle["text/html"]
    assert f"sample 1 · python · layer 7 {NOPE_SIGN}" in static
    assert tokens_of(static) == [(0, " w4"), (1, " w5")]
    assert "runner-up" in static and "<script" not in static


def test_styles_stay_below_the_explorers_own_class():
    own = (widgets._ASSETS / "explorer.css").read_text(encoding="utf-8")
    assert widgets.style() == f".probe-explorer {{\n{text_view.style()}\n}}\n{own}"
    assert all(rule.strip().startswith(".probe-explorer") for rule in own.splitlines())


def test_nothing_is_fetched_from_outside(maverick):
    explorer = probe.explore(maverick)
    for sent in (explorer._text._esm, explorer._text._css, explorer._text.view, json.dumps(figure_of(explorer))):
        assert not re.search(r"(https?:)?//[a-z]+\.[a-z]", sent)


@pytest.mark.parametrize("sample", [-1, 2])
def test_a_sample_that_is_not_there_is_refused(maverick, sample):
    with pytest.raises(probe.ProbeError, match=f"no sample {sample}: this recording holds 0 to 1"):
        probe.explore(maverick, sample=sample)


@pytest.mark.parametrize("layer", [0, 2, 8])
def test_a_layer_without_a_router_is_refused(maverick, layer):
    with pytest.raises(probe.ProbeError, match=f"layer {layer} .*holds layers 1, 3, 5, 7"):
        probe.explore(maverick, layer=layer)


def test_a_refused_change_leaves_everything_as_it_was(maverick):
    explorer = probe.explore(maverick, layer=3)
    with pytest.raises(probe.ProbeError):
        explorer.layer = 2
    with pytest.raises(probe.ProbeError):
        explorer.sample = 2
    assert (explorer.sample, explorer.layer, explorer._text.sample, explorer._text.layer) == (0, 3, 0, 3)


@pytest.mark.parametrize("group", ["routing", "samples", "vocabulary"])
def test_a_missing_group_is_named(maverick, group):
    parts = {f"/{name}": node.to_dataset() for name, node in maverick.children.items() if name != group}
    with pytest.raises(probe.SchemaError, match=f"no /{group} group"):
        probe.explore(xr.DataTree.from_dict({"/": xr.Dataset(attrs=maverick.attrs), **parts}))


def test_a_missing_variable_is_named(maverick):
    parts = {f"/{name}": node.to_dataset() for name, node in maverick.children.items()}
    parts["/routing"] = parts["/routing"].drop_vars("router_margin")
    with pytest.raises(probe.SchemaError, match="'router_margin' is missing"):
        probe.explore(xr.DataTree.from_dict(parts))


def test_an_empty_recording_is_refused():
    recording = planted.from_experts(np.zeros((0, 1), int), n_experts=4, lengths=[])
    with pytest.raises(probe.ProbeError, match="no document to explore"):
        probe.explore(recording)


def test_importing_it_loads_no_torch():
    code = "import sys, probe.widgets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
