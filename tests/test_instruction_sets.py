"""Each instruction set of the CPU library, forced: against the oracle, and against each other."""

import functools
import itertools
import math
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
from helpers.needs import each_instruction_set, skip_unless_supported
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fused_rnn import dispatch, native, ops, testing
from fused_rnn.cells import CELLS
from fused_rnn.layer_call import make_problem
from fused_rnn.testing import LayerCase

pytestmark = pytest.mark.usefixtures("poisoned")

HIDDEN_SIZES = (1, 7, 17, 33, 100, 130)
BATCH_SIZES = (1, 2, 3, 5, 9, 33)
TIMESTEPS = (1, 2, 19)
INPUT_SIZES = (1, 3, 16, 45)


def _fast_cases(cell: str) -> list[LayerCase]:
    """Every size above, with every other in the neighbourhood of a vector or a tile."""
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    cases = [
        case(1, 1, 1, 1),
        case(1, 2, 45, 130),
        case(1, 33, 3, 100, directions=2),
        case(2, 5, 16, 17, directions=2),
        case(2, 9, 45, 100, bias=False, directions=2),
        case(2, 33, 1, 33, bias=False),
        case(19, 1, 3, 33, directions=2),
        case(19, 2, 16, 100),
        case(19, 3, 1, 7, bias=False, directions=2),
        case(19, 5, 3, 1),
        case(19, 9, 3, 17),
        packed([19, 19, 2, 1, 1], 16, 33, directions=2),
        packed([2] * 5 + [1] * 28, 3, 17, bias=False, directions=2),
        packed([19, 7, 1], 1, 130),
        packed([2, 1], 45, 7, bias=False, directions=2),
        packed(range(9, 0, -1), 3, 100, directions=2),
    ]
    # Of these the weights are not packed: a few rows of a few timesteps.
    few = [
        case(4, 1, 3, 17, directions=2),
        case(2, 4, 45, 130),
        case(3, 2, 1, 100, bias=False, directions=2),
        case(8, 3, 20, 400, directions=2),
        case(1, 11, 20, 400),
        case(3, 16, 7, 370),
        case(1, 96, 200, 90, directions=2),
        case(1, 97, 30, 33),
        # And these lie in few sets of the L1 cache.
        case(1, 1, 1024, 130),
        case(3, 1, 1024, 130, directions=2),
    ]
    cases += [*few, *_in_bfloat16(few)]
    if CELLS[cell].has_c:
        cases += [
            case(5, 3, 16, 33, proj_size=17, directions=2),
            packed([19, 7, 1], 3, 100, proj_size=7, bias=False),
        ]
    in_float32 = [case for case in cases if case.dtype == torch.float32]
    in_bfloat16 = [*_in_bfloat16(in_float32[1::3]), *_in_bfloat16(cases[-1:])]
    return list(dict.fromkeys([*cases, *in_bfloat16]))


def _in_bfloat16(cases: list[LayerCase]) -> list[LayerCase]:
    return [replace(case, dtype=torch.bfloat16) for case in cases]


