"""Every backend, cell, dtype and shape against the float64 oracle, straight from the tables."""

import functools
from dataclasses import replace

import pytest
import torch
from helpers.needs import each_instruction_set, skip_unless_supported

import fused_rnn
from fused_rnn import testing
from fused_rnn.backends.reference import ReferenceBackend
from fused_rnn.cells import CELLS
from fused_rnn.testing import LayerCase

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _fast_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    cases = [
        case(1, 1, 1, 1),
        case(9, 2, 1, 1, directions=2),
        case(1, 3, 4, 5),
        case(6, 1, 3, 17),
        case(7, 3, 5, 17, directions=2),
        case(3, 129, 2, 9),
        case(3, 0, 4, 5),
        case(3, 0, 4, 5, directions=2),
        case(12, 2, 7, 100),
        case(4, 3, 5, 16, bias=False),
        case(4, 3, 5, 7, bias=False, directions=2),
        packed([4, 4, 4], 5, 6),
        packed([5, 4, 3, 2, 1], 3, 8),
        packed([5, 4, 3, 2, 1], 3, 8, directions=2),
        packed([9, 1, 1, 1], 4, 7, directions=2),
        packed([1, 1], 2, 3, directions=2),
        packed([6], 2, 5, bias=False),
        packed([7, 5, 5, 2], 3, 33, bias=False, directions=2),
    ]
    cases += _masked_cases(cell)
    if CELLS[cell].has_c:
        cases += [
            case(5, 3, 4, 9, proj_size=4),
            case(5, 2, 4, 6, proj_size=1, bias=False, directions=2),
            case(1, 0, 4, 6, proj_size=2),
            packed([5, 3, 1], 2, 7, proj_size=3, directions=2),
        ]
    return cases


def _masked_cases(cell: str) -> list[LayerCase]:
    """Lengths, resets, and for LSTM every step's c."""
    case = functools.partial(LayerCase, cell)
    every_mask = {"resets": True, "reset_states": True}
    cases = [
        case(6, 4, 3, 5, ends=(3, 6, 1, 4)),
        case(6, 3, 3, 17, ends=(2, 0, 4), directions=2),
        case(3, 2, 3, 4, ends=(0, 0), resets=True, reset_states=True, directions=2),
        case(1, 2, 3, 4, resets=True, directions=2),
        case(9, 5, 3, 8, resets=True),
        case(9, 2, 4, 7, resets=True, reset_states=True, bias=False),
        case(8, 5, 3, 9, ends=(8, 1, 5, 0, 7), resets=True, reset_states=True, directions=2),
        case(4, 0, 2, 3, resets=True, directions=2),
    ]
    if CELLS[cell].has_c:
        packed = functools.partial(LayerCase.packed, cell)
        cases += [
            case(5, 3, 2, 6, states=True),
            case(5, 3, 2, 6, states=True, proj_size=4, directions=2),
            packed([5, 3, 3, 1], 4, 9, states=True, directions=2),
            case(7, 3, 4, 9, ends=(7, 2, 0), directions=2, **every_mask, states=True),
            case(7, 3, 4, 9, ends=(7, 2, 5), resets=True, proj_size=3, directions=2),
        ]
    return cases


def _slow_cases(cell: str) -> list[LayerCase]:
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    cases = [
        case(t, b, i, h, directions=d, bias=bias)
        for t, b, h in ((1, 129, 17), (2, 3, 100), (33, 1, 17), (33, 129, 1), (65, 3, 31))
        for i in (1, 15, 64)
        for d in (1, 2)
        for bias in (True, False)
    ]
    cases += [case(3, b, 33, 650, directions=d) for b in (1, 3, 129) for d in (1, 2)]
    cases += [
        case(
            t, b, 7, h, directions=d, resets=True, reset_states=rs,
            ends=tuple((i * 13) % (t + 1) for i in range(b)),
        )
        for t, b, h in ((33, 129, 17), (65, 3, 100), (7, 33, 1))
        for d in (1, 2)
        for rs in (False, True)
    ]  # fmt: skip
    cases += [case(100, 4, 3, 100), case(300, 2, 3, 16, directions=2)]
    cases += [
        packed(lengths, 11, h, directions=d)
        for lengths in (
            [50] + [1] * 20,
            [33] * 5,
            list(range(40, 0, -1)),
            [64, 64, 63, 31, 31, 31, 2, 1],
            [2] * 128 + [1],
        )
        for h in (1, 17, 100)
        for d in (1, 2)
    ]
    if CELLS[cell].has_c:
        cases += [
            case(20, b, 9, h, proj_size=p, directions=d)
            for b, h, p in ((1, 17, 16), (3, 100, 1), (33, 100, 50))
            for d in (1, 2)
        ]
        cases += [packed([30, 29, 7, 1], 9, 40, proj_size=13, directions=2)]
    return cases


