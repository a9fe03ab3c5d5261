"""How alike loads are, and how alike samples; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement, product

import numpy as np
import xarray as xr
from scipy.special import entr

from probe.bootstrap import MIN_DOCUMENTS, Bootstrap, divide, effective_number, resampled_sums, share
from probe.routing.permutation import Permutations
from probe.routing.rows import By, GroupDocuments, Routing, Rows, grouped
from probe.schema import ROWS_AT_ONCE, ProbeError

MAX_GROUPS = 64
"""More groups make too many pairs."""

MAX_SAMPLES = 5000
"""More samples make too large a matrix."""

N_PERMUTATIONS = 200
"""How often documents are relabelled for a null."""

TOKEN = ("sample", "position", "token_id")
"""The coords that say which token a row of ``/routing`` is."""

DIVERGENCE = {
    "jensen_shannon": ("Jensen–Shannon divergence of the loads", "nat"),
    "lower": ("lower bound of the Jensen–Shannon divergence", "nat"),
    "upper": ("upper bound of the Jensen–Shannon divergence", "nat"),
    "normalized": ("divergence over the largest that loads of such entropies allow", "1"),
    "null": ("mean divergence when documents are relabelled at random", "nat"),
    "p_value": ("chance of such a divergence when documents are relabelled at random", "1"),
}


def divergence(
    routing: Routing,
    other: Routing | None = None,
    *,
    by: By = "domain",
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How far apart the loads of two groups are, or those of two recordings.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    other : a second one, of other tokens if need be, but of the same layers and experts.
    by : name of a coord on ``token`` to split by, or several names. One recording: its groups are compared with each
        other. Two recordings: each group with the group of the same label in ``other``; None compares all tokens.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling and of the relabelling.

    Returns
    -------
    Dataset (by, other_by, layer) of one recording, such as (domain, other_domain, layer), or ([by,] layer) of two:
    ``jensen_shannon`` with its bounds ``lower`` and ``upper`` (nat, at most ln 2 = 0.69; NaN for fewer than 5 documents
    on either side), ``normalized`` (units "1"; NaN where both loads are even), and the noise floor: ``null``, the mean
    divergence (nat) when whole documents are relabelled at random, and ``p_value``, one-sided, for each number by
    itself: it is not adjusted for how many pairs and layers there are. NaN where a side has no token.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For more than 64 groups of one recording, or none to compare; for recordings of other layers or numbers of
        experts; for a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    JSD(q₁, q₂) = H((q₁ + q₂)/2) - ½ (H(q₁) + H(q₂)), and JSD / (ln E - ½ (H(q₁) + H(q₂))), arXiv 2510.04694 Eq. 2,
    where q is the share N_e / (T·k).

    The divergence of finite documents is above 0 even where the router treats both sides alike. The bounds are
    corrected for that bias, see ``probe.bootstrap.Bootstrap.bounds``; the divergence itself is not: compare it with
    ``null``. There, documents that lie on both sides (of both phases, or of two recordings of the same samples) swap
    their two parts with probability ½, all others are dealt anew, as many to each side as there were. The same
    documents are drawn for both sides wherever a document lies on both. 200 relabellings: no p_value is below 1/201.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    if other is not None:
        second = grouped(other, by)
        require_same_experts(rows, second)
        return _between_recordings(rows, second, bootstrap, related=_same_samples(routing, other, rows, second))
    if by is None:
        raise ProbeError(
            "by=None leaves nothing to compare: name a coord, such as by='domain', or pass a second recording"
        )
    _require_few_groups(rows)
    return _between_groups(rows, bootstrap)


def signature(
    routing: Routing, *, by: By = None, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """How alike samples use the experts: the cosine of their expert frequencies.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    by : name of a coord on ``token``, or several names: means over pairs of samples instead of every pair.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset, units "1". Without ``by``: ``signature`` (sample, other_sample) of the samples that have a token, 1 on the
    diagonal. With it: ``signature`` (by, other_by), such as (domain, other_domain), the mean over pairs of distinct
    samples, one of each group, NaN where there is none; its bounds ``lower`` and ``upper``, NaN for fewer than 5
    documents in either group; ``n_pairs`` (by, other_by), where within a group (a, b) and (b, a) both count; and
    ``n_documents`` (by).

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For more than 5,000 samples without ``by``, or more than 64 groups; for a level outside (0, 1) or fewer than
        two resamples.

    Notes
    -----
    A sample's signature joins the frequencies of all layers, each layer's sum being 1; arXiv 2603.11114 reports 0.84
    within a task and 0.62 across tasks for OLMoE. A sample that lies in two groups (``by="phase"``) is not paired with
    itself, nor is a drawn document with its copy. Short samples are noisy, and so less alike: compare groups of samples
    of similar length.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    if by is None:
        rows = grouped(routing, "sample")
        if rows.n_groups > MAX_SAMPLES:
            raise ProbeError(
                f"{rows.n_groups:,} samples make too many pairs, at most {MAX_SAMPLES:,} can be compared one by one: "
                "ask for the means of groups, such as by='domain', or select fewer samples"
            )
        return _signatures_of_samples(rows)
    rows = grouped(routing, by)
    _require_few_groups(rows)
    return _signatures_of_groups(rows, bootstrap)


