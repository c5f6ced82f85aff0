"""Quantized experts inside vLLM's own layer, in this process; the server with them is in test_vllm_server.py.

Needs vLLM (`make test-vllm`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import generator, student_t
from test_qtensor import quantize
from torch.nn import functional

from precal_ext import ModelFormat, PrecalLinear, QTensor, QuantizeConfig

pytest.importorskip("vllm", reason="needs vLLM, which is not installed: make test-vllm")

from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

from precal_ext.integrations.vllm import register

register()
from precal_ext.integrations._vllm import PrecalConfig
from precal_ext.integrations._vllm_experts import PrecalMoEMethod

pytest_plugins = ["vllm_fixtures"]
pytestmark = pytest.mark.usefixtures("current_config")

COUNT, HIDDEN, INNER = 3, 128, 64
SHAPES = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
PREFIX = "model.layers.0.mlp.experts"


def experts_of(fmt: ModelFormat, **more: Any) -> Any:
    config = PrecalConfig(fmt)
    config.__dict__["layers_with_quantized_experts"] = frozenset({"model.layers.0"})  # what headers would say
    arguments = {"num_experts": COUNT, "top_k": 2, "hidden_size": HIDDEN, "intermediate_size": INNER}
    runner = FusedMoEFactory(**arguments, params_dtype=torch.float32, quant_config=config, prefix=PREFIX, **more)
    return runner.routed_experts


def weights(fmt: ModelFormat) -> dict[tuple[int, str], QTensor]:
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return {
        (e, s): quantize(student_t(*SHAPES[s], seed=e), fmt.for_module(f"{PREFIX}.0.{names[s]}"))
        for e in range(COUNT)
        for s in SHAPES
    }


def fill(layer: Any, parts: dict[tuple[int, str], QTensor], skip: tuple[Any, ...] = ()) -> Any:
    for (expert, shard), q in parts.items():
        stem = "w2_" if shard == "w2" else "w13_"
        for key, tensor in q.tensors.items():
            if (expert, shard, key) != skip:
                parameter = getattr(layer, stem + key)
                parameter.weight_loader(parameter, tensor, stem + key, shard, expert, return_success=True)
    return layer


FORMATS = [
    ModelFormat(QuantizeConfig()),
    ModelFormat(QuantizeConfig(recipe="rtn", bits=3)),
    ModelFormat(QuantizeConfig(), (), {f"{PREFIX}.0.down_proj": {"bits": 6, "group_size": 32}}),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=["precal", "rtn", "down of its own"])
def test_each_token_goes_through_its_experts(fmt: ModelFormat) -> None:
    layer, parts = experts_of(fmt), weights(fmt)
    assert isinstance(layer.quant_method, PrecalMoEMethod)
    fill(layer, parts)
    layer.quant_method.process_weights_after_loading(layer)
    assert not list(layer.parameters())
    x = torch.randn(5, HIDDEN, generator=generator(1))
    ids = torch.tensor([[0, 2], [2, 0], [0, 2], [2, 0], [0, 2]])  # nobody for expert 1
    share = torch.rand(5, 2, generator=generator(2))
    with torch.inference_mode():
        y = layer.quant_method.apply(layer, x, share, ids, None, None)
        linear = {key: PrecalLinear.from_qtensor(q) for key, q in parts.items()}
        for t in range(5):
            expected = torch.zeros(HIDDEN)
            for e, p in zip(ids[t].tolist(), share[t], strict=True):
                hidden = functional.silu(linear[e, "w1"](x[t])) * linear[e, "w3"](x[t])
                expected += p * linear[e, "w2"](hidden)
            torch.testing.assert_close(y[t], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_missing_tensor_is_refused() -> None:
    fmt = FORMATS[0]
    layer = fill(experts_of(fmt), weights(fmt), (1, "w3", "weight_scale"))
    with pytest.raises(ValueError, match="expert 1 of this rank must have all tensors of w3, got weight_packed, "):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_damaged_tensor_is_refused() -> None:
    fmt = FORMATS[0]
    parts = weights(fmt)
    parts[2, "w2"].tensors["weight_scale"][0, 0] = 0x7F
    with pytest.raises(ValueError, match=r"experts\.2 \(w2\)\.weight_scale: must hold no NaN"):
        fill(experts_of(fmt), parts)


def test_experts_that_the_checkpoint_has_dense() -> None:
    config = PrecalConfig(ModelFormat(QuantizeConfig()))
    arguments = {"num_experts": COUNT, "top_k": 2, "hidden_size": HIDDEN, "intermediate_size": INNER}
    runner = FusedMoEFactory(**arguments, params_dtype=torch.float32, quant_config=config, prefix=PREFIX)
    assert not isinstance(runner.routed_experts.quant_method, PrecalMoEMethod)


def test_other_activations_are_refused() -> None:
    with pytest.raises(ValueError, match="must be experts without biases and with one of silu, gelu, gelu_tanh, got"):
        experts_of(FORMATS[0], activation="swigluoai")
