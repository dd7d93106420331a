"""The campaign's folder, clock and processes; campaign.py has the steps."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST_LOG = 1 << 20  # bytes kept of one process' output: its end
GRACE = 5.0  # seconds between asking a process to end and killing it


@dataclass
class Result:
    """What came of one process, or why there was none."""

    step: str
    name: str
    status: str  # "done", "failed", "stopped" (its time was over), "skipped" or "running"
    reason: str = ""
    command: str = ""
    seconds: float = 0.0
    returncode: int | None = None
    figures: dict = field(default_factory=dict)


class Campaign:
    """The folder of results, the clock, and everything that was run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.end = time.monotonic() + args.seconds
        self.results: list[Result] = []
        self.scratch = Path(tempfile.mkdtemp(prefix="fused-rnn-campaign-"))
        self.site = self.scratch / "site"
        self.facts = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "benchmarks/gpu/campaign.py", *sys.argv[2:]]),
            "python": platform.python_version(),
            "dry_run": args.dry_run,
            "limit_seconds": args.seconds,
        }
        (self.out / "campaign.log").write_text("")

    @property
    def dry(self) -> bool:
        return self.args.dry_run

    @property
    def only(self) -> list[str]:
        return self.args.only.split(",")

    def follow(self, plan: Plan) -> None:
        for step, function in plan:
            if step in self.only:
                function(self)

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def environment(self, **more: str) -> dict[str, str]:
        paths = [str(ROOT), str(ROOT / "benchmarks"), str(self.site)]
        paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        ours = {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "FUSED_RNN_TRITON_TUNING": str(self.out / "tuning.json"),
        }
        if self.args.commit:
            ours["BENCHMARK_COMMIT"] = self.args.commit
        return os.environ | ours | more

    def python(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, *map(str, arguments)]

    def save(self) -> None:
        content = self.facts | {"results": [asdict(result) for result in self.results]}
        part = self.out / "campaign.json.part"
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(self.out / "campaign.json")

    def skip(self, step: str, name: str, reason: str) -> Result:
        return self._record(Result(step, name, "skipped", reason))

    def run(self, step: str, name: str, command: list[str], limit: float, **env: str) -> Result:
        """Runs a process for at most `limit` seconds and what is left of the campaign's time."""
        limit = min(limit, self.left - GRACE)
        shown = shlex.join(command).replace(str(ROOT) + os.sep, "").replace(str(self.out), "OUT")
        if limit <= 0:
            return self._record(Result(step, name, "skipped", "no time was left", shown))
        result = Result(step, name, "running", command=shown)
        self.results.append(result)
        self.save()
        started = time.monotonic()
        output = self.scratch / "output"
        process = self.start(command, output, **env)
        try:
            result.returncode = process.wait(limit)
            result.status = "failed" if result.returncode else "done"
        except subprocess.TimeoutExpired:
            result.status, result.reason = "stopped", f"after {limit:.0f} s"
        finally:
            end(process)
        result.seconds = round(time.monotonic() - started, 1)
        self.keep(result, output)
        return result

    def start(self, command: list[str], output: Path, **env: str) -> subprocess.Popen:
        """A process of its own session, so that its children end with it."""
        with output.open("wb") as stream:
            return subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=self.environment(**env),
                start_new_session=True,
            )

    def keep(self, result: Result, output: Path) -> None:
        """Writes down what came of a process."""
        self._log(result, output)
        self.save()
        print(
            f"{result.step:9} {result.name:28} {result.status} {result.reason} {result.seconds} s",
            flush=True,
        )

    def _record(self, result: Result) -> Result:
        self.results.append(result)
        self.save()
        print(f"{result.step:9} {result.name:28} {result.status}: {result.reason}", flush=True)
        return result

    def _log(self, result: Result, output: Path) -> None:
        size = output.stat().st_size
        with output.open("rb") as stream, (self.out / "campaign.log").open("ab") as log:
            title = f"\n=== {result.step} {result.name}: {result.status}: {result.command}\n"
            log.write(title.encode())
            if size > LONGEST_LOG:
                stream.seek(size - LONGEST_LOG)
                log.write(f"[{size - LONGEST_LOG} bytes left out]\n".encode())
            shutil.copyfileobj(stream, log)
        output.unlink()


def end(process: subprocess.Popen) -> None:
    """Ends the process and all that it started."""
    # Interrupted, pytest still writes its report.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


Plan = tuple[tuple[str, Callable[[Campaign], None]], ...]
