"""The data model: every group of a recording, with its dims, dtypes, units and meaning.

A recording is an ``xarray.DataTree`` whose groups are self-contained Datasets. This page is the only place that says
what is in them: recorders build with :func:`dataset`, stores and statistics check with :func:`validate` and
:func:`group`.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from probe.counting import count

SCHEMA_VERSION = 1

ROWS_AT_ONCE = 1 << 20
"""Rows of ``/routing`` that :func:`validate` reads at once."""

NO_DOMAIN = "(none)"
"""What stands in ``domain`` where a text was given none."""

PHASES = ("prefill", "decode")
MODALITIES = ("text", "image patch", "image structure")
ATTENTION_KINDS = ("rope", "nope")


class ProbeError(Exception):
    """Base of every error that probe raises on purpose: it names the thing and says what to do."""


class SchemaError(ProbeError):
    """A recording does not look as this module says that it must."""


@dataclass(frozen=True)
class Variable:
    """One variable or coord of a group.

    ``dtypes`` lists what is accepted, the first being what probe writes; ``"str"`` is variable-length text.
    """

    dims: tuple[str, ...]
    dtypes: tuple[str, ...]
    long_name: str
    units: str = "1"
    coord: bool = False
    required: bool = True


EXPERT_ID = ("uint8", "uint16")
CODE = ("uint8", "uint16", "uint32")

ROUTING = {
    "expert_index": Variable(("token", "layer", "slot"), EXPERT_ID, "chosen expert, strongest first"),
    "router_logit": Variable(("token", "layer", "slot"), ("float16",), "raw logit of the chosen expert", "logit"),
    "runner_up_index": Variable(("token", "layer"), EXPERT_ID, "best expert that was not chosen", required=False),
    "router_margin": Variable(("token", "layer"), ("float16",), "weakest chosen minus best not chosen logit", "logit"),
    "logit_logsumexp": Variable(("token", "layer"), ("float32",), "log-sum-exp of all raw logits", "logit"),
    "all_logits": Variable(
        ("token", "layer", "expert"), ("float16",), "raw logit of every expert", "logit", required=False
    ),
    "next_token_loss": Variable(("token",), ("float32",), "cross entropy of the next token", "nat", required=False),
    "predicted_id": Variable(("token",), ("uint32",), "most likely next token", required=False),
    "sample": Variable(("token",), ("uint32",), "index into /samples", coord=True),
    "position": Variable(("token",), ("uint32",), "position in the sample, from 0", coord=True),
    "token_id": Variable(("token",), ("uint32",), "id in the tokenizer's vocabulary", coord=True),
    "domain": Variable(("token",), CODE, "domain of the sample", coord=True),
    "role": Variable(("token",), CODE, "role in a chat", coord=True, required=False),
    "modality": Variable(("token",), CODE, "kind of token", coord=True),
    "phase": Variable(("token",), CODE, "prefill or decode", coord=True),
    "layer": Variable(("layer",), ("int64",), "decoder layer, dense layers included in the count", coord=True),
    "attention_kind": Variable(("layer",), CODE, "rotary (rope) or no (nope) position in attention", coord=True),
    "expert": Variable(("expert",), ("int64",), "expert", coord=True),
}

SAMPLES = {
    "name": Variable(("sample",), ("str",), "name of the sample"),
    "domain": Variable(("sample",), ("str",), "domain of the sample"),
    "n_tokens": Variable(("sample",), ("uint32",), "recorded tokens", "token"),
    "n_cut": Variable(("sample",), ("uint32",), "tokens over the limit, not recorded", "token"),
    "n_queries": Variable(("sample",), ("uint32",), "recorded queries in /attention", "token", required=False),
    "row_offset": Variable(("sample",), ("uint64",), "first row in /routing", "token"),
    "text_sha256": Variable(
        ("sample",), ("str",), "SHA-256 of the text in UTF-8, or of the token ids as little-endian u4"
    ),
    "expert_count": Variable(("sample", "layer", "expert"), ("uint32",), "assignments to the expert"),
    "probability_sum": Variable(
        ("sample", "layer", "expert"), ("float32",), "sum over tokens of the softmax of the raw logits"
    ),
    "sample": Variable(("sample",), ("int64",), "sample", coord=True),
    "layer": ROUTING["layer"],
    "attention_kind": ROUTING["attention_kind"],
    "expert": ROUTING["expert"],
}

EXPERTS = {
    "saliency_sum": Variable(
        ("sample", "layer", "expert"), ("float32",), "sum over the expert's tokens of the L2 norm of its contribution"
    ),
    "output_norm_sum": Variable(
        ("sample", "layer", "expert"), ("float32",), "sum over the expert's tokens of the L2 norm of its output"
    ),
    "output_max": Variable(
        ("sample", "layer", "expert"), ("float32",), "largest absolute value in the expert's output, over its tokens"
    ),
    "sample": SAMPLES["sample"],
    "layer": ROUTING["layer"],
    "attention_kind": ROUTING["attention_kind"],
    "expert": ROUTING["expert"],
}
"""Routed experts only, never the shared one. The output is what ``down_proj`` returns, before it is added to the rest.

