"""Probe's own entry in transformers' attention and mask interfaces: sdpa computes, and whoever watches sees q and k.

transformers builds a mask of n × n for every chunked layer and for every padded batch. The mask function here returns
an :class:`AttentionSpan` instead, a few numbers that say what is visible; the attention function runs sdpa on what it
says: plainly where sdpa needs no mask, chunk by chunk in RoPE layers, and otherwise under masks of a few queries at a
time. Below one chunk the outputs are those of transformers' sdpa to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function
from transformers.models.llama4.modeling_llama4 import Llama4TextModel

from probe.schema import ProbeError

NAME = "probe_sdpa"
"""What transformers knows the attention and mask functions by, and what a recording names as its implementation."""

MASK_CELLS = 1 << 24
"""Cells of a mask that are held at once."""


class AttentionError(ProbeError):
    """Attention of a kind that cannot be recorded."""


@dataclass(frozen=True, eq=False)
class AttentionSpan:
    """What the queries of one forward may see, in place of a mask.

    Cells of the cache are numbered from 0: queries stand in ``q_offset`` and after, keys in ``kv_offset`` and after.
    ``is_token`` (row, cell) is False for padding; None where there is none. ``chunk_size`` is None where all that came
    before is visible. ``may_skip_mask`` is False where a single query needs a mask all the same: a static cache has
    cells that are yet to be filled.
    """

    q_length: int
    kv_length: int
    q_offset: int
    kv_offset: int
    is_token: Tensor | None
    chunk_size: int | None
    may_skip_mask: bool = True

    @cached_property
    def n_left(self) -> Tensor | int:
        """Padding before each row's first token, (row, 1, 1, 1): chunks are counted from there."""
        if self.is_token is None:
            return 0
        return (self.is_token.cumsum(dim=-1) == 0).sum(dim=-1)[:, None, None, None]

    @cached_property
    def is_padded(self) -> bool:
        """Whether any cell that a query could see is padding."""
        seen = slice(self.kv_offset, min(self.kv_offset + self.kv_length, self.q_offset + self.q_length))
        return self.is_token is not None and not bool(self.is_token[:, seen].all())

    @property
    def is_chunked(self) -> bool:
        """Whether chunks hide anything that would be visible otherwise."""
        return self.chunk_size is not None and self.kv_offset + self.kv_length > self.chunk_size

    def contiguous(self) -> AttentionSpan:
        """Itself: ``generate()`` asks this of every mask that goes with a static cache."""
        return self

    def mask(self, queries: slice, keys: slice, device: torch.device) -> Tensor:
        """Which of some keys (counted in the tensor at hand) some queries see, (row or 1, 1, queries, keys)."""
        query = torch.arange(queries.start, queries.stop, device=device)[:, None] + self.q_offset
        cell = torch.arange(keys.start, keys.stop, device=device) + self.kv_offset
        visible = (cell <= query)[None, None]
        if self.chunk_size is not None:
            visible = visible & ((cell - self.n_left) // self.chunk_size == (query - self.n_left) // self.chunk_size)
        if self.is_token is not None:
            visible = visible & self.is_token[:, None, None, self.kv_offset :][..., keys]
        return visible


Observer = Callable[[Tensor, Tensor, AttentionSpan, Tensor | None], None]
"""Called with queries (B, H, q, d), keys (B, K, kv, d), what is visible, and the log-sum-exp (B, H, q) if known."""


def attention_span(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> AttentionSpan:
    """Stand in for the mask that transformers asks for; see ``transformers.masking_utils.sdpa_mask``.

    Raises
    ------
    AttentionError
        For packed sequences, which hide tokens of one row from each other.
    """
    if local_size is None and mask_function is not causal_mask_function:
        raise AttentionError("several texts are packed into one row: record each in a row of its own")
    is_token = attention_mask
    if is_token is not None and (missing := kv_offset + kv_length - is_token.shape[-1]) > 0:
        is_token = F.pad(is_token, (0, missing), value=False)
    lengths = int(q_length), int(kv_length), int(q_offset), int(kv_offset)
    return AttentionSpan(*lengths, is_token, local_size, allow_is_causal_skip)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AttentionSpan | Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' sdpa computes it, with observers; see ``AttentionInterface`` of transformers."""
    span = attention_mask
    if not isinstance(span, AttentionSpan):  # a mask that the user made, who is then not recording
        return sdpa_attention_forward(module, query, key, value, span, **kwargs)
    output, log_sum_exp = _attend(module, query, key, value, span, kwargs)
    for observe in vars(module).get("attention_observers", ()):
        observe(query, key, span, log_sum_exp)
    return output, None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_span)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, span: AttentionSpan, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Output (B, q, H, d) and, where the kernel returns it, the log-sum-exp (B, H, q)."""
    if not span.is_padded:
        starts_text = span.q_offset == 0 and span.kv_offset == 0
        # One query alone is not computed as causal: whatever key is at hand it would see.
        if not span.is_chunked and (starts_text if span.q_length > 1 else span.may_skip_mask):
            return _sdpa(module, query, key, value, kwargs)
        if span.is_chunked and starts_text and span.q_length > 1:
            assert span.chunk_size is not None
            return _by_chunk(module, query, key[:, :, : span.q_length], value[:, :, : span.q_length],
                             span.chunk_size, kwargs)  # fmt: skip
    return _under_masks(module, query, key, value, span, kwargs), None


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Causal attention without a mask, by the very kernel that sdpa would choose."""
    # In bf16 the kernel's log-sum-exp is rounded too coarsely to be of use.
    in_flash_kernel = (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == value.shape[-1]
        and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and not kwargs.get("dropout")
        and torch.backends.cuda.flash_sdp_enabled()
    )
    if not in_flash_kernel:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)[0], None
    shared = query.shape[1] // key.shape[1]
    output, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query,
        key.repeat_interleave(shared, dim=1) if shared > 1 else key,
        value.repeat_interleave(shared, dim=1) if shared > 1 else value,
        is_causal=query.shape[2] > 1,
        scale=kwargs.get("scaling"),
    )
    return output.transpose(1, 2).contiguous(), log_sum_exp


