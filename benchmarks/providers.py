"""Who computes a layer: the registry of providers, each with its best setting.

A provider turns a case and its data into a `Session`, or raises `CannotDoError` with the reason.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial

import torch

import fused_rnn
from cases import Case
from data import Data, Results, module_call
from fused_rnn.testing import backends_on


class CannotDoError(Exception):
    """A provider has no way of computing a case."""


@dataclass(frozen=True)
class Session:
    """One case made ready with one provider."""

    call: Callable[[], object]  # what is timed
    results: Callable[[object], Results]  # of what the call returned
    active: Callable[[], AbstractContextManager] = nullcontext  # entered around a run of calls
    kernel: str = ""  # which of its ways the provider took, where it tells


@dataclass(frozen=True)
class Provider:
    name: str
    prepare: Callable[[Case, Data, int], Session]  # case, its data, threads
    requires: tuple[str, ...] = ()  # modules that torch and fused_rnn do not bring along

    def unavailable(self) -> str | None:
        """Why it is left out of the run, or None."""
        for module in self.requires:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{error} (pip install -c constraints.txt {' '.join(self.requires)})"
        return None


@contextmanager
def _torch_settings(case: Case, threads: int, backend: str | None) -> Iterator[None]:
    """Threads, gradient mode and backend: set once for many calls, as a program would."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ExitStack() as stack:
            if not case.has_grad:
                stack.enter_context(torch.inference_mode())
            if backend is not None:
                stack.enter_context(fused_rnn.backend(backend))
            yield
    finally:
        torch.set_num_threads(before)


def _torch_nn(case: Case, data: Data, threads: int) -> Session:
    call, results = module_call(data.layer, case, data)
    return Session(call, results, lambda: _torch_settings(case, threads, None))


def _fused_rnn(case: Case, data: Data, threads: int, backend: str) -> Session:
    module = fused_rnn.replace(copy.deepcopy(data.layer))
    call, results = module_call(module, case, data)
    try:
        with _torch_settings(case, threads, backend):
            choices = fused_rnn.explain(module, *data.args).layers
    except fused_rnn.UnsupportedProblemError as error:
        raise CannotDoError(str(error)) from error
    kernel = "+".join(dict.fromkeys(choice.kernel for choice in choices))
    return Session(call, results, lambda: _torch_settings(case, threads, backend), kernel)


def _require_float32_inference(case: Case) -> None:
    if case.has_grad:
        raise CannotDoError("inference only")
    if case.dtype != "float32":
        raise CannotDoError("measured in float32 only")


def _states(case: Case, data: Data) -> dict[str, torch.Tensor]:
    """h0_<l> and c0_<l> of every layer, [D, B, H], as the ONNX model names them."""
    named = {}
    for letter, state in zip("hc", data.states, strict=False):
        for index, part in enumerate(state.chunk(case.layers)):
            named[f"{letter}0_{index}"] = part
    return named


def _onnx_results(case: Case, data: Data, outputs: dict[str, torch.Tensor]) -> Results:
    """Torch's results from the ONNX model's outputs, by name."""
    results = {"y": outputs["y"].reshape(data.cotangent.shape)}
    for letter in "hc"[: len(data.states)]:
        parts = [outputs[f"{letter}n_{index}"] for index in range(case.layers)]
        results[f"{letter}_n"] = torch.cat(parts)
    return results


def _onnxruntime(case: Case, data: Data, threads: int) -> Session:
    """All graph optimisations, one session thread pool of `threads`, inputs and outputs bound.

    Binding is 3 us (a quarter) faster than session.run in a step of H=128, and as fast elsewhere.
    The pool spins within a run, without which LSTM at (128,1,128) takes 1.5 times as long, and
    stops when the run ends, which costs nothing and leaves the core to the next provider.
    """
    _require_float32_inference(case)
    import onnxruntime

    import onnx_model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    model = onnx_model.build(data.layer, case, states=bool(data.states))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    inputs = {"x": data.x} | _states(case, data)
    outputs = {out.name: torch.empty(out.shape) for out in session.get_outputs()}
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            bind(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())

    # The binding holds addresses only; what it points to lives as long as this function.
    def results(_: object) -> Results:
        return _onnx_results(case, data, outputs)

    return Session(partial(session.run_with_iobinding, binding), results)


@cache
def _openvino_core():
    import openvino

    return openvino.Core()


def _openvino(case: Case, data: Data, threads: int) -> Session:
    """The latency hint, one stream of `threads`, float32 arithmetic by name, shared inputs."""
    _require_float32_inference(case)
    import openvino

    import onnx_model

    model = onnx_model.build(data.layer, case, states=bool(data.states))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # the default takes bfloat16 where the CPU has it
    }
    core = _openvino_core()
    compiled = core.compile_model(core.read_model(model, b""), "CPU", settings)
    request = compiled.create_infer_request()
    for name, tensor in ({"x": data.x} | _states(case, data)).items():
        request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))

    def results(_: object) -> Results:
        outputs = {
            port.get_any_name(): torch.from_numpy(request.get_tensor(port).data.copy())
            for port in compiled.outputs
        }
        return _onnx_results(case, data, outputs)

    return Session(request.infer, results)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("fused_rnn", partial(_fused_rnn, backend="auto")),
        *(
            Provider(f"fused_rnn/{name}", partial(_fused_rnn, backend=name))
            for name in backends_on("cpu")
        ),
        Provider("torch.nn", _torch_nn),
        Provider("openvino", _openvino, ("openvino", "onnx")),
        Provider("onnxruntime", _onnxruntime, ("onnxruntime", "onnx")),
    )
}
DEFAULT = ("fused_rnn", "torch.nn", "openvino", "onnxruntime")


def is_ours(name: str) -> bool:
    return name.split("/")[0] == "fused_rnn"
