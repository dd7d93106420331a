// Inference in one call: what the library's operators and the direct calls of Python
// (csrc/direct_calls.cpp) share. Plain, so that the border to Python needs nothing of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace fused_rnn {

// A dense float32 array on the CPU; anything else has no data.
struct Array {
  const float* data;
  int64_t dimensions;
  const int64_t* sizes;

  bool is_plain() const { return data != nullptr; }
  bool is_plain(std::initializer_list<int64_t> shape) const {
    return is_plain() && dimensions == static_cast<int64_t>(shape.size()) &&
           std::equal(shape.begin(), shape.end(), sizes);
  }
};

// Memory for the next output, of that shape, in the order y, h, c. It is the caller's.
struct Allocator {
  float* (*allocate)(void* context, const int64_t* sizes, int64_t dimensions);
  void* context;

  float* operator()(std::initializer_list<int64_t> shape) const {
    return allocate(context, shape.begin(), static_cast<int64_t>(shape.size()));
  }
};

struct States {
  const Array* h;  // null for zeros
  const Array* c;  // beside h where the cell has one, else null
};

// The arguments as torch.nn's modules take them; `weights` as in ForwardCallOf, layer after layer.
struct InferCall {
  int64_t cell;
  Array x;
  const Array* weights;
  int64_t weight_count;
  States states;
};

struct LayersCall : InferCall {
  int64_t layers, directions;
  bool time_first;
};

struct CellCall : InferCall {
  int64_t hidden_size;
};

// A step of a stack whose weights were packed in advance (fused_rnn/streaming.py).
struct StepCall {
  Array packed;
  int64_t cell, layers, input, hidden, output;
  bool bias, half;  // half: the matrices are bfloat16, two in a float
  Array x;          // [B, I]
  States states;    // [L, B, P], [L, B, H]
};

// Each gives y (but for infer_cell), h_n and, where the cell has it, c_n.
// False, and nothing was allocated: the call is out of the ordinary, and not for here.
bool infer_layers(const LayersCall& call, const Allocator& allocate);
bool infer_cell(const CellCall& call, const Allocator& allocate);
// Raises where an argument does not fit.
void step(const StepCall& call, const Allocator& allocate);

// For who has only the loaded library: the same, but false where they raise.
struct DirectCalls {
  bool (*infer_layers)(const LayersCall&, const Allocator&);
  bool (*infer_cell)(const CellCall&, const Allocator&);
  bool (*step)(const StepCall&, const Allocator&);
};

}  // namespace fused_rnn
