"""Routing along a sequence, from layer to layer, and of a token's experts together; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import xarray as xr

from probe.bootstrap import Bootstrap, divide, share
from probe.counting import count
from probe.routing.rows import By, Routing, Rows, grouped
from probe.schema import ProbeError

DISJOINT, COMMON, SAME = range(3)
"""What two adjacent tokens have in common at a layer: no expert, some expert, the first choice."""

ROWS_OF_TABLE = 1 << 18
"""Rows that are counted at once where there are many more things to count than experts: pairs and sets of them."""

SUBSET_CELLS = 1 << 24
"""Sets of experts are counted in a table of at most so many cells; where there may be more, by sorting."""

MOST_CHOICES = 8
"""Experts of a token up to which all sets of them are counted."""


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
    ``lower`` and ``upper`` (NaN for fewer than 5 documents with a pair, or where the rarer outcome comes from fewer
    than 4 in effect), and ``null``; ``either``, the share of pairs with a chosen expert in common, and
    ``either_null``; also ``n_pairs`` ([by]). For k = 1 ``either`` is ``repetition``. NaN for a group without a pair.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    Jiang et al. 2024 (Mixtral), Table 5. A pair is two adjacent positions of one sample, the last token of a prompt
    and the first that was generated included. The nulls draw both tokens independently from the group's tokens, so
    that uneven load does not pass for repetition: ``null`` is the sum over experts of squared first-choice shares,
    which is 1/E only under a uniform router. ``either_null`` is exact for the recorded sets, by inclusion and
    exclusion: the sum over j = 1 … k, and over sets S of j experts, of (-1)^(j+1) P(S was chosen)²; 1 where 2 k > E;
    else NaN where k is over 8, since the sets of one token are 2^k, or there are more sets than 64 bits can number.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    first_choices = np.zeros((rows.n_groups, rows.n_layers, rows.n_experts), np.int64)
    for block in rows.blocks("expert_index", "sample", "position"):
        code = block.group if rows.n_groups > 1 else None
        first_choices += count(block.chosen[..., :1], code, n_codes=rows.n_groups, n_values=rows.n_experts)
    null = np.square(share(first_choices)).sum(axis=-1)

    pairs = np.zeros((rows.n_groups, rows.n_layers, 3), np.int64)
    lower, upper = np.empty((2, rows.n_groups, rows.n_layers))
    for group, _, per_document in rows.documents(_compared, n_values=3, ahead=1):
        pairs[group] = per_document.sum(axis=0)
        changed = per_document[..., [DISJOINT, COMMON]].sum(axis=-1)
        bounds = bootstrap.share_interval(np.stack([changed, per_document[..., SAME]], axis=-1))
        lower[group], upper[group] = bounds.lower[:, 1], bounds.upper[:, 1]
    shares = share(pairs)
    columns = {
        "repetition": (shares[..., SAME], "share of adjacent tokens with the same first choice"),
        "lower": (lower, "lower bound of the repetition"),
        "upper": (upper, "upper bound of the repetition"),
        "null": (null, "repetition of independent tokens"),
        "either": (shares[..., COMMON] + shares[..., SAME], "share of adjacent tokens with a chosen expert in common"),
        "either_null": (
            null if rows.top_k == 1 else _intersection_chances(rows),
            "share of independent tokens with a chosen expert in common",
        ),
    }
    variables = {name: rows.array(values, ("layer",), long_name) for name, (values, long_name) in columns.items()}
    variables["n_pairs"] = rows.array(pairs[:, :1].sum(axis=(1, 2)), (), "adjacent tokens", "pair")
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
    n_steps, n_experts = max(rows.n_layers - 1, 0), rows.n_experts
    counts = np.zeros((n_steps, n_experts, n_experts), np.int64)
    for block in rows.blocks("expert_index", at_once=ROWS_OF_TABLE):
        choices = _layer_by_layer(block.chosen[..., :1])[..., 0]
        for step in range(n_steps):
            both = choices[step].astype(np.int64) * n_experts + choices[step + 1]
            counts[step] += count(both[:, None, None], n_values=n_experts**2).reshape(n_experts, n_experts)
    probability = share(counts)
    lift = divide(probability, share(counts.sum(axis=1))[:, None])

    here = replace(rows, routing=rows.routing.isel(layer=slice(0, n_steps)))
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


def coactivation(routing: Routing, *, by: By = None) -> xr.Dataset:
    """How often a token that chose one expert chose another one with it.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), at least two slots, or a recording that holds it.
    by : name of a coord on ``token`` to split by, or several names.

    Returns
    -------
    Dataset ([by,] layer, expert, other_expert): ``probability``, units "1", the share of the expert's tokens that
    chose the other one too: sums to k - 1 over ``other_expert``, NaN on the diagonal and where the expert took no
    token; ``count`` of the tokens that chose both, on the diagonal of those that chose the expert; and the scalar
    ``null``, the probability under a uniform router, (k - 1) / (E - 1).

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        If a token chooses one expert only.

    Notes
    -----
    N(i, j) / N(i), Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060) Eq. 6. Every two of a token's k experts count.
    The published code counts only neighbours in the order of strength, k - 1 of the k (k - 1) / 2 pairs, which is the
    same for k = 2 alone.
    """
    rows = grouped(routing, by)
    if rows.top_k < 2:
        raise ProbeError(
            "a token of this recording chooses one expert, so no two are chosen together: "
            "transition(routing) says where it goes at the next layer"
        )
    n_experts = rows.n_experts
    counts = np.zeros((rows.n_groups, rows.n_layers, n_experts, n_experts), np.int64)
    for block in rows.blocks("expert_index", at_once=ROWS_OF_TABLE):
        code = block.group if rows.n_groups > 1 else None
        for layer, chosen in enumerate(_layer_by_layer(block.chosen)):
            pairs = [
                chosen[:, i].astype(np.int64) * n_experts + chosen[:, j] for i, j in combinations(range(rows.top_k), 2)
            ]
            index = np.stack(pairs, axis=-1)[:, None]
            found = count(index, code, n_codes=rows.n_groups, n_values=n_experts**2)
            counts[:, layer] += found.reshape(rows.n_groups, n_experts, n_experts)
    counts += counts.transpose(0, 1, 3, 2)
    diagonal = np.arange(n_experts)
    own = counts.sum(axis=-1) // (rows.top_k - 1)
    probability = divide(counts, own[..., None])
    counts[..., diagonal, diagonal] = own
    probability[..., diagonal, diagonal] = np.nan

    experts = rows.routing["expert"].values
    labels = {"other_expert": xr.Variable("other_expert", experts, {"long_name": "other expert", "units": "1"})}
    dims = ("layer", "expert", "other_expert")
    null = {"long_name": "chance of the other expert under a uniform router", "units": "1"}
    return xr.Dataset(
        {
            "probability": rows.array(probability, dims, "chance of the other expert", coords=labels),
            "count": rows.array(counts, dims, "tokens that took both experts", "token", coords=labels),
            "null": ((), (rows.top_k - 1) / (n_experts - 1), null),
        }
    )


def _layer_by_layer(chosen: np.ndarray) -> np.ndarray:
    """The choices (token, layer, slot) as (layer, token, slot), those of a layer next to each other in memory."""
    return np.ascontiguousarray(chosen.transpose(1, 0, 2))


def _compared(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The first rows of pairs of adjacent tokens, and what the two have in common, (pair, layer, 1)."""
    adjacent = rows.is_followed & (rows.group[1:] == rows.group[:-1])
    here, after = rows.chosen[:-1], rows.chosen[1:]
    shared = np.zeros(here.shape[:2], bool)
    for i in range(rows.top_k):
        for j in range(rows.top_k):
            shared |= here[..., i] == after[..., j]
    same = here[..., 0] == after[..., 0]
    # A first choice in common is an expert in common: SAME is both at once, COMMON the second alone.
    outcome = same.view(np.uint8) + shared.view(np.uint8)
    first = np.flatnonzero(adjacent)
    return first, outcome[first, :, None]


