"""Figures of FP8 show the numbers that they were given, at the right place, beside the noise floors."""

import ast
import inspect
import json
import re
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import xarray as xr

from probe import figure_parts, fp8_titles, recipes, schema
from probe import fp8_figures as figures
from probe.bootstrap import INTERVAL_STATUS
from probe.fp8_figures import parts
from probe.fp8_figures.sensitivity import ALONE, LEFT_OUT, SPARED
from probe.schema import ProbeError, SchemaError
from tests import test_text_view as sights

LEVEL = {"level": 0.95}
MODULES = ("q_proj", "router", "experts.gate_up_proj", "experts.down_proj")
SITES = ("router", "routed_experts", "residual")
RECIPES = ("bf16", "fp32", "meta", "int4")
NASTY = ["<b>bold</b>", "a&b $x$", "%{y} recipe with a very long name indeed"]


def kinds(layers):
    codes = [int(layer % 4 == 3) for layer in layers]
    return {"layer": list(layers), "attention_kind": ("layer", codes, {"categories": list(schema.ATTENTION_KINDS)})}


def weights(*, layers=range(4), n_experts=3, recipes=("meta", "int4"), modules=MODULES):
    """SQNR between 20 and 40 dB; meta covers experts but in the first and the last layer, others all but the router."""
    layers = list(layers)
    dims = ("recipe", "layer", "module", "expert")
    shape = (len(recipes), len(layers), len(modules), n_experts)
    rng = np.random.default_rng(0)
    covered = np.ones(shape[:3], bool)
    for at, recipe in enumerate(recipes):
        covered[at, :, [module == "router" for module in modules]] = False
        if recipe == "meta":
            covered[at] = [module.startswith("experts.") for module in modules]
            covered[at, [0, -1]] = False
    columns = {
        "sqnr": (dims, 20 + 20 * rng.random(shape)),
        "underflow": (dims, 0.01 * rng.random(shape)),
        "saturation": (dims, np.zeros(shape)),
        "covered": (dims[:3], covered),
    }
    coords = {"recipe": list(recipes), **kinds(layers), "module": list(modules), "expert": range(n_experts)}
    return xr.Dataset(columns, coords)


def drift(*, layers=range(4), recipes=RECIPES, sites=SITES):
    layers = list(layers)
    dims = ("recipe", "layer", "site", "mode")
    shape = (len(recipes), len(layers), len(sites), 2)
    sqnr = (
        20 + 10 * np.random.default_rng(1).random(shape) + 20 * np.isin(recipes, fp8_titles.FLOORS)[:, None, None, None]
    )
    error = 10 ** (-sqnr / 20)
    columns = {"sqnr": (dims, sqnr), "relative_error": (dims, error), "cosine": (dims, 1 - error**2 / 2)}
    coords = {"recipe": list(recipes), **kinds(layers), "site": list(sites), "mode": ["isolated", "accumulated"]}
    return xr.Dataset(columns, coords)


def shares(dims, shape, coords, *, name="flip_share"):
    """Shares up to 10 % with bounds 10 % below and above."""
    values = 0.1 * np.random.default_rng(2).random(shape) + 0.001
    status = np.zeros(shape, np.uint8)
    columns = {name: (dims, values), "lower": (dims, 0.9 * values), "upper": (dims, 1.1 * values)}
    columns["interval_status"] = (dims, status, {"categories": list(INTERVAL_STATUS)})
    return xr.Dataset(columns, coords, LEVEL)


def flips_by_layer(*, layers=range(4), recipes=RECIPES):
    layers = list(layers)
    coords = {"recipe": list(recipes), **kinds(layers)}
    return shares(("recipe", "layer"), (len(recipes), len(layers)), coords)


def flips_by_domain(*, domains=("code", "prose"), recipes=RECIPES):
    coords = {"recipe": list(recipes), "domain": list(domains)}
    return shares(("recipe", "domain"), (len(recipes), len(domains)), coords)


def flips_by_margin(*, recipes=RECIPES, edges=(0, 1 / 32, 1 / 16, 1 / 8, 1 / 4)):
    edges = np.array(edges)
    coords = {
        "recipe": list(recipes),
        "margin_bin": (edges[:-1] + edges[1:]) / 2,
        "margin_from": ("margin_bin", edges[:-1]),
        "margin_to": ("margin_bin", edges[1:]),
    }
    n_bins = len(edges) - 1
    result = shares(("recipe", "margin_bin"), (len(recipes), n_bins), coords)
    result["predicted"] = 0.8 * result["flip_share"]
    result["n_decisions"] = ("margin_bin", np.arange(n_bins, 0, -1) * 100)
    result["logit_noise"] = ("recipe", np.linspace(0.01, 0.1, len(recipes)))
    return result


def loss(*, recipes=RECIPES, domains=None):
    """Changes of the loss that rise along the recipes; bounds 0.01 nat around them."""
    dims = ("recipe", "domain") if domains is not None else ("recipe",)
    shape = (len(recipes), len(domains)) if domains is not None else (len(recipes),)
    rank = np.arange(np.prod(shape)).reshape(shape)
    columns = {}
    for name, values in {
        "loss_change": 0.02 * rank,
        "logit_kl": 0.001 * (rank + 1),
        "top1_agreement": 0.99 - 0.01 * rank,
    }.items():
        half = {"loss_change": 0.01, "logit_kl": 0.0004, "top1_agreement": 0.004}[name]
        columns |= {
            name: (dims, values),
            f"{name}_lower": (dims, values - half),
            f"{name}_upper": (dims, values + half),
        }
    coords = {"recipe": list(recipes)} | ({"domain": list(domains)} if domains is not None else {})
    return xr.Dataset(columns, coords, LEVEL)


