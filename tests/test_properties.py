"""Properties that hold for any shapes, lengths and options hypothesis thinks of, in float64."""

import itertools
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fused_rnn
from fused_rnn import testing
from fused_rnn.cells import CELLS
from fused_rnn.layer_call import make_problem
from fused_rnn.testing import LayerCase

either = st.booleans()
one_or_two = st.integers(1, 2)
cells = st.sampled_from(sorted(CELLS))
seeds = st.integers(0, 2**16)
all_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=5)


@st.composite
def layer_cases(draw, packed=either, directions=one_or_two):
    """One layer in float64: a case and the seed of its values."""
    cell = draw(cells)
    hidden = draw(st.integers(1, 9))
    options = {
        "directions": draw(directions),
        "bias": draw(st.booleans()),
        "dtype": torch.float64,
    }
    if CELLS[cell].has_c and hidden > 1:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    sizes = draw(st.integers(1, 5)), hidden
    if draw(packed):
        lengths = sorted(draw(all_lengths), reverse=True)
        return LayerCase.packed(cell, lengths, *sizes, **options), draw(seeds)
    return LayerCase(
        cell, draw(st.integers(1, 6)), draw(st.integers(0, 5)), *sizes, **options
    ), draw(seeds)


@st.composite
def module_options(draw):
    """(class name, constructor arguments)."""
    cell = draw(st.sampled_from(testing.TORCH_CELLS))
    hidden = draw(st.integers(1, 7))
    options = {
        "input_size": draw(st.integers(1, 5)),
        "hidden_size": hidden,
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dtype": torch.float64,
    }
    if options["num_layers"] > 1:
        options["dropout"] = draw(st.sampled_from([0.0, 0.4, 1.0]))
    if cell.startswith("rnn"):
        return "RNN", options | {"nonlinearity": cell.removeprefix("rnn_")}
    if cell == "lstm" and hidden > 1:
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    return cell.upper(), options


