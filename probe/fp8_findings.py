"""What an FP8 study says in plain words: does the routing flip, what it costs, and what should stay in BF16.

Only what stands out from the noise floors, and whose intervals say so, is called a difference. A recipe and the floors
are run on the same texts, so that two intervals that do not meet are more than is needed: nothing is claimed too soon.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import xarray as xr

from probe import fp8_titles as titles
from probe.bootstrap import MIN_DOCUMENTS
from probe.findings import Finding, digits, percent, times, widening
from probe.fp8_titles import FLOORS, Estimate, estimate, layer_name, own_recipes

Results = Mapping[str, xr.Dataset]

TOO_FEW = "too few documents to tell these apart"

SINGLE_EXPERT = ("experts.gate_up_proj", "experts.down_proj")
"""The matrices of which every expert has its own, and sees its own tokens only."""


def against_floors(own: Estimate, floors: Sequence[Estimate]) -> str:
    """How a number that grows with the damage stands to the noise floors.

    Returns
    -------
    "above" or "below" where its interval and that of the highest floor do not meet, "inside" where they do, "unknown"
    where an interval is withheld or there is no floor.
    """
    if not floors or not all(one.is_bounded for one in (own, *floors)):
        return "unknown"
    if own.lower > max(floor.upper for floor in floors):
        return "above"
    return "below" if own.upper < max(floor.lower for floor in floors) else "inside"


class Spared(NamedTuple):
    """A part that stays in BF16 while a recipe quantises all else.

    ``gone`` is the share of the recipe's damage that is gone then, ``at_least`` its lower bound, ``weights`` the part's
    share of the weights that the recipe quantises.
    """

    unit: str
    gone: float
    at_least: float
    weights: float


def damage(result: xr.Dataset) -> str:
    """Which number of ``/fp8_sensitivity`` stands for the damage: KL, or flips in a model without an output head."""
    return "logit_kl" if bool(result["logit_kl"].notnull().any()) else "flip_share"


def of_unit(result: xr.Dataset, unit: str, setting: str = "alone", *, measure: str | None = None) -> Estimate:
    """A number of one unit of ``/fp8_sensitivity``, the damage unless told otherwise."""
    return estimate(result.sel(unit=unit, setting=setting), measure or damage(result))


def worth_sparing(result: xr.Dataset) -> list[Spared]:
    """Parts that surely take damage away if they stay in BF16, the surest first.

    Parameters
    ----------
    result : ``/fp8_sensitivity``.

    Returns
    -------
    None where the whole recipe is inside the noise floors. A part is listed if the interval of the recipe without it
    lies below that of the whole recipe, both widened for all parts at once (Bonferroni). The same texts being in both,
    their difference is surer than that.
    """
    whole = of_unit(result, "everything")
    if against_floors(whole, [of_unit(result, floor) for floor in FLOORS]) != "above":
        return []
    units = parts_of(result)
    n_texts = int(result.attrs.get("n_texts", MIN_DOCUMENTS))
    factor = float(widening(float(result.attrs["level"]), len(units), n_texts))
    lowest = whole.value * (whole.lower / whole.value) ** factor
    total = int(result["n_weights"].sel(unit="everything"))
    found = []
    for unit in units:
        rest = of_unit(result, unit, "spared")
        if not rest.value > 0:
            continue
        highest = rest.value * (rest.upper / rest.value) ** factor
        if highest < lowest:
            share = int(result["n_weights"].sel(unit=unit)) / total
            found.append(Spared(unit, 1 - rest.value / whole.value, 1 - highest / lowest, share))
    return sorted(found, key=lambda part: -part.at_least)


def best_bargain(result: xr.Dataset) -> Spared | None:
    """The part that surely takes away most damage, of those that surely cost more than their share of the weights."""
    return next((part for part in worth_sparing(result) if part.at_least > part.weights), None)


def parts_of(result: xr.Dataset) -> list[str]:
    """Kinds of modules and layers that a recipe covers: not what is the whole recipe."""
    is_part = result["covered"] & result["unit_kind"].isin(["module", "layer"])
    is_part &= result["n_weights"] < result["n_weights"].sel(unit="everything")
    return [str(unit) for unit in result["unit"].values[is_part.values]]


def harmless(result: xr.Dataset) -> list[str]:
    """Parts that the recipe leaves in BF16 and that would cost surely less than the noise floors do."""
    floors = [of_unit(result, floor) for floor in FLOORS]
    is_free = ~result["covered"] & result["unit_kind"].isin(["module", "layer"]) & (result["n_weights"] > 0)
    units = [str(unit) for unit in result["unit"].values[is_free.values]]
    return [unit for unit in units if against_floors(of_unit(result, unit), floors) == "below"]


def spread_of_experts(result: xr.Dataset, module: str) -> tuple[int, float, float] | None:
    """The layer whose experts' inputs differ most, of ``/fp8_activations``.

    Returns
    -------
    Place of the layer, its largest amax of an expert over its smallest, and the same of the largest percentile that is
    known of all experts; None where no layer sent tokens to two experts.
    """
    own = result.sel(module=module)
    ratios = [ratio_of_experts(values.transpose("layer", "expert").values) for values in (own["amax"], typical(own))]
    if np.isnan(ratios[0]).all():
        return None
    at = int(np.nanargmax(ratios[0]))
    return at, float(ratios[0][at]), float(ratios[1][at])


def typical(own: xr.Dataset) -> xr.DataArray:
    """99 of 100 magnitudes are no larger: unlike an amax, this does not grow with the tokens that an expert saw."""
    return own["magnitude"].sel(percentile=99)


def ratio_of_experts(values: np.ndarray) -> np.ndarray:
    """Largest over smallest positive value of each row, NaN where it has fewer than two."""
    positive = np.where(values > 0, values, np.nan).astype(float)
    result = np.full(len(positive), np.nan)
    for at, row in enumerate(positive):
        if np.isfinite(row).sum() > 1:
            result[at] = np.nanmax(row) / np.nanmin(row)
    return result


# --- sentences --------------------------------------------------------------------------------------------------------


def answer(result: xr.Dataset) -> str:
    """Does FP8 flip the routing? From ``flip_share`` of all layers together, with numbers."""
    own, floors = _with_floors(result, "flip_share")
    noise = _largest(floors).told("1")
    if not own:
        return f"Two runs in BF16 flip {noise} of the routing; no recipe was tried"
    stands = {name: against_floors(one, floors) for name, one in own.items()}
    told = {name: f"{one.told('1')} under {name}" for name, one in own.items()}
    if "unknown" in stands.values():
        return f"{_listed(told.values())} of the routing flips, {noise} in BF16 itself: {TOO_FEW}"
    above = [told[name] for name in own if stands[name] == "above"]
    rest = [told[name] for name in own if stands[name] != "above"]
    if above:
        inside = f"; {_listed(rest)} is within that noise" if rest else ""
        return f"Rounding flips the routing: {_listed(above)}, BF16 itself only {noise}{inside}"
    if set(stands.values()) == {"below"}:
        return f"Rounding flips the routing no more than noise: {_listed(rest)}, less than the {noise} of BF16 itself"
    return f"Rounding is not seen to flip the routing: {_listed(rest)}, not told from the {noise} of BF16 itself"


def layers_above(result: xr.Dataset) -> list[str]:
    """Layers in which a recipe flips surely more than both noise floors, in words, from ``flip_share``."""
    told = []
    for name in own_recipes(result):
        above = []
        for layer in result["layer"].values:
            own, floors = _with_floors(result.sel(layer=layer), "flip_share")
            if against_floors(own[name], floors) == "above":
                above.append(layer_name(result, int(layer)).removeprefix("layer "))
        if len(above) == result.sizes["layer"] > 1:
            told.append(f"{name} in every layer")
        elif above:
            told.append(f"{name} in layer{'s' * (len(above) > 1)} {_listed(above)}")
    return told


def output(result: xr.Dataset) -> str:
    """What FP8 does to the output, from ``loss_change``: of the recipe that moves it most."""
    own, floors = _with_floors(result, "logit_kl")
    known = {name: one for name, one in own.items() if np.isfinite(one.value)}
    if not known:
        return "Nothing is known of the output: the model has no output head, or no recipe was tried"
    worst = max(known, key=lambda name: known[name].value)
    most = "at most " if len(known) > 1 else ""
    return (
        f"The next token's KL is {most}{known[worst].told('nat')} under {worst}, {_beside(known[worst], floors, 'nat')}"
    )


def spare(result: xr.Dataset) -> str:
    """What a quantiser should do, from ``/fp8_sensitivity``; claims only what stands out from the noise floors."""
    recipe = spared_recipe(result)
    name, unit = {"logit_kl": "KL", "flip_share": "flips"}[damage(result)], titles.UNITS[damage(result)]
    whole, floors = of_unit(result, "everything"), [of_unit(result, floor) for floor in FLOORS]
    stands = against_floors(whole, floors)
    if stands == "unknown":
        return f"Which part of {recipe} costs most is not known: too few documents for intervals"
    if stands != "above":
        beside = _beside(whole, floors, unit)
        return f"No part of {recipe} needs to stay in BF16: its whole damage is {name} {whole.told(unit)}, {beside}"
    found, bargain = worth_sparing(result), best_bargain(result)
    if bargain:
        return (
            f"Keep {named(bargain.unit)} in BF16: {percent(bargain.gone)} of the damage is gone (surely "
            f"{percent(bargain.at_least)} or more), for {percent(bargain.weights)} of the weights that {recipe} "
            "quantises"
        )
    if found:
        return (
            f"No part surely costs more than its share of the weights: without {named(found[0].unit)} "
            f"{percent(found[0].gone)} of the damage is gone, at {percent(found[0].weights)} of the weights that "
            f"{recipe} quantises"
        )
    return f"The damage of {recipe} is spread: no part surely takes a share of it away by staying in BF16"


def _beside(own: Estimate, floors: Sequence[Estimate], unit: str) -> str:
    """How a number stands to the larger noise floor, as the end of a sentence."""
    noise = _largest(floors).told(unit)
    return {
        "above": f"above the {noise} of BF16 itself",
        "below": f"below the {noise} of BF16 itself",
        "inside": f"not told from the {noise} of BF16 itself",
        "unknown": f"{noise} in BF16 itself: {TOO_FEW}",
    }[against_floors(own, floors)]


def experts_differ(result: xr.Dataset, module: str) -> str:
    """Whether experts see activations of different scale, from ``/fp8_activations``."""
    found = spread_of_experts(result, module)
    if found is None:
        return f"No layer sent tokens to two experts, so their inputs cannot be compared ({module})"
    at, largest, typical = found
    where = layer_name(result, int(result["layer"][at]))
    text = f"In {where} the largest input of {module} is {times(largest)} that of another expert"
    return f"{text}; the 99th percentiles differ by {times(typical)}" if np.isfinite(typical) else text


def _with_floors(result: xr.Dataset, name: str) -> tuple[dict[str, Estimate], list[Estimate]]:
    """The number of every recipe, and those of the noise floors."""
    floors = [floor for floor in FLOORS if floor in result["recipe"].values]
    found = {recipe: estimate(result.sel(recipe=recipe), name) for recipe in (*own_recipes(result), *floors)}
    return {recipe: found[recipe] for recipe in own_recipes(result)}, [found[floor] for floor in floors]


def _largest(found: Sequence[Estimate]) -> Estimate:
    """The largest of some numbers, unknown where there is none."""
    return max(found, key=lambda one: np.nan_to_num(one.value), default=Estimate(np.nan))


def _listed(told: Iterable[str]) -> str:
    parts = list(told)
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def named(unit: str) -> str:
    """A part in words: routed experts, layer 3."""
    return unit.replace("_", " ")


def find(results: Results) -> list[Finding]:
    """What stands at the top of the page: the answer first, then what a quantiser asks next."""
    found = []
    if "fp8_flips" in results:
        text = answer(results["fp8_flips"])
        if above := layers_above(results["fp8_flips_by_layer"]):
            text += f". Beyond noise in single layers: {_listed(above)}"
        found.append(_finding("flips", text, "fp8", results["fp8_flips"], "flip_share"))
    if "fp8_flips_by_margin" in results and (close := _close_calls(results["fp8_flips_by_margin"])):
        found.append(close)
    if "fp8_loss" in results:
        found.append(_finding("output", output(results["fp8_loss"]), "fp8-output", results["fp8_loss"], "logit_kl"))
    if "fp8_sensitivity" in results:
        found.append(_spare_finding(results["fp8_sensitivity"]))
    if "fp8_weights" in results:
        found.append(_weights_finding(results["fp8_weights"]))
    if "fp8_activations" in results and (wide := _activation_finding(results["fp8_activations"])):
        found.append(wide)
    return found


def _finding(kind: str, text: str, anchor: str, result: xr.Dataset, name: str) -> Finding:
    """A sentence on a number of all recipes, headed by the largest."""
    own, floors = _with_floors(result, name)
    unit = titles.UNITS[name]
    known = [one for one in own.values() if np.isfinite(one.value)]
    if not known:
        return Finding(kind, "–", f"{text}.", anchor, np.nan, np.nan, np.nan, None, 0.0)
    worst = _largest(known)
    headline = percent(worst.value) if unit == "1" else f"{digits(worst.value)} {unit}"
    detail = (
        "A recipe stands out where its interval does not meet that of the larger noise floor; both are run on the same "
        "texts, so that their difference is surer than two such intervals say."
    )
    null = _largest(floors).value if floors else None
    return Finding(kind, headline, f"{text}.", anchor, *worst, null, 0.0, detail)


def _close_calls(result: xr.Dataset) -> Finding | None:
    """Below which margin nine of ten flips happen, under the recipe with most of them."""
    own = {name: result.sel(recipe=name) for name in own_recipes(result)}
    flipped = {name: np.nan_to_num((one["flip_share"] * one["n_decisions"]).values) for name, one in own.items()}
    if not own or not max(counts.sum() for counts in flipped.values()):
        return None
    name = max(own, key=lambda recipe: flipped[recipe].sum())
    counts, decisions = flipped[name], result["n_decisions"].values
    at = int(np.argmax(counts.cumsum() >= 0.9 * counts.sum()))
    edge, share = float(result["margin_to"][at]), decisions[: at + 1].sum() / decisions.sum()
    of_flips = counts[: at + 1].sum() / counts.sum()
    text = (
        f"Close calls flip: {percent(of_flips)} of the flips under {name} happen at margins below {digits(edge)}\u00a0"
        f"logits, where {percent(share)} of the decisions are."
    )
    detail = "A description of these texts, without an interval."
    headline = f"<\u00a0{digits(edge)}"
    return Finding("margins", headline, text, "fp8-margins", of_flips, np.nan, np.nan, share, 0.0, detail)


def _spare_finding(result: xr.Dataset) -> Finding:
    best = best_bargain(result)
    detail = (
        "Damage is the KL of the next token. The intervals with and without the part are widened for all parts at once "
        "(Bonferroni); what is surely gone is what lies between their near ends."
    )
    gone, at_least, null = (best.gone, best.at_least, best.weights) if best else (np.nan, np.nan, None)
    headline, text = f"−{percent(gone)}" if best else "none", f"{spare(result)}."
    return Finding("sensitivity", headline, text, "fp8-sensitivity", gone, at_least, np.nan, null, 0.0, detail)


def _weights_finding(result: xr.Dataset) -> Finding:
    worst = float(result["sqnr"].where(result["covered"]).min())
    headline = f"{digits(worst)} dB" if np.isfinite(worst) else "–"
    text = f"{titles.weight_sqnr(result)}."
    return Finding("weights", headline, text, "fp8-weights", worst, np.nan, np.nan, None, 0.0)


def _activation_finding(result: xr.Dataset) -> Finding | None:
    found = {module: spread for module in SINGLE_EXPERT if (spread := spread_of_experts(result, module)) is not None}
    if not found:
        return None
    module = max(found, key=lambda name: found[name][1])
    text = f"{experts_differ(result, module)}."
    detail = "A description of these texts, without an interval; an amax grows with the tokens that an expert saw."
    numbers = (found[module][1], np.nan, np.nan, 1.0)
    return Finding("activations", times(found[module][1]), text, "fp8-activations", *numbers, 0.0, detail)


def spared_recipe(result: xr.Dataset) -> str:
    """Name of the recipe whose sensitivity was measured."""
    return next(iter(json.loads(str(result.attrs.get("recipes", "{}")))), "the recipe")
