"""Measures a group: every provider on every case of it, in turns, in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from fused_rnn.testing import relative_error
from harness.cases import Case
from harness.data import Data, Results, expected_results, make_data, masked
from harness.memory import PeakMemory
from harness.providers import CannotDoError, Provider, Session, Setting
from harness.results import Row
from harness.sets import Group

# Relative to the expected results, over a whole tensor: long sums added in another order, and the
# roundings of a half type or of TF32. What is wrong is wrong by far more.
LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2, "float64": 1e-10}
LARGEST_TF32_ERROR = 1e-2

# A turn is a run of calls of one provider, and its first calls do not count while they take less
# than LEAD_IN together: threads of the provider before still spin on the cores, and the caches
# hold its data. Measured with four providers in turns on two cores, beside each of them alone:
# call by call, layers with T=128, B=1 took up to 8.6 times as long (ONNX Runtime after torch.nn),
# a step 1.2 to 3.6 times, and the first quarter of turns of 2 ms was as bad. In turns of 10 and of
# 30 ms, what came after the first quarter took 0.5 to 1.7 times as long as alone, 0.9 in the
# median: the noise of a machine with other work on it, and nothing systematic.
# Calls longer than twice that need no lead-in, and a turn is one of them.
LEAD_IN = 0.010  # seconds
TURN = 0.030  # seconds, the lead-in not counted
# Shorter calls are timed several at a time, so that reading the clock (0.1 us) is not measured.
SHORTEST_SAMPLE = 0.0001  # seconds
FEWEST_TURNS = 5
LONGEST_OWN = 1.5  # seconds of turns that samples are asked for; five turns may take longer
# On a busy machine a call can take a hundred times as long as on a quiet one, since threads that
# wait for each other wait for the scheduler; the spread then says what the median is worth.
PATIENCE = 20.0  # seconds, after which two turns must do


class DeviceLostError(Exception):
    """A provider left the GPU in a state in which nothing runs any more in this process."""

    def __init__(self, provider: str, case: Case, reason: str) -> None:
        super().__init__(f"{provider} on {case}: {reason}")
        self.provider = provider


@dataclass
class Contender:
    """A provider with a case, and the seconds per call it has taken so far."""

    session: Session
    row: Row  # what is known before anything is timed
    flops: int
    gpu: bool = False
    bundle: int = 1  # calls per sample
    per_turn: int = 1  # samples, on a GPU
    lead_in: float = LEAD_IN  # seconds, 0 for long calls
    samples: list[float] = field(default_factory=list)
    taken: float = 0.0  # seconds of its turns

    def has(self, samples: int) -> bool:
        """Whether it has so many, or has had its time."""
        return len(self.samples) >= samples or self.taken >= LONGEST_OWN

    def warm_up(self) -> None:
        """Runs until warm, then fixes what depends on how long a call takes."""
        with self.session.active():
            self._call_for(LEAD_IN)
            taken = self._call_for(LEAD_IN)
        self.bundle = max(1, round(SHORTEST_SAMPLE / taken))
        self.per_turn = max(1, round(TURN / (taken * self.bundle)))
        self.lead_in = LEAD_IN if taken < 2 * LEAD_IN else 0.0

    def turn(self) -> None:
        start = time.perf_counter()
        with self.session.active():
            if self.lead_in:
                self._call_for(self.lead_in)
            (self._gpu_samples if self.gpu else self._cpu_samples)()
        self.taken += time.perf_counter() - start

    def _cpu_samples(self) -> None:
        call, clock = self.session.call, time.perf_counter
        end = clock() + TURN
        while True:
            start = clock()
            for _ in range(self.bundle):
                call()
            stop = clock()
            self.samples.append((stop - start) / self.bundle)
            if stop >= end:
                break

    def _gpu_samples(self) -> None:
        """By events, in one go: what the CPU spends counts only where the GPU waits for it."""
        call = self.session.call
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.per_turn + 1)]
        events[0].record()
        for event in events[1:]:
            for _ in range(self.bundle):
                call()
            event.record()
        events[-1].synchronize()
        for before, after in pairwise(events):
            self.samples.append(before.elapsed_time(after) / 1e3 / self.bundle)

    def _call_for(self, seconds: float) -> float:
        """Calls at least once and until the time is over; returns the mean seconds of a call."""
        start, calls, taken = time.perf_counter(), 0, 0.0
        while calls == 0 or taken < seconds:
            self.session.call()
            if self.gpu:
                torch.cuda.synchronize()
            calls += 1
            taken = time.perf_counter() - start
        return taken / calls

    def measured_row(self) -> Row:
        samples = self.samples if len(self.samples) > 1 else self.samples * 2
        low, median, high = (q * 1e3 for q in statistics.quantiles(samples, n=4))
        rate = self.flops / (median * 1e6)
        figures = {"ms": median, "low_ms": low, "high_ms": high, "gflops": rate}
        return replace(self.row, samples=len(self.samples), kernel=self.session.kernel, **figures)


def measure(
    set_name: str,
    number: int,
    group: Group,
    providers: Iterable[Provider],
    seconds: float,
    setting: Setting,
    begins: Callable[[str], None] = lambda provider: None,
    samples: int = 0,
) -> list[Row]:
    """A row for every case of the group and every provider, also for those that are not timed.

    Args:
        number: the group's in this run, to tell which rows were measured together.
        seconds: about how long the turns take together; at least FEWEST_TURNS of each are taken.
        setting: of the run; a case's own number of threads goes before it.
        begins: told the name of a provider before any of its code runs, so that who ends the
            process is known.
        samples: that each median is to rest on, or LONGEST_OWN seconds if those are over first.

    Raises:
        DeviceLostError: a provider brought the GPU down, so that nothing more can be measured.
    """
    entrants: list[Contender | Row] = []
    for variant, case in enumerate(group):
        own = replace(setting, threads=case.threads or setting.threads)
        data = make_data(case, setting.device)
        expected = expected_results(case, data)
        counts = {"flops": case.flops(data.rows), "bytes": case.bytes(data.rows)}
        for provider in providers:
            if not provider.wants(case):
                continue
            row = Row(set_name, number, variant, case, provider.name, **counts)
            begins(provider.name)
            entrants.append(entrant_of(provider, row, data, expected, own))
        del expected, data
    gc.collect()
    gc.disable()  # a collection would fall into one call of many
    try:
        _take_turns([e for e in entrants if isinstance(e, Contender)], seconds, begins, samples)
    finally:
        gc.enable()
    return [e.measured_row() if isinstance(e, Contender) else e for e in entrants]


class _WrongError(Exception):
    """A provider's results are not the expected ones."""


