"""Differentiation: any number of times, what is saved for it, and every way torch has of asking."""

import contextlib
import threading
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import fused_rnn
from fused_rnn import dispatch, testing
from fused_rnn.cells import CELLS, state_dtype
from fused_rnn.testing import LayerCase


def _cases(cell: str, timesteps: int = 3, batch_size: int = 2) -> list[LayerCase]:
    """Small ones of every kind: padded, bidirectional, packed, without bias, projected."""
    sizes = (timesteps, batch_size, 2, 3)
    lengths = [timesteps, *[timesteps - 1] * (batch_size - 1), 1]
    cases = [
        LayerCase(cell, *sizes),
        LayerCase(cell, *sizes, directions=2, bias=False),
        LayerCase.packed(cell, lengths, 2, 3, directions=2),
    ]
    if CELLS[cell].has_c:
        cases += [
            LayerCase(cell, *sizes, proj_size=2, bias=False),
            LayerCase.packed(cell, lengths, 2, 3, directions=2, proj_size=2),
        ]
    return cases


def _params(dtype: torch.dtype, **sizes):
    return [
        pytest.param(replace(case, dtype=dtype), id=f"{cell}-{case}")
        for cell in CELLS
        for case in _cases(cell, **sizes)
    ]


every_case_float64 = pytest.mark.parametrize("case", _params(torch.float64))
every_backend = pytest.mark.parametrize("backend", testing.backends_on("cpu"))
every_case_float32 = pytest.mark.parametrize("case", _params(torch.float32, batch_size=3))
every_cell = pytest.mark.parametrize("cell", testing.TORCH_CELLS)


@pytest.fixture
def supported(request):
    """Forces the test's backend, or skips the test where that cannot take the test's case."""
    backend, case = request.getfixturevalue("backend"), request.getfixturevalue("case")
    if reason := testing.refusal(backend, testing.make_inputs(case)):
        pytest.skip(reason)
    with fused_rnn.backend(backend):
        yield


def _function_of(inputs: testing.LayerInputs):
    """The layer as a function of all its tensors, in the order of `inputs.tensors`."""

    def function(*tensors: Tensor):
        values = iter(tensors)
        return testing.run_layer(inputs.map(lambda _: next(values)))

    return function, list(inputs.tensors.values())


