"""dequantize: W' to the bit, from any valid tensors of a checkpoint."""

from __future__ import annotations

import re

import numpy as np
import pytest
import reference
import shapes
import torch
from conftest import ISAS, THREADS, forced_isa, forced_threads
from shapes import Weight

from precal_ext import _C, ops

FORMATS = [
    {},
    {"uniform": True},
    {"c": 1},
    {"trellis": True},
    {"c": 2, "trellis": True},
    {"split": True, "trellis": True},
    {"c": 4, "uniform": True},
    {"c": 16, "scale_dtype": "float16"},
    {"split": True, "scale_dtype": "float16", "uniform": True},
    {"split": True},
]


# ---- number formats, against torch's own -----------------------------------------------------------------------------


def test_e4m3_is_torch_float8_e4m3fn() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    theirs = codes.view(torch.float8_e4m3fn).double()
    torch.testing.assert_close(reference.e4m3_values(), theirs, rtol=0, atol=0, equal_nan=True)


def test_every_e4m3_scale_is_decoded(isa: str) -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    # one column each, code 3 of the uniform 2-bit grid: level 1
    packed = ops.pack(torch.full((len(codes), 1), 3, dtype=torch.uint8), 2)
    one = torch.ones(len(codes), dtype=torch.bfloat16)
    w = ops.dequantize(packed, codes[:, None], one, None, None, None, None, None, 1, 2, 1)
    assert torch.equal(w[:, 0].double(), reference.e4m3_values()[codes.long()])


