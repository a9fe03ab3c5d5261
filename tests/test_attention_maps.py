"""Statistics of attention: by hand, against plain loops, under relabelling, and with hardly anything recorded."""

from __future__ import annotations

import functools
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy.stats import t as student

from probe import attention_maps, schema
from probe.attention import queries
from probe.schema import ProbeError, SchemaError
from tests.attention_cases import LAYERS, is_nope, planted, random_recording, same

ROOT = Path(__file__).parents[1]
LENGTHS = (9, 1, 0, 14, 6, 7, 5, 12)
CHUNK = 4
PER_HEAD = ["entropy", "sink_mass", "self_mass", "previous_mass", "chunk_mass", "far_mass", "mean_distance"]
NEEDLES = [(1, 3)] * 3 + [(2, 4), (1, 3), (0, 2), (1, 3), (1, 3)]
ANSWERS = [(5, 8), (0, 1), (0, 1), (4, 9), (3, 5), (4, 6), (3, 4), (6, 11)]

ARGUMENTS = {
    "query_mean": {"statistic": "entropy"},
    "head_mean": {"statistic": "entropy"},
    "position_profile": {"statistic": "entropy"},
    "needle_score": {"needle": (1, 3), "answer": (90, 91)},
    "induction_score": {"period": 3},
}
"""What a statistic must be told."""

OF_PROFILES = ("distance_profile", "head_similarity")
STATISTICS = [
    functools.wraps(function)(functools.partial(function, **ARGUMENTS.get(name, {})))
    for name in attention_maps.__all__
    for function in [getattr(attention_maps, name)]
]
every_statistic = pytest.mark.parametrize("function", STATISTICS, ids=lambda function: function.__name__)


def close(actual, expected, **tolerance):
    np.testing.assert_allclose(actual, expected, **({"rtol": 1e-6, "atol": 1e-9} | tolerance))


def attention_of(recording: xr.DataTree) -> xr.Dataset:
    return recording["attention"].to_dataset()


def variables_of(result) -> dict[str, xr.DataArray]:
    return {"": result} if isinstance(result, xr.DataArray) else dict(result.data_vars)


def with_group(recording: xr.DataTree, name: str, data: xr.Dataset) -> xr.DataTree:
    recording = recording.copy()
    recording[name] = xr.DataTree(data)
    return recording


def mean_over(rows: xr.Dataset, values: np.ndarray) -> np.ndarray:
    """Mean over the defined queries of each sample, then over samples; NaN where there is none."""
    of_samples = [nanmean(values[rows["sample"].values == number]) for number in np.unique(rows["sample"].values)]
    return nanmean(np.array(of_samples).reshape(len(of_samples), *values.shape[1:]))


