// What a scan kernel receives: plain structs filled once at the operator's border.
//
// D directions, T timesteps, B batch, N rows, H hidden_size, G gates of the cell,
// S gates it saves for backward, Q gradients it returns per unit. All arrays are dense, row-major.
#pragma once

#include <cstdint>

namespace fused_rnn {

// In the order of `index` in fused_rnn/cells.py.
enum class CellKind { rnn_tanh, rnn_relu, gru, lstm };

// Step t owns rows [offset(t), offset(t) + batch_size(t)); the batch never grows with t.
struct RowLayout {
  int64_t timesteps;
  int64_t batch;               // B
  const int64_t* batch_sizes;  // [T] when packed, null when every step has B rows
  const int64_t* offsets;      // [T] when packed, null when step t starts at row t*B
};

// Weights in the kernels' own layout, one matrix per direction: see pack_panel in scan-inl.h.
struct PackParams {
  int64_t hidden;
  const float* weights;  // [G*H, H] W_hh
  float* packed;         // packed_size() floats
};

struct ScanForwardParams {
  int64_t directions;
  int64_t hidden;
  int64_t count;  // N
  RowLayout rows;
  const float* packed_weights[2];  // per direction
  const float* hidden_bias[2];     // [H] GRU's b_hn per direction, or null
  const float* gx;                 // [D, N, G*H] input-side pre-activations with their biases
  const float* h0;                 // [D, B, H]
  const float* c0;                 // [D, B, H], LSTM only
  float* y;                        // [N, D*H]
  float* h_n;                      // [D, B, H]
  float* c_n;                      // [D, B, H], LSTM only
  float* gates;                    // [D, N, S*H] or null: not saved. LSTM: may be gx itself
  float* cells;                    // [D, N, H] or null: not saved
};

struct ScanBackwardParams {
  int64_t directions;
  int64_t hidden;
  int64_t count;  // N
  RowLayout rows;
  const float* packed_weights[2];  // per direction
  const float* grad_y;             // [N, D*H] or null: zero
  const float* grad_h_n;           // [D, B, H] or null: zero
  const float* grad_c_n;           // [D, B, H] or null: zero
  const float* h0;                 // [D, B, H]
  const float* c0;                 // [D, B, H], LSTM only
  const float* y;                  // [N, D*H]
  const float* gates;              // [D, N, S*H]
  const float* cells;              // [D, N, H], LSTM only
  float* grad_gates;               // [D, N, Q*H]
  float* grad_h0;                  // [D, B, H]
  float* grad_c0;                  // [D, B, H], LSTM only
};

// The batch rows first, first + stride, ... below limit: one thread's share of a direction.
struct RowShare {
  int64_t direction;
  int64_t first;
  int64_t stride;
  int64_t limit;
};

}  // namespace fused_rnn
