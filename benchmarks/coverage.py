"""How often the 95 % intervals hold the truth: ``python -m benchmarks.coverage``.

A planted router with a known truth: documents of unequal length that each prefer experts of their own, two domains, an
expert that depends on the token, on the token before and on the layer before. Every statistic is estimated from many
independent sets of documents and its interval compared with the value on a very large set. "token by token" is the
textbook interval that takes tokens for independent.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
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


def of_paths(trace: xr.DataTree, n_resamples: int) -> Numbers:
    """Share of every path, at its place in a table of all paths."""
    result = routing_stats.paths(trace, n=len(LOADS) ** len(LAYERS), n_resamples=n_resamples)
    place = np.ravel_multi_index(tuple(result["expert"].values.T), (len(LOADS),) * len(LAYERS))
    table = np.full((3, len(LOADS) ** len(LAYERS)), np.nan)
    table[0] = 0
    table[:, place] = numbers(result, "share")
    return table[0], table[1], table[2]


def estimates(trace: xr.DataTree, other: xr.DataTree, n_resamples: int) -> dict[str, Numbers]:
    """Every number that comes with an interval."""
    stats, options = routing_stats, {"n_resamples": n_resamples}
    result = {
        "load, token by token": token_by_token(trace),
        "load": numbers(stats.load_interval(trace, **options), "load"),
        "load by domain": numbers(stats.load_interval(trace, by="domain", **options), "load"),
    }
    specialization = stats.specialization(trace, n_permutations=0, **options)
    result["lift by domain"] = numbers(specialization, "lift", "lift_lower", "lift_upper")
    imbalance = stats.imbalance(trace, **options)
    for name in ("max_violation", "coefficient_of_variation", "gini", "normalized_entropy"):
        result[name.replace("_", " ")] = numbers(imbalance, name, f"{name}_lower", f"{name}_upper")
    margin = stats.margin(trace, **options)
    flips, compared = stats.flips(trace, other, **options), stats.compare(trace, other, **options)
    of_domains = stats.divergence(trace, **options).isel(domain=[0], other_domain=[1])
    return result | {
        "balance loss": numbers(stats.balance_loss(trace, **options), "balance_loss"),
        "z-loss": numbers(stats.z_loss(trace, **options), "z_loss"),
        "quantiles of the margin": numbers(margin, "margin", "margin_lower", "margin_upper"),
        "repetition": numbers(stats.repetition(trace, **options), "repetition"),
        "share of a path": of_paths(trace, n_resamples),
        "imbalance of four devices": numbers(stats.device_load(trace, devices=4, **options), "imbalance"),
        "distinct experts": numbers(stats.distinct_experts(trace, batch_sizes=(4, 16), **options), "distinct"),
        "vocabulary": numbers(stats.vocabulary(trace, n_permutations=0), "vocabulary"),
        "divergence of domains": numbers(of_domains, "jensen_shannon"),
        "signature of domains": numbers(stats.signature(trace, by="domain", **options), "signature"),
        "flips": numbers(flips, "flips"),
        "tokens with a flip": numbers(flips, "token_flips", "token_lower", "token_upper"),
        "saturation": numbers(stats.saturation(trace, other, **options), "saturation"),
        "load shift": numbers(compared, "load_shift", "load_shift_lower", "load_shift_upper"),
        "divergence of runs": numbers(compared, "divergence", "divergence_lower", "divergence_upper"),
    }


OF_ITS_OWN_MEAN = ("vocabulary",)
"""Biased by definition with few occurrences of a token: its bounds are for the mean estimate at the same size."""


def simulate(n_documents: int, seeds: Sequence[int], n_resamples: int) -> list[dict[str, Numbers]]:
    """Estimates and bounds from as many sets of documents as there are seeds."""
    router = PlantedRouter()
    return [estimates(*router.draw(seed, n_documents), n_resamples) for seed in seeds]


def summarize(true: np.ndarray | None, simulated: Sequence[Numbers]) -> dict[str, float]:
    """Coverage of the intervals that are given, share of those withheld, and bias of the estimate over its spread.

    Where no truth is given, it is the mean estimate.
    """
    estimate, lower, upper = (np.stack(part) for part in zip(*simulated, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a number that is never defined
        mean, spread = np.nanmean(estimate, axis=0), np.nanstd(estimate, axis=0)
    true = mean if true is None else true
    given = ~np.isnan(lower)
    holds = (lower <= true) & (true <= upper)
    often = given.mean(axis=0) >= 0.5
    each = np.divide((holds & given).sum(axis=0), given.sum(axis=0), out=np.full(often.shape, np.nan), where=often)
    return {
        "coverage": float(holds[given].mean()) if given.any() else float("nan"),
        "least_coverage": float(np.nanmin(each)) if often.any() else float("nan"),
        "withheld": float(1 - given.mean()),
        "bias_over_spread": float(np.nanmedian(np.abs(mean - true) / np.where(spread > 0, spread, np.nan))),
    }


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    options = parser.parse_args()

    seeds = np.arange(1, options.simulations + 1)
    parts = np.array_split(seeds, max(options.simulations // 20, 1))
    simulated: dict[int, list[dict[str, Numbers]]] = {size: [] for size in N_DOCUMENTS}
    with ProcessPoolExecutor(options.workers) as pool:
        truth = pool.submit(simulate, TRUTH_DOCUMENTS, [0], 2)
        jobs = [
            (size, pool.submit(simulate, size, part.tolist(), options.resamples))
            for size in N_DOCUMENTS
            for part in parts
        ]
        for size, job in track(jobs, description="simulations"):
            simulated[size] += job.result()
        (true,) = truth.result()
    results = {
        name: {
            size: summarize(
                None if name in OF_ITS_OWN_MEAN else true[name][0], [estimate[name] for estimate in simulated[size]]
            )
            for size in N_DOCUMENTS
        }
        for name in true
    }
    show(results, options.simulations)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def show(results: Mapping[str, Mapping[int, Mapping[str, float]]], n_simulations: int) -> None:
    """A table of the coverage for each number of documents."""
    title = f"coverage of 95 % intervals (of the worst number; share withheld), {n_simulations:,} simulations"
    table = Table("statistic", *(f"{size} documents" for size in N_DOCUMENTS), "bias / spread, 200", title=title)
    for name, by_size in results.items():
        cells = [
            f"{row['coverage']:.1%} ({row['least_coverage']:.1%}; {row['withheld']:.0%})" for row in by_size.values()
        ]
        table.add_row(name, *cells, f"{by_size[N_DOCUMENTS[-1]]['bias_over_spread']:.2f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
