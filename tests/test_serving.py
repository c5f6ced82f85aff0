"""docs/serving.md: every recipe runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import compatibility
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


def test_the_tables_of_versions_were_made() -> None:
    rows = json.loads(compatibility.RESULTS.read_text())
    assert compatibility.rendered(TEXT, rows) == TEXT, "python tests/compatibility.py writes them"
    tried = {host: {r["versions"][host] for r in rows if r["host"] == host} for host in compatibility.HOSTS}
    assert {"4.57.6", "5.0.0"} < tried["transformers"] and tried["vllm"]
    for row in rows:
        assert set(row["outcomes"]) == set(compatibility.HOSTS[row["host"]][0])
        assert compatibility.total(row, "passed") and not compatibility.total(row, "failed")


def test_a_row_says_what_pytest_said() -> None:
    found = compatibility.outcome_in(
        "..\n= short test summary =\n2 failed, 3 passed, 1 skipped, 1 error in 12.30s (0:00:12)"
    )
    assert found == {"passed": 3, "failed": 3, "skipped": 1}


# ---- torchrun --------------------------------------------------------------------------------------------------------


def torchrun(command: str, cwd: Path, **replaced: str) -> subprocess.Popen[str]:
    """A command of the page. torchrun is a script of the environment, which may not be on the path."""
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "torchrun"
    words = [next((word.replace(a, b) for a, b in replaced.items() if a in word), word) for word in words[1:]]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *words],
        cwd=cwd,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def recipes_of_torchrun() -> list[str]:
    found = blocks("Quantizing on several processes or machines", "bash")
    assert len(found) == 2
    return found


def test_the_recipe_for_several_processes(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "MODEL", tmp_path / "MODEL")
    process = torchrun(recipes_of_torchrun()[0], tmp_path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert digests(tmp_path / "OUT") == digests(folder / "OUT")  # what `precal quantize` alone has made


def test_the_recipe_for_several_machines(folder: Path, tmp_path: Path) -> None:
    """Two of them here, each with a directory of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    machines = [tmp_path / "one", tmp_path / "two"]
    for machine in machines:
        shutil.copytree(folder / "MODEL", machine / "MODEL")  # with its times
    running = [torchrun(recipes_of_torchrun()[1], m, **{"HOST:29500": f"127.0.0.1:{port}"}) for m in machines]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    (out,) = (machine / "OUT" for machine in machines if (machine / "OUT").exists())  # rank 0 writes
    assert digests(out) == digests(folder / "OUT")


# ---- transformers serve ----------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_transformers_serve_answers(folder: Path) -> None:
    pytest.importorskip("fastapi")
    lines = [line for block in blocks("transformers", "bash") for line in block.splitlines()]
    (command,) = (line for line in lines if "transformers_cli serve" in line)
    request = json.loads(re.search(r"-d '(\{.*\})'", "".join(blocks("transformers", "bash")))[1])
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
