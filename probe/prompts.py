"""Texts made for an experiment: a needle in a haystack, and documents joined to any length.

Parts of a text are tokenized on their own and put together as token ids, so that positions are exact whatever a
tokenizer would have merged across their borders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np

from probe.corpus import bundled_corpus, read_corpus
from probe.schema import ProbeError

KEYS = ("castle", "garden", "river", "bridge", "market", "tower", "island", "forest", "harbor", "museum")


class PromptError(ProbeError):
    """A text cannot be made as it was asked for."""


@dataclass(frozen=True)
class Haystack:
    """What the texts of :func:`needle_prompts` are made of.

    ``sentence`` is the needle; it holds ``{value}`` once and may hold ``{key}``. The question at the end of the text is
    the sentence up to the value, and the answer is the value. ``keys`` are texts that the key is drawn from.
    ``values`` are texts that the value is drawn from; without them it is ``n_value_tokens`` different tokens, drawn
    from those of the filler: nothing but the needle says what comes next. ``filler`` is the text around the needle,
    documents that follow each other in random order, again and again if need be; without it, those of the bundled
    corpus.
    """

    sentence: str = "\nThe secret code of the {key} is {value}.\n"
    keys: Sequence[str] = KEYS
    values: Sequence[str] | None = None
    n_value_tokens: int = 8
    filler: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.sentence.count("{value}") != 1 or not self.sentence.split("{value}")[0].strip():
            raise PromptError(f"sentence is {self.sentence!r}: it must hold {{value}} once, and words before it")
        for name in ("keys", "values", "filler"):
            texts = getattr(self, name)
            if texts is None and name != "keys":
                continue
            if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
                raise PromptError(f"{name} must be a list of texts, none of them empty, got {texts!r:.80}")
        require_whole("n_value_tokens", self.n_value_tokens, least=1)


@dataclass(frozen=True)
class NeedlePrompt:
    """Token ids of one text, and what stands where in it, as half-open positions.

    ``needle`` is the whole sentence, ``mention`` the value in it, ``answer`` the value again, which ends the text.
    """

    token_ids: list[int]
    needle: tuple[int, int]
    mention: tuple[int, int]
    answer: tuple[int, int]


def needle_prompts(
    tokenizer: Any,
    *,
    length: int,
    depth: float,
    haystack: Haystack | None = None,
    n_prompts: int = 8,
    seed: int = 0,
) -> list[NeedlePrompt]:
    """Texts of exactly ``length`` tokens with a needle at a depth, its question and its answer.

    Parameters
    ----------
    tokenizer : any of transformers' tokenizers. The parts of a text are tokenized on their own and put together as
        ids, so that positions are exact whatever it would have merged across their borders.
    length : tokens in each text, a beginning-of-text token included where the tokenizer adds one.
    depth : share of the filler that stands before the needle, 0 to 1.
    haystack : what the texts are made of.
    n_prompts : how many.
    seed : of keys, values and the order of the filler. A text's are the same at any length and depth.

    Raises
    ------
    PromptError
        If the parts do not fit into ``length`` tokens, or for any other argument that makes no sense.

    Notes
    -----
    Kamradt's needle in a haystack; random values as in the copying tests of Wu et al. 2024, arXiv 2404.15574.
    """
    require_whole("n_prompts", n_prompts, least=1)
    require_whole("seed", seed, least=0)
    require_lengths([length])
    require_depths([depth])
    trials = Trials(tokenizer, haystack or Haystack(), n_prompts, seed)
    trials.check_room(length)
    return trials.prompts(length, depth)


def long_texts(
    tokenizer: Any, *, n_texts: int, n_tokens: int, documents: Sequence[str] | None = None, seed: int = 0
) -> list[list[int]]:
    """Token ids of texts of exactly ``n_tokens`` tokens, made of documents one after another.

    Parameters
    ----------
    tokenizer : any of transformers' tokenizers.
    n_texts, n_tokens : how many texts, and how long; a beginning-of-text token is counted, where the tokenizer adds
        one, and stands at the start of the text only.
    documents : what they are made of, in random order; without them, the documents of the bundled corpus. No document
        comes twice before all have come once, over all texts.
    seed : of the order.

    Raises
    ------
    PromptError
        For a number below 1, or no documents.
    """
    require_whole("n_texts", n_texts, least=1)
    require_whole("n_tokens", n_tokens, least=1)
    require_whole("seed", seed, least=0)
    begin = _beginning(tokenizer)
    stream = _stream(_documents(tokenizer, documents), np.random.default_rng(seed))
    return [(begin + [next(stream) for _ in range(n_tokens)])[:n_tokens] for _ in range(n_texts)]


# --- parts of a text -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """Token ids of one trial's parts; its filler comes from a generator of its own seed."""

    before: list[int]
    value: list[int]
    after: list[int]
    filler_seed: int

    @property
    def n_tokens(self) -> int:
        """Tokens of needle, question and answer."""
        return 2 * len(self.before) + 2 * len(self.value) + len(self.after)


