"""What all figures share: fonts, colours and title, the axis of layers, the colours of ratios, grids of panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe import schema
from probe.text_view import NOPE_SIGN, layer_label

KIND_COLOURS = {"rope": "#3f83c4", "nope": "#d97a1f"}
"""Fixed colours of layers with rotary and with no positions, readable on white and on dark."""

KIND_SYMBOLS = {"rope": "circle", "nope": "diamond"}
KIND_NAMES = {"rope": "RoPE layer", "nope": f"NoPE layer {NOPE_SIGN}"}

DIVERGING = {
    "light": ["#123f77", "#3f7fbf", "#a3c6e4", "#f5f5f3", "#f3c294", "#d8772a", "#803504"],
    "dark": ["#5fa3e6", "#3a73aa", "#234463", "#1c2026", "#603c1d", "#a9622a", "#f2a25c"],
}
"""Below 1 blue, above 1 orange; 1 itself has the colour of the page."""

INK = "#747a86"
"""Colour of letters, readable on white and on dark: a notebook does not tell which it is."""

NULL_COLOUR = "rgba(128,134,145,0.45)"
MISSING_COLOUR = "rgba(128,134,145,0.22)"
GRID_COLOUR = "rgba(128,134,145,0.22)"

LARGEST_LIMIT = 4
"""Colours of ratios end at 2 to this power at the latest."""

NUMBERED_EXPERTS = 16
"""With more experts there is no room for a number in a cell."""

DOTTED_EXPERTS = 32
"""With more experts a cell is too narrow for a dot: one that cannot be told from 1 has the colour of 1 instead."""

LABELLED_LAYERS = 24
"""With more layers there is no room for a label at each."""

PANEL_HEAD = 28
TITLE_ROOM = 36
COLORBAR = 200

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
_AXIS_TITLE = {"standoff": 8, "font": {"size": 13}}
_AXIS = {"zeroline": False, "ticks": "", "title": _AXIS_TITLE, "automargin": True}
_HOVER = {"bgcolor": "#20242b", "bordercolor": "#565d69", "font": {"family": _FONT, "size": 13, "color": "#f4f5f7"}}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": _FONT, "size": 13, "color": INK},
        "title": {"font": {"size": 16}, "x": 0, "xanchor": "left", "xref": "paper"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 62, "r": 16, "t": 16, "b": 50},
        "xaxis": _AXIS | {"gridcolor": GRID_COLOUR, "tickangle": 0},
        "yaxis": _AXIS | {"showgrid": False},
        "hoverlabel": _HOVER | {"align": "left"},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1, "xanchor": "left", "x": 0},
        "hovermode": "closest",
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#8a8f98", "activecolor": "#3f83c4"},
        "bargap": 0,
    }
)
"""Fonts and colours of every figure; transparent, so that it sits on a light and on a dark page."""


def log2(ratio: np.ndarray) -> np.ndarray:
    """Log of a ratio; NaN stays NaN, and 0 is put below every other ratio and below the lowest colour."""
    smallest = np.min(ratio, where=ratio > 0, initial=2.0**-LARGEST_LIMIT)
    return np.log2(np.where(ratio == 0, smallest / 2, ratio))


def limit(log_ratio: np.ndarray) -> int:
    """End of the symmetric colours in powers of 2; 99 % of the ratios above 1 lie within, so none fades the rest."""
    above = log_ratio[log_ratio > 0]
    return int(np.clip(np.ceil(np.quantile(above, 0.99)) if above.size else 1, 1, LARGEST_LIMIT))


def colour_ratios(figure: go.Figure, log_ratio: np.ndarray, title: str) -> None:
    """Give all heatmaps of a figure one symmetric colour scale; its ends say where something lies beyond."""
    end = limit(log_ratio)
    ticks = range(-end, end + 1)
    names = [f"{2**tick} ×" if tick >= 0 else f"1/{2**-tick} ×" for tick in ticks]
    finite = log_ratio[np.isfinite(log_ratio)]
    names[0] = "≤ " * bool((finite < -end).any()) + names[0]
    names[-1] = "≥ " * bool((finite > end).any()) + names[-1]
    named_ticks = dict(zip(ticks, names, strict=True))
    colour_axis(figure, limits=(-end, end), colours=DIVERGING, title=title, ticks=named_ticks)


def colour_axis(
    figure: go.Figure,
    *,
    limits: tuple[float, float],
    colours: Mapping[str, Sequence[str]],
    title: str,
    ticks: Mapping[int, str] | None = None,
) -> None:
    """Give all heatmaps of a figure one colour scale, its bar right of the figure.

    The figure's height must be set. ``layout.meta`` keeps the ``colours`` for a light and for a dark page.
    """
    inner = figure.layout.height - PANEL_HEAD - TEMPLATE.layout.margin.b
    colorbar = {
        "title": {"text": title, "side": "top"},
        "thickness": 11,
        "outlinewidth": 0,
        "len": min(COLORBAR / inner, 1),
        "x": 1.01,
        "y": 1,
        "yanchor": "top",
        "xpad": 4,
        "ypad": 0,
    }
    if ticks is not None:
        colorbar |= {"tickvals": list(ticks), "ticktext": list(ticks.values())}
    scale = {"cmin": limits[0], "cmax": limits[1], "colorscale": colours["light"], "colorbar": colorbar}
    figure.update_layout(coloraxis=scale, meta={"colorscale": colours})


def cell_text(ratio: np.ndarray, settled: np.ndarray, *, unused: np.ndarray, numbered: bool) -> np.ndarray:
    """What stands in the cells: a cross where nothing was seen, a dot where the ratio may be 1, or the number."""
    text = np.full(ratio.shape, "", dtype=object)
    if numbered:
        text[:] = strings(lambda value: f"{value:.2g}" if value < 9.95 else f"{value:.0f}", ratio)
    roomy = ratio.shape[1] <= DOTTED_EXPERTS
    text[~settled] = "·" if roomy else ""
    text[unused if roomy else unused & settled] = "×"
    text[np.isnan(ratio)] = ""
    return text


def cell_colour(log_ratio: np.ndarray, settled: np.ndarray) -> np.ndarray:
    """What a cell's colour shows: its log ratio, or that of 1 for an unsettled cell that is too narrow for a dot."""
    if log_ratio.shape[1] <= DOTTED_EXPERTS:
        return log_ratio
    return np.where(settled | np.isnan(log_ratio), log_ratio, 0)


