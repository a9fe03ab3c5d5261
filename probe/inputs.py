"""What ``record`` is handed, checked and turned into token ids before anything runs."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from probe.recording import RecordingError

Texts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


def token_ids(texts: str | Texts, tokenizer: Any, n_vocabulary: int) -> tuple[list[list[int]], list[str]]:
    """Token ids and hash of every text.

    Parameters
    ----------
    texts : one text, several, or token ids, one sequence for each text.
    tokenizer : needed for text.
    n_vocabulary : ids from 0 to ``n_vocabulary - 1`` are known to the model.

    Raises
    ------
    RecordingError
        For anything else; names what is wrong with which text.
    """
    ids, hashes = _tokenize(_as_list(texts), tokenizer)
    _check_ids(ids, n_vocabulary)
    return ids, hashes


def _as_list(texts: str | Texts) -> list[Any]:
    if isinstance(texts, Mapping):
        raise RecordingError(f"texts is a {type(texts).__name__}: pass its input_ids, without padding")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise RecordingError("there is no text to record: texts is empty")
    return texts


def check_labels(name: str, labels: Any, n_texts: int, *, optional: bool = False) -> None:
    """Raise a RecordingError unless ``labels`` is None or one text (or, where ``optional``, None) for each text."""
    if labels is None:
        return
    if isinstance(labels, str) or len(labels) != n_texts:
        got = f"the string {labels!r}" if isinstance(labels, str) else len(labels)
        raise RecordingError(f"{name} needs one entry for each of the {n_texts} texts, got {got}")
    for label in labels:
        if not (isinstance(label, str) or (optional and label is None)):
            raise RecordingError(f"{name} must be text, but one is {label!r}")
        _encoded(label or "", f"an entry of {name}")


def _encoded(text: str, what: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordingError(f"{what} cannot be written as UTF-8: {text[:40]!r} ({error.reason})") from error


def _tokenize(texts: list[Any], tokenizer: Any) -> tuple[list[list[Any]], list[str]]:
    """Ids and hash of every text."""
    if isinstance(texts[0], str):
        if tokenizer is None:
            raise RecordingError("texts need a tokenizer: pass tokenizer=, or token ids instead of texts")
        if odd := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
            raise RecordingError(
                f"texts mixes text and other things: number {odd[0]} is a {type(texts[odd[0]]).__name__}"
            )
        hashes = [_hash(_encoded(text, f"text {i}")) for i, text in enumerate(texts)]
        # verbose=False: a text longer than the tokenizer likes is none of its business here
        return tokenizer(texts, verbose=False)["input_ids"], hashes
    try:
        ids = [[_whole(token_id, i) for token_id in text] for i, text in enumerate(texts)]
    except TypeError as error:
        raise RecordingError(f"texts needs one sequence of token ids for each text: {error}") from error
    return ids, [hash_ids(np.array(sample_ids)) for sample_ids in ids]


def _whole(token_id: Any, text: int) -> int:
    try:
        return operator.index(token_id)
    except TypeError as error:
        raise RecordingError(f"token ids must be whole numbers, but text {text} holds {token_id!r}") from error


def _check_ids(ids: list[list[int]], n_vocabulary: int) -> None:
    for text, sample_ids in enumerate(ids):
        if sample_ids and not 0 <= min(sample_ids) <= max(sample_ids) < n_vocabulary:
            odd = next(token_id for token_id in sample_ids if not 0 <= token_id < n_vocabulary)
            raise RecordingError(
                f"text {text} holds token id {odd}, but the model's vocabulary ends at {n_vocabulary - 1}: "
                "does this tokenizer belong to this model?"
            )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_ids(token_ids: np.ndarray) -> str:
    """SHA-256 of token ids, as little-endian unsigned integers of four bytes."""
    return _hash(token_ids.astype("<u4").tobytes())
