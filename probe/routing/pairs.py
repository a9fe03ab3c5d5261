"""Two recordings of the same tokens, decision by decision; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from probe import schema
from probe.bootstrap import MIN_CARRYING, MIN_DOCUMENTS, Bootstrap, carrying, effective_number, resampled_sums, share
from probe.routing.rows import By, GroupDocuments, Routing, Rows, grouped
from probe.routing.similarity import compact, divergence, first_difference, require_same_experts, samples_of
from probe.schema import ProbeError

TIE = float(np.finfo(np.float16).smallest_subnormal)
"""The smallest margin that is stored as more than 0."""

MARGIN_EDGES = (0.0, TIE, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, np.inf)
"""Edges of the bins of margins, in logits: the same for every comparison, ties by themselves."""

REMEDY = "compare recordings of the same tokens"

Texts = tuple[xr.Dataset | None, xr.Dataset | None]
"""``/samples`` of two recordings, None for a bare ``/routing``."""


def flips(
    a: Routing, b: Routing, *, by: By = None, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How often a token goes to other experts in one recording than in another of the same tokens.

    Parameters
    ----------
    a, b : Datasets with ``expert_index`` (token, layer, slot), or recordings that hold them.
    by : name of a coord on ``token`` of ``a`` to split by, or several names.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset, units "1": ``flips`` ([by,] layer), the share of decisions whose set of chosen experts differs, with its
    bounds ``lower`` and ``upper``; ``token_flips`` ([by]), the share of tokens of which any layer differs, with
    ``token_lower`` and ``token_upper``; and ``n_documents`` ([by]). NaN for a group without a token; bounds are NaN
    for fewer than 5 documents, and where the flips (or the rest) come from fewer than 4 in effect.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        If the recordings do not hold the same tokens, layers, experts and top-k: names what differs, in both; for a
        level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    Slots may change places: sets are compared, not their order. R3 (arXiv 2510.11370) finds 10 % of decisions and 94 %
    of tokens flipped between two engines. Intervals are paired: what is resampled are a document's flips.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    return _flips(paired(a, b, by), bootstrap)


def saturation(
    checkpoint: Routing,
    final: Routing,
    *,
    by: By = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How many of a token's experts an earlier checkpoint has in common with the final one.

    Parameters
    ----------
    checkpoint, final : Datasets with ``expert_index`` (token, layer, slot) of the same tokens, or recordings.
    by : name of a coord on ``token`` of ``checkpoint`` to split by, or several names.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset ([by,] layer), units "1": ``saturation``, the mean share of experts in common, its bounds ``lower`` and
    ``upper`` (NaN where :func:`flips` has none), and ``null``, what independent choices would have in common; also
    ``n_documents`` ([by]). NaN for a group without a token.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        If the recordings do not hold the same tokens, layers, experts and top-k: names what differs, in both; for a
        level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    mean |E_t ∩ E_T| / k, Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), Eq. 5. The null is k · Σ_e f_e · F_e with
    the loads f and F of the two: k/E where either is even, more where both prefer the same experts.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    pair = paired(checkpoint, final, by)
    beside = pair.beside()

    def tally(block: Rows) -> tuple[slice, np.ndarray]:
        return slice(None), _shared(block, beside(block))

    found = _Shares.of(pair.first, pair.first.documents(tally, n_values=2), pair.first.n_layers, bootstrap)
    load, final_load = share(pair.first.group_counts()), share(pair.second.group_counts())
    columns = {
        "saturation": (found.share, "share of a token's experts that are the same in the final checkpoint"),
        "lower": (found.lower, "lower bound of the saturation"),
        "upper": (found.upper, "upper bound of the saturation"),
        "null": (pair.first.top_k * (load * final_load).sum(axis=-1), "saturation of independent choices"),
    }
    variables = {name: pair.first.array(values, ("layer",), long_name) for name, (values, long_name) in columns.items()}
    variables["n_documents"] = _n_documents(pair.first, found)
    return xr.Dataset(variables, attrs=bootstrap.attributes)


def compare(a: Routing, b: Routing, *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> xr.Dataset:
    """What changed from one recording to another of the same tokens, such as from BF16 to FP8.

    Parameters
    ----------
    a, b : Datasets with ``expert_index`` (token, layer, slot), or recordings that hold them; domains and
        ``router_margin`` are those of ``a``.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling, and of the relabelling behind ``divergence_null``.

    Returns
    -------
    Dataset, units "1" unless said otherwise. Each share has bounds, ``…_lower`` and ``…_upper``, NaN where
    :func:`flips` has none:

    - all that :func:`flips` returns: ``flips`` with ``lower`` and ``upper``, ``token_flips``, ``n_documents``;
    - ``flips_by_domain`` (domain, layer), and ``n_documents_by_domain`` (domain);
    - ``flips_by_margin`` (margin_bin, layer), and ``n_by_margin``, the decisions in the bin; ``margin_bin`` says the
      bin in words, the coords ``margin_from`` and ``margin_to`` (logit) are its edges, of which it holds the lower.
      Bins are the same for every comparison: ties by themselves, then two to a decade. A decision without a margin
      (every expert is chosen), or whose expert was forced on it (a margin below 0), is in none;
    - ``load_shift`` (layer, expert), the load in ``b`` minus that in ``a``; its bounds are NaN for fewer than 5
      documents, and for an expert whose assignments come from fewer than 4 in effect;
    - ``divergence`` (layer), the Jensen–Shannon divergence of the two loads (nat), with ``divergence_null``, its mean
      when the two recordings of a document swap at random, which is its noise floor, and ``divergence_p_value``.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        If the recordings do not hold the same tokens, layers, experts and top-k: names what differs, in both; for a
        level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    Everything is paired: a drawn document counts in both recordings. Bounds hold for one number at a time, those of
    ``load_shift`` for one expert of one layer. See :func:`flips` and :func:`divergence`.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    pair = paired(a, b)
    schema.require(pair.first.routing, "router_margin")
    by_domain = _flips(pair.split("domain"), bootstrap)
    between = divergence(a, b, by=None, level=level, n_resamples=n_resamples, seed=seed)
    further = {
        "flips_by_domain": by_domain["flips"],
        "flips_by_domain_lower": by_domain["lower"],
        "flips_by_domain_upper": by_domain["upper"],
        "n_documents_by_domain": by_domain["n_documents"],
        **_flips_by_margin(pair, bootstrap),
        **_load_shift(pair, bootstrap),
        "divergence": between["jensen_shannon"],
        "divergence_lower": between["lower"],
        "divergence_upper": between["upper"],
        "divergence_null": between["null"],
        "divergence_p_value": between["p_value"],
    }
    return _flips(pair, bootstrap).assign(further).assign_attrs(between.attrs)


