"""The Triton planner: which regime and tiles a problem gets, and the reasons, without triton."""

import json
import pwd
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from fused_rnn import __main__
from fused_rnn.backends.triton import plan as planner
from fused_rnn.backends.triton import tune
from fused_rnn.backends.triton.plan import Config, Device, Row, UnfitError, make_plan
from fused_rnn.cells import CELLS
from fused_rnn.problem import Problem

ROOT = Path(__file__).parents[1]
H200 = Device("sm90", 132, 232448, True)
A100 = Device("sm80", 108, 166912, True)
B200 = Device("sm100", 148, 232448, True)
MI300 = Device("gfx942", 304, 65536, False)
DEVICES = (H200, A100, B200, MI300)


@pytest.fixture(autouse=True)
def no_table_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_RNN_TRITON_TUNING", str(tmp_path / "none.json"))


def _problem(cell="lstm", hidden=128, batch=16, dtype=torch.bfloat16, **changes):
    problem = Problem(
        cell_name=cell, timesteps=100, batch_size=batch, input_size=64, hidden_size=hidden,
        training=True, dtype=dtype, device_type="cuda",
    )  # fmt: skip
    return replace(problem, **changes)


@pytest.mark.parametrize(
    ("device", "problem", "precision", "forward", "backward"),
    [
        (H200, _problem(hidden=64), "ieee", "program", "program"),
        (H200, _problem(hidden=128, batch=2000), "ieee", "program", "program"),
        (H200, _problem(hidden=17, batch=1), "ieee", "program", "program"),
        (H200, _problem(hidden=256), "ieee", "grid", "grid"),
        (H200, _problem(hidden=512), "ieee", "grid", "grid"),
        (H200, _problem(hidden=1024), "ieee", "grid", "grid"),
        (H200, _problem(hidden=4096), "ieee", "steps", "steps"),
        (H200, _problem("gru", 200, directions=2), "ieee", "grid", "grid"),
        (H200, _problem("rnn_tanh", 256), "ieee", "program", "program"),
        (H200, _problem("gru_reset_before", 128), "ieee", "program", "program"),
        (H200, _problem("gru_reset_before", 512), "ieee", "grid", "grid"),
        (H200, _problem("gru_reset_before", 4096), "ieee", "steps", "steps"),
        (H200, _problem(hidden=256, dtype=torch.float32), "ieee", "grid", "grid"),
        (H200, _problem(hidden=256, dtype=torch.float32), "tf32", "grid", "grid"),
        (A100, _problem(hidden=128), "ieee", "program", "program"),
        (A100, _problem(hidden=512, directions=2), "ieee", "grid", "grid"),
        (B200, _problem(hidden=512), "ieee", "grid", "grid"),
        (H200._replace(cooperative=False), _problem(hidden=512), "ieee", "steps", "steps"),
        (H200._replace(multiprocessors=4), _problem(hidden=512), "ieee", "steps", "steps"),
    ],
)
def test_regime(device, problem, precision, forward, backward):
    found = make_plan(problem, device, precision)
    assert (found.forward.config.regime, found.backward.config.regime) == (forward, backward)


def test_inference_plans_no_backward():
    found = make_plan(_problem(training=False), H200, "ieee")
    assert found.backward is None
    assert "backward" not in str(found)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.family)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", CELLS)
def test_every_plan_fits(cell, dtype, device):
    """Whatever the size: a program has room, those that wait for each other run at once, and the
    launches together cover every row and unit once."""
    for hidden in (1, 16, 17, 33, 100, 128, 129, 256, 300, 512, 650, 1000, 1024, 2048, 8000):
        for batch in (1, 3, 16, 33, 129, 1000, 100_000):
            for directions in (1, 2):
                problem = _problem(cell, hidden, batch, dtype, directions=directions)
                found = make_plan(problem, device, "tf32")
                for which, one in (("forward", found.forward), ("backward", found.backward)):
                    config = one.config
                    used = planner.on_chip_bytes(config, problem, which, device.vendor)
                    assert used <= device.shared_memory
                    assert one.hidden_tiles * config.block_h >= hidden
                    assert one.batch_tiles * config.block_b >= batch
                    assert one.launches * one.tiles_per_launch >= one.batch_tiles
                    assert one.launches == 1 or config.regime == "grid"
                    if config.regime == "program":
                        assert one.hidden_tiles == 1
                    if config.regime == "grid":
                        programs = one.hidden_tiles * directions * one.tiles_per_launch
                        assert programs <= device.multiprocessors


