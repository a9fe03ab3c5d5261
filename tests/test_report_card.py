"""The expert cards: the numbers of the statistics, compact, and nothing in them that a page could run."""

import json

import numpy as np
import pytest
import xarray as xr

from probe import report, report_card, routing_stats, schema, text_view
from tests import planted
from tests.test_report import HOSTILE, Page, recorded


def card_of(page):
    return next(json.loads(text) for text in page.data if '"gates"' in text)


def cards(tree, domains=()):
    results = report.compute(tree)
    return report_card.card_data(results, schema.group(tree, "vocabulary"), domains=list(domains))


@pytest.fixture(scope="module")
def tree():
    return recorded()


@pytest.fixture(scope="module")
def data(tree):
    return cards(tree, ["english", "python"])


def rows(flat, width):
    return np.reshape(np.asarray(flat, float), (-1, width))


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual, float), expected, rtol=6e-3)


def test_loads_and_bounds_are_those_of_the_statistic(tree, data):
    load = routing_stats.load_interval(tree)
    close(data["load"], 100 * load["load"].values.ravel())
    close(data["lower"], 100 * load["lower"].values.ravel())
    close(data["upper"], 100 * load["upper"].values.ravel())
    assert [data["statuses"][int(code)] for code in data["status"]] == schema.labels(
        load["interval_status"]
    ).ravel().tolist()
    assert data["layers"] == [0, 1, 2, 3] and data["labels"] == ["0", "1", "2", "3 ◇"]


def test_domains_are_those_of_the_statistic(tree, data):
    result = routing_stats.specialization(tree)
    assert [domain["name"] for domain in data["domains"]] == ["english", "python"]
    for domain in data["domains"]:
        own = result.sel(domain=domain["name"])
        close(domain["share"], 100 * own["share"].values.ravel())
        for name, column in {"lift": "lift", "lower": "lift_lower", "upper": "lift_upper"}.items():
            close(domain[name], own[column].values.ravel())
        np.testing.assert_array_equal(
            [int(code) for code in domain["settled"]], (own["p_value"] < 0.05).values.ravel().astype(int)
        )


@pytest.mark.parametrize(("layer", "expert"), [(0, 1), (2, 7), (3, 0)])
def test_a_card_is_what_expert_card_says(tree, data, layer, expert):
    card = routing_stats.expert_card(tree, layer=layer, expert=expert, n=5)
    at = layer * 8 + expert
    for side in ("before", "after"):
        found, expected = rows(data[side][at], 3), card[side].to_dataset()
        np.testing.assert_array_equal(found[:, 0], expected["expert"].values)
        close(found[:, 1], 100 * expected["probability"].values)
        close(found[:, 2], expected["lift"].values)
    gates = card["gates"].to_dataset()
    np.testing.assert_allclose(data["gates"]["share"][at], 1000 * gates["share"].values, atol=0.5)
    assert data["gates"]["count"][at] == int(card["n_tokens"])
    counts, shares = (np.asarray(data["gates"][name], float)[layer * 8 : layer * 8 + 8] for name in ("count", "share"))
    others = np.arange(8) != expert
    others = (counts[others, None] * shares[others]).sum(axis=0) / counts[others].sum()
    np.testing.assert_allclose(others, 1000 * gates["other_share"].values, atol=0.6)  # as the page's script adds up


def test_gates_count_every_token_of_many_experts():
    tree = recorded(n_experts=40)
    counted = cards(tree)["gates"]["count"]
    np.testing.assert_array_equal(counted, np.round(routing_stats.expert_load(tree).values.ravel() * 720))


