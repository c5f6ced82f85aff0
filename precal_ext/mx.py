"""Microscaling formats (OCP MX 1.0): blocks of elements under one power of two.

W'[n, k] = 2^e[n, k // block] * P(w[n, k] / 2^e),   e = floor(log2(max |w| of the block)) - emax of the element

A block is ``block`` columns of a row, the last one of a row may be short; its scale is one byte, E8M0: e + 127, and 255
would be NaN. Elements:

    MXINT{d}_{block}   d bits, d - 2 of them behind the point: -(2 - 2^(2-d)) ... 2 - 2^(2-d), emax 0. The specification
                       has d = 8 and blocks of 32; other widths and blocks follow it as arXiv 2410.12119 names them. -2
                       is left unused, as it allows, so that the grid is symmetric.
    MXFP4              E2M1: +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, emax 2, blocks of 32

P rounds to the nearest element, ties to even, and saturates. Everything is exact: elements times powers of two fit in
float32, whatever the float32, float16 or bfloat16 weight. They are for measuring and predicting; no kernel runs them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BIAS = 127  # of E8M0
FP4_BLOCK = 32
INT_BITS = (2, 8)
MAX_BLOCK = 1 << 20
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # E2M1, by the code without its sign
_ROWS_AT_ONCE = 1 << 20  # weights, whose float64 copies are held together


@dataclass(frozen=True)
class MXFormat:
    """A microscaling format.

    Args:
        bits: of an element, 2 to 8, sign included; 4 for E2M1.
        block: columns that share a scale, 1 to 2^20.
        floating: E2M1 elements, else integers.
    Raises:
        ValueError: a field breaks its contract.
    """

    bits: int
    block: int
    floating: bool = False

    def __post_init__(self) -> None:
        least, most = (4, 4) if self.floating else INT_BITS
        if not least <= self.bits <= most:
            contract = "4 for MXFP" if self.floating else f"an integer from {least} to {most}"
            raise ValueError(f"mx: bits must be {contract}, got {self.bits}")
        if not 1 <= self.block <= MAX_BLOCK:
            raise ValueError(f"mx: block must be an integer from 1 to {MAX_BLOCK}, got {self.block}")

    @property
    def name(self) -> str:
        if self.floating:
            return "mxfp4" if self.block == FP4_BLOCK else f"mxfp4_{self.block}"
        return f"mxint{self.bits}_{self.block}"

    @property
    def largest(self) -> float:
        """The largest element."""
        return _FP4_VALUES[-1] if self.floating else 2.0 - 2.0 ** (2 - self.bits)

    @property
    def exponent_of_largest(self) -> int:
        """floor(log2(largest)) but for integers of 2 and more bits, whose range the specification gives emax 0."""
        return 2 if self.floating else 0

    def bits_per_weight(self, K: int) -> float:
        """Stored bits of a row of K weights over K: elements, and 8 bits for every block."""
        return self.bits + 8.0 * -(-K // self.block) / K if K else 0.0


def parse_mx(name: str) -> MXFormat | None:
    """The format called ``mxint{bits}_{block}``, ``mxfp4`` or ``mxfp4_{block}``; None for other names.

    Raises:
        ValueError: the name is of that form, and its numbers are out of range.
    """
    found = re.fullmatch(r"mxint(\d{1,4})_(\d{1,9})", name)
    if found:
        return MXFormat(int(found[1]), int(found[2]))
    found = re.fullmatch(r"mxfp4(?:_(\d{1,9}))?", name)
    return MXFormat(4, int(found[1] or FP4_BLOCK), floating=True) if found else None


def encode(w: Tensor, fmt: MXFormat) -> tuple[Tensor, Tensor]:
    """Elements and scales of a weight.

    Args:
        w: [N, K] float32, float16 or bfloat16, finite.
    Returns:
        Elements int8 [N, K]: integers in units of 2^(2 - bits); for E2M1 the code, 8 for the sign plus 0 to 7.
        Scales uint8 [N, ceil(K / block)]: e + 127.
    Raises:
        TypeError, ValueError: another dtype or shape, or a weight that is not finite.
    """
    if w.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"encode: w must be float32, float16 or bfloat16, got {w.dtype}")
    if w.ndim != 2:
        raise ValueError(f"encode: w must be [N, K], got {list(w.shape)}")
    if not bool(torch.isfinite(w).all()):
        raise ValueError("encode: w must be finite, got NaN or infinity")
    N, K = w.shape
    elements = torch.empty((N, K), dtype=torch.int8)
    scales = torch.empty((N, -(-K // fmt.block)), dtype=torch.uint8)
    step = max(1, _ROWS_AT_ONCE // max(1, K))
    for begin in range(0, N, step):
        rows = slice(begin, begin + step)
        exponent = block_exponents(w[rows], fmt)
        scales[rows] = (exponent + SCALE_BIAS).to(torch.uint8)
        elements[rows] = encode_under(w[rows], exponent, fmt)
    return elements, scales


def block_exponents(w: Tensor, fmt: MXFormat) -> Tensor:
    """e of every block of a weight [N, K]: int64 [N, ceil(K / block)], from -127 to 127; -127 for a block of zeros."""
    N, K = w.shape
    blocks = -(-K // fmt.block)
    padded = torch.nn.functional.pad(w.double().abs(), (0, blocks * fmt.block - K))
    largest = padded.reshape(N, blocks, fmt.block).amax(2) if K else torch.zeros(N, 0, dtype=torch.float64)
    # frexp: largest = m * 2^x with m in [0.5, 1), so that floor(log2(largest)) is exactly x - 1.
    exponent = torch.frexp(largest)[1].long() - 1 - fmt.exponent_of_largest
    exponent[largest == 0] = -SCALE_BIAS
    return exponent.clamp(-SCALE_BIAS, SCALE_BIAS)


def encode_under(w: Tensor, exponent: Tensor, fmt: MXFormat) -> Tensor:
    """Elements int8 [N, K] of a weight under the exponents [N, ceil(K / block)] of its blocks."""
    scaled = torch.ldexp(w.double(), -spread(exponent, fmt.block, w.shape[1]).double())
    if not fmt.floating:
        half = 2 ** (fmt.bits - 1) - 1
        return scaled.mul_(2.0 ** (fmt.bits - 2)).round_().clamp_(-half, half).to(torch.int8)  # round: ties to even
    values = torch.tensor(_FP4_VALUES, dtype=torch.float64)
    between = (values[1:] + values[:-1]) / 2
    size = scaled.abs()
    code = torch.bucketize(size, between)  # of a tie the lower one, which is odd every other time
    code += (size == between[code.clamp(max=len(between) - 1)]) & (code % 2 == 1)
    return (code + 8 * torch.signbit(scaled).long()).to(torch.int8)


def decode(elements: Tensor, scales: Tensor, fmt: MXFormat) -> Tensor:
    """The weight float32 [N, K] that elements and scales stand for, exactly."""
    exponent = scales.long() - SCALE_BIAS
    if fmt.floating:
        values = torch.tensor((*_FP4_VALUES, *(-v for v in _FP4_VALUES)), dtype=torch.float64)[elements.long()]
    else:
        values = elements.double() * 2.0 ** (2 - fmt.bits)
    return torch.ldexp(values, spread(exponent, fmt.block, elements.shape[1]).double()).float()


def spread(exponent: Tensor, block: int, K: int) -> Tensor:
    """One value for every column, of one for every block."""
    return exponent.repeat_interleave(block, 1)[:, :K]


def fake_quantize(w: Tensor, fmt: MXFormat) -> Tensor:
    """W' in float32 [N, K]: round-to-nearest in the format."""
    return decode(*encode(w, fmt), fmt)
