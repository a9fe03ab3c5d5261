"""Who changes experts in FP8: by layer, by domain, and by how sure the reference was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import fp8_titles
from probe.attention_figures.parts import band, bounds, expect
from probe.fp8_figures.parts import (
    FLOOR_FILL,
    Scale,
    Style,
    finish,
    floor_names,
    interval_ends,
    interval_marks,
    legend_line,
    log_scale,
    nothing,
    series,
    status_notes,
    styles,
    with_kinds,
)
from probe.fp8_figures.rows import rows_by_recipe
from probe.fp8_titles import recipe_names
from probe.schema import SchemaError
from probe.text_view import layer_label

__all__ = ["flips_by_domain", "flips_by_layer", "flips_by_margin"]


def flips_by_layer(result: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Share of tokens that go to other experts than in BF16, by layer, with intervals.

    Parameters
    ----------
    result : from ``fp8_error.flip_share``: ``flip_share``, ``lower`` and ``upper`` (recipe, layer).
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Returns
    -------
    Figure with a line and a band for each recipe; grey is what BF16 flips against itself. The interval of a share of 0
    is in the hover alone.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    """
    expect(result, "flip_share", ("recipe", "layer"), "lower", "upper")
    if title is None:
        title = fp8_titles.flips_by_layer(result)
    own = with_kinds(result).transpose("recipe", "layer", ...)
    own = own.isel(layer=own["flip_share"].notnull().any("recipe").values)
    if not own.sizes["layer"] or not own.sizes["recipe"]:
        return nothing(title, "No routing was compared")
    looks, layers = styles(recipe_names(own)), own["layer"].values
    kinds = parts.attention_kinds(own)
    share, lower, upper = (100 * own[name].astype(float) for name in ("flip_share", "lower", "upper"))
    scale = Scale({"rangemode": "tozero", "showgrid": True, "gridcolor": parts.GRID_COLOUR}, None, np.inf)
    figure = go.Figure(list(_noise_area(share)))
    for recipe in [*floor_names(own), *(name for name in looks if not looks[name].is_floor)]:
        look = looks[recipe]
        value, low, high = (part.sel(recipe=recipe).values for part in (share, lower, upper))
        hover = [
            f"layer {layer_label(int(layer), kind == 'nope')}, {look.name}<br>{number:.3g} % of the tokens flip"
            f"{bounds(*ends)}{note}"
            for layer, kind, number, *ends, note in zip(
                layers, kinds, value, low, high, status_notes(own, recipe, value.shape), strict=True
            )
        ]
        figure.add_trace(_upright(band(layers, *interval_ends(value, low, high), colour=look.colour, group=look.name)))
        (points,) = series(look, (layers, value), hover, scale=scale)
        if len(layers) == 1:  # where a band has no width
            points.update(error_x=_whiskers((value, low, high), look))
        figure.add_trace(points)
    figure.add_traces([legend_line(look) for look in looks.values()])
    figure.add_trace(interval_marks(result, bool(lower.notnull().any()), band=len(layers) > 1))
    parts.layer_axis(figure, own)
    figure.update_yaxes(title_text=parts.layer_title(own))
    figure.update_xaxes(title_text="tokens that go to other experts than in BF16 (%)", **scale.axis)
    return finish(figure, title, height=max(parts.rows_height(own), 200) + 60)


def _upright(trace: go.Scatter) -> go.Scatter:
    """The trace with its axes exchanged."""
    return trace.update(x=trace.y, y=trace.x)


def _noise_area(share: xr.DataArray) -> Iterator[go.Scatter]:
    """From 0 to the larger of the noise floors."""
    names = floor_names(share.to_dataset(name="share"))
    if names and share.sizes["layer"] > 1:
        edge, layers = share.sel(recipe=names).max("recipe").values, share["layer"].values
        yield go.Scatter(
            x=[*np.nan_to_num(edge), *np.zeros(len(layers))],
            y=[*layers, *layers[::-1]],
            mode="lines",
            fill="toself",
            fillcolor=FLOOR_FILL,
            line={"width": 0},
            name="no more than noise",
            hoverinfo="skip",
        )


