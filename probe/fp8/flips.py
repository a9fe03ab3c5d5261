"""Statistics of a drift study: who changes experts, at what margin, and what it costs; part of ``probe.fp8_error``.

A document is one text. Intervals resample documents and are withheld (NaN) where they would not hold; see
``probe.bootstrap``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from scipy.special import erfc

from probe import schema
from probe.bootstrap import INTERVAL_STATUS, MIN_DOCUMENTS, Bootstrap, divide, effective_number, resampled_sums
from probe.schema import ProbeError

SMALLEST_EDGE = 2.0**-5
"""The first bin of margins ends here unless told otherwise: BF16 logits around 4 are that far apart."""


class Bounds(NamedTuple):
    """A number and its interval."""

    value: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    status: np.ndarray | None = None
    """Codes of ``INTERVAL_STATUS``, for shares."""


def flips_by_margin(
    data: xr.DataTree | xr.Dataset,
    *,
    edges: Sequence[float] | None = None,
    by_layer: bool = False,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Share of routing decisions that another recipe flips, by how sure the reference was.

    Parameters
    ----------
    data : Dataset with ``flipped``, ``margin_change`` and ``router_margin``, or a study that holds it.
    edges : of the margin's bins in logits, rising; by default 0, 1/32, 1/16, 1/8, … up to the largest margin.
    by_layer : layers apart instead of pooled.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset (recipe, [layer,] margin_bin): ``flip_share`` of (token, layer) decisions, units "1", NaN where there is
    none, its bounds ``lower`` and ``upper``, ``interval_status``, and ``predicted``, the share that two experts with
    noisy logits would flip. ``n_decisions`` ([layer,] margin_bin). ``logit_noise`` (recipe, [layer]), in logits, is the
    σ of the Notes. ``margin_bin`` is the centre of a bin, the coords ``margin_from`` and ``margin_to`` are its edges; a
    bin holds its lower edge, the last one its upper edge too.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For fewer than two edges, edges that do not rise, a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    If the two logits err independently by N(0, σ²), their difference m errs by N(0, 2σ²) and changes sign with
    P = Φ(-m/√(2σ²)) = ½·erfc(m/2σ). The change of a margin having the variance 2σ², σ is the standard deviation of
    the measured ``margin_change`` over √2. ``predicted`` is the mean of P over the decisions of the bin, with the σ of
    each decision's own layer, since noise grows with depth. It leaves out that noise may lift a third expert. Within a
    layer it takes all tokens to be equally noisy: where a few carry most of the noise, those that were flipped before,
    fewer decisions near a tie flip than predicted, and more far from it.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    flips = schema.group(data, "fp8_flips")
    schema.require(flips, "flipped", "margin_change", "router_margin", "sample")
    of_bins = _edges(edges, float(np.nan_to_num(flips["router_margin"].max())) if flips["router_margin"].size else 0.0)
    n_bins, n_documents = len(of_bins) - 1, _n_documents(flips)
    n_cells = flips.sizes["layer"] if by_layer else 1
    counts = np.zeros((n_documents, flips.sizes["recipe"], n_cells, n_bins, 2), np.int64)
    predicted = np.zeros((flips.sizes["recipe"], n_cells, n_bins))
    of_layer = _logit_noise(flips, by_layer=True)
    noise = of_layer if by_layer else _logit_noise(flips, by_layer=False)
    for index, own in enumerate(_by_layer(flips)):
        cell = index if by_layer else 0
        inside = np.clip(np.searchsorted(of_bins, own.margin, side="right") - 1, -1, n_bins)
        inside[own.margin == of_bins[-1]] = n_bins - 1
        is_in = (inside >= 0) & (inside < n_bins) & ~np.isnan(own.margin)
        place = own.sample[is_in] * n_bins + inside[is_in]
        for recipe in range(len(own.flipped)):
            for category, chosen in enumerate((own.flipped[recipe], ~own.flipped[recipe])):
                tally = np.bincount(place[chosen[is_in]], minlength=n_documents * n_bins)
                counts[:, recipe, cell, :, category] += tally.reshape(n_documents, n_bins)
            chance = flip_probability(own.margin[is_in], of_layer[recipe, index])
            predicted[recipe, cell] += np.bincount(inside[is_in], weights=chance, minlength=n_bins)
    n_decisions = counts.sum(axis=(0, -1))
    found = share_bounds(bootstrap, counts)
    dims = ("recipe", "layer", "margin_bin") if by_layer else ("recipe", "margin_bin")
    shape = [flips.sizes["recipe"], *([n_cells] if by_layer else []), n_bins]
    columns = {
        "flip_share": (found.value, "share of decisions that flipped", "1"),
        "lower": (found.lower, "lower bound of the share", "1"),
        "upper": (found.upper, "upper bound of the share", "1"),
        "predicted": (divide(predicted, n_decisions), "share that two experts with noisy logits would flip", "1"),
    }
    result = xr.Dataset(
        {name: _variable(dims, values.reshape(shape), *says) for name, (values, *says) in columns.items()}
    )
    assert found.status is not None
    result["interval_status"] = _status(dims, found.status.reshape(shape))
    result["n_decisions"] = _variable(dims[1:], n_decisions[0].reshape(shape[1:]), "decisions in the bin", "decision")
    result["logit_noise"] = _variable(dims[:-1], noise.reshape(shape[:-1]), "noise of one logit", "logit")
    labels = {
        "margin_bin": ((of_bins[:-1] + of_bins[1:]) / 2, "router margin, centre of the bin"),
        "margin_from": (of_bins[:-1], "lower edge of the bin"),
        "margin_to": (of_bins[1:], "upper edge of the bin"),
    }
    result = result.assign_coords({name: _variable(("margin_bin",), *label, "logit") for name, label in labels.items()})
    return _labelled(result, flips, bootstrap)


def flip_probability(margin: np.ndarray, noise: np.ndarray | float) -> np.ndarray:
    """Chance that two experts whose logits differ by ``margin`` and err by ``noise`` each change places: ½·erfc(m/2σ).

    Mean for no noise at all: nothing flips.
    """
    return np.where(np.asarray(noise) > 0, erfc(divide(margin, 2 * np.asarray(noise))) / 2, 0.0)


def flip_share(
    data: xr.DataTree | xr.Dataset,
    *,
    by: str | None = None,
    pooled: bool = False,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Share of tokens that go to another set of experts than in the reference.

    Parameters
    ----------
    data : Dataset with ``flipped`` (recipe, token, layer), or a study that holds it.
    by : name of a coord on ``token`` to split by, such as "domain".
    pooled : all layers together, instead of each.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset (recipe, [by,] [layer]): ``flip_share``, units "1", NaN for a group without a token, its bounds ``lower``
    and ``upper``, and ``interval_status``; ``n_documents`` ([by]), texts with a token in the group.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    With top-k > 1 a flip is a different set; the order of its members does not matter.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    flips = schema.group(data, "fp8_flips")
    schema.require(flips, "flipped", "sample", *([by] if by else []))
    names, group = [""], np.zeros(flips.sizes["token"], np.int64)
    if by is not None:
        if flips[by].dims != ("token",):
            raise ProbeError(f"by={by!r} is not a coord on token: split by one such as 'domain'")
        found, group = np.unique(schema.labels(flips[by]), return_inverse=True)
        names = found.tolist()
    n_documents, n_groups = _n_documents(flips), len(names)
    n_cells = 1 if pooled else flips.sizes["layer"]
    counts = np.zeros((n_documents, flips.sizes["recipe"], n_groups, n_cells, 2), np.int64)
    for index, own in enumerate(_by_layer(flips, "flipped")):
        place = own.sample * n_groups + group
        for recipe in range(len(own.flipped)):
            for category, chosen in enumerate((own.flipped[recipe], ~own.flipped[recipe])):
                tally = np.bincount(place[chosen], minlength=n_documents * n_groups)
                counts[:, recipe, :, 0 if pooled else index, category] += tally.reshape(n_documents, n_groups)
    bounds = share_bounds(bootstrap, counts, _can_flip(flips, group, n_groups, pooled))
    dims = ["recipe", *([by] if by else []), *([] if pooled else ["layer"])]
    shape = [flips.sizes["recipe"], *([n_groups] if by else []), *([] if pooled else [n_cells])]
    columns = {
        "flip_share": (bounds.value, "share of tokens with another set of experts"),
        "lower": (bounds.lower, "lower bound of the share"),
        "upper": (bounds.upper, "upper bound of the share"),
    }
    result = xr.Dataset(
        {name: _variable(dims, values.reshape(shape), says) for name, (values, says) in columns.items()}
    )
    assert bounds.status is not None
    result["interval_status"] = _status(dims, bounds.status.reshape(shape))
    filled = counts[:, :1].any(axis=(1, 3, 4)).sum(axis=0)
    result["n_documents"] = _variable([by] if by else [], filled if by else filled[0], "texts with a token", "document")
    if by is not None:
        result = result.assign_coords({by: _variable([by], np.array(names), flips[by].attrs.get("long_name", by))})
    return _labelled(result, flips, bootstrap)


def loss_change(
    data: xr.DataTree | xr.Dataset,
    *,
    by: str | None = None,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """What a recipe costs at the output: loss, divergence and agreement of the next token.

    Parameters
    ----------
    data : ``/fp8_samples``, or a study that holds it.
    by : "domain", to split by.
    level : coverage of the intervals.
    n_resamples : how many times the documents are resampled.
    seed : of the resampling.

    Returns
    -------
    Dataset (recipe, [domain]) of ``loss_change`` in nats, ``logit_kl`` in nats and ``top1_agreement``, units "1", each
    with the bounds ``…_lower`` and ``…_upper``; ``reference_loss`` ([domain]) in nats, ``n_documents`` and ``n_tokens``
    ([domain]). NaN for a model without an output head, and for the loss where no text has a second token.

    Raises
    ------
    SchemaError
        If a variable or coord is missing; names it.
    ProbeError
        For another ``by``, a level outside (0, 1) or fewer than two resamples.

    Notes
    -----
    Means over tokens, so that long texts count for more. ``loss_change`` may be below 0 and its interval is
    symmetric but for the bootstrap's bias; KL is positive and errs by a factor; agreement is a share.
    """
    bootstrap = Bootstrap(level, n_resamples, seed)
    samples = schema.group(data, "fp8_samples")
    schema.require(samples, "logit_kl", "top1_agreement", "loss_change", "reference_loss", "n_tokens", "domain")
    if by not in (None, "domain"):
        raise ProbeError(f'by={by!r}: texts are split by "domain", or not at all')
    domain = np.array([str(name) for name in samples["domain"].values], dtype=object)
    names = list(dict.fromkeys(domain.tolist())) if by else [""]
    groups = [domain == name if by else np.ones(len(domain), bool) for name in names]
    n_tokens = samples["n_tokens"].values.astype(np.int64)
    values = {
        name: samples[name].transpose("sample", "recipe").values
        for name in ("loss_change", "logit_kl", "top1_agreement")
    }
    reference = samples["reference_loss"].values
    rows = []
    for own in groups:
        n, n_next = n_tokens[own], n_tokens[own] - 1
        followed = n_next > 0
        loss = mean_bounds(bootstrap, values["loss_change"][own][followed] * n_next[followed, None], n_next[followed])
        kl = positive_bounds(bootstrap, values["logit_kl"][own] * n[:, None], n)
        agreement = agreement_bounds(bootstrap, values["top1_agreement"][own], n)
        own_reference = divide((reference[own] * n_next)[followed].sum(), n_next.sum())
        rows.append((loss, kl, agreement, own_reference, own.sum(), n.sum()))
    dims = ("recipe", "domain") if by else ("recipe",)

    def column(index: int, part: int) -> np.ndarray:
        stacked = np.stack([np.asarray(row[index][part]) for row in rows], axis=-1)
        return stacked if by else stacked[..., 0]

    variables: dict[str, Any] = {}
    says = {"loss_change": "mean change of the next token's loss", "logit_kl": "mean KL(reference, stream)"}
    for index, name in enumerate(("loss_change", "logit_kl", "top1_agreement")):
        long_name, units = (
            says.get(name, "share of tokens with the same likeliest next one"),
            "nat" if name in says else "1",
        )
        variables[name] = _variable(dims, column(index, 0), long_name, units)
        variables[f"{name}_lower"] = _variable(dims, column(index, 1), f"lower bound of {name}", units)
        variables[f"{name}_upper"] = _variable(dims, column(index, 2), f"upper bound of {name}", units)
    of_group = {
        "reference_loss": (3, "mean loss of the reference", "nat"),
        "n_documents": (4, "texts", "document"),
        "n_tokens": (5, "tokens", "token"),
    }
    for name, (index, long_name, units) in of_group.items():
        found = np.array([row[index] for row in rows])
        variables[name] = _variable(dims[1:], found if by else found[0], long_name, units)
    result = xr.Dataset(
        variables, {"domain": _variable(("domain",), np.array(names), "domain of the text")} if by else {}
    )
    return _labelled(result, samples, bootstrap)


def loss_by_domain(
    data: xr.DataTree | xr.Dataset, *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """:func:`loss_change` of each domain."""
    return loss_change(data, by="domain", level=level, n_resamples=n_resamples, seed=seed)


def share_bounds(bootstrap: Bootstrap, counts: np.ndarray, is_random: np.ndarray | None = None) -> Bounds:
    """Shares of the first of two categories and their bounds (recipe, …) from counts (document, recipe, …, category).

    Documents without a count in a cell are no documents of it; which those are is the same for every recipe. Where
    ``is_random`` (recipe, …) is False a share of 0 is one by construction, and its bounds are 0.
    """
    n_documents, n_recipes, n_categories = len(counts), counts.shape[1], counts.shape[-1]
    cells = counts.reshape(n_documents, n_recipes, -1, n_categories)
    lower, upper = np.full((2, *cells.shape[1:3]), np.nan)
    status = np.zeros(cells.shape[1:3], np.uint8)
    for cell in range(cells.shape[2]):
        own = cells[:, :, cell]
        own = own[own.any(axis=(1, 2))]
        found = bootstrap.share_interval(own)
        lower[:, cell], upper[:, cell], status[:, cell] = (part[:, 0] for part in found)
    total = cells.sum(axis=0)
    share = divide(total[..., 0], total.sum(axis=-1))
    shape = counts.shape[1:-1]
    if is_random is not None:
        settled = ~is_random.reshape(share.shape) & (share == 0) & ~np.isnan(upper)
        lower, upper = (np.where(settled, 0, bound) for bound in (lower, upper))
    return Bounds(*(part.reshape(shape) for part in (share, lower, upper, status)))


def mean_bounds(bootstrap: Bootstrap, sums: np.ndarray, n: np.ndarray) -> Bounds:
    """Mean over tokens of what may have either sign, from sums (document, …) over ``n`` (document,) tokens."""
    estimate, drawn = _ratio(bootstrap, sums, n)
    if drawn is None:
        return Bounds(estimate, np.full(estimate.shape, np.nan), np.full(estimate.shape, np.nan))
    return Bounds(estimate, *bootstrap.bounds(estimate, drawn, effective_number(n)))


def positive_bounds(bootstrap: Bootstrap, sums: np.ndarray, n: np.ndarray) -> Bounds:
    """Mean over tokens of what cannot be negative, from sums (document, …) over ``n`` (document,) tokens."""
    # What rounding takes below 0 is 0.
    estimate, drawn = _ratio(bootstrap, np.maximum(sums, 0), n)
    if drawn is None:
        return Bounds(estimate, np.full(estimate.shape, np.nan), np.full(estimate.shape, np.nan))
    lower, upper = bootstrap.factor_bounds(estimate, drawn, effective_number(n))
    # What is 0 in every text, as of a model against itself, is so by construction.
    is_zero = estimate == 0
    return Bounds(estimate, np.where(is_zero, 0, lower), np.where(is_zero, 0, upper))


def agreement_bounds(bootstrap: Bootstrap, agreement: np.ndarray, n: np.ndarray) -> Bounds:
    """Share of tokens that agree, from shares (document, recipe) of ``n`` (document,) tokens."""
    if np.isnan(agreement).any():
        undefined = np.full((3, agreement.shape[1]), np.nan)
        return Bounds(*undefined)
    agreeing = np.rint(agreement * n[:, None]).astype(np.int64)
    return share_bounds(bootstrap, np.stack([agreeing, n[:, None] - agreeing], axis=-1))


def _ratio(bootstrap: Bootstrap, sums: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Sums over tokens, of all documents and of drawn ones; None for too few documents."""
    estimate = divide(sums.sum(axis=0), n.sum())
    if len(n) < MIN_DOCUMENTS or np.isnan(estimate).any():
        return estimate, None
    weights = bootstrap.weights(len(n))
    of_cells = (len(weights), *[1] * (sums.ndim - 1))
    return estimate, divide(resampled_sums(weights, sums), resampled_sums(weights, n[:, None]).reshape(of_cells))


