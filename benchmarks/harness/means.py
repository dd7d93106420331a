"""Tables over the groups of a run: means of a standing set, and the cases that are slower."""

from __future__ import annotations

from collections.abc import Iterable

from harness.cases import GATES, Case
from harness.results import Row, Run
from harness.sets import SETS
from harness.targets import geometric_mean, of_provider, over_best, over_torch

STANDING = ("standing", "gpu-standing")
NONE = "\N{EN DASH}"  # in place of a figure that there is not
TRITON = "fused_rnn/triton"


def table(headers: list[str], lines: list[list[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns are text, the others numbers."""
    rules = ["---" if i < words else "---:" for i in range(len(headers))]
    rows = [headers, rules, *([cell.replace("|", "/") for cell in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary(run: Run) -> str:
    """A line for each cell, mode and, on a GPU, dtype of the standing set: geometric means.

    The best of all others is worth a figure only where somebody beside torch.nn took part.
    """
    name = STANDING[run.on_gpu]
    wanted: dict[tuple, int] = {}
    for group in SETS[name].groups:
        wanted[_kind(group[0])] = wanted.get(_kind(group[0]), 0) + 1
    triton = run.on_gpu and any(row.provider == TRITON and row.ms for row in run.rows)
    lines = []
    for kind in sorted(wanted, key=lambda kind: list(GATES).index(kind[0])):
        groups = [g for g in run.groups() if g[0].set == name and _kind(g[0].case) == kind]
        ratios = _known(map(over_torch, groups))
        best = _known(map(over_best, groups)) if any(map(_has_rivals, groups)) else []
        of_triton = [[*_means(_known(map(_triton_over_torch, groups)))]] if triton else []
        lines.append(
            [
                " ".join(kind if run.on_gpu else kind[:2]),
                f"{len(ratios)} of {wanted[kind]}",
                *_means(ratios),
                *_means(best),
                *(cell for cells in of_triton for cell in cells),
            ]
        )
    headers = ["", "cases", "faster than torch.nn", "from, to"]
    headers += ["than the fastest of all others", "from, to"]
    headers += ["Triton backend, than torch.nn", "from, to"] if triton else []
    return table(headers, lines)


def slower(run: Run) -> str:
    """Every case in which somebody else was faster, by how much, and who."""
    lines = []
    for group in run.groups():
        ratio = over_best(group)
        if ratio is None or ratio >= 1:
            continue
        best = min((r for r in group if r.ms and not r.ours), key=lambda row: row.ms)
        lines.append([group[0].set, str(group[0].case), best.provider, f"{ratio:.3f}"])
    if not lines:
        return ""
    measured = len(_known(map(over_best, run.groups())))
    said = f"Slower than the best other, {len(lines)} of {measured} cases:"
    return f"{said}\n\n{table(['set', 'case', 'faster', 'best / ours'], lines, words=3)}"


def _kind(case: Case) -> tuple[str, str, str]:
    return case.cell, case.mode, case.dtype


def _known(ratios: Iterable[float | None]) -> list[float]:
    return [ratio for ratio in ratios if ratio is not None]


def _means(ratios: list[float]) -> tuple[str, str]:
    if not ratios:
        return NONE, NONE
    return f"{geometric_mean(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"


def _has_rivals(group: list[Row]) -> bool:
    return any(row.ms and not row.ours and row.provider != "torch.nn" for row in group)


def _triton_over_torch(group: list[Row]) -> float | None:
    ours, theirs = (of_provider(group, name) for name in (TRITON, "torch.nn"))
    return theirs.ms / ours.ms if ours and theirs and ours.ms and theirs.ms else None
