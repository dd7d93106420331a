// What the kernels of one instruction set receive, and the table of functions that each offers.
#pragma once

#include <cstdint>

#include "../layer_params.h"
#include "team.h"

namespace fused_rnn {

// A bfloat16, the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

// Elements, of type E, are what matrix products take, and what is saved of them: float or BFloat16.
// All sums, the states' gradients and c are float.

// What a step leaves of a state as it was: all of it where it is `kept`, or without that a `part`
// of every element.
struct Zoneout {
  const uint8_t* kept;  // [D, N, P] of h, [D, N, H] of c, 0 or 1, or null
  float part;

  bool any() const { return kept != nullptr || part != 0; }
};

// What normalisations multiply by, and what of an LSTM's c they add; or the gradients of these.
template <class T>
struct NormGainsOf {
  T* ih;      // [G*H] of W_ih x, or null: nothing is normalised
  T* hh;      // [G*H] of W_hh h
  T* c;       // [H], LSTM only
  T* c_bias;  // [H], or null
};

// Where a row has the reciprocal deviations: of the input side's groups of gates, of the hidden
// side's, of c.
constexpr int kInputScale = 0, kHiddenScale = 2, kCellScale = 4, kNormScales = 5;

// What normalisations save: values of mean 0 and variance 1, before any gain. Null where nothing is
// saved.
template <class T>
struct NormValuesOf {
  T* ih;      // [D, N, G*H]
  T* hh;      // [D, N, G*H]
  T* c;       // [D, N, H], LSTM only
  T* scales;  // [D, N, kNormScales] what they were divided by, its reciprocal
};

// One direction's parameters as torch lays them out.
template <class E>
struct WeightsOf {
  const E* w_ih;          // [G*H, I]
  const E* w_hh;          // [G*H, P]
  const float* b_ih;      // [G*H], or null
  const float* b_hh;      // [G*H], or null
  const E* w_hr;          // [P, H] where projected, else null
  const float* peephole;  // [3*H] from c to i, f and o, or null
  NormGainsOf<const float> norm;
};

// A forward call as it comes from outside.
template <class E>
struct ForwardCallOf {
  LayerShape shape;
  WeightsOf<E> weights[2];  // per direction
  const E* x;               // [N, I]
  const E* h0;              // [D, B, P]
  const float* c0;          // [D, B, H], LSTM only
  E* y;                     // [N, D*P]
  float* h_n;               // [D, B, P]
  float* c_n;               // [D, B, H], LSTM only
  E* gates;                 // [D, N, S*H] or null: not saved
  float* cells;             // [D, N, H] or null: not saved; of an RNN, its h before zoneout
  const float* h_factor;    // [D, B, P] what W_hh's product takes h times, or null
  Zoneout zoneout_h, zoneout_c;
  NormValuesOf<float> normed;
};

// A step of so many rows at most has its weights read where they lie.
constexpr int64_t kFewRows = 32;

// One timestep or a few. Where GRU resets before the product, there is one, and its two halves are
// steps of their own.
template <class E>
struct StepParamsOf : ForwardCallOf<E> {
  E* between;         // [D, B, H] r * h_prev of the first half, or null
  float* update;      // [D, B, H] its z, or null
  bool candidate;     // whether this is the second half
  float* input_side;  // [D, N, G*H] of a few timesteps, else null
};

// Gradients of one direction's parameters, each null where not wanted.
template <class E>
struct WeightGradsOf {
  E* w_ih;
  E* w_hh;
  float* b_ih;
  float* b_hh;
  E* w_hr;
  float* peephole;
  NormGainsOf<float> norm;

