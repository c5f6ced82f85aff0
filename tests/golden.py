"""Golden checkpoints of format version 1: small ones with every feature, which every later version reads to the bit.

    python tests/golden.py            # writes what is not there yet of tests/golden/v1; nothing that is there changes
    python tests/golden.py --today    # today.json alone: what today's quantizer makes of the same weights

`precal`, `rtn` and `paper` are tensors of modules that differ in their settings, `llama`, `gpt2` and `mixtral` whole
models. `digests.json` has the SHA-256 of every file and, by tests/format_reader.py, of every weight. Weights come out
of SHAKE-256 and correctly rounded arithmetic, so that every machine has the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import format_reader
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from precal_ext import quantize_checkpoint
from precal_ext.config import MODULE_FIELDS, ModelFormat, QuantizeConfig
from precal_ext.quantize import fit_set_grid, quantize_weight

FOLDER = Path(__file__).resolve().parent / "golden" / "v1"

# Module -> N, K and the fields that differ from the recipe's defaults.
Cases = dict[str, tuple[int, int, dict[str, Any]]]
CASES: dict[str, Cases] = {
    "precal": {
        **{f"bits{bits}": (3, 260, {"bits": bits}) for bits in range(2, 9)},
        **{f"bits{bits}_plain": (3, 260, {"bits": bits, "trellis": False}) for bits in range(2, 7)},
        **{f"bits{bits}_uniform": (3, 260, {"bits": bits, "grid": "uniform"}) for bits in range(2, 9)},
        "constant": (3, 260, {"grid": "constant"}),
        **{f"group{size}": (3, 260, {"bits": 3, "group_size": size}) for size in (16, 32, 128, -1)},
        "group_odd": (3, 260, {"group_size": 13}),
        "group_of_one": (2, 40, {"group_size": 1}),
        "group_beyond_the_row": (2, 40, {"group_size": 1024}),
        **{f"c{c}": (3, 600, {"c": c}) for c in (0, 2, 4, 16)},
        "c0_plain": (3, 600, {"c": 0, "trellis": False}),
        "one_row": (1, 64, {}),
        "one_column": (4, 1, {}),
        "tail_of_a_word": (17, 171, {"bits": 3}),
        "short_blocks": (2, 2304, {"bits": 3, "group_size": 32}),  # segments of 288 = 256 + 32
        "short_blocks_c0": (2, 2304, {"bits": 2, "group_size": 32, "c": 0}),
        "whole_blocks": (1, 4096, {"group_size": 128}),
        "one_segment": (1, 2050, {"c": 2}),  # from 2048 on, but no multiple of 256
    },
    "rtn": {
        **{f"bits{bits}": (3, 260, {"bits": bits}) for bits in range(2, 9)},
        "group32": (5, 100, {"group_size": 32}),
        "row": (5, 100, {"group_size": -1}),
    },
    "paper": {
        **{f"bits{bits}": (3, 260, {"bits": bits}) for bits in range(2, 9)},
        "tail_of_a_byte": (5, 101, {"bits": 3, "group_size": 64}),
    },
}


class Model(NamedTuple):
    """A whole model: its config.json, its tensors but for norms, how it is quantized, bytes of a shard."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    settings: QuantizeConfig
    shard: int
    dtype: torch.dtype


def _attention(prefix: str, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for leaf, N in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32), ("o_proj", 64)):
        shapes[f"{prefix}.{leaf}.weight"] = (N, 64)
        if bias:
            shapes[f"{prefix}.{leaf}.bias"] = (N,)
    return shapes


_MLP = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _llama() -> Model:
    """Biases, a head tied to the embedding that is quantized apart, settings by fusion set, shards."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128, 64), "model.norm.weight": (64,)}
    for i in range(2):
        at = f"model.layers.{i}"
        shapes |= _attention(f"{at}.self_attn", True)
        shapes |= {f"{at}.mlp.{leaf}.weight": shape for leaf, shape in _MLP.items()}
        shapes |= {f"{at}.{norm}.weight": (64,) for norm in ("input_layernorm", "post_attention_layernorm")}
    overrides = {
        r"layers\.1\.mlp\.(gate|up)_proj$": {"bits": 3, "c": 2},
        r"layers\.0\.self_attn\.[qkv]_proj$": {"bits": 6, "group_size": 32},
        r"layers\.0\.mlp\.down_proj$": {"bits": 8},
        r"down_proj$": {"trellis": False, "c": 4},
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_COMMON,
        "num_hidden_layers": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    settings = QuantizeConfig(lm_head=8, exclude=(r"layers\.1\.self_attn\.o_proj$",), overrides=overrides)
    return Model(config, shapes, settings, 20_000, torch.bfloat16)


def _gpt2() -> Model:
    """Conv1D, and names without the base model's prefix."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (128, 32), "wpe.weight": (64, 32)}
    for leaf, shape in (
        ("attn.c_attn", (32, 96)), ("attn.c_proj", (32, 32)), ("mlp.c_fc", (32, 128)), ("mlp.c_proj", (128, 32)),
    ):  # fmt: skip
        shapes |= {f"h.0.{leaf}.weight": shape, f"h.0.{leaf}.bias": shape[1:]}
    for norm in ("h.0.ln_1", "h.0.ln_2", "ln_f"):
        shapes |= {f"{norm}.weight": (32,), f"{norm}.bias": (32,)}
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 128,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    settings = QuantizeConfig(overrides={r"c_attn$": {"bits": 3}})
    return Model(config, shapes, settings, 1 << 30, torch.float32)


