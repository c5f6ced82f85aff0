"""Session fixtures of the tests above the ops; a test module asks for them with ``pytest_plugins``.

A plugin and not an import: pytest would run an imported session fixture once per module.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from models import Folder, InMemory, Run, Source, add_tokenizer, first_layers, model_folder, save_tiny
from torch import nn

from precal_ext import QuantizeConfig, Report, cli, quantize_checkpoint, quantize_model


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Name -> a trained model, of the larger one two layers of six."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = model_folder(name)
            if name == "llama-6m":
                made[name] = first_layers(made[name], tmp_path_factory.mktemp("source") / name, 2)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def quantized(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """(model, recipe, bits) -> its directory, written by ``quantize_checkpoint`` the first time it is asked for."""
    made: dict[tuple[str, str, int], Path] = {}

    def folder(model: str, recipe: str, bits: int) -> Path:
        key = (model, recipe, bits)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantized") / f"{model}-{recipe}-{bits}"
            quantize_checkpoint(source(model), made[key], QuantizeConfig(recipe=recipe, bits=bits))
        return made[key]

    return folder


@pytest.fixture(scope="session")
def in_memory(source: Source) -> InMemory:
    """(model, recipe, bits) -> the same, by ``quantize_model`` on the loaded model. Not to be changed by a test."""
    made: dict[tuple[str, str, int], tuple[nn.Module, Report]] = {}

    def model(name: str, recipe: str, bits: int) -> tuple[nn.Module, Report]:
        import transformers

        key = (name, recipe, bits)
        if key not in made:
            dense: Any = transformers.AutoModelForCausalLM.from_pretrained(source(name), dtype="auto")
            made[key] = dense, quantize_model(dense, QuantizeConfig(recipe=recipe, bits=bits))
        return made[key]

    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with biases and an untied head, 64 tokens."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny-quantized") / "tiny-llama-4bit"
    quantize_checkpoint(tiny, out)
    return out


@pytest.fixture(scope="session")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a real tokenizer, for commands that read and write text."""
    settings = {"vocab_size": 4096, "hidden_size": 64, "max_position_embeddings": 512}
    return add_tokenizer(save_tiny(tmp_path_factory.mktemp("talking") / "talking", **settings))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs ``precal ARGUMENTS`` here; returns its exit code, stdout and stderr."""
    # What the command sets for the rest of its process is taken back after the test.
    handler = signal.getsignal(signal.SIGTERM)
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "1" if name.startswith("HF") else "error")

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:  # argparse leaves this way
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    yield command
    signal.signal(signal.SIGTERM, handler)
