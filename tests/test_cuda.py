"""torch.ops.precal on a real GPU, against the CPU. Nothing here has run before a machine with a GPU ran it
(docs/cuda.md says when); without one every test skips, or fails under PRECAL_REQUIRE_CUDA=1."""

from __future__ import annotations

from typing import Any

import pytest
import shapes
import torch
from torch import Tensor

from precal_ext import ops
from precal_ext.config import QuantizeConfig
from precal_ext.linear import PrecalLinear
from precal_ext.quantize import fit_set_grid, quantize_weight

pytestmark = pytest.mark.cuda

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# |y - y64| / |y64|, as in tests/test_cuda_kernels.py; a GPU's mma rounds its sums less well than the shim's.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
OWN_ORDER = ("prepack", "unprepack", "linear")


def to(device: str, values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.to(device)
    return tuple(to(device, v) for v in values) if isinstance(values, tuple) else values


def as_list(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


def same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        a, b = a.cpu(), b.cpu()
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b)


@pytest.mark.parametrize("name", [n for n in shapes.op_examples() if n not in OWN_ORDER])
def test_the_example_of_every_op(name: str) -> None:
    arguments = shapes.op_examples()[name]
    op = getattr(torch.ops.precal, name)
    want, got = as_list(op(*arguments)), as_list(op(*to("cuda", arguments)))
    if name == "kl_divergence":
        torch.testing.assert_close(got[0].cpu(), want[0], rtol=1e-12, atol=0)
    else:
        same_bits(got, want)
    torch.library.opcheck(op.default, to("cuda", arguments))


@pytest.mark.parametrize("grid", [None, shapes.GRID_4, shapes.TRELLIS_4])
@pytest.mark.parametrize(("N", "K", "c"), [(257, 4096, 1), (64, 11008, 2), (33, 300, 0)])
def test_quantize(grid: list[int] | None, N: int, K: int, c: int) -> None:
    w = shapes.student_t(N, K).bfloat16()
    levels = None if grid is None else torch.tensor([grid], dtype=torch.int8)
    want = ops.quantize_groups(w, levels, 4, 64, c)
    same_bits(list(ops.quantize_groups(w.cuda(), to("cuda", levels), 4, 64, c)), list(want))


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("c", [0, 1, 2, 4])
def test_linear(bits: int, group_size: int, c: int) -> None:
    for N, K in ((4096, 4096), (1000, 11008), (129, 300)):
        weight = shapes.random_weight(c, N, K, bits, group_size, c, trellis=True)
        on_gpu = shapes.Weight(*to("cuda", tuple(weight)))
        prepacked = torch.ops.precal.prepack(*on_gpu)
        restored = torch.ops.precal.unprepack(prepacked, *weight.numbers)
        assert torch.equal(restored[0], on_gpu.packed) and torch.equal(restored[1], on_gpu.scale)
        dense = torch.ops.precal.dequantize(*on_gpu).double()
        bias = torch.randn(N, device="cuda")
        for M in (1, 3, 8, 16, 17, 64, 130):
            for dtype in DTYPES:
                x = torch.randn(M, K, device="cuda").to(dtype)
                y = torch.ops.precal.linear(x, prepacked, bias, *weight.numbers)
                want = x.double() @ dense.T + bias.double()
                error = ((y.double() - want).norm() / want.norm()).item()
                assert error <= TOLERANCE[dtype], f"M={M} {dtype}: relative error {error:.2e}"
                assert torch.equal(y, torch.ops.precal.linear(x, prepacked, bias, *weight.numbers))


def test_every_format_multiplies() -> None:
    for bits in shapes.ALL_BITS:
        for seed in range(6):
            weight = shapes.random_case(seed, bits)
            on_gpu = shapes.Weight(*to("cuda", tuple(weight)))
            prepacked = torch.ops.precal.prepack(*on_gpu)
            x = torch.randn(5, weight.K, device="cuda").half()
            y = torch.ops.precal.linear(x, prepacked, None, *weight.numbers)
            want = x.double() @ torch.ops.precal.dequantize(*on_gpu).double().T
            assert (y.double() - want).norm() <= TOLERANCE[torch.float16] * want.norm() + 1e-6


def test_the_current_stream_is_used_and_graphs_capture() -> None:
    weight = shapes.Weight(*to("cuda", tuple(shapes.random_weight(0, 512, 1024, 4, 64, 1, trellis=True))))
    prepacked = torch.ops.precal.prepack(*weight)
    for M in (2, 40):
        x = torch.randn(M, 1024, device="cuda").bfloat16()
        want = torch.ops.precal.linear(x, prepacked, None, *weight.numbers)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            side = torch.ops.precal.linear(x, prepacked, None, *weight.numbers)
        stream.synchronize()
        assert torch.equal(side, want)
        static = torch.zeros_like(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.ops.precal.linear(static, prepacked, None, *weight.numbers)
        for _ in range(3):
            static.copy_(x)
            graph.replay()
            assert torch.equal(y, want)


def test_linear_by_dequantizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices, with gradients and in a graph."""
    weight = shapes.random_weight(0, 5000, 4096, 4, 64, 1, trellis=True)
    on_gpu = shapes.Weight(*to("cuda", tuple(weight)))
    prepacked = torch.ops.precal.prepack(*on_gpu)
    dense = torch.ops.precal.dequantize(*on_gpu).double()
    bias = torch.randn(5000, device="cuda")
    monkeypatch.setenv("PRECAL_LINEAR", "dequantize")
    for M in (1, 40, 400):
        for dtype in DTYPES:
            x = torch.randn(M, 4096, device="cuda").to(dtype).requires_grad_()
            y = torch.ops.precal.linear(x, prepacked, bias, *weight.numbers)
            want = x.double() @ dense.T + bias.double()
            assert (y.double() - want).norm() <= 2 * TOLERANCE[dtype] * want.norm()
            y.sum().backward()
            assert x.grad is not None
    static = torch.zeros(40, 4096, device="cuda").half()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.precal.linear(static, prepacked, None, *weight.numbers)
    static.normal_()
    graph.replay()
    assert torch.equal(y, torch.ops.precal.linear(static, prepacked, None, *weight.numbers))


def test_bad_weights_are_refused() -> None:
    w = torch.randn(9, 300)
    w[4, 7] = torch.nan
    grid = torch.tensor([shapes.TRELLIS_4], dtype=torch.int8)
    with pytest.raises(RuntimeError) as cpu:
        torch.ops.precal.quantize_groups(w, grid, 4, 64, 1)
    with pytest.raises(RuntimeError) as caught:
        torch.ops.precal.quantize_groups(w.cuda(), grid.cuda(), 4, 64, 1)
    assert str(caught.value).split("\n")[0] == str(cpu.value).split("\n")[0]


def test_a_module_moves_to_the_gpu_and_back() -> None:
    w, config = shapes.student_t(256, 512), QuantizeConfig()
    module = PrecalLinear.from_qtensor(quantize_weight(w, config, fit_set_grid([w], config)))
    x = torch.randn(4, 512)
    want = module(x)
    module.cuda()
    y = module(x.cuda().requires_grad_())
    assert ((y.cpu() - want).norm() / want.norm()).item() < 1e-3
    y.sum().backward()
    module.cpu()
    assert torch.equal(module(x), want)


def test_arguments_on_different_devices_are_named() -> None:
    weight = shapes.random_weight(0, 16, 64, 4, 32)
    on_gpu = shapes.Weight(*to("cuda", tuple(weight)))
    with pytest.raises(RuntimeError, match=r"dequantize: scale must be on CUDA device 0"):
        torch.ops.precal.dequantize(*on_gpu._replace(scale=weight.scale))
    with pytest.raises(RuntimeError, match=r"dequantize: the first argument must be on the CUDA device"):
        torch.ops.precal.dequantize(*on_gpu._replace(packed=weight.packed))
