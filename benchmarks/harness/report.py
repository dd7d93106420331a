"""What a run prints: tables of rows, the targets, and a comparison with an older run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.results import WILD, Row, Run, short_commit
from harness.sets import SETS
from harness.targets import Outcome, geometric_mean, over_best, over_torch, second_over_first

# A smaller change is never called one, however small the spread within each run.
NOISE = 0.03
BUSY = 0.5  # load average of the last minute before a run, above which it warns
MOST_COLUMNS = 5  # of providers; more stand below each other
NOTHING = "-"  # in place of a time; a note below the table says why


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def milliseconds(row: Row) -> str:
    """The median and the spread, or in a word why there is none."""
    if row.ms is None:
        return (
            f"[red]{row.note.partition(':')[0]}[/]"
            if row.note.startswith(("wrong", "failed"))
            else NOTHING
        )
    digits = 4 if row.ms < 0.1 else 3 if row.ms < 10 else 1
    return f"{row.ms:.{digits}f} ±{100 * row.spread:.0f}%"


def print_rows(console: Console, run: Run, set_name: str) -> None:
    """The table of a set: a line for each case, or for each row where many providers took part."""
    groups = [group for group in run.groups() if group[0].set == set_name]
    providers = list(dict.fromkeys(row.provider for group in groups for row in group))
    if len(providers) > MOST_COLUMNS:
        headers, lines = _long_table(groups)
    else:
        lines = [line for group in groups for line in _lines(group, run, providers)]
        headers = [
            *("cell", "T,B,[I,]H", "mode", ""),
            *(f"{name}\nms" for name in providers),
            *("torch.nn\n/ ours", "best\n/ ours", "rate\n/ first's", "GFLOP/s", "of peak"),
            *("of estimate", "MiB", "kernel"),
        ]
    question = SETS[set_name].question if set_name in SETS else ""
    title = f"{set_name}: {question}" if question else None
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    used = [i for i in range(len(headers)) if any(line[i] not in ("", NOTHING) for line in lines)]
    for i in used:
        table.add_column(headers[i], justify="left" if headers[i] in WORDS else "right")
    for line, following in zip_longest(lines, lines[1:]):
        ends_case = len(providers) > MOST_COLUMNS and following is not None and following[0] != ""
        table.add_row(*(line[i] for i in used), end_section=ends_case)
    console.print(table)
    notes = dict.fromkeys((r.provider, r.note) for group in groups for r in group if r.note)
    for provider, note in notes:
        console.print(f"  {provider}: {note}", highlight=False, markup=False)


WORDS = ("cell", "T,B,[I,]H", "mode", "", "kernel", "case", "provider")


def _lines(group: list[Row], run: Run, providers: list[str]) -> Iterator[list[str]]:
    """The cells of print_rows' table for each case of a group."""
    fresh = group[0].set in SETS and SETS[group[0].set].fresh_memory
    for case in dict.fromkeys(row.case for row in group):
        rows = {row.provider: row for row in group if row.case == case}
        ours = next((row for row in rows.values() if row.ours), next(iter(rows.values())))
        yield [
            *(case.cell, case.shape, case.mode, case.traits),
            *(milliseconds(rows[name]) if name in rows else "" for name in providers),
            number(over_torch(list(rows.values()))),
            number(over_best(list(rows.values()))),
            number(second_over_first(group)) if ours.variant == 1 else "",
            number(ours.gflops, 1),
            percent(run.of_peak(ours)),
            percent(ours.of_bound),
            number(ours.peak_mib, 1) if fresh else "",
            ours.kernel,
        ]


