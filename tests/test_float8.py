"""Formats, scales and codes: by hand first, then against ml_dtypes, theory, and torch's own product."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probe.float8 import (
    DeviationSums,
    Float8Error,
    Rounding,
    Scaling,
    emulated_matmul,
    formats,
    matrix_error,
    quantize,
    round_trip,
    scaled_matmul,
)

NUMPY_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
SCALINGS = {
    "tensor": Scaling(),
    "row": Scaling("row"),
    "column": Scaling("column"),
    "1x128": Scaling("block", (1, 128)),
    "128x128": Scaling("block", (128, 128)),
    "3x5": Scaling("block", (3, 5)),
    "MX floor": Scaling("block", (1, 32), power_of_two="floor"),
    "MX ceil": Scaling("block", (1, 32), power_of_two="ceil"),
    "row ceil": Scaling("row", power_of_two="ceil"),
    "static": Scaling(amax=2.0),
    "capped": Scaling("row", cap=1.5),
    "floor capped": Scaling("row", power_of_two="floor", cap=1.5),
}


def unit(name: str) -> Scaling:
    """A static scaling whose scale is 1: codes are those of the values themselves."""
    return Scaling(amax=formats()[name].maximum)


def by_blocks(x: np.ndarray, name: str, height: int, width: int) -> np.ndarray:
    """Round a matrix with dynamic scales, block by block, in numpy."""
    result = np.empty_like(x)
    for i in range(0, x.shape[0], height):
        for j in range(0, x.shape[1], width):
            block = x[i : i + height, j : j + width]
            maximum = np.float32(formats()[name].maximum)
            scale = np.abs(block).max() / maximum if block.any() else np.float32(1)
            scaled = np.clip(block / scale, -maximum, maximum)
            result[i : i + height, j : j + width] = scaled.astype(NUMPY_DTYPES[name]).astype(np.float32) * scale
    return result


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# By hand


@pytest.mark.parametrize(
    "name, values, codes",
    [
        # 1 is exponent 0 over a bias of 7; 448 = 1.75 x 2^8; 2^-9 is the last bit; ties go to the even one
        ("e4m3fn", [1, -1, 448, 2**-9, 2**-10, 1.5 * 2**-9, 17, 19], [0x38, 0xB8, 0x7E, 0x01, 0x00, 0x02, 0x58, 0x5A]),
        ("e5m2", [1, -1, 57344, 2**-16, 2**-17, 1.125], [0x3C, 0xBC, 0x7B, 0x01, 0x00, 0x3C]),
        ("e4m3fnuz", [1, -1, 240, 2**-10, 2**-11], [0x40, 0xC0, 0x7F, 0x01, 0x00]),
        ("e5m2fnuz", [1, -1, 57344, 2**-17, 2**-18], [0x40, 0xC0, 0x7F, 0x01, 0x00]),
    ],
)
def test_codes_by_hand(name, values, codes):
    quantized = quantize(torch.tensor([values]), format=name, scaling=unit(name))
    assert quantized.scale.tolist() == [[1]]
    assert quantized.codes.view(torch.uint8).tolist() == [codes]


def test_int4_by_hand():
    quantized = quantize(torch.tensor([[7.0, -7, 0.5, 1.5, -2.5, 0.4]]), format="int4")
    assert quantized.codes.dtype is torch.int8
    assert quantized.codes.tolist() == [[7, -7, 0, 2, -2, 0]]
    assert quantized.underflow == 2 / 6
    quantized = quantize(torch.tensor([[14.0, 3.0, -14.0, 0.0]]), format="int4")
    assert quantized.dequantize().tolist() == [[14, 4, -14, 0]]
    assert quantize(torch.tensor([[9.0, 3.0]]), format="int4", scaling=unit("int4")).codes.tolist() == [[7, 3]]


def test_a_scale_is_amax_over_the_maximum():
    x = torch.tensor([[1.0, -2.0, 4.0, 0.5], [8.0, 1.0, 0.0, -16.0]])
    scales = {
        "tensor": [[16]],
        "row": [[4], [16]],
        "column": [[8, 2, 4, 16]],
        "block": [[2, 4], [8, 16]],
    }
    for granularity, amax in scales.items():
        block = (1, 2) if granularity == "block" else None
        quantized = quantize(x, scaling=Scaling(granularity, block))
        assert torch.equal(quantized.scale, torch.tensor(amax) / 448), granularity


def test_ragged_last_blocks_are_smaller_blocks():
    x = torch.arange(1.0, 36).reshape(5, 7)
    quantized = quantize(x, scaling=Scaling("block", (2, 3)))
    amax = torch.tensor([[10.0, 13, 14], [24, 27, 28], [31, 34, 35]])
    assert torch.equal(quantized.scale, amax / 448)
    wide = quantize(x, scaling=Scaling("block", (128, 128)))
    assert torch.equal(wide.codes.view(torch.uint8), quantize(x).codes.view(torch.uint8))
    assert torch.equal(wide.scale, quantize(x).scale)


def test_powers_of_two_by_hand():
    x = torch.tensor([[448.0], [449.0], [256.0], [255.0], [500.0], [1.75], [1.8], [2.0**-20]])
    ceil = quantize(x, scaling=Scaling("row", power_of_two="ceil")).scale.log2().flatten()
    assert ceil.tolist() == [0, 1, 0, 0, 1, -8, -7, -28]
    floor = quantize(x, scaling=Scaling("row", power_of_two="floor"))
    assert floor.scale.log2().flatten().tolist() == [0, 0, 0, -1, 0, -8, -8, -28]
    # 449, 500 and 1.8 lie above 448 times their scale, 255 does not: 510/448 does
    assert floor.n_saturated == 4
    assert floor.saturation == 0.5
    assert floor.dequantize().flatten().tolist() == [448, 448, 256, 224, 448, 1.75, 1.75, 2.0**-20]


@pytest.mark.parametrize("name", formats())
def test_a_power_of_two_scale_is_never_off_by_one(name):
    """At every power of two that float32 holds, at its neighbours, and likewise around maximum times it."""
    maximum = formats()[name].maximum
    powers = 2.0 ** np.arange(-100, 100, dtype=np.float32)
    edges = np.concatenate([powers, powers * np.float32(maximum)]).astype(np.float32)
    values = np.concatenate([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(np.inf))])
    x = torch.from_numpy(values)[:, None]
    exact = [float(value) for value in values]
    ceil = [math.frexp(value / maximum) for value in exact]  # in float64, where no quotient here is rounded to a power
    expected = [2.0 ** (exponent - (mantissa == 0.5)) for mantissa, exponent in ceil]
    found = quantize(x, format=name, scaling=Scaling("row", power_of_two="ceil"))
    assert found.scale.double().flatten().tolist() == expected
    assert found.n_saturated == 0
    largest_power = math.frexp(maximum)[1] - 1
    expected = [2.0 ** (math.frexp(value)[1] - 1 - largest_power) for value in exact]
    found = quantize(x, format=name, scaling=Scaling("row", power_of_two="floor"))
    assert found.scale.double().flatten().tolist() == expected


def test_a_cap_saturates_what_lies_above_and_keeps_scales_from_vanishing():
    x = torch.tensor([[2400.0, 1201.0, 1200.0, -1300.0], [1e-9, 0, 0, 0], [0, 0, 0, 0], [600.0, 300, 0, 0]])
    quantized = quantize(x, scaling=Scaling("row", cap=1200))
    expected = torch.tensor([1200, 1 / 512, 1 / 512, 600])[:, None] / 448
    assert torch.equal(quantized.scale, expected)
    assert quantized.scale.min() == torch.tensor(1 / (448 * 512))
    assert quantized.n_saturated == 3
    assert quantized.saturation == 3 / 16
    assert quantized.n_underflow == 1
    torch.testing.assert_close(quantized.dequantize()[0], torch.tensor([1200.0, 1200, 1200, -1200]))


def test_a_static_scale_does_not_look_at_the_tensor():
    x = torch.tensor([[1.0, 3.0, -2.5]])
    quantized = quantize(x, scaling=Scaling(amax=2.0))
    assert quantized.scale == torch.tensor(2.0) / 448
    assert quantized.n_saturated == 2
    assert quantized.dequantize().tolist() == [[1.0, 2.0, -2.0]]


def test_static_scaling_is_that_of_a_tensor_with_this_amax():
    x = torch.randn(8, 64)
    for scaling in (Scaling(), Scaling(cap=1.0), Scaling(cap=9.0), Scaling(power_of_two="floor"), Scaling(amax=3.0)):
        static = quantize(x, scaling=scaling.static(x.abs().max().item()))
        dynamic = quantize(x, scaling=scaling)
        assert torch.equal(static.scale, dynamic.scale), scaling
        assert static.n_saturated == dynamic.n_saturated
    assert Scaling().static(0) == Scaling()
    assert Scaling(cap=5).static(1e-9) == Scaling(amax=1 / 512)


def test_underflow_is_counted_over_values_that_are_not_zero():
    x = torch.tensor([[448.0, 2**-11, -(2**-11), 0, 0, 0, 0, 1]])
    quantized = quantize(x)
    assert (quantized.n_underflow, quantized.n_nonzero) == (2, 4)
    assert quantized.underflow == 0.5


def test_zeros_one_value_and_no_value():
    for name, scaling in SCALINGS.items():
        zeros = quantize(torch.zeros(3, 4), scaling=scaling)
        assert torch.equal(zeros.dequantize(), torch.zeros(3, 4)), name
        assert zeros.saturation == 0
        assert math.isnan(zeros.underflow)
        if scaling.amax is None and scaling.cap is None and scaling.power_of_two is None:
            assert (zeros.scale == 1).all(), name
        for shape in ((0, 4), (3, 0), (0, 0), (2, 0, 4)):
            empty = quantize(torch.zeros(shape), scaling=scaling)
            assert empty.dequantize().shape == round_trip(torch.zeros(shape), Rounding(scaling=scaling)).shape == shape
            assert math.isnan(empty.saturation) and math.isnan(empty.underflow)
    for value in (3.7, -1e-30, 1e30):
        torch.testing.assert_close(quantize(torch.tensor([[value]])).dequantize().item(), value)


@pytest.mark.parametrize("value", [1e-44, 1e-38, 2e38])
def test_the_ends_of_float32_make_no_infinity(value):
    for power_of_two in (None, "ceil", "floor"):
        for name in formats():
            quantized = quantize(
                torch.tensor([[value, -value]]), format=name, scaling=Scaling(power_of_two=power_of_two)
            )
            assert 0 < quantized.scale.item() < math.inf
            assert quantized.codes.float().isfinite().all()
            assert quantized.dequantize().isfinite().all()


# Every code


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_all_codes_are_decoded_as_ml_dtypes_does(name):
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(NUMPY_DTYPES[name]).astype(np.float32)
    number_format = formats()[name]
    finite = np.isfinite(expected)
    assert np.nanmax(expected[finite]) == number_format.maximum
    magnitudes = np.unique(np.abs(expected[finite]))
    assert magnitudes[1] == number_format.smallest_subnormal
    assert number_format.smallest_normal == float(ml_dtypes.finfo(NUMPY_DTYPES[name]).smallest_normal)
    x = torch.zeros(1, 256)
    quantized = quantize(x, format=name)
    quantized.codes.view(torch.uint8)[0] = torch.from_numpy(codes)
    np.testing.assert_array_equal(quantized.dequantize()[0].numpy(), expected)


@pytest.mark.parametrize("name", NUMPY_DTYPES)
def test_all_values_midpoints_and_neighbours_are_encoded_as_ml_dtypes_does(name):
    values = np.arange(256, dtype=np.uint8).view(NUMPY_DTYPES[name]).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2  # exact in float32
    random = np.random.default_rng(0)
    maximum = formats()[name].maximum
    x = np.concatenate(
        [
            values,
            middle,
            np.nextafter(middle, np.float32(np.inf)),
            np.nextafter(middle, np.float32(-np.inf)),
            random.normal(size=50_000).astype(np.float32),
            (random.choice([-1, 1], 50_000) * np.exp2(random.uniform(-20, np.log2(maximum), 50_000))).astype(
                np.float32
            ),
        ]
    )
    assert np.abs(x).max() <= maximum
    quantized = quantize(torch.from_numpy(x)[None], format=name, scaling=unit(name))
    expected = x.astype(NUMPY_DTYPES[name])
    np.testing.assert_array_equal(quantized.codes.view(torch.uint8)[0].numpy(), expected.view(np.uint8))
    np.testing.assert_array_equal(quantized.dequantize()[0].numpy(), expected.astype(np.float32))
    rounded = round_trip(torch.from_numpy(x)[None], Rounding(name, unit(name)))[0].numpy()
    np.testing.assert_array_equal(rounded, expected.astype(np.float32))


@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("factor", [1.03, 1.07, 1.2, 2, 1e6, 1e30])
def test_what_lies_above_the_maximum_saturates(name, factor):
    maximum = formats()[name].maximum
    x = torch.tensor([[maximum, -maximum]]) * factor
    quantized = quantize(x, format=name, scaling=unit(name))
    assert quantized.dequantize().tolist() == [[maximum, -maximum]]
    assert round_trip(x, Rounding(name, unit(name))).tolist() == [[maximum, -maximum]]
    assert quantized.saturation == 1


@pytest.mark.parametrize("name", NUMPY_DTYPES)
@pytest.mark.parametrize(
    "shape, block", [((8, 96), (1, 32)), ((9, 100), (4, 32)), ((7, 33), (7, 33)), ((5, 7), (1, 7))]
)
def test_blocks_are_those_of_a_plain_loop(name, shape, block):
    x = torch.randn(shape) * torch.randn(shape).exp()
    expected = by_blocks(x.numpy(), name, *block)
    found = quantize(x, format=name, scaling=Scaling("block", block)).dequantize()
    np.testing.assert_array_equal(found.numpy(), expected)


# Properties


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_is_quantize_and_dequantize(scaling, name, dtype):
    for shape in ((33, 70), (2, 3, 7, 130), (1, 1)):
        x = torch.randn(shape).to(dtype)
        expected = quantize(x, format=name, scaling=scaling).dequantize(dtype)
        found = round_trip(x, Rounding(name, scaling))
        assert found.dtype is dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_leading_dims_are_matrices_of_their_own_and_strides_do_not_matter(scaling):
    x = torch.randn(3, 2, 70, 40) * torch.arange(1.0, 7).reshape(3, 2, 1, 1)
    whole = quantize(x, scaling=scaling)
    assert whole.n_nonzero.shape == (3, 2)
    for i in range(3):
        for j in range(2):
            one = quantize(x[i, j], scaling=scaling)
            assert torch.equal(one.scale, whole.scale[i, j])
            assert torch.equal(one.dequantize(), whole.dequantize()[i, j])
            counts = [
                (q.n_saturated, q.n_underflow, q.n_nonzero)
                for q in (one, quantize(x[i : i + 1, j : j + 1], scaling=scaling))
            ]
            assert (
                counts[0]
                == counts[1]
                == (
                    whole.n_saturated[i, j],
                    whole.n_underflow[i, j],
                    whole.n_nonzero[i, j],
                )
            )
    transposed = x.mT.contiguous().mT
    assert torch.equal(quantize(transposed, scaling=scaling).dequantize(), whole.dequantize())


@given(st.integers(-30, 30), st.sampled_from(sorted(NUMPY_DTYPES)), st.integers(0, 2**31))
def test_a_power_of_two_on_the_tensor_is_one_on_the_result(exponent, name, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 40, generator=generator)
    for scaling in (Scaling("row"), Scaling("block", (2, 16), power_of_two="floor")):
        rounded = round_trip(x, Rounding(name, scaling))
        assert torch.equal(round_trip(x * 2.0**exponent, Rounding(name, scaling)), rounded * 2.0**exponent)
        assert torch.equal(round_trip(-x, Rounding(name, scaling)), -rounded)


def test_nothing_saturates_under_amax_scaling():
    x = torch.randn(64, 1000)
    for name in formats():
        for scaling in (Scaling(), Scaling("row"), Scaling("column"), Scaling("block", (1, 10))):
            assert quantize(x, format=name, scaling=scaling).saturation == 0
        assert quantize(x, format=name, scaling=Scaling("row", power_of_two="ceil")).saturation == 0
        rows = x.abs().amax(dim=1)
        assert quantize(x, format=name, scaling=Scaling("row", cap=rows.max().item())).saturation == 0


def test_the_input_is_left_alone():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(4, 8).to(dtype)
        before = x.clone()
        quantize(x)
        round_trip(x, Rounding())
        assert torch.equal(x, before)


def test_round_trip_carries_no_gradient():
    x = torch.randn(2, 4, requires_grad=True)
    rounded = round_trip(x, Rounding())
    assert not rounded.requires_grad
    (x + (rounded - x).detach()).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", formats())
def test_round_trip_turns_nan_and_infinity_into_nan_unless_capped(name, bad):
    x = torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]])
    rounded = round_trip(x, Rounding(name, Scaling("row")))
    assert rounded[0].isnan().all()
    assert rounded[1].isfinite().all()
    assert round_trip(torch.tensor([[math.nan, 1.0]]), Rounding(name, unit(name)))[0, 0].isnan()


# Errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Scaling("diagonal"), "unknown granularity 'diagonal'.*tensor, row, column, block"),
        (lambda: Scaling("block"), r"block is None.*block=\(1, 128\)"),
        (lambda: Scaling("block", (0, 4)), r"block is \(0, 4\)"),
        (lambda: Scaling("row", (1, 4)), 'granularity is "row": set it to "block"'),
        (lambda: Scaling(power_of_two="round"), 'power_of_two is \'round\'.*"ceil", "floor"'),
        (lambda: Scaling(amax=0), "amax is 0.*positive"),
        (lambda: Scaling(cap=math.nan), "cap is nan.*positive"),
        (lambda: Scaling(amax=math.inf), "amax is inf"),
        (lambda: Scaling(amax=1, cap=1), "give one of them"),
        (lambda: Rounding("e3m4"), "unknown format 'e3m4': choose one of e4m3fn, e5m2, e4m3fnuz, e5m2fnuz, int4"),
        (lambda: quantize(torch.ones(1, 2), format="fp8"), "unknown format 'fp8'"),
        (lambda: quantize(torch.ones(3)), r"1 dims.*x\[None\]"),
        (lambda: quantize(torch.ones(2, 2, dtype=torch.int64)), "cannot quantise torch.int64"),
        (lambda: quantize(torch.ones(2, 2).to(torch.float8_e4m3fn)), "cannot quantise torch.float8_e4m3fn"),
        (lambda: round_trip(torch.ones(3), Rounding()), "1 dims"),
        (lambda: quantize(np.zeros((2, 2))), "x is a ndarray: pass a torch tensor"),
        (lambda: quantize(torch.ones(2, 2), scaling="row"), "scaling is 'row': pass a Scaling"),
        (lambda: quantize(torch.tensor([[1, math.nan, math.inf, -math.inf]])), "1 NaN and 2 infinite"),
        (lambda: quantize(torch.tensor([[math.inf]]), scaling=Scaling(amax=3)), "0 NaN and 1 infinite"),
        (lambda: quantize(torch.tensor([[math.nan]]), scaling=Scaling(cap=3)), "1 NaN and 0 infinite"),
        (lambda: matrix_error(torch.ones(2, 2), torch.ones(2, 3)), r"\(2, 2\) and \(2, 3\)"),
    ],
)
def test_errors_name_the_thing_and_say_what_to_do(make, message):
    with pytest.raises(Float8Error, match=message):
        make()


# How far two tensors are apart


def test_matrix_error_by_hand():
    error = matrix_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]]))
    assert error.sqnr == pytest.approx(20)
    assert error.relative_error == pytest.approx(0.1)
    assert error.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))


def test_matrix_error_at_its_ends():
    x, zeros = torch.randn(3, 4), torch.zeros(3, 4)
    assert matrix_error(x, x) == (math.inf, 0, 1)
    assert matrix_error(zeros, x)[:2] == (-math.inf, math.inf)
    assert matrix_error(x, zeros)[:2] == (0, 1)
    assert matrix_error(zeros, zeros)[:2] == (math.inf, 0)
    for pair in ((zeros, x), (x, zeros), (zeros, zeros)):
        assert math.isnan(matrix_error(*pair).cosine)
    assert all(map(math.isnan, matrix_error(torch.zeros(0, 4), torch.zeros(0, 4))))
    assert matrix_error(torch.tensor(2.0), torch.tensor(1.0)).relative_error == 0.5
    infinite = matrix_error(torch.ones(2), torch.tensor([1.0, math.inf]))
    assert infinite[:2] == (-math.inf, math.inf) and math.isnan(infinite.cosine)
    assert all(map(math.isnan, matrix_error(torch.ones(2), torch.tensor([1.0, math.nan]))))


def test_matrix_error_is_float64_and_the_same_from_parts_and_for_any_strides():
    x = torch.randn(5, 300, 400)
    y = x + 1e-4 * torch.randn(x.shape)
    a, b = x.double(), y.double()
    expected = float(20 * ((a.norm() / (a - b).norm()).log10()))
    assert matrix_error(x, y).sqnr == pytest.approx(expected, abs=1e-9)
    assert matrix_error(x.mT, y.mT).sqnr == pytest.approx(expected, abs=1e-9)
    assert matrix_error(x.transpose(0, 2), y.transpose(0, 2)).cosine == pytest.approx(matrix_error(x, y).cosine)
    sums = DeviationSums()
    for pair in zip(x, y, strict=True):
        sums.add(*pair)
    assert sums.deviation() == pytest.approx(matrix_error(x, y))


# Theory and published values

SAMPLES = (1024, 2048)


def values(distribution: str) -> torch.Tensor:
    if distribution == "gaussian":
        return torch.randn(SAMPLES)
    if distribution == "uniform":
        return torch.rand(SAMPLES) * 2 - 1
    random = np.random.default_rng(0)
    return torch.from_numpy(random.standard_t(3, SAMPLES).astype(np.float32))


@pytest.mark.parametrize(
    "rounding, expected",
    [
        (Rounding(), (31.54, 31.87, 31.53)),
        (Rounding(scaling=SCALINGS["row"]), (31.54, 31.87, 31.97)),
        (Rounding(scaling=SCALINGS["1x128"]), (31.79, 31.97, 33.05)),
        (Rounding(scaling=SCALINGS["MX floor"]), (30.65, 26.22, 29.35)),
        (Rounding(scaling=SCALINGS["MX ceil"]), (31.52, 32.53, 31.44)),
        (Rounding("e5m2"), (25.56, 25.85, 25.56)),
    ],
    ids=["per tensor", "per row", "1x128", "MX floor", "MX ceil", "E5M2"],
)
def test_signal_to_noise_ratios(rounding, expected):
    """Those of a Student-t with 3 degrees of freedom differ from draw to draw: it has no fourth moment, so a few values
    carry much of one draw's energy, and where they fall between two codes decides; the others are sharp."""
    tolerances = {"gaussian": 0.04, "uniform": 0.04, "student-t": 0.4}
    for (distribution, tolerance), sqnr in zip(tolerances.items(), expected, strict=True):
        x = values(distribution)
        found = matrix_error(x, round_trip(x, rounding))
        assert found.sqnr == pytest.approx(sqnr, abs=tolerance), distribution
        assert found.relative_error == pytest.approx(10 ** (-found.sqnr / 20))


