"""What permutation tests of routing exchange: one place for all of them.

Under a null hypothesis a label could as well stand elsewhere. Where else depends on the label:

* One that is the same throughout a sample, such as its domain, is the document's. Tokens of one document are not
  independent, so whole documents swap their labels. The null is that a document's label has nothing to do with where
  its tokens go; how alike the tokens of a document are makes no difference to it.
* One that differs within samples, such as token id, position or phase, is shuffled among the tokens of each document.
  The null is that, within a document, a token's label has nothing to do with where it goes. What a document as a whole
  prefers is part of this null: only what the label adds to it is tested. Tokens are taken to be exchangeable within a
  document, so where neighbours choose alike *and* carry one label, as those of a phase do, that alone is found too.

A permutation exchanges the same rows in every layer, which keeps the dependence between layers and between experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from probe import schema
from probe.routing.rows import Rows, coded
from probe.schema import ProbeError

CELLS_AT_ONCE = 1 << 24
"""Cells of a table of documents, or of groups, that is in memory at once; layers that do not fit come later."""

TOKENS_AT_ONCE = 1 << 20
"""Tokens that are shuffled or tallied at once, rounded up to whole documents."""

CHOICES_AT_ONCE = 1 << 28
"""Bytes of chosen experts that are in memory at once: every permutation counts them anew."""


@dataclass(frozen=True)
class Permutations:
    """How often labels are exchanged, and the seed. The same exchanges come up whenever they are asked for.

    Raises
    ------
    ProbeError
        For a negative number of permutations.
    """

    n_permutations: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_permutations < 0:
            raise ProbeError(f"n_permutations is {self.n_permutations}, it must be at least 0 (0 gives no p-value)")

    def document_labels(self, label: np.ndarray) -> np.ndarray:
        """Labels of documents, (document,), after whole documents swapped them: (permutation, document)."""
        random = np.random.default_rng(self.seed)
        return random.permuted(np.tile(label, (self.n_permutations, 1)), axis=1)

    def token_labels(self, label: np.ndarray, document: np.ndarray) -> Iterator[np.ndarray]:
        """Labels of tokens, (token,), shuffled within each document; one array for every permutation.

        Parameters
        ----------
        label : (token,).
        document : number of each token's document, (token,), in any order.
        """
        random = np.random.default_rng(self.seed)
        places = list(_whole_documents(document))
        for _ in range(self.n_permutations):
            shuffled = np.empty_like(label)
            for place in places:
                own = document[place]
                # A random order of all tokens, sorted by document, is a random order within each document.
                order = random.permutation(len(own))
                order = order[np.argsort((own - own[0]).astype(_small(own))[order], kind="stable")]
                shuffled[place] = label[place][order]
            yield shuffled

    def p_value(self, observed: np.ndarray, largest: np.ndarray) -> np.ndarray:
        """The share of permutations, the recording as it is included, with as large a statistic.

        Parameters
        ----------
        observed : the statistic, any shape; NaN gives NaN.
        largest : under every permutation, (permutation,): the largest over all cells that are tested together
            (Westfall & Young 1993, max-T, holds under any dependence), or the only one.

        Returns
        -------
        (1 + number as large) / (1 + number of permutations), never 0 (Phipson & Smyth 2010); NaN without permutations.
        """
        if not len(largest):
            return np.full(np.shape(observed), np.nan)
        # What is equal but for rounding counts as equal.
        threshold = observed - 1e-9 * np.maximum(np.abs(observed), 1)
        smaller = np.searchsorted(np.sort(largest), threshold, side="left")
        return np.where(np.isnan(observed), np.nan, (1 + len(largest) - smaller) / (1 + len(largest)))


@dataclass(frozen=True)
class Documents:
    """The document of every token, and what label it has; a document is a sample with a token."""

    of_token: np.ndarray
    """(token,) number of the document, of the smallest dtype."""
    n_documents: int
    label: np.ndarray | None
    """(document,) where all tokens of a document carry one label, else None."""

    @property
    def exchangeable(self) -> bool:
        """Whether exchanging labels changes anything: not if there is one for all documents, or one for each."""
        if self.label is None:
            return True
        sizes = np.bincount(self.label)
        return bool(np.count_nonzero(sizes) > 1 and sizes.max() > 1)

    @classmethod
    def of(cls, rows: Rows) -> Documents:
        """The documents of all rows, each token labelled with its group."""
        schema.require(rows.routing, "sample")
        samples, document = coded(rows.routing["sample"])
        label = np.zeros(len(samples), rows.group.dtype)
        pieces = [slice(start, start + TOKENS_AT_ONCE) for start in range(0, rows.n_tokens, TOKENS_AT_ONCE)]
        for piece in pieces:
            label[document[piece]] = rows.group[piece]
        same = all((label[document[piece]] == rows.group[piece]).all() for piece in pieces)
        return cls(document, len(samples), label if same else None)

    def tokens(self, label: np.ndarray, n_labels: int) -> sparse.csr_array:
        """How many tokens of each document carry each label (token,), sparse (document, label)."""
        shape = (self.n_documents, n_labels)
        counts = sparse.csr_array(shape, dtype=np.float64)
        for start in range(0, len(label), TOKENS_AT_ONCE):
            piece = slice(start, start + TOKENS_AT_ONCE)
            places = self.of_token[piece].astype(np.int64), label[piece].astype(np.int64)
            counts = counts + sparse.csr_array((np.ones(len(places[0])), places), shape=shape)
        return counts


def layer_batches(rows: Rows, n_table: int = 0) -> Iterator[tuple[slice, Rows]]:
    """All rows, as many layers at a time as fit into memory, with the place of those layers among all.

    Chosen experts are bounded by ``CHOICES_AT_ONCE``, a table (row, layer, expert) of ``n_table`` documents or groups
    by ``CELLS_AT_ONCE``. Most recordings are one batch; another one reads and shuffles everything again.
    """
    cells = max(n_table * rows.n_experts, 1)
    choices = max(rows.n_tokens * rows.top_k * rows.routing["expert_index"].dtype.itemsize, 1)
    at_once = max(min(CELLS_AT_ONCE // cells, CHOICES_AT_ONCE // choices), 1)
    for start in range(0, rows.n_layers, at_once):
        layers = slice(start, min(start + at_once, rows.n_layers))
        all_ = at_once >= rows.n_layers
        yield layers, rows if all_ else replace(rows, routing=rows.routing.isel(layer=layers), ungrouped=None)


def chosen_experts(rows: Rows, kept: np.ndarray | None = None) -> np.ndarray:
    """Chosen experts (token, layer, slot) of a batch of layers, of the ``kept`` (token,) tokens only.

    In memory the tokens of one layer follow one another, since large tables are made layer by layer.
    """
    n_tokens = rows.n_tokens if kept is None else int(np.count_nonzero(kept))
    chosen = np.empty((rows.n_layers, n_tokens, rows.top_k), rows.routing["expert_index"].dtype).swapaxes(0, 1)
    start = 0
    for block in rows.blocks("expert_index"):
        own = block.chosen if kept is None else block.chosen[kept[block.start : block.start + block.n_tokens]]
        chosen[start : start + len(own)] = own
        start += len(own)
    return chosen


def label_sums(label: np.ndarray, per_document: np.ndarray, n_labels: int) -> Iterator[np.ndarray]:
    """Sums of counts over the documents of each label.

    Parameters
    ----------
    label : labels of documents under every permutation, (permutation, document).
    per_document : counts (document, …).
    n_labels : how many labels there are.

    Yields
    ------
    Exact whole numbers as floats (label, …), once for every permutation.
    """
    n_documents, shape = len(per_document), per_document.shape[1:]
    flat = per_document.reshape(n_documents, int(np.prod(shape)))
    # float32 is exact as long as no sum reaches 2**24, and twice as fast
    dtype = np.float32 if flat.sum(axis=0).max(initial=0) < 1 << 24 else np.float64
    flat = flat.astype(dtype)
    places, ones = np.arange(n_documents + 1), np.ones(n_documents, dtype)
    for labels in label:
        belongs = sparse.csc_array((ones, labels.astype(np.int64), places), shape=(n_labels, n_documents))
        yield (belongs.tocsr() @ flat).reshape(n_labels, *shape)


def _whole_documents(document: np.ndarray) -> Iterator[slice | np.ndarray]:
    """Places of the tokens, sorted by document: runs of whole documents of at least ``TOKENS_AT_ONCE`` tokens."""
    in_order = bool((document[1:] >= document[:-1]).all())
    order = None if in_order else np.argsort(document, kind="stable")
    ends = np.cumsum(np.bincount(document)) if len(document) else np.zeros(0, np.int64)
    start = 0
    while start < len(document):
        stop = int(ends[np.searchsorted(ends, min(start + TOKENS_AT_ONCE, len(document)))])
        yield slice(start, stop) if order is None else order[start:stop]
        start = stop


def _small(document: np.ndarray) -> np.dtype:
    """The smallest dtype for documents in ascending order, numbered from the first of them: sorting 16 bits is fast."""
    return np.min_scalar_type(int(document[-1]) - int(document[0]))
