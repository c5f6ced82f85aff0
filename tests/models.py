"""Models for the tests above the ops: where the real ones are, tiny random ones, and how to compare directories."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, shared
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import precal_ext
from precal_ext import Report
from precal_ext.convert import Progress

DEMO = ROOT / "demo" / "llama-6m"
MODELS = ["llama-6m", "stories260K", "TinyStories-656K"]
RECIPES = ["precal", "paper", "rtn"]

# What the session fixtures of package_fixtures.py give.
Source = Callable[[str], Path]
Folder = Callable[[str, str, int], Path]
InMemory = Callable[[str, str, int], tuple[nn.Module, Report]]
Run = Callable[..., tuple[int, str, str]]

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
# What transformers calls the architecture -> settings besides the common ones.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2, "attention_bias": True},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "Mistral": {"num_key_value_heads": 2},
    "Gemma": {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "Phi": {},
    "OPT": {**_OPT, "tie_word_embeddings": True},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "Falcon": {"tie_word_embeddings": True},
    "Mixtral": {"num_key_value_heads": 2, "num_local_experts": 3},
    "Qwen3Moe": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "Qwen2Moe": {
        "num_key_value_heads": 2,
        "num_experts": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def model_folder(name: str) -> Path:
    """A real model: the embedded one, or one of the shared folder (skips where that is absent)."""
    return DEMO if name == "llama-6m" else shared("models", name)


def first_layers(source: Path, target: Path, layers: int) -> Path:
    """A model's first layers as a model of their own: trained weights at a fraction of the time."""
    shutil.copytree(source, target)
    edit_config(target, num_hidden_layers=layers)
    tensors = load_file(source / "model.safetensors")
    later = tuple(f"model.layers.{i}." for i in range(layers, 100))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(later)}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def tiny_model(architecture: str = "Llama", seed: int = 0, **settings: Any) -> nn.Module:
    """A random model of two layers, in eval mode."""
    import transformers

    config_class = getattr(transformers, architecture + "Config")
    torch.manual_seed(seed)
    common = {} if architecture == "GPT2" else _COMMON  # has names of its own
    own = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, **common, **ARCHITECTURES[architecture]}
    config = config_class(**{**own, **settings})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def save_tiny(folder: Path, architecture: str = "Llama", seed: int = 0, **settings: Any) -> Path:
    tiny_model(architecture, seed, **settings).save_pretrained(folder)
    return folder


def add_tokenizer(folder: Path) -> Path:
    """The embedded model's tokenizer; the model needs its 4096 tokens."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder


def logits(model: nn.Module) -> Tensor:
    """Of two fixed prompts of different length; ids below 64 exist in every model here."""
    ids = torch.arange(24).reshape(2, 12) % 64
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, by safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits: NaN equals itself and -0 differs from 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert sorted(a) == sorted(b)
    assert [name for name in a if not same_bytes(a[name], b[name])] == []


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Relative path -> digest of every file of a directory."""
    return {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def altered(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of a model directory with one file of weights, its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def edit_config(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **fields}))


def environment(**variables: str) -> dict[str, str]:
    """For subprocesses: the package under test first, and no network."""
    package = str(Path(precal_ext.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": package, "HF_HUB_OFFLINE": "1", **variables}


def run_python(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=300
    )


class Interruption(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


def stop_after(count: int) -> Callable[[Progress], None]:
    def progress(p: Progress) -> None:
        if p.tensors_done == count:
            raise Interruption

    return progress