def test_a_large_batch_waits_in_waves():
    """More programs than run at once: the batch is cut, and no program waits for one that has no
    place."""
    one = make_plan(_problem(hidden=256, batch=1000), H200, "ieee", "grid").forward
    assert one.launches > 1
    assert one.hidden_tiles * one.tiles_per_launch <= H200.multiprocessors


@pytest.mark.parametrize(
    ("regime", "problem", "device", "why"),
    [
        ("program", _problem(hidden=512), H200, "bytes on the chip, sm90 has 232448"),
        ("grid", _problem(hidden=8), H200, "8 units are one tile: there is nothing to exchange"),
        (
            "grid",
            _problem(hidden=512),
            H200._replace(cooperative=False),
            "all programs run at once",
        ),
        ("grid", _problem(hidden=4096), H200, "programs at least, 132 run at once"),
        ("grid", _problem(hidden=512, timesteps=2**30), H200, "more than 32 bits count"),
        (
            "grid",
            _problem("gru_reset_before", 512, timesteps=2**25),  # two arrivals a step
            H200,
            "more than 32 bits count",
        ),
    ],
)
def test_a_forced_regime_that_does_not_fit(regime, problem, device, why):
    with pytest.raises(UnfitError, match=f"regime '{regime}' does not fit: .*{why}"):
        make_plan(problem, device, "ieee", regime)


@pytest.mark.parametrize(("regime", "part"), [("grid", "exchange"), ("steps", "launch")])
def test_two_products_in_a_step_take_two_exchanges_or_launches(regime, part):
    times = []
    for cell in ("gru", "gru_reset_before"):
        problem = _problem(cell, 512)
        config = make_plan(problem, H200, "ieee", regime).forward.config
        times.append(getattr(planner.model(config, problem, H200, "forward"), part))
    assert times[1] == 2 * times[0] > 0


_KINDS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float32, exact": (torch.float32, "ieee"),
    "float32, TF32": (torch.float32, "tf32"),
}


def _modelled_steps():
    """The table of docs/triton-kernels.md: cell, units, kind and pass, and the numbers beside."""
    named, last = "", ""
    for line in (ROOT / "docs" / "triton-kernels.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 11 or cells[1] not in ("forward", "backward"):
            continue
        named = cells[0] or named
        if named.startswith("the same, reset before"):
            cell, hidden, kind = "gru_reset_before", *last[1:]
        else:
            name, hidden, kind = named.split(maxsplit=2)
            cell, last = name.lower(), (name, hidden, kind)
        regime, tiles, programs = cells[2].split(", ")
        yield pytest.param(
            cell, int(hidden), kind, cells[1], regime, tiles, int(programs), cells[3], cells[7:],
            id=f"{cell}-{hidden}-{kind}-{cells[1]}",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "hidden", "kind", "which", "regime", "tiles", "programs", "source", "times"),
    list(_modelled_steps()),
)
def test_the_documented_steps_are_the_models(
    cell, hidden, kind, which, regime, tiles, programs, source, times
):
    dtype, precision = _KINDS[kind]
    problem = _problem(cell, hidden, dtype=dtype)
    found = getattr(make_plan(problem, H200, precision), which)
    config = found.config
    exact = kind.endswith("exact")
    step = planner.model(config, problem, H200, which, exact)
    shown = [step.exchange, step.weights, step.state, step.microseconds]
    assert config.regime == regime and f"{config.block_b}x{config.block_h}" == tiles
    assert found.hidden_tiles == programs and ("chip" if config.resident else "L2") == source
    assert [f"{t:.2f}" if t else "" for t in shown[:3]] + [f"{shown[3]:.1f}"] == times
    assert found.microseconds == step.microseconds