def require_same_experts(first: Rows, second: Rows) -> None:
    """Raise a ProbeError that names both sides where two recordings differ in layers or in the number of experts."""
    layers, others = first.routing["layer"].values.tolist(), second.routing["layer"].values.tolist()
    if layers != others:
        raise ProbeError(
            f"one recording holds layers {_listed(layers)}, the other {_listed(others)}: "
            "compare recordings of the same layers"
        )
    if first.n_experts != second.n_experts:
        raise ProbeError(
            f"one recording has {first.n_experts} experts a layer, the other {second.n_experts}: "
            "compare recordings of the same experts"
        )


def first_difference(first: Rows, second: Rows) -> int | None:
    """The first place where the rows of two recordings are not the same token, None where they agree.

    Rows that only one of them has are not looked at.
    """
    blocks, others = (rows.blocks(*TOKEN, at_once=ROWS_AT_ONCE) for rows in (first, second))
    for block, other in zip(blocks, others, strict=False):
        n_rows = min(block.n_tokens, other.n_tokens)
        differs = np.zeros(n_rows, bool)
        for name in TOKEN:
            differs |= block.values(name)[:n_rows] != other.values(name)[:n_rows]
        if differs.any():
            return block.start + int(differs.argmax())
    return None


def document_weights(bootstrap: Bootstrap, samples: Sequence[np.ndarray], *, related: bool = True) -> list[np.ndarray]:
    """How often the documents of several groups are drawn.

    Parameters
    ----------
    bootstrap : how documents are resampled.
    samples : for each group the samples of its documents, (document,) ascending.
    related : does a sample that two groups hold stand for one document?

    Returns
    -------
    For each group (resample, document). Where a document lies in several groups, all documents are drawn at once, and
    it counts as often in each. Otherwise every group is drawn for itself, independently of the others.
    """
    everything = np.unique(np.concatenate([*samples, np.zeros(0, np.int64)]))
    if related and sum(map(len, samples)) > len(everything):
        weights = bootstrap.weights(len(everything))
        return [weights[:, np.searchsorted(everything, own)] for own in samples]
    seeds = np.random.SeedSequence(bootstrap.seed).generate_state(len(samples)).tolist()
    return [replace(bootstrap, seed=seed).weights(len(own)) for seed, own in zip(seeds, samples, strict=True)]


def compact(documents: GroupDocuments) -> GroupDocuments:
    """The same, in half the memory: a document has fewer than 2³² assignments."""
    return documents._replace(counts=documents.counts.astype(np.uint32))


def samples_of(recording: Routing) -> xr.Dataset | None:
    """A recording's ``/samples``, None for a bare ``/routing``."""
    if isinstance(recording, xr.DataTree) and "samples" in recording.children:
        return recording["samples"].to_dataset()
    return None


def _between_groups(rows: Rows, bootstrap: Bootstrap) -> xr.Dataset:
    """The divergence of every two groups of a recording."""
    groups = [compact(documents) for documents in rows.documents()]
    pairs = list(combinations_with_replacement(range(len(groups)), 2))
    columns = _divergences(rows, groups, pairs, bootstrap, related=True)
    labels = _other_labels(rows)
    shape = tuple(coord.size for coord in labels.values())
    variables = {}
    for name, values in columns.items():
        square = np.full((len(groups), len(groups), rows.n_layers), np.nan)
        for (one, two), value in zip(pairs, values, strict=True):
            square[one, two] = square[two, one] = value
        square = square.reshape(len(groups), *shape, rows.n_layers)
        variables[name] = rows.array(square, (*labels, "layer"), *DIVERGENCE[name], coords=labels)
    return xr.Dataset(variables, attrs=bootstrap.attributes | {"n_permutations": N_PERMUTATIONS})


