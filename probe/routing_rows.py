"""The rows of ``/routing`` in groups: what every routing statistic reads from, counts with and labels its result by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from probe import schema
from probe.counting import count
from probe.schema import SchemaError

Routing = xr.Dataset | xr.DataTree
By = str | Sequence[str] | None


@dataclass(frozen=True)
class Rows:
    """The rows of ``/routing``, each in one group; build it with :func:`grouped`."""

    routing: xr.Dataset
    group: np.ndarray
    """(token,) number of the token's group."""
    group_coords: Mapping[str, xr.Variable]
    """Labels of the groups, one dim for each name in ``by``; the groups are numbered in row-major order."""

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

    @cached_property
    def chosen(self) -> np.ndarray:
        """Chosen experts (token, layer, slot), strongest first."""
        return self.values("expert_index")

    @cached_property
    def sample(self) -> np.ndarray:
        """Sample of each token, (token,)."""
        return self.values("sample")

    def values(self, name: str) -> np.ndarray:
        """A variable as a numpy array with the dims of the schema, or a SchemaError where it is missing."""
        schema.require(self.routing, name)
        return self.routing[name].transpose(*schema.ROUTING[name].dims).values

    def each_group(self) -> Iterator[tuple[int, np.ndarray]]:
        """Every group's number and the rows of its tokens."""
        return members(self.group, self.n_groups)

    def group_counts(self) -> np.ndarray:
        """Assignments (group, layer, expert)."""
        return count(self.chosen, self.group, n_codes=self.n_groups, n_values=self.n_experts)

    def document_counts(self, tokens: np.ndarray) -> np.ndarray:
        """Assignments (document, layer, expert) of the given rows; a document is a sample with a row among them."""
        documents, code = np.unique(self.sample[tokens], return_inverse=True)
        return count(self.chosen[tokens], code, n_codes=len(documents), n_values=self.n_experts)

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
        return xr.DataArray(
            values.reshape((*self._group_shape, *values.shape[1:])),
            dims=(*self.group_coords, *dims),
            coords={**coords_on(self.routing, dims), **self.group_coords, **(coords or {})},
            attrs={"long_name": long_name, "units": units},
        )


def grouped(routing: Routing, by: By = None) -> Rows:
    """The rows of a recording's ``/routing``, split by coords on ``token``.

    Parameters
    ----------
    routing : ``/routing`` or a recording that holds it.
    by : a coord on ``token``, or several. Groups are all categories of a coded coord, the values that occur of another.

    Raises
    ------
    SchemaError
        If the group, a dim or a coord is missing; names it.
    """
    data = schema.group(routing, "routing")
    schema.require(data, "expert_index", "layer", "expert")
    if lost := [dim for dim in ("token", "layer", "slot", "expert") if dim not in data.dims]:
        raise SchemaError(f"/routing has lost the dim {lost[0]!r}: select with a list, such as sel({lost[0]}=[3])")
    names = () if by is None else (by,) if isinstance(by, str) else tuple(by)
    if len(set(names)) < len(names):
        raise SchemaError(f"by={by!r} names a coord twice")
    group = np.zeros(data.sizes["token"], np.int64)
    coords = {}
    for name in names:
        code, coords[name] = _grouping(data, name)
        group = group * coords[name].size + code
    return Rows(data, group, coords)


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


def _grouping(routing: xr.Dataset, name: str) -> tuple[np.ndarray, xr.Variable]:
    on_token = [str(key) for key, coord in routing.coords.items() if coord.dims == ("token",)]
    if name not in on_token:
        raise SchemaError(f"cannot split by {name!r}: the coords on token are {', '.join(on_token)}")
    coord = routing[name]
    present, code = np.unique(coord.values, return_inverse=True)
    labels = schema.labels(xr.DataArray(present, name=name, attrs=coord.attrs))  # refuses a code without a category
    if "categories" in coord.attrs:
        labels, code = np.asarray(coord.attrs["categories"], dtype=object), coord.values
    attributes = {"long_name": coord.attrs.get("long_name", name), "units": coord.attrs.get("units", "1")}
    return code.astype(np.int64), xr.Variable(name, labels, attributes)
