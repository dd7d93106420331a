// The scan, forward and backward, for one instruction set.
//
// The including file defines FUSED_RNN_ISA, a namespace of its own for everything here, and
// FUSED_RNN_VECTOR_WIDTH. No std templates: a copy compiled for AVX-512 could be the one the
// linker keeps for everybody.
//
// One matrix product serves both directions: a register tile of ROWS batch rows by COLUMNS
// vectors runs over the whole depth, then the pointwise part runs over the tile. Every sum is one
// chain of multiply-adds in the order of k, so a row's result does not depend on the tile, batch,
// thread count or vector width it was computed with.

#include "../cells.h"
#include "kernels.h"

namespace fused_rnn::FUSED_RNN_ISA {

#include "vec.h"

constexpr int kMaxColumns = 4;
constexpr int kMaxRows = 12;

// Rows of a tile of `columns` vectors: as many as the registers hold. AVX-512 and ARM have 32.
// Measured with AVX-512 on a prototype of this tile: 3 columns of 8 rows and 4 of 6 reach 92% of
// FMA peak, 4 of 4 reach 73%.
constexpr int tile_rows(int columns) {
#if FUSED_RNN_VECTOR_WIDTH == 16 || defined(__aarch64__)
  constexpr int rows[] = {12, 12, 8, 6};
#else
  constexpr int rows[] = {8, 6, 4, 3};
#endif
  return rows[columns - 1];
}

FUSED_RNN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// tile [ROWS, COLUMNS] = a [ROWS, depth] times panel [depth, COLUMNS].
template <int COLUMNS, int ROWS>
__attribute__((noinline)) void multiply_tile(int64_t depth, const float* a, int64_t a_stride,
                                             const float* panel, Vector* tile) {
  Vector sum[ROWS][COLUMNS];
  FUSED_RNN_UNROLL
  for (int row = 0; row < ROWS; row++) {
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++) sum[row][column] = Vector{};
  }
  for (int64_t k = 0; k < depth; k++) {
    Vector b[COLUMNS];
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++) b[column] = load(panel + column * kWidth);
    FUSED_RNN_UNROLL
    for (int row = 0; row < ROWS; row++) {
      const Vector value = broadcast(a[row * a_stride + k]);
      FUSED_RNN_UNROLL
      for (int column = 0; column < COLUMNS; column++) sum[row][column] += value * b[column];
    }
    panel += COLUMNS * kWidth;
  }
  FUSED_RNN_UNROLL
  for (int row = 0; row < ROWS; row++) {
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++)
      tile[row * COLUMNS + column] = sum[row][column];
  }
}

template <int COLUMNS, int ROWS = tile_rows(COLUMNS)>
void multiply_rows(int rows, int64_t depth, const float* a, int64_t a_stride, const float* panel,
                   Vector* tile) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      multiply_rows<COLUMNS, ROWS - 1>(rows, depth, a, a_stride, panel, tile);
      return;
    }
  }
  multiply_tile<COLUMNS, ROWS>(depth, a, a_stride, panel, tile);
}

static void multiply(int columns, int rows, int64_t depth, const float* a, int64_t a_stride,
                     const float* panel, Vector* tile) {
  switch (columns) {
    case 1:
      return multiply_rows<1>(rows, depth, a, a_stride, panel, tile);
    case 2:
      return multiply_rows<2>(rows, depth, a, a_stride, panel, tile);
    case 3:
      return multiply_rows<3>(rows, depth, a, a_stride, panel, tile);
    default:
      return multiply_rows<4>(rows, depth, a, a_stride, panel, tile);
  }
}

// A block of neighbouring units: panel `index` of the units in vectors, the last one narrower.
struct Panel {
  int64_t unit;  // first unit
  int vectors;

  Panel(int64_t index, int gates, int64_t hidden) {
    const int64_t wide = vectors_per_panel(gates);
    unit = index * wide * kWidth;
    vectors = (int)smaller(wide, (hidden - unit + kWidth - 1) / kWidth);
  }

  static int64_t count(int gates, int64_t hidden) {
    const int64_t units = vectors_per_panel(gates) * kWidth;
    return (hidden + units - 1) / units;
  }
};

