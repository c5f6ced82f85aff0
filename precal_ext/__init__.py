"""precal: 4- and 3-bit weights for Hugging Face language models, without data.

>>> report = precal_ext.quantize_checkpoint("MODEL", "OUT", precal_ext.QuantizeConfig(bits=4))
>>> model = precal_ext.load_quantized("OUT")

Importing this package registers the checkpoint format with transformers. ``precal_ext.PrecalConfig`` is what
``from_pretrained(MODEL, quantization_config=)`` takes; asking for it imports transformers.
"""

from __future__ import annotations

from typing import Any

from precal_ext import waiting as _waiting  # noqa: F401  (before anything imports torch)
from precal_ext._version import __version__
from precal_ext.budget import BitPlan
from precal_ext.calibrate import Calibration, calibrate_checkpoint
from precal_ext.checkpoint import CheckpointError
from precal_ext.compensate import CompensateConfig, compensate_model
from precal_ext.compensating import compensate_checkpoint
from precal_ext.config import ModelFormat, QuantizeConfig
from precal_ext.convert import quantize_checkpoint
from precal_ext.exporting import export_checkpoint
from precal_ext.importing import import_checkpoint
from precal_ext.inplace import dequantize_model, quantize_model
from precal_ext.integrations.transformers import register_when_imported
from precal_ext.linear import PrecalLinear, set_activations
from precal_ext.model import load_quantized, save_quantized
from precal_ext.outlook import forecast_plan
from precal_ext.planner import Candidates, plan_bits
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.report import Report
from precal_ext.select import SelectionError

register_when_imported()

__all__ = [
    "BitPlan",
    "Calibration",
    "Candidates",
    "CheckpointError",
    "CompensateConfig",
    "ModelFormat",
    "PrecalLinear",
    "QTensor",
    "QuantizeConfig",
    "Report",
    "SelectionError",
    "WeightSpec",
    "__version__",
    "calibrate_checkpoint",
    "compensate_checkpoint",
    "compensate_model",
    "dequantize_model",
    "export_checkpoint",
    "forecast_plan",
    "import_checkpoint",
    "load_quantized",
    "plan_bits",
    "quantize_checkpoint",
    "quantize_model",
    "save_quantized",
    "set_activations",
]


def __getattr__(name: str) -> Any:
    if name != "PrecalConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from precal_ext.integrations._hf_quantizer import PrecalConfig
    except ImportError as error:
        raise ImportError(f"precal_ext.PrecalConfig needs transformers ({error}); pip install 'precal[hf]'") from None
    return PrecalConfig
