"""Results of statistics as ``plotly`` figures: nothing is computed here but where a mark goes.

Every figure follows the same rules. Layers stand on the y axis at the decoder's own index, 0 at the bottom, so that
dense layers are gaps; a NoPE layer carries the sign ``◇``. Ratios are on a log scale around 1. Colours suit a light
page; ``layout.meta`` holds the colour scale for a dark one, which the report's script puts in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import schema
from probe.bootstrap import MIN_DOCUMENTS
from probe.figure_choices import batches, information, paths
from probe.figure_parts import DOTTED_EXPERTS, GRID_COLOUR, TEMPLATE
from probe.text_view import layer_label

__all__ = [
    "DOTTED_EXPERTS",
    "GRID_COLOUR",
    "MAX_PANELS",
    "TEMPLATE",
    "batches",
    "document_load",
    "expert_load",
    "imbalance",
    "information",
    "margin",
    "paths",
    "repetition",
    "specialization",
    "transition",
    "transition_panels",
]

MAX_PANELS = 12
"""How many domains, or steps between layers, one figure shows."""


def expert_load(interval: xr.Dataset, *, title: str = "Load of each expert, relative to an even share") -> go.Figure:
    """Heatmap of load over an even share, by layer and expert, with a switch that sorts each layer by load.

    Parameters
    ----------
    interval : from ``routing_stats.load_interval``: ``load``, ``lower`` and ``upper`` (layer, expert).
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with two heatmaps of log2(load · E): experts in their own order, and (hidden at first) sorted in each layer.
    A dot marks a cell whose interval holds 1, a cross an expert that no token went to; sorted cells hold their expert's
    number.
    """
    load, lower, upper = (interval[name].transpose("layer", "expert").values for name in ("load", "lower", "upper"))
    status = parts.interval_notes(interval.transpose("layer", "expert", ...))
    n_experts = load.shape[1]
    settled = (lower * n_experts > 1) | (upper * n_experts < 1)
    experts = np.broadcast_to(interval["expert"].values, load.shape)
    colour = parts.cell_colour(parts.log2(load * n_experts), settled)
    numbered = n_experts <= parts.NUMBERED_EXPERTS
    text = parts.cell_text(load * n_experts, settled, unused=load == 0, numbered=numbered)
    hover = parts.strings(_load_hover, load, lower, upper, status, experts)
    numbers = experts.astype(str).astype(object) if n_experts <= DOTTED_EXPERTS else text
    by_number, by_load = (np.argsort(key, axis=1, kind="stable") for key in (experts, -load))
    figure = go.Figure()
    for order, labels in ((by_number, text), (by_load, numbers)):
        z, texts, hovers, codes = (np.take_along_axis(part, order, 1) for part in (colour, labels, hover, experts))
        cells = parts.layer_cells(interval, z, texts, np.stack([hovers, codes], axis=-1))
        figure.add_trace(go.Heatmap(**cells, x=np.sort(experts[0]).tolist(), visible=order is by_number))
    figure.update_layout(
        height=parts.rows_height(interval) + 110,
        updatemenus=parts.switch(
            ("experts by number", {"visible": [True, False]}, _axis("expert", labels=True)),
            ("experts by load", {"visible": [False, True]}, _axis("each layer's experts by load", labels=False)),
        ),
    )
    parts.colour_ratios(figure, parts.log2(load * n_experts), "load")
    parts.layer_axis(figure, interval)
    figure.update_yaxes(title_text=parts.layer_title(interval))
    figure.update_xaxes(title_text="expert", dtick=parts.tick_step(n_experts), showgrid=False)
    return parts.finish(figure, title, height=figure.layout.height, top=44)


def _axis(title: str, *, labels: bool) -> dict[str, object]:
    return {"xaxis.title.text": title, "xaxis.showticklabels": labels}


def _load_hover(load: float, lower: float, upper: float, note: str, expert: int) -> str:
    if np.isnan(load):
        return f"expert {expert}<br>no token"
    if load == 0:
        bound = note if np.isnan(upper) else f"<br>load ≤ {100 * upper:.2g} % (rule of three)"
        return f"expert {expert}<br>no token seen{bound}"
    return f"expert {expert}<br>load {100 * load:.2f} %{parts.bounds(100 * lower, 100 * upper, '.2f')}{note}"


def document_load(result: xr.Dataset, *, colours: Sequence[str], title: str = "Load in this document") -> go.Figure:
    """Bars of a document's load, one for each expert, and a mark where the whole recording's load lies.

    Parameters
    ----------
    result : from ``routing_stats.document_load``.
    colours : one for each expert.
    title : drawn above the figure.
    """
    n_experts = result.sizes["expert"]
    figure = go.Figure(_document_bars(result, colours))
    if result.attrs["n_documents"] > 1:
        figure.add_trace(_recording_marks(result))
    figure.update_layout(
        template=TEMPLATE,
        title_text=title,
        height=290,
        bargap=0.15,
        margin={"t": 66, "b": 46, "l": 56, "r": 12},
        autosize=True,
    )
    figure.update_xaxes(
        title_text="expert", dtick=parts.tick_step(n_experts), showgrid=False, range=[-0.6, n_experts - 0.4]
    )
    share_of = "tokens" if result.attrs["top_k"] == 1 else "assignments"
    figure.update_yaxes(title_text=f"share of {share_of} (%)", showgrid=True, gridcolor=GRID_COLOUR, rangemode="tozero")
    return figure


def _document_bars(result: xr.Dataset, colours: Sequence[str]) -> go.Bar:
    return go.Bar(
        x=result["expert"].values,
        y=100 * result["here"].values,
        marker={"color": list(colours), "line": {"width": 0}},
        opacity=0.8,
        showlegend=False,
        hovertemplate="expert %{x}<br>this document %{y:.1f} %<extra></extra>",
    )


def _recording_marks(result: xr.Dataset) -> go.Scatter:
    """A short line for the whole recording's load, with its interval."""
    bars = f"{result.attrs['level']:.0%} interval over documents"
    if result.attrs["n_documents"] < MIN_DOCUMENTS:
        bars = f"too few documents for intervals ({result.attrs['n_documents']} of {MIN_DOCUMENTS})"
    overall, lower, upper = (100 * result[name].values for name in ("overall", "lower", "upper"))
    hover = [
        f"{value:.1f} %{parts.bounds(low, high, '.1f')}" for value, low, high in zip(overall, lower, upper, strict=True)
    ]
    return go.Scatter(
        x=result["expert"].values,
        y=overall,
        mode="markers",
        name=f"whole recording, {bars}",
        showlegend=True,
        marker={
            "symbol": "line-ew",
            "size": 24 if len(overall) <= 32 else 6,
            "line": {"width": 2.5, "color": parts.INK},
        },
        error_y={
            "type": "data",
            "symmetric": False,
            "array": upper - overall,
            "arrayminus": overall - lower,
            "thickness": 1.5,
            "width": 0,
            "color": parts.INK,
        },
        customdata=hover,
        hovertemplate="expert %{x}<br>whole recording %{customdata}<extra></extra>",
    )


