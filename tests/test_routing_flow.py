"""Repetition along a sequence and transitions through the layers, by hand and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probe import routing_stats
from tests.planted import from_experts
from tests.routing_cases import close, random_recording, routing_of, small, with_phase


def test_repetition_by_hand():
    chosen = np.array([0, 0, 1, 1, 1, 2, 2])[:, None]
    result = routing_stats.repetition(from_experts(chosen, n_experts=3, lengths=[3, 0, 4])).isel(layer=0)
    # pairs 00 01 | 11 12 22: the step between the samples is none
    assert result["n_pairs"] == 5
    assert result["repetition"] == pytest.approx(3 / 5)
    assert result["null"] == pytest.approx((4 + 9 + 4) / 49)
    assert result["either"] == result["repetition"]
    assert result["either_null"] == result["null"]


def test_repetition_of_the_top_two_by_hand():
    chosen = np.array([[0, 1], [1, 2], [1, 0], [2, 3]])[:, None]
    result = routing_stats.repetition(from_experts(chosen, n_experts=4, lengths=[4])).isel(layer=0)
    assert result["repetition"] == pytest.approx(1 / 3)
    assert result["either"] == pytest.approx(2 / 3)
    # of 4 × 4 draws of the sets 01, 12, 01, 23, only 01 with 23 are disjoint: 2 × 2 draws
    assert result["either_null"] == pytest.approx(12 / 16)


def test_the_published_chance_level_of_two_out_of_eight():
    """Mixtral, Table 5: 12.5 % for the first choice and 46.4 % for either, every pair of experts being as likely."""
    pairs = np.array([(first, second) for first in range(8) for second in range(8) if first != second])[:, None]
    result = routing_stats.repetition(from_experts(pairs, n_experts=8, lengths=[len(pairs)])).isel(layer=0)
    assert result["null"] == pytest.approx(1 / 8)
    assert result["either_null"] == pytest.approx(0.464, abs=5e-4)
    assert result["either_null"] == pytest.approx(1 - (6 * 5) / (8 * 7))


def test_prefill_and_decode_of_one_sample_are_adjacent():
    routing = with_phase(from_experts(np.zeros((4, 1), int), n_experts=2, lengths=[4]), [0, 0, 1, 1])
    assert routing_stats.repetition(routing)["n_pairs"] == 3
    by_phase = routing_stats.repetition(routing, by="phase")
    assert by_phase["n_pairs"].values.tolist() == [1, 1], "a pair lies in a group with both of its tokens"


def test_positions_that_were_left_out_make_no_pair():
    routing = routing_of(from_experts(np.zeros((5, 1), int), n_experts=2, lengths=[5])).isel(token=[0, 1, 3, 4])
    assert routing_stats.repetition(routing)["n_pairs"] == 2


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("by", ["domain", "phase", "token_id"])
def test_repetition_agrees_with_plain_loops(top_k, by):
    routing = with_phase(random_recording(top_k=top_k), np.random.default_rng(2).integers(2, size=30))
    result = routing_stats.repetition(routing, by=by, n_resamples=2)
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
    result = routing_stats.repetition(recording)
    assert (result["lower"][0] < result["null"][0] < result["upper"][0]) and result["null"][0] > 0.35
    assert result["lower"][1] > result["null"][1]
    expected = 0.1 + 0.9 * float(result["null"][1])
    assert result["lower"][1] < expected < result["upper"][1]


def test_transition_by_hand():
    result = routing_stats.transition(small())
    assert result["probability"].dims == ("layer", "expert", "next_expert")
    assert result["layer"].values.tolist() == [1]
    assert result["next_layer"].values.tolist() == [3]
    # layer 1 → 3: 0→2, 0→1, 1→2, 2→2, 0→2
    assert result["count"][0].values.tolist() == [[0, 1, 2], [0, 0, 1], [0, 0, 1]]
    close(result["probability"][0], [[0, 1 / 3, 2 / 3], [0, 0, 1], [0, 0, 1]])
    close(result["lift"][0], [[np.nan, 5 / 3, 5 / 6], [np.nan, 0, 5 / 4], [np.nan, 0, 5 / 4]])


def test_a_transition_from_an_expert_that_was_never_chosen_is_undefined():
    result = routing_stats.transition(from_experts(np.array([[0, 1], [0, 0]]), n_experts=2, lengths=[2]))
    close(result["probability"][0], [[1 / 2, 1 / 2], [np.nan, np.nan]])


@pytest.mark.parametrize("top_k", [1, 2])
def test_transition_agrees_with_plain_loops(top_k):
    recording = random_recording(top_k=top_k)
    result = routing_stats.transition(recording)
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
    result = routing_stats.transition(from_experts(chosen, n_experts=4, lengths=[n_tokens]))
    total = result["probability"].sum("next_expert", skipna=False)
    used = result["count"].sum("next_expert") > 0
    close(total.where(used, 1), 1)
    assert np.isnan(total.where(~used)).all()
    assert result.sizes["layer"] == n_layers - 1