Llama 4's gate scales an expert's input, so that what an expert contributes is its output, E(g·x), and the two sums are
equal. Where a gate scales the output instead the contribution is g·E(x), and they differ. The sums are 0 and
``output_max`` is NaN where a sample sent the expert no token.
"""

_PER_HEAD = ("query", "layer", "head")


def _mass(where: str) -> Variable:
    return Variable(_PER_HEAD, ("float32",), f"attention mass on {where}", required=False)


ATTENTION = {
    "entropy": Variable(_PER_HEAD, ("float32",), "entropy of the attention over visible keys", "nat", required=False),
    "sink_mass": _mass("the sample's first token"),
    "self_mass": _mass("the query's own token"),
    "previous_mass": _mass("the token before the query"),
    "chunk_mass": _mass("keys in the query's own chunk"),
    "far_mass": _mass("keys before the query's own chunk"),
    "mean_distance": Variable(
        _PER_HEAD, ("float32",), "mean distance to the keys attended to", "token", required=False
    ),
    "segment_mass": Variable((*_PER_HEAD, "segment"), ("float32",), "attention mass on the segment", required=False),
    "key_rank": Variable(
        (*_PER_HEAD, "segment"), ("float32",), "visible keys heavier than every key of the segment", required=False
    ),
    "offset_mass": Variable((*_PER_HEAD, "offset"), ("float32",), "weight of the key so far back", required=False),
    "top_key": Variable((*_PER_HEAD, "slot"), ("float32",), "position of the heaviest keys", required=False),
    "top_weight": Variable((*_PER_HEAD, "slot"), ("float32",), "weight of the heaviest keys", required=False),
    "next_token_loss": Variable(("query",), ("float32",), "cross entropy of the next token", "nat", required=False),
    "sample": Variable(("query",), ("uint32",), "index into /samples", coord=True),
    "position": Variable(("query",), ("uint32",), "position in the sample, from 0", coord=True),
    "token_id": Variable(("query",), ("uint32",), "id in the tokenizer's vocabulary", coord=True),
    "domain": Variable(("query",), CODE, "domain of the sample", coord=True),
    "phase": Variable(("query",), CODE, "prefill or decode", coord=True),
    "layer": ROUTING["layer"],
    "attention_kind": ROUTING["attention_kind"],
    "head": Variable(("head",), ("int64",), "attention head", coord=True),
    "segment": Variable(("segment",), ("str",), "named stretch of the sample", coord=True, required=False),
    "offset": Variable(("offset",), ("int64",), "distance from query back to key", "token", coord=True, required=False),
}
"""One row for each recorded query, every layer that was asked for, dense or not; see :data:`ATTENTION_ATTRIBUTES`.

