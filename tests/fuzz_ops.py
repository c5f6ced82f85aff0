"""Random calls of every op of ``_C``: valid ones, wrong ones, and weights that go the whole way round.

    python tests/fuzz_ops.py --calls 1000000 --seed 1      # builds _C with ASan and UBSan, then calls it
    python tests/fuzz_ops.py --seed 1 --first 4711 --cases 1      # one case again

A call ends in a result or in TypeError, ValueError or MemoryError whose message begins with the op's name; a valid call
ends in a result. A share of the valid calls is repeated with other instruction sets and numbers of threads and must
give the same bytes. Case i of a seed is always the same. Needs numpy, and no torch.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import campaign
import numpy as np
from campaign import Finding

ROOT = Path(__file__).resolve().parents[1]
Arguments = dict[str, Any]


# ---- arrays ----------------------------------------------------------------------------------------------------------

SIZES_N = [0, 1, 1, 2, 3, 5, 15, 16, 17, 33]
SIZES_K = [0, 1, 1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 172, 255, 256, 257, 300, 513]
BIG_K = [2048, 2304]


class Source:
    """Everything random of one case."""

    def __init__(self, seed: int, index: int) -> None:
        self.r = random.Random(seed * 1_000_003 + index)
        self.g = np.random.Generator(np.random.PCG64(self.r.getrandbits(64)))

    def chance(self, p: float) -> bool:
        return self.r.random() < p

    def one(self, *choices: Any) -> Any:
        return choices[self.r.randrange(len(choices))]

    def shape(self) -> tuple[int, int]:
        """Small on average; long rows come with few of them."""
        if self.chance(0.01):
            return self.r.randrange(3), self.one(*BIG_K)
        N = self.one(*SIZES_N)
        K = self.one(*SIZES_K) if self.chance(0.7) else self.r.randrange(80)
        return (N, K) if N * K < 3000 else (1 + N % 3, K)

    def bits_of(self, dtype: Any, *shape: int) -> np.ndarray:
        """Any bit pattern."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(self.g.bytes(count), np.uint8).copy().view(dtype).reshape(shape)

    def floats(self, *shape: int) -> np.ndarray:
        """float32, finite, of sizes that a model has, and of those it has not."""
        kind = self.r.randrange(9)
        w = self.g.standard_normal(shape, np.float32)
        if kind < 4:
            return w * np.float32(0.02)
        if kind == 4:
            return np.full(shape, self.one(0.0, -0.37, 1e-45, 1.0), np.float32)
        if kind == 5:
            return (w * np.float32(self.one(1e-42, 1e-38))).astype(np.float32)
        if kind == 6:
            return w * np.float32(self.one(1e30, 1e37))
        if kind == 7:
            return np.round(w * 4) / 8
        return w**5

    def weight(self, N: int, K: int) -> np.ndarray:
        """float32, float16 or bfloat16 (uint16); now and then NaN, Inf or any bits."""
        w = self.floats(N, K)
        if w.size and self.chance(0.1):
            w = self.bits_of(np.float32, N, K)
        elif w.size and self.chance(0.1):
            w.flat[self.r.randrange(w.size)] = self.one(np.nan, np.inf, -np.inf, 3e38)
        return self.stored(w)

    def stored(self, w: np.ndarray) -> np.ndarray:
        kind = self.r.randrange(3)
        if kind == 0:
            return w.astype(np.float32, copy=False)
        if kind == 1:
            with np.errstate(over="ignore"):
                return w.astype(np.float16)
        return (w.astype(np.float32, copy=False).view(np.uint32) >> 16).astype(np.uint16)

    def grid(self, size: int) -> np.ndarray:
        levels = np.sort(self.g.integers(-127, 128, size)).astype(np.int8)
        levels[-1] = max(levels[-1], 1)
        return levels.reshape(self.one((1, size), (size,)))

    def group(self, K: int) -> int:
        return int(self.one(1, 2, 8, 13, 16, 32, 64, 128, max(K, 1), 1000, 2**30))


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- valid arguments of every op -------------------------------------------------------------------------------------


def soft_threshold(s: Source) -> Arguments:
    shape = s.one((), (7,), s.shape(), (2, 3, 4))
    lam = s.one(0.0, 1e-4, 0.01, 1.0, 1e308, 5e-324)
    return {"w": s.weight(1, int(np.prod(shape))).reshape(shape), "lam": lam}


def salience_threshold(s: Source) -> Arguments:
    N, K = s.shape()
    return {
        "w": s.weight(N, K),
        "alpha": s.one(0.0, 0.01, 0.05, 0.5, 1.0),
        "scope": s.one("tensor", "row", "group"),
        "group_size": s.one(s.group(K), 2**63 - 1),
        "normalize": s.one("none", "row", "group"),
    }


