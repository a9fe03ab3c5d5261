"""Specialisation: values worked out by hand, every permutation spelled out, planted preferences, false positives."""

from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import pytest
import xarray as xr

from probe import store
from probe.bootstrap import FEW_CARRYING, FEW_DOCUMENTS, GIVEN, INTERVAL_STATUS, NO_TOKEN, UNUSED
from probe.routing import permutation, rows
from probe.routing.permutation import Documents, Permutations, label_sums
from probe.routing.rows import grouped
from probe.routing.specialization import specialization
from probe.schema import ProbeError, SchemaError
from tests.planted import from_experts
from tests.routing_cases import close, in_order, random_recording, routing_of, small, with_phase

BOUNDS = ["share_lower", "share_upper", "lift_lower", "lift_upper"]


def alike_documents(random, *, n_documents=30, n_tokens=40, n_experts=6, n_layers=2) -> np.ndarray:
    """Experts (token, layer) of documents that each have a favourite of their own."""
    favourite = random.integers(n_experts, size=(n_documents, n_layers))
    chosen = random.integers(n_experts, size=(n_documents, n_tokens, n_layers))
    follows = random.random(chosen.shape) < 0.3
    return np.where(follows, favourite[:, None], chosen).reshape(-1, n_layers)


def with_experts(routing: xr.Dataset, chosen: np.ndarray) -> xr.Dataset:
    values = chosen[..., None].astype(np.uint8)
    return routing.assign(expert_index=(("token", "layer", "slot"), values, routing["expert_index"].attrs))


# By hand


def test_by_hand():
    chosen = np.array([0, 0, 1, 0, 1, 1, 1, 1])[:, None]
    recording = from_experts(chosen, n_experts=3, lengths=[3, 1, 4], domains=["code", "code", "prose"])
    result = specialization(recording)
    assert result["share"].dims == result["p_value"].dims == ("domain", "layer", "expert")
    close(result["share"].sel(domain="code")[0], [3 / 4, 1 / 4, 0])
    close(result["lift"].sel(domain="code")[0], [2, 2 / 5, np.nan])
    close(result["lift"].sel(domain="prose")[0], [0, 8 / 5, np.nan])
    assert result["n_documents"].values.tolist() == [2, 1]
    assert all(np.isnan(result[name]).all() for name in BOUNDS), "two documents, and one, have no interval"
    assert (result["interval_status"] == FEW_DOCUMENTS).all()
    assert np.isnan(result["p_value"].sel(expert=2)).all(), "an expert that nobody used"


def test_top_two_by_hand():
    chosen = np.array([[[0, 1]], [[0, 2]], [[2, 1]]])
    result = specialization(from_experts(chosen, n_experts=4, lengths=[2, 1], domains=["a", "b"]))
    close(result["share"][:, 0], [[2 / 4, 1 / 4, 1 / 4, 0], [0, 1 / 2, 1 / 2, 0]])
    close(result["lift"][:, 0], [[3 / 2, 3 / 4, 3 / 4, np.nan], [0, 3 / 2, 3 / 2, np.nan]])


def test_bounds_of_a_lift_multiply_and_divide_by_one_factor():
    random = np.random.default_rng(3)
    domains = ["a", "b"] * 15
    result = specialization(from_experts(alike_documents(random), n_experts=6, lengths=[40] * 30, domains=domains))
    close(result["lift_lower"] * result["lift_upper"], result["lift"] ** 2, rtol=1e-9)
    assert (result["lift_lower"] < result["lift"]).all() and (result["lift"] < result["lift_upper"]).all()


def test_what_was_planted_is_found():
    """Two domains of 40 documents: one sends half of its tokens to expert 0, the other a quarter."""
    random = np.random.default_rng(0)
    lengths = random.integers(50, 150, size=80)
    domains = ["code" if index % 2 else "prose" for index in range(80)]
    shares = np.repeat([0.5 if domain == "code" else 0.25 for domain in domains], lengths)
    chosen = np.where(random.random(len(shares)) < shares, 0, random.integers(1, 4, size=len(shares)))
    result = specialization(from_experts(chosen[:, None], n_experts=4, lengths=lengths.tolist(), domains=domains)).isel(
        layer=0
    )
    code, prose = (result.sel(domain=domain, expert=0) for domain in ("code", "prose"))
    assert code["share_lower"] < 0.5 < code["share_upper"] < code["share_lower"] + 0.06
    assert prose["share_lower"] < 0.25 < prose["share_upper"] < prose["share_lower"] + 0.06
    assert 1 < code["lift_lower"] < code["lift"] < code["lift_upper"]
    assert prose["lift_lower"] < prose["lift"] < prose["lift_upper"] < 1
    assert (result["p_value"].sel(expert=0) == 1 / 1001).all(), "no permutation comes near"
    assert (result["interval_status"] == GIVEN).all()


