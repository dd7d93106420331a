"""What is measured: one layer call is a `Case`, and the named sets of cases are in `SETS`.

Cases that a set compares with each other (two dtypes, two thread counts, two sizes) form a
`Group`: everything in a group is measured in turns, so that a ratio within it means something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

GATES = {"rnn": 1, "gru": 3, "lstm": 4}  # rnn is tanh
MODES = ("inference", "training", "step", "packed")
DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Case:
    """One call of a recurrent module.

    mode is "inference" (no gradients), "training" (forward, then the gradients of the input and of
    every parameter), "step" (one timestep of a stream: inference with states in and out) or
    "packed" (training on a PackedSequence, lengths drawn from 1..T).
    """

    cell: str  # a key of GATES
    T: int  # timesteps
    B: int  # batch rows
    I: int  # noqa: E741  input size
    H: int  # hidden size
    mode: str = "inference"
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"
    threads: int = 0  # 0: as many as the run has

    def __post_init__(self) -> None:
        for name, known in (("cell", GATES), ("mode", MODES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}; got {getattr(self, name)!r}"
                )

    @property
    def has_grad(self) -> bool:
        return self.mode in ("training", "packed")

    @property
    def shape(self) -> str:
        """ "T,B,H", or "T,B,I,H" where input and hidden size differ."""
        sizes = (self.T, self.B, self.H) if self.I == self.H else (self.T, self.B, self.I, self.H)
        return ",".join(map(str, sizes))

    @property
    def traits(self) -> str:
        """What the shape and the mode do not say; empty for most cases."""
        parts = [
            f"{self.layers} layers" if self.layers > 1 else "",
            "bidirectional" if self.bidirectional else "",
            self.dtype if self.dtype != "float32" else "",
            f"{self.threads} thread{'s' * (self.threads > 1)}" if self.threads else "",
        ]
        return " ".join(filter(None, parts))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.cell, self.shape, self.mode, self.traits)))

    def flops(self, rows: int) -> int:
        """Floating-point operations of one call on `rows` input rows (T*B unless packed).

        Only the matrix products count, a multiplication and an addition each as one. Training has
        three times the products of inference: forward, the gradients of inputs and of weights.
        """
        directions = 1 + self.bidirectional
        inputs = [self.I] + [directions * self.H] * (self.layers - 1)
        products = sum(directions * GATES[self.cell] * self.H * (i + self.H) for i in inputs)
        return 2 * rows * products * (3 if self.has_grad else 1)


Group = tuple[Case, ...]  # the case that the others are compared with first


@dataclass(frozen=True)
class CaseSet:
    """Groups that answer one question."""

    name: str
    question: str
    groups: tuple[Group, ...]
    peers: bool = True  # False: only fused_rnn is measured, since its cases compare to each other

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
    shapes: Iterable[tuple[int, int, int]], modes: Iterable[str], **options
) -> Iterator[Case]:
    """A case for each cell, shape (T, B, H=I) and mode."""
    for cell, (timesteps, batch, hidden), mode in product(GATES, shapes, modes):
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


SETS: dict[str, CaseSet] = {
    s.name: s
    for s in (
        CaseSet(
            "standing",
            "How fast is a layer, against everything else that computes it?",
            alone(cases_of(STANDING, INFERENCE_AND_TRAINING)),
        ),
        CaseSet(
            "streaming",
            "What does one timestep cost, called through the module?",
            alone(cases_of([(1, 1, 64), (1, 1, 128), (1, 1, 512)], ["step"])),
        ),
        CaseSet(
            "packed",
            "How fast is training on packed sequences, lengths uniform in 1..T?",
            alone(cases_of([(128, 32, 256), (100, 64, 128)], ["packed"])),
        ),
        CaseSet(
            "small",
            "How fast are the small layers of teaching code and of forecasters?",
            alone(cases_of([(100, 32, h) for h in (8, 16, 32, 64)], INFERENCE_AND_TRAINING)),
        ),
        CaseSet(
            "odd",
            "What does a size cost that no vector and no tile divides?",
            tuple(round_and_odd()),
            peers=False,
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
            peers=False,
        ),
        CaseSet(
            "bf16",
            "How much faster is training in bfloat16 than in float32?",
            beside(
                cases_of([(128, 32, 256), (50, 64, 512), (16, 64, 1024)], ["training"]),
                dtype="bfloat16",
            ),
            peers=False,
        ),
    )
}