def _slow_cases(cell: str) -> list[LayerCase]:
    """Hidden, batch and sequence sizes all with each other; the options take turns."""
    options = itertools.cycle(itertools.product((1, 2), (True, False), INPUT_SIZES, (False, True)))
    cases = []
    for h, b, t in itertools.product(HIDDEN_SIZES, BATCH_SIZES, TIMESTEPS):
        directions, bias, i, packed = next(options)
        case = LayerCase(cell, t, b, min(i, _most_inputs(h)), h, directions=directions, bias=bias)
        if packed:
            case = replace(case, lengths=tuple(t - (t - 1) * row // b for row in range(b)))
        cases += [case, replace(case, dtype=torch.bfloat16)]
        if CELLS[cell].has_c and h > 1:
            cases.append(replace(case, proj_size=h // 2))
    return cases


def _most_inputs(hidden: int) -> int:
    """More inputs than this saturate the gates, whose weights are the larger the fewer the units.
    Gradients there are differences of nearly equal numbers, and whose error is larger is luck."""
    return 8 * hidden


def _small_batches(cell: str) -> list[LayerCase]:
    """Where there are more threads than rows for them to share."""
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    return [
        case(19, 1, 45, 130),
        case(19, 2, 16, 100, directions=2),
        case(9, 5, 3, 130, directions=2),
        packed([19, 19, 7, 1], 3, 100),
        *([case(19, 2, 16, 130, proj_size=100)] if CELLS[cell].has_c else []),
    ]


def _in_chunks(cell: str) -> list[LayerCase]:
    """Whose gradients of gates become those of the weights in more than one round: of small weights
    more than 1 MiB, of others more than 8."""
    gates = CELLS[cell].gates
    units = 45 if gates > 1 else 130
    small = LayerCase(cell, 30, 129, 9, units, directions=2)
    units = {1: 410, 3: 237, 4: 200}[gates]
    large = LayerCase(cell, {1: 18, 3: 11, 4: 10}[gates], 300, units + 10, units)
    for case, least, is_small in ((small, 1 << 20, True), (large, 8 << 20, False)):
        assert 4 * case.timesteps * case.batch_size * gates * case.hidden_size > least
        weights = case.directions * gates * case.hidden_size * (case.input_size + case.hidden_size)
        assert (weights <= 5 << 16) == is_small  # kSmallWeights of layer_backward.cpp
    cases = [small, replace(small, proj_size=17)] if CELLS[cell].has_c else [small]
    if cell != "rnn_relu":  # of so many sums some lie so near to zero that rounding turns them off
        cases.append(large)
    return [*cases, *_in_bfloat16(cases)]


def _panels(cell: str) -> list[LayerCase]:
    """Depths of more than one chain of sums, of matrices that are asked for ahead, whose panels are
    in halves or, with few rows of a step on average, are not. And tiles that wait for each other,
    more than may: with AVX2 in backward passes, whose panels have more than 256 KiB."""
    units = 300 if CELLS[cell].gates > 1 else 390
    long = {1: 530, 3: 705, 4: 530}[CELLS[cell].gates]
    packed = functools.partial(LayerCase.packed, cell)
    waiting = [
        LayerCase(cell, 3, 129, 40, long),
        packed([3] * 20 + [2] * 9 + [1], 40, long, directions=2),
    ]
    return [
        LayerCase(cell, 9, 7, 270, units),
        packed([20, 3, 1, 1], 40, units, directions=2),
        *waiting,
        *_in_bfloat16(waiting[:1]),
    ]


def _least_units_in_parts(cell: str) -> int:
    return 96 if CELLS[cell].gates > 1 else 128


def _tiles(cell: str) -> list[LayerCase]:
    """Large enough for AMX to take float32 in parts, and just around its tiles."""
    case, packed = functools.partial(LayerCase, cell), functools.partial(LayerCase.packed, cell)
    least = _least_units_in_parts(cell)
    cases = [
        case(20, 33, 45, least + 2, directions=2),
        case(26, 20, 33, least + 31, bias=False),
        case(9, 64, 64, least),
        case(8, 64, 160, 270),  # beyond a depth of one column at a time
        case(5, 129, 7, least + 17),
        case(19, 28, 16, least + 22, directions=2),
        packed([25] * 20 + [3] * 17 + [1], 17, least + 1, directions=2),
    ]
    if CELLS[cell].has_c:
        cases.append(case(20, 33, 16, least + 50, proj_size=17, directions=2))
    return [*cases, *_in_bfloat16(cases)]


def _params(cases, marks=()):
    dtypes = {torch.float32: "", torch.bfloat16: "-bfloat16"}
    return [
        pytest.param(case, id=f"{cell}-{case}{dtypes[case.dtype]}", marks=marks)
        for cell in CELLS
        for case in cases(cell)
    ]


@functools.lru_cache(maxsize=2)
def _expectations(case: LayerCase):
    oracle = testing.results_of_draws(testing.run_oracle, case, dtype=torch.float64)
    return oracle, testing.results_of_draws(testing.run_torch, case)


def _check(case: LayerCase) -> None:
    """The tolerance rule, with the instruction set and the number of threads in force."""
    actual = testing.results_of_draws(testing.run_layer, case)
    testing.assert_accurate(actual, *_expectations(case), case)


@each_instruction_set
@pytest.mark.parametrize("case", [*_params(_fast_cases), *_params(_slow_cases, [pytest.mark.slow])])
def test_accuracy(case, instruction_set):
    assert native.cpu_capability() == instruction_set
    skip_unless_supported("cpu", testing.make_inputs(case))
    _check(case)


@each_instruction_set
@pytest.mark.parametrize("case", _params(_in_chunks))
def test_accuracy_in_chunks(case, instruction_set):
    skip_unless_supported("cpu", testing.make_inputs(case))
    _check(case)


@each_instruction_set
@pytest.mark.parametrize("case", _params(_panels))
def test_accuracy_of_panels(case, instruction_set):
    _check(case)


@pytest.fixture
def amx(set_capability):
    set_capability("amx")
    try:
        native.cpu_capability()
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.parametrize("case", _params(_tiles))
def test_accuracy_of_tiles(case, amx, num_threads):
    skip_unless_supported("cpu", testing.make_inputs(case))
    num_threads(2)
    _check(case)


WITHOUT_PARTS = [
    *itertools.product(["x", "h0", "w_ih", "w_hh", "grad"], [math.inf, -math.inf, math.nan]),
    ("x", 3.4e38), ("h0", -3.395e38),
]  # fmt: skip


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("where, value", WITHOUT_PARTS)
def test_what_has_no_parts_goes_through_tiles(cell, where, value, amx, set_capability):
    """Infinities and NaN come out where AVX-512 has them, and its numbers elsewhere; likewise of
    floats that bfloat16 would round to infinity."""
    hidden = _least_units_in_parts(cell) + 5
    inputs = testing.make_inputs(LayerCase(cell, 16, 33, 40, hidden))
    grad = torch.ones(16, 33, hidden)
    tensor = {**inputs.tensors, "grad": grad}[where].view(-1)
    tensor[tensor.numel() // 2 + 1] = value

    def results() -> dict[str, torch.Tensor]:
        leaves = inputs.leaves()
        out = ops.layer(*leaves.args)
        found = {"y": out.y.detach(), "h_n": out.h_n.detach()}
        if abs(value) == math.inf or math.isnan(value):  # sums of large gradients may overflow
            tensors = leaves.tensors
            grads = torch.autograd.grad(out.y.view_as(grad), [*tensors.values()], grad)
            found |= zip(tensors, grads, strict=True)
        return found

    in_tiles = results()
    set_capability("avx512")
    for name, expected in results().items():
        scale = expected[expected.isfinite()].abs().max().item() if expected.isfinite().any() else 0
        torch.testing.assert_close(
            in_tiles[name], expected, rtol=0, atol=1e-5 * scale, equal_nan=True,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


def test_small_numbers_keep_their_precision_in_tiles(amx):
    """Down to where the last of a number's parts would be a denormal."""
    case = LayerCase("rnn_relu", 16, 33, 40, 260, bias=False)
    inputs = testing.make_inputs(case).map(lambda t: t if t.shape[-1] == 40 else t * 0)
    small = replace(inputs, x=inputs.x * 2.0**-90)
    large, result = (ops.layer(*i.args).y for i in (inputs, small))
    assert large.abs().max() > 1e-3
    torch.testing.assert_close(result * 2.0**90, large, rtol=1e-6, atol=1e-7)


def _small_batches_of_every_dtype(cell: str) -> list[LayerCase]:
    return [*_small_batches(cell), *_in_bfloat16(_small_batches(cell))]


@each_instruction_set
@pytest.mark.parametrize("case", _params(_small_batches_of_every_dtype))
def test_accuracy_of_small_batches_on_several_threads(case, instruction_set, num_threads):
    num_threads(3)
    _check(case)


@pytest.mark.parametrize("case", _params(_small_batches))
def test_instruction_sets_agree(case, instruction_set, set_capability):
    """On any machine the same numbers, but for how a sum or a function is rounded."""
    if instruction_set == "portable":
        pytest.skip("is what the others are compared to")
    results = [testing.results_of_draws(testing.run_layer, case)]
    set_capability("portable")
    results.append(testing.results_of_draws(testing.run_layer, case))
    testing.assert_same_numbers(*results, roundings=32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_tell_what_runs_them(dtype, instruction_set):
    inputs = testing.make_inputs(LayerCase("gru", 3, 2, 4, 5, dtype=dtype))
    problem = make_problem(*inputs.args, True)
    description = dispatch.BACKENDS["cpu"].describe(problem)
    if dtype == torch.bfloat16 and native.bfloat16_capability():
        assert instruction_set in ("amx", "avx512")
        assert description == f"cpu/{instruction_set}bf16 layer"
    else:
        assert description == f"cpu/{instruction_set} layer in float32"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_slow_state_of_half_type_arrives(dtype, instruction_set):
    """h creeps towards 1 by less than what the type could add to it."""
    hidden, timesteps = 17, 3000
    x, h0 = torch.zeros(timesteps, 1, 3, dtype=dtype), torch.zeros(1, 1, hidden, dtype=dtype)
    biases = torch.tensor([0.0, 7.0, 9.0]).repeat_interleave(hidden).to(dtype)
    weights = [
        torch.zeros(3 * hidden, 3, dtype=dtype), torch.zeros(3 * hidden, hidden, dtype=dtype),
        biases, torch.zeros_like(biases),
    ]  # fmt: skip
    h_n = ops.layer("gru", x, h0, None, weights).h_n
    exact = 1 - torch.sigmoid(torch.tensor(7.0, dtype=torch.float64)) ** timesteps
    assert testing.relative_error(h_n, exact.expand_as(h_n)) < torch.finfo(dtype).eps


@st.composite
def _any_case(draw) -> LayerCase:
    cell = draw(st.sampled_from(sorted(CELLS)))
    hidden = draw(st.integers(1, 140))
    sizes = draw(st.integers(1, min(50, _most_inputs(hidden)))), hidden
    options = {"directions": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
    options["dtype"] = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=20))
        return LayerCase.packed(cell, sorted(lengths, reverse=True), *sizes, **options)
    return LayerCase(cell, draw(st.integers(1, 12)), draw(st.integers(0, 20)), *sizes, **options)


# The fixtures set what holds for all examples.
any_shape = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(any_shape, max_examples=40)
@given(case=_any_case(), threads=st.integers(1, 3))
def test_any_shape(case, threads, instruction_set, num_threads):
    num_threads(threads)
    _check(case)


@pytest.mark.slow
@settings(any_shape, max_examples=500)
@given(case=_any_case(), threads=st.integers(1, 3))
def test_many_shapes(case, threads, instruction_set, num_threads):
    num_threads(threads)
    _check(case)


@pytest.mark.parametrize("name", ["mmx", "AVX2", "avx512 ", "auto"])
def test_a_name_that_is_none(name, set_capability):
    set_capability(name)
    message = rf"FUSED_RNN_CPU_CAPABILITY: expected one of .*portable; got '{name}'"
    with pytest.raises(RuntimeError, match=message):
        native.cpu_capability()
    with pytest.raises(RuntimeError, match=message):
        testing.run_layer(testing.make_inputs(LayerCase("gru", 3, 2, 4, 5)))


def test_the_environment_is_asked_once(instruction_set):
    """Reading it while another thread changes it would not be safe."""
    native.cpu_capability()
    # Not by monkeypatch, whose end comes after that of `instruction_set` and would bring it back.
    with mock.patch.dict(os.environ, FUSED_RNN_CPU_CAPABILITY="none of these"):
        assert native.cpu_capability() == instruction_set