// How many of the kWidth units from `unit` exist.
FUSED_RNN_INLINE int valid_units(int64_t unit, int64_t hidden) {
  return (int)smaller(kWidth, hidden - unit);
}

// Forward panels: packed [panel][k][gate][unit] = W_hh[gate*H + unit, k], units past H zero.
template <int GATES>
void pack_forward_panel(const PackParams& p, int64_t index) {
  const int64_t hidden = p.hidden;
  const Panel panel(index, GATES, hidden);
  const int64_t k_stride = (int64_t)GATES * panel.vectors * kWidth;
  for (int gate = 0; gate < GATES; gate++) {
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t unit = panel.unit + v * kWidth;
      const int valid = valid_units(unit, hidden);
      const float* from = p.weights + (gate * hidden + unit) * hidden;
      float* to = p.packed + panel.unit * GATES * hidden + (gate * panel.vectors + v) * kWidth;
      for (int64_t k = 0; k < hidden; k += kWidth) {
        const int depth = valid_units(k, hidden);
        Vector block[kWidth];
        FUSED_RNN_UNROLL
        for (int i = 0; i < kWidth; i++) {
          block[i] = i < valid ? load(from + i * hidden + k, depth) : Vector{};
        }
        transpose(block);
        FUSED_RNN_UNROLL
        for (int i = 0; i < kWidth; i++) {
          if (i < depth) store(to + (k + i) * k_stride, block[i]);
        }
      }
    }
  }
}

// Backward panels: packed [panel][k][unit] = W_hh[k', unit], units past H zero, where k runs over
// the gates in the order of grad_gates: for GRU n, r, z instead of r, z, n.
template <int GATES>
void pack_backward_panel(const PackParams& p, int64_t index) {
  const int64_t hidden = p.hidden;
  const int64_t depth = GATES * hidden;
  const Panel panel(index, 1, hidden);
  float* to = p.packed + panel.unit * depth;
  for (int64_t k = 0; k < depth; k++) {
    const int64_t row = GATES == 3 ? (k < hidden ? k + 2 * hidden : k - hidden) : k;
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t unit = panel.unit + v * kWidth;
      store(to, load(p.weights + row * hidden + unit, valid_units(unit, hidden)));
      to += kWidth;
    }
  }
}

FUSED_RNN_INLINE int64_t batch_size(const RowLayout& rows, int64_t t) {
  return rows.batch_sizes ? rows.batch_sizes[t] : rows.batch;
}

FUSED_RNN_INLINE int64_t offset(const RowLayout& rows, int64_t t) {
  return rows.offsets ? rows.offsets[t] : t * rows.batch;
}

// How many rows of the share are among the first `batch` ones.
FUSED_RNN_INLINE int64_t rows_below(const RowShare& share, int64_t batch) {
  const int64_t end = smaller(batch, share.limit);
  return end <= share.first ? 0 : (end - share.first - 1) / share.stride + 1;
}

// A step of one share, in the order in which the forward scan takes them.
struct Step {
  int64_t t, previous, next;  // timesteps; previous and next are -1 beyond the sequence
  int64_t rows;               // of the share in this step: numbers [0, rows)
  int64_t from_previous;      // of those, [0, from_previous) were in the previous step
  int64_t into_next;          // and [0, into_next) will be in the next one

  Step(const RowLayout& layout, const RowShare& share, int64_t index) {
    const bool reverse = share.direction == 1;
    const int64_t last = layout.timesteps - 1;
    const int64_t ahead = reverse ? -1 : 1;
    t = reverse ? last - index : index;
    previous = index > 0 ? t - ahead : -1;
    next = index < last ? t + ahead : -1;
    const int64_t batch = batch_size(layout, t);
    rows = rows_below(share, batch);
    from_previous =
        previous < 0 ? 0 : rows_below(share, smaller(batch, batch_size(layout, previous)));
    into_next = next < 0 ? 0 : rows_below(share, smaller(batch, batch_size(layout, next)));
  }
};

