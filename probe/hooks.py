"""``Recorder`` and ``record``: a live model in, a DataTree out; the only place where tensors become numpy arrays.

A recorder hooks the routers and the text decoder. While a forward runs it only keeps what the routers returned; when
the decoder is done it reduces that, on the model's device, and copies the small result out. What experts return, where
that is asked for, is too large to keep and is reduced layer by layer. Nothing that the model computes is changed.
"""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock, get_ident
from typing import Any

import numpy as np
import torch
import transformers
import xarray as xr
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, Llama4ForConditionalGeneration
from transformers.models.llama4.modeling_llama4 import Llama4TextModel

from probe import __version__, attention_interface, inputs, recording, schema, sites, vocabulary
from probe.attention_interface import watch_attention
from probe.attention_recording import AttentionRecord, AttentionSpec
from probe.dispatch import expert_dispatch_of
from probe.expert_outputs import ExpertTotals, require_known_experts, watch_experts
from probe.generation import Generation
from probe.models import LoadedModel
from probe.recording import RecordingError
from probe.reduction import expert_totals, next_token_losses, real_tokens, reduce_experts, reduce_router

PADDED_TOKENS = 16_384
"""Positions, padding included, in one forward of :func:`record`, unless a single text is longer."""


@dataclass(frozen=True)
class RoutingSpec:
    """What to keep of the routing beside what is always kept.

    ``all_logits``: the raw logit of every expert. ``next_token_loss``: the loss of every next token and the token that
    the model would have predicted; needs a model with an output head, and is left out of a recording of ``generate()``.
    ``expert_outputs``: the group ``/experts``, how large the outputs of each routed expert are; needs a model whose
    experts are computed as transformers does or as probe does, not by a quantiser's own module.
    """

    all_logits: bool = False
    next_token_loss: bool = False
    expert_outputs: bool = False


