"""The command line: `python -m fused_rnn doctor` tells what this installation can do, and why not
more; `python -m fused_rnn bench` times a layer or a model before and after conversion;
`python -m fused_rnn tune` measures the Triton kernels' tiles on your GPU."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import torch

from . import __version__, bench, direct, dispatch, native
from .backends.triton import tune
from .cells import CELLS
from .environment import VARIABLES, is_set
from .problem import Problem

_SKIP = "FUSED_RNN_SKIP_BUILD"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_rnn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, libraries, devices, and what runs where")
    bench.add_arguments(
        commands.add_parser("bench", help="time a layer, or your model, before and after replace")
    )
    tune.add_arguments(
        commands.add_parser("tune", help="measure the Triton kernels' tiles on this GPU")
    )
    args = parser.parse_args(arguments)
    if args.command == "bench":
        return bench.run(args)
    if args.command == "tune":
        return tune.run(args)
    for title, lines in _sections():
        print(title)
        print("".join(f"  {line}\n" for line in lines))
    return 0


def _sections() -> Iterator[tuple[str, list[str]]]:
    yield (
        "Versions",
        [
            f"fused_rnn {__version__}",
            f"torch {torch.__version__}",
            f"triton {'installed' if find_spec('triton') else 'not installed'}",
            f"python {platform.python_version()} on {platform.system()} {platform.machine()}",
        ],
    )
    facts = {k: _text(v) for k, v in native.build_facts().items()}
    yield "Compiled parts", [f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()]
    yield "Devices", _devices()
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "Environment", variables or ["no FUSED_RNN_ variable is set"]
    choices = list(_choices())
    yield "What runs where (training, T=64 B=32 I=H=128)", choices
    yield "What to do", _advice(choices)


def _text(value: object) -> str:
    if isinstance(value, dict):
        value = [name for name, present in value.items() if present]
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _devices() -> list[str]:
    cpu = f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = [f"cuda:{i}: {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return [cpu, *(gpus or ["no CUDA device"])]


def _problem(cell: str, dtype: torch.dtype, device_type: str) -> Problem:
    return Problem(
        cell_name=cell,
        timesteps=64,
        batch_size=32,
        input_size=128,
        hidden_size=128,
        training=True,
        dtype=dtype,
        device_type=device_type,
    )


def _choices() -> Iterator[str]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for cell in CELLS:
                problem = _problem(cell, dtype, device)
                yield f"{device} {str(dtype).removeprefix('torch.')} {cell}: {_choice(problem)}"


def _choice(problem: Problem) -> str:
    try:
        chosen = dispatch.select(problem)
        refusals = [f"not {n}: {why}" for n, why in dispatch.reasons(problem) if why]
        return "; ".join([chosen.describe(problem), *refusals])
    except (RuntimeError, ValueError) as error:
        return f"error: {error}"


def _advice(choices: list[str]) -> list[str]:
    advice = [f"set {name} to something else, or unset it" for name in _set_wrongly(choices)]
    again = (
        "install fused_rnn again (in its checkout: pip install -v --no-cache-dir --force-reinstall "
        "--no-deps --no-build-isolation .)"
    )
    if native.cpu_library_error() and native.library_path().exists() and not is_set(_SKIP):
        advice.append(f"the library of the CPU kernels is there but does not load: {again}")
    elif native.cpu_library_error():
        advice.append(
            "for the CPU kernels install a C++ compiler (Debian: apt-get install g++), unset "
            f"{_SKIP} and {again}"
        )
    elif direct.calls() is direct._NoCalls:
        slower = "small calls take a few microseconds longer without the extension module"
        if find_spec("fused_rnn._C"):
            advice.append(f"{slower}, which is there but cannot be used: {again}")
        else:
            headers = "Python's headers (Debian: apt-get install python3-dev)"
            advice.append(f"{slower}: install {headers} and {again}")
    if torch.cuda.is_available() and not find_spec("triton"):
        advice.append("for the Triton kernels install triton: pip install triton")
    if torch.cuda.is_available() and native.cuda_library_error():
        advice.append(
            "for the CUDA kernels put nvcc on the PATH and install fused_rnn again with "
            "FUSED_RNN_CUDA=1"
        )
    return advice or ["nothing is missing"]


def _set_wrongly(choices: list[str]) -> list[str]:
    """The environment variables that the errors among the choices are about."""
    errors = " ".join(choice for choice in choices if ": error: " in choice)
    return [name for name in VARIABLES if name in errors]


if __name__ == "__main__":
    sys.exit(main())
