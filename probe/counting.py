"""The one way in which routing decisions are counted; numpy only."""

from __future__ import annotations

import numpy as np

CELLS_AT_ONCE = 1 << 16
"""Decisions that are counted at once: their 8-byte cell numbers stay in a core's cache."""

MOST_CELLS_AT_ONCE = 1 << 22
"""At most so many, where the table of values is larger than that cache."""


def count(index: np.ndarray, code: np.ndarray | None = None, *, n_codes: int = 1, n_values: int) -> np.ndarray:
    """How often each value occurs among the tokens of each code.

    Parameters
    ----------
    index : integers (token, layer, slot) from 0 to ``n_values - 1``.
    code : the row of the result that a token counts in (its group, its document), (token,), from 0 to ``n_codes - 1``;
        all tokens count in row 0 where it is None.
    n_codes, n_values : sizes of the result.

    Returns
    -------
    int64 (code, layer, value). The counts of two blocks of tokens add up to the counts of both.
    """
    counts = np.zeros((n_codes, index.shape[1], n_values), np.int64)
    add_counts(counts, index, code)
    return counts


def add_counts(counts: np.ndarray, index: np.ndarray, code: np.ndarray | None = None) -> None:
    """Count as :func:`count` does, on top of ``counts`` (code, layer, value)."""
    n_tokens, n_layers, n_slots = index.shape
    per_code = counts[0].size if len(counts) else 0
    first_cell = (np.arange(n_layers) * counts.shape[2])[:, None]
    # A piece is no smaller than the table that it is counted in: making and adding that must not cost more.
    table = per_code if code is None or _stands_together(code, per_code, n_layers * n_slots) else counts.size
    at_once = max(max(CELLS_AT_ONCE, min(table, MOST_CELLS_AT_ONCE)) // max(n_layers * n_slots, 1), 1)
    for start in range(0, n_tokens, at_once):
        piece = slice(start, start + at_once)
        cell = index[piece] + first_cell
        if code is None:
            counts[0] += np.bincount(cell.ravel(order="K"), minlength=per_code).reshape(counts[0].shape)
        else:
            _count_piece(counts, cell, code[piece].astype(np.int64))


def _stands_together(code: np.ndarray, per_code: int, per_token: int) -> bool:
    """Whether tokens of one code follow one another, as those of a document do, so that a piece holds few codes."""
    n_runs = 1 + np.count_nonzero(code[1:] != code[:-1])
    return bool(n_runs * per_code <= 4 * len(code) * per_token)


def _count_piece(counts: np.ndarray, cell: np.ndarray, code: np.ndarray) -> None:
    """Add the cells (token, layer, slot) of a piece to ``counts`` (code, layer, value)."""
    per_code = counts[0].size
    enough = 4 * cell.size  # cells of a table that may be made anew for one piece
    if counts.size <= max(enough, CELLS_AT_ONCE):
        cell += (code * per_code)[:, None, None]
        counts += np.bincount(cell.ravel(order="K"), minlength=counts.size).reshape(counts.shape)
        return
    # Documents stand one after another: a piece of a large table holds few of them, each in one run.
    starts = np.concatenate([[0], np.flatnonzero(code[1:] != code[:-1]) + 1])
    if len(starts) * per_code <= enough:
        run = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(code)))
        cell += (run * per_code)[:, None, None]
        found = np.bincount(cell.ravel(order="K"), minlength=len(starts) * per_code)
        np.add.at(counts, code[starts], found.reshape(len(starts), *counts.shape[1:]))
    else:
        cell += (code * per_code)[:, None, None]
        np.add.at(counts.reshape(-1), cell.ravel(order="K"), 1)