  bool any() const { return w_ih || w_hh || b_ih || b_hh || w_hr || peephole || norm.ih; }
};

// A backward call as it comes from outside.
template <class E>
struct BackwardCallOf {
  LayerShape shape;
  WeightsOf<E> weights[2];    // per direction
  const E* grad_y;            // [N, D*P] or null: zero
  const float* grad_h_n;      // [D, B, P] or null: zero
  const float* grad_c_n;      // [D, B, H] or null: zero
  const float* grad_cells;    // [D, N, H] of c after each step, or null: zero
  const E* x;                 // [N, I]
  const E* h0;                // [D, B, P]
  const float* c0;            // [D, B, H], LSTM only
  const E* y;                 // [N, D*P]
  const E* gates;             // [D, N, S*H]
  const float* cells;         // [D, N, H], LSTM; of an RNN its h before zoneout, or null: y is that
  E* grad_x;                  // [N, I], or null: not wanted
  float* grad_h0;             // [D, B, P]
  bool spares_h0;             // whether nobody wants that: what is in grad_h0 then has no meaning
  float* grad_c0;             // [D, B, H], LSTM only
  WeightGradsOf<E> grads[2];  // per direction
  const float* h_factor;      // [D, B, P] what W_hh's product took h times, or null
  Zoneout zoneout_h, zoneout_c;
  NormValuesOf<const float> normed;
};

// A matrix in the kernels' own layout: panels of up to `vectors` vectors of columns (units), each
// [words][gate][vector][width], zero beyond the last column. A word is 32 bits: a float, or two
// BFloat16 that follow one another in depth, zero beyond it. A panel's depth is that of the matrix.
//
// Where it is in several parts, floats are sums of BFloat16: words are pairs of these, in blocks of
// depth that have all words of the first part, then all of the second, and so on.
//
// With AVX2 a panel of four vectors may be in halves: for every block of depth (tile-inl.h) [words]
// of the first two, then of the other two.
struct PackedMatrix {
  float* data;
  int64_t depth;
  int64_t columns;    // per gate
  int vectors;        // per panel and gate
  int parts;          // 1: elements as such
  bool* exceptional;  // [panels] whether a product needs the sums of the parts; null for 1 part
  bool in_halves = true;
};

// W [gates*columns, depth] -> packed, for products a [rows, depth] times W transposed.
template <class E>
struct PackGatesParamsOf {
  const E* weights;
  int gates;
  PackedMatrix packed;
};

// M [depth, columns] -> packed, for products a [rows, depth] times M. Row k of the packed matrix
// is row (k + rotate) % depth of M.
template <class E>
struct PackColumnsParamsOf {
  const E* matrix;
  int64_t rotate;
  PackedMatrix packed;
};

template <class E>
struct ForwardParamsOf : ForwardCallOf<E> {
  PackedMatrix w_ih[2];      // per direction, packed gates
  PackedMatrix w_hh[2];      // of r and z only, where GRU resets before the product
  PackedMatrix w_second[2];  // a step's second product: W_hr or that GRU's W_hn, as one gate
  // Both null where a layer normalises, which adds biases later.
  const float* bias[2];         // [G*H] all that adds to the input side, or null
  const float* hidden_bias[2];  // [H] GRU's b_hn, or null
  E* between[2];                // [B, H] what it takes: o * tanh(c), or r * h_prev
  // [row shares if packed][scratch_rows, G*H] input side of a few steps; null: kept in y or gates,
  // which has to be float.
  float* scratch[2];
  int64_t scratch_rows;
  int64_t chunk_rows;  // the input side is computed for so many rows at a time, or one step
  // [3, B, P] where there is an h_factor: h times it, the initial one, and of the steps in turns.
  E* operands[2];
  float* hidden_side[2];  // [B, G*H] of one step, where it is normalised
};

// The layout of a stepper's matrices is the same for every instruction set: that of PackedMatrix
// with vectors of so many words, up to 4 of them in a panel where there is one gate, else 1. A word
// is a float, or what follows one another in depth, two BFloat16 or four bytes.
constexpr int kStepWidth = 16;
constexpr int64_t step_vectors(int64_t gates) { return gates == 1 ? 4 : 1; }

enum class StepWord { one_float, two_halves, four_bytes };

// Rows that a step's product takes, and what they are quantised to where weights are bytes.
struct StepRows {
  const float* first;
  int64_t stride;
  float* numbers;  // [rows, quantised_words]
  float* scales;   // [rows]
  int32_t* sums;   // [rows] of the numbers
};

// One timestep of a layer with weights packed in advance.
struct PackedStepParams {
  CellKind cell;
  int64_t batch, input, hidden, output;
  StepRows x;                // [B, I]
  StepRows h_prev;           // [B, P]
  float* input_side;         // [B, G*H] of x, computed before; null: the step computes it
  const float* c_prev;       // [B, H], LSTM only
  float* h;                  // [B, P]; where projected, written by project_step
  float* c;                  // [B, H], LSTM only
  float* unprojected;        // [B, H] what the cells give, projected only, else null
  StepRows cells;            // those, as project_step takes them
  bool backwards;            // whether panels are taken from the last to the first
  StepWord word;             // of the matrices
  const void* w_ih;          // packed
  const void* w_hh;          // packed
  const void* w_hr;          // packed as one gate, projected only
  const float* scale_ih;     // [G*H] of units where weights are bytes, else null
  const float* scale_hh;     // [G*H]
  const float* scale_hr;     // [P]
  const float* bias;         // [G*H] all that adds to the input side, or null
  const float* hidden_bias;  // [H] GRU's b_hn, or null
};

// The timesteps [begin, end) that a backward pass takes at a time.
struct Chunk {
  int64_t begin, end;
  int64_t first_row;  // of step `begin`
  int64_t rows;
};

template <class E>
struct BackwardParamsOf : BackwardCallOf<E> {
  PackedMatrix w_hh[2];      // per direction, packed columns in the order of grad_gates
  PackedMatrix w_second[2];  // packed columns of W_hr, or of W_hn, then not in w_hh
  E* grad_gates[2];          // per direction [rows of the chunk, Q*H]
  E* grad_h[2];              // per direction [rows of the chunk, P] gradient of h, projected only
  E* carried[2];   // per direction [B, Q*H] grad_gates of the step done just before the chunk
  Chunk chunk[2];  // per direction
  // Where a layer normalises, grad_gates and carried are [.., 2*G*H], the gradients of W_hh h and
  // then of W_ih x, and those of what the gates add up are here:
  E* grad_sums[2];        // per direction [rows of the chunk, Q*H]
  float* grad_c_seen[2];  // per direction [rows of the chunk, H] of the normalised c, LSTM only
  E* grad_given[2];       // per direction [B, H] of what the cells give in one step
};

// grad_x [rows, I] = or += the input side of grad_gates [rows, G*H] times W_ih.
template <class E>
struct InputGradParamsOf {
  const E* grad_gates;
  int64_t grad_gates_stride;
  PackedMatrix w_ih;  // packed columns
  E* grad_x;
  bool accumulate;
};

// to [row_count, columns] = or += rows times a matrix [depth, columns] as it lies, of which element
// k of a row meets row (k + rotate) % depth.
template <class E, class To>
struct UnpackedParamsOf {
  const E* rows;
  int64_t rows_stride, row_count;
  const E* matrix;
  int64_t depth, columns, rotate;
  To* to;
  bool accumulate;
};

// transposed [width][stride] from grads [rows, width], in parts or not; sums [3, width] = or += its
// row sums, then what these have lost by rounding, then memory for some rows'.
template <class E>
struct TransposeParamsOf {
  const E* grads;
  int64_t rows;
  int64_t width;
  E* transposed;
  int64_t stride;
  int parts;
  float* sums;
  bool accumulate;
};

// The rows of a chunk as a packed matrix of depth chunk.rows.
enum class RowSource {
  x,
  states,  // h that each row started from
  between  // what a step's second product took
};

template <class E>
struct PackRowsParamsOf {
  const BackwardCallOf<E>* call;
  RowSource source;
  Chunk chunk;
  int64_t direction;
  PackedMatrix packed;
};

// [rows, columns] transposed [rows][depth] times packed; row i goes to row (i + rotate) % rows. It
// is added to `sums` where there are some from before, and becomes sums, or after the last product
// the gradient.
template <class E>
struct WeightGradParamsOf {
  const E* transposed;
  int64_t stride;
  int64_t rows;
  PackedMatrix packed;
  float* sums;
  E* grad;
  int64_t rotate;
  bool from_before, is_last;
};

// grad [3*H] = or += the gradients of peepholes, of a chunk whose grad_gates are [rows, 4*H].
template <class E>
struct PeepholeGradParamsOf {
  const BackwardCallOf<E>* call;
  Chunk chunk;
  int64_t direction;
  const E* grad_gates;
  float* grad;
  bool accumulate;
};

// Gradients of gains and of all biases where a layer normalises, of a chunk.
template <class E>
struct NormGradParamsOf {
  const BackwardCallOf<E>* call;
  Chunk chunk;
  int64_t direction;
  const E* grad_sums;  // see BackwardParamsOf
  const float* grad_c_seen;
  bool accumulate;
};

// One thread's part of a direction: batch rows first, first + stride, ... below limit, and the
// panels [panel_begin, panel_end) of hidden units, of which the kernel derives those of h where
// that is projected.
struct Share {
  int64_t direction;
  int64_t first;
  int64_t stride;
  int64_t limit;
  int64_t panel_begin;
  int64_t panel_end;
};

template <class E>
struct KernelsOf {
  const char* name;
  int64_t width;      // floats per vector
  int64_t grad_rows;  // rows that weight_grad takes at a time
  int parts;          // that elements are cut into where that makes products faster, else 1
  // The gradients of so many bytes of gates become those of x and the weights at a time, but of so
  // many rows at least.
  int64_t chunk_bytes, chunk_rows;
  int64_t small_chunk_bytes, small_chunk_rows;  // where weights are small
  // Of the input side a thread computes so many bytes at a time, but so many rows at least.
  int64_t input_side_bytes, input_side_rows;
  // Words of a column of a packed matrix, and of a row of `depth` elements in parts.
  int64_t (*column_words)(int64_t depth, int parts);
  int64_t (*row_words)(int64_t depth);