A key that is in the sample but hidden from the query (another chunk, or later) has weight 0. NaN is what does not
exist: ``previous_mass`` and ``offset_mass`` where the sample has no key so far back, ``key_rank`` where no key of the
segment is visible, ``top_key`` where fewer keys are visible than there are slots.
"""

_PER_PROFILE = ("profile", "layer", "head")
_MAP = (*_PER_PROFILE, "query_bin", "key_bin")

ATTENTION_PROFILES = {
    "distance_mass": Variable(
        (*_PER_PROFILE, "distance_bin"), ("float32",), "mean attention mass by distance", required=False
    ),
    "distance_error": Variable(
        (*_PER_PROFILE, "distance_bin"),
        ("float32",),
        "standard error of distance_mass from recording only some of the queries",
        required=False,
    ),
    "received_mass": Variable(
        (*_PER_PROFILE, "key_bin"), ("float32",), "mean attention mass by the key's place", required=False
    ),
    "map_max": Variable(_MAP, ("float32",), "largest weight in the cell", required=False),
    "map_sum": Variable(_MAP, ("float32",), "sum of the weights in the cell", required=False),
    "pattern": Variable(
        (*_PER_PROFILE, "query_position", "key_position"), ("float32",), "attention weight", required=False
    ),
    "n_tokens": Variable(("profile",), ("uint32",), "tokens of the sample", "token"),
    "n_queries": Variable(("profile",), ("uint32",), "recorded queries of the sample", "token"),
    "bin_width": Variable(("profile",), ("uint32",), "tokens in one query_bin or key_bin", "token", required=False),
    "sample_id": Variable(("profile",), ("uint32",), "index into /samples", coord=True),
    "domain": Variable(("profile",), CODE, "domain of the sample", coord=True),
    "layer": ROUTING["layer"],
    "attention_kind": ROUTING["attention_kind"],
    "head": ATTENTION["head"],
    "distance_bin": Variable(
        ("distance_bin",),
        ("int64",),
        "smallest distance in the bin: 0, 1, 2, 4, …",
        "token",
        coord=True,
        required=False,
    ),
}
"""One profile for each sample that has a recorded query; means are over those queries.

Distance bins hold the distances 0, 1, 2–3, 4–7, …; query and key bins hold ``bin_width`` tokens each, a power of two.
NaN is what the queries cannot see or the sample does not have: map cells without a visible key, bins and positions
beyond its end, distances that no recorded query reaches.
"""

ATTENTION_ATTRIBUTES = ("chunk_size", "queries", "seed")
"""Attributes of both groups: the tokens in one chunk of a RoPE layer; how many queries of each text were asked for, 0
for all; and the seed that drew them."""

VOCABULARY = {
    "token_id": Variable(("entry",), ("uint32",), "id in the tokenizer's vocabulary"),
    "piece": Variable(("entry",), ("str",), "bytes of the token, one character U+0000 to U+00FF for each byte"),
}

_PER_MATRIX = ("recipe", "layer", "module", "expert")
_RECIPE = Variable(("recipe",), ("str",), "recipe, or noise floor", coord=True)
_LAYERS = {
    "layer": ROUTING["layer"],
    "attention_kind": Variable(
        ("layer",), CODE, "rotary (rope) or no (nope) position in attention", coord=True, required=False
    ),
}
_MODULE = Variable(("module",), ("str",), "matrix of a layer", coord=True)

FP8_WEIGHTS = {
    "sqnr": Variable(_PER_MATRIX, ("float32",), "signal to quantisation noise of the weight", "dB"),
    "underflow": Variable(_PER_MATRIX, ("float32",), "share of non-zero weights that became zero"),
    "saturation": Variable(_PER_MATRIX, ("float32",), "share of scaled weights above the format's maximum"),
    "amax": Variable(_PER_MATRIX, ("float32",), "largest absolute weight"),
    "dynamic_range": Variable(_PER_MATRIX, ("float32",), "log2 of largest over smallest non-zero magnitude", "bit"),
    "covered": Variable(("recipe", "layer", "module"), ("bool",), "whether the recipe quantises this matrix"),
    "head_sqnr": Variable(
        ("recipe",), ("float32",), "signal to quantisation noise of the output head's weight", "dB", required=False
    ),
    "head_underflow": Variable(
        ("recipe",), ("float32",), "share of the output head's non-zero weights that became zero", required=False
    ),
    "head_saturation": Variable(
        ("recipe",), ("float32",), "share of the output head's scaled weights above the maximum", required=False
    ),
    "recipe": _RECIPE,
    **_LAYERS,
    "module": _MODULE,
    "expert": ROUTING["expert"],
}
"""Every decoder layer, and every matrix as if the recipe covered it; ``covered`` says whether it does.

