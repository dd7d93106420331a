"""What a GPU can do at most: torch's matrix product per dtype, copies, and synchronisation of a
step within a block, a cluster of eight and the whole grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from harness.precision import gpu_precision

GEMM_SIZE = 8192
COPY_BYTES = (8 << 20, 1 << 30)  # within the L2 cache, and from memory to memory
REPEATS = 5
STEPS = 2000
# Bounded: a block that waits in vain leaves after a second instead of hanging the machine.
SOURCE = """
extern "C" __global__ void block_steps(unsigned* counter, int steps) {
  for (int step = 0; step < steps; ++step) __syncthreads();
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) cluster_steps(unsigned* counter, int steps) {
  for (int step = 0; step < steps; ++step) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
}

extern "C" __global__ void grid_steps(unsigned* counter, int steps) {
  if (threadIdx.x != 0) return;
  for (unsigned step = 1; step <= steps; ++step) {
    __threadfence();
    atomicAdd(counter, 1u);
    const unsigned all = step * gridDim.x;
    for (int spins = 0; *(volatile unsigned*)counter < all; ++spins) {
      if (spins > 1000000) return;
    }
    __threadfence();
  }
}
"""
BLOCKS = {"block": 1, "cluster": 8, "grid": 0}  # 0: one on every multiprocessor


def measured_seconds(call: Callable[[], object]) -> float:
    """Of the GPU, the least of a few runs."""
    call()
    best = float("inf")
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return best


def gpu_ceiling(device: str = "cuda") -> dict:
    """GFLOP/s by dtype, GB/s by size, and microseconds of a step by scope; what fails is named."""
    found: dict = {
        "peak": f"torch.mm of {GEMM_SIZE} squared",
        "peak_gflops": {},
        "copy_gbs": {},
        "step_us": {},
        "failed": {},
    }

    def attempt(kind: str, name: str, measure: Callable[[], float]) -> None:
        try:
            found[kind][name] = measure()
        except Exception as error:  # a figure less is no reason to measure nothing
            found["failed"][f"{kind} {name}"] = f"{type(error).__name__}: {error}"[:200]

    for name in ("bfloat16", "float16", "tf32", "float32"):
        attempt("peak_gflops", name, partial(_gemm_rate, name, device))
    for size in COPY_BYTES:
        attempt("copy_gbs", str(size), partial(_copy_rate, size, device))
    for name in BLOCKS:
        attempt("step_us", name, partial(_step_time, name, device))
    return found


def _gemm_rate(name: str, device: str) -> float:
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE, device=device, dtype=dtype)
    out = torch.empty_like(a)
    with gpu_precision(tf32=name == "tf32"):
        return 2 * GEMM_SIZE**3 / measured_seconds(lambda: torch.mm(a, b, out=out)) / 1e9


def _copy_rate(size: int, device: str) -> float:
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    return 2 * size / measured_seconds(lambda: target.copy_(source)) / 1e9


def _step_time(name: str, device: str) -> float:
    kernel = torch.cuda._compile_kernel(SOURCE, f"{name}_steps")
    blocks = BLOCKS[name] or torch.cuda.get_device_properties(device).multi_processor_count
    counter = torch.zeros(1, dtype=torch.int32, device=device)

    def call() -> None:
        counter.zero_()
        kernel(grid=(blocks, 1, 1), block=(128, 1, 1), args=[counter, STEPS])

    return measured_seconds(call) / STEPS * 1e6
