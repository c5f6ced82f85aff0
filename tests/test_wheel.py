"""The wheel: what is in it, and that it quantizes and runs a model where there is no compiler and no source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from models import DEMO

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")

STALE = "_C.cpython-27-left-over.so"


def pip(*arguments: object, **variables: str) -> None:
    # The build tools may live in a virtual environment that is not on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "PATH": path, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, so that the tree under test keeps its own build folder and libraries."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "build", "*.egg-info", "*.so")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    # What an in-place build, perhaps of another Python or with CUDA, leaves beside the sources.
    (folder / "source" / "precal_ext" / STALE).write_bytes(b"stale")
    options = ("--no-deps", "--no-build-isolation", "-w", folder / "out")
    pip("wheel", folder / "source", *options, PRECAL_BUILD_DIR=str(folder / "build"), PRECAL_CUDA="0")
    (built,) = (folder / "out").glob("precal-*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "site"
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def run(site: Path, *arguments: str, cwd: Path) -> str:
    """Without compilers: PATH holds an empty folder."""
    empty = cwd / "empty"
    empty.mkdir(exist_ok=True)
    assert shutil.which("c++", path=str(empty)) is None
    kept = {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**kept, "PATH": str(empty), "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < 10_000_000
    assert {name.split("/")[0].split("-")[0] for name in names} == {"precal_ext", "precal"}
    assert not [name for name in names if name.endswith((".safetensors", ".cpp", ".h", ".cu"))]
    assert not [name for name in names if "demo/" in name or "csrc/" in name or "tests/" in name]
    libraries = {Path(name).name.split(".")[0] for name in names if name.endswith(".so")}
    assert {"_C", "libprecal_torch"} <= libraries
    assert "precal_ext/py.typed" in names
    assert "precal_ext/report.html.jinja" in names
    assert "precal_ext/integrations/_hf_quantizer.py" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_libraries_of_other_builds_stay_out(wheel: Path) -> None:
    names = [Path(name).name for name in zipfile.ZipFile(wheel).namelist()]
    assert STALE not in names
    assert not [name for name in names if "cuda" in name and name.endswith(".so")]  # built with PRECAL_CUDA=0


SMOKE = """
import sys
from pathlib import Path

import precal_ext
from precal_ext import _C

site = Path(sys.argv[1])
assert Path(precal_ext.__file__).is_relative_to(site), precal_ext.__file__
assert Path(_C.__file__).is_relative_to(site), _C.__file__

from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("out")
tokenizer = AutoTokenizer.from_pretrained("out")
assert type(model.model.layers[5].mlp.up_proj).__name__ == "PrecalLinear"
ids = tokenizer("The old man looked at the sea, and", return_tensors="pt")["input_ids"]
loss = model(input_ids=ids, labels=ids).loss
assert loss < 5, loss  # log(4096) = 8.3 for noise
"""


def test_a_model_without_compiler_and_source_tree(site: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    out = run(site, "-m", "precal_ext.cli", "quantize", "model", "out", "--bits", "4", cwd=tmp_path)
    assert "42 of 56 tensors quantized" in out
    run(site, "-c", SMOKE, str(site), cwd=tmp_path)


def test_the_console_script(site: Path, tmp_path: Path) -> None:
    assert run(site, str(site / "bin" / "precal"), "--version", cwd=tmp_path).startswith("precal ")
