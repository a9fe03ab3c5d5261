"""What ``probe.fp8_error.drift`` measures, once more and slowly: whole models copied, one text at a time.

Nothing here comes from ``probe``: a recipe is read, and that is all. Rounding is arithmetic on floats instead of casts;
models are transformers' own, with the ``forward`` of their linear layers and experts replaced; what modules are handed
and return is caught by hooks.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

SITES = ("attention", "router", "routed_experts", "shared_expert", "feed_forward", "residual")

# bits of the fraction, exponent of the smallest normal number, largest value
FORMATS = {"e4m3fn": (3, -6, 448.0), "e5m2": (2, -14, 57344.0)}


def rounded(x: Tensor, format_name: str) -> Tensor:
    """Values to the nearest of the format, ties to even, by arithmetic in float64."""
    if format_name == "int4":
        return x.double().clamp(-7, 7).round()  # torch rounds halves to even
    bits, smallest, largest = FORMATS[format_name]
    x = x.double().clamp(-largest, largest)
    exponent = torch.frexp(x).exponent.double() - 1
    step = torch.exp2(exponent.clamp(min=smallest) - bits)
    return (x / step).round() * step


def scale_of(group: Tensor, rounding) -> Tensor:
    """The scale of one group of values."""
    scaling = rounding.scaling
    largest = {"int4": 7.0}.get(rounding.format) or FORMATS[rounding.format][2]
    amax = group.detach().abs().max().float()
    if scaling.amax is not None:
        amax = torch.tensor(scaling.amax)
    if scaling.cap is not None:
        amax = amax.clamp(1 / 512, scaling.cap)
    elif amax == 0:
        return torch.tensor(1.0)
    if scaling.power_of_two == "floor":
        return torch.tensor(2.0 ** (math.floor(math.log2(float(amax))) - math.floor(math.log2(largest))))
    if scaling.power_of_two == "ceil":
        return torch.tensor(2.0 ** math.ceil(math.log2(float(amax / largest))))
    return amax / largest


def rounded_matrix(x: Tensor, rounding) -> Tensor:
    """One matrix (row, column), rounded group by group, in float32."""
    if rounding is None or not x.numel():
        return x.float()
    x = x.float()
    height, width = {
        "tensor": x.shape,
        "row": (1, x.shape[1]),
        "column": (x.shape[0], 1),
        "block": rounding.scaling.block,
    }[rounding.scaling.granularity]
    result = torch.empty_like(x)
    for top in range(0, x.shape[0], height):
        for left in range(0, x.shape[1], width):
            place = (slice(top, top + height), slice(left, left + width))
            scale = scale_of(x[place], rounding)
            result[place] = rounded(x[place] / scale, rounding.format).float() * scale
    return result


@dataclass
class Caught:
    """What one layer was handed and returned for one text: inputs and outputs by site."""

    inputs: dict[str, tuple] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def quantized_linear(linear: nn.Linear, recipe) -> None:
    weight = rounded_matrix(linear.weight, recipe.weight)

    def forward(x: Tensor) -> Tensor:
        rows = rounded_matrix(x.reshape(-1, x.shape[-1]), recipe.activation)
        result = rows @ weight.T
        if linear.bias is not None:
            result = result + linear.bias.float()
        return result.to(x.dtype).view(*x.shape[:-1], -1)

    linear.forward = forward


def own_moe(block: Llama4TextMoe, recipe, choice: dict) -> None:
    """Replace a block's forward by one that runs each expert on its tokens; ``recipe`` None: as it is.

    ``choice`` may hold ``scores`` to be used instead of the router's.
    """
    gate_ups = [rounded_matrix(w.T, recipe.weight) for w in block.experts.gate_up_proj] if recipe else None
    downs = [rounded_matrix(w.T, recipe.weight) for w in block.experts.down_proj] if recipe else None

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(-1, x.shape[-1])
        scores, logits = block.router(x)
        scores = choice.get("scores", scores)
        routed = torch.zeros(x.shape)  # summed in float32, as torch sums BF16
        for expert in range(block.num_experts):
            tokens = [i for i in range(len(x)) if scores[i, expert] != 0]
            if not tokens:
                continue
            rows = x[tokens] * scores[tokens, expert][:, None]
            if recipe is None:
                gate, up = (rows @ block.experts.gate_up_proj[expert]).chunk(2, dim=-1)
                result = (up * block.experts.act_fn(gate)) @ block.experts.down_proj[expert]
            else:
                product = rounded_matrix(rows, recipe.activation) @ gate_ups[expert].T
                gate, up = product.to(x.dtype).chunk(2, dim=-1)
                inner = rounded_matrix(up * block.experts.act_fn(gate), recipe.activation)
                result = (inner @ downs[expert].T).to(x.dtype)
            for i, token in enumerate(tokens):
                routed[token] += result[i].float()
        routed = routed.to(x.dtype)
        choice["routed"], choice["used"] = routed, scores
        return block.shared_expert(x) + routed, logits

    block.forward = forward


class Copy:
    """A whole copy of a model, cast, rounded and watched."""

    def __init__(self, model, dtype: torch.dtype = torch.bfloat16, recipe=None, attention: str = "sdpa") -> None:
        self.model = copy.deepcopy(model).eval()
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model.set_attn_implementation(attention)
        self.layers = list(self.model.model.layers)
        self.choices: list[dict] = [{} for _ in self.layers]
        self.caught: list[Caught] = []
        n_layers = len(self.layers)

        def covers(kind: str, index: int) -> bool:
            return recipe is not None and recipe.covers(kind, index, n_layers)

        for index, layer in enumerate(self.layers):
            attention_part, block = layer.self_attn, layer.feed_forward
            is_moe = isinstance(block, Llama4TextMoe)
            if covers("attention", index):
                for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                    quantized_linear(getattr(attention_part, name), recipe)
            mlp, kind = (block.shared_expert, "shared_expert") if is_moe else (block, "dense_mlp")
            if covers(kind, index):
                for name in ("gate_proj", "up_proj", "down_proj"):
                    quantized_linear(getattr(mlp, name), recipe)
            if is_moe:
                if covers("router", index):
                    quantized_router(block.router, recipe)
                own_moe(block, recipe if covers("routed_experts", index) else None, self.choices[index])
            self._watch(index, layer)
        if recipe is not None and "output_head" in recipe.modules:
            quantized_linear(self.model.lm_head, recipe)

    def _watch(self, index: int, layer: nn.Module) -> None:
        def keep(site: str, output_of=lambda output: output):
            def hook(module, args, kwargs, output):
                self.caught[index].inputs[site] = (args, kwargs)
                self.caught[index].outputs[site] = output_of(output).detach().clone()

            return hook

        def register(module: nn.Module, *arguments) -> None:
            module.register_forward_hook(keep(*arguments), with_kwargs=True)

        register(layer.self_attn, "attention", lambda output: output[0])
        register(layer, "residual")
        if isinstance(layer.feed_forward, Llama4TextMoe):
            register(layer.feed_forward, "feed_forward", lambda output: output[0])
            register(layer.feed_forward.router, "router", lambda output: output[1])
            register(layer.feed_forward.shared_expert, "shared_expert")
        else:
            register(layer.feed_forward, "feed_forward")

    @torch.no_grad()
    def run(self, ids: list[int]) -> tuple[list[Caught], Tensor]:
        """One text: what each layer returned, and the logits in float32."""
        self.caught = [Caught() for _ in self.layers]
        for choice in self.choices:
            choice.clear()
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0].float()
        for caught, choice in zip(self.caught, self.choices, strict=True):
            if choice:
                caught.outputs["routed_experts"] = choice["routed"]
                caught.outputs["scores"] = choice["used"]
        return self.caught, logits

    @torch.no_grad()
    def isolated(self, reference: list[Caught], dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """What each part of this model makes of what the reference's part was handed, site by site."""

        def own(value):
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        results = []
        for index, layer in enumerate(self.layers):
            given, result = reference[index], {}
            self.caught = [Caught() for _ in self.layers]
            parts = {"attention": layer.self_attn, "residual": layer, "feed_forward": layer.feed_forward}
            if "router" in given.inputs:
                parts |= {"router": layer.feed_forward.router, "shared_expert": layer.feed_forward.shared_expert}
            for site, part in parts.items():
                args, kwargs = given.inputs[site]
                self.choices[index].clear()
                output = part(*map(own, args), **{name: own(value) for name, value in kwargs.items()})
                if isinstance(output, tuple):
                    output = output[1] if site == "router" else output[0]
                result[site] = output
            if "router" in given.inputs:
                args, kwargs = given.inputs["feed_forward"]
                self.choices[index].clear()
                self.choices[index]["scores"] = given.outputs["scores"].to(dtype)
                layer.feed_forward(*map(own, args))
                result["routed_experts"] = self.choices[index]["routed"]
                self.choices[index].clear()
            results.append(result)
        return results


