"""Several ways to compute one model on the same texts, side by side and layer by layer.

A *stream* is one way to compute: the reference (BF16), a recipe, a noise floor. All texts go through layer i in every
stream before layer i + 1 begins, so that memory holds the model, a working copy of one layer and the hidden states of
the streams. Streams that have not differed so far share their hidden states, and what is the same is computed once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

from probe import inputs, schema, sites
from probe.float8 import Rounding
from probe.fp8.layers import (
    NOT_ROUNDED,
    LayerCopy,
    LayerOutputs,
    LayerRounding,
    QuantizationError,
    RoundedHead,
    bare,
    layer_copy,
    require_known,
    rounded_rows,
    run_attention,
    run_experts,
    run_feed_forward,
    run_layer,
)
from probe.hooks import Recorder, batches
from probe.models import LoadedModel
from probe.recipes import MODULE_KINDS, Recipe, described, resolve
from probe.recording import Sample

BATCH_SIZE = 8
"""Texts in one batch at most; long ones go in smaller batches."""

LOGITS_AT_ONCE = 1 << 24
"""Logits over the vocabulary that are held at once."""

HEAD = "output_head"


@dataclass(frozen=True)
class Stream:
    """One way to compute the model.

    ``layers`` says of each decoder layer what is rounded, ``head`` of the output head. ``is_alone``: each text by
    itself, with eager attention.
    """

    name: str
    layers: tuple[LayerRounding, ...]
    head: LayerRounding = NOT_ROUNDED
    dtype: torch.dtype = torch.bfloat16
    is_alone: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it computes as the reference does, where nothing is rounded."""
        return self.dtype is torch.bfloat16 and not self.is_alone

    @property
    def attention(self) -> str:
        """transformers' name of the attention that it runs."""
        return "eager" if self.is_alone else "sdpa"

    def is_reference_in(self, layer: int) -> bool:
        """Whether it makes of the same hidden states what the reference makes of them, to the bit."""
        return self.is_plain and self.layers[layer].is_nothing

    def pieces(self, batch: Batch) -> list[Batch]:
        """What is computed at once: the batch, or each of its texts."""
        return batch.alone() if self.is_alone else [batch]


FLOORS = ("bf16", "fp32")
"""Names of the noise floors."""


def reference(n_layers: int) -> Stream:
    """BF16 weights and arithmetic, sdpa, texts in batches."""
    return Stream("reference", (NOT_ROUNDED,) * n_layers)


def noise_floors(n_layers: int) -> list[Stream]:
    """What differs between runs that nobody would call different.

    ``bf16`` computes each text by itself and attention eagerly: other kernels, other sums. ``fp32`` has the weights as
    they were loaded and float32 arithmetic.
    """
    nothing = (NOT_ROUNDED,) * n_layers
    return [Stream("bf16", nothing, is_alone=True), Stream("fp32", nothing, dtype=torch.float32)]


def recipe_stream(recipe: Recipe, n_layers: int) -> Stream:
    """The whole recipe."""
    return unit_stream(recipe.name, recipe, n_layers, lambda kind, layer: covers(recipe, kind, layer, n_layers))


def unit_stream(name: str, recipe: Recipe, n_layers: int, is_rounded: Callable[[str, int | None], bool]) -> Stream:
    """A stream that rounds, as the recipe does, those kinds of matrices in those layers (None: the head)."""
    layers = []
    for layer in range(n_layers):
        kinds = frozenset(kind for kind in MODULE_KINDS if kind != HEAD and is_rounded(kind, layer))
        layers.append(_rounding(kinds, recipe.weight, recipe.activation))
    head = frozenset({HEAD}) if is_rounded(HEAD, None) else frozenset()
    return Stream(name, tuple(layers), _rounding(head, recipe.weight, recipe.activation))


def covers(recipe: Recipe, kind: str, layer: int | None, n_layers: int) -> bool:
    """Whether a recipe rounds a kind of matrices in a layer; None stands for the head, which is behind the last one."""
    return kind in recipe.modules if layer is None else recipe.covers(kind, layer, n_layers)


