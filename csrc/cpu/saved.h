// Memory for what a call saves for its backward.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fused_rnn {

// [directions, count, width], float32, not initialised. For tensors that nobody but a backward call
// sees: malloc maps a block of 32 MiB or more anew for every tensor, and the system has to clear
// it. So such blocks come back here when their tensor goes, and wait for the next step: up to 256
// MiB of them, with the system's leave to take their pages when it is short of memory.
torch::stable::Tensor empty_saved(int64_t directions, int64_t count, int64_t width);

}  // namespace fused_rnn