def test_numerator_and_denominator_are_resampled_together():
    """With a single group the lift is 1 in every draw, whatever the draw."""
    whole = specialization(random_recording(lengths=(9, 8, 7) * 8, domains=["all"] * 24))
    settled = whole["lift_lower"].notnull() & (whole["share"] > 0)
    assert settled.sum() > 5
    close(whole["lift_lower"].where(settled, 1), 1)
    close(whole["lift_upper"].where(settled, 1), 1)
    assert np.isnan(whole["p_value"]).all(), "a single group has nothing to swap with"


def test_an_expert_that_a_group_never_chose_is_bounded():
    chosen = np.concatenate([np.tile([0, 1], 50), np.tile([0, 2], 50)])[:, None]
    recording = from_experts(chosen, n_experts=4, lengths=[20] * 10, domains=["a"] * 5 + ["b"] * 5)
    result = specialization(recording).sel(domain="a").isel(layer=0)
    close(result["share_lower"][2], 0)
    assert result["share_upper"][2] == pytest.approx(3 / 100, rel=2e-3)
    close(result["lift_lower"][2], 0)
    close(result["lift_upper"][2], result["share_upper"][2] / 0.25)
    assert np.isnan(result["lift_upper"][3]), "no lift over a load of zero"
    assert result["interval_status"].values.tolist()[2:] == [UNUSED] * 2


def test_a_group_that_always_chose_one_expert_is_bounded():
    chosen = np.concatenate([np.zeros(100, int), np.tile([0, 1], 50)])[:, None]
    recording = from_experts(chosen, n_experts=2, lengths=[20] * 10, domains=["a"] * 5 + ["b"] * 5)
    always = specialization(recording).sel(domain="a", expert=0).isel(layer=0)
    close(always["share"], 1)
    assert always["lift_lower"] <= always["share_lower"] / 0.75 < always["lift"] <= always["lift_upper"]


def test_where_a_share_has_no_interval_a_lift_has_none():
    """Expert 3 is that of a single document out of thirty."""
    random = np.random.default_rng(0)
    chosen = random.integers(3, size=(600, 1))
    chosen[:10] = 3
    result = specialization(from_experts(chosen, n_experts=4, lengths=[20] * 30, domains=["a", "b"] * 15))
    cell = result.sel(domain="a", expert=3).isel(layer=0)
    assert cell["interval_status"] == FEW_CARRYING
    assert all(np.isnan(cell[name]) for name in BOUNDS)
    assert cell["p_value"] > 0.05


def test_a_group_without_tokens_is_not_a_group_that_prefers_nothing():
    recording = random_recording(lengths=(9, 0, 4), domains=["a", "none here", "b"])
    result = specialization(recording).sel(domain="none here")
    assert all(np.isnan(result[name]).all() for name in ("share", "lift", "p_value", *BOUNDS))
    assert (result["interval_status"] == NO_TOKEN).all()
    assert result["n_documents"] == 0


# p-values


