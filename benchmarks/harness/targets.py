"""What the CPU backend is held to on two cores, and whether a run shows it.

Every target is a ratio where more is better, taken from the rows of one group at a time: a
speed-up, a part of the machine's peak, or a part of a neighbour's rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

from harness.cases import GATES, Case
from harness.results import Row, Run
from harness.sets import SETS

Ratio = Callable[[list[Row]], "float | None"]  # None: the rows do not tell


def _ours(rows: list[Row]) -> list[Row]:
    """Rows of the first of our providers, one for each case of the group, in order."""
    name = next((row.provider for row in rows if row.ours), None)
    return sorted((row for row in rows if row.provider == name), key=lambda row: row.variant)


def over_best(rows: list[Row], rival: str = "") -> float | None:
    """The least time of all others, or of the rival, over ours; 0 when ours is wrong."""
    ours = _ours(rows)
    times = [row.ms for row in rows if not row.ours and row.ms and rival in ("", row.provider)]
    if not ours or not times:
        return None
    if ours[0].ms is None:
        return 0.0 if ours[0].wrong else None
    return min(times) / ours[0].ms


def over_torch(rows: list[Row]) -> float | None:
    return over_best(rows, "torch.nn")


def second_over_first(rows: list[Row]) -> float | None:
    """Our rate in a group's second case over that in its first; 0 when either is wrong."""
    ours = _ours(rows)
    if any(row.wrong for row in ours):
        return 0.0
    if len(ours) != 2 or not all(row.gflops for row in ours):
        return None
    return ours[1].gflops / ours[0].gflops


def of_provider(rows: list[Row], provider: str) -> Row | None:
    return next((row for row in rows if row.provider == provider), None)


def eager_over_compiled(rows: list[Row]) -> float | None:
    """Our time in eager mode over that under torch.compile; 0 when either is wrong."""
    eager, compiled = (of_provider(rows, n) for n in ("fused_rnn", "fused_rnn compiled"))
    if not eager or not compiled:
        return None
    if eager.wrong or compiled.wrong:
        return 0.0
    return eager.ms / compiled.ms if eager.ms and compiled.ms else None


def memory_of_torch(rows: list[Row]) -> float | None:
    """torch.nn's peak of memory over ours."""
    ours, theirs = (of_provider(rows, n) for n in ("fused_rnn", "torch.nn"))
    if not ours or not theirs or not ours.peak_mib or not theirs.peak_mib:
        return None
    return theirs.peak_mib / ours.peak_mib


def of_peak(run: Run, rows: list[Row]) -> float | None:
    """Our rate over the run's FMA peak of as many threads; 0 when ours is wrong."""
    ours = _ours(rows)
    if not ours:
        return None
    if ours[0].wrong:
        return 0.0
    return run.of_peak(ours[0])


@dataclass(frozen=True)
class Target:
    """`goal` is for the geometric mean over the groups, `floor` for the worst of them."""

    text: str
    set: str
    ratio: Ratio
    applies: Callable[[Case], bool]  # to the first case of a group
    goal: float | None = None
    floor: float | None = None


def _per_cell(
    text: str, set_name: str, mode: str, ratio: Ratio, **bounds: tuple[float, float | None]
) -> list[Target]:
    """A target for each cell of `bounds`, which are its goal and its floor."""
    return [
        Target(
            f"{cell} {text}",
            set_name,
            ratio,
            lambda case, cell=cell: (case.cell, case.mode) == (cell, mode),
            *bounds[cell],
        )
        for cell in GATES
    ]


