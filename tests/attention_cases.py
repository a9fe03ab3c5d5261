"""Attention with a known truth, built without a model: chosen values, or those of random dense patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

from probe import schema
from tests.planted import from_experts

LAYERS = (0, 1, 2, 3)
"""One of these is NoPE, as in Llama 4."""


def is_nope(layer: int) -> bool:
    return layer % 4 == 3


def of_layers(layers: Sequence[int]) -> dict[str, np.ndarray]:
    return {"layer": np.array(layers), "attention_kind": np.array([int(is_nope(layer)) for layer in layers])}


def planted(
    statistics: Mapping[str, np.ndarray],
    *,
    positions: Sequence[Sequence[int]],
    layers: Sequence[int] = LAYERS,
    domains: Sequence[str] | None = None,
    chunk_size: int = 4,
    **columns,
) -> xr.Dataset:
    """``/attention`` of given values (query, layer, head, …), the queries of each sample being at given positions."""
    sample = np.repeat(np.arange(len(positions)), [len(own) for own in positions])
    position = np.concatenate([np.asarray(own, int) for own in positions] or [np.zeros(0, int)])
    names = sorted(set(domains)) if domains else [schema.NO_DOMAIN]
    codes = np.array([names.index(domain) for domain in domains]) if domains else np.zeros(len(positions), int)
    n_heads = next((np.shape(values)[2] for values in statistics.values() if np.ndim(values) > 2), 1)
    values = {
        "sample": sample,
        "position": position,
        "token_id": np.zeros(len(sample)),
        "domain": codes[sample].astype(np.uint8),
        "phase": np.zeros(len(sample), np.uint8),
        "head": np.arange(n_heads),
        **of_layers(layers),
        **statistics,
        **columns,
    }
    categories = {"domain": names, "phase": schema.PHASES, "attention_kind": schema.ATTENTION_KINDS}
    result = schema.dataset("attention", values, categories)
    return result.assign_attrs(chunk_size=chunk_size, queries=0, seed=0)


def same(value_by_sample: Sequence[float], *, n_layers: int = 4, n_heads: int = 2, n_queries: int = 1) -> np.ndarray:
    """Values (query, layer, head): one for all queries, layers and heads of a sample."""
    values = np.repeat(np.asarray(value_by_sample, float), n_queries)
    return np.broadcast_to(values[:, None, None], (len(values), n_layers, n_heads)).copy()


def dense_pattern(random: np.random.Generator, length: int, *, nope: bool, chunk_size: int) -> np.ndarray:
    """Weights (query, key) of a softmax of random scores over the visible keys; NaN where a key is hidden."""
    query, key = np.arange(length)[:, None], np.arange(length)
    visible = (key <= query) & (nope | (key >= query // chunk_size * chunk_size))
    weights = np.where(visible, np.exp(2 * random.normal(size=(length, length))), 0)
    weights /= weights.sum(axis=1, keepdims=True)
    return np.where(visible, weights, np.nan)


def query_statistics(pattern: np.ndarray, query: int, *, chunk_size: int, segments, offsets) -> dict[str, object]:
    """Every statistic of one row of a dense pattern."""
    row = pattern[query]
    keys = np.flatnonzero(~np.isnan(row))
    weight = {int(key): float(row[key]) for key in keys}
    chunk_start = query // chunk_size * chunk_size
    heaviest = max(weight, key=weight.get)
    inside = [[key for key in weight if start <= key < stop] for start, stop in segments]
    return {
        "entropy": -sum(p * np.log(p) for p in weight.values()),
        "sink_mass": weight.get(0, 0.0),
        "self_mass": weight[query],
        "previous_mass": weight.get(query - 1, 0.0) if query else np.nan,
        "chunk_mass": sum(p for key, p in weight.items() if key >= chunk_start),
        "far_mass": sum(p for key, p in weight.items() if key < chunk_start),
        "mean_distance": sum(p * (query - key) for key, p in weight.items()),
        "segment_mass": [sum(weight[key] for key in own) for own in inside],
        "key_rank": [
            sum(p > max(weight[key] for key in own) for p in weight.values()) if own else np.nan for own in inside
        ],
        "offset_mass": [weight.get(query - offset, 0.0) if query >= offset else np.nan for offset in offsets],
        "top_key": [heaviest],
        "top_weight": [weight[heaviest]],
    }


def random_recording(
    seed: int = 0,
    *,
    lengths: Sequence[int] = (9, 1, 0, 14, 6, 7, 5, 12),
    layers: Sequence[int] = LAYERS,
    n_heads: int = 3,
    chunk_size: int = 4,
    queries: int = 0,
) -> xr.DataTree:
    """A recording of random attention, with the segments "needle" (1, 3) and "end" (4, 6) and the offsets 2 and 3."""
    random = np.random.default_rng(seed)
    segments, offsets = {"needle": (1, 3), "end": (4, 6)}, [2, 3]
    rows, patterns, positions = [], [], []
    for length in lengths:
        whole = np.arange(length)
        kept = np.sort(random.choice(whole, queries, replace=False)) if 0 < queries < length else whole
        of_sample = [
            [dense_pattern(random, length, nope=is_nope(layer), chunk_size=chunk_size) for _ in range(n_heads)]
            for layer in layers
        ]
        options = {"chunk_size": chunk_size, "segments": list(segments.values()), "offsets": offsets}
        rows += [
            [[query_statistics(pattern, query, **options) for pattern in heads] for heads in of_sample]
            for query in kept.tolist()
        ]
        positions.append(kept)
        patterns.append(of_sample)
    token_id = random.integers(3, size=sum(lengths))
    first = np.concatenate([[0], np.cumsum(lengths)]).astype(int)
    names = [name for name, spec in schema.ATTENTION.items() if spec.dims[:3] == ("query", "layer", "head")]
    tail = {"segment_mass": (2,), "key_rank": (2,), "offset_mass": (2,), "top_key": (1,), "top_weight": (1,)}
    statistics = {
        name: np.array([[[head[name] for head in layer] for layer in row] for row in rows], float).reshape(
            len(rows), len(layers), n_heads, *tail.get(name, ())
        )
        for name in names
    }
    attention = planted(
        statistics,
        positions=positions,
        layers=layers,
        domains=[f"domain {number % 2}" for number in range(len(lengths))],
        chunk_size=chunk_size,
        token_id=np.concatenate([token_id[first[n] + own] for n, own in enumerate(positions)] or [np.zeros(0)]),
        next_token_loss=random.exponential(size=len(rows)),
        segment=list(segments),
        offset=np.array(offsets),
    ).assign_attrs(queries=queries)
    chosen = np.zeros((sum(lengths), 2), int)
    recording = from_experts(chosen, n_experts=2, lengths=lengths, layers=[1, 3], token_id=token_id)
    recording["attention"] = xr.DataTree(attention)
    recording["attention_profiles"] = xr.DataTree(random_profiles(patterns, positions, attention))
    return recording


def distance_bin(distance: int) -> int:
    return distance.bit_length()


def random_profiles(patterns: list, positions: list, attention: xr.Dataset, *, width: int = 4) -> xr.Dataset:
    """``/attention_profiles`` of dense patterns by sample, layer and head, of the queries at given positions."""
    filled = [number for number, own in enumerate(positions) if len(own)]
    longest = max((len(patterns[number][0][0]) for number in filled), default=0)
    n_bins, n_cells = distance_bin(max(longest - 1, 0)) + 1, -(-longest // width)
    shape = (len(filled), attention.sizes["layer"], attention.sizes["head"])
    distance, received = np.full((*shape, n_bins), np.nan), np.full((*shape, n_cells), np.nan)
    map_sum, map_max = np.full((2, *shape, n_cells, n_cells), np.nan)
    for profile, number in enumerate(filled):
        queries = [int(query) for query in positions[number]]
        for layer, heads in enumerate(patterns[number]):
            for head, pattern in enumerate(heads):
                place = (profile, layer, head)
                distance[place][: distance_bin(max(queries)) + 1] = 0
                received[place][: -(-len(pattern) // width)] = 0
                for query in queries:
                    for key in np.flatnonzero(~np.isnan(pattern[query])).tolist():
                        weight, cell = pattern[query, key], (query // width, key // width)
                        distance[place][distance_bin(query - key)] += weight / len(queries)
                        received[place][key // width] += weight / len(queries)
                        map_sum[place][cell] = np.nansum([map_sum[place][cell], weight])
                        map_max[place][cell] = np.nanmax([map_max[place][cell], weight])
    values = {
        "distance_mass": distance,
        "received_mass": received,
        "map_sum": map_sum,
        "map_max": map_max,
        "n_tokens": [len(patterns[number][0][0]) for number in filled],
        "n_queries": [len(positions[number]) for number in filled],
        "bin_width": [width] * len(filled),
        "sample_id": filled,
        "domain": np.zeros(len(filled), np.uint8),
        "head": attention["head"].values,
        "distance_bin": [0, *(2**power for power in range(n_bins - 1))],
        **of_layers(attention["layer"].values.tolist()),
    }
    categories = {"domain": [schema.NO_DOMAIN], "attention_kind": schema.ATTENTION_KINDS}
    return schema.dataset("attention_profiles", values, categories).assign_attrs(attention.attrs)