def quantized_router(router: nn.Linear, recipe) -> None:
    weight = rounded_matrix(router.weight, recipe.weight)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        logits = (rounded_matrix(x, recipe.activation) @ weight.T).to(x.dtype)
        value, index = torch.topk(logits, router.top_k, dim=1)
        scores = torch.zeros_like(logits).scatter_(1, index, torch.sigmoid(value.float()).to(x.dtype))
        return scores, logits

    router.forward = forward


@dataclass
class Study:
    """The numbers of ``drift`` by recipe: sqnr (layer, site, mode), flips (token, layer) and so on."""

    sqnr: np.ndarray
    relative_error: np.ndarray
    cosine: np.ndarray
    flipped: np.ndarray
    margin_change: np.ndarray
    router_margin: np.ndarray
    logit_kl: np.ndarray
    top1_agreement: np.ndarray
    loss_change: np.ndarray


def study(model, ids: list[list[int]], recipe) -> Study:
    """``drift`` of one recipe; ``recipe`` may also be "bf16" or "fp32"."""
    dtype = torch.float32 if recipe == "fp32" else torch.bfloat16
    reference = Copy(model)
    own = Copy(model, dtype, None if isinstance(recipe, str) else recipe, "eager" if recipe == "bf16" else "sdpa")
    n_layers, top_k = len(reference.layers), model.config.num_experts_per_tok
    pairs: dict[tuple[int, str, str], list[tuple[Tensor, Tensor]]] = {}
    flipped, change, margins, kl, agreement, loss_change = [], [], [], [], [], []
    for text in ids:
        first, logits = reference.run(text)
        alone = own_isolated(own, first, recipe, dtype, reference)
        second, own_logits = own.run(text)
        for layer in range(n_layers):
            for site in SITES:
                if site in first[layer].outputs:
                    x = first[layer].outputs[site]
                    pairs.setdefault((layer, site, "isolated"), []).append((x, alone[layer][site]))
                    pairs.setdefault((layer, site, "accumulated"), []).append((x, second[layer].outputs[site]))
        moe = [layer for layer in range(n_layers) if "router" in first[layer].outputs]
        of_text = [[_flip(first[layer], second[layer], i, top_k) for layer in moe] for i in range(len(text))]
        flipped += [[cell[0] for cell in row] for row in of_text]
        change += [[cell[1] for cell in row] for row in of_text]
        margins += [[cell[2] for cell in row] for row in of_text]
        log_p, log_q = logits.double().log_softmax(-1), own_logits.double().log_softmax(-1)
        kl.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
        agreement.append(float((logits.argmax(-1) == own_logits.argmax(-1)).double().mean()))
        target = torch.tensor(text[1:])[:, None]
        losses = [
            -log[:-1].gather(1, target).mean() if len(text) > 1 else torch.tensor(torch.nan) for log in (log_q, log_p)
        ]
        loss_change.append(float(losses[0] - losses[1]))
    errors = np.full((3, n_layers, len(SITES), 2), np.nan)
    for (layer, site, mode), own_pairs in pairs.items():
        x = torch.cat([a.double().flatten() for a, _ in own_pairs])
        y = torch.cat([b.double().flatten() for _, b in own_pairs])
        noise, signal = (x - y).norm(), x.norm()
        place = (layer, SITES.index(site), int(mode == "accumulated"))
        errors[(0, *place)] = float(20 * torch.log10(signal / noise)) if noise else np.inf
        errors[(1, *place)] = float(noise / signal)
        errors[(2, *place)] = float(x @ y / (signal * y.norm()))
    return Study(
        *errors,
        flipped=np.array(flipped),
        margin_change=np.array(change),
        router_margin=np.array(margins),
        logit_kl=np.array(kl),
        top1_agreement=np.array(agreement),
        loss_change=np.array(loss_change),
    )


