"""Numbers of eight bits: formats, scalings, ``quantize``, and the product of two quantised matrices.

A value x is stored as a code q of the format and a scale s that its group shares: x ≈ q·s. Codes are made by the real
casts of torch, of values that were clamped to the format's range first: some casts turn what lies above it into NaN or
infinity. Rows and columns are the last two dims of a tensor: a weight is (…, output, input), activations are (token,
channel), and leading dims, such as experts, hold matrices with scales of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from probe.schema import ProbeError

Granularity = Literal["tensor", "row", "column", "block"]
PowerOfTwo = Literal["ceil", "floor"]

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""No scale is below float32's smallest normal number: devices that flush smaller ones to 0 would divide by 0."""

SMALLEST_AMAX = 1 / 512
"""Where an amax is capped, it is also never below this, as in Meta's recipe: no scale is below 1/(maximum·512)."""

TILE = 1 << 16
"""Values that are turned into a wider type at once: few enough to stay in a core's cache."""


class Float8Error(ProbeError):
    """A format, a scaling or a tensor that cannot be quantised."""


@dataclass(frozen=True)
class Format:
    """A number format: the torch ``dtype`` of its codes and the largest and smallest magnitudes it holds."""

    name: str
    dtype: torch.dtype
    maximum: float
    smallest_normal: float
    smallest_subnormal: float


_FORMATS = {
    number_format.name: number_format
    for number_format in (
        Format("e4m3fn", torch.float8_e4m3fn, 448.0, 2**-6, 2**-9),
        Format("e5m2", torch.float8_e5m2, 57344.0, 2**-14, 2**-16),
        Format("e4m3fnuz", torch.float8_e4m3fnuz, 240.0, 2**-7, 2**-10),
        Format("e5m2fnuz", torch.float8_e5m2fnuz, 57344.0, 2**-15, 2**-17),
        Format("int4", torch.int8, 7.0, 1.0, 1.0),
    )
}


def formats() -> dict[str, Format]:
    """The formats by name.

    Returns
    -------
    ``e4m3fn`` and ``e5m2`` (Micikevicius et al. 2022, FP8 formats for deep learning), their variants ``e4m3fnuz`` and
    ``e5m2fnuz`` of some accelerators, with one zero and no infinity, and ``int4``: the whole numbers from -7 to 7.
    """
    return dict(_FORMATS)


@dataclass(frozen=True)
class Scaling:
    """Which values share a scale, and what the scale is computed from.

    Parameters
    ----------
    granularity : one scale for each matrix (``"tensor"``), row, column or block.
    block : rows and columns of a block, e.g. (1, 128); for ``"block"`` only. A ragged last block is a smaller one.
    power_of_two : round scales up (``"ceil"``) to a power of two, or to that of the OCP microscaling formats
        (``"floor"``): 2^⌊log₂ amax⌋ over the format's largest power of two, so that the largest values may saturate.
    amax : the largest magnitude to count on, whatever the tensor holds: a static scale. None: the group's own.
    cap : the group's own amax counts for at most so much: values above saturate. The scale is then never below
        1/(maximum·512), as in Meta's recipe for Llama 4.

    Raises
    ------
    Float8Error
        For an unknown granularity or power of two, a block that is missing or has no use, an amax or cap that is not
        positive and finite, or both of them.
    """

    granularity: Granularity = "tensor"
    block: tuple[int, int] | None = None
    power_of_two: PowerOfTwo | None = None
    amax: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        if self.granularity not in get_args(Granularity):
            raise Float8Error(
                f"unknown granularity {self.granularity!r}: choose one of {', '.join(get_args(Granularity))}"
            )
        if self.granularity == "block" and not _is_block(self.block):
            raise Float8Error(f"block is {self.block!r}: give its rows and columns, such as block=(1, 128)")
        if self.granularity != "block" and self.block is not None:
            raise Float8Error(f'a block is given, but the granularity is "{self.granularity}": set it to "block"')
        if self.power_of_two not in (None, *get_args(PowerOfTwo)):
            raise Float8Error(f'power_of_two is {self.power_of_two!r}: it must be "ceil", "floor" or None')
        for name, value in (("amax", self.amax), ("cap", self.cap)):
            is_number = isinstance(value, int | float) and 0 < value <= torch.finfo(torch.float32).max
            if value is not None and not is_number:
                raise Float8Error(f"{name} is {value!r}, it must be a positive number that float32 holds")
        if self.amax is not None and self.cap is not None:
            raise Float8Error("amax is static and cap limits a dynamic one: give one of them")

    def static(self, amax: float) -> Scaling:
        """The same with a static amax: what a group whose largest magnitude is ``amax`` is scaled with."""
        if self.amax is not None or (amax == 0 and self.cap is None):
            return self
        return replace(self, amax=amax if self.cap is None else min(max(amax, SMALLEST_AMAX), self.cap), cap=None)


