"""Every statistic of routing once more: slow, obvious, and independent of :mod:`probe`.

A recording is read into plain tuples, and each function counts over them in plain loops. Functions are named after the
statistics of ``probe.routing_stats``. They return one dictionary for each variable; its keys are tuples of labels in
the order of the variable's dims, such as ``(domain, layer, expert)``. What is undefined is NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise, product
from typing import NamedTuple

import xarray as xr

NAN = math.nan

Values = dict[tuple, float]


class Token(NamedTuple):
    """One row of ``/routing``; what a layer did stands at the layer's place, experts strongest first."""

    sample: int
    position: int
    token_id: int
    predicted_id: int | None
    labels: dict[str, object]
    chosen: tuple[tuple[int, ...], ...]
    margin: tuple[float, ...]
    logsumexp: tuple[float, ...]


class Text(NamedTuple):
    """One entry of ``/samples``; ``probability_sum`` by layer and expert."""

    number: int
    domain: str
    probability_sum: tuple[tuple[float, ...], ...]


class Recording(NamedTuple):
    """All that the statistics read; ``labels`` are the values that each coord on ``token`` can take."""

    tokens: list[Token]
    texts: list[Text]
    layers: list[int]
    n_experts: int
    top_k: int
    labels: dict[str, list]


COORDS = ("sample", "position", "token_id", "domain", "phase")


def read(recording: xr.DataTree) -> Recording:
    routing, samples = recording["routing"], recording["samples"]
    columns: dict[str, list] = {}
    labels: dict[str, list] = {}
    for name in COORDS:
        values, categories = routing[name].values.tolist(), routing[name].attrs.get("categories")
        columns[name] = values if categories is None else [categories[value] for value in values]
        labels[name] = sorted(set(values)) if categories is None else list(categories)
    n_tokens = len(columns["sample"])
    predicted = routing["predicted_id"].values.tolist() if "predicted_id" in routing else [None] * n_tokens
    chosen, margin = routing["expert_index"].values.tolist(), routing["router_margin"].values.tolist()
    logsumexp = routing["logit_logsumexp"].values.tolist()
    tokens = [
        Token(
            columns["sample"][row],
            columns["position"][row],
            columns["token_id"][row],
            predicted[row],
            {name: columns[name][row] for name in COORDS},
            tuple(tuple(slots) for slots in chosen[row]),
            tuple(margin[row]),
            tuple(logsumexp[row]),
        )
        for row in range(n_tokens)
    ]
    sums = samples["probability_sum"].values.tolist()
    texts = [
        Text(number, str(domain), tuple(tuple(layer) for layer in sums[number]))
        for number, domain in enumerate(samples["domain"].values.tolist())
    ]
    return Recording(
        tokens,
        texts,
        routing["layer"].values.tolist(),
        routing.sizes["expert"],
        routing.sizes["slot"],
        labels,
    )


def names_of(by: str | Sequence[str] | None) -> tuple[str, ...]:
    if by is None:
        return ()
    return (by,) if isinstance(by, str) else tuple(by)


def groups(recording: Recording, by: str | Sequence[str] | None) -> dict[tuple, list[Token]]:
    """The tokens of every combination of labels, those without a token included."""
    names = names_of(by)
    return {
        key: [token for token in recording.tokens if tuple(token.labels[name] for name in names) == key]
        for key in product(*(recording.labels[name] for name in names))
    }


def ratio(above: float, below: float) -> float:
    return above / below if below else NAN


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return ratio(math.fsum(values), len(values))


def counts_of(tokens: list[Token], place: int, n_experts: int) -> list[int]:
    """How often each expert was chosen at the layer that stands at ``place``."""
    counts = [0] * n_experts
    for token in tokens:
        for expert in token.chosen[place]:
            counts[expert] += 1
    return counts


def shares_of(tokens: list[Token], place: int, n_experts: int) -> list[float]:
    counts = counts_of(tokens, place, n_experts)
    return [ratio(count, sum(counts)) for count in counts]


