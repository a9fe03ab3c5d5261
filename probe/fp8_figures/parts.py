"""What figures of FP8 share: colours of recipes, noise floors, axes with a place for zero, rows of points."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import schema
from probe.attention_figures.parts import log_axis, power_of_ten
from probe.fp8_titles import FLOORS, recipe_names
from probe.schema import ProbeError

RECIPES = ("meta", "tensorwise", "rowwise", "deepseek", "mxfp8", "mxfp8_ceil", "hybrid", "int4")
"""The recipes of ``probe.recipes``: each has one colour and one symbol, whatever it is drawn beside."""

COLOURS = (
    "#0a6cfe",
    "#ec8513",
    "#da406a",
    "#329581",
    "#19a5fd",
    "#5731c1",
    "#7b6b9b",
    "#8c2769",
    "#cd90b9",
    "#a8b47b",
)
"""Those of ``text_view.PALETTE`` that show as thin lines, on white and on dark; the first are those of ``RECIPES``."""

SYMBOLS = (
    "circle",
    "square",
    "triangle-up",
    "triangle-down",
    "cross",
    "x",
    "star",
    "pentagon",
    "hexagram",
    "bowtie",
)
"""One for each colour; a diamond is the mark of NoPE layers."""

FLOOR_DASHES = {"bf16": "dash", "fp32": "dashdot"}
FLOOR_SYMBOLS = {"bf16": "circle-open", "fp32": "square-open"}
FLOOR_COLOUR = "#868c97"
FLOOR_FILL = "rgba(128,134,145,0.20)"

ROW_RULE = {"color": parts.GRID_COLOUR, "width": 1}
TITLE_WIDTH = 76
"""Letters of a title that fit in a line of a narrow page."""

TITLE_LINE = 23
LEGEND_WIDTH = 640
LEGEND_LINE = 25


class FigureChoiceError(ProbeError):
    """What a figure was asked to show is not in its data, or not something that it shows."""


def choose(what: str, wanted: str, known: Sequence[str]) -> str:
    """``wanted``, if it is one of those that there are.

    Raises
    ------
    FigureChoiceError
        If it is not; lists them.
    """
    if wanted not in known:
        raise FigureChoiceError(f"{what} {wanted!r} is not there: choose one of {', '.join(map(str, known))}")
    return wanted


@dataclass(frozen=True)
class Style:
    """How a recipe, or a noise floor, looks in every figure; ``name`` is what the legend calls it."""

    name: str
    colour: str
    symbol: str
    dash: str = "solid"
    is_floor: bool = False


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Colour and symbol of each recipe; one of a person's own gets what those of probe that are there leave over."""
    taken = {RECIPES.index(name) for name in names if name in RECIPES}
    later = sorted(set(range(len(RECIPES), len(COLOURS))) - taken)
    free = [*later, *sorted(set(range(len(RECIPES))) - taken)]
    found: dict[str, Style] = {}
    n_own = 0
    for name in names:
        if name in FLOORS:
            found[name] = Style(
                f"noise floor: {name}", FLOOR_COLOUR, FLOOR_SYMBOLS[name], FLOOR_DASHES[name], is_floor=True
            )
            continue
        if name in RECIPES:
            slot, hollow = RECIPES.index(name), False
        else:
            slot, hollow = (free[n_own], False) if n_own < len(free) else (n_own % len(COLOURS), True)
            n_own += 1
        symbol = SYMBOLS[slot] + "-open" * hollow
        found[name] = Style(parts.plain(parts.short(name)), COLOURS[slot], symbol)
    return found


def floor_names(data: xr.Dataset) -> list[str]:
    """The noise floors that the data holds."""
    return [name for name in FLOORS if name in recipe_names(data)]


def with_kinds(data: xr.Dataset) -> xr.Dataset:
    """The data with ``attention_kind``; where that was not recorded no layer is marked."""
    if "attention_kind" in data.coords:
        return data
    kinds = xr.Variable(("layer",), np.zeros(data.sizes["layer"], np.uint8), {"categories": ["rope", "nope"]})
    return data.assign_coords(attention_kind=kinds)


