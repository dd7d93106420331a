"""Makes the tables and plots of the documentation from benchmarks/results/*.json.

python benchmarks/publish.py            docs/performance.md, docs/images/*.png, README.md's tables
python benchmarks/publish.py --check    writes nothing; fails where a text is not what they say
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.captions import CAPTIONS
from harness.means import STANDING, slower, summary, table
from harness.origin import (
    NOT_UNROLLED,
    caveats,
    measured_by_itself,
    place,
    reached,
    rivals,
    setting,
)
from harness.report import OUTCOME_COLUMNS, number, outcome_cells, percent
from harness.results import Row, Run
from harness.sets import SETS
from harness.targets import eager_over_compiled, judge, over_best, over_torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
README = ROOT / "README.md"
BEGIN, END = "<!-- {}: made by benchmarks/publish.py -->", "<!-- end of {} -->"
NOT_YET = "Not yet measured: no GPU has run this package so far."


def load(device: str) -> Run | None:
    path = RESULTS / f"{device}.json"
    return Run.load(path) if path.exists() else None


def others(device: str) -> list[Run]:
    """Runs on another kind of machine than cpu.json's or gpu.json's, under names of their own."""
    return [Run.load(path) for path in sorted(RESULTS.glob(f"{device}-*.json"))]


def means(run: Run) -> str:
    """The means of the standing set and who took part in it."""
    return f"{summary(run)}\n\n{rivals(run, STANDING)}"


def readme_cpu() -> str:
    run = load("cpu")
    if run is None:
        return "Not yet measured."
    runs = [run, *others("cpu")]
    shown = [f"{summary(each)}\n\n{place(each)}." for each in runs]
    texts = dict.fromkeys(text for each in runs for text in caveats(each))
    notes = [
        f"{', '.join(each.meta['date'][:10] for each in runs if text in caveats(each))}: {text}"
        for text in texts
        if text != NOT_UNROLLED  # of jax, which is not in these tables
    ]
    return "\n\n".join(["\n\nOn another CPU:\n\n".join(shown), rivals(run, STANDING), *notes])


def readme_gpu() -> str:
    run = load("gpu")
    if run is None:
        return NOT_YET
    return "\n\n".join([means(run), " ".join([f"{place(run)}.", reached(run), *caveats(run)])])


def readme() -> str:
    """README.md with its generated parts as they should be."""
    text = README.read_text()
    for name, content in (("cpu table", readme_cpu()), ("gpu table", readme_gpu())):
        begin, end = BEGIN.format(name), END.format(name)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise SystemExit(f"README.md: expected {begin!r} and {end!r}")
        text = f"{before}{begin}\n{content}\n{end}{after}"
    return text


def document() -> str:
    """docs/performance.md."""
    parts = [
        "# Performance",
        "Made by `make bench` from `benchmarks/results/`; `benchmarks/README.md` says how it is "
        "measured. Times are medians of one call in milliseconds with half the distance of the "
        "quartiles; every column counts the input projection, and training all gradients. "
        '"Of estimate" is an estimate of the least time, over ours: the largest of matrix products '
        "at the measured peak, bytes that must move at the copy rate of the size measured that "
        "holds them, and steps at the cost of a synchronisation. It can exceed 100%, since what "
        "stays in L2 or L3 between calls moves faster than copies from memory. Products on AMX "
        "have none: the peak is that of vector instructions.",
    ]
    for device, title in (("cpu", "CPU"), ("gpu", "GPU")):
        parts.append(f"## {title}")
        run = load(device)
        if run is None:
            parts.append(NOT_YET)
            continue
        parts += [setting(run), _ceilings(run), means(run), slower(run)]
        parts += [
            f"![{caption}](images/{name})\n\n{caption}." for name, caption in image_names(run)
        ]
        for name in dict.fromkeys(row.set for row in run.rows):
            parts += [f"### {name}", SETS[name].question if name in SETS else "", _set(run, name)]
        if device == "cpu":
            parts += ["### Targets", _targets(run)]
        for other in others(device):
            parts += [f"### On another {title}", setting(other), _ceilings(other)]
            if device == "cpu":
                parts += [means(other), slower(other), _targets(other)]
            else:
                parts += [_set(other, name) for name in dict.fromkeys(r.set for r in other.rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def image_names(run: Run) -> list[tuple[str, str]]:
    """The plots that there are, with captions, in the order of plots.plot_all."""
    prefix = "gpu" if run.on_gpu else "cpu"
    names = [(f"{prefix}-{name}.png", caption) for name, caption in CAPTIONS.items()]
    return [(name, caption) for name, caption in names if (IMAGES / name).exists()]


def _ceilings(run: Run) -> str:
    lines = []
    kinds = {"peak_gflops": "GFLOP/s", "copy_gbs": "GB/s", "step_us": "us per step"}
    for kind, unit in kinds.items():
        for name, value in run.ceiling.get(kind, {}).items():
            what = {
                "peak_gflops": f"{run.ceiling['peak']}, {name}" + " threads" * (not run.on_gpu),
                "copy_gbs": f"copying {int(name) >> 20} MiB" if kind == "copy_gbs" else "",
                "step_us": f"synchronising {name}" + " threads" * (not run.on_gpu),
            }[kind]
            lines.append([what, f"{value:.4g} {unit}"])
    return table(["what this machine does at most", ""], lines)


def _set(run: Run, name: str) -> str:
    groups = [group for group in run.groups() if group[0].set == name]
    providers = list(dict.fromkeys(row.provider for group in groups for row in group))
    fresh = name in SETS and SETS[name].fresh_memory
    lines = []
    for group in groups:
        for case in dict.fromkeys(row.case for row in group):
            rows = {row.provider: row for row in group if row.case == case}
            ours = rows.get("fused_rnn")
            theirs = rows.get("torch.nn") if fresh else None
            lines.append(
                [
                    str(case),
                    *(_time(rows.get(provider)) for provider in providers),
                    number(over_torch(list(rows.values()))),
                    number(over_best(list(rows.values()))),
                    percent(run.with_bound(ours).of_bound) if ours else "",
                    number(ours.peak_mib, 1) if ours and fresh else "",
                    number(theirs.peak_mib, 1) if theirs else "",
                    number(eager_over_compiled(list(rows.values()))),
                    ours.kernel if ours else "",
                ]
            )
    tail = [
        "torch.nn / ours",
        "best / ours",
        "of estimate",
        "MiB",
        "torch.nn's MiB",
        "eager / compiled",
        "kernel",
    ]
    headers = ["case", *providers, *tail]
    used = [i for i in range(len(headers)) if any(line[i] for line in lines)]
    notes = dict.fromkeys(f"- {r.provider}: {r.note}" for g in groups for r in g if r.note)
    shown = table([headers[i] for i in used], [[line[i] for i in used] for line in lines])
    return "\n\n".join(filter(None, [measured_by_itself(run, name), shown, "\n".join(notes)]))


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    if row.ms is None:
        return row.note.partition(":")[0]
    digits = 4 if row.ms < 0.1 else 3 if row.ms < 10 else 1
    return f"{row.ms:.{digits}f} ±{100 * row.spread:.0f}%"


def _targets(run: Run) -> str:
    lines = [[*outcome_cells(outcome), outcome.verdict] for outcome in judge(run)]
    headers = [*OUTCOME_COLUMNS, ""]
    note = "A question mark counts groups with a row that spreads too much to be trusted."
    return f"{table(headers, lines)}\n\n{note}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    if args.check:
        made = {DOCUMENT: document(), README: readme()}
        stale = [path for path, text in made.items() if path.read_text() != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what benchmarks/results says: make publish")
        cpus = [run for run in (load("cpu"), *others("cpu")) if run is not None]
        partial = [run for run in cpus if run.missing("standing")]
        for run in partial:
            print(f"groups of the set standing are missing: {place(run)}")
        return 1 if stale or partial else 0
    from harness.plots import plot_all

    for device in ("cpu", "gpu"):
        if run := load(device):
            for path in plot_all(run, IMAGES, device):
                print(f"written: {path.relative_to(ROOT)}")
    for path, text in ((README, readme()), (DOCUMENT, document())):
        path.write_text(text)
        print(f"written: {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
