"""Plots of a run, made from its JSON alone: PNG files for docs/images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from harness.captions import CAPTIONS
from harness.cases import GATES, Case
from harness.results import Row, Run

# One colour per provider, the same in every plot; those for colour-blind readers first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f7f7f")
STYLES = {"float32": "o-", "bfloat16": "s--", "float16": "^:", "float64": "D-."}  # of lines
DPI = 110


def plot_all(run: Run, folder: Path, prefix: str) -> list[Path]:
    """Writes every plot that the run has rows for, and takes away the others."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = _colours(run)
    makers = {
        "ratios": ratios,
        "step": step_time,
        "scaling": scaling,
        "threads": threads,
        "roofline": roofline,
    }
    written = []
    for name in CAPTIONS:
        path = folder / f"{prefix}-{name}.png"
        figure = makers[name](run, colours)
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        # Without a date or version inside, the same JSON gives the same file.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
        plt.close(figure)
        written.append(path)
    return written


def _colours(run: Run) -> dict[str, str]:
    names = dict.fromkeys(row.provider for row in run.rows)
    first = [n for n in ("fused_rnn", "torch.nn", "openvino", "onnxruntime") if n in names]
    ordered = first + [name for name in names if name not in first]
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(ordered)}


def _sets(run: Run, *names: str) -> list[Row]:
    return [row for row in run.rows if row.set in names and row.ms]


def _label(case: Case) -> str:
    return f"{case.shape}\n{case.mode[:5]}. {case.traits}".strip()


def ratios(run: Run, colours: dict[str, str]) -> plt.Figure | None:
    """Bars for every case of the standing set, a panel for each cell."""
    rows = _sets(run, "gpu-headline", "gpu-standing") if run.on_gpu else _sets(run, "standing")
    cells = [cell for cell in GATES if any(row.case.cell == cell for row in rows)]
    if not cells:
        return None
    figure, panels = plt.subplots(
        len(cells), 1, figsize=(11, 3 * len(cells)), squeeze=False, layout="constrained"
    )
    for cell, axes in zip(cells, panels[:, 0], strict=True):
        _ratio_bars(axes, [row for row in rows if row.case.cell == cell], colours)
        axes.set_title(cell.upper(), loc="left")
    return figure


def _ratio_bars(axes: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    found = {(row.case, row.provider): row.ms for row in rows}
    others = list(dict.fromkeys(r.provider for r in rows if r.provider != "fused_rnn"))
    width = 0.8 / max(1, len(others))
    for place, name in enumerate(others):
        pairs = [
            (i + (place - (len(others) - 1) / 2) * width, found[c, name] / found[c, "fused_rnn"])
            for i, c in enumerate(cases)
            if (c, name) in found and (c, "fused_rnn") in found
        ]
        if pairs:
            places, values = zip(*pairs, strict=True)
            heights = [value - 1 for value in values]  # up where fused_rnn is faster
            axes.bar(places, heights, width, bottom=1, label=name, color=colours[name])
    axes.axhline(1, color="black", linewidth=0.8)
    _logarithmic(
        axes.yaxis, (0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 2, 3, 5, 10, 20, 50, 100, 200, 500)
    )
    axes.set_ylabel("their time / ours")
    axes.set_xticks(range(len(cases)), [_label(case) for case in cases], fontsize=7)
    axes.legend(fontsize=8, ncols=4)


def step_time(run: Run, colours: dict[str, str]) -> plt.Figure | None:
    """Of single steps and, per timestep, of whole sequences of few rows."""
    rows = [r for r in run.rows if r.ms and r.case.mode in ("step", "inference") and r.case.B <= 16]
    rows = [row for row in rows if row.case.layers == 1 and row.case.heads == 1]

    def per_step(row: Row) -> float:
        return row.ms * 1e3 / row.case.T

    keep = [r for r in rows if r.case.mode == "step"] or rows
    return _panels(
        keep, colours, lambda row: row.case.H, per_step, "hidden size", "us per timestep"
    )


def scaling(run: Run, colours: dict[str, str]) -> plt.Figure | None:
    """One panel for each size that varies while the others stand still."""
    panels: list[tuple[str, list[Row]]] = []
    for varying in ("T", "B", "H"):
        rows = _longest_line(run, varying)
        if rows:
            panels.append((varying, rows))
    if not panels:
        return None
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False, layout="constrained"
    )
    for (varying, rows), panel in zip(panels, axes[0], strict=True):
        _lines(
            panel, rows, colours, lambda r, v=varying: getattr(r.case, v), lambda r: r.gflops, max
        )
        case = rows[0].case
        fixed = " ".join(f"{n}={getattr(case, n)}" for n in ("T", "B", "H") if n != varying)
        panel.set_title(f"{case.cell} {case.mode}, {fixed}", fontsize=8)
        panel.set_xlabel({"T": "timesteps", "B": "batch rows", "H": "hidden size"}[varying])
        panel.set_ylabel("GFLOP/s")
    axes[0][0].legend(fontsize=7)
    return figure


