"""Two recordings of the same tokens: flips, saturation, what changed, and what is no pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr

from probe import store
from probe.bootstrap import Bootstrap, effective_number, share
from probe.routing import pairs, rows
from probe.routing.pairs import MARGIN_EDGES, compare, flips, saturation
from probe.schema import ProbeError, SchemaError
from tests.planted import from_experts, from_logits
from tests.routing_cases import close, routing_of, with_phase

FUNCTIONS = [flips, saturation, compare]
LENGTHS = [9, 1, 0, 14, 6, 8, 7]
LONGER = [30, 25, 0, 40, 22, 28, 35, 31, 1]
"""Enough for every interval to be given."""


def named(function):
    return function.__name__


def by_hand(chosen):
    """Three samples of 3, 0 and 2 tokens through MoE layers 1 and 3."""
    domains = ["code", "prose", "code"]
    return from_experts(np.array(chosen), n_experts=3, lengths=[3, 0, 2], domains=domains, layers=[1, 3])


BEFORE = [[0, 2], [0, 1], [1, 2], [2, 2], [0, 2]]
AFTER = [[0, 2], [1, 0], [1, 0], [2, 2], [0, 2]]


def random_pair(seed=0, *, top_k=2, n_experts=5, changed=0.3, lengths=LENGTHS) -> tuple[xr.DataTree, xr.DataTree]:
    """Recordings of the same tokens, of which some decisions were made anew."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(sum(lengths), 3, n_experts)) + np.linspace(1, -1, n_experts)
    anew = random.random(logits.shape[:2]) < changed
    other = np.where(anew[..., None], random.normal(size=logits.shape), logits)
    ids = random.integers(6, size=sum(lengths))
    domains = [f"domain {index % 2}" for index in range(len(lengths))]
    options = {"lengths": lengths, "top_k": top_k, "domains": domains, "layers": [1, 3, 5], "token_id": ids}
    return from_logits(logits, **options), from_logits(other, **options)


def with_samples(recording: xr.DataTree, **columns) -> xr.DataTree:
    """The recording with other columns in ``/samples``."""
    samples = recording["samples"].to_dataset()
    recording = recording.copy()
    recording["samples"] = xr.DataTree(
        samples.assign({name: samples[name].copy(data=np.asarray(values)) for name, values in columns.items()})
    )
    return recording


def with_experts(recording: xr.DataTree, experts: np.ndarray) -> xr.Dataset:
    routing = routing_of(recording)
    return routing.assign(expert_index=routing["expert_index"].copy(data=experts))


def sets_of(recording) -> list[list[set[int]]]:
    return [[set(slots) for slots in layers] for layers in recording["routing"]["expert_index"].values.tolist()]


# By hand


def test_flips_by_hand():
    result = flips(by_hand(BEFORE), by_hand(AFTER))
    close(result["flips"], [1 / 5, 2 / 5])
    assert float(result["token_flips"]) == 2 / 5
    assert int(result["n_documents"]) == 2
    assert np.isnan(result["lower"]).all() and np.isnan(result["token_upper"]), "two documents give no interval"
    by_sample = flips(by_hand(BEFORE), by_hand(AFTER), by="sample")
    close(by_sample["flips"], [[1 / 3, 2 / 3], [0, 0]])
    close(by_sample["token_flips"], [2 / 3, 0])
    by_domain = flips(by_hand(BEFORE), by_hand(AFTER), by="domain")
    close(by_domain["flips"], [[1 / 5, 2 / 5], [np.nan, np.nan]])
    assert by_domain["n_documents"].values.tolist() == [2, 0]


def test_saturation_by_hand():
    before = from_experts(np.array([[[0, 1]], [[2, 3]]]), n_experts=4, lengths=[2])
    after = from_experts(np.array([[[0, 2]], [[2, 3]]]), n_experts=4, lengths=[2])
    result = saturation(before, after)
    close(result["saturation"], [3 / 4])
    close(result["null"], [2 / 4])  # the first loads are even: k / E
    # Loads (1/2, 1/4, 1/4, 0) and (1/4, 0, 1/2, 1/4)
    uneven = from_experts(np.array([[[0, 1]], [[0, 2]]]), n_experts=4, lengths=[2])
    close(saturation(uneven, after)["null"], [2 * (1 / 8 + 1 / 8)])
    close(saturation(uneven, after)["saturation"], [(1 / 2 + 1 / 2) / 2])


