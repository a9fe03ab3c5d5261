"""NoPE layers against RoPE layers, as a whole and by position; part of ``probe.attention_maps``."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe import schema
from probe.attention.heads import interval_dataset
from probe.attention.intervals import MeanInterval, sample_mean
from probe.attention.queries import (
    PER_HEAD,
    Attention,
    Cells,
    arrays,
    attribute,
    cells_of,
    kind_of_layers,
    layers_of,
    queries_of,
    statistic_of,
)
from probe.bootstrap import Bootstrap, divide
from probe.schema import ATTENTION_KINDS, ProbeError, SchemaError


def by_kind(attention: Attention, *, level: float = 0.95) -> xr.Dataset:
    """Every recorded statistic of NoPE layers beside that of RoPE layers.

    Parameters
    ----------
    attention : Dataset with any statistics (query, layer, head), or a recording that holds it.
    level : coverage of the intervals.

    Returns
    -------
    Dataset. (statistic, attention_kind): ``mean``, ``lower``, ``upper`` and ``n_documents``; NaN for a kind without a
    layer. (statistic): ``difference``, NoPE minus RoPE over the samples that have both, with ``difference_lower`` and
    ``difference_upper``. The coord ``units`` (statistic) has their units: they differ.

    Raises
    ------
    SchemaError
        If the group is missing, or no statistic is in it; says how to record one.
    ProbeError
        For a level outside (0, 1).

    Notes
    -----
    The mean over a sample's recorded queries, over the kind's heads and layers, then over samples; intervals as in
    :func:`~probe.attention_maps.head_mean`. The two kinds see the same samples, so the difference is taken within each
    sample: Student's t of the differences, withheld below 5 samples and where that of either kind is.
    """
    Bootstrap(level)
    data = queries_of(attention)
    names = [name for name, spec in schema.ATTENTION.items() if spec.dims == PER_HEAD and name in data.data_vars]
    if not names:
        raise SchemaError(
            "/attention holds no statistic of a query, layer and head: record(…, attention=True) adds them"
        )
    cells = cells_of(data)
    mean, lower, upper = np.full((3, len(names), len(ATTENTION_KINDS)), np.nan)
    n_documents = np.zeros((len(names), len(ATTENTION_KINDS)), np.int64)
    difference, reach = np.full((2, len(names)), np.nan)
    for at, name in enumerate(names):
        interval = MeanInterval(level, name)
        of_samples = kind_means(data, statistic_of(data, name), cells)
        estimate = interval.estimate(of_samples)
        mean[at], lower[at], upper[at] = estimate.mean, estimate.lower, estimate.upper
        n_documents[at] = estimate.n_documents
        rope, nope = of_samples[:, ATTENTION_KINDS.index("rope")], of_samples[:, ATTENTION_KINDS.index("nope")]
        gap = nope - rope
        difference[at], _ = sample_mean(gap)
        reach[at] = np.where(np.isnan(lower[at]).any(), np.nan, interval.t_reach(gap))
    coords = {
        "statistic": xr.Variable("statistic", names, {"long_name": "statistic", "units": "1"}),
        "units": xr.Variable("statistic", [schema.ATTENTION[name].units for name in names],
                             {"long_name": "units of the statistic", "units": "1"}),
    }  # fmt: skip
    of_kinds = {
        "mean": (mean, "mean over samples", "by statistic"),
        "lower": (lower, "lower bound of the mean", "by statistic"),
        "upper": (upper, "upper bound of the mean", "by statistic"),
        "n_documents": (n_documents, "samples in which the statistic is defined", "document"),
    }
    between = {
        "difference": (difference, "NoPE minus RoPE, within samples", "by statistic"),
        "difference_lower": (difference - reach, "lower bound of the difference", "by statistic"),
        "difference_upper": (difference + reach, "upper bound of the difference", "by statistic"),
    }
    result = arrays(data, ("statistic", "attention_kind"), of_kinds, coords=coords | kind_coord())
    return xr.Dataset(result | arrays(data, ("statistic",), between, coords=coords), attrs={"level": level})


def position_profile(attention: Attention, statistic: str, *, n_bins: int = 32, level: float = 0.95) -> xr.Dataset:
    """A statistic by the query's position, for NoPE and for RoPE layers.

    Parameters
    ----------
    attention : Dataset with the statistic (query, layer, head, …), or a recording that holds it.
    statistic : its name, such as "entropy".
    n_bins : at most so many bins, of equally many positions, from 0 to the last recorded position. Where that lies
        beyond the first chunk no bin lies across a chunk border, unless it holds whole chunks.
    level : coverage of the intervals.

    Returns
    -------
    Dataset (attention_kind, position_bin, …) of ``mean``, ``lower``, ``upper``, in the statistic's units, and
    ``n_documents``. ``position_bin`` is the bin's first position, ``bin_stop`` the one after its last. NaN for a kind
    without a layer and a bin without a recorded query. The attribute ``chunk_size`` is that of the recording.

    Raises
    ------
    SchemaError
        If the variable is missing, with how to record it, or the group's attribute ``chunk_size``.
    ProbeError
        For fewer than one bin, a level outside (0, 1), or a statistic that there is not.

    Notes
    -----
    In every bin the mean over a sample's recorded queries there, over the kind's heads and layers, then over the
    samples that have such queries; intervals as in :func:`~probe.attention_maps.head_mean`. Later bins rest on the
    longer samples alone.
    """
    interval = MeanInterval(level, statistic)
    _require_bins(n_bins)
    data = queries_of(attention)
    variable, chunk_size = statistic_of(data, statistic), attribute(data, "chunk_size")
    position = data["position"].values.astype(np.int64)
    stop = int(position.max(initial=-1)) + 1
    width = _width_of_bins(stop, n_bins, chunk_size=int(chunk_size))
    bin_coords = _bins("position_bin", stop, width, "first position in the bin")
    cells = cells_of(data, group=position // width, n_groups=bin_coords["position_bin"].size)
    estimate = interval.by_group(cells, kind_means(data, variable, cells))
    dims = ("position_bin", "attention_kind", *map(str, variable.dims[3:]))
    result = interval_dataset(data, dims, estimate, interval, coords=bin_coords | kind_coord())
    return result.transpose("attention_kind", "position_bin", ...).assign_attrs(chunk_size=chunk_size)


def chunk_reach(attention: Attention, *, n_bins: int = 32, level: float = 0.95) -> xr.Dataset:
    """What a chunk border does: how far queries see, how they attend and how well the model predicts on its two sides.

    Parameters
    ----------
    attention : ``/attention``, or a recording that holds it.
    n_bins : at most so many bins, of equally many positions in the chunk.
    level : coverage of the intervals.

    Returns
    -------
    Dataset. (attention_kind, chunk_position): ``reach``, the mean number of keys that the queries see, in tokens,
    exact; and where they were recorded ``entropy`` and ``mean_distance``, each with ``…_lower`` and ``…_upper``.
    (chunk_position): where it was recorded ``loss``, that of the next token in nats, with ``loss_lower`` and
    ``loss_upper``; and ``n_documents``. ``chunk_position`` is the first position of the bin, counted from the start of
    the query's chunk; ``bin_stop`` the one after its last. Bins in the first half of a chunk lie after a border, those
    in the second half before one. NaN for a kind without a layer and a bin without a query, and everywhere if no text
    reaches over a border.

    Raises
    ------
    SchemaError
        If the group or its attribute ``chunk_size`` is missing.
    ProbeError
        For fewer than one bin or a level outside (0, 1).

    Notes
    -----
    A query at position q sees q + 1 keys in a NoPE layer and q mod chunk + 1 in a RoPE layer (chunked attention, Meta
    2025): just after a border RoPE layers see hardly anything, and only NoPE layers connect it to what was before.
    Both sides are of the same borders: what stands before one counts only if the text goes on after it. Otherwise the
    ends of late chunks would be compared with the starts of early ones, and NoPE layers seem to forget too.
    Means and intervals as in :func:`~probe.attention_maps.position_profile`.
    """
    interval = MeanInterval(level, "entropy")
    _require_bins(n_bins)
    data = queries_of(attention)
    chunk_size = attribute(data, "chunk_size")
    position = data["position"].values.astype(np.int64)
    in_chunk = position % chunk_size
    what = "first position in the bin, counted from the start of the query's chunk"
    width = max(-(-chunk_size // n_bins), 1)
    bin_coords = _bins("chunk_position", chunk_size, width, what)
    place = in_chunk // width
    middle = (bin_coords["chunk_position"].values + bin_coords["bin_stop"].values - 1) / 2
    border = position - in_chunk + np.where((middle >= chunk_size / 2)[place], chunk_size, 0)
    group = np.where((border > 0) & (border <= _last_positions(data, position)), place, -1)
    cells = cells_of(data, group=group, n_groups=bin_coords["chunk_position"].size)

    reach = interval.by_group(cells, cells.means(_visible_keys(data, position, in_chunk))).mean
    of_kind, coords = ("chunk_position", "attention_kind"), bin_coords | kind_coord()
    columns = arrays(data, of_kind, {"reach": (reach, "keys that a query sees", "token")}, coords=coords)
    for name in ("entropy", "mean_distance"):
        if name in data.data_vars:
            interval = MeanInterval(level, name)
            estimate = interval.by_group(cells, kind_means(data, statistic_of(data, name), cells))
            columns |= _named(name, interval_dataset(data, of_kind, estimate, interval, coords=coords))
    if "next_token_loss" in data.data_vars:
        interval = MeanInterval(level, "next_token_loss")
        estimate = interval.by_group(cells, cells.means(data["next_token_loss"].values))
        columns |= _named("loss", interval_dataset(data, of_kind[:1], estimate, interval, coords=bin_coords))
    n_documents = np.array([own.stop - own.start for _, own in cells.groups()])
    counted = {"n_documents": (n_documents, "samples with a query in the bin", "document")}
    columns |= arrays(data, of_kind[:1], counted, coords=bin_coords)
    attributes = {"level": level, "chunk_size": chunk_size}
    return xr.Dataset(columns, attrs=attributes).transpose("attention_kind", ...)


def kind_coord() -> dict[str, xr.Variable]:
    """The coord that tells results for RoPE layers from those for NoPE layers."""
    attributes = {"long_name": schema.ATTENTION["attention_kind"].long_name, "units": "1"}
    return {"attention_kind": xr.Variable("attention_kind", list(ATTENTION_KINDS), attributes)}


def kind_means(data: xr.Dataset, variable: xr.DataArray, cells: Cells) -> np.ndarray:
    """Mean (cell, kind, …) of a variable (query, layer, head, …) over a cell's queries, then heads and layers."""
    shape = (cells.n_cells, len(ATTENTION_KINDS), *variable.shape[3:])
    sums, n_defined = np.zeros((2, *shape))
    for kind, values in zip(kind_of_layers(data), layers_of(variable), strict=True):
        of_heads = cells.means(values)
        sums[:, kind] += np.nansum(of_heads, axis=1)
        n_defined[:, kind] += np.count_nonzero(~np.isnan(of_heads), axis=1)
    return divide(sums, n_defined)


