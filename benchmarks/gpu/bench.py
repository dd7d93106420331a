"""The GPU's part of the benchmark: every set made for it, results written after every group.

python benchmarks/gpu/bench.py OUT.json --limit 200

Needs torch and fused_rnn, nothing else. What cannot go on (a device error, a kernel that hangs)
ends the process; the same command tries its group again without the provider that was running, and
leaves it when it ends once more. It goes on with results of the same commit and GPU only.
With --dry-run it goes through all of it on the CPU, every size cut down.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from harness.cases import Case
from harness.ceiling import Ceiling
from harness.data import make_data
from harness.gpu_ceiling import gpu_ceiling
from harness.providers import PROVIDERS, Provider, Setting, default
from harness.results import Row, Run, describe_run
from harness.runner import DeviceLostError, entrant_of, measure
from harness.sets import SETS, Group

GPU_SETS = [name for name, case_set in SETS.items() if case_set.device == "cuda"]
AGAIN = 3  # exit status: start the same command again
# A group takes seconds; FlashRNN compiles for minutes, in sets of its own.
LONGEST_GROUP = {"fast": 60, "all": 100, "none": 60}  # seconds, by the rivals of a set
WARMED = ("gpu-flashrnn", "gpu-torchrl")
LARGEST_DRY = {"T": 3, "B": 2, "I": 4, "H": 8, "layers": 2}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the JSON to write, and to go on with if it exists")
    parser.add_argument("--set", action="append", choices=GPU_SETS, help="default: all, in order")
    parser.add_argument("--seconds", type=float, default=0.3, help="of a group's timing")
    parser.add_argument("--limit", type=float, default=240.0, help="no group starts after it")
    parser.add_argument(
        "--warm", action="store_true", help="time nothing: fill the compilers' caches on disk"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny, and on the CPU")
    return parser.parse_args(argv)


def chosen_groups(names: list[str], dry: bool) -> list[tuple[str, Group]]:
    groups = [(name, group) for name in names for group in SETS[name].groups]
    if not dry:
        return groups
    first: dict[tuple[str, bool], Group] = {}
    for name, group in groups:
        first.setdefault((name, group[0].resets > 0), tuple(_small(case) for case in group))
    return [(name, group) for (name, _), group in first.items()]


def _small(case: Case) -> Case:
    sizes = {name: min(getattr(case, name), most) for name, most in LARGEST_DRY.items()}
    return replace(case, **sizes, heads=min(case.heads, 2), dtype="float32")


class Journal:
    """What has been done, so that the command can be run again: a file beside the results."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = {"running": None, "provider": None, "died": {}, "done": [], "excluded": {}}
        if path.exists():
            self.state |= json.loads(path.read_text())

    def write(self, **change: object) -> None:
        self.state |= change
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.state))
        part.replace(self.path)

    def begins(self, provider: str) -> None:
        if provider != self.state["provider"]:
            self.write(provider=provider)

    def exclude(self, key: str, provider: str, reason: str) -> None:
        self.state["excluded"].setdefault(key, {})[provider] = reason
        self.write()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    started = time.monotonic()
    device = "cpu" if args.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing is measured (--dry-run goes through it on the CPU)")
        return 2
    setting = Setting(device, torch.get_num_threads())
    named = [name for name in default("cuda") if device in PROVIDERS[name].devices]
    reasons = {name: PROVIDERS[name].unavailable() for name in named}
    absent = {name: reason for name, reason in reasons.items() if reason}
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}")
    providers = [PROVIDERS[name] for name in named if name not in absent]
    if args.dry_run:  # compiling takes longer than all the rest
        providers = [provider for provider in providers if provider.name != "compiled loop"]

    if args.warm:
        return warm(providers, args, setting)
    journal = Journal(args.out.with_name(args.out.stem + "-journal.json"))
    described = describe_run(setting, args.seconds, absent)
    if args.out.exists():
        run = Run.load(args.out)
        if differs := _other_run(run.meta, described):
            print(f"{args.out} has results of another {differs}: name another file")
            return 2
        run.meta["processes"] = [*run.meta.get("processes", ()), _brief(described)]
    else:
        run = Run(described, ceiling=_ceiling(device))
        run.save(args.out)
    groups = chosen_groups(args.set or GPU_SETS, args.dry_run)
    run.meta.pop("not_reached", None)
    _note_what_died(journal)
    for index, (set_name, group) in enumerate(groups):
        key = _key(set_name, group)
        if key in journal.state["done"]:
            continue
        if time.monotonic() - started > args.limit:
            print(f"stopped after {args.limit:.0f} s; {key} would have been next")
            late = (
                name for name, g in groups[index:] if _key(name, g) not in journal.state["done"]
            )
            run.meta["not_reached"] = dict(Counter(late))
            run.save(args.out)
            return 0
        excluded = journal.state["excluded"].get(key, {})
        there = _taking_part(set_name, providers, excluded)
        if journal.state["died"].get(key, 0) > 1:  # by whom is not known: it is left
            run.rows += _not_measured(set_name, len(journal.state["done"]), group, there, excluded)
            run.save(args.out)
            journal.write(done=[*journal.state["done"], key])
            continue
        journal.write(running=key, provider=None)
        # A hanging kernel cannot be interrupted; the process can.
        faulthandler.dump_traceback_later(LONGEST_GROUP[SETS[set_name].rivals], exit=True)
        number = len(journal.state["done"])
        rows = [Row(set_name, number, 0, group[0], n, note=why) for n, why in excluded.items()]
        try:
            rows += measure(set_name, number, group, there, args.seconds, setting, journal.begins)
        except DeviceLostError as error:
            print(f"device lost: {error}")
            journal.exclude(key, error.provider, f"failed: {error}")
            journal.write(running=None)
            return AGAIN
        except torch.OutOfMemoryError:
            note = "cannot: the float64 results to compare with do not fit"
            rows.append(Row(set_name, number, 0, group[0], "torch.nn", note=note))
        faulthandler.cancel_dump_traceback_later()
        run.rows += rows
        run.save(args.out)
        journal.write(running=None, done=[*journal.state["done"], key])
        _print(rows)
    return 0


