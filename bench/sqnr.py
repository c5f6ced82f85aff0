#!/usr/bin/env python3
"""Signal-to-noise ratio of single matrices against true bits, for precal's recipes and other packages' formats.

    python bench/sqnr.py [--bits 4 3 2] [--matrices REGEX] [--out bench/results/sqnr.jsonl]
    python bench/sqnr.py --ours             # precal's rows again, the others stay; needs no other package
    python bench/sqnr.py --only 'hqq|NF4'   # the rows of these formats again
    python bench/sqnr.py --missing          # go on after a stop

The matrices are the GPT-2 sample of ../shared (left out where it is absent) and synthetic ones, made from fixed seeds.
Rows are cut (128 of 4096, 64 of 11008 columns) because groups lie along a row; SINQ's column scales are counted over
the rows of the whole matrix. `bench/report.py` makes docs/sqnr.md from the results.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peers import lab, peers
from quality import precal_formats
from recipes import ROOT, SHARED, facts
from rows import Results, add_arguments
from torch import Tensor

from precal_ext.config import QuantizeConfig
from precal_ext.inplace import quantize_model

SAMPLE = SHARED / "models" / "gpt2-attention-sample.safetensors"


@dataclass(frozen=True)
class Case:
    """Weights that are quantized one by one and judged together; with ``counted``, on these weights only."""

    name: str
    weights: list[Tensor]
    whole_rows: int  # of the matrix that the rows were cut from
    counted: Tensor | None = None


def matrices() -> Iterator[Case]:
    if SAMPLE.is_file():
        from safetensors.torch import load_file

        yield Case("GPT-2", [w.float() for w in load_file(SAMPLE).values()], 768)
    random = torch.Generator()

    def normal(n: int, k: int) -> Tensor:
        return torch.randn(n, k, generator=random)

    def student(degrees: int, n: int, k: int) -> Tensor:
        chi2 = torch.zeros(n, k)
        for _ in range(degrees):
            chi2 += normal(n, k).square()
        return normal(n, k) / (chi2 / degrees).sqrt()

    for rows, columns, whole in ((128, 4096, 4096), (64, 11008, 4096)):
        shape = "" if columns == 4096 else f" x{columns}"
        random.manual_seed(columns)
        yield Case(f"Gaussian{shape}", [0.02 * normal(rows, columns)], whole)
        for degrees in (10, 6, 4, 3) if columns == 4096 else (4,):
            yield Case(f"t{degrees}{shape}", [0.02 * student(degrees, rows, columns)], whole)
    rows, columns, whole = 128, 4096, 4096
    sign = torch.rand(rows, columns, generator=random).sub_(0.5).sign_()
    yield Case("Laplace", [0.02 * sign * torch.empty(rows, columns).exponential_(generator=random)], whole)
    channels = torch.ones(columns)
    channels[torch.randperm(columns, generator=random)[:20]] = 10.0
    yield Case("outlier columns", [0.02 * normal(rows, columns) * channels], whole)
    loud = torch.zeros(rows, columns, dtype=torch.bool)
    loud[:, 1024:1280] = True
    w = 0.02 * normal(rows, columns)
    yield Case("loud groups", [torch.where(loud, 256 * w, w)], whole, ~loud)


def precal_weights(weights: list[Tensor], setting: dict[str, Any]) -> tuple[list[Tensor], float]:
    """W' of every matrix and bits per weight, through the package's public path."""
    model = torch.nn.Sequential()
    for w in weights:
        layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight.data = w.clone()
        model.append(layer)
    report = quantize_model(model, QuantizeConfig(**setting))
    return [layer.dequantize() for layer in model], report.published_bits() or report.bits_per_weight


def sqnr_db(case: Case, restored: list[Tensor]) -> float | None:
    """None where a format returns something that is not finite."""
    counted = slice(None) if case.counted is None else case.counted
    power = sum(float(w[counted].double().square().sum()) for w in case.weights)
    pairs = zip(case.weights, restored, strict=True)
    noise = sum(float((w - r)[counted].double().square().sum()) for w, r in pairs)
    return 10 * math.log10(power / noise) if math.isfinite(noise) and noise > 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--matrices", metavar="REGEX", default="", help="only these")
    add_arguments(parser, ROOT / "bench" / "results" / "sqnr.jsonl")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    results = Results(args, ("matrix", "width", "format"))
    for case in matrices():
        if not re.search(args.matrices, case.name):
            continue
        weights = sum(w.numel() for w in case.weights)
        for width in args.bits:
            formats: list[tuple[str, str, Any]] = [(label, "precal", s) for label, s in precal_formats(width)]
            if not args.ours:
                formats += [*peers(width), *lab(width)]
            for label, source, how in formats:
                key = {"matrix": case.name, "width": width, "format": label}
                if not results.wants(key):
                    continue
                if source == "precal":
                    restored, bits = precal_weights(case.weights, how)
                else:
                    try:
                        done = [how(w.clone()) for w in case.weights]
                    except ValueError as error:  # auto_adpq: a group in which every weight is salient
                        print(f"{case.name}: {label} refuses: {error}", file=sys.stderr)
                        continue
                    restored = [r for r, _ in done]
                    bits = sum(b * r.numel() for r, b in done) / weights
                    if label.startswith("SINQ"):
                        bits += 16 / case.whole_rows - 16 / case.weights[0].shape[0]
                sqnr = sqnr_db(case, restored)
                row = {**key, "source": source, "weights": weights, "bits_per_weight": bits, "sqnr_db": sqnr}
                results.put({**row, **facts("bench/sqnr.py")})
                print(f"{case.name:18}{label:46}{bits:7.3f}{sqnr if sqnr is not None else math.nan:8.2f}", flush=True)
    results.drop_gone()


if __name__ == "__main__":
    main()
