"""Figures of attention show the numbers that they were given, at the right place."""

import inspect
import json
import re

import numpy as np
import pytest
import xarray as xr

from probe import attention_figures as figures
from probe import attention_maps, figure_parts, schema
from probe.schema import ProbeError, SchemaError
from tests.attention_cases import random_recording

LEVEL = {"level": 0.95}


@pytest.fixture(scope="module")
def tree():
    return random_recording()


def kinds(layers):
    codes = [int(layer % 4 == 3) for layer in layers]
    return {"layer": list(layers), "attention_kind": ("layer", codes, {"categories": list(schema.ATTENTION_KINDS)})}


def of_heads(name="mean", *, layers=range(4), n_heads=3, values=None, units="1", **attributes):
    """A statistic (layer, head) between 0 and 1 with bounds 10 % below and above."""
    layers = list(layers)
    values = np.random.default_rng(0).random((len(layers), n_heads)) if values is None else np.asarray(values, float)
    parts = {name: values, "lower": 0.9 * values, "upper": 1.1 * values}
    columns = {key: (("layer", "head"), part, {"units": units}) for key, part in parts.items()}
    return xr.Dataset(columns, {**kinds(layers), "head": range(n_heads)}, LEVEL | attributes)


def by_bin(dim, bins, *, names=("mean",), present=("rope", "nope"), **attributes):
    """Statistics (attention_kind, bin) with bounds; those of an absent kind are NaN."""
    rng = np.random.default_rng(1)
    columns = {}
    for name in names:
        values = rng.random((2, len(bins))) + 0.1
        values[[kind not in present for kind in schema.ATTENTION_KINDS]] = np.nan
        prefix = "" if name in ("mean", "distance_mass") else f"{name}_"
        parts = {name: values, f"{prefix}lower": values - 0.05, f"{prefix}upper": values + 0.05}
        columns |= {key: (("attention_kind", dim), part) for key, part in parts.items()}
    return xr.Dataset(columns, {"attention_kind": list(schema.ATTENTION_KINDS), dim: list(bins)}, LEVEL | attributes)


def named(figure, name):
    """The trace that the legend calls so."""
    (found,) = [trace for trace in figure.data if trace.name == name and trace.type != "bar"]
    return found


def the_heatmap(figure):
    (found,) = [trace for trace in figure.data if trace.type == "heatmap"]
    return found


def bands(figure):
    return [trace for trace in figure.data if trace.fill == "toself"]


def lines_at(figure):
    """Where vertical lines stand."""
    return [shape.x0 for shape in figure.layout.shapes if shape.x0 == shape.x1]


# --- heads ------------------------------------------------------------------------------------------------------------


def test_a_grid_of_heads_holds_the_statistic_from_zero_with_layer_0_at_the_bottom():
    data = of_heads(statistic="sink_mass")
    figure = figures.head_grid(data)
    cells = the_heatmap(figure)
    np.testing.assert_allclose(cells.z, data["mean"])
    assert list(cells.x) == [0, 1, 2] and list(cells.y) == [0, 1, 2, 3]
    assert figure.layout.coloraxis.cmin == 0
    assert figure.layout.coloraxis.cmax == data["mean"].max()
    assert figure.layout.coloraxis.colorbar.title.text == "sink mass"
    assert figure.layout.yaxis.range == (-0.5, 3.5)
    assert figure.layout.yaxis.ticktext == ("0", "1", "2", "3 ◇")
    assert [list(row) for row in cells.text] == [[f"{value:.2f}" for value in row] for row in data["mean"].values]


def test_a_grid_of_heads_tells_kinds_apart_by_a_strip_with_the_sign():
    rope, nope = (trace for trace in figures.head_grid(of_heads(layers=range(8))).data if trace.type == "bar")
    assert list(rope.y) == [0, 1, 2, 4, 5, 6] and list(nope.y) == [3, 7]
    assert (rope.marker.color, nope.marker.color) == tuple(figure_parts.KIND_COLOURS.values())
    assert nope.text == "◇" and rope.text is None
    assert all(base + width < -0.5 for base, width in zip([nope.base] * 2, nope.x, strict=True))  # left of the cells


def test_a_grid_of_heads_hovers_with_its_interval_and_units():
    data = of_heads(values=[[2.0, np.nan]], layers=[0], n_heads=2, units="nat", statistic="entropy")
    figure = figures.head_grid(data)
    hover = the_heatmap(figure).customdata
    assert hover[0][0][0] == "head 0<br>entropy (nat): 2 [1.8, 2.2]"
    assert hover[0][1][0] == "head 1<br>entropy (nat): not defined"
    crosses = named(figure, "not defined")
    assert list(crosses.x) == [1] and list(crosses.y) == [0]
    withheld = data.assign(lower=data["lower"] * np.nan)
    assert the_heatmap(figures.head_grid(withheld)).customdata[0][0][0] == "head 0<br>entropy (nat): 2"


def test_layers_that_were_not_recorded_are_gaps():
    data = of_heads(layers=[1, 3])
    figure = figures.head_grid(data)
    z = np.asarray(the_heatmap(figure).z)
    assert np.isnan(z[[0, 2]]).all()
    np.testing.assert_allclose(z[[1, 3]], data["mean"])
    assert figure.layout.yaxis.title.text == "layer (◇ NoPE, gap: not recorded)"
    assert not [trace for trace in figure.data if trace.name == "not defined"]


def test_a_model_of_40_heads_and_48_layers_names_its_nope_layers_and_no_numbers():
    data = of_heads(layers=range(48), n_heads=40)
    figure = figures.head_grid(data)
    cells = the_heatmap(figure)
    np.testing.assert_allclose(cells.z, data["mean"])
    assert not np.any(np.asarray(cells.text) != "")
    assert figure.layout.yaxis.ticktext == ("0", *(f"{layer} ◇" for layer in range(3, 48, 4)))
    assert list(figure.layout.yaxis.tickvals) == [0, *range(3, 48, 4)]
    assert len(figure.layout.xaxis.tickvals) <= 20
    assert len(figure.to_json()) < 400_000


