"""Statistics in plain words: findings with their numbers and intervals, and titles that state what a figure shows.

Pure functions of results of :mod:`probe.routing_stats`. Naming the largest of many cells is a selection, so a finding's interval is
widened until it holds for all the cells that it was picked from at once (Bonferroni), and what does not stand out from its
null then is not a finding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
import xarray as xr

MIN_DOCUMENTS = 5
"""A domain with fewer documents makes no claim: a bootstrap over four documents says little."""

MIN_EXPECTED = 10
"""A transition for which independence would bring fewer tokens is left out of titles and figures: its lift is noise."""

MIN_FINDINGS = 3
MAX_FINDINGS = 6
MAX_OF_A_KIND = 2


@dataclass(frozen=True)
class Finding:
    """One sentence and what it rests on; ``headline`` is its main number, for the eye.

    ``value``, ``lower`` and ``upper`` are the number that stands in ``text`` with its interval, ``null`` what chance alone would give,
    in the same unit; ``strength`` is the log of the ratio between the near end of the interval and the null. ``anchor``
    names the figure, ``detail`` how the interval was made, ``where`` the layer, expert or domain.
    """

    kind: str
    headline: str
    text: str
    anchor: str
    value: float
    lower: float
    upper: float
    null: float | None
    strength: float
    detail: str = ""
    where: Mapping[str, int | str] = field(default_factory=dict)


def percent(share: float) -> str:
    """A share for people: 41 %, 4.1 %, 0.41 %."""
    return f"{_digits(100 * share)}\u00a0%"


def times(ratio: float) -> str:
    """A ratio for people: 12 ×, 6.2 ×, 0.61 ×."""
    return f"{_digits(ratio)}\u00a0×"


def interval(lower: float, upper: float, scale: float = 1) -> str:
    """An interval for people, such as [36, 46]."""
    return f"[{_digits(scale * lower)}, {_digits(scale * upper)}]"


def _digits(value: float) -> str:
    if not np.isfinite(value):
        return "?"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 9.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 0.995 else f"{value:.2f}" if size >= 0.0995 else f"{value:.2g}"


def widening(level: float, n_compared: int, n_documents: float | np.ndarray) -> np.ndarray:
    """By what factor an interval at ``level`` grows to hold for ``n_compared`` cells at once.

    Parameters
    ----------
    level : of the single interval.
    n_compared : how many cells were looked at.
    n_documents : how many documents each interval rests on.

    Notes
    -----
    Bonferroni: the ratio of the Student t quantile at 1 - (1 - level) / (2 n) with ``n_documents`` - 1 degrees of freedom to the normal
    one at 1 - (1 - level) / 2; t from its expansion in 1 / df, Abramowitz & Stegun 26.7.5.
    """
    tail = (1 - level) / 2
    z = NormalDist().inv_cdf(1 - tail / max(n_compared, 1))
    freedom = np.maximum(np.asarray(n_documents, float) - 1, 1)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return t / NormalDist().inv_cdf(1 - tail)


def specialized_cells(result: xr.Dataset) -> xr.Dataset:
    """Share and lift of every (domain, layer, expert) with intervals that hold for all of them at once.

    Parameters
    ----------
    result : from ``routing_stats.specialization``.

    Returns
    -------
    Dataset (domain, layer, expert): ``share``, ``lift``, their ``_lower`` and ``_upper``, and ``settled``, true where the interval
    of the lift excludes 1; attribute ``n_compared``. Intervals are widened on a log scale; NaN for a domain of fewer than
    5 documents.
    """
    enough = result["n_documents"] >= MIN_DOCUMENTS
    known = (result["lift_lower"].notnull() & result["lift_upper"].notnull() & enough).sum().item()
    factor = widening(result.attrs["level"], known, result["n_documents"])
    factor = xr.DataArray(factor, dims=result["n_documents"].dims).where(enough)
    columns: dict[str, xr.DataArray] = {}
    for name in ("share", "lift"):
        columns[name] = result[name]
        columns[f"{name}_lower"], columns[f"{name}_upper"] = _widened(
            result[name], result[f"{name}_lower"], result[f"{name}_upper"], factor
        )
    columns["share_upper"] = columns["share_upper"].clip(max=1)
    columns["settled"] = (columns["lift_lower"] > 1) | (columns["lift_upper"] < 1)
    return xr.Dataset(columns, attrs={"n_compared": known, "level": result.attrs["level"]})


def _widened(
    value: xr.DataArray, lower: xr.DataArray, upper: xr.DataArray, factor: xr.DataArray
) -> tuple[xr.DataArray, xr.DataArray]:
    """Both ends of an interval further from the value by a factor, on a log scale; an end at 0 stays there.

    Where nothing was seen (value 0) the upper end, itself a bound of the form c / n, grows in proportion.
    """
    positive = value.where(value > 0)
    low = positive * (lower / positive) ** factor
    high = positive * (upper / positive) ** factor
    return low.where(value > 0, lower), high.where(value > 0, upper * factor)


def find(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """The three to six strongest findings, the strongest first.

    Parameters
    ----------
    results : of ``routing_stats`` by name: ``load_interval``, ``imbalance``, ``margin`` and ``repetition``, and, where there is more than one domain,
        ``specialization``.

    Returns
    -------
    At least one: if nothing stands out from its null, that is said first. What describes without a null to compare with
    (the margins) comes last.
    """
    candidates = (*_preferences(results), *_uneven(results), *_unused(results), *_repeats(results))
    found: list[Finding] = []
    for candidate in sorted(candidates, key=lambda finding: -finding.strength):
        if sum(other.kind == candidate.kind for other in found) < MAX_OF_A_KIND:
            found.append(candidate)
    described = _certainty(results)
    found = found[: MAX_FINDINGS - len(described)] or [_nothing(results)]
    quiet = _quiet(results, {finding.kind for finding in found})
    return found + quiet[: max(MIN_FINDINGS - len(found) - len(described), 0)] + described


def _nothing(results: Mapping[str, xr.Dataset]) -> Finding:
    n_documents = int(results["load_interval"]["n_documents"])
    compared = "load, domains and repetition" if "specialization" in results else "load and repetition"
    text = f"Nothing stands out: in no layer do {compared} differ from chance by more than the intervals over {n_documents} documents allow."
    if n_documents < 2:
        text = "Nothing can be claimed: one document has no interval, as tokens of a document are not independent. Record more of them."
    return Finding(
        "nothing",
        "0",
        text,
        "imbalance",
        np.nan,
        np.nan,
        np.nan,
        None,
        0.0,
        "Intervals resample documents; with more documents smaller differences show.",
    )


def _quiet(results: Mapping[str, xr.Dataset], found: set[str]) -> list[Finding]:
    """What was looked at and did not stand out, with the nearest it came."""
    findings = []
    repeated = results["repetition"]
    lower = repeated["lower"] / repeated["null"]
    if "repetition" not in found and bool(lower.notnull().any()):
        cell = repeated.isel(layer=int(lower.argmax("layer")))
        value, low, high, null = (float(cell[name]) for name in ("repetition", "lower", "upper", "null"))
        findings.append(
            Finding(
                "quiet repetition",
                percent(value),
                f"Neighbouring tokens do not surely share an expert more often than independent ones in any layer; layer {int(cell['layer'])} "
                f"comes nearest with {percent(value)} {interval(low, high, 100)} against {percent(null)}.",
                "repetition",
                value,
                low,
                high,
                null,
                0.0,
                where={"layer": int(cell["layer"])},
            )
        )
    if "specialization" not in found and "specialization" in results:
        cells = specialized_cells(results["specialization"])
        n_compared = cells.attrs["n_compared"]
        if n_compared:
            text = f"No domain surely prefers an expert: of {n_compared:,} cells (domain, layer, expert) none has an interval above 1\u00a0×."
        else:
            text = f"Domains cannot be compared: none has {MIN_DOCUMENTS} documents."
        findings.append(Finding("quiet specialization", "0", text, "domains", 0.0, np.nan, np.nan, None, 0.0))
    return findings


def _preferences(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """For each domain the cell with the largest sure lift."""
    if "specialization" not in results:
        return []
    cells = specialized_cells(results["specialization"])
    findings = []
    for domain in cells["domain"].values:
        lower = cells["lift_lower"].sel(domain=domain).transpose("layer", "expert")
        if not bool((lower > 1).any()):
            continue
        row, column = np.unravel_index(int(np.nanargmax(lower.values)), lower.shape)
        cell = cells.sel(domain=domain).isel(layer=row, expert=column)
        layer, expert = int(cell["layer"]), int(cell["expert"])
        share, lift = (_triple(cell, name) for name in ("share", "lift"))
        findings.append(
            Finding(
                "specialization",
                times(lift[0]),
                f"Layer {layer} sends {percent(share[0])} {interval(*share[1:], scale=100)} of “{domain}” tokens to expert {expert}, "
                f"{times(lift[0])} {interval(*lift[1:])} its share overall.",
                "domains",
                *lift,
                1.0,
                float(np.log(lift[1])),
                f"Both intervals hold at {percent(cells.attrs['level'])} for all {cells.attrs['n_compared']:,} cells "
                "(domain, layer, expert) at once (Bonferroni), since the largest was picked.",
                {"domain": str(domain), "layer": layer, "expert": expert},
            )
        )
    return findings


def _log(ratio: xr.DataArray) -> xr.DataArray:
    """NaN where there is no ratio, or a ratio of 0: that is no evidence of an excess."""
    return np.log(ratio.where(ratio > 0))


def _triple(cell: xr.Dataset, name: str) -> tuple[float, float, float]:
    return float(cell[name]), float(cell[f"{name}_lower"]), float(cell[f"{name}_upper"])


def _uneven(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """The layer whose busiest expert is most surely above what a uniform router shows by chance."""
    result, load = results["imbalance"], results["load_interval"]
    value = 1 + result["max_violation"]
    reach = (result["max_violation"] - result["max_violation_lower"]) * _over_layers(result, load)
    lower, null = (value - reach).clip(min=1), 1 + result["max_violation_null_upper"]
    excess = _log(lower / null)
    if not bool((excess > 0).any()):
        return []
    at = int(excess.argmax("layer"))
    numbers = [float(part[at]) for part in (value, lower, value + reach)]
    layer, expert = int(result["layer"][at]), int(load["load"].isel(layer=at).argmax("expert"))
    return [
        Finding(
            "imbalance",
            times(numbers[0]),
            f"Layer {layer} is the least even: its busiest expert, {expert}, takes {times(numbers[0])} {interval(*numbers[1:])} an even share; "
            f"chance alone would stay below {float(null[at]):.2f}\u00a0×.",
            "imbalance",
            numbers[0],
            numbers[1],
            numbers[2],
            float(null[at]),
            float(excess[at]),
            f"The interval holds for all {result.sizes['layer']} layers at once; chance: 97.5 % of uniform routers, independent tokens.",
            {"layer": layer, "expert": expert},
        )
    ]


def _over_layers(result: xr.Dataset, load: xr.Dataset) -> float:
    """How much wider the interval of one layer must be to hold for all layers."""
    return float(widening(result.attrs["level"], result.sizes["layer"], float(load["n_documents"])))


def _unused(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """The layer with the most experts that no token went to."""
    load = results["load_interval"].transpose("layer", "expert", ...)
    unused = (load["load"] == 0).sum("expert")
    if int(unused.max()) == 0:
        return []
    at = int(unused.argmax("layer"))
    layer, number, even = int(load["layer"][at]), int(unused[at]), 1 / load.sizes["expert"]
    upper = float(load["upper"].isel(layer=at).where(load["load"].isel(layer=at) == 0).max())
    if not upper < even:
        return []
    total = int(unused.sum())
    elsewhere = f" ({total:,} in all layers together)" if total > number else ""
    took = "expert" if number == 1 else "experts"
    return [
        Finding(
            "unused",
            f"{number} of {load.sizes['expert']}",
            f"In layer {layer}, {number} of {load.sizes['expert']} {took} got no token at all{elsewhere}; "
            f"the load of each is at most {percent(upper)}, where an even share is {percent(even)}.",
            "load",
            0.0,
            0.0,
            upper,
            even,
            float(np.log(even / upper)),
            "Rule of three on the effective number of tokens: an unused expert is not proven dead.",
            {"layer": layer},
        )
    ]


def _repeats(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """The layer whose neighbouring tokens share an expert most surely more, or less, often than independent ones."""
    result = results["repetition"]
    factor = xr.DataArray(_over_layers(result, results["load_interval"]))
    lower, upper = _widened(result["repetition"], result["lower"], result["upper"], factor)
    excess = np.fmax(_log(lower / result["null"]), _log(result["null"] / upper))
    if not bool((excess > 0).any()):
        return []
    at = int(excess.argmax("layer"))
    value, low, high, null = (float(part[at]) for part in (result["repetition"], lower, upper, result["null"]))
    layer = int(result["layer"][at])
    return [
        Finding(
            "repetition",
            percent(value),
            f"In layer {layer} a token goes to the same expert as the one before it {percent(value)} {interval(low, high, 100)} of the time; "
            f"independent tokens would {percent(null)}.",
            "repetition",
            value,
            low,
            min(high, 1.0),
            null,
            float(excess[at]),
            f"The interval holds for all {result.sizes['layer']} layers at once.",
            {"layer": layer},
        )
    ]


def _certainty(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """Where the router is least sure; a description, as a margin has no null."""
    quantiles = results["margin"]["margin"].transpose("layer", "quantile").values
    if not np.isfinite(quantiles).any():
        return []
    at = int(np.nanargmin(quantiles[:, 2]))
    low, first, middle, _, high = (float(value) for value in quantiles[at])
    layer = int(results["margin"]["layer"][at])
    return [
        Finding(
            "margin",
            f"{_digits(middle)} logits",
            f"The router is least sure in layer {layer}: the median margin is {_digits(middle)}\u00a0logits "
            f"(90\u00a0% of decisions: {interval(low, high)}), and a quarter are within {_digits(first)}.",
            "margins",
            middle,
            low,
            high,
            None,
            0.0,
            "The range is that of the decisions, not an uncertainty.",
            {"layer": layer},
        )
    ]


def enough_expected(result: xr.Dataset, least: int = MIN_EXPECTED) -> xr.DataArray:
    """Where independence would bring at least ``least`` tokens, (layer, expert, next_expert) of a transition."""
    count = result["count"]
    total = count.sum(["expert", "next_expert"])
    return count.sum("next_expert") * count.sum("expert") >= least * total


# --- titles -----------------------------------------------------------------------------------------------------------


def layers_in_words(layers: list[int], n_layers: int) -> str:
    """Which layers, for a sentence: "layers 5 and 6", "every layer", "11 of 48 layers"."""
    if len(layers) == n_layers:
        return "every layer" if n_layers > 1 else f"layer {layers[0]}"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) <= 3:
        return f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
    return f"{len(layers)} of {n_layers} layers"


def load_title(result: xr.Dataset) -> str:
    """What the heatmap of load shows, from ``load_interval``."""
    load = result["load"].transpose("layer", "expert")
    ratio, lower = (part.transpose("layer", "expert").values * load.sizes["expert"] for part in (load, result["lower"]))
    if not (lower > 1).any():
        return "No expert is surely busier than an even share"
    row, column = np.unravel_index(int(np.nanargmax(ratio)), ratio.shape)
    return (
        f"The busiest expert of all is number {int(load['expert'][column])} of layer {int(load['layer'][row])}, "
        f"at {times(ratio[row, column])} an even share"
    )


def imbalance_title(result: xr.Dataset) -> str:
    """What the figure of imbalance shows, from ``imbalance``."""
    above = result["max_violation_lower"] > result["max_violation_null_upper"]
    layers = [int(layer) for layer in result["layer"].values[above.values]]
    if result["max_violation_lower"].isnull().all():
        return "One document alone cannot say whether a layer is less even than chance"
    if not layers:
        return "No layer is surely less even than chance would make it"
    verb = "are" if 1 < len(layers) < result.sizes["layer"] else "is"
    words = layers_in_words(layers, result.sizes["layer"])
    return f"{words[0].upper()}{words[1:]} {verb} less even than chance would make {'them' if verb == 'are' else 'it'}"


def specialization_title(cells: xr.Dataset) -> str:
    """What the heatmaps of domains show, from :func:`specialized_cells`."""
    n_compared, n_settled = int(cells.attrs["n_compared"]), int(cells["settled"].sum())
    if not n_compared:
        return "Too few documents in each domain to tell the domains apart"
    if not n_settled:
        return "No domain surely prefers an expert"
    by_domain = cells["settled"].sum(["layer", "expert"])
    most = str(cells["domain"].values[int(by_domain.argmax("domain"))])
    return f"“{most}” has the most distinct taste; {percent(n_settled / n_compared)} of all cells surely differ from the overall load"


def margin_title(result: xr.Dataset) -> str:
    """What the figure of margins shows, from ``margin``."""
    middle = result["margin"].transpose("layer", "quantile").values[:, 2]
    if not np.isfinite(middle).any():
        return "Every expert is chosen, so there is no margin"
    least, most = int(np.nanargmin(middle)), int(np.nanargmax(middle))
    if least == most:
        return f"Half of the decisions are closer than {_digits(middle[least])} logits"
    layers = result["layer"].values
    return (
        f"The router is surest in layer {layers[most]} (median margin {_digits(middle[most])} logits) "
        f"and least sure in layer {layers[least]} ({_digits(middle[least])})"
    )


def transition_title(result: xr.Dataset) -> str:
    """What the heatmaps of transitions show, from ``transition``."""
    lift = result["lift"].where(enough_expected(result)).transpose("layer", "expert", "next_expert")
    if not np.isfinite(lift.values).any():
        return "Too few tokens to see how one layer's expert leads to the next"
    at = np.unravel_index(int(np.nanargmax(lift.values)), lift.shape)
    cell = result.transpose("layer", "expert", "next_expert").isel(layer=at[0], expert=at[1], next_expert=at[2])
    return (
        f"{percent(float(cell['probability']))} of the tokens at layer {int(cell['layer'])}'s expert {int(cell['expert'])} go on to "
        f"layer {int(cell['next_layer'])}'s expert {int(cell['next_expert'])}, {times(float(cell['lift']))} what independence gives"
    )


def repetition_title(result: xr.Dataset) -> str:
    """What the figure of repetition shows, from ``repetition``."""
    above = (result["lower"] > result["null"]).values
    layers = [int(layer) for layer in result["layer"].values[above]]
    if not layers:
        return "In no layer do neighbouring tokens surely share an expert more often than chance"
    return f"Neighbouring tokens share an expert more often than chance in {layers_in_words(layers, result.sizes['layer'])}"
