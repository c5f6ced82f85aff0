"""A CPU kernel that vLLM may choose for other methods' checkpoints: symmetric integers, 2 to 8 bits.

vLLM asks its own kernels first: ours gets what they refuse (N or K that 32 does not divide, other widths than 4), or
everything under ``VLLM_DISABLED_KERNELS=CPUWNA16LinearKernel``.
"""

from __future__ import annotations

from torch import Tensor, nn
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig, register_linear_kernel
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types

from precal_ext.integrations._vllm import activations_wanted
from precal_ext.linear import run_linear
from precal_ext.uniform import split_scales, uniform_qtensor, uniform_spec

BITS = {
    scalar_types.uint2b2: 2,
    scalar_types.uint3b4: 3,
    scalar_types.uint4b8: 4,
    scalar_types.uint5b16: 5,
    scalar_types.uint6b32: 6,
    scalar_types.uint7b64: 7,
    scalar_types.uint8b128: 8,
}


class PrecalWNA16LinearKernel(MPLinearKernel):  # type: ignore[misc]
    """W = scale * (u - 2^(bits-1)), which is precal's uniform grid; the codes are kept as they are."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        if not current_platform.is_cpu():
            return False, "offered on the CPU only"
        if c.zero_points or c.weight_type not in BITS:
            return False, f"must be symmetric integers of 2 to 8 bits, got {c.weight_type}"
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        codes, scales, _ = self._get_weight_params(layer)
        K, N = self.config.partition_weight_shape
        bits = BITS[self.config.weight_type]
        spec = uniform_spec(N, K, bits, self.config.group_size)
        # GPTQ stores what compressed-tensors does, transposed.
        packed = codes.data if codes.output_dim == 0 else codes.data.t()
        parts = split_scales(scales.data if scales.output_dim == 0 else scales.data.t())
        if parts is None:
            raise ValueError(
                "precal: scales must be finite and fit in float16 under a power of two per row, got some that do not; "
                f"vLLM has other kernels with VLLM_DISABLED_KERNELS={type(self).__name__}"
            )
        prepacked = uniform_qtensor(packed, *parts, spec).prepack()
        for name in (self.w_q_name, self.w_s_name, self.w_zp_name):
            if name is not None and hasattr(layer, name):
                delattr(layer, name)
        layer.register_buffer(self.w_q_name, prepacked, persistent=False)
        self.arguments = (*spec.op_arguments(), activations_wanted())

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return run_linear(x, getattr(layer, self.w_q_name), bias, self.arguments)


register_linear_kernel(PrecalWNA16LinearKernel, PlatformEnum.CPU, "mp")
