"""Results of ``attention_maps`` and of the attention experiments as ``plotly`` figures.

Nothing is computed here but where a mark goes. The rules of ``probe.figures`` hold: layers on y with 0 at the bottom,
the sign ``◇`` at NoPE layers, transparent pages, a colour scale for a dark one in ``layout.meta``. RoPE and NoPE layers
have the same two colours everywhere, and chunk borders are drawn wherever an axis holds positions or distances.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe import figure_parts as parts
from probe import schema
from probe.schema import ProbeError, SchemaError
from probe.text_view import NOPE_SIGN, layer_label

__all__ = [
    "MAX_BORDERS",
    "MAX_PANELS",
    "SEQUENTIAL",
    "attention_map",
    "by_kind",
    "chunk_reach",
    "distance_profile",
    "entropy_by_position",
    "head_grid",
    "head_similarity",
    "induction",
    "map_grid",
    "needle",
    "sinks",
    "temperature",
]

SEQUENTIAL = {
    "light": ["#f5f8ed", "#cce1c5", "#97cca9", "#5fb49b", "#2c9991", "#097d85", "#036179", "#00446f", "#122864"],
    "dark": ["#191e28", "#22354b", "#214f70", "#106d8d", "#058c9c", "#28aba5", "#60c7a7", "#9ae0a9", "#d2f6af"],
}
"""Magnitudes, in steps of equal lightness; 0 has the colour of the page."""

MAX_PANELS = 16
"""How many maps one figure shows."""

MAX_BORDERS = 64
"""With more chunk borders on an axis none is drawn: they would cover the data."""

DECADES = 5
"""Colours of weights end so many powers of 10 below the largest at the latest."""

LABELLED_LAYERS = 24
"""With more layers an axis names the NoPE layers only."""

_SQUARE = 480
"""Pixels of a side of a square plot."""

_SQUARE_WIDTH = _SQUARE + 162
"""Pixels of the figure around it, which fits a narrow page."""

_KIND_LINES = {"rope": "RoPE layers", "nope": f"NoPE layers {NOPE_SIGN}"}
_SCALE_STYLES = (("#9a5fb5", "dash"), ("#2c9991", "dashdot"), ("#b8567c", "longdash"))
_BORDER = {"color": "rgba(128,134,145,0.8)", "width": 1, "dash": "dot"}
_SINK_MARK = {"color": "#ffffff", "size": 7, "line": {"width": 1.5, "color": "#20242b"}}


# --- heads ------------------------------------------------------------------------------------------------------------


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
    _expect(head_mean, "mean", ("layer", "head"))
    statistic = str(head_mean.attrs.get("statistic", "mean"))
    figure = _head_heatmap(head_mean, "mean", _with_units(statistic, head_mean["mean"]))
    return _finish(figure, title, height=figure.layout.height, top=36)


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
    _expect(result, "sink_mass", ("layer", "head"), "is_sink")
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
    return _finish(figure, title, height=figure.layout.height, top=36)


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
    _expect(data, "score", ("layer", "head"))
    figure = _head_heatmap(data, "score", "induction score", least_end=1)
    return _finish(figure, title, height=figure.layout.height, top=36)


def _head_heatmap(data: xr.Dataset, name: str, label: str, *, least_end: float = 0) -> go.Figure:
    """Strip of kinds and cells of one variable (layer, head), with axes and colours; all but template and title.

    Colours end at the largest value, or at ``least_end``, so that small values do not look large.
    """
    heads = data["head"].values
    values = data[name].transpose("layer", "head").values.astype(float)
    unbounded = xr.full_like(data[name], np.nan)
    lower, upper = (data.get(bound, unbounded).transpose("layer", "head").values for bound in ("lower", "upper"))
    end = _largest(values, least=least_end)
    form = ".2f" if end < 10 else ".1f" if end < 100 else ",.0f"
    text = np.full(values.shape, "", dtype=object)
    if _numbered(data):
        text = parts.strings(lambda value: "" if np.isnan(value) else f"{value:{form}}", values)
    even = data.get("even_score", unbounded).broadcast_like(data[name]).transpose("layer", "head").values
    hover = parts.strings(
        lambda head, value, low, high, even: (
            f"head {head}<br>{label}: "
            + ("not defined" if np.isnan(value) else f"{value:.3g}" + _bounds(low, high))
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
    _colour(figure, low=0, high=end, title=label)
    _layer_axis(figure, data)
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


def head_similarity(
    similarity: xr.DataArray, *, title: str = "Which heads attend alike, layer after layer"
) -> go.Figure:
    """Heatmap of the similarity of every head with every other, layer after layer.

    Parameters
    ----------
    similarity : from ``attention_maps.head_similarity``: (head, other_head), with the coords ``layer`` and
        ``attention_kind`` on ``head``.
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with the first layer at the bottom left, lines between layers, and grey where the similarity is undefined.

    Raises
    ------
    SchemaError
        If the dims are others, or a coord is missing.
    """
    schema.require(similarity.to_dataset(name="similarity"), "layer", "attention_kind")
    if set(similarity.dims) != {"head", "other_head"}:
        raise SchemaError(f"similarity has dims {_listed(similarity.dims)}, expected (head, other_head)")
    order = np.argsort(similarity["layer"].values, kind="stable")
    own = similarity.transpose("head", "other_head").isel(head=order, other_head=order)
    layers, n_heads = own["layer"].values, len(order)
    nope = schema.labels(own["attention_kind"]) == "nope"
    names = [
        f"layer {layer}, head {str(label).split('.')[-1]}"
        for layer, label in zip(layers, own["head"].values, strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=own.values.astype(np.float32),
            x=names,
            y=names,
            coloraxis="coloraxis",
            hoverongaps=False,
            hovertemplate="%{y}<br>%{x}<br>cosine similarity %{z:.3f}<extra></extra>",
        )
    )
    starts = np.concatenate([[0], np.flatnonzero(np.diff(layers)) + 1])
    middles = (starts + np.append(starts[1:], n_heads) - 1) / 2
    step = parts.tick_step(len(starts))
    labels = [layer_label(int(layers[at]), bool(nope[at])) for at in starts]
    axis = {
        "type": "category",
        "tickvals": middles[::step].tolist(),
        "ticktext": labels[::step],
        "range": [-0.5, n_heads - 0.5],
        "title_text": f"heads by layer ({NOPE_SIGN} NoPE)" if nope.any() else "heads by layer",
        "showgrid": False,
    }
    figure.update_layout(height=_SQUARE + 66, width=_SQUARE_WIDTH, plot_bgcolor=parts.MISSING_COLOUR)
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    for start in starts[1:] if len(starts) <= MAX_BORDERS else ():
        figure.add_vline(x=float(start) - 0.5, line={"color": "#b9bec8", "width": 1})
        figure.add_hline(y=float(start) - 0.5, line={"color": "#b9bec8", "width": 1})
    _colour(figure, low=0, high=1, title="similarity")
    return _finish(figure, title, height=figure.layout.height, top=16)


# --- lines ------------------------------------------------------------------------------------------------------------


def distance_profile(
    result: xr.Dataset,
    *,
    heads: xr.Dataset | None = None,
    title: str = "How far back the heads look",
) -> go.Figure:
    """Attention mass by distance on log axes, one line with its band for each kind of layer.

    Parameters
    ----------
    result : from ``attention_maps.distance_profile``: ``distance_mass``, ``lower`` and ``upper`` (attention_kind,
        distance_bin); or, without lines for the kinds, by (layer, head, distance_bin).
    heads : by (layer, head, distance_bin), drawn as thin lines behind those of the kinds.
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure of mass per bin, whose bins double in width: attention that is even over all distances rises. The first bin
    is the query's own token. A mass of 0 has no place on a log axis: lines end there. A dotted line marks the size of a
    chunk, beyond which RoPE layers see nothing.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    """
    if heads is None and "layer" in result.dims:
        heads = result
    own = result if heads is None else heads
    if heads is not None:
        _expect(heads, "distance_mass", ("layer", "head", "distance_bin"))
    if heads is not result:
        _expect(result, "distance_mass", ("attention_kind", "distance_bin"), "lower", "upper")
    distances = result["distance_bin"].values
    names = [_distances(int(first)) for first in distances]
    figure = go.Figure()
    if heads is not None:
        figure.add_traces(list(_head_lines(heads)))
    if heads is not result:
        floor = _smallest(result["distance_mass"].values) / 4
        for kind in _kinds_with(result["distance_mass"]):
            mass, lower, upper = (
                result[name].sel(attention_kind=kind).transpose("distance_bin").values
                for name in ("distance_mass", "lower", "upper")
            )
            hover = [
                f"{_KIND_LINES[kind]}, {name}<br>mass {value:.3g}{_bounds(low, high)}"
                for name, value, low, high in zip(names, mass, lower, upper, strict=True)
            ]
            lower = np.where(upper > 0, np.maximum(lower, floor), np.nan)
            x, positive = np.arange(len(mass)), np.where(mass > 0, mass, np.nan)
            figure.add_traces(list(_kind_lines(x, (positive, lower, upper), kind, hover)))
    every = -(-len(distances) // 12)
    ticks = np.arange(len(distances))[::every]
    figure.update_xaxes(
        title_text="distance from the query back to the key (tokens; bins double in width)",
        tickvals=ticks.tolist(),
        ticktext=[f"{int(first):,}" for first in distances[ticks]],
        range=[-0.4, len(distances) - 0.6],
    )
    shown = [data["distance_mass"].values for data in (result, own)]
    figure.update_yaxes(title_text="attention mass in the bin (log axis)", **_log_axis(shown))
    chunk_size = result.attrs.get("chunk_size")
    # Bin k of distances 2^(k - 1) and up is drawn at k: its lower end is half a step to the left.
    if chunk_size and np.log2(chunk_size) + 0.5 < len(distances) - 0.5:
        at = float(np.log2(chunk_size) + 0.5)
        figure.add_vline(x=at, line=_BORDER, annotation_text=f"chunk: {chunk_size:,}", annotation_position="top")
    return _lines_figure(figure, result, title, height=460, top=84, bands=heads is not result)


def _distances(first: int) -> str:
    """The distances of a bin, in words."""
    if first == 0:
        return "the query's own token"
    return "1 token back" if first == 1 else f"{first:,} to {2 * first - 1:,} tokens back"


def _head_lines(heads: xr.Dataset) -> Iterator[go.Scatter]:
    """The heads of each kind as one trace of thin lines, with gaps between them."""
    heads = heads.transpose("layer", "head", "distance_bin", ...)
    kinds = parts.attention_kinds(heads)
    names = [_distances(int(first)) for first in heads["distance_bin"].values]
    n_heads, gap = heads.sizes["head"], ((0, 0), (0, 0), (0, 1))
    faint = 0.5 if heads.sizes["layer"] * n_heads <= 64 else 0.2
    for kind in parts.KIND_NAMES:
        own = heads.isel(layer=kinds == kind)
        if not own.sizes["layer"]:
            continue
        mass = own["distance_mass"].values
        layer, head, name = np.meshgrid(own["layer"].values, own["head"].values, np.array(names, object), indexing="ij")
        hover = parts.strings(
            lambda layer, head, name, value: f"layer {layer}, head {head}, {name}<br>mass {value:.3g}",
            layer, head, name, mass,
        )  # fmt: skip
        x = np.broadcast_to(np.arange(len(names), dtype=float), mass.shape)
        yield go.Scatter(
            x=np.pad(x, gap, constant_values=np.nan).ravel(),
            y=np.pad(np.where(mass > 0, mass, np.nan), gap, constant_values=np.nan).ravel(),
            mode="lines",
            name=f"heads of {_KIND_LINES[kind]}",
            line={"color": parts.KIND_COLOURS[kind], "width": 1},
            opacity=faint,
            customdata=np.pad(hover, gap, constant_values="").ravel(),
            hovertemplate="%{customdata}<extra></extra>",
        )


def entropy_by_position(
    result: xr.Dataset, *, chunk_size: int | None = None, title: str = "How widely the heads attend along the text"
) -> go.Figure:
    """Entropy of attention by position for each kind of layer, below the most that the visible keys allow.

    Parameters
    ----------
    result : from ``attention_maps.position_profile`` of "entropy": ``mean``, ``lower`` and ``upper`` (attention_kind,
        position_bin).
    chunk_size : tokens in a chunk of a RoPE layer; the attribute of ``result``, where it has one.
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with a dashed line for each kind: the mean over the bin's positions of ln(visible keys), the entropy of a
    head that attends evenly. That of RoPE layers, and the chunk borders, need the size of a chunk.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims, or if the profile is of another statistic.
    """
    _expect(result, "mean", ("attention_kind", "position_bin"), "lower", "upper", "bin_stop")
    statistic = result.attrs.get("statistic", "entropy")
    if statistic != "entropy":
        raise SchemaError(f"this is a profile of {statistic!r}: pass position_profile(attention, 'entropy')")
    chunk_size = chunk_size or result.attrs.get("chunk_size")
    start, stop = result["position_bin"].values, result["bin_stop"].values
    middle = (start + stop - 1) / 2
    figure = go.Figure()
    for kind in _kinds_with(result["mean"]):
        mean, lower, upper = (
            result[name].sel(attention_kind=kind).transpose("position_bin").values
            for name in ("mean", "lower", "upper")
        )
        most = _even_entropy(start, stop, kind=kind, chunk_size=chunk_size)
        if most is not None:
            figure.add_trace(_even_line(middle, most, kind, first=figure.data == ()))
        hover = [
            f"{_KIND_LINES[kind]}, {_span(first, last)}<br>entropy {value:.3g} nat{_bounds(low, high)}"
            for first, last, value, low, high in zip(start, stop, mean, lower, upper, strict=True)
        ]
        figure.add_traces(list(_kind_lines(middle, (mean, lower, upper), kind, hover)))
    _borders(figure, int(stop.max()), chunk_size)
    figure.update_xaxes(title_text="position in the text (token)", range=[-0.5, float(stop.max()) - 0.5])
    figure.update_yaxes(title_text="entropy (nat)", rangemode="tozero", showgrid=True, gridcolor=parts.GRID_COLOUR)
    return _lines_figure(figure, result, title, height=440, top=84)


def _even_entropy(start: np.ndarray, stop: np.ndarray, *, kind: str, chunk_size: int | None) -> np.ndarray | None:
    """Mean over the positions of each bin of ln(visible keys); None where that takes an unknown size of a chunk."""
    if kind == "rope" and not chunk_size:
        return None
    position = np.arange(start.min(), stop.max())
    log_keys = np.log1p(position % chunk_size if kind == "rope" and chunk_size else position)
    sums = np.concatenate([[0], np.cumsum(log_keys)])
    return (sums[stop - start.min()] - sums[start - start.min()]) / (stop - start)


def _even_line(x: np.ndarray, y: np.ndarray, kind: str, *, first: bool) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name="the most possible: ln(visible keys)",
        legendgroup="most",
        showlegend=first,
        line={"color": parts.KIND_COLOURS[kind], "width": 1.5, "dash": "dash"},
        hovertemplate=f"{_KIND_LINES[kind]}: at most %{{y:.3g}} nat<extra></extra>",
    )


def chunk_reach(result: xr.Dataset, *, title: str = "What happens at a chunk border") -> go.Figure:
    """Keys in reach, entropy, mean distance and loss on both sides of a chunk border, in panels over each other.

    Parameters
    ----------
    result : from ``attention_maps.chunk_reach``: ``reach`` and, where recorded, ``entropy`` and ``mean_distance``
        (attention_kind, chunk_position) and ``loss`` (chunk_position), each with ``…_lower`` and ``…_upper``.
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure whose x axis counts from the border: left of it the second half of a chunk, right of it the first half of the
    next. Both are means over all chunks.

    Raises
    ------
    SchemaError
        If a variable or the attribute ``chunk_size`` is missing.
    """
    _expect(result, "reach", ("attention_kind", "chunk_position"))
    if "chunk_size" not in result.attrs:
        raise SchemaError("chunk_reach has no attribute chunk_size: pass what attention_maps.chunk_reach returned")
    chunk_size = int(result.attrs["chunk_size"])
    units = {"reach": "visible keys", "entropy": "nat", "mean_distance": "tokens", "loss": "nat"}
    names = [name for name in units if name in result]
    figure = _stack([f"<b>{_words(name)}</b>" for name in names])
    start = result["chunk_position"].values
    stop = result["bin_stop"].values if "bin_stop" in result.coords else np.append(start[1:], chunk_size)
    middle = (start + stop - 1) / 2
    # The second half of a chunk lies before the border; NaN parts it from what comes after.
    after = middle - chunk_size * (middle >= chunk_size / 2)
    order = np.argsort(after, kind="stable")
    split = int((after < 0).sum())
    x = np.insert(after[order], split, np.nan)
    for row, name in enumerate(names, start=1):
        for kind in _kinds_with(result[name]) if "attention_kind" in result[name].dims else [None]:
            chosen = {} if kind is None else {"attention_kind": kind}
            value, lower, upper = (
                part.sel(chosen).values if part is not None else np.full(len(start), np.nan)
                for part in (result.get(f"{name}{bound}") for bound in ("", "_lower", "_upper"))
            )
            hover = [
                f"{_span(first, last)} of the chunk" + (f", {_KIND_LINES[kind]}" if kind else "")
                + f"<br>{_words(name)} {number:.4g} {units[name]}{_bounds(low, high)}"
                for first, last, number, low, high in zip(start, stop, value, lower, upper, strict=True)
            ]  # fmt: skip
            points = [np.insert(part[order], split, np.nan) for part in (value, lower, upper)]
            text = np.insert(np.array(hover, object)[order], split, "").tolist()
            for trace in _kind_lines(x, points, kind, text, first=row == 1):
                figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(title_text=units[name], row=row, col=1)
    figure.add_vline(x=-0.5, line=_BORDER)
    figure.update_xaxes(title_text=f"tokens after the border (chunks of {chunk_size:,})", row=len(names), col=1)
    figure.update_yaxes(rangemode="tozero", showgrid=True, gridcolor=parts.GRID_COLOUR)
    if "loss" in names:
        figure.update_yaxes(rangemode="normal", row=names.index("loss") + 1, col=1)
    return _lines_figure(figure, result, title, height=figure.layout.height)


def temperature(result: xr.Dataset, *, title: str = "What temperature tuning does along the text") -> go.Figure:
    """Temperature factor, entropy, far mass and loss by position, one line for each scale, in panels over each other.

    Parameters
    ----------
    result : from ``experiments.temperature``: ``factor`` (scale, position) and, where there, ``entropy``, ``far_mass``,
        ``loss`` and ``loss_change`` (scale, position_bin), each with ``…_lower`` and ``…_upper``.
    title : drawn above the figure; "" for none.

    Raises
    ------
    SchemaError
        If ``factor`` is missing or has other dims.
    """
    _expect(result, "factor", ("scale", "position"))
    units = {"entropy": "nat", "far_mass": "", "loss": "nat", "loss_change": "nat"}
    heads = {
        "factor": "factor on the queries of NoPE layers",
        "entropy": "entropy in NoPE layers",
        "far_mass": "mass on keys before the query's chunk, NoPE layers",
        "loss": "loss of the next token",
        "loss_change": "loss minus that at scale 1",
    }
    names = [name for name in units if name in result and result[name].notnull().any()]
    figure = _stack([f"<b>{heads[name]}</b>" for name in ("factor", *names)])
    scales = result["scale"].values
    position = result["position"].values
    for at, scale in enumerate(scales):
        colour, dash = _scale_look(scales.tolist(), at)
        style = {"name": _scale_name(float(scale)), "legendgroup": str(scale)}
        factor = result["factor"].transpose("scale", "position").values[at]
        steps = np.union1d(np.flatnonzero(np.diff(factor)) + 1, [0, len(factor) - 1])
        figure.add_trace(
            go.Scatter(
                x=position[steps],
                y=factor[steps],
                mode="lines",
                line={"color": colour, "dash": dash, "width": 2, "shape": "hv"},
                hovertemplate=f"{style['name']}<br>from position %{{x:,}}: factor %{{y:.4f}}<extra></extra>",
                **style,
            ),
            row=1,
            col=1,
        )
        for row, name in enumerate(names, start=2):
            for trace in _scale_lines(result.isel(scale=at), name, units[name], (colour, dash), style):
                figure.add_trace(trace, row=row, col=1)
    chunk_size = result.attrs.get("chunk_size")
    _borders(figure, len(position), chunk_size)
    figure.update_yaxes(showgrid=True, gridcolor=parts.GRID_COLOUR)
    for row, name in enumerate(("factor", *names), start=1):
        figure.update_yaxes(
            title_text={"factor": "factor", "far_mass": "mass"}.get(name) or units[name], row=row, col=1
        )
    figure.update_xaxes(range=[-0.5, len(position) - 0.5])
    figure.update_xaxes(title_text="position in the text (token)", row=len(names) + 1, col=1)
    return _lines_figure(figure, result, title, height=figure.layout.height + 30, top=94)


def _scale_name(scale: float) -> str:
    return {0.0: "tuning off", 1.0: "tuning as trained"}.get(scale, f"tuning × {scale:g}")


def _scale_look(scales: Sequence[float], at: int) -> tuple[str, str]:
    """Colour and dash of a scale: that of NoPE layers is for the model as it was trained."""
    if scales[at] == 1:
        return parts.KIND_COLOURS["nope"], "solid"
    if scales[at] == 0:
        return parts.INK, "dot"
    others = [scale for scale in scales if scale not in (0, 1)]
    return _SCALE_STYLES[others.index(scales[at]) % len(_SCALE_STYLES)]


def _scale_lines(
    own: xr.Dataset, name: str, unit: str, look: tuple[str, str], style: dict[str, str]
) -> Iterator[go.Scatter]:
    """Band and line of one variable (position_bin) at one scale."""
    start, stop = own["position_bin"].values, own["bin_stop"].values
    middle = (start + stop - 1) / 2
    value = own[name].values
    lower, upper = (own[f"{name}_{bound}"].values for bound in ("lower", "upper"))
    hover = [
        f"{style['name']}, {_span(first, last)}<br>{_words(name)} {number:.4g} {unit}{_bounds(low, high)}"
        for first, last, number, low, high in zip(start, stop, value, lower, upper, strict=True)
    ]
    yield _band(middle, lower, upper, colour=look[0], group=style["legendgroup"])
    yield go.Scatter(
        x=middle,
        y=value,
        mode="lines" if len(middle) > 1 else "markers",
        line={"color": look[0], "dash": look[1], "width": 2},
        showlegend=False,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        **style,
    )


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
    _expect(result, "mean", ("statistic", "attention_kind"), "lower", "upper", "difference", "units")
    names = [str(name) for name in result["statistic"].values]
    n_columns = min(len(names), 4)
    n_rows = -(-len(names) // n_columns)
    units = [str(unit) for unit in result["units"].values]
    heads = [
        f"<b>{_words(name)}</b>" + (f" ({unit})" if unit != "1" else "")
        for name, unit in zip(names, units, strict=True)
    ]
    inner = 150 * n_rows + 60 * (n_rows - 1)
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=heads,
        horizontal_spacing=0.08 if n_columns > 1 else 0,
        vertical_spacing=60 / inner if n_rows > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    kinds = _kinds_with(result["mean"])
    for index, name in enumerate(names):
        row, column = parts.place(index, n_columns)
        for kind in kinds:
            point = _kind_point(result.isel(statistic=index), name, kind, first=index == 0)
            figure.add_trace(point, row=row, col=column)
    places = [list(_KIND_LINES).index(kind) for kind in kinds]
    figure.update_xaxes(
        tickvals=places,
        ticktext=[_KIND_LINES[kind].replace(" layers", "") for kind in kinds],
        range=[-0.7, 1.7],
        showgrid=False,
    )
    figure.update_yaxes(rangemode="tozero", showgrid=True, gridcolor=parts.GRID_COLOUR, nticks=5)
    return _lines_figure(figure, result, title, height=inner + parts.PANEL_HEAD + 110)


def _kind_point(own: xr.Dataset, name: str, kind: str, *, first: bool) -> go.Scatter:
    """Mean of one kind with its interval; the hover has the difference between the kinds too."""
    value, lower, upper = (float(own[part].sel(attention_kind=kind)) for part in ("mean", "lower", "upper"))
    gap, low, high = (
        float(own[part]) if part in own else np.nan for part in ("difference", "difference_lower", "difference_upper")
    )
    difference = "" if np.isnan(gap) else f"<br>NoPE − RoPE: {gap:+.3g}{_bounds(low, high)}"
    return go.Scatter(
        x=[list(_KIND_LINES).index(kind)],
        y=[value],
        mode="markers",
        cliponaxis=False,
        name=_KIND_LINES[kind],
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
        customdata=[f"{_words(name)}, {_KIND_LINES[kind]}<br>{value:.3g}{_bounds(lower, upper)}{difference}"],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _kind_lines(
    x: np.ndarray, points: Sequence[np.ndarray], kind: str | None, hover: Sequence[str], *, first: bool = True
) -> Iterator[go.Scatter]:
    """Band and line of one kind, or of all layers (None); ``points`` are value, lower and upper."""
    value, lower, upper = points
    colour = parts.INK if kind is None else parts.KIND_COLOURS[kind]
    name = "all layers" if kind is None else _KIND_LINES[kind]
    yield _band(x, lower, upper, colour=colour, group=kind or "all")
    yield go.Scatter(
        x=x,
        y=value,
        mode="lines+markers" if len(x) <= 40 else "lines",
        name=name,
        legendgroup=kind or "all",
        showlegend=first and kind is not None,
        line={"color": colour, "width": 2.5},
        marker={"size": 6, "symbol": "circle" if kind is None else parts.KIND_SYMBOLS[kind]},
        customdata=list(hover),
        hovertemplate="%{customdata}<extra></extra>",
    )


def _band(x: np.ndarray, lower: np.ndarray, upper: np.ndarray, *, colour: str, group: str) -> go.Scatter:
    """What lies between two bounds, as one filled outline for each run of points that have both."""
    known = np.isfinite(x) & np.isfinite(lower) & np.isfinite(upper)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known, [False]])))
    outlines: list[list[np.ndarray]] = [[], []]
    for start, stop in edges.reshape(-1, 2):
        run = slice(start, stop)
        outlines[0] += [x[run], x[run][::-1], np.array([np.nan])]
        outlines[1] += [lower[run], upper[run][::-1], np.array([np.nan])]
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return go.Scatter(
        x=np.concatenate(outlines[0]) if outlines[0] else [],
        y=np.concatenate(outlines[1]) if outlines[1] else [],
        mode="lines",
        fill="toself",
        fillcolor=f"rgba({red},{green},{blue},0.18)",
        line={"width": 0},
        legendgroup=group,
        showlegend=False,
        hoverinfo="skip",
    )


# --- maps -------------------------------------------------------------------------------------------------------------


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
    figure = go.Figure([_map_heatmap(cells, shown, visible=shown == "largest weight") for shown in _MAP_COLUMNS])
    for trace in _map_marks(cells, legend=True):
        figure.add_trace(trace)
    n_tokens = cells.attrs["n_tokens"]
    figure.update_layout(height=_SQUARE + 126, width=_SQUARE_WIDTH, plot_bgcolor=parts.MISSING_COLOUR)
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title_text="key position (token)", range=[-0.5, n_tokens - 0.5], showgrid=False)
    figure.update_yaxes(title_text="query position (token)", range=[n_tokens - 0.5, -0.5])
    _map_colours(figure, [cells], n_marks=len(figure.data) - len(_MAP_COLUMNS))
    shown_title = f"Where the queries of {name} look" if title is None else title
    return _finish(figure, shown_title, height=figure.layout.height, top=76)


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
    for shown in _MAP_COLUMNS:
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
    return _finish(figure, title, height=figure.layout.height + 64, top=parts.PANEL_HEAD + 64)


_MAP_COLUMNS = ("largest weight", "mass")


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
    borders = _border_positions(n_tokens, chunk_size)
    if borders.size:
        nan = np.full(len(borders), np.nan)
        ends = np.stack([np.full(len(borders), -0.5), np.full(len(borders), n_tokens - 0.5), nan], axis=-1).ravel()
        at = np.stack([borders, borders, nan], axis=-1).ravel()
        yield go.Scatter(
            x=np.concatenate([at, ends]),
            y=np.concatenate([ends, at]),
            mode="lines",
            name=f"chunk border (every {chunk_size:,} tokens)",
            legendgroup="border",
            showlegend=legend,
            line=_BORDER,
            hoverinfo="skip",
        )


def _map_colours(figure: go.Figure, maps: Sequence[xr.Dataset], *, n_marks: int) -> None:
    """A log colour scale for each of the two things that maps show, and the switch between them."""
    choices = []
    for at, shown in enumerate(_MAP_COLUMNS):
        ticks = _log_ticks(np.concatenate([cells[shown].values.ravel() for cells in maps]))
        title = shown.split()[-1]
        if at == 0:
            _colour(figure, low=min(ticks), high=max(ticks), title=title, ticks=ticks)
        layout = {
            "coloraxis.cmin": min(ticks),
            "coloraxis.cmax": max(ticks),
            "coloraxis.colorbar.tickvals": list(ticks),
            "coloraxis.colorbar.ticktext": list(ticks.values()),
            "coloraxis.colorbar.title.text": title,
        }
        visible = [shown == other for other in _MAP_COLUMNS for _ in maps] + [True] * n_marks
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
    ticks = {power: _power(power) for power in range(low, high + 1)}
    if (known < 10.0**low).any():
        ticks[low] = "≤ " + ticks[low]
    return ticks


def _log10(values: np.ndarray) -> np.ndarray:
    """Log of a mass; NaN stays NaN, and 0 is put below every other mass and below the lowest colour."""
    smallest = np.min(values, where=values > 0, initial=10.0**-DECADES)
    return np.log10(np.where(values == 0, smallest / 10, values))


def _power(power: int, factor: int = 1) -> str:
    """A multiple of a power of 10 as people write it."""
    if power >= -3:
        return f"{factor * 10.0**power:g}"
    return f"10<sup>{power}</sup>" if factor == 1 else f"{factor}·10<sup>{power}</sup>"


# --- needle -----------------------------------------------------------------------------------------------------------

_NEEDLE_NAMES = {
    "is_found": "trials found",
    "copying_score": "copying score",
    "needle_mass": "mass on the needle",
    "key_rank": "rank of the needle's key",
    "answer_rank": "rank of the answer",
    "answer_loss": "loss of the answer (nat)",
    "needle_loss": "loss in the needle (nat)",
}


def needle(
    result: xr.Dataset, *, statistic: str = "is_found", title: str = "Is the needle found, by depth and length?"
) -> go.Figure:
    """Heatmap of what a needle experiment found, by the needle's depth and the text's length.

    Parameters
    ----------
    result : from ``experiments.needle``: the statistic (length, depth), or (length, depth, layer, head).
    statistic : "is_found", "answer_rank" or "answer_loss"; of the head that copies best, "copying_score",
        "needle_mass" or "key_rank".
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with a needle at a text's start at the top. A statistic of heads is that of one head everywhere: the one with
    the highest mean ``copying_score``, named beside the x axis.

    Raises
    ------
    SchemaError
        If the statistic or its dims are not there.
    ProbeError
        For a statistic that is none of these.
    """
    if statistic not in _NEEDLE_NAMES:
        raise ProbeError(f"statistic is {statistic!r}: choose one of {', '.join(_NEEDLE_NAMES)}")
    schema.require(result, statistic)
    label, chosen, shown_head = _NEEDLE_NAMES[statistic], result[statistic], ""
    if {"layer", "head"} <= set(chosen.dims):
        best = _best_head(result, statistic)
        kind = schema.labels(result["attention_kind"])[best["layer"]] if "attention_kind" in result else ""
        name = layer_label(int(result["layer"][best["layer"]]), kind == "nope")
        shown_head = f"; layer {name}, head {int(result['head'][best['head']])}"
        chosen = chosen.isel(best)
    _expect(chosen.to_dataset(name=statistic), statistic, ("length", "depth"))
    values = chosen.transpose("depth", "length").values.astype(float)
    lengths, depths = result["length"].values, result["depth"].values
    is_share = statistic in ("is_found", "copying_score", "needle_mass")
    form = "{:.0%}" if statistic == "is_found" else "{:.2f}" if is_share else "{:.3g}"
    roomy = len(lengths) <= parts.NUMBERED_EXPERTS
    text = parts.strings(lambda value: "" if np.isnan(value) or not roomy else form.format(value), values)
    length, depth = np.meshgrid(lengths, depths)
    hover = parts.strings(
        lambda length, depth, value: (
            f"{length:,} tokens, needle after {100 * depth:.3g} % of the filler<br>{label}{shown_head}: "
            + ("not defined" if np.isnan(value) else form.format(value))
        ),
        length,
        depth,
        values,
    )
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=np.arange(len(lengths)),
            y=np.arange(len(depths)),
            text=text,
            texttemplate="%{text}",
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=True,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
        )
    )
    step = -(-len(lengths) // 12)
    figure.update_layout(height=max(30 * len(depths), 150) + 90, plot_bgcolor=parts.MISSING_COLOUR)
    _colour(figure, low=0, high=1 if is_share else _largest(values), title=label)
    if statistic == "is_found":
        figure.update_layout(coloraxis_colorbar_tickformat=".0%")
    figure.update_xaxes(
        title_text=f"length of the text (tokens){shown_head}",
        tickvals=np.arange(len(lengths))[::step].tolist(),
        ticktext=[f"{length:,}" for length in lengths[::step]],
        showgrid=False,
    )
    figure.update_yaxes(
        title_text="depth (% of the filler)",
        tickvals=np.arange(len(depths)).tolist(),
        ticktext=[f"{100 * depth:.3g}" for depth in depths],
        range=[len(depths) - 0.5, -0.5],
    )
    return _finish(figure, title, height=figure.layout.height, top=16)


def _best_head(result: xr.Dataset, statistic: str) -> dict[str, int]:
    """Place of the head that copies best on average over lengths and depths; 0 counts where none does."""
    schema.require(result, "copying_score")
    score = result["copying_score"].mean(["length", "depth"]).transpose("layer", "head").values
    row, column = np.unravel_index(int(np.argmax(np.nan_to_num(score))), score.shape)
    return {"layer": int(row), "head": int(column)}


# --- what they share --------------------------------------------------------------------------------------------------


def _expect(data: xr.Dataset, name: str, dims: tuple[str, ...], *others: str) -> None:
    """Raise a SchemaError unless the variable has just these dims and the others are there."""
    schema.require(data, name, *others)
    if set(data[name].dims) != set(dims):
        raise SchemaError(
            f"{name} has dims {_listed(data[name].dims)}, expected {_listed(dims)}: select one value of any other dim"
        )


def _listed(dims: Sequence[object]) -> str:
    return "(" + ", ".join(map(str, dims)) + ")"


def _words(name: str) -> str:
    """A statistic's name as people write it."""
    return name.replace("_", " ")


