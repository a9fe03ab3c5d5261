"""A decoder layer taken apart: its matrices, working copies of it, and copies whose products are computed in FP8.

Whatever is changed here is a copy. It shares the weights of the model that it was made from, where those are not
rounded, and nothing else: no hook, no wrapped ``forward`` and no configuration that could be written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import (
    Llama4Router,
    Llama4TextAttention,
    Llama4TextDecoderLayer,
    Llama4TextExperts,
    Llama4TextMLP,
    Llama4TextModel,
    Llama4TextMoe,
)

from probe import sites
from probe.dispatch import SparseLlama4TextMoe
from probe.float8 import Quantized, Rounding, Scaling, quantize, round_trip
from probe.schema import ProbeError

MODULES = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "attention",
    "router": "router",
    "experts.gate_up_proj": "routed_experts",
    "experts.down_proj": "routed_experts",
    "shared_expert.gate_proj": "shared_expert",
    "shared_expert.up_proj": "shared_expert",
    "shared_expert.down_proj": "shared_expert",
    "mlp.gate_proj": "dense_mlp",
    "mlp.up_proj": "dense_mlp",
    "mlp.down_proj": "dense_mlp",
}
"""Matrices of decoder layers, in the order of their use, and of which kind of ``recipes.MODULE_KINDS`` each is.

An MoE layer has no ``mlp``, a dense one no router, experts and shared expert.
"""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

SITES = ("attention", "router", "routed_experts", "shared_expert", "feed_forward", "residual")
"""Places in a layer where two ways to compute it are compared: what each part returns, the router's logits, and the
residual stream behind the layer."""


class QuantizationError(ProbeError):
    """The model, or a text, cannot be run in FP8 by probe."""


@dataclass(frozen=True)
class Matrix:
    """One matrix of a layer, a view of the model's own weight: (output, input), or (expert, output, input)."""

    name: str
    kind: str
    weight: Tensor


def matrices(layer: Llama4TextDecoderLayer) -> list[Matrix]:
    """The matrices of a layer, in the order of ``MODULES``.

    transformers stores the weights of routed experts as (expert, input, output); here they are transposed.
    """
    attention: Any = layer.self_attn
    feed_forward: Any = layer.feed_forward
    weights = {name: getattr(attention, name).weight for name in PROJECTIONS}
    if isinstance(feed_forward, Llama4TextMoe):
        weights["router"] = feed_forward.router.weight
        weights["experts.gate_up_proj"] = feed_forward.experts.gate_up_proj.transpose(-2, -1)
        weights["experts.down_proj"] = feed_forward.experts.down_proj.transpose(-2, -1)
        part, mlp = "shared_expert", feed_forward.shared_expert
    else:
        part, mlp = "mlp", feed_forward
    weights |= {f"{part}.{name}": getattr(mlp, name).weight for name in MLP_PROJECTIONS}
    return [Matrix(name, MODULES[name], weight.detach()) for name, weight in weights.items()]


def require_known(model: nn.Module) -> Llama4TextModel:
    """The text decoder of a model whose every matrix is where :func:`matrices` looks for it, unquantised and finite.

    Raises
    ------
    NotLlama4Error
        If there is no Llama 4 text decoder, or no mixture-of-experts layer in it.
    QuantizationError
        If the model is quantised already or patched, if weights are not in memory, or if some are not finite; names
        them.
    """
    decoder = sites.text_model(model)
    sites.moe_blocks(model)
    for config in (getattr(model, "config", None), decoder.config):
        if getattr(config, "quantization_config", None):
            raise QuantizationError(
                f"{type(model).__name__} is quantised already (its config has a quantization_config): load the "
                "checkpoint that it was made from"
            )
    for name, part, known in _parts(decoder, sites.output_head(model)):
        if type(part) not in known:
            raise QuantizationError(
                f"{name} is a {type(part).__name__}, which probe cannot round (a quantised or patched model): load "
                f"it so that it is a {known[0].__name__}"
            )
    head = sites.output_head(model)
    for owner, module in (("", decoder), ("output head ", head)):
        for name, parameter in module.named_parameters() if module is not None else ():
            if parameter.is_meta:
                raise QuantizationError(
                    f"{owner}{name} is not in memory (offloaded?): load the model without offloading"
                )
            if not (parameter.is_floating_point() and parameter.dtype.itemsize >= 2):
                raise QuantizationError(f"{owner}{name} is {parameter.dtype}: load the checkpoint it was made from")
            if not torch.isfinite(parameter).all():
                raise QuantizationError(
                    f"{owner}{name} holds NaN or infinity, for which there is no scale: use intact weights"
                )
    return decoder


