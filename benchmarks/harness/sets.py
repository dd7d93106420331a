"""The named sets of cases, in `SETS`.

Cases that a set compares with each other (two dtypes, two thread counts, two sizes) form a
`Group`: everything in a group is measured in turns, so that a ratio within it means something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from harness.cases import GATES, LENGTHS, Case

Group = tuple[Case, ...]  # the case that the others are compared with first


@dataclass(frozen=True)
class CaseSet:
    """Groups that answer one question."""

    name: str
    question: str
    groups: tuple[Group, ...]
    device: str = "cpu"
    # "fast": the usual providers; "all": those as well that take long to prepare or to run;
    # "none": only fused_rnn is measured, since its cases compare to each other. Or their names.
    rivals: str | tuple[str, ...] = "fast"
    fresh_memory: bool = False  # peaks are those of processes that do nothing else

    def select(self, cells: Iterable[str], modes: Iterable[str]) -> list[Group]:
        """The groups of these cells and modes."""
        cells, modes = set(cells), set(modes)
        return [g for g in self.groups if g[0].cell in cells and g[0].mode in modes]


STANDING = (
    (128, 1, 128),
    (128, 1, 512),
    (128, 32, 256),
    (512, 64, 128),
    (100, 64, 512),
    (50, 64, 1024),
)
INFERENCE_AND_TRAINING = ("inference", "training")


def cases_of(
    shapes: Iterable[tuple[int, int, int]], modes: Iterable[str], cells=tuple(GATES), **options
) -> Iterator[Case]:
    """A case for each cell, shape (T, B, H=I) and mode."""
    for cell, (timesteps, batch, hidden), mode in product(cells, shapes, modes):
        yield Case(cell, timesteps, batch, hidden, hidden, mode, **options)


def alone(cases: Iterable[Case]) -> tuple[Group, ...]:
    return tuple((case,) for case in cases)


def beside(cases: Iterable[Case], **change) -> tuple[Group, ...]:
    """Each case together with what it becomes by the change."""
    return tuple((case, replace(case, **change)) for case in cases)


def round_and_odd() -> Iterator[Group]:
    """An odd size beside the nearest round one, which for H is a multiple of 64.

    T is short where H is large, to keep a call near 100 ms.
    """
    neighbours = [
        ((100, 32, 128), (100, 32, 100)),
        ((32, 32, 640), (32, 32, 650)),
        ((16, 32, 1024), (16, 32, 1000)),
        ((100, 4, 256), (100, 3, 256)),
        ((32, 128, 256), (32, 129, 256)),
    ]
    for shapes in neighbours:
        round_cases, odd_cases = (cases_of([s], INFERENCE_AND_TRAINING) for s in shapes)
        yield from zip(round_cases, odd_cases, strict=True)


def models(device: str) -> Iterator[Case]:
    """Layers of well-known models; on the CPU with fewer rows, to keep a call below a second."""
    gpu = device == "cuda"
    dtypes = ("bfloat16", "float32") if gpu else ("float32",)
    both = INFERENCE_AND_TRAINING
    for dtype in dtypes:

        def case(name, cell, sizes, mode, dtype=dtype, **options):
            return Case(cell, *sizes, mode, name=name, dtype=dtype, **options)

        # Deep Speech 2 has up to seven bidirectional recurrent layers behind its convolutions.
        speech = (1000, 32, 1024, 1024) if gpu else (200, 1, 1024, 1024)
        for mode in both if gpu else ("inference",):
            yield case("DeepSpeech", "gru", speech, mode, layers=5, bidirectional=True)
        for mode in both:
            yield case(
                "AWD-LSTM", "lstm", (70 if gpu else 35, 80 if gpu else 4, 400, 1150), mode, layers=3
            )
            yield case("tagger", "lstm", (50, 32, 300, 128), mode, layers=2, bidirectional=True)
            yield case("char-LM 2x128", "lstm", (100, 50, 128, 128), mode, layers=2)
            yield case("char-LM 3x512", "lstm", (50, 20, 512, 512), mode, layers=3)
        for timesteps in (16, 64, 128) if gpu else (16,):
            for cell in ("gru", "lstm"):
                yield case("PPO", cell, (timesteps, 1024, 64, 256), "training")


# Heads times head size, of the figure in the FlashRNN paper (arXiv 2412.07752).
FLASHRNN_HEADS = ((48, 16), (24, 32), (12, 64), (6, 128), (3, 256), (1, 768))
FLASHRNN_LARGE_AND_SMALL = ((1, 768), (12, 64))


def flashrnn(heads, batches=(16,), lengths=(1024,), dtypes=("bfloat16",)) -> Iterator[Case]:
    """The FlashRNN figure's LSTM of 768 units; input projection included, unlike theirs."""
    for dtype, (n, _), b, t, mode in product(
        dtypes, heads, batches, lengths, INFERENCE_AND_TRAINING
    ):
        yield Case("lstm", t, b, 768, 768, mode, heads=n, dtype=dtype)


