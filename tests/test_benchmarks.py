"""The benchmark compares before it measures, and says what it measured and who is left out."""

import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fused_rnn
from fused_rnn import native

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"

measures_the_library = pytest.mark.skipif(
    native.cpu_library_error() is not None, reason="measures the C++ library, which is not there"
)


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """Those of benchmarks/harness, which the commands find beside them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("rich")  # of the tables
    names = (
        "cases", "data", "memory", "providers", "report", "results", "runner", "sets", "targets"
    )  # fmt: skip
    return SimpleNamespace(**{name: import_module(f"harness.{name}") for name in names})


def run(script, *arguments):
    command = [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture
def rows_of(modules, monkeypatch, num_threads, tmp_path):
    """What a program that lets ways take turns has measured."""

    def call(program, *options):
        path = tmp_path / "rows.json"
        arguments = [program, *options, "--rounds", 2, "--json", path]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        import_module(program.removesuffix(".py")).main()
        return json.loads(path.read_text())

    return call


def measured(modules, case, *names, seconds=0.0):
    who = [modules.providers.PROVIDERS[name] for name in names]
    setting = modules.providers.Setting("cpu", torch.get_num_threads())
    rows = modules.runner.measure("set", 0, (case,), who, seconds, setting)
    return {row.provider: row for row in rows}


def test_program_writes_what_it_measured(modules, tmp_path, capsys):
    path = tmp_path / "run.json"
    who = ("--provider", "fused_rnn", "--provider", "torch.nn")
    shape = ("--cell", "gru", "--shape", "3,2,8", "--mode", "training", "--seconds", 0)
    result = run("cpu.py", *shape, *who, "--json", path)
    assert result.returncode == 0, result.stderr
    content = json.loads(path.read_text())
    assert {row["provider"] for row in content["rows"]} == {"fused_rnn", "torch.nn"}
    for row in content["rows"]:
        assert row["ms"] > 0 and not row["note"]
        assert row["flops"] and row["bytes"] and row["bound_ms"] > 0 and row["error"] < 1e-4
    assert {"date", "command", "commit", "machine", "versions", "threads"} <= content["meta"].keys()
    import cpu

    cpu.main(["--compare", str(path), str(path)])
    assert "x1.00" in capsys.readouterr().out


@measures_the_library
def test_streaming_program(rows_of):
    (row,) = rows_of("streaming.py", "--cell", "gru", "--hidden", 9)
    assert all(0 < row["least_us"][way] <= row["median_us"][way] for way in row["least_us"])
    steppers = {"stepper", "bf16 stepper", "int8 stepper"}
    assert steppers | {"layer", "nn layer", "nn cell"} == row["least_us"].keys()


@measures_the_library
@pytest.mark.parametrize("part", ["sequence", "step"])
def test_quantised_program(rows_of, part):
    options = ("--cell", "gru", "--cell", "lstm", "--shape", "3,2,19", "--threads", 1)
    gru, lstm = rows_of("quantised.py", *options, "--part", part)
    ways = {"ours", "torch int8", "torch.nn", "bfloat16", "float32"}
    assert gru["ms"].keys() == gru["errors"].keys() == ways
    assert ways <= lstm["ms"].keys() <= ways | {"ONNX Runtime int8"}
    assert gru["errors"]["float32"] < 1e-5 < gru["errors"]["ours"]
    assert all(time > 0 for row in (gru, lstm) for time in row["ms"].values())


def test_accuracy_program():
    result = run("accuracy.py", "--cell", "gru", "--shape", "5,3,17")
    assert result.returncode == 0, result.stderr
    expected = {"torch.nn", *([native.cpu_capability()] if not native.cpu_library_error() else [])}
    assert all(name in result.stdout for name in expected)


@pytest.mark.slow
def test_long_sequences_program():
    sizes = ("--shape", "20,2,8", "--layers", 1, "--window", 5, "--back", 10)
    result = run("long_sequences.py", *sizes)
    assert result.returncode == 0, result.stderr
    assert all(way in result.stdout for way in ("torch.nn", "recompute", "tbptt overlapped"))


def test_unknown_provider(modules, capsys):
    import cpu

    with pytest.raises(SystemExit):
        cpu.main(["--provider", "abacus"])
    assert "abacus" in capsys.readouterr().err


PEERS = (
    "loop",
    "openvino",
    "onnxruntime",
    "keras torch",
    "keras jax",
    "jax scan",
    "flashrnn vanilla",
)


def installed(modules, name):
    provider = modules.providers.PROVIDERS[name]
    if reason := provider.unavailable():
        pytest.skip(reason)
    return provider, modules.providers.Setting("cpu", len(os.sched_getaffinity(0)))


def assert_computes_what_torch_does(modules, name, case):
    provider, setting = installed(modules, name)
    data = modules.data.make_data(case)
    row = modules.results.Row("set", 0, 0, case, name)
    expected = modules.data.expected_results(case, data)
    entrant = modules.runner.entrant_of(provider, row, data, expected, setting)
    assert isinstance(entrant, modules.runner.Contender), entrant.note


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
@pytest.mark.parametrize("name", PEERS)
def test_peer_computes_what_torch_does(modules, name, cell):
    """Each adapter's gate orders, layouts and gradients, on sizes that all differ."""
    mode = "inference" if name in ("openvino", "onnxruntime") else "training"
    assert_computes_what_torch_does(modules, name, modules.cases.Case(cell, 5, 3, 4, 6, mode))


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_jax_unrolls_steps_and_takes_those_left_over(modules, mode):
    pytest.importorskip("jax")
    from harness.providers.jax_layers import UNROLLED

    case = modules.cases.Case("lstm", 2 * UNROLLED + 3, 2, 4, 6, mode)
    assert_computes_what_torch_does(modules, "jax scan", case)


