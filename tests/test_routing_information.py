"""Mutual information and vocabulary: values worked out by hand, plain loops, published check values, planted truths."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import chi2_contingency, t

from probe import schema, store
from probe.routing import information, permutation, rows
from probe.routing.information import mutual_information, vocabulary
from probe.schema import ProbeError, SchemaError
from tests.planted import from_experts
from tests.routing_cases import close, in_order, random_recording, routing_of, small, with_phase

LN2 = np.log(2)


def with_predicted(routing: xr.Dataset, predicted) -> xr.Dataset:
    return routing.assign(predicted_id=("token", np.asarray(predicted, np.uint32)))


def entropy(values) -> float:
    shares = np.array(list(Counter(values).values())) / len(values)
    return float(-(shares * np.log(shares)).sum())


def shared(labels, experts) -> tuple[float, float]:
    """Mutual information and its normalized form as scikit-learn defines it, mean of the entropies below."""
    labels, experts = list(labels), list(experts)
    n, of_label, of_expert = len(labels), Counter(labels), Counter(experts)
    information = sum(
        count / n * np.log(n * count / (of_label[label] * of_expert[expert]))
        for (label, expert), count in Counter(zip(labels, experts, strict=True)).items()
    )
    return information, information / np.mean([entropy(labels), entropy(experts)])


# Mutual information by hand


def test_information_by_hand():
    """Layer 1 follows the domain, layer 3 does in three of four cases, layer 5 does nothing."""
    chosen = np.array([[0, 0, 2], [0, 0, 2], [1, 1, 2], [1, 0, 2]])
    recording = from_experts(chosen, n_experts=3, lengths=[1, 1, 1, 1], domains=list("aabb"), layers=[1, 3, 5])
    result = mutual_information(recording)
    assert result["mutual_information"].dims == ("layer",)
    # layer 3: expert 0 takes both of a and one of b, expert 1 the other
    of_expert = -(3 / 4 * np.log(3 / 4) + 1 / 4 * np.log(1 / 4))
    together = -(1 / 2 * np.log(1 / 2) + 2 * 1 / 4 * np.log(1 / 4))
    third = LN2 + of_expert - together
    close(result["mutual_information"], [LN2, third, 0])
    close(result["normalized"], [1, 2 * third / (LN2 + of_expert), 0])
    close(result["excess"], result["normalized"] - result["null"])
    assert result["null"][2] == 0 and np.isnan(result["p_value"][2]), "a layer with one expert shows nothing"


def test_both_choices_of_a_token_count():
    chosen = np.array([[[0, 1]], [[0, 2]], [[3, 1]], [[3, 2]]])
    recording = from_experts(chosen, n_experts=5, lengths=[2, 2], domains=["a", "b"])
    result = mutual_information(recording)
    # half of the assignments tell the domain, the other half say nothing
    close(result["mutual_information"], [LN2 / 2])
    close(result["normalized"], [LN2 / (LN2 + 2 * LN2)])


def test_the_null_of_documents_is_the_mean_over_all_exchanges():
    random = np.random.default_rng(0)
    lengths, label = [4, 2, 7, 5, 1, 6], np.array([0, 1, 0, 0, 1, 1])
    chosen = random.choice(3, p=[0.6, 0.3, 0.1], size=(25, 2))
    every = []
    for own in combinations(range(6), 3):
        labels = np.repeat(np.isin(np.arange(6), own), lengths)
        every.append([shared(labels, chosen[:, layer])[1] for layer in range(2)])
    recording = from_experts(chosen, n_experts=3, lengths=lengths, domains=[f"domain {name}" for name in label])
    result = mutual_information(recording, n_permutations=3000)
    close(result["null"], np.mean(every, axis=0), rtol=0.06)
    alone = [np.mean([drawn[layer] >= result["normalized"][layer] - 1e-9 for drawn in every]) for layer in range(2)]
    smaller, larger = sorted(alone)
    adjusted = np.sort(result["p_adjusted"])
    factor = 1 + 1 / 2  # Benjamini & Yekutieli: sum of 1 / i over two layers
    close(adjusted, [min(2 * factor * smaller, factor * larger, 1), min(factor * larger, 1)], atol=0.1)


def test_the_null_of_tokens_is_the_mean_over_all_exchanges():
    """Two documents of three tokens: nine arrangements of one odd label in each."""
    chosen = np.array([0, 1, 2, 0, 0, 1])[:, None]
    recording = from_experts(chosen, n_experts=3, lengths=[3, 3], token_id=np.array([7, 8, 8, 7, 7, 8]))
    every = []
    for first in ([7, 8, 8], [8, 7, 8], [8, 8, 7]):
        for second in ([7, 7, 8], [7, 8, 7], [8, 7, 7]):
            every.append(shared(first + second, chosen[:, 0])[1])
    result = mutual_information(recording, of="token_id", n_permutations=3000)
    close(result["null"], [np.mean(every)], rtol=0.03)
    expected = np.mean(np.array(every) >= float(result["normalized"][0]) - 1e-9)
    close(result["p_value"], [expected], atol=0.03)
    close(result["p_adjusted"], result["p_value"])


@pytest.mark.parametrize("of", ["domain", "token_id", "position", "phase", "sample"])
@pytest.mark.parametrize("n_experts", [5, 300])
def test_information_equals_a_plain_count(of, n_experts):
    recording = random_recording(lengths=(9, 1, 0, 14, 6), n_experts=n_experts)
    routing = with_phase(recording, np.random.default_rng(0).integers(2, size=30))
    result = mutual_information(routing, of=of, n_permutations=3)
    for layer in range(3):
        expected = shared(routing[of].values.tolist(), routing["expert_index"].values[:, layer, 0].tolist())
        close(result[["mutual_information", "normalized"]].isel(layer=layer).to_array(), expected)


def test_sorted_and_tabulated_cells_agree():
    random = np.random.default_rng(0)
    chosen = random.integers(4, size=(500, 3, 2)).astype(np.uint8)
    label = random.integers(6, size=500).astype(np.uint8)
    close(
        information._joint_entropy(chosen, label, 6, 4),  # 24 cells: a table
        information._joint_entropy(chosen, label, 6, 4000),  # 24000 cells: sorted
    )


# Check values


@pytest.mark.parametrize("n_labels, normalized", [(16, 0.024), (50, 0.081), (128, 0.178)])
def test_independent_labels_share_what_chance_gives(n_labels, normalized):
    random = np.random.default_rng(0)
    routing = from_experts(
        random.integers(128, size=(10_000, 1)),
        n_experts=128,
        lengths=[500] * 20,
        token_id=random.integers(n_labels, size=10_000),
    )
    result = mutual_information(routing, of="token_id", n_permutations=50).isel(layer=0)
    assert float(result["normalized"]) == pytest.approx(normalized, abs=0.003)
    assert abs(float(result["excess"])) < 0.002
    assert result["p_value"] > 0.05 and result["p_adjusted"] > 0.05


def test_what_was_planted_is_told_apart():
    """Of three layers one follows the domain, one the token, one neither."""
    random = np.random.default_rng(0)
    n_documents, n_tokens, n_experts = 40, 50, 8
    domain = np.repeat(np.arange(n_documents) % 4, n_tokens)
    token_id = random.integers(8, size=domain.shape)
    signal = np.stack([2 * domain, token_id], axis=1)
    noise = random.integers(n_experts, size=(domain.size, 3))
    follows = random.random((domain.size, 2)) < 0.5
    chosen = np.concatenate([np.where(follows, signal, noise[:, :2]), noise[:, 2:]], axis=1)
    recording = from_experts(
        chosen,
        n_experts=n_experts,
        lengths=[n_tokens] * n_documents,
        domains=[f"domain {index % 4}" for index in range(n_documents)],
        token_id=token_id,
    )
    for follower, of in enumerate(["domain", "token_id"]):
        result = mutual_information(recording, of=of)
        others = [layer for layer in range(3) if layer != follower]
        assert result["excess"][follower] > 0.1 > 20 * abs(result["excess"][others]).max()
        close(result["p_value"][follower], 1 / 201)
        assert result["p_adjusted"][follower] < 0.05
        assert result["normalized"][follower] > result["null_upper"][follower]
        for name in ("p_value", "p_adjusted"):
            assert (result[name][others] > 0.05).all()


def alike_documents(random, n_documents=30, n_tokens=40, n_experts=6, n_layers=2) -> np.ndarray:
    """Experts (token, layer) of documents that each have a favourite of their own."""
    favourite = random.integers(n_experts, size=(n_documents, n_layers))
    chosen = random.integers(n_experts, size=(n_documents, n_tokens, n_layers))
    follows = random.random(chosen.shape) < 0.5
    return np.where(follows, favourite[:, None], chosen).reshape(-1, n_layers)


def false_positives(of: str, token_id_of) -> tuple[float, float]:
    """How often p < 0.05 in either of two layers, and how often chi-square says so, without anything to find."""
    random = np.random.default_rng(0)
    found = naive = 0
    for seed in range(200):
        options = {"lengths": [40] * 30, "domains": ["a", "b", "c"] * 10, "token_id": token_id_of(random)}
        routing = routing_of(from_experts(alike_documents(random), n_experts=6, **options))
        found += float(mutual_information(routing, of=of, n_permutations=99, seed=seed)["p_value"].min()) < 0.05
        table = np.zeros((6, 6))
        np.add.at(table, (routing[of].values, routing["expert_index"].values[:, 0, 0]), 1)
        naive += chi2_contingency(table[table.sum(axis=1) > 0]).pvalue < 0.05
    return found / 200, naive / 200


def test_documents_that_are_alike_within_do_not_pass_for_domains():
    found, naive = false_positives("domain", lambda random: np.zeros(1200))
    assert found <= 0.08 and naive > 0.95


def test_topics_do_not_pass_for_tokens():
    """A document has a favourite token and a favourite expert, but it is not that token that goes there."""
    found, naive = false_positives("token_id", lambda random: alike_documents(random)[:, 0])
    assert found <= 0.08 and naive > 0.95


def test_where_nothing_can_be_exchanged_there_is_no_null():
    recording = random_recording()
    for of in ("sample", "modality"):
        result = mutual_information(recording, of=of)
        assert result["normalized"].notnull().all()
        for name in ("null", "null_upper", "excess", "p_value", "p_adjusted"):
            assert np.isnan(result[name]).all(), (of, name)
    without = mutual_information(recording, n_permutations=0)
    assert without["normalized"].notnull().all() and np.isnan(without["null"]).all()


# Vocabulary by hand

IDS = np.array([7, 7, 8, 7, 8, 9, 7, 8])
CHOSEN = np.array([0, 0, 1, 1, 1, 2, 0, 2])[:, None]


def words(**options) -> xr.DataTree:
    return from_experts(CHOSEN, n_experts=4, lengths=[5, 3], token_id=IDS, layers=[3], **options)


def test_vocabulary_of_the_input_by_hand():
    result = vocabulary(words(), min_count=2)
    assert result["vocabulary"].dims == ("layer",) and result["layer"].values.tolist() == [3]
    # 7 goes to expert 0 three times of four, 8 to expert 1 two times of three; 9 is below the floor
    close(result["vocabulary"], [(3 / 4 + 2 / 3) / 2])
    assert result["n_types"] == 2
    close(vocabulary(words(), min_count=1)["vocabulary"], [(3 / 4 + 2 / 3 + 1) / 3])
    close(vocabulary(words(), min_count=4)["vocabulary"], [3 / 4])


def test_vocabulary_of_the_next_token_by_hand():
    result = vocabulary(words(), of="next", min_count=2)
    # followed by 7: tokens 0 and 2, experts 0 and 1, and token 5, expert 2; by 8: 1, 3 and 6, experts 0, 1 and 0
    close(result["vocabulary"], [(1 / 3 + 2 / 3) / 2])
    assert result["n_types"] == 2, "9 opens a sample: it follows nothing"


def test_a_gap_in_positions_is_not_bridged():
    routing = routing_of(words()).isel(token=[0, 1, 3, 4, 5, 6, 7])
    # token 2 is gone, and with it the pairs (1, 2) and (2, 3)
    close(vocabulary(routing, of="next", min_count=1)["vocabulary"], [(1 / 2 + 1 / 2) / 2])


def test_vocabulary_of_the_predicted_token_by_hand():
    routing = with_predicted(routing_of(words()), [1, 1, 1, 2, 2, 2, 1, 2])
    result = vocabulary(routing, of="predicted", min_count=1)
    close(result["vocabulary"], [(3 / 4 + 2 / 4) / 2])


def test_vocabulary_of_sets_of_experts_by_hand():
    chosen = np.array([[[0, 1]], [[2, 0]], [[1, 2]], [[1, 3]]])
    recording = from_experts(chosen, n_experts=4, lengths=[4], token_id=np.array([5, 5, 6, 6]))
    close(vocabulary(recording, min_count=2)["vocabulary"], [1])  # 0 is in both sets of 5, 1 in both of 6


def test_no_type_reaches_the_floor():
    result = vocabulary(words(), min_count=5)
    assert all(np.isnan(result[name]).all() for name in ("vocabulary", "lower", "upper", "null"))
    assert result["n_types"] == 0


def test_the_null_is_the_mean_over_all_shuffles():
    every = []
    for place in combinations(range(5), 2):  # where the two 8 of the first document stand
        for nine in range(3):
            for eight in {0, 1, 2} - {nine}:
                ids = np.full(8, 7)
                ids[list(place)], ids[5 + nine], ids[5 + eight] = 8, 9, 8
                shares = [max(Counter(CHOSEN[ids == v, 0]).values()) / (ids == v).sum() for v in (7, 8)]
                every.append(np.mean(shares))
    close(vocabulary(words(), min_count=2, n_permutations=2000)["null"], [np.mean(every)], rtol=0.01)
    assert np.isnan(vocabulary(words(), min_count=2, n_permutations=0)["null"]).all()


@pytest.mark.parametrize("of", ["input", "next", "predicted"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_vocabulary_and_its_bounds_equal_plain_loops(of, top_k, monkeypatch):
    recording = random_recording(lengths=(9, 1, 12, 14, 6, 20, 8), top_k=top_k)
    routing = with_predicted(routing_of(recording), np.random.default_rng(1).integers(9, size=70))
    sample = routing["sample"].values
    ids = routing["predicted_id" if of == "predicted" else "token_id"].values
    tokens = np.arange(70)
    if of == "next":
        tokens = tokens[:-1][sample[1:] == sample[:-1]]
        ids = np.append(ids[1:], 0)
    kept = {v for v, occurs in Counter(ids[tokens].tolist()).items() if occurs >= 6}
    assert 2 < len(kept)

    def mean_share(own, layer):
        largest = []
        for v in kept:
            places = [token for token in own if ids[token] == v]
            taken = Counter(e for token in places for e in routing["expert_index"].values[token, layer].tolist())
            largest += [max(taken.values()) / len(places)] if places else []
        return np.mean(largest)

    monkeypatch.setattr(information, "CELLS_AT_ONCE", 40)
    result = vocabulary(routing, of=of, min_count=6, level=0.9, n_permutations=1)
    assert result["n_types"] == len(kept)
    left_out = [tokens[sample[tokens] != document] for document in np.unique(sample[tokens])]
    sizes = np.array([len(tokens) - len(own) for own in left_out])
    n_groups = len(left_out)
    freedom = sizes.sum() ** 2 / np.square(sizes).sum() - 1
    for layer in range(3):
        value = mean_share(tokens, layer)
        replicates = np.array([mean_share(own, layer) for own in left_out])
        error = np.sqrt((n_groups - 1) / n_groups * np.square(replicates - replicates.mean()).sum())
        reach = t.ppf(0.95, freedom) * error
        close(result["vocabulary"][layer], value)
        close(result["lower"][layer], max(value - reach, 0))
        close(result["upper"][layer], min(value + reach, 1))


def test_no_more_than_fifty_groups_are_left_out():
    groups = information._random_groups(np.repeat(np.arange(130), 3)[::-1], seed=0)
    assert sorted(np.bincount(groups).tolist()) == [2 * 3] * 20 + [3 * 3] * 30
    assert (groups.reshape(130, 3) == groups.reshape(130, 3)[:, :1]).all(), "documents stay whole"


def test_tokens_that_have_an_expert_are_told_from_those_that_have_not():
    random = np.random.default_rng(0)
    token_id = random.integers(8, size=4000)
    chosen = np.stack([np.where(random.random(4000) < 0.5, token_id, random.integers(16, size=4000)),
                       random.integers(16, size=4000)], axis=1)  # fmt: skip
    result = vocabulary(from_experts(chosen, n_experts=16, lengths=[100] * 40, token_id=token_id))
    planted, nothing = (result.isel(layer=layer) for layer in range(2))
    assert planted["lower"] < 0.5 + 0.5 / 16 < planted["upper"] < planted["lower"] + 0.05
    assert planted["null"] < 0.15 < planted["lower"]
    assert nothing["lower"] < nothing["null"] < nothing["upper"], "the largest of 16 equal shares, and noise"
    assert nothing["vocabulary"] > 1 / 16


def test_fewer_than_five_documents_have_no_bounds():
    options = {"n_experts": 3, "token_id": np.arange(60) % 2}
    chosen = np.random.default_rng(0).integers(3, size=(60, 1))
    few = vocabulary(from_experts(chosen, lengths=[15] * 4, **options))
    assert np.isnan(few["lower"]).all() and np.isnan(few["upper"]).all() and few["vocabulary"].notnull().all()
    assert vocabulary(from_experts(chosen, lengths=[12] * 5, **options))["lower"].notnull().all()
    pairs = vocabulary(from_experts(chosen, lengths=[14, 14, 14, 17, 1], **options), of="next", min_count=1)
    assert np.isnan(pairs["lower"]).all(), "a document without a pair does not count"


def test_what_vocabulary_can_be_of():
    with pytest.raises(ProbeError, match="of is 'output', it must be one of 'input', 'next', 'predicted'"):
        vocabulary(words(), of="output")
    with pytest.raises(SchemaError, match="'predicted_id' is missing"):
        vocabulary(words(), of="predicted")
    with pytest.raises(SchemaError, match="'position' is missing"):
        vocabulary(routing_of(words()).drop_vars("position"), of="next")
    for options in ({"min_count": 0}, {"n_permutations": -1}, {"level": 1}):
        with pytest.raises(ProbeError, match=next(iter(options))):
            vocabulary(words(), **options)


def test_information_can_be_of_any_coord_on_token():
    with pytest.raises(SchemaError, match="'tile'.*sample, position, token_id, modality, phase, domain"):
        mutual_information(small(), of="tile")
    with pytest.raises(ProbeError, match="n_permutations is -1"):
        mutual_information(small(), n_permutations=-1)


# Properties of both

EACH = {
    "domain": lambda routing: mutual_information(routing, n_permutations=20),
    "phase": lambda routing: mutual_information(routing, of="phase", n_permutations=20),
    "token_id": lambda routing: mutual_information(routing, of="token_id", n_permutations=20),
    "input": lambda routing: vocabulary(routing, min_count=3),
    "next": lambda routing: vocabulary(routing, of="next", min_count=3),
    "predicted": lambda routing: vocabulary(routing, of="predicted", min_count=3),
}
each = pytest.mark.parametrize("function", EACH.values(), ids=EACH)


def mixed(top_k=2) -> xr.Dataset:
    recording = random_recording(lengths=(9, 1, 5, 0, 14, 6, 8, 11, 7, 3, 5, 9, 2), top_k=top_k)
    routing = with_phase(recording, np.arange(80) % 3 == 0)
    return with_predicted(routing, np.random.default_rng(0).integers(6, size=80))


@each
@pytest.mark.parametrize("top_k", [1, 2])
def test_relabelling_experts_changes_nothing(function, top_k):
    routing = mixed(top_k)
    order = np.random.default_rng(0).permutation(5).astype(np.uint8)
    relabelled = routing.assign(expert_index=(("token", "layer", "slot"), order[routing["expert_index"].values]))
    xr.testing.assert_allclose(function(relabelled), function(routing), rtol=1e-9)


@each
def test_order_blocks_batches_and_stores_change_nothing(function, monkeypatch, tmp_path):
    routing = mixed()
    expected = function(routing)
    xr.testing.assert_identical(function(in_order(routing, np.arange(12, -1, -1))), expected)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE", 7)
    xr.testing.assert_identical(function(routing), expected)
    for module, limit in (
        (permutation, "CELLS_AT_ONCE"),
        (permutation, "CHOICES_AT_ONCE"),
        (information, "CELLS_AT_ONCE"),
    ):
        monkeypatch.setattr(module, limit, 1)
    xr.testing.assert_allclose(function(routing), expected, rtol=1e-12)
    recording = random_recording(lengths=(9, 1, 5, 0, 14, 6, 8, 11, 7, 3, 5, 9, 2), top_k=2)
    recording["routing"] = xr.DataTree(routing)
    opened = store.open(store.save(recording, tmp_path / "run.zarr"))
    assert opened["routing"]["expert_index"].chunks is not None
    xr.testing.assert_allclose(function(opened), expected, rtol=1e-12)


@each
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [0, 1], [1, 1]])
@pytest.mark.parametrize("n_experts", [3, 300])
def test_hardly_any_tokens(function, lengths, n_experts):
    n_tokens = sum(lengths)
    recording = from_experts(np.zeros((n_tokens, 2), int), n_experts=n_experts, lengths=lengths, layers=[1, 3])
    result = function(with_predicted(routing_of(recording), np.zeros(n_tokens)))
    for name, variable in result.data_vars.items():
        undefined = np.isnan(variable).all() if variable.dtype.kind == "f" else not variable.any()
        assert undefined or (name == "mutual_information" and n_tokens and not variable.any()), name


@each
def test_one_token_samples(function):
    routing = mixed().isel(token=slice(0, 40))
    routing = routing.assign_coords(sample=("token", np.arange(40, dtype=np.uint32), routing["sample"].attrs))
    result = function(routing)
    if "n_types" in result:
        assert (int(result["n_types"]) > 0) == (result.attrs["of"] != "next")
    else:
        assert result["p_value"].notnull().all()


@each
def test_every_variable_says_what_it_is(function):
    result = function(mixed())
    for variable in result.variables.values():
        assert variable.attrs["long_name"] and variable.attrs["units"]
    assert schema.labels(result["attention_kind"]).tolist() == ["rope", "nope", "rope"]
    assert {"of", "n_permutations", "seed"} <= set(result.attrs)