def first_shares(tokens: list[Token], place: int, n_experts: int) -> list[float]:
    counts = Counter(token.chosen[place][0] for token in tokens)
    return [ratio(counts[expert], len(tokens)) for expert in range(n_experts)]


def quantile(values: Iterable[float], share: float) -> float:
    """Linear between the two values around the place ``share`` · (n − 1)."""
    ordered = sorted(values)
    if not ordered:
        return NAN
    place = Fraction(share) * (len(ordered) - 1)
    below = int(place)
    if below == len(ordered) - 1:
        return ordered[-1]
    return ordered[below] + float(place - below) * (ordered[below + 1] - ordered[below])


def entropy(shares: Iterable[float]) -> float:
    """In nats."""
    return -math.fsum(share * math.log(share) for share in shares if share > 0)


# One token at a time


def expert_load(recording: Recording, by=None) -> Values:
    return {
        (*key, layer, expert): share
        for key, tokens in groups(recording, by).items()
        for place, layer in enumerate(recording.layers)
        for expert, share in enumerate(shares_of(tokens, place, recording.n_experts))
    }


def n_documents(recording: Recording, by=None) -> Values:
    return {key: len({token.sample for token in tokens}) for key, tokens in groups(recording, by).items()}


def imbalance(recording: Recording, by=None) -> dict[str, Values]:
    columns: dict[str, Values] = {
        name: {} for name in ("max_violation", "coefficient_of_variation", "gini", "normalized_entropy")
    }
    n = recording.n_experts
    for key, tokens in groups(recording, by).items():
        for place, layer in enumerate(recording.layers):
            counts = counts_of(tokens, place, n)
            average = Fraction(sum(counts), n)
            label = (*key, layer)
            if not average:
                for values in columns.values():
                    values[label] = NAN
                continue
            variance = sum((count - average) ** 2 for count in counts) / n
            differences = sum(abs(one - other) for one in counts for other in counts)
            columns["max_violation"][label] = float((max(counts) - average) / average)
            columns["coefficient_of_variation"][label] = math.sqrt(variance) / float(average)
            columns["gini"][label] = float(differences / (2 * n * n * average))
            columns["normalized_entropy"][label] = (
                entropy(count / sum(counts) for count in counts) / math.log(n) if n > 1 else NAN
            )
    return columns


def balance_loss(recording: Recording, by=None) -> Values:
    """Split by nothing, by "domain" or by "sample": probabilities are kept as sums over samples."""
    result = {}
    for key, tokens in groups(recording, by).items():
        texts = recording.texts
        if by == "domain":
            texts = [text for text in texts if text.domain == key[0]]
        elif by == "sample":
            texts = [text for text in texts if text.number == key[0]]
        for place, layer in enumerate(recording.layers):
            load = shares_of(tokens, place, recording.n_experts)
            total = 0.0
            for expert in range(recording.n_experts):
                probability = math.fsum(text.probability_sum[place][expert] for text in texts)
                total += load[expert] * ratio(probability, len(tokens))
            result[(*key, layer)] = recording.n_experts * total
    return result


def z_loss(recording: Recording, by=None) -> Values:
    return {
        (*key, layer): mean(token.logsumexp[place] ** 2 for token in tokens)
        for key, tokens in groups(recording, by).items()
        for place, layer in enumerate(recording.layers)
    }


def margin(recording: Recording, quantiles: Sequence[float], by=None) -> dict[str, Values]:
    columns: dict[str, Values] = {"mean": {}, "tie_share": {}, "margin": {}}
    for key, tokens in groups(recording, by).items():
        for place, layer in enumerate(recording.layers):
            margins = [token.margin[place] for token in tokens if not math.isnan(token.margin[place])]
            columns["mean"][*key, layer] = mean(margins)
            columns["tie_share"][*key, layer] = mean(float(value == 0) for value in margins)
            for share in quantiles:
                columns["margin"][*key, layer, share] = quantile(margins, share)
    return columns


