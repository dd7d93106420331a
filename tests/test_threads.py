"""The cpu backend with any number of threads: of torch's, of Python's, in forks, all at once.

What may hang runs in a process of its own, which is made to print its stacks and die when stuck.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.pairs import pairs, params
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import fused_rnn
from fused_rnn import direct, native, testing
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase, LayerInputs

pytestmark = pytest.mark.usefixtures("cpu_backend")

STUCK_AFTER_S = 120
# What the scans alone decide. Other gradients are products over all rows, which torch's matrix
# library may sum in another order when it has other threads.
OF_THE_SCAN = ("y", "h_n", "c_n", "grad h0", "grad c0")

Results = dict[str, Tensor]


def _cases(cell: str) -> list[LayerCase]:
    """Small and large batches, padded and packed, large enough for several threads."""
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    cases = [
        case(19, 1, 45, 130),
        case(19, 3, 16, 100, directions=2),
        case(9, 33, 16, 100, directions=2),
        packed([19, 17, 8, 1], 17, 130, directions=2),
        packed([9] * 9 + [5] * 20 + [1] * 4, 45, 100),
        case(2000, 1, 1, 4),
        # Of a W_hh beyond L2 threads split the units, though each would have enough rows.
        case(3, 70, 9, 700),
        packed([3] * 10 + [2] * 20 + [1] * 10, 9, 700, directions=2),
        # And of few rows, all of them one direction's units after the other's.
        case(3, 2, 9, 700, directions=2),
        packed([5] * 2 + [2] * 3, 9, 700, directions=2),
    ]
    if CELLS[cell].has_c:
        cases += [
            case(19, 1, 45, 130, proj_size=1),
            case(19, 3, 16, 130, proj_size=100, directions=2),
            packed([9] * 9 + [5] * 20 + [1] * 4, 45, 100, proj_size=33),
        ]
    return cases


CASES = [pytest.param(case, id=f"{cell}-{case}") for cell in CELLS for case in _cases(cell)]
every_case = pytest.mark.parametrize("case", CASES)


def _results(case: LayerCase, run: Callable = testing.run_layer, seed: int = 0) -> Results:
    inputs = testing.make_inputs(case, seed).leaves()
    return testing.results_and_grads(run, inputs, testing.make_cotangents(case))


def _assert_same_bits(actual: Results, expected: Results, names=None) -> None:
    for name in names or expected:
        if name in expected:
            assert torch.equal(actual[name], expected[name]), name


@every_case
def test_any_number_of_threads(case, num_threads):
    """The same bits from the scans for any number, and from everything for the same number."""
    num_threads(1)
    alone = _results(case)
    for count in (2, 3, 5):
        num_threads(count)
        results = _results(case)
        _assert_same_bits(results, alone, OF_THE_SCAN)
        _assert_same_bits(_results(case), results)
        testing.assert_same_numbers(results, alone, roundings=64)


@pytest.mark.parametrize("proj_size", [0, 77])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_inference_in_chunks(cell, proj_size, num_threads):
    """Threads share out the rows and go through the chunks of the input side on their own."""
    if proj_size and not CELLS[cell].has_c:
        pytest.skip("only an LSTM has a projection")
    inputs = testing.make_inputs(
        LayerCase.packed(cell, range(60, 0, -1), 9, 300, proj_size=proj_size)
    )
    num_threads(1)
    alone = testing.run_layer(inputs)
    for count in (2, 5):
        num_threads(count)
        for actual, expected in zip(testing.run_layer(inputs), alone, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_more_threads_than_rows_or_units(cell, num_threads):
    case = LayerCase(cell, 4000, 1, 1, 3, directions=2)
    num_threads(1)
    alone = _results(case)
    num_threads(16)
    _assert_same_bits(_results(case), alone, OF_THE_SCAN)


@pytest.mark.parametrize(
    ("case", "before", "after"),
    pairs(
        CASES,
        params({"1-3": (1, 3), "3-1": (3, 1), "2-5": (2, 5)}),
        one_in=3,
    ),
)
def test_another_number_in_backward(case, before, after, num_threads):
    num_threads(1)
    alone = _results(case)

    def run(inputs: LayerInputs) -> testing.Outputs:
        num_threads(before)
        outputs = testing.run_layer(inputs)
        num_threads(after)
        return outputs

    results = _results(case, run)
    _assert_same_bits(results, alone, OF_THE_SCAN)
    testing.assert_same_numbers(results, alone, roundings=64)


@pytest.mark.parametrize("cell", CELLS)
def test_layers_within_the_backward_of_another(cell, num_threads):
    num_threads(3)
    case = LayerCase(cell, 19, 3, 16, 100)
    expected = _results(case)
    found = []

    def hook(_) -> None:
        with torch.enable_grad():
            found.append(_results(case))

    def run(inputs: LayerInputs) -> testing.Outputs:
        y, *states = testing.run_layer(inputs)
        y.register_hook(hook)
        return (y, *states)

    _assert_same_bits(_results(case, run), expected)
    _assert_same_bits(found[0], expected)


def _forked_calls(x: Tensor, h0: Tensor, weights: list[Tensor], calls: int) -> list[Tensor]:
    futures = [
        torch.jit.fork(
            torch.ops.fused_rnn.layer_forward,
            x,
            h0,
            None,
            weights,
            None,
            None,
            None,
            None,
            None,
            "gru",
            False,
            False,
            False,
            "cpu",
        )
        for _ in range(calls)
    ]
    return [torch.jit.wait(future)[0] for future in futures]


def _in_interop_threads() -> None:
    """TorchScript's fork runs calls in threads of torch's own."""
    torch.set_num_threads(3)
    inputs = testing.make_inputs(LayerCase("gru", 19, 2, 45, 130))
    expected, *_ = testing.run_layer(inputs)
    forked_calls = torch.jit.script(_forked_calls)
    for y in forked_calls(inputs.x, inputs.h0, inputs.weights, 8):
        assert torch.equal(y, expected)
    # Results are there before torch's threads have let go of the interpreter; where it ends before
    # that, Python ends the thread inside C++, and C++ the process.
    time.sleep(1)


def _in_a_parallel_region() -> None:
    """Where torch reports several threads and parallel_for gives one."""
    parallel = ctypes.CDLL(None).GOMP_parallel
    torch.set_num_threads(3)
    cases = [case for cell in CELLS for case in _cases(cell)]
    expected = [_results(case) for case in cases]
    finished = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_):
        # An exception is printed and goes no further: `finished` shows that there was one.
        for case, results in zip(cases, expected, strict=True):
            actual = _results(case)
            _assert_same_bits(actual, results, OF_THE_SCAN)
            testing.assert_same_numbers(actual, results, roundings=64)
        finished.append(threading.get_ident())

    parallel(body, None, ctypes.c_uint(3), ctypes.c_uint(0))
    assert len(set(finished)) == 3


def _in_many_python_threads() -> None:
    """Each has a team of its own: 32 threads, and a thousand steps for each caller."""
    torch.set_num_threads(4)
    cases = [
        LayerCase("gru", 50, 1, 64, 128),
        LayerCase("lstm", 50, 4, 16, 64),
        LayerCase("rnn_tanh", 50, 2, 3, 100, directions=2),
        LayerCase.packed("gru", [50, 30, 2], 16, 96),
    ]
    expected = [_results(case) for case in cases]
    callers, rounds = 8, 7
    start = threading.Barrier(callers)
    finished = []

    def work(number: int) -> None:
        assert torch.get_num_threads() == 4
        start.wait()
        for i in range(rounds * len(cases)):
            turn = (i + number) % len(cases)
            _assert_same_bits(_results(cases[turn]), expected[turn])
        finished.append(number)

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(work, range(callers)))
    assert sorted(finished) == list(range(callers))


def _calls_of_every_way(modules: list[torch.nn.Module], seed: int) -> Iterator[Tensor]:
    """Outputs and gradients of layers and cells in training, in inference and as steppers."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        is_layer = isinstance(module, torch.nn.RNNBase)
        x = torch.randn(*([7] if is_layer else []), 2, 5, generator=generator, requires_grad=True)
        outputs = tree_leaves(module(x))
        wanted = [x, *module.parameters()]
        yield from outputs
        yield from torch.autograd.grad(sum(out.square().sum() for out in outputs), wanted)
        with torch.no_grad():
            yield from tree_leaves(module(x))
        if is_layer:
            step, state = fused_rnn.stepper(module), None
            for x_now in x.detach():
                y, state = step(x_now, state)
                yield from tree_leaves((y, state))


