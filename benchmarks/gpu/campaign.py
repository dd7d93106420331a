"""All that needs a GPU, in one command under nine minutes.

python benchmarks/gpu/campaign.py OUT                        every step
python benchmarks/gpu/campaign.py OUT --only bench,profile
python benchmarks/gpu/campaign.py OUT --dry-run              on the CPU, tiny, no GPU tools

Needs Python and torch; fused_rnn is taken from the tree that this file lies in, with the libraries
built in it, and wheels from a folder (--wheels), since there may be no network. Every step is a
process with a time limit of its own; OUT/campaign.json says after each what came of it, so that a
kill at any moment leaves valid results. What is missing is skipped by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

from processes import GRACE, LONGEST_LOG, ROOT, Campaign, Plan, Result, end

HERE = Path(__file__).resolve().parent
STEPS = ("tests", "sanitize", "tune", "bench", "profile")
HEADLINE = ("gpu-headline", "gpu-standing")
NOTHING = 4  # gpu/workload.py: this version has no backend to run
TOOLS = ("memcheck", "racecheck", "synccheck")
CELLS = ("lstm", "gru", "rnn")
MOST_WORKERS = 14  # of which each has a context on the GPU
TUNED_SIZES = ("512", "256", "1024", "128")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which(name) or shutil.which(name, path=str(Path(home) / "bin"))
    nsight = sorted(Path("/opt/nvidia/nsight-compute").glob(f"*/{name}"))
    return found or (str(nsight[-1]) if nsight else None)


def install(campaign: Campaign) -> None:
    """Wheels, then archives of source, into a folder that only the campaign's processes see."""
    folder = campaign.args.wheels
    if folder is None:
        return
    pip = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    into = ["--target", str(campaign.site), "--upgrade"]
    wheels = [str(path.resolve()) for path in sorted(folder.glob("*.whl"))]
    if wheels:
        campaign.run("install", "wheels", campaign.python(*pip, *into, *wheels), 60)
    # haste's makefile asks for GPUs that CUDA 13 has given up; with -e the environment overrides.
    settings = {
        "MAKEFLAGS": "e",
        "GPU_ARCH_FLAGS": "-gencode arch=compute_90,code=sm_90",
        "MAX_JOBS": str(os.cpu_count()),
    }
    for archive in sorted(folder.glob("*.tar.gz")):
        command = campaign.python(*pip, "--no-build-isolation", *into, archive.resolve())
        campaign.run("install", archive.name, command, 60, **settings)


def describe(campaign: Campaign) -> None:
    """Versions and devices, into campaign.json."""
    code = (
        "import json, torch; n = torch.cuda.device_count(); print(json.dumps({"
        "'torch': torch.__version__, 'cuda': torch.version.cuda, 'available': n > 0,"
        "'gpus': [torch.cuda.get_device_name(i) for i in range(n)]}))"
    )
    command = campaign.python("-c", code)
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=campaign.environment(),
    )
    if done.returncode:
        raise SystemExit(f"torch does not run here:\n{done.stderr}")
    campaign.facts |= json.loads(done.stdout.splitlines()[-1])
    doctor = campaign.python("-m", "fused_rnn", "doctor")
    campaign.run("setup", "doctor", doctor, 60)


@contextmanager
def warming(campaign: Campaign) -> Iterator[None]:
    """While the tests run, other cores compile what compiles for long: FlashRNN and
    TorchRL's kernels. That has ended before anything is timed."""
    if "bench" not in campaign.only:
        yield
        return
    command = campaign.python(HERE / "bench.py", campaign.out / "bench.json", "--warm")
    command += ["--dry-run"] if campaign.dry else []
    output = campaign.scratch / "warm"
    started, process = time.monotonic(), campaign.start(command, output)
    try:
        yield
    finally:
        result = Result(
            "bench", "warming the caches", "stopped" if process.poll() is None else "done"
        )
        end(process)
        result.seconds = round(time.monotonic() - started, 1)
        campaign.results.append(result)
        campaign.keep(result, output)


