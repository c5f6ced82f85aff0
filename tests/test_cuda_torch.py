"""torch.ops.precal of a GPU on CPU tensors (tests/cuda_on_cpu): torch's bindings, what they refuse, and linear by a
product of dense matrices. The kernels themselves are tested in test_cuda_kernels.py."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any

import emulator
import pytest
import shapes
import torch
from test_cuda_kernels import TOLERANCE, WEIGHTS, as_list, prepack, same_bits
from torch import Tensor

from precal_ext import _C

VARIANT = os.environ.get("PRECAL_EMULATOR", "races")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OWN_ORDER = ("prepack", "unprepack", "linear")


@pytest.fixture(scope="module")
def kernels() -> emulator.Emulated:
    return emulator.Emulated(VARIANT)


@pytest.fixture(scope="module")
def library() -> emulator.EmulatedTorch:
    return emulator.EmulatedTorch(VARIANT)


@pytest.fixture
def gpu(library: emulator.EmulatedTorch) -> Iterator[emulator.EmulatedTorch]:
    library.device()
    yield library
    library.device()
    library.library.precal_emulated_slice_rows(ctypes.c_int64(0))


@pytest.mark.skipif("PRECAL_EMULATOR" in os.environ, reason="this is the run under sanitizers")
def test_the_same_under_asan_and_ubsan() -> None:
    emulator.run_sanitized(__file__)


# ---- every op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in shapes.op_examples() if n not in OWN_ORDER])
def test_the_example_of_every_op(gpu: emulator.EmulatedTorch, name: str) -> None:
    arguments = shapes.op_examples()[name]
    want = as_list(getattr(torch.ops.precal, name)(*arguments))
    got = as_list(getattr(gpu.ops, name)(*arguments))
    if name == "kl_divergence":
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    else:
        same_bits(got, want)


def test_prepack_linear_and_back(gpu: emulator.EmulatedTorch) -> None:
    weight = shapes.random_weight(1, 40, 300, 4, 64, 1, trellis=True)
    prepacked = gpu.ops.prepack(*weight)
    want = as_list(torch.ops.precal.unprepack(torch.ops.precal.prepack(*weight), *weight.numbers))
    same_bits(as_list(gpu.ops.unprepack(prepacked, *weight.numbers)), want)
    x = torch.randn(2, 3, 600, generator=shapes.generator(0)).half()[..., ::2]  # strided
    y = gpu.ops.linear(x, prepacked, None, *weight.numbers)
    exact = x.double() @ torch.ops.precal.dequantize(*weight).double().T
    assert y.shape == (2, 3, 40) and (y.double() - exact).norm() <= TOLERANCE[torch.float16] * exact.norm()


def test_only_what_is_quantized_or_loaded_waits_for_the_device(gpu: emulator.EmulatedTorch) -> None:
    weight = shapes.random_weight(1, 20, 300, 4, 64, 1, trellis=True)
    waits = gpu.waits
    prepacked = gpu.ops.prepack(*weight)
    assert gpu.waits == waits + 1  # are the levels in order?
    gpu.device(capturing=True)
    for M in (3, 40):
        x = torch.randn(M, 300)
        for dtype in DTYPES:
            gpu.ops.linear(x.to(dtype), prepacked, None, *weight.numbers)
    gpu.ops.dequantize(*weight)
    gpu.ops.measure(*shapes.measure_arguments(weight, 256, 256.0))
    gpu.ops.unprepack(prepacked, *weight.numbers)
    gpu.ops.unpack(weight.packed, 4, 300)
    gpu.ops.soft_threshold(x, 0.1)
    for name, arguments in shapes.op_examples().items():  # and in a graph nothing does
        if name not in OWN_ORDER:
            getattr(gpu.ops, name)(*arguments)
    assert gpu.waits == waits + 1


# ---- what is refused -------------------------------------------------------------------------------------------------


def broken(t: Tensor, value: float, at: tuple[int, ...]) -> Tensor:
    t = t.clone()
    t[at] = value
    return t


def refused_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    w = shapes.gaussian(9, 300)
    grid = torch.tensor([shapes.TRELLIS_4], dtype=torch.int8)
    plain = torch.tensor([shapes.GRID_4], dtype=torch.int8)
    counts = torch.ones(64, dtype=torch.int64)
    lam = torch.zeros(1, dtype=torch.float64)
    label = torch.zeros(9, 300, dtype=torch.uint8)
    mass = torch.ones(9, 5, dtype=torch.int64)
    weight = shapes.random_weight(0, 9, 300, 4, 64, 1)
    return {
        "NaN": ("quantize_groups", (broken(w, torch.nan, (4, 7)), grid, 4, 64, 1)),
        "infinity": ("quantize_groups", (broken(w, -torch.inf, (8, 299)).bfloat16(), plain, 4, 64)),
        "above 2**126": ("quantize_groups", (broken(w, 1e38, (0, 0)), grid, 4, 64)),
        "level -128": ("quantize_groups", (w, broken(plain, -128, (0, 0)), 4, 64)),
        "levels out of order": ("quantize_groups", (w, broken(plain, 127, (0, 3)), 4, 64)),
        "all levels zero": ("quantize_groups", (w, plain * 0, 4, 64)),
        "no level above zero": ("quantize_groups", (w, plain.clamp(max=0), 4, 64, 0, 0.0, "e4m3", True)),
        "split": ("quantize_split", (broken(w, torch.inf, (2, 1)).half(), w > 1, 4, 64)),
        "salient": ("quantize_salient", (broken(w, torch.nan, (2, 1)), lam, 4, 64)),
        "threshold": ("salience_threshold", (broken(w, torch.nan, (5, 5)), 0.05)),
        "threshold of rows": ("salience_threshold", (broken(w, torch.inf, (5, 5)), 0.05, "row", 32, "row")),
        "mask": ("salience_mask", (broken(w, torch.nan, (5, 5)), lam)),
        "code": ("pack", (broken(label, 16, (3, 3)), 4)),
        "label": ("histogram", (w, 8, -1.0, 1.0, None, None, 64, broken(label, 4, (0, 0)), 4)),
        "weight": ("histogram", (w, 8, -1.0, 1.0, None, broken(mass, 2**31 + 1, (8, 4)), 64)),
        "negative weight": ("histogram", (w, 8, -1.0, 1.0, None, broken(mass, -1, (0, 1)), 64)),
        "count": ("spread_codes", (broken(counts, -1, (63,)), -128.0, 128.0, plain)),
        "count of fit_grid": ("fit_grid", (broken(counts, -1, (0,)), -128.0, 128.0, plain)),
        "levels of fit_grid": ("fit_grid", (counts, -128.0, 128.0, plain.flip(1))),
        "p": ("kl_divergence", (broken(counts.double(), torch.nan, (7,)), counts, 0.0)),
        "q": ("kl_divergence", (counts, broken(counts, -5, (7,)), 0.0)),
        "levels of prepack": ("prepack", tuple(weight._replace(grid=plain.flip(1)))),
    }


@pytest.mark.parametrize("case", refused_calls())
def test_bad_values_are_refused_in_the_words_of_the_cpu(gpu: emulator.EmulatedTorch, case: str) -> None:
    name, arguments = refused_calls()[case]
    with pytest.raises(RuntimeError) as cpu:
        getattr(torch.ops.precal, name)(*arguments)
    with pytest.raises(RuntimeError) as caught:
        getattr(gpu.ops, name)(*arguments)
    assert str(caught.value).split("\n")[0] == str(cpu.value).split("\n")[0]
    assert str(caught.value).startswith(f"{name}: ")


def test_what_looks_bad_and_is_not_is_accepted(gpu: emulator.EmulatedTorch) -> None:
    """The CPU's op has the last word: it refuses levels that are all zero only where they are to be fitted to."""
    counts, zeros = torch.ones(64, dtype=torch.int64), torch.zeros(1, 16, dtype=torch.int8)
    want = torch.ops.precal.spread_codes(counts, -128.0, 128.0, zeros)
    same_bits([gpu.ops.spread_codes(counts, -128.0, 128.0, zeros)], [want])


