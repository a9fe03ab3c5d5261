"""The recorded queries of ``/attention``: what every statistic of them reads, adds up and labels its result by.

A variable is read one layer at a time, so that a store need not fit into memory, and added up in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy.sparse import csr_array

from probe import schema
from probe.bootstrap import divide
from probe.schema import ProbeError, SchemaError

Attention = xr.Dataset | xr.DataTree
"""What a statistic takes: the group's Dataset, or a recording that holds it."""

PER_HEAD = ("query", "layer", "head")

ROWS_OF_BLOCK = 1 << 14
"""Queries that are added up at once; their numbers in float64, of 40 heads, fit into a core's cache."""

_REMEDIES = {
    "segment_mass": "attention=AttentionSpec(segments={'needle': (start, stop)})",
    "key_rank": "attention=AttentionSpec(segments={'needle': (start, stop)})",
    "offset_mass": "attention=AttentionSpec(offsets=[…])",
    "next_token_loss": "attention=True, routing=RoutingSpec(next_token_loss=True)",
}
"""How to record what is not asked for by its name among the statistics."""


def queries_of(attention: Attention) -> xr.Dataset:
    """``/attention`` with all its dims, or a SchemaError that names what it lacks."""
    return _group_of(attention, "attention", PER_HEAD)


def profiles_of(profiles: Attention) -> xr.Dataset:
    """``/attention_profiles`` with all its dims, or a SchemaError that names what it lacks."""
    return _group_of(profiles, "attention_profiles", ("profile", "layer", "head"))


def _group_of(data: Attention, name: str, dims: tuple[str, ...]) -> xr.Dataset:
    data = schema.group(data, name)
    if lost := [dim for dim in dims if dim not in data.dims]:
        raise SchemaError(f"/{name} has lost the dim {lost[0]!r}: select with a list, such as sel({lost[0]}=[3])")
    own = {"attention": ("sample", "position"), "attention_profiles": ("sample_id",)}[name]
    schema.require(data, *own, "layer", "attention_kind", "head")
    return data


def recorded(data: xr.Dataset, name: str) -> xr.DataArray:
    """A variable that is only there where it was asked for, or a SchemaError that says how to record it."""
    if name not in data.data_vars:
        there = ", ".join(map(str, data.data_vars)) or "nothing"
        how = _REMEDIES.get(name, f"attention=AttentionSpec(statistics=[{name!r}, …])")
        raise SchemaError(f"{name!r} was not recorded: record(…, {how}) adds it; recorded are {there}")
    return data[name]


def statistic_of(data: xr.Dataset, name: str) -> xr.DataArray:
    """A variable (query, layer, head, …), or an error that names those that there are."""
    known = [key for key, spec in schema.ATTENTION.items() if spec.dims[:3] == PER_HEAD]
    if name not in known:
        raise ProbeError(f"there is no statistic {name!r} of a query, layer and head: known are {', '.join(known)}")
    variable = recorded(data, name)
    if lost := [dim for dim in PER_HEAD if dim not in variable.dims]:
        raise SchemaError(f"/attention/{name} has lost the dim {lost[0]!r}")
    return variable.transpose(*PER_HEAD, ...)


def attribute(data: xr.Dataset, name: str) -> int:
    """An attribute of the group, or a SchemaError if it was lost."""
    if name not in data.attrs:
        raise SchemaError(
            f"the attribute {name!r} is missing: {', '.join(schema.ATTENTION_ATTRIBUTES)} belong to attention"
        )
    return int(data.attrs[name])


def layers_of(variable: xr.DataArray) -> Iterator[np.ndarray]:
    """The values of one layer after another, each without that dim; only one is in memory at a time."""
    for layer in range(variable.sizes["layer"]):
        yield variable.isel(layer=layer).values


def kind_of_layers(data: xr.Dataset) -> list[int]:
    """For every layer the place of its kind in ``schema.ATTENTION_KINDS``."""
    return [schema.ATTENTION_KINDS.index(str(kind)) for kind in schema.labels(data["attention_kind"])]