def _parts(decoder: Llama4TextModel, head: nn.Module | None) -> Iterator[tuple[str, nn.Module, tuple[type, ...]]]:
    """Every part that is computed here, under its name, and the classes that it may be of; what holds others first."""
    for index, layer in enumerate(decoder.layers):
        attention, block = cast(Any, layer).self_attn, cast(Any, layer).feed_forward
        yield f"layer {index} attention", attention, (Llama4TextAttention,)
        for name in PROJECTIONS:
            yield f"layer {index} {name}", getattr(attention, name), (nn.Linear,)
        part = "mlp"
        if isinstance(block, Llama4TextMoe):
            yield f"layer {index} feed_forward", block, (Llama4TextMoe, SparseLlama4TextMoe)
            yield f"layer {index} router", block.router, (Llama4Router,)
            yield f"layer {index} experts", block.experts, (Llama4TextExperts,)
            part, block = "shared_expert", block.shared_expert
        yield f"layer {index} {part}", block, (Llama4TextMLP,)
        for name in MLP_PROJECTIONS:
            yield f"layer {index} {part}.{name}", getattr(block, name), (nn.Linear,)
    if head is not None:
        yield "output head", head, (nn.Linear,)


def bare(module: nn.Module, dtype: torch.dtype, config: Llama4TextConfig | None = None) -> Any:
    """A module once more: same class and settings, weights in ``dtype``, without its hooks and wrappers.

    Weights that are of ``dtype`` already are shared, not copied; buffers, such as rotary frequencies, keep their dtype.
    ``config`` takes the place of the module's own, so that what the copy computes with can be chosen.
    """
    copy = nn.Module.__new__(type(module))
    nn.Module.__init__(copy)
    own = vars(copy)
    for name, value in vars(module).items():
        # What a module wraps itself in (accelerate, a hub kernel) is bound to the original.
        if name not in own and name not in ("forward", "_hf_hook", "_old_forward"):
            own[name] = config if name == "config" and config is not None else value
    for name, parameter in module._parameters.items():
        cast_ = None if parameter is None else nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        copy.register_parameter(name, cast_)
    for name, buffer in module._buffers.items():
        copy.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        copy.add_module(name, None if child is None else bare(child, dtype, config))
    return copy.eval()


class TokenMask:
    """Which positions of the batch at hand are tokens, bool (text, position); set before a copy is run.

    Padding must not enter a scale, and a scale that rows share is that of one text.
    """

    is_real: Tensor


def is_rowwise(scaling: Scaling) -> bool:
    """Whether each row is rounded by itself, whatever other rows there are."""
    return scaling.granularity == "row" or (scaling.block is not None and scaling.block[0] == 1)


