// Which batch rows a kernel has, when they are alive and where they lie in memory.
#pragma once

#include "elements.h"
#include "params.h"

namespace fused_rnn {

// A timestep, and the memory row that the first of a kernel's rows has in it: looked up once, for
// after every store to memory the compiler would have it looked up again.
struct Timestep {
  int64_t t, row0;
};

// Rows are counted from the first of those a kernel has; steps in the order of the scan, which the
// second direction goes from the last timestep to the first.
struct RowsView {
  const ScanRows& all;
  const int first;
  const bool reverse;
  int steps;  // no row takes a timestep at or after it

  FUSED_RNN_DEVICE_MEMBER int length_of(int row) const {
    if (first + row >= all.batch) return 0;
    if (!all.lengths) return static_cast<int>(all.timesteps);
    // Lengths on a device cannot be checked without waiting for it.
    const int64_t length = all.lengths[first + row];
    return static_cast<int>(length < 0 ? 0 : length > all.timesteps ? all.timesteps : length);
  }

  FUSED_RNN_DEVICE_MEMBER int64_t time(int step) const { return reverse ? steps - 1 - step : step; }

  // The number of the memory row of a batch row at time t.
  FUSED_RNN_DEVICE_MEMBER int64_t index(int64_t t, int row) const {
    return (all.offsets ? all.offsets[t] : t * all.batch) + first + row;
  }

  // 0 <= t < T.
  FUSED_RNN_DEVICE_MEMBER Timestep timestep(int64_t t) const { return {t, index(t, 0)}; }

  FUSED_RNN_DEVICE_MEMBER bool exists(int length, int row, int64_t t) const {
    return t < length && first + row < all.batch;
  }

  // Whether the row has memory at time t: packed rows end, padded ones go on with zeros.
  FUSED_RNN_DEVICE_MEMBER bool stored(int length, int row, int64_t t) const {
    return first + row < all.batch && (!all.offsets || t < length);
  }
  FUSED_RNN_DEVICE_MEMBER bool stored(int row, int64_t t) const {
    return first + row < all.batch && (!all.offsets || t < length_of(row));
  }

  // Whether the row's state begins anew before this step. Against time, the step before a reset is
  // the last of a piece, hence the first of it that is taken. Rows without any ask of step -1.
  FUSED_RNN_DEVICE_MEMBER bool begins(int length, int row, int step) const {
    if (!all.resets || step < 0 || step >= steps) return false;
    const int64_t t = time(step) + (reverse ? 1 : 0);
    return t < length && all.resets[t * all.batch + first + row] != 0;
  }
};

// A tile of kBlocks * 8 batch rows, with the steps of the longest of them.
template <int kBlocks>
struct TileRows : RowsView {
  FUSED_RNN_DEVICE_MEMBER TileRows(const ScanRows& scan_rows, int first_row, bool in_reverse)
      : RowsView{scan_rows, first_row, in_reverse, 0} {
    for (int row = 0; row < kGroup * kBlocks; row++) {
      const int length = length_of(row);
      steps = length > steps ? length : steps;
    }
  }
};

// The rows of a lane's words at one time: whether they have memory then.
template <class Element, int kBlocks>
struct WordRows {
  int64_t row0;  // as in Timestep
  bool stored[kBlocks][Element::kWords];

  FUSED_RNN_DEVICE_MEMBER WordRows(const TileRows<kBlocks>& rows, int64_t t)
      : row0(rows.timestep(t).row0) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < kBlocks; n++) {
      FUSED_RNN_UNROLL
      for (int w = 0; w < Element::kWords; w++) {
        stored[n][w] = rows.stored(n * kGroup + Element::row(w), t);
      }
    }
  }
};

// Lengths of the rows a lane deals with, in lane order.
template <class Element, int kBlocks>
struct LaneRows {
  int length[kBlocks][2];

  FUSED_RNN_DEVICE_MEMBER explicit LaneRows(const TileRows<kBlocks>& rows) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < kBlocks; n++) {
      FUSED_RNN_UNROLL
      for (int e = 0; e < 2; e++) length[n][e] = rows.length_of(row(n, e));
    }
  }

  FUSED_RNN_DEVICE_MEMBER static int row(int n, int e) {
    return n * kGroup + 2 * (lane_index() & 3) + e;
  }
};

}  // namespace fused_rnn
