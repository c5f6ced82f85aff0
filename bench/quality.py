#!/usr/bin/env python3
"""The curve of loss against bits: precal's recipes beside other packages, on one model and its texts.

    python bench/quality.py [MODEL TEXT...] [--bits 4 3 2] [--limit 60] [--out bench/results/quality.jsonl]
    python bench/quality.py --ours             # precal's rows again, the others stay; needs no other package
    python bench/quality.py --only 'hqq|NF4'   # the rows of these formats again
    python bench/quality.py --missing          # go on after a stop

Without MODEL: the development models of ../shared on their texts. Every row is a format applied to the same linear
layers (all but the output head), as W'; the full-precision model is the reference. KLD is the mean KL divergence of the
next-token distribution from the reference's, nats per token; dNLL the paired difference of NLL. Peers run through their
own packages (`bench/peers.py`, `bench/README.md`). `bench/report.py` makes docs/quality.md and the plot.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peers import Format, lab, peers
from recipes import ROOT, SHARED, TEXTS, cases, facts
from rows import Results, Row, add_arguments
from torch import Tensor

from precal_ext.config import QuantizeConfig
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.inplace import quantize_model


def precal_formats(bits: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for group_size in (256, 128, 64, 32, 16):
        for c in (0, 1, 2):
            yield f"precal g{group_size}, c = {c}", {"bits": bits, "group_size": group_size, "c": c}
    for group_size in (64, 32, 16):
        yield f"precal g{group_size}, c = 4", {"bits": bits, "group_size": group_size, "c": 4}
    for group_size in (128, 64, 16):  # what the trellis brings
        setting = {"bits": bits, "group_size": group_size, "c": 1, "trellis": False}
        yield f"precal without trellis g{group_size}, c = 1", setting
    for alpha in (0.02, 0.05, 0.08):
        yield f"precal --recipe paper, alpha = {alpha:.0%}", {"bits": bits, "recipe": "paper", "alpha": alpha}


def quantize(model: torch.nn.Module, setting: dict[str, Any]) -> tuple[float, float]:
    """precal's own recipe on the model, in place; bits as the recipe counts them, and SQNR in dB."""
    report = quantize_model(model, QuantizeConfig(**setting))
    return report.published_bits() or report.bits_per_weight, report.sqnr_db


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


class Remembered:
    """A model that computes the logits of a batch once: the reference is the same for every format."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.seen: dict[bytes, Tensor] = {}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        key = input_ids.numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return SimpleNamespace(logits=self.seen[key])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("text", nargs="*", type=Path)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--limit", type=int, default=60, help="windows of 256 tokens per text")
    add_arguments(parser, ROOT / "bench" / "results" / "quality.jsonl")
    args = parser.parse_args()
    if args.model is None:
        if not SHARED.is_dir():
            parser.error("name a MODEL and a TEXT; ../shared is absent")
        chosen = cases(list(TEXTS))
    elif not args.text:
        parser.error("TEXT must be given with MODEL")
    else:
        chosen = [(args.model.resolve().name, args.model, args.text)]
    results = Results(args, ("model", "text", "width", "format"))
    for name, folder, texts in chosen:
        reference, tokenizer = load(folder)
        reference = reference.float()
        remembered = Remembered(reference)
        windows = {path.name: read_windows(tokenizer, path, 256, args.limit) for path in texts}
        for width in args.bits:
            formats: list[tuple[str, str, Any]] = [(label, "precal", s) for label, s in precal_formats(width)]
            if not args.ours:
                formats += [*peers(width), *lab(width)]
            for label, source, how in formats:
                keys: list[Row] = [{"model": name, "text": text, "width": width, "format": label} for text in windows]
                if not results.wants(*keys):
                    continue
                model = copy.deepcopy(reference)
                bits, sqnr = quantize(model, how) if source == "precal" else apply(model, how)
                for key in keys:
                    figures = evaluate(model, windows[key["text"]], remembered).to_dict()
                    head = {**key, "source": source, "bits_per_weight": bits, "sqnr_db": sqnr}
                    results.put({**head, **figures, **facts("bench/quality.py")})
                    kld = f"{figures['kld_nats']:.4f}"
                    print(f"{name:18}{key['text']:20}{label:46}{bits:7.3f}{sqnr:7.2f}{kld:>9}", flush=True)
    results.drop_gone()


if __name__ == "__main__":
    main()
