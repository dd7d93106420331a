// How a layer call is divided: over how many threads, by rows or by units.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "layer.h"

namespace fused_rnn {

// Below so many floating-point operations of a forward pass there is no parallel region. Where one
// is enough for all, that is a few microseconds of one thread, what waking another costs.
constexpr double kSerialFlops = 4e5;
// A pass that packs weights has a region for them and one for the scan, backward three more for its
// products, of some 4 us each. With a region for each matrix and each product, time of one thread
// over that of two, of small RNN, GRU and LSTM with T = 1 to 100 and B = 1 to 64: forward 0.45 to
// 0.8 at 1e6, 0.7 to 1.1 at 3e6, 1.1 to 1.4 at 8e6; backward 0.55 to 0.75 at 1e6, 0.7 to 1.0 at
// 5e6, 1.0 to 1.2 at 8e6. But in training without a pause, where threads still spin, LSTM and GRU
// with backward passes of 2.6e6 to 3.9e6 on one thread took 1.07 to 1.16 times as long.
constexpr double kForwardSerialFlops = 3e6;
constexpr double kBackwardSerialFlops = 2e6;
// Units are split over threads that meet after every step only where a step gives each of them so
// many floating-point operations: the meeting costs about a tenth of a microsecond.
constexpr double kFlopsPerMeeting = 2e4;
// Threads share out batch rows where each gets so many, else hidden units. Fewer rows do not fill
// the register tile, and every thread would stream all weights for them.
constexpr int64_t kRowsPerThread = 8;
// Or up to so many, where W_hh is of so many bytes that it comes from L3 in every step: split, each
// thread reads a part of it. Two threads, time of rows over that of units: with AMX at B = 20 to 48
// and H = 400 to 1150 LSTM 1.1 to 1.4 in inference and 1.0 to 1.15 in training, GRU 1.1 to 1.25 and
// 1.0 to 1.1; at B = 64 and 96, H = 512 to 1024 1.05 to 1.2 in inference, 0.95 to 1.0 in backward
// passes, and with AVX-512 and AVX2 1.02 to 1.08 and about 1; with AMX at B = 128 and 256 0.9
// to 1.0, and in bfloat16 0.95 from B=64 on. Below these bytes 0.85 to 1.05.
template <class E>
constexpr int64_t kForwardRowsOfL3 = std::is_same_v<E, float> ? 64 : 32;
constexpr int64_t kBackwardRowsOfL3 = 32;
constexpr int64_t kBytesOfL3 = 7 << 18;

// Two directions with fewer rows than these are one after the other, units split over all threads,
// where side by side a thread's part of W_hh would come from L3: together they would fill the
// caches with both. Two threads, time side by side over that in turn at B = 1 and 16: LSTM at
// H=1024, whose two are as large as the L3 cache, 1.4 to 1.5 and 1.03 to 1.07, GRU 1.1 to 1.25 and
// 1.02 to 1.05; from there down to these bytes 0.98 to 1.05; at B=32 0.98 to 1.03.
constexpr int64_t kRowsInTurn = 24;

// Elements of W_hh.
inline int64_t recurrent_weights(const LayerShape& s) {
  return cell_sizes(s.cell).gates * s.hidden * s.output;
}

// Whether a step has a second product, that takes what the first one gave: W_hr's where h is
// projected, W_hn's in a GRU that resets before it.
inline bool has_second_product(const LayerShape& s) { return projected(s) || reset_before(s); }

// As many as a step has on average: packed ones have fewer and fewer.
inline int64_t rows_of_step(const LayerShape& s) {
  return s.rows.timesteps > 0 ? s.count / s.rows.timesteps : 0;
}

// Of one step: W_hh's and W_hr's.
inline double recurrent_flops_per_row(const LayerShape& s) {
  const int64_t gates = cell_sizes(s.cell).gates + (projected(s) ? 1 : 0);
  return 2.0 * static_cast<double>(gates * s.hidden) * static_cast<double>(s.output);
}

inline double forward_flops(const LayerShape& s) {
  return static_cast<double>(s.directions * s.count) *
         (recurrent_flops_per_row(s) +
          2.0 * static_cast<double>(cell_sizes(s.cell).gates * s.hidden * s.input));
}

struct LayerPlan {
  bool parallel;
  bool in_turn;     // one direction after the other, each over all threads; else side by side
  bool units;       // over hidden units, else over batch rows
  int64_t members;  // threads per direction

  // With no more than `serial_flops` one thread does all.
  LayerPlan(const LayerShape& s, int64_t element_bytes, int64_t rows_of_l3, double serial_flops,
            const Threads& threads) {
    const int64_t count = forward_flops(s) > serial_flops ? threads.count : 1;
    parallel = count > 1;
    const int64_t bytes = recurrent_weights(s) * element_bytes;
    const int64_t beside = std::max<int64_t>(1, count / s.directions);
    in_turn = parallel && s.directions > 1 && bytes / beside >= kBytesOfL3 &&
              rows_of_step(s) < kRowsInTurn && !s.normed;
    members = in_turn ? count : beside;
    const int64_t rows = bytes < kBytesOfL3 ? kRowsPerThread : rows_of_l3;
    units = members > 1 && rows_of_step(s) < rows * members;
    if (!units) return;
    const double step = static_cast<double>(s.rows.batch) * recurrent_flops_per_row(s);
    const double meetings = has_second_product(s) ? 2.0 : 1.0;
    const auto worth = static_cast<int64_t>(step / (meetings * kFlopsPerMeeting));
    if (s.normed || worth < 2) {
      // Rows need no meeting, however few they are; and statistics are of whole rows.
      units = false;
      members = std::min(members, std::max<int64_t>(1, s.rows.batch));
    } else {
      members = std::min(members, worth);
    }
  }
};

}  // namespace fused_rnn
