#!/usr/bin/env python3
"""Makes precal_ext/grids.py: starting grids for groups of independent Gaussian weights.

    python bench/constant_grids.py > grids.py

Weighted Lloyd-Max on 2**21 samples, with the scale search (and the trellis) of the real quantizer in the loop; the best
grid on the way is kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from precal_ext import ops
from precal_ext.qtensor import QTensor, WeightSpec

BITS = (2, 3, 4, 5, 6)
GROUPS = (16, 32, 64, 128, 256)
K = 1024
ROWS = 2048
PASSES = 16
LLOYD_ROUNDS = (1, 4, 16)  # per pass; local optima differ, the best one measured is kept
TRELLIS_PASSES = 48


def quantize(w: Tensor, grid: Tensor, bits: int, group_size: int) -> tuple[QTensor, float, Tensor, Tensor]:
    """The quantized weight, its squared error, and amplitude and weight of every group."""
    codes, scale, row_scale, _, _ = ops.quantize_groups(w, grid, bits, group_size)
    spec = WeightSpec(ROWS, K, bits, group_size, 0, grid.numel(), False, "e4m3")
    tensors = {"packed": ops.pack(codes, bits), "scale": scale, "row_scale": row_scale, "grid": grid}
    q = QTensor(spec, {f"weight_{key}": tensor for key, tensor in tensors.items()})
    error = float((w - q.dequantize()).double().square().sum())
    amplitude = row_scale.float()[:, None] * scale.view(torch.float8_e4m3fn).float()
    square = amplitude.square()
    return q, error, amplitude, (square / square.mean() * 65536).round().long()


def fit(bits: int, group_size: int) -> list[int]:
    w = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(0))
    best, best_error = torch.empty(0), float("inf")
    for rounds in LLOYD_ROUNDS:
        grid = (torch.linspace(-0.9, 1, 2**bits) * 127).round().to(torch.int8)[None]
        for _ in range(PASSES):
            _, error, amplitude, weight = quantize(w, grid, bits, group_size)
            if error < best_error:
                best, best_error = grid, error
            counts, _ = ops.histogram(w, 2048, -256.0, 256.0, amplitude, weight, group_size)
            grid = ops.fit_grid(counts, -256.0, 256.0, grid, 0.0, rounds)
    return best.flatten().tolist()


def fit_trellis(bits: int, group_size: int) -> list[int]:
    w = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(0))
    best, best_error = torch.empty(0), float("inf")
    grid = (torch.linspace(-0.95, 1, 2 ** (bits + 1)) * 127).round().to(torch.int8)[None]
    for _ in range(TRELLIS_PASSES):
        q, error, amplitude, weight = quantize(w, grid, bits, group_size)
        if error < best_error:
            best, best_error = grid, error
        label = q.level_index()
        counts, _ = ops.histogram(w, 2048, -256.0, 256.0, amplitude, weight, group_size, label, grid.numel())
        grid = ops.fit_grid(counts, -256.0, 256.0, grid, 0.0, 1)
    return best.flatten().tolist()


def print_table(name: str, make: Callable[[int, int], list[int]]) -> None:
    print(f"{name}: dict[tuple[int, int], tuple[int, ...]] = {{")
    for bits in BITS:
        for group_size in GROUPS:
            line = f"    ({bits}, {group_size}): ({', '.join(map(str, make(bits, group_size)))}),"
            print(line + ("  # noqa: E501" if len(line) > 120 else ""), flush=True)
    print("}")


def main() -> None:
    print('"""Starting grids: the least squared error for groups of independent Gaussian weights.')
    print()
    print("Made by bench/constant_grids.py; the longer tail of a group points up, so grids are longer above zero.")
    print('"""')
    print()
    print("from __future__ import annotations")
    print()
    print("import torch")
    print("from torch import Tensor")
    print()
    print("# fmt: off")
    print("# (bits, group_size) -> 2**bits levels")
    print_table("CONSTANT_GRIDS", fit)
    print("# (bits, group_size) -> 2**(bits + 1) levels of a trellis")
    print_table("TRELLIS_GRIDS", fit_trellis)
    print("# fmt: on")
    print(
        '''

def constant_grid(bits: int, group_size: int, trellis: bool) -> Tensor:
    """int8 [1, 2**bits], or 2**(bits+1) levels for a trellis, for the nearest group size of the table.

    Args:
        bits: 2 to 6.  group_size: >= 1, or -1 for a row.
    """
    table = TRELLIS_GRIDS if trellis else CONSTANT_GRIDS
    known = [g for b, g in table if b == bits]
    if not known:
        raise ValueError(f"constant_grid: bits must lie in [2, 6], got {bits}")
    nearest = max(known) if group_size < 1 else min(known, key=lambda g: max(g / group_size, group_size / g))
    return torch.tensor([table[bits, nearest]], dtype=torch.int8)'''
    )


if __name__ == "__main__":
    main()
