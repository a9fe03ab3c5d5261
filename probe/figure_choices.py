"""Figures of what explains the choice of experts, and of what follows from many choices; part of ``probe.figures``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe import figure_parts as parts
from probe.text_view import layer_label

LABEL_NAMES = {"token_id": "the token", "domain": "the document's domain"}

WRITTEN_LAYERS = 16
"""With more layers the experts of a path have no room beside its share: they are in the hover and in the table."""

LINE_COLOUR = "#3f83c4"


def information(result: xr.Dataset, *, told: xr.DataArray, title: str = "What explains the choice") -> go.Figure:
    """Normalized mutual information of each label with the expert, by layer, beside what permuted labels give.

    Parameters
    ----------
    result : mutual information by ``label``: ``normalized``, ``null`` and ``null_upper`` (label, layer), all from
        ``routing_stats.mutual_information``.
    told : (label, layer), true where a label surely says more than chance; the others are drawn hollow.
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with one panel for each label. Each has an axis of its own, since values of different labels do not compare.
    """
    labels = [str(label) for label in result["label"].values]
    heads = [f"<b>{parts.plain(LABEL_NAMES.get(label, label))}</b>" for label in labels]
    figure = make_subplots(
        rows=1, cols=len(labels), subplot_titles=heads, shared_yaxes=True, horizontal_spacing=0.04 if labels[1:] else 0
    )
    figure.update_annotations(font_size=13)
    for column, label in enumerate(labels, start=1):
        own = result.sel(label=label)
        for trace in (_null_bar(own, first=column == 1), _null_ticks(own)):
            figure.add_trace(trace, row=1, col=column)
        for trace in _told_points(own, told.sel(label=label).values):
            figure.add_trace(trace, row=1, col=column)
    for kind in [kind for kind in parts.KIND_NAMES if (parts.attention_kinds(result) == kind).any()]:
        figure.add_trace(_legend_entry(kind), row=1, col=1)
    parts.layer_axis(figure, result)
    figure.update_yaxes(title_text=parts.layer_title(result), col=1)
    figure.update_xaxes(rangemode="tozero", nticks=5)
    figure.update_xaxes(title_text="shared information (%)")
    figure.update_layout(legend={"y": 1, "yref": "container", "yanchor": "top"})
    return parts.finish(figure, title, height=parts.rows_height(result) + 134, top=60)


def _null_bar(own: xr.Dataset, *, first: bool) -> go.Bar:
    return go.Bar(
        x=100 * own["null_upper"].values,
        y=own["layer"].values,
        orientation="h",
        width=0.7,
        name="permuted labels (bar: 95 %, tick: mean)",
        legendgroup="null",
        showlegend=first,
        marker={"color": parts.NULL_COLOUR, "line_width": 0},
        customdata=100 * own["null"].values,
        hovertemplate="layer %{y}<br>permuted labels: mean %{customdata:.3g} %,"
        "<br>95 % of them below %{x:.3g} %<extra></extra>",
    )


def _null_ticks(own: xr.Dataset) -> go.Scatter:
    return go.Scatter(
        x=100 * own["null"].values,
        y=own["layer"].values,
        mode="markers",
        legendgroup="null",
        showlegend=False,
        marker={"symbol": "line-ns", "size": 9, "line": {"width": 2, "color": parts.INK}},
        hoverinfo="skip",
    )


def _told_points(own: xr.Dataset, told: np.ndarray) -> list[go.Scatter]:
    """A point for each layer, hollow where the label may say nothing; RoPE and NoPE layers apart."""
    kinds = parts.attention_kinds(own)
    value, p_value = 100 * own["normalized"].values, own["p_value"].values
    hover = parts.strings(lambda part, p: f"{part:.3g} % shared, p = {p:.2g} (all layers at once)", value, p_value)
    traces = []
    for kind in parts.KIND_NAMES:
        chosen = kinds == kind
        if not chosen.any():
            continue
        symbol = parts.KIND_SYMBOLS[kind]
        traces.append(
            go.Scatter(
                x=value[chosen],
                y=own["layer"].values[chosen],
                mode="markers",
                showlegend=False,
                marker={
                    "color": parts.KIND_COLOURS[kind],
                    "symbol": [symbol if sure else f"{symbol}-open" for sure in told[chosen]],
                    "size": 9,
                },
                customdata=hover[chosen],
                hovertemplate="layer %{y}<br>%{customdata}<extra></extra>",
            )
        )
    return traces


def _legend_entry(kind: str) -> go.Scatter:
    """A filled mark in the legend, whatever the first layer's is."""
    marker = {"color": parts.KIND_COLOURS[kind], "symbol": parts.KIND_SYMBOLS[kind], "size": 9}
    return go.Scatter(x=[None], y=[None], mode="markers", name=parts.KIND_NAMES[kind], marker=marker)


