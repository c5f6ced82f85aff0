"""Speed of the CUDA kernels on the GPU at hand, beside what the same run measures of it: a large copy, cuBLAS in
bfloat16, torch's own int4 kernel. Calls are captured in a graph and replayed, so that no time of the CPU counts; CUDA
events, medians; weights rotated so that none is found in L2.

    python bench/gpu.py [--out bench/results/gpu.jsonl] [--only linear|quantize] [--seconds 0.3]
    python bench/gpu.py --crossover bench/results/gpu.jsonl

`share` is packed bytes (or bytes that must move) per second over the copy's, which counts bytes read and written.
`linear` above 16 tokens is measured twice: with precal's own kernels and by dequantizing and torch's product of dense
matrices (PRECAL_LINEAR); `--crossover` prints from how many tokens on the second is the faster one, which is what
csrc/cuda/linear_config.h has to know.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import shapes  # noqa: E402

from precal_ext import _C, ops  # noqa: E402

Row = dict[str, Any]
L2_TIMES = 4  # as much data as this many L2 caches lies between two uses of a weight

# N, K: 16M to 256M weights.
LINEAR_SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (16384, 16384)]
LINEAR_TOKENS = [1, 4, 16, 64, 128, 256, 384, 512, 1024, 4096]
WAYS = ["mma", "dequantize"]  # of PRECAL_LINEAR
LINEAR_FORMATS = [(4, 64, 1), (4, 128, 0), (3, 64, 1)]  # bits, group_size, c; all with a trellis


def median_seconds(calls: Sequence[Callable[[], Any]], seconds: float) -> float:
    """Time of one call, the median over replays; `calls` are the same work on different memory, in turn."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    count = len(calls) * -(-8 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times) / count


