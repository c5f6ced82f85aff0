"""Checkpoints as GPTQ, AWQ and compressed-tensors write them, packed code by code; what they mean in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import save_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 16
# Every size fills whole words at 2, 3, 4 and 8 bits.
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Codes:
    """W = scale * (u - zero); ``group`` says which group a column is of."""

    u: np.ndarray  # [N, K]
    scale: Tensor  # [N, G]
    zero: np.ndarray  # [N, G]
    group: np.ndarray  # [K]
    bits: int

    def dense(self) -> Tensor:
        """float64 [N, K]."""
        scale = self.scale.double().numpy()
        return torch.from_numpy(scale[:, self.group] * (self.u.astype(float) - self.zero[:, self.group]))


def random_codes(w: Tensor, bits: int, seed: int, group_size: int = GROUP) -> Codes:
    """Of the shape of a weight, symmetric, about as large as weights are."""
    rng = np.random.default_rng(seed)
    N, K = w.shape
    u = rng.integers(0, 2**bits, (N, K))
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, (N, K // group_size)) * 0.2 / 2**bits).half()
    zero = np.full((N, K // group_size), 2 ** (bits - 1))
    return Codes(u, scale, zero, np.arange(K) // group_size, bits)


def asymmetric(codes: Codes) -> Codes:
    zero = np.random.default_rng(7).integers(1, 2**codes.bits, codes.zero.shape)
    return replace(codes, zero=zero)


def reordered(codes: Codes) -> Codes:
    return replace(codes, group=np.random.default_rng(8).permutation(codes.group))


def _words(rows: list[list[int]], bits: int) -> np.ndarray:
    """[words, columns]: GPTQ's packing down the rows; ``rows[i][n]`` is code i of column n."""
    columns = len(rows[0])
    packed = []
    if bits == 3:  # 10 codes, one cut 2 + 1; 10 codes, one cut 1 + 2; 10 codes
        for i in range(0, len(rows), 32):
            words = [[0] * columns for _ in range(3)]
            for n in range(columns):
                c = [rows[i + j][n] for j in range(32)]
                words[0][n] = sum(c[j] << 3 * j for j in range(10)) | (c[10] & 3) << 30
                words[1][n] = c[10] >> 2 | sum(c[11 + j] << (3 * j + 1) for j in range(10)) | (c[21] & 1) << 31
                words[2][n] = c[21] >> 1 | sum(c[22 + j] << (3 * j + 2) for j in range(10))
            packed += words
    else:
        for i in range(0, len(rows), 32 // bits):
            packed.append([sum(rows[i + j][n] << bits * j for j in range(32 // bits)) for n in range(columns)])
    return np.array(packed, dtype=np.uint32).view(np.int32)


def gptq(codes: Codes, version: int = 1) -> dict[str, Tensor]:
    stored = (codes.zero - (1 if version == 1 else 0)) % 2**codes.bits
    return {
        "qweight": torch.from_numpy(_words(codes.u.T.tolist(), codes.bits)),
        "qzeros": torch.from_numpy(_words(stored.tolist(), codes.bits).T.copy()),
        "scales": codes.scale.t().contiguous(),
        "g_idx": torch.from_numpy(codes.group.astype(np.int32)),
    }


def awq(codes: Codes) -> dict[str, Tensor]:
    def words(matrix: np.ndarray) -> Tensor:  # [rows, N] -> [rows, N / 8]
        rows = []
        for row in matrix.tolist():
            eights = [row[i : i + 8] for i in range(0, len(row), 8)]
            rows.append([sum(e[n] << 4 * i for i, n in enumerate((0, 2, 4, 6, 1, 3, 5, 7))) for e in eights])
        return torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))

    return {"qweight": words(codes.u.T), "qzeros": words(codes.zero.T), "scales": codes.scale.t().contiguous()}


def compressed_tensors(codes: Codes) -> dict[str, Tensor]:
    """Packed by that package itself."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (codes.bits - 1)
    found = {
        "weight_packed": pack_to_int32(torch.from_numpy(codes.u - half).to(torch.int8), codes.bits),
        "weight_scale": codes.scale,
        "weight_shape": torch.tensor(codes.u.shape),
    }
    if not (codes.zero == half).all():
        zero = torch.from_numpy(codes.zero - half).to(torch.int8)
        found["weight_zero_point"] = pack_to_int32(zero, codes.bits, packed_dim=0)
    return found


def ct_settings(bits: int = 4, symmetric: bool = True, group_size: int = GROUP) -> dict[str, Any]:
    size = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme = {"num_bits": bits, "type": "int", "symmetric": symmetric, **size}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}

Pack = Callable[[Codes], dict[str, Tensor]]


def packed_model(
    folder: Path,
    settings: dict[str, Any],
    pack: Pack,
    change: Callable[[Codes], Codes] = lambda codes: codes,
    bits: int = 4,
    group_size: int = GROUP,
    architecture: str = "Llama",
    keep: Callable[[str], bool] = lambda module: False,
    **sizes: Any,
) -> tuple[Path, dict[str, Codes]]:
    """A random model whose layers are packed, but for those to ``keep``, beside ``folder``/dense, the same model in
    float32; and its codes."""
    source = save_tiny(folder / "dense", architecture, **{**SIZES, **sizes})
    tensors = load_file(source / "model.safetensors")
    made: dict[str, Codes] = {}
    packed = {}
    for i, name in enumerate(sorted(tensors)):
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or not module.endswith(("_proj", ".w1", ".w2", ".w3")) or keep(module):
            packed[name] = tensors[name]
            continue
        w = tensors[name]
        made[module] = change(random_codes(w, bits, i, w.shape[1] if group_size == -1 else group_size))
        tensors[name] = made[module].dense().float()
        packed.update({f"{module}.{key}": value for key, value in pack(made[module]).items()})
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = folder / "packed"
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file({k: v.contiguous() for k, v in packed.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out, made