def every_p_value(counts_of, labellings, observed, centre):
    """max-T p-values from all equally likely labellings, with their mean and standard deviation by brute force."""
    drawn = np.array([counts_of(labels) for labels in labellings], float)
    beyond = drawn - centre(drawn)
    deviation = np.sqrt(np.square(beyond).mean(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.abs(beyond) / deviation
        own = np.abs(counts_of(observed) - centre(counts_of(observed))) / deviation
    largest = np.nanmax(scaled.reshape(len(drawn), -1), axis=1)
    return np.where(np.isnan(own), np.nan, (largest >= own[..., None] - 1e-9).mean(axis=-1))


def test_p_values_of_documents_from_every_exchange():
    """Seven unequal documents in groups of 3 and 4: 35 ways to choose them."""
    random = np.random.default_rng(2)
    lengths = [3, 9, 5, 1, 12, 7, 4]
    label = np.array([0, 1, 0, 1, 1, 0, 1])
    chosen = random.choice(4, p=[0.5, 0.3, 0.2, 0], size=(sum(lengths), 2))
    table = np.zeros((7, 2, 4))
    np.add.at(table, (np.repeat(np.arange(7), lengths)[:, None], np.arange(2), chosen), 1)
    load = table.sum(axis=0) / sum(lengths)

    def counts_of(labels):
        return np.stack([table[np.asarray(labels) == group].sum(axis=0) for group in range(2)])

    def centre(counts):
        return load * counts.sum(axis=-1, keepdims=True)

    labellings = [np.isin(np.arange(7), own, invert=True).astype(int) for own in combinations(range(7), 3)]
    expected = every_p_value(counts_of, labellings, label, centre)
    recording = from_experts(chosen, n_experts=4, lengths=lengths, domains=[f"domain {name}" for name in label])
    result = specialization(recording, n_permutations=4000)["p_value"]
    close(result.sel(domain=["domain 0", "domain 1"]), expected, atol=0.03)
    assert len(np.unique(expected[~np.isnan(expected)])) > 4 and np.isnan(result.sel(expert=3)).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_p_values_of_tokens_from_every_exchange(top_k):
    """Documents of 3, 1 and 5 tokens: 6 · 1 · 120 orders of their labels."""
    label = np.array([0, 0, 1, 1, 0, 1, 2, 1, 0])
    random = np.random.default_rng(1)
    logits = random.normal(size=(9, 2, 3))
    chosen = np.argsort(-logits, axis=-1)[..., :top_k]

    def counts_of(labels):
        counts = np.zeros((3, 2, 3))
        np.add.at(counts, (np.asarray(labels)[:, None, None], np.arange(2)[:, None], chosen), 1)
        return counts

    pieces = [list(permutations(label[start:stop])) for start, stop in ((0, 3), (3, 4), (4, 9))]
    labellings = [np.concatenate(parts) for parts in product(*pieces)]
    every_mean = np.mean([counts_of(labels) for labels in labellings], axis=0)
    expected = every_p_value(counts_of, labellings, label, lambda counts: every_mean)
    recording = from_experts(chosen, n_experts=3, lengths=[3, 1, 5], token_id=label)
    result = specialization(recording, by="token_id", n_permutations=4000)["p_value"]
    close(result, expected, atol=0.03)
    assert len(np.unique(expected[~np.isnan(expected)])) > 2


def test_documents_that_are_alike_within_do_not_pass_for_domains():
    """200 recordings whose documents have favourites but whose domains have none: 5 % may find one."""
    random = np.random.default_rng(0)
    domains = ["a", "b", "c"] * 10
    routing = routing_of(from_experts(alike_documents(random), n_experts=6, lengths=[40] * 30, domains=domains))
    found = 0
    for seed in range(200):
        drawn = with_experts(routing, alike_documents(random))
        found += float(specialization(drawn, n_resamples=2, n_permutations=99, seed=seed)["p_value"].min()) < 0.05
    assert found / 200 <= 0.08


def test_what_a_document_prefers_is_not_the_phase_s():
    """Half of the documents are decoded and use expert 0; all say it in their second half, or half of them do."""
    random = np.random.default_rng(0)
    n_documents, n_tokens = 20, 40
    late = np.arange(n_tokens) >= 20
    decoded = np.arange(n_documents) < 10
    phase = np.where(decoded[:, None], np.arange(n_tokens) >= 4, np.arange(n_tokens) >= 36).ravel()
    ordinary = random.integers(1, 5, size=(n_documents, n_tokens))
    whole = np.where(decoded[:, None] & (random.random(ordinary.shape) < 0.5), 0, ordinary).reshape(-1, 1)
    within = np.where(late & (random.random(ordinary.shape) < 0.5), 0, ordinary).reshape(-1, 1)
    result = {}
    for name, chosen in {"whole": whole, "within": within}.items():
        routing = with_phase(from_experts(chosen, n_experts=5, lengths=[n_tokens] * n_documents), phase)
        result[name] = specialization(routing, by="phase", n_resamples=2).sel(phase="decode", expert=0).isel(layer=0)
    assert result["whole"]["lift"] > 1.2 and result["whole"]["p_value"] > 0.05
    assert result["within"]["lift"] > 1.1 and result["within"]["p_value"] < 0.01


def test_domain_and_phase_together_are_exchanged_within_documents():
    random = np.random.default_rng(1)
    phase = np.tile([0] * 20 + [1] * 20, 30)
    chosen = np.where((phase[:, None] == 1) & (random.random((1200, 2)) < 0.4), 5, alike_documents(random))
    recording = from_experts(chosen, n_experts=6, lengths=[40] * 30, domains=["a", "b"] * 15)
    result = specialization(with_phase(recording, phase), by=("domain", "phase"), n_resamples=2)
    assert result["p_value"].dims == ("domain", "phase", "layer", "expert")
    assert (result["p_value"].sel(expert=5) < 0.01).all()
    constant = specialization(recording, by=("domain", "phase"), n_resamples=2)["p_value"].sel(phase="prefill")
    xr.testing.assert_equal(constant.drop_vars("phase"), specialization(recording, n_resamples=2)["p_value"])


def test_where_nothing_can_be_exchanged_there_is_no_p_value():
    recording = random_recording(lengths=(9, 1, 0, 14, 6, 7, 8))
    for by in (None, "sample", "modality"):
        assert np.isnan(specialization(recording, by=by)["p_value"]).all(), by
    assert np.isnan(specialization(recording, n_permutations=0)["p_value"]).all()
    assert specialization(recording)["p_value"].notnull().any()


def test_one_token_samples_swap_their_tokens():
    """Labels of single tokens are labels of documents: shuffling within a document would change nothing."""
    chosen = np.repeat([0, 1], 10)[:, None]
    recording = from_experts(chosen, n_experts=2, lengths=[1] * 20, token_id=np.repeat([5, 6], 10))
    assert (specialization(recording, by="token_id")["p_value"] < 0.005).all()


def test_p_values_hold_for_many_experts_and_layers():
    random = np.random.default_rng(0)
    chosen = random.integers(128, size=(1000, 4))
    chosen[:500, 2] = np.where(random.random(500) < 0.1, 7, chosen[:500, 2])
    recording = from_experts(chosen, n_experts=128, lengths=[25] * 40, domains=["a"] * 20 + ["b"] * 20)
    p = specialization(recording)["p_value"].transpose("domain", "layer", "expert").values
    assert (p[:, 2, 7] < 0.05).all()
    p[:, 2, 7] = 1
    assert np.nanmin(p) > 0.05


# Properties


@pytest.mark.parametrize("by", ["domain", "phase"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_relabelling_experts_permutes_the_result(by, top_k):
    recording = random_recording(lengths=(9, 1, 5, 14, 6, 8, 11, 7, 3, 5, 9, 2), top_k=top_k)
    routing = with_phase(recording, np.arange(80) % 2)
    order = np.random.default_rng(0).permutation(5)
    relabelled = routing.assign(
        expert_index=(("token", "layer", "slot"), order.astype(np.uint8)[routing["expert_index"].values])
    )
    after = specialization(relabelled, by=by).isel(expert=order).assign_coords(expert=routing["expert"])
    xr.testing.assert_allclose(after, specialization(routing, by=by), rtol=1e-9)


@pytest.mark.parametrize("by", ["domain", "phase", "token_id"])
def test_order_blocks_batches_and_stores_change_nothing(by, monkeypatch, tmp_path):
    recording = random_recording(lengths=(9, 1, 5, 0, 14, 6, 8, 11, 7, 3, 5, 9, 2), top_k=2)
    routing = with_phase(recording, np.arange(80) % 3 == 0)
    expected = specialization(routing, by=by)
    backwards = in_order(routing, np.arange(12, -1, -1))
    xr.testing.assert_identical(specialization(backwards, by=by), expected)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 7)
    xr.testing.assert_identical(specialization(routing, by=by), expected)
    monkeypatch.setattr(permutation, "CELLS_AT_ONCE", 1)
    xr.testing.assert_allclose(specialization(routing, by=by), expected, rtol=1e-12)
    recording["routing"] = xr.DataTree(routing)
    opened = store.open(store.save(recording, tmp_path / "run.zarr"))
    assert opened["routing"]["expert_index"].chunks is not None
    xr.testing.assert_allclose(specialization(opened, by=by), expected, rtol=1e-12)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1]])