def _require_scaling(scaling: object) -> None:
    if not isinstance(scaling, Scaling):
        raise Float8Error(f"scaling is {scaling!r}: pass a Scaling, such as Scaling('row')")


@dataclass(frozen=True)
class Rounding:
    """How one tensor is rounded: the name of a format and a scaling."""

    format: str = "e4m3fn"
    scaling: Scaling = Scaling()

    def __post_init__(self) -> None:
        _format(self.format)
        _require_scaling(self.scaling)


@dataclass(frozen=True)
class Quantized:
    """What :func:`quantize` returns.

    ``codes`` (…, row, column) are of the format's dtype, ``scale`` float32 (…, row group, column group), and ``block``
    says how many rows and columns share one. ``n_saturated``, ``n_underflow`` and ``n_nonzero`` (…,) count values of
    each matrix: those above the format's maximum before the clamp, those that became 0 without being it, and those
    that are not 0.
    """

    codes: Tensor
    scale: Tensor
    format: Format
    block: tuple[int, int]
    n_saturated: Tensor
    n_underflow: Tensor
    n_nonzero: Tensor

    @property
    def saturation(self) -> float:
        """Share of all values that were above the format's maximum before the clamp; NaN where there are none."""
        return _share(self.n_saturated, self.codes.numel())

    @property
    def underflow(self) -> float:
        """Share of the non-zero values that became 0; NaN where there are none."""
        return _share(self.n_underflow, int(self.n_nonzero.sum()))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values that the codes stand for, (…, row, column); multiplied in float32, then rounded to ``dtype``."""
        values = _decode(self.codes, torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device))
        return _multiplied_(values, self.scale, self.block).to(dtype)


def quantize(x: Tensor, *, format: str = "e4m3fn", scaling: Scaling | None = None) -> Quantized:
    """Round a tensor to a format of eight bits or fewer, and count what that costs at both ends of its range.

    Parameters
    ----------
    x : floating-point (…, row, column), on any device.
    format : name of one of :func:`formats`.
    scaling : which values share a scale, and how it is computed; by default one dynamic scale for each matrix.

    Returns
    -------
    Quantized, with codes and scales such that x ≈ codes·scale. A group of zeros has scale 1, or the smallest one where
    a cap is set.

    Raises
    ------
    Float8Error
        For an unknown format, a tensor that has fewer than two dims or is not floating-point, or that holds NaN or
        infinity; says how many.

    Notes
    -----
    Scales are amax / maximum in float32, and x is divided by them in float32. Rounding is to the nearest, ties to even.
    """
    if not isinstance(x, Tensor):
        raise Float8Error(f"x is a {type(x).__name__}: pass a torch tensor, such as torch.as_tensor(x)")
    number_format, scaling = _format(format), scaling or Scaling()
    _require_scaling(scaling)
    values, block = _floats(x), _block(x, scaling)
    amax = _amax(values, block)
    if not amax.isfinite().all():
        n_nan, n_infinite = int(values.isnan().sum()), int(values.isinf().sum())
        raise Float8Error(
            f"the tensor holds {n_nan} NaN and {n_infinite} infinite values, for which there is no scale: "
            "find out where they come from"
        )
    scale, limit = _scales(amax, number_format, scaling)
    n_saturated = torch.zeros(x.shape[:-2], dtype=torch.int64, device=x.device)
    # Under plain amax scaling nothing can be above, and comparing with maximum·scale would count rounding errors.
    if scaling.amax is not None or scaling.cap is not None or scaling.power_of_two == "floor":
        for group, highest in _grouped(block, values, limit):
            n_saturated += _count(group.abs() > highest, n_dims=4)
    n_nonzero = _count(values, n_dims=2)
    codes = _codes(_scaled_(values, scale, block, number_format), number_format)
    n_underflow = n_nonzero - _count(_decode(codes, out=values), n_dims=2)
    return Quantized(codes, scale, number_format, block, n_saturated, n_underflow, n_nonzero)


@torch.no_grad()
def round_trip(x: Tensor, rounding: Rounding) -> Tensor:
    """What is left of a tensor that was quantised: ``quantize`` and ``dequantize``, without counting.

    Parameters
    ----------
    x : floating-point (…, row, column), on any device.
    rounding : format and scaling.

    Returns
    -------
    Tensor of x's shape and dtype. It carries no gradient: rounding has none. NaN and infinity are not looked for; a
    group without a cap that holds one becomes NaN.

    Raises
    ------
    Float8Error
        For a tensor that has fewer than two dims or is not floating-point.
    """
    number_format, scaling = _format(rounding.format), rounding.scaling
    values, block = _floats(x), _block(x, scaling)
    scale, _ = _scales(_amax(values, block), number_format, scaling)
    _scaled_(values, scale, block, number_format)
    if number_format.dtype is torch.int8:
        values.round_()
    else:
        _decode(_codes(values, number_format), out=values)
    return _multiplied_(values, scale, block).to(x.dtype)


class Deviation(NamedTuple):
    """How far a tensor is from its reference.

    ``sqnr`` in dB: 20·log₁₀(‖x‖/‖x−x̂‖), infinite where both are equal; ``relative_error`` ‖x−x̂‖/‖x‖, units "1";
    ``cosine`` of the angle between both, units "1", NaN where one of them is all zeros.
    """

    sqnr: float
    relative_error: float
    cosine: float


class DeviationSums:
    """Sums that the deviation of a tensor is computed from, added up part by part in float64."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, reference: Tensor, other: Tensor) -> DeviationSums:
        """Add one part, two tensors of the same shape; they are looked at in tiles, and never copied whole.

        Raises
        ------
        Float8Error
            If the shapes differ.
        """
        if reference.shape != other.shape:
            raise Float8Error(
                f"the tensors have shapes {tuple(reference.shape)} and {tuple(other.shape)}: they must be the same"
            )
        for x, y in _tiles(reference.detach(), other.detach()):
            x, y = x.double().flatten(), y.to(x.device).double().flatten()
            difference = x - y
            sums = torch.stack([x.dot(x), y.dot(y), x.dot(y), difference.dot(difference)])
            self._sums = sums if self._sums is None else self._sums + sums
        return self

    def deviation(self) -> Deviation:
        """That of all parts together; NaN where there is no value."""
        if self._sums is None:
            return Deviation(math.nan, math.nan, math.nan)
        reference, other, both, difference = self._sums.tolist()
        cosine = both / math.sqrt(reference * other) if reference * other else math.nan
        if difference == 0:
            return Deviation(math.inf, 0.0, cosine)
        if reference == 0:
            return Deviation(-math.inf, math.inf, cosine)
        # Two logarithms, because the quotient is 0 where the other tensor holds infinity.
        sqnr = 10 * (math.log10(reference) - math.log10(difference))
        return Deviation(sqnr, math.sqrt(difference / reference), cosine)


