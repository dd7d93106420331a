// The FMA ceiling of the machine it runs on: ten independent chains of float32 multiply-adds that
// stay in registers. Ten hide a latency of 5 cycles on two units, and fit AVX2's 16 registers.
// Compiled by ceiling.py for the very CPU (-march=native), never installed.

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kChains = 10;

typedef float Vector __attribute__((vector_size(kBytes)));

// Runs `steps` steps and returns the floating-point operations of one step. The values converge
// to 2; `result` receives one, so that the work cannot be left out.
extern "C" long fma_steps(long steps, float* result) {
  const Vector factor = Vector{} + 0.5f;
  const Vector summand = Vector{} + 1.0f;
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
