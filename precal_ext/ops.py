"""The ops and their contracts. ``torch.ops.precal.*`` are the same functions without the error types.

Every wrapper takes and returns contiguous tensors on one device, allocates its outputs, and raises ``TypeError`` for a
wrong dtype, ``MemoryError`` for an output that finds no room and ``ValueError`` for any other broken contract, with a
message ``op: argument must be ..., got ...``, in the words of ``_C``. Called through ``torch.ops.precal`` the same
messages arrive as ``RuntimeError``. Results do not depend on the number of threads; codes, scales and counts are the
same bits on every instruction set and device.

On CUDA ``linear``, ``dequantize``, ``measure``, ``unprepack``, ``unpack`` and ``soft_threshold`` never wait for the
device; the ops of quantization, ``pack`` and ``prepack`` do at their end, to refuse what the CPU refuses. In a graph
that is being captured nothing may wait, so what only the values of a tensor show is not refused there: a row of w that
is not finite gets a row scale (quantize_*) or lam (salience_threshold) of NaN, pack takes the low bits of a code,
histogram drops a label out of range, and levels, scales and counts are used as they are; the same holds for
``_C_cuda``.

Notation: ``N, K`` rows and columns of a weight, ``G = ceil(K / group_size)``, ``B`` outlier blocks of a row, ``c``
their capacity. ``docs/format.md`` draws the bytes, ``docs/method.md`` derives the formulas.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from precal_ext import fakes as _fakes  # noqa: F401  registers them
from precal_ext.library import force_isa as force_isa

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _contract(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turns the RuntimeError of a broken contract into the built-in error that callers expect."""
    op = function.__name__

    @functools.wraps(function)
    def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            message = str(error).split("\n")[0]
            backend = re.match(r"Could not run '.*' with arguments from the '(\w+)' backend", message)
            if isinstance(error, NotImplementedError) and backend:
                contract = "tensors must be dense and on a device that this build has the op for"
                raise ValueError(f"{op}: {contract}, got backend {backend[1]}") from None
            if not message.startswith(f"{op}: "):
                raise
            kind: type[Exception] = ValueError
            if " must have dtype " in message:
                kind = TypeError
            elif message.endswith(" must fit in memory"):
                kind = MemoryError
            raise kind(message) from None

    return checked


# ---- salience -------------------------------------------------------------------------------------------------------


@_contract
def soft_threshold(w: Tensor, lam: float) -> Tensor:
    """One step of adaptive LASSO: shrink each weight by ``lam / |w|``, zero what crosses zero.

    out = sign(w) * max(|w| - lam / |w|, 0); 0 gives 0, an infinity stays, NaN stays NaN. A weight survives exactly when
    ``w**2 > lam``, evaluated without rounding; its value is never rounded to zero. (arXiv 2405.13358.)

    Args:
        w: any shape, float32, float16 or bfloat16; CPU or CUDA.
        lam: threshold in squared units of ``w``, finite, >= 0.
    Returns:
        Shape and dtype of ``w``.
    """
    return torch.ops.precal.soft_threshold(w, lam)


@_contract
def salience_threshold(
    w: Tensor, alpha: float, scope: str = "tensor", group_size: int = 128, normalize: str = "none"
) -> Tensor:
    """The threshold at which a share ``alpha`` of the weights survives ``soft_threshold``: the exact order statistic.

    Per unit of ``scope`` with n weights, k = floor(alpha * n + 1/2) must survive. With v the k-th largest |w|, lam is
    the square of the float32 just below v. Ties survive together, so more than k may; zeros never survive. k = 0 gives
    the square of the largest |w|: nothing survives. An empty unit gives 0.

    Args:
        w: [N, K] float32, float16 or bfloat16, finite.
        alpha: wanted share, in [0, 1].
        scope: "tensor" (one threshold), "row" or "group" (of ``group_size`` columns).
        normalize: "none" judges |w|; "row" or "group" judge |w - mean| / std (population) of that unit, computed in
            double and rounded to float32; where std is 0 the result is 0. lam is then in squared units of that score.
    Returns:
        float64 [1], [N] or [N, G].
    """
    return torch.ops.precal.salience_threshold(w, alpha, scope, group_size, normalize)


