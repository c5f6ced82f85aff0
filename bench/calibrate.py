#!/usr/bin/env python3
"""Calibrated on one text, measured on others: GPTQ alone, precal alone, precal and then GPTQ.

    python bench/calibrate.py [--bits 4 3] [--only REGEX] [--missing] [--out bench/results/calibrate.jsonl]

llama-6m of ../shared, calibrated on the calibration text of one of its two domains (windows of 256 tokens), measured on
held-out texts of both, on HumanEval (prompts with their solutions) and on WikiText-2. The float32 model is the
reference of KLD. Rows: a format, a calibration text ("-": none), a text. "GPTQ alone" is that of llmcompressor, run
by its `oneshot` on the same windows (`bench/README.md`); without it its rows stay. `bench/report.py` makes the tables
of docs/calibration.md.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality import Remembered
from recipes import SHARED, facts
from rows import Results, Row, add_arguments

from precal_ext import Calibration, QuantizeConfig, calibrate_checkpoint, quantize_checkpoint
from precal_ext.calibrate import DAMPING, calibrated
from precal_ext.convert import plan_quantization
from precal_ext.evaluate import evaluate, load, load_model, load_tokenizer, read_windows

ROOT = Path(__file__).resolve().parents[1]
MODEL = "llama-6m"
CALIBRATION = {"books": "books_calib.txt", "python": "python_calib.txt"}
WINDOW = 256
WINDOWS = 64
DAMPINGS = (0.01, 0.1, 1.0)
TOKENS = (8,)  # windows of a text, where another number is said
VARIED = 3  # bits at which damping and text are varied

# Makes a model from (folder, out, text or None); returns it and its true bits, and what is to be said of the time.
Make = Callable[[Path, Path, Path | None], tuple[Any, float, dict[str, Any]]]


def alone(setting: dict[str, Any]) -> Make:
    def make(folder: Path, out: Path, text: Path | None) -> tuple[Any, float, dict[str, Any]]:
        report = quantize_checkpoint(folder, out, QuantizeConfig(**setting))
        return load_model(out, torch.float32), report.bits_per_weight, {"seconds": report.seconds}

    return make


def then_gptq(setting: dict[str, Any], damping: float, windows: int = WINDOWS) -> Make:
    def make(folder: Path, out: Path, text: Path | None) -> tuple[Any, float, dict[str, Any]]:
        assert text is not None
        calibration = Calibration(text, windows, WINDOW, damping)
        report = calibrate_checkpoint(folder, out, QuantizeConfig(**setting), calibration=calibration)
        return load_model(out, torch.float32), report.bits_per_weight, {"seconds": report.seconds}

    return make


def gptq_alone(bits: int, group_size: int, damping: float = 0.01) -> Make:
    """llmcompressor's, asymmetric, at its best here: scales by squared error (its "mse" observer), columns in the order
    of their inputs' power with groups as they were ("weight"). A scale is counted with 16 bits, a zero point with those
    of a code."""

    def make(folder: Path, out: Path, text: Path | None) -> tuple[Any, float, dict[str, Any]]:
        assert text is not None
        package = importlib.import_module("llmcompressor")
        modifier = importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier
        schemes = importlib.import_module("compressed_tensors.quantization")
        plan = plan_quantization(folder, out, QuantizeConfig(bits=bits))
        windows = calibrated(plan, Calibration(text, WINDOWS, WINDOW))[1].windows
        columns = {"input_ids": windows, "attention_mask": [[1] * WINDOW] * len(windows)}
        arguments = schemes.QuantizationArgs(
            num_bits=bits,
            type="int",
            symmetric=False,
            strategy="group",
            group_size=group_size,
            actorder="weight",
            observer="mse",
        )
        scheme = schemes.QuantizationScheme(targets=["Linear"], weights=arguments)
        started = time.monotonic()
        model = package.oneshot(
            model=load_model(folder, torch.float32),
            tokenizer=load_tokenizer(folder),
            dataset=importlib.import_module("datasets").Dataset.from_dict(columns),
            recipe=modifier(config_groups={"weights": scheme}, ignore=["lm_head"], dampening_frac=damping),
            num_calibration_samples=len(windows),
            max_seq_length=WINDOW,
            pipeline="sequential",
        )
        dense = load_model(folder, torch.float32)
        for name, module in dense.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.copy_(model.get_submodule(name).weight.data)
        seconds = time.monotonic() - started
        return (
            dense,
            bits + (16 + bits) / group_size,
            {"seconds": seconds, "source": f"llmcompressor {package.__version__}"},
        )

    return make


def formats(bits: int) -> dict[str, tuple[bool, Make]]:
    """Name -> whether it is calibrated, and how it is made."""
    setting = {"bits": bits}
    found: dict[str, tuple[bool, Make]] = {
        "precal g64": (False, alone(setting)),
        "precal g64, then GPTQ": (True, then_gptq(setting, DAMPING)),
        "GPTQ alone, asym g64": (True, gptq_alone(bits, 64)),
    }
    if bits != VARIED:
        return found
    found["GPTQ alone, asym g64, damping 0.1"] = True, gptq_alone(bits, 64, 0.1)
    for damping in DAMPINGS:
        if damping != DAMPING:
            found[f"precal g64, then GPTQ, damping {damping:g}"] = True, then_gptq(setting, damping)
    for windows in TOKENS:
        found[f"precal g64, then GPTQ, {windows} windows"] = True, then_gptq(setting, DAMPING, windows)
    return found


def human_eval(folder: Path) -> Path:
    """Prompts with their solutions, one a line."""
    with gzip.open(SHARED / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    path = folder / "HumanEval.jsonl"
    lines = [json.dumps({"text": task["prompt"] + task["canonical_solution"]}) for task in tasks]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--limit", type=int, default=30, help="windows of a text that are measured")
    add_arguments(parser, ROOT / "bench" / "results" / "calibrate.jsonl")
    args = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit("calibrate: needs the models and texts of ../shared, which is absent")
    folder = SHARED / "models" / MODEL
    results = Results(args, ("width", "format", "calibration", "text"))
    reference, tokenizer = load(folder)
    remembered = Remembered(reference.float())
    with tempfile.TemporaryDirectory(prefix="precal-bench-") as name:
        scratch = Path(name)
        texts = [SHARED / "data" / t for t in ("books_eval.txt", "python_eval.txt", "wikitext2_test.txt")]
        texts.insert(2, human_eval(scratch))
        windows = {path.name: read_windows(tokenizer, path, WINDOW, args.limit) for path in texts}
        for width in args.bits:
            for label, (wants_text, make) in formats(width).items():
                for domain in CALIBRATION if wants_text else ("-",):
                    keys: list[Row] = [
                        {"width": width, "format": label, "calibration": domain, "text": text} for text in windows
                    ]
                    if not results.wants(*keys):
                        continue
                    with tempfile.TemporaryDirectory(dir=scratch) as made:
                        text = SHARED / "data" / CALIBRATION[domain] if wants_text else None
                        try:
                            model, bits, more = make(folder, Path(made) / "out", text)
                        except ModuleNotFoundError as error:
                            print(f"calibrate: {label} is left out: {error}", file=sys.stderr)
                            continue
                    shown = []
                    for key in keys:
                        figures = evaluate(model, windows[key["text"]], remembered).to_dict()
                        head = {"source": "precal", **key, "model": MODEL, "bits_per_weight": bits, **more}
                        results.put({**head, **figures, **facts("bench/calibrate.py")})
                        shown.append(f"{figures['kld_nats']:.4f}")
                    print(
                        f"{width} {label:44}{domain:8}{bits:7.3f}{more['seconds']:7.1f} s  {' '.join(shown)}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
