"""Odd shapes, hard matrices, random weights, and one valid call of every op: what the op tests and benches share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import reference
import torch
from torch import Tensor

from precal_ext import ops

# Around the lanes (16), the bytes of a mask (8), a word of codes, the groups (32 to 256), the outlier block (256), the
# first K with segments (2048), and K whose segments end in a short block (2304, 11008).
TAIL_K = [1, 7, 8, 31, 33, 63, 64, 65, 172, 255, 256, 257, 300, 2048, 2304, 11008]
TAIL_N = [1, 15, 16, 17, 33]  # around the 16 rows of a prepacked tile

# Every N and every K once, long rows with few of them.
TAIL_SHAPES = [(TAIL_N[i % 5] if K < 2048 else 1 + i % 3, K) for i, K in enumerate(TAIL_K)]

ALL_BITS = range(2, 9)

# What a 16-level codebook for Gaussian groups looks like; asymmetric, so the sign of a scale matters.
GRID_4 = [-127, -96, -75, -58, -44, -31, -20, -10, 0, 9, 19, 29, 41, 54, 70, 92]
GRID_3 = [-127, -80, -45, -15, 12, 38, 68, 110]
# Twice the levels, for a trellis.
TRELLIS_4 = [-113, -100, -91, -84, -77, -70, -63, -56, -49, -42, -35, -28, -21, -15, -8, -1]
TRELLIS_4 += [6, 13, 20, 26, 34, 41, 48, 55, 61, 68, 75, 82, 89, 97, 108, 127]
TRELLIS_3 = [-106, -82, -68, -54, -41, -28, -16, -4, 8, 21, 33, 45, 59, 74, 91, 127]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(N: int, K: int, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=generator(seed)) * 0.02


def student_t(N: int, K: int, seed: int = 0) -> Tensor:
    """Three degrees of freedom: the tails of a transformer's weights, and a little worse."""
    chi_square = torch.randn(3, N, K, generator=generator(seed + 1)).square().sum(0)
    return gaussian(N, K, seed) / (chi_square / 3).sqrt()


def one_large_group(N: int, K: int, seed: int = 0) -> Tensor:
    w = gaussian(N, K, seed)
    w[:, : min(32, K)] *= 256
    return w


def zero_rows(N: int, K: int, seed: int = 0) -> Tensor:
    w = gaussian(N, K, seed)
    w[::2] = 0
    return w


def one_huge_outlier(N: int, K: int, seed: int = 0) -> Tensor:
    w = gaussian(N, K, seed)
    w[:, K // 2] = -1e4
    return w


HARD_MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": gaussian,
    "student_t": student_t,
    "one_large_group": one_large_group,
    "zero_rows": zero_rows,
    "all_zero": lambda N, K: torch.zeros(N, K),
    "constant": lambda N, K: torch.full((N, K), -0.37),
    "denormal": lambda N, K: gaussian(N, K) * 1e-37,
    "huge": lambda N, K: gaussian(N, K) * 1e32,  # about 1e30
    "one_huge_outlier": one_huge_outlier,
    "rounded": lambda N, K: (gaussian(N, K) * 200).round() / 8,  # ties everywhere
}


class Weight(NamedTuple):
    """A quantized weight; the fields are the arguments of ``dequantize`` and ``prepack``, in order."""

    packed: Tensor
    scale: Tensor
    row_scale: Tensor
    grid: Tensor | None
    outlier_index: Tensor | None
    outlier_value: Tensor | None
    outlier_scale: Tensor | None
    outlier_mask: Tensor | None
    K: int
    bits: int
    group_size: int
    segment: int = 0

    @property
    def c(self) -> int:
        return 0 if self.outlier_index is None else self.outlier_index.shape[2]

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int, bool, str, int]:
        """What ``unprepack`` and ``linear`` take after their tensors."""
        scale_dtype = "e4m3" if self.scale.dtype == torch.uint8 else "float16"
        split = self.outlier_mask is not None
        grid_size = 0 if self.grid is None else self.grid.numel()
        numbers = (len(self.packed), self.K, self.bits, self.group_size, self.c, grid_size)
        return *numbers, split, scale_dtype, self.segment


