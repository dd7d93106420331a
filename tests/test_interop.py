"""Weights of Keras and ONNX: the outputs are theirs, both ways."""

import os

import pytest
import torch

import fused_rnn
from fused_rnn.interop import keras as interop
from fused_rnn.interop.onnx_weights import OnnxNode, from_onnx, to_onnx

# Of Keras on torch itself, which hands numpy its tensors the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def keras(monkeypatch):
    """Keras on torch, unless something else has imported it with another backend."""
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    module = pytest.importorskip("keras", reason="keras is not installed", exc_type=ImportError)
    if module.backend.backend() != "torch":
        pytest.skip(f"keras runs on {module.backend.backend()} here, not on torch")
    module.utils.set_random_seed(0)
    return module


KERAS_LAYERS = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
    "rnn_tanh": ("SimpleRNN", {}),
    "rnn_relu": ("SimpleRNN", {"activation": "relu"}),
}
every_layer = pytest.mark.parametrize("kind", KERAS_LAYERS)


def keras_layer(keras, kind, units, bidirectional=False, inputs=None, **options):
    """A layer that returns everything; with `inputs`, built, every weight random."""
    name, extra = KERAS_LAYERS[kind]
    layer = getattr(keras.layers, name)(
        units, return_sequences=True, return_state=True, **extra, **options
    )
    if bidirectional:
        layer = keras.layers.Bidirectional(layer)
    if inputs is not None:
        layer.build((None, None, inputs))
        for weight in layer.weights:
            # Not as they are initialised: zero biases would hide where they go.
            weight.assign(keras.random.normal(weight.shape, stddev=0.4))
    return layer


def run_keras(layer, x):
    """output, and the states as ours come: [D, B, H] each."""
    with torch.no_grad():
        output, *states = (t.cpu() for t in layer(x))
    directions = 2 if type(layer).__name__ == "Bidirectional" else 1
    per_direction = len(states) // directions
    return output, [torch.stack(states[i::per_direction]) for i in range(per_direction)]


def assert_same(module, layer, x):
    expected, states = run_keras(layer, x)
    with torch.no_grad():
        output, final = module(x)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    for got, want in zip(final if isinstance(final, tuple) else [final], states, strict=True):
        torch.testing.assert_close(got, want, **TOLERANCE)


@every_layer
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("inputs", "units"), [(1, 1), (5, 17), (20, 3)])
def test_from_keras(keras, kind, bidirectional, use_bias, inputs, units):
    layer = keras_layer(keras, kind, units, bidirectional, inputs, use_bias=use_bias)
    module = interop.from_keras(layer)
    assert module.bias == use_bias and module.bidirectional == bidirectional
    assert_same(module, layer, torch.randn(3, 7, inputs))


