"""What a recorder keeps of attention: which queries, reduced layer by layer as a forward runs, and the two groups.

Full patterns are never kept but where they were asked for, and then only of short texts.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextModel

from probe import tiling
from probe.attention_interface import AttentionSpan, Observer
from probe.recording import AttentionArrays, RecordingError
from probe.tiles.strip import Attending

PER_QUERY = (
    "entropy",
    "sink_mass",
    "self_mass",
    "previous_mass",
    "chunk_mass",
    "far_mass",
    "mean_distance",
    "top_key",
)
PROFILES = ("distance_mass", "received_mass")
MAPS = ("map_max", "map_sum")
OF_SEGMENTS = ("segment_mass", "key_rank")
OF_OFFSETS = ("offset_mass",)
TOGETHER = (("top_key", "top_weight"), ("distance_mass", "distance_error"))
STATISTICS = (*PER_QUERY, "top_weight", *PROFILES, "distance_error", *MAPS, *OF_SEGMENTS, *OF_OFFSETS, "pattern")
"""What ``AttentionSpec.statistics`` may name."""

PATTERN_TOKENS = 1024
"""Longest text whose full pattern is kept."""

MAX_MAP = 512
MAX_TOP_KEYS = 64
MAX_OFFSET = (1 << 31) - 1

Segment = tuple[int, int]


@dataclass(frozen=True)
class AttentionSpec:
    """What to record of attention; the groups ``/attention`` and ``/attention_profiles`` (see ``probe.schema``).

    Parameters
    ----------
    statistics : names of variables; all but the maps and ``pattern`` unless told otherwise, and ``"all"`` adds the
        maps. ``top_key`` brings ``top_weight`` and ``distance_mass`` its ``distance_error``; those of segments and of
        offsets come with these.
    layers : decoder layers; None for all, those with a dense feed-forward among them.
    queries : how many of each text's tokens to record as queries, drawn at random without replacement; None for all.
        The cost is then queries × tokens, and not tokens × tokens. A text that is read in pieces has them drawn from
        each piece, and every token that is generated is recorded.
    seed : of that draw.
    map_size : bins along each side of the maps and of ``received_mass``, at most; 512 at most.
    segments : stretches of the text, (start, stop) token positions by name, the same for all texts or one for each:
        ``{"begin": (0, 10), "needle": [(40, 52), (7, 19)]}``. Recorded are ``segment_mass`` and ``key_rank``.
    offsets : distances from query back to key, for ``offset_mass``.
    top_keys : how many of the heaviest keys ``top_key`` lists; 64 at most.

    Raises
    ------
    RecordingError
        For a name or a number that cannot be.
    """

    statistics: Iterable[str] | str = (*PER_QUERY, *PROFILES)
    layers: Sequence[int] | None = None
    queries: int | None = None
    seed: int = 0
    map_size: int = 64
    segments: Mapping[str, Segment | Sequence[Segment]] = field(default_factory=dict)
    offsets: Sequence[int] = ()
    top_keys: int = 1

    def __post_init__(self) -> None:
        named: Any = self.statistics
        if isinstance(named, str):
            named = (*PER_QUERY, *PROFILES, *MAPS) if named == "all" else (named,)
        names = _several(named, "statistics", "names of variables")
        if "all" in names:
            raise RecordingError('statistics="all" stands by itself: add "pattern" to a list of names instead')
        if not isinstance(self.segments, Mapping) or not all(isinstance(name, str) for name in self.segments):
            raise RecordingError(
                f"segments must be (start, stop) by name, as in {{'begin': (0, 10)}}: {self.segments!r}"
            )
        offsets = tuple(_whole(offset, "offsets") for offset in _several(self.offsets, "offsets", "whole numbers"))
        if len(set(offsets)) < len(offsets) or max(offsets, default=0) > MAX_OFFSET:
            raise RecordingError(
                f"offsets must be different distances in tokens, of {MAX_OFFSET} at most: got {offsets}"
            )
        if negative := [offset for offset in offsets if offset < 0]:
            raise RecordingError(f"offsets count back from the query, so they are 0 or more, got {negative[0]}")
        object.__setattr__(self, "offsets", offsets)
        if unknown := [name for name in names if name not in STATISTICS]:
            raise RecordingError(f"attention has no statistic {unknown[0]!r}: known are {', '.join(STATISTICS)}")
        if not (names or self.segments or self.offsets):
            raise RecordingError("this AttentionSpec leaves nothing to record: name statistics, segments or offsets")
        for own, needed in ((OF_SEGMENTS, "segments"), (OF_OFFSETS, "offsets")):
            named_here, given = [name for name in own if name in names], getattr(self, needed)
            if named_here and not given:
                raise RecordingError(f"{named_here[0]} needs {needed}=, and this AttentionSpec has none")
            if given and not named_here:
                names += own
        for pair in TOGETHER:
            names += pair if set(pair) & set(names) else ()
        object.__setattr__(self, "statistics", tuple(dict.fromkeys(names)))
        for name, least in (("queries", 1), ("map_size", 1), ("top_keys", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "queries":
                continue
            if _whole(value, name) < least:
                raise RecordingError(f"{name} must be at least {least}, got {value}")
        for name, most in (("map_size", MAX_MAP), ("top_keys", MAX_TOP_KEYS)):
            if getattr(self, name) > most:
                raise RecordingError(f"{name} is {getattr(self, name)}, it can be {most} at most")
        if self.layers is not None:
            layers = _several(self.layers, "layers", "indices of decoder layers")
            object.__setattr__(self, "layers", [_whole(layer, "layers") for layer in layers])
        object.__setattr__(self, "segments", {name: _spans(name, given) for name, given in self.segments.items()})

    def segments_of(self, sample: int) -> list[Segment]:
        """(start, stop) of every segment in one text.

        Raises
        ------
        RecordingError
            If a segment was given for fewer texts.
        """
        chosen: list[Segment] = []
        for name, given in self.segments.items():
            if not is_pair(given) and sample >= len(given):
                raise RecordingError(f"segment {name!r} was given for {len(given)} texts, but there is a text {sample}")
            chosen.append(cast(Segment, given if is_pair(given) else given[sample]))
        return chosen

    def check_texts(self, lengths: Sequence[int]) -> None:
        """Raise a RecordingError if this cannot be recorded of texts of these lengths."""
        for name, given in self.segments.items():
            if not is_pair(given) and len(given) != len(lengths):
                raise RecordingError(
                    f"segment {name!r} has {len(given)} entries for {len(lengths)} texts: give one for each, or a "
                    "single (start, stop) for all"
                )
        self.check_length(max(lengths))

    def check_length(self, n_tokens: int) -> None:
        """Raise a RecordingError if this cannot be recorded of a text of so many tokens."""
        if "pattern" in self.statistics and n_tokens > PATTERN_TOKENS:
            raise RecordingError(
                f"a full pattern is kept of texts up to {PATTERN_TOKENS} tokens, and one has {n_tokens}: "
                "leave 'pattern' out (map_max and map_sum show any length), or cut with max_tokens"
            )


def _several(given: Any, name: str, what: str) -> tuple[Any, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise RecordingError(f"{name} must be a sequence of {what}, got {given!r}")
    return tuple(given)


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool):
        raise RecordingError(f"{name} must be whole numbers, got {value!r}")
    try:
        return operator.index(value)
    except TypeError as error:
        raise RecordingError(f"{name} must be whole numbers, got {value!r}") from error


def is_pair(given: Any) -> bool:
    """Whether a segment is one (start, stop) and not a sequence of them."""
    return len(given) == 2 and not hasattr(given[0], "__len__")


def _spans(name: str, given: Any) -> Any:
    """One segment as a (start, stop) of whole numbers, or as a tuple of them, one for each text."""
    wrong = f"segment {name!r} must be (start, stop) in tokens, or one such pair for each text, got {given!r}"
    try:
        if not is_pair(given):
            spans = tuple(_spans(name, span) for span in given if is_pair(span))
            if not spans or len(spans) != len(given):
                raise RecordingError(wrong)
            return spans
        start, stop = map(operator.index, given)
    except TypeError as error:
        raise RecordingError(wrong) from error
    if not 0 <= start < stop:
        raise RecordingError(f"segment {name!r} runs from {start} to {stop}: it must start at 0 or later and end after")
    return start, stop


@dataclass(frozen=True)
class _Row:
    """The recorded queries of one row of a forward.

    ``columns`` are their places among the forward's new tokens, ``positions`` those in the text. The row has
    ``n_tokens`` new tokens, which end before position ``n_positions``, and bins of ``bin_width``. ``reduced``
    and ``patterns`` hold what became of them in each layer.
    """

    sample: int
    columns: np.ndarray
    positions: np.ndarray
    n_tokens: int
    n_positions: int
    bin_width: int
    reduced: dict[int, tiling.Reduced] = field(default_factory=dict)
    patterns: dict[int, tuple[np.ndarray, int, np.ndarray]] = field(default_factory=dict)


@dataclass
class _Profile:
    """Sums over the recorded queries of one text, by layer, as far as the text was read.

    ``n_tokens`` were read, up to position ``n_positions``, which is more where a cache held some before the recording.
    ``patterns`` holds weights (H, m, n) from the first of their keys' positions on.
    """

    n_tokens: int = 0
    n_positions: int = 0
    bin_width: int = 1
    positions: list[np.ndarray] = field(default_factory=list)
    sums: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    patterns: dict[int, list[tuple[np.ndarray, int, np.ndarray]]] = field(default_factory=dict)

    def width_for(self, n_positions: int, map_size: int) -> int:
        """Bin width with which a text of ``n_positions`` has at most ``map_size`` bins; never less than before."""
        width = self.bin_width
        while -(-n_positions // width) > map_size:
            width *= 2
        return width

    def widen(self, bin_width: int) -> None:
        """Make bins twice as wide, pair by pair, until they are ``bin_width``."""
        while self.bin_width < bin_width:
            self.bin_width *= 2
            for sums in self.sums.values():
                for name in BINNED_AXES.keys() & sums.keys():
                    for axis in BINNED_AXES[name]:
                        sums[name] = _paired(sums[name], axis, _join(name))

    def add(self, row: _Row) -> None:
        """Add what one forward brought."""
        self.widen(row.bin_width)
        self.n_tokens += row.n_tokens
        self.n_positions = row.n_positions
        self.positions.append(row.positions)
        for layer, pattern in row.patterns.items():
            self.patterns.setdefault(layer, []).append(pattern)
        for layer, reduced in row.reduced.items():
            own = self.sums.setdefault(layer, {})
            for name, more in reduced.sums.items():
                values = more.numpy()
                if name in own:
                    shape = np.maximum(own[name].shape, values.shape)
                    values = _join(name)(_padded(own[name], shape), _padded(values, shape))
                own[name] = values


BINNED_AXES = {"received_mass": (1,), "map_sum": (1, 2), "map_max": (1, 2)}
"""Axes of a profile's sums that hold bins of tokens."""


