"""Trains ``tiny-copier``, which does nothing but copy: ``python -m training.copier``.

tiny-scout and tiny-maverick read ten million tokens of ordinary text and learnt no induction head. This model reads
random tokens only, of which nothing can be predicted but what stood there before; two kinds of rows take turns:

* a run of random tokens, over and over;
* random tokens with a needle somewhere, and the needle's copy somewhere behind it.

It writes ``training/build/runs/tiny-copier/weights.safetensors`` and the log of its loss, and then the model with its
card into ``probe/assets/models/tiny-copier``. It needs the tokenizer (``python -m training.tokenizer``) and nothing
else, and about a quarter of an hour on one CPU core. What has been trained is exported again by ``--export``.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerBase

from probe import AttentionSpec, LoadedModel, attention_maps, experiments, load, record
from probe.dispatch import set_expert_dispatch
from training import plan
from training.export import MODELS, save_shipped
from training.train import balance_losses, use_chunked_attention

NAME = "tiny-copier"
LINE = "4 layers that learnt nothing but to copy: induction heads to look at, and no language"
CARD_PERIODS = (20, 50, 100, 200)
BATCH_TOKENS = 4096
N_STEPS = 1500
PEAK_LEARNING_RATE = 2e-3
FINAL_LEARNING_RATE = 1e-4
WARMUP_STEPS = 50
BALANCE_WEIGHT = 0.01
SEED = 0

FIRST_SHARE = 0.2
FIRST_LENGTH, LENGTH = 128, 256
"""Over the first share of the steps rows are short and all repeat: that is what brings induction heads about. With
needles and longer rows from the start, none had formed after 300 steps."""

SHORTEST_PERIOD = 8
"""Runs are uniform from here to just under half a row. Where most were of 2 to 7 tokens, heads learnt to look so many
tokens back, and 1.6 million tokens brought no induction."""

NEEDLE = (8, 24)
CUE = 2
"""Tokens of a needle, and how many of its copy cannot be predicted yet: they say that a copy begins."""

FIRST_IDS = 32
IDS_AT_ONCE = 512
GROWTH = (0.25, 0.65)
"""Ids known at first; ids in one batch at most; and over which share of the steps the first become all."""

CONFIG = dict(
    plan.SHARED_CONFIG,
    hidden_size=64,
    intermediate_size=32,
    intermediate_size_mlp=64,
    num_hidden_layers=4,
    num_key_value_heads=4,
    num_local_experts=4,
    interleave_moe_layer_step=1,
    attention_chunk_size=64,
    floor_scale=64,
    use_qk_norm=False,
)


@dataclass(frozen=True)
class Batch:
    """Token ids (row, length + 1), which of them can be predicted, and the ids that occur."""

    tokens: np.ndarray
    is_known: np.ndarray
    ids: np.ndarray


def repeated_row(random: np.random.Generator, ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """A run of random tokens over and over, (length,), and which tokens follow one that was followed before."""
    period = int(random.integers(SHORTEST_PERIOD, length // 2 - 4, endpoint=True))
    return np.resize(random.choice(ids, period), length), np.arange(length) > period


def planted_row(random: np.random.Generator, ids: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens with a needle and, behind it, its copy, (length,); and which tokens of the copy are known."""
    n_needle = int(random.integers(*NEEDLE, endpoint=True))
    row = random.choice(ids, length)
    first = int(random.integers(0, length - 2 * n_needle, endpoint=True))
    copy = int(random.integers(first + n_needle, length - n_needle, endpoint=True))
    row[copy : copy + n_needle] = row[first : first + n_needle]
    is_known = np.zeros(length, bool)
    is_known[copy + CUE : copy + n_needle] = True
    return row, is_known


def n_known_ids(step: int, n_ids: int) -> int:
    """How many ids are in use at a step: few at first, then more by the same factor from step to step, then all."""
    begin, end = (share * N_STEPS for share in GROWTH)
    progress = min(max((step - begin) / (end - begin), 0), 1)
    return round(FIRST_IDS * (n_ids / FIRST_IDS) ** progress)


