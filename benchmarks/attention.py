"""What recording attention costs: ``python -m benchmarks.attention [--tokens N] [--rounds R]``.

Four parts, each for one length of text, float32, 4 heads of 32, chunks of 8,192, random weights:

* the attention module of a NoPE and of a RoPE layer, bare and recorded, with all queries and with 1,024 of them;
* how far sampled means lie from the exact ones, over 200 seeds;
* peak memory of ``probe.record`` above the model, in a process of its own (``--memory``);
* ``probe.record`` beside transformers' eager attention and TransformerLens, each until it runs out (``--peers``).

The bare RoPE module runs under a chunk as long as the text, because transformers' mask does not fit beyond.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Llama4ForCausalLM, Llama4TextConfig

import probe
from benchmarks.interleaved import print_ratios, seconds
from probe import attention_maps
from probe.attention_interface import AttentionSpan, attention_span, watch_attention
from probe.attention_recording import AttentionRecord, AttentionSpec

CHUNK_SIZE = 8192
SAMPLED = 1024
SEEDS = 200
PEER_GIB = 16
"""Address space that a peer may take."""

PEERS = ("bare", "probe", "probe, 1,024 queries", "eager", "TransformerLens")


def model(chunk_size: int = CHUNK_SIZE) -> Llama4ForCausalLM:
    """Three RoPE layers and a NoPE layer, with few and small experts."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_local_experts=2,
        attention_chunk_size=chunk_size,
        floor_scale=chunk_size,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # Wide enough that heads look at some keys more than at others.
        initializer_range=0.1,
    )
    built = Llama4ForCausalLM(config).eval()
    probe.set_expert_dispatch(built, "sparse")
    return built


def token_ids(n_tokens: int) -> Tensor:
    """Random ids (1, n_tokens)."""
    return torch.randint(3, 256, (1, n_tokens), generator=torch.Generator().manual_seed(0))


def module_forward(layer: int, n_tokens: int, spec: AttentionSpec | None, *, bare: bool) -> Callable[[], object]:
    """One call of a layer's attention module on random states; ``bare`` as transformers runs it."""
    built = model(n_tokens + 1 if bare else CHUNK_SIZE)
    decoder = built.model
    module = decoder.layers[layer].self_attn
    hidden = torch.randn(1, n_tokens, 128, generator=torch.Generator().manual_seed(1))
    position = torch.arange(n_tokens)[None]
    rotary = decoder.rotary_emb(hidden, position)
    masks = spans(n_tokens)

    def forward() -> object:
        with torch.inference_mode():
            if bare:
                return module(hidden, rotary, None)
            record = AttentionRecord(spec, decoder) if spec is not None else None
            watch = watch_attention(decoder, record.observers() if record is not None else {})
            try:
                if record is not None:
                    record.begin(torch.ones(1, n_tokens, dtype=torch.bool), np.array([0]), [0])
                output = module(hidden, rotary, masks[decoder.config.layer_types[layer]])
                if record is not None:
                    record.end()
                return output
            finally:
                watch.remove()

    return forward


def spans(n_tokens: int) -> dict[str, AttentionSpan]:
    """What stands in for the masks of a forward without padding or cache."""
    lengths = {"batch_size": 1, "q_length": n_tokens, "kv_length": n_tokens}
    return {
        "full_attention": attention_span(**lengths),
        "chunked_attention": attention_span(**lengths, local_size=CHUNK_SIZE),
    }


LAYERS = {"NoPE": 3, "RoPE": 0}


def time_modules(n_tokens: int, rounds: int, kinds: list[str]) -> None:
    """Ratios of recorded to bare attention modules."""
    for kind in kinds:
        layer = LAYERS[kind]
        everything = AttentionSpec("all", layers=[layer])
        named = AttentionSpec("all", layers=[layer], segments={"begin": (0, 10), "needle": (500, 520)}, offsets=[100])
        sampled = AttentionSpec("all", layers=[layer], queries=SAMPLED)
        functions = {
            f"{kind} module, transformers' sdpa": module_forward(layer, n_tokens, None, bare=True),
            "the same again": module_forward(layer, n_tokens, None, bare=True),
            "probe's attention, not recorded": module_forward(layer, n_tokens, None, bare=False),
            "all queries": module_forward(layer, n_tokens, everything, bare=False),
            "all queries, two segments and an offset": module_forward(layer, n_tokens, named, bare=False),
            f"{SAMPLED:,} queries": module_forward(layer, n_tokens, sampled, bare=False),
        }
        # What runs for minutes needs no warm-up.
        taken = seconds(functions, rounds=rounds, warmup=1 if n_tokens <= 65_536 else 0)
        title = f"{kind} attention module, {n_tokens:,} tokens, {machine()}, {rounds} rounds"
        print_ratios(taken, baseline=next(iter(functions)), title=title)