// Row numbers of a share, resolved to memory: row i of the share at base + i * stride.
template <class T>
struct RowsOf {
  T* base;
  int64_t stride;

  T* operator[](int64_t i) const { return base + i * stride; }
};

// The share's rows of an array whose rows are `width` apart, the first batch row being `row`.
template <class T>
FUSED_RNN_INLINE RowsOf<T> rows_of(T* array, int64_t row, int64_t width, const RowShare& share) {
  return {array + (row + share.first) * width, share.stride * width};
}

template <class T>
FUSED_RNN_INLINE RowsOf<T> rows_of_or_null(T* array, int64_t row, int64_t width,
                                           const RowShare& share) {
  return array ? rows_of(array, row, width, share) : RowsOf<T>{nullptr, 0};
}

// A row of `hidden` floats; a null source is a row of zeros.
FUSED_RNN_INLINE void copy_row(const float* from, float* to, int64_t hidden) {
  for (int64_t i = 0; i < hidden; i++) to[i] = from ? from[i] : 0.0f;
}

// Calls body(first row, rows) for tiles of [begin, end) that differ by at most one row.
template <class Body>
FUSED_RNN_INLINE void for_each_tile(int64_t begin, int64_t end, int columns, Body body) {
  const int64_t rows = end - begin;
  const int64_t tiles = (rows + tile_rows(columns) - 1) / tile_rows(columns);
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t first = begin + rows * tile / tiles;
    body(first, (int)(begin + rows * (tile + 1) / tiles - first));
  }
}

// Rows of one step that all start from the same kind of state.
struct ForwardRows {
  RowsOf<const float> gx;      // [G*H]
  RowsOf<const float> h_prev;  // [H]
  RowsOf<const float> c_prev;  // [H]
  RowsOf<float> y;             // [H]
  RowsOf<float> c;             // [H] the running c
  RowsOf<float> gates;         // [S*H] or null
  RowsOf<float> cells;         // [H] or null
};

template <class Cell>
void forward_tile(const ForwardRows& r, int64_t first, int rows, const Panel& panel, int64_t hidden,
                  const float* packed, const float* hidden_bias) {
  constexpr int G = Cell::kGates;
  const int columns = G * panel.vectors;
  Vector tile[kMaxRows * kMaxColumns];
  multiply(columns, rows, hidden, r.h_prev[first], r.h_prev.stride,
           packed + panel.unit * G * hidden, tile);
  for (int v = 0; v < panel.vectors; v++) {
    const int64_t unit = panel.unit + v * kWidth;
    const int valid = valid_units(unit, hidden);
    const Vector bias = G == 3 && hidden_bias ? load(hidden_bias + unit, valid) : Vector{};
    for (int m = 0; m < rows; m++) {
      const int64_t row = first + m;
      Vector gx[G], gh[G], saved[4], h_prev{}, c{};
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < G; gate++) {
        gx[gate] = load(r.gx[row] + gate * hidden + unit, valid);
        gh[gate] = tile[m * columns + gate * panel.vectors + v];
      }
      if constexpr (G == 3) gh[2] += bias;
      if constexpr (Cell::kUsesPreviousH) h_prev = load(r.h_prev[row] + unit, valid);
      if constexpr (Cell::kHasC) c = load(r.c_prev[row] + unit, valid);
      store(r.y[row] + unit, Cell::forward(gx, gh, h_prev, c, saved), valid);
      if constexpr (Cell::kHasC) {
        store(r.c[row] + unit, c, valid);
        if (r.cells.base) store(r.cells[row] + unit, c, valid);
      }
      if constexpr (Cell::kSavedGates > 0) {
        if (r.gates.base) {
          FUSED_RNN_UNROLL
          for (int i = 0; i < Cell::kSavedGates; i++) {
            store(r.gates[row] + i * hidden + unit, saved[i], valid);
          }
        }
      }
    }
  }
}

// Odd steps take the panels backwards: the last ones are still in the cache. Measured on a
// prototype: 4 to 8% where the packed weights exceed L2.
FUSED_RNN_INLINE int64_t zigzag(int64_t index, int64_t count, int64_t step) {
  return step % 2 ? count - 1 - index : index;
}

