"""The experts that a token passes through, layer after layer; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from probe import schema
from probe.bootstrap import Bootstrap, divide, share
from probe.counting import count
from probe.routing.rows import Routing, Rows, grouped
from probe.schema import ProbeError

LARGEST_CODE = 2**63 - 1


def paths(
    routing: Routing,
    *,
    layers: Sequence[int] | None = None,
    n: int = 20,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """The most frequent ways through the MoE layers, and whether chance alone would make them so frequent.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    layers : the decoder's own indices of the layers that a path leads through; all MoE layers unless given.
    n : how many paths at most.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset (path), most frequent first, of equals the one with the smaller experts; the coord ``path`` is the rank,
    from 1. ``expert`` (path, layer) are the first choices; ``count`` is in tokens; ``share`` of all tokens, its bounds
    ``lower`` and ``upper`` (NaN for fewer than 5 documents, or where a path's tokens come from fewer than 4 in effect),
    ``expected`` and ``lift``, the share over the expected one, units "1". The scalars ``n_paths``, how many different
    ones there are, and ``n_tokens``.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a layer that was not recorded, no layer at all, ``n`` below 1, a level outside (0, 1) or fewer than two
        resamples.

    Notes
    -----
    First choices only, in the order of the layers. Yao et al. 2024 (ExFlow, arXiv 2401.08383). ``expected`` is the
    share of a path if layers were independent: the product, over its layers, of the share of first choices that the
    path's expert has there.

    These paths were picked because they are frequent here, so part of their counts is luck. Each interval holds for a
    path that was named beforehand; that all of them hold at once is less likely than ``level``.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    if n < 1:
        raise ProbeError(f"n is {n}, it must be at least 1")
    rows = grouped(_along(routing, layers))
    number, counts = _numbered(rows)
    order = np.argsort(-counts, kind="stable")[:n]
    n_best = len(order)
    rank = np.full(len(counts), n_best, np.min_scalar_type(n_best))
    rank[order] = np.arange(n_best)
    rank = rank[number]
    del number
    first_row = np.unique(rank, return_index=True)[1][:n_best]
    expert = Rows(rows.routing.isel(token=first_row), rows.group[first_row], {}).chosen[..., 0]

    def taken(block: Rows) -> tuple[slice, np.ndarray]:
        """Which of these paths each token took, the last value standing for all others."""
        return slice(None), rank[block.start : block.start + block.n_tokens, None, None]

    (all_tokens,) = rows.documents(taken, n_values=n_best + 1, n_layers=1)
    bounds = bootstrap.share_interval(all_tokens.counts)
    load = share(_first_choices(rows))
    expected = load[np.arange(rows.n_layers), expert].prod(axis=1)
    shares = divide(counts[order], np.asarray(rows.n_tokens))
    labels = {"path": xr.Variable("path", np.arange(1, n_best + 1), {"long_name": "rank of the path", "units": "1"})}
    columns = {
        "share": (shares, "share of tokens that took the path"),
        "lower": (bounds.lower[0, :n_best], "lower bound of the share"),
        "upper": (bounds.upper[0, :n_best], "upper bound of the share"),
        "expected": (expected, "share of the path if layers were independent"),
        "lift": (divide(shares, expected), "share over the expected share"),
    }
    return xr.Dataset(
        {
            "expert": rows.array(expert[None], ("path", "layer"), "first choice", coords=labels),
            "count": rows.array(counts[None, order], ("path",), "tokens that took the path", "token", coords=labels),
            **{
                name: rows.array(values[None], ("path",), long_name, coords=labels)
                for name, (values, long_name) in columns.items()
            },
            "n_paths": ((), len(counts), {"long_name": "different paths", "units": "path"}),
            "n_tokens": ((), rows.n_tokens, {"long_name": "tokens", "units": "token"}),
        },
        attrs=bootstrap.attributes,
    )


def _along(routing: Routing, layers: Sequence[int] | None) -> xr.Dataset:
    """``/routing`` at the given layers, in the order of the decoder."""
    data = grouped(routing).routing
    recorded = data["layer"].values.tolist()
    if layers is None:
        return data
    if not len(layers):
        known = ", ".join(map(str, recorded))
        raise ProbeError(f"layers is empty, a path leads through one at least: this recording holds layers {known}")
    for layer in layers:
        schema.require_layer(layer, recorded)
    return data.isel(layer=np.flatnonzero(np.isin(recorded, list(layers))))


def _numbered(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The number of each token's path, (token,), and how often each path occurs; paths are numbered in their order.

    A path is read as a number with one digit for each layer, as many layers at a time as 64 bits hold. In between, the
    distinct numbers are numbered anew: they keep their order and there are no more of them than tokens.
    """
    number, counts = np.zeros(rows.n_tokens, np.int64), np.full(min(rows.n_tokens, 1), rows.n_tokens)
    layer = 0
    while layer < rows.n_layers:
        n_numbers, last = max(len(counts), 1), layer
        while last < rows.n_layers and n_numbers * rows.n_experts <= LARGEST_CODE:
            n_numbers *= rows.n_experts
            last += 1
        some = Rows(rows.routing.isel(layer=slice(layer, last)), rows.group, {})
        for block in some.blocks("expert_index"):
            own = number[block.start : block.start + block.n_tokens]
            for step in range(last - layer):
                own *= rows.n_experts
                own += block.chosen[:, step, 0]
        counts = _renumber(number)
        layer = last
    return number, counts


def _renumber(number: np.ndarray) -> np.ndarray:
    """Replace each number by its place among the distinct ones, ascending; returns how often each of these occurs.

    As ``np.unique`` with ``return_inverse``, in less memory.
    """
    order = np.argsort(number)
    ascending = number[order]
    begins = np.ones(len(number), bool)
    begins[1:] = ascending[1:] != ascending[:-1]
    np.cumsum(begins, out=ascending)
    number[order] = ascending
    number -= 1
    del order, ascending
    return np.diff(np.flatnonzero(begins), append=len(number))


def _first_choices(rows: Rows) -> np.ndarray:
    """How often each expert is the first choice, (layer, expert)."""
    counts = np.zeros((rows.n_layers, rows.n_experts), np.int64)
    for block in rows.blocks("expert_index"):
        counts += count(block.chosen[..., :1], n_values=rows.n_experts)[0]
    return counts
