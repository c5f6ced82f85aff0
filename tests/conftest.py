"""Fixtures of the whole suite: instruction sets, threads, CUDA, and the folder of shared data."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import torch

from precal_ext import _C, ops

ROOT = Path(__file__).resolve().parents[1]
# Best first. AVX-VNNI has integer kernels of `linear` of its own, all else is AVX2's.
LINEAR_ISAS: list[str] = _C.build_info()["supported_isas"].split(",")
ISAS = [name for name in LINEAR_ISAS if name != "avxvnni"]
THREADS = [1, 2, 4]

# Derandomized: a red run on one machine is red on every machine. No deadline: the machine may be busy.
hypothesis.settings.register_profile("precal", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("precal")


@contextmanager
def forced_isa(name: str) -> Iterator[str]:
    ops.force_isa(name)
    try:
        yield name
    finally:
        ops.force_isa("")


@contextmanager
def forced_threads(count: int) -> Iterator[int]:
    """``count`` threads in torch's pool and in the one of ``_C``."""
    before, before_c = torch.get_num_threads(), _C.get_num_threads()
    torch.set_num_threads(count)
    _C.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
        _C.set_num_threads(before_c)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with forced_isa(request.param) as name:
        yield name


@pytest.fixture(params=THREADS)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with forced_threads(request.param) as count:
        yield count


def shared(*parts: str) -> Path:
    """A path in the folder of models and texts beside the repository; skips the test where it is absent."""
    path = Path(__file__).resolve().parents[2].joinpath("shared", *parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(('../shared', *parts))}, which is not here")
    return path


def skip_without_cuda(reason: str) -> None:
    """Skips, or fails where PRECAL_REQUIRE_CUDA=1 says that this machine must run everything."""
    if os.environ.get("PRECAL_REQUIRE_CUDA") == "1":
        pytest.fail(f"PRECAL_REQUIRE_CUDA=1, but {reason}")
    pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a GPU; PRECAL_REQUIRE_CUDA=1 makes its absence a failure")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not (torch.version.cuda and torch.cuda.is_available()):
        skip_without_cuda("torch sees no CUDA device")
