"""What ptxas says of the CUDA kernels: registers, shared memory, and no spills. `pytest -s` prints the table."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from conftest import skip_without_cuda
from test_build import BUILD

from precal_ext import _C

# Kernels where a spill would cost memory traffic in an inner loop. The others may not spill either, as it happens.
HOT = [
    "linear_small_kernel",
    "linear_large_kernel",
    "dense_tiled_kernel",
    "search_kernel",
    "trace_kernel",
    "histogram_kernel",
]

ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n",
    re.DOTALL,
)


class Kernel(NamedTuple):
    name: str
    arch: str
    stack: int
    spills: int
    registers: int
    shared: int


def short_name(mangled: str) -> str:
    """The kernel's name and its template arguments, of an Itanium-mangled nested name."""
    at, name = len("_ZN"), mangled
    while (length := re.match(r"\d+", mangled[at:])) is not None:
        at += len(length[0])
        name = mangled[at : at + int(length[0])]
        at += int(length[0])
    arguments = re.match(r"I((?:L\w+?E)+)E", mangled[at:])
    values = re.findall(r"(\d+)E", arguments[1]) if arguments else []
    return name + (f"<{', '.join(values)}>" if values else "")


def parse(text: str) -> list[Kernel]:
    found = []
    for mangled, arch, stack, stores, loads, registers, rest in ENTRY.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        found.append(
            Kernel(short_name(mangled), arch, int(stack), spills, int(registers), int(shared[1]) if shared else 0)
        )
    return found


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    if not _C.build_info()["cuda"]:
        skip_without_cuda("precal was built without CUDA")
    logs = sorted(BUILD.glob("CMakeFiles/precal_cuda.dir/**/*.ptxas"))
    if not logs:
        pytest.skip("needs what ptxas said in the build folder, which is not here")
    return [kernel for log in logs for kernel in parse(log.read_text())]


def test_no_kernel_spills(kernels: list[Kernel]) -> None:
    print()
    for k in sorted(kernels):
        print(f"{k.name:60} {k.arch:8} {k.registers:4} registers {k.shared:7} bytes shared {k.spills} spilled")
    names = {k.name.split("<")[0] for k in kernels}
    assert set(HOT) <= names, f"no such kernel: {set(HOT) - names}"
    assert len({k.arch for k in kernels}) >= 1
    for k in kernels:
        if k.name.split("<")[0] in HOT:
            assert (k.spills, k.stack) == (0, 0), f"{k.name} for {k.arch} spills"


def test_the_parser_sees_a_spill() -> None:
    text = (
        "ptxas info    : Compiling entry function '_ZN6precal4cuda27_GLOBAL__N__4b85_15_x_cu_c819"
        "linear_small_kernelILi4ELb1ELi2EEEvNS1_11SmallParamsE' for 'sm_90a'\n"
        "ptxas info    : Function properties for _ZN6\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 4096 bytes smem\n"
    )
    (kernel,) = parse(text)
    assert kernel == Kernel("linear_small_kernel<4, 1, 2>", "sm_90a", 8, 28, 255, 4096)
