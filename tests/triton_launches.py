"""Counts what would be compiled, and looks at what would be launched, without a GPU.

Run by `test_triton.py` in a process of its own; prints "ok".
"""

from dataclasses import replace

import torch
import triton_ahead

from fused_rnn.backends.triton import plan as planner
from fused_rnn.problem import Problem

H200 = planner.Device("sm90", 132, 232448, True)
PROBLEM = Problem(
    cell_name="lstm", timesteps=8, batch_size=16, input_size=1, hidden_size=300,
    training=True, dtype=torch.bfloat16, device_type="cuda",
)  # fmt: skip


def compilations(problems, which):
    with triton_ahead.recording("cuda:90") as found:
        for problem in problems:
            triton_ahead.run(problem, planner.make_plan(problem, H200, "ieee"), "ieee", which)
    return found


def check_one_compilation(which):
    """1, 16 and 2**k are the sizes that Triton would otherwise treat as special."""
    sizes = [(1, 1), (1, 16), (16, 1), (7, 9), (64, 16), (33, 3), (2048, 2)]
    problems = [replace(PROBLEM, timesteps=t, batch_size=b) for t, b in sizes]
    found = compilations(problems, which)
    assert len(found) == 1, f"{which}: {len(found)} compilations for {len(sizes)} sizes"
    assert len(found[0].launches) == len(sizes)
    other = replace(PROBLEM, hidden_size=301)
    assert len(compilations([PROBLEM, other], which)) == 2, "the count can tell two kernels apart"


def check_grids(which):
    """Programs that wait for each other are launched to run at once or not at all, and no more of
    them than fit; nothing else asks for that."""
    waves = replace(PROBLEM, batch_size=1000, directions=2)
    plan = planner.make_plan(waves, H200, "ieee", "grid")
    with triton_ahead.recording("cuda:90") as found:
        triton_ahead.run(waves, plan, "ieee", which)
    (only,) = found
    assert only.options["launch_cooperative_grid"]
    assert len(only.launches) > 1
    tiles = 0
    for grid, _ in only.launches:
        assert grid[0] * grid[1] * grid[2] <= H200.multiprocessors
        assert grid[2] == 2
        tiles += grid[0]
    one = plan.forward if which == "forward" else plan.backward
    assert tiles == one.batch_tiles
    for regime, hidden in (("program", 64), ("steps", 300)):
        problem = replace(PROBLEM, hidden_size=hidden)
        with triton_ahead.recording("cuda:90") as found:
            triton_ahead.run(
                problem, planner.make_plan(problem, H200, "ieee", regime), "ieee", which
            )
        assert not found[0].options["launch_cooperative_grid"]
        steps = problem.timesteps + (which == "backward")
        assert len(found[0].launches) == (1 if regime == "program" else steps)


def check_precision(which):
    """TF32 reaches a kernel where it was asked for, and never one of a half type."""
    asked = [("ieee", torch.float32), ("tf32", torch.float32), ("tf32", torch.bfloat16)]
    given = []
    for precision, dtype in asked:
        problem = replace(PROBLEM, dtype=dtype)
        with triton_ahead.recording("cuda:90") as found:
            plan = planner.make_plan(problem, H200, precision)
            triton_ahead.run(problem, plan, precision, which)
        kernel = found[0].source.fn
        given.append(found[0].launches[0][1][kernel.arg_names.index("PRECISION")])
    assert given == ["ieee", "tf32", "ieee"], given


def check_one_compilation_of_normed_steps():
    sizes = [(1, 1), (1, 16), (7, 9), (64, 16), (33, 3)]
    for cell, expected in (("lstm", 2), ("gru", 2)):
        with triton_ahead.recording("cuda:90") as found:
            for timesteps, batch in sizes:
                problem = replace(
                    PROBLEM, cell_name=cell, timesteps=timesteps, batch_size=batch,
                    dtype=torch.float32, extras=("layer_norm",),
                )  # fmt: skip
                triton_ahead.run_normed(problem, False)
        assert len(found) == expected, f"{cell}: {len(found)} compilations"
        assert all(len(one.launches) == sum(t for t, _ in sizes) for one in found)


check_one_compilation_of_normed_steps()
for which in planner.PASSES:
    check_one_compilation(which)
    check_precision(which)
    check_grids(which)
print("ok")
