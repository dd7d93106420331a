"""`python -m fused_rnn doctor`: every section, and advice that follows from what is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_rnn import __main__, direct, dispatch, native
from fused_rnn.cells import CELLS

ROOT = Path(__file__).resolve().parent.parent


def test_doctor_tells_what_runs_where(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert __main__.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text
    for cell in CELLS:
        problem = __main__._problem(cell, torch.float32, "cpu")
        assert f"cpu float32 {cell}: {dispatch.select(problem).describe(problem)}" in text
        assert f"cpu float64 {cell}: reference; not cpu: needs dtype float32" in text


@pytest.mark.parametrize(
    ("missing", "is_there", "advice"),
    [
        (None, True, "nothing is missing"),
        ("lost on the way", False, "install a C++ compiler"),
        ("lost on the way", True, "is there but does not load"),
    ],
)
def test_doctor_advises_on_a_missing_library(
    capsys, monkeypatch, tmp_path, missing, is_there, advice
):
    library = tmp_path / "library.so"
    if is_there:
        library.touch()
    monkeypatch.delenv("FUSED_RNN_SKIP_BUILD", raising=False)
    monkeypatch.setattr(native, "cpu_library_error", lambda: missing)
    monkeypatch.setattr(native, "library_path", lambda: library)
    monkeypatch.setattr(direct, "calls", lambda: None)
    __main__.main(["doctor"])
    text = capsys.readouterr().out
    assert ("lost on the way" in text) == bool(missing)
    assert advice in text


@pytest.mark.parametrize(
    ("found", "advice"),
    [(None, "module: install Python's headers"), (True, "which is there but cannot be used")],
)
def test_doctor_advises_on_an_extension_module(found, advice, capsys, monkeypatch):
    monkeypatch.setattr(native, "cpu_library_error", lambda: None)
    monkeypatch.setattr(direct, "calls", lambda: direct._NoCalls)
    monkeypatch.setattr(__main__, "find_spec", lambda name: found)
    __main__.main(["doctor"])
    assert advice in capsys.readouterr().out


def test_a_library_that_does_not_load_is_reported_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.delenv("FUSED_RNN_SKIP_BUILD", raising=False)
    damaged = tmp_path / "libdamaged.so"
    damaged.write_text("no library")
    error = native._load_error(damaged, "CPU", "")
    assert error.startswith(f"the CPU library cannot be loaded: {damaged}: ")
    assert "Could not load this library" not in error


def test_doctor_shows_a_wrong_environment_as_an_error(capsys, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "quantum")
    __main__.main(["doctor"])
    text = capsys.readouterr().out
    assert "FUSED_RNN_BACKEND=quantum" in text
    assert "error: FUSED_RNN_BACKEND: expected one of auto, " in text
    assert "set FUSED_RNN_BACKEND to something else, or unset it" in text


def test_doctor_shows_every_variable_of_the_docs(capsys, monkeypatch):
    page = (ROOT / "docs" / "backends.md").read_text().partition("## Environment variables")[2]
    names = re.findall(r"^\| `(\w+)` \| (?:build, )?run \|", page, re.MULTILINE)
    assert {"FUSED_RNN_LOG", "FUSED_RNN_SKIP_BUILD", "TRITON_INTERPRET"} <= set(names)
    for name in names:
        monkeypatch.setenv(name, "0")
    __main__.main(["doctor"])
    text = capsys.readouterr().out
    assert [name for name in names if f"  {name}=0\n" not in text] == []


def test_the_docs_have_every_variable_that_is_read():
    page = (ROOT / "docs" / "backends.md").read_text().partition("## Environment variables")[2]
    read = set()
    for path in [ROOT / "setup.py", *(ROOT / "fused_rnn").rglob("*.py")]:
        found = re.findall(
            r'\b(?:environ\.get|environ|is_set|choice|number)[(\[]"(\w+)"', path.read_text()
        )
        read |= set(found)
    assert {"FUSED_RNN_BACKEND", "FORCE_CUDA"} <= read
    assert {name for name in read if f"`{name}`" not in page} == set()


def test_instruction_sets_of_the_doctor_are_those_of_the_library(set_capability):
    module = pytest.importorskip("fused_rnn._C", reason="the extension module was not built")
    built, features = module.build_facts()["capabilities"], module.cpu_features()
    set_capability("none of these")
    with pytest.raises(RuntimeError, match=f"expected one of {', '.join(built)};"):
        native.cpu_capability()
    for name in built:
        set_capability(name)
        try:
            native.cpu_capability()
        except RuntimeError:
            assert not features[name]
        else:
            assert features.get(name, name == "portable")


def test_doctor_from_the_command_line():
    command = [sys.executable, "-m", "fused_rnn", "doctor"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "What to do" in result.stdout


def test_a_command_that_is_none(capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["cure"])
    assert "invalid choice: 'cure'" in capsys.readouterr().err
