"""Builds fused_rnn: a CPU library against torch's stable ABI, and a small pybind11 module.

The metadata is in pyproject.toml. Environment: CXX (or CC) names the compiler, MAX_JOBS the
compilations at a time, DEBUG=1 builds without optimisation and with symbols, CXXFLAGS and
LDFLAGS are added, FUSED_RNN_SKIP_BUILD=1 builds nothing. Without a C++ compiler the package
installs as pure Python. Which CPU or GPU the building machine has does not matter.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("DEBUG", "0") not in ("", "0")
MACOS = sys.platform == "darwin"
X86 = platform.machine().lower() in ("x86_64", "amd64")
LIBRARY = "fused_rnn.libfused_rnn_cpu"  # a plain shared library, no Python module

# -ffp-contract: a * b + c becomes one multiply-add, which the kernels count on.
BASE_FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-ffp-contract=fast",
    *(["-O0", "-g"] if DEBUG else ["-O3", "-DNDEBUG"]),
    *(["-DFUSED_RNN_X86"] if X86 else []),
]
# One kernel source, compiled once per instruction set; the choice is made at run time.
ISA_FLAGS = {
    "csrc/cpu/kernels_portable.cpp": [],
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/kernels_avx512.cpp": ["-mavx512f", "-mavx2", "-mfma"],
    "csrc/cpu/kernels_avx512bf16.cpp": [
        *("-mavx512f", "-mavx512bf16", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    ],
}


def env_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command, or None when there is none this build can use."""
    named = os.environ.get("CXX") or os.environ.get("CC")
    candidates = [named] if named else [sysconfig.get_config_var("CXX") or "", "c++", "g++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        # MSVC has no vector extensions.
        if command and shutil.which(command[0]) and Path(command[0]).stem.lower() != "cl":
            return command
    return None


def library_sources() -> list[str]:
    kernels = list(ISA_FLAGS) if X86 else ["csrc/cpu/kernels_portable.cpp"]
    names = ("library", "border", "stepper", "layer", "team")
    return [*(f"csrc/cpu/{name}.cpp" for name in names), *kernels]


def extensions() -> list[Extension]:
    if os.environ.get("FUSED_RNN_SKIP_BUILD", "0") not in ("", "0"):
        say("FUSED_RNN_SKIP_BUILD is set: building nothing, the package will be pure Python")
        return []
    if find_compiler() is None:
        wanted = os.environ.get("CXX") or os.environ.get("CC") or "c++"
        say(f"NO C++ COMPILER ({wanted}): installing pure Python, WITHOUT the fast CPU kernels")
        return []
    found = [Extension(LIBRARY, library_sources())]
    # Debian keeps Python's headers in python3-dev. Without them only the doctor knows less.
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        found.append(Extension("fused_rnn._C", ["csrc/build_info.cpp"]))
    return found


def say(message: str) -> None:
    # pip shows what a build says only with -v, or when the build fails.
    print(f"fused_rnn: {message}", file=sys.stderr, flush=True)


def ninja_flags(flags: list[str]) -> str:
    return ninja_syntax.escape(shlex.join(flags))


class BuildExt(build_ext):
    """Hands all extensions to one run of ninja: each source has flags of its own, which
    setuptools' compilers cannot give, and what has not changed is not compiled again."""

    def get_ext_filename(self, fullname: str) -> str:
        # setuptools asks with and without the package in front.
        if fullname in (LIBRARY, LIBRARY.rpartition(".")[2]):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            self.write_build_file(ninja_syntax.Writer(file, width=10_000), folder)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [sys.executable, "-m", "ninja", "-C", str(folder), *jobs]
        result = subprocess.run(command, capture_output=True, text=True)
        # A compiler's own messages reach the user as they are.
        sys.stderr.write(result.stdout + result.stderr)
        if result.returncode != 0:
            raise SystemExit(f"fused_rnn: the build failed with status {result.returncode}")

    def write_build_file(self, out: ninja_syntax.Writer, folder: Path) -> None:
        compiler = find_compiler()
        assert compiler is not None  # else there would be no extension
        shared = ["-shared", "-undefined", "dynamic_lookup"] if MACOS else ["-shared"]
        compile_ = shlex.join([*compiler, *BASE_FLAGS])
        out.rule("compile", f"{compile_} $flags -MMD -MF $out.d -c $in -o $out", "compile $in",
                 depfile="$out.d", deps="gcc")  # fmt: skip
        out.rule("link", f"{shlex.join([*compiler, *shared])} $in $flags -o $out", "link $out")
        for ext in self.extensions:
            options = self.library_options if ext.name == LIBRARY else self.module_options
            includes, libraries = options()
            objects = []
            for source in ext.sources:
                flags = [*ISA_FLAGS.get(source, []), *includes, *env_flags("CXXFLAGS")]
                object_ = ninja_syntax.escape_path(f"{Path(source).stem}.o")
                path = ninja_syntax.escape_path(str(Path(source).resolve()))
                out.build(object_, "compile", path, variables={"flags": ninja_flags(flags)})
                objects.append(object_)
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [*libraries, *env_flags("LDFLAGS")]
            out.build(ninja_syntax.escape_path(str(target)), "link", objects,
                      variables={"flags": ninja_flags(flags)})  # fmt: skip

    def library_options(self) -> tuple[list[str], list[str]]:
        from torch.utils import cpp_extension

        # The oldest torch whose stable ABI has all we use; the binary then serves newer ones too.
        includes = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
        for path in cpp_extension.include_paths():
            includes += ["-isystem", path]
        # No rpath: torch is imported, hence loaded, before this library.
        paths = [f"-L{path}" for path in cpp_extension.library_paths()]
        return includes, [*paths, "-ltorch_cpu", "-ltorch"]

    def module_options(self) -> tuple[list[str], list[str]]:
        import pybind11
        import torch

        facts = {
            "FUSED_RNN_TORCH_VERSION": torch.__version__,
            "FUSED_RNN_CXX_FLAGS": shlex.join([*BASE_FLAGS, *env_flags("CXXFLAGS")]),
        }
        includes = [f'-D{name}="{value}"' for name, value in facts.items()]
        for path in (sysconfig.get_path("include"), pybind11.get_include()):
            includes += ["-isystem", path]
        return includes, []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