# ---- linear by a product of dense matrices ---------------------------------------------------------------------------


@pytest.mark.parametrize(("numbers", "options"), WEIGHTS, ids=str)
def test_dense_rows_are_dequantized_and_rounded(
    kernels: emulator.Emulated, numbers: tuple[int, ...], options: dict[str, Any]
) -> None:
    weight = shapes.random_weight(4, *numbers, **options)
    kernels.device(0)
    prepacked = prepack(kernels, weight)
    dense = torch.ops.precal.dequantize(*weight)
    N = len(dense)
    for dtype in DTYPES:
        want = dense.to(dtype)
        for first in (0, 16) if N > 16 else (0,):
            for seed in (1, 2):
                kernels.device(seed)
                arguments = (prepacked, *weight.numbers, first)
                same_bits(kernels.call("dense_rows", arguments, [want[first:]]), [want[first:]])


def test_dense_rows_of_hostile_outliers(kernels: emulator.Emulated) -> None:
    """Entries that share a column, that lie past their block, that are zero."""
    weight = shapes.random_weight(1, 18, 300, 4, 32, 4, trellis=True)
    weight.outlier_index.random_(40, 50, generator=shapes.generator(0))
    weight.outlier_value[::2, :, 1] = 0x80
    kernels.device(0)
    prepacked = prepack(kernels, weight)
    want = torch.ops.precal.dequantize(*weight)
    same_bits(kernels.call("dense_rows", (prepacked, *weight.numbers), [want]), [want])