  // Each does panels [begin, end) of its packed matrix.
  void (*pack_gates)(const PackGatesParamsOf<E>&, int64_t begin, int64_t end);
  void (*pack_columns)(const PackColumnsParamsOf<E>&, int64_t begin, int64_t end);
  void (*pack_rows)(const PackRowsParamsOf<E>&, int64_t begin, int64_t end);

  // Run all timesteps (of the chunk) for one share. Shares of rows are independent of each
  // other; those of units meet after every timestep. `memory` has room for the rows in parts that
  // a product takes, if any.
  void (*forward)(const ForwardParamsOf<E>&, const Share&, Meeting*, float* memory);
  void (*backward)(const BackwardParamsOf<E>&, const Share&, Meeting*, float* memory);

  // One timestep, vectors [begin, end) of the units of both directions.
  void (*step)(const StepParamsOf<E>&, int64_t begin, int64_t end);
  // A few timesteps; the share's panels are such vectors.
  void (*few_steps)(const StepParamsOf<E>&, const Share&, Meeting*);

  // One timestep from packed weights, panels [begin, end) of the units, and then of h where that is
  // projected; or of the input side alone. Null where E is not float.
  void (*packed_step)(const PackedStepParams&, int64_t begin, int64_t end);
  void (*project_step)(const PackedStepParams&, int64_t begin, int64_t end);
  void (*packed_input)(const PackedStepParams&, int64_t begin, int64_t end);
  // Rows [begin, end), and floats of a row's numbers.
  void (*quantise_rows)(const StepRows&, int64_t depth, int64_t begin, int64_t end);
  int64_t (*quantised_words)(int64_t depth);

