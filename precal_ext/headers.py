"""Judging files before they are used: what a safetensors header claims, what JSON holds, whether a path stays in its
directory.

safetensors' own reader takes the last of two equal keys, and shapes such as [0, 2**63], keeps 800 bytes a tensor, and
does not say what to do.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

# About 10**5 tensors, 150 bytes of header each; models of 10**12 weights have some thousand in a file. safetensors' own
# limit is 100 MB.
MAX_HEADER_BYTES = 20_000_000
MAX_TENSORS = 2**17  # of a file
MAX_INDEX_BYTES = 64_000_000  # three times that of a model of 420,000 tensors
# Python's objects take many times the bytes of their text: what is parsed whole is bounded by its length and by its
# commas and brackets.
MAX_JSON_BYTES, MAX_JSON_ITEMS = 8_000_000, 2**20
_MAX_STRING, _MAX_VALUE, _MAX_METADATA = 2**16, 2**12, 2**12  # bytes, bytes, strings
_MAX_ELEMENTS = 2**63 - 1
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_SPACE = re.compile(rb"[ \t\n\r]*")
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


# ---- files -----------------------------------------------------------------------------------------------------------


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file for reading: a pipe would be waited for, a device may have no end.

    Raises:
        CheckpointError: it is something else, or cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: must be readable, got {error.strerror}") from None
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        raise CheckpointError(f"{path}: must be a plain file, got {kind}")
    return os.fdopen(file, "rb")


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a plain file of at most ``most``."""
    with open_plain(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        size = f"{path.stat().st_size:,}"
        raise CheckpointError(f"{path}: must have at most {most:,} bytes, got {size}; that is no file of a model")
    return data


def read_object(path: Path, most: int = MAX_JSON_BYTES, items: int = MAX_JSON_ITEMS) -> dict[str, Any]:
    """A JSON object in a file of at most ``most`` bytes, ``items`` commas and brackets.

    Raises:
        CheckpointError: it is none, or has equal keys, or is too large.
    """
    text = read_bounded(path, most)
    if (count := sum(map(text.count, (b",", b"[", b"{")))) > items:
        raise CheckpointError(f"{path}: must have at most {items:,} commas and brackets, got {count:,}")
    try:
        data = _loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: must be JSON, got {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(data).__name__}")
    return data


def _loads(text: bytes) -> Any:
    """Any JSON value; raises ValueError, with a short message, and nothing else."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, duplicate keys, endless numbers
        raise ValueError(_short(str(error)) or type(error).__name__) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{_short(next(name for name in counts if counts[name] > 1))!r} twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text}, which is no JSON")


def _short(value: object) -> str:
    """Of anything that a file may hold, as much as fits in a message, without what would steer a terminal."""
    text = value[:200] if isinstance(value, str) else _repr.repr(value)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


# ---- config.json -----------------------------------------------------------------------------------------------------

_LAYER_COUNTS = frozenset(
    {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers", "num_encoder_layers"}
    | {"decoder_layers", "encoder_layers", "num_nextn_predict_layers"}
)
_EXPERT_COUNTS = frozenset({"num_experts", "num_local_experts", "n_routed_experts"})


_MAX_LABELS = 2**20  # transformers makes a name for each


def impossible_settings(config: Mapping[str, Any], tensors: int) -> Iterator[str]:
    """What a config, or one inside it, must not ask of transformers: more modules than a checkpoint of so many tensors
    can have, since building them would take as long as it says; and attention from the hub, which is foreign code."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from impossible_settings(value, tensors)
        elif key in _LAYER_COUNTS or key in _EXPERT_COUNTS or key == "num_labels":
            # A few more cost nothing: the experts of a layer may be one tensor together.
            most = _MAX_LABELS if key == "num_labels" else max(tensors, 128 if key in _LAYER_COUNTS else 1024)
            if value is not None and (not isinstance(value, int) or value > most):
                yield f"{key} must be an integer, at most {most} with {tensors} tensors, got {_short(value)[:40]}"
        elif key.endswith("attn_implementation") and isinstance(value, str) and "/" in value:
            yield f"{key} must be attention that transformers has, got code of the hub: {_short(value)[:40]}"


def check_settings(folder: Path, config: Mapping[str, Any], tensors: int) -> None:
    """Raises CheckpointError for what ``impossible_settings`` finds."""
    for problem in impossible_settings(config, tensors):
        raise CheckpointError(f"{folder / 'config.json'}: {problem}")


# ---- JSON, a value at a time -----------------------------------------------------------------------------------------


class _Walk:
    """Goes through JSON text, a value at a time, so that no more than one of them is in memory."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._at = 0

    def next(self) -> bytes:
        """The byte that comes after white space; empty at the end."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None
        self._at = space.end()
        return self._text[self._at : self._at + 1]

    def take(self, wanted: bytes) -> None:
        if (got := self.next()) != wanted:
            raise ValueError(f"{wanted.decode()!r} must be at byte {self._at}, got {_short(got.decode('latin-1'))!r}")
        self._at += 1

    def members(self) -> Iterator[str]:
        """The names in the object that begins here; the caller takes the value of one before it asks for the next."""
        self.take(b"{")
        if self.next() != b"}":
            while True:
                name = self.string()
                name.encode()  # half a character, which \\ud800 can write, belongs to no text
                self.take(b":")
                yield name
                if self.next() == b"}":
                    break
                self.take(b",")
        self.take(b"}")

    def string(self, most: int = _MAX_STRING) -> str:
        if self.next() != b'"':
            raise ValueError(f"a string must begin at byte {self._at}")
        value: str = self.value(most)
        return value

    def value(self, most: int = _MAX_VALUE) -> Any:
        """Any value of at most so many bytes."""
        self.next()
        begin, end, depth = self._at, len(self._text), 0
        for token in _TOKEN.finditer(self._text, begin, min(end, begin + most + 1)):
            mark = token[0][:1]
            depth += (mark in b"[{") - (mark in b"]}")
            if depth < 0 or (depth == 0 and mark == b","):  # what ends a number or a word is not part of it
                end = token.start()
                break
            if depth == 0:
                end = token.end()
                break
        if end - begin > most:
            raise ValueError(f"a value of more than {most} bytes at byte {begin}")
        self._at = end
        return _loads(self._text[begin:end])

    def end(self) -> None:
        if self.next():
            raise ValueError(f"more than an object, from byte {self._at}")


# ---- the header of a safetensors file --------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What a header says of a tensor; offsets count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path, itemsizes: Mapping[str, int]) -> tuple[int, dict[str, Claim]]:
    """Bytes before the data, and every tensor that a safetensors file claims to have.

    Args:
        itemsizes: bytes of an element, by safetensors' name of the dtype.
    Raises:
        CheckpointError: the first tensor that cannot be, by name; its dtype, its size, its place in the file.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        try:
            if size < 8:
                raise ValueError(f"{size} bytes, too few for the length of a header")
            if length > size - 8:
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            if length > MAX_HEADER_BYTES:
                raise ValueError(
                    f"a header of {length} bytes, more than {MAX_HEADER_BYTES}; save the model in smaller files: "
                    "save_pretrained(NEW, max_shard_size=...)"
                )
            return 8 + length, claims_of(file.read(length), size - 8 - length, itemsizes)
        except ValueError as error:
            raise CheckpointError(f"{path}: must be a whole safetensors file, got: {error}") from None


def judge_header(text: bytes, data_bytes: int, itemsizes: Mapping[str, int]) -> str:
    """Why a header cannot describe the ``data_bytes`` bytes that follow it; empty: it can. Never raises."""
    try:
        claims_of(text, data_bytes, itemsizes)
    except ValueError as error:
        return str(error)
    return ""


def claims_of(text: bytes, data_bytes: int, itemsizes: Mapping[str, int]) -> dict[str, Claim]:
    """What a header says of the ``data_bytes`` bytes that follow it; raises ValueError when it cannot be."""
    found: dict[str, Claim] = {}
    try:
        for name, value in _entries(text):
            if name in found:
                raise ValueError(f"{_short(name)!r} twice")
            if len(found) == MAX_TENSORS:
                raise _ClaimError(f"more than {MAX_TENSORS} tensors; save the model in smaller files")
            found[name] = _judge(name, value, itemsizes, data_bytes)
    except _ClaimError:
        raise
    except ValueError as error:
        raise ValueError(f"a header that cannot be read: {error}") from None
    reached, last = 0, "the header"
    for name in sorted(found, key=lambda name: (found[name].begin, found[name].end, name)):
        if (begin := found[name].begin) != reached:
            where = "inside" if begin < reached else "beyond the end of"
            raise ValueError(f"{_short(name)} at byte {begin}, {where} {_short(last)} ({reached})")
        reached, last = found[name].end, name
    if reached != data_bytes:
        raise ValueError(f"{data_bytes} bytes of data, of which tensors take {reached}")
    return found


class _ClaimError(ValueError):
    """The header can be read, and what it says cannot be."""


def _entries(text: bytes) -> Iterator[tuple[str, Any]]:
    """Name and entry of every tensor of a header."""
    walk, metadata = _Walk(text), False
    for name in walk.members():
        if name != "__metadata__":
            yield name, walk.value()
            continue
        if metadata:
            raise ValueError("'__metadata__' twice")
        metadata = True
        if walk.next() == b"n":  # null
            walk.value()
            continue
        _read_metadata(walk)
    walk.end()


def _read_metadata(walk: _Walk) -> None:
    """Strings by name: looked at, and forgotten."""
    names: set[str] = set()
    for name in walk.members():
        if walk.next() != b'"':
            raise _ClaimError(f"__metadata__ that is no object of strings: {_short(name)}: {_short(walk.value())}")
        walk.string(2**20)
        if name in names or len(names) == _MAX_METADATA:
            raise ValueError(f"{_short(name)!r} twice" if name in names else f"more than {_MAX_METADATA} metadata")
        names.add(name)


def _judge(name: str, entry: Any, itemsizes: Mapping[str, int], data_bytes: int) -> Claim:
    """The claim of an entry, when it can be."""

    def refuse(what: str) -> _ClaimError:
        return _ClaimError(f"{_short(name)} with {what}")

    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise refuse(f"an entry without dtype: {_short(entry)}")
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry["dtype"]
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in shape):
        raise refuse(f"shape {_short(shape)}")
    elements, largest = 1, 1
    for n in shape:
        elements *= n
        largest *= max(1, n)  # torch multiplies strides past a zero
        if largest > _MAX_ELEMENTS:
            raise refuse(f"shape {_short(shape)}, more elements than there can be")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise refuse(f"data_offsets {_short(offsets)}")
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes:
        raise refuse(f"data_offsets {_short(offsets)} in {data_bytes} bytes of data")
    if dtype not in itemsizes:
        raise refuse(f"dtype {_short(dtype)}, which torch does not have")
    if end - begin != elements * itemsizes[dtype]:
        what = f"{dtype} {_short(shape)}, which takes {elements * itemsizes[dtype]}"
        raise refuse(f"{end - begin} bytes for {what}")
    return Claim(dtype, tuple(shape), begin, end)


# ---- the index of a directory ----------------------------------------------------------------------------------------


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file of a ``model.safetensors.index.json``; raises CheckpointError."""
    text, found = read_bounded(path, MAX_INDEX_BYTES), None
    try:
        walk = _Walk(text)
        if walk.next() != b"{":
            raise CheckpointError(f"{path}: must hold a JSON object, got {type(walk.value(2**20)).__name__}")
        for key in walk.members():
            if key != "weight_map":
                walk.value(2**20)
                continue
            if found is not None:
                raise ValueError("'weight_map' twice")
            if walk.next() != b"{":
                break
            found = _strings(walk)
        else:
            walk.end()
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: must be JSON, got {error}") from None
    if not found:
        raise CheckpointError(f"{path}: must have a weight_map of tensor to file")
    return found


def _strings(walk: _Walk) -> dict[str, str]:
    found: dict[str, str] = {}
    files: dict[str, str] = {}  # one string for all that are equal
    for name in walk.members():
        if name in found:
            raise ValueError(f"{_short(name)!r} twice")
        value = walk.string()
        found[name] = files.setdefault(value, value)
    return found
