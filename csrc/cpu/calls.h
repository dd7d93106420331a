// From the arguments of torch.nn's modules to calls of layers (infer.cpp, train.cpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "direct.h"
#include "kernels.h"
#include "weights.h"

namespace fused_rnn {

// Of the first layer, padded, from arguments that other checks will confirm.
LayerShape stack_shape(const InferCall& call, int64_t directions, int64_t timesteps, int64_t batch);

// How many weights each layer has, or 0 where these cannot be a stack.
int64_t weights_per_layer(const LayerShape& first, int64_t layers, const InferCall& call);

// A call per layer with its shape and weights, which `read`(array) gives; or none where these do
// not fit.
template <class E, class Read>
std::vector<ForwardCallOf<E>> read_stack(const LayerShape& first, int64_t layers,
                                         const InferCall& call, const Read& read) {
  const int64_t per_layer = weights_per_layer(first, layers, call);
  if (per_layer == 0) return {};
  std::vector<ForwardCallOf<E>> calls(static_cast<size_t>(layers));
  bool fit = true;
  const Array* arrays = call.weights;
  for (ForwardCallOf<E>& layer : calls) {
    layer.shape = first;
    if (&layer != calls.data()) layer.shape.input = first.directions * first.output;
    for_each_weight(layer.shape, static_cast<size_t>(per_layer), "weights",
                    [&](size_t i, size_t d, size_t which, std::initializer_list<int64_t> shape) {
                      fit = fit && arrays[i].is_dense() && arrays[i].has_shape(shape);
                      const void* numbers = fit ? read(arrays[i]) : nullptr;
                      fit = numbers != nullptr;
                      if (fit) set_field(layer.weights[d], which, numbers);
                    });
    arrays += per_layer;
  }
  if (!fit) calls.clear();
  return calls;
}

// Of float32.
std::vector<ForwardCallOf<float>> stack_calls(const LayerShape& first, int64_t layers,
                                              const InferCall& call);

// What a stack or a cell is to return; y has no shape where it is not wanted.
struct OutputShapes {
  std::initializer_list<int64_t> y, h, c;
};

// Inference in a half type, `call.type`, of states that have the shapes of h and c. With `swapped`,
// x and y have the batch first. False, and nothing was allocated: not for here.
bool infer_half(const LayerShape& first, int64_t layers, const InferCall& call, bool swapped,
                const OutputShapes& shapes, const Allocator& allocate);

}  // namespace fused_rnn
