"""What routing costs a server: dropped tokens, unequal devices, experts to fetch; part of ``probe.routing_stats``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from probe.bootstrap import MIN_DOCUMENTS, Bootstrap, divide, effective_number, share
from probe.counting import count
from probe.routing.rows import By, Routing, Rows, grouped
from probe.schema import ProbeError

CAPACITY_FACTORS = (1.0, 1.25, 1.5, 2.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH_QUANTILES = (0.05, 0.5, 0.95)

BATCH_CELLS_AT_ONCE = 1 << 22
"""Cells (batch, layer, expert) in memory at once."""


def capacity(
    routing: Routing, *, tokens_per_batch: int, capacity_factors: Sequence[float] = CAPACITY_FACTORS
) -> xr.Dataset:
    """How many assignments a server drops that gives every expert the same room in each batch.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    tokens_per_batch : how many consecutive rows make a batch; the last one may be shorter.
    capacity_factors : room of an expert over its even share, rising.

    Returns
    -------
    Dataset: ``drop_share`` (capacity_factor, layer), units "1", the share of all assignments that found no room, and
    ``batch_drop_share`` (capacity_factor, layer, quantile), that of the 5 %, 50 % and 95 % quantile of the batches;
    ``n_batches``. NaN where there is no token.

    Raises
    ------
    SchemaError
        If a variable is missing; names it.
    ProbeError
        For fewer than one token in a batch, or a capacity factor that is not positive.

    Notes
    -----
    Fedus et al. 2021 (Switch), Eq. 3: an expert takes ⌈c · T · k / E⌉ assignments of a batch of T tokens. Llama 4
    itself drops nothing; this is what another server, or a training run with a capacity, would lose. Batches are made
    of the rows in their order, so that a long document fills several: shuffle the samples before recording for batches
    of mixed requests.
    """
    factors = np.asarray(capacity_factors, float)
    if not isinstance(tokens_per_batch, int | np.integer) or tokens_per_batch < 1:
        raise ProbeError(f"tokens_per_batch is {tokens_per_batch}, it must be a whole number of at least 1")
    if factors.ndim != 1 or not len(factors) or not (factors > 0).all():
        raise ProbeError(f"capacity_factors must be positive numbers, got {capacity_factors!r}")
    rows = grouped(routing)
    dropped, assigned = [], []
    for sizes, counts in _batch_counts(rows, tokens_per_batch):
        room = np.ceil(np.round(factors * (sizes[:, None] * rows.top_k / rows.n_experts), 9))
        over = np.maximum(counts[:, None] - room[..., None, None], 0)  # (batch, factor, layer, expert)
        dropped.append(over.sum(axis=-1))
        assigned.append(sizes * rows.top_k)
    lost = np.concatenate([np.zeros((0, len(factors), rows.n_layers)), *dropped])
    total = np.concatenate([np.zeros(0), *assigned])
    quantiles = np.full((len(factors), rows.n_layers, len(BATCH_QUANTILES)), np.nan)
    if len(lost):
        quantiles[:] = np.moveaxis(np.quantile(lost / total[:, None, None], BATCH_QUANTILES, axis=0), 0, -1)
    labels = {
        "capacity_factor": _label("capacity_factor", factors, "room of an expert over its even share"),
        "quantile": _label("quantile", np.asarray(BATCH_QUANTILES), "quantile over the batches"),
    }
    dims = ("capacity_factor", "layer")
    without_quantile = {"capacity_factor": labels["capacity_factor"]}
    return xr.Dataset(
        {
            "drop_share": _plain(
                rows,
                divide(lost.sum(axis=0), total.sum()),
                dims,
                "share of assignments over capacity",
                without_quantile,
            ),
            "batch_drop_share": _plain(
                rows,
                quantiles,
                (*dims, "quantile"),
                "share over capacity in one batch, quantile of the batches",
                labels,
            ),
            "n_batches": xr.DataArray(len(lost), attrs={"long_name": "batches", "units": "batch"}),
        },
        attrs={"tokens_per_batch": tokens_per_batch},
    )


def device_load(
    routing: Routing,
    *,
    devices: int | Sequence[int],
    token_bytes: int | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How unequal devices are loaded when the experts of a layer are spread over them.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    devices : how many devices, each with the same number of consecutive experts; or for each expert the number of its
        device, from 0.
    token_bytes : size of the hidden state of one token, such as 5120 · 2 for Scout in bfloat16; for ``sent_bytes``.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset: ``device_load`` (layer, device), the share of assignments, units "1"; ``imbalance`` (layer), the largest
    over the mean, at least 1, with ``lower`` and ``upper`` (NaN for fewer than 5 documents); ``devices_per_token``
    (layer), how many devices a token's experts lie on; and where ``token_bytes`` is given, ``sent_bytes`` (layer), what
    a token sends to other devices and gets back, on average, if tokens are spread evenly over the devices.

    Raises
    ------
    SchemaError
        If a variable is missing; names it.
    ProbeError
        If the experts cannot be divided so.

    Notes
    -----
    A step of expert parallelism waits for its busiest device, so ``imbalance`` is how much longer the experts take
    than at balance. The interval is that of the maximum violation, see ``imbalance``. A token's own device holds one
    of D equal parts of the tokens, so each of the devices that it needs is another one with probability 1 - 1/D; its
    state goes there once, however many of its experts are there, and comes back once.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing)
    device = _placement(devices, rows.n_experts)
    n_devices = int(device.max()) + 1
    ((_, _, per_expert),) = rows.documents()
    per_device = np.stack([per_expert[..., device == at].sum(axis=-1) for at in range(n_devices)], axis=-1)
    load = share(per_device.sum(axis=0))
    imbalance = n_devices * load.max(axis=-1)
    reach = np.full(imbalance.shape, np.nan)
    if len(per_device) >= MIN_DOCUMENTS:
        reach = n_devices * bootstrap.largest_deviation(per_device)
    used = np.zeros(rows.n_layers)
    for block in rows.blocks("expert_index"):
        on = np.sort(device[block.chosen], axis=-1)
        used += (1 + (np.diff(on, axis=-1) != 0).sum(axis=-1)).sum(axis=0)
    per_token = divide(used, np.asarray(rows.n_tokens))
    labels = {"device": _label("device", np.arange(n_devices), "device")}
    variables = {
        "device_load": _plain(rows, load, ("layer", "device"), "share of assignments to the device", labels),
        "imbalance": _plain(rows, imbalance, ("layer",), "load of the busiest device over the mean"),
        "lower": _plain(rows, np.maximum(imbalance - reach, 1), ("layer",), "lower bound of the imbalance"),
        "upper": _plain(rows, np.minimum(imbalance + reach, n_devices), ("layer",), "upper bound of the imbalance"),
        "devices_per_token": _plain(rows, per_token, ("layer",), "devices that hold a token's experts", None, "device"),
    }
    if token_bytes is not None:
        sent = 2 * token_bytes * per_token * (1 - 1 / n_devices)
        variables["sent_bytes"] = _plain(rows, sent, ("layer",), "sent and returned for each token", None, "byte")
    return xr.Dataset(variables, attrs=bootstrap.attributes)


def distinct_experts(
    routing: Routing,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    by: By = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How many experts a batch touches, and so how much of a layer's weights a server must read.

    Parameters
    ----------
    routing : Dataset with ``expert_index`` (token, layer, slot), or a recording that holds it.
    batch_sizes : tokens in a batch.
    by : name of a coord on ``token`` to split by, or several names.
    level : coverage of the interval.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset ([by,] layer, batch_size), units "expert": ``distinct``, for tokens that have nothing to do with each other,
    such as those of different requests at decode, with ``lower`` and ``upper`` (NaN for fewer than 5 documents);
    ``consecutive``, for runs of tokens that follow each other in one sample, such as in prefill (NaN where no sample of
    the group is as long); and ``uniform`` (batch_size), what a uniform router would touch.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a batch of less than one token.

    Notes
    -----
    ``distinct`` is Σ_e 1 - (1 - p_e)^B, where p_e is the share of tokens whose chosen experts include e; at a uniform
    router that is ``uniform``, E · (1 - (1 - k/E)^B). Unequal loads touch fewer. ``consecutive`` is the mean over runs
    of B adjacent positions that do not overlap, counted from the start of each sample; a shorter last run is left out.
    """
    sizes = np.asarray(batch_sizes)
    if sizes.ndim != 1 or not len(sizes) or not np.issubdtype(sizes.dtype, np.integer) or not (sizes >= 1).all():
        raise ProbeError(f"batch_sizes must be whole numbers of at least 1, got {batch_sizes!r}")
    bootstrap = Bootstrap(level, n_resamples, seed)
    rows = grouped(routing, by)
    distinct, lower, upper = np.full((3, rows.n_groups, rows.n_layers, len(sizes)), np.nan)
    for group, _, per_document in rows.documents():
        distinct[group] = _distinct(per_document.sum(axis=0), sizes, rows.top_k)
        if len(per_document) >= MIN_DOCUMENTS:
            drawn = np.stack([_distinct(counts, sizes, rows.top_k) for counts in bootstrap.resample(per_document)])
            n_effective = effective_number(per_document.sum(axis=-1))[:, None]
            lower[group], upper[group] = bootstrap.bounds(distinct[group], drawn, n_effective)
    uniform = rows.n_experts * (1 - (1 - rows.top_k / rows.n_experts) ** sizes)
    most = np.minimum(rows.n_experts, rows.top_k * sizes)
    labels = {"batch_size": _label("batch_size", sizes, "tokens in a batch", "token")}
    dims = ("layer", "batch_size")
    columns = {
        "distinct": (distinct, "experts that a batch of unrelated tokens touches"),
        "lower": (lower.clip(rows.top_k, most), "lower bound of the distinct experts"),
        "upper": (upper.clip(rows.top_k, most), "upper bound of the distinct experts"),
        "consecutive": (_consecutive(rows, sizes), "experts that consecutive tokens of a sample touch"),
    }
    variables = {
        name: rows.array(values, dims, long_name, "expert", coords=labels)
        for name, (values, long_name) in columns.items()
    }
    variables["uniform"] = xr.DataArray(
        uniform,
        labels,
        ("batch_size",),
        attrs={"long_name": "experts that a uniform router touches", "units": "expert"},
    )
    return xr.Dataset(variables, attrs=bootstrap.attributes)


