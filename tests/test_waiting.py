"""Commands whose threads sleep while they wait."""

from __future__ import annotations

import subprocess
import sys

import pytest
from models import environment

from precal_ext.waiting import is_command


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/usr/bin/python3 /opt/bin/precal quantize MODEL OUT", True),
        ("python precal.exe verify OUT", True),
        ("python -m precal_ext quantize MODEL OUT", True),
        ("python -u -m precal_ext.cli export OUT OTHER", True),
        ("precal bench OUT", False),
        ("python /opt/bin/precal bench OUT", False),
        ("python -m precal_ext", False),
        ("python serve.py quantize", False),
        ("python -m pytest quantize", False),
        ("python -c code quantize", False),
        ("python", False),
        ("", False),
    ],
)
def test_command_lines(line: str, expected: bool) -> None:
    assert is_command(line.split()) is expected


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_openmp_is_told_in_time(given: str | None, expected: str) -> None:
    variables = {"OMP_DISPLAY_ENV": "true"} | ({} if given is None else {"OMP_WAIT_POLICY": given})
    done = subprocess.run(
        [sys.executable, "-m", "precal_ext", "inspect", "nowhere"],
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    if "OPENMP DISPLAY ENVIRONMENT" not in done.stderr:
        pytest.skip("needs a torch whose OpenMP says what it was told")
    assert f"OMP_WAIT_POLICY = '{expected}'" in done.stderr