def test_tokens_are_ranked_by_what_is_certain(tree, data):
    top = routing_stats.top_tokens(tree, n=10)
    pieces = schema.pieces(tree["vocabulary"].to_dataset())
    for at, flat in enumerate(data["tokens"]["rows"]):
        own = top.isel(row=(top["layer"].values == at // 8) & (top["expert"].values == at % 8))
        found = rows(flat, 5)
        texts = [data["tokens"]["texts"][int(text)] for text in found[:, 0]]
        assert texts == [text_view.piece_label(pieces[token]) for token in own["token_id"].values.tolist()]
        for column, values in enumerate(
            (100 * own["share"], own["lift"], own["lift_lower"], own["n_documents"]), start=1
        ):
            close(found[:, column], values.values)


def test_first_and_last_layer_have_no_neighbour_on_one_side(data):
    assert all(not row for row in data["before"][:8]) and any(data["before"][8:])
    assert all(not row for row in data["after"][-8:]) and any(data["after"][:-8])


def test_rare_neighbours_are_left_out():
    counts = np.array([[60, 0, 3], [20, 20, 0]])
    # loads 80, 20, 3 of 103: of the 63 tokens of expert 0, 49, 12 and 1.8 would be expected
    first, second = report_card.neighbours(counts, 5)
    assert first[::3] == [0, 1] and second[::3] == [1, 0]
    close(first[1:3], [100 * 60 / 63, (60 / 63) / (80 / 103)])


def test_nothing_hostile_is_markup_in_the_card(tmp_path):
    tree = recorded(names=(HOSTILE, "b"))
    vocabulary = tree["vocabulary"].to_dataset()
    vocabulary["piece"].values[0] = HOSTILE
    tree["vocabulary"] = xr.DataTree(vocabulary)
    page = Page(report.write_report(tree, tmp_path).read_text(encoding="utf-8"))
    raw = next(text for text in page.data if '"gates"' in text)
    assert not set("<>&") & set(raw)
    data = json.loads(raw)
    assert HOSTILE in data["tokens"]["texts"]
    assert HOSTILE in [domain["name"] for domain in data["domains"]]
    assert len(page.scripts) == 2


def many(*, n_layers, n_experts, n_domains=12, n_tokens=24_000):
    """Every expert has tokens, domains and neighbours enough to fill its card."""
    random = np.random.default_rng(0)
    experts = random.integers(n_experts, size=(n_tokens, n_layers)).astype(np.int64)
    return planted.from_experts(
        experts,
        n_experts=n_experts,
        lengths=[n_tokens // 120] * 120,
        domains=[f"domain {index % n_domains}" for index in range(120)],
        token_id=random.integers(900, size=n_tokens),
        pieces={token: f" token{token}".encode() for token in range(900)},
    )


@pytest.mark.parametrize(("n_layers", "n_experts"), [(48, 16), (24, 128)])
def test_cards_of_a_large_model_stay_small(n_layers, n_experts):
    tree = many(n_layers=n_layers, n_experts=n_experts)
    domains = [f"domain {index}" for index in range(12)]
    results = {
        "load_interval": routing_stats.load_interval(tree, n_resamples=20),
        "specialization": routing_stats.specialization(tree, n_resamples=20, n_permutations=5),
        "gate_histogram": routing_stats.gate_histogram(tree),
        "transition": routing_stats.transition(tree),
        "top_tokens": routing_stats.top_tokens(
            tree, n=report_card.tokens_per_expert(n_layers * n_experts), min_count=5
        ),
    }
    # random gates fill all bins, which is the longest that they can be
    results["gate_histogram"]["share"][:] = np.random.default_rng(0).dirichlet(np.ones(20), size=(n_layers, n_experts))
    data = report_card.card_data(results, schema.group(tree, "vocabulary"), domains=domains)
    assert len(data["tokens"]["rows"]) == n_layers * n_experts
    assert len(text_view.script_json(data)) < 1_500_000


@pytest.mark.parametrize(
    "options",
    [
        {"names": ("only",)},
        {"n_documents": 1, "names": ("only",)},
        {"top_k": 2},
        {"n_experts": 128, "layers": (1, 3, 5, 7)},
        {"layers": (5,)},
    ],
)
def test_odd_recordings_have_cards(tmp_path, options):
    page = Page(report.write_report(recorded(**options), tmp_path).read_text(encoding="utf-8"))
    data = card_of(page)
    n_cells = len(options.get("layers", range(4))) * options.get("n_experts", 8)
    for name in ("load", "lower", "upper", "status", "before", "after"):
        assert len(data[name]) == n_cells
    assert len(data["gates"]["share"]) == len(data["tokens"]["rows"]) == n_cells
    assert data["unit"] == ("assignments" if options.get("top_k", 1) > 1 else "tokens")
    assert bool(data["domains"]) == ("names" not in options)
    assert data["layer"] in data["layers"] and 0 <= data["expert"] < data["nExperts"]
    assert (
        f"Expert {data['expert']} of layer {data['labels'][data['layers'].index(data['layer'])]} takes"
        in (page.text["expert"])
    )