@every_layer
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("biases", [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("built", [False, True])
def test_to_keras(keras, kind, bidirectional, biases, built):
    layer = keras_layer(keras, kind, 9, bidirectional, 4 if built else None, use_bias=biases[1])
    module = ours(kind, 4, 9, bias=biases[0], batch_first=True, bidirectional=bidirectional)
    assert interop.to_keras(module, layer) is layer
    assert_same(module, layer, torch.randn(2, 6, 4))
    again = interop.from_keras(layer)
    assert_same(again, layer, torch.randn(2, 6, 4))


def ours(kind, *sizes, **options):
    if kind == "lstm":
        return fused_rnn.LSTM(*sizes, **options)
    if kind == "lstm_peepholes":
        module = fused_rnn.LSTM(*sizes, peepholes=True, **options)
        for name, parameter in module.named_parameters():
            if "peephole" in name:  # zeros at first
                torch.nn.init.normal_(parameter)
        return module
    if kind.startswith("gru"):
        return fused_rnn.GRU(*sizes, reset_after=kind == "gru", **options)
    return fused_rnn.RNN(*sizes, nonlinearity=kind[4:], **options)


def test_a_mask_of_keras_is_lengths(keras):
    layer = keras_layer(keras, "gru", 5, inputs=3, zero_output_for_mask=True)
    x, lengths = torch.randn(3, 6, 3), torch.tensor([6, 2, 4])
    mask = torch.arange(6) < lengths.unsqueeze(1)
    with torch.no_grad():
        expected, state = layer(x, mask=mask)
        output, h_n = interop.from_keras(layer)(x, lengths=lengths)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    torch.testing.assert_close(h_n[0], state, **TOLERANCE)


def test_stateful_and_dtype_are_carried_over(keras):
    layer = keras_layer(keras, "lstm", 5, inputs=3, dtype="float64")
    module = interop.from_keras(layer)
    assert module.weight_ih_l0.dtype == torch.float64
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(module(x)[0], run_keras(layer, x)[0], rtol=1e-10, atol=1e-12)
    half = keras.layers.GRU(5, dtype="bfloat16", recurrent_initializer="glorot_uniform")
    half.build((None, None, 3))
    module = interop.from_keras(half)
    assert module.weight_hh_l0.dtype == torch.bfloat16
    update, reset, new = half.cell.recurrent_kernel.value.detach().t().chunk(3)
    assert torch.equal(module.weight_hh_l0, torch.cat((reset, update, new)))
    stateful = keras.layers.GRU(5, stateful=True)
    stateful.build((2, 4, 3))
    assert interop.from_keras(stateful).stateful


def refused_layers():
    def layer(name, **options):
        return lambda keras: getattr(keras.layers, name)(4, **options)

    def both(name, wrapper=(), **options):
        return lambda keras: keras.layers.Bidirectional(
            getattr(keras.layers, name)(4, **options), **dict(wrapper)
        )

    yield "activation", layer("LSTM", activation="relu"), "activation tanh, got 'relu'"
    yield "linear", layer("SimpleRNN", activation=None), "activation tanh or relu, got 'linear'"
    yield (
        "hard_sigmoid",
        layer("GRU", recurrent_activation="hard_sigmoid"),
        "recurrent_activation 'sigmoid', got 'hard_sigmoid'",
    )
    yield "recurrent_dropout", layer("LSTM", recurrent_dropout=0.2), "no recurrent_dropout, got 0.2"
    yield "dropout", layer("SimpleRNN", dropout=0.1), "no dropout, got 0.1"
    yield "go_backwards", layer("GRU", go_backwards=True), "go_backwards=True"
    yield (
        "backward_first",
        lambda keras: keras.layers.Bidirectional(
            keras.layers.GRU(4, go_backwards=True), backward_layer=keras.layers.GRU(4)
        ),
        "go_backwards=True",
    )
    yield "merge", both("LSTM", {"merge_mode": "sum"}), "merge_mode 'concat', got 'sum'"
    yield "inside", both("LSTM", recurrent_dropout=0.5), "no recurrent_dropout"


REFUSED = {name: (make, message) for name, make, message in refused_layers()}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_no_module_computes(keras, name):
    make, message = REFUSED[name]
    layer = make(keras)
    layer.build((None, None, 3))
    with pytest.raises(ValueError, match=message):
        interop.from_keras(layer)
    with pytest.raises(ValueError, match=message):
        interop.to_keras(fused_rnn.LSTM(3, 4, bidirectional=name in ("merge", "inside")), layer)


def test_bad_keras_arguments(keras):
    layers = keras.layers
    for wrong in (layers.Dense(3), layers.RNN(layers.LSTMCell(3)), torch.nn.LSTM(3, 4), None):
        with pytest.raises(TypeError, match="layer: expected keras"):
            interop.from_keras(wrong)
    with pytest.raises(ValueError, match="expected a built one"):
        interop.from_keras(layers.LSTM(3))
    mixed = layers.Bidirectional(
        layers.GRU(4, return_sequences=True),
        backward_layer=layers.GRU(4, go_backwards=True, use_bias=False, return_sequences=True),
    )
    with pytest.raises(ValueError, match="two directions alike"):
        interop.from_keras(mixed)
    to, lstm = interop.to_keras, fused_rnn.LSTM
    with pytest.raises(TypeError, match="module: expected an RNN"):
        to(torch.nn.Linear(3, 4), layers.LSTM(4))
    built = layers.LSTM(4)
    built.build((None, None, 5))
    for module, layer, message in (
        (lstm(3, 4, 2), layers.LSTM(4), "one layer, got num_layers=2"),
        (lstm(3, 4, proj_size=2), layers.LSTM(4), "no projection"),
        (lstm(3, 4), layers.LSTM(5), "expected 4 units, got 5"),
        (lstm(3, 4), layers.GRU(4), "equations of lstm"),
        (fused_rnn.GRU(3, 4), layers.GRU(4, reset_after=False), "equations of gru"),
        (lstm(3, 4), layers.LSTM(4, use_bias=False), "expected use_bias"),
        (lstm(3, 4, bidirectional=True), layers.LSTM(4), "a Bidirectional"),
        (lstm(3, 4), built, "input of 3 features, as the module, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            to(module, layer)


def test_without_keras(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "keras", None)
    with pytest.raises(ImportError, match="pip install keras"):
        interop.from_keras(None)


def run_onnx(node: OnnxNode, x, states):
    """Y [T, D, B, H], and Y_h, Y_c."""
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    values = {"X": x, "initial_h": states[0], **({"initial_c": states[1]} if states[1:] else {})}
    outputs = ["Y", "Y_h", "Y_c"][: 1 + len(states)]
    constants = {"W": node.W, "R": node.R} | ({} if node.B is None else {"B": node.B})
    inputs = ["X", "W", "R", "" if node.B is None else "B", "", *list(values)[1:]]
    if node.P is not None:
        constants["P"] = node.P
        inputs.append("P")
    graph = helper.make_graph(
        [helper.make_node(node.operator, inputs, outputs, **node.attributes)],
        "layer",
        [
            helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape)
            for n, v in values.items()
        ],
        [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(v.numpy(), n) for n, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {name: value.numpy() for name, value in values.items()})
    return [torch.from_numpy(value) for value in found]


every_node = pytest.mark.parametrize("kind", [*KERAS_LAYERS, "lstm_peepholes"])


@every_node
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_onnx_both_ways(kind, bidirectional, bias, layers):
    module = ours(kind, 5, 7, layers, bias=bias, bidirectional=bidirectional)
    directions = 1 + bidirectional
    x = torch.randn(6, 3, 5)
    states = [torch.randn(layers * directions, 3, 7) for _ in range(1 + kind.startswith("lstm"))]
    with torch.no_grad():
        expected, final = module(x, tuple(states) if states[1:] else states[0])
    nodes = to_onnx(module)
    assert len(nodes) == layers
    again, found = x, []
    for i, node in enumerate(nodes):
        given = [s[i * directions : (i + 1) * directions] for s in states]
        back = from_onnx(*node[:4], P=node.P, **node.attributes)
        with torch.no_grad():
            theirs = back(x, tuple(given) if given[1:] else given[0])[0]
        y, *ends = run_onnx(node, again, given)
        x = again = y.transpose(1, 2).flatten(2)
        torch.testing.assert_close(theirs, x, **TOLERANCE)
        found.append(ends)
    torch.testing.assert_close(x, expected, **TOLERANCE)
    for got, want in zip(
        map(torch.cat, zip(*found, strict=True)),
        final if isinstance(final, tuple) else [final],
        strict=True,
    ):
        torch.testing.assert_close(got, want, **TOLERANCE)


@every_node
def test_onnx_weights_come_back_to_the_bit(kind):
    module = ours(kind, 5, 7, bidirectional=True, dtype=torch.float64)
    node = to_onnx(module)[0]
    assert node.W.data_ptr() != module.weight_ih_l0.data_ptr()
    as_arrays = [t.numpy() for t in node[1:4]]
    peepholes = None if node.P is None else node.P.numpy()
    back = from_onnx(node.operator, *as_arrays, P=peepholes, layout=1, **node.attributes)
    assert back.batch_first and back.mode == module.mode
    for name, value in module.state_dict().items():
        assert torch.equal(back.state_dict()[name], value)


def test_to_onnx_copies():
    module = fused_rnn.RNN(3, 4)
    node = to_onnx(module)[0]
    node.W.zero_()
    assert module.weight_ih_l0.abs().sum() > 0


W, R, B = torch.ones(1, 12, 3), torch.ones(1, 12, 4), torch.ones(1, 24)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"operator": "Gemm"}, ValueError, "operator: expected 'LSTM', 'GRU' or 'RNN'"),
        ({"W": None}, TypeError, "W: expected a Tensor or array"),
        ({"R": "weights"}, TypeError, "R: expected a Tensor or array, got str"),
        ({"W": W[0]}, ValueError, r"W: expected 3 dimensions, got shape \[12, 3\]"),
        ({"R": R[:, :11]}, ValueError, r"R: expected shape \[1, 12, 4\], got \[1, 11, 4\]"),
        ({"R": torch.ones(())}, ValueError, "R: expected"),
        ({"B": B[:, :12]}, ValueError, r"B: expected shape \[1, 24\]"),
        ({"hidden_size": 5}, ValueError, r"W: expected shape \[1, 15, 3\]"),
        ({"direction": "reverse"}, ValueError, "direction: .* got 'reverse'"),
        ({"direction": "bidirectional"}, ValueError, r"W: expected shape \[2, 12, 3\]"),
        ({"linear_before_reset": 2}, ValueError, "linear_before_reset: expected 0 or 1"),
        ({"layout": 3}, ValueError, "layout: expected 0 or 1"),
        ({"activations": ["HardSigmoid", "Tanh"]}, ValueError, "activations: expected"),
        ({"clip": 3.0}, ValueError, "clip: expected none"),
        ({"input_forget": 1}, ValueError, "input_forget: expected none"),
        ({"P": torch.ones(1, 12)}, ValueError, "P: expected none for GRU"),
        ({"operator": "LSTM", "P": torch.ones(1, 12)}, ValueError, "W: expected shape"),
        ({"P": [1.0]}, TypeError, "P: expected a Tensor or array, got list"),
        ({"spin": 1}, TypeError, "unexpected attribute 'spin'"),
        ({"W": W.cfloat(), "R": R.cfloat()}, TypeError, "W: expected floating.* got torch.complex"),
        ({"R": R.int()}, TypeError, "R: expected floating-point numbers, got torch.int32"),
        ({"B": B.double()}, ValueError, "B: expected dtype torch.float32 as W, got torch.float64"),
        ({"W": W.to_sparse()}, RuntimeError, "W: expected a dense tensor"),
        ({"W": W.numpy().astype(object)}, TypeError, "W: "),
        ({"activations": 3}, TypeError, "activations: expected a list of names, got 3"),
        ({"hidden_size": "5"}, TypeError, "hidden_size: expected an int, got str"),
    ],
)
def test_bad_onnx_nodes(change, error, message):
    arguments = {"operator": "GRU", "W": W, "R": R, "B": B} | change
    with pytest.raises(error, match=message):
        from_onnx(**arguments)


