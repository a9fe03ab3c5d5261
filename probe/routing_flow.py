"""Statistics of routing along a sequence and through the layers; part of ``probe.routing_stats``."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import xarray as xr

from probe.bootstrap import Bootstrap, divide, share
from probe.counting import count
from probe.routing_rows import By, Routing, Rows, grouped, members


def repetition(
    routing: Routing, *, by: By = None, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How often a token goes to the same expert as the token before it.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    by : name of a coord on ``token`` to split by, or several names; both tokens of a pair lie in the group.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset ([by,] layer), units "1": ``repetition``, the share of pairs with equal first choices, its bounds
    ``lower`` and ``upper`` (NaN for fewer than 2 documents with a pair), and ``null``; ``either``, the share of pairs
    with a chosen expert in common, and ``either_null``; also ``n_pairs`` ([by]). For k = 1 ``either`` is
    ``repetition``. NaN for a group without a pair.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than one resample.

    Notes
    -----
    Jiang et al. 2024 (Mixtral), Table 5. A pair is two adjacent positions of one sample, the last token of a prompt
    and the first that was generated included. The nulls draw both tokens independently from the group's tokens, so
    that uneven load does not pass for repetition: ``null`` is the sum over experts of squared first-choice shares,
    which is 1/E only under a uniform router. ``either_null`` is exact for the recorded sets, by inclusion and
    exclusion: the sum over j = 1 … k, and over sets S of j experts, of (-1)^(j+1) P(S was chosen)².
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    first = _first_of_pairs(rows)
    same, common = _repeats(rows.chosen, first)
    first_choices = count(rows.chosen[..., :1], rows.group, n_codes=rows.n_groups, n_values=rows.n_experts)
    null = np.square(share(first_choices)).sum(axis=-1)
    either_null = null if rows.top_k == 1 else _intersection_chances(rows)
    lower, upper = _repetition_bounds(rows, first, same, bootstrap)
    columns = {
        "repetition": (_pair_share(rows, first, same), "share of adjacent tokens with the same first choice"),
        "lower": (lower, "lower bound of the repetition"),
        "upper": (upper, "upper bound of the repetition"),
        "null": (null, "repetition of independent tokens"),
        "either": (_pair_share(rows, first, common), "share of adjacent tokens with a chosen expert in common"),
        "either_null": (either_null, "share of independent tokens with a chosen expert in common"),
    }
    variables = {name: rows.array(values, ("layer",), long_name) for name, (values, long_name) in columns.items()}
    n_pairs = np.bincount(rows.group[first], minlength=rows.n_groups)
    variables["n_pairs"] = rows.array(n_pairs, (), "adjacent tokens", "pair")
    return xr.Dataset(variables, attrs=bootstrap.attributes)


def transition(routing: Routing) -> xr.Dataset:
    """Where tokens go at the next MoE layer, given the expert that they chose at this one.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.

    Returns
    -------
    Dataset (layer, expert, next_expert) over all MoE layers but the last, with the coords ``next_layer`` and
    ``next_attention_kind`` on ``layer``.
    ``probability``, units "1", sums to 1 over ``next_expert`` and is NaN where the expert was never a first choice;
    ``count`` is in tokens; ``lift``, units "1", is the probability over the next expert's share of first choices: 1
    where layers are independent, NaN where that share is 0.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.

    Notes
    -----
    First choices only; dense layers in between are passed over. Yao et al. 2024 (ExFlow, arXiv 2401.08383).
    """
    rows = grouped(routing)
    chosen = rows.chosen[..., 0]
    n_steps = max(rows.n_layers - 1, 0)
    counts = np.zeros((n_steps, rows.n_experts, rows.n_experts), np.int64)
    for step in range(n_steps):
        after = chosen[:, step + 1, None, None]
        counts[step] = count(after, chosen[:, step], n_codes=rows.n_experts, n_values=rows.n_experts)[:, 0]
    probability = share(counts)
    lift = divide(probability, share(counts.sum(axis=1))[:, None])

    here = grouped(rows.routing.isel(layer=slice(0, n_steps)))
    layers, experts = rows.routing["layer"].values, rows.routing["expert"].values
    next_kind = rows.routing["attention_kind"][1:]
    labels = {
        "next_layer": xr.Variable("layer", layers[1:], {"long_name": "next MoE layer", "units": "1"}),
        "next_attention_kind": xr.Variable("layer", next_kind.values, next_kind.attrs),
        "next_expert": xr.Variable("next_expert", experts, {"long_name": "expert at the next MoE layer", "units": "1"}),
    }
    dims = ("layer", "expert", "next_expert")
    return xr.Dataset(
        {
            "probability": here.array(probability[None], dims, "chance of the next expert", coords=labels),
            "count": here.array(counts[None], dims, "tokens that took both experts", "token", coords=labels),
            "lift": here.array(lift[None], dims, "chance of the next expert over its load", coords=labels),
        }
    )


def _first_of_pairs(rows: Rows) -> np.ndarray:
    """Rows whose next row is the next position of the same sample, in the same group: (pair,)."""
    sample, position, group = rows.sample, rows.values("position").astype(np.int64), rows.group
    adjacent = (sample[1:] == sample[:-1]) & (position[1:] == position[:-1] + 1)
    return np.flatnonzero(adjacent & (group[1:] == group[:-1]))


def _repeats(chosen: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For the pairs (first, first + 1): are the first choices equal, is any choice shared? Both (pair, layer)."""
    same = np.empty((len(first), chosen.shape[1]), bool)
    common = np.empty_like(same)
    for layer in range(chosen.shape[1]):
        here, after = chosen[first, layer], chosen[first + 1, layer]
        same[:, layer] = here[:, 0] == after[:, 0]
        common[:, layer] = (here[:, :, None] == after[:, None, :]).any(axis=(1, 2))
    return same, common


