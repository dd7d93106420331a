"""The operators as compilers see them: registration, fake implementations, torch.compile."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers.needs import skip_unless_supported
from torch.library import opcheck

from fused_rnn import testing
from fused_rnn.cells import CELLS, equal_parts, state_dtype
from fused_rnn.layer_call import BackwardCall, LayerCall
from fused_rnn.testing import LayerCase

forward = torch.ops.fused_rnn.layer_forward.default
backward = torch.ops.fused_rnn.layer_backward.default


def _cases(cell: str) -> list[LayerCase]:
    cases = [
        LayerCase(cell, 4, 3, 5, 6),
        LayerCase(cell, 1, 2, 3, 4, directions=2, bias=False),
        LayerCase(cell, 3, 0, 3, 4),
        LayerCase.packed(cell, [4, 2, 1], 5, 6, directions=2),
        LayerCase(cell, 4, 3, 2, 5, directions=2, ends=(2, 4, 0), resets=True, reset_states=True),
    ]
    if CELLS[cell].has_c:
        cases += [
            LayerCase(cell, 4, 3, 5, 6, proj_size=2, directions=2),
            LayerCase.packed(cell, [4, 2, 1], 5, 6, proj_size=2, bias=False),
            LayerCase(cell, 3, 2, 2, 5, directions=2, ends=(3, 1), states=True),
        ]
    return cases


every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{cell}-{case}") for cell in CELLS for case in _cases(cell)]
)
every_backend = pytest.mark.parametrize("backend", testing.backends_on("cpu"))
# Schemas and fakes are one for all cells and backends: a fast run has some of their pairs.
_CHECKED = {"cpu": ("rnn_tanh", "gru", "lstm")}
every_backend_and_case = pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(
            backend,
            case,
            id=f"{backend}-{cell}-{case}",
            marks=() if cell in _CHECKED.get(backend, ("lstm",)) else pytest.mark.slow,
        )
        for backend in testing.backends_on("cpu")
        for cell in CELLS
        for case in _cases(cell)
    ],
)
every_cell = pytest.mark.parametrize("cell", CELLS)


def _forward_args(inputs: testing.LayerInputs, save: bool, backend: str) -> tuple:
    return inputs.forward_args(save, backend)


def _backward_args(case: LayerCase, inputs: testing.LayerInputs, needs: list[bool], backend: str):
    with torch.no_grad():
        y, _, _, gates, cells = forward(*_forward_args(inputs, True, backend))
    grads = testing.make_cotangents(case)
    return inputs.backward_args(grads, (y, gates, cells), needs, backend)


def _needs_choices(inputs: testing.LayerInputs) -> list[list[bool]]:
    given, count = inputs.given, len(inputs.weights)
    return [
        given,
        [False, True, *[False] * 3, *[i % 2 == 0 for i in range(count)]],
        [True, False, given[2], False, given[4], *[False] * count],
    ]


def test_calls_have_the_order_of_the_schemas():
    names, backward_names = (
        tuple(argument.name for argument in operator._schema.arguments)
        for operator in (forward, backward)
    )
    assert LayerCall._fields == names
    assert BackwardCall.of(*backward_names).arguments == backward_names
    options = names.index("weights") + 1  # the names stand for the tensors, w for the weights
    call = LayerCall(*names[: options - 1], ["w"], *names[options:])
    assert LayerCall.joined(*call.apart()) == call
    assert call.at(call.differentiable) == call


@every_backend_and_case
@pytest.mark.parametrize(
    "requires_grad", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True)]
)
def test_opcheck_forward(backend, case, requires_grad):
    inputs = testing.make_inputs(case)
    skip_unless_supported(backend, inputs)
    for save in (True, False):
        inputs = testing.make_inputs(case)
        inputs = inputs.leaves() if requires_grad else inputs
        opcheck(forward, _forward_args(inputs, save, backend))


@every_backend
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("save", [True, False])
def test_states_of_another_batch(backend, batch, save):
    """4 steps of 2 rows are not 2 steps of 4, nor 8 of one."""
    inputs = testing.make_inputs(LayerCase("gru", 4, 2, 5, 6))
    skip_unless_supported(backend, inputs)
    inputs = replace(inputs, h0=torch.zeros(1, batch, 6))
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"h0: .* batch of 2 .*, got {batch}"):
        forward(*_forward_args(inputs, save, backend))


@every_backend_and_case
@pytest.mark.parametrize(
    "which", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_opcheck_backward(backend, case, which):
    """Of some needs; what the fake implementation says of all of them is looked at below."""
    inputs = testing.make_inputs(case)
    skip_unless_supported(backend, inputs)
    needs = _needs_choices(inputs)[which]
    opcheck(backward, _backward_args(case, inputs, needs, backend))


def _on_meta(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta")
    if isinstance(value, (list, tuple)):
        return type(value)(_on_meta(item) for item in value)
    return value


def _same_looks(fake: torch.Tensor, real: torch.Tensor):
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


# float16 stands for the half types: states are kept in float32, and so is what is saved of c.
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])


def _fake_and_real(operator, args):
    return zip(operator(*_on_meta(args)), operator(*args), strict=True)


def _check_fakes(backend: str, case: LayerCase, inputs: testing.LayerInputs):
    skip_unless_supported(backend, inputs)
    for save in (True, False):
        for fake, real in _fake_and_real(forward, _forward_args(inputs, save, backend)):
            assert fake.is_meta
            _same_looks(fake, real)
    likes = inputs.differentiable
    for needs in _needs_choices(inputs):
        args = _backward_args(case, inputs, needs, backend)
        pairs = _fake_and_real(backward, args)
        for (fake, real), like, need in zip(pairs, likes, needs, strict=True):
            _same_looks(fake, real)
            assert not need or (real.shape, real.dtype) == (like.shape, like.dtype)
            assert need or real.shape == (0,)


@every_backend
@every_case
@every_dtype
def test_fakes_look_like_the_real_ones(backend, case, dtype):
    case = replace(case, dtype=dtype)
    _check_fakes(backend, case, testing.make_inputs(case))


LAYOUTS = {
    "with gaps": lambda t: torch.stack((t, t), -1)[..., 0],
    "turned": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
}


@every_backend
@every_cell
@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_where_nothing_is_contiguous(backend, cell, dtype, layout):
    case = LayerCase(cell, 4, 3, 5, 6, directions=2, dtype=dtype)
    inputs = testing.make_inputs(case).map(LAYOUTS[layout])
    assert not inputs.h0.is_contiguous()
    _check_fakes(backend, case, inputs)


@every_backend
@pytest.mark.parametrize("cell", ["gru", "gru_reset_before", "lstm"])
@pytest.mark.parametrize("bias", [True, False])
@every_dtype
def test_fakes_with_peepholes_and_gains(backend, cell, bias, dtype):
    """Which are in the states' dtype."""
    case = LayerCase(cell, 4, 3, 5, 6, directions=2, bias=bias, dtype=dtype)
    inputs, has_c = testing.make_inputs(case), CELLS[cell].has_c
    gains = 2 * CELLS[cell].gates * 6 + has_c * 6 * (1 + bias)
    weights = []
    for own in equal_parts(inputs.weights, 2):
        peepholes = [torch.randn(3 * 6)] if has_c else []
        others = [*peepholes, torch.randn(gains)]
        weights += [*own, *(other.to(state_dtype(dtype)) for other in others)]
    _check_fakes(backend, case, replace(inputs, weights=weights))


