"""Which regime, tiles and warps a scan gets: plain functions of the problem and of device facts.

    program  one program per batch tile holds all of W_hh for the whole sequence
    grid     a grid of batch tiles times hidden tiles runs at once, each program with its slice of
             W_hh, and exchanges h in every step
    steps    one step per launch

A table of tuned configurations comes first: the user's own (`python -m fused_rnn tune`), then
`tuned.json`. A rule makes configurations for what no row covers. Among those that fit, the
smallest modelled time per step wins; `docs/triton-kernels.md` has the model and its sources.
Nothing here imports triton.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ... import environment
from ...cells import is_half
from ...problem import Problem

REGIMES = ("program", "grid", "steps")
PASSES = ("forward", "backward")
_SHIPPED = Path(__file__).with_name("tuned.json")
_TABLE = "FUSED_RNN_TRITON_TUNING"
_MOST_WARPS = 32  # of a program, on any GPU
# The triton.language.dot of every target multiplies tiles of at least this many rows and columns.
SMALLEST_TILE = 16
# Counters count to T * tiles in 32 bits.
_LARGEST_COUNT = 2**31 - 1


class Device(NamedTuple):
    """What the planner needs to know of a GPU."""

    family: str  # "sm80", "sm90", "sm100", "gfx942", ..., or "interpreter"
    multiprocessors: int
    shared_memory: int  # bytes one program may have
    cooperative: bool  # whether a launch can be refused unless all its programs run at once

    @property
    def vendor(self) -> str:
        if self.family == "interpreter":
            return self.family
        return "hip" if self.family.startswith("gfx") else "cuda"


class Config(NamedTuple):
    """Tiles of one kernel."""

    regime: str
    block_b: int  # batch rows per program
    block_h: int  # hidden units per program
    block_k: int  # elements of h (backward: of one gate's gradient) per product
    warps: int
    resident: bool  # W_hh's slice stays on the chip


class PassPlan(NamedTuple):
    """How one pass, forward or backward, is run."""

    config: Config
    hidden_tiles: int
    batch_tiles: int
    tiles_per_launch: int  # batch tiles that run at once
    microseconds: float  # modelled, per timestep
    refusals: tuple[str, ...]  # why not the regimes before this one

    @property
    def launches(self) -> int:
        """Launches per range of steps."""
        return -(-self.batch_tiles // self.tiles_per_launch)

    def __str__(self) -> str:
        c = self.config
        kept = "" if c.resident else ", W_hh from L2"
        return f"{c.regime}: tiles {c.block_b}x{c.block_h}, k {c.block_k}, {c.warps} warps{kept}"


@dataclass(frozen=True)
class Plan:
    forward: PassPlan
    backward: PassPlan | None  # None in inference

    def __str__(self) -> str:
        parts = [str(self.forward), *([str(self.backward)] if self.backward else [])]
        return "; backward ".join(parts)


class UnfitError(ValueError):
    """The regime that was asked for cannot run the problem."""


def kind_of(problem: Problem, precision: str) -> str:
    """How the products are made: "half", "tf32" or "float32" (exact)."""
    if is_half(problem.dtype):
        return "half"
    return "tf32" if precision == "tf32" else "float32"


def cell_of(problem: Problem) -> str:
    """The cell's name in rows of the table: the RNNs' activations make no difference."""
    return "rnn" if problem.cell_name.startswith("rnn") else problem.cell_name


def products_of_step(problem: Problem) -> int:
    """How many products with parts of W_hh a step has, one after the other: two where a GRU resets
    before the product."""
    return len(problem.cell.products)


def requested_regime() -> str:
    """What FUSED_RNN_TRITON_REGIME forces, "" for nothing.

    Raises:
        ValueError: it is set to something else than a regime.
    """
    return environment.choice("FUSED_RNN_TRITON_REGIME", REGIMES)


def make_plan(problem: Problem, device: Device, precision: str, regime: str = "") -> Plan:
    """How to run a problem. A table is read once per process.

    Args:
        problem: of a cell without projection, with at least one row and one unit.
        device: where.
        precision: of float32 products, "ieee" or "tf32".
        regime: one of REGIMES to force it, "" to choose.

    Raises:
        UnfitError: the forced regime does not fit; the message says why.
    """
    return _plan(problem, device, precision, regime, tuning_file())


@lru_cache(maxsize=512)
def _plan(problem: Problem, device: Device, precision: str, regime: str, users: Path) -> Plan:
    kind = kind_of(problem, precision)
    table = _user_rows(users) + _shipped_rows()
    passes = [_plan_pass(problem, device, kind, table, "forward", regime)]
    if problem.training:
        passes.append(_plan_pass(problem, device, kind, table, "backward", regime))
    return Plan(passes[0], passes[1] if problem.training else None)


def _plan_pass(
    problem: Problem, device: Device, kind: str, table: Table, which: str, regime: str
) -> PassPlan:
    best: PassPlan | None = None
    refusals = []
    for name in (regime,) if regime else REGIMES:
        config = configuration(problem, device, kind, table, which, name)
        if why := unfit(config, problem, device, which):
            refusals.append(f"{which} {name}: {why}")
            continue
        found = place(config, problem, device, which, _is_exact(kind, device))
        if best is None or found.microseconds < best.microseconds:
            best = found
    if best is None:
        raise UnfitError(f"regime {regime!r} does not fit: {'; '.join(refusals)}")
    return best._replace(refusals=tuple(refusals))


def _is_exact(kind: str, device: Device) -> bool:
    """Whether products are made without tensor cores, which a vendor's float32 may be."""
    return kind == "float32" and device.vendor == "cuda"