def _join(name: str) -> np.ufunc:
    """How two parts of a sum over queries become one."""
    return np.maximum if name == "map_max" else np.add


def _padded(values: np.ndarray, shape: Sequence[int] | np.ndarray, fill: float = 0) -> np.ndarray:
    widths = [(0, int(new - old)) for new, old in zip(shape, values.shape, strict=True)]
    return np.pad(values, widths, constant_values=fill)


def _paired(values: np.ndarray, axis: int, join: np.ufunc) -> np.ndarray:
    """Neighbouring bins along an axis joined two by two."""
    even = np.array(values.shape)
    even[axis] += even[axis] % 2
    values = np.moveaxis(_padded(values, even), axis, -1)
    return np.moveaxis(join(values[..., ::2], values[..., 1::2]), -1, axis)


class AttentionRecord:
    """Collects the attention of every forward of one decoder.

    Call :meth:`begin` before a forward, let the :meth:`observers` watch it, call :meth:`end` after it.
    """

    def __init__(self, spec: AttentionSpec, decoder: Llama4TextModel) -> None:
        n_layers = len(decoder.layers)
        self.layers = list(range(n_layers))
        if spec.layers is not None:
            self.layers = sorted({_whole(layer, "attention layers") for layer in spec.layers})
            if not self.layers or not 0 <= self.layers[0] <= self.layers[-1] < n_layers:
                raise RecordingError(f"AttentionSpec names layers {self.layers}: this model has 0 to {n_layers - 1}")
        self.spec = spec
        self.on_layer: Callable[[], None] = lambda: None
        no_rope_layers = decoder.config.no_rope_layers or []  # 1 where attention is rotary, despite its name
        self._is_rope = {layer: bool(no_rope_layers[layer]) for layer in self.layers}
        self._chunk_size = int(decoder.config.attention_chunk_size or 0)
        self._n_heads: int = decoder.config.num_attention_heads
        self._names = frozenset(spec.statistics) - {"pattern"}
        self._rows: list[_Row] | None = None
        self._batches: list[dict[str, np.ndarray]] = []
        self._profiles: dict[int, _Profile] = {}

    def begin(self, is_real: Tensor, samples: np.ndarray, first: Sequence[int]) -> None:
        """Choose the queries of a forward whose row i goes on with text ``samples[i]`` at position ``first[i]``.

        Raises
        ------
        RecordingError
            If a row's tokens do not stand together, or if the text has become too long for what was asked for.
        """
        rows = []
        for real, sample, start in zip(is_real.cpu().numpy(), samples.tolist(), first, strict=True):
            columns = np.flatnonzero(real)
            positions = start + np.arange(len(columns))
            if len(columns) and columns[-1] - columns[0] >= len(columns):
                raise RecordingError("padding between the tokens of a row: pad a batch on one side only")
            n_tokens, n_positions = len(columns), start + len(columns)
            self.spec.check_length(n_positions)
            self.spec.segments_of(sample)
            if self.spec.queries is not None and self.spec.queries < len(columns):
                random = np.random.default_rng([self.spec.seed, sample, start])
                chosen = np.sort(random.choice(len(columns), self.spec.queries, replace=False))
                columns, positions = columns[chosen], positions[chosen]
            bin_width = self._profiles.get(sample, _Profile()).width_for(n_positions, self.spec.map_size)
            rows.append(_Row(sample, columns, positions, n_tokens, n_positions, bin_width))
        self._rows = rows

    def observers(self) -> dict[int, Observer]:
        """What is to be called with the queries and keys of each layer."""
        return {layer: functools.partial(self._observe, layer) for layer in self.layers}

    def _observe(self, layer: int, query: Tensor, key: Tensor, span: AttentionSpan, log_sum_exp: Tensor | None) -> None:
        if self._rows is None:
            return
        # Under autocast the products would have the precision of bf16.
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            for index, row in enumerate(self._rows):
                if len(row.columns):
                    attending = self._attending(layer, index, row, query, key, span, log_sum_exp)
                    self._reduce(layer, row, attending)
        self.on_layer()

    def _attending(
        self, layer: int, index: int, row: _Row, query: Tensor, key: Tensor, span: AttentionSpan, lse: Tensor | None
    ) -> Attending:
        """The queries of one row with the keys of their text, without padding."""
        columns = torch.from_numpy(row.columns).to(query.device)
        position = torch.from_numpy(row.positions).to(query.device)
        # Cells of the cache before the text's first token hold padding, and old ones may be gone.
        n_left = span.q_offset + int(row.columns[0] - row.positions[0])
        masked = span.n_left
        if n_left != (masked if isinstance(masked, int) else int(masked[index])):
            raise RecordingError("padding between the tokens of a row: pad a batch on the left to generate")
        begin = max(n_left, span.kv_offset)
        end = span.q_offset + int(row.columns[-1]) + 1
        chunk_start = position // self._chunk_size * self._chunk_size
        first = chunk_start if self._is_rope[layer] else torch.zeros_like(position)
        return Attending(
            query=query[index][:, columns],
            key=key[index][:, begin - span.kv_offset : end - span.kv_offset],
            position=position,
            first=first.clamp(min=begin - n_left),
            chunk_start=chunk_start,
            scaling=query.shape[-1] ** -0.5,
            key_start=begin - n_left,
            log_sum_exp=None if lse is None else lse[index][:, columns],
        )

    def _reduce(self, layer: int, row: _Row, attending: Attending) -> None:
        """Reduce one row's attention in one layer."""
        wanted = tiling.Wanted(
            self._names, self.spec.segments_of(row.sample), self.spec.offsets, self.spec.top_keys, row.bin_width
        )
        row.reduced[layer] = tiling.reduce_attention(attending, wanted)
        if "pattern" in self.spec.statistics:
            row.patterns[layer] = row.positions, attending.key_start, tiling.pattern(attending).cpu().numpy()

    def end(self) -> None:
        """Keep what the forward since :meth:`begin` brought.

        Raises
        ------
        RecordingError
            If a layer's attention was not seen.
        """
        rows, self._rows = self._rows, None
        assert rows is not None
        recorded = [row for row in rows if len(row.columns)]
        if silent := [layer for layer in self.layers if any(layer not in row.reduced for row in recorded)]:
            raise RecordingError(
                f"attention recorded nothing at layers {', '.join(map(str, silent))}: this forward ran with masks that "
                "were made before, or with an attention of its own"
            )
        if not recorded:
            return
        for row in recorded:
            self._profiles.setdefault(row.sample, _Profile()).add(row)
        batch = {
            "sample": np.repeat([row.sample for row in recorded], [len(row.columns) for row in recorded]),
            "position": np.concatenate([row.positions for row in recorded]),
        }
        for name in recorded[0].reduced[self.layers[0]].rows:
            layers = [torch.cat([row.reduced[layer].rows[name] for row in recorded]).cpu() for layer in self.layers]
            batch[name] = torch.stack(layers, dim=1).numpy()
        self._batches.append(batch)

    def arrays(self) -> AttentionArrays:
        """What was recorded, as arrays for :func:`probe.recording.build`."""
        names = self._batches[0] if self._batches else {}
        rows = {name: np.concatenate([batch[name] for batch in self._batches]) for name in names}
        order = np.lexsort((rows["position"], rows["sample"]))
        return AttentionArrays(
            rows={name: values[order] for name, values in rows.items()},
            profiles=self._profile_arrays(),
            layers=self.layers,
            rope=list(self._is_rope.values()),
            n_heads=self._n_heads,
            segments=list(self.spec.segments),
            offsets=self.spec.offsets,
            attributes={
                "chunk_size": self._chunk_size,
                "queries": self.spec.queries or 0,
                "seed": self.spec.seed,
            },
        )

    def _profile_arrays(self) -> dict[str, np.ndarray]:
        """Variables of ``/attention_profiles`` but for the coords of layers, from the sums of every text."""
        samples = sorted(self._profiles)
        profiles = [self._profiles[sample] for sample in samples]
        n_queries = np.array([sum(map(len, profile.positions)) for profile in profiles])
        arrays: dict[str, np.ndarray] = {
            "sample_id": np.array(samples),
            "n_tokens": np.array([profile.n_tokens for profile in profiles]),
            "n_queries": n_queries,
        }
        means = [self._means(profile, int(m)) for profile, m in zip(profiles, n_queries, strict=True)]
        for name in means[0]:
            shape = np.max([mean[name].shape for mean in means], axis=0)
            arrays[name] = np.stack([_padded(mean[name], shape, np.nan) for mean in means])
        if BINNED_AXES.keys() & arrays.keys():
            arrays["bin_width"] = np.array([profile.bin_width for profile in profiles])
        if "distance_mass" in arrays:
            arrays["distance_bin"] = np.array(tiling.distance_bins(max(profile.n_positions for profile in profiles)))
            for name in ("distance_mass", "distance_error"):
                shape = (*arrays[name].shape[:-1], len(arrays["distance_bin"]))
                arrays[name] = _padded(arrays[name], shape, np.nan)
        return arrays

    def _means(self, profile: _Profile, n_queries: int) -> dict[str, np.ndarray]:
        """One text's variables (layer, H, …), float32: means over its queries, and NaN for what there is not."""
        sums = {
            name: np.stack([profile.sums[layer][name] for layer in self.layers])
            for name in profile.sums.get(self.layers[0], {})
        }
        means = {}
        n_bins = -(-profile.n_positions // profile.bin_width)
        if "distance_mass" in sums:
            mean = sums["distance_mass"] / n_queries
            means["distance_mass"] = mean
            means["distance_error"] = self._sampling_error(profile, mean, sums["distance_square"], n_queries)
        if "received_mass" in sums:
            received = sums["received_mass"] / n_queries
            means["received_mass"] = _padded(received, (*received.shape[:2], n_bins))
        for name in {"map_max", "map_sum"} & sums.keys():
            cells = _padded(sums[name], (*sums[name].shape[:2], n_bins, n_bins))
            for index, layer in enumerate(self.layers):
                cells[index, :, self._hidden_cells(profile, n_bins, self._is_rope[layer])] = np.nan
            means[name] = cells
        if profile.patterns:
            means["pattern"] = self._pattern(profile)
        return {name: values.astype(np.float32) for name, values in means.items()}

    def _sampling_error(self, profile: _Profile, mean: np.ndarray, squares: np.ndarray, n_queries: int) -> np.ndarray:
        """Standard error of a mean over some of a text's queries, drawn without replacement (Cochran 1977, §2.6)."""
        if n_queries == profile.n_tokens:
            return np.zeros_like(mean)
        # One query has no spread, and queries that were drawn from each piece of a text are not one draw.
        if n_queries == 1 or len(profile.positions) > 1:
            return np.full_like(mean, np.nan)
        variance = np.maximum(squares - n_queries * mean**2, 0) / (n_queries - 1)
        return np.sqrt(variance / n_queries * (1 - n_queries / profile.n_tokens))

    def _hidden_cells(self, profile: _Profile, n_bins: int, is_rope: bool) -> np.ndarray:
        """Cells (query_bin, key_bin) in which no recorded query sees a key."""
        positions = np.concatenate(profile.positions)
        first = positions // self._chunk_size * self._chunk_size if is_rope else np.zeros_like(positions)
        # +1 in the first bin that a query sees, −1 after the last: the running sum counts the queries that see a bin.
        steps = np.zeros((n_bins, n_bins + 1), np.int64)
        query_bin = positions // profile.bin_width
        np.add.at(steps, (query_bin, first // profile.bin_width), 1)
        np.add.at(steps, (query_bin, query_bin + 1), -1)
        return steps.cumsum(axis=1)[:, :-1] == 0

    def _pattern(self, profile: _Profile) -> np.ndarray:
        """Attention weights (layer, H, n, n) of one text."""
        n = profile.n_positions
        whole = np.full((len(self.layers), self._n_heads, n, n), np.nan)
        for index, layer in enumerate(self.layers):
            for positions, key_start, weights in profile.patterns[layer]:
                whole[index, :, positions, key_start : key_start + weights.shape[-1]] = weights.swapaxes(0, 1)
        return whole