@dataclass(frozen=True)
class Pair:
    """The rows of two recordings of the same tokens, in the groups of the first; build it with :func:`paired`."""

    first: Rows
    second: Rows

    def beside(self) -> Callable[[Rows], Rows]:
        """What gives the second recording's block to each block of the first, as often as the first is gone through."""
        blocks: Iterator[Rows] = iter(())

        def of(block: Rows) -> Rows:
            nonlocal blocks
            if block.start == 0:
                blocks = self.second.blocks()
            return next(blocks)

        return of

    def split(self, by: By) -> Pair:
        """The same rows, split by coords on ``token`` of the first."""
        first = grouped(self.first.routing, by)
        return Pair(first, replace(self.second, group=first.group, group_coords=first.group_coords))


def paired(a: Routing, b: Routing, by: By = None) -> Pair:
    """Two recordings side by side, once it is sure that they hold the same tokens.

    Parameters
    ----------
    a, b : ``/routing`` Datasets, or recordings that hold them; ``/samples`` is looked at where both have it.
    by : a coord on ``token`` of ``a`` to split by, or several.

    Raises
    ------
    SchemaError
        If the group, a dim or a coord is missing; names it.
    ProbeError
        If layers, experts or top-k differ, or the tokens: names the first sample that does, and how.
    """
    first, second = grouped(a, by), grouped(b)
    schema.require(first.routing, "sample", "position", "token_id")
    schema.require(second.routing, "sample", "position", "token_id")
    require_same_experts(first, second)
    if first.top_k != second.top_k:
        raise ProbeError(
            f"a token chooses {first.top_k} experts in one recording and {second.top_k} in the other: "
            "compare recordings of the same top-k"
        )
    texts = samples_of(a), samples_of(b)
    _require_same_texts(first, second, texts)
    _require_same_rows(first, second, texts)
    return Pair(first, replace(second, group=first.group, group_coords=first.group_coords))


