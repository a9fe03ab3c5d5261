"""Figures with a cell for each head of each layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe.attention_figures.parts import bounds, colour_magnitudes, expect, largest, with_units
from probe.text_view import NOPE_SIGN

_SINK_MARK = {"color": "#ffffff", "size": 7, "line": {"width": 1.5, "color": "#20242b"}}


def head_grid(head_mean: xr.Dataset, *, title: str = "How the heads attend, layer by layer") -> go.Figure:
    """Heatmap of one statistic by layer and head, with a strip that tells RoPE from NoPE layers.

    Parameters
    ----------
    head_mean : from ``attention_maps.head_mean``: ``mean``, ``lower`` and ``upper`` (layer, head).
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure whose colours begin at 0. Cells hold their number where there is room for it; layers that were not recorded
    are gaps.

    Raises
    ------
    SchemaError
        If a variable is missing or has another dim, such as that of ``by=``: select one of its values.
    """
    expect(head_mean, "mean", ("layer", "head"))
    statistic = str(head_mean.attrs.get("statistic", "mean"))
    figure = _head_heatmap(head_mean, "mean", with_units(statistic, head_mean["mean"]))
    return parts.finish(figure, title, height=figure.layout.height, top=36)


def sinks(result: xr.Dataset, *, title: str = "Which heads park their attention on the first token") -> go.Figure:
    """Heatmap of sink mass by layer and head; sink heads carry a mark.

    Parameters
    ----------
    result : from ``attention_maps.sinks``: ``sink_mass``, ``lower``, ``upper`` and ``is_sink`` (layer, head).
    title : drawn above the figure; "" for none.

    Raises
    ------
    SchemaError
        If a variable is missing or has another dim.
    """
    expect(result, "sink_mass", ("layer", "head"), "is_sink")
    threshold = result.attrs.get("threshold")
    figure = _head_heatmap(result, "sink_mass", "sink mass", least_end=threshold or 0)
    row, column = np.nonzero(result["is_sink"].transpose("layer", "head").values)
    # Beside the number, where there is one.
    aside = 0.36 if _numbered(result) else 0
    figure.add_trace(
        go.Scatter(
            x=result["head"].values[column] + aside,
            y=result["layer"].values[row],
            mode="markers",
            name="sink head" + (f" (mean above {threshold:g})" if threshold is not None else ""),
            marker=_SINK_MARK | {"size": 7 if result.sizes["head"] <= parts.DOTTED_EXPERTS else 5},
            hoverinfo="skip",
        )
    )
    return parts.finish(figure, title, height=figure.layout.height, top=36)


def induction(
    result: xr.Dataset | xr.DataArray, *, title: str = "Which heads look up what followed the same token before"
) -> go.Figure:
    """Heatmap of the induction score by layer and head.

    Parameters
    ----------
    result : from ``experiments.induction``: ``score``, ``lower`` and ``upper`` (layer, head); or the DataArray (layer,
        head) of ``attention_maps.induction_score``, which has no intervals.
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure whose colours go from 0 to 1, a head that looks nowhere else. Where ``even_score`` (layer) is given, hovers
    have it too: the score of a head that attends evenly.

    Raises
    ------
    SchemaError
        If a variable is missing or has another dim.
    """
    data = result.to_dataset(name="score") if isinstance(result, xr.DataArray) else result
    expect(data, "score", ("layer", "head"))
    figure = _head_heatmap(data, "score", "induction score", least_end=1)
    return parts.finish(figure, title, height=figure.layout.height, top=36)


def _head_heatmap(data: xr.Dataset, name: str, label: str, *, least_end: float = 0) -> go.Figure:
    """Strip of kinds and cells of one variable (layer, head), with axes and colours; all but template and title.

    Colours end at the largest value, or at ``least_end``, so that small values do not look large.
    """
    heads = data["head"].values
    values = data[name].transpose("layer", "head").values.astype(float)
    unbounded = xr.full_like(data[name], np.nan)
    lower, upper = (data.get(bound, unbounded).transpose("layer", "head").values for bound in ("lower", "upper"))
    end = largest(values, least=least_end)
    form = ".2f" if end < 10 else ".1f" if end < 100 else ",.0f"
    text = np.full(values.shape, "", dtype=object)
    if _numbered(data):
        text = parts.strings(lambda value: "" if np.isnan(value) else f"{value:{form}}", values)
    even = data.get("even_score", unbounded).broadcast_like(data[name]).transpose("layer", "head").values
    hover = parts.strings(
        lambda head, value, low, high, even: (
            f"head {head}<br>{label}: "
            + ("not defined" if np.isnan(value) else f"{value:.3g}" + bounds(low, high))
            + ("" if np.isnan(even) else f"<br>attending evenly: {even:.2g}")
        ),
        np.broadcast_to(heads, values.shape),
        values,
        lower,
        upper,
        even,
    )
    cells = parts.layer_cells(data, values, text, hover[..., None]) | {"x": heads.tolist(), "showlegend": False}
    figure = go.Figure([*_kind_strip(data, heads), go.Heatmap(**cells), *_undefined_marks(data, values)])
    figure.update_layout(height=parts.rows_height(data) + 110, barmode="overlay", plot_bgcolor="rgba(0,0,0,0)")
    colour_magnitudes(figure, 0, end, title=label)
    parts.layer_axis(figure, data)
    figure.update_yaxes(title_text=parts.layer_title(data, has_routers=False))
    width = _strip_width(heads)
    figure.update_xaxes(title_text="head", range=[heads.min() - 0.5 - 2 * width, heads.max() + 0.5], showgrid=False)
    step = parts.tick_step(len(heads))
    figure.update_xaxes(tickvals=heads[::step].tolist(), ticktext=[str(head) for head in heads[::step]])
    return figure


def _undefined_marks(data: xr.Dataset, values: np.ndarray) -> Iterator[go.Scatter]:
    """A cross where a recorded head has no value, which a gap has not."""
    row, column = np.nonzero(np.isnan(values))
    if row.size:
        yield go.Scatter(
            x=data["head"].values[column],
            y=data["layer"].values[row],
            mode="markers",
            name="not defined",
            marker={"symbol": "x-thin", "size": 7, "line": {"width": 1.5, "color": parts.INK}},
            hovertemplate="layer %{y}, head %{x}<br>not defined<extra></extra>",
        )


def _numbered(data: xr.Dataset) -> bool:
    """Whether a number fits in each cell of a grid of heads."""
    return data.sizes["head"] <= parts.NUMBERED_EXPERTS and len(parts.all_layers(data)) <= 16


def _strip_width(heads: np.ndarray) -> float:
    """Width of the strip of kinds, in heads: the same part of the figure however many there are."""
    return 0.02 * (int(heads.max() - heads.min()) + 1) + 0.03


def _kind_strip(data: xr.Dataset, heads: np.ndarray) -> Iterator[go.Bar]:
    """Left of the cells a bar for each layer in the colour of its kind, the sign on those of NoPE layers."""
    kinds, width = parts.attention_kinds(data), _strip_width(heads)
    for kind, name in parts.KIND_NAMES.items():
        layers = data["layer"].values[kinds == kind]
        if layers.size:
            yield go.Bar(
                x=np.full(len(layers), width),
                y=layers,
                base=heads.min() - 0.5 - 1.5 * width,
                width=0.9,
                orientation="h",
                name=name,
                marker={"color": parts.KIND_COLOURS[kind], "line_width": 0},
                text=NOPE_SIGN if kind == "nope" else None,
                textposition="inside",
                insidetextanchor="middle",
                textangle=0,
                constraintext="none",
                textfont={"size": 10, "color": "#ffffff"},
                hovertemplate=f"layer %{{y}}: {name}<extra></extra>",
            )
