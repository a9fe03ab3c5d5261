"""All about one expert; part of ``probe.routing_stats``."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe import schema
from probe.bootstrap import divide, share
from probe.routing.flow import transition
from probe.routing.load import load_interval
from probe.routing.margins import gate_histogram
from probe.routing.rows import By, Routing, grouped
from probe.routing.specialization import specialization
from probe.routing.tokens import require_expert, top_tokens

GATE_BINS = 20

MIN_EXPECTED = 5
"""Tokens that independent layers would send from one expert to another, below which their lift is not ranked."""


def expert_card(recording: Routing, *, layer: int, expert: int, by: By = "domain", n: int = 10) -> xr.DataTree:
    """What one expert takes, how strongly, and where those tokens come from and go to.

    Parameters
    ----------
    recording : a recording, or its ``/routing`` Dataset.
    layer : the decoder's own index of the layer.
    expert : number of the expert.
    by : name of the coord on ``token`` that makes the groups of ``/load``, or several names.
    n : how many tokens, and how many neighbouring experts on either side, at most.

    Returns
    -------
    DataTree. Its root holds the scalars ``share``, the expert's load, with ``share_lower``, ``share_upper``,
    ``interval_status`` and ``n_documents`` (see :func:`~probe.routing_stats.load_interval`), ``n_tokens`` that the
    expert took, and the coords ``layer``, ``attention_kind`` and ``expert``. Its nodes:

    ``/load`` (by): what :func:`~probe.routing_stats.specialization` says of the expert, without ``p_value``; only what
    the root holds too, by group, where all tokens are in one.
    ``/tokens`` (row): its rows of :func:`~probe.routing_stats.top_tokens`.
    ``/gates`` (gate_bin): ``share`` of the expert's tokens whose gate, the sigmoid of the router's logit, lies in the
    bin, and ``other_share``, that of the gates with which the layer's other experts were chosen; NaN without any.
    ``/before`` and ``/after`` (row): experts of the previous and the next MoE layer, by ``lift``: coords ``expert``,
    ``rank`` and the scalars ``layer`` and ``attention_kind``; ``count`` of tokens that both took, ``probability`` that
    a token of this expert came from there or goes there, and ``lift``, that over the other expert's load. First choices
    only, and only where independent layers would let 5 tokens be expected. Without rows at the first and last layer.

    Raises
    ------
    SchemaError
        If a group, a variable or a coord is missing; names it.
    ProbeError
        If there is no such layer or expert, says which there are; if ``n`` is less than 1.
    """
    everywhere = grouped(recording, by)
    routing, layers = everywhere.routing, everywhere.routing["layer"].values.tolist()
    schema.require(routing, "router_logit", "token_id", "sample")
    schema.require_layer(layer, layers)
    require_expert(expert, everywhere.n_experts)
    here = routing.sel(layer=[layer])
    tokens = _of_expert(top_tokens(here, n=n), expert)
    summary = _load(here, None).isel(layer=0, expert=expert)
    n_tokens = int(grouped(here).group_counts()[0, 0, expert])
    summary["n_tokens"] = ((), n_tokens, {"long_name": "tokens that the expert took", "units": "token"})
    at = layers.index(layer)
    return xr.DataTree.from_dict(
        {
            "/": summary,
            "/load": _load_by_group(here, by, expert),
            "/tokens": tokens,
            "/gates": _gates(here, expert),
            "/before": _neighbours(routing, at - 1, expert, n, before=True),
            "/after": _neighbours(routing, at + 1, expert, n, before=False),
        }
    )


def _load_by_group(here: xr.Dataset, by: By, expert: int) -> xr.Dataset:
    """The expert's share of each group, beside its load on all tokens where there is more than one group."""
    grouped_here = grouped(here, by)
    if np.count_nonzero(np.bincount(grouped_here.group, minlength=1)) > 1:
        result = specialization(here, by=by, n_permutations=0).drop_vars("p_value")
        del result.attrs["n_permutations"]
    else:
        result = _load(here, by)
    return result.isel(layer=0, expert=expert)


def _load(here: xr.Dataset, by: By) -> xr.Dataset:
    """The load of every expert, by the names that it has among those of groups."""
    result = load_interval(here, by=by).rename_vars(load="share", lower="share_lower", upper="share_upper")
    return result.assign(share=result["share"].assign_attrs(long_name="share of the assignments to the expert"))


def _of_expert(tokens: xr.Dataset, expert: int) -> xr.Dataset:
    """The rows of one expert."""
    return tokens.isel(row=np.flatnonzero(tokens["expert"].values == expert))


def _gates(here: xr.Dataset, expert: int) -> xr.Dataset:
    """How the gates of one expert of the only layer spread, beside those of all others that were chosen."""
    of_experts = gate_histogram(here, bins=GATE_BINS).isel(layer=0)
    counts = of_experts["count"].transpose("expert", "gate_bin").values
    result = of_experts[["share"]].isel(expert=expert)
    others = share(counts.sum(axis=0) - counts[expert])
    return result.assign(
        other_share=("gate_bin", others, {"long_name": "share of the choices of other experts", "units": "1"})
    )


def _neighbours(routing: xr.Dataset, at: int, expert: int, n: int, *, before: bool) -> xr.Dataset:
    """Experts of the layer at place ``at`` that share tokens with one of the layer after (``before``) or before it."""
    n_experts = routing.sizes["expert"]
    coords: dict[str, xr.Variable] = {}
    both = load = np.zeros(n_experts)
    if 0 <= at < routing.sizes["layer"]:
        layer = routing.isel(layer=at)
        coords = {name: layer[name].variable.compute() for name in ("layer", "attention_kind")}
        counts = transition(routing.isel(layer=[at, at + 1] if before else [at - 1, at]))["count"].values[0]
        counts = counts.T if before else counts  # (the expert's layer, the other one)
        both, load = counts[expert], share(counts.sum(axis=0))
    probability = share(both)
    lift = divide(probability, load)
    frequent = np.flatnonzero(both.sum() * load >= MIN_EXPECTED)
    best = frequent[np.lexsort((frequent, -both[frequent], -lift[frequent]))][:n]
    where = "comes from there" if before else "goes there"
    columns = {
        "count": (both[best].astype(np.int64), "tokens that both experts took", "token"),
        "probability": (probability[best], f"chance that a token of the expert {where}", "1"),
        "lift": (lift[best], "probability over the other expert's share of all tokens", "1"),
    }
    coords["expert"] = xr.Variable("row", routing["expert"].values[best], routing["expert"].attrs)
    coords["rank"] = xr.Variable(
        "row", np.arange(1, len(best) + 1), {"long_name": "rank of the expert by lift", "units": "1"}
    )
    return xr.Dataset(
        {
            name: ("row", values, {"long_name": long_name, "units": units})
            for name, (values, long_name, units) in columns.items()
        },
        coords,
    )