def run_tests(campaign: Campaign) -> None:
    if not all(has_module(campaign, name) for name in ("pytest", "hypothesis")):
        campaign.skip("tests", "pytest", "pytest or hypothesis is not installed, nor in the wheels")
        return
    if campaign.dry:
        one_file = ROOT / "tests" / "test_doctor.py"
        run_marked(campaign, "gpu tests", "not gpu", one_file, "tests.xml", 0.2)
        return
    # Those that compile or fill the memory for long come last, one at a time, and may be stopped.
    tests = ROOT / "tests"
    run_marked(campaign, "gpu tests", "gpu and not slow", tests, "tests.xml", 0.4)
    run_marked(campaign, "long gpu tests", "gpu and slow", tests, "tests-long.xml", 0.05, False)


def run_marked(
    campaign: Campaign,
    name: str,
    which: str,
    tests: Path,
    report_name: str,
    share: float,
    side_by_side: bool = True,
) -> None:
    """pytest on the tests with such markers, for a share of the campaign's time."""
    report = campaign.out / report_name
    options = ["-q", "-m", which, "-p", "no:cacheprovider", f"--junitxml={report}"]
    settings: dict[str, str] = {}
    if side_by_side and has_module(campaign, "xdist"):
        # Kernels compile side by side, and a GPU error ends one worker's tests, not all.
        options += ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS))]
        settings["OMP_NUM_THREADS"] = "1"  # workers with as many threads as cores get nowhere
    command = campaign.python("-m", "pytest", *options, tests)
    result = campaign.run("tests", name, command, campaign.args.seconds * share, **settings)
    if report.exists():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        names = ("tests", "failures", "errors", "skipped")
        result.figures = {name: int(suite.get(name, 0)) for name in names}
    if result.returncode == 5:  # pytest: no test was selected
        result.status, result.reason = "skipped", "no test carries the marker gpu here"
    campaign.save()


def has_module(campaign: Campaign, name: str) -> bool:
    folders = [str(campaign.site), *sys.path]
    return any((Path(folder) / name).is_dir() for folder in folders if folder) or (
        importlib.util.find_spec(name) is not None
    )


