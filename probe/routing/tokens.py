"""Which tokens an expert attracts, and where; part of ``probe.routing_stats``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy.special import expit

from probe import schema
from probe.bootstrap import MIN_DOCUMENTS, MIN_EFFECTIVE, Bootstrap, divide
from probe.counting import count
from probe.routing.rows import Routing, Rows, coded, coords_on, grouped
from probe.schema import ROWS_AT_ONCE, ProbeError
from probe.text_view import piece_label

CELLS_AT_ONCE = 1 << 23
"""Cells of the table (token type, layer, expert) in memory at once; where there are more, layers are taken in turns."""

DECISIONS_AT_ONCE = 1 << 19
"""Decisions that are brought into the order of their types at once: they stay in a core's cache."""

OCCURRENCES_AT_ONCE = 1 << 18
"""Occurrences of candidates that are looked up at once."""


def top_tokens(routing: Routing, *, n: int = 10, min_count: int = 20, level: float = 0.95) -> xr.Dataset:
    """The tokens that each expert attracts most.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), ``sample`` and ``token_id`` (token), or a recording
        that holds it.
    n : how many tokens an expert gets at most.
    min_count : how often a token must occur in the recording to be considered.
    level : coverage of the interval whose lower bound ranks the tokens.

    Returns
    -------
    Dataset (row), a flat table, since an expert may have fewer than ``n`` tokens. Coords: ``layer``,
    ``attention_kind``, ``expert``, ``rank`` (from 1) and ``token_id``. Variables: ``count``, how often the expert took
    the token; ``occurrences`` of the token; ``n_documents`` that hold it; ``share``, the first over the second;
    ``lift``, that share over the share of all tokens that the expert took; their lower bounds ``share_lower`` and
    ``lift_lower``. Sorted by layer, expert and rank: by lower bound, then share, then count, then the smaller id.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        If ``n`` or ``min_count`` is less than 1, or for a level outside (0, 1).

    Notes
    -----
    The floor is that of vocabulary specialisation, Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), §5.4: a token
    that occurs once goes to one expert all of the time, so without a floor the rarest tokens lead every list. In any
    case the expert took the token at least twice.

    Tokens are ranked by what is certain, not by the share itself: 20 of 20 in one document is weaker evidence than 475
    of 500 in thirty. The bound is Wilson's (1927), which has a closed form, for n_eff independent choices, with
    Student's t for few documents: n_eff = M / max(effect, 1) for M occurrences. The design effect of a share p is its
    variance over p (1 - p) / M. The variance is that of a ratio of two sums over the D documents that hold the token,
    D / (D - 1) · Σ_d (n_d - p m_d)² / M², where d holds the token m_d times and the expert took n_d of them. The
    effective number of documents less one, (Σ m_d)² / Σ m_d² - 1, are the degrees of freedom.

    A share of 1 shows no variance. Its design effect is that of Kish 1965, 1 + r (Σ m_d² / M - 1); r is the layer's
    intra-document correlation, how much more often than by chance two successive occurrences of a token in a document
    choose the same expert. Below 5 documents no variance is to be trusted, and a whole document is taken to be worth
    one choice: in a recording of one document the order is that of the shares.

    The bound of the lift takes the expert's share of all tokens as known. It does not reckon with having picked the
    largest of many.
    """
    bootstrap = Bootstrap(level)
    for name, value in {"n": n, "min_count": min_count}.items():
        if value < 1:
            raise ProbeError(f"{name} is {value}, it must be at least 1")
    schema.require(grouped(routing).routing, "token_id", "sample")
    types = _types(grouped(routing), min_count)
    n_layers = types.rows.n_layers
    at_once = max(CELLS_AT_ONCE // max(types.n_types * types.rows.n_experts, 1), 1)
    best = [_best(types, slice(start, start + at_once), n, bootstrap) for start in range(0, max(n_layers, 1), at_once)]
    return _token_table(types, best).assign_attrs(level=level)


def token_contexts(
    recording: xr.DataTree, *, layer: int, expert: int, token_id: int, n: int = 5, width: int = 8
) -> xr.Dataset:
    """Places where an expert took a token, with the text around them.

    Parameters
    ----------
    recording : a whole recording: ``/routing`` and ``/vocabulary`` are read.
    layer : the decoder's own index of the layer.
    expert : number of the expert.
    token_id : id of the token.
    n : how many places at most.
    width : how many tokens to show on each side, fewer at the ends of a sample.

    Returns
    -------
    Dataset (context): the text ``before``, ``token`` and ``after``; ``gate``, the sigmoid of the router's logit, units
    "1"; ``margin``, in logits. Coords: ``sample`` and ``position`` of the token; the scalars ``layer``, ``expert`` and
    ``token_id``. Every sample gives its first place before any gives its second; in the order of the recording. Without
    any where the expert never took the token. Bytes that are not whole characters are shown in hexadecimal.

    Raises
    ------
    SchemaError
        If a group or a variable is missing; names it.
    ProbeError
        If there is no such layer, expert or token, says which there are; for ``n`` below 1 or ``width`` below 0.
    """
    routing, vocabulary = schema.group(recording, "routing"), schema.group(recording, "vocabulary")
    schema.require(vocabulary, "token_id", "piece")
    for name, value, least in (("n", n, 1), ("width", width, 0)):
        if value < least:
            raise ProbeError(f"{name} is {value}, it must be at least {least}")
    schema.require(routing, "router_logit", "router_margin", "token_id", "sample", "position")
    everywhere = grouped(routing)
    schema.require_layer(layer, routing["layer"].values.tolist())
    require_expert(expert, everywhere.n_experts)
    known = vocabulary["token_id"].values
    if token_id not in known:
        raise ProbeError(
            f"token {token_id} does not occur in this recording: /vocabulary lists the {len(known)} ids that do, "
            f"such as {', '.join(map(str, known[:5].tolist()))}"
        )
    rows = grouped(routing.sel(layer=[layer]))
    places = _places(rows, expert, token_id, n)
    windows = [_window(routing, int(place), width) for place in places]
    ids = np.concatenate([np.zeros(0, np.int64), *(part for window in windows for part in window)])
    pieces = schema.pieces(vocabulary.isel(entry=np.isin(known, [*ids, token_id])))
    found = rows.routing.isel(token=places)
    at = Rows(found, rows.group[places], {})
    slot = (at.chosen[:, 0] == expert).argmax(axis=-1)
    logit = at.values("router_logit")[np.arange(len(places)), 0, slot].astype(np.float64)
    texts = {
        "before": ([_text(pieces, before) for before, _ in windows], "text before the token"),
        "token": ([piece_label(pieces[token_id])] * len(places), "text of the token"),
        "after": ([_text(pieces, after) for _, after in windows], "text after the token"),
    }
    numbers = {
        "gate": (expit(logit), "gate of the expert", "1"),
        "margin": (
            at.values("router_margin")[:, 0].astype(np.float64),
            schema.ROUTING["router_margin"].long_name,
            "logit",
        ),
    }
    scalars = {"layer": layer, "expert": expert, "token_id": token_id}
    return xr.Dataset(
        {
            name: ("context", np.array(values, np.dtypes.StringDType()), {"long_name": long_name, "units": "1"})
            for name, (values, long_name) in texts.items()
        }
        | {
            name: ("context", values, {"long_name": long_name, "units": units})
            for name, (values, long_name, units) in numbers.items()
        },
        coords={
            name: ("context", found[name].values, {"long_name": schema.ROUTING[name].long_name, "units": "1"})
            for name in ("sample", "position")
        }
        | {
            name: ((), value, {"long_name": schema.ROUTING[name].long_name, "units": "1"})
            for name, value in scalars.items()
        },
    )


def require_expert(expert: int, n_experts: int) -> None:
    """Raise a ProbeError that says which experts there are, unless ``expert`` is one of them."""
    if not 0 <= expert < n_experts:
        raise ProbeError(f"there is no expert {expert}: a layer of this recording has experts 0 to {n_experts - 1}")


class _Part(NamedTuple):
    """A run of whole documents, and the order that puts the rows of a type together, document by document."""

    rows: slice
    order: np.ndarray
    """(token,) rows of the part by type, uint32."""
    code: np.ndarray
    """(token,) type of each, in that order."""
    begins: np.ndarray
    """(token,) whether a type or a document begins here, in that order."""


@dataclass(frozen=True)
class _Types:
    """The token types that occur often enough, and where they occur; rows are sorted by document."""

    rows: Rows
    ids: np.ndarray
    """(type,) token ids, ascending."""
    occurrences: np.ndarray
    """(type,)"""
    code: np.ndarray
    """(token,) number of each token's type, of the smallest dtype; ``n_types`` stands for all rare ones."""
    document: np.ndarray
    """(token,) number of each token's document, ascending; of the smallest dtype."""

    @property
    def n_types(self) -> int:
        """How many types there are."""
        return len(self.ids)

    @cached_property
    def parts(self) -> list[_Part]:
        """All rows, in parts of about ``ROWS_AT_ONCE``; no document is cut in two."""
        edges = np.append(np.flatnonzero(self.document[1:] != self.document[:-1]) + 1, len(self.document))
        parts, start = [], 0
        while start < len(self.document):
            next_edge, last = np.searchsorted(edges, [start, start + ROWS_AT_ONCE], side="right")
            rows = slice(start, int(edges[max(next_edge, last - 1)]))
            order = np.argsort(self.code[rows], kind="stable").astype(np.uint32)
            code, document = self.code[rows][order], self.document[rows][order]
            begins = np.ones(len(order), bool)
            begins[1:] = (code[1:] != code[:-1]) | (document[1:] != document[:-1])
            parts.append(_Part(rows, order, code, begins))
            start = rows.stop
        return parts

    @cached_property
    def spread(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents that hold a type, and the sum over them of squared occurrences, each (type,)."""
        n_documents, squares = np.zeros((2, self.n_types + 1), np.int64)
        for part in self.parts:
            first = np.flatnonzero(part.begins)
            code, held = part.code[first], np.diff(first, append=len(part.code))
            n_documents += np.bincount(code, minlength=self.n_types + 1)
            squares += np.bincount(code, np.square(held), minlength=self.n_types + 1).astype(np.int64)
        return n_documents[:-1], squares[:-1]


class _Best(NamedTuple):
    """The tokens that experts attract most: one row for each, sorted by layer, expert and rank."""

    layer: np.ndarray
    expert: np.ndarray
    rank: np.ndarray
    type: np.ndarray
    times: np.ndarray
    """How often the expert took the token."""
    bound: np.ndarray
    """Lower bound of the share."""
    load: np.ndarray
    """Share of all tokens that the expert took."""


def _types(rows: Rows, min_count: int) -> _Types:
    """The types that occur at least ``min_count`` times."""
    ids, code = coded(rows.routing["token_id"])
    document = coded(rows.routing["sample"])[1]
    if (document[1:] < document[:-1]).any():
        order = np.argsort(document, kind="stable")
        rows = Rows(rows.routing.isel(token=order), rows.group, {})
        code, document = code[order], document[order]
    occurrences = np.bincount(code, minlength=len(ids))
    frequent = occurrences >= min_count
    n_types = int(frequent.sum())
    number = np.full(len(ids), n_types, np.min_scalar_type(n_types))
    number[frequent] = np.arange(n_types)
    return _Types(rows, ids[frequent], occurrences[frequent], number[code], document)


def _best(types: _Types, layers: slice, n: int, bootstrap: Bootstrap) -> _Best:
    """The ``n`` tokens with the largest lower bounds for each expert of some layers.

    No bound exceeds that of as many independent choices as the token occurs. So the variance is computed for the
    tokens that lead by that, and then for those that could still overtake one of the best ``n``.
    """
    rows = Rows(types.rows.routing.isel(layer=layers), types.rows.group, {})
    counts, load, correlation = _attraction(types, rows)
    n_documents, squares = types.spread
    times = types.occurrences.astype(float)
    worth = divide(np.square(times), squares)  # documents of one size, Kish 1965
    few = (n_documents < MIN_DOCUMENTS) | ~(worth >= MIN_EFFECTIVE)
    quantile = np.where(few, bootstrap.t(np.inf), bootstrap.t(worth))
    independent = np.square(quantile) / np.where(few, worth, times)
    constant = independent[:, None] * np.where(few[:, None], 1, 1 + correlation * (squares / times - 1)[:, None])

    shares = counts / times[:, None, None]
    bound = _wilson(shares, independent[:, None, None])
    bound = np.where(shares == 1, _wilson(np.ones(()), constant)[:, :, None], bound)
    bound[counts < 2] = -1
    final = few[:, None, None] | (shares == 1) | (counts < 2)

    for first in (True, False):
        least = _nth_largest(bound if first else np.where(final, bound, -1), n)
        cells = np.nonzero((bound >= least) & ~final)
        type_, share_ = cells[0], shares[cells]
        variance = _variance(types, rows, cells, share_)
        effect = np.maximum(variance * times[type_] / (share_ * (1 - share_)), 1)
        bound[cells] = _wilson(share_, independent[type_] * effect)
        final[cells] = True

    type_, layer, expert = cells = np.nonzero((bound >= _nth_largest(bound, n)) & (counts >= 2))
    order = np.lexsort((type_, -counts[cells], -shares[cells], -bound[cells], expert, layer))
    type_, layer, expert = (place[order] for place in cells)
    begins = np.flatnonzero(np.diff(layer * rows.n_experts + expert, prepend=-1))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order))) + 1
    kept = rank <= n
    type_, layer, expert = type_[kept], layer[kept], expert[kept]
    return _Best(
        layers.start + layer,
        expert,
        rank[kept],
        type_,
        counts[type_, layer, expert],
        bound[type_, layer, expert],
        load[layer, expert],
    )


def _part_of(rows: Rows, place: slice) -> Rows:
    """A run of rows."""
    return Rows(rows.routing.isel(token=place), rows.group[place], {})


def _attraction(types: _Types, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each expert took each type, (type, layer, expert), and what that compares with.

    Also the share of all tokens that each expert took, (layer, expert), and the intra-document correlation of choices,
    (layer,): 0 where the occurrences of a type in one document choose as independently as those in the whole
    recording, 1 where they all choose the same.
    """
    counts = np.zeros((types.n_types + 1, rows.n_layers, rows.n_experts), np.int64)
    n_pairs, agreements = np.zeros(types.n_types + 1), np.zeros(rows.n_layers)
    at_once = max(DECISIONS_AT_ONCE // max(rows.n_layers * rows.top_k, 1), 1)
    for part in types.parts:
        chosen = _part_of(rows, part.rows).chosen
        successive = ~part.begins[1:] & (part.code[1:] < types.n_types)
        n_pairs += np.bincount(part.code[1:][successive], minlength=types.n_types + 1)
        for start in range(0, len(part.order), at_once):
            # One row more than are counted: the last one's successor.
            some, choices = slice(start, start + at_once), chosen[part.order[start : start + at_once + 1]]
            code = part.code[some].astype(np.int64)
            first, last = code[0], code[-1]  # they ascend
            found = count(choices[: len(code)], code - first, n_codes=last - first + 1, n_values=rows.n_experts)
            counts[first : last + 1] += found
            pair = successive[some, None]
            for i in range(rows.top_k):
                for j in range(rows.top_k):
                    agreements += ((choices[1:, :, i] == choices[:-1, :, j]) & pair).sum(axis=0)
    load = divide(counts.sum(axis=0), np.asarray(rows.n_tokens))
    counts, n_pairs = counts[:-1], n_pairs[:-1]
    # Chance: two occurrences of the type, drawn from the whole recording without replacement.
    drawn = types.occurrences * (types.occurrences - 1.0)
    alike = divide(np.einsum("tle,tle->tl", counts, counts - 1, dtype=float), drawn[:, None] * rows.top_k)
    by_chance = n_pairs @ np.nan_to_num(alike)
    correlation = divide(agreements / rows.top_k - by_chance, n_pairs.sum() - by_chance)
    return counts, load, np.clip(np.nan_to_num(correlation, nan=1), 0, 1)


def _variance(types: _Types, rows: Rows, cells: tuple[np.ndarray, ...], shares: np.ndarray) -> np.ndarray:
    """Variance of the ``shares`` of some cells (type, layer, expert), from what documents say of them: (cell,)."""
    of_type, layer, expert = cells
    taken_twice, taken_held = np.zeros((2, len(of_type)))  # Σ n_d², Σ n_d m_d
    for part in types.parts:
        chosen = _part_of(rows, part.rows).chosen
        occurrences = np.bincount(part.code, minlength=types.n_types + 1)
        first = np.cumsum(occurrences) - occurrences
        n_rows = occurrences[of_type]
        ends = np.cumsum(n_rows)
        start = 0
        while start < len(of_type):
            before = ends[start] - n_rows[start]
            stop = max(int(np.searchsorted(ends, before + OCCURRENCES_AT_ONCE, side="right")), start + 1)
            some = slice(start, stop)
            cell = np.repeat(np.arange(start, stop), n_rows[some])
            place = np.arange(len(cell)) + (first[of_type[some]] - (ends[some] - n_rows[some]) + before)[cell - start]
            took = (chosen[part.order[place], layer[cell]] == expert[cell, None]).any(axis=-1)
            begins = np.flatnonzero(part.begins[place])
            held = np.diff(begins, append=len(cell))
            taken = np.add.reduceat(took, begins, dtype=np.int64) if len(begins) else held
            taken_twice += np.bincount(cell[begins], np.square(taken), minlength=len(of_type))
            taken_held += np.bincount(cell[begins], taken * held, minlength=len(of_type))
            start = stop
    n_documents, squares = (each[of_type] for each in types.spread)
    spread = taken_twice - 2 * shares * taken_held + np.square(shares) * squares
    return spread * n_documents / (n_documents - 1) / np.square(types.occurrences[of_type], dtype=float)


def _nth_largest(bound: np.ndarray, n: int) -> np.ndarray:
    """The n-th largest bound of each layer and expert, from (type, layer, expert); -1 where there are fewer."""
    if len(bound) < n:
        return np.full(bound.shape[1:], -1.0)
    return np.partition(bound, len(bound) - n, axis=0)[len(bound) - n]


def _wilson(shares: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Wilson's lower bound of shares; ``uncertainty`` is the quantile squared over the number of choices."""
    reach = np.sqrt(uncertainty * shares * (1 - shares) + np.square(uncertainty) / 4)
    return (shares + uncertainty / 2 - reach) / (1 + uncertainty)


def _token_table(types: _Types, best: list[_Best]) -> xr.Dataset:
    """The flat table of the best tokens of some runs of layers."""
    found = _Best(*(np.concatenate(columns) for columns in zip(*best, strict=True)))
    n_documents, _ = types.spread
    occurrences = types.occurrences[found.type]
    shares = divide(found.times, occurrences)
    coords = {
        name: xr.Variable("row", label.values[place], label.attrs)
        for dim, place in {"layer": found.layer, "expert": found.expert}.items()
        for name, label in coords_on(types.rows.routing, (dim,)).items()
    }
    columns = {
        "rank": (found.rank, "rank of the token for the expert, from 1", "1"),
        "token_id": (types.ids[found.type], "id in the tokenizer's vocabulary", "1"),
        "count": (found.times, "how often the expert took the token", "token"),
        "occurrences": (occurrences, "how often the token occurs", "token"),
        "n_documents": (n_documents[found.type], "documents that hold the token", "document"),
        "share": (shares, "share of the token's occurrences that the expert took", "1"),
        "share_lower": (found.bound, "lower bound of the share", "1"),
        "lift": (divide(shares, found.load), "share over the expert's share of all tokens", "1"),
        "lift_lower": (divide(found.bound, found.load), "lower bound of the lift", "1"),
    }
    table = {
        name: xr.Variable("row", values, {"long_name": long_name, "units": units})
        for name, (values, long_name, units) in columns.items()
    }
    return xr.Dataset(table, coords).set_coords(["rank", "token_id"])


def _places(rows: Rows, expert: int, token_id: int, n: int) -> np.ndarray:
    """Rows where the expert of the only layer took the token: the first of each sample, then the second, and so on."""
    place, sample = np.zeros((2, 0), np.int64)
    nth = np.zeros(0, np.int64)
    for block in rows.blocks("expert_index", "token_id", "sample"):
        here = np.flatnonzero(block.values("token_id") == token_id)
        here = here[(block.chosen[here, 0] == expert).any(axis=-1)]
        place = np.concatenate([place, here + block.start])
        sample = np.concatenate([sample, block.sample[here]])
        nth = _nth_of_its_kind(sample)
        kept = nth < n
        place, sample, nth = place[kept], sample[kept], nth[kept]
        if np.count_nonzero(nth == 0) >= n:
            break
    return place[np.lexsort((place, nth))][:n]


def _nth_of_its_kind(values: np.ndarray) -> np.ndarray:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    begins = np.flatnonzero(np.diff(values[order], prepend=-1))
    nth = np.empty(len(values), np.int64)
    nth[order] = np.arange(len(values)) - np.repeat(begins, np.diff(begins, append=len(values)))
    return nth


def _window(routing: xr.Dataset, place: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of up to ``width`` tokens before and after a row that are its neighbours in the sample."""
    first = max(place - width, 0)
    rows = routing[["sample", "position", "token_id"]].isel(token=slice(first, place + width + 1))
    at = place - first
    sample, position = rows["sample"].values, rows["position"].values.astype(np.int64)
    steps = np.arange(len(sample)) - at
    near = (sample == sample[at]) & (position - position[at] == steps)
    ids = rows["token_id"].values.astype(np.int64)
    return ids[near & (steps < 0)], ids[near & (steps > 0)]


def _text(pieces: Mapping[int, bytes], ids: np.ndarray) -> str:
    """What consecutive tokens say; bytes at the ends that are part of a character are shown as a lone token's are."""
    text = b"".join(pieces[int(token)] for token in ids).decode("utf-8", errors="surrogateescape")
    return re.sub("[\udc80-\udcff]+", lambda found: piece_label(found[0].encode("utf-8", "surrogateescape")), text)