def nanmean(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(len(values), -1).astype(float)
    means = [column[~np.isnan(column)].mean() if (~np.isnan(column)).any() else np.nan for column in flat.T]
    return np.array(means).reshape(values.shape[1:])


# By hand


def test_query_mean_by_hand():
    """Three of six queries, 1, 2 and 6: mean 3, s² = 7, error √(7/3 · 1/2); all of two queries: no error."""
    data = planted(
        {"entropy": np.array([1, 2, 6, 4, 5, 7.0])[:, None, None]}, positions=[[0, 2, 5], [0, 1], [3]], layers=[3]
    )
    result = attention_maps.query_mean(data, "entropy", n_tokens=[6, 2, 8])
    error = np.sqrt(7 / 3 / 2)
    reach = student.ppf(0.975, 2) * error
    close(result["mean"].values.ravel(), [3, 4.5, 7])
    close(result["standard_error"].values.ravel(), [error, 0, np.nan])
    close(result["lower"].values.ravel(), [max(3 - reach, 0), 4.5, np.nan])
    close(result["upper"].values.ravel(), [3 + reach, 4.5, np.nan])
    assert result["mean"].attrs["units"] == "nat"


def test_query_mean_of_masses_stays_possible():
    data = planted({"far_mass": np.array([0.0, 1.0])[:, None, None]}, positions=[[0, 9]], layers=[3])
    result = attention_maps.query_mean(data, "far_mass", n_tokens=[100])
    assert (result["lower"].item(), result["mean"].item(), result["upper"].item()) == (0, 0.5, 1)


def test_query_mean_leaves_out_what_is_undefined():
    values = np.array([np.nan, 0.2, 0.4, np.nan])[:, None, None, None]
    data = planted({"key_rank": values}, positions=[[0, 3, 5], [0]], layers=[3])
    result = attention_maps.query_mean(data, "key_rank", n_tokens=[6, 1])
    close(result["mean"].values.ravel(), [0.3, np.nan])
    close(result["standard_error"].values.ravel(), [np.sqrt(0.02 / 2 * 0.5), np.nan])


def test_head_mean_counts_every_sample_the_same():
    """A sample of three queries weighs no more than one of one: (2 + 6) / 2, not (1 + 2 + 3 + 6) / 4."""
    values = np.stack([[1, 2, 3, 6], [0, 0, 0, 4]], axis=1)[:, None]
    result = attention_maps.head_mean(planted({"entropy": values}, positions=[[0, 1, 2], [0]], layers=[3]), "entropy")
    close(result["mean"].values, [[4, 2]])
    assert np.isnan(result["lower"]).all() and np.isnan(result["upper"]).all()
    assert (result["n_documents"] == 2).all()


def test_head_mean_interval_by_hand():
    """Six samples; on the logarithm for entropies, on the logit for masses."""
    of_samples = np.array([0.2, 0.3, 0.25, 0.4, 0.35, 0.3])
    carrying = of_samples.sum() ** 2 / (of_samples**2).sum()
    reach = student.ppf(0.975, carrying - 1) * of_samples.std(ddof=1) / np.sqrt(6)
    data = planted({"entropy": same(of_samples), "sink_mass": same(of_samples)}, positions=[[0]] * 6)
    entropy = attention_maps.head_mean(data, "entropy").isel(layer=0, head=0)
    close([entropy["lower"], entropy["upper"]], [0.3 * np.exp(-reach / 0.3), 0.3 * np.exp(reach / 0.3)])
    mass = attention_maps.head_mean(data, "sink_mass").isel(layer=0, head=0)
    odds = 0.3 / 0.7 * np.exp(np.array([-1, 1]) * reach / (0.3 * 0.7))
    close([mass["lower"], mass["upper"]], odds / (1 + odds))


def test_interval_is_withheld_where_it_would_not_hold():
    one_of_ten = same([0.5] + [0.001] * 9)
    data = planted({"sink_mass": one_of_ten, "self_mass": 1 - one_of_ten, "entropy": one_of_ten}, positions=[[0]] * 10)
    for name in ("sink_mass", "self_mass", "entropy"):
        assert np.isnan(attention_maps.head_mean(data, name)["lower"]).all(), name
    four = planted({"sink_mass": same([0.5, 0.4, 0.6, 0.5])}, positions=[[0]] * 4)
    assert np.isnan(attention_maps.head_mean(four, "sink_mass")["upper"]).all()


@pytest.mark.parametrize(("name", "value"), [("far_mass", 0.0), ("chunk_mass", 1.0), ("entropy", 0.0)])
def test_what_is_so_by_construction_has_no_width(name, value):
    noise = np.linspace(-1e-7, 1e-7, 6) if value == 1 else 0
    result = attention_maps.head_mean(planted({name: same(value + np.zeros(6) + noise)}, positions=[[0]] * 6), name)
    close([result["lower"].values, result["upper"].values], np.full((2, 4, 2), value), atol=1e-6)


def test_equal_ranks_say_little_of_others():
    ranks = np.zeros((6, 4, 2, 1))
    data = planted({"key_rank": ranks}, positions=[[3]] * 6, segment=["needle"])
    result = attention_maps.head_mean(data, "key_rank")
    assert (result["mean"] == 0).all() and np.isnan(result["upper"]).all()


def test_head_mean_by_domain():
    """A domain of which no query was recorded is NaN, and comes first like any other."""
    data = planted({"entropy": same([1, 2, 6, 5])}, positions=[[0]] * 4, domains=["b", "a", "b", "c"])
    data = data.isel(query=[0, 1, 2])
    result = attention_maps.head_mean(data, "entropy", by="domain")
    assert result["mean"].dims == ("domain", "layer", "head")
    assert result["domain"].values.tolist() == ["a", "b", "c"]
    close(result["mean"].values[:, 0, 0], [2, 3.5, np.nan])
    assert result["n_documents"].values[:, 0, 0].tolist() == [1, 2, 0]


def test_head_mean_splits_within_samples():
    data = planted({"entropy": same([1, 3], n_queries=2)}, positions=[[0, 1], [0, 1]])
    data["entropy"].values[:] += np.array([0, 10, 0, 20])[:, None, None]
    close(attention_maps.head_mean(data, "entropy", by="position")["mean"].values[:, 0, 0], [2, 17])


def test_by_kind_pairs_samples():
    """NoPE minus RoPE is 1, 2, 3, 4, 5 while the samples themselves differ tenfold: Student's t of the five."""
    base = np.array([100, 10, 50, 30, 20.0])
    values = same(base)
    values[:, 3] += np.arange(1, 6)[:, None]
    result = attention_maps.by_kind(planted({"mean_distance": values}, positions=[[7]] * 5), level=0.9)
    gap = result.sel(statistic="mean_distance")
    reach = student.ppf(0.95, 4) * np.std([1, 2, 3, 4, 5], ddof=1) / np.sqrt(5)
    close(gap["mean"].sel(attention_kind=["rope", "nope"]), [base.mean(), base.mean() + 3])
    close([gap["difference"], gap["difference_lower"], gap["difference_upper"]], [3, 3 - reach, 3 + reach])
    assert gap["units"].item() == "token"
    one_of_five = attention_maps.by_kind(planted({"mean_distance": same([1, 1, 1, 500, 1])}, positions=[[7]] * 5))
    assert np.isnan(one_of_five["difference_lower"]).all()


def test_sinks_by_hand():
    masses = np.stack([same([0.1, 0.2], n_heads=1), same([0.3, 0.4], n_heads=1)], axis=2)[..., 0]
    result = attention_maps.sinks(planted({"sink_mass": masses}, positions=[[1], [1]]))
    close(result["sink_mass"].values, np.tile([0.15, 0.35], (4, 1)))
    assert result["is_sink"].values.tolist() == [[False, True]] * 4
    assert result["is_sink"].dtype == bool
    assert not attention_maps.sinks(planted({"sink_mass": masses}, positions=[[1], [1]]), threshold=0.36)[
        "is_sink"
    ].any()


def test_position_profile_by_hand():
    """Positions 0 to 6 in at most three bins, none across the border at 4: 0–3 and 4–6."""
    values = same([0], n_queries=7, n_heads=1)
    values[:, :3] = np.arange(7)[:, None, None]
    values[:, 3] = 10
    result = attention_maps.position_profile(planted({"entropy": values}, positions=[range(7)]), "entropy", n_bins=3)
    assert result["position_bin"].values.tolist() == [0, 4]
    assert result["bin_stop"].values.tolist() == [4, 7]
    assert result.attrs == {"level": 0.95, "statistic": "entropy", "chunk_size": 4}
    close(result["mean"].sel(attention_kind="rope"), [1.5, 5])
    close(result["mean"].sel(attention_kind="nope"), [10, 10])


@pytest.mark.parametrize(
    ("n_tokens", "n_bins", "first"),
    [(3, 2, [0, 2]), (4, 3, [0, 2]), (9, 5, [0, 2, 4, 6, 8]), (9, 9, list(range(9))), (17, 3, [0, 8, 16]), (5, 1, [0])],
)
def test_bins_of_positions_do_not_lie_across_a_border_of_chunks(n_tokens, n_bins, first):
    """Chunk 4: within the first chunk bins are as they come; beyond, 1, 2 or 4 positions wide, or whole chunks."""
    data = planted({"entropy": same([0], n_queries=n_tokens, n_heads=1)}, positions=[range(n_tokens)])
    result = attention_maps.position_profile(data, "entropy", n_bins=n_bins)
    assert result["position_bin"].values.tolist() == first


def test_chunk_reach_by_hand():
    """Chunk 4, ten tokens: borders at 4 and 8. After them stand 4, 5, 8, 9, before them 2, 3, 6, 7."""
    values = same([0], n_queries=10, n_heads=1) + np.arange(10)[:, None, None]
    data = planted({"entropy": values}, positions=[range(10)], next_token_loss=np.arange(10) * 2)
    result = attention_maps.chunk_reach(data)
    assert result["chunk_position"].values.tolist() == [0, 1, 2, 3]
    close(result["reach"].sel(attention_kind="rope"), [1, 2, 3, 4])
    close(result["reach"].sel(attention_kind="nope"), [7, 8, 5, 6])
    close(result["entropy"].sel(attention_kind="rope"), [6, 7, 4, 5])
    close(result["loss"], [12, 14, 8, 10])
    assert "mean_distance" not in result


def test_chunk_reach_needs_text_on_both_sides_of_a_border():
    """A text of one whole chunk has no border: nothing follows it."""
    data = planted({"entropy": same([0], n_queries=4)}, positions=[range(4)])
    assert attention_maps.chunk_reach(data)["reach"].isnull().all()
    longer = planted({"entropy": same([0], n_queries=5)}, positions=[range(5)])
    close(attention_maps.chunk_reach(longer)["reach"].sel(attention_kind="nope"), [5, np.nan, 3, 4])


def test_chunk_reach_bins():
    data = planted({"entropy": same([0], n_queries=21)}, positions=[range(21)], chunk_size=10)
    result = attention_maps.chunk_reach(data, n_bins=3)
    assert result["chunk_position"].values.tolist() == [0, 4, 8]
    assert result["bin_stop"].values.tolist() == [4, 8, 10]
    # The middle of the bin 4 to 7 lies after the middle of the chunk: like 8 and 9 it counts as before a border.
    close(result["reach"].sel(attention_kind="rope"), [np.mean([1, 2, 3, 4, 1]), 6.5, 9.5])
    close(result["reach"].sel(attention_kind="nope"), [np.mean([11, 12, 13, 14, 21]), 11.5, 14.5])


def test_needle_score_by_hand():
    """Text a b c d b c: the query at 4 holds b and is to predict c, which stands in the needle at 2."""
    tokens = [7, 8, 9, 5, 8, 9]
    top_key = np.array([[2, 1], [2, 2]], float)[:, None, :, None]  # query 3 copies b (8), query 4 copies c (9)
    zeros = np.zeros((6, 1, 2, 1))
    mass, rank, key = zeros.copy(), zeros.copy(), zeros.copy()
    key[3:5], mass[3:5, 0, :, 0], rank[3:5, 0, :, 0] = top_key, [[0.1, 0.2], [0.3, 0.6]], [[0, 5], [np.nan, 7]]
    values = {"top_key": key, "segment_mass": mass, "key_rank": rank}
    data = planted(values, positions=[range(6)], layers=[3], token_id=tokens, segment=["needle"])
    result = attention_maps.needle_score(data, needle=(1, 3), answer=(3, 5))
    close(result["score"].values, [[0.5, 1]])
    close(result["mass"].values, [[0.2, 0.4]])
    close(result["rank"].values, [[0, 6]])
    close(attention_maps.needle_score(data, needle=(2, 3), answer=(3, 5))["score"].values, [[0.5, 0.5]])


def test_induction_score_by_hand():
    """Period 3 looks 2 back, from the fourth token on."""
    mass = np.full((7, 1, 1, 2), 0.9)
    mass[:, 0, 0, 1] = [np.nan, np.nan, 0.9, 0.1, 0.2, 0.3, 0.4]
    data = planted({"offset_mass": mass}, positions=[range(7)], layers=[3], offset=[1, 2])
    result = attention_maps.induction_score(data, period=3)
    assert result.dims == ("layer", "head")
    close(result.values, [[0.25]])


def test_head_similarity_by_hand():
    masses = np.array([[[[1, 0, np.nan], [1, 1, 0]]]])  # NaN is what the head cannot see
    values = {"received_mass": masses, "n_tokens": [3], "n_queries": [3], "sample_id": [0], "domain": [0]}
    labels = {"layer": [3], "attention_kind": [1], "head": [0, 1]}
    data = schema.dataset("attention_profiles", values | labels, {"attention_kind": schema.ATTENTION_KINDS})
    result = attention_maps.head_similarity(data, of="received_mass")
    close(result.values, [[1, np.sqrt(0.5)], [np.sqrt(0.5), 1]])
    assert result["head"].values.tolist() == result["other_head"].values.tolist() == ["3.0", "3.1"]
    assert result["layer"].values.tolist() == [3, 3]
    assert result["attention_kind"].values.tolist() == ["nope", "nope"]
    blank = data.assign(received_mass=data["received_mass"] * np.array([0, 1])[:, None])
    close(attention_maps.head_similarity(blank, of="received_mass").values, [[np.nan, np.nan], [np.nan, 1]])


# Against plain loops


@pytest.fixture(scope="module", params=[0, 4], ids=["all queries", "4 queries"])
def recording(request) -> xr.DataTree:
    return random_recording(seed=3, lengths=LENGTHS, queries=request.param)


@pytest.mark.parametrize("name", [*PER_HEAD, "segment_mass", "key_rank", "offset_mass", "top_key", "top_weight"])
def test_head_mean_and_query_mean_by_loops(recording, name):
    data = attention_of(recording)
    values, sample = data[name].values, data["sample"].values
    close(attention_maps.head_mean(recording, name)["mean"].values, mean_over(data, values))
    result = attention_maps.query_mean(recording, name)
    assert result["sample"].values.tolist() == [0, 1, 3, 4, 5, 6, 7], "sample 2 is empty"
    for place, number in enumerate(result["sample"].values):
        own = values[sample == number].astype(float).reshape((sample == number).sum(), -1)
        found = {key: result[key].values[place].ravel() for key in ("mean", "standard_error", "lower", "upper")}
        for column, observed in enumerate(own.T):
            seen, m, total = observed[~np.isnan(observed)], len(observed), LENGTHS[number]
            mean = seen.mean() if len(seen) else np.nan
            error = np.nan
            if len(seen) and m == total:
                error = 0.0
            elif len(seen) > 1:
                error = np.sqrt(seen.var(ddof=1) / len(seen) * (1 - m / total))
                if name.endswith("_mass") and name not in ("far_mass", "chunk_mass") or name == "top_weight":
                    # Fewer than 20 were drawn: each of those that were not may hold 1 / v.
                    kind = schema.labels(data["attention_kind"])[column // (values[0, 0].size)]
                    drawn = set(data["position"].values[sample == number].tolist())
                    keys = [i % CHUNK + 1 if kind == "rope" else i + 1 for i in range(total) if i not in drawn]
                    if name == "sink_mass" and kind == "rope":
                        keys = [i + 1 for i in range(min(total, CHUNK)) if i not in drawn]
                    error = error if error >= sum(1 / v for v in keys) / total else np.nan
            close(found["mean"][column], mean)
            close(found["standard_error"][column], error, atol=1e-7)
            if len(seen) > 1 and name in ("mean_distance", "key_rank", "top_key"):
                reach = student.ppf(0.975, len(seen) - 1) * error
                close(found["lower"][column], max(mean - reach, 0), atol=1e-6)
                close(found["upper"][column], mean + reach, atol=1e-6)


def test_head_mean_by_domain_by_loops(recording):
    data = attention_of(recording)
    result = attention_maps.head_mean(recording, "previous_mass", by="domain")
    for code, label in enumerate(["domain 0", "domain 1"]):
        rows = data.isel(query=np.flatnonzero(data["domain"].values == code))
        close(result["mean"].sel(domain=label).values, mean_over(rows, rows["previous_mass"].values))


def of_kind(data: xr.Dataset, name: str, kind: str) -> np.ndarray:
    """Mean (sample,) over queries, then over the kind's layers and heads."""
    layers = [place for place, layer in enumerate(data["layer"].values) if is_nope(layer) == (kind == "nope")]
    values, sample = data[name].values[:, layers], data["sample"].values
    return np.array([nanmean(nanmean(values[sample == number]).ravel()[:, None])[0] for number in np.unique(sample)])


def test_by_kind_by_loops(recording):
    data, result = attention_of(recording), attention_maps.by_kind(recording)
    assert result["statistic"].values.tolist() == PER_HEAD
    for name in PER_HEAD:
        means = {kind: of_kind(data, name, kind) for kind in ("rope", "nope")}
        for kind, of_samples in means.items():
            close(result["mean"].sel(statistic=name, attention_kind=kind), nanmean(of_samples[:, None])[0])
        gap = means["nope"] - means["rope"]
        gap = gap[~np.isnan(gap)]
        reach = student.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap))
        own = result.sel(statistic=name)
        close(own["difference"], gap.mean(), atol=1e-7)
        if not np.isnan(own["lower"]).any():
            close(
                [own["difference_lower"], own["difference_upper"]], [gap.mean() - reach, gap.mean() + reach], atol=1e-6
            )
    assert (~np.isnan(result["difference_lower"])).sum() >= 4


