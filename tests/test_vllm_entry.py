"""The plug-in for vLLM where there is no vLLM: found by its entry point, and no harm done."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import ROOT
from models import run_python

import precal_ext
from precal_ext.integrations import vllm

GROUP, TARGET = "vllm.general_plugins", "precal_ext.integrations.vllm:register"


def test_vllm_finds_the_plug_in() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == {"precal": TARGET}
    installed = [e for e in entry_points(group=GROUP) if e.name == "precal"]
    if not installed:
        pytest.skip("needs an installed precal, which has entry points; this one is a folder on the path")
    assert {e.value for e in installed} == {TARGET}
    assert installed[0].load() is vllm.register


def test_importing_the_plug_in_imports_no_vllm(tmp_path: Path) -> None:
    code = "import sys, precal_ext.integrations.vllm; assert not [m for m in sys.modules if m.split('.')[0] == 'vllm']"
    done = run_python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_registering_says_so_and_goes_on() -> None:
    package = Path(precal_ext.__file__).resolve().parents[1]
    code = "from precal_ext.integrations.vllm import register; register(); register(); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "alive\n"
    assert "precal cannot register with vLLM (not installed)" in done.stderr and vllm.NEEDS in done.stderr