def _first_calls_at_once() -> None:
    """What is loaded, connected and registered at the first call is, by eight threads."""
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-6)
    layers = [kind(5, 24, num_layers=2) for kind in (fused_rnn.GRU, fused_rnn.LSTM, fused_rnn.RNN)]
    modules = [*layers, fused_rnn.GRUCell(5, 24), fused_rnn.LSTMCell(5, 24)]
    callers, rounds = 8, 6
    start = threading.Barrier(callers)

    def results(number: int) -> list[Tensor]:
        # Each begins with another module.
        first = number % len(modules)
        return list(_calls_of_every_way(modules[first:] + modules[:first], number))

    def work(number: int) -> list[list[Tensor]]:
        start.wait()
        return [results(number) for _ in range(rounds)]

    with ThreadPoolExecutor(callers) as pool:
        found = list(pool.map(work, range(callers)))
    assert len(found) == callers
    for number, of_rounds in enumerate(found):
        alone = results(number)
        for together in of_rounds:
            assert all(map(torch.equal, together, alone)) and len(together) == len(alone)


def _without_the_gil() -> None:
    direct.calls()  # imports the extension module where it was built
    native.build_facts()
    assert not sys._is_gil_enabled()


def _with_fewer_threads_than_asked_for() -> None:
    """OpenMP may give less than torch says; the environment of this process makes it."""
    cases = [case for cell in CELLS for case in _cases(cell)]
    torch.set_num_threads(1)
    alone = [_results(case) for case in cases]
    torch.set_num_threads(5)
    for case, expected in zip(cases, alone, strict=True):
        results = _results(case)
        _assert_same_bits(results, expected, OF_THE_SCAN)
        testing.assert_same_numbers(results, expected, roundings=64)


