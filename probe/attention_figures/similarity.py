"""How alike heads attend, each with every other."""

from __future__ import annotations

from itertools import pairwise
from math import isqrt

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import schema
from probe.attention_figures.parts import MAX_BORDERS, SQUARE, SQUARE_WIDTH, colour_magnitudes
from probe.bootstrap import divide
from probe.schema import SchemaError
from probe.text_view import NOPE_SIGN

EXACT_HEADS = 200
"""Similarities of more heads are rounded to whole per cents, which take a byte each."""

MAX_BYTES = 1_320_000
"""What the cells of so many heads may take, before the page's base64 adds a third."""


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
    Of more than 200 heads it shows whole per cents. From about 1,100 heads on, where cells are narrower than pixels, a
    cell is the mean over neighbouring heads of a layer, so that the figure stays below 2 MB; select layers to see each.

    Raises
    ------
    SchemaError
        If the dims are others, or a coord is missing.
    """
    schema.require(similarity.to_dataset(name="similarity"), "layer", "attention_kind")
    if set(similarity.dims) != {"head", "other_head"}:
        raise SchemaError(f"similarity has dims {schema.listed(similarity.dims)}, expected (head, other_head)")
    order = np.argsort(similarity["layer"].values, kind="stable")
    own = similarity.transpose("head", "other_head").isel(head=order, other_head=order)
    is_exact = len(order) <= EXACT_HEADS
    width = 1 if is_exact else _cell_width(own.values)
    starts = _cell_starts(own["layer"].values, width)
    values = own.values if width == 1 else _cell_means(own.values, starts)
    names = _cell_names(own, starts)
    end, unit, form = (1, "", ".3f") if is_exact else (100, " %", ".0f")
    figure = go.Figure(
        go.Heatmap(
            z=values.astype(np.float32) if is_exact else _per_cent(values),
            x=names,
            y=names,
            coloraxis="coloraxis",
            hoverongaps=False,
            hovertemplate=f"%{{y}}<br>%{{x}}<br>cosine similarity %{{z:{form}}}{unit}<extra></extra>",
        )
    )
    figure.update_layout(height=SQUARE + 66, width=SQUARE_WIDTH, plot_bgcolor=parts.MISSING_COLOUR)
    _layer_axes(figure, own.isel(head=starts), width)
    colour_magnitudes(figure, 0, end, title="similarity")
    figure.update_layout(coloraxis_colorbar_ticksuffix=unit)
    return parts.finish(figure, title, height=figure.layout.height, top=16)


def _cell_width(values: np.ndarray) -> int:
    """How many heads share a cell, so that all cells fit into ``MAX_BYTES``; undefined ones make them float32."""
    n_cells = isqrt(MAX_BYTES // (4 if np.isnan(values).any() else 1))
    return -(-len(values) // n_cells)


def _cell_starts(layers: np.ndarray, width: int) -> np.ndarray:
    """The first head of each cell of up to ``width`` heads; none holds heads of two layers."""
    edges = [0, *(np.flatnonzero(np.diff(layers)) + 1), len(layers)]
    return np.concatenate([np.arange(start, stop, width) for start, stop in pairwise(edges)])


def _cell_means(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Mean over the defined similarities in each cell; NaN where there is none."""
    known = ~np.isnan(values)
    sums, n_known = (
        np.add.reduceat(np.add.reduceat(part, starts, axis=0), starts, axis=1)
        for part in (np.where(known, values, 0), known.astype(np.int64))
    )
    return divide(sums, n_known)


def _cell_names(own: xr.DataArray, starts: np.ndarray) -> list[str]:
    """Layer and heads of every cell."""
    layers, heads = own["layer"].values, [str(label).split(".")[-1] for label in own["head"].values]
    return [
        f"layer {layers[start]}, "
        + (f"head {heads[start]}" if stop - start == 1 else f"heads {heads[start]}–{heads[stop - 1]}")
        for start, stop in pairwise([*starts, len(heads)])
    ]


def _per_cent(values: np.ndarray) -> np.ndarray:
    """Whole per cents in a byte each, or in float32 where some are undefined: a whole number cannot say so."""
    rounded = np.round(100 * values)
    return rounded.astype(np.float32 if np.isnan(rounded).any() else np.int8)


def _layer_axes(figure: go.Figure, cells: xr.DataArray, width: int) -> None:
    """The same axis on both sides: a label in the middle of a layer's cells, and lines between layers."""
    layers, kinds = cells["layer"].values, schema.labels(cells["attention_kind"])
    starts = np.concatenate([[0], np.flatnonzero(np.diff(layers)) + 1])
    middles = (starts + np.append(starts[1:], len(layers)) - 1) / 2
    shown, labels = parts.layer_ticks(layers[starts], kinds[starts], most=20)
    notes = [f"{NOPE_SIGN} NoPE"] * ("nope" in kinds) + [f"{width} heads to a cell"] * (width > 1)
    axis = {
        "type": "category",
        "tickvals": middles[shown].tolist(),
        "ticktext": labels,
        "range": [-0.5, len(layers) - 0.5],
        "title_text": f"heads by layer ({', '.join(notes)})" if notes else "heads by layer",
        "showgrid": False,
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    edges = starts[1:] - 0.5 if len(starts) <= MAX_BORDERS else starts[:0]
    line = {"type": "line", "line": {"color": "#b9bec8", "width": 1}}
    upright = [line | {"x0": edge, "x1": edge, "y0": 0, "y1": 1, "yref": "y domain"} for edge in edges]
    level = [line | {"y0": edge, "y1": edge, "x0": 0, "x1": 1, "xref": "x domain"} for edge in edges]
    figure.update_layout(shapes=upright + level)
