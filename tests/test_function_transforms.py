"""Layers inside vmap, grad, vjp and jacrev (fused_rnn/transforms.py): by the kernels, and what
plain operations give."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from helpers import outcomes
from helpers.inputs import states
from helpers.modules import parameters_of, parts_of
from helpers.outcomes import flat
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap

import fused_rnn
from fused_rnn import direct, ops, plain, transforms
from fused_rnn.cells import CELLS
from fused_rnn.modules import make_module

pytestmark = [
    pytest.mark.usefixtures("cpu_backend"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]
INPUTS, HIDDEN, STEPS, ITEMS = 5, 18, 7, 3
near = functools.partial(outcomes.near, rtol=2e-5, of_largest=True)
every_cell = pytest.mark.parametrize("cell", CELLS)
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 2},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ".".join(o) or "plain")


class Counts:
    """How often the backend ran, forward and for gradients, and plain operations."""

    def __init__(self, monkeypatch):
        self.layers = self.gradients = self.plain = 0
        self._watch(monkeypatch, ops, "layer", "layers")
        self._watch(monkeypatch, direct, "infer_layer", "layers")
        self._watch(monkeypatch, ops, "gradients_anew", "gradients")
        self._watch(monkeypatch, plain, "layer", "plain")

    def _watch(self, monkeypatch, module, name, count):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            result = function(*args, **kwargs)
            setattr(self, count, getattr(self, count) + (result is not None))
            return result

        monkeypatch.setattr(module, name, watched)

    def of(self, function, *args):
        """What it gives, and the counts."""
        self.layers = self.gradients = self.plain = 0
        return function(*args), (self.layers, self.gradients, self.plain)


@pytest.fixture
def counts(monkeypatch):
    return Counts(monkeypatch)


def plainly(function, *args):
    """The same in plain operations: no kernel is asked."""
    with fused_rnn.backend("reference"):
        return function(*args)


def module_of(cell, options):
    """Of a relu the gradient jumps where two ways round differently."""
    module = make_module(cell, INPUTS, HIDDEN, **options)
    if cell == "rnn_relu":
        with torch.no_grad():
            for p in module.parameters():
                p.abs_()
    return module


def input_of(options, *leading, batch=4):
    time = (batch, STEPS) if options.get("batch_first") else (STEPS, batch)
    return torch.rand(*leading, *time, INPUTS)


def layers_of(options):
    return options.get("num_layers", 1)


def loss_of(module):
    def loss(parameters, *args):
        y, *final = flat(functional_call(module, parameters, args))
        return y.square().sum() + sum(f.sin().sum() for f in final)

    return loss


@every_cell
@every_option
@pytest.mark.parametrize("shared", ["hx", "x", "nothing"])
def test_a_batch_of_inputs_is_one_larger_batch(cell, options, shared, counts):
    module = module_of(cell, options)
    x = input_of(options, *(() if shared == "x" else (ITEMS,)))
    hx = states(cell, *(() if shared == "hx" else (ITEMS,)), parts_of(options), 4, HIDDEN)
    dims = (None if shared == "x" else 0, None if shared == "hx" else 0)

    def call(x, hx):
        return tuple(flat(module(x, hx)))

    function = vmap(call, in_dims=dims)
    with torch.no_grad():
        actual, count = counts.of(function, x, hx)
    # Of each layer one call: the second finds another function's results.
    assert count == (layers_of(options), 0, 0)
    near(actual, plainly(function, x, hx))
    for i in range(ITEMS):
        item = [
            torch.utils._pytree.tree_map(lambda t, d=d, i=i: t if d is None else t[i], part)
            for part, d in zip((x, hx), dims, strict=True)
        ]
        near([a[i] for a in actual], call(*item), rtol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_items_along_any_dimension(dim, counts):
    module, x = fused_rnn.LSTM(INPUTS, HIDDEN), torch.randn(ITEMS, STEPS, 2, INPUTS)
    expected = vmap(lambda x: module(x)[0])(x)
    actual = vmap(lambda x: module(x)[0], in_dims=dim, out_dims=dim)(x.movedim(0, dim))
    near(actual.movedim(dim, 0), expected)


@every_cell
def test_gradients_pass_a_vmap_to_autograd_outside(cell, counts):
    """By what the larger batch's forward has saved: nothing runs anew."""
    module, x = module_of(cell, {}), torch.rand(ITEMS, STEPS, 4, INPUTS, requires_grad=True)

    def gradients():
        y = vmap(lambda x: module(x)[0])(x)
        return torch.autograd.grad(y.square().sum(), [x, *module.parameters()])

    actual, count = counts.of(gradients)
    assert count == (1, 0, 0)
    near(actual, plainly(gradients))