def _between_recordings(first: Rows, second: Rows, bootstrap: Bootstrap, *, related: bool) -> xr.Dataset:
    """The divergence of every group of a recording from the group of the same label in another."""
    columns = {name: np.full((first.n_groups, first.n_layers), np.nan) for name in DIVERGENCE}
    both = zip(first.documents(), _in_groups_of(first, second).documents(), strict=True)
    for group, (here, there) in enumerate(both):
        groups = [compact(here), compact(there)]
        for name, values in _divergences(first, groups, [(0, 1)], bootstrap, related=related).items():
            columns[name][group] = values[0]
    variables = {name: first.array(values, ("layer",), *DIVERGENCE[name]) for name, values in columns.items()}
    return xr.Dataset(variables, attrs=bootstrap.attributes | {"n_permutations": N_PERMUTATIONS})


def _divergences(
    rows: Rows,
    groups: Sequence[GroupDocuments],
    pairs: Sequence[tuple[int, int]],
    bootstrap: Bootstrap,
    *,
    related: bool,
) -> dict[str, np.ndarray]:
    """The variables of :func:`divergence` (pair, layer) for pairs of ``groups``."""
    shape = (len(groups), rows.n_layers, rows.n_experts)
    counts = np.stack([group.counts.sum(axis=0, dtype=np.int64) for group in groups]) if groups else np.zeros(shape)
    load = share(counts)
    entropy = entr(load).sum(axis=-1)
    even = (counts == counts[..., :1]).all(axis=-1)
    columns = {name: np.full((len(pairs), rows.n_layers), np.nan) for name in DIVERGENCE}
    for pair, (one, two) in enumerate(pairs):
        columns["jensen_shannon"][pair] = observed = _jensen_shannon(load[one], load[two], entropy[one], entropy[two])
        largest = np.log(rows.n_experts) - (entropy[one] + entropy[two]) / 2
        columns["normalized"][pair] = divide(observed, np.where(even[one] & even[two], 0, largest))
        if len(groups[one].sample) and len(groups[two].sample):
            columns["null"][pair], columns["p_value"][pair] = _relabelling(
                groups[one], groups[two], observed, np.random.default_rng((bootstrap.seed, one, two)), related=related
            )
    columns["lower"], columns["upper"] = _divergence_bounds(
        groups, pairs, columns["jensen_shannon"], bootstrap, related=related
    )
    return columns


def _jensen_shannon(p: np.ndarray, q: np.ndarray, p_entropy: np.ndarray, q_entropy: np.ndarray) -> np.ndarray:
    """JSD (…) in nats of loads (…, expert) whose entropies are known; rounding below 0 is taken off."""
    return np.maximum(entr((p + q) / 2).sum(axis=-1) - (p_entropy + q_entropy) / 2, 0)


def _divergence_bounds(
    groups: Sequence[GroupDocuments],
    pairs: Sequence[tuple[int, int]],
    estimate: np.ndarray,
    bootstrap: Bootstrap,
    *,
    related: bool,
) -> np.ndarray:
    """Lower and upper bounds (2, pair, layer) of divergences ``estimate`` (pair, layer)."""
    bounds = np.full((2, *estimate.shape), np.nan)
    weights = document_weights(bootstrap, [group.sample for group in groups], related=related)
    # Every layer saw the same tokens. Of two sides the smaller has the say, as in Welch's t-test for few documents.
    sizes = [group.counts[:, :1].sum(axis=(1, 2)) for group in groups]
    worth = [float(effective_number(size)) for size in sizes]
    enough = [number for number, group in enumerate(groups) if len(group.sample) >= MIN_DOCUMENTS]
    for layer in range(estimate.shape[1]):
        drawn = {number: share(resampled_sums(weights[number], groups[number].counts[:, layer])) for number in enough}
        entropy = {number: entr(load).sum(axis=-1) for number, load in drawn.items()}
        for pair, (one, two) in enumerate(pairs):
            if one in drawn and two in drawn:
                resampled = _jensen_shannon(drawn[one], drawn[two], entropy[one], entropy[two])
                bounds[:, pair, layer] = bootstrap.bounds(estimate[pair, layer], resampled, min(worth[one], worth[two]))
    return np.clip(bounds, 0, np.log(2))


