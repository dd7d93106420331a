"""The waiting inside of regime grid, on the CPU: one process per program, tensors in shared memory.

The interpreter's atomic operations act across processes, so that programs really wait for each
other. What this shows is the protocol: who waits for how many arrivals of whom. It cannot show
how a GPU orders memory, which rests on the machine code and on tests marked `gpu`.
"""

import multiprocessing
import random
import time

import pytest
import torch
from triton_interpreter import interpreter_or_skip

from fused_rnn import testing
from fused_rnn.testing import LayerCase

interpreter_or_skip()

from triton.runtime.interpreter import interpreter_builder  # noqa: E402

from fused_rnn.backends.triton import launch, scan  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned")

# With two batch tiles and two directions each counter has neighbours that must not count.
CASES = {
    "lstm": LayerCase("lstm", 3, 17, 2, 20),
    "gru": LayerCase("gru", 4, 2, 2, 33, directions=2, dtype=torch.bfloat16),
    "gru_reset_before": LayerCase(
        "gru_reset_before", 3, 17, 2, 33, ends=tuple(i % 4 for i in range(17)), resets=True
    ),
    "rnn_tanh": LayerCase.packed("rnn_tanh", [4, 3, 1], 2, 40),
}


class _OneProcessPerProgram:
    """Stands in for a kernel. `behave(program)` is called in each process before it starts."""

    def __init__(self, kernel, behave):
        self.kernel, self.behave = kernel, behave

    def __getitem__(self, grid):
        return lambda **arguments: self._launch(grid, arguments)

    def _launch(self, grid, arguments):
        shared = {}  # by address, so that what was one tensor stays one

        def share(value):
            if not isinstance(value, torch.Tensor):
                return value
            return shared.setdefault(value.data_ptr(), (value, value.clone().share_memory_()))[1]

        inside = {name: share(value) for name, value in arguments.items()}
        assert not torch.any(inside["counters"]), "a wait would end too early"
        context = multiprocessing.get_context("fork")
        programs = [
            (x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])
        ]
        processes = [
            context.Process(target=self._run, args=(grid, program, inside)) for program in programs
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + 300
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0.1))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * len(programs), f"exit codes {codes}; None: it waited for ever"
        for original, copy in shared.values():
            original.copy_(copy)

    def _run(self, grid, program, arguments):
        torch.set_num_threads(1)
        interpreter_builder.set_grid_dim = lambda *_: setattr(interpreter_builder, "grid_dim", grid)
        interpreter_builder.set_grid_idx = lambda *_: setattr(
            interpreter_builder, "grid_idx", program
        )
        self.behave(program)
        self.kernel[(1, 1, 1)](**arguments)


def _delay(seconds_of_arrival, seconds_of_poll=0.0005):
    """Makes arrivals late; whoever polls leaves the processor to others, and goes on late."""
    original = interpreter_builder.create_atomic_rmw

    def atomic(op, pointer, value, *rest):
        arriving = bool((value.data != 0).any())
        time.sleep(seconds_of_arrival() if arriving else seconds_of_poll)
        return original(op, pointer, value, *rest)

    interpreter_builder.create_atomic_rmw = atomic


def _random_delays(program):
    generator = random.Random(hash(program))
    _delay(lambda: generator.random() * 0.02)


def _first_tile_is_late(program):
    if program[1] == 0:
        _delay(lambda: 0.1, 0.1)
    else:
        _delay(lambda: 0.0)


def _grads(case):
    return testing.results_and_grads(
        testing.run_layer, testing.make_inputs(case).leaves(), testing.make_cotangents(case)
    )


@pytest.fixture
def by_regime_grid(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "triton")
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", "grid")


def _wait(monkeypatch, behave):
    """From here on regime grid waits as on a GPU."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "launch_options", lambda *_: {})
    for name in ("scan_forward", "scan_backward"):
        monkeypatch.setattr(scan, name, _OneProcessPerProgram(getattr(scan, name), behave))
    monkeypatch.setattr(launch, "soft_type", {torch.bfloat16: "bf16", torch.float32: ""}.get)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equal_to_one_step_per_launch_bit_for_bit(case, by_regime_grid, monkeypatch):
    expected = _grads(case)
    _wait(monkeypatch, _random_delays)
    actual = _grads(case)
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name


TILES = 3  # of the hidden units of either case


@pytest.mark.parametrize(
    ("cell", "pardon"),
    [
        ("rnn_tanh", lambda target: 1),
        ("rnn_tanh", lambda target: 1000),
        ("gru_reset_before", lambda target: 1 - target // TILES % 2),
        ("gru_reset_before", lambda target: target // TILES % 2),
    ],
    ids=["of_one", "of_all", "of_one_with_h", "of_one_with_the_second_operand"],
)
def test_a_wait_too_short_is_seen(cell, pardon, by_regime_grid, monkeypatch):
    """The mutations that show the test above can fail: nobody waits for the slowest, or at all, or
    in one of the two exchanges of a step."""
    case = CASES[cell]
    expected = _grads(case)
    wait_for = scan.wait_for

    def behave(program):
        _first_tile_is_late(program)
        scan.wait_for = lambda counter, target: wait_for(counter, target - pardon(target))

    _wait(monkeypatch, behave)
    actual = _grads(case)
    assert any(not torch.equal(value, expected[name]) for name, value in actual.items())
