"""Runs every example as a program of its own, and says which reached their goals.

    python examples/run_all.py --small                at the size of the tests
    python examples/run_all.py names online           these two, at full size
    python examples/run_all.py --publish              and keep results and pictures for the docs

The documentation's page of examples is made from `examples/results/*.json` and the pictures in
`docs/pictures`, which is where --publish puts them; full-size results only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
PICTURES = FOLDER.parent / "docs" / "pictures"

# In the order of the documentation, from the cell to the long run.
EXAMPLES = {
    "cells_by_hand": "Cells by hand",
    "sentiment": "Sentiment: many to one",
    "captions": "Caption generator: one to many",
    "dates": "Date translator: sequence to sequence",
    "gradient_flow": "Gradient flow",
    "long_memory": "Copy first and the adding problem",
    "bidirectional": "Bidirectional",
    "deep": "Deep against wide",
    "language_model": "Character language model",
    "names": "Where a name is from",
    "forecast": "Time series",
    "online": "Online learning",
    "hidden_states": "Hidden states",
    "memory_maze": "Reinforcement learning",
    "streaming": "Streaming",
    "distributed": "Several processes",
    "long_sequences": "Long sequences",
}


def command(name: str) -> list[str]:
    program = [str(FOLDER / f"{name}.py")]
    if name == "distributed":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [sys.executable, *torchrun, *program]
    return [sys.executable, *program]


def cpu_seconds_of_children() -> float:
    """What the processes that this one started, and those that they started, have computed."""
    times = os.times()
    return times.children_user + times.children_system


def add_times(path: Path, seconds: float, cpu_seconds: float) -> None:
    """What the whole program took, from its start on; CPU time of all its processes and threads."""
    times = {"seconds": round(seconds, 1), "cpu_seconds": round(cpu_seconds, 1)}
    path.write_text(json.dumps(json.loads(path.read_text()) | times, indent=1) + "\n")


def publish(out: Path, name: str) -> None:
    facts = json.loads((out / f"{name}.json").read_text())
    if facts["size"] != "full":
        raise ValueError(f"{name}: only results at full size are published")
    RESULTS.mkdir(exist_ok=True)
    PICTURES.mkdir(exist_ok=True)
    shutil.copy(out / f"{name}.json", RESULTS)
    if (out / f"{name}.png").exists():
        with Image.open(out / f"{name}.png") as picture:
            few = picture.convert("RGB").quantize(64)  # a third of the bytes, and no visible loss
            few.save(PICTURES / f"{name}.png", optimize=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(EXAMPLES)}")
    parser.add_argument("--small", action="store_true", help="the size that the tests run")
    parser.add_argument("--publish", action="store_true", help="keep the results for the docs")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(EXAMPLES):
        parser.error(f"name: expected some of {', '.join(EXAMPLES)}; got {', '.join(unknown)}")
    if args.small and args.publish:
        parser.error("argument --publish: only results at full size are published")
    failed = []
    for name in args.names or EXAMPLES:
        print(f"== {name}", flush=True)
        start, computed = time.perf_counter(), cpu_seconds_of_children()
        options = ["--out", str(args.out), *(["--small"] if args.small else [])]
        status = subprocess.run([*command(name), *options], check=False).returncode
        seconds = time.perf_counter() - start
        computed = cpu_seconds_of_children() - computed
        outcome = "failed" if status else "fine"
        print(f"== {name}: {outcome}, {seconds:.0f} s, {computed:.0f} s of CPU time", flush=True)
        if status:
            failed.append(name)
        else:
            add_times(args.out / f"{name}.json", seconds, computed)
            if args.publish:
                publish(args.out, name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