def _require_same_texts(first: Rows, second: Rows, texts: Texts) -> None:
    """Raise a ProbeError where ``/samples`` knows already that tokens differ: before any long pass."""
    here, there = texts
    if here is None or there is None:
        return
    lengths, other_lengths = (samples["n_tokens"].values.astype(np.int64) for samples in (here, there))
    n_samples = min(len(lengths), len(other_lengths))
    different = np.flatnonzero(lengths[:n_samples] != other_lengths[:n_samples])
    before = slice(0, int(different[0]) if len(different) else n_samples)
    other_text = here["text_sha256"].values[before] != there["text_sha256"].values[before]
    if other_text.any():
        # Not an error yet: the same tokens may have been recorded from a text here, from token ids there.
        sample = int(other_text.argmax())
        start = int(lengths[:sample].sum())
        place = slice(start, start + int(lengths[sample]))
        row = first_difference(*(grouped(rows.routing.isel(token=place)) for rows in (first, second)))
        if row is not None:
            raise _difference(start + row, first, second, texts)
    _require_same_lengths(lengths, other_lengths, texts)


def _require_same_rows(first: Rows, second: Rows, texts: Texts) -> None:
    """Raise a ProbeError unless both recordings hold the same tokens in the same rows."""
    row = first_difference(first, second)
    if row is not None:
        raise _difference(row, first, second, texts)
    if first.n_tokens != second.n_tokens:
        _require_same_lengths(_lengths(first), _lengths(second), texts)


def _difference(row: int, first: Rows, second: Rows, texts: Texts) -> ProbeError:
    """The error that names the sample of a row that is not the same token in both, and how they differ."""
    here, there = (
        {name: int(rows.routing[name][row].values) for name in ("sample", "position", "token_id")}
        for rows in (first, second)
    )
    if here["sample"] != there["sample"]:
        _require_same_lengths(_lengths(first), _lengths(second), texts)
    if (here["sample"], here["position"]) != (there["sample"], there["position"]):
        places = [f"position {place['position']} of {_title(place['sample'], texts)}" for place in (here, there)]
        return ProbeError(
            f"row {row} is {places[0]} in one recording and {places[1]} in the other: {REMEDY} in the same order"
        )
    return ProbeError(
        f"{_title(here['sample'], texts)} is another text: at position {here['position']} stands token id "
        f"{here['token_id']} in one recording and {there['token_id']} in the other: {REMEDY}"
    )


def _require_same_lengths(first: np.ndarray, second: np.ndarray, texts: Texts) -> None:
    """Raise a ProbeError that names the first sample whose number of tokens (sample,) differs."""
    n_samples = max(len(first), len(second))
    first, second = (np.pad(lengths, (0, n_samples - len(lengths))) for lengths in (first, second))
    if (differs := first != second).any():
        sample = int(differs.argmax())
        raise ProbeError(
            f"{_title(sample, texts)} holds {first[sample]} tokens in one recording and {second[sample]} in the other: "
            f"{REMEDY}"
        )


def _lengths(rows: Rows) -> np.ndarray:
    """How many tokens each sample has, (sample,)."""
    lengths = np.zeros(0, np.int64)
    for block in rows.blocks("sample", at_once=schema.ROWS_AT_ONCE):
        found = np.bincount(block.sample)
        n_samples = max(len(lengths), len(found))
        lengths, found = (np.pad(numbers, (0, n_samples - len(numbers))) for numbers in (lengths, found))
        lengths = lengths + found
    return lengths


