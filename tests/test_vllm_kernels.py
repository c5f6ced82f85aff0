"""The kernel for checkpoints of other methods, inside vLLM's own GPTQ and compressed-tensors layers.

Needs vLLM (`make test-vllm`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import generator
from torch import Tensor

from precal_ext import ops

pytest.importorskip("vllm", reason="needs vLLM, which is not installed: make test-vllm")

from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.scalar_type import scalar_types

from precal_ext.integrations.vllm import register

register()
from precal_ext.integrations._vllm_kernels import PrecalWNA16LinearKernel

pytest_plugins = ["vllm_fixtures"]
pytestmark = pytest.mark.usefixtures("current_config")

K, GROUP = 256, 64
OURS, THEIRS = "PrecalWNA16LinearKernel", "CPUWNA16LinearKernel"


def weight(N: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales in bfloat16 [N, K / GROUP], and what they mean, in float64."""
    codes = torch.randint(0, 2**bits, (N, K), generator=generator(bits), dtype=torch.uint8)
    scale = (torch.rand(N, K // GROUP, generator=generator(1)) * 0.02 + 1e-4).bfloat16()
    dense = (codes.double() - 2 ** (bits - 1)) * scale.double().repeat_interleave(GROUP, dim=1)
    return codes, scale, dense


def compressed_tensors(N: int, bits: int) -> tuple[Any, dict[str, Tensor], Tensor]:
    codes, scale, dense = weight(N, bits)
    how = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": how}},
        "ignore": [],
    }
    stored = {
        "weight_packed": ops.pack(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([N, K]),
    }
    return get_quantization_config("compressed-tensors").from_config(config), stored, dense


def gptq(N: int, bits: int) -> tuple[Any, dict[str, Tensor], Tensor]:
    codes, scale, dense = weight(N, bits)
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "sym": True, "desc_act": False}
    stored = {
        "qweight": ops.pack(codes, bits).t().contiguous(),
        "scales": scale.t().contiguous(),
        "qzeros": torch.zeros(K // GROUP, N * bits // 32, dtype=torch.int32),
    }
    return get_quantization_config("auto_gptq").from_config(config), stored, dense


def layer_of(config: Any, stored: dict[str, Tensor], N: int) -> Any:
    prefix = "model.layers.0.mlp.down_proj"
    layer = ColumnParallelLinear(K, N, False, params_dtype=torch.bfloat16, quant_config=config, prefix=prefix)
    for key, tensor in stored.items():
        parameter = getattr(layer, key)
        parameter.weight_loader(parameter, tensor)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def error(layer: Any, dense: Tensor) -> float:
    """Largest, of bfloat16 outputs, in units of each output's own magnitude."""
    x = torch.randn(7, K, generator=generator(5)).bfloat16()
    with torch.inference_mode():
        y, _ = layer(x)
    assert y.dtype == torch.bfloat16
    magnitude = x.double().abs() @ dense.abs().t()
    return float(((y.double() - x.double() @ dense.t()).abs() / magnitude).max())


@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_of_every_width(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", THEIRS)
    config, stored, dense = compressed_tensors(64, bits)
    layer = layer_of(config, stored, 64)
    assert type(layer.scheme.kernel) is PrecalWNA16LinearKernel
    assert {name for name, _ in layer.named_parameters()} == {"weight_shape"}  # the tile order took the others' place
    assert error(layer, dense) < 2**-9  # half a unit of bfloat16 is 2^-9 of a value, and none exceeds its magnitude


def test_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", THEIRS)
    config, stored, dense = gptq(64, 4)  # other widths vLLM refuses on the CPU before it asks for kernels
    layer = layer_of(config, stored, 64)
    assert type(layer.quant_method.kernel) is PrecalWNA16LinearKernel
    assert error(layer, dense) < 2**-9


def test_vllms_own_kernel_means_the_same() -> None:
    config, stored, dense = compressed_tensors(64, 4)
    layer = layer_of(config, stored, 64)
    assert type(layer.scheme.kernel).__name__ == THEIRS
    assert error(layer, dense) < 2**-7


@pytest.mark.parametrize(
    ("weight_type", "N", "zero_points", "chosen"),
    [
        (scalar_types.uint4b8, 64, False, THEIRS),  # theirs is asked first
        (scalar_types.uint4b8, 48, False, OURS),
        (scalar_types.uint8b128, 64, False, OURS),
        (scalar_types.uint3b4, 64, False, OURS),
        (scalar_types.uint4, 48, True, None),
    ],
)
def test_who_is_chosen(weight_type: Any, N: int, zero_points: bool, chosen: str | None) -> None:
    config = MPLinearLayerConfig((K, N), (K, N), weight_type, torch.bfloat16, GROUP, zero_points)
    if chosen is None:
        with pytest.raises(ValueError, match=f"{OURS} cannot implement due to: must be symmetric integers"):
            choose_mp_linear_kernel(config)
        return
    assert choose_mp_linear_kernel(config).__name__ == chosen


def test_scales_that_would_be_rounded_are_refused() -> None:
    config = MPLinearLayerConfig((K, 48), (K, 48), scalar_types.uint8b128, torch.float32, GROUP, False)
    codes, scale, _ = weight(48, 8)
    layer = torch.nn.Module()
    layer.codes = torch.nn.Parameter(ops.pack(codes, 8), requires_grad=False)
    layer.scales = torch.nn.Parameter(scale.float() + 1e-7, requires_grad=False)
    layer.codes.output_dim = layer.scales.output_dim = 0
    kernel = PrecalWNA16LinearKernel(config, "codes", "scales")
    with pytest.raises(ValueError, match="must be finite and fit in float16 under a power of two per row"):
        kernel.process_weights_after_loading(layer)