def _params(cases, dtypes=DTYPES, losses=("all",), marks=()):
    """(backend, case, loss), the backend changing fastest, so that expectations are shared."""
    return [
        pytest.param(
            backend,
            replace(case, dtype=dtype, device=device),
            loss,
            id="-".join(
                (backend, case.cell, str(dtype).removeprefix("torch."), str(case))
                + (() if loss == "all" else (f"only_{loss}",))
                + (() if device == "cpu" else (device,))
            ),
            marks=(*marks, *([pytest.mark.gpu] if device == "cuda" else [])),
        )
        for device in DEVICES
        for cell in CELLS
        for case in cases(cell)
        for dtype in dtypes
        for loss in losses
        if (loss != "c_n" or CELLS[cell].has_c) and (loss != "cells" or case.states)
        for backend in testing.backends_on(device)
    ]


def _every_loss_cases(cell: str) -> list[LayerCase]:
    cases = [
        LayerCase(cell, 4, 3, 5, 6),
        LayerCase(cell, 1, 3, 5, 6, directions=2),
        LayerCase.packed(cell, [4, 2, 2, 1], 3, 5, directions=2),
    ]
    if CELLS[cell].has_c:
        cases += [
            LayerCase.packed(cell, [4, 2, 1], 3, 5, proj_size=2, directions=2),
            LayerCase(cell, 4, 3, 5, 6, directions=2, ends=(2, 4, 1), resets=True, states=True),
        ]
    return cases


@functools.lru_cache(maxsize=2)
def _expectations(case: LayerCase, loss: str):
    oracle = testing.results_of_draws(testing.run_oracle, case, loss, torch.float64)
    return oracle, testing.results_of_draws(testing.run_torch, case, loss)


@pytest.mark.parametrize(
    ("backend", "case", "loss"),
    [
        *_params(_fast_cases),
        *_params(_every_loss_cases, (torch.float32, torch.float64), ("y", "h_n", "c_n", "cells")),
        *_params(_slow_cases, marks=[pytest.mark.slow]),
    ],
)
def test_accuracy(backend, case, loss):
    """Outputs, states and every gradient: at most twice torch.nn's error, and a few roundings."""
    skip_unless_supported(backend, testing.make_inputs(case))
    with fused_rnn.backend(backend):
        actual = testing.results_of_draws(testing.run_layer, case, loss)
    testing.assert_accurate(actual, *_expectations(case, loss), case)


def _masked(*dtypes):
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(replace(case, dtype=dtype), id=f"{cell}-{str(dtype)[6:]}-{case}")
            for cell in CELLS
            for case in _masked_cases(cell)
            for dtype in dtypes
        ],
    )


@each_instruction_set
@_masked(torch.float32, torch.bfloat16)
def test_accuracy_of_masks_with_every_instruction_set(case, instruction_set):
    skip_unless_supported("cpu", testing.make_inputs(case))
    actual = testing.results_of_draws(testing.run_layer, case)
    testing.assert_accurate(actual, *_expectations(case, "all"), case)


@_masked(*DTYPES)
def test_accuracy_of_the_reference_where_the_host_does_not_know_the_masks(case, monkeypatch):
    """As on a GPU, on the CPU."""
    monkeypatch.setattr(ReferenceBackend, "takes_masks", lambda *_: True)
    with fused_rnn.backend("reference"):
        actual = testing.results_of_draws(testing.run_layer, case)
    testing.assert_accurate(actual, *_expectations(case, "all"), case)


def _one_dtype_params(cases):
    """Each backend's native dtype: float32, which all of them have."""
    return _params(cases, (torch.float32,))


def _small_cases(cell: str) -> list[LayerCase]:
    return [
        LayerCase(cell, 5, 3, 4, 6, directions=2),
        LayerCase(cell, 5, 3, 4, 6, directions=2, ends=(2, 5, 0), resets=True, reset_states=True),
        LayerCase.packed(cell, [5, 4, 2], 3, 5, directions=2),
        *([LayerCase(cell, 4, 3, 5, 6, proj_size=2)] if CELLS[cell].has_c else []),
    ]


small = pytest.mark.parametrize(("backend", "case", "loss"), _one_dtype_params(_small_cases))