def salience_mask(s: Source) -> Arguments:
    a = salience_threshold(s)
    N, K = a["w"].shape
    units = {"tensor": (1,), "row": (N,), "group": (N, ceil_div(K, a["group_size"]))}[a["scope"]]
    lam = s.g.random(units) if s.chance(0.8) else s.bits_of(np.float64, *units)
    return {"w": a["w"], "lam": lam, "scope": a["scope"], "group_size": a["group_size"], "normalize": a["normalize"]}


def interval(s: Source) -> tuple[float, float]:
    return s.one((-0.1, 0.1), (-128.0, 128.0), (0.0, 1.0), (-1e90, 1e90), (3.0, 4.0), (-1e-30, 1e-30))


def histogram(s: Source) -> Arguments:
    N, K = s.shape()
    group_size = s.one(s.group(K), 2**63 - 1)
    G = ceil_div(K, group_size)
    lo, hi = interval(s)
    labels = s.one(1, 2, 16, 256)
    label = s.g.integers(0, labels, (N, K), dtype=np.uint8) if s.chance(0.4) else None
    divisor = s.one(None, s.floats(N, G), s.bits_of(np.float32, N, G))
    return {
        "w": s.weight(N, K),
        "num_bins": s.one(1, 2, 7, 100, 512),
        "lo": lo,
        "hi": hi,
        "divisor": divisor,
        "weight": s.one(None, s.g.integers(0, s.one(2, 5, 2**31 + 1), (N, G))),
        "group_size": group_size,
        "label": label,
        "num_labels": 1 if label is None else labels,
    }


def counts_of(s: Source, *shape: int) -> np.ndarray:
    counts = s.g.integers(0, s.one(1, 2, 100, 2**40, 2**63 - 1), shape)
    return counts * (s.g.random(shape) < s.one(0.1, 1.0))


def spread_codes(s: Source) -> Arguments:
    lo, hi = interval(s)
    grid = s.grid(s.one(2, 3, 8, 16, 32))
    bins = s.one(1, 2, 64, 300)
    shape = (bins,) if s.chance(0.5) else (grid.size, bins)
    return {"counts": counts_of(s, *shape), "lo": lo, "hi": hi, "grid": grid}


def kl_divergence(s: Source) -> Arguments:
    bins = s.one(1, 2, 64, 300)

    def mass() -> np.ndarray:
        if s.chance(0.5):
            return counts_of(s, bins)
        return s.g.random(bins) * s.one(0.0, 1e-310, 1.0, 1e308)

    return {"p": mass(), "q": mass(), "smoothing": s.one(0.0, 0.5, 1e-320, 1e308)}


def fit_grid(s: Source) -> Arguments:
    return {**spread_codes(s), "mu": s.one(0.0, 0.1, 1.0, 1e300), "rounds": s.one(0, 1, 2, 3)}


def quantize_groups(s: Source) -> Arguments:
    N, K = s.shape()
    bits = s.one(2, 3, 3, 4, 4, 4, 5, 6, 8)
    half = s.chance(0.2)
    sizes = [0, 2**bits] if half or bits == 8 else [0, 2**bits, 2 ** (bits + 1)]
    size = s.one(*sizes)
    lo, hi = s.one((0.6, 1.1), (1.0, 1.0), (0.9, 1.0), (1e-9, 0.5)) if not half else (1.0, 1.0)
    return {
        "w": s.weight(N, K),
        "grid": s.grid(size) if size else None,
        "bits": bits,
        "group_size": s.group(K),
        "c": s.one(0, 0, 1, 2, 4, 16),
        "lam": s.one(0.0, 1e-4, 1.0, np.inf),
        "scale_dtype": "float16" if half else "e4m3",
        "symmetric": s.chance(0.3),
        "search_lo": lo,
        "search_hi": hi,
    }


def quantize_split(s: Source) -> Arguments:
    N, K = s.shape()
    return {
        "w": s.weight(N, K),
        "salient": s.g.random((N, K)) < 0.1,
        "bits": s.one(2, 3, 4, 5, 6, 7, 8),
        "group_size": s.group(K),
    }


def pack(s: Source) -> Arguments:
    bits = s.r.randrange(2, 9)
    return {"codes": s.g.integers(0, 2**bits, s.shape(), dtype=np.uint8), "bits": bits}


def unpack(s: Source) -> Arguments:
    (N, K), bits = s.shape(), s.r.randrange(2, 9)
    return {"packed": s.bits_of(np.int32, N, ceil_div(K * bits, 32)), "bits": bits, "K": K}


