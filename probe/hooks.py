"""``Recorder`` and ``record``: a live model in, a DataTree out; the only place where tensors become numpy arrays.

A recorder hooks the routers and the text decoder. While a forward runs it only keeps what the routers returned; when
the decoder is done it reduces that, on the model's device, and copies the small result out. Nothing that the model
computes is changed.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
import transformers
import xarray as xr
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4TextModel

from probe import __version__, recording, schema, sites, vocabulary
from probe.dispatch import expert_dispatch_of
from probe.models import LoadedModel
from probe.reduction import next_token_losses, real_tokens, reduce_router
from probe.schema import ProbeError

Texts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


class RecordingError(ProbeError):
    """Nothing, or not everything, was recorded, or it was asked for in a way that cannot be right."""


@dataclass(frozen=True)
class RoutingSpec:
    """What to keep of the routing beside what is always kept.

    ``all_logits``: the raw logit of every expert. ``next_token_loss``: the loss of every next token and the token that
    the model would have predicted; needs a model with an output head, and is left out of a recording of ``generate()``.
    """

    all_logits: bool = False
    next_token_loss: bool = False


@dataclass
class _Forward:
    """One forward of the decoder: which of its positions are real tokens, and what its routers returned."""

    token_ids: Tensor
    is_real: Tensor
    cache: Any
    n_past: int
    router_outputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Recorder:
    """Context manager that records the routing of every forward that runs inside it.

    Parameters
    ----------
    model : a ``LoadedModel``, or any module that holds a Llama 4 text decoder.
    routing : True, or a ``RoutingSpec`` that asks for more.
    tokenizer : of a bare model, so that the recording can show text.

    Notes
    -----
    Every row of a batch that starts without a cache is a new sample. A forward that goes on with a cache which the
    recorder has seen adds to the same samples; with one new token it counts as decode, else as prefill. Padding is told
    by the attention mask and never stored. Beam search swaps sequences between rows and is refused.
    """

    def __init__(
        self,
        model: LoadedModel | nn.Module,
        *,
        routing: bool | RoutingSpec = True,
        tokenizer: Any = None,
    ) -> None:
        if routing is False:
            raise RecordingError("routing=False leaves nothing to record: pass True or a RoutingSpec")
        self._loaded = model if isinstance(model, LoadedModel) else None
        self._model: nn.Module = model.model if isinstance(model, LoadedModel) else model
        self._tokenizer = tokenizer if tokenizer is not None else getattr(self._loaded, "tokenizer", None)
        self._spec = routing if isinstance(routing, RoutingSpec) else RoutingSpec()
        self._decoder = sites.text_model(self._model)
        self._blocks = sites.moe_blocks(self._model)
        self._head = sites.output_head(self._model) if self._spec.next_token_loss else None

        self._handles: list[Any] = []
        self._watched_caches: list[Any] = []
        self._outer_inputs: dict[str, Any] = {}
        self._forward: _Forward | None = None
        self._samples_by_cache: weakref.WeakKeyDictionary[Any, np.ndarray] = weakref.WeakKeyDictionary()
        self._next_position: list[int] = []
        self._announced: np.ndarray | None = None
        self._row_batches: list[dict[str, np.ndarray]] = []
        self._probability_batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._continued = False

    def __enter__(self) -> Recorder:
        if self._handles:
            raise RecordingError("this recorder is running already: use a second Recorder to nest")
        decoder, model = self._decoder, self._model
        if model is not decoder:
            self._handles.append(model.register_forward_pre_hook(self._on_model_start, with_kwargs=True))
        self._handles.append(decoder.register_forward_pre_hook(self._on_decoder_start, with_kwargs=True))
        for layer, block in self._blocks.items():
            self._handles.append(block.router.register_forward_hook(self._router_hook(layer)))
        self._handles.append(decoder.register_forward_hook(self._on_decoder_end))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for cache in self._watched_caches:
            vars(cache).pop("reorder_cache", None)
        self._watched_caches.clear()
        self._outer_inputs, self._forward = {}, None

    def _on_model_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # With images the decoder is handed embeddings only: the ids are seen here and nowhere else.
        self._outer_inputs = {"input_ids": args[0] if args else None} | kwargs

    def _on_decoder_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {"input_ids": args[0] if args else None} | kwargs
        token_ids = inputs.get("input_ids")
        if token_ids is None:
            token_ids = self._outer_inputs.get("input_ids")
        if token_ids is None:
            raise RecordingError("this forward was given inputs_embeds without input_ids: its tokens are unknown")
        cache = inputs.get("past_key_values")
        n_past = int(cache.get_seq_length()) if cache is not None else 0
        is_real = real_tokens(inputs.get("attention_mask"), token_ids, n_past)
        self._outer_inputs = {}
        self._forward = _Forward(token_ids, is_real, cache, n_past)

    def _samples_of(self, forward: _Forward) -> np.ndarray:
        """Samples that the rows of a forward belong to: new ones, or those that its cache was filled with."""
        n_rows = len(forward.token_ids)
        if forward.n_past and forward.cache in self._samples_by_cache:
            samples = self._samples_by_cache[forward.cache]
            if len(samples) != n_rows:
                raise RecordingError(f"a cache filled by {len(samples)} sequences goes on with {n_rows}")
            self._continued = True
            return samples
        if self._announced is not None:
            samples, self._announced = self._announced, None
        else:
            samples = np.arange(n_rows) + len(self._next_position)
        self._next_position += [forward.n_past] * (int(samples.max(initial=-1)) + 1 - len(self._next_position))
        return samples

    def _remember(self, cache: Any, samples: np.ndarray) -> None:
        """Know ``cache`` again when a later forward goes on with it, and refuse to see its rows swapped."""
        self._samples_by_cache[cache] = samples

        def reorder_cache(beam_index: Tensor) -> None:
            raise RecordingError("beam search moves sequences between rows: record with num_beams=1")

        if "reorder_cache" not in vars(cache):  # else a recorder around this one watches it already
            cache.reorder_cache = reorder_cache
            self._watched_caches.append(cache)

    def _router_hook(self, layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
            if self._forward is not None:
                self._forward.router_outputs[layer] = output

        return keep

    def _on_decoder_end(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, self._forward = self._forward, None
        assert forward is not None
        if silent := sorted(self._blocks.keys() - forward.router_outputs.keys()):
            raise RecordingError(
                f"router recorded nothing at layers {', '.join(map(str, silent))}: something replaced the forward "
                "of these blocks (a kernel from the hub?); "
                f"this model's MoE layers are {', '.join(map(str, self._blocks))}"
            )
        samples = self._samples_of(forward)
        # The cache may have been made inside this forward: only its output is sure to name it.
        if (cache := getattr(output, "past_key_values", None)) is not None:
            self._remember(cache, samples)
        with torch.no_grad():
            self._keep(forward, samples, output[0])

    def _keep(self, forward: _Forward, samples: np.ndarray, hidden_states: Tensor) -> None:
        """Reduce a forward to rows, on the device, and copy them out."""
        row_of_token, _ = forward.is_real.nonzero(as_tuple=True)
        n_real = forward.is_real.sum(dim=1).tolist()
        first = [self._next_position[sample] for sample in samples]
        position = np.concatenate([np.arange(n) + start for n, start in zip(n_real, first, strict=True)])
        is_decode = forward.n_past > 0 and forward.token_ids.shape[1] == 1
        rows: dict[str, np.ndarray] = {
            "sample": np.repeat(samples, n_real).astype(np.uint32),
            "position": position.astype(np.uint32),
            "token_id": forward.token_ids[forward.is_real.to(forward.token_ids.device)].cpu().numpy().astype(np.uint32),
            "phase": np.full(len(position), schema.PHASES.index("decode" if is_decode else "prefill"), np.uint8),
        }
        layer_rows, probability_sums = [], []
        for scores, logits in forward.router_outputs.values():
            is_real = forward.is_real.flatten().to(logits.device)
            layer_rows.append(reduce_router(scores[is_real], logits[is_real], self._top_k, self._spec.all_logits))
            probability = logits[is_real].float().softmax(dim=-1)
            sums = probability.new_zeros(len(n_real), probability.shape[-1])
            probability_sums.append(sums.index_add_(0, row_of_token.to(sums.device), probability).cpu())
        for name in layer_rows[0]:
            rows[name] = torch.stack([reduced[name].cpu() for reduced in layer_rows], dim=1).numpy()
        # A sequence that goes on with a cache has targets in another forward: no loss for any recording of such.
        if self._head is not None and not self._continued:
            is_real = forward.is_real.to(hidden_states.device)
            token_ids = forward.token_ids.to(hidden_states.device)[is_real]
            losses, predicted = next_token_losses(self._head, hidden_states[is_real], token_ids, row_of_token)
            rows |= {"next_token_loss": losses.cpu().numpy(), "predicted_id": predicted.cpu().numpy().astype(np.uint32)}
        for sample, n_new in zip(samples, n_real, strict=True):
            self._next_position[sample] += n_new
        self._row_batches.append(rows)
        self._probability_batches.append((samples, torch.stack(probability_sums, dim=1).numpy()))

    @property
    def _top_k(self) -> int:
        return next(iter(self._blocks.values())).router.top_k

    def trace(self, samples: Sequence[recording.Sample] | None = None) -> xr.DataTree:
        """What was recorded, as a DataTree (see ``probe.schema``).

        Parameters
        ----------
        samples : name, domain and so on of every sample, in the order in which they were recorded.

        Raises
        ------
        RecordingError
            If no forward ran inside the recorder.
        """
        if not self._row_batches:
            raise RecordingError("no forward of this model ran inside the recorder: there is nothing to show")
        names = [name for name in self._row_batches[0] if all(name in batch for batch in self._row_batches)]
        rows = {name: np.concatenate([batch[name] for batch in self._row_batches]) for name in names}
        order = np.lexsort((rows["position"], rows["sample"]))
        rows = {name: values[order] for name, values in rows.items()}
        rows["modality"] = np.zeros(len(order), np.uint8)
        n_samples = len(self._next_position)
        if samples is None:
            hashes = [_hash_ids(rows["token_id"][rows["sample"] == sample]) for sample in range(n_samples)]
            samples = [recording.Sample(f"sample {i}", text_sha256=hashes[i]) for i in range(n_samples)]
        layout = self._layout()
        probability_sum = np.zeros((len(samples), len(layout.layers), layout.n_experts), np.float64)
        for batch_samples, sums in self._probability_batches:
            probability_sum[batch_samples] += sums
        return recording.build(
            rows,
            samples=samples,
            probability_sum=probability_sum,
            layout=layout,
            pieces=vocabulary.pieces(self._tokenizer, np.unique(rows["token_id"]).tolist()),
            attributes=self._attributes(),
        )

    def _layout(self) -> recording.Layout:
        block = next(iter(self._blocks.values()))
        no_rope_layers = self._decoder.config.no_rope_layers or []  # 1 where attention is rotary, despite its name
        return recording.Layout(
            layers=list(self._blocks),
            rope=[bool(no_rope_layers[layer]) for layer in self._blocks],
            n_experts=block.router.weight.shape[0],
            top_k=block.router.top_k,
        )

    def _attributes(self) -> dict[str, Any]:
        config = self._decoder.config
        loaded = self._loaded
        config_values = json.loads(config.to_json_string(use_diff=False))
        config_values.pop("_name_or_path", None)  # a path of this machine is nobody's business
        attributes = {
            "schema_version": schema.SCHEMA_VERSION,
            "model": loaded.name if loaded else (config.name_or_path or type(self._model).__name__),
            "model_revision": loaded.revision if loaded else "",
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "probe_version": __version__,
            "torch_version": torch.__version__,
            "transformers_version": transformers.__version__,
            "dtype": str(self._decoder.dtype).removeprefix("torch."),
            "device": str(self._decoder.device),
            "attn_implementation": config._attn_implementation,
            "expert_dispatch": expert_dispatch_of(self._model),
            "gate_function": "sigmoid",
            "top_k": self._top_k,
            "config": json.dumps(config_values, indent=2),
        }
        if loaded and loaded.weights_sha256:
            attributes["weights_sha256"] = loaded.weights_sha256
        return attributes


def record(
    model: LoadedModel | nn.Module,
    texts: str | Texts,
    *,
    domains: Sequence[str | None] | None = None,
    names: Sequence[str] | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    routing: bool | RoutingSpec = True,
    progress: bool = True,
) -> xr.DataTree:
    """Run texts through a model and record which expert took every token, and by what margin.

    Parameters
    ----------
    model : from :func:`probe.load`, or any module that holds a Llama 4 text decoder (then ``tokenizer`` is needed for
        text).
    texts : texts, or token ids as a sequence of sequences or a (text, position) tensor; ids are taken as they are,
        texts get whatever the tokenizer adds (a BOS).
    domains, names : one for each text.
    batch_size : texts in one forward; texts of like length go together. It changes speed and memory, not the experts.
    max_tokens : tokens kept of each text; what is cut is counted in ``/samples/n_cut``.
    routing : True, or a :class:`RoutingSpec` that asks for more.
    progress : show a progress bar.

    Returns
    -------
    DataTree with ``/routing``, ``/samples`` and ``/vocabulary``; see ``probe.schema``.

    Raises
    ------
    RecordingError
        For arguments that do not fit together, before anything is run.
    """
    recorder = Recorder(model, routing=routing, tokenizer=tokenizer)
    if isinstance(texts, str):
        texts = [texts]
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise RecordingError(f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}")
    if not len(texts):
        raise RecordingError("there is no text to record: texts is empty")
    for label, values in (("domains", domains), ("names", names)):
        if isinstance(values, str) or (values is not None and len(values) != len(texts)):
            got = f"the string {values!r}" if isinstance(values, str) else len(values)
            raise RecordingError(f"{label} needs one entry for each of the {len(texts)} texts, got {got}")

    ids, hashes = _tokenize(texts, recorder._tokenizer)
    _check_ids(ids, recorder._decoder.embed_tokens.num_embeddings)
    limit = max_tokens if max_tokens is not None else max(map(len, ids))
    samples = [
        recording.Sample(
            name=names[i] if names is not None else f"sample {i}",
            domain=(domains[i] if domains is not None else None) or schema.NO_DOMAIN,
            text_sha256=hashes[i],
            n_cut=max(len(ids[i]) - limit, 0),
        )
        for i in range(len(ids))
    ]
    ids = [sample_ids[:limit] for sample_ids in ids]
    order = sorted((i for i in range(len(ids)) if ids[i]), key=lambda i: len(ids[i]), reverse=True)
    if not order:
        raise RecordingError(f"none of the {len(texts)} texts has a token")
    recorder._next_position = [0] * len(ids)
    columns = (TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with recorder, torch.inference_mode(), Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("", total=sum(map(len, ids)))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            recorder._announced = np.array(batch)
            _run(recorder._decoder, [ids[i] for i in batch])
            bar.advance(task, sum(len(ids[i]) for i in batch))
    return recorder.trace(samples)


def _tokenize(texts: Texts, tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    """Ids and hash of every text."""
    if isinstance(texts[0], str):
        if tokenizer is None:
            raise RecordingError("texts need a tokenizer: pass tokenizer=, or token ids instead of texts")
        if odd := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise RecordingError(
                f"texts mixes text and other things: number {odd[0]} is a {type(texts[odd[0]]).__name__}"
            )
        hashes = [_hash(str(text).encode("utf-8", "surrogatepass")) for text in texts]
        # verbose=False: a text longer than the tokenizer likes is none of its business here
        return tokenizer(list(texts), verbose=False)["input_ids"], hashes
    ids = [text.tolist() if isinstance(text, Tensor | np.ndarray) else list(text) for text in texts]
    return ids, [_hash_ids(np.array(sample_ids)) for sample_ids in ids]


def _check_ids(ids: list[list[int]], n_vocabulary: int) -> None:
    for text, sample_ids in enumerate(ids):
        for token_id in sample_ids:
            if not isinstance(token_id, int):
                raise RecordingError(
                    f"token ids must be one sequence of whole numbers for each text, but text {text} holds {token_id!r}"
                )
            if not 0 <= token_id < n_vocabulary:
                raise RecordingError(
                    f"text {text} holds token id {token_id}, but the model's vocabulary ends at {n_vocabulary - 1}: "
                    "does this tokenizer belong to this model?"
                )


def _run(decoder: Llama4TextModel, ids: list[list[int]]) -> None:
    """One forward of the decoder over texts padded on the right."""
    device = decoder.device
    input_ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in ids], batch_first=True).to(device)
    lengths = torch.tensor([len(text) for text in ids], device=device)
    attention_mask = torch.arange(input_ids.shape[1], device=device) < lengths[:, None]
    decoder(
        input_ids=input_ids,
        # Without padding transformers needs no mask and takes the faster causal kernel.
        attention_mask=None if bool(attention_mask.all()) else attention_mask.long(),
        use_cache=False,
    )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _hash_ids(token_ids: np.ndarray) -> str:
    return _hash(token_ids.astype("<u4").tobytes())