@every_backend
@every_case
def test_outputs_share_no_memory(backend, case):
    """Operators must not return their inputs, nor one memory twice."""
    inputs = testing.make_inputs(case)
    skip_unless_supported(backend, inputs)
    args = _forward_args(inputs, True, backend)
    needs = _needs_choices(inputs)[0]
    results = [*forward(*args), *backward(*_backward_args(case, inputs, needs, backend))]
    tensors = [t for t in (*results, *inputs.tensors.values()) if t.numel()]
    for a, b in itertools.combinations(tensors, 2):
        assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@every_cell
def test_meta_module(cell):
    """Shapes without computing, as for a model too large to build twice."""
    options = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bidirectional": True}
    real = testing.make_module(cell, **options)
    meta = testing.make_module(cell, device="meta", **options)
    x = torch.randn(5, 2, 3)
    real_y, real_states = real(x)
    y, states = meta(x.to("meta"))
    assert y.is_meta
    _same_looks(y, real_y)
    for fake, state in zip(states, real_states, strict=True):
        assert fake.shape == state.shape
    y.sum().backward()
    for name, p in meta.named_parameters():
        assert p.grad.is_meta and p.grad.shape == p.shape, name


@every_cell
def test_fake_mode(cell):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        layer = testing.make_module(cell, input_size=3, hidden_size=4)
        y, _ = layer(torch.randn(5, 2, 3))
        y.sum().backward()
        assert y.shape == (5, 2, 4) and layer.weight_hh_l0.grad.shape == layer.weight_hh_l0.shape