def imbalance(result: xr.Dataset, *, title: str = "How uneven each layer is, beside chance") -> go.Figure:
    """Maximum violation of each layer with its interval, beside that of an exactly uniform router.

    Parameters
    ----------
    result : from ``routing_stats.imbalance``: ``max_violation`` and its ``_lower``, ``_upper`` and ``_null_upper``
        (layer).
    title : drawn above the figure; "" for none.
    """
    figure = go.Figure()
    hover = "a uniform router stays below %{x:.3f}<br>in 97.5 % of cases"
    _add_null(figure, result["max_violation_null_upper"], name="uniform router, by chance", hover=hover)
    points = [result[name].values for name in ("max_violation", "max_violation_lower", "max_violation_upper")]
    _add_points(figure, result, points, form="MaxVio {:.3f}{}")
    return _by_layer(figure, result, title, x="MaxVio: load of the busiest expert over the mean load, minus 1")


def repetition(result: xr.Dataset, *, title: str = "How often neighbouring tokens share an expert") -> go.Figure:
    """Share of neighbouring tokens with the same first choice, by layer, beside that of independent tokens.

    Parameters
    ----------
    result : from ``routing_stats.repetition``: ``repetition``, ``lower``, ``upper`` and ``null`` (layer).
    title : drawn above the figure; "" for none.
    """
    figure = go.Figure()
    hover = "independent tokens: %{x:.2f} %"
    _add_null(figure, 100 * result["null"], name="independent tokens", hover=hover)
    points = [100 * result[name].values for name in ("repetition", "lower", "upper")]
    _add_points(figure, result, points, form="same expert {:.2f} %{}")
    return _by_layer(figure, result, title, x="tokens that go to the same expert as the token before (%)")


