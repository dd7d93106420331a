"""Builds fused_rnn: libraries against torch's stable ABI, and a small pybind11 module.

The CPU library is built wherever there is a C++ compiler; without one the package installs as pure
Python. The CUDA library takes nvcc, no GPU and some minutes, and is built when it is asked for:
FUSED_RNN_CUDA=1, =auto (when nvcc is there), or FORCE_CUDA=1 (or fail without it).
FUSED_RNN_EMULATE=1 builds the CUDA kernels for the CPU, for tests.

The metadata is in pyproject.toml. Environment: CXX names the compiler, MAX_JOBS the
compilations at a time, TORCH_CUDA_ARCH_LIST and NVCC_THREADS are as for torch's own extensions,
DEBUG=1 builds without optimisation and with symbols, CXXFLAGS and LDFLAGS are added,
FUSED_RNN_SKIP_BUILD=1 builds nothing. Which CPU or GPU the building machine has does not matter.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


DEBUG = is_set("DEBUG")
MACOS = sys.platform == "darwin"
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Plain shared libraries, no Python modules.
CPU_LIBRARY = "fused_rnn.libfused_rnn_cpu"
CUDA_LIBRARY = "fused_rnn.libfused_rnn_cuda"
EMULATED_LIBRARY = "fused_rnn.libfused_rnn_cuda_emulated"
LIBRARIES = (CPU_LIBRARY, CUDA_LIBRARY, EMULATED_LIBRARY)

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
BFLOAT16_FLAGS = ["-mavx512f", "-mavx512bf16", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"]
# One kernel source, compiled once per instruction set; the choice is made at run time.
ISA_FLAGS = {
    "csrc/cpu/kernels_portable.cpp": [],
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma"],
    "csrc/cpu/kernels_avx512.cpp": ["-mavx512f", "-mavx2", "-mfma"],
    "csrc/cpu/kernels_avx512bf16.cpp": BFLOAT16_FLAGS,
    "csrc/cpu/kernels_amx.cpp": BFLOAT16_FLAGS,  # AMX itself is in assembly
    "csrc/cpu/kernels_amxbf16.cpp": BFLOAT16_FLAGS,
}

# The CUDA kernels, compiled once per element type and direction of time, side by side.
SCAN_SOURCES = tuple(f"csrc/cuda/scan_{cell}.cu" for cell in ("lstm", "gru", "rnn"))
SCAN_VARIANTS = tuple(
    [f"-DFUSED_RNN_ELEMENT={element}", f"-DFUSED_RNN_PARAMS={params}"]
    for element in ("bfloat16", "float16", "float32", "tf32")
    for params in ("BackwardParams", "ForwardParams")
)
STEP_SOURCE = "csrc/cuda/steps.cu"  # small kernels, for all of these at once
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
]
EMULATOR_SOURCES = tuple(
    f"csrc/cuda/{name}.cpp"
    for name in ("emulator", "emulated_arithmetic", "emulated_primitives", "weak_memory")
)
# For the emulation, which is slow for other reasons, compilers should rather be quick.
EMULATED_FLAGS = ["-O1", "-DFUSED_RNN_EMULATED", "-Wno-unknown-pragmas"]
# What is compiled for 8.0 runs on 8.6 and 8.9 as it is. Of PTX, that of compute_90a would run on
# nothing newer.
CUDA_ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def env_flags(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_compiler() -> list[str] | None:
    """The C++ compiler as a command, or None when there is none this build can use."""
    named = os.environ.get("CXX")
    candidates = [named] if named else [sysconfig.get_config_var("CXX") or "", "c++", "g++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        # MSVC has no vector extensions.
        if command and shutil.which(command[0]) and Path(command[0]).stem.lower() != "cl":
            return command
    return None


def wants_cuda() -> bool:
    """Whether to build the CUDA library; ends the build where it is forced and cannot be."""
    forced = is_set("FORCE_CUDA")
    wanted = os.environ.get("FUSED_RNN_CUDA", "0") or "0"
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"fused_rnn: FUSED_RNN_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if shutil.which("nvcc"):
        return forced or wanted != "0"
    if forced:
        raise SystemExit("fused_rnn: FORCE_CUDA is set, but there is no nvcc on the PATH")
    if wanted == "1":
        say("NO NVCC on the PATH: building WITHOUT the CUDA kernels; FORCE_CUDA=1 would fail")
    return False


def host_compiler(command: list[str]) -> str:
    """The compiler itself, for nvcc, of a command that may begin with a cache."""
    caches = ("ccache", "sccache", "distcc")
    return next(
        (word for word in command if Path(word).name not in caches and not word.startswith("-")),
        command[0],
    )


def architecture_flags() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST: numbers, of which +PTX adds the portable form. Those
    below 8.0, which the lists of some containers have for torch, are left out."""
    flags = []
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    for name in filter(None, names.replace(" ", ";").split(";")):
        number = name.removesuffix("+PTX").replace(".", "")
        if number.isdecimal() and int(number) < 80:
            say(f"TORCH_CUDA_ARCH_LIST: leaving out {name}: the kernels need 8.0 or newer")
            continue
        codes = [f"sm_{number}", *([f"compute_{number}"] if name.endswith("+PTX") else [])]
        flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
    if not flags:
        raise SystemExit(
            f"fused_rnn: TORCH_CUDA_ARCH_LIST: expected one of 8.0 or newer, got {names!r}"
        )
    return flags