A matrix that is one for all experts (attention, router, shared expert, dense MLP) has the same value at each of them. A
matrix that a layer lacks is NaN.
"""

_DRIFT = ("recipe", "layer", "site", "mode")

FP8_DRIFT = {
    "sqnr": Variable(_DRIFT, ("float32",), "norm of the reference over norm of the difference", "dB"),
    "relative_error": Variable(_DRIFT, ("float32",), "norm of the difference over norm of the reference"),
    "cosine": Variable(_DRIFT, ("float32",), "cosine between reference and stream"),
    "logit_kl": Variable(("recipe",), ("float64",), "mean over tokens of KL(reference, stream)", "nat"),
    "top1_agreement": Variable(("recipe",), ("float64",), "share of tokens with the reference's likeliest next token"),
    "loss_change": Variable(("recipe",), ("float64",), "mean next token loss minus the reference's", "nat"),
    "recipe": _RECIPE,
    **_LAYERS,
    "site": Variable(("site",), ("str",), "place in the layer", coord=True),
    "mode": Variable(("mode",), ("str",), "isolated or accumulated", coord=True),
}
"""One row for each recipe, and for the noise floors ``bf16`` and ``fp32``; every decoder layer.

``isolated``: the recipe's own module on the reference's input; ``accumulated``: the module within the whole quantised
model. Where nothing differs ``sqnr`` is infinite. A site that a layer lacks is NaN; what is said of logits is NaN for
a model without an output head.
"""

_PER_SAMPLE = ("recipe", "sample")

FP8_SAMPLES = {
    "logit_kl": Variable(_PER_SAMPLE, ("float64",), "mean over tokens of KL(reference, stream)", "nat"),
    "top1_agreement": Variable(_PER_SAMPLE, ("float64",), "share of tokens with the reference's likeliest next token"),
    "loss_change": Variable(_PER_SAMPLE, ("float64",), "mean next token loss minus the reference's", "nat"),
    "reference_loss": Variable(("sample",), ("float64",), "mean next token loss of the reference", "nat"),
    "n_cut": Variable(("sample",), ("uint32",), "tokens over the limit, not run", "token"),
    "text_sha256": SAMPLES["text_sha256"],
    "recipe": _RECIPE,
    "sample": SAMPLES["sample"],
    "name": Variable(("sample",), ("str",), "name of the sample", coord=True),
    "domain": Variable(("sample",), ("str",), "domain of the sample", coord=True),
    "n_tokens": Variable(("sample",), ("uint32",), "tokens that were run", "token", coord=True),
}
"""Means over a sample's tokens; those of the loss are over tokens that have a next one, NaN where there is none."""

FP8_FLIPS = {
    "flipped": Variable(("recipe", "token", "layer"), ("bool",), "whether another set of experts was chosen"),
    "margin_change": Variable(
        ("recipe", "token", "layer"),
        ("float32",),
        "change of the logit of the reference's weakest chosen expert minus that of its best not chosen",
        "logit",
    ),
    "router_margin": Variable(
        ("token", "layer"), ("float32",), "the reference's weakest chosen minus best not chosen logit", "logit"
    ),
    "recipe": _RECIPE,
    "sample": Variable(("token",), ("uint32",), "index into /fp8_samples", coord=True),
    "position": ROUTING["position"],
    "token_id": ROUTING["token_id"],
    "domain": ROUTING["domain"],
    **_LAYERS,
}
"""One row for each token, MoE layers only; margins are NaN where every expert is chosen."""

_PER_INPUT = ("layer", "module", "expert")

FP8_ACTIVATIONS = {
    "amax": Variable(_PER_INPUT, ("float32",), "largest absolute value"),
    "magnitude": Variable((*_PER_INPUT, "percentile"), ("float32",), "absolute value at the percentile"),
    "outlier_channels": Variable(
        _PER_INPUT, ("float32",), "channels whose amax exceeds ten times the median channel's", "channel"
    ),
    "n_values": Variable(_PER_INPUT, ("uint64",), "values seen"),
    "saturation": Variable(_PER_MATRIX, ("float32",), "share of scaled values above the format's maximum"),
    "underflow": Variable(_PER_MATRIX, ("float32",), "share of non-zero values that became zero"),
    "recipe": _RECIPE,
    **_LAYERS,
    "module": Variable(("module",), ("str",), "matrix whose input it is", coord=True),
    "expert": ROUTING["expert"],
    "percentile": Variable(("percentile",), ("float64",), "percentile of the absolute values", "%", coord=True),
}
"""What enters the matrices of every decoder layer. A routed expert sees its own tokens only; what is one matrix for all
experts has the same value at each of them. NaN is what a layer lacks, and an expert that no token went to."""

_PER_UNIT = ("unit", "setting")