def _modules(cell: str, *sizes: int, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """torch.nn's module in float64, and ours with parameters of its own and the same values."""
    name, _, nonlinearity = cell.partition("_")
    if nonlinearity:
        options["nonlinearity"] = nonlinearity
    torch.manual_seed(1)
    theirs = getattr(torch.nn, name.upper())(*sizes, dtype=torch.float64, **options)
    ours = getattr(fused_rnn, name.upper())(*sizes, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def _loss(outputs) -> Tensor:
    """A scalar that every output, the states included, has its own part in."""
    y, states = outputs
    states = states if isinstance(states, tuple) else (states,)
    return sum((part.sin() * (i + 1)).sum() for i, part in enumerate((y, *states)))


def _compare(actual, expected, names=None):
    names = names or [str(i) for i in range(len(expected))]
    testing.assert_same_numbers(
        dict(zip(names, actual, strict=True)), dict(zip(names, expected, strict=True))
    )


@every_case_float64
def test_gradcheck(case):
    function, tensors = _function_of(testing.make_inputs(case).leaves())
    assert gradcheck(function, tensors)


@pytest.mark.parametrize(
    "fast_mode", [pytest.param(True, id="projected"), pytest.param(False, marks=pytest.mark.slow)]
)
@every_case_float64
def test_gradgradcheck(case, fast_mode):
    """In fast mode along one random direction of each tensor, else along every axis."""
    function, tensors = _function_of(testing.make_inputs(case).leaves())
    assert gradgradcheck(function, tensors, fast_mode=fast_mode)


@every_backend
@every_case_float32
def test_backward_twice(supported, backend, case):
    """retain_graph: the same gradients again, bit for bit."""
    inputs = testing.make_inputs(case).leaves()
    outputs = testing.run_layer(inputs)
    cotangents = list(testing.make_cotangents(case).values())
    tensors = list(inputs.tensors.values())
    first = torch.autograd.grad(outputs, tensors, cotangents, retain_graph=True)
    # One that asks differently, in between.
    torch.autograd.grad(outputs[0].sum(), [inputs.x], retain_graph=True)
    second = torch.autograd.grad(outputs, tensors, cotangents)
    for name, a, b in zip(inputs.tensors, first, second, strict=True):
        assert torch.equal(a, b), name


def test_backward_after_the_graph_is_freed_is_torchs_error():
    y, _ = fused_rnn.GRU(2, 3)(torch.randn(4, 1, 2))
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.fixture
def backward_calls():
    """What `layer_backward` of any backend is asked for and gives: (needs, result) per call."""
    calls = []

    def recorded(original):
        def layer_backward(problem, grads, inputs, saved, needs):
            result = original(problem, grads, inputs, saved, needs)
            calls.append((needs, result))
            return result

        return layer_backward

    with contextlib.ExitStack() as patches:
        for b in dispatch.BACKENDS.values():
            patches.enter_context(
                mock.patch.object(b, "layer_backward", recorded(b.layer_backward))
            )
        yield calls


@every_backend
@every_case_float32
def test_only_what_asks_gets_a_gradient(supported, backend, case, backward_calls):
    """One tensor at a time, and then all but one; nothing is computed for the others."""
    names = list(testing.make_inputs(case).tensors)
    complete = testing.make_inputs(case).leaves()
    cotangents = list(testing.make_cotangents(case).values())
    expected = dict(
        zip(
            names,
            torch.autograd.grad(
                testing.run_layer(complete), list(complete.tensors.values()), cotangents
            ),
            strict=True,
        )
    )
    choices = [{name} for name in names] + [set(names) - {name} for name in names]
    for asking in choices:
        backward_calls.clear()
        inputs = testing.make_inputs(case)
        for name in asking:
            inputs.tensors[name].requires_grad_()
        torch.autograd.backward(testing.run_layer(inputs), cotangents)
        for name, tensor in inputs.tensors.items():
            assert (tensor.grad is not None) == (name in asking), (asking, name)
            if name in asking:
                testing.assert_same_numbers({name: tensor.grad}, {name: expected[name]}, 32)
        [(needs, result)] = backward_calls
        has_c = inputs.c0 is not None
        flat = [needs.x, needs.h0, *([needs.c0] if has_c else []), *needs.weights]
        assert flat == [name in asking for name in names]
        given = [result.x, result.h0, *([result.c0] if has_c else []), *result.weights]
        assert [g is not None for g in given] == flat, asking
        if not has_c:
            assert result.c0 is None


def test_frozen_parameters_of_a_module_stay_without_gradient():
    layer = fused_rnn.LSTM(3, 4, num_layers=2, bidirectional=True)
    frozen = {"weight_hh_l0", "bias_ih_l1_reverse"}
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    _loss(layer(torch.randn(5, 2, 3))).backward()
    assert {n for n, p in layer.named_parameters() if p.grad is None} == frozen


def _strided(t: Tensor) -> Tensor:
    """The same numbers with others between them."""
    return torch.stack((t, torch.full_like(t, 77)), -1)[..., 0] if t.is_floating_point() else t


def _turned(t: Tensor) -> Tensor:
    """The same numbers in memory from the last dimension to the first."""
    order = range(t.dim() - 1, -1, -1)
    return t.permute(*order).contiguous().permute(*order)


@pytest.mark.parametrize("order", [_strided, _turned])
@every_backend
@every_case_float32
def test_saved_tensors_may_come_back_in_another_order(supported, backend, case, order):
    inputs = testing.make_inputs(case).leaves()
    leaves = list(inputs.tensors.values())

    def gradients(create_graph=False):
        y, *states = testing.run_layer(inputs)
        loss = _loss((y, tuple(states)))
        return torch.autograd.grad(loss, leaves, create_graph=create_graph)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, order):
        torch.testing.assert_close(gradients(), expected)
        torch.testing.assert_close(gradients(create_graph=True), expected)


@pytest.mark.parametrize("order", [_strided, _turned])
@pytest.mark.parametrize("option", ["recurrent_dropout", "zoneout", "layer_norm"])
def test_masks_of_a_regularised_layer_may_come_back_in_another_order(option, order):
    layer = fused_rnn.GRU(4, 5, **{option: True if option == "layer_norm" else 0.3})
    x = torch.randn(6, 7, 4)

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, order):
        torch.testing.assert_close(gradients(), expected)


@every_backend
@every_case_float32
def test_inference_saves_nothing(supported, backend, case):
    chosen = dispatch.BACKENDS[backend]
    packed_tensors = []
    for mode in (torch.no_grad, torch.inference_mode):
        inputs = testing.make_inputs(case).leaves()
        with (
            mode(),
            mock.patch.object(chosen, "layer_forward", wraps=chosen.layer_forward) as forward,
            torch.autograd.graph.saved_tensors_hooks(packed_tensors.append, lambda _: None),
        ):
            outputs = torch.ops.fused_rnn.layer_forward(*inputs.forward_args(False, backend))
            outputs_of_layer = testing.run_layer(inputs)
        assert forward.call_count == 2
        assert [call.args[-1] for call in forward.call_args_list] == [False, False]
        gates, cells = outputs[3:]
        assert gates.numel() == cells.numel() == 0
        assert not any(o.requires_grad for o in (*outputs, *outputs_of_layer))
    assert packed_tensors == []


