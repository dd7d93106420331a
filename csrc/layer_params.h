// What every kernel knows of a layer call: plain structs, filled once at the operator's border.
//
// D directions, T timesteps, B batch, N rows, I input_size, H hidden_size, P width of h (below H in
// a projected LSTM, else H), G gates of the cell, S gates it saves for backward, Q gradients it
// returns per unit. Arrays are dense, row-major.
#pragma once

#include <cstdint>

namespace fused_rnn {

// In the order of `index` in fused_rnn/cells.py.
enum class CellKind { rnn_tanh, rnn_relu, gru, lstm, gru_reset_before };
inline constexpr int64_t kCellKinds = 5;

// Step t owns rows [offset(t), offset(t) + batch_size(t)); the batch never grows with t.
struct RowLayout {
  int64_t timesteps;
  int64_t batch;               // B
  const int64_t* batch_sizes;  // [T] when packed, null when every step has B rows
  const int64_t* offsets;      // [T] when packed, null when step t starts at row t*B
};

struct LayerShape {
  CellKind cell;
  int64_t directions;  // D
  int64_t input;       // I
  int64_t hidden;      // H
  int64_t output;      // P
  int64_t count;       // N
  RowLayout rows;
  bool normed;  // whether what the gates add up is normalised
};

static constexpr bool projected(const LayerShape& s) { return s.output != s.hidden; }

static constexpr bool reset_before(const LayerShape& s) {
  return s.cell == CellKind::gru_reset_before;
}

// The facts of cells.h that sizes depend on.
struct CellSizes {
  int64_t gates, saved_gates, grad_gates;
  bool has_c;
};

static constexpr CellSizes cell_sizes(CellKind cell) {
  switch (cell) {
    case CellKind::gru:
      return {3, 4, 4, false};
    case CellKind::lstm:
      return {4, 4, 4, true};
    case CellKind::gru_reset_before:
      return {3, 3, 3, false};
    default:
      return {1, 0, 1, false};
  }
}

}  // namespace fused_rnn
