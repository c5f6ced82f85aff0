"""The quantizer classes, importable only where transformers is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from precal_ext.checkpoint import CheckpointError, read_headers
from precal_ext.config import QUANT_METHOD, ModelFormat
from precal_ext.linear import PrecalLinear
from precal_ext.model import FORMAT_ATTRIBUTE, swap_linears


class PrecalConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a precal checkpoint, as transformers holds it.

    Args:
        **fields: as ``ModelFormat.to_dict`` writes them; checked.
    """

    def __init__(self, **fields: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.format = ModelFormat.from_dict({"quant_method": QUANT_METHOD, **fields})
        self._fields = dict(fields)

    @property
    def modules_to_not_convert(self) -> list[str]:
        return list(self.format.modules_to_not_convert)

    @classmethod
    def from_format(cls, fmt: ModelFormat) -> PrecalConfig:
        return cls.from_dict(fmt.to_dict())

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        fields = {k: v for k, v in config_dict.items() if k != "quant_method"}
        config = cls(**fields)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        # What was read is written back, so that a round trip changes nothing.
        return {"quant_method": QUANT_METHOD, **self._fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __repr__(self) -> str:
        return f"PrecalConfig {self.to_json_string()}"


class PrecalHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps linears before loading and prepacks after it; buffers carry the checkpoint's names, so loading converts
    nothing."""

    requires_calibration = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise ValueError(
                "precal: from_pretrained must be given a checkpoint that precal quantized, got a dense one; run "
                "`precal quantize MODEL OUT` first, or precal_ext.quantize_model(model) after loading"
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        stored = read_headers(Path(f) for f in checkpoint_files or () if str(f).endswith(".safetensors"))
        if not stored:
            raise CheckpointError("precal: from_pretrained must be given safetensors of a quantized model, got none")
        swap_linears(model, self.quantization_config.format, stored)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if not isinstance(module, PrecalLinear):
                continue
            try:
                module.prepack()
            except ValueError as error:
                raise CheckpointError(f"{name}: {error}") from None
        setattr(model, FORMAT_ATTRIBUTE, self.quantization_config.format)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top: gradients reach the activations

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, fmt: ModelFormat) -> None:
    """What ``save_pretrained`` looks for; an output head with a weight of its own is tied to nothing any more."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in [n for n in tied if isinstance(model.get_submodule(n.rpartition(".")[0]), PrecalLinear)]:
        del tied[name]
        model.config.tie_word_embeddings = False
    config = PrecalConfig.from_format(fmt)
    quantizer = PrecalHfQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
