"""The quantization classes, importable only where vLLM is.

vLLM fuses modules (q/k/v, gate/up) into one layer and gives each rank of a tensor-parallel group a slice of it. Its own
parameter classes cut and place what the checkpoint holds; every tensor passes a check of ours first, because they take
a part of whatever is large enough.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import GateLinear, RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.transformers_utils.config import get_safetensors_params_metadata

from precal_ext.config import QUANT_METHOD, ModelFormat, QuantizeConfig
from precal_ext.grids import constant_grid
from precal_ext.integrations._vllm_experts import PrecalMoEMethod
from precal_ext.linear import ACTIVATIONS, run_linear
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.shards import by_columns, why_not_by_columns

# Sizes named where a weight cannot be cut into as many slices as the user asks for.
TP_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)

# The block that holds the experts has one name in the checkpoint and may have another here.
_EXPERTS = re.compile(r"(.*)\.[^.]+\.experts(\.routed_experts)?$")
_EXPERT_TENSOR = re.compile(r"(.*)\.[^.]+\.experts\.\d+\.[^.]+\.weight_packed$")


def activations_wanted() -> str:
    """How far ``linear`` may round its input (``ops.linear``). An environment variable: vLLM has no options of ours."""
    found = os.environ.get("PRECAL_ACTIVATIONS", "a16")
    if found not in ACTIVATIONS:
        raise ValueError(f"precal: PRECAL_ACTIVATIONS must be one of {', '.join(ACTIVATIONS)}, got {found!r}")
    return found


@register_quantization_config(QUANT_METHOD)
class PrecalConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM asks about a precal checkpoint: which method each of its layers gets."""

    def __init__(self, fmt: ModelFormat, activations: str = "a16") -> None:
        super().__init__()
        self.format = fmt
        self.activations = activations
        self.model: str = ""
        self.revision: str | None = None

    def __repr__(self) -> str:
        c = self.format.config
        return f"PrecalConfig(recipe={c.recipe}, bits={c.bits}, group_size={c.group_size}, c={c.c})"

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # of the GPUs that the kernels are compiled for; vLLM asks on GPUs only

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # config.json has it

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PrecalConfig:
        return cls(ModelFormat.from_dict(config), activations_wanted())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Names of the checkpoint -> names of vLLM's model, where they differ; mapped as the tensors' names are."""

        def mapped(name: str) -> list[str]:
            return [n.removesuffix(".weight") for n in hf_to_vllm_mapper.apply_list([f"{name}.weight"])]

        fmt = self.format
        skipped = tuple(new for name in fmt.modules_to_not_convert for new in mapped(name))
        overrides = {new: fields for name, fields in fmt.module_overrides.items() for new in mapped(name)}
        self.format = replace(fmt, modules_to_not_convert=skipped, module_overrides=overrides)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        self.model, self.revision = model_name, revision

    @cached_property
    def layers_with_quantized_experts(self) -> frozenset[str]:
        """Names of the layers ("model.layers.3") whose experts the checkpoint holds quantized, by its headers."""
        if not self.model:
            return frozenset()
        names = get_safetensors_params_metadata(self.model, revision=self.revision)
        return frozenset(found[1] for name in names if (found := _EXPERT_TENSOR.match(name)))

    def _expert_method(self, layer: Any, prefix: str) -> Any:
        found = _EXPERTS.match(prefix)
        if found is None or found[1] not in self.layers_with_quantized_experts:
            return None  # vLLM's own, dense
        leaves = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        settings = {shard: self.format.for_module(f"{prefix}.0.{leaf}") for shard, leaf in leaves.items()}
        return PrecalMoEMethod(prefix, layer.moe_config, settings, self.activations)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, GateLinear):
            return UnquantizedLinearMethod()  # a router; transformers' are no nn.Linear, so no list names them
        if isinstance(layer, LinearBase):
            settings = self.settings_of(prefix)
            if settings is None:
                return UnquantizedLinearMethod()
            return PrecalLinearMethod(prefix, settings, self.activations)
        if isinstance(layer, ParallelLMHead):
            settings = self.settings_of(prefix)
            return None if settings is None else PrecalLinearMethod(prefix, settings, self.activations)
        if isinstance(layer, RoutedExperts):
            return self._expert_method(layer, prefix)
        return None  # embeddings and attention stay as they are

    def settings_of(self, prefix: str) -> QuantizeConfig | None:
        """Settings of the modules that were fused into a layer; None when they stay dense.

        Raises:
            ValueError: they differ, so that no one matrix can hold them.
        """
        parent, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        members = [f"{parent}.{name}" if parent else name for name in leaves]
        found = [self.format.for_module(m) if self.format.converts(m) else None for m in members]
        for member, settings in zip(members, found, strict=True):
            if _fields(settings) != _fields(found[0]):
                raise ValueError(
                    f"precal: {member} and {members[0]} must have the same settings, vLLM makes them one matrix, got "
                    f"{_describe(settings)} and {_describe(found[0])}; quantize the model again with equal ones"
                )
        return found[0]


def _fields(settings: QuantizeConfig | None) -> tuple[Any, ...] | None:
    """Those that the tensors' shapes and the kernels depend on."""
    if settings is None:
        return None
    s = settings
    return s.bits, s.group_size, s.c, s.grid_size, s.split, s.scale_dtype


