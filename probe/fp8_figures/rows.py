"""Points in rows: what recipes cost, in all texts and by domain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import fp8_titles
from probe.attention_figures.parts import bounds, expect
from probe.fp8_figures.parts import (
    FLOOR_FILL,
    Scale,
    choose,
    finish,
    floor_names,
    floor_span,
    interval_ends,
    interval_marks,
    legend_line,
    linear_scale,
    log_scale,
    nothing,
    recipe_points,
    row_axis,
    rows_figure,
    shares_in_percent,
    status_notes,
    styles,
)
from probe.fp8_titles import recipe_names

__all__ = ["AXES", "loss_by_domain", "drawn_ends", "loss_change", "measure_scale", "rows_by_recipe"]

AXES = {
    "loss_change": "change of the next token's loss (nat)",
    "logit_kl": "KL of the logits from those of BF16 (nat), log axis",
    "top1_agreement": "tokens whose likeliest next one is that of BF16 (%)",
    "flip_share": "routing that goes to other experts than in BF16 (%)",
}


def measure_scale(name: str, values: Sequence[np.ndarray], ends: Sequence[np.ndarray] = ()) -> Scale:
    """The axis of a measure of damage: KL spans powers of ten, the others are linear and hold 0, or 100 %."""
    if name == "logit_kl":
        return log_scale(values, ends=ends)
    anchor = 100.0 if name == "top1_agreement" else 0.0
    return linear_scale([*values, *ends, np.array([anchor])])


def drawn_ends(measure: str, value: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds as they are drawn; see :func:`interval_ends`, which is for shares."""
    return (lower, upper) if measure in ("loss_change", "logit_kl") else interval_ends(value, lower, upper)


def loss_change(result: xr.Dataset, *, measure: str = "loss_change", title: str | None = None) -> go.Figure:
    """What each recipe costs at the output, a row each, beside the noise floors.

    Parameters
    ----------
    result : from ``fp8_error.loss_change``: the measure, ``…_lower`` and ``…_upper`` (recipe,).
    measure : "loss_change" and "logit_kl" in nats, or "top1_agreement".
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    FigureChoiceError
        For another measure.
    """
    choose("measure", measure, ("loss_change", "logit_kl", "top1_agreement"))
    expect(result, measure, ("recipe",), f"{measure}_lower", f"{measure}_upper")
    if title is None:
        title = fp8_titles.loss_change(result, measure=measure)
    names = recipe_names(result)
    looks, factor = styles(names), shares_in_percent(measure)
    value, lower, upper = (factor * result[f"{measure}{end}"].astype(float) for end in ("", "_lower", "_upper"))
    if not np.isfinite(value.values).any():
        return nothing(title, "The model has no output head, or no text has a second token")
    # What costs most is at the top, the noise floors at the bottom.
    damage = dict(zip(names, (-1 if measure == "top1_agreement" else 1) * np.nan_to_num(value.values), strict=True))
    order = sorted((name for name in names if not looks[name].is_floor), key=lambda name: -damage[name])
    rows = [*order, *floor_names(result)]
    ends = drawn_ends(measure, value.values, lower.values, upper.values)
    scale = measure_scale(measure, [value.values], ends[1:] if measure == "logit_kl" else ends)
    figure = rows_figure(len(rows), row=30)
    _add_noise(
        figure,
        floor_span(result, measure, ideal=100.0 if measure == "top1_agreement" else 0.0, factor=factor),
        measure,
        scale,
    )
    for at, name in enumerate(rows):
        points = [np.atleast_1d(part.sel(recipe=name).values) for part in (value, lower, upper)]
        hover = _hovers(looks[name].name, [""], points, measure, [""])
        drawn = (points[0], *drawn_ends(measure, *points))
        figure.add_trace(recipe_points(looks[name], np.array([at]), drawn, hover, scale=scale))
    figure.add_trace(interval_marks(result, bool(lower.notnull().any()), band=False))
    row_axis(figure, [_row_name(name, looks[name].is_floor) for name in rows])
    figure.update_xaxes(title_text=AXES[measure], **scale.axis)
    return finish(figure, title, height=int(figure.layout.height))


def _row_name(name: str, is_floor: bool) -> str:
    return f"noise floor: {name}" if is_floor else name


