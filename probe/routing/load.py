"""How the experts are loaded, and how evenly; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import xarray as xr
from scipy.special import softmax

from probe import schema
from probe.bootstrap import INTERVAL_STATUS, MIN_DOCUMENTS, Bootstrap, effective_number, resampled_sums, share
from probe.routing.rows import By, Routing, Rows, grouped
from probe.schema import ProbeError, SchemaError


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
    Dataset of ``load``, ``lower`` and ``upper`` ([by,] layer, expert), units "1"; ``interval_status``, codes that say
    whether and why bounds are withheld (NaN); and ``n_documents`` ([by]), the samples with a token in the group.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    N_e / (T·k) with the interval of Korn & Graubard 1998: Clopper–Pearson for as many independent choices as the
    tokens are worth, by the variance of the load over resampled documents, with Student's t for few documents. For
    k > 1 the choice is a token's, to have the expert or not. Withheld below 5 documents (or 3 in effect), and where the
    tokens of the rarer side (the expert's, or all others') come from fewer than 4 documents in effect,
    (Σ n_d)² / Σ n_d² (of few documents: from fewer than 4 in 10): there such intervals cover less than 90 %. An expert
    that took no token
    has the lower bound 0 and the rule of three as its upper bound, 3 / n_eff at 95 %, n_eff being T·k over the median
    design effect of the layer's other experts.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    counts = np.zeros((rows.n_groups, rows.n_layers, rows.n_experts), np.int64)
    bounds = np.empty((2, *counts.shape))
    status = np.empty(counts.shape, np.uint8)
    n_documents = np.zeros(rows.n_groups, np.int64)
    for group, _, per_document in rows.documents():
        counts[group] = per_document.sum(axis=0)
        bounds[0, group], bounds[1, group], status[group] = bootstrap.share_interval(per_document, top_k=rows.top_k)
        n_documents[group] = len(per_document)
    dims = ("layer", "expert")
    return xr.Dataset(
        {
            "load": rows.array(share(counts), dims, "share of assignments to the expert"),
            "lower": rows.array(bounds[0], dims, "lower bound of the load"),
            "upper": rows.array(bounds[1], dims, "upper bound of the load"),
            "interval_status": interval_status(rows, status),
            "n_documents": rows.array(n_documents, (), "documents with a token", "document"),
        },
        attrs=bootstrap.attributes,
    )


def interval_status(rows: Rows, status: np.ndarray) -> xr.DataArray:
    """Label the status of intervals (group, layer, expert); the categories say what the codes mean."""
    result = rows.array(status, ("layer", "expert"), "whether bounds are given, and if not, why")
    return result.assign_attrs(categories=list(INTERVAL_STATUS))


def document_load(samples: xr.Dataset | xr.DataTree, *, sample: int, layer: int, level: float = 0.95) -> xr.Dataset:
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
    interval of ``overall`` that resamples documents, NaN where it is withheld (see :func:`load_interval`). ``top_k``
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
    top_k = int(counts.sum() // max(int(samples["n_tokens"].sum()), 1))
    interval = Bootstrap(level).share_interval(filled[:, None, :], top_k=max(top_k, 1))
    lower, upper, _ = (part[0] for part in interval)
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
            "top_k": top_k,
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
    Dataset ([by,] layer), units "1": ``max_violation``, ``coefficient_of_variation``, ``gini`` and
    ``normalized_entropy`` (NaN for a single expert), each with ``…_lower`` and ``…_upper`` (NaN for fewer than 5
    documents); ``max_violation_null`` and ``max_violation_null_upper``, the uniform router's mean and 97.5 % quantile.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than one resample.

    Notes
    -----
    max_violation = max_e N_e / mean_e N_e - 1, arXiv 2408.15664 Eq. 4. The maximum of noisy loads is biased upwards
    and resampling adds noise, so percentiles can lie above the estimate and the truth. The interval is instead
    max_violation ± c·E: c is the quantile at ``level``, over resampled documents, of the largest difference that any
    expert's load makes to the estimate, and the maximum cannot move further than that. It errs on the wide side.

    The other three are smooth functions of the loads, and noise makes them look less even as well: their bounds are
    corrected for that bias, see ``probe.bootstrap.Bootstrap.bounds``.

    The null is for as many *independent* tokens as were recorded. Tokens of one document are not independent, so a
    router that is uniform in the long run may lie above the null; its interval then reaches down to 0.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    shape = (rows.n_groups, rows.n_layers)
    counts = np.zeros((*shape, rows.n_experts), np.int64)
    columns: dict[str, np.ndarray] = {}
    for name in _EVENNESS:
        columns |= {part: np.full(shape, np.nan) for part in (name, f"{name}_lower", f"{name}_upper")}
    null = np.full((*shape, 2), np.nan)
    for group, _, per_document in rows.documents():
        counts[group] = per_document.sum(axis=0)
        n_tokens = int(counts[group, :1].sum()) // rows.top_k
        null[group] = _uniform_max_violation(n_tokens, rows.n_experts, rows.top_k, bootstrap)
        for name, bounds in _evenness_bounds(per_document, rows.top_k, bootstrap).items():
            columns[f"{name}_lower"][group], columns[f"{name}_upper"][group] = bounds
    variables = {}
    for name, (measure, long_name) in _EVENNESS.items():
        columns[name] = measure(share(counts))
        for part, words in {"": "", "_lower": "lower bound: ", "_upper": "upper bound: "}.items():
            variables[name + part] = rows.array(columns[name + part], ("layer",), words + long_name)
    nulls = {
        "max_violation_null": "mean maximum violation of a uniform router, independent tokens",
        "max_violation_null_upper": "97.5 % quantile of a uniform router, independent tokens",
    }
    for at, (name, long_name) in enumerate(nulls.items()):
        variables[name] = rows.array(null[..., at], ("layer",), long_name)
    return xr.Dataset(variables, attrs=bootstrap.attributes)


def balance_loss(
    routing: Routing, *, by: By = None, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """The load-balancing loss of the router as it stands: 1 where load or probabilities are even.

    Parameters
    ----------
    routing : a recording; or its ``/routing`` if that holds ``all_logits``.
    by : name of a coord on ``token`` to split by, or several names. Without ``all_logits`` it may only tell whole
        documents apart, such as "domain": their summed probabilities are all that was recorded.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset ([by,] layer), units "1": ``balance_loss``, ``lower`` and ``upper`` (NaN for fewer than 5 documents), and
    ``n_documents`` ([by]).

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        If ``by`` splits documents of a recording without ``all_logits``.

    Notes
    -----
    E · Σ_e f_e · P_e, where f_e is the expert's share of assignments and P_e its mean softmax probability over all
    tokens. Fedus et al. 2021 (Switch), Eq. 4–6, without the coefficient α; OLMoE (arXiv 2409.02060) Eq. 3 has the same
    value times k. Training averages it over batches, each less even than all tokens together, so a training log shows
    more. The bounds are corrected for the bias that noise brings.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    shape = (rows.n_groups, rows.n_layers)
    loss, lower, upper = np.full((3, *shape), np.nan)
    n_documents = np.zeros(rows.n_groups, np.int64)
    for group, counts, probability in _counts_and_probabilities(routing, rows):
        n_documents[group] = len(counts)
        loss[group] = _balance_loss(counts.sum(axis=0), probability.sum(axis=0))
        if len(counts) >= MIN_DOCUMENTS:
            weights = bootstrap.weights(len(counts))
            resampled = _balance_loss(resampled_sums(weights, counts), resampled_sums(weights, probability))
            n_effective = effective_number(counts.sum(axis=-1))
            bounds = bootstrap.bounds(loss[group], resampled, n_effective)
            lower[group], upper[group] = np.clip(bounds, 0, rows.n_experts)
    return xr.Dataset(
        {
            "balance_loss": rows.array(loss, ("layer",), "load-balancing loss"),
            "lower": rows.array(lower, ("layer",), "lower bound of the load-balancing loss"),
            "upper": rows.array(upper, ("layer",), "upper bound of the load-balancing loss"),
            "n_documents": rows.array(n_documents, (), "documents with a token", "document"),
        },
        attrs=bootstrap.attributes,
    )


