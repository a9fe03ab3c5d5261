"""Small Llama 4 models with random weights, of every shape that a recorder must cope with."""

from __future__ import annotations

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig

SHAPES = {
    "every layer MoE, top-1": dict(interleave_moe_layer_step=1, num_experts_per_tok=1, use_qk_norm=True),
    "every second layer MoE, top-1": dict(interleave_moe_layer_step=2, num_experts_per_tok=1, use_qk_norm=False),
    "every layer MoE, top-2": dict(interleave_moe_layer_step=1, num_experts_per_tok=2, use_qk_norm=True),
    "every third layer MoE, top-3": dict(interleave_moe_layer_step=3, num_experts_per_tok=3, use_qk_norm=False),
}


def text_config(**changes) -> Llama4TextConfig:
    values = dict(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=16,
        intermediate_size_mlp=24,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=6,
        attention_chunk_size=8,
        floor_scale=8,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # Wide enough that logits differ by more than rounding does.
        initializer_range=0.2,
    )
    return Llama4TextConfig(**(values | changes))


def random_model(seed: int = 0, **changes) -> Llama4ForCausalLM:
    torch.manual_seed(seed)
    return Llama4ForCausalLM(text_config(**changes)).eval()


def random_ids(*lengths: int, seed: int = 0, vocab_size: int = 160) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]
