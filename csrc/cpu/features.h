// What the running CPU can do, asked of the compiler's run-time support.
#pragma once

namespace fused_rnn {

// The names are those of FUSED_RNN_CPU_CAPABILITY; avx512bf16 is what avx512 takes bfloat16 with.
static inline bool cpu_has_avx2() {
#if defined(FUSED_RNN_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

static inline bool cpu_has_avx512() {
#if defined(FUSED_RNN_X86)
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

static inline bool cpu_has_avx512bf16() {
#if defined(FUSED_RNN_X86)
  return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace fused_rnn
