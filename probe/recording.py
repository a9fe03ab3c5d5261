"""From flat numpy arrays to the DataTree of a recording; no model and no tensor in sight.

Whatever records (hooks, a back end, a test with a planted truth) hands its rows to :func:`build`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probe import schema
from probe.counting import count
from probe.schema import ProbeError


class RecordingError(ProbeError):
    """Nothing, or not everything, was recorded, or it was asked for in a way that cannot be right."""


@dataclass(frozen=True)
class Sample:
    """One text of a recording: its name, domain, the SHA-256 of what was recorded and how many tokens were cut off."""

    name: str
    domain: str = schema.NO_DOMAIN
    text_sha256: str = ""
    n_cut: int = 0


@dataclass(frozen=True)
class Layout:
    """What the rows of a recording refer to.

    ``layers`` are the decoder's own indices of its MoE layers; ``rope`` says of each whether its attention is rotary.
    """

    layers: Sequence[int]
    rope: Sequence[bool]
    n_experts: int
    top_k: int


@dataclass(frozen=True)
class AttentionArrays:
    """What was recorded of attention.

    ``rows`` are variables of ``/attention`` along ``query``, sorted by ``sample`` and ``position``, these two among
    them; ``profiles`` variables of ``/attention_profiles``, ``sample_id`` among them. ``layers`` are decoder layers,
    ``rope`` says of each whether its attention is rotary. ``attributes`` are ``schema.ATTENTION_ATTRIBUTES``.
    """

    rows: Mapping[str, np.ndarray]
    profiles: Mapping[str, np.ndarray]
    layers: Sequence[int]
    rope: Sequence[bool]
    n_heads: int
    segments: Sequence[str]
    offsets: Sequence[int]
    attributes: Mapping[str, Any]


def build(
    rows: Mapping[str, np.ndarray],
    *,
    samples: Sequence[Sample],
    probability_sum: np.ndarray,
    layout: Layout,
    pieces: Mapping[int, bytes],
    attributes: Mapping[str, Any],
    experts: Mapping[str, np.ndarray] | None = None,
    attention: AttentionArrays | None = None,
) -> xr.DataTree:
    """Assemble a recording.

    Parameters
    ----------
    rows : variables of ``/routing`` along ``token``, sorted by ``sample`` and, within it, by ``position``; coords
        ``sample``, ``position``, ``token_id``, ``modality`` and ``phase`` among them.
    samples : one entry for every value of ``rows["sample"]``; a sample may have no rows.
    probability_sum : (sample, layer, expert), softmax of the raw logits summed over a sample's tokens.
    layout : layers, experts and slots that the rows refer to.
    pieces : bytes of every token id that occurs.
    attributes : root attributes; see ``schema.ROOT_ATTRIBUTES``.
    experts : variables of ``/experts``, (sample, layer, expert), for a recording that has this group. ``output_max`` is
        NaN in the recording wherever a sample sent an expert no token, whatever stands there.
    attention : for a recording that has ``/attention`` and ``/attention_profiles``.
    """
    n_tokens = np.bincount(rows["sample"], minlength=len(samples)).astype(np.int64)
    layer_coords = _layer_coords(layout.layers, layout.rope)
    expert_coord = {"expert": np.arange(layout.n_experts)}
    sample_coord = {"sample": np.arange(len(samples))}
    domains = list(dict.fromkeys(sample.domain for sample in samples))
    domain_code = np.array([domains.index(sample.domain) for sample in samples], schema.code_dtype(len(domains)))
    routing = schema.dataset(
        "routing",
        {**rows, "domain": domain_code[rows["sample"]], **layer_coords, **expert_coord},
        categories=LAYER_CATEGORIES | {"domain": domains, "modality": schema.MODALITIES, "phase": schema.PHASES},
    )
    queries = {}
    if attention is not None:
        queries["n_queries"] = np.bincount(attention.rows["sample"], minlength=len(samples))
    sample_table = schema.dataset(
        "samples",
        {
            "name": [sample.name for sample in samples],
            "domain": [sample.domain for sample in samples],
            "n_tokens": n_tokens,
            "n_cut": [sample.n_cut for sample in samples],
            "row_offset": np.concatenate([[0], np.cumsum(n_tokens)])[:-1],
            "text_sha256": [sample.text_sha256 for sample in samples],
            "expert_count": count(
                rows["expert_index"], rows["sample"], n_codes=len(samples), n_values=layout.n_experts
            ),
            "probability_sum": probability_sum,
            **queries,
            **sample_coord,
            **layer_coords,
            **expert_coord,
        },
        categories=LAYER_CATEGORIES,
    )
    vocabulary = schema.dataset(
        "vocabulary",
        {
            "token_id": np.array(sorted(pieces), np.uint32),
            "piece": [pieces[token_id].decode("latin-1") for token_id in sorted(pieces)],
        },
    )
    groups = {
        "/": xr.Dataset(attrs=dict(attributes)),
        "/routing": routing,
        "/samples": sample_table,
        "/vocabulary": vocabulary,
    }
    if experts is not None:
        output_max = np.where(sample_table["expert_count"].values > 0, experts["output_max"], np.nan)
        groups["/experts"] = schema.dataset(
            "experts",
            {**experts, "output_max": output_max, **sample_coord, **layer_coords, **expert_coord},
            categories=LAYER_CATEGORIES,
        )
    if attention is not None:
        groups["/attention"] = _attention(attention, rows, domain_code, domains)
        groups["/attention_profiles"] = _profiles(attention, domain_code, domains)
    return xr.DataTree.from_dict(groups)


LAYER_CATEGORIES = {"attention_kind": schema.ATTENTION_KINDS}


def _layer_coords(layers: Sequence[int], rope: Sequence[bool]) -> dict[str, np.ndarray]:
    kinds = [schema.ATTENTION_KINDS.index("rope" if is_rope else "nope") for is_rope in rope]
    return {"layer": np.asarray(layers, np.int64), "attention_kind": np.array(kinds, np.uint8)}


def _attention(
    attention: AttentionArrays, rows: Mapping[str, np.ndarray], domain_code: np.ndarray, domains: Sequence[str]
) -> xr.Dataset:
    """``/attention``; what a query's token is stands in the rows of ``/routing``."""
    own = attention.rows
    # Both are sorted by sample and position, so that one number orders them.
    place = np.uint64(2**32) * rows["sample"] + rows["position"]
    found = np.searchsorted(
        place, np.uint64(2**32) * own["sample"].astype(np.uint64) + own["position"].astype(np.uint64)
    )
    shared = {name: rows[name][found] for name in ("token_id", "phase", "next_token_loss") if name in rows}
    coords: dict[str, Any] = {"domain": domain_code[own["sample"]], "head": np.arange(attention.n_heads)}
    if attention.segments:
        coords["segment"] = attention.segments
    if attention.offsets:
        coords["offset"] = attention.offsets
    group = schema.dataset(
        "attention",
        {**own, **shared, **coords, **_layer_coords(attention.layers, attention.rope)},
        categories=LAYER_CATEGORIES | {"domain": domains, "phase": schema.PHASES},
    )
    return group.assign_attrs(attention.attributes)


def _profiles(attention: AttentionArrays, domain_code: np.ndarray, domains: Sequence[str]) -> xr.Dataset:
    """``/attention_profiles``."""
    coords = {"domain": domain_code[attention.profiles["sample_id"]], "head": np.arange(attention.n_heads)}
    group = schema.dataset(
        "attention_profiles",
        {**attention.profiles, **coords, **_layer_coords(attention.layers, attention.rope)},
        categories=LAYER_CATEGORIES | {"domain": domains},
    )
    return group.assign_attrs(attention.attributes)
