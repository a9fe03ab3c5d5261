"""What enters the matrices of a model, and what FP8 makes of it."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import fp8_titles
from probe.attention_figures.parts import colour_magnitudes, expect
from probe.findings import digits
from probe.fp8_figures.parts import (
    FigureChoiceError,
    Style,
    choose,
    finish,
    legend_line,
    log_scale,
    nothing,
    recipe_points,
    row_axis,
    rows_figure,
    series,
    styles,
    with_kinds,
)
from probe.fp8_titles import recipe_names
from probe.text_view import layer_label

__all__ = ["activation_amax", "activation_loss", "activation_percentiles"]

PERCENTILE_COLOUR, AMAX_COLOUR = "#329581", "#8c2769"
PERCENTILE_LOOKS = (("circle", "dot"), ("square", "dashdot"), ("triangle-up", "dash"), ("pentagon", "solid"))

LOSSES = {"saturation": "values above the format's maximum (%)", "underflow": "values that became 0 (%)"}


def activation_amax(result: xr.Dataset, *, module: str, title: str | None = None) -> go.Figure:
    """Heat map of the largest input of each expert, by layer: do experts need scales of their own?

    Parameters
    ----------
    result : ``/fp8_activations``, from ``fp8_error.activation_range``: ``amax`` and ``n_values`` (layer, module,
        expert).
    module : one of the matrices of routed experts, such as "experts.down_proj".
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Returns
    -------
    Figure with log colours. A cross is an expert that no token went to; a layer without experts is a gap.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    FigureChoiceError
        For a module that is not there, or that is one matrix for all experts.
    """
    expect(result, "amax", ("layer", "module", "expert"), "n_values")
    names = [str(name) for name in result["module"].values]
    choose("module", module, names)
    if not module.startswith("experts."):
        experts = [name for name in names if name.startswith("experts.")]
        raise FigureChoiceError(
            f"module {module!r} is one matrix for all experts: draw it with activation_percentiles, or choose one of "
            f"{', '.join(experts) or 'another study'}"
        )
    if title is None:
        title = fp8_titles.activation_amax(result, module=module)
    own = with_kinds(result).sel(module=module).transpose("layer", "expert", ...)
    own = own.isel(layer=own["amax"].notnull().any("expert").values)
    if not own.sizes["layer"]:
        return nothing(title, f"No token entered {module}")
    amax = own["amax"].values.astype(float)
    positive = amax[np.isfinite(amax) & (amax > 0)]
    low, high = (np.log2([positive.min(), positive.max()]) if positive.size else np.array([0.0, 1.0])).tolist()
    if high - low < 1:
        low, high = low - 0.5, high + 0.5
    with np.errstate(divide="ignore"):
        z = np.where(amax > 0, np.log2(amax), np.where(np.isnan(amax), np.nan, low))
    roomy = amax.shape[1] <= parts.DOTTED_EXPERTS
    numbered = amax.shape[1] <= parts.NUMBERED_EXPERTS and len(parts.all_layers(own)) <= 16
    text = parts.strings(
        lambda value: ("×" if roomy else "") if np.isnan(value) else digits(value) if numbered else "", amax
    )
    hover = parts.strings(_amax_hover, np.broadcast_to(own["expert"].values, amax.shape), amax, own["n_values"].values)
    cells = parts.layer_cells(own, z, text, hover[..., None]) | {"x": own["expert"].values.tolist()}
    figure = go.Figure(go.Heatmap(**cells | {"showlegend": False}))
    figure.update_layout(height=parts.rows_height(own) + 110)
    powers = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    step = max(-(-len(powers) // 7), 1)
    ticks = {power: _power_of_two(power) for power in powers if power % step == 0}
    colour_magnitudes(figure, low, high, title="amax<br>(log)", ticks=ticks)
    parts.layer_axis(figure, own)
    figure.update_yaxes(title_text=parts.layer_title(own))
    numbers = own["expert"].values
    ticked = numbers[:: parts.tick_step(len(numbers))]
    figure.update_xaxes(
        title_text="expert" + (" (× no token)" if np.isnan(amax).any() and roomy else ""),
        tickvals=ticked.tolist(),
        ticktext=[str(expert) for expert in ticked],
        range=[numbers.min() - 0.5, numbers.max() + 0.5],
        showgrid=False,
    )
    return finish(figure, title, height=parts.rows_height(own) + 66, top=36)


def _amax_hover(expert: int, amax: float, n_values: int) -> str:
    if np.isnan(amax):
        return f"expert {expert}<br>no token went to it"
    return f"expert {expert}<br>amax {amax:.4g} of {int(n_values):,} values"


def _power_of_two(power: int) -> str:
    return f"{2.0**power:,.6g}" if power >= -3 else f"2<sup>{power}</sup>"


def activation_percentiles(result: xr.Dataset, *, module: str, title: str | None = None) -> go.Figure:
    """Percentiles and the largest of what enters one matrix, by layer, on a log axis.

    Parameters
    ----------
    result : ``/fp8_activations``, from ``fp8_error.activation_range``: ``magnitude`` (layer, module, expert,
        percentile) and ``amax`` (layer, module, expert).
    module : whose input it is, such as "q_proj".
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Returns
    -------
    Figure with a line for each percentile and one for amax. Where experts have inputs of their own it is that of the
    expert with the largest, which is in the hover.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    FigureChoiceError
        For a module that is not there.
    """
    expect(result, "magnitude", ("layer", "module", "expert", "percentile"), "amax")
    choose("module", module, [str(name) for name in result["module"].values])
    if title is None:
        title = fp8_titles.activation_percentiles(result, module=module)
    own = with_kinds(result).sel(module=module).transpose("layer", "expert", ...)
    own = own.isel(layer=own["amax"].notnull().any("expert").values)
    if not own.sizes["layer"]:
        return nothing(title, f"No token entered {module}")
    percentiles = own["percentile"].values
    drawn = [
        (
            Style(f"{percentile:g} % lie below", PERCENTILE_COLOUR, *PERCENTILE_LOOKS[at % len(PERCENTILE_LOOKS)]),
            own["magnitude"].isel(percentile=at),
        )
        for at, percentile in enumerate(percentiles)
    ]
    drawn.append((Style("largest (amax)", AMAX_COLOUR, "star"), own["amax"]))
    values = [part.max("expert").values.astype(float) for _, part in drawn]
    scale = log_scale(values)
    figure = go.Figure()
    layers, kinds = own["layer"].values, parts.attention_kinds(own)
    for (look, part), value in zip(drawn, values, strict=True):
        at = np.nan_to_num(part.values, nan=-1).argmax(axis=1)
        several = module.startswith("experts.")
        hover = [
            f"layer {layer_label(int(layer), kind == 'nope')}, {look.name}<br>{number:.4g}"
            + (f" (expert {int(own['expert'][expert])})" if several else "")
            for layer, kind, number, expert in zip(layers, kinds, value, at, strict=True)
        ]
        figure.add_traces(list(series(look, (layers, value), hover, scale=scale)))
        figure.add_trace(legend_line(look))
    parts.layer_axis(figure, own)
    figure.update_yaxes(title_text=parts.layer_title(own))
    figure.update_xaxes(title_text=f"magnitude of what enters {parts.plain(module)}, log axis", **scale.axis)
    return finish(figure, title, height=max(parts.rows_height(own), 200) + 60)


def activation_loss(result: xr.Dataset, *, measure: str = "saturation", title: str | None = None) -> go.Figure:
    """What each recipe saturates, or turns to 0, of what enters the matrices: the worst layer and expert of each.

    Parameters
    ----------
    result : ``/fp8_activations``, from ``fp8_error.activation_range``: the measure (recipe, layer, module, expert).
    measure : "saturation" or "underflow".
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Returns
    -------
    Figure with a row for each matrix and a point for each recipe, on a log axis with a place for 0. A recipe that
    rounds weights alone has no point, and its name says so.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    FigureChoiceError
        For another measure.
    """
    choose("measure", measure, list(LOSSES))
    expect(result, measure, ("recipe", "layer", "module", "expert"))
    if title is None:
        title = fp8_titles.activation_loss(result, measure=measure)
    own = result.transpose("recipe", "module", "layer", "expert", ...)
    share = 100 * own[measure].values.astype(float)
    cells = share.reshape(*share.shape[:2], -1)
    if not np.isfinite(cells).any():
        return nothing(title, "None of these recipes rounds activations")
    there = np.isfinite(cells).any(axis=(0, 2))
    modules = own["module"].values[there]
    worst = np.max(cells, axis=-1, where=np.isfinite(cells), initial=-1)[:, there]
    worst[worst < 0] = np.nan
    at = np.nan_to_num(cells, nan=-1).argmax(axis=-1)[:, there]
    names = recipe_names(own)
    looks = styles(names)
    scale = log_scale([worst])
    figure = rows_figure(len(modules), row=max(26, 9 * len(names) + 8))
    for place, name in enumerate(names):
        look, value = looks[name], worst[place]
        rows = np.arange(len(modules)) + 0.76 * ((place + 0.5) / len(names) - 0.5)
        none = np.full(len(modules), np.nan)
        layer, expert = np.divmod(at[place], own.sizes["expert"])
        hover = [
            f"{look.name}, {parts.plain(str(module))}<br>{number:.3g} % at most: layer {own['layer'].values[row]}"
            + (f", expert {own['expert'].values[column]}" if str(module).startswith("experts.") else "")
            for module, number, row, column in zip(modules, value, layer, expert, strict=True)
        ]
        figure.add_trace(recipe_points(look, rows, (value, none, none), hover, scale=scale))
        entry = legend_line(look, line=False)
        figure.add_trace(entry if np.isfinite(value).any() else entry.update(name=f"{look.name} (weights only)"))
    row_axis(figure, [str(module).replace("_proj", "") for module in modules])
    figure.update_xaxes(title_text=f"{LOSSES[measure]}, worst layer and expert, log axis", **scale.axis)
    return finish(figure, title, height=int(figure.layout.height))