@every_cell
@every_option
def test_per_sample_gradients(cell, options, counts):
    module, x = module_of(cell, options), input_of(options, ITEMS, batch=1)
    loss = loss_of(module)
    function = vmap(grad(loss), in_dims=(None, 0))
    actual, count = counts.of(function, parameters_of(module), x)
    # Forward all at once; what is needed of the second layer's input, too, comes item by item.
    assert count == (layers_of(options), ITEMS * layers_of(options), 0)
    near(actual, plainly(function, parameters_of(module), x))
    for i in range(ITEMS):
        value = loss(dict(module.named_parameters()), x[i])
        expected = torch.autograd.grad(value, list(module.parameters()))
        near([a[i] for a in actual.values()], list(expected), rtol=1e-5)


@every_cell
def test_gradients_of_inputs_alone_are_all_at_once(cell, counts):
    module, x = module_of(cell, {"num_layers": 2}), torch.rand(ITEMS, STEPS, 2, INPUTS)
    hx = states(cell, ITEMS, 2, 2, HIDDEN)

    def loss(x, hx):
        return sum(t.square().sum() for t in flat(module(x, hx)))

    function = vmap(grad(loss, argnums=(0, 1)))
    module.requires_grad_(False)
    actual, count = counts.of(function, x, hx)
    assert count == (2, 2, 0)
    near(actual, plainly(function, x, hx))


@every_cell
@pytest.mark.parametrize("shared", [False, True])
def test_ensembles(cell, shared, counts):
    members = [module_of(cell, {"num_layers": 2}) for _ in range(ITEMS)]
    parameters, buffers = stack_module_state(members)
    parameters = {name: p.detach() for name, p in parameters.items()}
    skeleton = copy.deepcopy(members[0]).to("meta")
    x = torch.rand(*(() if shared else (ITEMS,)), STEPS, 2, INPUTS)

    def call(parameters, buffers, x):
        return tuple(flat(functional_call(skeleton, (parameters, buffers), (x,))))

    dims = (0, 0, None if shared else 0)
    actual, count = counts.of(vmap(call, in_dims=dims), parameters, buffers, x)
    assert count == (2 * ITEMS, 0, 0)
    near(actual, plainly(vmap(call, in_dims=dims), parameters, buffers, x))

    def gradients(parameters, x):
        def loss(parameters):
            return sum(t.square().sum() for t in call(parameters, buffers, x))

        return grad(loss)(parameters)

    function = vmap(gradients, in_dims=(0, dims[2]))
    actual, count = counts.of(function, parameters, x)
    assert count == (2 * ITEMS, 2 * ITEMS, 0)
    near(actual, plainly(function, parameters, x))


def test_what_gradients_need_is_saved_for_some_items_at_a_time(counts, monkeypatch):
    module, x = fused_rnn.LSTM(INPUTS, HIDDEN), torch.randn(4, 2, INPUTS)
    function = jacrev(lambda x: tuple(flat(module(x))))
    together, count = counts.of(function, x)
    assert count == (1, 1, 0)
    monkeypatch.setattr(transforms, "_MOST_SAVED", 10 * 4 * 2 * 4 * HIDDEN)
    actual, count = counts.of(function, x)
    outputs = (4 + 1 + 1) * 2 * HIDDEN
    assert count == (1, math.ceil(outputs / 10), 0)
    near(actual, together, rtol=1e-6)
    monkeypatch.setattr(transforms, "_MOST_SAVED", 1)
    near(function(x[:2])[1], plainly(function, x[:2])[1])


