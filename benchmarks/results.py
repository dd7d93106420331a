"""What a run found, in memory and as JSON with all that is needed to judge or repeat it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import fused_rnn
from cases import Case
from fused_rnn.native import cpu_capability, cpu_library_error
from providers import PROVIDERS, is_ours

WILD = 0.2  # spread above which a median is not worth much


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
    note: str = ""  # "cannot: ..." or "wrong: ..."

    @property
    def ours(self) -> bool:
        return is_ours(self.provider)

    @property
    def wrong(self) -> bool:
        return self.note.startswith("wrong")

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
        """A row's rate over the peak of as many threads, where both are float32 and known."""
        peak = self.ceiling["peak_gflops"].get(str(row.case.threads or self.meta["threads"]))
        if not peak or not row.gflops or row.case.dtype != "float32":
            return None
        return row.gflops / peak

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        content = json.loads(path.read_text())
        rows = [Row(**row | {"case": Case(**row["case"])}) for row in content.pop("rows")]
        return cls(rows=rows, **content)


def describe_run(threads: int, seconds: float, absent: dict[str, str]) -> dict:
    """Machine, versions, threads, commit, date and command. `absent`: providers and why."""
    distributions = {name for p in PROVIDERS.values() for name in ("torch", *p.requires)}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "fused_rnn_capability": cpu_library_error() or cpu_capability(),
            "load": os.getloadavg()[0],  # of the minute before
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "fused_rnn": fused_rnn.__version__,
            **{name: _version(name) for name in sorted(distributions)},
        },
        "threads": threads,
        "seconds_per_group": seconds,
        "absent": absent,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the source tree, with "+" behind it when files differ from it."""

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
