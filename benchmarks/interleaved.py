"""Time several functions in turn, round after round, and compare them by the ratio within each round.

A machine's speed drifts over seconds; two functions timed in the same round share the drift, so that their ratio does
not see it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table


def seconds(functions: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2) -> dict[str, np.ndarray]:
    """Seconds (round) of each function; the order turns by one from round to round, so that none always goes first."""
    names = list(functions)
    for name in names * warmup:
        functions[name]()
    taken = {name: np.empty(rounds) for name in names}
    for index in track(range(rounds), description="rounds"):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            functions[name]()
            taken[name][index] = time.perf_counter() - start
    return taken


def median_ratio(numerator: np.ndarray, denominator: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Median over rounds of the ratio, with its 95 % interval by bootstrap over rounds."""
    ratio = numerator / denominator
    random = np.random.default_rng(seed)
    medians = np.median(random.choice(ratio, (10_000, len(ratio))), axis=1)
    lower, upper = np.quantile(medians, [0.025, 0.975])
    return float(np.median(ratio)), float(lower), float(upper)


def print_ratios(taken: Mapping[str, np.ndarray], *, baseline: str, title: str) -> None:
    """A table of milliseconds and of ratios to ``baseline``."""
    table = Table("what", "median ms", "ratio", "95 % interval", title=title)
    for name, values in taken.items():
        ratio, lower, upper = median_ratio(values, taken[baseline])
        table.add_row(name, f"{np.median(values) * 1e3:.1f}", f"{ratio:.3f}", f"{lower:.3f} to {upper:.3f}")
    Console(width=110).print(table)
