"""Recorded attention against values by hand, a dense computation in float64, and the unrecorded model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Thread

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig, StaticCache

import probe
from probe import schema
from probe.hooks import RoutingSpec
from tests import brute_force_attention as brute_force
from tests.random_models import SHAPES, random_ids, random_model

PER_QUERY = (
    "entropy",
    "sink_mass",
    "self_mass",
    "previous_mass",
    "chunk_mass",
    "far_mass",
    "mean_distance",
    "segment_mass",
    "key_rank",
    "offset_mass",
    "top_key",
    "top_weight",
)
PER_PROFILE = ("distance_mass", "distance_error", "received_mass", "map_max", "map_sum", "pattern")
EVERYTHING = (*PER_QUERY, "distance_mass", "received_mass", "map_max", "map_sum", "pattern")
"""``distance_mass`` brings ``distance_error``."""

SEGMENTS = {"begin": (0, 3), "needle": (5, 9), "one": (4, 5), "late": (40, 200), "beyond": (900, 1000)}
OFFSETS = (0, 1, 3, 8, 20)
TOP_KEYS = 3
MAP_SIZE = 8

TOLERANCE = 1e-5
"""Of masses, weights and entropies; of ``mean_distance`` and ``map_sum``, which may be large, relative too."""

DENSE_BETWEEN = SHAPES["every third layer MoE, top-3"]
PADDING_SHIFTS_NO_TEMPERATURE = dict(attn_temperature_tuning=False)
"""Temperature counts positions from the first column: without it a text padded on the left is as alone."""


def spec(**changes) -> probe.AttentionSpec:
    options = dict(
        statistics=EVERYTHING, segments=SEGMENTS, offsets=OFFSETS, top_keys=TOP_KEYS, map_size=MAP_SIZE
    )  # fmt: skip
    return probe.AttentionSpec(**(options | changes))


def recorded(model, ids, *, attention=None, **options) -> xr.DataTree:
    attention = spec() if attention is None else attention
    trace = probe.record(model, ids, attention=attention, progress=False, **options)
    schema.validate(trace)
    return trace


def queries_of(trace: xr.DataTree, sample: int) -> xr.Dataset:
    attention = trace["attention"].to_dataset()
    return attention.isel(query=attention["sample"].values == sample)


def profile_of(trace: xr.DataTree, sample: int) -> xr.Dataset:
    profiles = trace["attention_profiles"].to_dataset()
    (index,) = np.flatnonzero(profiles["sample_id"].values == sample)
    return profiles.isel(profile=index)


def assert_agrees(
    trace: xr.DataTree,
    sample: int,
    text: Mapping[int, np.ndarray],
    *,
    chunk_size: int,
    segments: Mapping[str, tuple[int, int]] = SEGMENTS,
    map_size: int = MAP_SIZE,
) -> None:
    """Hold every variable of one sample against the dense computation from its patterns."""
    n = len(next(iter(text.values()))[0])
    queries, profile = queries_of(trace, sample), profile_of(trace, sample)
    positions = queries["position"].values.astype(int).tolist()
    assert queries["layer"].values.tolist() == list(text)
    assert profile["n_tokens"] == n
    assert profile["n_queries"] == len(positions) == int(trace["samples"]["n_queries"][sample])
    assert_queries_agree(queries, text, positions, chunk_size, segments)
    assert_profile_agrees(profile, text, positions, map_size)


def assert_queries_agree(queries, text, positions, chunk_size, segments) -> None:
    expected = brute_force.query_statistics(
        text, positions, chunk_size=chunk_size, segments=segments, offsets=OFFSETS, top_keys=TOP_KEYS
    )
    low, high = expected.pop("key_rank_low"), expected.pop("key_rank_high")
    rank = queries["key_rank"].values
    np.testing.assert_array_equal(np.isnan(rank), np.isnan(low), err_msg="key_rank")
    assert not ((rank < low) | (rank > high)).any(), "key_rank"
    mean_distance, top_key = expected.pop("mean_distance"), expected.pop("top_key")
    np.testing.assert_allclose(queries["mean_distance"], mean_distance, rtol=TOLERANCE, atol=TOLERANCE)
    for name, values in expected.items():
        np.testing.assert_allclose(queries[name], values, rtol=0, atol=TOLERANCE, err_msg=name)
    assert_keys_weigh(queries["top_key"].values, top_key, text, positions)
    is_rope = schema.labels(queries["attention_kind"]) == "rope"
    assert (queries["far_mass"].values[:, is_rope] == 0).all()


def assert_keys_weigh(found, expected, text, positions) -> None:
    """The keys found are the expected ones, or weigh the same as those to within rounding."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected), err_msg="top_key")
    for query, layer, head, slot in zip(*np.nonzero(found != expected), strict=True):
        key = found[query, layer, head, slot]
        if not np.isnan(key):
            row = list(text.values())[layer][head, positions[query]]
            instead = row[int(expected[query, layer, head, slot])]
            assert row[int(key)] == pytest.approx(instead, rel=TOLERANCE), "top_key"
    for keys in found.reshape(-1, found.shape[-1]):
        there = keys[~np.isnan(keys)]
        assert len(set(there)) == len(there), "top_key names a key twice"


def assert_profile_agrees(profile, text, positions, map_size) -> None:
    expected = brute_force.profile_statistics(text, positions, map_size=map_size)
    n = len(next(iter(text.values()))[0])
    assert profile["bin_width"] == brute_force.bin_width(n, map_size)
    starts = brute_force.distance_bins(n)
    assert profile["distance_bin"].values[: len(starts)].tolist() == starts
    for name, values in expected.items():
        if name != "pattern" or "pattern" in profile:
            there = profile[name].values
            # What a longer sample of the same recording has more of is NaN here.
            padded = np.full(there.shape, np.nan)
            padded[tuple(slice(size) for size in values.shape)] = values
            # A sum over a cell may be hundreds, of which single precision has no 1e-5.
            relative = TOLERANCE if name == "map_sum" else 0
            np.testing.assert_allclose(there, padded, rtol=relative, atol=TOLERANCE, err_msg=name)


