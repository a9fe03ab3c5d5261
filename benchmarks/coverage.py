"""How often the 95 % intervals hold the truth: ``python -m benchmarks.coverage``.

A planted router with a known truth: documents of unequal length that each prefer experts of their own, two domains, an
expert that depends on the token, on the token before and on the layer before. Every statistic is estimated from many
independent sets of documents and its interval compared with the value on a very large set. "token by token" is the
textbook interval that takes tokens for independent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Console
from rich.progress import track
from rich.table import Table

from probe import recording, routing_stats, schema

N_DOCUMENTS = (5, 10, 30, 200)
TRUTH_DOCUMENTS = 40_000
DOMAINS, DOMAIN_SHARES = ("code", "prose"), (0.5, 0.5)
LOADS = np.array([0.19, 0.14, 0.12, 0.1, 0.08, 0.07, 0.06, 0.05, 0.04, 0.03, 0.03, 0.025, 0.02, 0.016, 0.015, 0.014])
"""Of one domain; the other prefers the neighbours. No expert has less than 1 % of all tokens."""
LAYERS = (1, 3)
N_TOKEN_TYPES = 30
CORRELATION = 0.05
"""Of the experts of two tokens of one document, beyond what the domain explains."""


class PlantedRouter:
    """Draws sets of documents; two of them share nothing but the router."""

    def __init__(self) -> None:
        random = np.random.default_rng(12345)
        swapped = LOADS.reshape(-1, 2)[:, ::-1].ravel()
        self.loads = np.array([[LOADS, swapped], [LOADS[::-1], swapped[::-1]]])  # (layer, domain, expert)
        self.of_token = random.integers(len(LOADS), size=(len(LAYERS), N_TOKEN_TYPES))
        frequency = 1 / np.arange(1, N_TOKEN_TYPES + 1)
        self.frequency = frequency / frequency.sum()

    def draw(self, seed: int, n_documents: int) -> tuple[xr.DataTree, xr.DataTree]:
        """A recording of so many documents, and one of the same documents in a slightly different run."""
        random = np.random.default_rng(seed)
        lengths = np.maximum(random.lognormal(np.log(60), 0.6, n_documents), 2).astype(np.int64)
        n_tokens, n_experts = int(lengths.sum()), len(LOADS)
        sample = np.repeat(np.arange(n_documents), lengths)
        starts = np.cumsum(lengths) - lengths
        position = np.arange(n_tokens) - np.repeat(starts, lengths)
        domain = random.choice(len(DOMAINS), p=DOMAIN_SHARES, size=n_documents)
        domain[: len(DOMAINS)] = np.arange(len(DOMAINS))  # so that no set lacks one
        token_id = random.choice(N_TOKEN_TYPES, p=self.frequency, size=n_tokens)
        chosen = np.empty((n_tokens, len(LAYERS)), np.int64)
        other = np.empty_like(chosen)
        concentration = 1 / CORRELATION - 1
        for layer in range(len(LAYERS)):
            shares = random.standard_gamma(concentration * self.loads[layer, domain])
            cumulative = (shares / shares.sum(axis=1, keepdims=True)).cumsum(axis=1)[sample]
            expert = (random.random(n_tokens)[:, None] > cumulative[:, :-1]).sum(axis=1)
            expert = np.where(random.random(n_tokens) < 0.2, self.of_token[layer, token_id], expert)
            if layer:
                expert = np.where(random.random(n_tokens) < 0.2, chosen[:, layer - 1], expert)
            # As the token before: the last token that was not copied, in the same document
            own = (random.random(n_tokens) >= 0.15) | (position == 0)
            expert = expert[np.maximum.accumulate(np.where(own, np.arange(n_tokens), 0))]
            chosen[:, layer] = expert
            unsure = random.beta(2, 18, n_documents)[sample]
            other[:, layer] = np.where(random.random(n_tokens) < unsure, (expert + 1) % n_experts, expert)
        calm = random.gamma(20, 1 / 20, n_documents)[sample, None]
        shape = chosen.shape
        rows = {
            "expert_index": chosen[..., None],
            "router_logit": np.ones((*shape, 1), np.float16),
            "runner_up_index": (chosen + 1) % n_experts,
            "router_margin": (calm * random.gamma(2, 1, shape)).astype(np.float16),
            "logit_logsumexp": (calm * random.normal(3, 0.5, shape)).astype(np.float32),
            "sample": sample,
            "position": position,
            "token_id": token_id,
            "modality": np.zeros(n_tokens, np.uint8),
            "phase": np.zeros(n_tokens, np.uint8),
        }
        probability = np.zeros((n_documents, *shape[1:], n_experts))
        soft = 0.5 * np.eye(n_experts)[chosen] + 0.5 / n_experts
        np.add.at(probability, sample, soft)
        attributes = dict.fromkeys(schema.ROOT_ATTRIBUTES, "") | {
            "schema_version": schema.SCHEMA_VERSION,
            "top_k": 1,
        }
        trace = recording.build(
            rows,
            samples=[recording.Sample(str(at), DOMAINS[domain[at]]) for at in range(n_documents)],
            probability_sum=probability,
            layout=recording.Layout(LAYERS, [True, False], n_experts, 1),
            pieces={token: b"t" for token in range(N_TOKEN_TYPES)},
            attributes=attributes,
        )
        second = trace.copy()
        routing = trace["routing"].to_dataset()
        changed = routing["expert_index"].copy(data=other[..., None].astype(np.uint8))
        second["routing"] = xr.DataTree(routing.assign(expert_index=changed))
        return trace, second


Numbers = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Estimates and their lower and upper bounds, all of one shape."""