def test_dense_rows_refuses_rows_that_are_not_there(kernels: emulator.Emulated) -> None:
    weight = shapes.random_weight(1, 20, 64, 4, 32)
    prepacked = torch.empty(_C.cuda_prepacked_bytes(*weight.numbers), dtype=torch.uint8)
    for first, rows in ((8, 4), (16, 5), (-16, 1)):
        with pytest.raises(ValueError, match=r"dense_rows: rows must lie in \[0, N\) and begin at a multiple of 16"):
            kernels.module.dense_rows(prepacked, *weight.numbers, first, out=torch.empty(rows, 64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("numbers", "options"),
    [
        ((70, 300, 4, 64, 2), {"trellis": True}),
        ((33, 513, 3, 32, 1), {"trellis": True}),
        ((48, 256, 4, 128, 4), {}),
        ((5, 300, 4, 16, 2), {"trellis": True}),
        ((4, 130, 5, 64, 16), {"trellis": True}),
        ((3, 300, 4, 64, 0), {"split": True, "uniform": True, "scale_dtype": "float16"}),
    ],
    ids=str,
)
def test_linear_by_dequantizing(
    gpu: emulator.EmulatedTorch,
    monkeypatch: pytest.MonkeyPatch,
    numbers: tuple[int, ...],
    options: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    weight = shapes.random_weight(5, *numbers, **options)
    N, K = numbers[:2]
    prepacked = gpu.ops.prepack(*weight)
    dense = torch.ops.precal.dequantize(*weight)
    for M, slice_rows, bias_dtype in ((1, 0, None), (3, 32, torch.float32), (18, 16, dtype), (0, 0, None)):
        gpu.library.precal_emulated_slice_rows(ctypes.c_int64(slice_rows))
        x = torch.randn(M, K, generator=shapes.generator(M)).to(dtype)
        bias = None if bias_dtype is None else torch.randn(N, generator=shapes.generator(1)).to(bias_dtype)
        monkeypatch.setenv("PRECAL_LINEAR", "dequantize")
        y = gpu.ops.linear(x, prepacked, bias, *weight.numbers)
        assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, (M, N), True)
        # The product of the dense matrix, as torch has it.
        like = torch.nn.functional.linear(x, dense.to(dtype), None if bias is None else bias.to(dtype))
        torch.testing.assert_close(y, like, rtol=0, atol=0.02 * float(like.abs().max()) if M else 0)
        exact = x.double() @ dense.double().T + (0 if bias is None else bias.double())
        of_torch = (like.double() - exact).norm()  # its sums of 16-bit products are its own affair
        assert (y.double() - exact).norm() <= 1.5 * of_torch + 1e-6 * exact.norm()
        assert (y.double() - exact).norm() <= 3 * TOLERANCE[dtype] * exact.norm()
        monkeypatch.setenv("PRECAL_LINEAR", "mma")
        own = gpu.ops.linear(x, prepacked, bias, *weight.numbers)
        assert (y.double() - own.double()).norm() <= 4 * TOLERANCE[dtype] * exact.norm()


def test_linear_by_dequantizing_in_a_graph_and_for_gradients(
    gpu: emulator.EmulatedTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing waits, leading dimensions stay, and tensors that want a gradient are no matter."""
    weight = shapes.random_weight(5, 40, 128, 4, 64, 1, trellis=True)
    prepacked = gpu.ops.prepack(*weight)
    monkeypatch.setenv("PRECAL_LINEAR", "dequantize")
    gpu.library.precal_emulated_slice_rows(ctypes.c_int64(16))
    gpu.device(capturing=True)
    x = torch.randn(2, 3, 256, generator=shapes.generator(0))[..., ::2].requires_grad_()
    bias = torch.nn.Parameter(torch.randn(40, generator=shapes.generator(1)))
    y = gpu.ops.linear(x, prepacked, bias, *weight.numbers)
    exact = x.double() @ torch.ops.precal.dequantize(*weight).double().T + bias.double()
    assert y.shape == (2, 3, 40) and (y - exact).norm() <= TOLERANCE[torch.float32] * exact.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # x says what the dtype is
        assert gpu.ops.linear(x, prepacked, bias, *weight.numbers).dtype == torch.float32


def test_the_environment_names_the_way(gpu: emulator.EmulatedTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = shapes.random_weight(5, 20, 128, 4, 64, 1, trellis=True)
    prepacked = gpu.ops.prepack(*weight)
    x = torch.randn(40, 128, generator=shapes.generator(0)).half()
    results = {}
    for way in ("mma", "auto", "", "dequantize"):
        monkeypatch.setenv("PRECAL_LINEAR", way)
        results[way] = gpu.ops.linear(x, prepacked, None, *weight.numbers)
    assert torch.equal(results["mma"], results["auto"]) and torch.equal(results["mma"], results[""])
    assert not torch.equal(results["mma"], results["dequantize"])  # rounded elsewhere
    monkeypatch.setenv("PRECAL_LINEAR", "fast")
    with pytest.raises(RuntimeError, match=r'linear: PRECAL_LINEAR must be auto, mma or dequantize, got "?fast'):
        gpu.ops.linear(x, prepacked, None, *weight.numbers)


def test_nothing_is_chosen_that_was_not_measured(kernels: emulator.Emulated) -> None:
    config = kernels.module.dense_config
    for bits, group_size in ((4, 64), (3, 32), (5, 64), (4, 16)):
        for M in (1, 16, 64, 383, 384, 4096):
            for float32 in (False, True):
                for capability in (80, 86, 89, 90, 100):
                    c = config(4096, 4096, bits, group_size, M, float32, capability)
                    assert not c["chosen"]
                    c = config(4096, 4096, bits, group_size, M, float32, capability, True)
                    tiled = bits in (3, 4) and group_size % 32 == 0
                    least = 16 if not tiled else 64 if float32 else 384 if capability == 90 else None
                    assert c["chosen"] == (least is not None and least <= M)


def test_slices_cover_the_rows_within_their_room(kernels: emulator.Emulated) -> None:
    for N in (0, 1, 127, 128, 129, 4096, 14336, 128256):
        for K in (1, 64, 4096, 28672, 1 << 20):
            for float32 in (False, True):
                rows = kernels.module.dense_config(N, K, 4, 64, 1, float32, 90)["slice_rows"]
                assert rows >= 128 and rows % 128 == 0
                assert rows == 128 or rows * K * (4 if float32 else 2) <= 32 << 20
                slices = -(-N // rows)
                assert slices <= 1 or (slices - 1) * rows < N  # none is empty