def _pair_share(rows: Rows, first: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """Share of a group's pairs for which ``holds`` (pair, layer), (group, layer)."""
    return share(count(holds[..., None], rows.group[first], n_codes=rows.n_groups, n_values=2))[..., 1]


def _repetition_bounds(
    rows: Rows, first: np.ndarray, same: np.ndarray, bootstrap: Bootstrap
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the share of pairs that repeat, each (group, layer); pairs come in two categories, changed and same."""
    lower, upper = np.empty((2, rows.n_groups, rows.n_layers))
    for group, own in members(rows.group[first], rows.n_groups):
        documents, code = np.unique(rows.sample[first[own]], return_inverse=True)
        per_document = count(same[own, :, None], code, n_codes=len(documents), n_values=2)
        bounds = bootstrap.share_interval(per_document)
        lower[group], upper[group] = (bound[:, 1] for bound in bounds)
    return lower, upper


def _intersection_chances(rows: Rows) -> np.ndarray:
    """The chance that the sets of two tokens, drawn independently from a group, intersect: (group, layer)."""
    sets = np.sort(rows.chosen, axis=-1)
    chances = np.full((rows.n_groups, rows.n_layers), np.nan)
    for group, tokens in rows.each_group():
        for layer in range(rows.n_layers if len(tokens) else 0):
            chances[group, layer] = _intersection_chance(sets[tokens, layer])
    return chances


def _intersection_chance(sets: np.ndarray) -> float:
    """The chance that two rows of ``sets`` (token, slot), each sorted and drawn with replacement, share a member."""
    n_tokens, n_slots = sets.shape
    chance = 0.0
    for size in range(1, n_slots + 1):
        subsets = np.concatenate([sets[:, slots] for slots in map(list, combinations(range(n_slots), size))])
        _, counts = np.unique(subsets, axis=0, return_counts=True)
        chance -= (-1) ** size * float(np.square(counts / n_tokens).sum())
    return chance
