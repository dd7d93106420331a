"""Peak memory of one call of a provider, in a process that has done nothing else.

In one process for all, who comes later finds the pages, pools and threads of who was before.

python benchmarks/fresh_memory.py '{"cell": "lstm", "T": 128, "B": 32, "I": 256, "H": 256}' torch.nn
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace

import torch

from harness.cases import Case
from harness.data import make_data
from harness.memory import PeakMemory
from harness.providers import PROVIDERS, Setting

WARM_UP_STEPS = 2  # timesteps of the call before, for what a process needs once


def peak_mib(case: Case, provider: str, setting: Setting) -> float | None:
    """MiB that a call takes at most beyond its inputs and weights; None where the system does not
    tell or the call fails."""
    command = [sys.executable, __file__, json.dumps(asdict(case)), provider]
    command += ["--device", setting.device, "--threads", str(setting.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def measure(case: Case, provider: str, setting: Setting) -> float | None:
    torch.set_num_threads(setting.threads)
    for each in (replace(case, T=WARM_UP_STEPS), case):
        data = make_data(each, setting.device)
        session = PROVIDERS[provider].prepare(each, data, setting)
        with session.active(), PeakMemory(setting.device) as peak:
            session.call()
    return peak.mib


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)), help="as JSON")
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(measure(args.case, args.provider, Setting(args.device, args.threads))))


if __name__ == "__main__":
    main()
