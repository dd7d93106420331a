"""The package builds wherever pip may build it, and importing it does nothing heavy."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.repository import tracked_files

import fused_rnn

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = os.environ.get("FUSED_RNN_SKIP_BUILD", "0") not in ("", "0")

# Before the build: no network, and nothing of the caller's that names a compiler.
PIP_WHEEL = [
    *(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"),
    *("--disable-pip-version-check", "-v", "."),
]


def clean_env(**changes: str) -> dict[str, str]:
    ours = ("FUSED_RNN_SKIP_BUILD", "FUSED_RNN_BACKEND", "FUSED_RNN_CPU_CAPABILITY")
    env = {k: v for k, v in os.environ.items() if k not in (*ours, "PYTHONPATH")}
    return env | changes


def run(command: list[str], cwd: Path, **env: str) -> str:
    """Stdout and stderr of a command that must succeed."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=clean_env(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def copy_of_sources(target: Path) -> Path:
    """What a build reads, without anything built before."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    built = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fused_rnn"):
        shutil.copytree(ROOT / name, target / name, ignore=built)
    return target


def build_wheel(source: Path, **env: str) -> tuple[str, set[str], str]:
    """The wheel's name, the files in it, and what the build said."""
    output = run([*PIP_WHEEL, "-w", "wheels"], source, **env)
    (wheel,) = (source / "wheels").glob("*.whl")
    return wheel.name, set(zipfile.ZipFile(wheel).namelist()), output


def package_files() -> set[str]:
    """All of the package that git has or would add."""
    names = {path.relative_to(ROOT).as_posix() for path in tracked_files()}
    return {name for name in names if name.startswith("fused_rnn/") and not name.endswith(".so")}


def shared_objects(files: set[str]) -> list[str]:
    return sorted(name for name in files if name.endswith(".so"))


def needs_build_tools() -> None:
    pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    pytest.importorskip("pip")


def test_sdist_has_every_file_of_the_repository(tmp_path):
    needs_build_tools()
    pytest.importorskip("build")
    checkout, names = tmp_path / "checkout", set()
    for path in tracked_files():
        name = path.relative_to(ROOT)
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, checkout / name)
        names.add(name.as_posix())
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", "dist"]
    run(command, checkout, FUSED_RNN_SKIP_BUILD="1")
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    assert sdist.name == f"fused_rnn-{fused_rnn.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(names - packed) == []


def test_type_hints_are_for_users():
    """Without this file a type checker takes everything of the package for Any."""
    assert "fused_rnn/py.typed" in package_files()


@pytest.mark.slow
@pytest.mark.skipif(SKIPPED, reason="FUSED_RNN_SKIP_BUILD is set")
def test_sdist_builds_a_whole_wheel_in_an_empty_directory(tmp_path):
    needs_build_tools()
    pytest.importorskip("build")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    copy_of_sources(checkout)
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", "dist"], checkout)
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()

    name, files, _ = build_wheel(source)

    assert not name.endswith("-any.whl")
    assert package_files() <= files
    library, module = "libfused_rnn_cpu.so", "_C."
    names = [Path(file).name for file in shared_objects(files)]
    assert library in names
    assert any(file.startswith(module) for file in names)
    assert not any(file.startswith(("csrc/", "tests/")) for file in files)

    # What was built is what runs: the unpacked wheel, with the checkout nowhere on the path.
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(source / "wheels" / name) as archive:
        archive.extractall(unpacked)
    binary = (unpacked / "fused_rnn" / library).read_bytes()
    torch_is_at = Path(torch.__file__).parent
    assert not [place for place in (source, torch_is_at) if str(place).encode() in binary]
    code = "from fused_rnn import native; print(native.cpu_library_error(), native.build_facts())"
    output = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(unpacked))
    assert output.startswith("None ") and "'compiler'" in output


def test_skipping_the_build_makes_a_pure_wheel(tmp_path):
    needs_build_tools()
    name, files, output = build_wheel(copy_of_sources(tmp_path), FUSED_RNN_SKIP_BUILD="1")
    assert name.endswith("-py3-none-any.whl")
    assert package_files() <= files
    assert shared_objects(files) == []
    assert "FUSED_RNN_SKIP_BUILD is set" in output


