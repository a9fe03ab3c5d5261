"""Titles that state what one sees in a figure, from the numbers that it shows."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe import schema
from probe.bootstrap import MIN_DOCUMENTS
from probe.findings import counted, digits, enough_expected, percent, tells, times
from probe.text_view import layer_label


def layers_in_words(layers: list[int], n_layers: int) -> str:
    """Which layers, for a sentence: "layers 5 and 6", "every layer", "11 of 48 layers"."""
    if len(layers) == n_layers:
        return "every layer" if n_layers > 1 else f"layer {layers[0]}"
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if len(layers) <= 3:
        return f"layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}"
    return f"{len(layers)} of {n_layers} layers"


def load(result: xr.Dataset) -> str:
    """What the heatmap of load shows, from ``load_interval``."""
    load = result["load"].transpose("layer", "expert")
    ratio, lower = (part.transpose("layer", "expert").values * load.sizes["expert"] for part in (load, result["lower"]))
    if np.isnan(lower).all():
        return f"Fewer than {MIN_DOCUMENTS} documents cannot say which expert is busier than an even share"
    if not (lower > 1).any():
        return "No expert is surely busier than an even share"
    row, column = np.unravel_index(int(np.nanargmax(np.where(lower > 1, ratio, np.nan))), ratio.shape)
    of_all = "of all" if ratio[row, column] == np.nanmax(ratio) else "whose load is certain"
    return (
        f"The busiest expert {of_all} is number {int(load['expert'][column])} of layer {int(load['layer'][row])}, "
        f"at {times(ratio[row, column])} an even share"
    )


def expert(result: xr.Dataset, *, layer: int, expert: int, unit: str = "tokens") -> str:
    """What the card of one expert shows first, from ``load_interval``."""
    load = result["load"].sel(layer=layer, expert=expert)
    name = layer_label(layer, schema.labels(load["attention_kind"].expand_dims("layer"))[0] == "nope")
    share = float(load)
    return (
        f"Expert {expert} of layer {name} takes {percent(share)} of the {unit}, "
        f"{times(share * result.sizes['expert'])} an even share"
    )


def document_load(result: xr.Dataset) -> str:
    """What the figure of one document's load shows: the expert that it uses most, or more than other documents do."""
    name = f"Layer {layer_label(int(result['layer']), result['attention_kind'].item() == 'nope')}"
    here, overall = result["here"].values, result["overall"].values
    if np.isnan(here).all():
        return f"{name}: this document holds no token"
    if result.attrs["n_documents"] < 2:
        busiest = int(here.argmax())
        return f"{name}: expert {result['expert'].values[busiest]} takes {percent(here[busiest])} of this document"
    favoured = int((here - overall).argmax())
    return (
        f"{name}: expert {result['expert'].values[favoured]} takes {percent(here[favoured])} of this document, "
        f"{percent(overall[favoured])} overall"
    )


def imbalance(result: xr.Dataset) -> str:
    """What the figure of imbalance shows, from ``imbalance``."""
    above = result["max_violation_lower"] > result["max_violation_null_upper"]
    layers = [int(layer) for layer in result["layer"].values[above.values]]
    if result["max_violation_lower"].isnull().all():
        return f"Fewer than {MIN_DOCUMENTS} documents cannot say whether a layer is less even than chance"
    if not layers:
        return "In no layer is the busiest expert surely busier than chance would make it"
    return f"In {layers_in_words(layers, result.sizes['layer'])} the busiest expert is busier than chance would make it"


def specialization(cells: xr.Dataset) -> str:
    """What the heatmaps of domains show, from ``findings.specialized_cells``."""
    n_tested, n_settled = int(cells.attrs["n_tested"]), int(cells["settled"].sum())
    if not n_tested:
        return "Too few documents in each domain to tell the domains apart"
    if not n_settled:
        return "No domain surely prefers an expert"
    by_domain = cells["settled"].sum(["layer", "expert"])
    most = str(cells["domain"].values[int(by_domain.argmax("domain"))])
    part = percent(n_settled / n_tested)
    return f"{part} of all cells surely differ from the overall load, more in “{most}” than elsewhere"


def margin(result: xr.Dataset) -> str:
    """What the figure of margins shows, from ``margin``."""
    middle = result["margin"].transpose("layer", "quantile").values[:, 2]
    if not np.isfinite(middle).any():
        return "Every expert is chosen, so there is no margin"
    least, most = int(np.nanargmin(middle)), int(np.nanargmax(middle))
    if least == most:
        return f"Half of the decisions are closer than {digits(middle[least])} logits"
    layers = result["layer"].values
    return (
        f"The median margin is largest in layer {layers[most]} ({digits(middle[most])} logits) "
        f"and smallest in layer {layers[least]} ({digits(middle[least])})"
    )


