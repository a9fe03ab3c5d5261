"""Every variable of ``/attention`` and ``/attention_profiles`` once more: dense, in float64, one query at a time.

Nothing here calls :mod:`probe`. Hooks take only what enters each attention module; queries and keys are computed from
that and the weights, and the n × n pattern of every head is written out. :func:`query_statistics` and
:func:`profile_statistics` then read it row by row. Variables are named as in ``probe.schema``; what does not exist is
NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

NAN = np.nan

ROUNDING = 1e-5
"""Weights that differ by less than this part of them may change places in single precision."""


class Entered(NamedTuple):
    """What entered one attention module in one forward; ``n_past`` columns came before, in a cache."""

    hidden_states: Tensor
    rotation: Tensor
    n_past: int


@contextmanager
def watched(model) -> Iterator[dict[int, list[Entered]]]:
    """What enters the attention modules of a model while this runs, by layer, one entry for each forward."""
    entered: dict[int, list[Entered]] = {}

    def keep(module, args, kwargs):
        cache = kwargs["past_key_values"]
        n_past = 0 if cache is None else int(cache.get_seq_length(module.layer_idx))
        seen = Entered(kwargs["hidden_states"].detach().clone(), kwargs["position_embeddings"].detach().clone(), n_past)
        entered.setdefault(module.layer_idx, []).append(seen)

    handles = [
        layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True, prepend=True) for layer in model.model.layers
    ]
    try:
        yield entered
    finally:
        for handle in handles:
            handle.remove()


def queries_and_keys(attention, forwards: Sequence[Entered]) -> tuple[np.ndarray, np.ndarray]:
    """Queries and keys of one layer as they enter the dot product, (row, column, head, head_dim) in float64.

    The forwards, each going on where the one before it stopped, are joined along ``column``. Keys are repeated for the
    heads that share them.
    """
    parts = [_prepared(attention, seen) for seen in forwards]
    query, key = (torch.cat(tensors, dim=1).double() for tensors in zip(*parts, strict=True))
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    return query.numpy(), key.numpy()


def _prepared(attention, seen: Entered) -> tuple[Tensor, Tensor]:
    """In the model's own dtype: rounded where the model rounds, before anything is computed in float64."""
    config = attention.config
    with torch.no_grad():
        query, key = (
            projection(seen.hidden_states).unflatten(-1, (-1, config.head_dim))
            for projection in (attention.q_proj, attention.k_proj)
        )
        if config.no_rope_layers[attention.layer_idx]:
            query, key = apply_rotary_emb(query, key, seen.rotation)
            if config.use_qk_norm:
                query, key = (_normalized(x, config.rms_norm_eps) for x in (query, key))
        elif config.attn_temperature_tuning:
            position = torch.arange(query.shape[1], dtype=torch.float32) + seen.n_past
            factor = 1 + config.attn_scale * torch.log1p(torch.floor((position + 1) / config.floor_scale))
            query = (query * factor[:, None, None]).to(query.dtype)
    return query, key