def test_the_order_of_slots_is_no_flip():
    experts = np.array([[[0, 1]], [[2, 3]], [[1, 2]]])
    one, other = (from_experts(chosen, n_experts=4, lengths=[3]) for chosen in (experts, experts[..., ::-1]))
    assert flips(one, other)["flips"].values.tolist() == [0]
    assert saturation(one, other)["saturation"].values.tolist() == [1]
    result = compare(one, other)
    assert result["token_flips"] == 0 and not result["load_shift"].any()


def test_compare_by_hand():
    result = compare(by_hand(BEFORE), by_hand(AFTER))
    close(result["flips"], [1 / 5, 2 / 5])
    close(result["flips_by_domain"], [[1 / 5, 2 / 5], [np.nan, np.nan]])
    assert result["n_documents_by_domain"].values.tolist() == [2, 0]
    # Layer 1: loads (3, 1, 1) and (2, 2, 1) fifths; layer 3: (0, 1, 4) and (2, 0, 3)
    close(result["load_shift"], np.array([[-1, 1, 0], [2, -1, -1]]) / 5)
    middle = [(5 / 10, 3 / 10, 2 / 10), (2 / 10, 1 / 10, 7 / 10)]
    expected = [
        entropy(middle[0]) - (entropy((3 / 5, 1 / 5, 1 / 5)) + entropy((2 / 5, 2 / 5, 1 / 5))) / 2,
        entropy(middle[1]) - (entropy((1 / 5, 4 / 5)) + entropy((2 / 5, 3 / 5))) / 2,
    ]
    close(result["divergence"], expected)


def entropy(shares) -> float:
    return -sum(value * math.log(value) for value in shares)


def test_flips_by_margin_by_hand():
    margins = [0, 0, 6e-8, 0.0029, 0.0031, 0.5, 0.5, 0.5, 12]
    before = np.zeros((9, 1, 2))
    before[:, 0, 0] = margins
    after = before.copy()
    after[[1, 2, 5, 6], 0, 1] = 20
    result = compare(from_logits(before, lengths=[9]), from_logits(after, lengths=[9]))
    shares = dict(zip(result["margin_bin"].values.tolist(), result["flips_by_margin"].values[:, 0], strict=True))
    numbers = dict(zip(result["margin_bin"].values.tolist(), result["n_by_margin"].values[:, 0], strict=True))
    close(list(shares.values()), [1 / 2, 1 / 2, 0, np.nan, np.nan, np.nan, 2 / 3, np.nan, np.nan, 0])
    assert list(numbers.values()) == [2, 2, 1, 0, 0, 0, 3, 0, 0, 1]
    assert list(shares) == [
        "0", "below 0.003", "0.003 to 0.01", "0.01 to 0.03", "0.03 to 0.1",
        "0.1 to 0.3", "0.3 to 1", "1 to 3", "3 to 10", "10 and more",
    ]  # fmt: skip
    assert [*result["margin_from"].values, result["margin_to"].values[-1]] == list(MARGIN_EDGES)


def test_margins_in_no_bin():
    one, other = random_pair()
    routing = routing_of(one)
    margins = np.full(routing["router_margin"].shape, 0.5, np.float16)
    margins[0] = -0.5  # an expert that was forced
    margins[1] = np.nan
    margins[2] = np.inf  # all other experts were masked
    margins[3] = -0.0
    routing = routing.assign(router_margin=routing["router_margin"].copy(data=margins))
    numbers = compare(routing, other)["n_by_margin"]
    assert (numbers.sel(margin_bin="0") == 1).all()
    assert (numbers.sel(margin_bin="10 and more") == 1).all()
    assert (numbers.sel(margin_bin="0.3 to 1") == sum(LENGTHS) - 4).all()
    assert (numbers.sum("margin_bin") == sum(LENGTHS) - 2).all()