def test_many_small_items_take_plain_operations(counts):
    module, x = fused_rnn.GRU(4, 4), torch.randn(400, 2, 1, 4)
    function = vmap(grad(loss_of(module)), in_dims=(None, 0))
    actual, count = counts.of(function, parameters_of(module), x)
    assert count == (1, 0, 1)
    near(actual, plainly(function, parameters_of(module), x))
    actual, count = counts.of(function, parameters_of(module), x[:5])
    assert count == (1, 5, 0)
    near(actual, plainly(function, parameters_of(module), x[:5]))


def test_no_items():
    module, x = fused_rnn.LSTM(INPUTS, HIDDEN), torch.randn(0, STEPS, 2, INPUTS)
    assert vmap(lambda x: module(x)[0])(x).shape == (0, STEPS, 2, HIDDEN)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].square().sum(0).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters_of(module), x)
    assert {n: g.shape for n, g in found.items()} == {
        n: (0, *p.shape) for n, p in module.named_parameters()
    }


@pytest.mark.parametrize(
    ("cell", "used"), [(cell, i) for cell in CELLS for i in range(2 + CELLS[cell].has_c)]
)
def test_gradients_of_one_output(cell, used, counts):
    module, x = module_of(cell, {"bidirectional": True}), torch.rand(ITEMS, STEPS, 1, INPUTS)

    def loss(parameters, x):
        return flat(functional_call(module, parameters, (x,)))[used].square().sum()

    function = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, 0))
    actual, count = counts.of(function, parameters_of(module), x)
    assert count == (1, ITEMS, 0)
    near(actual, plainly(function, parameters_of(module), x))


@every_cell
def test_gradients_of_some_parameters(cell, counts):
    module, x = module_of(cell, {}), torch.rand(ITEMS, STEPS, 1, INPUTS)
    parameters = parameters_of(module)
    frozen = {name: parameters.pop(name) for name in ("weight_ih_l0", "bias_hh_l0")}

    def loss(parameters, x):
        return loss_of(module)(parameters | frozen, x)

    function = vmap(grad(loss), in_dims=(None, 0))
    actual, _ = counts.of(function, parameters, x)
    assert counts.gradients == ITEMS and set(actual) == set(parameters)
    near(actual, plainly(function, parameters, x))


@every_cell
def test_vjp_and_jacobians(cell, counts):
    module, x = module_of(cell, {}), torch.rand(4, 2, INPUTS)

    def call(x):
        return tuple(flat(module(x)))

    def pulled(x):
        outputs, pull = vjp(call, x)
        return outputs, pull(outputs)

    actual, count = counts.of(pulled, x)
    assert count == (1, 1, 0)
    near(actual, plainly(pulled, x))
    actual, count = counts.of(jacrev(lambda x: module(x)[1]), x)
    assert count == (1, 1, 0)  # the rows of a Jacobian are a batch, too
    near(actual, plainly(jacrev(lambda x: module(x)[1]), x))


@every_cell
def test_derivatives_of_derivatives(cell, counts):
    module, x = module_of(cell, {}), torch.rand(3, 1, INPUTS)

    def loss(x):
        return sum(t.square().sum() for t in flat(module(x)))

    functions = {
        "grad of grad": grad(lambda x: grad(loss)(x).square().sum()),
        "jacrev of grad": jacrev(grad(loss)),
        "jacrev of jacrev": jacrev(jacrev(loss)),
        "hessian": hessian(loss),
    }
    for function in functions.values():
        actual, expected = function(x), plainly(function, x)
        near(actual, expected, rtol=1e-4)


@every_cell
def test_training_through_per_sample_gradients(cell, counts):
    """A penalty on each sample's gradient, differentiated by autograd outside of the transforms."""
    module, x = module_of(cell, {}), torch.rand(ITEMS, STEPS, 1, INPUTS)

    def penalty():
        parameters = dict(module.named_parameters())
        found = vmap(grad(loss_of(module)), in_dims=(None, 0))(parameters, x)
        norm = sum(g.square().sum() for g in found.values())
        return torch.autograd.grad(norm, list(module.parameters()))

    actual, _ = counts.of(penalty)
    assert counts.gradients == ITEMS
    near(actual, plainly(penalty), rtol=1e-4)


