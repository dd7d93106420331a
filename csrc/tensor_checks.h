// What the operators' borders share: an argument is a dense tensor of just this device, dtype and
// shape, or an error that names it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "layer_params.h"
#include "torch_compat.h"

namespace fused_rnn {

inline CellKind cell_kind(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index < kCellKinds, "cell: expected 0 to ", kCellKinds - 1,
                  ", got ", index);
  return static_cast<CellKind>(index);
}

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Whether a contiguous tensor has memory for all its elements: a storage can be made smaller under
// it, as FSDP does with weights that are not in use.
inline bool has_memory(const torch::stable::Tensor& tensor) {
  int64_t bytes = 0, offset = 0;
  FUSED_RNN_TORCH_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  FUSED_RNN_TORCH_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  const int64_t count = tensor.numel();
  const auto element = static_cast<int64_t>(tensor.element_size());
  return count == 0 || offset + count <= bytes / element;
}

inline void check_dense(const torch::stable::Tensor& tensor, const char* name,
                        torch::headeronly::ScalarType type, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected dtype ",
                  torch::headeronly::toString(type), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(
      sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name,
      ": expected shape ", shape_text(shape), ", got ", shape_text(sizes));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                  shape_text(tensor.strides()));
  STD_TORCH_CHECK(has_memory(tensor), name, ": expected memory for shape ", shape_text(sizes),
                  ", got a storage that was made smaller");
}

}  // namespace fused_rnn