def test_every_expert_chosen_has_no_margin():
    one, other = random_pair(top_k=5)
    result = compare(one, other)
    assert not result["n_by_margin"].any()
    assert np.isnan(result["flips_by_margin"]).all() and np.isnan(result["flips_by_margin_upper"]).all()
    assert not result["flips"].any() and (saturation(one, other)["saturation"] == 1).all()


# Properties


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_recording_against_itself(top_k):
    one, _ = random_pair(top_k=top_k)
    result = compare(one, one)
    assert not result["flips"].any() and result["token_flips"] == 0
    assert (result["lower"] == 0).all() and (result["upper"] > 0).all(), "no flip so far is not never"
    for name in ("load_shift", "divergence", "divergence_lower", "divergence_upper", "divergence_null"):
        assert (result[name] == 0).all(), name
    for name in ("load_shift_lower", "load_shift_upper"):
        assert (np.nan_to_num(result[name]) == 0).all(), name
    assert (result["divergence_p_value"] == 1).all()
    kept = saturation(one, one)
    assert (kept["saturation"] == 1).all() and (kept["upper"] == 1).all()


def test_symmetry():
    one, other = random_pair()
    there, back = compare(one, other), compare(other, one)
    for name in ("flips", "lower", "upper", "token_flips", "flips_by_domain"):
        xr.testing.assert_identical(there[name], back[name])
    close(there["divergence"], back["divergence"])
    close(there["load_shift"], -back["load_shift"])
    close(there["load_shift_lower"], -back["load_shift_upper"])
    close(saturation(one, other)["saturation"], saturation(other, one)["saturation"])
    close(saturation(one, other)["null"], saturation(other, one)["null"])


def test_experts_have_no_order():
    one, other = random_pair()
    random = np.random.default_rng(1)
    new = np.stack([random.permutation(5) for _ in range(3)])  # another one at every layer

    def renumbered(recording):
        old = recording["routing"]["expert_index"].values
        return with_experts(recording, new[np.arange(3)[:, None], old].astype(np.uint8))

    expected, actual = compare(one, other), compare(renumbered(one), renumbered(other))
    for name in expected.data_vars:
        if name.startswith("load_shift"):
            values = np.take_along_axis(actual[name].values, new, axis=1)
        else:
            values = actual[name].values
        close(values, expected[name].values, rtol=1e-5)
    for name, values in saturation(one, other).data_vars.items():
        close(saturation(renumbered(one), renumbered(other))[name], values)


def test_documents_have_no_order():
    one, other = random_pair()
    order = [3, 6, 0, 5, 4, 1]
    place = np.concatenate([np.flatnonzero(one["routing"]["sample"].values == sample) for sample in order])
    result = compare(routing_of(one).isel(token=place), routing_of(other).isel(token=place))
    expected = compare(one, other)
    for name in expected.data_vars:
        close(result[name], expected[name])


@pytest.mark.parametrize("by", [None, "domain", "sample", "phase", ["domain", "phase"]])
@pytest.mark.parametrize(("top_k", "n_experts"), [(1, 5), (2, 5), (3, 300)])
def test_against_sets(top_k, n_experts, by):
    one, other = random_pair(top_k=top_k, n_experts=n_experts)
    phase = np.random.default_rng(0).integers(2, size=sum(LENGTHS))
    grouped = rows.grouped(with_phase(one, phase), by)
    shared = np.array(
        [
            [len(a & b) / top_k for a, b in zip(here, there, strict=True)]
            for here, there in zip(sets_of(one), sets_of(other), strict=True)
        ]
    )
    members = [np.flatnonzero(grouped.group == group) for group in range(grouped.n_groups)]
    result = saturation(with_phase(one, phase), other, by=by)
    close(result["saturation"].values.reshape(-1, 3), [shared[tokens].mean(axis=0) for tokens in members])
    chosen = [np.eye(n_experts)[recording["routing"]["expert_index"].values].sum(axis=2) for recording in (one, other)]
    expected = [(chosen[0][own].mean(axis=0) * chosen[1][own].mean(axis=0)).sum(axis=-1) / top_k for own in members]
    close(result["null"].values.reshape(-1, 3), expected)
    result = flips(with_phase(one, phase), other, by=by)
    flipped = shared < 1
    close(result["flips"].values.reshape(-1, 3), [flipped[tokens].mean(axis=0) for tokens in members])
    close(result["token_flips"].values.reshape(-1), [flipped[tokens].any(axis=1).mean() for tokens in members])


