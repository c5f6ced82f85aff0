"""Every weight W' of a checkpoint, by docs/format.md alone: numpy and the standard library, nothing of precal or torch.

    python tests/format_reader.py DIR        # the digest of each, as tests/golden/digests.json has them

What it reads is refused with an AssertionError where it breaks the page's rules.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = Any
UNIT = np.float32(128)
DTYPES = {"I64": "<i8", "I32": "<i4", "I8": "<i1", "U8": "<u1", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
FIELDS = ("bits", "group_size", "c", "grid", "trellis")
E4M3 = np.array(
    [
        (-1.0 if code & 0x80 else 1.0)
        * ((8 + code % 8) * 2.0 ** ((code >> 3 & 15) - 10) if code >> 3 & 15 else code % 8 * 2.0**-9)
        for code in range(256)
    ],
    np.float32,
)


# ---- files -----------------------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, tuple[str, Array]]:
    """Name -> dtype, array; bfloat16 as its bits."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            flat = np.frombuffer(data[start + begin : start + end], DTYPES[entry["dtype"]])
            found[name] = entry["dtype"], flat.reshape(entry["shape"])
    return found


def read_tensors(folder: Path) -> dict[str, tuple[str, Array]]:
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found: dict[str, tuple[str, Array]] = {}
    for name in names:
        found |= read_safetensors(folder / name)
    return found


def same(name: str, module: str) -> bool:
    """Whether a name of config.json means the module of these tensors."""

    def parts(text: str) -> list[str]:
        found = text.split(".")
        for i in range(1, len(found)):
            if found[i] == "experts":
                found[i - 1] = "*"
        return found

    a, b = sorted((parts(name), parts(module)), key=len)
    return b[len(b) - len(a) :] == a


def settings_of(config: dict[str, Any], module: str) -> dict[str, Any]:
    overrides = config["module_overrides"]
    found = [name for name in overrides if same(name, module)]
    name = max(found, key=len, default=None)  # the whole name before parts of it
    return {key: config[key] for key in ("recipe", *FIELDS)} | (overrides[name] if name is not None else {})


# ---- one weight ------------------------------------------------------------------------------------------------------


def blocks(K: int) -> list[tuple[int, int]]:
    segment = K // 8 if K >= 2048 and K % 256 == 0 else K
    return [
        (begin, min(begin + 256, start + segment))
        for start in range(0, K, segment)
        for begin in range(start, start + segment, 256)
    ]


def dequantize(settings: dict[str, Any], tensors: dict[str, tuple[str, Array]]) -> Array:
    """float32 [N, K]."""
    given = dict(tensors)
    bits, c, recipe = settings["bits"], settings["c"], settings["recipe"]
    assert recipe in ("precal", "rtn", "paper") and 2 <= bits <= 8 and 0 <= c <= 16
    uniform, e4m3 = settings["grid"] == "uniform", recipe == "precal"
    assert uniform or (e4m3 and bits <= 6 and settings["grid"] in ("fitted", "constant"))
    assert (e4m3 or c == 0) and not (uniform and settings["trellis"])
    dtype, shape = given.pop("weight_shape")
    assert dtype == "I64" and shape.shape == (2,)
    N, K = map(int, shape)
    size = K if settings["group_size"] == -1 else settings["group_size"]
    groups, parts = -(-K // size), blocks(K)

    def take(key: str, dtype: str, *shape: int) -> Array:
        got, array = given.pop("weight_" + key)
        assert got == dtype and array.shape == shape, (key, got, array.shape)
        return array

    def scales(key: str) -> Array:
        array = take(key, "U8" if e4m3 else "F16", N, groups)
        assert not (array & 0x7F == 0x7F).any() if e4m3 else np.isfinite(array).all()
        return (E4M3[array] if e4m3 else array.astype(np.float32))[:, np.arange(K) // size]

    words = take("packed", "I32", N, -(-K * bits // 32))
    stream = np.unpackbits(words.view(np.uint8).reshape(N, -1), axis=1, bitorder="little")
    assert not stream[:, K * bits :].any()
    codes = stream[:, : K * bits].reshape(N, K, bits) @ (1 << np.arange(bits))

    scale = scales("scale")
    if recipe == "paper":
        mask = np.unpackbits(take("outlier_mask", "U8", N, -(-K // 8)), axis=1, bitorder="little")
        assert not mask[:, K:].any()
        scale = np.where(mask[:, :K] == 1, scales("outlier_scale"), scale)
    row_scale = (take("row_scale", "BF16", N).astype(np.uint32) << 16).view(np.float32)
    assert np.isfinite(row_scale).all() and (row_scale >= 0).all()

    if uniform:
        level = codes - 2 ** (bits - 1)
    else:
        grid = take("grid", "I8", 1, 2 ** (bits + settings["trellis"]))[0].astype(int)
        assert (np.diff(grid) >= 0).all() and grid.min() >= -127 and grid.any()
        low, index = codes & 1, codes
        if settings["trellis"]:
            before, previous = np.zeros_like(low), np.zeros_like(low)
            for begin, end in parts:
                previous[:, begin + 1 : end] = low[:, begin : end - 1]
                before[:, begin + 2 : end] = low[:, begin : end - 2]
            index = 2 * (codes ^ before) + previous
        level = grid[index]

    w = scale * level.astype(np.float32)
    if c:
        position = take("outlier_index", "U8", N, len(parts), c).astype(int)
        value = take("outlier_value", "U8", N, len(parts), c)
        used = value & 0x7F != 0
        assert not (value & 0x7F == 0x7F).any() and not position[~used].any()
        assert not (used[..., 1:] & ~used[..., :-1]).any()
        assert (np.diff(position)[used[..., 1:]] > 0).all()
        for b, (begin, end) in enumerate(parts):
            assert (position[:, b] < end - begin).all()
            for i in range(c):
                w[np.arange(N), begin + position[:, b, i]] += UNIT * E4M3[value[:, b, i]]
    assert not given, sorted(given)
    return row_scale[:, None] * w


# ---- a model ---------------------------------------------------------------------------------------------------------


def read_model(folder: Path) -> dict[str, Array]:
    """Module -> W', float32 [N, K], for every quantized module."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "precal" and config["format_version"] == 1
    tensors, found = read_tensors(folder), {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            own = {n[len(module) + 1 :]: t for n, t in tensors.items() if n.startswith(module + ".weight_")}
            assert not any(same(kept, module) for kept in config["modules_to_not_convert"])
            assert f"{module}.weight" not in tensors
            found[module] = dequantize(settings_of(config, module), own)
    return found


def digest(w: Array) -> str:
    """SHA-256 of the little-endian float32 bytes, row by row."""
    assert w.dtype == np.float32
    return hashlib.sha256(w.astype("<f4").tobytes()).hexdigest()


if __name__ == "__main__":
    print(json.dumps({module: digest(w) for module, w in read_model(Path(sys.argv[1])).items()}, indent=1))
