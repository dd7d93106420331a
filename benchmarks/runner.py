"""Measures a group: every provider on every case of it, in turns, in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from cases import Case, Group
from data import Data, Results, expected_results, make_data
from fused_rnn.testing import relative_error
from providers import CannotDoError, Provider, Session
from results import Row

# Relative to torch.nn's, over a whole tensor: long sums added in another order, and the roundings
# of a half type. What is wrong is wrong by far more.
LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 3e-2, "float64": 1e-10}

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
# On a busy machine a call can take a hundred times as long as on a quiet one, since threads that
# wait for each other wait for the scheduler; the spread then says what the median is worth.
PATIENCE = 20.0  # seconds, after which two turns must do


@dataclass
class Contender:
    """A provider with a case, and the seconds per call it has taken so far."""

    session: Session
    row: Row  # what is known before anything is timed
    flops: int
    bundle: int = 1  # calls per sample
    lead_in: float = LEAD_IN  # seconds, 0 for long calls
    samples: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Runs until warm, then fixes what depends on how long a call takes."""
        with self.session.active():
            self._call_for(LEAD_IN)
            taken = self._call_for(LEAD_IN)
        self.bundle = max(1, round(SHORTEST_SAMPLE / taken))
        self.lead_in = LEAD_IN if taken < 2 * LEAD_IN else 0.0

    def turn(self) -> None:
        call, clock = self.session.call, time.perf_counter
        with self.session.active():
            if self.lead_in:
                self._call_for(self.lead_in)
            end = clock() + TURN
            while True:
                start = clock()
                for _ in range(self.bundle):
                    call()
                stop = clock()
                self.samples.append((stop - start) / self.bundle)
                if stop >= end:
                    break

    def _call_for(self, seconds: float) -> float:
        """Calls at least once and until the time is over; returns the mean seconds of a call."""
        start, calls, taken = time.perf_counter(), 0, 0.0
        while calls == 0 or taken < seconds:
            self.session.call()
            calls += 1
            taken = time.perf_counter() - start
        return taken / calls

    def measured_row(self) -> Row:
        low, median, high = (q * 1e3 for q in statistics.quantiles(self.samples, n=4))
        rate = self.flops / (median * 1e6)
        figures = {"ms": median, "low_ms": low, "high_ms": high, "gflops": rate}
        return replace(self.row, samples=len(self.samples), kernel=self.session.kernel, **figures)


def measure(
    set_name: str,
    number: int,
    group: Group,
    providers: Iterable[Provider],
    seconds: float,
    threads: int,
) -> list[Row]:
    """A row for every case of the group and every provider, also for those that are not timed.

    Args:
        number: the group's in this run, to tell which rows were measured together.
        seconds: about how long the turns take together; at least FEWEST_TURNS of each are taken.
        threads: of the cases that do not name a number themselves.
    """
    entrants: list[Contender | Row] = []
    for variant, case in enumerate(group):
        data = make_data(case)
        expected = expected_results(case, data)
        for provider in providers:
            row = Row(set_name, number, variant, case, provider.name)
            try:
                session = _checked(provider, case, data, expected, threads)
            except CannotDoError as error:
                entrants.append(replace(row, note=f"cannot: {error}"))
            except _WrongError as error:
                entrants.append(replace(row, note=f"wrong: {error}"))
            else:
                entrants.append(Contender(session, row, case.flops(data.rows)))
        del expected
    gc.collect()
    gc.disable()  # a collection would fall into one call of many
    try:
        _take_turns([e for e in entrants if isinstance(e, Contender)], seconds)
    finally:
        gc.enable()
    return [e.measured_row() if isinstance(e, Contender) else e for e in entrants]


class _WrongError(Exception):
    """A provider's results are not torch.nn's."""


def _checked(
    provider: Provider, case: Case, data: Data, expected: Results, threads: int
) -> Session:
    session = provider.prepare(case, data, case.threads or threads)
    with session.active():
        actual = session.results(session.call())
    for name, value in expected.items():
        error = relative_error(actual[name].detach(), value.detach())
        if not error <= LARGEST_ERROR[case.dtype]:
            raise _WrongError(f"{name} differs from torch.nn's by {error:.1e} relative")
    return session


def _take_turns(contenders: list[Contender], seconds: float) -> None:
    for contender in contenders:
        contender.warm_up()
    start, turns, elapsed = time.perf_counter(), 0, 0.0
    while contenders and (elapsed < seconds or turns < (FEWEST_TURNS if elapsed < PATIENCE else 2)):
        for contender in contenders:
            contender.turn()
        turns += 1
        elapsed = time.perf_counter() - start
