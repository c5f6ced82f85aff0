"""Files that lie: what a header claims, and links that lead out of the directory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from models import Run, altered, digests
from safetensors import safe_open
from safetensors.torch import save_file

from precal_ext import CheckpointError, quantize_checkpoint
from precal_ext.checkpoint import read_index, read_json
from precal_ext.foreign import quantized_by
from precal_ext.headers import MAX_HEADER_BYTES, judge_header

pytest_plugins = ["package_fixtures"]


def raw(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + data)
    return folder


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LIES: list[tuple[str, Any, int, str]] = [
    ("past the end", {"w": entry([4], [0, 16])}, 8, "w with data_offsets [0, 16] in 8 bytes of data"),
    ("overlap", {"a": entry([2], [0, 8]), "b": entry([1], [4, 8])}, 8, "b at byte 4, inside a (8)"),
    ("same place", {"a": entry([2], [0, 8]), "b": entry([2], [0, 8])}, 8, "b at byte 0, inside a (8)"),
    ("hole", {"a": entry([1], [0, 4]), "b": entry([1], [8, 12])}, 12, "b at byte 8, beyond the end of a (4)"),
    ("data of nobody", {"w": entry([2], [0, 8])}, 16, "16 bytes of data, of which tensors take 8"),
    ("negative shape", {"w": entry([-2], [0, 8])}, 8, "w with shape [-2]"),
    ("huge shape", {"w": entry([2**62, 8], [0, 8])}, 8, "more elements than there can be"),
    ("huge shape of nothing", {"w": entry([2, 0, 2**63 - 1], [0, 0])}, 0, "more elements than there can be"),
    ("beyond int64", {"w": entry([2**70, 0], [0, 0])}, 0, "w with shape [1180591620717411303424, 0]"),
    ("fraction", {"w": entry([2.0], [0, 8])}, 8, "w with shape [2.0]"),
    ("bool", {"w": entry([True], [0, 4])}, 4, "w with shape [True]"),
    ("no list", {"w": entry("2", [0, 8])}, 8, "w with shape 2"),
    ("size", {"w": entry([3], [0, 8])}, 8, "w with 8 bytes for F32 [3], which takes 12"),
    ("negative offset", {"w": entry([2], [-8, 0])}, 8, "w with data_offsets [-8, 0]"),
    ("backwards", {"w": entry([2], [8, 0])}, 8, "w with data_offsets [8, 0]"),
    ("three offsets", {"w": entry([2], [0, 4, 8])}, 8, "w with data_offsets [0, 4, 8]"),
    ("no dtype", {"w": {"shape": [2], "data_offsets": [0, 8]}}, 8, "w with an entry without dtype"),
    ("no entry", {"w": [1]}, 8, "w with an entry without dtype"),
    ("a list", [1], 8, "a header that is a list, no object"),
]


@pytest.mark.parametrize(("header", "size", "message"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES])
def test_a_lying_header_is_refused_with_the_tensor(tmp_path: Path, header: Any, size: int, message: str) -> None:
    folder = raw(tmp_path / "model", json.dumps(header).encode(), bytes(size))
    with pytest.raises(CheckpointError) as caught:
        read_index(folder)
    assert str(caught.value).startswith(f"{folder / 'model.safetensors'}: must be a whole safetensors file, got: ")
    assert message in str(caught.value)


TWICE = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


@pytest.mark.parametrize(
    ("header", "length", "message"),
    [
        (TWICE, None, "'w' twice"),
        (b'{"w":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,8]}}', None, "'shape' twice"),
        (b'{"\xff":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', None, "invalid start byte"),
        (b"[" * 200_000, None, "a header that cannot be read"),
        (b'{"w":' + b"9" * 5000 + b"}", None, "a header that cannot be read"),
        (b"{", None, "a header that cannot be read"),
        (b"{}", MAX_HEADER_BYTES + 1, f"a header of {MAX_HEADER_BYTES + 1} bytes, more than {MAX_HEADER_BYTES}"),
        (b"{}", 2**64 - 1, f"a header of {2**64 - 1} bytes"),
        (b"{}", 99_000_000, "a header of 99000000 bytes in a file of"),
    ],
    ids=["key", "field", "utf8", "deep", "digits", "cut", "100 MB", "2**64", "longer than the file"],
)
def test_a_header_that_is_no_header_is_refused(tmp_path: Path, header: bytes, length: int | None, message: str) -> None:
    with pytest.raises(CheckpointError, match="must be a whole safetensors file, got: ") as caught:
        read_index(raw(tmp_path / "model", header, bytes(8), length))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_length(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match=f"got: {size} bytes, too few for the length of a header"):
        read_index(tmp_path)


def entry_text(name: str, more: str = "") -> str:
    return f'"{name}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]{more}}}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{" + ",".join(f'"{i}":0' for i in range(500_000)) + ',"7":0}', "'7' twice"),
        ('{"w":{"dtype":"U8","shape":[' + f"{2**62}," * 400_000 + '0],"data_offsets":[0,0]}}', "more elements than"),
        ('{"w":{"dtype":"U8","shape":[' + "0," * 2**20 + '0],"data_offsets":[0,0]}}', "commas and brackets, more than"),
        ("{" + ",".join(entry_text(str(i)) for i in range(200_000)) + "}", "commas and brackets, more than"),
        ('{"__metadata__":{"a":"' + "\U0001f600" * 2**23 + '"}}', "without its padding, more than 33554432"),
        ("{" + entry_text("w" * 10**6, ',"shape":[1]') + "}", "'shape' twice"),
        ('{"' + "w" * 10**6 + '":1}', "with an entry without dtype: 1"),
        ('{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,' + "9" * 4000 + "]}}", "in 0 bytes of data"),
        ('{"__metadata__":{"a":1}}', "__metadata__ that is no object of strings: {'a': 1}"),
        ("{" + entry_text("w", ',"more":NaN') + "}", "NaN, which is no JSON"),
        ('{"a\\ud800\\u001b[2J":1}', "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}[2J with"),
    ],
    ids=["twice", "product", "sizes", "tensors", "long", "name twice", "name", "digits", "metadata", "NaN", "terminal"],
)
def test_a_header_that_wants_time_or_memory(header: str, message: str) -> None:
    """Refused at once; without the limits the first two would take about an hour, others gigabytes."""
    reason = judge_header(header.encode(), 0, {"U8": 1})
    assert message in reason
    assert len(reason) < 1000


def test_nesting_of_any_depth_is_refused() -> None:
    """Around the depth at which Python gives up, whoever meets it first: the parser or the message."""
    for depth in [*range(1, 60), *range(900, 1010)]:
        for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            header = f'{{"w":{{"dtype":{value}}}}}'
            assert re.match(
                r"w with an entry without dtype|a header that cannot be read", judge_header(header.encode(), 0, {})
            )


# Of all that fits, what takes the most: many short strings outside latin-1 (4 bytes a character), or one long one.
WORST = """
import runpy
judge = runpy.run_path("precal_ext/headers.py")["judge_header"]
face = "\\U0001f600"
for text in (
    '{"":{' + ",".join(f'"{face}{i}":"{face}"' for i in range(2**20 - 100)) + "}}",
    '{"":"' + face * (2**23 - 100) + '"}',
):
    text = text.encode()
    assert judge(text, 0, {}).startswith(" with an entry without dtype")