FP8_SENSITIVITY = {
    "loss_change": Variable(_PER_UNIT, ("float64",), "mean next token loss minus the reference's", "nat"),
    "loss_change_lower": Variable(_PER_UNIT, ("float64",), "lower bound of loss_change", "nat"),
    "loss_change_upper": Variable(_PER_UNIT, ("float64",), "upper bound of loss_change", "nat"),
    "logit_kl": Variable(_PER_UNIT, ("float64",), "mean over tokens of KL(reference, stream)", "nat"),
    "logit_kl_lower": Variable(_PER_UNIT, ("float64",), "lower bound of logit_kl", "nat"),
    "logit_kl_upper": Variable(_PER_UNIT, ("float64",), "upper bound of logit_kl", "nat"),
    "flip_share": Variable(_PER_UNIT, ("float64",), "share of (token, layer) with another set of experts"),
    "flip_share_lower": Variable(_PER_UNIT, ("float64",), "lower bound of flip_share"),
    "flip_share_upper": Variable(_PER_UNIT, ("float64",), "upper bound of flip_share"),
    "n_weights": Variable(("unit",), ("int64",), "weights in the unit"),
    "covered": Variable(("unit",), ("bool",), "whether the recipe quantises any of the unit"),
    "unit": Variable(("unit",), ("str",), "what is quantised, or spared", coord=True),
    "unit_kind": Variable(("unit",), ("str",), "module, layer, whole or floor", coord=True),
    "setting": Variable(("setting",), ("str",), "alone or spared", coord=True),
}
"""``alone``: only this unit is quantised; ``spared``: the whole recipe but this unit. The whole recipe stands beside
them as the unit ``everything``, the noise floors as ``bf16`` and ``fp32``. NaN is a unit without weights, a floor that
is spared, and a bound that is withheld."""

GROUPS: dict[str, dict[str, Variable]] = {
    "routing": ROUTING,
    "samples": SAMPLES,
    "vocabulary": VOCABULARY,
    "experts": EXPERTS,
    "attention": ATTENTION,
    "attention_profiles": ATTENTION_PROFILES,
    "fp8_weights": FP8_WEIGHTS,
    "fp8_drift": FP8_DRIFT,
    "fp8_samples": FP8_SAMPLES,
    "fp8_flips": FP8_FLIPS,
    "fp8_activations": FP8_ACTIVATIONS,
    "fp8_sensitivity": FP8_SENSITIVITY,
}

OPTIONAL_GROUPS = {
    "experts": "record(…, routing=RoutingSpec(expert_outputs=True))",
    "attention": "record(…, attention=AttentionSpec())",
    "attention_profiles": "record(…, attention=AttentionSpec())",
    "fp8_weights": "fp8_error.weight_error(model)",
    "fp8_drift": "fp8_error.drift(model, texts)",
    "fp8_samples": "fp8_error.drift(model, texts)",
    "fp8_flips": "fp8_error.drift(model, texts)",
    "fp8_activations": "fp8_error.activation_range(model, texts)",
    "fp8_sensitivity": "fp8_error.sensitivity(model, texts)",
}
"""Groups that a recording holds only where it was asked for them, and how to ask."""

FP8_GROUPS = tuple(name for name in GROUPS if name.startswith("fp8_"))
"""Groups of an FP8 study, which may stand in a DataTree of their own, without a recording."""

DRIFT_GROUPS = ("fp8_drift", "fp8_samples", "fp8_flips")
"""What :func:`probe.fp8_error.drift` returns: none of them stands without the others."""

ROOT_ATTRIBUTES = (
    "schema_version",
    "model",
    "model_revision",
    "created_at",
    "probe_version",
    "torch_version",
    "transformers_version",
    "dtype",
    "device",
    "attn_implementation",
    "expert_dispatch",
    "gate_function",
    "top_k",
    "config",
)


def expert_dtype(n_experts: int) -> np.dtype:
    """The smallest dtype that numbers ``n_experts`` experts."""
    return np.dtype("uint8") if n_experts <= 255 else np.dtype("uint16")


def code_dtype(n_categories: int) -> np.dtype:
    """The smallest dtype that numbers ``n_categories`` categories."""
    return np.min_scalar_type(max(n_categories - 1, 0))


