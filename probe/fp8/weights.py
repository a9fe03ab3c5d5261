"""What rounding does to the weights, matrix by matrix; part of ``probe.fp8_error``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import cast

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import Llama4Config, Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextDecoderLayer

from probe import schema
from probe.float8 import DeviationSums, Rounding, quantize
from probe.fp8.layers import MODULES, matrices, require_known
from probe.models import LoadedModel, ModelError, read_config, shipped_models
from probe.recipes import Recipe, RecipeError, described, resolve
from probe.schema import ATTENTION_KINDS
from probe.sites import NotLlama4Error, output_head

SLAB = 1 << 20
"""Values of a matrix that are rounded at once. Float32 copies of so few stay in a core's cache, which makes it twice as
fast; those of a whole output head would take 4 GB each."""

TENSORS = {
    **{name: f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "router": "feed_forward.router.weight",
    **{f"experts.{name}": f"feed_forward.experts.{name}" for name in ("gate_up_proj", "down_proj")},
    **{
        f"{module}.{name}": f"feed_forward.{path}{name}.weight"
        for module, path in (("shared_expert", "shared_expert."), ("mlp", ""))
        for name in ("gate_proj", "up_proj", "down_proj")
    },
}
"""Where a checkpoint keeps the matrices of a layer. Those of routed experts are stacked (expert, input, output)."""

PREFIXES = {"language_model.model.": "language_model.", "model.": "", "": None}
"""What stands before the names of the decoder's tensors, and before the output head's: in a model for images and text,
in one for text, and in a decoder saved by itself, which has no head."""

FLOATS = ("BF16", "F16", "F32", "F64")
"""Dtypes, as safetensors calls them, of weights that are not quantised yet."""

LOSSES = ("sqnr", "underflow", "saturation")
"""Variables that differ between recipes."""

EVERY_EXPERT = slice(None)


def weight_error(
    model: LoadedModel | nn.Module | str | Path,
    recipe: str | Recipe | Sequence[str | Recipe] = "meta",
    *,
    progress: bool | None = None,
) -> xr.Dataset:
    """How far rounded weights are from the original ones, for every matrix as if the recipe covered it.

    Parameters
    ----------
    model : from :func:`probe.load`, or any module that holds a Llama 4 text decoder; or a folder with config.json and
        safetensors as transformers saves them, or the name of a shipped model: then the model is never built, and
        no more than one matrix, of one expert, is in memory.
    recipe : name, or :class:`probe.recipes.Recipe`, or several of them.
    progress : show a progress bar; None: in a terminal and in notebooks.

    Returns
    -------
    Dataset, the group ``/fp8_weights`` (recipe, layer, module, expert): ``sqnr`` in dB, infinite where nothing is lost,
    ``underflow`` and ``saturation``, units "1", ``amax``, and ``dynamic_range`` in bits; ``covered`` (recipe, layer,
    module), bool; ``head_sqnr``, ``head_underflow`` and ``head_saturation`` (recipe) of the output head, where there is
    one. A matrix that all experts share has the same value at each of them. NaN is a matrix that a layer lacks; and the
    underflow and the dynamic range of one that is all zeros.

    Raises
    ------
    ModelError, QuantizationError
        Before anything is rounded: for a folder without weights in safetensors, a model that is quantised already,
        tensors that are missing, of another shape, not in memory, or that hold NaN or infinity; names them.
    NotLlama4Error
        If the model is of another kind, or has no mixture-of-experts layer.
    RecipeError
        For an unknown recipe, for none, for two of the same name, and for one that leaves the weights as they are.

    Notes
    -----
    Rounding is done on float32 values of the weights, whatever dtype they are kept in. SQNR is 20·log₁₀(‖w‖/‖w−ŵ‖),
    with sums in float64. The dynamic range is log₂ of the largest over the smallest non-zero magnitude.
    """
    recipes = _recipes(recipe)
    shown = (Console().is_terminal or Console().is_jupyter) if progress is None else progress
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("matrices"))
    with (
        ExitStack() as stack,
        torch.inference_mode(),
        Progress(*columns, TimeRemainingColumn(), disable=not shown, transient=True) as bar,
    ):
        if isinstance(model, LoadedModel | nn.Module):
            weights = _live(model.model if isinstance(model, LoadedModel) else model)
        else:
            folder = Path(model)
            if str(model) in shipped_models():
                folder = stack.enter_context(as_file(files("probe") / "assets" / "models" / str(model)))
            weights = _checkpoint(folder)
            # One more reading costs little beside the rounding, and a fault in the last layer is found at once.
            for part in bar.track(weights.parts, description="checking weights"):
                _refuse_non_finite(folder, part)
        return _dataset(weights, recipes, lambda parts: bar.track(parts, description="rounding weights"))


@dataclass(frozen=True)
class _Part:
    """One matrix of a layer, or of one expert in it, or the output head, whose layer is None.

    ``read`` returns it (output, input), in the dtype that it is kept in.
    """

    name: str
    layer: int | None
    module: str
    expert: int | slice
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class _Weights:
    """All matrices of a model, wherever they are."""

    config: Llama4TextConfig
    parts: list[_Part]


def _recipes(recipe: str | Recipe | Sequence[str | Recipe]) -> list[Recipe]:
    """The recipes asked for, checked."""
    recipes = [resolve(one) for one in ([recipe] if isinstance(recipe, str | Recipe) else recipe)]
    names = [one.name for one in recipes]
    if not recipes:
        raise RecipeError("no recipe is given: name at least one")
    if len(set(names)) < len(names):
        raise RecipeError(f"two recipes have the same name, the names are {', '.join(names)}: rename one")
    if unrounded := [one.name for one in recipes if one.weight is None]:
        raise RecipeError(f"recipe {unrounded[0]} leaves the weights as they are: give one whose weight is a Rounding")
    return recipes


def _live(model: nn.Module) -> _Weights:
    """The matrices of a model in memory."""
    decoder = require_known(model)
    parts = []
    for layer, block in enumerate(decoder.layers):
        for matrix in matrices(cast(Llama4TextDecoderLayer, block)):
            name = f"layer {layer} {matrix.name}"
            stacked = dict(enumerate(matrix.weight)) if matrix.kind == "routed_experts" else {None: matrix.weight}
            for expert, weight in stacked.items():
                place = EVERY_EXPERT if expert is None else expert
                parts.append(_Part(name, layer, matrix.name, place, weight.contiguous))
    if (head := output_head(model)) is not None:
        parts.append(_Part("output head", None, "", EVERY_EXPERT, head.get_parameter("weight").detach))
    return _Weights(decoder.config, parts)


def _checkpoint(folder: Path) -> _Weights:
    """The matrices in a folder that transformers saved, checked by what the files say of them; none is read yet."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder} is not a folder: pass one with config.json and *.safetensors, the name of a shipped model "
            f"({', '.join(shipped_models())}), or what probe.load returns"
        )
    config = read_config(str(folder))
    text_config = cast(Llama4TextConfig, config.text_config if isinstance(config, Llama4Config) else config)
    for part in (config, text_config):
        if settings := getattr(part, "quantization_config", None):
            method = settings.get("quant_method", "?") if isinstance(settings, Mapping) else type(settings).__name__
            raise ModelError(
                f"{folder} is quantised already (quantization_config: {method}): pass the checkpoint it was made from"
            )
    is_moe, n_experts = set(text_config.moe_layers or ()), text_config.num_local_experts
    if not is_moe:
        raise NotLlama4Error(f"{folder} has no mixture-of-experts layer: pass a Llama 4 that has")
    layout = _layout(folder)
    prefix = next((one for one in PREFIXES if f"{one}layers.0.self_attn.q_proj.weight" in layout), None)
    if prefix is None:
        raise ModelError(
            f"{folder}: the weights lack layers.0.self_attn.q_proj.weight, be it after "
            f"{' or '.join(filter(None, PREFIXES))}: they are incomplete, or not named as transformers names them"
        )
    parts, missing = [], []
    for layer, module in ((layer, module) for layer in range(text_config.num_hidden_layers) for module in MODULES):
        if MODULES[module] in _lacking(layer in is_moe):
            continue
        key = f"{prefix}layers.{layer}.{TENSORS[module]}"
        if key not in layout:
            missing.append(key)
            continue
        stacked = MODULES[module] == "routed_experts"
        _check_tensor(folder, key, layout[key], n_experts if stacked else None)
        read = partial(_read, layout[key].path, key)
        places: list[int | slice] = [*range(n_experts)] if stacked else [EVERY_EXPERT]
        parts += [_Part(key, layer, module, place, partial(read, place)) for place in places]
    if (before_head := PREFIXES[prefix]) is not None:
        key = f"{prefix}embed_tokens.weight" if text_config.tie_word_embeddings else f"{before_head}lm_head.weight"
        if key not in layout:
            missing.append(key)
        else:
            _check_tensor(folder, key, layout[key], None)
            parts.append(_Part(key, None, "", EVERY_EXPERT, partial(_read, layout[key].path, key, EVERY_EXPERT)))
    if missing:
        raise ModelError(f"{folder}: the weights lack {len(missing)} tensors, among them {missing[0]}")
    return _Weights(text_config, parts)


