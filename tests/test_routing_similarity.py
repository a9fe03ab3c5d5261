"""How alike loads are, and how alike samples: divergence and signature."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import xarray as xr
from scipy.spatial.distance import jensenshannon

from probe import store
from probe.bootstrap import Bootstrap
from probe.routing import rows
from probe.routing.load import expert_load
from probe.routing.similarity import N_PERMUTATIONS, divergence, document_weights, signature
from probe.schema import ProbeError, SchemaError
from tests.planted import from_experts
from tests.routing_cases import close, random_recording, routing_of, with_phase

FUNCTIONS = [divergence, signature]
LENGTHS = [9, 1, 0, 14, 6, 8, 7, 5, 11, 6, 10, 4]


def named(function):
    return function.__name__


def one_layer(documents, *, n_experts=3, domains=None, **options) -> xr.DataTree:
    """Documents as lists of first choices, at a single layer."""
    experts = np.array(sum(documents, []), int)[:, None]
    lengths = [len(document) for document in documents]
    return from_experts(experts, n_experts=n_experts, lengths=lengths, domains=domains, **options)


def random_documents(seed=0, **options) -> xr.DataTree:
    return random_recording(seed, lengths=LENGTHS, **options)


def renumbered(recording: xr.DataTree, new: np.ndarray) -> xr.Dataset:
    """The recording with other numbers for the experts of each layer, ``new`` (layer, expert)."""
    routing = routing_of(recording)
    old = routing["expert_index"]
    experts = new[np.arange(len(new))[:, None], old.values].astype(old.dtype)
    return routing.assign(expert_index=old.copy(data=experts))


def random_numbers(n_experts=5) -> np.ndarray:
    random = np.random.default_rng(7)
    return np.stack([random.permutation(n_experts) for _ in range(3)])


# Divergence by hand


def test_divergence_by_hand():
    recording = one_layer([[0, 0], [1, 1], [0, 1]], domains=["a", "b", "c"])
    result = divergence(recording)
    apart, half = np.log(2), 0.75 * np.log(4 / 3) + 0.25 * np.log(4) - np.log(2) / 2
    expected = [[0, apart, half], [apart, 0, half], [half, half, 0]]
    close(result["jensen_shannon"].sel(layer=0), expected)
    close(result["normalized"].sel(domain="a", other_domain="b"), [np.log(2) / np.log(3)])
    close(result["normalized"].sel(domain="a", other_domain="c"), [half / (np.log(3) - np.log(2) / 2)])
    assert result["jensen_shannon"].dims == ("domain", "other_domain", "layer")
    assert np.isnan(result["lower"]).all() and np.isnan(result["upper"]).all(), "one document each"


def test_equal_loads():
    recording = one_layer([[0, 1, 1], [1, 0, 1], [0, 1, 2], [2, 1, 0]], domains=["a", "b", "c", "d"])
    result = divergence(recording)["jensen_shannon"].sel(domain="a", other_domain="b")
    close(result, [0])
    normalized = divergence(recording)["normalized"]
    close(normalized.sel(domain="a", other_domain="b"), [0])
    assert np.isnan(normalized.sel(domain="c", other_domain="d")).all(), "both are even: nothing to compare with"
    assert (divergence(recording)["jensen_shannon"].sel(domain="c", other_domain="d") == 0).all()


def test_two_recordings_by_hand():
    one = one_layer([[0, 0], [1, 1]], domains=["a", "b"])
    other = one_layer([[1], [0, 1], [2]], domains=["b", "a", "c"])  # other tokens, other codes for the domains
    half = 0.75 * np.log(4 / 3) + 0.25 * np.log(4) - np.log(2) / 2
    result = divergence(one, other)
    assert result["jensen_shannon"].dims == ("domain", "layer")
    close(result["jensen_shannon"].sel(domain=["a", "b"]), [[half], [0]])
    # All tokens: (1/2, 1/2, 0) and (1/4, 1/2, 1/4)
    middle = [3 / 8, 1 / 2, 1 / 8]
    entropy = [-sum(p * np.log(p) for p in load if p) for load in (middle, [1 / 2, 1 / 2, 0], [1 / 4, 1 / 2, 1 / 4])]
    result = divergence(one, other, by=None)
    close(result["jensen_shannon"], [entropy[0] - (entropy[1] + entropy[2]) / 2])
    assert result["jensen_shannon"].dims == ("layer",)
    backwards = divergence(other, one)["jensen_shannon"]
    close(backwards.sel(domain=["b", "a", "c"]), [[0], [half], [np.nan]])


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("by", ["domain", "phase", "position"])
def test_against_scipy(top_k, by):
    recording = random_documents(top_k=top_k)
    routing = with_phase(recording, np.random.default_rng(0).integers(2, size=sum(LENGTHS)))
    load = expert_load(routing, by=by).values
    result = divergence(routing, by=by, n_resamples=2)["jensen_shannon"].values
    for one, two, layer in product(range(len(load)), range(len(load)), range(3)):
        close(result[one, two, layer], jensenshannon(load[one, layer], load[two, layer]) ** 2, atol=1e-9)


def test_recordings_against_scipy():
    one, other = random_documents(1), random_documents(2, domains=["domain 1", "domain 0"] * 6)
    result = divergence(one, other)["jensen_shannon"]
    for domain in ("domain 0", "domain 1"):
        loads = [expert_load(recording, by="domain").sel(domain=domain).values for recording in (one, other)]
        close(result.sel(domain=domain), jensenshannon(*loads, axis=-1) ** 2, atol=1e-9)


def test_several_coords_make_several_dims():
    recording = with_phase(random_documents(), np.arange(sum(LENGTHS)) % 2)
    result = divergence(recording, by=["domain", "phase"], n_resamples=2)["jensen_shannon"]
    assert result.dims == ("domain", "phase", "other_domain", "other_phase", "layer")
    own = recording.isel(token=np.flatnonzero(recording["domain"].values == 1))
    expected = divergence(own, by="phase", n_resamples=2)["jensen_shannon"]
    xr.testing.assert_allclose(
        result.sel(domain="domain 1", other_domain="domain 1").drop_vars(["domain", "other_domain"]), expected
    )


# Divergence: properties


def test_divergence_is_symmetric_and_zero_on_the_diagonal():
    result = divergence(random_documents(top_k=2))
    for name, values in result.data_vars.items():
        np.testing.assert_array_equal(values, values.transpose("other_domain", "domain", "layer"), err_msg=name)
    for domain in result["domain"].values:
        own = result.sel(domain=domain, other_domain=domain)
        for name in ("jensen_shannon", "lower", "upper", "null", "normalized"):
            assert (own[name] == 0).all(), name
        assert (own["p_value"] == 1).all()
    one, other = random_documents(1), random_documents(2)
    close(divergence(one, other)["jensen_shannon"], divergence(other, one)["jensen_shannon"])


@pytest.mark.parametrize("by", [None, "domain", "sample"])
def test_a_recording_against_itself(by):
    result = divergence(random_documents(), random_documents(), by=by)
    for name in ("jensen_shannon", "null"):
        assert (result[name] == 0).all(), name
    assert (result["p_value"] == 1).all()
    assert (np.nan_to_num(result["lower"]) == 0).all() and (np.nan_to_num(result["upper"]) == 0).all()
    assert np.isnan(result["upper"]).all() == (by == "sample")


def test_experts_have_no_order():
    new = random_numbers()
    recording, other = random_documents(), random_documents(2)
    xr.testing.assert_allclose(divergence(renumbered(recording, new)), divergence(recording), rtol=1e-6, atol=1e-9)
    actual = divergence(renumbered(recording, new), renumbered(other, new))
    xr.testing.assert_allclose(actual, divergence(recording, other), rtol=1e-6, atol=1e-9)


def test_bounds_resample_the_documents_of_each_group():
    recording = random_documents()
    result = divergence(recording, level=0.9, n_resamples=50, seed=4)
    bootstrap = Bootstrap(0.9, 50, 4)
    counts = recording["samples"]["expert_count"].values.astype(float)
    members = [[sample for sample in range(domain, 12, 2) if LENGTHS[sample]] for domain in (0, 1)]
    weights = document_weights(bootstrap, [np.array(own) for own in members])
    for layer in range(3):
        drawn = [w.astype(float) @ counts[own, layer] for w, own in zip(weights, members, strict=True)]
        resampled = jensenshannon(*drawn, axis=-1) ** 2
        estimate = jensenshannon(*(counts[own, layer].sum(axis=0) for own in members)) ** 2
        sizes = [np.array(LENGTHS)[own] for own in members]
        worth = min(size.sum() ** 2 / np.square(size).sum() for size in sizes)
        lower, upper = bootstrap.bounds(np.array(estimate), resampled, worth)
        cell = result.isel(domain=0, other_domain=1, layer=layer)
        close([cell["lower"], cell["upper"]], [max(lower, 0), min(upper, np.log(2))], atol=1e-6)
        assert cell["lower"] <= cell["jensen_shannon"] <= cell["upper"]
    assert {"level": 0.9, "n_resamples": 50, "seed": 4, "n_permutations": N_PERMUTATIONS} == result.attrs


def test_the_same_documents_are_drawn_for_both_recordings():
    random = np.random.default_rng(0)
    # Every document has one favourite, so documents differ much more than the two recordings do.
    before = [[favourite] * 20 for favourite in [0, 1, 2, 0, 1, 2, 0, 1]]
    after = [document[:-1] + [int(random.integers(3))] for document in before]
    one, other = one_layer(before), one_layer(after)
    paired = divergence(one, other, by=None).isel(layer=0)
    apart = divergence(one, one_layer(after[::-1], token_id=np.ones(160)), by=None).isel(layer=0)
    close(paired["jensen_shannon"], apart["jensen_shannon"])
    assert float(paired["upper"]) < 0.1 * float(apart["upper"])
    assert float(paired["null"]) < 0.1 * float(apart["null"])


def test_texts_say_that_samples_are_the_same():
    """The tokens differ, as where a model wrote the rest of a prompt, but not the samples."""

    def of_texts(documents, texts):
        recording = one_layer(documents, token_id=np.arange(sum(map(len, documents))) + len(documents[0]))
        samples = recording["samples"].to_dataset()
        hashes = samples["text_sha256"].copy(data=np.array(texts, dtype=np.dtypes.StringDType()))
        recording["samples"] = xr.DataTree(samples.assign(text_sha256=hashes))
        return recording

    one = of_texts([[favourite] * 20 for favourite in [0, 1, 2, 0, 1, 2]], list("abcdef"))
    longer = [[favourite] * 22 for favourite in [0, 1, 2, 0, 1, 2]]
    same, another = of_texts(longer, list("abcdef")), of_texts(longer, list("uvwxyz"))
    uppers = [divergence(one, recording, by=None)["upper"].item() for recording in (same, another)]
    assert uppers[0] < 1e-6 and uppers[1] > 0.1


def test_draws_are_shared_where_a_document_lies_in_two_groups():
    bootstrap = Bootstrap(n_resamples=20)
    first, second = document_weights(bootstrap, [np.array([0, 2, 3]), np.array([2, 3, 7])])
    np.testing.assert_array_equal(first[:, 1:], second[:, :2])
    np.testing.assert_array_equal(first.sum(axis=1) + second[:, 2], 4)
    first, second = document_weights(bootstrap, [np.array([0, 2, 3]), np.array([1, 4, 5])])
    assert (first.sum(axis=1) == 3).all() and (second.sum(axis=1) == 3).all()
    assert (first != second).any(), "groups are drawn independently"
    first, second = document_weights(bootstrap, [np.array([0, 1, 2]), np.array([0, 1, 2])], related=False)
    assert (first != second).any()


# The noise floor


def test_null_of_two_and_two_documents():
    """Of the 6 ways to deal two documents to each side, 2 keep them apart; of the 4 swaps of pairs, 2."""
    recording = one_layer([[0], [0], [1], [1]], domains=["a", "a", "b", "b"])
    result = divergence(recording).sel(domain="a", other_domain="b")
    close(result["null"], [np.log(2) / 3], atol=0.09)
    close(result["p_value"], [1 / 3], atol=0.13)

    one, other = one_layer([[0], [0]]), one_layer([[1], [1]])
    result = divergence(one, other, by=None)
    close(result["null"], [np.log(2) / 2], atol=0.1)
    close(result["p_value"], [1 / 2], atol=0.14)
    elsewhere = one_layer([[1], [1]], token_id=np.array([5, 6]))
    close(divergence(one, elsewhere, by=None)["null"], [np.log(2) / 3], atol=0.09)


def test_null_within_documents():
    """Every document has both phases, which swap: one document is exchanged as a whole."""
    recording = with_phase(one_layer([[0, 1]]), [0, 1])
    result = divergence(recording, by="phase").isel(phase=0, other_phase=1)
    close(result["jensen_shannon"], [np.log(2)])
    close(result["null"], [np.log(2)])
    close(result["p_value"], [1])
    # A document with one phase only is dealt anew, among its like: here it can only stay.
    recording = with_phase(one_layer([[0, 1], [0]]), [0, 1, 0])
    result = divergence(recording, by="phase").isel(phase=0, other_phase=1)
    swapped = 0.75 * np.log(4 / 3) + 0.25 * np.log(4) - np.log(2) / 2  # (1/2, 1/2) against (1, 0)
    close(result["null"], [(np.log(2) + swapped) / 2], atol=0.06)


def test_p_value_of_domains_that_differ_and_of_one_that_does_not():
    random = np.random.default_rng(3)
    shares = np.repeat([[0.6, 0.3, 0.1], [0.1, 0.3, 0.6], [0.1, 0.3, 0.6]], 8, axis=0)
    documents = [random.choice(3, size=30, p=share).tolist() for share in shares]
    result = divergence(one_layer(documents, domains=["a"] * 8 + ["b"] * 8 + ["c"] * 8)).isel(layer=0)
    assert float(result["p_value"].sel(domain="a", other_domain="b")) == pytest.approx(1 / 201)
    assert float(result["p_value"].sel(domain="b", other_domain="c")) > 0.05
    same = result.sel(domain="b", other_domain="c")
    assert float(same["lower"]) == 0 < float(same["jensen_shannon"]) < 3 * float(same["null"])
    apart = result.sel(domain="a", other_domain="b")
    assert float(apart["lower"]) > float(apart["null"])


def test_the_seed_decides():
    recording = random_documents()
    xr.testing.assert_identical(divergence(recording, seed=3), divergence(recording, seed=3))
    for name in ("null", "upper"):
        assert not divergence(recording, seed=3)[name].equals(divergence(recording, seed=4)[name])


# Signature


def test_signature_by_hand():
    recording = one_layer([[0, 0], [0, 1], [], [2]])
    result = signature(recording)["signature"]
    assert result.dims == ("sample", "other_sample")
    assert result["sample"].values.tolist() == result["other_sample"].values.tolist() == [0, 1, 3]
    close(result, [[1, np.sqrt(1 / 2), 0], [np.sqrt(1 / 2), 1, 0], [0, 0, 1]])
    # Two layers: frequencies (1, 0 | 0, 1) and (1/2, 1/2 | 0, 1)
    experts = np.array([[0, 1], [0, 1], [0, 1], [1, 1]])
    result = signature(from_experts(experts, n_experts=2, lengths=[2, 2]))["signature"]
    close(result.values[0, 1], (1 / 2 + 1) / np.sqrt(2 * 1.5))


def test_mean_signature_by_hand():
    recording = one_layer([[0, 0], [0, 1], [2], [0], [1, 1]], domains=["a", "a", "a", "b", "c"])
    result = signature(recording, by="domain")
    half = np.sqrt(1 / 2)
    expected = [[half / 3, (1 + half) / 3, half / 3], [(1 + half) / 3, np.nan, 0], [half / 3, 0, np.nan]]
    close(result["signature"], expected)
    assert result["n_pairs"].values.tolist() == [[6, 3, 3], [3, 0, 1], [3, 1, 0]]
    assert result["n_documents"].values.tolist() == [3, 1, 1]
    assert np.isnan(result["lower"]).all() and np.isnan(result["upper"]).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_means_are_those_of_the_pairs(top_k):
    recording = random_documents(top_k=top_k)
    single = signature(recording)["signature"]
    result = signature(recording, by="domain", n_resamples=2)["signature"].values
    domain = single["sample"].values % 2
    for one, two in product(range(2), range(2)):
        cosines = single.values[np.ix_(domain == one, domain == two)]
        distinct = ~np.eye(len(domain), dtype=bool)[np.ix_(domain == one, domain == two)]
        close(result[one, two], cosines[distinct].mean())


def test_a_sample_in_two_groups_is_not_paired_with_itself():
    recording = with_phase(one_layer([[0, 0], [1, 1]]), [0, 1, 0, 1])
    result = signature(recording, by="phase")
    # Each document is equal to itself and has nothing in common with the other.
    close(result["signature"], np.zeros((2, 2)))
    assert (result["n_pairs"] == 2).all()
    one = with_phase(one_layer([[0, 0]]), [0, 1])
    assert np.isnan(signature(one, by="phase")["signature"]).all() and not signature(one, by="phase")["n_pairs"].any()


@pytest.mark.parametrize("by", ["domain", "phase"])
def test_bounds_of_the_signature_leave_copies_out(by):
    """Drawn documents are paired one by one; one that was drawn twice is no pair with its copy."""
    recording = with_phase(random_documents(), np.arange(sum(LENGTHS)) % 2)
    grouped = rows.grouped(recording, by)
    documents = [(found.sample, found.counts) for found in grouped.documents()]
    bootstrap = Bootstrap(0.9, 25, 2)
    weights = document_weights(bootstrap, [sample for sample, _ in documents])
    units = []
    for _, counts in documents:
        frequency = (counts / counts.sum(axis=-1, keepdims=True)).reshape(len(counts), -1)
        units.append(frequency / np.linalg.norm(frequency, axis=1, keepdims=True))
    result = signature(recording, by=by, level=0.9, n_resamples=25, seed=2)
    for one, two in product(range(2), range(2)):
        resampled = []
        for draw in range(25):
            first, second = (np.repeat(np.arange(len(units[g])), weights[g][draw]) for g in (one, two))
            cosines = [
                units[one][a] @ units[two][b]
                for a, b in product(first, second)
                if documents[one][0][a] != documents[two][0][b]
            ]
            resampled.append(np.mean(cosines))
        estimate = result["signature"].values[one, two]
        worth = min(len(units[one]), len(units[two]))
        lower, upper = bootstrap.bounds(np.array(estimate), np.array(resampled), worth)
        close([result["lower"].values[one, two], result["upper"].values[one, two]], np.clip([lower, upper], 0, 1))
        assert lower < estimate < upper


def test_signature_has_no_order_of_experts():
    recording, new = random_documents(top_k=2), random_numbers()
    for by in (None, "domain"):
        xr.testing.assert_allclose(signature(renumbered(recording, new), by=by), signature(recording, by=by))


def test_samples_that_use_the_same_experts_are_equal():
    recording = one_layer([[0, 1, 2], [2, 1, 0], [0, 0, 1, 1, 2, 2]] * 2, domains=["a", "b"] * 3)
    close(signature(recording)["signature"], np.ones((6, 6)))
    close(signature(recording, by="domain")["signature"], np.ones((2, 2)))


def test_the_diagonal_is_one():
    result = signature(random_documents(top_k=2))["signature"].values
    assert (np.diag(result) == 1).all() and (result <= 1).all() and (result >= 0).all()
    np.testing.assert_array_equal(result, result.T)


# Errors


def test_too_many_groups():
    recording = one_layer([[0]] * 65)
    match = r"'sample' makes 65 groups and 2,080 pairs: split by a coord of at most 64 labels, such as by='domain'"
    for function in FUNCTIONS:
        with pytest.raises(ProbeError, match=match):
            function(recording, by="sample")
        assert function(one_layer([[0]] * 64), by="sample").sizes["other_sample"] == 64
    # Two recordings are compared group by group: no pairs explode.
    assert divergence(recording, recording, by="sample").sizes == {"sample": 65, "layer": 1}
    assert signature(recording)["signature"].shape == (65, 65)


def test_too_many_samples():
    with pytest.raises(ProbeError, match=r"5,001 samples .* at most 5,000 .* by='domain'"):
        signature(one_layer([[0]] * 5001))


def test_nothing_to_compare():
    with pytest.raises(
        ProbeError, match="by=None leaves nothing to compare: name a coord.* or pass a second recording"
    ):
        divergence(random_documents(), by=None)


def test_another_architecture_is_named():
    recording = random_documents()
    with pytest.raises(ProbeError, match="^one recording holds layers 1, 3, 5, the other 1, 3, 7: "):
        divergence(recording, random_documents(layers=[1, 3, 7]))
    with pytest.raises(ProbeError, match="^one recording has 5 experts a layer, the other 6: "):
        divergence(recording, random_documents(n_experts=6))
    assert divergence(recording, random_documents(top_k=2))["jensen_shannon"].notnull().all()


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_missing_parts_are_named(function):
    routing = routing_of(random_documents())
    with pytest.raises(SchemaError, match="'expert_index' is missing"):
        function(routing.drop_vars("expert_index"))
    with pytest.raises(SchemaError, match="cannot split by 'tile'"):
        function(routing, by="tile")
    with pytest.raises(ProbeError, match="level"):
        function(routing, by="domain", level=0)
    with pytest.raises(SchemaError, match="cannot split by 'domain'"):
        divergence(routing, routing.drop_vars("domain"))


# Shapes


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1], [1] * 6])
def test_hardly_any_tokens(lengths):
    recording = from_experts(np.zeros((sum(lengths), 2), int), n_experts=3, lengths=lengths, layers=[1, 3])
    results = [divergence(recording, by=by) for by in ("domain", "sample")]
    results += [divergence(recording, recording, by=by) for by in (None, "domain", "sample")]
    results += [signature(recording, by=by) for by in (None, "domain", "sample")]
    for result in results:
        for name, variable in result.data_vars.items():
            if sum(lengths) == 0:
                assert np.isnan(variable).all() if variable.dtype.kind == "f" else not variable.any(), name
    if lengths == [1] * 6:
        assert not results[0]["jensen_shannon"].any()
        close(results[5]["signature"], np.ones((6, 6)))


def test_groups_without_tokens_are_nan():
    recording = one_layer([[0, 1], [], [1]], domains=["a", "empty", "b"])
    result = divergence(recording)
    for name, values in result.data_vars.items():
        assert np.isnan(values.sel(domain="empty")).all() and np.isnan(values.sel(other_domain="empty")).all(), name
    assert result["jensen_shannon"].sel(domain="a", other_domain="b").notnull().all()
    result = signature(recording, by="domain")
    assert np.isnan(result["signature"].sel(domain="empty")).all()
    assert result["n_documents"].sel(domain="empty") == 0


@pytest.mark.parametrize("options", [{"by": "domain"}, {"by": None, "other": True}, {"by": "sample", "other": True}])
def test_labels_of_divergence(options):
    recording = random_documents()
    result = divergence(recording, recording if options.pop("other", False) else None, **options)
    for variable in (*result.data_vars.values(), *result.coords.values()):
        assert variable.attrs["long_name"] and variable.attrs["units"], variable.name
    assert result["layer"].values.tolist() == [1, 3, 5] and result["attention_kind"].dims == ("layer",)
    assert result["jensen_shannon"].attrs["units"] == "nat"


@pytest.mark.parametrize("by", [None, "domain"])
def test_labels_of_signature(by):
    result = signature(random_documents(), by=by)
    for variable in (*result.data_vars.values(), *result.coords.values()):
        assert variable.attrs["long_name"] and variable.attrs["units"], variable.name


def test_a_store_and_small_blocks_give_the_same(tmp_path, monkeypatch):
    recording, other = random_documents(), random_documents(2)
    statistics = [
        lambda one, two: divergence(one),
        lambda one, two: divergence(one, two),
        lambda one, two: divergence(one, one, by=None),
        lambda one, two: signature(one),
        lambda one, two: signature(one, by="domain"),
    ]
    opened = [store.open(store.save(tree, tmp_path / name)) for name, tree in {"a": recording, "b": other}.items()]
    assert opened[0]["routing"]["expert_index"].chunks is not None, "the store is read lazily"
    expected = [statistic(recording, other) for statistic in statistics]
    for statistic, result in zip(statistics, expected, strict=True):
        xr.testing.assert_identical(statistic(routing_of(recording), routing_of(other)), result)
        xr.testing.assert_identical(statistic(*opened), result)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 7)
    for statistic, result in zip(statistics, expected, strict=True):
        xr.testing.assert_identical(statistic(recording, other), result)
        xr.testing.assert_identical(statistic(*opened), result)


def test_nothing_is_changed_in_the_recording():
    recording = random_documents()
    before = recording.copy(deep=True)
    divergence(recording), signature(recording), signature(recording, by="domain")
    assert recording.identical(before)
