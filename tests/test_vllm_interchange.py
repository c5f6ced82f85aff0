"""An exported checkpoint in stock vLLM: its own kernels, no plug-in. Needs vLLM (`make test-vllm`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import Folder, Source, run_python

from precal_ext import export_checkpoint, import_checkpoint, load_quantized, set_activations

pytest.importorskip("vllm", reason="needs vLLM, which is not installed: make test-vllm")
pytest_plugins = ["package_fixtures"]

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype=sys.argv[2], enforce_eager=True, max_model_len=64, seed=0)
prompts = [{"prompt_token_ids": list(range(7 * i + 1, 7 * i + 8))} for i in range(3)]
outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16, logprobs=5))
found = []
for output in outputs:
    best = [{int(k): v.logprob for k, v in step.items()} for step in output.outputs[0].logprobs]
    found.append({"prompt": list(output.prompt_token_ids), "tokens": list(output.outputs[0].token_ids), "best": best})
assert not any(name.startswith("precal") for name in sys.modules)
json.dump(found, open(sys.argv[3], "w"))
"""
STOCK = {
    "VLLM_PLUGINS": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
# Largest difference of the five best log probabilities, in nats: about 2^-8 and 2^-11 of logits up to 13, times a few.
TOLERANCE = {"bfloat16": 0.25, "float16": 0.03}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_stock_vllm_computes_what_our_kernels_do(quantized: Folder, source: Source, tmp_path: Path, dtype: str) -> None:
    export_checkpoint(quantized("llama-6m", "precal", 4), tmp_path / "out", original=source("llama-6m"))
    done = run_python("-c", GENERATE, str(tmp_path / "out"), dtype, str(tmp_path / "found.json"), cwd=tmp_path, **STOCK)
    assert done.returncode == 0, done.stderr[-3000:]
    import_checkpoint(tmp_path / "out", tmp_path / "back")
    model = load_quantized(tmp_path / "back", dtype=torch.float32)
    set_activations(model, "f32")
    found = json.loads((tmp_path / "found.json").read_text())
    assert [len(f["tokens"]) for f in found] == [16, 16, 16]
    for f in found:
        with torch.no_grad():
            ours = model(torch.tensor([f["prompt"] + f["tokens"]])).logits[0].log_softmax(-1)
        for step, (token, best) in enumerate(zip(f["tokens"], f["best"], strict=True)):
            row = ours[len(f["prompt"]) - 1 + step]
            assert max(abs(float(row[int(k)]) - v) for k, v in best.items()) < TOLERANCE[dtype]
            assert float(row.max() - row[token]) < TOLERANCE[dtype]  # greedy, but for ties within the rounding
