"""Streaming: a trained model is exported, and runs one timestep at a time for as long as you like.

A filter hears a sine of unknown frequency and phase under noise, and gives the sine without noise,
at every moment, from what it has heard so far. It learns on whole sequences, in batches. In use,
samples come one by one; all that is kept from the past is the state, so a step costs the same time
and memory whether it is the tenth or the millionth. The program measures both, for an exported
program and for `fused_rnn.stepper`, which has the weights packed and stays in Python.

The exported program is a file that runs without the Python of the model: of `torch.export`
(default); with `--form aoti` compiled ahead of time to a shared library by AOTInductor, which C++
can load as well; with `--form onnx` for ONNX Runtime and others, with ONNX's own operators. One
graph has one step: (sample, state) in, (answer, new state) out.

The baseline is the moving average that does best on the same noise.
"""

from __future__ import annotations

import statistics
import time
from array import array
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
import fused_rnn

NOISE = 0.7
MOST_GROWTH = 4096  # KiB, noise of the allocator; 50,000 steps that left 100 bytes each are more
SUFFIX = {"export": ".pt2", "aoti": "_aoti.pt2", "onnx": ".onnx"}


def sines(length: int, batch: int, device) -> tuple[Tensor, Tensor]:
    """What is heard and what is meant, [T, B, 1] each."""
    steps = torch.arange(length, device=device)[:, None, None]
    frequency = torch.empty(1, batch, 1, device=device).uniform_(0.1, 0.5)
    phase = torch.rand(1, batch, 1, device=device) * 6.2832
    clean = torch.sin(steps * frequency + phase)
    return clean + NOISE * torch.randn_like(clean), clean


class Filter(nn.Module):
    def __init__(self, cell: str, width: int):
        super().__init__()
        self.rnn = common.LAYERS[cell](1, width)
        self.head = nn.Linear(width, 1)

    def forward(self, heard: Tensor, state=None):
        # heard [T, B, 1] -> answers [T, B, 1], state
        y, state = self.rnn(heard, state)
        return self.head(y), state


def export(model: Filter, state, path: Path, form: str):
    """One step as a program read back from a file: f(sample [1, 1, 1], state)."""
    sample = torch.zeros(1, 1, 1, device=model.head.weight.device)
    model.eval()
    if form == "onnx":
        with torch.no_grad():
            torch.onnx.export(model, (sample, state), path, dynamo=True, verbose=False)
        return onnx_step(path)
    with torch.no_grad():
        program = torch.export.export(model, (sample, state))
    if form == "aoti":
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        return torch._inductor.aoti_load_package(str(path))
    torch.export.save(program, path)
    return torch.export.load(path).module()


def onnx_step(path: Path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def step(sample: Tensor, state):
        states = state if isinstance(state, tuple) else (state,)
        values = [t.cpu().numpy() for t in (sample, *states)]
        outputs = session.run(None, dict(zip(names, values, strict=True)))
        answer, *states = map(torch.from_numpy, outputs)
        return answer, tuple(states) if len(states) > 1 else states[0]

    return step


def packed_step(model: Filter):
    """One step in Python: f(sample [1, 1, 1], state)."""
    recurrent, head = fused_rnn.stepper(model.rnn), model.head

    def step(sample: Tensor, state):
        y, state = recurrent(sample[0], state)
        return head(y).unsqueeze(0), state

    return step


def resident_kilobytes() -> int:
    """Memory that this process has now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0)


def stream(step, heard: Tensor, state) -> tuple[Tensor, array, list[int]]:
    """Answers [T, 1, 1], microseconds of each step, and kilobytes after each tenth of them."""
    # A list of times would grow, and the memory measured with it.
    answers, times, memory = heard.clone(), array("d", bytes(8 * len(heard))), []
    with torch.inference_mode():
        for number in range(len(heard)):
            start = time.perf_counter()
            answers[number : number + 1], state = step(heard[number : number + 1], state)
            times[number] = 1e6 * (time.perf_counter() - start)
            if (number + 1) % (len(heard) // 10) == 0:
                memory.append(resident_kilobytes())
    return answers, times, memory


def moving_average_error(heard: Tensor, clean: Tensor) -> float:
    errors = []
    for width in range(1, 12):
        averages = heard.squeeze(-1).unfold(0, width, 1).mean(-1)
        errors.append(F.mse_loss(averages, clean.squeeze(-1)[width - 1 :]).item())
    return min(errors)


def main(argv: list[str] | None = None) -> int:
    parser = common.Parser(
        __doc__, cell="gru", steps=(800, 150), hidden=(64, 24), samples=(50_000, 2000)
    )
    parser.add_argument(
        "--form", choices=SUFFIX, default="export", help="onnx takes onnxscript and onnxruntime"
    )
    args = parser.parse(argv)
    model = Filter(args.cell, args.hidden).to(args.device)
    trainer = common.Trainer(model, args.steps, lr=1e-2)
    steps = common.Steps(args.steps, "training")
    for _ in steps:
        heard, clean = sines(64, 64, args.device)
        steps.note = f"loss {trainer.step(F.mse_loss(model(heard)[0], clean)):.3f}"

    heard, clean = sines(200, 500, args.device)
    with torch.inference_mode():
        learned = F.mse_loss(model(heard)[0][20:], clean[20:]).item()
    state = torch.zeros(1, 1, args.hidden, device=args.device)
    state = (state, state.clone()) if args.cell == "lstm" else state
    exported = export(model, state, args.out / f"streaming{SUFFIX[args.form]}", args.form)
    one, _ = sines(args.samples, 1, args.device)
    with torch.inference_mode():
        whole = model(one)[0]
    tenth, growth, apart = args.samples // 10, 0, 0.0
    for name, step in ((args.form, exported), ("stepper", packed_step(model))):
        answers, times, memory = stream(step, one, state)
        growth = max(growth, memory[-1] - memory[0])
        apart = max(apart, (answers - whole).abs().max().item())
        common.console.print(
            f"{name}: {statistics.median(times[tenth : 2 * tenth]):.1f} us per step in the second "
            f"tenth of {args.samples:,} steps, {statistics.median(times[-tenth:]):.1f} us in the "
            f"last; memory grew by {memory[-1] - memory[0]} KiB between them",
            highlight=False,
        )
    results = [
        common.Result(
            "squared error of the filter, after 20 samples",
            learned, moving_average_error(heard, clean), "the best moving average",
            goal=0.8 * moving_average_error(heard, clean), higher_is_better=False,
        ),
        common.Result(
            "step by step against the whole sequence: largest difference",
            apart, 0.0, "equal", goal=1e-4, higher_is_better=False,
        ),
    ]  # fmt: skip
    if memory[-1] and not args.small:  # some systems do not tell, and few steps say little
        every_state = args.samples * args.hidden * 4 / 1024
        results.append(
            common.Result(
                f"KiB that the process grew by over nine tenths of {args.samples:,} steps",
                growth, every_state, "every state kept", MOST_GROWTH, higher_is_better=False,
            )
        )  # fmt: skip
    return common.report(args, "streaming", results)


if __name__ == "__main__":
    raise SystemExit(main())
