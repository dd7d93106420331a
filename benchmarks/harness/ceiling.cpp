// Ceilings of the machine it runs on. Compiled by ceiling.py for the very CPU (-march=native),
// never installed.

#include <sched.h>

#include <atomic>

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kChains = 10;

typedef float Vector __attribute__((vector_size(kBytes)));

// Ten independent chains of float32 multiply-adds that stay in registers: ten hide a latency of 5
// cycles on two units, and fit AVX2's 16 registers. Runs `steps` steps and returns the
// floating-point operations of one step. The caller says what is multiplied and added, which the
// compiler thus does not know: a chain that it can tell to stay where it is it leaves out.
// `result` receives a sum, so that the work cannot be left out.
extern "C" long fma_steps(long steps, float factor, float summand, float* result) {
  Vector chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = Vector{} + static_cast<float>(i);
  for (long step = 0; step < steps; ++step) {
#pragma GCC unroll 10
    for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * factor + summand;
  }
  Vector sum{};
  for (int i = 0; i < kChains; ++i) sum += chains[i];
  *result = sum[0];
  return 2L * kChains * (kBytes / static_cast<long>(sizeof(float)));
}

struct alignas(128) Arrivals {
  std::atomic<long> count;
};

// Meets all `threads` threads `steps` times; `arrivals` has one entry of 128 bytes, zero at the
// start, for each. Threads that wait long yield, since the one awaited may need their core.
extern "C" void barrier_steps(long steps, int threads, int self, Arrivals* arrivals) {
  for (long step = 1; step <= steps; ++step) {
    arrivals[self].count.store(step, std::memory_order_release);
    for (int other = 0; other < threads; ++other) {
      for (int spins = 0; arrivals[other].count.load(std::memory_order_acquire) < step; ++spins) {
        if (spins > 2000) sched_yield();
      }
    }
  }
}