def margin_histogram(recording: Recording, edges: Sequence[float], by=None) -> Values:
    """By the number of the bin in place of its centre; a bin holds its lower edge, the last one both."""
    result = {}
    for key, tokens in groups(recording, by).items():
        for place, layer in enumerate(recording.layers):
            margins = [token.margin[place] for token in tokens if not math.isnan(token.margin[place])]
            for number in range(len(edges) - 1):
                result[(*key, layer, number)] = mean(float(in_bin(value, number, edges)) for value in margins)
    return result


def in_bin(value: float, number: int, edges: Sequence[float]) -> bool:
    last = number == len(edges) - 2
    return edges[number] <= value < edges[number + 1] or (last and value == edges[-1])


def specialization(recording: Recording, by="domain") -> dict[str, Values]:
    overall = expert_load(recording)
    shares = expert_load(recording, by)
    lift = {label: ratio(share, overall[label[-2:]]) for label, share in shares.items()}
    return {"share": shares, "lift": lift}


def coactivation(recording: Recording, by=None) -> dict[str, Values]:
    columns: dict[str, Values] = {"count": {}, "probability": {}}
    experts = range(recording.n_experts)
    for key, tokens in groups(recording, by).items():
        for place, layer in enumerate(recording.layers):
            together: Counter[tuple[int, int]] = Counter()
            for token in tokens:
                together.update(product(token.chosen[place], repeat=2))
            for one, other in product(experts, repeat=2):
                label = (*key, layer, one, other)
                columns["count"][label] = together[one, other]
                columns["probability"][label] = NAN if one == other else ratio(together[one, other], together[one, one])
    return columns


# What an expert has to do with what a token is


def mutual_information(recording: Recording, of="domain") -> dict[str, Values]:
    columns: dict[str, Values] = {"mutual_information": {}, "normalized": {}}
    for place, layer in enumerate(recording.layers):
        pairs = [(token.labels[of], expert) for token in recording.tokens for expert in token.chosen[place]]
        joint, n = Counter(pairs), len(pairs)
        of_label, of_expert = Counter(label for label, _ in pairs), Counter(expert for _, expert in pairs)
        information = math.fsum(
            count / n * math.log(count * n / (of_label[label] * of_expert[expert]))
            for (label, expert), count in joint.items()
        )
        entropies = entropy(count / n for count in of_label.values()) + entropy(
            count / n for count in of_expert.values()
        )
        determined = len(of_label) < 2 and len(of_expert) < 2
        columns["mutual_information"][layer,] = information if n else NAN
        columns["normalized"][layer,] = NAN if determined else 2 * information / entropies
    return columns


def vocabulary(recording: Recording, of: str, min_count: int) -> tuple[Values, int]:
    """The macro average by layer, and how many types reach the floor."""
    typed = []
    for row, token in enumerate(recording.tokens):
        if of == "input":
            typed.append((token.token_id, token))
        elif of == "predicted":
            typed.append((token.predicted_id, token))
        elif row + 1 < len(recording.tokens) and recording.tokens[row + 1].sample == token.sample:
            typed.append((recording.tokens[row + 1].token_id, token))
    occurrences = Counter(kind for kind, _ in typed)
    frequent = [kind for kind, n in occurrences.items() if n >= min_count]
    result = {}
    for place, layer in enumerate(recording.layers):
        shares = []
        for kind in frequent:
            taken = Counter(expert for other, token in typed if other == kind for expert in token.chosen[place])
            shares.append(max(taken.values()) / occurrences[kind])
        result[layer,] = mean(shares)
    return result, len(frequent)


def top_tokens(recording: Recording, min_count: int) -> dict[str, Values]:
    """Count, occurrences, share and lift by (layer, expert, token id), of ids with ``min_count`` occurrences."""
    columns: dict[str, Values] = {"count": {}, "occurrences": {}, "share": {}, "lift": {}}
    occurrences = Counter(token.token_id for token in recording.tokens)
    for place, layer in enumerate(recording.layers):
        for expert in range(recording.n_experts):
            takers = [token for token in recording.tokens if expert in token.chosen[place]]
            for token_id, n in occurrences.items():
                if n < min_count:
                    continue
                label = (layer, expert, token_id)
                count = sum(token.token_id == token_id for token in takers)
                columns["count"][label] = count
                columns["occurrences"][label] = n
                columns["share"][label] = count / n
                columns["lift"][label] = ratio(count / n, len(takers) / len(recording.tokens))
    return columns


