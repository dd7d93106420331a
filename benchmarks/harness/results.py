"""What a run found, in memory and as JSON with all that is needed to judge or repeat it."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import fused_rnn
from fused_rnn.native import cpu_capability, cpu_library_error
from harness.cases import Case
from harness.providers import PROVIDERS, Setting, is_ours
from harness.sets import SETS

WILD = 0.2  # spread above which a median is not worth much
ON_CHIP_BYTES = 340 << 10  # of weights, in registers and shared memory of one multiprocessor


@dataclass(frozen=True)
class Row:
    """One provider on one case. Without a median it was not timed, and `note` says why."""

    set: str
    group: int  # rows of one group were measured in turns
    variant: int  # which of the group's cases
    case: Case
    provider: str
    ms: float | None = None  # milliseconds per call, the median
    low_ms: float | None = None  # the quartiles
    high_ms: float | None = None
    samples: int = 0
    gflops: float | None = None  # GFLOP/s by Case.flops at the median
    kernel: str = ""
    note: str = ""  # "cannot: ...", "wrong: ...", "failed: ..." or "not measured: ..."
    flops: int = 0  # Case.flops and Case.bytes of the rows that there were
    bytes: int = 0
    error: float | None = None  # the largest relative error of all results
    peak_mib: float | None = None  # of memory, see memory.py; of fresh processes in set memory
    bound_ms: float | None = None  # an estimate of the least, by the machine's ceilings
    bound: str = ""  # by which of them: "compute", "memory" or "steps"
    of_bound: float | None = None  # bound_ms over ms; above 1 where the caches keep operands

    @property
    def ours(self) -> bool:
        return is_ours(self.provider)

    @property
    def wrong(self) -> bool:
        return self.note.startswith(("wrong", "failed") if self.ours else "wrong")

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a part of the median; of timed rows."""
        return (self.high_ms - self.low_ms) / 2 / self.ms

    @property
    def wild(self) -> bool:
        """Whether it was timed, but the median is not worth much."""
        return self.ms is not None and self.spread > WILD


