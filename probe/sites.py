"""Where a live Llama 4 keeps its routers and experts, whatever wraps it.

Everything that hooks or replaces a part of a model asks here for the part, so that one place knows the module tree of
transformers' Llama 4 (see its ``modeling_llama4.py``).
"""

from __future__ import annotations

from torch import nn
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM, Llama4TextModel, Llama4TextMoe

from probe.schema import ProbeError


class NotLlama4Error(ProbeError):
    """The object holds no Llama 4 text model, or more than one."""


def text_model(model: nn.Module) -> Llama4TextModel:
    """The one Llama 4 text decoder inside ``model``.

    Parameters
    ----------
    model : ``Llama4ForCausalLM``, ``Llama4TextModel``, ``Llama4ForConditionalGeneration`` or a module that wraps one.

    Raises
    ------
    NotLlama4Error
        If there is none, or if there are several and the choice would be a guess.
    """
    found = [module for module in model.modules() if isinstance(module, Llama4TextModel)]
    if len(found) != 1:
        kind = type(model).__name__
        raise NotLlama4Error(
            f"{kind} holds {len(found)} Llama 4 text models, expected exactly one: pass a Llama4ForCausalLM, "
            "a Llama4TextModel or a Llama4ForConditionalGeneration of transformers"
        )
    return found[0]


def moe_blocks(model: nn.Module) -> dict[int, Llama4TextMoe]:
    """The mixture-of-experts blocks by decoder layer index; dense layers are absent, indices are never renumbered."""
    blocks = {
        index: layer.feed_forward
        for index, layer in enumerate(text_model(model).layers)
        if isinstance(layer.feed_forward, Llama4TextMoe)
    }
    if not blocks:
        raise NotLlama4Error(f"{type(model).__name__} has no mixture-of-experts layer: there is no routing to look at")
    return blocks


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that turns hidden states into logits over the vocabulary; None for a model without one."""
    for module in model.modules():
        if isinstance(module, Llama4ForCausalLM):
            return module.lm_head
    return None
