"""Builds fastmask and, where torch, CMake and a C++ compiler are there, its native kernels; the rest is pyproject.toml.

Without them the package installs all the same, and `python -m fastmask.kernels` says which ops run slower.
"""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent.resolve()


def torch_root() -> Path | None:
    """Return the folder of torch: of this process, or, in an isolated build, of the environment that is built for."""
    found = importlib.util.find_spec("torch")
    places = [Path(found.origin).parent] if found and found.origin else []
    # An isolated build runs the environment's own Python, with another place to look for packages put first.
    places.append(Path(sysconfig.get_paths()["purelib"]) / "torch")
    wanted = "include/torch/csrc/stable/library.h"
    return next((place for place in places if (place / wanted).exists()), None)


class CMakeBuild(build_ext):
    """Calls CMake, or says in one line why not."""

    def run(self) -> None:
        """Build the library into the package."""
        root, missing = torch_root(), None
        if root is None:
            missing = "torch >= 2.11 is not installed (install it first)"
        elif shutil.which("cmake") is None:
            missing = "cmake is not installed"
        elif not any(map(shutil.which, ("c++", "g++", "clang++"))):
            missing = "there is no C++ compiler"
        if missing:
            self.say(f"not built, since {missing}; the CPU runs plain PyTorch instead")
            return
        package = HERE if self.editable_mode else Path(self.build_lib).resolve()
        out = package / "fastmask" / "kernels"
        build = Path(self.build_temp).resolve()
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = ["cmake", "-S", str(HERE), "-B", str(build), f"-DTORCH_ROOT={root}", f"-DFASTMASK_OUT={out}"]
        for command in ([*configure, *generator], ["cmake", "--build", str(build), "--parallel"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stderr.write(done.stdout + done.stderr)
                self.say("not built, the compiler's words stand above; the CPU runs plain PyTorch instead")
                return
        self.say(f"built for the CPU, {out / '_native.so'}")

    def say(self, line: str) -> None:
        """Print what became of the build."""
        sys.stderr.write(f"native kernels: {line}\n")

    def get_outputs(self) -> list[str]:
        """Return nothing: what is built is no Python extension, and may be missing."""
        return []

    def get_source_files(self) -> list[str]:
        """Return nothing: CMake knows the sources."""
        return []


class Wheel(bdist_wheel):
    """A wheel for every Python: the library knows nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return Python, its ABI, and the platform that the library is for."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fastmask.kernels._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
