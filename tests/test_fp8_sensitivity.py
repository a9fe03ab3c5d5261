"""``sensitivity``: units against drift of recipes that hold just them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import probe
from probe import fp8_error, schema
from probe.bootstrap import Bootstrap
from probe.float8 import Rounding, Scaling
from probe.fp8 import streams
from probe.fp8.flips import flip_share, loss_change
from probe.fp8.layers import QuantizationError
from probe.recipes import MODULE_KINDS, Recipe, RecipeError, recipes
from tests.random_models import SHAPES, random_ids, random_model

E4M3 = Rounding("e4m3fn", Scaling("row"))
IDS = random_ids(20, 17, 15, 12, 11, 9, seed=3)


def small(seed=0, shape="every layer MoE, top-1", **changes):
    return random_model(seed, **(dict(num_hidden_layers=4) | SHAPES[shape] | changes))


def sensitivity(model, ids=IDS, **options):
    return fp8_error.sensitivity(model, ids, progress=False, **options)


def drift_of(model, recipe, ids=IDS):
    """Loss change, KL and flips of a recipe, with their bounds."""
    study = fp8_error.drift(model, ids, recipe=recipe, progress=False)
    losses, flips = (result.sel(recipe=recipe.name) for result in (loss_change(study), flip_share(study, pooled=True)))
    found = {name: float(losses[name]) for name in losses if name.startswith(("loss_change", "logit_kl"))}
    return found | {
        "flip_share": float(flips["flip_share"]),
        "flip_share_lower": float(flips["lower"]),
        "flip_share_upper": float(flips["upper"]),
    }


def assert_cell(found, unit, setting, expected):
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].sel(unit=unit, setting=setting), value, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("shape", ["every second layer MoE, top-1", "every layer MoE, top-2"])
def test_a_kind_of_modules_is_the_recipe_of_just_that_kind(shape):
    model, recipe = small(1, shape), recipes()["tensorwise"]
    found = sensitivity(model, recipe=recipe)
    assert_cell(found, "everything", "alone", drift_of(model, recipe))
    for kind in MODULE_KINDS:
        if kind == "dense_mlp" and shape == "every layer MoE, top-2":
            continue
        assert_cell(found, kind, "alone", drift_of(model, replace(recipe, modules=(kind,))))
        rest = tuple(other for other in recipe.modules if other != kind)
        assert_cell(found, kind, "spared", drift_of(model, replace(recipe, modules=rest)))


def test_layers_of_metas_recipe():
    """It leaves the first and last layer: three layers of five are covered, and all five are tried."""
    model, recipe = small(2, num_hidden_layers=3), recipes()["meta"]
    found = sensitivity(model, recipe=recipe)
    # Layer 1 is the only one that it covers.
    assert_cell(found, "layer 1", "alone", drift_of(model, recipe))
    assert_cell(found, "everything", "alone", drift_of(model, recipe))
    for name in ("loss_change", "logit_kl", "flip_share"):
        assert float(found[name].sel(unit="layer 1", setting="spared")) == 0
        # Where nothing was covered there is nothing to spare.
        for unit in ("layer 0", "layer 2", "router", "attention"):
            whole = found[name].sel(unit="everything", setting="alone")
            assert float(found[name].sel(unit=unit, setting="spared")) == float(whole)
    assert float(found["logit_kl"].sel(unit="layer 0", setting="alone")) > 0
    covered = dict(zip(found["unit"].values.tolist(), found["covered"].values.tolist(), strict=True))
    assert [unit for unit, is_covered in covered.items() if is_covered] == ["routed_experts", "layer 1", "everything"]


def test_the_first_and_last_layer_are_tried_with_the_kinds_of_the_recipe():
    model = small(2, num_hidden_layers=3)
    found = sensitivity(model, recipe="meta")
    last = Recipe("last", ("routed_experts",), recipes()["meta"].weight, recipes()["meta"].activation)
    alone = sensitivity(model, recipe=last)
    for name in ("loss_change", "logit_kl", "flip_share"):
        xr.testing.assert_allclose(
            found[name].sel(unit="layer 2", setting="alone"), alone[name].sel(unit="layer 2", setting="alone")
        )


def test_units_are_named_and_counted():
    model = small(3, "every second layer MoE, top-1")
    found = sensitivity(model, recipe="rowwise")
    assert found["unit"].values.tolist() == [
        *MODULE_KINDS,
        *(f"layer {layer}" for layer in range(4)),
        *("everything", "bf16", "fp32"),
    ]
    assert found["unit_kind"].values.tolist() == ["module"] * 6 + ["layer"] * 4 + ["whole"] + ["floor"] * 2
    assert found["setting"].values.tolist() == ["alone", "spared"]
    n_weights = dict(zip(found["unit"].values.tolist(), found["n_weights"].values.tolist(), strict=True))
    hidden, heads, inner, dense = 32, 4 * 8, 16, 24
    assert n_weights["attention"] == 4 * (2 * hidden * heads + 2 * hidden * 2 * 8)
    assert n_weights["router"] == 2 * 6 * hidden
    assert n_weights["routed_experts"] == 2 * 6 * 3 * hidden * inner
    assert n_weights["shared_expert"] == 2 * 3 * hidden * inner
    assert n_weights["dense_mlp"] == 2 * 3 * hidden * dense
    assert n_weights["output_head"] == 160 * hidden
    assert n_weights["layer 0"] == n_weights["attention"] // 4 + n_weights["dense_mlp"] // 2
    assert n_weights["everything"] == sum(n_weights[f"layer {layer}"] for layer in range(4))
    assert n_weights["bf16"] == n_weights["everything"] + n_weights["router"] + n_weights["output_head"]
    assert not found["covered"].sel(unit=["router", "output_head", "bf16", "fp32"]).any()


def test_what_does_not_exist_is_undefined():
    found = sensitivity(small(4), recipe="rowwise")
    for name in ("loss_change", "logit_kl", "flip_share"):
        assert found[name].sel(unit="dense_mlp").isnull().all()
        assert found[name].sel(unit=["bf16", "fp32"], setting="spared").isnull().all()
        assert found[name].sel(unit=["bf16", "fp32"], setting="alone").notnull().all()
        assert float(found[name].sel(unit="everything", setting="spared")) == 0
    assert not found["covered"].sel(unit="dense_mlp")
    headless = sensitivity(small(4).model, recipe="rowwise")
    assert headless["loss_change"].isnull().all() and headless["logit_kl"].isnull().all()
    assert headless["flip_share"].sel(unit="attention", setting="alone").notnull()
    assert headless["n_weights"].sel(unit="output_head") == 0


def test_floors_are_those_of_drift():
    model = small(5)
    found = sensitivity(model, recipe="rowwise")
    floor = fp8_error.noise_floor(model, IDS, progress=False)
    losses, flips = loss_change(floor), flip_share(floor, pooled=True)
    for name in ("bf16", "fp32"):
        for variable in ("loss_change", "logit_kl"):
            value = found[variable].sel(unit=name, setting="alone")
            np.testing.assert_allclose(value, losses[variable].sel(recipe=name), atol=1e-12)
        value = found["flip_share"].sel(unit=name, setting="alone")
        np.testing.assert_allclose(value, flips["flip_share"].sel(recipe=name))


def test_a_planted_layer_is_found():
    """A layer whose inputs' scale is set by one huge channel cannot take one scale per tensor."""
    model = small(6, num_hidden_layers=4)
    with torch.no_grad():
        # One channel of layer 2's norm is huge, and its projections look at it hardly at all.
        norm = model.model.layers[2].input_layernorm.weight
        norm[0] *= 1e6
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[2].self_attn, name).weight[:, 0] /= 1e6
    found = sensitivity(model, recipe="tensorwise")
    layers = found.sel(setting="alone", unit=[f"layer {i}" for i in range(4)])
    assert layers["unit"].values[np.argmax(layers["logit_kl"].values)] == "layer 2"
    kinds = found.sel(setting="alone", unit=["attention", "routed_experts", "shared_expert"])
    assert kinds["unit"].values[np.argmax(kinds["logit_kl"].values)] == "attention"
    everything = found["logit_kl"].sel(unit="everything", setting="alone")
    assert float(found["logit_kl"].sel(unit="layer 2", setting="spared")) < 0.5 * float(everything)


