// The door for callers that have the loaded library and no torch (csrc/python).
#include "direct.h"

#include <type_traits>

namespace fused_rnn {
namespace {

// The operator, which is tried next, raises again and says why.
template <auto function, class Call>
bool quietly(const Call& call, const Allocator& allocate) {
  try {
    if constexpr (std::is_void_v<decltype(function(call, allocate))>) {
      function(call, allocate);
      return true;
    } else {
      return function(call, allocate);
    }
  } catch (...) {
    return false;
  }
}

constexpr DirectCalls kCalls = {quietly<infer_layers, LayersCall>, quietly<infer_cell, CellCall>,
                                quietly<step, StepCall>, quietly<train_layer, TrainCall>,
                                quietly<train_layer_backward, TrainBackwardCall>};

}  // namespace
}  // namespace fused_rnn

extern "C" __attribute__((visibility("default"))) const fused_rnn::DirectCalls*
fused_rnn_direct_calls() {
  return &fused_rnn::kCalls;
}
