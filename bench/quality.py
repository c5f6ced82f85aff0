#!/usr/bin/env python3
"""The curve of loss against bits: precal's recipes beside other packages, on one model and its texts.

    python bench/quality.py [MODEL TEXT...] [--bits 4 3] [--limit 60] [--out bench/results/quality.jsonl]

Without arguments: llama-6m and TinyStories-656K of ../shared on their texts. Every row is a format applied to the same
linear layers (all but the output head), as W'; the full-precision model is the reference. KLD is the mean KL divergence
of the next-token distribution from the reference's, nats per token; dNLL the paired difference of NLL. Peers run
through their own packages (`bench/peers.py`, `bench/README.md`). `bench/report.py` makes docs/quality.md and the plot.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import Format, lab, peers
from recipes import ROOT, SHARED, cases, facts

from precal_ext.config import QuantizeConfig
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.model import quantize_model


def precal_formats(bits: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for group_size in (128, 64, 32, 16):
        for c in (0, 1, 2):
            yield f"precal g{group_size}, c = {c}", {"bits": bits, "group_size": group_size, "c": c}
    for alpha in (0.02, 0.05, 0.08):
        yield f"precal --recipe paper, alpha = {alpha:.0%}", {"bits": bits, "recipe": "paper", "alpha": alpha}


def apply(model: torch.nn.Module, run: Format) -> tuple[float, float]:
    """Replace the weights of all linears but the head by W'; returns bits per weight and SQNR in dB."""
    stored = power = noise = 0.0
    count = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or re.search(r"(^|\.)lm_head$", name):
            continue
        w = module.weight.data
        restored, bits = run(w.clone())
        stored, count = stored + bits * w.numel(), count + w.numel()
        power += float(w.double().square().sum())
        noise += float((w - restored).double().square().sum())
        module.weight.data = restored.contiguous()
    return stored / count, 10 * math.log10(power / noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("text", nargs="*", type=Path)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--limit", type=int, default=60, help="windows of 256 tokens per text")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quality.jsonl")
    args = parser.parse_args()
    if args.model is None:
        chosen = cases(["llama-6m", "TinyStories-656K"])
        if not SHARED.is_dir():
            parser.error("name a MODEL and a TEXT; ../shared is absent")
    elif not args.text:
        parser.error("TEXT must be given with MODEL")
    else:
        chosen = [(args.model.resolve().name, args.model, args.text)]
    with args.out.open("w", encoding="utf-8") as out:
        for name, folder, texts in chosen:
            reference, tokenizer = load(folder)
            reference = reference.float()
            windows = {path.name: read_windows(tokenizer, path, 256, args.limit) for path in texts}

            def record(
                label: str,
                source: str,
                bits: float,
                sqnr: float,
                model: Any,
                *,
                width: int,
                reference: Any = reference,
                windows: Any = windows,
                name: str = name,
            ) -> None:
                for text, parts in windows.items():
                    figures = evaluate(model, parts, reference).to_dict()
                    line = {"model": name, "text": text, "width": width, "format": label, "source": source}
                    line |= {"bits_per_weight": bits, "sqnr_db": sqnr, **figures, **facts("bench/quality.py")}
                    print(json.dumps(line), file=out, flush=True)
                    kld = f"{figures['kld_nats']:.4f}"
                    print(f"{name:18}{text:20}{label:46}{bits:7.3f}{sqnr:7.2f}{kld:>9}", flush=True)

            for width in args.bits:
                for label, setting in precal_formats(width):
                    model = copy.deepcopy(reference)
                    report = quantize_model(model, QuantizeConfig(**setting))
                    bits = report.published_bits() or report.bits_per_weight
                    record(label, "precal", bits, report.sqnr_db, model, width=width)
                for label, source, run in [*peers(width), *lab(width)]:
                    model = copy.deepcopy(reference)
                    bits, sqnr = apply(model, run)
                    record(label, source, bits, sqnr, model, width=width)


if __name__ == "__main__":
    main()
