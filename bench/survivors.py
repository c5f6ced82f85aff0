#!/usr/bin/env python3
"""What the survivors of `precal_ext/gptq.py` bring: the error of outputs with other ways through the trellis.

    python bench/survivors.py [--layers 1 4] [--windows 48] [--out bench/results/survivors.jsonl]

llama-6m at 3 bits, calibrated on books; of some layers every weight is rounded in each way, from the same inputs. A row
is a way: the geometric mean over weights of the squared error of their outputs over that of the data-free codes, and
microseconds of one core a weight. docs/calibration.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recipes import ROOT, SHARED, facts
from torch import Tensor

from precal_ext import Calibration, QTensor, QuantizeConfig, gptq
from precal_ext.calibrate import Calibrator, calibrated
from precal_ext.convert import Job, plan_quantization, run_plan

SURVIVORS = gptq._search_block


def column_by_column(
    target: Tensor, step: Tensor, levels: Tensor, carry: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest level that the codes before leave, as if nothing followed."""
    return several(target, step, levels, carry, weight, 1, decide=True)


def several(
    target: Tensor, step: Tensor, levels: Tensor, carry: Tensor, weight: Tensor, each: int, decide: bool = False
) -> tuple[Tensor, Tensor]:
    """``each`` survivors for every state of the trellis; ``decide``: of all of them the cheapest alone goes on."""
    columns, rows = target.shape
    subsets = [levels[z::4].contiguous() for z in range(4)]
    cost = torch.full((2, 2, each, rows), math.inf)
    cost[0, 0, 0] = 0.0
    near = target.expand(2, 2, each, columns, rows)
    kept = []
    for k in range(columns):
        value = near[:, :, :, 0]
        scaled = torch.where(step[k] != 0, value / step[k], torch.zeros_like(value))
        index = torch.empty(2, 2, 2, each, rows, dtype=torch.int64)  # b1, b2, upper bit of the subset
        level = torch.empty(2, 2, 2, each, rows)
        for b1 in range(2):
            for upper in range(2):
                subset = subsets[2 * upper + b1]
                index[b1, :, upper] = torch.bucketize(scaled[b1].contiguous(), (subset[1:] + subset[:-1]) / 2)
                level[b1, :, upper] = subset[index[b1, :, upper]]
        error = value[:, :, None] - step[k] * level
        total = cost[:, :, None] + error.square() * weight[k]
        found = [torch.empty(2, 2, each, rows, dtype=dtype) for dtype in (torch.float32, torch.int64, torch.int64)]
        after, left = torch.empty(2, 2, each, rows), torch.empty(2, 2, each, near.shape[3] - 1, rows)
        flat = near.reshape(4 * each, near.shape[3], rows)
        for b in range(2):
            for b1 in range(2):
                both = [torch.cat([x[b1, 0, b], x[b1, 1, 1 - b]]) for x in (total, error, index)]
                after[b, b1], at = both[0].topk(each, 0, largest=False)
                before = 2 * each * b1 + at
                for to, what in zip(found, (both[1].gather(0, at), 2 * both[2].gather(0, at) + b, before), strict=True):
                    to[b, b1] = what
                left[b, b1] = flat[:, 1:].gather(0, before[:, None].expand(each, near.shape[3] - 1, rows))
        if decide:
            cheapest = after.reshape(4, rows).argmin(0)
            after.view(4, rows)[torch.arange(4)[:, None] != cheapest] = math.inf
        cost, near = after, left - found[0][:, :, :, None] * carry[k, k + 1 :, None]
        kept.append([x.reshape(4 * each, rows) for x in found])
    state = cost.reshape(4 * each, rows).argmin(0, keepdim=True)
    codes, errors = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
    for k in range(columns - 1, -1, -1):
        errors[k], codes[k] = kept[k][0].gather(0, state)[0], kept[k][1].gather(0, state)[0]
        state = kept[k][2].gather(0, state)
    return codes, errors


WAYS: dict[str, Any] = {
    "column by column": column_by_column,
    "a survivor for each state": SURVIVORS,
    "two": lambda *block: several(*block, 2),
    "four": lambda *block: several(*block, 4),
}


class Seen(Calibrator):
    """Calibrates, and keeps what each weight of some layers is rounded from."""

    layers: tuple[int, ...] = ()
    found: list[tuple[Tensor, QTensor, Tensor]]

    def _rounded(self, job: Job, w: Tensor, q: QTensor) -> tuple[QTensor, dict[str, Any]]:
        if self._at in self.layers:
            self.found.append((w.clone(), q, self._inputs[job.module].hessian.clone()))
        return super()._rounded(job, w, q)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--windows", type=int, default=48, help="of 256 tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "survivors.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    calibration = Calibration(SHARED / "data" / "books_calib.txt", args.windows, 256)
    with tempfile.TemporaryDirectory(prefix="precal-bench-") as scratch:
        plan = plan_quantization(SHARED / "models" / "llama-6m", Path(scratch) / "out", QuantizeConfig(bits=3))
        plan, _ = calibrated(plan, calibration)
        stage = Seen(plan, calibration)
        stage.layers, stage.found = tuple(args.layers), []
        run_plan(plan, stage=stage)
    lines = []
    for name, search in WAYS.items():
        gptq._search_block = search
        started, ratios = time.thread_time(), []
        for w, q, hessian in stage.found:
            made = gptq.gptq(w, q, hessian, gptq.factor(hessian, calibration.damping))
            ratios.append(math.log(made.error_after / made.error_before))
        seconds = time.thread_time() - started
        row = {
            "way": name,
            "weights": len(ratios),
            "error_ratio": math.exp(sum(ratios) / len(ratios)),
            "microseconds": seconds / sum(w.numel() for w, _, _ in stage.found) * 1e6,
        }
        print(f"{name:28}{row['error_ratio']:8.3f}{row['microseconds']:8.2f} us", flush=True)
        lines.append(json.dumps({**row, **facts("bench/survivors.py")}) + "\n")
    args.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
