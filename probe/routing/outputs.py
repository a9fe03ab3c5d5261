"""Statistics of what routed experts return; part of ``probe.routing_stats``."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe import schema
from probe.bootstrap import MIN_DOCUMENTS, Bootstrap, divide
from probe.schema import SchemaError

SUPER_PERCENTILE = 99.5
"""A super expert's largest output lies above this percentile of all experts' largest outputs."""

SUPER_SHARE = 0.1
"""A super expert's largest output exceeds this share of the largest output of all."""

DIMS = ("sample", "layer", "expert")


def saliency(experts: xr.DataTree, *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> xr.Dataset:
    """How much an expert adds to the tokens that are routed to it.

    Parameters
    ----------
    experts : a whole recording with ``/experts`` and ``/samples``, made with ``RoutingSpec(expert_outputs=True)``.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset (layer, expert): ``saliency``, units "1", the mean over the expert's tokens of the L2 norm of what it
    contributes, NaN for an expert without a token; its bounds ``lower`` and ``upper``, NaN for fewer than 5 documents
    with a token for the expert; and ``n_documents``, how many such documents there are.

    Raises
    ------
    SchemaError
        If a group or a variable is missing, or if one group was handed instead of the recording; names it.
    ProbeError
        For a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    REAP, Lasby et al. 2025 (arXiv 2510.13999), for pruning: the least salient experts go first. There the gate scales
    an expert's output and the norm is g·‖E(x)‖; Llama 4's gate scales the input, so that it is ‖E(g·x)‖ and no second
    gate. Experts of different layers are not comparable, since the residual stream grows with depth.

    The interval is that of a ratio of two sums over documents, Σ norms / Σ tokens; see ``probe.bootstrap``.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    if not isinstance(experts, xr.DataTree) or "samples" not in experts.children:
        raise SchemaError(
            "saliency divides /experts by the counts in /samples: pass the whole recording, not one group"
        )
    outputs, samples = _experts_of(experts), schema.group(experts, "samples")
    schema.require(outputs, "saliency_sum")
    schema.require(samples, "expert_count")
    norm_sum = outputs["saliency_sum"].transpose(*DIMS).values.astype(np.float64)
    counts = samples["expert_count"].transpose(*DIMS).values.astype(np.int64)
    if norm_sum.shape != counts.shape:
        raise SchemaError(f"/experts is {norm_sum.shape} (sample, layer, expert) and /samples {counts.shape}")
    n_documents = np.count_nonzero(counts, axis=0)
    filled = counts.any(axis=(1, 2))
    interval = bootstrap.ratio_interval(norm_sum[filled], counts[filled])
    lower, upper = np.where(n_documents >= MIN_DOCUMENTS, interval, np.nan)
    columns = {
        "saliency": (divide(norm_sum.sum(axis=0), counts.sum(axis=0)), "mean norm of what the expert contributes", "1"),
        "lower": (lower, "lower bound of the saliency", "1"),
        "upper": (upper, "upper bound of the saliency", "1"),
        "n_documents": (n_documents, "documents with a token for the expert", "document"),
    }
    return xr.Dataset(_labelled(outputs, columns), attrs=bootstrap.attributes)


def super_experts(experts: xr.DataTree | xr.Dataset) -> xr.Dataset:
    """Experts whose output holds values far beyond those of all other experts.

    Parameters
    ----------
    experts : Dataset with ``output_max`` (sample, layer, expert), or a recording that holds it.

    Returns
    -------
    Dataset (layer, expert): ``output_max``, units "1", the largest absolute value that the expert returned, NaN for an
    expert without a token; ``is_super``, bool, whether that lies above both thresholds; ``sample_share``, units "1",
    the share of the samples with a token for the expert in which it does, NaN where there is none. The thresholds are
    scalars, units "1": ``percentile_threshold``, the 99.5th percentile of all experts' ``output_max``, and
    ``share_threshold``, a tenth of the largest; NaN where no expert saw a token.

    Raises
    ------
    SchemaError
        If the group, a dim or a variable is missing; names it.

    Notes
    -----
    Su et al. 2025 (arXiv 2507.23279): removing a handful of such experts breaks a model. A percentile always has
    something above it: about one expert in 200 passes the first threshold whatever the model, and of fewer than 200
    experts just the largest. What tells a super expert is how far it lies beyond the rest, in most samples.
    """
    outputs = _experts_of(experts)
    schema.require(outputs, "output_max")
    per_sample = outputs["output_max"].transpose(*DIMS).values.astype(np.float64)
    is_used = ~np.isnan(per_sample)
    output_max = np.fmax.reduce(per_sample, axis=0, initial=np.nan)
    seen = output_max[~np.isnan(output_max)]
    percentile, share_of_largest = np.nan, np.nan
    if seen.size:
        percentile, share_of_largest = np.percentile(seen, SUPER_PERCENTILE), SUPER_SHARE * seen.max()
    threshold = max(percentile, share_of_largest)
    sample_share = divide((per_sample > threshold).sum(axis=0), is_used.sum(axis=0))
    columns = {
        "output_max": (output_max, "largest absolute value in the expert's output", "1"),
        "is_super": (output_max > threshold, "output beyond both thresholds", "1"),
        "sample_share": (sample_share, "share of the expert's samples with an output beyond both thresholds", "1"),
    }
    scalars = {
        "percentile_threshold": (percentile, f"{SUPER_PERCENTILE}th percentile of the experts' largest outputs"),
        "share_threshold": (share_of_largest, f"{SUPER_SHARE:.0%} of the largest output of all experts"),
    }
    result = xr.Dataset(_labelled(outputs, columns))
    for name, (value, long_name) in scalars.items():
        result[name] = xr.DataArray(value, attrs={"long_name": long_name, "units": "1"})
    return result


def _experts_of(data: xr.DataTree | xr.Dataset) -> xr.Dataset:
    """``/experts`` with all its dims."""
    experts = schema.group(data, "experts")
    schema.require(experts, *DIMS)
    if lost := [dim for dim in DIMS if dim not in experts.dims]:
        raise SchemaError(f"/experts has lost the dim {lost[0]!r}: select with a list, such as sel({lost[0]}=[3])")
    return experts


def _labelled(experts: xr.Dataset, columns: dict[str, tuple[np.ndarray, str, str]]) -> dict[str, xr.DataArray]:
    """Values (layer, expert) with their long names and units, labelled as ``experts`` is."""
    coords = {name: coord.variable.compute() for name, coord in experts.coords.items() if "sample" not in coord.dims}
    return {
        name: xr.DataArray(values, coords, DIMS[1:], attrs={"long_name": long_name, "units": units})
        for name, (values, long_name, units) in columns.items()
    }