def paths(result: xr.Dataset, *, title: str = "The most common ways through the layers") -> go.Figure:
    """Share of tokens of the most common paths with intervals, beside what independent layers would give.

    Parameters
    ----------
    result : from ``routing_stats.paths``: ``expert`` (path, layer), ``share``, ``lower``, ``upper``, ``expected`` and
        ``count`` (path).
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with a row for each path: its experts, one column for each layer (up to 16 of them), and its share.
    """
    experts = result["expert"].transpose("path", "layer").values
    n_paths, n_layers = experts.shape
    written = n_layers <= WRITTEN_LAYERS
    room = min(0.1 + 0.035 * n_layers * max(len(str(experts.max(initial=0))), 2) / 2, 0.62)
    figure = (
        make_subplots(rows=1, cols=2, shared_yaxes=True, column_widths=[room, 1 - room], horizontal_spacing=0.02)
        if written
        else make_subplots(rows=1, cols=1)
    )
    column = 2 if written else 1
    if written:
        figure.add_trace(_written_paths(result, experts), row=1, col=1)
        names = [layer_label(int(layer), kind == "nope") for layer, kind in zip(*_layers(result), strict=True)]
        figure.update_xaxes(
            title_text="expert at each layer",
            tickvals=list(range(n_layers)),
            ticktext=names,
            range=[-0.6, n_layers - 0.4],
            showgrid=False,
            col=1,
        )
    for trace in _path_shares(result, experts):
        figure.add_trace(trace, row=1, col=column)
    figure.update_xaxes(title_text="share of all tokens (%), log axis", type="log", col=column, **_log_ticks(result))
    figure.update_yaxes(range=[n_paths + 0.5, 0.5], dtick=1, showgrid=False)
    figure.update_yaxes(title_text="path, by rank", col=1)
    figure.update_layout(legend={"y": 1, "yref": "container", "yanchor": "top"})
    return parts.finish(figure, title, height=max(22 * n_paths, 60) + 110, top=44)


def _layers(result: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    return result["layer"].values, parts.attention_kinds(result)


def _written_paths(result: xr.Dataset, experts: np.ndarray) -> go.Scatter:
    """The experts of every path as numbers."""
    n_paths, n_layers = experts.shape
    return go.Scatter(
        x=np.tile(np.arange(n_layers), n_paths),
        y=np.repeat(result["path"].values, n_layers),
        mode="text",
        text=experts.ravel().astype(str),
        textfont={"size": 12},
        showlegend=False,
        customdata=np.repeat(_path_hover(result, experts), n_layers),
        hovertemplate="%{customdata}<extra></extra>",
    )


def _path_shares(result: xr.Dataset, experts: np.ndarray) -> list[go.Scatter]:
    """What independence gives as a short line, and the share with its interval."""
    share, lower, upper = (100 * result[name].values for name in ("share", "lower", "upper"))
    rank, hover = result["path"].values, _path_hover(result, experts)
    return [
        go.Scatter(
            x=100 * result["expected"].values,
            y=rank,
            mode="markers",
            name="independent layers",
            marker={"symbol": "line-ns", "size": 13, "line": {"width": 3, "color": parts.INK}},
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        ),
        go.Scatter(
            x=share,
            y=rank,
            mode="markers",
            name="recorded",
            marker={"color": LINE_COLOUR, "size": 9},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": upper - share,
                "arrayminus": share - lower,
                "thickness": 2,
                "width": 4,
            },
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
        ),
    ]


