"""What ``probe.record`` adds to a bare forward of ``tiny-scout``: ``python -m benchmarks.record``.

Every function gets the same batch: 8 held-out texts cut to 256 tokens, no padding. "bare forward, again" is the same
function as the baseline: its ratio is the noise of the measurement.
"""

from __future__ import annotations

import argparse
import os

import torch

import probe
from benchmarks.interleaved import print_ratios, seconds
from probe.corpus import bundled_corpus, read_corpus

N_TEXTS, N_TOKENS = 8, 256


def token_ids(lm: probe.LoadedModel) -> torch.Tensor:
    """(text, token) ids of the first texts of the bundled corpus that are long enough."""
    encoded = lm.tokenizer(read_corpus(bundled_corpus()).texts)["input_ids"]
    return torch.tensor([ids[:N_TOKENS] for ids in encoded if len(ids) >= N_TOKENS][:N_TEXTS])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds

    lm, reference = probe.load("tiny-scout"), probe.load("tiny-scout", expert_dispatch="reference")
    ids = token_ids(lm)

    def forward(model: torch.nn.Module) -> None:
        with torch.inference_mode():
            model(ids, use_cache=False)

    with_loss = probe.RoutingSpec(next_token_loss=True)
    functions = {
        "bare forward": lambda: forward(lm.model),
        "bare forward, again": lambda: forward(lm.model),
        "bare forward without the output head": lambda: forward(lm.model.model),
        "record": lambda: probe.record(lm, ids, progress=False),
        "record with loss": lambda: probe.record(lm, ids, routing=with_loss, progress=False),
        "bare forward, transformers' dense experts": lambda: forward(reference.model),
    }
    taken = seconds(functions, rounds=rounds)
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    title = f"tiny-scout, {N_TEXTS} × {N_TOKENS} tokens, float32, {threads}, {rounds} rounds"
    print_ratios(taken, baseline="bare forward", title=title)


if __name__ == "__main__":
    main()
