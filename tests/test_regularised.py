"""Dropout, zoneout, layer normalisation and peepholes inside the recurrence; weight dropout;
initial values.

Computed twice: by the modules, and by a loop over the formulas of the papers written down here,
which draws the masks in the order that the modules document.
"""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from helpers.needs import needs_library
from helpers.outcomes import flat, leaves, near
from helpers.pairs import pairs, params
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import export, native, testing
from fused_rnn.cells import CELLS

T, B, I, H = 5, 3, 3, 4  # noqa: E741

every_cell = pytest.mark.parametrize("cell", [*CELLS, "lstm_projected"])
both_ways = pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])


def make(cell, *args, **options):
    """A layer with those of the options that its cell has."""
    if not cell.startswith("lstm"):
        options.pop("peepholes", None)
        if isinstance(options.get("zoneout"), tuple):
            options["zoneout"] = options["zoneout"][0]
    if cell.startswith("rnn_"):
        options.pop("layer_norm", None)
    if cell == "lstm_projected":
        cell, options["proj_size"] = "lstm", 2
    layer = testing.make_module(cell, *args, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("ln_"):  # ones and zeros would hide much
                parameter.add_(torch.randn_like(parameter) / 4)
    return layer


def initial(layer, batch=B, dtype=torch.float64):
    leading = layer.num_layers * (2 if layer.bidirectional else 1), batch
    h = torch.randn(*leading, layer.proj_size or layer.hidden_size, dtype=dtype)
    if not isinstance(layer, fused_rnn.LSTM):
        return h
    return h, torch.randn(*leading, layer.hidden_size, dtype=dtype)


def as_tuple(states):
    return states if isinstance(states, tuple) else (states,)


def grads(outputs, inputs):
    loss = sum((o * torch.linspace(1, 2, o.numel()).view_as(o)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)


def normalised(v, gain):
    centred = v - v.mean(-1, keepdim=True)
    return gain * centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()


def by_hand(layer, x, hx):
    """Output and states of `layer`, formula by formula."""
    p_h, p_c = layer.zoneout if isinstance(layer.zoneout, tuple) else (layer.zoneout,) * 2
    masks = {}
    for name, weight in layer.named_parameters():
        if name.startswith("weight_hh") and layer.training and layer.weight_dropout:
            masks[name] = torch.nn.functional.dropout(torch.ones_like(weight), layer.weight_dropout)
    finals = []
    for k in range(layer.num_layers):
        suffixes = [f"_l{k}"] + [f"_l{k}_reverse"] * layer.bidirectional
        draws = []
        for _ in suffixes:
            h_mask, h_kept, c_kept = 1, None, None
            if layer.training and layer.recurrent_dropout:
                ones = torch.ones_like(as_tuple(hx)[0][0])
                h_mask = torch.nn.functional.dropout(ones, layer.recurrent_dropout)
            if layer.training and p_h:
                h_kept = torch.rand(*x.shape[:2], as_tuple(hx)[0].shape[-1]) < p_h
            if layer.training and p_c and isinstance(layer, fused_rnn.LSTM):
                c_kept = torch.rand(*x.shape[:2], H) < p_c
            draws.append((h_mask, h_kept, c_kept))
        outputs = []
        for d, (suffix, (h_mask, h_kept, c_kept)) in enumerate(zip(suffixes, draws, strict=True)):
            parameters = {
                name.removesuffix(suffix): p * masks.get(name, 1)
                for name, p in layer.named_parameters()
                if name.endswith(suffix)
            }
            state = [s[k * len(suffixes) + d] for s in as_tuple(hx)]
            steps = range(x.shape[0])
            ys = {}
            for t in reversed(steps) if d else steps:
                new = one_step(layer, x[t], state, h_mask, parameters)
                mixed = []
                for old, value, kept, p in zip(
                    state, new, (h_kept, c_kept), (p_h, p_c), strict=False
                ):
                    part = p if not layer.training else 0 if kept is None else kept[t].double()
                    mixed.append(part * old + (1 - part) * value)
                state = mixed
                ys[t] = state[0]
            outputs.append(torch.stack([ys[t] for t in steps]))
            finals.append(state)
        x = torch.cat(outputs, -1)
        if layer.training and layer.dropout and k < layer.num_layers - 1:
            x = torch.nn.functional.dropout(x, layer.dropout)
    return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def one_step(layer, x, state, h_mask, p):
    """One step of every cell, in which each gate is computed by itself."""
    gates = len(p["weight_ih"]) // H

    def rows(name, *which):
        return torch.cat([p[name][g * H : (g + 1) * H] for g in which])

    def part(side, v, *which):
        out = v @ rows("weight_" + side, *which).T
        if layer.layer_norm:
            out = normalised(out, rows(f"ln_{side}_weight", *which))
        return out + (rows("bias_" + side, *which) if layer.bias else 0)

    h = state[0] * h_mask
    if gates == 1:
        activation = torch.tanh if layer.nonlinearity == "tanh" else torch.relu
        return [activation(part("ih", x, 0) + part("hh", h, 0))]
    if gates == 3:
        r, z = (part("ih", x, 0, 1) + part("hh", h, 0, 1)).sigmoid().split(H, -1)
        if layer.reset_after:
            n = torch.tanh(part("ih", x, 2) + r * part("hh", h, 2))
        else:
            n = torch.tanh(part("ih", x, 2) + part("hh", r * state[0] * h_mask, 2))
        return [(1 - z) * n + z * state[0]]
    c = state[1]
    i, f, g, o = (part("ih", x, 0, 1, 2, 3) + part("hh", h, 0, 1, 2, 3)).split(H, -1)
    p_i, p_f, p_o = p["weight_peephole"].split(H) if layer.peepholes else (0, 0, 0)
    c_new = (f + p_f * c).sigmoid() * c + (i + p_i * c).sigmoid() * g.tanh()
    seen = c_new
    if layer.layer_norm:
        seen = normalised(c_new, p["ln_c_weight"]) + p.get("ln_c_bias", 0)
    h = (o + p_o * c_new).sigmoid() * seen.tanh()
    return [h @ p["weight_hr"].T if layer.proj_size else h, c_new]


EVERYTHING = {
    "recurrent_dropout": 0.4,
    "zoneout": (0.3, 0.2),
    "weight_dropout": 0.3,
    "layer_norm": True,
    "peepholes": True,
}
OPTIONS = [*({name: value} for name, value in EVERYTHING.items()), EVERYTHING]
OPTION_NAMES = [*EVERYTHING, "everything"]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)


@every_cell
@every_option
@pytest.mark.parametrize(
    ("training", "bias"),
    [(True, True), (False, True), (True, False)],
    ids=["train", "eval", "no bias"],
)
def test_by_hand(cell, options, training, bias):
    options = {"bias": bias, "dropout": 0.2 if options is EVERYTHING else 0.0, **options}
    layer = make(cell, I, H, 2, bidirectional=True, dtype=torch.float64, **options)
    layer.train(training)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = initial(layer)
    for state in as_tuple(hx):
        state.requires_grad_()
    torch.manual_seed(7)
    y, states = layer(x, hx)
    torch.manual_seed(7)
    expected_y, expected_states = by_hand(layer, x, hx)
    outputs, expected = (y, *as_tuple(states)), (expected_y, *expected_states)
    for ours, theirs in zip(outputs, expected, strict=True):
        near(ours, theirs)
    inputs = [x, *as_tuple(hx), *layer.parameters()]
    for ours, theirs in zip(grads(outputs, inputs), grads(expected, inputs), strict=True):
        near(ours, theirs)
        assert ours.abs().sum() > 0


@every_cell
def test_nothing_asked_for_is_the_fused_layer(cell):
    """The options at their defaults, or at zero, change no bit and no kernel."""
    zeros = {"recurrent_dropout": 0, "zoneout": 0.0, "weight_dropout": 0, "forget_bias": None}
    torch.manual_seed(1)
    plain = make(cell, I, H, 2)
    torch.manual_seed(1)
    layer = make(cell, I, H, 2, **zeros)
    x = torch.randn(T, B, I)
    assert torch.equal(layer(x)[0], plain(x)[0])
    assert str(fused_rnn.explain(layer, x)) == str(fused_rnn.explain(plain, x))
    assert repr(layer) == repr(plain)
    assert layer.state_dict().keys() == plain.state_dict().keys()


@every_cell
def test_derivatives(cell):
    """First and second, with lengths and resets."""
    layer = make(cell, 2, 3, bidirectional=True, dtype=torch.float64, **EVERYTHING)
    names = [name for name, _ in layer.named_parameters()]
    lengths, resets = torch.tensor([3, 1]), torch.tensor([[0, 1], [1, 0], [0, 0]]).bool()
    hx, reset_hx = initial(layer, 2), initial(layer, 2)
    count = len(as_tuple(hx))

    def run(x, *tensors):
        first, fresh, values = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        torch.manual_seed(5)
        y, final, history = torch.func.functional_call(
            layer,
            dict(zip(names, values, strict=True)),
            (x, first if count == 2 else first[0]),
            {
                "lengths": lengths,
                "resets": resets,
                "reset_hx": fresh if count == 2 else fresh[0],
                "return_states": True,
            },
        )
        return (y, *as_tuple(final), *history)

    tensors = (torch.randn(3, 2, 2), *as_tuple(hx), *as_tuple(reset_hx), *layer.parameters())
    tensors = [t.detach().double().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def counter(**options):
    """h_t = relu(x_t + h_{t-1}), 50 units."""
    layer = fused_rnn.RNN(50, 50, nonlinearity="relu", bias=False, **options)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.copy_(torch.eye(50, weight.shape[1]))
            assert name.startswith("weight_")
    return layer


@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_recurrent_dropout_has_one_mask_per_sequence(p):
    layer = counter(recurrent_dropout=p, bidirectional=True)
    x = torch.zeros(4, 400, 50)
    x[0] = x[3] = 1
    y = layer(x)[0].detach()
    # h_1 is the mask, and h_2 its square, since the mask stays.
    mask, reverse = y[1, :, :50], y[2, :, 50:]
    if p == 1:
        assert (mask == 0).all() and (y[3, :, :50] == 1).all()
        return
    near(y[2, :, :50], mask**2, 1e-6)
    assert mask.unique().numel() == 2
    near(mask.max(), torch.tensor(1 / (1 - p)), 1e-6)
    # Expectation 1, variance p / (1 - p), of 20,000 independent draws: five standard errors.
    error = 5 * (p / (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean() - 1) < error
    assert abs(mask.var() - p / (1 - p)) < 10 * error
    # Of its own for each row, unit, direction and call.
    assert (mask.std(0) > 0).all() and (mask.std(1) > 0).all()
    for other in (reverse, layer(x)[0].detach()[1, :, :50]):
        assert abs(torch.corrcoef(torch.stack((mask.flatten(), other.flatten())))[0, 1]) < 0.05
    assert (layer.eval()(x)[0][1, :, :50] == 1).all()


FORMS = {
    "padded": {},
    "packed": {"packed": True},
    "lengths and resets": {"lengths": True, "resets": True},
    "states": {"return_states": True},
    "recompute": {"recompute": True},
    "no bias": {"bias": False},
    "units over threads": {"hidden": 150, "batch": 3, "threads": 3},
    "rows over threads": {"hidden": 33, "batch": 40, "threads": 3},
    "packed rows over threads": {"hidden": 17, "batch": 40, "threads": 3, "packed": True},
    "one step": {"timesteps": 1, "batch": 2},
}
# What the CPU kernels have, and whether the module is in training.
ON_KERNELS = {
    "recurrent dropout": ({"recurrent_dropout": 0.4}, True),
    "zoneout": ({"zoneout": (0.3, 0.2)}, True),
    "zoneout of c": ({"zoneout": (0.0, 0.4)}, True),
    "zoneout, expected": ({"zoneout": (0.3, 0.2)}, False),
    "peepholes": ({"peepholes": True}, True),
    "all": ({"recurrent_dropout": 0.4, "zoneout": (0.3, 0.2), "peepholes": True}, True),
    "normalised": ({"layer_norm": True}, True),
    "normalised, all": (
        {"recurrent_dropout": 0.4, "zoneout": (0.3, 0.2), "layer_norm": True, "peepholes": True},
        True,
    ),
    "normalised, expected": ({"zoneout": (0.3, 0.2), "layer_norm": True}, False),
}
ONLY_LSTM = "zoneout of c", "peepholes"
EVERY_CELL = (*CELLS, "lstm_projected")


def kernel_options(cells=EVERY_CELL, fast=tuple(ON_KERNELS)):
    """Each of these with each of the cells that has it; slow ones but for those named."""
    return [
        pytest.param(
            cell, options, id=f"{name}-{cell}", marks=() if name in fast else pytest.mark.slow
        )
        for name, options in ON_KERNELS.items()
        for cell in cells
        if cell.startswith("lstm") or name not in ONLY_LSTM
        if not (cell.startswith("rnn_") and name.startswith("normalised"))
    ]


def every_kernel_option(*given, **named):
    return pytest.mark.parametrize(("cell", "options"), kernel_options(*given, **named))


def as_state(tensors):
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def results_of(module, backend, x, hx, reset_hx, form, seed):
    """Outputs of the module on that backend in its own dtype, and the gradients of all inputs."""
    dtype = next(module.parameters()).dtype
    rows, states, fresh = (
        x.to(dtype).requires_grad_(),
        flat(leaves(hx, dtype)),
        flat(leaves(reset_hx, dtype)),
    )
    torch.manual_seed(seed)
    lengths = torch.randint(1, len(x) + 1, x.shape[1:2])
    options = {"return_states": True} if form.get("return_states") else {}
    if form.get("lengths"):
        options["lengths"] = lengths * (torch.rand(x.shape[1]) < 0.8)
    if form.get("resets"):
        options |= {"resets": torch.rand(x.shape[:2]) < 0.3, "reset_hx": as_state(fresh)}
    input = rows
    if form.get("packed"):
        input = pack_padded_sequence(rows, lengths, enforce_sorted=False)
    with fused_rnn.backend(backend):
        y, final, *history = module(input, as_state(states), **options)
    y = y.data if form.get("packed") else y
    outputs = [y, *as_tuple(final), *(history and history[0])]
    weights = [torch.randn(output.shape) for output in outputs]
    loss = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True))
    return (*outputs, *grads([loss], [rows, *states, *fresh, *module.parameters()]))


def check_kernels(cell, form, dtype, options, layers=2):
    """The CPU kernels against the reference in float64, with the same masks: no worse than the
    reference in the same dtype, up to a tolerance of the whole tensor."""
    options, training = options
    hidden, batch = form.get("hidden", H), form.get("batch", B)
    layer = make(
        cell, I, hidden, layers, bidirectional=True, recompute=form.get("recompute", False),
        bias=form.get("bias", True), **options,
    ).to(dtype).train(training)  # fmt: skip
    if form.get("timesteps", T) > 50:
        # With its initial gains a normalised LSTM is chaotic: over so many steps the errors of
        # float32 grow to anything up to a hundredth, the reference's or ours.
        with torch.no_grad():
            for name, gain in layer.named_parameters():
                gain.mul_(0.25 if name.startswith("ln_hh") else 1.0)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(form.get("timesteps", T), batch, I).to(dtype)
    hx = initial(layer, batch, dtype)
    reset_hx = initial(layer, batch, dtype) if form.get("resets") else None
    seed = int(torch.randint(1000, ()))
    with testing.poisoned_memory():
        actual = results_of(layer, "cpu", x, hx, reset_hx, form, seed)
    rounded, expected = (
        results_of(module, "reference", x, hx, reset_hx, form, seed) for module in (layer, exact)
    )
    # Where a sum is near zero, a relu of rounded values may turn.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    for ours, other, theirs in zip(actual, rounded, expected, strict=True):
        assert ours.dtype == dtype
        bound = tolerance * theirs.norm() + 2 * (other.double() - theirs).norm() + 1e-6
        assert (ours.double() - theirs).norm() <= bound


@needs_library
@pytest.mark.parametrize(
    ("cell", "options", "form", "dtype"),
    pairs(
        kernel_options(),
        params(
            {
                f"{name}-{dtype}": (form, dtype)
                for name, form in FORMS.items()
                for dtype in (torch.float32, torch.bfloat16)
            }
        ),
        one_in=3,
    ),
)
def test_the_cpu_kernels(cell, form, dtype, options, num_threads):
    num_threads(form.get("threads", 1))
    check_kernels(cell, form, dtype, options)


@every_kernel_option(fast=("all", "normalised, all", "zoneout, expected"))
@pytest.mark.parametrize("form", ["lengths and resets", "units over threads"])
def test_the_cpu_kernels_of_every_instruction_set(
    cell, form, options, instruction_set, num_threads
):
    num_threads(FORMS[form].get("threads", 1))
    check_kernels(cell, FORMS[form], torch.float32, options)


@needs_library
@every_kernel_option(
    ["gru", "gru_reset_before", "lstm", "lstm_projected"], fast=("all", "normalised, all")
)
def test_the_cpu_kernels_take_several_chunks_backward(cell, options):
    """Of 8 MiB of gradients each: from one to the next go those of the states."""
    sizes = {"timesteps": 140, "batch": 40, "hidden": 130}
    assert 4 * math.prod(sizes.values()) * 3 > 8 << 20  # an LSTM's gates are four
    check_kernels(cell, sizes, torch.float32, options, 1)


@needs_library
@every_kernel_option()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_the_cpu_kernels_twice_differentiable(cell, options, dtype):
    """As close to float64 as the reference, up to a tolerance."""
    options, training = options
    layer = make(cell, 2, 3, bidirectional=True, **options).train(training)
    if dtype != "autocast":
        layer.to(getattr(torch, dtype))
    exact = copy.deepcopy(layer).double()
    x, results = torch.randn(4, 2, 2), []
    for module, backend in ((layer, "cpu"), (layer, "reference"), (exact, "reference")):
        cast = torch.autocast("cpu", torch.bfloat16, dtype == "autocast" and module is layer)
        rows = x.to(next(module.parameters())).requires_grad_()
        torch.manual_seed(3)
        with cast, fused_rnn.backend(backend):
            y, _ = module(rows)
        (slope,) = torch.autograd.grad(y.double().square().sum(), rows, create_graph=True)
        loss = slope.double().square().sum()
        results.append(grads([loss], [rows, *module.parameters()]))
    tolerance = 1e-4 if dtype == "float32" else 0.05
    for ours, other, theirs in zip(*results, strict=True):
        bound = tolerance * (1 + theirs.norm()) + 2 * (other.double() - theirs).norm()
        assert (ours.double() - theirs).norm() <= bound


@pytest.mark.parametrize("peepholes", [True, False])
def test_without_biases_twice_differentiable(peepholes):
    """A normalised layer with peepholes has as many weights then as a plain one with biases."""
    layer = fused_rnn.LSTM(2, 3, bias=False, layer_norm=True, peepholes=peepholes).double()
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], [x])