def padded(ids: Sequence[Sequence[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts in one batch, and its attention mask."""
    longest = max(map(len, ids))
    batch, mask = torch.zeros(2, len(ids), longest, dtype=torch.long)
    for row, text in enumerate(ids):
        place = slice(len(text)) if side == "right" else slice(longest - len(text), longest)
        batch[row, place] = torch.tensor(text)
        mask[row, place] = 1
    return batch, mask


def assert_batch_agrees(trace, model, entered, mask: torch.Tensor, **options) -> None:
    """Hold every row of the forwards of one batch against the dense computation from what entered its modules."""
    for row, is_real in enumerate(mask.numpy() > 0):
        text = brute_force.patterns(model, entered, row, np.flatnonzero(is_real))
        assert_agrees(trace, row, text, chunk_size=model.config.attention_chunk_size, **options)


# The dense computation itself


@pytest.mark.parametrize("shape", SHAPES)
def test_the_dense_patterns_are_those_of_transformers(shape):
    model = random_model(**SHAPES[shape])
    for text in random_ids(1, 8, 27):
        dense = brute_force.patterns_of_text(model, text)
        model.set_attn_implementation("eager")
        with torch.no_grad():
            outputs = model(torch.tensor([text]), use_cache=False, output_attentions=True)
        model.set_attn_implementation("sdpa")
        assert len(dense) == len(outputs.attentions) == 6
        for layer, weights in enumerate(outputs.attentions):
            np.testing.assert_allclose(np.nan_to_num(dense[layer]), weights[0], atol=2e-6)


# By hand


def uniform_model(**changes):
    """Every visible key weighs the same: queries are zero. Layers 0 to 2 are RoPE, 3 is NoPE."""
    model = random_model(num_hidden_layers=4, max_position_embeddings=2048, **changes)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    return model


def test_queries_of_uniform_attention_by_hand():
    nan = np.nan
    attention = spec(segments={"begin": (0, 3), "middle": (2, 5), "end": (7, 9)}, offsets=(0, 2, 3, 6, 7), top_keys=4)
    trace = recorded(uniform_model(attention_chunk_size=4), random_ids(11), attention=attention)
    assert trace["attention"].sizes["query"] == 11
    assert trace["attention"]["segment"].values.tolist() == ["begin", "middle", "end"]
    assert trace["attention"]["offset"].values.tolist() == [0, 2, 3, 6, 7]
    # Query 6 sees keys 4, 5 and 6 on a RoPE layer, and 0 to 6 on a NoPE layer.
    rope = dict(
        entropy=np.log(3), sink_mass=0, self_mass=1 / 3, previous_mass=1 / 3, chunk_mass=1, far_mass=0, mean_distance=1,
        segment_mass=[0, 1 / 3, 0], key_rank=[nan, 0, nan], offset_mass=[1 / 3, 1 / 3, 0, 0, nan],
        top_key=[4, 5, 6, nan], top_weight=[1 / 3, 1 / 3, 1 / 3, nan],
    )  # fmt: skip
    nope = dict(
        entropy=np.log(7), sink_mass=1 / 7, self_mass=1 / 7, previous_mass=1 / 7, chunk_mass=3 / 7, far_mass=4 / 7,
        mean_distance=3, segment_mass=[3 / 7, 3 / 7, 0], key_rank=[0, 0, nan],
        offset_mass=[1 / 7, 1 / 7, 1 / 7, 1 / 7, nan], top_key=[0, 1, 2, 3], top_weight=[1 / 7] * 4,
    )  # fmt: skip
    # Query 4 begins a chunk: on a RoPE layer it sees itself alone.
    boundary = dict(
        entropy=0, sink_mass=0, self_mass=1, previous_mass=0, chunk_mass=1, far_mass=0, mean_distance=0,
        segment_mass=[0, 1, 0], key_rank=[nan, 0, nan], offset_mass=[1, 0, 0, nan, nan],
        top_key=[4, nan, nan, nan], top_weight=[1, nan, nan, nan],
    )  # fmt: skip
    first = dict(
        entropy=0, sink_mass=1, self_mass=1, previous_mass=nan, chunk_mass=1, far_mass=0, mean_distance=0,
        segment_mass=[1, 0, 0], key_rank=[0, nan, nan], offset_mass=[1, nan, nan, nan, nan],
        top_key=[0, nan, nan, nan], top_weight=[1, nan, nan, nan],
    )  # fmt: skip
    queries = queries_of(trace, 0)
    for query, layers, expected in ((6, [0, 1, 2], rope), (6, [3], nope), (4, [0, 1, 2], boundary), (0, [0, 3], first)):
        assert sorted(expected) == sorted(PER_QUERY)
        for name, value in expected.items():
            for values in queries[name].sel(layer=layers).values[query].reshape(len(layers) * 4, -1):
                np.testing.assert_allclose(values, np.atleast_1d(value), atol=1e-6, err_msg=f"{name} of query {query}")


def test_among_equal_keys_the_first_come_first():
    attention = spec(statistics=("top_key", "key_rank"), map_size=512)
    trace = recorded(uniform_model(attention_chunk_size=100), random_ids(700), attention=attention)
    queries = queries_of(trace, 0)
    position = queries["position"].values.astype(int)
    for layer, first in ((0, position // 100 * 100), (3, np.zeros_like(position))):
        keys = first[:, None] + np.arange(TOP_KEYS)
        expected = np.where(keys <= position[:, None], keys, np.nan)
        for head in range(4):
            np.testing.assert_array_equal(queries["top_key"].sel(layer=layer, head=head), expected)
        rank = queries["key_rank"].sel(layer=layer)
        assert ((rank == 0) | np.isnan(rank)).all()


def test_profiles_of_uniform_attention_by_hand():
    nan = np.nan
    trace = recorded(uniform_model(attention_chunk_size=2), random_ids(4, 1), attention=spec(map_size=2))
    profiles = trace["attention_profiles"].to_dataset()
    assert profiles["sample_id"].values.tolist() == [0, 1]
    assert profiles["n_tokens"].values.tolist() == profiles["n_queries"].values.tolist() == [4, 1]
    assert profiles["bin_width"].values.tolist() == [2, 1]
    assert profiles["distance_bin"].values.tolist() == [0, 1, 2]
    # Queries see 1, 2, 3 and 4 keys on the NoPE layer, 1, 2, 1 and 2 on the others.
    nope = dict(
        distance_mass=[25 / 48, 13 / 48, 10 / 48],
        distance_error=[0, 0, 0],
        received_mass=[19 / 24, 5 / 24],
        map_max=[[1, nan], [1 / 3, 1 / 3]],
        map_sum=[[2, nan], [7 / 6, 5 / 6]],
        pattern=[[1, nan, nan, nan], [1 / 2] * 2 + [nan] * 2, [1 / 3] * 3 + [nan], [1 / 4] * 4],
    )
    rope = dict(
        distance_mass=[3 / 4, 1 / 4, 0],
        distance_error=[0, 0, 0],
        received_mass=[1 / 2, 1 / 2],
        map_max=[[1, nan], [nan, 1]],
        map_sum=[[2, nan], [nan, 2]],
        pattern=[[1, nan, nan, nan], [1 / 2] * 2 + [nan] * 2, [nan, nan, 1, nan], [nan, nan, 1 / 2, 1 / 2]],
    )
    alone = dict(
        distance_mass=[1, nan, nan],
        distance_error=[0, nan, nan],
        received_mass=[1, nan],
        map_max=[[1, nan], [nan, nan]],
        map_sum=[[1, nan], [nan, nan]],
        pattern=[[1, nan, nan, nan]] + [[nan] * 4] * 3,
    )
    for sample, layer, expected in ((0, 3, nope), (0, 0, rope), (0, 2, rope), (1, 3, alone), (1, 1, alone)):
        assert sorted(expected) == sorted(PER_PROFILE)
        for name, value in expected.items():
            for head in range(4):
                found = profiles[name].isel(profile=sample).sel(layer=layer, head=head)
                np.testing.assert_allclose(found, value, atol=1e-6, err_msg=f"{name} of sample {sample}")


def test_the_error_of_sampled_distances_by_hand():
    attention = spec(queries=2, statistics=("distance_mass",))
    trace = recorded(uniform_model(attention_chunk_size=8), random_ids(4), attention=attention)
    first, second = trace["attention"]["position"].values.astype(int)
    at_distance_0 = np.array([1 / (first + 1), 1 / (second + 1)])
    found = profile_of(trace, 0).isel(distance_bin=0)
    np.testing.assert_allclose(found["distance_mass"], at_distance_0.mean(), atol=1e-6)
    # Half of the squared difference is the variance of two; half of four queries are recorded.
    error = np.sqrt((at_distance_0[0] - at_distance_0[1]) ** 2 / 2 / 2 * (1 - 2 / 4))
    np.testing.assert_allclose(found["distance_error"], error, atol=1e-6)


def test_one_sampled_query_has_no_error_unless_it_is_all_there_is():
    attention = spec(queries=1, statistics=("distance_mass",))
    trace = recorded(random_model(), random_ids(30, 1), attention=attention)
    assert np.isnan(profile_of(trace, 0)["distance_error"].values).all()
    np.testing.assert_array_equal(profile_of(trace, 1)["distance_error"].isel(distance_bin=0), 0)


def test_attention_on_one_key_alone_is_finite():
    model = random_model(use_qk_norm=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(300)
    with brute_force.watched(model) as entered:
        queries = queries_of(recorded(model, random_ids(60)), 0)
    assert queries["top_weight"].isel(slot=0).median() > 0.9999
    assert np.isfinite(queries["entropy"]).all() and (queries["entropy"] >= 0).all()
    # A weight has no more digits than its score leaves behind the point.
    largest = 0.0
    for layer, forwards in entered.items():
        query, key = brute_force.queries_and_keys(model.model.layers[layer].self_attn, forwards)
        largest = max(largest, float(np.abs(np.einsum("bqhd,bkhd->bhqk", query, key)).max()) / np.sqrt(8))
    rounding = 4 * np.finfo(np.float32).eps * largest
    assert rounding < 0.01
    np.testing.assert_allclose(queries["chunk_mass"] + queries["far_mass"], 1, atol=rounding)
    # What weighs nothing is still visible.
    assert not np.isnan(queries["key_rank"].sel(layer=3, segment="begin")).any()
    # Later slots weigh nothing at all, and still name keys of their own.
    n_seen = np.minimum(queries["position"].values + 1, TOP_KEYS)
    n_named = (~np.isnan(queries["top_key"].sel(layer=3).values)).sum(axis=-1)
    np.testing.assert_array_equal(n_named, np.repeat(n_seen[:, None], 4, axis=1))


# Against the dense computation


def two_layers(**changes):
    """One layer of each kind, RoPE first."""
    return random_model(num_hidden_layers=2, no_rope_layers=[1, 0], max_position_embeddings=2048, **changes)


@given(data=st.data())
@settings(max_examples=30)
def test_agrees_whatever_is_asked_for(data):
    model = two_layers(
        attention_chunk_size=data.draw(st.integers(1, 40), "chunk_size"),
        num_key_value_heads=data.draw(st.sampled_from([1, 2, 4]), "key heads"),
        use_qk_norm=data.draw(st.booleans(), "qk_norm"),
        head_dim=data.draw(st.sampled_from([2, 8, 10]), "head_dim"),
    )
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=3), "lengths")
    start, length = data.draw(st.tuples(st.integers(0, 60), st.integers(1, 30)), "segment")
    segments = {"some": (start, start + length)}
    map_size = data.draw(st.integers(1, 20), "map_size")
    queries = data.draw(st.none() | st.integers(1, 70), "queries")
    side = data.draw(st.sampled_from(["left", "right"]), "side")
    ids = random_ids(*lengths)
    batch, mask = padded(ids, side)
    attention = spec(segments=segments, map_size=map_size, queries=queries)
    with torch.no_grad(), brute_force.watched(model) as entered, probe.Recorder(model, attention=attention) as recorder:
        model(batch, attention_mask=mask)
    trace = recorder.trace()
    schema.validate(trace)
    n_queries = [length if queries is None else min(queries, length) for length in lengths]
    assert trace["samples"]["n_queries"].values.tolist() == n_queries
    assert_batch_agrees(trace, model, entered, mask, segments=segments, map_size=map_size)


@pytest.mark.parametrize("no_rope_layers", [[1, 1], [0, 0]])
def test_models_with_layers_of_one_kind(no_rope_layers):
    model = random_model(num_hidden_layers=2, no_rope_layers=no_rope_layers)
    (text,) = random_ids(30)
    trace = recorded(model, [text])
    assert_agrees(trace, 0, brute_force.patterns_of_text(model, text), chunk_size=8)
    with torch.no_grad(), probe.Recorder(model, attention=True):
        logits = model(torch.tensor([text])).logits
    torch.testing.assert_close(logits, outputs_of(model, torch.tensor([text]), None), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_dense_computation(shape, batch_size):
    model = random_model(**SHAPES[shape])
    ids = random_ids(7, 64, 1, 16, 9, 27, 2, 8)
    trace = recorded(model, ids, batch_size=batch_size)
    assert trace["attention"]["layer"].values.tolist() == list(range(6))
    assert trace["attention"].attrs["chunk_size"] == trace["attention_profiles"].attrs["chunk_size"] == 8
    for sample, text in enumerate(ids):
        assert_agrees(trace, sample, brute_force.patterns_of_text(model, text), chunk_size=8)


@pytest.mark.parametrize("chunk_size", [1, 8, 128, 1000])
def test_agrees_beyond_a_tile(chunk_size):
    model = two_layers(attention_chunk_size=chunk_size)
    ids = random_ids(300, 256, 129, 128)
    trace = recorded(model, ids)
    for sample, text in enumerate(ids):
        assert_agrees(trace, sample, brute_force.patterns_of_text(model, text), chunk_size=chunk_size)


@pytest.mark.parametrize("chunk_size", [100, 1000])
def test_agrees_beyond_tiles_of_keys(chunk_size):
    model = two_layers(attention_chunk_size=chunk_size, num_attention_heads=1, num_key_value_heads=1)
    (text,) = random_ids(1300)
    attention = spec(statistics=[name for name in EVERYTHING if name != "pattern"])
    trace = recorded(model, [text], attention=attention)
    assert schema.labels(trace["attention"]["attention_kind"]).tolist() == ["rope", "nope"]
    assert_agrees(trace, 0, brute_force.patterns_of_text(model, text), chunk_size=chunk_size)


def test_padded_texts_beyond_tiles_of_keys():
    # Where rows are padded no kernel gives the log-sum-exp: it is added up over tiles of keys.
    model = two_layers(attention_chunk_size=1040, num_attention_heads=1, num_key_value_heads=1)
    batch, mask = padded(random_ids(1100, 1050), "left")
    attention = spec(statistics=[name for name in EVERYTHING if name != "pattern"])
    with torch.no_grad(), brute_force.watched(model) as entered, probe.Recorder(model, attention=attention) as recorder:
        model(batch, attention_mask=mask)
    assert_batch_agrees(recorder.trace(), model, entered, mask)


@pytest.mark.parametrize("map_size", [1, 7, 64, 512])
def test_maps_of_any_size(map_size):
    model = two_layers(attention_chunk_size=8)
    ids = random_ids(300, 64, 65, 1)
    trace = recorded(model, ids, attention=spec(map_size=map_size))
    assert trace["attention_profiles"].sizes["key_bin"] <= map_size
    for sample, text in enumerate(ids):
        assert_agrees(trace, sample, brute_force.patterns_of_text(model, text), chunk_size=8, map_size=map_size)


@pytest.mark.parametrize("n_key_heads", [1, 2, 4])
def test_agrees_however_many_heads_share_keys(n_key_heads):
    model = random_model(num_key_value_heads=n_key_heads)
    (text,) = random_ids(50)
    assert_agrees(recorded(model, [text]), 0, brute_force.patterns_of_text(model, text), chunk_size=8)


@pytest.mark.parametrize("shape", ["every layer MoE, top-1", "every third layer MoE, top-3"])
def test_bfloat16_queries_and_keys_are_reduced_in_float32(shape):
    model = random_model(**SHAPES[shape]).to(torch.bfloat16)
    ids = random_ids(40, 150)
    with brute_force.watched(model) as entered:
        trace = recorded(model, ids, batch_size=1)
    assert trace["attention"]["entropy"].dtype == np.float32
    # The longest text runs first.
    for sample, forward in ((1, 0), (0, 1)):
        own = {layer: [forwards[forward]] for layer, forwards in entered.items()}
        text = brute_force.patterns(model, own, 0, np.arange(len(ids[sample])))
        assert_agrees(trace, sample, text, chunk_size=8)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_on_either_side_of_a_batch(shape, side):
    model = random_model(**SHAPES[shape])
    ids = random_ids(20, 1, 27, 7, 16, 9, 8)
    batch, mask = padded(ids, side)
    with torch.no_grad(), brute_force.watched(model) as entered, probe.Recorder(model, attention=spec()) as recorder:
        model(batch, attention_mask=mask)
    trace = recorder.trace()
    schema.validate(trace)
    assert trace["attention"]["token_id"].values.tolist() == sum(ids, [])
    assert_batch_agrees(trace, model, entered, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_type(dtype):
    model = random_model()
    batch, mask = padded(random_ids(20, 9), "left")
    with torch.no_grad(), brute_force.watched(model) as entered, probe.Recorder(model, attention=spec()) as recorder:
        model(batch, attention_mask=mask.to(dtype))
    assert_batch_agrees(recorder.trace(), model, entered, mask)


def test_padding_on_both_sides_of_a_text_and_a_row_of_padding_alone():
    model = random_model()
    batch = torch.tensor(random_ids(20, 20, 20))
    mask = torch.ones_like(batch)
    mask[0, :3] = mask[0, 18:] = 0
    mask[1] = 0
    with torch.no_grad(), brute_force.watched(model) as entered, probe.Recorder(model, attention=spec()) as recorder:
        model(batch, attention_mask=mask)
    trace = recorder.trace()
    assert trace["samples"]["n_queries"].values.tolist() == [15, 0, 20]
    for row in (0, 2):
        text = brute_force.patterns(model, entered, row, np.flatnonzero(mask[row]))
        assert_agrees(trace, row, text, chunk_size=8)


def test_rows_whose_positions_cannot_be_told_are_refused():
    model = random_model()
    ids = torch.tensor(random_ids(20))
    mask = torch.ones_like(ids)
    mask[0, 5] = 0
    before = state_of(model)
    with pytest.raises(probe.ProbeError, match="padding between"), probe.Recorder(model, attention=True):
        model(ids, attention_mask=mask)
    packed = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with pytest.raises(probe.ProbeError, match="packed"), probe.Recorder(model, attention=True):
        model(ids, position_ids=packed, use_cache=False)
    assert state_of(model) == before


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_text_is_as_alone(side):
    model = random_model(**PADDING_SHIFTS_NO_TEMPERATURE)
    ids = random_ids(20, 1, 64, 7, 16, 9)
    batch, mask = padded(ids, side)
    with torch.no_grad(), probe.Recorder(model, attention=spec()) as recorder:
        model(batch, attention_mask=mask)
    for sample, text in enumerate(ids):
        assert_agrees(recorder.trace(), sample, brute_force.patterns_of_text(model, text), chunk_size=8)


def test_segments_may_differ_from_text_to_text():
    model = random_model()
    ids = random_ids(20, 9, 27)
    places = [(3, 5), (0, 9), (20, 27)]
    trace = recorded(model, ids, attention=spec(segments={"needle": places, "begin": (0, 2)}), batch_size=2)
    assert trace["attention"]["segment"].values.tolist() == ["needle", "begin"]
    for sample, text in enumerate(ids):
        own = {"needle": places[sample], "begin": (0, 2)}
        assert_agrees(trace, sample, brute_force.patterns_of_text(model, text), chunk_size=8, segments=own)


def test_masses_sum_to_one():
    trace = recorded(random_model(), random_ids(50, 31))
    queries, profiles = trace["attention"].to_dataset(), trace["attention_profiles"].to_dataset()
    np.testing.assert_allclose(queries["chunk_mass"] + queries["far_mass"], 1, atol=1e-5)
    np.testing.assert_allclose(profiles["distance_mass"].sum("distance_bin"), 1, atol=1e-5)
    np.testing.assert_allclose(profiles["received_mass"].sum("key_bin"), 1, atol=1e-5)
    mass = profiles["map_sum"].sum(["query_bin", "key_bin"])
    np.testing.assert_allclose(mass, np.broadcast_to([[[50]], [[31]]], mass.shape), rtol=1e-5)


def test_what_the_groups_say_beside_the_numbers():
    model = random_model(**DENSE_BETWEEN)
    ids = random_ids(9, 20)
    trace = recorded(
        model, ids, attention=spec(queries=5, seed=3), domains=["a", "b"], routing=RoutingSpec(next_token_loss=True)
    )
    for name in ("attention", "attention_profiles"):
        group = trace[name].to_dataset()
        assert {key: group.attrs[key] for key in schema.ATTENTION_ATTRIBUTES} == dict(chunk_size=8, queries=5, seed=3)
        assert schema.labels(group["attention_kind"]).tolist() == ["rope", "rope", "rope", "nope", "rope", "rope"]
        assert group["layer"].values.tolist() == [0, 1, 2, 3, 4, 5]
        assert group["head"].values.tolist() == [0, 1, 2, 3]
    queries = trace["attention"].to_dataset()
    assert trace["samples"]["n_queries"].values.tolist() == [5, 5]
    assert queries["sample"].values.tolist() == [0] * 5 + [1] * 5
    assert schema.labels(queries["domain"]).tolist() == ["a"] * 5 + ["b"] * 5
    assert schema.labels(trace["attention_profiles"]["domain"]).tolist() == ["a", "b"]
    assert set(schema.labels(queries["phase"])) == {"prefill"}
    # A query is a token of /routing: what both say of it is the same.
    routing = trace["routing"].to_dataset()
    row = trace["samples"]["row_offset"].values[queries["sample"].values] + queries["position"].values
    np.testing.assert_array_equal(queries["token_id"], routing["token_id"].values[row])
    np.testing.assert_array_equal(queries["next_token_loss"], routing["next_token_loss"].values[row])


# Sequences that go on


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("shape", ["every layer MoE, top-1", "every third layer MoE, top-3"])
def test_generate_agrees_with_one_forward(shape, cache):
    model = random_model(**SHAPES[shape])
    prompt = torch.tensor(random_ids(10, 10))
    with probe.Recorder(model, attention=spec()) as recorder:
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, cache_implementation=cache)
    trace = recorder.trace()
    schema.validate(trace)
    queries = queries_of(trace, 0)
    assert schema.labels(queries["phase"]).tolist() == ["prefill"] * 10 + ["decode"] * 11
    assert queries["position"].values.tolist() == list(range(21))
    for sample in range(2):
        text = brute_force.patterns_of_text(model, out[sample, :-1].tolist())
        assert_agrees(trace, sample, text, chunk_size=8)


@pytest.mark.parametrize("changes", [{}, PADDING_SHIFTS_NO_TEMPERATURE], ids=["temperature", "no temperature"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_padding_on_the_left(cache, changes):
    model = random_model(**changes)
    ids = random_ids(6, 10, 1)
    prompt, mask = padded(ids, "left")
    with brute_force.watched(model) as entered, probe.Recorder(model, attention=spec()) as recorder:
        out = model.generate(
            prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
            cache_implementation=cache,
        )  # fmt: skip
    trace = recorder.trace()
    schema.validate(trace)
    is_real = torch.cat([mask, torch.ones(3, 11, dtype=torch.long)], dim=1)
    assert_batch_agrees(trace, model, entered, is_real)
    if changes:
        for sample, text in enumerate(ids):
            whole = text + out[sample, 10:-1].tolist()
            assert_agrees(trace, sample, brute_force.patterns_of_text(model, whole), chunk_size=8)


def test_a_sequence_that_finished_first_is_not_padded_on():
    model = random_model()
    ids = random_ids(10, 10)
    options = dict(max_new_tokens=12, do_sample=False)
    free = model.generate(torch.tensor(ids), eos_token_id=None, **options)
    end = int(free[0, 13])
    with probe.Recorder(model, attention=spec()) as recorder:
        model.generate(torch.tensor(ids), eos_token_id=end, **options)
    trace = recorder.trace()
    for sample, n_tokens in enumerate(trace["samples"]["n_tokens"].values.tolist()):
        text = brute_force.patterns_of_text(model, free[sample, :n_tokens].tolist())
        assert_agrees(trace, sample, text, chunk_size=8)
    assert trace["samples"]["n_queries"][0] < 21


def empty_cache(kind, model):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=40)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("pieces", [(5, 5, 5), (3, 9, 8), (8, 8, 4), (1, 1, 18), (12, 1, 7), (19, 1)], ids=str)
def test_a_prompt_in_pieces_agrees_with_one_forward(pieces, kind):
    model = random_model()
    (text,) = random_ids(sum(pieces))
    cache = empty_cache(kind, model)
    with torch.no_grad(), probe.Recorder(model, attention=spec()) as recorder:
        for piece in torch.tensor([text]).split(pieces, dim=1):
            model(piece, past_key_values=cache)
    trace = recorder.trace()
    schema.validate(trace)
    assert queries_of(trace, 0)["position"].values.tolist() == list(range(len(text)))
    assert_agrees(trace, 0, brute_force.patterns_of_text(model, text), chunk_size=8)


@pytest.mark.parametrize("chunk_size", [100, 256, 1000])
@pytest.mark.parametrize("pieces", [(300, 200, 50), (10, 430, 1, 109)], ids=str)
def test_a_long_text_in_pieces(pieces, chunk_size):
    model = two_layers(attention_chunk_size=chunk_size, num_attention_heads=1, num_key_value_heads=1)
    (text,) = random_ids(sum(pieces))
    cache = empty_cache("dynamic", model)
    with torch.no_grad(), probe.Recorder(model, attention=spec()) as recorder:
        for piece in torch.tensor([text]).split(pieces, dim=1):
            model(piece, past_key_values=cache)
    assert_agrees(recorder.trace(), 0, brute_force.patterns_of_text(model, text), chunk_size=chunk_size)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_prompts_in_pieces_padded_on_the_left(kind):
    model = random_model()
    ids = random_ids(20, 11)
    batch, mask = padded(ids, "left")
    cache = empty_cache(kind, model)
    with torch.no_grad(), brute_force.watched(model) as entered, probe.Recorder(model, attention=spec()) as recorder:
        for start, stop in ((0, 12), (12, 13), (13, 20)):
            model(batch[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
    assert_batch_agrees(recorder.trace(), model, entered, mask)


# Some of the queries


def rows_of(trace: xr.DataTree) -> list[tuple[int, int]]:
    attention = trace["attention"]
    return list(zip(attention["sample"].values.tolist(), attention["position"].values.tolist(), strict=True))


def test_sampled_queries_are_rows_of_the_whole_recording():
    model = random_model()
    ids = random_ids(300, 20, 5, 64)
    whole = recorded(model, ids)
    some = recorded(model, ids, attention=spec(queries=16, seed=1))
    assert some["samples"]["n_queries"].values.tolist() == [16, 16, 5, 16]
    rows = rows_of(some)
    assert rows == sorted(set(rows))
    of_all = whole["attention"].to_dataset().isel(query=[rows_of(whole).index(row) for row in rows])
    for name in PER_QUERY:
        np.testing.assert_allclose(some["attention"][name], of_all[name], rtol=1e-6, atol=1e-6, err_msg=name)
    for sample, text in enumerate(ids):
        assert_agrees(some, sample, brute_force.patterns_of_text(model, text), chunk_size=8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk_size", [16, 128, 1000])
def test_few_queries_of_long_texts(chunk_size, seed):
    model = two_layers(attention_chunk_size=chunk_size)
    ids = random_ids(500, 300, 130)
    trace = recorded(model, ids, attention=spec(queries=4, seed=seed))
    for sample, text in enumerate(ids):
        assert_agrees(trace, sample, brute_force.patterns_of_text(model, text), chunk_size=chunk_size)


@pytest.mark.parametrize("seed", range(5))
def test_distance_bins_are_those_of_the_longest_text(seed):
    model = two_layers(attention_chunk_size=8)
    ids = random_ids(17, 3)
    trace = recorded(model, ids, attention=spec(queries=1, seed=seed))
    assert trace["attention_profiles"]["distance_bin"].values.tolist() == [0, 1, 2, 4, 8, 16]
    for sample, text in enumerate(ids):
        assert_agrees(trace, sample, brute_force.patterns_of_text(model, text), chunk_size=8)


def test_the_seed_alone_says_which_queries():
    model = random_model(num_hidden_layers=1)
    ids = random_ids(40, 25, 40, 33)

    def drawn(seed, **options):
        return rows_of(recorded(model, ids, attention=spec(queries=6, seed=seed), **options))

    assert drawn(0) == drawn(0, batch_size=1) == drawn(0, batch_size=2)
    assert drawn(0) != drawn(1)
    # Texts of one length do not share the draw.
    positions = {sample: [p for s, p in drawn(0) if s == sample] for sample in (0, 2)}
    assert positions[0] != positions[2]


def test_every_query_is_drawn_as_often_as_any_other():
    model = random_model(num_hidden_layers=1)
    counts = np.zeros(12)
    for seed in range(30):
        attention = probe.AttentionSpec(statistics=("sink_mass",), queries=3, seed=seed)
        trace = probe.record(model, random_ids(*[12] * 16), attention=attention, batch_size=16, progress=False)
        np.add.at(counts, trace["attention"]["position"].values, 1)
    n_texts = 30 * 16
    assert counts.sum() == 3 * n_texts
    # One of twelve is drawn by a quarter of the texts; five standard deviations around that.
    assert (np.abs(counts - n_texts / 4) < 5 * np.sqrt(n_texts * 1 / 4 * 3 / 4)).all()


def test_only_some_layers():
    model = random_model(**DENSE_BETWEEN)
    (text,) = random_ids(30)
    whole = brute_force.patterns_of_text(model, text)
    for layers in ([3], [0, 3, 4]):
        trace = recorded(model, [text], attention=spec(layers=layers))
        assert_agrees(trace, 0, {layer: whole[layer] for layer in layers}, chunk_size=8)


def test_only_some_statistics():
    trace = recorded(random_model(), random_ids(20), attention=probe.AttentionSpec(statistics=("entropy", "map_max")))
    assert [name for name in PER_QUERY if name in trace["attention"]] == ["entropy"]
    assert [name for name in PER_PROFILE if name in trace["attention_profiles"]] == ["map_max"]


@pytest.mark.parametrize("name", PER_QUERY + PER_PROFILE)
def test_any_variable_may_be_named_on_its_own(name):
    trace = recorded(random_model(), random_ids(9), attention=spec(statistics=(name,)))
    assert name in trace["attention" if name in PER_QUERY else "attention_profiles"]


def test_what_is_recorded_unless_told_otherwise():
    trace = recorded(random_model(), random_ids(20), attention=True)
    queries, profiles = trace["attention"].to_dataset(), trace["attention_profiles"].to_dataset()
    always = {
        "entropy", "sink_mass", "self_mass", "previous_mass", "chunk_mass", "far_mass", "mean_distance", "top_key",
        "top_weight",
    }  # fmt: skip
    assert always <= set(queries.data_vars)
    assert queries.sizes["slot"] == 1
    assert {"distance_mass", "received_mass"} <= set(profiles.data_vars)
    assert not {"map_max", "map_sum", "pattern"} & set(profiles.data_vars)
    assert queries.attrs["queries"] == 0


@pytest.mark.parametrize("attention", [None, False])
def test_nothing_is_recorded_unless_asked_for(attention):
    trace = probe.record(random_model(), random_ids(9), attention=attention, progress=False)
    assert "attention" not in trace.children and "attention_profiles" not in trace.children
    assert "n_queries" not in trace["samples"]
    with pytest.raises(probe.SchemaError, match="AttentionSpec"):
        schema.group(trace, "attention")


def test_texts_without_a_token_have_no_profile():
    trace = recorded(random_model(), [[], *random_ids(9), []])
    assert trace["samples"]["n_queries"].values.tolist() == [0, 9, 0]
    assert trace["attention_profiles"]["sample_id"].values.tolist() == [1]
    assert set(trace["attention"]["sample"].values.tolist()) == {1}


# The model itself


def outputs_of(model, batch, mask):
    with torch.no_grad():
        return model(batch, attention_mask=mask).logits


@pytest.mark.parametrize("layout", ["one text", "right", "left"])
@pytest.mark.parametrize("lengths", [(1,), (7, 5, 1), (8, 3), (9, 4), (64, 20, 33, 1), (300, 299, 13)], ids=str)
def test_outputs_are_those_of_sdpa(lengths, layout):
    model = random_model()
    ids = random_ids(*lengths)
    batch, mask = (torch.tensor(ids[:1]), None) if layout == "one text" else padded(ids, layout)
    expected = outputs_of(model, batch, mask)
    with probe.Recorder(model, attention=True):
        logits = outputs_of(model, batch, mask)
    is_real = torch.ones_like(batch, dtype=torch.bool) if mask is None else mask.bool()
    if max(lengths) < 8:
        assert torch.equal(logits[is_real], expected[is_real])
    torch.testing.assert_close(logits[is_real], expected[is_real], rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs_of(model, batch, mask), expected)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("n_new", [3, 12])
def test_generated_logits_are_those_of_sdpa(n_new, cache, side):
    model = random_model()
    prompt, mask = padded(random_ids(4, 4 if side is None else 2), "left")
    options = dict(
        attention_mask=mask, max_new_tokens=n_new, do_sample=False, eos_token_id=None, cache_implementation=cache,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    expected = model.generate(prompt, **options)
    with probe.Recorder(model, attention=True):
        found = model.generate(prompt, **options)
    assert torch.equal(found.sequences, expected.sequences)
    if n_new == 3:
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


def state_of(model) -> tuple:
    """All that a recorder might leave changed."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    instance = [sorted(set(vars(m)) & {"forward", "generate"}) for m in model.modules()]
    implementation = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return hooks, instance, implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_left_as_it_was(implementation):
    model = random_model()
    model.set_attn_implementation(implementation)
    before = state_of(model)
    with pytest.raises(ValueError, match="stop here"), probe.Recorder(model, attention=True):
        raise ValueError("stop here")
    assert state_of(model) == before
    recorded(model, random_ids(20))
    assert state_of(model) == before


def test_a_forward_that_fails_halfway_leaves_nothing_behind():
    model = random_model()
    (text,) = random_ids(20)
    before = state_of(model)

    def fail(module, args, output):
        raise ValueError("stop here")

    with torch.no_grad(), probe.Recorder(model, attention=spec()) as recorder:
        handle = model.model.layers[3].register_forward_hook(fail)
        with pytest.raises(ValueError, match="stop here"):
            model(torch.tensor([text]))
        handle.remove()
        model(torch.tensor([text]))
    assert state_of(model) == before
    trace = recorder.trace()
    schema.validate(trace)
    assert trace["samples"]["n_queries"].values.tolist() == [20]
    assert_agrees(trace, 0, brute_force.patterns_of_text(model, text), chunk_size=8)


def test_several_forwards_are_several_samples():
    model = random_model()
    ids = random_ids(20, 9, 17)
    places = [(0, 5), (2, 4), (16, 17)]
    attention = spec(segments={"needle": places})
    with torch.no_grad(), probe.Recorder(model, attention=attention) as recorder:
        for text in ids:
            model(torch.tensor([text]), use_cache=False)
    for sample, text in enumerate(ids):
        own = {"needle": places[sample]}
        dense = brute_force.patterns_of_text(model, text)
        assert_agrees(recorder.trace(), sample, dense, chunk_size=8, segments=own)


@pytest.mark.parametrize("inner_attention", [False, True])
@pytest.mark.parametrize("outer_attention", [False, True])
def test_two_recorders_may_be_nested(outer_attention, inner_attention):
    model = random_model()
    first, second, third = random_ids(20, 9, 17)
    before = state_of(model)
    specs = [spec() if attention else None for attention in (outer_attention, inner_attention)]
    with torch.no_grad(), probe.Recorder(model, attention=specs[0]) as outer:
        model(torch.tensor([first]))
        with probe.Recorder(model, attention=specs[1]) as inner:
            model(torch.tensor([second]))
        model(torch.tensor([third]))
    assert state_of(model) == before
    recordings = ((outer, outer_attention, [first, second, third]), (inner, inner_attention, [second]))
    for recorder, attention, ids in recordings:
        trace = recorder.trace()
        schema.validate(trace)
        assert ("attention" in trace.children) == attention
        if attention:
            assert trace["samples"]["n_queries"].values.tolist() == [len(text) for text in ids]
            for sample, text in enumerate(ids):
                assert_agrees(trace, sample, brute_force.patterns_of_text(model, text), chunk_size=8)


def test_recording_in_training_leaves_the_gradients_alone():
    model = random_model().train()
    ids = torch.tensor(random_ids(20, 20))
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with probe.Recorder(model, attention=spec()) as recorder:
        model(ids, labels=ids).loss.backward()
    assert recorder.trace()["attention"].sizes["query"] == 40
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_works_on_the_decoder_alone_and_on_the_image_and_text_model():
    model = random_model()
    ids = random_ids(20, 9)
    expected = recorded(model, ids)["attention"].to_dataset()
    xr.testing.assert_equal(recorded(model.model, ids)["attention"].to_dataset(), expected)
    vision = Llama4VisionConfig(
        hidden_size=16, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14,
        projector_input_dim=16, projector_output_dim=16, vision_output_dim=16,
    )  # fmt: skip
    both = Llama4ForConditionalGeneration(Llama4Config(text_config=model.config, vision_config=vision)).eval()
    both.language_model.load_state_dict(model.state_dict())
    before = state_of(both)
    xr.testing.assert_equal(recorded(both, ids)["attention"].to_dataset(), expected)
    assert state_of(both) == before


def test_recording_the_attention_changes_no_routing():
    model = random_model()
    ids = random_ids(20, 64, 9)
    plain = probe.record(model, ids, progress=False)["routing"].to_dataset()
    beside = recorded(model, ids)["routing"].to_dataset()
    np.testing.assert_array_equal(beside["expert_index"], plain["expert_index"])
    np.testing.assert_allclose(beside["router_logit"], plain["router_logit"], atol=4e-3)


def test_offsets_and_layers_may_be_arrays():
    trace = recorded(random_model(), random_ids(12), attention=spec(offsets=np.array([1, 3]), layers=np.array([0, 1])))
    assert trace["attention"]["offset"].values.tolist() == [1, 3]
    assert trace["attention"]["layer"].values.tolist() == [0, 1]


def test_another_thread_cannot_record_the_same_model():
    model, failed = random_model(), []

    def other() -> None:
        try:
            probe.record(model, random_ids(9), progress=False)
        except probe.ProbeError as error:
            failed.append(str(error))

    with probe.Recorder(model), probe.Recorder(model, attention=True):  # the same thread may nest
        thread = Thread(target=other)
        thread.start()
        thread.join()
    assert len(failed) == 1 and "another thread is recording this model" in failed[0]
    thread = Thread(target=other)
    thread.start()
    thread.join()
    assert len(failed) == 1, "once it is done, any thread may"


# What cannot be


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(statistics=("entropy", "sharpness")), "sharpness"),
        (dict(statistics="sharpness"), "sharpness"),
        (dict(statistics=(), segments={}, offsets=()), "statistic"),
        (dict(layers=[2, 99]), "99"),
        (dict(layers=[-1]), "-1"),
        (dict(layers=[]), "layer"),
        (dict(queries=0), "queries.*0"),
        (dict(queries=-4), "queries.*-4"),
        (dict(map_size=0), "map_size.*0"),
        (dict(top_keys=0), "top_keys.*0"),
        (dict(offsets=(1, -2)), "offset.*-2"),
        (dict(segments={"needle": (5, 2)}), "needle"),
        (dict(segments={"needle": (-1, 2)}), "needle"),
        (dict(segments={"needle": (1, 2, 3)}), "needle"),
        (dict(segments={"needle": 4}), "needle"),
        (dict(segments={"needle": [(0, 2)]}), "needle.*2"),
        (dict(segments={"needle": [(0, 2), (4, 3)]}), "needle"),
        (dict(statistics=("segment_mass",), segments=None), "segment"),
        (dict(statistics=("key_rank",), segments=None), "segment"),
        (dict(statistics=("offset_mass",), offsets=()), "offset"),
        (dict(statistics=("all",)), "all"),
        (dict(statistics=5), "statistics"),
        (dict(statistics=None), "statistics"),
        (dict(layers="all"), "layers.*'all'"),
        (dict(layers=3), "layers.*3"),
        (dict(queries=True), "queries.*True"),
        (dict(top_keys=65), "top_keys is 65.*64"),
        (dict(offsets=3), "offsets.*3"),
        (dict(offsets=None), "offsets"),
        (dict(offsets="12"), "offsets.*'12'"),
        (dict(offsets=(1, 1)), "offsets.*different"),
        (dict(offsets=(10**30,)), "offsets.*at most"),
        (dict(segments=[("needle", (0, 1))]), "segments.*by name"),
        (dict(segments={5: (0, 1)}), "segments.*by name"),
    ],
)
def test_what_cannot_be_recorded_is_named_before_anything_runs(options, message):
    model = random_model()
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    with pytest.raises(probe.ProbeError, match=message):
        probe.record(model, random_ids(9, 12), attention=spec(**options), progress=False)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["all", 3, ["entropy"]])
