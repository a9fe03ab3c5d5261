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
    before = routing_stats.imbalance(routing, n_resamples=1)
    after = routing_stats.imbalance(relabelled, n_resamples=1)
    for name in ("max_violation", "coefficient_of_variation", "gini", "normalized_entropy"):
        close(after[name], before[name])


@given(recordings())
def test_the_order_of_samples_does_not_matter(recording):
    routing = routing_of(recording)
    backwards = in_order(routing, reversed(np.unique(routing["sample"].values)))
    xr.testing.assert_allclose(routing_stats.expert_load(backwards), routing_stats.expert_load(routing))
    names = ["repetition", "null", "either", "either_null"]
    xr.testing.assert_allclose(
        routing_stats.repetition(backwards, n_resamples=1)[names],
        routing_stats.repetition(routing, n_resamples=1)[names],
    )


@given(recordings())
def test_samples_weighted_by_their_tokens_average_to_the_whole(recording):
    load = routing_stats.expert_load(recording, by="sample")
    n_tokens = recording["samples"]["n_tokens"].sel(sample=load["sample"])
    xr.testing.assert_allclose(
        (load * n_tokens).sum("sample") / n_tokens.sum(), routing_stats.expert_load(recording), rtol=1e-12
    )


@pytest.mark.parametrize("function", SPLITTABLE, ids=by_name)
@pytest.mark.parametrize("top_k", [1, 2])
def test_one_group_equals_the_ungrouped_result(function, top_k):
    recording = random_recording(top_k=top_k, domains=["only"] * 5)
    xr.testing.assert_allclose(
        function(recording, by="domain").squeeze("domain", drop=True), function(recording, by=None)
    )


@pytest.mark.parametrize("function", [f for f in SPLITTABLE if f is not routing_stats.specialization], ids=by_name)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_group_equals_a_recording_of_its_tokens_alone(function, top_k):
    random = np.random.default_rng(1)
    routing = with_phase(random_recording(top_k=top_k), random.integers(2, size=30))
    options = {"bins": [0, 1, 2, 9]} if function is routing_stats.margin_histogram else {}
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
    close(interval["lower"][0], [0.5, 0.5, 0])
    close(interval["upper"][0], [0.5, 0.5, -np.log(0.05) / 200])
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
    assert bounds
    for name in bounds:
        assert np.isnan(result[name]).all()


@pytest.mark.parametrize("function", RESAMPLING, ids=by_name)
def test_results_say_how_their_intervals_were_made(function):
    assert function(small(), level=0.9, n_resamples=7, seed=3).attrs == {"level": 0.9, "n_resamples": 7, "seed": 3}


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
        from_experts(np.concatenate([uniform, one], axis=1), n_experts=n_experts, lengths=[n_experts] * 4),
        n_resamples=50,
    )
    close(result["max_violation"], [0, n_experts - 1])
    close(result["coefficient_of_variation"], [0, np.sqrt(n_experts - 1)])
    close(result["gini"], [0, (n_experts - 1) / n_experts])
    close(result["normalized_entropy"], [1, 0])
    close(result["max_violation_lower"], [0, n_experts - 1], atol=1e-6)
    close(result["max_violation_upper"], [0, n_experts - 1], atol=1e-6)


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


# Specialisation


def test_specialization_by_hand():
    chosen = np.array([0, 0, 1, 0, 1, 1, 1, 1])[:, None]
    recording = from_experts(chosen, n_experts=3, lengths=[3, 1, 4], domains=["code", "code", "prose"])
    result = routing_stats.specialization(recording)
    assert result["share"].dims == ("domain", "layer", "expert")
    close(result["share"].sel(domain="code")[0], [3 / 4, 1 / 4, 0])
    close(result["lift"].sel(domain="code")[0], [2, 2 / 5, np.nan])
    close(result["lift"].sel(domain="prose")[0], [0, 8 / 5, np.nan])
    assert result["n_documents"].values.tolist() == [2, 1]
    assert np.isnan(result["share_lower"].sel(domain="prose")).all(), "one document has no interval"
    assert result["share_lower"].sel(domain="code")[0, 2] == 0 < result["share_upper"].sel(domain="code")[0, 2]