def test_groups_are_those_of_the_first():
    one, other = random_pair()
    other = routing_of(other)
    codes = other["domain"].copy(data=np.zeros(sum(LENGTHS), np.uint8)).assign_attrs(categories=["elsewhere"])
    relabelled = other.assign_coords(domain=codes)
    for function in (flips, saturation):
        xr.testing.assert_identical(function(one, relabelled, by="domain"), function(one, other, by="domain"))
        assert function(one, relabelled, by="domain")["domain"].values.tolist() == ["domain 0", "domain 1"]
    xr.testing.assert_identical(compare(one, relabelled), compare(one, other))


# Intervals


def flipped_per_document(one, other):
    """(document, layer or any, kept or flipped)."""
    flipped = np.array(
        [
            [a != b for a, b in zip(here, there, strict=True)]
            for here, there in zip(sets_of(one), sets_of(other), strict=True)
        ]
    )
    flipped = np.concatenate([flipped, flipped.any(axis=1, keepdims=True)], axis=1)
    sample = one["routing"]["sample"].values
    return np.stack(
        [[(~flipped[sample == s]).sum(axis=0), flipped[sample == s].sum(axis=0)] for s in np.unique(sample)]
    )


def test_bounds_of_flips_resample_documents():
    one, other = random_pair(lengths=LONGER)
    per_document = flipped_per_document(one, other).transpose(0, 2, 1)
    expected = Bootstrap(0.9, 200, 3).share_interval(per_document)
    result = flips(one, other, level=0.9, n_resamples=200, seed=3)
    close(result["lower"], expected.lower[:3, 1])
    close(result["upper"], expected.upper[:3, 1])
    close([result["token_lower"], result["token_upper"]], [expected.lower[3, 1], expected.upper[3, 1]])
    assert result.attrs == {"level": 0.9, "n_resamples": 200, "seed": 3}
    assert ((result["lower"] < result["flips"]) & (result["flips"] < result["upper"])).all()


def test_bounds_of_saturation_resample_documents():
    one, other = random_pair(lengths=LONGER)
    same = np.array(
        [[len(a & b) for a, b in zip(*both, strict=True)] for both in zip(sets_of(one), sets_of(other), strict=True)]
    )
    sample = one["routing"]["sample"].values
    counts = np.stack([[(2 - same[sample == s]).sum(axis=0), same[sample == s].sum(axis=0)] for s in np.unique(sample)])
    expected = Bootstrap().share_interval(counts.transpose(0, 2, 1))
    result = saturation(one, other)
    assert ((result["lower"] < result["saturation"]) & (result["saturation"] < result["upper"])).all()
    close(result["lower"], expected.lower[:, 1])
    close(result["upper"], expected.upper[:, 1])


def test_the_shift_in_load_is_paired():
    one, other = random_pair(top_k=1, changed=0.1, lengths=[40] * 12)
    result = compare(one, other)
    first, second = (recording["samples"]["expert_count"].values.astype(float) for recording in (one, other))
    weights = Bootstrap().weights(12).astype(float)
    drawn = share(np.einsum("rd,dle->rle", weights, second)) - share(np.einsum("rd,dle->rle", weights, first))
    n_effective = effective_number(first.sum(axis=-1))[:, None]
    lower, upper = Bootstrap().bounds(result["load_shift"].values, drawn, n_effective)
    close(result["load_shift_lower"], lower, atol=1e-6)
    close(result["load_shift_upper"], upper, atol=1e-6)
    # Documents differ far more among themselves than a document does between the recordings.
    unpaired = share(np.einsum("rd,dle->rle", weights, second)) - share(np.einsum("rd,dle->rle", weights[::-1], first))
    assert drawn.std(axis=0).mean() < 0.7 * unpaired.std(axis=0).mean()


