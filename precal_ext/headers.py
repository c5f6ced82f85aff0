"""Judging a file before it is opened: what a safetensors header claims, and whether a path stays in its directory.

safetensors' own reader takes the last of two equal keys, and shapes such as [0, 2**63]; it does not say what to do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What safetensors' own reader accepts; a header of a thousand tensors has about 100 kB.
MAX_HEADER_BYTES = 100_000_000
_MAX_ELEMENTS = 2**63 - 1


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
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, duplicate keys, endless numbers
        refuse(f"a header that cannot be read: {str(error)[:200] or type(error).__name__}")
    if not isinstance(entries, dict):
        refuse(f"a header that is a {type(entries).__name__}, no object")
    entries.pop("__metadata__", None)
    spans = []
    for name, entry in entries.items():
        reason, begin, end = _judge(entry, itemsizes, size - 8 - length)
        if reason:
            refuse(f"{name} with {reason}")
        spans.append((begin, end, name))
    reached, last = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin != reached:
            refuse(f"{name} at byte {begin}, {'inside' if begin < reached else 'beyond the end of'} {last} ({reached})")
        reached, last = end, name
    if reached != size - 8 - length:
        refuse(f"{size - 8 - length} bytes of data, of which tensors take {reached}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _judge(entry: Any, itemsizes: Mapping[str, int], data_bytes: int) -> tuple[str, int, int]:
    """Why an entry cannot be (empty: it can), and its offsets."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return f"an entry without dtype: {str(entry)[:80]}", 0, 0
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in shape):
        return f"shape {str(shape)[:80]}", 0, 0
    elements, largest = 1, 1
    for n in shape:
        elements *= n
        largest *= max(1, n)  # torch multiplies strides past a zero
    if largest > _MAX_ELEMENTS:
        return f"shape {str(shape)[:80]}, more elements than there can be", 0, 0
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        return f"data_offsets {str(offsets)[:80]}", 0, 0
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes:
        return f"data_offsets {offsets} in {data_bytes} bytes of data", 0, 0
    itemsize = itemsizes.get(entry["dtype"])
    if itemsize is not None and end - begin != elements * itemsize:
        return f"{end - begin} bytes for {entry['dtype']} {str(shape)[:80]}, which takes {elements * itemsize}", 0, 0
    return "", begin, end
