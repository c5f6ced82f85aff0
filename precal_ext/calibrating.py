"""The options of ``quantize`` that calibrate, and what ``inspect`` shows of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from precal_ext.console import RefusedError

# Option -> field of calibrate.Calibration.
_FIELDS = {"calibration_windows": "windows", "window_length": "length", "damping": "damping"}


def add_options(parser: argparse.ArgumentParser, positive: Callable[[str], int]) -> None:
    """Add them to a parser; ``positive`` reads an integer >= 1."""
    group = parser.add_argument_group("calibration, for who has a text (docs/calibration.md)")
    group.add_argument("--calibrate", choices=("gptq",), help="choose codes by their effect on a text; needs --text")
    group.add_argument(
        "--calibration-windows", type=positive, metavar="N", help="parts of the text that are used (default 128)"
    )
    group.add_argument(
        "--window-length", type=positive, metavar="T", help="tokens of a part (default 2048, or what the model takes)"
    )
    group.add_argument("--damping", type=float, metavar="X", help="trust the text less: > 0 (default: see there)")


def prepared(args: argparse.Namespace, plan: Any) -> tuple[Any, Any]:
    """The plan, and the stage that calibrates, None without ``--calibrate``."""
    given = {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    if args.calibrate is None:
        for name in given:
            raise RefusedError(f"quantize: --{name.replace('_', '-')} must come with --calibrate gptq, got it alone")
        return plan, None
    if args.text is None:
        raise RefusedError("quantize: --calibrate must come with --text FILE, got no text")
    from precal_ext.calibrate import Calibration, calibrated

    fields = {_FIELDS[name]: value for name, value in given.items()}
    return calibrated(plan, Calibration(Path(args.text), method=args.calibrate, **fields))


def cost_lines(plan: Any, stage: Any) -> list[str]:
    """What calibration will cost, to print; nothing without a stage."""
    if stage is None:
        return []
    from precal_ext.calibrate import estimate_calibration
    from precal_ext.estimate import readable_size, readable_time

    cost, s = estimate_calibration(plan, stage), stage.settings
    return [
        f"calibration on {cost.tokens:,} tokens ({s['windows']} windows of {s['window_length']}): memory "
        f"{readable_size(cost.memory_bytes)} and disk {readable_size(cost.disk_bytes)} more, time about "
        f"{readable_time(cost.seconds)} more"
    ]


def cost_dict(plan: Any, stage: Any) -> dict[str, Any]:
    """The same as JSON."""
    if stage is None:
        return {}
    from precal_ext.calibrate import estimate_calibration

    return {"calibration": {**stage.settings, **estimate_calibration(plan, stage).to_dict()}}


def as_recorded(stored: Any) -> dict[str, Any]:
    """What the report of a directory says of its calibration, as JSON."""
    return {"calibration": stored.recorded.calibration} if stored.recorded and stored.recorded.calibration else {}


def recorded_lines(stored: Any) -> list[str]:
    """The same to print; the report is not trusted."""
    from precal_ext.survey import printable

    c = as_recorded(stored).get("calibration")
    if c is None:
        return []
    method, tokens, text, digest = (printable(str(c.get(k, "?"))) for k in ("method", "tokens", "text", "text_sha256"))
    return [f"calibrated by {method} on {tokens} tokens of {text} (SHA-256 {digest})"]
