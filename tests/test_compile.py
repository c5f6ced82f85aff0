"""Whole models in torch.compile, torch.export and AOTInductor: one graph, whatever the batch and the length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from models import tiny_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from precal_ext import quantize_model

transformers = pytest.importorskip("transformers")

SIZES = [(2, 5), (3, 7), (2, 9), (4, 17), (5, 33), (2, 5)]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Logits(nn.Module):
    """Token ids in, logits out."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        self.model = tiny_model(architecture)
        quantize_model(self.model)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


def prompt(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).reshape(batch, length) % 64


def worst(compiled: Callable[[Tensor], Tensor], model: nn.Module) -> float:
    """Largest relative difference over the sizes."""
    with torch.no_grad():
        pairs = [(compiled(prompt(*size)), model(prompt(*size))) for size in SIZES]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


heavy = pytest.mark.heavy
# 4.57 makes its positions of numbers that it reads off tensors, and its wrappers cannot be serialized.
since_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4's own code is in the way")
OTHERS = ["GPT2", "OPT", "Qwen3", "Mistral", "Gemma", "Phi", "Falcon", "GPTNeoX"]


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [
        ("Llama", "eager"),
        pytest.param("Llama", "aot_eager", marks=heavy),
        pytest.param("Llama", "inductor", marks=heavy),
        *(pytest.param(name, "eager", marks=heavy) for name in OTHERS),
    ],
)
def test_one_graph_for_every_batch_and_length(architecture: str, backend: str) -> None:
    model = Logits(architecture)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    assert worst(compiled, model) <= (1e-4 if backend == "inductor" else 0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@since_5
def test_decoding_needs_one_more() -> None:
    """A prompt and single tokens: two graphs, however many tokens there are."""
    model = tiny_model()
    quantize_model(model)
    ids = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    forward = torch.compile(model.forward, fullgraph=True, dynamic=True, backend="eager")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    x, found, position = ids, ids, torch.arange(5)
    for _ in range(8):
        with torch.no_grad():
            scores = forward(input_ids=x, past_key_values=cache, position_ids=position[None].expand(2, -1)).logits
        x, position = scores[:, -1:].argmax(-1), position[-1:] + 1
        found = torch.cat([found, x], 1)
    assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@since_5
def test_experts_break_the_graph_and_say_why() -> None:
    """A graph with all of them in it would run all of them."""
    model = Logits("Mixtral")
    with pytest.raises(Exception, match="which experts run depends on the tokens"):
        torch.compile(model, fullgraph=True, backend="eager")(prompt(2, 5))


@heavy
def test_experts_run_beside_compiled_graphs() -> None:
    model = Logits("Mixtral")
    assert worst(torch.compile(model, backend="eager"), model) == 0


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    sizes = {"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    return torch.export.export(model, (prompt(2, 7),), dynamic_shapes=sizes)


@since_5
@pytest.mark.parametrize("architecture", ["Llama", pytest.param("GPT2", marks=heavy)])
def test_export_saves_and_loads_the_quantized_model(tmp_path: Path, architecture: str) -> None:
    model = Logits(architecture)
    program = exported(model)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("precal.linear.default") == {"Llama": 14, "GPT2": 8}[architecture]
    torch.export.save(program, tmp_path / "model.pt2")
    assert worst(torch.export.load(tmp_path / "model.pt2").module(), model) == 0


@heavy
def test_a_package_compiled_ahead_of_time_runs(tmp_path: Path) -> None:
    model = Logits("Llama")
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "model.pt2"))
    assert worst(torch._inductor.aoti_load_package(path), model) < 1e-4
