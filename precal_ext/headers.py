"""Judging a file before it is opened: what a safetensors header claims, and whether a path stays in its directory.

safetensors' own reader takes the last of two equal keys, and shapes such as [0, 2**63]; it does not say what to do.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What safetensors' own reader accepts; a header of a thousand tensors has about 100 kB.
MAX_HEADER_BYTES = 100_000_000
# Of that, without the padding at its end: about 10**5 tensors. Python's objects take many times the bytes of their
# text, so what is parsed is bounded by its length and by its commas and brackets: 500 MB at the very worst.
_MAX_TEXT_BYTES = 2**25
_MAX_ITEMS = 2**20
_MAX_ELEMENTS = 2**63 - 1
_repr = reprlib.Repr()
_repr.maxstring = 80


class CheckpointError(ValueError):
    """A model directory that cannot be used: what, where, and what to do."""


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of a model's directory: reading, or copying, it would give away another file.

    Links of the hub's cache, from ``snapshots/REVISION`` to the ``blobs`` beside ``snapshots``, are followed.
    """
    home, real = folder.resolve(), path.resolve()
    if home in real.parents:
        return
    if home.parent.name == "snapshots" and real.parent == (home.parent.parent / "blobs").resolve():
        return
    raise CheckpointError(
        f"{path}: must lie in the directory itself, got a link to {real}; if you trust it, put a copy in its place"
    )


def check_header(path: Path, itemsizes: Mapping[str, int]) -> None:
    """Check everything that the header of a safetensors file claims against the size of the file.

    Args:
        itemsizes: bytes of an element, by safetensors' name of the dtype; the size of other dtypes is not checked.
    Raises:
        CheckpointError: the first tensor that cannot be, by name.
    """

    def refuse(reason: str) -> None:
        raise CheckpointError(f"{path}: must be a whole safetensors file, got: {reason}")

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8:
            refuse(f"{size} bytes, too few for the length of a header")
        if length > MAX_HEADER_BYTES:
            refuse(f"a header of {length} bytes, more than {MAX_HEADER_BYTES}")
        if length > size - 8:
            refuse(f"a header of {length} bytes in a file of {size}")
        text = file.read(length)
    if reason := judge_header(text, size - 8 - length, itemsizes):
        refuse(reason)


def judge_header(text: bytes, data_bytes: int, itemsizes: Mapping[str, int]) -> str:
    """Why a header cannot describe the ``data_bytes`` bytes that follow it; empty: it can. Never raises."""
    text = text.rstrip(b" ")
    if len(text) > _MAX_TEXT_BYTES:
        return f"a header of {len(text)} bytes without its padding, more than {_MAX_TEXT_BYTES}"
    if (items := sum(map(text.count, (b",", b"[", b"{")))) > _MAX_ITEMS:
        return f"a header of {items} commas and brackets, more than {_MAX_ITEMS}"
    try:
        entries = json.loads(
            text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, duplicate keys, endless numbers
        return f"a header that cannot be read: {_short(str(error)) or type(error).__name__}"
    if not isinstance(entries, dict):
        return f"a header that is a {type(entries).__name__}, no object"
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        return f"__metadata__ that is no object of strings: {_short(metadata)}"
    spans = []
    for name, entry in entries.items():
        reason, begin, end = _judge(entry, itemsizes, data_bytes)
        if reason:
            return f"{_short(name)} with {reason}"
        spans.append((begin, end, name))
    reached, last = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin != reached:
            where = "inside" if begin < reached else "beyond the end of"
            return f"{_short(name)} at byte {begin}, {where} {_short(last)} ({reached})"
        reached, last = end, name
    return f"{data_bytes} bytes of data, of which tensors take {reached}" if reached != data_bytes else ""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{next(name for name in counts if counts[name] > 1)!r} twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text}, which is no JSON")


def _short(value: object) -> str:
    """Of anything that a header may hold, as much as fits in a message, without what would steer a terminal."""
    text = value[:200] if isinstance(value, str) else _repr.repr(value)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _judge(entry: Any, itemsizes: Mapping[str, int], data_bytes: int) -> tuple[str, int, int]:
    """Why an entry cannot be (empty: it can), and its offsets."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return f"an entry without dtype: {_short(entry)}", 0, 0
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in shape):
        return f"shape {_short(shape)}", 0, 0
    elements, largest = 1, 1
    for n in shape:
        elements *= n
        largest *= max(1, n)  # torch multiplies strides past a zero
        if largest > _MAX_ELEMENTS:  # at once: the product of a million sizes would take hours
            return f"shape {_short(shape)}, more elements than there can be", 0, 0
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        return f"data_offsets {_short(offsets)}", 0, 0
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes:
        return f"data_offsets {_short(offsets)} in {data_bytes} bytes of data", 0, 0
    itemsize = itemsizes.get(entry["dtype"])
    if itemsize is not None and end - begin != elements * itemsize:
        what = f"{entry['dtype']} {_short(shape)}, which takes {elements * itemsize}"
        return f"{end - begin} bytes for {what}", 0, 0
    return "", begin, end