def copies(bytes_each: int) -> int:
    """How many of a weight to rotate."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(64, -(-L2_TIMES * l2 // max(1, bytes_each))))


def copy_bandwidth(seconds: float) -> float:
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_(0, 255)
    b = torch.empty_like(a)
    return 2 * a.numel() / median_seconds([lambda: b.copy_(a)], seconds)


def torch_int4(N: int, K: int, M: int, seconds: float) -> float | None:
    """torch's own weight-only int4 product, groups of 128; None where this build has none."""
    try:
        packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
        count = copies(N * K // 2)
        weights = [torch._convert_weight_to_int4pack(packed, 8) for _ in range(count)]
        scales = torch.randn(K // 128, N, 2, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        return median_seconds([lambda w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in weights], seconds)
    except (RuntimeError, AttributeError) as error:
        print(f"torch int4: {str(error).splitlines()[0]}", file=sys.stderr)
        return None


def bench_linear(copy: float, seconds: float) -> list[Row]:
    rows = []
    for N, K in LINEAR_SHAPES:
        dense = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * N * K))]
        weights = {}
        for bits, group_size, c in LINEAR_FORMATS:
            one = shapes.random_weight(0, 16, K, bits, group_size, c, trellis=True)
            tiled = {
                k: v.repeat(N // 16, *[1] * (v.dim() - 1)) if isinstance(v, torch.Tensor) and k != "grid" else v
                for k, v in one._asdict().items()
            }
            weight = shapes.Weight(**{k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in tiled.items()})
            prepacked = ops.prepack(*weight)
            weights[bits, group_size, c] = (
                weight.numbers,
                [prepacked.clone() for _ in range(copies(prepacked.numel()))],
            )
        for M in LINEAR_TOKENS:
            x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
            bf16 = median_seconds([lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in dense], seconds)
            int4 = torch_int4(N, K, M, seconds) if M <= 16 else None
            for (bits, group_size, c), (numbers, list_of) in weights.items():
                for way in WAYS if M > 16 else WAYS[:1]:
                    os.environ["PRECAL_LINEAR"] = way
                    own = median_seconds(
                        [lambda w=w, x=x, n=numbers: torch.ops.precal.linear(x, w, None, *n) for w in list_of], seconds
                    )
                    moved = list_of[0].numel() + 2 * M * (K + N)
                    rows.append(
                        {
                            "what": "linear",
                            "way": way,
                            "shape": [M, N, K],
                            "format": [bits, group_size, c],
                            "us": own * 1e6,
                            "share": moved / own / copy,
                            "tflops": 2 * M * N * K / own / 1e12,
                            "x_bf16": bf16 / own,
                            "x_torch_int4": int4 / own if int4 else None,
                        }
                    )
                    print(line(rows[-1]), flush=True)
    os.environ.pop("PRECAL_LINEAR", None)
    return rows


def crossover(rows: Sequence[Row]) -> list[str]:
    """For every weight and format: tokens of each measurement, own kernels over dequantizing, and from where on the
    latter is faster at every larger count."""
    times: dict[tuple[Any, ...], dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["what"] == "linear" and row["shape"][0] > 16:
            M, N, K = row["shape"]
            times.setdefault((N, K, *row["format"]), {}).setdefault(M, {})[row["way"]] = row["us"]
    lines = []
    for (N, K, bits, group_size, c), by_tokens in times.items():
        ratios = {M: by_tokens[M]["dequantize"] / by_tokens[M]["mma"] for M in sorted(by_tokens)}
        slower = [M for M, ratio in ratios.items() if ratio >= 1]
        faster = [M for M in ratios if not slower or max(slower) < M]
        text = "  ".join(f"{M}: {ratio:.2f}" for M, ratio in ratios.items())
        where = f"from {faster[0]} tokens" if faster else "never"
        lines.append(f"{N}x{K} int{bits} g{group_size} c{c}  dequantizing is faster {where}   (time over mma: {text})")
    return lines


def bench_quantize(copy: float, seconds: float) -> list[Row]:
    N, K = 8192, 8192
    w = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies(2 * N * K))]
    grid = torch.tensor([shapes.GRID_4], dtype=torch.int8, device="cuda")
    trellis = torch.tensor([shapes.TRELLIS_4], dtype=torch.int8, device="cuda")
    codes = ops.quantize_groups(w[0], grid, 4, 64, 1)[0]
    # Name: the call, and the bytes a weight that it must move.
    calls: dict[str, tuple[Callable[[torch.Tensor], Any], float]] = {
        "soft_threshold": (lambda a: ops.soft_threshold(a, 1e-3), 4),
        "salience_threshold": (lambda a: ops.salience_threshold(a, 0.05), 6),
        "histogram": (lambda a: ops.histogram(a, 2048, -0.2, 0.2), 2),
        "quantize_groups": (lambda a: ops.quantize_groups(a, grid, 4, 64, 1), 3),
        "quantize_groups, trellis": (lambda a: ops.quantize_groups(a, trellis, 4, 64, 1), 3),
        "pack": (lambda a: ops.pack(codes, 4), 1.5),
    }
    rows = []
    for name, (call, bytes_each) in calls.items():
        time = median_seconds([lambda a=a, call=call: call(a) for a in w], seconds)
        rows.append(
            {
                "what": name,
                "shape": [N, K],
                "us": time * 1e6,
                "share": bytes_each * N * K / time / copy,
                "seconds_8b": time * 8e9 / (N * K),
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """One row of the table."""
    shape = "x".join(map(str, row["shape"]))
    text = f"{row['what']:26} {shape:18} {row['us']:10.1f} us {100 * row['share']:6.1f} % of copy"
    if "format" in row:
        bits, group_size, c = row["format"]
        text += (
            f"  int{bits} g{group_size} c{c} {row['way']:10}  {row['tflops']:7.1f} TFLOP/s  {row['x_bf16']:5.2f} x bf16"
        )
        text += f"  {row['x_torch_int4']:5.2f} x torch int4" if row["x_torch_int4"] else ""
    if "seconds_8b" in row:
        text += f"  {row['seconds_8b']:6.2f} s for 8e9 weights"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.jsonl")
    parser.add_argument("--only", choices=["linear", "quantize"])
    parser.add_argument("--seconds", type=float, default=0.2, help="of every measurement")
    parser.add_argument("--crossover", type=Path, metavar="RESULTS", help="print the table of a file and end")
    options = parser.parse_args()
    if options.crossover is not None:
        rows = [json.loads(text) for text in options.crossover.read_text(encoding="utf-8").splitlines()]
        newest = [row for row in rows if row["commit"] == rows[-1]["commit"]]
        print("\n".join(crossover(newest)))
        return
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: torch sees no CUDA device")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    copy = copy_bandwidth(options.seconds)
    head = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "precal": _C.build_info()["version"],
        "commit": commit.strip(),
        "copy_bytes_per_s": copy,
    }
    print(f"{head['device']}: copy {copy / 1e12:.2f} TB/s")
    rows = []
    if options.only != "quantize":
        rows += bench_linear(copy, options.seconds)
        print("\n".join(crossover(rows)))
    if options.only != "linear":
        rows += bench_quantize(copy, options.seconds)
    with options.out.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**head, **row}) + "\n")


if __name__ == "__main__":
    main()
