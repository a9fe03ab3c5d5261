"""Routing statistics: values worked out by hand, plain loops, properties, and the check values of published metrics."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from probe import routing_stats, schema
from probe.schema import ProbeError
from tests.planted import from_experts, from_logits
from tests.routing_cases import (
    NEEDS_PROBABILITIES,
    NEEDS_TWO_CHOICES,
    RESAMPLING,
    SPLITTABLE,
    by_name,
    close,
    in_groups,
    in_order,
    random_recording,
    routing_of,
    small,
    with_phase,
)

# Load


def test_load_by_hand():
    load = routing_stats.expert_load(small())
    assert load.dims == ("layer", "expert")
    close(load.sel(layer=1), [3 / 5, 1 / 5, 1 / 5])
    close(load.sel(layer=3), [0, 1 / 5, 4 / 5])
    assert load.attrs == {"long_name": "share of assignments to the expert", "units": "1"}


def test_load_by_domain_by_hand():
    load = routing_stats.expert_load(small(), by="domain")
    assert load.dims == ("domain", "layer", "expert")
    assert load["domain"].values.tolist() == ["code", "prose"]
    close(load.sel(domain="code", layer=1), [3 / 5, 1 / 5, 1 / 5])
    assert np.isnan(load.sel(domain="prose")).all(), "a domain without tokens has no load, not a load of zero"


def test_load_by_two_coords_by_hand():
    routing = with_phase(small(domains=["code", "code", "prose"]), [0, 0, 1, 0, 1])
    load = routing_stats.expert_load(routing, by=("domain", "phase"))
    assert load.dims == ("domain", "phase", "layer", "expert")
    close(load.sel(domain="code", phase="prefill", layer=1), [1, 0, 0])
    close(load.sel(domain="code", phase="decode", layer=1), [0, 1, 0])
    close(load.sel(domain="prose", phase="prefill", layer=1), [0, 0, 1])
    close(load.sel(domain="prose", phase="decode", layer=3), [0, 0, 1])


def test_load_of_the_top_two_by_hand():
    chosen = np.array([[[0, 1]], [[0, 2]], [[0, 1]]])
    load = routing_stats.expert_load(from_experts(chosen, n_experts=4, lengths=[3]))
    close(load[0], [3 / 6, 2 / 6, 1 / 6, 0])


def test_a_coord_without_categories_is_split_by_its_values():
    load = routing_stats.expert_load(small(), by="sample")
    assert load["sample"].values.tolist() == [0, 2], "only values that occur"
    close(load.sel(sample=2, layer=1), [1 / 2, 0, 1 / 2])


expert_arrays = hnp.arrays(np.int64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.integers(0, 6))


@st.composite
def recordings(draw):
    chosen = draw(expert_arrays)
    cuts = sorted(draw(st.lists(st.integers(0, len(chosen)), max_size=4)))
    lengths = np.diff([0, *cuts, len(chosen)]).tolist()
    domains = [draw(st.sampled_from(["a", "b", "c"])) for _ in lengths]
    return from_experts(chosen, n_experts=7, lengths=lengths, domains=domains)


@given(recordings())
def test_load_sums_to_one(recording):
    close(routing_stats.expert_load(recording).sum("expert"), 1)


@given(recordings(), st.permutations(range(7)))
def test_relabelling_experts_permutes_the_load(recording, order):
    routing = routing_of(recording)
    relabelled = routing.assign(
        expert_index=(("token", "layer", "slot"), np.array(order, np.uint8)[routing["expert_index"].values])
    )
    close(routing_stats.expert_load(relabelled).isel(expert=order), routing_stats.expert_load(routing))
    before = routing_stats.imbalance(routing, n_resamples=2)
    after = routing_stats.imbalance(relabelled, n_resamples=2)
    for name in ("max_violation", "coefficient_of_variation", "gini", "normalized_entropy"):
        close(after[name], before[name])


@given(recordings())
def test_the_order_of_samples_does_not_matter(recording):
    routing = routing_of(recording)
    backwards = in_order(routing, reversed(np.unique(routing["sample"].values)))
    xr.testing.assert_allclose(routing_stats.expert_load(backwards), routing_stats.expert_load(routing))
    names = ["repetition", "null", "either", "either_null"]
    xr.testing.assert_allclose(
        routing_stats.repetition(backwards, n_resamples=2)[names],
        routing_stats.repetition(routing, n_resamples=2)[names],
    )


@given(recordings())
def test_samples_weighted_by_their_tokens_average_to_the_whole(recording):
    load = routing_stats.expert_load(recording, by="sample")
    n_tokens = recording["samples"]["n_tokens"].sel(sample=load["sample"])
    xr.testing.assert_allclose(
        (load * n_tokens).sum("sample") / n_tokens.sum(), routing_stats.expert_load(recording), rtol=1e-12
    )


OF_GROUPS = ("divergence", "signature", "specialization")
"""They compare groups with each other: other results without ``by``, and a group alone has no result."""


@pytest.mark.parametrize("function", [f for f in SPLITTABLE if by_name(f) not in OF_GROUPS], ids=by_name)
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_group_equals_the_ungrouped_result(function, top_k):
    if by_name(function) in NEEDS_TWO_CHOICES and top_k == 1:
        return
    recording = random_recording(top_k=top_k, domains=["only"] * 5)
    xr.testing.assert_allclose(
        function(recording, by="domain").squeeze("domain", drop=True), function(recording, by=None)
    )


@pytest.mark.parametrize(
    "function", [f for f in SPLITTABLE if by_name(f) not in (*OF_GROUPS, *NEEDS_PROBABILITIES)], ids=by_name
)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_group_equals_a_recording_of_its_tokens_alone(function, top_k):
    if by_name(function) in NEEDS_TWO_CHOICES and top_k == 1:
        return
    random = np.random.default_rng(1)
    routing = with_phase(random_recording(top_k=top_k), random.integers(2, size=30))
    options = {"bins": [0, 1, 2, 9]} if by_name(function) == "margin_histogram" else {}
    for by in ("domain", "phase"):
        split = function(routing, by=by, **options)
        assert (split if isinstance(split, xr.DataArray) else split.to_array()).notnull().any()
        for label, alone in in_groups(routing, by):
            xr.testing.assert_allclose(split.sel({by: label}, drop=True), function(alone, **options))


# Intervals


def test_an_unused_expert_is_bounded_not_dead():
    """Ten equal documents: no variance between them, design effect 1, so 3 / n_eff is 3 / (T·k)."""
    chosen = np.tile([0, 1], 100)[:, None]
    interval = routing_stats.load_interval(from_experts(chosen, n_experts=3, lengths=[20] * 10))
    assert interval["lower"][0, 2] == 0
    assert interval["upper"][0, 2] == pytest.approx(3 / 200, rel=2e-3)
    assert interval["n_documents"] == 10


def test_the_bound_of_an_unused_expert_knows_about_documents():
    """Documents that each lean on one of two experts are worth one choice each: 40 documents, not 4000 tokens."""
    chosen = np.repeat(np.tile([0, 1], 20), 100)[:, None]
    interval = routing_stats.load_interval(from_experts(chosen, n_experts=3, lengths=[100] * 40))
    assert interval["upper"][0, 2] == pytest.approx(3 / 40, rel=0.1)
    alone = from_experts(np.zeros((4000, 1), int), n_experts=3, lengths=[100] * 40)
    close(routing_stats.load_interval(alone)["upper"][0], [1, -np.log(0.05) / 40, -np.log(0.05) / 40])


@pytest.mark.parametrize("function", RESAMPLING, ids=by_name)
def test_one_document_has_no_interval(function):
    result = function(from_experts(np.array([[0], [1], [0]]), n_experts=2, lengths=[3, 0]))
    bounds = [name for name in result if str(name).endswith(("lower", "upper")) and "null" not in str(name)]
    assert bounds or by_name(function) == "signature", "that of samples has none"
    for name in bounds:
        assert np.isnan(result[name]).all()


@pytest.mark.parametrize("function", RESAMPLING, ids=by_name)
def test_results_say_how_their_intervals_were_made(function):
    options = {"level": 0.9, "n_resamples": 7, "seed": 3}
    if by_name(function) == "signature":
        options["by"] = "domain"
    attributes = function(small(), **options).attrs
    assert {name: attributes[name] for name in ("level", "n_resamples", "seed")} == {
        "level": 0.9,
        "n_resamples": 7,
        "seed": 3,
    }


# Imbalance


def test_imbalance_by_hand():
    chosen = np.array([0, 0, 0, 1, 2, 2])[:, None]
    result = routing_stats.imbalance(from_experts(chosen, n_experts=4, lengths=[6])).isel(layer=0)
    load = np.array([3, 1, 2, 0]) / 6
    assert result["max_violation"] == pytest.approx(1)
    assert result["coefficient_of_variation"] == pytest.approx(np.sqrt(1.25) / 1.5)
    pairs = sum(abs(one - other) for one in load for other in load)
    assert result["gini"] == pytest.approx(pairs / (2 * 4**2 * load.mean()))
    assert result["normalized_entropy"] == pytest.approx((np.log(2) / 2 + np.log(6) / 6 + np.log(3) / 3) / np.log(4))


@pytest.mark.parametrize("n_experts", [2, 16, 128])
def test_the_ends_of_the_imbalance_scales(n_experts):
    uniform = np.tile(np.arange(n_experts), 4)[:, None]
    one = np.zeros_like(uniform)
    result = routing_stats.imbalance(
        from_experts(np.concatenate([uniform, one], axis=1), n_experts=n_experts, lengths=[n_experts * 4 // 8] * 8),
        n_resamples=50,
    )
    close(result["max_violation"], [0, n_experts - 1])
    close(result["coefficient_of_variation"], [0, np.sqrt(n_experts - 1)])
    close(result["gini"], [0, (n_experts - 1) / n_experts])
    close(result["normalized_entropy"], [1, 0])
    for name in ("max_violation", "coefficient_of_variation", "gini", "normalized_entropy"):
        close(result[f"{name}_lower"][1], result[name][1], atol=1e-6)
        close(result[f"{name}_upper"][1], result[name][1], atol=1e-6)


def test_a_single_expert_has_no_entropy():
    result = routing_stats.imbalance(from_experts(np.zeros((4, 1), int), n_experts=1, lengths=[2, 2]))
    assert np.isnan(result["normalized_entropy"]).all()
    close(result["max_violation"], 0)
    close(result["max_violation_null"], 0)


@pytest.mark.parametrize(
    ("n_experts", "n_tokens", "expected"),
    [(16, 10**4, 0.071), (16, 10**6, 0.007), (128, 10**4, 0.31), (128, 10**6, 0.03)],
)
def test_the_null_of_the_maximum_violation(n_experts, n_tokens, expected):
    """The check values of the metric catalogue."""
    random = np.random.default_rng(0)
    rows = np.zeros(n_tokens, np.int64)
    routing = routing_of(from_experts(np.zeros((1, 1), int), n_experts=n_experts, lengths=[1])).isel(token=rows)
    routing["expert_index"][:] = random.integers(n_experts, size=(n_tokens, 1, 1))
    result = routing_stats.imbalance(routing).isel(layer=0)
    assert result["max_violation_null"] == pytest.approx(expected, rel=0.05)
    assert 0.5 * expected < result["max_violation"] < 2 * expected
    assert result["max_violation"] < 1.3 * result["max_violation_null_upper"]


def test_the_null_for_two_choices_is_that_of_choices_that_differ():
    n_tokens, n_experts = 300, 4
    chosen = np.argsort(np.random.default_rng(0).random((500, n_tokens, n_experts)), axis=-1)[..., :2]
    counts = np.stack([np.bincount(draw.ravel(), minlength=n_experts) for draw in chosen])
    violation = counts.max(axis=1) / (n_tokens * 2 / n_experts) - 1
    result = routing_stats.imbalance(from_experts(chosen[0][:, None], n_experts=n_experts, lengths=[n_tokens]))
    assert result["max_violation_null"][0] == pytest.approx(violation.mean(), rel=0.06)
    assert result["max_violation_null_upper"][0] == pytest.approx(np.quantile(violation, 0.975), rel=0.1)


# Margins


def margins_recording(margins, **options) -> xr.DataTree:
    """Two experts, of which the first leads by the given margins (token, layer)."""
    margins = np.asarray(margins, float)
    return from_logits(np.stack([margins, np.zeros_like(margins)], axis=-1), **options)


def test_margin_by_hand():
    recording = margins_recording(
        [[0, 1], [0, 2], [1, 3], [4, 4], [5, 5]], lengths=[3, 2], domains=["a", "b"], layers=[1, 3]
    )
    result = routing_stats.margin(recording)
    close(result["mean"], [2, 3])
    close(result["tie_share"], [2 / 5, 0])
    close(result["margin"].sel(layer=1), [0, 0, 1, 4, 4.8])
    assert result["margin"]["quantile"].values.tolist() == [0.05, 0.25, 0.5, 0.75, 0.95]
    split = routing_stats.margin(recording, by="domain")
    close(split["mean"].sel(domain="b"), [4.5, 4.5])
    close(split["tie_share"].sel(domain="a"), [2 / 3, 0])
    assert split["mean"].attrs["units"] == "logit"


def test_margin_leaves_missing_values_out():
    routing = routing_of(margins_recording([[0], [1], [3]], lengths=[3]))
    routing["router_margin"][2] = np.nan
    result = routing_stats.margin(routing)
    close(result["mean"], 0.5)
    close(result["tie_share"], 0.5)
    close(routing_stats.margin_histogram(routing, bins=[0, 1, 2]), [[0.5, 0.5]])


def test_margin_is_undefined_where_every_expert_is_chosen():
    recording = from_experts(np.array([[[0, 1]], [[1, 0]]]), n_experts=2, lengths=[2])
    assert np.isnan(routing_stats.margin(recording).to_array()).all()
    assert np.isnan(routing_stats.margin_histogram(recording)).all()


def test_margin_histogram_by_hand():
    recording = margins_recording([[0, 1], [1, 2], [2, 3], [4, 4]], lengths=[4], layers=[1, 3])
    histogram = routing_stats.margin_histogram(recording, bins=2)
    assert histogram.dims == ("layer", "margin_bin")
    close(histogram, [[1 / 2, 1 / 2], [1 / 4, 3 / 4]])
    assert histogram["margin_bin"].values.tolist() == [1, 3]
    assert histogram["margin_from"].values.tolist() == [0, 2]
    assert histogram["margin_to"].values.tolist() == [2, 4]
    close(routing_stats.margin_histogram(recording, bins=[1, 2, 3]), [[1 / 4, 1 / 4], [1 / 4, 2 / 4]])


@pytest.mark.parametrize("bins", [1, 7, 40])
def test_margin_histogram_agrees_with_numpy(bins):
    recording = random_recording()
    margins = recording["routing"]["router_margin"].values.astype(float)
    histogram = routing_stats.margin_histogram(recording, bins=bins)
    edges = [*histogram["margin_from"].values, histogram["margin_to"].values[-1]]
    for layer in range(3):
        expected, _ = np.histogram(margins[:, layer], edges)
        close(histogram[layer], expected / len(margins))
    close(histogram.sum("margin_bin"), 1)


@pytest.mark.parametrize("bins", [0, [1], [2, 1], [[1, 2]], [0, np.nan]])
def test_margin_histogram_refuses_bins_that_are_none(bins):
    with pytest.raises(ProbeError, match="bins"):
        routing_stats.margin_histogram(small(), bins=bins)


def test_the_bounds_of_margins_cover_the_truth():
    """Woodruff's bounds over documents that differ: 200 planted recordings of 40 documents."""
    random = np.random.default_rng(0)
    quantiles = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    population = np.sort(random.gamma(9, 1 / 9, 2_000_000) * random.exponential(size=2_000_000))
    truth = population[(quantiles * len(population)).astype(int)]
    covered = []
    for _ in range(200):
        margins = np.repeat(random.gamma(9, 1 / 9, 40), 50) * random.exponential(size=2000)
        result = routing_stats.margin(margins_recording(margins[:, None], lengths=[50] * 40), n_resamples=200)
        covered.append((result["margin_lower"][0] <= truth) & (truth <= result["margin_upper"][0]))
    assert 0.92 < np.mean(covered) < 0.985
    assert np.min(np.mean(covered, axis=0)) > 0.88


