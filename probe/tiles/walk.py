"""One walk over the keys of a strip: sums, maxima and orders from which every statistic is read.

Here it is written with plain tensor operations, for any device; :mod:`probe.tiles.compiled` does the same on a CPU in
one pass over every tile. Both take and return the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probe.tiles.strip import HIDDEN, TILE_KEYS, Strip


@dataclass(frozen=True)
class Sought:
    """What a walk is to find.

    ``edges`` (edge, t): positions, from a query's first visible key to the one after itself. ``heaviest``
    (K, G, t, segment): log2 weights that keys are compared with. ``n_slots``: how many of the heaviest keys. ``names``
    of the wanted statistics: a walk may leave out what none of them needs.
    """

    names: frozenset[str]
    edges: Tensor
    heaviest: Tensor
    n_slots: int = 1


@dataclass(frozen=True)
class Walked:
    """What a walk finds.

    ``sums`` of weights and ``maxima`` of log2 weights (K, G, t, block). ``before`` (edge, K, G, t): mass on the visible
    keys before an edge. ``entropy`` in bits and ``mean_distance`` (K, G, t). ``rank`` (K, G, t, segment): how many
    visible keys are heavier than ``heaviest``. ``top_key`` and ``top_weight`` (K, G, t, slot): positions from the
    strip's base and weights, NaN where fewer keys are visible.
    """

    sums: Tensor
    maxima: Tensor
    before: Tensor
    entropy: Tensor
    mean_distance: Tensor
    rank: Tensor
    top_key: Tensor
    top_weight: Tensor


def normalized(walked: Walked, total: Tensor) -> Walked:
    """With weights that sum to 1, from such as sum to ``total`` (K, G, t).

    The kernel's log-sum-exp is rounded to float32: at logits of hundreds that is 1e-5 of every weight and more.
    """
    each = total[..., None]
    return Walked(
        walked.sums / each,
        walked.maxima - each.log2(),
        walked.before / total,
        walked.entropy / total + total.log2(),
        walked.mean_distance / total,
        walked.rank,
        walked.top_key,
        walked.top_weight / each,
    )


NEED_MAXIMA = {"top_key", "map_max"}
"""Statistics that are read off the maxima of blocks."""


def walk(strip: Strip, sought: Sought) -> Walked:
    """Walk through a strip's keys once, tile after tile."""
    sums = strip.query.new_zeros(*strip.shape, strip.n_blocks)
    maxima = strip.query.new_full((*strip.shape, strip.n_blocks), HIDDEN)
    within = strip.query.new_zeros(*strip.shape, strip.block)
    entropy = strip.query.new_zeros(strip.shape)
    rank = torch.zeros_like(sought.heaviest)
    need_maxima = bool(NEED_MAXIMA & sought.names)
    for start, stop, log_weight in strip.weights():
        own = slice((start - strip.begin) // strip.block, (stop - strip.begin) // strip.block)
        if need_maxima:
            torch.amax(log_weight.unflatten(-1, (-1, strip.block)), dim=-1, out=maxima[..., own])
        for index in range(rank.shape[-1]):
            rank[..., index] += (log_weight > sought.heaviest[..., index, None]).sum(dim=-1)
        weight = torch.exp2(log_weight, out=strip.scratch.tensor("weights", *log_weight.shape))
        blocked = weight.unflatten(-1, (-1, strip.block))
        sums[..., own] = blocked.sum(dim=-1)
        if "mean_distance" in sought.names:
            within += blocked.sum(dim=-2)
        if "entropy" in sought.names:
            entropy -= torch.linalg.vecdot(weight, log_weight)
    # Counted from the query, so that long texts lose no digits to their positions.
    middle = torch.arange(strip.begin, strip.end, strip.block, device=sums.device)
    inner = torch.arange(strip.block, device=sums.device, dtype=sums.dtype)
    mean_distance = (sums * (strip.position[:, None] - middle)).sum(dim=-1) - within @ inner
    top = top_keys(strip, maxima, sought.n_slots) if "top_key" in sought.names else (rank[..., :0], rank[..., :0])
    return Walked(sums, maxima, _mass_before(strip, sought.edges, sums), entropy, mean_distance, rank, *top)


def _mass_before(strip: Strip, edges: Tensor, sums: Tensor) -> Tensor:
    """Mass (edge, K, G, t) before ``edges`` (edge, t): whole blocks, and the block that an edge cuts once more."""
    if not len(edges):
        return sums.new_zeros(0, *strip.shape)
    running = torch.nn.functional.pad(sums.cumsum(dim=-1), (1, 0))
    low = edges.amin(dim=1) // strip.block * strip.block
    width = int((edges.amax(dim=1) - low).max())
    whole = running[..., (low - strip.begin) // strip.block].movedim(-1, 0)
    if not width:
        return whole
    # A group of edges at a time, so that what is computed once more stays as small as a tile.
    step = max(1, 2 * TILE_KEYS // width)
    cut = [_cut_mass(strip, edges[i : i + step], low[i : i + step], width) for i in range(0, len(edges), step)]
    return whole + torch.cat(cut)


def _cut_mass(strip: Strip, edges: Tensor, low: Tensor, width: int) -> Tensor:
    """Mass (edge, K, G, t) on the visible keys from ``low`` (edge,), a block's border, to ``edges`` (edge, t)."""
    place = low[:, None] + torch.arange(width, device=low.device)
    keys = strip.keys[:, place.flatten().clamp(max=strip.keys.shape[1] - 1)]
    log_weight = strip.log_weights(keys).unflatten(-1, place.shape)
    hidden = (place >= edges.T[..., None]) | (place < strip.first[:, None, None])
    return log_weight.masked_fill_(hidden, HIDDEN).exp2_().sum(dim=-1).movedim(-1, 0)


def top_keys(strip: Strip, maxima: Tensor, n_slots: int) -> tuple[Tensor, Tensor]:
    """Heaviest keys and their weights (K, G, t, slot): they lie in the blocks with the heaviest maxima."""
    # argmax returns the first of equals, and a stable sort keeps their order
    if n_slots == 1:
        best = maxima.argmax(dim=-1, keepdim=True)
    else:
        best = maxima.sort(dim=-1, descending=True, stable=True).indices[..., :n_slots].sort(dim=-1).values
    best += strip.begin // strip.block
    key_head = torch.arange(len(strip.keys), device=best.device)[:, None, None, None]
    keys = strip.keys.unflatten(1, (-1, strip.block))[key_head, best]
    place = (best[..., None] * strip.block + torch.arange(strip.block, device=best.device)).flatten(-2)
    log_weight = (keys @ strip.query[..., None, :, None]).flatten(-3)
    hidden = (place > strip.position[:, None]) | (place < strip.first[:, None])
    log_weight.masked_fill_(hidden, HIDDEN)
    top_key, top_weight = [], []
    for _ in range(n_slots):
        heaviest = log_weight.argmax(dim=-1, keepdim=True)
        weight = log_weight.gather(-1, heaviest)
        log_weight.scatter_(-1, heaviest, HIDDEN)
        is_none = weight == HIDDEN
        top_key.append(place.gather(-1, heaviest).float().masked_fill(is_none, torch.nan))
        top_weight.append(weight.exp2().masked_fill(is_none, torch.nan))
    return torch.cat(top_key, dim=-1), torch.cat(top_weight, dim=-1)
