"""Every statistic of routing against :mod:`tests.brute_force`, value by value, on recordings of every shape."""

from __future__ import annotations

import functools
import inspect
import math
from itertools import product

import numpy as np
import pytest
import xarray as xr

from probe import ProbeError, routing_stats
from tests import brute_force
from tests.random_recordings import MOST_TOKENS, N_RECORDINGS, SPECIAL, Case, random_case

SPLITS = [None, "domain", ("domain", "phase")]
TURN = {"domain": 0, ("domain", "phase"): 1}
"""Every recording is compared as a whole; of these two splits, even seeds take the first and odd seeds the second."""

FEW = {"n_resamples": 2, "n_permutations": 1}
"""Intervals and permutations are not compared here, so that two draws do."""


@functools.cache
def case(seed: int) -> Case:
    return random_case(seed)


@functools.cache
def read(seed: int, which: str = "recording") -> brute_force.Recording:
    return brute_force.read(getattr(case(seed), which))


def over_all(check):
    """Run a check of one seed for every seed whose turn it is, and name the seed where it fails."""

    @functools.wraps(check)
    def of_all(**parameters):
        split = parameters.get("by")
        for seed in range(TURN[split], N_RECORDINGS, len(TURN)) if split in TURN else range(N_RECORDINGS):
            try:
                check(seed, **parameters)
            except Exception as error:
                raise AssertionError(f"random_case({seed}): {type(error).__name__}: {error}") from error

    of_all.__signature__ = inspect.Signature(list(inspect.signature(check).parameters.values())[1:])
    del of_all.__wrapped__
    return of_all


def computed(name: str, *recordings: xr.DataTree, **options):
    """A statistic of ``probe.routing_stats``, with as few draws as it can take."""
    function = getattr(routing_stats, name)
    few = {key: value for key, value in FEW.items() if key in inspect.signature(function).parameters}
    return function(*recordings, **few, **options)


def agree(actual: xr.DataArray, expected: brute_force.Values, *, rtol: float = 1e-9) -> None:
    """Same labels, same values; NaN where and only where brute force says so."""
    labels = list(product(*(actual[dim].values.tolist() for dim in actual.dims)))
    assert set(labels) == set(expected), f"{actual.name}: other labels"
    assert len(labels) == len(expected)
    np.testing.assert_allclose(
        actual.values.reshape(-1).astype(float),
        np.array([expected[label] for label in labels], float),
        rtol=rtol,
        atol=1e-12,
        err_msg=f"{actual.name} by {actual.dims}",
    )


def all_agree(actual: xr.Dataset, expected: dict[str, brute_force.Values]) -> None:
    for name, values in expected.items():
        agree(actual[name], values)


def test_the_recordings_have_every_shape():
    recordings = [read(seed) for seed in range(N_RECORDINGS)]
    assert {1, 2, 3} <= {recording.top_k for recording in recordings}
    assert any(recording.top_k == recording.n_experts > 1 for recording in recordings)
    assert {1, 128, 300} <= {recording.n_experts for recording in recordings}
    assert {len(recording.layers) for recording in recordings} == {1, 2, 3, 4, 5}
    assert {0, 1, 8} <= {len(recording.texts) for recording in recordings}
    assert any(0 in token.margin for recording in recordings for token in recording.tokens)
    filled = [{token.labels["domain"] for token in recording.tokens} for recording in recordings]
    assert any(0 < len(there) < len(r.labels["domain"]) for there, r in zip(filled, recordings, strict=True))
    assert any(np.diff(recording.layers).max(initial=0) > 1 for recording in recordings)
    assert all(len(recording.tokens) <= MOST_TOKENS for recording in recordings)
    # Of more than 200 experts with a token, two at least lie above the 99.5th percentile.
    outputs = [brute_force.read_outputs(case(seed).recording) for seed in SPECIAL]
    used = [{(output.layer, output.expert) for output in every if output.n_tokens} for every in outputs]
    largest = [max(output.output_max for output in every if output.n_tokens) for every in outputs]
    assert any(len(experts) > 200 and most == 1000 for experts, most in zip(used, largest, strict=True))


@pytest.mark.parametrize("by", [*SPLITS, "sample"])
@over_all
def test_expert_load(seed, by):
    agree(computed("expert_load", case(seed).recording, by=by), brute_force.expert_load(read(seed), by))


