"""How far FP8 takes the streams of a model from BF16, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import fp8_titles
from probe.attention_figures.parts import expect
from probe.fp8_figures.parts import (
    FLOOR_FILL,
    Scale,
    Style,
    choose,
    finish,
    floor_names,
    legend_line,
    linear_scale,
    log_scale,
    nothing,
    series,
    styles,
    with_kinds,
)
from probe.fp8_titles import recipe_names
from probe.text_view import layer_label

__all__ = ["drift_by_layer"]

MEASURES = {
    "sqnr": "SQNR (dB): further right is closer to BF16",
    "relative_error": "relative error (%), log axis: further left is closer to BF16",
    "cosine": "cosine to BF16: further right is closer",
}

NEGLIGIBLE = {"sqnr": 120.0, "relative_error": 1e-4}
"""Differences of a few last bits in all of a layer: drawn where there is none, so that the others have room."""

NO_DIFFERENCE = {"sqnr": "no<br>difference", "relative_error": "0", "cosine": ""}
BARELY = {"sqnr": "120 dB<br>or more", "relative_error": "0.0001<br>or less"}
MODE_DASHES = {"accumulated": "solid", "isolated": "dot"}
MODE_NAMES = {"accumulated": "accumulated (whole model)", "isolated": "isolated (this part alone)"}


def drift_by_layer(
    drift: xr.Dataset, *, site: str = "residual", measure: str = "sqnr", title: str | None = None
) -> go.Figure:
    """Difference from BF16 by layer, of each recipe and of the noise floors.

    Parameters
    ----------
    drift : ``/fp8_drift``, from ``fp8_error.drift``: ``sqnr``, ``relative_error`` and ``cosine`` (recipe, layer, site,
        mode).
    site : where in the layer, one of those in the data.
    measure : "sqnr" in dB, "relative_error" or "cosine".
    title : drawn above the figure; "" for none, and what is seen in it for None.

    Returns
    -------
    Figure with a solid line for what the whole quantised model brings and a dotted one for this part alone. Grey is
    what BF16 differs by from itself; in the grey area no recipe stands out. Where nothing differs at all a mark stands
    at "no difference" (0 for a relative error), which is no number on the axis. A layer without the site is a gap.

    Raises
    ------
    SchemaError
        If a variable is missing or has other dims.
    FigureChoiceError
        For another site or measure.
    """
    choose("measure", measure, list(MEASURES))
    expect(drift, measure, ("recipe", "layer", "site", "mode"))
    choose("site", site, [str(name) for name in drift["site"].values])
    if title is None:
        title = fp8_titles.drift_by_layer(drift, site=site, measure=measure)
    own = with_kinds(drift).sel(site=site).transpose("recipe", "mode", "layer", ...)
    own = own.isel(layer=own[measure].notnull().any(["recipe", "mode"]).values)
    if not own.sizes["layer"]:
        return nothing(title, f"No layer has a value at the site “{site}”")
    factor = 100.0 if measure == "relative_error" else 1.0
    values = factor * own[measure].astype(float)
    scale = _scale(values.values, measure)
    looks = styles(recipe_names(own))
    figure = go.Figure(list(_noise_area(values, scale)))
    for recipe in [*floor_names(own), *(name for name in looks if not looks[name].is_floor)]:
        for mode in [mode for mode in MODE_DASHES if mode in own["mode"].values.tolist()]:
            found = values.sel(recipe=recipe, mode=mode)
            if found.notnull().any():
                figure.add_traces(list(_line(found, looks[recipe], mode, measure, scale)))
    figure.add_traces([legend_line(_undashed(look)) for look in looks.values()])
    figure.add_traces([_mode_entry(mode) for mode in MODE_DASHES])
    parts.layer_axis(figure, own)
    figure.update_yaxes(title_text=parts.layer_title(own))
    figure.update_xaxes(title_text=MEASURES[measure], **scale.axis)
    return finish(figure, title, height=max(parts.rows_height(own), 200) + 60)


def _scale(values: np.ndarray, measure: str) -> Scale:
    """The axis, with a place for what does not differ, or as good as not."""
    end = NEGLIGIBLE.get(measure, np.inf)
    if measure == "relative_error":
        barely = (values > 0) & (values < end)
        scale = log_scale([np.where(barely, 0, values)])
    else:
        barely = np.isfinite(values) & (values > end)
        scale = linear_scale([np.where(barely, np.inf, values)], beyond_name=NO_DIFFERENCE[measure])
    if not barely.any():
        return scale
    names: list[str] = list(scale.axis["ticktext"])  # type: ignore[call-overload]
    names[names.index(NO_DIFFERENCE[measure])] = BARELY[measure]
    return Scale(scale.axis | {"ticktext": names}, scale.beyond, end)


def _undashed(look: Style) -> Style:
    """A style without its dash, which tells the modes apart here."""
    return Style(look.name, look.colour, look.symbol)


def _line(found: xr.DataArray, look: Style, mode: str, measure: str, scale: Scale) -> Iterator[go.Scatter]:
    there = found.notnull().values
    layers, values = found["layer"].values[there], found.values[there]
    kinds = parts.attention_kinds(found.to_dataset(name="value"))[there]
    hover = [
        f"layer {layer_label(int(layer), kind == 'nope')}, {look.name}, {mode}<br>{_told(float(value), measure)}"
        for layer, kind, value in zip(layers, kinds, values, strict=True)
    ]
    yield from series(_undashed(look), (layers, values), hover, scale=scale, dash=MODE_DASHES[mode])


def _told(value: float, measure: str) -> str:
    if np.isposinf(value) or (measure == "relative_error" and value == 0):
        return "no difference at all"
    if measure == "sqnr":
        return f"SQNR {value:.1f} dB"
    return f"relative error {value:.3g} %" if measure == "relative_error" else f"cosine {value:.6f}"


def _noise_area(values: xr.DataArray, scale: Scale) -> Iterator[go.Scatter]:
    """From the larger of the noise floors to no difference at all, for what accumulates."""
    names = floor_names(values.to_dataset(name="value"))
    if not names or values.sizes["layer"] < 2:
        return
    floors = values.sel(recipe=names, mode="accumulated").transpose("recipe", "layer").values
    low, high = (float(end) for end in scale.axis["range"])  # type: ignore[attr-defined]
    if values.name == "relative_error":
        low, high = 10**low, 10**high
        edge, end = np.nanmax(floors, axis=0), low
        edge = np.maximum(edge, scale.beyond or low)
    else:
        edge, end = np.nanmin(floors, axis=0), min(high, 1.0) if values.name == "cosine" else high
        edge = np.where(scale.is_off(edge), scale.beyond or high, edge)
    layers = values["layer"].values
    known = np.isfinite(edge)
    if known.any():
        yield go.Scatter(
            x=[*edge[known], *np.full(int(known.sum()), end)],
            y=[*layers[known], *layers[known][::-1]],
            mode="lines",
            fill="toself",
            fillcolor=FLOOR_FILL,
            line={"width": 0},
            name="no more than noise",
            hoverinfo="skip",
        )


def _mode_entry(mode: str) -> go.Scatter:
    line = {"color": parts.INK, "width": 2, "dash": MODE_DASHES[mode]}
    return go.Scatter(x=[None], y=[None], mode="lines", name=MODE_NAMES[mode], line=line)
