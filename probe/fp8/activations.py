"""What enters the matrices of a model: how large it is, and what FP8 makes of its largest and smallest values."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from probe import inputs, schema
from probe.bootstrap import divide
from probe.float8 import Rounding, quantize
from probe.fp8.layers import MODULES, LayerCopy, grouped_by_text, is_rowwise
from probe.fp8.streams import LayerStep, Walk, resolved
from probe.models import LoadedModel
from probe.recipes import Recipe, described
from probe.recording import LAYER_CATEGORIES

PERCENTILES = (50.0, 99.0, 99.9, 99.99)

OUTLIER_FACTOR = 10
"""A channel is an outlier if its largest value exceeds the median channel's so many times."""

MAGNITUDES = 1 << 15
"""Magnitudes that BF16 has: its bits without the sign, in the order of what they stand for."""

MAGNITUDE = torch.arange(MAGNITUDES, dtype=torch.int16).view(torch.bfloat16).double().numpy()

SAME_INPUT = {
    "q_proj": ("k_proj", "v_proj"),
    "router": ("shared_expert.gate_proj", "shared_expert.up_proj"),
    "mlp.gate_proj": ("mlp.up_proj",),
}
"""Matrices that are handed the same input as the one that is watched."""


def activation_range(
    model: LoadedModel | nn.Module,
    texts: str | inputs.Texts,
    *,
    recipes: str | Recipe | Sequence[str | Recipe] = ("meta", "tensorwise", "rowwise", "deepseek", "mxfp8"),
    max_tokens: int | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """How large the inputs of every matrix are, and how many of them FP8 would saturate or turn to 0.

    Parameters
    ----------
    model : from :func:`probe.load`, or a module that holds a Llama 4 text decoder (then ``texts`` are token ids).
    texts : texts, or token ids as a sequence of sequences.
    recipes : whose rounding of inputs is tried, on every matrix, whether the recipe covers it or not.
    max_tokens : tokens kept of each text.
    progress : show a progress bar.

    Returns
    -------
    Dataset ``/fp8_activations`` of ``probe.schema``: ``amax``, ``magnitude`` at the percentiles 50, 99, 99.9 and 99.99,
    ``outlier_channels`` and ``n_values`` (layer, module, expert); ``saturation`` and ``underflow`` (recipe, layer,
    module, expert), NaN for a recipe that rounds weights only, and ``underflow`` where all values are 0. ``module`` is
    the matrix whose input it is.

    Raises
    ------
    RecipeError
        For a recipe that is not known.
    NotLlama4Error, QuantizationError, RecordingError
        As of :func:`drift`, before anything is run.

    Notes
    -----
    Inputs are those of the model in BF16, tokens only. Their magnitudes are counted value by value, BF16 having 2¹⁵ of
    them, so that percentiles are exact: the smallest magnitude that so many per cent do not exceed. An outlier channel
    has an amax beyond ten times the median channel's (after Dettmers et al. 2022, LLM.int8(); Sun et al. 2024,
    Massive activations). Scales that tokens share are of one text, and of one expert's tokens, as in :func:`drift`.
    """
    several = resolved(recipes)
    walk = Walk(model, texts, max_tokens=max_tokens, progress=progress)
    measured = Measured(walk, [recipe.activation for recipe in several])
    walk.layers([], _nothing, watch=measured.watch)
    measured.finish()
    result = schema.dataset(
        "fp8_activations",
        {
            **measured.values,
            "recipe": [recipe.name for recipe in several],
            "module": list(MODULES),
            "expert": np.arange(walk.n_experts),
            "percentile": PERCENTILES,
            **walk.layer_coords(range(walk.n_layers)),
        },
        categories=LAYER_CATEGORIES,
    )
    return result.assign_attrs({"recipes": described(several), "n_texts": len(walk.ids)})


def _nothing(step: LayerStep) -> None:
    """There is no stream to compare with the reference."""


class Tally:
    """Values that entered one matrix, or the matrices of several experts."""

    def __init__(self, n_experts: int, n_channels: int, n_roundings: int) -> None:
        self.counts = torch.zeros(n_experts, MAGNITUDES, dtype=torch.int64)
        self.channel_amax = torch.zeros(n_experts, n_channels)
        self.n_saturated = torch.zeros(n_roundings, n_experts, dtype=torch.int64)
        self.n_underflow = torch.zeros(n_roundings, n_experts, dtype=torch.int64)

    def add(self, expert: int, rows: Tensor, text: Tensor, roundings: Sequence[Rounding | None]) -> None:
        """Count rows (row, channel) of the texts ``text`` (row,)."""
        if not len(rows):
            return
        # The bits of a BF16 number without its sign are whole numbers that rise with its magnitude.
        magnitude = rows.contiguous().view(torch.int16).flatten().int() & (MAGNITUDES - 1)
        self.counts[expert] += torch.bincount(magnitude, minlength=MAGNITUDES).cpu()
        self.channel_amax[expert] = torch.maximum(self.channel_amax[expert], rows.abs().amax(dim=0).float().cpu())
        for index, rounding in enumerate(roundings):
            if rounding is None:
                continue
            own = rows if is_rowwise(rounding.scaling) else grouped_by_text(rows, text)[0]
            quantized = quantize(own, format=rounding.format, scaling=rounding.scaling)
            self.n_saturated[index, expert] += quantized.n_saturated.sum().cpu()
            self.n_underflow[index, expert] += quantized.n_underflow.sum().cpu()

    def measures(self) -> dict[str, np.ndarray]:
        """Variables of ``/fp8_activations`` for these experts, NaN for one that saw nothing."""
        counts, channel_amax = self.counts.numpy(), self.channel_amax.numpy().astype(np.float64)
        n_values = counts.sum(axis=1)
        is_seen = n_values > 0
        reached = counts.cumsum(axis=1)
        magnitude = np.full((len(counts), len(PERCENTILES)), np.nan)
        for index, percentile in enumerate(PERCENTILES):
            # In exact numbers: a percentile times a count may lie just above a whole one.
            rank = np.array([-(-int(n) * round(100 * percentile) // 10_000) for n in n_values])
            magnitude[:, index] = MAGNITUDE[(reached >= rank[:, None]).argmax(axis=1)]
        magnitude[~is_seen] = np.nan
        outliers = (channel_amax > OUTLIER_FACTOR * np.median(channel_amax, axis=1, keepdims=True)).sum(axis=1)
        return {
            "amax": np.where(is_seen, channel_amax.max(axis=1), np.nan),
            "outlier_channels": np.where(is_seen, outliers, np.nan),
            "magnitude": magnitude,
            "n_values": n_values,
            "saturation": divide(self.n_saturated.numpy(), n_values),
            "underflow": divide(self.n_underflow.numpy(), n_values - counts[:, 0]),
        }


class Measured:
    """What entered the matrices of each layer, measured as the reference runs.

    Tallies are far larger than what is made of them: those of a layer are dropped before the next one begins.
    """

    def __init__(self, walk: Walk, roundings: Sequence[Rounding | None]) -> None:
        self._roundings, self._n_experts = roundings, walk.n_experts
        self._is_rounded = np.array([rounding is not None for rounding in roundings])
        self._layer, self._tallies = 0, dict[str, Tally]()
        shape = (walk.n_layers, len(MODULES), walk.n_experts)
        self.values: dict[str, np.ndarray] = {
            "amax": np.full(shape, np.nan),
            "outlier_channels": np.full(shape, np.nan),
            "magnitude": np.full((*shape, len(PERCENTILES)), np.nan),
            "n_values": np.zeros(shape, np.uint64),
            "saturation": np.full((len(roundings), *shape), np.nan),
            "underflow": np.full((len(roundings), *shape), np.nan),
        }
        """Variables of ``/fp8_activations``; those of the last layer when finished."""

    def watch(self, layer: int, copy: LayerCopy) -> None:
        """See what enters the matrices of a working copy of a layer."""
        self.finish()
        self._layer = layer
        attention, block = copy.layer.self_attn, copy.layer.feed_forward
        parts = {"q_proj": attention.q_proj, "o_proj": attention.o_proj}
        if isinstance(block, Llama4TextMoe):
            parts |= {"router": block.router, "shared_expert.down_proj": block.shared_expert.down_proj}
            copy.observe = self._add_rows
        else:
            parts |= {"mlp.gate_proj": block.gate_proj, "mlp.down_proj": block.down_proj}
        for name, part in parts.items():
            part.register_forward_pre_hook(partial(self._add_batch, name, copy))

    def _add_batch(self, name: str, copy: LayerCopy, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Take in the inputs of a linear layer, a row for each position."""
        is_real = copy.tokens.is_real
        rows = args[0].reshape(-1, args[0].shape[-1])[is_real.flatten()]
        self._tally(name, 1, rows).add(0, rows, is_real.nonzero()[:, 0], self._roundings)

    def _add_rows(self, name: str, expert: int, rows: Tensor, text: Tensor) -> None:
        self._tally(name, self._n_experts, rows).add(expert, rows, text, self._roundings)

    def _tally(self, name: str, n_experts: int, rows: Tensor) -> Tally:
        if name not in self._tallies:
            self._tallies[name] = Tally(n_experts, rows.shape[-1], len(self._roundings))
        return self._tallies[name]

    def finish(self) -> None:
        """Turn the tallies of the layer that was watched into numbers."""
        modules = list(MODULES)
        for watched, tally in self._tallies.items():
            found = tally.measures()
            for name in (watched, *SAME_INPUT.get(watched, ())):
                place = (self._layer, modules.index(name))
                for variable in ("amax", "outlier_channels", "magnitude", "n_values"):
                    self.values[variable][place] = found[variable]
                for variable in ("saturation", "underflow"):
                    shares = np.where(self._is_rounded[:, None], found[variable], np.nan)
                    self.values[variable][:, place[0], place[1]] = shares
        self._tallies = {}