def _long_table(groups: list[list[Row]]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines, a line for each row, the fastest of a case first."""
    headers = ["case", "provider", "ms", "/ ours", "error", "GFLOP/s", "of estimate", "kernel"]
    lines = []
    for group in groups:
        ours = next((row for row in group if row.ours), group[0])
        ordered = sorted(group, key=lambda row: row.ms or float("inf"))
        for row in ordered:
            ratio = row.ms / ours.ms if row.ms and ours.ms else None
            lines.append(
                [
                    str(row.case) if row is ordered[0] else "",
                    row.provider,
                    milliseconds(row),
                    number(ratio),
                    "" if row.error is None else f"{row.error:.0e}",
                    number(row.gflops, 1),
                    percent(row.of_bound),
                    row.kernel,
                ]
            )
    return headers, lines


def percent(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"


def print_setting(console: Console, run: Run) -> None:
    """The machine, the versions and who takes part; printed before anything is measured."""
    meta = run.meta
    machine, versions = meta["machine"], meta["versions"]
    console.print(
        f"{machine['cpu']}, {machine['cores']} cores; {meta['threads']} threads for every "
        f"provider; fused_rnn kernels: {machine['fused_rnn_capability']}",
        highlight=False,
    )
    named = [f"{name} {version}" for name, version in versions.items() if version]
    console.print(", ".join(named) + f"; commit {short_commit(meta['commit'])}", highlight=False)
    console.print(
        "Medians and half the distance of the quartiles; input projection and all gradients "
        "included; results compared before timing.",
        highlight=False,
    )
    if machine["load"] > BUSY:
        console.print(f"[yellow]the machine is busy[/]: load average {machine['load']:.1f}")
    for name, reason in meta["absent"].items():
        console.print(f"[yellow]left out: {name}[/]: {escape(reason)}", highlight=False)


def print_ceiling(console: Console, run: Run) -> None:
    ceiling = run.ceiling

    def rates(name: str) -> str:
        return ", ".join(f"{rate:.0f} with {n}" for n, rate in ceiling[name].items())

    console.print(
        f"peak in GFLOP/s by threads ({ceiling['peak']}): {rates('peak_gflops')}; "
        f"torch.mm: {rates('torch_mm_gflops')}",
        highlight=False,
    )


def print_noise(console: Console, run: Run) -> None:
    """Says so when many medians are worth little."""
    timed = [row for row in run.rows if row.ms]
    wild = sum(row.wild for row in timed)
    if wild:
        console.print(
            f"[yellow]{wild} of {len(timed)} rows spread by more than {WILD:.0%}[/]: "
            "measure again when the machine is quiet",
            highlight=False,
        )


OUTCOME_COLUMNS = ("target", "geometric mean", "goal", "worst", "floor", "worst case")


def outcome_cells(outcome: Outcome) -> tuple[str, ...]:
    """What OUTCOME_COLUMNS have of it."""
    return (
        outcome.text,
        number(outcome.geometric_mean),
        number(outcome.goal),
        number(outcome.worst),
        number(outcome.floor),
        outcome.worst_case,
    )


def print_outcomes(console: Console, outcomes: list[Outcome], absent: dict[str, str]) -> None:
    title = "targets, as ratios where more is better"
    if absent:
        title += f" (without {', '.join(absent)})"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in (*OUTCOME_COLUMNS, "groups", ""):
        numeric = name in ("geometric mean", "goal", "worst", "floor", "groups")
        table.add_column(name, justify="right" if numeric else "left")
    measured = [outcome for outcome in outcomes if outcome.measured]
    for outcome in measured:
        style = "yellow" if outcome.wild else "green" if outcome.met else "red"
        table.add_row(
            *outcome_cells(outcome),
            f"{outcome.measured}/{outcome.groups}",
            f"[{style}]{outcome.verdict}[/]",
        )
    console.print(table)
    if any(outcome.wild for outcome in measured):
        console.print("?: of so many groups, a row spreads too much for the verdict to be trusted")
    if len(measured) < len(outcomes):
        console.print(f"{len(outcomes) - len(measured)} targets were not measured in this run")


def print_comparison(console: Console, old: Run, new: Run) -> None:
    """What changed from one run to another beyond the spread of both, what got slower first.

    Machines change between runs, so torch.nn's own change on the same case stands beside.
    """
    for key in ("machine", "threads", "versions"):
        for fact in _differences(key, old.meta[key], new.meta[key]):
            console.print(f"[yellow]differs[/]: {fact}", highlight=False)
    before, after = _timed(old), _timed(new)
    common = before.keys() & after.keys()
    change = {key: after[key].ms / before[key].ms for key in common}
    table = Table(title="old -> new", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("case", "provider", "old ms", "new ms", "time", "noise", "torch.nn's time", ""):
        table.add_column(name, justify="left" if name in ("case", "provider", "") else "right")
    for key in sorted(common, key=change.get, reverse=True):
        noise = max(NOISE, before[key].spread + after[key].spread)
        verdict = ""
        if abs(change[key] - 1) > noise:
            verdict = "[red]slower[/]" if change[key] > 1 else "[green]faster[/]"
        set_name, case, provider = key
        yardstick = change.get((set_name, case, "torch.nn"))
        table.add_row(
            str(case),
            provider,
            number(before[key].ms, 4),
            number(after[key].ms, 4),
            f"x{change[key]:.2f}",
            f"±{noise:.0%}",
            f"x{yardstick:.2f}" if yardstick else "",
            verdict,
        )
    console.print(table)
    for provider in sorted({key[2] for key in common}):
        mean = geometric_mean(change[key] for key in common if key[2] == provider)
        console.print(f"{provider}: time x{mean:.3f}, geometric mean", highlight=False)
    missing = len(before.keys() ^ after.keys())
    if missing:
        console.print(f"{missing} rows are in one of the two only")


def _differences(name: str, old: object, new: object) -> list[str]:
    """ "name: old -> new", one for each entry where both are dictionaries."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in old | new if key != "load"]
        return [
            d for key in keys for d in _differences(f"{name} {key}", old.get(key), new.get(key))
        ]
    return [] if old == new else [f"{name}: {old} -> {new}"]


def _timed(run: Run) -> dict[tuple, Row]:
    return {(row.set, row.case, row.provider): row for row in run.rows if row.ms}
