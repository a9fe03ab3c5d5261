"""The report's part on FP8: what each section shows in words, as a figure and as tables.

A recording without an FP8 study has no such part. A study that left something out has all sections, and a section says
what it lacks and how to get it. What is claimed, and what is not, is decided in :mod:`probe.fp8_findings`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import xarray as xr
from markupsafe import Markup

from probe import fp8_figures, fp8_findings, schema
from probe import fp8_titles as titles
from probe.bootstrap import MIN_DOCUMENTS
from probe.findings import counted, digits
from probe.fp8 import flips
from probe.fp8_findings import SINGLE_EXPERT, of_unit, ratio_of_experts, typical
from probe.fp8_titles import FLOORS, Estimate, estimate, recipe_names
from probe.report_parts import Section, Table, bounded, figure_html, layer_name, missing_html, number

Results = Mapping[str, xr.Dataset]

FUNCTIONS = {
    "fp8_flips": "flip_share",
    "fp8_flips_by_layer": "flip_share",
    "fp8_flips_by_domain": "flip_share",
    "fp8_flips_by_margin": "flips_by_margin",
    "fp8_loss": "loss_change",
    "fp8_loss_by_domain": "loss_by_domain",
    "fp8_drift": "drift",
    "fp8_sensitivity": "sensitivity",
    "fp8_weights": "weight_error",
    "fp8_head": "weight_error",
    "fp8_activations": "activation_range",
}
"""Every result about FP8 that a report may hold, with the function of ``fp8_error`` that made it."""


# --- what is computed -------------------------------------------------------------------------------------------------


def plan(recording: xr.DataTree) -> dict[str, Callable[[], xr.Dataset]]:
    """What the report computes of FP8, by name; nothing for a recording without a study."""
    there = recording.children
    steps: dict[str, Callable[[], xr.Dataset]] = {}
    if "fp8_drift" in there:
        steps["fp8_flips"] = partial(flips.flip_share, recording, pooled=True)
        steps["fp8_flips_by_layer"] = partial(flips.flip_share, recording)
        if schema.group(recording, "fp8_flips")["router_margin"].notnull().any():
            steps["fp8_flips_by_margin"] = partial(flips.flips_by_margin, recording)
        steps["fp8_loss"] = partial(flips.loss_change, recording)
        if len(set(schema.group(recording, "fp8_samples")["domain"].values.tolist())) > 1:
            steps["fp8_flips_by_domain"] = partial(flips.flip_share, recording, by="domain", pooled=True)
            steps["fp8_loss_by_domain"] = partial(flips.loss_by_domain, recording)
        steps["fp8_drift"] = partial(_group, recording, "fp8_drift", ("sqnr", "relative_error", "cosine"))
    for name in ("fp8_sensitivity", "fp8_activations"):
        if name in there:
            steps[name] = partial(_group, recording, name)
    if "fp8_weights" in there:
        weights = schema.group(recording, "fp8_weights")
        head = [str(name) for name in weights.data_vars if str(name).startswith("head_")]
        steps["fp8_weights"] = partial(
            _group, recording, "fp8_weights", [n for n in weights.data_vars if n not in head]
        )
        if head:
            steps["fp8_head"] = partial(_group, recording, "fp8_weights", head)
    return steps


def _group(recording: xr.DataTree, name: str, variables: Sequence[Any] | None = None) -> xr.Dataset:
    data = schema.group(recording, name)
    return (data if variables is None else data[list(variables)]).load()


def summarize(recording: xr.DataTree, results: Results) -> dict[str, Any] | None:
    """What a program wants to know of the FP8 study; None for a recording without one."""
    if not any(name in recording.children for name in schema.FP8_GROUPS):
        return None
    summary: dict[str, Any] = {"recipes": recipes_of(recording)}
    if "fp8_samples" in recording.children:
        samples = schema.group(recording, "fp8_samples")
        cut = samples["n_cut"].values
        summary |= {
            "documents": samples.sizes["sample"],
            "documents_given": samples.attrs.get("documents_given"),
            "tokens": int(samples["n_tokens"].sum()),
            "domains": len(set(samples["domain"].values.tolist())),
            "documents_cut": int((cut > 0).sum()),
            "tokens_cut": int(cut.sum()),
            "layers": recording["fp8_drift"].sizes["layer"],
        }
    if "fp8_flips" in results:
        summary["flip_share"] = _by_recipe(results["fp8_flips"], "flip_share")
        for name in ("loss_change", "logit_kl", "top1_agreement"):
            summary[name] = _by_recipe(results["fp8_loss"], name)
    if "fp8_sensitivity" in results:
        summary["spare"] = [part._asdict() for part in fp8_findings.worth_sparing(results["fp8_sensitivity"])]
    return summary


def _by_recipe(result: xr.Dataset, name: str) -> dict[str, dict[str, float]]:
    return {str(recipe): estimate(result.sel(recipe=recipe), name)._asdict() for recipe in result["recipe"].values}


def recipes_of(recording: xr.DataTree) -> list[str]:
    """Names of the recipes of a study, without the noise floors."""
    found = chain.from_iterable(
        schema.group(recording, name)["recipe"].values.tolist()
        for name in ("fp8_drift", "fp8_weights", "fp8_activations")
        if name in recording.children
    )
    return list(dict.fromkeys(str(name) for name in found if name not in FLOORS))


def described(recording: xr.DataTree) -> list[tuple[str, str]]:
    """Names of the recipes of a study, and what each is."""
    known = json.loads(str(recording.attrs.get("recipes", "{}")))
    return [(name, str(known.get(name, {}).get("description", ""))) for name in recipes_of(recording)]


def overview(summary: Mapping[str, Any]) -> str:
    """What was tried, for the first line of the page."""
    what = f"FP8: {', '.join(summary['recipes'])}" if summary["recipes"] else "FP8"
    if "tokens" not in summary:
        return what
    documents = counted(summary["documents"], "document")
    if (given := summary["documents_given"]) and given > summary["documents"]:
        documents = f"{summary['documents']:,} of {counted(given, 'document')}"
    domains = f" in {summary['domains']} domains" if summary["domains"] > 1 else ""
    return f"{what}, on {counted(summary['tokens'], 'token')} of {documents}{domains}"


# --- sections ---------------------------------------------------------------------------------------------------------


def build(recording: xr.DataTree, results: Results) -> list[Section]:
    """The sections on FP8, in the order in which a person asks; none for a recording without a study."""
    if not any(name in recording.children for name in schema.FP8_GROUPS):
        return []
    sections = [_flips(results), _margins(results), _output(results), _drift(results)]
    sections.append(_sensitivity(results.get("fp8_sensitivity")))
    sections.append(_weights(results))
    return [*sections, _activations(results.get("fp8_activations"))]


def _flips(results: Results) -> Section:
    anchor = "fp8"
    if "fp8_flips" not in results:
        return _missing(anchor, "Whether FP8 flips the routing was not measured", "probe.fp8_error.drift(model, texts)")
    whole, layers, domains = (results.get(f"fp8_flips{by}") for by in ("", "_by_layer", "_by_domain"))
    assert whole is not None and layers is not None
    figures = [figure_html(fp8_figures.flips_by_layer(layers, title=""), titles.flips_by_layer(layers))]
    tables = [
        Table("Decisions that flip (%), all layers", ["recipe", "flips"], _recipe_rows(whole, {"flip_share": 100})),
        Table("By layer (%)", ["layer", *recipe_names(layers)], _layer_rows(layers, "flip_share", scale=100)),
    ]
    if domains is not None:
        figures.append(_caption("By domain, all layers together"))
        figures.append(figure_html(fp8_figures.flips_by_domain(domains, title=""), titles.flips_by_domain(domains)))
        columns = ["domain", *recipe_names(domains)]
        tables.append(Table("By domain (%)", columns, _domain_rows(domains, "flip_share", scale=100)))
    return Section(
        anchor=anchor,
        title=fp8_findings.answer(whole),
        reading="Each point is the share of tokens that a layer sends to other experts than the same model in BF16 "
        "does. Grey are the noise floors: BF16 with other kernels, texts one by one (bf16), and float32 (fp32). A "
        "recipe that is not right of both changes no more than what nobody would call another model; layers before the "
        f"first that a recipe rounds cannot flip.{_too_few(whole)}",
        definition="A decision is a token in a mixture-of-experts layer; it flips if the set of chosen experts "
        "differs. The quantised model runs as a whole, so that early errors carry on. A recipe stands out where its "
        "interval does not meet that of the larger floor. Intervals resample whole documents. It does not say that a "
        "flip does harm: experts may be alike, and a close call may go either way without cost; see the output below.",
        source="Interval of a share: Korn & Graubard 1998",
        file="fp8_flips_by_layer",
        more_files=["fp8_flips", *(["fp8_flips_by_domain"] if domains is not None else [])],
        figure=Markup("").join(figures),
        tables=tables,
    )


def _margins(results: Results) -> Section:
    anchor = "fp8-margins"
    result = results.get("fp8_flips_by_margin")
    if result is None:
        why = "Margins are there where flips were measured, and a token has experts left that it does not choose."
        return _missing(anchor, "Flips cannot be told by margin", "probe.fp8_error.drift(model, texts)", why=why)
    rows = []
    for at in np.flatnonzero(result["n_decisions"].values):
        own = result.isel(margin_bin=int(at))
        edges = f"{float(own['margin_from']):.3g}–{float(own['margin_to']):.3g}"
        cells = [
            f"{_cell(of_recipe, 'flip_share', 100)}; {number(100 * float(of_recipe['predicted']))}"
            for of_recipe in (own.isel(recipe=which) for which in range(own.sizes["recipe"]))
        ]
        rows.append([edges, f"{int(own['n_decisions']):,}", *cells])
    noise = ", ".join(
        f"{name} {digits(float(result['logit_noise'].sel(recipe=name)))}" for name in map(str, result["recipe"].values)
    )
    return Section(
        anchor=anchor,
        title=titles.flips_by_margin(result),
        reading="The margin is how much the chosen expert's logit exceeded the next one's in BF16: decisions near 0 "
        "were close calls. The dotted lines are what noise of the measured size, equal for all tokens, would flip: "
        "where points run flatter than they do, a few tokens err far more than the others.",
        definition="P(flip) = ½·erfc(m / 2σ) for two logits with independent errors N(0, σ²), averaged over the bin; σ "
        f"is the standard deviation of the measured change of margins over √2, in logits: {noise}. Margins are of the "
        "BF16 reference, all layers together. It leaves out that a third expert may be lifted over both, that errors "
        "are larger for some tokens than for others, and that σ is measured on the same texts.",
        source="transformers, models/llama4: the router ranks raw logits",
        file="fp8_flips_by_margin",
        figure=figure_html(fp8_figures.flips_by_margin(result, title=""), titles.flips_by_margin(result)),
        tables=[Table("Flips (%); predicted (%)", ["margin (logits)", "decisions", *recipe_names(result)], rows)],
    )


def _output(results: Results) -> Section:
    anchor = "fp8-output"
    result, domains = results.get("fp8_loss"), results.get("fp8_loss_by_domain")
    if result is None:
        return _missing(anchor, "What FP8 does to the output was not measured", "probe.fp8_error.drift(model, texts)")
    if not bool(result["logit_kl"].notnull().any()):
        why = "The model has no output head."
        remedy = "A model loaded with its head (Llama4ForCausalLM)"
        return _missing(anchor, "What FP8 does to the output is not known", remedy, why=why)
    measures = {"logit_kl": "KL (nat)", "loss_change": "change of the loss (nat)", "top1_agreement": "agreement (%)"}
    scales = {"logit_kl": 1.0, "loss_change": 1.0, "top1_agreement": 100.0}
    tables = [Table("All texts", ["recipe", *measures.values()], _recipe_rows(result, scales))]
    draw = fp8_figures.loss_change if domains is None else fp8_figures.loss_by_domain
    figures = []
    for name in ("logit_kl", "loss_change"):
        drawn = draw(result if domains is None else domains, measure=name, title="")
        figures += [_caption(f"{measures[name][0].upper()}{measures[name][1:]}"), figure_html(drawn, measures[name])]
    if domains is not None:
        tables += [
            Table(
                f"By domain: {told}",
                ["domain", *recipe_names(domains)],
                _domain_rows(domains, name, scale=scales[name]),
            )
            for name, told in measures.items()
        ]
    shown = "each domain" if domains is not None else "all texts"
    reading = (
        f"How far the next token's probabilities move from BF16's (KL) and what that does to the loss, for {shown}. "
        "What lies in grey is noise of BF16 itself, a loss that falls as well as one that rises."
        f"{_too_few(result)}"
    )
    return Section(
        anchor=anchor,
        title=fp8_findings.output(result),
        reading=reading,
        definition="KL(BF16 ‖ FP8) of the next token's distribution; the change of the cross entropy of the token that "
        "came; agreement is the share of tokens with the same likeliest next token. Means over tokens; intervals "
        "resample whole documents. These are teacher-forced texts: what differences do to text that a model writes "
        "itself, where they add up, and to the tasks that it is used for, is not measured here.",
        source="KL and agreement as measures of quantisation: Dutta et al. 2024, arXiv 2407.09141",
        file="fp8_loss",
        more_files=["fp8_loss_by_domain"] if domains is not None else [],
        figure=Markup("").join(figures),
        tables=tables,
    )


def _drift(results: Results) -> Section:
    anchor = "fp8-drift"
    result = results.get("fp8_drift")
    if result is None:
        return _missing(anchor, "How far the layers drift was not measured", "probe.fp8_error.drift(model, texts)")
    tables = []
    for site in map(str, result["site"].values):
        own = result["sqnr"].sel(site=site)
        if not bool(own.notnull().any()):
            continue
        names = [f"{name}, {mode}" for name in recipe_names(result) for mode in map(str, result["mode"].values)]
        cells = own.transpose("layer", "recipe", "mode").values.reshape(result.sizes["layer"], -1)
        rows = [[layer_name(result, at), *map(_decibel, row)] for at, row in enumerate(cells)]
        tables.append(Table(f"{fp8_findings.named(site)}: SQNR (dB)", ["layer", *names], rows))
    return Section(
        anchor=anchor,
        title=titles.drift_by_layer(result),
        reading="Signal to noise of the residual stream behind each layer, where 20 dB are a difference of 10 % and "
        "40 dB of 1 %: further right is nearer to BF16. Solid lines are the whole quantised model; where a dotted line "
        "is right of its solid one, the errors of earlier layers weigh more than the layer's own.",
        definition="SQNR = 20·log₁₀(‖x‖ / ‖x − x̂‖) over all tokens; ∞ where nothing differs. Accumulated: the whole "
        "model in FP8; isolated: the layer in FP8 on what entered it in BF16. Equal independent errors lower it by "
        "10·log₁₀ L after L layers. It has no interval, and does not say whether a difference matters to the output: "
        "some directions are read by later layers and others are not.",
        source="SQNR: Gersho & Gray 1992, Vector Quantization and Signal Compression",
        file="fp8_drift",
        figure=figure_html(fp8_figures.drift_by_layer(result, title=""), titles.drift_by_layer(result)),
        tables=tables,
    )


def _sensitivity(result: xr.Dataset | None) -> Section:
    anchor = "fp8-sensitivity"
    if result is None:
        remedy = "probe fp8 without --no-sensitivity, or probe.fp8_error.sensitivity(model, texts)"
        return _missing(anchor, "Which part cannot take FP8 was not measured", remedy)
    recipe = fp8_findings.spared_recipe(result)
    measure = fp8_findings.damage(result)
    free = fp8_findings.harmless(result)
    more = ""
    if free := fp8_findings.harmless(result):
        names = ", ".join(map(fp8_findings.named, free))
        more = f" {recipe} leaves these in BF16, though they alone would cost less than that noise: {names}."
    return Section(
        anchor=anchor,
        title=fp8_findings.spare(result),
        reading=f"What each part costs if only it is rounded as {recipe} does (alone), and what is left if all of the "
        "recipe is but this part (spared): a part worth keeping in BF16 is far right alone, and far left of everything "
        f"when spared. Grey are the noise floors.{more}",
        definition="The damage is the mean KL of the next token (of a model without a head, the share of flips). The "
        "share that is gone is 1 − KL without the part / KL of the whole recipe; it is claimed where the intervals of "
        "both, widened for all parts at once (Bonferroni), lie apart, the whole recipe stands out from both noise "
        "floors, and the share surely exceeds the part's share of the weights. Parts that overlap (a layer and a kind "
        "of modules) do not add up, and two parts spared together may do more or less than both by themselves.",
        source="One part at a time: Dong et al. 2019 (HAWQ), arXiv 1905.03696, ranks layers by curvature instead",
        file="fp8_sensitivity",
        figure=figure_html(fp8_figures.sensitivity(result, measure=measure, title=""), fp8_findings.spare(result)),
        tables=[_unit_table(result, recipe)],
    )


def _unit_table(result: xr.Dataset, recipe: str) -> Table:
    whole = of_unit(result, "everything").value
    total = int(result["n_weights"].sel(unit="everything"))
    rows = []
    for at, unit in enumerate(map(str, result["unit"].values)):
        n_weights, kind = int(result["n_weights"][at]), str(result["unit_kind"].values[at])
        if not n_weights:
            continue
        covered = "" if kind in ("floor", "whole") else "yes" if bool(result["covered"][at]) else "no"
        share = f"{100 * n_weights / total:.3g}" if covered == "yes" and total else ""
        numbers = [
            bounded(*_scaled(of_unit(result, unit, setting, measure=name), scale))
            for name, scale in (("logit_kl", 1), ("flip_share", 100), ("loss_change", 1))
            for setting in ("alone", "spared")
        ]
        left = of_unit(result, unit, "spared").value
        gone = number(100 * (1 - left / whole)) if covered == "yes" and whole > 0 else ""
        rows.append([fp8_findings.named(unit), covered, share, gone, *numbers])
    columns = ["part", f"in {recipe}", "weights (%)", "damage gone (%)"]
    columns += [
        f"{name}, {setting}" for name in ("KL (nat)", "flips (%)", "loss (nat)") for setting in ("alone", "spared")
    ]
    return Table("Parts, the whole recipe and the noise floors", columns, rows)


def _weights(results: Results) -> Section:
    anchor = "fp8-weights"
    result = results.get("fp8_weights")
    if result is None:
        return _missing(anchor, "The error of the weights was not measured", "probe.fp8_error.weight_error(model)")
    tables = []
    for name in map(str, result["recipe"].values):
        own = result.sel(recipe=name)
        rows = []
        for module in map(str, result["module"].values):
            one = own.sel(module=module)
            if not bool(one["amax"].notnull().any()):
                continue
            covered = int(one["covered"].sum())
            rows.append([
                module,
                f"{covered} of {int(one['amax'].notnull().any('expert').sum())}",
                *(_decibel(float(value)) for value in (one["sqnr"].min(), one["sqnr"].median())),
                *(number(100 * float(one[key].max())) for key in ("underflow", "saturation")),
                *(number(float(one[key].max())) for key in ("amax", "dynamic_range")),
            ])  # fmt: skip
        if "fp8_head" in results:
            head = results["fp8_head"].sel(recipe=name)
            shares = [number(100 * float(head[f"head_{key}"])) for key in ("underflow", "saturation")]
            quality = _decibel(float(head["head_sqnr"]))
            rows.append(["output head", "–", quality, quality, *shares, "–", "–"])
        columns = [
            "matrix",
            "layers in the recipe",
            "worst SQNR (dB)",
            "median (dB)",
            "underflow (%)",
            "saturation (%)",
        ]
        tables.append(Table(f"Weights under {name}", [*columns, "amax", "dynamic range (bit)"], rows))
    return Section(
        anchor=anchor,
        title=titles.weight_sqnr(result),
        reading="Each cell is a matrix of a layer, of its worst expert where each has its own; look at the numbers of "
        "the scale before its colours. Weights that are spread like a bell keep about 31.5 dB in E4M3, whatever their "
        "size; what is near that has no trouble.",
        definition="SQNR = 20·log₁₀(‖w‖ / ‖w − ŵ‖) of the weights as they are rounded and read back. Underflow is the "
        "share of weights that became zero and were not, saturation that of scaled weights beyond the largest code; "
        "the dynamic range is log₂ of the largest over the smallest magnitude. There is no chance in it, hence no "
        "interval. A good SQNR does not make a model good: what matters is what the weights are multiplied with.",
        source="FP8 formats: Micikevicius et al. 2022, arXiv 2209.05433",
        file="fp8_weights",
        more_files=["fp8_head"] if "fp8_head" in results else [],
        figure=figure_html(fp8_figures.weight_sqnr(result, title=""), titles.weight_sqnr(result)),
        tables=tables,
    )


def _activations(result: xr.Dataset | None) -> Section:
    anchor = "fp8-activations"
    if result is None:
        remedy = "probe fp8 without --no-activations, or probe.fp8_error.activation_range(model, texts)"
        return _missing(anchor, "The range of the activations was not measured", remedy)
    spreads = {
        module: found
        for module in SINGLE_EXPERT
        if (found := fp8_findings.spread_of_experts(result, module)) is not None
    }
    module = max(spreads, key=lambda name: spreads[name][1]) if spreads else SINGLE_EXPERT[0]
    return Section(
        anchor=anchor,
        title=fp8_findings.experts_differ(result, module),
        reading=f"Do experts see activations of vastly different scale? The largest absolute value that entered each "
        f"expert's {module}, on a log scale; a cell that is empty is an expert that no token went to. A scale for each "
        "row or token copes with any ratio; one scale for all experts would not.",
        definition="Inputs of the model in BF16, every value of every token. An amax is the largest of all values, so "
        "it grows with the tokens that an expert saw: the ratio of the 99th percentiles beside it does not. Outlier "
        "channels have an amax beyond ten times the median channel's. These are the extremes of these texts, without "
        "an interval: other texts may hold larger ones.",
        source="Outlier channels: Dettmers et al. 2022 (LLM.int8()), arXiv 2208.07339; massive activations: Sun et al. "
        "2024, arXiv 2402.17762",
        file="fp8_activations",
        figure=figure_html(
            fp8_figures.activation_amax(result, module=module, title=""), fp8_findings.experts_differ(result, module)
        ),
        tables=_activation_tables(result),
    )


def _activation_tables(result: xr.Dataset) -> list[Table]:
    rows = []
    for module in SINGLE_EXPERT:
        own = result.sel(module=module)
        ratios = [
            ratio_of_experts(values.transpose("layer", "expert").values) for values in (own["amax"], typical(own))
        ]
        for at in np.flatnonzero(own["amax"].notnull().any("expert").values):
            amax = own["amax"].isel(layer=int(at))
            numbers = (float(amax.min()), float(amax.max()), ratios[0][at], ratios[1][at])
            rows.append([f"{layer_name(result, int(at))}, {module}", *map(number, numbers)])
    tables = [Table("Between experts", ["layer", "smallest amax", "largest", "ratio", "of 99 %"], rows)]
    rows = []
    for module in map(str, result["module"].values):
        own = result.sel(module=module)
        if not bool(own["amax"].notnull().any()):
            continue
        of_all = (own["amax"].max(), *(own["magnitude"].sel(percentile=p).max() for p in own["percentile"].values))
        lost = [
            number(100 * float(own[key].sel(recipe=name).max()))
            for name in own["recipe"].values
            for key in ("saturation", "underflow")
        ]
        rows.append([module, *(number(float(value)) for value in (*of_all, own["outlier_channels"].max())), *lost])
    percentiles = [f"{value:g} %" for value in result["percentile"].values]
    losses = [f"{name}: {key} (%)" for name in map(str, result["recipe"].values) for key in ("saturated", "to zero")]
    columns = ["input of", "amax", *percentiles, "outlier channels", *losses]
    return [*tables, Table("Largest of all layers and experts", columns, rows)]


# --- what they are made of --------------------------------------------------------------------------------------------


def _missing(anchor: str, title: str, remedy: str, *, why: str = "") -> Section:
    """A section that says why it has no figure, and how to get one."""
    reason = f"{why} {remedy} measures it.".strip()
    return Section(
        anchor=anchor, title=title, reading="", definition="", source="", file="", figure=missing_html(reason)
    )


def _caption(text: str) -> Markup:
    """What stands above a figure of a section that has several."""
    return Markup('<h3 class="caption">{}</h3>').format(text)


def _too_few(result: xr.Dataset) -> str:
    """Why there are no intervals, where there are none."""
    n_documents = int(result["n_documents"])
    if n_documents >= MIN_DOCUMENTS:
        return ""
    return f" There are no intervals: {counted(n_documents, 'document')} of the {MIN_DOCUMENTS} that they take."


def _scaled(found: Estimate, scale: float) -> tuple[float, ...]:
    return tuple(scale * value for value in found)


def _cell(own: xr.Dataset, name: str, scale: float) -> str:
    return bounded(*_scaled(estimate(own, name), scale))


def _recipe_rows(result: xr.Dataset, scales: Mapping[str, float]) -> list[list[str]]:
    return [
        [name, *(_cell(result.sel(recipe=name), key, scale) for key, scale in scales.items())]
        for name in recipe_names(result)
    ]


def _layer_rows(result: xr.Dataset, name: str, *, scale: float) -> list[list[str]]:
    return [
        [
            layer_name(result, at),
            *(_cell(result.isel(layer=at).sel(recipe=own), name, scale) for own in recipe_names(result)),
        ]
        for at in range(result.sizes["layer"])
    ]


def _domain_rows(result: xr.Dataset, name: str, *, scale: float) -> list[list[str]]:
    return [
        [str(domain), *(_cell(result.isel(domain=at).sel(recipe=own), name, scale) for own in recipe_names(result))]
        for at, domain in enumerate(result["domain"].values)
    ]


def _decibel(value: float) -> str:
    return "∞" if np.isposinf(value) else number(value)