@pytest.mark.parametrize("by", [None, "domain", "sample", "phase", "token_id"])
def test_hardly_any_tokens(lengths, by):
    recording = from_experts(np.zeros((sum(lengths), 2), int), n_experts=3, lengths=lengths, layers=[1, 3])
    result = specialization(recording, by=by)
    assert all(np.isnan(result[name]).all() for name in ("p_value", *BOUNDS))
    assert result["layer"].values.tolist() == [1, 3]
    assert int(result["n_documents"].sum()) == sum(lengths)


def test_every_variable_says_what_it_is():
    result = specialization(random_recording(), by=("domain", "phase"))
    for variable in result.variables.values():
        assert variable.attrs["long_name"] and variable.attrs["units"]
    assert result["interval_status"].attrs["categories"] == list(INTERVAL_STATUS)
    assert result.attrs == {"level": 0.95, "n_resamples": 1000, "seed": 0, "n_permutations": 1000}


def test_settings_without_meaning_are_refused():
    with pytest.raises(ProbeError, match="n_permutations is -1"):
        specialization(small(), n_permutations=-1)
    with pytest.raises(ProbeError, match="level"):
        specialization(small(), level=1)
    with pytest.raises(SchemaError, match="'tile'.*sample, position"):
        specialization(small(), by="tile")
    with pytest.raises(SchemaError, match="'sample' is missing"):
        specialization(routing_of(small()).drop_vars("sample"))