@pytest.mark.parametrize("outer", [None, 0])
def test_vmap_in_vmap(outer, counts):
    module, x = fused_rnn.LSTM(INPUTS, HIDDEN), torch.randn(2, ITEMS, STEPS, 4, INPUTS)
    hx = states("lstm", *(() if outer is None else (2,)), 1, 4, HIDDEN)

    def call(x, hx):
        return tuple(flat(module(x, hx)))

    function = vmap(vmap(call, in_dims=(0, None)), in_dims=(0, outer))
    with torch.no_grad():
        actual, count = counts.of(function, x, hx)
    assert count == (1, 0, 0)
    near(actual, plainly(function, x, hx))


def test_in_chunks(counts):
    module, x = fused_rnn.GRU(INPUTS, HIDDEN), torch.randn(5, STEPS, 1, INPUTS)
    together = vmap(grad(loss_of(module)), in_dims=(None, 0))
    by_two = vmap(grad(loss_of(module)), in_dims=(None, 0), chunk_size=2)
    near(by_two(parameters_of(module), x), together(parameters_of(module), x), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_types(dtype, autocast, counts):
    module, x = fused_rnn.LSTM(INPUTS, HIDDEN), torch.randn(ITEMS, STEPS, 2, INPUTS)
    if not autocast:
        module, x = module.to(dtype), x.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        function = vmap(grad(loss_of(module)), in_dims=(None, 0))
        actual, count = counts.of(function, parameters_of(module), x)
        assert count == (1, ITEMS, 0)
        near(actual, plainly(function, parameters_of(module), x), rtol=0.03)
        assert vmap(lambda x: module(x)[0])(x).dtype == dtype


def test_cells(counts):
    for cell in (fused_rnn.RNNCell(3, 4), fused_rnn.GRUCell(3, 4), fused_rnn.LSTMCell(3, 4)):
        x = torch.randn(ITEMS, 2, 3)
        function = vmap(lambda x, cell=cell: tuple(flat(cell(x))))
        with torch.no_grad():
            actual, count = counts.of(function, x)
        assert count == (1, 0, 0)
        near(actual, plainly(function, x))


def test_what_has_no_rule_is_plain(counts):
    module, x = fused_rnn.LSTM(INPUTS, HIDDEN), torch.randn(ITEMS, STEPS, 2, INPUTS)
    lengths, resets = torch.tensor([3, 7]), torch.rand(STEPS, 2) < 0.5
    everything = {
        "lengths": lambda: vmap(lambda x: module(x, lengths=lengths)[0])(x),
        "resets": lambda: vmap(lambda x: module(x, resets=resets)[0])(x),
        "states": lambda: vmap(lambda x: module(x, return_states=True)[2][1])(x),
        "float64": lambda: vmap(lambda x: copy.deepcopy(module).double()(x)[0])(x.double()),
        "forward mode": lambda: vmap(lambda x: jvp(lambda x: module(x)[0], (x,), (x,))[1])(x),
    }
    for name, call in everything.items():
        actual, count = counts.of(call)
        assert count[1] == 0 and count[2] > 0, name
        near(actual, plainly(call))


def test_errors_are_the_layers():
    module = fused_rnn.GRU(INPUTS, HIDDEN)
    with pytest.raises(RuntimeError, match="input"):
        vmap(lambda x: module(x)[0])(torch.randn(ITEMS, STEPS, 2, INPUTS + 1))
    hx = torch.randn(1, 3, HIDDEN)
    with pytest.raises(RuntimeError, match="hidden"):
        vmap(lambda x: module(x, hx)[0])(torch.randn(3, STEPS, 2, INPUTS))


def test_threads_give_the_same_bits(num_threads):
    module, x = fused_rnn.LSTM(64, 64), torch.randn(ITEMS, 30, 4, 64)
    function = vmap(grad(loss_of(module)), in_dims=(None, 0))
    results = []
    for threads in (1, 2):
        num_threads(threads)
        results.append(function(parameters_of(module), x))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