@every_backend
@every_case_float32
def test_nothing_is_saved_when_nothing_asks_for_a_gradient(supported, backend, case):
    chosen = dispatch.BACKENDS[backend]
    with mock.patch.object(chosen, "layer_forward", wraps=chosen.layer_forward) as forward:
        testing.run_layer(testing.make_inputs(case))
    assert forward.call_args.args[-1] is False


@every_backend
@every_case_float32
def test_what_is_saved_for_backward(supported, backend, case):
    """The inputs, the output, the gates the cell's table names, and c; nothing else."""
    inputs = testing.make_inputs(case).leaves()
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = testing.run_layer(inputs)[0]
    given = list(inputs.tensors.values())
    given += [] if inputs.batch_sizes is None else [inputs.batch_sizes]

    def same_memory(a, b):
        return a.data_ptr() == b.data_ptr() and a.shape == b.shape

    made = [t for t in saved if not any(same_memory(t, g) for g in given)]
    assert len(saved) - len(made) == len(given)
    cell, count = CELLS[case.cell], y.shape[:-1].numel()
    per_row = case.directions * case.hidden_size
    expected = [y.numel(), count * per_row * cell.saved_gates, count * per_row * cell.has_c]
    assert sorted(t.numel() for t in made) == sorted(expected)
    assert all(t.dtype in (case.dtype, state_dtype(case.dtype)) for t in made)
    assert any(same_memory(t, y) for t in made)


