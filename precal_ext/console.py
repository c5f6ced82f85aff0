"""What the commands share: exit codes, refusals, names of models, sizes, progress, memory."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_REFUSED, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 3, 130, 143

TRIM_EVERY = 64 << 20  # bytes of weights


def size_of(text: str) -> int:
    """Bytes of a size as people write it: 5GB, 500MB, 1.5 TB; powers of 1000, as transformers counts."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?)B?", text.upper())
    size = int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size like 500MB or 5GB, got {text!r}")
    return size


def positive(text: str) -> int:
    """An argument that counts something."""
    if not re.fullmatch(r"0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"must be an integer, at least 1, got {text!r}")
    return int(text)


class RefusedError(ValueError):
    """Input or output that cannot be used."""


def resolve_model(name: str) -> Path:
    """A directory, or the local copy of a hub name."""
    path = Path(name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
        raise RefusedError(f"{name}: must be a model directory or a hub name, got nothing there")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RefusedError(f"{name}: must be a model directory; for hub names pip install 'precal[hf]'") from None
    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "README.md"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network, authentication, no such model: the hub's own words tell
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RefusedError(f"{name}: must be a model directory or a hub name that answers, got: {reason}") from None


def quiet_host() -> None:
    """transformers' own bars and notices do not belong in the output of these commands."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from transformers.utils import logging as hf_logging
    except ImportError:
        return
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()


class ProgressDisplay:
    """tqdm on a terminal; elsewhere a plain line at the start and about every five seconds."""

    INTERVAL = 5.0

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._bar: Any = None
        self._started = time.monotonic()
        self._printed = -self.INTERVAL

    def __call__(self, p: Any) -> None:
        if self._stream.isatty():
            from tqdm import tqdm

            if self._bar is None:
                self._bar = tqdm(
                    total=p.bytes_total,
                    initial=p.bytes_before,
                    unit="B",
                    unit_scale=True,
                    file=self._stream,
                    dynamic_ncols=True,
                )
            self._bar.set_description(f"{p.tensors_done}/{p.tensors} tensors", refresh=False)
            self._bar.update(p.bytes_done - self._bar.n)
            return
        elapsed = time.monotonic() - self._started
        if elapsed - self._printed < self.INTERVAL and p.tensors_done < p.tensors:
            return
        self._printed = elapsed
        rate = (p.bytes_done - p.bytes_before) / max(elapsed, 1e-9)
        left = (p.bytes_total - p.bytes_done) / max(rate, 1.0)
        print(
            f"{p.tensors_done}/{p.tensors} tensors, {p.bytes_done / 1e9:.2f} of {p.bytes_total / 1e9:.2f} GB, "
            f"{rate / 1e9:.2f} GB/s, {left:.0f} s left",
            file=self._stream,
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def return_freed_memory() -> Callable[[], object]:
    """Let tensors go back to the system when they are freed.

    glibc learns from the first large ones that it frees to keep the next (up to 32 MB each) in its heap, where a small
    object behind them holds them for ever: 1.7 GB while quantizing a model of 400 MB, against 0.35 GB this way. Tensors
    below 1 MB stay there (half of the time would go into the system otherwise) and leave holes, 150 MB for every GB.

    Returns:
        A function that gives the holes back, to be called now and then.
    """
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 1 << 20)
        mallopt(trim_threshold, 16 << 20)
        mallopt(arena_max, 1)
        malloc_trim = ctypes.CDLL(None).malloc_trim
        return lambda: malloc_trim(0)
    return lambda: None


def trimming() -> Callable[[int], None]:
    """To be called with the bytes of weights so far; gives the heap's holes back now and then."""
    trim, trimmed = return_freed_memory(), 0

    def done(count: int) -> None:
        nonlocal trimmed
        if count - trimmed >= TRIM_EVERY:
            trimmed = count
            trim()

    return done


@contextlib.contextmanager
def shown_progress(quiet: bool, trim: Callable[[int], None]) -> Iterator[Callable[[Any], None]]:
    """What a long command calls with its ``Progress``: shows it unless ``quiet``, and calls ``trim``."""
    display = None if quiet else ProgressDisplay(sys.stderr)

    def show(p: Any) -> None:
        trim(p.bytes_done)
        if display is not None:
            display(p)

    try:
        yield show
    finally:
        if display is not None:
            display.close()
