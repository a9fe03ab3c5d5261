"""How far FP8 takes a model from itself in BF16, beside what two runs of the same model differ by anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from probe import inputs, schema
from probe.bootstrap import divide
from probe.fp8.layers import SITES, chosen_experts
from probe.fp8.streams import LayerStep, LogitSums, Stream, Walk, noise_floors, recipe_stream, resolved
from probe.models import LoadedModel
from probe.recipes import Recipe
from probe.recording import LAYER_CATEGORIES

MODES = ("isolated", "accumulated")


def drift(
    model: LoadedModel | nn.Module,
    texts: str | inputs.Texts,
    *,
    recipe: str | Recipe | Sequence[str | Recipe] = "meta",
    domains: Sequence[str | None] | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> xr.DataTree:
    """Run the same tokens through a model in BF16 and in FP8, and compare what each layer and the output head return.

    Parameters
    ----------
    model : from :func:`probe.load`, or a module that holds a Llama 4 text decoder (then ``texts`` are token ids).
    texts : texts, or token ids as a sequence of sequences.
    recipe : a recipe, or several, by name (see ``recipes``) or as a ``Recipe``.
    domains : one for each text.
    max_tokens : tokens kept of each text.
    progress : show a progress bar.

    Returns
    -------
    DataTree with ``/fp8_drift``, ``/fp8_samples`` and ``/fp8_flips``; see ``probe.schema``. ``recipe`` begins with the
    noise floors ``bf16`` (each text by itself and eager attention, instead of batches and sdpa) and ``fp32`` (weights
    as loaded, float32 arithmetic). For a model without an output head what is said of logits is NaN.

    Raises
    ------
    RecipeError
        For a recipe that is not known.
    NotLlama4Error
        If the model is none, or has no mixture-of-experts layer.
    QuantizationError
        For a model that is quantised already, patched, not in memory or not finite, a text without a token or longer
        than the model was made for, or recipes of the same name; before anything is run.
    RecordingError
        For texts and domains that cannot be right.

    Notes
    -----
    The reference has BF16 weights and arithmetic, however the model was loaded. A quantised product is
    Σ (code · scale)(code · scale) in float32, rounded to BF16: what FP8 hardware computes, up to the order of the sum.
    A scale that several tokens share, as one for a whole tensor does, is that of one text, and for a routed expert that
    of one text's tokens there: a text's numbers depend on no other text. Everything that is not a matrix product with
    a weight stays in BF16. Experts run sparsely on all sides. Hooks on the model do not run, and nothing in it changes.

    SQNR is 20·log₁₀(‖x‖/‖x − x̂‖) over all tokens. ``isolated`` errors of a part come from its own rounding alone; those
    of ``routed_experts`` from the experts', given the reference's choice. Independent errors add up: after L layers of
    equal ones SQNR is lower by 10·log₁₀ L. KL is KL(reference‖stream); tokens count equally in all means.
    """
    recipes = resolved(recipe)
    walk = Walk(model, texts, domains=domains, max_tokens=max_tokens, progress=progress)
    return _study(walk, recipes)


def noise_floor(
    model: LoadedModel | nn.Module,
    texts: str | inputs.Texts,
    *,
    domains: Sequence[str | None] | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> xr.DataTree:
    """:func:`drift` without a recipe: what BF16 runs that nobody would call different differ by.

    Returns
    -------
    DataTree as of :func:`drift`; its recipes are ``bf16`` and ``fp32``.
    """
    return _study(Walk(model, texts, domains=domains, max_tokens=max_tokens, progress=progress), [])


def _study(walk: Walk, recipes: list[Recipe]) -> xr.DataTree:
    streams = noise_floors(walk.n_layers) + [recipe_stream(recipe, walk.n_layers) for recipe in recipes]
    comparison = Comparison(walk, streams)
    hidden = walk.layers(streams, comparison.add, isolated=True)
    logits = walk.logits(streams, hidden)
    names = [stream.name for stream in streams]
    groups = {
        "/": xr.Dataset(attrs=walk.attributes(recipes)),
        "/fp8_drift": _drift(walk, comparison, logits, names),
        "/fp8_samples": _samples(walk, logits, names),
        "/fp8_flips": _flips(walk, comparison, names),
    }
    return xr.DataTree.from_dict(groups)


class Comparison:
    """Streams against the reference, added up step by step."""

    def __init__(self, walk: Walk, streams: Sequence[Stream]) -> None:
        n_tokens = sum(map(len, walk.ids))
        self.layers = [layer for layer in range(walk.n_layers) if walk.is_moe[layer]]
        self.sums = np.full((len(streams), walk.n_layers, len(SITES), len(MODES), 4), np.nan)
        self.flipped = np.zeros((len(streams), n_tokens, len(self.layers)), bool)
        self.margin_change = np.full(self.flipped.shape, np.nan, np.float32)
        self.router_margin = np.full((n_tokens, len(self.layers)), np.nan, np.float32)
        self._top_k = walk.top_k
        self._first_row = np.concatenate([[0], np.cumsum([len(text) for text in walk.ids])])

    def add(self, step: LayerStep) -> None:
        """Take in one batch in one layer."""
        for index, site in enumerate(SITES):
            reference = step.reference.rows(site)
            if reference is None:
                continue
            for mode, outputs in enumerate((step.isolated, step.accumulated)):
                own = None if outputs is None else outputs.rows(site)
                if own is not None:
                    cell = (step.streams, step.layer, index, mode)
                    self.sums[cell] = np.nan_to_num(self.sums[cell]) + deviation_sums(reference, own)
        if step.layer in self.layers:
            layer = self.layers.index(step.layer)
            rows = np.concatenate([np.arange(*self._first_row[[text, text + 1]]) for text in step.batch.texts])
            flips = routing_change(step, self._top_k)
            self.router_margin[rows, layer] = flips[0].cpu().numpy()
            for number in step.streams:
                self.margin_change[number, rows, layer] = flips[1].cpu().numpy()
                self.flipped[number, rows, layer] = flips[2].cpu().numpy()


def deviation_sums(reference: Tensor, own: Tensor) -> np.ndarray:
    """‖x‖², ‖x̂‖², x·x̂ and ‖x − x̂‖² of rows, float64 (4,)."""
    x, y = reference.float(), own.to(reference.device).float()
    difference = x - y
    # Rows are summed in float32, and their sums in float64 on the CPU: not every device has it.
    per_row = torch.stack([(a * b).sum(dim=-1) for a, b in ((x, x), (y, y), (x, y), (difference, difference))])
    return per_row.cpu().double().sum(dim=-1).numpy()


def routing_change(step: LayerStep, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The reference's margin, how it changed and whether another set of experts was chosen, of each token."""
    logits, scores = (step.reference.rows(name) for name in ("router", "scores"))
    own_logits, own_scores = (step.accumulated.rows(name) for name in ("router", "scores"))
    assert logits is not None and scores is not None and own_logits is not None and own_scores is not None
    is_chosen = chosen_experts(scores, logits, top_k)
    flipped = (is_chosen != chosen_experts(own_scores, own_logits, top_k)).any(dim=1)
    logits, own_logits = logits.float(), own_logits.float()
    if top_k == logits.shape[1]:
        undefined = torch.full_like(logits[:, 0], torch.nan)
        return undefined, undefined, flipped
    weakest = logits.masked_fill(~is_chosen, torch.inf).argmin(dim=1, keepdim=True)
    runner_up = logits.masked_fill(is_chosen, -torch.inf).argmax(dim=1, keepdim=True)
    margin, own_margin = (of.gather(1, weakest) - of.gather(1, runner_up) for of in (logits, own_logits))
    return margin[:, 0], (own_margin - margin)[:, 0], flipped


