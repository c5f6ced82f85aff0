"""Which way the arrows point: includes between the folders of csrc, imports between the modules of precal_ext."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CSRC, PACKAGE = ROOT / "csrc", ROOT / "precal_ext"

# Folder: the folders whose headers it may include.
MAY_INCLUDE = {
    "core": {"core"},
    "format": {"core", "format"},
    "cpu": {"core", "format", "cpu"},
    "cuda": {"core", "format", "cuda"},
    "bench": {"core", "bench"},
    "bindings": {"core", "format", "cpu", "cuda", "bench", "bindings"},
}
# Foreign headers, and the only folders that may see them.
FOREIGN = {
    r"(torch|ATen|c10)/": {"bindings"},
    r"pybind11/|Python\.h": {"bindings"},
    r"cuda|cublas|mma\.h|cooperative_groups": {"cuda", "bindings"},
    r".*intrin\.h": {"cpu", "bench"},
}

# Lowest first: a module imports only modules before it in this list. `integrations` stands for all of its modules.
ORDER = [
    "_version",
    "waiting",
    "_C",
    "_C_cuda",
    "library",
    "fakes",
    "ops",
    "config",
    "grids",
    "qtensor",
    "shards",
    "salience",
    "mx",
    "measure",
    "requantize",
    "quantize",
    "gptq",
    "uniform",
    "headers",
    "mixtures",
    "architectures",
    "select",
    "digest",
    "foreign",
    "checkpoint",
    "staging",
    "pipeline",
    "ranks",
    "report",
    "weights",
    "packed",
    "plan",
    "allocation",
    "distortion",
    "forecast",
    "budget",
    "convert",
    "rewrite",
    "importing",
    "estimate",
    "linear",
    "experts",
    "sites",
    "model",
    "inplace",
    "evaluate",
    "streaming",
    "calibrate",
    "sensitivity",
    "planner",
    "formats",
    "landscape",
    "forest",
    "predict",
    "outlook",
    "bench_worker",
    "bench",
    "survey",
    "exporting",
    "verify",
    "chain",
    "compensate",
    "compensating",
    "charts",
    "html_report",
    "integrations",
    "__init__",  # re-exports; nobody before it may import from the package itself
    "console",
    "calibrating",
    "interchange",
    "recycling",
    "planning",
    "foresight",
    "cli",
    "__main__",
]
CALL_TORCH_OPS = {"ops", "fakes", "linear"}  # fakes for the gradient, linear for the compiled call

SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
MODULES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def reachable(path: Path) -> set[str]:
    """Every header that a file sees, through our own headers."""
    seen: set[str] = set()
    pending = includes(path)
    while pending:
        header = pending.pop()
        if header not in seen:
            seen.add(header)
            if (CSRC / header).exists():
                pending += includes(CSRC / header)
    return seen


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_includes_point_down(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    for header in includes(path):
        if (CSRC / header).exists():
            assert header.split("/")[0] in MAY_INCLUDE[folder], f"{relative(path)} must not include {header}"
            continue
        assert "/" not in header or header.split("/")[0] not in MAY_INCLUDE, f"{relative(path)}: no such file {header}"
        for pattern, folders in FOREIGN.items():
            assert folder in folders or not re.match(pattern, header), f"{relative(path)} must not include {header}"


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.suffix == ".cpp" and p.parent.name == "bindings"], ids=relative
)
def test_torch_and_pybind11_never_meet(path: Path) -> None:
    """torch's own pybind headers refuse the stable ABI, and `_C` must load without torch."""
    headers = reachable(path)
    assert not (any(h.startswith("torch/") for h in headers) and any(h.startswith("pybind11/") for h in headers))


def test_every_folder_has_a_rule() -> None:
    assert {p.relative_to(CSRC).parts[0] for p in SOURCES} == set(MAY_INCLUDE)


def module_name(path: Path) -> str:
    """The entry of ORDER that a file belongs to."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "precal_ext":
                found.add(parts[1] if len(parts) > 1 and parts[1] in ORDER else "__init__")
    return found


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    assert module in ORDER, f"{relative(path)}: say in ORDER where it stands"
    for imported in imported_modules(path) - {module}:
        assert ORDER.index(imported) < ORDER.index(module), f"{relative(path)} must not import {imported}"


@pytest.mark.parametrize("path", [p for p in MODULES if module_name(p) not in CALL_TORCH_OPS], ids=relative)
def test_only_ops_and_linear_call_torch_ops(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    assert not [node.lineno for node in calls if ast.unparse(node).startswith("torch.ops.precal")]


# Declared and not imported: it trains what the package only evaluates.
UNSEEN = {"scikit-learn"}
# Imported and come with another: transformers needs the first, jinja2 the second, and who calls what imports the others
# has them.
BROUGHT = {"huggingface_hub", "markupsafe", "accelerate", "peft"}
# A host that calls us: where it is not, nothing imports it.
HOSTS = {"vllm"}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ours = {"test", "serving", "bench", "dev"}  # not of the package
    wanted = [*project["dependencies"], *(d for name in extras.keys() - ours for d in extras[name])]
    declared = {re.match(r"[\w-]+", d)[0] for d in wanted}
    imported = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    imported -= set(sys.stdlib_module_names) | {"precal_ext"}
    assert imported - BROUGHT - HOSTS == declared - UNSEEN


def test_the_rules_find_what_they_forbid(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from precal_ext import model, quantize_model\n    import precal_ext.cli\n")
    assert imported_modules(bad) == {"model", "cli", "__init__"}
    header = tmp_path / "bad.h"
    header.write_text('#include <torch/library.h>\n  # include "cpu/ops.h"\n// #include "cpu/no.h"\n')
    assert includes(header) == ["torch/library.h", "cpu/ops.h"]
