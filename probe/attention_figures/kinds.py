"""NoPE layers beside RoPE layers."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe import figure_parts as parts
from probe.attention_figures.parts import KIND_LINES, bounds, expect, finish_lines, kinds_with, words


def by_kind(result: xr.Dataset, *, title: str = "NoPE layers beside RoPE layers") -> go.Figure:
    """NoPE against RoPE layers, one small panel with an axis of its own for each statistic.

    Parameters
    ----------
    result : from ``attention_maps.by_kind``: ``mean``, ``lower`` and ``upper`` (statistic, attention_kind),
        ``difference`` with bounds (statistic), coord ``units``.
    title : drawn above the figure; "" for none.

    Raises
    ------
    SchemaError
        If a variable or coord is missing or has other dims.
    """
    expect(result, "mean", ("statistic", "attention_kind"), "lower", "upper", "difference", "units")
    names = [str(name) for name in result["statistic"].values]
    n_columns = min(len(names), 4)
    n_rows = -(-len(names) // n_columns)
    units = [str(unit) for unit in result["units"].values]
    headings = [
        f"<b>{words(name)}</b>" + (f" ({unit})" if unit != "1" else "") for name, unit in zip(names, units, strict=True)
    ]
    inner = 150 * n_rows + 60 * (n_rows - 1)
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=headings,
        horizontal_spacing=0.08 if n_columns > 1 else 0,
        vertical_spacing=60 / inner if n_rows > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    kinds = kinds_with(result["mean"])
    for index, name in enumerate(names):
        row, column = parts.place(index, n_columns)
        for kind in kinds:
            point = _kind_point(result.isel(statistic=index), name, kind, first=index == 0)
            figure.add_trace(point, row=row, col=column)
    places = [list(KIND_LINES).index(kind) for kind in kinds]
    figure.update_xaxes(
        tickvals=places,
        ticktext=[KIND_LINES[kind].replace(" layers", "") for kind in kinds],
        range=[-0.7, 1.7],
        showgrid=False,
    )
    figure.update_yaxes(rangemode="tozero", showgrid=True, gridcolor=parts.GRID_COLOUR, nticks=5)
    return finish_lines(figure, result, title, height=inner + parts.PANEL_HEAD + 110)


def _kind_point(own: xr.Dataset, name: str, kind: str, *, first: bool) -> go.Scatter:
    """Mean of one kind with its interval; the hover has the difference between the kinds too."""
    value, lower, upper = (float(own[part].sel(attention_kind=kind)) for part in ("mean", "lower", "upper"))
    gap, low, high = (
        float(own[part]) if part in own else np.nan for part in ("difference", "difference_lower", "difference_upper")
    )
    difference = "" if np.isnan(gap) else f"<br>NoPE − RoPE: {gap:+.3g}{bounds(low, high)}"
    return go.Scatter(
        x=[list(KIND_LINES).index(kind)],
        y=[value],
        mode="markers",
        cliponaxis=False,
        name=KIND_LINES[kind],
        legendgroup=kind,
        showlegend=first,
        marker={"color": parts.KIND_COLOURS[kind], "symbol": parts.KIND_SYMBOLS[kind], "size": 11},
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [upper - value],
            "arrayminus": [value - lower],
            "thickness": 2,
            "width": 5,
        },
        customdata=[f"{words(name)}, {KIND_LINES[kind]}<br>{value:.3g}{bounds(lower, upper)}{difference}"],
        hovertemplate="%{customdata}<extra></extra>",
    )
