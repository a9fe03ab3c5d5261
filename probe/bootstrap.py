"""Intervals that resample documents, not tokens.

Tokens of one document are not independent: with an intra-document correlation of only 0.01, a token-level 95 %
interval covers 56 % of the time. So whole documents are drawn with replacement. A draw is a vector of multinomial
weights, hence all resamples of a table of per-document counts are one matrix product. A share is a ratio of two sums;
both come from the same draw, since documents differ in length.

The resamples give a standard error. What turns it into an interval is Student's t, because documents are few, and a
scale on which the number is nearly normal: percentiles of the resamples themselves cover 80 % instead of 95 % with
five documents, and still miss rare experts with thirty (``docs/statistics.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, stdtrit

from probe.schema import ProbeError

MIN_DOCUMENTS = 5
"""Fewer documents give no interval."""

MIN_EFFECTIVE = 3.0
"""Fewer documents in effect give no interval either: where one is as long as all others, nothing is known of chance."""

MIN_CARRYING, MIN_CARRYING_SHARE = 4.0, 0.4
"""A share whose tokens come from fewer documents, in effect, gets no interval: it would cover less than 90 %. Where
there are fewer than ten documents, Student's t makes up for more: tokens of four in ten are enough."""

INTERVAL_STATUS = (
    "given",
    "unused: rule of three",
    "withheld: fewer than 5 documents, or 3 in effect",
    "withheld: rests on too few documents",
    "no token",
)
"""What became of an interval; the categories of every ``interval_status``."""

GIVEN, UNUSED, FEW_DOCUMENTS, FEW_CARRYING, NO_TOKEN = range(5)

DOCUMENTS_AT_ONCE = 4096


class Interval(NamedTuple):
    """Bounds of a number, NaN where they are withheld."""

    lower: np.ndarray
    upper: np.ndarray
    status: np.ndarray
    """Codes of ``INTERVAL_STATUS``."""


