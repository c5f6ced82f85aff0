#!/usr/bin/env python3
"""What a quantized output head costs in loss: the default recipe with the head dense, in 8 and in 4 bits.

    python bench/head.py [--limit 60] [--out bench/results/head.jsonl]

The measure is bench/quality.py's: KLD from the full-precision model in float32, windows of 256 tokens. llama-6m ties
its head to the embedding, as most small models do, so that a quantized head is stored beside the dense embedding.
`bench/report.py` makes the table of docs/performance.md from it; speeds are bench/models.py's.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

from quality import Remembered
from recipes import ROOT, cases, facts
from rows import Results, Row

from precal_ext.config import QuantizeConfig
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.inplace import quantize_model

FINE = {"overrides": {"lm_head": {"group_size": 16, "c": 2}}}
# Name -> settings of the model.
SETTINGS: dict[str, dict[str, Any]] = {
    f"{bits} bits, head {label}": {"bits": bits, **head}
    for bits in (4, 3)
    for label, head in (
        ("dense", {}),
        ("8 bits", {"lm_head": 8}),
        ("4 bits", {"lm_head": 4}),
        ("4 bits, g16, c = 2", {"lm_head": 4, **FINE}),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=60, help="windows of 256 tokens per text")
    parser.add_argument("--only", metavar="REGEX", default="", help="settings by name; the other rows of the file stay")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "head.jsonl")
    args = parser.parse_args()
    results = Results(argparse.Namespace(**vars(args), missing=False), ("model", "text", "format"))
    for name, folder, texts in cases(["llama-6m"]):
        reference, tokenizer = load(folder)
        reference = reference.float()
        remembered = Remembered(reference)
        windows = {path.name: read_windows(tokenizer, path, 256, args.limit) for path in texts}
        for label, setting in SETTINGS.items():
            keys: list[Row] = [{"model": name, "text": text, "format": label, "source": "precal"} for text in windows]
            if not results.wants(*keys):
                continue
            model = copy.deepcopy(reference)
            report = quantize_model(model, QuantizeConfig(**setting))
            head = next((e for e in report.quantized if e.tensor == "lm_head.weight"), None)
            bits = 16.0 if head is None or head.figures is None else head.figures.bits_per_weight
            weights = math.prod(reference.get_output_embeddings().weight.shape)
            for key in keys:
                figures = evaluate(model, windows[key["text"]], remembered).to_dict()
                row = {**key, "head_bits_per_weight": bits, "head_bytes": round(bits * weights / 8), **figures}
                results.put({**row, **facts("bench/head.py")})
                print(f"{name:12}{key['text']:20}{label:34}{bits:7.3f}{figures['kld_nats']:9.4f}", flush=True)


if __name__ == "__main__":
    main()
