"""The one way in which routing decisions are counted; numpy only."""

from __future__ import annotations

import numpy as np


def count(index: np.ndarray, code: np.ndarray, *, n_codes: int, n_values: int) -> np.ndarray:
    """How often each value occurs among the tokens of each code.

    Parameters
    ----------
    index : integers (token, layer, slot) from 0 to ``n_values - 1``.
    code : the row of the result that a token counts in (its group, its document), (token,), from 0 to ``n_codes - 1``.
    n_codes, n_values : sizes of the result.

    Returns
    -------
    int64 (code, layer, value). The counts of two blocks of tokens add up to the counts of both.
    """
    n_layers = index.shape[1]
    counts = np.zeros((n_codes, n_layers, n_values), np.int64)
    for layer in range(n_layers):
        cell = code.astype(np.int64)[:, None] * n_values + index[:, layer]
        counts[:, layer] = np.bincount(cell.ravel(), minlength=n_codes * n_values).reshape(n_codes, n_values)
    return counts