@dataclass(frozen=True)
class Bootstrap:
    """How documents are resampled: coverage of the intervals, number of resamples, seed.

    Every set of documents is drawn from the same seed, so that a group's interval does not depend on the other
    groups.

    Raises
    ------
    ProbeError
        For a level that is not between 0 and 1, or fewer than two resamples.
    """

    level: float = 0.95
    n_resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kind in {"level": Real, "n_resamples": Integral, "seed": Integral}.items():
            if not isinstance(getattr(self, name), kind):
                raise ProbeError(f"{name} is {getattr(self, name)!r}, it must be a {kind.__name__.lower()} number")
        if self.seed < 0:
            raise ProbeError(f"seed is {self.seed}, it must be at least 0")
        if not 0 < self.level < 1:
            raise ProbeError(f"level is {self.level}, it must lie between 0 and 1, such as 0.95")
        if self.n_resamples < 2:
            raise ProbeError(f"n_resamples is {self.n_resamples}, it must be at least 2 (1000 is usual)")

    @property
    def attributes(self) -> dict[str, float | int]:
        """What a result says about how its intervals were made."""
        return {"level": self.level, "n_resamples": self.n_resamples, "seed": self.seed}

    def weights(self, n_documents: int) -> np.ndarray:
        """How often each document is drawn, uint16 (resample, document); a row sums to ``n_documents``."""
        random = np.random.default_rng(self.seed)
        drawn = np.empty((self.n_resamples, n_documents), np.uint16)
        for resample in drawn:
            resample[:] = np.bincount(random.integers(n_documents, size=n_documents), minlength=n_documents)
        return drawn

    def resample(self, per_document: np.ndarray) -> np.ndarray:
        """Sums of ``per_document`` (document, …) over drawn documents, float64 (resample, …)."""
        return resampled_sums(self.weights(len(per_document)), per_document)

    def t(self, n_effective: np.ndarray | float) -> np.ndarray:
        """How many standard errors the interval reaches to both sides; NaN for fewer than 3 effective documents."""
        n_effective = np.asarray(n_effective, float)
        reach = stdtrit(np.maximum(n_effective - 1, 1), (1 + self.level) / 2)
        return np.where(n_effective < MIN_EFFECTIVE, np.nan, reach)

    def share_interval(self, per_document: np.ndarray, *, top_k: int = 1) -> Interval:
        """Interval of shares from counts (document, layer, category): see :meth:`share_bounds`."""
        resampled = self.resample(per_document) if len(per_document) >= MIN_DOCUMENTS else None
        return self.share_bounds(per_document, resampled, top_k=top_k)

    def share_bounds(self, per_document: np.ndarray, resampled: np.ndarray | None, *, top_k: int = 1) -> Interval:
        """Interval of shares of counts.

        Parameters
        ----------
        per_document : counts (document, layer, category) of the documents that count anything.
        resampled : sums of them (resample, layer, category); those that drew none of these documents are left out.
        top_k : how many different categories a token counts in; none can have more than 1 / k of the counts.

        Returns
        -------
        Bounds and status (layer, category), bounds in units "1".

        Notes
        -----
        Korn & Graubard 1998: the exact (Clopper–Pearson) interval for as many independent choices as the tokens are
        worth, n_eff = tokens / design effect, scaled by (z / t)² for few documents, never more than the tokens. The
        design effect is bootstrap variance over binomial variance.

        A category that was never seen has no variance of its own: the layer's :func:`design_effect` stands in. Its
        upper bound is the rule of three, 3 / n_eff at 95 %, in general -ln(1 - level) / n_eff; the lower bound of one
        that took everything is 1 minus that.
        """
        counts = per_document.sum(axis=0)
        tokens = counts.sum(axis=-1, keepdims=True) // top_k
        n_documents = effective_number(per_document.sum(axis=-1))[:, None]
        enough = np.minimum(MIN_CARRYING, MIN_CARRYING_SHARE * n_documents)
        status = np.full(counts.shape, GIVEN, np.uint8)
        status[carrying(per_document, top_k) < enough] = FEW_CARRYING
        status[(counts == 0) | (counts == tokens)] = UNUSED
        too_few = (n_documents < MIN_EFFECTIVE) | (len(per_document) < MIN_DOCUMENTS)
        status[np.broadcast_to(too_few, counts.shape)] = FEW_DOCUMENTS
        status[np.broadcast_to(tokens == 0, counts.shape)] = NO_TOKEN
        lower, upper = np.full((2, *counts.shape), np.nan)
        if resampled is None or len(per_document) < MIN_DOCUMENTS:
            return Interval(lower, upper, status)

        drawn = top_k * share(resampled[resampled.sum(axis=(1, 2)) > 0])  # of tokens
        variance = _unbiased(drawn.var(axis=0), len(per_document))
        effect = design_effect(counts, tokens, variance, len(per_document))[:, None]
        observed = divide(counts, tokens)
        own_effect = divide(variance, divide(observed * (1 - observed), tokens))
        own_effect = np.where(np.isnan(own_effect) | (own_effect == 0), effect, own_effect)
        worth = np.minimum(tokens / own_effect * (self.t(np.inf) / self.t(n_documents)) ** 2, tokens)
        tail = (1 - self.level) / 2
        taken, left = worth * observed, worth * (1 - observed)
        seen = status == GIVEN
        with np.errstate(invalid="ignore"):
            lower[seen] = betaincinv(taken, left + 1, tail)[seen]
            upper[seen] = betaincinv(taken + 1, left, 1 - tail)[seen]
        unseen = np.minimum(-np.log(1 - self.level) * effect / np.maximum(tokens, 1), 1)
        unseen = np.broadcast_to(unseen, counts.shape)
        none, all_ = (status == UNUSED) & (counts == 0), (status == UNUSED) & (counts > 0)
        lower[none], upper[none] = 0, unseen[none]
        lower[all_], upper[all_] = 1 - unseen[all_], 1
        return Interval(lower / top_k, upper / top_k, status)

    def largest_deviation(self, per_document: np.ndarray) -> np.ndarray:
        """How far the share of no category is off, (layer,), from counts (document, layer, category).

        The quantile at ``level``, over resamples, of the largest difference between a resampled share and the share;
        widened by t / z for few documents. For bounds of a maximum of shares, which cannot move further than that.
        """
        deviation = np.abs(share(self.resample(per_document)) - share(per_document.sum(axis=0))).max(axis=-1)
        few = self.t(effective_number(per_document.sum(axis=-1))) / self.t(np.inf)
        return few * np.quantile(deviation, self.level, axis=0)

    def ratio_interval(self, numerator: np.ndarray, denominator: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of a ratio of two sums that cannot be negative, such as a mean of norms.

        Parameters
        ----------
        numerator, denominator : what each document adds to the two sums, (document, …).

        Returns
        -------
        Lower and upper bound (…), ratio · exp(±t · standard error / ratio); NaN for fewer than 5 documents.
        """
        ratio = divide(numerator.sum(axis=0), denominator.sum(axis=0))
        if len(numerator) < MIN_DOCUMENTS:
            return np.full(ratio.shape, np.nan), np.full(ratio.shape, np.nan)
        weights = self.weights(len(numerator))
        drawn = divide(resampled_sums(weights, numerator), resampled_sums(weights, denominator))
        return self.factor_bounds(ratio, drawn, effective_number(denominator))

    def factor_bounds(
        self, estimate: np.ndarray, resampled: np.ndarray, n_effective: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of a positive number that errs by a factor, from resamples (resample, …) of it."""
        relative = divide(standard_error(resampled, n_effective), estimate)
        factor = np.exp(self.t(n_effective) * relative)
        return estimate / factor, estimate * factor

    def bounds(
        self, estimate: np.ndarray, resampled: np.ndarray, n_effective: np.ndarray | float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of a smooth function of sums over documents, such as an entropy.

        Parameters
        ----------
        estimate : its value (…) on all documents.
        resampled : its values (resample, …) on drawn documents.
        n_effective : how many documents of one size those are worth, see :func:`effective_number`.

        Notes
        -----
        A function that is least (or largest) at equal loads is biased by noise, and resampling adds as much noise
        again: the difference between the mean resample and the estimate. It is taken off before t standard errors
        are added to both sides, so that the estimate need not lie in the middle.
        """
        centre = 2 * estimate - _mean(resampled)
        reach = self.t(n_effective) * standard_error(resampled, n_effective)
        return np.minimum(centre - reach, estimate), np.maximum(centre + reach, estimate)


def resampled_sums(weights: np.ndarray, per_document: np.ndarray) -> np.ndarray:
    """Sums (resample, …) of ``per_document`` (document, …) under ``weights`` (resample, document), float64."""
    flat = per_document.reshape(len(per_document), math.prod(per_document.shape[1:]))
    sums = np.zeros((len(weights), flat.shape[1]))
    for start in range(0, len(flat), DOCUMENTS_AT_ONCE):
        some = slice(start, start + DOCUMENTS_AT_ONCE)
        sums += weights[:, some].astype(np.float32) @ flat[some].astype(np.float32)
    return sums.reshape(len(weights), *per_document.shape[1:])


def effective_number(sizes: np.ndarray) -> np.ndarray:
    """How many equal documents are worth as much as documents of ``sizes`` (document, …): (Σ s)² / Σ s²; Kish 1965."""
    sizes = np.asarray(sizes, float)
    return np.nan_to_num(divide(np.square(sizes.sum(axis=0)), np.square(sizes).sum(axis=0)))


def carrying(per_document: np.ndarray, top_k: int = 1) -> np.ndarray:
    """Over how many documents, in effect, the rarer side of a share is spread, (layer, category).

    The rarer side is the category itself, or all tokens without it where more than half of them have it.
    """
    tokens = per_document.sum(axis=-1, keepdims=True) // top_k
    rarer = 2 * per_document.sum(axis=0) <= tokens.sum(axis=0)
    return np.where(rarer, effective_number(per_document), effective_number(tokens - per_document))


def design_effect(counts: np.ndarray, tokens: np.ndarray, variance: np.ndarray, n_documents: int) -> np.ndarray:
    """How many times the variance of shares exceeds that of independent choices, (layer,), at least 1.

    Parameters
    ----------
    counts : tokens with the category, (layer, category).
    tokens : all tokens, (layer, 1).
    variance : bootstrap variance of counts over tokens, (layer, category).
    n_documents : how many documents were resampled.

    Notes
    -----
    The median over the layer's categories of variance / (p (1 - p) / n). Where one category took everything there is
    no variance to compare with; then a whole document is taken to be worth one choice.
    """
    observed = divide(counts, tokens)
    independent = divide(observed * (1 - observed), tokens)
    effects = np.empty(len(counts))
    for layer in range(len(counts)):
        varies = independent[layer] > 0
        ratios = variance[layer, varies] / independent[layer, varies]
        effects[layer] = np.median(ratios) if ratios.size else tokens[layer, 0] / n_documents
    return np.maximum(effects, 1)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The ratio in float64, NaN where the denominator is zero."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def share(counts: np.ndarray) -> np.ndarray:
    """Counts over their sum along the last axis, NaN where there are none."""
    return divide(counts, counts.sum(axis=-1, keepdims=True))


def standard_error(resampled: np.ndarray, n_effective: np.ndarray | float) -> np.ndarray:
    """Standard error (…) of a number from its values (resample, …) on drawn documents; see :func:`effective_number`."""
    return np.sqrt(_unbiased(_mean(np.square(resampled - _mean(resampled))), np.asarray(n_effective)))


def _unbiased(variance: np.ndarray, n_documents: int | np.ndarray) -> np.ndarray:
    """The variance of drawn documents is that of a sample: too small by 1 in ``n_documents``."""
    return variance * n_documents / np.maximum(np.asarray(n_documents, float) - 1, 1)


def _mean(resampled: np.ndarray) -> np.ndarray:
    """Mean over resamples; those that are NaN are left out, nothing else gives NaN."""
    return divide(np.nansum(resampled, axis=0), np.count_nonzero(~np.isnan(resampled), axis=0))