def _title(sample: int, texts: Texts) -> str:
    """The sample with its name, with both names where the recordings do not agree."""
    known = [samples["name"].values for samples in texts if samples is not None]
    names = dict.fromkeys(f'"{name[sample]}"' for name in known if sample < len(name))
    return f"sample {sample}" + (f" ({', in the other '.join(names)})" if names else "")


@dataclass(frozen=True)
class _Shares:
    """A share of each group's tallies and its bounds, (group, layer)."""

    share: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    n_documents: np.ndarray
    """(group,)."""

    @classmethod
    def of(cls, rows: Rows, documents: Iterable[GroupDocuments], n_layers: int, bootstrap: Bootstrap) -> _Shares:
        """From documents that tally what does not hold (0) and what does (1)."""
        shares, lower, upper = np.full((3, rows.n_groups, n_layers), np.nan)
        n_documents = np.zeros(rows.n_groups, np.int64)
        for group, sample, counts in documents:
            interval = bootstrap.share_interval(counts)
            shares[group] = share(counts.sum(axis=0))[:, 1]
            lower[group], upper[group] = interval.lower[:, 1], interval.upper[:, 1]
            n_documents[group] = len(sample)
        return cls(shares, lower, upper, n_documents)


def _n_documents(rows: Rows, shares: _Shares) -> xr.DataArray:
    return rows.array(shares.n_documents, (), "documents with a token", "document")


def _shared(first: Rows, second: Rows) -> np.ndarray:
    """Is the expert of each slot among those that the second recording chose? (token, layer, slot)."""
    chosen, other = first.chosen, second.chosen
    shared = np.zeros(chosen.shape, bool)
    for slot in range(first.top_k):
        for other_slot in range(first.top_k):
            shared[..., slot] |= chosen[..., slot] == other[..., other_slot]
    return shared


def _flipped(first: Rows, second: Rows) -> np.ndarray:
    """Does the set of chosen experts differ? (token, layer)."""
    return np.asarray(~_shared(first, second).all(axis=-1))


def _flips(pair: Pair, bootstrap: Bootstrap) -> xr.Dataset:
    rows = pair.first
    n_layers = rows.n_layers + 1  # the last one tells whether any layer flipped
    beside = pair.beside()

    def tally(block: Rows) -> tuple[slice, np.ndarray]:
        flipped = _flipped(block, beside(block))
        with_any = np.concatenate([flipped, flipped.any(axis=1, keepdims=True)], axis=1)
        return slice(None), with_any[..., None]

    found = _Shares.of(rows, rows.documents(tally, n_values=2, n_layers=n_layers), n_layers, bootstrap)
    by_layer = {
        "flips": (found.share, "share of decisions whose set of experts differs"),
        "lower": (found.lower, "lower bound of the share of flips"),
        "upper": (found.upper, "upper bound of the share of flips"),
    }
    by_token = {
        "token_flips": (found.share, "share of tokens with a flip at any layer"),
        "token_lower": (found.lower, "lower bound of the share of tokens with a flip"),
        "token_upper": (found.upper, "upper bound of the share of tokens with a flip"),
    }
    return xr.Dataset(
        {
            **{name: rows.array(values[:, :-1], ("layer",), words) for name, (values, words) in by_layer.items()},
            **{name: rows.array(values[:, -1], (), words) for name, (values, words) in by_token.items()},
            "n_documents": _n_documents(rows, found),
        },
        attrs=bootstrap.attributes,
    )