# Not ru_maxrss: that starts with the peak of the process that forked this one.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux's /proc")
def test_the_memory_of_a_header_is_bounded() -> None:
    """In a process of its own, with Python and the text itself."""
    done = subprocess.run([sys.executable, "-c", WORST], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert int(done.stdout) < 700_000, done.stderr


def test_a_header_of_99_mb_is_read(tmp_path: Path) -> None:
    header = json.dumps({"w": entry([2], [0, 8])}).encode()
    folder = raw(tmp_path / "model", header + b" " * (99_000_000 - len(header)), bytes(8))
    assert read_index(folder)["w"].shape == (2,)


TENSORS = {"a": torch.zeros(3, 5), "b.é": torch.ones(4, dtype=torch.bfloat16), "empty": torch.zeros(0, 3)}


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=3))
def test_what_is_accepted_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    """Any bytes of a header changed: refused by name of the file, or the same tensors as by safetensors' reader."""
    folder = tmp_path_factory.mktemp("bytes")
    path = folder / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    data = bytearray(path.read_bytes())
    for at, value in changes:
        data[at % (len(data) - 60)] = value
    path.write_bytes(data)
    try:
        found = read_index(folder)
    except CheckpointError as error:
        assert str(error).startswith(str(path))
        return
    with safe_open(path, framework="pt") as file:
        assert {name: list(info.shape) for name, info in found.items()} == {
            name: file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118
        }


