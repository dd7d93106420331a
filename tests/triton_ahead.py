"""Compiles the Triton kernels ahead of time, without a GPU, just as a launch would.

A stand-in for Triton's driver takes the launches of `fused_rnn/backends/triton/launch.py` and
notes what would be compiled. As a program, for a process of its own, since a compiler that fails
may take the process with it:

    python tests/triton_ahead.py cuda:90 0 5     # the rows 0 and 5 of the table, a report per line
    python tests/triton_ahead.py cuda:90         # every row that sm_90 uses
    python tests/triton_ahead.py --noise cuda:90 0 5    # with recurrent dropout, zoneout, peepholes
    python tests/triton_ahead.py --normed cuda:90 lstm 256    # a layer that normalises
    python tests/triton_ahead.py --write         # every row and target: tests/triton_bounds.json
    python tests/triton_ahead.py --write cuda:80 # of one target
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))

from fused_rnn.backends.bundles import LayerOutput, Needs, OutputGrads
from fused_rnn.backends.triton import launch, normed
from fused_rnn.backends.triton.plan import PassPlan, Plan, Row, _shipped_rows
from fused_rnn.cells import DirectionWeights
from fused_rnn.problem import NO_NOISE, LayerInputs, Noise, Problem, Rows

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
BOUNDS = Path(__file__).with_name("triton_bounds.json")


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_device(self):
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGETS[self.target]


class Compilation:
    """One compilation that a launch asked for, and every launch of it."""

    # What Triton's launcher reads of a compiled kernel.
    function = packed_metadata = None

    def __init__(self, source, target, options):
        self.source, self.target, self.options = source, target, options
        self.launches = []  # (grid, bound arguments)

    def launch_metadata(self, grid, stream, *arguments):
        return None

    def run(self, x, y, z, *rest):
        self.launches.append(((x, y, z), rest[6:]))

    def compile(self):
        return triton.compile(self.source, target=self.target, options=self.options)


@contextmanager
def recording(target):
    """Launches inside the `with` block compile and run nothing; yields the list of
    `Compilation`s they ask for."""
    compilations = []

    def note(source, target, options):
        compilations.append(Compilation(source, target, options))
        return compilations[-1]

    def create_binder(kernel):
        made = before(kernel)
        kernel.compile = note
        return made

    before, JITFunction.create_binder = JITFunction.create_binder, create_binder
    kernels = (
        launch.scan.scan_forward, launch.scan.scan_backward,
        normed.normed_forward, normed.normed_backward,
    )  # fmt: skip
    for kernel in kernels:
        kernel.device_caches.default_factory = kernel.create_binder
        kernel.device_caches.clear()
    driver.set_active(Driver(target))
    try:
        yield compilations
    finally:
        JITFunction.create_binder = before
        for kernel in kernels:
            kernel.device_caches.default_factory = kernel.create_binder
            kernel.device_caches.clear()
        driver._active = None


def noise_of(problem):
    """Recurrent dropout and zoneout, by tensors of the right shapes and any content. Peepholes come
    with them."""
    d, b, h = problem.directions, problem.batch_size, problem.hidden_size
    kept = torch.empty(d, problem.timesteps * b, h, dtype=torch.bool)
    return Noise(torch.empty(d, b, h), kept, kept if problem.cell.has_c else None)


def run(problem, plan, precision, which, noise=NO_NOISE):
    """The launches of one pass, with tensors of the right shapes and any content."""
    d, n = problem.directions, problem.timesteps * problem.batch_size
    b, h, cell = problem.batch_size, problem.hidden_size, problem.cell

    def tensor(*shape):
        return torch.empty(shape, dtype=problem.dtype)

    peephole = tensor(3 * h) if noise.names and cell.has_c else None
    weights = [
        DirectionWeights(
            None, tensor(cell.gates * h, h), *(tensor(cell.gates * h),) * 2, None, peephole
        )
        for _ in range(d)
    ]
    h0, c0 = tensor(d, b, h), tensor(d, b, h)
    rows = Rows(problem.timesteps, b, None, n, noise=noise)
    inputs = LayerInputs(None, weights, h0, c0, rows)
    if which == "forward":
        gx = tensor(d, n, cell.gates * h)
        launch.forward(problem, plan, precision, gx, inputs, True)
        return
    saved = LayerOutput(
        tensor(n, d * h), h0, c0, tensor(d, n, cell.saved_gates * h), torch.empty(d, n, h)
    )
    grads = OutputGrads(tensor(n, d * h), None, None)
    launch.backward(problem, plan, precision, grads, inputs, saved)


def run_normed(problem: Problem, noisy: bool) -> None:
    """Both passes of a layer that normalises."""
    d, h, cell = problem.directions, problem.hidden_size, problem.cell
    n = problem.timesteps * problem.batch_size
    x, states = torch.zeros(n, problem.input_size), torch.zeros(d, problem.batch_size, h)
    gates = cell.gates * h
    gains = 2 * gates + 2 * h * cell.has_c
    weights = [
        DirectionWeights(
            torch.zeros(gates, problem.input_size), torch.zeros(gates, h), torch.zeros(gates),
            torch.zeros(gates), None, torch.zeros(3 * h) if noisy and cell.has_c else None,
            torch.zeros(gains),
        )
        for _ in range(d)
    ]  # fmt: skip
    noise = noise_of(problem) if noisy else NO_NOISE
    rows = Rows(problem.timesteps, problem.batch_size, None, n, noise=noise)
    inputs = LayerInputs(x, weights, states, states, rows)
    out = normed.forward(problem, inputs, True)
    grads = OutputGrads(torch.zeros_like(out.y), None, None)
    needs = Needs(True, True, True, False, False, [True] * sum(w is not None for w in weights[0]))
    normed.backward(problem, grads, inputs, out, needs)


def normed_compilations(target: str, cell: str, hidden: int, noisy: bool) -> list[Compilation]:
    problem = _problem(cell, 1, hidden, torch.float32)
    with recording(target) as compilations:
        run_normed(replace(problem, extras=("layer_norm",)), noisy)
    return compilations


def problem_of(row: Row) -> Problem:
    """The problem a row is for, two timesteps of it."""
    dtype = torch.bfloat16 if row.kind == "half" else torch.float32
    cell = "rnn_tanh" if row.cell == "rnn" else row.cell
    batch = max(row.batch, row.config.block_b)
    return _problem(cell, batch, row.hidden, dtype)


def _problem(cell: str, batch: int, hidden: int, dtype: torch.dtype) -> Problem:
    return Problem(
        cell_name=cell, timesteps=2, batch_size=batch, input_size=1, hidden_size=hidden,
        training=True, dtype=dtype, device_type="cuda",
    )  # fmt: skip


def compilations_of(row: Row, target: str, noisy: bool = False) -> list[Compilation]:
    """Two where a step is two launches."""
    tiles = -(-row.hidden // row.config.block_h)
    one = PassPlan(row.config, tiles, 1, 1, 0.0, ())
    problem, precision = problem_of(row), "tf32" if row.kind == "tf32" else "ieee"
    noise = noise_of(problem) if noisy else NO_NOISE
    with recording(target) as compilations:
        run(problem, Plan(one, one), precision, row.which, noise)
    return compilations


def compiled(row: Row, target: str, noisy: bool = False) -> list:
    return [compilation.compile() for compilation in compilations_of(row, target, noisy)]


def report(kernels) -> dict:
    """Registers, spills, shared memory and barriers of compiled kernels, the most of each."""
    facts = [_facts(kernel) for kernel in kernels]
    return {name: max(fact[name] for fact in facts) for name in facts[0]}


def _facts(kernel) -> dict:
    facts = {"shared": kernel.metadata.shared}
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]

        def fact(name):
            return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

        return facts | {"registers": fact("vgpr_count"), "spills": fact("vgpr_spill_count")}
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def output(*command):
            command = [str(tools / command[0]), *command[1:], file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", output("cuobjdump", "-res-usage"))
        code = output("nvdisasm", "-c")
    facts |= {"registers": int(usage[1]), "spills": len(re.findall(r"\b(?:STL|LDL)\b", code))}
    return facts | {
        "barriers": code.count("BAR.SYNC"),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    }


def rows_for(target: str) -> list[tuple[int, Row]]:
    """The rows of the table that a target uses, with their numbers: those of its family, and those
    of its vendor which have none of the family in their place."""
    vendor, architecture = target.split(":")
    family = architecture if vendor == "hip" else "sm" + architecture

    def key(row):
        return (*row[1 : Row._fields.index("config")], row.config.regime)

    rows = list(enumerate(_shipped_rows()))
    own = {key(row) for _, row in rows if row.family == family}
    return [
        (n, row)
        for n, row in rows
        if row.family == family or (row.family == vendor and key(row) not in own)
    ]


def write_bounds(targets):
    for target in targets:
        facts = {name_of(row): report(compiled(row, target)) for _, row in rows_for(target)}
        bounds = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
        if bounds.get("triton") != triton.__version__:
            bounds = {"triton": triton.__version__}
        bounds[target] = facts
        BOUNDS.write_text(json.dumps(bounds, indent=1) + "\n")


def main(arguments):
    if arguments[0] == "--write":
        write_bounds(arguments[1:] or TARGETS)
        return
    print(json.dumps(triton.__version__), flush=True)
    if arguments[0] == "--normed":
        target, cell, *sizes = arguments[1:]
        for hidden, noisy in itertools.product(map(int, sizes), (False, True)):
            for made in normed_compilations(target, cell, hidden, noisy):
                kernel = made.compile()
                facts = {"kernel": made.source.fn.__name__, "hidden": hidden, "noisy": noisy}
                facts["floating_point_atomics"] = kernel.asm["ttir"].count("atomic_rmw fadd")
                print(json.dumps(facts | report([kernel])), flush=True)
        return
    noisy = arguments[0] == "--noise"
    target, *numbers = arguments[noisy:]
    rows = _shipped_rows()
    for number in map(int, numbers) if numbers else (n for n, _ in rows_for(target)):
        kernels = compiled(rows[number], target, noisy)
        facts = {"number": number, "row": name_of(rows[number]), **report(kernels)}
        # They would add in any order.
        atomics = (kernel.asm["ttir"].count("atomic_rmw fadd") for kernel in kernels)
        facts["floating_point_atomics"] = sum(atomics)
        print(json.dumps(facts), flush=True)


def name_of(row: Row) -> str:
    c = row.config
    tiles = f"{c.block_b}x{c.block_h}x{c.block_k}"
    kept = "resident" if c.resident else "streamed"
    return (
        f"{row.cell} {row.kind} {row.which} H{row.hidden} B{row.batch} {c.regime} {tiles} "
        f"{c.warps} warps {kept}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