def _intersection_chances(rows: Rows) -> np.ndarray:
    """The chance that the sets of two tokens, drawn independently from a group, intersect: (group, layer)."""
    chances = np.zeros((rows.n_groups, rows.n_layers))
    n_tokens = np.bincount(rows.group, minlength=rows.n_groups)[:, None]
    if 2 * rows.top_k > rows.n_experts:  # there is no room for two sets side by side
        return np.where(n_tokens > 0, 1.0, np.nan) + chances
    if rows.top_k > MOST_CHOICES:
        return np.full(chances.shape, np.nan)
    for size in range(1, rows.top_k + 1):
        n_subsets = comb(rows.n_experts, size)
        if n_subsets * rows.n_groups >= 2**63:
            return np.full(chances.shape, np.nan)
        if n_subsets * rows.n_groups * rows.n_layers <= SUBSET_CELLS:
            squares = _squares_by_table(rows, size, n_subsets)
        else:
            squares = _squares_by_sorting(rows, size, n_subsets)
        chances -= (-1) ** size * divide(squares, np.square(n_tokens, dtype=float))
    return chances


def _squares_by_table(rows: Rows, size: int, n_subsets: int) -> np.ndarray:
    """Sum of squared counts of the sets of ``size`` experts that tokens chose, (group, layer)."""
    counts = np.zeros((rows.n_groups, rows.n_layers, n_subsets), np.int64)
    for block in rows.blocks("expert_index", at_once=ROWS_OF_TABLE):
        code = block.group if rows.n_groups > 1 else None
        for layer, chosen in enumerate(_layer_by_layer(block.chosen)):
            number = np.stack(list(_subsets(chosen, size, rows.n_experts)), axis=-1)
            found = count(number[:, None], code, n_codes=rows.n_groups, n_values=n_subsets)
            counts[:, layer] += found[:, 0]
    return np.square(counts).sum(axis=-1)


