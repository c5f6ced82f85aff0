"""Random calls of every op of ``_C``: valid ones, wrong ones, and weights that go the whole way round.

    python tests/fuzz_ops.py --calls 1000000 --seed 1      # builds _C with ASan and UBSan, then calls it
    python tests/fuzz_ops.py --seed 1 --first 4711 --cases 1      # one case again

A call ends in a result or in TypeError, ValueError or MemoryError whose message begins with the op's name; a valid call
ends in a result. A share of the valid calls is repeated with other instruction sets and numbers of threads and must
give the same bytes. Case i of a seed is always the same. Needs numpy, and no torch.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import campaign
import numpy as np
from campaign import Finding
from fuzz_arguments import BUILDERS, Arguments, Source, dequantize, numbers_of, quantize_groups, quantize_split, spoil

ROOT = Path(__file__).resolve().parents[1]


# ---- calls -----------------------------------------------------------------------------------------------------------


class Caller:
    """Calls ops and judges how the calls end."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.isas = module.build_info()["supported_isas"].split(",")
        self.done: Counter[str] = Counter()

    def __call__(self, op: str, arguments: Arguments, valid: bool = False) -> tuple[Any, ...] | None:
        """The results, or None: refused."""
        try:
            result = getattr(self.module, op)(*arguments.values())
        except (TypeError, ValueError, MemoryError) as error:
            self.done[f"{op} refused"] += 1
            text = str(error)
            if not re.match(rf"{op}(: |\(\): incompatible function arguments)", text):
                raise Finding(
                    f"{op}: {type(error).__name__} must begin with the op's name, got {text[:300]!r}"
                ) from error
            unusable = "must be finite" in text or "2^126" in text
            if valid and not unusable:
                raise Finding(f"{op}: valid arguments must be accepted, got {text[:300]!r}") from error
            return None
        self.done[f"{op} results"] += 1
        return result if isinstance(result, tuple) else (result,)

    def elsewhere(self, op: str, arguments: Arguments, want: tuple[Any, ...], s: Source) -> None:
        """The same bytes with other instruction sets (but for linear, which promises a bound) and threads."""
        try:
            if op != "linear":
                self.module.force_isa(s.one(*self.isas))
            self.module.set_num_threads(s.one(1, 2, 3, 8))
            got = self(op, arguments, valid=True)
            where = f"{self.module.cpu_isa()} with {self.module.get_num_threads()} threads"
        finally:
            self.module.force_isa("")
            self.module.set_num_threads(1)
        if got is None or not all(map(same, want, got)):
            raise Finding(f"{op}: {where} must give the same bytes, got others")


def same(a: Any, b: Any) -> bool:
    """Equal bytes; any NaN equals any other."""
    if not isinstance(a, np.ndarray):
        return bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.tobytes() == b.tobytes():
        return True
    if a.dtype == np.uint16:  # bfloat16
        a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    return a.dtype.kind == "f" and bool((np.isnan(a) == np.isnan(b)).all()) and np.array_equal(a, b, equal_nan=True)


def equal(what: str, a: Any, b: Any) -> None:
    if not same(a, b):
        raise Finding(f"{what}: must come back as they were, got other bytes")


def corrupted(s: Source, a: Any) -> Any:
    """The same shape and dtype, a few bytes changed."""
    if not isinstance(a, np.ndarray) or a.size == 0:
        return a
    b = a.copy()
    raw = b.reshape(-1).view(np.uint8)
    for _ in range(s.one(1, 1, 2, 8)):
        raw[s.r.randrange(raw.size)] = s.one(0, 255, 127, 128, s.r.randrange(256))
    return b


