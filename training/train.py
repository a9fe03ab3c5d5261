"""Trains the tiny models with transformers' own ``Llama4ForCausalLM``: ``python -m training.train [ARM…]``.

Each arm writes to ``training/build/runs/<arm>/``: ``state.safetensors`` and ``state.json`` to resume from,
``log.jsonl`` with the curves, ``weights-<per cent>.safetensors`` where the plan asks for them, ``weights.safetensors``
at the end.
Stop it at any time; the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerBase
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from probe.dispatch import set_expert_dispatch
from training import plan
from training.plan import Arm
from training.rows import pieces, read_documents, training_rows

SAVE_EVERY = 100
EVALUATE_EVERY = 100
HELDOUT_ROWS = 32


def build_config(arm: Arm, tokenizer: PreTrainedTokenizerBase) -> Llama4TextConfig:
    """The arm's config with the tokenizer's vocabulary and special tokens."""
    return Llama4TextConfig(
        **arm.config,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def use_chunked_attention(model: Llama4ForCausalLM) -> None:
    """Compute RoPE layers chunk by chunk: the same numbers as the chunked mask, a quarter of the work at four chunks.

    Only right for rows without padding whose length is a multiple of the chunk.
    """

    def attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
        batch, _, length, head_dim = query.shape
        chunk = module.config.attention_chunk_size
        if not module.use_rope or length <= chunk:
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            return out.transpose(1, 2), None
        n_chunks = length // chunk

        def split(states: Tensor) -> Tensor:
            chunks = states.reshape(batch, -1, n_chunks, chunk, head_dim).transpose(1, 2)
            return chunks.reshape(batch * n_chunks, -1, chunk, head_dim)

        out = F.scaled_dot_product_attention(
            split(query), split(key), split(value), is_causal=True, scale=scaling, enable_gqa=True
        )
        out = out.reshape(batch, n_chunks, -1, chunk, head_dim).permute(0, 1, 3, 2, 4)
        return out.reshape(batch, length, -1, head_dim), None

    AttentionInterface.register("training_chunked", attend)
    AttentionMaskInterface.register("training_chunked", lambda *args, **kwargs: None)
    model.set_attn_implementation("training_chunked")


def balance_losses(router_logits: tuple[Tensor, ...], top_k: int) -> Tensor:
    """Switch's balance loss per MoE layer, E · Σ_e f_e · P_e: 1 when the load is even (Fedus et al. 2022, Eq. 4–6)."""
    losses = []
    for logits in router_logits:
        logits = logits.float()
        n_experts = logits.shape[-1]
        chosen = logits.topk(top_k, dim=-1).indices
        load = torch.bincount(chosen.flatten(), minlength=n_experts) / chosen.numel()
        losses.append(n_experts * (load * logits.softmax(dim=-1).mean(dim=0)).sum())
    return torch.stack(losses)


def learning_rate(step: int, n_steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warmup = max(1, round(plan.WARMUP_SHARE * n_steps))
    if step < warmup:
        return plan.PEAK_LEARNING_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, n_steps - warmup)
    span = plan.PEAK_LEARNING_RATE - plan.FINAL_LEARNING_RATE
    return plan.FINAL_LEARNING_RATE + span * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model: Llama4ForCausalLM) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices, and none on norms."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": plan.WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def save_state(folder: Path, step: int, model: Llama4ForCausalLM, optimizer: torch.optim.AdamW) -> None:
    """Everything that the next step needs; written beside the old state and swapped in: a kill loses nothing."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    save_file(tensors, folder / "state.new", metadata={"step": str(step)})
    (folder / "state.new").replace(folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps({"step": step}))


def load_state(folder: Path, model: Llama4ForCausalLM, optimizer: torch.optim.AdamW) -> int:
    """The step to go on from; 0 for a new run."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    tensors = load_file(path)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        device = parameter.device
        optimizer.state[parameter] = {key: v if key == "step" else v.to(device) for key, v in moments.items()}
    return json.loads((folder / "state.json").read_text())["step"]


