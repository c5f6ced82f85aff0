#!/usr/bin/env python3
"""The loss that `precal plan` forecasts beside the loss that comes: predictor and theorem with their intervals.

    python bench/foreseen.py [--models llama-6m ...] [--limit 40] [--out FILE] [--missing]

A plan is made and forecast on the first windows of a calibration text, as the command does it; then the model with W'
in place is measured on the same windows, and on the evaluation text of the same domain. None of the models is in the
predictor's fit. `bench/report.py` makes the table of docs/planning.md.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from plan import CASES, HELD_OUT, TARGETS, Points
from quality import Remembered
from recipes import ROOT, SHARED, facts
from rows import Results, Row, add_arguments

from precal_ext import Candidates, dequantize_model, forecast_plan, plan_bits, planner, quantize_model
from precal_ext.evaluate import evaluate, load, read_windows

MODELS = [name for name in CASES if name != HELD_OUT]
# Beside the targets of docs/planning.md one that only 2 bits reach, and one of many bits.
ALL_TARGETS = (2.6, *TARGETS, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--limit", type=int, default=40, help="windows of 256 tokens of an evaluation text")
    parser.add_argument("--threads", type=int, default=1)
    add_arguments(parser, ROOT / "bench" / "results" / "foreseen.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    planner.measure_points = Points()  # every plan of a model measures the same
    results = Results(args, ("model", "text", "format"))
    for name in args.models:
        folder = SHARED / "models" / name
        reference, tokenizer = load(folder)
        reference = reference.float()
        remembered = Remembered(reference)
        for text in CASES[name][0]:
            path, other = SHARED / "data" / text, SHARED / "data" / text.replace("_calib", "_eval")
            same = read_windows(tokenizer, path, 256, planner.WINDOWS)
            unseen = read_windows(tokenizer, other, 256, args.limit)
            fitted = None
            for target in ALL_TARGETS:
                key: Row = {"model": name, "text": text, "format": f"plan {target:g}"}
                if not results.wants(key):
                    continue
                plan = plan_bits(folder, target, text=path, fitted=fitted, within=Candidates(min_sqnr_db=0.0))
                fitted = plan.sensitivities
                started = time.process_time()
                plan = forecast_plan(folder, plan, text=path)
                seconds = time.process_time() - started
                assert plan.forecast is not None
                model = copy.deepcopy(reference)
                report = quantize_model(model, plan.config())
                dequantize_model(model, torch.float32)
                row = {
                    **key, "source": "precal", "target": target, "bits_per_weight": report.bits_per_weight,
                    "sqnr_db": report.sqnr_db, "forecast": plan.forecast.to_dict(), "seconds": seconds,
                    "same": evaluate(model, same, remembered).to_dict(),
                    "unseen": evaluate(model, unseen, remembered).to_dict(), **facts("bench/foreseen.py"),
                }  # fmt: skip
                results.put(row)
                f, rise = plan.forecast, row["same"]["delta_nll_nats"]
                print(f"{name:18}{text:22}{target:5g}{rise:9.4f}  {f.used}  {f.predictor}  {f.theorem}", flush=True)


if __name__ == "__main__":
    main()
