"""Figures of experiments: temperature tuning along the text, and needles by depth and length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from probe import figure_parts as parts
from probe import schema
from probe.attention_figures.parts import (
    add_borders,
    band,
    bounds,
    colour_magnitudes,
    expect,
    finish_lines,
    largest,
    span,
    stacked_panels,
    words,
)
from probe.schema import ProbeError
from probe.text_view import layer_label

_SCALE_STYLES = (("#9a5fb5", "dash"), ("#2c9991", "dashdot"), ("#b8567c", "longdash"))
"""Colour and dash of scales other than 0 and 1."""

_NEEDLE_NAMES = {
    "is_found": "trials found",
    "copying_score": "copying score",
    "needle_mass": "mass on the needle",
    "key_rank": "rank of the needle's key",
    "answer_rank": "rank of the answer",
    "answer_loss": "loss of the answer (nat)",
    "needle_loss": "loss in the needle (nat)",
}
"""Statistics of a needle experiment, as people write them."""


def temperature(result: xr.Dataset, *, title: str = "What temperature tuning does along the text") -> go.Figure:
    """Temperature factor, entropy, far mass and loss by position, one line for each scale, in panels over each other.

    Parameters
    ----------
    result : from ``experiments.temperature``: ``factor`` (scale, position) and, where there, ``entropy``, ``far_mass``,
        ``loss`` and ``loss_change`` (scale, position_bin), each with ``…_lower`` and ``…_upper``.
    title : drawn above the figure; "" for none.

    Raises
    ------
    SchemaError
        If ``factor`` is missing or has other dims.
    """
    expect(result, "factor", ("scale", "position"))
    units = {"entropy": "nat", "far_mass": "", "loss": "nat", "loss_change": "nat"}
    headings = {
        "factor": "factor on the queries of NoPE layers",
        "entropy": "entropy in NoPE layers",
        "far_mass": "mass on keys before the query's chunk, NoPE layers",
        "loss": "loss of the next token",
        "loss_change": "loss minus that at scale 1",
    }
    names = [name for name in units if name in result and result[name].notnull().any()]
    figure = stacked_panels([f"<b>{headings[name]}</b>" for name in ("factor", *names)])
    scales = result["scale"].values
    position = result["position"].values
    for at, scale in enumerate(scales):
        colour, dash = _scale_look(scales.tolist(), at)
        style = {"name": _scale_name(float(scale)), "legendgroup": str(scale)}
        factor = result["factor"].transpose("scale", "position").values[at]
        steps = np.union1d(np.flatnonzero(np.diff(factor)) + 1, [0, len(factor) - 1])
        figure.add_trace(
            go.Scatter(
                x=position[steps],
                y=factor[steps],
                mode="lines",
                line={"color": colour, "dash": dash, "width": 2, "shape": "hv"},
                hovertemplate=f"{style['name']}<br>from position %{{x:,}}: factor %{{y:.4f}}<extra></extra>",
                **style,
            ),
            row=1,
            col=1,
        )
        for row, name in enumerate(names, start=2):
            for trace in _scale_lines(result.isel(scale=at), name, units[name], (colour, dash), style):
                figure.add_trace(trace, row=row, col=1)
    chunk_size = result.attrs.get("chunk_size")
    add_borders(figure, len(position), chunk_size)
    figure.update_yaxes(showgrid=True, gridcolor=parts.GRID_COLOUR)
    for row, name in enumerate(("factor", *names), start=1):
        figure.update_yaxes(
            title_text={"factor": "factor", "far_mass": "mass"}.get(name) or units[name], row=row, col=1
        )
    figure.update_xaxes(range=[-0.5, len(position) - 0.5])
    figure.update_xaxes(title_text="position in the text (token)", row=len(names) + 1, col=1)
    return finish_lines(figure, result, title, height=figure.layout.height + 30, top=94)


def _scale_name(scale: float) -> str:
    return {0.0: "tuning off", 1.0: "tuning as trained"}.get(scale, f"tuning × {scale:g}")


def _scale_look(scales: Sequence[float], at: int) -> tuple[str, str]:
    """Colour and dash of a scale: that of NoPE layers is for the model as it was trained."""
    if scales[at] == 1:
        return parts.KIND_COLOURS["nope"], "solid"
    if scales[at] == 0:
        return parts.INK, "dot"
    others = [scale for scale in scales if scale not in (0, 1)]
    return _SCALE_STYLES[others.index(scales[at]) % len(_SCALE_STYLES)]


def _scale_lines(
    own: xr.Dataset, name: str, unit: str, look: tuple[str, str], style: dict[str, str]
) -> Iterator[go.Scatter]:
    """Band and line of one variable (position_bin) at one scale."""
    start, stop = own["position_bin"].values, own["bin_stop"].values
    middle = (start + stop - 1) / 2
    value = own[name].values
    lower, upper = (own[f"{name}_{bound}"].values for bound in ("lower", "upper"))
    hover = [
        f"{style['name']}, {span(first, last)}<br>{words(name)} {number:.4g} {unit}{bounds(low, high)}"
        for first, last, number, low, high in zip(start, stop, value, lower, upper, strict=True)
    ]
    yield band(middle, lower, upper, colour=look[0], group=style["legendgroup"])
    yield go.Scatter(
        x=middle,
        y=value,
        mode="lines" if len(middle) > 1 else "markers",
        line={"color": look[0], "dash": look[1], "width": 2},
        showlegend=False,
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        **style,
    )


def needle(
    result: xr.Dataset, *, statistic: str = "is_found", title: str = "Is the needle found, by depth and length?"
) -> go.Figure:
    """Heatmap of what a needle experiment found, by the needle's depth and the text's length.

    Parameters
    ----------
    result : from ``experiments.needle``: the statistic (length, depth), or (length, depth, layer, head).
    statistic : "is_found", "answer_rank" or "answer_loss"; of the head that copies best, "copying_score",
        "needle_mass" or "key_rank".
    title : drawn above the figure; "" for none.

    Returns
    -------
    Figure with a needle at a text's start at the top. A statistic of heads is that of one head everywhere: the one with
    the highest mean ``copying_score``, named beside the x axis.

    Raises
    ------
    SchemaError
        If the statistic or its dims are not there.
    ProbeError
        For a statistic that is none of these.
    """
    if statistic not in _NEEDLE_NAMES:
        raise ProbeError(f"statistic is {statistic!r}: choose one of {', '.join(_NEEDLE_NAMES)}")
    schema.require(result, statistic)
    label, chosen, shown_head = _NEEDLE_NAMES[statistic], result[statistic], ""
    if {"layer", "head"} <= set(chosen.dims):
        best = _best_head(result, statistic)
        kind = schema.labels(result["attention_kind"])[best["layer"]] if "attention_kind" in result else ""
        name = layer_label(int(result["layer"][best["layer"]]), kind == "nope")
        shown_head = f"; layer {name}, head {int(result['head'][best['head']])}"
        chosen = chosen.isel(best)
    expect(chosen.to_dataset(name=statistic), statistic, ("length", "depth"))
    values = chosen.transpose("depth", "length").values.astype(float)
    lengths, depths = result["length"].values, result["depth"].values
    is_share = statistic in ("is_found", "copying_score", "needle_mass")
    form = "{:.0%}" if statistic == "is_found" else "{:.2f}" if is_share else "{:.3g}"
    roomy = len(lengths) <= parts.NUMBERED_EXPERTS
    text = parts.strings(lambda value: "" if np.isnan(value) or not roomy else form.format(value), values)
    length, depth = np.meshgrid(lengths, depths)
    hover = parts.strings(
        lambda length, depth, value: (
            f"{length:,} tokens, needle after {100 * depth:.3g} % of the filler<br>{label}{shown_head}: "
            + ("not defined" if np.isnan(value) else form.format(value))
        ),
        length,
        depth,
        values,
    )
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=np.arange(len(lengths)),
            y=np.arange(len(depths)),
            text=text,
            texttemplate="%{text}",
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=True,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
        )
    )
    step = -(-len(lengths) // 12)
    figure.update_layout(height=max(30 * len(depths), 150) + 90, plot_bgcolor=parts.MISSING_COLOUR)
    colour_magnitudes(figure, 0, 1 if is_share else largest(values), title=label)
    if statistic == "is_found":
        figure.update_layout(coloraxis_colorbar_tickformat=".0%")
    figure.update_xaxes(
        title_text=f"length of the text (tokens){shown_head}",
        tickvals=np.arange(len(lengths))[::step].tolist(),
        ticktext=[f"{length:,}" for length in lengths[::step]],
        showgrid=False,
    )
    figure.update_yaxes(
        title_text="depth (% of the filler)",
        tickvals=np.arange(len(depths)).tolist(),
        ticktext=[f"{100 * depth:.3g}" for depth in depths],
        range=[len(depths) - 0.5, -0.5],
    )
    return parts.finish(figure, title, height=figure.layout.height, top=16)


def _best_head(result: xr.Dataset, statistic: str) -> dict[str, int]:
    """Place of the head that copies best on average over lengths and depths; 0 counts where none does."""
    schema.require(result, "copying_score")
    score = result["copying_score"].mean(["length", "depth"]).transpose("layer", "head").values
    row, column = np.unravel_index(int(np.argmax(np.nan_to_num(score))), score.shape)
    return {"layer": int(row), "head": int(column)}
