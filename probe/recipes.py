"""Recipes of quantisation as data: which matrices of a Llama 4, in which format, with which scales."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import cast

from probe.float8 import PowerOfTwo, Rounding, Scaling
from probe.schema import ProbeError

MODULE_KINDS = ("attention", "router", "routed_experts", "shared_expert", "dense_mlp", "output_head")
"""Kinds of matrices; attention is its four projections. Embeddings and norms are never quantised."""

PROJECTIONS = ("attention", "routed_experts", "shared_expert", "dense_mlp")
"""What most recipes quantise: router and output head stay as they are, as DeepSeek-V3 keeps its gate and head."""


class RecipeError(ProbeError):
    """A recipe that is not known, or that asks for what does not exist."""


@dataclass(frozen=True)
class Recipe:
    """What is quantised, and how.

    Parameters
    ----------
    name : what it is called in tables and figures.
    modules : which of ``MODULE_KINDS`` it quantises.
    weight : how their weights are rounded, (output, input). None: they are not.
    activation : how their inputs are rounded, (token, channel), always with what the batch at hand holds unless the
        scaling is static. None: weights only.
    gradient : how the gradients of their outputs are rounded; for training only.
    first_and_last_layer : False leaves these two decoder layers as they are.
    description : one line.

    Raises
    ------
    RecipeError
        For an empty name, or a module kind that does not exist.
    """

    name: str
    modules: tuple[str, ...]
    weight: Rounding | None
    activation: Rounding | None = None
    gradient: Rounding | None = None
    first_and_last_layer: bool = True
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise RecipeError("a recipe needs a name")
        for part in ("weight", "activation", "gradient"):
            if not isinstance(getattr(self, part), Rounding | None):
                raise RecipeError(
                    f"recipe {self.name}: {part} is {getattr(self, part)!r}: pass a Rounding, such as "
                    "Rounding('e4m3fn', Scaling('row')), or None"
                )
        if isinstance(cast(object, self.modules), str):
            raise RecipeError(f"recipe {self.name}: modules is {self.modules!r}: pass a tuple, ({self.modules!r},)")
        if unknown := [kind for kind in self.modules if kind not in MODULE_KINDS]:
            raise RecipeError(
                f"recipe {self.name}: no modules are called {unknown}; there are {', '.join(MODULE_KINDS)}"
            )

    def covers(self, kind: str, layer: int, n_layers: int) -> bool:
        """Whether matrices of this kind are quantised in decoder layer ``layer`` of ``n_layers``, from 0."""
        return kind in self.modules and (self.first_and_last_layer or 0 < layer < n_layers - 1)


def _microscaling(power_of_two: PowerOfTwo) -> Rounding:
    return Rounding("e4m3fn", Scaling("block", (1, 32), power_of_two=power_of_two))


_ROW = Rounding("e4m3fn", Scaling("row"))
_TENSOR = Rounding("e4m3fn", Scaling("tensor"))

_RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "meta",
            ("routed_experts",),
            weight=_ROW,
            activation=Rounding("e4m3fn", Scaling("row", cap=1200)),
            first_and_last_layer=False,
            description="Meta's for Llama 4: routed experts only, E4M3, a scale per row, inputs capped at 1200",
        ),
        Recipe(
            "tensorwise",
            PROJECTIONS,
            weight=_TENSOR,
            activation=_TENSOR,
            description="E4M3, one scale per matrix",
        ),
        Recipe(
            "rowwise",
            PROJECTIONS,
            weight=_ROW,
            activation=_ROW,
            description="E4M3, one scale per output row of a weight and per token",
        ),
        Recipe(
            "deepseek",
            PROJECTIONS,
            weight=Rounding("e4m3fn", Scaling("block", (128, 128))),
            activation=Rounding("e4m3fn", Scaling("block", (1, 128))),
            description="DeepSeek-V3's: E4M3, weights in blocks of 128 x 128, inputs in blocks of 1 x 128",
        ),
        Recipe(
            "mxfp8",
            PROJECTIONS,
            weight=_microscaling("floor"),
            activation=_microscaling("floor"),
            description="OCP microscaling: E4M3 in blocks of 32, scales are powers of two rounded down",
        ),
        Recipe(
            "mxfp8_ceil",
            PROJECTIONS,
            weight=_microscaling("ceil"),
            activation=_microscaling("ceil"),
            description="microscaling with scales rounded up, so that nothing saturates",
        ),
        Recipe(
            "hybrid",
            PROJECTIONS,
            weight=_TENSOR,
            activation=_TENSOR,
            gradient=Rounding("e5m2", Scaling("tensor")),
            description="for training: E4M3 forward, E5M2 gradients, one scale per matrix",
        ),
        Recipe(
            "int4",
            PROJECTIONS,
            weight=Rounding("int4", Scaling("block", (1, 32))),
            description="weights only: whole numbers of four bits in blocks of 32",
        ),
    )
}


def recipes() -> dict[str, Recipe]:
    """The recipes by name.

    Returns
    -------
    ``meta`` (as Llama 4 Maverick was published), ``tensorwise`` and ``hybrid`` (Micikevicius et al. 2022), ``rowwise``,
    ``deepseek`` (DeepSeek-AI 2024, DeepSeek-V3, section 3.3), ``mxfp8`` and ``mxfp8_ceil`` (OCP Microscaling Formats
    v1.0, 2023; scales rounded up: Mishra et al. 2025), ``int4``.
    """
    return dict(_RECIPES)


def resolve(recipe: str | Recipe) -> Recipe:
    """The recipe of this name, or the recipe itself.

    Raises
    ------
    RecipeError
        If no recipe has the name; lists those that there are.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in _RECIPES:
        raise RecipeError(f"no recipe is called {recipe!r}: choose one of {', '.join(_RECIPES)}, or pass a Recipe")
    return _RECIPES[recipe]


def described(recipes: Iterable[Recipe]) -> str:
    """Recipes in JSON, by name, as attributes hold them."""
    return json.dumps({recipe.name: asdict(recipe) for recipe in recipes}, indent=2)