def test_rounding_noise_of_a_gaussian_is_that_of_theory():
    """A value in [2^e, 2^(e+1)) is off by a uniform error of step 2^(e-m): its mean square is step²/12."""
    x = values("gaussian")
    for name, mantissa_bits, published in (("e4m3fn", 3, 31.53), ("e5m2", 2, 25.51)):
        scaled = x.double() / x.abs().max() * formats()[name].maximum
        step = torch.exp2(
            scaled.abs().log2().floor().clamp(min=math.log2(formats()[name].smallest_normal)) - mantissa_bits
        )
        theory = 10 * math.log10(scaled.square().sum() / (step.square() / 12).sum())
        assert theory == pytest.approx(published, abs=0.06)
        assert matrix_error(x, round_trip(x, Rounding(name))).sqnr == pytest.approx(theory, abs=0.06)


def test_products_of_rounded_matrices():
    """torchao prints 28.77 to 28.89 dB and 22.74 to 22.94 for 1x128 on both sides."""
    activations, weight = torch.randn(512, 4096), torch.randn(512, 4096)
    reference = activations @ weight.T
    block, square = SCALINGS["1x128"], SCALINGS["128x128"]
    published = [
        ("e4m3fn", block, 28.79, 0.1),
        ("e5m2", block, 22.8, 0.15),
        ("e4m3fn", square, 28.685, 0.06),
        ("e5m2", square, 22.685, 0.06),
    ]
    for name, scaling, sqnr, tolerance in published:
        x = quantize(activations, format=name, scaling=block)
        product = emulated_matmul(x, quantize(weight, format=name, scaling=scaling))
        assert matrix_error(reference, product).sqnr == pytest.approx(sqnr, abs=tolerance), (name, scaling)


