"""What the CPU can do at most: multiply-adds in registers, torch's matrix product, copies, and a
barrier of all threads.

Each is the best of many short measurements, since what disturbs one can only make it worse.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

SECONDS = 0.01  # of one measurement
GEMM_SIZE = 1024
COPY_BYTES = (1 << 20, 256 << 20)  # within the caches, and from memory to memory
BARRIERS = 2000


@cache
def _library() -> ctypes.CDLL | None:
    """ceiling.cpp, compiled; None where nothing compiles it."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        return None
    source = Path(__file__).with_name("ceiling.cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "ceiling.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-ffp-contract=fast"]
        command = [*compiler, *flags, str(source), "-o", str(target)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        library = ctypes.CDLL(str(target))  # stays loaded when the file is gone
    library.fma_steps.restype = ctypes.c_long
    number = ctypes.c_float
    library.fma_steps.argtypes = [ctypes.c_long, number, number, ctypes.POINTER(number)]
    library.barrier_steps.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return library


def _fma_steps(steps: int) -> int:
    return _library().fma_steps(steps, 0.5, 1.0, ctypes.byref(ctypes.c_float()))


def _fma_rate(threads: int) -> float:
    """GFLOP/s of `threads` Python threads; ctypes lets go of the interpreter's lock."""
    start = time.perf_counter()
    _fma_steps(100_000)
    steps = max(1, int(100_000 * SECONDS / (time.perf_counter() - start)))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(_fma_steps, [1000] * threads))  # the threads exist from here on
        start = time.perf_counter()
        flops = sum(each * steps for each in pool.map(_fma_steps, [steps] * threads))
        return flops / (time.perf_counter() - start) / 1e9


def _barrier_time(threads: int) -> float:
    """Microseconds of one barrier."""
    arrivals = torch.zeros(16 * (threads + 1), dtype=torch.int64)
    address = -(-arrivals.data_ptr() // 128) * 128  # of the first entry, aligned

    def run(self: int) -> float:
        start = time.perf_counter()
        _library().barrier_steps(BARRIERS, threads, self, address)
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        # The last thread to come waits for nobody to start.
        return min(pool.map(run, range(threads))) / BARRIERS * 1e6


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


@cache
def _buffers(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)


def _copy_rate(size: int) -> float:
    """GB/s, read and written bytes together, of torch copying `size` bytes."""
    source, target = _buffers(size)
    target.copy_(source)
    start = time.perf_counter()
    target.copy_(source)
    return 2 * size / (time.perf_counter() - start) / 1e9


class Ceiling:
    """The best seen so far for one thread and for all; `measure` it now and then."""

    def __init__(self, threads: int) -> None:
        self.counts = sorted({1, threads})
        self.fma = dict.fromkeys(self.counts, 0.0)
        self.gemm = dict.fromkeys(self.counts, 0.0)
        self.copy = dict.fromkeys(COPY_BYTES, 0.0)
        self.barrier = {count: float("inf") for count in self.counts if count > 1}

    def measure(self) -> None:
        compiled = _library() is not None
        for count in self.counts:
            if compiled:
                self.fma[count] = max(self.fma[count], _fma_rate(count))
            self.gemm[count] = max(self.gemm[count], _gemm_rate(count))
        for size in self.copy:
            self.copy[size] = max(self.copy[size], _copy_rate(size))
        for count in self.barrier if compiled else ():
            self.barrier[count] = min(self.barrier[count], _barrier_time(count))

    def as_json(self) -> dict:
        """Figures by the number of threads or bytes, which JSON wants as strings."""
        compiled = _library() is not None
        peak = self.fma if compiled else self.gemm
        return {
            "peak": "multiply-adds in registers"
            if compiled
            else "torch.mm, for want of a C++ compiler: the real peak is higher",
            "peak_gflops": {str(count): rate for count, rate in peak.items()},
            "torch_mm_gflops": {str(count): rate for count, rate in self.gemm.items()},
            "copy_gbs": {str(size): rate for size, rate in self.copy.items()},
            "step_us": {str(n): us for n, us in self.barrier.items()} if compiled else {},
        }