def test_position_profile_and_chunk_reach_by_loops(recording):
    data = attention_of(recording)
    position = data["position"].values.astype(int)
    profile = attention_maps.position_profile(recording, "entropy", n_bins=5)
    reach = attention_maps.chunk_reach(recording)
    for kind in ("rope", "nope"):
        for first, stop in zip(profile["position_bin"].values, profile["bin_stop"].values, strict=True):
            rows = data.isel(query=np.flatnonzero((position >= first) & (position < stop)))
            found = profile["mean"].sel(attention_kind=kind, position_bin=first)
            close(found, of_kind(rows, "entropy", kind).mean())
        for place in range(CHUNK):
            last = np.array([position[data["sample"].values == sample].max() for sample in data["sample"].values])
            border = position - place + (CHUNK if place >= CHUNK / 2 else 0)
            rows = data.isel(query=np.flatnonzero((position % CHUNK == place) & (border > 0) & (border <= last)))
            own = reach.sel(attention_kind=kind, chunk_position=place)
            if not rows.sizes["query"]:
                assert np.isnan(own["reach"])
                continue
            for name in ("entropy", "mean_distance"):
                close(own[name], of_kind(rows, name, kind).mean())
            seen = (
                rows["position"].values.astype(float) + 1 if kind == "nope" else np.full(rows.sizes["query"], place + 1)
            )
            close(own["reach"], mean_over(rows, seen[:, None])[0])
            close(own["loss"], mean_over(rows, rows["next_token_loss"].values[:, None])[0])
            assert own["n_documents"] == len(np.unique(rows["sample"].values))


