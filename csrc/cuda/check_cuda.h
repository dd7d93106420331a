#pragma once

#if !defined(FUSED_RNN_EMULATED)

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fused_rnn {

inline void check_cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or whoever asks next for the last error is told of this one
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

}  // namespace fused_rnn

#endif