# Size and strength of the logits


def test_z_loss_by_hand():
    logits = np.log([[[1.0, 1.0]], [[1.0, 3.0]], [[2.0, 6.0]]])  # log-sum-exps ln 2, ln 4, ln 8
    recording = from_logits(logits, lengths=[1, 2], domains=["a", "b"])
    expected = np.log(2) ** 2 * np.array([1, 4, 9])
    close(routing_stats.z_loss(recording)["z_loss"], expected.mean(), rtol=1e-6)
    close(routing_stats.z_loss(recording, by="domain")["z_loss"][:, 0], [expected[0], expected[1:].mean()], rtol=1e-6)
    assert routing_stats.z_loss(recording)["z_loss"].attrs["units"] == "logit²"


def test_gates_by_hand():
    logits = np.array([[[0.1, -5]], [[-5, 0.1]], [[3.0, -5]], [[20.0, -5]]])  # gates 0.52, 0.52, 0.95 and 1
    result = routing_stats.gate_histogram(from_logits(logits, lengths=[4]), bins=4)
    assert result["count"].dims == ("layer", "expert", "gate_bin")
    assert result["count"][0].values.tolist() == [[0, 0, 1, 2], [0, 0, 1, 0]]
    close(result["share"][0, 0], [0, 0, 1 / 3, 2 / 3])
    assert result["gate_from"].values.tolist() == [0, 0.25, 0.5, 0.75]
    with pytest.raises(ProbeError, match="bins is 0"):
        routing_stats.gate_histogram(small(), bins=0)
    routing = routing_of(small())
    routing["router_logit"][:2] = np.nan
    assert routing_stats.gate_histogram(routing)["count"].sum() == 6, "a gate that is not a number is in no bin"