def _add_noise(figure: go.Figure, span: tuple[float, float] | None, measure: str, scale: Scale) -> None:
    """A band over all rows from no damage to the far end of the noise floors, and what it is in the legend."""
    if span is None:
        return
    low, high = span
    if measure == "logit_kl":
        low, high = 10 ** float(scale.axis["range"][0]), max(high, scale.beyond or 0)  # type: ignore[index]
        if high <= low:
            return
    figure.add_vrect(x0=low, x1=high, fillcolor=FLOOR_FILL, line_width=0, layer="below")
    if measure == "loss_change":
        figure.add_vline(x=0, line={"color": parts.INK, "width": 1})
    square = {"symbol": "square", "size": 12, "color": FLOOR_FILL}
    figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=square, name="no more than noise"))


def loss_by_domain(result: xr.Dataset, *, measure: str = "loss_change", title: str | None = None) -> go.Figure:
    """What each recipe costs at the output, a row for each domain, beside the noise floors.

    Parameters
    ----------
    result : from ``fp8_error.loss_by_domain``: the measure, ``…_lower`` and ``…_upper`` (recipe, domain).
    measure : "loss_change" and "logit_kl" in nats, or "top1_agreement".
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    FigureChoiceError
        For another measure.
    """
    choose("measure", measure, ("loss_change", "logit_kl", "top1_agreement"))
    expect(result, measure, ("recipe", "domain"), f"{measure}_lower", f"{measure}_upper")
    if title is None:
        title = fp8_titles.loss_by_domain(result, measure=measure)
    return rows_by_recipe(result, measure, "domain", axis=AXES[measure], title=title)


def rows_by_recipe(result: xr.Dataset, name: str, dim: str, *, axis: str, title: str) -> go.Figure:
    """A row for each value of ``dim``, with a point in it for each recipe; the most damaged row is at the top."""
    names, groups = recipe_names(result), [str(group) for group in result[dim].values]
    bound_names = [f"{name}_{end}" if f"{name}_{end}" in result else end for end in ("lower", "upper")]
    factor = shares_in_percent(name)
    value, lower, upper = (
        factor * result[key].transpose("recipe", dim).values.astype(float) for key in (name, *bound_names)
    )
    if not np.isfinite(value).any():
        return nothing(title, "Nothing was compared")
    looks = styles(names)
    sign = -1 if name == "top1_agreement" else 1
    own = [not looks[recipe].is_floor for recipe in names]
    damage = np.where(np.isfinite(value), sign * value, -np.inf)[own if any(own) else slice(None)].max(axis=0)
    order = np.argsort(-damage, kind="stable")
    row = max(30, 9 * len(names) + 12)
    ends = drawn_ends(name, value, lower, upper)
    scale = measure_scale(name, [value], ends[1:] if name == "logit_kl" else ends)
    figure = rows_figure(len(groups), row=row)
    if name == "loss_change":
        figure.add_vline(x=0, line={"color": parts.INK, "width": 1})
    drawn = [*floor_names(result), *(recipe for recipe in names if not looks[recipe].is_floor)]
    for place, recipe in enumerate(drawn):
        at = names.index(recipe)
        offset = 0.76 * ((place + 0.5) / len(drawn) - 0.5)
        points, shown = ([part[at, order] for part in (value, *bounded)] for bounded in ((lower, upper), ends))
        notes = np.array(status_notes(result.transpose("recipe", ...), recipe, (len(groups),)), object)[order]
        hover = _hovers(looks[recipe].name, [parts.plain(groups[group]) for group in order], points, name, notes)
        rows = np.arange(len(groups)) + offset
        figure.add_trace(recipe_points(looks[recipe], rows, shown, hover, scale=scale))
    figure.add_traces([legend_line(looks[recipe], line=False) for recipe in drawn])
    figure.add_trace(interval_marks(result, bool(np.isfinite(lower).any()), band=False))
    row_axis(figure, [groups[group] for group in order], title=dim.replace("_", " "))
    figure.update_xaxes(title_text=axis, **scale.axis)
    return finish(figure, title, height=int(figure.layout.height))


def _hovers(
    name: str, groups: Sequence[str], points: Sequence[np.ndarray], measure: str, notes: Sequence[str] | np.ndarray
) -> list[str]:
    form = {"loss_change": "{:+.3g} nat", "logit_kl": "{:.3g} nat"}.get(measure, "{:.3g} %")
    return [
        f"{name}{', ' * bool(group)}{group}<br>"
        + ("not defined" if np.isnan(value) else form.format(value) + bounds(low, high) + note)
        for group, value, low, high, note in zip(groups, *points, notes, strict=True)
    ]