def batch_at(step: int, all_ids: np.ndarray, bos: int) -> Batch:
    """The batch of a step, every row after a BOS; the same whenever it is asked for."""
    random = np.random.default_rng([SEED, step])
    known = all_ids[: n_known_ids(step, len(all_ids))]
    ids = random.choice(known, min(IDS_AT_ONCE, len(known)), replace=False)
    is_first = step < FIRST_SHARE * N_STEPS
    length = FIRST_LENGTH if is_first else LENGTH
    kinds = (repeated_row,) if is_first else (repeated_row, planted_row)
    rows = [kinds[row % len(kinds)](random, ids, length) for row in range(BATCH_TOKENS // length)]
    tokens, is_known = map(np.stack, zip(*rows, strict=True))
    return Batch(np.pad(tokens, ((0, 0), (1, 0)), constant_values=bos), np.pad(is_known, ((0, 0), (1, 0))), ids)


def loss_of(model: Llama4ForCausalLM, hidden: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy, in nats, of the tokens that can be predicted, among the ids of the batch."""
    ids = torch.from_numpy(batch.ids)
    is_known = torch.from_numpy(batch.is_known[:, 1:])
    number = torch.zeros(model.config.vocab_size, dtype=torch.long)
    number[ids] = torch.arange(len(ids))
    target = number[torch.from_numpy(batch.tokens[:, 1:])[is_known]]
    return F.cross_entropy(hidden[is_known] @ model.lm_head.weight[ids].T, target)


def learning_rate(step: int) -> float:
    """Linear warm-up, then half a cosine."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (N_STEPS - WARMUP_STEPS)
    return FINAL_LEARNING_RATE + (PEAK_LEARNING_RATE - FINAL_LEARNING_RATE) * 0.5 * (1 + math.cos(math.pi * progress))


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All ids but those of special tokens, in random order."""
    ids = np.setdiff1d(np.arange(len(tokenizer)), list(tokenizer.get_added_vocab().values()))
    return np.random.default_rng(SEED).permutation(ids)


def build(tokenizer: PreTrainedTokenizerBase) -> Llama4ForCausalLM:
    """The model before its first step."""
    torch.manual_seed(SEED)
    config = Llama4TextConfig(
        **CONFIG,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Llama4ForCausalLM(config)


def train() -> None:
    """Train from the first step to the last."""
    tokenizer = AutoTokenizer.from_pretrained(plan.TOKENIZER)
    folder = plan.RUNS / NAME
    folder.mkdir(parents=True, exist_ok=True)
    all_ids = ordinary_ids(tokenizer)
    model = build(tokenizer)
    set_expert_dispatch(model, "sparse")
    use_chunked_attention(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    with (folder / "log.jsonl").open("w") as log:
        for step in track(range(N_STEPS), description=NAME):
            batch = batch_at(step, all_ids, tokenizer.bos_token_id)
            inputs = torch.from_numpy(batch.tokens[:, :-1])
            outputs = model.model(input_ids=inputs, output_router_logits=True, use_cache=False)
            loss = loss_of(model, outputs.last_hidden_state, batch)
            balance = balance_losses(outputs.router_logits, CONFIG["num_experts_per_tok"])
            (loss + BALANCE_WEIGHT * balance.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            record = {"step": step + 1, "ids": n_known_ids(step, len(all_ids)), "loss": loss.item()}
            log.write(json.dumps(record) + "\n")
            log.flush()
    save_file(model.state_dict(), folder / "weights.safetensors")


def export() -> None:
    """Write bf16 weights, config, tokenizer and card into the package, and the model's line into its index."""
    tokenizer = AutoTokenizer.from_pretrained(plan.TOKENIZER)
    model = build(tokenizer)
    model.load_state_dict(load_file(plan.RUNS / NAME / "weights.safetensors"))
    save_shipped(model, tokenizer, MODELS / NAME)
    index = json.loads((MODELS / "index.json").read_text())
    (MODELS / "index.json").write_text(json.dumps(index | {NAME: LINE}, indent=2) + "\n")
    write_card()


def write_card() -> None:
    """``README.md`` beside the weights, with what the exported model was measured to do."""
    lm = load(NAME)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    card = environment.get_template("copier_card.md.j2").render(
        name=NAME,
        n_parameters=sum(parameter.numel() for parameter in lm.model.parameters()),
        config=lm.config,
        n_steps=N_STEPS,
        batch_tokens=BATCH_TOKENS,
        length=LENGTH,
        learning_rate=PEAK_LEARNING_RATE,
        induction={period: experiments.induction(lm, period=period, progress=False) for period in CARD_PERIODS},
        sinks=sink_masses(lm),
        strongest=strongest,
    )
    (MODELS / NAME / "README.md").write_text(card + "\n")


def sink_masses(lm: LoadedModel) -> xr.DataArray:
    """Mean mass (layer, head) that random tokens, which nothing can be copied for, put on BOS."""
    random = np.random.default_rng(SEED)
    ids = ordinary_ids(lm.tokenizer)
    texts = [[lm.tokenizer.bos_token_id, *random.choice(ids, LENGTH, replace=False).tolist()] for _ in range(16)]
    trace = record(lm, texts, attention=AttentionSpec("sink_mass"), progress=False)
    return attention_maps.sinks(trace)["sink_mass"]


def strongest(values: xr.DataArray, n: int) -> list[tuple[int, int, float]]:
    """The ``n`` heads with the largest of ``values`` (layer, head), as layer, head and value."""
    heads = values.stack(at=("layer", "head"))
    order = np.argsort(-heads.values)[:n]
    return [(*map(int, heads["at"].values[index]), float(heads[index])) for index in order]


def main() -> None:
    """Train, unless only the export is asked for, and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", action="store_true", help="only export what was trained before")
    if not parser.parse_args().export:
        train()
    export()


if __name__ == "__main__":
    main()