def test_every_bfloat16_row_scale_is_decoded(isa: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    row_scale = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    packed = ops.pack(torch.full((65536, 1), 3, dtype=torch.uint8), 2)
    scale = torch.full((65536, 1), 0x38, dtype=torch.uint8)  # 1.0
    w = ops.dequantize(packed, scale, row_scale, None, None, None, None, None, 1, 2, 1)
    torch.testing.assert_close(w[:, 0].double(), reference.bf16_values(bits), rtol=0, atol=0, equal_nan=True)


def test_every_float16_scale_is_decoded(isa: str) -> None:
    scale = torch.from_numpy(np.arange(65536, dtype=np.uint16).view(np.float16))[:, None]
    packed = ops.pack(torch.full((65536, 1), 3, dtype=torch.uint8), 2)
    one = torch.ones(65536, dtype=torch.bfloat16)
    w = ops.dequantize(packed, scale, one, None, None, None, None, None, 1, 2, 1)
    torch.testing.assert_close(w, scale.float(), rtol=0, atol=0, equal_nan=True)


# ---- W' --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
@pytest.mark.parametrize(("N", "K"), shapes.TAIL_SHAPES)
def test_the_bits_of_odd_shapes(bits: int, N: int, K: int) -> None:
    for i, form in enumerate(FORMATS):
        weight = shapes.random_weight(i, N, K, bits, group_size=[32, 128, 13][i % 3], **form)
        want = reference.dequantize(*weight)
        for isa in ISAS:
            with forced_isa(isa):
                assert torch.equal(ops.dequantize(*weight), want)


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
def test_the_bits_of_random_formats(bits: int) -> None:
    for seed in range(60):
        weight = shapes.random_case(seed, bits)
        want = reference.dequantize(*weight)
        for isa in ISAS:
            with forced_isa(isa):
                assert torch.equal(ops.dequantize(*weight), want), seed


def test_uniform_is_the_grid_of_offsets(isa: str) -> None:
    for bits in shapes.ALL_BITS:
        weight = shapes.random_weight(bits, 5, 65, bits, 32, uniform=True)
        grid = reference.levels_of(None, bits).clamp(min=-127).to(torch.int8)[None]  # -128 is not a level
        want = ops.dequantize(*weight._replace(grid=grid))
        if bits == 8:
            want = torch.where(reference.unpack(weight.packed, 8, 65) == 0, ops.dequantize(*weight), want)
        assert torch.equal(ops.dequantize(*weight), want)


def test_outliers_add_to_the_dense_value(isa: str) -> None:
    weight = shapes.random_weight(0, 1, 600, 4, 64)
    dense = ops.dequantize(*weight)
    index, value = torch.zeros(1, 3, 2, dtype=torch.uint8), torch.zeros(1, 3, 2, dtype=torch.uint8)
    index[0, 1] = torch.tensor([0, 255])
    value[0, 1] = torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn).view(torch.uint8)
    difference = ops.dequantize(*weight._replace(outlier_index=index, outlier_value=value)) - dense
    assert difference.nonzero()[:, 1].tolist() == [256, 511]
    want = torch.tensor([0.5, -2.0]) * reference.OUTLIER_UNIT * weight.row_scale.float()
    torch.testing.assert_close(difference[0, [256, 511]], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("K", [*shapes.TAIL_K, 0, 4096, 4095, 2047, 2049, 1792, 14336])
def test_outlier_blocks(K: int) -> None:
    assert _C.outlier_blocks(K) == reference.outlier_blocks(K)
    assert _C.num_outlier_blocks(K) == len(reference.outlier_blocks(K))


def test_an_entry_past_a_short_block_touches_nothing(isa: str) -> None:
    # Segments of 288 columns: the second block holds 32, and its position 40 would be in the next segment.
    weight = shapes.random_weight(0, 2, 2304, 4, 64, c=1)
    index, value = torch.zeros_like(weight.outlier_index), torch.zeros_like(weight.outlier_value)
    index[:, 1], value[:, 1] = 40, 1.0
    stray = weight._replace(outlier_index=index, outlier_value=value)
    dense = weight._replace(outlier_index=None, outlier_value=None)
    assert torch.equal(ops.dequantize(*stray), ops.dequantize(*dense))
    x = torch.randn(3, 2304, generator=shapes.generator(0))
    y, want = (ops.linear(x, ops.prepack(*w), None, *w.numbers) for w in (stray, dense))
    assert torch.equal(y, want)


@pytest.mark.parametrize(("N", "K"), [(0, 64), (4, 0), (0, 0)])
@pytest.mark.parametrize("c", [0, 2])
def test_empty_weights(isa: str, N: int, K: int, c: int) -> None:
    assert ops.dequantize(*shapes.random_weight(0, N, K, 4, 32, c)).shape == (N, K)


def test_threads_change_nothing(isa: str) -> None:
    weight = shapes.random_weight(0, 33, 2304, 3, 64, c=2)
    results = []
    for count in THREADS:
        with forced_threads(count):
            results.append(ops.dequantize(*weight))
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- errors, shared by dequantize, measure and prepack ---------------------------------------------------------------

GRID = shapes.random_weight(0, 5, 300, 4, 64, c=2)
SPLIT = shapes.random_weight(0, 5, 300, 4, 64, split=True)


def read(name: str, weight: Weight) -> object:
    if name == "measure":
        *before, segment = weight
        return ops.measure(torch.zeros(len(weight.packed), 300), *before, 256, 256.0, segment)
    return getattr(ops, name)(*weight)


@pytest.mark.parametrize("name", ["dequantize", "measure", "prepack"])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (GRID._replace(bits=1), ValueError, "bits must lie in [2, 8], got 1"),
        (GRID._replace(bits=9), ValueError, "bits must lie in [2, 8], got 9"),
        (GRID._replace(group_size=0), ValueError, "group_size must lie in [1, 2^30], got 0"),
        (GRID._replace(K=-1), ValueError, "K must lie in [0, 2^30], got -1"),
        (GRID._replace(K=2**31), ValueError, "K must lie in [0, 2^30], got 2147483648"),
        (GRID._replace(packed=GRID.packed[0]), ValueError, "packed must be [N, words], got [38]"),
        (GRID._replace(packed=GRID.packed.long()), TypeError, "packed must have dtype int32, got int64"),
        (GRID._replace(packed=GRID.packed[:, ::2]), ValueError, "packed must be contiguous"),
        (GRID._replace(bits=3), ValueError, "packed must be [5, 29] (N, ceil(K*bits/32)), got [5, 38]"),
        (GRID._replace(scale=GRID.scale.float()), TypeError, "scale must have dtype uint8 or float16, got float32"),
        (GRID._replace(group_size=32), ValueError, "scale must be [5, 10] (N, ceil(K/group_size)), got [5, 5]"),
        (GRID._replace(row_scale=GRID.row_scale.half()), TypeError, "row_scale must have dtype bfloat16, got float16"),
        (GRID._replace(row_scale=GRID.row_scale[:4]), ValueError, "row_scale must be [5] (N), got [4]"),
        (GRID._replace(grid=GRID.grid.int()), TypeError, "grid must have dtype int8, got int32"),
        (
            GRID._replace(grid=GRID.grid[:, :8].clone()),
            ValueError,
            "grid must be [1, 16] (1, 2^bits), or [1, 32] for a trellis of 2 to 7 bits, got [1, 8]",
        ),
        (GRID._replace(outlier_value=None), ValueError, "outlier_index and outlier_value must be given together"),
        (GRID._replace(outlier_index=GRID.outlier_index.int()), TypeError, "outlier_index must have dtype uint8"),
        (
            GRID._replace(outlier_index=GRID.outlier_index[:, :1].clone()),
            ValueError,
            "outlier_index must be [5, 2, 2] (N",
        ),
        (GRID._replace(outlier_value=GRID.outlier_value.float()), TypeError, "outlier_value must have dtype uint8"),
        (
            GRID._replace(outlier_index=torch.zeros(5, 2, 17, dtype=torch.uint8)),
            ValueError,
            "outlier_index must have c <= 16",
        ),
        (SPLIT._replace(outlier_scale=None), ValueError, "outlier_scale and outlier_mask must be given together"),
        (SPLIT._replace(outlier_scale=SPLIT.outlier_scale.half()), TypeError, "outlier_scale must have dtype uint8"),
        (
            SPLIT._replace(outlier_mask=SPLIT.outlier_mask[:4]),
            ValueError,
            "outlier_mask must be [5, 38] (N, ceil(K/8))",
        ),
        (
            SPLIT._replace(outlier_index=GRID.outlier_index, outlier_value=GRID.outlier_value),
            ValueError,
            "outlier_mask excludes outlier_index, got both",
        ),
    ],
)
def test_errors(name: str, weight: Weight, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{name}: " + re.escape(message)):
        read(name, weight)


@pytest.mark.parametrize("name", ["dequantize", "measure", "prepack"])
@pytest.mark.parametrize(
    ("levels", "message"),
    [([-128, *range(15)], "grid must lie in [-127, 127], got -128"), ([5, *range(15)], "grid must be non-decreasing")],
)
def test_bad_levels_are_refused(name: str, levels: list[int], message: str) -> None:
    weight = GRID._replace(grid=torch.tensor([levels], dtype=torch.int8))
    with pytest.raises(ValueError, match=re.escape(message)):
        read(name, weight)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_scale_never_becomes_a_number(code: int) -> None:
    scale = GRID.scale.clone()
    scale[1, 2] = code
    try:
        w = ops.dequantize(*GRID._replace(scale=scale))
    except ValueError as error:
        assert "scale" in str(error)
    else:
        assert w[1, 128:192].isnan().all()
