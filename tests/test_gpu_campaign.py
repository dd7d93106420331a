"""The GPU campaign goes through all its steps on a CPU, and a kill leaves valid results."""

import faulthandler
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fused_rnn import native

ROOT = Path(__file__).parent.parent
CAMPAIGN = ROOT / "benchmarks" / "gpu" / "campaign.py"


def command(out, *arguments):
    return [sys.executable, str(CAMPAIGN), str(out), "--dry-run", *map(str, arguments)]


def results_of(out):
    return json.loads((out / "campaign.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(native.cpu_library_error() is not None, reason="profiles the C++ library")
def test_dry_run(tmp_path):
    """One test, since the run takes a while: every step ran or says why not, every set was
    measured, and a second run of the benchmark knows that nothing is left to do."""
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, timeout=500)
    log = (tmp_path / "campaign.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    content = results_of(tmp_path)
    assert content["finished"]
    assert {"tests", "sanitize", "tune", "bench", "profile"} <= {
        r["step"] for r in content["results"]
    }
    for result in content["results"]:
        if result["name"] == "warming the caches":  # which ends with the tests, ready or not
            assert result["status"] in ("done", "stopped")
            continue
        assert result["status"] in ("done", "skipped")
        assert result["status"] == "done" or result["reason"]
    (tests,) = (result for result in content["results"] if result["step"] == "tests")
    assert tests["figures"]["tests"] > 0 and tests["figures"]["failures"] == 0

    bench = tmp_path / "bench.json"
    before = bench.read_text()
    rows = json.loads(before)["rows"]
    timed = {row["set"] for row in rows if row["provider"] == "torch.nn" and row["ms"]}
    assert gpu_sets() <= timed
    assert [row for row in rows if row["case"]["resets"] and row["ms"]]
    assert not [row["note"] for row in rows if row["note"].startswith(("wrong", "failed"))]

    again = [sys.executable, str(CAMPAIGN.with_name("bench.py")), str(bench), "--dry-run"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert bench.read_text() == before


def gpu_sets():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from harness.sets import SETS
    finally:
        sys.path.pop(0)
    return {name for name, case_set in SETS.items() if case_set.device == "cuda"}


@pytest.mark.slow
def test_killed_campaign_leaves_valid_results(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--only", "sanitize"), stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        process.stdout.readline()  # the doctor has run
        deadline = time.monotonic() + 60
        # Not in the text: the command that it names has the word, too.
        while "sanitize" not in {result["step"] for result in results_of(tmp_path)["results"]}:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    status = {result["step"]: result["status"] for result in results_of(tmp_path)["results"]}
    assert status == {"setup": "done", "sanitize": "running"}


def test_unknown_step():
    done = subprocess.run(
        command("unused", "--only", "teste"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "teste" in done.stderr


@pytest.fixture
def bench(monkeypatch):
    """gpu/bench.py on the CPU, with fused_rnn and torch.nn alone; `bench.add` adds providers."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    import bench

    from harness.providers import PROVIDERS, Provider

    names = ["fused_rnn", "torch.nn"]
    known = {name: PROVIDERS[name] for name in names}

    def add(name, prepare):
        names.insert(1, name)
        known[name] = Provider(name, prepare)

    monkeypatch.setattr(bench, "PROVIDERS", known)
    monkeypatch.setattr(bench, "default", lambda device: names)
    monkeypatch.setattr(bench, "add", add, raising=False)
    yield bench
    faulthandler.cancel_dump_traceback_later()


def arguments(folder, *more):
    options = ["--dry-run", "--seconds", "0", "--set", "gpu-headline"]
    return [str(folder / "bench.json"), *options, *more]


def content(folder):
    return json.loads((folder / "bench.json").read_text())


def notes_of(folder):
    return {row["provider"]: row["note"] for row in content(folder)["rows"]}


def ends_the_process(case, data, setting):
    raise KeyboardInterrupt  # which nothing of the benchmark catches, as a signal


def test_device_error_is_blamed_and_the_rest_goes_on(bench, tmp_path):
    """A provider that brings the device down ends the process; the next one leaves it out."""

    def broken(case, data, setting):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench.add("broken", broken)
    assert bench.main(arguments(tmp_path)) == bench.AGAIN
    assert bench.main(arguments(tmp_path)) == 0
    notes = notes_of(tmp_path)
    assert "illegal memory access" in notes["broken"]
    assert notes["fused_rnn"] == notes["torch.nn"] == ""
    assert len(content(tmp_path)["meta"]["processes"]) == 1


def test_who_ran_when_the_process_ended_is_blamed(bench, tmp_path):
    bench.add("deadly", ends_the_process)
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments(tmp_path))
    assert bench.main(arguments(tmp_path)) == 0
    notes = notes_of(tmp_path)
    assert notes["deadly"] == "failed: the process ended or hung while it ran"
    assert notes["fused_rnn"] == notes["torch.nn"] == ""


def test_group_in_which_the_process_ended_twice_is_not_measured(bench, tmp_path):
    bench.add("deadly", ends_the_process)
    bench.add("deadly too", ends_the_process)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            bench.main(arguments(tmp_path))
    assert bench.main(arguments(tmp_path)) == 0
    notes = notes_of(tmp_path)
    assert (
        notes["deadly"] == notes["deadly too"] == "failed: the process ended or hung while it ran"
    )
    assert notes["fused_rnn"] == notes["torch.nn"] == "not measured: the process ended twice"


def test_what_no_time_was_left_for_is_written(bench, tmp_path):
    assert bench.main(arguments(tmp_path, "--limit", "-1")) == 0
    assert content(tmp_path)["meta"]["not_reached"] == {"gpu-headline": 1}
    assert bench.main(arguments(tmp_path)) == 0
    assert "not_reached" not in content(tmp_path)["meta"]


def test_rows_of_another_commit_stay_apart(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BENCHMARK_COMMIT", "old")
    assert bench.main(arguments(tmp_path, "--limit", "-1")) == 0
    monkeypatch.setenv("BENCHMARK_COMMIT", "new")
    before = content(tmp_path)
    assert bench.main(arguments(tmp_path)) == 2
    assert "another commit" in capsys.readouterr().out
    assert content(tmp_path) == before
