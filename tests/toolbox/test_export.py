"""torch.export: dynamic sizes, saving and loading, and programs for those without this package."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from helpers.needs import needs_library
from toolkit import Inputs, Maker, near
from torch.export import Dim

import fused_rnn
from fused_rnn import export, native

pytestmark = pytest.mark.costly
SHAPES = ((6, 4), (9, 7), (2, 2))  # T, B
OPTIONS = [
    pytest.param({"num_layers": 2, "bidirectional": True}, id="bidirectional-2"),
    pytest.param({"batch_first": True, "bias": False}, id="no_bias", marks=pytest.mark.slow),
]
no_warnings = pytest.mark.filterwarnings("ignore")  # torch's own, of deprecated names it uses


def exported(module, with_hx: bool = False, strict: bool = False, fixed_time: bool = False):
    time, batch = None if fixed_time else Dim("T"), Dim("B")
    if isinstance(module, torch.nn.RNNCellBase):
        shapes, states = [{0: batch}], {0: batch}
    else:
        shapes = [{0: batch, 1: time} if module.batch_first else {0: time, 1: batch}]
        states = {1: batch}
    if with_hx:
        shapes.append((states, states) if "LSTM" in module._get_name() else states)
    args = Inputs(module, with_hx).args
    return torch.export.export(module, args, dynamic_shapes=tuple(shapes), strict=strict)


@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
@pytest.mark.parametrize("options", OPTIONS)
def test_layers(layer, options, strict, with_hx, make):
    module, theirs = make.pair(layer, **options)
    program = exported(module, with_hx, strict)
    for timesteps, batch in SHAPES:
        args = Inputs(module, with_hx, timesteps, batch).args
        near(program.module()(*args), theirs(*args))


@pytest.mark.parametrize("with_hx", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_cells(cell, strict, with_hx, make):
    module, theirs = make.pair(cell)
    program = exported(module, with_hx, strict)
    for _, batch in SHAPES:
        args = Inputs(module, with_hx, batch=batch).args
        near(program.module()(*args), theirs(*args))


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_save_and_load(strict, make):
    module, theirs = make.pair("lstm", num_layers=2, bidirectional=True)
    file = io.BytesIO()
    torch.export.save(exported(module, True, strict), file)
    file.seek(0)
    program = torch.export.load(file)
    for timesteps, batch in SHAPES:
        args = Inputs(module, True, timesteps, batch).args
        near(program.module()(*args), theirs(*args))


def test_saves_nothing_for_a_backward_that_may_never_come():
    program = exported(fused_rnn.LSTM(3, 5))
    [node] = [n for n in program.graph.nodes if "layer_forward" in str(n.target)]
    names = [argument.name for argument in node.target._schema.arguments]
    assert node.args[names.index("save")] is False


def test_exported_program_is_trained(layer, make):
    module, theirs = make.pair(layer, bidirectional=True)
    program = exported(module).module()
    (x,) = Inputs(module).args
    program(x)[0].sin().sum().backward()
    theirs(x)[0].sin().sum().backward()
    grads = dict(program.named_parameters())
    for name, parameter in theirs.named_parameters():
        near(grads[name].grad, parameter.grad)


def operators(program) -> set[torch._ops.OpOverload]:
    nodes = (node.target for node in program.graph.nodes)
    return {target for target in nodes if isinstance(target, torch._ops.OpOverload)}


@pytest.mark.parametrize("options", OPTIONS)
def test_core_aten(layer, options, make):
    """Every operator is one of the core set, and the numbers are the same."""
    module, theirs = make.pair(layer, **options)
    program = exported(module, True, fixed_time=True).run_decompositions(export.core_aten())
    assert not [op for op in operators(program) if torch.Tag.core not in op.tags]
    for batch in (4, 7, 2):
        args = Inputs(module, True, batch=batch).args
        near(program.module()(*args), theirs(*args))


def test_core_aten_has_no_loop():
    program = exported(fused_rnn.GRU(3, 5))
    with pytest.raises(RuntimeError, match="fixed number of timesteps"):
        program.run_decompositions(export.core_aten())


class Packed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = fused_rnn.GRU(3, 5)

    def forward(self, rows, batch_sizes, h0):
        packed = torch.nn.utils.rnn.PackedSequence(rows, batch_sizes)
        return self.layer(packed, h0)[0].data


def test_packed_rows():
    """As an operator; nothing else can say how packed rows lie."""
    model, rows = Packed(), Dim("N")
    args = (torch.randn(8, 3), torch.tensor([4, 3, 1]), torch.zeros(1, 4, 5))
    shapes = ({0: rows}, {0: Dim("T")}, {1: Dim("B")})
    program = torch.export.export(model, args, dynamic_shapes=shapes)
    args = (torch.randn(7, 3), torch.tensor([3, 3, 1, 0])[:3], torch.randn(1, 3, 5))
    near(program.module()(*args), model(*args))
    for table in (export.core_aten(), export.onnx_operators()):
        with pytest.raises(RuntimeError, match="expected padded rows, got a PackedSequence"):
            program.run_decompositions(table)


class Masked(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths, resets):
        return self.layer(x, lengths=lengths, resets=resets, return_states=True)


@pytest.mark.parametrize("table", [None, "core_aten"])
def test_lengths_and_resets(layer, table):
    model = Masked(Maker(fused_rnn)(layer, num_layers=2, bidirectional=True))
    time, batch = (None if table else Dim("T")), Dim("B")
    args = (torch.randn(6, 7, 3), torch.tensor([3, 6, 0, 1, 6, 2, 5]), torch.rand(6, 7) < 0.3)
    shapes = ({0: time, 1: batch}, {0: batch}, {0: time, 1: batch})
    program = torch.export.export(model, args, dynamic_shapes=shapes)
    if table:
        program = program.run_decompositions(getattr(export, table)())
        # Torch's own assertion beside a cast: of ATen, and no part of what is computed.
        allowed = {torch.ops.aten._assert_tensor_metadata.default}
        used = operators(program) - allowed
        assert not [op for op in used if torch.Tag.core not in op.tags]
    steps = 6 if table else 9
    args = (torch.randn(steps, 2, 3), torch.tensor([steps, 4]), torch.rand(steps, 2) < 0.3)
    near(program.module()(*args), model(*args))


@needs_library
def test_cpu_library_table(layer, make):
    """The C++ operator alone, with its fake implementation as dynamic as the layer's."""
    module, theirs = make.pair(layer, num_layers=2, bidirectional=True)
    program = exported(module, True).run_decompositions(export.cpu_library())
    ours = {str(op) for op in operators(program) if "fused_rnn" in str(op)}
    assert ours == {"fused_rnn_cpu.layer.default"}
    for timesteps, batch in SHAPES:
        args = Inputs(module, True, timesteps, batch).args
        with torch.no_grad():
            near(program.module()(*args), theirs(*args))


