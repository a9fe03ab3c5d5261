"""Small recordings of every shape, made from a seed: unequal samples, equal logits, dense layers, empty groups."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr

from probe import schema
from tests.planted import from_logits

N_RECORDINGS = 200
MOST_TOKENS = 60
SPECIAL = {29: (128, 8), 40: (128, 1), 81: (128, 2), 102: (16, 16), 161: (300, 2)}
"""Experts, and how many of them a token chooses, where there are many, in two layers; 300 experts need uint16."""


class Case(NamedTuple):
    """A recording, the same tokens with some decisions changed, and other tokens of the same layers and experts."""

    seed: int
    recording: xr.DataTree
    perturbed: xr.DataTree
    other: xr.DataTree


def random_case(seed: int) -> Case:
    random = np.random.default_rng([2024, seed])
    n_experts = int(random.choice([1, 2, 3, 4, 5, 6, 8, 16]))
    top_k = min(int(random.choice([1, 2, 3, n_experts if n_experts <= 8 else 4])), n_experts)
    n_layers = int(random.integers(1, 6))
    if seed in SPECIAL:
        (n_experts, top_k), n_layers = SPECIAL[seed], 2
    layers = np.cumsum(random.integers(1, 4, size=n_layers)) - 1
    names = [f"domain {number}" for number in range(random.integers(1, 4))]
    shape = {"top_k": top_k, "layers": layers.tolist()}

    lengths, domains = _texts(random, names)
    logits = _logits(random, (sum(lengths), n_layers, n_experts))
    columns = _columns(random, lengths)
    changed = _changed(random, logits)
    recording = _recording(logits, columns, lengths=lengths, domains=domains, **shape)
    perturbed = _recording(changed, columns, lengths=lengths, domains=domains, **shape)
    lengths, domains = _texts(random, names)
    logits = _logits(random, (sum(lengths), n_layers, n_experts))
    other = _recording(logits, _columns(random, lengths), lengths=lengths, domains=domains, **shape)
    return Case(seed, with_outputs(recording, random), perturbed, other)


def _texts(random: np.random.Generator, names: list[str]) -> tuple[list[int], list[str]]:
    """Lengths from 0 and 1 to many, and domains, of which one may belong to an empty sample alone."""
    n_samples = int(random.integers(0, 9))
    lengths = random.choice([0, 1, 2, 3, 5, 8, 13, 21, 34], size=n_samples)
    while lengths.sum() > MOST_TOKENS:
        lengths[lengths.argmax()] //= 2
    domains = random.choice(names, size=n_samples).tolist()
    for number in np.flatnonzero(lengths == 0)[:1]:
        domains[number] = "without a token"
    return lengths.tolist(), domains


def _logits(random: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Router logits that prefer some experts; in every third recording whole numbers, so that many are equal."""
    preference = random.normal(size=shape[1:]) * random.choice([0, 2])
    logits = random.normal(size=shape) * random.choice([0.5, 1, 3]) + preference
    return np.round(logits) if random.integers(3) == 0 else logits


def _changed(random: np.random.Generator, logits: np.ndarray) -> np.ndarray:
    """The same logits but for some decisions: new ones, and pairs of experts that changed places."""
    changed = logits.copy()
    anew = random.random(logits.shape[:2]) < random.choice([0, 0.1, 0.5])
    changed[anew] = random.normal(size=(int(anew.sum()), logits.shape[2]))
    if logits.shape[2] > 1:
        swapped = np.argwhere(random.random(logits.shape[:2]) < 0.2)
        for token, layer in swapped:
            one, two = np.argsort(-changed[token, layer], kind="stable")[:2]
            changed[token, layer, [one, two]] = changed[token, layer, [two, one]]
    return changed


def _columns(random: np.random.Generator, lengths: list[int]) -> dict[str, np.ndarray]:
    """Token ids of which few exist, and phases: cut in two within a sample, or in any order."""
    n_tokens = sum(lengths)
    if random.integers(2):
        cut = random.integers(0, np.asarray(lengths, int) + 1)
        phase = np.concatenate([np.arange(n) >= start for n, start in zip(lengths, cut, strict=True)] or [[]])
    else:
        phase = random.integers(0, 2, size=n_tokens)
    ids = random.choice([3, 5, 8, 200_000], size=n_tokens, p=[0.5, 0.3, 0.15, 0.05])
    columns = {"token_id": ids, "phase": phase.astype(np.uint8)}
    if random.integers(3):
        columns["predicted_id"] = random.choice([3, 5, 7], size=n_tokens).astype(np.uint32)
    return columns


def _recording(logits: np.ndarray, columns: dict[str, np.ndarray], **options) -> xr.DataTree:
    recording = from_logits(logits, token_id=columns["token_id"], **options)
    routing = recording["routing"].to_dataset()
    routing = routing.assign_coords(phase=("token", columns["phase"], routing["phase"].attrs))
    if "predicted_id" in columns:
        extra = schema.dataset("routing", {"predicted_id": columns["predicted_id"]})
        routing = routing.assign(predicted_id=extra["predicted_id"])
    recording["routing"] = xr.DataTree(routing)
    return recording


def with_outputs(recording: xr.DataTree, random: np.random.Generator) -> xr.DataTree:
    """The recording with a group ``/experts``; one output may be far larger than all others."""
    samples = recording["samples"].to_dataset()
    counts = samples["expert_count"].values
    norm = np.where(counts > 0, counts * random.lognormal(size=counts.shape), 0)
    largest = random.lognormal(size=counts.shape)
    used = np.argwhere(counts)
    if len(used) and random.integers(2):
        largest[*random.choice(used)] = 1000
    experts = schema.dataset(
        "experts",
        {
            "saliency_sum": norm,
            "output_norm_sum": norm,
            "output_max": np.where(counts > 0, largest, np.nan),
            **{name: samples[name].values for name in ("sample", "layer", "attention_kind", "expert")},
        },
        categories={"attention_kind": schema.ATTENTION_KINDS},
    )
    recording["experts"] = xr.DataTree(experts)
    return recording
