"""A short run of both campaigns (``make fuzz`` is the long one), and what they would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fuzz_arguments
import fuzz_headers
import fuzz_ops
import pytest
from conftest import ROOT

from precal_ext import _C

SEED = 20  # not one of the long runs


def test_random_calls_of_every_op() -> None:
    before = _C.get_num_threads()
    call = fuzz_ops.Caller(_C)
    try:
        for index in range(4000):
            fuzz_ops.run_case(call, SEED, index)
    finally:
        _C.set_num_threads(before)
    for op in fuzz_arguments.OPS:  # else the campaign calls less than it says
        assert call.done[f"{op} results"] >= 30, op
        assert call.done[f"{op} refused"] >= 15, op


def test_random_headers(tmp_path: Path) -> None:
    done: Counter[str] = Counter()
    for index in range(3000):
        folder = tmp_path if index % 10 == 0 else None
        done[fuzz_headers.check(*fuzz_headers.make(SEED, index), folder).split(",")[0]] += 1
    assert done["accepted"] > 400
    assert done["refused"] > 1500


class Broken:
    """What the campaign must not let pass."""

    def build_info(self) -> dict[str, str]:
        return {"supported_isas": "scalar"}

    def pack(self, codes: Any, bits: int) -> Any:
        raise ValueError("codes: no")

    def unpack(self, packed: Any, bits: int, K: int) -> Any:
        raise ValueError("unpack: no")

    def linear(self) -> Any:
        raise RuntimeError("linear: no")


def test_the_campaign_notices_bad_messages_and_refusals() -> None:
    call = fuzz_ops.Caller(Broken())
    with pytest.raises(fuzz_ops.Finding, match="pack: ValueError must begin with the op's name"):
        call("pack", {"codes": 1, "bits": 2})
    assert call("unpack", {"packed": 1, "bits": 2, "K": 3}) is None
    with pytest.raises(fuzz_ops.Finding, match="unpack: valid arguments must be accepted"):
        call("unpack", {"packed": 1, "bits": 2, "K": 3}, valid=True)
    with pytest.raises(RuntimeError):
        call("linear", {})


def test_cases_are_the_same_every_time() -> None:
    assert fuzz_headers.make(1, 7) == fuzz_headers.make(1, 7) != fuzz_headers.make(2, 7)
    a, b = (fuzz_arguments.quantize_groups(fuzz_arguments.Source(1, 7)) for _ in range(2))
    assert a["w"].tobytes() == b["w"].tobytes()


DYING = """
import argparse, os, sys
from collections import Counter
from pathlib import Path
sys.path.insert(0, "tests")
import campaign

def work(first, cases, options, progress):
    for index in range(first, first + cases):
        progress.at(index)
        if index == 7:
            os.abort()
    return Counter(cases=cases)

parser = argparse.ArgumentParser()
campaign.add_options(parser)
sys.exit(campaign.main(Path(__file__), parser.parse_args(), work, 0, 4))
"""


def test_a_crash_is_a_finding_with_its_number(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    done = subprocess.run(
        [sys.executable, script, "--cases", "12"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert [(f["case"], f["what"]) for f in report["findings"]] == [(7, "exit code -6")]
    assert report["done"] == 8  # 0 to 3, 8 to 11: what the dead worker did is not counted
