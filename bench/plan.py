#!/usr/bin/env python3
"""What planning under a budget brings: KLD of plans beside every uniform setting, and predicted beside measured loss.

    python bench/plan.py [--models llama-6m ...] [--limit 40] [--out bench/results/plan.jsonl]
    python bench/plan.py --missing         # go on after a stop
    python bench/plan.py --only '^plan'    # the rows of these formats again

Sensitivities are fitted on the calibration texts of ../shared and everything is measured on the evaluation texts; both
domains of llama-6m are crossed. Every row is a model with W' in float32 in place of its linear weights. `predicted` is
the sum of a_l t_l^2 with the errors that the row has, by the text that a_l was fitted on. `bench/report.py` makes
the tables and the picture of docs/planning.md.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from quality import Remembered
from recipes import ROOT, SHARED, facts
from rows import Results, Row, add_arguments
from small_models import cache_folder

from precal_ext import (
    Candidates,
    QuantizeConfig,
    Report,
    dequantize_model,
    plan_bits,
    planner,
    quantize_model,
    sensitivity,
)
from precal_ext.distortion import Point, Setting, measure_points, planned_sets, stored_bits, weights_of
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.plan import Job, plan_quantization
from precal_ext.planner import WINDOWS

# Trained by `bench/small_models.py --share 0.35 --only llama-d96`: nothing here was developed on it.
HELD_OUT = "llama-d96-l2-v512-s350"
# model -> texts that a_l is fitted on, and texts that are measured
CASES = {
    "llama-6m": (("books_calib.txt", "python_calib.txt"), ("books_eval.txt", "python_eval.txt")),
    "TinyStories-656K": (("stories_calib.jsonl",), ("stories_eval.jsonl",)),
    "stories260K": (("stories_calib.jsonl",), ("stories_eval.jsonl",)),
    HELD_OUT: (("books_calib.txt", "python_calib.txt"), ("books_eval.txt", "python_eval.txt")),
}
TARGETS = (3.25, 3.6, 4.0)
WAYS = {
    "3 and 4 bits": Candidates(),
    "2 to 6 bits": Candidates(widths=(2, 3, 4, 5, 6)),
}
UNIFORM = [Setting(b, g, c) for b in (2, 3, 4) for g in (16, 32, 64, 128, 256) for c in (0, 1, 2, 3, 4)]
# mu of the grid's fit: another one rounds the same weights otherwise, and as well.
ROUNDINGS = (0.03, 0.1, 0.01, 0.06, 0.02)
NEAREST = 4  # uniform settings that are measured below each target; docs/quality.md shows that fewer bits lose more


def uniform_settings(folder: Path, targets: list[float]) -> list[Setting]:
    """Those with most bits at or below each target."""
    sets = planned_sets(plan_quantization(folder, "/dev/null"))
    weights = sum(weights_of(jobs) for jobs in sets.values())
    bits = {s: sum(stored_bits(j, s.config(QuantizeConfig())) for j in sets.values()) / weights for s in UNIFORM}
    found: dict[Setting, None] = {}
    for target in targets:
        below = sorted((s for s in UNIFORM if bits[s] <= target), key=lambda s: -bits[s])
        found |= dict.fromkeys(below[:NEAREST])
    return list(found)


def formats(folder: Path, targets: list[float], fits: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of a row, and what it is made with."""
    for s in uniform_settings(folder, targets):
        config = {"bits": s.bits, "group_size": s.group_size, "c": s.c}
        yield f"uniform {s.bits} bits g{s.group_size}, c = {s.c}", {"config": config}
    for way, within in WAYS.items():
        for target in targets:
            for fit in (None, *fits):
                yield f"plan {target:g}, {way}, {fit or 'no text'}", {"target": target, "within": within, "fit": fit}


def fitted(results: Results, name: str, folder: Path, text: str, way: str) -> Row:
    """a_l of every set on a text, made once and kept as a row of the file."""
    key = {"model": name, "text": text, "format": f"sensitivity by {way}"}
    old = results.rows.get(results.of(key))
    if old is not None and not results.wants(key):
        return old
    model, tokenizer = load(folder)
    windows = read_windows(tokenizer, SHARED / "data" / text, 256, WINDOWS)
    sets = planned_sets(plan_quantization(folder, "/dev/null"))
    started = time.process_time()
    fit = sensitivity.fit if way == "noise" else sensitivity.by_gradients
    made = fit(model.float(), windows, {n: [job.module for job in jobs] for n, jobs in sets.items()})
    row = {
        **key, "source": "precal", "a": dict(made.a), "stderr": dict(made.stderr), "kld": dict(made.kld),
        "weights": {n: weights_of(jobs) for n, jobs in sets.items()},
        "levels": list(made.levels), "tokens": made.tokens, "seconds": time.process_time() - started,
        "windows": len(windows), **facts("bench/plan.py"),
    }  # fmt: skip
    results.put(row)
    print(f"{name} {text}: sensitivities in {row['seconds']:.0f} s", flush=True)
    return row