def place(
    config: Config, problem: Problem, device: Device, which: str, exact: bool = False
) -> PassPlan:
    """The tiles of a configuration that fits, and what `model` says of it."""
    hidden_tiles = -(-problem.hidden_size // config.block_h)
    batch_tiles = -(-problem.batch_size // config.block_b)
    at_once = batch_tiles
    if config.regime == "grid":
        at_once = min(batch_tiles, device.multiprocessors // (hidden_tiles * problem.directions))
    time = model(config, problem, device, which, exact).microseconds
    return PassPlan(config, hidden_tiles, batch_tiles, max(at_once, 1), time, ())


def configuration(
    problem: Problem, device: Device, kind: str, table: Table, which: str, regime: str
) -> Config:
    """What would run the problem in a regime: the row tuned for it, or else what the rule makes."""
    cell = cell_of(problem)
    matching = [
        row
        for row in table
        if row.family in (device.family, device.vendor)
        and (row.cell, row.kind, row.which, row.config.regime) == (cell, kind, which, regime)
        and row.hidden >= problem.hidden_size
        and row.batch <= problem.batch_size
    ]
    if matching:
        # The closest class of H, and of B; for this family before any other GPU's; the user's rows
        # come first where all that agrees.
        return min(matching, key=lambda r: (r.hidden, -r.batch, r.family == device.vendor)).config
    return rule(problem, device, kind, regime)


def rule(problem: Problem, device: Device, kind: str, regime: str) -> Config:
    """A configuration for what no row of the table covers."""
    padded = power_of_two(problem.hidden_size)
    if device.family == "interpreter":
        # Small, so that small problems have several tiles; larger where they would have too many.
        tile = SMALLEST_TILE if padded <= 64 else 64
        if regime == "program":
            return Config("program", SMALLEST_TILE, padded, padded, 1, True)
        return Config(regime, SMALLEST_TILE, tile, tile, 1, regime == "grid")
    exact = _is_exact(kind, device)
    if regime == "program":
        # Exact float32 products keep their operands in registers, a short piece at a time.
        block_k = 16 if exact else padded
        return Config("program", 16, padded, block_k, 8 if padded > 32 else 4, True)
    if regime == "grid":
        return Config("grid", 16, 16, 16 if exact else 64, 4, False)
    if exact:
        return Config("steps", 16, 32, 16, 8, False)
    wide = 64 if problem.dtype.itemsize == 2 else 32
    return Config("steps", 16 if problem.batch_size <= 16 else 32, 32, wide, 8, False)


def unfit(config: Config, problem: Problem, device: Device, which: str) -> str | None:
    """Why a configuration cannot run, or None if it can."""
    hidden, tiles = problem.hidden_size, -(-problem.hidden_size // config.block_h)
    if config.regime == "program" and tiles > 1:
        return f"{hidden} units are more than one program's {config.block_h}"
    need = on_chip_bytes(config, problem, which, device.vendor)
    if need > device.shared_memory:
        return f"needs {need} bytes on the chip, {device.family} has {device.shared_memory}"
    if config.regime != "grid":
        return None
    if tiles == 1:
        return f"{hidden} units are one tile: there is nothing to exchange"
    if not device.cooperative:
        return "the device cannot promise that all programs run at once"
    programs = tiles * problem.directions
    if programs > device.multiprocessors:
        return f"{programs} programs at least, {device.multiprocessors} run at once"
    if (problem.timesteps + 1) * tiles * products_of_step(problem) > _LARGEST_COUNT:
        return f"{problem.timesteps} steps of {tiles} programs are more than 32 bits count"
    return None


def on_chip_bytes(config: Config, problem: Problem, which: str, vendor: str = "cuda") -> int:
    """Shared memory a program takes at most: its slice of W_hh, what it multiplies it with, and
    room to turn a tile around. Tested against what the compiler reports."""
    size, gates = problem.dtype.itemsize, problem.cell.gates
    padded = -(-problem.hidden_size // config.block_k) * config.block_k
    operand = config.block_b * padded * size * (gates if which == "backward" else 1)
    columns = problem.cell.saved_gates or 1
    turned = config.block_b * config.block_h * 4 * columns
    if which == "forward":
        gates = columns  # GRU's product has four columns per unit
    if not config.resident:
        # Tiles of both operands are on their way while others are multiplied.
        stages = 3 if vendor == "cuda" else 2
        stage = (config.block_b + gates * config.block_h) * config.block_k * size
        return stages * stage + turned
    slice_bytes = gates * padded * config.block_h * size
    if vendor == "hip":
        return slice_bytes + operand + turned  # which do not share their room there
    return slice_bytes + max(operand, turned)


class StepModel(NamedTuple):
    """Time per timestep in microseconds, taken apart."""

    exchange: float  # making h visible and waiting for it
    weights: float  # reading W_hh's slice, from shared memory or L2
    state: float  # reading h or the gates' gradients
    pointwise: float
    launch: float
    waves: int  # how often one after the other

    @property
    def microseconds(self) -> float:
        return self.launch + self.waves * (
            self.exchange + self.weights + self.state + self.pointwise
        )


# Assumed, none measured with these kernels; see docs/triton-kernels.md.
_CLOCKS_PER_MICROSECOND = 1755
_EXCHANGE = 1700  # clocks: barrier, fence, arrival, poll
_SHARED_BYTES = 128  # per clock and multiprocessor
_L2_BYTES = 50
_L2_LATENCY = 280  # clocks
_POINTWISE = 700  # clocks: barriers and conversions of layouts, exp, loads and stores
_EXACT_PRODUCTS = 128  # float32 multiply-adds per clock and multiprocessor
_LAUNCH = 8.0  # microseconds: Triton's launcher; in a CUDA graph 2.5


def model(
    config: Config, problem: Problem, device: Device, which: str, exact: bool = False
) -> StepModel:
    """What a timestep should take. Good for comparing regimes, not for promising times."""
    size, gates, hidden = problem.dtype.itemsize, problem.cell.gates, problem.hidden_size
    products = products_of_step(problem)
    depth = gates * hidden if which == "backward" else products * hidden
    slice_bytes = gates * hidden * config.block_h * size
    state_bytes = config.block_b * depth * size
    tiles = -(-hidden // config.block_h)
    programs = tiles * problem.directions * -(-problem.batch_size // config.block_b)
    waves = -(-programs // device.multiprocessors)
    if config.resident:
        weights = (slice_bytes + config.warps * state_bytes) / _SHARED_BYTES
    else:
        weights = slice_bytes / _L2_BYTES
    if exact:
        multiply_adds = gates * hidden * config.block_h * config.block_b
        weights = max(weights, multiply_adds / _EXACT_PRODUCTS)
    alone = config.regime == "program"
    clocks = (
        products * _EXCHANGE if config.regime == "grid" else 0,
        weights,
        0 if alone else products * _L2_LATENCY + state_bytes / _L2_BYTES,
        _POINTWISE,
    )
    return StepModel(
        *(c / _CLOCKS_PER_MICROSECOND for c in clocks),
        launch=products * _LAUNCH if config.regime == "steps" else 0.0,
        waves=waves,
    )


class Row(NamedTuple):
    """One line of a table of tuned configurations."""

    family: str  # a device's family, or a vendor for all of them
    cell: str  # "rnn", "gru", "lstm", "gru_reset_before"
    kind: str
    which: str  # "forward" or "backward"
    hidden: int  # for up to so many units
    batch: int  # from so many batch rows on
    config: Config


Table = tuple[Row, ...]


def read_rows(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: it is not one; the message names the file and the entry.
    """
    try:
        entries = json.loads(path.read_text())["configurations"]
        rows = []
        for number, entry in enumerate(entries):
            fields = dict(entry)
            config = Config(*(fields.pop(name) for name in Config._fields))
            rows.append(Row(**fields, config=config))
            _check(rows[-1], number)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}: expected a table as "python -m fused_rnn tune" writes it; {error}'
        ) from error
    return tuple(rows)


def _check(row: Row, number: int) -> None:
    c = row.config
    blocks = (c.block_b, c.block_h, c.block_k, c.warps)
    if not all(type(n) is int and n > 0 and n & (n - 1) == 0 for n in blocks):
        raise ValueError(f"entry {number}: expected tiles and warps that are powers of two")
    if c.warps > _MOST_WARPS:
        raise ValueError(f"entry {number}: expected {_MOST_WARPS} warps or fewer, got {c.warps}")
    if not all(type(n) is int and n > 0 for n in (row.hidden, row.batch)):
        raise ValueError(f"entry {number}: expected positive numbers for hidden and batch")
    if type(c.resident) is not bool:
        raise ValueError(f"entry {number}: expected true or false for resident")
    if min(blocks[:3]) < SMALLEST_TILE:
        raise ValueError(f"entry {number}: expected tiles of {SMALLEST_TILE} or more")
    if c.regime not in REGIMES or row.which not in PASSES:
        raise ValueError(f"entry {number}: got regime {c.regime!r}, pass {row.which!r}")
    if c.regime == "grid" and c.block_h >= row.hidden:
        raise ValueError(f"entry {number}: expected several hidden tiles in regime grid")


def dump_rows(rows: Table | list[Row]) -> str:
    """The text of a table, an entry per line."""
    lines = []
    for row in rows:
        fields = row._asdict()
        fields.update(fields.pop("config")._asdict())
        lines.append(f"    {json.dumps(fields)}")
    return '{\n  "configurations": [\n' + ",\n".join(lines) + "\n  ]\n}\n"


def tuning_file() -> Path:
    """The file that `python -m fused_rnn tune` writes: FUSED_RNN_TRITON_TUNING, or in the user's
    cache."""
    if path := os.environ.get(_TABLE):
        return Path(path)
    # Not Path.home, which raises where nobody knows the user's.
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "fused_rnn" / "triton.json"


@lru_cache(maxsize=4)
def _user_rows(path: Path) -> Table:
    # Not Path.is_file, which raises where nobody may look: a container's user in another's home.
    if not os.path.isfile(path):
        return ()
    try:
        return read_rows(path)
    except OSError:
        if os.environ.get(_TABLE):
            raise
        return ()


@lru_cache(maxsize=1)
def _shipped_rows() -> Table:
    return read_rows(_SHIPPED)


def power_of_two(size: int) -> int:
    """The width of the smallest tile that so many units fit into."""
    return max(SMALLEST_TILE, 1 << (size - 1).bit_length())
