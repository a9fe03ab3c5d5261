"""Tokens that experts attract, ranked by what is certain, and the places where they took them."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
import xarray as xr
from scipy.special import stdtrit

from probe import schema, store
from probe.routing import tokens
from probe.routing.tokens import token_contexts, top_tokens
from probe.schema import ProbeError, SchemaError
from tests.planted import from_experts, from_logits
from tests.routing_cases import close, in_order, random_recording, routing_of, small

LENGTHS = (9, 1, 0, 14, 6, 12, 30, 3, 25)


def wilson(share, n_choices, quantile):
    """The textbook form."""
    z2 = quantile**2
    middle = share + z2 / (2 * n_choices)
    reach = quantile * np.sqrt(share * (1 - share) / n_choices + z2 / (4 * n_choices**2))
    return (middle - reach) / (1 + z2 / n_choices)


def correlation_of(rows, k):
    """Intra-document correlation of a layer; ``rows`` are (sample, token, set of experts) in their order."""
    agreed = by_chance = n_pairs = 0
    for token in {token for _, token, _ in rows}:
        own = [(sample, experts) for sample, other, experts in rows if other == token]
        pairs = [(a, b) for (s, a), (t, b) in zip(own, own[1:], strict=False) if s == t]
        drawn = [len(a & b) / k for i, (_, a) in enumerate(own) for j, (_, b) in enumerate(own) if i != j]
        agreed += sum(len(a & b) / k for a, b in pairs)
        n_pairs += len(pairs)
        by_chance += len(pairs) * np.mean(drawn) if pairs else 0
    return np.clip((agreed - by_chance) / (n_pairs - by_chance), 0, 1) if n_pairs > by_chance else 1.0


def plain_top_tokens(routing, *, n, min_count, level=0.95):
    """(layer, expert, rank, token, count, occurrences, documents, share, bound, lift) with plain loops."""
    chosen, ids = routing["expert_index"].values.tolist(), routing["token_id"].values.tolist()
    sample, k = routing["sample"].values.tolist(), routing.sizes["slot"]
    frequent = sorted(token for token in set(ids) if ids.count(token) >= min_count)
    table = []
    for place, layer in enumerate(routing["layer"].values.tolist()):
        rows = [(s, token, set(row[place])) for s, token, row in zip(sample, ids, chosen, strict=True)]
        correlation = correlation_of([row for row in rows if row[1] in frequent], k)
        for expert in range(routing.sizes["expert"]):
            load = sum(expert in experts for *_, experts in rows) / len(rows)
            ranked = []
            for token in frequent:
                own = sorted((s, expert in experts) for s, other, experts in rows if other == token)
                held, taken = zip(
                    *[
                        (len(hits), sum(hits))
                        for hits in ([hit for _, hit in run] for _, run in groupby(own, lambda x: x[0]))
                    ],
                    strict=True,
                )
                total, count, documents = sum(held), sum(taken), len(held)
                if count < 2:
                    continue
                share = count / total
                worth = total**2 / sum(m * m for m in held)
                if documents < 5:
                    choices, quantile = worth, stdtrit(np.inf, (1 + level) / 2)
                else:
                    quantile = stdtrit(worth - 1, (1 + level) / 2)
                    if share == 1:
                        effect = 1 + correlation * (sum(m * m for m in held) / total - 1)
                    else:
                        squares = sum((n_d - share * m_d) ** 2 for n_d, m_d in zip(taken, held, strict=True))
                        variance = documents / (documents - 1) * squares / total**2
                        effect = max(variance / (share * (1 - share) / total), 1)
                    choices = total / effect
                bound = wilson(share, choices, quantile)
                ranked.append((round(-bound, 12), -share, -count, token, total, documents, bound, share / load))
            for rank, (_, share, count, token, total, documents, bound, lift) in enumerate(sorted(ranked)[:n], start=1):
                table.append((layer, expert, rank, token, -count, total, documents, -share, bound, lift))
    return np.reshape(table, (-1, 10))


def as_rows(table: xr.Dataset) -> np.ndarray:
    names = (
        "layer",
        "expert",
        "rank",
        "token_id",
        "count",
        "occurrences",
        "n_documents",
        "share",
        "share_lower",
        "lift",
    )
    return np.stack([table[name].values for name in names], axis=1)


def test_top_tokens_by_hand():
    # token 7 six times, five of them to expert 0; token 8 three times; token 9 twice, below the floor
    token_id = np.array([7, 7, 7, 7, 7, 7, 8, 8, 8, 9, 9])
    chosen = np.array([0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0])[:, None]
    recording = from_experts(chosen, n_experts=3, lengths=[11], layers=[3], token_id=token_id)
    table = top_tokens(recording, min_count=3)
    assert set(table.dims) == {"row"}
    assert table["layer"].values.tolist() == [3, 3]
    assert table["expert"].values.tolist() == [0, 1]
    assert table["rank"].values.tolist() == [1, 1]
    assert table["token_id"].values.tolist() == [7, 8]
    assert table["count"].values.tolist() == [5, 2]
    assert table["occurrences"].values.tolist() == [6, 3]
    assert table["n_documents"].values.tolist() == [1, 1]
    close(table["share"], [5 / 6, 2 / 3])
    close(table["lift"], [5 / 6 / (8 / 11), 2 / 3 / (3 / 11)])
    # one document is worth one choice
    close(table["share_lower"], wilson(np.array([5 / 6, 2 / 3]), 1, stdtrit(np.inf, 0.975)))
    close(table["lift_lower"], table["share_lower"] / [8 / 11, 3 / 11])
    assert schema.labels(table["attention_kind"]).tolist() == ["nope", "nope"]


def test_the_bound_by_hand():
    # token 0 in six documents of 4, the expert took 4, 4, 3, 2, 4, 3 of them; token 1 always goes to the other one
    taken = [4, 4, 3, 2, 4, 3]
    chosen = np.concatenate([[0] * n + [1] * (4 - n) + [1] for n in taken])[:, None]
    recording = from_experts(chosen, n_experts=2, lengths=[5] * 6, token_id=np.tile([0, 0, 0, 0, 1], 6))
    table = top_tokens(recording, level=0.9).isel(row=0)
    share = 20 / 24
    variance = 6 / 5 * np.square(np.array(taken) - share * 4).sum() / 24**2
    effect = variance / (share * (1 - share) / 24)
    assert effect == pytest.approx(1.2)
    close(table["share_lower"], wilson(share, 24 / effect, stdtrit(5, 0.95)))
    assert table["n_documents"] == 6
    assert top_tokens(recording, level=0.9).attrs == {"level": 0.9}


def test_a_few_certain_looking_tokens_do_not_lead():
    """20 of 20 in one document are weaker evidence than 475 of 500 in thirty."""
    rare, common = np.zeros((20, 1), int), np.zeros((500, 1), int)
    common[::20] = 1
    recording = from_experts(
        np.concatenate([rare, common, np.ones((500, 1), int)]),
        n_experts=2,
        lengths=[20, *[17] * 20, *[16] * 10, 500],
        token_id=np.repeat([1, 2, 3], [20, 500, 500]),
    )
    table = top_tokens(recording)
    first = table.isel(row=table["expert"].values == 0)
    assert first["token_id"].values.tolist() == [2, 1]
    close(first["share"], [0.95, 1])
    assert first["share_lower"][0] > 0.9 and first["share_lower"][1] < 0.5


def test_what_documents_decide_counts_by_documents():
    """The same share: once every document chooses for all of its tokens, once every token for itself."""
    random = np.random.default_rng(0)
    by_document = np.repeat(np.arange(40) % 4 > 0, 25)
    by_token = random.permutation(by_document)
    chosen = np.stack([by_document, by_token], axis=1).astype(int)
    recording = from_experts(chosen, n_experts=2, lengths=[25] * 40)
    table = top_tokens(recording)
    lower = table["share_lower"].values[table["expert"].values == 1]
    close(lower[0], wilson(0.75, 40 * 39 / 40, stdtrit(39, 0.975)))  # D / (D - 1) more variance than 40 choices
    assert lower[1] == pytest.approx(wilson(0.75, 1000, stdtrit(39, 0.975)), abs=0.01)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize(("n", "min_count"), [(2, 1), (3, 4), (1, 1), (100, 1), (1, 10**6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_top_tokens_agrees_with_plain_loops(top_k, n, min_count, seed):
    recording = random_recording(seed, top_k=top_k, lengths=LENGTHS)
    expected = plain_top_tokens(routing_of(recording), n=n, min_count=min_count)
    close(as_rows(top_tokens(recording, n=n, min_count=min_count)), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_the_search_for_the_best_leaves_none_out(n):
    """Many types of shares and design effects of every size: the best n of all are the best n of those looked at."""
    random = np.random.default_rng(3)
    n_documents, n_types = 40, 60
    lengths = random.integers(20, 120, size=n_documents)
    sample = np.repeat(np.arange(n_documents), lengths)
    token_id = random.integers(n_types, size=len(sample)) * (random.random(len(sample)) < 0.9)
    sticky = random.random(n_types)[token_id] < 0.5
    of_document = random.integers(4, size=(n_documents, n_types))[sample, token_id]
    of_type = random.integers(4, size=n_types)[token_id]
    chosen = np.where(random.random(len(sample)) < 0.6, np.where(sticky, of_document, of_type), random.integers(4))
    recording = from_experts(chosen[:, None], n_experts=4, lengths=lengths.tolist(), token_id=token_id)
    everything = top_tokens(recording, n=n_types, min_count=5)
    xr.testing.assert_identical(
        top_tokens(recording, n=n, min_count=5), everything.isel(row=everything["rank"].values <= n)
    )
    for expert in range(4):
        lower = everything["share_lower"].values[everything["expert"].values == expert]
        assert (np.diff(lower) <= 0).all() and len(lower) > 20


def test_how_rows_are_read_changes_nothing(monkeypatch, tmp_path):
    recording = random_recording(top_k=2, lengths=LENGTHS)
    expected = top_tokens(recording, n=3, min_count=2)
    opened = store.open(store.save(recording, tmp_path / "run.zarr"))
    assert opened["routing"]["expert_index"].chunks is not None, "the store is read lazily"
    xr.testing.assert_identical(top_tokens(opened, n=3, min_count=2), expected)
    xr.testing.assert_identical(
        top_tokens(in_order(routing_of(recording), [6, 0, 8, 3, 2, 1, 7, 4, 5]), n=3, min_count=2), expected
    )
    monkeypatch.setattr("probe.routing.rows.ROWS_AT_ONCE", 7)
    for name, value in {"ROWS_AT_ONCE": 7, "DECISIONS_AT_ONCE": 12, "OCCURRENCES_AT_ONCE": 3}.items():
        monkeypatch.setattr(tokens, name, value)
    xr.testing.assert_identical(top_tokens(recording, n=3, min_count=2), expected)
    xr.testing.assert_identical(top_tokens(opened, n=3, min_count=2), expected)
    monkeypatch.setattr(tokens, "CELLS_AT_ONCE", 1)
    one_layer_at_a_time = top_tokens(recording, n=3, min_count=2)
    xr.testing.assert_allclose(one_layer_at_a_time, expected, rtol=1e-12)
    xr.testing.assert_equal(one_layer_at_a_time["token_id"], expected["token_id"])


def test_documents_may_be_interleaved():
    """Two prompts that are generated in one batch take turns."""
    routing = routing_of(random_recording(lengths=(30, 30, 20, 20, 25, 25)))
    turns = np.argsort(routing["position"].values, kind="stable")
    xr.testing.assert_identical(top_tokens(routing.isel(token=turns), min_count=2), top_tokens(routing, min_count=2))


def test_bounds_hold_where_documents_matter():
    """Each document has a preference of its own for every token: bounds by tokens alone would fail far more often."""
    random = np.random.default_rng(5)
    n_documents, n_types, per_type = 30, 400, 4
    truth = random.uniform(0.1, 0.9, size=n_types)
    concentration = 2  # correlation 1 / 3
    own = random.beta(truth * concentration, (1 - truth) * concentration, size=(n_documents, n_types))
    taken = random.random((n_documents, per_type, n_types)) < own[:, None]
    token_id = np.broadcast_to(np.arange(n_types), taken.shape)
    recording = from_experts(
        taken.reshape(-1, 1).astype(int),
        n_experts=2,
        lengths=[per_type * n_types] * n_documents,
        token_id=token_id.ravel(),
    )
    table = top_tokens(recording, n=n_types)
    table = table.isel(row=table["expert"].values == 1)
    assert table.sizes["row"] == n_types
    true = truth[table["token_id"].values]
    assert np.mean(table["share_lower"] <= true) > 0.95
    naive = wilson(table["share"].values, n_documents * per_type, 1.96)
    assert np.mean(naive <= true) < 0.94


def test_samples_of_no_token_or_one():
    assert top_tokens(from_experts(np.zeros((0, 2), int), n_experts=3, lengths=[])).sizes["row"] == 0
    table = top_tokens(from_experts(np.zeros((6, 1), int), n_experts=3, lengths=[1] * 6), min_count=1)
    assert table["n_documents"].values.tolist() == [6]
    close(table["share_lower"], wilson(1.0, 6, stdtrit(5, 0.975)))


@pytest.mark.parametrize("options", [{"n": 0}, {"min_count": 0}])
def test_top_tokens_refuses_numbers_below_one(options):
    with pytest.raises(ProbeError, match="at least 1"):
        top_tokens(small(), **options)


def test_top_tokens_refuses_what_makes_no_sense():
    with pytest.raises(ProbeError, match="level"):
        top_tokens(small(), level=95)
    with pytest.raises(SchemaError, match="'token_id' is missing"):
        top_tokens(routing_of(small()).drop_vars("token_id"))


# Contexts


WORDS = {1: b"the ", 2: b"cat ", 3: b"sat ", 4: "größe ".encode()[:3], 5: "größe ".encode()[3:], 6: b"\xff"}


def story(**options):
    """Token 2 goes to expert 0 in samples 0 (twice), 1 (never), 2 (once) and 4 (three times)."""
    ids = [1, 2, 3, 2, 1, 2, 3, 4, 5, 2, 6, 2, 2, 2]
    chosen = [1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0]
    options = {"lengths": [4, 3, 4, 0, 3], "layers": [3], "pieces": WORDS} | options
    return from_experts(np.array(chosen)[:, None], n_experts=2, token_id=np.array(ids), **options)


def test_contexts_by_hand():
    result = token_contexts(story(), layer=3, expert=0, token_id=2, n=5, width=2)
    # the first place of every sample, then the second of each, then the third
    assert result["sample"].values.tolist() == [0, 2, 4, 0, 4]
    assert result["position"].values.tolist() == [1, 2, 0, 3, 1]
    assert result["token"].values.tolist() == ["cat "] * 5
    assert result["before"].values.tolist() == ["the ", "größe ", "", "cat sat ", "cat "]
    assert result["after"].values.tolist() == ["sat cat ", "⟨FF⟩", "cat cat ", "", "cat "]
    close(result["gate"], 1 / (1 + np.exp(-1)))
    close(result["margin"], 6)
    assert (result["layer"], result["expert"], result["token_id"]) == (3, 0, 2)
    for variable in result.variables.values():
        assert variable.attrs["long_name"] and variable.attrs["units"]


def test_fewer_contexts_are_the_first_ones():
    everything = token_contexts(story(), layer=3, expert=0, token_id=2, n=100)
    assert everything.sizes["context"] == 6
    for n in range(1, 6):
        xr.testing.assert_identical(
            token_contexts(story(), layer=3, expert=0, token_id=2, n=n), everything.isel(context=slice(n))
        )


def test_a_window_may_cut_a_character():
    result = token_contexts(story(), layer=3, expert=0, token_id=2, n=2, width=1)
    assert result["before"].values.tolist() == ["the ", "⟨B6⟩ße "]
    middle = token_contexts(story(), layer=3, expert=1, token_id=4, width=0)
    assert middle["token"].values.tolist() == ["⟨67 72 C3⟩"]
    assert middle["before"].values.tolist() == middle["after"].values.tolist() == [""]


def test_the_gate_is_that_of_the_expert_whatever_its_slot():
    logits = np.array([[[3.0, 1.0, -2.0]], [[0.5, 2.0, -1.0]]])
    recording = from_logits(logits, lengths=[2], top_k=2, layers=[1])
    result = token_contexts(recording, layer=1, expert=0, token_id=0)
    close(result["gate"], 1 / (1 + np.exp([-3.0, -0.5])))
    close(result["margin"], [3, 1.5])


def test_positions_that_were_left_out_end_the_context():
    tree = story()
    tree["routing"] = xr.DataTree(routing_of(tree).isel(token=[0, 1, 3, *range(4, 14)]))
    result = token_contexts(tree, layer=3, expert=0, token_id=2, n=1)
    assert result["after"].values.tolist() == [""]


def test_how_rows_are_read_changes_no_context(monkeypatch, tmp_path):
    recording = random_recording(top_k=2, lengths=LENGTHS)
    options = {"layer": 3, "expert": 0, "token_id": 2, "n": 12}
    expected = token_contexts(recording, **options)
    assert expected.sizes["context"] == 12
    opened = store.open(store.save(recording, tmp_path / "run.zarr"))
    xr.testing.assert_identical(token_contexts(opened, **options), expected)
    monkeypatch.setattr("probe.routing.rows.ROWS_AT_ONCE", 7)
    xr.testing.assert_identical(token_contexts(recording, **options), expected)
    routing = routing_of(recording)
    places = list(zip(expected["sample"].values.tolist(), expected["position"].values.tolist(), strict=True))
    assert len(set(places)) == 12
    for sample, position in places:
        row = np.flatnonzero((routing["sample"].values == sample) & (routing["position"].values == position)).item()
        assert routing["token_id"].values[row] == 2 and 0 in routing["expert_index"].values[row, 1]


def test_no_more_is_read_than_needed(monkeypatch):
    monkeypatch.setattr("probe.routing.rows.ROWS_AT_ONCE", 4)
    monkeypatch.setattr("probe.routing.rows.CELLS_OF_BLOCK", 4)
    looked_at = []
    find = tokens.Rows.blocks

    def watched(self, *names, **options):
        for block in find(self, *names, **options):
            looked_at.append(block.start)
            yield block

    monkeypatch.setattr(tokens.Rows, "blocks", watched)
    token_contexts(story(), layer=3, expert=0, token_id=2, n=1)
    assert looked_at == [0]


def test_an_expert_that_never_took_the_token_has_no_context():
    result = token_contexts(story(), layer=3, expert=1, token_id=6)
    assert result.sizes["context"] == 0
    assert set(result.data_vars) == {"before", "token", "after", "gate", "margin"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 2}, "layer 2 .*layers 3"),
        ({"expert": 2}, "no expert 2.*0 to 1"),
        ({"expert": -1}, "no expert -1.*0 to 1"),
        ({"token_id": 77}, "token 77 does not occur.*6 ids that do, such as 1, 2, 3"),
        ({"n": 0}, "n is 0.*at least 1"),
        ({"width": -1}, "width is -1.*at least 0"),
    ],
)
def test_contexts_of_what_is_not_there(options, message):
    with pytest.raises(ProbeError, match=message):
        token_contexts(story(), **({"layer": 3, "expert": 0, "token_id": 2} | options))


def test_contexts_of_an_empty_recording():
    recording = from_experts(np.zeros((0, 1), int), n_experts=2, lengths=[0], layers=[3])
    with pytest.raises(ProbeError, match="token 0 does not occur"):
        token_contexts(recording, layer=3, expert=0, token_id=0)