def targets_of(run: Run) -> list[Target]:
    """All of them; the peak that one is a part of is the run's."""
    return [
        *_per_cell(
            "inference against the best of all others",
            "standing",
            "inference",
            over_best,
            gru=(1.4, 1.05),
            lstm=(1.2, 1.0),
            rnn=(1.4, 1.0),
        ),
        *_per_cell(
            "inference against torch.nn",
            "standing",
            "inference",
            over_torch,
            gru=(2.7, 1.4),
            lstm=(1.35, 1.0),
            rnn=(2.7, 1.4),
        ),
        *_per_cell(
            "training against torch.nn",
            "standing",
            "training",
            over_torch,
            gru=(3.2, 1.4),
            lstm=(1.5, 1.05),
            rnn=(2.8, 1.4),
        ),
        *(
            Target(
                f"{cell} step of H=128 against torch.nn",
                "streaming",
                over_torch,
                lambda case, cell=cell: (case.cell, case.H) == (cell, 128),
                goal,
            )
            for cell, goal in (("rnn", 4.0), ("gru", 4.0), ("lstm", 5.0))
        ),
        *_per_cell(
            "packed training against torch.nn packed",
            "packed",
            "packed",
            over_torch,
            gru=(3.0, None),
            lstm=(5.0, None),
            rnn=(3.0, None),
        ),
        *_per_cell(
            "training in bfloat16 against float32",
            "bf16",
            "training",
            second_over_first,
            gru=(1.5, None),
            lstm=(1.5, None),
            rnn=(1.5, None),
        ),
        Target(
            "part of the FMA peak at B >= 32 and H >= 128",
            "standing",
            partial(of_peak, run),
            lambda case: case.B >= 32 and case.H >= 128,
            floor=0.88,
        ),
        Target(
            "rate of odd sizes against the round neighbour's",
            "odd",
            second_over_first,
            lambda case: True,
            floor=0.85,
        ),
        Target(
            "two threads against one",
            "threads",
            second_over_first,
            lambda case: True,
            floor=1.85,
        ),
        # Below 1 by what two medians of the same code differ in one run.
        Target(
            "layers under torch.compile against eager ones",
            "compiled",
            eager_over_compiled,
            lambda case: case.mode != "step",
            floor=0.95,
        ),
        Target(
            "memory of torch.nn in training over ours",
            "memory",
            memory_of_torch,
            lambda case: True,
            floor=1.0,
        ),
        Target("small layers against torch.nn", "small", over_torch, lambda case: True, floor=1.0),
        Target(
            "small gru and rnn training against torch.nn",
            "small",
            over_torch,
            lambda case: case.mode == "training" and case.cell != "lstm",
            floor=3.0,
        ),
    ]


@dataclass(frozen=True)
class Outcome:
    """What a run says about a target; the figures are None where nothing was measured."""

    text: str
    geometric_mean: float | None
    goal: float | None
    worst: float | None
    floor: float | None
    worst_case: str
    measured: int  # groups, of the `groups` that the target is about
    groups: int
    wild: int  # groups of the measured ones with a row that spreads too much

    @property
    def met(self) -> bool:
        """Of measured ones: whether all that was measured is as good as asked for."""
        if self.goal is not None and self.geometric_mean < self.goal:
            return False
        return self.floor is None or self.worst >= self.floor

    @property
    def verdict(self) -> str:
        if self.measured == 0:
            return "not measured"
        verdict = "met" if self.met else "not met"
        if self.met and self.measured < self.groups:
            verdict = "met so far"
        return f"{verdict} ? {self.wild}" if self.wild else verdict

    def as_json(self) -> dict:
        return asdict(self) | {"verdict": self.verdict}


def judge(run: Run) -> list[Outcome]:
    """The outcome of every target, over those of its groups that were measured."""
    return [_outcome(run, target) for target in targets_of(run)]


def _outcome(run: Run, target: Target) -> Outcome:
    ratios: dict[str, float] = {}
    wild = 0
    for rows in run.groups():
        ours = _ours(rows)
        if not ours or ours[0].set != target.set or not target.applies(ours[0].case):
            continue
        ratio = target.ratio(rows)
        if ratio is not None:
            ratios[str(ours[-1].case)] = ratio
            wild += any(row.wild for row in rows)
    worst = min(ratios, key=ratios.get, default="")
    return Outcome(
        target.text,
        geometric_mean(ratios.values()) if ratios else None,
        target.goal,
        ratios.get(worst),
        target.floor,
        worst,
        len(ratios),
        sum(target.applies(group[0]) for group in SETS[target.set].groups),
        wild,
    )


def geometric_mean(ratios: Iterable[float]) -> float:
    """0 when any ratio is."""
    ratios = list(ratios)
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if all(ratios) else 0.0