def test_openvino_copies_no_outputs(modules):
    """Both calls give out the same memory, that of the request."""
    provider, setting = installed(modules, "openvino")
    case = modules.cases.Case("gru", 5, 3, 4, 6)
    session = provider.prepare(case, modules.data.make_data(case), setting)
    once, again = session.call(), session.call()
    places = [[array.ctypes.data for array in outputs.values()] for outputs in (once, again)]
    assert places[0] == places[1]


@pytest.mark.parametrize("name", ["fused_rnn", "torch.nn", "loop"])
@pytest.mark.parametrize(
    "change",
    [
        {"layers": 2, "bidirectional": True},
        {"heads": 3},
        {"mode": "packed", "lengths": "sentences"},
        {"mode": "step", "T": 1},
        {"dtype": "bfloat16", "mode": "training"},
    ],
    ids=str,
)
def test_every_kind_of_case(modules, name, change):
    case = replace(modules.cases.Case("lstm", 5, 3, 4, 6, "training"), **change)
    row = measured(modules, case, name)[name]
    if row.note:
        assert (name, case.mode) == ("loop", "packed")
        assert row.note.startswith("cannot")
    else:
        assert row.ms > 0


def test_resets_start_from_zero(modules):
    """The loop's resets, by which others are judged, against sequences cut in pieces."""
    case = modules.cases.Case("gru", 12, 1, 3, 4, resets=0.5)
    data = modules.data.make_data(case)
    starts = [0, *(t for t in range(1, 12) if data.resets[t, 0]), 12]
    assert len(starts) > 2
    pieces = [data.layer(data.x[a:b])[0] for a, b in pairwise(starts)]
    expected = modules.data.expected_results(case, data)["y"]
    torch.testing.assert_close(expected, torch.cat(pieces).detach())


def broken(modules, spoil):
    """A provider that is torch.nn but for what `spoil` does to its results."""
    base = modules.providers.PROVIDERS["torch.nn"]

    def prepare(case, data, setting):
        session = base.prepare(case, data, setting)
        return replace(session, results=lambda output: spoil(session.results(output)))

    return replace(base, name="broken", prepare=prepare)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda r: r | {"grad x": r["grad x"] * 1.01}, "differs"),
        (lambda r: r | {"y": r["y"] * float("nan")}, "differs"),
        (lambda r: {k: v for k, v in r.items() if k != "grad bias_hh_l0"}, "missing"),
        (lambda r: r | {"y": r["y"][:-1]}, "shape"),
    ],
)
def test_wrong_results_are_not_timed(modules, spoil, word):
    case = modules.cases.Case("gru", 3, 2, 4, 5, "training")
    setting = modules.providers.Setting("cpu", 1)
    (row,) = modules.runner.measure("set", 0, (case,), [broken(modules, spoil)], 0.0, setting)
    assert row.ms is None
    assert row.note.startswith("wrong") and word in row.note