def test_the_shift_of_a_rare_expert_has_no_bounds():
    experts = np.zeros((60, 1), int)
    experts[:2, 0] = 1  # in one document only
    experts[10::5, 0] = 2
    recording = from_experts(experts, n_experts=4, lengths=[10] * 6)
    result = compare(recording, recording)
    assert np.isnan(result["load_shift_lower"].values[0]).tolist() == [False, True, False, True]


def test_bounds_by_margin():
    one, other = random_pair(lengths=[60] * 8)
    result = compare(one, other)
    margins = one["routing"]["router_margin"].values.astype(float)
    kept = np.array(
        [[a == b for a, b in zip(*both, strict=True)] for both in zip(sets_of(one), sets_of(other), strict=True)]
    )
    inside = (margins >= 0.3) & (margins < 1)
    for layer in range(3):
        counts = np.zeros((8, 1, 2))
        np.add.at(
            counts[:, 0], (one["routing"]["sample"].values, 1 - kept[:, layer].astype(int)), inside[:, [layer]][:, 0]
        )
        expected = Bootstrap().share_interval(counts)
        at = {"margin_bin": "0.3 to 1", "layer": [1, 3, 5][layer]}
        close(result["flips_by_margin"].sel(at), counts[:, 0, 1].sum() / counts.sum())
        close(result["flips_by_margin_lower"].sel(at), expected.lower[0, 1])
        close(result["flips_by_margin_upper"].sel(at), expected.upper[0, 1])


# The same tokens?


def recording_of(lengths, *, ids=None, n_experts=3, layers=(0, 1), top_k=1, names=None) -> xr.DataTree:
    n_tokens = sum(lengths)
    ids = np.arange(n_tokens) if ids is None else ids
    experts = np.tile(np.arange(top_k), (n_tokens, len(layers), 1))
    recording = from_experts(experts, n_experts=n_experts, lengths=lengths, layers=layers, token_id=ids)
    return with_samples(recording, name=names or [f"{chr(97 + sample)}.txt" for sample in range(len(lengths))])


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_other_lengths_are_named(function):
    one, other = recording_of([2, 3, 4]), recording_of([2, 5, 2])
    with pytest.raises(ProbeError) as error:
        function(one, other)
    expected = "holds 3 tokens in one recording and 5 in the other: compare recordings of the same tokens"
    assert str(error.value) == f'sample 1 ("b.txt") {expected}'
    with pytest.raises(ProbeError) as error:
        function(routing_of(one), other)
    assert str(error.value) == f'sample 1 ("b.txt") {expected}'
    with pytest.raises(ProbeError) as error:
        function(routing_of(one), routing_of(other))
    assert str(error.value) == f"sample 1 {expected}"


def test_more_samples_are_named():
    one, other = recording_of([2, 3]), recording_of([2, 3, 4])
    with pytest.raises(ProbeError, match=r'^sample 2 \("c.txt"\) holds 0 tokens in one recording and 4 in the other: '):
        flips(one, other)
    with pytest.raises(ProbeError, match=r"^sample 2 holds 4 tokens in one recording and 0 in the other: "):
        flips(routing_of(other), routing_of(one))
    with pytest.raises(ProbeError, match=r"^sample 1 holds 3 tokens in one recording and 2 in the other: "):
        flips(routing_of(one), routing_of(one).isel(token=slice(0, 4)))
    # A sample without a token holds the same tokens
    assert not flips(one, recording_of([2, 3, 0]))["flips"].any()


