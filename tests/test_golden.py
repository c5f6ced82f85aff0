"""Format version 1 as it was frozen is read to the last bit, now and by every later version (tests/golden.py)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import format_reader
import golden
import numpy as np
import pytest
import reference
import torch
from conftest import LINEAR_ISAS, ROOT, forced_isa
from models import same_bytes
from torch import Tensor

from precal_ext import load_quantized, ops
from precal_ext.model import read_format
from precal_ext.qtensor import QTensor
from precal_ext.sites import precal_modules
from precal_ext.survey import Stored
from precal_ext.verify import verify

CASES = [(recipe, name) for recipe, cases in golden.CASES.items() for name in cases]
DIGESTS = json.loads((golden.FOLDER / "digests.json").read_text())
STORED: dict[str, Stored] = {}


def stored(name: str) -> Stored:
    if name not in STORED:
        STORED[name] = Stored.open(golden.FOLDER / name)
    return STORED[name]


def digest(w: Tensor) -> str:
    return format_reader.digest(w.numpy())


def test_the_files_are_those_that_were_frozen() -> None:
    found = {
        path.relative_to(golden.FOLDER).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(golden.FOLDER.rglob("*"))
        if path.is_file() and path.parent != golden.FOLDER
    }
    assert found == DIGESTS["files"]


@pytest.mark.parametrize(("recipe", "name"), CASES)
def test_what_was_written_is_read(recipe: str, name: str) -> None:
    q = stored(recipe).read_valid(name)
    for isa in LINEAR_ISAS:
        with forced_isa(isa):
            expected = q.dequantize()
            assert digest(expected) == DIGESTS["weights"][f"{recipe}/{name}"]
            prepacked = q.prepack()
            back = QTensor.from_prepacked(q.spec, prepacked)
            assert all(same_bytes(back.tensors[key], tensor) for key, tensor in q.tensors.items())
            x = torch.linspace(-1, 1, 2 * q.spec.K).reshape(2, q.spec.K)
            y = ops.linear(x, prepacked, None, *q.spec.op_arguments(), "f32")
            want = reference.linear(x, expected)
            assert (y.double() - want).abs().max() <= 1e-5 * (x.abs().double() @ expected.abs().double().T).max()


@pytest.mark.parametrize("name", golden.MODELS)
def test_whole_models_are_loaded(name: str) -> None:
    folder = golden.FOLDER / name
    assert verify(folder).sound
    model = load_quantized(folder, dtype="auto")
    modules = {module: digest(m.dequantize()) for module, m in precal_modules(model)}
    wanted = {key.removeprefix(f"{name}/"): d for key, d in DIGESTS["weights"].items() if key.startswith(f"{name}/")}
    assert len(modules) == len(wanted)
    for module, found in modules.items():
        assert [found] == [d for key, d in wanted.items() if format_reader.same(key, module)], module
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=torch.arange(12)[None]).logits).all())


# ---- the document alone ----------------------------------------------------------------------------------------------


def test_the_reader_of_the_document_needs_nothing_else() -> None:
    code = """
import json, sys
for name in ("torch", "precal_ext", "safetensors", "transformers"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import format_reader
from pathlib import Path
folder = Path(sys.argv[2])
found = {
    f"{model.name}/{module}": format_reader.digest(w)
    for model in sorted(folder.iterdir()) if model.is_dir()
    for module, w in format_reader.read_model(model).items()
}
print(json.dumps(found))
"""
    command = [sys.executable, "-c", code, str(ROOT / "tests"), str(golden.FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == DIGESTS["weights"]


def test_signs_of_zeros_are_part_of_it() -> None:
    """Else a digest would not notice."""
    found = [format_reader.read_model(golden.FOLDER / name) for name in golden.CASES]
    zeros = [np.signbit(w[w == 0]) for model in found for w in model.values()]
    assert any(z.any() for z in zeros) and any((~z).any() for z in zeros)


# ---- what there is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", golden.CASES)
def test_a_golden_checkpoint_has_these_modules_and_no_others(recipe: str) -> None:
    assert set(stored(recipe).modules) == set(golden.CASES[recipe])


def test_they_have_every_width_group_and_kind() -> None:
    specs = [stored(recipe).spec(name) for recipe, name in CASES]
    ours = [s for s in specs if s.scale_dtype == "e4m3"]
    assert (
        {s.bits for s in specs if s.trellis} == {s.bits for s in ours if s.grid_size == 2**s.bits} == set(range(2, 7))
    )
    assert {s.bits for s in ours if s.uniform} == set(range(2, 9))
    assert {s.bits for s in specs if s.scale_dtype == "float16" and not s.split} == set(range(2, 9))
    assert {s.bits for s in specs if s.split} == set(range(2, 9))
    assert {s.c for s in specs} == {0, 1, 2, 4, 16}
    assert {1, 13, 16, 32, 64, 128, 1024} <= {s.group_size for s in specs}
    assert any(s.K % s.group_size for s in specs)
    assert any(s.K * s.bits % 32 for s in specs) and any(s.K < 32 for s in specs)


def test_the_models_have_what_only_models_have() -> None:
    llama, gpt2, mixtral = (golden.FOLDER / name for name in ("llama", "gpt2", "mixtral"))
    assert len(list(llama.glob("*.safetensors"))) > 2
    index = stored("llama").index
    assert "model.layers.0.self_attn.q_proj.bias" in index and "model.embed_tokens.weight" in index
    settings = read_format(llama)
    assert settings.for_module("lm_head").bits == 8 and "lm_head.weight_packed" in index
    assert json.loads((llama / "config.json").read_text())["tie_word_embeddings"] is False
    assert {settings.for_module(f"model.layers.0.self_attn.{m}").bits for m in ("q_proj", "k_proj", "v_proj")} == {6}
    assert not settings.converts("model.layers.1.self_attn.o_proj")
    assert read_format(gpt2).conv1d_modules and "h.0.attn.c_attn.weight_packed" in stored("gpt2").index
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight_packed" in stored("mixtral").index
    assert "model.layers.0.block_sparse_moe.gate.weight" in stored("mixtral").index
    assert read_format(mixtral).for_module("model.layers.0.mlp.experts.0.w1").bits == 3


# ---- today's quantizer -----------------------------------------------------------------------------------------------


def test_the_same_weights_give_the_same_bytes() -> None:
    """As when today.json was written. A better quantizer may change that file (`python tests/golden.py --today`, and a
    line in the change log), and nothing else in the folder."""
    assert golden.today() == json.loads((golden.FOLDER / "today.json").read_text())