def dataset(name: str, arrays: Mapping[str, Any], categories: Mapping[str, Sequence[str]] | None = None) -> xr.Dataset:
    """Build a group from bare arrays: dims, dtypes, names and units come from the schema.

    Parameters
    ----------
    name : group, such as ``"routing"``.
    arrays : values by variable name; those of the wrong dtype are converted to the one that probe writes.
    categories : for each coord that holds category codes, what the codes mean.

    Raises
    ------
    SchemaError
        For a name that is not in the schema.
    """
    variables: dict[str, Any] = {}
    coords: dict[str, Any] = {}
    for key, values in arrays.items():
        if key not in GROUPS[name]:
            raise SchemaError(f"/{name} has no variable {key!r}: known are {', '.join(GROUPS[name])}")
        spec = GROUPS[name][key]
        attributes: dict[str, Any] = {"long_name": spec.long_name, "units": spec.units}
        if categories and key in categories:
            attributes["categories"] = list(categories[key])
        if "str" in spec.dtypes:
            values = np.asarray(values, dtype=np.dtypes.StringDType())
        elif (values := np.asarray(values)).dtype.name not in spec.dtypes:
            values = values.astype(spec.dtypes[0])
        (coords if spec.coord else variables)[key] = (spec.dims, values, attributes)
    return xr.Dataset(variables, coords)


def group(data: xr.DataTree | xr.Dataset, name: str) -> xr.Dataset:
    """The Dataset of one group, from a whole recording, from the group's node or from the Dataset itself.

    Raises
    ------
    SchemaError
        If a recording has no such group (says how to record one that is optional), or if what was given is neither.
    """
    if isinstance(data, xr.Dataset):
        return data
    if not isinstance(data, xr.DataTree):
        raise SchemaError(f"expected a recording or its /{name} group, got {type(data).__name__}")
    if data.name == name and not data.children:
        return data.to_dataset()
    if name not in data.children:
        there = ", ".join(f"/{child}" for child in data.children) or "no group at all"
        remedy = f"; {OPTIONAL_GROUPS[name]} adds it" if name in OPTIONAL_GROUPS else ""
        raise SchemaError(f"this recording has no /{name} group: it holds {there}{remedy}")
    return data[name].to_dataset()


def require(data: xr.Dataset, *names: str) -> None:
    """Raise a SchemaError that names the first of ``names`` which ``data`` lacks."""
    for name in names:
        if name not in data.variables:
            there = ", ".join(map(str, data.variables))
            raise SchemaError(f"variable or coord {name!r} is missing: this Dataset holds {there}")


def require_sample(sample: int, n_samples: int) -> None:
    """Raise a ProbeError that says which samples there are, unless ``sample`` is one of them."""
    if not 0 <= sample < n_samples:
        raise ProbeError(f"there is no sample {sample}: this recording holds 0 to {n_samples - 1}")


def require_layer(layer: int, layers: Sequence[int]) -> None:
    """Raise a ProbeError that says which layers were recorded, unless ``layer`` is one of them."""
    if layer not in layers:
        known = ", ".join(map(str, layers))
        raise ProbeError(f"layer {layer} has no recorded router (is it dense?): this recording holds layers {known}")


def labels(coord: xr.DataArray) -> np.ndarray:
    """A coord's values as people read them: category codes by name, all else as they are.

    Raises
    ------
    SchemaError
        If a code has no category.
    """
    categories = coord.attrs.get("categories")
    if categories is None:
        return coord.values
    if coord.size and int(coord.max()) >= len(categories):
        raise SchemaError(f"{coord.name!r} holds code {int(coord.max())} but names only {len(categories)} categories")
    return np.asarray(categories, dtype=object)[coord.values]


def pieces(vocabulary: xr.Dataset) -> dict[int, bytes]:
    """Bytes of every token in ``/vocabulary``, by token id."""
    require(vocabulary, "token_id", "piece")
    return {
        int(token_id): str(piece).encode("latin-1")
        for token_id, piece in zip(vocabulary["token_id"].values, vocabulary["piece"].values, strict=True)
    }


def missing_groups(recording: xr.DataTree) -> set[str]:
    """Groups that a DataTree must have and lacks: those of a recording, unless it is an FP8 study on its own."""
    there = recording.children.keys()
    expected = set(GROUPS) - set(OPTIONAL_GROUPS)
    if there and there <= set(FP8_GROUPS):
        expected = set()
    if not there.isdisjoint(DRIFT_GROUPS):
        expected |= set(DRIFT_GROUPS)
    return expected - there


