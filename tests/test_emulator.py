"""The emulator finds mistakes: kernels with one each, in a copy of the sources, must all fail.

Each mutant, mostly of a float32 scan or of all cells' single steps, is compiled and run in a
process of its own, with one seed after the other until it is caught.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from fused_rnn import native

ROOT = Path(__file__).parents[1]
FORWARD, BACKWARD, EXCHANGE = "scan_forward.cuh", "scan_backward.cuh", "exchange.h"
MESSAGES, GATHER, STEPS, STEP_SCAN = "cluster_messages.h", "gather.h", "steps.cuh", "step_scan.cpp"
STACK, GRAPH, GRID_LAUNCH = "stack_scan.cpp", "graph.h", "grid_launch.h"
# The sources of one object each: of every kernel's single steps, or of no kernel.
WHOLE = {
    STEPS: "cuda/steps.cu",
    STEP_SCAN: "cuda/step_scan.cpp",
    GRAPH: "cuda/step_scan.cpp",
    STACK: "cuda/stack_scan.cpp",
    GRID_LAUNCH: "cuda/library.cpp",
}
SEEDS = 40

pytestmark = pytest.mark.slow


class Mutation(NamedTuple):
    name: str
    file: str  # in csrc/cuda
    changes: list[tuple[str, str]]
    cell: str = "lstm"  # of the mutant, where it is one cell's
    element: str = "float32"
    grid: bool = False  # whether scans run across the grid
    graph: bool = False  # whether scans step by step record graphs

    @property
    def passes(self) -> list[str]:
        """Those whose kernels the file is part of."""
        if self.file == EXCHANGE:
            return ["Forward", "Backward"]
        return ["Forward" if self.file in (FORWARD, MESSAGES) else "Backward"]


MUTATIONS = [
    Mutation("none", FORWARD, []),
    Mutation(
        "one buffer for h",
        FORWARD,
        [
            ("h_memory + (kGrid ? 0 : (s & 1) * (kLayout.h_bytes / 4))", "h_memory"),
            ("((s + 1) & 1) * (kLayout.h_bytes / 4) + group0_at", "group0_at"),
        ],
    ),
    Mutation(
        "gx is waited for one step late",
        FORWARD,
        [("copy_wait<Tile::ring - 1>();", "copy_wait<Tile::ring>();")],
    ),
    Mutation(
        "gx is fetched into a slot in use",
        FORWARD,
        [
            ("prefetch(s + Tile::ring - 1);", "prefetch(s + Tile::ring);"),
            ("s < Tile::ring - 1; s++) prefetch", "s < Tile::ring; s++) prefetch"),
            ("copy_wait<Tile::ring - 1>();", "copy_wait<Tile::ring>();"),
        ],
    ),
    Mutation(
        "no barrier before partial sums are added",
        FORWARD,
        [("named_sync(1 + column, kWarp * Tile::split_k);", "")],
    ),
    Mutation(
        "h is sent in the last step",
        FORWARD,
        [("if (!last) {\n      const int group0_at", "if (true) {\n      const int group0_at")],
    ),
    Mutation("h is not waited for", FORWARD, [("if (s > 0) {", "if (false) {")]),
    Mutation(
        "half of h is waited for",
        FORWARD,
        [("& 1), kLayout.h_bytes)", "& 1), kLayout.h_bytes / 2)")],
    ),
    Mutation(
        "h is waited for without acquire",
        FORWARD,
        [("barrier_wait<Order::acquire>", "barrier_wait<Order::relaxed>")],
    ),
    Mutation(
        "h goes to every other CTA twice and to the rest never",
        MESSAGES,
        [("nth = first + lane / kLanes", "nth = first")],
    ),
    Mutation(
        "pieces of h change places",
        MESSAGES,
        [("(4 * piece + w) / kWords", "(4 * (piece ^ 1) + w) / kWords")],
    ),
    Mutation(
        "no fence after the barriers' initialisation",
        FORWARD,
        [("    barrier_init_fence();\n", "")],
    ),
    Mutation(
        "no cluster barrier before the first message",
        FORWARD,
        [("block_sync();\n  if (kCluster) cluster_sync();", "block_sync();")],
    ),
    Mutation(
        "rows of h_n are not written",
        FORWARD,
        [(">= p.rows.batch) continue;\n          Stored*", ">= 1) continue;\n          Stored*")],
    ),
    Mutation(
        "gates are not saved in the last step",
        FORWARD,
        [("p.gates) {\n          Stored*", "p.gates && !last) {\n          Stored*")],
    ),
    Mutation(
        "a row that has ended goes on",
        FORWARD,
        [("const bool taken = real && t < alive.length[n][e];", "const bool taken = real;")],
    ),
    Mutation(
        "one buffer for received sums",
        BACKWARD,
        [
            ("kSlotsAt + buffer * kLayout.slot_bytes", "kSlotsAt"),
            ("kSlotsAt + ((s + 1) & 1) * kLayout.slot_bytes", "kSlotsAt"),
        ],
    ),
    Mutation(
        "one buffer for the gates' gradients",
        BACKWARD,
        [("kGradsAt + buffer * kLayout.grads_bytes", "kGradsAt")],
    ),
    Mutation(
        "no barrier after the pointwise part",
        BACKWARD,
        [("block_sync();  // the gradients of all", "// the gradients of all")],
    ),
    Mutation("sums are not waited for", BACKWARD, [("if (s + 1 < rows.steps) wait(s);", "")]),
    Mutation("the last sums are not waited for", BACKWARD, [("if (rows.steps > 0) wait(-1);", "")]),
    Mutation(
        "sums are waited for without acquire",
        BACKWARD,
        [("barrier_wait<Order::acquire>", "barrier_wait<Order::relaxed>")],
    ),
    Mutation(
        "no fence after the barriers' initialisation",
        BACKWARD,
        [("    barrier_init_fence();\n", "")],
    ),
    Mutation(
        "saved gates are waited for one step late",
        BACKWARD,
        [("copy_wait<Tile::ring - 1>();", "copy_wait<Tile::ring>();")],
    ),
    Mutation(
        "sums go to the slot of the wrong CTA",
        BACKWARD,
        [("(rank * kLayout.items + item)", "(owner * kLayout.items + item)")],
    ),
    Mutation(
        "a row that has ended keeps its gradients",
        BACKWARD,
        [("grads[e][q] = taken ? grads[e][q] : 0.0f", "grads[e][q] = grads[e][q]")],
        cell="gru",  # of LSTM's absent gates, which are zeros, the gradients are zeros anyway
    ),
    Mutation(
        "gradients of steps that nobody takes are not written",
        BACKWARD,
        [
            (
                "int64_t t = rows.steps; t < p.rows.timesteps",
                "int64_t t = p.rows.timesteps; t < p.rows.timesteps",
            )
        ],
    ),
    Mutation("none", STEPS, []),
    Mutation(
        "a row that has ended goes on",
        STEPS,
        [("const bool taken = t < length;", "const bool taken = true;")],
    ),
    Mutation(
        "outputs of steps that are not taken are not written",
        STEPS,
        [("if (rows.stored(length, at.row, t)) {", "if (t < length) {")],
    ),
    Mutation(
        "the gradient of a fresh state goes on to what was before it",
        STEPS,
        [("held[0] = held[1] = grad_c[0] = grad_c[1] = 0.0f;", "")],
    ),
    Mutation(
        "gradients face the gates in the order they come",
        STEPS,
        [("operand_at + gate_of_grad<Cell>(q)", "operand_at + q")],
    ),
    Mutation(
        "both directions have one operand",
        STEPS,
        [("operand_at = (at.direction * p.rows.batch + at.row)", "operand_at = at.row")],
    ),
    Mutation(
        "the first step starts from the last state",
        STEPS,
        [("load_pair<Element>(first ? p.h0 : p.h_n", "load_pair<Element>(p.h_n")],
    ),
    Mutation(
        "the second product of a step comes before its operand",
        STEP_SCAN,
        [
            (
                "kernels.inner(step, scan.shape, stream);\n                inner();",
                "inner();\n                kernels.inner(step, scan.shape, stream);",
            )
        ],
    ),
    Mutation(
        "the gradient of h0 lacks the last product",
        STEP_SCAN,
        [
            (
                "outer();\n            });\n  step.number",
                "if (number.value > 0) outer();\n            });\n  step.number",
            )
        ],
    ),
]

# Of graphs of two steps.
MUTATIONS += [
    Mutation(name, file, changes, graph=True)
    for name, file, changes in [
        ("none in graphs", STEP_SCAN, []),
        (
            "every launch of a graph is of the same steps",
            STEP_SCAN,
            [
                (
                    "StepNumber{0, words + i % 2, words + (i + 1) % 2}",
                    "StepNumber{order.first + order.by * (done + i), nullptr, nullptr}",
                )
            ],
        ),
        (
            "a step writes the word that it reads",
            STEP_SCAN,
            [("words + (i + 1) % 2}", "words + i % 2}")],
        ),
        (
            "a graph of an odd number of steps",
            STEP_SCAN,
            [("2 * std::max(1L, half);", "1 + 2 * std::max(1L, half);")],
        ),
        (
            "torch's products are not recorded",
            GRAPH,
            [("TorchsStream guard(&recording_);", "TorchsStream guard(nullptr);")],
        ),
    ]
]

# Of messages across the grid: of the two words of an access, in float32, the first has the tag; in
# 16 bits each has.
MUTATIONS += [
    Mutation(name, file, changes, grid=True, **options)
    for name, file, changes, options in [
        ("none across the grid", EXCHANGE, [], {}),
        ("none across the grid in 16 bits", EXCHANGE, [], {"element": "bfloat16"}),
        ("one buffer for messages", EXCHANGE, [("(message & 1) *", "0 *")], {}),
        (
            "the tag is a parity",
            EXCHANGE,
            [("((number_of(message) + 1) >> 1 & 1)", "(number_of(message) & 1)")],
            {},
        ),
        (
            "the first tag is what memory has anyway",
            EXCHANGE,
            [("(number_of(message) + 1)", "(number_of(message) - 1)")],
            {},
        ),
        ("memory is not cleared", GRID_LAUNCH, [("new_zeros(", "new_empty(")], {}),
        (
            "one tag of two is looked at",
            EXCHANGE,
            [(" | (piece.z ^ tag(message));", ";")],
            {},
        ),
        (
            "two tags of four are looked at",
            EXCHANGE,
            [("if (kWords == 1) wrong |=", "if (false) wrong |=")],
            {"element": "bfloat16"},
        ),
        (
            "numbers are read before their tags",
            EXCHANGE,
            [
                (
                    "return kWords == 1 ? load_words(from) : load_pairs(from);",
                    "Fragment f = load_pairs(from); const Fragment later = load_pairs(from); "
                    "f.x = (f.x & ~kTagBit) | (later.x & kTagBit); "
                    "f.z = (f.z & ~kTagBit) | (later.z & kTagBit); return f;",
                )
            ],
            {},
        ),
        (
            "displaced bits are taken as they come",
            EXCHANGE,
            [("displaced.y == number_of(message) ? 0 : kTagBit", "0")],
            {"cell": "gru"},
        ),
        (
            "displaced bits are lost",
            EXCHANGE,
            [("ballot((words[0] & kTagBit) != 0)", "0u")],
            {"cell": "gru"},
        ),
        (
            "displaced bits are lost in 16 bits",
            EXCHANGE,
            [("ballot((words[0] & kTagBit) != 0)", "0u")],
            {"cell": "gru", "element": "bfloat16"},
        ),
        (
            "displaced bits go to the wrong lane",
            EXCHANGE,
            [("kWords == 1 ? 2 : 1);", "0);")],
            {"cell": "gru"},
        ),
        (
            "h is overwritten while it is read",
            FORWARD,
            [("block_sync();  // every warp has read the h before it", "")],
            {},
        ),
        (
            "h is multiplied before it is there",
            FORWARD,
            [("s, first);\n        block_sync();", "s, first);")],
            {},
        ),
        (
            "gradients are multiplied before they are there",
            GATHER,
            [("first * kStepBlocks);\n    warp_sync();", "first * kStepBlocks);")],
            {},
        ),
        (
            "parts are added before they are there",
            GATHER,
            [("  block_sync();\n}", "}")],
            {},
        ),
        (
            "the first state's gradient is not waited for",
            BACKWARD,
            [("kLastTurn = kGrid ? -1 : 0;", "kLastTurn = 0;")],
            {},
        ),
        (
            "gradients of the gates are not sent in the last step",
            BACKWARD,
            [("if (kGrid && q < kGates)", "if (kGrid && q < kGates && s > 0)")],
            {},
        ),
    ]
]

# Of layers side by side: what waits for what, and what a chunk starts from.
MUTATIONS += [
    Mutation(name, STACK, changes)
    for name, changes in [
        ("none", []),
        (
            "a product does not wait for the scan that it reads",
            [("streams.wait(0, scanned(layer - 1, number));", "{}")],
        ),
        (
            "a product waits for the chunk before",
            [
                ("scanned(layer - 1, number));", "scanned(layer - 1, number - 1));"),
                (
                    "for (int layer = 0; layer < layers; layer++) {\n      const",
                    "for (int layer = layers - 1; layer >= 0; layer--) {\n      const",
                ),
            ],
        ),
        (
            "a scan does not wait for its product",
            [("streams.wait(1 + layer, projected(layer));", "")],
        ),
        ("a chunk starts from the first c", [("p.c0 = whole.c_n;", "")]),
        (
            "a chunk starts from the first h",
            [("if (chunk.first > 0) {\n    p.h0", "if (false) {\n    p.h0")],
        ),
        ("gradients of h are not handed on", [("p.grad_h_n = whole.grad_h0;", "")]),
        ("gradients of c are not handed on", [("p.grad_c_n = whole.grad_c0;", "")]),
        (
            "backward takes the first c for the one before its chunk",
            [("if (sizes.has_c) p.c0 = p.cells - chunk.batch * p.pitch;", "")],
        ),
        ("all layers have one mask of dropout", [("scan.kept[layer - 1]", "scan.kept[0]")]),
        (
            "gradients do not go through dropout",
            [("if (!scan.kept.empty()) drop(grad", "if (false) drop(grad")],
        ),
    ]
]

# Runs small layers with one seed after the other; prints what caught the mutant, or nothing.
RUN = """
import sys
from dataclasses import replace
import torch
from fused_rnn import native
native._CUDA_EMULATED_LIBRARY = type(native._CUDA_EMULATED_LIBRARY)(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from helpers.cuda import run_emulated
from fused_rnn import testing
from fused_rnn.testing import LayerCase

torch.set_num_threads(1)
assert native.cuda_emulated_library_error() is None
cases = [
    LayerCase("lstm", 7, 9, 3, 32),
    LayerCase("lstm", 5, 3, 3, 50, directions=2),
    LayerCase.packed("lstm", [6, 4, 1], 3, 32),
    LayerCase("lstm", 6, 3, 3, 32, ends=(4, 0, 5), directions=2, resets=True, reset_states=True),
]
dtype = getattr(torch, sys.argv[4])
cases = [replace(case, cell=cell, dtype=dtype) for cell in sys.argv[5:] for case in cases]
references = [
    (
        testing.results_of_draws(testing.run_oracle, case, "all", torch.float64),
        testing.results_of_draws(testing.run_torch, case),
    )
    for case in cases
]
with testing.poisoned_memory():
    for seed in range(int(sys.argv[3])):
        for case, expected in zip(cases, references):
            try:
                testing.assert_accurate(run_emulated(case, seed), *expected, case)
            except (AssertionError, RuntimeError) as error:
                print(f"caught by seed {seed}: {str(error).splitlines()[0]}")
                sys.exit()
"""

# The same of stacks, which must have the numbers of layer after layer.
RUN_STACK = """
import sys
import torch
from fused_rnn import native
native._CUDA_EMULATED_LIBRARY = type(native._CUDA_EMULATED_LIBRARY)(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from helpers.cuda import StackCase, run_emulated_stack
from fused_rnn import testing

torch.set_num_threads(1)
assert native.cuda_emulated_library_error() is None
cases = [StackCase(cell, 5, 3, 16, 3, 2, dropout=0.5) for cell in sys.argv[5:]]
references = [run_emulated_stack(case, chunk=0) for case in cases]
with testing.poisoned_memory():
    for seed in range(int(sys.argv[3])):
        for case, expected in zip(cases, references):
            try:
                for name, tensor in run_emulated_stack(case, seed).items():
                    testing.assert_near(name, tensor, expected[name], 1e-5, 1e-5)
            except (AssertionError, RuntimeError) as error:
                print(f"caught by seed {seed}: {str(error).splitlines()[0]}")
                sys.exit()
"""


@pytest.fixture(scope="session")
def objects(tmp_path_factory):
    """The objects of the emulated library, unchanged, by name."""
    if reason := native.cuda_emulated_library_error():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("objects")
    commands = {}
    parts = ("emulator", "emulated_arithmetic", "emulated_primitives", "weak_memory")
    sources = (f"cuda/{name}.cpp" for name in ("library", *parts))
    for source in (*sources, "plan.cpp", *WHOLE.values()):
        commands[Path(source).stem] = compile_command(ROOT, source)
    for cell in ("lstm", "gru", "rnn"):
        for element in ("bfloat16", "float16", "float32", "tf32"):
            for params in ("Forward", "Backward"):
                name = f"{cell}_{element}_{params}"
                commands[name] = scan_command(ROOT, cell, element, params)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: run([*commands[n], "-o", str(folder / f"{n}.o")]), commands))
    return {name: folder / f"{name}.o" for name in commands}


def compile_command(root: Path, source: str) -> list[str]:
    from torch.utils import cpp_extension

    flags = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    return [
        *(os.environ.get("CXX", "c++"), "-std=c++20", "-fPIC", "-O1", "-ffp-contract=fast"),
        *("-fvisibility=hidden", "-DFUSED_RNN_EMULATED", "-Wno-unknown-pragmas"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", *flags),
        *("-c", "-x", "c++", str(root / "csrc" / source)),
    ]


def scan_command(root: Path, cell: str, element: str, params: str) -> list[str]:
    defines = [f"-DFUSED_RNN_ELEMENT={element}", f"-DFUSED_RNN_PARAMS={params}Params"]
    command = compile_command(root, f"cuda/scan_{cell}.cu")
    return [command[0], *defines, *command[1:]]


def run(command: list[str], **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{Path(m.file).stem}: {m.name}")
def test_mutants_are_caught(mutation, objects, tmp_path):
    from torch.utils import cpp_extension

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / mutation.file
    text = path.read_text()
    for old, new in mutation.changes:
        assert old in text, f"the kernel no longer has {old!r}"
        text = text.replace(old, new)
    path.write_text(text)
    if mutation.file in WHOLE:
        cells, regime = ("lstm", "gru", "gru_reset_before"), "steps"
        if mutation.file == STACK:
            cells, regime = ("lstm", "gru"), "cluster"
        elif mutation.grid:
            cells, regime = (mutation.cell,), "grid"
        source = WHOLE[mutation.file]
        commands = {Path(source).stem: compile_command(tmp_path, source)}
    else:
        cells, regime = (mutation.cell,), "grid" if mutation.grid else "cluster"
        commands = {
            f"{mutation.cell}_{mutation.element}_{params}": scan_command(
                tmp_path, mutation.cell, mutation.element, params
            )
            for params in mutation.passes
        }
    mutants, library = {name: tmp_path / f"{name}.o" for name in commands}, tmp_path / "mutant.so"
    for name, command in commands.items():
        run([*command, "-o", str(mutants[name])])
    # First: of functions that several objects have, the linker takes the first one's.
    others = [o for name, o in objects.items() if name not in mutants]
    parts = [str(o) for o in (*mutants.values(), *others)]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    compiler = os.environ.get("CXX", "c++")
    run([compiler, "-shared", *parts, *paths, "-ltorch_cpu", "-o", str(library)])

    seeds = SEEDS if mutation.changes else 4
    arguments = [str(library), str(Path(__file__).parent), str(seeds)]
    arguments += [mutation.element, *cells]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FUSED_RNN_CUDA_REGIME": regime}
    env["FUSED_RNN_CUDA_GRAPH"] = "1" if mutation.graph else "0"
    script = RUN_STACK if mutation.file == STACK else RUN
    found = run([sys.executable, "-c", script, *arguments], env=env, timeout=900)
    assert bool(found) == bool(mutation.changes), found or "not caught"
