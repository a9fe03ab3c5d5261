"""The document bootstrap: what its pieces compute, and that its intervals cover the truth where others do not."""

from __future__ import annotations

import numpy as np
import pytest

from probe import routing_stats
from probe.bootstrap import Bootstrap, design_effect, divide, resampled_sums, share
from tests.planted import from_experts

N_EXPERTS, N_DOCUMENTS, LENGTH = 8, 60, 100
LOAD = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])


def correlated_documents(seed: int, *, concentration: float = 9.0) -> np.ndarray:
    """Experts (token, layer 0) of documents that each prefer experts of their own.

    A document draws its own shares from a Dirichlet around ``LOAD``: its tokens have a correlation of
    1 / (concentration + 1), so variances are 1 + (LENGTH - 1) / (concentration + 1) times those of independent tokens.
    """
    random = np.random.default_rng(seed)
    shares = random.dirichlet(concentration * LOAD, size=N_DOCUMENTS)
    return np.concatenate([random.choice(N_EXPERTS, p=own, size=LENGTH) for own in shares])[:, None]


def interval_of(chosen: np.ndarray, **options):
    recording = from_experts(chosen, n_experts=N_EXPERTS, lengths=[LENGTH] * N_DOCUMENTS)
    return routing_stats.load_interval(recording, **options).isel(layer=0)


def test_weights_draw_as_many_documents_as_there_are():
    weights = Bootstrap(n_resamples=200, seed=1).weights(7)
    assert weights.shape == (200, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(6 / 7, rel=0.1), "multinomial, not one of each"
    assert np.array_equal(weights, Bootstrap(n_resamples=200, seed=1).weights(7)), "a seed gives the same draws again"
    assert not np.array_equal(weights, Bootstrap(n_resamples=200, seed=2).weights(7))


def test_resampled_sums_by_hand():
    per_document = np.array([[[1, 2]], [[10, 20]], [[100, 200]]])
    weights = np.array([[1, 1, 1], [0, 3, 0], [2, 0, 1]], np.float32)
    assert resampled_sums(weights, per_document).tolist() == [[[111, 222]], [[30, 60]], [[102, 204]]]


def test_percentiles_are_those_of_numpy_and_leave_missing_draws_out():
    values = np.random.default_rng(0).normal(size=(101, 4))
    values[::3, 1] = np.nan
    values[1:, 2] = np.nan
    values[:, 3] = np.nan
    lower, upper = Bootstrap(level=0.9).percentiles(values)
    for column in (0, 1, 2):
        assert lower[column] == pytest.approx(np.nanquantile(values[:, column], 0.05))
        assert upper[column] == pytest.approx(np.nanquantile(values[:, column], 0.95))
    assert np.isnan([lower[3], upper[3]]).all()


def test_division_by_nothing_is_undefined():
    assert np.array_equal(divide(np.array([1, 0, 3]), np.array([2, 0, 0])), [0.5, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(share(np.array([[1, 3], [0, 0]])), [[0.25, 0.75], [np.nan, np.nan]], equal_nan=True)


def test_design_effect_by_hand():
    counts = np.array([[50, 50, 0], [25, 75, 0], [100, 0, 0]])
    binomial = np.array([0.5 * 0.5, 0.25 * 0.75, 0]) / 100
    variance = np.array([[4 * binomial[0], 4 * binomial[0], 0], [0.1 * binomial[1], 0.1 * binomial[1], 0], [0, 0, 0]])
    # four times as variable; never below 1; one expert took all: a document is worth one choice
    assert design_effect(counts, variance, 10) == pytest.approx([4, 1, 10])


def test_the_design_effect_of_planted_correlation_is_found():
    documents = correlated_documents(0).reshape(N_DOCUMENTS, LENGTH)
    per_document = np.stack([np.bincount(own, minlength=N_EXPERTS) for own in documents])[:, None]
    bootstrap = Bootstrap()
    resampled = share(resampled_sums(bootstrap.weights(N_DOCUMENTS), per_document))
    effect = design_effect(per_document.sum(axis=0), resampled.var(axis=0), N_DOCUMENTS)
    assert effect[0] == pytest.approx(1 + (LENGTH - 1) / 10, rel=0.35)


def test_unequal_documents_are_resampled_as_a_ratio():
    """Two documents of 20 and 5 tokens: a draw of both has a load of 5/25, never the mean of 1/20 and 4/5."""
    chosen = np.array([0] + [1] * 19 + [0] * 4 + [1])[:, None]
    recording = from_experts(chosen, n_experts=2, lengths=[20, 5])
    interval = routing_stats.load_interval(recording, level=0.9)
    np.testing.assert_allclose(interval["lower"][0], [1 / 20, 1 / 5])
    np.testing.assert_allclose(interval["upper"][0], [4 / 5, 19 / 20])
    middle = routing_stats.load_interval(recording, level=0.2)
    np.testing.assert_allclose(middle["lower"][0], [5 / 25, 20 / 25])
    np.testing.assert_allclose(middle["upper"][0], [5 / 25, 20 / 25])


def test_correlated_documents_widen_the_interval():
    chosen = correlated_documents(0)
    interval = interval_of(chosen)
    load = interval["load"].values
    binomial = 2 * 1.96 * np.sqrt(load * (1 - load) / len(chosen))
    assert ((interval["upper"] - interval["lower"]).values > 2 * binomial).all()
    shuffled = np.random.default_rng(0).permutation(chosen)
    independent = interval_of(shuffled)
    assert ((independent["upper"] - independent["lower"]).values < 1.4 * binomial).all()


def test_a_higher_level_is_wider_and_holds_the_lower_one():
    chosen = correlated_documents(0)
    wide, narrow = interval_of(chosen, level=0.99), interval_of(chosen, level=0.5)
    assert (wide["lower"] < narrow["lower"]).all() and (narrow["upper"] < wide["upper"]).all()


def test_document_intervals_cover_and_token_intervals_do_not():
    """95 % intervals of 100 planted recordings: at least 90 % by documents hold the truth, far fewer by tokens do."""
    by_document, by_token, violations = [], [], []
    largest = N_EXPERTS * LOAD.max() - 1
    for seed in range(100):
        chosen = correlated_documents(seed)
        interval = interval_of(chosen, n_resamples=300)
        by_document.append((interval["lower"].values <= LOAD) & (interval["upper"].values >= LOAD))
        load = interval["load"].values
        by_token.append(np.abs(load - LOAD) < 1.96 * np.sqrt(load * (1 - load) / len(chosen)))
        recording = from_experts(chosen, n_experts=N_EXPERTS, lengths=[LENGTH] * N_DOCUMENTS)
        result = routing_stats.imbalance(recording, n_resamples=300)
        violations.append(result["max_violation_lower"] <= largest <= result["max_violation_upper"])
    assert np.mean(by_document) > 0.9
    assert np.mean(by_token) < 0.6
    assert np.mean(violations) > 0.9


def test_the_interval_of_a_uniform_router_reaches_no_violation():
    """A maximum is biased upwards: plain percentiles would all lie above the truth, which is 0."""
    random = np.random.default_rng(0)
    for _ in range(10):
        chosen = random.integers(N_EXPERTS, size=(6000, 1))
        recording = from_experts(chosen, n_experts=N_EXPERTS, lengths=[LENGTH] * N_DOCUMENTS)
        result = routing_stats.imbalance(recording, n_resamples=300).isel(layer=0)
        assert result["max_violation_lower"] <= result["max_violation"] <= result["max_violation_upper"]
        assert result["max_violation_lower"] < 0.01