def _log_ticks(result: xr.Dataset) -> dict[str, object]:
    """Ticks at powers of ten, in per cent as people write them."""
    ends = np.concatenate([100 * result[name].values for name in ("share", "lower", "upper", "expected")])
    ends = ends[np.isfinite(ends) & (ends > 0)]
    low, high = (int(edge(np.log10(end))) for edge, end in ((np.floor, ends.min()), (np.ceil, ends.max())))
    powers = range(low, high + 1, max(-(-(high - low) // 6), 1))
    return {"tickvals": [10.0**power for power in powers], "ticktext": [_power(power) for power in powers]}


def _power(power: int) -> str:
    if power >= -3:
        return f"{10.0**power:g}"
    return f"10<sup>{power}</sup>"


def _path_hover(result: xr.Dataset, experts: np.ndarray) -> np.ndarray:
    """The whole path, 12 layers to a line, and its numbers."""
    hover = np.empty(len(experts), dtype=object)
    names = ("path", "count", "share", "lower", "upper", "expected", "lift")
    columns = zip(*(result[name].values.tolist() for name in names), strict=True)
    for at, (rank, count, share, lower, upper, expected, lift) in enumerate(columns):
        steps = [" → ".join(map(str, experts[at, start : start + 12])) for start in range(0, experts.shape[1], 12)]
        hover[at] = (
            f"path {rank}: {' →<br>'.join(steps)}<br>{100 * share:.3g} % of tokens"
            f"{parts.bounds(100 * lower, 100 * upper, '.3g')} ({count:,})"
            f"<br>independent layers: {100 * expected:.2g} %, lift {float(f'{lift:.2g}'):,g} ×"
        )
    return hover


def batches(result: xr.Dataset, *, title: str = "How many experts a batch touches") -> go.Figure:
    """Distinct experts by batch size, for unrelated and for consecutive tokens, beside a uniform router.

    Parameters
    ----------
    result : from ``routing_stats.distinct_experts``: ``distinct``, ``lower``, ``upper`` and ``consecutive`` (layer,
        batch_size), ``uniform`` (batch_size).
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with two panels: every layer as a thin line, their median as a thick one. A band in the first holds the
    intervals of all layers.
    """
    result = result.transpose("layer", "batch_size", ...)
    heads = ["<b>unrelated tokens</b>", "<b>consecutive tokens of a document</b>"]
    figure = make_subplots(rows=1, cols=2, subplot_titles=heads, shared_yaxes=True, horizontal_spacing=0.04)
    figure.update_annotations(font_size=13)
    sizes = result["batch_size"].values
    for column, name in enumerate(("distinct", "consecutive"), start=1):
        values = result[name].values
        if name == "distinct" and result["lower"].notnull().all():
            figure.add_trace(_interval_band(result), row=1, col=column)
        for trace in (_layer_lines(result, name), _median_line(sizes, values, first=column == 1)):
            figure.add_trace(trace, row=1, col=column)
        figure.add_trace(_uniform_line(result, first=column == 1), row=1, col=column)
    ticks = sizes[:: 2 if len(sizes) > 6 else 1]
    figure.update_xaxes(
        title_text="tokens in a batch (log axis)", type="log", tickvals=ticks, ticktext=[f"{size:,}" for size in ticks]
    )
    figure.update_yaxes(rangemode="tozero", showgrid=True, gridcolor=parts.GRID_COLOUR)
    figure.update_yaxes(title_text="experts touched in a layer", col=1)
    figure.update_layout(legend={"y": 1, "yref": "container", "yanchor": "top"})
    return parts.finish(figure, title, height=380, top=64)


def _interval_band(result: xr.Dataset) -> go.Scatter:
    sizes = result["batch_size"].values
    lowest, highest = result["lower"].min("layer").values, result["upper"].max("layer").values
    return go.Scatter(
        x=np.concatenate([sizes, sizes[::-1]]),
        y=np.concatenate([highest, lowest[::-1]]),
        fill="toself",
        fillcolor="rgba(63,131,196,0.14)",
        line={"width": 0},
        mode="lines",
        name=f"{100 * result.attrs['level']:g} % intervals",
        hoverinfo="skip",
    )


def _layer_lines(result: xr.Dataset, name: str) -> go.Scatter:
    """All layers in one trace, with gaps between them; ``distinct`` alone has intervals."""
    sizes, layers, values = result["batch_size"].values, result["layer"].values, result[name].values
    lower, upper = (result[bound].where(name == "distinct").values for bound in ("lower", "upper"))
    hover = parts.strings(
        lambda layer, size, value, low, high: (
            f"layer {layer}, {size:,} tokens<br>{value:.3g} experts{parts.bounds(low, high, '.3g')}"
        ),
        np.broadcast_to(layers[:, None], values.shape),
        np.broadcast_to(sizes, values.shape),
        values,
        lower,
        upper,
    )
    gap = ((0, 0), (0, 1))
    return go.Scatter(
        x=np.pad(np.broadcast_to(sizes, values.shape).astype(float), gap, constant_values=np.nan).ravel(),
        y=np.pad(values, gap, constant_values=np.nan).ravel(),
        mode="lines",
        line={"color": LINE_COLOUR, "width": 1},
        opacity=0.55,
        showlegend=False,
        customdata=np.pad(hover, gap, constant_values="").ravel(),
        hovertemplate="%{customdata}<extra></extra>",
    )


def _median_line(sizes: Sequence[int] | np.ndarray, values: np.ndarray, *, first: bool) -> go.Scatter:
    return go.Scatter(
        x=sizes,
        y=np.median(values, axis=0),
        mode="lines+markers",
        name="median layer (thin: each)",
        legendgroup="median",
        showlegend=first,
        line={"color": LINE_COLOUR, "width": 3.5},
        marker={"size": 6},
        hovertemplate="median layer, %{x:,} tokens<br>%{y:.3g} experts<extra></extra>",
    )


def _uniform_line(result: xr.Dataset, *, first: bool) -> go.Scatter:
    return go.Scatter(
        x=result["batch_size"].values,
        y=result["uniform"].values,
        mode="lines",
        name="uniform router",
        legendgroup="uniform",
        showlegend=first,
        line={"color": parts.INK, "width": 2, "dash": "dot"},
        hovertemplate="uniform router, %{x:,} tokens<br>%{y:.3g} experts<extra></extra>",
    )
