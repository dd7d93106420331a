// Scans whose W_hh does not fit on chip: in every step a product, which is torch's, and a kernel
// for the pointwise part. Nothing waits for the device, and nothing is allocated inside the loop,
// so that a CUDA graph may capture it, also one of our own of a few steps.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace fused_rnn {

struct StepScan {
  CellKind cell;
  ElementKind element;
  LaunchShape shape;
  void* stream;
  int32_t device;
  bool records;  // a graph of a few steps, which is launched until all are done
};

// h_n: the tensor of params.h_n.
void forward_by_steps(const StepScan& scan, const ForwardParams& params,
                      const std::vector<torch::stable::Tensor>& w_hh,
                      const torch::stable::Tensor& h_n);

void backward_by_steps(const StepScan& scan, const BackwardParams& params,
                       const std::vector<torch::stable::Tensor>& w_hh);

}  // namespace fused_rnn
