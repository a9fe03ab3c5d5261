"""Routing statistics of a store of 10⁸ decisions: time against one ``numpy.bincount``, and peak memory.

``python -m benchmarks.statistics``. The baseline is one pass of ``numpy.bincount`` over the same ids, uint8 and in
memory: the least that any count of them can cost. The statistics read the store, which lies on disk. "what the report
shows" is every statistic of the report one after the other, without the permutations behind its p-values and nulls;
they are listed with their times. Peak memory is that of a fresh process that opens the store and computes them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

import probe
from benchmarks.interleaved import print_ratios, seconds
from benchmarks.planted import planted_recording
from probe import routing_stats as stats
from probe.report import compute


def report(recording: xr.DataTree) -> dict[str, float]:
    """Seconds of each statistic of the report."""
    names: list[str] = []
    times: list[float] = []

    def step(name: str) -> None:
        names.append(name)
        times.append(time.perf_counter())

    compute(recording, permutations=False, step=step)
    times.append(time.perf_counter())
    return dict(zip(names, np.diff(times).tolist(), strict=True))


def peak_of_report(path: str) -> None:
    """Print the seconds of each statistic and the peak memory of this process, in bytes, as JSON."""
    taken = report(probe.open(path))
    # Not getrusage: what a process that was started from a large one reports begins with the size of that one.
    (peak,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(json.dumps({"seconds": taken, "peak": 1024 * int(peak)}))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decisions", type=int, default=100_000_000)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peak-of", metavar="STORE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        peak_of_report(options.peak_of)
        return

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.zarr")
        n_tokens = options.decisions // options.layers
        probe.save(planted_recording(n_tokens=n_tokens, n_layers=options.layers, n_experts=options.experts), path)
        command = [sys.executable, "-m", "benchmarks.statistics", "--peak-of", str(path)]
        once = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

        recording = probe.open(path)
        ids = recording["routing"]["expert_index"].values
        functions = {
            # The first one after other work waits for 800 MB of pages, the second and third do not.
            "numpy.bincount after other work": lambda: np.bincount(ids.ravel()),
            "numpy.bincount of the ids in memory": lambda: np.bincount(ids.ravel()),
            "numpy.bincount, again": lambda: np.bincount(ids.ravel()),
            "expert_load": lambda: stats.expert_load(recording),
            "load_interval": lambda: stats.load_interval(recording),
            "what the report shows": lambda: report(recording),
        }
        taken = seconds(functions, rounds=options.rounds, warmup=1)
    title = (
        f"{n_tokens * options.layers:,} decisions, {options.layers} layers of {options.experts} experts, "
        f"{options.rounds} rounds"
    )
    print_ratios(taken, baseline="numpy.bincount of the ids in memory", title=title)
    for name, values in once["seconds"].items():
        print(f"{name:35s} {values:6.2f} s")
    print(f"expert_load: {ids.size / np.median(taken['expert_load']):,.0f} decisions a second")
    print(f"peak memory of a process with all of the above: {once['peak'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
