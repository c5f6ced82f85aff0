"""precal: 4- and 3-bit weights for Hugging Face language models, without data.

>>> report = precal_ext.quantize_checkpoint("MODEL", "OUT", precal_ext.QuantizeConfig(bits=4))
>>> model = precal_ext.load_quantized("OUT")

Importing this package registers the checkpoint format with transformers.
"""

from precal_ext._version import __version__
from precal_ext.checkpoint import CheckpointError
from precal_ext.config import ModelFormat, QuantizeConfig
from precal_ext.convert import quantize_checkpoint
from precal_ext.exporting import export_checkpoint
from precal_ext.importing import import_checkpoint
from precal_ext.integrations.transformers import register_when_imported
from precal_ext.linear import PrecalLinear, set_activations
from precal_ext.model import load_quantized, quantize_model, save_quantized
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.report import Report
from precal_ext.select import SelectionError

register_when_imported()

__all__ = [
    "CheckpointError",
    "ModelFormat",
    "PrecalLinear",
    "QTensor",
    "QuantizeConfig",
    "Report",
    "SelectionError",
    "WeightSpec",
    "__version__",
    "export_checkpoint",
    "import_checkpoint",
    "load_quantized",
    "quantize_checkpoint",
    "quantize_model",
    "save_quantized",
    "set_activations",
]
