"""The commands ``import`` and ``export``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from precal_ext.console import EXIT_OK, resolve_model, shown_progress, size_of, trimming

MOST_SHOWN = 20  # weights; the report has all
Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_commands(command: Command) -> None:
    """Add them to a parser; ``command`` makes one of its subcommands."""
    i = command("import", _import, "a model that GPTQ, AWQ or compressed-tensors quantized, with its codes as they are")
    i.add_argument("model", metavar="DIR", help="directory with config.json and safetensors, or a hub name")
    i.add_argument("out", metavar="OUT", help="new directory for the model")
    i.add_argument("--widen", action="store_true", help="store asymmetric weights exactly, with codes of 8 bits")
    i.add_argument(
        "--requantize",
        action="store_true",
        help="quantize weights again that have no exact form here (asymmetric, desc_act); the report says what is lost",
    )
    e = command("export", _export, "a quantized directory in a format that needs no precal to load")
    e.add_argument("model", metavar="DIR", help="directory written by precal")
    e.add_argument("out", metavar="OUT", help="new directory for the model")
    e.add_argument(
        "--format",
        choices=("compressed-tensors", "bf16", "fp16", "fp32"),
        default="compressed-tensors",
        help="compressed-tensors (default; uniform grid, no outliers), or dense weights of 16 or 32 bits",
    )
    e.add_argument("--original", metavar="MODEL", help="quantize this model's weights, not those of DIR again")
    e.add_argument("--group-size", type=int, metavar="N", help="weights that share a scale; -1: a row (default: DIR's)")
    e.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="of the scales (default: that of the model)"
    )
    for sub in (i, e):
        sub.add_argument("--overwrite", action="store_true", help="replace OUT, and forget an unfinished run")
        sub.add_argument(
            "--max-shard-size", type=size_of, metavar="SIZE", help="bytes of a file of weights, as 5GB (default 50GB)"
        )
        sub.add_argument("--quiet", action="store_true", help="no progress")
        sub.add_argument("--json", action="store_true", help="print the summary as JSON")


def _print(args: argparse.Namespace, report: Any, lines: list[str]) -> int:
    from precal_ext.survey import printable

    if args.json:
        print(json.dumps({"out": args.out, "seconds": report.seconds, "notes": report.notes, **report.summary()}))
        return EXIT_OK
    print("\n".join(lines))
    print(f"weight files: {report.bytes_after / 1e6:.1f} MB, in {args.out}, after {report.seconds:.1f} s")
    for note in report.notes[1:]:
        print("note: " + printable(note))
    return EXIT_OK


def _sqnr(what: Any) -> str:
    return "exact" if what.sqnr_db == math.inf else f"SQNR {what.sqnr_db:.2f} dB"


def _losses(entries: list[Any]) -> list[str]:
    """The worst first."""
    from precal_ext.survey import printable

    worst = sorted(entries, key=lambda e: e.figures.sqnr_db)[:MOST_SHOWN]
    shown = [f"    {printable(e.tensor)}: {_sqnr(e.figures)}, {e.reason}" for e in worst]
    return shown + ([f"    and {len(entries) - MOST_SHOWN} more, in the report"] if len(entries) > MOST_SHOWN else [])


def _import(args: argparse.Namespace) -> int:
    from precal_ext.checkpoint import MAX_SHARD_BYTES
    from precal_ext.importing import WIDENED, import_checkpoint, requantized

    with shown_progress(args.quiet, trimming()) as progress:
        report = import_checkpoint(
            resolve_model(args.model),
            Path(args.out),
            widen=args.widen,
            requantize=args.requantize,
            overwrite=args.overwrite,
            max_shard_bytes=args.max_shard_size or MAX_SHARD_BYTES,
            progress=progress,
        )
    again = requantized(report)
    kept = len(report.quantized) - len(again)
    wide = sum(e.reason == WIDENED for e in report.quantized)
    lines = [f"{kept - wide} weights with the codes they had, {report.bits_per_weight:.3f} bits per weight in all"]
    if wide:
        lines.append(f"{wide} weights kept exactly with codes of 8 bits")
    if again:
        lines += [f"{len(again)} weights quantized again, against what they were:", *_losses(again)]
    return _print(args, report, lines)


def _export(args: argparse.Namespace) -> int:
    from precal_ext.checkpoint import MAX_SHARD_BYTES
    from precal_ext.exporting import export_checkpoint

    with shown_progress(args.quiet, trimming()) as progress:
        report = export_checkpoint(
            args.model,
            args.out,
            args.format,
            original=None if args.original is None else resolve_model(args.original),
            group_size=args.group_size,
            dtype=args.dtype,
            overwrite=args.overwrite,
            max_shard_bytes=args.max_shard_size or MAX_SHARD_BYTES,
            progress=progress,
        )
    against = "the original" if args.original is not None else args.model
    lines = [
        f"{len(report.quantized)} weights as {args.format}, {report.bits_per_weight:.3f} bits per weight, "
        f"{_sqnr(report)} against {against}:",
        *_losses(report.quantized),
    ]
    return _print(args, report, lines)
