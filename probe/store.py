"""Recordings on disk: Zarr v3, one group for each group of the DataTree, lossless."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import xarray as xr
import zarr

from probe import schema
from probe.schema import ProbeError

STORES = ("routing.zarr", "fp8.zarr")
"""Names of the store in a report's folder: of a recording, and of an FP8 study by itself."""


class StoreError(ProbeError):
    """A store cannot be written or read."""


def save(recording: xr.DataTree, path: str | Path) -> Path:
    """Write a recording as a Zarr v3 store; a recording that is there already is replaced once the new one is whole.

    Raises
    ------
    SchemaError
        If ``recording`` is not a whole recording.
    StoreError
        If ``path`` holds something that is not a recording.
    """
    path = Path(path)
    schema.validate(recording)
    place = path.resolve()  # a link stays a link
    check_place(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    recording, encoding = _chunked(recording)
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.", suffix=".unfinished", dir=place.parent) as unfinished:
        new, old = Path(unfinished, "new"), Path(unfinished, "old")
        # Empty chunks are written too: one that is missing then means that the store is damaged.
        recording.to_zarr(new, mode="w", zarr_format=3, consolidated=False, write_empty_chunks=True, encoding=encoding)
        if place.exists():
            place.rename(old)
        new.rename(place)
    return path


def open(path: str | Path) -> xr.DataTree:  # noqa: A001 - the public name is probe.open
    """Open a store written by :func:`save`.

    Arrays are read when they are used: load the recording (``.load()``) before another one is saved over its path.

    Raises
    ------
    StoreError
        If ``path`` is not a Zarr store, or if chunks of it are missing or damaged.
    SchemaError
        If the store is not a whole recording: foreign, truncated, or of another schema version.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"no store at {path}")
    try:
        if inside := [name for name in STORES if (path / name).exists()]:
            raise StoreError(f"{path} is a report's folder: open its store, {path / inside[0]}")
        recording = xr.open_datatree(path, engine="zarr", consolidated=False, chunks={})
        _refuse_damage(path, recording)
        recording = recording.map_over_datasets(_with_labels)
        schema.validate(recording)
    except (OSError, ValueError, KeyError, RuntimeError, zarr.errors.BaseZarrError) as error:
        raise StoreError(f"{path} is not a Zarr store that probe can read: {error}") from error
    return recording


def check_place(path: Path) -> None:
    """Raise a StoreError if :func:`save` would not write there, because something else is at ``path``."""
    place = path.resolve()
    if place.exists() and not _is_recording(place):
        raise StoreError(f"{path} exists and is not a recording: choose another path, or move it away")


Chunks = dict[str, dict[str, tuple[int, ...]]]
"""Shape of the chunks of each variable, as ``to_zarr`` wants it: {variable: {"chunks": shape}}."""

ROW_DIMS = {"routing": "token", "attention": "query", "fp8_flips": "token"}
"""The dim along which a group has a row for each token."""


def _chunked(recording: xr.DataTree) -> tuple[xr.DataTree, dict[str, Chunks]]:
    """The recording, and how variables with a row for each token are cut: one layer a chunk, in the blocks read."""
    recording, encoding = recording.copy(), {}
    for name, rows in ROW_DIMS.items():
        if name in recording.children:
            group, encoding[f"/{name}"] = _chunked_group(recording[name].to_dataset(), rows)
            recording[name] = xr.DataTree(group)
    return recording, encoding


def _chunked_group(group: xr.Dataset, rows: str) -> tuple[xr.Dataset, Chunks]:
    of_dim = {rows: schema.ROWS_AT_ONCE, "layer": 1}
    encoding = {
        str(name): {"chunks": tuple(max(min(of_dim.get(str(dim), n), n), 1) for dim, n in variable.sizes.items())}
        for name, variable in group.variables.items()
        if rows in variable.dims
    }
    if any(group[name].chunks for name in encoding):
        # What was read from a store may be cut in another way.
        names = {dim: of_dim.get(str(dim), -1) for dim in group.dims}
        anew = {name: group[name].variable.chunk({d: names[d] for d in group[name].dims}) for name in encoding}
        group = group.assign({name: anew[name] for name in anew if name in group.data_vars}).assign_coords(
            {name: anew[name] for name in anew if name in group.coords}
        )
    return group, encoding


def _with_labels(group: xr.Dataset) -> xr.Dataset:
    """The group with the coords that label its dims in memory, all but those with a row for each token."""
    of_rows = set(ROW_DIMS.values())
    return group.assign_coords(
        {name: coord.compute() for name, coord in group.coords.items() if not of_rows & set(coord.dims)}
    )


def _is_recording(path: Path) -> bool:
    """Whether the root of a recording lies here."""
    metadata = path / "zarr.json"
    if not metadata.is_file():
        return False
    try:
        return "schema_version" in json.loads(metadata.read_text("utf-8")).get("attributes", {})
    except ValueError:
        return False


def _refuse_damage(path: Path, recording: xr.DataTree) -> None:
    """Raise a StoreError that names the arrays of a recording of which not every chunk is there."""
    if schema.missing_groups(recording):
        return  # no recording of ours, which may leave out empty chunks: what it lacks says the schema
    root = zarr.open_group(path, mode="r")
    arrays = {name: node for name, node in root.members(max_depth=None) if isinstance(node, zarr.Array)}
    if damaged := sorted(f"/{name}" for name, array in arrays.items() if array.nchunks_initialized < array.nchunks):
        raise StoreError(f"{path} is damaged: chunks are missing from {', '.join(damaged)}")