def _by_chunk(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, chunk_size: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Causal attention within chunks: whole ones as rows of one batch, then the last, shorter one."""
    n_rows, n_whole = len(query), query.shape[2] // chunk_size
    border = n_whole * chunk_size

    def whole(states: Tensor) -> Tensor:
        return states[:, :, :border].unflatten(2, (n_whole, chunk_size)).transpose(1, 2).flatten(0, 1)

    outputs, log_sum_exps = [], []
    if n_whole:
        output, log_sum_exp = _sdpa(module, whole(query), whole(key), whole(value), kwargs)
        outputs.append(output.unflatten(0, (n_rows, n_whole)).flatten(1, 2))
        if log_sum_exp is not None:
            log_sum_exps.append(log_sum_exp.unflatten(0, (n_rows, n_whole)).transpose(1, 2).flatten(2, 3))
    if border < query.shape[2]:
        rest = slice(border, None)
        output, log_sum_exp = _sdpa(module, query[:, :, rest], key[:, :, rest], value[:, :, rest], kwargs)
        outputs.append(output)
        if log_sum_exp is not None:
            log_sum_exps.append(log_sum_exp)
    known = len(log_sum_exps) == len(outputs)
    return torch.cat(outputs, dim=1), torch.cat(log_sum_exps, dim=2) if known else None


def _under_masks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, span: AttentionSpan, kwargs: dict[str, Any]
) -> Tensor:
    """Attention of padded rows, or of queries that go on with a cache, under masks of a few queries at a time."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    step = max(1, MASK_CELLS // (n_keys * len(query)))
    if step >= n_queries:
        mask = span.mask(slice(0, n_queries), slice(0, n_keys), query.device).expand(len(query), -1, -1, -1)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    outputs = []
    for start in range(0, n_queries, step):
        queries = slice(start, min(start + step, n_queries))
        # Nothing after the last of these queries is visible to any of them, nor a chunk that ended before the first.
        stop = min(span.q_offset + queries.stop - span.kv_offset, n_keys)
        oldest = span.q_offset + start - span.kv_offset - (span.chunk_size or span.q_offset + start) + 1
        keys = slice(max(oldest, 0), stop)
        mask = span.mask(queries, keys, query.device).expand(len(query), -1, -1, -1)
        part = query[:, :, queries], key[:, :, keys], value[:, :, keys], mask
        outputs.append(sdpa_attention_forward(module, *part, **kwargs)[0])
    return torch.cat(outputs, dim=1)


def watch_attention(decoder: Llama4TextModel, observers: dict[int, Observer]) -> AttentionWatch:
    """Have ``observers`` called with the queries and keys of their layers, until the watch is removed.

    The decoder runs probe's attention function meanwhile, in every layer.
    """
    return AttentionWatch(decoder, observers)


class AttentionWatch:
    """Observers of a decoder's attention, which :meth:`remove` takes away; several watches may overlap."""

    def __init__(self, decoder: Llama4TextModel, observers: dict[int, Observer]) -> None:
        self._decoder, self._observers = decoder, observers
        config = decoder.config
        others, original = vars(decoder).get("attention_watched", (0, config._attn_implementation))
        vars(decoder)["attention_watched"] = (others + 1, original)
        config._attn_implementation_internal = NAME
        for layer, observe in observers.items():
            attention = vars(decoder.layers[layer].self_attn)
            attention["attention_observers"] = (*attention.get("attention_observers", ()), observe)

    def remove(self) -> None:
        """Leave the decoder with the other watches, or as it was before the first."""
        for layer, observe in self._observers.items():
            attention = vars(self._decoder.layers[layer].self_attn)
            rest = tuple(other for other in attention.pop("attention_observers") if other is not observe)
            if rest:
                attention["attention_observers"] = rest
        n_watches, original = vars(self._decoder).pop("attention_watched")
        if n_watches > 1:
            vars(self._decoder)["attention_watched"] = (n_watches - 1, original)
        else:
            self._decoder.config._attn_implementation_internal = original