# What is exchanged


def test_labels_stay_in_their_document():
    random = np.random.default_rng(0)
    document = np.repeat(np.arange(4), [5, 1, 300, 7])[random.permutation(313)]
    label = random.integers(9, size=313).astype(np.uint8)
    drawn = list(Permutations(20, 3).token_labels(label, document))
    for shuffled in drawn:
        for own in range(4):
            assert sorted(shuffled[document == own]) == sorted(label[document == own])
    assert len({shuffled.tobytes() for shuffled in drawn}) == 20
    again = Permutations(20, 3).token_labels(label, document)
    assert all(np.array_equal(shuffled, other) for shuffled, other in zip(drawn, again, strict=True))


def test_every_order_is_as_likely(monkeypatch):
    monkeypatch.setattr(permutation, "TOKENS_AT_ONCE", 4)
    label, document = np.array([0, 1, 2, 3, 4, 5]), np.array([0, 0, 0, 1, 1, 2])
    drawn = np.array(list(Permutations(6000).token_labels(label, document)))
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(orders) == 12
    assert np.square((counts - 500) / np.sqrt(500)).sum() < 31.3, "99.9 % of chi-square with 11 degrees"


def test_documents_know_whether_they_carry_one_label(monkeypatch):
    monkeypatch.setattr(permutation, "TOKENS_AT_ONCE", 2)
    routing = with_phase(small(), [0, 0, 0, 1, 1])
    documents = Documents.of(grouped(routing, "phase"))
    assert documents.label.tolist() == [0, 1] and not documents.exchangeable, "one label each"
    assert Documents.of(grouped(routing, "domain")).label.tolist() == [0, 0]
    mixed = Documents.of(grouped(with_phase(small(), [0, 0, 1, 1, 1]), "phase"))
    assert mixed.label is None and mixed.exchangeable
    assert mixed.tokens(np.array([0, 0, 1, 1, 1]), 2).toarray().tolist() == [[2, 1], [0, 2]]


@pytest.mark.parametrize("scale", [1, 1 << 24])
def test_sums_over_labels_are_exact(scale):
    """Beyond 2**24 not all whole numbers are float32."""
    random = np.random.default_rng(0)
    table = random.integers(9, size=(5, 2, 3)) * scale + 1
    labels = np.array([[0, 0, 1, 1, 1], [2, 0, 2, 0, 0]])
    for label, sums in zip(labels, label_sums(labels, table, 3), strict=True):
        expected = [[table[label == own].sum(axis=0)] for own in range(3)]
        assert np.array_equal(sums, np.concatenate(expected))


def test_p_values_count_the_recording_itself():
    p = Permutations(4).p_value(np.array([0.5, 3.0, 2.0, np.nan]), np.array([1.0, 2.0, 3.0, 2.0]))
    close(p, [1, 2 / 5, 4 / 5, np.nan])
    assert np.isnan(Permutations(0).p_value(np.array([1.0]), np.zeros(0))).all()
