"""Golden checkpoints: small ones with every feature of the format, which every later version must read as they are.

    python tests/golden.py       # writes tests/golden/; only a change of the format may make this necessary

One directory per recipe, each a checkpoint whose modules differ in their settings; beside it the dequantized weights as
tests/reference.py has them, which shares no code with the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import reference
import shapes
import torch
from safetensors.torch import save_file
from torch import Tensor

from precal_ext.config import ModelFormat, QuantizeConfig
from precal_ext.qtensor import PREFIX, QTensor
from precal_ext.quantize import fit_set_grid, quantize_weight

FOLDER = Path(__file__).resolve().parent / "golden"
ARGUMENTS = shapes.Weight._fields[:8]

# Module -> N, K and the fields that differ from the recipe's defaults.
Cases = dict[str, tuple[int, int, dict[str, Any]]]
CASES: dict[str, Cases] = {
    "precal": {
        **{f"bits{bits}": (3, 260, {"bits": bits}) for bits in range(2, 9)},
        **{f"bits{bits}_plain": (3, 260, {"bits": bits, "trellis": False}) for bits in (3, 4)},
        **{f"bits{bits}_uniform": (3, 260, {"bits": bits, "grid": "uniform", "trellis": False}) for bits in (2, 4, 8)},
        **{f"group{size}": (3, 260, {"bits": 3, "group_size": size}) for size in (16, 32, 128, -1)},
        "group_odd": (3, 260, {"group_size": 13}),
        **{f"c{c}": (3, 600, {"c": c}) for c in (0, 2, 16)},
        "one_row": (1, 64, {}),
        "one_column": (4, 1, {}),
        "tail_of_a_word": (17, 171, {"bits": 3}),
        "short_blocks": (2, 2304, {"bits": 3, "group_size": 32}),  # segments of 288 = 256 + 32
        "whole_blocks": (1, 4096, {"group_size": 128}),
    },
    "rtn": {
        **{f"bits{bits}": (3, 260, {"bits": bits}) for bits in range(2, 9)},
        "group32": (5, 100, {"group_size": 32}),
        "row": (5, 100, {"group_size": -1}),
    },
    "paper": {
        **{f"bits{bits}": (3, 260, {"bits": bits}) for bits in (2, 3, 4, 8)},
        "tail_of_a_byte": (5, 101, {"bits": 3, "group_size": 64}),
    },
}


def settings(recipe: str) -> ModelFormat:
    overrides = {name: fields for name, (_, _, fields) in CASES[recipe].items() if fields}
    return ModelFormat(QuantizeConfig(recipe=recipe), (), overrides)


def weight(name: str, N: int, K: int) -> Tensor:
    w = shapes.student_t(N, K, sum(name.encode()))
    if N > 2:
        w[1] = 0
    return w


def write(recipe: str) -> None:
    folder, fmt = FOLDER / recipe, settings(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, (N, K, _) in CASES[recipe].items():
        config, w = fmt.for_module(name), weight(name, N, K)
        q = quantize_weight(w, config, fit_set_grid([w], config))
        tensors.update({f"{name}.{key}": tensor for key, tensor in q.tensors.items()})
        expected[name] = dequantized(q)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, FOLDER / f"{recipe}.expected.safetensors")
    config_json = {"model_type": "golden", "quantization_config": fmt.to_dict()}
    (folder / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")


def dequantized(q: QTensor) -> Tensor:
    found = [q.tensors.get(PREFIX + name) for name in ARGUMENTS]
    return reference.dequantize(*found, q.spec.K, q.spec.bits, q.spec.group_size)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for recipe in CASES:
        write(recipe)
