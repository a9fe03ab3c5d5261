"""Llama 4's text model once more, written plainly: one token, one head, one expert at a time, in float32.

Nothing here calls transformers: it reads a state dict and a config, and is slow on purpose. Three releases of
transformers computed this model wrongly; this is what the recordings are checked against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PlainOutput:
    """``logits`` (n, vocabulary), and by MoE layer ``router_logits`` (n, expert) and ``chosen`` (n, slot)."""

    logits: Tensor
    router_logits: dict[int, Tensor]
    chosen: dict[int, list[list[int]]]


def forward(weights: dict[str, Tensor], config, token_ids: list[int]) -> PlainOutput:
    """One text through the model, without padding and without a cache."""
    weights = {name.removeprefix("model."): tensor.float() for name, tensor in weights.items()}
    hidden = weights["embed_tokens.weight"][token_ids]
    router_logits, chosen = {}, {}
    for layer in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"layers.{layer}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"layers.{layer}.")
        }
        normed = rms_norm(hidden, own["input_layernorm.weight"], config.rms_norm_eps)
        hidden = hidden + attention(own, config, layer, normed)
        normed = rms_norm(hidden, own["post_attention_layernorm.weight"], config.rms_norm_eps)
        if "feed_forward.router.weight" in own:
            router_logits[layer] = normed @ own["feed_forward.router.weight"].T
            out, chosen[layer] = mixture(own, config, normed, router_logits[layer])
        else:
            out = gated_mlp(
                normed,
                own["feed_forward.gate_proj.weight"].T,
                own["feed_forward.up_proj.weight"].T,
                own["feed_forward.down_proj.weight"].T,
            )
        hidden = hidden + out
    hidden = rms_norm(hidden, weights["norm.weight"], config.rms_norm_eps)
    return PlainOutput(hidden @ weights["lm_head.weight"].T, router_logits, chosen)


def rms_norm(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """Rotary position on one head's vector: neighbouring pairs (x0, x1) turn by position / theta^(pair / pairs)."""
    result = torch.empty_like(x)
    pairs = len(x) // 2
    for pair in range(pairs):
        angle = position / theta ** (pair / pairs)
        a, b = x[2 * pair], x[2 * pair + 1]
        result[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        result[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return result


def attention(own: dict[str, Tensor], config, layer: int, x: Tensor) -> Tensor:
    n, size = len(x), config.head_dim
    has_rope = (layer + 1) % 4 != 0
    query = (x @ own["self_attn.q_proj.weight"].T).view(n, config.num_attention_heads, size)
    key = (x @ own["self_attn.k_proj.weight"].T).view(n, config.num_key_value_heads, size)
    value = (x @ own["self_attn.v_proj.weight"].T).view(n, config.num_key_value_heads, size)
    share = config.num_attention_heads // config.num_key_value_heads
    out = torch.zeros(n, config.num_attention_heads, size)
    for head in range(config.num_attention_heads):
        queries = [prepared(query[i, head], i, has_rope, config) for i in range(n)]
        if not has_rope and config.attn_temperature_tuning:
            queries = [
                q * (1 + config.attn_scale * math.log1p(math.floor((i + 1) / config.floor_scale)))
                for i, q in enumerate(queries)
            ]
        keys = [prepared(key[j, head // share], j, has_rope, config) for j in range(n)]
        for i in range(n):
            first = i // config.attention_chunk_size * config.attention_chunk_size if has_rope else 0
            scores = torch.stack([queries[i] @ keys[j] for j in range(first, i + 1)]) / math.sqrt(size)
            out[i, head] = torch.softmax(scores, dim=0) @ value[first : i + 1, head // share]
    return out.reshape(n, -1) @ own["self_attn.o_proj.weight"].T


def prepared(vector: Tensor, position: int, has_rope: bool, config) -> Tensor:
    """A query or key as it enters the dot product, but for the temperature."""
    if not has_rope:
        return vector
    vector = rotate(vector, position, config.rope_parameters["rope_theta"])
    return rms_norm(vector, 1.0, config.rms_norm_eps) if config.use_qk_norm else vector


def gated_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = x @ gate
    return (gated * torch.sigmoid(gated) * (x @ up)) @ down


def mixture(own: dict[str, Tensor], config, x: Tensor, logits: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Shared expert, plus each chosen expert on the input times its sigmoid gate."""
    gate_up, down = own["feed_forward.experts.gate_up_proj"], own["feed_forward.experts.down_proj"]
    half = gate_up.shape[-1] // 2
    out = gated_mlp(
        x,
        own["feed_forward.shared_expert.gate_proj.weight"].T,
        own["feed_forward.shared_expert.up_proj.weight"].T,
        own["feed_forward.shared_expert.down_proj.weight"].T,
    )
    chosen = []
    for i in range(len(x)):
        ranked = sorted(range(len(logits[i])), key=lambda expert: -float(logits[i, expert]))
        chosen.append(ranked[: config.num_experts_per_tok])
        for expert in chosen[-1]:
            gate = 1 / (1 + math.exp(-float(logits[i, expert])))
            weights = gate_up[expert]
            out[i] += gated_mlp((x[i] * gate)[None], weights[:, :half], weights[:, half:], down[expert])[0]
    return out, chosen