def transition(result: xr.Dataset) -> str:
    """What the heatmaps of transitions show, from ``transition``."""
    lift = result["lift"].where(enough_expected(result)).transpose("layer", "expert", "next_expert")
    if not np.isfinite(lift.values).any():
        return "Too few tokens to see how one layer's expert leads to the next"
    at = np.unravel_index(int(np.nanargmax(lift.values)), lift.shape)
    cell = result.transpose("layer", "expert", "next_expert").isel(layer=at[0], expert=at[1], next_expert=at[2])
    layer, expert, next_layer, next_expert = (
        int(cell[name]) for name in ("layer", "expert", "next_layer", "next_expert")
    )
    return (
        f"{percent(float(cell['probability']))} of the tokens at layer {layer}'s expert {expert} go on to layer "
        f"{next_layer}'s expert {next_expert}, {times(float(cell['lift']))} what independence gives"
    )


def repetition(result: xr.Dataset) -> str:
    """What the figure of repetition shows, from ``repetition``."""
    above = (result["lower"] > result["null"]).values
    layers = [int(layer) for layer in result["layer"].values[above]]
    if not layers:
        return "In no layer do neighbouring tokens surely share an expert more often than chance"
    where = layers_in_words(layers, result.sizes["layer"])
    return f"Neighbouring tokens share an expert more often than chance in {where}"


LABELS = {"token_id": "token", "domain": "domain"}
"""What may explain the choice, in words."""


def information(result: xr.Dataset) -> str:
    """What the figure of mutual information shows, from ``mutual_information`` with a dim ``label``."""
    telling = tells(result)
    n_layers = result.sizes["layer"]
    names = [str(label) for label in result["label"].values if bool(telling.sel(label=label).any())]
    if result["p_value"].isnull().all():
        return "Neither labels nor documents vary, so nothing can explain the choice of expert"
    if not names:
        return "Nothing that was asked tells more about the expert than chance would"
    strongest = result.sel(label=names[0])
    at = int(strongest["normalized"].where(telling.sel(label=names[0])).argmax("layer"))
    layers = [int(layer) for layer in result["layer"].values[telling.sel(label=names[0]).values]]
    head = LABELS.get(names[0], names[0])
    value, null = (percent(float(strongest[name][at])) for name in ("normalized", "null"))
    most = f", most in layer {int(result['layer'][at])}" if len(layers) > 1 else ""
    return (
        f"{head[0].upper()}{head[1:]} and expert tell about each other in {layers_in_words(layers, n_layers)}{most}: "
        f"they share {value} of their information, {null} by chance"
    )


NEARLY_UNIQUE = 0.9
"""Paths over tokens above which there is nothing common about a common path."""


def paths(result: xr.Dataset) -> str:
    """What the figure of paths shows, from ``paths``."""
    n_paths, n_tokens = int(result["n_paths"]), int(result["n_tokens"])
    if n_paths == 1:
        return "All tokens take the same path through the layers"
    if n_paths > NEARLY_UNIQUE * n_tokens:
        return f"Nearly every token takes a path of its own: {counted(n_tokens, 'token')}, {n_paths:,} paths"
    first = result.isel(path=0)
    share = percent(float(first["share"]))
    return f"{n_tokens:,} tokens take {n_paths:,} paths; the most common carries {share} of them"


def rough(ratio: float) -> str:
    """A ratio that may be huge: two digits that count."""
    return times(float(f"{ratio:.2g}")) if np.isfinite(ratio) else times(ratio)


def batches(result: xr.Dataset) -> str:
    """What the figure of batches shows, from ``distinct_experts``."""
    size, unrelated, consecutive, uniform = typical_batch(result)
    head = f"A batch of {counted(size, 'unrelated token')} touches {digits(unrelated)} experts in the median layer"
    if np.isfinite(consecutive):
        head += f", {size:,} consecutive ones {digits(consecutive)}"
    return f"{head}; a uniform router would touch {digits(uniform)}"


def typical_batch(result: xr.Dataset) -> tuple[int, float, float, float]:
    """A batch size of ``distinct_experts`` at which much is still open, and what it touches.

    The first size at which a uniform router touches half of what it touches at the largest. With it the median over
    layers of ``distinct`` and of ``consecutive`` (NaN where no document is as long), and ``uniform``.
    """
    uniform = result["uniform"].values
    at = int(np.argmax(uniform >= uniform.max() / 2))
    own = result.isel(batch_size=at)
    unrelated, consecutive = (float(np.median(own[name].values)) for name in ("distinct", "consecutive"))
    return int(result["batch_size"][at]), unrelated, consecutive, float(uniform[at])
