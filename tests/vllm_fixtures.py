"""What vLLM's layers need to be built in this process; a test module asks for it with ``pytest_plugins``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel


@pytest.fixture(scope="session")
def parallel_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A process group of one."""
    with set_current_vllm_config(VllmConfig()):
        file = tmp_path_factory.mktemp("rendezvous") / "file"
        init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        initialize_model_parallel(1)


@pytest.fixture
def current_config(parallel_state: None) -> Iterator[None]:
    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(mode=0))):
        yield
