"""The quantizer classes, importable only where transformers is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from precal_ext.checkpoint import CheckpointError, TensorInfo, read_headers, read_index, read_tensor
from precal_ext.config import QUANT_METHOD, ModelFormat, QuantizeConfig
from precal_ext.experts import PrecalExperts
from precal_ext.inplace import Quantizing, dequantize_model, quantize_model
from precal_ext.integrations.transformers import register
from precal_ext.linear import PrecalLinear
from precal_ext.model import FORMAT_ATTRIBUTE, swap_linears
from precal_ext.report import Report
from precal_ext.sites import precal_modules

try:
    from transformers.core_model_loading import ConversionOps
except ImportError:  # version 4, which calls create_quantized_param
    ConversionOps = None


class PrecalConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` for transformers: what to do with a dense model, or what a checkpoint says of itself.

    ``from_pretrained(MODEL, quantization_config=PrecalConfig(bits=4))`` quantizes while it loads.

    Args:
        **fields: those of ``QuantizeConfig``; or, with ``format_version``, as ``ModelFormat.to_dict`` writes them.
    Attributes:
        settings: what to do with a dense model; None for a checkpoint's.
        format: what the modules of a quantized model have; None until there is one.
        report: what was done to a model that was quantized while it was loaded.
    """

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.settings: QuantizeConfig | None = None
        self.format: ModelFormat | None = None
        self.report: Report | None = None
        if "format_version" in fields:
            self.format = ModelFormat.from_dict({"quant_method": QUANT_METHOD, **fields})
            self._fields = dict(fields)
        else:
            self.settings = QuantizeConfig.from_dict(fields)
            self._fields = self.settings.to_dict()

    @property
    def modules_to_not_convert(self) -> list[str]:
        return [] if self.format is None else list(self.format.modules_to_not_convert)

    @classmethod
    def from_format(cls, fmt: ModelFormat) -> PrecalConfig:
        return cls.from_dict(fmt.to_dict())

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        fields = {k: v for k, v in config_dict.items() if k != "quant_method"}
        config = cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config

    def done(self, fmt: ModelFormat, report: Report) -> None:
        """Become the config of the model that was made."""
        self.settings, self.format, self.report = None, fmt, report
        self._fields = {k: v for k, v in fmt.to_dict().items() if k != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        # What was read is written back, so that a round trip changes nothing.
        return {"quant_method": QUANT_METHOD, **self._fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"PrecalConfig {self.to_json_string()}"


class PrecalHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """A quantized checkpoint: swaps linears before loading, prepacks after it; buffers carry the checkpoint's names, so
    loading converts nothing.

    A dense one: takes each weight from the loader as it comes and quantizes a fusion set when it has all of it, so that
    only one set is dense at a time.
    """

    requires_calibration = False

    def __init__(self, quantization_config: PrecalConfig, **kwargs: Any) -> None:
        # A copy: the caller's describes what to do, and may do it with another model too.
        super().__init__(copy.copy(quantization_config), **kwargs)
        self._work: Quantizing | None = None
        self._streamed: frozenset[str] = frozenset()
        self._failed: Exception | None = None  # the loader would log what a step raises, and go on
        self._stored: dict[str, TensorInfo] = {}  # the checkpoint's tensors of quantized weights, by name in the model

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized and config.format is None:
            ModelFormat.from_dict(config.to_dict())  # says what is wrong with it
        if not self.pre_quantized and config.settings is None:
            raise ValueError(
                "precal: quantization_config must say what to do with a dense model, as PrecalConfig(bits=4) does, got "
                "that of a quantized checkpoint; or run `precal quantize MODEL OUT` and load OUT"
            )
        places = device_map.values() if isinstance(device_map, Mapping) else ()
        if not self.pre_quantized and "disk" in [str(place) for place in places]:
            raise ValueError(
                "precal: device_map must leave no part on the disk while a model is quantized, got one that does; run "
                "`precal quantize MODEL OUT`, which needs little memory, and load OUT"
            )

    # ---- before and after the loader -------------------------------------------------------------------------------
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if config.format is not None:
            stored = _headers(model, kwargs.get("checkpoint_files"))
            swapped = swap_linears(model, config.format, stored)
            for name, source in swapped.items():
                module = model.get_submodule(name)
                _stand_in(module)
                self._stored |= {f"{name}.{key}": stored[f"{source}.{key}"] for key in module.spec.tensors()}
            if any(isinstance(module, PrecalExperts) for module in model.modules()):
                _say_nothing_of(model, r"\.experts\.(\d+\.\w+\.weight|\w+_proj)_\w+$")
        elif not config.settings.skip_nonfinite:  # which reads all weights before it decides
            self._work = Quantizing(model, config.settings)
            # A tied weight may come later, or not at all.
            tied = {self._work.sites[name].parameter for name in self._work.tied}
            self._streamed = frozenset(self._work.pending) - tied
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if config.format is None:
            self._finish(model)
        for tensor, info in self._stored.items():
            owner, _, key = tensor.rpartition(".")
            buffers = model.get_submodule(owner)._buffers
            if not _is_loaded(buffers[key]):  # 5.0 mistakes tensors of experts for dense ones and leaves them
                buffers[key] = read_tensor(info).to(buffers[key].device)
        for name, module in precal_modules(model):
            module.__dict__.pop("weight", None)
            try:
                module.prepack()
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from None
        setattr(model, FORMAT_ATTRIBUTE, config.format)
        model.config.quantization_config = config
        return model

    # ---- while a dense model is loaded -----------------------------------------------------------------------------
    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self._streamed or (ConversionOps is None and param_name in self._stored)

    def get_quantize_ops(self) -> Any:
        return _Take(self)

    def take(self, model: nn.Module, parameter: str, value: Tensor | None = None) -> None:
        """A weight from the loader, or from the model."""
        assert self._work is not None
        if self._failed is not None:
            return
        try:
            made = self._work.take(parameter, value)
        except (ValueError, TypeError) as error:
            self._failed = error
            return
        for name, q in made.items():
            site = self._work.sites[name]
            module = PrecalLinear.unpacked(q, site.bias)
            _stand_in(module)
            site.put(model, module)

    def create_quantized_param(self, model: Any, value: Tensor, name: str, device: Any, *args: Any, **kw: Any) -> None:
        """Version 4, for every tensor that ``param_needs_quantization``."""
        info = self._stored.get(name)
        if info is None:
            self.take(model, name, value.to(device))
            return
        # Read again: the value was cast to the model's dtype.
        module, _, key = name.rpartition(".")
        model.get_submodule(module)._buffers[key] = _loaded(read_tensor(info).to(device))

    def _finish(self, model: nn.Module) -> None:
        """What the loader did not bring: weights that it tied or made up, or all of them."""
        config = self.quantization_config
        if self._work is None:
            report = quantize_model(model, config.settings)
            config.done(getattr(model, FORMAT_ATTRIBUTE), report)
            return
        for parameter in self._work.pending:
            self.take(model, parameter)
        if self._failed is not None:
            raise self._failed
        config.done(self._work.format(), self._work.report())
        self._work = None
        untie(model)

    # ---- sizes -----------------------------------------------------------------------------------------------------
    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element that a tensor will take, for ``device_map="auto"``."""
        if param_name not in self._streamed or self._work is None:
            return float(param.element_size())
        return self._work.stored_bits(param_name) / 8 / max(1, param.numel())

    def get_special_dtypes_update(self, model: Any, dtype: torch.dtype) -> dict[str, Any]:
        """The same for version 4, which knows whole, half and quarter bytes."""
        if self._work is None:
            return {}
        from accelerate.utils import CustomDtype

        bits = {p: self._work.stored_bits(p) / model.get_parameter(p).numel() for p in self._streamed}
        return {p: torch.int8 if b > 5 else CustomDtype.INT4 for p, b in bits.items()}

    # ---- what it can do --------------------------------------------------------------------------------------------
    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """Dense linears with the weights that the quantized ones stand for."""
        dequantize_model(model, dtype)
        self.remove_quantization_config(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top: gradients reach the activations

    @property
    def is_compileable(self) -> bool:
        return True


class _Take(ConversionOps or object):  # type: ignore[misc]
    """The loader's last step for a weight: nothing is left of it to load."""

    def __init__(self, quantizer: PrecalHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        others = {}
        for name, value in input_dict.items():
            if not self.quantizer.param_needs_quantization(model, name):
                others[name] = value
                continue
            self.quantizer.take(model, name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return others


def _stand_in(module: PrecalLinear) -> None:
    """While it is loaded, a model may initialize weights of its children (GPT-2), but none that says it is done."""
    module.__dict__["weight"] = _loaded(torch.empty(0))


def _loaded(tensor: Tensor) -> Tensor:
    """Mark a tensor as transformers does."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def _is_loaded(tensor: Tensor) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)


def _say_nothing_of(model: Any, pattern: str) -> None:
    """No word of keys that transformers finds missing or unexpected and that we know to be there."""
    for name in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
        known = getattr(model, name, None)
        setattr(model, name, known | {pattern} if isinstance(known, set) else [*(known or ()), pattern])


def _headers(model: Any, files: Any) -> Mapping[str, TensorInfo]:
    """Every tensor of the checkpoint that is being loaded."""
    if files is None:  # version 4 keeps them to itself
        from transformers.utils import cached_file

        config = model.config
        revision = getattr(config, "_commit_hash", None)
        path = cached_file(config.name_or_path, "config.json", revision=revision, local_files_only=True)
        return read_index(Path(path).parent)
    stored = read_headers(Path(f) for f in files if str(f).endswith(".safetensors"))
    if not stored:
        raise CheckpointError("precal: from_pretrained must be given safetensors of a quantized model, got none")
    return stored


def untie(model: Any) -> None:
    """An output head with a weight of its own is tied to nothing any more."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in [n for n in tied if isinstance(model.get_submodule(n.rpartition(".")[0]), PrecalLinear)]:
        del tied[name]
    if isinstance(model.get_output_embeddings(), PrecalLinear):
        model.config.tie_word_embeddings = False


def attach(model: Any, fmt: ModelFormat) -> None:
    """What ``save_pretrained`` looks for."""
    untie(model)
    config = PrecalConfig.from_format(fmt)
    quantizer = PrecalHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD


register()
