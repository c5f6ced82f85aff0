"""The shim that runs CUDA kernels on the CPU: it computes what a GPU would, and finds the faults planted in kernels."""

from __future__ import annotations

import subprocess

import emulator
import pytest

RIGHT = ["block_sum", "warp_reverse", "last_arriver", "copies", "matrix_bf16", "matrix_f16", "conversions"]

# Fault: what the report must say when memory is checked, and when races are. None: this variant cannot see it.
FAULTS: dict[str, tuple[str | None, str]] = {
    "no_first_barrier": ("wrong result", "race: "),
    "no_second_barrier": ("wrong result", "race: "),
    "same_value": (None, "race: write"),
    "no_syncwarp": ("wrong result", "race: "),
    "no_release": (None, "race: read"),
    "no_acquire": (None, "race: read"),
    "no_wait": ("wrong result", "cp.async is still writing"),
    "no_barrier_after_wait": ("wrong result", "race: "),
    "early_return": ("thread (7, 0, 0) has returned", "thread (7, 0, 0) has returned"),
    "two_barriers": ("divergence; __syncthreads at selftest.cpp:", "divergence; __syncthreads at selftest.cpp:"),
    "lost_lane": ("deadlock; thread (0, 0, 0) waits in __shfl_xor_sync at selftest.cpp:", "thread (5, 0, 0) waits in"),
    "past_the_end": ("heap-buffer-overflow", "wrong result"),
    "never_written": ("wrong result", "wrong result"),
}


def selftest(variant: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    program = emulator.build() / f"selftest_{variant}"
    environment = emulator.sanitizer_environment()
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=60, env=environment)


def test_every_case_is_listed() -> None:
    assert selftest("races").stdout.split() == sorted([*RIGHT, *FAULTS])


@pytest.mark.parametrize("variant", emulator.VARIANTS)
@pytest.mark.parametrize("case", RIGHT)
def test_a_right_kernel_runs_in_any_order(variant: str, case: str) -> None:
    for seed in emulator.SEEDS:
        done = selftest(variant, case, seed)
        assert (done.returncode, done.stdout) == (0, "right\n"), done.stdout + done.stderr


@pytest.mark.parametrize("variant", emulator.VARIANTS)
@pytest.mark.parametrize("case", FAULTS)
def test_a_planted_fault_is_found(variant: str, case: str) -> None:
    message = FAULTS[case][emulator.VARIANTS.index(variant)]
    for seed in emulator.SEEDS:
        done = selftest(variant, case, seed)
        if message is None:
            assert done.stdout == "right\n"
        else:
            assert done.returncode == 1 and message in done.stdout + done.stderr, done.stdout + done.stderr
