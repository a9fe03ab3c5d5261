"""What a router and an output head returned, reduced on the model's device to what a recording keeps.

Tensors in, tensors out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probe import schema

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


def real_tokens(attention_mask: Any, token_ids: Tensor, n_past: int) -> Tensor:
    """Which of the new positions (B, n) are tokens and not padding."""
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask["full_attention"]
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
