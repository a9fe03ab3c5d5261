"""How a recorder sees what routed experts return, and where it adds that up; the shared expert is not watched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from probe.dispatch import foreign_parts
from probe.recording import RecordingError


def require_known_experts(blocks: Mapping[int, Llama4TextMoe]) -> None:
    """Raise a RecordingError unless every block computes its experts in a way that :func:`watch_experts` can see."""
    for layer, name in foreign_parts(blocks).items():
        raise RecordingError(
            f"layer {layer} computes its experts with {name}, whose outputs probe cannot read (a quantised or patched "
            "model): record it without expert_outputs=True"
        )


def watch_experts(block: Llama4TextMoe, observe: Callable[[Tensor], None]) -> list[Any]:
    """Have ``observe`` called with what a block's experts return, until the handles are removed.

    It is handed (E·T, H) by transformers' dense way, expert after expert on all tokens, and (N, H) by the sparse one,
    where the experts are no module that is called; see :func:`probe.reduction.reduce_experts`.
    """
    dense = block.experts.register_forward_hook(lambda module, args, outputs: observe(outputs))
    vars(block)["expert_observers"] = (*vars(block).get("expert_observers", ()), observe)
    return [dense, _Observation(block, observe)]


@dataclass(frozen=True)
class _Observation:
    """An observer of a sparse block, which :meth:`remove` takes away."""

    block: Llama4TextMoe
    observe: Callable[[Tensor], None]

    def remove(self) -> None:
        """Leave the block with the other observers, or as it was before the first."""
        observers = vars(self.block).pop("expert_observers")
        if others := tuple(observer for observer in observers if observer is not self.observe):
            vars(self.block)["expert_observers"] = others


class ExpertTotals:
    """What experts returned, added up over forwards: as large as the samples are many, however long they are."""

    def __init__(self, n_layers: int, n_experts: int) -> None:
        self._shape = n_layers, n_experts
        self._norm_sum: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(self._shape, np.float64))
        self._largest: defaultdict[int, np.ndarray] = defaultdict(lambda: np.zeros(self._shape, np.float32))

    def add(self, samples: np.ndarray, norm_sum: np.ndarray, largest: np.ndarray) -> None:
        """Add one forward: sums of norms and largest values (row, layer, expert) of rows that belong to ``samples``."""
        for row, sample in enumerate(samples.tolist()):
            self._norm_sum[sample] += norm_sum[row]
            np.maximum(self._largest[sample], largest[row], out=self._largest[sample])

    def arrays(self, n_samples: int) -> dict[str, np.ndarray]:
        """The variables of ``/experts``, (sample, layer, expert)."""
        norm_sum = np.zeros((n_samples, *self._shape), np.float32)
        largest = np.zeros_like(norm_sum)
        for sample in self._norm_sum:
            norm_sum[sample], largest[sample] = self._norm_sum[sample], self._largest[sample]
        # The gate has scaled the expert's input already: what it contributes is what it returns.
        return {"saliency_sum": norm_sum, "output_norm_sum": norm_sum, "output_max": largest}