def _add_null(figure: go.Figure, null: xr.DataArray, *, name: str, hover: str) -> None:
    """A grey bar for each layer, from 0 to what chance gives."""
    figure.add_trace(
        go.Bar(
            x=null.values,
            y=null["layer"].values,
            orientation="h",
            width=0.7,
            name=name,
            marker={"color": parts.NULL_COLOUR, "line_width": 0},
            hovertemplate=f"layer %{{y}}<br>{hover}<extra></extra>",
        )
    )


def _add_points(figure: go.Figure, data: xr.Dataset, points: Sequence[np.ndarray], *, form: str) -> None:
    """A point with its interval for each layer, RoPE and NoPE layers apart; ``points`` are value, lower and upper."""
    kinds = parts.attention_kinds(data)
    hover = parts.strings(lambda value, low, high: form.format(value, parts.bounds(low, high, ".3g")), *points)
    for kind, name in parts.KIND_NAMES.items():
        chosen = kinds == kind
        if not chosen.any():
            continue
        value, lower, upper = (part[chosen] for part in points)
        bar = {"type": "data", "symmetric": False, "array": upper - value, "arrayminus": value - lower}
        figure.add_trace(
            go.Scatter(
                x=value,
                y=data["layer"].values[chosen],
                mode="markers",
                name=name,
                marker={"color": parts.KIND_COLOURS[kind], "symbol": parts.KIND_SYMBOLS[kind], "size": 9},
                error_x=bar | {"thickness": 2, "width": 4},
                customdata=hover[chosen],
                hovertemplate="layer %{y}<br>%{customdata}<extra></extra>",
            )
        )


def _by_layer(figure: go.Figure, data: xr.Dataset, title: str, *, x: str) -> go.Figure:
    """Axes and size of a figure with one row for each layer."""
    parts.layer_axis(figure, data)
    figure.update_yaxes(title_text=parts.layer_title(data))
    figure.update_xaxes(title_text=x, rangemode="tozero")
    return parts.finish(figure, title, height=parts.rows_height(data) + 110, top=36)


def margin(result: xr.Dataset, *, title: str = "How sure the router is") -> go.Figure:
    """Quantiles of the router's margin by layer: median with its interval, middle half and middle 90 %.

    Parameters
    ----------
    result : from ``routing_stats.margin``: ``margin`` (layer, quantile) at .05, .25, .5, .75 and .95, its bounds
        ``margin_lower`` and ``margin_upper``, and ``tie_share`` (layer).
    title : drawn above the figure; "" for none.
    """
    kinds = parts.attention_kinds(result)
    figure = go.Figure()
    for kind in parts.KIND_NAMES:
        if (kinds == kind).any():
            _add_quantiles(figure, result.isel(layer=kinds == kind), kind)
    return _by_layer(figure, result, title, x="margin between the last expert chosen and the first not chosen (logits)")


