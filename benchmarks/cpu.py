"""Times the recurrent layers of fused_rnn on the CPU against torch.nn, OpenVINO, ONNX Runtime and
others.

python benchmarks/cpu.py                                    every set, then the targets
python benchmarks/cpu.py --set standing --cell gru --json gru.json
python benchmarks/cpu.py --backend reference --cell gru --shape 128,32,256 --mode training
python benchmarks/cpu.py --compare old.json new.json        measures nothing
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fresh_memory import peak_mib
from fused_rnn.dispatch import BACKENDS
from harness.cases import DTYPES, GATES, MODES, Case
from harness.ceiling import Ceiling
from harness.providers import PROVIDERS, Provider, Setting, default, is_ours
from harness.report import (
    print_ceiling,
    print_comparison,
    print_noise,
    print_outcomes,
    print_rows,
    print_setting,
)
from harness.results import Run, describe_run
from harness.runner import LONGEST_OWN, measure
from harness.sets import INFERENCE_AND_TRAINING, SETS, Group
from harness.targets import judge

CPU_SETS = [name for name, case_set in SETS.items() if case_set.device == "cpu"]
RESULTS = Path(__file__).parent / "results"
NARROWING = ("cell", "mode", "shape", "provider", "backend")  # options that leave out rows of a set
OF_SHAPE = ("layers", "bidirectional", "dtype")
WIDTH = 160  # of what is printed where there is no terminal


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) not in (3, 4) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected T,B,H or T,B,I,H, all positive; got {text!r}")
    return sizes if len(sizes) == 4 else (*sizes, sizes[2])


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    several = "; may be given again"
    add("--set", action="append", choices=CPU_SETS, help="a set of cases" + several)
    add("--cell", action="append", choices=GATES, help="only these cells" + several)
    add("--mode", action="append", choices=MODES, help="only these modes" + several)
    add("--shape", action="append", type=shape, help="T,B,H or T,B,I,H, not a set" + several)
    add("--layers", type=int, default=1, help="of --shape")
    add("--bidirectional", action="store_true", help="of --shape")
    add("--dtype", choices=DTYPES, default="float32", help="of --shape")
    add("--provider", action="append", choices=PROVIDERS, help="default: all that are installed")
    add("--backend", choices=BACKENDS, help="force fused_rnn's backend")
    add("--seconds", type=float, default=1.5, help="about how long a group of cases is measured")
    add("--samples", type=int, default=0, help=f"fewest of a median, or {LONGEST_OWN} s of calls")
    add("--limit", type=float, default=float("inf"), help="seconds after which no group starts")
    add("--threads", type=int, default=torch.get_num_threads(), help="of every provider")
    add("--json", type=Path, help="write everything that was found to this file")
    add("--save", action="store_true", help="publish whole sets: benchmarks/results/cpu*.json")
    add("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two such files")
    args = parser.parse_args(argv)
    if args.shape and args.set:
        parser.error("--shape and --set exclude each other")
    for path in args.compare or ():
        if not path.is_file():
            parser.error(f"argument --compare: {path} is not a file")
    if args.threads < 1 or args.layers < 1:
        parser.error("--threads and --layers must be at least 1")
    if narrowed := [name for name in NARROWING if args.save and getattr(args, name)]:
        parser.error(f"--save is for whole sets, not with --{narrowed[0]}; --json FILE keeps them")
    for name in OF_SHAPE:
        if not args.shape and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} goes with --shape")
    if args.backend and "fused_rnn" not in (args.provider or ["fused_rnn"]):
        parser.error("--backend is that of the provider fused_rnn, which is not among --provider")
    for name in args.set or ():
        if why := left_out(name, args):
            parser.error(f"--set {name}: {why}")
    return args


def left_out(set_name: str, args: argparse.Namespace) -> str:
    """Why the options leave nothing to measure of a set, or "" where they do not."""
    if args.backend and isinstance(SETS[set_name].rivals, tuple):
        return "its providers are fixed, and --backend changes none of them"
    if not taking_part(set_name, chosen_providers(args)[0], bool(args.provider)):
        return "none of the providers takes part in it"
    return ""


def chosen_groups(args: argparse.Namespace) -> list[tuple[str, Group]]:
    """What to measure: the name of the set, "" for --shape, and the group."""
    cells = args.cell or list(GATES)
    if args.shape:
        modes = args.mode or INFERENCE_AND_TRAINING
        options = {"layers": args.layers, "bidirectional": args.bidirectional, "dtype": args.dtype}
        return [
            ("", (Case(cell, *sizes, mode, **options),))
            for cell, sizes, mode in product(cells, args.shape, modes)
        ]
    names = args.set or [name for name in CPU_SETS if not left_out(name, args)]
    modes = args.mode or MODES
    return [(name, group) for name in names for group in SETS[name].select(cells, modes)]


def chosen_providers(args: argparse.Namespace) -> tuple[list[Provider], dict[str, str]]:
    """Those that take part, and those that were asked for but cannot, with the reason."""
    names = args.provider or list(default("cpu"))
    if args.backend:
        names = [f"fused_rnn/{args.backend}" if name == "fused_rnn" else name for name in names]
    reasons = {name: PROVIDERS[name].unavailable() for name in dict.fromkeys(names)}
    absent = {name: reason for name, reason in reasons.items() if reason}
    return [PROVIDERS[name] for name in reasons if name not in absent], absent


def taking_part(set_name: str, providers: list[Provider], named: bool) -> list[Provider]:
    """Who is measured in a set; a shape of one's own has the usual rivals and whom one `named`."""
    rivals = SETS[set_name].rivals if set_name in SETS else "all" if named else "fast"
    if isinstance(rivals, tuple):
        chosen = {provider.name for provider in providers}
        return [PROVIDERS[name] for name in rivals if name in chosen or not named]
    if rivals == "none":
        return [provider for provider in providers if is_ours(provider.name)]
    return [provider for provider in providers if rivals == "all" or not provider.slow]


