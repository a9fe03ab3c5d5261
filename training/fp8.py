"""Does FP8 training break a small mixture-of-experts model? ``python -m training.fp8 [RUN…]`` trains and measures.

``tiny-scout``'s architecture with fewer layers, trained several times per seed; the arms differ in nothing but how the
operands of matrix products are rounded, forward and backward. Weights, optimiser, sums and everything between the
products stay float32. Each run writes to ``training/build/runs/fp8/<arm>-<seed>/``: a state to resume from,
``log.jsonl``, and ``weights.safetensors`` at the end. The numbers of the seeds that are finished in every arm go to
``training/fp8_results.json``; ``--collect`` only does that.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Llama4ForCausalLM
from transformers.models.llama4.modeling_llama4 import (
    Llama4Router,
    Llama4TextDecoderLayer,
    Llama4TextMLP,
    Llama4TextMoe,
)

from probe.dispatch import SparseLlama4TextMoe, set_expert_dispatch
from probe.float8 import Rounding, Scaling, round_trip
from probe.recipes import Recipe, resolve
from probe.schema import ProbeError
from probe.sites import output_head, text_model
from training import plan, train
from training.rows import pieces, read_documents, training_rows

RESULTS = Path("training/fp8_results.json")

SEEDS = (0, 1, 2)
N_LAYERS = 4
CONTEXT = 256
"""Tokens in a training row: two attention chunks."""
BATCH_ROWS = 4
N_STEPS = 750
BALANCE_WEIGHT = 0.01
LOG_EVERY = 10
EVALUATE_EVERY = 150
SAVE_EVERY = 50
"""A multiple of ``LOG_EVERY``, so that no mean in the log spans a stop."""
HELDOUT_ROWS = 32
RECORDED_KINDS = ("attention", "router", "routed_experts", "shared_expert")
"""Kinds of matrices in this architecture's layers, as ``probe.recipes`` calls them."""


# How the operands of a matrix product are rounded.

Round = Callable[[Tensor], Tensor]


def unrounded(x: Tensor) -> Tensor:
    """``x`` itself."""
    return x


def bf16_round_trip(x: Tensor) -> Tensor:
    """``x`` rounded to bfloat16, in its own dtype."""
    return x.to(torch.bfloat16).to(x.dtype)


@dataclass(frozen=True)
class Operands:
    """How the operands of one module's matrix products are rounded.

    ``any_layout`` says that rounding a transposed matrix gives the transposed rounded matrix: true of formats without
    scales and of one scale per tensor, false of scales per row or block.
    """

    weight: Round
    activation: Round
    gradient: Round
    any_layout: bool


FLOAT32 = Operands(unrounded, unrounded, unrounded, any_layout=True)
BF16 = Operands(bf16_round_trip, bf16_round_trip, bf16_round_trip, any_layout=True)


def recipe_operands(recipe: Recipe) -> Operands:
    """The operands of a module that ``recipe`` covers; what it does not round is bf16.

    Parameters
    ----------
    recipe : of ``probe.recipes``; its ``gradient`` rounds what comes back from the module's output.
    """
    roundings = (recipe.weight, recipe.activation, recipe.gradient)
    weight, activation, gradient = (
        bf16_round_trip if rounding is None else partial(round_trip, rounding=rounding) for rounding in roundings
    )
    granularities = {rounding.scaling.granularity for rounding in roundings if rounding is not None}
    return Operands(weight, activation, gradient, any_layout=granularities <= {"tensor"})