@dataclass
class Run:
    """Everything one command measured."""

    meta: dict
    rows: list[Row] = field(default_factory=list)
    ceiling: dict = field(default_factory=dict)  # as Ceiling.as_json has it
    summary: list[dict] = field(default_factory=list)

    def groups(self) -> list[list[Row]]:
        """The rows, those of one group together."""
        grouped: dict[int, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.group, []).append(row)
        return list(grouped.values())

    def of_peak(self, row: Row) -> float | None:
        """A row's rate over the peak of as many threads, or of its dtype; None where unknown."""
        peak = self._peak(row)
        return row.gflops / peak if peak and row.gflops else None

    def _peak(self, row: Row) -> float | None:
        """GFLOP/s."""
        peaks = self.ceiling.get("peak_gflops", {})
        if self.on_gpu:
            provider = PROVIDERS.get(row.provider)
            tf32 = provider is not None and provider.tf32 and row.case.dtype == "float32"
            return peaks.get("tf32" if tf32 else row.case.dtype)
        if row.case.dtype != "float32":
            return None
        return peaks.get(str(row.case.threads or self.meta["threads"]))

    @property
    def on_gpu(self) -> bool:
        return self.meta.get("device", "cpu") != "cpu"

    def with_bound(self, row: Row) -> Row:
        """The row with the time that the ceilings of this run make the least, as an estimate.

        Bytes count at the rate of copies of the next larger size that was measured, so what lies
        in L2 or L3 can be had in less.
        """
        peak, copies = self._peak(row), self.ceiling.get("copy_gbs")
        if not peak or not copies or not row.flops:
            return row
        sizes = sorted(copies, key=int)
        size = next((size for size in sizes if int(size) >= row.bytes), sizes[-1])
        bounds = {
            "compute": row.flops / (peak * 1e6),
            "memory": row.bytes / (copies[size] * 1e6),
            "steps": row.case.T * row.case.layers * self._step_us(row) / 1e3,
        }
        bound = max(bounds, key=bounds.get)
        # The peak is that of vector instructions; AMX multiplies faster.
        beyond = bound == "compute" and "amx" in row.kernel
        part = bounds[bound] / row.ms if row.ms and not beyond else None
        return replace(row, bound=bound, bound_ms=bounds[bound], of_bound=part)

    def _step_us(self, row: Row) -> float:
        """Microseconds that a step of time costs for synchronisation alone.

        On the CPU a barrier where there are more threads than rows, which share nothing; on a GPU
        that of the smallest part of it which holds the recurrent weights on chip.
        """
        floors, case = self.ceiling.get("step_us", {}), row.case
        if not self.on_gpu:
            threads = case.threads or self.meta["threads"]
            return floors.get(str(threads), 0.0) if threads > case.B else 0.0
        multiprocessors = case.recurrent_bytes / ON_CHIP_BYTES
        scope = "block" if multiprocessors <= 1 else "cluster" if multiprocessors <= 16 else "grid"
        return floors.get(scope, 0.0)

    def missing(self, name: str) -> list[tuple[Case, ...]]:
        """The groups of a set that were not measured."""
        grouped = (group for group in self.groups() if group[0].set == name)
        measured = {tuple(dict.fromkeys(row.case for row in group)) for group in grouped}
        return [group for group in SETS[name].groups if group not in measured]

    def whole_sets(self) -> Run:
        """This run without the sets of which groups are missing."""
        whole = {n for n in {row.set for row in self.rows} if n in SETS and not self.missing(n)}
        return replace(self, rows=[row for row in self.rows if row.set in whole])

    def joined(self, other: Run) -> Run:
        """This run with the sets that only the other one measured, if on the same kind of machine.

        The meta data are those of the run that has the standing set; meta["others"] says when and
        how the sets of the other were measured.
        """
        if other.meta["machine"]["cpu"] != self.meta["machine"]["cpu"]:
            return self
        own = {row.set for row in self.rows}
        kept = [row for row in other.rows if row.set not in own]
        if "standing" in own:
            main, added = self, kept
        else:
            main, added = replace(other, rows=kept), self.rows
        source = other if main is self else self
        first = 1 + max((row.group for row in main.rows), default=-1)
        brief = {name: source.meta[name] for name in ("date", "commit", "threads")}
        brief["load"] = source.meta["machine"]["load"]
        there = {row.set for row in [*main.rows, *added]}
        others = {n: f for n, f in main.meta.get("others", {}).items() if n in there - own}
        for name in dict.fromkeys(row.set for row in added):
            others[name] = source.meta.get("others", {}).get(name, brief)
        rows = [*main.rows, *(replace(row, group=first + row.group) for row in added)]
        return replace(main, meta=main.meta | {"others": others}, rows=rows)

    def save(self, path: Path) -> None:
        """All or nothing: who is killed while writing leaves the file as it was."""
        self.rows = [self.with_bound(row) for row in self.rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_name(path.name + ".part")
        written.write_text(json.dumps(asdict(self), indent=1) + "\n")
        written.replace(path)

    @classmethod
    def load(cls, path: Path) -> Run:
        content = json.loads(path.read_text())
        rows = [Row(**row | {"case": Case(**row["case"])}) for row in content.pop("rows")]
        return cls(rows=rows, **content)


def describe_run(setting: Setting, seconds: float, absent: dict[str, str]) -> dict:
    """Machine, versions, threads, commit, date and command. `absent`: providers and why."""
    modules = {name.split(".")[0] for p in PROVIDERS.values() for name in p.requires}
    distributions = sorted({"torch", "triton", "numpy"} | modules)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *map(_relative, sys.argv)]),
        "commit": _commit(),
        "device": setting.device,
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "fused_rnn_capability": cpu_library_error() or cpu_capability(),
            "load": os.getloadavg()[0],  # of the minute before
            "system": f"{platform.system()} {platform.machine()}",
        }
        | (_gpu_facts(setting.device) if setting.device != "cpu" else {}),
        "versions": {
            "python": platform.python_version(),
            "fused_rnn": fused_rnn.__version__,
            **{name: _version(name) for name in distributions},
        },
        "threads": setting.threads,
        "seconds_per_group": seconds,
        "absent": absent,
    }


def _relative(argument: str) -> str:
    """An argument without the folders of this machine."""
    folder = str(Path(__file__).parents[2])
    return argument.removeprefix(folder + os.sep)


def _gpu_facts(device: str) -> dict:
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        smi = ""
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": smi.strip().splitlines()[-1:],
    }


def _version(name: str) -> str | None:
    for distribution in importlib.metadata.packages_distributions().get(name, [name]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def short_commit(commit: str) -> str:
    """Its first twelve digits, and the "+" of a tree that differs."""
    return commit[:12] + "+" * commit.endswith("+")


def _commit() -> str:
    """The commit of the source tree, with "+" behind it when files differ from it.

    BENCHMARK_COMMIT in the environment says it where the tree was copied without its history.
    """
    if named := os.environ.get("BENCHMARK_COMMIT"):
        return named

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        folder = Path(__file__).parent
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    """As the kernel names it, with family and model, since virtual machines shorten the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or "unknown"
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    family = f"family {facts.get('cpu family')} model {facts.get('model')}"
    return f"{facts.get('model name', 'unknown')} ({family})"
