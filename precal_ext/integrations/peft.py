"""LoRA on a quantized base with PEFT, by its registration of custom modules."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners import lora

from precal_ext.linear import PrecalLinear


class LoraPrecalLinear(lora.Linear):  # type: ignore[misc]
    """PEFT's own layer around a ``PrecalLinear``, which stays as it is: adapters are trained, never merged."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "merge: the base must be dense, got a quantized one, whose codes cannot take an adapter; keep the adapter "
            "beside it, or load it on model.dequantize()"
        )


def adapted(config: LoraConfig) -> LoraConfig:
    """Tell a LoRA configuration how to adapt ``PrecalLinear``.

    Returns:
        The same object, for ``get_peft_model(model, adapted(LoraConfig(...)))`` and
        ``PeftModel.from_pretrained(model, DIR, config=adapted(LoraConfig.from_pretrained(DIR)))``.
    """
    config._register_custom_module({PrecalLinear: LoraPrecalLinear})
    return config
