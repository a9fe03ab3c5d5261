"""From runs to package data: bf16 weights, config, tokenizer and model card: ``python -m training.export``.

Writes ``probe/assets/models/<name>/`` for every shipped model, and ``index.json`` with one line on each.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
import xarray as xr
from safetensors.torch import load_file
from transformers import AutoTokenizer, Llama4ForCausalLM, PreTrainedTokenizerBase

from probe.models import load
from training import plan
from training.evaluate import Evaluation, evaluate
from training.rows import read_documents
from training.train import build_config

MODELS = Path("probe/assets/models")

PART = 4
"""Checkpoints and collapsed arms are evaluated on every fourth held-out document, the main models on all."""


@dataclass(frozen=True)
class Shipped:
    """A model that comes with probe: which arm's weights, from what share of training, and what to say of it."""

    name: str
    arm: str
    line: str
    percent: int = 100

    @property
    def is_main(self) -> bool:
        """Whether this is an arm's own model, and not a checkpoint or a variant of one."""
        return self.name == self.arm

    @property
    def weights(self) -> Path:
        """File of the run that holds these weights, in float32."""
        stem = "weights" if self.percent == 100 else f"weights-{self.percent}"
        return plan.RUNS / self.arm / f"{stem}.safetensors"


SHIPPED = (
    Shipped("tiny-scout", "tiny-scout", "16 experts in every layer, top-1 and a shared expert, like Scout"),
    Shipped("tiny-maverick", "tiny-maverick", "32 experts in every second layer, dense layers between, like Maverick"),
    Shipped(
        "tiny-scout-collapsed",
        "no-balance-0",
        "tiny-scout trained without a balance loss: about half of its experts are hardly used",
    ),
    Shipped("tiny-scout@1", "tiny-scout", "tiny-scout at 1 % of its training", 1),
    Shipped("tiny-scout@5", "tiny-scout", "tiny-scout at 5 % of its training", 5),
    Shipped("tiny-scout@20", "tiny-scout", "tiny-scout at 20 % of its training", 20),
    Shipped("tiny-scout@50", "tiny-scout", "tiny-scout at 50 % of its training", 50),
)


def export_weights(arm: str, weights: Path, folder: Path) -> None:
    """An arm's weights as a model folder."""
    tokenizer = AutoTokenizer.from_pretrained(plan.TOKENIZER)
    model = Llama4ForCausalLM(build_config(plan.ARMS[arm], tokenizer))
    model.load_state_dict(load_file(weights))
    save_shipped(model, tokenizer, folder)


def save_shipped(model: Llama4ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Config, bf16 safetensors and tokenizer, as transformers saves them."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)  # transformers writes it for its owner alone
    tokenizer.save_pretrained(folder)


def read_curve(arm: str) -> list[dict]:
    """The arm's log, one record every hundred steps; the last one of a step counts."""
    lines = (plan.RUNS / arm / "log.jsonl").read_text().splitlines()
    return list({record["step"]: record for record in map(json.loads, lines)}.values())


def write_card(shipped: Shipped, evaluation: Evaluation, no_balance: dict[str, xr.DataArray]) -> None:
    """``README.md`` beside the weights; ``no_balance`` holds the loads to show of arms without a balance loss."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    arm = plan.ARMS[shipped.arm]
    curve = read_curve(shipped.arm)
    model_config = json.loads((MODELS / shipped.name / "config.json").read_text())
    card = environment.get_template("card.md.j2").render(
        shipped=shipped,
        arm=arm,
        plan=plan,
        config=model_config,
        n_parameters=sum(tensor.numel() for tensor in load_file(MODELS / shipped.name / "model.safetensors").values()),
        curve=[curve[index] for index in sorted({round((len(curve) - 1) * share) for share in (0, 0.05, 0.2, 0.5, 1)})],
        sources=json.loads((plan.CORPUS / "summary.json").read_text())["sources"],
        evaluation=evaluation,
        no_balance=no_balance,
        part=1 if shipped.is_main else PART,
    )
    (MODELS / shipped.name / "README.md").write_text(card)


def no_balance_loads(documents: dict[str, list[str]]) -> dict[str, xr.DataArray]:
    """Expert load (layer, expert) of every arm that was trained without a balance loss, shipped or not."""
    loads = {}
    for name, arm in plan.ARMS.items():
        if arm.balance_weight == 0:
            folder = plan.BUILD / "export" / name
            export_weights(name, plan.RUNS / name / "weights.safetensors", folder)
            loads[name] = evaluate(load(folder), documents).load
    return loads


def main() -> None:
    """Export, evaluate and describe every shipped model."""
    MODELS.mkdir(parents=True, exist_ok=True)
    index_file = MODELS / "index.json"
    others = json.loads(index_file.read_text()) if index_file.exists() else {}  # such as training.copier's
    index = {shipped.name: shipped.line for shipped in SHIPPED}
    index_file.write_text(json.dumps(others | index, indent=2) + "\n")
    documents = read_documents(plan.CORPUS / "heldout")
    part = {domain: texts[::PART] for domain, texts in documents.items()}
    loads = no_balance_loads(part)
    for shipped in SHIPPED:
        export_weights(shipped.arm, shipped.weights, MODELS / shipped.name)
        evaluation = evaluate(load(shipped.name), documents if shipped.is_main else part)
        is_no_balance = plan.ARMS[shipped.arm].balance_weight == 0
        write_card(shipped, evaluation, loads if is_no_balance else {})


if __name__ == "__main__":
    main()
