"""The bytes behind token ids, so that a store alone can show text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode


def pieces(tokenizer: Any, token_ids: Sequence[int]) -> dict[int, bytes]:
    """Bytes of each token id; of a special token its name, and ``[id]`` where there is no tokenizer or no such id.

    Llama 4's tokenizer is a byte-level BPE: its tokens are runs of bytes, written with one printable character for each
    byte, and may end inside a character. Tokens of another kind of tokenizer stand as it writes them.
    """
    if tokenizer is None:
        return {token_id: f"[{token_id}]".encode() for token_id in token_ids}
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()}
    found = {}
    for token_id, token in zip(token_ids, tokenizer.convert_ids_to_tokens(list(token_ids)), strict=True):
        if token_id in added:
            found[token_id] = added[token_id].encode()
        elif token is None:
            found[token_id] = f"[{token_id}]".encode()
        elif all(character in byte_of for character in token):
            found[token_id] = bytes(byte_of[character] for character in token)
        else:  # not a byte-level tokenizer
            found[token_id] = token.encode()
    return found
