#!/usr/bin/env python3
"""Plans by the curvature along real errors beside plans by the Fisher information: does the choice get better?

    python bench/plan_along.py [--models llama-6m ...] [--limit 24] [--roundings 1] [--out FILE]
    python bench/plan_along.py --missing         # go on after a stop
    python bench/plan_along.py --only '^plan'    # with the sensitivities that are there

`gradients` is what `precal plan` does. `error, KLD` and `error, loss` put the real errors of 3 and of 4 bits into one
fusion set after the other, and their opposites: a_l is the mean of KLD / t^2 over both and over the two widths, or that
of the loss's second difference, half of d'Hd, over t^2. All three are fitted on the same windows of the calibration
text, and the plans are measured on the evaluation texts. `bench/report.py` makes the table of docs/planning.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from plan import CASES, HELD_OUT, ROUNDINGS, TARGETS, Points, mean_of
from quality import Remembered
from recipes import ROOT, SHARED, facts
from rows import Results, Row, add_arguments
from small_models import cache_folder

from precal_ext import QuantizeConfig, dequantize_model, plan_bits, planner, quantize_model, sensitivity
from precal_ext import landscape as ls
from precal_ext.distortion import planned_sets
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.inplace import Quantizing
from precal_ext.plan import plan_quantization
from precal_ext.planner import WINDOWS

WAYS = ("gradients", "error, KLD", "error, loss")
WIDTHS = (3, 4)


def by_gradients(model: Any, windows: ls.Windows, folder: Path) -> dict[str, dict[str, float]]:
    sets = planned_sets(plan_quantization(folder, "/dev/null"))
    modules = {name: [job.module for job in jobs] for name, jobs in sets.items()}
    return {"gradients": dict(sensitivity.by_gradients(model, windows, modules).a)}


def by_errors(model: Any, windows: ls.Windows, folder: Path) -> dict[str, dict[str, float]]:
    """Both at once: the same runs give KLD and loss."""
    plan = plan_quantization(folder, "/dev/null")
    sets = planned_sets(plan)
    reference = Remembered(copy.deepcopy(model))
    start = ls.mean_nll(model, windows)
    kld, loss = ({name: 0.0 for name in sets} for _ in range(2))
    for bits in WIDTHS:
        work = Quantizing(model, QuantizeConfig(bits=bits))
        rounded = {m: q.dequantize() for p in work.pending for m, q in work.take(p).items()}
        sites = {m: work.sites[m] for m in rounded}
        for name, jobs in sets.items():
            error = ls.error_of(sites, {job.module: rounded[job.module] for job in jobs})
            t2 = ls.relative_error(sites, error)
            for sign in (1, -1):
                with ls.moved(sites, error, sign):
                    found = evaluate(model, windows, reference)
                assert found.kld_nats is not None
                kld[name] += found.kld_nats / t2 / (2 * len(WIDTHS))
                loss[name] += (found.nll_nats - start) / t2 / (2 * len(WIDTHS))
    return {"error, KLD": kld, "error, loss": {name: max(0.0, a) for name, a in loss.items()}}


def fitted(results: Results, name: str, folder: Path, text: str) -> dict[str, Row]:
    """a_l by every way on a text, made once and kept as rows of the file."""
    keys: dict[str, Row] = {way: {"model": name, "text": text, "format": f"sensitivity by {way}"} for way in WAYS}
    for fit, ways in ((by_gradients, WAYS[:1]), (by_errors, WAYS[1:])):
        if any(results.wants(keys[way]) or results.of(keys[way]) not in results.rows for way in ways):
            model, tokenizer = load(folder)
            windows = read_windows(tokenizer, SHARED / "data" / text, 256, WINDOWS)
            started = time.process_time()
            for way, a in fit(model.float(), windows, folder).items():
                seconds = time.process_time() - started
                row = {**keys[way], "source": "precal", "a": a, "seconds": seconds, "windows": len(windows)}
                results.put({**row, **facts("bench/plan_along.py")})
    return {way: results.rows[results.of(keys[way])] for way in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=["llama-6m", "TinyStories-656K"])
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--roundings", type=int, default=1, choices=range(1, len(ROUNDINGS) + 1))
    parser.add_argument("--limit", type=int, default=24, help="windows of 256 tokens per text")
    parser.add_argument("--threads", type=int, default=1)
    add_arguments(parser, ROOT / "bench" / "results" / "plan_along.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    planner.measure_points = Points()  # every plan of a model measures the same
    results = Results(args, ("model", "text", "format"))
    for name in args.models:
        fit_texts, texts = CASES[name]
        folder = cache_folder() / name if name == HELD_OUT else SHARED / "models" / name
        reference, tokenizer = load(folder)
        reference = reference.float()
        remembered = Remembered(reference)
        windows = {text: read_windows(tokenizer, SHARED / "data" / text, 256, args.limit) for text in texts}
        for fit_text in fit_texts:
            for way, fit in fitted(results, name, folder, fit_text).items():
                for target in args.targets:
                    label = f"plan {target:g} by {way} on {fit_text}"
                    keys: list[Row] = [{"model": name, "text": text, "format": label} for text in texts]
                    if not results.wants(*keys):
                        continue
                    plan = plan_bits(folder, target, text=SHARED / "data" / fit_text, fitted=fit["a"])
                    found: dict[str, list[Row]] = {text: [] for text in texts}
                    for mu in ROUNDINGS[: args.roundings]:
                        model = copy.deepcopy(reference)
                        quantize_model(model, dataclasses.replace(plan.config(), mu=mu))
                        dequantize_model(model, torch.float32)
                        for text in texts:
                            found[text].append(evaluate(model, windows[text], remembered).to_dict())
                    for key in keys:
                        figures = mean_of(found[key["text"]])
                        assert not math.isnan(figures["kld_nats"])
                        head = {**key, "source": "precal", "way": way, "fit": fit_text, "target": target}
                        head |= {"bits_per_weight": plan.estimate["bits_per_weight"], "predicted": plan.loss}
                        results.put({**head, **figures, "roundings": args.roundings, **facts("bench/plan_along.py")})
                        print(f"{name:24}{key['text']:20}{label:60}{figures['kld_nats']:10.5f}", flush=True)


if __name__ == "__main__":
    main()
