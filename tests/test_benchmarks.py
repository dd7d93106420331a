"""The benchmark program runs, compares before it measures, and writes what it measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "cpu.py"), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_one_shape(tmp_path):
    path = tmp_path / "run.json"
    providers = ("--provider", "fused_rnn", "--provider", "torch.nn")
    shape = ("--cell", "gru", "--shape", "3,2,8", "--mode", "training", "--seconds", 0)
    result = run(*shape, *providers, "--json", path)
    assert result.returncode == 0, result.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row["provider"] for row in rows} == {"fused_rnn", "torch.nn"}
    assert all(row["ms"] > 0 and not row["note"] for row in rows)


def test_unknown_provider():
    result = run("--provider", "abacus")
    assert result.returncode == 2
    assert "abacus" in result.stderr
