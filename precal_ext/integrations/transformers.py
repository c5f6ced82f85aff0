"""Registers precal with transformers: ``from_pretrained`` of a quantized checkpoint, ``save_pretrained`` of one.

transformers has no entry points for quantizers, so ``import precal_ext`` must run first; it waits for transformers to
be imported and registers then (``register_when_imported``), because importing transformers takes seconds.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any

from precal_ext.config import ModelFormat
from precal_ext.model import attach_hooks

_HOST = "transformers.quantizers.auto"
logger = logging.getLogger("precal")


class _Hook(importlib.abc.MetaPathFinder):
    """Lets the import of the host module pass, then registers."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        loader = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _try_to_register()

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Register now if transformers is loaded, else as soon as it is."""
    if attach not in attach_hooks:
        attach_hooks.append(attach)
    if _HOST in sys.modules:
        _try_to_register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


def _try_to_register() -> None:
    """A transformers that precal does not fit must still import."""
    try:
        register()
    except Exception as error:
        version = getattr(sys.modules.get("transformers"), "__version__", "of unknown version")
        logger.warning("precal cannot register with transformers %s: %s; it needs 4.57 or newer", version, error)


def register() -> None:
    """Make ``quant_method: precal`` known to transformers. Does nothing the second time."""
    auto = sys.modules[_HOST]
    if "precal" in auto.AUTO_QUANTIZER_MAPPING:
        return
    from precal_ext.integrations import _hf_quantizer

    if not hasattr(_hf_quantizer, "PrecalHfQuantizer"):
        return  # its own import brought us here; it registers at its end
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["precal"] = _hf_quantizer.PrecalConfig
    auto.AUTO_QUANTIZER_MAPPING["precal"] = _hf_quantizer.PrecalHfQuantizer


def attach(model: Any, fmt: ModelFormat) -> None:
    """Give a transformers model quantized in memory what ``save_pretrained`` looks for; other modules need nothing."""
    host = sys.modules.get("transformers.modeling_utils")
    if host is not None and isinstance(model, host.PreTrainedModel):
        from precal_ext.integrations import _hf_quantizer

        _hf_quantizer.attach(model, fmt)
