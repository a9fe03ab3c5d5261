"""The share of routing decisions that another batch size changes: ``python -m benchmarks.batching``.

Linear layers give other last bits for another batch shape. In float32 no decision should change; in bfloat16 those that
sit on a tie do. Texts: the bundled corpus cut to 256 tokens, padded to the longest of each batch.
"""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import probe
from probe.corpus import bundled_corpus, read_corpus

BATCH_SIZES = (1, 2, 8, 32)
N_TOKENS = 256


def main() -> None:
    """Measure and print."""
    texts = read_corpus(bundled_corpus()).texts[::4]
    table = Table("dtype", "batch sizes", "decisions", "differ", title=f"tiny-scout, {len(texts)} texts")
    for dtype in (torch.float32, torch.bfloat16):
        lm = probe.load("tiny-scout", dtype=dtype)
        chosen = {}
        for size in BATCH_SIZES:
            trace = probe.record(lm, texts, batch_size=size, max_tokens=N_TOKENS, progress=False)
            chosen[size] = trace["routing"]["expert_index"].values
        for size in BATCH_SIZES[1:]:
            differ = np.mean(chosen[size] != chosen[1])
            name = str(dtype).removeprefix("torch.")
            table.add_row(name, f"{size} against 1", f"{chosen[1].size:,}", f"{100 * differ:.3f} %")
    Console().print(table)


if __name__ == "__main__":
    main()