def haste_grid(batches: Iterable[int], sizes: Iterable[int]) -> Iterator[Case]:
    """The grid of haste's own benchmark, 50 timesteps; large sizes last."""
    for size, batch, cell, mode in product(sizes, batches, ("lstm", "gru"), INFERENCE_AND_TRAINING):
        yield Case(cell, 50, batch, 256, size, mode)


def torchrl_grid(batches, lengths, sizes, resets=(0.0, 0.1)) -> Iterator[Case]:
    """The defaults of TorchRL's benchmark of its backends."""
    for size, batch, t, cell, part in product(sizes, batches, lengths, ("gru", "lstm"), resets):
        yield Case(cell, t, batch, 32, size, "training", resets=part)


ALL_SETS = (
    CaseSet(
        "standing",
        "How fast is a layer, against everything else that computes it?",
        alone(cases_of(STANDING, INFERENCE_AND_TRAINING)),
    ),
    CaseSet(
        "streaming",
        "What does one timestep cost, called through the module?",
        alone(cases_of([(1, 1, h) for h in (64, 128, 256, 512, 1024)], ["step"])),
    ),
    CaseSet(
        "chunks",
        "What do a few timesteps at a time cost?",
        alone(cases_of([(t, 1, h) for h in (128, 512, 1024) for t in (2, 4, 16)], ["inference"])),
    ),
    CaseSet(
        "packed",
        "How fast is training on packed sequences?",
        alone(
            [
                *cases_of([(128, 32, 256), (100, 64, 128)], ["packed"]),
                *cases_of([(64, 64, 128)], ["packed"], lengths="sentences"),
            ]
        ),
    ),
    CaseSet(
        "small",
        "How fast are the small layers of teaching code and of forecasters?",
        alone(cases_of([(100, 32, h) for h in (8, 16, 32, 64)], INFERENCE_AND_TRAINING)),
    ),
    CaseSet("models", "How fast are the layers of known models?", alone(models("cpu"))),
    CaseSet(
        "scaling",
        "How does the rate grow with timesteps, batch rows and hidden size?",
        alone(
            case
            for shapes in (
                [(t, 32, 128) for t in (8, 32, 128)],
                [(32, b, 128) for b in (1, 4, 8, 16, 64)],
                [(32, 32, h) for h in (64, 256, 512, 1024)],
            )
            for case in cases_of(shapes, ["inference"], ["gru", "lstm"])
        ),
    ),
    CaseSet(
        "odd",
        "What does a size cost that no vector and no tile divides?",
        tuple(round_and_odd()),
        rivals="none",
    ),
    CaseSet(
        "threads",
        "How much faster are two threads than one?",
        beside(
            cases_of(
                [(128, 32, 256), (256, 64, 128), (50, 64, 512)],
                INFERENCE_AND_TRAINING,
                threads=1,
            ),
            threads=2,
        ),
        rivals="none",
    ),
    CaseSet(
        "bf16",
        "How much faster is training in bfloat16 than in float32?",
        beside(
            cases_of([(128, 32, 256), (50, 64, 512), (16, 64, 1024)], ["training"]),
            dtype="bfloat16",
        ),
        rivals="none",
    ),
    CaseSet(
        "compiled",
        "What does torch.compile make of a layer?",
        alone(
            [
                *cases_of([(128, 32, 256)], INFERENCE_AND_TRAINING),
                *cases_of([(1, 1, 128)], ["step"]),
            ]
        ),
        rivals=("fused_rnn", "fused_rnn compiled"),
    ),
    CaseSet(
        "memory",
        "How much memory does training take, each in a process of its own?",
        alone(
            [
                *cases_of([(128, 32, 256), (512, 64, 128)], ["training"]),
                *cases_of([(500, 16, 128)], ["training"], layers=3, bidirectional=True),
            ]
        ),
        rivals=("fused_rnn", "torch.nn"),
        fresh_memory=True,
    ),
    CaseSet(
        "peers",
        "And against loops, compilers and other frameworks?",
        alone(
            [
                *cases_of([(128, 1, 128)], ["inference"], ["gru", "lstm"]),
                *cases_of([(128, 32, 256)], INFERENCE_AND_TRAINING, ["gru", "lstm"]),
            ]
        ),
        rivals="all",
    ),
    # From here on for GPUs, in the order of the campaign: what matters most comes first.
    CaseSet(
        "gpu-headline",
        "LSTM of 768 units, T=1024, B=16, and GRU: the figure everybody is compared by",
        alone(
            [
                *flashrnn([(1, 768)], dtypes=("bfloat16", "float16", "float32")),
                *cases_of([(1024, 16, 768)], INFERENCE_AND_TRAINING, ["gru"], dtype="bfloat16"),
            ]
        ),
        "cuda",
    ),
    CaseSet(
        "gpu-standing",
        "How fast is a layer, against cuDNN?",
        alone(
            case
            for dtype in ("bfloat16", "float32")
            for case in cases_of(
                ((128, 1, 128), (512, 64, 128), (128, 32, 256), (100, 64, 512), (50, 64, 1024)),
                INFERENCE_AND_TRAINING,
                dtype=dtype,
            )
        ),
        "cuda",
    ),
    CaseSet(
        "gpu-packed",
        "How fast is training on packed sequences?",
        alone(
            case
            for lengths in LENGTHS
            for case in cases_of(
                [(256, 64, 512)], ["packed"], ["gru", "lstm"], dtype="bfloat16", lengths=lengths
            )
        ),
        "cuda",
    ),
    CaseSet(
        "gpu-streaming",
        "What does one timestep cost, called through the module?",
        alone(cases_of([(1, 1, h) for h in (128, 512, 1024)], ["step"], ["gru", "lstm"])),
        "cuda",
    ),
    CaseSet(
        "gpu-flashrnn",
        "The FlashRNN figure: 768 units in 48 to 1 heads",
        alone(
            [
                *flashrnn(FLASHRNN_LARGE_AND_SMALL),
                *flashrnn(h for h in FLASHRNN_HEADS if h not in FLASHRNN_LARGE_AND_SMALL),
            ]
        ),
        "cuda",
        rivals="all",
    ),
    CaseSet(
        "gpu-models", "How fast are the layers of known models?", alone(models("cuda")), "cuda"
    ),
    CaseSet(
        "gpu-deep",
        "What do stacks of layers cost, side by side and one after another?",
        alone(
            case
            for layers, hidden in ((4, 256), (4, 512), (2, 512), (2, 128))
            for case in cases_of(
                [(1024, 16, hidden)],
                INFERENCE_AND_TRAINING,
                ["gru", "lstm"],
                dtype="bfloat16",
                layers=layers,
            )
        ),
        "cuda",
    ),
    CaseSet(
        "gpu-steps",
        "What does a layer cost that runs step by step, in a loop and in graphs?",
        alone(
            cases_of(
                [(128, 1, 1024), (128, 32, 1024), (128, 32, 2048), (64, 64, 4096)],
                INFERENCE_AND_TRAINING,
                ["gru", "lstm"],
                dtype="bfloat16",
            )
        ),
        "cuda",
    ),
    CaseSet(
        "gpu-torchrl",
        "Layers of reinforcement learning, without and with resets",
        alone(
            [
                *torchrl_grid((256, 1024, 4096), (64, 16), (256, 128)),
                *torchrl_grid((16, 64, 128), (64,), (256,)),
            ]
        ),
        "cuda",
    ),
    CaseSet(
        "gpu-haste",
        "haste's grid, its large and its small end",
        alone(haste_grid((1, 16, 64), (128, 512, 1024))),
        "cuda",
    ),
    CaseSet(
        "gpu-flashrnn-sizes",
        "The FlashRNN figure's batch sizes and lengths",
        alone(
            [
                *flashrnn(FLASHRNN_LARGE_AND_SMALL, batches=(2, 8, 32, 64, 128, 256)),
                *flashrnn(FLASHRNN_LARGE_AND_SMALL, lengths=(256, 512, 2048)),
            ]
        ),
        "cuda",
        rivals="all",
    ),
    CaseSet(
        "gpu-torchrl-512",
        "The rest of TorchRL's defaults",
        alone(
            [
                *torchrl_grid((256, 1024, 4096), (16, 32, 64), (512,)),
                *torchrl_grid((256, 1024, 4096), (32,), (128, 256)),
            ]
        ),
        "cuda",
    ),
    CaseSet(
        "gpu-haste-rest",
        "The rest of haste's grid",
        alone(
            [
                *haste_grid((32, 128), (128, 512, 1024)),
                *haste_grid((1, 16, 32, 64, 128), (256, 768, 1536, 2048, 3072, 4096)),
            ]
        ),
        "cuda",
    ),
)
SETS: dict[str, CaseSet] = {s.name: s for s in ALL_SETS}
