// torch's operators by name, for what its stable headers have no function.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstddef>

#include "../torch_compat.h"

namespace fused_rnn {

// One whose last argument is its output.
template <size_t count>
void call_torch(const char* name, const char* overload, std::array<StableIValue, count> stack) {
  FUSED_RNN_TORCH_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  // Takes what is returned, and drops it.
  torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace fused_rnn