def _add_quantiles(figure: go.Figure, result: xr.Dataset, kind: str) -> None:
    """Thin and thick bar and median of each layer, all of one kind."""
    quantiles, lower, upper = (
        result[name].transpose("layer", "quantile").values for name in ("margin", "margin_lower", "margin_upper")
    )
    layers, middle = result["layer"].values, quantiles[:, 2]
    median = parts.strings(
        lambda value, low, high: f"{value:.2f} logits{parts.bounds(low, high, '.3g')}", middle, lower[:, 2], upper[:, 2]
    )
    colour = parts.KIND_COLOURS[kind]
    for width, low, high in ((2, 0, 4), (9, 1, 3)):
        gaps = np.full(len(layers), np.nan)
        figure.add_trace(
            go.Scatter(
                x=np.stack([quantiles[:, low], quantiles[:, high], gaps], axis=-1).ravel(),
                y=np.repeat(layers, 3),
                mode="lines",
                line={"color": colour, "width": width},
                opacity=0.55,
                hoverinfo="skip",
                showlegend=False,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=middle,
            y=layers,
            mode="markers",
            name=parts.KIND_NAMES[kind],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": upper[:, 2] - middle,
                "arrayminus": middle - lower[:, 2],
                "thickness": 1.5,
                "width": 7,
                "color": parts.INK,
            },
            marker={
                "color": colour,
                "symbol": parts.KIND_SYMBOLS[kind],
                "size": 7,
            },
            customdata=np.column_stack([quantiles.astype(object), 100 * result["tie_share"].values, median]),
            hovertemplate="layer %{y}<br>median %{customdata[6]}"
            "<br>half between %{customdata[1]:.2f} and %{customdata[3]:.2f}"
            "<br>90 % between %{customdata[0]:.2f} and %{customdata[4]:.2f}"
            "<br>exact ties %{customdata[5]:.2g} %<extra></extra>",
        )
    )


def specialization(
    result: xr.Dataset,
    *,
    settled: xr.DataArray | None = None,
    domains: Sequence[str] | None = None,
    title: str = "Who goes where: share in a domain over share overall",
) -> go.Figure:
    """One heatmap of lift (layer, expert) for each domain.

    Parameters
    ----------
    result : from ``routing_stats.specialization``: ``share`` and ``lift`` with bounds (domain, layer, expert).
    settled : (domain, layer, expert), false where a cell cannot be told from 1; it gets a dot.
    domains : which to draw, at most 12; the first ones if not given.
    title : drawn above the figure; "" for none.
    """
    names = [str(name) for name in (result["domain"].values if domains is None else domains)][:MAX_PANELS]
    result = result.sel(domain=names).transpose("domain", "layer", "expert")
    certain = xr.ones_like(result["lift"], bool) if settled is None else settled.sel(domain=names)
    sure = certain.transpose("domain", "layer", "expert").values
    n_experts = result.sizes["expert"]
    n_columns = min(len(names), 3 if n_experts <= DOTTED_EXPERTS else 2)
    heads = [f"<b>{parts.plain(parts.short(name))}</b>" for name in names]
    figure = parts.panels(heads, n_columns, panel=parts.rows_height(result, row=15))
    for index, name in enumerate(names):
        row, column = parts.place(index, n_columns)
        figure.add_trace(_lift_cells(result.isel(domain=index), sure[index], name), row=row, col=column)
    parts.colour_ratios(figure, parts.log2(result["lift"].values), "lift")
    parts.layer_axis(figure, result)
    figure.update_xaxes(dtick=parts.tick_step(n_experts * max(n_columns - 1, 1)), showgrid=False)
    parts.outer_titles(figure, len(names), n_columns, x="expert", y="layer")
    return parts.finish(figure, title, height=figure.layout.height, top=parts.PANEL_HEAD)


def _lift_cells(part: xr.Dataset, settled: np.ndarray, name: str) -> go.Heatmap:
    """The heatmap of one domain; ``meta`` is its name, for the page's script."""
    lift = part["lift"].values
    experts = np.broadcast_to(part["expert"].values, lift.shape)
    columns = ("share", "share_lower", "share_upper", "lift", "lift_lower", "lift_upper")
    hover = parts.strings(
        _lift_hover, *(part[column].values for column in columns), parts.interval_notes(part), experts
    )
    cells = parts.layer_cells(
        part,
        parts.cell_colour(parts.log2(lift), settled),
        parts.cell_text(lift, settled, unused=part["share"].values == 0, numbered=False),
        np.stack([hover + f"<br>{parts.plain(name)}", experts], axis=-1),
    )
    return go.Heatmap(**cells, x=part["expert"].values.tolist(), meta=name)


