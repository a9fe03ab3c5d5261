"""Statistics of attention from queries and keys, tile by tile: never an n × n tensor.

A tile holds the weights p of a few queries on a few keys, small enough to stay in a core's cache. With −log-sum-exp
appended to each query and 1 to each key, one matrix product gives log p, here to the base 2: on a CPU ``exp`` is a
hundred times slower where its result underflows, and ``exp2`` is not. One walk over the tiles leaves sums and maxima
over blocks of keys, masses before given keys (the edge of a distance bin, of a chunk, of a segment), and the heaviest
keys: :mod:`probe.tiles.compiled` on a CPU, :mod:`probe.tiles.walk` elsewhere.

Tensors in, tensors out; everything in float32. Heads that share a key head are kept together, so that keys are never
repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from probe.tiles import walk as plain
from probe.tiles.strip import ALIGNMENT, HIDDEN, TILE_KEYS, Attending, Scratch, Strip
from probe.tiles.walk import Sought, Walked, normalized

BLOCK = 64
"""Keys in one block, unless a map has finer cells."""

TILE_QUERIES = 256
TILE_WEIGHTS = {"cpu": 1 << 20}
"""Weights in one tile, all its heads together, by kind of device: on a CPU 4 MB, fewer are not worth their calls."""

TILES_PER_THREAD = 4
"""Fewer tiles of queries are not worth a thread."""

START_SECONDS = 60
"""Threads that have not started by then have met with an interrupt: nobody waits for them."""

TILE_WEIGHTS_ELSEWHERE = 1 << 24
"""On an accelerator larger tiles pay for the launches."""

T = TypeVar("T")
R = TypeVar("R")


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


@dataclass
class Reduced:
    """What :func:`reduce_attention` returns.

    ``rows``: statistics of each query, float32 (m, H) or (m, H, segment | offset | slot). ``sums``: over queries, in
    float64 and on the CPU: ``distance_mass`` and ``distance_square`` (H, distance_bin), ``received_mass`` (H, key_bin),
    ``map_sum`` and ``map_max`` (H, query_bin, key_bin).
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


