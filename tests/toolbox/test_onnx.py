"""torch.onnx.export: standard operators with dynamic axes, which ONNX Runtime runs to the same
numbers."""

from __future__ import annotations

import io

import pytest
import torch
from helpers.outcomes import flat
from toolkit import Inputs, Maker, near, with_and_without_hx

import fused_rnn
from fused_rnn import export

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytestmark = [
    pytest.mark.costly,
    pytest.mark.filterwarnings("ignore"),  # the exporter's own deprecations
    pytest.mark.skipif(torch.__version__ < "2.11", reason="the exporter of torch 2.10 was not run"),
]

SHAPES = ((6, 4), (7, 3), (1, 1), (2, 9))  # T, B


def dynamic_shapes(module, with_hx: bool):
    if isinstance(module, torch.nn.RNNCellBase):
        states = {0: "B"}
        shapes = [{0: "B"}]
    else:
        states = {1: "B"}
        shapes = [{0: "B", 1: "T"} if module.batch_first else {0: "T", 1: "B"}]
    if with_hx:
        shapes.append((states, states) if "LSTM" in module._get_name() else states)
    return tuple(shapes)


def exported(module, with_hx: bool = False):
    args = Inputs(module, with_hx).args
    shapes = dynamic_shapes(module, with_hx)
    program = torch.onnx.export(module, args, dynamo=True, dynamic_shapes=shapes, verbose=False)
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program.model_proto


def recurrent_nodes(model) -> list:
    assert {node.domain for node in model.graph.node} == {""}, "a custom operator"
    assert not model.functions
    types = [node.op_type for node in model.graph.node]
    assert not {"Loop", "Scan", "If"} & set(types)
    return [node for node in model.graph.node if node.op_type in ("LSTM", "GRU", "RNN")]


def same_in_runtime(model, module, with_hx: bool) -> None:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for timesteps, batch in SHAPES:
        args = Inputs(module, with_hx, timesteps, batch).args
        names = [value.name for value in session.get_inputs()]
        given = {n: t.numpy() for n, t in zip(names, flat(args), strict=True)}
        results = [torch.from_numpy(array) for array in session.run(None, given)]
        with torch.no_grad():
            near(results, module(*args))


OPTIONS = [
    pytest.param({}, id="plain", marks=pytest.mark.slow),
    pytest.param({"num_layers": 2, "bidirectional": True}, id="bidirectional-2"),
    pytest.param(
        {"bias": False, "batch_first": True, "bidirectional": True},
        id="no_bias",
        marks=pytest.mark.slow,
    ),
]


@with_and_without_hx
@pytest.mark.parametrize("options", OPTIONS)
def test_layers(layer, options, with_hx, make):
    module = make(layer, **options).eval()
    model = exported(module, with_hx)
    nodes = recurrent_nodes(model)
    kind = layer.split("_")[0].upper()
    assert [node.op_type for node in nodes] == [kind] * options.get("num_layers", 1)
    same_in_runtime(model, module, with_hx)


def test_weights_are_constants_of_the_node(make):
    """Reordered in advance: nothing but the batch's shape is computed around a node."""
    model = exported(make("lstm"), with_hx=True)
    [node] = recurrent_nodes(model)
    constants = {tensor.name for tensor in model.graph.initializer}
    assert set(node.input[1:4]) <= constants


@with_and_without_hx
def test_cells(cell, with_hx, make):
    module = make(cell)
    model = exported(module, with_hx)
    same_in_runtime(model, module, with_hx)


@pytest.mark.parametrize(
    "options", [{}, {"proj_size": 3, "bidirectional": True, "bias": False}], ids=["plain", "both"]
)
def test_peepholes(options):
    """Which ONNX's LSTM has."""
    module = fused_rnn.LSTM(4, 5, peepholes=True, **options).eval()
    for name, parameter in module.named_parameters():
        if "peephole" in name:  # zeros at first
            torch.nn.init.normal_(parameter)
    model = exported(module, with_hx=True)
    assert len(recurrent_nodes(model)) == 1
    same_in_runtime(model, module, with_hx=True)


@pytest.mark.parametrize("of", ["module", "program"])
@pytest.mark.parametrize("options", [{"layer_norm": True}, {"zoneout": 0.3}], ids=str)
def test_what_onnx_has_no_recurrence_for(options, of):
    """Step after step, for one number of timesteps."""
    module = fused_rnn.GRU(4, 5, bidirectional=True, **options).eval()
    args, sizes = (torch.randn(6, 3, 4),), {"T": torch.export.Dim("T"), "B": torch.export.Dim("B")}

    def export_with(shapes):
        if of == "module":
            return torch.onnx.export(
                module, args, dynamo=True, dynamic_shapes=shapes, verbose=False
            )
        program = torch.export.export(module, args, dynamic_shapes=shapes)
        program = program.run_decompositions(export.onnx_operators())
        return torch.onnx.export(program, dynamo=True, verbose=False)

    model = export_with(({1: sizes["B"]},)).model_proto
    assert not recurrent_nodes(model)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = torch.randn(6, 8, 4)
    results = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        near([torch.from_numpy(array) for array in results], module(x))
    with pytest.raises(Exception, match="expected a fixed number of timesteps"):
        export_with(({0: sizes["T"]},))


