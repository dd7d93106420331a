"""A stepper (fused_rnn/streaming.py) gives what its module gives for the whole sequence."""

import copy
import os
import pickle
import re
import subprocess
import sys
import threading
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from helpers.needs import needs_library
from helpers.outcomes import flat
from helpers.steppers import SIZES, every_cell, make, run, start
from torch.nn.utils import prune

import fused_rnn
from fused_rnn import native
from fused_rnn.interop.onnx_weights import to_onnx


def sequence(batch, inputs):
    """Of more rows than a layer reads unpacked weights for, in another order of sums."""
    return torch.randn(1 + 48 // batch, batch, inputs)


def assert_same(step, got, expected):
    """To the bit where weights are packed. Products through the module may add up in another order
    where rows are more or lie otherwise."""
    exact = {"rtol": 0, "atol": 0} if step.packed else {}
    for one, other in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(one, other, **exact)


@needs_library
@every_cell
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_steps_are_the_sequence_to_the_bit(cell, layers, batch, bias):
    for inputs, hidden in SIZES:
        module = make(cell, inputs, hidden, num_layers=layers, bias=bias)
        step = fused_rnn.stepper(module)
        assert step.packed
        xs = sequence(batch, inputs)
        for initial in (None, start(module, batch)):
            with torch.no_grad():
                expected, final = module(xs, initial)
            ys, state = run(step, xs, initial)
            assert torch.equal(ys, expected)
            for got, want in zip(flat(state), flat(final), strict=True):
                assert torch.equal(got, want)


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (150, 1), (40, 5), (3, 100)], ids=str)
def test_several_steps_in_a_call(cell, dtype, shape):
    """x [T, B, I]: what as many calls give."""
    packs = native.cpu_library_error() is None
    module = make(cell, 9, 33, num_layers=3)
    step = fused_rnn.stepper(module, weight_dtype=dtype if packs else None)
    xs = torch.randn(*shape, 9)
    for initial in (None, start(module, shape[1])):
        y, state = step(xs, initial)
        expected, expected_state = run(step, xs, initial)
        assert_same(step, (y, state), (expected, expected_state))
    if packs:
        assert torch.equal(step._by_operator(xs, initial)[0], y)
        strided = torch.randn(shape[1], shape[0], 9).transpose(0, 1)
        assert torch.equal(step(strided)[0], step(strided.contiguous())[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_several_steps_the_general_way(batch_first):
    module = fused_rnn.GRU(9, 33, 2, batch_first=batch_first, dtype=torch.float64)
    step, xs = fused_rnn.stepper(module), torch.randn(6, 3, 9, dtype=torch.float64)
    y, state = step(xs)
    expected, expected_state = run(step, xs)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, expected_state)


@every_cell
def test_steps_are_near_torch(cell):
    ours = make(cell, 9, 33, num_layers=2)
    theirs = fused_rnn.restore(copy.deepcopy(ours))
    xs = torch.randn(5, 2, 9)
    initial = start(ours, 2)
    with torch.no_grad():
        expected, final = theirs(xs, initial)
    for module in (ours, theirs):
        ys, state = run(fused_rnn.stepper(module), xs, initial)
        torch.testing.assert_close(ys, expected, rtol=1e-5, atol=2e-6)
        for got, want in zip(flat(state), flat(final), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@every_cell
def test_instruction_sets_agree(cell, instruction_set):
    module = make(cell, 21, 70, num_layers=2)
    step, xs = fused_rnn.stepper(module), sequence(8, 21)
    with torch.no_grad():
        expected, _ = module(xs)
    assert step.packed and torch.equal(run(step, xs)[0], expected)


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@every_cell
def test_large_steps_use_threads(cell, threads, num_threads):
    num_threads(threads)
    module = make(cell, 400, 390)
    xs = sequence(1, 400)
    with torch.no_grad():
        expected, _ = module(xs)
    assert torch.equal(run(fused_rnn.stepper(module), xs)[0], expected)


@needs_library
@pytest.mark.parametrize("threads", [2, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@every_cell
def test_threads_do_not_change_bits(cell, dtype, threads, num_threads):
    """In a call of several steps, after each of which the threads meet, and of one."""
    step = fused_rnn.stepper(make(cell, 200, 390, num_layers=2), weight_dtype=dtype)
    xs = torch.randn(5, 9, 200)
    num_threads(1)
    expected, state = step(xs)
    one, _ = step(xs[0], state)
    num_threads(threads)
    for _ in range(3):
        assert torch.equal(step(xs)[0], expected)
        assert torch.equal(step(xs[0], state)[0], one)


@needs_library
def test_several_steps_from_several_threads(num_threads):
    num_threads(2)
    step = fused_rnn.stepper(fused_rnn.LSTM(200, 390), weight_dtype=torch.int8)
    inputs = torch.randn(8, 20, 3, 200).unbind()
    expected, results = [step(xs)[0] for xs in inputs], [None] * len(inputs)

    def work(i):
        for _ in range(5):
            results[i] = step(inputs[i])[0]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(map(torch.equal, results, expected))


@needs_library
@every_cell
@pytest.mark.parametrize("batch, bias", [(1, True), (7, False)])
def test_bfloat16_weights_are_rounded_weights(cell, batch, bias, instruction_set):
    for inputs, hidden in ((1, 1), (5, 7), (33, 50), (100, 130)):
        if cell == "projected" and hidden == 1:
            continue
        module = make(cell, inputs, hidden, num_layers=2, bias=bias)
        rounded = copy.deepcopy(module)
        for name, p in rounded.named_parameters():
            if name.startswith("weight"):
                p.data = p.data.bfloat16().float()
        x, state = torch.randn(batch, inputs), start(module, batch)
        step = fused_rnn.stepper(module, weight_dtype=torch.bfloat16)
        expected = fused_rnn.stepper(rounded)
        assert step._weights.numel() < 0.6 * expected._weights.numel() or hidden < 16
        for given in (None, state):
            (y, found), (y_expected, found_expected) = step(x, given), expected(x, given)
            assert torch.equal(y, y_expected) and y.dtype == torch.float32
            assert all(map(torch.equal, flat(found), flat(found_expected)))
            y_operator, _ = step._by_operator(x, given)
            assert torch.equal(y_operator, y_expected)


@needs_library
def test_weight_dtype_is_kept_and_checked():
    step = fused_rnn.stepper(fused_rnn.GRU(3, 4), weight_dtype=torch.bfloat16)
    assert step.weight_dtype == torch.bfloat16 and step.dtype == torch.float32
    assert "weight_dtype=torch.bfloat16" in repr(step)
    x = torch.randn(1, 3)
    for other in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert torch.equal(other(x)[0], step(x)[0])
    plain = fused_rnn.stepper(fused_rnn.GRU(3, 4), weight_dtype=torch.float32)
    assert plain.weight_dtype == torch.float32 and "weight_dtype" not in repr(plain)
    for module, dtype in (
        (fused_rnn.GRU(3, 4), torch.float16),
        (fused_rnn.GRU(3, 4).double(), torch.bfloat16),
    ):
        with pytest.raises(ValueError, match=r"weight_dtype: expected torch\.float"):
            fused_rnn.stepper(module, weight_dtype=dtype)


@pytest.mark.parametrize(
    ("module", "dtype"),
    [
        (fused_rnn.GRU(5, 7, 2, reset_after=False), torch.float32),
        (fused_rnn.GRU(5, 7, 2, batch_first=True, dropout=0.5), torch.float64),
        (fused_rnn.LSTM(5, 7, proj_size=3, bias=False, stateful=True), torch.float64),
        (fused_rnn.RNN(5, 7, 2), torch.bfloat16),
        (fused_rnn.LSTM(5, 7, layer_norm=True, stateful=True), torch.float32),
        (fused_rnn.LSTM(5, 7, peepholes=True), torch.float32),
        (fused_rnn.GRU(5, 7, zoneout=0.3), torch.float32),
    ],
    ids=[
        *("reset_before", "float64", "stateful", "bfloat16", "layer_norm", "peepholes", "zoneout"),
    ],
)
def test_the_general_way(module, dtype):
    module = module.to(dtype)
    step = fused_rnn.stepper(module)
    assert not step.packed and "through the module" in repr(step)
    xs = torch.randn(5, 2, 5, dtype=dtype)
    ys, state = run(step, xs)
    module.eval()
    with torch.no_grad():
        expected, final = module(xs.transpose(0, 1) if module.batch_first else xs)
    if module.batch_first:
        expected = expected.transpose(0, 1)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(ys, expected, **tolerance)
    for got, want in zip(flat(state), flat(final), strict=True):
        torch.testing.assert_close(got, want, **tolerance)
    assert not ys.requires_grad
    again = copy.deepcopy(step)
    assert torch.equal(again(xs[0])[0], step(xs[0])[0])
    if module.stateful:
        module.reset_states()


@needs_library
def test_options_that_change_nothing_are_packed():
    x = torch.randn(1, 5)
    for options in (
        {"stateful": True},
        {"recompute": True},
        {"dropout": 0.5, "num_layers": 2},
        {"recurrent_dropout": 0.5, "weight_dropout": 0.5},
        {"zoneout": (0, 0.0), "forget_bias": 1.0, "init": "orthogonal"},
    ):
        module = fused_rnn.LSTM(5, 7, batch_first=True, **options)
        step = fused_rnn.stepper(module)
        assert step.packed
        with torch.no_grad():
            expected = module.eval()(x.unsqueeze(1).expand(1, 5, 5))[0][:, -1]
        torch.testing.assert_close(run(step, x.expand(5, 1, 5))[0][-1], expected)


@needs_library
def test_weights_may_lie_in_any_way():
    module, x = fused_rnn.GRU(5, 7), torch.randn(1, 5)
    expected, _ = fused_rnn.stepper(module)(x)
    module.weight_ih_l0.data = module.weight_ih_l0.data.t().contiguous().t()
    step = fused_rnn.stepper(module)
    assert step.packed and torch.equal(step(x)[0], expected)


@needs_library
def test_parametrized_weights_are_computed_once():
    module, xs = fused_rnn.GRU(5, 7), torch.randn(3, 2, 5)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        expected, _ = module(xs)
    torch.testing.assert_close(run(fused_rnn.stepper(module), xs)[0], expected)


HOOKS = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "prune": lambda module, name: prune.l1_unstructured(module, name, 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("options", [{}, {"reset_after": False}], ids=["packed", "general"])
@pytest.mark.parametrize("library", [fused_rnn, torch.nn])
def test_weights_that_a_hook_computes_are_computed(library, options, hook):
    """Not those of the last call, before a checkpoint was loaded or the optimizer made a step."""
    if options and library is torch.nn:
        pytest.skip("torch.nn has no such option")
    module, xs = library.GRU(5, 7, **options), torch.randn(3, 2, 5)
    HOOKS[hook](module, "weight_hh_l0")
    module(xs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    step, node = fused_rnn.stepper(module), None if options else to_onnx(module)[0]
    module.eval()
    with torch.no_grad():
        expected, _ = module(xs)
    torch.testing.assert_close(run(step, xs)[0], expected)
    if node is not None:
        z, r, n = module.weight_hh_l0.detach().chunk(3)[1::-1] + module.weight_hh_l0.chunk(3)[2:]
        torch.testing.assert_close(torch.as_tensor(node.R)[0], torch.cat((z, r, n)).detach())


@needs_library
@every_cell
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_weights_may_move_to_where_processes_share_them(cell, weight_dtype):
    """As torch.multiprocessing moves those of what it sends, and frees where they were."""
    step, x = fused_rnn.stepper(make(cell, 64, 64), weight_dtype=weight_dtype), torch.randn(1, 64)
    before = flat(step(x))
    data = ForkingPickler.dumps(step)
    others = [torch.full((size,), 1e3) for size in (10_000, 24_832, 25_000, 50_000, 100_000)]
    assert all(torch.equal(a, b) for a, b in zip(flat(step(x)), before, strict=True))
    step._weights.share_memory_()
    assert all(torch.equal(a, b) for a, b in zip(flat(step(x)), before, strict=True))
    del others, data


@needs_library
def test_subclasses_take_the_general_way():
    class Doubling(fused_rnn.GRU):
        def forward(self, input, hx=None):
            output, state = super().forward(input, hx)
            return output * 2, state

    step = fused_rnn.stepper(Doubling(3, 4))
    y, state = step(torch.randn(2, 3))
    assert not step.packed and torch.equal(y, 2 * state[0])


@needs_library
def test_a_forced_backend_is_respected():
    module = fused_rnn.GRU(3, 4)
    with fused_rnn.backend("reference"):
        assert not fused_rnn.stepper(module).packed
    with fused_rnn.backend("cpu"):
        assert fused_rnn.stepper(module).packed


@every_cell
def test_weights_are_frozen(cell):
    module = make(cell, 5, 7)
    step, x = fused_rnn.stepper(module), torch.randn(1, 5)
    before = step(x)[0]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    assert torch.equal(step(x)[0], before)


@every_cell
def test_results_have_memory_of_their_own(cell):
    module = make(cell, 5, 7)
    step, x, state = fused_rnn.stepper(module), torch.randn(1, 5), start(module, 1)
    kept = [s.clone() for s in flat(state)]
    y, after = step(x, state)
    tensors = [x, y, *flat(state), *flat(after)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    y.add_(1)
    for s, k in zip(flat(state), kept, strict=True):
        assert torch.equal(s, k)


@every_cell
def test_no_gradients(cell):
    module = make(cell, 5, 7)
    step, x = fused_rnn.stepper(module), torch.randn(1, 5, requires_grad=True)
    initial = start(module, 1)
    for s in flat(initial):
        s.requires_grad_()
    for given in (None, initial):
        for inputs in (x, x.detach()):
            y, state = step(inputs, given)
            assert not any(t.requires_grad for t in (y, *flat(state)))


@every_cell
def test_unusual_layouts(cell):
    module = make(cell, 5, 7, num_layers=2)
    step, x, state = fused_rnn.stepper(module), torch.randn(3, 5), start(module, 3)
    expected, _ = step(x, state)
    strided = tuple(torch.stack((s, s), -1)[..., 0] for s in flat(state))
    strided = strided if isinstance(state, tuple) else strided[0]
    assert_same(step, step(torch.stack((x, x), 1)[:, 0], strided)[0], expected)
    assert_same(step, step(torch._neg_view(-x), state)[0], expected)
    if isinstance(state, tuple):
        assert_same(step, step(x, list(state))[0], expected)


@every_cell
def test_copies_and_pickles(cell):
    step, x = fused_rnn.stepper(make(cell, 5, 7)), torch.randn(2, 5)
    expected, _ = step(x)
    for other in (copy.copy(step), copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
        assert torch.equal(other(x)[0], expected)


@needs_library
def test_unpickling_without_the_library(tmp_path):
    path = tmp_path / "step.pkl"
    path.write_bytes(pickle.dumps(fused_rnn.stepper(fused_rnn.GRU(3, 4))))
    code = "import pickle, sys; pickle.load(open(sys.argv[1], 'rb'))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"FUSED_RNN_SKIP_BUILD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "needs the CPU library" in done.stderr


@every_cell
def test_from_several_threads(cell):
    step, xs = fused_rnn.stepper(make(cell, 16, 40, num_layers=2)), torch.randn(4, 50, 1, 16)
    expected = [run(step, x)[0] for x in xs]
    results = [None] * len(xs)

    def work(i):
        results[i] = run(step, xs[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, e) for r, e in zip(results, expected, strict=True))


@needs_library
@every_cell
def test_compiled_without_a_break(cell):
    step, x = fused_rnn.stepper(make(cell, 5, 7)), torch.randn(2, 5)
    compiled = torch.compile(lambda x, state: step(x, state)[0], backend="eager", fullgraph=True)
    _, state = step(x)
    assert torch.equal(compiled(x, state), step(x, state)[0])


@needs_library
@every_cell
@pytest.mark.parametrize("way", ["compiled", "exported", "traced"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
def test_strided_streams_in_a_graph(cell, way):
    """A step after the other of [B, T, I], from states that lie otherwise and ask for gradients."""
    step, x = fused_rnn.stepper(make(cell, 5, 7)), torch.randn(2, 3, 5)
    _, state = step(x[:, 0])
    turned = [s.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_() for s in flat(state)]

    def stream(x, *state):
        state, ys = state if len(state) > 1 else state[0], []
        for t in range(x.shape[1]):
            y, state = step(x[:, t], state)
            ys.append(y)
        return torch.stack(ys, 1)

    class Stream(torch.nn.Module):
        def forward(self, x, *state):
            return stream(x, *state)

    if way == "compiled":
        made = torch.compile(stream, backend="aot_eager", fullgraph=True)
    elif way == "exported":
        made = torch.export.export(Stream(), (x, *turned)).module()
    else:
        made = torch.jit.trace(Stream(), (x, *turned), check_trace=False)
    assert torch.equal(made(x, *turned), stream(x, *turned))


@needs_library
def test_errors_in_a_graph_are_those_of_a_call():
    step = fused_rnn.stepper(fused_rnn.GRU(5, 7))
    compiled = torch.compile(step, backend="aot_eager")
    for x in (torch.ones(2, 4), torch.ones(2, 5).double()):
        with pytest.raises(RuntimeError) as eager:
            step(x)
        with pytest.raises(RuntimeError, match=re.escape(str(eager.value))):
            compiled(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_do_not_fit(dtype):
    module = fused_rnn.GRU(3, 20, dtype=dtype)
    with torch.no_grad():  # as many numbers as expected
        module.weight_ih_l0 = torch.nn.Parameter(torch.randn(60, 2, dtype=dtype))
        module.weight_hh_l0 = torch.nn.Parameter(torch.randn(60, 21, dtype=dtype))
    with pytest.raises(
        RuntimeError, match=r"weights\[0\]: expected shape \[60, 3\], got \[60, 2\]"
    ):
        fused_rnn.stepper(module)
    module = fused_rnn.GRU(3, 20, dtype=dtype)
    module.bias_hh_l0 = None
    with pytest.raises(TypeError, match=r"weights\[3\]: expected a Tensor, got NoneType"):
        fused_rnn.stepper(module)


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize(
    ("x", "state", "error", "message"),
    [
        ("text", None, TypeError, "x: expected a Tensor, got str"),
        (None, None, TypeError, "x: expected a Tensor, got NoneType"),
        (torch.ones(5), None, RuntimeError, r"x: expected shape \[B, 5\]"),
        (torch.ones(1, 1, 2, 5), None, RuntimeError, r"or \[T, B, 5\].* got \[1, 1, 2, 5\]"),
        (torch.ones(3, 2, 6), None, RuntimeError, r"got \[3, 2, 6\]"),
        (torch.ones(0, 2, 5), None, RuntimeError, r"got \[0, 2, 5\]"),
        (torch.ones(3, 0, 5), None, RuntimeError, r"got \[3, 0, 5\]"),
        (torch.ones(3, 2, 5), (torch.ones(1, 3, 7),) * 2, RuntimeError, r"state\[0\]: expected"),
        (torch.ones(2, 6), None, RuntimeError, r"got \[2, 6\]"),
        (torch.ones(0, 5), None, RuntimeError, r"got \[0, 5\]"),
        (torch.ones(2, 5).half(), None, RuntimeError, "x: expected dtype"),
        (torch.ones(2, 5, device="meta"), None, RuntimeError, "x: expected device cpu"),
        (torch.ones(2, 5).to_sparse(), None, RuntimeError, "x: expected a dense tensor"),
        (torch.ones(2, 5), torch.ones(1, 2, 7), TypeError, "state: expected a tuple"),
        (torch.ones(2, 5), torch.ones(2, 1, 2, 7), TypeError, "state: expected a tuple"),
        (torch.ones(2, 5), (torch.ones(1, 2, 7),), RuntimeError, "state: expected a tuple"),
        (torch.ones(2, 5), (torch.ones(1, 2, 7), None), TypeError, r"state\[1\]: expected"),
        (torch.ones(2, 5), (torch.ones(1, 2, 7), torch.ones(1, 1, 7)), RuntimeError, r"state\[1\]"),
        (torch.ones(2, 5), (torch.ones(2, 7), torch.ones(2, 7)), RuntimeError, r"state\[0\]"),
        (torch.ones(2, 5), (torch.ones(1, 2, 7).long(),) * 2, RuntimeError, r"state\[0\]: .*dtype"),
    ],
)
def test_bad_arguments(general, x, state, error, message):
    module = fused_rnn.LSTM(5, 7)
    if general:
        module = module.double()
        x, state = (
            t.double() if isinstance(t, torch.Tensor) and t.dtype == torch.float32 else t
            for t in (x, state)
        )
        if isinstance(state, tuple):
            state = tuple(
                s.double() if s is not None and s.is_floating_point() else s for s in state
            )
    with pytest.raises(error, match=message):
        fused_rnn.stepper(module)(x, state)


def test_bad_state_of_a_cell_without_c():
    step = fused_rnn.stepper(fused_rnn.GRU(5, 7, 2))
    for state in ((torch.ones(2, 1, 7),), "zeros", 0):
        with pytest.raises(TypeError, match="state: expected a Tensor"):
            step(torch.ones(1, 5), state)
    with pytest.raises(RuntimeError, match=r"state: expected shape \[2, 1, 7\], got \[1, 1, 7\]"):
        step(torch.ones(1, 5), torch.ones(1, 1, 7))


def test_bad_modules():
    with pytest.raises(ValueError, match="one direction"):
        fused_rnn.stepper(fused_rnn.GRU(3, 4, bidirectional=True))
    for module in (torch.nn.Linear(3, 4), fused_rnn.GRUCell(3, 4), None):
        with pytest.raises(TypeError, match="expected an RNN, GRU or LSTM"):
            fused_rnn.stepper(module)


@needs_library
def test_the_operators_refuse_what_does_not_fit():
    """Called without Python they never read beyond a tensor."""
    native.cpu_library_error()
    step, lstm = torch.ops.fused_rnn_cpu.step, torch.ops.fused_rnn_cpu.step_lstm
    x, weights = torch.ones(1, 5), fused_rnn.stepper(fused_rnn.GRU(5, 7))._weights
    sizes = [2, 1, 5, 7, 7, True, 1]
    assert step(weights, *sizes, x, None)[0].shape == (1, 7)
    with pytest.raises(RuntimeError, match="packed: expected"):
        step(weights[:-1], *sizes, x, None)
    places = ((0, 4), (0, -1), (1, 0), (2, 2**40), (3, -7), (4, 2**19), (6, 0), (6, 3), (6, 8))
    for place, value in places:
        wrong = [value if i == place else size for i, size in enumerate(sizes)]
        with pytest.raises(RuntimeError, match="expected"):
            step(weights, *wrong, x, None)
    with pytest.raises(RuntimeError, match="h: expected"):
        step(weights, *sizes, x, torch.ones(1, 2, 7))
    with pytest.raises(RuntimeError, match="packed: expected"):
        lstm(weights, *sizes[1:], x, None, None)
    for cell, output in ((0, 8), (0, 6), (1, 6), (2, 6), (2, 8), (3, 8)):  # one gate, 3 or 4
        count = (1, 1, 3, 4)[cell] * 16 * (5 + output) + 16 * 7
        with pytest.raises(RuntimeError, match=f"output: expected 7 as hidden.*, got {output}"):
            step(torch.zeros(count), cell, 1, 5, 7, output, False, 1, x, None)
    packed = fused_rnn.stepper(fused_rnn.LSTM(5, 7))._weights
    with pytest.raises(RuntimeError, match="c: expected"):
        lstm(packed, *sizes[1:], x, torch.ones(1, 1, 7), None)