class RoundedProduct(torch.autograd.Function):
    """``x [N, in] @ weight.T``, ``weight [out, in]``, from rounded operands, and its gradients from rounded operands.

    The three products contract three different axes: y = x·Wᵀ over ``in``, dx = dy·W over ``out``, dW = dyᵀ·x over the
    tokens. A scale can only be taken out of a sum that it is constant over, so that a scale per row must be one per
    row of the operand laid out with the contracted axis last. A weight, an input and a gradient that were rounded by
    rows for one product are therefore rounded again, from the unrounded values and by columns, for the other, as FP8
    kernels do (Micikevicius et al. 2022, arXiv 2209.05433, for the formats).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operands: Operands) -> Tensor:
        """The product; keeps what the two products of the backward pass need."""
        rounded_x, rounded_weight = operands.activation(x), operands.weight(weight)
        ctx.operands = operands
        if operands.any_layout:
            ctx.save_for_backward(rounded_x, rounded_weight)
        else:
            ctx.save_for_backward(x, weight)
        return rounded_x @ rounded_weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of ``x`` and of ``weight``."""
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        operands = ctx.operands
        if operands.any_layout:
            rounded = operands.gradient(gradient)
            return rounded @ weight, rounded.T @ x, None
        gradient_x = operands.gradient(gradient) @ operands.weight(weight.T).T
        gradient_weight = operands.gradient(gradient.T) @ operands.activation(x.T).T
        return gradient_x, gradient_weight, None


# A live model whose products are rounded.

Observe = Callable[[Tensor, Tensor], None]


class RoundedLinear(nn.Linear):
    """A linear layer whose products are ``RoundedProduct``; ``observe`` is called with input and output."""

    operands: Operands = FLOAT32
    observe: Observe | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Same contract as ``nn.Linear``."""
        x = input.flatten(0, -2)
        y = RoundedProduct.apply(x, self.weight, self.operands)
        if self.observe is not None:
            self.observe(x, y)
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, input.shape[:-1])


class RoundedRouter(Llama4Router, RoundedLinear):
    """Llama 4's router, which calls its parent class for the logits: here ``RoundedLinear``."""


class RoundedMoe(SparseLlama4TextMoe):
    """The sparse block with experts whose products are ``RoundedProduct``: scales are each expert's own."""

    operands: Operands = FLOAT32
    observe: Observe | None = None

    def _run_experts(self, routed_in: Tensor, expert: Tensor) -> Tensor:
        """Rows of ``routed_in [N, H]``, sorted by ``expert [N]``, each through its own expert."""
        counts = torch.bincount(expert, minlength=self.num_experts).tolist()
        gate_up_projs = self.experts.gate_up_proj.unbind(0)
        down_projs = self.experts.down_proj.unbind(0)
        outputs = []
        for index, rows in enumerate(routed_in.split(counts)):
            if len(rows):
                # transformers keeps experts as [in, out]
                gate_up = RoundedProduct.apply(rows, gate_up_projs[index].T, self.operands)
                if self.observe is not None:
                    self.observe(rows, gate_up)
                gate, up = gate_up.chunk(2, dim=-1)
                hidden = up * self.experts.act_fn(gate)
                outputs.append(RoundedProduct.apply(hidden, down_projs[index].T, self.operands))
                if self.observe is not None:
                    self.observe(hidden, outputs[-1])
        return torch.cat(outputs) if outputs else routed_in


_ROUNDED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: RoundedLinear,
    Llama4Router: RoundedRouter,
    SparseLlama4TextMoe: RoundedMoe,
}


def matrix_modules(model: nn.Module) -> Iterator[tuple[str, int | None, nn.Module]]:
    """Every module that multiplies by weights: (kind of ``probe.recipes``, layer or None for the head, module)."""
    for layer, module in enumerate(text_model(model).layers):
        block = cast(Llama4TextDecoderLayer, module)
        attention = block.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            yield "attention", layer, linear
        feed_forward: nn.Module = block.feed_forward
        if isinstance(feed_forward, Llama4TextMoe):
            yield "router", layer, feed_forward.router
            yield "routed_experts", layer, feed_forward
            kind, mlp = "shared_expert", feed_forward.shared_expert
        else:
            kind, mlp = "dense_mlp", cast(Llama4TextMLP, feed_forward)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            yield kind, layer, linear
    head = output_head(model)
    if head is not None:
        yield "output_head", None, head