class _Layers:
    """A map-style dataset: item i is the output of a layer on draw i."""

    case = LayerCase("lstm", 19, 3, 45, 130)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return _results(self.case, seed=index)["y"]


def _in_data_loader_workers() -> None:
    """Forked while this process has a team of threads; torch gives each of them one thread."""
    torch.set_num_threads(3)
    expected = [_Layers()[i] for i in range(len(_Layers()))]
    loader = DataLoader(
        _Layers(), batch_size=None, num_workers=2, multiprocessing_context="fork",
        timeout=STUCK_AFTER_S,
    )  # fmt: skip
    for y, expected_y in zip(loader, expected, strict=True):
        assert torch.equal(y, expected_y)


def _in_a_fork() -> None:
    """A forked child has none of its parent's threads; like torch, it is fine with one."""
    torch.set_num_threads(3)
    cases = [case for cell in CELLS for case in _cases(cell)]
    expected = [_results(case) for case in cases]

    def child() -> None:
        torch.set_num_threads(1)
        for case, results in zip(cases, expected, strict=True):
            _assert_same_bits(_results(case), results, OF_THE_SCAN)

    _run_in_process("fork", child, STUCK_AFTER_S // 2)
    for case, results in zip(cases, expected, strict=True):  # the parent goes on as before
        _assert_same_bits(_results(case), results)


def _run_in_process(
    start_method: str, function: Callable[[], None], limit_s: int = STUCK_AFTER_S
) -> None:
    process = multiprocessing.get_context(start_method).Process(target=_set_up, args=(function,))
    process.start()
    process.join(limit_s)
    stuck = process.is_alive()
    if stuck:
        os.kill(process.pid, signal.SIGABRT)
        process.join()
    stuck = f"stuck after {limit_s} s, " if stuck else ""
    assert process.exitcode == 0, f"{stuck}exit code {process.exitcode}; stderr has the stacks"


def _set_up(function: Callable[[], None]) -> None:
    faulthandler.enable()  # prints the stacks of all threads on SIGABRT
    function()  # which may be about the library's first call
    assert native.cpu_library_error() is None


def test_many_python_threads():
    _run_in_process("spawn", _in_many_python_threads)


def test_first_calls_from_eight_python_threads():
    _run_in_process("spawn", _first_calls_at_once)


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED") or os.environ.get("PYTHON_GIL") == "1",
    reason="this Python runs with the GIL",
)
def test_the_gil_stays_off():
    _run_in_process("spawn", _without_the_gil)