def validate(recording: xr.DataTree) -> None:
    """Check that a recording, or an FP8 study, is whole and looks as this module says.

    Raises
    ------
    SchemaError
        Names every fault found, one a line.
    """
    faults = [f"root attribute {name!r} is missing" for name in ROOT_ATTRIBUTES if name not in recording.attrs]
    version = recording.attrs.get("schema_version")
    if version is not None and version != SCHEMA_VERSION:
        faults.append(f"schema_version is {version}, this probe reads {SCHEMA_VERSION}")
    missing = missing_groups(recording)
    for name, specs in GROUPS.items():
        if name in recording.children:
            faults += _variable_faults(name, recording[name].to_dataset(), specs)
        elif name in missing:
            faults.append(f"group /{name} is missing")
    if not faults:
        faults = _consistency_faults(recording)
    if faults:
        raise SchemaError("not a whole probe recording:\n  " + "\n  ".join(faults))


def _variable_faults(name: str, data: xr.Dataset, specs: Mapping[str, Variable]) -> list[str]:
    faults = []
    for key, spec in specs.items():
        if key not in data.variables:
            if spec.required:
                faults.append(f"/{name}/{key} is missing")
            continue
        variable = data[key]
        if variable.dims != spec.dims:
            faults.append(f"/{name}/{key} has dims {listed(variable.dims)}, expected {listed(spec.dims)}")
        found = "str" if variable.dtype.kind in "TUO" else variable.dtype.name
        if found not in spec.dtypes:
            faults.append(f"/{name}/{key} has dtype {found}, expected {' or '.join(spec.dtypes)}")
    return faults


def _consistency_faults(recording: xr.DataTree) -> list[str]:
    faults = []
    if "fp8_drift" in recording.children:
        faults += _drift_faults(recording)
    if "routing" in recording.children:
        faults += _recording_faults(recording)
    return faults


def _recording_faults(recording: xr.DataTree) -> list[str]:
    faults = []
    routing, samples = recording["routing"].to_dataset(), recording["samples"].to_dataset()
    n_rows, n_tokens = routing.sizes["token"], samples["n_tokens"].values.astype(np.int64)
    if n_tokens.sum() != n_rows:
        faults.append(f"/samples counts {n_tokens.sum()} tokens but /routing holds {n_rows}: the store is truncated")
        return faults
    if not np.array_equal(samples["row_offset"].values, np.concatenate([[0], np.cumsum(n_tokens)])[:-1]):
        faults.append("/samples/row_offset is not the running sum of n_tokens")
    if not np.array_equal(routing["sample"].values, np.repeat(np.arange(len(n_tokens)), n_tokens)):
        faults.append("/routing/sample does not agree with /samples/n_tokens")
    if not np.array_equal(routing["layer"].values, samples["layer"].values):
        faults.append("/routing and /samples name different layers")
    n_experts = routing.sizes["expert"]
    if n_rows and int(routing["expert_index"].max()) >= n_experts:
        faults.append(f"/routing/expert_index goes beyond the {n_experts} experts")
    elif not faults and not np.array_equal(_counted(routing, len(n_tokens)), samples["expert_count"].values):
        faults.append("/samples/expert_count does not agree with /routing/expert_index")
    if "experts" in recording.children:
        faults += _expert_faults(recording["experts"].to_dataset(), samples)
    if "attention" in recording.children or "attention_profiles" in recording.children:
        faults += _attention_faults(recording, n_tokens)
    known = recording["vocabulary"].to_dataset()["token_id"].values
    if missing := np.setdiff1d(routing["token_id"].values, known).tolist():
        faults.append(f"/vocabulary lacks token ids {missing[:5]}")
    return faults


def _expert_faults(experts: xr.Dataset, samples: xr.Dataset) -> list[str]:
    """Where ``/experts`` does not fit ``/samples``."""
    dims = ("sample", "layer", "expert")
    different = [dim for dim in dims if not np.array_equal(experts[dim].values, samples[dim].values)]
    if different:
        return [f"/experts and /samples name different {dim}s" for dim in different]
    faults, unused = [], samples["expert_count"].values == 0
    for name in ("saliency_sum", "output_norm_sum"):
        if (experts[name].values[unused] != 0).any():
            faults.append(f"/experts/{name} is not 0 where /samples/expert_count is 0")
    # An output that is itself not a number makes the sum so too: a model with broken weights can still be recorded.
    undefined = unused | np.isnan(experts["output_norm_sum"].values)
    if not np.array_equal(np.isnan(experts["output_max"].values), undefined):
        faults.append("/experts/output_max is not NaN exactly where /samples/expert_count is 0")
    return faults