def _with_units(statistic: str, values: xr.DataArray) -> str:
    units = values.attrs.get("units", "1")
    return _words(statistic) + (f" ({units})" if units != "1" else "")


def _bounds(lower: float, upper: float) -> str:
    return parts.bounds(lower, upper, ".3g")


def _span(first: int, stop: int) -> str:
    """Positions of a bin, in words."""
    return f"position {first:,}" if stop - first == 1 else f"positions {first:,}–{stop - 1:,}"


def _kinds_with(values: xr.DataArray) -> list[str]:
    """The kinds of layers that have any value, RoPE first."""
    there = [str(kind) for kind in schema.labels(values["attention_kind"])]
    return [kind for kind in parts.KIND_NAMES if kind in there and values.sel(attention_kind=kind).notnull().any()]


def _largest(values: np.ndarray, *, least: float = 0) -> float:
    """The largest finite value, or ``least`` if that is larger; 1 where neither is above 0."""
    return float(np.max(values, where=np.isfinite(values), initial=least)) or 1.0


def _smallest(values: np.ndarray) -> float:
    """The smallest value above 0; 1 where there is none."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(positive.min()) if positive.size else 1.0


def _layer_axis(figure: go.Figure, data: xr.Dataset) -> None:
    """Layers on y, 0 at the bottom; where labels must thin out, those of NoPE layers stay."""
    parts.layer_axis(figure, data)
    nope = data["layer"].values[parts.attention_kinds(data) == "nope"].tolist()
    if data.sizes["layer"] > LABELLED_LAYERS and 0 < len(nope) <= LABELLED_LAYERS:
        ends = [layer for layer in data["layer"].values[[0]].tolist() if layer not in nope]
        figure.update_yaxes(tickvals=ends + nope, ticktext=[*map(str, ends), *(layer_label(at, True) for at in nope)])
    notes = [f"{NOPE_SIGN} NoPE"] * bool(nope)
    notes += ["gap: not recorded"] * (data.sizes["layer"] < len(parts.all_layers(data)))
    figure.update_yaxes(title_text=f"layer ({', '.join(notes)})" if notes else "layer")


def _border_positions(n_tokens: int, chunk_size: int | None) -> np.ndarray:
    """Where chunks end, between two tokens; none where there are too many to draw."""
    borders = np.arange(chunk_size, n_tokens, chunk_size) - 0.5 if chunk_size else np.zeros(0)
    return borders if len(borders) <= MAX_BORDERS else np.zeros(0)


def _borders(figure: go.Figure, n_tokens: int, chunk_size: int | None) -> None:
    """Thin vertical lines at chunk borders in every panel, and what they are in the legend."""
    borders = _border_positions(n_tokens, chunk_size)
    for at in borders:
        figure.add_vline(x=float(at), line=_BORDER, opacity=0.6)
    if borders.size:
        name = f"chunk border (every {chunk_size:,} tokens)"
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=_BORDER, name=name))


def _stack(heads: Sequence[str]) -> go.Figure:
    """Panels over each other on one x axis."""
    panel, gap = 120, 34
    inner = len(heads) * panel + (len(heads) - 1) * gap
    figure = make_subplots(
        rows=len(heads),
        cols=1,
        subplot_titles=list(heads),
        shared_xaxes=True,
        vertical_spacing=gap / inner if len(heads) > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    return figure.update_layout(height=inner + 110)


def _lines_figure(
    figure: go.Figure, result: xr.Dataset, title: str, *, height: int, top: int = 64, bands: bool = True
) -> go.Figure:
    """Legend, template, title and size of a figure of lines; the level of its bands stands in the legend."""
    if bands and "level" in result.attrs:
        known = [result[name].notnull().any() for name in map(str, result.data_vars) if name.endswith("lower")]
        name = f"{100 * result.attrs['level']:g} % intervals" if any(known) else "too few samples for intervals"
        square = {"symbol": "square", "size": 12, "color": "rgba(128,134,145,0.35)"}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=square, name=name))
    return _finish(figure, title, height=height, top=top)


def _finish(figure: go.Figure, title: str, *, height: int, top: int) -> go.Figure:
    """Template, title and size, the title at the very top and the legend below it, whatever else is over the plot."""
    figure = parts.finish(figure, title, height=height, top=top)
    below = 1 - (36 / figure.layout.height if title else 0)
    figure.update_layout(legend={"y": below, "yref": "container", "yanchor": "top"})
    return figure.update_layout(title={"y": 1 - 18 / figure.layout.height, "yref": "container", "yanchor": "middle"})


def _log_axis(shown: Sequence[np.ndarray]) -> dict[str, object]:
    """A log axis with ticks at powers of 10, and at 2 and 5 times them where few of those are in sight."""
    values = np.concatenate([part.ravel() for part in shown])
    low, high = np.log10(_smallest(values)), np.log10(_largest(values))
    pad = 0.06 * max(high - low, 0.5)
    factors = (1, 2, 5) if high - low < 1.5 else (1,)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    ticks = {factor * 10.0**power: _power(power, factor) for power in powers for factor in factors}
    return {
        "type": "log",
        "range": [low - pad, high + pad],
        "showgrid": True,
        "gridcolor": parts.GRID_COLOUR,
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
    }


def _colour(
    figure: go.Figure,
    *,
    low: float,
    high: float,
    title: str,
    ticks: Mapping[int, str] | None = None,
) -> None:
    """One sequential colour scale for all heatmaps, its bar right of the figure.

    The figure's height must be set. ``layout.meta`` keeps the scales for a light and for a dark page.
    """
    inner = figure.layout.height - parts.PANEL_HEAD - parts.TEMPLATE.layout.margin.b
    bar = {
        "title": {"text": title, "side": "top"},
        "thickness": 11,
        "outlinewidth": 0,
        "len": min(parts.COLORBAR / inner, 1),
        "x": 1.01,
        "y": 1,
        "yanchor": "top",
        "xpad": 4,
        "ypad": 0,
    }
    if ticks is not None:
        bar |= {"tickvals": list(ticks), "ticktext": list(ticks.values())}
    scale = {"cmin": low, "cmax": high, "colorscale": SEQUENTIAL["light"], "colorbar": bar}
    figure.update_layout(coloraxis=scale, meta={"colorscale": SEQUENTIAL})
