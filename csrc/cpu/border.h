// What the operators share at their border to torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <memory>

#include "../tensor_checks.h"
#include "layer.h"

namespace fused_rnn {

using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

// Of the instruction set that FUSED_RNN_CPU_CAPABILITY names, or the best this CPU has.
const KernelsOf<float>& kernels();

Threads torch_threads();

// Whether a tensor is a dense float32 one on the CPU.
bool is_plain(const Tensor& tensor);
bool is_plain(const Tensor& tensor, Shape shape);

// torch.empty past the dispatcher, which has nothing to choose here.
Tensor empty(Shape shape);

using Memory = std::unique_ptr<float[]>;

inline Memory memory(int64_t count) { return Memory(new float[static_cast<size_t>(count)]); }

}  // namespace fused_rnn