class WithLengths(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths, hx):
        return self.layer(x, hx, lengths=lengths)


def test_lengths(layer):
    """As the operator's sequence_lens, rows of no steps and the reverse direction included."""
    module = Maker(fused_rnn)(layer, bidirectional=True)
    time, batch = "T", "B"
    states = {1: batch}
    shapes = (
        {0: time, 1: batch},
        {0: batch},
        (states, states) if layer.startswith("lstm") else states,
    )
    model = WithLengths(module).eval()
    x, hx = Inputs(module, True).args
    args = (x, torch.tensor([3, 6, 0, 1, 6, 2, 5]), hx)
    program = torch.onnx.export(model, args, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert len(recurrent_nodes(program.model_proto)) == 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    x, hx = Inputs(module, True, 8, 4).args
    args = (x, torch.tensor([0, 8, 5, 1]), hx)
    given = {n: t.numpy() for n, t in zip(names, flat(args), strict=True)}
    results = [torch.from_numpy(array) for array in session.run(None, given)]
    with torch.no_grad():
        near(results, model(*args))


def test_reset_gate_before_the_product():
    module = fused_rnn.GRU(3, 5, bidirectional=True, reset_after=False).eval()
    model = exported(module, with_hx=True)
    [node] = recurrent_nodes(model)
    assert not [a for a in node.attribute if a.name == "linear_before_reset" and a.i]
    same_in_runtime(model, module, with_hx=True)


class Tagger(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 3)
        self.encoder = make("gru", num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.head = torch.nn.Linear(10, 7)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens))[0])


def test_inside_a_model(make):
    model = Tagger(make).eval()
    tokens = torch.randint(11, (4, 6))
    shapes = ({0: "B", 1: "T"},)
    program = torch.onnx.export(model, (tokens,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert len(recurrent_nodes(program.model_proto)) == 2
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    tokens = torch.randint(11, (3, 9))
    [result] = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    near(torch.from_numpy(result), model(tokens).detach())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype):
    """A model of another dtype exports; whether a runtime has kernels for it is its affair."""
    module = fused_rnn.LSTM(3, 5, dtype=dtype)
    x = torch.randn(6, 4, 3, dtype=dtype)
    model = torch.onnx.export(module, (x,), dynamo=True, verbose=False).model_proto
    onnx.checker.check_model(model, full_check=True)
    assert len(recurrent_nodes(model)) == 1


def test_program_exported_before():
    """A program that torch.export made, layers still as operators, on its way to ONNX."""
    module = fused_rnn.LSTM(3, 5, 2, bidirectional=True, proj_size=2).eval()
    shapes = ({0: torch.export.Dim("T"), 1: torch.export.Dim("B")},)
    program = torch.export.export(module, Inputs(module).args, dynamic_shapes=shapes)
    program = program.run_decompositions(export.onnx_operators())
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    assert len(recurrent_nodes(model)) == 2
    same_in_runtime(model, module, False)


def raised_by(call) -> str:
    """The messages of what `call` raises, down to the first cause."""
    with pytest.raises(Exception) as caught:
        call()
    messages, error = [], caught.value
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(messages)


def test_what_onnx_does_not_take():
    half = fused_rnn.GRU(3, 5, dtype=torch.bfloat16)
    x = torch.randn(6, 4, 3, dtype=torch.bfloat16)
    message = raised_by(lambda: torch.onnx.export(half, (x,), dynamo=True, verbose=False))
    assert "ONNX's GRU takes float16, float32 and float64, got torch.bfloat16" in message

    class Packed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = fused_rnn.GRU(3, 5)

        def forward(self, rows, batch_sizes):
            packed = torch.nn.utils.rnn.PackedSequence(rows, batch_sizes)
            return self.layer(packed)[0].data

    args = (torch.randn(5, 3), torch.tensor([3, 2]))
    message = raised_by(lambda: torch.onnx.export(Packed(), args, dynamo=True, verbose=False))
    assert "do not have a PackedSequence" in message


def test_bad_input_is_eager_modes_error():
    module = fused_rnn.GRU(3, 5)
    x = torch.randn(6, 4, 2)
    message = raised_by(lambda: torch.onnx.export(module, (x,), dynamo=True, verbose=False))
    assert "input.size(-1) must be equal to input_size. Expected 3, got 2" in message


def test_legacy_exporter(layer, make):
    """By way of a trace: torch.nn's operators, for which torch has a translation."""
    if layer == "lstm_proj":
        pytest.skip("torch's legacy exporter has no projection")

    class Model(torch.nn.Module):
        """torch's legacy exporter calls the model with every parameter of its forward."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    module = make(layer, num_layers=2, bidirectional=True).eval()
    file = io.BytesIO()
    torch.onnx.export(
        Model(module),
        Inputs(module).args, file, dynamo=False, input_names=["x"],
        dynamic_axes={"x": {0: "T", 1: "B"}},
    )  # fmt: skip
    model = onnx.load_from_string(file.getvalue())
    assert len(recurrent_nodes(model)) == 2