@needs_library
@every_kernel_option()
def test_what_the_cpu_kernels_have_runs_on_them(cell, options):
    options, training = options
    layer, x = make(cell, I, H, 2, **options).train(training), torch.randn(T, B, I)
    plain = fused_rnn.explain(make(cell, I, H, 2), x)
    assert [one.kernel for one in fused_rnn.explain(layer, x).layers] == [
        one.kernel for one in plain.layers
    ]
    assert plain.backend == "cpu"


def noisy_arguments(cell, dtype=torch.float32):
    """Of the operator, with everything: of one direction, two steps of three rows."""
    hidden, gates = H, CELLS[cell].gates
    weights = [torch.randn(gates * hidden, I), torch.randn(gates * hidden, hidden)]
    c0 = None
    if CELLS[cell].has_c:
        c0 = torch.randn(1, B, hidden)
        weights.append(torch.randn(3 * hidden))
    if gates > 1:  # of an LSTM's c, too, but without biases nothing is added to it
        weights.append(torch.randn(2 * gates * hidden + hidden * CELLS[cell].has_c))
    weights = [weight.to(dtype).requires_grad_() for weight in weights]
    h_factor = torch.rand(1, B, hidden)
    kept_h, kept_c = torch.rand(2, 1, 2, B, hidden) < 0.5
    noise = (h_factor, kept_h, None if c0 is None else kept_c)
    x, h0 = torch.randn(2, B, I, dtype=dtype).requires_grad_(), torch.randn(1, B, hidden).to(dtype)
    inputs = x, h0, None if c0 is None else c0.to(dtype), weights, *(None,) * 5
    return *inputs, cell, True, False, False, "cpu", *noise