def random_outliers(random: np.random.Generator, N: int, K: int, c: int, segment: int = 0) -> tuple[Tensor, Tensor]:
    """0 to c used entries per block, at strictly increasing positions; the rest 0."""
    blocks = reference.outlier_blocks(K, segment)
    index, value = np.zeros((N, len(blocks), c), np.uint8), np.zeros((N, len(blocks), c), np.uint8)
    for n in range(N):
        for b, (begin, end) in enumerate(blocks):
            used = random.integers(0, min(c, end - begin) + 1)
            index[n, b, :used] = np.sort(random.choice(end - begin, used, replace=False))
            # 1/16 to 4 in magnitude
            value[n, b, :used] = random.integers(0x18, 0x48, used) | 0x80 * random.integers(0, 2, used)
    return torch.from_numpy(index), torch.from_numpy(value)


def random_weight(
    seed: int,
    N: int,
    K: int,
    bits: int,
    group_size: int,
    c: int = 0,
    uniform: bool = False,
    split: bool = False,
    scale_dtype: str = "e4m3",
    trellis: bool = False,
    segment: int = 0,
) -> Weight:
    """Any codes, scales of both signs (a few 0), any grid: more than the quantizer ever writes. W' is about 1."""
    random = np.random.default_rng(seed)
    G = reference.ceil_div(K, group_size)

    def scales() -> Tensor:
        if scale_dtype == "float16":
            return torch.from_numpy(random.standard_normal((N, G)).astype(np.float16))
        magnitude = random.integers(0x20, 0x48, (N, G))  # 1/8 to 4
        magnitude[random.random((N, G)) < 0.05] = 0
        return torch.from_numpy((magnitude | 0x80 * random.integers(0, 2, (N, G))).astype(np.uint8))

    row_scale = 0.02 * np.exp(random.standard_normal(N)) * (16 if uniform and bits < 6 else 1)
    codes = torch.from_numpy(random.integers(0, 2**bits, (N, K), dtype=np.uint8))
    size = 2 ** min(bits + trellis, 8)
    levels = np.sort(random.integers(-127, 128, (1, size)).astype(np.int8))
    grid = None if uniform else torch.from_numpy(levels)
    index, value = random_outliers(random, N, K, c, segment) if c else (None, None)
    mask = torch.from_numpy(np.packbits(random.random((N, K)) < 0.1, axis=1, bitorder="little")) if split else None
    return Weight(
        reference.pack(codes, bits),
        scales(),
        torch.from_numpy(row_scale).to(torch.bfloat16),
        grid,
        index,
        value,
        scales() if split else None,
        mask,
        K,
        bits,
        group_size,
        segment,
    )


def random_case(seed: int, bits: int, c: int | None = None) -> Weight:
    """A weight whose shape and format follow from the seed; c None: 0, 1, 2 or 4."""
    random = np.random.default_rng([seed, bits])
    N = int(random.choice([*TAIL_N, random.integers(1, 40)]))
    K = int(random.choice([*TAIL_K[:13], random.integers(1, 600), random.integers(1, 600)]))
    group_size = int(random.choice([8, 16, 32, 64, 128, 13, K, 1000]))
    split = c is None and random.random() < 0.1
    c = 0 if split else int(random.choice([0, 1, 2, 4])) if c is None else c
    scale_dtype = "float16" if split or random.random() < 0.2 else "e4m3"
    uniform, trellis = bool(random.random() < 0.3), bits < 8 and bool(random.random() < 0.5)
    return random_weight(seed, N, K, bits, group_size, c, uniform, split, scale_dtype, trellis)


