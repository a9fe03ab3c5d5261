"""How much a token's label and the experts that it chose say about each other; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy.special import entr

from probe import schema
from probe.bootstrap import MIN_DOCUMENTS, Bootstrap, divide, effective_number, share
from probe.counting import count
from probe.routing.permutation import Documents, Permutations, chosen_experts, label_sums, layer_batches
from probe.routing.rows import Routing, Rows, coded, grouped
from probe.schema import ProbeError

MAX_GROUPS = 50
"""In how many groups documents are left out by turns; more would cost as much and change little."""

CELLS_AT_ONCE = 1 << 22
"""Cells of the table of groups, types and experts that is in memory at once."""


def mutual_information(routing: Routing, *, of: str = "domain", n_permutations: int = 200, seed: int = 0) -> xr.Dataset:
    """How much a label of tokens and the chosen expert say about each other, beside what chance alone shows.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    of : name of the coord on ``token`` that is the label: "domain", "token_id", "position", "phase", …
    n_permutations : how many times labels are exchanged; 0 leaves all that rests on it NaN.
    seed : of the permutations.

    Returns
    -------
    Dataset (layer): ``mutual_information`` of label and expert over assignments (nat); ``normalized``, 2 I / (H + H)
    (units "1", as all others; NaN where both entropies are 0); ``null`` and ``null_upper``, mean and 95 % quantile of
    ``normalized`` under permutation; ``excess``, ``normalized`` minus ``null``; ``p_value``, adjusted for all layers
    by max-T; ``p_adjusted``, the p-value of the layer alone, adjusted for all layers by Benjamini & Yekutieli.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a negative number of permutations.

    Notes
    -----
    The plug-in estimate is far from 0 on independent data: with 10⁴ tokens, 128 experts and 128 labels that mean
    nothing, ``normalized`` is 0.18. Read ``excess``, and compare it only between layers of one recording.

    A label that is the same throughout every sample, such as the domain, is swapped between whole documents; any
    other is shuffled among the tokens of each document, and what a document as a whole prefers is part of its null;
    see ``probe.routing.permutation``. NaN where exchanging labels changes nothing: a single label, or one for every
    document.

    Both p-values are one-sided, (1 + permutations with as much) / (1 + permutations). For ``p_value`` layers are put
    on one scale by their mean and standard deviation, and the largest over layers is compared (Westfall & Young
    1993); it says in which layers there is any dependence, and 5 % of the time it is wrong about some layer.
    ``p_adjusted`` at most 0.05 selects layers of which 5 % are expected to be wrong, under any dependence between
    layers (Benjamini & Yekutieli 2001).

    Every permutation counts all assignments anew. Tables are made layer by layer, and not at all for labels of which
    there are more cells (label × expert) than assignments: then cells are sorted.
    """
    permutations = Permutations(n_permutations, seed)
    rows, plain = grouped(routing, of), grouped(routing)
    documents = Documents.of(rows)
    information, normalized = np.full((2, rows.n_layers), np.nan)
    # without permutations one that is not known stands for them, and gives NaN
    null = np.full((max(n_permutations, 1), rows.n_layers), np.nan)
    n_table = 0 if documents.label is None else max(documents.n_documents, rows.n_groups)
    for layers, part in layer_batches(rows, n_table):
        information[layers], normalized[layers], null[:, layers] = _information(part, documents, permutations)
    mean = null.mean(axis=0)
    p_value, p_adjusted = _p_values(normalized, null, permutations)
    columns = {
        "mutual_information": (information, f"mutual information of {of} and expert", "nat"),
        "normalized": (normalized, f"mutual information of {of} and expert over their mean entropy", "1"),
        "null": (mean, "mean normalized mutual information under permutation", "1"),
        "null_upper": (np.quantile(null, 0.95, axis=0), "95 % quantile under permutation", "1"),
        "excess": (normalized - mean, "normalized mutual information beyond its null", "1"),
        "p_value": (p_value, "p-value, adjusted for all layers by max-T", "1"),
        "p_adjusted": (p_adjusted, "p-value, adjusted for all layers by Benjamini and Yekutieli", "1"),
    }
    return xr.Dataset(
        {name: plain.array(values[None], ("layer",), *words) for name, (values, *words) in columns.items()},
        attrs={"of": of, "n_permutations": n_permutations, "seed": seed},
    )


def vocabulary(
    routing: Routing,
    *,
    of: str = "input",
    min_count: int = 20,
    level: float = 0.95,
    n_permutations: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """How far single experts take all occurrences of a token: vocabulary specialisation.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot) and ``token_id`` (token), or a recording that holds it.
    of : which token: "input" is the one that was routed, "next" the one that follows it in its sample, "predicted"
        the one that the model holds most likely to follow (needs ``predicted_id``).
    min_count : how often a token must occur to be considered.
    level : coverage of the interval.
    n_permutations : how many times tokens are shuffled for the null; 0 leaves it NaN.
    seed : of the shuffles and of the grouping of documents.

    Returns
    -------
    Dataset (layer), units "1": ``vocabulary``, the mean over types (different tokens) v that occur at least
    ``min_count`` times of max_e N(v, e) / N(v), where N(v, e) counts the occurrences whose chosen experts include e;
    ``lower`` and ``upper``, NaN for fewer than 5 documents; ``null``, its mean when tokens are shuffled within
    documents; and ``n_types``. All NaN if no type occurs often enough.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        If ``of`` is none of the three, ``min_count`` is less than 1, the level is outside (0, 1) or the number of
        permutations is negative.

    Notes
    -----
    Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), §5.4, with the floor that it needs: a type that occurs once
    goes to one expert all of the time.

    The largest of noisy shares is too large, the more so the fewer occurrences and the more experts, and uneven loads
    make it larger still. ``null`` shows by how much: it is what the same counts, documents and loads give when a
    token's identity does not matter within its document. Only the distance from it speaks for specialisation, and a
    value is comparable with another only at like counts. The bounds hold the value that recordings as long as this
    one have on average, bias included; they do not hold the value of infinitely many tokens.

    Bounds are value ± t standard errors of the delete-a-group jackknife (Kott 2001): documents are split at random
    into at most 50 groups, and each is left out in turn, with the same types. Simulated 95 % intervals cover 95 to
    100 %: with few documents they are too wide, since leaving out a fifth of the tokens moves many a maximum.
    """
    if of not in _TARGETS:
        raise ProbeError(f"of is {of!r}, it must be one of {', '.join(map(repr, _TARGETS))}")
    if min_count < 1:
        raise ProbeError(f"min_count is {min_count}, it must be at least 1")
    bootstrap, permutations = Bootstrap(level, seed=seed), Permutations(n_permutations, seed)
    rows = grouped(routing)
    types = _types(rows, of, min_count)
    shape = (rows.n_layers,)
    value, null, error = (np.full(shape, np.nan) for _ in range(3))
    groups = _random_groups(types.document, seed)
    for layers, part in layer_batches(rows) if types.n_types else ():
        chosen = chosen_experts(part, types.kept)
        value[layers] = _largest_shares(chosen, types.type, types.n_types, rows.n_experts)
        error[layers] = _jackknife_error(chosen, types, groups, rows.n_experts)
        shuffles = permutations.token_labels(types.type, types.document)
        drawn = [_largest_shares(chosen, shuffled, types.n_types, rows.n_experts) for shuffled in shuffles]
        null[layers] = np.mean(drawn, axis=0) if drawn else np.nan
    reach = bootstrap.t(effective_number(np.bincount(groups))) * error
    columns = {
        "vocabulary": (value, "mean over types of the largest share of occurrences that one expert took"),
        "lower": (np.maximum(value - reach, 0), "lower bound of the vocabulary specialisation"),
        "upper": (np.minimum(value + reach, 1), "upper bound of the vocabulary specialisation"),
        "null": (null, "vocabulary specialisation with tokens shuffled within documents"),
    }
    variables = {name: rows.array(values[None], ("layer",), words) for name, (values, words) in columns.items()}
    variables["n_types"] = rows.array(
        np.array([types.n_types]), (), "different tokens that occur often enough", "token"
    )
    attributes = {"of": of, "min_count": min_count, "level": level, "n_permutations": n_permutations, "seed": seed}
    return xr.Dataset(variables, attrs=attributes)


class _Types(NamedTuple):
    """The tokens whose types are considered, one row each."""

    type: np.ndarray
    """(token,) number of the type; ``n_types`` for those that are too rare."""
    n_types: int
    document: np.ndarray
    """(token,) number of the document."""
    kept: np.ndarray | None
    """(row of /routing,) which rows these are; None for all."""


_TARGETS = {"input": "token_id", "next": "token_id", "predicted": "predicted_id"}
"""What :func:`vocabulary` is about, and the variable that holds it."""


def _information(
    rows: Rows, documents: Documents, permutations: Permutations
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Information and normalized information (layer,), and the latter under permutation, (permutation, layer)."""
    null = np.full((max(permutations.n_permutations, 1), rows.n_layers), np.nan)
    if not documents.exchangeable:
        permutations = Permutations(0)
    joint_entropies = _of_tokens if documents.label is None else _of_documents
    of_experts = _entropy(grouped(rows.routing).group_counts()[0])
    for at, (joint, sizes) in enumerate(joint_entropies(rows, documents, permutations), start=-1):
        both = _entropy(sizes) + of_experts
        shared = np.maximum(both - joint, 0)
        if at < 0:
            information, normalized = shared, divide(2 * shared, both)
        else:
            null[at] = divide(2 * shared, both)
    return information, normalized, null


