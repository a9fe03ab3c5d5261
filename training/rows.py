"""Documents to training rows: every row starts at the start of a text, every domain gets the same share of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase


def read_documents(folder: Path) -> dict[str, list[str]]:
    """Texts by domain from a folder of ``<domain>.jsonl``."""
    return {
        path.stem: [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        for path in sorted(folder.glob("*.jsonl"))
    }


def pieces(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[np.ndarray]:
    """Each text as runs of at most ``length`` ids; each run starts with BOS, a text's last one ends with EOS."""
    result = []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        ids = [*ids, tokenizer.eos_token_id]
        for start in range(0, len(ids), length - 1):
            result.append(np.array([tokenizer.bos_token_id, *ids[start : start + length - 1]], dtype=np.int32))
    return result


def _shuffled_forever(items: list[np.ndarray], random: np.random.Generator) -> Iterator[np.ndarray]:
    while True:
        for index in random.permutation(len(items)):
            yield items[index]


def training_rows(pieces_by_domain: dict[str, list[np.ndarray]], *, n_rows: int, length: int, seed: int) -> np.ndarray:
    """Rows of ``length`` ids, packed from whole pieces; the last piece of a row is cut.

    The next piece always comes from the domain that has had the fewest tokens, so that domains stay level throughout.
    The cut ends come round again at the domain's next shuffle.
    """
    random = np.random.default_rng(seed)
    streams = {domain: _shuffled_forever(items, random) for domain, items in sorted(pieces_by_domain.items())}
    spent = dict.fromkeys(streams, 0)
    rows = np.empty((n_rows, length), dtype=np.int32)
    for row in rows:
        filled = 0
        while filled < length:
            domain = min(spent, key=spent.__getitem__)
            piece = next(streams[domain])[: length - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            spent[domain] += len(piece)
    # Rows were filled in a fixed rotation of domains: shuffle, so that a batch is a fair sample.
    random.shuffle(rows)
    return rows
