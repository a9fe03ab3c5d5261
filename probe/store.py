"""Recordings on disk: Zarr v3, one group for each group of the DataTree, lossless."""

from __future__ import annotations

import shutil
from pathlib import Path

import xarray as xr
import zarr

from probe import schema
from probe.schema import ProbeError


class StoreError(ProbeError):
    """A store cannot be written or read."""


def save(recording: xr.DataTree, path: str | Path) -> Path:
    """Write a recording as a Zarr v3 store; a store that is there already is replaced once the new one is whole.

    Raises
    ------
    SchemaError
        If ``recording`` is not a whole recording.
    StoreError
        If ``path`` holds something that is not a Zarr store.
    """
    path = Path(path)
    schema.validate(recording)
    if path.exists() and not (path / "zarr.json").exists():
        raise StoreError(f"{path} exists and is not a Zarr store: choose another path, or move it away")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    recording.to_zarr(unfinished, mode="w", zarr_format=3, consolidated=False)
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    return path


def open(path: str | Path) -> xr.DataTree:  # noqa: A001 - the public name is probe.open
    """Open a store written by :func:`save`; arrays are read when they are used.

    Raises
    ------
    StoreError
        If ``path`` is not a Zarr store.
    SchemaError
        If the store is not a whole recording: foreign, truncated, or of another schema version.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"no store at {path}")
    try:
        recording = xr.open_datatree(path, engine="zarr", consolidated=False, chunks={})
    except (FileNotFoundError, ValueError, KeyError, zarr.errors.BaseZarrError) as error:
        raise StoreError(f"{path} is not a Zarr store that probe can read: {error}") from error
    schema.validate(recording)
    return recording
