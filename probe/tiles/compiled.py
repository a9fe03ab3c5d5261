"""The walk of :mod:`probe.tiles.walk` for CPUs: one compiled pass over a tile finds all that there is to find in it.

Plain tensor operations read a tile from the cache once for each statistic, and compute once more whatever an edge
cuts. Here the matrix product stays with torch, and a loop that numba compiles takes each weight into its hands once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from probe.tiles.strip import HIDDEN, Strip
from probe.tiles.walk import Sought, Walked

LANES = 64
"""Weights taken at once: a number that the compiler knows, so that it keeps them in vectors."""

_HIDDEN = np.float32(HIDDEN)
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_LEAST = np.float32(-126)
"""Weights under the smallest normal number, 2⁻¹²⁶, count as 0."""

_E1, _E2, _E3, _E4, _E5, _E6 = (np.float32(np.log(2) ** n / math.factorial(n)) for n in range(1, 7))
_BIAS, _MANTISSA = np.int32(127), np.int32(23)
_NO_EDGE = 1 << 62
_VECTOR = 8


_F4, _F8, _I8 = numba.float32, numba.float64, numba.int64
_ROWS = _F4[:, ::1]
_SIGNATURE = numba.void(
    _F4[:, :, ::1], _I8, _I8, _I8, _I8[::1], _I8[::1], _I8[:, ::1], _ROWS,
    _ROWS, _ROWS, _F8[::1], _I8[::1], _ROWS, _F8[::1], _F8[::1], _ROWS, _I8[:, ::1], _ROWS,
)  # fmt: skip


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """``function`` compiled, and kept on disk where there is a place to keep it."""
    # Sums may be reordered, which vectorises them; NaN and infinity are left alone.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    try:
        return numba.njit(_SIGNATURE, cache=True, **options)(function)
    except Exception:  # whatever is wrong with the cache (no place, no room, a damaged file) is no reason to stop
        return numba.njit(_SIGNATURE, **options)(function)


@_compiled
def _walk_tile(  # type: ignore[no-untyped-def]  # numba's types are above
    log_weight, start, begin, block, position, first, edges, heaviest,
    sums, maxima, running, at_edge, before, entropy, mean_distance, rank, top_key, top_weight,
):  # fmt: skip
    """Take one tile's log2 weights (row, group, LANES) into the results; of position and edges there are t rows."""
    n_queries, n_edges, n_segments, n_slots = len(position), edges.shape[1], heaviest.shape[1], top_key.shape[1]
    logs, weight, partial = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(_VECTOR, np.float32)
    exponent = np.empty(LANES, np.int32)
    power = exponent.view(np.float32)
    for row in range(len(log_weight)):
        query = row % n_queries
        last, earliest, edge = position[query], first[query], at_edge[row]
        next_edge = edges[query, edge] if edge < n_edges else _NO_EDGE
        for group in range(log_weight.shape[1]):
            low = start + group * LANES
            if low > last or low + LANES <= earliest:
                continue
            for i in range(LANES):
                logs[i] = log_weight[row, group, i]
            if low + LANES - 1 > last or low < earliest:
                for i in range(LANES):
                    if low + i > last or low + i < earliest:
                        logs[i] = _HIDDEN

            # A maximum over lanes does not vectorise, one of lane by lane does.
            partial[:] = _HIDDEN
            for i in range(0, LANES, _VECTOR):
                for lane in range(_VECTOR):
                    partial[lane] = logs[i + lane] if logs[i + lane] > partial[lane] else partial[lane]
            highest = _HIDDEN
            for lane in range(_VECTOR):
                highest = max(highest, partial[lane])

            # 2^x = 2^n · 2^(x - n) for the whole number n next to x: an exponent's bits, and Taylor's series.
            for i in range(LANES):
                x = logs[i] if logs[i] > _LEAST else _LEAST
                whole = np.int32(x - _HALF)
                part = x - np.float32(whole)
                weight[i] = _ONE + part * (_E1 + part * (_E2 + part * (_E3 + part * (_E4 + part * (_E5 + part * _E6)))))
                exponent[i] = (whole + _BIAS) << _MANTISSA
            total, bits, inner = _ZERO, _ZERO, _ZERO
            for i in range(LANES):
                mass = weight[i] * power[i] if logs[i] > _LEAST else _ZERO
                weight[i] = mass
                total += mass
                bits += mass * logs[i]
                inner += mass * np.float32(i)
            entropy[row] -= bits
            # Counted from the query, so that long texts lose no digits to their positions.
            mean_distance[row] += total * np.float64(last - low) - inner

            index = (low - begin) // block
            if block == LANES:
                sums[row, index], maxima[row, index] = total, highest
            else:
                for i in range(LANES):
                    sums[row, index + i // block] += weight[i]
                    maxima[row, index + i // block] = max(maxima[row, index + i // block], logs[i])
            for segment in range(n_segments):
                heavier = 0
                for i in range(LANES):
                    heavier += logs[i] > heaviest[row, segment]
                rank[row, segment] += heavier
            if highest > top_weight[row, n_slots - 1]:
                for i in range(LANES):
                    # Strictly heavier, so that the first of equals stays first.
                    slot = n_slots
                    while slot > 0 and logs[i] > top_weight[row, slot - 1]:
                        slot -= 1
                    for later in range(n_slots - 1, slot, -1):
                        top_key[row, later] = top_key[row, later - 1]
                        top_weight[row, later] = top_weight[row, later - 1]
                    if slot < n_slots:
                        top_key[row, slot], top_weight[row, slot] = low + i, logs[i]
            while next_edge < low + LANES:
                mass = _ZERO
                for i in range(next_edge - low):
                    mass += weight[i]
                before[row, edge] = running[row] + mass
                edge += 1
                next_edge = edges[query, edge] if edge < n_edges else _NO_EDGE
            running[row] += total
        at_edge[row] = edge


def walk(strip: Strip, sought: Sought) -> Walked:
    """Walk through a strip's keys once, tile after tile; the same as :func:`probe.tiles.walk.walk`, on a CPU."""
    n_rows = strip.query[..., 0].numel()
    position, first = strip.position.contiguous().numpy(), strip.first.contiguous().numpy()
    order = sought.edges.argsort(dim=0, stable=True)
    edges = np.ascontiguousarray(sought.edges.gather(0, order).T.numpy())
    heaviest = sought.heaviest.flatten(0, -2).contiguous().numpy()
    results = {
        "sums": np.zeros((n_rows, strip.n_blocks), np.float32),
        "maxima": np.full((n_rows, strip.n_blocks), _HIDDEN),
        "running": np.zeros(n_rows),
        "at_edge": np.zeros(n_rows, np.int64),
        "before": np.zeros((n_rows, len(order)), np.float32),
        "entropy": np.zeros(n_rows),
        "mean_distance": np.zeros(n_rows),
        "rank": np.zeros(heaviest.shape, np.float32),
        "top_key": np.zeros((n_rows, sought.n_slots), np.int64),
        "top_weight": np.full((n_rows, sought.n_slots), _HIDDEN),
    }
    for start, _, log_weight in strip.products():
        tile = log_weight.flatten(0, 2).unflatten(-1, (-1, LANES)).numpy()
        _walk_tile(tile, start, strip.begin, strip.block, position, first, edges, heaviest, *results.values())
    # Nothing is heavier than NaN, so that the loop takes no account of it but in the entropy, where it adds up.
    broken = np.isnan(results["entropy"])
    for name in ("sums", "maxima", "running", "before", "mean_distance", "rank"):
        results[name][broken] = np.nan
    # Edges after the last visible block have everything before them.
    beyond = np.arange(len(order)) >= results["at_edge"][:, None]
    before = np.where(beyond, results["running"][:, None], results["before"]).astype(np.float32)
    is_none = results["top_weight"] == _HIDDEN
    top_key = np.where(is_none, np.nan, results["top_key"]).astype(np.float32)
    top_weight = np.where(is_none, np.nan, np.exp2(results["top_weight"]))

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.float32, copy=False)).unflatten(0, strip.shape)

    unsorted = torch.empty(len(order), *strip.shape)
    unsorted.scatter_(0, order[:, None, None].expand_as(unsorted), tensor(before).movedim(-1, 0))
    return Walked(
        tensor(results["sums"]), tensor(results["maxima"]), unsorted, tensor(results["entropy"]),
        tensor(results["mean_distance"]), tensor(results["rank"]), tensor(top_key), tensor(top_weight),
    )  # fmt: skip