class _Layer(NamedTuple):
    """One layer's decisions: flipped (recipe, token), margin (token,) and sample (token,)."""

    flipped: np.ndarray
    margin: np.ndarray
    sample: np.ndarray


def _by_layer(flips: xr.Dataset, *names: str) -> Iterator[_Layer]:
    """Layer by layer, so that a store need not fit into memory."""
    sample = flips["sample"].values.astype(np.int64)
    for layer in range(flips.sizes["layer"]):
        own = flips.isel(layer=layer)
        margin = np.zeros(0) if names else own["router_margin"].values.astype(np.float64)
        yield _Layer(own["flipped"].transpose("recipe", "token").values, margin, sample)


def _can_flip(flips: xr.Dataset, group: np.ndarray, n_groups: int, pooled: bool) -> np.ndarray | None:
    """Whether any margin changed (recipe, group, cell); None where that is not known."""
    if "margin_change" not in flips:
        return None
    n_layers = flips.sizes["layer"]
    changed = np.zeros((flips.sizes["recipe"], n_groups, n_layers), bool)
    for layer in range(n_layers):
        moved = flips["margin_change"].isel(layer=layer).transpose("recipe", "token").values != 0  # NaN is not known
        for recipe in range(len(moved)):
            changed[recipe, :, layer] = np.bincount(group[moved[recipe]], minlength=n_groups) > 0
    return np.asarray(changed.any(axis=-1, keepdims=True)) if pooled else changed


