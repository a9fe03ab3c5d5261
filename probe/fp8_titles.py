"""Titles that state what one sees in a figure of FP8, from the numbers that it shows and the noise floors beside them.

They are plain text: names of recipes and domains stand in them as they are. A difference that the noise floors may
explain, or whose interval is withheld, is not called one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from probe import schema
from probe.figure_parts import short
from probe.findings import digits, interval, percent
from probe.text_view import layer_label

FLOORS = ("bf16", "fp32")
"""Names of the noise floors among the recipes: BF16 with other kernels, and float32."""

MEASURES = {
    "loss_change": "change of the loss",
    "logit_kl": "KL of the logits",
    "top1_agreement": "agreement on the likeliest token",
    "flip_share": "share of flipped routings",
}
"""What FP8 costs, in words."""

NO_OUTPUT = "Nothing is known of the output: the model has no output head, or the texts no second token"

UNITS = {"loss_change": "nat", "logit_kl": "nat", "top1_agreement": "1", "flip_share": "1"}

SITES = {
    "residual": "the residual stream",
    "feed_forward": "the feed-forward output",
    "router": "the router's logits",
    "attention": "the output of attention",
}
"""Places in a layer, in words."""

NO_INTERVALS = " (too few texts for intervals)"


class Estimate(NamedTuple):
    """A number and its bounds, NaN where they are withheld."""

    value: float
    lower: float = np.nan
    upper: float = np.nan

    @property
    def is_bounded(self) -> bool:
        """Whether it has an interval."""
        return bool(np.isfinite(self.lower) and np.isfinite(self.upper))

    def told(self, unit: str, *, sign: bool = False) -> str:
        """The number with its interval, for a sentence; ``unit`` "1" is a share."""
        scale, plus = 100 if unit == "1" else 1, "+" if sign and self.value > 0 else ""
        text = percent(self.value) if unit == "1" else digits(self.value)
        bounds = f" {interval(self.lower, self.upper, scale)}" if self.is_bounded else ""
        return plus + text + bounds + (f"\u00a0{unit}" if unit != "1" else "")


def recipe_names(data: xr.Dataset) -> list[str]:
    """Names of the recipes and noise floors that the data holds."""
    return [str(name) for name in data["recipe"].values] if "recipe" in data.dims else []


def own_recipes(data: xr.Dataset) -> list[str]:
    """The recipes without the noise floors."""
    return [name for name in recipe_names(data) if name not in FLOORS]


def estimate(own: xr.Dataset, name: str) -> Estimate:
    """One number of a result with the bounds that are named after it, or plainly ``lower`` and ``upper``."""
    keys = [f"{name}_{end}" if f"{name}_{end}" in own else end for end in ("lower", "upper")]
    return Estimate(float(own[name]), *(float(own[key]) if key in own else np.nan for key in keys))


def layer_name(data: xr.Dataset, layer: int) -> str:
    """A layer in words, with the sign of a NoPE layer."""
    if "attention_kind" not in data.coords:
        return f"layer {layer}"
    at = data["layer"].values.tolist().index(layer)
    return f"layer {layer_label(layer, schema.labels(data['attention_kind'])[at] == 'nope')}"


def noise(estimates: Sequence[Estimate], unit: str) -> str:
    """The largest noise floor, for a sentence; "" where there is none."""
    known = [floor for floor in estimates if np.isfinite(floor.value)]
    return max(known, key=lambda floor: abs(floor.value)).told(unit) if known else ""


def is_above(found: Estimate, floors: Sequence[Estimate]) -> bool | None:
    """Whether a number surely lies above the noise floors; None where intervals are withheld."""
    known = [floor for floor in floors if np.isfinite(floor.value)]
    if not found.is_bounded or not all(floor.is_bounded for floor in known):
        return None
    return found.lower > max([0.0, *(floor.upper for floor in known)])


def beside(found: Estimate, floors: Sequence[Estimate], unit: str) -> str:
    """How a number stands to the noise floors, as the end of a sentence."""
    told, surely = noise(floors, unit), is_above(found, floors)
    if not told:
        return "" if surely is not None else NO_INTERVALS
    if surely is None:
        return f"; noise floor {told}{NO_INTERVALS}"
    return f"; noise floor {told}" if surely else f", which noise ({told}) may explain"


def weight_sqnr(weights: xr.Dataset, *, recipe: str | None = None) -> str:
    """What the heat map of weights shows: the worst matrix that the recipe covers, or the worst recipe."""
    names = own_recipes(weights) if recipe is None else [recipe]
    worst = {name: found for name in names if (found := _worst_matrix(weights, name)) is not None}
    if not worst:
        return "No weight is covered by the recipe" if len(names) == 1 else "No weight is covered by any of the recipes"
    if len(worst) == 1:
        ((name, (value, where, median)),) = worst.items()
        if not np.isfinite(value):
            return f"{short(name)} represents every weight that it covers exactly"
        return (
            f"Under {short(name)} the median matrix keeps {median:.1f}\u00a0dB; the worst, {where}, {value:.1f}\u00a0dB"
        )
    lowest, highest = (pick(worst, key=lambda name: worst[name][0]) for pick in (min, max))
    return (
        f"The worst matrix keeps {worst[lowest][0]:.1f}\u00a0dB under {short(lowest)} ({worst[lowest][1]}) and "
        f"{worst[highest][0]:.1f}\u00a0dB under {short(highest)}"
    )


def _worst_matrix(weights: xr.Dataset, recipe: str) -> tuple[float, str, float] | None:
    """Lowest SQNR that a recipe leaves to what it covers, where that is, and the median; None if it covers nothing."""
    own = weights.sel(recipe=recipe)
    values = own["sqnr"].where(own["covered"]).transpose("layer", "module", "expert").values.astype(float)
    if np.isnan(values).all():
        return None
    layer, module, expert = np.unravel_index(int(np.nanargmin(values)), values.shape)
    name = str(own["module"].values[module])
    of_expert = f" of expert {int(own['expert'][expert])}" if name.startswith("experts.") else ""
    where = f"{name}{of_expert} in {layer_name(own, int(own['layer'][layer]))}"
    return float(values[layer, module, expert]), where, float(np.nanmedian(values))


def drift_by_layer(drift: xr.Dataset, *, site: str = "residual", measure: str = "sqnr") -> str:
    """What the figure of drift shows: the last layer, the recipes furthest from BF16 and nearest to it, the floors."""
    own = drift[measure].sel(site=site, mode="accumulated")
    what = SITES.get(site, f"the output of the {site.replace('_', ' ')}")
    layers = np.flatnonzero(own.sel(recipe=own_recipes(drift)).notnull().any("recipe").values)
    if not len(layers):
        return f"Nothing is known of how far FP8 takes {what}"
    last = own.isel(layer=int(layers[-1]))
    values = {name: float(last.sel(recipe=name)) for name in recipe_names(drift)}
    sign = 1 if measure == "relative_error" else -1
    error = {name: sign * value for name, value in values.items() if not np.isnan(value)}
    found = [name for name in own_recipes(drift) if name in error]
    worst, best = (pick(found, key=lambda name: error[name]) for pick in (max, min))
    text = f"In {layer_name(drift, int(last['layer']))} {short(worst)} leaves {what} {_drifted(values[worst], measure)}"
    if error[best] < error[worst]:
        text += f", {short(best)} {_drifted(values[best], measure, again=True)}"
    if floors := [name for name in FLOORS if name in error]:
        noisy = max(floors, key=lambda name: error[name])
        text += f"; BF16's own noise {_drifted(values[noisy], measure, again=True)}"
        if error[worst] <= error[noisy]:
            text += ", no less"
    return text


def _drifted(value: float, measure: str, *, again: bool = False) -> str:
    """How far a stream is from BF16; ``again`` leaves out what the sentence has said before."""
    if measure == "sqnr":
        if np.isposinf(value):
            return "without a difference"
        return f"{digits(value)}\u00a0dB" if again else f"an SQNR of {digits(value)}\u00a0dB"
    if measure == "relative_error":
        return f"{percent(value)}" if again else f"{percent(value)} off"
    return f"{value:.4f}" if again else f"a cosine of {value:.4f} to BF16"


def flips_by_layer(result: xr.Dataset) -> str:
    """What the figure of flips by layer shows, from ``flip_share``: the layer and the recipe with most of them."""
    at = _largest(result, "flip_share", "layer")
    if at is None:
        return "No routing was compared"
    recipe, layer = at
    found, floors = _with_floors(result.isel(layer=layer), recipe, "flip_share")
    if found.value == 0:
        return "No recipe sends a token to another expert"
    where = layer_name(result, int(result["layer"][layer]))
    text = f"{short(recipe)} sends {found.told('1')} of the tokens in {where} to other experts"
    most = ", more than elsewhere" if result.sizes["layer"] > 1 else ""
    return text + most + beside(found, floors, "1")


def flips_by_domain(result: xr.Dataset) -> str:
    """What the figure of flips by domain shows, from ``flip_share`` by "domain", pooled."""
    (dim,) = (str(dim) for dim in result["flip_share"].dims if dim != "recipe")
    at = _largest(result, "flip_share", dim)
    if at is None:
        return "No routing was compared"
    recipe, row = at
    found, floors = _with_floors(result.isel({dim: row}), recipe, "flip_share")
    if found.value == 0:
        return "No recipe sends a token to another expert"
    name = short(str(result[dim].values[row]))
    text = f"{short(recipe)} changes {found.told('1')} of the routing in “{name}”"
    most = ", more than elsewhere" if result.sizes[dim] > 1 else ""
    return text + most + beside(found, floors, "1")


def flips_by_margin(result: xr.Dataset) -> str:
    """What the figure of flips by margin shows, from ``flips_by_margin``: the closest decisions and the surest."""
    bins = np.flatnonzero(result["n_decisions"].values > 0)
    names = own_recipes(result)
    if not len(bins) or not names:
        return "No margin is defined: every expert is chosen, or nothing was compared"
    first, last = (result.isel(margin_bin=int(at)) for at in (bins[0], bins[-1]))
    worst = max(names, key=lambda name: float(first["flip_share"].sel(recipe=name)))
    close, floors = _with_floors(first, worst, "flip_share")
    edge = digits(float(first["margin_to"]))
    text = f"{short(worst)} flips {close.told('1')} of the decisions closer than {edge}\u00a0logits"
    if len(bins) > 1:
        sure = percent(float(last["flip_share"].sel(recipe=worst)))
        text += f", {sure} of those above {digits(float(last['margin_from']))}"
    return text + beside(close, floors, "1")


def sensitivity(result: xr.Dataset, *, measure: str = "loss_change") -> str:
    """What the figure of sensitivity shows, from ``sensitivity``: the part that costs most alone."""
    kinds, covered = (result[name].values for name in ("unit_kind", "covered"))
    alone = result.sel(setting="alone")
    unit, words = UNITS[measure], MEASURES[measure]
    floors = [estimate(alone.isel(unit=at), measure) for at in np.flatnonzero(kinds == "floor")]
    text = []
    for kind in ("module", "layer"):
        at = np.flatnonzero((kinds == kind) & covered & alone[measure].notnull().values)
        if not len(at):
            continue
        most = int(at[int(alone[measure].values[at].argmax())])
        text.append((str(result["unit"].values[most]).replace("_", " "), estimate(alone.isel(unit=most), measure)))
    if not text:
        return "Nothing that the recipe covers could be measured"
    if all(is_above(found, floors) is False for _, found in text):
        return f"No part alone brings a {words} that noise ({noise(floors, unit)}) could not explain"
    whole = alone.isel(unit=np.flatnonzero(kinds == "whole"))
    parts = " and ".join(f"{name} ({found.told(unit, sign=measure == 'loss_change')})" for name, found in text)
    of_whole = ""
    if whole.sizes["unit"] and np.isfinite(float(whole[measure][0])):
        of_whole = f"; all at once {digits(float(whole[measure][0]) * (100 if unit == '1' else 1))}"
        of_whole += "\u00a0%" if unit == "1" else f"\u00a0{unit}"
    behind = f"{of_whole}{beside(text[0][1], floors, unit)}"
    return f"Of what the recipe rounds, {parts} alone bring the largest {words}{behind}"


def loss_change(result: xr.Dataset, *, measure: str = "loss_change") -> str:
    """What the figure of losses shows, from ``loss_change``: the recipe that costs most, and whether noise may too."""
    names = [name for name in own_recipes(result) if np.isfinite(float(result[measure].sel(recipe=name)))]
    if not names:
        return NO_OUTPUT
    found = {name: _with_floors(result, name, measure) for name in names}
    surely = {name: _is_worse(*found[name], measure) for name in names}
    told = [name for name in names if surely[name]] or names
    worst = max(told, key=lambda name: _sign(measure) * found[name][0].value)
    return _cost_told(short(worst), *found[worst], measure, surely[worst])


def loss_by_domain(result: xr.Dataset, *, measure: str = "loss_change") -> str:
    """What the figure of losses by domain shows, from ``loss_by_domain``: the recipe and the domain that lose most."""
    names = own_recipes(result)
    cost = _sign(measure) * result[measure].sel(recipe=names).transpose("recipe", "domain").values.astype(float)
    cells = [(int(recipe), int(domain)) for recipe, domain in np.argwhere(np.isfinite(cost))]
    if not cells:
        return NO_OUTPUT
    found = {cell: _with_floors(result.isel(domain=cell[1]), names[cell[0]], measure) for cell in cells}
    surely = {cell: _is_worse(*found[cell], measure) for cell in cells}
    told = [cell for cell in cells if surely[cell]] or cells
    worst = max(told, key=lambda cell: cost[cell])
    where = f"{short(names[worst[0]])} in “{short(str(result['domain'].values[worst[1]]))}”"
    return _cost_told(where, *found[worst], measure, surely[worst])


def _is_worse(found: Estimate, floors: Sequence[Estimate], measure: str) -> bool | None:
    """Whether a number is surely worse than the noise floors; None where intervals are withheld."""
    if measure != "top1_agreement":
        return is_above(found, floors)
    known = [floor for floor in floors if np.isfinite(floor.value)]
    if not found.is_bounded or not all(floor.is_bounded for floor in known):
        return None
    return found.upper < min([1.0, *(floor.lower for floor in known)])


def _cost_told(name: str, found: Estimate, floors: Sequence[Estimate], measure: str, surely: bool | None) -> str:
    """The sentence on the cost of one recipe."""
    unit, told = UNITS[measure], found.told(UNITS[measure], sign=measure == "loss_change")
    known = [floor for floor in floors if np.isfinite(floor.value)]
    if measure == "top1_agreement":
        floor = min(known, key=lambda floor: floor.value).told(unit) if known else ""
        text = f"agreement on the likeliest token is {told} under {name}"
    else:
        floor = noise(floors, unit)
        text = f"{name} brings a {MEASURES[measure]} of {told}"
    beside_floor = f"; noise floor {floor}" if floor else ""
    if surely is False:
        return f"Nothing that noise may not explain; the most: {text}{beside_floor}"
    return (
        text[0].upper() * (measure == "top1_agreement")
        + text[measure == "top1_agreement" :]
        + beside_floor
        + (NO_INTERVALS if surely is None else "")
    )


def _sign(measure: str) -> int:
    """1 for what grows with the damage, -1 for what shrinks."""
    return -1 if measure == "top1_agreement" else 1


def activation_amax(result: xr.Dataset, *, module: str) -> str:
    """What the heat map of activations shows: the layer whose experts differ most in what enters them."""
    own = result.sel(module=module)
    amax = own["amax"].transpose("layer", "expert").values.astype(float)
    used = np.where(amax > 0, amax, np.nan)
    rows = np.flatnonzero(np.isfinite(used).sum(axis=1) > 1)
    if not len(rows):
        return f"No layer sent tokens to several experts, so scales of {module} cannot be compared"
    spread = [np.nanmax(used[row]) / np.nanmin(used[row]) for row in rows]
    row = int(rows[int(np.argmax(spread))])
    most, least = int(np.nanargmax(used[row])), int(np.nanargmin(used[row]))
    expert = own["expert"].values
    return (
        f"What enters {module} differs up to {digits(float(max(spread)))}\u00a0× between experts: in "
        f"{layer_name(own, int(own['layer'][row]))} it reaches {digits(used[row, most])} for expert {expert[most]}, "
        f"{digits(used[row, least])} for expert {expert[least]}"
    )


def activation_percentiles(result: xr.Dataset, *, module: str) -> str:
    """What the figure of percentiles shows: the largest input, and how far it stands out from the rest."""
    own = result.sel(module=module).transpose("layer", "expert", ...)
    amax = own["amax"].values.astype(float)
    if not np.isfinite(amax).any():
        return f"Nothing entered {module}"
    layer, expert = np.unravel_index(int(np.nanargmax(amax)), amax.shape)
    most = own.isel(layer=int(layer), expert=int(expert))
    percentiles = most["percentile"].values
    usual = most.isel(percentile=int(np.flatnonzero(percentiles <= max(99, percentiles.min())).max()))
    return (
        f"Inputs of {module} reach {digits(float(most['amax']))} in {layer_name(own, int(most['layer']))}, where "
        f"{float(usual['percentile']):g}\u00a0% of them are at most {digits(float(usual['magnitude']))}"
    )


def activation_loss(result: xr.Dataset, *, measure: str = "saturation") -> str:
    """What the figure of saturation, or of underflow, shows: the recipe, matrix and layer with most of it."""
    verb = {"saturation": "saturates", "underflow": "becomes 0"}[measure]
    values = result[measure].transpose("recipe", "layer", "module", "expert").values.astype(float)
    if not np.isfinite(values).any():
        return "No recipe rounds activations"
    recipe, layer, module, expert = np.unravel_index(int(np.nanargmax(values)), values.shape)
    value, name = float(values[recipe, layer, module, expert]), str(result["module"].values[module])
    if value == 0:
        return "No recipe saturates an input" if measure == "saturation" else "No recipe turns an input to 0"
    of_expert = f", expert {int(result['expert'][expert])}" if name.startswith("experts.") else ""
    where = f"{layer_name(result, int(result['layer'][layer]))}{of_expert}"
    return (
        f"Under {short(recipe_names(result)[recipe])} {percent(value)} of what enters {name} ({where}) {verb}, more "
        "than anywhere else"
    )


def _largest(result: xr.Dataset, name: str, dim: str) -> tuple[str, int] | None:
    """Recipe and place along ``dim`` of the largest number of a recipe that is no noise floor."""
    names = own_recipes(result)
    values = result[name].sel(recipe=names).transpose("recipe", dim).values.astype(float)
    if not values.size or np.isnan(values).all():
        return None
    recipe, at = np.unravel_index(int(np.nanargmax(values)), values.shape)
    return names[recipe], int(at)


def _with_floors(own: xr.Dataset, recipe: str, name: str) -> tuple[Estimate, list[Estimate]]:
    """A recipe's number and those of the noise floors, of a result (recipe,)."""
    floors = [floor for floor in FLOORS if floor in recipe_names(own)]
    return estimate(own.sel(recipe=recipe), name), [estimate(own.sel(recipe=floor), name) for floor in floors]
