"""Which part of a model cannot take FP8: one part at a time in it, and all of a recipe but one part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import nn

from probe import inputs, schema
from probe.bootstrap import Bootstrap
from probe.fp8.drift import routing_change
from probe.fp8.flips import Bounds, mean_bounds, positive_bounds, share_bounds
from probe.fp8.layers import Matrix, QuantizationError, matrices
from probe.fp8.streams import (
    FLOORS,
    HEAD,
    LayerStep,
    LogitSums,
    Stream,
    Walk,
    covers,
    noise_floors,
    recipe_stream,
    resolved,
    unit_stream,
)
from probe.models import LoadedModel
from probe.recipes import MODULE_KINDS, Recipe, described

SETTINGS = ("alone", "spared")
ALONE, SPARED = range(2)


Part = tuple[str, int | None]
"""A kind of modules in a layer; None for the output head, which is in none."""


@dataclass(frozen=True)
class Unit:
    """A part of the model: its name, kind ("module" or "layer"), and the (kind, layer) that it is made of."""

    name: str
    kind: str
    parts: frozenset[Part]


def sensitivity(
    model: LoadedModel | nn.Module,
    texts: str | inputs.Texts,
    *,
    recipe: str | Recipe = "rowwise",
    max_tokens: int | None = None,
    bootstrap: Bootstrap | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """What each kind of modules, and each layer, costs in FP8.

    Parameters
    ----------
    model : from :func:`probe.load`, or a module that holds a Llama 4 text decoder (then ``texts`` are token ids).
    texts : texts, or token ids as a sequence of sequences.
    recipe : a recipe, by name (see ``recipes``) or as a ``Recipe``.
    max_tokens : tokens kept of each text.
    bootstrap : how texts are resampled for the intervals.
    progress : show a progress bar.

    Returns
    -------
    Dataset (unit, setting), ``/fp8_sensitivity`` of ``probe.schema``: changes of the loss, KL and flips with their
    bounds. Units are the kinds of modules, among them those that the recipe leaves as they are (``covered`` is False),
    the layers, and ``everything``, ``bf16`` and ``fp32`` to compare with. ``alone``: only the unit is in FP8;
    ``spared``: all that the recipe covers but the unit. NaN where a unit has no weight, and for a floor that is spared.

    Raises
    ------
    RecipeError
        For a recipe that is not known.
    NotLlama4Error, QuantizationError, RecordingError
        As of :func:`drift`, before anything is run.

    Notes
    -----
    What the recipe leaves as it is, is tried with the recipe's own rounding: a kind of modules in the layers that the
    recipe knows, a layer in the kinds. A spared unit that was not covered leaves the whole recipe. A unit equals the
    reference in all layers before its own; those are not computed. Every stream keeps its hidden states: 2 bytes ·
    tokens · hidden size for each that differs, hence few texts are right for a large model.
    """
    bootstrap = bootstrap or Bootstrap()
    known, *others = resolved(recipe)
    if others:
        raise QuantizationError(f"sensitivity takes one recipe, got {1 + len(others)}: call it for each")
    walk = Walk(model, texts, max_tokens=max_tokens, progress=progress)
    units, covered = _units(walk, known), _covered(walk, known)
    weights = _weights(walk)

    def n_weights(parts: Iterable[Part]) -> int:
        return sum(weights[part] for part in parts)

    streams = [*noise_floors(walk.n_layers), recipe_stream(known, walk.n_layers)]
    place: dict[tuple[str, int], int] = {("bf16", ALONE): 0, ("fp32", ALONE): 1, ("everything", ALONE): 2}
    for unit in units:
        if not n_weights(unit.parts):
            continue
        for setting, parts in enumerate((unit.parts, covered - unit.parts)):
            place[unit.name, setting] = len(streams)
            streams.append(_stream(f"{unit.name} {SETTINGS[setting]}", known, walk.n_layers, parts))
    place["everything", SPARED] = len(streams)
    streams.append(_stream("nothing", known, walk.n_layers, frozenset()))

    flips = Flips(walk, len(streams))
    logits = walk.logits(streams, walk.layers(streams, flips.add))
    found = _measured(walk, bootstrap, logits, flips)
    rows = [
        *((unit.name, unit.kind, n_weights(unit.parts), n_weights(unit.parts & covered) > 0) for unit in units),
        ("everything", "whole", n_weights(covered), n_weights(covered) > 0),
        *((name, "floor", sum(weights.values()), False) for name in FLOORS),
    ]
    table = {name: np.full((len(rows), len(SETTINGS)), np.nan) for name in found}
    for index, row in enumerate(rows):
        for setting in range(len(SETTINGS)):
            if (row[0], setting) in place:
                for name, values in found.items():
                    table[name][index, setting] = values[place[row[0], setting]]
    columns = dict(zip(("unit", "unit_kind", "n_weights", "covered"), zip(*rows, strict=True), strict=True))
    result = schema.dataset("fp8_sensitivity", {**table, **columns, "setting": SETTINGS})
    return result.assign_attrs({"recipes": described([known]), "n_texts": len(walk.ids), **bootstrap.attributes})


class Flips:
    """Decisions of every stream that flipped, by text."""

    def __init__(self, walk: Walk, n_streams: int) -> None:
        self._top_k, self._is_moe = walk.top_k, walk.is_moe
        self.counts = np.zeros((len(walk.ids), n_streams, 2), np.int64)
        """Decisions (text, stream, category): flipped, and not."""
        self.can_flip = np.zeros(n_streams, bool)
        """Whether a router's logits ever differed: where they never do, no flip is a matter of chance."""

    def add(self, step: LayerStep) -> None:
        """Count the flips of one batch in one layer."""
        if not self._is_moe[step.layer]:
            return
        flipped = routing_change(step, self._top_k)[2].cpu().numpy()
        logits, own_logits = step.reference.rows("router"), step.accumulated.rows("router")
        assert logits is not None and own_logits is not None
        self.can_flip[step.streams] |= not torch.equal(logits.float(), own_logits.to(logits.device).float())
        text = np.array(step.batch.texts)[step.batch.text_of_row.numpy()]
        for category, own in enumerate((flipped, ~flipped)):
            tally = np.bincount(text[own], minlength=len(self.counts))
            self.counts[:, step.streams, category] += tally[:, None]


