"""Repetition along a sequence, transitions, co-activation and paths, by hand and against plain loops."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from probe import store
from probe.bootstrap import Bootstrap
from probe.routing import flow
from probe.routing import paths as paths_module
from probe.routing.flow import coactivation, repetition, transition
from probe.routing.paths import paths
from probe.schema import ProbeError
from tests.planted import from_experts
from tests.routing_cases import by_name, close, random_recording, routing_of, small, with_phase


def path_of_all(routing) -> xr.Dataset:
    return paths(routing, n=100)


FLOW = [repetition, transition, coactivation, path_of_all]


@pytest.mark.parametrize("function", FLOW, ids=by_name)
def test_how_rows_are_read_changes_nothing(function, monkeypatch, tmp_path):
    recording = random_recording(top_k=3, lengths=(9, 1, 0, 14, 6, 12, 3, 30))
    expected = function(recording)
    opened = store.open(store.save(recording, tmp_path / "run.zarr"))
    assert opened["routing"]["expert_index"].chunks is not None, "the store is read lazily"
    xr.testing.assert_identical(function(opened), expected)
    monkeypatch.setattr("probe.routing.rows.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("probe.routing.rows.CELLS_OF_BLOCK", 4 * 3 * 3)
    monkeypatch.setattr(flow, "ROWS_OF_TABLE", 5)
    xr.testing.assert_identical(function(recording), expected)
    xr.testing.assert_identical(function(opened), expected)


@pytest.mark.parametrize("function", FLOW, ids=by_name)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1], [1, 1, 1]])
def test_samples_of_no_token_or_one(function, lengths):
    chosen = np.tile([0, 2], (sum(lengths), 2, 1))
    result = function(from_experts(chosen, n_experts=3, lengths=lengths, layers=[1, 3]))
    if not sum(lengths):
        for name, values in result.drop_vars("null" if function is coactivation else []).items():
            assert np.isnan(values).all() if values.dtype == float else not values.any(), name
    if function is repetition:
        assert result["n_pairs"] == 0
        assert np.isnan(result["repetition"]).all() and np.isnan(result["either"]).all()


def test_repetition_by_hand():
    chosen = np.array([0, 0, 1, 1, 1, 2, 2])[:, None]
    result = repetition(from_experts(chosen, n_experts=3, lengths=[3, 0, 4])).isel(layer=0)
    # pairs 00 01 | 11 12 22: the step between the samples is none
    assert result["n_pairs"] == 5
    assert result["repetition"] == pytest.approx(3 / 5)
    assert result["null"] == pytest.approx((4 + 9 + 4) / 49)
    assert result["either"] == result["repetition"]
    assert result["either_null"] == result["null"]


def test_repetition_of_the_top_two_by_hand():
    chosen = np.array([[0, 1], [1, 2], [1, 0], [2, 3]])[:, None]
    result = repetition(from_experts(chosen, n_experts=4, lengths=[4])).isel(layer=0)
    assert result["repetition"] == pytest.approx(1 / 3)
    assert result["either"] == pytest.approx(2 / 3)
    # of 4 × 4 draws of the sets 01, 12, 01, 23, only 01 with 23 are disjoint: 2 × 2 draws
    assert result["either_null"] == pytest.approx(12 / 16)


def test_the_published_chance_level_of_two_out_of_eight():
    """Mixtral, Table 5: 12.5 % for the first choice and 46.4 % for either, every pair of experts being as likely."""
    pairs = np.array([(first, second) for first in range(8) for second in range(8) if first != second])[:, None]
    result = repetition(from_experts(pairs, n_experts=8, lengths=[len(pairs)])).isel(layer=0)
    assert result["null"] == pytest.approx(1 / 8)
    assert result["either_null"] == pytest.approx(0.464, abs=5e-4)
    assert result["either_null"] == pytest.approx(1 - (6 * 5) / (8 * 7))


def test_prefill_and_decode_of_one_sample_are_adjacent():
    routing = with_phase(from_experts(np.zeros((4, 1), int), n_experts=2, lengths=[4]), [0, 0, 1, 1])
    assert repetition(routing)["n_pairs"] == 3
    by_phase = repetition(routing, by="phase")
    assert by_phase["n_pairs"].values.tolist() == [1, 1], "a pair lies in a group with both of its tokens"


def test_positions_that_were_left_out_make_no_pair():
    routing = routing_of(from_experts(np.zeros((5, 1), int), n_experts=2, lengths=[5])).isel(token=[0, 1, 3, 4])
    assert repetition(routing)["n_pairs"] == 2


def test_successive_positions_of_two_samples_make_no_pair():
    routing = routing_of(from_experts(np.zeros((6, 1), int), n_experts=2, lengths=[3, 3])).isel(token=[0, 4, 5])
    assert routing["position"].values.tolist() == [0, 1, 2]
    assert repetition(routing)["n_pairs"] == 1


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("by", ["domain", "phase", "token_id"])
def test_repetition_agrees_with_plain_loops(top_k, by):
    routing = with_phase(random_recording(top_k=top_k), np.random.default_rng(2).integers(2, size=30))
    result = repetition(routing, by=by, n_resamples=2)
    chosen, group = routing["expert_index"].values.tolist(), routing[by].values.tolist()
    sample = routing["sample"].values.tolist()
    for place, label in enumerate(result[by].values):
        code = int(label) if by == "token_id" else place
        tokens = [row for row in range(30) if group[row] == code]
        pairs = [row for row in tokens if row + 1 in tokens and sample[row] == sample[row + 1]]
        assert result["n_pairs"][place] == len(pairs)
        for layer in range(3):
            at = result.isel({by: place, "layer": layer})
            sets = [set(row[layer]) for row in chosen]
            same = [chosen[row][layer][0] == chosen[row + 1][layer][0] for row in pairs]
            shared = [bool(sets[row] & sets[row + 1]) for row in pairs]
            null = [chosen[row][layer][0] == chosen[other][layer][0] for row in tokens for other in tokens]
            either_null = [bool(sets[row] & sets[other]) for row in tokens for other in tokens]
            close(at["repetition"], np.mean(same) if pairs else np.nan)
            close(at["either"], np.mean(shared) if pairs else np.nan)
            close(at["null"], np.mean(null))
            close(at["either_null"], np.mean(either_null))


def test_repetition_is_not_mistaken_for_uneven_load():
    """Independent tokens repeat as often as the null says, however uneven the load; sticky ones repeat more."""
    random = np.random.default_rng(0)
    load = [0.6, 0.2, 0.1, 0.1]
    independent = random.choice(4, p=load, size=20_000)
    sticky = independent.copy()
    for row in range(1, len(sticky)):
        if random.random() < 0.1:
            sticky[row] = sticky[row - 1]
    recording = from_experts(np.stack([independent, sticky], axis=1), n_experts=4, lengths=[200] * 100)
    result = repetition(recording)
    assert (result["lower"][0] < result["null"][0] < result["upper"][0]) and result["null"][0] > 0.35
    assert result["lower"][1] > result["null"][1]
    expected = 0.1 + 0.9 * float(result["null"][1])
    assert result["lower"][1] < expected < result["upper"][1]


def test_transition_by_hand():
    result = transition(small())
    assert result["probability"].dims == ("layer", "expert", "next_expert")
    assert result["layer"].values.tolist() == [1]
    assert result["next_layer"].values.tolist() == [3]
    # layer 1 → 3: 0→2, 0→1, 1→2, 2→2, 0→2
    assert result["count"][0].values.tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 1]]
    close(result["probability"][0], [[0, 1 / 3, 2 / 3], [0, 0, 1], [0, 0, 1]])
    close(result["lift"][0], [[np.nan, 5 / 3, 5 / 6], [np.nan, 0, 5 / 4], [np.nan, 0, 5 / 4]])


def test_a_transition_from_an_expert_that_was_never_chosen_is_undefined():
    result = transition(from_experts(np.array([[0, 1], [0, 0]]), n_experts=2, lengths=[2]))
    close(result["probability"][0], [[1 / 2, 1 / 2], [np.nan, np.nan]])


@pytest.mark.parametrize("top_k", [1, 2])
def test_transition_agrees_with_plain_loops(top_k):
    recording = random_recording(top_k=top_k)
    result = transition(recording)
    first = recording["routing"]["expert_index"].values[..., 0].tolist()
    for step in range(2):
        for expert in range(5):
            here = [row for row in first if row[step] == expert]
            for after in range(5):
                both = sum(row[step + 1] == after for row in here)
                load = sum(row[step + 1] == after for row in first) / len(first)
                at = result.isel(layer=step, expert=expert, next_expert=after)
                assert at["count"] == both
                close(at["probability"], both / len(here) if here else np.nan)
                close(at["lift"], both / len(here) / load if here and load else np.nan)


@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_transition_rows_sum_to_one_or_are_undefined(n_layers, n_tokens, seed):
    chosen = np.random.default_rng(seed).integers(4, size=(n_tokens, n_layers))
    result = transition(from_experts(chosen, n_experts=4, lengths=[n_tokens]))
    total = result["probability"].sum("next_expert", skipna=False)
    used = result["count"].sum("next_expert") > 0
    close(total.where(used, 1), 1)
    assert np.isnan(total.where(~used)).all()
    assert result.sizes["layer"] == n_layers - 1


def test_the_null_of_the_sets_does_not_depend_on_how_they_are_counted(monkeypatch):
    routing = with_phase(random_recording(top_k=3), np.arange(30) % 2)
    by_table = repetition(routing, by="phase", n_resamples=2)
    monkeypatch.setattr(flow, "SUBSET_CELLS", 0)
    xr.testing.assert_allclose(repetition(routing, by="phase", n_resamples=2), by_table, rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_set_of_experts_has_a_number_of_its_own(size):
    orders = np.array(list(permutations(range(6), 3)))
    slots = list(combinations(range(3), size))
    number_of = {}
    for number, columns in zip(flow._subsets(orders, size, 6), slots, strict=True):
        for experts, found in zip(np.sort(orders, axis=1)[:, columns].tolist(), number.tolist(), strict=True):
            assert number_of.setdefault(tuple(experts), found) == found
    assert sorted(number_of.values()) == list(range(comb(6, size)))


def test_repetition_is_bounded_by_what_documents_say():
    recording = random_recording(lengths=(20, 9, 14, 30, 7, 25, 1))
    routing = routing_of(recording)
    chosen, sample = routing["expert_index"].values[..., 0], routing["sample"].values
    per_document = np.zeros((6, 3, 2), int)
    for row in np.flatnonzero(sample[1:] == sample[:-1]):
        for layer in range(3):
            per_document[sample[row], layer, int(chosen[row, layer] == chosen[row + 1, layer])] += 1
    expected = Bootstrap(0.9, 200, 3).share_interval(per_document)
    result = repetition(recording, level=0.9, n_resamples=200, seed=3)
    assert np.isfinite(result["lower"][:2]).all()
    close(result["lower"], expected.lower[:, 1])
    close(result["upper"], expected.upper[:, 1])
    assert result.attrs == {"level": 0.9, "n_resamples": 200, "seed": 3}


# Co-activation


def test_coactivation_by_hand():
    chosen = np.array([[0, 1], [1, 0], [0, 2], [2, 1], [0, 1]])[:, None]
    result = coactivation(from_experts(chosen, n_experts=4, lengths=[5], layers=[3])).isel(layer=0)
    assert result["count"].dims == ("expert", "other_expert")
    # 01 three times, 02 once, 12 once
    assert result["count"].values.tolist() == [[4, 3, 1, 0], [3, 4, 1, 0], [1, 1, 2, 0], [0, 0, 0, 0]]
    nan = np.nan
    close(result["probability"], [[nan, 3 / 4, 1 / 4, 0], [3 / 4, nan, 1 / 4, 0], [1 / 2, 1 / 2, nan, 0], [nan] * 4])
    assert result["null"] == pytest.approx(1 / 3)
    assert result["layer"] == 3


def test_experts_that_are_not_neighbours_in_strength_are_active_together():
    """Counting adjacent ranks alone, as published code does, would miss the pair of the first and the third."""
    chosen = np.array([[0, 1, 2], [2, 0, 1], [0, 3, 1]])[:, None]
    result = coactivation(from_experts(chosen, n_experts=4, lengths=[3])).isel(layer=0)
    assert result["count"].values.tolist() == [[3, 3, 2, 1], [3, 3, 2, 1], [2, 2, 2, 0], [1, 1, 0, 1]]
    close(result["probability"].sum("other_expert"), 2)
    adjacent = Counter(frozenset(row[0][at : at + 2]) for row in chosen.tolist() for at in range(2))
    assert adjacent[frozenset({0, 1})] == 2, "of three tokens that chose both"


@pytest.mark.parametrize("top_k", [2, 3, 5])
@pytest.mark.parametrize("by", ["domain", "token_id", ["domain", "phase"]])
def test_coactivation_agrees_with_plain_loops(top_k, by):
    routing = with_phase(random_recording(top_k=top_k), np.arange(30) % 2)
    names = [by] if isinstance(by, str) else by
    result = coactivation(routing, by=by)
    assert result["count"].dims == (*names, "layer", "expert", "other_expert")
    chosen = routing["expert_index"].values
    labels = [
        np.asarray(routing[name].attrs["categories"])[routing[name].values]
        if name != "token_id"
        else routing[name].values
        for name in names
    ]
    for at in np.ndindex(*(result.sizes[name] for name in names)):
        place = dict(zip(names, at, strict=True))
        inside = np.all(
            [label == result[name].values[place[name]] for name, label in zip(names, labels, strict=True)], axis=0
        )
        for layer in range(3):
            sets = [set(row) for row in chosen[inside, layer].tolist()]
            for i in range(5):
                own = sum(i in members for members in sets)
                for j in range(5):
                    both = sum({i, j} <= members for members in sets)
                    cell = result.isel(place | {"layer": layer, "expert": i, "other_expert": j})
                    assert cell["count"] == both
                    close(cell["probability"], both / own if own and i != j else np.nan)


@given(st.permutations(range(5)), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_coactivation_is_symmetric_and_follows_the_experts_names(order, top_k, seed):
    random = np.random.default_rng(seed)
    chosen = random.permuted(np.tile(np.arange(5), (12, 2, 1)), axis=-1)[..., :top_k]
    result = coactivation(from_experts(chosen, n_experts=5, lengths=[12]))
    np.testing.assert_array_equal(result["count"], result["count"].transpose("layer", "other_expert", "expert"))
    own = np.diagonal(result["count"].values, axis1=1, axis2=2)
    total = result["probability"].sum("other_expert").values
    close(total[own > 0], top_k - 1)
    renamed = coactivation(from_experts(np.array(order)[chosen], n_experts=5, lengths=[12]))
    for name in ("count", "probability"):
        close(renamed[name].values[:, order][:, :, order], result[name].values)


def test_coactivation_under_a_uniform_router():
    random = np.random.default_rng(0)
    chosen = random.permuted(np.tile(np.arange(8), (40_000, 1, 1)), axis=-1)[..., :3]
    result = coactivation(from_experts(chosen, n_experts=8, lengths=[40_000]))
    off = ~np.eye(8, dtype=bool)
    np.testing.assert_allclose(result["probability"].values[0][off], float(result["null"]), atol=0.015)
    assert result["null"] == pytest.approx(2 / 7)


def test_one_choice_has_no_coactivation():
    with pytest.raises(ProbeError, match="chooses one expert.*transition"):
        coactivation(small())


# Paths


def test_paths_by_hand():
    chosen = [[0, 2, 1], [0, 2, 1], [1, 0, 0], [0, 2, 0], [1, 0, 0], [0, 2, 1]]
    recording = from_experts(np.array(chosen), n_experts=3, lengths=[4, 2], layers=[1, 3, 7])
    result = paths(recording, n=2)
    assert result["expert"].dims == ("path", "layer")
    assert result["path"].values.tolist() == [1, 2]
    assert result["expert"].values.tolist() == [[0, 2, 1], [1, 0, 0]]
    assert result["count"].values.tolist() == [3, 2]
    assert result["n_paths"] == 3 and result["n_tokens"] == 6
    close(result["share"], [3 / 6, 2 / 6])
    close(result["expected"], [4 / 6 * 4 / 6 * 3 / 6, 2 / 6 * 2 / 6 * 3 / 6])
    close(result["lift"], [(3 / 6) / (4 / 6 * 4 / 6 * 3 / 6), (2 / 6) / (2 / 6 * 2 / 6 * 3 / 6)])
    assert np.isnan(result["lower"]).all(), "two documents"

    last = paths(recording, layers=[7, 3])
    assert last["layer"].values.tolist() == [3, 7], "in the order of the decoder"
    assert last["expert"].values.tolist() == [[2, 1], [0, 0], [2, 0]]
    assert last["count"].values.tolist() == [3, 2, 1]
    # one layer: every path is as frequent as expected
    close(paths(recording, layers=[3])["lift"], 1)


def test_equally_frequent_paths_stand_in_the_order_of_their_experts():
    chosen = np.array([[1, 0], [0, 2], [0, 1], [1, 0], [0, 2], [2, 2]])
    result = paths(from_experts(chosen, n_experts=3, lengths=[6]))
    assert result["expert"].values.tolist() == [[0, 2], [1, 0], [0, 1], [2, 2]]


@pytest.mark.parametrize("largest", [2**63 - 1, 200 * 7, 200 * 49])
@pytest.mark.parametrize("n_experts", [1, 7])
def test_paths_agree_with_a_counter_however_they_are_numbered(largest, n_experts, monkeypatch):
    monkeypatch.setattr(paths_module, "LARGEST_CODE", largest)
    random = np.random.default_rng(0)
    few = random.integers(n_experts, size=(40, 9))
    chosen = few[np.minimum(random.geometric(0.1, size=200), 40) - 1]
    recording = from_experts(chosen, n_experts=n_experts, lengths=[20] * 10)
    result = paths(recording, n=15)
    expected = sorted(Counter(map(tuple, chosen.tolist())).items(), key=lambda item: (-item[1], item[0]))
    assert result["n_paths"] == len(expected)
    assert [tuple(row) for row in result["expert"].values.tolist()] == [path for path, _ in expected[:15]]
    assert result["count"].values.tolist() == [count for _, count in expected[:15]]
    load = [np.bincount(column, minlength=n_experts) / 200 for column in chosen.T]
    product = [np.prod([load[layer][expert] for layer, expert in enumerate(path)]) for path, _ in expected[:15]]
    close(result["expected"], product)


def test_more_layers_than_64_bits_hold():
    random = np.random.default_rng(1)
    chosen = random.integers(128, size=(60, 48))
    chosen[30:] = chosen[:30]
    chosen[45:, 47] = (chosen[45:, 47] + 1) % 128  # differ at the last layer alone
    chosen[:5, 0] = (chosen[:5, 0] + 1) % 128  # and at the first
    result = paths(from_experts(chosen, n_experts=128, lengths=[60]), n=100)
    expected = sorted(Counter(map(tuple, chosen.tolist())).items(), key=lambda item: (-item[1], item[0]))
    assert [tuple(row) for row in result["expert"].values.tolist()] == [path for path, _ in expected]
    assert result["count"].values.tolist() == [count for _, count in expected]
    assert result["n_paths"] == 30 + 15 + 5


def test_the_share_of_a_path_is_bounded_by_what_documents_say():
    random = np.random.default_rng(2)
    lengths = [30, 12, 50, 9, 22, 41]
    chosen = random.choice(3, p=[0.6, 0.3, 0.1], size=(sum(lengths), 2))
    result = paths(from_experts(chosen, n_experts=3, lengths=lengths), n=2, n_resamples=300)
    sample = np.repeat(np.arange(6), lengths)
    rank = np.full(len(chosen), 2)
    for at, path in enumerate(result["expert"].values):
        rank[(chosen == path).all(axis=1)] = at
    per_document = np.array([[np.bincount(rank[sample == document], minlength=3)] for document in range(6)])
    expected = Bootstrap(0.95, 300, 0).share_interval(per_document)
    close(result["lower"], expected.lower[0, :2])
    close(result["upper"], expected.upper[0, :2])
    assert (result["lower"] < result["share"]).all() and (result["share"] < result["upper"]).all()


def test_only_first_choices_make_a_path():
    recording = random_recording(top_k=3)
    first = from_experts(recording["routing"]["expert_index"].values[..., 0], n_experts=5, lengths=[9, 1, 0, 14, 6])
    np.testing.assert_array_equal(paths(recording)["expert"], paths(first)["expert"])
    np.testing.assert_array_equal(paths(recording)["count"], paths(first)["count"])


def test_paths_of_nothing():
    result = paths(from_experts(np.zeros((0, 2), int), n_experts=3, lengths=[0], layers=[1, 3]))
    assert result["n_paths"] == 0 and result["n_tokens"] == 0
    assert result["expert"].shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2]}, "layer 2 .*layers 1, 3"),
        ({"layers": []}, "layers is empty.*layers 1, 3"),
        ({"n": 0}, "n is 0"),
        ({"level": 2}, "level"),
    ],
)
def test_paths_refuses_what_makes_no_sense(options, message):
    with pytest.raises(ProbeError, match=message):
        paths(small(), **options)
