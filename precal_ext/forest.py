"""A regression forest as plain arrays, evaluated with numpy.

npz file, nothing pickled:

    names      unicode [F]    features, in the order of the columns
    start      int32 [T + 1]  first node of every tree, and the number of nodes
    feature    int16 [nodes]  column that a node asks about; -1 for a leaf
    threshold  float32        x <= threshold goes left
    left right int32          nodes; a child lies behind its parent and in the same tree
    value      float32        of a leaf
    low high   float32 [F]    range of every feature where it was fitted, 1e30 on both sides of one that it does not see
    base       int32 []       column that is added to the mean of the trees, or -1
    width      float32 [2]    half an interval is width[0] * (spread of the trees + width[1])
    rival      float32 [3]    a closed form that predicts by itself: half its interval, and its range where fitted
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from precal_ext.headers import CheckpointError

MAX_FILE_BYTES, MAX_ARRAY_BYTES = 1_000_000, 16_000_000
_DTYPES = {
    "start": np.int32,
    "feature": np.int16,
    "threshold": np.float32,
    "left": np.int32,
    "right": np.int32,
    "value": np.float32,
    "low": np.float32,
    "high": np.float32,
    "base": np.int32,
    "width": np.float32,
    "rival": np.float32,
}
Array = NDArray[Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Forest:
    """The arrays of a file, checked."""

    names: tuple[str, ...]
    arrays: dict[str, Array]

    def __post_init__(self) -> None:
        _check(self.names, self.arrays)

    def trees(self, x: NDArray[np.float32]) -> Floats:
        """What every tree says: [T, rows] of x float32 [rows, F]."""
        a = self.arrays
        start, out = a["start"], np.empty((len(a["start"]) - 1, len(x)))
        rows = np.arange(len(x))
        for tree in range(len(out)):
            node = np.full(len(x), start[tree], dtype=np.int64)
            while True:
                feature = a["feature"][node]
                inner = feature >= 0
                if not inner.any():
                    break
                goes_left = x[rows, np.maximum(feature, 0)] <= a["threshold"][node]
                node = np.where(inner, np.where(goes_left, a["left"][node], a["right"][node]), node)
            out[tree] = a["value"][node]
        return out

    def predict(self, x: NDArray[np.float32]) -> tuple[Floats, Floats, Floats, NDArray[np.bool_]]:
        """Low end, middle and high end of the interval of every row, and [rows, F] which features lie outside the
        range that was fitted.

        Outside, trees answer as at the edge. The interval grows by half for every such feature, and by as much again
        for every width of the range that it is away.
        """
        trees = self.trees(x)
        base = int(self.arrays["base"])
        middle = trees.mean(0) + (x[:, base] if base >= 0 else 0.0)
        away = _away(x, *(self.arrays[key].astype(np.float64) for key in ("low", "high")))
        factor, floor = self.arrays["width"].astype(np.float64)
        half = factor * (trees.std(0) + floor) * (1.0 + away.sum(1))
        return middle - half, middle, middle + half, away > 0

    def of_rival(self, x: float) -> tuple[float, float, bool]:
        """Low and high end of the interval of the closed form where it says ``x``, and whether that lies outside."""
        half, low, high = self.arrays["rival"].astype(np.float64)
        away = float(_away(np.float64(x), low, high))
        half = float(half) * (1.0 + away)
        return x - half, x + half, away > 0


def _away(x: Any, low: Any, high: Any) -> Floats:
    """By what an interval grows: 0 in the range, half and half of every width of the range outside."""
    beyond = np.maximum(np.maximum(low - x, x - high), 0.0)
    outside = beyond > 1e-5 * np.maximum(np.abs(low), np.abs(high)) + 1e-9
    return np.where(outside, 0.5 * (1.0 + beyond / np.maximum(high - low, 1e-9)), 0.0)


def _check(names: tuple[str, ...], a: dict[str, Array]) -> None:
    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"predictor: {what}")

    for key, dtype in _DTYPES.items():
        if key not in a or a[key].dtype != dtype:
            raise refuse(f"{key} must be {np.dtype(dtype)}, got {a[key].dtype if key in a else 'nothing'}")
        if np.dtype(dtype).kind == "f" and not np.isfinite(a[key]).all():
            raise refuse(f"{key} must be finite, got NaN or infinity")
    features, start, nodes = len(names), a["start"], len(a["feature"]) if a["feature"].ndim == 1 else -1
    shapes = {"low": (features,), "high": (features,), "base": (), "width": (2,), "rival": (3,)}
    shapes |= {key: (nodes,) for key in ("feature", "threshold", "left", "right", "value")}
    for key, shape in shapes.items():
        if a[key].shape != shape:
            raise refuse(f"{key} must have shape {list(shape)}, got {list(a[key].shape)}")
    good = start.ndim == 1 and len(start) >= 2 and start[0] == 0 and start[-1] == nodes and (np.diff(start) > 0).all()
    if not good:
        raise refuse(f"start must rise from 0 to the number of nodes, {nodes}, got other numbers")
    if not ((a["feature"] >= -1) & (a["feature"] < features)).all() or not -1 <= a["base"] < features:
        raise refuse(f"feature and base must lie in [-1, {features}), got others")
    inner = np.flatnonzero(a["feature"] >= 0)
    end = start[np.searchsorted(start, inner, side="right")]
    for key in ("left", "right"):
        if not ((a[key][inner] > inner) & (a[key][inner] < end)).all():  # so that every walk ends
            raise refuse(f"{key} must be a later node of the same tree, got another")


def read_forest(path: Path, names: Sequence[str]) -> Forest:
    """Read a file whose features must be ``names``.

    Raises:
        CheckpointError: it cannot be read, is too large, or does not hold what it must.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CheckpointError(f"{path}: must have at most {MAX_FILE_BYTES:,} bytes, got {path.stat().st_size:,}")
        with zipfile.ZipFile(path) as packed:  # sizes before anything is unpacked
            if (size := sum(entry.file_size for entry in packed.infolist())) > MAX_ARRAY_BYTES:
                raise CheckpointError(f"{path}: must unpack to at most {MAX_ARRAY_BYTES:,} bytes, got {size:,}")
        with np.load(path, allow_pickle=False) as loaded:
            arrays = {key: loaded[key] for key in loaded.files}
    except CheckpointError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{path}: must be a predictor that can be read, got: {error}") from None
    found = tuple(map(str, arrays.pop("names", np.array([])).flatten()))
    if found != tuple(names):
        raise CheckpointError(f"{path}: must be fitted on the features {', '.join(names)}, got {', '.join(found)}")
    return Forest(found, arrays)


def write_forest(path: Path, forest: Forest) -> None:
    """The same arrays give the same bytes."""
    arrays: dict[str, Any] = {"names": np.array(forest.names), **forest.arrays}
    np.savez_compressed(path, **arrays)
