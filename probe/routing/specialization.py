"""Which experts a group of tokens prefers; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr

from probe.bootstrap import (
    GIVEN,
    MIN_DOCUMENTS,
    UNUSED,
    Bootstrap,
    divide,
    effective_number,
    resampled_sums,
    share,
)
from probe.counting import count
from probe.routing.load import interval_status
from probe.routing.permutation import Documents, Permutations, chosen_experts, label_sums, layer_batches
from probe.routing.rows import By, GroupDocuments, Routing, Rows, grouped, members

DOCUMENTS_AT_ONCE = 1024

SMALLEST_RESIDUAL = 1e-6
"""Of what documents differ, the least that is taken to be left within groups."""


def specialization(
    routing: Routing,
    *,
    by: By = "domain",
    level: float = 0.95,
    n_resamples: int = 1000,
    n_permutations: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Which experts a group of tokens prefers.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    by : name of the coord on ``token`` that makes the groups, or several names.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    n_permutations : how many times labels are exchanged for the p-values; 0 leaves these NaN.
    seed : of both.

    Returns
    -------
    Dataset (by, layer, expert), units "1": ``share`` of the group's assignments that the expert took; ``lift``, that
    share over the expert's load on all tokens (NaN where that is 0); ``share_lower``, ``share_upper``, ``lift_lower``
    and ``lift_upper``, NaN where ``interval_status`` says that they are withheld; ``p_value``; and ``n_documents``
    (by), the samples with a token in the group.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1), fewer than two resamples or a negative number of permutations.

    Notes
    -----
    OLMoE (arXiv 2409.02060) Eq. 7, divided by k so that shares sum to 1.

    All documents are resampled at once: numerator and denominator of the lift come from the same draw, and a group's
    size varies with it. The bounds of a share are those of :func:`load_interval`, those of a lift multiply and divide
    it by one factor. An expert that the group never chose has the lift's lower bound 0, and as upper bound that of
    the share (rule of three) over the load. All bounds are withheld below 5 documents in the group.

    ``p_value`` asks whether the group takes the expert as often as any tokens would, and is adjusted for all cells
    (by × layer × expert) at once by max-T (Westfall & Young 1993): among experiments without any preference, at most
    a share p has a cell with a p-value as small. The statistic is the number of assignments, minus those expected of
    as many, over what documents of one group (or, where labels vary within documents, shuffled labels) make it vary;
    every permutation is needed once, for its largest absolute value, and no table of permutations × cells is ever in
    memory.

    Where ``by`` is the same throughout every sample, whole documents swap groups. Where it varies within samples
    (phase, token id, or domain and phase together), labels are shuffled among the tokens of each document, and
    only a preference within documents is tested; see ``probe.routing.permutation``. NaN where permutation
    changes nothing: an expert that was never used, a single group, groups that are single documents.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    permutations = Permutations(n_permutations, seed)
    rows = grouped(routing, by)
    documents = Documents.of(rows)
    shape = (rows.n_groups, rows.n_layers, rows.n_experts)
    counts, n_documents = np.zeros(shape, np.int64), np.zeros(rows.n_groups, np.int64)
    bounds, status = np.full((4, *shape), np.nan), np.zeros(shape, np.uint8)
    deviation, largest = np.full(shape, np.nan), np.zeros(n_permutations)
    for layers, part in layer_batches(rows, max(documents.n_documents, rows.n_groups)):
        whole = part.whole
        for own in _by_group(part, whole, documents, bootstrap):
            counts[own.group, layers], n_documents[own.group] = own.counts, own.n_documents
            bounds[:, own.group, layers], status[own.group, layers] = own.bounds, own.status
        if n_permutations:
            deviation[:, layers], maxima = _deviations(part, whole, documents, counts[:, layers], permutations)
            largest = np.maximum(largest, maxima)
    columns = {
        "share": (share(counts), "share of the group's assignments to the expert"),
        "lift": (divide(share(counts), share(counts.sum(axis=0))), "share in the group over load on all tokens"),
        "share_lower": (bounds[0], "lower bound of the share"),
        "share_upper": (bounds[1], "upper bound of the share"),
        "lift_lower": (bounds[2], "lower bound of the lift"),
        "lift_upper": (bounds[3], "upper bound of the lift"),
        "p_value": (permutations.p_value(np.abs(deviation), largest), "p-value of the lift, for all cells at once"),
    }
    dims = ("layer", "expert")
    variables = {name: rows.array(values, dims, long_name) for name, (values, long_name) in columns.items()}
    variables["interval_status"] = interval_status(rows, status)
    variables["n_documents"] = rows.array(n_documents, (), "documents with a token", "document")
    return xr.Dataset(variables, attrs={**bootstrap.attributes, "n_permutations": n_permutations})


class _OfGroup(NamedTuple):
    """What is known of one group; all arrays have the dims (layer, expert)."""

    group: int
    counts: np.ndarray
    """Assignments."""
    n_documents: int
    bounds: np.ndarray
    """(4, layer, expert): lower and upper bound of the share, then of the lift."""
    status: np.ndarray


def _by_group(rows: Rows, whole: GroupDocuments, documents: Documents, bootstrap: Bootstrap) -> Iterator[_OfGroup]:
    """Every group; ``whole`` are the documents of all groups together."""
    load = share(whole.counts.sum(axis=0))
    weights = overall = None
    if len(whole.sample) >= MIN_DOCUMENTS:
        weights = bootstrap.weights(len(whole.sample))
        overall = share(resampled_sums(weights, whole.counts))
    for group, sample, per_document in _group_documents(rows, whole, documents):
        counts = per_document.sum(axis=0)
        bounds = np.full((4, *counts.shape), np.nan)
        resampled = None
        if weights is not None and overall is not None and len(sample) >= MIN_DOCUMENTS:
            resampled = resampled_sums(weights[:, np.searchsorted(whole.sample, sample)], per_document)
            n_effective = effective_number(per_document.sum(axis=-1))[:, None]
            drawn = divide(share(resampled), overall)
            bounds[2:] = bootstrap.factor_bounds(divide(share(counts), load), drawn, n_effective)
        bounds[0], bounds[1], status = bootstrap.share_bounds(per_document, resampled, top_k=rows.top_k)
        # Nothing varies between draws where the group took an expert never, or always: there the share's bounds speak.
        never, always = (status == UNUSED) & (counts == 0), (status == UNUSED) & (counts > 0) & (load < 1)
        of_share = divide(bounds[:2], load)
        bounds[2:, never] = of_share[:, never]
        bounds[2, always] = np.minimum(bounds[2], of_share[0])[always]
        bounds[2:, (status != GIVEN) & (status != UNUSED)] = np.nan
        bounds[3] = np.minimum(bounds[3], divide(np.ones_like(load), rows.top_k * load))  # a share is at most 1 / k
        yield _OfGroup(group, counts, len(sample), bounds, status)


def _group_documents(rows: Rows, whole: GroupDocuments, documents: Documents) -> Iterator[GroupDocuments]:
    """The documents of every group; where a document lies in one group they are not counted a second time."""
    if documents.label is None:
        yield from rows.documents()
        return
    for group, own in members(documents.label, rows.n_groups):
        yield GroupDocuments(group, whole.sample[own], whole.counts[own])


def _deviations(
    rows: Rows, whole: GroupDocuments, documents: Documents, counts: np.ndarray, permutations: Permutations
) -> tuple[np.ndarray, np.ndarray]:
    """Standardised deviations (group, layer, expert), and under every permutation the largest absolute one."""
    none = np.full(counts.shape, np.nan), np.zeros(permutations.n_permutations)
    if not documents.exchangeable:
        return none
    if documents.label is None:
        deviation_of = _within_documents(rows, whole, documents)
    else:
        deviation_of = _between_documents(whole, documents.label, rows.n_groups)
    observed = deviation_of(counts)
    if np.isnan(observed).all():
        return none
    permuted = _permuted_counts(rows, whole, documents, permutations)
    return observed, np.array([np.nanmax(np.abs(deviation_of(drawn))) for drawn in permuted])


def _permuted_counts(
    rows: Rows, whole: GroupDocuments, documents: Documents, permutations: Permutations
) -> Iterator[np.ndarray]:
    """Assignments (group, layer, expert) after labels were exchanged, once for every permutation."""
    if documents.label is not None:
        yield from label_sums(permutations.document_labels(documents.label), whole.counts, rows.n_groups)
        return
    chosen = chosen_experts(rows)
    for label in permutations.token_labels(rows.group, documents.of_token):
        yield count(chosen, label, n_codes=rows.n_groups, n_values=rows.n_experts)


def _between_documents(whole: GroupDocuments, label: np.ndarray, n_groups: int) -> Callable[[np.ndarray], np.ndarray]:
    """Standardise counts of groups (group, layer, expert) by how much documents of one group differ.

    A document adds to its group what it took of an expert beyond the overall load, r = N_de - f_e·N_d. Σ r² over all
    documents is the same however they are labelled; what is left of it within groups, Σ r² - Σ_g (Σ r)² / D_g, is the
    residual of an analysis of variance. It does not count the differences between groups as noise, so that a group with
    a strong taste does not hide the smaller ones of others.
    """
    total = whole.counts.sum(axis=0)
    n_assignments = total.sum(axis=-1, keepdims=True)
    load = share(total)
    squares = np.zeros(total.shape)
    for start in range(0, len(whole.counts), DOCUMENTS_AT_ONCE):
        some = whole.counts[start : start + DOCUMENTS_AT_ONCE]
        # in whole numbers, so that documents that all agree have no variance at all
        beyond = some * n_assignments - total * some.sum(axis=-1, keepdims=True)
        squares += np.square(divide(beyond, n_assignments)).sum(axis=0)
    size, n_documents = np.bincount(label, minlength=n_groups)[:, None, None], len(label)
    spread = divide(size * (n_documents - size), np.asarray(n_documents * (n_documents - 1)))

    def deviation_of(counts: np.ndarray) -> np.ndarray:
        beyond = counts - load * counts.sum(axis=-1, keepdims=True)
        between = np.nansum(divide(np.square(beyond), size), axis=0)
        # Groups that differ in everything leave nothing within, but for rounding.
        within = np.maximum(squares - between, SMALLEST_RESIDUAL * squares)
        return divide(beyond, np.sqrt(spread * within))

    return deviation_of


def _within_documents(rows: Rows, whole: GroupDocuments, documents: Documents) -> Callable[[np.ndarray], np.ndarray]:
    """Standardise counts of groups (group, layer, expert) as sums over labels shuffled within documents.

    In a document of n tokens, c of which chose the expert, the number of choices by n_g shuffled tokens is
    hypergeometric: mean n_g·c/n, variance n_g (n - n_g) / (n - 1) · c/n · (1 - c/n). Documents are independent.
    """
    tokens = documents.tokens(rows.group, rows.n_groups)
    n_tokens = tokens.sum(axis=1)
    chance = (whole.counts / n_tokens[:, None, None]).reshape(len(n_tokens), -1)
    expected = (tokens.T @ chance).reshape(rows.n_groups, rows.n_layers, rows.n_experts)
    of_entry = n_tokens[tokens.tocoo().row]
    tokens.data = tokens.data * (of_entry - tokens.data) / np.maximum(of_entry - 1, 1)
    deviation = np.sqrt(tokens.T @ (chance * (1 - chance))).reshape(expected.shape)
    return lambda counts: divide(counts - expected, deviation)
