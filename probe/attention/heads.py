"""What single heads do; part of ``probe.attention_maps``."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike
from scipy.special import stdtrit

from probe import schema
from probe.attention.intervals import Estimate, MeanInterval, sample_mean
from probe.attention.queries import (
    Attention,
    Cells,
    arrays,
    cells_of,
    grouping,
    layers_of,
    queries_of,
    statistic_of,
)
from probe.bootstrap import Bootstrap, divide
from probe.schema import ProbeError, SchemaError

SINK_THRESHOLD = 0.3

OF_ONE_KEY = ("sink_mass", "self_mass", "previous_mass", "offset_mass", "segment_mass", "top_weight")
"""Statistics that are large, whatever the head does, where a query sees few keys: of v keys one has about 1/v."""

KNOWN_FROM = 20
"""How many queries that see few keys must have been drawn before the draw knows what they are like."""


def query_mean(
    attention: Attention, statistic: str, *, n_tokens: ArrayLike | None = None, level: float = 0.95
) -> xr.Dataset:
    """Each sample's own mean over all its queries, estimated from those that were recorded.

    Parameters
    ----------
    attention : a recording with ``/attention``; or that group, with ``n_tokens``.
    statistic : name of a variable (query, layer, head, …), such as "entropy".
    n_tokens : tokens of every sample (sample,), as in ``/samples``; read from there unless given.
    level : coverage of the interval.

    Returns
    -------
    Dataset (sample, layer, head, …) in the statistic's units: ``mean``, ``standard_error``, ``lower`` and ``upper``.
    Samples without a recorded query are left out; ``sample`` is the index into ``/samples``. Where all queries of a
    sample were recorded the error is 0 and the bounds are the mean; of a single one of several the error is NaN. NaN
    where the statistic is defined for none of the recorded queries. Error and bounds of masses on single keys or
    segments are NaN too where queries that were not drawn could be what matters.

    Raises
    ------
    SchemaError
        If the group or a variable is missing, or if nothing says how many tokens the samples have.
    ProbeError
        For a level outside (0, 1), a statistic that there is not, or samples with more queries than tokens.

    Notes
    -----
    Queries are drawn without replacement, m of N: the error is s / √m · √(1 - m / N) and the interval reaches t(m - 1)
    errors to both sides, but not beyond what is possible (Cochran 1977, Sampling Techniques, §2.6). Where a statistic
    is undefined for some queries, such as the first of a sample, s and the m under it are of those where it is defined.
    This says how sure the number is for *these* samples; :func:`head_mean` says it for others like them.

    A query that sees v keys gives one of them about 1/v, so that a mean of such masses may rest on the few queries at
    the beginning of a text, or of a chunk, and a draw that has none of them does not know of it. Error and bounds are
    withheld where those not drawn, of as few keys as fewer than 20 of the drawn ones see, would move the mean by more
    than its error at 1/v each.
    """
    Bootstrap(level)
    data = queries_of(attention)
    variable, cells = statistic_of(data, statistic), cells_of(data)
    of_cells = _tokens_of(attention, cells, n_tokens)
    left_out = 1 - divide(cells.n_queries, of_cells)
    unseen = _unseen(data, cells, of_cells, statistic) if statistic in OF_ONE_KEY else {}
    kinds = schema.labels(data["attention_kind"]).tolist() if unseen else []
    shape = (cells.n_cells, *variable.shape[1:])
    mean, error, lower, upper = np.full((4, *shape), np.nan)
    largest = 1.0 if MeanInterval(level, statistic).is_share else np.inf
    for layer, values in enumerate(layers_of(variable)):
        average, variance, n_defined = cells.moments(values)
        of_samples = left_out.reshape(-1, *(1,) * (average.ndim - 1))
        sampling = np.sqrt(divide(variance, n_defined) * of_samples)
        if unseen:
            sampling[sampling < unseen[kinds[layer]].reshape(of_samples.shape)] = np.nan
        sampling[(of_samples == 0) & (n_defined > 0)] = 0
        reach = np.where(n_defined > 1, stdtrit(np.maximum(n_defined - 1, 1), (1 + level) / 2), 0) * sampling
        mean[:, layer], error[:, layer] = average, sampling
        lower[:, layer] = np.minimum(np.maximum(average - reach, 0), average)
        upper[:, layer] = np.maximum(np.minimum(average + reach, largest), average)
    dims = ("sample", *map(str, variable.dims[1:]))
    coords = {"sample": xr.Variable("sample", cells.sample, {"long_name": "index into /samples", "units": "1"})}
    spec = schema.ATTENTION[statistic]
    columns = {
        "mean": (mean, f"mean over the sample's queries: {spec.long_name}", spec.units),
        "standard_error": (error, f"standard error from recording only some queries: {spec.long_name}", spec.units),
        "lower": (lower, f"lower bound of the mean: {spec.long_name}", spec.units),
        "upper": (upper, f"upper bound of the mean: {spec.long_name}", spec.units),
    }
    return xr.Dataset(arrays(data, dims, columns, coords=coords), attrs={"level": level, "statistic": statistic})


def _unseen(data: xr.Dataset, cells: Cells, n_tokens: np.ndarray, statistic: str) -> dict[str, np.ndarray]:
    """By how much a mean (cell,) over all queries may exceed the drawn ones', in layers of each kind of attention.

    See the notes of :func:`query_mean`.
    """
    chunk_size = int(data.attrs.get("chunk_size", 0))
    order = np.argsort(cells.cell, kind="stable")
    positions = np.split(data["position"].values.astype(np.int64)[order], np.cumsum(cells.n_queries))[:-1]
    moved = {kind: np.zeros(cells.n_cells) for kind in schema.ATTENTION_KINDS}
    for cell, (own, n_recorded) in enumerate(zip(positions, n_tokens.tolist(), strict=True)):
        n = max(n_recorded, own.max() + 1)  # a cache may have been filled before the recording began
        drawn_at = np.zeros(n, bool)
        drawn_at[own] = True
        for kind, values in moved.items():
            is_rope = chunk_size > 0 and kind == "rope"
            n_keys = np.arange(n) % chunk_size + 1 if is_rope else np.arange(n) + 1
            # In a RoPE layer only the first chunk sees the first token.
            n_keys = n_keys[:chunk_size] if is_rope and statistic == "sink_mass" else n_keys
            is_drawn = drawn_at[: len(n_keys)]
            drawn = np.sort(n_keys[is_drawn])
            few = drawn[KNOWN_FROM - 1] if len(drawn) >= KNOWN_FROM else np.inf
            values[cell] = (1 / n_keys[~is_drawn & (n_keys <= few)]).sum() / n
    return moved


def head_mean(attention: Attention, statistic: str, *, by: str | None = None, level: float = 0.95) -> xr.Dataset:
    """Mean of a statistic of every head, with an interval over samples.

    Parameters
    ----------
    attention : Dataset with the statistic (query, layer, head, …), or a recording that holds it.
    statistic : its name, such as "entropy".
    by : name of a coord on ``query`` to split by, such as "domain".
    level : coverage of the interval.

    Returns
    -------
    Dataset ([by,] layer, head, …) of ``mean``, ``lower`` and ``upper`` in the statistic's units, and ``n_documents``,
    the samples in which it is defined. NaN where there is none.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it and says how to record it.
    ProbeError
        For a level outside (0, 1), or a statistic that there is not.

    Notes
    -----
    The mean over the recorded queries of a sample, then over samples, each counting the same. The interval is
    Student's t on the logit scale for masses, on the logarithmic for what is only known not to be negative, with the
    degrees of freedom of the samples that carry the mean (or what a mass leaves of 1, if less): (Σ x)² / Σ x². It is
    withheld (NaN) below 5 samples, and where fewer than 4 carry it (of few samples: fewer than 4 in 10): such intervals
    cover less than 90 %. What is 0 in every sample, such as the far mass of a RoPE layer, has bounds of 0, but for a
    ``key_rank``.
    """
    interval = MeanInterval(level, statistic)
    data = queries_of(attention)
    variable = statistic_of(data, statistic)
    group, coords, n_groups = None, {}, 1
    if by is not None:
        if by in variable.dims:
            raise SchemaError(f"cannot split by {by!r}, a dim of the result: give the coord another name")
        group, coords[by] = grouping(data, by)
        n_groups = coords[by].size
    estimate = over_samples(variable, cells_of(data, group=group, n_groups=n_groups), interval)
    dims = tuple(map(str, variable.dims[1:]))
    if by is None:
        return interval_dataset(data, dims, estimate.at(0), interval)
    return interval_dataset(data, (by, *dims), estimate, interval, coords=coords)


def segment_mass(attention: Attention, *, level: float = 0.95) -> xr.Dataset:
    """Attention mass that every head puts on the named segments.

    Parameters
    ----------
    attention : Dataset with ``segment_mass`` (query, layer, head, segment), or a recording that holds it.
    level : coverage of the interval.

    Returns
    -------
    Dataset (layer, head, segment), units "1": ``mean``, ``lower``, ``upper`` and ``n_documents``; see
    :func:`head_mean`. The mean is over all recorded queries: those before the segment, and those of a RoPE layer in
    another chunk, give it no mass.

    Raises
    ------
    SchemaError
        If no segment was recorded; says how to record one.
    ProbeError
        For a level outside (0, 1).

    Notes
    -----
    After Yang et al. 2025 (arXiv 2501.18795), who sum attention over the first tokens, the needle and the rest.
    """
    return head_mean(attention, "segment_mass", level=level)


def sinks(attention: Attention, *, threshold: float = SINK_THRESHOLD, level: float = 0.95) -> xr.Dataset:
    """Heads that park their attention on the sample's first token.

    Parameters
    ----------
    attention : Dataset with ``sink_mass`` (query, layer, head), or a recording that holds it.
    threshold : mean mass above which a head counts as a sink.
    level : coverage of the interval.

    Returns
    -------
    Dataset (layer, head): ``sink_mass``, ``lower``, ``upper``, units "1", ``n_documents`` (see :func:`head_mean`), and
    ``is_sink``, bool, whether the mean lies above the threshold; False where it is NaN.

    Raises
    ------
    SchemaError
        If the variable is missing; says how to record it.
    ProbeError
        For a threshold or a level outside (0, 1).

    Notes
    -----
    Gu et al. 2024 (arXiv 2410.10781), whose threshold is 0.3 too; the phenomenon is Xiao et al.'s (arXiv 2309.17453).
    The first token of a sample can give its mass to nothing else, so every query at position 0 has a sink mass of 1. A
    RoPE layer sees that token from the first chunk only: its heads look less like sinks the longer the samples are.
    """
    if not 0 < threshold < 1:
        raise ProbeError(f"threshold is {threshold}, it must lie between 0 and 1, such as {SINK_THRESHOLD}")
    result = head_mean(attention, "sink_mass", level=level).rename(mean="sink_mass")
    is_sink = (result["sink_mass"] > threshold).assign_attrs(long_name="mean sink mass above the threshold", units="1")
    return result.assign(is_sink=is_sink).assign_attrs(threshold=float(threshold))


def over_samples(variable: xr.DataArray, cells: Cells, interval: MeanInterval) -> Estimate:
    """Mean over samples (group, layer, head, …) of a variable (query, layer, head, …), with bounds."""
    result = Estimate.empty((cells.n_groups, *variable.shape[1:]))
    for layer, values in enumerate(layers_of(variable)):
        result.put((slice(None), layer), interval.by_group(cells, cells.means(values)))
    return result


def mean_over_samples(variable: xr.DataArray, cells: Cells) -> np.ndarray:
    """Mean over samples (layer, head, …) of a variable (query, layer, head, …), all cells being in one group."""
    mean = np.empty(variable.shape[1:])
    for layer, values in enumerate(layers_of(variable)):
        mean[layer], _ = sample_mean(cells.means(values))
    return mean


def interval_dataset(
    data: xr.Dataset,
    dims: tuple[str, ...],
    estimate: Estimate,
    interval: MeanInterval,
    *,
    coords: dict[str, xr.Variable] | None = None,
) -> xr.Dataset:
    """Label an estimate of a statistic: ``mean``, ``lower``, ``upper`` and ``n_documents``."""
    spec = schema.ATTENTION[interval.statistic]
    columns = {
        "mean": (estimate.mean, f"mean over samples: {spec.long_name}", spec.units),
        "lower": (estimate.lower, f"lower bound of the mean: {spec.long_name}", spec.units),
        "upper": (estimate.upper, f"upper bound of the mean: {spec.long_name}", spec.units),
        "n_documents": (estimate.n_documents, "samples in which the statistic is defined", "document"),
    }
    attributes = {"level": interval.level, "statistic": interval.statistic}
    return xr.Dataset(arrays(data, dims, columns, coords=coords), attrs=attributes)


def _tokens_of(attention: Attention, cells: Cells, n_tokens: ArrayLike | None) -> np.ndarray:
    """How many tokens the sample of each cell has."""
    if n_tokens is None:
        if not isinstance(attention, xr.DataTree) or "samples" not in attention.children:
            raise SchemaError(
                "/attention does not say how many tokens its samples have: pass the whole recording, or n_tokens="
            )
        samples = schema.group(attention, "samples")
        schema.require(samples, "n_tokens")
        n_tokens = samples["n_tokens"].values
    known = np.asarray(n_tokens)
    if known.ndim != 1 or known.dtype.kind not in "iu":
        raise ProbeError(f"n_tokens must be whole numbers, one for each sample of the recording, got {n_tokens!r:.80}")
    if cells.n_cells and cells.sample.max() >= len(known):
        raise ProbeError(f"n_tokens has {len(known)} entries, but /attention holds sample {cells.sample.max()}")
    own = known[cells.sample].astype(np.int64)
    if wrong := np.flatnonzero(cells.n_queries > own).tolist():
        first = wrong[0]
        raise ProbeError(
            f"sample {cells.sample[first]} has {cells.n_queries[first]} recorded queries but {own[first]} tokens: "
            "are n_tokens and /attention of the same recording?"
        )
    return own