def library_sources() -> list[str]:
    kernels = list(ISA_FLAGS) if X86 else ["csrc/cpu/kernels_portable.cpp"]
    operators = ("library", "border", "infer", "infer_half", "train", "saved", "stepper", "pieces")
    names = (*operators, "direct", "layer_forward", "layer_backward", "team")
    return [*(f"csrc/cpu/{name}.cpp" for name in names), *kernels]


def extensions() -> list[Extension]:
    if is_set("FUSED_RNN_SKIP_BUILD"):
        say("FUSED_RNN_SKIP_BUILD is set: building nothing, the package will be pure Python")
        return []
    if find_compiler() is None:
        wanted = os.environ.get("CXX") or "c++"
        say(f"NO C++ COMPILER ({wanted}): installing pure Python, WITHOUT the fast CPU kernels")
        return []
    found = [Extension(CPU_LIBRARY, library_sources())]
    names = ("cuda/library", "cuda/stack_scan", "cuda/step_scan", "plan")
    host = [f"csrc/{name}.cpp" for name in names]
    scans = [*host, *SCAN_SOURCES, STEP_SOURCE]
    if is_set("FUSED_RNN_EMULATE"):
        found.append(Extension(EMULATED_LIBRARY, [*scans, *EMULATOR_SOURCES]))
    if wants_cuda():
        found.append(Extension(CUDA_LIBRARY, scans))
    # Debian keeps Python's headers in python3-dev. Without them the doctor knows less, and small
    # calls take some microseconds more.
    if Path(sysconfig.get_path("include"), "Python.h").exists():
        calls = ("connection", "direct_calls", "direct_inference", "direct_training", "tensors")
        sources = [f"csrc/python/{name}.cpp" for name in ("module", *calls)]
        found.append(Extension("fused_rnn._C", [*sources, "csrc/plan.cpp"]))
    return found


def say(message: str) -> None:
    # pip shows what a build says only with -v, or when the build fails.
    print(f"fused_rnn: {message}", file=sys.stderr, flush=True)


def escaped(text: object) -> str:
    """For ninja, which reads variables behind a $; spaces of paths are escaped by its writer."""
    return str(text).replace("$", "$$")


def ninja_flags(flags: list[str]) -> str:
    return escaped(shlex.join(flags))


