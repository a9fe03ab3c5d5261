"""A recording of a planted router, as large as one likes, for benchmarks that need no model."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe import recording, schema

DOMAINS = ("code", "prose", "mathematics", "dialogue")
N_TOKEN_TYPES = 2000


def planted_recording(*, n_tokens: int, n_layers: int, n_experts: int, tokens_per_document: int = 500) -> xr.DataTree:
    """Top-1 routing with unequal loads that depend on the domain and the token; documents of unequal length."""
    random = np.random.default_rng(0)
    lengths = np.maximum(random.lognormal(np.log(tokens_per_document), 0.5, 2 * n_tokens // tokens_per_document), 1)
    ends = np.minimum(np.cumsum(lengths.astype(np.int64)), n_tokens)
    n_documents = int(np.searchsorted(ends, n_tokens)) + 1
    sizes = np.diff(ends[:n_documents], prepend=0)
    sample = np.repeat(np.arange(n_documents, dtype=np.uint32), sizes)
    domain = random.integers(len(DOMAINS), size=n_documents)
    token_id = random.zipf(1.3, n_tokens).clip(max=N_TOKEN_TYPES).astype(np.uint32)
    expert_index = np.empty((n_tokens, n_layers, 1), schema.expert_dtype(n_experts))
    for layer in range(n_layers):
        preferred = random.integers(n_experts, size=(len(DOMAINS), N_TOKEN_TYPES + 1), dtype=np.uint8)
        follows = random.random(n_tokens, dtype=np.float32) < 0.3
        anything = random.integers(n_experts, size=n_tokens, dtype=np.uint8)
        expert_index[:, layer, 0] = np.where(follows, preferred[domain[sample], token_id], anything)
    shape = (n_tokens, n_layers)
    rows = {
        "expert_index": expert_index,
        "router_logit": np.ones((*shape, 1), np.float16),
        "runner_up_index": (expert_index[..., 0] + 1) % n_experts,
        "router_margin": random.exponential(size=shape).astype(np.float16),
        "logit_logsumexp": random.normal(3, 1, size=shape).astype(np.float32),
        "sample": sample,
        "position": (np.arange(n_tokens) - np.repeat(ends[:n_documents] - sizes, sizes)).astype(np.uint32),
        "token_id": token_id,
        "modality": np.zeros(n_tokens, np.uint8),
        "phase": np.zeros(n_tokens, np.uint8),
    }
    attributes = dict.fromkeys(schema.ROOT_ATTRIBUTES, "") | {"schema_version": schema.SCHEMA_VERSION, "top_k": 1}
    return recording.build(
        rows,
        samples=[recording.Sample(f"document {at}", DOMAINS[domain[at]]) for at in range(n_documents)],
        probability_sum=np.full((n_documents, n_layers, n_experts), 1 / n_experts) * sizes[:, None, None],
        layout=recording.Layout(range(n_layers), [layer % 4 != 3 for layer in range(n_layers)], n_experts, 1),
        pieces={int(token): f"t{token}".encode() for token in np.unique(token_id)},
        attributes=attributes | {"model": "a planted router"},
    )
