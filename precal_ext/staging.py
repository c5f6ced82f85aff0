"""Output under way: what survives an interruption, and how it becomes OUT.

All of it lies in one hidden directory beside OUT, ``.OUT.partial``:

    new/            the directory that will be renamed to OUT
    journal.jsonl   first line: what is being done to which model; then a line per finished tensor with its digests
    lock            held with flock by the process at work
    old/            for an instant, the directory that OUT replaces

A line of the journal is believed only when the bytes it names have its digest. So no order of writes has to be forced
upon the disk while the work goes on: after a power cut a line may be missing or ahead of its data, and either way the
tensor is made again. At the end everything is brought to the disk, then OUT gets its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from precal_ext.checkpoint import CheckpointError, check_target, fsync, raw_header

logger = logging.getLogger("precal")

JOURNAL, LOCK, NEW, OLD = "journal.jsonl", "lock", "new", "old"


def fingerprint(model: Path, files: list[Path]) -> dict[str, Any]:
    """What is remembered of a model, to know it again: size, time of change and header of its files, and its config.

    Not a digest of the data: that would read the whole model twice, and tools that change data change the time too. A
    copy with new times counts as another model; that costs a new start and never a mixture.
    """
    found = {}
    for path in files:
        stat = path.stat()
        found[path.name] = [stat.st_size, stat.st_mtime_ns, hashlib.sha256(raw_header(path)).hexdigest()]
    config = hashlib.sha256((model / "config.json").read_bytes()).hexdigest()
    return {"files": found, "config": config}


def folder_of(out: Path) -> Path:
    """Where the unfinished output of ``out`` lies."""
    out = out.absolute()
    return out.parent / f".{out.name}.partial"


def check_apart(model: Path, out: Path) -> None:
    """Raises CheckpointError when one of the directories would lie in the other."""
    there, here = out.resolve(), model.resolve()
    if there == here or here in there.parents:
        raise CheckpointError(f"{out}: must lie outside the model's directory, got a path inside {model}")
    if there in here.parents:
        raise CheckpointError(f"{out}: must not contain the model, got a parent of {model}")


def read_journal(out: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """The first line and the others, up to the first that is not whole; None when there is nothing to continue."""
    try:
        lines = (folder_of(out) / JOURNAL).read_bytes().split(b"\n")[:-1]  # what follows the last newline is not whole
    except OSError:
        return None, []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not isinstance(value, dict):
            break
        found.append(value)
    return (found[0], found[1:]) if found else (None, [])


def _identity(path: Path) -> list[int] | None:
    return [path.stat().st_dev, path.stat().st_ino] if path.exists() else None


class Work:
    """The output directory while it is being made, this process's alone.

    Args:
        out: the directory to be.
        header: JSON of what is being done, and ``"model"``; a journal with another one is refused.
        overwrite: forget an unfinished run, and replace ``out`` in the end.
    Raises:
        CheckpointError: ``out`` cannot be used, another process is at work, or the unfinished run was a different one.
    """

    def __init__(self, out: Path, header: Mapping[str, Any], overwrite: bool = False) -> None:
        self.out, self._given = out.absolute(), out
        self.folder = folder_of(out)
        self.new = self.folder / NEW
        self.records: list[dict[str, Any]] = []
        self._journal: int | None = None
        if not self.folder.exists():
            check_target(self.out, overwrite)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            try:
                self._begin(dict(header), overwrite)
            except BaseException:
                self._release()
                raise
        except OSError as error:
            raise CheckpointError(f"{out}: must be writable, got {error.strerror} for {error.filename}") from None

    def check_room(self, needed: int) -> None:
        """Raises CheckpointError when ``needed`` bytes, what is there counted, do not fit on the disk."""
        there = sum(path.stat().st_blocks * 512 for path in self.new.iterdir())
        free = shutil.disk_usage(self.folder).free + there
        if needed > free:
            raise CheckpointError(
                f"{self._given}: must have room for {needed:,} bytes, got {free:,}; make room or write elsewhere"
            )

    def _locked(self) -> int:
        path = self.folder / LOCK
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # somebody ended and removed the folder just now
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                    return file  # else: the lock of a process that has ended and removed it
            except BlockingIOError:
                os.close(file)
                raise CheckpointError(
                    f"{self.out}: must be written by one process at a time, got another at work on it"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                    os.close(file)
                    raise
                logger.warning("%s: this file system has no locks; see that no other process writes it", self.out)
                return file
            os.close(file)

    def _begin(self, header: dict[str, Any], overwrite: bool) -> None:
        old = self.folder / OLD
        if old.exists() and not self.out.exists():
            os.rename(old, self.out)  # interrupted between two renames
        shutil.rmtree(old, ignore_errors=True)
        before, records = read_journal(self.out)
        if not self.new.exists():
            before, records = None, []  # nothing was made, or all is in OUT already
        if overwrite:
            before, records = None, []
        # An unfinished run with --overwrite is continued without it, as long as OUT is still what it was to replace.
        begun_to_replace = before is not None and before.get("replaces") == _identity(self.out)
        try:
            check_target(self.out, overwrite or begun_to_replace)
            if before is not None:
                self._compare(before, header)
        except CheckpointError:
            if not self.new.exists():
                self._remove()
            raise
        if before is None:
            shutil.rmtree(self.new, ignore_errors=True)
            (self.folder / JOURNAL).unlink(missing_ok=True)
        self.new.mkdir(exist_ok=True)
        self.records = records
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._journal = os.open(self.folder / JOURNAL, flags, 0o644)
        if before is None:
            replaces = _identity(self.out) if overwrite else None
            self.record({**header, "replaces": replaces})
        else:
            self._end_torn_line()

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(now))
        different = [key for key in now if before.get(key) != now[key]]
        if not different:
            return
        key = different[0]
        then, this = before.get(key), now[key]
        if isinstance(then, dict) and isinstance(this, dict):
            inner = next(k for k in {**this, **then} if then.get(k) != this.get(k))
            key, then, this = f"{key} {inner}", then.get(inner), this.get(inner)
        got = "another one" if key.startswith("model") else f"{this!r} after {then!r}"
        raise CheckpointError(
            f"{self.out}: an unfinished run must be continued with the same {key}, got {got}; --overwrite starts anew "
            f"(what there is lies in {self.folder})"
        )

    def _end_torn_line(self) -> None:
        """A line that an interruption cut short must not swallow the next one."""
        path = self.folder / JOURNAL
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            os.truncate(path, len(whole[0]) + 1)

    def record(self, line: Mapping[str, Any]) -> None:
        """Remember something finished. A line is one write, so that it is there or not."""
        assert self._journal is not None
        data = memoryview(json.dumps(line).encode() + b"\n")
        while data:
            try:
                data = data[os.write(self._journal, data) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.folder / JOURNAL)) from None

    def publish(self) -> None:
        """Give the finished directory its name."""
        for path in self.new.iterdir():
            fsync(path)
        fsync(self.new)
        old = self.folder / OLD
        try:
            if self.out.exists():
                os.rename(self.out, old)
            os.rename(self.new, self.out)
        except BaseException:
            if old.exists() and not self.out.exists():
                os.rename(old, self.out)  # what was there stays there
            raise
        fsync(self.out.parent)
        self.discard()

    def keep(self) -> None:
        """Leave what is finished for the next time; nothing at all when nothing is."""
        if self.new.exists() and read_journal(self.out)[1]:
            self._release()
        else:
            self.discard()

    def discard(self) -> None:
        """Remove everything and let go."""
        self._remove()
        self._release()

    def _remove(self) -> None:
        for name in (NEW, OLD):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        # The lock goes last: whoever takes it after us finds no journal, and nothing that we would still remove.
        for name in (JOURNAL, LOCK):
            (self.folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _release(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        os.close(self._lock)