def _lacking(is_moe: bool) -> set[str]:
    """Kinds of matrices that a mixture-of-experts layer, or a dense one, does not have."""
    return {"dense_mlp"} if is_moe else {"router", "routed_experts", "shared_expert"}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: where it is, and its dtype and shape as the file's header says."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


def _layout(folder: Path) -> dict[str, _Stored]:
    """The tensors of a checkpoint by name."""
    layout = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as stored:
                for key in stored.keys():
                    part = stored.get_slice(key)
                    layout[key] = _Stored(path, part.get_dtype(), tuple(part.get_shape()))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read, copy or download it again: {error}") from error
    return layout


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index lists, if it has one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            listed = {folder / name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} does not say which tensor is in which file: download it again") from error
        if absent := sorted(path.name for path in listed if not path.exists()):
            raise ModelError(f"{folder} lacks {len(absent)} weight files, among them {absent[0]}: download it again")
        return sorted(listed)
    if found := sorted(folder.glob("*.safetensors")):
        return found
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    fix = f": save {pickled[0]} once more with transformers' save_pretrained" if pickled else ""
    raise ModelError(f"{folder}: the folder holds no *.safetensors; probe reads no other kind of weights{fix}")


def _check_tensor(folder: Path, key: str, stored: _Stored, n_stacked: int | None) -> None:
    """Refuse a tensor that is quantised, or not one matrix, or not ``n_stacked`` of them."""
    if stored.dtype not in FLOATS:
        raise ModelError(
            f"{folder}: {key} is {stored.dtype}, so it is quantised already: pass the checkpoint it was made from"
        )
    is_right = len(stored.shape) == 2 if n_stacked is None else stored.shape[:-2] == (n_stacked,)
    if not is_right:
        expected = "a matrix" if n_stacked is None else f"{n_stacked} stacked matrices"
        raise ModelError(
            f"{folder}: {key} has shape {stored.shape}, expected {expected}: config.json is of another model"
        )


