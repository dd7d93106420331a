"""What is printed of results: who took part, what was not measured, where ours is slower."""

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pytest.importorskip("rich")  # of the tables
    names = ("cases", "means", "origin", "results", "sets")
    return SimpleNamespace(**{name: import_module(f"harness.{name}") for name in names})


def run_of(harness, *rows, **meta):
    facts = {
        "date": "2026-12-01T00:00:00",
        "commit": COMMIT,
        "device": "cpu",
        "machine": {"cpu": "a CPU", "fused_rnn_capability": "avx2", "gpu": "", "load": 0.1},
        "versions": {"python": "3.11", "torch": "2.13", "openvino": "2026.4", "keras": "3.15"},
        "threads": 2,
    }
    return harness.results.Run(facts | meta, list(rows))


def standing_rows(harness, ms, part=slice(None), name="standing"):
    """Of all groups, or a part of them, of a standing set; a median for each provider of `ms`."""
    return [
        harness.results.Row(
            name, n, 0, group[0], provider, ms=value, low_ms=value, high_ms=value, samples=7
        )
        for n, group in enumerate(harness.sets.SETS[name].groups[part])
        for provider, value in ms.items()
    ]


def lines_of(table):
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()]
    return {line[0]: line[1:] for line in cells[2:]}


def test_best_of_others_is_blank_where_torch_was_the_only_one(harness):
    rows = standing_rows(harness, {"fused_rnn": 1.0, "torch.nn": 3.0, "openvino": 2.0})
    rows = [r for r in rows if r.provider != "openvino" or r.case.mode == "inference"]
    run = run_of(harness, *rows)
    lines = lines_of(harness.means.summary(run))
    none = harness.means.NONE
    assert lines["gru inference"] == ["6 of 6", "3.00", "3.00 to 3.00", "2.00", "2.00 to 2.00"]
    assert lines["gru training"] == ["6 of 6", "3.00", "3.00 to 3.00", none, none]
    assert harness.origin.rivals(run, ("standing",)).endswith(
        "beside torch.nn: openvino in inference; nobody in training."
    )


def test_means_of_a_gpu_are_told_by_dtype_and_say_how_many_there_are(harness):
    ms = {"fused_rnn": 1.0, "fused_rnn/triton": 4.0, "torch.nn": 2.0}
    name = "gpu-standing"
    rows = standing_rows(harness, ms, slice(0, 40), name)  # bfloat16, and float32's first ten
    slow = [replace(r, ms=8.0) if r.case.dtype == "float32" and r.ours else r for r in rows]
    run = run_of(harness, *slow, device="cuda")
    lines = lines_of(harness.means.summary(run))
    none = harness.means.NONE
    assert lines["rnn inference bfloat16"][:2] == ["5 of 5", "2.00"]
    assert lines["rnn inference bfloat16"][-2] == "0.50"
    assert lines["rnn inference float32"][:2] == ["5 of 5", "0.25"]
    assert lines["lstm training float32"] == ["0 of 5", *[none] * 6]
    said = harness.origin.reached(run)
    assert "40 of the " in said and "40 of 60 of gpu-standing" in said


def test_slower_cases_are_listed(harness):
    rows = standing_rows(harness, {"fused_rnn": 2.0, "torch.nn": 4.0, "openvino": 3.0})
    rows = [replace(r, ms=1.0) if r.group == 3 and r.provider == "openvino" else r for r in rows]
    text = harness.means.slower(run_of(harness, *rows))
    assert text.startswith("Slower than the best other, 1 of 36 cases:")
    assert text.endswith(f"| standing | {rows[3 * 3].case} | openvino | 0.500 |")
    none = standing_rows(harness, {"fused_rnn": 2.0, "torch.nn": 4.0})
    assert harness.means.slower(run_of(harness, *none)) == ""


def test_setting_tells_what_took_part_and_what_did_not(harness):
    rows = standing_rows(harness, {"fused_rnn": 1.0, "openvino": 2.0})
    run = run_of(
        harness,
        *rows,
        commit=f"{COMMIT}+",
        absent={"haste": "haste_pytorch is not installed (pip install it)"},
        corrections=["peak: times 0.9"],
        processes=[{}, {}],
    )
    text = harness.origin.setting(run)
    assert "commit 0123456789ab+" in text
    assert "openvino 2026.4, python 3.11, torch 2.13." in text
    assert "Left out: haste (haste_pytorch is not installed)." in text
    assert "Fewest samples of a median: standing 7." in text
    assert "Corrected since: peak: times 0.9." in text and "by 3 processes" in text


def test_caveats_go_with_the_commit_they_are_about(harness):
    """And none is kept of results that are no longer published."""
    runs = [harness.results.Run.load(path) for path in (BENCHMARKS / "results").glob("*.json")]
    published = {commit for run in runs for commit in harness.origin.commits(run)}
    assert set(harness.origin.CAVEATS) <= published
    (commit, texts), *_ = harness.origin.CAVEATS.items()
    assert harness.origin.caveats(run_of(harness, commit=commit)) == list(texts)
    assert harness.origin.caveats(run_of(harness)) == []


def test_check_fails_where_the_standing_set_has_gaps(harness, monkeypatch, capsys):
    import publish

    whole, gaps = (
        run_of(harness, *standing_rows(harness, {"fused_rnn": 1.0}, part))
        for part in (slice(None), slice(1, None))
    )
    monkeypatch.setattr(publish, "document", publish.DOCUMENT.read_text)
    monkeypatch.setattr(publish, "readme", publish.README.read_text)
    monkeypatch.setattr(publish, "others", lambda device: [])
    for run, status in ((whole, 0), (gaps, 1)):
        monkeypatch.setattr(publish, "load", lambda device, run=run: run)
        assert publish.main(["--check"]) == status
    assert "standing are missing: 2026-12-01, a CPU" in capsys.readouterr().out


def test_products_on_amx_are_no_share_of_an_estimate_for_vectors(harness):
    ceiling = {"peak_gflops": {"2": 1.0}, "copy_gbs": {"1000": 10.0}}
    run = replace(run_of(harness), ceiling=ceiling)
    row = harness.results.Row(
        "set",
        0,
        0,
        harness.cases.Case("gru", 9, 2, 8, 8),
        "fused_rnn",
        ms=1.0,
        flops=10**6,
        bytes=9,
    )
    assert run.with_bound(replace(row, kernel="cpu/avx512 layer")).of_bound == 1.0
    assert run.with_bound(replace(row, kernel="cpu/amx layer")).of_bound is None
    by_bytes = replace(row, kernel="cpu/amx layer", flops=1, bytes=10**6)
    assert run.with_bound(by_bytes).of_bound > 0
