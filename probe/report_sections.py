"""The parts of the report's page: what each shows in words, as a figure and as tables."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe import figures, findings, text_view, titles
from probe.bootstrap import MIN_DOCUMENTS
from probe.report_parts import Section, Table, bounded, by_layer, figure_html, layer_by, layer_name
from probe.routing.margins import MARGIN_QUANTILES

Results = dict[str, xr.Dataset]
"""Results of :mod:`probe.routing_stats` by the names of their functions."""


def build(results: Results) -> list[Section]:
    """All sections that the results have something to show for, in the order in which a person asks."""
    sections = [_load(results["load_interval"]), _imbalance(results["imbalance"])]
    if "specialization" in results:
        sections.append(_domains(results["specialization"]))
    if results["mutual_information"]["p_value"].notnull().any():
        sections.append(_information(results["mutual_information"]))
    if results["margin"]["mean"].notnull().any():
        sections.append(_margins(results["margin"]))
    if results["transition"].sizes["layer"]:
        sections += [_transitions(results["transition"]), _paths(results["paths"])]
    if results["repetition"]["repetition"].notnull().any():
        sections.append(_repetition(results["repetition"]))
    return [*sections, _batches(results["distinct_experts"])]


def _load(result: xr.Dataset) -> Section:
    title = titles.load(result)
    return Section(
        anchor="load",
        title=title,
        reading="Each row is a layer, each cell an expert: orange took more than an even share, blue less; the number "
        "is how many times an even share. "
        f"{_unsettled(result, 'the interval holds an even share, or is withheld (hover says why)')} ×: no token was "
        f"seen. {text_view.NOPE_SIGN} marks layers whose attention has no positions (NoPE). Click a cell for all about "
        "its expert.",
        definition="Load is an expert's assignments over all assignments of its layer, N_e / (T·k); an even share is "
        "1/E. It counts choices, not gates; the shared expert is not counted. The interval is Clopper–Pearson for as "
        "many independent choices as the tokens are worth: the bootstrap over documents gives their design effect, "
        f"Student's t allows for few documents. It is withheld below {MIN_DOCUMENTS} documents and where a load rests "
        "on too few of them. An unused expert is reported with its bound (rule of three), not as dead.",
        source="Load: Jiang et al. 2024 (Mixtral), Fig. 7; interval: Korn & Graubard 1998",
        file="load_interval",
        figure=figure_html(figures.expert_load(result, title=""), title),
        tables=layer_by("expert", "Load (%)", 100 * result["load"]),
    )


def _imbalance(result: xr.Dataset) -> Section:
    title = titles.imbalance(result)
    columns = {
        name: (key, f"{key}_lower", f"{key}_upper")
        for name, key in {
            "MaxVio": "max_violation",
            "variation": "coefficient_of_variation",
            "Gini": "gini",
            "entropy / ln E": "normalized_entropy",
        }.items()
    }
    return Section(
        anchor="imbalance",
        title=title,
        reading="A point far right of its grey bar is a layer whose busiest expert is busier than a perfectly even "
        "router would show by chance with as many tokens; the line is the interval over documents.",
        definition="MaxVio is the load of the busiest expert over the mean load, minus 1; 0 is perfectly even. Chance: "
        "a uniform router and independent tokens, below the bar's end in 97.5 % of cases. Tokens of one document are "
        "not independent, so look at the interval, too; it resamples whole documents.",
        source="arXiv 2408.15664, Eq. 4",
        file="imbalance",
        figure=figure_html(figures.imbalance(result, title=""), title),
        tables=[
            by_layer("Imbalance", result, {**columns, "MaxVio of a uniform router, below": "max_violation_null_upper"})
        ],
    )


def _domains(result: xr.Dataset) -> Section:
    cells = findings.specialized_cells(result)
    names = telling_domains(cells)
    title = titles.specialization(cells)
    doubtful = f"the difference may be chance, judged for all {cells.attrs['n_tested']:,} cells at once"
    left_out = result.sizes["domain"] - len(names)
    more = f" Drawn are the {len(names)} most distinct domains; {left_out} more are in the data." if left_out else ""
    tables = [layer_by("expert", f"{name}: lift", result["lift"].sel(domain=name)) for name in names]
    return Section(
        anchor="domains",
        title=title,
        reading="Orange experts take a larger share of this domain's tokens than of all tokens, blue ones a smaller. "
        f"{_unsettled(result, doubtful)} ×: no token of the domain.{more}",
        definition="Lift is the share of a domain's assignments that an expert took over its share of all assignments. "
        f"A cell differs surely if whole documents, their domains exchanged {result.attrs['n_permutations']:,} times, "
        "hardly ever make any cell of all differ as much (permutation, max-T). The intervals in the hover resample "
        "whole documents, with Student's t, and hold for one cell; the sentences above widen them for all cells "
        "(Bonferroni).",
        source="Lift: OLMoE, arXiv 2409.02060, Eq. 7; max-T: Westfall & Young 1993",
        file="specialization",
        figure=figure_html(figures.specialization(result, settled=cells["settled"], domains=names, title=""), title),
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
    columns = [f"{quantile:.0%}" for quantile in MARGIN_QUANTILES]
    names = ("margin", "margin_lower", "margin_upper")
    quantiles = np.stack([result[name].transpose("layer", "quantile").values for name in names], axis=-1)
    rows = [[layer_name(result, at), *(bounded(*cell) for cell in row)] for at, row in enumerate(quantiles)]
    return Section(
        anchor="margins",
        title=title,
        reading="The dot is the median with its interval, the thick bar the middle half and the thin line the middle "
        "90 % of decisions. "
        "Decisions near 0 are close calls: rounding, another kernel or FP8 may flip them.",
        definition="The margin is the raw logit of the weakest expert chosen minus that of the best not chosen; ties "
        "are 0. Llama 4's router ranks raw logits and applies the sigmoid afterwards. "
        "The interval of the median resamples whole documents.",
        source="transformers, models/llama4; interval of a quantile: Woodruff 1952",
        file="margin",
        figure=figure_html(figures.margin(result, title=""), title),
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
        figure=figure_html(figures.transition(result, drawn=findings.enough_expected(result), title=""), title),
    )


def _repetition(result: xr.Dataset) -> Section:
    title = titles.repetition(result)
    columns = {"same expert": ("repetition", "lower", "upper"), "independent tokens": "null"}
    return Section(
        anchor="repetition",
        title=title,
        reading="A point right of its grey bar: two tokens in a row go to the same expert more often than independent "
        "tokens with the same loads would.",
        definition="Share of neighbouring tokens of a document with the same first choice; the null is the sum of "
        "squared shares, not 1/E. The interval resamples whole documents.",
        source="Jiang et al. 2024 (Mixtral), Table 5",
        file="repetition",
        figure=figure_html(figures.repetition(result, title=""), title),
        tables=[by_layer("Repetition", result, columns)],
    )


def _information(result: xr.Dataset) -> Section:
    title = titles.information(result)
    told = findings.tells(result)
    shuffles = dict(zip(result["label"].values.tolist(), result["n_permutations"].values.tolist(), strict=True))
    swapped = f"domains between whole documents ({shuffles['domain']} times), " if "domain" in shuffles else ""
    columns = {
        "normalized": "normalized",
        "null, mean": "null",
        "null, 95 %": "null_upper",
        "information (nat)": "mutual_information",
        "p, all layers (max-T)": "p_value",
        "p, adjusted (Benjamini–Yekutieli)": "p_adjusted",
    }
    return Section(
        anchor="information",
        title=title,
        reading="A point right of its grey bar: the label says more about the expert than permuted labels do; a hollow "
        "point may be chance. Each panel has an axis of its own, for labels of many values share more by chance alone: "
        "compare layers, not panels.",
        definition="Normalized mutual information, 2 I(label; expert) / (H(label) + H(expert)): 0 % if neither says "
        f"anything about the other, 100 % if each fixes the other. Permuted are {swapped}tokens within "
        f"their document ({shuffles['token_id']} times), so that what a document as a whole prefers is no evidence. "
        "p-values hold for all layers at once (max-T); a point is filled if its p-value also holds for all panels "
        "(below 0.05 over their number).",
        source="Cover & Thomas 2006, § 2.3; max-T: Westfall & Young 1993",
        file="mutual_information",
        figure=figure_html(figures.information(result, told=told, title=""), title),
        tables=[
            by_layer(f"Expert and {titles.LABELS.get(str(name), str(name))}", result.sel(label=name), columns)
            for name in shuffles
        ],
    )


def _paths(result: xr.Dataset) -> Section:
    title = titles.paths(result)
    rows = [
        [
            str(int(path["path"])),
            " → ".join(map(str, path["expert"].values)),
            f"{int(path['count']):,}",
            bounded(*(100 * float(path[name]) for name in ("share", "lower", "upper"))),
            f"{100 * float(path['expected']):.2g}",
            titles.rough(float(path["lift"])),
        ]
        for path in (result.isel(path=at) for at in range(result.sizes["path"]))
    ]
    columns = ["rank", "experts", "tokens", "share (%)", "independent layers (%)", "lift"]
    return Section(
        anchor="paths",
        title=title,
        reading="Each row is a way through all MoE layers; a blue point far right of its grey tick is a path that more "
        "tokens take than if the layers chose independently, often since one frequent token finds the same way again.",
        definition="First choices only. Independent layers: the product of the loads of the path's experts. The "
        f"interval resamples whole documents; it is withheld below {MIN_DOCUMENTS} documents, or where a path comes "
        "from too few. These paths were picked because they are common here, so part of their counts is luck.",
        source="Yao et al. 2024 (ExFlow), arXiv 2401.08383",
        file="paths",
        figure=figure_html(figures.paths(result, title=""), title),
        tables=[Table("Most common paths", columns, rows)],
    )


def _batches(result: xr.Dataset) -> Section:
    title = titles.batches(result)
    names = {"unrelated": "distinct", "consecutive": "consecutive"}
    middle = {
        name: np.median(result[key].transpose("layer", "batch_size").values, axis=0) for name, key in names.items()
    }
    rows = [
        [f"{size:,}", *(bounded(float(values[at])) for values in (*middle.values(), result["uniform"].values))]
        for at, size in enumerate(result["batch_size"].values)
    ]
    columns = ["tokens", *names, "uniform router"]
    return Section(
        anchor="batches",
        title=title,
        reading="The lower a line below the dotted one, the fewer experts' weights a server must read for a batch of "
        "so many tokens.",
        definition="Unrelated tokens, such as those of different requests at decode: Σ_e 1 − (1 − p_e)^B, where p_e is "
        "the share of tokens that choose e. Consecutive tokens, such as those of a prefill: the mean over runs of B "
        "tokens of a document. Uniform: E·(1 − (1 − k/E)^B). The band holds every layer's interval, which resamples "
        "whole documents.",
        source="Expected occupancy: Johnson & Kotz 1977, Urn Models",
        file="distinct_experts",
        figure=figure_html(figures.batches(result, title=""), title),
        tables=[Table("Experts touched in the median layer", columns, rows)],
    )
