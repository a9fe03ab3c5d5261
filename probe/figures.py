"""Results of statistics as ``plotly`` figures: nothing is computed here but where a mark goes.

Every figure follows the same rules. Layers stand on the y axis at the decoder's own index, 0 at the bottom, so that dense layers
are gaps; a NoPE layer carries the sign ``◇``. Ratios are on a log scale around 1. Colours suit a light page; ``layout.meta`` holds
the colour scale for a dark one, which the report's script puts in.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "dark": ["#8cc4fb", "#4583bd", "#25486a", "#1c2026", "#684220", "#bb6c2c", "#ffc083"],
}
"""Below 1 blue, above 1 orange; 1 itself has the colour of the page."""

NULL_COLOUR = "rgba(128,134,145,0.45)"
MISSING_COLOUR = "rgba(128,134,145,0.22)"
GRID_COLOUR = "rgba(128,134,145,0.22)"

LARGEST_LIMIT = 4
"""Colours of ratios end at 2 to this power."""

MAX_PANELS = 12
NUMBERED_EXPERTS = 16

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
TEMPLATE = go.layout.Template(
    layout=dict(
        font=dict(family=_FONT, size=13, color="#4b5260"),
        title=dict(font=dict(size=16), x=0, xanchor="left", xref="paper"),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin=dict(l=62, r=16, t=16, b=50),
        xaxis=dict(gridcolor=GRID_COLOUR, zeroline=False, ticks="", title=dict(standoff=8), automargin=True),
        yaxis=dict(showgrid=False, zeroline=False, ticks="", title=dict(standoff=8), automargin=True),
        hoverlabel=dict(
            bgcolor="#20242b", bordercolor="#565d69", font=dict(family=_FONT, size=13, color="#f4f5f7"), align="left"
        ),
        legend=dict(orientation="h", yanchor="bottom", y=1, xanchor="left", x=0),
        hovermode="closest",
        bargap=0,
    )
)
"""Fonts and colours of every figure."""


def expert_load(interval: xr.Dataset, *, title: str = "Load of each expert, relative to an even share") -> go.Figure:
    """Heatmap of load over an even share, by layer and expert, with a switch that sorts each layer by load.

    Parameters
    ----------
    interval : from ``routing_stats.load_interval``: ``load``, ``lower`` and ``upper`` (layer, expert).
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with two heatmaps of log2(load · E): experts in their own order, and (hidden at first) sorted in each layer. A
    dot marks a cell whose interval holds 1, a cross an expert that no token went to.
    """
    load, lower, upper = (interval[name].transpose("layer", "expert").values for name in ("load", "lower", "upper"))
    n_experts = load.shape[1]
    experts = np.broadcast_to(interval["expert"].values, load.shape)
    ratio = _log2(load * n_experts)
    settled = ~((lower * n_experts <= 1) & (upper * n_experts >= 1)) & ~np.isnan(lower)
    text = _cell_text(load * n_experts, settled, unused=load == 0, numbered=n_experts <= NUMBERED_EXPERTS)
    hover = _strings(_load_hover, load, lower, upper, experts)
    limit = _limit(ratio)
    figure = go.Figure()
    orders = {"own": np.argsort(experts, axis=1, kind="stable"), "load": np.argsort(-load, axis=1, kind="stable")}
    for name, order in orders.items():
        ratios, texts, hovers, numbers = (np.take_along_axis(part, order, 1) for part in (ratio, text, hover, experts))
        figure.add_trace(
            go.Heatmap(
                **_layer_cells(interval, ratios, texts, np.stack([hovers, numbers], axis=-1)),
                x=experts[0] if name == "own" else np.arange(n_experts),
                visible=name == "own",
            )
        )
    buttons = [
        _button("by number", {"visible": [True, False]}, {"xaxis.title.text": "expert"}),
        _button("by load", {"visible": [False, True]}, {"xaxis.title.text": "experts of each layer, busiest first"}),
    ]
    _colour_ratios(figure, limit, "load / even share", clipped=bool(np.nanmin(ratio, initial=0) < -limit))
    _layer_axis(figure, interval)
    figure.update_xaxes(title_text="expert", dtick=_step(n_experts), showgrid=False)
    figure.update_layout(updatemenus=[_switch(buttons)])
    return _finish(figure, title, height=_rows_height(interval) + 40, top=44)


def imbalance(result: xr.Dataset, *, title: str = "How uneven each layer is, beside chance") -> go.Figure:
    """Maximum violation of each layer with its interval, beside that of an exactly uniform router.

    Parameters
    ----------
    result : from ``routing_stats.imbalance``: ``max_violation`` with ``_lower``, ``_upper``, ``_null`` and ``_null_upper`` (layer).
    title : drawn above the figure; "" for none.
    """
    names = ("max_violation", "max_violation_lower", "max_violation_upper", "max_violation_null_upper")
    value, lower, upper, null = (result[name].values for name in names)
    figure = go.Figure(
        go.Bar(
            y=result["layer"].values, x=null, orientation="h", width=0.7, name="uniform router, by chance",
            marker=dict(color=NULL_COLOUR, line_width=0),
            hovertemplate="layer %{y}<br>a uniform router stays below %{x:.3f}<br>in 97.5 % of cases<extra></extra>",
        )
    )  # fmt: skip
    _add_points(figure, result, value, lower, upper, quantity="MaxVio", digits=3)
    _layer_axis(figure, result)
    figure.update_xaxes(title_text="MaxVio: load of the busiest expert over the mean load, minus 1", rangemode="tozero")
    return _finish(figure, title, height=_rows_height(result) + 50, top=36)


def repetition(result: xr.Dataset, *, title: str = "How often neighbouring tokens share an expert") -> go.Figure:
    """Share of neighbouring tokens with the same first choice, by layer, beside that of independent tokens.

    Parameters
    ----------
    result : from ``routing_stats.repetition``: ``repetition``, ``lower``, ``upper`` and ``null`` (layer).
    title : drawn above the figure; "" for none.
    """
    value, lower, upper, null = (100 * result[name].values for name in ("repetition", "lower", "upper", "null"))
    figure = go.Figure(
        go.Bar(
            y=result["layer"].values, x=null, orientation="h", width=0.7, name="independent tokens",
            marker=dict(color=NULL_COLOUR, line_width=0),
            hovertemplate="layer %{y}<br>independent tokens: %{x:.1f} %<extra></extra>",
        )
    )  # fmt: skip
    _add_points(figure, result, value, lower, upper, quantity="same expert", digits=1, unit=" %")
    _layer_axis(figure, result)
    figure.update_xaxes(title_text="tokens that go to the same expert as the token before (%)", rangemode="tozero")
    return _finish(figure, title, height=_rows_height(result) + 50, top=36)


def margin(result: xr.Dataset, *, title: str = "How sure the router is") -> go.Figure:
    """Quantiles of the router's margin by layer: median, middle half and middle 90 %.

    Parameters
    ----------
    result : from ``routing_stats.margin``: ``quantile`` (layer, quantile) at .05, .25, .5, .75 and .95 and ``tie_share`` (layer).
    title : drawn above the figure; "" for none.
    """
    quantiles = result["quantile"].transpose("layer", "quantile").values
    layers, kinds = result["layer"].values, _kinds(result)
    figure = go.Figure()
    for kind, (width, low, high) in [(kind, bar) for kind in KIND_NAMES for bar in ((2, 0, 4), (9, 1, 3))]:
        chosen = kinds == kind
        bars = [value for row, y in zip(quantiles[chosen], layers[chosen], strict=True)
                for value in ((row[low], y), (row[high], y), (None, None))]  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=[x for x, _ in bars], y=[y for _, y in bars], mode="lines", hoverinfo="skip", showlegend=False,
                line=dict(color=KIND_COLOURS[kind], width=width), opacity=0.55,
            )
        )  # fmt: skip
    for kind in KIND_NAMES:
        chosen = kinds == kind
        if chosen.any():
            figure.add_trace(
                go.Scatter(
                    x=quantiles[chosen, 2], y=layers[chosen], mode="markers", name=KIND_NAMES[kind],
                    marker=dict(color=KIND_COLOURS[kind], symbol=KIND_SYMBOLS[kind], size=10, line=dict(width=1.5, color="#fff")),
                    customdata=np.column_stack([quantiles[chosen], 100 * result["tie_share"].values[chosen]]),
                    hovertemplate="layer %{y}<br>median %{x:.2f} logits<br>half between %{customdata[1]:.2f} and %{customdata[3]:.2f}"
                    "<br>90 % between %{customdata[0]:.2f} and %{customdata[4]:.2f}<br>exact ties %{customdata[5]:.2g} %<extra></extra>",
                )
            )  # fmt: skip
    _layer_axis(figure, result)
    figure.update_xaxes(title_text="margin between the last expert chosen and the first not chosen (logits)", rangemode="tozero")
    return _finish(figure, title, height=_rows_height(result) + 50, top=36)


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
    n_experts = result.sizes["expert"]
    n_columns = _panel_columns(len(names), n_experts)
    figure = _panels([f"<b>{_plain(name)}</b>" for name in names], n_columns)
    lift = result["lift"].transpose("domain", "layer", "expert")
    limit = _limit(_log2(lift.sel(domain=names).values))
    for index, name in enumerate(names):
        part = result.sel(domain=name).transpose("layer", "expert")
        sure = np.ones(part["lift"].shape, bool) if settled is None else settled.sel(domain=name).transpose("layer", "expert").values
        experts = np.broadcast_to(part["expert"].values, part["lift"].shape)
        text = _cell_text(part["lift"].values, sure, unused=part["share"].values == 0, numbered=False)
        columns = ("share", "share_lower", "share_upper", "lift", "lift_lower", "lift_upper")
        hover = _strings(_lift_hover, *(part[column].values for column in columns), experts)
        figure.add_trace(
            go.Heatmap(
                **_layer_cells(part, _log2(part["lift"].values), text, np.stack([hover, experts], axis=-1)),
                x=part["expert"].values,
            ),
            row=index // n_columns + 1,
            col=index % n_columns + 1,
        )
    _colour_ratios(figure, limit, "lift", clipped=True)
    _layer_axis(figure, result, title=False)
    figure.update_xaxes(dtick=_step(n_experts * n_columns), showgrid=False)
    _outer_titles(figure, len(names), n_columns, x="expert", y=_layer_title(result))
    n_rows = -(-len(names) // n_columns)
    return _finish(figure, title, height=n_rows * (_rows_height(result, row=15) + 30) + 60, top=30)


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
    layers : where the drawn steps start, at most 12; evenly spaced ones if not given.
    title : drawn above the figure; "" for none.
    """
    there = result["layer"].values
    chosen = list(spaced(there, MAX_PANELS) if layers is None else layers)[:MAX_PANELS]
    kinds = dict(zip(there.tolist(), _kinds(result), strict=True))
    n_columns = min(len(chosen), 4 if result.sizes["expert"] <= 32 else 2)
    heads = [
        f"<b>{layer_label(int(layer), kinds[int(layer)] == 'nope')} → {int(result['next_layer'].sel(layer=layer))}</b>"
        for layer in chosen
    ]
    figure = _panels(heads, n_columns, square=True)
    lift = result["lift"] if drawn is None else result["lift"].where(drawn)
    lift = lift.transpose("layer", "expert", "next_expert")
    limit = _limit(_log2(lift.sel(layer=chosen).values))
    for index, layer in enumerate(chosen):
        part = result.sel(layer=layer).transpose("expert", "next_expert")
        here, then = np.meshgrid(part["expert"].values, part["next_expert"].values, indexing="ij")
        hover = _strings(_transition_hover, part["probability"].values, part["lift"].values, part["count"].values, here, then)
        figure.add_trace(
            go.Heatmap(
                z=_log2(lift.sel(layer=layer).values), x=then[0], y=here[:, 0], coloraxis="coloraxis",
                customdata=np.stack([hover, here, np.full(here.shape, layer)], axis=-1).astype(object),
                hovertemplate="%{customdata[0]}<extra></extra>", hoverongaps=False, xgap=0.5, ygap=0.5,
            ),
            row=index // n_columns + 1, col=index % n_columns + 1,
        )  # fmt: skip
    _colour_ratios(figure, limit, "lift", clipped=True)
    step = _step(result.sizes["expert"] * n_columns)
    figure.update_xaxes(dtick=step, showgrid=False)
    figure.update_yaxes(dtick=step)
    figure.update_layout(plot_bgcolor=MISSING_COLOUR)
    _outer_titles(figure, len(chosen), n_columns, x="expert at the next layer", y="expert at this layer")
    n_rows = -(-len(chosen) // n_columns)
    return _finish(figure, title, height=n_rows * (270 if n_columns == 4 else 420) + 60, top=30)


def spaced(values: Sequence[Any] | np.ndarray, n: int) -> list[Any]:
    """At most ``n`` of the values, evenly spaced, first and last among them."""
    values = list(values)
    if len(values) <= n:
        return values
    return [values[index] for index in np.linspace(0, len(values) - 1, n).round().astype(int)]


def _log2(ratio: np.ndarray) -> np.ndarray:
    """NaN stays NaN; a ratio of 0 gets the floor that the colours end at, further below than any limit."""
    floor = 2.0 ** -(LARGEST_LIMIT + 1)
    return np.log2(np.where(ratio == 0, floor, ratio))


def _limit(ratio: np.ndarray) -> float:
    """End of the symmetric colour scale: the largest log2 ratio above 1, at least a factor of 2 and at most 2 ** 4."""
    finite = ratio[np.isfinite(ratio)]
    return float(np.clip(np.ceil(finite.max(initial=0) * 2) / 2, 1, LARGEST_LIMIT))


def _cell_text(ratio: np.ndarray, settled: np.ndarray, *, unused: np.ndarray, numbered: bool) -> np.ndarray:
    text = np.full(ratio.shape, "", dtype=object)
    if numbered:
        text[:] = _strings(lambda value: f"{value:.2g}" if value < 9.95 else f"{value:.0f}", ratio)
    text[~settled] = "·"
    text[unused] = "×"
    text[np.isnan(ratio)] = ""
    return text


def _strings(function: Any, *arrays: np.ndarray) -> np.ndarray:
    """A string for each cell, from the values of the arrays there."""
    cells = zip(*(array.ravel().tolist() for array in arrays), strict=True)
    result = np.empty(arrays[0].size, dtype=object)
    result[:] = [function(*values) for values in cells]
    return result.reshape(arrays[0].shape)


def _range(lower: float, upper: float, form: str) -> str:
    return "" if np.isnan(lower) or np.isnan(upper) else f" [{lower:{form}}, {upper:{form}}]"


def _load_hover(load: float, lower: float, upper: float, expert: int) -> str:
    if np.isnan(load):
        return f"expert {expert}<br>no token"
    if load == 0:
        bound = "" if np.isnan(upper) else f"<br>load ≤ {100 * upper:.2g} %"
        return f"expert {expert}<br>no token seen{bound}"
    return f"expert {expert}<br>load {100 * load:.2f} %{_range(100 * lower, 100 * upper, '.2f')}"


def _lift_hover(*values: float) -> str:
    share, share_lower, share_upper, lift, lift_lower, lift_upper, expert = values
    if np.isnan(share):
        return f"expert {expert}<br>no token of this domain"
    if share == 0:
        bound = "" if np.isnan(share_upper) else f"<br>share ≤ {100 * share_upper:.2g} %"
        return f"expert {expert}<br>no token of this domain{bound}"
    return (
        f"expert {expert}<br>share {100 * share:.1f} %{_range(100 * share_lower, 100 * share_upper, '.1f')}"
        f"<br>lift {lift:.2f} ×{_range(lift_lower, lift_upper, '.2f')}"
    )


def _transition_hover(probability: float, lift: float, count: int, here: int, then: int) -> str:
    if np.isnan(probability):
        return f"expert {here}: no token"
    times = "" if np.isnan(lift) else f"<br>lift {lift:.2f} ×"
    return f"expert {here} → {then}<br>{100 * probability:.1f} % of expert {here}'s tokens ({count:,}){times}"


def _plain(name: str) -> str:
    """A name that plotly shows as it is: it would read ``<b>`` in a title as markup."""
    return name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _kinds(data: xr.Dataset) -> np.ndarray:
    return schema.labels(data["attention_kind"])


def _all_layers(data: xr.Dataset) -> np.ndarray:
    """Every layer of the decoder up to the last one recorded, dense ones among them."""
    return np.arange(int(data["layer"].max()) + 1)


def _layer_cells(data: xr.Dataset, z: np.ndarray, text: np.ndarray, customdata: np.ndarray) -> dict[str, Any]:
    """Arguments of a heatmap with a row for every layer; rows of dense layers are empty."""
    layers = _all_layers(data)
    where = data["layer"].values
    rows = np.full((len(layers), z.shape[1]), np.nan)
    rows[where] = z
    texts = np.full(rows.shape, "", dtype=object)
    texts[where] = text
    custom = np.full((*rows.shape, customdata.shape[-1]), "", dtype=object)
    custom[where] = customdata
    return dict(
        z=rows, y=layers, text=texts, customdata=custom, texttemplate="%{text}", coloraxis="coloraxis",
        hovertemplate="layer %{y}, %{customdata[0]}<extra></extra>", hoverongaps=False, xgap=1, ygap=1,
    )  # fmt: skip


def _layer_title(data: xr.Dataset) -> str:
    notes = [f"{NOPE_SIGN} NoPE"] * bool((_kinds(data) == "nope").any())
    notes += ["gap: dense"] * (data.sizes["layer"] < len(_all_layers(data)))
    return f"layer ({', '.join(notes)})" if notes else "layer"


def _layer_axis(figure: go.Figure, data: xr.Dataset, *, title: bool = True) -> None:
    """Layers on y at their own index; labels thin out where they would touch."""
    layers, kinds = data["layer"].values, _kinds(data)
    shown = slice(None, None, -(-len(layers) // 24))
    figure.update_yaxes(
        range=[-0.5, int(layers.max()) + 0.5],
        tickvals=layers[shown],
        ticktext=[layer_label(int(layer), kind == "nope") for layer, kind in zip(layers[shown], kinds[shown], strict=True)],
    )
    if title:
        figure.update_yaxes(title_text=_layer_title(data))


def _add_points(
    figure: go.Figure, data: xr.Dataset, value: np.ndarray, lower: np.ndarray, upper: np.ndarray, *, quantity: str, digits: int, unit: str = ""
) -> None:
    """A point with its interval for each layer, RoPE and NoPE layers apart."""
    kinds = _kinds(data)
    hover = _strings(lambda v, low, high: f"{v:.{digits}f}{unit}{_range(low, high, f'.{digits}f')}", value, lower, upper)
    for kind, name in KIND_NAMES.items():
        chosen = kinds == kind
        if not chosen.any():
            continue
        figure.add_trace(
            go.Scatter(
                x=value[chosen], y=data["layer"].values[chosen], mode="markers", name=name,
                marker=dict(color=KIND_COLOURS[kind], symbol=KIND_SYMBOLS[kind], size=9),
                error_x=dict(type="data", symmetric=False, array=(upper - value)[chosen], arrayminus=(value - lower)[chosen], thickness=2, width=4),
                customdata=hover[chosen], hovertemplate=f"layer %{{y}}<br>{quantity} %{{customdata}}<extra></extra>",
            )
        )  # fmt: skip


def _panel_columns(n_panels: int, n_experts: int) -> int:
    return min(n_panels, 3 if n_experts <= 32 else 2)


def _panels(heads: Sequence[str], n_columns: int, *, square: bool = False) -> go.Figure:
    n_rows = -(-len(heads) // n_columns)
    figure = make_subplots(
        rows=n_rows, cols=n_columns, subplot_titles=list(heads), shared_xaxes="all", shared_yaxes="all",
        horizontal_spacing=0.03 if n_columns > 1 else 0, vertical_spacing=min(0.34 / n_rows, 0.2) if n_rows > 1 else 0,
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    return figure


def _outer_titles(figure: go.Figure, n_panels: int, n_columns: int, *, x: str, y: str) -> None:
    """Name the axes once: y on the left of every row, x under the lowest panel of every column."""
    for index in range(n_panels):
        row, column = index // n_columns + 1, index % n_columns + 1
        if index + n_columns >= n_panels:
            figure.update_xaxes(title_text=x, showticklabels=True, row=row, col=column)
        if column == 1:
            figure.update_yaxes(title_text=y, row=row, col=column)


def _colour_ratios(figure: go.Figure, limit: float, title: str, *, clipped: bool) -> None:
    """The colours of all heatmaps in the figure, from 2 ** -limit to 2 ** limit."""
    ticks = np.arange(-int(limit), int(limit) + 1)
    names = [f"{2**tick} ×" if tick >= 0 else f"1/{2**-tick} ×" for tick in ticks]
    if clipped and limit == int(limit):
        names[0] = "≤ " + names[0]
    figure.update_layout(
        coloraxis=dict(
            cmin=-limit,
            cmax=limit,
            colorscale=DIVERGING["light"],
            colorbar=dict(
                title=dict(text=title, side="right"), tickvals=ticks, ticktext=names, thickness=11, outlinewidth=0, len=1, x=1.01, xpad=4
            ),
        ),
        meta={"colorscale": DIVERGING},
    )


def _step(n_labels: int) -> int:
    return next(step for step in (1, 2, 4, 8, 16, 32, 64) if n_labels / step <= 40 or step == 64)


def _rows_height(data: xr.Dataset, row: int = 24) -> int:
    n_layers = len(_all_layers(data))
    return 70 + n_layers * (row if n_layers <= 16 else max(row // 2, 9))


def _button(label: str, traces: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    return dict(label=label, method="update", args=[traces, layout])


def _switch(buttons: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(
        type="buttons", direction="right", buttons=buttons, x=0, xanchor="left", y=1, yanchor="bottom", pad=dict(b=6),
        bgcolor="rgba(128,134,145,0.12)", bordercolor=GRID_COLOUR, font=dict(size=12), showactive=False,
    )  # fmt: skip


def _finish(figure: go.Figure, title: str, *, height: int, top: int) -> go.Figure:
    figure.update_layout(template=TEMPLATE, height=height + (36 if title else 0))
    figure.update_layout(margin_t=top + (36 if title else 0))
    if title:
        figure.update_layout(title_text=title)
    return figure
