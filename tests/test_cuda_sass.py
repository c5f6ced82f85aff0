"""The instructions that ptxas made of the hot CUDA kernels are those that were meant."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import skip_without_cuda
from test_build import BUILD
from test_cuda_resources import HOT, short_name

from precal_ext import _C

Kernels = dict[str, list[str]]  # short name -> instructions, predicates left out


@functools.cache
def tool(name: str) -> Path:
    """cuobjdump or nvdisasm: of a CUDA toolkit, or of the packages of the extra `test`."""
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations if packages is not None else None
    for folder in folders or ():
        for found in sorted(Path(folder).glob(f"*/bin/{name}")):
            return found
    pytest.skip(f"needs {name} (pip install nvidia-cuda-{name}), which is not here")


@functools.cache
def kernels(source: str, arch: str) -> Kernels:
    objects = sorted(BUILD.glob(f"CMakeFiles/precal_cuda.dir/**/{source}.cu.o"))
    if not objects:
        pytest.skip(f"needs the object of {source}.cu in the build folder, which is not here")
    environment = {**os.environ, "PATH": f"{tool('nvdisasm').parent}{os.pathsep}{os.environ['PATH']}"}
    command = [tool("cuobjdump"), "-sass", "-arch", arch, objects[0]]
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found: Kernels = {}
    for part in text.split("Function : ")[1:]:
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+.*?);", part, re.MULTILINE)
        found[short_name(part.split()[0])] = lines
    assert found, f"no kernels of {source}.cu for {arch}"
    return found


def archs() -> list[str]:
    return [f"sm_{a}" for a in str(_C.build_info()["cuda_archs"]).replace(",", ";").split(";") if a]


@pytest.fixture(params=archs() or ["none"])
def arch(request: pytest.FixtureRequest) -> str:
    if not _C.build_info()["cuda"]:
        skip_without_cuda("precal was built without CUDA")
    return str(request.param)


def count(instructions: list[str], pattern: str) -> int:
    return sum(re.match(pattern, text) is not None for text in instructions)


def named(found: Kernels, pattern: str) -> list[tuple[str, re.Match[str], list[str]]]:
    """Those whose names are like that; at least one."""
    matches = [(name, re.fullmatch(pattern, name), code) for name, code in found.items()]
    chosen = [(name, kind, code) for name, kind, code in matches if kind is not None]
    assert chosen, f"no kernel is called {pattern}, got {', '.join(found)}"
    return chosen


def loops(code: list[str]) -> list[list[str]]:
    """Every loop: from the target of a branch back to the branch. An instruction has 16 bytes."""
    found = []
    for i, text in enumerate(code):
        target = re.match(r"BRA\b.*?\b0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) // 16 <= i:
            found.append(code[int(target[1], 16) // 16 : i + 1])
    return sorted(found, key=len)


# Instructions of linear_small's loops, at most, by octets of tokens and neighbouring columns of a lane: two panels (256
# weights a lane), and four entries of outliers. What docs/cuda.md counts with.
MOST = {(1, 16): (680, 340), (1, 8): (780, 340), (2, 16): (760, 420), (2, 8): (890, 420)}


def test_few_tokens_take_the_instructions_that_were_counted(arch: str) -> None:
    for name, kind, code in named(kernels("linear_small", arch), r"linear_small_kernel<(\d), (\d), (\d), (\d+)>"):
        octets, run = int(kind[3]), int(kind[4])
        panels, entries = MOST[octets, run]
        slack = 1.0 if arch == "sm_90a" else 1.1  # no instruction for e4m3 before sm_89
        with_mma = [(body, count(body, r"HMMA\.16816\.F32")) for body in loops(code)]
        pairs = [body for body, mma in with_mma if mma == 32 * octets]
        assert pairs and len(pairs[0]) <= slack * panels, f"{name}: {[len(b) for b in pairs[:2]]}"
        assert count(pairs[0], r"LDS R") >= 128, name  # a lookup a pair
        assert count(pairs[0], r"LDG\.E(\.\w+)*\.128") >= 2 * int(kind[1]), name
        outliers = [body for body, mma in with_mma if mma == 4 * octets]
        assert outliers and len(outliers[0]) <= slack * entries, f"{name}: {[len(b) for b in outliers[:2]]}"


def test_few_tokens_use_tensor_cores_and_16_byte_loads(arch: str) -> None:
    for name, kind, code in named(kernels("linear_small", arch), r"linear_small_kernel<(\d), (\d), (\d), (\d+)>"):
        assert count(code, r"HMMA\.16816\.F32") >= 16 * int(kind[3]), name
        assert count(code, r"LDG\.E(\.\w+)*\.128") >= int(kind[1]), name
        assert count(code, r"LDS") >= 64, name  # a lookup per pair of codes
        assert count(code, r"ATOMG") == 1, name  # who arrives last
        assert not count(code, r"ATOM.*\.F(16|32|64)|RED.*\.F(16|32|64)"), name


def test_many_tokens_use_asynchronous_copies_and_ldmatrix(arch: str) -> None:
    for name, kind, code in named(kernels("linear_large", arch), r"linear_large_kernel<(\d), (\d), (\d+)>"):
        assert count(code, r"HMMA\.16816\.F32") == int(kind[3]) // 2, name
        assert count(code, r"LDSM\.16\.M88\.4") >= 16, name
        assert count(code, r"LDGSTS\.E\.BYPASS\.128") >= 2, name
        assert not count(code, r"ATOM.*\.F(16|32|64)|RED.*\.F(16|32|64)"), name


def test_rows_of_weights_are_stored_16_bytes_at_a_time(arch: str) -> None:
    for name, _, code in named(kernels("dense_rows", arch), r"dense_tiled_kernel<.*>"):
        assert count(code, r"STG\.E(\.\w+)*\.128") >= 16 and count(code, r"LDS") >= 64, name


def test_histograms_count_in_shared_memory(arch: str) -> None:
    assert any(count(code, r"ATOMS") for code in kernels("histogram", arch).values())


@pytest.mark.parametrize("source", ["linear_small", "linear_large", "dense_rows", "histogram", "quantize_trellis"])
def test_hot_kernels_keep_everything_in_registers(source: str, arch: str) -> None:
    hot = {name: code for name, code in kernels(source, arch).items() if name.split("<")[0] in HOT}
    assert hot
    for name, code in hot.items():
        assert len(code) > 100, name  # else the pattern no longer fits cuobjdump
        assert not count(code, r"LDL|STL"), name