def flips_by_domain(result: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Share of routing that goes to other experts than in BF16, a row for each domain, with intervals.

    Parameters
    ----------
    result : from ``fp8_error.flip_share`` with ``by="domain"`` and ``pooled=True``: ``flip_share``, ``lower`` and
        ``upper`` (recipe, domain). Any other coord than the domain does as well.
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Raises
    ------
    SchemaError
        If a variable is missing, or has other dims than the recipe and one more.
    """
    expect(result, "flip_share", tuple(map(str, result["flip_share"].dims)), "lower", "upper")
    others = [str(dim) for dim in result["flip_share"].dims if dim != "recipe"]
    if len(others) != 1 or "layer" in others or "recipe" not in result["flip_share"].dims:
        raise SchemaError(
            f"flip_share has dims ({', '.join(map(str, result['flip_share'].dims))}), expected the recipe and what the "
            'tokens are split by: pass flip_share(study, by="domain", pooled=True)'
        )
    if title is None:
        title = fp8_titles.flips_by_domain(result)
    return rows_by_recipe(
        result, "flip_share", others[0], axis="routing that goes to other experts than in BF16 (%)", title=title
    )


def flips_by_margin(result: xr.Dataset, *, title: str | None = None) -> go.Figure:
    """Share of decisions that flip by how sure the reference was, beside what two noisy experts would give.

    Parameters
    ----------
    result : from ``fp8_error.flips_by_margin``: ``flip_share``, ``lower``, ``upper`` and ``predicted`` (recipe,
        margin_bin), ``n_decisions`` (margin_bin), ``logit_noise`` (recipe); of layers that stand apart select one.
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Returns
    -------
    Figure on log axes: measured shares as solid lines with intervals, the prediction ½·erfc(m/2σ) dotted in the same
    colour, the noise floors grey. A share of 0 stands at 0, below all others; its interval is in the hover alone. A
    point stands at the middle of its bin, whose edges are in the hover.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    """
    expect(result, "flip_share", ("recipe", "margin_bin"), "lower", "upper", "predicted", "n_decisions", "logit_noise")
    if title is None:
        title = fp8_titles.flips_by_margin(result)
    own = result.isel(margin_bin=(result["n_decisions"] > 0).values).transpose("recipe", "margin_bin", ...)
    if not own.sizes["margin_bin"] or not own.sizes["recipe"]:
        return nothing(title, "There is no margin: every expert is chosen, or nothing was compared")
    looks, margin = styles(recipe_names(own)), own["margin_bin"].values
    share, lower, upper, predicted = (
        100 * own[name].astype(float) for name in ("flip_share", "lower", "upper", "predicted")
    )
    ends = interval_ends(share.values, lower.values, upper.values)
    scale = log_scale([share.values], ends=[ends[1]])
    figure = go.Figure()
    for recipe in [*floor_names(own), *(name for name in looks if not looks[name].is_floor)]:
        look, noise = looks[recipe], float(own["logit_noise"].sel(recipe=recipe))
        points = [part.sel(recipe=recipe).values for part in (share, lower, upper, predicted)]
        hover = _margin_hover(own, look, recipe, points, noise)
        figure.add_trace(_predicted(margin, points[3], look, noise))
        for trace in series(look, (margin, points[0]), hover, scale=scale, upright=False):
            if trace.mode != "markers":
                trace.update(error_y=_whiskers(points[:3], look))
            figure.add_trace(trace)
    figure.add_traces([legend_line(look) for look in looks.values()])
    dotted = {"color": parts.INK, "width": 2, "dash": "dot"}
    figure.add_trace(
        go.Scatter(x=[None], y=[None], mode="lines", line=dotted, name="two noisy experts: ½·erfc(margin / 2σ)")
    )
    figure.add_trace(interval_marks(result, bool(lower.notnull().any()), band=False))
    is_log = bool((margin > 0).all())
    figure.update_xaxes(title_text="margin of the router in BF16 (logit)" + ", log axis" * is_log)
    if is_log:
        figure.update_xaxes(**log_scale([margin]).axis)
    figure.update_yaxes(title_text="decisions that flip (%), log axis", **scale.axis)
    return finish(figure, title, height=480)


def _margin_hover(own: xr.Dataset, look: Style, recipe: str, points: list[np.ndarray], noise: float) -> list[str]:
    share, lower, upper, predicted = points
    notes = status_notes(own, recipe, share.shape)
    edges = (own["margin_from"].values, own["margin_to"].values) if "margin_from" in own else (share * np.nan,) * 2
    return [
        f"{look.name}, margin {first:.3g} to {last:.3g} logit<br>{value:.3g} % of {int(n):,} flip{bounds(low, high)}"
        f"{note}<br>two experts with noise σ = {noise:.3g} logit: {chance:.3g} %"
        for first, last, value, n, low, high, note, chance in zip(
            *edges, share, own["n_decisions"].values, lower, upper, notes, predicted, strict=True
        )
    ]


def _predicted(margin: np.ndarray, chance: np.ndarray, look: Style, noise: float) -> go.Scatter:
    return go.Scatter(
        x=margin,
        y=np.where(chance > 0, chance, np.nan),
        mode="lines",
        line={"color": look.colour, "width": 1.5, "dash": "dot"},
        opacity=0.8,
        name=f"{look.name}, predicted",
        legendgroup=look.name,
        showlegend=False,
        # A name must not be part of a template, which is filled in.
        customdata=[f"{look.name}, predicted with σ = {noise:.3g} logit<br>{value:.3g} %" for value in chance],
        hovertemplate="%{customdata}<extra></extra>",
    )


def _whiskers(points: Sequence[np.ndarray], look: Style) -> dict[str, object]:
    """Intervals of points; ``points`` are value, lower and upper."""
    share = points[0]
    lower, upper = interval_ends(*points)
    return {
        "type": "data",
        "symmetric": False,
        "array": np.maximum(upper - share, 0),
        "arrayminus": np.maximum(share - lower, 0),
        "thickness": 1.4,
        "width": 3,
        "color": look.colour,
    }
