"""Steppers with weights of 8 bits: whole numbers multiplied exactly, and scales."""

import pytest
import torch
from helpers.needs import needs_library
from helpers.outcomes import flat
from helpers.steppers import SIZES, every_cell, make, run, start

import fused_rnn
from fused_rnn import native
from fused_rnn.cells import CELL_OF_MODE

pytestmark = needs_library


def product(rows, weight):
    """Of whole numbers, and scales whose products with them are nearest to rows and weights."""
    largest = rows.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)  # in float32, as the kernels take it
    numbers = (rows.double() * inverse.double()).round()
    scale = weight.abs().amax(-1, keepdim=True) / 127
    weight = (weight / scale).round().double()
    return (numbers @ weight.T) * (largest.double() / 127) * scale.T.double()


def step_by_hand(module, x, state):
    """One step of one layer: y [B, P], h and c as the equations have them, in float64."""
    cell = CELL_OF_MODE[module.mode]
    h, *c = (s[0] for s in flat(state))
    gx, gh = product(x, module.weight_ih_l0), product(h, module.weight_hh_l0)
    if module.bias:
        gx, gh = gx + module.bias_ih_l0, gh + module.bias_hh_l0
    if cell.name.startswith("rnn"):
        new = torch.tanh(gx + gh) if cell.name == "rnn_tanh" else torch.relu(gx + gh)
        return new, [new]
    if cell.name == "gru":
        (r, z, n), (h_r, h_z, h_n) = gx.chunk(3, -1), gh.chunk(3, -1)
        z = torch.sigmoid(z + h_z)
        n = torch.tanh(n + torch.sigmoid(r + h_r) * h_n)
        new = (1 - z) * n + z * h
        return new, [new]
    i, f, g, o = (gx + gh).chunk(4, -1)
    c = torch.sigmoid(f) * c[0] + torch.sigmoid(i) * torch.tanh(g)
    new = torch.sigmoid(o) * torch.tanh(c)
    if module.proj_size:
        new = product(new.float(), module.weight_hr_l0)
    return new, [new, c]


@every_cell
@pytest.mark.parametrize("batch", [1, 3, 13])
@pytest.mark.parametrize("bias", [True, False])
def test_a_step_by_hand(cell, batch, bias, instruction_set):
    """Of every instruction set: sums are exact, so what remains is float32's rounding."""
    for inputs, hidden in SIZES:
        if cell == "projected" and hidden == 1:
            continue
        module = make(cell, inputs, hidden, bias=bias).requires_grad_(False)
        step = fused_rnn.stepper(module, weight_dtype=torch.int8)
        assert step.packed and step.weight_dtype == torch.int8
        x, state = torch.randn(batch, inputs), start(module, batch)
        expected, expected_state = step_by_hand(module, x, state)
        # A projection's operand is quantised from what differs in its last bits.
        tolerance = 1e-2 if cell == "projected" else 2e-6
        y, found = step(x, state)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
        for got, want in zip(flat(found), expected_state, strict=True):
            torch.testing.assert_close(got[0].double(), want, rtol=0, atol=tolerance)
        assert torch.equal(step._by_operator(x, state)[0], y)


@every_cell
def test_layers_are_steppers_of_their_own(cell, instruction_set):
    module = make(cell, 21, 70, num_layers=2)
    ours = fused_rnn.stepper(module, weight_dtype=torch.int8)
    halves = []
    for suffix, inputs in (("_l0", 21), ("_l1", module.proj_size or 70)):
        half = make(cell, inputs, 70)
        own = {k: v for k, v in module.state_dict().items() if k.endswith(suffix)}
        half.load_state_dict({k.replace(suffix, "_l0"): v for k, v in own.items()})
        halves.append(fused_rnn.stepper(half, weight_dtype=torch.int8))
    xs = torch.randn(7, 3, 21)
    between = xs
    for half in halves:
        between, _ = run(half, between)
    assert torch.equal(run(ours, xs)[0], between)


