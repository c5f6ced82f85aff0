"""Whole checkpoints of other methods in vLLM, by its own kernel and by ours, which it takes where its own is disabled.

Needs vLLM (`make test-vllm`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DEMO, run_python
from safetensors.torch import load_file, save_file

from precal_ext import QuantizeConfig, export_checkpoint, quantize_checkpoint

pytest.importorskip("vllm", reason="needs vLLM, which is not installed: make test-vllm")

pytestmark = pytest.mark.slow

THEIRS = "CPUWNA16LinearKernel"
LAYERS = 6 * 4  # qkv, o, gate and up, down
TOKENS = 24
# Largest difference of log probabilities, in nats: bfloat16 keeps 2^-8 of logits up to 13, through six layers.
TOLERANCE = 0.25
GENERATE = """
import gc, json, os, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=True, max_model_len=128, seed=0)
prompts = [{"prompt_token_ids": list(range(7 * i + 1, 7 * i + 8))} for i in range(4)]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True, logprobs=5))
found = []
for output in outputs:
    best = [{int(k): v.logprob for k, v in step.items()} for step in output.outputs[0].logprobs]
    found.append({"tokens": list(output.outputs[0].token_ids), "best": best})
gc.unfreeze()  # vLLM hides from gc what it made while it started
kernels = [type(o).__name__ for o in gc.get_objects() if type(o).__name__.endswith("WNA16LinearKernel")]
from precal_ext import _C
json.dump({"found": found, "kernels": kernels, "isa": _C.cpu_isa()}, open(sys.argv[3], "w"))
"""
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """llama-6m at 4 bits as compressed-tensors, by `precal export`; and the same codes and scales as GPTQ has them."""
    here = tmp_path_factory.mktemp("others")
    quantize_checkpoint(DEMO, here / "precal", QuantizeConfig(group_size=64))
    export_checkpoint(here / "precal", here / "compressed-tensors", original=DEMO)
    stored = load_file(here / "compressed-tensors/model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            scale = stored[f"{module}.weight_scale"]
            zeros = torch.full((scale.shape[1], scale.shape[0] // 8), 0x77777777, dtype=torch.int32)  # 8, less one
            tensors[f"{module}.qweight"] = tensor.t().contiguous()
            tensors[f"{module}.scales"] = scale.t().contiguous()
            tensors[f"{module}.qzeros"] = zeros
            tensors[f"{module}.g_idx"] = torch.arange(tensor.shape[1] * 8, dtype=torch.int32) // 64
        elif leaf not in ("weight_scale", "weight_shape"):
            tensors[name] = tensor
    gptq = here / "gptq"
    gptq.mkdir()
    save_file(tensors, gptq / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((here / "compressed-tensors/config.json").read_text())
    method = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    (gptq / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (gptq / file).write_bytes((DEMO / file).read_bytes())
    return {name: here / name for name in ("compressed-tensors", "gptq")}


def generate(model: Path, folder: Path, **variables: str) -> dict[str, Any]:
    out = folder / "found.json"
    done = run_python("-c", GENERATE, str(model), str(TOKENS), str(out), cwd=folder, **{**SETTINGS, **variables})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def assert_same(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> int:
    """Tokens part only at near ties, and until then the best log probabilities are the same; how many were compared."""
    compared = 0
    for a, b in zip(ours, theirs, strict=True):
        steps = zip(a["tokens"], b["tokens"], a["best"], b["best"], strict=True)
        for mine, other, best, reference in steps:
            compared += 1
            assert all(abs(best[k] - v) < TOLERANCE for k, v in reference.items() if k in best)
            if mine != other:
                first, second = sorted(reference.values(), reverse=True)[:2]
                assert first - second < TOLERANCE
                break
    return compared


@pytest.mark.parametrize("method", ["compressed-tensors", "gptq"])
def test_a_whole_model_by_our_kernel(checkpoints: dict[str, Path], tmp_path: Path, method: str) -> None:
    stock = generate(checkpoints[method], tmp_path)
    assert stock["kernels"] == [THEIRS] * LAYERS
    mine = generate(checkpoints[method], tmp_path, VLLM_DISABLED_KERNELS=THEIRS)
    assert mine["kernels"] == ["PrecalWNA16LinearKernel"] * LAYERS
    assert assert_same(mine["found"], stock["found"]) >= 2 * TOKENS  # of 4 * TOKENS
    if method == "gptq":
        avx2 = generate(checkpoints[method], tmp_path, VLLM_DISABLED_KERNELS=THEIRS, PRECAL_ISA="avx2")
        assert avx2["isa"] == "avx2" and avx2["kernels"] == mine["kernels"]
        assert assert_same(avx2["found"], stock["found"]) >= 2 * TOKENS
