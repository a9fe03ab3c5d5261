"""Figures of lines for the two kinds of layers: by distance, along the text, and around a chunk border."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe.attention_figures.parts import (
    BORDER,
    KIND_LINES,
    add_borders,
    bounds,
    expect,
    finish_lines,
    kind_lines,
    kinds_with,
    log_axis,
    smallest,
    span,
    stacked_panels,
    words,
)
from probe.schema import SchemaError


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
        expect(heads, "distance_mass", ("layer", "head", "distance_bin"))
    if heads is not result:
        expect(result, "distance_mass", ("attention_kind", "distance_bin"), "lower", "upper")
    distances = result["distance_bin"].values
    names = [_distances(int(first)) for first in distances]
    figure = go.Figure()
    if heads is not None:
        figure.add_traces(list(_head_lines(heads)))
    if heads is not result:
        floor = smallest(result["distance_mass"].values) / 4
        for kind in kinds_with(result["distance_mass"]):
            mass, lower, upper = (
                result[name].sel(attention_kind=kind).transpose("distance_bin").values
                for name in ("distance_mass", "lower", "upper")
            )
            hover = [
                f"{KIND_LINES[kind]}, {name}<br>mass {value:.3g}{bounds(low, high)}"
                for name, value, low, high in zip(names, mass, lower, upper, strict=True)
            ]
            lower = np.where(upper > 0, np.maximum(lower, floor), np.nan)
            x, positive = np.arange(len(mass)), np.where(mass > 0, mass, np.nan)
            figure.add_traces(list(kind_lines(x, (positive, lower, upper), kind, hover)))
    every = -(-len(distances) // 12)
    ticks = np.arange(len(distances))[::every]
    figure.update_xaxes(
        title_text="distance from the query back to the key (tokens; bins double in width)",
        tickvals=ticks.tolist(),
        ticktext=[f"{int(first):,}" for first in distances[ticks]],
        range=[-0.4, len(distances) - 0.6],
    )
    shown = [data["distance_mass"].values for data in (result, own)]
    figure.update_yaxes(title_text="attention mass in the bin (log axis)", **log_axis(shown))
    chunk_size = result.attrs.get("chunk_size")
    # Bin k of distances 2^(k - 1) and up is drawn at k: its lower end is half a step to the left.
    if chunk_size and np.log2(chunk_size) + 0.5 < len(distances) - 0.5:
        at = float(np.log2(chunk_size) + 0.5)
        figure.add_vline(x=at, line=BORDER, annotation_text=f"chunk: {chunk_size:,}", annotation_position="top")
    return finish_lines(figure, result, title, height=460, top=84, bands=heads is not result)


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
            name=f"heads of {KIND_LINES[kind]}",
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
    chunk_size : tokens in a chunk of a RoPE layer; that of ``result``, its attribute ``chunk_size``, unless given.
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
    expect(result, "mean", ("attention_kind", "position_bin"), "lower", "upper", "bin_stop")
    statistic = result.attrs.get("statistic", "entropy")
    if statistic != "entropy":
        raise SchemaError(f"this is a profile of {statistic!r}: pass position_profile(attention, 'entropy')")
    chunk_size = chunk_size or result.attrs.get("chunk_size")
    start, stop = result["position_bin"].values, result["bin_stop"].values
    middle = (start + stop - 1) / 2
    figure = go.Figure()
    for kind in kinds_with(result["mean"]):
        mean, lower, upper = (
            result[name].sel(attention_kind=kind).transpose("position_bin").values
            for name in ("mean", "lower", "upper")
        )
        most = _even_entropy(start, stop, kind=kind, chunk_size=chunk_size)
        if most is not None:
            figure.add_trace(_even_line(middle, most, kind, first=figure.data == ()))
        hover = [
            f"{KIND_LINES[kind]}, {span(first, last)}<br>entropy {value:.3g} nat{bounds(low, high)}"
            for first, last, value, low, high in zip(start, stop, mean, lower, upper, strict=True)
        ]
        figure.add_traces(list(kind_lines(middle, (mean, lower, upper), kind, hover)))
    add_borders(figure, int(stop.max()), chunk_size)
    figure.update_xaxes(title_text="position in the text (token)", range=[-0.5, float(stop.max()) - 0.5])
    figure.update_yaxes(title_text="entropy (nat)", rangemode="tozero", showgrid=True, gridcolor=parts.GRID_COLOUR)
    return finish_lines(figure, result, title, height=440, top=84)


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
        hovertemplate=f"{KIND_LINES[kind]}: at most %{{y:.3g}} nat<extra></extra>",
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
    next. Both are means over the same borders.

    Raises
    ------
    SchemaError
        If a variable or the attribute ``chunk_size`` is missing.
    """
    expect(result, "reach", ("attention_kind", "chunk_position"))
    if "chunk_size" not in result.attrs:
        raise SchemaError("chunk_reach has no attribute chunk_size: pass what attention_maps.chunk_reach returned")
    chunk_size = int(result.attrs["chunk_size"])
    units = {"reach": "visible keys", "entropy": "nat", "mean_distance": "tokens", "loss": "nat"}
    names = [name for name in units if name in result]
    figure = stacked_panels([f"<b>{words(name)}</b>" for name in names])
    start = result["chunk_position"].values
    stop = result["bin_stop"].values if "bin_stop" in result.coords else np.append(start[1:], chunk_size)
    middle = (start + stop - 1) / 2
    # The second half of a chunk lies before the border; NaN parts it from what comes after.
    after = middle - chunk_size * (middle >= chunk_size / 2)
    order = np.argsort(after, kind="stable")
    split = int((after < 0).sum())
    x = np.insert(after[order], split, np.nan)
    for row, name in enumerate(names, start=1):
        for kind in kinds_with(result[name]) if "attention_kind" in result[name].dims else [None]:
            chosen = {} if kind is None else {"attention_kind": kind}
            value, lower, upper = (
                part.sel(chosen).values if part is not None else np.full(len(start), np.nan)
                for part in (result.get(f"{name}{bound}") for bound in ("", "_lower", "_upper"))
            )
            hover = [
                f"{span(first, last)} of the chunk" + (f", {KIND_LINES[kind]}" if kind else "")
                + f"<br>{words(name)} {number:.4g} {units[name]}{bounds(low, high)}"
                for first, last, number, low, high in zip(start, stop, value, lower, upper, strict=True)
            ]  # fmt: skip
            points = [np.insert(part[order], split, np.nan) for part in (value, lower, upper)]
            text = np.insert(np.array(hover, object)[order], split, "").tolist()
            for trace in kind_lines(x, points, kind, text, first=row == 1):
                figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(title_text=units[name], row=row, col=1)
    figure.add_vline(x=-0.5, line=BORDER)
    figure.update_xaxes(title_text=f"tokens after the border (chunks of {chunk_size:,})", row=len(names), col=1)
    figure.update_yaxes(rangemode="tozero", showgrid=True, gridcolor=parts.GRID_COLOUR)
    if "loss" in names:
        figure.update_yaxes(rangemode="normal", row=names.index("loss") + 1, col=1)
    return finish_lines(figure, result, title, height=figure.layout.height)