def sensitivity(*, n_layers=4):
    """Module kinds, layers, the whole recipe and the floors; no dense MLP, and the router is left as it is."""
    modules = ["attention", "router", "routed_experts", "dense_mlp"]
    units = [*modules, *(f"layer {layer}" for layer in range(n_layers)), "everything", "bf16", "fp32"]
    unit_kind = ["module"] * 4 + ["layer"] * n_layers + ["whole", "floor", "floor"]
    rng = np.random.default_rng(3)
    value = 0.01 + 0.02 * rng.random((len(units), 2))
    value[units.index("attention"), 0] = 0.05
    value[units.index("dense_mlp")] = np.nan
    value[-2:] = [[0.001, np.nan], [0.002, np.nan]]
    value[-3] = [0.06, 0.0]
    dims = ("unit", "setting")
    columns = {}
    for name in ("loss_change", "logit_kl", "flip_share"):
        columns |= {name: (dims, value), f"{name}_lower": (dims, 0.9 * value), f"{name}_upper": (dims, 1.1 * value)}
    columns["n_weights"] = ("unit", [1000, 100, 5000, 0, *[1500] * n_layers, 6000, 6100, 6100])
    columns["covered"] = ("unit", [True, False, True, False, *[True] * n_layers, True, False, False])
    coords = {"unit": units, "unit_kind": ("unit", unit_kind), "setting": ["alone", "spared"]}
    return xr.Dataset(columns, coords, LEVEL)


def activations(*, layers=range(4), n_experts=3, recipes=("meta", "int4"), dense=()):
    """Inputs of all modules; expert e of layer l sees up to 2^(l + e); nothing enters the experts of a dense layer."""
    layers = list(layers)
    dims = ("layer", "module", "expert")
    amax = np.empty((len(layers), len(MODULES), n_experts))
    amax[:] = 2.0 ** ((np.arange(len(layers)) % 5)[:, None, None] + np.arange(n_experts)[None, None] % 7)
    for at, module in enumerate(MODULES):
        if module.startswith("experts."):
            amax[[layer in dense for layer in layers], at] = np.nan
        else:
            amax[:, at] = amax[:, at, :1]
    percentiles = [50.0, 99.0, 99.99]
    share = np.full((len(recipes), *amax.shape), 0.001) * np.arange(1, len(recipes) + 1)[:, None, None, None]
    share[[recipe == "int4" for recipe in recipes]] = np.nan
    columns = {
        "amax": (dims, amax),
        "magnitude": ((*dims, "percentile"), amax[..., None] * [0.1, 0.5, 0.9]),
        "n_values": (dims, np.full(amax.shape, 640)),
        "saturation": (("recipe", *dims), share * 0),
        "underflow": (("recipe", *dims), share),
    }
    coords = {
        **kinds(layers),
        "module": list(MODULES),
        "expert": range(n_experts),
        "percentile": percentiles,
        "recipe": list(recipes),
    }
    return xr.Dataset(columns, coords)


ALL = {
    "weight_sqnr": lambda recipes: figures.weight_sqnr(weights(recipes=recipes)),
    "drift_by_layer": lambda recipes: figures.drift_by_layer(drift(recipes=recipes)),
    "flips_by_layer": lambda recipes: figures.flips_by_layer(flips_by_layer(recipes=recipes)),
    "flips_by_domain": lambda recipes: figures.flips_by_domain(flips_by_domain(recipes=recipes)),
    "flips_by_margin": lambda recipes: figures.flips_by_margin(flips_by_margin(recipes=recipes)),
    "loss_change": lambda recipes: figures.loss_change(loss(recipes=recipes)),
    "loss_by_domain": lambda recipes: figures.loss_by_domain(loss(recipes=recipes, domains=["code", "prose"])),
    "activation_loss": lambda recipes: figures.activation_loss(activations(recipes=recipes), measure="underflow"),
}
"""Figures of several recipes."""


def title_of(figure):
    return figure.layout.title.text.replace("<br>", " ")


def names(figure):
    """What the legend shows."""
    return [trace.name for trace in figure.data if trace.name and trace.showlegend is not False]


def lines(figure, name, dash=None):
    """Traces of a recipe that hold points."""
    return [
        trace
        for trace in figure.data
        if trace.legendgroup == name
        and trace.type == "scatter"
        and trace.showlegend is False
        and trace.fill is None
        and (dash is None or trace.line.dash == dash)
    ]


def line(figure, name, dash=None):
    return lines(figure, name, dash)[0]


def the_heatmap(figure):
    (found,) = [trace for trace in figure.data if trace.type == "heatmap"]
    return found


def ticks(axis):
    return dict(zip(axis.ticktext, axis.tickvals, strict=True))


# --- colours ----------------------------------------------------------------------------------------------------------


def test_every_recipe_of_probe_has_a_look_of_its_own_whatever_it_is_drawn_beside():
    assert tuple(recipes.recipes()) == parts.RECIPES
    alone = {name: parts.styles([name])[name] for name in parts.RECIPES}
    together = parts.styles(["bf16", "fp32", *parts.RECIPES[::-1]])
    assert all(alone[name] == together[name] for name in parts.RECIPES)
    looks = list(parts.styles(["bf16", "fp32", *parts.RECIPES, "own", "other"]).values())
    assert len({look.colour for look in looks}) == 11  # both noise floors have one grey
    assert len({look.symbol for look in looks}) == 12


def test_many_recipes_of_ones_own_differ_in_colour_or_symbol():
    looks = parts.styles([*parts.RECIPES, *(f"own {index}" for index in range(9))]).values()
    assert len({(look.colour, look.symbol) for look in looks}) == 17
    assert parts.styles(["mine", "meta"])["mine"].colour != parts.styles(["meta"])["meta"].colour


@pytest.mark.parametrize("sight", list(sights.SIGHT))
def test_colours_of_recipes_stay_apart_for_every_sight(sight):
    seen = [sights.lab(sights.linear(colour) @ np.transpose(sights.SIGHT[sight])) for colour in parts.COLOURS]
    assert min(sights.ciede2000(one, two) for one, two in combinations(seen, 2)) > 12
    for page in ("#ffffff", "#14171c"):
        assert min(sights.contrast(colour, page) for colour in parts.COLOURS) > 2.1


