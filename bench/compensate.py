#!/usr/bin/env python3
"""What discarded-weight recycling gains: loss before and after, by space, recipe and width. One JSON line per search.

    python bench/compensate.py [--only REGEX] [--missing] [--limit 40] [--out bench/results/compensate.jsonl]

Models and texts of ../shared; about an hour of one core, `--missing` goes on after a stop. A search sees windows
of the `*_calib` text of the model's first domain; the loss is measured on the `*_eval` text of that domain and on one
of another domain, neither of which it sees. KLD is the mean KL divergence from the full-precision model, in nats per
token. `bench/report.py` makes the tables of docs/compensation.md from it.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality import Remembered
from recipes import ROOT, SHARED, facts
from rows import Results, Row, add_arguments

from precal_ext.calibrate import Calibration, calibrate_checkpoint
from precal_ext.compensate import CompensateConfig, compensate_model
from precal_ext.config import QuantizeConfig
from precal_ext.evaluate import Evaluation, evaluate, load, read_windows
from precal_ext.inplace import quantize_model
from precal_ext.quantize import fit_set_grid, quantize_weight
from precal_ext.requantize import requantize

# Model: the text that is searched on, that of its domain and of another one to measure on.
TEXTS = {
    "llama-6m": ("books_calib.txt", "books_eval.txt", "python_eval.txt"),
    "TinyStories-656K": ("stories_calib.jsonl", "stories_eval.jsonl", "books_eval.txt"),
}


def cases() -> Iterator[Row]:
    """What matters most first."""

    def case(model: str, bits: int, recipe: str, space: str, criterion: str = "kld", samples: int = 16) -> Row:
        name = f"{recipe}, {bits} bits, {space}, {criterion}, {samples} windows"
        fields = {"bits": bits, "recipe": recipe, "space": space, "criterion": criterion, "samples": samples}
        return {"model": model, "format": name, "source": "precal", **fields}

    def after_gptq(model: str, bits: int, space: str) -> Row:
        plain = case(model, bits, "precal", space)
        return {**plain, "format": f"{plain['format']}, after GPTQ", "gptq": True}

    small, large = "TinyStories-656K", "llama-6m"
    yield case(large, 3, "precal", "gradient")
    yield case(large, 3, "paper", "gradient")
    for bits in (3, 4):
        for space in ("gradient", "svd"):
            yield case(small, bits, "precal", space)
            yield case(small, bits, "paper", space)
    for space in ("random", "afm"):
        yield case(small, 3, "precal", space)
    for recipe in ("precal", "paper"):
        yield case(large, 4, recipe, "gradient")
    for model in (small, large):
        for bits in (3, 4):
            yield after_gptq(model, bits, "gradient")
    yield after_gptq(small, 3, "svd")
    yield case(large, 3, "precal", "svd")
    yield case(small, 3, "precal", "gradient", "perplexity")
    for samples in (4, 64):
        yield case(small, 3, "precal", "gradient", "kld", samples)
    yield case(large, 3, "paper", "svd")
    yield case(small, 3, "precal", "svd", "perplexity")
    for model, samples in ((large, 4), (large, 64)):
        yield case(model, 3, "precal", "gradient", "kld", samples)
    yield case(large, 3, "precal", "gradient", "perplexity")
    for space in ("random", "afm"):
        yield case(large, 3, "precal", space)
    for recipe in ("precal", "paper"):
        yield case(large, 4, recipe, "svd")


def figures(prefix: str, found: Evaluation) -> Row:
    return {f"{prefix}_{key}": getattr(found, key) for key in ("kld_nats", "kld_stderr", "delta_nll_nats", "tokens")}


def search(case: Row, limit: int) -> Row:
    """One row; in a process of its own, so that its memory can be told."""
    start = _peak_mb()
    texts = [SHARED / "data" / name for name in TEXTS[case["model"]]]
    reference, tokenizer = load(SHARED / "models" / case["model"], torch.float32)
    config = QuantizeConfig(bits=case["bits"], recipe=case["recipe"])
    if case.get("gptq"):
        with tempfile.TemporaryDirectory() as folder:
            calibration = Calibration(texts[0], windows=64, length=256)
            report = calibrate_checkpoint(
                SHARED / "models" / case["model"], Path(folder) / "out", config, calibration=calibration
            )
            model = load(Path(folder) / "out", torch.float32)[0]
    else:
        model = copy.deepcopy(reference)
        report = quantize_model(model, config)
    seen, *others = (read_windows(tokenizer, text, 256, None if i == 0 else limit) for i, text in enumerate(texts))
    row: Row = {"bits_per_weight": report.bits_per_weight, "texts": [text.name for text in texts]}
    remembered = Remembered(reference)
    for when in ("before", "after"):
        for kind, windows in zip(("same", "other"), others, strict=True):
            row.update(figures(f"{kind}_{when}", evaluate(model, windows, remembered)))
        if when == "before":
            how = CompensateConfig(space=case["space"], criterion=case["criterion"], samples=case["samples"])
            cpu = time.thread_time()
            result = compensate_model(model, reference, seen, how)
            row["cpu_seconds"] = time.thread_time() - cpu
    row.update({key: value for key, value in result.to_dict().items() if key not in ("config", "blocks")})
    row["codes"] = sum(change.codes for change in result.changes)
    row["changes"] = [[c.block, c.round, c.k, c.gain] for c in result.changes]
    row["peak_mb"], row["start_mb"] = _peak_mb(), start
    row["requantize_ns"] = _requantize_ns(config)
    return row


def _requantize_ns(config: QuantizeConfig, size: int = 512) -> float:
    """CPU time of one candidate, per weight."""
    w = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    q, times = quantize_weight(w, config, fit_set_grid([w], config)), []
    for _ in range(3):
        begin = time.thread_time()
        requantize(q, 1.1 * w)
        times.append(time.thread_time() - begin)
    return min(times) / w.numel() * 1e9


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=40, help="windows of 256 tokens to measure on, per text")
    add_arguments(parser, ROOT / "bench" / "results" / "compensate.jsonl")
    args = parser.parse_args()
    if not SHARED.is_dir():
        parser.error("../shared is absent")
    results = Results(args, ("model", "format"))
    made_by: dict[str, Any] = {**facts("bench/compensate.py"), "threads": torch.get_num_threads()}
    for case in cases():
        if not results.wants(case):
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = {**case, **pool.apply(search, (case, args.limit)), **made_by}
        results.put(row)
        change = [row[f"{kind}_after_kld_nats"] / row[f"{kind}_before_kld_nats"] - 1 for kind in ("same", "other")]
        print(
            f"{case['model']:18}{case['format']:48}{change[0]:+8.1%}{change[1]:+8.1%}{row['cpu_seconds']:8.0f} s",
            flush=True,
        )
    results.drop_gone()


if __name__ == "__main__":
    main()