# Balance loss


def test_balance_loss_by_hand():
    logits = np.log([[[0.75, 0.25]], [[0.75, 0.25]], [[0.5, 0.5 - 1e-9]], [[0.2, 0.8]]])
    recording = from_logits(logits, lengths=[3, 1], domains=["a", "b"])
    # loads 3/4 and 1/4, mean probabilities 2.2/4 and 1.8/4
    close(routing_stats.balance_loss(recording)["balance_loss"], 2 * (0.75 * 0.55 + 0.25 * 0.45), rtol=1e-6)
    by_domain = routing_stats.balance_loss(recording, by="domain")["balance_loss"][:, 0]
    close(by_domain, [2 * 2 / 3, 2 * 0.8], rtol=1e-6)


def test_balance_loss_is_one_at_uniform_probabilities_or_loads():
    flat = from_logits(np.zeros((6, 1, 3)), lengths=[6])
    close(routing_stats.balance_loss(flat)["balance_loss"], 1, rtol=1e-6)
    even = from_experts(np.array([0, 1, 2])[:, None], n_experts=3, lengths=[3])
    close(routing_stats.balance_loss(even)["balance_loss"], 1, rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_balance_loss_of_all_logits_splits_by_any_coord(top_k):
    random = np.random.default_rng(0)
    logits = random.normal(size=(20, 2, 4)).astype(np.float16).astype(np.float64)
    recording = from_logits(logits, lengths=[12, 8], top_k=top_k, domains=["a", "b"])
    routing = with_phase(recording, np.arange(20) % 2)
    with_logits = routing.assign(all_logits=(("token", "layer", "expert"), logits.astype(np.float16)))
    for by in (None, "domain"):
        xr.testing.assert_allclose(
            routing_stats.balance_loss(with_logits, by=by), routing_stats.balance_loss(recording, by=by), rtol=1e-5
        )
    odd = logits[1::2]
    probability = (np.exp(odd) / np.exp(odd).sum(axis=-1, keepdims=True)).mean(axis=0)
    load = routing_stats.expert_load(routing, by="phase").sel(phase="decode").values
    split = routing_stats.balance_loss(with_logits, by="phase")["balance_loss"].sel(phase="decode")
    close(split, 4 * (load * probability).sum(axis=-1), rtol=1e-6)


def test_balance_loss_says_what_it_lacks():
    recording = random_recording()
    with pytest.raises(schema.SchemaError, match="pass the whole recording.*all_logits=True"):
        routing_stats.balance_loss(routing_of(recording))
    split = recording.copy()
    split["routing"] = xr.DataTree(with_phase(recording, np.arange(30) % 2))
    with pytest.raises(ProbeError, match="splits documents.*all_logits=True"):
        routing_stats.balance_loss(split, by="phase")
