"""One model directory into another, tensor by tensor: within a limit of memory, whole or not at all, and resumable.

What ``convert`` is for quantizing, for everything that needs no samples and no grids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext import pipeline
from precal_ext._version import __version__
from precal_ext.checkpoint import CheckpointError, ShardWriter, TensorInfo, read_chunks, weight_files
from precal_ext.convert import Progress, digested, has_digest
from precal_ext.digest import sha256
from precal_ext.report import Entry
from precal_ext.staging import Work, check_apart, fingerprint

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Item:
    """What takes the place of some tensors.

    Args:
        name: of the item, unique.  outputs: name, dtype and shape of what is written.  memory: bytes that it takes.
        nbytes: bytes of its input, for the progress.
        read, make: the work, in two threads: what ``read`` gives, ``make`` turns into the outputs. The entry of the
            report comes with them.  None: ``source`` is copied as it is.
    """

    name: str
    outputs: Shapes
    nbytes: int
    memory: int = 0
    read: Callable[[], Any] | None = None
    make: Callable[[Any], tuple[Mapping[str, Tensor], Entry]] | None = None
    source: TensorInfo | None = None


def copied(info: TensorInfo, action: str = "copy", reason: str = "not a linear weight") -> tuple[Item, Entry]:
    """A tensor that stays as it is, and what the report says of it."""
    dtype = str(info.dtype).removeprefix("torch.")
    item = Item(info.name, {info.name: (info.dtype, info.shape)}, info.nbytes, source=info)
    return item, Entry(info.name, action, reason, info.shape, dtype)


@dataclass(frozen=True)
class Rewritten:
    """What was written, in the order of the items."""

    entries: list[Entry]
    digests: dict[str, str]
    bytes_after: int


def check_directories(name: str, source: Path, out: Path) -> None:
    """Raises CheckpointError when there is no directory to read, or one of the two would lie in the other."""
    if not source.is_dir():
        got = "a file" if source.exists() else "nothing there"
        raise CheckpointError(f"{name}: must be given a model directory, got {got} at {source}")
    check_apart(source, out)


def rewrite(
    sources: Sequence[Path],
    out: Path,
    settings: Mapping[str, Any],
    items: Sequence[Item],
    entries: Mapping[str, Entry],
    finish: Callable[[Path, Rewritten], None],
    *,
    parameters: int,
    max_shard_bytes: int,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Rewritten:
    """Write a new model directory.

    What an interrupted call has finished lies in ``.OUT.partial`` beside ``out``; the same call continues there.

    Args:
        sources: model directories that must not change meanwhile.
        settings: JSON of everything that decides the bytes besides the sources.
        items, entries: what is written, in this order; the entries of those that are only copied.
        finish: writes the other files into the directory that will be ``out``.
        parameters: weights of the model, for the index.
    Raises:
        CheckpointError: the output cannot be used, or an unfinished call was another one.  OSError: reading or
            writing failed.  What ``read`` and ``make`` raise.
    """
    known = {str(i): fingerprint(source, weight_files(source)) for i, source in enumerate(sources)}
    header = {"version": __version__, "settings": dict(settings), "max_shard_size": max_shard_bytes, "model": known}
    work = Work(out, header, overwrite)
    outputs = {name: shape for item in items for name, shape in item.outputs.items()}
    writer = ShardWriter(work.new, outputs, max_shard_bytes, parameters)
    try:
        work.check_room(sum(writer.sizes.values()))
    except BaseException:
        work.keep()
        raise
    try:
        try:
            done, digests = _run(work, writer, items, entries, progress)
            writer.finish()
        finally:
            writer.close()
        for i, source in enumerate(sources):
            if fingerprint(source, weight_files(source)) != known[str(i)]:
                raise CheckpointError(f"{source}: must stay as it is while it is read, got changed files")
        result = Rewritten(done, digests, sum(p.stat().st_size for p in work.new.glob("*.safetensors")))
        finish(work.new, result)
        work.publish()
    except (ValueError, TypeError):
        work.discard()  # refused for what it is: the same call would be refused again
        raise
    except BaseException:
        work.keep()
        raise
    return result


def _run(
    work: Work,
    writer: ShardWriter,
    items: Sequence[Item],
    copies: Mapping[str, Entry],
    progress: Callable[[Progress], None] | None,
) -> tuple[list[Entry], dict[str, str]]:
    entries: dict[str, Entry] = dict(copies)
    digests: dict[str, dict[str, str]] = {}
    by_name = {item.name: item for item in items}
    for record in work.records:
        item = by_name.get(str(record.get("tensor")))
        if item is None or set(record["digests"]) != set(item.outputs):
            continue
        if all(has_digest(writer.info(name), digest) for name, digest in record["digests"].items()):
            entries[item.name] = Entry.from_record(record["entry"])
            digests[item.name] = {name: record["digests"][name] for name in item.outputs}
            for name in item.outputs:
                writer.keep(name)
    pending = [item for item in items if item.name not in digests]
    total = sum(item.nbytes for item in items)
    before = done = total - sum(item.nbytes for item in pending)
    finished = len(items) - len(pending)

    def read(item: Item) -> Any:
        return None if item.read is None else item.read()

    def compute(item: Item, given: Any) -> Mapping[str, Tensor] | None:
        nonlocal done, finished
        made = None
        if item.make is not None:
            made, entries[item.name] = item.make(given)
        done += item.nbytes
        finished += 1
        if progress is not None:
            progress(Progress(item.name, finished, len(items), done, total, before))
        return made

    def write(item: Item, made: Mapping[str, Tensor] | None) -> None:
        found = {}
        if made is None:
            assert item.source is not None
            digest = hashlib.sha256()
            writer.write_chunks(item.name, digested(read_chunks(item.source), digest))
            found[item.name] = digest.hexdigest()
        else:
            for name in item.outputs:
                writer.write(name, made[name])
                found[name] = sha256(made[name])
        digests[item.name] = found
        work.record({"tensor": item.name, "digests": found, "entry": entries[item.name].to_record()})

    limit = max((item.memory for item in items), default=0)  # of all under way together: what the largest takes
    pipeline.run(pending, read, compute, write, lambda item: item.memory, limit)
    in_order = [item.name for item in items]
    return [entries[n] for n in in_order], {key: value for n in in_order for key, value in digests[n].items()}


def to_json(data: Mapping[str, Any]) -> str:
    """As ``config.json`` is written."""
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
