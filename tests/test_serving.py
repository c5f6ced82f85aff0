"""docs/serving.md: every recipe runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT
from models import DEMO, digests, environment, first_layers, run_python, sha256

from precal_ext.cli import main

pytest.importorskip("transformers")
TEXT = (ROOT / "docs" / "serving.md").read_text()


def blocks(section: str, language: str) -> list[str]:
    """The code of one language in a section of the page."""
    found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found is not None
    return re.findall(rf"^```{language}\n(.*?)^```$", found[1], re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with MODEL, a trained model and its tokenizer, and OUT, made by the command of the page."""
    here = tmp_path_factory.mktemp("serving")
    first_layers(DEMO, here / "MODEL", 2)
    commands = [line for block in blocks("transformers", "bash") for line in block.splitlines()]
    (command,) = (line for line in commands if line.startswith("precal quantize"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        assert main(shlex.split(command)[1:]) == 0
    return here


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.heavy)])
def test_the_recipes_for_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    pytest.importorskip("peft")
    found = blocks("transformers", "python")
    assert len(found) >= 6
    code = "\n".join(found)
    if backend != "inductor":  # which is what stands there
        assert "dynamic=True)" in code
        code = code.replace("dynamic=True)", f"dynamic=True, backend={backend!r})")
    monkeypatch.chdir(folder)
    exec(compile(code, "docs/serving.md", "exec"), {"__name__": "recipes"})
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert sha256(folder / "SAVED" / "model.safetensors") == sha256(folder / "OUT" / "model.safetensors")
    assert {"ADAPTER/adapter_model.safetensors", "DENSE/model.safetensors", "model.pt2"} <= set(digests(folder))


def test_the_table_of_versions_was_made() -> None:
    table = re.search(r"<!-- begin compatibility.*?-->\n(.*?)<!-- end compatibility -->", TEXT, re.DOTALL)
    assert table is not None
    versions = re.findall(r"^\| (\d+\.\d+\.\d+) \|", table[1], re.MULTILINE)
    assert {"4.57.6", "5.0.0"} <= set(versions) and len(versions) >= 3
    assert " failed" not in table[1]


@pytest.mark.heavy
def test_transformers_serve_answers(folder: Path) -> None:
    pytest.importorskip("fastapi")
    lines = [line for block in blocks("transformers", "bash") for line in block.splitlines()]
    (command,) = (line for line in lines if "transformers_cli serve" in line)
    request = json.loads(re.search(r"-d '(\{.*\})'", TEXT)[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    arguments = [port if a == "8000" else a for a in shlex.split(command)[1:]]
    server = subprocess.Popen(
        [sys.executable, *arguments], cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    address = f"http://localhost:{port}"
    try:
        for _ in range(240):
            assert server.poll() is None, server.communicate()[0]
            try:
                urllib.request.urlopen(address + "/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        headers = {"Content-Type": "application/json"}
        asked = urllib.request.Request(address + "/v1/completions", json.dumps(request).encode(), headers)
        answer = json.load(urllib.request.urlopen(asked, timeout=120))
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert answer["usage"]["completion_tokens"] == request["max_tokens"]
    code = f"""
import precal_ext, transformers
model = transformers.AutoModelForCausalLM.from_pretrained("OUT", dtype="auto")
tokenizer = transformers.AutoTokenizer.from_pretrained("OUT")
ids = tokenizer({request["prompt"]!r}, return_tensors="pt")["input_ids"]
tokens = model.generate(ids, max_new_tokens={request["max_tokens"]}, do_sample=False)
print(repr(tokenizer.decode(tokens[0, ids.shape[1]:], skip_special_tokens=True)))
"""
    done = run_python("-c", code, cwd=folder)
    assert repr(answer["choices"][0]["text"]) == done.stdout.strip(), done.stderr
