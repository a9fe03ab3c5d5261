"""Recordings with a known truth, built without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probe import recording, schema

ATTRIBUTES = dict.fromkeys(schema.ROOT_ATTRIBUTES, "") | {"schema_version": schema.SCHEMA_VERSION, "top_k": 1}


def from_logits(
    logits: np.ndarray,
    *,
    lengths: Sequence[int],
    top_k: int = 1,
    domains: Sequence[str] | None = None,
    token_id: np.ndarray | None = None,
    layers: Sequence[int] | None = None,
    pieces: dict[int, bytes] | None = None,
) -> xr.DataTree:
    """A recording of the router logits (token, layer, expert), cut into samples of the given lengths."""
    n_tokens, n_layers, n_experts = logits.shape
    assert sum(lengths) == n_tokens
    order = np.argsort(-logits, axis=-1, kind="stable")
    ranked = np.take_along_axis(logits, order, axis=-1)
    sample = np.repeat(np.arange(len(lengths)), lengths)
    top = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - top)
    probability = weights / weights.sum(axis=-1, keepdims=True)
    probability_sum = np.zeros((len(lengths), n_layers, n_experts))
    np.add.at(probability_sum, sample, probability)
    token_id = np.zeros(n_tokens, np.uint32) if token_id is None else np.asarray(token_id, np.uint32)
    rows = {
        "expert_index": order[..., :top_k].astype(schema.expert_dtype(n_experts)),
        "router_logit": ranked[..., :top_k],
        "router_margin": (
            ranked[..., top_k - 1] - ranked[..., top_k] if top_k < n_experts else np.full(logits.shape[:2], np.nan)
        ),
        "logit_logsumexp": (top[..., 0] + np.log(weights.sum(axis=-1))).astype(np.float32),
        "sample": sample.astype(np.uint32),
        "position": np.concatenate([np.arange(length) for length in lengths] or [[]]).astype(np.uint32),
        "token_id": token_id,
        "modality": np.zeros(n_tokens, np.uint8),
        "phase": np.zeros(n_tokens, np.uint8),
    }
    if top_k < n_experts:
        rows["runner_up_index"] = order[..., top_k].astype(schema.expert_dtype(n_experts))
    layers = range(n_layers) if layers is None else layers
    return recording.build(
        rows,
        samples=[
            recording.Sample(f"sample {index}", domains[index] if domains else schema.NO_DOMAIN)
            for index in range(len(lengths))
        ],
        probability_sum=probability_sum,
        layout=recording.Layout(list(layers), [layer % 4 != 3 for layer in layers], n_experts, top_k),
        pieces=pieces or {int(value): f"t{value}".encode() for value in np.unique(token_id)},
        attributes=ATTRIBUTES | {"top_k": top_k},
    )


def from_experts(expert_index: np.ndarray, *, n_experts: int, **options) -> xr.DataTree:
    """A recording of the chosen experts (token, layer[, slot]); logits fall by one from slot to slot."""
    expert_index = np.asarray(expert_index)
    if expert_index.ndim == 2:
        expert_index = expert_index[..., None]
    top_k = expert_index.shape[-1]
    logits = np.full((*expert_index.shape[:2], n_experts), -5.0)
    np.put_along_axis(logits, expert_index, np.arange(top_k, 0, -1.0), axis=-1)
    return from_logits(logits, top_k=top_k, **options)
