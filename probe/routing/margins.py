"""How clearly and how strongly the router decides; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from scipy.special import expit

from probe.bootstrap import MIN_DOCUMENTS, Bootstrap, divide, effective_number, share, standard_error
from probe.routing.rows import By, Routing, Rows, grouped
from probe.schema import ProbeError

MARGIN_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def margin(
    routing: Routing, *, by: By = None, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How clearly the router decides: weakest chosen minus best not chosen logit.

    Parameters
    ----------
    routing : Dataset with ``router_margin`` (token, layer), or a recording that holds it.
    by : name of a coord on ``token`` to split by, or several names.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset ([by,] layer): ``mean`` and ``margin`` (…, quantile), the 5th, 25th, 50th, 75th and 95th percentile, with
    ``margin_lower`` and ``margin_upper`` (NaN for fewer than 5 documents), in logits; ``tie_share``, units "1", the
    share of decisions with a margin of exactly 0. NaN where there is no margin: every expert is chosen, or the group
    saw no token.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    Margins are stored in float16, so one below 3e-8 counts as a tie. Quantiles are exact: numpy's, with linear
    interpolation, of all margins. Their bounds are Woodruff's (1952): the share of decisions at or below the quantile
    has a standard error over resampled documents, and the quantiles at that share ± t standard errors are the bounds.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by).kept("router_margin")
    shape = (rows.n_groups, rows.n_layers)
    mean, tie_share = np.full((2, *shape), np.nan)
    quantiles, lower, upper = np.full((3, *shape, len(MARGIN_QUANTILES)), np.nan)
    for groups, found in _margins(rows):
        mean[groups] = divide(found.counts @ found.values, found.total)
        tie_share[groups] = divide(found.counts[..., found.values == 0].sum(axis=-1), found.total)
        quantiles[groups] = found.quantiles(np.zeros(1))
        reach = _quantile_errors(rows, groups, found, bootstrap)
        lower[groups], upper[groups] = found.quantiles(-reach), found.quantiles(reach)
    labels = {"quantile": xr.Variable("quantile", list(MARGIN_QUANTILES), {"long_name": "quantile", "units": "1"})}
    dims = ("layer", "quantile")
    return xr.Dataset(
        {
            "mean": rows.array(mean, ("layer",), "mean router margin", "logit"),
            "margin": rows.array(quantiles, dims, "quantile of the router margin", "logit", coords=labels),
            "margin_lower": rows.array(lower, dims, "lower bound of the quantile", "logit", coords=labels),
            "margin_upper": rows.array(upper, dims, "upper bound of the quantile", "logit", coords=labels),
            "tie_share": rows.array(tie_share, ("layer",), "share of decisions with a margin of exactly 0"),
        },
        attrs=bootstrap.attributes,
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
    are its edges (logit). A bin holds its lower edge, the last one its upper edge too. A margin below 0, of a choice
    that was forced, is in no bin unless edges are given for it.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For fewer than one bin, or edges that do not rise.
    """
    rows = grouped(routing, by)
    edges = _margin_edges(rows, bins)
    shares = np.empty((rows.n_groups, rows.n_layers, len(edges) - 1))
    for groups, found in _margins(rows):
        # Values are sorted, so a bin is a run of them: from the first at or above its edge to the last below the next.
        first = np.searchsorted(found.values, edges, side="left")
        first[-1] = np.searchsorted(found.values, edges[-1], side="right")
        below = np.pad(found.cumulative, ((0, 0), (0, 0), (1, 0)))
        shares[groups] = divide(np.diff(below[..., first], axis=-1), found.total[..., None])
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