@needs_library
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("averaged", [False, True], ids=["drawn", "expected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_what_torch_wants(cell, averaged, dtype):
    arguments = noisy_arguments(cell, dtype)
    if averaged:
        arguments = (*arguments[:-2], None, None, 0.3, 0.2 if CELLS[cell].has_c else 0.0)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.fused_rnn.layer_forward.default, arguments, test_utils=utilities
    )


@needs_library
@pytest.mark.parametrize(
    ("which", "wrong", "message"),
    [
        (-1, torch.zeros(1, 2, B, H), "kept_c: expected dtype Bool"),
        (-2, torch.zeros(1, 2, B, H + 1).bool(), "kept_h: expected shape"),
        (-3, torch.zeros(1, B, H + 1), "h_factor: expected shape"),
    ],
)
def test_the_librarys_border(which, wrong, message):
    arguments = list(noisy_arguments("lstm"))
    arguments[which] = wrong
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        torch.ops.fused_rnn.layer_forward(*arguments)


@needs_library
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("states", [False, True])
def test_the_operator_of_the_reference_is_plain_operations(cell, states):
    """And gives what kernels give, in fields of the same shapes."""
    arguments = list(noisy_arguments(cell))
    x, _, _, weights = arguments[:4]
    arguments[-6] = states
    inputs, results = (x, *weights), {}
    for backend in ("cpu", "reference"):
        arguments[-4] = backend
        fields = torch.ops.fused_rnn.layer_forward(*arguments)
        cells = [fields[4]] if states and CELLS[cell].has_c else []
        outputs = [*fields[:3], *cells]
        results[backend] = [*outputs, *grads([o for o in outputs if o.requires_grad], inputs)]
        shapes = [field.shape for field in fields]
        assert shapes == results.setdefault("shapes", shapes)
    for actual, expected in zip(results["reference"], results["cpu"], strict=True):
        near(actual, expected, 1e-4)
    with FakeTensorMode() as mode:
        faked = [a if not isinstance(a, torch.Tensor) else mode.from_tensor(a) for a in arguments]
        faked[3] = [mode.from_tensor(w) for w in weights]
        assert [f.shape for f in torch.ops.fused_rnn.layer_forward(*faked)] == results["shapes"]


@needs_library
@pytest.mark.parametrize(
    "shapes",
    [[], [(3 * H + 1,)], [(3 * H,), (3 * H,)], [(9 * H + 1,)], [(10 * H,)], [(9 * H,), (3 * H,)]],
    ids=str,
)
def test_the_librarys_border_of_weights(shapes):
    """One for each direction, as long as it has to be, and gains last."""
    layer = fused_rnn.LSTM(I, H, bias=False)
    weights = [*layer.parameters(), *map(torch.zeros, shapes)][len(shapes) == 0 :]
    h0 = torch.zeros(1, B, H)
    out = [torch.empty(size) for size in ((B, H), (1, B, H), (1, B, H), (1, B, 0), (1, B, 0))]
    with torch.no_grad(), pytest.raises(RuntimeError, match="weights: expected"):
        torch.ops.fused_rnn_cpu.layer_forward(
            CELLS["lstm"].index, torch.zeros(B, I), weights, h0, h0, None, *out
        )


@needs_library
def test_the_library_has_no_gains_for_an_rnn():
    weights = torch.zeros(H, I), torch.zeros(H, H), torch.ones(2 * H)
    h0 = torch.zeros(1, B, H)
    out = [torch.empty(size) for size in ((B, H), (1, B, H), (1, B, 0), (1, B, 0), (1, B, 0))]
    with torch.no_grad(), pytest.raises(RuntimeError, match="weights: expected 2 tensors, or 4"):
        torch.ops.fused_rnn_cpu.layer_forward(
            CELLS["rnn_tanh"].index, torch.zeros(B, I), weights, h0, None, None, *out
        )


@pytest.mark.skipif(
    native.cpu_library_error() is not None or not native.bfloat16_capability(),
    reason="no kernels for bfloat16",
)
def test_the_librarys_border_of_gains_in_bfloat16():
    weights = [
        torch.zeros(3 * H, I).bfloat16(),
        torch.zeros(3 * H, H).bfloat16(),
        torch.ones(6 * H),
    ]
    x, h0 = torch.zeros(B, I).bfloat16(), torch.zeros(1, B, H).bfloat16()
    out = [torch.empty(size) for size in ((B, H), (1, B, H), (1, B, 0), (1, B, 0), (1, B, 0))]
    with torch.no_grad(), pytest.raises(RuntimeError, match="x: expected dtype Float for a layer"):
        torch.ops.fused_rnn_cpu.layer_forward(
            CELLS["gru"].index, x, weights, h0, None, None, out[0].bfloat16(), *out[1:]
        )


NORMED_CELLS = "gru", "gru_reset_before", "lstm", "lstm_projected"
every_normed_cell = pytest.mark.parametrize("cell", NORMED_CELLS)


@needs_library
@every_normed_cell
@pytest.mark.parametrize("hidden", [3, 40])
def test_normalisations_far_from_zero(cell, hidden, instruction_set):
    """Deviations from a mean that is ten thousand times as large, of W_ih x without an error."""
    layer = make(cell, I, hidden, layer_norm=True)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(1024 + torch.randint(-8, 9, layer.weight_ih_l0.shape) / 16)
    exact, results = copy.deepcopy(layer).double(), []
    x = torch.randint(1, 4, (3, B, I)).float()
    for module, backend in ((layer, "cpu"), (layer, "reference"), (exact, "reference")):
        rows = x.to(next(module.parameters())).requires_grad_()
        with fused_rnn.backend(backend):
            y, _ = module(rows)
        results.append((y, *grads([y], [rows, *module.parameters()])))
    for ours, rounded, expected in zip(*results, strict=True):
        error = (rounded.double() - expected).norm()
        assert (ours.double() - expected).norm() <= 2 * error + 1e-4 * expected.norm()


@needs_library
@every_normed_cell
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_normalisations_of_half_types_are_as_exact_as_the_reference(cell, dtype):
    """Which runs through time in float32, as they do, and saves nothing in half types."""
    layer = make(cell, 20, 30, layer_norm=True).to(dtype)
    exact, x = copy.deepcopy(layer).double(), torch.randn(20, 8, 20).to(dtype)
    hx, results = initial(layer, 8, dtype), []
    for module, backend in ((layer, "cpu"), (layer, "reference"), (exact, "reference")):
        results.append(results_of(module, backend, x, hx, None, {}, 5))
    for ours, rounded, expected in zip(*results, strict=True):
        error = (rounded.double() - expected).norm()
        assert (ours.double() - expected).norm() <= 2 * error


@needs_library
@every_normed_cell
def test_normalisations_of_nothing(cell, instruction_set):
    """What does not vary becomes zero, and its gradient is finite: W_hh h of no h, W_ih x of no
    x."""
    layer = make(cell, I, H, layer_norm=True)
    exact, x, results = copy.deepcopy(layer).double(), torch.zeros(2, B, I), []
    for module, backend in ((layer, "cpu"), (exact, "reference")):
        rows = x.to(next(module.parameters())).requires_grad_()
        with fused_rnn.backend(backend):
            y, _ = module(rows)
        results.append((y, *grads([y], [rows, *module.parameters()])))
    for ours, expected in zip(*results, strict=True):
        assert torch.isfinite(ours).all()
        near(ours.double(), expected, 1e-4 * (1 + expected.abs().max().item()))


@needs_library
@every_normed_cell
@pytest.mark.parametrize("packed", [False, True])
def test_normalised_bits_do_not_depend_on_threads(cell, packed, num_threads):
    layer = make(cell, 20, 60, bidirectional=True, **{**EVERYTHING, "weight_dropout": 0.0})
    form, x = {"packed": packed}, torch.randn(30, 25, 20)
    hx, results = initial(layer, 25, torch.float32), []
    for count in (1, 2, 5, 64):
        num_threads(count)
        results.append(results_of(layer, "cpu", x, hx, None, form, 7))
    for other in results[1:]:
        for ours, expected in zip(other, results[0], strict=True):
            assert torch.equal(ours, expected)


@needs_library
@every_normed_cell
def test_normalised_rows_do_not_depend_on_the_batch(cell):
    layer = make(cell, I, 20, bidirectional=True, layer_norm=True).eval()
    x, hx = torch.randn(T, 9, I), initial(layer, 9, torch.float32)
    with torch.no_grad():
        y, _ = layer(x, hx)
        for b in range(9):
            one = tuple(state[:, b : b + 1].contiguous() for state in as_tuple(hx))
            assert torch.equal(layer(x[:, b : b + 1], as_state(one))[0], y[:, b : b + 1])


@needs_library
@pytest.mark.parametrize(
    ("option", "names"),
    [
        ("layer_norm", ["ln_ih_weight_l0", "ln_c_bias_l0", "weight_hh_l0"]),
        ("peepholes", ["weight_peephole_l0"]),
    ],
)
def test_extras_on_the_kernels_under_autocast(option, names):
    """They stay in float32, as what is no operand of a product does."""
    layer, x = make("lstm", I, H, **{option: True}), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused_rnn.explain(layer, x).backend == "cpu"
        y, _ = layer(x)
        with fused_rnn.backend("reference"):
            expected, _ = layer(x)
    near(y.float(), expected.float(), 0.02)
    y.float().sum().backward()
    for name in names:
        assert getattr(layer, name).grad.dtype == torch.float32


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_zoneouts_expectation_of_half_types_runs_in_float32(cell):
    """A state that creeps towards its end by less than what bfloat16 could add to it."""
    layer = make(cell, I, H, zoneout=0.999).bfloat16().eval()
    x, wide = torch.randn(1, B, I).bfloat16().expand(2000, B, I), copy.deepcopy(layer).double()
    y, _ = layer(x)
    near(y[-1].double(), wide(x.double())[0][-1], 0.02)


def test_recurrent_dropout_leaves_the_carried_state_alone():
    """What goes past the product in a GRU is h itself."""
    layer = fused_rnn.GRU(I, H, recurrent_dropout=1.0)
    with torch.no_grad():
        layer.bias_hh_l0[H : 2 * H] = 1e4  # z is 1: nothing but the old state
    h = torch.randn(1, B, H)
    near(layer(torch.randn(T, B, I), h)[1], h, 1e-6)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_zoneout_keeps_states_at_random(p):
    layer = counter(zoneout=p)
    torch.nn.init.zeros_(layer.weight_hh_l0)
    # Without W_hh, h_t is x_t or what it was.
    x = torch.arange(1.0, 41).view(40, 1, 1).expand(40, 20, 50)
    y = layer(x)[0].detach()
    before = torch.cat((torch.zeros(1, 20, 50), y[:-1]))
    kept = y == before
    assert (kept | (y == x)).all()
    error = 5 * (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.float().mean() - p) < error
    # At every step anew: two steps running both keep their states with probability p * p.
    both = (kept[1:] & kept[:-1]).float().mean()
    assert abs(both - p * p) < 2 * error
    expected = torch.zeros(20, 50)
    for t, row in enumerate(layer.eval()(x)[0]):
        expected = p * expected + (1 - p) * x[t]
        near(row, expected, 1e-5)


def test_zoneout_of_everything_keeps_everything():
    layer = fused_rnn.LSTM(I, H, zoneout=(1, 1))
    hx = initial(layer, dtype=torch.float32)
    for training in (True, False):
        _, states = layer.train(training)(torch.randn(T, B, I), hx)
        for state, given in zip(states, hx, strict=True):
            assert torch.equal(state, given)


def test_weight_dropout_drops_weights_for_the_whole_call():
    p = 0.3
    layer = counter(weight_dropout=p, num_layers=2, bidirectional=True)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.fill_(1 if name.startswith("weight_hh") else 0)
    # From a unit vector in each row of the batch, one step shows the whole matrix.
    h = torch.eye(50).expand(4, 50, 50).contiguous()
    *_, (states,) = layer(torch.zeros(2, 50, 50), h, return_states=True)
    seen = [(states[k, 1] if k % 2 else states[k, 0]).t() for k in range(4)]
    later = [states[k, 0] if k % 2 else states[k, 1] for k in range(4)]
    for mask, again in zip(seen, later, strict=True):
        values = mask.unique()
        near(values, torch.tensor([0, 1 / (1 - p)]), 1e-6)
        dropped = (mask == 0).float().mean()
        assert abs(dropped - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
        near(again, (mask @ mask).t(), 1e-5)
    for one, other in itertools.combinations(seen, 2):
        assert not torch.equal(one, other)
    # No gradient reaches what was dropped.
    torch.manual_seed(3)
    layer(torch.zeros(1, 50, 50), h)[0].sum().backward()
    for k, grad in ((k, p.grad) for k, p in layer.named_parameters() if "weight_hh_l1" in k):
        assert 0.6 < (grad != 0).float().mean() < 0.8, k


def test_weight_dropout_runs_on_the_kernels():
    x = torch.randn(T, B, I)
    layer, plain = fused_rnn.LSTM(I, H, weight_dropout=0.5), fused_rnn.LSTM(I, H)
    assert str(fused_rnn.explain(layer, x)) == str(fused_rnn.explain(plain, x))
    if native.cpu_library_error() is None:
        assert fused_rnn.explain(layer, x).backend == "cpu"


@every_cell
@every_option
def test_seeds_and_modes(cell, options):
    layer = make(cell, I, H, 2, **options)
    x = torch.randn(T, B, I)

    def run(seed):
        torch.manual_seed(seed)
        return layer(x)[0]

    draws = bool({"recurrent_dropout", "zoneout", "weight_dropout"} & options.keys())
    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(2)) != draws
    with torch.no_grad():  # training mode is what counts, as for torch's dropout
        near(run(1), run(1).clone(), 1e-6)
        assert torch.equal(run(1), run(2)) != draws
    layer.eval()
    assert torch.equal(run(1), run(2))
    with_grad = run(1)
    with torch.no_grad():
        near(run(1), with_grad, 1e-5)


@pytest.mark.parametrize("name", ["recurrent_dropout", "weight_dropout"])
@every_cell
def test_dropout_is_off_in_eval_mode(cell, name):
    layer = make(cell, I, H, 2, **{name: 0.5})
    plain = make(cell, I, H, 2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I)
    assert not torch.allclose(layer(x)[0], plain(x)[0])
    layer.eval(), plain.eval()
    assert str(fused_rnn.explain(layer, x)) == str(fused_rnn.explain(plain, x))
    assert torch.equal(layer(x)[0], plain(x)[0])
    with torch.no_grad():
        assert torch.equal(layer(x)[0], plain(x)[0])


@every_cell
@both_ways
def test_padding_has_no_influence(cell, bidirectional):
    layer = make(cell, I, H, 2, bidirectional=bidirectional, batch_first=True, **EVERYTHING)
    lengths = torch.tensor([2, 0, 5])
    padding = torch.arange(T) >= lengths.unsqueeze(1)
    x = torch.randn(B, T, I)
    poisoned = torch.where(padding.unsqueeze(2), torch.nan, x).requires_grad_()
    hx = initial(layer, dtype=torch.float32)
    torch.manual_seed(3)
    clean_y, clean_states = layer(x, hx, lengths=lengths)
    torch.manual_seed(3)
    y, states = layer(poisoned, hx, lengths=lengths)
    assert torch.equal(y, clean_y)
    assert (y[padding] == 0).all() and (y[~padding] != 0).any()
    for ours, expected in zip(as_tuple(states), as_tuple(clean_states), strict=True):
        assert torch.equal(ours, expected)
    for state, given in zip(as_tuple(states), as_tuple(hx), strict=True):
        assert torch.equal(state[:, 1], given[:, 1])
    grad, *others = grads([y, *as_tuple(states)], [poisoned, *layer.parameters()])
    assert (grad[padding] == 0).all() and (grad[~padding] != 0).any()
    assert all(torch.isfinite(g).all() for g in others)


@every_cell
@both_ways
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_lengths_are_a_packed_sequence(cell, bidirectional, training):
    """In training without zoneout, whose masks are drawn for the rows there are."""
    options = EVERYTHING | ({"zoneout": 0.0} if training else {})
    layer = make(cell, I, H, 2, bidirectional=bidirectional, dtype=torch.float64, **options)
    layer.train(training)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([5, 3, 1])
    hx = initial(layer)
    torch.manual_seed(3)
    y, states = layer(x, hx, lengths=lengths)
    torch.manual_seed(3)
    packed_y, packed_states = layer(pack_padded_sequence(x, lengths), hx)
    padded_y, _ = pad_packed_sequence(packed_y)
    near(y, padded_y)
    for ours, expected in zip(as_tuple(states), as_tuple(packed_states), strict=True):
        near(ours, expected)
    inputs = list(layer.parameters())
    for ours, expected in zip(grads([y], inputs), grads([padded_y], inputs), strict=True):
        near(ours, expected)


@every_cell
def test_packed_rows_are_sequences_of_their_own(cell):
    layer = make(cell, I, H, 2, bidirectional=True, dtype=torch.float64, **EVERYTHING).eval()
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([2, 5, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, states = layer(packed)
    y, _ = pad_packed_sequence(y)
    for b, length in enumerate(lengths.tolist()):
        row_y, row_states = layer(x[:length, b])
        near(y[:length, b], row_y)
        for ours, expected in zip(as_tuple(states), as_tuple(row_states), strict=True):
            near(ours[:, b], expected)
    # And in training every row that there is may be kept or dropped.
    assert layer.train()(packed)[0].data.shape == packed.data.shape[:1] + y.shape[2:]


@every_cell
def test_resets_are_separate_pieces(cell):
    layer = make(cell, I, H, bidirectional=True, dtype=torch.float64, **EVERYTHING).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    resets = torch.zeros(T, B).bool()
    resets[2] = True
    y, states = layer(x, resets=resets)
    (first, first_states), (second, second_states) = layer(x[:2]), layer(x[2:])
    near(y, torch.cat((first, second)))
    for ours, a, b in zip(*map(as_tuple, (states, first_states, second_states)), strict=True):
        near(ours[0], b[0])
        near(ours[1], a[1])


@every_cell
def test_states_of_every_step(cell):
    layer = make(cell, I, H, 2, dtype=torch.float64, **EVERYTHING)
    y, final, states = layer(torch.randn(T, B, I, dtype=torch.float64), return_states=True)
    assert torch.equal(states[0][1], y)
    for history, last in zip(states, as_tuple(final), strict=True):
        assert torch.equal(history[:, -1], last)


@pytest.mark.parametrize("cell", ["gru", "lstm_projected"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_run_through_time_in_float32(cell, dtype):
    layer = make(cell, I, H, **EVERYTHING).to(dtype)
    wide = copy.deepcopy(layer).float()
    x = torch.randn(T, B, I, dtype=dtype)
    # The masked W_hh is rounded to the half type, as W_hh itself is.
    layer.weight_dropout = wide.weight_dropout = 0.0
    torch.manual_seed(1)
    y, states, _ = layer(x, return_states=True)
    torch.manual_seed(1)
    expected, expected_states = wide(x.float())
    assert torch.equal(y, expected.to(dtype))
    for ours, theirs in zip(as_tuple(states), as_tuple(expected_states), strict=True):
        assert torch.equal(ours, theirs.to(dtype))
    y.float().sum().backward()
    assert all(p.grad.dtype == dtype for p in layer.parameters())


def test_autocast():
    layer = make("lstm", I, H, layer_norm=True, peepholes=True, zoneout=0.2)
    half = copy.deepcopy(layer).bfloat16()
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        y, _ = layer(x)
    torch.manual_seed(1)
    expected, _ = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # Parameters that are not operands of a product stay in float32.
    near(y.float(), expected.float(), 0.02)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_under_vmap(cell):
    layer = make(cell, I, H, **EVERYTHING).eval()
    x = torch.randn(4, T, B, I)
    ys = torch.func.vmap(lambda x: layer(x)[0])(x)
    for one, row in zip(ys, x, strict=True):
        near(one, layer(row)[0], 1e-5)
    layer.train()
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: layer(x)[0])(x)
    same = x[:1].expand_as(x)
    for randomness in ("same", "different"):
        ys = torch.func.vmap(lambda x: layer(x)[0], randomness=randomness)(same)
        assert torch.allclose(ys[0], ys[1], atol=1e-5) == (randomness == "same")


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param("rnn_tanh", marks=pytest.mark.slow),
        pytest.param("gru", marks=pytest.mark.slow),
        "lstm_projected",
    ],
)
def test_compiled(cell):
    layer = make(cell, I, H, bidirectional=True, **EVERYTHING).eval()

    def run(x, lengths, resets):
        y, states, history = layer(x, lengths=lengths, resets=resets, return_states=True)
        return (y, *as_tuple(states), *history)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    args = torch.randn(2, B, I), torch.tensor([2, 0, 1]), torch.rand(2, B) < 0.3
    results, expected = compiled(*args), run(*args)
    for ours, theirs in zip(results, expected, strict=True):
        near(ours, theirs, 1e-5)
    inputs = list(layer.parameters())
    for ours, theirs in zip(grads(results, inputs), grads(expected, inputs), strict=True):
        near(ours, theirs, 1e-4)
    with pytest.raises(RuntimeError, match="lengths: expected values from 0 to 2"):
        compiled(args[0], args[1] + 3, args[2])
    layer.train()
    torch.manual_seed(1)
    results = compiled(*args)
    torch.manual_seed(1)
    for ours, theirs in zip(results, run(*args), strict=True):
        near(ours, theirs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"layer_norm": True}, marks=pytest.mark.slow),
        pytest.param({"peepholes": True}, marks=pytest.mark.slow),
        pytest.param({"zoneout": (0.1, 0.3)}, marks=pytest.mark.slow),
        pytest.param({"recurrent_dropout": 0.3}, marks=pytest.mark.slow),
        {**EVERYTHING, "recompute": True, "num_layers": 2},
    ],
    ids=lambda options: ".".join(options),
)
def test_a_compiler_gets_one_operator(options, dtype):
    """And compiles no second time where sizes change, whether a kernel runs or plain operations."""
    torch._dynamo.reset()
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    layer = fused_rnn.LSTM(I, H, bidirectional=True, dtype=dtype, **options)
    compilers = {"fw_compiler": record, "bw_compiler": record}
    backend = aot_autograd(**compilers)
    compiled = torch.compile(layer, backend=backend, dynamic=True, fullgraph=True)

    def step(function, x):
        torch.manual_seed(2)
        y, states = function(x)
        return [y, *states, *grads((y, *states), list(layer.parameters()))]

    for timesteps, batch in ((11, 7), (12, 8), (9, 6)):
        x = torch.randn(timesteps, batch, I, dtype=dtype)
        for actual, expected in zip(step(compiled, x), step(layer, x), strict=True):
            near(actual, expected, 1e-5 if dtype == torch.float32 else 1e-12)
    layers = options.get("num_layers", 1)
    forward, backward = graphs
    for graph, name in ((forward, "layer_forward"), (backward, "layer_backward")):
        assert graph.count(f"fused_rnn.{name}.default") == layers


