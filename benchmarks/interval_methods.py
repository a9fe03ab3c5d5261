"""Intervals that were tried and not taken: ``python -m benchmarks.interval_methods``.

Coverage of 95 % intervals, on counts drawn from documents that each prefer experts of their own (Dirichlet around the
load). Shares: percentiles of the bootstrap, percentiles widened for few documents (Hesterberg 2015), and what
``Bootstrap.share_interval`` does. Maximum violation: bias-corrected bounds, and what ``imbalance`` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.special import ndtr, stdtrit

from probe.bootstrap import Bootstrap, effective_number, share

N_DOCUMENTS = (5, 10, 30, 200)
LOAD = np.array([0.2, 0.15, 0.12, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01])


def drawn_counts(
    random: np.random.Generator, load: np.ndarray, n_documents: int, correlation: float, spread: float
) -> np.ndarray:
    """Counts (document, 1, expert); ``spread`` is the standard deviation of the logarithm of the lengths."""
    lengths = np.maximum(random.lognormal(4, spread, n_documents), 1).astype(int)
    shares = random.dirichlet((1 / correlation - 1) * load, size=n_documents)
    return random.multinomial(lengths, shares)[:, None]


def share_intervals(counts: np.ndarray, bootstrap: Bootstrap) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, lower and upper bounds (expert,) of each method."""
    shares = share(bootstrap.resample(counts))[:, 0]
    yield "percentiles", *np.quantile(shares, [0.025, 0.975], axis=0)
    n = max(float(effective_number(counts.sum(axis=(1, 2)))), 1.5)
    tail = float(ndtr(-stdtrit(n - 1, 0.975) * np.sqrt(n / (n - 1))))
    yield "percentiles, widened", *np.quantile(shares, [tail, 1 - tail], axis=0)
    lower, upper, _ = bootstrap.share_interval(counts)
    yield "share_interval", lower[0], upper[0]


def violation_intervals(counts: np.ndarray, bootstrap: Bootstrap) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The same for the maximum violation, (1,)."""
    n_experts = counts.shape[-1]

    def violation(load: np.ndarray) -> np.ndarray:
        return n_experts * load.max(axis=-1) - 1

    estimate = violation(share(counts.sum(axis=0)))
    resampled = violation(share(bootstrap.resample(counts)))
    lower, upper = bootstrap.bounds(estimate, resampled, effective_number(counts.sum(axis=-1)))
    yield "bias-corrected bounds", lower.clip(min=0), upper
    reach = n_experts * bootstrap.largest_deviation(counts)
    yield "largest deviation of any load", (estimate - reach).clip(min=0), estimate + reach


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    n_simulations = parser.parse_args().simulations
    bootstrap = Bootstrap(n_resamples=300)
    uniform = np.full(len(LOAD), 1 / len(LOAD))
    cases = [
        (f"share, correlation {correlation}, lengths ± {spread}", share_intervals, LOAD, correlation, spread, LOAD)
        for correlation in (0.01, 0.05, 0.1)
        for spread in (0.5, 1.0)
    ]
    cases += [
        (f"maximum violation, {name}", violation_intervals, load, 0.05, 0.5, len(load) * load.max() - 1)
        for name, load in (("uniform router", uniform), ("unequal loads", LOAD))
    ]
    table = Table("case", "method", *(f"{size} documents" for size in N_DOCUMENTS))
    table.title = f"coverage of 95 % intervals (of the experts with 1 %), {n_simulations:,} simulations"
    for name, methods, load, correlation, spread, truth in track(cases, description="cases"):
        columns: dict[str, list[str]] = {}
        for n_documents in N_DOCUMENTS:
            random = np.random.default_rng(0)
            held: dict[str, list[np.ndarray]] = {}
            for _ in range(n_simulations):
                counts = drawn_counts(random, load, n_documents, correlation, spread)
                seen = counts.sum(axis=(0, 1)) > 0
                for method, lower, upper in methods(counts, bootstrap):
                    holds = np.where(np.isnan(lower), np.nan, (lower <= truth) & (truth <= upper))
                    if len(holds) == len(seen):
                        holds = np.where(seen, holds, np.nan)
                    held.setdefault(method, []).append(holds)
            for method, all_holds in held.items():
                cell = f"{np.nanmean(all_holds):.1%}"
                if len(all_holds[0]) == len(LOAD):
                    cell += f" ({np.nanmean(np.array(all_holds)[:, -3:]):.1%})"
                columns.setdefault(method, []).append(cell)
        for method, cells in columns.items():
            table.add_row(name, method, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