def _attention_faults(recording: xr.DataTree, n_tokens: np.ndarray) -> list[str]:
    """Where ``/attention`` and ``/attention_profiles`` do not fit ``/samples``, or each other."""
    if missing := [name for name in ("attention", "attention_profiles") if name not in recording.children]:
        return [f"group /{missing[0]} is missing, but its sister is there"]
    attention, profiles = recording["attention"].to_dataset(), recording["attention_profiles"].to_dataset()
    faults = [
        f"/{name} has no attribute {attribute!r}"
        for name, data in (("attention", attention), ("attention_profiles", profiles))
        for attribute in ATTENTION_ATTRIBUTES
        if attribute not in data.attrs
    ]
    sample, position = attention["sample"].values.astype(np.int64), attention["position"].values.astype(np.int64)
    if len(sample) and sample.max() >= len(n_tokens):
        return [*faults, f"/attention holds sample {sample.max()}, but /samples ends at {len(n_tokens) - 1}"]
    n_queries = np.bincount(sample, minlength=len(n_tokens))
    recorded = recording["samples"].to_dataset().get("n_queries")
    if recorded is None or not np.array_equal(recorded.values, n_queries):
        faults.append("/samples/n_queries does not agree with /attention: the store is truncated")
    if ((np.diff(sample) < 0) | ((np.diff(sample) == 0) & (np.diff(position) <= 0))).any():
        faults.append("/attention is not sorted by sample and position")
    profiled = profiles["sample_id"].values
    if not np.array_equal(profiled, np.flatnonzero(n_queries)):
        faults.append("/attention_profiles/sample_id does not name the samples in /attention")
    elif not np.array_equal(profiles["n_queries"].values, n_queries[profiled]):
        faults.append("/attention_profiles/n_queries does not agree with /attention")
    return faults


def _drift_faults(recording: xr.DataTree) -> list[str]:
    """Where ``/fp8_drift``, ``/fp8_samples`` and ``/fp8_flips`` do not fit each other."""
    drift, samples, flips = (recording[name].to_dataset() for name in DRIFT_GROUPS)
    faults = [
        f"/{name} and /fp8_drift name different recipes"
        for name, data in (("fp8_samples", samples), ("fp8_flips", flips))
        if list(data["recipe"].values) != list(drift["recipe"].values)
    ]
    n_tokens, n_rows = samples["n_tokens"].values.astype(np.int64), flips.sizes["token"]
    if n_tokens.sum() != n_rows:
        faults.append(f"/fp8_samples counts {n_tokens.sum()} tokens but /fp8_flips holds {n_rows}: it is truncated")
    elif not np.array_equal(flips["sample"].values, np.repeat(np.arange(len(n_tokens)), n_tokens)):
        faults.append("/fp8_flips/sample does not agree with /fp8_samples/n_tokens")
    if unknown := sorted(set(flips["layer"].values.tolist()) - set(drift["layer"].values.tolist())):
        faults.append(f"/fp8_flips names layers {unknown} that /fp8_drift lacks")
    return faults


def _counted(routing: xr.Dataset, n_samples: int) -> np.ndarray:
    """Assignments (sample, layer, expert), counted block by block, so that a store need not fit into memory."""
    counts = np.zeros((n_samples, routing.sizes["layer"], routing.sizes["expert"]), np.int64)
    for start in range(0, routing.sizes["token"], ROWS_AT_ONCE):
        rows = routing[["expert_index", "sample"]].isel(token=slice(start, start + ROWS_AT_ONCE))
        sample = rows["sample"].values.astype(np.int64)
        block = count(rows["expert_index"].values, sample - sample[0], n_codes=int(sample[-1] - sample[0]) + 1,
                      n_values=routing.sizes["expert"])  # fmt: skip
        counts[sample[0] : sample[-1] + 1] += block
    return counts


def listed(dims: Sequence[Hashable]) -> str:
    """Dims in brackets, as errors name them."""
    return "(" + ", ".join(map(str, dims)) + ")"
