"""Ranks of one job without torchrun: forked from a process that has imported everything, so they start at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

# Imported here, no rank has to start another process to ask it.
import transformers.models.llama.modeling_llama  # noqa: F401

from precal_ext import cli, convert, ranks

_CONTEXT = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Before Python 3.12.3 its sys.path is ours by PYTHONPATH only, and a module that it does not find is no error."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(cli.__file__).parents[1])])
    try:
        _CONTEXT.set_forkserver_preload(["crew"])
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


# ---- what a rank does before it begins -------------------------------------------------------------------------------


def hold_at(number: int, marker: Path) -> None:
    """Write this process's id to a file and wait, in the middle of the tensor with this number, counted from 0."""
    real, left = convert.quantize_weight, number

    def quantize_weight(*arguments: Any) -> Any:
        nonlocal left
        if left == 0:
            marker.with_suffix(".begun").write_text(str(os.getpid()))
            marker.with_suffix(".begun").rename(marker)
            for _ in range(600):  # a signal right before a sleep does not end it
                time.sleep(0.1)
        left -= 1
        return real(*arguments)

    convert.quantize_weight = quantize_weight


def small_files(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def impatient(seconds: float) -> None:
    ranks.PATIENCE, ranks.PING_SECONDS = seconds, 0.1


def broken() -> None:
    def quantize_weight(*arguments: Any) -> Any:
        raise RuntimeError("a bug")

    convert.quantize_weight = quantize_weight


# ---- a job -----------------------------------------------------------------------------------------------------------


class Job:
    """Ranks at work; ``out`` and ``err`` are what all of them printed."""

    def __init__(
        self, folder: Path, commands: Sequence[Sequence[object]], arranged: dict[int, tuple[Any, ...]]
    ) -> None:
        folder.mkdir(parents=True)
        _start_server()
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        size = len(commands)
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        self.ranks = []
        for rank, command in enumerate(commands):
            own = {**variables, "RANK": str(rank), "LOCAL_WORLD_SIZE": str(size), "HF_HUB_OFFLINE": "1"}
            words = [str(word) for word in command]
            self.ranks.append(
                _CONTEXT.Process(target=_run, args=(folder, own, words, arranged.get(rank)), name=f"rank {rank}")
            )
        for process in self.ranks:
            process.start()

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.ranks[rank].pid, number)

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        assert None not in codes, f"ranks must end within {seconds} s, got {codes}"
        return codes

    @property
    def out(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("*.out")))

    @property
    def err(self) -> str:
        return "".join(path.read_text() for path in sorted(self._folder.glob("*.err")))


def _run(folder: Path, variables: dict[str, str], command: list[str], arrange: tuple[Any, ...] | None) -> None:
    os.environ.update(variables)
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        file = os.open(folder / f"{variables['RANK']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if arrange is not None:
        arrange[0](*arrange[1:])
    sys.exit(cli.main(command))


@contextlib.contextmanager
def job(
    folder: Path, commands: Sequence[Sequence[object]], arranged: dict[int, tuple[Any, ...]] | None = None
) -> Iterator[Job]:
    """A job that does not outlive the block.

    Args:
        commands: what each rank gets as arguments of precal.
        arranged: rank -> a function of this file and its arguments, called first.
    """
    running = Job(folder, commands, arranged or {})
    try:
        yield running
    finally:
        for process in running.ranks:
            if process.exitcode is None:
                process.kill()
            process.join()


def appears(path: Path, seconds: float = 120) -> str:
    """What a file says, once it is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} must appear within {seconds} s"
        time.sleep(0.02)
    return path.read_text()
