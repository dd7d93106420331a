"""Inference past the dispatcher (csrc/python): the operators' bits, and never a guess."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import torch
from helpers.inputs import LAID_OUT, states
from helpers.needs import has_direct_calls
from helpers.outcomes import flat

import fused_rnn
from fused_rnn import direct, looks
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module

pytestmark = has_direct_calls
LAYERS = list(CELLS)


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}])
def test_layers_have_the_operators_bits(cell, options, operators_only, asked):
    module = make_module(cell, 5, 17, **options)
    parts = len(module._flat_weights) // len(module._all_weights[0])
    for shape in ((1, 1, 5), (7, 3, 5), (4, 5)):
        x = torch.randn(shape)
        batch = shape[1:2] if len(shape) == 3 else ()
        for hx in (None, states(cell, parts, *batch, 17)):
            with torch.no_grad():
                actual = flat(module(x, hx))
                expected = flat(operators_only(module, x, hx))
            assert asked.pop() is not None and not asked
            for a, e in zip(actual, expected, strict=True):
                assert type(a) is torch.Tensor and a.shape == e.shape and a.stride() == e.stride()
                assert torch.equal(a, e) and not a.requires_grad and a.is_leaf


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_cells_have_the_operators_bits(name, batch, operators_only, asked):
    module = getattr(fused_rnn, name)(5, 9)
    for hx in (
        None,
        states(name.removesuffix("Cell").lower().replace("rnn", "rnn_tanh"), *batch, 9),
    ):
        x = torch.randn(*batch, 5)
        with torch.no_grad():
            actual, expected = flat(module(x, hx)), flat(operators_only(module, x, hx))
        assert asked.pop() is not None and not asked
        assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
def test_stepper_has_the_operators_bits(cell):
    step = fused_rnn.stepper(make_module(cell, 5, 33, num_layers=2))
    x = torch.randn(2, 5)
    for state in (None, states(cell, 2, 2, 33)):
        assert step._direct(x, state) is not None
        assert all(map(torch.equal, flat(step(x, state)), flat(step._by_operator(x, state))))


class Subclass(torch.Tensor):
    pass


ODD = {
    "subclass": lambda x: x.as_subclass(Subclass),
    "double": lambda x: x.double(),
    "strided": lambda x: torch.cat((x, x), -1)[..., ::2],
    "negative bit": torch._neg_view,
    "meta": lambda x: x.to("meta"),
    "empty": lambda x: x[..., :0],
    "sparse": lambda x: x.to_sparse(),
    "no tensor": lambda x: x.tolist(),
    "none": lambda x: None,
    "complex part": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_tensors_are_left_to_the_operators(odd):
    calls, weights = direct.calls(), list(fused_rnn.GRU(4, 6).parameters())
    x, h = torch.randn(1, 2, 4), torch.randn(1, 2, 6)
    with torch.no_grad():
        assert calls.infer_layers(2, x, weights, h, 1, 1, True) is not None
        if odd != "strided":  # which is taken
            assert calls.infer_layers(2, ODD[odd](x), weights, h, 1, 1, True) is None
        if odd not in ("none", "strided"):
            assert calls.infer_layers(2, x, weights, ODD[odd](h), 1, 1, True) is None
        changed = [weights[0], ODD[odd](weights[1].detach()), *weights[2:]]
        assert calls.infer_layers(2, x, changed, h, 1, 1, True) is None


@pytest.mark.parametrize("layout", LAID_OUT)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm"])
def test_input_may_lie_in_any_order(layout, cell, operators_only, asked):
    torch_class = {"rnn_tanh": torch.nn.RNN, "lstm": torch.nn.LSTM}[cell]
    for batch_first in (False, True):
        module = make_module(cell, 5, 17, num_layers=2, batch_first=batch_first)
        expected_of = torch_class(5, 17, num_layers=2, batch_first=batch_first)
        expected_of.load_state_dict(module.state_dict())
        for shape in ((7, 3, 5), (1, 3, 5), (3, 1, 5), (1, 1, 5), (60, 4, 5), (6, 5), (1, 5)):
            x = LAID_OUT[layout](torch.randn(shape))
            with torch.no_grad():
                actual, dense = flat(module(x)), flat(module(x.contiguous()))
                by_operator, expected = flat(operators_only(module, x)), flat(expected_of(x))
            assert len(asked) == 2 and all(answer is not None for answer in asked)
            asked.clear()
            for a, d, o, e in zip(actual, dense, by_operator, expected, strict=True):
                assert torch.equal(a, d) and torch.equal(a, o) and a.shape == e.shape
                torch.testing.assert_close(a, e)
                # As far as strides matter, those of torch.nn.
                for size, stride, wanted in zip(a.shape, a.stride(), e.stride(), strict=True):
                    assert size == 1 or stride == wanted


@pytest.mark.parametrize("layout", LAID_OUT)
def test_input_of_a_cell_may_lie_in_any_order(layout, operators_only, asked):
    module = fused_rnn.GRUCell(5, 9)
    for shape in ((3, 5), (1, 5), (5,)):
        if layout == "transposed" and len(shape) == 1:
            continue
        x = LAID_OUT[layout](torch.randn(shape))
        with torch.no_grad():
            actual = module(x)
            assert asked.pop() is not None and not asked
            assert torch.equal(actual, operators_only(module, x))
            assert torch.equal(actual, module(x.contiguous()))
        asked.clear()


def test_long_input_is_put_in_order_by_all_threads(asked):
    module = fused_rnn.RNN(40, 3, batch_first=True)
    x = torch.randn(9, 1000, 40)
    with torch.no_grad():
        actual, _ = module(x)
        expected, _ = module(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert all(answer is not None for answer in asked) and torch.equal(actual, expected)


def test_arguments_that_do_not_fit_get_none_and_no_error():
    calls, weights = direct.calls(), list(fused_rnn.LSTM(4, 6).parameters())
    x, h = torch.randn(1, 2, 4), torch.randn(1, 2, 6)
    good = [3, x, weights, (h, h), 1, 1, True]
    assert calls.infer_layers(*good) is not None
    huge = 2**70
    changes = {
        0: (5, -1, huge, "lstm", None, 2.0),
        2: (weights[:3], [], tuple(weights), None, [*weights, None]),
        3: (h, (h,), (h, None), [h, h], (h, h[:, :1]), 7),
        4: (0, 2, -1, huge, True),
        5: (0, 3, huge, None),
        6: (1, None),
    }
    for place, values in changes.items():
        for value in values:
            assert calls.infer_layers(*good[:place], value, *good[place + 1 :]) is None
    for length in range(len(good)):
        assert calls.infer_layers(*good[:length]) is None
    assert calls.infer_cell() is None and calls.prepare_step() is None
    assert calls.infer_cell(3, x[0], weights, (h[0], h[0]), 7) is None
    step = fused_rnn.stepper(fused_rnn.GRU(4, 6))
    sizes = 2, 1, 4, 6, 6, True, 1
    prepared = calls.prepare_step(step._weights, *sizes)
    assert prepared(x[0], None) is not None
    assert prepared() is None and prepared(x[0]) is None and prepared(x[0], None, None) is None
    for odd in (step._weights.double(), step._weights[:0], step._weights.view(1, -1), None):
        assert calls.prepare_step(odd, *sizes) is None
    assert calls.prepare_step(step._weights, *sizes[:-1], False) is None
    assert calls.prepare_step(step._weights) is None
    for short in (step._weights[1:], step._weights[1:].clone()):
        assert calls.prepare_step(short, *sizes)(x[0], None) is None


@pytest.mark.parametrize(
    "name, value",
    [
        ("mode", "LSTMP"),
        ("mode", []),
        ("num_layers", 2),
        ("num_layers", 1.0),
        ("dropout", 1),
        ("dropout", 1.5),
        ("bidirectional", None),
        ("batch_first", 1),
        ("_flat_weights_names", ()),
        ("_flat_weights_names", ["weight_ih_l0", []]),
        ("_parameters", None),
    ],
)
def test_a_module_with_something_odd_is_left_to_the_operators(name, value, recwarn):
    module, x = fused_rnn.GRU(4, 6), torch.randn(1, 2, 4)
    infer_module = direct.calls().infer_module
    with torch.no_grad():
        assert infer_module(module, x, None) is not None
        assert infer_module(object(), x, None) is infer_module(module, x) is None
        module.__dict__[name] = value
        assert infer_module(module, x, None) is None and not recwarn


def test_modules_that_drop_are_left_to_the_operators():
    module, x = fused_rnn.GRU(4, 6, 2, dropout=0.5), torch.randn(1, 2, 4)
    infer_module = direct.calls().infer_module
    with torch.no_grad():
        assert infer_module(module, x, None) is None
        assert infer_module(module.eval(), x, None) is not None
        del module.weight_hh_l1
        assert infer_module(module, x, None) is None


@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0, -0.5, 1.5, float("nan"), 1])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_is_understood_alike(dropout, num_layers, training):
    module, x = fused_rnn.GRU(4, 6, num_layers), torch.randn(1, 2, 4)
    module.train(training).dropout = dropout
    with torch.no_grad():
        is_taken = direct.calls().infer_module(module, x, None) is not None
    assert is_taken == (looks.dropout_of(module) == 0)


def test_modes_and_transforms_are_left_to_the_operators():
    step = fused_rnn.stepper(fused_rnn.GRU(4, 6))
    x = torch.randn(2, 4)
    answers = []

    def call(x):
        answers.append(step._direct(x, None))
        return step(x)[0]

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    call(x)
    assert answers.pop() is not None
    with fused_rnn.backend("reference"), fused_rnn.backend("cpu"):
        call(x)
    assert answers.pop() is not None
    with Mode():
        call(x)
    torch.jit.trace(call, (x,), check_trace=False)
    torch.func.vmap(lambda row: row * (answers.append(step._direct(x, None)) is None))(x)
    assert len(answers) >= 3 and all(answer is None for answer in answers)


@pytest.mark.parametrize("default", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
def test_a_default_device_changes_nothing(name, default, ways):
    """torch.set_default_device's is a mode too, of functions that make tensors of nothing."""
    module = getattr(fused_rnn, name)(4, 6)
    step = fused_rnn.stepper(fused_rnn.GRU(4, 6))
    x = torch.randn(3, 2, 4) if name == "LSTM" else torch.randn(2, 4)

    def call():
        y, *_ = module(x)
        y.sum().backward()
        grads = [parameter.grad for parameter in module.parameters()]
        module.zero_grad()
        with torch.no_grad():
            stepped = step._direct(x[:1].view(-1, 4), None)
            return y.detach(), *grads, *flat(module(x)), *flat(stepped)

    expected, before = call(), ways.general
    torch.set_default_device(default)
    try:
        found = call()
    finally:
        torch.set_default_device(None)
    assert ways.general == before
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_what_changes_dtypes_or_backends_does_not_change_a_stepper():
    step, x = fused_rnn.stepper(fused_rnn.GRU(4, 6)), torch.randn(2, 4)
    expected, _ = step(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(step._by_operator(x, None)[0], expected)
        assert torch.equal(step._direct(x, None)[0], expected)
    with fused_rnn.backend("reference"):
        assert torch.equal(step._direct(x, None)[0], expected)


def test_a_module_heeds_autocast():
    module, x = fused_rnn.GRU(4, 6), torch.randn(1, 2, 4)
    weights = list(module.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, _ = direct.calls().infer_layers(2, x, weights, None, 1, 1, True)
        assert y.dtype == torch.bfloat16 and torch.equal(y, module(x)[0])
    with torch.no_grad():
        assert direct.calls().infer_layers(2, x, weights, None, 1, 1, True)[0].dtype == x.dtype


def test_weights_outlive_what_they_were_prepared_from():
    calls, step = direct.calls(), fused_rnn.stepper(fused_rnn.GRU(40, 60))
    x = torch.randn(2, 40)
    expected, _ = step(x)
    prepared = calls.prepare_step(step._weights, 2, 1, 40, 60, 60, True, 1)
    del step
    gc.collect()
    scratch = [torch.full((20000,), torch.nan) for _ in range(20)]
    assert torch.equal(prepared(x, None)[0], expected)
    del scratch


def test_a_graph_has_the_operator_in_it():
    step = fused_rnn.stepper(fused_rnn.GRU(4, 6))
    x = torch.randn(2, 4)
    compiled = torch.compile(lambda x, h: step(x, h), fullgraph=True, backend="eager")
    _, h = step(x)
    assert all(map(torch.equal, compiled(x, h), step(x, h)))


def test_nothing_is_kept():
    module, step = fused_rnn.LSTM(8, 8), fused_rnn.stepper(fused_rnn.LSTM(8, 8))
    x, state = torch.randn(1, 1, 8), (torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    objects = [x, *state, *module.parameters()]

    def use(times):
        with torch.no_grad():
            for _ in range(times):
                module(x, state), step(x[0], state)
                step._direct(x, state)  # does not fit
                step._direct(x.double(), state)

    use(10)
    gc.collect()
    counts, blocks = [sys.getrefcount(o) for o in objects], sys.getallocatedblocks()
    use(1000)
    gc.collect()
    assert [sys.getrefcount(o) for o in objects] == counts
    assert sys.getallocatedblocks() - blocks < 500


def test_threads_share_a_stepper():
    step = fused_rnn.stepper(fused_rnn.GRU(16, 32))
    x = torch.randn(50, 1, 16)

    def run():
        state = None
        for row in x:
            y, state = step(row, state)
        return y

    expected, results = run(), []
    threads = [threading.Thread(target=lambda: results.append(run())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(result, expected) for result in results)


def test_without_the_extension_the_operators_serve(operators_only):
    module, x = fused_rnn.GRU(4, 6), torch.randn(1, 2, 4)
    with torch.no_grad():
        assert all(map(torch.equal, operators_only(module, x), module(x)))
        step = operators_only(fused_rnn.stepper, module)
        assert step._direct(x[0], None) is None
        assert torch.equal(step(x[0])[0], fused_rnn.stepper(module)(x[0])[0])