def rounded_product(x: Tensor, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """x·wᵀ of rounded float32 operands, (…, output), rounded to ``dtype`` once.

    FP8 hardware adds up products of codes in float32, multiplies the sum with the scales and rounds the result to
    BF16. A code times its scale has more bits than BF16, so the operands stay in float32: what is left of a difference
    is the order of float32 sums and the rounding of code times scale, some 2⁻²³, far below the 2⁻⁹ of the result.
    """
    return F.linear(x, weight, None if bias is None else bias.float()).to(dtype)


class RoundedLinear(nn.Module):
    """A linear layer in FP8: the weight was rounded once, inputs are at each call."""

    def __init__(self, linear: nn.Linear, weight: Quantized | None, activation: Rounding | None, tokens: TokenMask):
        super().__init__()
        self.quantized, self.activation, self.tokens = weight, activation, tokens
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, input) to (…, output); rows are the positions of the batch, text after text. Padding counts as 0."""
        is_real = self.tokens.is_real
        by_text = x.reshape(*is_real.shape, -1).float().masked_fill(~is_real[..., None], 0)
        if self.activation is not None:
            by_text = round_trip(by_text, self.activation)
        weight = self.weight.float() if self.quantized is None else self.quantized.dequantize()
        return rounded_product(by_text, weight, x.dtype, self.bias).view(*x.shape[:-1], -1)


class RoundedRouter(nn.Module):
    """``Llama4Router`` whose logits are computed in FP8."""

    def __init__(self, linear: RoundedLinear, top_k: int):
        super().__init__()
        self.linear, self.top_k = linear, top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and logits (token, expert), as ``Llama4Router`` returns them."""
        logits = self.linear(x)
        value, index = logits.topk(self.top_k, dim=1)
        scores = torch.full_like(logits, -torch.inf).scatter_(1, index, value)
        return scores.float().sigmoid().to(logits.dtype), logits


class RoundedExperts(nn.Module):
    """Routed experts in FP8: each expert's inputs are rounded by themselves, and so are those of its ``down_proj``."""

    def __init__(
        self,
        experts: Llama4TextExperts,
        gate_up: Quantized | None,
        down: Quantized | None,
        activation: Rounding | None,
    ):
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.act_fn = experts.act_fn

    def run(self, index: int, rows: Tensor, text: Tensor) -> Tensor:
        """What expert ``index`` makes of its ``rows`` (row, channel), which belong to the texts ``text`` (row,)."""
        dtype = rows.dtype
        gate_up = _expert(self.gate_up, self.gate_up_proj, index)
        gate, up = rounded_product(rounded_rows(rows, text, self.activation), gate_up, dtype).chunk(2, dim=-1)
        inner = up * self.act_fn(gate)
        down = _expert(self.down, self.down_proj, index)
        return rounded_product(rounded_rows(inner, text, self.activation), down, dtype)


def _expert(quantized: Quantized | None, weight: Tensor, index: int) -> Tensor:
    """The weight (output, input) of one expert, float32."""
    if quantized is None:
        return weight[index].T.float()
    one = Quantized(
        quantized.codes[index],
        quantized.scale[index],
        quantized.format,
        quantized.block,
        quantized.n_saturated[index],
        quantized.n_underflow[index],
        quantized.n_nonzero[index],
    )
    return one.dequantize()


def rounded_rows(rows: Tensor, text: Tensor, activation: Rounding | None) -> Tensor:
    """Rows (row, channel) of the texts ``text`` (row,), rounded text by text, in float32."""
    rows = rows.float()
    if activation is None:
        return rows
    if is_rowwise(activation.scaling):
        return round_trip(rows, activation)
    by_text, place = grouped_by_text(rows, text)
    return round_trip(by_text, activation)[place]


