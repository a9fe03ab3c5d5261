"""Statistics of attention from queries and keys, tile by tile: never an n × n tensor.

A tile holds the weights p of a few queries on a few keys, small enough to stay in a core's cache. With −log-sum-exp
appended to each query and 1 to each key, one matrix product gives log p, here to the base 2: on a CPU ``exp`` is a
hundred times slower where its result underflows, and ``exp2`` is not. What a tile leaves behind are sums and maxima
over blocks of keys; masses before any given key (the edge of a distance bin, of a chunk, of a segment) are running sums
of whole blocks, plus the one block that the edge cuts, computed once more.

Tensors in, tensors out; everything in float32. Heads that share a key head are kept together, so that keys are never
repeated.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCK = 64
"""Keys in one block, unless a map has finer cells."""

TILE_KEYS = 1024
TILE_QUERIES = 64
TILE_WEIGHTS = {"cpu": 1 << 18}
"""Weights in one tile, all its heads together, by kind of device: about 1 MB, which fits a core's second cache."""

TILE_WEIGHTS_ELSEWHERE = 1 << 24
"""On an accelerator larger tiles pay for the launches."""

HIDDEN = -1e30
"""Log2 weight of a hidden key: its power of 2 is exactly 0, and 0 times it is 0 and not NaN."""


@dataclass(frozen=True)
class Wanted:
    """Which statistics to compute.

    ``names`` are variables of ``/attention`` and ``/attention_profiles``. ``segments`` are (start, stop) positions,
    ``offsets`` distances, ``bin_width`` the keys in one bin of a map, a power of two.
    """

    names: frozenset[str]
    segments: Sequence[tuple[int, int]] = ()
    offsets: Sequence[int] = ()
    top_keys: int = 1
    bin_width: int = BLOCK


@dataclass(frozen=True)
class Attending:
    """Queries (H, m, d) and the keys (K, n, d) of one text, H a multiple of K; ``scaling`` multiplies their products.

    ``position`` (m,) of the queries in the text, ascending; each sees the keys from ``first`` (m,) to its own position.
    ``chunk_start`` (m,) is where the query's chunk begins. ``key_start`` is the position of the first key, over 0 where
    a cache dropped older ones. ``log_sum_exp`` (H, m) of the scaled products over visible keys, where it is known.
    """

    query: Tensor
    key: Tensor
    position: Tensor
    first: Tensor
    chunk_start: Tensor
    scaling: float
    key_start: int = 0
    log_sum_exp: Tensor | None = None


