"""What is measured: one layer call is a `Case`."""

from __future__ import annotations

from dataclasses import dataclass

GATES = {"rnn": 1, "gru": 3, "lstm": 4}  # rnn is tanh
MODES = ("inference", "training", "step", "packed")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}  # and their bytes
LENGTHS = ("uniform", "sentences")


@dataclass(frozen=True)
class Case:
    """One call of a recurrent module.

    mode is "inference" (no gradients), "training" (forward, then the gradients of the input and of
    every parameter), "step" (one timestep of a stream: inference with states in and out) or
    "packed" (training on a PackedSequence whose lengths are drawn as `lengths` says).
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
    heads: int = 1  # W_hh is block-diagonal with so many blocks; dense arithmetic is allowed
    lengths: str = "uniform"  # of packed rows, one of LENGTHS
    resets: float = 0.0  # the part of all (timestep, row) pairs that start from a zero state
    name: str = ""  # the model it is taken from, where it has a name

    def __post_init__(self) -> None:
        known = {"cell": GATES, "mode": MODES, "dtype": DTYPES, "lengths": LENGTHS}
        for field, names in known.items():
            if getattr(self, field) not in names:
                raise ValueError(
                    f"{field}: expected one of {', '.join(names)}; got {getattr(self, field)!r}"
                )
        if self.H % self.heads:
            raise ValueError(f"heads: expected a divisor of H = {self.H}; got {self.heads}")

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
            self.name,
            f"{self.layers} layers" if self.layers > 1 else "",
            "bidirectional" if self.bidirectional else "",
            f"{self.heads} heads" if self.heads > 1 else "",
            self.lengths if self.mode == "packed" and self.lengths != "uniform" else "",
            f"{self.resets:.0%} resets" if self.resets else "",
            self.dtype if self.dtype != "float32" else "",
            f"{self.threads} thread{'s' * (self.threads > 1)}" if self.threads else "",
        ]
        return " ".join(filter(None, parts))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.cell, self.shape, self.mode, self.traits)))

    @property
    def _layer_inputs(self) -> list[int]:
        return [self.I] + [self.directions * self.H] * (self.layers - 1)

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def weights(self) -> int:
        """Elements of all weight matrices; of W_hh only the blocks."""
        per_input = self.directions * GATES[self.cell] * self.H
        return sum(per_input * (i + self.H // self.heads) for i in self._layer_inputs)

    @property
    def recurrent_bytes(self) -> int:
        """Of one direction's W_hh, or of one of its blocks: what a step reads again."""
        return GATES[self.cell] * (self.H // self.heads) ** 2 * DTYPES[self.dtype]

    def flops(self, rows: int) -> int:
        """Floating-point operations of one call on `rows` input rows (T*B unless packed).

        Only the matrix products count, a multiplication and an addition each as one. Training has
        three times the products of inference: forward, the gradients of inputs and of weights.
        """
        return 2 * rows * self.weights * (3 if self.has_grad else 1)

    def bytes(self, rows: int) -> int:
        """Bytes that a call cannot avoid to move: inputs and weights read once, results written.

        Training reads the input again for the gradients of the weights, its own results and their
        gradient, and writes the gradients of input and weights; what lies between forward and
        backward otherwise is the provider's choice and does not count.
        """
        x, y = rows * self.I, rows * self.directions * self.H
        forward = x + self.weights + y
        backward = x + 2 * y + self.weights + x + self.weights
        return DTYPES[self.dtype] * (forward + backward * self.has_grad)
