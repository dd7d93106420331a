// Launches of scans over the whole grid. All CTAs of one fit on the device at once, or it fails;
// one that runs has its device to itself as far as others of its kind are concerned, since two that
// share the SMs would each wait for CTAs that never begin. The host waits for nothing.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../plan.h"
#include "check_cuda.h"
#include "kernels.h"

namespace fused_rnn {

#if defined(FUSED_RNN_EMULATED)

// Idle rounds of the emulator.
inline constexpr int64_t kPatience = 64;

class GridTurn {
 public:
  GridTurn(int64_t, void*) {}
  uint32_t* stalled() const { return &stalled_; }

 private:
  static inline uint32_t stalled_ = 0;
};

#else

// Clocks of an SM: some ten seconds, where a message takes microseconds. The first is waited for
// longer, see exchange.h.
inline constexpr int64_t kPatience = int64_t{1} << 34;

// The turn of one scan on a device. It begins on its stream when the one before has ended on its
// own. In a graph's capture nothing is known of other streams: see docs/cuda-kernels.md.
class GridTurn {
 public:
  GridTurn(int64_t device, void* stream)
      : of_device_(of(device)),
        lock_(of_device_.mutex),
        stream_(static_cast<cudaStream_t>(stream)),
        captures_(is_captured(stream)) {
    if (of_device_.ended == nullptr) {  // the last that is made
      const AnyCalls allowed;
      void* memory = of_device_.stalled;
      if (memory == nullptr) {
        check_cuda(
            cudaHostAlloc(&memory, sizeof(uint32_t), cudaHostAllocMapped | cudaHostAllocPortable));
        of_device_.stalled = static_cast<uint32_t*>(memory);
        *of_device_.stalled = 0;
      }
      cudaEvent_t ended = nullptr;
      check_cuda(cudaEventCreateWithFlags(&ended, cudaEventDisableTiming));
      of_device_.ended = ended;
    }
    if (!captures_) check_cuda(cudaStreamWaitEvent(stream_, of_device_.ended, 0));
  }
  GridTurn(const GridTurn&) = delete;
  ~GridTurn() {
    if (!captures_) cudaEventRecord(of_device_.ended, stream_);
  }

  // Host memory that the device writes to.
  uint32_t* stalled() const { return of_device_.stalled; }

 private:
  struct OfDevice {
    std::mutex mutex;
    cudaEvent_t ended = nullptr;
    uint32_t* stalled = nullptr;
  };

  // A function's, since OfDevice is not complete where a static member would be.
  static OfDevice& of(int64_t device) {
    static std::array<OfDevice, 64> all;
    return all.at(static_cast<size_t>(device));
  }

  OfDevice& of_device_;
  const std::lock_guard<std::mutex> lock_;
  cudaStream_t stream_;
  const bool captures_;
};

#endif

// What a scan on this device reported, perhaps one that was launched long ago.
inline void check_stall(const GridTurn& turn) {
  volatile uint32_t* stalled = turn.stalled();
  const uint32_t message = *stalled;
  if (message == 0) return;
  *stalled = 0;
  throw std::runtime_error("a scan across the grid gave up waiting for message " +
                           std::to_string(message) +
                           " of its CTAs; its outputs are NaN from there on");
}

template <class Params, class Tile>
void launch_over_grid(const Kernel<Params>& kernel, const Plan<Tile>& plan, Params params,
                      const torch::stable::Tensor& like, int64_t device, void* stream) {
  const auto integers = torch::headeronly::ScalarType::Int;
  const int64_t at_once = plan.shape.ctas / plan.tile.cluster;
  const int64_t sharing = at_once * plan.shape.directions;
  const int64_t launches =
      (plan.batch_tiles + at_once - 1) / at_once * (params.directions / plan.shape.directions);
  // Freed while the scan runs: the memory is given to none but later work of the same stream.
  const auto memory =
      torch::stable::new_zeros(like, {launches * sharing * plan.exchange_words}, integers);
  uint32_t* next = static_cast<uint32_t*>(memory.mutable_data_ptr());

  const GridTurn turn(device, stream);
  check_stall(turn);
  for (int direction = 0; direction < params.directions; direction += plan.shape.directions) {
    for (int64_t tile = 0; tile < plan.batch_tiles; tile += at_once) {
      const int tiles = static_cast<int>(std::min(at_once, plan.batch_tiles - tile));
      LaunchShape shape = plan.shape;
      shape.ctas = tiles * plan.tile.cluster;
      params.exchange = {next, turn.stalled(), kPatience, tiles, static_cast<int>(tile), direction};
      kernel.launch(params, shape, stream);
      next += sharing * plan.exchange_words;
    }
  }
  check_stall(turn);
}

}  // namespace fused_rnn