def test_refused_regimes_keep_their_reasons():
    found = make_plan(_problem(hidden=512), H200, "ieee").forward
    assert any(reason.startswith("forward program: ") for reason in found.refusals)


def test_stepping_always_fits():
    for device in DEVICES:
        for hidden in (1, 500, 10_000):
            found = make_plan(_problem(hidden=hidden, batch=7), device, "ieee", "steps")
            assert found.forward.config.regime == "steps"


def test_shipped_table():
    """Each row is what the planner picks for its own problem, or loses to a better regime, and
    fits the devices of its vendor with the most room."""
    rows = planner._shipped_rows()
    assert rows
    keys = [(*row[: Row._fields.index("config")], row.config.regime) for row in rows]
    assert len(set(keys)) == len(keys), "two rows for one problem and regime"
    for row in rows:
        cell = "rnn_relu" if row.cell == "rnn" else row.cell
        dtype = torch.float16 if row.kind == "half" else torch.float32
        problem = _problem(cell, row.hidden, max(row.batch, 1), dtype)
        device = MI300 if row.family == "hip" else H200
        assert planner.unfit(row.config, problem, device, row.which) is None, row


def _row(**changes):
    config = Config("program", 16, 64, 64, 4, True)
    return Row("sm90", "lstm", "half", "forward", 64, 1, config)._replace(**changes)


def test_the_table_of_the_user_goes_first(monkeypatch, tmp_path):
    path = tmp_path / "mine.json"
    mine = _row(config=Config("program", 32, 64, 64, 8, True))
    path.write_text(planner.dump_rows([mine]))
    assert planner.read_rows(path) == (mine,)
    monkeypatch.setenv("FUSED_RNN_TRITON_TUNING", str(path))
    assert make_plan(_problem(hidden=50), H200, "ieee").forward.config == mine.config
    assert make_plan(_problem(hidden=50), A100, "ieee").forward.config != mine.config


def test_the_closest_class_of_sizes_is_taken():
    table = (
        _row(hidden=128, config=Config("program", 16, 128, 128, 8, True)),
        _row(hidden=64),
        _row(hidden=64, batch=100, config=Config("program", 32, 64, 64, 8, True)),
    )
    for hidden, batch, expected in ((64, 99, 1), (33, 100, 2), (65, 5, 0), (33, 1, 1)):
        problem = _problem(hidden=hidden, batch=batch)
        config = planner.configuration(problem, H200, "half", table, "forward", "program")
        assert config == table[expected].config


def test_rows_of_a_family_stand_before_those_of_its_vendor():
    """But a row for more units than another is the poorer fit, whosoever it is."""
    own = _row(hidden=128, config=Config("program", 16, 128, 128, 16, True))
    table = (_row(family="cuda"), _row(family="cuda", hidden=128), own)
    for device, hidden, expected in ((H200, 100, own), (A100, 100, table[1]), (H200, 9, table[0])):
        found = planner.configuration(
            _problem(hidden=hidden), device, "half", table, "forward", "program"
        )
        assert found == expected.config


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        ('{"configurations": [{}]}', "regime"),
        (
            planner.dump_rows([_row(which="sideways")]),
            "entry 0: got regime 'program', pass 'sideways'",
        ),
        (
            planner.dump_rows([_row(), _row(config=Config("program", 16, 8, 64, 4, True))]),
            "entry 1: .*16",
        ),
        (planner.dump_rows([_row(config=Config("program", 16, 48, 64, 4, True))]), "powers of two"),
        (
            planner.dump_rows([_row(config=Config("program", 16, "64", 64, 4, True))]),
            "powers of two",
        ),
        (planner.dump_rows([_row(config=Config("grid", 16, 64, 64, 4, True))]), "several hidden"),
        (
            planner.dump_rows([_row(config=Config("program", 16, 16, 16, 64, True))]),
            "warps or fewer",
        ),
        (planner.dump_rows([_row(config=Config("program", 16, 16, 16, True, True))]), "powers"),
        (planner.dump_rows([_row(config=Config("program", 16, 16, 16, 4, "no"))]), "true or false"),
        (planner.dump_rows([_row(hidden="64")]), "positive numbers for hidden and batch"),
        (planner.dump_rows([_row(batch=None)]), "positive numbers for hidden and batch"),
        (
            json.dumps({"configurations": [{**_row().config._asdict(), "speed": 1}]}),
            "speed|missing",
        ),
    ],
)
def test_a_table_that_is_none(tmp_path, text, why):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"broken.json: expected a table .*{why}"):
        planner.read_rows(path)