def _last_positions(data: xr.Dataset, position: np.ndarray) -> np.ndarray:
    """For every query the last position that was recorded of its sample, (query,)."""
    _, inverse = np.unique(data["sample"].values, return_inverse=True)
    last = np.zeros(inverse.max(initial=0) + 1, np.int64)
    np.maximum.at(last, inverse, position)
    return last[inverse]


def _visible_keys(data: xr.Dataset, position: np.ndarray, in_chunk: np.ndarray) -> np.ndarray:
    """How many keys every query sees in layers of each kind, (query, kind); NaN for a kind without a layer."""
    keys = np.full((len(position), len(ATTENTION_KINDS)), np.nan)
    for kind in set(kind_of_layers(data)):
        keys[:, kind] = 1 + (in_chunk if ATTENTION_KINDS[kind] == "rope" else position)
    return keys


def _named(name: str, result: xr.Dataset) -> dict[str, xr.DataArray]:
    """Mean and bounds under the names of the result that has several of them."""
    return {name: result["mean"], f"{name}_lower": result["lower"], f"{name}_upper": result["upper"]}


def _require_bins(n_bins: int) -> None:
    if not isinstance(n_bins, int | np.integer) or n_bins < 1:
        raise ProbeError(f"n_bins is {n_bins!r}, it must be a whole number of at least 1")


def _width_of_bins(stop: int, n_bins: int, *, chunk_size: int) -> int:
    """Width of at most ``n_bins`` equal bins of the positions before ``stop``, in line with the chunks."""
    width = max(-(-stop // n_bins), 1)
    if not 0 < chunk_size < stop:
        return width
    if width > chunk_size:
        return -(-width // chunk_size) * chunk_size
    return next(divisor for divisor in range(width, chunk_size + 1) if chunk_size % divisor == 0)


def _bins(name: str, stop: int, width: int, long_name: str) -> dict[str, xr.Variable]:
    """Coords that label bins of ``width`` positions before ``stop``."""
    first = np.arange(0, stop, width)
    return {
        name: xr.Variable(name, first, {"long_name": long_name, "units": "token"}),
        "bin_stop": xr.Variable(name, np.minimum(first + width, stop),
                                {"long_name": "position after the last in the bin", "units": "token"}),
    }  # fmt: skip