def _balance_loss(counts: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """From sums over tokens (…, layer, expert) of assignments and probabilities."""
    return counts.shape[-1] * (share(counts) * share(probability)).sum(axis=-1)


def _counts_and_probabilities(routing: Routing, rows: Rows) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Every group's number with its documents' assignments and summed probabilities, each (document, layer, expert)."""
    if "all_logits" in rows.routing:
        yield from _from_logits(rows)
        return
    if not isinstance(routing, xr.DataTree):
        raise SchemaError(
            "the probabilities of all experts are not in this Dataset: pass the whole recording, or record with "
            "RoutingSpec(all_logits=True)"
        )
    samples = schema.group(routing, "samples")
    schema.require(samples, "expert_count", "probability_sum")
    dims = ("sample", "layer", "expert")
    whole, probability = (samples[name].transpose(*dims).values for name in ("expert_count", "probability_sum"))
    for group, sample, counts in rows.documents():
        if not np.array_equal(counts, whole[sample]):
            raise ProbeError(
                f"by={list(rows.group_coords)} splits documents, or /routing holds only a part of them, and the "
                "probabilities of a document were recorded as one sum: take whole documents, or record with "
                "RoutingSpec(all_logits=True)"
            )
        yield group, counts, probability[sample].astype(np.float64)


def _from_logits(rows: Rows) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    # One layer after another, for a stretch of the logits of all layers and experts is too large.
    layers = [replace(rows, routing=rows.routing.isel(layer=[layer]), ungrouped=None) for layer in range(rows.n_layers)]
    of_layers = zip(*(layer.document_sums(_probabilities, n_columns=rows.n_experts) for layer in layers), strict=True)
    for (group, _, counts), sums in zip(rows.documents(), of_layers, strict=True):
        yield group, counts, np.concatenate([of_layer for _, _, of_layer in sums], axis=1)


def _probabilities(block: Rows) -> np.ndarray:
    """Softmax of the raw logits, (token, layer, expert)."""
    return softmax(block.values("all_logits").astype(np.float64), axis=-1)


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


def _coefficient_of_variation(load: np.ndarray) -> np.ndarray:
    return load.shape[-1] * load.std(axis=-1)


_EVENNESS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "max_violation": (_max_violation, "largest load over mean load, minus 1"),
    "coefficient_of_variation": (_coefficient_of_variation, "standard deviation of the loads over mean"),
    "gini": (_gini, "Gini coefficient of the loads"),
    "normalized_entropy": (_normalized_entropy, "entropy of the loads over that of equal loads"),
}
"""Measures of loads (…, expert), by name."""


def _evenness_bounds(
    per_document: np.ndarray, top_k: int, bootstrap: Bootstrap
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bounds (layer,) of every measure from counts (document, layer, expert); none for fewer than 5 documents."""
    if len(per_document) < MIN_DOCUMENTS:
        return {}
    load, drawn = share(per_document.sum(axis=0)), share(bootstrap.resample(per_document))
    n_effective = effective_number(per_document.sum(axis=-1))
    n_experts = load.shape[-1]
    most_uneven = np.append(np.full(top_k, 1 / top_k), np.zeros(n_experts - top_k))
    result = {}
    for name, (measure, _) in _EVENNESS.items():
        if name == "max_violation":
            reach = n_experts * bootstrap.largest_deviation(per_document)
            lower, upper = measure(load) - reach, measure(load) + reach
        else:
            lower, upper = bootstrap.bounds(measure(load), measure(drawn), n_effective)
        even, uneven = measure(np.full(n_experts, 1 / n_experts)), measure(most_uneven)
        result[name] = (
            lower.clip(min(even, uneven), max(even, uneven)),
            upper.clip(min(even, uneven), max(even, uneven)),
        )
    return result


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
