"""Runtimes that read an ONNX model: ONNX Runtime and OpenVINO, for inference on the CPU."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from harness.cases import Case
from harness.data import Data, Results
from harness.providers.base import CannotDoError, Provider, Session, Setting


def _require_float32_inference(case: Case) -> None:
    if case.has_grad:
        raise CannotDoError("inference only")
    if case.dtype != "float32":
        raise CannotDoError("measured in float32 only")
    if case.resets:
        raise CannotDoError("has no resets")


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


def onnxruntime_session(model: bytes | Path, threads: int) -> Any:
    """All graph optimisations, one thread pool.

    It spins within a run, without which LSTM at (128,1,128) takes 1.5 times as long, and stops when
    the run ends, which costs nothing and leaves the core to the next provider.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _onnxruntime(case: Case, data: Data, setting: Setting) -> Session:
    """Inputs and outputs are bound, which is 3 us (a quarter) faster than session.run in a step of
    H=128, and as fast elsewhere."""
    _require_float32_inference(case)
    from harness import onnx_layer

    model = onnx_layer.build(data.layer, case, states=bool(data.states))
    session = onnxruntime_session(model, setting.threads)

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


def _openvino(case: Case, data: Data, setting: Setting) -> Session:
    """The latency hint, one stream of `threads`, float32 arithmetic by name, inputs shared.

    Outputs are handed out as they lie in the request, not copied as `infer` does by default.
    """
    _require_float32_inference(case)
    import openvino

    from harness import onnx_layer

    model = onnx_layer.build(data.layer, case, states=bool(data.states))
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": setting.threads,
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

    return Session(partial(request.infer, share_outputs=True), results)


ONNX_RUNTIMES = (
    Provider("openvino", _openvino, ("openvino", "onnx"), ("cpu",)),
    Provider("onnxruntime", _onnxruntime, ("onnxruntime", "onnx"), ("cpu",)),
)
