// Numbers of half types as floats, and back: few of them, by one thread.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

#if defined(FUSED_RNN_X86)
#include <immintrin.h>
#endif

#include "dense.h"
#include "direct.h"

namespace fused_rnn {

// Calls function(Type{}) for torch's type of such numbers.
template <class Function>
void with_half_type(NumberType type, const Function& function) {
  if (type == NumberType::bfloat16) {
    function(torch::headeronly::BFloat16{});
  } else {
    function(torch::headeronly::Half{});
  }
}

#if defined(FUSED_RNN_X86)
// torch's own conversion of float16 is a chain of branches where it may not ask for these.
inline bool cpu_has_f16c() {
  return __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
}

// Of all but the last few numbers: how many.
__attribute__((target("avx,f16c"))) inline int64_t narrow_by_f16c(const float* from, int64_t count,
                                                                  uint16_t* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  return i;
}

__attribute__((target("avx,f16c"))) inline int64_t widen_by_f16c(const uint16_t* from,
                                                                 int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  return i;
}
#else
inline bool cpu_has_f16c() { return false; }
inline int64_t narrow_by_f16c(const float*, int64_t, uint16_t*) { return 0; }
inline int64_t widen_by_f16c(const uint16_t*, int64_t, float*) { return 0; }
#endif

inline void narrow(NumberType type, const float* from, int64_t count, uint16_t* to) {
  const bool fast = type == NumberType::float16 && cpu_has_f16c();
  const int64_t done = fast ? narrow_by_f16c(from, count, to) : 0;
  with_half_type(type, [=](auto half) {
    for (int64_t i = done; i < count; i++) to[i] = decltype(half)(from[i]).x;
  });
}

inline void widen(NumberType type, const uint16_t* from, int64_t count, float* to) {
  const bool fast = type == NumberType::float16 && cpu_has_f16c();
  const int64_t done = fast ? widen_by_f16c(from, count, to) : 0;
  with_half_type(type, [=](auto half) {
    using Half = decltype(half);
    for (int64_t i = done; i < count; i++) {
      to[i] = static_cast<float>(Half(from[i], Half::from_bits()));
    }
  });
}

// The numbers in the order of memory, or with the first two of three dimensions swapped. Those of
// float32 are rounded to `type`, all others are of it.
inline void widen(NumberType type, const Array& array, bool swapped, float* to) {
  const ThreeDimensions all(array, swapped);
  if (array.halves && all.is_dense) return widen(type, array.halves, all.count(), to);
  const auto copy = [&](auto number_at) {
    for (int64_t i = 0; i < all.sizes[0]; i++) {
      for (int64_t j = 0; j < all.sizes[1]; j++) {
        const int64_t row = i * all.strides[0] + j * all.strides[1];
        for (int64_t k = 0; k < all.sizes[2]; k++) *to++ = number_at(row + k * all.strides[2]);
      }
    }
  };
  with_half_type(type, [&](auto half) {
    using Half = decltype(half);
    if (array.data) {
      copy([&](int64_t at) { return static_cast<float>(Half(array.data[at])); });
    } else {
      copy([&](int64_t at) {
        return static_cast<float>(Half(array.halves[at], Half::from_bits()));
      });
    }
  });
}

}  // namespace fused_rnn
