"""Models that another method has quantized: known by what their tensors are called."""

from __future__ import annotations

from collections.abc import Iterable

# Last part of a tensor's name -> who writes it. config.json usually says so too, but not always.
_MARKS = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "SCB": "bitsandbytes",
    "weight_format": "bitsandbytes",
    "weight_row_scale": "precal",
    "weight_packed": "compressed-tensors or precal",
    "weight_zero_point": "compressed-tensors",
    "weight_scale_inv": "a float8 method",
    "W_q": "HQQ",
}


def quantized_by(names: Iterable[str]) -> tuple[str, str] | None:
    """(method, tensor that shows it) when the tensors of a model are quantized already, else None."""
    found: dict[str, str] = {}
    for name in names:
        leaf = name.rpartition(".")[2]
        mark = "absmax" if ".quant_state." in name or name.endswith("bitsandbytes__nf4") else leaf
        if mark in _MARKS:
            found.setdefault(_MARKS[mark], name)
    # precal's tensors have a name in common with compressed-tensors'; its own one tells.
    method = "precal" if "precal" in found else next(iter(found), None)
    return None if method is None else (method, found[method])
