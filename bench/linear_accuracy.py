#!/usr/bin/env python3
"""Error of `linear` against float64 on the dequantized weight over random shapes: a JSON line per bits, dtype, ISA.

    python bench/linear_accuracy.py [--shapes 200] [--out bench/results/linear_accuracy.jsonl]

Error is |y - x W'^T|_F / |x W'^T|_F. Shapes: M 1-70, N 1-600, K 1-2600; group size 1-300; c in
{0, 1, 2, 4}; with and without bias.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from recipes import ROOT, facts

from precal_ext import _C, ops
from precal_ext.config import QuantizeConfig
from precal_ext.linear import PrecalLinear
from precal_ext.quantize import fit_set_grid, quantize_weight


def worst_error(bits: int, dtype: torch.dtype, shapes: int) -> float:
    chance = random.Random(bits)
    generator = torch.Generator().manual_seed(bits)
    worst = 0.0
    for _ in range(shapes):
        M, N, K = chance.randint(1, 70), chance.randint(1, 600), chance.randint(1, 2600)
        config = QuantizeConfig(bits=bits, group_size=chance.randint(1, 300), c=chance.choice((0, 1, 2, 4)))
        w = torch.randn(N, K, generator=generator) * 0.02
        bias = torch.randn(N, generator=generator).to(dtype) if chance.random() < 0.5 else None
        q = quantize_weight(w, config, fit_set_grid([w], config))
        x = torch.randn(M, K, generator=generator).to(dtype)
        y = PrecalLinear.from_qtensor(q, bias)(x)
        expected = x.double() @ q.dequantize().double().T + (0 if bias is None else bias.double())
        worst = max(worst, float((y.double() - expected).norm() / expected.norm()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "linear_accuracy.jsonl")
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as out:
        for isa in _C.build_info()["supported_isas"].split(","):
            ops.force_isa(isa)
            for bits in (3, 4):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    name = str(dtype).removeprefix("torch.")
                    error = worst_error(bits, dtype, args.shapes)
                    line = {"bits": bits, "dtype": name, "shapes": args.shapes, "worst_error": error}
                    print(json.dumps({**line, **facts("bench/linear_accuracy.py"), "isa": isa}), file=out, flush=True)
                    print(f"{isa:8}{bits} bits {name:10}{error:.2e}", flush=True)


if __name__ == "__main__":
    main()