def _read(path: Path, key: str, expert: int | slice) -> Tensor:
    """A matrix (output, input) from a file, which is open no longer than that takes."""
    with safe_open(path, framework="pt") as stored:
        return stored.get_tensor(key) if isinstance(expert, slice) else stored.get_slice(key)[expert].T.contiguous()


def _refuse_non_finite(folder: Path, part: _Part) -> None:
    weight = part.read()
    # Minimum and maximum of a tensor with NaN are NaN.
    if weight.numel() and not (weight.amin().isfinite() and weight.amax().isfinite()):
        where = part.name if isinstance(part.expert, slice) else f"{part.name}, expert {part.expert},"
        raise ModelError(f"{folder}: {where} holds NaN or infinity, for which there is no scale: use intact weights")


def _dataset(weights: _Weights, recipes: list[Recipe], track: Callable[[list[_Part]], Iterable[_Part]]) -> xr.Dataset:
    """The group /fp8_weights, from one matrix after the other."""
    n_layers, n_experts = weights.config.num_hidden_layers, weights.config.num_local_experts
    modules = [module for module in MODULES if any(part.module == module for part in weights.parts)]
    # Several recipes may round weights in the same way.
    roundings = list(dict.fromkeys(recipe.weight for recipe in recipes if recipe.weight is not None))
    by_recipe = [roundings.index(recipe.weight) for recipe in recipes if recipe.weight is not None]
    shape = (n_layers, len(modules), n_experts)
    lost = np.full((len(LOSSES), len(roundings), *shape), np.nan, np.float32)
    amax, dynamic_range = np.full((2, *shape), np.nan, np.float32)
    head = np.full((len(LOSSES), len(roundings)), np.nan, np.float32)
    for part in track(weights.parts):
        largest, smallest, losses = _measured(part.read(), roundings)
        if part.layer is None:
            head[:] = losses
            continue
        place = part.layer, modules.index(part.module), part.expert
        lost[(..., *place)] = losses[..., None] if isinstance(part.expert, slice) else losses
        amax[place] = largest
        dynamic_range[place] = math.log2(largest) - math.log2(smallest) if largest else math.nan
    kinds = [(layer, MODULES[module]) for layer in range(n_layers) for module in modules]
    there = ~np.isnan(amax).all(axis=-1)
    covered = np.array([[recipe.covers(kind, layer, n_layers) for layer, kind in kinds] for recipe in recipes])
    arrays = {
        **dict(zip(LOSSES, lost[:, by_recipe], strict=True)),
        "amax": np.broadcast_to(amax, (len(recipes), *shape)),
        "dynamic_range": np.broadcast_to(dynamic_range, (len(recipes), *shape)),
        "covered": covered.reshape(len(recipes), n_layers, len(modules)) & there,
        "recipe": [recipe.name for recipe in recipes],
        "layer": np.arange(n_layers),
        # no_rope_layers holds 1 where attention is rotary, despite its name.
        "attention_kind": [
            ATTENTION_KINDS.index("rope" if is_rope else "nope") for is_rope in weights.config.no_rope_layers or ()
        ],
        "module": modules,
        "expert": np.arange(n_experts),
    }
    if any(part.layer is None for part in weights.parts):
        arrays |= {f"head_{name}": values for name, values in zip(LOSSES, head[:, by_recipe], strict=True)}
    result = schema.dataset("fp8_weights", arrays, {"attention_kind": ATTENTION_KINDS})
    return result.assign_attrs({"recipes": described(recipes)})


