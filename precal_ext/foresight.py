"""The command ``predict``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from precal_ext.console import EXIT_OK, RefusedError, positive, quiet_host, resolve_model

if TYPE_CHECKING:
    from precal_ext.predict import Prediction

DEFAULT_FORMATS = (
    "precal3_g64,precal4_g64,precal4_g128,precal6_g64,rtn4_g128,mxfp4,mxint3_32,mxint4_32,mxint4_128,mxint6_32,"
    "mxint3_32+gptq,mxint4_32+gptq,mxint4_128+gptq"
)
DEFAULT_WINDOWS = 12  # what the predictor was fitted on
Command = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_predict(command: Command) -> None:
    """Add it to a parser; ``command`` makes one of its subcommands."""
    p = command("predict", _predict, "the loss that a model will have in each of many formats, without making them")
    p.add_argument("model", metavar="MODEL", help="directory with config.json and safetensors, or a hub name")
    p.add_argument("--text", metavar="FILE", help='text file, or .jsonl with a "text" field; without it: SQNR and size')
    p.add_argument(
        "--formats",
        default=DEFAULT_FORMATS,
        metavar="LIST",
        help="names with commas between: mxint4_128, mxint4_128+gptq, mxfp4, precal4_g64, rtn4_g128 (default: some)",
    )
    p.add_argument("--window", type=positive, default=256, metavar="N", help="tokens per window (default 256)")
    p.add_argument(
        "--limit",
        type=positive,
        default=DEFAULT_WINDOWS,
        metavar="N",
        help=f"use at most N windows (default {DEFAULT_WINDOWS})",
    )
    p.add_argument("--plot", metavar="FILE", help="draw size against loss, or SQNR, as .png, .svg or .pdf")
    p.add_argument("--json", action="store_true", help="print the predictions as JSON")


def _predict(args: argparse.Namespace) -> int:
    from precal_ext import evaluate as ev
    from precal_ext.formats import parse_format
    from precal_ext.predict import predict

    formats = [parse_format(name) for name in dict.fromkeys(filter(None, args.formats.split(",")))]
    if not formats:
        raise RefusedError("predict: --formats must name a format, got none")
    pyplot = None if args.plot is None else _pyplot(Path(args.plot))
    quiet_host()
    folder = resolve_model(args.model)
    if args.text is None:
        found = predict(ev.load_model(folder), formats)
    else:
        model, tokenizer = ev.load(folder)
        found = predict(model, formats, ev.read_windows(tokenizer, Path(args.text), args.window, args.limit))
    if pyplot is not None:
        draw(pyplot, found, Path(args.plot))
    if args.json:
        print(json.dumps({"model": args.model, "text": args.text, "predictions": [_finite(p) for p in found]}))
    else:
        print("\n".join(table(found)))
    return EXIT_OK


def _finite(p: Prediction) -> dict[str, Any]:
    """As JSON, which has no infinity: the SQNR of an exact weight is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in p.to_dict().items()}


def table(found: Sequence[Prediction]) -> list[str]:
    """The smallest first; a star marks the Pareto frontier."""
    known = found[0].nll_nats is not None
    width = max(len("format"), *(len(p.format) for p in found))
    head = f"  {'format':{width}} {'bits/w':>7} {'MB':>9} {'SQNR dB':>8} {'least':>7}"
    lines = [head + (f" {'NLL':>8}  {'90 % interval':17} {'rise':>8}" if known else "")]
    for p in sorted(found, key=lambda p: (p.size_bytes, p.format)):
        mark = "*" if p.frontier else " "
        line = f"{mark} {p.format:{width}} {p.bits_per_weight:7.3f} {p.size_bytes / 1e6:9.2f}"
        line += f" {p.sqnr_mean_db:8.2f} {p.sqnr_min_db:7.2f}"
        if p.nll_nats is not None:
            line += f" {p.nll_nats:8.4f}  {p.low_nats:7.4f} - {p.high_nats:7.4f} {p.delta_nll_nats:+8.4f}"
            line += "  beyond the fit" if p.outside else ""
        lines.append(line)
    better = "predicted NLL (nats per token)" if known else "mean SQNR"
    lines.append(f"* no other of these is at most as large and has a better {better}")
    outside = sorted({name for p in found for name in p.outside})
    if outside:
        lines.append(f"beyond what the predictor was fitted on, so intervals are wider: {', '.join(outside)}")
    if not known:
        lines.append(
            "no text: weights alone tell SQNR and size, which do not say what the loss will be; add --text FILE"
        )
        if any(p.format.endswith("+gptq") for p in found):
            lines.append("SQNR of a format with +gptq is that of round-to-nearest: GPTQ lowers the loss, not the error")
    return lines


def _pyplot(path: Path) -> Any:
    """matplotlib's, before any work is done; without a window."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise RefusedError(f"predict: --plot must be a file that ends in .png, .svg or .pdf, got {path}")
    try:
        import matplotlib
    except ImportError:
        raise RefusedError("predict: --plot needs matplotlib; pip install 'precal[predict]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(pyplot: Any, found: Sequence[Prediction], path: Path) -> None:
    """Size against predicted loss with its interval, or against SQNR, and the frontier."""
    known = found[0].nll_nats is not None
    ordered = sorted(found, key=lambda p: p.size_bytes)

    def height(p: Prediction) -> float:
        return p.sqnr_mean_db if p.nll_nats is None else p.nll_nats

    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "precal"}):
        figure, axis = pyplot.subplots(figsize=(8, 5))
        for p in ordered:
            x, y = p.size_bytes / 1e6, height(p)
            colour = "#1f6f8b" if p.frontier else "#9a9a9a"
            if p.nll_nats is not None and p.low_nats is not None and p.high_nats is not None:
                axis.plot([x, x], [p.low_nats, p.high_nats], color=colour, linewidth=1, alpha=0.6)
            axis.plot([x], [y], "o", color=colour)
            axis.annotate(p.format, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8, color=colour)
        best = [p for p in ordered if p.frontier]
        axis.plot([p.size_bytes / 1e6 for p in best], [height(p) for p in best], color="#1f6f8b", linewidth=1.2)
        axis.set_xlabel("size of the model, MB")
        axis.set_ylabel("predicted NLL, nats per token, and its 90 % interval" if known else "mean SQNR, dB")
        figure.tight_layout()
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
