#!/usr/bin/env python3
"""What fitting the grid brings: constant grid, Lloyd-Max rounds, weight mu of the KL term. One JSON line per cell.

    python bench/fit.py [--limit 100] [--out bench/results/fit.jsonl]

Models and texts of ../shared. `bench/report.py` makes the table of docs/method.md from it.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

from recipes import ROOT, cases, facts

import precal_ext
from precal_ext.evaluate import evaluate, load, read_windows

SETTINGS: list[dict[str, Any]] = [
    {"grid": "constant"},
    {"mu": 0.0},
    {"mu": 0.0, "fit_rounds": 4},
    {"mu": 0.01},
    {"mu": 0.03},
    {"mu": 0.1},
    {"mu": 0.3},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="windows of 256 tokens per text")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "fit.jsonl")
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as out:
        for name, folder, texts in cases(["llama-6m", "TinyStories-656K"]):
            reference, tokenizer = load(folder)
            reference = reference.float()
            windows = read_windows(tokenizer, texts[0], 256, args.limit)
            for bits in (4, 3):
                for setting in SETTINGS:
                    model = copy.deepcopy(reference)
                    report = precal_ext.quantize_model(model, precal_ext.QuantizeConfig(bits=bits, **setting))
                    result = evaluate(model, windows, reference)
                    line = {
                        "model": name,
                        "text": texts[0].name,
                        "bits": bits,
                        "setting": setting,
                        "sqnr_db": report.sqnr_db,
                        "kl_nats": report.kl_nats,
                        **result.to_dict(),
                        **facts("bench/fit.py"),
                    }
                    print(json.dumps(line), file=out, flush=True)
                    print(name, bits, setting, f"{report.sqnr_db:.3f} dB, KLD {result.kld_nats:.5f}", flush=True)


if __name__ == "__main__":
    main()