def run_sanitizers(campaign: Campaign) -> None:
    workload = campaign.python(HERE / "workload.py", "--small")
    if campaign.dry:
        campaign.run("sanitize", "workload", [*workload, "--device", "cpu"], 120)
        for name in TOOLS:
            campaign.skip("sanitize", name, "dry run: needs a GPU")
        return
    # Once without: whether numbers are right, and Triton's kernels are compiled for the others.
    _skip_nothing(campaign.run("sanitize", "workload", workload, campaign.args.seconds * 0.08))
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        for name in TOOLS:
            campaign.skip("sanitize", name, "compute-sanitizer is not on PATH")
        return
    for name in TOOLS:
        options = ["--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        options += ["--target-processes", "application-only"]
        # torch's caching allocator hides what is written past the end of a tensor.
        settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if name == "memcheck" else {}
        limit = campaign.args.seconds * 0.05
        command = [sanitizer, *options, *workload]
        _skip_nothing(campaign.run("sanitize", name, command, limit, **settings))


def _skip_nothing(result: Result) -> None:
    if result.returncode == NOTHING:
        result.status, result.reason = "skipped", "this version has no such backend"


def run_tune(campaign: Campaign) -> None:
    """What it writes, OUT/tuning.json, is used by the steps after it.

    A process for each cell and size, since each writes at its end.
    """
    command = campaign.python("-m", "fused_rnn", "tune")
    asked = subprocess.run(
        [*command, "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=campaign.environment(),
    )
    if asked.returncode:
        campaign.skip("tune", "tune", "this version has no `python -m fused_rnn tune`")
        return
    if campaign.dry:
        campaign.skip("tune", "tune", "dry run: needs a GPU")
        return
    until = time.monotonic() + campaign.args.seconds * 0.1
    for size, cell in product(TUNED_SIZES, CELLS[:2]):
        options = ["--cell", cell, "--hidden", size]
        campaign.run("tune", f"{cell} {size}", [*command, *options], until - time.monotonic())


def bench_sets(campaign: Campaign, name: str, sets: tuple[str, ...], share: float) -> None:
    """gpu/bench.py, again and again while a provider ends it before its time."""
    until = time.monotonic() + min(campaign.args.seconds * share, campaign.left - 2 * GRACE)
    options = [option for set_name in sets for option in ("--set", set_name)]
    if campaign.dry:
        options += ["--dry-run", "--seconds", "0"]
    script, out = HERE / "bench.py", campaign.out / "bench.json"
    journal = campaign.out / "bench-journal.json"
    while (left := until - time.monotonic()) > GRACE:
        before = journal.read_bytes() if journal.exists() else b""
        command = campaign.python(script, out, *options, "--limit", str(int(left)))
        result = campaign.run("bench", name, command, left + 3 * GRACE)
        # Each run that ends early blames somebody in the journal; else it will end so again.
        blamed = journal.exists() and journal.read_bytes() != before
        if result.status != "failed" or not blamed:
            break
        result.reason = "a provider ended the process; the next one goes on behind it"
        result.status = "done"


def run_bench_headline(campaign: Campaign) -> None:
    bench_sets(campaign, "headline", HEADLINE, 0.2)


def run_bench_rest(campaign: Campaign) -> None:
    bench_sets(campaign, "all sets", (), 0.28)


def run_profiles(campaign: Campaign) -> None:
    """One profile per cell and backend, of everything that a training call launches."""
    device = "cpu" if campaign.dry else "cuda"
    ncu = None if campaign.dry else tool("ncu")
    log = campaign.out / "profile.log"
    for backend, cell in _profiled(campaign):
        name = f"{backend} {cell}"
        workload = campaign.python(HERE / "workload.py", "--device", device)
        workload += ["--profile", backend, cell]
        if campaign.dry:
            campaign.run("profile", name, workload, 120)
        elif ncu is None:
            campaign.skip("profile", name, "ncu is not on PATH")
        else:
            options = ["--profile-from-start", "off", "--launch-count", "40", "--set", "basic"]
            options += ["--section", "WarpStateStats", "--section", "MemoryWorkloadAnalysis"]
            options += ["--log-file", str(log.with_suffix(".part"))]
            limit = campaign.args.seconds * 0.04
            _skip_nothing(campaign.run("profile", name, [ncu, *options, *workload], limit))
            _append(log, f"\n=== {name}\n", log.with_suffix(".part"))


def _profiled(campaign: Campaign) -> Iterator[tuple[str, str]]:
    backends = ("cpu",) if campaign.dry else ("cuda", "triton")
    cells = CELLS[:1] if campaign.dry else CELLS
    yield from ((backend, cell) for backend in backends for cell in cells)


def _append(log: Path, title: str, part: Path) -> None:
    if part.exists():
        with log.open("a") as stream:
            stream.write(title + part.read_text(errors="replace")[:LONGEST_LOG])
        part.unlink()


# In the order of what matters most; bench comes in two parts, the rest of it after the sanitizers.
FIRST: Plan = (("tests", run_tests),)
THEN: Plan = (
    ("tune", run_tune),
    ("bench", run_bench_headline),
    ("sanitize", run_sanitizers),
    ("bench", run_bench_rest),
    ("profile", run_profiles),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder for results")
    parser.add_argument("--only", default=",".join(STEPS), help=f"of {','.join(STEPS)}")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels and archives to install")
    parser.add_argument("--seconds", type=float, default=530, help="of everything together")
    parser.add_argument("--commit", help="of this tree, where it was copied without its history")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    args = parser.parse_args(argv)
    if unknown := set(args.only.split(",")) - set(STEPS):
        parser.error(f"--only: expected names of {', '.join(STEPS)}; got {', '.join(unknown)}")
    campaign = Campaign(args)
    install(campaign)
    describe(campaign)
    if not campaign.dry and not campaign.facts["available"]:
        campaign.skip("setup", "device", "torch finds no GPU; --dry-run goes through all steps")
        return 1
    with warming(campaign):
        campaign.follow(FIRST)
    campaign.follow(THEN)
    shutil.rmtree(campaign.scratch, ignore_errors=True)
    campaign.facts["finished"] = True
    campaign.save()
    failed = [f"{r.step} {r.name}" for r in campaign.results if r.status == "failed"]
    print(f"written: {campaign.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
