"""What was compiled and linked: no vector instruction leaks, only torch's stable ABI is used, PRECAL_ISA is obeyed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LINEAR_ISAS, ROOT, skip_without_cuda

from precal_ext import _C

BUILD = Path(os.environ.get("PRECAL_BUILD_DIR", ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"))
TORCH_LIBRARIES = ["libtorch_cpu.so", "libtorch.so", "libc10.so", "libtorch_python.so", "libtorch_cuda.so"]
OP_LIBRARIES = ["libprecal_torch.so", "libprecal_torch_cuda.so"]
X86 = os.uname().machine == "x86_64"


def run(*command: str | Path) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"needs {command[0]}")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def kernel_object(isa: str) -> Path:
    objects = sorted(BUILD.glob(f"CMakeFiles/precal_isa_{isa}.dir/**/isa_{isa}.cpp.o"))
    if not objects:
        pytest.skip(f"needs the object of isa_{isa}.cpp in the build folder, which is not here")
    return objects[0]


def instructions(isa: str) -> list[tuple[str, str]]:
    """(mnemonic, operands) of the whole object."""
    text = run("objdump", "-d", "--no-show-raw-insn", kernel_object(isa))
    lines = re.findall(r"^\s*[0-9a-f]+:\t(\S+)[ \t]*(.*)$", text, re.MULTILINE)
    assert len(lines) > 1000  # else the pattern above no longer fits objdump
    return lines


def symbols(library: Path, *options: str) -> set[str]:
    """Names without the version of the system library that defines them; versioned ones are not torch's."""
    lines = [line.split()[-1] for line in run("nm", "-D", *options, library).splitlines()]
    return {name for name in lines if "@" not in name}


# ---- instruction sets ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not X86, reason="x86-64 only")
def test_the_scalar_object_has_no_avx() -> None:
    """Every AVX instruction is VEX or EVEX encoded, and its mnemonic begins with v."""
    leaks = [(m, o) for m, o in instructions("scalar") if m.startswith("v") or re.search(r"%[yz]mm|%k[0-7]", o)]
    assert not leaks


@pytest.mark.skipif(not X86, reason="x86-64 only")
def test_the_vector_objects_have_theirs() -> None:
    """Also shows that the test above could see them."""
    avx2, avxvnni, avx512 = (" ".join(o for _, o in instructions(isa)) for isa in ("avx2", "avxvnni", "avx512"))
    assert "%ymm" in avx2 and "%zmm" not in avx2
    assert "%ymm" in avxvnni and not re.search(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])\b", avxvnni)  # all of it VEX
    assert any("vpdpbusd" in f"{m} {o}" for m, o in instructions("avxvnni"))
    assert "%zmm" in avx512


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avxvnni", "avx512"] if X86 else ["scalar"])
def test_a_kernel_object_exports_its_table_only(isa: str) -> None:
    """A weak function (an inline one from a header) is kept once for all objects: possibly the AVX-512 one."""
    lines = [line.split() for line in run("nm", "--defined-only", kernel_object(isa)).splitlines()]
    exported = [(kind, name) for _, kind, name in lines if kind.isupper() or kind in "uvw"]
    assert exported == [("D", f"_ZN6precal3cpu{len(isa) + 10}k_{isa}_kernelsE")]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("isa", [*LINEAR_ISAS, ""])
def test_precal_isa_forces_the_instruction_set(isa: str) -> None:
    done = python("from precal_ext import _C; print(_C.cpu_isa())", PRECAL_ISA=isa)
    assert done.stdout.strip() == (isa or LINEAR_ISAS[0]), done.stderr


def test_a_wrong_precal_isa_is_named() -> None:
    message = f"PRECAL_ISA: must be one of {','.join(LINEAR_ISAS)}, got sse9"
    c = python("from precal_ext import _C; _C.cpu_isa()", PRECAL_ISA="sse9")
    assert c.returncode == 1 and f"ValueError: {message}" in c.stderr
    op = python("import torch; from precal_ext import ops; ops.soft_threshold(torch.ones(3), 0.0)", PRECAL_ISA="sse9")
    assert op.returncode == 1 and message in op.stderr


# ---- torch's stable ABI ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OP_LIBRARIES)
def test_only_the_stable_abi_of_torch_is_used(name: str) -> None:
    library = ROOT / "precal_ext" / name
    if not library.exists():
        skip_without_cuda(f"{name} was not built")
    used = symbols(library, "--undefined-only")
    folder = Path(torch.__file__).parent / "lib"
    defined = set().union(
        *(symbols(folder / lib, "--defined-only") for lib in TORCH_LIBRARIES if (folder / lib).exists())
    )
    from_torch = used & defined
    assert from_torch  # else nm told us nothing
    assert not {s for s in from_torch if not s.startswith(("aoti_torch_", "torch_"))}
    # also what this build of torch happens not to define
    assert not {s for s in used if re.match(r"_ZN?K?[A-Z]*\d*(2at|3c10|5torch|6caffe2)", s)}


def test_the_module_needs_no_torch() -> None:
    spec = importlib.util.find_spec("precal_ext._C")
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", spec.origin))
    assert needed and not [library for library in needed if re.match(r"libtorch|libc10|libcuda", library)]


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def cuda_module():
    if not _C.build_info()["cuda"]:
        skip_without_cuda("precal was built without CUDA")
    from precal_ext import _C_cuda

    return _C_cuda


def test_the_cuda_module_imports_without_a_gpu() -> None:
    info = cuda_module().device_info()
    assert info["runtime_version"] >= 12000
    assert info["device_count"] >= 0 and info["driver_version"] >= 0


def test_the_cuda_module_refuses_cpu_tensors() -> None:
    w = torch.ones(3)
    message = re.escape("soft_threshold: w must be on a CUDA device, got DLPack device type 1")
    for argument in (w, w.numpy()):
        with pytest.raises(ValueError, match=message):
            cuda_module().soft_threshold(argument, 0.5, argument)


@pytest.mark.cuda
def test_the_cuda_module_gives_the_bits_of_the_cpu() -> None:
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(w, device="cuda")
    cuda_module().soft_threshold(w.cuda(), 0.5, out, stream=torch.cuda.current_stream().cuda_stream)
    assert torch.equal(out.cpu(), torch.from_numpy(_C.soft_threshold(w.numpy(), 0.5)))
