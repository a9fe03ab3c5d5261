"""Changes to a live model that are undone when their ``with`` block ends; outside it nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any

import numpy as np
from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4TextModel

from probe import sites
from probe.models import LoadedModel
from probe.schema import ProbeError


class InterventionError(ProbeError):
    """An intervention would change nothing, or is asked for where the model has no such part."""


def temperature_factor(config: Any, position: Any, *, scale: float = 1.0) -> np.ndarray:
    """What a NoPE layer multiplies its queries with, by position.

    Parameters
    ----------
    config : a model's configuration, ``Llama4TextConfig`` or ``Llama4Config``.
    position : positions from 0, a number or an array of any shape.
    scale : what ``attn_scale`` is multiplied with, as in :func:`temperature`.

    Returns
    -------
    float64, of the shape of ``position``, units "1"; 1 everywhere for a model without temperature tuning.

    Raises
    ------
    InterventionError
        If a position is negative, or ``scale`` is not a finite number.

    Notes
    -----
    ``1 + scale · attn_scale · ln(1 + ⌊(position + 1) / floor_scale⌋)``, transformers' ``Llama4TextAttention``: the
    scalable softmax of arXiv 2501.19399 in steps of ``floor_scale`` tokens.
    """
    _check_scale(scale)
    position = np.asarray(position, np.float64)
    if position.size and not position.min() >= 0:
        raise InterventionError(f"position is {position.min():g}, but positions count from 0")
    text = config.get_text_config()
    if not text.attn_temperature_tuning:
        return np.ones(position.shape)
    return 1 + scale * text.attn_scale * np.log1p(np.floor((position + 1) / text.floor_scale))


@contextmanager
def temperature(
    model: LoadedModel | nn.Module, *, scale: float = 1.0, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Change how the temperature of NoPE layers grows with the position, until the block ends.

    Parameters
    ----------
    model : a ``LoadedModel``, or any module that holds a Llama 4 text decoder.
    scale : what ``attn_scale`` is multiplied with: 0 turns the tuning off, 1 leaves it, 2 doubles its growth.
    layers : decoder layers to change, all NoPE layers unless given.

    Raises
    ------
    InterventionError
        If the model has no NoPE layer or no temperature tuning, if one of ``layers`` is not NoPE, or if ``scale`` is
        not a finite number. The model is then unchanged.

    Notes
    -----
    Blocks may be nested: their scales multiply, and each puts back what it found. See :func:`temperature_factor`.
    """
    _check_scale(scale)
    chosen = _tuned_layers(model, layers)
    found = [attention.attn_scale for attention in chosen]
    try:
        for attention, attn_scale in zip(chosen, found, strict=True):
            attention.attn_scale = attn_scale * scale
        yield
    finally:
        for attention, attn_scale in zip(chosen, found, strict=True):
            attention.attn_scale = attn_scale


def nope_layers(model: LoadedModel | nn.Module) -> list[int]:
    """Decoder layers without position embedding, by the decoder's own index.

    Raises
    ------
    InterventionError
        If there is none.
    """
    layers: list[Any] = list(_decoder(model).layers)
    found = [index for index, layer in enumerate(layers) if not layer.self_attn.use_rope]
    if not found:
        raise InterventionError(
            f"none of this model's {len(layers)} layers is NoPE: temperature tuning acts on NoPE layers only"
        )
    return found


def _tuned_layers(model: LoadedModel | nn.Module, layers: Sequence[int] | None) -> list[Any]:
    """The attention modules of ``layers``, all of which are NoPE and scale their queries."""
    known = nope_layers(model)
    if layers is not None and not layers:
        raise InterventionError("layers is empty, so nothing would change: leave it out for all NoPE layers")
    chosen = known if layers is None else sorted(set(layers))
    if other := [layer for layer in chosen if layer not in known]:
        raise InterventionError(
            f"layer {other[0]} is not a NoPE layer, so it has no temperature: this model's NoPE layers are "
            + ", ".join(map(str, known))
        )
    decoder = _decoder(model)
    # The configuration says whether there is a growth to scale: a block around this one may have set it to 0.
    if not decoder.config.attn_temperature_tuning or not decoder.config.attn_scale:
        raise InterventionError(
            "this model has no temperature tuning to scale: its attn_temperature_tuning is "
            f"{decoder.config.attn_temperature_tuning} and its attn_scale {decoder.config.attn_scale}"
        )
    return [decoder.layers[layer].self_attn for layer in chosen]


def _decoder(model: LoadedModel | nn.Module) -> Llama4TextModel:
    return sites.text_model(model.model if isinstance(model, LoadedModel) else model)


def _check_scale(scale: Any) -> None:
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise InterventionError(f"scale is {scale!r}, it must be a finite number: 0 for off, 1 for unchanged")
