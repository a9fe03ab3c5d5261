"""Means over samples, and how sure they are; part of ``probe.attention_maps``.

Each sample counts the same, so that a mean over samples is a mean of independent numbers. Its standard error over
resampled documents is then known without drawing any: s / √n. As everywhere (``probe.bootstrap``) Student's t, for as
many samples as the mean rests on, and a scale on which the number is nearly normal make an interval of it, and one that
would not hold is withheld.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from scipy.special import expit, logit, stdtrit

from probe.attention.queries import Cells
from probe.bootstrap import MIN_CARRYING, MIN_CARRYING_SHARE, MIN_DOCUMENTS, Bootstrap, divide, effective_number

RECORDED_TO = 1e-5
"""Masses are recorded in float32 and to this accuracy: closer to 1 than that is 1."""


@dataclass(frozen=True)
class Estimate:
    """Means over samples (…) with their bounds, NaN where those are withheld."""

    mean: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    n_documents: np.ndarray
    """Samples in which the number is defined."""

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Estimate:
        """Of nothing yet: to be filled with :meth:`put`."""
        mean, lower, upper = np.full((3, *shape), np.nan)
        return cls(mean, lower, upper, np.zeros(shape, np.int64))

    def put(self, place: Any, part: Estimate) -> None:
        """Fill in the part of the estimate at an index."""
        for field in fields(self):
            getattr(self, field.name)[place] = getattr(part, field.name)

    def at(self, place: Any) -> Estimate:
        """The part of the estimate at an index."""
        return Estimate(*(getattr(self, field.name)[place] for field in fields(self)))


def sample_mean(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (…) of the values (sample, …) that are not NaN, and how many there are; NaN where there is none."""
    n = np.count_nonzero(~np.isnan(values), axis=0)
    return divide(np.nansum(values, axis=0), n), n


@dataclass(frozen=True)
class MeanInterval:
    """How the interval of a mean over samples is made.

    Parameters
    ----------
    level : coverage.
    statistic : what the numbers are. A mass, or any other share, lies between 0 and 1: its interval is symmetric on the
        logit scale. All else is at least 0: the logarithm.

    Raises
    ------
    ProbeError
        For a level that is not between 0 and 1.
    """

    level: float
    statistic: str

    def __post_init__(self) -> None:
        Bootstrap(self.level)

    @property
    def is_share(self) -> bool:
        """Whether the numbers cannot exceed 1."""
        return self.statistic.endswith("_mass") or self.statistic == "top_weight"

    @property
    def is_count(self) -> bool:
        """Whether the numbers are whole, so that equal ones say little of those not seen."""
        return self.statistic in ("key_rank", "top_key")

    def t_reach(self, values: np.ndarray, n_effective: np.ndarray | None = None) -> np.ndarray:
        """How far a mean of values (sample, …) may be off to both sides, t · s / √n; NaN for fewer than 5 samples.

        ``n_effective`` is how many samples the mean rests on, if fewer than there are.
        """
        mean, n = sample_mean(values)
        variance = divide(np.nansum(np.square(values - mean), axis=0), np.maximum(n - 1, 0))
        freedom = np.maximum((n if n_effective is None else n_effective) - 1, 1)
        reach = stdtrit(freedom, (1 + self.level) / 2) * np.sqrt(divide(variance, n))
        return np.where(n < MIN_DOCUMENTS, np.nan, reach)

    def estimate(self, values: np.ndarray) -> Estimate:
        """Mean and bounds of values (sample, …); those that are NaN are left out."""
        mean, n = sample_mean(values)
        carried = effective_number(np.nan_to_num(values))
        if self.is_share:
            carried = np.where(mean > 0.5, effective_number(np.nan_to_num(np.maximum(1 - values, 0))), carried)
        reach = self.t_reach(values, carried)
        if self.is_share:
            in_logits = divide(reach, mean * (1 - mean))
            lower, upper = expit(logit(mean) - in_logits), expit(logit(mean) + in_logits)
            settled = (mean == 0) | (1 - mean < RECORDED_TO)
        else:
            factor = np.exp(divide(reach, mean))
            lower, upper = mean / factor, mean * factor
            settled = mean == 0
        withheld = carried < np.minimum(MIN_CARRYING, MIN_CARRYING_SHARE * n)
        # What is 0 (or 1) in every sample, such as the far mass of a RoPE layer, is so by construction.
        lower, upper = (np.where(settled, mean, bound) for bound in (lower, upper))
        withheld = (withheld & ~settled) | np.isnan(reach)
        if self.is_count:
            withheld |= reach == 0
        lower, upper = (np.where(withheld, np.nan, bound) for bound in (lower, upper))
        return Estimate(mean, lower, upper, n)

    def by_group(self, cells: Cells, values: np.ndarray) -> Estimate:
        """Mean over samples and bounds (group, …) of values (cell, …)."""
        result = Estimate.empty((cells.n_groups, *values.shape[1:]))
        for group, own in cells.groups():
            result.put(group, self.estimate(values[own]))
        return result
