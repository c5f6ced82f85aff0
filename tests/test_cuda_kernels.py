"""Every CUDA kernel against the CPU op, on the CPU (tests/cuda_on_cpu): in this process with every access held against
happens-before, and once more under ASan and UBSan."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import emulator
import pytest
import shapes
import torch
from torch import Tensor

from precal_ext import _C

VARIANT = os.environ.get("PRECAL_EMULATOR", "races")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def gpu() -> emulator.Emulated:
    return emulator.Emulated(VARIANT)


@pytest.mark.skipif("PRECAL_EMULATOR" in os.environ, reason="this is the run under sanitizers")
def test_the_same_under_asan_and_ubsan() -> None:
    emulator.run_sanitized(__file__)


def as_list(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def same_bits(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.dim() and a.dtype != torch.bool:
            a, b = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
        assert torch.equal(a, b), f"output {i} differs at {(a != b).nonzero()[:3].tolist()}"


def call(gpu: emulator.Emulated, name: str, arguments: Sequence[Any], like: Sequence[Tensor]) -> list[Tensor]:
    """With the scratch that the op asks for."""
    try:
        return gpu.call(name, arguments, like)
    except ValueError as error:
        wanted = re.search(r"workspace must have (\d+) bytes", str(error))
        if wanted is None:
            raise
        return gpu.call(name, arguments, like, int(wanted[1]))


def check(gpu: emulator.Emulated, name: str, *arguments: Any, seeds: Sequence[int] = (0, 1, 2)) -> list[Tensor]:
    """The bits of the CPU op, in every order; under sanitizers, which see no order, in one."""
    want = as_list(getattr(torch.ops.precal, name)(*arguments))
    for seed in seeds if VARIANT == "races" else seeds[:1]:
        gpu.device(seed)
        same_bits(call(gpu, name, arguments, want), want)
    return want


# ---- elementwise and packing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_threshold(gpu: emulator.Emulated, dtype: torch.dtype) -> None:
    w = shapes.student_t(3, 300).to(dtype)
    w[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    check(gpu, "soft_threshold", w, 0.0004)
    check(gpu, "soft_threshold", w[:0], 0.0004)


@pytest.mark.parametrize("bits", shapes.ALL_BITS)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 31), (2, 32), (5, 65), (2, 300), (0, 5), (3, 0)])
def test_pack_and_unpack(gpu: emulator.Emulated, bits: int, N: int, K: int) -> None:
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=shapes.generator(bits))
    (packed,) = check(gpu, "pack", codes, bits)
    check(gpu, "unpack", packed, bits, K)


def test_pack_takes_the_low_bits(gpu: emulator.Emulated) -> None:
    codes = torch.randint(0, 256, (2, 40), dtype=torch.uint8, generator=shapes.generator(0))
    want = torch.ops.precal.pack(codes & 7, 3)
    same_bits(gpu.call("pack", (codes, 3), [want]), [want])


# ---- a weight and its order on the GPU -------------------------------------------------------------------------------

# N, K, bits, group_size, c, and the rest of random_weight: row tiles, panels of 256 columns, runs of 16 and of 8,
# segments that end in a block of 96 columns, everything that is not tiled.
WEIGHTS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((17, 300, 4, 64, 2), {"trellis": True}),
    ((17, 300, 3, 64, 1), {"trellis": True}),
    ((33, 513, 4, 32, 1), {"trellis": True}),
    ((16, 255, 3, 32, 0), {"trellis": True}),
    ((1, 1, 4, 64, 1), {}),
    ((8, 256, 4, 128, 4), {}),
    ((9, 64, 3, 96, 0), {"uniform": True, "scale_dtype": "float16"}),
    ((2, 2304, 4, 64, 1), {"trellis": True}),
    ((1, 11008, 4, 128, 1), {"trellis": True}),
    ((1, 11008, 3, 32, 1), {"trellis": True}),
    ((2, 1536, 4, 64, 1), {"trellis": True, "segment": 768}),
    ((1, 2752, 3, 32, 1), {"trellis": True, "segment": 1376}),
    ((3, 640, 4, 64, 1), {"trellis": True, "segment": 320}),
    ((5, 300, 4, 16, 2), {"trellis": True}),
    ((5, 300, 3, 13, 1), {}),
    ((4, 130, 2, 32, 1), {"trellis": True}),
    ((4, 130, 5, 64, 16), {"trellis": True}),
    ((4, 65, 8, 32, 1), {}),
    ((3, 300, 4, 64, 0), {"split": True, "uniform": True, "scale_dtype": "float16"}),
    ((0, 64, 4, 32, 1), {}),
    ((3, 0, 4, 32, 1), {}),
]


@pytest.mark.parametrize(("numbers", "options"), WEIGHTS, ids=str)
def test_dequantize(gpu: emulator.Emulated, numbers: tuple[int, ...], options: dict[str, Any]) -> None:
    check(gpu, "dequantize", *shapes.random_weight(1, *numbers, **options), seeds=[0, 2])


@pytest.mark.parametrize(("numbers", "options"), WEIGHTS, ids=str)
def test_measure(gpu: emulator.Emulated, numbers: tuple[int, ...], options: dict[str, Any]) -> None:
    weight = shapes.random_weight(1, *numbers, **options)
    check(gpu, "measure", *shapes.measure_arguments(weight, 256, 256.0, torch.bfloat16), seeds=[0, 2])


def test_measure_with_counts_of_every_kind(gpu: emulator.Emulated) -> None:
    weight = shapes.random_weight(1, 40, 320, 4, 64, 1, trellis=True)
    for dtype in DTYPES:
        w, *rest = shapes.measure_arguments(weight, 2048, 128.0, dtype)
        w[0, :5] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
        w[1] *= 1000
        check(gpu, "measure", w, *rest)
        check(gpu, "measure", w, *rest[:-3], 64, 1.0, 0)


def test_dequantize_ignores_outliers_outside_of_their_block(gpu: emulator.Emulated) -> None:
    weight = shapes.random_weight(1, 3, 300, 4, 32, 2)
    weight.outlier_index.fill_(200)
    check(gpu, "dequantize", *weight)


def prepack(gpu: emulator.Emulated, weight: shapes.Weight) -> Tensor:
    size = _C.cuda_prepacked_bytes(*weight.numbers)
    return gpu.call("prepack", weight, [torch.empty(size, dtype=torch.uint8)])[0]


@pytest.mark.parametrize(("numbers", "options"), WEIGHTS, ids=str)
def test_prepack_and_back(gpu: emulator.Emulated, numbers: tuple[int, ...], options: dict[str, Any]) -> None:
    weight = shapes.random_weight(2, *numbers, **options)
    prepacked = prepack(gpu, weight)
    for seed in (1, 2):
        gpu.device(seed)
        assert torch.equal(prepack(gpu, weight), prepacked)  # every byte is written, padding too
    want = as_list(torch.ops.precal.unprepack(torch.ops.precal.prepack(*weight), *weight.numbers))
    same_bits(gpu.call("unprepack", (prepacked, *weight.numbers), want), want)


# ---- linear ----------------------------------------------------------------------------------------------------------

# |y - y64| / |x W'^T + bias| of the norms. float32: sums of three exact products. float16, bfloat16: half a step of y.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}


def linear(gpu: emulator.Emulated, x: Tensor, weight: shapes.Weight, bias: Tensor | None, prepacked: Tensor) -> Tensor:
    y = x.new_empty([*x.shape[:-1], len(weight.packed)])
    return call(gpu, "linear", (x, prepacked, bias, *weight.numbers), [y])[0]


def check_linear(
    gpu: emulator.Emulated, M: int, dtype: torch.dtype, weight: shapes.Weight, sms: int = 3, seeds: Sequence[int] = (2,)
) -> Tensor:
    N, K = len(weight.packed), weight.K
    x = torch.randn(M, K, generator=shapes.generator(M)).to(dtype)
    bias = torch.randn(N, generator=shapes.generator(N)).to(DTYPES[(M + N) % 3]) if (M + N) % 4 else None
    gpu.device(0)
    prepacked = prepack(gpu, weight)
    results = []
    for seed in seeds:
        gpu.device(seed, sms)
        results.append(linear(gpu, x, weight, bias, prepacked))
    y = results[0]
    assert all(torch.equal(y, other) for other in results[1:])  # whoever arrives last
    want = x.double() @ torch.ops.precal.dequantize(*weight).double().T
    if bias is not None:
        want += bias.double()
    error = (y.double() - want).norm() / want.norm() if want.norm() > 0 else y.double().norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"
    return y


@pytest.mark.parametrize(("numbers", "options"), WEIGHTS, ids=str)
def test_linear_of_every_weight(gpu: emulator.Emulated, numbers: tuple[int, ...], options: dict[str, Any]) -> None:
    weight = shapes.random_weight(3, *numbers, **options)
    for M, dtype in ((0, torch.float16), (1, torch.bfloat16), (5, torch.float16), (2, torch.float32)):
        check_linear(gpu, M, dtype, weight)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 7, 8, 9, 16])
def test_linear_of_few_tokens(gpu: emulator.Emulated, M: int, dtype: torch.dtype, bits: int) -> None:
    check_linear(gpu, M, dtype, shapes.random_weight(M, 35, 600, bits, 64 if M % 2 else 32, 1, trellis=True))


def test_slices_of_linear_arrive_in_any_order(gpu: emulator.Emulated) -> None:
    weight = shapes.random_weight(0, 20, 1300, 4, 64, 1, trellis=True)
    for dtype in DTYPES:
        for sms in (1, 64):
            check_linear(gpu, 3, dtype, weight, sms, seeds=[0, 1, 2, 3])


def test_a_row_of_y_depends_on_its_row_of_x_alone(gpu: emulator.Emulated) -> None:
    weight = shapes.random_weight(0, 20, 700, 4, 64, 2, trellis=True)
    gpu.device(0)
    prepacked = prepack(gpu, weight)
    x = torch.randn(12, 700, generator=shapes.generator(1)).bfloat16()
    x[5] = torch.nan
    y = linear(gpu, x, weight, None, prepacked)
    assert y[5].isnan().all() and y.isnan().sum() == 20
    for m in (0, 6, 11):
        assert torch.equal(linear(gpu, x[m : m + 1], weight, None, prepacked)[0], y[m])


@pytest.mark.parametrize(
    ("M", "N", "K", "bits", "group_size", "c", "dtype", "options"),
    [
        (17, 130, 300, 4, 64, 2, torch.bfloat16, {"trellis": True}),
        (64, 128, 256, 3, 32, 1, torch.float16, {"trellis": True}),
        (65, 100, 520, 4, 32, 1, torch.float16, {"trellis": True}),
        (130, 33, 200, 3, 64, 4, torch.bfloat16, {"trellis": True}),
        (40, 9, 301, 4, 128, 0, torch.bfloat16, {}),  # K % 8: no copies of 16 bytes
        (20, 20, 2304, 4, 128, 1, torch.bfloat16, {"trellis": True}),
        (17, 20, 2304, 3, 32, 1, torch.float16, {"trellis": True}),
        (17, 20, 1280, 4, 64, 1, torch.bfloat16, {"trellis": True, "segment": 640}),
        (66, 16, 128, 4, 64, 0, torch.bfloat16, {"uniform": True, "scale_dtype": "float16"}),
        (18, 16, 0, 4, 64, 0, torch.float16, {}),
    ],
)
def test_linear_of_many_tokens(
    gpu: emulator.Emulated,
    M: int,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    c: int,
    dtype: torch.dtype,
    options: dict[str, Any],
) -> None:
    weight = shapes.random_weight(M, N, K, bits, group_size, c, **options)
    check_linear(gpu, M, dtype, weight, sms=1)
    if K > 2000:
        check_linear(gpu, M, dtype, weight, sms=8, seeds=[0, 1, 2])  # slices


def test_a_device_with_little_shared_memory_still_multiplies(gpu: emulator.Emulated) -> None:
    weight = shapes.random_weight(0, 20, 300, 4, 64, 1, trellis=True)
    for shared_bytes in (99 << 10, 64 << 10):  # the tiles for many tokens, then nothing but the slow kernel
        gpu.device(0)
        prepacked = prepack(gpu, weight)
        gpu.device(0, 3, shared_bytes)
        x = torch.randn(3, 300, generator=shapes.generator(0)).half()
        want = x.double() @ torch.ops.precal.dequantize(*weight).double().T
        y = linear(gpu, x, weight, None, prepacked)
        assert (y - want).norm() <= TOLERANCE[torch.float16] * want.norm()


# ---- quantization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_histogram(gpu: emulator.Emulated, dtype: torch.dtype) -> None:
    w = shapes.student_t(5, 300).to(dtype)
    w[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    divisor = torch.rand(5, 10, generator=shapes.generator(1)) + 0.5
    mass = torch.randint(0, 2**31, (5, 10), generator=shapes.generator(2))
    label = torch.randint(0, 16, (5, 300), dtype=torch.uint8, generator=shapes.generator(3))
    check(gpu, "histogram", w, 100, -0.1, 0.1)
    check(gpu, "histogram", w, 1, -0.05, 0.02, divisor, None, 32)
    check(gpu, "histogram", w, 5000, -0.1, 0.1, divisor, mass, 32)  # more cells than shared memory is asked for
    check(gpu, "histogram", w, 64, -0.1, 0.1, None, mass, 32, label, 16)
    check(gpu, "histogram", w[:0], 100, -0.1, 0.1)


GRIDS = {
    "uniform": (4, None),
    "fitted": (4, shapes.GRID_4),
    "trellis 4": (4, shapes.TRELLIS_4),
    "trellis 3": (3, shapes.TRELLIS_3),
    "fitted 3": (3, shapes.GRID_3),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("matrix", shapes.HARD_MATRICES)
def test_quantize_hard_matrices(gpu: emulator.Emulated, grid: str, matrix: str) -> None:
    bits, levels = GRIDS[grid]
    levels = None if levels is None else torch.tensor([levels], dtype=torch.int8)
    w = shapes.HARD_MATRICES[matrix](6, 300)
    check(gpu, "quantize_groups", w, levels, bits, 64, 1, seeds=[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "K", "group_size", "c"),
    [(1, 1, 64, 1), (17, 65, 32, 0), (2, 2304, 64, 2), (3, 513, 100, 4), (5, 40, 1000, 16), (0, 8, 8, 1), (2, 0, 8, 1)],
)
def test_quantize_shapes(gpu: emulator.Emulated, N: int, K: int, group_size: int, c: int, dtype: torch.dtype) -> None:
    w = shapes.student_t(N, K).to(dtype)
    for name in ("fitted", "trellis 4", "trellis 3"):
        bits, levels = GRIDS[name]
        check(gpu, "quantize_groups", w, torch.tensor([levels], dtype=torch.int8), bits, group_size, c, 1e-5, seeds=[3])
    check(gpu, "quantize_groups", w, None, 4, group_size, 0, 0.0, "float16", True, 1.0, 1.0, seeds=[1])
    check(gpu, "quantize_split", w, w.abs() > 0.04, 3, group_size, seeds=[2])
    for scope in ("tensor", "row", "group"):
        lam = torch.ops.precal.salience_threshold(w, 0.1, scope, group_size)
        check(gpu, "quantize_salient", w, lam, 3, group_size, scope, seeds=[2])


@pytest.mark.parametrize("bits", [2, 5, 6, 7, 8])
def test_quantize_other_widths(gpu: emulator.Emulated, bits: int) -> None:
    w = shapes.student_t(5, 100)
    levels = torch.linspace(-127, 120, 2 ** min(bits + 1, 8)).round().to(torch.int8)[None]
    check(gpu, "quantize_groups", w, levels, bits, 32, 1, seeds=[2])
    check(gpu, "quantize_groups", w, None, bits, 32, 1, seeds=[0])


# Groups that begin with a block of columns, with its second column, and inside; every spacing of levels, and scales so
# far below the extreme weight that positions are doubled. From column 257 on costs are small beside those before.
@pytest.mark.parametrize("group_size", [16, 32, 100, 255, 257])
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_quantize_any_trellis(gpu: emulator.Emulated, bits: int, group_size: int) -> None:
    w = shapes.student_t(5, 600)
    w[:, 257:] *= 30
    for peak, low in ((127, 0.05), (2**bits, 0.8)):
        grid = torch.linspace(-peak, peak, 2 ** (bits + 1)).round().clamp(-127, 127).to(torch.int8)[None]
        check(gpu, "quantize_groups", w, grid, bits, group_size, 2, 1e-4, "e4m3", False, low, 1.1, seeds=[1])


def test_of_two_scales_without_error_the_smaller_wins(gpu: emulator.Emulated) -> None:
    """126 * 1.0 = 112 * 1.125: both e4m3, both levels in every subset."""
    levels = [-100] * 4 + [-80] * 4 + [-60] * 4 + [0] * 8 + [60] * 4 + [112] * 4 + [126] * 4
    w = torch.zeros(3, 64)
    w[:, [5, 40]] = 126 / 1024
    parts = check(gpu, "quantize_groups", w, torch.tensor([levels], dtype=torch.int8), 4, 32)
    assert (parts[1] == 0x38).all()


def test_a_row_that_is_not_finite_gets_no_scale(gpu: emulator.Emulated) -> None:
    w = shapes.gaussian(4, 300)
    w[1, 7], w[2, 299] = torch.nan, -torch.inf
    grid = torch.tensor([shapes.TRELLIS_4], dtype=torch.int8)
    arguments = (w, grid, 4, 64, 1)
    want = torch.ops.precal.quantize_groups(w.nan_to_num(0, 0, 0), *arguments[1:])
    got = call(gpu, "quantize_groups", arguments, want)
    assert got[2].isnan().tolist() == [False, True, True, False]
    same_bits([t[[0, 3]] for t in got], [t[[0, 3]] for t in want])


# ---- salience and grids ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "row", "group"])
@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
def test_salience(gpu: emulator.Emulated, scope: str, normalize: str) -> None:
    for w in (shapes.student_t(5, 300).bfloat16(), shapes.HARD_MATRICES["rounded"](3, 65), torch.zeros(2, 40)):
        for alpha in (0.0, 0.05, 1.0):
            (lam,) = check(gpu, "salience_threshold", w, alpha, scope, 32, normalize, seeds=[2])
        check(gpu, "salience_mask", w, lam, scope, 32, normalize, seeds=[1])
    for shape in ((0, 5), (3, 0)):
        (lam,) = check(gpu, "salience_threshold", torch.zeros(shape), 0.05, scope, 32, normalize, seeds=[0])
        check(gpu, "salience_mask", torch.zeros(shape), lam, scope, 32, normalize, seeds=[0])


def test_salience_of_weights_that_are_not_finite_is_nan(gpu: emulator.Emulated) -> None:
    w = shapes.gaussian(3, 100)
    w[1, 40] = torch.inf
    like = torch.empty(3, dtype=torch.float64)
    (lam,) = call(gpu, "salience_threshold", (w, 0.05, "row"), [like])
    assert lam.isnan().tolist() == [False, True, False]
    assert call(gpu, "salience_threshold", (w, 0.05), [like[:1]])[0].isnan()


@pytest.mark.parametrize("mu", [0.0, 0.03])
@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("levels", [shapes.GRID_3, shapes.GRID_4])
def test_fit_grid(gpu: emulator.Emulated, levels: list[int], rounds: int, mu: float) -> None:
    grid = torch.tensor([levels], dtype=torch.int8)
    w = shapes.student_t(20, 500) / 0.02 * 40
    counts, _ = torch.ops.precal.histogram(w, 256, -254.0, 254.0)
    check(gpu, "fit_grid", counts, -254.0, 254.0, grid, mu, rounds, seeds=[2])
    check(gpu, "fit_grid", torch.zeros_like(counts), -254.0, 254.0, grid, mu, rounds, seeds=[0])
    label = torch.randint(0, len(levels), w.shape, dtype=torch.uint8, generator=shapes.generator(0))
    by_code, _ = torch.ops.precal.histogram(w, 64, -254.0, 254.0, None, None, 128, label, len(levels))
    by_code[3] = 0
    check(gpu, "fit_grid", by_code, -254.0, 254.0, grid, mu, rounds, seeds=[1])


def test_spread_codes_and_kl(gpu: emulator.Emulated) -> None:
    grid = torch.tensor([shapes.GRID_4], dtype=torch.int8)
    w = shapes.student_t(20, 500) / 0.02 * 40
    counts, _ = torch.ops.precal.histogram(w, 512, -254.0, 254.0)
    (density,) = check(gpu, "spread_codes", counts, -254.0, 254.0, grid)
    label = torch.randint(0, 16, w.shape, dtype=torch.uint8, generator=shapes.generator(0))
    by_code, _ = torch.ops.precal.histogram(w, 512, -254.0, 254.0, None, None, 128, label, 16)
    check(gpu, "spread_codes", by_code, -254.0, 254.0, grid)
    for p, q, smoothing in ((counts, density, 0.0), (density, counts, 0.5), (counts * 0, density, 0.0)):
        want = torch.ops.precal.kl_divergence(p, q, smoothing)
        (got,) = call(gpu, "kl_divergence", (p, q, smoothing), [want])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_every_op_has_a_kernel(gpu: emulator.Emulated) -> None:
    """The examples of every op, through the same names and arguments."""
    examples = shapes.op_examples()
    for name, arguments in examples.items():
        want = as_list(getattr(torch.ops.precal, name)(*arguments))
        if name in ("prepack", "unprepack", "linear"):  # an order of their own; tested above
            assert hasattr(gpu.module, name)
        elif name == "kl_divergence":
            torch.testing.assert_close(call(gpu, name, arguments, want), want, rtol=1e-12, atol=0)
        else:
            same_bits(call(gpu, name, arguments, want), want)


# ---- what the bindings refuse ----------------------------------------------------------------------------------------


def test_errors_name_the_argument(gpu: emulator.Emulated) -> None:
    gpu.device()  # whatever ran before
    w = torch.ones(2, 64)
    weight = shapes.random_weight(0, 3, 64, 4, 32, 1)
    prepacked = prepack(gpu, weight)
    x = torch.ones(2, 64)
    y = torch.empty(2, 3)
    numbers = weight.numbers
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
        ("soft_threshold", (w.double(), 0.1), {"out": w}, "soft_threshold: w must have dtype float32 or float16"),
        ("soft_threshold", (w, -1.0), {"out": w}, "soft_threshold: lam must be finite and >= 0, got -1"),
        ("soft_threshold", (None, 1.0), {"out": w}, "soft_threshold: w must be a DLPack tensor, got None"),
        ("soft_threshold", (w.T, 1.0), {"out": w}, "soft_threshold: w must be contiguous, got a strided view"),
        ("soft_threshold", (w, 1.0), {"out": w[0]}, "soft_threshold: out must be [2, 64] (what the op returns), got"),
        ("soft_threshold", (w, 1.0), {"out": w.half()}, "soft_threshold: out must have dtype float32, got float16"),
        ("histogram", (w, 10, -1.0, 1.0), {"out": w}, "histogram: out must be 2 tensors, got 1"),
        ("quantize_groups", (w, None, 9, 64), {"out": [w] * 5}, "quantize_groups: bits must lie in [2, 8], got 9"),
        ("linear", (x, prepacked[1:], None, *numbers), {"out": y}, "linear: prepacked must be ["),
        ("linear", (x[:, :32].contiguous(), prepacked, None, *numbers), {"out": y}, "linear: x must be [..., K] with"),
        ("linear", (x, prepacked, x, *numbers), {"out": y}, "linear: bias must be [3] (N), got [2, 64]"),
        ("linear", (x, prepacked, None, *numbers, "a4"), {"out": y}, "linear: activations must be f32, a16 or a8"),
        ("linear", (x, prepacked, None, *numbers), {"out": y, "workspace": prepacked[:7]}, "linear: workspace must"),
        ("unprepack", (prepacked, 3, 64, 4, 32, 17, 16, False, "e4m3"), {"out": [x] * 8}, "unprepack: c must lie in"),
        ("fit_grid", (torch.ones(8, dtype=torch.int64), -1.0, 1.0, w), {"out": w}, "fit_grid: grid must have dtype"),
    ]
    for name, arguments, rest, message in cases:
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(gpu.module, name)(*arguments, **rest)
        assert str(caught.value).startswith(message), f"{name}: {caught.value}"


def test_linear_config_covers_every_shape(gpu: emulator.Emulated) -> None:
    """Launches fit the device, slices cover K, and a row of y does not depend on how many there are."""
    for N in (1, 16, 17, 100, 4096, 14336, 128256):
        for K in (1, 255, 257, 2048, 4096, 11008, 28672):
            for bits, group_size, sms, shared_bytes in (
                (4, 64, 132, 227 << 10),
                (3, 32, 108, 163 << 10),
                (4, 128, 84, 99 << 10),
                (4, 16, 132, 227 << 10),
            ):
                panels = -(-K // 256)
                alike = set()
                for M in (1, 2, 5, 6, 8, 9, 16, 17, 64, 65, 4096):
                    for float32 in (False, True):
                        c = gpu.module.linear_config(N, K, bits, group_size, False, M, float32, sms, shared_bytes)
                        assert c["shared_bytes"] <= shared_bytes and c["rows"] >= 1
                        if c["kernel"] == "any":
                            assert group_size % 32 or shared_bytes < 163 << 10
                            continue
                        assert (c["slices"] - 1) * c["panels"] < panels <= c["slices"] * c["panels"]
                        assert c["slices"] <= 65535 and c["blocks"] >= 1
                        if c["kernel"] == "small":
                            assert c["rows"] * c["planes"] <= 8 * c["octets"] <= 16
                            alike.add((c["slices"], c["panels"]))
                        else:
                            assert not float32 and c["tile_tokens"] in (64, 128)
                assert len(alike) <= 1
