"""The parts of the report's page: what each shows in words, as a figure and as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from markupsafe import Markup

from probe import figures, findings, routing_stats, schema, text_view, titles

Results = dict[str, xr.Dataset]
"""Results of :mod:`probe.routing_stats` by the names of their functions."""

LARGEST_TABLE = 4_000
"""Cells of a table in the page; larger ones are only in ``tables/``."""


@dataclass(frozen=True)
class Table:
    """A table of the page: a heading, column names and rows of text."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """One part of the page.

    ``title`` says what one sees, ``reading`` how to read it, ``definition`` what exactly it is and ``source`` where
    that comes from; ``file`` names the table in ``tables/``.
    """

    anchor: str
    title: str
    reading: str
    definition: str
    source: str
    file: str
    figure: Markup
    tables: list[Table] = field(default_factory=list)


def build(results: Results) -> list[Section]:
    """All sections that the results have something to show for, in the order in which a person asks."""
    sections = [_load(results["load_interval"]), _imbalance(results["imbalance"])]
    if "specialization" in results:
        sections.append(_domains(results["specialization"]))
    if results["margin"]["mean"].notnull().any():
        sections.append(_margins(results["margin"]))
    if results["transition"].sizes["layer"]:
        sections.append(_transitions(results["transition"]))
    if results["repetition"]["repetition"].notnull().any():
        sections.append(_repetition(results["repetition"]))
    return sections


def _load(result: xr.Dataset) -> Section:
    title = titles.load(result)
    return Section(
        anchor="load",
        title=title,
        reading="Each row is a layer, each cell an expert: orange took more than an even share, blue less. "
        f"{_unsettled(result, 'the interval holds an even share')} ×: no token was seen. {text_view.NOPE_SIGN} marks "
        "layers whose attention has no positions (NoPE). Click a cell to see its tokens in the text.",
        definition="Load is an expert's assignments over all assignments of its layer, N_e / (T·k); an even share is "
        "1/E. It counts choices, not gates; the shared expert is not counted. An unused expert is reported with "
        "its bound (rule of three), not as dead.",
        source="Jiang et al. 2024 (Mixtral), Fig. 7",
        file="load_interval",
        figure=_figure(figures.expert_load(result, title=""), title),
        tables=_layer_by_expert("Load (%)", 100 * result["load"]),
    )


def _imbalance(result: xr.Dataset) -> Section:
    title = titles.imbalance(result)
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
        anchor="imbalance",
        title=title,
        reading="A point far right of its grey bar is a layer whose busiest expert is busier than a perfectly even "
        "router would show by chance with as many tokens; the line is the interval over documents.",
        definition="MaxVio is the load of the busiest expert over the mean load, minus 1; 0 is perfectly even. Chance: "
        "a uniform router and independent tokens, below the bar's end in 97.5 % of cases. Tokens of one document are "
        "not independent, so look at the interval, too.",
        source="arXiv 2408.15664, Eq. 4",
        file="imbalance",
        figure=_figure(figures.imbalance(result, title=""), title),
        tables=[_by_layer("Imbalance", result, columns)],
    )


def _domains(result: xr.Dataset) -> Section:
    cells = findings.specialized_cells(result)
    names = telling_domains(cells)
    title = titles.specialization(cells)
    doubtful = f"the difference may be chance, judged for all {cells.attrs['n_compared']:,} cells at once"
    left_out = result.sizes["domain"] - len(names)
    more = f" Drawn are the {len(names)} most distinct domains; {left_out} more are in the data." if left_out else ""
    tables = [_layer_by_expert(f"{name}: lift", result["lift"].sel(domain=name)) for name in names]
    return Section(
        anchor="domains",
        title=title,
        reading="Orange experts take a larger share of this domain's tokens than of all tokens, blue ones a smaller. "
        f"{_unsettled(result, doubtful)} ×: no token of the domain.{more}",
        definition="Lift is the share of a domain's assignments that an expert took over its share of all assignments. "
        "Intervals resample whole documents; to judge all cells together they are widened (Bonferroni).",
        source="OLMoE, arXiv 2409.02060, Eq. 7",
        file="specialization",
        figure=_figure(figures.specialization(result, settled=cells["settled"], domains=names, title=""), title),
        tables=[table for found in tables for table in found],
    )


def telling_domains(cells: xr.Dataset) -> list[str]:
    """Up to 12 domains that have a token: all, or those with the most settled cells, in their own order.

    ``cells`` come from ``findings.specialized_cells``.
    """
    cells = cells.sel(domain=cells["share"].notnull().any(["layer", "expert"]))
    settled = cells["settled"].sum(["layer", "expert"]).values
    best = np.sort(np.argsort(-settled, kind="stable")[: figures.MAX_PANELS])
    return [str(name) for name in cells["domain"].values[best]]


def _unsettled(result: xr.Dataset, meaning: str) -> str:
    """How a figure marks a cell that cannot be told from 1."""
    sign = "A dot" if result.sizes["expert"] <= figures.DOTTED_EXPERTS else "A cell without colour"
    return f"{sign}: {meaning}."


def _margins(result: xr.Dataset) -> Section:
    title = titles.margin(result)
    quantiles = result["margin"].transpose("layer", "quantile").values
    columns = [f"{quantile:.0%}" for quantile in routing_stats.MARGIN_QUANTILES]
    rows = [[layer_name(result, at), *map(_number, row)] for at, row in enumerate(quantiles)]
    return Section(
        anchor="margins",
        title=title,
        reading="The dot is the median, the thick bar the middle half and the thin line the middle 90 % of decisions. "
        "Decisions near 0 are close calls: rounding, another kernel or FP8 may flip them.",
        definition="The margin is the raw logit of the weakest expert chosen minus that of the best not chosen; ties "
        "are 0. Llama 4's router ranks raw logits and applies the sigmoid afterwards.",
        source="transformers, models/llama4",
        file="margin",
        figure=_figure(figures.margin(result, title=""), title),
        tables=[Table("Quantiles of the margin (logits)", ["layer", *columns], rows)],
    )


def _transitions(result: xr.Dataset) -> Section:
    title = titles.transition(result)
    left_out = result.sizes["layer"] - figures.transition_panels(result.sizes["expert"])
    more = f" {left_out} more steps are in the data." if left_out > 0 else ""
    return Section(
        anchor="transitions",
        title=title,
        reading="Each panel is one step from a layer (rows) to the next (columns); orange pairs share more tokens "
        "than they would if the layers chose independently. Grey: fewer than "
        f"{findings.MIN_EXPECTED} tokens expected.{more}",
        definition="Lift is P(next expert | expert) over the next expert's share of all tokens, first choices only; 1 "
        "is independence. Experts' numbers are arbitrary in every layer: a diagonal has no meaning.",
        source="Yao et al. 2024 (ExFlow), arXiv 2401.08383",
        file="transition",
        figure=_figure(figures.transition(result, drawn=findings.enough_expected(result), title=""), title),
    )


def _repetition(result: xr.Dataset) -> Section:
    title = titles.repetition(result)
    columns = {"same expert": "repetition", "from": "lower", "to": "upper", "independent tokens": "null"}
    return Section(
        anchor="repetition",
        title=title,
        reading="A point right of its grey bar: two tokens in a row go to the same expert more often than independent "
        "tokens with the same loads would.",
        definition="Share of neighbouring tokens of a document with the same first choice; the null is the sum of "
        "squared shares, not 1/E.",
        source="Jiang et al. 2024 (Mixtral), Table 5",
        file="repetition",
        figure=_figure(figures.repetition(result, title=""), title),
        tables=[_by_layer("Repetition", result, columns)],
    )


def _figure(figure: go.Figure, label: str) -> Markup:
    """A figure as data for the page's script, and room for it."""
    html = (
        '<div class="figure" role="img" aria-label="{}" style="min-height:{}px">'
        "<noscript>Figures need JavaScript; the numbers are in the data below.</noscript>"
        '<script type="application/json">{}</script></div>'
    )
    return Markup(html).format(label, figure.layout.height, Markup(text_view.script_safe(figure.to_json())))


def layer_name(result: xr.Dataset | xr.DataArray, at: int) -> str:
    """The layer at a position of a result, with the sign of a NoPE layer."""
    kind = schema.labels(result["attention_kind"])[at]
    return text_view.layer_label(int(result["layer"][at]), kind == "nope")


def _by_layer(caption: str, result: xr.Dataset, columns: Mapping[str, str]) -> Table:
    values = np.stack([result[name].values for name in columns.values()], axis=-1)
    rows = [[layer_name(result, at), *map(_number, row)] for at, row in enumerate(values)]
    return Table(caption, ["layer", *columns], rows)


def _layer_by_expert(caption: str, values: xr.DataArray) -> list[Table]:
    """One table of layers × experts, or none where it would be too large to read."""
    values = values.transpose("layer", "expert")
    if values.size > LARGEST_TABLE:
        return []
    rows = [[layer_name(values, at), *map(_number, row)] for at, row in enumerate(values.values)]
    return [Table(caption, ["layer \\ expert", *map(str, values["expert"].values)], rows)]


def _number(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "–"