def predicted(report: Report, a: Mapping[str, float]) -> float:
    """Sum of a_l t_l^2 with the errors of a report."""
    errors: dict[str, list[tuple[int, float]]] = {}
    for e in report.quantized:
        if e.figures is not None and e.fusion_set is not None:
            errors.setdefault(e.fusion_set, []).append((math.prod(e.shape), e.figures.noise / e.figures.power))
    return math.fsum(a[name] * sum(n * t for n, t in v) / sum(n for n, _ in v) for name, v in errors.items())


class Points:
    """``measure_points`` that measures each setting of a set once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], Point] = {}

    def __call__(self, members: Sequence[Job], settings: Mapping[Setting, QuantizeConfig]) -> list[Point]:
        names = tuple((job.info.file, job.info.name) for job in members)
        new = {setting: config for setting, config in settings.items() if (names, setting) not in self._seen}
        self._seen |= {(names, point.setting): point for point in measure_points(members, new)}
        return [self._seen[names, setting] for setting in settings]


def mean_of(found: Sequence[Row]) -> Row:
    """Figures of the same text, averaged; its standard errors, which do not know of roundings, too."""
    return {name: math.fsum(f[name] for f in found) / len(found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument(
        "--roundings", type=int, default=1, choices=range(1, len(ROUNDINGS) + 1),
        help="average over so many: in the smallest models the luck of one moves KLD by a quarter",
    )  # fmt: skip
    parser.add_argument("--noise", action="store_true", help="fit the sensitivities by noise too, on the first text")
    parser.add_argument("--limit", type=int, default=40, help="windows of 256 tokens per text")
    add_arguments(parser, ROOT / "bench" / "results" / "plan.jsonl")
    args = parser.parse_args()
    planner.measure_points = Points()  # every plan of a model measures the same
    results = Results(args, ("model", "text", "format"))
    for name in args.models:
        fit_texts, texts = CASES[name]
        folder = cache_folder() / name if name == HELD_OUT else SHARED / "models" / name
        fits = {text: fitted(results, name, folder, text, "gradients") for text in fit_texts}
        if args.noise:
            fitted(results, name, folder, fit_texts[0], "noise")
        reference, tokenizer = load(folder)
        reference = reference.float()
        remembered = Remembered(reference)
        windows = {text: read_windows(tokenizer, SHARED / "data" / text, 256, args.limit) for text in texts}
        for label, how in formats(folder, args.targets, fits):
            keys: list[Row] = [{"model": name, "text": text, "format": label} for text in texts]
            if not results.wants(*keys):
                continue
            if "config" in how:
                config = QuantizeConfig(**how["config"])
            else:
                text = how["fit"]
                options = {} if text is None else {"text": SHARED / "data" / text, "fitted": fits[text]["a"]}
                config = plan_bits(folder, how["target"], within=how["within"], **options).config()
            reports, found = [], {text: [] for text in texts}
            for mu in ROUNDINGS[: args.roundings]:
                model = copy.deepcopy(reference)
                reports.append(quantize_model(model, dataclasses.replace(config, mu=mu)))
                dequantize_model(model, torch.float32)
                for text in texts:
                    found[text].append(evaluate(model, windows[text], remembered).to_dict())
            bits, decibels = reports[0].bits_per_weight, reports[0].sqnr_db
            expected = {text: sum(predicted(r, fit["a"]) for r in reports) / len(reports) for text, fit in fits.items()}
            for key in keys:
                figures = mean_of(found[key["text"]])
                head = {**key, "source": "precal", "bits_per_weight": bits, "sqnr_db": decibels}
                chosen = {"target": how.get("target"), "fit": how.get("fit"), "predicted": expected}
                results.put({**head, **chosen, **figures, "roundings": args.roundings, **facts("bench/plan.py")})
                print(f"{name:24}{key['text']:20}{label:52}{bits:7.4f}{figures['kld_nats']:10.5f}", flush=True)


if __name__ == "__main__":
    main()
