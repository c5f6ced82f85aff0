"""Hands the build over to CMake. Sources, flags and targets are in CMakeLists.txt; metadata is in pyproject.toml.

Environment: PRECAL_CUDA=auto|0|1, PRECAL_CUDA_ARCHS="80;90a", PRECAL_WERROR=1, PRECAL_BUILD_DIR.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def version() -> str:
    match = re.search(r'__version__ = "([^"]+)"', (ROOT / "precal_ext" / "_version.py").read_text())
    assert match is not None
    return match[1]


class CMakeBuild(build_ext):
    """Configure, build and install everything that is compiled into the package folder."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        target = ROOT / "precal_ext" if in_place else Path(self.build_lib).resolve() / "precal_ext"
        default = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir = Path(os.environ.get("PRECAL_BUILD_DIR", default))
        build_dir.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": str(target),
            "Python_EXECUTABLE": sys.executable,
            "PRECAL_VERSION": version(),
            "PRECAL_CUDA": os.environ.get("PRECAL_CUDA", "auto"),
            "PRECAL_CUDA_ARCHS": os.environ.get("PRECAL_CUDA_ARCHS", ""),
            "PRECAL_WERROR": os.environ.get("PRECAL_WERROR", "0"),
        }
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir)]
        subprocess.run(configure + [f"-D{k}={v}" for k, v in options.items()], check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        for stale in target.glob("*.so"):  # of another configuration: CUDA libraries in a build without CUDA
            stale.unlink()
        subprocess.run(["cmake", "--install", str(build_dir)], check=True)

    def get_outputs(self) -> list[str]:
        return []


setup(ext_modules=[Extension("precal_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