# From token to token, and from layer to layer


def repetition(recording: Recording, by=None) -> dict[str, Values]:
    """A pair belongs to a group if both its tokens do."""
    columns: dict[str, Values] = {name: {} for name in ("repetition", "null", "either", "either_null", "n_pairs")}
    in_order = list(pairwise(recording.tokens))
    for key, tokens in groups(recording, by).items():
        names = names_of(by)
        pairs = [
            (one, other)
            for one, other in in_order
            if one.sample == other.sample
            and all(tuple(token.labels[name] for name in names) == key for token in (one, other))
        ]
        columns["n_pairs"][key] = len(pairs)
        for place, layer in enumerate(recording.layers):
            label = (*key, layer)
            columns["repetition"][label] = mean(
                float(one.chosen[place][0] == other.chosen[place][0]) for one, other in pairs
            )
            columns["either"][label] = mean(
                float(bool(set(one.chosen[place]) & set(other.chosen[place]))) for one, other in pairs
            )
            first = [token.chosen[place][0] for token in tokens]
            sets = [set(token.chosen[place]) for token in tokens]
            equal = sum(one == other for one in first for other in first)
            overlapping = sum(not one.isdisjoint(other) for one in sets for other in sets)
            columns["null"][label] = ratio(equal, len(tokens) ** 2)
            columns["either_null"][label] = ratio(overlapping, len(tokens) ** 2)
    return columns


def transition(recording: Recording) -> dict[str, Values]:
    """First choices, by (layer, expert, expert at the next MoE layer)."""
    columns: dict[str, Values] = {"probability": {}, "lift": {}, "count": {}}
    experts = range(recording.n_experts)
    for place, layer in enumerate(recording.layers[:-1]):
        both = Counter((token.chosen[place][0], token.chosen[place + 1][0]) for token in recording.tokens)
        here = Counter(token.chosen[place][0] for token in recording.tokens)
        load = first_shares(recording.tokens, place + 1, recording.n_experts)
        for one in experts:
            for other in experts:
                label = (layer, one, other)
                columns["count"][label] = both[one, other]
                columns["probability"][label] = ratio(both[one, other], here[one])
                columns["lift"][label] = ratio(columns["probability"][label], load[other])
    return columns


class Path(NamedTuple):
    expert: tuple[int, ...]
    count: int
    share: float
    expected: float
    lift: float


def paths(recording: Recording, layers: Sequence[int] | None = None) -> list[Path]:
    """Every path that a token took: the most frequent first, of equals the one of smaller experts."""
    places = [recording.layers.index(layer) for layer in (recording.layers if layers is None else layers)]
    taken = Counter(tuple(token.chosen[place][0] for place in places) for token in recording.tokens)
    loads = [first_shares(recording.tokens, place, recording.n_experts) for place in places]
    result = []
    for experts, count in sorted(taken.items(), key=lambda entry: (-entry[1], entry[0])):
        expected = 1.0
        for load, expert in zip(loads, experts, strict=True):
            expected *= load[expert]
        share = count / len(recording.tokens)
        result.append(Path(experts, count, share, expected, share / expected))
    return result


# Two recordings of the same tokens


def paired_groups(one: Recording, other: Recording, by) -> dict[tuple, list[tuple[Token, Token]]]:
    """The same token in both recordings, grouped by the first."""
    names = names_of(by)
    both = list(zip(one.tokens, other.tokens, strict=True))
    return {
        key: [pair for pair in both if tuple(pair[0].labels[name] for name in names) == key]
        for key in product(*(one.labels[name] for name in names))
    }


