"""Statistics in plain words: sentences, each with its number, its interval and the figure that shows it.

Pure functions of results of :mod:`probe.routing_stats`. Naming the largest of many cells is a selection, so a finding's
interval is widened until it holds for all the cells that it was picked from at once (Bonferroni), or its p-value holds
for all of them (max-T), and what does not stand out from its null then is not a finding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import xarray as xr
from scipy.special import stdtrit

from probe.bootstrap import MIN_DOCUMENTS

MIN_EXPECTED = 10
"""A transition for which independence would bring fewer tokens is left out of titles and figures: its lift is noise."""

SMALLEST_LIFT = 1.05
"""The lower bound of a lift that a sentence is made of: less would read as 1.0."""

MIN_FINDINGS = 3
MAX_FINDINGS = 6
MAX_OF_A_KIND = 2


@dataclass(frozen=True)
class Finding:
    """One sentence and what it rests on; ``headline`` is its main number, for the eye.

    ``value``, ``lower`` and ``upper`` are the number that stands in ``text`` with its interval, ``null`` what chance
    alone would give, in the same unit; ``strength`` is the log of the ratio between the near end of the interval and
    the null. ``anchor`` names the figure, ``detail`` how the interval was made, ``where`` the layer, expert or domain.
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


def counted(number: int, thing: str) -> str:
    """How many of a thing, for people: 1 token, 1,024 tokens."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """A share for people: 41 %, 4.1 %, 0.41 %."""
    return f"{digits(100 * share)}\u00a0%"


def times(ratio: float) -> str:
    """A ratio for people: 12 ×, 6.2 ×, 0.61 ×."""
    return f"{digits(ratio)}\u00a0×"


def interval(lower: float, upper: float, scale: float = 1) -> str:
    """An interval for people, such as [36, 46]."""
    return f"[{digits(scale * lower)},\u00a0{digits(scale * upper)}]"


def digits(value: float) -> str:
    """A number for people: two digits that count, all of a whole number."""
    if not np.isfinite(value):
        return "?"
    if value == 0:
        return "0"
    size = abs(value)
    # Halves are rounded up, as the scripts of the report round them
    if size >= 9.95:
        return f"{Decimal(value).quantize(Decimal(1), ROUND_HALF_UP):,}"
    if size >= 0.0995:
        return str(Decimal(value).quantize(Decimal("0.1") if size >= 0.995 else Decimal("0.01"), ROUND_HALF_UP))
    return f"{value:.2g}"


def widening(level: float, n_compared: int, n_documents: float | np.ndarray) -> np.ndarray:
    """By what factor an interval at ``level`` grows to hold for ``n_compared`` cells at once.

    Parameters
    ----------
    level : of the single interval.
    n_compared : how many cells were looked at.
    n_documents : how many documents each interval rests on.

    Notes
    -----
    Bonferroni: the ratio of the Student t quantiles at 1 - (1 - level) / (2 n) and at 1 - (1 - level) / 2, both with
    ``n_documents`` - 1 degrees of freedom.
    """
    tail = (1 - level) / 2
    freedom = np.maximum(np.asarray(n_documents, float) - 1, 1)
    return stdtrit(freedom, 1 - tail / max(n_compared, 1)) / stdtrit(freedom, 1 - tail)


def specialized_cells(result: xr.Dataset) -> xr.Dataset:
    """Share and lift of every (domain, layer, expert) with intervals that hold for all of them at once.

    Parameters
    ----------
    result : from ``routing_stats.specialization``.

    Returns
    -------
    Dataset (domain, layer, expert): ``share``, ``lift``, their ``_lower`` and ``_upper``, and ``settled``, true where
    the domains would not differ so by chance (the p-value of the permutation test, which holds for all cells at once)
    and the cell's own interval excludes 1; attributes ``n_compared``, cells with an interval, and ``n_tested``, cells
    with a p-value. Intervals are widened on a log scale; NaN where they are withheld.
    """
    enough = result["n_documents"] >= MIN_DOCUMENTS
    known = (result["lift_lower"].notnull() & result["lift_upper"].notnull() & enough).sum().item()
    widened = widening(result.attrs["level"], known, result["n_documents"].values)
    factor = xr.DataArray(widened, dims=result["n_documents"].dims).where(enough)
    columns: dict[str, xr.DataArray] = {}
    for name in ("share", "lift"):
        columns[name] = result[name]
        columns[f"{name}_lower"], columns[f"{name}_upper"] = _widened(
            result[name], result[f"{name}_lower"], result[f"{name}_upper"], factor
        )
    columns["share_upper"] = columns["share_upper"].clip(max=1)
    columns["settled"] = (result["p_value"] < 1 - result.attrs["level"]) & (
        (result["lift_lower"] > 1) | (result["lift_upper"] < 1)
    )
    tested = int(result["p_value"].notnull().sum())
    return xr.Dataset(columns, attrs={"n_compared": known, "n_tested": tested, "level": result.attrs["level"]})


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
    results : of ``routing_stats`` by name: ``load_interval``, ``imbalance``, ``margin`` and ``repetition``; where
        there is more than one domain, ``specialization``; if wanted, ``mutual_information`` (label, layer); and
        ``attention_by_kind``, from ``attention_maps.by_kind``.

    Returns
    -------
    At least one: if nothing stands out from its null, that is said first. What describes without a null to compare with
    (attention, the margins) comes last.
    """
    candidates = (
        *_preferences(results),
        *_uneven(results),
        *_unused(results),
        *_repeats(results),
        *_explained(results),
    )
    found: list[Finding] = []
    for candidate in sorted(candidates, key=lambda finding: -finding.strength):
        if sum(other.kind == candidate.kind for other in found) < MAX_OF_A_KIND:
            found.append(candidate)
    described = [*_attention(results), *_certainty(results)]
    found = found[: MAX_FINDINGS - len(described)] or [_nothing(results)]
    quiet = _quiet(results, {finding.kind for finding in found})
    return found + quiet[: max(MIN_FINDINGS - len(found) - len(described), 0)] + described