@dataclass
class Reduced:
    """What :func:`reduce_attention` returns.

    ``rows``: statistics of each query, float32 (m, H) or (m, H, segment | offset | slot). ``sums``: over queries, in
    float64 and on the CPU: ``distance_mass`` and ``distance_square`` (H, distance_bin), ``received_mass`` (H, key_bin),
    ``map_sum`` and ``map_max`` (H, query_bin, key_bin).
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


NEED_BLOCKS = {"chunk_mass", "far_mass", "segment_mass", "mean_distance", "distance_mass", "received_mass", "map_sum"}
NEED_MAXIMA = {"top_key", "map_max"}
"""Statistics that are read off sums, or maxima, of blocks."""


def distance_bins(n_positions: int) -> list[int]:
    """Smallest distance of each bin, 0, 1, 2, 4, …, for a text of ``n_positions`` tokens."""
    return [0, *(1 << power for power in range((n_positions - 1).bit_length()))]


def reduce_attention(attending: Attending, wanted: Wanted) -> Reduced:
    """Compute the wanted statistics; heads of one key head after the other, and query tile after query tile.

    Raises
    ------
    ValueError
        If the number of query heads is not a multiple of the number of key heads.
    """
    n_heads, n_key_heads = len(attending.query), len(attending.key)
    if n_heads % n_key_heads:
        raise ValueError(f"{n_heads} query heads do not share {n_key_heads} key heads evenly")
    shared = n_heads // n_key_heads
    at_once = max(1, _tile_weights(attending.query.device) // (TILE_KEYS * TILE_QUERIES * shared))
    parts = [
        _reduce_heads(attending, wanted, slice(start, start + at_once), shared)
        for start in range(0, n_key_heads, at_once)
    ]
    return Reduced(
        {name: torch.cat([part.rows[name] for part in parts], dim=1) for name in parts[0].rows},
        {name: torch.cat([part.sums[name] for part in parts]) for name in parts[0].sums},
    )


def pattern(attending: Attending) -> Tensor:
    """Attention weights (H, m, n) themselves, NaN where a key is hidden; plain, and for short texts only."""
    shared = len(attending.query) // len(attending.key)
    key = attending.key.float().repeat_interleave(shared, dim=0)
    logits = attending.query.float() @ key.transpose(1, 2) * attending.scaling
    position = torch.arange(key.shape[1], device=key.device) + attending.key_start
    hidden = (position > attending.position[:, None]) | (position < attending.first[:, None])
    weights = logits.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(hidden, torch.nan)


def _tile_weights(device: torch.device) -> int:
    return TILE_WEIGHTS.get(device.type, TILE_WEIGHTS_ELSEWHERE)


def _reduce_heads(attending: Attending, wanted: Wanted, key_heads: slice, shared: int) -> Reduced:
    """The statistics of the heads that share a few key heads."""
    block = min(BLOCK, wanted.bin_width)
    key = attending.key[key_heads].float()
    # Blocks lie where the text's do: keys are padded to whole ones on both sides, out of sight of every query.
    before = attending.key_start % block
    n_keys = before + key.shape[1]
    # One more channel carries the log-sum-exp.
    keys = key.new_zeros(len(key), -(-n_keys // block) * block, key.shape[-1] + 1)
    keys[:, before:n_keys, :-1], keys[:, :, -1] = key, 1
    query_heads = slice(key_heads.start * shared, (key_heads.start + len(key)) * shared)
    query = attending.query[query_heads].float() * (attending.scaling / math.log(2))
    reduced, totals, scratch = Reduced(), _Totals(attending, wanted, len(query)), _Scratch(query)
    rows: list[dict[str, Tensor]] = []
    tile_keys = min(keys.shape[1], TILE_KEYS)
    n_rows = max(TILE_QUERIES, _tile_weights(query.device) // (tile_keys * len(query)))
    for tile in query_tiles(attending.position, attending.first, n_rows):
        strip = _Strip(attending, query[:, tile], keys, tile, query_heads, shared, block, scratch)
        rows.append(_reduce_strip(strip, wanted, totals))
    for name in rows[0]:
        reduced.rows[name] = torch.cat([part[name] for part in rows], dim=1).transpose(0, 1)
    reduced.sums = totals.sums
    return reduced


def query_tiles(position: Tensor, first: Tensor, n_rows: int) -> Iterator[slice]:
    """Cut queries into tiles of at most ``n_rows`` that share most of the keys they see.

    Where the first visible key moves on, as in chunks, a tile ends before its keys would reach over more than the
    longest chunk and ``TILE_KEYS``: queries of different chunks share no key.
    """
    positions, firsts = position.tolist(), first.tolist()
    longest = max(last - start + 1 for last, start in zip(positions, firsts, strict=True))
    start = 0
    for row in range(1, len(positions) + 1):
        full = row == len(positions) or row - start == n_rows
        if full or (firsts[row] > firsts[start] and positions[row] - firsts[start] >= max(longest, TILE_KEYS)):
            yield slice(start, row)
            start = row


class _Scratch:
    """Memory that every tile writes over: a fresh megabyte for each would cost more than what is computed in it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._kept: dict[str, Tensor] = {}

    def tensor(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor, in the memory of the last one of this name."""
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = self._like.new_empty(size)
        return self._kept[name][:size].view(shape)


class _Strip:
    """One tile of queries with all the keys that any of them sees, walked through in tiles of keys.

    Positions count from ``base``, the text's position of the first key in hand. Weights are (K, G, t, …): key heads,
    the query heads that share one, queries.
    """

    def __init__(
        self,
        attending: Attending,
        query: Tensor,
        keys: Tensor,
        tile: slice,
        heads: slice,
        shared: int,
        block: int,
        scratch: _Scratch,
    ) -> None:
        self.keys, self.block, self.scratch = keys, block, scratch
        self.base = attending.key_start // block * block
        self.position = attending.position[tile] - self.base
        self.first = attending.first[tile] - self.base
        self.chunk_start = attending.chunk_start[tile] - self.base
        self.shape = (len(keys), shared, len(self.position))
        ends = torch.stack([self.first.min(), self.first.max(), self.position[0], self.position[-1]]).tolist()
        earliest, self._latest_first, self._earliest_position, last = ends
        self.begin = earliest // block * block
        self.end = -(-(last + 1) // block) * block
        self.query = torch.cat([query, torch.zeros_like(query[..., :1])], dim=-1).unflatten(0, self.shape[:2])
        if attending.log_sum_exp is None:
            self.query[..., -1] = -self._log_sum_exp()
        else:
            self.query[..., -1] = attending.log_sum_exp[heads, tile].unflatten(0, self.shape[:2]) / -math.log(2)

    def weights(self, earliest: int = 0, latest: int = sys.maxsize) -> Iterator[tuple[int, int, Tensor]]:
        """Log2 weights (K, G, t, keys) of one tile of keys after the other, with where it starts and where it ends.

        Only tiles that reach into ``earliest`` to ``latest``; every tile overwrites the one before.
        """
        for start in range(self.begin, self.end, TILE_KEYS):
            stop = min(start + TILE_KEYS, self.end)
            if stop <= earliest or start >= latest:
                continue
            log_weight = self._log_weights(self.keys[:, start:stop])
            if stop - 1 > self._earliest_position or start < self._latest_first:
                place = torch.arange(start, stop, device=log_weight.device)
                log_weight.masked_fill_((place > self.position[:, None]) | (place < self.first[:, None]), HIDDEN)
            yield start, stop, log_weight

    def _log_sum_exp(self) -> Tensor:
        """Log2 of the sum of powers of 2 (K, G, t), from queries whose last channel is still 0."""
        highest = self.query.new_full(self.shape, HIDDEN)
        total = self.query.new_zeros(self.shape)
        for _, _, logit in self.weights():
            before, highest = highest, highest.maximum(logit.amax(dim=-1))
            total *= (before - highest).exp2()
            total += logit.sub_(highest[..., None]).exp2_().sum(dim=-1)
        return highest + total.log2()

    def _log_weights(self, keys: Tensor) -> Tensor:
        """Log2 weights (K, G, t, keys) on ``keys`` (K, keys, d + 1), hidden ones included."""
        folded = self.query.flatten(1, 2)
        out = self.scratch.tensor("log weights", len(folded), folded.shape[1], keys.shape[1])
        return torch.bmm(folded, keys.transpose(1, 2), out=out).view(*self.shape, -1)

    def weight_at(self, distance: Tensor) -> Tensor:
        """Weight (K, G, t) of the key ``distance`` (t,) before each query; 0 where that key is hidden."""
        place = self.position - distance
        key = self.keys[:, place.clamp(min=0)]
        weight = (self.query * key[:, None]).sum(dim=-1).exp2()
        return weight.masked_fill(place < self.first, 0)

    def mass_before(self, edges: Tensor, block_sums: Tensor) -> Tensor:
        """Mass (edge, K, G, t) on the visible keys before ``edges`` (edge, t), positions from ``first`` on."""
        running = torch.nn.functional.pad(block_sums.cumsum(dim=-1), (1, 0))
        low = edges.amin(dim=1) // self.block * self.block
        width = int((edges.amax(dim=1) - low).max())
        place = (low - self.begin) // self.block
        whole = running[..., place].movedim(-1, 0)
        if not width:
            return whole
        # A group of edges at a time, so that what is computed once more stays as small as a tile.
        step = max(1, 2 * TILE_KEYS // width)
        cut = [self._cut_mass(edges[i : i + step], low[i : i + step], width) for i in range(0, len(edges), step)]
        return whole + torch.cat(cut)

    def _cut_mass(self, edges: Tensor, low: Tensor, width: int) -> Tensor:
        """Mass (edge, K, G, t) on the visible keys from ``low`` (edge,), a block's border, to ``edges`` (edge, t)."""
        place = low[:, None] + torch.arange(width, device=low.device)
        keys = self.keys[:, place.flatten().clamp(max=self.keys.shape[1] - 1)]
        log_weight = self._log_weights(keys).unflatten(-1, place.shape)
        hidden = (place >= edges.T[..., None]) | (place < self.first[:, None, None])
        return log_weight.masked_fill_(hidden, HIDDEN).exp2_().sum(dim=-1).movedim(-1, 0)


def _reduce_strip(strip: _Strip, wanted: Wanted, totals: _Totals) -> dict[str, Tensor]:
    """Statistics of each query of a strip, (H, t, …), and what it adds to the totals."""
    rows = _nearby(strip, wanted)
    blocks = _walk(strip, wanted)
    if "entropy" in wanted.names:
        rows["entropy"] = blocks.bits.clamp(min=0) * math.log(2)
    if "mean_distance" in wanted.names:
        middle = torch.arange(strip.begin, strip.end, strip.block, device=blocks.sums.device).float()
        inner = torch.arange(strip.block, device=blocks.sums.device).float()
        # Counted from the query, so that long texts lose no digits to their positions.
        back = strip.position[:, None] - middle
        rows["mean_distance"] = (blocks.sums * back).sum(dim=-1) - blocks.within @ inner
    if {"chunk_mass", "far_mass"} & wanted.names:
        far = strip.mass_before(torch.maximum(strip.chunk_start, strip.first)[None], blocks.sums)[0]
        rows |= {"far_mass": far, "chunk_mass": blocks.sums.sum(dim=-1) - far}
    if wanted.segments:
        rows |= _segments(strip, wanted, blocks)
    if "top_key" in wanted.names:
        rows |= _top_keys(strip, wanted.top_keys, blocks.maxima)
    totals.add(strip, blocks)
    return {name: values.flatten(0, 1) for name, values in rows.items() if name in wanted.names}


def _nearby(strip: _Strip, wanted: Wanted) -> dict[str, Tensor]:
    """Weights of single keys whose place is known: the first, the query's own, the one before, those at offsets."""
    rows, text_position = {}, strip.position + strip.base
    if "sink_mass" in wanted.names:
        rows["sink_mass"] = strip.weight_at(text_position)
    if "self_mass" in wanted.names:
        rows["self_mass"] = strip.weight_at(torch.zeros_like(strip.position))
    offsets = {"previous_mass": [1]} | ({"offset_mass": list(wanted.offsets)} if wanted.offsets else {})
    for name, distances in offsets.items():
        if name in wanted.names:
            weights = [
                strip.weight_at(torch.full_like(strip.position, distance)).masked_fill(
                    text_position < distance, torch.nan
                )
                for distance in distances
            ]
            rows[name] = torch.stack(weights, dim=-1)
    if "previous_mass" in rows:
        rows["previous_mass"] = rows["previous_mass"][..., 0]
    return rows


@dataclass
class _Blocks:
    """What the walk over a strip's keys leaves behind.

    ``sums`` of weights and ``maxima`` of log2 weights (K, G, t, block); ``within`` (K, G, t, place): weights added up
    over blocks, by place in the block; ``bits`` (K, G, t), the entropy.
    """

    sums: Tensor
    maxima: Tensor
    within: Tensor
    bits: Tensor


def _walk(strip: _Strip, wanted: Wanted) -> _Blocks:
    """Walk through a strip's keys once, computing only what the wanted statistics are read off."""
    need_sums, need_maxima = NEED_BLOCKS & wanted.names, NEED_MAXIMA & wanted.names
    n_blocks = (strip.end - strip.begin) // strip.block
    blocks = _Blocks(
        strip.query.new_zeros(*strip.shape, n_blocks if need_sums else 0),
        strip.query.new_full((*strip.shape, n_blocks if need_maxima else 0), HIDDEN),
        strip.query.new_zeros(*strip.shape, strip.block),
        strip.query.new_zeros(strip.shape),
    )
    if not (need_sums or need_maxima or "entropy" in wanted.names):
        return blocks
    for start, stop, log_weight in strip.weights():
        own = slice((start - strip.begin) // strip.block, (stop - strip.begin) // strip.block)
        if need_maxima:
            torch.amax(log_weight.unflatten(-1, (-1, strip.block)), dim=-1, out=blocks.maxima[..., own])
        if need_sums or "entropy" in wanted.names:
            weight = torch.exp2(log_weight, out=strip.scratch.tensor("weights", *log_weight.shape))
            if need_sums:
                blocked = weight.unflatten(-1, (-1, strip.block))
                blocks.sums[..., own] = blocked.sum(dim=-1)
            if "mean_distance" in wanted.names:
                blocks.within += blocked.sum(dim=-2)
            if "entropy" in wanted.names:
                blocks.bits -= torch.linalg.vecdot(weight, log_weight)
    return blocks


def _segments(strip: _Strip, wanted: Wanted, blocks: _Blocks) -> dict[str, Tensor]:
    """Mass on each segment, and how many keys are heavier than the segment's heaviest; (K, G, t, segment)."""
    rows = {}
    bounds = torch.tensor(wanted.segments, device=strip.position.device) - strip.base
    if "segment_mass" in wanted.names:
        edges = bounds.flatten()[:, None].expand(-1, len(strip.position))
        edges = edges.maximum(strip.first).minimum(strip.position + 1)
        start, stop = strip.mass_before(edges, blocks.sums).unflatten(0, (-1, 2)).unbind(dim=1)
        rows["segment_mass"] = (stop - start).clamp(min=0).movedim(0, -1)
    if "key_rank" in wanted.names:
        rows["key_rank"] = _key_rank(strip, bounds.tolist())
    return rows


def _key_rank(strip: _Strip, segments: list[list[int]]) -> Tensor:
    """How many visible keys are heavier than each segment's heaviest, (K, G, t, segment); NaN where it is hidden."""
    heaviest = strip.query.new_full((*strip.shape, len(segments)), HIDDEN)
    earliest, latest = min(low for low, _ in segments), max(high for _, high in segments)
    for start, stop, log_weight in strip.weights(earliest, latest):
        for index, (low, high) in enumerate(segments):
            own = log_weight[..., max(low - start, 0) : max(min(high, stop) - start, 0)]
            if own.shape[-1]:
                heaviest[..., index] = heaviest[..., index].maximum(own.amax(dim=-1))
    rank = torch.zeros_like(heaviest)
    for _, _, log_weight in strip.weights():
        for index in range(len(segments)):
            rank[..., index] += (log_weight > heaviest[..., index, None]).sum(dim=-1)
    return rank.masked_fill_(heaviest == HIDDEN, torch.nan)


def _top_keys(strip: _Strip, n_slots: int, maxima: Tensor) -> dict[str, Tensor]:
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
    rows: dict[str, list[Tensor]] = {"top_key": [], "top_weight": []}
    for _ in range(n_slots):
        heaviest = log_weight.argmax(dim=-1, keepdim=True)
        weight = log_weight.gather(-1, heaviest)
        log_weight.scatter_(-1, heaviest, HIDDEN)
        is_none = weight == HIDDEN
        rows["top_key"].append((place.gather(-1, heaviest) + strip.base).float().masked_fill(is_none, torch.nan))
        rows["top_weight"].append(weight.exp2().masked_fill(is_none, torch.nan))
    return {name: torch.cat(slots, dim=-1) for name, slots in rows.items()}


class _Totals:
    """Sums over queries, added up strip by strip, in float64 and on the CPU: not every device has float64."""

    def __init__(self, attending: Attending, wanted: Wanted, n_heads: int) -> None:
        self._names, self._width = wanted.names, wanted.bin_width
        n_positions = int(attending.position[-1]) + 1
        self._smallest = torch.tensor(distance_bins(n_positions), device=attending.position.device)
        n_bins = -(-n_positions // self._width)
        shapes = {
            "distance_mass": (len(self._smallest),),
            "distance_square": (len(self._smallest),),
            "received_mass": (n_bins,),
            "map_sum": (n_bins, n_bins),
            "map_max": (n_bins, n_bins),
        }
        names = self._names | ({"distance_square"} if "distance_mass" in self._names else set())
        self.sums = {
            name: torch.zeros(n_heads, *shape, dtype=torch.float64) for name, shape in shapes.items() if name in names
        }

    def add(self, strip: _Strip, blocks: _Blocks) -> None:
        """Add one strip of queries."""
        if "distance_mass" in self._names:
            edges = (strip.position - self._smallest[:, None] + 1).maximum(strip.first)
            so_far = strip.mass_before(edges, blocks.sums).flatten(1, 2)
            mass = (so_far - torch.nn.functional.pad(so_far[1:], (0, 0, 0, 0, 0, 1))).clamp(min=0)
            self.sums["distance_mass"] += mass.sum(dim=-1).T.cpu()
            self.sums["distance_square"] += mass.square().sum(dim=-1).T.cpu()
        bins, counts = ((strip.position + strip.base) // self._width).unique_consecutive(return_counts=True)
        by_bin, rows = counts.tolist(), bins.cpu()
        if {"received_mass", "map_sum"} & self._names:
            cells, columns = self._cells(strip, blocks.sums, fill=0)
            mass = torch.stack([part.sum(dim=1) for part in cells.sum(dim=-1).split(by_bin, dim=1)], dim=1).cpu()
            if "received_mass" in self._names:
                self.sums["received_mass"][:, columns] += mass.sum(dim=1)
            if "map_sum" in self._names:
                self.sums["map_sum"][:, rows, columns] += mass
        if "map_max" in self._names:
            cells, columns = self._cells(strip, blocks.maxima, fill=HIDDEN)
            highest = torch.stack([part.amax(dim=1) for part in cells.amax(dim=-1).split(by_bin, dim=1)], dim=1)
            largest = self.sums["map_max"]
            largest[:, rows, columns] = largest[:, rows, columns].maximum(highest.exp2().double().cpu())

    def _cells(self, strip: _Strip, values: Tensor, *, fill: float) -> tuple[Tensor, slice]:
        """Values of blocks (K, G, t, block) by the bin they lie in, (H, t, bin, block in bin), and which bins."""
        blocks_in_bin = self._width // strip.block
        before = (strip.begin + strip.base) // strip.block % blocks_in_bin
        after = -(before + values.shape[-1]) % blocks_in_bin
        padded = torch.nn.functional.pad(values.flatten(0, 1), (before, after), value=fill)
        cells = padded.unflatten(-1, (-1, blocks_in_bin))
        start = (strip.begin + strip.base) // self._width
        return cells, slice(start, start + cells.shape[-2])
