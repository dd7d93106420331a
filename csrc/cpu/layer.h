// A whole layer call, forward or backward: plans it, packs the weights, shares out the work.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"

namespace fused_rnn {

// The threads a call may use.
struct Threads {
  int64_t count;
  // Calls the body on ranges that together are [0, items), at the same time where threads are
  // there, each range at least `grain` items but for the last.
  void (*run)(int64_t items, int64_t grain, const std::function<void(int64_t, int64_t)>& body);
};

void layer_forward(const Kernels& isa, const ForwardCall& call, const Threads& threads);
void layer_backward(const Kernels& isa, const BackwardCall& call, const Threads& threads);

}  // namespace fused_rnn