def _logit_noise(flips: xr.Dataset, by_layer: bool) -> np.ndarray:
    """Standard deviation of the margin's change over √2, (recipe, layer), or (recipe, 1) over all layers."""
    n, total, squares = np.zeros((3, flips.sizes["recipe"], flips.sizes["layer"]))
    for layer in range(flips.sizes["layer"]):
        change = flips["margin_change"].isel(layer=layer).transpose("recipe", "token").values.astype(np.float64)
        n[:, layer] = np.count_nonzero(~np.isnan(change), axis=1)
        total[:, layer], squares[:, layer] = np.nansum(change, axis=1), np.nansum(np.square(change), axis=1)
    if not by_layer:
        n, total, squares = (sums.sum(axis=1, keepdims=True) for sums in (n, total, squares))
    return np.sqrt(np.maximum(divide(squares, n) - np.square(divide(total, n)), 0) / 2)


def _edges(edges: Sequence[float] | None, largest: float) -> np.ndarray:
    if edges is None:
        last = max(int(np.ceil(np.log2(largest / SMALLEST_EDGE))), 0) if largest > 0 else 0
        return np.array([0, *(SMALLEST_EDGE * 2.0 ** np.arange(last + 1))])
    given = np.asarray(edges, np.float64)
    if given.ndim != 1 or len(given) < 2 or not (np.diff(given) > 0).all():
        raise ProbeError(f"edges is {list(edges)}: give at least two margins in logits, rising")
    return given


def _n_documents(flips: xr.Dataset) -> int:
    return int(flips["sample"].max()) + 1 if flips.sizes["token"] else 0


def _variable(dims: Sequence[str], values: Any, long_name: str, units: str = "1") -> xr.Variable:
    return xr.Variable(tuple(dims), values, {"long_name": long_name, "units": units})


def _status(dims: Sequence[str], codes: np.ndarray) -> xr.Variable:
    attributes = {"long_name": "what became of the interval", "units": "1", "categories": list(INTERVAL_STATUS)}
    return xr.Variable(tuple(dims), codes, attributes)


def _labelled(result: xr.Dataset, source: xr.Dataset, bootstrap: Bootstrap) -> xr.Dataset:
    """The result with the coords of the group that it came from, and how its intervals were made."""
    kept = {
        name: coord.variable
        for name, coord in source.coords.items()
        if name not in result.coords and coord.dims and set(coord.dims) <= set(result.dims)
    }
    return result.assign_coords(kept).assign_attrs(bootstrap.attributes)