def _squares_by_sorting(rows: Rows, size: int, n_subsets: int) -> np.ndarray:
    """The same where a table would be too large: only sets that occur take memory."""
    seen = [(np.zeros(0, np.int64), np.zeros(0, np.int64))] * rows.n_layers
    for block in rows.blocks("expert_index", at_once=ROWS_OF_TABLE):
        first = block.group.astype(np.int64) * n_subsets
        for layer, chosen in enumerate(_layer_by_layer(block.chosen)):
            for number in _subsets(chosen, size, rows.n_experts):
                seen[layer] = _merged(*seen[layer], *np.unique(first + number, return_counts=True))
    squares = np.zeros((rows.n_groups, rows.n_layers))
    for layer, (number, times) in enumerate(seen):
        squares[:, layer] = np.bincount(number // n_subsets, np.square(times, dtype=float), minlength=rows.n_groups)
    return squares


def _merged(a: np.ndarray, n_a: np.ndarray, b: np.ndarray, n_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct numbers of ``a`` and ``b``, and how often they occurred in both together."""
    numbers, place = np.unique(np.concatenate([a, b]), return_inverse=True)
    times = np.zeros(len(numbers), np.int64)
    np.add.at(times, place, np.concatenate([n_a, n_b]))
    return numbers, times


def _subsets(chosen: np.ndarray, size: int, n_experts: int) -> Iterator[np.ndarray]:
    """The number of every set of ``size`` among a token's experts (token, slot), one array (token,) for each.

    The set e₁ < e₂ < … has the number C(e₁, 1) + C(e₂, 2) + …: sets are numbered from 0 without a gap.
    """
    ranked = [np.ascontiguousarray(chosen[:, slot]) for slot in range(chosen.shape[1])]
    for end in range(len(ranked) - 1, 0, -1):  # a bubble sort of columns: numpy sorts short rows slowly
        for slot in range(end):
            lower, higher = ranked[slot : slot + 2]
            ranked[slot : slot + 2] = np.minimum(lower, higher), np.maximum(lower, higher)
    terms = [np.array([comb(expert, place) for expert in range(n_experts)], np.int64) for place in range(1, size + 1)]
    for experts in combinations(ranked, size):
        yield np.sum([term[expert] for term, expert in zip(terms, experts, strict=True)], axis=0)
