// What the CUDA kernels know of a scan, filled once at the operators' border.
//
// Letters as in ../layer_params.h. E is the elements' dtype. Rows of matrices are `pitch` wide, a
// multiple of 8 at or above H, of which units from H on are padding: their gates, gradients and
// states are zero. Arrays are dense, row-major.
#pragma once

#include <cstdint>

namespace fused_rnn {

// Which rows there are, and which of them are alive.
struct ScanRows {
  int64_t timesteps;       // T
  int64_t batch;           // B
  int64_t count;           // N
  const int64_t* lengths;  // [B]: step t of row b is taken where t < lengths[b]; null: t < T
  const int64_t* offsets;  // [T] when packed: the row of step t's first; null: t * B
  const uint8_t* resets;   // [T, B], where a row's state begins anew; null: nowhere
};

// What the CTAs of a scan over the whole grid share (exchange.h), and which part of the problem a
// launch has: as many tiles of the batch as are resident at once. All zeros for clusters.
struct ExchangeParams {
  uint32_t* memory;   // [directions of the launch, tiles, exchange_words], zeros before the launch
  uint32_t* stalled;  // the message that a CTA gave up waiting for
  int64_t patience;   // how long a CTA waits for a message, in ticks of spin_clock
  int tiles;          // of the launch
  int first_tile, first_direction;
};

struct ForwardParams {
  ScanRows rows;
  ExchangeParams exchange;
  int hidden, pitch, directions;
  const void* gx;        // E [D, N, G*pitch]; `gates` may be the same memory
  const void* w_hh[2];   // E [G*pitch, pitch] of each direction
  const float* b_hn;     // [D, pitch], GRU's b_hn, or null
  const void* h0;        // E [D, B, pitch]
  const float* c0;       // [D, B, pitch], LSTM; GRU in 16 bits: h0 before it was rounded, or null
  const void* reset_h;   // E [D, B, pitch], the state after a reset; null: zeros
  const float* reset_c;  // [D, B, pitch]
  void* y;               // E [N, D*pitch]
  void* h_n;             // E [D, B, pitch]
  float* c_n;            // [D, B, pitch], LSTM; GRU in 16 bits: h_n before it is rounded, or null
  void* gates;           // E [D, N, S*pitch], or null where nothing is saved
  float* cells;          // [D, N, pitch] c after each step, LSTM, or null
};

struct BackwardParams {
  ScanRows rows;
  ExchangeParams exchange;
  int hidden, pitch, directions;
  const void* w_hh[2];
  const void* h0;
  const float* c0;
  const void* reset_h;
  const float* reset_c;
  const void* y;  // as forward wrote them
  const void* gates;
  const float* cells;
  const void* grad_y;       // E [N, D*pitch], or null
  const float* grad_h_n;    // [D, B, pitch], or null
  const float* grad_c_n;    // [D, B, pitch], or null
  const float* grad_cells;  // [D, N, pitch], where c after each step is an output, or null
  void* grad_gates;         // E [D, N, Q*pitch]
  float* grad_h0;           // [D, B, pitch]
  float* grad_c0;           // [D, B, pitch], LSTM
  float* grad_reset_h;      // [D, B, pitch], zeros on entry, or null
  float* grad_reset_c;
};

// Which timestep a launch is of, in the order of the scan: `value`, or, of a launch in a graph that
// is launched many times, what is at `now` by then. Where `next` is not null the kernel writes the
// step after it there, which is another word than `now`: some threads of the kernel have yet to
// read that.
struct StepNumber {
  int64_t value;
  const int64_t* now;
  int64_t* next;
};

// One timestep of a scan whose product is a kernel of its own; -1 comes before the first of them.
// h_n is the operand of the product that follows, c_n the state. Of a cell with two products in a
// step, the second's operand and result are the `inner` ones.
struct ForwardStep {
  ForwardParams scan;
  StepNumber number;
  const float* products;  // [D, B, (G, or what the first product makes)*pitch]
  float* h;               // [D, B, pitch], where the cell uses the h before it: that, not rounded
  void* inner_operand;    // E [D, B, pitch]
  const float* inner;     // [D, B, pitch]
};

// The same backward, down to -1, which comes after step 0. grad_h0 and grad_c0 are the gradients on
// their way.
struct BackwardStep {
  BackwardParams scan;
  StepNumber number;
  const float* products;  // [D, B, pitch] of the step before this one, which is the later one
  void* operand;          // E [D, B, (G, or what faces that product)*pitch] in torch's order
  void* inner_operand;    // E [D, B, pitch]
  const float* inner;     // [D, B, pitch]
};

}  // namespace fused_rnn