def round_trip(call: Caller, s: Source) -> None:
    """quantize, pack, prepack, unprepack, dequantize, linear; then the same with bytes changed."""
    keys = ["packed", "scale", "row_scale", "grid", "outlier_index", "outlier_value", "outlier_scale", "outlier_mask"]
    quantized = s.chance(0.7)
    if quantized:
        split = s.chance(0.2)
        q = (quantize_split if split else quantize_groups)(s)
        parts = call("quantize_split" if split else "quantize_groups", q, valid=True)
        if parts is None:
            return
        (packed,) = call("pack", {"codes": parts[0], "bits": q["bits"]}, valid=True) or ()
        (codes,) = call("unpack", {"packed": packed, "bits": q["bits"], "K": parts[0].shape[1]}, valid=True) or ()
        equal("codes", codes, parts[0])
        outliers = (None, None, parts[3], parts[4]) if split else (*parts[3:], None, None) if q["c"] else (None,) * 4
        tensors = (packed, *parts[1:3], q.get("grid"), *outliers)
        weight = dict(zip(keys, tensors, strict=True)) | {
            "K": parts[0].shape[1],
            "bits": q["bits"],
            "group_size": q["group_size"],
        }
    else:
        weight = dequantize(s)
    if s.chance(0.2):
        weight[k] = corrupted(s, weight[k := s.one(*keys)])
        weight["grid"] = weight["grid"] if quantized or s.chance(0.5) else corrupted(s, weight["grid"])
        quantized = False
    prepacked = call("prepack", weight)
    dense = call("dequantize", weight)
    if (prepacked is None) != (dense is None):
        raise Finding("prepack and dequantize: must accept the same weights, got one refusal")
    if prepacked is None or dense is None:
        return
    numbers = numbers_of(weight)
    back = call("unprepack", {"prepacked": prepacked[0], **numbers}, valid=True)
    for key, tensor in zip(keys, back or (), strict=True):
        if weight[key] is not None:
            equal(key, tensor, weight[key].reshape(tensor.shape))

    x = s.stored(s.g.standard_normal((*s.one((), (1,), (3,), (5,), (2, 2), (0,), (65,)), numbers["K"]), np.float32))
    bias = s.one(None, s.stored(s.floats(numbers["N"])))
    mode = s.one("f32", "a16", "a8")
    arguments = {"x": x, "prepacked": prepacked[0], "bias": bias, **numbers, "activations": mode}
    y = call("linear", arguments, valid=True)
    if y is not None and s.chance(0.2):
        call.elsewhere("linear", arguments, y, s)
    if y is not None and quantized and x.dtype == np.float32 and bias is None:
        with np.errstate(all="ignore"):
            want = x.astype(np.float64) @ dense[0].astype(np.float64).T
            bound = np.abs(x).astype(np.float64) @ np.abs(dense[0]).astype(np.float64).T * (numbers["K"] + 8) * 2.0**-23
            # What rounding x to 16 or 8 bits of its largest may add; more than that of its span.
            step = {"f32": 0.0, "a16": 1 / 65024, "a8": 1 / 254}[mode] * np.abs(x).max(-1, keepdims=True, initial=0)
            bound = bound + step.astype(np.float64) * np.abs(dense[0]).astype(np.float64).sum(1) * (1 + 1e-5)
            # Products of denormals may underflow, sums of huge ones overflow.
            far = np.isfinite(y[0]) & (np.abs(y[0] - want) > bound + 1e-30)
        if far.any():
            raise Finding(f"linear: must be x @ dequantize(W)^T, got an error of {np.abs(y[0] - want)[far].max()}")

    if s.chance(0.5):
        arguments["prepacked"] = corrupted(s, prepacked[0])
        call("linear", arguments)
        call("unprepack", {"prepacked": arguments["prepacked"], **numbers})
    if s.chance(0.5):
        call("linear", spoil(s, arguments))
        call("unprepack", spoil(s, {"prepacked": prepacked[0], **numbers}))


def run_case(call: Caller, seed: int, index: int) -> None:
    s = Source(seed, index)
    if s.chance(0.2):
        return round_trip(call, s)
    op = s.one(*BUILDERS)
    arguments = BUILDERS[op](s)
    if s.chance(0.5):
        call(op, spoil(s, arguments))
        call.module.set_num_threads(1)
    else:
        result = call(op, arguments, valid=True)
        if result is not None and s.chance(0.2) and op != "set_num_threads":
            call.elsewhere(op, arguments, result, s)
    return None


# ---- the campaign ----------------------------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """``_C`` with ASan and UBSan."""
    options = ["-DPRECAL_SANITIZE=address,undefined", f"-DPython_EXECUTABLE={sys.executable}"]
    subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, *options], check=True, stdout=sys.stderr)
    subprocess.run(["cmake", "--build", folder], check=True, stdout=sys.stderr)


def sanitized() -> dict[str, str]:
    """The environment in which a plain Python loads a module with ASan."""
    names = ["libasan.so", "libstdc++.so"]  # the second, or ASan does not see who throws
    files = [
        subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True, check=True) for n in names
    ]
    return {
        "LD_PRELOAD": " ".join(f.stdout.strip() for f in files),
        # Python never frees all it has; outputs beyond 1 GB must give MemoryError, not an abort.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=1024:quarantine_size_mb=32",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


def work(first: int, cases: int, options: argparse.Namespace, progress: campaign.Progress) -> Counter[str]:
    sys.path.insert(0, str(options.build))
    call = Caller(importlib.import_module("_C"))
    call.module.set_num_threads(1)
    for index in range(first, first + cases):
        progress.at(index)
        run_case(call, options.seed, index)
    return call.done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1_000_000, help="stop when so many have been made")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "sanitize", help="build folder")
    campaign.add_options(parser)
    options = parser.parse_args()
    if options.worker is None:
        build(options.build)
    extra = ["--build", str(options.build)]
    return campaign.main(Path(__file__), options, work, options.calls, 20_000, extra, sanitized())


if __name__ == "__main__":
    sys.exit(main())