def _relabelling(
    first: GroupDocuments,
    second: GroupDocuments,
    observed: np.ndarray,
    random: np.random.Generator,
    *,
    related: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean divergence (layer,) of documents that are relabelled at random, and the chance of one like ``observed``."""
    belongs = _relabelled(first.sample, second.sample, random, related=related).astype(np.float64)
    null, p_value = np.empty((2, len(observed)))
    for layer in range(len(observed)):
        counts = np.concatenate([first.counts[:, layer], second.counts[:, layer]]).astype(np.float64)
        one = belongs @ counts
        p, q = share(one), share(counts.sum(axis=0) - one)
        relabelled = _jensen_shannon(p, q, entr(p).sum(axis=-1), entr(q).sum(axis=-1))
        null[layer] = relabelled.mean()
        p_value[layer] = Permutations(N_PERMUTATIONS).p_value(observed[layer], relabelled)
    return null, p_value


def _relabelled(first: np.ndarray, second: np.ndarray, random: np.random.Generator, *, related: bool) -> np.ndarray:
    """Which documents make up the first group, those of ``first`` then those of ``second``: (permutation, document)."""
    own = np.arange(len(first) + len(second)) < len(first)
    here = there = np.zeros(0, np.int64)
    if related:
        _, here, there = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    single = np.ones(len(own), bool)
    single[here] = single[len(first) + there] = False
    belongs = np.empty((N_PERMUTATIONS, len(own)), bool)
    stays = random.random((N_PERMUTATIONS, len(here))) < 0.5
    belongs[:, here], belongs[:, len(first) + there] = stays, ~stays
    belongs[:, single] = random.permuted(np.tile(own[single], (N_PERMUTATIONS, 1)), axis=1)
    return belongs


def _signatures_of_samples(rows: Rows) -> xr.Dataset:
    """The cosine of every two samples; ``rows`` are grouped by sample."""
    frequencies = np.zeros((rows.n_groups, rows.n_layers * rows.n_experts))
    for sample, _, counts in rows.documents():
        frequencies[sample] = _unit(counts).reshape(-1)
    cosine = frequencies @ frequencies.T
    np.fill_diagonal(cosine, 1)
    labels = _other_labels(rows)
    long_name = "cosine of the expert frequencies of two samples"
    return xr.Dataset({"signature": rows.array(_valid(cosine), tuple(labels), long_name, coords=labels)})


def _signatures_of_groups(rows: Rows, bootstrap: Bootstrap) -> xr.Dataset:
    """The mean cosine over pairs of distinct samples of every two groups."""
    samples, units = [], []
    for _, sample, counts in rows.documents():
        samples.append(sample)
        units.append(_unit(counts))
    n_documents = np.array([len(own) for own in samples], np.int64)
    once = [np.ones((1, len(own))) for own in samples]
    estimate, n_pairs = (values[0] for values in _mean_cosines(samples, units, once))
    drawn, _ = _mean_cosines(samples, units, document_weights(bootstrap, samples))
    smaller = np.minimum(n_documents[:, None], n_documents)
    lower, upper = bootstrap.bounds(estimate, drawn, smaller)
    withheld = smaller < MIN_DOCUMENTS

    labels = _other_labels(rows)
    shape = (rows.n_groups, *(coord.size for coord in labels.values()))
    columns = {
        "signature": (_valid(estimate), "mean cosine of the expert frequencies of two samples"),
        "lower": (np.where(withheld, np.nan, _valid(lower)), "lower bound of the mean cosine"),
        "upper": (np.where(withheld, np.nan, _valid(upper)), "upper bound of the mean cosine"),
    }
    variables = {
        name: rows.array(values.reshape(shape), tuple(labels), long_name, coords=labels)
        for name, (values, long_name) in columns.items()
    }
    whole = n_pairs.astype(np.int64).reshape(shape)
    variables["n_pairs"] = rows.array(whole, tuple(labels), "pairs of distinct samples", "pair", coords=labels)
    variables["n_documents"] = rows.array(n_documents, (), "documents with a token", "document")
    return xr.Dataset(variables, attrs=bootstrap.attributes)


def _mean_cosines(
    samples: Sequence[np.ndarray], units: Sequence[np.ndarray], weights: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted means of u·v over pairs of distinct samples, each (resample, group, group): the means, and the pairs.

    Parameters
    ----------
    samples : samples of each group, (document,) ascending.
    units : their unit vectors, (document, layer, expert).
    weights : how often each is drawn, (resample, document).

    Notes
    -----
    Σ w_i w_j u_i·v_j over all pairs is the product of two sums of vectors; what pairs of one sample add is taken off.
    """
    weights = [own.astype(np.float64) for own in weights]
    n_groups, n_resamples = len(samples), len(weights[0]) if weights else 1
    inner, n_pairs = np.zeros((2, n_groups, n_groups, n_resamples))
    for layer in range(units[0].shape[1] if units else 0):
        sums = [own @ unit[:, layer] for own, unit in zip(weights, units, strict=True)]
        for one, two in combinations_with_replacement(range(n_groups), 2):
            inner[one, two] += np.einsum("re,re->r", sums[one], sums[two])
    for one, two in combinations_with_replacement(range(n_groups), 2):
        _, here, there = np.intersect1d(samples[one], samples[two], assume_unique=True, return_indices=True)
        squares = weights[one][:, here] * weights[two][:, there]
        inner[one, two] -= squares @ np.einsum("dle,dle->d", units[one][here], units[two][there])
        n_pairs[one, two] = weights[one].sum(axis=1) * weights[two].sum(axis=1) - squares.sum(axis=1)
        inner[two, one], n_pairs[two, one] = inner[one, two], n_pairs[one, two]
    return np.moveaxis(divide(inner, n_pairs), -1, 0), np.moveaxis(n_pairs, -1, 0)


def _unit(counts: np.ndarray) -> np.ndarray:
    """Signatures of length 1 from counts, both (document, layer, expert)."""
    frequency = share(counts)
    return frequency / np.sqrt(np.square(frequency).sum(axis=(1, 2), keepdims=True))


def _valid(cosine: np.ndarray) -> np.ndarray:
    """Frequencies are not negative, so cosines lie between 0 and 1; rounding and bounds may not."""
    return np.clip(cosine, 0, 1)


def _same_samples(routing: Routing, other: Routing, first: Rows, second: Rows) -> bool:
    """Do both recordings hold the same samples, even if a model wrote other tokens to them?"""
    here, there = samples_of(routing), samples_of(other)
    if here is not None and there is not None:
        texts = here["text_sha256"].values
        if (texts != "").all() and np.array_equal(texts, there["text_sha256"].values):
            return True
    return first.n_tokens == second.n_tokens and first_difference(first, second) is None


def _in_groups_of(first: Rows, second: Rows) -> Rows:
    """The second recording's rows in the groups of the first; those of any other label get a number beyond."""
    number = {label: group for group, label in enumerate(_labels(first.group_coords))}
    beyond = len(number)
    dtype = np.min_scalar_type(beyond)
    numbers = np.array([number.get(label, beyond) for label in _labels(second.group_coords)], dtype)
    return replace(second, group=numbers[second.group], group_coords=first.group_coords)


def _labels(group_coords: Mapping[str, xr.Variable]) -> list[tuple]:
    """The labels of every group, in the order of their numbers."""
    return list(product(*(coord.values.tolist() for coord in group_coords.values())))


def _other_labels(rows: Rows) -> dict[str, xr.Variable]:
    """The labels of the groups once more, for a second dim: ``domain`` as ``other_domain``."""
    return {
        f"other_{name}": xr.Variable(f"other_{name}", coord.values, coord.attrs)
        for name, coord in rows.group_coords.items()
    }


def _require_few_groups(rows: Rows) -> None:
    if rows.n_groups > MAX_GROUPS:
        names = ", ".join(map(repr, rows.group_coords))
        raise ProbeError(
            f"{names} makes {rows.n_groups:,} groups and {rows.n_groups * (rows.n_groups - 1) // 2:,} pairs: "
            f"split by a coord of at most {MAX_GROUPS} labels, such as by='domain'"
        )


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))
