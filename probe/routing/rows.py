"""The rows of ``/routing`` in groups: what every routing statistic reads from, counts with and labels its result by.

Rows are read a stretch at a time, so that a store need not fit into memory, and handed out in blocks that fit into a
core's cache. Both are the same whether a recording is in memory or in a store, and so are the results, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xarray as xr
from dask.base import compute

from probe import schema
from probe.counting import add_counts
from probe.schema import ROWS_AT_ONCE, ProbeError, SchemaError

By = str | Sequence[str] | None

CELLS_OF_BLOCK = 1 << 19
"""Assignments in a block."""

MAX_GROUPS = 1 << 20
"""Several coords may make at most so many groups."""

BYTES_KEPT = 1 << 29
"""A variable of at most so many bytes is read once for all, by what goes over it several times."""

CELLS_OF_DOCUMENTS = 1 << 25
"""Cells of the table of documents that is in memory at once; more groups than fit are counted in several passes."""


class GroupDocuments(NamedTuple):
    """What the documents of one group tally."""

    group: int
    sample: np.ndarray
    """(document,) index of the sample; a document is a sample with something to tally in the group."""
    counts: np.ndarray
    """int64 (document, layer, value)."""


@dataclass(frozen=True)
class Rows:
    """The rows of ``/routing``, each in one group, or a block of them; build it with :func:`grouped`."""

    routing: xr.Dataset
    group: np.ndarray
    """(token,) number of the token's group, of the smallest dtype."""
    group_coords: Mapping[str, xr.Variable]
    """Labels of the groups, one dim for each name in ``by``; the groups are numbered in row-major order."""
    start: int = 0
    """Where in ``/routing`` the first of these rows stands."""
    n_ahead: int = 0
    """How many of these rows, at the end, belong to the next block."""
    ungrouped: Rows | None = None
    """The same rows in one group, where they are in several."""
    stretch: _Stretch | None = None
    """What was read of ``/routing`` around these rows; None for all rows, which are not read."""

    def kept(self, name: str) -> Rows:
        """The same rows with a variable in memory, for what goes over it more than once; as they are if it is large."""
        schema.require(self.routing, name)
        variable = self.routing[name]
        if variable.chunks is None or variable.nbytes > BYTES_KEPT:
            return self
        dims = schema.ROUTING[name].dims
        # Layer by layer, as a store keeps them
        whole = np.empty([variable.sizes[dim] for dim in ("layer", "token", *dims[2:])], variable.dtype).swapaxes(0, 1)
        for block in self.blocks(name, at_once=ROWS_AT_ONCE):
            whole[block.start : block.start + block.n_tokens] = block.values(name)
        routing = self.routing.assign({name: (dims, whole, variable.attrs)})
        return replace(self, routing=routing, ungrouped=None)

    @property
    def n_tokens(self) -> int:
        """How many rows there are."""
        return len(self.group)

    @property
    def n_groups(self) -> int:
        """How many groups there are; one where tokens are not split."""
        return int(np.prod(self._group_shape, dtype=int))

    @property
    def n_layers(self) -> int:
        """How many MoE layers were recorded."""
        return self.routing.sizes["layer"]

    @property
    def n_experts(self) -> int:
        """How many experts a layer has."""
        return self.routing.sizes["expert"]

    @property
    def top_k(self) -> int:
        """How many experts a token chooses."""
        return self.routing.sizes["slot"]

    @property
    def _group_shape(self) -> tuple[int, ...]:
        return tuple(coord.size for coord in self.group_coords.values())

    @property
    def _rows_of_block(self) -> int:
        return CELLS_OF_BLOCK // max(self.n_layers * self.top_k, 1)

    def values(self, name: str) -> np.ndarray:
        """A variable of a block, with the dims of the schema, or a SchemaError where it is missing.

        Of all rows it may not fit into memory: ask the blocks of :meth:`blocks`.
        """
        schema.require(self.routing, name)
        stretch = self.stretch or _Stretch(self.routing, self.start)
        return stretch.values(name, slice(self.start - stretch.start, self.start - stretch.start + self.n_tokens))

    @cached_property
    def chosen(self) -> np.ndarray:
        """Chosen experts (token, layer, slot), strongest first; a SchemaError if there is no such expert."""
        chosen = self.values("expert_index")
        if chosen.size and int(chosen.max()) >= self.n_experts:
            raise SchemaError(
                f"/routing/expert_index holds expert {int(chosen.max())} of only {self.n_experts}: were experts "
                "selected? Select them in the result instead"
            )
        return chosen

    @cached_property
    def sample(self) -> np.ndarray:
        """Sample of each token, (token,)."""
        return self.values("sample")

    @property
    def is_followed(self) -> np.ndarray:
        """Whether the next row is the next position of the same sample, for all rows but the last, (row - 1,)."""
        sample, position = self.sample, self.values("position").astype(np.int64)
        return (sample[1:] == sample[:-1]) & (position[1:] == position[:-1] + 1)

    def blocks(self, *names: str, ahead: int = 0, at_once: int | None = None) -> Iterator[Rows]:
        """All rows, one block after another.

        Parameters
        ----------
        names : variables that will be asked for; they are checked before anything is read.
        ahead : how many rows of the next block a block shows at its end, for what looks at neighbours.
        at_once : rows of a block, at most ``ROWS_AT_ONCE``; so many that they fit into a core's cache unless given.
        """
        schema.require(self.routing, *names)
        at_once = min(max(self._rows_of_block if at_once is None else at_once, 1), ROWS_AT_ONCE)
        for first in range(0, self.n_tokens, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, self.n_tokens)
            stretch = _Stretch(self.routing.isel(token=slice(first, last + ahead)), first)
            for start in range(first, last, at_once):
                stop = min(start + at_once, last)
                group = self.group[start : stop + ahead]
                n_ahead = len(group) - (stop - start)
                yield Rows(self.routing, group, self.group_coords, start=start, n_ahead=n_ahead, stretch=stretch)

    def group_counts(self) -> np.ndarray:
        """Assignments (group, layer, expert)."""
        counts = np.zeros((self.n_groups, self.n_layers, self.n_experts), np.int64)
        for block in self.blocks("expert_index"):
            add_counts(counts, block.chosen, block.group if self.n_groups > 1 else None)
        return counts

    def group_tallies(
        self, tally: Callable[[Rows], np.ndarray], *, n_values: int
    ) -> Iterator[tuple[range, np.ndarray]]:
        """What the tokens of the groups tally, for a run of groups at a time: int64 (group, layer, value).

        Parameters
        ----------
        tally : from a block to what its rows count as, integers (row, layer, slot) from 0 to ``n_values - 1``.
        n_values : size of the tally.
        """
        at_once = max(CELLS_OF_DOCUMENTS // max(n_values * self.n_layers, 1), 1)
        for first in range(0, self.n_groups, at_once):
            groups = range(first, min(first + at_once, self.n_groups))
            counts = np.zeros((len(groups), self.n_layers, n_values), np.int64)
            # A block has no fewer rows than there are values: adding a table up must not cost more than counting.
            for block in self.blocks(at_once=max(self._rows_of_block, n_values)):
                index = tally(block)
                if self.n_groups == 1:
                    add_counts(counts, index)
                    continue
                inside = np.flatnonzero((block.group >= groups.start) & (block.group < groups.stop))
                code = block.group[inside].astype(np.int64) - groups.start
                add_counts(counts, index[inside], code)
            yield groups, counts

    def documents(
        self,
        tally: Callable[[Rows], tuple[np.ndarray | slice, np.ndarray]] | None = None,
        *,
        n_values: int | None = None,
        n_layers: int | None = None,
        ahead: int = 0,
        groups: range | None = None,
    ) -> Iterator[GroupDocuments]:
        """What the documents of every group tally, one group after another; a group may have no document.

        Parameters
        ----------
        tally : from a block to the rows that count, (row,) numbers or a slice, and what they count as, integers
            (row, layer, slot) from 0 to ``n_values - 1``. Without it assignments to experts are counted.
        n_values, n_layers : sizes of the tally; the experts and all layers unless given.
        ahead : see :meth:`blocks`.
        groups : only these; all of them unless given.
        """
        if tally is None and not self.group_coords:
            yield self.whole
            return
        yield from self._documents(tally or _assignments, n_values, n_layers, ahead, groups)

    @cached_property
    def whole(self) -> GroupDocuments:
        """Assignments to experts of the documents of all rows, in one group; counted once."""
        if self.ungrouped is not None:
            return self.ungrouped.whole
        rows = grouped(self.routing) if self.group_coords else self
        return next(rows._documents(_assignments, None, None, 0, None))

    def _documents(
        self,
        tally: Callable[[Rows], tuple[np.ndarray | slice, np.ndarray]],
        n_values: int | None,
        n_layers: int | None,
        ahead: int,
        groups: range | None,
    ) -> Iterator[GroupDocuments]:
        n_values = self.n_experts if n_values is None else n_values
        n_layers = self.n_layers if n_layers is None else n_layers
        for some, low, high in self._batches(n_layers * n_values, groups):
            counts = np.zeros((high - low, n_layers, n_values), np.int64)
            for block in self.blocks(ahead=ahead) if high > low else ():
                place, index = tally(block)
                document = self._runs.document_of(block)[place] - low
                if high - low < len(self._runs.group):
                    inside = (document >= 0) & (document < high - low)
                    document, index = document[inside], index[inside]
                add_counts(counts, index, document)
            yield from self._split(some, low, counts)

    def document_sums(
        self, values: Callable[[Rows], np.ndarray], *, n_columns: int
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Sums over the tokens of every document, one group after another.

        Parameters
        ----------
        values : from a block to numbers (row, layer, column), one for every row.
        n_columns : how many columns.

        Yields
        ------
        The group, the tokens of its documents (document,) and their sums, float64 (document, layer, column).
        """
        for some, low, high in self._batches(self.n_layers * n_columns):
            sums = np.zeros((high - low, self.n_layers, n_columns))
            for block in self.blocks() if high > low else ():
                document = self._runs.document_of(block)
                first = np.concatenate([[0], np.flatnonzero(document[1:] != document[:-1]) + 1])
                of_run = np.add.reduceat(values(block), first, axis=0, dtype=np.float64)
                place = document[first] - low
                inside = (place >= 0) & (place < high - low)
                np.add.at(sums, place[inside], of_run[inside])
            edges = self._document_edges
            for group in some:
                own = slice(edges[group] - low, edges[group + 1] - low)
                yield group, self._runs.size[low:high][own], sums[own]

    def _batches(self, cells: int, groups: range | None = None) -> Iterator[tuple[range, int, int]]:
        """Runs of groups with the first and last of their documents, so few that a table of ``cells`` each fits."""
        edges = self._document_edges
        at_once = max(CELLS_OF_DOCUMENTS // max(cells, 1), 1)
        groups = range(self.n_groups) if groups is None else groups
        first = groups.start
        while first < groups.stop:
            last = int(np.searchsorted(edges, edges[first] + at_once, side="right")) - 1
            last = min(max(last, first + 1), groups.stop)
            yield range(first, last), int(edges[first]), int(edges[last])
            first = last

    def _split(self, groups: range, low: int, table: np.ndarray) -> Iterator[GroupDocuments]:
        """The part of each group of a table of documents that starts with number ``low``; empty documents left out."""
        edges = self._document_edges
        for group in groups:
            own = table[edges[group] - low : edges[group + 1] - low]
            filled = own.any(axis=(1, 2))
            yield GroupDocuments(group, self._runs.sample[edges[group] : edges[group + 1]][filled], own[filled])

    def run_starts(self, size: int) -> np.ndarray:
        """Where runs of ``size`` adjacent positions of one document begin that do not overlap, ascending (run,)."""
        document, position = -1, -1
        breaks = [np.zeros(0, np.int64)]
        for block in self.blocks("position"):
            documents = np.append(document, self._runs.document_of(block))
            positions = np.append(position, block.values("position").astype(np.int64))
            jumps = (documents[1:] != documents[:-1]) | (positions[1:] != positions[:-1] + 1)
            breaks.append(np.flatnonzero(jumps) + block.start)
            document, position = documents[-1], positions[-1]
        starts = np.concatenate(breaks)
        n_runs = np.diff(starts, append=self.n_tokens) // size
        within = np.arange(n_runs.sum()) - np.repeat(np.cumsum(n_runs) - n_runs, n_runs)
        return np.repeat(starts, n_runs) + within * size

    @cached_property
    def _document_edges(self) -> np.ndarray:
        """Where in the list of documents each group begins, and the last one ends, (group + 1,)."""
        return np.searchsorted(self._runs.group, np.arange(self.n_groups + 1))

    @cached_property
    def _runs(self) -> _Runs:
        """Where one document's rows end and another's begin."""
        starts, groups, samples = [], [], []
        last = None
        for block in self.blocks("sample"):
            key = np.stack([block.group.astype(np.int64), block.sample.astype(np.int64)])
            changes = np.flatnonzero((key[:, 1:] != key[:, :-1]).any(axis=0)) + 1
            if last is None or (key[:, 0] != last).any():
                changes = np.concatenate([[0], changes])
            last = key[:, -1]
            starts.append(changes + block.start)
            groups.append(key[0, changes])
            samples.append(key[1, changes])
        if not starts:
            return _Runs(*(np.zeros(0, np.int64) for _ in range(5)))
        group, sample = np.concatenate(groups), np.concatenate(samples)
        n_samples = int(sample.max()) + 1
        documents, document = np.unique(group * n_samples + sample, return_inverse=True)
        start = np.concatenate(starts)
        size = np.bincount(document, np.diff(start, append=self.n_tokens)).astype(np.int64)
        return _Runs(start, document, documents // n_samples, documents % n_samples, size)

    def array(
        self,
        values: np.ndarray,
        dims: tuple[str, ...],
        long_name: str,
        units: str = "1",
        *,
        coords: Mapping[str, xr.Variable] | None = None,
    ) -> xr.DataArray:
        """Label ``values`` (group, …): the groups' own dims come first, then ``dims`` with what labels them."""
        if taken := [name for name in self.group_coords if name in (*dims, *(coords or {}))]:
            raise SchemaError(f"cannot split by {taken[0]!r}, a dim of the result: give the coord another name")
        return xr.DataArray(
            values.reshape((*self._group_shape, *values.shape[1:])),
            dims=(*self.group_coords, *dims),
            coords={**coords_on(self.routing, dims), **self.group_coords, **(coords or {})},
            attrs={"long_name": long_name, "units": units},
        )


class _Stretch:
    """Consecutive rows of ``/routing``, each variable read once, when it is first asked for."""

    def __init__(self, routing: xr.Dataset, start: int) -> None:
        self.start = start
        self._routing = routing
        self._read: dict[str, np.ndarray | list[np.ndarray]] = {}

    def values(self, name: str, place: slice) -> np.ndarray:
        """Some rows of a variable."""
        if name not in self._read:
            variable = self._routing[name].transpose(*schema.ROUTING[name].dims)
            if variable.chunks is None or not variable.sizes.get("layer"):
                self._read[name] = variable.values
            else:
                # A store keeps each layer apart: putting all rows of all layers together takes longer than reading.
                layers = [variable.data[:, layer] for layer in range(variable.sizes["layer"])]
                self._read[name] = list(compute(*layers))
        read = self._read[name]
        if isinstance(read, np.ndarray):
            return read[place]
        return np.stack([layer[place] for layer in read]).swapaxes(0, 1)


@dataclass(frozen=True)
class _Runs:
    """Rows of one document that stand together."""

    start: np.ndarray
    """(run,) first row."""
    document: np.ndarray
    """(run,) number of the document."""
    group: np.ndarray
    """(document,) ascending."""
    sample: np.ndarray
    """(document,) ascending within a group."""
    size: np.ndarray
    """(document,) tokens."""

    def document_of(self, rows: Rows) -> np.ndarray:
        """Number of each row's document, (row,)."""
        stop = rows.start + rows.n_tokens
        first = int(np.searchsorted(self.start, rows.start, side="right")) - 1
        last = int(np.searchsorted(self.start, stop, side="left"))
        edges = np.concatenate([[rows.start], self.start[first + 1 : last], [stop]])
        return np.repeat(self.document[first:last], np.diff(edges))


Routing = xr.Dataset | xr.DataTree | Rows
"""What a statistic takes: ``/routing``, a recording that holds it, or rows, so that several statistics share counts."""


def grouped(routing: Routing, by: By = None) -> Rows:
    """The rows of a recording's ``/routing``, split by coords on ``token``.

    Parameters
    ----------
    routing : ``/routing`` or a recording that holds it; or its ungrouped rows, which remember what they counted.
    by : a coord on ``token``, or several. Groups are all categories of a coded coord, the values that occur of another.

    Raises
    ------
    SchemaError
        If the group, a dim or a coord is missing; names it.
    """
    known = None
    if isinstance(routing, Rows):
        known, data = routing, routing.routing
        if by is None:
            return known
    else:
        data = schema.group(routing, "routing")
    schema.require(data, "expert_index", "layer", "expert")
    if lost := [dim for dim in ("token", "layer", "slot") if dim not in data.dims]:
        raise SchemaError(f"/routing has lost the dim {lost[0]!r}: select with a list, such as sel({lost[0]}=[3])")
    if data["expert"].dims != ("expert",) or not np.array_equal(data["expert"], np.arange(data.sizes["expert"])):
        raise SchemaError("experts were selected or re-ordered in /routing. Select them in the result instead")
    if not (by is None or isinstance(by, str) or (isinstance(by, Sequence) and all(isinstance(n, str) for n in by))):
        raise SchemaError(f"by must be the name of a coord on token, such as 'domain', or several, got {by!r:.80}")
    names = () if by is None else (by,) if isinstance(by, str) else tuple(by)
    if len(set(names)) < len(names):
        raise SchemaError(f"by={by!r} names a coord twice")
    group = np.zeros(data.sizes["token"], np.uint8)
    coords: dict[str, xr.Variable] = {}
    for name in names:
        code, coords[name] = _grouping(data, name)
        n_groups = int(np.prod([coord.size for coord in coords.values()], dtype=object))
        if n_groups > MAX_GROUPS and len(coords) > 1:
            raise ProbeError(f"by={names} makes {n_groups:,} groups, more than {MAX_GROUPS:,}: split by fewer coords")
        number = group.astype(np.int64) * coords[name].size + code  # in 64 bits: 256 groups do not fit into 8
        group = number.astype(np.min_scalar_type(max(n_groups - 1, 0)))
    return Rows(data, group, coords, ungrouped=known)


def members(group: np.ndarray, n_groups: int) -> Iterator[tuple[int, np.ndarray]]:
    """Every group's number and the places in ``group`` that hold it, in their order."""
    order = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[order], np.arange(n_groups + 1))
    for index in range(n_groups):
        yield index, order[edges[index] : edges[index + 1]]


def coords_on(routing: xr.Dataset, dims: tuple[str, ...]) -> dict[str, xr.Variable]:
    """The coords that label one of ``dims``, such as ``attention_kind`` beside ``layer``."""
    single = {(dim,) for dim in dims}
    return {str(name): coord.variable.compute() for name, coord in routing.coords.items() if coord.dims in single}


def coded(coord: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a coord that occur, ascending, and each row's place among them, (token,) of the smallest dtype.

    Read block by block.
    """
    places = [slice(start, start + ROWS_AT_ONCE) for start in range(0, coord.size, ROWS_AT_ONCE)]
    present = np.unique(coord[:0].values)
    for place in places:
        present = np.union1d(present, coord[place].values)
    code = np.empty(coord.size, np.min_scalar_type(max(len(present) - 1, 0)))
    for place in places:
        code[place] = np.searchsorted(present, coord[place].values)
    return present, code


def _grouping(routing: xr.Dataset, name: str) -> tuple[np.ndarray, xr.Variable]:
    on_token = [str(key) for key, coord in routing.coords.items() if coord.dims == ("token",)]
    if name not in on_token:
        raise SchemaError(f"cannot split by {name!r}: the coords on token are {', '.join(on_token)}")
    coord = routing[name]
    if "categories" in coord.attrs:
        labels, code = np.asarray(coord.attrs["categories"], dtype=object), coord.values
        if code.size:
            schema.labels(xr.DataArray(code.max(keepdims=True), name=name, attrs=coord.attrs))  # refuses a code beyond
    else:
        labels, code = coded(coord)
    attributes = {"long_name": coord.attrs.get("long_name", name), "units": coord.attrs.get("units", "1")}
    return code, xr.Variable(name, labels, attributes)


def _assignments(block: Rows) -> tuple[slice, np.ndarray]:
    return slice(None), block.chosen
