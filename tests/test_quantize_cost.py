"""What quantizing a model takes: memory that is bounded, an estimate before, the plan without doing it, shards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from models import Run, digests, environment, run_python, stored_tensors

from precal_ext import console, quantize_checkpoint
from precal_ext.checkpoint import INDEX_NAME, ShardWriter
from precal_ext.estimate import estimate
from precal_ext.plan import BYTES_PER_ELEMENT, plan_quantization

pytest_plugins = ["package_fixtures"]


# ---- memory ----------------------------------------------------------------------------------------------------------


def large_model(folder: Path, dtype: torch.dtype, hidden: int) -> Path:
    """A Llama of one layer whose seven matrices are equal squares, and which has no linears besides."""
    folder.mkdir()
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    leaves += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    shapes = {f"model.layers.0.{leaf}.weight": (hidden, hidden) for leaf in leaves}
    writer = ShardWriter(folder, {name: (dtype, shape) for name, shape in shapes.items()})
    for name, shape in shapes.items():
        writer.write(name, torch.randn(1, hidden).to(dtype).expand(shape))
    writer.finish()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": 8}
    config |= {
        "intermediate_size": hidden,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# The peak of a process starts with that of the one that forks it: a small one in between forgets the size of the tests.
_MEASURED = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("recipe", ["precal", "paper"])
def test_peak_memory(tmp_path: Path, dtype: torch.dtype, recipe: str) -> None:
    """The promise of docs/reliability.md, and the command's own word, held against the process."""
    hidden = 4096
    model = large_model(tmp_path / "model", dtype, hidden)
    command = [sys.executable, "-m", "precal_ext", "quantize", str(model), str(tmp_path / "out"), "--recipe", recipe]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *command], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout, int(done.stderr.splitlines()[-1]) * 1024
    assert peak <= BYTES_PER_ELEMENT * hidden * hidden + 400_000_000
    promised = re.search(r"memory at most ([\d.]+) MB", said)
    assert promised is not None
    assert peak <= float(promised[1]) * 1e6


# Blocks as small tensors are, with something that stays behind each.
HOLES = """
import ctypes, re
from precal_ext.console import return_freed_memory
trim, c = return_freed_memory(), ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def rss():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, blocks = rss(), []
for _ in range(400):
    blocks.append(c.malloc(250_000))
    ctypes.memset(blocks[-1], 1, 250_000)
    c.malloc(10_000)
for block in blocks:
    c.free(block)
freed = rss()
trim()
print(freed - before, rss() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's malloc and /proc")
def test_holes_in_the_heap_are_given_back(tmp_path: Path) -> None:
    done = run_python("-c", HOLES, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    freed, trimmed = map(int, done.stdout.split())  # kB
    assert freed > 80_000
    assert trimmed < 10_000


def test_the_heap_is_looked_after_while_quantizing(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(console, "return_freed_memory", lambda: lambda: calls.append(1))
    monkeypatch.setattr(console, "TRIM_EVERY", 1)
    assert run("quantize", tiny, tmp_path / "out", "--quiet")[0] == 0
    assert len(calls) == 29


def test_transformers_is_not_imported_by_the_command(tiny: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from precal_ext.cli import main; code = main(sys.argv[1:]); "
        "assert 'transformers' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "quantize", str(tiny), str(tmp_path / "a" / "out"), "--quiet"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quantize_checkpoint(tiny, tmp_path / "b" / "out")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")  # the same choice, by the same way


# ---- estimate and plan -----------------------------------------------------------------------------------------------


def test_the_estimate_comes_first(run: Run, tiny: Path, tmp_path: Path) -> None:
    _, out, _ = run("quantize", tiny, tmp_path / "out")
    first = out.splitlines()[0]
    found = re.fullmatch(r"memory at most [\d.]+ [MG]B, disk ([\d.]+) MB of [\d.]+ GB free, time about \d+ s", first)
    assert found is not None
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert float(found[1]) == pytest.approx(size / 1e6, abs=0.05)


def test_a_dry_run_shows_every_tensor_and_writes_nothing(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", tiny, tmp_path / "out", "--dry-run", "--outliers", 2)
    assert (code, err) == (0, "")
    assert list(tmp_path.iterdir()) == []
    lines = out.splitlines()
    assert len(lines) == 1 + 29 + 1
    row = next(line for line in lines if line.startswith("model.layers.0.mlp.up_proj.weight"))
    assert re.search(r"48 x 32 +float32 +quantize +4 +64 +2 +fitted", row)
    assert any(re.match(r"lm_head.weight +64 x 32 +float32 +keep: output head", line) for line in lines)


def test_a_dry_run_as_json_says_what_comes(run: Run, tiny: Path, tmp_path: Path) -> None:
    options = ["--max-shard-size", "8KB"]
    data = json.loads(run("quantize", tiny, tmp_path / "out", "--dry-run", "--json", *options)[1])
    assert run("quantize", tiny, tmp_path / "out", "--quiet", *options)[0] == 0
    assert data["files"] == {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    assert len(data["files"]) > 2
    report = json.loads((tmp_path / "out" / "precal_report.json").read_text())
    for planned, done in zip(data["tensors"], report["tensors"], strict=True):
        assert {k: planned[k] for k in ("tensor", "action", "reason", "shape", "dtype")} == {
            k: done[k] for k in ("tensor", "action", "reason", "shape", "dtype")
        }
        if "figures" in done:
            assert planned["bits_per_weight"] == done["figures"]["bits_per_weight"]
            assert {k: planned[k] for k in done["settings"]} == done["settings"]
    sizes = {name: t.nbytes for name, t in stored_tensors(tmp_path / "out").items()}
    assert sum(t["bytes_after"] for t in data["tensors"]) == sum(sizes.values())


def test_an_estimate_of_an_unfinished_run_says_so(tiny: Path, tmp_path: Path) -> None:
    def stop(p: object) -> None:
        raise KeyboardInterrupt

    plan = plan_quantization(tiny, tmp_path / "out")
    assert estimate(plan).recorded == 0
    calls = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny, tmp_path / "out", progress=lambda p: stop(p) if next(calls) == 20 else None)
    cost = estimate(plan_quantization(tiny, tmp_path / "out"))
    assert 10 < cost.recorded <= 21
    assert f"continues an unfinished run: {cost.recorded} of 29 tensors are recorded" in cost.lines()


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [1, 1000, 5000, 10**9])
def test_shards_and_index_are_those_of_transformers(tmp_path: Path, max_bytes: int) -> None:
    sizes = [600, 10, 2000, 300, 300, 300, 0, 700, 5000, 5001, 20, 980]
    tensors = {f"t{i}.weight": torch.full((n,), i, dtype=torch.uint8) for i, n in enumerate(sizes)}
    writer = ShardWriter(tmp_path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, max_bytes, sum(sizes))
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    split = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=max_bytes)
    assert {p.name for p in tmp_path.glob("*.safetensors")} == set(split.filename_to_tensors)
    assert split.is_sharded == (tmp_path / INDEX_NAME).exists()
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": sum(sizes), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        assert (tmp_path / INDEX_NAME).read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    ("text", "size"), [("500", 500), ("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2K", 2000), ("1TB", 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    from precal_ext.console import size_of

    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "5XB", "GB", "1e9", "nan", "5 G B"])
def test_sizes_that_are_none(run: Run, text: str) -> None:
    code, _, err = run("quantize", "m", "o", f"--max-shard-size={text}")
    assert code == 2
    assert "must be a size like 500MB or 5GB" in err