@torch.no_grad()
def heldout_loss(model: Llama4ForCausalLM, rows: Tensor) -> float:
    """Mean next-token loss on held-out rows, nats per token."""
    model.eval()
    losses = [next_token_loss(model(input_ids=batch[:, :-1]).logits, batch).item() for batch in rows.split(8)]
    model.train()
    return float(np.mean(losses))


def next_token_loss(logits: Tensor, rows: Tensor) -> Tensor:
    """Mean cross entropy in nats; ``rows`` has one more column than ``logits`` has positions."""
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def train(arm: Arm, *, device: str, progress: Progress) -> None:
    """Train one arm to its end, from its last saved state if there is one."""
    folder = plan.RUNS / arm.name
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "weights.safetensors").exists():
        progress.console.print(f"{arm.name}: finished earlier")
        return

    tokenizer = AutoTokenizer.from_pretrained(plan.TOKENIZER)
    row_length = plan.CONTEXT + 1
    corpus = {
        split: {
            domain: pieces(texts, tokenizer, row_length)
            for domain, texts in read_documents(plan.CORPUS / split).items()
        }
        for split in ("train", "heldout")
    }
    n_rows = arm.n_steps * plan.BATCH_ROWS
    rows = torch.from_numpy(training_rows(corpus["train"], n_rows=n_rows, length=row_length, seed=arm.seed)).long()
    heldout = training_rows(corpus["heldout"], n_rows=HELDOUT_ROWS, length=row_length, seed=0)
    heldout_rows = torch.from_numpy(heldout).long().to(device)

    torch.manual_seed(arm.seed)
    model = Llama4ForCausalLM(build_config(arm, tokenizer)).to(device)
    set_expert_dispatch(model, "sparse")
    use_chunked_attention(model)
    optimizer = build_optimizer(model)
    start = load_state(folder, model, optimizer)
    save_points = {max(1, round(arm.n_steps * percent / 100)): percent for percent in arm.save_at}

    task = progress.add_task(arm.name, total=arm.n_steps, completed=start, loss=float("nan"))
    clock = time.perf_counter()
    with (folder / "log.jsonl").open("a") as log:
        for step in range(start, arm.n_steps):
            batch = rows[step * plan.BATCH_ROWS : (step + 1) * plan.BATCH_ROWS].to(device)
            outputs = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
            loss = next_token_loss(outputs.logits, batch)
            balance = balance_losses(outputs.router_logits, arm.config["num_experts_per_tok"])
            (loss + arm.balance_weight * balance.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), plan.GRADIENT_NORM)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, arm.n_steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            progress.update(task, completed=done, loss=loss.item())
            if done in save_points:
                save_file(model.state_dict(), folder / f"weights-{save_points[done]}.safetensors")
            if done % EVALUATE_EVERY == 0 or done == arm.n_steps:
                seconds, clock = time.perf_counter() - clock, time.perf_counter()
                record = {
                    "step": done,
                    "tokens": done * plan.BATCH_ROWS * plan.CONTEXT,
                    "loss": loss.item(),
                    "heldout_loss": heldout_loss(model, heldout_rows),
                    "balance": [round(value, 4) for value in balance.tolist()],
                    "seconds": round(seconds, 1),
                }
                log.write(json.dumps(record) + "\n")
                log.flush()
            if done % SAVE_EVERY == 0 and done < arm.n_steps:
                save_state(folder, done, model, optimizer)
    save_file(model.state_dict(), folder / "weights.safetensors")
    for leftover in ("state.safetensors", "state.json"):
        (folder / leftover).unlink(missing_ok=True)


def main() -> None:
    """Train the arms named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "arms", nargs="*", metavar="ARM", help=f"of {', '.join(plan.ARMS)}; all of them if none is named"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    names = arguments.arms or list(plan.ARMS)
    if unknown := [name for name in names if name not in plan.ARMS]:
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(plan.ARMS)}")
    if not plan.TOKENIZER.exists():
        parser.error("no tokenizer yet: run `python -m training.corpus` and `python -m training.tokenizer` first")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        for name in names:
            train(plan.ARMS[name], device=arguments.device, progress=progress)


if __name__ == "__main__":
    main()