@pytest.mark.parametrize("hashes", [None, (["x", "y"], ["x", "z"])])
def test_other_token_ids_are_named(hashes):
    one, other = recording_of([2, 3]), recording_of([2, 3], ids=[0, 1, 2, 9, 4])
    if hashes:
        one, other = (with_samples(recording, text_sha256=h) for recording, h in zip((one, other), hashes, strict=True))
    expected = "is another text: at position 1 stands token id 3 in one recording and 9 in the other"
    with pytest.raises(ProbeError) as error:
        flips(one, other)
    assert str(error.value) == f'sample 1 ("b.txt") {expected}: compare recordings of the same tokens'
    with pytest.raises(ProbeError, match=f"^sample 1 {expected}"):
        flips(routing_of(one), routing_of(other))


def test_the_first_sample_that_differs_is_named():
    one = with_samples(recording_of([2, 3, 4]), text_sha256=["x", "y", "z"])
    other = with_samples(recording_of([2, 3, 5], ids=[0, 8, 2, 3, 4, 5, 6, 7, 8, 9]), text_sha256=["o", "y", "t"])
    with pytest.raises(ProbeError, match=r'^sample 0 \("a.txt"\) is another text'):
        flips(one, other)


def test_both_names_are_given():
    with pytest.raises(ProbeError, match=r'^sample 0 \("a.txt", in the other "x.txt"\) holds 2 tokens'):
        flips(recording_of([2]), recording_of([3], names=["x.txt"]))
    assert not flips(recording_of([2]), recording_of([2], names=["x.txt"]))["flips"].any()


def test_another_order_is_named():
    one = recording_of([2, 3])
    turned = routing_of(one).isel(token=[0, 1, 2, 4, 3])
    with pytest.raises(
        ProbeError, match=r'^row 3 is position 1 of sample 1 \("b.txt"\) in one recording and position 2'
    ):
        flips(one, turned)
    turned = routing_of(one).isel(token=[2, 3, 4, 0, 1])
    with pytest.raises(ProbeError, match="^row 0 is position 0 of sample 0 .* position 0 of sample 1 .*same order$"):
        flips(one, turned)


def test_a_text_and_its_token_ids_are_the_same_tokens():
    one = with_samples(recording_of([2, 3]), text_sha256=["text", "text"])
    other = with_samples(recording_of([2, 3]), text_sha256=["ids", "ids"])
    assert not flips(one, other)["flips"].any()


def test_texts_are_compared_before_rows_are_read(monkeypatch):
    one = with_samples(recording_of([2, 3, 4]), text_sha256=["x", "y", "z"])
    lengths = recording_of([2, 3, 5])
    ids = with_samples(recording_of([2, 3, 4], ids=[0, 1, 7, 3, 4, 5, 6, 7, 8]), text_sha256=["x", "o", "z"])
    seen = []
    blocks = rows.Rows.blocks

    def watched(self, *names, **options):
        seen.append(self.n_tokens)
        return blocks(self, *names, **options)

    monkeypatch.setattr(rows.Rows, "blocks", watched)
    with pytest.raises(ProbeError, match="sample 2 .* 4 tokens"):
        compare(one, with_samples(lengths, text_sha256=["x", "y", "z"]))
    assert seen == []
    with pytest.raises(ProbeError, match="sample 1 .* another text"):
        compare(one, ids)
    assert seen == [3, 3], "only the rows of the sample"


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": (1, 3)},
            "^one recording holds layers 0, 1, the other 1, 3: compare recordings of the same layers$",
        ),
        ({"layers": (0,)}, "holds layers 0, 1, the other 0: "),
        ({"n_experts": 16}, "^one recording has 3 experts a layer, the other 16: .*the same experts$"),
        ({"top_k": 2}, "^a token chooses 1 experts in one recording and 2 in the other: .*the same top-k$"),
    ],
)
def test_another_architecture_is_named(function, options, message):
    with pytest.raises(ProbeError, match=message):
        function(recording_of([2, 3]), recording_of([2, 3], **options))


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_missing_parts_are_named(function):
    one, other = random_pair()
    for name in ("expert_index", "sample", "position", "token_id"):
        for pair in [(routing_of(one).drop_vars(name), other), (one, routing_of(other).drop_vars(name))]:
            with pytest.raises(SchemaError, match=f"{name!r} is missing"):
                function(*pair)
    with pytest.raises(ProbeError, match="level"):
        function(one, other, level=1)
    if function is not compare:
        with pytest.raises(SchemaError, match="cannot split by 'tile'"):
            function(one, other, by="tile")


