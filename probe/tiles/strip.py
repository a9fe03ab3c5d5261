"""One tile of queries with all the keys that any of them sees: where products come from, and weights of known keys."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
"""Strips begin and end at multiples of so many keys."""

TILE_KEYS = 1024

HIDDEN = -1e30
"""Log2 weight of a hidden key: its power of 2 is exactly 0, and 0 times it is 0 and not NaN."""


@dataclass(frozen=True)
class Attending:
    """Queries (H, m, d) and the keys (K, n, d) of one text, H a multiple of K; ``scaling`` multiplies their products.

    ``position`` (m,) of the queries in the text, ascending; each sees the keys from ``first`` (m,) to its own position.
    ``chunk_start`` (m,) is where the query's chunk begins. ``key_start`` is the position of the first key, over 0 where
    a cache dropped older ones. ``log_sum_exp`` (H, m) of the scaled products over visible keys, where it is known.
    """

    query: Tensor
    key: Tensor
    position: Tensor
    first: Tensor
    chunk_start: Tensor
    scaling: float
    key_start: int = 0
    log_sum_exp: Tensor | None = None


class Scratch:
    """Memory that every tile writes over: a fresh megabyte for each would cost more than what is computed in it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._kept: dict[str, Tensor] = {}

    def tensor(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor, in the memory of the last one of this name."""
        size = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < size:
            self._kept[name] = self._like.new_empty(size)
        return self._kept[name][:size].view(shape)


class Strip:
    """One tile of queries with all the keys that any of them sees, walked through in tiles of keys.

    Positions count from ``base``, the text's position of the first key in hand. Weights are (K, G, t, …): key heads,
    the query heads that share one, queries. ``block`` keys are summed up together; it divides ``ALIGNMENT``.
    """

    def __init__(
        self,
        attending: Attending,
        query: Tensor,
        keys: Tensor,
        tile: slice,
        heads: slice,
        shared: int,
        block: int,
        scratch: Scratch,
    ) -> None:
        self.keys, self.block, self.scratch = keys, block, scratch
        self.base = attending.key_start // ALIGNMENT * ALIGNMENT
        self.position = attending.position[tile] - self.base
        self.first = attending.first[tile] - self.base
        self.chunk_start = attending.chunk_start[tile] - self.base
        self.shape = (len(keys), shared, len(self.position))
        ends = torch.stack([self.first.min(), self.first.max(), self.position[0], self.position[-1]]).tolist()
        earliest, self._latest_first, self._earliest_position, last = ends
        self.begin = earliest // ALIGNMENT * ALIGNMENT
        self.end = -(-(last + 1) // ALIGNMENT) * ALIGNMENT
        self.query = torch.cat([query, torch.zeros_like(query[..., :1])], dim=-1).unflatten(0, self.shape[:2])
        if attending.log_sum_exp is None:
            self.query[..., -1] = -self._log_sum_exp()
        else:
            self.query[..., -1] = attending.log_sum_exp[heads, tile].unflatten(0, self.shape[:2]) / -math.log(2)

    @property
    def n_blocks(self) -> int:
        """Blocks of keys from the strip's begin to its end."""
        return (self.end - self.begin) // self.block

    def products(self, earliest: int = 0, latest: int = sys.maxsize) -> Iterator[tuple[int, int, Tensor]]:
        """Log2 weights (K, G, t, keys) of one tile of keys after the other, with where it starts and where it ends.

        Keys that a query does not see have one as well. Only tiles that reach into ``earliest`` to ``latest``; every
        tile overwrites the one before.
        """
        for start in range(self.begin, self.end, TILE_KEYS):
            stop = min(start + TILE_KEYS, self.end)
            if stop > earliest and start < latest:
                yield start, stop, self.log_weights(self.keys[:, start:stop])

    def weights(self, earliest: int = 0, latest: int = sys.maxsize) -> Iterator[tuple[int, int, Tensor]]:
        """As :meth:`products`, with ``HIDDEN`` at every key that a query does not see."""
        for start, stop, log_weight in self.products(earliest, latest):
            if stop - 1 > self._earliest_position or start < self._latest_first:
                place = torch.arange(start, stop, device=log_weight.device)
                log_weight.masked_fill_((place > self.position[:, None]) | (place < self.first[:, None]), HIDDEN)
            yield start, stop, log_weight

    def _log_sum_exp(self) -> Tensor:
        """Log2 of the sum of powers of 2 (K, G, t), from queries whose last channel is still 0."""
        highest = self.query.new_full(self.shape, HIDDEN)
        total = self.query.new_zeros(self.shape)
        for _, _, logit in self.weights():
            before, highest = highest, highest.maximum(logit.amax(dim=-1))
            total *= (before - highest).exp2()
            total += logit.sub_(highest[..., None]).exp2_().sum(dim=-1)
        return highest + total.log2()

    def log_weights(self, keys: Tensor) -> Tensor:
        """Log2 weights (K, G, t, keys) on ``keys`` (K, keys, d + 1), hidden ones included."""
        folded = self.query.flatten(1, 2)
        out = self.scratch.tensor("log weights", len(folded), folded.shape[1], keys.shape[1])
        return torch.bmm(folded, keys.transpose(1, 2), out=out).view(*self.shape, -1)

    def weight_at(self, distance: Tensor) -> Tensor:
        """Weight (K, G, t) of the key ``distance`` (t,) before each query; 0 where that key is hidden."""
        place = self.position - distance
        key = self.keys[:, place.clamp(min=0)]
        weight = (self.query * key[:, None]).sum(dim=-1).exp2()
        return weight.masked_fill(place < self.first, 0)

    def heaviest(self, segments: list[list[int]]) -> Tensor:
        """Largest log2 weight (K, G, t, segment) of a visible key from each segment's start to its stop."""
        heaviest = self.query.new_full((*self.shape, len(segments)), HIDDEN)
        earliest, latest = min(low for low, _ in segments), max(high for _, high in segments)
        # In the walk's own tiles: a product in another shape has other last bits, and a key would outrank itself.
        for start, stop, log_weight in self.weights(earliest, latest):
            for index, (low, high) in enumerate(segments):
                own = log_weight[..., max(low - start, 0) : max(min(high, stop) - start, 0)]
                if own.shape[-1]:
                    heaviest[..., index] = heaviest[..., index].maximum(own.amax(dim=-1))
        return heaviest