def shares_in_percent(name: str) -> float:
    """What a number is multiplied with to be drawn: shares are drawn in per cent."""
    return 100.0 if name in ("flip_share", "top1_agreement", "saturation", "underflow") else 1.0


def status_notes(result: xr.Dataset, recipe: str, shape: tuple[int, ...]) -> list[str]:
    """Why an interval is withheld, for hovers of one recipe; "" where it is given or nothing is known of it."""
    if "interval_status" not in result:
        return [""] * int(np.prod(shape))
    told = schema.labels(result["interval_status"].sel(recipe=recipe)).ravel()
    return [f"<br>interval {status}" if str(status).startswith("withheld") else "" for status in told]


def interval_ends(value: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of shares in per cent as they are drawn: not those of 0 or 100 %, which are the rule of three's.

    With 30 texts such an interval is 10 % wide and would hide all others; hovers have it.
    """
    is_extreme = (value == 0) | (value == 100)
    return np.where(is_extreme, np.nan, lower), np.where(is_extreme, np.nan, upper)


@dataclass(frozen=True)
class Scale:
    """An axis of numbers; ``beyond`` is where what has no place on it stands: 0 on a log axis, or infinity."""

    axis: dict[str, object]
    beyond: float | None
    off: float
    """The first value without a place: 0 or next to it on a log axis, infinity or next to it on a linear one."""

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where values stand; NaN for those that have no place on the axis."""
        return np.where(self.is_off(values), np.nan, values)

    def is_off(self, values: np.ndarray) -> np.ndarray:
        """Which values stand at ``beyond``; numbers below 0 have no logarithm either."""
        return values <= self.off if self.is_log else values >= self.off

    @property
    def is_log(self) -> bool:
        """Whether the axis is one of logarithms."""
        return self.axis.get("type") == "log"


def log_scale(values: Sequence[np.ndarray], *, ends: Sequence[np.ndarray] = ()) -> Scale:
    """A log axis, with a place for 0 left of all else if a value is 0; ``ends`` of intervals only lengthen it upwards.

    It may run off at the low end: an interval that all but reaches 0 would shrink the rest to nothing.
    """
    shown = np.concatenate([np.asarray(part, float).ravel() for part in values])
    upper = np.concatenate([np.asarray(part, float).ravel() for part in (*values, *ends)])
    positive = shown[np.isfinite(shown) & (shown > 0)]
    tops = upper[np.isfinite(upper) & (upper > 0)]
    least = positive.min() if positive.size else tops.min() / 10 if tops.size else 0.1
    axis = log_axis([np.array([least, tops.max() if tops.size else 10 * least])])
    low, high = (float(end) for end in axis["range"])  # type: ignore[attr-defined]
    ticks = _ticks(low, high)
    axis |= {"tickvals": list(ticks), "ticktext": list(ticks.values())}
    if not (np.isfinite(shown) & (shown <= 0)).any():
        return Scale(axis, None, 0.0)
    step = 0.1 * max(high - low, 0.5)
    beyond = 10 ** (low - step)
    axis |= {"range": [low - 1.6 * step, high]}
    axis |= {"tickvals": [beyond, *ticks], "ticktext": ["0", *ticks.values()]}
    return Scale(axis, beyond, 0.0)


def _ticks(low: float, high: float) -> dict[float, str]:
    """Ticks and their names on a log axis between two powers of ten, dense enough to read a value off."""
    powers = range(int(np.floor(low)), int(np.ceil(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = {factor * 10.0**power: power_of_ten(power, factor) for power in powers for factor in factors}
        ticks = {tick: name for tick, name in ticks.items() if low <= np.log10(tick) <= high}
        if len(ticks) > 3:
            return ticks
    if len(ticks) > 2:
        return ticks
    return {tick: f"{tick:.6g}" for tick in _round_numbers(10**low, 10**high, most=6)}


def linear_scale(values: Sequence[np.ndarray], *, beyond_name: str = "") -> Scale:
    """A linear axis, with a place right of all else, called ``beyond_name``, if a value is infinite."""
    shown = np.concatenate([np.asarray(part, float).ravel() for part in values])
    finite = shown[np.isfinite(shown)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    span = max(high - low, 0.02 * max(abs(high), abs(low)), 1e-9)
    axis: dict[str, object] = {"showgrid": True, "gridcolor": parts.GRID_COLOUR, "nticks": 8}
    if not np.isposinf(shown).any():
        return Scale(axis | {"range": [low - 0.06 * span, high + 0.06 * span]}, None, np.inf)
    beyond = high + 0.14 * span
    places = _round_numbers(low, high, most=7) if finite.size else []
    names = [f"{tick:.10g}" for tick in places]
    axis |= {
        "range": [low - 0.06 * span, beyond + 0.08 * span],
        "tickvals": [*places, beyond],
        "ticktext": [*names, beyond_name],
    }
    return Scale(axis, beyond, np.inf)


def _round_numbers(low: float, high: float, *, most: int) -> list[float]:
    """Round numbers between two others, evenly spaced: 1, 2 or 5 times a power of ten apart."""
    span = max(high - low, 1e-12)
    power = int(np.floor(np.log10(span))) - 1
    steps = [factor * 10.0**exponent for exponent in range(power, power + 4) for factor in (1, 2, 5)]
    step = next(step for step in steps if span / step <= most)
    return (np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step).tolist()


def series(
    style: Style,
    places: tuple[np.ndarray, np.ndarray],
    hover: Sequence[str],
    *,
    scale: Scale,
    dash: str | None = None,
    upright: bool = True,
) -> Iterator[go.Scatter]:
    """Line and marks of one recipe, and marks alone where a value stands beyond the axis.

    ``places`` are the layers, or what else orders the points, and the values; layers run up the figure if ``upright``.
    """
    order, values = places
    axes = ("y", "x") if upright else ("x", "y")
    crowded = len(order) > 60
    common = {
        "name": style.name,
        "legendgroup": style.name,
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"color": style.colour, "symbol": style.symbol, "size": 5 if crowded else 7},
    }
    yield go.Scatter(
        **{axes[0]: order, axes[1]: scale.place(values)},
        mode="lines+markers",
        line={"color": style.colour, "width": 2, "dash": dash or style.dash},
        showlegend=False,
        customdata=list(hover),
        **common,
    )
    off = scale.is_off(values)
    if off.any() and scale.beyond is not None:
        yield go.Scatter(
            **{axes[0]: np.asarray(order)[off], axes[1]: np.full(int(off.sum()), scale.beyond)},
            mode="markers",
            showlegend=False,
            cliponaxis=False,
            customdata=[text for text, is_off in zip(hover, off, strict=True) if is_off],
            **common,
        )


def legend_line(style: Style, *, line: bool = True) -> go.Scatter:
    """What the legend shows of a recipe."""
    return go.Scatter(
        x=[None],
        y=[None],
        mode="lines+markers" if line else "markers",
        name=style.name,
        legendgroup=style.name,
        line={"color": style.colour, "width": 2, "dash": style.dash},
        marker={"color": style.colour, "symbol": style.symbol, "size": 8},
    )


def interval_marks(result: xr.Dataset, known: bool, *, band: bool) -> go.Scatter:
    """What the legend says of intervals: their level, or that there are none."""
    level = f"{100 * result.attrs['level']:g} % intervals" if "level" in result.attrs else "intervals"
    square = {"symbol": "square", "size": 12, "color": "rgba(128,134,145,0.35)"}
    bar = {"symbol": "line-ew", "size": 13, "line": {"width": 2, "color": parts.INK}}
    name = level if known else "too few texts for intervals"
    return go.Scatter(x=[None], y=[None], mode="markers", marker=square if band else bar, name=name)


def recipe_points(
    style: Style,
    rows: np.ndarray,
    points: Sequence[np.ndarray],
    hover: Sequence[str],
    *,
    scale: Scale,
) -> go.Scatter:
    """Points with their intervals, one in each row; ``points`` are value, lower and upper."""
    value, lower, upper = (np.asarray(part, float) for part in points)
    off = scale.is_off(value)
    at = np.where(off, np.nan if scale.beyond is None else scale.beyond, value)
    known = np.isfinite(lower) & np.isfinite(upper) & ~off
    return go.Scatter(
        x=at,
        y=rows,
        mode="markers",
        name=style.name,
        legendgroup=style.name,
        showlegend=False,
        marker={
            "color": style.colour,
            "symbol": style.symbol,
            "size": 8,
            "line": {"width": 1.5, "color": style.colour},
        },
        error_x={
            "type": "data",
            "symmetric": False,
            "array": np.where(known, np.maximum(upper - at, 0), np.nan),
            "arrayminus": np.where(known, np.maximum(at - lower, 0), np.nan),
            "thickness": 1.6,
            "width": 3,
            "color": style.colour,
        },
        customdata=list(hover),
        hovertemplate="%{customdata}<extra></extra>",
    )


def floor_span(data: xr.Dataset, name: str, *, ideal: float, factor: float) -> tuple[float, float] | None:
    """What lies between no damage, ``ideal``, and the ends of both noise floors; None where there is no floor.

    ``name`` is a variable (recipe,), which is drawn ``factor`` times as large.
    """
    ends = [
        factor * float(data[key].sel(recipe=floor))
        for floor in floor_names(data)
        for key in (name, f"{name}_lower", f"{name}_upper")
    ]
    finite = [end for end in ends if np.isfinite(end)]
    return (min(ideal, *finite), max(ideal, *finite)) if finite else None


def rows_figure(n_rows: int, *, row: int) -> go.Figure:
    """A figure with thin rules between rows, 0 at the top."""
    figure = go.Figure()
    for at in range(n_rows - 1):
        figure.add_hline(y=at + 0.5, line=ROW_RULE, layer="below")
    return figure.update_layout(height=max(n_rows * row, 60) + 60)


def row_axis(figure: go.Figure, names: Sequence[str], *, title: str = "", **place: int) -> None:
    """Name the rows, of which the first is at the top; names are text, whatever is in them."""
    figure.update_yaxes(
        range=[len(names) - 0.5, -0.5],
        tickvals=list(range(len(names))),
        ticktext=[parts.plain(parts.short(name)) for name in names],
        title_text=title,
        **place,
    )


def nothing(title: str, why: str) -> go.Figure:
    """A figure that says why it is empty."""
    figure = go.Figure()
    figure.update_xaxes(visible=False, range=[0, 1])
    figure.update_yaxes(visible=False, range=[0, 1])
    figure.add_annotation(text=parts.plain(why), x=0.5, y=0.5, showarrow=False, font={"size": 14})
    return finish(figure, title, height=160)


def finish(figure: go.Figure, title: str, *, height: int, top: int | None = None) -> go.Figure:
    """Template, title and size: the title in as many lines as it needs, then as many of the legend, then the plot."""
    for trace in figure.data:
        # Entries without a group would stand under each other as soon as another trace has one.
        if trace.name and not trace.legendgroup:
            trace.legendgroup = trace.name
    lines = textwrap.wrap(title, TITLE_WIDTH)
    more = TITLE_LINE * (len(lines) - 1) + 6 if len(lines) > 1 else 0
    top = _legend_room(figure) if top is None else top
    shown = "<br>".join(parts.plain(line) for line in lines)
    parts.finish(figure, shown, height=height + top + more, top=top + more)
    # From the edge of the page: names of rows take much of its width.
    figure.update_layout(title={"xref": "container", "pad_l": 12}, legend={"xref": "container", "x": 0.01})
    if more:
        room, height = parts.TITLE_ROOM + more, int(figure.layout.height)
        figure.update_layout(legend_y=1 - room / height, title_y=1 - room / 2 / height)
    return figure


def _legend_room(figure: go.Figure) -> int:
    """Pixels over the plot that the legend takes on a narrow page."""
    names = [str(trace.name) for trace in figure.data if trace.name and trace.showlegend is not False]
    if not names:
        return 16
    n_lines, room = 1, LEGEND_WIDTH
    for name in names:
        width = 50 + 7 * len(name)
        if width > room:
            n_lines, room = n_lines + 1, LEGEND_WIDTH
        room -= width
    return 20 + LEGEND_LINE * n_lines
