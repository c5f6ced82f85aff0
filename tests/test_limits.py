"""The limits of the machine are measured, or it is said why not. What they come to depends on the machine."""

from __future__ import annotations

import math
import re

import pytest
from conftest import ISAS

from precal_ext import _C

MEMORY = ["dram_read", "copy"]
FORMS = {"fp32_fma": {"avx512", "avx2", "generic"}, "bf16_dot": {"avx512"}, "int8_dot": {"avx512"}}


def measure(name: str, isa: str = "") -> dict[str, object]:
    return _C.measure_limit(name, 1e-4, 1, isa)


def test_every_limit_has_a_name() -> None:
    assert _C.limit_names() == [*MEMORY, *FORMS]


@pytest.mark.parametrize("name", [*MEMORY, *FORMS])
def test_a_limit_is_positive_or_named_as_missing(name: str, threads: int) -> None:
    try:
        found = measure(name)
    except RuntimeError as error:  # never where the kernels that use the instruction run
        assert re.match(f"measure_limit: {name} needs .*AVX", str(error))
        assert name in {"bf16_dot", "int8_dot"} and "avx512" not in ISAS
        return
    assert found["name"] == name and found["threads"] == threads and found["passes"] >= 3
    assert found["unit"] == ("GB/s" if name in MEMORY else "Gop/s")
    assert math.isfinite(found["value"]) and found["value"] > 0
    if name != "copy":
        assert found["isa"] in FORMS.get(name, FORMS["fp32_fma"])


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
@pytest.mark.parametrize("name", ["dram_read", *FORMS])
def test_an_instruction_set_can_be_forced(name: str, isa: str) -> None:
    if name in FORMS and isa not in FORMS[name]:
        with pytest.raises(ValueError, match=rf"isa must be one of those that {name} has \(avx512\), got {isa}"):
            measure(name, isa)
        return
    try:
        assert measure(name, isa)["isa"] == isa
    except RuntimeError as error:
        assert "which this CPU or this build does not have" in str(error)
        assert isa != "generic" and isa not in ISAS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), "name must be one of dram_read,copy,fp32_fma,bf16_dot,int8_dot, got speed"),
        (("fp32_fma", 0.1, 1, "sse9"), "isa must be avx512, avx2, generic or empty, got sse9"),
        (("copy", 0.1, 1, "avx2"), "copy is memcpy; isa must be empty"),
        (("fp32_fma", 0.0), "seconds must lie in (0, 60], got 0"),
        (("fp32_fma", math.nan), "seconds must lie in (0, 60], got nan"),
        (("dram_read", 0.1, 0), "megabytes must lie in [1, 65536], got 0"),
        (("copy", 0.1, -1), "megabytes must lie in [1, 65536], got -1"),
        (("copy", 0.1, 1 << 40), f"megabytes must lie in [1, 65536], got {1 << 40}"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"measure_limit: {message}")):
        _C.measure_limit(*arguments)


def test_more_threads_than_memory_for_each_are_refused() -> None:
    before = _C.get_num_threads()
    _C.set_num_threads(1024)
    try:
        with pytest.raises(ValueError, match="must give every one of 1024 threads 2048 bytes, got 1 MB"):
            _C.measure_limit("dram_read", 0.1, 1)
    finally:
        _C.set_num_threads(before)
