"""Titles that state what one sees in a figure of attention, from the numbers that it shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from probe import schema
from probe.figure_parts import short
from probe.findings import counted, digits, interval, percent
from probe.text_view import layer_label

KINDS = {"nope": "NoPE layers", "rope": "RoPE layers"}
"""The kinds of layers in words, in the order in which a sentence names them."""

DOES = {
    "far_mass": "puts {} of its attention before the chunk",
    "previous_mass": "puts {} on the token before",
    "sink_mass": "puts {} on the first token",
    "entropy": "spreads its attention most, with an entropy of {} nat",
}
"""What a head does that has much of a statistic."""


def kinds_with(values: xr.DataArray) -> list[str]:
    """The kinds of layers that have any value, NoPE first."""
    return [kind for kind in KINDS if bool(values.sel(attention_kind=kind).notnull().any())]


def amount(value: float, lower: float = np.nan, upper: float = np.nan, *, unit: str = "1") -> str:
    """A number with its interval, where there is one: 52 % [51, 54], 2.6 [2.5, 2.7] nat.

    ``unit`` "1" is a share, that of others is written behind, and "" leaves the unit to the sentence.
    """
    is_share = unit == "1"
    known = np.isfinite(lower) and np.isfinite(upper)
    bounds = f" {interval(lower, upper, 100 if is_share else 1)}" if known else ""
    if is_share:
        return percent(value) + bounds
    return digits(value) + bounds + f"\u00a0{unit}" * bool(unit)


def estimate(result: xr.Dataset, *, unit: str, name: str = "mean") -> str:
    """A single number of a result with its ``lower`` and ``upper``; see :func:`amount`."""
    prefix = "" if name in ("mean", "distance_mass") else f"{name}_"
    return amount(*(float(result[key]) for key in (name, f"{prefix}lower", f"{prefix}upper")), unit=unit)


def head_name(result: xr.Dataset, layer: int, head: int) -> str:
    """A head of a layer in words, from their places in a result."""
    kind = schema.labels(result["attention_kind"])[layer]
    return f"head {int(result['head'][head])} of layer {layer_label(int(result['layer'][layer]), kind == 'nope')}"


def largest(values: xr.DataArray) -> tuple[int, int] | None:
    """Places of the layer and the head with the largest value (layer, head); None where there is none above 0."""
    found = np.nan_to_num(values.transpose("layer", "head").values)
    if not (found > 0).any():
        return None
    layer, head = np.unravel_index(int(found.argmax()), found.shape)
    return int(layer), int(head)


def by_kind(result: xr.Dataset) -> str:
    """What the comparison of NoPE with RoPE layers shows, from ``by_kind``."""
    there = kinds_with(result["mean"])
    if not there:
        return "Nothing about attention is defined in these texts"
    statistics = [str(name) for name in result["statistic"].values]
    of_kind = {kind: result.sel(attention_kind=kind) for kind in there}
    told = next((name for name in ("mean_distance", "entropy") if name in statistics), statistics[0])
    unit = str(result["units"].sel(statistic=told).item())
    numbers = {kind: estimate(own.sel(statistic=told), unit=unit) for kind, own in of_kind.items()}
    subject = {"mean_distance": "look {} back on average", "entropy": "have a mean entropy of {}"}.get(
        told, f"have a mean {told.replace('_', ' ')} of {{}}"
    )
    if unit == "token":
        numbers = {kind: text.replace("\u00a0token", "\u00a0tokens") for kind, text in numbers.items()}
    if len(there) == 1:
        (kind,) = there
        return f"All recorded layers are {KINDS[kind]}; they {subject.format(numbers[kind])}"
    if "far_mass" in statistics and float(of_kind["nope"]["mean"].sel(statistic="far_mass")) > 0:
        share = estimate(of_kind["nope"].sel(statistic="far_mass"), unit="1")
        return f"NoPE layers put {share} of their attention beyond the chunk; RoPE layers none"
    return f"NoPE layers {subject.format(numbers['nope'])}, RoPE layers {numbers['rope']}"


def heads(means: xr.Dataset, sinks: xr.Dataset | None) -> str:
    """What the grids of heads show, from ``head_mean`` by ``statistic``, and ``sinks``."""
    parts = []
    if sinks is not None and bool(sinks["sink_mass"].notnull().any()):
        parts.append(_sink_heads(sinks))
    if "previous_mass" in means["statistic"]:
        own = means["mean"].sel(statistic="previous_mass")
        if (at := largest(own)) is not None:
            value = float(own.transpose("layer", "head").values[at])
            parts.append(f"{head_name(means, *at)} gives {percent(value)} to the token before")
    if not parts:
        for statistic in map(str, means["statistic"].values):
            own = means["mean"].sel(statistic=statistic)
            if (at := largest(own)) is not None:
                words = statistic.replace("_", " ")
                parts.append(f"of all heads, {head_name(means, *at)} has the highest {words}")
                break
    sentence = "; ".join(parts) or "Nothing about single heads is defined in these texts"
    return sentence[0].upper() + sentence[1:]


def _sink_heads(sinks: xr.Dataset) -> str:
    threshold, n_heads = percent(sinks.attrs["threshold"]), int(sinks["sink_mass"].notnull().sum())
    n_sinks = int(sinks["is_sink"].sum())
    if not n_sinks:
        return f"no head parks more than {threshold} of its attention on the first token"
    at = largest(sinks["sink_mass"])
    assert at is not None
    value = percent(float(sinks["sink_mass"].transpose("layer", "head").values[at]))
    verb, whose = ("parks", "its") if n_sinks == 1 else ("park", "their")
    most = "" if n_sinks == 1 else ", most of all"
    return (
        f"{n_sinks:,} of {counted(n_heads, 'head')} {verb} more than {threshold} of {whose} attention on the first "
        f"token{most}: {head_name(sinks, *at)}, with {value}"
    )


def distances(first: int) -> str:
    """The distances of a bin, for a sentence: "the token itself", "tokens 4 to 7 back"."""
    if first < 2:
        return ("the token itself", "the token before")[first]
    return f"tokens {first:,} to {2 * first - 1:,} back"


def distance_profile(result: xr.Dataset) -> str:
    """What the distance profile shows, from ``distance_profile`` by kind: where each kind has most of its mass."""
    told: list[str] = []
    for kind in kinds_with(result["distance_mass"]):
        own = result.sel(attention_kind=kind)
        most = own.isel(distance_bin=int(own["distance_mass"].argmax("distance_bin")))
        share = estimate(most, unit="1", name="distance_mass")
        verb = "give most of all to" if not told else "to"
        told.append(f"{KINDS[kind]} {verb} {distances(int(most['distance_bin']))} ({share})")
    return ", ".join(told) or "Nothing was recorded of how far back attention reaches"


def chunk_reach(result: xr.Dataset) -> str:
    """What the figure of the chunk border shows, from ``chunk_reach``, some of whose queries lie behind a border.

    NoPE layers know no border, so of them it says what they still see.
    """
    there = kinds_with(result["reach"])
    parts = []
    if "rope" in there:
        name = next(name for name in ("entropy", "mean_distance", "reach") if name in result)
        unit = {"entropy": "nat", "mean_distance": "tokens", "reach": "visible keys"}[name]
        own = result.sel(attention_kind="rope")
        own = own.isel(chunk_position=np.flatnonzero(own[name].notnull().values))
        first, last = (_triple(own.isel(chunk_position=at), name) for at in (0, -1))
        words = f"{name.replace('_', ' ')} of RoPE layers"
        if own.sizes["chunk_position"] > 1:
            parts.append(
                f"at a chunk border the {words} {_verb(last, first)} from {amount(*last, unit='')} to "
                f"{amount(*first, unit=unit)}"
            )
        else:
            parts.append(f"behind chunk borders the {words} is {amount(*first, unit=unit)}")
    if "nope" in there:
        reach = result["reach"].sel(attention_kind="nope")
        seen = digits(float(reach[np.flatnonzero(reach.notnull().values)[0]]))
        where = "" if parts else " behind a chunk border"
        parts.append(f"NoPE layers still see {seen} keys{where}")
    sentence = "; ".join(parts)
    return sentence[0].upper() + sentence[1:]


def position_profile(result: xr.Dataset) -> str:
    """What the figure of entropy by position shows, from ``position_profile`` of "entropy"."""
    told: list[str] = []
    for kind in kinds_with(result["mean"]):
        own = result.sel(attention_kind=kind)
        own = own.isel(position_bin=np.flatnonzero(own["mean"].notnull().values))
        subject = f"entropy of {KINDS[kind]}" if not told else f"that of {KINDS[kind]}"
        if kind == "nope" and own.sizes["position_bin"] > 1:
            first, last = (_triple(own.isel(position_bin=at), "mean") for at in (0, -1))
            told.append(f"{subject} {_verb(first, last)} from {amount(*first, unit='')} to {amount(*last, unit='nat')}")
        else:
            low, high = float(own["mean"].min()), float(own["mean"].max())
            told.append(f"{subject} stays between {digits(low)} and {digits(high)}\u00a0nat")
    return f"Along the text the {', '.join(told)}" if told else "No entropy is defined in these texts"


def one_text(result: xr.Dataset, chosen: Mapping[str, tuple[int, int]], *, name: str, n_tokens: int) -> str:
    """What the maps of one text show, from ``query_mean`` by ``statistic`` of that text alone.

    ``chosen`` are places of layer and head by the statistic that they were chosen for.
    """
    told: list[str] = []
    for statistic, at in list(chosen.items())[:2]:
        value = float(result["mean"].sel(statistic=statistic).transpose("layer", "head").values[at])
        text = DOES[statistic].format(digits(value) if statistic == "entropy" else percent(value))
        told.append(f"{head_name(result, *at)} {text}")
    where = f"In “{short(name)}” ({counted(n_tokens, 'token')})" if name else f"In a text of {n_tokens:,} tokens"
    return f"{where} {', '.join(told)}"


def _triple(own: xr.Dataset, name: str) -> tuple[float, float, float]:
    """A number with its bounds; NaN for those that there are none of."""
    prefix = "" if name == "mean" else f"{name}_"
    lower, upper = (float(own[key]) if key in own else np.nan for key in (f"{prefix}lower", f"{prefix}upper"))
    return float(own[name]), lower, upper


def _verb(before: tuple[float, float, float], after: tuple[float, float, float]) -> str:
    """Whether a number surely falls or rises, by its bounds where it has them."""
    before_ends, after_ends = ([end for end in part if np.isfinite(end)] for part in (before, after))
    if max(after_ends) < min(before_ends):
        return "falls"
    return "rises" if min(after_ends) > max(before_ends) else "goes"