def test_compare_needs_margin_and_domain():
    one, other = random_pair()
    with pytest.raises(SchemaError, match="'router_margin' is missing"):
        compare(routing_of(one).drop_vars("router_margin"), other)
    with pytest.raises(SchemaError, match="'domain'"):
        compare(routing_of(one).drop_vars("domain"), other)
    compare(one, routing_of(other).drop_vars(["router_margin", "domain"]))


# Shapes


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1], [1, 1, 1, 1, 1, 1]])
def test_hardly_any_tokens(function, lengths):
    recording = from_experts(np.zeros((sum(lengths), 2), int), n_experts=3, lengths=lengths, layers=[1, 3])
    for options in [{}] if function is compare else [{"by": None}, {"by": "domain"}, {"by": "sample"}]:
        result = function(recording, recording, **options)
        if sum(lengths) == 0:
            for name, variable in result.data_vars.items():
                assert np.isnan(variable).all() if variable.dtype.kind == "f" else not variable.any(), name


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_labels(function):
    result = function(*random_pair())
    for variable in (*result.data_vars.values(), *result.coords.values()):
        assert variable.attrs["long_name"] and variable.attrs["units"], variable.name
    assert result["layer"].values.tolist() == [1, 3, 5]
    assert result["attention_kind"].dims == ("layer",)
    expected = {"flips": ("layer",), "saturation": ("layer",), "token_flips": (), "load_shift": ("layer", "expert")}
    expected |= {"flips_by_domain": ("domain", "layer"), "flips_by_margin": ("margin_bin", "layer")}
    for name in set(expected) & set(result.data_vars):
        assert result[name].dims == expected[name]
    if function is not compare:
        assert function(*random_pair(), by=["domain", "phase"])["lower"].dims == ("domain", "phase", "layer")


@pytest.mark.parametrize("function", [flips, saturation], ids=named)
def test_groups_in_several_passes_give_the_same(function, monkeypatch):
    one, other = random_pair()
    expected = function(one, other, by="sample")
    monkeypatch.setattr(rows, "CELLS_OF_DOCUMENTS", 20)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 4)
    xr.testing.assert_identical(function(one, other, by="sample"), expected)


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_a_store_and_small_blocks_give_the_same(function, tmp_path, monkeypatch):
    one, other = random_pair()
    expected = function(one, other)
    xr.testing.assert_identical(function(routing_of(one), other), expected)
    opened = [store.open(store.save(tree, tmp_path / name)) for name, tree in {"a": one, "b": other}.items()]
    assert opened[0]["routing"]["expert_index"].chunks is not None, "the store is read lazily"
    xr.testing.assert_identical(function(*opened), expected)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 7)
    xr.testing.assert_identical(function(*opened), expected)
    xr.testing.assert_identical(function(one, other), expected)
    with pytest.raises(ProbeError, match="sample 4 .*holds 6 tokens in one recording and 5 in the other"):
        function(opened[0], routing_of(other).isel(token=np.arange(sum(LENGTHS)) != 29))


def test_nothing_is_changed_in_the_recordings():
    one, other = random_pair()
    before = one.copy(deep=True), other.copy(deep=True)
    for function in FUNCTIONS:
        function(one, other)
    assert one.identical(before[0]) and other.identical(before[1])


def test_the_bins_of_margins_say_their_edges():
    words = pairs.compare(*random_pair())["margin_bin"].values.tolist()
    assert len(words) == len(set(words)) == len(MARGIN_EDGES) - 1
    for word, low, high in zip(words[2:-1], MARGIN_EDGES[2:], MARGIN_EDGES[3:], strict=False):
        assert [float(part) for part in word.split(" to ")] == [low, high]
