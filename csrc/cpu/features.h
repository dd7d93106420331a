// What the running CPU can do, asked of the compiler's run-time support.
#pragma once

#if defined(FUSED_RNN_X86) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace fused_rnn {

// The names are those of FUSED_RNN_CPU_CAPABILITY; avx512bf16 is what avx512 takes bfloat16 with,
// amxbf16 what amx does.
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

static inline bool cpu_has_avx512vnni() {
#if defined(FUSED_RNN_X86)
  return cpu_has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// ARM's of bytes.
static inline bool cpu_has_dot_products() {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  static const bool has = (getauxval(AT_HWCAP) & kDotProducts) != 0;
  return has;
#elif defined(__aarch64__) && defined(__APPLE__)
  return true;  // as all of Apple's for computers
#else
  return false;
#endif
}

// A process has to ask Linux for the tiles, which it then has in all its threads.
static inline bool cpu_has_amx() {
#if defined(FUSED_RNN_X86) && defined(__linux__)
  static const bool granted = [] {
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    return cpu_has_avx512bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBFloat16) &&
           (d & kTiles) && syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace fused_rnn