def test_needle_score_by_loops(recording):
    data, tokens = attention_of(recording), recording["routing"].to_dataset()
    offset = recording["samples"]["row_offset"].values.astype(int)

    def token(sample, position):
        return tokens["token_id"].values[offset[sample] + position]

    # Sample 1 has a single token, which can predict nothing that was recorded.
    answers = [(start, min(stop, length - 1)) if length > 2 else (90, 91)
               for (start, stop), length in zip(ANSWERS, LENGTHS, strict=True)]  # fmt: skip
    result = attention_maps.needle_score(recording, needle=NEEDLES, answer=answers)
    used, hits = [], []
    for row, (sample, position) in enumerate(
        zip(data["sample"].values.tolist(), data["position"].values.tolist(), strict=True)
    ):
        if answers[sample][0] <= position < answers[sample][1]:
            used.append(row)
            keys = data["top_key"].values[row, ..., 0].astype(int)
            inside = (keys >= NEEDLES[sample][0]) & (keys < NEEDLES[sample][1])
            same_token = [[token(sample, key) == token(sample, position + 1) for key in heads] for heads in keys]
            hits.append(inside & same_token)
    rows = data.isel(query=used)
    assert len(used) >= 5 and np.any(hits)
    close(result["score"].values, mean_over(rows, np.array(hits, float)))
    close(result["mass"].values, mean_over(rows, rows["segment_mass"].values[..., 0]))
    close(result["rank"].values, mean_over(rows, rows["key_rank"].values[..., 0]))


