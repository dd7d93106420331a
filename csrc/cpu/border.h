// What the operators share at their border to torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "direct.h"
#include "layer.h"
#include "saved.h"

namespace fused_rnn {

using torch::stable::Tensor;

// Of the instruction set that FUSED_RNN_CPU_CAPABILITY names, or the best this CPU has.
const KernelsOf<float>& kernels();
// Where that has none of its own for bfloat16, null.
const KernelsOf<BFloat16>* bfloat16_kernels();
// The next call reads the environment anew. For tests.
void forget_kernels();

Threads torch_threads();

// Fewer floats are moved by one thread. No call that keeps Python's lock (csrc/python) moves
// as many.
constexpr int64_t kSerialFloats = 1 << 18;

// body(row) for rows [0, count), each of which moves `width` floats.
template <class Body>
void for_each_row(int64_t count, int64_t width, const Body& body) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) body(row);
  };
  if (count * width < kSerialFloats) return run(0, count);
  torch_threads().run(count, ceil_div(kSerialFloats, width), run);
}

// Live no longer than the tensor. One that is not dense has no data, or is strided.
Array array_of(const Tensor& tensor);
Array strided_array_of(const Tensor& tensor);

inline std::vector<Array> arrays_of(const std::vector<Tensor>& tensors) {
  std::vector<Array> arrays;
  arrays.reserve(tensors.size());
  for (const Tensor& tensor : tensors) arrays.push_back(array_of(tensor));
  return arrays;
}

// As torch numbers them.
int32_t dtype_of(NumberType type);

// torch.empty past the dispatcher, which has nothing to choose here.
Tensor empty(const int64_t* sizes, int64_t dimensions, int32_t dtype = aoti_torch_dtype_float32(),
             bool swapped = false);
inline Tensor empty(std::initializer_list<int64_t> shape,
                    int32_t dtype = aoti_torch_dtype_float32()) {
  return empty(shape.begin(), static_cast<int64_t>(shape.size()), dtype);
}

// Where the steps of packed rows begin, from how many rows each has: never more than the step
// before, or than the batch. The first step that has, or -1.
int64_t find_offsets(const int64_t* batch_sizes, int64_t timesteps, int64_t batch,
                     std::vector<int64_t>& offsets, int64_t& total);

// Initial states as arrays, which live no longer than the tensors or this.
class StateArrays {
 public:
  StateArrays(const std::optional<Tensor>& h, const std::optional<Tensor>& c) {
    if (h) h_ = strided_array_of(*h);
    if (c) c_ = strided_array_of(*c);
  }
  States given() const { return {h_ ? &*h_ : nullptr, c_ ? &*c_ : nullptr}; }

 private:
  std::optional<Array> h_, c_;
};

// The outputs of a call, as tensors.
class NewTensors {
 public:
  Allocator allocator() { return {allocate, this, allocate_saved}; }
  std::vector<Tensor> take() { return std::move(tensors_); }

 private:
  static void* allocate(void* context, NumberType type, const int64_t* sizes, int64_t dimensions,
                        bool swapped) {
    auto& tensors = static_cast<NewTensors*>(context)->tensors_;
    tensors.push_back(empty(sizes, dimensions, dtype_of(type), swapped));
    return tensors.back().mutable_data_ptr();
  }

  static void* allocate_saved(void* context, const int64_t* sizes) {
    auto& tensors = static_cast<NewTensors*>(context)->tensors_;
    tensors.push_back(empty_saved(sizes[0], sizes[1], sizes[2]));
    return tensors.back().mutable_data_ptr();
  }

  std::vector<Tensor> tensors_;
};

using Memory = std::unique_ptr<float[]>;

inline Memory memory(int64_t count) { return Memory(new float[static_cast<size_t>(count)]); }

}  // namespace fused_rnn
