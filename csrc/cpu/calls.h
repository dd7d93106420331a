// From the arguments of torch.nn's modules to calls of layers (infer.cpp, train.cpp).
#pragma once

#include <cstdint>
#include <vector>

#include "direct.h"
#include "kernels.h"

namespace fused_rnn {

// Of the first layer, padded, from arguments that other checks will confirm.
LayerShape stack_shape(const InferCall& call, int64_t directions, int64_t timesteps, int64_t batch);

// A call per layer with its shape and weights, or none where these do not fit.
std::vector<ForwardCallOf<float>> stack_calls(const LayerShape& first, int64_t layers,
                                              const InferCall& call);

}  // namespace fused_rnn