@needs_library
def test_cpu_library_table_leaves_what_it_does_not_take():
    program = exported(fused_rnn.GRU(3, 5)).run_decompositions(export.cpu_library())
    assert torch.ops.fused_rnn_cpu.layer.default in operators(program)
    double = fused_rnn.GRU(3, 5, dtype=torch.float64)
    program = torch.export.export(double, (torch.randn(6, 4, 3, dtype=torch.float64),))
    program = program.run_decompositions(export.cpu_library())
    assert torch.ops.fused_rnn.layer_forward.default in operators(program)


def library_arguments(**changed):
    arguments = {
        "cell": 2,
        "x": torch.randn(8, 3),
        "weights": [torch.randn(15, 3), torch.randn(15, 5), torch.randn(15), torch.randn(15)],
        "h0": torch.randn(1, 4, 5),
        "c0": None,
    }
    return tuple((arguments | changed).values())


@needs_library
@pytest.mark.parametrize(
    "changed",
    [
        {"cell": 9},
        {"cell": 3},
        {"x": torch.randn(2, 4, 3)},
        {"x": torch.randn(8, 4)},
        {"x": torch.randn(7, 3)},
        {"x": torch.randn(8, 3, dtype=torch.float64)},
        {"x": torch.randn(3, 8).t()},
        {"weights": []},
        {"weights": [torch.randn(15, 3)]},
        {"weights": [torch.randn(15, 3), torch.randn(15, 4)]},
        {"h0": torch.randn(4, 5)},
        {"h0": torch.randn(3, 4, 5)},
        {"h0": torch.randn(1, 4, 0)},
        {"h0": torch.randn(1, 0, 5)},
        {"c0": torch.randn(1, 4, 5)},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_library_operator_refuses_what_does_not_fit(changed):
    """It may be called by a process that has none of our checks."""
    torch.ops.fused_rnn_cpu.layer(*library_arguments())
    with pytest.raises(RuntimeError, match="expected"):
        torch.ops.fused_rnn_cpu.layer(*library_arguments(**changed))


@needs_library
def test_library_operator_as_compilers_see_it():
    export.cpu_library()
    torch.export.export(fused_rnn.GRU(3, 5), (torch.randn(6, 4, 3),)).run_decompositions(
        export.cpu_library()
    )
    operator = torch.ops.fused_rnn_cpu.layer.default
    torch.library.opcheck(
        operator,
        library_arguments(),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.slow
@no_warnings
def test_aotinductor(layer, make, tmp_path):
    """A package that runs where this package is imported."""
    module, theirs = make.pair(layer, num_layers=2, bidirectional=True)
    with torch.no_grad():
        program = exported(module, True)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        run = torch._inductor.aoti_load_package(path)
        for timesteps, batch in SHAPES:
            args = Inputs(module, True, timesteps, batch).args
            near(run(*args), theirs(*args))


RUN_WITHOUT_US = """
import sys, torch
library, package, data = sys.argv[1:]
torch.ops.load_library(library)
run = torch._inductor.aoti_load_package(package)
for args, expected in torch.load(data):
    actual = torch.utils._pytree.tree_leaves(run(*args))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
assert not any(name.split(".")[0] == "fused_rnn" for name in sys.modules)
"""


@pytest.mark.slow
@no_warnings
@needs_library
def test_aotinductor_without_the_package(layer, make, tmp_path):
    """A package that needs the C++ library and nothing else of ours: another process runs it."""
    module, theirs = make.pair(layer, num_layers=2, bidirectional=True)
    package, data = tmp_path / "model.pt2", tmp_path / "data.pt"
    with torch.no_grad():
        program = exported(module, True).run_decompositions(export.cpu_library())
        torch._inductor.aoti_compile_and_package(program, package_path=str(package))
        cases = []
        for timesteps, batch in SHAPES:
            args = Inputs(module, True, timesteps, batch).args
            cases.append((args, torch.utils._pytree.tree_leaves(theirs(*args))))
    torch.save(cases, data)
    command = [sys.executable, "-c", RUN_WITHOUT_US, str(native.library_path()), package, data]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_errors_are_eager_modes(strict):
    module = fused_rnn.LSTM(3, 5)
    for x in (torch.randn(6, 4, 2), torch.randn(6, 4, 3).double(), torch.randn(6, 4, 3, 1)):
        with pytest.raises((ValueError, RuntimeError)) as eager:
            module(x)
        wrapper = torch._dynamo.exc.Unsupported if strict else type(eager.value)
        with pytest.raises(wrapper) as caught:
            torch.export.export(module, (x,), strict=strict)
        assert str(eager.value) in str(caught.value)
