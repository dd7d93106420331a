"""Times of a module before and after `replace`, for `python -m fused_rnn bench`."""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .convert import replace
from .dispatch import BACKENDS, backend
from .environment import positive
from .explanation import explain

_LAYERS = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_TURN = 0.03  # seconds that one of the two runs before the other does
_FEWEST_TURNS = 3
_BUSY = 0.5  # load average of the minute before, above which ratios may be far off
# Of the layer that is made where --model names none.
_LAYER = {
    "cell": "lstm",
    "hidden": 256,
    "layers": 1,
    "batch": 32,
    "timesteps": 100,
    "bidirectional": False,
}


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, the medians, and what the converted module ran on."""

    mode: str  # "inference" or "training"
    before: float
    after: float
    spread: float  # half the distance of the quartiles over the median, the larger of both
    difference: float  # of the outputs, the largest, relative to the largest output
    kernels: tuple[str, ...]  # each that ran, empty when nothing was converted

    @property
    def ratio(self) -> float:
        """How many times as fast the module became."""
        return self.before / self.after

    def __str__(self) -> str:
        kernels = ", ".join(self.kernels) or "nothing to convert"
        return (
            f"{self.mode}: before {self.before * 1e3:.3f} ms, after {self.after * 1e3:.3f} ms, "
            f"{self.ratio:.2f} times as fast (±{self.spread:.0%}); outputs differ by "
            f"{self.difference:.0e}; {kernels}"
        )


def time_module(
    module: torch.nn.Module, *args, mode: str = "inference", seconds: float = 2.0
) -> Timing:
    """Times calls of `module` as it is and of a copy after `fused_rnn.replace`, in turns.

    Args:
        module: any module with torch.nn recurrent layers inside; it is not changed.
        *args: what it is called with. For training the first floating-point tensor of its output
            is summed up and differentiated with regard to all parameters.
        mode: "inference", without gradients and in eval mode, or "training".
        seconds: about how long to measure.

    Returns:
        A `Timing`; outputs of both are compared, in eval mode, before anything is timed.

    Raises:
        ValueError: `mode` is neither, or the module returns no floating-point tensor.

    Example:
        >>> timing = time_module(torch.nn.GRU(8, 16), torch.randn(5, 2, 8), seconds=0.01)
        >>> timing.mode, timing.difference < 1e-5
        ('inference', True)
    """
    if mode not in ("inference", "training"):
        raise ValueError(f"mode: expected 'inference' or 'training'; got {mode!r}")
    before, after = copy.deepcopy(module), replace(copy.deepcopy(module))
    difference = _difference(before, after, args)
    calls = [_call(each.train(mode == "training"), args, mode) for each in (before, after)]
    with torch.set_grad_enabled(mode == "training"):
        choices = explain(after, *args).layers
    gpu = any(t.is_cuda for t in (*module.parameters(), *_tensors(args)))
    with torch.inference_mode() if mode == "inference" else nullcontext():
        samples = in_turns(calls, seconds, gpu)
    medians = [statistics.median(each) for each in samples]
    return Timing(
        mode,
        *medians,
        max(_spread(each) for each in samples),
        difference,
        tuple(dict.fromkeys(choice.kernel for choice in choices)),
    )


def _difference(before: torch.nn.Module, after: torch.nn.Module, args: tuple) -> float:
    with torch.no_grad():
        outputs = [_first_tensor(each.eval()(*args)) for each in (before, after)]
    old, new = (output.double() for output in outputs)
    if old.numel() == 0:
        return 0.0
    return ((new - old).abs().max() / old.abs().max().clamp_min(1e-300)).item()


def _call(module: torch.nn.Module, args: tuple, mode: str) -> Callable[[], object]:
    if mode == "inference":
        return lambda: module(*args)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def train() -> object:
        loss = _first_tensor(module(*args)).float().sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return train


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _first_tensor(output: object) -> Tensor:
    for tensor in _tensors(output):
        if tensor.is_floating_point():
            return tensor
    raise ValueError(f"module: expected floating-point tensors in its output; got {type(output)}")


def in_turns(
    calls: list[Callable[[], object]], seconds: float, gpu: bool = False
) -> list[list[float]]:
    """Seconds per call, a list for each of `calls`; what a turn begins with does not count."""
    wait = torch.cuda.synchronize if gpu else lambda: None

    def run_for(call: Callable[[], object], duration: float) -> list[float]:
        taken, end = [], time.perf_counter() + duration
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            call()
            wait()
            taken.append(time.perf_counter() - start)
        return taken

    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        run_for(call, 2 * _TURN)
    end, turns = time.perf_counter() + seconds, 0
    while turns < _FEWEST_TURNS or time.perf_counter() < end:
        for call, own in zip(calls, samples, strict=True):
            run_for(call, _TURN / 3)
            own += run_for(call, _TURN)
        turns += 1
    return samples


def _spread(samples: list[float]) -> float:
    low, median, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / median


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m fused_rnn bench`."""
    add = parser.add_argument
    add("--cell", choices=_LAYERS, help="of a layer that is made for the purpose")
    for name, text in (
        ("hidden", "hidden size"),
        ("input", "input size; default: the hidden size. With --model: its input T,B,I"),
        ("layers", "stacked layers"),
        ("batch", "batch rows"),
        ("timesteps", "timesteps"),
    ):
        add(f"--{name}", type=_sizes if name == "input" else positive, help=text)
    # None where it was not given: with --model that is told from a value.
    add("--bidirectional", action="store_true", default=None)
    add("--dtype", choices=_DTYPES, default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", choices=("auto", *BACKENDS), default="auto", help="force fused_rnn's backend")
    add("--mode", choices=("inference", "training"), help="default: both")
    add("--seconds", type=_seconds, default=2.0, help="about how long each mode is measured")
    add(
        "--model",
        metavar="FILE",
        help="time this module instead, saved whole with torch.save; loading it runs code that "
        "it holds, so only your own",
    )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds; got {text!r}")
    return value


def run(args: argparse.Namespace) -> int:
    """Prints a line for each mode; returns the exit status."""
    try:
        return _run(args)
    # Devices that are not there, sizes that no memory holds, input that the model does not take.
    except (RuntimeError, ValueError, TypeError, AssertionError, OverflowError) as error:
        raise SystemExit(f"bench: {type(error).__name__}: {error}") from error


def _run(args: argparse.Namespace) -> int:
    dtype = getattr(torch, args.dtype)
    if args.model is not None:
        for name in _LAYER:
            if getattr(args, name) is not None:
                raise SystemExit(f"--{name} is of a layer that is made; --model brings its own")
        if args.input is None:
            raise SystemExit("--model needs --input, the sizes of its input as T,B,I")
        try:
            module = torch.load(args.model, map_location=args.device, weights_only=False)
        except Exception as error:  # of the file, of pickle, or of what it names and is not there
            raise SystemExit(f"--model: {type(error).__name__}: {error}") from error
        if not isinstance(module, torch.nn.Module):
            raise SystemExit(f"--model: expected a module in {args.model}; got {type(module)}")
        module, shape = module.to(dtype), args.input
        title = f"{args.model}, input {list(shape)}"
    else:
        if args.input is not None and len(args.input) != 1:
            raise SystemExit("--input: expected one size; T,B,I go with --model")
        given = {name: getattr(args, name) for name in _LAYER}
        made = argparse.Namespace(**_LAYER | {n: v for n, v in given.items() if v is not None})
        size = args.input[0] if args.input else made.hidden
        module = _LAYERS[made.cell](
            size, made.hidden, made.layers, bidirectional=made.bidirectional
        ).to(args.device, dtype)
        shape = (made.timesteps, made.batch, size)
        title = f"{module}, T={shape[0]} B={shape[1]}"
    x = torch.randn(shape, device=args.device, dtype=dtype)
    print(f"{title}, {args.dtype} on {args.device}, {torch.get_num_threads()} threads")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # not there on Windows
    if load > _BUSY:
        print(f"the machine is busy, load average {load:.1f}: times and ratios may be far off")
    for mode in (args.mode,) if args.mode else ("inference", "training"):
        with backend(args.backend):
            print(time_module(module, x, mode=mode, seconds=args.seconds))
    return 0
