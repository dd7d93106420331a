// How CTAs of the whole grid pass blocks of words on to each other: through global memory, which for
// them is the L2 cache. docs/cuda-kernels.md says why it is right.
//
// A message is what all CTAs of one batch tile write for one step; they count from 1. It is whole
// when kArrivals warps have arrived, each after its own part of it.
#pragma once

#include "elements.h"
#include "params.h"

namespace fused_rnn {

template <int kWords, int kArrivals, int kThreads>
class Exchange {
 public:
  // `given_up` is in shared memory.
  FUSED_RNN_DEVICE_MEMBER Exchange(const ExchangeParams& params, int tile, uint32_t* given_up)
      : given_up_(given_up), stalled_(params.stalled), patience_(params.patience) {
    const int64_t number = block_y() * params.tiles + tile;
    blocks_ = params.blocks + number * 2 * kWords;
    arrivals_ = params.arrivals + number * kArrivalsPitch;
  }

  // By all threads, a block_sync before the first wait.
  FUSED_RNN_DEVICE_MEMBER void start() const {
    if (thread_index() == 0) *given_up_ = 0;
  }

  // Two are enough: whoever writes message m + 2 has received m + 1, all of whose senders had read m.
  FUSED_RNN_DEVICE_MEMBER uint32_t* words(int message) const {
    return blocks_ + (message & 1) * kWords;
  }

  // By a whole warp, after its stores to the message.
  FUSED_RNN_DEVICE_MEMBER void arrive() const {
    warp_sync();
    if (lane_index() == 0) add_word<Order::release>(arrivals_, 1);
  }

  // By all threads. Whether the message is there; once one did not come in time, no other is waited
  // for.
  FUSED_RNN_DEVICE_MEMBER bool wait(int message) const {
    if (thread_index() == kThreads - kWarp && *given_up_ == 0) {
      const uint32_t whole = static_cast<uint32_t>(message) * kArrivals;
      const int64_t start = spin_clock();
      // The counter may wrap around; it is never far from what is waited for.
      while (static_cast<int32_t>(load_word<Order::acquire>(arrivals_) - whole) < 0) {
        if (spin_clock() - start < patience_) continue;
        *given_up_ = 1;
        *stalled_ = static_cast<uint32_t>(message);
        break;
      }
    }
    block_sync();
    return *given_up_ == 0;
  }

 private:
  uint32_t* const given_up_;
  uint32_t* const stalled_;
  const int64_t patience_;
  uint32_t *blocks_, *arrivals_;
};

// kChunks of 16 bytes of a message to shared memory, by kReaders threads of which this is number
// `reader`; NaNs, in every dtype, where the message is not there.
template <int kChunks, int kReaders>
FUSED_RNN_DEVICE void fetch(uint32_t* to, const uint32_t* from, int reader, bool there) {
  constexpr int kRounds = ceil_div(kChunks, kReaders);
  constexpr int kBatch = kRounds < 8 ? kRounds : 8;  // on their way at a time
  constexpr uint32_t kNan = 0xffffffffu;
#pragma unroll 1
  for (int first = 0; first < kRounds; first += kBatch) {
    Fragment chunks[kBatch];
    FUSED_RNN_UNROLL
    for (int i = 0; i < kBatch; i++) {
      const int at = (first + i) * kReaders + reader;
      chunks[i] = Fragment{kNan, kNan, kNan, kNan};
      if (there && at < kChunks) chunks[i] = load_words(from + 4 * at);
    }
    FUSED_RNN_UNROLL
    for (int i = 0; i < kBatch; i++) {
      const int at = (first + i) * kReaders + reader;
      if (at < kChunks) *reinterpret_cast<Fragment*>(to + 4 * at) = chunks[i];
    }
  }
}

}  // namespace fused_rnn