def test_both_noise_floors_are_in_every_figure_of_what_was_measured_against_them():
    for name in ("drift_by_layer", "flips_by_layer", "flips_by_domain", "flips_by_margin", "loss_by_domain"):
        figure = ALL[name](RECIPES)
        assert {"noise floor: bf16", "noise floor: fp32"} <= set(names(figure)), name
        for floor in ("bf16", "fp32"):
            drawn = lines(figure, f"noise floor: {floor}")
            assert {trace.line.color or trace.marker.color for trace in drawn} == {parts.FLOOR_COLOUR}
    assert "noise floor: bf16" in figures.loss_change(loss()).layout.yaxis.ticktext
    assert {"noise floor: bf16", "noise floor: fp32"} <= set(names(figures.sensitivity(sensitivity())))


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_show_the_worst_expert_and_hover_with_which_it_is():
    data = weights(n_experts=3)
    data["sqnr"][0, 1, 3] = [31.0, 29.5, 33.0]
    figure = figures.weight_sqnr(data, recipe="meta")
    cells = the_heatmap(figure)
    np.testing.assert_allclose(cells.z, data["sqnr"].sel(recipe="meta").min("expert"))
    assert cells.customdata[1][3][0].startswith(
        "experts.down_proj<br>worst: 29.5 dB (expert 1), median 31.0 dB [29.5, 33]<br>"
    )
    assert figure.layout.xaxis.ticktext == ("q", "router", "experts.gate_up", "experts.down")
    assert figure.layout.yaxis.ticktext == ("0", "1", "2", "3 ◇")
    assert "dB" in figure.layout.coloraxis.colorbar.title.text


def test_what_a_recipe_leaves_in_bf16_is_hatched_and_said_so():
    figure = figures.weight_sqnr(weights(), recipe="meta")
    (hatch,) = [trace for trace in figure.data if trace.type == "bar" and trace.x[0] is not None]
    found = {
        (int(x), layer)
        for x, base, height in zip(hatch.x, hatch.base, hatch.y, strict=True)
        for layer in range(round(base + 0.5), round(base + 0.5 + height))
    }
    assert found == {(module, layer) for module in (0, 1) for layer in range(4)} | {(2, 0), (2, 3), (3, 0), (3, 3)}
    assert hatch.marker.pattern.shape == "/"
    assert [name for name in names(figure) if name.startswith("hatched")]
    cells = the_heatmap(figure)
    assert "stays in BF16" in cells.customdata[0][2][0] and "stays in BF16" not in cells.customdata[1][2][0]
    assert cells.text[0][2] == "" and cells.text[1][2] == f"{cells.z[1][2]:.1f}"
    whole = weights(recipes=["int4"], modules=["q_proj"])
    assert not [trace for trace in figures.weight_sqnr(whole).data if trace.type == "bar"]


def test_a_matrix_that_a_layer_lacks_is_a_gap_without_a_hatch():
    data = weights(recipes=["meta"])
    data["sqnr"][0, 0, 0] = np.nan
    figure = figures.weight_sqnr(data)
    assert np.isnan(the_heatmap(figure).z[0][0])
    (hatch,) = [trace for trace in figure.data if trace.type == "bar" and trace.x[0] is not None]
    assert (0, 0.5) in set(zip(hatch.x, hatch.base, strict=True)) and (0, -0.5) not in set(
        zip(hatch.x, hatch.base, strict=True)
    )


def test_a_matrix_that_fp8_holds_exactly_has_a_sign_instead_of_a_number():
    data = weights(recipes=["int4"])
    data["sqnr"][0, 1, 0] = np.inf
    cells = the_heatmap(figures.weight_sqnr(data))
    assert cells.text[1][0] == "=" and "no difference" in cells.customdata[1][0][0]
    assert cells.z[1][0] == np.max(cells.z)
    data["sqnr"][:] = np.inf
    assert title_of(figures.weight_sqnr(data)) == "int4 represents every weight that it covers exactly"


def test_small_differences_between_weights_look_small():
    data = weights()
    data["sqnr"][:] = 31 + 0.1 * (data["sqnr"] - 20) / 20
    colours = figures.weight_sqnr(data).layout.coloraxis
    assert colours.cmax - colours.cmin == pytest.approx(6)
    scales = figures.weight_sqnr(data).layout.meta["colorscale"]
    assert [stop[1] for stop in colours.colorscale] == scales["light"] and scales["dark"] != scales["light"]


def test_recipes_are_panels_unless_one_is_chosen():
    figure = figures.weight_sqnr(weights(recipes=["meta", "int4", NASTY[0]]))
    assert len([trace for trace in figure.data if trace.type == "heatmap"]) == 3
    assert [note.text for note in figure.layout.annotations] == [
        "<b>meta</b>", "<b>int4</b>", "<b>&lt;b&gt;bold&lt;/b&gt;</b>"
    ]  # fmt: skip
    with pytest.raises(figures.FigureChoiceError, match=r"recipe 'nobody' is not there: choose one of meta, int4"):
        figures.weight_sqnr(weights(), recipe="nobody")


def test_titles_of_weights_name_the_worst_that_is_covered():
    data = weights(recipes=["meta"])
    data["sqnr"][:] = 31
    data["sqnr"][0, 0, 2, 0] = 10  # in a layer that the recipe leaves alone
    data["sqnr"][0, 2, 3, 1] = 25
    assert fp8_titles.weight_sqnr(data) == (
        "Under meta the median matrix keeps 31.0\u00a0dB; the worst, experts.down_proj of expert 1 in layer 2, "
        "25.0\u00a0dB"
    )
    data["covered"][:] = False
    assert fp8_titles.weight_sqnr(data) == "No weight is covered by the recipe"


# --- drift ------------------------------------------------------------------------------------------------------------


def test_drift_is_solid_where_it_accumulates_and_dotted_alone():
    data = drift()
    figure = figures.drift_by_layer(data, site="residual")
    for mode, dash in (("accumulated", "solid"), ("isolated", "dot")):
        for recipe, name in zip(RECIPES, ("noise floor: bf16", "noise floor: fp32", "meta", "int4"), strict=True):
            trace = line(figure, name, dash)
            np.testing.assert_allclose(trace.x, data["sqnr"].sel(recipe=recipe, site="residual", mode=mode))
            np.testing.assert_array_equal(trace.y, range(4))
    value = float(data["sqnr"].sel(recipe="meta", site="residual", mode="accumulated", layer=3))
    assert line(figure, "meta", "solid").customdata[3] == f"layer 3 ◇, meta, accumulated<br>SQNR {value:.1f} dB"
    assert figure.layout.yaxis.ticktext == ("0", "1", "2", "3 ◇")
    assert "dB" in figure.layout.xaxis.title.text