class _Model(torch.nn.Module):
    """Something around the layer, which a compiler may fuse or reorder."""

    def __init__(self, cell: str, **options):
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 3)
        self.layer = testing.make_module(cell, input_size=3, hidden_size=4, **options)
        self.head = torch.nn.Linear(4 * (2 if options.get("bidirectional") else 1), 2)

    def forward(self, tokens):
        y, states = self.layer(self.embedding(tokens).relu())
        states = states if isinstance(states, tuple) else (states,)
        return self.head(y), [state.tanh() for state in states]


def _step(model, tokens) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits, states = model(tokens)
    (logits.square().sum() + sum(s.sum() for s in states)).backward()
    results = {name: p.grad.clone() for name, p in model.named_parameters()}
    return results | {"logits": logits.detach(), "state": states[0].detach()}


@every_cell
def test_compile(cell):
    """One graph, forward and backward, with the layer as a node of it."""
    torch._dynamo.reset()
    model = _Model(cell, num_layers=2)
    tokens = torch.randint(7, (5, 2))
    expected = _step(model, tokens)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    testing.assert_same_numbers(
        {name.removeprefix("_orig_mod."): t for name, t in _step(compiled, tokens).items()},
        expected,
        roundings=32,
    )
    [graph] = graphs
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("layer_forward" in target for target in targets) == 2
    with torch.no_grad():
        testing.assert_same_numbers(
            {"logits": compiled(tokens)[0]}, {"logits": expected["logits"]}, roundings=32
        )


@pytest.mark.slow
@every_cell
@pytest.mark.parametrize("bidirectional", [False, True])
def test_compile_with_changing_sizes(cell, bidirectional):
    torch._dynamo.reset()
    model = _Model(cell, bidirectional=bidirectional)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((5, 2), (3, 4), (8, 3)):
        tokens = torch.randint(7, shape)
        expected = _step(model, tokens)
        actual = {n.removeprefix("_orig_mod."): t for n, t in _step(compiled, tokens).items()}
        testing.assert_same_numbers(actual, expected, roundings=32)


@pytest.mark.slow
@every_cell
def test_compile_packed(cell):
    torch._dynamo.reset()
    layer = testing.make_module(cell, input_size=3, hidden_size=4, bidirectional=True)
    batch_sizes = torch.tensor([3, 2, 1])
    x = torch.randn(6, 3)

    def run(function):
        leaf = x.clone().requires_grad_()
        y = function(leaf, batch_sizes)
        y.square().sum().backward()
        return {"y": y.detach(), "grad x": leaf.grad}

    def function(x, batch_sizes):
        return layer(torch.nn.utils.rnn.PackedSequence(x, batch_sizes))[0].data

    compiled = torch.compile(function, backend="aot_eager")
    testing.assert_same_numbers(run(compiled), run(function), roundings=32)


@every_cell
def test_export(cell):
    """torch.export keeps the layer as one operator, and the program gives the same results."""
    model = _Model(cell).eval()
    tokens = torch.randint(7, (5, 2))
    program = torch.export.export(model, (tokens,))
    assert "fused_rnn.layer_forward" in str(program.graph)
    with torch.no_grad():
        logits, _ = program.module()(tokens)
        torch.testing.assert_close(logits, model(tokens)[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("given", [False, True])
def test_opcheck_inference_of_a_module(cell, given):
    layers, directions, spec = 2, 2, CELLS[cell]
    weights = [
        torch.randn(shape)
        for width in (3, 10)
        for _ in range(directions)
        for shape in ((spec.gates * 5, width), (spec.gates * 5, 5))
    ]
    h0, c0 = (torch.randn(layers * directions, 7, 5) if wanted and given else None
              for wanted in (True, spec.has_c))  # fmt: skip
    operator = torch.ops.fused_rnn.infer_layers.default
    for x in (torch.randn(6, 7, 3), torch.randn(7, 6, 3).transpose(0, 1)):
        opcheck(operator, (x, h0, c0, weights, cell, layers, True))