def test_outlier_channels_cost_small_values_that_the_signal_to_noise_ratio_does_not_show():
    x = torch.randn(4096, 4096)
    x[:, :4] *= 1000
    tensor, block = (quantize(x, scaling=SCALINGS[name]) for name in ("tensor", "1x128"))
    # Values below half the smallest subnormal vanish: normal density at 0, twice the threshold.
    threshold = x.abs().max().item() / 448 * 2**-10
    assert tensor.underflow == pytest.approx(math.erf(threshold / math.sqrt(2)), rel=0.02)
    assert tensor.underflow == pytest.approx(0.0067, abs=0.0006)
    assert block.underflow == pytest.approx(0.0001, abs=0.00003)
    assert matrix_error(x, tensor.dequantize()).sqnr == pytest.approx(31.54, abs=0.2)


# The device's own product


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
@pytest.mark.parametrize("x_scaling", ["tensor", "row"])
@pytest.mark.parametrize("weight_scaling", ["tensor", "row"])
def test_scaled_matmul_is_its_emulation(name, x_scaling, weight_scaling):
    x = quantize(torch.randn(48, 160), format=name, scaling=SCALINGS[x_scaling])
    weight = quantize(torch.randn(32, 160), format=name, scaling=SCALINGS[weight_scaling])
    found, expected = scaled_matmul(x, weight), emulated_matmul(x, weight)
    assert found.dtype is torch.float32
    # Codes are added up before the scales are applied, so only the order of sums differs.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    rounded = scaled_matmul(x, weight, dtype=torch.bfloat16)
    torch.testing.assert_close(rounded, expected.bfloat16(), rtol=2**-7, atol=1e-3)