def _nothing(results: Mapping[str, xr.Dataset]) -> Finding:
    n_documents = int(results["load_interval"]["n_documents"])
    compared = "load, domains and repetition" if "specialization" in results else "load and repetition"
    if n_documents < MIN_DOCUMENTS:
        have = f"{counted(n_documents, 'document')} {'has' if n_documents == 1 else 'have'}"
        text = (
            f"Nothing can be claimed: {have} no interval, as the tokens of a document are not independent. "
            f"Record at least {MIN_DOCUMENTS}."
        )
    else:
        text = (
            f"Nothing stands out: in no layer do {compared} differ from chance by more than the intervals over "
            f"{n_documents:,} documents allow."
        )
    detail = "Intervals resample documents; with more documents smaller differences show."
    return Finding("nothing", "–", text, "imbalance", np.nan, np.nan, np.nan, None, 0.0, detail)


def _quiet(results: Mapping[str, xr.Dataset], found: set[str]) -> list[Finding]:
    """What was looked at and did not stand out, with the nearest it came."""
    findings = []
    if "repetition" not in found:
        findings += _quiet_repetition(results["repetition"])
    if "specialization" not in found and "specialization" in results:
        findings.append(_quiet_domains(specialized_cells(results["specialization"])))
    return findings


def _quiet_repetition(result: xr.Dataset) -> list[Finding]:
    excess = result["lower"] / result["null"]
    if not bool(excess.notnull().any()):
        return []
    nearest = result.isel(layer=int(excess.argmax("layer")))
    layer = int(nearest["layer"])
    value, lower, upper, null = (float(nearest[name]) for name in ("repetition", "lower", "upper", "null"))
    text = (
        "In no layer do neighbouring tokens surely share an expert more often than independent ones; "
        f"layer {layer} comes nearest with {percent(value)} {interval(lower, upper, 100)} against {percent(null)}."
    )
    where = {"layer": layer}
    return [
        Finding(
            "quiet repetition", percent(value), text, "repetition", value, lower, upper, null, strength=0.0, where=where
        )
    ]


def _quiet_domains(cells: xr.Dataset) -> Finding:
    n_compared = cells.attrs["n_compared"]
    text = f"Domains cannot be compared: none has {MIN_DOCUMENTS} documents."
    if n_compared:
        text = (
            f"No domain surely prefers an expert: of {n_compared:,} cells (domain, layer, expert) none has an interval "
            f"above {SMALLEST_LIFT}\u00a0×."
        )
    return Finding("quiet specialization", "0", text, "domains", 0.0, np.nan, np.nan, None, strength=0.0)