@dataclass(frozen=True)
class Arm:
    """One arithmetic: ``recipe`` where it covers, ``elsewhere`` in every other product."""

    name: str
    elsewhere: Operands = BF16
    recipe: Recipe | None = None

    def covers(self, kind: str, layer: int | None, n_layers: int) -> bool:
        """Whether the arm's recipe rounds a module of this kind in this layer."""
        if self.recipe is None:
            return False
        if layer is None:
            return kind in self.recipe.modules
        return self.recipe.covers(kind, layer, n_layers)


def arms() -> dict[str, Arm]:
    """The arms by name, in the order in which they are trained.

    ``float32`` rounds nothing. It is the noise floor of training: what it differs from ``bf16`` by is what any small
    change of the numbers does to a run.
    """
    hybrid = resolve("hybrid")
    # Meta published how the experts of Llama 4 are quantised for inference, and nothing of a backward pass. Gradients
    # in E5M2, scaled by rows like the rest, are our choice: the range of `hybrid` at the granularity of `meta`.
    meta_like = replace(resolve("meta"), name="meta-like", gradient=Rounding("e5m2", Scaling("row")))
    with_router = replace(hybrid, name="hybrid+router", modules=(*hybrid.modules, "router"))
    return {
        arm.name: arm
        for arm in (
            Arm("bf16"),
            Arm("hybrid", recipe=hybrid),
            Arm("meta-like", recipe=meta_like),
            Arm("hybrid+router", recipe=with_router),
            Arm("float32", elsewhere=FLOAT32),
        )
    }


def set_arithmetic(model: nn.Module, arm: Arm) -> None:
    """Compute every product of ``model`` as ``arm`` says from now on; weights stay as they are.

    Raises
    ------
    ProbeError
        For a module of a class that cannot be replaced: experts that are not dispatched sparsely, quantised layers.
    """
    modules = list(matrix_modules(model))
    for kind, layer, module in modules:
        if type(module) not in (*_ROUNDED_CLASSES, *_ROUNDED_CLASSES.values()):
            raise ProbeError(
                f"{kind} of layer {layer} is a {type(module).__name__}, whose products cannot be replaced: load the "
                'model unquantised and call probe.dispatch.set_expert_dispatch(model, "sparse") first'
            )
    n_layers = len(text_model(model).layers)
    for kind, layer, module in modules:
        module.__class__ = _ROUNDED_CLASSES.get(type(module), type(module))
        rounded = cast(RoundedLinear, module)
        if arm.recipe is not None and arm.covers(kind, layer, n_layers):
            rounded.operands = recipe_operands(arm.recipe)
        else:
            rounded.operands = arm.elsewhere


# What is measured.