@pytest.mark.filterwarnings("ignore")  # torch's own, of deprecated names
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("sizes", [(40, 30, 1), (128, 128, 4), (64, 300, 2)], ids=str)
def test_nearer_to_float32_than_torchs_quantized_layers(cell, sizes):
    inputs, hidden, batch = sizes
    module = make(cell, inputs, hidden, num_layers=2)
    theirs = torch.nn.Sequential(fused_rnn.restore(module))
    try:
        quantized = torch.ao.quantization.quantize_dynamic(theirs, dtype=torch.qint8)
    except RuntimeError as error:
        pytest.skip(f"torch quantizes nothing here: {error}")
    xs = torch.randn(50, batch, inputs)
    with torch.no_grad():
        exact, theirs_y = theirs(xs)[0], quantized(xs)[0]
    ours, _ = fused_rnn.stepper(theirs[0], weight_dtype=torch.int8)(xs)
    assert (ours - exact).norm() <= (theirs_y - exact).norm()


def test_memory():
    module = fused_rnn.LSTM(256, 512, num_layers=2)
    sizes = {
        dtype: fused_rnn.stepper(module, weight_dtype=dtype)._weights.numel()
        for dtype in (torch.float32, torch.int8)
    }
    assert sizes[torch.int8] < 0.26 * sizes[torch.float32]


@every_cell
def test_numbers_that_are_not_finite(cell, instruction_set):
    """What has one is NaN, and nothing else."""
    module = make(cell, 9, 33)
    step = fused_rnn.stepper(module, weight_dtype=torch.int8)
    x = torch.randn(4, 9)
    clean, _ = step(x)
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[1, 8] = value
        y, _ = step(spoilt)
        assert y[1].isnan().all() and torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])
    with torch.no_grad():
        module.weight_ih_l0[5, 3] = torch.nan
    y, _ = fused_rnn.stepper(module, weight_dtype=torch.int8)(x)
    if cell != "projected":
        assert y[:, 5].isnan().all() and y[:, :5].isfinite().all() and y[:, 6:].isfinite().all()


@every_cell
def test_extreme_rows(cell, instruction_set):
    """Zeros, denormals, and numbers near the end of float32's range."""
    module = make(cell, 9, 33)
    step = fused_rnn.stepper(module, weight_dtype=torch.int8)
    x, state = torch.randn(1, 9), start(module, 1)
    nothing, _ = step(torch.zeros(1, 9), state)
    assert nothing.isfinite().all()
    for small in (1e-40, 1e-37, 1e-30):
        torch.testing.assert_close(step(small * x, state)[0], nothing, rtol=0, atol=1e-6)
    huge, _ = step(1e37 * x, state)
    if cell not in ("rnn_relu",):
        assert huge.isfinite().all()
    with torch.no_grad():
        module.weight_ih_l0.zero_()
    y, _ = fused_rnn.stepper(module, weight_dtype=torch.int8)(x, state)
    torch.testing.assert_close(y, nothing, rtol=0, atol=1e-6)


def test_sums_do_not_saturate(instruction_set):
    """Of the largest numbers in the deepest product there is."""
    depth = 2**17 - 1
    module = fused_rnn.RNN(depth, 2, nonlinearity="relu", bias=False).requires_grad_(False)
    module.weight_ih_l0[0], module.weight_ih_l0[1] = 1.0, -1.0
    step = fused_rnn.stepper(module, weight_dtype=torch.int8)
    for sign in (1.0, -1.0):
        y, _ = step(torch.full((1, depth), sign))
        expected = torch.tensor([[depth, 0.0]] if sign > 0 else [[0.0, depth]])
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


def test_what_is_too_deep_for_bytes():
    module = fused_rnn.RNN(2**17, 1)
    with pytest.raises(ValueError, match=r"weight_dtype: expected torch\.float32 or torch\.bfloat"):
        fused_rnn.stepper(module, weight_dtype=torch.int8)
    native.cpu_library_error()
    with pytest.raises(RuntimeError, match="less than 2\\^17 of bytes"):
        torch.ops.fused_rnn_cpu.step(
            torch.zeros(1), 0, 1, 2**17, 1, 1, True, 4, torch.zeros(1, 2**17), None
        )
