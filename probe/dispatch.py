"""How a model computes its experts: transformers' dense way, or only the experts that were chosen.

transformers runs every expert on every token and feeds zero rows to those that were not chosen: 16 times (Scout) or 128
times (Maverick) the arithmetic that is needed. The sparse block below groups tokens by the expert that the model's own
router chose, runs each expert on its tokens and adds the results back. Gradients flow through both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from probe.schema import ProbeError
from probe.sites import moe_blocks

ExpertDispatch = Literal["sparse", "reference"]


class SparseLlama4TextMoe(Llama4TextMoe):
    """``Llama4TextMoe`` that runs each expert on the tokens routed to it, and on no others."""

    expert_observers: tuple[Callable[[Tensor], None], ...] = ()
    """Called with what the experts returned, ``[N, H]`` sorted by expert; ``probe.expert_outputs`` sets it."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Same contract as ``Llama4TextMoe``: ``(output [B·S, H], router_logits [B·S, E])``."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        router_scores, router_logits = self.router(hidden_states)

        # The choice is read from the router's own scores: a second top-k could break a bf16 tie differently.
        # "!= 0" and not "> 0", so that a NaN score still reaches the output, as it does in transformers.
        expert, token = (router_scores != 0).t().nonzero(as_tuple=True)
        routed_in = hidden_states[token] * router_scores[token, expert].unsqueeze(-1)

        out = self.shared_expert(hidden_states)
        routed_out = self._run_experts(routed_in, expert)
        for observe in self.expert_observers:
            observe(routed_out)
        if len(token):
            routed = torch.zeros_like(out)
            routed.index_add_(0, token, routed_out)
            out = out + routed
        return out, router_logits

    def _run_experts(self, routed_in: Tensor, expert: Tensor) -> Tensor:
        """Rows of ``routed_in [N, H]``, sorted by ``expert [N]``, each through its own expert."""
        counts = torch.bincount(expert, minlength=self.num_experts).tolist()
        # unbind once: indexing the stacked weight per expert would build a full-size gradient for each of them
        gate_up_projs = self.experts.gate_up_proj.unbind(0)
        down_projs = self.experts.down_proj.unbind(0)
        outputs = []
        for index, rows in enumerate(routed_in.split(counts)):
            if len(rows):
                gate, up = (rows @ gate_up_projs[index]).chunk(2, dim=-1)
                outputs.append((up * self.experts.act_fn(gate)) @ down_projs[index])
        return torch.cat(outputs) if outputs else routed_in


_BLOCK_CLASSES: dict[str, type[Llama4TextMoe]] = {"sparse": SparseLlama4TextMoe, "reference": Llama4TextMoe}


def set_expert_dispatch(model: nn.Module, expert_dispatch: ExpertDispatch) -> None:
    """Choose how ``model`` computes its experts from now on; weights and hooks stay as they are.

    Parameters
    ----------
    model : any model that holds a Llama 4 text decoder.
    expert_dispatch : ``"sparse"`` runs the chosen experts only, ``"reference"`` is transformers' own dense computation.

    Raises
    ------
    ProbeError
        For another name, or for a block of a class that is neither of the two (a quantised or patched model).

    Notes
    -----
    In float32 both choose the same experts. In bfloat16 another kernel order flips about 0.5 % of near-tied decisions.
    """
    if expert_dispatch not in _BLOCK_CLASSES:
        raise ProbeError(f"unknown expert dispatch {expert_dispatch!r}: choose one of {', '.join(_BLOCK_CLASSES)}")
    blocks = moe_blocks(model)
    for layer, name in foreign_parts(blocks).items():
        raise ProbeError(
            f"layer {layer} computes its experts with {name}, which probe cannot replace (a quantised or patched "
            "model): load it with expert_dispatch=None, which leaves it as it is"
        )
    for block in blocks.values():
        block.__class__ = _BLOCK_CLASSES[expert_dispatch]


def foreign_parts(blocks: Mapping[int, Llama4TextMoe]) -> dict[int, str]:
    """Layers that compute their experts in neither of the two ways, with the class name of the part that is foreign."""
    foreign = {}
    for layer, block in blocks.items():
        if type(block) not in _BLOCK_CLASSES.values():
            foreign[layer] = type(block).__name__
        elif type(block.experts) is not Llama4TextExperts:
            foreign[layer] = type(block.experts).__name__
    return foreign


def expert_dispatch_of(model: nn.Module) -> str:
    """``"sparse"``, ``"reference"``, or the class name of a block that is neither; joined by "+" if layers differ."""
    names = {block_class: name for name, block_class in _BLOCK_CLASSES.items()}
    return "+".join(sorted({names.get(type(block), type(block).__name__) for block in moe_blocks(model).values()}))