def test_what_changes_nothing_is_accepted():
    module = from_onnx("GRU", W, R, B, activations=["sigmoid", "TANH"], clip=None, input_forget=0)
    assert not module.reset_after  # ONNX's default
    # As the package onnx gives them.
    attributes = {"direction": b"forward", "activations": [b"Sigmoid", b"Tanh"]}
    from_onnx("GRU", W, R, B, activation_alpha=B.numpy()[0, :0], **attributes)
    other = [a.numpy()[..., ::-1].astype(">f4") for a in (W, R, B)]  # backwards, and bytes too
    assert torch.equal(from_onnx("GRU", *other).weight_ih_l0, module.weight_ih_l0)


def test_from_onnx_onto_the_cpu():
    with torch.device("meta"):
        module = from_onnx("GRU", W.numpy(), R.numpy(), B.numpy())
    assert module.weight_ih_l0.is_cpu and module.weight_ih_l0.sum() == 36


def test_bad_modules_to_onnx():
    with pytest.raises(ValueError, match="no projection"):
        to_onnx(fused_rnn.LSTM(3, 4, proj_size=2))
    with pytest.raises(ValueError, match=r"none of our own options, got layer_norm=True$"):
        to_onnx(fused_rnn.LSTM(3, 4, layer_norm=True, peepholes=True))
    with pytest.raises(TypeError, match="module: expected"):
        to_onnx(fused_rnn.GRUCell(3, 4))


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_other_update_gate(layer_norm, reset_after, bias):
    """Against the equations with z and 1 - z the other way round."""
    module = fused_rnn.GRU(
        3, 4, bias=bias, reset_after=reset_after, layer_norm=layer_norm, dtype=torch.float64
    )
    w = {name: torch.nn.init.uniform_(p).detach().clone() for name, p in module.named_parameters()}

    def side(of, value, gates):
        """What the columns of these gates are of W value + b, W value being normalised or not."""
        columns = slice(4 * gates.start, 4 * gates.stop)
        sums = value @ w[f"weight_{of}_l0"][columns].t()
        if layer_norm:
            sums = torch.nn.functional.layer_norm(sums, sums.shape[-1:])
            sums = sums * w[f"ln_{of}_weight_l0"][columns]
        return sums + w[f"bias_{of}_l0"][columns] if bias else sums

    x, h = torch.randn(6, 2, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for step in x:
        r, z = torch.sigmoid(side("ih", step, range(2)) + side("hh", h, range(2))).chunk(2, 1)
        hidden = side("hh", h if reset_after else r * h, range(2, 3))
        n = torch.tanh(side("ih", step, range(2, 3)) + (r * hidden if reset_after else hidden))
        h = z * n + (1 - z) * h
    before = [p.detach().clone() for p in module.parameters()]
    assert fused_rnn.flip_update_gate(module) is module
    torch.testing.assert_close(module(x)[1][0], h)
    fused_rnn.flip_update_gate(module)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


def test_every_gru_can_be_flipped():
    for module in (
        fused_rnn.GRU(3, 4, 2, bidirectional=True),
        torch.nn.GRU(3, 4),
        fused_rnn.GRUCell(3, 4),
        torch.nn.GRUCell(3, 4, bias=False),
    ):
        before = [p.detach().clone() for p in module.parameters()]
        fused_rnn.flip_update_gate(module)
        for p, b in zip(module.parameters(), before, strict=True):
            for i, (new, old) in enumerate(zip(p.chunk(3), b.chunk(3), strict=True)):
                assert torch.equal(new, -old if i == 1 else old)


def test_a_shared_parameter_is_flipped_once():
    module = fused_rnn.GRU(4, 4, num_layers=2)
    module.weight_ih_l1 = module.weight_ih_l0
    before = module.weight_ih_l0.detach().clone()
    fused_rnn.flip_update_gate(module)
    assert torch.equal(module.weight_ih_l0[4:8], -before[4:8])


def test_what_cannot_be_flipped():
    for wrong in (fused_rnn.LSTM(3, 4), torch.nn.LSTMCell(3, 4), None):
        with pytest.raises(TypeError, match="expected a GRU or GRUCell"):
            fused_rnn.flip_update_gate(wrong)
    module = fused_rnn.GRU(3, 4)
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    before = module.weight_ih_l0.detach().clone()
    with pytest.raises(ValueError, match="weight_hh_l0 to be a plain Parameter"):
        fused_rnn.flip_update_gate(module)
    assert torch.equal(module.weight_ih_l0, before)
