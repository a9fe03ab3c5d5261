"""Heads that copy: out of a needle, or what came after the same token before; part of ``probe.attention_maps``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from probe import schema
from probe.attention.heads import mean_over_samples
from probe.attention.queries import PER_HEAD, Attention, arrays, cells_of, queries_of, statistic_of
from probe.schema import ProbeError, SchemaError

Span = tuple[int, int]
"""First position, and the one after the last."""

Spans = Span | Sequence[Span]
"""One for all samples, or one for each."""

NEEDLE = "needle"
"""Name of the segment that :func:`needle_score` looks at."""

NEEDLE_VARIABLES = ("top_key", "segment_mass", "key_rank")

POSITION_BITS = 32
"""Of a sample's number and a position in one integer."""


def needle_score(attention: Attention, *, needle: Spans, answer: Spans) -> xr.Dataset:
    """Heads that fetch an answer out of the place in the text where it was given.

    Parameters
    ----------
    attention : a recording with ``top_key``, and ``segment_mass`` and ``key_rank`` of a segment named "needle"; or its
        ``/attention`` alone, if all queries were recorded.
    needle : positions of the needle, (start, stop), half open; one for all samples, or one for each sample of the
        recording.
    answer : positions of the queries that copy, (start, stop), in the same way. Query q predicts token q + 1: the
        queries of an answer whose tokens stand at a to b - 1 are (a - 1, b - 1).

    Returns
    -------
    Dataset (layer, head): ``score``, units "1", the share of the copying queries whose heaviest key lies in the needle
    and holds the very token that the query is to predict; ``mass``, units "1", what they give the needle; ``rank``, how
    many keys are heavier for them than all of the needle, NaN where they cannot see it. NaN where no copying query was
    recorded.

    Raises
    ------
    SchemaError
        If a variable or the segment is missing, says how to record it; if the tokens that are to be copied are not
        known because only some queries were recorded and one group was handed instead of the recording.
    ProbeError
        For positions that are none, or a copying query that is the last of its sample.

    Notes
    -----
    The retrieval score of Wu et al. 2024 (arXiv 2404.15574), teacher-forced: the answer is in the text and its tokens
    count as copied. There a head of 0.1 and more is a retrieval head. The mean is over a sample's copying queries, then
    over samples.
    """
    data = queries_of(attention)
    for name in NEEDLE_VARIABLES:
        statistic_of(data, name)
    schema.require(data, "segment", "token_id")
    segments = [str(name) for name in data["segment"].values]
    if NEEDLE not in segments:
        raise SchemaError(
            f"no segment named {NEEDLE!r} was recorded: record(…, attention=AttentionSpec(segments={{'needle': "
            f"(start, stop)}})) adds it; recorded are {', '.join(segments)}"
        )
    sample, position = (data[name].values.astype(np.int64) for name in ("sample", "position"))
    n_samples = int(sample.max(initial=-1)) + 1
    needles, answers = _spans("needle", needle, n_samples), _spans("answer", answer, n_samples)
    start, stop = answers[sample].T
    rows = np.flatnonzero((position >= start) & (position < stop))

    copying = data[list(NEEDLE_VARIABLES)].isel(query=rows, segment=segments.index(NEEDLE))
    token_at = _token_table(attention, data)
    copied = token_at(sample[rows], position[rows] + 1)
    key = copying["top_key"].isel(slot=0).transpose(*PER_HEAD).values
    start, stop = needles[sample[rows]].T[..., None, None]
    in_needle = (key >= start) & (key < stop)
    query = np.nonzero(in_needle)[0]
    is_copy = np.zeros(key.shape)
    is_copy[in_needle] = token_at(sample[rows][query], key[in_needle].astype(np.int64)) == copied[query]

    cells = cells_of(copying)
    measured = {
        "score": (xr.DataArray(is_copy, dims=PER_HEAD), "share of copying queries that attend most to what they copy"),
        "mass": (statistic_of(copying, "segment_mass"), "attention mass of copying queries on the needle"),
        "rank": (statistic_of(copying, "key_rank"), "visible keys heavier for copying queries than all of the needle"),
    }
    columns = {name: (mean_over_samples(values, cells), words, "1") for name, (values, words) in measured.items()}
    return xr.Dataset(arrays(data, ("layer", "head"), columns))