def _longest_line(run: Run, varying: str) -> list[Row]:
    """Rows of the cases that differ in one size only, of the most such cases there are."""
    lines: dict[tuple, list[Row]] = {}
    for row in run.rows:
        case = row.case
        if not row.ms or case.layers > 1 or case.resets or case.mode in ("packed", "step"):
            continue
        sizes = tuple(getattr(case, n) for n in ("T", "B", "H") if n != varying)
        # The input size follows H where both are the same, as in most sets.
        tied = case.I == case.H if varying == "H" else case.I
        key = (row.set, case.cell, case.mode, case.dtype, case.threads, case.heads, tied, sizes)
        lines.setdefault(key, []).append(row)

    def length(rows: list[Row]) -> int:
        return len({getattr(row.case, varying) for row in rows})

    longest = max(lines.values(), key=length, default=[])
    return longest if length(longest) > 2 else []


def threads(run: Run, colours: dict[str, str]) -> plt.Figure | None:
    groups = [g for g in run.groups() if g[0].set == "threads" and all(row.gflops for row in g)]
    groups = [group for group in groups if len(group) == 2]
    if not groups:
        return None
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    labels = [f"{g[0].case.cell} {g[0].case.shape}\n{g[0].case.mode}" for g in groups]
    axes.bar(labels, [g[1].gflops / g[0].gflops for g in groups], color=colours["fused_rnn"])
    axes.axhline(2, color="black", linewidth=0.8)
    axes.set_ylabel("two threads / one")
    axes.tick_params(axis="x", labelsize=6, rotation=60)
    return figure


def roofline(run: Run, colours: dict[str, str]) -> plt.Figure | None:
    rows = [row for row in run.rows if row.gflops and row.bytes and not row.case.threads]
    rows = [row for row in rows if run.of_peak(row)]
    copies = run.ceiling.get("copy_gbs")
    if not rows or not copies:
        return None
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in dict.fromkeys(row.provider for row in rows):
        own = [row for row in rows if row.provider == name]
        points = [row.flops / row.bytes for row in own], [row.gflops for row in own]
        axes.scatter(*points, s=12, alpha=0.7, label=name, color=colours[name])
    intensities = [row.flops / row.bytes for row in rows]
    ends = [min(intensities), max(intensities)]
    for label, peak in run.ceiling["peak_gflops"].items():
        if not run.on_gpu and label != str(run.meta["threads"]):
            continue
        for size, rate in copies.items():
            knee = peak / rate
            xs = sorted({*ends, min(max(knee, ends[0]), ends[1])})
            line = axes.plot(xs, [min(peak, rate * x) for x in xs], linewidth=0.8, color="black")
            line[0].set_linestyle("-" if size == max(copies, key=int) else ":")
        axes.annotate(label if run.on_gpu else "peak", (ends[1], peak), fontsize=7, ha="right")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must move (dotted: copies within the caches)")
    axes.set_ylabel("GFLOP/s")
    axes.legend(fontsize=7)
    return figure


def _panels(
    rows: list[Row],
    colours: dict[str, str],
    x: Callable[[Row], float],
    y: Callable[[Row], float],
    x_name: str,
    y_name: str,
) -> plt.Figure | None:
    """A panel for each cell with a line for each provider."""
    cells = [cell for cell in GATES if any(row.case.cell == cell for row in rows)]
    if not cells:
        return None
    figure, axes = plt.subplots(
        1, len(cells), figsize=(4.2 * len(cells), 3.6), squeeze=False, layout="constrained"
    )
    for cell, panel in zip(cells, axes[0], strict=True):
        _lines(panel, [row for row in rows if row.case.cell == cell], colours, x, y)
        panel.set_title(cell.upper(), loc="left")
        panel.set_xlabel(x_name)
        panel.set_ylabel(y_name)
    found = [panel.get_legend_handles_labels() for panel in axes[0]]
    handles = {label: line for pair in found for line, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles, fontsize=7, ncols=6, loc="outside lower center")
    return figure


def _lines(
    axes: Axes,
    rows: Sequence[Row],
    colours: dict[str, str],
    x: Callable[[Row], float],
    y: Callable[[Row], float],
    best: Callable[[Iterable[float]], float] = min,
) -> None:
    """A line for each provider and dtype; of several values at one place (other batches, other
    modes) the best, which of rates is max."""
    several = len({row.case.dtype for row in rows}) > 1
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        points.setdefault((row.provider, row.case.dtype), []).append((x(row), y(row)))
    for (name, dtype), pairs in points.items():
        line = {place: best(v for p, v in pairs if p == place) for place, _ in sorted(pairs)}
        axes.plot(
            list(line),
            list(line.values()),
            STYLES[dtype],
            label=f"{name} {dtype}" if several else name,
            color=colours[name],
        )
    axes.set_yscale("log")
    _logarithmic(axes.xaxis, sorted({x(row) for row in rows}))
    axes.grid(alpha=0.3)


def _logarithmic(axis: Axis, ticks: Sequence[float]) -> None:
    """Plain numbers at these places, those outside the data left out."""
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log", base=2)
    low, high = axis.get_data_interval()
    shown = [tick for tick in ticks if low / 1.2 <= tick <= high * 1.2]
    axis.set_major_locator(FixedLocator(shown))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