def _mixtral() -> Model:
    """Experts by name, a router that stays dense."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128, 64), "lm_head.weight": (128, 64), "model.norm.weight": (64,),
        "model.layers.0.block_sparse_moe.gate.weight": (2, 64),
    }  # fmt: skip
    shapes |= _attention("model.layers.0.self_attn", False)
    for e in range(2):
        at = f"model.layers.0.block_sparse_moe.experts.{e}"
        shapes |= {f"{at}.w1.weight": (96, 64), f"{at}.w3.weight": (96, 64), f"{at}.w2.weight": (64, 96)}
    shapes |= {f"model.layers.0.{norm}.weight": (64,) for norm in ("input_layernorm", "post_attention_layernorm")}
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_COMMON,
        "num_hidden_layers": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "dtype": "float16",
    }
    settings = QuantizeConfig(overrides={r"experts": {"bits": 3}})
    return Model(config, shapes, settings, 1 << 30, torch.float16)


MODELS = {"llama": _llama, "gpt2": _gpt2, "mixtral": _mixtral}


def weight(name: str, *shape: int) -> Tensor:
    """Heavy tails, three degrees of freedom: a sum of four integers over the length of three such; a few exact
    zeros."""
    count = int(np.prod(shape))
    raw = np.frombuffer(hashlib.shake_256(name.encode()).digest(32 * count), "<i2")
    x, a, b, c = raw.astype(np.float64).reshape(count, 4, 4).sum(2).T
    w = torch.from_numpy(x / np.sqrt((a * a + b * b + c * c) / 3 + 1)).float().reshape(shape) / 32
    if len(shape) == 2 and shape[0] > 2:
        w[1] = 0
    return w


def settings(recipe: str) -> ModelFormat:
    """Each module's fields, whole: a file leaves nothing to defaults."""
    base = QuantizeConfig(recipe=recipe)
    overrides = {}
    for name, (_, _, fields) in CASES[recipe].items():
        own = QuantizeConfig(recipe=recipe, **fields)
        differing = {f: getattr(own, f) for f in MODULE_FIELDS if getattr(own, f) != getattr(base, f)}
        if differing:
            overrides[name] = differing
    return ModelFormat(base, (), overrides)


def write_tensors(recipe: str, folder: Path) -> None:
    fmt, tensors = settings(recipe), {}
    for name, (N, K, _) in CASES[recipe].items():
        config, w = fmt.for_module(name), weight(f"{recipe}/{name}", N, K)
        q = quantize_weight(w, config, fit_set_grid([w], config))
        tensors.update({f"{name}.{key}": tensor for key, tensor in q.tensors.items()})
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"model_type": "golden", "quantization_config": fmt.to_dict()})


def write_dense(name: str, folder: Path) -> Model:
    """The model before it is quantized."""
    model = MODELS[name]()
    tensors = {}
    for key, shape in model.shapes.items():
        w = weight(f"{name}/{key}", *shape)
        norm = len(shape) == 1 and key.endswith("weight")
        tensors[key] = (1 + w / 8 if norm else w).to(model.dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", model.config)
    return model


def write_model(name: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        model = write_dense(name, Path(temporary) / "dense")
        quantize_checkpoint(
            Path(temporary) / "dense", folder, model.settings, max_shard_bytes=model.shard, overwrite=True
        )
    for other in ("README.md", "precal_report.json"):  # not part of the format
        (folder / other).unlink()


def write(name: str, folder: Path) -> None:
    (write_tensors if name in CASES else write_model)(name, folder)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def today() -> dict[str, str]:
    """Checkpoint -> one digest of everything that today's quantizer writes of it."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in (*CASES, *MODELS):
            write(name, Path(temporary) / name)
            found[name] = identity(Path(temporary) / name)
    return found


def identity(folder: Path) -> str:
    """One digest of the weights' files, the index and the settings, but not of the version of precal."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["precal_version"]
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted(p for p in folder.iterdir() if ".safetensors" in p.name):
        found.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if arguments != ["--today"]:
        path = FOLDER / "digests.json"
        known = json.loads(path.read_text()) if path.exists() else {"files": {}, "weights": {}}
        for name in (*CASES, *MODELS):
            folder = FOLDER / name
            if folder.exists():
                continue
            write(name, folder)
            for file in sorted(folder.iterdir()):
                known["files"][f"{name}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
            for module, w in format_reader.read_model(folder).items():
                known["weights"][f"{name}/{module}"] = format_reader.digest(w)
        write_json(path, known)
    write_json(FOLDER / "today.json", today())


if __name__ == "__main__":
    main(sys.argv[1:])
