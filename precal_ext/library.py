"""Loads the op libraries into torch: ``torch.ops.precal``."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from precal_ext import _C

_FOLDER = Path(__file__).resolve().parent
_LIBRARY = _FOLDER / "libprecal_torch.so"
_LIBRARY_CUDA = _FOLDER / "libprecal_torch_cuda.so"

torch.ops.load_library(str(_LIBRARY))
if torch.version.cuda is not None and _LIBRARY_CUDA.exists():
    torch.ops.load_library(str(_LIBRARY_CUDA))


def force_isa(name: str) -> None:
    """Use the kernels of one instruction set from now on, in ``torch.ops.precal`` and in ``_C``.

    Args:
        name: "scalar", "avx2", "avxvnni", "avx512", or "" for the automatic choice.
    Raises:
        ValueError: unknown, or this CPU cannot run it.
    """
    _C.force_isa(name)
    function = ctypes.CDLL(str(_LIBRARY)).precal_torch_force_isa
    message = ctypes.create_string_buffer(512)
    if function(name.encode(), message, ctypes.c_size_t(512)):
        raise ValueError(message.value.decode())