def entrant_of(
    provider: Provider, row: Row, data: Data, expected: Results, setting: Setting
) -> Contender | Row:
    """The provider ready to be timed, or its row with the reason why it is not."""
    case, gpu = row.case, setting.device != "cpu"
    try:
        session = provider.prepare(case, data, setting)
        with session.active():
            with PeakMemory(setting.device) as peak:
                output = session.call()
            actual = masked(case, session.results(output))
        largest = LARGEST_TF32_ERROR if _rounds(provider, case) else LARGEST_ERROR[case.dtype]
        error = _compared(actual, expected, largest)
    except CannotDoError as error:
        return replace(row, note=f"cannot: {error}")
    except _WrongError as error:
        return replace(row, note=f"wrong: {error}")
    except Exception as error:  # peers fail in ways of their own; the run goes on without
        reason = _reason(error)
        if _is_fatal(error):
            raise DeviceLostError(provider.name, case, reason) from error
        return replace(row, note=f"failed: {reason}")
    row = replace(row, error=error, peak_mib=peak.mib)
    return Contender(session, row, row.flops, gpu)


def _rounds(provider: Provider, case: Case) -> bool:
    return provider.tf32 and case.dtype == "float32"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300]


def _is_fatal(error: Exception) -> bool:
    """Whether CUDA reported an error that stays: all but running out of memory do."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(error, lost) or "CUDA error" in str(error)


def _compared(actual: Results, expected: Results, largest: float) -> float:
    """The largest relative error of all results.

    Raises:
        _WrongError: it is too large, or a result is missing.
    """
    worst = 0.0
    for name, value in expected.items():
        if name not in actual:
            raise _WrongError(f"{name} is missing")
        found = actual[name].detach()
        if found.shape != value.shape:
            raise _WrongError(f"{name} has shape {list(found.shape)}, not {list(value.shape)}")
        error = relative_error(found, value.detach())
        if not error <= largest:
            raise _WrongError(f"{name} differs from what is expected by {error:.1e} relative")
        worst = max(worst, error)
    return worst


def _take_turns(
    contenders: list[Contender], seconds: float, begins: Callable[[str], None], samples: int
) -> None:
    for contender in contenders:
        begins(contender.row.provider)
        contender.warm_up()
    start, turns, elapsed = time.perf_counter(), 0, 0.0
    while contenders and (
        elapsed < seconds
        or turns < (FEWEST_TURNS if elapsed < PATIENCE else 2)
        or (elapsed < PATIENCE and not all(each.has(samples) for each in contenders))
    ):
        for contender in contenders:
            begins(contender.row.provider)
            contender.turn()
        turns += 1
        elapsed = time.perf_counter() - start