def test_no_difference_at_all_stands_at_a_place_of_its_own():
    data = drift()
    data["sqnr"][2, 0, 2, 1] = np.inf
    figure = figures.drift_by_layer(data)
    place = ticks(figure.layout.xaxis)["no<br>difference"]
    assert place > data["sqnr"].where(np.isfinite(data["sqnr"])).max()
    assert place < figure.layout.xaxis.range[1]
    points = [trace for trace in lines(figure, "meta") if trace.mode == "markers"]
    assert [(list(trace.x), list(trace.y)) for trace in points] == [([place], [0])]
    assert points[0].customdata[0].endswith("no difference at all")
    assert np.isnan(line(figure, "meta", "solid").x[0])
    assert max(float(name) for name in figure.layout.xaxis.ticktext[:-1]) < place


def test_everything_without_a_difference_is_drawn():
    data = drift(layers=[0], recipes=["bf16", "meta"])
    data["sqnr"][:] = np.inf
    figure = figures.drift_by_layer(data)
    assert len([trace for trace in figure.data if trace.mode == "markers" and trace.x[0] is not None]) == 4
    assert "meta leaves the residual stream without a difference" in title_of(figure)


def test_a_difference_of_a_last_bit_does_not_squeeze_the_others():
    data = drift()
    data["sqnr"][0, 0, 2, 0] = 190.0
    figure = figures.drift_by_layer(data)
    assert figure.layout.xaxis.range[1] < 80
    place = ticks(figure.layout.xaxis)["120 dB<br>or more"]
    (point,) = [trace for trace in lines(figure, "noise floor: bf16") if trace.mode == "markers"]
    assert list(point.x) == [place] and point.customdata[0].endswith("SQNR 190.0 dB")
    data["relative_error"][0, 0, 2, 0] = 1e-10
    figure = figures.drift_by_layer(data, measure="relative_error")
    (point,) = [trace for trace in lines(figure, "noise floor: bf16") if trace.mode == "markers"]
    assert list(point.x) == [ticks(figure.layout.xaxis)["0.0001<br>or less"]]


def test_the_relative_error_is_in_per_cent_on_a_log_axis_with_a_place_for_0():
    data = drift()
    data["relative_error"][3, 1, 2, 1] = 0
    figure = figures.drift_by_layer(data, measure="relative_error")
    axis = figure.layout.xaxis
    assert axis.type == "log" and "%" in axis.title.text
    zero = ticks(axis)["0"]
    assert 10 ** axis.range[0] < zero < 100 * float(data["relative_error"].where(data["relative_error"] > 0).min())
    np.testing.assert_allclose(
        line(figure, "meta", "solid").x, 100 * data["relative_error"].sel(recipe="meta", site="residual")[:, 1]
    )


def test_the_grey_area_begins_at_the_larger_noise_floor():
    data = drift()
    figure = figures.drift_by_layer(data)
    (area,) = [trace for trace in figure.data if trace.fill == "toself"]
    floors = data["sqnr"].sel(recipe=["bf16", "fp32"], site="residual", mode="accumulated").min("recipe")
    np.testing.assert_allclose(area.x[:4], floors)
    assert set(area.x[4:]) == {figure.layout.xaxis.range[1]}


def test_a_site_that_dense_layers_lack_leaves_gaps():
    data = drift(layers=range(4))
    data["sqnr"][:, [0, 2], 0] = np.nan
    figure = figures.drift_by_layer(data, site="router")
    assert list(line(figure, "meta", "solid").y) == [1, 3]
    assert "gap: dense" in figure.layout.yaxis.title.text
    empty = figures.drift_by_layer(data * np.nan, site="router")
    assert [note.text for note in empty.layout.annotations] == ["No layer has a value at the site “router”"]
    with pytest.raises(figures.FigureChoiceError, match="site 'mlp' is not there: choose one of router, routed"):
        figures.drift_by_layer(data, site="mlp")
    with pytest.raises(figures.FigureChoiceError, match="measure 'kl'"):
        figures.drift_by_layer(data, measure="kl")


@pytest.mark.parametrize(
    ("measure", "values", "title"),
    [
        ("sqnr", (50, 40, 30, 20), "int4 leaves the residual stream an SQNR of 20\u00a0dB, meta 30\u00a0dB; BF16's own "
         "noise 40\u00a0dB"),
        ("sqnr", (50, 10, 30, 20), "int4 leaves the residual stream an SQNR of 20\u00a0dB, meta 30\u00a0dB; BF16's own "
         "noise 10\u00a0dB, no less"),
        ("relative_error", (0.01, 0.001, 0.03, 0.2), "int4 leaves the residual stream 20\u00a0% off, meta 3.0\u00a0%; "
         "BF16's own noise 1.0\u00a0%"),
        ("cosine", (0.9999, 0.9998, 0.99, 0.9), "int4 leaves the residual stream a cosine of 0.9000 to BF16, meta "
         "0.9900; BF16's own noise 0.9998"),
    ],
)  # fmt: skip
def test_titles_of_drift_say_the_ends_and_the_noise(measure, values, title):
    data = drift(layers=range(4))
    data[measure][:] = np.array(values, float)[:, None, None, None]
    assert fp8_titles.drift_by_layer(data, measure=measure) == f"In layer 3 ◇ {title}"


# --- flips ------------------------------------------------------------------------------------------------------------


def test_flips_by_layer_are_per_cent_with_bands():
    data = flips_by_layer()
    figure = figures.flips_by_layer(data)
    trace = line(figure, "int4")
    np.testing.assert_allclose(trace.x, 100 * data["flip_share"].sel(recipe="int4"))
    np.testing.assert_array_equal(trace.y, range(4))
    (band,) = [one for one in figure.data if one.fill == "toself" and one.legendgroup == "int4"]
    np.testing.assert_allclose(band.x[:4], 100 * data["lower"].sel(recipe="int4"))
    np.testing.assert_allclose(band.x[4:8][::-1], 100 * data["upper"].sel(recipe="int4"))
    np.testing.assert_allclose(band.y[:4], range(4))
    share, lower, upper = (100 * float(data[name][3, 3]) for name in ("flip_share", "lower", "upper"))
    assert trace.customdata[3] == (f"layer 3 ◇, int4<br>{share:.3g} % of the tokens flip [{lower:.3g}, {upper:.3g}]")
    assert "95 % intervals" in names(figure)


