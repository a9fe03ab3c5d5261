"""What FP8 leaves of the weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe import figure_parts as parts
from probe import fp8_titles
from probe.attention_figures.parts import SEQUENTIAL, bounds, colour_magnitudes, expect
from probe.findings import digits
from probe.fp8_figures.parts import choose, finish, nothing, with_kinds
from probe.fp8_titles import recipe_names

__all__ = ["weight_sqnr"]

NOISE = {page: colours[::-1] for page, colours in SEQUENTIAL.items()}
"""Colours of SQNR: the more noise the further from the page's colour."""

HATCH = {"shape": "/", "size": 7, "solidity": 0.22, "fgcolor": parts.INK, "bgcolor": "rgba(0,0,0,0)"}
UNCOVERED = "hatched: stays in BF16 under the recipe (numbers as if it did not)"

LEAST_SPAN = 6.0
"""Colours span so many dB at the least, which is one bit: what differs by less looks alike."""

MODULE_ROOM = 158
"""Pixels under a plot for the names of modules."""


def weight_sqnr(weights: xr.Dataset, *, recipe: str | None = None, title: str | None = None) -> go.Figure:
    """Heat map of what rounding leaves of each matrix, by layer and module; strong colours are noisy.

    Parameters
    ----------
    weights : ``/fp8_weights``, from ``fp8_error.weight_error``: ``sqnr``, ``underflow``, ``saturation`` (recipe, layer,
        module, expert) and ``covered`` (recipe, layer, module).
    recipe : one of the recipes; all of them, a panel each, unless given.
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Returns
    -------
    Figure whose cells hold the SQNR in dB of the worst expert; which that is and the median are in the hover. Matrices
    that the recipe leaves in BF16 are hatched. A matrix that a layer lacks is a gap.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    FigureChoiceError
        For a recipe that is not in the data.
    """
    expect(weights, "sqnr", ("recipe", "layer", "module", "expert"), "covered", "underflow", "saturation")
    names = recipe_names(weights)
    shown = names if recipe is None else [choose("recipe", recipe, names)]
    if title is None:
        title = fp8_titles.weight_sqnr(weights, recipe=recipe)
    data = with_kinds(weights)
    if not shown or not data.sizes["layer"] or not data.sizes["module"]:
        return nothing(title, "No matrix was rounded")
    n_columns = min(len(shown), 2)
    figure = _panels(shown, n_columns, panel=parts.rows_height(data, 22))
    worst = {name: _worst(data.sel(recipe=name)) for name in shown}
    top = max((float(np.max(own, where=np.isfinite(own), initial=-np.inf)) for own in worst.values()), default=1.0)
    low = min((float(np.min(own, where=np.isfinite(own), initial=np.inf)) for own in worst.values()), default=0.0)
    if not np.isfinite([low, top]).all():
        low = top = 0.0
    low = min(low, top - LEAST_SPAN)
    for index, name in enumerate(shown):
        row, column = parts.place(index, n_columns)
        own = data.sel(recipe=name)
        cells = _cells(own, worst[name], top, numbered=len(shown) == 1)
        figure.add_trace(go.Heatmap(**cells), row=row, col=column)
        for trace in _hatches(own):
            figure.add_trace(trace, row=row, col=column)
    covered = data["covered"].sel(recipe=shown).values | np.isnan(np.stack([worst[name] for name in shown]))
    if not covered.all():
        figure.add_trace(_legend_hatch(), row=1, col=1)
    return _finished(figure, data, title, n_panels=len(shown), limits=(low, top))