def _measured(weight: Tensor, roundings: list[Rounding]) -> tuple[float, float, np.ndarray]:
    """Largest and smallest magnitude of a matrix, and what :data:`LOSSES` names (loss, rounding)."""
    largest, smallest = _magnitudes(weight)
    return largest, smallest, np.array([_losses(weight, rounding, largest) for rounding in roundings]).T


def _magnitudes(weight: Tensor) -> tuple[float, float]:
    """Largest magnitude of a matrix, and its smallest that is not 0; the latter infinite where there is none."""
    largest, smallest = 0.0, math.inf
    for rows in weight.split(_height(weight, 1)):
        magnitude = rows.abs()
        largest = max(largest, magnitude.max().item())
        smallest = min(smallest, magnitude.masked_fill_(magnitude == 0, math.inf).min().item())
    return largest, smallest


def _losses(weight: Tensor, rounding: Rounding, amax: float) -> tuple[float, float, float]:
    """What :data:`LOSSES` names, of a matrix (output, input) whose largest magnitude is ``amax``."""
    scaling = rounding.scaling.static(amax) if rounding.scaling.granularity == "tensor" else rounding.scaling
    # Slabs are whole blocks, so that each scale is that of the whole matrix.
    shared_rows = {"tensor": 1, "row": 1, "column": len(weight)}.get(scaling.granularity) or (scaling.block or (1, 1))[
        0
    ]
    deviation, n_saturated, n_underflow, n_nonzero = DeviationSums(), 0, 0, 0
    for rows in weight.split(_height(weight, shared_rows)):
        quantized = quantize(rows, format=rounding.format, scaling=scaling)
        deviation.add(rows, quantized.dequantize())
        n_saturated += int(quantized.n_saturated)
        n_underflow += int(quantized.n_underflow)
        n_nonzero += int(quantized.n_nonzero)
    underflow = n_underflow / n_nonzero if n_nonzero else math.nan
    return deviation.deviation().sqnr, underflow, n_saturated / weight.numel()


def _height(weight: Tensor, multiple: int) -> int:
    """Rows of a slab: a multiple of ``multiple``, and about ``SLAB`` values."""
    return max(SLAB // (weight.shape[1] * multiple), 1) * multiple