def test_a_withheld_interval_is_said_to_be_so():
    data = flips_by_layer()
    data["lower"][:], data["upper"][:] = np.nan, np.nan
    data["interval_status"][:] = 2
    figure = figures.flips_by_layer(data)
    assert "too few texts for intervals" in names(figure)
    assert line(figure, "meta").customdata[0].endswith("interval withheld: fewer than 5 documents, or 3 in effect")
    assert title_of(figure).endswith("(too few texts for intervals)")


def test_the_interval_of_no_flip_at_all_does_not_widen_the_axis():
    data = flips_by_layer()
    data["flip_share"][2, 0], data["lower"][2, 0], data["upper"][2, 0] = 0, 0, 0.5
    figure = figures.flips_by_layer(data)
    (band,) = [one for one in figure.data if one.fill == "toself" and one.legendgroup == "meta"]
    assert np.nanmax(np.asarray(band.x, float)) < 20
    assert line(figure, "meta").customdata[0].endswith("0 % of the tokens flip [0, 50]")
    domains = flips_by_domain()
    domains["flip_share"][2, 0], domains["lower"][2, 0], domains["upper"][2, 0] = 0, 0, 0.5
    assert figures.flips_by_domain(domains).layout.xaxis.range[1] < 20


def test_the_interval_of_a_single_layer_is_a_bar():
    data = flips_by_layer(layers=[3])
    figure = figures.flips_by_layer(data)
    bar = line(figure, "int4").error_x
    value = 100 * data["flip_share"].sel(recipe="int4").values
    np.testing.assert_allclose([bar.array, bar.arrayminus], [0.1 * value, 0.1 * value])
    assert line(figures.flips_by_layer(flips_by_layer()), "int4").error_x.array is None
    assert "no more than noise" not in names(figure)
    assert "no more than noise" not in names(figures.drift_by_layer(drift(layers=[3])))


def test_flips_by_domain_have_a_row_each_with_the_most_damaged_on_top():
    data = flips_by_domain(domains=["a", "b", "c"])
    data["flip_share"][3] = [0.02, 0.09, 0.05]
    data["lower"], data["upper"] = 0.9 * data["flip_share"], 1.1 * data["flip_share"]
    data["flip_share"][:3] = 0.01
    figure = figures.flips_by_domain(data)
    assert figure.layout.yaxis.ticktext == ("b", "c", "a")
    assert figure.layout.yaxis.range == (2.5, -0.5)
    trace = line(figure, "int4")
    np.testing.assert_allclose(trace.x, [9, 5, 2])
    np.testing.assert_array_equal(np.round(trace.y), [0, 1, 2])
    np.testing.assert_allclose(trace.error_x.array, [0.9, 0.5, 0.2])
    np.testing.assert_allclose(trace.error_x.arrayminus, [0.9, 0.5, 0.2])
    places = [line(figure, name).y[0] for name in ("noise floor: bf16", "noise floor: fp32", "meta", "int4")]
    assert places == sorted(set(places)) and max(places) - min(places) < 1
    with pytest.raises(SchemaError, match="pooled=True"):
        figures.flips_by_domain(flips_by_layer())


def test_flips_by_margin_stand_beside_what_two_noisy_experts_give():
    data = flips_by_margin()
    figure = figures.flips_by_margin(data)
    measured, predicted = line(figure, "int4", "solid"), line(figure, "int4", "dot")
    np.testing.assert_allclose(measured.y, 100 * data["flip_share"].sel(recipe="int4"))
    np.testing.assert_allclose(predicted.y, 100 * data["predicted"].sel(recipe="int4"))
    for trace in (measured, predicted):
        np.testing.assert_allclose(trace.x, data["margin_bin"])
        assert trace.line.color == parts.styles(["int4"])["int4"].colour
    np.testing.assert_allclose(measured.error_y.array, 10 * data["flip_share"].sel(recipe="int4"))
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert "logit" in figure.layout.xaxis.title.text and "%" in figure.layout.yaxis.title.text
    assert measured.customdata[1].startswith("int4, margin 0.0312 to 0.0625 logit<br>")
    assert "of 300 flip" in measured.customdata[1] and "σ = 0.1 logit" in measured.customdata[1]


def test_a_share_of_0_stands_at_0_and_an_empty_bin_nowhere():
    data = flips_by_margin(recipes=["bf16", "meta"])
    data["flip_share"][1, 2], data["lower"][1, 2], data["upper"][1, 2] = 0, 0, 0.3
    data["n_decisions"][3] = 0
    data["flip_share"][:, 3] = np.nan
    figure = figures.flips_by_margin(data)
    solid, at_zero = lines(figure, "meta", "solid")[0], [one for one in lines(figure, "meta") if one.mode == "markers"]
    assert len(solid.x) == 3 and np.isnan(solid.y[2])
    assert list(at_zero[0].y) == [ticks(figure.layout.yaxis)["0"]]
    assert "[0, 30]" in at_zero[0].customdata[0]
    assert 10 ** figure.layout.yaxis.range[0] < at_zero[0].y[0] < np.nanmin(solid.y)
    empty = flips_by_margin()
    empty["n_decisions"][:] = 0
    assert "no margin" in figures.flips_by_margin(empty).layout.annotations[0].text


def test_layers_that_stand_apart_must_be_chosen():
    data = flips_by_margin().expand_dims(layer=[0, 1])
    with pytest.raises(SchemaError, match="select one value of any other dim"):
        figures.flips_by_margin(data)
    assert figures.flips_by_margin(data.isel(layer=0).drop_vars("layer")).data


