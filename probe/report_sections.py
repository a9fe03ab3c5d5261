"""The parts of the report's page: what each shows, in words, as a figure and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from markupsafe import Markup

from probe import figures, findings, routing_stats, schema, text_view


@dataclass(frozen=True)
class Table:
    """A table of the page: a heading, column names and rows of text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """One part of the page. ``title`` says what one sees, ``reading`` how to read it, ``definition`` what exactly it is."""

    anchor: str
    title: str
    reading: str
    definition: str
    source: str
    file: str
    figure: Markup | None = None
    tables: list[Table] = field(default_factory=list)


def _figure(figure: go.Figure, label: str) -> Markup:
    """A figure as data for the script, and room for it."""
    data = text_view.script_safe(figure.to_json())
    return Markup(
        '<div class="figure" role="img" aria-label="{}" style="min-height:{}px">'
        "<noscript>Figures need JavaScript; the numbers are in the table below.</noscript>"
        '<script type="application/json">{}</script></div>'
    ).format(label, figure.layout.height, Markup(data))


def _sections(results: Results) -> list[Section]:
    parts = [_load_section(results), _imbalance_section(results)]
    if "specialization" in results:
        parts.append(_domain_section(results))
    if results["margin"]["mean"].notnull().any():
        parts.append(_margin_section(results))
    if results["transition"].sizes["layer"]:
        parts.append(_transition_section(results))
    if results["repetition"]["repetition"].notnull().any():
        parts.append(_repetition_section(results))
    return parts


def _load_section(results: Results) -> Section:
    result = results["load_interval"]
    title = findings.load_title(result)
    return Section(
        "load",
        title,
        "Each row is a layer, each cell an expert: orange took more than an even share of the tokens, blue less. "
        f"{_unsettled(result, 'the interval holds an even share')} ×: no token was seen. {text_view.NOPE_SIGN} marks layers without positions "
        "(NoPE). Click a cell to see its tokens in the text.",
        "Load is an expert's assignments over all assignments of its layer, N_e / (T·k); an even share is 1/E. It counts choices, not gates; the "
        "shared expert is not counted. An unused expert is reported with its bound (rule of three), not as dead.",
        "Jiang et al. 2024 (Mixtral), Fig. 7",
        "load_interval",
        _figure(figures.expert_load(result, title=""), title),
        _layer_by_expert("Load in percent", 100 * result["load"]),
    )


def _imbalance_section(results: Results) -> Section:
    result = results["imbalance"]
    title = findings.imbalance_title(result)
    columns = {
        "MaxVio": "max_violation",
        "from": "max_violation_lower",
        "to": "max_violation_upper",
        "uniform router, below": "max_violation_null_upper",
        "variation": "coefficient_of_variation",
        "Gini": "gini",
        "entropy / ln E": "normalized_entropy",
    }
    return Section(
        "imbalance",
        title,
        "A point far right of the grey bar is a layer whose busiest expert is busier than a perfectly even router would show by "
        "chance with as many tokens; the line is its interval over documents.",
        "MaxVio is the load of the busiest expert over the mean load, minus 1; 0 is perfectly even. Chance: a uniform router and independent tokens, "
        "below the bar's end in 97.5 % of cases. Tokens of one document are not independent, so look at the interval, too.",
        "arXiv 2408.15664, Eq. 4",
        "imbalance",
        _figure(figures.imbalance(result, title=""), title),
        [_by_layer("Imbalance", result, columns)],
    )


def _domain_section(results: Results) -> Section:
    result = results["specialization"]
    cells = findings.specialized_cells(result)
    names = _telling_domains(cells)
    title = findings.specialization_title(cells)
    left_out = result.sizes["domain"] - len(names)
    return Section(
        "domains",
        title,
        "Orange experts take a larger share of this domain's tokens than of all tokens, blue ones a smaller. "
        + _unsettled(
            result, f"the difference may be chance, judged for all {cells.attrs['n_compared']:,} cells at once"
        )
        + " ×: no token of the domain."
        + (f" Drawn are the {len(names)} most distinct domains; {left_out} more are in the table." if left_out else ""),
        "Lift is the share of a domain's assignments that an expert took over its share of all assignments. Intervals resample whole documents; "
        "for the dots they are widened to hold for all cells together (Bonferroni).",
        "OLMoE, arXiv 2409.02060, Eq. 7",
        "specialization",
        _figure(figures.specialization(result, settled=cells["settled"], domains=names, title=""), title),
        [
            table
            for name in names
            for table in _layer_by_expert(f"{name}: share over share overall", result["lift"].sel(domain=name))
        ],
    )


