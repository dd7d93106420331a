// A whole layer call, forward or backward: plans it, packs the weights, shares out the work.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"

namespace fused_rnn {

using Body = std::function<void(int64_t begin, int64_t end)>;

// The threads a call may use.
struct Threads {
  int64_t count;
  // Calls the body on ranges that together are [0, items), at the same time where threads are
  // there, each range at least `grain` items but for the last.
  void (*run)(int64_t items, int64_t grain, const Body& body);
};

// E is float or BFloat16.
template <class E>
void layer_forward(const KernelsOf<E>& isa, const ForwardCallOf<E>& call, const Threads& threads);
template <class E>
void layer_backward(const KernelsOf<E>& isa, const BackwardCallOf<E>& call, const Threads& threads);

}  // namespace fused_rnn
