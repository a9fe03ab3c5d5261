"""Stores lose nothing, and say what is wrong with one that is not ours, or not whole."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import xarray as xr
import zarr

import probe
from probe import AttentionSpec, schema
from probe.hooks import RoutingSpec
from probe.store import StoreError
from tests.planted import from_logits
from tests.random_models import random_ids, random_model


@pytest.fixture
def trace():
    everything = RoutingSpec(all_logits=True, next_token_loss=True, expert_outputs=True)
    attention = AttentionSpec(
        (*AttentionSpec("all").statistics, "pattern"), segments={"<s>": (0, 3)}, offsets=[1], queries=5
    )
    return probe.record(
        random_model(),
        random_ids(9, 0, 4),
        domains=["a b", "<c>", "ü"],
        routing=everything,
        attention=attention,
        progress=False,
    )


def test_a_recording_comes_back_as_it_was(trace, tmp_path):
    path = probe.save(trace, tmp_path / "run.zarr")
    reopened = probe.open(path)
    assert reopened.load().identical(trace)
    assert zarr.open_group(path).metadata.zarr_format == 3


def test_any_byte_survives(tmp_path):
    pieces = {i: bytes([i, 0]) for i in range(256)}
    trace = from_logits(np.zeros((256, 1, 2)), lengths=[256], token_id=np.arange(256), pieces=pieces)
    reopened = probe.open(probe.save(trace, tmp_path / "run.zarr"))
    assert schema.pieces(reopened["vocabulary"].to_dataset()) == pieces


def test_every_variable_has_a_name_and_a_unit(trace):
    for group in trace.children:
        for variable in trace[group].to_dataset().variables.values():
            assert variable.attrs["long_name"]
            assert variable.attrs["units"]


def test_saving_again_replaces_the_old_store(trace, tmp_path):
    path = probe.save(trace, tmp_path / "run.zarr")
    shorter = probe.record(random_model(), random_ids(2), progress=False)
    probe.save(shorter, path)
    assert probe.open(path).load().identical(shorter)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.zarr"]


def test_what_is_not_a_store_is_not_overwritten(trace, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("irreplaceable")
    with pytest.raises(StoreError, match="is not a recording"):
        probe.save(trace, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "irreplaceable"


def test_a_group_inside_a_store_and_a_folder_that_looks_unfinished_are_left_alone(trace, tmp_path):
    path = probe.save(trace, tmp_path / "run.zarr")
    with pytest.raises(StoreError, match="is not a recording"):
        probe.save(trace, path / "routing")
    (tmp_path / "run.zarr.unfinished").mkdir()
    (tmp_path / "run.zarr.unfinished" / "note.txt").write_text("mine")
    probe.save(probe.open(path), path)
    assert (tmp_path / "run.zarr.unfinished" / "note.txt").read_text() == "mine"
    assert probe.open(path).load().identical(trace)


def test_saving_through_a_link_replaces_what_it_points_to(trace, tmp_path):
    path = probe.save(trace, tmp_path / "run.zarr")
    (tmp_path / "latest").symlink_to(path)
    shorter = probe.record(random_model(), random_ids(2), progress=False)
    probe.save(shorter, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert probe.open(path).load().identical(shorter)


@pytest.mark.parametrize(
    "array", ["routing/expert_index", "routing/router_margin", "experts/output_max", "samples/name"]
)
def test_a_missing_chunk_is_noticed(trace, tmp_path, array):
    path = probe.save(trace, tmp_path / "run.zarr")
    shutil.rmtree(path / array / "c")
    with pytest.raises(StoreError, match=f"chunks are missing from /{array}"):
        probe.open(path)


def test_a_chunk_cut_short_is_noticed(trace, tmp_path):
    path = probe.save(trace, tmp_path / "run.zarr")
    chunk = next(file for file in (path / "routing" / "expert_index" / "c").rglob("*") if file.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-5])
    with pytest.raises(StoreError):
        probe.open(path)


def test_no_store_and_no_zarr_say_so(tmp_path):
    with pytest.raises(StoreError, match="no store at"):
        probe.open(tmp_path / "nothing")
    (tmp_path / "text").mkdir()
    with pytest.raises(StoreError, match="is not a Zarr store"):
        probe.open(tmp_path / "text")


def test_a_foreign_store_is_named_fault_by_fault(tmp_path):
    xr.Dataset({"x": ("y", [1, 2])}).to_zarr(tmp_path / "foreign.zarr", zarr_format=3, consolidated=False)
    with pytest.raises(probe.SchemaError) as error:
        probe.open(tmp_path / "foreign.zarr")
    for fault in ("group /routing is missing", "group /samples is missing", "'schema_version' is missing"):
        assert fault in str(error.value)


def drop(name):
    return lambda trace: trace.assign({"routing": xr.DataTree(trace["routing"].to_dataset().drop_vars(name))})


def restamp(trace):
    copy = trace.copy()
    copy.attrs["schema_version"] = 99
    return copy


def change(group, **variables):
    def apply(trace):
        return trace.assign({group: xr.DataTree(trace[group].to_dataset().assign(variables))})

    return apply


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (drop("router_margin"), "/routing/router_margin is missing"),
        (drop("position"), "/routing/position is missing"),
        (restamp, "schema_version is 99"),
        (change("vocabulary", token_id=("entry", np.zeros(0))), "entry"),
        (change("routing", router_margin=(("token", "layer"), np.zeros((13, 6)))), "dtype float64, expected float16"),
        (
            change("routing", logit_logsumexp=(("layer", "token"), np.zeros((6, 13), "f4"))),
            "has dims \\(layer, token\\)",
        ),
        (change("routing", expert_index=(("token", "layer", "slot"), np.full((13, 6, 1), 9, "u1"))), "beyond the 6"),
        (change("samples", n_tokens=("sample", np.array([9, 0, 5], "u4"))), "counts 14 tokens but /routing holds 13"),
        (change("samples", row_offset=("sample", np.array([0, 1, 2], "u8"))), "row_offset"),
        (change("samples", expert_count=(("sample", "layer", "expert"), np.zeros((3, 6, 6), "u4"))), "expert_count"),
        (
            change("experts", saliency_sum=(("sample", "layer", "expert"), np.ones((3, 6, 6), "f4"))),
            "saliency_sum is not",
        ),
        (
            change("experts", output_norm_sum=(("sample", "layer", "expert"), np.ones((3, 6, 6), "f4"))),
            "norm_sum is not",
        ),
        (
            change("experts", output_max=(("sample", "layer", "expert"), np.zeros((3, 6, 6), "f4"))),
            "is not NaN exactly",
        ),
        (
            change("experts", output_max=(("sample", "layer", "expert"), np.full((3, 6, 6), np.nan, "f4"))),
            "not NaN exactly",
        ),
        (change("experts", layer=("layer", [1, 2, 3, 4, 5, 6])), "/experts and /samples name different layers"),
        (change("experts", sample=("sample", [2, 1, 0])), "/experts and /samples name different samples"),
        (
            lambda trace: trace.assign({"experts": xr.DataTree(trace["experts"].to_dataset().drop_vars("output_max"))}),
            "/experts/output_max is missing",
        ),
    ],
)
def test_validate_names_what_is_wrong(trace, break_it, message):
    with pytest.raises((probe.SchemaError, ValueError), match=message):
        schema.validate(break_it(trace))


def test_a_recording_without_expert_outputs_is_whole_and_says_how_to_record_them(trace, tmp_path):
    without = trace.drop_nodes("experts")
    schema.validate(without)
    reopened = probe.open(probe.save(without, tmp_path / "run.zarr"))
    assert reopened.load().identical(without)
    with pytest.raises(probe.SchemaError, match=r"no /experts group.*RoutingSpec\(expert_outputs=True\)"):
        schema.group(reopened, "experts")
    xr.testing.assert_identical(schema.group(trace, "experts"), trace["experts"].to_dataset())


def test_outputs_that_are_not_numbers_are_told_from_experts_without_a_token(trace):
    experts = trace["experts"].to_dataset().copy(deep=True)
    sample, layer, expert = np.argwhere(trace["samples"]["expert_count"].values)[0]
    for name in ("saliency_sum", "output_norm_sum", "output_max"):
        experts[name][sample, layer, expert] = np.nan
    schema.validate(trace.assign({"experts": xr.DataTree(experts)}))


def test_a_truncated_store_is_told_from_a_whole_one(trace, tmp_path):
    path = probe.save(trace, tmp_path / "run.zarr")
    group = zarr.open_group(path / "routing")
    for name in ("sample", "expert_index"):
        group[name].resize((10, *group[name].shape[1:]))
    with pytest.raises(probe.ProbeError):
        probe.open(path)