def gate_histogram(routing: Routing, *, bins: int = 20, by: By = None) -> xr.Dataset:
    """How strongly an expert's tokens are gated: the gates of its tokens in equal bins from 0 to 1.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` and ``router_logit`` (token, layer, slot), or a recording that holds it.
    bins : how many.
    by : name of a coord on ``token`` to split by, or several names.

    Returns
    -------
    Dataset ([by,] layer, expert, gate_bin): ``count``, in assignments; ``share`` of the expert's assignments, units
    "1", NaN for an expert without a token. ``gate_bin`` is the centre of a bin, the coords ``gate_from`` and
    ``gate_to`` are its edges; a bin holds its lower edge, the last one 1 too.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For fewer than one bin.

    Notes
    -----
    Llama 4's gate is the sigmoid of the chosen expert's raw logit; it scales what the expert is given.
    """
    if not isinstance(bins, int | np.integer) or bins < 1:
        raise ProbeError(f"bins is {bins}, it must be a whole number of at least 1")
    rows = grouped(routing, by)

    # A logit has 65,536 values in float16: its bin is looked up by its bits. One more holds NaN, which is in none.
    logits = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    bin_of = np.where(np.isnan(logits), bins, np.minimum(np.nan_to_num(expit(logits)) * bins, bins - 1)).astype(
        np.int64
    )

    def tally(block: Rows) -> np.ndarray:
        bits = block.values("router_logit").astype(np.float16, copy=False).view(np.uint16)
        return block.chosen * np.int64(bins + 1) + bin_of.take(bits)

    counts = np.zeros((rows.n_groups, rows.n_layers, rows.n_experts, bins), np.int64)
    for groups, tallied in rows.group_tallies(tally, n_values=rows.n_experts * (bins + 1)):
        counts[groups] = tallied.reshape(len(groups), rows.n_layers, rows.n_experts, bins + 1)[..., :bins]
    edges = np.linspace(0, 1, bins + 1)
    columns = {
        "gate_bin": ((edges[:-1] + edges[1:]) / 2, "gate, centre of the bin"),
        "gate_from": (edges[:-1], "lower edge of the bin"),
        "gate_to": (edges[1:], "upper edge of the bin"),
    }
    labels = {
        name: xr.Variable("gate_bin", values, {"long_name": long_name, "units": "1"})
        for name, (values, long_name) in columns.items()
    }
    dims = ("layer", "expert", "gate_bin")
    return xr.Dataset(
        {
            "count": rows.array(counts, dims, "assignments", "assignment", coords=labels),
            "share": rows.array(share(counts), dims, "share of the expert's assignments", coords=labels),
        }
    )


def z_loss(
    routing: Routing, *, by: By = None, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How large the router's logits are: the mean square of their log-sum-exp.

    Parameters
    ----------
    routing : Dataset with ``logit_logsumexp`` (token, layer), or a recording that holds it.
    by : name of a coord on ``token`` to split by, or several names.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset ([by,] layer) of ``z_loss``, ``lower`` and ``upper`` (NaN for fewer than 5 documents), units "logit²", and
    ``n_documents`` ([by]).

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    mean over tokens of (log Σ_e exp x_e)². Zoph et al. 2022 (ST-MoE), Eq. 5, without its coefficient.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    z_loss, lower, upper = np.full((3, rows.n_groups, rows.n_layers), np.nan)
    n_documents = np.zeros(rows.n_groups, np.int64)
    for group, tokens, squares in rows.document_sums(_squares, n_columns=1):
        z_loss[group] = divide(squares[..., 0].sum(axis=0), tokens.sum())
        lower[group], upper[group] = bootstrap.ratio_interval(squares[..., 0], tokens[:, None])
        n_documents[group] = len(tokens)
    return xr.Dataset(
        {
            "z_loss": rows.array(z_loss, ("layer",), "mean squared log-sum-exp of the logits", "logit²"),
            "lower": rows.array(lower, ("layer",), "lower bound of the z-loss", "logit²"),
            "upper": rows.array(upper, ("layer",), "upper bound of the z-loss", "logit²"),
            "n_documents": rows.array(n_documents, (), "documents with a token", "document"),
        },
        attrs=bootstrap.attributes,
    )


def _squares(block: Rows) -> np.ndarray:
    """The squared log-sum-exp, (token, layer, 1)."""
    return np.square(block.values("logit_logsumexp"), dtype=np.float64)[..., None]


@dataclass(frozen=True)
class _Margins:
    """The margins of some groups. There are at most 65,536 of them in float16, so they are counted, not sorted."""

    values: np.ndarray
    """(value,) float64, those that occur, ascending; NaN is left out."""
    bits: np.ndarray
    """(value,) uint16, the same as they are stored."""
    counts: np.ndarray
    """int64 (group, layer, value)."""

    @cached_property
    def cumulative(self) -> np.ndarray:
        """How many margins are at most the value, (group, layer, value)."""
        return self.counts.cumsum(axis=-1)

    @cached_property
    def total(self) -> np.ndarray:
        """How many margins there are, (group, layer)."""
        return self.counts.sum(axis=-1)

    def quantiles(self, offset: np.ndarray) -> np.ndarray:
        """``MARGIN_QUANTILES`` (group, layer, quantile), each moved by ``offset``, linear between values as numpy's."""
        levels = np.broadcast_to((MARGIN_QUANTILES + offset).clip(0, 1), (*self.total.shape, len(MARGIN_QUANTILES)))
        result = np.full(levels.shape, np.nan)
        for cell in zip(*np.nonzero((self.total > 0) & ~np.isnan(levels).any(axis=-1)), strict=True):
            rank = levels[cell] * (self.total[cell] - 1)
            low, high = (
                self.values[np.searchsorted(self.cumulative[cell], edge, side="right")]
                for edge in (np.floor(rank), np.ceil(rank))
            )
            result[cell] = low + (rank - np.floor(rank)) * (high - low)
        return result


def _margins(rows: Rows) -> Iterator[tuple[range, _Margins]]:
    """The margins of all groups, for a run of them at a time."""
    for groups, counts in rows.group_tallies(lambda block: _bits(block)[..., None], n_values=1 << 16):
        bits = np.flatnonzero(counts.any(axis=(0, 1))).astype(np.uint16)
        values = bits.view(np.float16).astype(np.float64)
        order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]  # NaN comes last
        yield groups, _Margins(values[order], bits[order], counts[..., bits[order]])