def test_titles_of_flips_say_what_the_noise_floor_is():
    data = flips_by_layer()
    data["flip_share"][:] = np.array([[0.01], [0.02], [0.03], [0.04]])
    data["flip_share"][3, 1] = 0.09
    data["lower"], data["upper"] = 0.9 * data["flip_share"], 1.1 * data["flip_share"]
    assert fp8_titles.flips_by_layer(data) == (
        "int4 sends 9.0\u00a0% [8.1,\u00a09.9] of the tokens in layer 1 to other experts, more than elsewhere; noise "
        "floor 2.0\u00a0% [1.8,\u00a02.2]"
    )
    data["upper"][1] = 0.085
    assert fp8_titles.flips_by_layer(data).endswith("which noise (2.0\u00a0% [1.8,\u00a08.5]) may explain")
    nothing = data.assign(flip_share=0 * data["flip_share"])
    assert fp8_titles.flips_by_layer(nothing) == "No recipe sends a token to another expert"
    margin = flips_by_margin(recipes=["bf16", "meta"])
    margin["flip_share"][:] = [[0.05] * 4, [0.3, 0.2, 0.1, 0.01]]
    margin["lower"], margin["upper"] = 0.9 * margin["flip_share"], 1.1 * margin["flip_share"]
    assert fp8_titles.flips_by_margin(margin) == (
        "meta flips 30\u00a0% [27,\u00a033] of the decisions closer than 0.031\u00a0logits, 1.0\u00a0% of those above "
        "0.13; noise floor 5.0\u00a0% [4.5,\u00a05.5]"
    )


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_stand_by_recipe_above_the_floors():
    data = loss()
    figure = figures.loss_change(data)
    assert figure.layout.yaxis.ticktext == ("int4", "meta", "noise floor: bf16", "noise floor: fp32")
    trace = line(figure, "int4")
    np.testing.assert_allclose(trace.x, [0.06])
    np.testing.assert_allclose([trace.error_x.array[0], trace.error_x.arrayminus[0]], 0.01)
    assert trace.customdata[0] == "int4<br>+0.06 nat [0.05, 0.07]"
    (noise,) = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert (noise.x0, noise.x1) == pytest.approx((-0.01, 0.03))
    assert "nat" in figure.layout.xaxis.title.text


def test_agreement_is_worst_where_it_is_least():
    data = loss(domains=["a", "b"])
    figure = figures.loss_by_domain(data, measure="top1_agreement")
    assert figure.layout.yaxis.ticktext == ("b", "a")
    np.testing.assert_allclose(line(figure, "int4").x, [92, 93])
    alone = figures.loss_change(loss(), measure="top1_agreement")
    assert alone.layout.yaxis.ticktext[0] == "int4"
    (noise,) = [shape for shape in alone.layout.shapes if shape.type == "rect"]
    assert (noise.x0, noise.x1) == pytest.approx((97.6, 100))


def test_a_model_against_itself_stands_at_0_on_the_log_axis_of_kl():
    data = loss(recipes=["bf16", "meta"])
    for name in ("logit_kl", "logit_kl_lower", "logit_kl_upper"):
        data[name][0] = 0
    figure = figures.loss_change(data, measure="logit_kl")
    assert list(line(figure, "noise floor: bf16").x) == [ticks(figure.layout.xaxis)["0"]]


def test_losses_without_an_output_head_say_so():
    for figure in (
        figures.loss_change(loss() * np.nan),
        figures.loss_by_domain(loss(domains=["a"]) * np.nan, measure="logit_kl"),
    ):
        assert title_of(figure).startswith("Nothing is known of the output")
        assert len(figure.layout.annotations) == 1
    with pytest.raises(figures.FigureChoiceError, match="measure 'accuracy'"):
        figures.loss_change(loss(), measure="accuracy")


def test_titles_of_losses_do_not_call_noise_a_loss():
    data = loss()
    assert fp8_titles.loss_change(data) == (
        "int4 brings a change of the loss of +0.06 [0.05,\u00a00.07]\u00a0nat; noise floor 0.02 "
        "[0.01,\u00a00.03]\u00a0nat"
    )
    data["loss_change_upper"][1] = 0.2
    assert fp8_titles.loss_change(data).startswith("Nothing that noise may not explain; the most: int4 brings")
    data["loss_change_upper"][:] = np.nan
    assert fp8_titles.loss_change(data).endswith("(too few texts for intervals)")
    assert fp8_titles.loss_by_domain(loss(domains=["a", "b"]), measure="top1_agreement") == (
        "Agreement on the likeliest token is 92\u00a0% [92,\u00a092] under int4 in “b”; noise floor 96\u00a0% "
        "[96,\u00a096]"
    )


# --- sensitivity ------------------------------------------------------------------------------------------------------


def by_name(figure, style, row):
    """Points of one setting in one panel."""
    axis = "y" if row == 1 else f"y{row}"
    (found,) = [
        trace for trace in figure.data if trace.legendgroup == style.name and trace.yaxis == axis and len(trace.y) > 1
    ]
    return found


def test_parts_stand_by_damage_with_what_sparing_them_saves():
    data = sensitivity()
    figure = figures.sensitivity(data)
    modules = figure.layout.yaxis.ticktext
    assert modules == ("attention", "routed experts", "router (stays BF16)", "dense mlp (none in this model)")
    order = ["attention", "routed_experts"]
    for style, setting in ((ALONE, "alone"), (SPARED, "spared")):
        trace = by_name(figure, style, 1)
        np.testing.assert_allclose(trace.x[:2], data["loss_change"].sel(unit=order, setting=setting))
        np.testing.assert_array_equal(np.round(trace.y), range(4))
        assert np.isnan(trace.x[2:]).all()
    left = by_name(figure, LEFT_OUT, 1)
    np.testing.assert_allclose(left.x[2], data["loss_change"].sel(unit="router", setting="alone"))
    assert np.isnan(np.delete(left.x, 2)).all()
    layers = data["loss_change"].sel(setting="alone", unit=[f"layer {at}" for at in range(4)])
    expected = layers["unit"].values[np.argsort(-layers.values)]
    assert figure.layout.yaxis2.ticktext == tuple(expected)
    assert "1,000 weights" in by_name(figure, ALONE, 1).customdata[0]


def test_the_floors_and_the_whole_recipe_cross_both_panels():
    figure = figures.sensitivity(sensitivity())
    for axis in ("x", "x2"):
        drawn = [shape for shape in figure.layout.shapes if shape.xref == axis and shape.yref.endswith("domain")]
        lines_at = {shape.x0: shape.line.dash for shape in drawn if shape.type == "line" and shape.x0 == shape.x1}
        assert lines_at == {0.001: "dash", 0.002: "dashdot", 0.06: None}
        (area,) = [shape for shape in drawn if shape.type == "rect"]
        assert (area.x0, area.x1) == pytest.approx((0, 0.0022))


