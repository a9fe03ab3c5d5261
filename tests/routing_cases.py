"""Recordings for the tests of routing statistics, and the statistics by what they take."""

from __future__ import annotations

import functools
import inspect

import numpy as np
import xarray as xr

from probe import routing_stats
from tests.planted import from_experts, from_logits

ARGUMENTS = {"capacity": {"tokens_per_batch": 4}, "device_load": {"devices": 1}}
"""What a statistic must be told."""

ELSEWHERE = (
    "document_load",
    "saliency",
    "super_experts",
    "flips",
    "saturation",
    "compare",
    "token_contexts",
    "expert_card",
)
"""Those that read another group, or two recordings, or one place: tested in files of their own."""

STATISTICS = [
    functools.wraps(function)(functools.partial(function, **ARGUMENTS.get(name, {})))
    for name in routing_stats.__all__
    if name not in ELSEWHERE
    for function in [getattr(routing_stats, name)]
]
"""Every statistic of ``/routing`` alone."""

NEEDS_TWO_CHOICES = ("coactivation",)
NEEDS_PROBABILITIES = ("balance_loss",)
"""Statistics of a whole recording, unless ``/routing`` holds ``all_logits``."""

SPLITTABLE = [function for function in STATISTICS if "by" in inspect.signature(function).parameters]
RESAMPLING = [function for function in STATISTICS if "n_resamples" in inspect.signature(function).parameters]


def by_name(function):
    return function.__name__


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(actual, expected, **({"rtol": 1e-12, "atol": 1e-12} | tolerance))


def small(domains=("code", "prose", "code"), **options) -> xr.DataTree:
    """Three samples of 3, 0 and 2 tokens through MoE layers 1 and 3, three experts."""
    chosen = [[0, 2], [0, 1], [1, 2], [2, 2], [0, 2]]
    return from_experts(np.array(chosen), n_experts=3, lengths=[3, 0, 2], domains=domains, layers=[1, 3], **options)


def random_recording(seed=0, *, lengths=(9, 1, 0, 14, 6), top_k=1, n_experts=5, **options) -> xr.DataTree:
    """Unequal samples of two domains, experts of very unequal load, token ids that repeat, layers 1, 3 and 5."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(sum(lengths), 3, n_experts)) + np.linspace(2, -2, n_experts)
    options = {"domains": [f"domain {index % 2}" for index in range(len(lengths))], "layers": [1, 3, 5]} | options
    ids = random.integers(6, size=sum(lengths))
    return from_logits(logits, lengths=lengths, top_k=top_k, token_id=ids, **options)


def routing_of(recording: xr.DataTree) -> xr.Dataset:
    return recording["routing"].to_dataset()


def with_phase(recording: xr.DataTree, phase) -> xr.Dataset:
    routing = routing_of(recording)
    return routing.assign_coords(phase=("token", np.asarray(phase, np.uint8), routing["phase"].attrs))


def in_groups(routing: xr.Dataset, by: str):
    """Each label of ``by`` with the Dataset of its tokens alone, those without tokens included."""
    coord = routing[by]
    for code, label in enumerate(coord.attrs["categories"]):
        yield label, routing.isel(token=np.flatnonzero(coord.values == code))


def in_order(routing: xr.Dataset, samples) -> xr.Dataset:
    """The same rows with the samples in another order."""
    return routing.isel(token=np.concatenate([np.flatnonzero(routing["sample"].values == s) for s in samples]))
