// Arrays of a half type as kernels take them.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "border.h"
#include "halves.h"

namespace fused_rnn {

// So many numbers become others here at most. torch does it with all threads, and keeps what
// autocast made of weights.
constexpr int64_t kMostConverted = 1 << 18;

// Those for a half type's own elements; null where it goes through float32.
inline const KernelsOf<BFloat16>* kernels_of_half(NumberType type, CellKind cell) {
  // relu's gradient jumps where a rounded h turns the sign of a sum, so it goes through float32.
  const bool is_native = type == NumberType::bfloat16 && cell != CellKind::rnn_relu;
  return is_native ? bfloat16_kernels() : nullptr;
}

// Numbers as kernels over elements of E take them: where they lie, or copies.
template <class E>
class Operands {
 public:
  explicit Operands(NumberType type) : type_(type) {}

  const E* elements(const Array& array, bool swapped = false) {
    if constexpr (std::is_same_v<E, float>) {
      return floats(array, swapped);
    } else {
      if (array.halves && ThreeDimensions(array, swapped).is_dense) {
        return reinterpret_cast<const E*>(array.halves);
      }
      const int64_t count = ThreeDimensions(array, swapped).count();
      E* to = reinterpret_cast<E*>(keep((count + 1) / 2));
      narrow(type_, floats(array, swapped), count, reinterpret_cast<uint16_t*>(to));
      return to;
    }
  }

  const float* floats(const Array& array, bool swapped = false) {
    float* to = keep(ThreeDimensions(array, swapped).count());
    widen(type_, array, swapped, to);
    return to;
  }

  // How many numbers `elements` would convert.
  static int64_t converted(const Array& array, bool swapped = false) {
    const ThreeDimensions all(array, swapped);
    return !std::is_same_v<E, float> && array.halves && all.is_dense ? 0 : all.count();
  }

 private:
  float* keep(int64_t count) {
    kept_.push_back(memory(count));
    return kept_.back().get();
  }

  const NumberType type_;
  std::vector<Memory> kept_;
};

}  // namespace fused_rnn
