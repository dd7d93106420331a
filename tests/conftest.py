"""Fixtures and settings that every test file may use."""

import gc
import os
from contextlib import ExitStack

import pytest
import torch
from helpers.inputs import HALVES
from helpers.needs import INSTRUCTION_SETS
from helpers.ways import Ways
from hypothesis import settings

from fused_rnn import direct, handover, native, testing, training

# Shared machines make any deadline a coin toss. The same examples every time in CI, new ones at
# a developer's desk; a failing example is remembered only there, so that runs leave no state.
settings.register_profile("default", deadline=None, max_examples=100, print_blob=True)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True, database=None)
# What results are compared with on a GPU is to be as exact as its dtype.
torch.backends.cudnn.allow_tf32 = False
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser):
    parser.addoption(
        "--library",
        choices=["fused_rnn", "torch.nn"],
        default="fused_rnn",
        help="whose modules tests/toolbox is run on",
    )


def pytest_collection_finish(session):
    """Some tests collect garbage to see what is left. Thousands of collected tests, torch and all
    else that stays would take each of them a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_handed_over(monkeypatch):
    """Small float64 modules compute by themselves: torch's own results would tell nothing of
    ours."""
    for name in ("layers", "step"):
        monkeypatch.setattr(handover, name, lambda *args: [])


@pytest.fixture
def poisoned():
    """Memory that nobody wrote reads as NaN."""
    with testing.poisoned_memory():
        yield


@pytest.fixture
def num_threads():
    """Sets the number of threads torch computes with; put back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cpu_backend(monkeypatch):
    """Every layer on the cpu backend or an error, in threads and processes of the test's too."""
    if reason := native.cpu_library_error():
        pytest.skip(reason)
    monkeypatch.setenv("FUSED_RNN_BACKEND", "cpu")


@pytest.fixture
def set_capability(cpu_backend):
    """Forces an instruction set by its name, known or not; put back after the test."""
    with ExitStack() as stack:
        yield lambda name: stack.enter_context(testing.cpu_capability(name))


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, set_capability):
    """The cpu backend with each instruction set in turn, those the machine lacks skipped."""
    set_capability(request.param)
    try:
        native.cpu_capability()
    except RuntimeError as error:
        assert request.param in str(error)
        pytest.skip(str(error).splitlines()[0])
    return request.param


@pytest.fixture
def shortest():
    """The module whose calls `ways` counts; a file about another one says so."""
    return training


@pytest.fixture
def ways(monkeypatch, shortest):
    """Counts which way calls of modules took."""
    return Ways(monkeypatch, shortest)


@pytest.fixture
def operators_only(monkeypatch):
    """Calls a function as if there were no extension module."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(direct, "calls", lambda: direct._NoCalls)
            return function(*args)

    return call


@pytest.fixture
def asked(monkeypatch):
    """The answers of the extension module's functions, as they are given."""
    answers = []

    class Watched:
        def __getattr__(self, name):
            function = getattr(direct_calls, name)

            def call(*args):
                answers.append(function(*args))
                return answers[-1]

            return call

    direct_calls, watched = direct.calls(), Watched()
    monkeypatch.setattr(direct, "calls", lambda: watched)
    return answers


@pytest.fixture(scope="module")
def one_thread():
    """For small sizes, where a team of threads only waits, for minutes where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=HALVES, ids=str)
def half(request):
    """Each half type."""
    return request.param


@pytest.fixture
def cuda_emulated(poisoned):
    """The library of the CUDA kernels on the CPU."""
    if reason := native.cuda_emulated_library_error():
        pytest.skip(reason)
    return torch.ops.fused_rnn_cuda_emulated