@pytest.mark.parametrize(("period", "place"), [(3, 0), (4, 1)])
def test_induction_score_by_loops(recording, period, place):
    data = attention_of(recording)
    rows = data.isel(query=np.flatnonzero(data["position"].values >= period))
    expected = mean_over(rows, rows["offset_mass"].values[..., place])
    close(attention_maps.induction_score(recording, period=period).values, expected)


def test_distance_profile_by_loops(recording):
    data = recording["attention_profiles"].to_dataset()
    values = data["distance_mass"].values
    result = attention_maps.distance_profile(recording)
    close(result["distance_mass"].values, nanmean(values))
    assert result["n_documents"].values[0, 0].tolist() == (~np.isnan(values[:, 0, 0])).sum(axis=0).tolist()
    by_kind = attention_maps.distance_profile(recording, by_kind=True)
    for kind in ("rope", "nope"):
        layers = [place for place, layer in enumerate(LAYERS) if is_nope(layer) == (kind == "nope")]
        of_samples = np.array([nanmean(own[layers].reshape(-1, own.shape[-1])) for own in values])
        close(by_kind["distance_mass"].sel(attention_kind=kind), nanmean(of_samples))
    beyond = result["distance_bin"].values >= CHUNK
    rope = [place for place, layer in enumerate(LAYERS) if not is_nope(layer)]
    assert (result["distance_mass"].values[rope][..., beyond] == 0).all()
    assert (result["distance_mass"].values[3][..., beyond] > 0).all()


def test_distance_profile_sums_to_one_where_samples_are_alike():
    result = attention_maps.distance_profile(random_recording(lengths=[6] * 5))
    close(result["distance_mass"].sum("distance_bin").values, 1, rtol=1e-5)
    assert (result["lower"] <= result["distance_mass"]).all() and (result["distance_mass"] <= result["upper"]).all()


@pytest.mark.parametrize("of", ["map_sum", "distance_mass", "received_mass"])
def test_head_similarity_by_loops(recording, of):
    data = recording["attention_profiles"].to_dataset()
    result = attention_maps.head_similarity(recording, of=of)
    n_heads = data.sizes["head"]
    values = np.nan_to_num(data[of].values.astype(float)).reshape(data.sizes["profile"], result.sizes["head"], -1)
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    heads = range(result.sizes["head"])
    expected = [[np.mean([own[one] @ own[other] for own in values]) for other in heads] for one in heads]
    close(result.values, expected)
    assert result["head"].values[n_heads] == f"{LAYERS[1]}.0"


# Coverage