def test_shares_of_flips_are_per_cent_and_kl_has_a_place_for_0():
    figure = figures.sensitivity(sensitivity(), measure="flip_share")
    assert by_name(figure, ALONE, 1).x[0] == pytest.approx(5)
    assert "%" in figure.layout.xaxis2.title.text
    figure = figures.sensitivity(sensitivity(), measure="logit_kl")
    assert figure.layout.xaxis.type == figure.layout.xaxis2.type == "log"
    assert figure.layout.xaxis.ticktext[0] == "0"


def test_titles_of_sensitivity_name_the_most_damaging_parts():
    data = sensitivity()
    title = fp8_titles.sensitivity(data)
    assert title.startswith("Of what the recipe rounds, attention (+0.05 [0.045,\u00a00.055]\u00a0nat) and layer ")
    assert title.endswith("; all at once 0.06\u00a0nat; noise floor 0.002 [0.0018,\u00a00.0022]\u00a0nat")
    noisy = data.copy(deep=True)
    noisy["loss_change_upper"][-1] = 1.0
    assert fp8_titles.sensitivity(noisy).startswith("No part alone brings a change of the loss that noise (0.002 [")
    uncovered = data.assign(covered=data["covered"] & False)
    assert fp8_titles.sensitivity(uncovered) == "Nothing that the recipe covers could be measured"


def test_nothing_measured_is_said():
    data = sensitivity()
    for name in ("loss_change", "loss_change_lower", "loss_change_upper"):
        data[name][:] = np.nan
    assert figures.sensitivity(data).layout.annotations[0].text == "No part of the model could be measured"


# --- activations ------------------------------------------------------------------------------------------------------


def test_amax_is_drawn_by_layer_and_expert_in_logs():
    data = activations(dense=[0, 2])
    data["amax"][1, 3, 2] = np.nan
    figure = figures.activation_amax(data, module="experts.down_proj")
    cells = the_heatmap(figure)
    np.testing.assert_allclose(cells.z[1], [1, 2, np.nan])
    np.testing.assert_allclose(cells.z[3], [3, 4, 5])
    assert np.isnan(cells.z[0]).all() and np.isnan(cells.z[2]).all()
    assert list(cells.text[1]) == ["2.0", "4.0", "×"] and list(cells.text[0]) == ["", "", ""]
    assert cells.customdata[1][0][0] == "expert 0<br>amax 2 of 640 values"
    assert "no token went to it" in cells.customdata[1][2][0]
    bar = figure.layout.coloraxis.colorbar
    assert dict(zip(bar.tickvals, bar.ticktext, strict=True)) == {1: "2", 2: "4", 3: "8", 4: "16", 5: "32"}
    assert title_of(figure) == (
        "What enters experts.down_proj differs up to 4.0\u00a0× between experts: in layer 3 ◇ it reaches 32 for "
        "expert 2, 8.0 for expert 0"
    )


def test_one_matrix_for_all_experts_has_no_map_of_experts():
    with pytest.raises(figures.FigureChoiceError, match=r"activation_percentiles.*experts.gate_up_proj, experts.down"):
        figures.activation_amax(activations(), module="q_proj")
    with pytest.raises(figures.FigureChoiceError, match="module 'lm_head' is not there"):
        figures.activation_amax(activations(), module="lm_head")


def test_inputs_that_are_all_zero_or_unseen_are_drawn_or_said():
    data = activations()
    figure = figures.activation_amax(data.assign(amax=0 * data["amax"]), module="experts.down_proj")
    assert np.isfinite(the_heatmap(figure).z).all()
    empty = figures.activation_amax(data.assign(amax=np.nan * data["amax"]), module="experts.down_proj")
    assert empty.layout.annotations[0].text == "No token entered experts.down_proj"
    gone = figures.activation_percentiles(data.assign(amax=np.nan * data["amax"]), module="q_proj")
    assert gone.layout.annotations[0].text == "No token entered q_proj"


def test_percentiles_are_those_of_the_expert_with_the_largest():
    data = activations()
    figure = figures.activation_percentiles(data, module="experts.down_proj")
    np.testing.assert_allclose(line(figure, "largest (amax)").x, [4, 8, 16, 32])
    np.testing.assert_allclose(line(figure, "50 % lie below").x, [0.4, 0.8, 1.6, 3.2])
    assert line(figure, "99 % lie below").customdata[3] == "layer 3 ◇, 99 % lie below<br>16 (expert 2)"
    assert "expert" not in line(figures.activation_percentiles(data, module="q_proj"), "99 % lie below").customdata[0]
    assert len({trace.line.dash for trace in figure.data if trace.showlegend is None}) >= 3
    assert (
        title_of(figure) == "Inputs of experts.down_proj reach 32 in layer 3 ◇, where 99\u00a0% of them are at most 16"
    )


def test_what_recipes_lose_of_activations_stands_by_matrix_at_its_worst():
    data = activations(recipes=["meta", "rowwise", "int4"])
    data["underflow"][1, 2, 3, 1] = 0.25
    figure = figures.activation_loss(data, measure="underflow")
    assert figure.layout.yaxis.ticktext == ("q", "router", "experts.gate_up", "experts.down")
    np.testing.assert_allclose(line(figure, "rowwise").x, [0.2, 0.2, 0.2, 25])
    assert line(figure, "rowwise").customdata[3] == "rowwise, experts.down_proj<br>25 % at most: layer 2, expert 1"
    assert "int4 (weights only)" in names(figure)
    assert fp8_titles.activation_loss(data, measure="underflow") == (
        "Under rowwise 25\u00a0% of what enters experts.down_proj (layer 2, expert 1) becomes 0, more than "
        "anywhere else"
    )
    assert title_of(figures.activation_loss(data)) == "No recipe saturates an input"
    unrounded = figures.activation_loss(activations(recipes=["int4"]))
    assert unrounded.layout.annotations[0].text == "None of these recipes rounds activations"


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ALL))
def test_names_of_people_are_text_not_markup(name):
    figure = ALL[name](["bf16", "fp32", *NASTY, "meta"])
    drawn = json.dumps(json.loads(figure.to_json()), ensure_ascii=False)
    assert "<b>bold" not in drawn and "&lt;b&gt;bold" in drawn
    # A name is never part of a template, where plotly would fill it in.
    for trace in figure.data:
        template = trace.hovertemplate or ""
        assert "recipe with" not in template, template


