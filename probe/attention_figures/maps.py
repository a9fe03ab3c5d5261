"""Maps of where the queries of single heads look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import schema
from probe.attention_figures.parts import (
    BORDER,
    SQUARE,
    SQUARE_WIDTH,
    border_name,
    border_positions,
    colour_magnitudes,
    power_of_ten,
)
from probe.schema import ProbeError, SchemaError
from probe.text_view import layer_label

MAX_PANELS = 16
"""How many maps one figure shows."""

DECADES = 5
"""Colours of weights end so many powers of 10 below the largest at the latest."""

MAP_COLUMNS = ("largest weight", "mass")
"""What the switch of a map chooses between."""


def attention_map(
    profiles: xr.DataTree | xr.Dataset, *, layer: int, head: int, profile: int = 0, title: str | None = None
) -> go.Figure:
    """Where the queries of one text look, pooled into cells, on a log colour scale, with the chunk borders.

    Parameters
    ----------
    profiles : ``/attention_profiles`` with ``map_max`` and ``map_sum``, or a recording that holds it.
    layer, head : whose map.
    profile : which text, by its place on the dim ``profile``.
    title : drawn above the figure; "" for none; says layer and head unless given.

    Returns
    -------
    Figure with a switch between the largest weight in each cell, which keeps a single needle, and the mass that a query
    of the row puts on the cell, on average over the row's recorded queries: a row of masses sums to 1. Grey cells are
    hidden from the queries; rows without a recorded query are hatched. The first query is at the top.

    Raises
    ------
    SchemaError
        If there is no such group, or no maps in it; says how to record them.
    ProbeError
        For a profile, layer or head that there is not.
    """
    cells = _map_cells(profiles, profile=profile, layer=layer, head=head)
    name = _head_name(cells)
    figure = go.Figure([_map_heatmap(cells, shown, visible=shown == "largest weight") for shown in MAP_COLUMNS])
    for trace in _map_marks(cells, legend=True):
        figure.add_trace(trace)
    n_tokens = cells.attrs["n_tokens"]
    figure.update_layout(height=SQUARE + 126, width=SQUARE_WIDTH, plot_bgcolor=parts.MISSING_COLOUR)
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title_text="key position (token)", range=[-0.5, n_tokens - 0.5], showgrid=False)
    figure.update_yaxes(title_text="query position (token)", range=[n_tokens - 0.5, -0.5])
    _map_colours(figure, [cells], n_marks=len(figure.data) - len(MAP_COLUMNS))
    shown_title = f"Where the queries of {name} look" if title is None else title
    return parts.finish(figure, shown_title, height=figure.layout.height, top=76)


def map_grid(
    profiles: xr.DataTree | xr.Dataset,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    profile: int = 0,
    title: str = "Where the queries of single heads look",
) -> go.Figure:
    """Small maps of several heads on one log colour scale, with the chunk borders.

    Parameters
    ----------
    profiles : ``/attention_profiles`` with ``map_max`` and ``map_sum``, or a recording that holds it.
    heads : pairs of layer and head, at most 16; otherwise up to four heads of up to four layers, evenly spaced, the
        lowest layer at the bottom.
    profile : which text, by its place on the dim ``profile``.
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure that shows what :func:`attention_map` does, for each head.

    Raises
    ------
    SchemaError
        If there is no such group, or no maps in it; says how to record them.
    ProbeError
        For a profile, layer or head that there is not, for no head or more than 16.
    """
    data = schema.group(profiles, "attention_profiles")
    if heads is None:
        layers = _spaced_layers(data)
        heads = list(product(layers[::-1], parts.spaced(data["head"].values.tolist(), 4)))
    if not 0 < len(heads) <= MAX_PANELS:
        raise ProbeError(f"heads names {len(heads)} maps: one figure shows 1 to {MAX_PANELS}")
    maps = [_map_cells(data, profile=profile, layer=layer, head=head) for layer, head in heads]
    n_columns = min(len({head for _, head in heads}) if len(heads) > 4 else len(heads), 4)
    titles = [
        f'<span style="color:{parts.KIND_COLOURS[cells.attrs["kind"]]}">{_head_name(cells)}</span>' for cells in maps
    ]
    figure = parts.panels(titles, n_columns, panel=190)
    figure.update_layout(barmode="overlay", plot_bgcolor=parts.MISSING_COLOUR)
    n_marks = 0
    for shown in MAP_COLUMNS:
        for index, cells in enumerate(maps):
            row, column = parts.place(index, n_columns)
            figure.add_trace(_map_heatmap(cells, shown, visible=shown == "largest weight"), row=row, col=column)
    for index, cells in enumerate(maps):
        row, column = parts.place(index, n_columns)
        for trace in _map_marks(cells, legend=index == 0):
            figure.add_trace(trace, row=row, col=column)
            n_marks += 1
    n_tokens = maps[0].attrs["n_tokens"]
    figure.update_xaxes(range=[-0.5, n_tokens - 0.5], showgrid=False, nticks=4)
    figure.update_yaxes(range=[n_tokens - 0.5, -0.5], nticks=5)
    parts.outer_titles(figure, len(maps), n_columns, x="key (token)", y="query (token)")
    _map_colours(figure, maps, n_marks=n_marks)
    return parts.finish(figure, title, height=figure.layout.height + 64, top=parts.PANEL_HEAD + 64)


def _map_cells(profiles: xr.DataTree | xr.Dataset, *, profile: int, layer: int, head: int) -> xr.Dataset:
    """The cells of one map up to the end of its text, as ``largest weight`` and ``mass`` (query_bin, key_bin)."""
    data = schema.group(profiles, "attention_profiles")
    for name in ("map_max", "map_sum", "bin_width"):
        if name not in data:
            raise SchemaError(
                f"/attention_profiles has no {name}: record(…, attention=AttentionSpec(statistics=(…, 'map_max', "
                "'map_sum'))) adds the maps"
            )
    if not 0 <= profile < data.sizes["profile"]:
        raise ProbeError(f"there is no profile {profile}: this recording holds 0 to {data.sizes['profile'] - 1}")
    for name, chosen in (("layer", layer), ("head", head)):
        known = data[name].values.tolist()
        if chosen not in known:
            raise ProbeError(f"there is no {name} {chosen}: this recording holds {name}s {', '.join(map(str, known))}")
    own = data.isel(profile=profile).sel(layer=layer, head=head)
    n_tokens, width = int(own["n_tokens"]), int(own["bin_width"])
    n_bins = -(-n_tokens // width)
    own = own[["map_max", "map_sum"]].isel(query_bin=slice(n_bins), key_bin=slice(n_bins))
    sums = own["map_sum"].transpose("query_bin", "key_bin")
    n_queries = sums.sum("key_bin")  # the weights of each recorded query of the row sum to 1
    kind = schema.labels(data["attention_kind"])[data["layer"].values.tolist().index(layer)]
    return xr.Dataset(
        {
            "largest weight": own["map_max"].transpose("query_bin", "key_bin").drop_vars(own.coords),
            "mass": (sums / n_queries.where(n_queries > 0)).drop_vars(own.coords),
        },
        attrs={
            "n_tokens": n_tokens,
            "bin_width": width,
            "chunk_size": int(data.attrs.get("chunk_size", 0)),
            "layer": layer,
            "head": head,
            "kind": str(kind),
        },
    )


def _head_name(cells: xr.Dataset) -> str:
    return f"layer {layer_label(cells.attrs['layer'], cells.attrs['kind'] == 'nope')}, head {cells.attrs['head']}"


def _spaced_layers(data: xr.Dataset) -> list[int]:
    """Up to four layers, evenly spaced; the last of a kind that would be left out takes the place of its neighbour."""
    layers, kinds = data["layer"].values.tolist(), parts.attention_kinds(data)
    chosen = parts.spaced(layers, 4)
    for kind in parts.KIND_NAMES:
        own = [layer for layer, is_kind in zip(layers, kinds == kind, strict=True) if is_kind]
        if own and not set(own) & set(chosen):
            chosen[-1] = own[-1]
    return sorted(chosen)


def _map_heatmap(cells: xr.Dataset, shown: str, *, visible: bool) -> go.Heatmap:
    """The cells of one map by log10; cells as large as they are in tokens. Numbers travel as float32."""
    width = cells.attrs["bin_width"]
    values = cells[shown].values.astype(np.float32)
    around = "query %{y}, key %{x}" if width == 1 else "queries around %{y:,.0f}, keys around %{x:,.0f}"
    return go.Heatmap(
        z=_log10(values).astype(np.float32),
        x0=(width - 1) / 2,
        dx=width,
        y0=(width - 1) / 2,
        dy=width,
        customdata=values,
        coloraxis="coloraxis",
        hoverongaps=False,
        visible=visible,
        hovertemplate=f"{_head_name(cells)}<br>{around}<br>{shown} %{{customdata:.3g}}<extra></extra>",
    )


def _map_marks(cells: xr.Dataset, *, legend: bool) -> Iterator[go.Scatter | go.Bar]:
    """Chunk borders, and hatches over rows without a recorded query."""
    n_tokens, width, chunk_size = (cells.attrs[name] for name in ("n_tokens", "bin_width", "chunk_size"))
    empty = np.flatnonzero(cells["largest weight"].isnull().all("key_bin").values)
    if empty.size:
        yield go.Bar(
            x=np.full(len(empty), n_tokens),
            y=empty * width + (width - 1) / 2,
            base=-0.5,
            width=width,
            orientation="h",
            name="no query recorded",
            legendgroup="empty",
            showlegend=legend,
            marker={
                "color": "rgba(0,0,0,0)",
                "line_width": 0,
                "pattern": {
                    "shape": "/",
                    "size": 6,
                    "solidity": 0.25,
                    "fgcolor": parts.INK,
                    "bgcolor": "rgba(0,0,0,0)",
                },
            },
            hovertemplate="no query recorded<extra></extra>",
        )
    borders = border_positions(n_tokens, chunk_size)
    if borders.size:
        nan = np.full(len(borders), np.nan)
        ends = np.stack([np.full(len(borders), -0.5), np.full(len(borders), n_tokens - 0.5), nan], axis=-1).ravel()
        at = np.stack([borders, borders, nan], axis=-1).ravel()
        yield go.Scatter(
            x=np.concatenate([at, ends]),
            y=np.concatenate([ends, at]),
            mode="lines",
            name=border_name(chunk_size),
            legendgroup="border",
            showlegend=legend,
            line=BORDER,
            hoverinfo="skip",
        )


def _map_colours(figure: go.Figure, maps: Sequence[xr.Dataset], *, n_marks: int) -> None:
    """A log colour scale for each of the two things that maps show, and the switch between them."""
    choices = []
    for at, shown in enumerate(MAP_COLUMNS):
        ticks = _log_ticks(np.concatenate([cells[shown].values.ravel() for cells in maps]))
        title = shown.split()[-1]
        if at == 0:
            colour_magnitudes(figure, min(ticks), max(ticks), title=title, ticks=ticks)
        layout = {
            "coloraxis.cmin": min(ticks),
            "coloraxis.cmax": max(ticks),
            "coloraxis.colorbar.tickvals": list(ticks),
            "coloraxis.colorbar.ticktext": list(ticks.values()),
            "coloraxis.colorbar.title.text": title,
        }
        visible = [shown == other for other in MAP_COLUMNS for _ in maps] + [True] * n_marks
        choices.append((shown, {"visible": visible}, layout))
    figure.update_layout(updatemenus=parts.switch(*choices))
    if len(maps) > 1:
        figure.layout.updatemenus[0].pad.b = 30  # above the heads of the panels


def _log_ticks(values: np.ndarray) -> dict[int, str]:
    """Powers of 10 on a log colour scale, with their names; they hold all but the smallest of the positive values."""
    known = values[np.isfinite(values)]
    positive = known[known > 0]
    if not positive.size:
        return {-1: "≤ 0.1", 0: "1"}
    high = int(np.ceil(np.log10(positive.max()) - 1e-6))
    low = int(np.clip(np.floor(np.log10(np.quantile(positive, 0.01)) + 1e-6), high - DECADES, high - 1))
    ticks = {power: power_of_ten(power) for power in range(low, high + 1)}
    if (known < 10.0**low).any():
        ticks[low] = "≤ " + ticks[low]
    return ticks


def _log10(values: np.ndarray) -> np.ndarray:
    """Log of a mass; NaN stays NaN, and 0 is put below every other mass and below the lowest colour."""
    smallest = np.min(values, where=values > 0, initial=10.0**-DECADES)
    return np.log10(np.where(values == 0, smallest / 10, values))