@pytest.mark.parametrize("by", [None, ("domain", "phase")])
@over_all
def test_load_interval(seed, by):
    actual = computed("load_interval", case(seed).recording, by=by)
    agree(actual["load"], brute_force.expert_load(read(seed), by))
    agree(actual["n_documents"], brute_force.n_documents(read(seed), by))


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_imbalance(seed, by):
    all_agree(computed("imbalance", case(seed).recording, by=by), brute_force.imbalance(read(seed), by))


@pytest.mark.parametrize("by", [None, "domain", "sample"])
@over_all
def test_balance_loss(seed, by):
    actual = computed("balance_loss", case(seed).recording, by=by)
    # Sums of probabilities are kept in float32: those of T tokens add up to T only nearly.
    agree(actual["balance_loss"], brute_force.balance_loss(read(seed), by), rtol=1e-6)


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_z_loss(seed, by):
    agree(computed("z_loss", case(seed).recording, by=by)["z_loss"], brute_force.z_loss(read(seed), by))


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_margin(seed, by):
    actual = computed("margin", case(seed).recording, by=by)
    all_agree(actual, brute_force.margin(read(seed), actual["quantile"].values.tolist(), by))


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_margin_histogram(seed, by):
    edges = [0, 0.25, 0.5, 1, 2]
    actual = computed("margin_histogram", case(seed).recording, bins=edges, by=by)
    agree(actual.assign_coords(margin_bin=range(4)), brute_force.margin_histogram(read(seed), edges, by))


@pytest.mark.parametrize("by", ["domain", ("domain", "phase")])
@over_all
def test_specialization(seed, by):
    all_agree(computed("specialization", case(seed).recording, by=by), brute_force.specialization(read(seed), by))


@pytest.mark.parametrize("of", ["domain", "token_id", "position", "phase"])
@over_all
def test_mutual_information(seed, of):
    actual = computed("mutual_information", case(seed).recording, of=of)
    all_agree(actual, brute_force.mutual_information(read(seed), of))


@pytest.mark.parametrize("of", ["input", "next", "predicted"])
@over_all
def test_vocabulary(seed, of):
    recording, min_count = case(seed).recording, 1 + seed % 6
    if of == "predicted" and "predicted_id" not in recording["routing"]:
        with pytest.raises(ProbeError, match="predicted_id"):
            computed("vocabulary", recording, of=of, min_count=min_count)
        return
    actual = computed("vocabulary", recording, of=of, min_count=min_count)
    expected, n_types = brute_force.vocabulary(read(seed), of, min_count)
    agree(actual["vocabulary"], expected)
    assert int(actual["n_types"]) == n_types


@over_all
def test_top_tokens(seed):
    min_count = 1 + seed % 6
    actual = computed("top_tokens", case(seed).recording, n=1000, min_count=min_count)
    expected = brute_force.top_tokens(read(seed), min_count)
    places = ("layer", "expert", "token_id")
    labels = list(zip(*(actual[name].values.tolist() for name in places), strict=True))
    assert len(set(labels)) == len(labels)
    for name, values in expected.items():
        np.testing.assert_allclose(
            actual[name].values, [values[label] for label in labels], rtol=1e-9, atol=1e-12, err_msg=name
        )
    # Whatever an expert took at least twice is listed.
    assert set(labels) == {label for label, count in expected["count"].items() if count >= 2}


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_repetition(seed, by):
    all_agree(computed("repetition", case(seed).recording, by=by), brute_force.repetition(read(seed), by))


@over_all
def test_transition(seed):
    all_agree(computed("transition", case(seed).recording), brute_force.transition(read(seed)))


@over_all
def test_paths(seed):
    n = (1, 3, 100)[seed % 3]
    layers = read(seed).layers[::2] if seed % 2 else None
    actual = computed("paths", case(seed).recording, layers=layers, n=n)
    every = brute_force.paths(read(seed), layers)
    expected = every[:n]
    assert int(actual["n_paths"]) == len(every)
    assert int(actual["n_tokens"]) == len(read(seed).tokens)
    assert actual["path"].values.tolist() == list(range(1, len(expected) + 1))
    assert actual["layer"].values.tolist() == (read(seed).layers if layers is None else layers)
    assert actual["expert"].transpose("path", "layer").values.tolist() == [list(path.expert) for path in expected]
    for name in ("count", "share", "expected", "lift"):
        agree(actual[name], {(rank,): getattr(path, name) for rank, path in enumerate(expected, start=1)})


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_coactivation(seed, by):
    if read(seed).top_k == 1:
        with pytest.raises(ProbeError, match="transition"):
            computed("coactivation", case(seed).recording, by=by)
        return
    actual = computed("coactivation", case(seed).recording, by=by)
    all_agree(actual, brute_force.coactivation(read(seed), by))
    assert float(actual["null"]) == pytest.approx((read(seed).top_k - 1) / (read(seed).n_experts - 1), rel=1e-12)


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_saturation(seed, by):
    actual = computed("saturation", case(seed).recording, case(seed).perturbed, by=by)
    all_agree(actual, brute_force.saturation(read(seed), read(seed, "perturbed"), by))


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_flips(seed, by):
    actual = computed("flips", case(seed).recording, case(seed).perturbed, by=by)
    all_agree(actual, brute_force.flips(read(seed), read(seed, "perturbed"), by))