@dataclass
class Extremes:
    """Largest and root-mean-square magnitude by (kind, layer) of products' inputs and of their outputs' gradients."""

    largest: dict[tuple[str, str, int], float] = field(default_factory=dict)
    squares: dict[tuple[str, str, int], float] = field(default_factory=dict)
    n_values: dict[tuple[str, str, int], int] = field(default_factory=dict)

    def add(self, key: tuple[str, str, int], x: Tensor) -> None:
        """Count ``x`` under ``key``: ("input" or "gradient", kind, layer)."""
        x = x.detach()
        # numpy's maximum, because Python's drops a NaN
        self.largest[key] = float(np.maximum(self.largest.get(key, 0.0), x.abs().amax().item()))
        self.squares[key] = self.squares.get(key, 0.0) + x.double().square().sum().item()
        self.n_values[key] = self.n_values.get(key, 0) + x.numel()

    def observer(self, kind: str, layer: int) -> Observe:
        """What a module of this kind calls with its input and output."""

        def observe(x: Tensor, y: Tensor) -> None:
            self.add(("input", kind, layer), x)
            if y.requires_grad:
                y.register_hook(lambda gradient: self.add(("gradient", kind, layer), gradient))

        return observe

    def watch(self, model: nn.Module) -> None:
        """Count what goes through ``model``, whose arithmetic is set, until ``unwatch``; the head is left out."""
        for kind, layer, module in matrix_modules(model):
            if layer is not None:
                cast(RoundedLinear, module).observe = self.observer(kind, layer)

    def record(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """``{"input" | "gradient": {kind: {"amax" | "rms": [by layer]}}}``; layers are those that have the kind."""
        result: dict[str, dict[str, dict[str, list[float]]]] = {}
        for key in sorted(self.largest):
            what, kind, _ = key
            row = result.setdefault(what, {}).setdefault(kind, {"amax": [], "rms": []})
            row["amax"].append(self.largest[key])
            row["rms"].append(math.sqrt(self.squares[key] / self.n_values[key]))
        return result


def unwatch(model: nn.Module) -> None:
    """End what ``Extremes.watch`` began."""
    for _, _, module in matrix_modules(model):
        cast(RoundedLinear, module).observe = None


@torch.no_grad()
def predict(model: Llama4ForCausalLM, rows: Tensor) -> tuple[float, Tensor]:
    """Mean next-token loss on ``rows`` in nats, and the expert that each router chose, ``[layer, token]``."""
    losses, chosen = [], []
    for batch in rows.split(8):
        outputs = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
        losses.append(train.next_token_loss(outputs.logits, batch).item() * len(batch))
        chosen.append(torch.stack([logits.topk(1, dim=-1).indices[:, 0] for logits in outputs.router_logits]))
    return float(np.sum(losses) / len(rows)), torch.cat(chosen, dim=1)


def evaluate(model: Llama4ForCausalLM, arm: Arm, rows: Tensor) -> dict[str, Any]:
    """One set of weights on held-out rows in three arithmetics: the arm's own, bf16 and float32.

    ``flips`` are the shares of tokens by layer whose expert differs between the arm's own arithmetic and bf16's,
    ``flips_floor`` those between bf16's and float32's; ``load [layer][expert]`` counts tokens in the arm's own.
    """
    known = arms()
    predictions = {}
    for other in {a.name: a for a in (arm, known["bf16"], known["float32"])}.values():
        set_arithmetic(model, other)
        predictions[other.name] = predict(model, rows)
    set_arithmetic(model, arm)
    (own_loss, own), (bf16_loss, bf16), (float32_loss, float32) = (
        predictions[name] for name in (arm.name, "bf16", "float32")
    )
    n_experts = model.config.num_local_experts
    return {
        "heldout_loss": own_loss,
        "heldout_loss_bf16": bf16_loss,
        "heldout_loss_float32": float32_loss,
        "flips": (own != bf16).double().mean(dim=1).tolist(),
        "flips_floor": (bf16 != float32).double().mean(dim=1).tolist(),
        "load": [torch.bincount(layer, minlength=n_experts).tolist() for layer in own],
    }


# Runs.


@dataclass(frozen=True)
class Run:
    """One arm from one seed, which decides first weights and order of the data alike in every arm."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        return f"{self.arm.name}-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run is kept."""
        return plan.RUNS / "fp8" / self.name


def runs() -> dict[str, Run]:
    """All runs by name, seed by seed, so that a cut leaves whole seeds."""
    return {run.name: run for seed in SEEDS for run in (Run(arm, seed) for arm in arms().values())}


def load_rows(seed: int) -> tuple[Tensor, Tensor]:
    """Training rows of ``seed`` and the held-out rows, ``[row, CONTEXT + 1]``; tokenised once and kept."""
    path = plan.RUNS / "fp8" / f"rows-{seed}-{N_STEPS}x{BATCH_ROWS}x{CONTEXT}.safetensors"
    if not path.exists():
        tokenizer = AutoTokenizer.from_pretrained(plan.TOKENIZER)
        length = CONTEXT + 1
        train_pieces, heldout_pieces = (
            {domain: pieces(texts, tokenizer, length) for domain, texts in read_documents(plan.CORPUS / split).items()}
            for split in ("train", "heldout")
        )
        rows = training_rows(train_pieces, n_rows=N_STEPS * BATCH_ROWS, length=length, seed=seed)
        heldout = training_rows(heldout_pieces, n_rows=HELDOUT_ROWS, length=length, seed=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        save_file({"train": torch.from_numpy(rows), "heldout": torch.from_numpy(heldout)}, new)
        new.replace(path)
    tensors = load_file(path)
    return tensors["train"].long(), tensors["heldout"].long()


def build_model(seed: int) -> Llama4ForCausalLM:
    """The untrained model of ``seed``: float32, sparse experts, chunked attention."""
    tokenizer = AutoTokenizer.from_pretrained(plan.TOKENIZER)
    config = plan.SCOUT_CONFIG | {"num_hidden_layers": N_LAYERS}
    shape = plan.Arm("fp8", config, N_STEPS * BATCH_ROWS * CONTEXT, balance_weight=BALANCE_WEIGHT)
    torch.manual_seed(seed)
    model = Llama4ForCausalLM(train.build_config(shape, tokenizer))
    set_expert_dispatch(model, "sparse")
    train.use_chunked_attention(model)
    return model


def read_log(path: Path, *, last_step: int) -> list[dict[str, Any]]:
    """Records of a log up to ``last_step``: what came after the last saved state is computed again."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record for record in records if record["step"] <= last_step]


def train_run(run: Run, *, device: str, progress: Progress) -> None:
    """Train one run to its end, from its last saved state if there is one."""
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "weights.safetensors").exists():
        progress.console.print(f"{run.name}: finished earlier")
        return
    rows, heldout = load_rows(run.seed)
    heldout = heldout.to(device)
    model = build_model(run.seed)
    cast(nn.Module, model).to(device)
    optimizer = train.build_optimizer(model)
    start = train.load_state(folder, model, optimizer)
    set_arithmetic(model, run.arm)
    records = read_log(folder / "log.jsonl", last_step=start)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    task = progress.add_task(run.name, total=N_STEPS, completed=start, loss=float("nan"))
    losses: list[float] = []
    norms: list[float] = []
    clock = time.perf_counter()
    with (folder / "log.jsonl").open("a") as log:
        for step in range(start, N_STEPS):
            done = step + 1
            evaluates = done % EVALUATE_EVERY == 0 or done == N_STEPS
            extremes = Extremes()
            if evaluates:
                extremes.watch(model)
            batch = rows[step * BATCH_ROWS : done * BATCH_ROWS].to(device)
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(step, N_STEPS)
            loss, norm = train_step(model, optimizer, batch)
            unwatch(model)
            losses.append(loss)
            norms.append(norm)
            progress.update(task, completed=done, loss=loss)

            if done % LOG_EVERY == 0 or done == N_STEPS:
                seconds = time.perf_counter() - clock
                record: dict[str, Any] = {
                    "step": done,
                    "tokens": done * BATCH_ROWS * CONTEXT,
                    "loss": float(np.mean(losses)),
                    "largest_gradient_norm": float(np.max(norms)),
                    "n_non_finite": int(np.sum(~np.isfinite(losses) | ~np.isfinite(norms))),
                    "seconds": round(seconds, 2),
                }
                if evaluates:
                    record |= evaluate(model, run.arm, heldout)
                    record["extremes"] = extremes.record()
                log.write(json.dumps(record) + "\n")
                log.flush()
                losses, norms = [], []
                clock = time.perf_counter()
            if done % SAVE_EVERY == 0 and done < N_STEPS:
                train.save_state(folder, done, model, optimizer)
    save_file(model.state_dict(), folder / "weights.safetensors")
    for leftover in ("state.safetensors", "state.json"):
        (folder / leftover).unlink(missing_ok=True)


def train_step(model: Llama4ForCausalLM, optimizer: torch.optim.AdamW, batch: Tensor) -> tuple[float, float]:
    """One update from ``batch [row, CONTEXT + 1]``; its next-token loss and the norm of its gradient before clipping.

    A step whose loss or gradient is not finite leaves the weights as they were.
    """
    outputs = model(input_ids=batch[:, :-1], output_router_logits=True, use_cache=False)
    loss = train.next_token_loss(outputs.logits, batch)
    balance = train.balance_losses(outputs.router_logits, model.config.num_experts_per_tok)
    (loss + BALANCE_WEIGHT * balance.sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), plan.GRADIENT_NORM)
    if torch.isfinite(loss) and torch.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item(), norm.item()


# The table.


def collect() -> dict[str, Any]:
    """What was trained, and what the logs say of the seeds that are finished in every arm: only those compare."""
    finished = []
    for seed in SEEDS:
        of_seed = [run for run in runs().values() if run.seed == seed]
        if all((run.folder / "weights.safetensors").exists() for run in of_seed):
            for run in of_seed:
                records = read_log(run.folder / "log.jsonl", last_step=N_STEPS)
                finished.append({"arm": run.arm.name, "seed": seed, **_columns(records)})
    return {
        "n_layers": N_LAYERS,
        "n_experts": plan.SCOUT_CONFIG["num_local_experts"],
        "n_steps": N_STEPS,
        "tokens_per_step": BATCH_ROWS * CONTEXT,
        "context": CONTEXT,
        "n_heldout_tokens": HELDOUT_ROWS * CONTEXT,
        "runs": finished,
    }


def _columns(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One run's log as lists: the curves of training, and what was evaluated at fewer steps."""
    at_evaluations = [record for record in records if "heldout_loss" in record]
    return {
        "training": {
            "step": [record["step"] for record in records],
            "loss": [round(record["loss"], 4) for record in records],
            "largest_gradient_norm": [round(record["largest_gradient_norm"], 3) for record in records],
        },
        "n_non_finite": sum(record["n_non_finite"] for record in records),
        "seconds": round(sum(record["seconds"] for record in records)),
        "evaluation": {
            key: [_rounded(record[key], n_digits) for record in at_evaluations] for key, n_digits in _EVALUATED.items()
        },
    }


_EVALUATED = {
    "step": 4,
    "heldout_loss": 7,
    "heldout_loss_bf16": 7,
    "heldout_loss_float32": 7,
    "flips": 4,
    "flips_floor": 4,
    "load": 4,
    "extremes": 4,
}
"""What is kept of an evaluation, and significant digits of its fractions: losses are subtracted from each other."""


def _rounded(value: Any, n_digits: int) -> Any:
    """Every float in lists and dicts to so many significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(part, n_digits) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part, n_digits) for part in value]
    return float(f"{value:.{n_digits}g}") if isinstance(value, float) else value


def by_seed(results: dict[str, Any], measure: Callable[[dict[str, Any]], float]) -> dict[str, np.ndarray]:
    """``measure`` of every finished run: one value per seed, by arm."""
    values: dict[str, list[float]] = {}
    for run in results["runs"]:
        values.setdefault(run["arm"], []).append(measure(run))
    return {arm: np.array(of_arm) for arm, of_arm in values.items()}


def evaluated(name: str, index: int = -1) -> Callable[[dict[str, Any]], float]:
    """The measure that is a quantity of ``evaluate``, at the end or earlier, averaged over layers if it has any."""
    return lambda run: float(np.mean(run["evaluation"][name][index]))


def max_violation(run: dict[str, Any]) -> float:
    """Largest load over mean load, minus 1, averaged over layers (arXiv 2408.15664, Eq. 4): 0 when loads are equal."""
    load = np.array(run["evaluation"]["load"][-1])
    return float((load.max(axis=1) / load.mean(axis=1) - 1).mean())


def n_unused(run: dict[str, Any]) -> float:
    """How many experts, over all layers, no held-out token chose."""
    return float((np.array(run["evaluation"]["load"][-1]) == 0).sum())


def extreme(run: dict[str, Any], what: str, kinds: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Largest magnitude, and largest ratio of it to the root mean square, by layer over ``kinds`` at the last step."""
    rows = [run["evaluation"]["extremes"][-1][what][kind] for kind in kinds]
    amax, rms = (np.array([row[key] for row in rows]) for key in ("amax", "rms"))
    return amax.max(axis=0), (amax / rms).max(axis=0)


def tables(results: dict[str, Any]) -> str:
    """What the finished runs end with, as tables in Markdown: loss, routing, magnitudes."""
    own, in_bf16 = by_seed(results, evaluated("heldout_loss")), by_seed(results, evaluated("heldout_loss_bf16"))
    violation, unused = by_seed(results, max_violation), by_seed(results, n_unused)
    non_finite = by_seed(results, lambda run: run["n_non_finite"])
    floor = by_seed(results, evaluated("flips_floor"))
    steps = results["runs"][0]["evaluation"]["step"]
    shown = sorted({0, len(steps) // 2, len(steps) - 1})

    lines = [
        "| arm | held-out loss | minus `bf16` of the same seed | seed by seed | its weights in bf16, minus `bf16` "
        "| non-finite steps |",
        "|---|---|---|---|---|---|",
    ]
    for arm in own:
        difference, of_weights = own[arm] - own["bf16"], in_bf16[arm] - own["bf16"]
        lines.append(
            f"| `{arm}` | {_spread(own[arm], '.3f')} | {_spread(difference, '+.4f')} "
            f"| {', '.join(f'{value:+.4f}' for value in difference)} | {_spread(of_weights, '+.4f')} "
            f"| {non_finite[arm].sum():.0f} |"
        )
    lines += [
        "",
        f"| arm | imbalance | minus `bf16` | unused of {results['n_layers'] * results['n_experts']} | flips at steps "
        f"{', '.join(str(steps[i]) for i in shown)} | noise floor |",
        "|---|---|---|---|---|---|",
    ]
    for arm in own:
        flips = [100 * by_seed(results, evaluated("flips", i))[arm].mean() for i in shown[:-1]]
        at_the_end = _spread(100 * by_seed(results, evaluated("flips"))[arm], ".2f")
        lines.append(
            f"| `{arm}` | {_spread(violation[arm], '.2f')} | {_spread(violation[arm] - violation['bf16'], '+.2f')} "
            f"| {_spread(unused[arm], '.1f')} | {', '.join(f'{value:.2f}' for value in flips)}, {at_the_end} % "
            f"| {_spread(100 * floor[arm], '.2f')} % |"
        )
    lines += [
        "",
        "| arm | largest gradient by layer, × 10⁻⁴ | over its root mean square | largest expert input by layer |",
        "|---|---|---|---|",
    ]
    for arm in own:
        of_arm = [run for run in results["runs"] if run["arm"] == arm]
        gradients = [extreme(run, "gradient", RECORDED_KINDS) for run in of_arm]
        inputs = [extreme(run, "input", ("routed_experts",))[0] for run in of_arm]
        lines.append(
            f"| `{arm}` | {_by_layer(10_000 * np.mean([amax for amax, _ in gradients], axis=0))} "
            f"| {_spread(np.array([ratio.max() for _, ratio in gradients]), '.0f')} "
            f"| {_by_layer(np.mean(inputs, axis=0))} |"
        )
    return "\n".join(lines)


def _spread(values: np.ndarray, form: str) -> str:
    """Mean and sample standard deviation over seeds."""
    deviation = values.std(ddof=1) if len(values) > 1 else math.nan
    return f"{values.mean():{form}} ± {deviation:{form.lstrip('+')}}"


def _by_layer(values: np.ndarray) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def main() -> None:
    """Train the runs named on the command line, then write the numbers of all seeds that are finished."""
    known = runs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(known)}; all of them if none is named")
    parser.add_argument("--collect", action="store_true", help="train nothing, only write the numbers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    names = [] if arguments.collect else arguments.runs or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no such run: {', '.join(unknown)}; there are {', '.join(known)}")
    if names and not plan.TOKENIZER.exists():
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
            train_run(known[name], device=arguments.device, progress=progress)
    results = collect()
    if results["runs"]:
        RESULTS.write_text(json.dumps(results) + "\n")
        print(tables(results))
    elif arguments.collect:
        parser.error("no seed is finished in every arm yet: train the others first, without --collect")


if __name__ == "__main__":
    main()
