"""docs/serving.md: the recipes for vLLM run as they stand on the CPU; of those for a GPU, vLLM takes the options.

Needs vLLM (`make test-vllm`).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from models import DEMO
from test_serving import blocks

from precal_ext.cli import main

pytest.importorskip("vllm", reason="needs vLLM, which is not installed: make test-vllm")

sys.path.insert(0, str(ROOT / "bench"))
from vllm_server import Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with OUT, made by the command of the page."""
    here = tmp_path_factory.mktemp("recipes")
    shutil.copytree(DEMO, here / "MODEL")
    (command,) = (line for line in lines("bash") if line.startswith("precal quantize"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        assert main(shlex.split(command)[1:]) == 0
    return here


def lines(language: str) -> list[str]:
    return [line for block in blocks("vLLM", language) for line in block.replace("\\\n", " ").splitlines()]


def test_the_server_and_the_offline_engine_say_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = (line for line in lines("bash") if line.startswith("vllm serve OUT"))
    options = shlex.split(command)[3:]
    at = options.index("--port")
    del options[at : at + 2]  # a free one
    (curl,) = (line for line in lines("bash") if line.startswith("curl"))
    request = json.loads(re.search(r"-d '(\{.*\})'", curl)[1])
    monkeypatch.chdir(folder)
    with Server(Path("OUT"), *options, folder=folder) as server:
        address = shlex.split(curl)[1].replace("http://localhost:8000", server.url)
        asked = urllib.request.Request(address, json.dumps(request).encode(), {"Content-Type": "application/json"})
        answer = json.load(urllib.request.urlopen(asked, timeout=120))
    assert answer["usage"]["completion_tokens"] == request["max_tokens"]
    (code,) = blocks("vLLM", "python")
    (folder / "offline.py").write_text(code)
    # With the server's settings, and what it has compiled.
    done = subprocess.run(
        [sys.executable, "offline.py"], cwd=folder, env=server.environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"said: {answer['choices'][0]['text']}" in done.stdout


def test_vllm_takes_the_options_for_a_gpu() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    commands = [shlex.split(line) for line in lines("console") if line.startswith("vllm serve OUT")]
    assert len(commands) == 3
    parsed = [parser.parse_args(["--model", *command[2:]]) for command in commands]
    assert [p.model for p in parsed] == ["OUT"] * 3
    assert [p.tensor_parallel_size for p in parsed] == [1, 2, 8]
    with pytest.raises(SystemExit):
        parser.parse_args(["--model", "OUT", "--tensor-parallel-sizes-of-nothing", "2"])