def grouped_by_text(rows: Tensor, text: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rows (row, channel) text by text, (text, row, channel) filled up with 0, and where in that each of them is.

    ``text`` (row,) numbers the text of each row and does not fall.
    """
    counts = text.bincount()
    first = counts.cumsum(0) - counts
    place = (text, torch.arange(len(text), device=text.device) - first[text])
    by_text = rows.new_zeros(len(counts), int(counts.max()), rows.shape[-1])
    by_text[place] = rows
    return by_text, place


@dataclass(frozen=True)
class LayerRounding:
    """What of a layer is rounded, and how: kinds of matrices, their weights and their inputs."""

    kinds: frozenset[str]
    weight: Rounding | None
    activation: Rounding | None

    @property
    def is_nothing(self) -> bool:
        """Whether the layer stays as it is."""
        return not self.kinds or (self.weight is None and self.activation is None)


NOT_ROUNDED = LayerRounding(frozenset(), None, None)


@dataclass
class LayerCopy:
    """A working copy of a layer, and the tokens of the batch that it is run on.

    ``observe``, if set, is called with what enters each routed expert's matrices: their name, the expert, rows (row,
    channel) and the text (row,) that each is of; never padding.
    """

    layer: Any
    tokens: TokenMask
    observe: Callable[[str, int, Tensor, Tensor], None] | None = None


def layer_copy(
    layer: Llama4TextDecoderLayer,
    config: Llama4TextConfig,
    dtype: torch.dtype = torch.bfloat16,
    rounding: LayerRounding = NOT_ROUNDED,
) -> LayerCopy:
    """A working copy of a layer, weights in ``dtype``, then rounded as ``rounding`` says.

    Weights are rounded from ``dtype``, since FP8 checkpoints are made from BF16 ones.
    """
    copy, tokens = bare(layer, dtype, config), TokenMask()
    if rounding.is_nothing:
        return LayerCopy(copy, tokens)
    quantized = {
        matrix.name: None if rounding.weight is None else _quantized(matrix.weight, rounding.weight)
        for matrix in matrices(copy)
        if matrix.kind in rounding.kinds
    }

    def linear(module: nn.Module, child: str, name: str) -> None:
        if name in quantized:
            own = RoundedLinear(getattr(module, child), quantized[name], rounding.activation, tokens)
            setattr(module, child, own)

    for child in PROJECTIONS:
        linear(copy.self_attn, child, child)
    block = copy.feed_forward
    is_moe = isinstance(block, Llama4TextMoe)
    for child in MLP_PROJECTIONS:
        linear(block.shared_expert if is_moe else block, child, f"{'shared_expert' if is_moe else 'mlp'}.{child}")
    if "router" in quantized:
        router = RoundedLinear(block.router, quantized["router"], rounding.activation, tokens)
        block.router = RoundedRouter(router, block.router.top_k)
    if "experts.down_proj" in quantized:
        block.experts = RoundedExperts(
            block.experts, quantized["experts.gate_up_proj"], quantized["experts.down_proj"], rounding.activation
        )
    return LayerCopy(copy, tokens)


def _quantized(weight: Tensor, rounding: Rounding) -> Quantized:
    return quantize(weight, format=rounding.format, scaling=rounding.scaling)


class RoundedHead(nn.Module):
    """The output head in FP8: inputs are rounded text by text, logits computed for a few tokens at a time."""

    def __init__(self, head: nn.Linear, rounding: LayerRounding):
        super().__init__()
        quantized = None if rounding.weight is None else _quantized(head.weight, rounding.weight)
        self.weight = head.weight.float() if quantized is None else quantized.dequantize()
        self.activation = rounding.activation

    def forward(self, rounded: Tensor) -> Tensor:
        """Logits (token, vocabulary) from inputs that were rounded."""
        return rounded_product(rounded, self.weight, torch.bfloat16)


@dataclass
class LayerOutputs:
    """What a layer computed for one batch of B texts of n positions: its :data:`SITES`, and what entered its parts.

    ``router``, ``scores`` (B·n, E), ``routed_experts`` and ``shared_expert`` (B·n, H) are None in a dense layer; all
    else is (B, n, H).
    """

    attention_input: Tensor
    attention: Tensor
    feed_forward_input: Tensor
    feed_forward: Tensor
    residual: Tensor
    router: Tensor | None = None
    scores: Tensor | None = None
    routed_experts: Tensor | None = None
    shared_expert: Tensor | None = None


def run_layer(copy: LayerCopy, hidden: Tensor, is_real: Tensor, **attention_inputs: Any) -> LayerOutputs:
    """``Llama4TextDecoderLayer.forward`` on hidden states (B, n, H), which keeps what its parts returned.

    Parameters
    ----------
    is_real : (B, n), which positions are tokens.
    attention_inputs : ``position_embeddings`` and ``attention_mask``.
    """
    x = copy.layer.input_layernorm(hidden)
    attention = run_attention(copy, x, is_real, **attention_inputs)
    middle = hidden + attention
    y = copy.layer.post_attention_layernorm(middle)
    outputs = LayerOutputs(x, attention, feed_forward_input=y, feed_forward=y, residual=middle)
    run_feed_forward(copy, outputs, y, is_real)
    outputs.residual = middle + outputs.feed_forward
    return outputs


def run_attention(copy: LayerCopy, x: Tensor, is_real: Tensor, **attention_inputs: Any) -> Tensor:
    """The attention of a layer on its input (B, n, H); parameters as of :func:`run_layer`."""
    copy.tokens.is_real = is_real
    return copy.layer.self_attn(hidden_states=x, **attention_inputs)[0]


def run_feed_forward(copy: LayerCopy, outputs: LayerOutputs, x: Tensor, is_real: Tensor) -> None:
    """The feed-forward part of a layer on its input (B, n, H), set in ``outputs``."""
    copy.tokens.is_real = is_real
    block = copy.layer.feed_forward
    outputs.feed_forward_input = x
    if not isinstance(block, Llama4TextMoe):
        outputs.feed_forward = block(x)
        return
    flat = x.reshape(-1, x.shape[-1])
    outputs.scores, outputs.router = block.router(flat)
    outputs.shared_expert = block.shared_expert(flat)
    outputs.routed_experts = run_experts(copy, x, outputs.scores, is_real)
    outputs.feed_forward = (outputs.shared_expert + outputs.routed_experts).view(x.shape)


def run_experts(copy: LayerCopy, x: Tensor, scores: Tensor, is_real: Tensor) -> Tensor:
    """What the routed experts add for an input (B, n, H) and the router's ``scores`` (B·n, E): (B·n, H).

    Computed as ``SparseLlama4TextMoe`` does, to the bit where nothing is rounded; rounded experts see no padding.
    """
    flat = x.reshape(-1, x.shape[-1])
    experts = copy.layer.feed_forward.experts
    is_chosen = scores != 0
    if isinstance(experts, RoundedExperts):
        is_chosen = is_chosen & is_real.flatten()[:, None]
    expert, token = is_chosen.t().nonzero(as_tuple=True)
    routed_in = flat[token] * scores[token, expert].unsqueeze(-1)
    routed = torch.zeros_like(flat)
    outputs = []
    start = 0
    for index, count in enumerate(torch.bincount(expert, minlength=scores.shape[-1]).tolist()):
        rows = slice(start, start + count)
        start += count
        if not count:
            continue
        text = token[rows] // is_real.shape[1]
        if isinstance(experts, RoundedExperts):
            outputs.append(experts.run(index, routed_in[rows], text))
            continue
        gate, up = (routed_in[rows] @ experts.gate_up_proj[index]).chunk(2, dim=-1)
        inner = up * experts.act_fn(gate)
        outputs.append(inner @ experts.down_proj[index])
        if copy.observe is not None:
            own = is_real.flatten()[token[rows]]
            copy.observe("experts.gate_up_proj", index, routed_in[rows][own], text[own])
            copy.observe("experts.down_proj", index, inner[own], text[own])
    if outputs:
        routed.index_add_(0, token, torch.cat(outputs))
    return routed


def chosen_experts(scores: Tensor, logits: Tensor, top_k: int) -> Tensor:
    """Which experts each token goes to, bool (token, expert).

    Read from the scores, since a second top-k on BF16 logits could break a tie the other way; where the sigmoid of a
    chosen logit underflowed to 0, from the logits.
    """
    is_chosen = scores != 0
    by_logit = torch.zeros_like(is_chosen).scatter_(1, logits.topk(top_k, dim=1).indices, True)
    return torch.where(is_chosen.sum(dim=1, keepdim=True) == top_k, is_chosen, by_logit)