def _bits(block: Rows) -> np.ndarray:
    """The margins (token, layer) as they are stored, uint16."""
    return block.values("router_margin").astype(np.float16, copy=False).view(np.uint16)


def _quantile_errors(rows: Rows, groups: range, found: _Margins, bootstrap: Bootstrap) -> np.ndarray:
    """How far the share of decisions at or below each quantile may be off, t standard errors (group, layer, quantile).

    NaN for fewer than 5 documents.
    """
    n_quantiles = len(MARGIN_QUANTILES)
    # How many of the quantiles lie below a margin, looked up by its bits; NaN counts as one more than all
    passed = np.full((*found.total.shape, 1 << 16), n_quantiles + 1, np.uint8)
    below = found.cumulative - found.counts
    passed[..., found.bits] = sum(
        (below > np.floor(quantile * (found.total - 1))[..., None]).astype(np.uint8) for quantile in MARGIN_QUANTILES
    )
    flat, first = passed.ravel(), np.arange(rows.n_layers) << 16

    def tally(block: Rows) -> tuple[slice, np.ndarray]:
        place = _bits(block) + first
        if len(groups) > 1:
            group = np.clip(block.group.astype(np.int64) - groups.start, 0, len(groups) - 1)
            place += (group * rows.n_layers << 16)[:, None]
        return slice(None), flat.take(place)[..., None]

    reach = np.full((*found.total.shape, n_quantiles), np.nan)
    for group, _, per_document in rows.documents(tally, n_values=n_quantiles + 2, groups=groups):
        counts = per_document[..., : n_quantiles + 1]
        if len(counts) < MIN_DOCUMENTS:
            continue
        drawn = share(bootstrap.resample(counts)).cumsum(axis=-1)[..., :n_quantiles]
        n_effective = effective_number(counts.sum(axis=-1))[:, None]
        reach[group - groups.start] = bootstrap.t(n_effective) * standard_error(drawn, n_effective)
    return reach


def _margin_edges(rows: Rows, bins: int | Sequence[float]) -> np.ndarray:
    if isinstance(bins, int | np.integer):
        if bins < 1:
            raise ProbeError(f"bins is {bins}, it must be at least 1")
        largest = max((float(np.fmax.reduce(block.values("router_margin"), axis=None, initial=0.0)) for block in
                       rows.blocks("router_margin")), default=0.0)  # fmt: skip
        return np.linspace(0, largest or 1, bins + 1)
    edges = np.asarray(bins, float)
    if edges.ndim != 1 or len(edges) < 2 or not np.all(np.diff(edges) > 0):
        raise ProbeError(f"bins must be a number or at least two rising edges, got {bins!r}")
    return edges