def test_a_wheel_has_nothing_of_the_build_before(tmp_path):
    needs_build_tools()
    source = copy_of_sources(tmp_path)
    leftover = source / "fused_rnn" / "leftover.py"
    leftover.write_text("")
    _, files, _ = build_wheel(source, FUSED_RNN_SKIP_BUILD="1")
    assert "fused_rnn/leftover.py" in files
    leftover.unlink()
    _, files, _ = build_wheel(source, FUSED_RNN_SKIP_BUILD="1")
    assert "fused_rnn/leftover.py" not in files


def test_no_compiler_makes_a_pure_wheel_and_says_so(tmp_path):
    needs_build_tools()
    name, files, output = build_wheel(copy_of_sources(tmp_path), CXX="/nonexistent/c++")
    assert name.endswith("-py3-none-any.whl")
    assert package_files() <= files
    assert shared_objects(files) == []
    assert "NO C++ COMPILER (/nonexistent/c++)" in output


@pytest.mark.skipif(SKIPPED, reason="FUSED_RNN_SKIP_BUILD is set")
def test_a_failing_compile_is_an_error_with_the_compilers_message(tmp_path):
    needs_build_tools()
    if not any(shutil.which(name) for name in ("c++", "g++", os.environ.get("CXX", "c++"))):
        pytest.skip("needs a C++ compiler")
    source = copy_of_sources(tmp_path)
    # In what the first source includes: the others would be compiled before one that fails.
    (source / "csrc" / "layer_params.h").write_text('#error "on purpose"\n')
    result = subprocess.run(
        [*PIP_WHEEL, "-w", "wheels"],
        cwd=source,
        env=clean_env(MAX_JOBS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode != 0
    assert "on purpose" in result.stdout


@pytest.mark.parametrize("version", [str(torch.__version__), "2.12.0"])  # one that lacks things
def test_import_is_light(version):
    """No triton, no compiling, no subprocess, no CUDA context; measured instead by what it does."""
    code = f"""
        import os, subprocess, sys
        import torch

        torch.__version__ = type(torch.__version__)("{version}")
        before = set(sys.modules)

        def refuse(*args, **kwargs):
            raise AssertionError(f"import fused_rnn started a process: {{args}}")

        subprocess.Popen = os.system = os.posix_spawn = refuse
        import fused_rnn

        new = set(sys.modules) - before
        heavy = ("triton", "torch.utils.cpp_extension", "torch._inductor", "torch._dynamo", "ninja")
        heavy += ("torch.utils.flop_counter", "fused_rnn.testing", "hypothesis", "pytest")
        loaded = sorted(name for name in new if name.startswith(heavy))
        assert not loaded, loaded
        assert not torch.cuda.is_initialized()
        """
    run([sys.executable, "-c", textwrap.dedent(code)], ROOT, PYTHONPATH=str(ROOT))


def test_skip_build_at_run_time_hides_the_library():
    code = """
        import torch, fused_rnn
        from fused_rnn import native

        assert "FUSED_RNN_SKIP_BUILD" in native.cpu_library_error()
        fused_rnn.GRU(3, 4)(torch.randn(2, 1, 3))
        """
    run(
        [sys.executable, "-c", textwrap.dedent(code)],
        ROOT,
        PYTHONPATH=str(ROOT),
        FUSED_RNN_SKIP_BUILD="1",
    )


@pytest.fixture
def of_setup(monkeypatch):
    """What setup.py defines, without a build."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    pytest.importorskip("ninja")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_architectures_too_old_for_the_kernels_are_left_out(of_setup, monkeypatch, capsys):
    """The list of a container is for torch, which has kernels for them."""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 9.0a;12.0+PTX ")
    assert of_setup["architecture_flags"]() == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_120,code=[sm_120,compute_120]",
    ]
    assert "leaving out 7.5: the kernels need 8.0 or newer" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    with pytest.raises(SystemExit, match=r"expected one of 8.0 or newer, got '7.0;7.5\+PTX'"):
        of_setup["architecture_flags"]()


@pytest.mark.parametrize(
    ("command", "compiler"),
    [("g++", "g++"), ("ccache g++", "g++"), ("/usr/bin/ccache clang++ -m64", "clang++")],
)
def test_nvcc_gets_a_compiler(of_setup, command, compiler):
    """Which it runs in ways of its own: no command of several words."""
    assert of_setup["host_compiler"](command.split()) == compiler
