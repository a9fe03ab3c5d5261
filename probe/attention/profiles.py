"""How far back attention reaches, and which heads are alike; part of ``probe.attention_maps``."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe import schema
from probe.attention.intervals import Estimate, MeanInterval
from probe.attention.kinds import kind_coord
from probe.attention.queries import Attention, arrays, attribute, kind_of_layers, layers_of, profiles_of, recorded
from probe.bootstrap import divide
from probe.schema import ATTENTION_KINDS, ProbeError

MASSES = ("map_sum", "distance_mass", "received_mass")
"""What heads can be compared by: where they put their mass."""


def distance_profile(profiles: Attention, *, by_kind: bool = False, level: float = 0.95) -> xr.Dataset:
    """Attention mass by the distance from the query back to the key.

    Parameters
    ----------
    profiles : ``/attention_profiles`` with ``distance_mass`` (profile, layer, head, distance_bin), or a recording that
        holds it.
    by_kind : whether to average over the heads and layers of a kind, within each sample.
    level : coverage of the intervals.

    Returns
    -------
    Dataset (layer, head, distance_bin) or (attention_kind, distance_bin), units "1": ``distance_mass``, ``lower``,
    ``upper``, and ``n_documents``. ``distance_bin`` is the bin's smallest distance, in tokens; bins hold 0, 1, 2–3,
    4–7, … . NaN for a kind without a layer.

    Raises
    ------
    SchemaError
        If the group or the variable is missing; says how to record it.
    ProbeError
        For a level outside (0, 1).

    Notes
    -----
    The mean over the samples with a query that reaches the bin; each counts the same. The masses of one sample sum to
    1, so this sums to 1 where all samples reach the same bins, and otherwise the last ones rest on the longer samples.
    A RoPE layer has no mass beyond its chunk. Intervals as in :func:`~probe.attention_maps.head_mean`.
    """
    interval = MeanInterval(level, "distance_mass")
    data = profiles_of(profiles)
    variable = recorded(data, "distance_mass").transpose("profile", "layer", "head", "distance_bin")
    n_profiles, n_layers, n_heads, n_bins = variable.shape
    dims: tuple[str, ...] = ("attention_kind", "distance_bin") if by_kind else ("layer", "head", "distance_bin")
    if by_kind:
        sums, n_defined = np.zeros((2, n_profiles, len(ATTENTION_KINDS), n_bins))
        for kind, values in zip(kind_of_layers(data), layers_of(variable), strict=True):
            sums[:, kind] += np.nansum(values, axis=1, dtype=np.float64)
            n_defined[:, kind] += np.count_nonzero(~np.isnan(values), axis=1)
        estimate = interval.estimate(divide(sums, n_defined))
    else:
        estimate = Estimate.empty((n_layers, n_heads, n_bins))
        for layer, values in enumerate(layers_of(variable)):
            estimate.put(layer, interval.estimate(values.astype(np.float64)))
    columns = {
        "distance_mass": (estimate.mean, "mean attention mass by distance", "1"),
        "lower": (estimate.lower, "lower bound of the mass", "1"),
        "upper": (estimate.upper, "upper bound of the mass", "1"),
        "n_documents": (estimate.n_documents, "samples with a query that reaches the bin", "document"),
    }
    attributes = {"level": level, "chunk_size": attribute(data, "chunk_size")}
    return xr.Dataset(arrays(data, dims, columns, coords=kind_coord() if by_kind else {}), attrs=attributes)


def head_similarity(profiles: Attention, *, of: str = "map_sum") -> xr.DataArray:
    """How alike heads attend, over all layers.

    Parameters
    ----------
    profiles : ``/attention_profiles`` with the variable, or a recording that holds it.
    of : what is compared: "map_sum", the pooled maps; "distance_mass", how far back; "received_mass", which keys.

    Returns
    -------
    DataArray (head, other_head), units "1", labelled "layer.head": from 0, nothing in common, to 1. The coords
    ``layer`` and ``attention_kind`` tell the heads apart. NaN where a head has no mass in any sample.

    Raises
    ------
    SchemaError
        If the group or the variable is missing; says how to record it.
    ProbeError
        For something else to compare.

    Notes
    -----
    The cosine of the two heads' masses in a sample, averaged over samples. What a head cannot see holds none of its
    mass: it counts as 0, so that a RoPE head differs from a NoPE head by all that the latter does beyond the chunk.
    Maps of many keys per cell look alike for all heads that attend nearby; "distance_mass" tells those apart.
    """
    if of not in MASSES:
        raise ProbeError(f"of is {of!r}, heads are compared by one of {', '.join(MASSES)}")
    data = profiles_of(profiles)
    variable = recorded(data, of).transpose("profile", "layer", "head", ...)
    n_profiles, n_layers, n_heads = variable.shape[:3]
    sums, n_defined = np.zeros((2, n_layers * n_heads, n_layers * n_heads))
    for profile in range(n_profiles):
        values = variable.isel(profile=profile).values.reshape(n_layers * n_heads, -1)
        masses = np.nan_to_num(values.astype(np.float64))
        directions = divide(masses, np.sqrt(np.square(masses).sum(axis=1, keepdims=True)))
        cosine = directions @ directions.T
        sums += np.nan_to_num(cosine)
        n_defined += ~np.isnan(cosine)
    layers = np.repeat(data["layer"].values, n_heads)
    names = [f"{layer}.{head}" for layer, head in zip(layers, np.tile(data["head"].values, n_layers), strict=True)]
    kinds = np.repeat(np.asarray(schema.labels(data["attention_kind"]), dtype=str), n_heads)
    words = {
        name: {"long_name": schema.ATTENTION[name].long_name, "units": "1"} for name in ("layer", "attention_kind")
    }
    heads = {"long_name": "layer and attention head", "units": "1"}
    coords = {
        "head": xr.Variable("head", names, heads),
        "other_head": xr.Variable("other_head", names, heads),
        "layer": xr.Variable("head", layers, words["layer"]),
        "attention_kind": xr.Variable("head", kinds, words["attention_kind"]),
    }
    long_name = f"cosine similarity of heads: {schema.ATTENTION_PROFILES[of].long_name}"
    return xr.DataArray(
        divide(sums, n_defined),
        dims=("head", "other_head"),
        coords=coords,
        name="head_similarity",
        attrs={"long_name": long_name, "units": "1"},
    )