def saturation(one: Recording, other: Recording, by=None) -> dict[str, Values]:
    columns: dict[str, Values] = {"saturation": {}, "null": {}}
    for key, pairs in paired_groups(one, other, by).items():
        for place, layer in enumerate(one.layers):
            overlaps = [len(set(a.chosen[place]) & set(b.chosen[place])) / one.top_k for a, b in pairs]
            first = shares_of([a for a, _ in pairs], place, one.n_experts)
            second = shares_of([b for _, b in pairs], place, one.n_experts)
            columns["saturation"][*key, layer] = mean(overlaps)
            columns["null"][*key, layer] = one.top_k * math.fsum(f * g for f, g in zip(first, second, strict=True))
    return columns


def flips(one: Recording, other: Recording, by=None) -> dict[str, Values]:
    columns: dict[str, Values] = {"flips": {}, "token_flips": {}}
    for key, pairs in paired_groups(one, other, by).items():
        flipped = [[set(a.chosen[place]) != set(b.chosen[place]) for place in range(len(one.layers))] for a, b in pairs]
        columns["token_flips"][key] = mean(float(any(layers)) for layers in flipped)
        for place, layer in enumerate(one.layers):
            columns["flips"][*key, layer] = mean(float(layers[place]) for layers in flipped)
    return columns


def flips_by_margin(one: Recording, other: Recording, edges: Sequence[float]) -> dict[str, Values]:
    """By the bin of the margin in the first recording, and layer."""
    columns: dict[str, Values] = {"flips_by_margin": {}, "n_by_margin": {}}
    for number in range(len(edges) - 1):
        for place, layer in enumerate(one.layers):
            flipped = [
                set(a.chosen[place]) != set(b.chosen[place])
                for a, b in zip(one.tokens, other.tokens, strict=True)
                if in_bin(a.margin[place], number, edges)
            ]
            columns["flips_by_margin"][number, layer] = mean(map(float, flipped))
            columns["n_by_margin"][number, layer] = len(flipped)
    return columns


def load_shift(one: Recording, other: Recording) -> Values:
    before, after = expert_load(one), expert_load(other)
    return {label: after[label] - before[label] for label in before}


# Loads against loads


def jensen_shannon(first: list[int], second: list[int]) -> tuple[float, float]:
    """The divergence of two lists of counts, in nats, and the same normalized by arXiv 2510.04694 Eq. 2."""
    if not sum(first) or not sum(second):
        return NAN, NAN
    p, q = ([Fraction(count, sum(counts)) for count in counts] for counts in (first, second))
    divergence = 0.0
    for one, other in zip(p, q, strict=True):
        middle = (one + other) / 2
        for share in (one, other):
            if share:
                divergence += float(share) / 2 * math.log(share / middle)
    if len(set(p)) == 1 and len(set(q)) == 1:
        return divergence, NAN
    return divergence, divergence / (math.log(len(p)) - (entropy(map(float, p)) + entropy(map(float, q))) / 2)


def divergence(recording: Recording, by="domain") -> dict[str, Values]:
    """Between groups of one recording, by (group, other group, layer)."""
    columns: dict[str, Values] = {"jensen_shannon": {}, "normalized": {}}
    for place, layer in enumerate(recording.layers):
        counts = {key: counts_of(tokens, place, recording.n_experts) for key, tokens in groups(recording, by).items()}
        for one, first in counts.items():
            for other, second in counts.items():
                values = jensen_shannon(first, second)
                for name, value in zip(columns, values, strict=True):
                    columns[name][*one, *other, layer] = value
    return columns


def divergence_between(one: Recording, other: Recording, by=None) -> dict[str, Values]:
    """Between the same group of two recordings, by ([group,] layer)."""
    columns: dict[str, Values] = {"jensen_shannon": {}, "normalized": {}}
    theirs = groups(other, by)
    for key, tokens in groups(one, by).items():
        for place, layer in enumerate(one.layers):
            first = counts_of(tokens, place, one.n_experts)
            second = counts_of(theirs.get(key, []), place, one.n_experts)
            for name, value in zip(columns, jensen_shannon(first, second), strict=True):
                columns[name][*key, layer] = value
    return columns


