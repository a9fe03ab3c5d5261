"""The expert cards of the report: what the page's script needs to show any expert of any layer, as compact JSON.

Cells (layer, expert) stand in one row, layer by layer. Shares are in per cent and rounded to what a reader can use; NaN
is null. A recording of many experts has fewer tokens, neighbours and domains on each card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from probe import schema, text_view
from probe.bootstrap import INTERVAL_STATUS, divide, share
from probe.routing.card import MIN_EXPECTED

Results = Mapping[str, xr.Dataset]

ROOMY = 1_000
"""Cells up to which a card has room for more neighbours and for every domain that is drawn."""

TOKENS, FEWEST_TOKENS, TOKENS_IN_ALL = 10, 3, 9_000
NEIGHBOURS, FEWER_NEIGHBOURS = 5, 3
DOMAINS, DOMAIN_CELLS = 12, 20_000
"""Domains on a card: at most so many, and with all experts of all layers at most so many cells."""


def tokens_per_expert(n_cells: int) -> int:
    """How many top tokens a card shows where there are ``n_cells`` experts over all layers."""
    return int(np.clip(TOKENS_IN_ALL // max(n_cells, 1), FEWEST_TOKENS, TOKENS))


def card_data(results: Results, vocabulary: xr.Dataset, *, domains: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that the cards of all experts show, for the page's script.

    Parameters
    ----------
    results : of ``routing_stats`` by name: ``load_interval``, ``top_tokens``, ``gate_histogram``, ``transition`` and,
        where ``domains`` are given, ``specialization``.
    vocabulary : the recording's ``/vocabulary``.
    domains : names of the domains to show, the most telling ones.
    """
    load = results["load_interval"].transpose("layer", "expert")
    labels = [
        text_view.layer_label(int(layer), kind == "nope")
        for layer, kind in zip(load["layer"].values, schema.labels(load["attention_kind"]), strict=True)
    ]
    return {
        "layers": load["layer"].values.tolist(),
        "labels": labels,
        "nExperts": load.sizes["expert"],
        "statuses": list(INTERVAL_STATUS),
        "load": _rounded(100 * load["load"], 4),
        "lower": _rounded(100 * load["lower"]),
        "upper": _rounded(100 * load["upper"]),
        "status": _digits(load["interval_status"]),
        "domains": [_domain(results["specialization"], name) for name in _few(domains, load["load"].size)],
        "gates": _gates(results["gate_histogram"]),
        "tokens": _tokens(results["top_tokens"], vocabulary, load),
        "before": _all_neighbours(results["transition"], load, before=True),
        "after": _all_neighbours(results["transition"], load, before=False),
    }


def _few(domains: Sequence[str], n_cells: int) -> Sequence[str]:
    return domains[: int(np.clip(DOMAIN_CELLS // max(n_cells, 1), 1, DOMAINS))]


def _rounded(values: xr.DataArray | np.ndarray, digits: int = 3) -> list[float | None]:
    """Numbers with so many digits that count, null for NaN."""
    flat = np.asarray(values, float).ravel().tolist()
    return [_short(value, digits) if np.isfinite(value) else None for value in flat]


def _short(value: float, digits: int = 3) -> float:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() else rounded


def _digits(codes: xr.DataArray) -> str:
    """Small codes, one character for each cell."""
    return "".join(map(str, codes.values.astype(int).ravel()))


def _domain(result: xr.Dataset, name: str) -> dict[str, Any]:
    own = result.sel(domain=name).transpose("layer", "expert")
    level = result.attrs["level"]
    return {
        "name": name,
        "share": _rounded(100 * own["share"]),
        "lift": _rounded(own["lift"]),
        "lower": _rounded(own["lift_lower"]),
        "upper": _rounded(own["lift_upper"]),
        "status": _digits(own["interval_status"]),
        "settled": _digits(own["p_value"] < 1 - level),
    }


def _gates(result: xr.Dataset) -> dict[str, Any]:
    """Gates in per mille of the expert's own assignments, and of those of each layer, from which the others' follow."""
    own = result.transpose("layer", "expert", "gate_bin", ...)
    counts = own["count"].values
    per_mille = np.round(1000 * np.nan_to_num(own["share"].values)).astype(int)
    return {"share": per_mille.reshape(-1, counts.shape[-1]).tolist(), "count": counts.sum(axis=-1).ravel().tolist()}


def _tokens(result: xr.Dataset, vocabulary: xr.Dataset, load: xr.Dataset) -> dict[str, Any]:
    """Texts of all top tokens, and for each cell a row [text, share, lift, lift's lower bound, documents, …]."""
    ids, place = np.unique(result["token_id"].values, return_inverse=True)
    pieces = schema.pieces(vocabulary.isel(entry=np.isin(vocabulary["token_id"].values, ids)))
    n_experts = load.sizes["expert"]
    at = {int(layer): index for index, layer in enumerate(load["layer"].values)}
    rows: list[list[float | None]] = [[] for _ in range(load["load"].size)]
    columns = [place.tolist(), _rounded(100 * result["share"]), _rounded(result["lift"])]
    columns += [_rounded(result["lift_lower"]), result["n_documents"].values.tolist()]
    cells = zip(result["layer"].values.tolist(), result["expert"].values.tolist(), *columns, strict=True)
    for layer, expert, *values in cells:
        rows[at[layer] * n_experts + expert] += values
    return {"texts": [text_view.piece_label(pieces[int(token_id)]) for token_id in ids], "rows": rows}


def _all_neighbours(result: xr.Dataset, load: xr.Dataset, *, before: bool) -> list[list[float | None]]:
    """For each cell [expert, probability, lift, …] of the MoE layer before or after it; none at the ends."""
    counts = result["count"].transpose("layer", "expert", "next_expert").values
    n_layers, n_experts = load.sizes["layer"], load.sizes["expert"]
    n = NEIGHBOURS if n_layers * n_experts <= ROOMY else FEWER_NEIGHBOURS
    rows: list[list[float | None]] = []
    for at in range(n_layers):
        step = at - 1 if before else at
        if not 0 <= step < len(counts):
            rows += [[] for _ in range(n_experts)]
            continue
        rows += neighbours(counts[step].T if before else counts[step], n)
    return rows


def neighbours(counts: np.ndarray, n: int) -> list[list[float | None]]:
    """For each expert the ``n`` others of another layer with the largest lift: [expert, probability (%), lift, …].

    ``counts`` are tokens (expert, other expert). Only where independent layers would let 5 tokens be expected, as in
    ``routing_stats.expert_card``.
    """
    load, probability = share(counts.sum(axis=0)), share(counts)
    lift = divide(probability, load)
    rows: list[list[float | None]] = []
    for own, chances, lifts in zip(counts, probability, lift, strict=True):
        frequent = np.flatnonzero(own.sum() * load >= MIN_EXPECTED)
        best = frequent[np.lexsort((frequent, -own[frequent], -lifts[frequent]))][:n]
        numbers = zip(best.tolist(), _rounded(100 * chances[best]), _rounded(lifts[best]), strict=True)
        rows.append([value for row in numbers for value in row])
    return rows