@small
def test_inference_gives_the_same_numbers_as_training(backend, case, loss):
    inputs = testing.make_inputs(case)
    skip_unless_supported(backend, inputs, training=False)
    with fused_rnn.backend(backend):
        training = testing.run_layer(inputs.leaves())
        with torch.no_grad():
            inference = testing.run_layer(inputs)
    for name, ours, expected in zip(testing.OUTPUT_NAMES, inference, training, strict=False):
        testing.assert_same_numbers({name: ours}, {name: expected}, roundings=testing.ROUNDINGS)


@small
def test_arguments_are_left_as_they_were(backend, case, loss):
    """No pass writes to what it was given: inputs, gradients, and what forward saved."""
    inputs = testing.make_inputs(case)
    skip_unless_supported(backend, inputs)
    before = inputs.map(torch.clone)
    torch.ops.fused_rnn.layer_forward(*inputs.forward_args(False, backend))
    for name, tensor in inputs.tensors.items():
        assert torch.equal(tensor, before.tensors[name]), name
    y, h_n, c_n, gates, cells = torch.ops.fused_rnn.layer_forward(
        *inputs.forward_args(True, backend)
    )
    grads = testing.make_cotangents(case)
    given = [y, h_n, c_n, gates, cells, *grads.values()]
    copies = [t.clone() for t in given]
    torch.ops.fused_rnn.layer_backward(
        *inputs.backward_args(grads, (y, gates, cells), inputs.given, backend)
    )
    for name, tensor in inputs.tensors.items():
        assert torch.equal(tensor, before.tensors[name]), name
    for i, (tensor, copy) in enumerate(zip(given, copies, strict=True)):
        assert torch.equal(tensor, copy), i


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with the strides of the first and last dimensions swapped."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in every other element of larger memory, from an odd offset on."""
    wide = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@small
@pytest.mark.parametrize("layout", [_transposed, _spread])
def test_memory_layout(backend, case, loss, layout):
    """Strides of inputs and of incoming gradients do not change what is computed."""
    inputs = testing.make_inputs(case)
    skip_unless_supported(backend, inputs)
    cotangents = testing.make_cotangents(case)
    strided = {name: layout(c) for name, c in cotangents.items()}
    with fused_rnn.backend(backend):
        expected = testing.results_and_grads(testing.run_layer, inputs.leaves(), cotangents)
        leaves = inputs.map(lambda t: layout(t).requires_grad_())
        actual = testing.results_and_grads(testing.run_layer, leaves, strided)
    # Another order of summation in a matrix product is all there may be.
    testing.assert_same_numbers(actual, expected, roundings=32)


@small
def test_expanded_gradients(backend, case, loss):
    """The gradient of a sum has strides of zero."""
    inputs = testing.make_inputs(case)
    skip_unless_supported(backend, inputs)
    ones = {name: torch.ones_like(c) for name, c in testing.make_cotangents(case).items()}
    expanded = {name: c.new_ones(()).expand_as(c) for name, c in ones.items()}
    with fused_rnn.backend(backend):
        expected = testing.results_and_grads(testing.run_layer, inputs.leaves(), ones)
        actual = testing.results_and_grads(testing.run_layer, inputs.leaves(), expanded)
    testing.assert_same_numbers(actual, expected, roundings=32)


@small
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e30])
def test_extreme_input(backend, case, loss, value):
    """NaN, infinities and overflow show up in the very elements in which torch.nn has them."""
    inputs = testing.make_inputs(case)
    skip_unless_supported(backend, inputs)
    inputs.x.view(-1)[case.input_size] = value  # the second row
    cotangents = testing.make_cotangents(case)
    with fused_rnn.backend(backend):
        actual = testing.results_and_grads(testing.run_layer, inputs.leaves(), cotangents)
    expected = testing.results_and_grads(testing.run_torch, inputs.leaves(), cotangents)
    testing.assert_same_numbers(actual, expected)


def _wide_cases(cell: str) -> list[LayerCase]:
    """Large enough to be shared out among threads."""
    return [
        LayerCase(cell, 3, 33, 4, 70, directions=2),
        LayerCase.packed(cell, [4, 4, 3] + [2] * 20 + [1] * 10, 3, 70, directions=2),
    ]


@pytest.mark.parametrize(("backend", "case", "loss"), _one_dtype_params(_wide_cases))
def test_several_threads(backend, case, loss, num_threads):
    skip_unless_supported(backend, testing.make_inputs(case))
    expectations = _expectations(case, loss)
    num_threads(3)
    with fused_rnn.backend(backend):
        actual = testing.results_of_draws(testing.run_layer, case)
    testing.assert_accurate(actual, *expectations, case)