def induction_score(attention: Attention, *, period: int) -> xr.DataArray:
    """Heads that look for what came after the same token the last time, on a sequence that repeats.

    Parameters
    ----------
    attention : Dataset with ``offset_mass`` (query, layer, head, offset) that holds the offset ``period - 1``, or a
        recording that holds it; of texts that repeat with this period from their first token.
    period : after how many tokens the text repeats.

    Returns
    -------
    DataArray (layer, head), units "1": the mean weight that queries of the second and later repeats give the key
    ``period - 1`` tokens back, the one after the same token's last place. NaN where no such query was recorded.

    Raises
    ------
    SchemaError
        If no offsets, or not this one, were recorded; says how to record it.
    ProbeError
        For a period less than 2.

    Notes
    -----
    The diagonal of the pattern at offset 1 - period, as TransformerLens scores heads, on the sequences of random tokens
    of Olsson et al. 2022 (arXiv 2209.11895). Queries before position ``period`` have nothing to look back to and are
    left out. The mean is over a sample's queries, then over samples. In a RoPE layer the key may lie in another chunk;
    its weight is then 0.
    """
    if not isinstance(period, int | np.integer) or period < 2:
        raise ProbeError(f"period is {period!r}, it must be a whole number of at least 2")
    data = queries_of(attention)
    variable = statistic_of(data, "offset_mass")
    offset = int(period) - 1
    if "offset" not in variable.dims:
        raise SchemaError(
            "/attention/offset_mass has lost the dim 'offset': select with a list, such as sel(offset=[3])"
        )
    schema.require(data, "offset")
    if offset not in (known := data["offset"].values.tolist()):
        raise SchemaError(
            f"offset {offset} was not recorded: record(…, attention=AttentionSpec(offsets=[{offset}])) adds it; "
            f"recorded are {', '.join(map(str, known))}"
        )
    cells = cells_of(data, group=np.where(data["position"].values >= period, 0, -1))
    score = mean_over_samples(variable.sel(offset=offset, drop=True), cells)
    long_name = f"mean weight of the key {offset} tokens back, from the second repeat on"
    return arrays(data, ("layer", "head"), {"induction_score": (score, long_name, "1")})["induction_score"]


def _spans(name: str, spans: Spans, n_samples: int) -> np.ndarray:
    """Start and stop for every sample, int64 (sample, 2), or a ProbeError."""
    try:
        given = np.asarray(spans)
    except ValueError:  # pairs and something else
        given = np.empty(0)
    if given.shape == (2,):
        given = np.broadcast_to(given, (n_samples, 2))
    if given.ndim != 2 or given.shape[1] != 2 or len(given) < n_samples or given.dtype.kind not in "iu":
        raise ProbeError(
            f"{name} must be (start, stop), or one such pair for each of the {n_samples} samples, got {spans!r:.80}"
        )
    if (wrong := (given[:, 0] < 0) | (given[:, 1] <= given[:, 0])).any():
        start, stop = given[wrong][0].tolist()
        raise ProbeError(f"{name} ({start}, {stop}) holds no position: it must be (start, stop) with 0 <= start < stop")
    return given.astype(np.int64)


def _token_table(attention: Attention, data: xr.Dataset) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function from samples and positions to the token ids there, which all tokens of a recording are known to."""
    source = data
    if isinstance(attention, xr.DataTree) and "routing" in attention.children:
        source = schema.group(attention, "routing")
        schema.require(source, "sample", "position", "token_id")
    sample, position, token_id = (source[name].values.astype(np.int64) for name in ("sample", "position", "token_id"))
    place = sample << POSITION_BITS | position
    order = np.argsort(place, kind="stable")
    place, token_id = place[order], token_id[order]

    def token_at(sample: np.ndarray, position: np.ndarray) -> np.ndarray:
        wanted = sample << POSITION_BITS | position
        found = np.isin(wanted, place)
        if not found.all():
            first = np.flatnonzero(~found)[0]
            where = f"position {position[first]} of sample {sample[first]}"
            if source is data and data.attrs.get("queries") != 0:
                raise SchemaError(f"the token at {where} is not in /attention: pass the whole recording")
            raise ProbeError(
                f"there is no token at {where}: answer holds the queries that copy, each one before the token that it "
                "predicts, so that the last token of a sample is none of them"
            )
        return token_id[np.searchsorted(place, wanted)]

    return token_at
