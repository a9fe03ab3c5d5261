"""``load``: the shipped tiny models, local folders and hub ids, all as one ``LoadedModel``.

A model that is quietly wrong is worse than none: weights that are missing, not finite, or not a Llama 4 end here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Llama4Config,
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging

from probe.dispatch import ExpertDispatch, set_expert_dispatch
from probe.schema import ProbeError
from probe.sites import NotLlama4Error

CHECKED_BYTES = 10 * 10**9
"""Local weights under this size are read once more when they are loaded: hashed, and searched for NaN and infinity."""

OLDEST_TRANSFORMERS = Version("5.19")
"""4.54 to 4.56 computed Llama 4 wrongly and versions before 5.19 drop ``router_logits`` in the heads."""


class ModelError(ProbeError):
    """A model cannot be found, or must not be trusted as it is."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be looked into.

    ``processor`` is None for a model without images; ``revision`` is the hub commit where there is one, else ""; so is
    ``weights_sha256``, of all safetensors files in name order, where the weights were read to check them.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    name: str
    processor: ProcessorMixin | None = None
    revision: str = ""
    weights_sha256: str = ""


def shipped_models() -> dict[str, str]:
    """What each model that comes with probe is, in one line, by name."""
    index = files("probe") / "assets" / "models" / "index.json"
    return json.loads(index.read_text("utf-8"))


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    expert_dispatch: ExpertDispatch | None = "sparse",
    check_weights: bool | None = None,
) -> LoadedModel:
    """Load a Llama 4 and its tokenizer.

    Parameters
    ----------
    name : a shipped model (see :func:`shipped_models`), a local folder, or a hub id such as
        ``"meta-llama/Llama-4-Scout-17B-16E-Instruct"``; only a hub id may use the network.
    revision : branch, tag or commit, for a hub id.
    dtype, device_map : passed to transformers. By default shipped models load in float32, others as they were saved.
    expert_dispatch : ``"sparse"`` runs the chosen experts only, ``"reference"`` computes as transformers does, None
        leaves the model as transformers built it (for quantised checkpoints).
    check_weights : search the weights for NaN and infinity. By default done for shipped models and for local weights
        under 10 GB.

    Raises
    ------
    ModelError
        If there is no such model, if tensors are missing from its weights, or if some are not finite.
    NotLlama4Error
        If the model is of another kind.
    """
    if Version(transformers.__version__) < OLDEST_TRANSFORMERS:
        raise ModelError(f"transformers {transformers.__version__} is too old for probe: install {OLDEST_TRANSFORMERS}")
    name = str(name)
    if name in shipped_models():
        with as_file(files("probe") / "assets" / "models" / name) as folder:
            with _without_progress_bars():  # a bar for 8 MB is noise
                return _load(
                    str(folder), name, None, dtype or torch.float32, device_map, expert_dispatch, check_weights
                )
    if not Path(name).is_dir() and name.count("/") != 1:
        raise ModelError(
            f"no model {name!r}: it is neither a folder nor a hub id (owner/name), "
            f"and the shipped models are {', '.join(shipped_models())}"
        )
    return _load(name, name, revision, dtype or "auto", device_map, expert_dispatch, check_weights)


def _load(
    source: str,
    name: str,
    revision: str | None,
    dtype: torch.dtype | str,
    device_map: Any,
    expert_dispatch: ExpertDispatch | None,
    check_weights: bool | None,
) -> LoadedModel:
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    config = read_config(source, **origin)
    has_vision = isinstance(config, Llama4Config)
    model_class: Any = Llama4ForConditionalGeneration if has_vision else Llama4ForCausalLM
    weights = sorted(Path(source).glob("*.safetensors"))
    if Path(source).is_dir() and not weights:
        raise ModelError(f"{name}: the folder holds no *.safetensors; probe reads no other kind of weights")
    if check_weights is None:
        check_weights = 0 < sum(path.stat().st_size for path in weights) < CHECKED_BYTES
    try:
        model, report = model_class.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            device_map=device_map,
            use_safetensors=True,
            output_loading_info=True,
            **origin,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, config=config, **origin)
        processor = AutoProcessor.from_pretrained(source, **origin) if has_vision else None
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{name}: transformers could not load it: {error}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"{name}: the weights lack {len(missing)} tensors, among them {missing[0]}")
    if check_weights:
        refuse_non_finite(model, name)
    if expert_dispatch is not None:
        set_expert_dispatch(model, expert_dispatch)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        config=model.config,
        name=name,
        processor=processor,
        revision=getattr(config, "_commit_hash", None) or "",
        weights_sha256=_sha256(weights) if check_weights and weights else "",
    )


def read_config(source: str, **origin: Any) -> Llama4Config | Llama4TextConfig:
    """The configuration of a Llama 4 in a folder or on the hub, mended where older versions saved it loosely.

    Raises
    ------
    ModelError
        If there is no readable configuration.
    NotLlama4Error
        If it is that of another model.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, **origin)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {source!r}: {error}\nThe shipped models are {', '.join(shipped_models())}"
        ) from error
    if not values:
        raise ModelError(f"{source}: found no config.json, so this is not a model's folder")
    kinds: dict[str, type[Llama4Config] | type[Llama4TextConfig]] = {
        "llama4": Llama4Config,
        "llama4_text": Llama4TextConfig,
    }
    kind = values.get("model_type")
    if kind not in kinds:
        raise NotLlama4Error(f"{source} is not a Llama 4: its model_type is {kind!r}, expected {' or '.join(kinds)}")
    # Configs saved before transformers 5.5 hold an integer here, which strict validation now refuses.
    text_values = values.get("text_config", values)
    if "attn_temperature_tuning" in text_values:
        text_values["attn_temperature_tuning"] = bool(text_values["attn_temperature_tuning"])
    return kinds[kind].from_dict(values)


def refuse_non_finite(model: nn.Module, name: str) -> None:
    """Raise a ModelError that names the tensors of ``model`` which hold NaN or infinity, if there are any."""
    broken = [key for key, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"{name}: {len(broken)} weight tensors hold NaN or infinity, among them {broken[0]}; "
            "every statistic on them would be meaningless (check_weights=False loads them all the same)"
        )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