# ---- links -----------------------------------------------------------------------------------------------------------


def moved(folder: Path, name: str, target: Path) -> None:
    """A file of the directory becomes a link to itself elsewhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(folder / name, target)
    (folder / name).symlink_to(target)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_directory_is_refused(tmp_path: Path, tiny: Path, run: Run, name: str) -> None:
    """tokenizer.json is copied: quantizing a stranger's model must not put a private file into the result."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    moved(folder, name, tmp_path / "private" / "file")
    code, _, err = run("quantize", folder, tmp_path / "out", "--quiet")
    assert code == 3
    assert f"{folder / name}: must lie in the directory itself, got a link to {tmp_path / 'private' / 'file'}" in err
    assert not (tmp_path / "out").exists()


def test_links_inside_the_directory_and_of_the_hub_cache_are_followed(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "cache" / "snapshots" / "abc")
    moved(folder, "model.safetensors", tmp_path / "cache" / "blobs" / "123")
    moved(folder, "config.json", folder / "elsewhere.json")
    quantize_checkpoint(folder, tmp_path / "a" / "out")
    quantize_checkpoint(tiny, tmp_path / "b" / "out")
    assert (tmp_path / "a/out/model.safetensors").read_bytes() == (tmp_path / "b/out/model.safetensors").read_bytes()


def test_a_link_from_a_snapshot_to_elsewhere_is_refused(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "cache" / "snapshots" / "abc")
    moved(folder, "model.safetensors", tmp_path / "cache" / "other" / "123")
    with pytest.raises(CheckpointError, match="must lie in the directory itself"):
        read_index(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=["deep", "digits"])
def test_json_that_python_cannot_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json: must be JSON, got"):
        read_json(tmp_path / "config.json")


# ---- quantized by somebody else --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "method"),
    [
        (["m.q_proj.qweight", "m.q_proj.qzeros", "m.q_proj.scales"], "GPTQ or AWQ"),
        (["m.q_proj.weight", "m.q_proj.weight.absmax", "m.q_proj.weight.quant_map"], "bitsandbytes"),
        (["m.q_proj.weight", "m.q_proj.weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
        (["m.q_proj.weight", "m.q_proj.SCB"], "bitsandbytes"),
        (["m.q_proj.weight_packed", "m.q_proj.weight_shape"], "compressed-tensors or precal"),
        (["m.q_proj.weight_packed", "m.q_proj.weight_row_scale"], "precal"),
        (["m.q_proj.weight", "m.q_proj.bias", "m.norm.weight", "m.rope.inv_freq"], None),
    ],
)
def test_who_has_quantized_a_model_shows_in_its_tensors(names: list[str], method: str | None) -> None:
    found = quantized_by(names)
    assert (found and found[0]) == method
    assert found is None or found[1] in names


QUANTIZED: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any]]] = [
    ("qweight", lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)})),
    ("absmax", lambda t: t.update({"model.layers.0.mlp.up_proj.weight.absmax": torch.zeros(4)})),
    ("weight_row_scale", lambda t: t.update({"model.layers.0.mlp.up_proj.weight_row_scale": torch.zeros(4)})),
]


@pytest.mark.parametrize(("leaf", "change"), QUANTIZED, ids=["GPTQ", "bitsandbytes", "precal"])
def test_a_quantized_model_without_a_word_in_its_config_is_refused(
    tmp_path: Path, tiny: Path, run: Run, leaf: str, change: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    folder = altered(tiny, tmp_path / "model", change)
    before = digests(tmp_path)
    code, _, err = run("quantize", folder, tmp_path / "out", "--quiet")
    assert code == 3
    assert f"{folder}: must not be quantized yet, got model.layers.0.mlp.up_proj" in err
    assert leaf in err
    assert digests(tmp_path) == before