def _unsettled(result: xr.Dataset, meaning: str) -> str:
    """How a figure marks a cell that cannot be told from 1."""
    if result.sizes["expert"] <= figures.DOTTED_EXPERTS:
        return f"A dot: {meaning}."
    return f"Cells without colour: {meaning}."


def _telling_domains(cells: xr.Dataset) -> list[str]:
    """Up to 12 domains that have a token: all, or those with the most settled cells, in their own order."""
    cells = cells.sel(domain=cells["share"].notnull().any(["layer", "expert"]))
    names = cells["domain"].values.astype(object)
    settled = cells["settled"].sum(["layer", "expert"]).values
    best = np.sort(np.argsort(-settled, kind="stable")[: figures.MAX_PANELS])
    return names[best].tolist()


def _margin_section(results: Results) -> Section:
    result = results["margin"]
    title = findings.margin_title(result)
    quantiles = result["margin"].transpose("layer", "quantile").values
    columns = [f"{q:.0%}" for q in routing_stats.MARGIN_QUANTILES]
    rows = [[_layer_name(result, at), *(f"{value:.3f}" for value in row)] for at, row in enumerate(quantiles)]
    return Section(
        "margins",
        title,
        "The dot is the median, the thick bar the middle half and the thin line the middle 90 % of decisions. Decisions near 0 are close "
        "calls: rounding, another kernel or FP8 may flip them.",
        "The margin is the raw logit of the weakest expert chosen minus that of the best not chosen; ties are 0.",
        "taken before the sigmoid, as the router ranks",
        "margin",
        _figure(figures.margin(result, title=""), title),
        [Table("Quantiles of the margin (logits)", ["layer", *columns], rows)],
    )


def _transition_section(results: Results) -> Section:
    result = results["transition"]
    title = findings.transition_title(result)
    figure = figures.transition(result, drawn=findings.enough_expected(result), title="")
    left_out = result.sizes["layer"] - figures.transition_panels(result.sizes["expert"])
    return Section(
        "transitions",
        title,
        "Each panel is one step from a layer (rows) to the next (columns); orange pairs share more tokens than they would if the layers chose "
        f"independently. Grey: fewer than {findings.MIN_EXPECTED} tokens expected."
        + (f" {left_out} more steps are in the table." if left_out > 0 else ""),
        "Lift is P(next expert | expert) over the next expert's share of all tokens, first choices only; 1 is independence. Experts' numbers are "
        "arbitrary in every layer: a diagonal has no meaning.",
        "Yao et al. 2024 (ExFlow), arXiv 2401.08383",
        "transition",
        _figure(figure, title),
    )


def _repetition_section(results: Results) -> Section:
    result = results["repetition"]
    title = findings.repetition_title(result)
    columns = {"same expert": "repetition", "from": "lower", "to": "upper", "independent tokens": "null"}
    return Section(
        "repetition",
        title,
        "A point right of the grey bar: two tokens in a row go to the same expert more often than independent tokens with the same loads would.",
        "Share of neighbouring tokens of a document with the same first choice; the null is the sum of squared shares, not 1/E.",
        "Jiang et al. 2024 (Mixtral), Table 5",
        "repetition",
        _figure(figures.repetition(result, title=""), title),
        [_by_layer("Repetition", result, columns)],
    )


def _layer_name(result: xr.Dataset | xr.DataArray, at: int) -> str:
    kind = schema.labels(result["attention_kind"])[at]
    return text_view.layer_label(int(result["layer"][at]), kind == "nope")


def _by_layer(caption: str, result: xr.Dataset, columns: Mapping[str, str]) -> Table:
    values = np.stack([result[name].values for name in columns.values()], axis=-1)
    rows = [[_layer_name(result, at), *(_number(value) for value in row)] for at, row in enumerate(values)]
    return Table(caption, ["layer", *columns], rows)


def _layer_by_expert(caption: str, values: xr.DataArray) -> list[Table]:
    """One table of layers × experts, or none where it would be too large to read."""
    values = values.transpose("layer", "expert")
    if values.size > LARGEST_TABLE:
        return []
    rows = [[_layer_name(values, at), *(_number(value) for value in row)] for at, row in enumerate(values.values)]
    return [Table(caption, ["layer", *(f"expert {number}" for number in values["expert"].values)], rows)]


def _number(value: float) -> str:
    return "–" if not np.isfinite(value) else f"{value:.3g}"
