"""What routers, experts and an output head returned, reduced on the model's device to what a recording keeps.

Tensors in, tensors out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe import schema
from probe.attention_interface import AttentionSpan

LOSS_TILE = 1024
"""Tokens whose logits over the whole vocabulary are held at once."""


def reduce_router(scores: Tensor, logits: Tensor, top_k: int, all_logits: bool = False) -> dict[str, Tensor]:
    """One router's output on T tokens, reduced to what a recording keeps.

    Parameters
    ----------
    scores, logits : (T, E) as ``Llama4Router`` returns them; scores are exactly 0 for an expert that was not chosen.

    Returns
    -------
    ``expert_index`` and ``router_logit`` (T, top_k), ``router_margin`` and ``logit_logsumexp`` (T,), and, where there
    is an expert that was not chosen, ``runner_up_index`` (T,).
    """
    n_experts = logits.shape[-1]
    logits = logits.float()
    lowest = torch.finfo(logits.dtype).min
    # Who was chosen is read from the scores: a second top-k on bf16 logits could break a tie the other way. A score
    # can still be 0 for a chosen expert when its sigmoid underflows; those rows fall back on the logits.
    is_chosen = scores != 0
    complete = is_chosen.sum(dim=-1, keepdim=True) == top_k
    ranked = torch.where(is_chosen | ~complete, logits, lowest)
    router_logit, expert_index = ranked.topk(top_k, dim=-1)
    dtype = getattr(torch, schema.expert_dtype(n_experts).name)
    reduced = {
        "expert_index": expert_index.to(dtype),
        "router_logit": router_logit.half(),
        "router_margin": torch.full(logits.shape[:1], torch.nan, dtype=torch.half, device=logits.device),
        "logit_logsumexp": logits.logsumexp(dim=-1),
    }
    if top_k < n_experts:
        best_other, runner_up_index = logits.scatter(-1, expert_index, lowest).max(dim=-1)
        reduced["runner_up_index"] = runner_up_index.to(dtype)
        reduced["router_margin"] = (router_logit[:, -1] - best_other).half()
    if all_logits:
        reduced["all_logits"] = logits.half()
    return reduced


def reduce_experts(outputs: Tensor, scores: Tensor) -> dict[str, Tensor]:
    """What one layer's experts returned for T tokens, reduced to two numbers for each of N assignments.

    Parameters
    ----------
    outputs : (N, H), the rows of the assignments, sorted by expert and then by token; or (E·T, H), every expert on
        every token, as ``Llama4TextExperts`` returns them.
    scores : (T, E) as ``Llama4Router`` returns them; exactly 0 for an expert that was not chosen.

    Returns
    -------
    ``expert`` and ``token``, integers (N,); ``norm``, the L2 norm of what the expert returned, and ``largest``, its
    largest absolute value, both float32 (N,).
    """
    expert, token = (scores != 0).t().nonzero(as_tuple=True)
    if len(outputs) != len(token):
        outputs = outputs[expert * len(scores) + token]
    # The norm of bf16 values would have bf16's 8 bits, and squares of fp16 values overflow from 256 on.
    wide = torch.promote_types(outputs.dtype, torch.float32)
    return {
        "expert": expert,
        "token": token,
        "norm": torch.linalg.vector_norm(outputs, dim=-1, dtype=wide).float(),
        "largest": torch.linalg.vector_norm(outputs, ord=torch.inf, dim=-1).float(),
    }


def expert_totals(layers: Sequence[dict[str, Tensor]], is_real: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """What experts returned in a forward of B rows of n positions, reduced to two numbers for each row and expert.

    Parameters
    ----------
    layers : what :func:`reduce_experts` returned for each layer.
    is_real : (B, n), which positions are tokens and not padding.

    Returns
    -------
    Sum of ``norm``, float64, and largest ``largest``, float32, both (B, layer, E) and on the CPU; 0 for an expert that
    no token of the row went to.
    """
    n_rows, n_positions = is_real.shape
    # Summed on the CPU: not every device has float64, and some add in another order each time.
    norm_sum = torch.zeros(n_rows, len(layers), n_experts, dtype=torch.float64)
    highest = torch.zeros(n_rows, len(layers), n_experts)
    for layer, reduced in enumerate(layers):
        own = is_real.flatten().to(reduced["token"].device)[reduced["token"]]
        expert, token, norm, largest = (reduced[name][own].cpu() for name in ("expert", "token", "norm", "largest"))
        cell = (token // n_positions * len(layers) + layer) * n_experts + expert
        norm_sum.view(-1).index_add_(0, cell, norm.double())
        highest.view(-1).scatter_reduce_(0, cell, largest, "amax")
    return norm_sum, highest


def real_tokens(attention_mask: Any, token_ids: Tensor, n_past: int) -> Tensor:
    """Which of the new positions (B, n) are tokens and not padding."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
    if isinstance(attention_mask, AttentionSpan):
        attention_mask = attention_mask.is_token
    if attention_mask is None:
        return torch.ones(token_ids.shape, dtype=torch.bool, device=token_ids.device)
    n_new = token_ids.shape[1]
    if attention_mask.ndim == 2:
        return attention_mask[:, n_past : n_past + n_new].bool()
    # generate() made it for a static cache: a padding key is hidden from the last query, which is always a token.
    visible = attention_mask[:, 0, -1, n_past : n_past + n_new]
    return visible if visible.dtype == torch.bool else visible == 0


def next_token_losses(head: nn.Module, hidden: Tensor, token_ids: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of the next token and the predicted one, computed for ``LOSS_TILE`` tokens at a time.

    Parameters
    ----------
    head : from hidden states to logits over the vocabulary.
    hidden : (T, H), the final hidden states of the real tokens of a batch, row after row.
    token_ids, row : (T,), each token's id and the row of the batch that it stands in.

    Returns
    -------
    Loss in nats, float32 (T,), NaN at the last token of a row; and the most likely next id (T,).
    """
    row = row.to(hidden.device)
    losses = torch.full(token_ids.shape, torch.nan, dtype=torch.float32, device=hidden.device)
    predicted = torch.empty_like(token_ids)
    for start in range(0, len(token_ids), LOSS_TILE):
        tile = slice(start, start + LOSS_TILE)
        logits = head(hidden[tile]).float()
        predicted[tile] = logits.argmax(dim=-1)
        target = token_ids[start + 1 : start + 1 + len(logits)]
        losses[start : start + len(target)] = F.cross_entropy(logits[: len(target)], target, reduction="none")
    # What follows the last token of a row stands in another row.
    losses[:-1][row[1:] != row[:-1]] = torch.nan
    return losses, predicted