def _lift_hover(*values: Any) -> str:
    share, share_lower, share_upper, lift, lift_lower, lift_upper, note, expert = values
    if np.isnan(share):
        return f"expert {expert}<br>no token of this domain"
    if share == 0:
        bound = note if np.isnan(share_upper) else f"<br>share ≤ {100 * share_upper:.2g} % (rule of three)"
        return f"expert {expert}<br>no token of this domain{bound}"
    return (
        f"expert {expert}<br>share {100 * share:.1f} %{parts.bounds(100 * share_lower, 100 * share_upper, '.1f')}"
        f"<br>lift {lift:.2f} ×{parts.bounds(lift_lower, lift_upper, '.2f')}{note}"
    )


def transition(
    result: xr.Dataset,
    *,
    drawn: xr.DataArray | None = None,
    layers: Sequence[int] | None = None,
    title: str = "From one layer's expert to the next layer's",
) -> go.Figure:
    """One heatmap (expert, next expert) of lift for each step from a MoE layer to the next.

    Parameters
    ----------
    result : from ``routing_stats.transition``: ``probability``, ``count`` and ``lift`` (layer, expert, next_expert).
    drawn : (layer, expert, next_expert), false where there are too few tokens to tell; those cells stay grey.
    layers : where the drawn steps start, at most 12; some, evenly spaced, if not given.
    title : drawn above the figure; "" for none.
    """
    n_experts = result.sizes["expert"]
    if layers is None:
        layers = parts.spaced(result["layer"].values, transition_panels(n_experts))
    result = result.sel(layer=list(layers)[:MAX_PANELS]).transpose("layer", "expert", "next_expert")
    shown = result["lift"] if drawn is None else result["lift"].where(drawn)
    log_lift = parts.log2(shown.transpose("layer", "expert", "next_expert").values)
    n_steps, small = result.sizes["layer"], n_experts <= DOTTED_EXPERTS
    n_columns = (4 if n_steps > 3 else 3) if small else 2
    heads = [f"<b>{_step_name(result.isel(layer=at))}</b>" for at in range(n_steps)]
    figure = parts.panels(heads, n_columns, panel=210 if small else 400)
    for at in range(n_steps):
        row, column = parts.place(at, n_columns)
        figure.add_trace(_step_cells(result.isel(layer=at), log_lift[at]), row=row, col=column)
    parts.colour_ratios(figure, log_lift, "lift")
    every = parts.tick_step(n_experts * max(n_columns - 2, 1))
    figure.update_xaxes(dtick=every, showgrid=False)
    figure.update_yaxes(dtick=every)
    parts.outer_titles(figure, n_steps, n_columns, x="next layer's expert", y="this layer's expert")
    figure.update_layout(plot_bgcolor=parts.MISSING_COLOUR)
    return parts.finish(figure, title, height=figure.layout.height, top=parts.PANEL_HEAD)


def transition_panels(n_experts: int) -> int:
    """How many steps are drawn: large heatmaps need room."""
    return MAX_PANELS if n_experts <= DOTTED_EXPERTS else 4


def _step_name(step: xr.Dataset) -> str:
    """The two layers of a step, each with its sign."""
    nope, next_nope = (schema.labels(step[name]) == "nope" for name in ("attention_kind", "next_attention_kind"))
    return f"{layer_label(int(step['layer']), nope)} → {layer_label(int(step['next_layer']), next_nope)}"


def _step_cells(step: xr.Dataset, log_lift: np.ndarray) -> go.Heatmap:
    """The heatmap of one step; numbers travel as float32, as there may be 128 × 128 of them."""
    numbers = np.stack([100 * step["probability"].values, step["lift"].values, step["count"].values], axis=-1)
    return go.Heatmap(
        z=log_lift.astype(np.float32),
        x=step["next_expert"].values,
        y=step["expert"].values,
        customdata=numbers.astype(np.float32),
        coloraxis="coloraxis",
        hoverongaps=False,
        xgap=0.5,
        ygap=0.5,
        hovertemplate="expert %{y} → %{x}<br>%{customdata[0]:.1f} % of expert %{y}'s tokens (%{customdata[2]:,})"
        "<br>lift %{customdata[1]:.2f} ×<extra></extra>",
    )
