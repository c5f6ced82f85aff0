#!/usr/bin/env python3
"""Speed of whole models on the CPU beside their originals: `precal quantize`, then `precal bench`, as a user runs them.

    python bench/models.py [--models llama-6m llama-1b] [--rounds 3] [--out bench/results/models.jsonl]
    python bench/models.py --only 'head'      # settings by name; the other rows stay

llama-6m is the trained development model. llama-1b is made here: the shape of a Llama of 1.1B parameters (TinyLlama's:
22 layers of 2048, 4 heads of keys and values, vocabulary 32000), random weights in bfloat16, written to a temporary
folder tensor by tensor. It says nothing about loss and everything about speed. About 6 minutes on 2 cores, most of them
quantizing. `bench/report.py` makes the tables of docs/performance.md from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from recipes import ROOT, SHARED, commit, facts
from rows import Results, Row

from precal_ext.checkpoint import ShardWriter

LLAMA_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Name -> options of `precal quantize`, options of `precal bench`.
SETTINGS: dict[str, tuple[list[str], list[str]]] = {
    "4 bits": ([], []),
    "4 bits, a8": ([], ["--activations", "a8"]),
    "4 bits, head 8 bits": (["--lm-head", "8"], []),
    "4 bits, head 4 bits": (["--lm-head", "4"], []),
    "3 bits": (["--bits", "3"], []),
}
ONLY_6M = {"3 bits"}  # unless --only asks for it: a minute more


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a Llama."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found.update({f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocabulary, hidden)
    return found


def make_llama(folder: Path, config: dict[str, Any]) -> Path:
    """A random Llama on disk; one tensor at a time is in memory."""
    folder.mkdir(parents=True)
    shapes = tensors_of(config)
    writer = ShardWriter(folder, {name: (torch.bfloat16, shape) for name, shape in shapes.items()})
    try:
        for name, shape in shapes.items():
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            # Outputs as large as inputs, so that nothing overflows or dies out over the layers.
            scale = 1 / math.sqrt(shape[-1])
            w = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=random).mul_(scale)
            writer.write(name, w.bfloat16())
        writer.finish()
    finally:
        writer.close()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder


def precal(*arguments: str) -> dict[str, Any]:
    """The command's JSON."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])}
    command = [sys.executable, "-m", "precal_ext", *arguments, "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"models.py: {' '.join(command)}: exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", choices=("llama-6m", "llama-1b"), default=["llama-6m", "llama-1b"])
    p.add_argument("--only", metavar="REGEX", default="", help="settings by name; the other rows of the file stay")
    p.add_argument("--missing", action="store_true", help="only rows that the file does not have yet")
    p.add_argument("--layers", type=int, help="layers of llama-1b, for a quick look (default 22)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--tokens", type=int, default=32)
    p.add_argument("--prompt-length", type=int, default=512)
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    p.add_argument("--scratch", type=Path, help="where the models are made (default: the system's temporary folder)")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "models.jsonl")
    return p


def main() -> None:
    args = parser().parse_args()
    results = Results(args, ("cpu", "isa", "threads", "model", "format"))
    options = ["--rounds", args.rounds, "--tokens", args.tokens, "--prompt-length", args.prompt_length]
    options = [*map(str, options), "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory(prefix="precal-models-", dir=args.scratch) as scratch:
        for name in args.models:
            if name == "llama-6m":
                original = SHARED / "models" / name if SHARED.is_dir() else ROOT / "demo" / name
            else:
                config = {**LLAMA_1B, **({"num_hidden_layers": args.layers} if args.layers else {})}
                original = make_llama(Path(scratch) / name, config)
                name += f", {args.layers} layers" if args.layers else ""
            out, made = Path(scratch) / f"{name}-quantized", None
            summary: dict[str, Any] = {}
            for label, (how, run) in SETTINGS.items():
                key: Row = {"model": name, "format": label, "threads": args.threads, **facts("bench/models.py")}
                if not results.wants(key) or (label in ONLY_6M and name != "llama-6m" and not args.only):
                    continue
                if how != made:  # neighbours of one setting share what is on the disk
                    summary = precal("quantize", str(original), str(out), "--quiet", "--overwrite", *how)
                    del summary["out"]  # a temporary folder
                    made = how
                speed = precal("bench", str(out), "--original", str(original), *options, *run)
                for measured in (speed["quantized"], speed["original"]):
                    del measured["model"]  # another
                versions = {"commit": commit(), "transformers": version("transformers")}
                results.put({**key, "source": "precal", **versions, "quantize": summary, **speed})
                ratio, rate = speed["ratio"], speed["quantized"]["tokens_per_second"]
                print(
                    f"{name:10} {label:26}{rate['decode']:8.1f} tokens/s, {ratio['decode']:.2f}x;  prompt "
                    f"{rate['prefill']:8.1f}, {ratio['prefill']:.2f}x",
                    flush=True,
                )


if __name__ == "__main__":
    main()