template <class Cell>
void forward_share(const ScanForwardParams& p, const RowShare& share) {
  constexpr int G = Cell::kGates, S = Cell::kSavedGates;
  const int64_t hidden = p.hidden, d = share.direction, y_width = p.directions * hidden;
  const float* gx = p.gx + d * p.count * G * hidden;
  float* y = p.y + d * hidden;
  float* gates = S > 0 && p.gates ? p.gates + d * p.count * S * hidden : nullptr;
  float* cells = p.cells ? p.cells + d * p.count * hidden : nullptr;
  const int64_t state = d * p.rows.batch;
  const auto h0 = rows_of(p.h0, state, hidden, share);
  const auto c0 = rows_of_or_null(p.c0, state, hidden, share);
  const auto h_n = rows_of(p.h_n, state, hidden, share);
  const auto c_n = rows_of_or_null(p.c_n, state, hidden, share);
  const int64_t panels = Panel::count(G, hidden);
  const float* packed = p.packed_weights[d];

  const int64_t started = p.rows.timesteps > 0 ? rows_below(share, batch_size(p.rows, 0)) : 0;
  for (int64_t i = started; i < rows_below(share, share.limit); i++) {
    copy_row(h0[i], h_n[i], hidden);
    if (Cell::kHasC) copy_row(c0[i], c_n[i], hidden);
  }

  for (int64_t index = 0; index < p.rows.timesteps; index++) {
    const Step step(p.rows, share, index);
    const int64_t row = offset(p.rows, step.t);
    ForwardRows joining{rows_of(gx, row, G * hidden, share),
                        h0,
                        c0,
                        rows_of(y, row, y_width, share),
                        c_n,
                        rows_of_or_null(gates, row, S * hidden, share),
                        rows_of_or_null(cells, row, hidden, share)};
    ForwardRows carrying_on = joining;
    if (step.previous >= 0) {
      carrying_on.h_prev = rows_of<const float>(y, offset(p.rows, step.previous), y_width, share);
      carrying_on.c_prev = {c_n.base, c_n.stride};
    }
    for (int64_t j = 0; j < panels; j++) {
      const Panel panel(zigzag(j, panels, index), G, hidden);
      const int columns = G * panel.vectors;
      for_each_tile(0, step.from_previous, columns, [&](int64_t first, int rows) {
        forward_tile<Cell>(carrying_on, first, rows, panel, hidden, packed, p.hidden_bias[d]);
      });
      for_each_tile(step.from_previous, step.rows, columns, [&](int64_t first, int rows) {
        forward_tile<Cell>(joining, first, rows, panel, hidden, packed, p.hidden_bias[d]);
      });
    }
    for (int64_t i = step.into_next; i < step.rows; i++) copy_row(joining.y[i], h_n[i], hidden);
  }
}

// Rows of one step in the backward scan that have the same neighbours.
struct BackwardRows {
  RowsOf<const float> grad_next;  // [Q*H] grad_gates of the next step, or null: h went no further
  RowsOf<const float> grad_y;     // [H] or null
  RowsOf<const float> gates;      // [S*H]
  RowsOf<const float> y;          // [H]
  RowsOf<const float> h_prev;     // [H]
  RowsOf<const float> cells;      // [H]
  RowsOf<const float> c_prev;     // [H]
  RowsOf<float> grad_gates;       // [Q*H]
  RowsOf<float> grad_h;           // [H] in: grad_h_n, or what carry left (GRU); out: carry (GRU)
  RowsOf<float> grad_c;           // [H] in and out: the gradient of c
};