@dataclass(frozen=True)
class Cells:
    """The queries of one sample in one group make a cell; build them with :func:`cells_of`."""

    cell: np.ndarray
    """(query,) number of the query's cell, -1 where it is in none."""
    sample: np.ndarray
    """(cell,) index into ``/samples``; ascending within a group."""
    group: np.ndarray
    """(cell,) ascending."""
    n_queries: np.ndarray
    """(cell,)"""
    n_groups: int
    blocks: tuple[tuple[slice, np.ndarray, csr_array], ...]
    """Rows, the cells that have some of them, and the matrix (cell, row) of ones that adds them up."""

    @property
    def n_cells(self) -> int:
        """How many cells there are: none is empty."""
        return len(self.sample)

    def groups(self) -> Iterator[tuple[int, slice]]:
        """Every group's number and where its cells stand; a group may have none."""
        edges = np.searchsorted(self.group, np.arange(self.n_groups + 1))
        for group in range(self.n_groups):
            yield group, slice(edges[group], edges[group + 1])

    def means(self, values: np.ndarray) -> np.ndarray:
        """Mean (cell, …) of values (query, …) over the queries of each cell where they are defined; NaN where none."""
        return divide(*self._sums(values))

    def moments(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean, sample variance (NaN for fewer than two) and number of the defined values of each cell, (cell, …)."""
        sums, n_defined = self._sums(values)
        mean = divide(sums, n_defined)
        squares, _ = self._sums(values, mean)
        return mean, divide(squares, np.where(n_defined > 1, n_defined - 1, 0)), n_defined

    def _sums(self, values: np.ndarray, centre: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sums and numbers of defined values, (cell, …); with ``centre`` (cell, …) of squared differences to it."""
        shape = (self.n_cells, *values.shape[1:])
        sums = np.zeros((self.n_cells, int(np.prod(shape[1:], dtype=int))))
        counts = np.zeros_like(sums)
        for rows, cells, adding in self.blocks:
            block = values[rows].reshape(adding.shape[1], sums.shape[1]).astype(np.float64)
            if centre is not None:
                block = np.square(block - centre.reshape(sums.shape)[self.cell[rows]])
            undefined = np.isnan(block)
            if undefined.any():
                counts[cells] += adding @ (~undefined).astype(np.float64)
                block[undefined] = 0
            else:
                counts[cells] += adding.sum(axis=1)[:, None]
            sums[cells] += adding @ block
        return sums.reshape(shape), counts.reshape(shape)


def cells_of(data: xr.Dataset, *, group: np.ndarray | None = None, n_groups: int = 1) -> Cells:
    """The cells of samples and groups.

    Parameters
    ----------
    data : ``/attention``.
    group : number of each query's group (query,), -1 for queries that are left out; all in one group unless given.
    n_groups : how many groups there are.
    """
    sample = data["sample"].values.astype(np.int64)
    group = np.zeros(len(sample), np.int64) if group is None else group.astype(np.int64)
    n_samples = int(sample.max(initial=0)) + 1
    code = np.where(group < 0, -1, group * n_samples + sample)
    codes, cell = np.unique(code, return_inverse=True)
    n_left_out = int(np.count_nonzero(codes < 0))  # the code -1, if it occurs, comes first
    codes, cell = codes[n_left_out:], cell - n_left_out
    blocks = []
    for start in range(0, len(cell), ROWS_OF_BLOCK):
        rows = slice(start, min(start + ROWS_OF_BLOCK, len(cell)))
        used = np.flatnonzero(cell[rows] >= 0)
        if used.size:
            cells, place = np.unique(cell[rows][used], return_inverse=True)
            shape = (len(cells), rows.stop - rows.start)
            blocks.append((rows, cells, csr_array((np.ones(len(used)), (place, used)), shape=shape)))
    n_queries = np.bincount(cell[cell >= 0], minlength=len(codes))
    return Cells(cell, codes % n_samples, codes // n_samples, n_queries, n_groups, tuple(blocks))


def grouping(data: xr.Dataset, by: str) -> tuple[np.ndarray, xr.Variable]:
    """Number of each query's group, (query,), and the groups' labels: all categories, or else the values that occur.

    Raises
    ------
    SchemaError
        If ``by`` is no coord on ``query``; names those that there are.
    """
    on_query = [str(name) for name, coord in data.coords.items() if coord.dims == ("query",)]
    if by not in on_query:
        raise SchemaError(f"cannot split by {by!r}: the coords on query are {', '.join(on_query)}")
    coord = data[by]
    attributes = {"long_name": coord.attrs.get("long_name", by), "units": coord.attrs.get("units", "1")}
    if "categories" in coord.attrs:
        schema.labels(coord)  # refuses a code beyond
        return coord.values, xr.Variable(by, np.asarray(coord.attrs["categories"], dtype=object), attributes)
    labels, code = np.unique(coord.values, return_inverse=True)
    return code, xr.Variable(by, labels, attributes)


def arrays(
    data: xr.Dataset,
    dims: tuple[str, ...],
    columns: Mapping[str, tuple[np.ndarray, str, str]],
    *,
    coords: Mapping[str, xr.Variable] | None = None,
) -> dict[str, xr.DataArray]:
    """Label results.

    Parameters
    ----------
    data : the group that they come from; its coords on ``dims`` label them.
    dims : of all of them.
    columns : by name the values, the long name and the units.
    coords : what labels dims that ``data`` does not have, or has in another way.
    """
    coords = coords or {}
    on_dims = {
        str(name): coord.variable.compute()
        for name, coord in data.coords.items()
        if coord.dims and set(coord.dims) <= set(dims) - set(coords)
    }
    return {
        name: xr.DataArray(
            values,
            dims=dims,
            coords={**on_dims, **coords},
            name=name,
            attrs={"long_name": words, "units": units},
        )
        for name, (values, words, units) in columns.items()
    }