def test_emulated_matmul_is_the_product_of_what_codes_stand_for():
    x, weight = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    for name in formats():
        quantized = [quantize(side, format=name, scaling=SCALINGS["3x5"]) for side in (x, weight)]
        expected = quantized[0].dequantize() @ quantized[1].dequantize().mT
        assert torch.equal(emulated_matmul(*quantized), expected)


def test_products_that_do_not_exist_say_so():
    def product(x=(16, 32), weight=(16, 32), name="e4m3fn", scaling=SCALINGS["tensor"]):
        sides = [quantize(torch.randn(shape), format=name, scaling=scaling) for shape in (x, weight)]
        return scaled_matmul(*sides)

    with pytest.raises(Float8Error, match=r"\(16, 32\) and weight \(16, 48\) do not fit"):
        product(weight=(16, 48))
    with pytest.raises(Float8Error, match="emulated_matmul takes all others"):
        product(scaling=Scaling("block", (1, 8)))
    with pytest.raises(Float8Error, match="single matrices of floats"):
        product(name="int4")
    with pytest.raises(Float8Error, match="single matrices of floats"):
        product(x=(2, 16, 32))
    with pytest.raises(Float8Error, match="no product of e4m3fnuz.*\n?.*emulated_matmul"):
        product(name="e4m3fnuz")
