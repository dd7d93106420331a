"""Times inference with weights of 8 bits, beside torch's and ONNX Runtime's.

python benchmarks/quantised.py
python benchmarks/quantised.py --part step
python benchmarks/quantised.py --shape 100,1,512 --cell lstm --json quantised.json

`sequence` is one call for T timesteps, `step` a call for one timestep of a stream that is given the
state; both through `fused_rnn.stepper`. The others: torch.nn's layer quantized by
torch.ao.quantization.quantize_dynamic, ONNX Runtime's dynamically quantized LSTM where it is
installed (it has no other cell of that kind), torch.nn's layer and steppers in bfloat16 and
float32. All ways take turns. Shown are the median of ours, the others' over it, and the errors of y
of those with 8 bits, against float32's, relative to its norm.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

import fused_rnn
from harness import turns
from harness.cases import Case
from harness.providers.onnx_runtimes import onnxruntime_session

SHAPES = {
    "sequence": ("100,1,128", "100,1,512", "100,1,1024", "50,8,512", "50,32,512"),
    "step": ("1,1,128", "1,1,512", "1,1,1024", "1,16,512"),
}
OTHERS = ("torch int8", "ONNX Runtime int8", "torch.nn", "bfloat16", "float32")
STEPS = 10  # timesteps in a row that count as one


def torch_quantized(layer: torch.nn.RNNBase) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what torch calls deprecated
        model = torch.nn.Sequential(layer)
        return torch.ao.quantization.quantize_dynamic(model, {type(layer)}, dtype=torch.qint8)[0]


def onnx_quantized(layer: torch.nn.RNNBase, case: Case) -> Callable[..., list]:
    """A function of x and a state, as torch.nn's; ImportError where something is missing."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from harness import onnx_layer

    with tempfile.TemporaryDirectory() as folder:
        plain, path = Path(folder, "plain.onnx"), Path(folder, "quantised.onnx")
        plain.write_bytes(onnx_layer.build(layer, case, states=True))
        quantize_dynamic(plain, path, weight_type=QuantType.QInt8)
        nodes = [node.op_type for node in onnx.load(path).graph.node]
        assert nodes == ["DynamicQuantizeLSTM"], nodes
        session = onnxruntime_session(path, torch.get_num_threads())

    # Bound, which takes a quarter of the time of session.run's arrays in a step of H=128. There are
    # two of everything, so that a stream never writes where it reads from.
    sides = cycle([_Bound(session), _Bound(session)])
    return lambda x, state: next(sides)(x, state)


class _Bound:
    """A session with outputs of its own. Addresses are bound again where they change."""

    def __init__(self, session):
        self.session, self.binding, self.addresses = session, session.io_binding(), {}
        self.outputs = [torch.empty(out.shape) for out in session.get_outputs()]
        for out, tensor in zip(session.get_outputs(), self.outputs, strict=True):
            self.binding.bind_output(
                out.name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr()
            )

    def __call__(self, x: torch.Tensor, state: tuple[torch.Tensor, ...]) -> tuple:
        for name, tensor in zip(("x", "h0_0", "c0_0"), (x, *state), strict=True):
            address = tensor.data_ptr()
            if self.addresses.get(name) != address:
                shape = list(tensor.shape)
                self.binding.bind_input(name, "cpu", 0, "float32", shape, address)
                self.addresses[name] = address
        self.session.run_with_iobinding(self.binding)
        y, h, c = self.outputs
        return y.view(*x.shape[:2], -1), (h, c)


def ways(cell: str, t: int, b: int, h: int) -> dict[str, Callable[..., tuple]]:
    """Functions of x [T, B, I] and a state that give y and the state."""
    theirs = getattr(torch.nn, cell)(h, h).eval()
    dtypes = {"ours": torch.int8, "bfloat16": torch.bfloat16, "float32": torch.float32}
    steppers = {name: fused_rnn.stepper(theirs, weight_dtype=d) for name, d in dtypes.items()}
    found = {**steppers, "torch.nn": theirs}
    if cell != "RNN":  # which torch leaves as it is
        found["torch int8"] = torch_quantized(theirs)
    if cell == "LSTM":
        with suppress(ImportError):
            found["ONNX Runtime int8"] = onnx_quantized(theirs, Case("lstm", t, b, h, h))
    return found


def main() -> None:
    args = turns.options(__doc__, tuple(SHAPES), rounds=31).parse_args()

    def measure(cell: str, sizes: tuple[int, ...]) -> tuple[dict, list[str]]:
        t, b, h = sizes
        functions = ways(cell, *sizes)
        x = torch.randn(t, b, h)
        state = tuple(torch.randn(1, b, h) / 2 for _ in range(1 + (cell == "LSTM")))
        state = state if cell == "LSTM" else state[0]
        exact = functions["torch.nn"](x, state)[0]
        errors = {
            name: float((function(x, state)[0] - exact).norm() / exact.norm())
            for name, function in functions.items()
        }
        limits = {"ours": 0.1, "torch int8": 0.2, "ONNX Runtime int8": 0.2, "bfloat16": 0.02}
        for name, error in errors.items():
            assert error < limits.get(name, 1e-5), (name, error)

        def stream(function: Callable) -> None:
            now = state
            for _ in range(STEPS):
                _, now = function(x, now)

        is_step = args.part == "step"
        calls = {
            name: partial(stream, function) if is_step else partial(function, x, state)
            for name, function in functions.items()
        }
        found, shown = turns.beside_ours(calls, OTHERS, args.rounds)
        if is_step:
            found["ms"] = {name: ms / STEPS for name, ms in found["ms"].items()}
            shown[0] = f"{found['ms']['ours']:.4f}"
        found["errors"] = errors
        quantised = ("ours", "torch int8", "ONNX Runtime int8")
        return found, [*shown, *(f"{errors[n]:.4f}" if n in errors else "" for n in quantised)]

    columns = ("ours, ms", *OTHERS, "error", "torch's", "ORT's")
    with torch.no_grad():
        turns.tabulate(args, SHAPES[args.part], f"int8, {args.part}", columns, measure)


if __name__ == "__main__":
    main()
