"""ops.measure against the reference: every instruction set, dtype and format, tails, the ends of the bins."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import reference
import shapes
import torch
from conftest import forced_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import random_weight
from torch import Tensor

from precal_ext import ops

# N, K, bits, group_size, c, and the rest of random_weight: parts of a row that end inside a group, groups of no whole
# vectors, segments, both scales, more levels than registers hold.
FORMATS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((3, 2300, 4, 64, 1), {"trellis": True}),
    ((3, 2300, 3, 128, 4), {"trellis": True}),
    ((2, 2304, 4, 96, 2), {"trellis": True}),
    ((2, 1536, 4, 64, 1), {"trellis": True, "segment": 768}),
    ((3, 1055, 2, 13, 1), {"trellis": True}),
    ((3, 300, 6, 32, 2), {"trellis": True}),
    ((4, 301, 5, 16, 0), {}),
    ((4, 65, 8, 32, 1), {}),
    ((1, 1, 4, 64, 1), {}),
    ((3, 1100, 4, 128, 0), {"split": True, "uniform": True, "scale_dtype": "float16"}),
    ((3, 301, 3, 50, 0), {"split": True, "uniform": True, "scale_dtype": "float16"}),
    ((0, 64, 4, 32, 1), {}),
    ((3, 0, 4, 32, 1), {}),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(arguments: tuple[Any, ...]) -> None:
    (counts, squares), (want_counts, want_squares) = ops.measure(*arguments), reference.measure(*arguments)
    assert (counts.dtype, squares.dtype) == (torch.int64, torch.float64)
    assert torch.equal(counts, want_counts)
    torch.testing.assert_close(squares, want_squares, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("numbers", "options"), FORMATS, ids=str)
def test_against_the_reference(isa: str, dtype: torch.dtype, numbers: tuple[int, ...], options: dict[str, Any]) -> None:
    check(shapes.measure_arguments(random_weight(7, *numbers, **options), 512, 256.0, dtype))


@pytest.mark.parametrize(("num_bins", "half"), [(2, 1.0), (256, 256.0), (2048, 16.0), (65536, 65536.0), (4, 65536.0)])
def test_bins_of_any_width(isa: str, num_bins: int, half: float) -> None:
    """Also wider than a level, where a tiny quotient must not lose its sign."""
    w, *rest = shapes.measure_arguments(random_weight(8, 5, 300, 4, 64, 1), num_bins, half)
    w[0, ::7] = 1e-45
    w[0, 1::7] = -1e-45
    check((w, *rest))


def on_whole_levels(values: Tensor, num_bins: int, half: float) -> tuple[Any, ...]:
    """Scales of one, so that w is in units of levels."""
    N, K = values.shape
    packed = ops.pack(torch.full((N, K), 8, dtype=torch.uint8), 4)
    ones = torch.ones(N, 1, dtype=torch.float16)
    return (values, packed, ones, torch.ones(N).bfloat16(), *[None] * 5, K, 4, K, num_bins, half, 0)


def test_edges_belong_to_the_bin_above_and_the_last_to_the_last(isa: str) -> None:
    edges = torch.arange(-8.0, 8.5, 0.5)
    below = torch.nextafter(edges, torch.tensor(-math.inf))
    far = torch.tensor([-1e30, 1e30, math.inf, -math.inf, math.nan, 2.0**31, -(2.0**31), 3e9])
    w = torch.cat([edges, below, far, torch.tensor([0.0, -0.0])])[None].contiguous()
    arguments = on_whole_levels(w, 32, 8.0)
    counts, squares = ops.measure(*arguments)
    assert torch.equal(counts, reference.measure(*arguments)[0])
    assert counts.sum() == len(edges) + len(below) - 1 + 2  # what lies below -8 does not count
    assert counts[0, 0] == 2
    assert counts[0, -1] == 3
    assert squares[0].isnan().all()


def test_groups_of_a_scale_of_zero_do_not_count(isa: str) -> None:
    weight = random_weight(9, 4, 300, 4, 64, 0)
    weight.scale[:, 1] = 0
    weight.scale[2] = 0
    w, *rest = shapes.measure_arguments(weight, 256, 256.0)
    w[:, ::3] += 0.01  # 0 / 0 and x / 0
    check((w, *rest))


def test_an_entry_that_points_outside_of_its_block_stands_for_nothing(isa: str) -> None:
    weight = random_weight(10, 3, 300, 4, 32, 2)
    weight.outlier_index.fill_(200)  # the second block has 44 columns
    weight.scale[(weight.scale & 0x7F) == 0] = 1
    *before, segment = weight
    counts, _ = ops.measure(torch.zeros(3, 300), *before, 256, 256.0, segment)
    used = (weight.outlier_value[:, 0] & 0x7F).ne(0).any(1).sum()
    assert counts.sum() == 900 - used


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_do_not_matter(threads: int) -> None:
    arguments = shapes.measure_arguments(random_weight(11, 200, 1100, 4, 64, 1, trellis=True), 2048, 256.0)
    with forced_threads(1):
        want = ops.measure(*arguments)
    with forced_threads(threads):
        got = ops.measure(*arguments)
    assert all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(got, want, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(1, 4), K=st.integers(1, 1200), bits=st.integers(2, 8), group_size=st.integers(1, 300),
    c=st.integers(0, 3), kind=st.sampled_from(["trellis", "plain", "uniform", "split"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_format(N: int, K: int, bits: int, group_size: int, c: int, kind: str, seed: int) -> None:
    options: dict[str, Any] = {"trellis": kind == "trellis" and bits < 8, "uniform": kind in ("uniform", "split")}
    if kind == "split":
        options |= {"split": True, "scale_dtype": "float16"}
    weight = random_weight(seed, N, K, bits, group_size, 0 if kind == "split" else c, **options)
    check(shapes.measure_arguments(weight, 256, 256.0, DTYPES[seed % 3]))


# ---- errors ----------------------------------------------------------------------------------------------------------

GOOD = shapes.measure_arguments(random_weight(0, 5, 300, 4, 64, c=2), 256, 256.0)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, GOOD[0].double(), TypeError, "w must have dtype float32 or float16 or bfloat16, got float64"),
        (0, GOOD[0][:4], ValueError, "w must be [5, 300] (N, K) of the quantized weight, got [4, 300]"),
        (0, GOOD[0].T, ValueError, "w must be contiguous"),
        (0, GOOD[0][0], ValueError, "w must be [N, K], got [300]"),
        (12, 0, ValueError, "num_bins must be a power of two from 2 to 2^16, got 0"),
        (12, 1, ValueError, "num_bins must be a power of two from 2 to 2^16, got 1"),
        (12, 300, ValueError, "num_bins must be a power of two from 2 to 2^16, got 300"),
        (12, 2**17, ValueError, "num_bins must be a power of two from 2 to 2^16, got 131072"),
        (13, 0.0, ValueError, "half must be a power of two from 1 to 2^16, got 0"),
        (13, 3.0, ValueError, "half must be a power of two from 1 to 2^16, got 3"),
        (13, 0.5, ValueError, "half must be a power of two from 1 to 2^16, got 0.5"),
        (13, math.nan, ValueError, "half must be a power of two from 1 to 2^16, got nan"),
        (13, math.inf, ValueError, "half must be a power of two from 1 to 2^16, got inf"),
        (14, 7, ValueError, "segment must be 0, K or a divisor of K that 32 divides, got 7 for K=300"),
    ],
)
def test_errors(place: int, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^measure: " + re.escape(message)):
        ops.measure(*GOOD[:place], value, *GOOD[place + 1 :])