@pytest.mark.parametrize("name", ["flips_by_domain", "loss_by_domain"])
def test_names_of_domains_are_text_too(name):
    make = {"flips_by_domain": flips_by_domain, "loss_by_domain": loss}[name]
    figure = getattr(figures, name)(make(domains=["<i>x</i>", "b&c"]))
    drawn = json.dumps(json.loads(figure.to_json()), ensure_ascii=False)
    assert "<i>" not in drawn and "&lt;i&gt;x&lt;/i&gt;" in drawn and "b&amp;c" in drawn


@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.parametrize("recipes", [["meta"], ["bf16", "meta"], ["bf16", "fp32", *parts.RECIPES, "own", "other"]])
def test_one_recipe_and_twelve_are_drawn(name, recipes):
    figure = ALL[name](recipes)
    assert figure.data and title_of(figure)
    assert len(figure.to_json()) < 300_000


@pytest.mark.parametrize("name", list(ALL))
def test_a_title_is_what_was_asked_for(name):
    make = {
        "weight_sqnr": weights, "drift_by_layer": drift, "flips_by_layer": flips_by_layer, "loss_change": loss,
        "flips_by_domain": flips_by_domain, "flips_by_margin": flips_by_margin, "activation_loss": activations,
        "loss_by_domain": lambda: loss(domains=["a"]),
    }[name]  # fmt: skip
    draw = getattr(figures, name)
    own, plain, none = draw(make()), draw(make(), title="a <b> & b"), draw(make(), title="")
    assert title_of(own) == figure_parts.plain(" ".join(getattr(fp8_titles, name)(make()).split(" ")))
    assert title_of(plain) == "a &lt;b&gt; &amp; b"
    assert none.layout.title.text is None and none.layout.height < own.layout.height


def test_a_large_model_is_drawn_in_full_and_stays_small():
    layers = range(48)
    figure = figures.weight_sqnr(weights(layers=layers, n_experts=128, recipes=["meta", "int4", "rowwise"]))
    assert all(np.shape(trace.z) == (48, 4) for trace in figure.data if trace.type == "heatmap")
    assert figure.layout.yaxis.ticktext == ("0", *(f"{layer} ◇" for layer in range(3, 48, 4)))
    assert len(figure.to_json()) < 300_000
    figure = figures.activation_amax(activations(layers=layers, n_experts=128), module="experts.down_proj")
    assert np.shape(the_heatmap(figure).z) == (48, 128) and len(figure.layout.xaxis.tickvals) <= 20
    assert len(figure.to_json()) < 900_000
    figure = figures.sensitivity(sensitivity(n_layers=48))
    assert len(figure.layout.yaxis2.ticktext) == 48
    assert len(figures.drift_by_layer(drift(layers=layers)).to_json()) < 300_000


@pytest.mark.parametrize("layers", [[0], [3], [3, 7]])
def test_one_layer_is_enough(layers):
    for figure in (
        figures.weight_sqnr(weights(layers=layers, n_experts=1)),
        figures.drift_by_layer(drift(layers=layers)),
        figures.flips_by_layer(flips_by_layer(layers=layers)),
        figures.activation_amax(activations(layers=layers), module="experts.down_proj"),
        figures.activation_percentiles(activations(layers=layers), module="q_proj"),
    ):
        assert ("NoPE" in figure.layout.yaxis.title.text) == (3 in layers)
        assert figure.layout.yaxis.range == (-0.5, max(layers) + 0.5)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.flips_by_layer(flips_by_layer() * np.nan),
        lambda: figures.flips_by_domain(flips_by_domain() * np.nan),
        lambda: figures.weight_sqnr(weights().isel(layer=[])),
        lambda: figures.flips_by_layer(flips_by_layer().isel(recipe=[])),
    ],
)
def test_nothing_at_all_is_said_not_drawn(draw):
    figure = draw()
    assert not figure.data and len(figure.layout.annotations) == 1 and figure.layout.title.text


def test_layers_of_unknown_kind_carry_no_mark():
    data = drift().drop_vars("attention_kind")
    figure = figures.drift_by_layer(data)
    assert figure.layout.yaxis.ticktext == ("0", "1", "2", "3") and figure.layout.yaxis.title.text == "layer"
    assert title_of(figure).startswith("In layer 3 int4")


def test_missing_variables_and_dims_are_named():
    with pytest.raises(SchemaError, match="'lower' is missing"):
        figures.flips_by_layer(flips_by_layer().drop_vars("lower"))
    with pytest.raises(SchemaError, match=r"loss_change has dims \(recipe, domain\), expected \(recipe\)"):
        figures.loss_change(loss(domains=["a", "b"]))
    assert issubclass(figures.FigureChoiceError, ProbeError)


def test_long_titles_break_and_the_legend_stays_below_them():
    figure = figures.flips_by_layer(flips_by_layer(), title="word " * 60)
    n_lines = figure.layout.title.text.count("<br>") + 1
    assert n_lines == 4
    room = (1 - figure.layout.legend.y) * figure.layout.height
    assert room >= 21 * n_lines and figure.layout.margin.t > room


def test_every_public_function_takes_data_first_and_says_what_it_raises():
    for name in figures.__all__:
        function = getattr(figures, name)
        if inspect.isclass(function):
            continue
        kinds_of = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
        assert kinds_of[0] is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert set(kinds_of[1:]) == {inspect.Parameter.KEYWORD_ONLY}
        assert re.search(r"Parameters\n\s+-+", function.__doc__) and "Raises" in function.__doc__


def test_figures_and_titles_load_no_torch():
    code = "import sys, probe.fp8_figures, probe.fp8_titles; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    tree = ast.parse(inspect.getsource(fp8_titles))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any("plotly" in str(module) for module in imported)
