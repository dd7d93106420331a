#pragma once

// What CUDA answers, and whether FUSED_RNN_LOG=1 wants to hear of every launch.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if !defined(FUSED_RNN_EMULATED)
#include <cuda_runtime.h>
#endif

namespace fused_rnn {

#if !defined(FUSED_RNN_EMULATED)

inline void check_cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or whoever asks next for the last error is told of this one
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Lets this thread make any call while some other stream is captured, such as of memory, which
// otherwise ends that capture.
class AnyCalls {
 public:
  AnyCalls() { check_cuda(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  AnyCalls(const AnyCalls&) = delete;
  ~AnyCalls() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

#endif

// Whether what is given to the stream becomes part of a graph and does not run.
inline bool is_captured([[maybe_unused]] void* stream) {
#if defined(FUSED_RNN_EMULATED)
  return false;
#else
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capture));
  return capture != cudaStreamCaptureStatusNone;
#endif
}

// A fault on the device comes to light at some later call, of whoever. With FUSED_RNN_LOG=1 every
// launch says on stderr what it is, and the host waits for what came before it and for itself.
inline bool is_logging() {
  const char* value = std::getenv("FUSED_RNN_LOG");
  return value != nullptr && *value != '\0' && std::string(value) != "0";
}

}  // namespace fused_rnn
