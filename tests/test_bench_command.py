"""`python -m fused_rnn bench` times what it says it times."""

import copy

import pytest
import torch

from fused_rnn import __main__
from fused_rnn.bench import time_module

SMALL = ["--hidden", "8", "--batch", "2", "--timesteps", "3", "--seconds", "0"]


class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(6, 8, bidirectional=True)
        self.out = torch.nn.Linear(16, 3)

    def forward(self, x):
        return {"scores": self.out(self.lstm(x)[0])}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 9.0, 9.0))


def test_prints_both_modes_with_ratio_and_kernel(capsys):
    assert __main__.main(["bench", "--cell", "gru", *SMALL, "--backend", "reference"]) == 0
    _, inference, training = capsys.readouterr().out.splitlines()
    for mode, line in (("inference", inference), ("training", training)):
        assert line.startswith(mode)
        assert "times as fast" in line
        assert "reference" in line


@pytest.mark.parametrize(("load", "lines"), [(0.4, 1), (0.6, 2)])
def test_busy_machine_is_told_before_anything_is_timed(capsys, monkeypatch, load, lines):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert __main__.main(["bench", *SMALL, "--mode", "inference"]) == 0
    *before, timed = capsys.readouterr().out.splitlines()
    assert len(before) == lines and timed.startswith("inference")
    assert (f"busy, load average {load}" in before[-1]) == (lines == 2)


@pytest.mark.parametrize("name", ["cell", "hidden", "layers", "batch", "timesteps"])
def test_sizes_of_a_layer_do_not_go_with_a_model(name):
    value = "lstm" if name == "cell" else "1"  # a default, which would not be seen
    with pytest.raises(SystemExit, match=f"--{name} is of a layer that is made"):
        __main__.main(["bench", "--model", "some.pt", "--input", "3,4,5", f"--{name}", value])


def test_directions_do_not_go_with_a_model():
    with pytest.raises(SystemExit, match="--bidirectional is of a layer that is made"):
        __main__.main(["bench", "--model", "some.pt", "--input", "3,4,5", "--bidirectional"])


def test_times_a_saved_model(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(Tagger(), path)
    arguments = ["bench", "--model", str(path), "--input", "4,2,6", "--seconds", "0"]
    assert __main__.main(arguments) == 0
    assert capsys.readouterr().out.count("times as fast") == 2


def test_module_stays_as_it_is():
    model = Tagger()
    before = copy.deepcopy(model.state_dict())
    timing = time_module(model, torch.randn(4, 2, 6), mode="training", seconds=0)
    assert type(model.lstm) is torch.nn.LSTM
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert timing.before > 0 and timing.after > 0
    assert timing.difference < 1e-5


def test_difference_of_outputs_is_told(monkeypatch):
    """A conversion that computes something else must show."""
    from fused_rnn import bench

    def spoil(model):
        with torch.no_grad():
            model.out.bias += 1
        return model

    monkeypatch.setattr(bench, "replace", spoil)
    assert time_module(Tagger(), torch.randn(4, 2, 6), seconds=0).difference > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "nowhere"], "nowhere"),
        (["--device", "meta"], "meta"),
        (["--hidden", "9" * 25], "bench: "),
        (["--dtype", "float64", "--backend", "cpu"], "float64"),
    ],
)
def test_what_cannot_be_run_is_told(arguments, message):
    with pytest.raises(SystemExit, match=message):
        __main__.main(["bench", *SMALL, *arguments])


def test_input_of_another_width_than_the_models(tmp_path):
    torch.save(Tagger(), path := tmp_path / "model.pt")
    with pytest.raises(SystemExit, match=r"bench: RuntimeError: .*Expected 6, got 5"):
        __main__.main(["bench", "--model", str(path), "--input", "4,2,5", "--seconds", "0"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "nan"], "seconds"),
        (["--seconds", "-1"], "seconds"),
        (["--hidden", "\u00b2"], "positive"),
        (["--hidden", "0"], "positive"),
        (["--cell", "elman"], "elman"),
        (["--input", "3,x"], "positive"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        __main__.main(["bench", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "3,4,5"], "T,B,I"),
        (["--model", "some.pt"], "--input"),
        (["--model", ""], "--input"),
    ],
)
def test_inputs_that_do_not_fit(arguments, message):
    with pytest.raises(SystemExit, match=message):
        __main__.main(["bench", *arguments])


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("def model(): ...")
    with pytest.raises(SystemExit, match="--model: UnpicklingError: "):
        __main__.main(["bench", "--model", str(path), "--input", "3,4,5"])


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode: expected"):
        time_module(Tagger(), torch.randn(4, 2, 6), mode="backward")
