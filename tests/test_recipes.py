"""Recipes: what each of them quantises, and how."""

from __future__ import annotations

import pytest
import torch

from probe.float8 import Float8Error, Rounding, Scaling, quantize
from probe.recipes import MODULE_KINDS, Recipe, RecipeError, recipes, resolve

PROJECTIONS = {"attention", "routed_experts", "shared_expert", "dense_mlp"}


def test_the_recipes():
    assert list(recipes()) == ["meta", "tensorwise", "rowwise", "deepseek", "mxfp8", "mxfp8_ceil", "hybrid", "int4"]
    for name, recipe in recipes().items():
        assert recipe.name == name
        assert recipe.description


def test_meta_quantises_routed_experts_of_inner_layers_only():
    meta = recipes()["meta"]
    covered = {(kind, layer) for kind in MODULE_KINDS for layer in range(4) if meta.covers(kind, layer, 4)}
    assert covered == {("routed_experts", 1), ("routed_experts", 2)}
    assert meta.weight == Rounding("e4m3fn", Scaling("row"))
    assert meta.activation == Rounding("e4m3fn", Scaling("row", cap=1200))
    assert not any(meta.covers("routed_experts", layer, 2) for layer in range(2))


@pytest.mark.parametrize("name", sorted(set(recipes()) - {"meta"}))
def test_the_others_keep_router_and_output_head(name):
    recipe = recipes()[name]
    for layer in range(3):
        assert {kind for kind in MODULE_KINDS if recipe.covers(kind, layer, 3)} == PROJECTIONS


def test_scales_of_a_weight_and_of_an_input():
    weight, x = torch.randn(256, 384), torch.randn(5, 384)
    shapes = {
        "meta": [(256, 1), (5, 1)],
        "tensorwise": [(1, 1), (1, 1)],
        "rowwise": [(256, 1), (5, 1)],
        "deepseek": [(2, 3), (5, 3)],
        "mxfp8": [(256, 12), (5, 12)],
        "mxfp8_ceil": [(256, 12), (5, 12)],
        "hybrid": [(1, 1), (1, 1)],
    }
    for name, expected in shapes.items():
        recipe = recipes()[name]
        roundings = zip((weight, x), (recipe.weight, recipe.activation), strict=True)
        scales = [quantize(side, format=own.format, scaling=own.scaling).scale for side, own in roundings]
        assert [tuple(scale.shape) for scale in scales] == expected, name
        is_power = [bool((scale.log2() % 1 == 0).all()) for scale in scales]
        assert is_power == [name.startswith("mxfp8")] * 2


def test_formats_and_directions():
    for name, recipe in recipes().items():
        assert recipe.weight.format == ("int4" if name == "int4" else "e4m3fn")
    assert recipes()["int4"].weight.scaling == Scaling("block", (1, 32))
    assert recipes()["int4"].activation is None
    assert [name for name, recipe in recipes().items() if recipe.gradient] == ["hybrid"]
    assert recipes()["hybrid"].gradient.format == "e5m2"
    assert [recipes()[name].weight.scaling.power_of_two for name in ("mxfp8", "mxfp8_ceil")] == ["floor", "ceil"]


def test_a_recipe_by_name_or_of_ones_own():
    assert resolve("meta") == recipes()["meta"]
    own = Recipe("router in e5m2", ("router", "output_head"), weight=Rounding("e5m2"), first_and_last_layer=False)
    assert resolve(own) is own
    assert own.covers("router", 1, 3)
    assert not own.covers("router", 0, 3)
    assert not own.covers("attention", 1, 3)


def test_the_known_recipes_cannot_be_changed_by_accident():
    recipes().clear()
    assert "meta" in recipes()


def test_what_does_not_exist_is_named():
    with pytest.raises(RecipeError, match="no recipe is called 'fp4': choose one of meta, tensorwise, .*int4"):
        resolve("fp4")
    with pytest.raises(RecipeError, match=r"recipe mine: no modules are called \['experts'\]; there are attention, "):
        Recipe("mine", ("router", "experts"), weight=None)
    with pytest.raises(RecipeError, match="no recipe is called None"):
        resolve(None)
    with pytest.raises(RecipeError, match=r"recipe mine: weight is 'e4m3fn': pass a Rounding"):
        Recipe("mine", ("router",), weight="e4m3fn")
    with pytest.raises(RecipeError, match=r"modules is 'router': pass a tuple, \('router',\)"):
        Recipe("mine", "router", weight=None)
    with pytest.raises(Float8Error, match=r"scaling is 'row': pass a Scaling, such as Scaling\('row'\)"):
        Rounding("e4m3fn", "row")
    with pytest.raises(Float8Error, match="amax is '3', it must be a positive number"):
        Scaling(amax="3")
    with pytest.raises(Float8Error, match="amax is 1e\\+300, it must be a positive number that float32 holds"):
        Scaling(amax=1e300)
    with pytest.raises(RecipeError, match="needs a name"):
        Recipe("", (), weight=None)
    with pytest.raises(Float8Error, match="unknown format"):
        Recipe("mine", ("router",), weight=Rounding("fp4"))