def test_query_mean_withholds_what_a_few_early_queries_decide():
    """Even attention, 1 / v on each of v keys: most draws miss the first queries, which the mean rests on."""
    n_tokens, n_queries, n_seeds = 4096, 256, 200
    random = np.random.default_rng(0)
    positions = [np.sort(random.choice(n_tokens, n_queries, replace=False)).tolist() for _ in range(n_seeds)]
    even = np.concatenate([1 / (np.array(own) + 1) for own in positions])
    steady = 0.3 + 0.2 * np.concatenate([np.sin(np.array(own)) for own in positions])
    values = np.stack([even, steady], axis=1)[:, None]
    data = planted({"self_mass": values, "entropy": values}, positions=positions, layers=[3])
    truth = np.array([(1 / np.arange(1, n_tokens + 1)).mean(), 0.3 + 0.2 * np.sin(np.arange(n_tokens)).mean()])

    naive = attention_maps.query_mean(data, "entropy", n_tokens=[n_tokens] * n_seeds).isel(layer=0)
    inside = (naive["lower"] <= truth) & (truth <= naive["upper"])
    assert inside.isel(head=0).mean() < 0.75 and inside.isel(head=1).mean() > 0.9

    result = attention_maps.query_mean(data, "self_mass", n_tokens=[n_tokens] * n_seeds).isel(layer=0)
    stated = result["lower"].notnull()
    close(result["mean"], naive["mean"])
    assert stated.isel(head=1).all(), "where early queries are like the others nothing is withheld"
    assert stated.isel(head=0).mean() < 0.5
    inside = ((result["lower"] <= truth) & (truth <= result["upper"])).where(stated)
    assert inside.mean() > 0.9
    assert (abs(result["mean"] - truth) / result["standard_error"]).max() < 4


def test_query_mean_interval_covers():
    """The mean of a fixed, skewed population of queries lies in at least 90 % of the intervals of 200 samples of it."""
    random = np.random.default_rng(11)
    n_tokens, m, n_heads, n_seeds = 600, 60, 4, 200
    population = random.gamma([0.5, 1, 2, 4], size=(n_tokens, n_heads))
    drawn = [np.sort(np.random.default_rng(seed).choice(n_tokens, m, replace=False)) for seed in range(n_seeds)]
    values = np.concatenate([population[rows] for rows in drawn])[:, None]
    data = planted({"entropy": values}, positions=drawn, layers=[3])
    result = attention_maps.query_mean(data, "entropy", n_tokens=[n_tokens] * n_seeds).isel(layer=0)
    inside = (result["lower"] <= population.mean(axis=0)) & (population.mean(axis=0) <= result["upper"])
    covered = inside.mean("sample").values
    assert (covered >= 0.9).all() and (covered <= 0.99).all(), covered
    spread = result["mean"].std("sample", ddof=1).values
    close(result["standard_error"].mean("sample").values, spread, rtol=0.15)


@pytest.mark.parametrize("n_samples", [5, 10, 30])
@pytest.mark.parametrize(("name", "draw"), [
    ("sink_mass", lambda random, shape: random.beta(0.5, 5, shape)),
    ("self_mass", lambda random, shape: random.beta(8, 1, shape)),
    ("entropy", lambda random, shape: random.lognormal(0, 0.7, shape)),
])  # fmt: skip
def test_head_mean_interval_covers(n_samples, name, draw):
    """Of 2000 sets of texts with skewed means at least 90 % of the intervals that are given hold the truth."""
    random = np.random.default_rng(5)
    n_sets = 2000
    truth = draw(random, 1_000_000).mean()
    values = draw(random, (n_samples, 1, n_sets))
    result = attention_maps.head_mean(planted({name: values}, positions=[[0]] * n_samples, layers=[3]), name)
    given = ~np.isnan(result["lower"].values)
    covered = ((result["lower"] <= truth) & (truth <= result["upper"])).values[given].mean()
    assert given.mean() > 0.35
    assert covered >= 0.9, (covered, given.mean())


# Properties


@every_statistic
def test_relabelled_heads_move_and_do_not_change(function):
    recording, order = random_recording(seed=1, queries=5), [2, 0, 1]
    moved = recording.copy()
    for name in ("attention", "attention_profiles"):
        data = (
            recording[name]
            .to_dataset()
            .isel(head=order)
            .assign_coords(head=("head", [0, 1, 2], {"long_name": "", "units": "1"}))
        )
        moved = with_group(moved, name, data)
    before, after = function(recording), function(moved)
    if function.__name__ == "head_similarity":
        places = [layer * 3 + head for layer in range(4) for head in order]
        close(after.values, before.values[np.ix_(places, places)])
        return
    for name, variable in variables_of(before).items():
        expected = variable.isel(head=order) if "head" in variable.dims else variable
        close(variables_of(after)[name].values, expected.values)


@every_statistic
def test_order_of_rows_does_not_matter(function):
    recording = random_recording(seed=2)
    data = attention_of(recording)
    shuffled = data.isel(query=np.random.default_rng(0).permutation(data.sizes["query"]))
    for name, variable in variables_of(function(with_group(recording, "attention", shuffled))).items():
        close(variable.values, variables_of(function(recording))[name].values, rtol=1e-12)


