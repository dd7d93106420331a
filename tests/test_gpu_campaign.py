"""The GPU campaign goes through all its steps on a CPU, and a kill leaves valid results."""

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
        while "sanitize" not in (tmp_path / "campaign.json").read_text():
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


def test_device_error_is_blamed_and_the_rest_goes_on(tmp_path, monkeypatch):
    """A provider that brings the device down ends the process; the next one leaves it out."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "gpu"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench

    from harness.providers import PROVIDERS, Provider

    def broken(case, data, setting):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    kept = {name: PROVIDERS[name] for name in ("fused_rnn", "torch.nn")}
    monkeypatch.setattr(bench, "PROVIDERS", kept | {"broken": Provider("broken", broken)})
    monkeypatch.setattr(bench, "default", lambda device: ["fused_rnn", "broken", "torch.nn"])
    arguments = [
        str(tmp_path / "bench.json"), "--dry-run", "--seconds", "0", "--set", "gpu-headline"
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench.py"])
    assert bench.main(arguments) == bench.AGAIN
    assert bench.main(arguments) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    notes = {row["provider"]: row["note"] for row in rows}
    assert "illegal memory access" in notes["broken"]
    assert notes["fused_rnn"] == notes["torch.nn"] == ""