def test_no_home_no_table(monkeypatch, tmp_path):
    """Where nobody knows the user's home, or may look into it, the table of the package is used."""
    monkeypatch.delenv("FUSED_RNN_TRITON_TUNING", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError))
    assert planner._user_rows(planner.tuning_file()) == ()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = planner.tuning_file()
    path.parent.mkdir()
    path.write_text(planner.dump_rows([_row()]))
    monkeypatch.setattr(type(path), "read_text", mock.Mock(side_effect=PermissionError))
    assert planner._user_rows(path) == ()
    monkeypatch.setenv("FUSED_RNN_TRITON_TUNING", str(tmp_path / "named.json"))
    (tmp_path / "named.json").touch()
    with pytest.raises(PermissionError):
        planner._user_rows(planner.tuning_file())


@pytest.fixture
def measuring(monkeypatch):
    """`tune` where all fits and takes the same time, on a GPU that is not there."""
    monkeypatch.setattr(tune.TritonBackend, "unsupported", lambda *_: None)
    monkeypatch.setattr(tune, "device_facts", lambda _: H200)
    monkeypatch.setattr(tune.torch.cuda, "current_device", lambda: 0)
    measured = []

    def rows(problems, *_):
        for problem in problems:
            measured.append(problem)
            if problem.hidden_size == 999:
                raise KeyboardInterrupt
            yield _row(hidden=problem.hidden_size)

    monkeypatch.setattr(tune, "tune", rows)
    return measured


def test_what_tune_measured_is_kept_whatever_comes_after(measuring, tmp_path):
    path = tmp_path / "new" / "table.json"
    with pytest.raises(KeyboardInterrupt):
        __main__.main(["tune", "--hidden", "64", "999", "128", "--output", str(path)])
    assert {row.hidden for row in planner.read_rows(path)} == {64}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("where", ["file/table.json", "", "broken.json"])
def test_tune_finds_out_at_once_where_it_cannot_write(measuring, where, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "broken.json").write_text("{")
    assert __main__.main(["tune", "--output", str(tmp_path / where)]) == 1
    assert "tune: nothing was measured; " in capsys.readouterr().out
    assert not measuring


def test_readers_see_a_whole_table(tmp_path, monkeypatch):
    """While another process writes it."""
    path = tmp_path / "table.json"
    tune.write([_row()], path)
    write_text = type(path).write_text

    def and_look(self, text):
        written = write_text(self, text[: len(text) // 2])
        assert planner.read_rows(path) == (_row(),)
        write_text(self, text)
        return written

    monkeypatch.setattr(type(path), "write_text", and_look)
    tune.write([_row(hidden=7)], path)
    assert {row.hidden for row in planner.read_rows(path)} == {7, _row().hidden}


def test_tune_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert __main__.main(["tune"]) == 1
    assert "nothing to measure; triton: torch finds no GPU" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--hidden", "0"], ["--cell", "sru"], ["--batch", "x"]])
def test_tune_with_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        __main__.main(["tune", *arguments])
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err