def numbers(result: xr.Dataset, name: str, lower: str = "lower", upper: str = "upper") -> Numbers:
    return result[name].values, result[lower].values, result[upper].values


def token_by_token(trace: xr.DataTree) -> Numbers:
    """The load, and the textbook interval for a share of independent tokens."""
    load = routing_stats.expert_load(trace).values
    reach = 1.96 * np.sqrt(load * (1 - load) / trace["routing"].sizes["token"])
    return load, load - reach, load + reach


def estimators(options: dict[str, int]) -> dict[str, Callable[[xr.DataTree, xr.DataTree], Numbers]]:
    """Every number that comes with an interval, by name."""

    def of(
        function: Callable[..., xr.Dataset], name: str, lower: str = "lower", upper: str = "upper", **more: object
    ) -> Callable[[xr.DataTree, xr.DataTree], Numbers]:
        return lambda trace, other: numbers(function(trace, **more, **options), name, lower, upper)

    def of_pair(
        function: Callable[..., xr.Dataset], name: str, lower: str = "lower", upper: str = "upper", **more: object
    ) -> Callable[[xr.DataTree, xr.DataTree], Numbers]:
        return lambda trace, other: numbers(function(trace, other, **more, **options), name, lower, upper)

    stats = routing_stats
    evenness = {
        f"imbalance: {name.replace('_', ' ')}": of(stats.imbalance, name, f"{name}_lower", f"{name}_upper")
        for name in ("max_violation", "coefficient_of_variation", "gini", "normalized_entropy")
    }
    specialization = partial(stats.specialization, n_permutations=0)
    return {
        "load, token by token": lambda trace, other: token_by_token(trace),
        "load": of(stats.load_interval, "load"),
        "load by domain": of(stats.load_interval, "load", by="domain"),
        **evenness,
        "balance loss": of(stats.balance_loss, "balance_loss"),
        "z-loss": of(stats.z_loss, "z_loss"),
        "margin, quantiles": of(stats.margin, "margin", "margin_lower", "margin_upper"),
        "specialization: share": of(specialization, "share", "share_lower", "share_upper"),
        "specialization: lift": of(specialization, "lift", "lift_lower", "lift_upper"),
        "repetition": of(stats.repetition, "repetition"),
        "device load: imbalance": of(stats.device_load, "imbalance", devices=4),
        "distinct experts": of(stats.distinct_experts, "distinct", batch_sizes=(4, 16)),
        "vocabulary": lambda trace, other: numbers(stats.vocabulary(trace, n_permutations=0), "vocabulary"),
        "divergence of domains": lambda trace, other: off_diagonal(stats.divergence(trace, **options)),
        "signature of domains": of(stats.signature, "similarity", by="domain"),
        "flips": of_pair(stats.flips, "flips"),
        "flips of tokens": of_pair(stats.flips, "token_flips", "token_lower", "token_upper"),
        "saturation": of_pair(stats.saturation, "saturation"),
        "load shift": of_pair(stats.compare, "load_shift", "load_shift_lower", "load_shift_upper"),
        "divergence of runs": of_pair(stats.divergence, "jensen_shannon", by=None),
    }