def _describe(settings: QuantizeConfig | None) -> str:
    if settings is None:
        return "none (dense)"
    s = settings
    return f"bits {s.bits}, group_size {s.group_size}, c {s.c}, {s.grid_size} levels"


@register_weight_loader_v2_supported_method
class PrecalLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One linear layer or output head.

    Parameters carry the checkpoint's names until they are loaded; then the device's tile order takes their place. Where
    fused modules have grids of their own (vLLM fuses more than precal knew of), each keeps a weight of its own, and
    ``apply`` calls the op once for each.
    """

    def __init__(self, name: str, settings: QuantizeConfig, activations: str = "a16") -> None:
        self.name, self.settings, self.activations = name, settings, activations
        self.loaded: dict[str, set[Any]] = {}
        self.calls: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # buffer of the layer, arguments of the op

    # ---- before loading ----------------------------------------------------------------------------------------------
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters of this rank's part.

        Raises:
            ValueError: its columns would cut a group, a block or a word; the message has the sizes that would not.
        """
        loader = extra_weight_attrs.pop("weight_loader")
        self.sizes = list(output_partition_sizes)
        whole = WeightSpec.from_config(sum(self.sizes), input_size, self.settings)
        self.spec = self._part(whole, input_size // input_size_per_partition)
        self.whole = whole
        config = get_current_vllm_config_or_none()
        self.dummy = config is not None and config.load_config.load_format == "dummy"
        for key, (dtype, shape) in self.spec.tensors().items():
            self.loaded[key] = set()
            kind, dims = ModelWeightParameter, {"output_dim": 0, "input_dim": 1}
            if key == "weight_row_scale":
                kind, dims = ChannelQuantScaleParameter, {"output_dim": 0}
            elif key == "weight_grid":
                # One row for every fused module: vLLM lets the last of several overwrite a parameter without.
                kind, dims, shape = PerTensorScaleParameter, {}, (len(self.sizes), *shape[1:])
            elif key == "weight_shape":
                kind, dims = BasevLLMParameter, {}
            data = torch.zeros(shape, dtype=dtype)
            parameter = kind(data=data, weight_loader=self._checked(layer, key, loader), **dims)
            layer.register_parameter(key, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)

    def _part(self, whole: WeightSpec, size: int) -> WeightSpec:
        if size == 1:
            return whole
        why = why_not_by_columns(whole, size)
        if why:
            good = ", ".join(str(s) for s in TP_SIZES if not why_not_by_columns(whole, s))
            raise ValueError(
                f"precal: {self.name} must be cut into whole groups, blocks and words, got --tensor-parallel-size "
                f"{size}: {why}; sizes that cut it so: {good}"
            )
        return by_columns(whole, size)

    def _checked(self, layer: nn.Module, key: str, loader: Callable[..., None]) -> Callable[..., None]:
        """vLLM's loader after a look at what it is given: it takes a slice of any tensor that is large enough, and
        converts any dtype."""

        def load(parameter: Tensor, tensor: Tensor, *where: Any, **named: Any) -> None:
            shard = where[0] if where else named.get("loaded_shard_id")
            rows = _rows_on_disk(layer, shard)
            if rows is None:
                rows = tensor.shape[0] if key != "weight_shape" else int(tensor[0])
            dtype, shape = replace(self.whole, N=rows).tensors()[key]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{self._module(shard)}.{key}: must be {dtype} {list(shape)} by config.json, got {tensor.dtype} "
                    f"{list(tensor.shape)}; the checkpoint is damaged or is of another model"
                )
            if key == "weight_shape" and tensor.tolist() != [rows, self.whole.K]:
                raise ValueError(
                    f"{self._module(shard)}.{key}: must be [{rows}, {self.whole.K}], got {tensor.tolist()}"
                )
            loader(parameter, tensor, *where, **named)
            self.loaded[key].update(shard if isinstance(shard, tuple) else (shard,))

        return load

    def _module(self, shard: Any) -> str:
        return self.name if shard is None else f"{self.name} ({shard})"

    # ---- after loading -----------------------------------------------------------------------------------------------
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check every value, and put the device's tile order in the place of the checkpoint's tensors.

        Raises:
            ValueError: a tensor was missing or breaks the format; the message names it.
        """
        if self.calls:
            return
        if not self.dummy:
            for key, shards in self.loaded.items():
                if None not in shards and len(shards) < len(self.sizes):
                    got = ", ".join(sorted(map(str, shards))) or "nothing"
                    raise ValueError(
                        f"{self.name}.{key}: must be loaded for all {len(self.sizes)} of its parts, got {got}; the "
                        "checkpoint is incomplete"
                    )
        stored = {key: getattr(layer, key).data for key in self.loaded}
        for key in stored:
            delattr(layer, key)
        if self.dummy and "weight_grid" in stored:  # an empty one is no format
            made_up = constant_grid(self.spec.bits, self.spec.group_size, self.spec.trellis)
            stored["weight_grid"] = made_up.to(stored["weight_grid"].device).expand(len(self.sizes), -1)
        grid = stored.get("weight_grid")
        alike = grid is None or bool((grid == grid[:1]).all())
        calls, begin = [], 0
        for i, rows in enumerate([self.spec.N] if alike else self.sizes):
            spec = replace(self.spec, N=rows)
            q = QTensor(spec, _rows_of(stored, begin, rows, i, spec))
            if not self.dummy:
                q.validate(self.name)
            # Under the old name: vLLM's adapters look there for the device.
            buffer = f"weight_packed_{i}" if i else "weight_packed"
            layer.register_buffer(buffer, q.prepack(), persistent=False)
            calls.append((buffer, (*spec.op_arguments(), self.activations)))
            begin += rows
        self.calls = tuple(calls)

    # ---- use ---------------------------------------------------------------------------------------------------------
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(self.calls) == 1:
            buffer, arguments = self.calls[0]
            return run_linear(x, getattr(layer, buffer), bias, arguments)
        biases = (None,) * len(self.calls) if bias is None else bias.split(self.sizes)
        parts = [
            run_linear(x, getattr(layer, buffer), own, arguments)
            for (buffer, arguments), own in zip(self.calls, biases, strict=True)
        ]
        return torch.cat(parts, dim=-1)


def _rows_of(stored: Mapping[str, Tensor], begin: int, rows: int, index: int, spec: WeightSpec) -> dict[str, Tensor]:
    """The tensors of some of the fused modules as a weight of their own."""
    found = {key: tensor[begin : begin + rows] for key, tensor in stored.items()}
    found["weight_shape"] = torch.tensor([spec.N, spec.K])
    if "weight_grid" in stored:
        found["weight_grid"] = stored["weight_grid"][index : index + 1]
    return found


def _rows_on_disk(layer: nn.Module, shard: Any) -> int | None:
    """N, in the checkpoint, of the module that vLLM calls ``shard`` of a layer, or of all of them where it names none;
    None for parts that only some models have."""
    of: Any = layer
    rows: dict[Any, int]
    if isinstance(layer, QKVParallelLinear):
        heads, shared = of.total_num_heads, of.total_num_kv_heads
        rows = {"q": heads * of.head_size, "k": shared * of.head_size, "v": shared * of.v_head_size}
    elif isinstance(layer, VocabParallelEmbedding):
        rows = {None: of.org_vocab_size}
    elif hasattr(layer, "output_sizes"):
        rows = dict(enumerate(of.output_sizes))
    else:
        rows = {None: of.output_size}
    if shard is None:
        return sum(rows.values())
    return sum(rows[s] for s in shard) if isinstance(shard, tuple) else rows.get(shard)