class BuildPy(build_py):
    """Into an empty folder: a wheel takes what lies there, of whatever build before."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "fused_rnn"), ignore_errors=True)
        super().run()


class BuildExt(build_ext):
    """Hands all extensions to one run of ninja: each source has flags of its own, which
    setuptools' compilers cannot give, and what has not changed is not compiled again."""

    def get_ext_filename(self, fullname: str) -> str:
        # setuptools asks with and without the package in front.
        if fullname.removeprefix("fused_rnn.") in (name.partition(".")[2] for name in LIBRARIES):
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        from ninja import ninja_syntax  # here, since pure Python needs none

        folder = self.objects_folder().resolve()
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

    def objects_folder(self) -> Path:
        """One for all ways of building, of which pip's for the sources as they lie would have each
        start anew; but of each torch, whose headers ninja does not look at."""
        import torch

        kind = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        return Path("build", f"temp.{kind}-torch{torch.__version__}")

    def write_build_file(self, out: Any, folder: Path) -> None:
        """`out`: a ninja_syntax.Writer."""
        from torch.utils import cpp_extension

        compiler = find_compiler()
        assert compiler is not None  # else there would be no extension
        shared = ["-shared", "-undefined", "dynamic_lookup"] if MACOS else ["-shared"]
        # Messages name their place in the sources, ours or torch's, not where these lay when they
        # were built.
        roots = [Path(__file__).resolve().parent, *cpp_extension.include_paths()]
        places = [f"-fmacro-prefix-map={root}{os.sep}=" for root in roots]
        compile_ = ninja_flags([*compiler, *BASE_FLAGS, *places])
        out.rule("compile", f"{compile_} $flags -MMD -MF $out.d -c $in -o $out", "compile $in",
                 depfile="$out.d", deps="gcc")  # fmt: skip
        out.rule("link", f"{shlex.join([*compiler, *shared])} $in $flags -o $out", "link $out")
        if any(ext.name == CUDA_LIBRARY for ext in self.extensions):
            nvcc = ["nvcc", "-ccbin", host_compiler(compiler), *NVCC_FLAGS, *architecture_flags()]
            nvcc += ["--threads", os.environ["NVCC_THREADS"]] if is_set("NVCC_THREADS") else []
            out.rule("nvcc", f"{ninja_flags(nvcc)} $flags -MD -MF $out.d -c $in -o $out",
                     "nvcc $out", depfile="$out.d", deps="gcc")  # fmt: skip
            link = f"{shlex.join(nvcc[:3])} -shared -cudart static"
            out.rule("nvcc_link", f"{link} $in $flags -o $out", "link $out")
        for ext in self.extensions:
            cuda = ext.name == CUDA_LIBRARY
            options = self.library_options if ext.name in LIBRARIES else self.module_options
            includes, libraries = options()
            objects = []
            for source, variant, number in self.compilations(ext):
                flags = [*includes, *variant, *([] if cuda else env_flags("CXXFLAGS"))]
                stem = f"{ext.name.rpartition('.')[2]}-{Path(source).stem}{number}"
                object_ = f"{stem}.o"
                path = escaped(Path(source).resolve())
                out.build(object_, "nvcc" if cuda else "compile", path,
                          variables={"flags": ninja_flags(flags)})  # fmt: skip
                objects.append(object_)
            target = Path(self.get_ext_fullpath(ext.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [*libraries, *([] if cuda else env_flags("LDFLAGS"))]
            out.build(escaped(target), "nvcc_link" if cuda else "link",
                      objects, variables={"flags": ninja_flags(flags)})  # fmt: skip

    def compilations(self, ext: Extension) -> Iterator[tuple[str, list[str], str]]:
        """Source, flags of its own, and what tells its object from others of the source."""
        own = EMULATED_FLAGS if ext.name == EMULATED_LIBRARY else []
        for source in ext.sources:
            if not source.endswith(".cu"):
                yield source, [*ISA_FLAGS.get(source, []), *own], ""
                continue
            language = ["-x", "c++"] if ext.name == EMULATED_LIBRARY else []
            variants = SCAN_VARIANTS if source in SCAN_SOURCES else [[]]
            for number, variant in enumerate(variants):
                yield source, [*own, *variant, *language], str(number)

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
        # Of torch's headers only dlpack.h, which has nothing of torch.
        torch_include = Path(torch.__file__).parent / "include"
        for path in (sysconfig.get_path("include"), pybind11.get_include(), str(torch_include)):
            includes += ["-isystem", path]
        return includes, []


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