def exported(layer, strict=False, dtype=torch.float32, timesteps=None):
    """As a program for any batch, and any number of timesteps unless one is given."""
    sizes = {0: timesteps or Dim("T"), 1: Dim("B")}
    args = (torch.randn(timesteps or T, B, I, dtype=dtype),)
    return torch.export.export(layer, args, dynamic_shapes=(sizes,), strict=strict)


@pytest.mark.parametrize(
    ("cell", "strict", "training", "dtype"),
    pairs(
        params({cell: (cell,) for cell in ("rnn_tanh", "gru_reset_before", "lstm_projected")}),
        params(
            {
                "strict-train-float32": (True, True, torch.float32),
                "non_strict-train-float64": (False, True, torch.float64),
                "strict-eval-float64": (True, False, torch.float64),
                "non_strict-eval-float32": (False, False, torch.float32),
            }
        ),
        one_in=2,
    ),
)
def test_exported_for_any_sizes(cell, strict, training, dtype):
    """As an operator, which trains, too."""
    layer = make(cell, I, H, 2, bidirectional=True, dtype=dtype, recompute=True, **EVERYTHING)
    layer.train(training)
    program, file = exported(layer, strict, dtype), io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for sizes in ((T, B), (9, 1), (1, 4)):
        x = torch.randn(*sizes, I, dtype=dtype)
        results = []
        for function in (loaded, layer):
            torch.manual_seed(1)
            y, states = function(x)
            outputs = [y, *as_tuple(states)]
            results.append([*outputs, *grads(outputs, list(function.parameters()))])
        for actual, expected in zip(*results, strict=True):
            near(actual, expected, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
def test_exported_and_decomposed(cell):
    """Into the steps' own operations, for one number of timesteps."""
    layer = make(cell, I, H, bidirectional=True, **EVERYTHING).eval()
    program = exported(layer, timesteps=T).run_decompositions(export.core_aten())
    assert not [node for node in program.graph.nodes if "fused_rnn" in str(node.target)]
    x = torch.randn(T, 7, I)
    for actual, expected in zip(program.module()(x), layer(x), strict=True):
        near(actual, expected, 1e-5)
    with pytest.raises(RuntimeError, match="expected a fixed number of timesteps"):
        exported(layer).run_decompositions(export.core_aten())
    if native.cpu_library_error() is None:  # whose operator is of plain layers
        program = exported(layer).run_decompositions(export.cpu_library()).module()
        for actual, expected in zip(program(x), layer(x), strict=True):
            near(actual, expected, 1e-5)


@pytest.mark.parametrize("changed", ["lengths", "resets", "batch_sizes", "peephole", "ln"])
def test_recompute_tells_what_has_changed(changed):
    """In float64, which no kernel takes. Before, gradients were those of what it had become."""
    options = {"peepholes": True} if changed == "peephole" else {"layer_norm": True}
    layer = fused_rnn.LSTM(I, H, dtype=torch.float64, recompute=True, **options)
    x, sizes = torch.randn(6, 3, I, dtype=torch.float64), torch.tensor([3, 2, 2, 1])
    masks = {"lengths": torch.tensor([2, 6, 4]), "resets": torch.rand(6, 3) < 0.5}
    if changed == "batch_sizes":
        y = layer(PackedSequence(x.flatten(0, 1)[:8], sizes))[0].data
    else:
        y = layer(x, **masks)[0]
    kept = {"batch_sizes": sizes, **masks, **dict(layer.named_parameters())}
    with torch.no_grad():
        next(t for name, t in kept.items() if changed in name).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@every_cell
def test_recompute_gives_the_same_bits_and_saves_less(cell):
    layer = make(cell, I, H, 2, **EVERYTHING)
    again = make(cell, I, H, 2, recompute=True, **EVERYTHING)
    again.load_state_dict(layer.state_dict())
    x, saved = torch.randn(T, B, I), []
    for module in (layer, again):
        sizes = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.untyped_storage().nbytes()), t)[1], lambda t: t
        ):
            y, _ = module(x)
        saved.append(sum(sizes))
        y.square().sum().backward()
    for a, b in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    # An RNN saves nothing but y on the kernels, either way.
    on_kernels = cell.startswith("rnn_") and native.cpu_library_error() is None
    assert saved[1] == saved[0] if on_kernels else saved[1] < saved[0]