def test_peer_that_fails_is_named(modules):
    def fail(case, data, setting):
        raise ZeroDivisionError("no such kernel")

    provider = replace(modules.providers.PROVIDERS["torch.nn"], name="peer", prepare=fail)
    case, setting = modules.cases.Case("gru", 3, 2, 4, 5), modules.providers.Setting("cpu", 1)
    (row,) = modules.runner.measure("set", 0, (case,), [provider], 0.0, setting)
    assert row.note == "failed: ZeroDivisionError: no such kernel"


def test_absent_peer_is_named(modules):
    provider = modules.providers.Provider("peer", None, ("no_such_module.kernels",))
    assert "no_such_module" in provider.unavailable()
    assert modules.providers.PROVIDERS["torch.nn"].unavailable() is None


def test_gpu_samples_are_times_between_events(modules, monkeypatch):
    """With events that count calls, each sample is the calls of its bundle, and inputs rotate."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(calls)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = modules.cases.Case("gru", 1, 1, 1, 1)
    inputs = [torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)]
    data = SimpleNamespace(xs=inputs)
    call = modules.data.Data.in_turn(data, lambda x: calls.append(int(x)))
    row = modules.results.Row("set", 0, 0, case, "peer")
    session = modules.providers.Session(call, None)
    contender = modules.runner.Contender(session, row, 1, gpu=True, bundle=2, per_turn=3, lead_in=0)
    contender.turn()
    assert contender.samples == [1e-3] * 3
    assert calls == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("longest", "samples"), [(60.0, 12), (0.1, 5)])
def test_medians_rest_on_as_many_samples_as_were_asked_for(modules, monkeypatch, longest, samples):
    """Or on what their time had room for: 5 turns at least."""
    monkeypatch.setattr(modules.runner, "LONGEST_OWN", longest)
    row = modules.results.Row("set", 0, 0, modules.cases.Case("gru", 1, 1, 1, 1), "peer")
    session = modules.providers.Session(lambda: time.sleep(0.04), None)
    contender = modules.runner.Contender(session, row, 1)
    modules.runner._take_turns([contender], 0.0, lambda provider: None, 12)
    assert len(contender.samples) == samples


def test_bound_is_the_largest_of_three(modules):
    case = modules.cases.Case("lstm", 10, 1, 8, 8)
    ceiling = {
        "peak_gflops": {"2": 1.0},
        "copy_gbs": {"1000": 10.0, "100000000": 1.0},
        "step_us": {"2": 50.0},
    }
    found = modules.results.Run({"threads": 2, "device": "cpu"}, ceiling=ceiling)
    row = modules.results.Row("set", 0, 0, case, "torch.nn", flops=3_000, bytes=2_000_000)
    bounded = found.with_bound(row)
    assert (bounded.bound, bounded.bound_ms) == ("memory", pytest.approx(2.0))
    bounded = found.with_bound(replace(row, bytes=500))
    assert (bounded.bound, bounded.bound_ms) == ("steps", pytest.approx(0.5))
    bounded = found.with_bound(replace(row, flops=3_000_000, bytes=500))
    assert (bounded.bound, bounded.bound_ms) == ("compute", pytest.approx(3.0))


def test_peak_counts_only_chains_that_run(modules):
    from harness import ceiling

    if (library := ceiling._library()) is None:
        pytest.skip("no compiler for the ceilings")
    result = ctypes.c_float()
    flops = library.fma_steps(3, 2.0, 1.0, ctypes.byref(result))
    # Chain i starts at i: three steps of 2 x + 1 make it 8 i + 7, whatever a compiler foresees.
    assert result.value == sum(8 * i + 7 for i in range(10))
    assert flops in {2 * 10 * lanes for lanes in (4, 8, 16)}


def test_flops_and_bytes_of_a_small_layer(modules):
    case = modules.cases.Case("gru", 2, 3, 5, 4)
    assert case.flops(6) == 2 * 6 * 3 * 4 * (5 + 4)
    with FlopCounterMode(display=False) as counter:  # which asks fused_rnn.flops
        fused_rnn.GRU(5, 4)(torch.randn(2, 3, 5))
    assert case.flops(6) == counter.get_total_flops()
    assert case.bytes(6) == 4 * (6 * 5 + 3 * 4 * (5 + 4) + 6 * 4)
    assert replace(case, heads=2).flops(6) == 2 * 6 * 3 * 4 * (5 + 2)


def test_peak_memory_sees_what_a_call_takes(modules):
    with modules.memory.PeakMemory("cpu") as peak:
        torch.ones(64 << 20, dtype=torch.uint8)
    if peak.mib is None:
        pytest.skip("this system does not tell the peak of a process")
    assert 60 < peak.mib < 80


def test_peak_memory_of_a_process_of_its_own(modules):
    """The gates of all steps, which backward needs, are most of it."""
    from fresh_memory import peak_mib

    case = modules.cases.Case("lstm", 400, 16, 64, 64, "training")
    found = peak_mib(case, "fused_rnn", modules.providers.Setting("cpu", 1))
    if found is None:
        pytest.skip("this system does not tell the peak of a process")
    gates = 400 * 16 * 4 * 64 * 4 / 2**20
    assert gates < found < 6 * gates


@pytest.mark.slow
def test_layer_under_compile_is_measured_beside_the_eager_one(modules):
    rows = measured(
        modules, modules.cases.Case("gru", 5, 2, 8, 8), "fused_rnn", "fused_rnn compiled"
    )
    assert not any(row.note for row in rows.values())
    assert modules.targets.eager_over_compiled(list(rows.values())) > 0


def run_of(modules, commit, *sets, cpu="a"):
    case = modules.cases.Case("gru", 5, 2, 8, 8)
    rows = [modules.results.Row(name, n, 0, case, "fused_rnn") for n, name in enumerate(sets)]
    facts = {"date": f"day of {commit}", "commit": commit, "threads": 2}
    return modules.results.Run(facts | {"machine": {"cpu": cpu, "load": 1.0}}, rows)


def test_saved_sets_are_kept_until_measured_again(modules):
    def commits(run):
        others = run.meta["others"]
        return {r.set: others.get(r.set, run.meta)["commit"] for r in run.rows}

    whole = run_of(modules, "old", "standing", "packed", "memory")
    once = run_of(modules, "new", "memory").joined(whole)
    assert commits(once) == {"standing": "old", "packed": "old", "memory": "new"}
    assert len({row.group for row in once.rows}) == 3
    again = run_of(modules, "newest", "standing", "packed").joined(once)
    assert commits(again) == {"standing": "newest", "packed": "newest", "memory": "new"}
    all_new = run_of(modules, "last", "standing", "packed", "memory").joined(again)
    assert set(commits(all_new).values()) == {"last"}


def test_sets_of_another_machine_are_not_kept(modules):
    other = run_of(modules, "old", "standing", cpu="b")
    own = run_of(modules, "new", "memory")
    assert own.joined(other) is own


@pytest.fixture
def cpu(modules, monkeypatch, tmp_path):
    """benchmarks/cpu.py with a folder of its own to publish to."""
    program = import_module("cpu")
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    return program


def test_only_whole_sets_are_published(modules, cpu, tmp_path):
    def measured(commit, **groups_left_out):
        groups = [
            (name, group)
            for name, first in groups_left_out.items()
            for group in modules.sets.SETS[name].groups[first:]
        ]
        rows = [
            modules.results.Row(name, n, variant, case, "fused_rnn")
            for n, (name, group) in enumerate(groups)
            for variant, case in enumerate(group)
        ]
        return replace(run_of(modules, commit), rows=rows)

    args = cpu.parse_arguments(["--save"])
    cpu.save(measured("old", standing=0, bf16=0), args)
    cpu.save(measured("new", bf16=0, standing=1), args)
    kept = modules.results.Run.load(tmp_path / "cpu.json")
    assert kept.meta["commit"] == "old" and kept.meta["others"]["bf16"]["commit"] == "new"
    assert not kept.missing("standing") and not kept.missing("bf16")
    cpu.save(measured("newest", standing=1), args)
    assert modules.results.Run.load(tmp_path / "cpu.json") == kept


def test_each_cpu_has_a_file_of_its_own(modules, cpu, tmp_path):
    assert cpu.published_file("a") == tmp_path / "cpu.json"
    run_of(modules, "old", "standing").save(tmp_path / "cpu.json")
    other = tmp_path / "cpu-b-r-family-6.json"
    assert cpu.published_file("a") == tmp_path / "cpu.json"
    assert cpu.published_file("B(R) (family 6)") == other
    run_of(modules, "old", "standing", cpu="c").save(tmp_path / "cpu-zen9.json")
    assert cpu.published_file("c") == tmp_path / "cpu-zen9.json"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--save", "--cell", "gru"], "not with --cell"),
        (["--save", "--backend", "reference"], "not with --backend"),
        (["--save", "--shape", "3,2,8"], "not with --shape"),
        (["--layers", "2"], "--layers goes with --shape"),
        (["--dtype", "bfloat16", "--set", "standing"], "--dtype goes with --shape"),
        (["--bidirectional"], "--bidirectional goes with --shape"),
        (["--set", "memory", "--backend", "reference"], "--set memory: its providers are fixed"),
        (["--set", "compiled", "--provider", "loop"], "--set compiled: none of the providers"),
        (["--set", "odd", "--provider", "torch.nn"], "--set odd: none of the providers"),
        (["--backend", "cpu", "--provider", "torch.nn"], "--backend is that of"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(cpu, capsys, options, said):
    with pytest.raises(SystemExit):
        cpu.main(options)
    assert said in capsys.readouterr().err


def test_sets_that_options_leave_nothing_of_are_not_measured(cpu):
    args = cpu.parse_arguments(["--backend", "reference", "--provider", "fused_rnn"])
    names = {name for name, _ in cpu.chosen_groups(args)}
    assert names == set(cpu.CPU_SETS) - {"memory", "compiled"}


def test_memory_and_compile_are_targets(modules):
    case = modules.cases.Case("gru", 5, 2, 8, 8, "training")
    row = modules.results.Row("memory", 0, 0, case, "fused_rnn", ms=4.0, peak_mib=10.0)
    theirs = replace(row, provider="torch.nn", peak_mib=15.0)
    compiled = replace(row, provider="fused_rnn compiled", ms=5.0)
    assert modules.targets.memory_of_torch([theirs, row]) == 1.5
    assert modules.targets.eager_over_compiled([compiled, row]) == 0.8
    assert modules.targets.eager_over_compiled([replace(compiled, note="wrong: x"), row]) == 0
    assert modules.targets.memory_of_torch([row]) is None


def test_names_of_sets_and_providers(modules):
    """Every backend that exists is a provider, and GPU sets name GPU cases only."""
    from fused_rnn.dispatch import BACKENDS

    assert {f"fused_rnn/{name}" for name in BACKENDS} <= modules.providers.PROVIDERS.keys()
    for name, case_set in modules.sets.SETS.items():
        assert name.startswith("gpu-") == (case_set.device == "cuda")
        groups = case_set.groups
        assert groups and len(set(groups)) == len(groups), name


def test_documents_say_what_the_results_say(modules, capsys):
    import publish

    assert publish.main(["--check"]) == 0, capsys.readouterr().out


def test_plots_are_made_from_a_run(modules, tmp_path):
    pytest.importorskip("matplotlib")
    from harness import plots

    run_of_cpu = modules.results.Run.load(BENCHMARKS / "results" / "cpu.json")
    written = plots.plot_all(run_of_cpu, tmp_path, "cpu")
    assert {"cpu-ratios.png", "cpu-step.png", "cpu-scaling.png"} <= {p.name for p in written}
    assert all(path.stat().st_size > 5000 for path in written)


def test_lines_of_plots_are_the_best_of_one_dtype(modules):
    pytest.importorskip("matplotlib")
    from harness import plots

    case = modules.cases.Case("gru", 5, 2, 8, 8)
    row = modules.results.Row("set", 0, 0, case, "fused_rnn", ms=4.0, gflops=1.0)
    half = replace(row, ms=1.0, gflops=4.0, case=replace(case, dtype="bfloat16"))
    rows = [row, replace(row, ms=2.0, gflops=2.0), half]

    def drawn(*arguments):
        _, axes = plots.plt.subplots()
        plots._lines(axes, rows, {"fused_rnn": "red"}, lambda r: r.case.H, *arguments)
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        plots.plt.close()
        return lines

    times, rates = drawn(lambda r: r.ms), drawn(lambda r: r.gflops, max)
    assert times == {"fused_rnn float32": [2.0], "fused_rnn bfloat16": [1.0]}
    assert rates == {"fused_rnn float32": [2.0], "fused_rnn bfloat16": [4.0]}


def test_precision_leaves_cudnn_on_and_puts_everything_back(modules):
    """What torch's own context manager is not told, it changes: cuDNN goes off."""
    from harness.precision import gpu_precision

    flags = torch.backends.cudnn
    before = flags.enabled, flags.allow_tf32, torch.get_float32_matmul_precision()
    for tf32 in (False, True):
        with gpu_precision(tf32):
            assert flags.enabled
            assert flags.allow_tf32 == tf32 == torch.backends.cuda.matmul.allow_tf32
    with gpu_precision(tf32=False, cudnn=False):
        assert not flags.enabled
    assert before == (flags.enabled, flags.allow_tf32, torch.get_float32_matmul_precision())


