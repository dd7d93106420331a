"""The Triton backend: scans as Triton kernels, for any GPU that Triton compiles for.

`plan.py` chooses among three regimes, `scan.py` has the two kernels, `cells.py` their pointwise
parts, `launch.py` runs them. Layers that normalise go step by step, by `normed.py` and the kernels
of `normed_step.py`. triton is imported when a layer first runs here.

With TRITON_INTERPRET=1 in the environment before that, Triton's interpreter runs the kernels on
CPU tensors: slow, for tests.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import Tensor

from ... import environment
from ...cells import is_half
from ...problem import EXTRAS, LayerInputs, Problem
from ..base import Backend, float32_precision, is_relu_of_half
from ..bundles import InputGrads, LayerOutput, Needs, OutputGrads, ScanGrads
from .plan import Device, Plan, UnfitError, make_plan, requested_regime

# Devices whose driver has refused to run all programs of a launch at once.
_uncooperative: set[int] = set()
_MPS_ENABLED = 133  # CU_DEVICE_ATTRIBUTE_MPS_ENABLED
_INTERPRETER = Device("interpreter", 1 << 20, 1 << 40, True)
# More would leave a program's threads with more numbers than registers.
_MOST_NORMED_UNITS = 4096


class TritonBackend(Backend):
    name = "triton"
    extras = frozenset(EXTRAS)

    @property
    def device_type(self) -> str | None:
        return None if interpreting() else "cuda"

    def unsupported(self, problem: Problem) -> str | None:
        if problem.device_type == "cpu":
            if not interpreting():
                return (
                    "needs tensors on a GPU, got cpu; its tests set TRITON_INTERPRET=1 to run it "
                    "on the CPU"
                )
        elif problem.device_type != "cuda":
            return f"needs tensors on a GPU, got {problem.device_type}"
        if not _installed():
            return "triton is not installed"
        if problem.dtype != torch.float32 and not is_half(problem.dtype):
            return f"needs dtype float32, bfloat16 or float16, got {problem.dtype}"
        if problem.hidden_size == 0:
            return "needs at least one hidden unit, got hidden_size=0"
        if problem.proj_size:
            return (
                f"has no projected LSTM, got proj_size={problem.proj_size}: its second product "
                "would need tiles of its own"
            )
        if problem.averaged and problem.training and not problem.cell.saved_gates:
            return (
                "has no backward of zoneout's expectation for an RNN, whose y does not tell what a "
                "step by itself gave"
            )
        if problem.device_type == "cuda" and (reason := _device_refusal(problem)):
            return reason
        if _normalises(problem):
            if problem.hidden_size > _MOST_NORMED_UNITS:
                return (
                    f"normalises up to {_MOST_NORMED_UNITS} hidden units in a program, got "
                    f"hidden_size={problem.hidden_size}"
                )
            return None
        try:
            self._plan(problem)
        except UnfitError as error:
            return str(error)
        return None

    def takes_masks(self, problem: Problem) -> bool:
        return True

    def only_by_name(self, problem: Problem) -> str | None:
        if problem.device_type == "cpu":
            return "on the CPU runs only when asked for by name, in Triton's interpreter"
        return None

    def describe(self, problem: Problem) -> str:
        through = " in float32" if self.in_float32(problem) else ""
        if _normalises(problem):
            return (
                f"triton step by step{through} (layer normalisation: a product and a launch each)"
            )
        return f"triton scan{through} ({self._plan(problem)})"

    def in_float32(self, problem: Problem) -> bool:
        # Normalised values are wanted as exact as the sums that they come from.
        return is_relu_of_half(problem) or (_normalises(problem) and is_half(problem.dtype))

    def layer_forward(self, problem: Problem, inputs: LayerInputs, save: bool) -> LayerOutput:
        if not _normalises(problem):
            return super().layer_forward(problem, inputs, save)
        from . import normed

        return normed.forward(problem, inputs, save)

    def layer_backward(
        self,
        problem: Problem,
        grads: OutputGrads,
        inputs: LayerInputs,
        saved: LayerOutput,
        needs: Needs,
    ) -> InputGrads:
        if not _normalises(problem):
            return super().layer_backward(problem, grads, inputs, saved, needs)
        from . import normed

        return normed.backward(problem, grads, inputs, saved, needs)

    def scan_forward(
        self, problem: Problem, gx: Tensor, inputs: LayerInputs, save: bool
    ) -> LayerOutput:
        from . import launch

        return self._run(launch.forward, problem, gx, inputs, save)

    def scan_backward(
        self, problem: Problem, grads: OutputGrads, inputs: LayerInputs, saved: LayerOutput
    ) -> ScanGrads:
        from . import launch

        return self._run(launch.backward, problem, grads, inputs, saved)

    def _run(self, scan: Callable, problem: Problem, *args):
        from . import launch

        try:
            return scan(problem, self._plan(problem), _precision(problem), *args)
        except launch.RefusedLaunchError as error:
            # As where another process has a part of the multiprocessors. Known from here on, even
            # where a warning is an error.
            _uncooperative.add(problem.gpu)
            warnings.warn(
                f"fused_rnn: the GPU runs fewer programs at once than it has multiprocessors "
                f"({error}); layers that need that run one step per launch",
                RuntimeWarning,
                stacklevel=2,
            )
            return scan(problem, self._plan(problem), _precision(problem), *args)

    def _plan(self, problem: Problem) -> Plan:
        device = _INTERPRETER
        if problem.device_type == "cuda":
            device = device_facts(problem.gpu)
            if problem.gpu in _uncooperative:
                device = device._replace(cooperative=False)
        if self.in_float32(problem):
            problem = replace(problem, dtype=torch.float32)
        return make_plan(problem, device, _precision(problem), requested_regime())


def _precision(problem: Problem) -> str:
    """Of float32 products, "ieee" or "tf32", which of AMD's GPUs Triton compiles for one alone."""
    if problem.device_type == "cuda":
        device = device_facts(problem.gpu)
        if device.vendor == "hip" and device.family != "gfx942":
            return "ieee"
    return float32_precision()


