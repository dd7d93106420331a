"""The Triton backend as the rest of the package sees it; its kernels in processes of their own."""

import copy
import ctypes
import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fused_rnn
from fused_rnn import dispatch, testing
from fused_rnn.backends import triton as backend
from fused_rnn.backends.triton import plan as planner
from fused_rnn.cells import CELLS
from fused_rnn.problem import Problem

HERE = Path(__file__).parent
# Bytes that one program may have.
SHARED_MEMORY = {"cuda:80": 166912, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
in_common_process = pytest.mark.skipif(
    backend.interpreting(), reason="the interpreter is switched on for this process"
)


def _problem(**changes):
    problem = Problem(
        cell_name="lstm", timesteps=8, batch_size=16, input_size=32, hidden_size=64,
        training=True, dtype=torch.bfloat16, device_type="cuda",
    )  # fmt: skip
    return replace(problem, **changes)


def _python(*arguments, timeout=1200, **environment):
    """Runs in a process of its own, without this one's pytest and Triton settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_", "TRITON_"))}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), env.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=env | environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _interpreted(selection, marks, files):
    done = _python(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:faker", "-W", "ignore",
        "-m", marks, "-k", selection, *(HERE / file for file in files),
        timeout=7200, TRITON_INTERPRET="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


# Each part imports torch and triton anew: so few that two workers are busy.
LSTM_AND_MORE = "(lstm or not gru) and not test_triton_exchange"
FILES = ("test_triton_interpreter.py", "test_triton_exchange.py")


@needs_triton
@pytest.mark.parametrize("selection", [LSTM_AND_MORE, f"not ({LSTM_AND_MORE})"])
@pytest.mark.parametrize("marks", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_the_interpreter(marks, selection):
    _interpreted(selection, marks, FILES)


@functools.cache
def _bounds():
    return json.loads((HERE / "triton_bounds.json").read_text())


def _check_compiled(target, *numbers, noise=False):
    """Compiles rows of the table, without numbers all that the target uses. None adds
    floating-point numbers atomically, each is within the machine and what the planner reckons
    with; with the Triton that made tests/triton_bounds.json, none spills, and each is within its
    bounds too, which are those without `noise`: recurrent dropout, zoneout and peepholes."""
    options = ["--noise"] if noise else []
    done = _python(HERE / "triton_ahead.py", *options, target, *numbers, timeout=7200)
    assert done.returncode == 0, done.stderr[-4000:]
    version, *reports = [json.loads(line) for line in done.stdout.splitlines()]
    rows, bounds, vendor = planner._shipped_rows(), _bounds(), target.split(":")[0]
    assert len(reports) == len(numbers or bounds[target])
    for report in reports:
        row = rows[report["number"]]
        problem = _problem(
            cell_name="rnn_tanh" if row.cell == "rnn" else row.cell,
            hidden_size=row.hidden,
            dtype=torch.bfloat16 if row.kind == "half" else torch.float32,
        )
        assert report["floating_point_atomics"] == 0, report
        reckoned = planner.on_chip_bytes(row.config, problem, row.which, vendor)
        assert report["shared"] <= reckoned, (report, reckoned)
        assert report["shared"] <= SHARED_MEMORY[target], report
        bound = bounds[target][report["row"]]
        if version == bounds["triton"]:
            assert report["spills"] == 0, report
            for fact in () if noise else ("registers", "shared"):
                assert report[fact] <= bound[fact], (fact, report, bound)


@needs_triton
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_the_planner_reckons_with_what_every_row_took(target):
    """When it was last compiled."""
    import triton_ahead

    vendor = target.split(":")[0]
    for _, row in triton_ahead.rows_for(target):
        problem = triton_ahead.problem_of(row)
        taken = _bounds()[target][triton_ahead.name_of(row)]["shared"]
        reckoned = planner.on_chip_bytes(row.config, problem, row.which, vendor)
        assert taken <= reckoned <= SHARED_MEMORY[target], row


@needs_triton
@pytest.mark.parametrize(("target", "numbers"), [("cuda:90", (0, 1)), ("hip:gfx942", (-1,))])
def test_some_rows_of_the_table_compile(target, numbers):
    """A forward and a backward kernel; every row in a slow test."""
    _check_compiled(target, *(range(len(planner._shipped_rows()))[n] for n in numbers))


@needs_triton
@pytest.mark.parametrize(("target", "numbers"), [("cuda:90", (0, 1, 5, 16)), ("hip:gfx942", (-1,))])
def test_some_rows_of_the_table_compile_with_more_in_the_recurrence(target, numbers):
    rows = range(len(planner._shipped_rows()))
    _check_compiled(target, *(rows[n] for n in numbers), noise=True)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_row_of_the_table_compiles(target):
    _check_compiled(target)


@needs_triton
@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ("cuda:90", (300,)),
        pytest.param("cuda:90", (64, 2048), marks=pytest.mark.slow),
        pytest.param("hip:gfx942", (300,), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("cell", ["gru", "gru_reset_before", "lstm"])
def test_steps_that_normalise_compile(target, sizes, cell):
    """Without and with all that may be in the recurrence."""
    done = _python(HERE / "triton_ahead.py", "--normed", target, cell, *sizes)
    assert done.returncode == 0, done.stderr[-4000:]
    version, *reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == len(sizes) * 2 * (4 if cell == "gru_reset_before" else 2)
    for report in reports:
        assert report["floating_point_atomics"] == 0, report
        if version == _bounds()["triton"]:
            assert report["spills"] == 0, report


def test_no_bound_allows_a_spill():
    for target in SHARED_MEMORY:
        assert not [row for row, bound in _bounds()[target].items() if bound["spills"]]


@needs_triton
def test_no_new_size_of_a_batch_compiles_anew():
    """Of a length or a number of rows there are many; of kernels there shall be one."""
    done = _python(HERE / "triton_launches.py")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == ["ok"]


@in_common_process
def test_cpu_tensors_need_the_interpreter():
    layer, x = fused_rnn.GRU(3, 4), torch.randn(2, 1, 3)
    with (
        fused_rnn.backend("triton"),
        pytest.raises(fused_rnn.UnsupportedProblemError, match="needs tensors on a GPU, got cpu"),
    ):
        layer(x)


@needs_triton
def test_cpu_tensors_never_get_here_by_themselves(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delenv("FUSED_RNN_BACKEND", raising=False)
    monkeypatch.setattr(dispatch.BACKENDS["cpu"], "unsupported", lambda problem: "is away")
    problem = _problem(device_type="cpu")
    assert dispatch.BACKENDS["triton"].unsupported(problem) is None
    assert dispatch.select(problem).name == "reference"
    assert "only when asked for by name" in dict(dispatch.reasons(problem))["triton"]
    assert dispatch.select(problem, "triton").name == "triton"


def test_before_the_reference_on_a_gpu():
    names = list(dispatch.BACKENDS)
    assert names.index("triton") < names.index("reference")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The answers of a machine with an H200."""
    device = planner.Device("sm90", 132, 232448, True)
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(backend, "_device_refusal", lambda problem: None)
    monkeypatch.setattr(backend, "device_facts", lambda index: device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return dispatch.BACKENDS["triton"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "needs dtype float32, bfloat16 or float16, got torch.float64"),
        ({"proj_size": 3}, "has no projected LSTM, got proj_size=3"),
        ({"hidden_size": 0}, "needs at least one hidden unit"),
        ({"device_type": "mps"}, "needs tensors on a GPU, got mps"),
        ({"cell_name": "rnn_tanh", "averaged": True}, "has no backward of zoneout's expectation"),
        ({"extras": ("layer_norm",), "hidden_size": 4097}, "normalises up to 4096 hidden units"),
    ],
)
def test_reasons(as_on_a_gpu, changes, reason):
    assert reason in as_on_a_gpu.unsupported(_problem(**changes))
    assert as_on_a_gpu.unsupported(_problem()) is None