def matrix_error(reference: Tensor, other: Tensor) -> Deviation:
    """How far ``other`` is from ``reference``, tensors of the same shape: SQNR, relative error and cosine.

    Raises
    ------
    Float8Error
        If the shapes differ.
    """
    return DeviationSums().add(reference, other).deviation()


def scaled_matmul(x: Quantized, weight: Quantized, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The device's own product of two quantised matrices, x̂·ŵᵀ, where it has one.

    Parameters
    ----------
    x : activations (token, input), in a format of eight bits, with one scale for the matrix or for each row.
    weight : (output, input), likewise.
    dtype : of the result; accelerators may know bfloat16 only.

    Returns
    -------
    Tensor (token, output). Codes are multiplied and added up by the device, in float32 or what it takes for that.

    Raises
    ------
    Float8Error
        For shapes that do not fit, for scales that rows do not have to themselves, or where this device or this torch
        has no such product; :func:`emulated_matmul` computes it anywhere.
    """
    _check_matmul(x, weight)
    if any(quantized.codes.ndim != 2 or not quantized.format.dtype.is_floating_point for quantized in (x, weight)):
        raise Float8Error("scaled_matmul multiplies single matrices of floats: emulated_matmul takes all others")
    for name, quantized in (("x", x), ("weight", weight)):
        if quantized.scale.shape[1] != 1 or quantized.scale.shape[0] not in (1, len(quantized.codes)):
            raise Float8Error(
                f"{name} has scales {tuple(quantized.scale.shape)} for codes {tuple(quantized.codes.shape)}: "
                "scaled_matmul takes one scale for the tensor or for each row, emulated_matmul takes all others"
            )
    scales = x.scale, weight.scale.T
    if max(scale.numel() for scale in scales) > 1:
        scales = scales[0].expand(len(x.codes), 1).contiguous(), scales[1].expand(1, len(weight.codes)).contiguous()
    try:
        return torch._scaled_mm(x.codes, weight.codes.T, scale_a=scales[0], scale_b=scales[1], out_dtype=dtype)
    except (RuntimeError, ValueError) as error:
        raise Float8Error(
            f"{x.codes.device} has no product of {x.format.name} {tuple(x.codes.shape)} and {weight.format.name} "
            f"{tuple(weight.codes.shape)} in {dtype}: {error}\nemulated_matmul computes it in float32"
        ) from error


def emulated_matmul(x: Quantized, weight: Quantized, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """What :func:`scaled_matmul` computes, from dequantised values in float32: for every format, scaling and device.

    Parameters
    ----------
    x : activations (…, token, input).
    weight : (…, output, input).
    dtype : of the result (…, token, output).

    Raises
    ------
    Float8Error
        For shapes that do not fit.
    """
    _check_matmul(x, weight)
    return (x.dequantize() @ weight.dequantize().mT).to(dtype)


def _format(name: str) -> Format:
    if name not in _FORMATS:
        raise Float8Error(f"unknown format {name!r}: choose one of {', '.join(_FORMATS)}")
    return _FORMATS[name]


def _check_matmul(x: Quantized, weight: Quantized) -> None:
    if x.codes.shape[-1] != weight.codes.shape[-1]:
        raise Float8Error(
            f"x {tuple(x.codes.shape)} and weight {tuple(weight.codes.shape)} do not fit: "
            "rows of both must be as long, a weight is (output, input)"
        )


def _is_block(block: object) -> bool:
    return isinstance(block, tuple) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)


def _floats(x: Tensor) -> Tensor:
    """A copy of the tensor to round, in float32, to be worked on in place."""
    if x.ndim < 2:
        raise Float8Error(f"the tensor has {x.ndim} dims, rows and columns are needed: pass x[None] for a single row")
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise Float8Error(f"cannot quantise {x.dtype}: pass float32, float16 or bfloat16 values")
    # Two steps, because a copy that both transposes and converts is far slower.
    return torch.empty(x.shape, dtype=torch.float32, device=x.device).copy_(x.detach().contiguous())


def _block(x: Tensor, scaling: Scaling) -> tuple[int, int]:
    """Rows and columns that share a scale. A matrix without a value has no group."""
    rows, columns = (max(size, 1) for size in x.shape[-2:])
    if scaling.block is not None:
        return scaling.block
    return {"tensor": (rows, columns), "row": (1, columns), "column": (rows, 1)}[scaling.granularity]


def _grouped(block: tuple[int, int], values: Tensor, by_group: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (…, row group, row, column group, column) of ``values`` (…, row, column), and of ``by_group`` (…, row
    group, 1, column group, 1) beside them; at most four, for the whole blocks and for the ragged ones at both ends.
    """
    for rows, row_groups, height in _runs(values.shape[-2], block[0]):
        for columns, column_groups, width in _runs(values.shape[-1], block[1]):
            part = values[..., rows, columns].unflatten(-2, (-1, height)).unflatten(-1, (-1, width))
            yield part, by_group[..., row_groups, None, column_groups, None]


def _runs(size: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """The whole blocks of one dim, then its ragged one: which places, which groups, and how long a block is."""
    n_whole, rest = divmod(size, block)
    if n_whole:
        yield slice(0, n_whole * block), slice(0, n_whole), block
    if rest:
        yield slice(n_whole * block, size), slice(n_whole, n_whole + 1), rest


def _amax(values: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude of each group, float32 (…, row group, column group)."""
    groups = [-(-size // length) for size, length in zip(values.shape[-2:], block, strict=True)]
    result = values.new_zeros(*values.shape[:-2], *groups)
    if values.numel():
        for group, amax in _grouped(block, values, result):
            # Two passes that write nothing are faster than the magnitudes of all values.
            highest, lowest = (extreme((-3, -1), keepdim=True) for extreme in (group.amax, group.amin))
            amax.copy_(torch.maximum(highest, -lowest))
    return result


def _scales(amax: Tensor, number_format: Format, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """Scale of each group, and the largest magnitude that its codes reach."""
    if scaling.amax is not None:
        limit = torch.full_like(amax, scaling.amax)
    elif scaling.cap is not None:
        limit = amax.clamp(SMALLEST_AMAX, scaling.cap)
    else:
        limit = torch.where(amax == 0, number_format.maximum, amax)
    if scaling.power_of_two is None:
        return (limit / number_format.maximum).clamp(min=SMALLEST_SCALE), limit
    if scaling.power_of_two == "floor":
        largest_power = math.frexp(number_format.maximum)[1]
        exponent = limit.frexp().exponent - largest_power
    else:
        mantissa, exponent = (limit / number_format.maximum).frexp()
        exponent = exponent - (mantissa == 0.5).int()
    scale = torch.ones_like(limit).ldexp(exponent).clamp(min=SMALLEST_SCALE)
    return scale, scale * number_format.maximum


def _scaled_(values: Tensor, scale: Tensor, block: tuple[int, int], number_format: Format) -> Tensor:
    """Divide values by their scales and clamp them to the format's range, in place."""
    for group, group_scale in _grouped(block, values, scale):
        group.div_(group_scale)
    return values.clamp_(-number_format.maximum, number_format.maximum)


def _multiplied_(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply values by their scales, in place."""
    for group, group_scale in _grouped(block, values, scale):
        group.mul_(group_scale)
    return values


def _codes(scaled: Tensor, number_format: Format) -> Tensor:
    """Codes of values in the format's range."""
    return (scaled.round() if number_format.dtype is torch.int8 else scaled).to(number_format.dtype)


def _count(values: Tensor, *, n_dims: int) -> Tensor:
    """How many values are not 0 over the last ``n_dims`` dims, int64; matrix by matrix, torch being slow by dim."""
    counts = torch.zeros(values.shape[:-n_dims], dtype=torch.int64, device=values.device)
    if values.numel():
        for count, matrix in zip(counts.view(-1), values.reshape(counts.numel(), -1), strict=True):
            count.copy_(matrix.count_nonzero())
    return counts


def _decode(codes: Tensor, out: Tensor) -> Tensor:
    """The numbers that the codes stand for, without their scales, written to ``out``, contiguous float32."""
    if codes.dtype is not torch.float8_e4m3fn or codes.device.type != "cpu":
        return out.copy_(codes)
    # On a CPU torch decodes this format three times slower than a table does.
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    index = codes.view(torch.uint8).flatten()
    for part, values in zip(index.split(TILE), out.view(-1).split(TILE), strict=True):
        torch.index_select(table, 0, part.int(), out=values)
    return out


def _share(count: Tensor, total: int) -> float:
    return int(count.sum()) / total if total else math.nan


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of small parts of two tensors of the same shape, whatever their strides."""
    if x.ndim == 0:
        yield x, y
    elif x.numel():
        size = x[0].numel()
        if size > TILE:
            for pair in zip(x, y, strict=True):
                yield from _tiles(*pair)
        else:
            yield from zip(x.split(TILE // size), y.split(TILE // size), strict=True)