@every_cell
@pytest.mark.parametrize("which", ["x", "h0", "w_ih", "w_hh", "b_ih", "y"])
def test_changing_what_backward_needs_raises(cell, which):
    inputs = testing.make_inputs(LayerCase(cell, 3, 2, 4, 5)).leaves()
    outputs = testing.run_layer(inputs)
    with torch.no_grad():
        (outputs[0] if which == "y" else inputs.tensors[which]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward([o.sum() for o in outputs])


@every_cell
def test_changing_final_states_is_allowed(cell):
    """Truncated training detaches and zeroes states in place; backward does not need them."""
    case = LayerCase(cell, 3, 2, 4, 5)
    expected = testing.results_and_grads(
        testing.run_layer, testing.make_inputs(case).leaves(), testing.make_cotangents(case, "y")
    )
    inputs = testing.make_inputs(case).leaves()
    y, *states = testing.run_layer(inputs)
    for state in states:
        state.detach_().zero_()
    y.backward(testing.make_cotangents(case)["y"])
    for name, tensor in inputs.tensors.items():
        assert torch.equal(tensor.grad, expected[f"grad {name}"]), name


@every_cell
@pytest.mark.parametrize("bidirectional", [False, True])
def test_double_backward_of_inputs_that_depend_on_each_other(cell, bidirectional):
    """h0 (and c0) computed from x: each path is counted once."""
    theirs, ours = _modules(cell, 3, 4, bidirectional=bidirectional)
    mix = torch.randn(3, 4, dtype=torch.float64)
    leaf = torch.randn(5, 2, 3, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        x = leaf.clone().requires_grad_()
        h0 = (x.mean(0) @ mix).tanh().expand(2 if bidirectional else 1, 2, 4)
        hx = (h0, 2 * h0) if cell == "lstm" else h0
        weights = list(module.parameters())
        first = torch.autograd.grad(_loss(module(x, hx)), [x, h0, *weights], create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(penalty, [x, *weights])
        results.append([*first, *second])
    _compare(results[1], results[0])


@every_cell
def test_third_derivative(cell):
    results = []
    for module in _modules(cell, 2, 3):
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 1, 2).requires_grad_()
        value, grads = _loss(module(x)), []
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            grads.append(grad)
            value = grad.square().sum()
        results.append(grads)
    _compare(results[1], results[0])


@every_cell
def test_training_with_a_gradient_penalty(cell):
    theirs, ours = _modules(cell, 3, 4, num_layers=2)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        for _ in range(5):
            inputs = x.clone().requires_grad_()
            value = _loss(module(inputs))
            (grad,) = torch.autograd.grad(value, inputs, create_graph=True)
            optimizer.zero_grad()
            (value + (grad.norm() - 1).square()).backward()
            optimizer.step()
    names = [name for name, _ in theirs.named_parameters()]
    _compare(list(ours.parameters()), list(theirs.parameters()), names)


def test_double_backward_of_packed_rows():
    results = []
    for module in _modules("lstm", 3, 4, bidirectional=True, proj_size=2):
        rows = [
            torch.arange(n * 3, dtype=torch.float64).view(n, 3).div(10).requires_grad_()
            for n in (2, 4, 1)
        ]
        packed = pack_sequence(rows, enforce_sorted=False)
        y, states = module(packed)
        first = torch.autograd.grad(_loss((y.data, states)), rows, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), [*rows, *module.parameters()]
        )
        results.append([*first, *second])
    _compare(results[1], results[0])


def _functional(module: torch.nn.Module):
    """(parameters, x) -> the loss."""

    def function(parameters, x):
        return _loss(torch.func.functional_call(module, parameters, (x,)))

    return function, {name: p.detach() for name, p in module.named_parameters()}


@every_cell
def test_func_grad(cell):
    theirs, ours = _modules(cell, 3, 4, bidirectional=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    function, parameters = _functional(ours)
    actual = torch.func.grad(function)(parameters, x)
    _loss(theirs(x)).backward()
    testing.assert_same_numbers(actual, {n: p.grad for n, p in theirs.named_parameters()})


@every_cell
def test_func_hessian_vector_product(cell):
    theirs, ours = _modules(cell, 2, 3)
    x, v = torch.randn(2, 4, 1, 2, dtype=torch.float64)
    actual = torch.func.jvp(torch.func.grad(lambda x: _loss(ours(x))), (x,), (v,))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(_loss(theirs(leaf)), leaf, create_graph=True)
    (product,) = torch.autograd.grad((grad * v).sum(), leaf)
    _compare(actual, (grad, product))


@every_cell
def test_vmap_over_inputs_and_per_sample_gradients(cell):
    theirs, ours = _modules(cell, 3, 4)
    batch = torch.randn(6, 5, 2, 3, dtype=torch.float64)
    y = torch.vmap(lambda x: ours(x)[0])(batch)
    _compare(y, [theirs(x)[0] for x in batch])

    function, parameters = _functional(ours)
    grads = torch.vmap(torch.func.grad(function), in_dims=(None, 0))(parameters, batch)
    for i, x in enumerate(batch):
        theirs.zero_grad()
        _loss(theirs(x)).backward()
        testing.assert_same_numbers(
            {name: grad[i] for name, grad in grads.items()},
            {name: p.grad for name, p in theirs.named_parameters()},
        )


@every_cell
def test_vmap_over_an_ensemble(cell):
    ensemble = [_modules(cell, 3, 4)[1] for _ in range(3)]
    with torch.no_grad():
        for i, module in enumerate(ensemble):
            for p in module.parameters():
                p.mul_(i + 1)
    stacked, _ = torch.func.stack_module_state(ensemble)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    y = torch.vmap(lambda parameters: torch.func.functional_call(ensemble[0], parameters, (x,))[0])(
        stacked
    )
    _compare(y, [module(x)[0] for module in ensemble])


def _directional_derivative(module, x, v):
    """By reverse mode twice: the gradient, with respect to u, of u's product with the Jacobian."""
    x = x.clone().requires_grad_()
    y = module(x)[0]
    u = torch.zeros_like(y, requires_grad=True)
    (product,) = torch.autograd.grad(y, x, u, create_graph=True)
    return torch.autograd.grad(product, u, v)[0]


@every_cell
def test_forward_mode(cell):
    theirs, ours = _modules(cell, 3, 4, num_layers=2, bidirectional=True)
    x, v = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    expected = _directional_derivative(theirs, x, v)
    with torch.no_grad():
        _, tangent = torch.func.jvp(lambda x: ours(x)[0], (x,), (v,))
    _compare([tangent], [expected])
    with forward_ad.dual_level():
        y, _ = ours(forward_ad.make_dual(x, v))
        primal, tangent = forward_ad.unpack_dual(y)
        _compare([primal.detach(), tangent.detach()], [theirs(x)[0].detach(), expected])


def test_forward_mode_of_packed_rows():
    theirs, ours = _modules("gru", 3, 4, bidirectional=True)
    batch_sizes = torch.tensor([3, 2, 2, 1])
    x, v = torch.randn(2, 8, 3, dtype=torch.float64)

    def rows_of(module):
        return lambda x: [module(PackedSequence(x, batch_sizes))[0].data]

    _, tangent = torch.func.jvp(lambda x: rows_of(ours)(x)[0], (x,), (v,))
    _compare([tangent], [_directional_derivative(rows_of(theirs), x, v)])


def test_anomaly_mode():
    layer = fused_rnn.LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    _loss(layer(x)).backward()
    plain = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    with torch.autograd.set_detect_anomaly(True):
        _loss(layer(x)).backward()
        for a, b in zip(layer.parameters(), plain, strict=True):
            assert torch.equal(a.grad, b)
        x[2, 1, 0] = float("nan")
        y, _ = layer(x)
        with (
            pytest.warns(UserWarning, match="Traceback of forward call"),
            pytest.raises(RuntimeError, match=r"'_Layer(Function)?Backward' returned nan"),
        ):
            y.sum().backward()


@every_cell
def test_hooks(cell):
    theirs, ours = _modules(cell, 3, 4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        seen = []
        leaf = x.clone().requires_grad_()
        inputs = leaf * 1
        inputs.register_hook(lambda g: 2 * g)
        y, states = module(inputs)
        y.retain_grad()
        y.register_hook(lambda g: g + 1)
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p))
        _loss((y, states)).backward()
        assert len(seen) == len(list(module.parameters()))
        results.append([leaf.grad, y.grad, *(p.grad for p in module.parameters())])
    _compare(results[1], results[0])


def test_full_backward_hook_sees_the_gradients():
    theirs, ours = _modules("gru", 3, 4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    results = []
    for module in (theirs, ours):
        seen = []
        module.register_full_backward_hook(
            lambda m, grad_in, grad_out, seen=seen: seen.extend([*grad_in, *grad_out])
        )
        _loss(module(x.clone().requires_grad_())).backward()
        results.append(seen)
    assert len(results[0]) == 3
    _compare(results[1], results[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    layer = fused_rnn.GRU(3, 4, num_layers=2, dropout=0.5)
    x = torch.randn(5, 2, 3, requires_grad=True)
    torch.manual_seed(2)
    expected = torch.autograd.grad(layer(x)[0].square().sum(), [x, *layer.parameters()])
    torch.manual_seed(2)
    y = checkpoint(lambda x: layer(x)[0], x, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for a, b in zip((x, *layer.parameters()), expected, strict=True):
        assert torch.equal(a.grad, b)


@every_cell
def test_inference_mode(cell):
    _, ours = _modules(cell, 3, 4)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with torch.inference_mode():
        y, _ = ours(x)
    assert y.is_inference()
    _compare([y], [ours(x)[0].detach()])
    with torch.inference_mode():
        inference_x = x.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        ours(inference_x)
    with torch.no_grad():
        _compare([ours(inference_x)[0]], [y])


@every_backend
def test_several_python_threads_at_a_time(backend):
    """No state is shared between calls: each thread gets what it gets alone."""
    cases = [
        case
        for cell in CELLS
        for case in _cases(cell, timesteps=9, batch_size=5)
        if testing.refusal(backend, testing.make_inputs(case)) is None
    ]
    if not cases:
        pytest.skip(f"{backend}: takes none of the cases")

    def run(case):
        with fused_rnn.backend(backend):
            return testing.results_and_grads(
                testing.run_layer,
                testing.make_inputs(case).leaves(),
                testing.make_cotangents(case),
            )

    expected = [run(case) for case in cases]
    results = [[] for _ in range(4)]
    start = threading.Barrier(len(results))

    def work(mine):
        start.wait()
        for _ in range(5):
            mine.append([run(case) for case in cases])

    threads = [threading.Thread(target=work, args=(mine,)) for mine in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in results:
        assert len(mine) == 5
        for again in mine:
            for actual, alone in zip(again, expected, strict=True):
                testing.assert_same_numbers(actual, alone, roundings=32)


def test_gradients_that_nothing_flows_into_are_none():
    """A loss that does not depend on the layer leaves it alone."""
    layer = fused_rnn.LSTM(2, 3)
    x = torch.randn(4, 1, 2, requires_grad=True)
    y, _ = layer(x)
    grads = torch.autograd.grad(y.sum() * 0 + x.sum(), [x])
    assert torch.equal(grads[0], torch.ones_like(x))
    other = torch.ones(1, requires_grad=True)
    assert torch.autograd.grad(y.sum(), [other], allow_unused=True) == (None,)


def test_outputs_are_differentiable_only_where_they_should_be():
    inputs = testing.make_inputs(LayerCase("lstm", 3, 2, 4, 5)).leaves()
    *outputs, gates, cells = torch.ops.fused_rnn.layer_forward(
        *inputs.forward_args(True, "reference")
    )
    assert all(o.requires_grad for o in outputs)
    assert not gates.requires_grad and not cells.requires_grad
