#!/usr/bin/env python3
"""Seconds that `precal quantize` takes for a whole checkpoint in the page cache, split into read, compute and write.

    python bench/quantize_checkpoint.py [--gb 4] [--folder DIR] [--out bench/results/quantize_checkpoint.jsonl]

The model is a made-up Llama in bfloat16 (random weights, layers alike) of about so many GB, written to a folder of its
own in DIR and removed at the end. Stages overlap, so their times may add up to more than the whole: "wall" of a stage
is the time its thread worked, "cpu" the CPU time of that thread; kernels on further threads count as wall only. "plan"
is what comes before: reading headers and finding the linear layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu import commit
from recipes import ROOT, facts
from rows import Results
from safetensors.torch import save_file

from precal_ext import convert, pipeline
from precal_ext.config import QuantizeConfig

HIDDEN, FEED, VOCABULARY = 2560, 6912, 32000
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (FEED, HIDDEN),
    "mlp.up_proj": (FEED, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED),
}


def make_model(folder: Path, gigabytes: float) -> int:
    """Bytes of the weights of a model in ``folder``."""
    layer_bytes = 2 * sum(N * K for N, K in SHAPES.values())
    layers = max(1, round((gigabytes * 1e9 - 2 * VOCABULARY * HIDDEN) / layer_bytes))
    generator = torch.Generator().manual_seed(0)

    def weight(N: int, K: int) -> torch.Tensor:
        return (torch.randn(N, K, generator=generator) * 0.02).bfloat16()

    one = {name: weight(*shape) for name, shape in SHAPES.items()}
    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    index = {}
    for i in range(layers):
        prefix, name = f"model.layers.{i}.", f"model-{i:05d}.safetensors"
        tensors = {f"{prefix}{module}.weight": w for module, w in one.items()}
        tensors |= {f"{prefix}{n}_layernorm.weight": norm.clone() for n in ("input", "post_attention")}
        if i == 0:
            tensors |= {"model.embed_tokens.weight": weight(VOCABULARY, HIDDEN), "model.norm.weight": norm.clone()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    heads = {"num_attention_heads": HIDDEN // 128, "num_key_value_heads": HIDDEN // 128}
    config = {"hidden_size": HIDDEN, "intermediate_size": FEED, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, **heads}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Stages:
    """Time spent in each of the three parts of `pipeline.run`."""

    def __init__(self) -> None:
        self.wall = dict.fromkeys(("read", "compute", "write"), 0.0)
        self.cpu = dict(self.wall)
        self._run = pipeline.run

    def run(self, items: Any, read: Any, compute: Any, write: Any, *rest: Any) -> Any:
        return self._run(
            items, self.timed("read", read), self.timed("compute", compute), self.timed("write", write), *rest
        )

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.wall[name] += time.perf_counter() - wall
                self.cpu[name] += time.thread_time() - cpu

        return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, default=None, help="where there is room for 1.3 times as much")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quantize_checkpoint.jsonl")
    args = parser.parse_args()
    results = Results(
        argparse.Namespace(out=args.out, only="", missing=False), ("cpu", "isa", "threads", "recipe", "gb")
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        model = Path(folder) / "model"
        model.mkdir()
        size = make_model(model, args.gb)
        for recipe in ("precal", "paper"):
            for path in model.glob("*.safetensors"):  # into the page cache
                with path.open("rb") as file:
                    while file.read(1 << 24):
                        pass
            stages = Stages()
            pipeline.run = stages.run  # type: ignore[assignment]
            begin = time.perf_counter()
            plan = convert.plan_quantization(model, Path(folder) / recipe, QuantizeConfig(recipe=recipe))
            planned = time.perf_counter()
            try:
                report = convert.run_plan(plan)
            finally:
                pipeline.run = stages._run
            row = {
                "recipe": recipe,
                "gb": args.gb,
                "bytes": size,
                "weights": report.weights,
                "seconds": round(time.perf_counter() - begin, 2),
                "wall": {
                    "plan": round(planned - begin, 2),
                    **{name: round(value, 2) for name, value in stages.wall.items()},
                },
                "cpu_seconds": {name: round(value, 2) for name, value in stages.cpu.items()},
                "sqnr_db": round(report.sqnr_db, 3),
                "threads": torch.get_num_threads(),
                "commit": commit(),
                **facts("bench/quantize_checkpoint.py"),
                # Where it lay says nothing to others.
                "command": "python bench/quantize_checkpoint.py" + (f" --gb {args.gb:g}" if args.gb != 4.0 else ""),
            }
            results.put(row)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
