"""The command ``plan``, and what ``quantize`` takes of it."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from precal_ext.console import EXIT_OK, RefusedError, positive, quiet_host, resolve_model

Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]
# Options that belong to the choice of bits: nothing without --target-bits.
_KNOBS = ("windows", "fit", "widths", "min_sqnr")
# What a plan's file has of its own, by the names of their options.
_SETTINGS = {
    "bits": "--bits", "recipe": "--recipe", "group_size": "--group-size", "c": "--outliers", "grid": "--grid",
    "trellis": "--trellis", "alpha": "--alpha", "lm_head": "--lm-head", "include": "--include", "exclude": "--exclude",
    "skip_nonfinite": "--skip-nonfinite", "config": "--config", "target_bits": "--target-bits",
}  # fmt: skip


def add_command(command: Command, settings: Callable[[Any], None], config: Callable[[argparse.Namespace], Any]) -> None:
    """Add ``plan`` to a parser; ``settings`` adds the options that ``config`` reads."""
    p = command("plan", lambda args: _plan(args, config), "choose bits, groups and outliers of every weight")
    p.add_argument("model", metavar="MODEL", help="directory with config.json and safetensors, or a hub name")
    p.add_argument("--out", metavar="FILE", help="write the plan here; it can be read, edited and applied")
    _choosing(p, required=True)
    p.add_argument("--no-forecast", action="store_true", help="do not predict the loss, which takes some 30 runs more")
    settings(p)
    p.add_argument("--tp", type=positive, default=1, metavar="N", help="every weight can be cut into N slices")
    p.add_argument("--quiet", action="store_true", help="no progress")
    p.add_argument("--json", action="store_true", help="print the plan as JSON")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What ``quantize`` takes."""
    parser.add_argument("--plan", metavar="FILE", help="settings of every weight, made by `precal plan`")
    _choosing(parser, required=False)