def _normalises(problem: Problem) -> bool:
    return "layer_norm" in problem.extras


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter runs, or would run, the kernels."""
    return environment.is_set("TRITON_INTERPRET")


@lru_cache(maxsize=16)
def device_facts(index: int) -> Device:
    """What the planner needs to know of a CUDA or HIP device."""
    facts = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        family = facts.gcnArchName.split(":")[0]
        # Not cooperative: the barrier before a program says that its part of h is there does not
        # wait for the stores of its other waves, as `arrive` is compiled for AMD.
        return Device(family, facts.multi_processor_count, 64 * 1024, False)
    family, shared = f"sm{facts.major}{facts.minor}", facts.shared_memory_per_block_optin
    return Device(family, facts.multi_processor_count, shared, not _has_other_processes(index))


def _has_other_processes(index: int) -> bool:
    """Whether others may run on the GPU at the same time (MPS): nobody promises then that all
    programs of a launch do. torch does not tell, and older drivers do not know."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    device, answer = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), index) != 0:
        return False
    asked = driver.cuDeviceGetAttribute(ctypes.byref(answer), _MPS_ENABLED, device)
    return asked == 0 and answer.value != 0


def _device_refusal(problem: Problem) -> str | None:
    """Why its GPU cannot run the kernels."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(problem.gpu)
        if (major, minor) < (8, 0):
            return f"needs compute capability 8.0 or newer, got {major}.{minor}"
    return _launch_refusal()


@cache
def _launch_refusal() -> str | None:
    """Why triton can launch nothing: where its cache has no launcher yet, it compiles one, in C."""
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018
    except (AssertionError, RuntimeError, OSError, SubprocessError) as error:
        return f"triton cannot launch kernels: {str(error).partition(chr(10))[0]}"
    return None