def test_a_spec_of_another_kind_is_refused(attention):
    model = random_model()
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    with pytest.raises(probe.ProbeError, match="attention"):
        probe.record(model, random_ids(9), attention=attention, progress=False)


def test_patterns_of_long_texts_are_refused_before_anything_runs():
    model = random_model(num_hidden_layers=1, max_position_embeddings=2048)
    attention = spec(statistics=("pattern",))
    trace = recorded(model, random_ids(1024), attention=attention)
    assert trace["attention_profiles"]["pattern"].shape[-2:] == (1024, 1024)
    # What is cut off does not count.
    recorded(model, random_ids(1025), attention=attention, max_tokens=20)
    model.model.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    with pytest.raises(probe.ProbeError, match=r"pattern.*1,?024"):
        probe.record(model, random_ids(5, 1025), attention=attention, progress=False)


# Stores, and memory


def test_a_recording_comes_back_from_a_store(tmp_path):
    trace = recorded(random_model(**DENSE_BETWEEN), random_ids(20, 9, 1), attention=spec(queries=12))
    probe.save(trace, tmp_path / "run.zarr")
    again = probe.open(tmp_path / "run.zarr")
    schema.validate(again)
    for name in ("attention", "attention_profiles"):
        xr.testing.assert_identical(again[name].to_dataset().load(), trace[name].to_dataset())


class LargestOutput(TorchDispatchMode):
    """The most elements that any operation returned in one tensor."""

    def __init__(self):
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.n_elements = max(self.n_elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("queries", [None, 100])
def test_no_tensor_is_as_large_as_a_pattern(queries):
    n, chunk_size, n_heads = 4096, 1024, 1
    model = random_model(
        attention_chunk_size=chunk_size, num_hidden_layers=4, max_position_embeddings=n, num_attention_heads=n_heads,
        num_key_value_heads=1,
    )  # fmt: skip
    (text,) = random_ids(n)
    attention = spec(statistics=[name for name in EVERYTHING if name != "pattern"], queries=queries)
    with LargestOutput() as largest:
        recorded(model, [text], attention=attention)
    assert largest.n_elements <= n * chunk_size * n_heads
    # The unrecorded model does make one, its mask: this would be seen.
    with LargestOutput() as largest, torch.no_grad():
        model.model(torch.tensor([text]), use_cache=False)
    assert largest.n_elements >= n * n