class Trials:
    """Keys, values and filler of several texts, the same at every length and depth.

    Raises
    ------
    PromptError
        If the tokenizer makes no token of one of the parts, or too few different ones of the filler.
    """

    def __init__(self, tokenizer: Any, haystack: Haystack, n_trials: int, seed: int) -> None:
        self._begin = _beginning(tokenizer)
        self._documents = _documents(tokenizer, haystack.filler)
        self._known = np.unique(np.concatenate(self._documents))
        if haystack.values is None and len(self._known) < haystack.n_value_tokens:
            raise PromptError(
                f"n_value_tokens is {haystack.n_value_tokens}, but the filler has {len(self._known)} different tokens"
            )
        self._trials = [
            self._trial(tokenizer, haystack, np.random.default_rng((seed, number))) for number in range(n_trials)
        ]

    def _trial(self, tokenizer: Any, haystack: Haystack, random: np.random.Generator) -> _Trial:
        before, after = haystack.sentence.replace("{key}", str(random.choice(haystack.keys))).split("{value}")
        # Tokenizers put a space to the word behind it: here, to the value.
        asked = before.rstrip(" ")
        if haystack.values is None:
            value = random.choice(self._known, haystack.n_value_tokens, replace=False).tolist()
        else:
            value = _part(tokenizer, before[len(asked) :] + str(random.choice(haystack.values)))
        end = _part(tokenizer, after) if after else []
        return _Trial(_part(tokenizer, asked), value, end, int(random.integers(2**63)))

    def check_room(self, length: int) -> None:
        """Raise a PromptError if one of the texts needs more than ``length`` tokens."""
        needed = len(self._begin) + max(trial.n_tokens for trial in self._trials)
        if length < needed:
            raise PromptError(
                f"a text of {length} tokens has no room for needle, question and answer: they need {needed}"
            )

    def prompts(self, length: int, depth: float) -> list[NeedlePrompt]:
        """The text of each trial."""
        return [self._prompt(trial, length, depth) for trial in self._trials]

    def _prompt(self, trial: _Trial, length: int, depth: float) -> NeedlePrompt:
        n_filler = length - len(self._begin) - trial.n_tokens
        stream = _stream(self._documents, np.random.default_rng(trial.filler_seed))
        filler = [next(stream) for _ in range(n_filler)]
        n_before = round(depth * n_filler)
        sentence = trial.before + trial.value + trial.after
        start = len(self._begin) + n_before
        mention = start + len(trial.before)
        return NeedlePrompt(
            self._begin + filler[:n_before] + sentence + filler[n_before:] + trial.before + trial.value,
            needle=(start, start + len(sentence)),
            mention=(mention, mention + len(trial.value)),
            answer=(length - len(trial.value), length),
        )


def _beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, if the tokenizer puts one before a text."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _tokenized(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _part(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a part of a text, at least one."""
    if not (ids := _tokenized(tokenizer, [text])[0]):
        raise PromptError(f"the tokenizer makes no token of {text!r}")
    return ids


def _documents(tokenizer: Any, texts: Sequence[str] | None) -> list[list[int]]:
    """Token ids of each document, a blank line at its end."""
    if texts is None:
        texts = read_corpus(bundled_corpus()).texts
    if isinstance(texts, str) or not texts:
        raise PromptError(f"expected a list of documents, got {texts!r:.80}")
    documents = _tokenized(tokenizer, [text.rstrip("\n") + "\n\n" for text in texts])
    if not any(documents):
        raise PromptError("the tokenizer makes no token of these documents: pass others")
    return [document for document in documents if document]


def _stream(documents: Sequence[list[int]], random: np.random.Generator) -> Iterator[int]:
    """Tokens of the documents in random order, and again in another one, without end."""
    while True:
        for index in random.permutation(len(documents)):
            yield from documents[index]


# --- arguments --------------------------------------------------------------------------------------------------------


def require_whole(name: str, value: Any, *, least: int) -> None:
    """Raise a PromptError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, Integral) or value < least:
        raise PromptError(f"{name} is {value!r}, it must be a whole number of at least {least}")


def require_lengths(lengths: Sequence[int]) -> None:
    """Raise a PromptError unless ``lengths`` are different numbers of tokens."""
    if not lengths or len(set(lengths)) != len(lengths):
        raise PromptError(f"lengths is {lengths}: name at least one, and each of them once")
    for length in lengths:
        require_whole("a length", length, least=1)


def require_depths(depths: Sequence[Any]) -> None:
    """Raise a PromptError unless ``depths`` are different shares."""
    if not depths or len(set(depths)) != len(depths):
        raise PromptError(f"depths is {depths}: name at least one, and each of them once")
    for depth in depths:
        if not isinstance(depth, Real) or not 0 <= float(depth) <= 1:
            raise PromptError(f"a depth is {depth!r}, it must lie between 0, the text's start, and 1, its end")