def test_no_triton(as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(backend, "_installed", lambda: False)
    assert as_on_a_gpu.unsupported(_problem()) == "triton is not installed"


def test_an_old_gpu(as_on_a_gpu, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (index + 6, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    expected = "needs compute capability 8.0 or newer, got 7.5"
    assert dispatch.BACKENDS["triton"].unsupported(_problem(device_index=1)) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_where_triton_cannot_launch(as_on_a_gpu, monkeypatch):
    """As without the C compiler that it makes its launcher with; here without a GPU."""
    pytest.importorskip("triton")
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    reason = dispatch.BACKENDS["triton"].unsupported(_problem(device_index=0))
    assert reason.startswith("triton cannot launch kernels: ")


@pytest.mark.parametrize(
    ("answers", "alone"),
    [
        ({"cuDeviceGet": 0, "cuDeviceGetAttribute": 0, "value": 1}, False),
        ({"cuDeviceGet": 0, "cuDeviceGetAttribute": 0, "value": 0}, True),
        ({"cuDeviceGet": 0, "cuDeviceGetAttribute": 1, "value": 1}, True),  # an older driver
        ({"cuDeviceGet": 101, "cuDeviceGetAttribute": 0, "value": 1}, True),
        (None, True),  # no driver
    ],
)
def test_nobody_waits_for_programs_beside_other_processes(answers, alone, monkeypatch):
    class Driver:
        def __init__(self, name):
            if answers is None:
                raise OSError(name)

        def cuDeviceGet(self, device, index):
            device._obj.value = index
            return answers["cuDeviceGet"]

        def cuDeviceGetAttribute(self, answer, attribute, device):
            assert (attribute, device.value) == (133, 3)
            answer._obj.value = answers["value"]
            return answers["cuDeviceGetAttribute"]

    facts = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(ctypes, "CDLL", Driver)
    device = backend.device_facts.__wrapped__(3)
    assert device == planner.Device("sm90", 132, 232448, alone)


def test_the_gpu_is_that_of_the_tensors(as_on_a_gpu, monkeypatch):
    """Whichever is current: cards in one machine may differ."""
    kinds = [planner.Device("sm90", 132, 232448, True), planner.Device("sm80", 108, 166912, False)]
    monkeypatch.setattr(backend, "device_facts", kinds.__getitem__)
    plans = [as_on_a_gpu.describe(_problem(hidden_size=512, device_index=i)) for i in (None, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_a_regime_that_does_not_fit(as_on_a_gpu, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", "program")
    assert "regime 'program' does not fit" in as_on_a_gpu.unsupported(_problem(hidden_size=2000))
    with pytest.raises(fused_rnn.UnsupportedProblemError, match="regime 'program' does not fit"):
        dispatch.select(_problem(hidden_size=2000), "triton")


def test_what_explain_prints(as_on_a_gpu):
    assert as_on_a_gpu.describe(_problem()).startswith("triton scan (program: tiles 16x64")
    assert "in float32" in as_on_a_gpu.describe(_problem(cell_name="rnn_relu"))
    normed = as_on_a_gpu.describe(_problem(extras=("layer_norm",)))
    assert normed.startswith("triton step by step in float32 (layer normalisation")


@needs_triton
def test_a_refused_launch_goes_on_one_step_at_a_time(as_on_a_gpu, monkeypatch):
    """The driver has the last word on how many programs run at once."""
    from fused_rnn.backends.triton import launch

    monkeypatch.setattr(backend, "_uncooperative", set())
    regimes = []

    def scan(problem, plan, precision):
        regimes.append(plan.forward.config.regime)
        if plan.forward.config.regime == "grid":
            raise launch.RefusedLaunchError("too many blocks in cooperative launch")
        return "done"

    problem = _problem(hidden_size=512)
    with pytest.warns(RuntimeWarning, match="too many blocks in cooperative launch"):
        assert as_on_a_gpu._run(scan, problem) == "done"
    assert as_on_a_gpu._run(scan, problem) == "done"
    assert regimes == ["grid", "steps", "steps"]


@pytest.mark.parametrize(
    ("family", "allowed", "precision"),
    [
        ("sm90", "highest", "ieee"),
        ("sm90", "high", "tf32"),
        ("sm90", "medium", "tf32"),
        ("gfx942", "high", "tf32"),
        ("gfx90a", "high", "ieee"),  # for which Triton has no TF32
    ],
)
def test_products_are_exact_unless_torch_may_use_tf32(
    family, allowed, precision, as_on_a_gpu, monkeypatch
):
    device = planner.Device(family, 104, 65536, False)
    monkeypatch.setattr(backend, "device_facts", lambda index: device)
    before, seen = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision(allowed)
    try:
        as_on_a_gpu._run(lambda *args: seen.append(args), _problem(dtype=torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    ((_, _, given),) = seen
    assert given == precision


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
_MASKED = {"ends": (9, 0, 4, 7, 1), "resets": True, "reset_states": True}
GPU_CASES = [
    pytest.param(regime, testing.LayerCase(cell, *sizes, dtype=dtype, device="cuda", **options),
                 id=f"{regime}-{cell}-{str(dtype)[6:]}-{sizes}-{sorted(options)}")
    for cell in CELLS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for regime, sizes, options in (
        ("program", (7, 3, 5, 17), {"directions": 2}),
        ("program", (33, 129, 15, 64), {}),
        ("grid", (9, 33, 7, 100), {"directions": 2, "bias": False}),
        ("grid", (50, 16, 64, 256), {}),
        ("grid", (20, 300, 9, 500), {}),
        ("steps", (5, 3, 4, 9), {}),
        ("steps", (9, 33, 7, 650), {"directions": 2}),
        ("program", (9, 5, 3, 33), {"lengths": (9, 9, 4, 2, 1), "directions": 2}),
        ("grid", (9, 5, 3, 130), {"lengths": (9, 9, 4, 2, 1), "directions": 2}),
        ("grid", (9, 5, 3, 130), {**_MASKED, "directions": 2}),
        ("steps", (9, 5, 3, 1), _MASKED),
    )
]  # fmt: skip


@pytest.fixture
def on_the_gpu(monkeypatch):
    monkeypatch.setenv("FUSED_RNN_BACKEND", "triton")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("regime", "case"), GPU_CASES)
def test_accuracy_on_a_gpu(regime, case, on_the_gpu, monkeypatch, poisoned):
    """The equivalence matrix of the interpreter, compiled."""
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", regime)
    if reason := testing.refusal("triton", testing.make_inputs(case)):
        pytest.skip(reason)
    actual = testing.results_of_draws(testing.run_layer, case)
    testing.assert_draws_accurate(actual, case)


def normed_layer(cell, hidden):
    return testing.make_module(cell, 9, hidden, bidirectional=True, layer_norm=True, device="cuda")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("hidden", [1, 17, 256, 1000])
@pytest.mark.parametrize("cell", ["gru", "gru_reset_before", "lstm"])
def test_layers_that_normalise_on_a_gpu(cell, hidden, on_the_gpu, poisoned):
    layer = normed_layer(cell, hidden)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(12, 33, 9, dtype=torch.float64, device="cuda")
    masks = {"lengths": torch.randint(13, (33,)), "resets": torch.rand(12, 33) < 0.1}
    results = []
    for module, name in ((layer, "triton"), (exact, "reference")):
        rows = x.to(module.weight_ih_l0.dtype).requires_grad_()
        with fused_rnn.backend(name):
            y, _ = module(rows, **masks)
        grads = torch.autograd.grad(y.square().sum(), [rows, *module.parameters()])
        results.append((y, *grads))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.gpu
@gpu
def test_the_host_never_waits_for_a_layer_that_normalises(on_the_gpu):
    layer, x = normed_layer("lstm", 100), torch.randn(9, 5, 9, device="cuda")
    layer(x)[0].sum().backward()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "gru_reset_before", "lstm"])
def test_two_hundred_runs_are_one(cell, on_the_gpu, monkeypatch):
    """A race in the exchange would show as another bit, now and then."""
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", "grid")
    case = testing.LayerCase(cell, 64, 48, 8, 500, 2, dtype=torch.bfloat16, device="cuda")
    if reason := testing.refusal("triton", testing.make_inputs(case)):
        pytest.skip(reason)
    inputs, cotangents = testing.make_inputs(case).leaves(), testing.make_cotangents(case)
    expected = testing.results_and_grads(testing.run_layer, inputs, cotangents)
    for repetition in range(200):
        actual = testing.results_and_grads(testing.run_layer, inputs, cotangents)
        for name, value in actual.items():
            assert torch.equal(value, expected[name]), (repetition, name)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("regime", ["program", "grid", "steps"])
def test_cuda_graph(regime, on_the_gpu, monkeypatch):
    """Forward and backward in a graph, replayed on other numbers."""
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", regime)
    case = testing.LayerCase("lstm", 9, 5, 8, 100, dtype=torch.bfloat16, device="cuda")
    inputs, cotangents = testing.make_inputs(case).leaves(), testing.make_cotangents(case)

    def step():
        return testing.results_and_grads(testing.run_layer, inputs, cotangents)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in inputs.tensors.values():
            tensor.uniform_(-1, 1)
    graph.replay()
    torch.cuda.synchronize()
    for name, value in step().items():
        assert torch.equal(captured[name], value), name


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    "options", [{}, _MASKED, {"lengths": (9, 9, 4, 2, 1)}], ids=["padded", "masked", "packed"]
)
@pytest.mark.parametrize("regime", ["program", "grid", "steps"])
@pytest.mark.parametrize("cell", ["gru", "gru_reset_before"])
def test_the_host_never_waits(cell, regime, options, on_the_gpu, monkeypatch):
    monkeypatch.setenv("FUSED_RNN_TRITON_REGIME", regime)
    case = testing.LayerCase(cell, 9, 5, 8, 100, dtype=torch.bfloat16, device="cuda", **options)
    inputs, cotangents = testing.make_inputs(case).leaves(), testing.make_cotangents(case)
    testing.results_and_grads(testing.run_layer, inputs, cotangents)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        testing.results_and_grads(testing.run_layer, inputs, cotangents)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
