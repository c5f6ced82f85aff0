#!/usr/bin/env python3
"""Loss of the small development models under every recipe: one JSON line per (model, text, setting).

    python bench/recipes.py [--models llama-6m ...] [--limit 200] [--out bench/results/recipes.jsonl]

Models and texts are those of ../shared; where it is absent, only the embedded model runs, on the embedded text. The
full-precision model is the reference of KLD and top-1. `bench/report.py` makes the tables of docs/results.md from it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import precal_ext
from precal_ext import _C
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.report import Report

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TEXTS = {
    "llama-6m": ("books_eval.txt", "python_eval.txt"),
    "TinyStories-656K": ("stories_eval.jsonl",),
    "stories260K": ("stories_eval.jsonl",),
}


def settings(bits: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"recipe": "rtn", "group_size": g} for g in (128, 64, 32, 16)]
    found += [{"recipe": "paper", "alpha": alpha} for alpha in (0.02, 0.05, 0.08)]
    found += [{"recipe": "precal", "group_size": g, "c": c} for g in (128, 64, 32, 16) for c in (0, 1)]
    return [{"bits": bits, **s} for s in found]


def cases(names: list[str]) -> list[tuple[str, Path, list[Path]]]:
    if not (SHARED / "models").is_dir():
        print("../shared is absent: the embedded model on the embedded text only", file=sys.stderr)
        return [("llama-6m", ROOT / "demo" / "llama-6m", [ROOT / "demo" / "text.txt"])]
    return [(name, SHARED / "models" / name, [SHARED / "data" / text for text in TEXTS[name]]) for name in names]


def row(report: Report) -> dict[str, Any]:
    return {
        "bits_per_weight": report.bits_per_weight,
        "published_bits_per_weight": report.published_bits(),
        "sqnr_db": report.sqnr_db,
        "kl_nats": report.kl_nats,
        "quantize_seconds": report.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--limit", type=int, default=200, help="windows of 256 tokens per text")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "recipes.jsonl")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as out:
        for name, folder, texts in cases(args.models):
            reference, tokenizer = load(folder)
            reference = reference.float()
            windows = {path.name: read_windows(tokenizer, path, 256, args.limit) for path in texts}
            for text, parts in windows.items():
                base = evaluate(reference, parts)
                print(
                    json.dumps({"model": name, "text": text, **base.to_dict(), **facts("bench/recipes.py")}),
                    file=out,
                    flush=True,
                )
            for setting in [s for bits in args.bits for s in settings(bits)]:
                model = copy.deepcopy(reference)
                report = precal_ext.quantize_model(model, precal_ext.QuantizeConfig(**setting))
                for text, parts in windows.items():
                    figures = evaluate(model, parts, reference).to_dict()
                    line = {
                        "model": name,
                        "text": text,
                        "setting": setting,
                        **row(report),
                        **figures,
                        **facts("bench/recipes.py"),
                    }
                    print(json.dumps(line), file=out, flush=True)
                    print(
                        f"{name:18}{text:20}{setting!s:62}{report.bits_per_weight:7.3f}{report.sqnr_db:7.2f}"
                        f"{figures['kld_nats']:9.4f}{figures['perplexity']:10.3f}",
                        flush=True,
                    )


def facts(script: str) -> dict[str, Any]:
    """Where and how a row was made."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "precal": precal_ext.__version__,
        "isa": _C.cpu_isa(),
        "command": " ".join(["python", script, *sys.argv[1:]]),
    }


@functools.cache
def commit() -> str:
    """Short hash of HEAD, with a + where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
