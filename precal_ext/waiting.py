"""How the threads of a command wait for each other. OpenMP reads it once, when torch loads it.

By default a thread that is done spins until the others are. Commands that quantize run many short parallel steps, and
where others want the cores too, a thread that spins keeps off the one it waits for, and the work takes longer than
with threads that sleep.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import PurePath

COMMANDS = {
    "quantize",
    "compensate",
    "import",
    "export",
    "verify",
    "inspect",
    "report",
}  # bench measures what servers see


def is_command(words: Sequence[str]) -> bool:
    """Whether a command line of Python (``sys.orig_argv``) is that of one of these commands."""
    program = words.index("-m") + 1 if "-m" in words else 1
    if len(words) < program + 2:
        return False
    name = PurePath(words[program]).name
    return name.removesuffix(".exe") in ("precal", "precal_ext", "precal_ext.cli") and words[program + 1] in COMMANDS


if is_command(sys.orig_argv):
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
