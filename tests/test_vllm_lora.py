"""vLLM's LoRA on our linear layers: adapters beside codes that stay as they are. Needs vLLM (`make test-vllm`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from models import DEMO
from safetensors.torch import save_file
from torch import Tensor, nn

from precal_ext import quantize_checkpoint

pytest.importorskip("vllm", reason="needs vLLM, which is not installed: make test-vllm")
openai = pytest.importorskip("openai")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(ROOT / "bench"))
from vllm_server import Server

pytestmark = pytest.mark.slow

RANK, ALPHA, TOKENS = 8, 16, 32
# Of every kind: two of three that vLLM fuses, cut by rows, cut by columns.
TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapter(folder: Path, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A directory as PEFT writes it; module -> A, B."""
    generator = torch.Generator().manual_seed(0)
    made, tensors = {}, {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            a = torch.randn(RANK, module.in_features, generator=generator) * 0.05
            b = torch.randn(module.out_features, RANK, generator=generator) * 0.05
            made[name] = a, b
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    return made


def greedy(model: nn.Module, ids: list[int]) -> list[int]:
    given = torch.tensor([ids])
    options = {"attention_mask": torch.ones_like(given), "do_sample": False, "max_new_tokens": TOKENS}
    return model.generate(given, **options, pad_token_id=0)[0, len(ids) :].tolist()


def test_an_adapter_gives_the_tokens_of_transformers_with_it(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    quantize_checkpoint(DEMO, out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    made = adapter(tmp_path / "ADAPTER", model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    prompts = [tokenizer(text)["input_ids"] for text in ("Once upon a time", "def main(", "It was")]
    plain = [greedy(model, ids) for ids in prompts]
    for name, (a, b) in made.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, given, y, a=a, b=b: y + given[0] @ a.t() @ b.t() * (ALPHA / RANK)
        )
    tuned = [greedy(model, ids) for ids in prompts]
    assert all(one != other for one, other in zip(plain, tuned, strict=True))

    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--enable-lora"]
    options += ["--max-lora-rank", str(RANK), "--lora-modules", f"tuned={tmp_path / 'ADAPTER'}"]
    with Server(out, *options, folder=tmp_path) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)

        def ask(name: str, ids: list[int]) -> list[int]:
            extra = {"return_token_ids": True, "ignore_eos": True}
            answer = client.completions.create(
                model=name, prompt=ids, max_tokens=TOKENS, temperature=0, extra_body=extra
            )
            return list(answer.choices[0].token_ids)

        assert [ask("tuned", ids) for ids in prompts] == tuned
        assert [ask(str(out), ids) for ids in prompts] == plain