def published_file(cpu: str) -> Path:
    """Of the results of this CPU: cpu.json where there are none of any other, or one of its own."""
    for path in sorted(RESULTS.glob("cpu*.json")):
        if Run.load(path).meta["machine"]["cpu"] == cpu:
            return path
    if not (RESULTS / "cpu.json").exists():
        return RESULTS / "cpu.json"
    return RESULTS / f"cpu-{re.sub('[^a-z0-9]+', '-', cpu.lower()).strip('-')}.json"


def save(run: Run, args: argparse.Namespace) -> None:
    """Judges the run and writes it; --save takes the place of what this run has measured whole."""
    if args.json:
        _judge_and_write(run, args.json)
    if args.save and (whole := run.whole_sets()).rows:
        path = published_file(run.meta["machine"]["cpu"])
        _judge_and_write(whole.joined(Run.load(path)) if path.exists() else whole, path)


def written_to(run: Run, args: argparse.Namespace) -> list[Path]:
    published = args.save and run.whole_sets().rows
    return [
        path
        for path in (args.json, published_file(run.meta["machine"]["cpu"]) if published else None)
        if path
    ]


def _judge_and_write(run: Run, path: Path) -> None:
    run.summary = [outcome.as_json() for outcome in judge(run)]
    run.save(path)


def run_benchmark(
    console: Console,
    groups: list[tuple[str, Group]],
    providers: list[Provider],
    args: argparse.Namespace,
    run: Run,
) -> None:
    """Fills the run, saves it after every group and prints the table of every set."""
    ceiling, setting = Ceiling(args.threads), Setting("cpu", args.threads)
    end = time.monotonic() + args.limit
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(groups))
        for number, (name, group) in enumerate(groups):
            if time.monotonic() > end:
                late = groups[number:]
                run.meta["not_reached"] = dict(Counter(name for name, _ in late))
                if number and groups[number - 1][0] == name:
                    print_rows(console, run, name)
                break
            progress.update(task, description=str(group[-1]))
            ceiling.measure()
            run.ceiling = ceiling.as_json()
            there = taking_part(name, providers, bool(args.provider))
            rows = measure(name, number, group, there, args.seconds, setting, samples=args.samples)
            if name in SETS and SETS[name].fresh_memory:
                peaks = (peak_mib(row.case, row.provider, setting) for row in rows)
                rows = [replace(row, peak_mib=peak) for row, peak in zip(rows, peaks, strict=True)]
            run.rows += rows
            save(run, args)
            progress.advance(task)
            if number + 1 == len(groups) or groups[number + 1][0] != name:
                print_rows(console, run, name)
    for name, count in run.meta.get("not_reached", {}).items():
        console.print(f"[yellow]no time was left[/] for {count} groups of {name}", highlight=False)
    save(run, args)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if args.compare:
        old, new = map(Run.load, args.compare)
        print_comparison(console, old, new)
        return
    torch.set_num_threads(args.threads)
    providers, absent = chosen_providers(args)
    groups = chosen_groups(args)
    if not groups or not providers:
        raise SystemExit("nothing to measure: no case or no provider is left")
    run = Run(describe_run(Setting("cpu", args.threads), args.seconds, absent))
    print_setting(console, run)
    run_benchmark(console, groups, providers, args, run)
    print_ceiling(console, run)
    print_noise(console, run)
    if not args.shape:
        print_outcomes(console, judge(run), absent)
    for path in written_to(run, args):
        console.print(f"written: {path}")


if __name__ == "__main__":
    main()
