"""Which part of a model cannot take FP8."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from probe import figure_parts as parts
from probe import fp8_titles, schema
from probe.attention_figures.parts import bounds, expect
from probe.fp8_figures.parts import (
    FLOOR_DASHES,
    FLOOR_FILL,
    ROW_RULE,
    Scale,
    Style,
    choose,
    finish,
    interval_marks,
    nothing,
    recipe_points,
    shares_in_percent,
)
from probe.fp8_figures.rows import AXES, drawn_ends, measure_scale

__all__ = ["sensitivity"]

ALONE = Style("alone in FP8", "#0a6cfe", "circle")
SPARED = Style("the whole recipe without it", "#ec8513", "square-open")
LEFT_OUT = Style("alone in FP8, though the recipe spares it", "#868c97", "x")
WHOLE_LINE = {"color": "#da406a", "width": 2}

KINDS = {"module": "<b>kinds of modules</b>", "layer": "<b>layers</b>"}
GAP = 44


def sensitivity(result: xr.Dataset, *, measure: str = "loss_change", title: str | None = None) -> go.Figure:
    """What each part of a model costs in FP8, and what sparing it saves; the most damaging part at the top.

    Parameters
    ----------
    result : ``/fp8_sensitivity``, from ``fp8_error.sensitivity``: the measure and its bounds (unit, setting),
        ``n_weights`` and ``covered`` (unit).
    measure : "loss_change" and "logit_kl" in nats, or "flip_share".
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Returns
    -------
    Figure with a panel for kinds of modules and one for layers. A filled point is the part alone in FP8, a hollow one
    the whole recipe without it: damage that goes away when it is spared. A line marks the whole recipe, grey lines the
    noise floors, and the grey area what they span with their intervals. Crosses are parts that the recipe leaves in
    BF16. Parts that the model does not have are named and empty.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    FigureChoiceError
        For another measure.
    """
    choose("measure", measure, ("loss_change", "logit_kl", "flip_share"))
    expect(result, measure, ("unit", "setting"), f"{measure}_lower", f"{measure}_upper")
    schema.require(result, "unit_kind", "covered", "n_weights")
    if title is None:
        title = fp8_titles.sensitivity(result, measure=measure)
    keys = [measure, f"{measure}_lower", f"{measure}_upper"]
    numbers = {key: shares_in_percent(measure) * result[key].astype(float) for key in keys}
    own = result.assign(numbers)
    kinds = [kind for kind in KINDS if (own["unit_kind"].values == kind).any()]
    known = own[measure].notnull()
    if not kinds or not bool(known.isel(unit=np.isin(own["unit_kind"].values, kinds)).any()):
        return nothing(title, "No part of the model could be measured")
    ends = drawn_ends(measure, *(own[key].values for key in keys))
    scale = measure_scale(measure, [own[measure].values], ends[1:] if measure == "logit_kl" else ends)
    ordered = {kind: _sorted(own.isel(unit=own["unit_kind"].values == kind), measure) for kind in kinds}
    figure = _panels({kind: part.sizes["unit"] for kind, part in ordered.items()})
    for row, part in enumerate(ordered.values(), start=1):
        _add_reference(figure, own, measure, scale, row=row)
        for at in range(part.sizes["unit"] - 1):
            figure.add_hline(y=at + 0.5, line=ROW_RULE, layer="below", row=row, col=1, exclude_empty_subplots=False)
        for style, setting, chosen in (
            (LEFT_OUT, "alone", ~part["covered"].values),
            (SPARED, "spared", part["covered"].values),
            (ALONE, "alone", part["covered"].values),
        ):
            figure.add_trace(_points(part, measure, style, setting, chosen, scale), row=row, col=1)
        names = _row_names(part)
        figure.update_yaxes(
            range=[len(names) - 0.5, -0.5], tickvals=list(range(len(names))), ticktext=names, row=row, col=1
        )
    _add_legend(figure, own, ordered)
    figure.add_trace(interval_marks(result, bool(own[keys[1]].notnull().any()), band=False), row=1, col=1)
    figure.update_xaxes(**scale.axis, showticklabels=True)
    figure.update_xaxes(title_text=AXES[measure], row=len(kinds), col=1)
    return finish(figure, title, height=int(figure.layout.height))


def _sorted(part: xr.Dataset, measure: str) -> xr.Dataset:
    """Units by their damage alone, those that the recipe does not cover after the others, those without one last."""
    alone = part[measure].sel(setting="alone").values
    missing, covered = np.isnan(alone), part["covered"].values
    return part.isel(unit=np.lexsort((-np.nan_to_num(alone), ~covered, missing)))


def _panels(sizes: dict[str, int]) -> go.Figure:
    """A panel for each kind of units, as high as it has rows; many layers get narrow rows."""
    pixels = [n * (24 if n <= 16 else 15) for n in sizes.values()]
    inner = sum(pixels) + GAP * (len(pixels) - 1)
    figure = make_subplots(
        rows=len(pixels),
        cols=1,
        subplot_titles=[KINDS[kind] for kind in sizes] if len(sizes) > 1 else None,
        shared_xaxes=True,
        row_heights=pixels,
        vertical_spacing=(GAP + 18) / (inner + 18 * (len(pixels) - 1)) if len(pixels) > 1 else 0,
    )
    figure.update_annotations(font_size=13)
    return figure.update_layout(height=inner + 18 * len(pixels) + parts.TEMPLATE.layout.margin.b)


def _row_names(part: xr.Dataset) -> list[str]:
    """Names of the units, with what becomes of those that are not covered or that the model lacks."""
    names = []
    for unit, covered, n_weights in zip(
        part["unit"].values, part["covered"].values, part["n_weights"].values, strict=True
    ):
        note = "" if covered else " (stays BF16)" if n_weights else " (none in this model)"
        names.append(parts.plain(parts.short(str(unit).replace("_", " "))) + note)
    return names


def _points(part: xr.Dataset, measure: str, style: Style, setting: str, chosen: np.ndarray, scale: Scale) -> go.Scatter:
    """One setting of the chosen units; units keep their row."""
    own = part.sel(setting=setting)
    points = [np.where(chosen, own[key].values, np.nan) for key in (measure, f"{measure}_lower", f"{measure}_upper")]
    # Both settings of a row keep clear of each other.
    rows = np.arange(part.sizes["unit"]) + {"spared": 0.16, "alone": -0.16 if style is ALONE else 0}[setting]
    form = {"loss_change": "{:+.3g} nat", "logit_kl": "{:.3g} nat", "flip_share": "{:.3g} %"}[measure]
    hover = [
        f"{parts.plain(str(unit).replace('_', ' '))}: {style.name}<br>{form.format(value)}{bounds(low, high)}"
        f"<br>{int(n):,} weights"
        for unit, value, low, high, n in zip(part["unit"].values, *points, part["n_weights"].values, strict=True)
    ]
    return recipe_points(style, rows, (points[0], *drawn_ends(measure, *points)), hover, scale=scale)


def _floors(own: xr.Dataset) -> xr.Dataset:
    return own.isel(unit=own["unit_kind"].values == "floor").sel(setting="alone")


def _whole(own: xr.Dataset, measure: str) -> float:
    whole = own[measure].isel(unit=own["unit_kind"].values == "whole").sel(setting="alone").values
    return float(whole[0]) if len(whole) else np.nan


def _add_reference(figure: go.Figure, own: xr.Dataset, measure: str, scale: Scale, *, row: int) -> None:
    """The noise floors and their intervals, and the whole recipe, as lines over all rows of a panel."""
    floors = _floors(own)
    # The panel has no trace yet.
    place = {"row": row, "col": 1, "exclude_empty_subplots": False}
    ends = np.concatenate([floors[key].values for key in (measure, f"{measure}_lower", f"{measure}_upper")])
    ends = ends[np.isfinite(ends)]
    is_log = scale.is_log
    if ends.size:
        low, high = min(0.0, float(ends.min())), max(0.0, float(ends.max()))
        if is_log:
            low = 10 ** float(scale.axis["range"][0])  # type: ignore[index]
        if high > low:
            figure.add_vrect(x0=low, x1=high, fillcolor=FLOOR_FILL, line_width=0, layer="below", **place)
    for unit, value in zip(floors["unit"].values, floors[measure].values, strict=True):
        if np.isfinite(at := _at(float(value), scale)):
            line = {"color": parts.INK, "width": 1.2, "dash": FLOOR_DASHES.get(str(unit), "dot")}
            figure.add_vline(x=at, line=line, layer="below", **place)
    if np.isfinite(at := _at(_whole(own, measure), scale)):
        figure.add_vline(x=at, line=WHOLE_LINE, layer="below", **place)


def _at(value: float, scale: Scale) -> float:
    """Where a number stands on an axis."""
    return np.nan if np.isnan(value) else scale.beyond or np.nan if scale.is_off(np.array(value)) else value


def _add_legend(figure: go.Figure, own: xr.Dataset, ordered: dict[str, xr.Dataset]) -> None:
    covered = np.concatenate([part["covered"].values for part in ordered.values()])
    tried = np.concatenate([(part["n_weights"] > 0).values for part in ordered.values()])
    looks = [ALONE, SPARED] if covered.any() else []
    looks += [LEFT_OUT] if (~covered & tried).any() else []
    for look in looks:
        marker = {"color": look.colour, "symbol": look.symbol, "size": 8}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=look.name), row=1, col=1)
    lines = {f"noise floor: {name}": {"color": parts.INK, "width": 1.2, "dash": FLOOR_DASHES.get(name, "dot")}
             for name in map(str, own["unit"].values[own["unit_kind"].values == "floor"])}  # fmt: skip
    if (own["unit_kind"].values == "whole").any():
        lines = {"the whole recipe": WHOLE_LINE} | lines
    for name, line in lines.items():
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="lines", line=line, name=name), row=1, col=1)