@pytest.mark.parametrize("layers", [[0], [3], [0, 1, 2], [3, 7]])
def test_one_head_one_layer_or_one_kind_of_layer_is_enough(layers):
    data = of_heads(layers=layers, n_heads=1)
    figure = figures.head_grid(data)
    np.testing.assert_allclose(np.asarray(the_heatmap(figure).z)[layers], data["mean"])
    assert len([trace for trace in figure.data if trace.type == "bar"]) == 1
    assert ("NoPE" in figure.layout.yaxis.title.text) == (3 in layers)


def test_colours_hold_where_all_is_zero_or_nothing_is_defined():
    for values in ([[0.0, 0.0]], [[np.nan, np.nan]]):
        figure = figures.head_grid(of_heads(values=values, layers=[0], n_heads=2))
        assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


def test_a_grid_of_heads_refuses_groups():
    grouped = of_heads().expand_dims(domain=["a", "b"])
    with pytest.raises(SchemaError, match=r"mean has dims \(domain, layer, head\).*select one value"):
        figures.head_grid(grouped)
    with pytest.raises(SchemaError, match="'mean' is missing"):
        figures.head_grid(of_heads("score"))


def test_sinks_are_marked_beside_their_numbers():
    data = of_heads("sink_mass", values=[[0.1, 0.5], [0.4, 0.2]], layers=[0, 3], n_heads=2, threshold=0.3)
    data["is_sink"] = data["sink_mass"] > 0.3
    figure = figures.sinks(data)
    np.testing.assert_allclose(np.asarray(the_heatmap(figure).z)[[0, 3]], data["sink_mass"])
    marks = named(figure, "sink head (mean above 0.3)")
    np.testing.assert_array_equal(np.round(marks.x), [1, 0])
    np.testing.assert_array_equal(marks.y, [0, 3])
    assert all(0 < mark % 1 < 0.5 for mark in marks.x)  # right of the middle, within the cell
    many = of_heads("sink_mass", layers=range(48), n_heads=40, threshold=0.3)
    many["is_sink"] = many["sink_mass"] > 0.3
    marks = named(figures.sinks(many), "sink head (mean above 0.3)")
    assert list(zip(marks.y, marks.x, strict=True)) == [tuple(place) for place in np.argwhere(many["is_sink"].values)]


def test_induction_is_drawn_with_and_without_intervals():
    data = of_heads("score")
    for given, ending in ((data, "]"), (data["score"], "")):
        cells = the_heatmap(figures.induction(given))
        np.testing.assert_allclose(cells.z, data["score"])
        assert cells.customdata[1][2][0].startswith("head 2<br>induction score: ")
        assert cells.customdata[1][2][0].endswith(ending)
        assert ("[" in cells.customdata[1][2][0]) == bool(ending)


def test_small_scores_do_not_look_large_and_hover_beside_those_of_even_attention():
    data = of_heads("score", values=[[0.02, 0.01]], layers=[0], n_heads=2)
    data["even_score"] = ("layer", [0.015])
    figure = figures.induction(data)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    hover = the_heatmap(figure).customdata[0][0][0]
    assert hover == "head 0<br>induction score: 0.02 [0.018, 0.022]<br>attending evenly: 0.015"
    weak = of_heads("sink_mass", values=[[0.02, 0.01]], layers=[0], n_heads=2, threshold=0.3)
    weak["is_sink"] = weak["sink_mass"] > 0.3
    assert figures.sinks(weak).layout.coloraxis.cmax == 0.3


def similarity(layers=(0, 3), n_heads=2):
    places = [(layer, head) for layer in layers for head in range(n_heads)]
    names = [f"{layer}.{head}" for layer, head in places]
    values = np.random.default_rng(2).random((len(places), len(places)))
    coords = {
        "head": names,
        "other_head": names,
        "layer": ("head", [layer for layer, _ in places]),
        "attention_kind": ("head", ["nope" if layer % 4 == 3 else "rope" for layer, _ in places]),
    }
    return xr.DataArray(values, coords, ("head", "other_head"), name="head_similarity")


def test_similar_heads_stand_by_layer_with_lines_between_layers():
    figure = figures.head_similarity(similarity())
    cells = the_heatmap(figure)
    np.testing.assert_allclose(cells.z, similarity(), rtol=1e-6)
    assert cells.y[2] == "layer 3, head 0" and list(cells.x) == list(cells.y)
    assert list(figure.layout.yaxis.tickvals) == [0.5, 2.5]
    assert figure.layout.yaxis.ticktext == figure.layout.xaxis.ticktext == ("0", "3 ◇")
    assert lines_at(figure) == [1.5]
    assert figure.layout.yaxis.range == (-0.5, 3.5)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


def test_heads_out_of_order_are_put_in_the_order_of_layers():
    whole = similarity(layers=(0, 3, 10), n_heads=2)
    mixed = [4, 2, 0, 5, 3, 1]
    cells = the_heatmap(figures.head_similarity(whole.isel(head=mixed, other_head=mixed)))
    order = [0, 1, 2, 3, 4, 5]
    assert sorted(cells.y) == sorted(the_heatmap(figures.head_similarity(whole)).y)
    assert [int(re.search(r"layer (\d+)", name)[1]) for name in cells.y] == [0, 0, 3, 3, 10, 10]
    for row, name in enumerate(cells.y):
        for column, other in enumerate(cells.x):
            labels = [re.sub(r"layer (\d+), head (\d+)", r"\1.\2", part) for part in (name, other)]
            assert cells.z[row][column] == pytest.approx(float(whole.sel(head=labels[0], other_head=labels[1])))
    assert len(order) == len(cells.y)