@pytest.mark.parametrize("by", ["domain", ("domain", "phase")])
@over_all
def test_divergence_of_groups(seed, by):
    actual = computed("divergence", case(seed).recording, by=by)
    all_agree(actual, brute_force.divergence(read(seed), by))


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_divergence_of_recordings(seed, by):
    which = ("perturbed", "other")[seed // 2 % 2]
    actual = computed("divergence", case(seed).recording, getattr(case(seed), which), by=by)
    all_agree(actual, brute_force.divergence_between(read(seed), read(seed, which), by))


@over_all
def test_compare(seed):
    one, other = read(seed), read(seed, "perturbed")
    actual = computed("compare", case(seed).recording, case(seed).perturbed)
    all_agree(actual, brute_force.flips(one, other))
    agree(actual["flips_by_domain"], brute_force.flips(one, other, "domain")["flips"])
    agree(actual["load_shift"], brute_force.load_shift(one, other))
    agree(actual["divergence"], brute_force.divergence_between(one, other)["jensen_shannon"])
    edges = [*actual["margin_from"].values.tolist(), *actual["margin_to"].values.tolist()[-1:]]
    numbered = actual.assign_coords(margin_bin=range(actual.sizes["margin_bin"]))
    all_agree(numbered, brute_force.flips_by_margin(one, other, edges))


@over_all
def test_signature(seed):
    agree(computed("signature", case(seed).recording)["signature"], brute_force.signature(read(seed)))


@pytest.mark.parametrize("by", ["domain", "phase"])
@over_all
def test_signature_of_groups(seed, by):
    all_agree(computed("signature", case(seed).recording, by=by), brute_force.mean_signature(read(seed), by))


@over_all
def test_saliency(seed):
    outputs = brute_force.read_outputs(case(seed).recording)
    agree(computed("saliency", case(seed).recording)["saliency"], brute_force.saliency(read(seed), outputs))


@over_all
def test_super_experts(seed):
    actual = computed("super_experts", case(seed).recording)
    expected, *thresholds = brute_force.super_experts(read(seed), brute_force.read_outputs(case(seed).recording))
    all_agree(actual, expected)
    found = [float(actual[name]) for name in ("percentile_threshold", "share_threshold")]
    np.testing.assert_allclose(found, thresholds, rtol=1e-9)


@over_all
def test_capacity(seed):
    tokens_per_batch = (2, 7, 1000)[seed % 3]
    factors = (0.5, 1.0, 1.25, 2.0)
    actual = computed("capacity", case(seed).recording, tokens_per_batch=tokens_per_batch, capacity_factors=factors)
    quantiles = actual["quantile"].values.tolist()
    all_agree(actual, brute_force.capacity(read(seed), tokens_per_batch, factors, quantiles))
    assert int(actual["n_batches"]) == math.ceil(len(read(seed).tokens) / tokens_per_batch)


@pytest.mark.parametrize("placed", [False, True])
@over_all
def test_device_load(seed, placed):
    n_experts = read(seed).n_experts
    n_devices = next(n for n in (4, 3, 2, 5, 1) if n_experts % n == 0)
    device_of = [expert // (n_experts // n_devices) for expert in range(n_experts)]
    if placed:
        # Interleaved, and the first device holds more than the last.
        device_of = [max(expert % (n_devices + 1) - 1, 0) for expert in range(n_experts)]
    devices = device_of if placed else n_devices
    actual = computed("device_load", case(seed).recording, devices=devices, token_bytes=10)
    all_agree(actual, brute_force.device_load(read(seed), device_of, token_bytes=10))


@pytest.mark.parametrize("by", SPLITS)
@over_all
def test_distinct_experts(seed, by):
    sizes = (1, 2, 5, 16)
    actual = computed("distinct_experts", case(seed).recording, batch_sizes=sizes, by=by)
    all_agree(actual, brute_force.distinct_experts(read(seed), sizes, by))
    agree(actual["uniform"], brute_force.uniform_distinct_experts(read(seed), sizes))
