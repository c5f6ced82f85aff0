"""The ``precal`` command.

Exit codes: 0 done; 1 failed for a reason of its own (a traceback follows); 2 wrong usage; 3 the input or output was
refused, with the reason on stderr; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from precal_ext import calibrating, planning, recycling
from precal_ext._version import __version__
from precal_ext.console import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_REFUSED,
    EXIT_TERMINATED,
    RefusedError,
    quiet_host,
    resolve_model,
    shown_progress,
    size_of,
    trimming,
)
from precal_ext.console import positive as _positive
from precal_ext.foresight import add_predict
from precal_ext.interchange import add_commands

EPILOG = "exit codes: 0 done, 1 failed, 2 wrong usage, 3 input or output refused, 130 interrupted, 143 terminated"
MOST_SHOWN = 20  # messages of verify; --json has all
INSPECT_COLUMNS = ("tensor", "shape", "bits", "group", "c", "alpha", "sqnr", "kl", "bpw")
DEMO = Path(__file__).resolve().parents[1] / "demo"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="precal", description="4- and 3-bit weights for Hugging Face language models, without data.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"precal {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=EPILOG)
        sub.set_defaults(run=run)
        return sub

    q = command("quantize", _quantize, "quantize a model directory or hub name without data")
    q.add_argument("model", metavar="MODEL", help="directory with config.json and safetensors, or a hub name")
    q.add_argument("out", metavar="OUT", help="new directory for the quantized model")
    q.add_argument(
        "--text", metavar="FILE", help="text file, or .jsonl, for --target-bits, --calibrate and --compensate alone"
    )
    planning.add_options(q)
    _config_options(q)
    calibrating.add_options(q, _positive)
    recycling.add_options(q)
    q.add_argument("--overwrite", action="store_true", help="replace OUT, and forget an unfinished run")
    q.add_argument(
        "--max-shard-size", type=size_of, metavar="SIZE", help="bytes of a file of weights, as 5GB (default 50GB)"
    )
    q.add_argument(
        "--tp", type=_positive, default=1, metavar="N", help="make groups small enough for N tensor-parallel slices"
    )
    q.add_argument("--dry-run", action="store_true", help="print what would be done to each tensor, and stop")
    q.add_argument("--quiet", action="store_true", help="no progress")
    q.add_argument("--json", action="store_true", help="print the summary as JSON")

    e = command("eval", _eval, "perplexity of a model on a text, and how far it is from a reference")
    e.add_argument("model", metavar="DIR", help="model directory, quantized or not")
    e.add_argument("--text", required=True, metavar="FILE", help='text file, or .jsonl with a "text" field')
    e.add_argument("--reference", metavar="MODEL", help="report KLD and top-1 agreement with this model")
    e.add_argument("--window", type=_positive, default=256, metavar="N", help="tokens per window (default 256)")
    e.add_argument("--limit", type=_positive, metavar="N", help="use at most N windows")
    e.add_argument("--json", action="store_true", help="print the figures as JSON")

    g = command("generate", _generate, "continue a prompt")
    g.add_argument("model", metavar="DIR", help="model directory, quantized or not")
    g.add_argument("prompt", metavar="PROMPT")
    g.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default 64")
    g.add_argument("--temperature", type=_not_negative, default=0.0, metavar="T", help="0 (default) is greedy")
    g.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    g.add_argument("--json", action="store_true", help="print text and speed as JSON")

    b = command("bench", _bench, "tokens per second of a quantized directory beside its original, and where they go")
    b.add_argument("model", metavar="DIR", help="directory written by precal")
    b.add_argument("--original", metavar="MODEL", help="model it was made from, measured in the same rounds")
    b.add_argument("--tokens", type=_positive, default=32, metavar="N", help="written one by one (default 32)")
    b.add_argument("--prompt-length", type=_positive, default=512, metavar="N", help="tokens before (default 512)")
    b.add_argument("--rounds", type=_positive, default=5, metavar="N", help="turns of each model (default 5)")
    b.add_argument("--threads", type=_positive, metavar="N", help="default: all that this process may use")
    b.add_argument("--activations", choices=("f32", "a16", "a8"), default="a16", help="of the quantized layers (a16)")
    b.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of everything else and of MODEL (default: bfloat16 where the CPU has it, else float32)",
    )
    b.add_argument("--json", action="store_true", help="print the figures as JSON")

    d = command("demo", _demo, "quantize a model to 4 and 3 bits and compare: size, loss, speed, text")
    d.add_argument("model", metavar="MODEL", nargs="?", help="model directory (default: the embedded one)")
    d.add_argument("--text", metavar="FILE", help="text to measure on (default: the embedded one)")
    d.add_argument("--prompt", default="The old man looked at the sea, and", metavar="TEXT", help="prompt to continue")
    d.add_argument("--out", metavar="DIR", help="keep the quantized models here")

    v = command("verify", _verify, "check a quantized directory: is it whole, consistent, and its original's")
    v.add_argument("model", metavar="DIR", help="directory written by precal")
    v.add_argument("--original", metavar="MODEL", help="model it was made from: compare a sample of every weight")
    v.add_argument("--json", action="store_true", help="print everything that was found as JSON")

    i = command("inspect", _inspect, "a table of the quantized weights of a directory, with figures")
    i.add_argument("model", metavar="DIR", help="directory written by precal")
    i.add_argument("--original", metavar="MODEL", help="measure SQNR and KL against this model (default: as recorded)")
    i.add_argument("--sort", metavar="COLUMN", default="tensor", choices=INSPECT_COLUMNS, help=_one_of(INSPECT_COLUMNS))
    i.add_argument("--reverse", action="store_true", help="largest first")
    i.add_argument("--json", action="store_true", help="print the table as JSON")

    r = command("report", _report, "a page about a quantized directory, in one file without references to others")
    r.add_argument("model", metavar="DIR", help="directory written by precal")
    r.add_argument("--html", required=True, metavar="FILE", help="where to write the page; must end in .html")
    r.add_argument("--original", metavar="MODEL", help="model it was made from: its weights in the histograms")
    r.add_argument("--text", metavar="FILE", help='also measure the loss on this text, or .jsonl with a "text" field')
    r.add_argument("--limit", type=_positive, metavar="N", help="use at most N windows of the text")
    add_commands(command)
    planning.add_command(command, _config_options, _config)
    recycling.add_command(command)
    add_predict(command)
    return parser


def _config_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings (defaults are those of the recipe)")
    group.add_argument("--bits", type=int, metavar="N", help="bits of a weight, 2 to 8 (default 4)")
    group.add_argument("--recipe", choices=("precal", "paper", "rtn"), help="method (default precal)")
    group.add_argument("--group-size", type=int, metavar="N", help="weights that share a scale; -1: a row (default 64)")
    group.add_argument(
        "--outliers", type=int, metavar="C", dest="c", help="outliers per 256 weights, 16 bits each (default 1)"
    )
    group.add_argument("--grid", choices=("fitted", "constant", "uniform"), help="levels (default fitted)")
    group.add_argument(
        "--trellis", action=argparse.BooleanOptionalAction, help="twice the levels at no bits (default on up to 6 bits)"
    )
    group.add_argument(
        "--alpha", type=float, metavar="SHARE", help="paper recipe: share of salient weights (default 0.05)"
    )
    group.add_argument(
        "--lm-head", type=int, metavar="N", help="bits of the output head, 8 or 4 (default: left as it is)"
    )
    group.add_argument("--include", action="append", metavar="REGEX", help="quantize these modules too; repeatable")
    group.add_argument("--exclude", action="append", metavar="REGEX", help="leave these modules alone; repeatable")
    group.add_argument(
        "--skip-nonfinite",
        action="store_const",
        const=True,
        help="keep weights with NaN or infinities as they are, instead of refusing the model",
    )
    group.add_argument("--config", metavar="FILE", help="settings as JSON; options override it")


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)} (default {names[0]})"


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text!r}")
    return value


def _config(args: argparse.Namespace) -> Any:
    from precal_ext.config import QuantizeConfig

    fields: dict[str, Any] = {}
    if args.config is not None:
        path = Path(args.config)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RefusedError(f"{path}: must be a JSON file with settings, got: {error}") from None
        if not isinstance(fields, dict):
            raise RefusedError(f"{path}: must hold a JSON object, got {type(fields).__name__}")
    names = "bits recipe group_size c grid trellis alpha lm_head include exclude skip_nonfinite"
    for name in names.split():
        value = getattr(args, name)
        if value is not None:
            fields[name] = value
    return QuantizeConfig.from_dict(fields)


def _quantize(args: argparse.Namespace) -> int:
    from precal_ext import ranks
    from precal_ext.convert import run_share

    if args.text is not None and args.target_bits is None and args.calibrate is None and not args.compensate:
        raise RefusedError("quantize: --text must come with --target-bits, --calibrate or --compensate, got it alone")
    recycling.check_quantize(args)
    if not recycling.is_unfinished(args):
        trim = trimming()
        code = ranks.together(
            lambda team: _quantize_as_leader(args, trim, team), lambda team: run_share(args.model, team, trim)
        )
        if code != EXIT_OK or args.dry_run or not args.compensate or os.environ.get("RANK", "0") != "0":
            return code
    return recycling.after_quantize(args)


def _quantize_as_leader(args: argparse.Namespace, trim: Callable[[int], None], team: Any) -> int:
    from precal_ext import estimate
    from precal_ext.budget import plan_as_chosen
    from precal_ext.checkpoint import MAX_SHARD_BYTES
    from precal_ext.convert import EXPERTS_NOTE, load_lines, plan_quantization, run_plan
    from precal_ext.staging import folder_of

    processes = 1 if team is None else team.size
    config, model = _config(args), resolve_model(args.model)
    how = {"max_shard_bytes": args.max_shard_size or MAX_SHARD_BYTES, "tensor_parallel": args.tp}
    chosen = planning.plan_of(args, model, config)
    if chosen is None:
        plan = plan_quantization(model, args.out, config, **how)
    else:
        plan = plan_as_chosen(model, args.out, chosen, **how)
    plan, stage = calibrating.prepared(args, plan)
    if args.dry_run:
        cost = estimate.estimate(plan, processes)
        if args.json:
            print(json.dumps({**estimate.to_dict(plan, cost), **calibrating.cost_dict(plan, stage)}))
        else:
            print("\n".join([*estimate.table(plan), *cost.lines(), *calibrating.cost_lines(plan, stage)]))
        return EXIT_OK

    def announce() -> None:
        try:
            lines = estimate.estimate(plan, processes).lines() + calibrating.cost_lines(plan, stage)
            print("\n".join(lines), flush=True)
        except BrokenPipeError:  # nobody reads; the model is wanted all the same
            _close_stdout()

    try:
        with shown_progress(args.quiet, trim) as progress:
            report = run_plan(
                plan,
                overwrite=args.overwrite,
                progress=progress,
                announce=None if args.json or args.quiet else announce,
                team=team,
                stage=stage,
            )
    except (KeyboardInterrupt, SystemExit, OSError):
        if plan.recorded():
            again = "the same command without --overwrite" if args.overwrite else "the same command"
            print(f"precal: what is finished lies in {folder_of(plan.out)}; {again} continues", file=sys.stderr)
        raise
    if args.json:
        print(json.dumps({"out": args.out, "seconds": report.seconds, **report.summary()}))
        return EXIT_OK
    kept = {name: why for name, why in report.left_alone().items() if why != EXPERTS_NOTE}
    print(
        f"{len(report.quantized)} of {len(report.entries)} tensors quantized in {report.seconds:.1f} s: "
        f"{report.bits_per_weight:.3f} bits per weight, SQNR {report.sqnr_db:.2f} dB, KL {report.kl_nats:.4f} nats"
    )
    print(f"weight files: {report.bytes_before / 1e6:.1f} MB -> {report.bytes_after / 1e6:.1f} MB, in {args.out}")
    for note in report.notes[1:]:
        print("note: " + note)
    if kept:
        print("left alone: " + ", ".join(f"{name.removesuffix('.weight')} ({why})" for name, why in kept.items()))
    print("load it with:")
    for line in load_lines(args.out):
        print("    " + line)
    return EXIT_OK


def _error(stderr: float | None, digits: int) -> str:
    return "" if stderr is None else f" +/- {stderr:.{digits}f}"


def _eval(args: argparse.Namespace) -> int:
    from precal_ext import evaluate as ev

    quiet_host()
    model, tokenizer = ev.load(args.model)
    reference = None
    if args.reference is not None:
        reference, other = ev.load(args.reference)
        if other.get_vocab() != tokenizer.get_vocab():
            raise RefusedError(f"{args.reference}: must have the tokenizer of {args.model}, got another vocabulary")
    windows = ev.read_windows(tokenizer, Path(args.text), args.window, args.limit)
    result = ev.evaluate(model, windows, reference)
    if args.json:
        print(json.dumps(result.to_dict()))
        return EXIT_OK
    nll = f"NLL {result.nll_nats:.4f}{_error(result.nll_stderr, 4)} nats, {result.tokens} tokens"
    print(f"perplexity {result.perplexity:.4f}  ({nll})")
    if result.kld_nats is not None:
        print(f"KLD        {result.kld_nats:.5f}{_error(result.kld_stderr, 5)} nats per token from {args.reference}")
        print(f"top-1      {result.top1:.2%} agreement")
    return EXIT_OK


def _generate(args: argparse.Namespace) -> int:
    from precal_ext import evaluate as ev

    quiet_host()
    model, tokenizer = ev.load(args.model)
    result = ev.generate(model, tokenizer, args.prompt, args.max_new_tokens, args.temperature, args.seed)
    if args.json:
        print(
            json.dumps(
                {"text": result.text, "new_tokens": result.new_tokens, "tokens_per_second": result.tokens_per_second}
            )
        )
    else:
        print(result.text)
        print(f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} per second", file=sys.stderr)
    return EXIT_OK


def _bench(args: argparse.Namespace) -> int:
    from precal_ext import bench

    speed = bench.bench(
        args.model,
        None if args.original is None else resolve_model(args.original),
        tokens=args.tokens,
        prompt_length=args.prompt_length,
        rounds=args.rounds,
        threads=args.threads,
        activations=args.activations,
        dtype=args.dtype,
    )
    print(json.dumps(speed.to_dict()) if args.json else "\n".join(bench.lines(speed)))
    return EXIT_OK


def _demo(args: argparse.Namespace) -> int:
    from precal_ext import evaluate as ev
    from precal_ext.config import QuantizeConfig
    from precal_ext.convert import quantize_checkpoint

    quiet_host()
    if args.model is None and not (DEMO / "llama-6m").is_dir():
        raise RefusedError("demo: MODEL must be given, the embedded one comes with the source tree only")
    model = DEMO / "llama-6m" if args.model is None else resolve_model(args.model)
    text = DEMO / "text.txt" if args.text is None else Path(args.text)
    if not text.is_file():
        raise RefusedError(f"{text}: must be a text file to measure on, got none; give --text FILE")
    with tempfile.TemporaryDirectory(prefix="precal-demo-") as scratch:
        folder = Path(args.out) if args.out is not None else Path(scratch)
        reference, tokenizer = ev.load(model)
        windows = ev.read_windows(tokenizer, text, ev.DEFAULT_WINDOW)
        base_bits = 8.0 * next(reference.parameters()).element_size()
        print(f"{model.name}: {sum(p.numel() for p in reference.parameters()):,} parameters, measured on {text.name}\n")
        print(f"{'':10}{'weights':>10}{'bits/w':>8}{'SQNR dB':>9}{'perplexity':>12}", end="")
        print(f"{'KLD nats':>10}{'top-1':>8}{'tokens/s':>10}")
        texts = []

        def line(name: str, size: int, bits: float, sqnr: str, loaded: Any) -> None:
            result = ev.evaluate(loaded, windows, None if loaded is reference else reference)
            ev.generate(loaded, tokenizer, args.prompt, 4)  # warm up
            written = ev.generate(loaded, tokenizer, args.prompt, 48)
            texts.append((name, written.text))
            kld = "-" if result.kld_nats is None else f"{result.kld_nats:.4f}"
            top1 = "-" if result.top1 is None else f"{result.top1:.1%}"
            print(
                f"{name:10}{size / 1e6:>7.2f} MB{bits:>8.3f}{sqnr:>9}{result.perplexity:>12.3f}{kld:>10}{top1:>8}"
                f"{written.tokens_per_second:>10.1f}",
                flush=True,
            )

        size = sum(p.stat().st_size for p in model.glob("*.safetensors"))
        line("original", size, base_bits, "-", reference)
        for bits in (4, 3):
            out = folder / f"{model.name}-{bits}bit"
            report = quantize_checkpoint(model, out, QuantizeConfig(bits=bits), overwrite=True)
            quantized, _ = ev.load(out)
            line(f"{bits} bits", report.bytes_after, report.bits_per_weight, f"{report.sqnr_db:.2f}", quantized)
    print("\nbits/w: of the quantized weights, everything counted; embeddings stay as they are")
    for name, written_text in texts:
        print(f"\n--- {name}\n{written_text}")
    return EXIT_OK


# ---- knowing what you have: verify, inspect, report -----------------------------------------------------------------


def _verify(args: argparse.Namespace) -> int:
    from precal_ext.survey import printable
    from precal_ext.verify import verify

    quiet_host()
    original = None if args.original is None else resolve_model(args.original)
    result = verify(Path(args.model), original)
    code = EXIT_OK if result.sound else EXIT_REFUSED
    if args.json:
        print(json.dumps(result.to_dict()))
        return code
    for check in result.checks:
        mark = "-" if check.passed is None else "ok" if check.passed else "FAILED"
        print(f"{check.name:9} {mark:7} {printable(check.detail)}")
    if result.tensor_parallel:
        fits = [str(size) for size, why in result.tensor_parallel.items() if not why]
        print(f"{'parallel':9} {'':7} tensor-parallel sizes up to {max(result.tensor_parallel)}: {', '.join(fits)}")
        size, why = next(((s, w) for s, w in result.tensor_parallel.items() if w and s & (s - 1) == 0), (0, ""))
        if size:
            print(f"{'':17} not {size}: {printable(why)}")
    for kind, found in (("warning", result.warnings), ("error", result.errors)):
        for _, message in found[:MOST_SHOWN]:
            print(f"{kind}: {printable(message)}")
        if len(found) > MOST_SHOWN:
            print(f"{kind}: and {len(found) - MOST_SHOWN} more; --json lists all")
    count = len(result.errors)
    print(f"{args.model}: " + ("sound" if result.sound else f"not sound, {count} error{'s' if count > 1 else ''}"))
    return code


def _inspect(args: argparse.Namespace) -> int:
    from precal_ext import survey

    stored = survey.Stored.open(Path(args.model))
    original = None if args.original is None else survey.Original(resolve_model(args.original))
    rows = survey.sort_rows(survey.rows(stored, original), args.sort, args.reverse)
    total = survey.total(rows)
    if args.json:
        tables = {"tensors": [row.to_dict() for row in rows], "total": total.to_dict()}
        print(json.dumps({**tables, **calibrating.as_recorded(stored)}))
        return EXIT_OK

    def number(value: float, digits: int) -> str:
        return f"{value:.{digits}f}" if math.isfinite(value) else "exact" if value == math.inf else "-"

    width = max(len(survey.printable(row.tensor)) for row in rows)
    print(f"{'tensor':{width}} {'shape':>13} {'bits':>4} {'group':>6} {'c':>2} ", end="")
    planned = any(row.planned for row in rows)
    print(f"{'alpha':>8} {'SQNR dB':>8} {'KL nats':>8} {'bits/w':>7}" + planned * f" {'cost':>6}  planned")
    for row in [*rows, total]:
        shape = f"{row.N} x {row.K}" if row is not total else f"{row.weights:,}"
        settings = f"{row.bits:>4} {row.group_size:>6} {row.c:>2}" if row is not total else " " * 14
        print(
            f"{survey.printable(row.tensor):{width}} {shape:>13} {settings} {number(row.alpha, 6):>8} "
            f"{number(row.sqnr_db, 2):>8} {number(row.kl_nats, 4):>8} {row.bits_per_weight:>7.3f}"
            + (survey.why(row) if planned else "")
        )
    for line in calibrating.recorded_lines(stored):
        print(line)
    return EXIT_OK


def _report(args: argparse.Namespace) -> int:
    from precal_ext import evaluate as ev
    from precal_ext import html_report

    page = Path(args.html)
    if page.suffix != ".html" or page.is_dir():
        raise RefusedError(f"{page}: must be a file that ends in .html")
    if args.text is not None and args.original is None:
        raise RefusedError("report: --text needs --original MODEL, to compare the loss with")
    quiet_host()
    original = None if args.original is None else resolve_model(args.original)
    loss = None
    content = html_report.gather(Path(args.model), original)
    if args.text is not None and original is not None:
        model, tokenizer = ev.load(args.model)
        reference, _ = ev.load(original)
        windows = ev.read_windows(tokenizer, Path(args.text), ev.DEFAULT_WINDOW, args.limit)
        loss = (Path(args.text).name, ev.evaluate(model, windows, reference))
    html_report.write(page, html_report.render(content, loss))
    print(f"{page}: {page.stat().st_size / 1e3:.0f} kB")
    return EXIT_OK


def _close_stdout() -> None:
    """What is printed from now on goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _terminate(signum: int, frame: Any) -> NoReturn:
    raise SystemExit(EXIT_TERMINATED)  # unwinds, so that finished tensors are kept and the rest is removed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files and models need not fit the terminal
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        writes = args.command in ("quantize", "import", "export", "compensate")
        print("precal: interrupted; OUT was not touched" if writes else "precal: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return EXIT_OK
    except (ValueError, TypeError) as error:
        # CheckpointError, SelectionError, RefusedError and broken contracts: all say what was expected.
        if os.environ.get("PRECAL_TRACEBACK"):
            raise
        print(f"precal: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"precal: {where}{error.strerror}", file=sys.stderr)
        return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main())