def off_diagonal(result: xr.Dataset) -> Numbers:
    """The divergence of the first domain from the second."""
    return numbers(result.isel(domain=[0], other_domain=[1]), "jensen_shannon")


def simulate(name: str, n_documents: int, seeds: Sequence[int], n_resamples: int) -> list[Numbers]:
    """Estimates and bounds from as many sets of documents as there are seeds."""
    estimator = estimators({"n_resamples": n_resamples})[name]
    router = PlantedRouter()
    return [estimator(*router.draw(seed, n_documents)) for seed in seeds]


def truth(name: str) -> np.ndarray:
    """The value on a very large set of documents; its own error is a fourteenth of that of 200 documents."""
    return estimators({"n_resamples": 2})[name](*PlantedRouter().draw(0, TRUTH_DOCUMENTS))[0]


def summarize(true: np.ndarray, simulated: Sequence[Numbers]) -> dict[str, float]:
    """Coverage of the intervals that are given, share of those withheld, and bias of the estimate over its spread."""
    estimate, lower, upper = (np.stack(part) for part in zip(*simulated, strict=True))
    given = ~np.isnan(lower)
    holds = (lower <= true) & (true <= upper)
    spread = np.nanstd(estimate, axis=0)
    return {
        "coverage": float(holds[given].mean()) if given.any() else float("nan"),
        "least_coverage": float(least_coverage(holds, given)),
        "withheld": float(1 - given.mean()),
        "bias": float(np.abs(np.nanmean(estimate, axis=0) - true).max()),
        "bias_over_spread": float((np.abs(np.nanmean(estimate, axis=0) - true) / spread).max()),
    }


def least_coverage(holds: np.ndarray, given: np.ndarray) -> float:
    """The least coverage of any one number, of those whose interval is given in at least half of the simulations."""
    often = given.mean(axis=0) >= 0.5
    if not often.any():
        return float("nan")
    return float(((holds & given).sum(axis=0)[often] / given.sum(axis=0)[often]).min())


def jobs(names: Sequence[str], sizes: Sequence[int], simulations: int) -> Iterator[tuple[str, int, range]]:
    for name in names:
        for n_documents in sizes:
            yield name, n_documents, range(1, simulations + 1)


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of statistics, such as load")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args()
    names = options.only or list(estimators({}))

    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names}
    with ProcessPoolExecutor(options.workers) as pool:
        truths = dict(zip(names, pool.map(truth, names), strict=True))
        pending = [
            (name, size, pool.submit(simulate, name, size, list(seeds), options.resamples))
            for name, size, seeds in jobs(names, N_DOCUMENTS, options.simulations)
        ]
        for name, size, future in track(pending, description="simulations"):
            results[name][size] = summarize(truths[name], future.result())
    table = Table("statistic", *(f"{size} documents" for size in N_DOCUMENTS), "bias / spread at 200")
    table.title = f"coverage of 95 % intervals (least of any number; withheld), {options.simulations:,} simulations"
    for name, by_size in results.items():
        cells = [
            f"{row['coverage']:.1%} ({row['least_coverage']:.1%}; {row['withheld']:.0%})" for row in by_size.values()
        ]
        table.add_row(name, *cells, f"{by_size[N_DOCUMENTS[-1]]['bias_over_spread']:.2f}")
    Console(width=150).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
