"""What torch.compile and autograd must know of the ops: how outputs look, and the gradient of ``linear``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from precal_ext import _C
from precal_ext import library as _library  # noqa: F401  defines the schemas

# ---- fakes: shapes and dtypes for torch.compile and meta tensors -----------------------------------------------------


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _words(K: int, bits: int) -> int:
    return _ceil_div(K * bits, 32)


def _fake(op: str) -> Callable[[Callable[..., Any]], None]:
    """Registers how the outputs of an op look.

    A meta tensor among others brings a call here too, where ``new_empty`` of a real one would be memory as it was left.
    """

    def register(function: Callable[..., Any]) -> None:
        arguments = getattr(torch.ops.precal, op).default._schema.arguments

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
            tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
            first, *others = tensors
            for name in others:
                if tensors[name].device != tensors[first].device:
                    contract = f"on the device of {first}, {tensors[first].device}"
                    raise RuntimeError(f"{op}: {name} must be {contract}, got {tensors[name].device}")
            return function(*args, **kwargs)

        torch.library.register_fake(f"precal::{op}")(checked)

    return register


_SCALE_DTYPE = {"e4m3": torch.uint8, "float16": torch.float16}


@_fake("soft_threshold")
def _(w: Tensor, lam: float) -> Tensor:
    return torch.empty_like(w)


@_fake("salience_threshold")
def _(w: Tensor, alpha: float, scope: str = "tensor", group_size: int = 128, normalize: str = "none") -> Tensor:
    shapes = {"tensor": [1], "row": [w.shape[0]], "group": [w.shape[0], _ceil_div(w.shape[1], group_size)]}
    return w.new_empty(shapes[scope], dtype=torch.float64)


@_fake("salience_mask")
def _(w: Tensor, lam: Tensor, scope: str = "tensor", group_size: int = 128, normalize: str = "none") -> Tensor:
    return torch.empty_like(w, dtype=torch.bool)


@_fake("histogram")
def _(
    w: Tensor,
    num_bins: int,
    lo: float,
    hi: float,
    divisor: Tensor | None = None,
    weight: Tensor | None = None,
    group_size: int = 128,
    label: Tensor | None = None,
    num_labels: int = 1,
) -> tuple[Tensor, Tensor]:
    shape = [num_bins] if label is None else [num_labels, num_bins]
    return w.new_empty(shape, dtype=torch.int64), w.new_empty([3], dtype=torch.int64)


@_fake("spread_codes")
def _(counts: Tensor, lo: float, hi: float, grid: Tensor) -> Tensor:
    return counts.new_empty([counts.shape[-1]], dtype=torch.float64)


@_fake("kl_divergence")
def _(p: Tensor, q: Tensor, smoothing: float = 0.0) -> Tensor:
    return p.new_empty([], dtype=torch.float64)


@_fake("fit_grid")
def _(counts: Tensor, lo: float, hi: float, grid: Tensor, mu: float = 0.0, rounds: int = 1) -> Tensor:
    return torch.empty_like(grid)


@_fake("quantize_groups")
def _(
    w: Tensor,
    grid: Tensor | None,
    bits: int,
    group_size: int,
    c: int = 0,
    lam: float = 0.0,
    scale_dtype: str = "e4m3",
    symmetric: bool = False,
    search_lo: float = 0.6,
    search_hi: float = 1.1,
) -> tuple[Tensor, ...]:
    N, K = w.shape
    blocks = _C.num_outlier_blocks(int(K))
    return (
        w.new_empty([N, K], dtype=torch.uint8),
        w.new_empty([N, _ceil_div(K, group_size)], dtype=_SCALE_DTYPE[scale_dtype]),
        w.new_empty([N], dtype=torch.bfloat16),
        w.new_empty([N, blocks, c], dtype=torch.uint8),
        w.new_empty([N, blocks, c], dtype=torch.uint8),
    )


@_fake("quantize_split")
def _(w: Tensor, salient: Tensor, bits: int, group_size: int) -> tuple[Tensor, ...]:
    N, K = w.shape
    G = _ceil_div(K, group_size)
    return (
        w.new_empty([N, K], dtype=torch.uint8),
        w.new_empty([N, G], dtype=torch.float16),
        w.new_empty([N], dtype=torch.bfloat16),
        w.new_empty([N, G], dtype=torch.float16),
        w.new_empty([N, _ceil_div(K, 8)], dtype=torch.uint8),
    )


@_fake("quantize_salient")
def _(w: Tensor, lam: Tensor, bits: int, group_size: int, scope: str = "tensor") -> tuple[Tensor, ...]:
    N, K = w.shape
    G = _ceil_div(K, group_size)
    return (
        w.new_empty([N, _words(K, bits)], dtype=torch.int32),
        w.new_empty([N, G], dtype=torch.float16),
        w.new_empty([N], dtype=torch.bfloat16),
        w.new_empty([N, G], dtype=torch.float16),
        w.new_empty([N, _ceil_div(K, 8)], dtype=torch.uint8),
    )


@_fake("pack")
def _(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty([codes.shape[0], _words(codes.shape[1], bits)], dtype=torch.int32)


@_fake("unpack")
def _(packed: Tensor, bits: int, K: int) -> Tensor:
    return packed.new_empty([packed.shape[0], K], dtype=torch.uint8)


@_fake("dequantize")
def _(packed: Tensor, *rest: Any) -> Tensor:
    K = rest[7]  # after the eight tensors
    return packed.new_empty([packed.shape[0], K], dtype=torch.float32)


@_fake("measure")
def _(w: Tensor, packed: Tensor, scale: Tensor, row_scale: Tensor, grid: Tensor | None, *rest: Any) -> Any:
    bits, num_bins = rest[5], rest[7]  # after four tensors and K
    labels = 1 if grid is None or grid.numel() == 2**bits else grid.numel()
    return w.new_empty([labels, num_bins], dtype=torch.int64), w.new_empty([packed.shape[0], 2], dtype=torch.float64)


@_fake("prepack")
def _(
    packed: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    grid: Tensor | None,
    outlier_index: Tensor | None,
    outlier_value: Tensor | None,
    outlier_scale: Tensor | None,
    outlier_mask: Tensor | None,
    K: int,
    bits: int,
    group_size: int,
    segment: int = 0,
) -> Tensor:
    c = 0 if outlier_index is None else int(outlier_index.shape[2])
    scale_dtype = "float16" if scale.dtype == torch.float16 else "e4m3"
    grid_size = 0 if grid is None else int(grid.numel())
    bytes_of = _C.cuda_prepacked_bytes if packed.device.type == "cuda" else _C.prepacked_bytes
    split = outlier_mask is not None
    size = bytes_of(int(packed.shape[0]), K, bits, group_size, c, grid_size, split, scale_dtype, segment)
    return packed.new_empty([size], dtype=torch.uint8)


@_fake("unprepack")
def _(
    prepacked: Tensor,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    c: int,
    grid_size: int,
    split: bool,
    scale_dtype: str,
    segment: int = 0,
) -> tuple[Tensor, ...]:
    G, blocks, scale = _ceil_div(K, group_size), _C.num_outlier_blocks(K, segment), _SCALE_DTYPE[scale_dtype]

    def new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return prepacked.new_empty(shape, dtype=dtype)

    return (
        new([N, _words(K, bits)], torch.int32),
        new([N, G], scale),
        new([N], torch.bfloat16),
        new([1 if grid_size else 0, grid_size], torch.int8),
        new([N, blocks, c], torch.uint8),
        new([N, blocks, c], torch.uint8),
        new([N if split else 0, G], scale),
        new([N if split else 0, _ceil_div(K, 8)], torch.uint8),
    )


@_fake("linear")
def _(x: Tensor, prepacked: Tensor, bias: Tensor | None, N: int, *rest: Any) -> Tensor:
    return x.new_empty([*x.shape[:-1], N])


# ---- gradients of linear ---------------------------------------------------------------------------------------------


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, prepacked, bias, *integers = inputs
    ctx.save_for_backward(prepacked)
    ctx.integers = integers
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (prepacked,) = ctx.saved_tensors
    N, K, bits, group_size, c, grid_size, split, scale_dtype, segment, _ = ctx.integers
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed, scale, row_scale, grid, index, value, other, mask = torch.ops.precal.unprepack(
            prepacked, N, K, bits, group_size, c, grid_size, split, scale_dtype, segment
        )
        weight = torch.ops.precal.dequantize(
            packed,
            scale,
            row_scale,
            grid if grid_size else None,
            index if c else None,
            value if c else None,
            other if split else None,
            mask if split else None,
            K,
            bits,
            group_size,
            segment,
        )
        grad_x = (grad.float() @ weight).to(grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.float().flatten(0, -2).sum(0) if grad.dim() > 1 else grad.float()
        grad_bias = grad_bias.to(ctx.bias_dtype)
    return (grad_x, None, grad_bias, *([None] * len(ctx.integers)))


torch.library.register_autograd("precal::linear", _linear_backward, setup_context=_linear_setup)