def test_similarity_of_one_head_has_no_lines_and_undefined_stays_undefined():
    alone = similarity(layers=(3,), n_heads=1)
    assert lines_at(figures.head_similarity(alone)) == []
    assert np.isnan(the_heatmap(figures.head_similarity(alone * np.nan)).z).all()
    with pytest.raises(SchemaError, match="'layer' is missing"):
        figures.head_similarity(alone.drop_vars("layer"))


def test_many_heads_are_drawn_in_whole_per_cents():
    for n_heads in (100, 101):  # in each of two layers
        data = similarity(n_heads=n_heads)
        figure = figures.head_similarity(data)
        cells, end = the_heatmap(figure), figure.layout.coloraxis.cmax
        assert (cells.z.dtype, end) == ((np.float32, 1) if n_heads == 100 else (np.int8, 100))
        np.testing.assert_allclose(np.asarray(cells.z, float) / end, data, atol=0.005 if end == 100 else 1e-6)
        assert cells.x[n_heads + 7] == "layer 3, head 7"
        assert cells.customdata is None and cells.text is None
    undefined = data.copy()
    undefined[5], undefined[:, 5] = np.nan, np.nan
    z = the_heatmap(figures.head_similarity(undefined)).z
    np.testing.assert_array_equal(np.isnan(z), np.isnan(undefined))
    np.testing.assert_allclose(z / 100, undefined, atol=0.0051)