def test_what_equals_the_reference_is_not_computed(monkeypatch):
    """Alone, the last layer costs one run of that layer; all layers before it are the reference's."""
    runs = []
    run = streams.run_layer

    def counting(made, *args, **kwargs):
        runs.append(made.layer.self_attn.layer_idx)
        return run(made, *args, **kwargs)

    monkeypatch.setattr(streams, "run_layer", counting)
    fp8_error.sensitivity(small(7, num_hidden_layers=5), random_ids(9), recipe="rowwise", progress=False)
    # In every layer the reference, two floors, everything, four kinds alone, and three that are covered spared. Layer 1
    # on, also what earlier layers changed: one is the first that was rounded alone, one the first that was spared, and
    # what is rounded (or spared) in this layer begins as the reference (or everything).
    assert [runs.count(layer) for layer in range(5)] == [11, 11 + 2, 11 + 6, 11 + 8, 11 + 10]


def test_bounds_follow_the_bootstrap():
    model = small(8)
    wide = sensitivity(model, recipe="rowwise", bootstrap=Bootstrap(level=0.99))
    narrow = sensitivity(model, recipe="rowwise", bootstrap=Bootstrap(level=0.5))
    assert (wide.attrs["level"], narrow.attrs["level"]) == (0.99, 0.5)
    place = dict(unit="everything", setting="alone")
    for name in ("loss_change", "logit_kl"):
        reach = [float((own[f"{name}_upper"] - own[f"{name}_lower"]).sel(place)) for own in (wide, narrow)]
        assert reach[0] > 2 * reach[1]
    few = sensitivity(model, IDS[:3], recipe="rowwise")
    for name in ("loss_change", "logit_kl", "flip_share"):
        assert few[f"{name}_lower"].isnull().all() or float(few[f"{name}_lower"].sel(place)) != few[name].sel(place)
        assert few[f"{name}_lower"].sel(place).isnull()


def test_the_group_is_as_the_schema_says(tmp_path):
    found = sensitivity(small(9), recipe="rowwise")
    study = fp8_error.noise_floor(small(9), IDS, progress=False)
    study["fp8_sensitivity"] = xr.DataTree(found)
    schema.validate(study)
    probe.save(study, tmp_path / "study.zarr")
    assert probe.open(tmp_path / "study.zarr")["fp8_sensitivity"].to_dataset().load().identical(found)


def test_the_model_stays_as_it_was():
    model = small(10)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    sensitivity(model, recipe=Recipe("all", MODULE_KINDS, E4M3, E4M3))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_an_unknown_recipe_and_several_are_refused():
    with pytest.raises(RecipeError, match="no recipe"):
        sensitivity(small(11), recipe="fp7")
    with pytest.raises(QuantizationError, match="takes one recipe, got 2"):
        sensitivity(small(11), recipe=["meta", "rowwise"])
