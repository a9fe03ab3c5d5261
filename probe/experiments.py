"""Experiments: texts made for one question, run through a model, and what its attention and its losses say.

Needle: does it find a statement again, from how far, and which heads do it? Induction: does it go on with what it has
seen once? Temperature: what do NoPE layers do far out, with the tuning of their queries and without? Answers are
forced: the text holds them, and the model is asked what it would have predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import xarray as xr
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from probe import attention_maps, interventions, schema, sites
from probe.attention.intervals import Estimate, MeanInterval
from probe.attention_recording import AttentionSpec
from probe.bootstrap import divide
from probe.hooks import RoutingSpec, record
from probe.inputs import Texts
from probe.models import LoadedModel
from probe.prompts import Haystack, NeedlePrompt, Trials, require_depths, require_lengths, require_whole
from probe.schema import ProbeError

Model = LoadedModel | nn.Module


class ExperimentError(ProbeError):
    """An experiment's arguments do not fit together, or do not fit the model."""


def needle(
    model: Model,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    haystack: Haystack | None = None,
    tokenizer: Any = None,
    n_trials: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    """Hide a statement in texts of several lengths, ask for it at the end, and see who finds it.

    Parameters
    ----------
    model : a ``LoadedModel``, or any module that holds a Llama 4 text decoder and an output head.
    lengths : tokens in a text.
    depths : shares of the filler that stand before the needle, 0 to 1.
    haystack : what the texts are made of.
    tokenizer : of a bare model.
    n_trials : texts for each length and depth, each with its own key, value and filler.
    seed : of keys, values and filler; a trial's are the same at every length and depth.
    progress : show a progress bar.

    Returns
    -------
    Dataset, means over trials, and within them over the queries that predict a token of the answer:

    - (length, depth, layer, head): ``needle_mass``, the attention mass on the needle; ``key_rank``, how many visible
      keys outweigh the needle's heaviest, NaN where none of it is visible; ``copying_score``, the share of queries
      whose heaviest key lies in the needle and is the very token to be copied;
    - (length, depth): ``answer_rank``, how many tokens the model finds likelier than the answer's; ``answer_loss``, in
      nats; ``needle_loss``, that of the same tokens where they stand in the needle, for the first time; ``is_found``,
      the share of trials in which every token of the answer is the likeliest.

    Raises
    ------
    PromptError
        Before anything runs: for lengths too short to hold needle, question and answer, or depths outside 0 to 1.
    ExperimentError
        For a model without tokenizer or output head.

    Notes
    -----
    ``copying_score`` is the retrieval score of Wu et al. 2024 (arXiv 2404.15574), with the answer forced instead of
    generated; heads of 0.1 and more are retrieval heads there. A RoPE layer sees the needle only from the same chunk.
    Whether what heads look at also helps is another question: then ``answer_loss`` lies below ``needle_loss``.
    """
    lengths, depths = list(lengths), list(depths)
    require_lengths(lengths)
    require_depths(depths)
    require_whole("n_trials", n_trials, least=1)
    require_whole("seed", seed, least=0)
    head = sites.output_head(_module(model))
    if head is None:
        raise ExperimentError(
            f"{type(_module(model)).__name__} has no output head, so it gives no answer: pass a Llama4ForCausalLM"
        )
    tokenizer = _tokenizer(model, tokenizer)
    trials = Trials(tokenizer, haystack or Haystack(), n_trials, seed)
    trials.check_room(min(lengths))

    cells = []
    with _progress("needle", len(lengths) * len(depths) * n_trials, progress) as advance:
        for length in lengths:
            for depth in depths:
                cells.append(_needle_cell(model, head, tokenizer, trials.prompts(length, depth)))
                advance(n_trials)
    along_depth = [xr.concat(cells[at : at + len(depths)], "depth") for at in range(0, len(cells), len(depths))]
    result = xr.concat(along_depth, "length").assign_coords(
        length=_variable("length", np.array(lengths), "tokens in the text", "token"),
        depth=_variable("depth", np.array(depths, float), "share of the filler before the needle"),
    )
    return result.assign_attrs(cells[0].attrs | {"n_trials": n_trials, "seed": seed})


def induction(
    model: Model,
    *,
    period: int = 50,
    n_sequences: int = 16,
    repeats: int = 2,
    seed: int = 0,
    tokenizer: Any = None,
    level: float = 0.95,
    progress: bool = True,
) -> xr.Dataset:
    """Repeat random tokens: which heads look to where the same token was followed by the next one, and does it help?

    Parameters
    ----------
    model : a ``LoadedModel``, or any module that holds a Llama 4 text decoder.
    period : tokens before the sequence repeats; ``period * repeats`` beyond a chunk hides repeats from RoPE layers.
    n_sequences : random sequences, each of different ones among the tokens that mean text.
    repeats : how often each is repeated, the first time included.
    seed : of the tokens.
    tokenizer : of a bare model, to know which tokens mean text; without it all do.
    level : coverage of the intervals, which are over sequences.
    progress : show a progress bar.

    Returns
    -------
    Dataset with

    - (layer, head): ``score``, the mean weight of the key ``period - 1`` tokens back, over queries of the second and
      later repeats; ``lower``, ``upper``;
    - (layer): ``even_score``, the score of a head that attends evenly to all keys that it sees;
    - (repeat), for a model with an output head: ``loss``, the mean loss of all tokens of the repeat but its first, in
      nats; ``loss_lower``, ``loss_upper``; ``loss_change``, minus that of the first repeat, with its bounds.

    Raises
    ------
    ProbeError
        Before anything runs: for numbers that make no sense, or a vocabulary with fewer tokens than a period.

    Notes
    -----
    Olsson et al. 2022 (arXiv 2209.11895); the score is TransformerLens's. The first token of a repeat is left out of
    the loss: what comes after a sequence cannot be known at its first end.
    """
    require_whole("period", period, least=2)
    require_whole("n_sequences", n_sequences, least=1)
    require_whole("repeats", repeats, least=2)
    require_whole("seed", seed, least=0)
    interval = MeanInterval(level, "offset_mass")  # says what is wrong with a level before anything runs
    known = _text_tokens(model, tokenizer)
    if len(known) < period:
        raise ExperimentError(f"period is {period}, but only {len(known)} different tokens mean text: shorten it")
    random = np.random.default_rng(seed)
    sequences = [np.tile(random.choice(known, period, replace=False), repeats).tolist() for _ in range(n_sequences)]
    has_head = sites.output_head(_module(model)) is not None
    trace = record(
        model,
        sequences,
        tokenizer=tokenizer,
        attention=AttentionSpec(statistics=(), offsets=(period - 1,)),
        routing=RoutingSpec(next_token_loss=has_head),
        progress=progress,
    )
    attention = schema.group(trace, "attention")
    weight = attention["offset_mass"].isel(offset=0).transpose("query", "layer", "head").values
    weight = weight.reshape(n_sequences, period * repeats, *weight.shape[1:])[:, period:]
    score = interval.estimate(weight.mean(axis=1, dtype=np.float64))
    columns = _with_bounds("score", ("layer", "head"), score, "mean weight of the key a period less one back", "1")
    coords: dict[str, Any] = {name: attention[name].variable for name in ("layer", "attention_kind", "head")}
    columns["even_score"] = _variable(
        "layer", _even_scores(attention, period, period * repeats), "score of a head that attends evenly"
    )
    if has_head:
        losses = schema.group(trace, "routing")["next_token_loss"].values.reshape(n_sequences, repeats, period)
        losses = losses[:, :, : period - 1].mean(axis=2, dtype=np.float64)
        columns |= _losses(losses, losses[:, :1], "repeat", level, "the first repeat")
        coords["repeat"] = _variable("repeat", np.arange(repeats), "repeat, from 0 for the first time")
    asked = {"period": period, "n_sequences": n_sequences, "repeats": repeats, "seed": seed, "level": level}
    attributes = {"model": trace.attrs["model"], "chunk_size": attention.attrs["chunk_size"]} | asked
    return xr.Dataset(columns, coords, attributes).rename(score_lower="lower", score_upper="upper")


def temperature(
    model: Model,
    texts: str | Texts,
    *,
    scales: Sequence[float] = (0.0, 1.0, 2.0),
    n_bins: int = 32,
    queries: int | None = None,
    tokenizer: Any = None,
    level: float = 0.95,
    progress: bool = True,
) -> xr.Dataset:
    """Turn the temperature tuning of NoPE layers off, leave it, scale it; see attention and loss along the texts.

    Parameters
    ----------
    model : a ``LoadedModel``, or any module that holds a Llama 4 text decoder.
    texts : texts or token ids, as for :func:`probe.record`; see :func:`probe.prompts.long_texts`.
    scales : what ``attn_scale`` is multiplied with, see :func:`probe.interventions.temperature`.
    n_bins : bins of positions at most; each holds the same number of tokens, a power of two.
    queries : queries of each text whose attention is looked at, drawn at random, the same at every scale; all unless
        given. The loss is always that of all tokens.
    tokenizer : of a bare model, for text.
    level : coverage of the intervals, which are over texts.
    progress : show a progress bar.

    Returns
    -------
    Dataset with ``factor`` (scale, position), what queries are multiplied with; and (scale, position_bin), means over
    the tokens of a bin, then over texts:

    - ``entropy``, in nats, and ``far_mass``, the mass on keys before the query's own chunk, both over all heads of the
      NoPE layers;
    - ``loss`` of the next token, in nats, for a model with an output head, and ``loss_change``, minus the loss at scale
      1, text by text, NaN where scale 1 is not among the scales;

    each with ``…_lower`` and ``…_upper``. ``position_bin`` is a bin's first position, the coord ``bin_stop`` the one
    behind its last; ``n_texts`` (position_bin) counts the texts that reach it.

    Raises
    ------
    InterventionError
        Before anything runs: if the model has no NoPE layer or no tuning, or for a scale that is not finite.
    ExperimentError
        For no scale, or one that comes twice.

    Notes
    -----
    Entropy and far mass are not comparable between positions, as more keys are visible further out: compare scales.
    Every text is its own control: ``loss_change`` has far narrower bounds than the losses themselves.
    """
    scales = list(scales)
    if not scales or len(set(scales)) != len(scales):
        raise ExperimentError(f"scales is {scales}: name at least one, and each of them once")
    require_whole("n_bins", n_bins, least=1)
    intervals = {name: MeanInterval(level, name) for name in ("entropy", "far_mass")}
    layers = interventions.nope_layers(model)
    for scale in scales:
        with interventions.temperature(model, scale=scale):
            pass  # says what is wrong with a scale, or a model, before another scale has run for an hour
    has_head = sites.output_head(_module(model)) is not None
    spec = AttentionSpec(statistics=("entropy", "far_mass"), layers=layers, queries=queries)
    profiles = []
    for scale in scales:
        with interventions.temperature(model, scale=scale):
            trace = record(
                model,
                texts,
                tokenizer=tokenizer,
                attention=spec,
                routing=RoutingSpec(next_token_loss=has_head),
                progress=progress,
            )
        n_tokens = schema.group(trace, "samples")["n_tokens"].values.astype(np.int64)
        longest = int(n_tokens.max())
        width = _bin_width(longest, n_bins)
        profiles.append(_profile(trace, width))
    of_scale = {name: np.stack([profile[name] for profile in profiles], axis=1) for name in profiles[0]}

    config = sites.text_model(_module(model)).config
    factor = [interventions.temperature_factor(config, np.arange(longest), scale=scale) for scale in scales]
    columns = {"factor": _variable(("scale", "position"), np.stack(factor), "what NoPE layers multiply queries with")}
    dims = ("scale", "position_bin")
    for name, interval in intervals.items():
        described = schema.ATTENTION[name]
        columns |= _with_bounds(name, dims, interval.estimate(of_scale[name]), described.long_name, described.units)
    if has_head:
        losses = of_scale["loss"]
        reference = losses[:, [scales.index(1)]] if 1 in scales else np.full_like(losses[:, :1], np.nan)
        columns |= _losses(losses, reference, dims, level, "scale 1")
    first = np.arange(0, longest, width)
    columns["n_texts"] = _variable("position_bin", (n_tokens[:, None] > first).sum(axis=0), "texts in the bin", "text")
    coords = {
        "scale": _variable("scale", np.array(scales, float), "multiple of attn_scale"),
        "position": _variable("position", np.arange(longest), "position in the text", "token"),
        "position_bin": _variable("position_bin", first, "first position of the bin", "token"),
        "bin_stop": _variable(
            "position_bin", np.minimum(first + width, longest), "position after the bin's last", "token"
        ),
    }
    asked = {"layers": layers, "queries": queries or 0, "level": level}
    of_model = {"chunk_size": trace["attention"].attrs["chunk_size"], "floor_scale": config.floor_scale}
    return xr.Dataset(
        columns, coords, {"model": trace.attrs["model"], "attn_scale": config.attn_scale} | of_model | asked
    )


# --- measuring --------------------------------------------------------------------------------------------------------


def _needle_cell(model: Model, head: nn.Module, tokenizer: Any, prompts: Sequence[NeedlePrompt]) -> xr.Dataset:
    """Means over the texts of one length and depth: what :func:`needle` returns, without these dims."""
    # A token is predicted from the one before it.
    answers = [(start - 1, stop - 1) for start, stop in (prompt.answer for prompt in prompts)]
    mentions = [(start - 1, stop - 1) for start, stop in (prompt.mention for prompt in prompts)]
    queries = [[*range(*answer), *range(*mention)] for answer, mention in zip(answers, mentions, strict=True)]
    needles = [prompt.needle for prompt in prompts]
    with _hidden_states(_module(model), queries) as states:
        trace = record(
            model,
            [prompt.token_ids for prompt in prompts],
            tokenizer=tokenizer,
            attention=AttentionSpec(statistics=("top_key",), segments={"needle": needles}),
            progress=False,
        )
    score = attention_maps.needle_score(trace, needle=needles, answer=answers)
    of_texts = []
    for prompt, state in zip(prompts, states, strict=True):
        value = prompt.token_ids[slice(*prompt.answer)]
        loss, rank = _predictions(head, state[: len(value)], value)
        loss_in_needle, _ = _predictions(head, state[len(value) :], value)
        of_texts.append((rank.mean(), loss.mean(), loss_in_needle.mean(), (rank == 0).all()))
    answer_rank, answer_loss, needle_loss, is_found = np.mean(of_texts, axis=0)
    heads = ("layer", "head")
    return xr.Dataset(
        {
            "needle_mass": _variable(heads, score["mass"].values, "attention mass on the needle"),
            "key_rank": _variable(heads, score["rank"].values, "visible keys heavier than every key of the needle"),
            "copying_score": _variable(heads, score["score"].values, "share of heaviest keys that are copied"),
            "answer_rank": _variable((), answer_rank, "tokens likelier than the answer's"),
            "answer_loss": _variable((), answer_loss, "loss of the answer's tokens", "nat"),
            "needle_loss": _variable((), needle_loss, "loss of the same tokens in the needle", "nat"),
            "is_found": _variable((), is_found, "share of texts with a whole answer that is likeliest"),
        },
        coords={name: score[name].variable for name in ("layer", "attention_kind", "head")},
        attrs={"model": trace.attrs["model"], "chunk_size": trace["attention"].attrs["chunk_size"]},
    )


@contextmanager
def _hidden_states(model: nn.Module, queries: Sequence[list[int]]) -> Iterator[list[Tensor]]:
    """Final hidden states (query, H) at the ``queries`` of each text, in the order in which texts of one length run."""
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        for row in output[0]:
            states.append(row[queries[len(states)]])

    handle = sites.text_model(model).register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


@torch.inference_mode()
def _predictions(head: nn.Module, states: Tensor, targets: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Loss, in nats, and rank, from 0, of each target (query,) by what hidden states (query, H) predict."""
    logits = head(states).float()
    own = logits.gather(-1, torch.as_tensor(targets, device=logits.device)[:, None])
    loss = logits.logsumexp(dim=-1) - own[:, 0]
    return loss.cpu().numpy(), (logits > own).sum(dim=-1).cpu().numpy()


def _even_scores(attention: xr.Dataset, period: int, n_tokens: int) -> np.ndarray:
    """What :func:`induction` finds in each layer (layer,) if every visible key gets the same weight."""
    query = np.arange(period, n_tokens)
    chunk_start = query // attention.attrs["chunk_size"] * attention.attrs["chunk_size"]
    scores = []
    for kind in schema.labels(attention["attention_kind"]):
        first = chunk_start if kind == "rope" else np.zeros_like(query)
        scores.append(np.where(query - (period - 1) >= first, 1 / (query - first + 1), 0).mean())
    return np.array(scores)


def _bin_width(n_positions: int, n_bins: int) -> int:
    """The smallest power of two that needs no more than ``n_bins`` bins."""
    width = 1
    while -(-n_positions // width) > n_bins:
        width *= 2
    return width


def _profile(trace: xr.DataTree, width: int) -> dict[str, np.ndarray]:
    """Means (text, bin) of entropy, far mass and, where it was recorded, loss, over positions in bins of ``width``."""
    n_tokens = schema.group(trace, "samples")["n_tokens"].values.astype(np.int64)
    shape = len(n_tokens), -(-int(n_tokens.max()) // width)
    attention, routing = schema.group(trace, "attention"), schema.group(trace, "routing")
    numbers = {name: (attention, attention[name].mean(("layer", "head")).values) for name in ("entropy", "far_mass")}
    if "next_token_loss" in routing:
        numbers["loss"] = (routing, routing["next_token_loss"].values)
    profile = {}
    for name, (group, values) in numbers.items():
        cell = np.ravel_multi_index((group["sample"].values, group["position"].values // width), shape)
        defined = ~np.isnan(values)  # the last token of a text has no loss
        n_values = np.bincount(cell[defined], minlength=shape[0] * shape[1])
        sums = np.bincount(cell[defined], values[defined], minlength=shape[0] * shape[1])
        profile[name] = divide(sums, n_values).reshape(shape)
    return profile


# --- results ----------------------------------------------------------------------------------------------------------


def _variable(dims: str | tuple[str, ...], values: Any, long_name: str, units: str = "1") -> xr.Variable:
    return xr.Variable(dims, values, {"long_name": long_name, "units": units})


def _with_bounds(
    name: str, dims: str | tuple[str, ...], estimate: Estimate, long_name: str, units: str
) -> dict[str, xr.Variable]:
    """The variables ``name``, ``name_lower`` and ``name_upper``."""
    return {
        name: _variable(dims, estimate.mean, long_name, units),
        f"{name}_lower": _variable(dims, estimate.lower, f"lower bound: {long_name}", units),
        f"{name}_upper": _variable(dims, estimate.upper, f"upper bound: {long_name}", units),
    }


def _losses(
    losses: np.ndarray, reference: np.ndarray, dims: str | tuple[str, ...], level: float, against: str
) -> dict[str, xr.Variable]:
    """Loss and its change, with bounds over texts, from losses (text, …) and those that they are compared with."""
    interval = MeanInterval(level, "next_token_loss")
    change = losses - reference
    mean = divide(np.nansum(change, axis=0), np.count_nonzero(~np.isnan(change), axis=0))
    reach = interval.t_reach(change)  # a change may be below 0: no logarithm
    changed = Estimate(mean, mean - reach, mean + reach, np.count_nonzero(~np.isnan(change), axis=0))
    long_name = "loss of the next token"
    return _with_bounds("loss", dims, interval.estimate(losses), long_name, "nat") | _with_bounds(
        "loss_change", dims, changed, f"{long_name}, minus that of {against}", "nat"
    )


# --- arguments --------------------------------------------------------------------------------------------------------


def _module(model: Model) -> nn.Module:
    return model.model if isinstance(model, LoadedModel) else model


def _tokenizer(model: Model, tokenizer: Any) -> Any:
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ExperimentError("a bare model has no tokenizer to write prompts with: pass tokenizer=")
    return tokenizer


def _text_tokens(model: Model, tokenizer: Any) -> np.ndarray:
    """Ids of the tokens that mean text; all of the model's where no tokenizer says which."""
    n_ids = sites.text_model(_module(model)).embed_tokens.num_embeddings
    tokenizer = tokenizer if tokenizer is not None else getattr(model, "tokenizer", None)
    if tokenizer is None:
        return np.arange(n_ids)
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return np.setdiff1d(np.arange(min(n_ids, len(tokenizer))), sorted(special))


@contextmanager
def _progress(what: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over texts, as long as the block lasts; what it yields advances it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("texts"), TimeRemainingColumn())
    with Progress(*columns, disable=not shown, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda n_texts: bar.advance(task, n_texts)