@_contract
def salience_mask(
    w: Tensor, lam: Tensor, scope: str = "tensor", group_size: int = 128, normalize: str = "none"
) -> Tensor:
    """Which weights survive: ``w**2 > lam`` of their unit (of the normalized weights when ``normalize`` says so).

    Args:
        w: [N, K] float32, float16 or bfloat16, finite.
        lam: float64, as ``salience_threshold`` returns it for the same ``scope`` and ``group_size``.
    Returns:
        bool [N, K].
    """
    return torch.ops.precal.salience_mask(w, lam, scope, group_size, normalize)


# ---- histograms and grids -------------------------------------------------------------------------------------------


@_contract
def histogram(
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
    """Integer histogram of ``w / divisor``; with ``label``, one for each label.

    Bin b counts x with lo + b*h <= x < lo + (b+1)*h, h = (hi - lo) / num_bins, in double; the last bin includes hi.

    Args:
        w: [N, K] float32, float16 or bfloat16; NaN and infinities are counted outside.
        num_bins: 1 to 2**24.  lo, hi: finite, lo < hi, far enough apart that double tells the bins apart.
        divisor: float32 [N, G] or None for 1. The division is float32.
        weight: int64 [N, G] in [0, 2**31], what each weight of a group adds to its bin (0: skipped), or None for 1.
        label: uint8 [N, K] below ``num_labels``, or None.
        num_labels: 1 to 256, num_labels * num_bins at most 2**24; 1 without ``label``.
    Returns:
        counts int64 [num_bins], with ``label`` [num_labels, num_bins], and outside int64 [3]: below lo, above hi, NaN.
    """
    return torch.ops.precal.histogram(w, num_bins, lo, hi, divisor, weight, group_size, label, num_labels)


@_contract
def spread_codes(counts: Tensor, lo: float, hi: float, grid: Tensor) -> Tensor:
    """The density of the quantized weights: each code's mass, spread evenly over its decision cell.

    A discrete W' has no density; this gives it one to compare with the histogram of W. Cells are cut at the midpoints
    of neighbouring levels, rounded to bin edges, and end at the outermost occupied bins. Where neighbours decide over
    codes too (a trellis), cells overlap: a histogram by code is then spread from each code's first to its last occupied
    bin, and the levels play no part.

    Args:
        counts: int64 [bins] >= 0, histogram of w / (row_scale * scale) over [lo, hi]; or [levels, bins], by code.
        lo, hi: as for ``histogram``, and within [-1e100, 1e100].
        grid: int8, 2 to 256 non-decreasing levels in [-127, 127].
    Returns:
        float64 [bins], the same total mass as ``counts``.
    """
    return torch.ops.precal.spread_codes(counts, lo, hi, grid)


@_contract
def kl_divergence(p: Tensor, q: Tensor, smoothing: float = 0.0) -> Tensor:
    """KL(P || Q) in nats of two histograms on the same bins, after adding ``smoothing`` to every bin and normalizing.

    Exactly 0 for equal inputs, never negative, never NaN. Infinite when P has mass where Q has none, or when one of
    them is empty; 0 when both are.

    Args:
        p, q: [bins] int64 or float64, finite, >= 0.
        smoothing: finite, >= 0, in units of mass per bin.
    Returns:
        float64 scalar.
    """
    return torch.ops.precal.kl_divergence(p, q, smoothing)


@_contract
def fit_grid(counts: Tensor, lo: float, hi: float, grid: Tensor, mu: float = 0.0, rounds: int = 1) -> Tensor:
    """Improve a codebook on a histogram: minimise relative squared error + mu * KL(P || spread_codes).

    Coordinate descent over the integers on that objective, from ``grid`` and from ``grid`` after ``rounds`` weighted
    Lloyd-Max steps (each stretched so that the largest level is 127); the better end counts. The largest level stays,
    it is the unit of the scales. ``rounds = 0`` or an empty histogram return ``grid`` (docs/method.md).
    On a histogram by code, what each code holds is given: every level moves to its mean, all are stretched so that the
    largest is 127, and ``mu`` plays no part.

    Args:
        counts: int64 [bins] >= 0, in units of levels: w / (row_scale * scale); or [levels, bins], by code.
        grid: int8 levels to start from.
        mu: weight of the KL term, finite, >= 0.
        rounds: 0 to 1000.
    Returns:
        int8, shape of ``grid``, non-decreasing, in [-127, 127].
    """
    return torch.ops.precal.fit_grid(counts, lo, hi, grid, mu, rounds)


# ---- quantization ---------------------------------------------------------------------------------------------------


@_contract
def quantize_groups(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Quantize [N, K] to codes, group scales under a row scale, and at most ``c`` outliers per block.

    Outliers are the c largest |w| with w**2 > lam of every block (ties: the lower column); the rest sets the scales.
    Per group the e4m3 scale with the least squared error is taken among all codes between ``search_lo`` and
    ``search_hi`` times the scale at which the group's extreme weight meets the largest level. A grid of 2**(bits+1)
    levels makes codes through a trellis (docs/format.md), found by a Viterbi search together with the scales. The order
    of every rounding is fixed (csrc/cpu/quantize-inl.h, trellis-inl.h). Row scales adapt to any magnitude; within a
    row, e4m3 scales end 2**9 below the mean one, so groups more than about 2**12 smaller than the mean group amplitude
    vanish.

    Args:
        w: [N, K] float32, float16 or bfloat16, finite, at most 2**126 in magnitude.
        grid: int8 [L] or [1, L] non-decreasing levels, L = 2**bits, or 2**(bits+1) for a trellis (2 to 7 bits, e4m3
            scales), or None for the uniform u - 2**(bits-1).
        bits: 2 to 8.  group_size: >= 1, the last group may be short.  c: 0 to 16.  lam: >= 0.
        scale_dtype: "e4m3", or "float16" (then search_lo = search_hi = 1).
        symmetric: scale = max|w| / top level, always positive (round-to-nearest); else the extreme weight keeps its
            sign, so the longer tail meets the larger end of the grid.
        search_lo, search_hi: 0 < lo <= hi <= 1.1.
    Returns:
        codes uint8 [N, K]; scale uint8 (e4m3 bits) or float16 [N, G]; row_scale bfloat16 [N];
        outlier_index uint8 [N, B, c]; outlier_value uint8 (e4m3 bits) [N, B, c].
    """
    return torch.ops.precal.quantize_groups(
        w, grid, bits, group_size, c, lam, scale_dtype, symmetric, search_lo, search_hi
    )


@_contract
def quantize_split(
    w: Tensor, salient: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The published split: two symmetric min-max grids per group, one for salient weights and one for the rest.

    Args:
        w: [N, K] float32, float16 or bfloat16, finite, at most 2**126.  salient: bool [N, K].  bits: 2 to 8.
    Returns:
        codes uint8 [N, K]; scale float16 [N, G]; row_scale bfloat16 [N]; outlier_scale float16 [N, G];
        outlier_mask uint8 [N, ceil(K/8)], bit k % 8 of byte k / 8.
    """
    return torch.ops.precal.quantize_split(w, salient, bits, group_size)


@_contract
def quantize_salient(
    w: Tensor, lam: Tensor, bits: int, group_size: int, scope: str = "tensor"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``salience_mask``, ``quantize_split`` and ``pack`` in one: the same bits, and on a CPU one look at the weights.

    Args:
        w: [N, K] float32, float16 or bfloat16, finite, at most 2**126.  bits: 2 to 8.
        lam: float64, as ``salience_threshold`` returns it for the same ``scope`` and ``group_size``, not normalized.
    Returns:
        packed int32 [N, ceil(K * bits / 32)]; scale, row_scale, outlier_scale and outlier_mask as ``quantize_split``.
    """
    return torch.ops.precal.quantize_salient(w, lam, bits, group_size, scope)


@_contract
def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes to one little-endian bit stream per row.

    Args:
        codes: uint8 [N, K], each below 2**bits.  bits: 2 to 8.
    Returns:
        int32 [N, ceil(K * bits / 32)].
    """
    return torch.ops.precal.pack(codes, bits)


@_contract
def unpack(packed: Tensor, bits: int, K: int) -> Tensor:
    """Inverse of ``pack``: int32 [N, ceil(K * bits / 32)] to uint8 [N, K]."""
    return torch.ops.precal.unpack(packed, bits, K)


@_contract
def dequantize(
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
    """W' from the tensors of a checkpoint, the same bits everywhere.

    Args:
        packed: int32 [N, ceil(K*bits/32)].  scale: uint8 (e4m3) or float16 [N, G].  row_scale: bfloat16 [N].
        grid: int8 [1, 2**bits], [1, 2**(bits+1)] for a trellis, or None for uniform.
        outlier_index, outlier_value: uint8 [N, B, c], the values e4m3 bits, or both None.
        outlier_scale, outlier_mask: dtype and shape of ``scale`` and uint8 [N, ceil(K/8)], or both None.
        segment: columns after which the blocks of outliers and of the trellis start anew, for a slice of columns of a
            longer row (``precal_ext.shards``); 0: as K says. K, or a divisor of K that 32 divides.
    Returns:
        float32 [N, K].
    """
    return torch.ops.precal.dequantize(
        packed,
        scale,
        row_scale,
        grid,
        outlier_index,
        outlier_value,
        outlier_scale,
        outlier_mask,
        K,
        bits,
        group_size,
        segment,
    )


@_contract
def measure(
    w: Tensor,
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
    num_bins: int,
    half: float,
    segment: int = 0,
) -> tuple[Tensor, Tensor]:
    """What quantization did to W: the histogram of its dense weights in units of levels, and squares, in one pass.

    The histogram is that of w / (row_scale * scale), divided and multiplied in float32, in ``num_bins`` bins as
    ``histogram`` has them in [-half, half]. Weights that an outlier entry stands for, those of a scale of 0 and those
    outside count nowhere; with ``outlier_scale`` each weight is divided by the scale of its code.

    Args:
        w: [N, K] float32, float16 or bfloat16, what was quantized.
        num_bins: a power of two from 2 to 2**16.  half: a power of two from 1 to 2**16, in levels.
        The others as for ``dequantize``.
    Returns:
        counts int64 [1, num_bins], or with a trellis, where decision cells overlap, [levels, num_bins], by code; and
        squares float64 [N, 2], sums over a row of w^2 and of (w' - w)^2, the difference rounded to float32. The same
        bits everywhere.
    """
    return torch.ops.precal.measure(
        w,
        packed,
        scale,
        row_scale,
        grid,
        outlier_index,
        outlier_value,
        outlier_scale,
        outlier_mask,
        K,
        bits,
        group_size,
        num_bins,
        half,
        segment,
    )


# ---- execution ------------------------------------------------------------------------------------------------------


@_contract
def prepack(
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
    """The device's own tile order of a weight, made once at load, exactly invertible. Arguments as ``dequantize``.

    Returns:
        uint8 [bytes], self-describing (csrc/format/prepacked.h); never saved.
    """
    return torch.ops.precal.prepack(
        packed,
        scale,
        row_scale,
        grid,
        outlier_index,
        outlier_value,
        outlier_scale,
        outlier_mask,
        K,
        bits,
        group_size,
        segment,
    )


@_contract
def unprepack(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Inverse of ``prepack``. The integers must be those the weight was made with; its header is checked.

    Args:
        grid_size: levels of the grid, 0 when there is none.  split: whether there is an outlier_mask.
        scale_dtype: "e4m3" or "float16".  segment: as ``dequantize``.
    Returns:
        packed, scale, row_scale, grid, outlier_index, outlier_value, outlier_scale, outlier_mask as ``dequantize``
        takes them; what the weight lacks has no elements.
    """
    return torch.ops.precal.unprepack(prepacked, N, K, bits, group_size, c, grid_size, split, scale_dtype, segment)


@_contract
def linear(
    x: Tensor,
    prepacked: Tensor,
    bias: Tensor | None,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    c: int,
    grid_size: int,
    split: bool,
    scale_dtype: str,
    segment: int = 0,
    activations: str = "a16",
) -> Tensor:
    """y = x @ W'.T + bias with the weight dequantized on the fly, accumulated in float32.

    Differentiable in ``x`` and ``bias`` (not in the weight). A row of y depends on its row of x alone.

    Args:
        x: [..., K] float32, float16 or bfloat16; a strided x is copied.
        prepacked: uint8 from ``prepack``.
        bias: [N] float32, float16 or bfloat16, or None.
        N, K, bits, group_size, c, grid_size, split, scale_dtype, segment: as ``unprepack``.
        activations: how far x may be rounded inside, per row and span of up to 128 columns of a group, against the
            largest |x| of the span: "f32" not at all, "a16" to 1/65024 of it, "a8" to 1/254 of it. A leave, no order:
            where there is no integer kernel (other widths than 3, 4 and uniform 8, ``split``, group sizes that 16 (32
            at 3 bits) does not divide) all three give float32. Vector instruction sets give the same bits.
    Returns:
        [..., N], dtype of ``x``.
    """
    return torch.ops.precal.linear(
        x, prepacked, bias, N, K, bits, group_size, c, grid_size, split, scale_dtype, segment, activations
    )