def machine() -> str:
    """Threads and cores, for a title."""
    return f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"


def compare_sampled(n_tokens: int) -> None:
    """How often the 95 % interval of a sampled mean holds the exact mean, and how far off it is at worst."""
    trace = probe.record(model(), token_ids(n_tokens), attention=AttentionSpec("all"), progress=False)
    whole = trace["attention"].to_dataset()
    table = Table("statistic", "stated", "inside the 95 % interval", "largest |error| / standard error", title=(
        f"means of {SAMPLED:,} sampled queries of {n_tokens:,}, {SEEDS} seeds, all layers and heads"
    ))  # fmt: skip
    names = ("entropy", "sink_mass", "self_mass", "previous_mass", "chunk_mass", "far_mass", "mean_distance")
    estimates = [
        {name: attention_maps.query_mean(sample_rows(whole, seed), name, n_tokens=[n_tokens]) for name in names}
        for seed in range(SEEDS)
    ]
    for name in names:
        exact = whole[name].mean("query", skipna=True, dtype=np.float64)
        varies = (
            whole[name].std("query", dtype=np.float64) > 1e-6
        )  # the chunk mass of a RoPE layer is 1, but for rounding
        own = xr.concat([estimate[name].isel(sample=0) for estimate in estimates], "seed").where(varies)
        stated = own["lower"].notnull().where(varies)
        held = ((own["lower"] <= exact) & (exact <= own["upper"])).where(stated == 1)
        furthest = np.abs((own["mean"] - exact) / own["standard_error"]).max()
        table.add_row(
            name, *(f"{100 * float(share.mean()):.1f} %" for share in (stated, held)), f"{float(furthest):.2f}"
        )
    Console(width=110).print(table)


def sample_rows(whole: xr.Dataset, seed: int) -> xr.Dataset:
    """The rows of a recording with all queries that one of ``SAMPLED`` queries has."""
    n_tokens = whole.sizes["query"]
    chosen = np.sort(np.random.default_rng([seed, 0, 0]).choice(n_tokens, SAMPLED, replace=False))
    return whole.isel(query=chosen)


def peak_gib() -> float:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def run_peer(peer: str, n_tokens: int) -> None:
    """One forward of one peer in this process; prints seconds and GiB above the model."""
    import resource

    limit = PEER_GIB << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    built, ids = model(), token_ids(n_tokens)
    run = peer_function(peer, built, ids)
    before, start = peak_gib(), time.perf_counter()
    with torch.inference_mode():
        run()
    print(f"{time.perf_counter() - start:.1f} {peak_gib() - before:.2f}")


def peer_function(peer: str, built: Llama4ForCausalLM, ids: Tensor) -> Callable[[], object]:
    """What a peer runs to see the attention of every layer."""
    if peer == "probe":
        return lambda: probe.record(built, ids, attention=AttentionSpec("all"), progress=False)
    if peer.startswith("probe"):
        spec = AttentionSpec("all", queries=SAMPLED)
        return lambda: probe.record(built, ids, attention=spec, progress=False)
    if peer == "bare":
        return lambda: built.model(ids, use_cache=False)
    if peer == "eager":
        built.set_attn_implementation("eager")
        return lambda: built.model(ids, use_cache=False, output_attentions=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        "meta-llama/Llama-4-Scout-17B-16E", hf_model=built, tokenizer=probe.load("tiny-scout").tokenizer
    )
    return lambda: bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"))


def compare_peers(lengths: list[int], peers: tuple[str, ...]) -> None:
    """Seconds and peak memory of each peer at each length, until it runs out."""
    table = Table("tokens", *peers, title=f"whole forward of 4 layers: seconds, GiB above the model ({machine()})")
    for n_tokens in lengths:
        cells = []
        for peer in peers:
            command = [sys.executable, "-m", "benchmarks.attention", "--peer", peer, "--tokens", str(n_tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            words = done.stdout.split()
            cells.append(f"{words[-2]} s, {words[-1]}" if done.returncode == 0 else f"over {PEER_GIB} GiB")
        table.add_row(f"{n_tokens:,}", *cells)
    Console(width=130).print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--memory", action="store_true", help="peak memory of probe.record only")
    parser.add_argument("--peers", action="store_true", help="probe beside eager attention and TransformerLens only")
    parser.add_argument("--sampled", action="store_true", help="accuracy of sampled means only")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        run_peer(options.peer, options.tokens[0])
    elif options.memory:
        compare_peers(options.tokens, ("bare", "probe", "probe, 1,024 queries"))
    elif options.peers:
        compare_peers(options.tokens, PEERS)
    elif options.sampled:
        compare_sampled(options.tokens[0])
    else:
        for n_tokens in options.tokens:
            time_modules(n_tokens, options.rounds, options.kinds)


if __name__ == "__main__":
    main()