def _rounding(kinds: frozenset[str], weight: Rounding | None, activation: Rounding | None) -> LayerRounding:
    rounding = LayerRounding(kinds, weight, activation)
    return NOT_ROUNDED if rounding.is_nothing else rounding


def resolved(recipe: str | Recipe | Sequence[str | Recipe]) -> list[Recipe]:
    """One recipe, or several, by name or as they are.

    Raises
    ------
    RecipeError
        For a name that is not known.
    QuantizationError
        If there is none, if two have the same name, or if one has that of a noise floor.
    """
    several: list[Any] = [recipe] if isinstance(recipe, str) or not isinstance(recipe, Sequence) else list(recipe)
    if not several:
        raise QuantizationError("no recipe is given: name one, or call noise_floor for the floors alone")
    found = [resolve(one) for one in several]
    names = [one.name for one in found]
    for name in names:
        if name in FLOORS:
            raise QuantizationError(f"a recipe is called {name!r}, as a noise floor is: give it another name")
        if names.count(name) > 1:
            raise QuantizationError(f"two recipes are called {name!r}: give them names of their own")
    return found


@dataclass(frozen=True)
class Batch:
    """B texts padded on the right to n positions; ``texts`` numbers them, ``is_real`` tells tokens from padding."""

    texts: list[int]
    token_ids: Tensor
    is_real: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return self.is_real.sum(dim=1).tolist()

    @property
    def text_of_row(self) -> Tensor:
        """For each token, text after text, which of the B texts it is in."""
        return self.is_real.nonzero()[:, 0]

    def alone(self) -> list[Batch]:
        """Each text as a batch of its own."""
        return [
            Batch([text], self.token_ids[i : i + 1, :n], self.is_real[i : i + 1, :n])
            for i, (text, n) in enumerate(zip(self.texts, self.lengths, strict=True))
        ]


@dataclass
class BatchOutputs:
    """What a layer computed for a batch: in one piece, or text by text."""

    pieces: list[Batch]
    parts: list[LayerOutputs]

    def rows(self, name: str) -> Tensor | None:
        """A field of ``LayerOutputs`` with one row for each token, text after text; None where the layer lacks it."""
        rows = []
        for piece, part in zip(self.pieces, self.parts, strict=True):
            values = getattr(part, name)
            if values is None:
                return None
            rows.append(values.reshape(-1, values.shape[-1])[piece.is_real.flatten().to(values.device)])
        return torch.cat(rows)


@dataclass
class LayerStep:
    """What streams made of one batch in one layer.

    ``streams`` (by number) share it, because they have not differed so far. ``accumulated`` is what they computed on
    their own hidden states; ``isolated`` what their copies of the parts make of the reference's inputs, None where that
    was not asked for. Either is ``reference`` itself where nothing can differ.
    """

    layer: int
    batch: Batch
    streams: list[int]
    reference: BatchOutputs
    accumulated: BatchOutputs
    isolated: BatchOutputs | None


Hidden = list[list[Tensor]]
"""Hidden states (B, n, H) of a stream: for each batch a list of one, or of one for each text if it runs them alone."""