def _drift(walk: Walk, comparison: Comparison, logits: LogitSums, names: list[str]) -> xr.Dataset:
    reference, own, both, difference = np.moveaxis(comparison.sums, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = reference / difference
        is_equal = difference == 0
        sqnr = np.where(is_equal, np.inf, 10 * np.log10(ratio))
        relative_error = np.where(is_equal, 0, 1 / np.sqrt(ratio))
    n_tokens = np.array([len(text) for text in walk.ids])
    return schema.dataset(
        "fp8_drift",
        {
            "sqnr": sqnr,
            "relative_error": relative_error,
            "cosine": divide(both, np.sqrt(reference * own)),
            "logit_kl": logits.kl.sum(axis=1) / n_tokens.sum(),
            "top1_agreement": logits.agreeing.sum(axis=1) / n_tokens.sum(),
            "loss_change": divide((logits.loss - logits.reference_loss).sum(axis=1), (n_tokens - 1).sum()),
            "recipe": names,
            "site": SITES,
            "mode": MODES,
            **walk.layer_coords(range(walk.n_layers)),
        },
        categories=LAYER_CATEGORIES,
    )


def _samples(walk: Walk, logits: LogitSums, names: list[str]) -> xr.Dataset:
    n_tokens = np.array([len(text) for text in walk.ids])
    return schema.dataset(
        "fp8_samples",
        {
            "logit_kl": logits.kl / n_tokens,
            "top1_agreement": logits.agreeing / n_tokens,
            "loss_change": divide(logits.loss - logits.reference_loss, n_tokens - 1),
            "reference_loss": divide(logits.reference_loss, n_tokens - 1),
            "n_cut": [sample.n_cut for sample in walk.samples],
            "text_sha256": [sample.text_sha256 for sample in walk.samples],
            "recipe": names,
            "sample": np.arange(len(walk.samples)),
            "name": [sample.name for sample in walk.samples],
            "domain": [sample.domain for sample in walk.samples],
            "n_tokens": n_tokens,
        },
    )


def _flips(walk: Walk, comparison: Comparison, names: list[str]) -> xr.Dataset:
    n_tokens = [len(text) for text in walk.ids]
    sample = np.repeat(np.arange(len(n_tokens)), n_tokens)
    domains = list(dict.fromkeys(own.domain for own in walk.samples))
    code = np.array([domains.index(own.domain) for own in walk.samples], schema.code_dtype(len(domains)))
    coords: dict[str, Any] = {
        "recipe": names,
        "sample": sample,
        "position": np.concatenate([np.arange(n) for n in n_tokens]),
        "token_id": np.concatenate(walk.ids),
        "domain": code[sample],
    }
    return schema.dataset(
        "fp8_flips",
        {
            "flipped": comparison.flipped,
            "margin_change": comparison.margin_change,
            "router_margin": comparison.router_margin,
            **coords,
            **walk.layer_coords(comparison.layers),
        },
        categories=LAYER_CATEGORIES | {"domain": domains},
    )