def strings(function: Callable[..., str], *arrays: np.ndarray) -> np.ndarray:
    """A string for each cell, from the values of the arrays there."""
    cells = zip(*(array.ravel().tolist() for array in arrays), strict=True)
    result = np.empty(arrays[0].size, dtype=object)
    result[:] = [function(*values) for values in cells]
    return result.reshape(arrays[0].shape)


def bounds(lower: float, upper: float, form: str) -> str:
    """An interval after a number, or nothing where there is none."""
    return "" if np.isnan(lower) or np.isnan(upper) else f" [{lower:{form}}, {upper:{form}}]"


def interval_notes(data: xr.Dataset) -> np.ndarray:
    """Why an interval is withheld, for a hover; "" where it is given, or where that was not recorded."""
    if "interval_status" not in data:
        return np.full((data.sizes["layer"], data.sizes["expert"]), "", dtype=object)
    withheld = lambda status: f"<br>interval {status}" if status.startswith("withheld") else ""  # noqa: E731
    return strings(withheld, schema.labels(data["interval_status"]))


def short(name: str) -> str:
    """A name that fits over a panel."""
    return name if len(name) <= 22 else name[:21] + "…"


def plain(name: str) -> str:
    """A name that plotly shows as it is: it would read ``<b>`` in a title as markup."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def attention_kinds(data: xr.Dataset) -> np.ndarray:
    """``"rope"`` or ``"nope"`` for each layer."""
    return schema.labels(data["attention_kind"])


def all_layers(data: xr.Dataset) -> np.ndarray:
    """Every layer of the decoder up to the last one recorded, dense ones among them."""
    return np.arange(int(data["layer"].max()) + 1)


def layer_cells(data: xr.Dataset, z: np.ndarray, text: np.ndarray, customdata: np.ndarray) -> dict[str, Any]:
    """Arguments of a heatmap with a row for every layer; rows of dense layers are empty.

    The first column of ``customdata`` (layer, expert, column) is the text of the hover, the second the expert.
    """
    layers, where = all_layers(data), data["layer"].values
    rows = np.full((len(layers), z.shape[1]), np.nan)
    texts = np.full(rows.shape, "", dtype=object)
    custom = np.full((*rows.shape, customdata.shape[-1]), "", dtype=object)
    rows[where], texts[where], custom[where] = z, text, customdata
    return {
        "z": rows,
        "y": layers.tolist(),
        "text": texts,
        "customdata": custom,
        "texttemplate": "%{text}",
        "hovertemplate": "layer %{y}, %{customdata[0]}<extra></extra>",
        "hoverongaps": False,
        "coloraxis": "coloraxis",
        "xgap": 1,
        "ygap": 1,
    }


def layer_ticks(layers: np.ndarray, kinds: np.ndarray, *, most: int = LABELLED_LAYERS) -> tuple[list[int], list[str]]:
    """Places of the layers that an axis labels, and their labels.

    Of more than ``most`` layers it labels some, evenly spaced, that stay clear of NoPE layers: each of those keeps its
    sign, and its number too unless there are more than ``most`` of them.
    """
    nope, place = kinds == "nope", np.arange(len(layers))
    step, step_of_numbers = (max(-(-int(count) // most), 1) for count in (len(layers), nope.sum()))
    beside_nope = np.abs(place[:, None] - place[nope]).min(axis=1, initial=len(layers)) < step
    shown = np.flatnonzero(nope | (place % step == 0) & ~beside_nope)
    unnumbered = nope & (np.cumsum(nope) % step_of_numbers != 1 % step_of_numbers)
    labels = [NOPE_SIGN if unnumbered[at] else layer_label(int(layers[at]), bool(nope[at])) for at in shown]
    return shown.tolist(), labels


def layer_axis(figure: go.Figure, data: xr.Dataset) -> None:
    """Put layers on y at their own index, 0 at the bottom; labels thin out where they would touch."""
    layers = data["layer"].values
    shown, labels = layer_ticks(layers, attention_kinds(data))
    figure.update_yaxes(range=[-0.5, int(layers.max()) + 0.5], tickvals=layers[shown], ticktext=labels)


def layer_title(data: xr.Dataset, *, has_routers: bool = True) -> str:
    """Name of the axis of layers, with what the sign and the gaps on it mean.

    Layers with routers that stand as a Llama 4 config places them, such as every second one, have dense layers between
    them. Of others, and where ``has_routers`` is false, all that is known is that the missing ones were not recorded.
    """
    layers, n_layers = data["layer"].values, len(all_layers(data))
    notes = [f"{NOPE_SIGN} NoPE"] * bool((attention_kinds(data) == "nope").any())
    if len(layers) < n_layers:
        step = int(layers.min()) + 1  # the first layer with a router is the last of the first step
        is_regular = len(layers) > 1 and np.array_equal(np.sort(layers), np.arange(step - 1, n_layers, step))
        notes.append("gap: dense" if has_routers and is_regular else "gap: not recorded")
    return f"layer ({', '.join(notes)})" if notes else "layer"


def rows_height(data: xr.Dataset, row: int = 24) -> int:
    """Pixels for the rows of all layers: ``row`` each, about half of that in a deep model."""
    n_layers = len(all_layers(data))
    return max(n_layers * (row if n_layers <= 16 else max(row // 2, 9)), 5 * row)


def panels(heads: Sequence[str], n_columns: int, *, panel: int) -> go.Figure:
    """A grid of panels with shared axes, each ``panel`` pixels high and with a head of its own."""
    n_rows = -(-len(heads) // n_columns)
    gap = (
        PANEL_HEAD + 6 if len(heads) % n_columns == 0 else PANEL_HEAD + 40
    )  # room for the axis of a panel above a hole
    inner = n_rows * panel + (n_rows - 1) * gap
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=list(heads),
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.03 if n_columns > 1 else 0,
        vertical_spacing=gap / inner if n_rows > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    return figure.update_layout(height=inner + PANEL_HEAD + TEMPLATE.layout.margin.b)


def outer_titles(figure: go.Figure, n_panels: int, n_columns: int, *, x: str, y: str) -> None:
    """Name the axes once: y on the left of every row, x under the lowest panel of every column."""
    for index in range(n_panels):
        row, column = place(index, n_columns)
        if index + n_columns >= n_panels:
            figure.update_xaxes(title_text=x, showticklabels=True, row=row, col=column)
        if column == 1:
            figure.update_yaxes(title_text=y, row=row, col=column)


def place(index: int, n_columns: int) -> tuple[int, int]:
    """Row and column of a panel, from 1."""
    return index // n_columns + 1, index % n_columns + 1


def tick_step(n_labels: int) -> int:
    """How many experts from tick to tick, so that at most 20 labels stand side by side."""
    return next(step for step in (1, 2, 4, 8, 16, 32, 64) if n_labels / step <= 20 or step == 64)


def spaced(values: Sequence[Any] | np.ndarray, n: int) -> list[Any]:
    """At most ``n`` of the values, evenly spaced, first and last among them."""
    values = list(values)
    if len(values) <= n:
        return values
    return [values[index] for index in np.linspace(0, len(values) - 1, n).round().astype(int)]


def switch(*choices: tuple[str, dict[str, Any], dict[str, Any]]) -> list[dict[str, Any]]:
    """Buttons above a figure, each a label with the changes that it makes to traces and to layout."""
    buttons = [{"label": label, "method": "update", "args": [traces, layout]} for label, traces, layout in choices]
    return [
        {
            "type": "buttons",
            "direction": "right",
            "buttons": buttons,
            "showactive": False,
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "pad": {"b": 6},
            "bgcolor": "rgba(128,134,145,0.12)",
            "bordercolor": GRID_COLOUR,
            "font": {"size": 12},
        }
    ]


def finish(figure: go.Figure, title: str, *, height: int, top: int) -> go.Figure:
    """Template, title and size; ``top`` is the room in pixels over the plot, and a title adds its own.

    The title stands at the very top and the legend below it, so that neither covers the other or the plot, however
    narrow the page is.
    """
    room = TITLE_ROOM if title else 0
    height += room
    legend = {"y": 1 - room / height, "yref": "container", "yanchor": "top"}
    figure.update_layout(template=TEMPLATE, height=height, margin_t=top + room, legend=legend)
    if title:
        middle = 1 - TITLE_ROOM / 2 / height
        figure.update_layout(title={"text": title, "y": middle, "yref": "container", "yanchor": "middle"})
    return figure