class Walk:
    """A model and texts, checked, and how streams go through them.

    Attributes
    ----------
    samples : what is known of each text.
    ids : its tokens.
    n_layers : decoder layers; ``is_moe`` says of each whether it has experts, ``n_experts`` of them, and a
        token goes to ``top_k``.
    """

    def __init__(
        self,
        model: LoadedModel | nn.Module,
        texts: str | inputs.Texts,
        *,
        domains: Sequence[str | None] | None = None,
        max_tokens: int | None = None,
        progress: bool = True,
    ) -> None:
        own = model.model if isinstance(model, LoadedModel) else model
        if not isinstance(own, nn.Module):
            raise QuantizationError(f"model is a {type(own).__name__}: pass what probe.load returns, or a Llama 4")
        if max_tokens is not None and max_tokens < 1:
            raise QuantizationError(f"max_tokens is {max_tokens}, it must be at least 1")
        decoder = sites.text_model(own)
        tokenizer = model.tokenizer if isinstance(model, LoadedModel) else None
        if tokenizer is None and (isinstance(texts, str) or any(isinstance(text, str) for text in texts)):
            raise QuantizationError(
                "a bare model has no tokenizer: pass what probe.load returns (or a probe.LoadedModel of your own), or "
                "token ids instead of texts"
            )
        ids, hashes = inputs.token_ids(texts, tokenizer, decoder.embed_tokens.num_embeddings)
        inputs.check_labels("domains", domains, len(ids), optional=True)
        if empty := [i for i, text in enumerate(ids) if not text]:
            raise QuantizationError(f"text {empty[0]} has no token: leave it out")
        self.ids = [text[:max_tokens] for text in ids]
        limit = decoder.config.max_position_embeddings
        if long := [i for i, text in enumerate(self.ids) if len(text) > limit]:
            raise QuantizationError(
                f"text {long[0]} has {len(self.ids[long[0]])} tokens, but the model was made for {limit}: pass "
                f"max_tokens={limit}, or a shorter text"
            )
        self.samples = [
            Sample(
                name=f"sample {i}",
                domain=(domains[i] if domains is not None else None) or schema.NO_DOMAIN,
                text_sha256=hashes[i],
                n_cut=len(ids[i]) - len(self.ids[i]),
            )
            for i in range(len(ids))
        ]
        self.decoder = require_known(own)
        self.head: Any = sites.output_head(own)
        blocks = sites.moe_blocks(own)
        self.is_moe = [layer in blocks for layer in range(len(self.decoder.layers))]
        self.top_k = next(iter(blocks.values())).router.top_k
        self.n_experts = next(iter(blocks.values())).router.weight.shape[0]
        self.n_layers = len(self.decoder.layers)
        self.batches = _batches(self.ids)
        self._recorder = Recorder(model)
        self._progress = progress
        # Copies: what is set in them reaches no module of the model.
        self._config = {name: copy.deepcopy(self.decoder.config) for name in ("sdpa", "eager")}
        for name, config in self._config.items():
            config._attn_implementation = name
        self._rotary = bare(self.decoder.rotary_emb, torch.float32, self._config["sdpa"])

    @property
    def rope(self) -> list[bool]:
        """Of each decoder layer, whether its attention is rotary."""
        no_rope_layers = self.decoder.config.no_rope_layers or []  # 1 where attention is rotary, despite its name
        return [bool(rope) for rope in no_rope_layers]

    def layer(self, index: int) -> Any:
        """A decoder layer of the model itself, to be read."""
        return self.decoder.layers[index]

    def layer_coords(self, layers: Sequence[int]) -> dict[str, np.ndarray]:
        """Coords of some decoder layers, as groups hold them."""
        kinds = [schema.ATTENTION_KINDS.index("rope" if self.rope[layer] else "nope") for layer in layers]
        return {"layer": np.array(layers, np.int64), "attention_kind": np.array(kinds, np.uint8)}

    def attributes(self, recipes: Sequence[Recipe]) -> dict[str, Any]:
        """Root attributes of a study: those of a recording, and the recipes in JSON."""
        return self._recorder._attributes() | {
            "dtype": "bfloat16",
            "attn_implementation": "sdpa",
            "expert_dispatch": "sparse",
            "recipes": described(recipes),
        }

    def layers(
        self,
        streams: Sequence[Stream],
        visit: Callable[[LayerStep], None],
        *,
        isolated: bool = False,
        watch: Callable[[int, LayerCopy], None] | None = None,
    ) -> list[Hidden]:
        """Take the reference and every stream through all layers, and show each step to ``visit``.

        Parameters
        ----------
        isolated : also run each part on the reference's input to it.
        watch : is handed the reference's copy of each layer before that is run.

        Returns
        -------
        Hidden states behind the last layer, of the reference and then of each stream.
        """
        plain = reference(self.n_layers)
        columns = (
            TextColumn("comparing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("layers"),
            TimeRemainingColumn(),
        )
        with self._undisturbed(), Progress(*columns, disable=not self._progress, transient=True) as bar:
            first = self._embedded(plain)
            # Before the first layer a stream can only differ by its arithmetic.
            states = [first if stream.is_plain else self._embedded(stream) for stream in streams]
            for layer in bar.track(range(self.n_layers)):
                made = self._copy(plain, layer)
                if watch is not None:
                    watch(layer, made)
                outputs = [
                    BatchOutputs([batch], [self._run(made, plain, layer, batch, parts[0])])
                    for batch, parts in zip(self.batches, first, strict=True)
                ]
                behind = [[batch_outputs.parts[0].residual] for batch_outputs in outputs]
                together: dict[tuple[Any, ...], list[int]] = {}
                for number, (stream, state) in enumerate(zip(streams, states, strict=True)):
                    key = (id(state), stream.layers[layer], stream.dtype, stream.is_alone)
                    together.setdefault(key, []).append(number)
                reached = list(states)
                for members in together.values():
                    stream, state = streams[members[0]], states[members[0]]
                    if state is first and stream.is_reference_in(layer):
                        own = behind
                        for batch, same in zip(self.batches, outputs, strict=True):
                            visit(LayerStep(layer, batch, members, same, same, same))
                    else:
                        own = self._step(stream, layer, members, (first, outputs, state), visit, isolated)
                    for number in members:
                        reached[number] = own
                first, states = behind, reached
        return [first, *states]

    def _step(
        self,
        stream: Stream,
        layer: int,
        members: list[int],
        given: tuple[Hidden, list[BatchOutputs], Hidden],
        visit: Callable[[LayerStep], None],
        isolated: bool,
    ) -> Hidden:
        """One layer of one stream; returns its hidden states behind the layer.

        ``given`` are the hidden states that entered the reference's layer, what that made of them, and the hidden
        states that enter the stream's.
        """
        first, outputs, state = given
        made = self._copy(stream, layer)
        reached: Hidden = []
        for number, batch in enumerate(self.batches):
            pieces = stream.pieces(batch)
            parts = zip(pieces, state[number], strict=True)
            own = BatchOutputs(pieces, [self._run(made, stream, layer, piece, part) for piece, part in parts])
            reached.append([part.residual for part in own.parts])
            alone = None
            if isolated and stream.is_reference_in(layer):
                alone = outputs[number]
            elif isolated:
                given_same = own.parts if state is first else None
                alone = self._isolated(made, stream, layer, (first[number][0], outputs[number]), given_same)
            visit(LayerStep(layer, batch, members, outputs[number], own, alone))
        return reached

    def _isolated(
        self,
        made: LayerCopy,
        stream: Stream,
        layer: int,
        given: tuple[Tensor, BatchOutputs],
        given_same: list[LayerOutputs] | None,
    ) -> BatchOutputs:
        """What each part of a stream's layer makes of what entered that part in the reference.

        ``given`` is what entered the reference's layer, and what its parts returned; ``given_same`` what the stream's
        layer returned if the same entered it.
        """
        hidden, (batch,), (reference_outputs,) = given[0], given[1].pieces, given[1].parts
        pieces = stream.pieces(batch)
        result = BatchOutputs(pieces, [])
        for i, piece in enumerate(pieces):
            n_texts, n = piece.token_ids.shape
            rows = slice(i, i + n_texts)  # of one text if they are run alone, else of all
            whole = given_same[i] if given_same is not None else None
            if whole is None:
                whole = self._run(made, stream, layer, piece, hidden[rows, :n].to(stream.dtype))
            outputs = replace(whole)
            x = reference_outputs.attention_input[rows, :n].to(stream.dtype)
            is_real = piece.is_real.to(x.device)
            # Unless the arithmetic differs, the same hidden states are normed to the same inputs.
            if not torch.equal(x, whole.attention_input):
                outputs.attention = run_attention(made, x, is_real, **self._attention_inputs(stream, layer, piece, x))
            x = reference_outputs.feed_forward_input[rows, :n].to(stream.dtype)
            if not torch.equal(x, whole.feed_forward_input):
                run_feed_forward(made, outputs, x, is_real)
            if reference_outputs.scores is not None and outputs.scores is not None:
                scores = reference_outputs.scores.unflatten(0, hidden.shape[:2])[rows, :n].flatten(0, 1)
                scores = scores.to(stream.dtype)
                # The reference's choice of experts is an input of theirs.
                if not torch.equal(scores, outputs.scores):
                    outputs.routed_experts = run_experts(made, x, scores, is_real)
            result.parts.append(outputs)
        return result

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """No gradients, and the dtypes that streams ask for even where the caller turned autocast on."""
        with torch.inference_mode(), torch.autocast(self.decoder.device.type, enabled=False):
            yield

    def _copy(self, stream: Stream, layer: int) -> LayerCopy:
        return layer_copy(self.layer(layer), self._config[stream.attention], stream.dtype, stream.layers[layer])

    def _run(self, made: LayerCopy, stream: Stream, layer: int, batch: Batch, hidden: Tensor) -> LayerOutputs:
        """One layer of a stream on a batch."""
        hidden = hidden.to(made.layer.input_layernorm.weight.device)
        attention_inputs = self._attention_inputs(stream, layer, batch, hidden)
        return run_layer(made, hidden, batch.is_real.to(hidden.device), **attention_inputs)

    def _attention_inputs(self, stream: Stream, layer: int, batch: Batch, hidden: Tensor) -> dict[str, Any]:
        """Positions and mask, as ``Llama4TextModel.forward`` makes them."""
        config: Any = self._config[stream.attention]
        position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        is_chunked = config.layer_types[layer] == "chunked_attention"
        create: Any = create_chunked_causal_mask if is_chunked else create_causal_mask
        mask = create(
            config=config,
            inputs_embeds=hidden,
            # Without padding transformers needs no mask and takes the faster causal kernel.
            attention_mask=None if bool(batch.is_real.all()) else batch.is_real.long().to(hidden.device),
            past_key_values=None,
            position_ids=position_ids,
        )
        return {"attention_mask": mask, "position_embeddings": self._rotary(hidden, position_ids)}

    def _embedded(self, stream: Stream) -> Hidden:
        weight = self.decoder.embed_tokens.weight.detach()
        return [
            [F.embedding(piece.token_ids.to(weight.device), weight).to(stream.dtype) for piece in stream.pieces(batch)]
            for batch in self.batches
        ]

    def logits(self, streams: Sequence[Stream], hidden: Sequence[Hidden]) -> LogitSums:
        """Compare what the output head makes of the last hidden states (the reference's come first).

        NaN for a model without an output head.
        """
        shape = (len(streams), len(self.ids))
        if self.head is None:
            return LogitSums.filled(shape, np.nan)
        sums = LogitSums.filled(shape, 0)
        done: dict[tuple[Any, ...], int] = {}
        with self._undisturbed():
            reference_head = self._head_copy(reference(self.n_layers))
            for number, (stream, state) in enumerate(zip(streams, hidden[1:], strict=True)):
                twin = done.setdefault((id(state), stream.head, stream.dtype), number)
                if twin < number:
                    for values in (sums.kl, sums.agreeing, sums.loss):
                        values[number] = values[twin]
                    continue
                has_own = stream.dtype is not torch.bfloat16 or not stream.head.is_nothing
                head = self._head_copy(stream) if has_own else reference_head
                for batch, first, own in zip(self.batches, hidden[0], state, strict=True):
                    compared = _compared(
                        (reference_head, reference_head.inputs([batch], first)),
                        (head, head.inputs(stream.pieces(batch), own)),
                        _next_ids(batch),
                    )
                    by_text = torch.zeros(len(batch.texts), len(compared), dtype=torch.float64)
                    # Summed on the CPU: not every device has float64.
                    by_text.index_add_(0, batch.text_of_row.cpu(), compared.T.cpu().double())
                    kl, agreeing, loss, reference_loss = by_text.T.numpy()
                    sums.kl[number, batch.texts], sums.agreeing[number, batch.texts] = kl, agreeing
                    sums.loss[number, batch.texts], sums.reference_loss[batch.texts] = loss, reference_loss
        return sums

    def _head_copy(self, stream: Stream) -> HeadCopy:
        norm, head = bare(self.decoder.norm, stream.dtype), bare(self.head, stream.dtype)
        return HeadCopy(norm, head if stream.head.is_nothing else RoundedHead(head, stream.head))


@dataclass(frozen=True)
class LogitSums:
    """Sums over tokens by (stream, text), float64: KL in nats, tokens of the same likeliest next one, loss in nats.

    ``reference_loss`` (text,) is the reference's. Losses are summed over tokens that have a next one.
    """

    kl: np.ndarray
    agreeing: np.ndarray
    loss: np.ndarray
    reference_loss: np.ndarray

    @classmethod
    def filled(cls, shape: tuple[int, int], value: float) -> LogitSums:
        """Of one value everywhere, to be filled."""
        kl, agreeing, loss = np.full((3, *shape), value, np.float64)
        return cls(kl, agreeing, loss, np.full(shape[1], value, np.float64))


@dataclass(frozen=True)
class HeadCopy:
    """Working copies of the last norm and of the output head."""

    norm: nn.Module
    head: Any

    def inputs(self, pieces: list[Batch], hidden: list[Tensor]) -> Tensor:
        """What enters the head's product, one row for each token, from the last hidden states."""
        rows = [part[piece.is_real.to(part.device)] for piece, part in zip(pieces, hidden, strict=True)]
        normed = self.norm(torch.cat(rows).to(next(self.norm.parameters()).device))
        if isinstance(self.head, RoundedHead):
            (batch,) = pieces
            return rounded_rows(normed, batch.text_of_row.to(normed.device), self.head.activation)
        return normed

    def logits(self, rows: Tensor) -> Tensor:
        """Logits (token, vocabulary) in float32."""
        return self.head(rows.to(self.head.weight.device)).float()


def _compared(first: tuple[HeadCopy, Tensor], own: tuple[HeadCopy, Tensor], next_ids: Tensor) -> Tensor:
    """KL, agreement, loss and the reference's loss of each token (4, token); 0 for the loss of a last one."""
    parts = []
    tile = max(LOGITS_AT_ONCE // first[0].head.weight.shape[0], 1)
    for rows in (slice(start, start + tile) for start in range(0, len(next_ids), tile)):
        target = next_ids[rows].to(first[1].device)
        log_p, log_q = (head.logits(x[rows]).log_softmax(dim=-1) for head, x in (first, own))
        agreeing = log_p.argmax(dim=-1) == log_q.argmax(dim=-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        has_next = target >= 0
        losses = [
            -log.gather(1, target.clamp(min=0)[:, None])[:, 0].where(has_next, log.new_zeros(()))
            for log in (log_q, log_p)
        ]
        parts.append(torch.stack([kl, agreeing.float(), *losses]))
    return torch.cat(parts, dim=1)


def _next_ids(batch: Batch) -> Tensor:
    """The token that follows each token, text after text; -1 at the end of a text."""
    following = batch.token_ids.roll(-1, dims=1)
    last = batch.is_real.sum(dim=1) - 1
    following[torch.arange(len(last)), last] = -1
    return following[batch.is_real]


def _batches(ids: Sequence[Sequence[int]]) -> list[Batch]:
    """Texts of like length in batches, the longest first, padded on the right."""
    lengths_of = [len(text) for text in ids]
    order = sorted(range(len(ids)), key=lengths_of.__getitem__, reverse=True)
    found = []
    for texts in batches(order, lengths_of, BATCH_SIZE):
        token_ids = nn.utils.rnn.pad_sequence([torch.tensor(ids[text]) for text in texts], batch_first=True)
        lengths = torch.tensor([len(ids[text]) for text in texts])
        found.append(Batch(texts, token_ids, torch.arange(token_ids.shape[1]) < lengths[:, None]))
    return found