NEED_WALK = {
    "entropy", "chunk_mass", "far_mass", "segment_mass", "key_rank", "mean_distance", "top_key",
    "distance_mass", "received_mass", "map_sum", "map_max",
}  # fmt: skip
"""Statistics that more than a few known keys have a part in."""


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
    before = attending.key_start % ALIGNMENT
    n_keys = before + key.shape[1]
    # One more channel carries the log-sum-exp.
    keys = key.new_zeros(len(key), -(-n_keys // ALIGNMENT) * ALIGNMENT, key.shape[-1] + 1)
    keys[:, before:n_keys, :-1], keys[:, :, -1] = key, 1
    query_heads = slice(key_heads.start * shared, (key_heads.start + len(key)) * shared)
    query = attending.query[query_heads].float() * (attending.scaling / math.log(2))
    tile_keys = min(keys.shape[1], TILE_KEYS)
    n_rows = max(TILE_QUERIES, _tile_weights(query.device) // (tile_keys * len(query)))
    tiles = list(query_tiles(attending.position, attending.first, n_rows))

    def reduce_tiles(tiles: list[slice]) -> tuple[list[dict[str, Tensor]], _Totals]:
        totals, scratch = _Totals(attending, wanted, len(query)), Scratch(query)
        with torch.no_grad():  # a thread has a mode of its own
            rows = [
                _reduce_strip(
                    Strip(attending, query[:, tile], keys, tile, query_heads, shared, block, scratch), wanted, totals
                )
                for tile in tiles
            ]
        return rows, totals

    # Each thread takes every n-th tile, because later queries see more keys.
    n_threads = _n_threads(len(tiles), query.device)
    done = _in_threads(reduce_tiles, [tiles[thread::n_threads] for thread in range(n_threads)])
    rows = [done[index % n_threads][0][index // n_threads] for index in range(len(tiles))]
    names = rows[0].keys()
    return Reduced(
        {name: torch.cat([part[name] for part in rows], dim=1).transpose(0, 1) for name in names},
        _Totals.together([totals for _, totals in done]),
    )


def _n_threads(n_tiles: int, device: torch.device) -> int:
    """Threads that are worth their start."""
    return min(torch.get_num_threads(), n_tiles // TILES_PER_THREAD) or 1 if device.type == "cpu" else 1


def _in_threads(function: Callable[[T], R], parts: list[T]) -> list[R]:
    """What ``function`` returns of each part, each in a thread of its own.

    torch would split every small operation among its own threads, which cost more than they gain, and spin on the
    cores that these threads need. So each of them is told to use one; other threads keep what they have.
    """
    if len(parts) == 1:
        return [function(parts[0])]
    n_threads = torch.get_num_threads()
    ready = Barrier(len(parts) + 1)

    def alone() -> None:
        # Of the calling thread, and of threads that have not used torch yet: for these it is put right below.
        torch.set_num_threads(1)
        ready.wait(START_SECONDS)

    with ThreadPoolExecutor(len(parts), thread_name_prefix="probe-tiling", initializer=alone) as pool:
        done = [pool.submit(function, part) for part in parts]
        try:
            ready.wait(START_SECONDS)
        finally:
            torch.set_num_threads(n_threads)
        return [one.result() for one in done]


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


def _reduce_strip(strip: Strip, wanted: Wanted, totals: _Totals) -> dict[str, Tensor]:
    """Statistics of each query of a strip, (H, t, …), and what it adds to the totals."""
    rows = _nearby(strip, wanted)
    if NEED_WALK & wanted.names:
        segments = torch.tensor(wanted.segments, dtype=torch.int64, device=strip.position.device).view(-1, 2)
        segments -= strip.base
        n_far, n_ends = 1, segments.numel()
        edges = torch.cat(
            [strip.chunk_start[None], segments.flatten()[:, None].expand(-1, strip.shape[-1]), totals.edges(strip)]
        )
        edges = edges.maximum(strip.first).minimum(strip.position + 1)
        if "key_rank" in wanted.names and wanted.segments:
            heaviest = strip.heaviest(segments.tolist())
        else:
            heaviest = strip.query.new_zeros(*strip.shape, 0)
        walked = _walk(strip)(strip, Sought(wanted.names, edges, heaviest, wanted.top_keys))
        total = walked.sums.sum(dim=-1)
        walked = normalized(walked, total)
        rows = {
            name: weight / (total if weight.ndim == total.ndim else total[..., None]) for name, weight in rows.items()
        }
        far, ends, by_distance = walked.before.split([n_far, n_ends, len(edges) - n_far - n_ends])
        start, stop = ends.unflatten(0, (-1, 2)).unbind(dim=1)
        rows |= {
            "entropy": walked.entropy.clamp(min=0) * math.log(2),
            "mean_distance": walked.mean_distance.clamp(min=0),
            "far_mass": far[0],
            "chunk_mass": (1 - far[0]).clamp(min=0),
            "segment_mass": (stop - start).clamp(min=0).movedim(0, -1),
            # No key of the segment is visible where it has no heaviest.
            "key_rank": walked.rank.masked_fill(heaviest == HIDDEN, torch.nan),
            "top_key": walked.top_key + strip.base,
            "top_weight": walked.top_weight,
        }
        totals.add(strip, walked, by_distance)
    return {name: values.flatten(0, 1) for name, values in rows.items() if name in wanted.names}


def _walk(strip: Strip) -> Callable[[Strip, Sought], Walked]:
    """How to walk on the strip's device."""
    if strip.query.device.type != "cpu":
        return plain.walk
    from probe.tiles import compiled  # numba takes a moment to import

    return compiled.walk


def _nearby(strip: Strip, wanted: Wanted) -> dict[str, Tensor]:
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


class _Totals:
    """Sums over queries, added up strip by strip, in float64 and on the CPU: not every device has float64."""

    def __init__(self, attending: Attending, wanted: Wanted, n_heads: int) -> None:
        self._names, self._width = wanted.names, wanted.bin_width
        n_positions = int(attending.position[-1]) + 1
        self._smallest = torch.tensor(distance_bins(n_positions), device=attending.position.device)
        self._n_bins = n_bins = -(-n_positions // self._width)
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

    @staticmethod
    def together(parts: list[_Totals]) -> dict[str, Tensor]:
        """The sums of totals of different strips, all together."""
        sums = parts[0].sums
        for part in parts[1:]:
            for name, values in part.sums.items():
                sums[name] = sums[name].maximum(values) if name == "map_max" else sums[name] + values
        return sums

    def edges(self, strip: Strip) -> Tensor:
        """Keys (distance_bin, t) that are nearer than each distance bin: masses before them tell the bins' masses."""
        smallest = self._smallest if "distance_mass" in self._names else self._smallest[:0]
        return strip.position - smallest[:, None] + 1

    def add(self, strip: Strip, walked: Walked, before: Tensor) -> None:
        """Add one strip of queries; ``before`` (distance_bin, K, G, t) is the mass before the :meth:`edges`."""
        if "distance_mass" in self._names:
            so_far = before.flatten(1, 2)
            mass = (so_far - torch.nn.functional.pad(so_far[1:], (0, 0, 0, 0, 0, 1))).clamp(min=0)
            self.sums["distance_mass"] += mass.sum(dim=-1).T.cpu()
            self.sums["distance_square"] += mass.square().sum(dim=-1).T.cpu()
        bins, counts = ((strip.position + strip.base) // self._width).unique_consecutive(return_counts=True)
        by_bin, rows = counts.tolist(), bins.cpu()
        if {"received_mass", "map_sum"} & self._names:
            cells, columns = self._cells(strip, walked.sums, fill=0)
            mass = torch.stack([part.sum(dim=1) for part in cells.sum(dim=-1).split(by_bin, dim=1)], dim=1).cpu()
            if "received_mass" in self._names:
                self.sums["received_mass"][:, columns] += mass.sum(dim=1)
            if "map_sum" in self._names:
                self.sums["map_sum"][:, rows, columns] += mass
        if "map_max" in self._names:
            cells, columns = self._cells(strip, walked.maxima, fill=HIDDEN)
            highest = torch.stack([part.amax(dim=1) for part in cells.amax(dim=-1).split(by_bin, dim=1)], dim=1)
            largest = self.sums["map_max"]
            largest[:, rows, columns] = largest[:, rows, columns].maximum(highest.exp2().double().cpu())

    def _cells(self, strip: Strip, values: Tensor, *, fill: float) -> tuple[Tensor, slice]:
        """Values of blocks (K, G, t, block) by the bin they lie in, (H, t, bin, block in bin), and which bins."""
        blocks_in_bin = self._width // strip.block
        before = (strip.begin + strip.base) // strip.block % blocks_in_bin
        after = -(before + values.shape[-1]) % blocks_in_bin
        padded = torch.nn.functional.pad(values.flatten(0, 1), (before, after), value=fill)
        cells = padded.unflatten(-1, (-1, blocks_in_bin))
        start = (strip.begin + strip.base) // self._width
        # A strip ends at a multiple of its alignment, which can lie beyond the text's last bin.
        cells = cells[..., : self._n_bins - start, :]
        return cells, slice(start, start + cells.shape[-2])