def _of_documents(
    rows: Rows, documents: Documents, permutations: Permutations
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Entropy of label and expert together (layer,), and how many tokens carry each label (label,).

    First of the recording as it is, then after every exchange of labels between whole documents.
    """
    assert documents.label is not None
    per_document = rows.whole.counts
    n_tokens = np.bincount(documents.of_token, minlength=documents.n_documents)
    labels = np.concatenate([documents.label[None], permutations.document_labels(documents.label)])
    for label, counts in zip(labels, label_sums(labels, per_document, rows.n_groups), strict=True):
        joint = _entropy(counts.swapaxes(0, 1).reshape(rows.n_layers, -1))
        yield joint, np.bincount(label, weights=n_tokens, minlength=rows.n_groups)


def _of_tokens(rows: Rows, documents: Documents, permutations: Permutations) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same for labels that are shuffled among the tokens of each document."""
    chosen = chosen_experts(rows)
    sizes = np.bincount(rows.group, minlength=rows.n_groups)
    yield _joint_entropy(chosen, rows.group, rows.n_groups, rows.n_experts), sizes
    for label in permutations.token_labels(rows.group, documents.of_token):
        yield _joint_entropy(chosen, label, rows.n_groups, rows.n_experts), sizes


def _joint_entropy(chosen: np.ndarray, label: np.ndarray, n_labels: int, n_experts: int) -> np.ndarray:
    """Entropy in nat of label (token,) and chosen expert (token, layer, slot) together, (layer,)."""
    n_tokens, n_layers, n_slots = chosen.shape
    n_cells = n_labels * n_experts
    if n_cells <= n_tokens * n_slots and n_cells * n_layers <= CELLS_AT_ONCE:
        counts = count(chosen, label, n_codes=n_labels, n_values=n_experts)
        return _entropy(counts.swapaxes(0, 1).reshape(n_layers, -1))
    dtype = np.min_scalar_type(n_cells)
    first_cell = label.astype(dtype)[:, None] * dtype.type(n_experts)
    entropy = np.empty(n_layers)
    for layer in range(n_layers):
        # most cells are empty: those that are not follow one another once sorted
        cell = np.sort((first_cell + chosen[:, layer]).ravel())
        ends = np.flatnonzero(cell[1:] != cell[:-1]) + 1
        entropy[layer] = _entropy(np.diff(ends, prepend=0, append=len(cell)))
    return entropy


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in nat of shares of counts, over the last axis; NaN where there are none."""
    return entr(share(counts)).sum(axis=-1)


def _p_values(observed: np.ndarray, null: np.ndarray, permutations: Permutations) -> tuple[np.ndarray, np.ndarray]:
    """From values (layer,) and (permutation, layer): adjusted by max-T, and by Benjamini & Yekutieli, (layer,)."""
    from scipy.stats import false_discovery_control  # loads for long, and only this needs it

    together, alone = np.full((2, len(observed)), np.nan)
    # The recording is one of the permutations: with it in mean and deviation all of them are treated alike.
    pooled = np.concatenate([observed[None], null])
    varies = pooled.std(axis=0) > 1e-12  # less is rounding
    if permutations.n_permutations and varies.any():
        scaled = (pooled[:, varies] - pooled[:, varies].mean(axis=0)) / pooled[:, varies].std(axis=0)
        together[varies] = permutations.p_value(scaled[0], scaled[1:].max(axis=1))
        by_layer = [permutations.p_value(value, drawn) for value, drawn in zip(scaled[0], scaled[1:].T, strict=True)]
        alone[varies] = false_discovery_control(by_layer, method="by")
    return together, alone


def _types(rows: Rows, of: str, min_count: int) -> _Types:
    """Number the types that occur often enough, and say which token is of which."""
    target = _TARGETS[of]
    schema.require(rows.routing, "sample", target)
    _, document = coded(rows.routing["sample"])
    _, code = coded(rows.routing[target])
    kept = None
    if of == "next":
        kept = _has_next(rows)
        document, code = document[kept], code[1:][kept[:-1]]
    occurrences = np.bincount(code)
    frequent = occurrences >= min_count
    n_types = int(np.count_nonzero(frequent))
    number = np.where(frequent, np.cumsum(frequent) - 1, n_types).astype(np.min_scalar_type(n_types))
    return _Types(number[code], n_types, document, kept)


def _has_next(rows: Rows) -> np.ndarray:
    """Whether the next row is the next position of the same sample, (token,)."""
    found = np.zeros(rows.n_tokens, bool)
    for block in rows.blocks("sample", "position", ahead=1):
        adjacent = block.is_followed
        found[block.start : block.start + len(adjacent)] = adjacent
    return found


def _largest_shares(chosen: np.ndarray, type_: np.ndarray, n_types: int, n_experts: int) -> np.ndarray:
    """The mean over types of the largest share that one expert took, (layer,)."""
    occurrences = np.bincount(type_, minlength=n_types)[:n_types]
    mean = np.empty(chosen.shape[1])
    at_once = max(CELLS_AT_ONCE // (n_types * n_experts), 1)
    for start in range(0, len(mean), at_once):
        layers = slice(start, start + at_once)
        counts = count(chosen[:, layers], type_, n_codes=n_types + 1, n_values=n_experts)[:n_types]
        mean[layers] = (counts.max(axis=-1) / occurrences[:, None]).mean(axis=0)
    return mean


def _random_groups(document: np.ndarray, seed: int) -> np.ndarray:
    """Groups of whole documents with equally many documents, at most 50: the number of each token's group."""
    present = np.unique(document)
    random = np.random.default_rng(seed)
    group = random.permutation(len(present)) % MAX_GROUPS
    return group.astype(np.uint8)[np.searchsorted(present, document)]


def _jackknife_error(chosen: np.ndarray, types: _Types, groups: np.ndarray, n_experts: int) -> np.ndarray:
    """Standard error of :func:`_largest_shares` from leaving out each group of documents in turn, (layer,)."""
    n_groups, n_layers = int(groups.max()) + 1, chosen.shape[1]
    if n_groups < MIN_DOCUMENTS:
        return np.full(n_layers, np.nan)
    order = np.argsort(types.type, kind="stable")
    edges = np.searchsorted(types.type[order], np.arange(types.n_types + 1))
    shares, n_defined = np.zeros((n_groups, n_layers)), np.zeros(n_groups)
    at_once = max(CELLS_AT_ONCE // (n_groups * n_experts), 1)
    for first in range(0, types.n_types, at_once):
        n_types = min(at_once, types.n_types - first)
        tokens = order[edges[first] : edges[first + n_types]]
        code = groups[tokens].astype(np.int64) * n_types + (types.type[tokens] - first)
        occurrences = np.bincount(code, minlength=n_groups * n_types).reshape(n_groups, n_types)
        left = occurrences.sum(axis=0) - occurrences
        n_defined += np.count_nonzero(left, axis=1)  # a type of one group is gone with it
        for layer in range(n_layers):
            taken = count(chosen[tokens, layer, None], code, n_codes=n_groups * n_types, n_values=n_experts)
            taken = taken.reshape(n_groups, n_types, n_experts)
            largest = (taken.sum(axis=0) - taken).max(axis=-1)
            shares[:, layer] += (largest / np.maximum(left, 1)).sum(axis=1)
    replicates = divide(shares, n_defined[:, None])
    squares = np.square(replicates - replicates.mean(axis=0)).sum(axis=0)
    return np.sqrt((n_groups - 1) / n_groups * squares)