template <class Cell>
void backward_tile(const BackwardRows& r, int64_t first, int rows, const Panel& panel,
                   int64_t hidden, const float* packed) {
  constexpr int G = Cell::kGates;
  Vector tile[kMaxRows * kMaxColumns];
  if (r.grad_next.base) {
    multiply(panel.vectors, rows, G * hidden, r.grad_next[first], r.grad_next.stride,
             packed + panel.unit * G * hidden, tile);
  }
  // A row's own grad_h_n, once; and for GRU whatever went round W_hh.
  const bool add_grad_h = Cell::kUsesPreviousH || !r.grad_next.base;
  for (int m = 0; m < rows; m++) {
    const int64_t row = first + m;
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t unit = panel.unit + v * kWidth;
      const int valid = valid_units(unit, hidden);
      Vector d_h = r.grad_next.base ? tile[m * panel.vectors + v] : Vector{};
      if (add_grad_h) d_h += load(r.grad_h[row] + unit, valid);
      if (r.grad_y.base) d_h += load(r.grad_y[row] + unit, valid);
      Vector saved[4], grads[4], h{}, h_prev{}, c{}, c_prev{}, carry{};
      if constexpr (Cell::kSavedGates > 0) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < Cell::kSavedGates; i++) {
          saved[i] = load(r.gates[row] + i * hidden + unit, valid);
        }
      } else {
        h = load(r.y[row] + unit, valid);
      }
      if constexpr (Cell::kUsesPreviousH) h_prev = load(r.h_prev[row] + unit, valid);
      if constexpr (Cell::kHasC) {
        c = load(r.cells[row] + unit, valid);
        c_prev = load(r.c_prev[row] + unit, valid);
        carry = load(r.grad_c[row] + unit, valid);
      }
      Cell::backward(saved, h, h_prev, c, c_prev, d_h, carry, grads);
      FUSED_RNN_UNROLL
      for (int i = 0; i < Cell::kGradGates; i++) {
        store(r.grad_gates[row] + i * hidden + unit, grads[i], valid);
      }
      if constexpr (Cell::kUsesPreviousH) store(r.grad_h[row] + unit, carry, valid);
      if constexpr (Cell::kHasC) store(r.grad_c[row] + unit, carry, valid);
    }
  }
}

// Gradient of the state that rows [begin, end) started from.
template <class Cell>
void initial_state_grad(RowsOf<const float> grad_gates, RowsOf<float> grad_h, int64_t begin,
                        int64_t end, int64_t hidden, const float* packed) {
  constexpr int G = Cell::kGates;
  for (int64_t j = 0; begin < end && j < Panel::count(1, hidden); j++) {
    const Panel panel(j, 1, hidden);
    for_each_tile(begin, end, panel.vectors, [&](int64_t first, int rows) {
      Vector tile[kMaxRows * kMaxColumns];
      multiply(panel.vectors, rows, G * hidden, grad_gates[first], grad_gates.stride,
               packed + panel.unit * G * hidden, tile);
      for (int m = 0; m < rows; m++) {
        for (int v = 0; v < panel.vectors; v++) {
          const int64_t unit = panel.unit + v * kWidth;
          const int valid = valid_units(unit, hidden);
          float* to = grad_h[first + m] + unit;
          Vector sum = tile[m * panel.vectors + v];
          if constexpr (Cell::kUsesPreviousH) sum += load(to, valid);
          store(to, sum, valid);
        }
      }
    });
  }
}

