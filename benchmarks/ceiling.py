"""What the machine can do at most: float32 multiply-adds in registers, and torch's matrix product.

Rates are in GFLOP/s and the largest of many short measurements, since what disturbs one can only
make it slower.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

SECONDS = 0.01  # of one measurement
GEMM_SIZE = 1024


@cache
def _fma_steps() -> Callable[[int], int] | None:
    """fma_peak.cpp as a function of the number of steps; None where nothing compiles it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        return None
    source = Path(__file__).with_name("fma_peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-ffp-contract=fast"]
        command = [*compiler, *flags, str(source), "-o", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        function = ctypes.CDLL(str(library)).fma_steps  # stays loaded when the file is gone
    function.restype = ctypes.c_long
    function.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    return lambda steps: function(steps, ctypes.byref(ctypes.c_float()))


def _fma_rate(threads: int) -> float:
    """GFLOP/s of `threads` Python threads; ctypes lets go of the interpreter's lock."""
    steps_of = _fma_steps()
    start = time.perf_counter()
    steps_of(100_000)
    steps = max(1, int(100_000 * SECONDS / (time.perf_counter() - start)))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(steps_of, [1000] * threads))  # the threads exist from here on
        start = time.perf_counter()
        flops = sum(each * steps for each in pool.map(steps_of, [steps] * threads))
        return flops / (time.perf_counter() - start) / 1e9


def _gemm_rate(threads: int) -> float:
    """GFLOP/s of torch.mm on square float32 matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a = torch.randn(GEMM_SIZE, GEMM_SIZE)
    out = a @ a
    start = time.perf_counter()
    torch.mm(a, a, out=out)
    taken = time.perf_counter() - start
    torch.set_num_threads(before)
    return 2 * GEMM_SIZE**3 / taken / 1e9


class Ceiling:
    """The best rates seen so far for one thread and for all; `measure` it now and then."""

    def __init__(self, threads: int) -> None:
        self.counts = sorted({1, threads})
        self.fma = dict.fromkeys(self.counts, 0.0)
        self.gemm = dict.fromkeys(self.counts, 0.0)

    def measure(self) -> None:
        for count in self.counts:
            if _fma_steps() is not None:
                self.fma[count] = max(self.fma[count], _fma_rate(count))
            self.gemm[count] = max(self.gemm[count], _gemm_rate(count))

    def as_json(self) -> dict:
        """Rates by the number of threads (a string, as JSON has it), and which are the peak."""
        compiled = _fma_steps() is not None
        peak = self.fma if compiled else self.gemm
        return {
            "peak": "multiply-adds in registers"
            if compiled
            else "torch.mm, for want of a C++ compiler: the real peak is higher",
            "peak_gflops": {str(count): rate for count, rate in peak.items()},
            "torch_mm_gflops": {str(count): rate for count, rate in self.gemm.items()},
        }