def own_isolated(own: Copy, first: list[Caught], recipe, dtype, reference: Copy) -> list[dict[str, Tensor]]:
    """Isolated errors; masks that were made for sdpa are made anew for eager attention."""
    if recipe != "bf16":
        return own.isolated(first, dtype)
    for caught in first:
        n = caught.outputs["attention"].shape[1]
        for site in ("attention", "residual"):
            args, kwargs = caught.inputs[site]
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(n, n).tril().bool()[None, None]
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
            caught.inputs[site] = (args, kwargs | {"attention_mask": mask})
    return own.isolated(first, dtype)


def _flip(first: Caught, second: Caught, token: int, top_k: int) -> tuple[bool, float, float]:
    """Whether the set of experts differs, how the reference's margin changed, and that margin."""
    logits, own = (caught.outputs["router"][token].float().tolist() for caught in (first, second))
    chosen, own_chosen = (
        {e for e, s in enumerate(c.outputs["scores"][token].tolist()) if s != 0} for c in (first, second)
    )
    weakest = min(chosen, key=lambda expert: (logits[expert], expert))
    others = [expert for expert in range(len(logits)) if expert not in chosen]
    if not others:
        return chosen != own_chosen, math.nan, math.nan
    runner_up = max(others, key=lambda expert: (logits[expert], -expert))
    margin = logits[weakest] - logits[runner_up]
    return chosen != own_chosen, own[weakest] - own[runner_up] - margin, margin