@dataclass
class _Forward:
    """One forward of the decoder: which of its positions are real tokens, and what its routers and experts returned.

    ``samples`` are those that its rows belong to; ``past_tokens`` counts what a cache held of them at the start.
    """

    token_ids: Tensor
    is_real: Tensor
    cache: Any
    n_past: int
    past_tokens: list[int]
    is_decode: bool
    samples: np.ndarray
    router_outputs: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    expert_outputs: dict[int, dict[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class _KnownCache:
    """A cache that the recorder has seen being filled: by which samples, and to what length."""

    samples: np.ndarray
    length: int


_RECORDING: weakref.WeakKeyDictionary[Llama4TextModel, list[int]] = weakref.WeakKeyDictionary()
"""Of every decoder that is being recorded, the threads whose recorders do it, one for each recorder."""

_CLAIMING = Lock()


def _claim(decoder: Llama4TextModel) -> None:
    """Note that this thread records the decoder; raise a RecordingError if another one does.

    Recorders put back what they changed in the order of nesting, which two threads do not keep.
    """
    with _CLAIMING:
        threads = _RECORDING.setdefault(decoder, [])
        if any(thread != get_ident() for thread in threads):
            raise RecordingError(
                "another thread is recording this model: wait until it is done, or give each thread a model of its own"
            )
        threads.append(get_ident())


class Recorder:
    """Context manager that records the routing of every forward that runs inside it.

    Parameters
    ----------
    model : a ``LoadedModel``, or any module that holds a Llama 4 text decoder.
    routing : True, or a ``RoutingSpec`` that asks for more.
    attention : True, or an ``AttentionSpec`` that says what; the model runs probe's sdpa meanwhile (see Notes).
    tokenizer : of a bare model, so that the recording can show text.

    Notes
    -----
    Every row of a batch that starts without a cache is a new sample. A forward that goes on with a cache which the
    recorder has seen adds to the same samples. Inside ``generate()`` whatever comes after the prompt is decode;
    elsewhere a single new token is. Padding is told by the attention mask, and in ``generate()`` also by the end of a
    sequence that finished before the others; it is never stored. Beam search and assisted generation, which move or
    take back what a cache holds, and generation without a cache are refused.

    Recording the routing changes no output. Recording attention takes over the attention function of the text decoder:
    its outputs are those of transformers' sdpa, to the bit below one chunk and up to rounding beyond, where RoPE layers
    run chunk by chunk; a model that ran another attention gets sdpa's.
    """

    def __init__(
        self,
        model: LoadedModel | nn.Module,
        *,
        routing: bool | RoutingSpec = True,
        attention: bool | AttentionSpec | None = None,
        tokenizer: Any = None,
    ) -> None:
        if routing is not True and not isinstance(routing, RoutingSpec):
            raise RecordingError(f"routing={routing!r} leaves nothing to record: pass True or a RoutingSpec")
        if not (attention is None or isinstance(attention, bool | AttentionSpec)):
            raise RecordingError(f"attention={attention!r} is not known: pass True or an AttentionSpec")
        self._loaded = model if isinstance(model, LoadedModel) else None
        self._model: nn.Module = model.model if isinstance(model, LoadedModel) else model
        self._tokenizer = tokenizer if tokenizer is not None else getattr(self._loaded, "tokenizer", None)
        self._spec = routing if isinstance(routing, RoutingSpec) else RoutingSpec()
        self._decoder = sites.text_model(self._model)
        self._blocks = sites.moe_blocks(self._model)
        self._head = sites.output_head(self._model) if self._spec.next_token_loss else None
        self._attention: AttentionRecord | None = None
        if attention:
            spec = attention if isinstance(attention, AttentionSpec) else AttentionSpec()
            self._attention = AttentionRecord(spec, self._decoder)
        self._expert_totals: ExpertTotals | None = None
        if self._spec.expert_outputs:
            require_known_experts(self._blocks)
            self._expert_totals = ExpertTotals(len(self._blocks), self._layout().n_experts)

        self._handles: list[Any] = []
        self._own_generate: list[tuple[nn.Module, Any]] = []
        self._generation: Generation | None = None
        self._outer_ids: Tensor | None = None
        self._forward: _Forward | None = None
        self._caches: weakref.WeakKeyDictionary[Any, _KnownCache] = weakref.WeakKeyDictionary()
        self._next_position: list[int] = []
        self._announced: np.ndarray | None = None
        self._row_batches: list[dict[str, np.ndarray]] = []
        self._probability_batches: list[tuple[np.ndarray, np.ndarray]] = []
        self._continued = False

    def __enter__(self) -> Recorder:
        if self._handles:
            raise RecordingError("this recorder is running already: use a second Recorder to nest")
        decoder = self._decoder
        _claim(decoder)
        for module in self._model.modules():
            if isinstance(module, Llama4ForConditionalGeneration):
                self._handles.append(module.register_forward_pre_hook(self._on_model_start, with_kwargs=True))
            if isinstance(module, GenerationMixin):
                self._own_generate.append((module, vars(module).get("generate")))
                setattr(module, "generate", self._watched(module))  # noqa: B010 - its type is the method's
        self._handles.append(decoder.register_forward_pre_hook(self._on_decoder_start, with_kwargs=True))
        for layer, block in self._blocks.items():
            self._handles.append(block.router.register_forward_hook(self._router_hook(layer)))
            if self._spec.expert_outputs:
                self._handles += watch_experts(block, self._expert_observer(layer))
        if self._attention is not None:
            self._handles.append(watch_attention(decoder, self._attention.observers()))
        self._handles.append(decoder.register_forward_hook(self._on_decoder_end))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handles:
            _RECORDING[self._decoder].pop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module, generate in self._own_generate:
            del module.generate
            if generate is not None:  # that of a recorder around this one
                module.generate = generate
        self._own_generate.clear()
        self._outer_ids, self._forward, self._generation = None, None, None

    def _watched(self, module: Any) -> Callable[..., Any]:
        """``generate`` of a model, which tells the recorder when it runs, and up to where its prompt goes."""
        generate = module.generate

        @functools.wraps(generate)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._generation = Generation(module, args, kwargs)
            try:
                return generate(*args, **kwargs)
            finally:
                self._generation = None

        return watched

    def _on_model_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("pixel_values", args[1] if len(args) > 1 else None) is not None:
            raise RecordingError("images are not recorded yet: their tokens would pass for text")
        # With images the decoder is handed embeddings only: the ids are seen here and nowhere else.
        self._outer_ids = kwargs.get("input_ids", args[0] if args else None)

    def _on_decoder_start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        token_ids = kwargs.get("input_ids", args[0] if args else None)
        token_ids, self._outer_ids = self._outer_ids if token_ids is None else token_ids, None
        if token_ids is None:
            raise RecordingError("this forward was given inputs_embeds without input_ids: its tokens are unknown")
        cache = kwargs.get("past_key_values")
        n_past = int(cache.get_seq_length()) if cache is not None else 0
        attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim != 2:
            raise RecordingError(
                f"an attention mask of {attention_mask.ndim} dims does not say which positions are padding: "
                "pass the one of 2 dims (row, position)"
            )
        is_real = real_tokens(attention_mask, token_ids, n_past)
        past_tokens = [n_past] * len(token_ids)
        if isinstance(attention_mask, Tensor):
            past_tokens = (attention_mask[:, :n_past] != 0).sum(dim=1).tolist()
        is_decode = n_past > 0 and token_ids.shape[1] == 1
        if self._generation is not None:
            is_decode = n_past >= self._generation.n_prompt
            if is_decode:
                is_real = is_real & self._generation.unfinished(token_ids)
        samples = self._samples_of(cache, n_past, n_rows=len(token_ids))
        self._forward = _Forward(token_ids, is_real, cache, n_past, past_tokens, is_decode, samples)
        if self._attention is not None:
            self._attention.begin(is_real, samples, self._first_positions(self._forward))

    def _samples_of(self, cache: Any, n_past: int, *, n_rows: int) -> np.ndarray:
        """Samples that the rows of a forward belong to: new ones, or those that its cache was filled with."""
        known = self._caches.get(cache) if n_past else None
        if known is not None:
            if len(known.samples) != n_rows or known.length != n_past:
                raise RecordingError(
                    f"a cache that held {known.length} positions of {len(known.samples)} sequences goes on with "
                    f"{n_past} of {n_rows}: it was cropped or used outside the recorder"
                )
            return known.samples
        return self._announced if self._announced is not None else np.arange(n_rows) + len(self._next_position)

    def _first_positions(self, forward: _Forward) -> list[int]:
        """Position in its sample of the first new token of each row."""
        n_known = len(self._next_position)
        return [
            self._next_position[sample] if sample < n_known else past
            for sample, past in zip(forward.samples.tolist(), forward.past_tokens, strict=True)
        ]

    def _settle(self, forward: _Forward, output: Any) -> None:
        """A forward has succeeded: its samples are taken, and its cache is known."""
        first = self._first_positions(forward)
        self._continued |= self._generation is not None or (forward.n_past > 0 and forward.cache in self._caches)
        self._announced = None
        n_new = int(forward.samples.max()) + 1 - len(self._next_position)
        self._next_position += [0] * n_new
        for sample, position, n_tokens in zip(forward.samples, first, forward.is_real.sum(dim=1).tolist(), strict=True):
            self._next_position[sample] = position + n_tokens
        self._remember(forward, output)

    def _remember(self, forward: _Forward, output: Any) -> None:
        """Know the cache of a forward again when a later one goes on with it."""
        # It may have been made inside the forward: then only its output names it.
        outputs = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for cache in (forward.cache, *outputs):
            if isinstance(cache, Cache):
                self._caches[cache] = _KnownCache(forward.samples, int(cache.get_seq_length()))

    def _router_hook(self, layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
            if self._forward is not None:
                self._forward.router_outputs[layer] = output

        return keep

    def _expert_observer(self, layer: int) -> Callable[[Tensor], None]:
        def keep(outputs: Tensor) -> None:
            if self._forward is not None and layer in self._forward.router_outputs:
                scores, _ = self._forward.router_outputs[layer]
                with torch.no_grad():
                    self._forward.expert_outputs[layer] = reduce_experts(outputs, scores)

        return keep

    def _on_decoder_end(self, module: nn.Module, args: Any, output: Any) -> None:
        forward, self._forward = self._forward, None
        assert forward is not None
        self._refuse_silence("router", forward.router_outputs)
        if self._spec.expert_outputs:
            self._refuse_silence("experts", forward.expert_outputs)
        if self._attention is not None:
            self._attention.end()
        first = self._first_positions(forward)
        self._settle(forward, output)
        with torch.no_grad():
            self._keep(forward, first, output[0])

    def _refuse_silence(self, part: str, recorded: Mapping[int, object]) -> None:
        if silent := sorted(self._blocks.keys() - recorded.keys()):
            raise RecordingError(
                f"{part} recorded nothing at layers {', '.join(map(str, silent))}: something replaced the forward "
                "of these blocks (a kernel from the hub?); "
                f"this model's MoE layers are {', '.join(map(str, self._blocks))}"
            )

    def _keep(self, forward: _Forward, first: list[int], hidden_states: Tensor) -> None:
        """Reduce a forward, whose rows begin at the ``first`` positions, on the device, and copy the result out."""
        samples = forward.samples
        row_of_token, _ = forward.is_real.nonzero(as_tuple=True)
        n_real = forward.is_real.sum(dim=1).tolist()
        position = np.concatenate([np.arange(n) + start for n, start in zip(n_real, first, strict=True)])
        phase = schema.PHASES.index("decode" if forward.is_decode else "prefill")
        rows: dict[str, np.ndarray] = {
            "sample": np.repeat(samples, n_real).astype(np.uint32),
            "position": position.astype(np.uint32),
            "token_id": forward.token_ids[forward.is_real.to(forward.token_ids.device)].cpu().numpy().astype(np.uint32),
            "phase": np.full(len(position), phase, np.uint8),
        }
        layer_rows, probability_sums = [], []
        for scores, logits in forward.router_outputs.values():
            is_real = forward.is_real.flatten().to(logits.device)
            logits = logits[is_real]
            layer_rows.append(reduce_router(scores[is_real], logits, self._top_k, self._spec.all_logits))
            probability = logits.float().softmax(dim=-1)
            sums = probability.new_zeros(len(n_real), probability.shape[-1])
            probability_sums.append(sums.index_add_(0, row_of_token.to(sums.device), probability).cpu())
        for name in layer_rows[0]:
            # numpy stacks, as torch refuses to under CPU autocast
            rows[name] = np.stack([reduced[name].cpu().numpy() for reduced in layer_rows], axis=1)
        # A sequence that goes on with a cache has targets in another forward: no loss for any recording of such.
        if self._head is not None and not self._continued:
            is_real = forward.is_real.to(hidden_states.device)
            token_ids = forward.token_ids.to(hidden_states.device)[is_real]
            losses, predicted = next_token_losses(self._head, hidden_states[is_real], token_ids, row_of_token)
            rows |= {"next_token_loss": losses.cpu().numpy(), "predicted_id": predicted.cpu().numpy().astype(np.uint32)}
        self._row_batches.append(rows)
        self._probability_batches.append((samples, np.stack([sums.numpy() for sums in probability_sums], axis=1)))
        if self._expert_totals is not None:
            layers = [forward.expert_outputs[layer] for layer in self._blocks]
            norm_sum, largest = expert_totals(layers, forward.is_real, probability_sums[0].shape[-1])
            self._expert_totals.add(samples, norm_sum.numpy(), largest.numpy())

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
            raise RecordingError(
                "no forward of this model was seen inside the recorder, so there is nothing to show (a model that was "
                "compiled with torch.compile before runs without its hooks: record the model itself)"
            )
        names = [name for name in self._row_batches[0] if all(name in batch for batch in self._row_batches)]
        rows = {name: np.concatenate([batch[name] for batch in self._row_batches]) for name in names}
        order = np.lexsort((rows["position"], rows["sample"]))
        rows = {name: values[order] for name, values in rows.items()}
        rows["modality"] = np.zeros(len(order), np.uint8)
        n_samples = len(self._next_position)
        if samples is not None and len(samples) != n_samples:
            raise RecordingError(f"{n_samples} samples were recorded, but {len(samples)} are described")
        if samples is None:
            hashes = [inputs.hash_ids(rows["token_id"][rows["sample"] == sample]) for sample in range(n_samples)]
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
            experts=None if self._expert_totals is None else self._expert_totals.arrays(n_samples),
            attention=None if self._attention is None else self._attention.arrays(),
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
            "attn_implementation": config._attn_implementation if self._attention is None else attention_interface.NAME,
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
    texts: str | inputs.Texts,
    *,
    domains: Sequence[str | None] | None = None,
    names: Sequence[str] | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    routing: bool | RoutingSpec = True,
    attention: bool | AttentionSpec | None = None,
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
    batch_size : texts in one forward at most; texts of like length go together, and long ones in smaller batches. It
        changes speed and memory, not the experts.
    max_tokens : tokens kept of each text; what is cut is counted in ``/samples/n_cut``.
    routing : True, or a :class:`RoutingSpec` that asks for more.
    attention : True, or an :class:`AttentionSpec` that says what to record of attention; see :class:`Recorder` for what
        it does to the model meanwhile.
    progress : show a progress bar.

    Returns
    -------
    DataTree with ``/routing``, ``/samples``, ``/vocabulary`` and, where asked for, ``/experts``, ``/attention`` and
    ``/attention_profiles``; see ``probe.schema``.

    Raises
    ------
    RecordingError
        For arguments that do not fit together, before anything is run.
    """
    recorder = Recorder(model, routing=routing, attention=attention, tokenizer=tokenizer)
    if batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise RecordingError(f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}")
    ids, hashes = inputs.token_ids(texts, recorder._tokenizer, recorder._decoder.embed_tokens.num_embeddings)
    inputs.check_labels("domains", domains, len(ids), optional=True)
    inputs.check_labels("names", names, len(ids))
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
    if recorder._attention is not None:
        recorder._attention.spec.check_texts([len(text) for text in ids])
    recorder._next_position = [0] * len(ids)
    columns = (TextColumn("recording"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with recorder, torch.inference_mode(), Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task("", total=sum(map(len, ids)))
        for batch in batches(order, [len(text) for text in ids], batch_size):
            recorder._announced = np.array(batch)
            n_tokens = sum(len(ids[i]) for i in batch)
            if recorder._attention is not None:  # long texts take long: the bar moves layer by layer
                step = n_tokens / len(recorder._attention.layers)
                recorder._attention.on_layer = functools.partial(bar.advance, task, step)
            _run(recorder._decoder, [ids[i] for i in batch])
            if recorder._attention is None:
                bar.advance(task, n_tokens)
    return recorder.trace(samples)


def batches(order: list[int], lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Texts of like length in batches; ``order`` has the longest first."""
    batch: list[int] = []
    for text in order:
        longest = lengths[batch[0]] if batch else lengths[text]
        is_full = len(batch) == batch_size or (len(batch) + 1) * longest > PADDED_TOKENS
        if batch and (is_full or 2 * lengths[text] < longest):
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


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