def _run_module(module, make_input, with_states, seed):
    """Outputs, states and all gradients, of a module in training with the seed's dropout masks."""
    generator = torch.Generator().manual_seed(seed)
    leaves, x, batch = make_input(generator)
    hx = None
    if with_states:
        layers = module.num_layers * (2 if module.bidirectional else 1)
        batched = () if batch is None else (batch,)
        shapes = [(layers, *batched, module.proj_size or module.hidden_size)]
        if module.mode == "LSTM":
            shapes.append((layers, *batched, module.hidden_size))
        states = tuple(
            torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
            for s in shapes
        )
        leaves = [*leaves, *states]
        hx = states if module.mode == "LSTM" else states[0]
    torch.manual_seed(seed)
    y, finals = module(x, hx)
    y = y.data if isinstance(y, PackedSequence) else y
    outputs = [y, *(finals if isinstance(finals, tuple) else (finals,))]
    cotangents = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(
        outputs, [*leaves, *parameters.values()], cotangents, materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    names = [f"leaf {i}" for i in range(len(leaves))] + list(parameters)
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return results | {f"grad {n}": g for n, g in zip(names, grads, strict=True)}


def _against_torch(name, options, make_input, with_states, seed):
    torch.manual_seed(seed)
    theirs = getattr(torch.nn, name)(**options)
    torch.manual_seed(seed)
    ours = getattr(fused_rnn, name)(**options)
    expected = _run_module(theirs, make_input, with_states, seed)
    testing.assert_same_numbers(_run_module(ours, make_input, with_states, seed), expected)


@given(module_options(), st.integers(1, 5), st.integers(0, 4), st.booleans(), st.booleans(), seeds)
def test_modules_equal_torchs(named, timesteps, batch, batched, with_states, seed):
    name, options = named
    leading = (batch, timesteps) if options["batch_first"] else (timesteps, batch)

    def make_input(generator):
        shape = (*(leading if batched else (timesteps,)), options["input_size"])
        x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        return [x], x, batch if batched else None

    _against_torch(name, options, make_input, with_states, seed)


@given(module_options(), all_lengths, st.booleans(), seeds)
def test_modules_equal_torchs_on_packed_rows_in_any_order(named, lengths, with_states, seed):
    name, options = named

    def make_input(generator):
        rows = [
            torch.randn(
                n, options["input_size"], generator=generator, dtype=torch.float64
            ).requires_grad_()
            for n in lengths
        ]
        return rows, pack_sequence(rows, enforce_sorted=False), len(lengths)

    _against_torch(name, options, make_input, with_states, seed)


def _named(inputs: testing.LayerInputs, prefix: str = "") -> dict[str, torch.Tensor]:
    outputs = testing.run_layer(inputs)
    return {prefix + n: o for n, o in zip(testing.OUTPUT_NAMES, outputs, strict=False)}


def _rows_by_length(values: torch.Tensor, batch_sizes: torch.Tensor) -> list[torch.Tensor]:
    """The rows [T_b, K] of packed values [N, K]."""
    padded, lengths = pad_packed_sequence(PackedSequence(values, batch_sizes))
    return [padded[:length, b] for b, length in enumerate(lengths.tolist())]


@given(layer_cases())
def test_one_layer_equals_the_oracle(case_and_seed):
    case, seed = case_and_seed
    cotangents = testing.make_cotangents(case, seed=seed + 1)
    actual, expected = (
        testing.results_and_grads(run, testing.make_inputs(case, seed).leaves(), cotangents)
        for run in (testing.run_layer, testing.run_oracle)
    )
    testing.assert_same_numbers(actual, expected)


@given(layer_cases(packed=st.just(True)))
def test_packed_rows_equal_each_row_by_itself(case_and_seed):
    case, seed = case_and_seed
    inputs = testing.make_inputs(case, seed)
    y, *states = testing.run_layer(inputs)
    rows = _rows_by_length(y, inputs.batch_sizes)
    for b, x in enumerate(_rows_by_length(inputs.x, inputs.batch_sizes)):
        alone = replace(
            inputs,
            x=x.unsqueeze(1),
            h0=inputs.h0[:, b : b + 1],
            c0=None if inputs.c0 is None else inputs.c0[:, b : b + 1],
            batch_sizes=None,
        )
        together = [rows[b].unsqueeze(1), *(s[:, b : b + 1] for s in states)]
        testing.assert_same_numbers(
            dict(zip(testing.OUTPUT_NAMES, together, strict=False)), _named(alone)
        )


@given(layer_cases(packed=st.just(False)), st.randoms())
def test_rows_of_a_batch_keep_to_themselves(case_and_seed, random):
    """Any selection and order of rows in gives the same selection and order of rows out."""
    case, seed = case_and_seed
    inputs = testing.make_inputs(case, seed)
    chosen = random.sample(range(case.batch_size), random.randint(0, case.batch_size))
    selected = replace(
        inputs,
        x=inputs.x[:, chosen],
        h0=inputs.h0[:, chosen],
        c0=None if inputs.c0 is None else inputs.c0[:, chosen],
    )
    expected = {name: out[:, chosen] for name, out in _named(inputs).items()}
    testing.assert_same_numbers(_named(selected), expected)


@given(layer_cases(packed=st.just(False), directions=st.just(1)), st.data())
def test_a_sequence_in_pieces_equals_the_whole(case_and_seed, data):
    """With the states carried over, gradients through them included."""
    case, seed = case_and_seed
    cuts = data.draw(st.lists(st.integers(0, case.timesteps), max_size=3).map(sorted))
    bounds = sorted({0, *cuts, case.timesteps})

    def in_pieces(inputs):
        h, c, outputs = inputs.h0, inputs.c0, []
        for start, end in itertools.pairwise(bounds):
            y, h, *rest = testing.run_layer(replace(inputs, x=inputs.x[start:end], h0=h, c0=c))
            c = rest[0] if rest else None
            outputs.append(y)
        return (torch.cat(outputs), h, *(() if c is None else (c,)))

    cotangents = testing.make_cotangents(case, seed=seed + 1)
    actual, expected = (
        testing.results_and_grads(run, testing.make_inputs(case, seed).leaves(), cotangents)
        for run in (in_pieces, testing.run_layer)
    )
    testing.assert_same_numbers(actual, expected)


@given(layer_cases(directions=st.just(2)))
def test_the_reverse_direction_equals_the_forward_one_on_reversed_rows(case_and_seed):
    case, seed = case_and_seed
    inputs = testing.make_inputs(case, seed)
    both = _named(inputs)
    half = len(inputs.weights) // 2
    width = case.output_size

    def reversed_rows(values):
        if inputs.batch_sizes is None:
            return values.flip(0)
        flipped = [row.flip(0) for row in _rows_by_length(values, inputs.batch_sizes)]
        return pack_sequence(flipped).data

    reverse = _named(
        replace(
            inputs,
            x=reversed_rows(inputs.x),
            h0=inputs.h0[1:],
            c0=None if inputs.c0 is None else inputs.c0[1:],
            weights=inputs.weights[half:],
        )
    )
    expected = {name: out[1:] for name, out in both.items() if name != "y"}
    expected["y"] = reversed_rows(both["y"][..., width:])
    testing.assert_same_numbers(reverse, {name: expected[name] for name in reverse})

    forward = _named(
        replace(
            inputs,
            h0=inputs.h0[:1],
            c0=None if inputs.c0 is None else inputs.c0[:1],
            weights=inputs.weights[:half],
        )
    )
    expected = {name: out[:1] for name, out in both.items() if name != "y"}
    expected["y"] = both["y"][..., :width]
    testing.assert_same_numbers(forward, {name: expected[name] for name in forward})


@given(all_lengths)
def test_batch_sizes_are_those_of_torch(lengths):
    lengths.sort(reverse=True)
    expected = pack_sequence([torch.zeros(n) for n in lengths]).batch_sizes
    assert torch.equal(testing.batch_sizes_of(lengths), expected)


@given(all_lengths, st.booleans(), seeds)
def test_packed_rows_equal_padded_ones_of_full_length(lengths, reverse, seed):
    """All rows of one length: the packed and the padded layout hold the same numbers."""
    timesteps, batch = lengths[0], len(lengths)
    case = LayerCase.packed(
        "lstm", [timesteps] * batch, 3, 4, directions=2 if reverse else 1, dtype=torch.float64
    )
    inputs = testing.make_inputs(case, seed)
    padded = replace(inputs, x=inputs.x.view(timesteps, batch, -1), batch_sizes=None)
    expected = _named(padded)
    expected["y"] = expected["y"].flatten(0, 1)
    testing.assert_same_numbers(_named(inputs), expected)


@given(layer_cases())
def test_the_problem_says_what_the_arguments_are(case_and_seed):
    case, seed = case_and_seed
    problem = make_problem(*testing.make_inputs(case, seed).args, True)
    for name in ("timesteps", "batch_size", "input_size", "hidden_size", "proj_size", "dtype"):
        assert getattr(problem, name) == getattr(case, name), name
    assert (problem.bias, problem.packed) == (case.bias, bool(case.lengths))