def cosine(one: list[float], other: list[float]) -> float:
    inner = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return inner / math.sqrt(math.fsum(a * a for a in one)) / math.sqrt(math.fsum(b * b for b in other))


def signatures(recording: Recording, tokens: list[Token]) -> dict[int, list[float]]:
    """Expert frequencies of all layers, one after another, of every sample that has one of the tokens."""
    result = {}
    for text in recording.texts:
        own = [token for token in tokens if token.sample == text.number]
        if own:
            result[text.number] = [
                share for place in range(len(recording.layers)) for share in shares_of(own, place, recording.n_experts)
            ]
    return result


def signature(recording: Recording) -> Values:
    """By (sample, other sample), of those that have a token."""
    every = signatures(recording, recording.tokens)
    return {(one, other): cosine(first, second) for one, first in every.items() for other, second in every.items()}


def mean_signature(recording: Recording, by) -> dict[str, Values]:
    """By (group, other group): the mean over pairs of distinct samples, and how many there are, (a, b) and (b, a)."""
    columns: dict[str, Values] = {"signature": {}, "n_pairs": {}}
    every = {key: signatures(recording, tokens) for key, tokens in groups(recording, by).items()}
    for one, firsts in every.items():
        for other, seconds in every.items():
            cosines = [cosine(first, second) for a, first in firsts.items() for b, second in seconds.items() if a != b]
            columns["signature"][*one, *other] = mean(cosines)
            columns["n_pairs"][*one, *other] = len(cosines)
    return columns


# What the load costs


def batches(tokens: list[Token], size: int) -> list[list[Token]]:
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


def stretches(tokens: list[Token]) -> list[list[Token]]:
    """Tokens that stand side by side in one sample, kept together."""
    result: list[list[Token]] = []
    for token in tokens:
        last = result[-1][-1] if result else None
        if last and (last.sample, last.position + 1) == (token.sample, token.position):
            result[-1].append(token)
        else:
            result.append([token])
    return result


def dropped(batch: list[Token], place: int, most: int, n_experts: int) -> int:
    """Assignments that find their expert full when each takes the first ``most``."""
    filled = [0] * n_experts
    over = 0
    for token in batch:
        for expert in token.chosen[place]:
            if filled[expert] < most:
                filled[expert] += 1
            else:
                over += 1
    return over


def capacity(
    recording: Recording, tokens_per_batch: int, capacity_factors: Sequence[float], quantiles: Sequence[float]
) -> dict[str, Values]:
    """Share of assignments that find their expert full: of all, and quantiles over the batches of each one's own."""
    columns: dict[str, Values] = {"drop_share": {}, "batch_drop_share": {}}
    cut = batches(recording.tokens, tokens_per_batch)
    for factor in capacity_factors:
        for place, layer in enumerate(recording.layers):
            over = []
            for batch in cut:
                most = math.ceil(Fraction(factor) * len(batch) * recording.top_k / recording.n_experts)
                over.append(dropped(batch, place, most, recording.n_experts))
            columns["drop_share"][factor, layer] = ratio(sum(over), len(recording.tokens) * recording.top_k)
            own = [n / (len(batch) * recording.top_k) for n, batch in zip(over, cut, strict=True)]
            for share in quantiles:
                columns["batch_drop_share"][factor, layer, share] = quantile(own, share)
    return columns


def device_load(recording: Recording, device_of: Sequence[int], token_bytes: int) -> dict[str, Values]:
    """Loads of devices, where ``device_of`` says on which one each expert lies, and what tokens send to others.

    A token starts on any device with the same chance, goes to all others that hold one of its experts, and comes back.
    """
    columns: dict[str, Values] = {"device_load": {}, "imbalance": {}, "devices_per_token": {}, "sent_bytes": {}}
    devices = range(max(device_of) + 1)
    for place, layer in enumerate(recording.layers):
        loads = [0] * len(devices)
        for token in recording.tokens:
            for expert in token.chosen[place]:
                loads[device_of[expert]] += 1
        needed = [{device_of[expert] for expert in token.chosen[place]} for token in recording.tokens]
        for device in devices:
            columns["device_load"][layer, device] = ratio(loads[device], sum(loads))
        columns["imbalance"][layer,] = ratio(max(loads) * len(devices), sum(loads))
        columns["devices_per_token"][layer,] = mean(len(there) for there in needed)
        columns["sent_bytes"][layer,] = mean(
            2 * token_bytes * len(there - {home}) for there in needed for home in devices
        )
    return columns