def _label(name: str, values: np.ndarray, long_name: str, units: str = "1") -> xr.Variable:
    return xr.Variable(name, values, {"long_name": long_name, "units": units})


def _plain(
    rows: Rows,
    values: np.ndarray,
    dims: tuple[str, ...],
    long_name: str,
    coords: dict[str, xr.Variable] | None = None,
    units: str = "1",
) -> xr.DataArray:
    """Label an array that has no groups."""
    return rows.array(values[None], dims, long_name, units, coords=coords)


def _batch_counts(rows: Rows, tokens_per_batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens (batch,) and assignments (batch, layer, expert) of consecutive batches, some at a time."""
    unfinished = -1, np.zeros(1, np.int64), np.zeros((1, rows.n_layers, rows.n_experts), np.int64)
    for block in rows.blocks("expert_index"):
        batch = (block.start + np.arange(block.n_tokens)) // tokens_per_batch
        first = int(batch[0])
        sizes = np.bincount(batch - first)
        counts = count(block.chosen, batch - first, n_codes=len(sizes), n_values=rows.n_experts)
        if unfinished[0] == first:
            sizes[:1] += unfinished[1]
            counts[:1] += unfinished[2]
        elif unfinished[0] >= 0:
            yield unfinished[1:]
        unfinished = int(batch[-1]), sizes[-1:], counts[-1:]
        yield sizes[:-1], counts[:-1]
    if unfinished[0] >= 0:
        yield unfinished[1:]


def _placement(devices: int | Sequence[int], n_experts: int) -> np.ndarray:
    """Device of each expert, (expert,)."""
    if isinstance(devices, int | np.integer):
        if devices < 1 or n_experts % devices:
            raise ProbeError(
                f"{n_experts} experts cannot be divided evenly among {devices} devices: choose a divisor, or pass the "
                "device of each expert"
            )
        return np.arange(n_experts) // (n_experts // int(devices))
    placement = np.asarray(devices)
    if placement.shape != (n_experts,) or not np.issubdtype(placement.dtype, np.integer) or (placement < 0).any():
        raise ProbeError(f"devices must name the device, from 0, of each of the {n_experts} experts, got {devices!r}")
    return placement


def _distinct(counts: np.ndarray, batch_sizes: np.ndarray, top_k: int) -> np.ndarray:
    """Experts that independent tokens touch, (layer, batch_size), from assignments (layer, expert)."""
    taken = share(counts) * top_k
    return (1 - (1 - taken[..., None]) ** batch_sizes).sum(axis=1)


def _consecutive(rows: Rows, batch_sizes: np.ndarray) -> np.ndarray:
    """Mean number of experts in runs of rows of one document that do not overlap, (group, layer, batch_size)."""
    touched = np.zeros((rows.n_groups, rows.n_layers, len(batch_sizes)), np.int64)
    n_runs = np.zeros((rows.n_groups, len(batch_sizes)), np.int64)
    starts = [rows.run_starts(size) for size in batch_sizes.tolist()]
    ahead = max((size - 1 for size, first in zip(batch_sizes.tolist(), starts, strict=True) if len(first)), default=0)
    for at, first in enumerate(starts):
        n_runs[:, at] = np.bincount(rows.group[first], minlength=rows.n_groups)
    for block in rows.blocks("expert_index", ahead=ahead):
        sets = np.bitwise_or.reduce(_as_bits(rows.n_experts)[block.chosen], axis=2)
        stop = block.start + block.n_tokens
        for at, (size, first) in enumerate(zip(batch_sizes.tolist(), starts, strict=True)):
            own = first[np.searchsorted(first, block.start) : np.searchsorted(first, stop - size, side="right")]
            own = own[own < stop - block.n_ahead]
            if not len(own):
                continue
            union = np.bitwise_or.reduce(sets[(own - block.start)[:, None] + np.arange(size)], axis=1)
            n_experts = np.bitwise_count(union).sum(axis=-1, dtype=np.int64)
            if rows.n_groups == 1:
                touched[0, :, at] += n_experts.sum(axis=0)
            else:
                np.add.at(touched[..., at], rows.group[own], n_experts)
    return divide(touched, n_runs[:, None])


def _as_bits(n_experts: int) -> np.ndarray:
    """Each expert as a set of one, (expert, word): the bits of as few words as hold all experts."""
    per_word = next(bits for bits in (8, 16, 32, 64) if bits >= n_experts or bits == 64)
    expert = np.arange(n_experts)
    bits = np.zeros((n_experts, -(-n_experts // per_word)), np.uint64)
    bits[expert, expert // per_word] = np.uint64(1) << (expert % per_word).astype(np.uint64)
    return bits.astype(f"uint{per_word}")
