"""`vllm serve` of a precal checkpoint, on the CPU, asked by OpenAI's client: the same tokens as transformers.

Needs vLLM (`make test-vllm`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from models import add_tokenizer, altered, model_folder, save_tiny
from torch import Tensor

from precal_ext import QTensor, QuantizeConfig, quantize_checkpoint
from precal_ext.quantize import fit_set_grid, quantize_weight

pytest.importorskip("vllm", reason="needs vLLM, which is not installed: make test-vllm")
openai = pytest.importorskip("openai")
transformers = pytest.importorskip("transformers")

sys.path.insert(0, str(ROOT / "bench"))
from vllm_server import Server

pytestmark = pytest.mark.slow

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
PROMPTS = [
    "Once upon a time",
    "The old man looked at the sea and",
    "def main(arguments):\n    ",
    "It was the best of times, it was",
    "import",
    "She said that the house on the hill had been empty for years, but last night",
]
TOKENS = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    (folder / "chat.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Path:
    """llama-6m, 4 bits, default settings."""
    quantize_checkpoint(model_folder("llama-6m"), folder / "llama-6m-4bit")
    return folder / "llama-6m-4bit"


@pytest.fixture(scope="module")
def server(folder: Path, served: Path) -> Iterator[Server]:
    options = ("--dtype", "float32", "--max-model-len", "256", "--chat-template", str(folder / "chat.jinja"))
    with Server(served, *options, folder=folder) as running:
        yield running


def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)


def ask(server: Server, prompt: list[int], tokens: int = TOKENS) -> list[int]:
    """Greedy tokens."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = client(server).completions.create(
        model=str(server.model), prompt=prompt, max_tokens=tokens, temperature=0, extra_body=extra
    )
    return list(answer.choices[0].token_ids)


