"""The example: it learns, agrees with torch.nn, leaves a plot, and explains bad arguments."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_rnn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parents[1] / "examples" / "char_lm.py"
SMALL = ["--hidden", "24", "--batch", "8", "--window", "16", "--lr", "0.03"]


@pytest.fixture(scope="module")
def char_lm():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLE.parent))  # as for a script
        yield importlib.import_module("char_lm")
    for name in ("char_lm", "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def text(char_lm, tmp_path):
    """A short text, the start of the standard library's source."""
    path = tmp_path / "text.txt"
    path.write_bytes(char_lm.read_stdlib()[:20_000])
    return path


def rows(output):
    """The result table as {first column: [numbers of the row]}."""
    table = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    number = re.compile(r"[\d.,]+(?:e[+-]?\d+)?")
    return {
        cells[0].strip(): [float(n.replace(",", "")) for n in number.findall(" ".join(cells[1:]))]
        for cells in table
    }


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_learns_as_torch_does(char_lm, text, tmp_path, capsys, cell):
    out = tmp_path / "not" / "there" / "yet"
    argv = ["--cell", cell, "--text", str(text), "--steps", "120", "--generate", "40", *SMALL]
    status = char_lm.main([*argv, "--out", str(out)])
    output = capsys.readouterr().out
    assert status == 0
    table = rows(output)
    baseline = float(re.search(r"unigram entropy ([\d.]+)", output)[1])
    losses = table["final loss"]
    assert len(losses) == 2
    # Context is worth at least a fifth of a nat after so short a training: what is learnt first,
    # that spaces follow spaces, is already worth more.
    assert max(losses) < baseline - 0.2
    assert max(losses) - min(losses) < 0.01 * baseline
    assert table["largest difference, first 100 steps"][0] <= 1e-4
    assert min(table["tokens/s"]) > 0
    assert "def " in output
    assert (out / "char_lm.png").read_bytes().startswith(b"\x89PNG")


def test_wraps_around_a_short_text(char_lm, text, tmp_path):
    text.write_bytes(text.read_bytes()[:300])
    argv = ["--text", str(text), "--steps", "12", "--out", str(tmp_path), "--generate", "5", *SMALL]
    assert char_lm.main([*argv, "--temperature", "0"]) == 0


def test_fails_when_the_losses_differ(char_lm, text, tmp_path, capsys, monkeypatch):
    def perturb(model):
        with torch.no_grad():
            model.rnn.weight_hh_l0.mul_(1.5)
        return model

    monkeypatch.setattr(char_lm.fused_rnn, "replace", perturb)
    argv = ["--text", str(text), "--steps", "10", "--out", str(tmp_path), "--generate", "0", *SMALL]
    assert char_lm.main(argv) == 1
    assert "losses of torch.nn and fused_rnn differ" in capsys.readouterr().err


def test_not_a_number_is_a_difference(char_lm):
    assert char_lm.relative_difference(float("nan"), float("nan")) == float("inf")
    assert char_lm.relative_difference(2.0, 1.0) == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "-3"], "argument --steps: must be at least 1, got -3"),
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--steps", "many"], "argument --steps: invalid positive value: 'many'"),
        (["--hidden", "0"], "argument --hidden: must be at least 1, got 0"),
        (["--generate", "-1"], "argument --generate: must be finite and not negative, got -1"),
        (["--temperature", "nan"], "argument --temperature: must be finite and not negative"),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--cell", "lstn"], "argument --cell: invalid choice: 'lstn'"),
        (["--device", "toaster"], "argument --device: cannot train on 'toaster'"),
        (["--device", "meta"], "argument --device: cannot train on 'meta'"),
        (["--text", "no_such_file.txt"], "--text: cannot read no_such_file.txt: No such file"),
        (["--text", "."], "--text: cannot read .: Is a directory"),
    ],
)
def test_bad_arguments(char_lm, capsys, tmp_path, argv, message):
    with pytest.raises(SystemExit) as exit_:
        char_lm.main(["--out", str(tmp_path), *argv])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("length", [0, 100])
def test_text_too_short(char_lm, capsys, tmp_path, length):
    text = tmp_path / "short.txt"
    text.write_bytes(b"x" * length)
    with pytest.raises(SystemExit):
        char_lm.main(["--text", str(text), "--out", str(tmp_path), *SMALL])
    message = capsys.readouterr().err
    assert "a batch of 8 windows of 16 characters needs at least 136 bytes" in message
    assert f"got {length} from {text}" in message


def test_out_is_a_file(char_lm, capsys, text):
    with pytest.raises(SystemExit):
        char_lm.main(["--out", str(text)])
    assert "File exists" in capsys.readouterr().err


def test_stdlib_is_the_same_every_time(char_lm):
    assert char_lm.read_stdlib() == char_lm.read_stdlib()
    assert len(char_lm.read_stdlib()) > 1_000_000


def test_runs_as_a_script(text, tmp_path):
    argv = ["--text", str(text), "--steps", "3", "--out", str(tmp_path), *SMALL]
    command = [sys.executable, str(EXAMPLE), *argv]
    package = Path(fused_rnn.__file__).parents[1]  # the one under test, installed or not
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "written by the model" in done.stdout