def _panels(names: list[str], n_columns: int, *, panel: int) -> go.Figure:
    """Panels with room under them for the names of modules, in the rows that need it."""
    n_rows = -(-len(names) // n_columns)
    gap = parts.PANEL_HEAD + 8 + (MODULE_ROOM if len(names) % n_columns else 0)
    inner = n_rows * panel + (n_rows - 1) * gap
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=[f"<b>{parts.plain(parts.short(name))}</b>" for name in names] if len(names) > 1 else None,
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.03 if n_columns > 1 else 0,
        vertical_spacing=gap / inner if n_rows > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    return figure.update_layout(height=inner + MODULE_ROOM)


def _worst(own: xr.Dataset) -> np.ndarray:
    """SQNR of the worst expert (layer, module); NaN for a matrix that the layer lacks."""
    values = own["sqnr"].transpose("layer", "module", "expert").values.astype(float)
    lowest = np.min(values, axis=-1, where=~np.isnan(values), initial=np.inf)
    return np.where(np.isnan(values).all(axis=-1), np.nan, lowest)


def _cells(own: xr.Dataset, worst: np.ndarray, top: float, *, numbered: bool) -> dict[str, object]:
    """The heat map of one recipe; what is the same in FP8 has the colour of the least noise and a sign."""
    own = own.transpose("layer", "module", "expert", ...)
    text = parts.strings(lambda value: "=" if np.isposinf(value) else "", worst)
    if numbered and len(parts.all_layers(own)) <= 16:
        covered = own["covered"].transpose("layer", "module").values
        numbers = parts.strings(
            lambda value, is_covered: f"{value:.1f}" if is_covered and np.isfinite(value) else "", worst, covered
        )
        text = np.where(text == "", numbers, text)
    hover = np.full((*worst.shape, 1), "", dtype=object)
    modules = own["module"].values
    for layer, module in np.argwhere(~np.isnan(worst)):
        hover[layer, module, 0] = _hover(own.isel(layer=layer, module=module), str(modules[module]))
    cells = parts.layer_cells(own, np.minimum(worst, top), text, hover)
    return cells | {"x": list(range(len(modules))), "showlegend": False}


def _hover(cell: xr.Dataset, module: str) -> str:
    sqnr = cell["sqnr"].values.astype(float)
    at = int(np.nanargmin(sqnr))
    amount = "no difference" if np.isposinf(sqnr[at]) else f"{sqnr[at]:.1f} dB"
    lines = [f"{parts.plain(module)}: {amount}"]
    if module.startswith("experts."):
        lines[0] = (
            f"{parts.plain(module)}<br>worst: {amount} (expert {int(cell['expert'][at])}), median "
            f"{np.nanmedian(sqnr):.1f} dB{_most(sqnr)}"
        )
    for name, word in (("underflow", "turned to 0"), ("saturation", "saturated")):
        lines.append(f"{digits(100 * float(cell[name].values[at]))} % {word}")
    if not bool(cell["covered"]):
        lines.append("<i>stays in BF16 under this recipe</i>")
    return "<br>".join(lines)


def _most(sqnr: np.ndarray) -> str:
    """The experts' range, for a hover."""
    return bounds(float(np.nanmin(sqnr)), float(np.nanmax(sqnr)))


def _hatches(own: xr.Dataset) -> Iterator[go.Bar]:
    """A hatched bar over each run of layers whose matrix stays as it is."""
    left = ~own["covered"].transpose("layer", "module").values & ~np.isnan(_worst(own))
    layers = own["layer"].values
    on_axis = np.zeros((int(layers.max()) + 2, left.shape[1]), bool)
    on_axis[layers] = left
    places: list[tuple[int, int, int]] = []
    for module in range(left.shape[1]):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], on_axis[:, module]])))
        places += [(module, int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
    if places:
        module, start, stop = np.array(places).T
        yield go.Bar(
            x=module,
            y=stop - start,
            base=start - 0.5,
            width=1,
            marker={"color": "rgba(0,0,0,0)", "line_width": 0, "pattern": HATCH},
            hoverinfo="skip",
            showlegend=False,
        )


def _legend_hatch() -> go.Bar:
    marker = {"color": "rgba(0,0,0,0)", "line_width": 0, "pattern": HATCH}
    return go.Bar(x=[None], y=[None], name=UNCOVERED, marker=marker, hoverinfo="skip")


def _finished(
    figure: go.Figure, data: xr.Dataset, title: str, *, n_panels: int, limits: tuple[float, float]
) -> go.Figure:
    """Axes, colours, title."""
    n_columns = min(n_panels, 2)
    modules = [str(name) for name in data["module"].values]
    low, top = limits
    parts.layer_axis(figure, data)
    figure.update_xaxes(
        tickvals=list(range(len(modules))),
        ticktext=[parts.plain(name.replace("_proj", "")) for name in modules],
        tickangle=-90,
        range=[-0.5, len(modules) - 0.5],
        showgrid=False,
        showticklabels=False,
    )
    parts.outer_titles(figure, n_panels, n_columns, x="matrix", y=parts.layer_title(data, has_routers=False))
    colour_magnitudes(figure, low, top, title="SQNR (dB)<br>worst expert")
    figure.update_layout(coloraxis_colorscale=NOISE["light"], meta={"colorscale": NOISE}, barmode="overlay")
    height = int(figure.layout.height)
    has_legend = any(trace.name for trace in figure.data)
    finish(figure, title, height=height, top=34 * has_legend + parts.PANEL_HEAD)
    return figure.update_layout(margin_b=MODULE_ROOM)