  void (*input_grad)(const InputGradParamsOf<E>&, int64_t row_begin, int64_t row_end,
                     float* memory);
  // Blocks [begin, end) of `unpacked_columns` columns, for up to `unpacked_rows` rows. Where E is
  // float, both are the same.
  int64_t unpacked_rows, unpacked_columns;
  void (*unpacked_input)(const UnpackedParamsOf<E, E>&, int64_t begin, int64_t end);
  void (*unpacked_state)(const UnpackedParamsOf<E, float>&, int64_t begin, int64_t end);
  // Columns [begin, end) of grads, in vectors.
  void (*transpose)(const TransposeParamsOf<E>&, int64_t begin, int64_t end);
  // Blocks [begin, end) of grad_rows rows.
  void (*weight_grad)(const WeightGradParamsOf<E>&, int64_t begin, int64_t end);
  // Vectors [begin, end) of units.
  void (*peephole_grad)(const PeepholeGradParamsOf<E>&, int64_t begin, int64_t end);
  // Likewise; null where E is not float.
  void (*norm_grad)(const NormGradParamsOf<E>&, int64_t begin, int64_t end);
};

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline int64_t panel_count(const PackedMatrix& m, int64_t width) {
  return ceil_div(m.columns, m.vectors * width);
}

extern const KernelsOf<float> portable_kernels;
extern const KernelsOf<float> avx2_kernels;
extern const KernelsOf<float> avx512_kernels;
extern const KernelsOf<float> amx_kernels;
extern const KernelsOf<BFloat16> avx512bf16_kernels;
extern const KernelsOf<BFloat16> amxbf16_kernels;

}  // namespace fused_rnn
