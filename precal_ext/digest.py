"""The digest of a tensor, for ``precal_report.json``: what ``precal verify`` finds a flipped bit with."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes as a safetensors file holds them, hexadecimal."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()
