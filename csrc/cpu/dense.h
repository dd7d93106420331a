// Arrays in the order of their memory, which kernels take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "border.h"

namespace fused_rnn {

// An array of one to three dimensions as one of three, or of three with the first two swapped.
struct ThreeDimensions {
  int64_t sizes[3] = {1, 1, 1}, strides[3];
  bool is_dense = true;

  ThreeDimensions(const Array& array, bool swapped) {
    const int64_t missing = 3 - array.dimensions;
    int64_t dense[3];
    std::copy_n(array.sizes, array.dimensions, sizes + missing);
    set_strides(sizes, 3, false, strides);
    if (array.strides) std::copy_n(array.strides, array.dimensions, strides + missing);
    if (swapped) {
      std::swap(sizes[0], sizes[1]);
      std::swap(strides[0], strides[1]);
    }
    set_strides(sizes, 3, false, dense);
    for (int i = 0; i < 3; i++) is_dense = is_dense && (sizes[i] == 1 || strides[i] == dense[i]);
  }

  int64_t count() const { return sizes[0] * sizes[1] * sizes[2]; }
};

// The numbers of an array of float32: where they lie, or a copy.
class Dense {
 public:
  Dense() = default;
  // Null for no array.
  explicit Dense(const Array* array, bool swapped = false) {
    if (array == nullptr) return;
    data_ = array->data;
    if (array->is_plain() && !swapped) return;
    const ThreeDimensions all(*array, swapped);
    if (!all.is_dense) copy(all.sizes, all.strides);
  }

  const float* data() const { return data_; }

 private:
  void copy(const int64_t* sizes, const int64_t* strides) {
    const int64_t count = sizes[0] * sizes[1], second = sizes[1], width = sizes[2];
    copy_ = memory(count * width);
    for_each_row(count, width, [=, from = data_, to = copy_.get()](int64_t n) {
      const float* row = from + n / second * strides[0] + n % second * strides[1];
      if (strides[2] == 1) {
        std::copy_n(row, width, to + n * width);
      } else {
        for (int64_t i = 0; i < width; i++) to[n * width + i] = row[i * strides[2]];
      }
    });
    data_ = copy_.get();
  }

  const float* data_ = nullptr;
  Memory copy_;
};

}  // namespace fused_rnn