@pytest.mark.parametrize("is_defined", [True, False])
def test_cells_of_more_heads_than_pixels_are_means_over_neighbours_in_a_layer(is_defined):
    layers, n_heads = range(48), 40
    data = similarity(layers=layers, n_heads=n_heads)
    if not is_defined:
        data[0], data[:, 0] = np.nan, np.nan
    figure = figures.head_similarity(data)
    cells, width = the_heatmap(figure), 2 if is_defined else 4
    assert len(figure.to_json()) < 2_000_000
    assert np.shape(cells.z) == (len(layers) * n_heads // width,) * 2
    assert cells.y[n_heads // width + 1] == f"layer 1, heads {width}–{2 * width - 1}"
    pooled = data.values.reshape(len(data) // width, width, len(data) // width, width)
    np.testing.assert_allclose(np.asarray(cells.z, float) / 100, np.nanmean(pooled, axis=(1, 3)), atol=0.0051)
    assert figure.layout.xaxis.title.text == f"heads by layer (◇ NoPE, {width} heads to a cell)"
    assert lines_at(figure) == [at * n_heads / width - 0.5 for at in layers[1:]]
    assert figure.layout.xaxis.ticktext == ("0", *(f"{layer} ◇" for layer in layers[3::4]))
    assert figure.layout.xaxis.tickvals[1] == 3.5 * n_heads / width - 0.5


def test_no_cell_of_several_heads_holds_those_of_two_layers():
    cells = the_heatmap(figures.head_similarity(similarity(layers=range(50), n_heads=25)))
    assert [name for name in cells.x if name.startswith("layer 7,")] == [
        *(f"layer 7, heads {head}–{head + 1}" for head in range(0, 24, 2)),
        "layer 7, head 24",
    ]
    assert len(cells.x) == len(cells.z) == 50 * 13


def test_statistics_of_heads_are_drawn_as_they_come(tree):
    mean = attention_maps.head_mean(tree, "entropy")
    figure = figures.head_grid(mean)
    np.testing.assert_allclose(the_heatmap(figure).z, mean["mean"])
    assert figure.layout.coloraxis.colorbar.title.text == "entropy (nat)"
    sinks = attention_maps.sinks(tree)
    np.testing.assert_allclose(the_heatmap(figures.sinks(sinks)).z, sinks["sink_mass"])
    alike = attention_maps.head_similarity(tree)
    np.testing.assert_allclose(the_heatmap(figures.head_similarity(alike)).z, alike, rtol=1e-6)


# --- lines ------------------------------------------------------------------------------------------------------------

DISTANCES = [0, 1, 2, 4, 8]


def test_mass_by_distance_is_one_line_for_each_kind_with_its_band():
    data = by_bin("distance_bin", DISTANCES, names=["distance_mass"], chunk_size=4)
    figure = figures.distance_profile(data)
    for row, name in enumerate(("RoPE layers", "NoPE layers ◇")):
        line = named(figure, name)
        np.testing.assert_allclose(line.y, data["distance_mass"][row])
        np.testing.assert_array_equal(line.x, range(5))
        band = bands(figure)[row]
        np.testing.assert_allclose(band.y[:5], data["lower"][row])
        np.testing.assert_allclose(band.y[5:10][::-1], data["upper"][row])
    assert figure.layout.yaxis.type == "log" and "mass in the bin" in figure.layout.yaxis.title.text
    assert figure.layout.xaxis.ticktext == ("0", "1", "2", "4", "8")
    assert lines_at(figure) == [2.5]  # between the bins 2–3 and 4–7
    hover = named(figure, "RoPE layers").customdata
    mass, lower, upper = (float(data[part][0, 3]) for part in ("distance_mass", "lower", "upper"))
    assert hover[3] == f"RoPE layers, 4 to 7 tokens back<br>mass {mass:.3g} [{lower:.3g}, {upper:.3g}]"
    assert "the query's own token" in hover[0] and "1 token back" in hover[1]


def test_no_mass_ends_a_line_on_a_log_axis_and_a_bound_of_zero_does_not_break_the_band():
    data = by_bin("distance_bin", DISTANCES, names=["distance_mass"], chunk_size=4)
    for name in ("distance_mass", "lower", "upper"):
        data[name][0, 3:] = 0
    data["lower"][0, 1] = 0
    figure = figures.distance_profile(data)
    line, band = named(figure, "RoPE layers"), bands(figure)[0]
    assert np.isfinite(line.y[:3]).all() and np.isnan(line.y[3:]).all()
    assert len(band.y) == 7 and (np.asarray(band.y)[:6] > 0).all()


def test_heads_are_thin_lines_behind_their_kinds(tree):
    by_kind = attention_maps.distance_profile(tree, by_kind=True)
    heads = attention_maps.distance_profile(tree)
    n_bins = heads.sizes["distance_bin"]
    figure = figures.distance_profile(by_kind, heads=heads)
    thin = named(figure, "heads of NoPE layers ◇")
    mass = np.where(heads["distance_mass"][3] > 0, heads["distance_mass"][3], np.nan)
    np.testing.assert_allclose(np.reshape(thin.y, (3, n_bins + 1))[:, :-1], mass)
    assert np.isnan(np.reshape(thin.y, (3, n_bins + 1))[:, -1]).all()
    assert thin.customdata[1].startswith("layer 3, head 0, 1 token back<br>mass ")
    assert [trace.name for trace in figure.data].index("RoPE layers") > 1  # over the heads
    alone = figures.distance_profile(heads)
    assert named(alone, "heads of NoPE layers ◇").y == pytest.approx(thin.y, nan_ok=True)
    assert not bands(alone) and not [trace for trace in alone.data if trace.name == "95 % intervals"]


@pytest.mark.parametrize("present", [("rope",), ("nope",)])
def test_a_kind_without_layers_is_not_drawn(present):
    (name,) = [{"rope": "RoPE layers", "nope": "NoPE layers ◇"}[kind] for kind in present]
    profile = by_bin("distance_bin", DISTANCES, names=["distance_mass"], present=present, chunk_size=4)
    entropy = by_bin("position_bin", [0, 4, 8], present=present, statistic="entropy", chunk_size=4)
    entropy = entropy.assign_coords(bin_stop=("position_bin", [4, 8, 10]))
    reach = by_bin("chunk_position", [0, 2], names=["reach"], present=present, chunk_size=4)
    for figure in (figures.distance_profile(profile), figures.entropy_by_position(entropy), figures.chunk_reach(reach)):
        drawn = {trace.name for trace in figure.data}
        assert name in drawn and len(drawn & {"RoPE layers", "NoPE layers ◇"}) == 1


def positions(**options):
    data = by_bin("position_bin", [0, 4, 8], statistic="entropy", **options)
    return data.assign_coords(bin_stop=("position_bin", [4, 8, 10]))


def test_entropy_stands_below_what_the_visible_keys_allow():
    data = positions()
    figure = figures.entropy_by_position(data, chunk_size=6)
    for row, name in enumerate(("RoPE layers", "NoPE layers ◇")):
        line = named(figure, name)
        np.testing.assert_allclose(line.x, [1.5, 5.5, 8.5])
        np.testing.assert_allclose(line.y, data["mean"][row])
    rope, nope = (trace for trace in figure.data if trace.line.dash == "dash")
    np.testing.assert_allclose(
        nope.y, [np.log([1, 2, 3, 4]).mean(), np.log([5, 6, 7, 8]).mean(), np.log([9, 10]).mean()]
    )
    np.testing.assert_allclose(
        rope.y, [np.log([1, 2, 3, 4]).mean(), np.log([5, 6, 1, 2]).mean(), np.log([3, 4]).mean()]
    )
    assert lines_at(figure) == [5.5]
    assert "nat" in figure.layout.yaxis.title.text
    assert named(figure, "NoPE layers ◇").customdata[2].startswith("NoPE layers ◇, positions 8–9<br>entropy ")


def test_without_the_size_of_a_chunk_nothing_is_said_about_chunks():
    figure = figures.entropy_by_position(positions())
    assert len([trace for trace in figure.data if trace.line.dash == "dash"]) == 1
    assert lines_at(figure) == []
    assert lines_at(figures.entropy_by_position(positions(chunk_size=5))) == [4.5]


def test_entropy_by_position_refuses_other_statistics():
    with pytest.raises(SchemaError, match="'far_mass'"):
        figures.entropy_by_position(positions().assign_attrs(statistic="far_mass"))


def test_more_chunk_borders_than_can_be_told_apart_are_not_drawn():
    starts = np.arange(0, 1000, 50)
    data = by_bin("position_bin", starts, statistic="entropy").assign_coords(bin_stop=("position_bin", starts + 50))
    n_borders = [len(lines_at(figures.entropy_by_position(data, chunk_size=size))) for size in (100, 16, 15, 1)]
    assert n_borders == [9, 62, 0, 0]
    assert figures.MAX_BORDERS == 64


def test_withheld_intervals_draw_no_band_and_the_legend_says_so():
    data = positions()
    data["lower"][:], data["upper"][:] = np.nan, np.nan
    figure = figures.entropy_by_position(data, chunk_size=4)
    assert all(len(band.x) == 0 for band in bands(figure))
    assert "too few samples for intervals" in [trace.name for trace in figure.data]
    assert "[" not in named(figure, "RoPE layers").customdata[0]


def test_a_gap_in_the_bounds_parts_the_band():
    data = positions()
    data["lower"][0, 1] = np.nan
    band = bands(figures.entropy_by_position(data, chunk_size=4))[0]
    np.testing.assert_allclose(band.x, [1.5, 1.5, np.nan, 8.5, 8.5, np.nan])
    ends = [float(data[bound][0, at]) for at in (0, 2) for bound in ("lower", "upper")]
    np.testing.assert_allclose(band.y, [*ends[:2], np.nan, *ends[2:], np.nan])


def reached(**options):
    data = by_bin("chunk_position", [0, 2, 4, 6], names=["reach", "entropy"], chunk_size=8, **options)
    for name in ("loss", "loss_lower", "loss_upper"):
        data[name] = ("chunk_position", np.arange(4.0) + len(name))
    return data


def test_a_chunk_is_drawn_around_its_border():
    data = reached()
    figure = figures.chunk_reach(data)
    assert [head.text for head in figure.layout.annotations] == ["<b>reach</b>", "<b>entropy</b>", "<b>loss</b>"]
    rope = [trace for trace in figure.data if trace.name == "RoPE layers"]
    for trace, name in zip(rope, ("reach", "entropy"), strict=True):
        values = data[name][0].values
        np.testing.assert_allclose(trace.x, [-3.5, -1.5, np.nan, 0.5, 2.5])
        np.testing.assert_allclose(trace.y, [values[2], values[3], np.nan, values[0], values[1]])
    (loss,) = [trace for trace in figure.data if trace.name == "all layers"]
    np.testing.assert_allclose(loss.y, [6, 7, np.nan, 4, 5])
    assert loss.customdata[0] == "positions 4–5 of the chunk<br>loss 6 nat [12, 12]"
    assert lines_at(figure) == [-0.5] * 3
    assert figure.layout.xaxis3.title.text == "tokens after the border (chunks of 8)"
    assert figure.layout.xaxis.matches == figure.layout.xaxis2.matches is not None


def test_chunks_of_one_token_and_odd_bins_are_drawn():
    data = by_bin("chunk_position", [0], names=["reach"], chunk_size=1)
    line = named(figures.chunk_reach(data), "RoPE layers")
    np.testing.assert_allclose(np.asarray(line.y)[np.isfinite(line.x)], data["reach"][0])
    with pytest.raises(SchemaError, match="chunk_size"):
        figures.chunk_reach(data.drop_attrs())


def test_results_by_position_are_drawn_as_they_come(tree):
    profile = attention_maps.position_profile(tree, "entropy")
    figure = figures.entropy_by_position(profile)
    np.testing.assert_allclose(named(figure, "NoPE layers ◇").y, profile["mean"].sel(attention_kind="nope"))
    assert lines_at(figure) == [3.5, 7.5, 11.5]  # the profile says how long a chunk is
    assert lines_at(figures.entropy_by_position(profile, chunk_size=6)) == [5.5, 11.5]
    result = attention_maps.chunk_reach(tree)
    rope = [trace for trace in figures.chunk_reach(result).data if trace.name == "RoPE layers"][0]
    np.testing.assert_allclose(sorted(np.asarray(rope.y)[np.isfinite(rope.x)]), [1, 2, 3, 4])


def warmed(scales=(0.0, 1.0, 2.0), n_tokens=8, **drop):
    factor = 1 + np.multiply.outer(scales, np.arange(n_tokens) // 4)
    columns = {"factor": (("scale", "position"), factor)}
    rng = np.random.default_rng(3)
    for name in ("entropy", "far_mass", "loss", "loss_change"):
        values = rng.random((len(scales), 2))
        for bound, part in (("", values), ("_lower", values - 0.1), ("_upper", values + 0.1)):
            columns[name + bound] = (("scale", "position_bin"), part)
    coords = {"scale": list(scales), "position": range(n_tokens), "position_bin": [0, 4]}
    data = xr.Dataset(columns, coords | {"bin_stop": ("position_bin", [4, n_tokens])}, LEVEL | {"chunk_size": 4})
    return data


def test_temperature_is_a_panel_for_each_consequence_and_a_line_for_each_scale():
    data = warmed()
    figure = figures.temperature(data)
    assert len(figure.layout.annotations) == 5
    lines = [trace for trace in figure.data if trace.name == "tuning × 2" and trace.x[0] is not None]
    assert len(lines) == 5
    np.testing.assert_array_equal(lines[0].x, [0, 4, 7])  # where the factor changes, and the end
    np.testing.assert_allclose(lines[0].y, data["factor"][2, [0, 4, 7]])
    assert lines[0].line.shape == "hv"
    for trace, name in zip(lines[1:], ("entropy", "far_mass", "loss", "loss_change"), strict=True):
        np.testing.assert_allclose(trace.y, data[name][2])
        np.testing.assert_allclose(trace.x, [1.5, 5.5])
    assert [trace.name for trace in figure.data if trace.showlegend is not False][:3] == [
        "tuning off",
        "tuning as trained",
        "tuning × 2",
    ]
    looks = {(trace.line.color, trace.line.dash) for trace in figure.data if (trace.name or "").startswith("tuning")}
    assert len(looks) == 3
    assert figure_parts.KIND_COLOURS["rope"] not in {colour for colour, _ in looks}
    assert set(lines_at(figure)) == {3.5}


def test_temperature_of_a_headless_model_has_no_losses():
    data = warmed(scales=(1.0,))
    data = data.drop_vars([name for name in data if name.startswith("loss")])
    assert len(figures.temperature(data).layout.annotations) == 3
    unknown = warmed(scales=(0.0, 3.0))
    unknown["loss_change"][:] = np.nan  # scale 1 is not among them
    assert len(figures.temperature(unknown).layout.annotations) == 4


def test_kinds_stand_side_by_side_on_an_axis_for_each_statistic(tree):
    result = attention_maps.by_kind(tree)
    figure = figures.by_kind(result)
    heads = [head.text for head in figure.layout.annotations]
    assert heads[0] == "<b>entropy</b> (nat)" and heads[1] == "<b>sink mass</b>"
    assert len(heads) == result.sizes["statistic"]
    points = [trace for trace in figure.data if trace.name in ("RoPE layers", "NoPE layers ◇")]
    for at, trace in enumerate(points):
        own = result.isel(statistic=at // 2, attention_kind=at % 2)
        np.testing.assert_allclose(trace.y, [own["mean"]])
        np.testing.assert_allclose(trace.y[0] + trace.error_y.array[0], own["upper"])
        np.testing.assert_allclose(trace.y[0] - trace.error_y.arrayminus[0], own["lower"])
        assert trace.x == (at % 2,)
        assert f"NoPE − RoPE: {float(own['difference']):+.3g}" in trace.customdata[0]
    assert points[0].yaxis != points[2].yaxis  # units differ
    assert figure.layout.yaxis2.matches is None


def test_one_kind_and_one_statistic_are_one_point():
    columns = {name: (("statistic", "attention_kind"), [[0.5, np.nan]]) for name in ("mean", "lower", "upper")}
    columns |= {name: ("statistic", [np.nan]) for name in ("difference", "difference_lower", "difference_upper")}
    coords = {"statistic": ["self_mass"], "attention_kind": ["rope", "nope"], "units": ("statistic", ["1"])}
    figure = figures.by_kind(xr.Dataset(columns, coords, LEVEL))
    (point,) = [trace for trace in figure.data if trace.name in ("RoPE layers", "NoPE layers ◇")]
    assert point.customdata == ("self mass, RoPE layers<br>0.5 [0.5, 0.5]",)
    assert figure.layout.xaxis.ticktext == ("RoPE",)


# --- maps -------------------------------------------------------------------------------------------------------------


def one_map(largest, *, n_tokens=6, width=2, chunk_size=4, layer=3, sums=None):
    """``/attention_profiles`` of one text and one head."""
    values = {
        "map_max": np.asarray(largest)[None, None, None],
        "map_sum": np.asarray(largest if sums is None else sums)[None, None, None],
        "n_tokens": [n_tokens],
        "n_queries": [n_tokens],
        "bin_width": [width],
        "sample_id": [0],
        "domain": [0],
        "layer": [layer],
        "attention_kind": [int(layer % 4 == 3)],
        "head": [0],
    }
    categories = {"domain": ["x"], "attention_kind": schema.ATTENTION_KINDS}
    return schema.dataset("attention_profiles", values, categories).assign_attrs(chunk_size=chunk_size)


NAN = np.nan
LARGEST = [[1.0, NAN, NAN, NAN], [0.1, 0.01, NAN, NAN], [0.0, 0.5, 0.9, NAN], [NAN] * 4]


def test_a_map_is_drawn_by_powers_of_ten_up_to_the_end_of_the_text():
    sums = [[2.0, NAN, NAN, NAN], [1.5, 0.5, NAN, NAN], [0.0, 0.8, 1.2, NAN], [NAN] * 4]
    figure = figures.attention_map(one_map(LARGEST, sums=sums), layer=3, head=0)
    weight, mass = figure.data[:2]
    expected = np.array([row[:3] for row in LARGEST[:3]])
    shown = expected > 0
    np.testing.assert_allclose(np.asarray(weight.z)[shown], np.log10(expected[shown]), atol=1e-6)
    assert np.asarray(weight.z)[2, 0] < figure.layout.coloraxis.cmin  # 0 is no gap, and below every other weight
    assert np.isnan(np.asarray(weight.z)[np.isnan(expected)]).all()
    np.testing.assert_allclose(weight.customdata, expected, rtol=1e-6)
    assert (weight.x0, weight.dx, weight.y0, weight.dy) == (0.5, 2, 0.5, 2)
    assert figure.layout.xaxis.range == (-0.5, 5.5)
    assert figure.layout.yaxis.range == (5.5, -0.5)  # the first query at the top
    assert figure.layout.plot_bgcolor == figure_parts.MISSING_COLOUR
    assert "layer 3 ◇, head 0" in figure.layout.title.text and "layer 3 ◇, head 0" in weight.hovertemplate
    np.testing.assert_allclose(mass.customdata, [[1, NAN, NAN], [0.75, 0.25, NAN], [0, 0.4, 0.6]], rtol=1e-6)


def test_no_weight_lies_below_every_weight():
    tiny = [[1.0, NAN], [0.0, 1e-8]]
    z = np.asarray(figures.attention_map(one_map(tiny, n_tokens=4), layer=3, head=0).data[0].z)
    assert z[1, 0] < z[1, 1] < z[0, 0]


def test_the_switch_changes_what_is_drawn_and_its_colours():
    sums = np.array(LARGEST) * [[2.0], [100.0], [2.0], [1.0]]
    figure = figures.attention_map(one_map(LARGEST, sums=sums), layer=3, head=0)
    assert [trace.visible for trace in figure.data[:2]] == [True, False]
    weight, mass = figure.layout.updatemenus[0].buttons
    assert (weight.label, mass.label) == ("largest weight", "mass")
    n_marks = len(figure.data) - 2
    assert weight.args[0]["visible"] == [True, False] + [True] * n_marks
    assert mass.args[0]["visible"] == [False, True] + [True] * n_marks
    assert weight.args[1]["coloraxis.cmin"] == figure.layout.coloraxis.cmin
    assert weight.args[1]["coloraxis.colorbar.ticktext"] == list(figure.layout.coloraxis.colorbar.ticktext)
    assert mass.args[1]["coloraxis.colorbar.title.text"] == "mass"


def test_masses_of_a_row_sum_to_one_however_few_queries_were_recorded():
    sampled = random_recording(lengths=[24, 24], queries=5)
    for layer in (0, 3):
        figure = figures.attention_map(sampled, layer=layer, head=1, profile=1)
        masses = np.asarray(figure.data[1].customdata)
        known = ~np.isnan(masses).all(axis=1)
        np.testing.assert_allclose(np.nansum(masses[known], axis=1), 1, rtol=1e-5)
        (hatched,) = [trace for trace in figure.data if trace.type == "bar"]
        np.testing.assert_allclose(hatched.y, np.flatnonzero(~known) * 4 + 1.5)
        assert hatched.marker.pattern.shape and hatched.width == 4


def test_chunk_borders_cross_the_map_and_nothing_is_hatched_where_all_was_recorded():
    figure = figures.attention_map(one_map(LARGEST, n_tokens=6), layer=3, head=0)
    assert not [trace for trace in figure.data if trace.type == "bar"]
    (border,) = [trace for trace in figure.data if trace.type == "scatter"]
    np.testing.assert_allclose(border.x, [3.5, 3.5, NAN, -0.5, 5.5, NAN])
    np.testing.assert_allclose(border.y, [-0.5, 5.5, NAN, 3.5, 3.5, NAN])
    assert border.name == "chunk border (every 4 tokens)"
    whole = figures.attention_map(one_map([[1.0]], n_tokens=1, width=1), layer=3, head=0)
    assert [trace.type for trace in whole.data] == ["heatmap"] * 2


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 0.02], {-2: "0.01", -1: "0.1", 0: "1"}),
        ([0.5, 0.0], {-1: "≤ 0.1", 0: "1"}),
        ([0.09, 0.011], {-2: "0.01", -1: "0.1"}),
        (
            [1.0, *[1e-9] * 9],
            {-5: "≤ 10<sup>-5</sup>", -4: "10<sup>-4</sup>", -3: "0.001", -2: "0.01", -1: "0.1", 0: "1"},
        ),
        ([NAN], {-1: "≤ 0.1", 0: "1"}),
    ],
)
def test_colours_of_weights_are_whole_decades_and_say_what_lies_below(values, expected):
    figure = figures.attention_map(one_map([values], n_tokens=len(values), width=1), layer=3, head=0)
    if len(values) > 1:  # one row: the map of more keys than queries is cut to the text
        figure = figures.attention_map(one_map([values] * len(values), n_tokens=len(values), width=1), layer=3, head=0)
    bar = figure.layout.coloraxis.colorbar
    assert dict(zip(bar.tickvals, bar.ticktext, strict=True)) == expected
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (min(expected), max(expected))


def test_a_map_that_is_not_there_is_named(tree):
    for options, message in (
        ({"layer": 9, "head": 0}, "there is no layer 9: this recording holds layers 0, 1, 2, 3"),
        ({"layer": 0, "head": 7}, "there is no head 7: this recording holds heads 0, 1, 2"),
        ({"layer": 0, "head": 0, "profile": 7}, "there is no profile 7: this recording holds 0 to 6"),
    ):
        with pytest.raises(ProbeError, match=message):
            figures.attention_map(tree, **options)
    without = tree["attention_profiles"].to_dataset().drop_vars("map_sum")
    with pytest.raises(SchemaError, match=r"no map_sum: record\(.*AttentionSpec"):
        figures.attention_map(without, layer=0, head=0)


def test_a_grid_of_maps_shows_heads_of_layers_from_the_bottom_up(tree):
    figure = figures.map_grid(tree, profile=2)
    heads = [re.sub("<[^>]*>", "", head.text) for head in figure.layout.annotations]
    names = [f"layer {name}, head {head}" for name in ("3 ◇", "2", "1", "0") for head in range(3)]
    assert heads == names
    assert [figure_parts.KIND_COLOURS["nope"] in head.text for head in figure.layout.annotations] == [True] * 3 + [
        False
    ] * 9
    n_tokens = int(tree["attention_profiles"]["n_tokens"][2])
    n_cells = -(-n_tokens // 4)
    for at, name in enumerate(names):
        layer, head = int(re.search(r"layer (\d)", name)[1]), int(name[-1])
        largest = tree["attention_profiles"]["map_max"][2, layer, head, :n_cells, :n_cells]
        np.testing.assert_allclose(figure.data[at].customdata, largest, rtol=1e-6)
        assert figure.data[at].visible and not figure.data[at + 12].visible
    assert figure.layout.xaxis2.matches is not None
    for button in figure.layout.updatemenus[0].buttons:
        assert len(button.args[0]["visible"]) == len(figure.data)


def test_chosen_heads_keep_their_order_and_are_counted(tree):
    figure = figures.map_grid(tree, heads=[(3, 1), (0, 2)])
    assert [re.sub("<[^>]*>", "", head.text) for head in figure.layout.annotations] == [
        "layer 3 ◇, head 1",
        "layer 0, head 2",
    ]
    for heads in ([], [(0, 0)] * 17):
        with pytest.raises(ProbeError, match=f"heads names {len(heads)} maps"):
            figures.map_grid(tree, heads=heads)


def test_a_deep_model_is_thinned_to_maps_of_both_kinds():
    n_layers, n_heads = 48, 40
    small = one_map([[1.0, NAN], [0.5, 0.5]], n_tokens=4)
    deep = small.isel(layer=np.zeros(n_layers, int), head=np.zeros(n_heads, int))
    deep = deep.assign_coords(layer=np.arange(n_layers), head=np.arange(n_heads))
    codes = ("layer", (np.arange(n_layers) == 7).astype(np.uint8), small["attention_kind"].attrs)
    figure = figures.map_grid(deep.assign_coords(attention_kind=codes))
    heads = [head.text for head in figure.layout.annotations]
    assert len(heads) == figures.MAX_PANELS
    assert sum("◇" in head for head in heads) == 4
    assert "layer 7 ◇, head 0" in heads[8]  # in its place among the layers


# --- needle -----------------------------------------------------------------------------------------------------------


def found(**changes):
    rng = np.random.default_rng(4)
    scores = rng.random((3, 2, 4, 2)) / 4
    scores[:, :, 3, 1] += 0.5
    coords = {"length": [64, 128, 1024], "depth": [0.0, 0.5], "head": [0, 1], **kinds(range(4))}
    columns = {
        "is_found": (("length", "depth"), [[1.0, 0.5], [0.25, 0.0], [np.nan, 0.0]]),
        "answer_loss": (("length", "depth"), [[1.0, 2.0], [3.0, 4.0], [5.0, 12.5]]),
        "copying_score": (("length", "depth", "layer", "head"), scores),
        "key_rank": (("length", "depth", "layer", "head"), 100 * scores),
    }
    return xr.Dataset(columns | changes, coords)


def test_a_needle_is_drawn_by_depth_and_length():
    figure = figures.needle(found())
    cells = the_heatmap(figure)
    np.testing.assert_allclose(cells.z, [[1, 0.25, np.nan], [0.5, 0, 0]])
    assert [list(row) for row in cells.text] == [["100%", "25%", ""], ["50%", "0%", "0%"]]
    assert figure.layout.xaxis.ticktext == ("64", "128", "1,024")
    assert figure.layout.yaxis.ticktext == ("0", "50")
    assert figure.layout.yaxis.range == (1.5, -0.5)  # the start of a text at the top
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert cells.customdata[0][1] == "128 tokens, needle after 0 % of the filler<br>trials found: 25%"
    assert cells.customdata[0][2].endswith("not defined")
    assert figure.layout.plot_bgcolor == figure_parts.MISSING_COLOUR


@pytest.mark.parametrize("statistic", ["copying_score", "key_rank"])
def test_a_statistic_of_heads_is_that_of_the_best_copying_one(statistic):
    data = found()
    figure = figures.needle(data, statistic=statistic)
    best = data[statistic].sel(layer=3, head=1).transpose("depth", "length")
    np.testing.assert_allclose(the_heatmap(figure).z, best)
    assert "layer 3 ◇, head 1" in figure.layout.xaxis.title.text
    assert "layer 3 ◇, head 1" in the_heatmap(figure).customdata[0][0]


def test_a_head_that_never_saw_the_needle_is_not_the_best():
    data = found()
    data["copying_score"][:, :, 0, 0] = np.nan
    assert "layer 3 ◇, head 1" in figures.needle(data, statistic="copying_score").layout.xaxis.title.text


def test_losses_of_a_needle_begin_at_zero_and_end_at_the_largest():
    figure = figures.needle(found(), statistic="answer_loss")
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 12.5)
    assert "nat" in figure.layout.coloraxis.colorbar.title.text


def test_a_needle_statistic_that_is_not_there_is_named():
    with pytest.raises(ProbeError, match="statistic is 'luck': choose one of is_found"):
        figures.needle(found(), statistic="luck")
    with pytest.raises(SchemaError, match="'answer_rank' is missing"):
        figures.needle(found(), statistic="answer_rank")


# --- all of them ------------------------------------------------------------------------------------------------------


def drawings(tree):
    """Every figure, ready to be given a title."""
    sinks = attention_maps.sinks(tree)
    given = {
        figures.head_grid: (attention_maps.head_mean(tree, "entropy"), {}),
        figures.sinks: (sinks, {}),
        figures.induction: (of_heads("score"), {}),
        figures.head_similarity: (attention_maps.head_similarity(tree), {}),
        figures.distance_profile: (attention_maps.distance_profile(tree, by_kind=True), {}),
        figures.entropy_by_position: (attention_maps.position_profile(tree, "entropy"), {}),
        figures.chunk_reach: (attention_maps.chunk_reach(tree), {}),
        figures.by_kind: (attention_maps.by_kind(tree), {}),
        figures.temperature: (warmed(), {}),
        figures.attention_map: (tree, {"layer": 3, "head": 0}),
        figures.map_grid: (tree, {}),
        figures.needle: (found(), {}),
    }
    return [(draw, data, options) for draw, (data, options) in given.items()]


def test_every_figure_shares_template_takes_a_title_and_survives_json(tree):
    drawn = drawings(tree)
    assert {draw.__name__ for draw, _, _ in drawn} == {name for name in figures.__all__ if name.islower()}
    for draw, data, options in drawn:
        assert len(inspect.signature(draw).parameters) <= 6
        figure = draw(data, title="What one sees", **options)
        assert figure.layout.title.text == "What one sees"
        assert figure.layout.template.layout.paper_bgcolor == "rgba(0,0,0,0)"
        assert figure.layout.template.layout.font == figure_parts.TEMPLATE.layout.font
        assert draw(data, title="", **options).layout.title.text is None
        assert draw(data, **options).layout.title.text
        assert figure.layout.height > 100
        assert figure.layout.legend.y * figure.layout.height == pytest.approx(figure.layout.height - 36)
        assert json.loads(figure.to_json())["data"]


def test_every_heatmap_has_colours_for_a_light_and_for_a_dark_page(tree):
    for draw, data, options in drawings(tree):
        figure = draw(data, **options)
        for trace in figure.data:
            if trace.type == "heatmap":
                assert trace.coloraxis == "coloraxis"
                assert figure.layout.meta["colorscale"] == figures.SEQUENTIAL


def test_a_click_on_a_head_is_no_click_on_an_expert(tree):
    """The report's page takes cells of two strings for an expert's."""
    for draw, data, options in drawings(tree):
        for trace in draw(data, **options).data:
            if trace.type == "heatmap" and trace.customdata is not None:
                assert np.asarray(trace.customdata).ndim == 2 or np.shape(trace.customdata)[2] == 1


def luminance(colour):
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_magnitudes_differ_in_lightness_by_even_steps():
    for mode, colours in figures.SEQUENTIAL.items():
        lightness = np.array([116 * np.cbrt(luminance(colour)) - 16 for colour in colours])
        steps = np.diff(lightness) * (1 if mode == "dark" else -1)
        assert (steps > 0).all(), mode
        assert steps.max() < 2 * steps.min(), (mode, steps)
    assert luminance(figures.SEQUENTIAL["light"][0]) > 0.9 and luminance(figures.SEQUENTIAL["dark"][0]) < 0.03


def test_nothing_given_is_changed(tree):
    for draw, data, options in drawings(tree):
        before = data.copy(deep=True)
        draw(data, **options)
        assert before.identical(data)
