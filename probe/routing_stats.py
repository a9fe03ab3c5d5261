"""Statistics of routing: what a recording's ``/routing`` says about where tokens go.

Every function takes that Dataset, or the whole recording, and returns a DataArray or Dataset whose dims are named
after what they hold. ``by="domain"``, or any other coord on ``token``, splits the tokens and puts that dim first;
several coords make several dims. A group that no token fell into is NaN. An expert's number means nothing across
layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probe import schema
from probe.bootstrap import Bootstrap, divide, resampled_sums, share
from probe.counting import count
from probe.routing_flow import repetition, transition
from probe.routing_rows import By, Routing, Rows, coords_on, grouped
from probe.schema import ProbeError

__all__ = [
    "document_load",
    "expert_load",
    "imbalance",
    "load_interval",
    "margin",
    "margin_histogram",
    "repetition",
    "specialization",
    "top_tokens",
    "transition",
]

MARGIN_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def expert_load(routing: Routing, *, by: By = None) -> xr.DataArray:
    """Share of routed assignments that each expert received.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    by : name of a coord on ``token`` to split by, such as "domain", or several names.

    Returns
    -------
    DataArray ([by,] layer, expert), units "1"; sums to 1 over ``expert``, NaN where a group saw no token.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.

    Notes
    -----
    N_e / (T·k): counts selections, not gates; the shared expert is not counted. Jiang et al. 2024 (Mixtral), Fig. 7.
    """
    rows = grouped(routing, by)
    load = rows.array(share(rows.group_counts()), ("layer", "expert"), "share of assignments to the expert")
    return load.rename("load")


def load_interval(
    routing: Routing, *, by: By = None, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """Load of each expert, with an interval that resamples documents.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    by : name of a coord on ``token`` to split by, or several names.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset of ``load``, ``lower`` and ``upper`` ([by,] layer, expert), units "1", and ``n_documents`` ([by]), the
    samples with a token in the group. The bounds are NaN for fewer than 2 documents.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than one resample.

    Notes
    -----
    Percentile bootstrap of the ratio N_e / (T·k) over documents. An expert that took no token has the lower bound 0
    and the rule of three as its upper bound: 3 / n_eff at 95 %, in general -ln(1 - level) / n_eff. n_eff is T·k over
    the design effect, the median over the layer's used experts of bootstrap variance / binomial variance, at least 1.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    counts = np.zeros((rows.n_groups, rows.n_layers, rows.n_experts), np.int64)
    bounds = np.empty((2, *counts.shape))
    n_documents = np.zeros(rows.n_groups, np.int64)
    for group, tokens in rows.each_group():
        per_document = rows.document_counts(tokens)
        counts[group] = per_document.sum(axis=0)
        bounds[:, group] = bootstrap.share_interval(per_document)
        n_documents[group] = len(per_document)
    dims = ("layer", "expert")
    return xr.Dataset(
        {
            "load": rows.array(share(counts), dims, "share of assignments to the expert"),
            "lower": rows.array(bounds[0], dims, "lower bound of the load"),
            "upper": rows.array(bounds[1], dims, "upper bound of the load"),
            "n_documents": rows.array(n_documents, (), "documents with a token", "document"),
        },
        attrs=bootstrap.attributes,
    )