def prompts_of(folder: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


def logits_of(folder: Path, dtype: torch.dtype, ids: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].float()


def greedy(folder: Path, dtype: torch.dtype, prompts: list[list[int]], tokens: int = TOKENS) -> list[list[int]]:
    """By transformers, on the same checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # as `ignore_eos`
    found = []
    for ids in prompts:
        given = torch.tensor([ids])
        # A mask of its own: generate would take the first token for padding.
        options = {"attention_mask": torch.ones_like(given), "do_sample": False, "max_new_tokens": tokens}
        found.append(model.generate(given, **options, pad_token_id=0)[0, len(ids) :].tolist())
    return found


def test_the_plug_in_is_installed() -> None:
    found = [e.value for e in entry_points(group="vllm.general_plugins") if e.name == "precal"]
    assert set(found) == {"precal_ext.integrations.vllm:register"}, "pip install -e . first"


# ---- float32: the same tokens ----------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers(server: Server, served: Path) -> None:
    prompts = prompts_of(served)
    expected = greedy(served, torch.float32, prompts)
    assert all(len(tokens) == TOKENS for tokens in expected)
    assert [ask(server, ids) for ids in prompts] == expected


def test_the_log_names_the_method(server: Server) -> None:
    assert "quantization=precal" in server.log.read_text()


def test_completions_and_chat(server: Server) -> None:
    asked = {"model": str(server.model), "max_tokens": 16, "temperature": 0}
    text = client(server).completions.create(prompt=PROMPTS[0] + "\n", **asked).choices[0].text
    answer = client(server).chat.completions.create(messages=[{"role": "user", "content": PROMPTS[0]}], **asked)
    assert text and answer.choices[0].message.content == text  # by the template above, the same prompt
    assert answer.usage.completion_tokens == 16


def test_streaming_gives_the_same_text(server: Server) -> None:
    asked = {"model": str(server.model), "prompt": PROMPTS[1], "max_tokens": 24, "temperature": 0}
    whole = client(server).completions.create(**asked).choices[0].text
    pieces = [part.choices[0].text for part in client(server).completions.create(stream=True, **asked)]
    assert len(pieces) > 4 and "".join(pieces) == whole


def test_32_requests_at_once_get_what_each_gets_alone(server: Server, served: Path) -> None:
    prompts = [ids[: 1 + i % len(ids)] for i in range(6) for ids in prompts_of(served)][:32]
    alone = [ask(server, ids, 16) for ids in prompts[:8]]
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda ids: ask(server, ids, 16), prompts))
    assert len(together) == 32 and all(len(tokens) == 16 for tokens in together)
    assert together[:8] == alone


# ---- bfloat16, with a quantized output head --------------------------------------------------------------------------


def test_bfloat16_parts_from_transformers_only_at_near_ties(folder: Path) -> None:
    out = folder / "llama-6m-head"
    quantize_checkpoint(model_folder("llama-6m"), out, QuantizeConfig(lm_head=8))
    prompts = prompts_of(out)
    expected = greedy(out, torch.bfloat16, prompts)
    options = ("--dtype", "bfloat16", "--max-model-len", "256", "--enforce-eager")
    with Server(out, *options, folder=folder) as server:
        answers = [ask(server, ids) for ids in prompts]
    for ids, got, wanted in zip(prompts, answers, expected, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b), None)
        if first is not None:
            top = logits_of(out, torch.bfloat16, ids + wanted[:first])[-1].topk(2).values
            assert top[0] - top[1] <= 0.02, (first, top)


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def test_two_ranks_give_the_tokens_of_one(folder: Path) -> None:
    """Of down_proj each gets four of eight segments of 352 = 256 + 96 columns, of o_proj one of two blocks of 256."""
    shape = {"hidden_size": 512, "intermediate_size": 2816, "num_attention_heads": 8, "head_dim": 64}
    source = folder / "two-ranks"
    save_tiny(source, num_key_value_heads=4, vocab_size=4096, max_position_embeddings=256, **shape)
    out = folder / "two-ranks-4bit"
    quantize_checkpoint(add_tokenizer(source), out, QuantizeConfig(c=2, lm_head=8))
    prompts = prompts_of(out)
    expected = greedy(out, torch.float32, prompts, 24)
    options = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--tensor-parallel-size", "2")
    with Server(out, *options, folder=folder) as server:
        assert [ask(server, ids, 24) for ids in prompts] == expected


def test_two_stages_give_the_tokens_of_one(folder: Path, served: Path) -> None:
    prompts = prompts_of(served)[:3]
    # Compiled: with --enforce-eager vLLM 0.32 fails on the CPU, also for dense models.
    options = ("--dtype", "float32", "--max-model-len", "256", "--pipeline-parallel-size", "2")
    with Server(served, *options, folder=folder) as server:
        assert [ask(server, ids) for ids in prompts] == greedy(served, torch.float32, prompts)


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(folder: Path) -> Path:
    """A random Mixtral of four experts, two for each token; what is not an expert is quantized."""
    source, out = folder / "mixture", folder / "mixture-4bit"
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 64}
    more = {"num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 256, "num_local_experts": 4}
    save_tiny(source, "Mixtral", **shape, **more)
    quantize_checkpoint(add_tokenizer(source), out, QuantizeConfig(exclude=(r"\bexperts\b",)))
    return out


def quantized_experts(tensors: dict[str, Tensor]) -> dict[str, QTensor]:
    """Module -> its weight, at 4 bits; gate and up of a layer share a grid."""
    settings, found = QuantizeConfig(), {}
    names = [name.removesuffix(".weight") for name in tensors if ".experts." in name]
    assert len(names) == 2 * 4 * 3
    for inner in (("w1", "w3"), ("w2",)):
        for layer in ("layers.0.", "layers.1."):
            members = [n for n in names if layer in n and n.endswith(inner)]
            grid = fit_set_grid([tensors[f"{n}.weight"] for n in members], settings)
            found |= {n: quantize_weight(tensors[f"{n}.weight"], settings, grid) for n in members}
    return found


def test_experts_that_are_dense(folder: Path) -> None:
    """Qwen3-MoE, whose router vLLM asks us about."""
    source, out = folder / "qwen3-moe", folder / "qwen3-moe-4bit"
    shape = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 4096, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**shape, **heads, **experts, bos_token_id=0, eos_token_id=1)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(source)
    quantize_checkpoint(add_tokenizer(source), out, QuantizeConfig(exclude=(r"\bexperts\b",)))
    prompts = prompts_of(out)
    expected = greedy(out, torch.float32, prompts, 24)
    options = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager")
    with Server(out, *options, folder=folder) as server:
        assert [ask(server, ids, 24) for ids in prompts] == expected


def test_quantized_experts_on_two_ranks(folder: Path, mixture: Path) -> None:
    def quantize(tensors: dict[str, Tensor]) -> None:
        for module, q in quantized_experts(tensors).items():
            del tensors[f"{module}.weight"]
            tensors.update({f"{module}.{key}": tensor.clone() for key, tensor in q.tensors.items()})

    def dequantize(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"{m}.weight": q.dequantize() for m, q in quantized_experts(tensors).items()})

    prompts = prompts_of(mixture)
    expected = greedy(altered(mixture, folder / "mixture-meaning", dequantize), torch.float32, prompts, 24)
    out = altered(mixture, folder / "mixture-experts", quantize)
    options = ("--dtype", "float32", "--max-model-len", "256", "--tensor-parallel-size", "2")
    with Server(out, *options, folder=folder) as server:
        assert [ask(server, ids, 24) for ids in prompts] == expected


def test_a_size_that_cuts_blocks_stops_with_the_sizes_that_do_not(folder: Path, served: Path) -> None:
    options = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--tensor-parallel-size", "2")
    server = Server(served, *options, folder=folder)
    with pytest.raises(RuntimeError, match="vllm serve ended with"), server:
        pass
    text = server.log.read_text()
    assert "precal: model.layers.0.self_attn.o_proj must be cut into whole groups, blocks and words" in text
    assert "sizes that cut it so: 1" in text
