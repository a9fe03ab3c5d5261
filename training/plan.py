"""What is trained: one ``Arm`` per model, and the sizes that all of them share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUILD = Path("training/build")
CORPUS = BUILD / "corpus"
TOKENIZER = BUILD / "tokenizer"
RUNS = BUILD / "runs"

CONTEXT = 512
"""Tokens in a training row: four attention chunks."""

BATCH_ROWS = 8
PEAK_LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE = 1e-4
WARMUP_SHARE = 0.02
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0

SHARED_CONFIG: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=48,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
    # The published models use a base of 500,000 for heads of 128; a head of 32 with chunks of 128 tokens needs less.
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    attention_chunk_size=128,
    floor_scale=128,
    attn_scale=0.1,
    attn_temperature_tuning=True,
    num_experts_per_tok=1,
)
SCOUT_CONFIG = dict(
    SHARED_CONFIG, num_local_experts=16, interleave_moe_layer_step=1, use_qk_norm=True, intermediate_size_mlp=96
)
MAVERICK_CONFIG = dict(
    SHARED_CONFIG, num_local_experts=32, interleave_moe_layer_step=2, use_qk_norm=False, intermediate_size_mlp=96
)


@dataclass(frozen=True)
class Arm:
    """One model to train.

    ``balance_weight`` multiplies the Switch balance loss of every layer; ``save_at`` lists the shares of training, in
    per cent, whose weights are kept as well.
    """

    name: str
    config: dict[str, Any]
    n_tokens: int
    balance_weight: float
    seed: int = 0
    save_at: tuple[int, ...] = field(default=())

    @property
    def n_steps(self) -> int:
        """Optimiser steps in the whole run."""
        return self.n_tokens // (BATCH_ROWS * CONTEXT)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("tiny-scout", SCOUT_CONFIG, 10_000_000, balance_weight=0.01, save_at=(1, 5, 20, 50)),
        Arm("tiny-maverick", MAVERICK_CONFIG, 10_000_000, balance_weight=0.01),
        Arm("no-balance-0", SCOUT_CONFIG, 1_600_000, balance_weight=0.0, seed=0),
        Arm("no-balance-1", SCOUT_CONFIG, 1_600_000, balance_weight=0.0, seed=1),
        Arm("no-balance-2", SCOUT_CONFIG, 1_600_000, balance_weight=0.0, seed=2),
    )
}
