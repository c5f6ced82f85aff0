"""The command ``compensate``, and what ``quantize --compensate`` does after quantizing."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from precal_ext.console import EXIT_OK, RefusedError, quiet_host, resolve_model

SPACES, CRITERIA = ("gradient", "svd", "random", "afm"), ("kld", "perplexity")
Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_command(command: Command) -> None:
    """Add it to a parser; ``command`` makes one of its subcommands."""
    c = command("compensate", _compensate, "change codes of a quantized directory so that its loss on a text falls")
    c.add_argument("model", metavar="DIR", help="directory written by precal")
    c.add_argument("out", metavar="OUT", nargs="?", help="new directory (default: DIR-compensated)")
    c.add_argument("--text", required=True, metavar="FILE", help='text file, or .jsonl with a "text" field')
    c.add_argument("--reference", metavar="MODEL", help="model it was made from (default: the one its README names)")
    c.add_argument("--space", choices=SPACES, default="gradient", help=f"of the candidates (default {SPACES[0]})")
    c.add_argument("--criterion", choices=CRITERIA, default="kld", help=f"what must fall (default {CRITERIA[0]})")
    c.add_argument("--interval", type=_count, metavar="N", help="dimensions between candidates (default: an eighth)")
    c.add_argument(
        "--gain", type=_gains, dest="gains", metavar="G,...", help="factors tried (1,2,4; gradient 1,.5,.2,.1)"
    )
    c.add_argument("--rounds", type=_count, metavar="N", help="times that a block is searched (1; gradient 4)")
    c.add_argument("--samples", type=_count, metavar="N", help="windows of text to search on")
    c.add_argument("--window", type=_count, metavar="N", help="tokens per window")
    c.add_argument("--held-out", type=int, metavar="N", help="windows to check on (default: a quarter of the samples)")
    c.add_argument("--skip-blocks", type=int, metavar="N", help="blocks at the beginning to leave alone (default 0)")
    c.add_argument(
        "--patience", type=_count, metavar="N", help="refused blocks in a row after which to stop (default 2)"
    )
    c.add_argument("--seed", type=int, metavar="N", help="default 0")
    c.add_argument("--in-place", action="store_true", help="replace DIR itself")
    c.add_argument("--overwrite", action="store_true", help="replace OUT, and forget an unfinished run")
    c.add_argument("--quiet", action="store_true", help="no progress")
    c.add_argument("--json", action="store_true", help="print the result as JSON")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of ``quantize``."""
    group = parser.add_argument_group("codes changed afterwards (see precal compensate)")
    group.add_argument("--compensate", action="store_true", help="compensate OUT with the defaults; needs --text")


def _count(text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be an integer, at least 1, got {text!r}")
    return int(text)


def _gains(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < g <= 1e6 for g in found):
        raise argparse.ArgumentTypeError(f"must be positive numbers, as 1,2,4, got {text!r}")
    return found


def _compensate(args: argparse.Namespace) -> int:
    if args.in_place and args.out is not None:
        raise RefusedError(f"compensate: OUT must be left out with --in-place, got {args.out}")
    folder = Path(args.model)
    out = None if args.in_place else Path(args.out or f"{str(folder).rstrip('/')}-compensated")
    names = ("space", "criterion", "interval", "gains", "rounds", "samples", "window", "held_out", "skip_blocks")
    fields = {n: getattr(args, n) for n in (*names, "patience", "seed") if getattr(args, n) is not None}
    return run(folder, out, args.text, fields, args)


def check_quantize(args: argparse.Namespace) -> None:
    """Raises RefusedError: the options of ``quantize`` do not fit together."""
    if args.compensate and args.text is None:
        raise RefusedError("quantize: --compensate must come with --text FILE, got none")
    if args.compensate and not Path(args.text).is_file():
        raise RefusedError(f"{args.text}: must be a readable UTF-8 text file, got none there")


def after_quantize(args: argparse.Namespace) -> int:
    """Compensate what ``quantize`` wrote, or continue where that was interrupted."""
    args.reference = args.model
    return run(Path(args.out), None, args.text, {}, args)


def is_unfinished(args: argparse.Namespace) -> bool:
    """Whether ``quantize --compensate`` has quantized already, and was interrupted later."""
    from precal_ext.compensating import unfinished

    return bool(args.compensate) and not args.overwrite and Path(args.out).is_dir() and unfinished(Path(args.out))


def run(folder: Path, out: Path | None, text: str, fields: dict[str, Any], args: argparse.Namespace) -> int:
    from precal_ext.compensate import CompensateConfig
    from precal_ext.compensating import compensate_checkpoint
    from precal_ext.staging import folder_of

    quiet_host()
    config = CompensateConfig(**fields)
    reference = None if args.reference is None else resolve_model(args.reference)
    target = folder if out is None else out
    try:
        result = compensate_checkpoint(
            folder,
            out,
            text,
            config,
            reference=reference,
            overwrite=args.overwrite,
            progress=None if args.quiet else _Display(config.criterion),
        )
    except (KeyboardInterrupt, SystemExit, OSError):
        if folder_of(target).exists():
            print(f"precal: what is finished lies in {folder_of(target)}; the same command continues", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps({"out": str(target), "seconds": result.seconds, **result.to_dict()}))
        return EXIT_OK
    unit = "KLD" if config.criterion == "kld" else "NLL"
    print(f"{unit} on {result.tokens} tokens: {result.before:.5f} -> {result.after:.5f} nats per token")
    if result.held_out_before is not None:
        print(
            f"{unit} on {result.held_out_tokens} held-out tokens: {result.held_out_before:.5f} -> "
            f"{result.held_out_after:.5f} nats per token"
        )
    codes = sum(change.codes for change in result.changes)
    changed = sum(bool(block.changes) for block in result.blocks)
    print(f"{codes:,} codes changed in {changed} of {len(result.blocks)} blocks, in {result.seconds:.1f} s: {target}")
    if result.stopped is not None:
        print(f"stopped after {result.stopped}: changes raised the loss on the held-out text")
    return EXIT_OK


class _Display:
    """A line for every block."""

    def __init__(self, criterion: str) -> None:
        self._unit = "KLD" if criterion == "kld" else "NLL"
        self._started = time.monotonic()
        self._first: int | None = None

    def __call__(self, p: Any) -> None:
        if self._first is None:
            self._first = p.done - 1
        left = (time.monotonic() - self._started) / (p.done - self._first) * (p.blocks - p.done)
        changes = p.result.changes
        if changes:
            last = changes[-1]
            found = f"{self._unit} {changes[0].before:.5f} -> {last.after:.5f}"
            if last.held_out_after is not None:
                found += f", held out {changes[0].held_out_before:.5f} -> {last.held_out_after:.5f}"
        else:
            found = "held-out text says no" if p.result.refused else "nothing better found"
        print(f"{p.done}/{p.blocks} {p.result.block}: {found}; {left:.0f} s left", file=sys.stderr, flush=True)
