"""The card of one expert: every part by hand, or against the statistic that it is taken from."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from probe import schema, store
from probe.routing import card
from probe.routing.card import expert_card
from probe.routing.load import load_interval
from probe.routing.specialization import specialization
from probe.routing.tokens import top_tokens
from probe.schema import ProbeError, SchemaError
from tests.planted import from_experts, from_logits
from tests.routing_cases import close, random_recording, routing_of, small, with_phase

LENGTHS = (9, 11, 0, 14, 26, 12, 30, 13, 25, 8, 10, 21)
NODES = ["load", "tokens", "gates", "before", "after"]


def recording(**options) -> xr.DataTree:
    return random_recording(lengths=LENGTHS, **options)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_parts_are_those_of_the_statistics(top_k):
    tree = recording(top_k=top_k)
    result = expert_card(tree, layer=3, expert=1, n=3)
    assert list(result.children) == NODES
    here = routing_of(tree).sel(layer=[3])

    own = specialization(here, n_permutations=0).isel(layer=0, expert=1).drop_vars("p_value")
    for name, values in own.data_vars.items():
        xr.testing.assert_identical(result["load"].to_dataset()[name], values)
    assert "n_permutations" not in result["load"].attrs

    overall = load_interval(here).isel(layer=0, expert=1)
    for name, source in {"share": "load", "share_lower": "lower", "share_upper": "upper"}.items():
        assert result[name] == overall[source]
    assert result["n_documents"] == 11 and result["interval_status"] == overall["interval_status"]
    assert result["n_tokens"] == np.count_nonzero(here["expert_index"] == 1)

    tokens = top_tokens(here, n=3)
    xr.testing.assert_identical(result["tokens"].to_dataset(), tokens.isel(row=tokens["expert"].values == 1))
    assert result["tokens"].sizes["row"] == 3


def test_the_root_says_which_expert_it_is():
    result = expert_card(recording(), layer=3, expert=2)
    assert result["layer"] == 3 and result["expert"] == 2
    assert schema.labels(result["attention_kind"]) == "nope"
    for node in result.subtree:
        for variable in node.to_dataset().variables.values():
            assert variable.attrs["long_name"] and variable.attrs["units"]


@pytest.mark.parametrize("options", [{"by": None}, {"by": "domain"}, {"by": "phase"}])
def test_one_group_has_a_share_and_no_lift(options):
    result = expert_card(recording(domains=None), layer=5, expert=0, **options)
    load = result["load"].to_dataset()
    assert set(load.data_vars) == {"share", "share_lower", "share_upper", "interval_status", "n_documents"}
    close(load["share"].max(), result["share"])
    assert np.isfinite(load["share_lower"]).any()


def test_several_groups():
    routing = with_phase(recording(), np.arange(sum(LENGTHS)) % 2)
    result = expert_card(routing, layer=1, expert=0, by=["domain", "phase"])
    assert result["load"]["lift"].dims == ("domain", "phase")


def test_gates_by_hand():
    # gates: expert 0 took the first three tokens with 1/2, 0.73 and 0.99; expert 1 the last with 0.88
    logits = np.array([[0.0, -1], [1, 0], [5, 0], [0, 2]])[:, None]
    result = expert_card(from_logits(logits, lengths=[4], layers=[3]), layer=3, expert=0)["gates"].to_dataset()
    filled = result["share"].values > 0
    close(result["gate_from"].values[filled], [0.5, 0.7, 0.95])
    close(result["gate_to"].values[filled], [0.55, 0.75, 1])
    close(result["gate_bin"].values[filled], [0.525, 0.725, 0.975])
    close(result["share"].values[filled], 1 / 3)
    close(result["other_share"].values, np.arange(20) == 17)


def test_gates_of_two_choices_are_counted_by_slot():
    tree = recording(top_k=2)
    result = expert_card(tree, layer=3, expert=1)["gates"].to_dataset()
    here = routing_of(tree).sel(layer=3)
    gate = 1 / (1 + np.exp(-here["router_logit"].values.astype(float)))
    own = here["expert_index"].values == 1
    edges = np.linspace(0, 1, 21)
    for name, chosen in {"share": own, "other_share": ~own}.items():
        counts, _ = np.histogram(gate[chosen], edges)
        close(result[name], counts / counts.sum())


def neighbourly(n_times=1):
    """Expert 1 of layer 3 gets tokens from 0, 0, 0 and 2 of layer 1 and sends them to 1, 1, 0 and 1 of layer 5."""
    chosen = [[0, 1, 1], [0, 1, 1], [0, 1, 0], [2, 1, 1], [0, 0, 0], [1, 0, 0], [2, 2, 2], [2, 2, 2]]
    chosen = np.tile(chosen, (n_times, 1))
    return from_experts(chosen, n_experts=3, lengths=[len(chosen)], layers=[1, 3, 5])


def test_neighbours_by_hand(monkeypatch):
    monkeypatch.setattr(card, "MIN_EXPECTED", 0)
    result = expert_card(neighbourly(), layer=3, expert=1)
    before, after = result["before"].to_dataset(), result["after"].to_dataset()
    assert before["layer"] == 1 and after["layer"] == 5
    assert schema.labels(before["attention_kind"]) == "rope"
    # layer 1 sends 4, 1 and 3 of 8 tokens; layer 5 gets 3, 3 and 2
    assert before["expert"].values.tolist() == [0, 2, 1]
    assert before["rank"].values.tolist() == [1, 2, 3]
    assert before["count"].values.tolist() == [3, 1, 0]
    close(before["probability"], [3 / 4, 1 / 4, 0])
    close(before["lift"], [(3 / 4) / (4 / 8), (1 / 4) / (3 / 8), 0])
    assert after["expert"].values.tolist() == [1, 0, 2]
    assert after["count"].values.tolist() == [3, 1, 0]
    close(after["lift"], [(3 / 4) / (3 / 8), (1 / 4) / (3 / 8), 0])
    assert expert_card(neighbourly(), layer=3, expert=1, n=1)["before"]["expert"].values.tolist() == [0]


def test_neighbours_of_which_too_little_is_expected_are_left_out():
    # of 8 n tokens half are the expert's: 4 n times the load of the others, 1/2, 1/8, 3/8 and 3/8, 3/8, 2/8
    result = expert_card(neighbourly(4), layer=3, expert=1)
    assert result["before"]["expert"].values.tolist() == [0, 2]
    assert result["after"]["expert"].values.tolist() == [1, 0]
    assert expert_card(neighbourly(5), layer=3, expert=1)["after"].sizes["row"] == 3, "5 is enough"


def test_there_is_nothing_before_the_first_layer_nor_after_the_last():
    tree = neighbourly(9)
    first, last = expert_card(tree, layer=1, expert=0), expert_card(tree, layer=5, expert=0)
    assert first["before"].sizes["row"] == 0 and first["after"].sizes["row"] > 0
    assert last["after"].sizes["row"] == 0 and last["before"].sizes["row"] > 0
    assert set(first["before"].data_vars) == set(first["after"].data_vars)


def test_an_expert_without_a_token():
    chosen = np.zeros((40, 2), int)
    result = expert_card(from_experts(chosen, n_experts=2, lengths=[8] * 5, layers=[1, 3]), layer=3, expert=1)
    assert result["n_tokens"] == 0 and result["share"] == 0
    assert result["share_upper"] > 0
    assert np.isnan(result["gates"]["share"]).all() and result["gates"]["other_share"].sum() == 1
    assert result["tokens"].sizes["row"] == result["before"].sizes["row"] == 0


@pytest.mark.parametrize("lengths", [[], [0], [1], [1, 0, 1]])
def test_hardly_any_tokens(lengths):
    tree = from_experts(np.zeros((sum(lengths), 2), int), n_experts=3, lengths=lengths, layers=[1, 3])
    result = expert_card(tree, layer=1, expert=0)
    assert result["n_tokens"] == sum(lengths)
    assert np.isnan(result["gates"]["other_share"]).all()


@pytest.mark.parametrize("layer", [1, 5])
def test_how_rows_are_read_changes_nothing(layer, monkeypatch, tmp_path):
    tree = recording(top_k=2)
    expected = expert_card(tree, layer=layer, expert=1)
    xr.testing.assert_identical(expert_card(routing_of(tree), layer=layer, expert=1), expected)
    opened = store.open(store.save(tree, tmp_path / "run.zarr"))
    result = expert_card(opened, layer=layer, expert=1)
    xr.testing.assert_identical(result, expected)
    assert all(variable.chunks is None for node in result.subtree for variable in node.to_dataset().variables.values())
    monkeypatch.setattr("probe.routing.rows.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("probe.routing.tokens.ROWS_AT_ONCE", 7)
    xr.testing.assert_identical(expert_card(opened, layer=layer, expert=1), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, "layer 2 .*layers 1, 3"),
        ({"expert": 3}, "no expert 3.*0 to 2"),
        ({"n": 0}, "n is 0"),
        ({"by": "tile"}, "'tile'"),
    ],
)
def test_what_is_not_there_is_named(options, message):
    with pytest.raises(ProbeError, match=message):
        expert_card(small(), **({"layer": 3, "expert": 0} | options))
    with pytest.raises(SchemaError, match="'router_logit' is missing"):
        expert_card(routing_of(small()).drop_vars("router_logit"), layer=3, expert=0)