def _choosing(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_argument_group("choosing bits per weight under a budget")
    group.add_argument(
        "--target-bits", type=float, metavar="B", required=required, help="stored bits per weight, everything counted"
    )
    if required:  # ``quantize`` has it for other stages too
        group.add_argument("--text", metavar="FILE", help="fit on this text, or .jsonl, which weights mind errors most")
    group.add_argument("--fit", choices=("gradients", "noise"), help="how (default gradients; noise takes longer)")
    group.add_argument("--windows", type=positive, metavar="N", help="windows of the text that are used (default 16)")
    group.add_argument(
        "--widths", type=int, nargs="+", metavar="N", choices=range(2, 9),
        help="widths to choose among (default 3 4, which have fast kernels, and others where these cannot reach B)",
    )  # fmt: skip
    group.add_argument(
        "--min-sqnr", type=float, metavar="DB", help="refuse settings that leave a matrix less (default 9)"
    )


def plan_of(args: argparse.Namespace, model: Path, config: Any) -> Any:
    """The plan that ``quantize`` is to follow: the one of ``--plan``, one made for ``--target-bits``, or None.

    Raises:
        RefusedError: options that do not go together.
    """
    from precal_ext.budget import BitPlan

    if args.plan is not None:
        given = [option for name, option in _SETTINGS.items() if getattr(args, name) is not None]
        given += ["--" + name.replace("_", "-") for name in _KNOBS if getattr(args, name) is not None]
        if given:
            raise RefusedError(f"quantize: --plan must stand without {given[0]}, the plan has settings of its own")
        return BitPlan.load(args.plan)
    if args.target_bits is None:
        given = ["--" + name.replace("_", "-") for name in _KNOBS if getattr(args, name) is not None]
        if given:
            raise RefusedError(f"quantize: {given[0]} must stand with --target-bits, got none")
        return None
    return _make(args, model, config, None if args.overwrite else Path(args.out))


def _make(args: argparse.Namespace, model: Path, config: Any, begun: Path | None) -> Any:
    """A plan for ``--target-bits``; of an unfinished run of ``begun`` the one it had."""
    from precal_ext.planner import FITS, WINDOWS, Candidates, plan_begun, plan_bits, request_of

    for name in ("bits", "group_size", "c"):
        if getattr(args, name) is not None:
            raise RefusedError(f"{args.command}: --target-bits must stand without {_SETTINGS[name]}, which it chooses")
    if args.text is not None:
        quiet_host()
    known = {} if args.min_sqnr is None else {"min_sqnr_db": args.min_sqnr}
    within = Candidates(widths=None if args.widths is None else tuple(sorted(set(args.widths))), **known)
    windows, fit = args.windows or WINDOWS, args.fit or FITS[0]
    if begun is not None:
        request = request_of(args.target_bits, args.text, windows, fit, within, args.tp)
        found = plan_begun(begun, model, config, request)
        if found is not None:
            return found
    with _shown(args.quiet) as progress:
        return plan_bits(
            model, args.target_bits, config, text=args.text, windows=windows, fit=fit, within=within,
            tensor_parallel=args.tp, progress=progress,
        )  # fmt: skip


@contextmanager
def _shown(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A line at the start of each stage, about every five seconds, and at its end."""
    began: dict[str, float] = {}
    printed = -math.inf

    def show(what: str, done: int, total: int) -> None:
        nonlocal printed
        now = time.monotonic()
        first = what not in began
        started = began.setdefault(what, now)
        if not first and now - printed < 5 and done < total:
            return
        printed = now
        left = f", {(now - started) * (total - done) / (done - 1):.0f} s left" if done > 1 else ""
        unit = {"measured": "fusion sets", "fitted": "parts of the text", "forecast": "runs over the text"}[what]
        print(f"plan: {what} {done}/{total} {unit}{left}", file=sys.stderr, flush=True)

    yield None if quiet else show


def _plan(args: argparse.Namespace, config: Callable[[argparse.Namespace], Any]) -> int:
    settings = config(args)
    model = resolve_model(args.model)
    made = _make(args, model, settings, None)
    if args.out is not None:  # what comes takes longer
        made.save(args.out)
    if made.with_text and not args.no_forecast:
        from precal_ext.outlook import forecast_plan
        from precal_ext.planner import WINDOWS

        with _shown(args.quiet) as progress:
            made = forecast_plan(model, made, text=args.text, windows=args.windows or WINDOWS, progress=progress)
        if args.out is not None:
            made.save(args.out)
    if args.json:
        print(json.dumps(made.to_dict()))
        return EXIT_OK
    print("\n".join(lines(made)))
    if args.out is not None:
        print(f"written to {args.out}; apply it with: precal quantize {args.model} OUT --plan {args.out}")
    return EXIT_OK


def lines(plan: Any) -> list[str]:
    """The table of a plan: a line per set, then what it comes to."""
    from precal_ext.survey import natural, printable

    head = ("set", "weights", "bits", "group", "c", "bits/w", "SQNR dB", "minds", "cost")
    loss = plan.loss
    mean = math.fsum(s.sensitivity for s in plan.sets) / sum(s.weights for s in plan.sets)
    rows: list[Sequence[str]] = [head]
    for s in sorted(plan.sets, key=lambda s: natural(s.name)):
        o = s.chosen
        figures = ["-", "-", "-"]
        if o is not None:
            sqnr = f"{o.sqnr_db:.2f}" if o.error else "exact"
            figures = [f"{o.bits_per_weight:.3f}", sqnr, f"{o.loss / loss:.1%}" if loss > 0 else "-"]
        minds = f"{s.sensitivity / s.weights / mean:.2f}" if mean else "-"
        choice = [str(s.choice.bits), str(s.choice.group_size), str(s.choice.c)]
        rows.append([printable(s.name), f"{s.weights:,}", *choice, *figures[:2], minds, figures[2]])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    table = []
    for row in rows:
        cells = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        table.append("  ".join(cells))
    e = plan.estimate
    size = (
        f"{e['bits_per_weight']:.4f} of {plan.target_bits:g} bits per weight; files {e['disk_bytes'] / 1e6:.1f} MB, "
        f"memory at most {e['memory_bytes'] / 1e6:.0f} MB, time about {max(1, round(e['seconds']))} s"
    )
    unit = "nats per token of KLD" if plan.with_text else "relative squared error, all weights counting the same"
    foreseen = [] if plan.forecast is None else plan.forecast.lines()
    return [*table, size, f"predicted: {loss:.4g} {unit}", *foreseen]