def test_stateful():
    layer = make("lstm", I, H, 2, dtype=torch.float64, stateful=True, **EVERYTHING).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    whole, _ = layer(x)
    layer.reset_states()
    near(torch.cat([layer(part)[0] for part in x.split([1, 4])]), whole)


@every_cell
def test_state_dict_copies_and_pickles(cell):
    layer = make(cell, I, H, 2, bidirectional=True, **EVERYTHING)
    options = {name: getattr(layer, name) for name in EVERYTHING}
    other = make(cell, I, H, 2, bidirectional=True, **EVERYTHING)
    assert other.load_state_dict(layer.state_dict()) == ([], [])
    x = torch.randn(T, B, I)

    def run(module):
        torch.manual_seed(1)
        return module(x)[0]

    twins = other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for twin in twins:
        assert torch.equal(run(twin), run(layer))
        assert {name: getattr(twin, name) for name in EVERYTHING} == options
        assert repr(twin) == repr(layer)
    for name, value in options.items():
        assert (f"{name}={value}" in repr(layer)) == bool(value)
    expected = set()
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        if layer.peepholes:
            expected.add("weight_peephole" + suffix)
        if layer.layer_norm:
            expected |= {f"ln_ih_weight{suffix}", f"ln_hh_weight{suffix}"}
        if layer.layer_norm and cell.startswith("lstm"):
            expected |= {f"ln_c_weight{suffix}", f"ln_c_bias{suffix}"}
    assert set(layer.state_dict()) - set(make(cell, I, H, 2, bidirectional=True).state_dict()) == (
        expected
    )
    assert layer.double()(x.double())[0].dtype == torch.float64