def _preferences(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """For each domain the cell with the largest sure lift; one that the permutation test calls chance is none."""
    if "specialization" not in results:
        return []
    cells = specialized_cells(results["specialization"])
    findings = []
    for domain in cells["domain"].values:
        own = cells.sel(domain=domain).transpose("layer", "expert")
        lower = own["lift_lower"].where(own["settled"])
        if not bool((lower >= SMALLEST_LIFT).any()):
            continue
        row, column = np.unravel_index(int(np.nanargmax(lower.values)), lower.shape)
        cell = cells.sel(domain=domain).isel(layer=row, expert=column)
        findings.append(_preference(cell, str(domain), cells.attrs))
    return findings


def _preference(cell: xr.Dataset, domain: str, attributes: Mapping[str, float]) -> Finding:
    layer, expert = int(cell["layer"]), int(cell["expert"])
    share, lift = (_triple(cell, name) for name in ("share", "lift"))
    text = (
        f"Layer {layer} sends {percent(share[0])} {interval(*share[1:], scale=100)} of “{domain}” tokens to expert "
        f"{expert}, {times(lift[0])} {interval(*lift[1:])} its share overall."
    )
    detail = (
        f"Both intervals hold at {percent(attributes['level'])} for all {attributes['n_compared']:,} cells (domain, "
        "layer, expert) with an interval at once (Bonferroni), since the largest was picked; and whole documents that "
        "swap domains hardly ever differ so (permutation, max-T over all cells)."
    )
    where: dict[str, int | str] = {"domain": domain, "layer": layer, "expert": expert}
    strength = float(np.log(lift[1]))
    return Finding("specialization", times(lift[0]), text, "domains", *lift, 1.0, strength, detail, where)


def _log(ratio: xr.DataArray) -> xr.DataArray:
    """NaN where there is no ratio, or a ratio of 0: that is no evidence of an excess."""
    return xr.apply_ufunc(np.log, ratio.where(ratio > 0))


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
    middle, low, high, chance = (float(part[at]) for part in (value, lower, value + reach, null))
    layer, expert = int(result["layer"][at]), int(load["load"].isel(layer=at).argmax("expert"))
    text = (
        f"Layer {layer} is most surely uneven: its busiest expert, {expert}, takes {times(middle)} "
        f"{interval(low, high)} an even share; chance alone would stay below {chance:.2f}\u00a0×."
    )
    detail = (
        f"The interval holds for all {result.sizes['layer']} layers at once. Chance: 97.5 % of uniform routers with "
        "as many independent tokens."
    )
    where = {"layer": layer, "expert": expert}
    strength = float(excess[at])
    return [Finding("imbalance", times(middle), text, "imbalance", middle, low, high, chance, strength, detail, where)]


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
    total, n_experts = int(unused.sum()), load.sizes["expert"]
    elsewhere = f" ({total:,} in all layers together)" if total > number else ""
    text = (
        f"In layer {layer}, {number} of {n_experts} experts got no token at all{elsewhere}; "
        f"the load of each is at most {percent(upper)}, where an even share is {percent(even)}."
    )
    detail = "Rule of three on the effective number of tokens: an unused expert is not proven dead."
    strength = float(np.log(even / upper))
    return [
        Finding(
            "unused",
            f"{number} of {n_experts}",
            text,
            "load",
            0.0,
            0.0,
            upper,
            even,
            strength,
            detail,
            {"layer": layer},
        )
    ]


def _repeats(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """The layer whose neighbouring tokens share an expert most surely more, or less, often than independent ones."""
    result = results["repetition"]
    factor = xr.DataArray(_over_layers(result, results["load_interval"]))
    lower, upper = _widened(result["repetition"], result["lower"], result["upper"], factor)
    excess = xr.apply_ufunc(np.fmax, _log(lower / result["null"]), _log(result["null"] / upper))
    if not bool((excess > 0).any()):
        return []
    at = int(excess.argmax("layer"))
    value, low, high, null = (float(part[at]) for part in (result["repetition"], lower, upper, result["null"]))
    layer, high = int(result["layer"][at]), min(high, 1.0)
    text = (
        f"In layer {layer} a token goes to the same expert as the one before it {percent(value)} "
        f"{interval(low, high, 100)} of the time; for independent tokens it would be {percent(null)}."
    )
    detail = f"The interval holds for all {result.sizes['layer']} layers at once."
    strength, where = float(excess[at]), {"layer": layer}
    return [Finding("repetition", percent(value), text, "repetition", value, low, high, null, strength, detail, where)]


def _explained(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """The layer in which the token says most about its expert, and what the domain says there."""
    if "mutual_information" not in results:
        return []
    result = results["mutual_information"]
    telling = tells(result)
    token = result.sel(label="token_id")
    shared = token["normalized"].where(telling.sel(label="token_id"))
    if not bool(shared.notnull().any()):
        return []
    at = int(shared.argmax("layer"))
    value, null, upper = (float(token[name][at]) for name in ("normalized", "null", "null_upper"))
    layer = int(result["layer"][at])
    text = (
        f"In layer {layer} token and expert share {percent(value)} of their information, "
        f"{percent(null)} if tokens are shuffled within documents"
    )
    if "domain" in result["label"] and bool(telling.sel(label="domain")[at]):
        domain = result.sel(label="domain").isel(layer=at)
        text += (
            f"; domain and expert share {percent(float(domain['normalized']))}, {percent(float(domain['null']))} if "
            "documents swap domains"
        )
    detail = (
        f"Chance stays below {percent(upper)} in 95\u00a0% of {counted(int(token['n_permutations']), 'shuffle')}; the "
        "p-values hold for all layers (max-T) and labels (Bonferroni) at once."
    )
    strength, where = float(np.log(value / upper)), {"layer": layer}
    return [
        Finding(
            "information",
            percent(value),
            f"{text}.",
            "information",
            value,
            np.nan,
            np.nan,
            null,
            strength,
            detail,
            where,
        )
    ]


def tells(result: xr.Dataset, level: float = 0.95) -> xr.DataArray:
    """Where a label says more about the expert than chance, (label, layer) of ``mutual_information``.

    By ``p_value`` (max-T over layers), for all labels at once (Bonferroni). Not by ``p_adjusted``, which few
    permutations keep above 0.05 where one layer of several stands out.
    """
    return result["p_value"] < (1 - level) / result.sizes["label"]


def _certainty(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """Where the router is least sure; a description, as a margin has no null."""
    quantiles = results["margin"]["margin"].transpose("layer", "quantile").values
    if not np.isfinite(quantiles).any():
        return []
    at = int(np.nanargmin(quantiles[:, 2]))
    low, first, middle, _, high = (float(value) for value in quantiles[at])
    layer = int(results["margin"]["layer"][at])
    text = (
        f"The router is least sure in layer {layer}: the median margin is {digits(middle)}\u00a0logits "
        f"(90\u00a0% of decisions: {digits(low)} to {digits(high)}), and a quarter are within {digits(first)}."
    )
    detail, where = "The range is that of the decisions, not an uncertainty.", {"layer": layer}
    headline = f"{digits(middle)} logits"
    return [Finding("margin", headline, text, "margins", middle, low, high, None, 0.0, detail, where)]


def _attention(results: Mapping[str, xr.Dataset]) -> list[Finding]:
    """What NoPE layers surely do that RoPE layers do not; a description, as there is no chance to compare with."""
    if "attention_by_kind" not in results:
        return []
    result = results["attention_by_kind"]
    surely = [
        str(name)
        for name in result["statistic"].values
        if float(result["difference_lower"].sel(statistic=name)) > 0
        or float(result["difference_upper"].sel(statistic=name)) < 0
    ]
    apart = ""
    if "mean_distance" in surely:
        nope, rope = (_of_kind(result, "mean_distance", kind) for kind in ("nope", "rope"))
        apart = (
            f"look {digits(nope[0])} {interval(*nope[1:])} tokens back on average, RoPE layers {digits(rope[0])} "
            f"{interval(*rope[1:])}"
        )
    if "far_mass" in surely:
        value, low, high = _of_kind(result, "far_mass", "nope")
        headline = percent(value)
        text = (
            f"NoPE layers put {headline} {interval(low, high, 100)} of their attention on tokens before the query's "
            "own chunk, which RoPE layers cannot see"
        )
        text += f"; they {apart}" if apart else ""
    elif apart:
        (value, low, high), headline = nope, f"{digits(nope[0])} tokens"
        text = f"NoPE layers {apart}"
    else:
        return []
    detail = (
        "Means over a text's queries, a kind's heads and layers, then over texts; the difference between the kinds, "
        "taken within each text, has an interval without 0."
    )
    return [Finding("attention", headline, f"{text}.", "attention", value, low, high, None, 0.0, detail)]


def _of_kind(result: xr.Dataset, statistic: str, kind: str) -> tuple[float, float, float]:
    """Mean with its bounds."""
    cell = result.sel(statistic=statistic, attention_kind=kind)
    return float(cell["mean"]), float(cell["lower"]), float(cell["upper"])


def enough_expected(result: xr.Dataset, least: int = MIN_EXPECTED) -> xr.DataArray:
    """Where independence would bring at least ``least`` tokens, (layer, expert, next_expert) of a transition."""
    count = result["count"]
    total = count.sum(["expert", "next_expert"])
    return count.sum("next_expert") * count.sum("expert") >= least * total