def outlier_blocks(K: int) -> list[int]:
    """Widths."""
    segment = K // 8 if K >= 2048 and K % 256 == 0 else max(K, 1)
    return [min(256, segment - b) for _ in range(K // segment) for b in range(0, segment, 256)]


def dequantize(s: Source) -> Arguments:
    """Any bits that the checks of a file may let through, and those it would not: indices past a block, NaN scales."""
    (N, K), bits = s.shape(), s.r.randrange(2, 9)
    group_size = s.group(K)
    G, blocks, c = ceil_div(K, group_size), len(outlier_blocks(K)), s.one(0, 0, 1, 2, 16)
    split = s.chance(0.15)
    c = 0 if split else c
    scale_dtype = s.one(np.uint8, np.uint8, np.float16)
    size = s.one(0, 2**bits, 2 ** min(bits + 1, 8))
    return {
        "packed": s.bits_of(np.int32, N, ceil_div(K * bits, 32)),
        "scale": s.bits_of(scale_dtype, N, G),
        "row_scale": s.bits_of(np.uint16, N),
        "grid": s.grid(size) if size else None,
        "outlier_index": s.bits_of(np.uint8, N, blocks, c) if c else None,
        "outlier_value": s.bits_of(np.uint8, N, blocks, c) if c else None,
        "outlier_scale": s.bits_of(scale_dtype, N, G) if split else None,
        "outlier_mask": s.bits_of(np.uint8, N, ceil_div(K, 8)) if split else None,
        "K": K,
        "bits": bits,
        "group_size": group_size,
    }


def numbers_of(a: Arguments) -> Arguments:
    """What unprepack and linear want to know of a weight."""
    return {
        "N": len(a["packed"]),
        "K": a["K"],
        "bits": a["bits"],
        "group_size": a["group_size"],
        "c": 0 if a["outlier_index"] is None else a["outlier_index"].shape[2],
        "grid_size": 0 if a["grid"] is None else a["grid"].size,
        "split": a["outlier_mask"] is not None,
        "scale_dtype": "e4m3" if a["scale"].dtype == np.uint8 else "float16",
    }


def prepacked_bytes(s: Source) -> Arguments:
    a = numbers_of(dequantize(s))
    return {**a, "N": s.one(a["N"], 2**30), "K": s.one(a["K"], 2**30)}


def words_per_row(s: Source) -> Arguments:
    return {"K": s.one(0, 1, 300, 2**30), "bits": s.r.randrange(2, 9)}


def set_num_threads(s: Source) -> Arguments:
    return {"n": s.one(1, 2, 8)}


BUILDERS: dict[str, Callable[[Source], Arguments]] = {
    f.__name__: f
    for f in (
        soft_threshold, salience_threshold, salience_mask, histogram, spread_codes, kl_divergence, fit_grid,
        quantize_groups, quantize_split, pack, unpack, dequantize, prepacked_bytes, words_per_row, set_num_threads,
    )
}  # fmt: skip
BUILDERS["prepack"] = dequantize
# unprepack and linear need bytes that prepack made: `round_trip`, which spoils them too.
OPS = [*BUILDERS, "unprepack", "linear"]


# ---- wrong arguments -------------------------------------------------------------------------------------------------


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]  # fmt: skip


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Exported:
    """A DLPack tensor over an array, with claims of its own."""

    def __init__(self, array: np.ndarray, **claims: Any) -> None:
        self.array = array
        shape = list(array.shape) if "shape" not in claims else claims.pop("shape")
        self.sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
        code = {"f": 2, "i": 0, "u": 1, "b": 6}[array.dtype.kind]
        self.tensor = _DLTensor(array.ctypes.data, 1, 0, len(shape), code, array.itemsize * 8, 1, self.sizes, None, 0)
        for name, value in claims.items():
            setattr(self.tensor, name, value)

    def __dlpack__(self, **_: Any) -> Any:
        return _capsule(ctypes.addressof(self.tensor), b"dltensor", None)


class Refuses:
    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("no \ud800")


class NoCapsule:
    def __dlpack__(self, **_: Any) -> Any:
        return 7


def crooked(a: np.ndarray) -> np.ndarray:
    """The same values at an odd address."""
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    b = buffer[1 : 1 + a.nbytes].view(a.dtype).reshape(a.shape)
    b[...] = a
    return b


NO_ARRAYS = [None, 1, "w", [1.0, 2.0], b"bytes", object(), Refuses(), NoCapsule(), np.float32(1), {}]
DTYPES = ["?", "u1", "i1", "u2", "i2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "g", "c8", "O", "S3", "U2", "M8[s]"]


def wrong_array(s: Source, a: np.ndarray) -> Any:
    kind = s.r.randrange(19)
    if kind == 0 or a.dtype.kind not in "fiub":  # spoilt before
        return s.one(*NO_ARRAYS)
    if kind == 1:
        return np.zeros(a.shape, s.one(*DTYPES))
    if kind == 2:
        return a.T if a.ndim != 1 else a[::-1]
    if kind == 3:
        return np.asfortranarray(a)
    if kind == 4:
        return a[..., ::2] if a.ndim else a
    if kind == 5:
        return a[None] if s.chance(0.5) else a[..., None]
    if kind == 6:
        return a.reshape(-1)
    if kind == 7 and a.ndim:
        shape = list(a.shape)
        shape[s.r.randrange(a.ndim)] += s.one(-1, 1, 16)
        shape = [max(n, 0) for n in shape]
        return s.bits_of(a.dtype, *shape) if np.prod(np.array(shape, float)) < 2**20 else a
    if kind == 8 and a.ndim:  # no elements, and sizes that multiply to anything
        shape = [s.one(0, 1, 2**20, 2**31, 2**40) for _ in range(a.ndim)]
        shape[s.r.randrange(a.ndim)] = 0
        while np.prod([float(n or 1) for n in shape]) * a.itemsize >= 2**62:
            shape[int(np.argmax(shape))] = 1
        return np.empty(shape, a.dtype)
    if kind == 9:
        return a.astype(a.dtype.newbyteorder(">"))
    if kind == 10:
        return s.bits_of(a.dtype, *a.shape)
    if kind == 11:
        return np.zeros((1,) * s.one(8, 9, 33) + (0,), a.dtype)
    if kind == 12:
        return np.zeros(a.shape, [("\ud800", "i2")])
    if kind == 13:
        return np.broadcast_to(a.reshape(-1)[:1], a.shape) if a.size and a.ndim else a
    if kind == 14:
        return np.array(a.reshape(-1)[0]) if a.size else np.zeros((), a.dtype)
    if kind == 15:
        return np.ma.masked_array(a)
    if kind == 16:
        a = a.copy()
        a.flags.writeable = False
        return a
    if kind == 17:
        return crooked(a)
    return s.one(
        Exported(a),
        Exported(a, ndim=-1),
        Exported(a, ndim=2**31 - 1),
        Exported(a, shape=[-1, 4]),
        Exported(a, shape=[2**62, 2**62]),
        Exported(a, shape=[2**40, 2**40, 0]),
        Exported(a, data=None),
        Exported(a, device_type=2),
        Exported(a, lanes=4),
        Exported(a, bits=3),
        Exported(np.zeros(0, a.dtype), data=None),
        Exported(a, shape=[0, 2**60 - 1]),
    )


INTEGERS: list[Any] = [0, -1, 1, 2, 3, 5, 8, 9, 17, 255, 256, 257, 2**24 + 1, 2**30, 2**30 + 1, 2**31, 2**32, 2**53]
INTEGERS += [2**61, 2**62, 2**63 - 1, -(2**31), -(2**63), 2**63, 2**64, 10**30, 1.5, None, "4", True]
INTEGERS += [np.int64(4), np.float32(4)]
FLOATS: list[Any] = [0.0, -0.0, -1.0, 1.0, 1.1, 1.2, float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 5e-324]
FLOATS += [1e-30, 1e90, None, "1", 7, 10**400, np.float32(0.5)]
STRINGS = ["", "tensor", "row", "group", "none", "e4m3", "float16", "E4M3", "\ud800", "é\x1b[2J", "x" * 5000, "a\0b", 1]


def wrong(s: Source, value: Any) -> Any:
    """In place of a valid argument."""
    if isinstance(value, np.ndarray):
        return wrong_array(s, value)
    if value is None:
        return s.one(np.zeros((3, 2), np.float32), 1, "x", *NO_ARRAYS[-6:])
    if isinstance(value, bool):
        return s.one(0, 1, 2, None, "yes", 1.0)
    if isinstance(value, int):
        return s.one(value + 1, value - 1, *INTEGERS)
    if isinstance(value, float):
        return s.one(*FLOATS)
    return s.one(*STRINGS)


def spoil(s: Source, arguments: Arguments) -> Arguments:
    changed = dict(arguments)
    for _ in range(s.one(1, 1, 1, 2, 3)):
        name = s.one(*changed)
        changed[name] = wrong(s, changed[name])
    return changed


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