def test_interop_threads():
    _run_in_process("spawn", _in_interop_threads)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "GOMP_parallel"), reason="torch runs without GNU OpenMP"
)
def test_inside_a_parallel_region():
    _run_in_process("spawn", _in_a_parallel_region)


# A thread of whose memory there is none: 1 the main one, 2 all others.
_WITHOUT_MEMORY = """
#include <malloc.h>
#include <unistd.h>
#include <sys/syscall.h>
int without_memory = 0;
void *aligned_alloc(size_t alignment, size_t size) {
  int thread = getpid() == syscall(SYS_gettid) ? 1 : 2;
  return thread == without_memory ? 0 : memalign(alignment, size);
}
"""


def _in_threads_without_memory() -> None:
    torch.set_num_threads(2)
    layer, x = fused_rnn.LSTM(128, 512), torch.randn(60, 24, 128)  # two threads meet in every step
    layer(x)[0].sum().backward()
    without_memory = ctypes.c_int.in_dll(ctypes.CDLL(None), "without_memory")
    for thread in (1, 2):
        y = layer(x)[0].sum()
        # Each instruction set has memory of its own to take, or none.
        without_memory.value = thread
        for function in (y.backward, lambda: layer(x)):
            with contextlib.suppress(MemoryError):
                function()
        without_memory.value = 0
        layer(x)[0].sum().backward()


_WITHOUT_ANY_MEMORY = """
#include <stddef.h>
void *__libc_malloc(size_t size);
int without_memory = 0;
void *malloc(size_t size) { return without_memory ? 0 : __libc_malloc(size); }
"""


def _free_saved_gates_without_memory() -> None:
    assert native.cpu_library_error() is None
    weights = [p.detach() for p in fused_rnn.GRU(4, 128).parameters()]
    x = torch.randn(17000, 1, 4)  # 33 MiB of gates
    with torch.no_grad():
        outputs = torch.ops.fused_rnn_cpu.train_layer(2, x, weights, None, None, None, 1)
    assert outputs[-1].nbytes > 32 << 20
    without_memory = ctypes.c_int.in_dll(ctypes.CDLL(None), "without_memory")
    without_memory.value = 1
    outputs.pop()
    without_memory.value = 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="replaces functions of glibc")
@pytest.mark.parametrize(
    ("replacement", "function"),
    [
        pytest.param(_WITHOUT_MEMORY, _in_threads_without_memory, id="nobody waits"),
        pytest.param(_WITHOUT_ANY_MEMORY, _free_saved_gates_without_memory, id="tensors go"),
    ],
)
def test_without_memory(replacement, function, tmp_path, monkeypatch):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = tmp_path / "memory.c", tmp_path / "memory.so"
    source.write_text(replacement)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    before = os.environ.get("LD_PRELOAD", "").split()
    monkeypatch.setenv("LD_PRELOAD", " ".join([*before, str(library)]))
    _run_in_process("spawn", function)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_THREAD_LIMIT", "2"),
        # On a machine of two cores these are two threads, too.
        pytest.param("OMP_DYNAMIC", "true", marks=pytest.mark.slow),
        ("OMP_MAX_ACTIVE_LEVELS", "0"),
    ],
)
def test_fewer_threads_than_asked_for(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    _run_in_process("spawn", _with_fewer_threads_than_asked_for)


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)
@pytest.mark.parametrize("function", [_in_a_fork, _in_data_loader_workers])
def test_fork(function):
    _run_in_process("spawn", function)
