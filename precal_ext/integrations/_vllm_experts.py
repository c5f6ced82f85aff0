"""Quantized experts of a mixture in vLLM: a weight for each of their matrices, and no work for experts without tokens.

Which experts run is read off the router's choice, so this is for the CPU, where nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.platforms import current_platform

from precal_ext.config import QuantizeConfig
from precal_ext.linear import run_linear
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.shards import by_columns, slice_columns, slice_rows

ACTIVATIONS: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: functional.silu,
    MoEActivation.GELU: functional.gelu,
    MoEActivation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
}
# vLLM's names: gate and up are two parts of one parameter.
SHARDS = {"w1": "w13_", "w3": "w13_", "w2": "w2_"}


class PrecalMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The experts of one layer.

    A matrix is checked, cut to this rank's part and put into tile order as soon as its last tensor is there, so that no
    second copy of the experts is ever held.

    Args:
        settings: of the matrices "w1" (gate), "w3" (up) and "w2" (down), the same for all experts.
    """

    def __init__(self, name: str, moe: Any, settings: Mapping[str, QuantizeConfig], rounding: str) -> None:
        super().__init__(moe)
        self.name, self.settings, self.rounding = name, settings, rounding
        self.waiting: dict[tuple[int, str], dict[str, Tensor]] = {}
        self.ready: dict[tuple[int, str], tuple[Tensor, tuple[Any, ...]]] = {}

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Parameters without elements, whose loaders take what the checkpoint has.

        Raises:
            ValueError: not on a CPU, another kind of expert, or a part that would cut a group, a block or a word.
        """
        if not current_platform.is_cpu():
            raise ValueError(f"precal: {self.name} must run on a CPU, quantized experts have no GPU path in vLLM yet")
        if self.moe.activation not in ACTIVATIONS or self.moe.has_bias:
            known = ", ".join(a.value for a in ACTIVATIONS)
            raise ValueError(
                f"precal: {self.name} must be experts without biases and with one of {known}, got "
                f"{self.moe.activation.value}" + (" and biases" if self.moe.has_bias else "")
            )
        self.count, self.ranks, self.rank = num_experts, self.moe.tp_size, self.moe.tp_rank
        inner = intermediate_size_per_partition * self.ranks
        shapes = {"w1": (inner, hidden_size), "w3": (inner, hidden_size), "w2": (hidden_size, inner)}
        self.specs = {s: WeightSpec.from_config(*shapes[s], self.settings[s]) for s in SHARDS}
        if self.ranks > 1:
            by_columns(self.specs["w2"], self.ranks)  # refuses
        self.key = (
            f"{self.name}.{sum(key.startswith(self.name + '.') for key in _LAYERS)}"  # a draft model has them too
        )
        _LAYERS[self.key] = self, layer
        for prefix in ("w13_", "w2_"):
            keys = {key for s, p in SHARDS.items() if p == prefix for key in self.specs[s].tensors()}
            for key in sorted(keys):
                parameter = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
                parameter.weight_loader = self._loader(layer, key)  # type: ignore[attr-defined]
                layer.register_parameter(prefix + key, parameter)

    def _loader(self, layer: Any, key: str) -> Callable[..., bool]:
        def load(
            param: Tensor,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if expert == -1:
                return False  # another rank's
            found = self.waiting.setdefault((expert, shard_id), {})
            found[key] = loaded_weight
            if set(found) == set(self.specs[shard_id].tensors()):
                del self.waiting[expert, shard_id]
                self._finish(expert, shard_id, expert_id, found)
            return True

        return load

    def _finish(self, expert: int, shard: str, number: int, tensors: dict[str, Tensor]) -> None:
        q = QTensor(self.specs[shard], tensors)
        q.validate(f"{self.name}.{number} ({shard})")
        if self.ranks > 1:
            cut = slice_columns if shard == "w2" else slice_rows
            q = cut(q, self.rank, self.ranks)
        self.ready[expert, shard] = q.prepack(), (*q.spec.op_arguments(), self.rounding)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises:
        ValueError: a matrix is not there, or not all of its tensors are.
        """
        for prefix in ("w13_", "w2_"):
            for name, _ in list(layer.named_parameters(recurse=False)):
                if name.startswith(prefix):
                    delattr(layer, name)
        for expert in range(self.count):
            for shard in SHARDS:
                if (expert, shard) not in self.ready:
                    got = ", ".join(self.waiting.get((expert, shard), {})) or "nothing"
                    raise ValueError(
                        f"{self.name}: expert {expert} of this rank must have all tensors of {shard}, got {got}; the "
                        "checkpoint is incomplete"
                    )

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        return _experts(x, topk_weights, topk_ids, self.key)

    def compute(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """x [tokens, H]; topk_weights, topk_ids [tokens, k]; an expert of another rank adds nothing."""
        act, local = ACTIVATIONS[layer.activation], layer.expert_map
        y = torch.zeros_like(x)
        for number in topk_ids.unique().tolist():
            expert = number if local is None else int(local[number])
            if expert < 0:
                continue
            token, k = torch.where(topk_ids == number)
            weight = topk_weights[token, k, None]
            given = x[token]
            if layer.apply_router_weight_on_input:
                given = (given * weight).to(x.dtype)
            hidden = act(self._run(given, expert, "w1")) * self._run(given, expert, "w3")
            part = self._run(hidden, expert, "w2")
            if not layer.apply_router_weight_on_input:
                part = part * weight
            y.index_add_(0, token, part.to(y.dtype))
        return y

    def _run(self, x: Tensor, expert: int, shard: str) -> Tensor:
        prepacked, arguments = self.ready[expert, shard]
        return run_linear(x, prepacked, None, arguments)


# vLLM compiles a model as one graph, which cannot depend on what the router chooses; an op of its own is opaque to it,
# and finds its layer by name.
_LAYERS: dict[str, tuple[PrecalMoEMethod, nn.Module]] = {}


@torch.library.custom_op("precal_vllm::experts", mutates_args=())
def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, key: str) -> Tensor:
    method, layer = _LAYERS[key]
    return method.compute(layer, x, topk_weights, topk_ids)


@_experts.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)