class Recipe(NamedTuple):
    """One way to call ``quantize_groups``, and to undo it."""

    bits: int
    group_size: int
    c: int = 0
    lam: float = 0.0
    grid: Tensor | None = None
    scale_dtype: str = "e4m3"
    symmetric: bool = False
    search: tuple[float, float] = (0.6, 1.1)

    @property
    def trellis(self) -> bool:
        return self.grid is not None and self.grid.numel() == 2 ** (self.bits + 1)

    def quantize(self, w: Tensor) -> tuple[Tensor, ...]:
        return ops.quantize_groups(
            w, self.grid, self.bits, self.group_size, self.c, self.lam, self.scale_dtype, self.symmetric, *self.search
        )

    def dequantize(self, parts: tuple[Tensor, ...]) -> Tensor:
        codes, scale, row_scale, index, value = parts
        index, value = (index, value) if self.c else (None, None)
        packed = ops.pack(codes, self.bits)
        return ops.dequantize(
            packed, scale, row_scale, self.grid, index, value, None, None, codes.shape[1], self.bits, self.group_size
        )

    def roundtrip(self, w: Tensor) -> Tensor:
        return self.dequantize(self.quantize(w))


# The arguments of round-to-nearest, the floor of every comparison.
RTN: dict[str, Any] = {"scale_dtype": "float16", "symmetric": True, "search": (1.0, 1.0)}


def measure_arguments(
    weight: Weight, num_bins: int, half: float, dtype: torch.dtype = torch.float32
) -> tuple[Any, ...]:
    """Of ``ops.measure``: for w what the weight stands for, a little moved."""
    *tensors_and_numbers, segment = weight
    w = reference.dequantize(*weight)
    moved = w * (1 + 0.1 * torch.randn(w.shape, generator=generator(6)))
    return (moved.to(dtype), *tensors_and_numbers, num_bins, half, segment)


def op_examples() -> dict[str, tuple[Any, ...]]:
    """Arguments of one valid call of every op, by its name."""
    w = student_t(17, 300)
    counts, _ = reference.histogram(w * 1000, 512, -128.0, 128.0)
    grid = torch.tensor([GRID_4], dtype=torch.int8)
    weight = random_weight(0, 17, 300, 3, 32, c=2)
    codes = torch.randint(0, 8, (17, 300), dtype=torch.uint8, generator=generator(2))
    # linear reads only prepacked bytes, and there is no shorter way to make them than the op itself
    prepacked = ops.prepack(*weight)
    divisor = torch.rand(17, 10, generator=generator(3)) + 0.5
    mass = torch.randint(0, 5, (17, 10), generator=generator(4))
    return {
        "soft_threshold": (w, 0.01),
        "salience_threshold": (w, 0.05, "row", 32, "group"),
        "salience_mask": (w, torch.full((17, 10), 0.001, dtype=torch.float64), "group", 32, "none"),
        "histogram": (w, 100, -0.1, 0.1, divisor, mass, 32),
        "spread_codes": (counts, -128.0, 128.0, grid),
        "kl_divergence": (counts, torch.flip(counts, [0]), 0.5),
        "fit_grid": (counts, -128.0, 128.0, grid, 0.1, 2),
        "quantize_groups": (w.bfloat16(), torch.tensor([TRELLIS_4], dtype=torch.int8), 4, 32, 2, 1e-4),
        "quantize_split": (w.half(), w.abs() > 0.05, 3, 32),
        "quantize_salient": (w.half(), torch.full((17, 10), 0.003, dtype=torch.float64), 3, 32, "group"),
        "pack": (codes, 3),
        "unpack": (weight.packed, 3, 300),
        "dequantize": tuple(weight),
        "measure": measure_arguments(weight, 256, 256.0),
        "prepack": tuple(weight),
        "unprepack": (prepacked, *weight.numbers),
        "linear": (
            student_t(5, 300, 7).bfloat16(),
            prepacked,
            torch.randn(17, generator=generator(5)),
            *weight.numbers,
        ),
    }
