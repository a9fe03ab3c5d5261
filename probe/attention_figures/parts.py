"""What figures of attention share: colours of magnitudes, chunk borders, bands, axes, and checks of what is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe import figure_parts as parts
from probe import schema
from probe.schema import SchemaError
from probe.text_view import NOPE_SIGN

SEQUENTIAL = {
    "light": ["#f5f8ed", "#cce1c5", "#97cca9", "#5fb49b", "#2c9991", "#097d85", "#036179", "#00446f", "#122864"],
    "dark": ["#191e28", "#22354b", "#214f70", "#106d8d", "#058c9c", "#28aba5", "#60c7a7", "#9ae0a9", "#d2f6af"],
}
"""Magnitudes, in steps of equal lightness; 0 has the colour of the page."""

MAX_BORDERS = 64
"""With more chunk borders on an axis none is drawn: they would cover the data."""

KIND_LINES = {"rope": "RoPE layers", "nope": f"NoPE layers {NOPE_SIGN}"}
BORDER = {"color": "rgba(128,134,145,0.8)", "width": 1, "dash": "dot"}

SQUARE = 480
"""Pixels of a side of a square plot."""

SQUARE_WIDTH = SQUARE + 162
"""Pixels of the figure around it, which fits a narrow page."""


def expect(data: xr.Dataset, name: str, dims: tuple[str, ...], *others: str) -> None:
    """Raise a SchemaError unless the variable has just these dims and the others are there."""
    schema.require(data, name, *others)
    if set(data[name].dims) != set(dims):
        raise SchemaError(
            f"{name} has dims {schema.listed(data[name].dims)}, expected {schema.listed(dims)}: "
            "select one value of any other dim"
        )


def words(name: str) -> str:
    """A statistic's name as people write it."""
    return name.replace("_", " ")


def with_units(statistic: str, values: xr.DataArray) -> str:
    """A statistic's name and the units of its values, where they have any."""
    units = values.attrs.get("units", "1")
    return words(statistic) + (f" ({units})" if units != "1" else "")


def bounds(lower: float, upper: float) -> str:
    """An interval after a number of three digits, or nothing where there is none."""
    return parts.bounds(lower, upper, ".3g")


def span(first: int, stop: int) -> str:
    """Positions of a bin, in words."""
    return f"position {first:,}" if stop - first == 1 else f"positions {first:,}–{stop - 1:,}"


def kinds_with(values: xr.DataArray) -> list[str]:
    """The kinds of layers that have any value, RoPE first."""
    there = [str(kind) for kind in schema.labels(values["attention_kind"])]
    return [kind for kind in parts.KIND_NAMES if kind in there and values.sel(attention_kind=kind).notnull().any()]


def largest(values: np.ndarray, *, least: float = 0) -> float:
    """The largest finite value, or ``least`` if that is larger; 1 where neither is above 0."""
    return float(np.max(values, where=np.isfinite(values), initial=least)) or 1.0


def smallest(values: np.ndarray) -> float:
    """The smallest value above 0; 1 where there is none."""
    positive = values[np.isfinite(values) & (values > 0)]
    return float(positive.min()) if positive.size else 1.0


def border_positions(n_tokens: int, chunk_size: int | None) -> np.ndarray:
    """Where chunks end, between two tokens; none where there are too many to draw."""
    borders = np.arange(chunk_size, n_tokens, chunk_size) - 0.5 if chunk_size else np.zeros(0)
    return borders if len(borders) <= MAX_BORDERS else np.zeros(0)


def add_borders(figure: go.Figure, n_tokens: int, chunk_size: int | None) -> None:
    """Thin vertical lines at chunk borders in every panel, and what they are in the legend."""
    borders = border_positions(n_tokens, chunk_size)
    for at in borders:
        figure.add_vline(x=float(at), line=BORDER, opacity=0.6)
    if chunk_size and borders.size:
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=BORDER, name=border_name(chunk_size)))


def border_name(chunk_size: int) -> str:
    """What the legend calls the lines at chunk borders."""
    return f"chunk border (every {chunk_size:,} tokens)"


def stacked_panels(headings: Sequence[str]) -> go.Figure:
    """Panels over each other on one x axis."""
    panel, gap = 120, 34
    inner = len(headings) * panel + (len(headings) - 1) * gap
    figure = make_subplots(
        rows=len(headings),
        cols=1,
        subplot_titles=list(headings),
        shared_xaxes=True,
        vertical_spacing=gap / inner if len(headings) > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    return figure.update_layout(height=inner + 110)


def finish_lines(
    figure: go.Figure, result: xr.Dataset, title: str, *, height: int, top: int = 64, bands: bool = True
) -> go.Figure:
    """Legend, template, title and size of a figure of lines; the level of its bands stands in the legend."""
    if bands and "level" in result.attrs:
        known = [result[name].notnull().any() for name in map(str, result.data_vars) if name.endswith("lower")]
        name = f"{100 * result.attrs['level']:g} % intervals" if any(known) else "too few samples for intervals"
        square = {"symbol": "square", "size": 12, "color": "rgba(128,134,145,0.35)"}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=square, name=name))
    return parts.finish(figure, title, height=height, top=top)


def log_axis(shown: Sequence[np.ndarray]) -> dict[str, object]:
    """A log axis with ticks at powers of 10, and at 2 and 5 times them where few of those are in sight."""
    values = np.concatenate([part.ravel() for part in shown])
    low, high = np.log10(smallest(values)), np.log10(largest(values))
    pad = 0.06 * max(high - low, 0.5)
    factors = (1, 2, 5) if high - low < 1.5 else (1,)
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    ticks = {factor * 10.0**power: power_of_ten(power, factor) for power in powers for factor in factors}
    return {
        "type": "log",
        "range": [low - pad, high + pad],
        "showgrid": True,
        "gridcolor": parts.GRID_COLOUR,
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
    }


def power_of_ten(power: int, factor: int = 1) -> str:
    """A multiple of a power of 10 as people write it."""
    if power >= -3:
        return f"{factor * 10.0**power:g}"
    return f"10<sup>{power}</sup>" if factor == 1 else f"{factor}·10<sup>{power}</sup>"


def colour_magnitudes(
    figure: go.Figure, low: float, high: float, *, title: str, ticks: Mapping[int, str] | None = None
) -> None:
    """One sequential colour scale for all heatmaps, its bar right of the figure, whose height must be set."""
    parts.colour_axis(figure, limits=(low, high), colours=SEQUENTIAL, title=title, ticks=ticks)


def kind_lines(
    x: np.ndarray, points: Sequence[np.ndarray], kind: str | None, hover: Sequence[str], *, first: bool = True
) -> Iterator[go.Scatter]:
    """Band and line of one kind, or of all layers (None); ``points`` are value, lower and upper."""
    value, lower, upper = points
    colour = parts.INK if kind is None else parts.KIND_COLOURS[kind]
    name = "all layers" if kind is None else KIND_LINES[kind]
    yield band(x, lower, upper, colour=colour, group=kind or "all")
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


def band(x: np.ndarray, lower: np.ndarray, upper: np.ndarray, *, colour: str, group: str) -> go.Scatter:
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