@pytest.mark.parametrize("part", ["training", "inference"])
def test_ragged_program(rows_of, part):
    options = ("--cell", "lstm", "--shape", "6,3,9", "--part", part)
    (row,) = rows_of("ragged.py", *options)
    assert row["shape"] == [6, 3, 9] and row["part"] == part
    assert {"full", "lengths", "packed", "resets", "nn packed"} == row["ns"].keys()
    assert all(time > 0 for time in row["ns"].values())


@pytest.mark.parametrize("part", ["penalty", "forward"])
def test_second_order_program(rows_of, part):
    options = ("--cell", "gru", "--cell", "lstm", "--shape", "6,3,9", "--threads", 1)
    gru, lstm = rows_of("second_order.py", *options, "--part", part)
    ways = {"ours", "plain operations"}
    assert gru["ms"].keys() == ways | {"torch.nn"}
    assert lstm["ms"].keys() == ways | ({"torch.nn"} if part == "penalty" else set())
    assert all(time > 0 for row in (gru, lstm) for time in row["ms"].values())


@pytest.mark.parametrize("part", ["samples", "ensemble"])
def test_transforms_program(rows_of, part):
    options = ("--cell", "lstm", "--shape", "6,3,9", "--threads", 1, "--part", part)
    (row,) = rows_of("transforms.py", *options)
    assert row["ms"].keys() == {"ours", "plain operations", "torch.nn in a loop"}
    assert all(time > 0 for time in row["ms"].values())