def _units(walk: Walk, recipe: Recipe) -> list[Unit]:
    """Kinds of modules in the layers that the recipe knows, and layers with the kinds that it knows."""
    n = walk.n_layers
    layers = [layer for layer in range(n) if recipe.first_and_last_layer or 0 < layer < n - 1]
    units = [
        Unit(kind, "module", frozenset({(kind, None)} if kind == HEAD else {(kind, layer) for layer in layers}))
        for kind in MODULE_KINDS
    ]
    of_layers = [kind for kind in recipe.modules if kind != HEAD]
    return units + [
        Unit(f"layer {layer}", "layer", frozenset((kind, layer) for kind in of_layers)) for layer in range(n)
    ]


def _covered(walk: Walk, recipe: Recipe) -> frozenset[Part]:
    """What the recipe rounds."""
    places: list[int | None] = [*range(walk.n_layers), None]
    return frozenset(
        (kind, layer)
        for kind in MODULE_KINDS
        for layer in places
        if (kind == HEAD) == (layer is None) and covers(recipe, kind, layer, walk.n_layers)
    )


def _stream(name: str, recipe: Recipe, n_layers: int, parts: frozenset[Part]) -> Stream:
    return unit_stream(name, recipe, n_layers, lambda kind, layer: (kind, layer) in parts)


def _weights(walk: Walk) -> dict[Part, int]:
    """How many weights each kind of modules has in each layer."""
    found: dict[Part, int] = {(kind, layer): 0 for kind in MODULE_KINDS for layer in range(walk.n_layers)}
    found[HEAD, None] = 0 if walk.head is None else walk.head.weight.numel()
    for layer in range(walk.n_layers):
        own: list[Matrix] = matrices(walk.layer(layer))
        for matrix in own:
            found[matrix.kind, layer] += matrix.weight.numel()
    return found


def _measured(walk: Walk, bootstrap: Bootstrap, logits: LogitSums, flips: Flips) -> dict[str, np.ndarray]:
    """Numbers and bounds (stream,) by variable."""
    n_tokens = np.array([len(text) for text in walk.ids])
    change = (logits.loss - logits.reference_loss).T
    followed = n_tokens > 1
    bounds: dict[str, Bounds] = {
        "loss_change": mean_bounds(bootstrap, change[followed], n_tokens[followed] - 1),
        "logit_kl": positive_bounds(bootstrap, logits.kl.T, n_tokens),
        "flip_share": share_bounds(bootstrap, flips.counts, flips.can_flip),
    }
    return {
        f"{name}{suffix}": values
        for name, own in bounds.items()
        for suffix, values in (("", own.value), ("_lower", own.lower), ("_upper", own.upper))
    }
