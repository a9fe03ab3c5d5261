"""Intervals that resample documents, not tokens.

Tokens of one document are not independent: with an intra-document correlation of only 0.01, a token-level 95 %
interval covers 56 % of the time. So whole documents are drawn with replacement. A draw is a vector of multinomial
weights, hence all resamples of a table of per-document counts are one matrix product. A share is a ratio of two sums;
both come from the same draw, since documents differ in length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from probe.schema import ProbeError


@dataclass(frozen=True)
class Bootstrap:
    """How documents are resampled: coverage of the intervals, number of resamples, seed.

    Every set of documents is drawn from the same seed, so that a group's interval does not depend on the other
    groups.

    Raises
    ------
    ProbeError
        For a level that is not between 0 and 1, or fewer than one resample.
    """

    level: float = 0.95
    n_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.level < 1:
            raise ProbeError(f"level is {self.level}, it must lie between 0 and 1, such as 0.95")
        if self.n_resamples < 1:
            raise ProbeError(f"n_resamples is {self.n_resamples}, it must be at least 1 (1000 is usual)")

    @property
    def attributes(self) -> dict[str, float | int]:
        """What a result says about how its intervals were made."""
        return {"level": self.level, "n_resamples": self.n_resamples, "seed": self.seed}

    def weights(self, n_documents: int) -> np.ndarray:
        """How often each document is drawn, float32 (resample, document); a row sums to ``n_documents``, at least 1."""
        chances = np.full(n_documents, 1 / n_documents)
        drawn = np.random.default_rng(self.seed).multinomial(n_documents, chances, size=self.n_resamples)
        return drawn.astype(np.float32)

    def percentiles(self, resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The central interval over the first axis; resamples that are NaN are left out, nothing else gives NaN."""
        ordered = np.sort(resampled, axis=0)  # NaN comes last
        last = np.maximum(np.count_nonzero(~np.isnan(ordered), axis=0, keepdims=True) - 1, 0)

        def at(quantile: float) -> np.ndarray:
            below = np.floor(quantile * last).astype(np.int64)
            above = np.minimum(below + 1, last)
            low, high = np.take_along_axis(ordered, below, axis=0), np.take_along_axis(ordered, above, axis=0)
            return (low + (quantile * last - below) * (high - low))[0]

        tail = (1 - self.level) / 2
        return at(tail), at(1 - tail)

    def share_interval(self, per_document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of shares from counts (document, layer, category): see :meth:`share_bounds`."""
        if len(per_document) < 2:
            return _unknown_bounds(per_document)
        return self.share_bounds(per_document, resampled_sums(self.weights(len(per_document)), per_document))

    def share_bounds(self, per_document: np.ndarray, resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper bound of shares of counts.

        Parameters
        ----------
        per_document : counts (document, layer, category) of the documents that count anything.
        resampled : sums of them (resample, layer, category); those that drew none of these documents are left out.

        Returns
        -------
        Two arrays (layer, category), units "1": percentiles of the resampled shares; NaN for fewer than 2 documents.

        Notes
        -----
        A category that was never seen is never drawn either, and its percentiles would say that it is impossible. Its
        upper bound is the rule of three instead: 3 / n_eff at 95 %, in general -ln(1 - level) / n_eff, where n_eff,
        the number of counts over their :func:`design_effect`, is how many independent choices they are worth.
        """
        resampled = resampled[resampled.sum(axis=(1, 2)) > 0]
        if len(per_document) < 2 or not len(resampled):
            return _unknown_bounds(per_document)
        counts = per_document.sum(axis=0)
        shares = share(resampled)
        lower, upper = self.percentiles(shares)
        effect = design_effect(counts, shares.var(axis=0), len(per_document))
        unseen = np.minimum(-np.log(1 - self.level) * divide(effect, counts.sum(axis=-1)), 1)
        return lower, np.where(counts == 0, unseen[:, None], upper)


def resampled_sums(weights: np.ndarray, per_document: np.ndarray) -> np.ndarray:
    """Sums (resample, …) of ``per_document`` (document, …) under ``weights`` (resample, document)."""
    flat = per_document.reshape(len(per_document), -1).astype(np.float32)
    return (weights @ flat).reshape(len(weights), *per_document.shape[1:]).astype(np.float64)


def design_effect(counts: np.ndarray, variance: np.ndarray, n_documents: int) -> np.ndarray:
    """How many times the variance of shares exceeds that of independent choices, (layer,), at least 1.

    Parameters
    ----------
    counts : (layer, category).
    variance : bootstrap variance of the shares, (layer, category).
    n_documents : how many documents were resampled.

    Notes
    -----
    The median over the layer's categories of variance / (p (1 - p) / n). Where one category took everything there is
    no variance to compare with; then a whole document is taken to be worth one choice.
    """
    total = counts.sum(axis=-1, keepdims=True)
    observed = share(counts)
    independent = divide(observed * (1 - observed), total)
    effects = np.empty(len(counts))
    for layer in range(len(counts)):
        varies = independent[layer] > 0
        ratios = variance[layer, varies] / independent[layer, varies]
        effects[layer] = np.median(ratios) if ratios.size else total[layer, 0] / n_documents
    return np.maximum(effects, 1)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio in float64, NaN where the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def share(counts: np.ndarray) -> np.ndarray:
    """Counts over their sum along the last axis, NaN where there are none."""
    return divide(counts, counts.sum(axis=-1, keepdims=True))


def _unknown_bounds(per_document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unknown = np.full(per_document.shape[1:], np.nan)
    return unknown, unknown