def test_specialization_finds_what_was_planted():
    """Two domains of 40 documents: one sends half of its tokens to expert 0, the other a quarter."""
    random = np.random.default_rng(0)
    lengths = random.integers(50, 150, size=80)
    domains = ["code" if index % 2 else "prose" for index in range(80)]
    shares = np.repeat([0.5 if domain == "code" else 0.25 for domain in domains], lengths)
    chosen = np.where(random.random(len(shares)) < shares, 0, random.integers(1, 4, size=len(shares)))
    result = routing_stats.specialization(
        from_experts(chosen[:, None], n_experts=4, lengths=lengths.tolist(), domains=domains)
    ).isel(layer=0)
    code, prose = (result.sel(domain=domain, expert=0) for domain in ("code", "prose"))
    assert code["share_lower"] < 0.5 < code["share_upper"] < code["share_lower"] + 0.06
    assert prose["share_lower"] < 0.25 < prose["share_upper"] < prose["share_lower"] + 0.06
    assert 1 < code["lift_lower"] < code["lift"] < code["lift_upper"]
    assert prose["lift_lower"] < prose["lift"] < prose["lift_upper"] < 1


def test_specialization_resamples_numerator_and_denominator_together():
    """With a single group the lift is 1 in every draw, whatever the draw."""
    result = routing_stats.specialization(random_recording(), by=("domain",))
    assert (result["lift_upper"] > result["lift_lower"]).any()
    whole = routing_stats.specialization(random_recording(domains=["all"] * 5))
    used = whole["share"] > 0
    close(whole["lift_lower"].where(used, 1), 1)
    close(whole["lift_upper"].where(used, 1), 1)


def test_an_expert_that_a_group_never_chose_is_bounded():
    chosen = np.concatenate([np.tile([0, 1], 50), np.tile([0, 2], 50)])[:, None]
    recording = from_experts(chosen, n_experts=3, lengths=[20] * 10, domains=["a"] * 5 + ["b"] * 5)
    result = routing_stats.specialization(recording).sel(domain="a").isel(layer=0)
    close(result["share_lower"][2], 0)
    assert result["share_upper"][2] == pytest.approx(3 / 100, rel=2e-3)
    assert result["lift_upper"][2] == pytest.approx(3 / 100 / 0.25, rel=2e-3)


# Tokens


def test_top_tokens_by_hand():
    # token 7 six times, five of them to expert 0; token 8 three times; token 9 twice, below the floor
    token_id = np.array([7, 7, 7, 7, 7, 7, 8, 8, 8, 9, 9])
    chosen = np.array([0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0])[:, None]
    recording = from_experts(chosen, n_experts=3, lengths=[11], layers=[3], token_id=token_id)
    table = routing_stats.top_tokens(recording, min_count=3)
    assert set(table.dims) == {"row"}
    assert table["layer"].values.tolist() == [3, 3]
    assert table["expert"].values.tolist() == [0, 1]
    assert table["rank"].values.tolist() == [1, 1]
    assert table["token_id"].values.tolist() == [7, 8]
    assert table["count"].values.tolist() == [5, 2]
    assert table["occurrences"].values.tolist() == [6, 3]
    close(table["share"], [5 / 6, 2 / 3])
    close(table["lift"], [5 / 6 / (8 / 11), 2 / 3 / (3 / 11)])
    assert schema.labels(table["attention_kind"]).tolist() == ["nope", "nope"]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("n", "min_count"), [(2, 1), (3, 4), (100, 1), (1, 10**6)])
def test_top_tokens_agrees_with_plain_loops(top_k, n, min_count):
    recording = random_recording(top_k=top_k)
    routing = routing_of(recording)
    chosen, ids = routing["expert_index"].values.tolist(), routing["token_id"].values.tolist()
    expected = []
    for place, layer in enumerate(routing["layer"].values.tolist()):
        for expert in range(routing.sizes["expert"]):
            taken = [token for token, row in zip(ids, chosen, strict=True) if expert in row[place]]
            ranked = sorted(
                (-taken.count(token) / ids.count(token), -taken.count(token), token)
                for token in set(ids)
                if ids.count(token) >= min_count and taken.count(token) >= 2
            )
            for rank, (share, count, token) in enumerate(ranked[:n], start=1):
                expected.append((layer, expert, rank, token, -count, -share, -share / (len(taken) / len(ids))))
    table = routing_stats.top_tokens(recording, n=n, min_count=min_count)
    columns = [table[name].values for name in ("layer", "expert", "rank", "token_id", "count", "share", "lift")]
    close(np.stack(columns, axis=1), np.reshape(expected, (-1, 7)))


@pytest.mark.parametrize("options", [{"n": 0}, {"min_count": 0}])
def test_top_tokens_refuses_numbers_below_one(options):
    with pytest.raises(ProbeError, match="at least 1"):
        routing_stats.top_tokens(small(), **options)