@every_statistic
def test_result_does_not_depend_on_blocks_or_store(function, monkeypatch):
    recording = random_recording(seed=2)
    expected = variables_of(function(recording))
    monkeypatch.setattr(queries, "ROWS_OF_BLOCK", 5)
    lazy = recording.map_over_datasets(
        lambda data: data.chunk({dim: 3 for dim in data.dims if dim in ("query", "layer")})
    )
    for name, variable in variables_of(function(lazy)).items():
        close(variable.values, expected[name].values, rtol=1e-12)


@every_statistic
def test_variables_say_what_they_are(function):
    result = function(random_recording())
    for variable in (*variables_of(result).values(), *result.coords.values()):
        assert variable.attrs["long_name"] and variable.attrs["units"], variable.name
    if isinstance(result, xr.Dataset):
        assert not {"long_name", "units"} & set(result.attrs)


@every_statistic
def test_layers_keep_their_numbers_and_kind(function):
    recording = random_recording(layers=(2, 3, 7))
    result = function(recording)
    if "layer" in result.coords:
        layers = dict(zip(result["layer"].values.tolist(), schema.labels(result["attention_kind"]), strict=True))
        assert layers == {2: "rope", 3: "nope", 7: "nope"}
    else:
        assert result["attention_kind"].values.tolist() == ["rope", "nope"]


@every_statistic
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [0, 1], [1, 1, 1, 1, 1, 1], [3]])
def test_hardly_any_tokens(function, lengths):
    recording = random_recording(lengths=lengths)
    for variable in variables_of(function(recording)).values():
        if max(lengths, default=0) == 0 and variable.dtype == float:
            assert np.isnan(variable).all()


def test_one_token_texts():
    """A single token gives all its mass to itself; it has no token before it."""
    result = attention_maps.by_kind(random_recording(lengths=[1] * 6)).sel(attention_kind="nope")
    expected = {"entropy": 0, "sink_mass": 1, "self_mass": 1, "previous_mass": np.nan, "chunk_mass": 1, "far_mass": 0}
    for name, value in expected.items():
        own = result.sel(statistic=name)
        close([own["mean"], own["lower"], own["upper"]], [value] * 3)
        close(own["difference"], 0 if value == value else np.nan)


@every_statistic
def test_one_sample_gives_no_interval(function):
    result = function(random_recording(lengths=[12]))
    if function.__name__ != "query_mean":
        for name, variable in variables_of(result).items():
            if name.endswith(("lower", "upper")):
                assert np.isnan(variable).all(), name


@pytest.mark.parametrize(("layers", "there", "absent"), [((0, 1, 2), "rope", "nope"), ((3, 7), "nope", "rope")])
def test_only_one_kind_of_layer(layers, there, absent):
    recording = random_recording(layers=layers)
    by_kind = attention_maps.by_kind(recording)
    assert np.isnan(by_kind["difference"]).all() and np.isnan(by_kind["difference_lower"]).all()
    results = [
        by_kind[["mean", "lower"]],
        attention_maps.distance_profile(recording, by_kind=True)[["distance_mass"]],
        attention_maps.position_profile(recording, "entropy", n_bins=3)[["mean"]],
        attention_maps.chunk_reach(recording)[["reach", "entropy"]],
    ]
    for result in results:
        for variable in result.data_vars.values():
            assert np.isnan(variable.sel(attention_kind=absent)).all(), variable.name
            assert not np.isnan(variable.sel(attention_kind=there)).all(), variable.name


def test_far_mass_of_rope_is_exactly_nothing():
    result = attention_maps.by_kind(random_recording()).sel(statistic="far_mass", attention_kind="rope")
    assert (result["mean"], result["lower"], result["upper"]) == (0, 0, 0)


def test_recorded_layer_at_a_time(monkeypatch):
    """Never more than one layer of a variable is asked for at once."""
    data = attention_of(random_recording()).chunk({"layer": 1})
    sizes = []
    inside = xr.DataArray.values.fget

    def watched(self):
        if "query" in self.dims and self.ndim > 1:
            sizes.append(self.sizes.get("layer", 1))
        return inside(self)

    monkeypatch.setattr(xr.DataArray, "values", property(watched))
    attention_maps.by_kind(data)
    assert len(sizes) == len(PER_HEAD) * len(LAYERS) and set(sizes) == {1}


# Errors


@every_statistic
def test_signature(function):
    first, *others = inspect.signature(getattr(attention_maps, function.__name__)).parameters.values()
    assert first.name == ("profiles" if function.__name__ in OF_PROFILES else "attention")
    assert len(others) <= 5
    for parameter in others:
        assert parameter.kind is parameter.KEYWORD_ONLY or parameter.name == "statistic"


@every_statistic
def test_missing_group_says_how_to_record_it(function):
    recording = random_recording()
    del recording["attention"], recording["attention_profiles"]
    with pytest.raises(SchemaError, match=r"no /attention(_profiles)? group.*AttentionSpec"):
        function(recording)
    with pytest.raises(SchemaError, match="expected a recording"):
        function([1, 2])


