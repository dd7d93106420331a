// Several layers at a time. Time is cut into chunks; a layer's chunk starts as soon as its own one
// before it and the same one of the layer that it reads from are there. Scans run on a stream for
// each layer, products between layers on the caller's, where torch has its memory from.
//
// A chunk is the scan of a part of the sequence: what the kernels read and write lies in the same
// memory, in the same places, as where layers run one after another.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "../plan.h"
#include "kernels.h"

namespace fused_rnn {

// L padded layers of one direction and one shape. Rows are N = T*B, E is their dtype.
struct StackScan {
  CellKind cell;
  int element_bytes;
  int64_t chunk;  // timesteps
  int64_t stream;
  std::vector<int64_t> layer_streams;
  // Between layers: [L - 1] of bool [N, H], what of a layer's output dropout leaves, and what that
  // is multiplied by; or none.
  std::vector<torch::stable::Tensor> kept;
  double scale;
};

struct ForwardStack {
  std::vector<ForwardParams> layers;          // each of the whole sequence
  std::vector<torch::stable::Tensor> inputs;  // E [N, I], of the first layer; [N, H]
  std::vector<torch::stable::Tensor> w_ih;    // E [G*H, I or H]
  std::vector<torch::stable::Tensor> biases;  // E [G*H] of gx, or none
  std::vector<torch::stable::Tensor> gx;      // E [N, G*H]
};

struct BackwardStack {
  std::vector<BackwardParams> layers;
  std::vector<torch::stable::Tensor> w_ih;
  std::vector<torch::stable::Tensor> grad_gates;  // E [N, Q*H]
  std::vector<torch::stable::Tensor> grad_ys;     // [L - 1] of E [N, H], of all layers but the last
};

void run_forward(const StackScan& scan, const ForwardStack& stack,
                 const Kernel<ForwardParams>& kernel, const LaunchShape& shape);
void run_backward(const StackScan& scan, const BackwardStack& stack,
                  const Kernel<BackwardParams>& kernel, const LaunchShape& shape);

}  // namespace fused_rnn