def test_peepholes_of_zero_and_no_normalisation_are_plain():
    layer = make("lstm", I, H, 2, peepholes=True)
    plain = make("lstm", I, H, 2)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(T, B, I)
    assert not torch.allclose(layer(x)[0], plain(x)[0])
    for name, parameter in layer.named_parameters():
        if "peephole" in name:
            torch.nn.init.zeros_(parameter)
    near(layer(x)[0], plain(x)[0], 1e-5)


@every_cell
def test_weights_are_torch_nns_bits(cell):
    """Whatever else there is, what torch.nn has is drawn as torch.nn draws it."""
    torch.manual_seed(2)
    plain = make(cell, I, H, 2, bidirectional=True).state_dict()
    torch.manual_seed(2)
    layer = make(cell, I, H, 2, bidirectional=True, **EVERYTHING)
    for name, value in plain.items():
        assert torch.equal(layer.state_dict()[name], value)


@pytest.mark.parametrize("name", ["GRU", "LSTM"])
@pytest.mark.parametrize("init", ["uniform", "orthogonal"])
def test_initial_values(name, init):
    options = {"layer_norm": True, "init": init}
    if name == "LSTM":
        options |= {"forget_bias": 1.5, "peepholes": True, "proj_size": 7}
    torch.manual_seed(2)
    layer = getattr(fused_rnn, name)(5, 10, 2, bidirectional=True, **options)
    torch.manual_seed(2)
    again = copy.deepcopy(layer)
    again.reset_parameters()
    for ours, theirs in zip(layer.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    eye = torch.eye(layer.proj_size or 10)
    for key, value in layer.state_dict().items():
        if key.startswith("ln_"):
            assert (value == (0 if "bias" in key else 1)).all()
        elif key.startswith("weight_hh"):
            for gate in value.split(10):
                assert torch.allclose(gate.T @ gate, eye, atol=1e-5) == (init == "orthogonal")
        elif key.startswith("bias_"):
            if name == "LSTM":
                assert (value[10:20] == (1.5 if "_ih_" in key else 0)).all()
            assert (value[:10] == 0).all() == (init == "orthogonal")
        elif key.startswith("weight_ih"):
            bound = (6 / (10 + value.shape[1])) ** 0.5 if init == "orthogonal" else 10**-0.5
            assert 0.8 * bound < value.abs().max() <= bound
        elif key.startswith("weight_peephole"):
            assert 0 < value.abs().max() <= 10**-0.5 and value.std() > 0
    assert f"init={init!r}" in repr(layer) or init == "uniform"


def test_initial_values_of_half_types_and_without_memory():
    layer = fused_rnn.LSTM(3, 4, init="orthogonal", forget_bias=1, dtype=torch.bfloat16)
    assert layer.weight_hh_l0.dtype == torch.bfloat16
    options = {"init": "orthogonal", "forget_bias": 1, **EVERYTHING}
    layer = fused_rnn.LSTM(3, 4, device="meta", **options)
    assert layer(torch.randn(T, B, 3, device="meta"))[0].shape == (T, B, 4)


@pytest.mark.parametrize("init", [{"init": "orthogonal"}, {"forget_bias": 1.0}])
def test_initial_values_alone_are_torch_nns_lstm(init):
    layer = fused_rnn.LSTM(I, H, **init)
    x = torch.randn(T, B, I)
    expected = layer(x)[0]
    assert "reference:" not in str(fused_rnn.explain(layer, x))
    near(fused_rnn.restore(layer, strict=True)(x)[0], expected, 1e-5)
    assert type(layer) is torch.nn.LSTM


@every_option
def test_restore_says_why_not(options):
    layer = fused_rnn.LSTM(I, H, **options)
    model = torch.nn.Sequential(layer)
    for name, value in options.items():
        with pytest.raises(ValueError, match=r"torch\.nn has no .*") as found:
            fused_rnn.restore(model, strict=True)
        assert f"{name}={value}" in str(found.value)
    with pytest.warns(UserWarning, match=r"torch\.nn has no"):
        fused_rnn.restore(model)
    assert fused_rnn.replace(model)[0] is layer and type(layer) is fused_rnn.LSTM


@every_option
def test_a_trace_would_be_torch_nns(options):
    layer = fused_rnn.LSTM(I, H, **options)
    x = torch.randn(T, B, I)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace .* expected no .*") as found:
        torch.jit.trace(layer, x)
    for name, value in options.items():
        assert f"{name}={value}" in str(found.value)


def test_a_trace_of_what_is_idle():
    layer = fused_rnn.LSTM(I, H, weight_dropout=0.5, recurrent_dropout=0.5).eval()
    x = torch.randn(T, B, I)
    near(torch.jit.trace(layer, x)(x)[0], layer(x)[0], 1e-5)


def test_explain_says_what_ran(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = fused_rnn.LSTM(I, H, 2, dtype=torch.float64, **EVERYTHING)
    x = torch.randn(T, B, I, dtype=torch.float64)
    names = "recurrent_dropout, zoneout, layer_norm, peepholes"
    found = fused_rnn.explain(layer, x)
    assert [choice.kernel for choice in found.layers] == [f"reference: {names}"] * 2
    assert dict(found.layers[0].refusals) == {
        "cpu": "needs dtype float32, bfloat16 or float16, got torch.float64"
    }
    layer.eval()
    expected = "reference: zoneout, layer_norm, peepholes"
    assert fused_rnn.explain(layer, x).layers[0].kernel == expected
    with torch.no_grad():
        assert fused_rnn.explain(layer, x).layers[0].kernel == expected
    with fused_rnn.backend("reference"):
        layer(x)
    with (
        fused_rnn.backend("cuda"),
        pytest.raises(fused_rnn.UnsupportedProblemError, match=r"has no kernel for zoneout, layer"),
    ):
        layer(x)


def test_options_can_be_changed():
    layer = fused_rnn.LSTM(I, H)
    x = torch.randn(T, B, I)
    layer(x)
    layer.zoneout = 0.5
    with fused_rnn.backend("reference"):
        assert fused_rnn.explain(layer, x).layers[0].kernel == "reference: zoneout"
    layer.zoneout = (0, 0)
    assert "zoneout" not in repr(layer) and "reference:" not in str(fused_rnn.explain(layer, x))
    layer.recurrent_dropout, layer.weight_dropout = 0.5, 0.25
    assert layer.weight_dropout == 0.25
    with fused_rnn.backend("reference"):
        assert fused_rnn.explain(layer, x).layers[0].kernel == "reference: recurrent_dropout"
    with pytest.raises(ValueError, match=r"zoneout: expected a probability in \[0, 1\], got 2"):
        layer.zoneout = 2
    with pytest.raises(ValueError, match="zoneout: expected one number, since GRU has no c"):
        fused_rnn.GRU(I, H).zoneout = (0.1, 0.1)
    for name in ("layer_norm", "peepholes", "forget_bias", "init"):
        with pytest.raises(AttributeError, match=f"{name}: cannot be changed after construction"):
            setattr(layer, name, getattr(layer, name))
    converted = fused_rnn.replace(torch.nn.LSTM(I, H))
    converted.recurrent_dropout = 0.5
    assert "recurrent_dropout=0.5" in repr(converted)


BAD = [
    ("LSTM", {"recurrent_dropout": -0.1}, ValueError, r"recurrent_dropout: .* \[0, 1\], got -0.1"),
    ("LSTM", {"recurrent_dropout": 1.5}, ValueError, r"recurrent_dropout: .* \[0, 1\], got 1.5"),
    ("LSTM", {"recurrent_dropout": float("nan")}, ValueError, r"recurrent_dropout: .* got nan"),
    ("GRU", {"recurrent_dropout": True}, TypeError, "recurrent_dropout: .* a number, got bool"),
    ("GRU", {"recurrent_dropout": "0.1"}, TypeError, "recurrent_dropout: .* a number, got str"),
    ("RNN", {"recurrent_dropout": None}, TypeError, "recurrent_dropout: .* got NoneType"),
    ("RNN", {"weight_dropout": 2}, ValueError, r"weight_dropout: .* \[0, 1\], got 2"),
    ("RNN", {"weight_dropout": torch.tensor(0.5)}, TypeError, "weight_dropout: .* got Tensor"),
    ("LSTM", {"zoneout": -1}, ValueError, r"zoneout: .* \[0, 1\], got -1"),
    ("LSTM", {"zoneout": (0.1, 1.1)}, ValueError, r"zoneout\[1\]: .* \[0, 1\], got 1.1"),
    ("LSTM", {"zoneout": (0.1, None)}, TypeError, r"zoneout\[1\]: .* a number, got NoneType"),
    ("LSTM", {"zoneout": (0.1,)}, ValueError, r"zoneout: .* a pair \(p_h, p_c\), got \(0.1,\)"),
    ("LSTM", {"zoneout": {}}, TypeError, "zoneout: expected a number, got dict"),
    ("GRU", {"zoneout": (0.1, 0.1)}, ValueError, "zoneout: .* since GRU has no c"),
    ("RNN", {"layer_norm": True}, ValueError, "layer_norm: expected a GRU or an LSTM, got RNN"),
    ("LSTM", {"layer_norm": 1}, TypeError, "layer_norm: expected a bool, got int"),
    ("GRU", {"peepholes": True}, ValueError, "peepholes: expected an LSTM, .* got GRU"),
    ("LSTM", {"peepholes": None}, TypeError, "peepholes: expected a bool, got NoneType"),
    ("RNN", {"forget_bias": 1.0}, ValueError, "forget_bias: expected an LSTM, got RNN"),
    ("LSTM", {"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias: expected bias=True"),
    ("LSTM", {"forget_bias": float("inf")}, ValueError, "forget_bias: .* finite number, got inf"),
    ("LSTM", {"forget_bias": True}, TypeError, "forget_bias: expected a number, got bool"),
    ("GRU", {"init": "xavier"}, ValueError, "init: expected 'uniform' or 'orthogonal', got"),
    ("GRU", {"init": None}, TypeError, "init: expected a str, got NoneType"),
    ("LSTM", {"zone_out": 0.1}, TypeError, "LSTM: unexpected keyword argument 'zone_out'"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), BAD)
def test_bad_options(name, options, error, message):
    with pytest.raises(error, match=message):
        getattr(fused_rnn, name)(I, H, **options)


@pytest.mark.parametrize(
    "number", [np.float64, np.float32, np.float16, np.int64], ids=lambda n: n.__name__
)
def test_options_may_be_numpys_numbers(number):
    """As a schedule gives them; and those compare with tuples element by element."""
    value = number(0 if number is np.int64 else 0.5)
    names = ("recurrent_dropout", "zoneout", "weight_dropout", "forget_bias")
    layer = fused_rnn.LSTM(I, H, **dict.fromkeys(names, value))
    expected = fused_rnn.LSTM(I, H, **dict.fromkeys(names, float(value)))
    assert repr(layer) == repr(expected)
    for name in names[:3]:
        setattr(layer, name, value)
    layer.zoneout = (value, value)
    assert layer(torch.randn(T, B, I))[0].isfinite().all()
    for name in names[:3]:
        setattr(layer, name, number(0))
    assert type(fused_rnn.restore(layer)) is torch.nn.LSTM


def test_masks_of_zoneout_do_not_depend_on_the_default_dtype():
    """The numbers that bfloat16 draws are too few for small probabilities."""
    layer, x = fused_rnn.LSTM(I, H, zoneout=(0.3, 0.4)), torch.randn(T, B, I)
    results = []
    try:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            torch.manual_seed(0)
            results.append(layer(x)[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(results[0], result) for result in results[1:])


@pytest.mark.parametrize("name", ["weight_peephole_l0", "ln_ih_weight_l0", "ln_c_bias_l0"])
def test_bad_parameters(name):
    x = torch.randn(T, B, I)
    for value, message in (
        (torch.ones(1), r"expected shape \[\d+\], got \[1\]"),
        (None, "expected a Tensor, got NoneType"),
        (torch.ones(16).double(), "expected (shape|dtype)"),
    ):
        layer = fused_rnn.LSTM(I, H, layer_norm=True, peepholes=True)
        delattr(layer, name)
        setattr(layer, name, value)
        with pytest.raises((RuntimeError, TypeError), match=f"{name}: {message}"):
            layer(x)


@every_option
@pytest.mark.parametrize("training", [False, True])
def test_bad_input_is_told_as_ever(options, training):
    layer = fused_rnn.LSTM(I, H, **options)
    x = torch.randn(T, B, I)
    with torch.set_grad_enabled(training):
        with pytest.raises(RuntimeError, match="must be equal to input_size"):
            layer(torch.randn(T, B, I + 1))
        with pytest.raises(RuntimeError, match="lengths: expected values from 0 to 5"):
            layer(x, lengths=torch.tensor([6, 1, 1]))
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
            layer(x, (torch.zeros(1, B, H + 1), torch.zeros(1, B, H)))
        with pytest.raises(TypeError, match="input: expected"):
            layer("x")
    assert layer(torch.randn(T, 0, I))[0].shape == (T, 0, H)
    assert layer(torch.randn(1, I))[0].shape == (1, H)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_it_learns(cell):
    """To tell which of two symbols came first, past six steps of noise, with everything on."""
    options = {
        "recurrent_dropout": 0.1, "zoneout": (0.05, 0.05), "weight_dropout": 0.1,
        "layer_norm": True, "peepholes": True, "init": "orthogonal",
    }  # fmt: skip
    layer = make(cell, 2, 16, **options)
    head = torch.nn.Linear(16, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 0.01)
    extras = [p.detach().clone() for n, p in layer.named_parameters() if "ln" in n or "peep" in n]

    def loss():
        target = torch.randint(0, 2, (64, 1)).float()
        x = torch.randn(7, 64, 2) / 4
        x[0, :, :1] += 2 * target - 1
        y, _ = layer(x)
        return torch.nn.functional.binary_cross_entropy_with_logits(head(y[-1]), target)

    first = loss().item()
    for _ in range(80):
        optimizer.zero_grad()
        (value := loss()).backward()
        optimizer.step()
    layer.eval()
    assert loss().item() < first / 3, (first, value.item())
    after = [p for n, p in layer.named_parameters() if "ln" in n or "peep" in n]
    assert all(not torch.equal(a, b) for a, b in zip(extras, after, strict=True))
