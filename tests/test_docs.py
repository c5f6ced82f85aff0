"""Documents say what the committed results and the code say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from precal_ext import _C
from precal_ext.cli import main
from precal_ext.config import ModelFormat, QuantizeConfig
from precal_ext.qtensor import WeightSpec

ROOT = Path(__file__).resolve().parents[1]


def test_tables_are_made_from_the_committed_results() -> None:
    done = subprocess.run(
        [sys.executable, "bench/report.py", "--check"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_format_page_names_every_tensor() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    specs = [
        WeightSpec.from_config(8, 300, QuantizeConfig()),
        WeightSpec.from_config(8, 300, QuantizeConfig(recipe="paper")),
    ]
    keys = {key for spec in specs for key in spec.tensors()}
    assert keys == set(re.findall(r"^\| `(weight_\w+)` \|", text, re.MULTILINE))
    assert f"**Version {_C.FORMAT_VERSION}, frozen.**" in text
    assert f"U = {_C.OUTLIER_UNIT:g}" in text


def test_the_example_of_the_format_page_is_read() -> None:
    text = (ROOT / "docs" / "format.md").read_text()
    found = re.search(r"```json\n\"quantization_config\": (\{.*?\n\})\n```", text, re.DOTALL)
    assert found is not None
    fmt = ModelFormat.from_dict(json.loads(found[1]))
    down, head = fmt.for_module("model.layers.0.mlp.down_proj"), fmt.for_module("lm_head")
    assert (down.bits, down.grid, down.trellis, head.bits, head.uniform) == (6, "fitted", True, 8, True)
    assert not fmt.converts("model.layers.0.self_attn.o_proj")


def test_the_readme_shows_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = set(re.findall(r"^precal (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert commands
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0
    assert "exit codes" in capsys.readouterr().out
