"""What a trained model is worth: bits per byte against zlib on held-out text, and the load of its experts."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import xarray as xr

import probe
from probe.models import LoadedModel


@dataclass(frozen=True)
class Evaluation:
    """``bits_per_byte`` and ``zlib_bits_per_byte`` by domain; ``load`` (layer, expert) with equal weight per domain."""

    bits_per_byte: dict[str, float]
    zlib_bits_per_byte: dict[str, float]
    load: xr.DataArray


def zlib_bits_per_byte(texts: list[str]) -> float:
    """``zlib -9`` over one stream that holds all texts, a newline between them."""
    data = "\n".join(texts).encode()
    return 8 * len(zlib.compress(data, 9)) / len(data)


def evaluate(model: LoadedModel, documents: dict[str, list[str]]) -> Evaluation:
    """Record every document, each from an empty context, and sum up.

    The first token of a document is predicted from BOS, so every byte is paid for.
    """
    bits_per_byte, loads = {}, []
    for domain, texts in documents.items():
        trace = probe.record(model, texts, batch_size=8, routing=probe.RoutingSpec(next_token_loss=True))
        n_bytes = sum(len(text.encode()) for text in texts)
        nats = np.nansum(trace["routing"]["next_token_loss"].values, dtype=np.float64)
        bits_per_byte[domain] = nats / math.log(2) / n_bytes
        loads.append(probe.routing_stats.expert_load(trace))
    return Evaluation(
        bits_per_byte=bits_per_byte,
        zlib_bits_per_byte={domain: zlib_bits_per_byte(texts) for domain, texts in documents.items()},
        load=sum(loads) / len(loads),
    )