def document_load(samples: Routing, *, sample: int, layer: int, level: float = 0.95) -> xr.Dataset:
    """Load of each expert in one document, beside that of the whole recording.

    Parameters
    ----------
    samples : the group ``/samples`` with ``expert_count`` (sample, layer, expert), or a recording that holds it.
    sample : index of the document.
    layer : the decoder's own index of the layer.
    level : coverage of the interval.

    Returns
    -------
    Dataset (expert) of ``here`` and ``overall``, shares of assignments (units "1"), and ``lower`` and ``upper``, the
    interval of ``overall`` that resamples documents; NaN where there is no token, or only one document. ``top_k``
    among the attributes is how many assignments a token makes.

    Raises
    ------
    SchemaError
        If the group or a variable is missing; names it.
    ProbeError
        If there is no such sample or layer; names those that there are.

    Notes
    -----
    N_e / (T·k) as in :func:`expert_load`, of one document and of all.
    """
    samples = schema.group(samples, "samples")
    schema.require(samples, "expert_count", "attention_kind", "n_tokens")
    schema.require_sample(sample, samples.sizes["sample"])
    schema.require_layer(layer, samples["layer"].values.tolist())
    counts = samples["expert_count"].sel(layer=layer).transpose("sample", "expert").values.astype(np.int64)
    filled = counts[counts.sum(axis=1) > 0]
    lower, upper = (bound[0] for bound in Bootstrap(level).share_interval(filled[:, None, :]))
    columns = {
        "here": (share(counts[sample]), "load in the document"),
        "overall": (share(counts.sum(axis=0)), "load in all documents"),
        "lower": (lower, "lower bound of the load in all documents"),
        "upper": (upper, "upper bound of the load in all documents"),
    }
    kind = schema.labels(samples["attention_kind"].sel(layer=[layer]))[0]
    return xr.Dataset(
        {
            name: ("expert", values, {"long_name": long_name, "units": "1"})
            for name, (values, long_name) in columns.items()
        },
        coords={"expert": samples["expert"].values, "layer": layer, "attention_kind": str(kind)},
        attrs={
            "level": level,
            "n_documents": len(filled),
            "top_k": int(counts.sum() // max(int(samples["n_tokens"].sum()), 1)),
        },
    )


def imbalance(
    routing: Routing, *, by: By = None, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How unequally the experts are used, beside what an exactly uniform router would show.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    by : name of a coord on ``token`` to split by, or several names.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled, and how many uniform routers are simulated.
    seed : of both.

    Returns
    -------
    Dataset ([by,] layer), units "1": ``max_violation``, ``coefficient_of_variation``, ``gini``,
    ``normalized_entropy`` (NaN for a single expert); ``max_violation_lower`` and ``max_violation_upper`` (NaN for
    fewer than 2 documents); ``max_violation_null`` and ``max_violation_null_upper``, the uniform router's mean and
    97.5 % quantile.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than one resample.

    Notes
    -----
    max_violation = max_e N_e / mean_e N_e - 1, arXiv 2408.15664 Eq. 4. The maximum of noisy loads is biased upwards
    and resampling adds noise, so plain percentiles can lie above the estimate and the truth. The interval is instead
    max_violation ± c·E: c is the quantile at ``level``, over resampled documents, of the largest difference that any
    expert's load makes to the estimate, and the maximum cannot move further than that. It errs on the wide side.

    The null is for as many *independent* tokens as were recorded. Tokens of one document are not independent, so a
    router that is uniform in the long run may lie above the null; its interval then reaches down to 0.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    load = share(rows.group_counts())
    violation = _max_violation(load)
    reach = np.full(violation.shape, np.nan)
    null = np.full((*violation.shape, 2), np.nan)
    for group, tokens in rows.each_group():
        reach[group] = rows.n_experts * _load_deviation(rows.document_counts(tokens), bootstrap)
        null[group] = _uniform_max_violation(len(tokens), rows.n_experts, rows.top_k, bootstrap)
    largest = rows.n_experts / rows.top_k - 1
    columns = {
        "max_violation": (violation, "largest load over mean load, minus 1"),
        "coefficient_of_variation": (rows.n_experts * load.std(axis=-1), "standard deviation of the loads over mean"),
        "gini": (_gini(load), "Gini coefficient of the loads"),
        "normalized_entropy": (_normalized_entropy(load), "entropy of the loads over that of equal loads"),
        "max_violation_lower": (np.maximum(violation - reach, 0), "lower bound of the maximum violation"),
        "max_violation_upper": (np.minimum(violation + reach, largest), "upper bound of the maximum violation"),
        "max_violation_null": (null[..., 0], "mean maximum violation of a uniform router, independent tokens"),
        "max_violation_null_upper": (null[..., 1], "97.5 % quantile of a uniform router, independent tokens"),
    }
    return xr.Dataset(
        {name: rows.array(values, ("layer",), long_name) for name, (values, long_name) in columns.items()},
        attrs=bootstrap.attributes,
    )


def margin(routing: Routing, *, by: By = None) -> xr.Dataset:
    """How clearly the router decides: weakest chosen minus best not chosen logit.

    Parameters
    ----------
    routing : Dataset with ``router_margin`` (token, layer), or a recording that holds it.
    by : name of a coord on ``token`` to split by, or several names.

    Returns
    -------
    Dataset ([by,] layer): ``mean`` and ``margin`` (…, quantile), the 5th, 25th, 50th, 75th and 95th percentile, in
    logits; ``tie_share``, units "1", the share of decisions with a margin of exactly 0. NaN where there is no margin:
    every expert is chosen, or the group saw no token.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.

    Notes
    -----
    Margins are stored in float16, so one below 3e-8 counts as a tie.
    """
    rows = grouped(routing, by)
    margins = rows.values("router_margin")
    shape = (rows.n_groups, rows.n_layers)
    mean, tie_share = np.full(shape, np.nan), np.full(shape, np.nan)
    quantiles = np.full((*shape, len(MARGIN_QUANTILES)), np.nan)
    for group, tokens in rows.each_group():
        for layer in range(rows.n_layers):
            values = margins[tokens, layer].astype(np.float64)
            values = values[~np.isnan(values)]
            if values.size:
                mean[group, layer] = values.mean()
                tie_share[group, layer] = np.mean(values == 0)
                quantiles[group, layer] = np.quantile(values, MARGIN_QUANTILES)
    labels = {"quantile": xr.Variable("quantile", list(MARGIN_QUANTILES), {"long_name": "quantile", "units": "1"})}
    dims = ("layer", "quantile")
    return xr.Dataset(
        {
            "mean": rows.array(mean, ("layer",), "mean router margin", "logit"),
            "margin": rows.array(quantiles, dims, "quantile of the router margin", "logit", coords=labels),
            "tie_share": rows.array(tie_share, ("layer",), "share of decisions with a margin of exactly 0"),
        }
    )


def margin_histogram(routing: Routing, *, bins: int | Sequence[float] = 40, by: By = None) -> xr.DataArray:
    """Share of routing decisions by margin.

    Parameters
    ----------
    routing : Dataset with ``router_margin`` (token, layer), or a recording that holds it.
    bins : how many equal bins from 0 to the largest margin, the same everywhere; or their edges in logits, rising.
    by : name of a coord on ``token`` to split by, or several names.

    Returns
    -------
    DataArray ([by,] layer, margin_bin), units "1"; sums to 1 over ``margin_bin`` unless given edges leave margins out,
    NaN where there is no margin. ``margin_bin`` is the centre of a bin, the coords ``margin_from`` and ``margin_to``
    are its edges (logit). A bin holds its lower edge, the last one its upper edge too.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For fewer than one bin, or edges that do not rise.
    """
    rows = grouped(routing, by)
    margins = rows.values("router_margin").astype(np.float64)
    edges = _margin_edges(margins, bins)
    n_bins = len(edges) - 1
    outside, absent = n_bins, n_bins + 1
    place = np.searchsorted(edges, margins, side="right") - 1
    place[margins == edges[-1]] = n_bins - 1
    place[place < 0] = outside
    place[np.isnan(margins)] = absent
    counts = count(place[..., None], rows.group, n_codes=rows.n_groups, n_values=n_bins + 2)
    shares = share(counts[..., :absent])[..., :n_bins]
    columns = {
        "margin_bin": ((edges[:-1] + edges[1:]) / 2, "router margin, centre of the bin"),
        "margin_from": (edges[:-1], "lower edge of the bin"),
        "margin_to": (edges[1:], "upper edge of the bin"),
    }
    labels = {
        name: xr.Variable("margin_bin", values, {"long_name": long_name, "units": "logit"})
        for name, (values, long_name) in columns.items()
    }
    return rows.array(shares, ("layer", "margin_bin"), "share of decisions", coords=labels).rename("margin_histogram")


def specialization(
    routing: Routing, *, by: By = "domain", level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """Which experts a group of tokens prefers.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    by : name of the coord on ``token`` that makes the groups, or several names.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset (by, layer, expert), units "1": ``share`` of the group's assignments that the expert took; ``lift``, that
    share over the expert's load on all tokens (NaN where that is 0); ``share_lower``, ``share_upper``, ``lift_lower``
    and ``lift_upper``, NaN for a group of fewer than 2 documents; and ``n_documents`` (by).

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than one resample.

    Notes
    -----
    OLMoE (arXiv 2409.02060) Eq. 7, divided by k so that shares sum to 1. All documents are resampled at once:
    numerator and denominator of the lift come from the same draw, and a group's size varies with it. An expert that
    the group never chose has the rule of three as its upper bound, see :func:`load_interval`.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    counts = rows.group_counts()
    load, shares = share(counts.sum(axis=0)), share(counts)
    bounds, n_documents = _specialization_bounds(rows, load, bootstrap)
    columns = {
        "share": (shares, "share of the group's assignments to the expert"),
        "lift": (divide(shares, load), "share in the group over load on all tokens"),
        "share_lower": (bounds[0], "lower bound of the share"),
        "share_upper": (bounds[1], "upper bound of the share"),
        "lift_lower": (bounds[2], "lower bound of the lift"),
        "lift_upper": (bounds[3], "upper bound of the lift"),
    }
    dims = ("layer", "expert")
    variables = {name: rows.array(values, dims, long_name) for name, (values, long_name) in columns.items()}
    variables["n_documents"] = rows.array(n_documents, (), "documents with a token", "document")
    return xr.Dataset(variables, attrs=bootstrap.attributes)


def top_tokens(routing: Routing, *, n: int = 10, min_count: int = 20) -> xr.Dataset:
    """The tokens that each expert attracts most.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot) and ``token_id`` (token), or a recording that holds it.
    n : how many tokens an expert gets at most.
    min_count : how often a token must occur in the recording to be considered.

    Returns
    -------
    Dataset (row), a flat table, since an expert may have fewer than ``n`` tokens. Coords: ``layer``,
    ``attention_kind``, ``expert``, ``rank`` (from 1) and ``token_id``. Variables: ``count``, how often the expert took
    the token; ``occurrences`` of the token; ``share``, the first over the second; ``lift``, that share over the share
    of all tokens that the expert took. Sorted by layer, expert and rank: by lift, then count, then the smaller id.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        If ``n`` or ``min_count`` is less than 1.

    Notes
    -----
    The floor is that of vocabulary specialisation, Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), §5.4: a token
    that occurs once goes to one expert all of the time, so without a floor the rarest tokens lead every list. At 20
    occurrences a share has a standard error of at most 0.11. In any case the expert took the token at least twice.
    """
    for name, value in {"n": n, "min_count": min_count}.items():
        if value < 1:
            raise ProbeError(f"{name} is {value}, it must be at least 1")
    rows = grouped(routing)
    ids, code, occurrences = np.unique(rows.values("token_id"), return_inverse=True, return_counts=True)
    frequent = occurrences >= min_count
    kept = frequent[code]
    code = (np.cumsum(frequent) - 1)[code[kept]]
    ids, occurrences = ids[frequent], occurrences[frequent]
    taken = divide(rows.group_counts()[0], np.asarray(len(rows.group)))

    picks: list[tuple[int, int, int, int, int]] = []
    for layer in range(rows.n_layers):
        counts = count(rows.chosen[kept, layer, None], code, n_codes=len(ids), n_values=rows.n_experts)[:, 0]
        for expert in range(rows.n_experts):
            best = _most_attracted(counts[:, expert], occurrences, n)
            picks += [(layer, expert, rank, entry, counts[entry, expert]) for rank, entry in enumerate(best, start=1)]
    return _token_table(rows.routing, picks, ids, occurrences, taken)


def _max_violation(load: np.ndarray) -> np.ndarray:
    return load.shape[-1] * load.max(axis=-1) - 1


def _gini(load: np.ndarray) -> np.ndarray:
    n_experts = load.shape[-1]
    rank = np.arange(1, n_experts + 1)
    return ((2 * rank - n_experts - 1) * np.sort(load, axis=-1)).sum(axis=-1) / n_experts


def _normalized_entropy(load: np.ndarray) -> np.ndarray:
    if load.shape[-1] == 1:
        return np.full(load.shape[:-1], np.nan)
    log_load = np.log(load, out=np.zeros_like(load), where=load != 0)
    return -(load * log_load).sum(axis=-1) / np.log(load.shape[-1])


def _load_deviation(per_document: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    """The difference that no expert's load exceeds in a share ``level`` of resamples, (layer,)."""
    if len(per_document) < 2:
        return np.full(per_document.shape[1], np.nan)
    resampled = share(resampled_sums(bootstrap.weights(len(per_document)), per_document))
    deviation = np.abs(resampled - share(per_document.sum(axis=0))).max(axis=-1)
    return np.quantile(deviation, bootstrap.level, axis=0)


def _uniform_max_violation(n_tokens: int, n_experts: int, top_k: int, bootstrap: Bootstrap) -> tuple[float, float]:
    """Mean and 97.5 % quantile of the maximum violation when independent tokens meet a uniform router."""
    if n_tokens == 0:
        return np.nan, np.nan
    chances = np.full(n_experts, 1 / n_experts)
    random = np.random.default_rng(bootstrap.seed)
    counts = random.multinomial(n_tokens * top_k, chances, size=bootstrap.n_resamples)
    # the k choices of one token differ, which shrinks every variance and covariance by the same factor
    shrinkage = np.sqrt((n_experts - top_k) / max(n_experts - 1, 1))
    violation = shrinkage * _max_violation(share(counts))
    return float(violation.mean()), float(np.quantile(violation, 0.975))


def _margin_edges(margins: np.ndarray, bins: int | Sequence[float]) -> np.ndarray:
    if isinstance(bins, int | np.integer):
        if bins < 1:
            raise ProbeError(f"bins is {bins}, it must be at least 1")
        largest = np.max(margins, where=~np.isnan(margins), initial=0)
        return np.linspace(0, largest or 1, bins + 1)
    edges = np.asarray(bins, float)
    if edges.ndim != 1 or len(edges) < 2 or not np.all(np.diff(edges) > 0):
        raise ProbeError(f"bins must be a number or at least two rising edges, got {bins!r}")
    return edges


def _specialization_bounds(rows: Rows, load: np.ndarray, bootstrap: Bootstrap) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of share and lift, (lower share, upper share, lower lift, upper lift), and each group's documents."""
    bounds = np.full((4, rows.n_groups, rows.n_layers, rows.n_experts), np.nan)
    n_documents = np.zeros(rows.n_groups, np.int64)
    samples, sample = np.unique(rows.sample, return_inverse=True)
    if not len(samples):
        return bounds, n_documents
    weights = bootstrap.weights(len(samples))
    overall = share(resampled_sums(weights, rows.document_counts(np.arange(len(sample)))))
    for group, tokens in rows.each_group():
        documents = np.unique(sample[tokens])
        n_documents[group] = len(documents)
        if len(documents) < 2:
            continue
        per_document = rows.document_counts(tokens)
        resampled = resampled_sums(weights[:, documents], per_document)
        lower, upper = bootstrap.share_bounds(per_document, resampled)
        lift_lower, lift_upper = bootstrap.percentiles(divide(share(resampled), overall))
        unseen = per_document.sum(axis=0) == 0
        bounds[:, group] = lower, upper, lift_lower, np.where(unseen, divide(upper, load), lift_upper)
    return bounds, n_documents


def _most_attracted(counts: np.ndarray, occurrences: np.ndarray, n: int) -> np.ndarray:
    """The entries of which an expert took the largest share; of equals the more frequent, then the first leads."""
    candidates = np.flatnonzero(counts >= 2)
    taken = counts[candidates]
    order = np.lexsort((candidates, -taken, -taken / occurrences[candidates]))
    return candidates[order[:n]]


def _token_table(
    routing: xr.Dataset,
    picks: Sequence[tuple[int, int, int, int, int]],
    ids: np.ndarray,
    occurrences: np.ndarray,
    taken: np.ndarray,
) -> xr.Dataset:
    """The table of picks (layer, expert, rank, entry, count); ``taken`` (layer, expert) is the share of all tokens."""
    layer, expert, rank, entry, number = np.array(picks, np.int64).reshape(-1, 5).T
    shares = divide(number, occurrences[entry])
    coords = {
        name: xr.Variable("row", label.values[place], label.attrs)
        for dim, place in {"layer": layer, "expert": expert}.items()
        for name, label in coords_on(routing, (dim,)).items()
    }
    columns = {
        "rank": (rank, "rank of the token for the expert, from 1", "1"),
        "token_id": (ids[entry], "id in the tokenizer's vocabulary", "1"),
        "count": (number, "how often the expert took the token", "token"),
        "occurrences": (occurrences[entry], "how often the token occurs", "token"),
        "share": (shares, "share of the token's occurrences that the expert took", "1"),
        "lift": (divide(shares, taken[layer, expert]), "share over the expert's share of all tokens", "1"),
    }
    table = {
        name: xr.Variable("row", values, {"long_name": long_name, "units": units})
        for name, (values, long_name, units) in columns.items()
    }
    return xr.Dataset(table, coords).set_coords(["rank", "token_id"])