def _flips_by_margin(pair: Pair, bootstrap: Bootstrap) -> dict[str, xr.DataArray]:
    """Share of flips (margin_bin, layer) with bounds, and how many decisions there were."""
    rows = pair.first
    n_bins = len(MARGIN_EDGES) - 1
    beside = pair.beside()
    # A float16 has 65,536 values: a margin's bin is looked up by its bits. What is in no bin goes beyond the last.
    margins = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    bin_of = np.searchsorted(MARGIN_EDGES[:-1], margins.astype(np.float64), side="right") - 1
    bin_of = np.where(margins >= 0, bin_of, n_bins).astype(np.uint8)

    def tally(block: Rows) -> tuple[slice, np.ndarray]:
        bits = block.values("router_margin").astype(np.float16, copy=False).view(np.uint16)
        return slice(None), (2 * bin_of[bits] + _flipped(block, beside(block)))[..., None]

    (documents,) = rows.documents(tally, n_values=2 * (n_bins + 1))
    per_document = documents.counts.reshape(-1, rows.n_layers, n_bins + 1, 2)[:, :, :n_bins]
    counts = per_document.sum(axis=0)
    lower, upper = np.full((2, rows.n_layers, n_bins), np.nan)
    if len(per_document) >= MIN_DOCUMENTS:
        weights = bootstrap.weights(len(per_document))
        for layer, place in np.ndindex(rows.n_layers, n_bins):
            own = per_document[:, layer, place][:, None]
            filled = own.any(axis=(1, 2))
            interval = bootstrap.share_bounds(own[filled], resampled_sums(weights, own))
            lower[layer, place], upper[layer, place] = interval.lower[0, 1], interval.upper[0, 1]

    edges = np.array(MARGIN_EDGES)
    columns = {
        "margin_bin": (_margin_bins(), "router margin in the first recording"),
        "margin_from": (edges[:-1], "lower edge of the bin"),
        "margin_to": (edges[1:], "upper edge of the bin"),
    }
    labels = {
        name: xr.Variable("margin_bin", values, {"long_name": long_name, "units": "logit"})
        for name, (values, long_name) in columns.items()
    }
    shares = {
        "flips_by_margin": (share(counts)[..., 1], "share of decisions whose set of experts differs, by margin"),
        "flips_by_margin_lower": (lower, "lower bound of the share of flips by margin"),
        "flips_by_margin_upper": (upper, "upper bound of the share of flips by margin"),
    }
    dims = ("margin_bin", "layer")
    variables = {
        name: rows.array(values.T[None], dims, words, coords=labels) for name, (values, words) in shares.items()
    }
    n_decisions = counts.sum(axis=-1).T[None]
    variables["n_by_margin"] = rows.array(n_decisions, dims, "decisions by margin", "decision", coords=labels)
    return variables


def _margin_bins() -> np.ndarray:
    """The bins in words."""
    inner = [f"below {MARGIN_EDGES[2]:g}"]
    inner += [f"{low:g} to {high:g}" for low, high in zip(MARGIN_EDGES[2:-2], MARGIN_EDGES[3:-1], strict=True)]
    return np.array(["0", *inner, f"{MARGIN_EDGES[-2]:g} and more"], dtype=object)


def _load_shift(pair: Pair, bootstrap: Bootstrap) -> dict[str, xr.DataArray]:
    """Load in the second recording minus that in the first (layer, expert), with bounds."""
    rows = pair.first
    (first,), (second,) = ([compact(found).counts for found in side.documents()] for side in (rows, pair.second))
    shift = share(second.sum(axis=0)) - share(first.sum(axis=0))
    lower, upper = np.full((2, *shift.shape), np.nan)
    if len(first) >= MIN_DOCUMENTS:
        weights = bootstrap.weights(len(first))
        for layer in range(rows.n_layers):
            here, there = first[:, layer], second[:, layer]
            drawn = share(resampled_sums(weights, there)) - share(resampled_sums(weights, here))
            bounds = bootstrap.bounds(shift[layer], drawn, effective_number(here.sum(axis=1)))
            bounds = np.clip(bounds, -1 / rows.top_k, 1 / rows.top_k)
            spread = carrying((here + there)[:, None])[0] >= MIN_CARRYING
            lower[layer], upper[layer] = (np.where(spread, bound, np.nan) for bound in bounds)
    columns = {
        "load_shift": (shift, "load in the second recording minus load in the first"),
        "load_shift_lower": (lower, "lower bound of the shift in load"),
        "load_shift_upper": (upper, "upper bound of the shift in load"),
    }
    return {name: rows.array(values[None], ("layer", "expert"), words) for name, (values, words) in columns.items()}