@pytest.mark.parametrize(("name", "lost", "how"), [
    ("head_mean", "entropy", r"statistics=\['entropy'"),
    ("query_mean", "entropy", r"statistics=\['entropy'"),
    ("position_profile", "entropy", r"statistics=\['entropy'"),
    ("sinks", "sink_mass", r"statistics=\['sink_mass'"),
    ("segment_mass", "segment_mass", r"segments=\{'needle'"),
    ("needle_score", "top_key", r"statistics=\['top_key'"),
    ("needle_score", "segment_mass", r"segments=\{'needle'"),
    ("needle_score", "key_rank", r"segments=\{'needle'"),
    ("induction_score", "offset_mass", r"offsets=\["),
    ("distance_profile", "distance_mass", r"statistics=\['distance_mass'"),
    ("head_similarity", "map_sum", r"statistics=\['map_sum'"),
])  # fmt: skip
def test_missing_variable_is_named_with_how_to_record_it(name, lost, how):
    recording = random_recording()
    group = "attention_profiles" if name in OF_PROFILES else "attention"
    recording = with_group(recording, group, recording[group].to_dataset().drop_vars(lost))
    function = next(function for function in STATISTICS if function.__name__ == name)
    with pytest.raises(SchemaError, match=rf"'{lost}' was not recorded: record\(…, attention=AttentionSpec\({how}"):
        function(recording)


def test_by_kind_without_any_statistic():
    data = attention_of(random_recording()).drop_vars(PER_HEAD)
    with pytest.raises(SchemaError, match="no statistic of a query, layer and head"):
        attention_maps.by_kind(data)


def test_offset_and_segment_that_were_not_recorded():
    recording = random_recording()
    with pytest.raises(SchemaError, match=r"offset 9 was not recorded.*offsets=\[9\].*recorded are 2, 3"):
        attention_maps.induction_score(recording, period=10)
    data = attention_of(recording).assign_coords(segment=["hay", "end"])
    with pytest.raises(SchemaError, match="no segment named 'needle'.*recorded are hay, end"):
        attention_maps.needle_score(data, needle=(0, 1), answer=(0, 1))


@pytest.mark.parametrize("call", [
    lambda data: attention_maps.head_mean(data, "entrophy"),
    lambda data: attention_maps.head_mean(data, "next_token_loss"),
    lambda data: attention_maps.head_mean(data, "entropy", level=95),
    lambda data: attention_maps.query_mean(data, "entropy", level=0, n_tokens=[9] * 8),
    lambda data: attention_maps.by_kind(data, level=1),
    lambda data: attention_maps.sinks(data, threshold=30),
    lambda data: attention_maps.position_profile(data, "entropy", n_bins=0),
    lambda data: attention_maps.position_profile(data, "entropy", n_bins=2.5),
    lambda data: attention_maps.chunk_reach(data, n_bins=0),
    lambda data: attention_maps.induction_score(data, period=1),
    lambda data: attention_maps.induction_score(data, period=3.0),
    lambda data: attention_maps.head_similarity(random_recording(), of="entropy"),
    lambda data: attention_maps.needle_score(data, needle=(1, 1), answer=(3, 4)),
    lambda data: attention_maps.needle_score(data, needle=(-1, 1), answer=(3, 4)),
    lambda data: attention_maps.needle_score(data, needle=(1, 3), answer=[(3, 4)] * 7),
    lambda data: attention_maps.needle_score(data, needle=(1, 3), answer=[(3, 4), 5]),
    lambda data: attention_maps.needle_score(data, needle=(1.5, 3.0), answer=(3, 4)),
    lambda data: attention_maps.needle_score(data, needle="1:3", answer=(3, 4)),
    lambda data: attention_maps.query_mean(data, "entropy", n_tokens=[3] * 8),
    lambda data: attention_maps.query_mean(data, "entropy", n_tokens=[9]),
    lambda data: attention_maps.query_mean(data, "entropy", n_tokens=9),
])  # fmt: skip
def test_wrong_arguments(call):
    with pytest.raises(ProbeError) as caught:
        call(attention_of(random_recording()))
    assert not isinstance(caught.value, SchemaError)


@pytest.mark.parametrize("call", [
    lambda data: attention_maps.head_mean(data.isel(layer=0), "entropy"),
    lambda data: attention_maps.head_mean(data.isel(head=0), "entropy"),
    lambda data: attention_maps.head_mean(data, "entropy", by="weather"),
    lambda data: attention_maps.head_mean(data, "entropy", by="layer"),
    lambda data: attention_maps.query_mean(data, "entropy"),
    lambda data: attention_maps.chunk_reach(data.drop_attrs()),
    lambda data: attention_maps.induction_score(data.sel(offset=2), period=3),
    lambda data: attention_maps.head_mean(data.drop_vars("sample"), "entropy"),
])  # fmt: skip
def test_dataset_that_lacks_something(call):
    with pytest.raises(SchemaError):
        call(attention_of(random_recording()))


def test_copying_queries_need_a_next_token():
    recording = random_recording(lengths=[6])
    with pytest.raises(ProbeError, match="no token at position 6 of sample 0.*one before the token"):
        attention_maps.needle_score(recording, needle=(1, 3), answer=(4, 6))
    sampled = random_recording(seed=1, lengths=[9], queries=2)
    query = int(sampled["attention"]["position"].values[0])
    with pytest.raises(SchemaError, match="not in /attention: pass the whole recording"):
        attention_maps.needle_score(attention_of(sampled), needle=(1, 3), answer=(query, query + 1))
    assert not np.isnan(attention_maps.needle_score(sampled, needle=(1, 3), answer=(query, query + 1))["score"]).any()


def test_loads_neither_torch_nor_plotly_nor_the_statistics_of_routing():
    code = "import probe.attention_maps, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "probe.attention.heads" in loaded
    assert not loaded & {"torch", "plotly", "transformers", "probe.routing_stats", "probe.routing", "probe.hooks"}
    code = "import probe.routing_stats, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {name for name in done.stdout.split() if name.startswith("probe.attention")}
