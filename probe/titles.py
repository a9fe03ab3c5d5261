"""Titles that state what one sees in a figure, from the numbers that it shows."""

from __future__ import annotations

import numpy as np
import xarray as xr

from probe.findings import digits, enough_expected, percent, times
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
    if not (lower > 1).any():
        return "No expert is surely busier than an even share"
    row, column = np.unravel_index(int(np.nanargmax(ratio)), ratio.shape)
    return (
        f"The busiest expert of all is number {int(load['expert'][column])} of layer {int(load['layer'][row])}, "
        f"at {times(ratio[row, column])} an even share"
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
        return "One document alone cannot say whether a layer is less even than chance"
    if not layers:
        return "No layer is surely less even than chance would make it"
    verb = "are" if 1 < len(layers) < result.sizes["layer"] else "is"
    words = layers_in_words(layers, result.sizes["layer"])
    return f"{words[0].upper()}{words[1:]} {verb} less even than chance would make {'them' if verb == 'are' else 'it'}"


def specialization(cells: xr.Dataset) -> str:
    """What the heatmaps of domains show, from ``findings.specialized_cells``."""
    n_compared, n_settled = int(cells.attrs["n_compared"]), int(cells["settled"].sum())
    if not n_compared:
        return "Too few documents in each domain to tell the domains apart"
    if not n_settled:
        return "No domain surely prefers an expert"
    by_domain = cells["settled"].sum(["layer", "expert"])
    most = str(cells["domain"].values[int(by_domain.argmax("domain"))])
    return (
        f"“{most}” has the most distinct taste; {percent(n_settled / n_compared)} of all cells surely differ from the "
        "overall load"
    )


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
        f"The router is surest in layer {layers[most]} (median margin {digits(middle[most])} logits) "
        f"and least sure in layer {layers[least]} ({digits(middle[least])})"
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
