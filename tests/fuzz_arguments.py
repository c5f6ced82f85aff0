"""Random arguments of every op of ``_C``, right ones and wrong ones: `fuzz_ops.py` calls with them. Needs no torch."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np

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


def quantize_salient(s: Source) -> Arguments:
    N, K = s.shape()
    group_size, scope = s.group(K), s.one("tensor", "row", "group")
    shape = {"tensor": (1,), "row": (N,), "group": (N, ceil_div(K, group_size))}[scope]
    return {
        "w": s.weight(N, K),
        "lam": s.g.random(shape) * s.one(0.0, 0.01, 1.0) if s.chance(0.8) else s.bits_of(np.float64, *shape),
        "bits": s.one(2, 3, 4, 5, 6, 7, 8),
        "group_size": group_size,
        "scope": scope,
    }


def pack(s: Source) -> Arguments:
    bits = s.r.randrange(2, 9)
    return {"codes": s.g.integers(0, 2**bits, s.shape(), dtype=np.uint8), "bits": bits}


def unpack(s: Source) -> Arguments:
    (N, K), bits = s.shape(), s.r.randrange(2, 9)
    return {"packed": s.bits_of(np.int32, N, ceil_div(K * bits, 32)), "bits": bits, "K": K}


def outlier_blocks(K: int, segment: int = 0) -> list[int]:
    """Widths."""
    segment = segment or (K // 8 if K >= 2048 and K % 256 == 0 else max(K, 1))
    return [min(256, segment - b) for _ in range(K // segment) for b in range(0, segment, 256)]


def dequantize(s: Source) -> Arguments:
    """Any bits that the checks of a file may let through, and those it would not: indices past a block, NaN scales."""
    (N, K), bits = s.shape(), s.r.randrange(2, 9)
    group_size = s.group(K)
    segment = s.one(0, 0, K, *(n for n in (32, 64, 256) if K and K % n == 0))
    G, blocks, c = ceil_div(K, group_size), len(outlier_blocks(K, segment)), s.one(0, 0, 1, 2, 16)
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
        "segment": segment,
    }


def measure(s: Source) -> Arguments:
    """With a weight whose levels it may have nothing to do with."""
    a = dequantize(s)
    w, bins = s.weight(a["packed"].shape[0], a["K"]), s.one(2, 256, 2048)
    segment = a.pop("segment")
    return {"w": w, **a, "num_bins": bins, "half": s.one(1.0, 16.0, 256.0, 65536.0), "segment": segment}


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
        "segment": a.get("segment", 0),
    }


def prepacked_bytes(s: Source) -> Arguments:
    a = numbers_of(dequantize(s))
    K = s.one(a["K"], 2**30)
    return {**a, "N": s.one(a["N"], 2**30), "K": K, "segment": a["segment"] if a["K"] == K else s.one(0, 2**20)}


def words_per_row(s: Source) -> Arguments:
    return {"K": s.one(0, 1, 300, 2**30), "bits": s.r.randrange(2, 9)}


def set_num_threads(s: Source) -> Arguments:
    return {"n": s.one(1, 2, 8)}


BUILDERS: dict[str, Callable[[Source], Arguments]] = {
    f.__name__: f
    for f in (
        soft_threshold, salience_threshold, salience_mask, histogram, spread_codes, kl_divergence, fit_grid,
        quantize_groups, quantize_split, quantize_salient, pack, unpack, dequantize, measure, prepacked_bytes,
        words_per_row, set_num_threads,
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