def warm(providers: list[Provider], args: argparse.Namespace, setting: Setting) -> int:
    """Calls once what compiles for long, while others use the machine."""
    compiling = [p for p in providers if p.name.startswith(("flashrnn", "torchrl"))]
    names = [name for name in args.set or GPU_SETS if name in WARMED]
    for _, group in chosen_groups(names, args.dry_run):
        for case in group:
            for provider in compiling:
                if provider.wants(case):
                    row = Row("warm", 0, 0, case, provider.name)
                    found = entrant_of(provider, row, make_data(case, setting.device), {}, setting)
                    print(case, provider.name, getattr(found, "note", "warm"), flush=True)
    return 0


def _key(set_name: str, group: Group) -> str:
    return f"{set_name}: {' | '.join(map(str, group))}"


def _other_run(before: dict, now: dict) -> str:
    """What rows of one file must have in common and these have not; "" where all is the same."""
    facts = {"commit": lambda meta: meta["commit"], "GPU": lambda meta: meta["machine"].get("gpu")}
    return next((name for name, fact in facts.items() if fact(before) != fact(now)), "")


def _brief(meta: dict) -> dict:
    """Of a process that went on with the results of another."""
    return {name: meta[name] for name in ("date", "command")} | {"load": meta["machine"]["load"]}


def _note_what_died(journal: Journal) -> None:
    """Blames the provider that was running when the process ended, and counts."""
    key, provider = journal.state["running"], journal.state["provider"]
    if key is None:
        return
    died = journal.state["died"] | {key: journal.state["died"].get(key, 0) + 1}
    journal.write(running=None, died=died)
    if provider is not None:
        journal.exclude(key, provider, "failed: the process ended or hung while it ran")


def _not_measured(
    set_name: str, number: int, group: Group, there: list[Provider], excluded: dict[str, str]
) -> list[Row]:
    notes = {p.name: "not measured: the process ended twice" for p in there} | excluded
    return [Row(set_name, number, 0, group[0], name, note=note) for name, note in notes.items()]


def _taking_part(
    set_name: str, providers: list[Provider], excluded: dict[str, str]
) -> list[Provider]:
    slow_too = SETS[set_name].rivals == "all"
    return [p for p in providers if p.name not in excluded and (slow_too or not p.slow)]


def _ceiling(device: str) -> dict:
    if device == "cuda":
        return gpu_ceiling(device)
    ceiling = Ceiling(torch.get_num_threads())
    ceiling.measure()
    return ceiling.as_json()


def _print(rows: list[Row]) -> None:
    for row in rows:
        found = row.note or f"{row.ms:.4f} ms +-{row.spread:.0%}"
        print(f"{row.case} | {row.provider} | {found} | {row.kernel}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
