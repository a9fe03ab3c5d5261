"""The document bootstrap: what its pieces compute, and that its intervals cover the truth where others do not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from probe import bootstrap, routing_stats, schema
from probe.bootstrap import Bootstrap, carrying, design_effect, divide, effective_number, resampled_sums, share
from probe.schema import ProbeError
from tests.planted import from_experts, from_logits

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


def test_many_documents_are_summed_piece_by_piece(monkeypatch):
    random = np.random.default_rng(0)
    weights, per_document = random.integers(4, size=(6, 50)), random.integers(9, size=(50, 2, 3))
    whole = resampled_sums(weights, per_document)
    np.testing.assert_array_equal(whole, np.einsum("rd,dlc->rlc", weights, per_document))
    monkeypatch.setattr(bootstrap, "DOCUMENTS_AT_ONCE", 7)
    np.testing.assert_array_equal(resampled_sums(weights, per_document), whole)


def test_effective_number_by_hand():
    assert effective_number(np.array([[5, 1, 0], [5, 3, 0]])) == pytest.approx([2, 16 / 10, 0])


def test_the_rarer_side_carries():
    """Two documents hold the first category, all four the second; the third took nothing."""
    per_document = np.array([[[1, 9, 0]], [[1, 9, 0]], [[0, 10, 0]], [[0, 10, 0]]])
    assert carrying(per_document)[0] == pytest.approx([2, 2, 0])


def test_t_is_students():
    assert Bootstrap().t(5) == pytest.approx(2.776445, rel=1e-6)  # a printed table: 4 degrees of freedom, 97.5 %
    assert Bootstrap().t(np.inf) == pytest.approx(1.959964, rel=1e-6)
    assert Bootstrap(level=0.9).t(11) == pytest.approx(1.812461, rel=1e-6)


def test_independent_tokens_have_the_exact_interval():
    """Documents of one token: design effect 1 and hardly a t, so that Clopper–Pearson of 400 tokens is left."""
    chosen = np.repeat([0, 1, 2], [40, 160, 200])[:, None]
    recording = from_experts(chosen, n_experts=3, lengths=[1] * 400)
    interval = routing_stats.load_interval(recording, n_resamples=20_000).isel(layer=0)
    exact = [binomtest(count, 400).proportion_ci(0.95, method="exact") for count in (40, 160, 200)]
    np.testing.assert_allclose(interval["lower"], [bounds.low for bounds in exact], rtol=0.02)
    np.testing.assert_allclose(interval["upper"], [bounds.high for bounds in exact], rtol=0.02)


def test_withheld_intervals_say_why():
    few = interval_status([[0, 1]] * 4)
    assert few == ["withheld: fewer than 5 documents, or 3 in effect"] * 3
    # Expert 0 is in every document, expert 1 in a single one of ten, expert 2 in none.
    concentrated = interval_status([[0] * 10] * 9 + [[1] * 4 + [0] * 6])
    assert concentrated == ["withheld: rests on too few documents"] * 2 + ["unused: rule of three"]
    spread = interval_status([[0, 0, 1]] * 10)
    assert spread == ["given", "given", "unused: rule of three"]
    assert interval_status([[]] * 10) == ["no token"] * 3


def interval_status(documents: list[list[int]]) -> list[str]:
    chosen = np.array([expert for document in documents for expert in document], int)[:, None]
    recording = from_experts(chosen, n_experts=3, lengths=[len(document) for document in documents])
    result = routing_stats.load_interval(recording).isel(layer=0)
    status = schema.labels(result["interval_status"]).tolist()
    for name, at in (("lower", result["lower"].values), ("upper", result["upper"].values)):
        given = [entry.startswith(("given", "unused")) for entry in status]
        assert (~np.isnan(at)).tolist() == given, name
    return status


def test_one_document_as_long_as_all_others_gives_no_interval_of_anything():
    random = np.random.default_rng(0)
    lengths = [200] + [10] * 7
    recording = from_logits(random.normal(size=(270, 1, 8)), lengths=lengths)
    other = from_logits(random.normal(size=(270, 1, 8)), lengths=lengths)
    assert set(schema.labels(routing_stats.load_interval(recording)["interval_status"]).ravel()) == {
        "withheld: fewer than 5 documents, or 3 in effect"
    }
    for result, name in [
        (routing_stats.z_loss(recording), "upper"),
        (routing_stats.balance_loss(recording), "upper"),
        (routing_stats.distinct_experts(recording), "upper"),
        (routing_stats.imbalance(recording), "max_violation_upper"),
        (routing_stats.margin(recording), "margin_upper"),
        (routing_stats.compare(recording, other), "load_shift_upper"),
    ]:
        assert np.isnan(result[name]).all(), name


def test_bounds_stay_where_a_number_can_be():
    random = np.random.default_rng(0)
    recording = from_logits(3 * random.normal(size=(60, 2, 3)), lengths=[10] * 6, top_k=2, domains=["a", "b"] * 3)
    interval = routing_stats.load_interval(recording)
    assert (interval["upper"] <= 1 / 2).all(), "one of two choices is the most that an expert can get"
    everyone = from_experts(np.tile([[0, 1], [0, 2]], (30, 1))[:, None], n_experts=3, lengths=[10] * 6)
    assert routing_stats.load_interval(everyone)["upper"][0, 0] == 1 / 2
    distinct = routing_stats.distinct_experts(recording, batch_sizes=[1, 2])
    assert (distinct["upper"].values <= [2, 3]).all() and (distinct["lower"] >= 2).all()
    assert (routing_stats.balance_loss(recording)["upper"] <= 3).all()


@pytest.mark.parametrize(
    "options", [{"level": None}, {"level": "a"}, {"n_resamples": 2.5}, {"seed": -1}, {"seed": 0.5}]
)
def test_settings_of_a_wrong_kind_are_refused(options):
    with pytest.raises(ProbeError, match=next(iter(options))):
        Bootstrap(**options)


def test_the_one_expert_that_took_everything_is_bounded_from_below():
    recording = from_experts(np.zeros((60, 1), int), n_experts=2, lengths=[10] * 6)
    interval = routing_stats.load_interval(recording).isel(layer=0)
    bound = -np.log(0.05) * 10 / 60  # a document is worth one choice
    np.testing.assert_allclose(interval["lower"], [1 - bound, 0])
    np.testing.assert_allclose(interval["upper"], [1, bound])


def test_ratio_interval_is_that_of_its_logarithm():
    random = np.random.default_rng(0)
    tokens = random.integers(20, 60, size=300).astype(float)
    norms = tokens * random.gamma(9, 1 / 3, size=300)
    lower, upper = Bootstrap(n_resamples=4000).ratio_interval(norms, tokens)
    ratio = norms.sum() / tokens.sum()
    linearised = np.sqrt(np.square(norms - ratio * tokens).sum() * 300 / 299) / tokens.sum()
    reach = Bootstrap().t(effective_number(tokens)) * linearised / ratio
    assert np.log([lower, upper]) == pytest.approx(np.log(ratio) + np.array([-reach, reach]), rel=0.01)


def test_bounds_take_the_bias_off():
    resampled = np.array([[2.0], [4.0], [3.0]])  # mean 3, where the estimate is 2: noise added 1, and did so before
    lower, upper = Bootstrap(level=0.5).bounds(np.array([2.0]), resampled, 1e12)
    reach = Bootstrap(level=0.5).t(1e12) * np.sqrt(2 / 3)
    assert lower[0] == pytest.approx(1 - reach)
    assert upper[0] == 2.0, "the estimate itself is never outside"


def test_division_by_nothing_is_undefined():
    assert np.array_equal(divide(np.array([1, 0, 3]), np.array([2, 0, 0])), [0.5, np.nan, np.nan], equal_nan=True)
    assert np.array_equal(share(np.array([[1, 3], [0, 0]])), [[0.25, 0.75], [np.nan, np.nan]], equal_nan=True)


def test_design_effect_by_hand():
    counts = np.array([[50, 50, 0], [25, 75, 0], [100, 0, 0]])
    binomial = np.array([0.5 * 0.5, 0.25 * 0.75, 0]) / 100
    variance = np.array([[4 * binomial[0], 4 * binomial[0], 0], [0.1 * binomial[1], 0.1 * binomial[1], 0], [0, 0, 0]])
    # four times as variable; never below 1; one expert took all: a document is worth one choice
    assert design_effect(counts, np.full((3, 1), 100), variance, 10) == pytest.approx([4, 1, 10])


def test_the_design_effect_of_planted_correlation_is_found():
    documents = correlated_documents(0).reshape(N_DOCUMENTS, LENGTH)
    per_document = np.stack([np.bincount(own, minlength=N_EXPERTS) for own in documents])[:, None]
    bootstrap = Bootstrap()
    resampled = share(resampled_sums(bootstrap.weights(N_DOCUMENTS), per_document))
    effect = design_effect(
        per_document.sum(axis=0), np.array([[N_DOCUMENTS * LENGTH]]), resampled.var(axis=0), N_DOCUMENTS
    )
    assert effect[0] == pytest.approx(1 + (LENGTH - 1) / 10, rel=0.35)


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


@pytest.mark.parametrize("n_documents", [5, 10, 30, 200])
def test_document_intervals_cover_and_token_intervals_do_not(n_documents):
    """1,000 planted recordings: what the benchmark of coverage certifies for every statistic, here for the load."""
    load = np.array([0.3, 0.2, 0.15, 0.12, 0.1, 0.06, 0.04, 0.02, 0.01])
    random = np.random.default_rng(0)
    lengths = np.maximum(random.lognormal(4, 0.5, (1000, n_documents)), 1).astype(int)
    by_document, by_token, given = [], [], []
    for sizes in lengths:
        shares = random.dirichlet(19 * load, size=n_documents)  # a correlation of 0.05
        counts = random.multinomial(sizes, shares)
        interval = Bootstrap(n_resamples=200).share_interval(counts[:, None, :])
        lower, upper, status = (part[0] for part in interval)
        given.append((status == bootstrap.GIVEN) | (status == bootstrap.UNUSED))
        by_document.append((lower <= load) & (load <= upper))
        observed = counts.sum(axis=0) / sizes.sum()
        by_token.append(np.abs(observed - load) < 1.96 * np.sqrt(observed * (1 - observed) / sizes.sum()))
    covered = np.mean(np.array(by_document)[np.array(given)])
    least = 0.93 if n_documents == 200 else 0.9
    assert least < covered < (0.97 if n_documents == 200 else 0.995)
    assert np.mean(given) > 0.75
    assert np.mean(by_token) < 0.75


def test_the_interval_of_a_uniform_router_reaches_no_violation():
    """A maximum is biased upwards: plain percentiles would all lie above the truth, which is 0."""
    random = np.random.default_rng(0)
    for _ in range(10):
        chosen = random.integers(N_EXPERTS, size=(6000, 1))
        recording = from_experts(chosen, n_experts=N_EXPERTS, lengths=[LENGTH] * N_DOCUMENTS)
        result = routing_stats.imbalance(recording, n_resamples=300).isel(layer=0)
        assert result["max_violation_lower"] <= result["max_violation"] <= result["max_violation_upper"]
        assert result["max_violation_lower"] < 0.01