@pytest.mark.parametrize("part", [pytest.param("training", marks=pytest.mark.slow), "inference"])
def test_graphs_program(rows_of, part):
    options = ("--cell", "gru", "--shape", "2,3,4", "--threads", 1, "--rounds", 1, "--part", part)
    (row,) = rows_of("graphs.py", *options)
    assert row["ms"].keys() == {"ours", "ours, eager", "torch.nn"}
    assert all(time > 0 for time in row["ms"].values())


@measures_the_library
@pytest.mark.parametrize("part", ["training", "inference"])
def test_regularised_program(rows_of, part):
    options = ("--cell", "gru", "--cell", "lstm", "--shape", "6,3,9", "--threads", 1)
    gru, lstm = rows_of("regularised.py", *options, "--part", part)
    drawn = {"recurrent dropout"} if part == "training" else set()
    ways = {"plain", "zoneout", "layer norm", "all of these"} | drawn
    assert {one["way"] for one in gru["ms"]} == ways
    assert {one["way"] for one in lstm["ms"]} == ways | {"peepholes"}
    assert {one["backend"] for one in lstm["ms"]} == {"cpu", "reference"}
    assert all(one["ms"] > 0 for one in (*gru["ms"], *lstm["ms"]))


@measures_the_library
def test_usage_program(tmp_path):
    path = tmp_path / "usage.json"
    options = ["--cell", "lstm", "--shape", "3,2,4,5", "--seconds", 0.01]
    half, cell, autocast = "bfloat16, one timestep", "cell, x[:, t]", "autocast to bfloat16"
    for way in (half, cell, autocast):
        options += ["--way", way]
    result = run("usage.py", *options, "--json", path)
    assert result.returncode == 0, result.stderr
    assert cell in result.stdout
    rows = json.loads(path.read_text())
    ways = {row["way"] for row in rows}
    assert ways - {autocast} == {half, cell}
    # torch.nn's LSTM cannot under autocast without AVX-512.
    line = next(line for line in result.stdout.splitlines() if autocast in line)
    assert ("torch.nn cannot" in line) == (autocast not in ways)
    assert {row["part"] for row in rows} == {"inference", "training"}
    assert all(row["ms"] > 0 and row["nn_ms"] > 0 for row in rows)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_usage_compares_every_way(modules, training):
    import usage

    cannot = {name for name in usage.WAYS if not usage.calls(name, "LSTM", (3, 2, 4, 5), training)}
    # torch.nn's LSTM cannot in float16 on every CPU, nor under autocast without AVX-512.
    assert all("float16" in name for name in cannot)
    assert not {"bfloat16", "bfloat16, one timestep"} & cannot