def _normalized(x: Tensor, eps: float) -> Tensor:
    values = x.float()
    return (values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def pattern(query: np.ndarray, key: np.ndarray, chunk_size: int | None) -> np.ndarray:
    """Attention weights (head, query, key) of one text from its (token, head, head_dim) queries and keys.

    NaN where a key is hidden: one that comes later, or that lies in another chunk where ``chunk_size`` is given.
    """
    n = len(query)
    scores = np.einsum("qhd,khd->hqk", query, key) / np.sqrt(query.shape[-1])
    for q in range(n):
        first = 0 if chunk_size is None else chunk_start(q, chunk_size)
        scores[:, q, :first] = -np.inf
        scores[:, q, q + 1 :] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.where(np.isneginf(scores), NAN, weights)


def patterns(model, entered: Mapping[int, Sequence[Entered]], row: int, columns: np.ndarray) -> dict[int, np.ndarray]:
    """The pattern of one text at every layer, (head, query, key): what stood in the ``columns`` of a row of a batch."""
    result = {}
    for layer, forwards in entered.items():
        query, key = queries_and_keys(model.model.layers[layer].self_attn, forwards)
        chunk_size = model.config.attention_chunk_size if model.config.no_rope_layers[layer] else None
        result[layer] = pattern(query[row, columns], key[row, columns], chunk_size)
    return result


def patterns_of_text(model, token_ids: Sequence[int]) -> dict[int, np.ndarray]:
    """The same from one forward of a text on its own."""
    with watched(model) as entered, torch.no_grad():
        model(torch.tensor([list(token_ids)]), use_cache=False)
    return patterns(model, entered, 0, np.arange(len(token_ids)))


def chunk_start(query: int, chunk_size: int) -> int:
    return query // chunk_size * chunk_size


def query_statistics(
    text: Mapping[int, np.ndarray],
    positions: Sequence[int],
    *,
    chunk_size: int,
    segments: Mapping[str, tuple[int, int]],
    offsets: Sequence[int],
    top_keys: int,
) -> dict[str, np.ndarray]:
    """Variables of ``/attention``, (query, layer, head, …), of one text for the queries at ``positions``.

    ``key_rank`` is given by two bounds, ``key_rank_low`` and ``key_rank_high``, that differ where weights are closer
    than single precision tells apart.
    """
    values: dict[str, list] = {}
    for q in positions:
        by_layer = [
            [row_statistics(head[q], q, chunk_size, list(segments.values()), offsets, top_keys) for head in layer]
            for layer in text.values()
        ]
        for name in by_layer[0][0]:
            values.setdefault(name, []).append([[head[name] for head in layer] for layer in by_layer])
    return {name: np.array(rows, np.float64) for name, rows in values.items()}


def row_statistics(
    row: np.ndarray,
    q: int,
    chunk_size: int,
    segments: Sequence[tuple[int, int]],
    offsets: Sequence[int],
    top_keys: int,
) -> dict[str, float | list[float]]:
    """Variables of one query of one head, from its weights by key."""
    visible = np.flatnonzero(~np.isnan(row))
    weight = row[visible]
    nonzero = weight[weight > 0]
    in_chunk = visible >= chunk_start(q, chunk_size)
    # Stable: among equal weights the lower position comes first.
    heaviest = np.argsort(-weight, kind="stable")[:top_keys]
    missing = [NAN] * (top_keys - len(heaviest))
    ranks = [key_rank_bounds(row, start, stop) for start, stop in segments]
    return {
        "entropy": float(-(nonzero * np.log(nonzero)).sum()),
        "sink_mass": weight_at(row, 0),
        "self_mass": weight_at(row, q),
        "previous_mass": weight_at(row, q - 1),
        "chunk_mass": float(weight[in_chunk].sum()),
        "far_mass": float(weight[~in_chunk].sum()),
        "mean_distance": float((weight * (q - visible)).sum()),
        "segment_mass": [float(np.nansum(row[start:stop])) for start, stop in segments],
        "key_rank_low": [low for low, _ in ranks],
        "key_rank_high": [high for _, high in ranks],
        "offset_mass": [weight_at(row, q - offset) for offset in offsets],
        "top_key": [float(visible[i]) for i in heaviest] + missing,
        "top_weight": [float(weight[i]) for i in heaviest] + missing,
    }


def weight_at(row: np.ndarray, key: int) -> float:
    """The weight of one key: 0 where it is hidden, NaN where the text has no such key."""
    if key < 0:
        return NAN
    return 0.0 if np.isnan(row[key]) else float(row[key])


def key_rank_bounds(row: np.ndarray, start: int, stop: int) -> tuple[float, float]:
    """How many visible keys are heavier than every visible key of a segment: surely, and at most."""
    segment = row[start:stop]
    if np.isnan(segment).all():
        return NAN, NAN
    heaviest = np.nanmax(segment)
    outside = np.concatenate([row[:start], row[stop:]])
    return float((outside > heaviest * (1 + ROUNDING)).sum()), float((outside > heaviest * (1 - ROUNDING)).sum())


def profile_statistics(
    text: Mapping[int, np.ndarray], positions: Sequence[int], *, map_size: int
) -> dict[str, np.ndarray]:
    """Variables of ``/attention_profiles``, (layer, head, …), of one text whose queries at ``positions`` are recorded.

    Distance bins, map cells and positions are those of this text alone.
    """
    by_layer = [[head_profile(head, positions, map_size) for head in layer] for layer in text.values()]
    return {name: np.array([[head[name] for head in layer] for layer in by_layer]) for name in by_layer[0][0]}


def head_profile(head: np.ndarray, positions: Sequence[int], map_size: int) -> dict[str, np.ndarray]:
    """Variables of one head, from its pattern (query, key)."""
    n, m = len(head), len(positions)
    starts = distance_bins(n)
    bin_of_distance = np.array([distance_bin(distance) for distance in range(n)])
    # Mass by (recorded query, bin): a distance that one query cannot reach counts as no mass in the mean.
    mass = np.zeros((m, len(starts)))
    width = bin_width(n, map_size)
    n_bins = -(-n // width)
    received = np.zeros(n_bins)
    n_pairs = np.zeros((n_bins, n_bins), np.int64)
    largest, total = np.zeros((n_bins, n_bins)), np.zeros((n_bins, n_bins))
    for i, q in enumerate(positions):
        keys = np.flatnonzero(~np.isnan(head[q]))
        weight, key_bin = head[q, keys], keys // width
        np.add.at(mass[i], bin_of_distance[q - keys], weight)
        np.add.at(received, key_bin, weight / m)
        np.add.at(n_pairs[q // width], key_bin, 1)
        np.add.at(total[q // width], key_bin, weight)
        np.maximum.at(largest[q // width], key_bin, weight)
    out_of_reach = np.array(starts) > max(positions)
    if m == n:
        error = np.zeros(len(starts))
    elif m == 1:
        error = np.full(len(starts), NAN)
    else:
        variance = ((mass - mass.mean(axis=0)) ** 2).sum(axis=0) / (m - 1)
        error = np.sqrt(variance / m * (1 - m / n))
    kept = np.full_like(head, NAN)
    kept[list(positions)] = head[list(positions)]
    return {
        "distance_mass": np.where(out_of_reach, NAN, mass.mean(axis=0)),
        "distance_error": np.where(out_of_reach, NAN, error),
        "received_mass": received,
        "map_max": np.where(n_pairs > 0, largest, NAN),
        "map_sum": np.where(n_pairs > 0, total, NAN),
        "pattern": kept,
    }


def distance_bin(distance: int) -> int:
    """0 for distance 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, and so on."""
    return int(distance).bit_length()


def distance_bins(n: int) -> list[int]:
    """The smallest distance of every bin that a text of ``n`` tokens has."""
    return [0, *(2**i for i in range(distance_bin(n - 1)))]


def bin_width(n: int, map_size: int) -> int:
    """The smallest power of two that covers ``n`` tokens with at most ``map_size`` bins."""
    width = 1
    while -(-n // width) > map_size:
        width *= 2
    return width