def distinct_experts(recording: Recording, batch_sizes: Sequence[int], by=None) -> dict[str, Values]:
    """Experts that a batch touches: of independent tokens, and of those that follow one another in a sample."""
    columns: dict[str, Values] = {"distinct": {}, "consecutive": {}}
    for key, tokens in groups(recording, by).items():
        for size in batch_sizes:
            runs = [run for unbroken in stretches(tokens) for run in batches(unbroken, size) if len(run) == size]
            for place, layer in enumerate(recording.layers):
                holds = [
                    ratio(sum(expert in token.chosen[place] for token in tokens), len(tokens))
                    for expert in range(recording.n_experts)
                ]
                columns["distinct"][*key, layer, size] = math.fsum(1 - (1 - share) ** size for share in holds)
                columns["consecutive"][*key, layer, size] = mean(
                    len({expert for token in run for expert in token.chosen[place]}) for run in runs
                )
    return columns


def uniform_distinct_experts(recording: Recording, batch_sizes: Sequence[int]) -> Values:
    """What ``distinct`` is where a token's set is any of all the sets of k experts, with the same chance."""
    missed = Fraction(recording.n_experts - recording.top_k, recording.n_experts)
    return {(size,): float(recording.n_experts * (1 - missed**size)) for size in batch_sizes}


# What experts put out, from /experts


class Output(NamedTuple):
    """What one sample's tokens made of one expert."""

    sample: int
    layer: int
    expert: int
    n_tokens: int
    saliency_sum: float
    output_max: float


def read_outputs(recording: xr.DataTree) -> list[Output]:
    experts, samples = recording["experts"], recording["samples"]
    counts, sums, largest = (
        variable.values.tolist()
        for variable in (samples["expert_count"], experts["saliency_sum"], experts["output_max"])
    )
    return [
        Output(
            sample, layer, expert, counts[sample][place][expert], sums[sample][place][expert],
            largest[sample][place][expert],
        )
        for sample in range(samples.sizes["sample"])
        for place, layer in enumerate(experts["layer"].values.tolist())
        for expert in range(experts.sizes["expert"])
    ]  # fmt: skip


def saliency(recording: Recording, outputs: list[Output]) -> Values:
    """Mean over an expert's tokens of the norm of what it adds."""
    result = {}
    for layer in recording.layers:
        for expert in range(recording.n_experts):
            own = [output for output in outputs if (output.layer, output.expert) == (layer, expert)]
            total = math.fsum(output.saliency_sum for output in own)
            result[layer, expert] = ratio(total, sum(output.n_tokens for output in own))
    return result


def super_experts(recording: Recording, outputs: list[Output]) -> tuple[dict[str, Values], float, float]:
    """By (layer, expert), and the two thresholds: the 99.5 % quantile of the experts, and a tenth of the largest."""
    columns: dict[str, Values] = {"output_max": {}, "is_super": {}, "sample_share": {}}
    own = {
        (layer, expert): [
            output.output_max
            for output in outputs
            if (output.layer, output.expert) == (layer, expert) and output.n_tokens
        ]
        for layer in recording.layers
        for expert in range(recording.n_experts)
    }
    largest = [max(values) for values in own.values() if values]
    percentile, tenth = quantile(largest, 0.995), max(largest, default=NAN) / 10
    for label, values in own.items():
        beyond = [value > percentile and value > tenth for value in values]
        columns["output_max"][label] = max(values, default=NAN)
        columns["is_super"][label] = any(beyond)
        columns["sample_share"][label] = mean(map(float, beyond))
    return columns, percentile, tenth