template <class Cell>
void backward_share(const ScanBackwardParams& p, const RowShare& share) {
  constexpr int S = Cell::kSavedGates, Q = Cell::kGradGates;
  const int64_t hidden = p.hidden, d = share.direction, y_width = p.directions * hidden;
  const float* gates = S > 0 ? p.gates + d * p.count * S * hidden : nullptr;
  const float* cells = Cell::kHasC ? p.cells + d * p.count * hidden : nullptr;
  const float* y = p.y + d * hidden;
  const float* grad_y = p.grad_y ? p.grad_y + d * hidden : nullptr;
  float* grad_gates = p.grad_gates + d * p.count * Q * hidden;
  const int64_t state = d * p.rows.batch;
  const auto h0 = rows_of(p.h0, state, hidden, share);
  const auto c0 = rows_of_or_null(p.c0, state, hidden, share);
  const auto grad_h_n = rows_of_or_null(p.grad_h_n, state, hidden, share);
  const auto grad_c_n = rows_of_or_null(p.grad_c_n, state, hidden, share);
  const auto grad_h = rows_of(p.grad_h0, state, hidden, share);
  const auto grad_c = rows_of_or_null(p.grad_c0, state, hidden, share);
  const int64_t panels = Panel::count(1, hidden);
  const float* packed = p.packed_weights[d];

  for (int64_t i = 0; i < rows_below(share, share.limit); i++) {
    copy_row(grad_h_n.base ? grad_h_n[i] : nullptr, grad_h[i], hidden);
    if (Cell::kHasC) copy_row(grad_c_n.base ? grad_c_n[i] : nullptr, grad_c[i], hidden);
  }

  for (int64_t index = p.rows.timesteps - 1; index >= 0; index--) {
    const Step step(p.rows, share, index);
    const int64_t row = offset(p.rows, step.t);
    const auto grads = rows_of(grad_gates, row, Q * hidden, share);
    BackwardRows r{{nullptr, 0},
                   rows_of_or_null(grad_y, row, y_width, share),
                   rows_of_or_null(gates, row, S * hidden, share),
                   rows_of(y, row, y_width, share),
                   h0,
                   rows_of_or_null(cells, row, hidden, share),
                   c0,
                   grads,
                   grad_h,
                   grad_c};
    // Rows without a previous or a next step come last; at most three kinds of rows.
    const int64_t low = smaller(step.from_previous, step.into_next);
    const int64_t high = step.from_previous + step.into_next - low;
    const int64_t bounds[] = {0, low, high, step.rows};
    for (int kind = 0; kind < 3; kind++) {
      const int64_t begin = bounds[kind], end = bounds[kind + 1];
      if (begin == end) continue;
      BackwardRows rows_here = r;
      if (begin < step.into_next) {
        rows_here.grad_next =
            rows_of<const float>(grad_gates, offset(p.rows, step.next), Q * hidden, share);
      }
      if (begin < step.from_previous) {
        const int64_t before = offset(p.rows, step.previous);
        rows_here.h_prev = rows_of(y, before, y_width, share);
        rows_here.c_prev = rows_of_or_null(cells, before, hidden, share);
      }
      for (int64_t j = 0; j < panels; j++) {
        const Panel panel(zigzag(j, panels, index), 1, hidden);
        for_each_tile(begin, end, panel.vectors, [&](int64_t first, int rows) {
          backward_tile<Cell>(rows_here, first, rows, panel, hidden, packed);
        });
      }
    }
    initial_state_grad<Cell>({grads.base, grads.stride}, grad_h, step.from_previous, step.rows,
                             hidden, packed);
  }
}

static void pack_forward(CellKind cell, const PackParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; index++) {
    switch (cell) {
      case CellKind::gru:
        pack_forward_panel<3>(p, index);
        break;
      case CellKind::lstm:
        pack_forward_panel<4>(p, index);
        break;
      default:
        pack_forward_panel<1>(p, index);
    }
  }
}

static void pack_backward(CellKind cell, const PackParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; index++) {
    switch (cell) {
      case CellKind::gru:
        pack_backward_panel<3>(p, index);
        break;
      case CellKind::lstm:
        pack_backward_panel<4>(p, index);
        break;
      default:
        pack_backward_panel<1>(p, index);
    }
  }
}

static void forward(CellKind cell, const ScanForwardParams& p, const RowShare& share) {
  switch (cell) {
    case CellKind::rnn_tanh:
      return forward_share<RnnCell<Math, false>>(p, share);
    case CellKind::rnn_relu:
      return forward_share<RnnCell<Math, true>>(p, share);
    case CellKind::gru:
      return forward_share<GruCell<Math>>(p, share);
    case CellKind::lstm:
      return forward_share<LstmCell<Math>>(p, share);
  }
}

static void backward(CellKind cell, const ScanBackwardParams& p, const RowShare& share) {
  switch (cell) {
    case CellKind::rnn_tanh:
      return backward_share<RnnCell<Math, false>>(p, share);
    case CellKind::rnn_relu:
      return backward_share<RnnCell<Math, true>>(p, share);
    case CellKind::gru:
      return backward_share<GruCell<Math>>(p, share);
    case CellKind::lstm:
      return backward_share<LstmCell<Math>>(p, share);
  }
}

}  // namespace fused_rnn::FUSED_RNN_ISA
