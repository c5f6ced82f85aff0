#!/usr/bin/env python3
"""Makes precal_ext/grids.py: starting grids for groups of independent Gaussian weights.

    python bench/constant_grids.py > grids.py

Weighted Lloyd-Max on 2**21 samples, with the scale search of the real quantizer in the loop.
"""

import torch

from precal_ext import ops

BITS = (2, 3, 4, 5, 6)
GROUPS = (16, 32, 64, 128, 256)
K = 1024
ROWS = 2048
PASSES = 16
LLOYD_ROUNDS = (1, 4, 16)  # per pass; local optima differ, the best one measured is kept


def fit(bits: int, group_size: int) -> list[int]:
    w = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(0))
    best, best_error = torch.empty(0), float("inf")
    for rounds in LLOYD_ROUNDS:
        grid = (torch.linspace(-0.9, 1, 2**bits) * 127).round().to(torch.int8)[None]
        for _ in range(PASSES):
            codes, scale, row_scale, _, _ = ops.quantize_groups(w, grid, bits, group_size)
            amplitude = row_scale.float()[:, None] * scale.view(torch.float8_e4m3fn).float()
            packed = ops.pack(codes, bits)
            restored = ops.dequantize(packed, scale, row_scale, grid, None, None, None, None, K, bits, group_size)
            error = float((w - restored).double().square().sum())
            if error < best_error:
                best, best_error = grid, error
            square = amplitude.square()
            weight = (square / square.mean() * 65536).round().long()
            counts, _ = ops.histogram(w, 2048, -256.0, 256.0, amplitude, weight, group_size)
            grid = ops.fit_grid(counts, -256.0, 256.0, grid, 0.0, rounds)
    return best.flatten().tolist()


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
    print("# (bits, group_size) -> 2**bits levels")
    print("# fmt: off")
    print("CONSTANT_GRIDS: dict[tuple[int, int], tuple[int, ...]] = {")
    for bits in BITS:
        for group_size in GROUPS:
            levels = ", ".join(map(str, fit(bits, group_size)))
            print(
                f"    ({bits}, {group_size}): ({levels}),  # noqa: E501"
                if bits > 4
                else f"    ({bits}, {group_size}): ({levels}),"
            )
    print("}")
    print("# fmt: on")
    print(
        '''

def constant_grid(bits: int, group_size: int) -> Tensor:
    """int8 [1, 2**bits] for the nearest group size of the table. bits: 2 to 6; group_size >= 1, or -1 for a row."""
    known = [g for b, g in CONSTANT_GRIDS if b == bits]
    if not known:
        raise ValueError(f"constant_grid: bits must lie in [2, 6], got {bits}")
    nearest = max(known) if group_size < 1 else min(known, key=lambda g: max(g / group_size, group_size / g))
    return torch.tensor([CONSTANT_GRIDS[bits, nearest]], dtype=torch.int8)'''
    )


if __name__ == "__main__":
    main()
