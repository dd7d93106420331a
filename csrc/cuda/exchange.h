// How CTAs of the whole grid pass blocks of words on to each other: through global memory, which
// for them is the L2 cache. docs/cuda-kernels.md says why it is right.
//
// A message is what all CTAs of one batch tile write for one step; they count from 1. Either every
// word has the message's number beside it as a stamp, and readers wait for each word by itself; or
// warps are counted that have written their part, and readers wait for the last of them.
#pragma once

#include "elements.h"
#include "params.h"

namespace fused_rnn {

template <int kMessageBytes, int kArrivals, int kThreads>
class Exchange {
 public:
  static constexpr bool kStamped = is_stamped(kMessageBytes);

  // `given_up` is in shared memory.
  FUSED_RNN_DEVICE_MEMBER Exchange(const ExchangeParams& params, int tile, uint32_t* given_up)
      : given_up_(given_up), stalled_(params.stalled), patience_(params.patience) {
    const int64_t number = block_y() * params.tiles + tile;
    arrivals_ = params.memory + number * exchange_words(kMessageBytes);
  }

  // By all threads, a block_sync before the first message.
  FUSED_RNN_DEVICE_MEMBER void start() const {
    if (thread_index() == 0) *given_up_ = 0;
  }

  // The words `at` and following of a message, by every lane of a warp for itself.
  template <int kCount>
  FUSED_RNN_DEVICE_MEMBER void put(int message, int at, const uint32_t (&words)[kCount]) const {
    if constexpr (kStamped) {
      store_stamped(buffer(message) + 2 * at, words, static_cast<uint32_t>(message));
    } else {
      store_words(buffer(message) + at, words);
    }
  }

  // By the whole warp, once in a message, after all it had to put.
  FUSED_RNN_DEVICE_MEMBER void sent() const {
    if constexpr (!kStamped) {
      warp_sync();
      if (lane_index() == 0) add_word<Order::release>(arrivals_, 1);
    }
  }

  // By all threads, before they fetch.
  FUSED_RNN_DEVICE_MEMBER void await(int message) const {
    if (!kStamped && thread_index() == kThreads - kWarp && *given_up_ == 0) {
      const uint32_t whole = static_cast<uint32_t>(message) * kArrivals;
      const int64_t start = spin_clock();
      // The counter may wrap around; it is never far from what is waited for.
      while (static_cast<int32_t>(load_word<Order::acquire>(arrivals_) - whole) < 0) {
        if (spin_clock() - start > patience_) {
          give_up(message);
          break;
        }
      }
    }
    block_sync();
  }

  // kCount words of the message, from `at` on, to shared memory, by kReaders threads of which this
  // is number `reader`. What does not come in time is NaN, in every dtype, and so is all after it.
  template <int kCount, int kReaders>
  FUSED_RNN_DEVICE_MEMBER void fetch(uint32_t* to, int message, int at, int reader) const {
    constexpr int kWords = kStamped ? 2 : 4;  // in 16 bytes
    constexpr int kPieces = kCount / kWords, kRounds = ceil_div(kPieces, kReaders);
    constexpr int kBatch = kRounds < 8 ? kRounds : 8;  // on their way at a time
    static_assert(kCount % kWords == 0);
    const uint32_t* from = buffer(message) + at * (4 / kWords);
    bool there = *given_up_ == 0;
#pragma unroll 1
    for (int first = 0; first < kRounds; first += kBatch) {
      const auto piece = [&](int i) { return (first + i) * kReaders + reader; };
      Fragment pieces[kBatch];
      FUSED_RNN_UNROLL
      for (int i = 0; i < kBatch; i++) pieces[i] = {kNan, kNan, kNan, kNan};
      if constexpr (kStamped) {
        there = there && await_stamps(pieces, message, [&](int i) {
                  return piece(i) < kPieces ? from + 4 * piece(i) : nullptr;
                });
      } else {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kBatch; i++) {
          if (there && piece(i) < kPieces) pieces[i] = load_words(from + 4 * piece(i));
        }
      }
      FUSED_RNN_UNROLL
      for (int i = 0; i < kBatch; i++) {
        if (piece(i) >= kPieces) continue;
        if constexpr (kStamped) {
          const float2 pair = make_float2(float_of(pieces[i].x), float_of(pieces[i].z));
          reinterpret_cast<float2*>(to)[piece(i)] = pair;
        } else {
          reinterpret_cast<Fragment*>(to)[piece(i)] = pieces[i];
        }
      }
    }
  }

 private:
  static constexpr uint32_t kNan = 0xffffffffu;

  // Two are enough: whoever puts message m + 2 has all of m + 1, whose senders all had read m.
  FUSED_RNN_DEVICE_MEMBER uint32_t* buffer(int message) const {
    return arrivals_ + kArrivalsPitch + (message & 1) * (kMessageBytes / 4 * (kStamped ? 2 : 1));
  }

  FUSED_RNN_DEVICE_MEMBER void give_up(int message) const {
    *given_up_ = 1;
    *stalled_ = static_cast<uint32_t>(message);
  }

  // Two words with their stamps from each place that is not null; whether all came.
  template <int kBatch, class Place>
  FUSED_RNN_DEVICE_MEMBER bool await_stamps(Fragment (&pieces)[kBatch], int message,
                                            const Place& place) const {
    const uint32_t stamp = static_cast<uint32_t>(message);
    const auto is_missing = [&](int i) {
      return place(i) != nullptr && (pieces[i].y != stamp || pieces[i].w != stamp);
    };
    const int64_t start = spin_clock();
    for (;;) {
      bool complete = true;
      FUSED_RNN_UNROLL
      for (int i = 0; i < kBatch; i++) {
        if (is_missing(i)) pieces[i] = load_stamped(place(i));
      }
      FUSED_RNN_UNROLL
      for (int i = 0; i < kBatch; i++) complete = complete && !is_missing(i);
      if (complete) return true;
      if (spin_clock() - start > patience_) break;
    }
    give_up(message);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kBatch; i++) pieces[i] = {kNan, kNan, kNan, kNan};
    return false;
  }

  uint32_t* const given_up_;
  uint32_t* const stalled_;
  const int64_t patience_;
  uint32_t* arrivals_;
};

}  // namespace fused_rnn
