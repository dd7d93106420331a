// A layer call of one timestep or a few. Packing the weights would cost more than the steps: they
// are read where they lie, as rows for dot products.

// sums[i] += the products of row i of `weights` [UNITS, depth] and `a`, lane by lane.
template <int UNITS>
FUSED_RNN_INLINE void add_products_of_units(const Element* weights, int64_t depth, const Element* a,
                                            Vector* sums) {
  constexpr int kStep = kWidth * kPairs;
  Vector part[UNITS];
  FUSED_RNN_UNROLL
  for (int i = 0; i < UNITS; i++) part[i] = sums[i];
  const auto add = [&](int64_t k, int64_t limit) __attribute__((always_inline)) {
    const Vector value = load_words(a + k, limit);
    FUSED_RNN_UNROLL
    for (int i = 0; i < UNITS; i++) {
      part[i] = multiply_add(part[i], load_words(weights + i * depth + k, limit), value);
    }
  };
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) add(k, kStep);
  if (k < depth) add(k, depth - k);
  FUSED_RNN_UNROLL
  for (int i = 0; i < UNITS; i++) sums[i] = part[i];
}

// Rows so many bytes apart fall on few sets of the L1 cache, where more of them at a time than it
// has ways drive each other out. Time of all kWidth rows at a time over that of four, AVX-512 on a
// Zen 4, two threads, B=1: H=1024 1.2 to 1.5, H=512 1.0 to 1.07; but where rows are not so far
// apart, H=1000, 0.9 to 1.0. Of AVX2's eight, 0.75 to 1.05.
constexpr int64_t kFewSets = 2048;
constexpr int kWays = 8;

// sums[i] += the products of row i of `weights` [kWidth, depth], of which `valid` are there, and
// `a`, lane by lane.
FUSED_RNN_INLINE void add_products(const Element* weights, int64_t depth, int valid,
                                   const Element* a, Vector (&sums)[kWidth]) {
  if (valid == kWidth && kWidth > kWays && depth * (int64_t)sizeof(Element) % kFewSets == 0) {
    constexpr int kUnits = 4;
    FUSED_RNN_UNROLL
    for (int first = 0; first < kWidth; first += kUnits) {
      add_products_of_units<kUnits>(weights + first * depth, depth, a, sums + first);
    }
    return;
  }
  if (valid == kWidth) return add_products_of_units<kWidth>(weights, depth, a, sums);
  constexpr int kStep = kWidth * kPairs;
  for (int64_t k = 0; k < depth; k += kStep) {
    const Vector value = load_words(a + k, depth - k);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kWidth; i++) {
      if (i < valid) {
        sums[i] = multiply_add(sums[i], load_words(weights + i * depth + k, depth - k), value);
      }
    }
  }
}

// The input and the hidden side of one gate's units, with their biases. Where they are not wanted
// apart, part of the hidden side is in that of the input.
FUSED_RNN_INLINE void add_sides(const StepParams& p, int64_t d, int64_t row, int64_t first,
                                int valid, const Element* h, bool apart, Vector& gx, Vector& gh) {
  const LayerShape& s = p.shape;
  const Weights& w = p.weights[d];
  Vector sums[kWidth] = {};
  add_products(w.w_ih + first * s.input, s.input, valid, p.x + row * s.input, sums);
  gx = Vector{};
  if (apart) {
    gx = sum_rows(sums);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kWidth; i++) sums[i] = Vector{};
  }
  add_products(w.w_hh + first * s.hidden, s.hidden, valid, h, sums);
  gh = sum_rows(sums);
  if (w.b_ih) {
    gx += load(w.b_ih + first, valid);
    gh += load(w.b_hh + first, valid);
  }
}

template <class Cell>
static void step_units(const StepParams& p, int64_t d, int64_t unit) {
  constexpr int G = Cell::kGates, S = Cell::kSavedGates;
  const LayerShape& s = p.shape;
  const int64_t hidden = s.hidden, batch = s.rows.batch;
  const int valid = valid_lanes(unit, hidden);
  const Share all{d, 0, 1, batch, 0, 0};
  const int64_t y_width = s.directions * hidden;
  const ForwardRows r{
      {},
      rows_of(p.h0, d * batch, hidden, all),
      {},
      rows_of_or_null(p.c0, d * batch, hidden, all),
      rows_of_or_null(p.between, d * batch, hidden, all),
      rows_of(p.y + d * hidden, 0, y_width, all),
      rows_of_or_null(p.c_n, d * batch, hidden, all),
      rows_of_or_null(p.gates ? p.gates + d * s.count * S * hidden : nullptr, 0, S * hidden, all),
      rows_of_or_null(p.cells ? p.cells + d * s.count * hidden : nullptr, 0, hidden, all)};
  // GRU's r multiplies the hidden side of n, or what it is made of.
  constexpr bool kApart = Cell::kGates == 3 && !kResetBefore<Cell>;
  for (int64_t row = 0; row < batch; row++) {
    Vector gx[G], gh[G];
    if constexpr (kResetBefore<Cell>) {
      float* z = p.update + (d * batch + row) * hidden + unit;
      const int begin = p.candidate ? kResetGates : 0, end = p.candidate ? G : kResetGates;
      const Element* h = p.candidate ? r.between[row] : r.h_prev[row];
      for (int gate = begin; gate < end; gate++) {
        add_sides(p, d, row, gate * hidden + unit, valid, h, false, gx[gate], gh[gate]);
      }
      if (!p.candidate) {
        reset_gates_units<Cell>(r, row, unit, hidden, valid, gx, gh, z);
        continue;
      }
      candidate_units<Cell>(r, row, unit, hidden, valid, gx[2], gh[2], load(z, valid));
    } else {
      for (int gate = 0; gate < G; gate++) {
        add_sides(p, d, row, gate * hidden + unit, valid, r.h_prev[row], kApart && gate == 2,
                  gx[gate], gh[gate]);
      }
      forward_units<Cell>(r, row, unit, hidden, valid, gx, gh);
    }
    float* h_n = p.h_n + (d * batch + row) * hidden + unit;
    store(h_n, load(r.y[row] + unit, valid), valid);
  }
}

static void step(const StepParams& p, int64_t begin, int64_t end) {
  const int64_t vectors = ceil_div(p.shape.hidden, kWidth);
  for (int64_t index = begin; index < end; index++) {
    const int64_t d = index / vectors, unit = index % vectors * kWidth;
    for_cell(p.shape, [&]<class Cell, bool, bool>() { step_units<Cell>(p, d, unit); });
  }
}

constexpr int kRowsOfWeights = 4;

// sums[m][i] = the products of row i of `weights` and row `row` + m of `a`, lane by lane; beyond
// the last row, of that. As many sums at a time as those of one row: of fewer units, whose weights
// are read once for all rows. As one function with `add_products`, which goes on from the sums it
// is given and leaves out units, four rows took 1.05 to 1.3 times as long.
template <int ROWS>
FUSED_RNN_INLINE void add_products_of(const Element* weights, int64_t depth, const Rows& a,
                                      int64_t row, int64_t rows,
                                      Vector (&sums)[kRowsOfWeights][kWidth]) {
  constexpr int kStep = kWidth * kPairs, kUnits = kWidth / ROWS;
  const Element* from[ROWS];
  for (int m = 0; m < ROWS; m++) from[m] = a[smaller(row + m, rows - 1)];
  FUSED_RNN_UNROLL
  for (int first = 0; first < kWidth; first += kUnits) {
    Vector part[ROWS][kUnits] = {};
    const auto add = [&](int64_t k, int64_t limit) __attribute__((always_inline)) {
      Vector values[ROWS];
      FUSED_RNN_UNROLL
      for (int m = 0; m < ROWS; m++) values[m] = load_words(from[m] + k, limit);
      FUSED_RNN_UNROLL
      for (int i = 0; i < kUnits; i++) {
        const Vector weight = load_words(weights + (first + i) * depth + k, limit);
        FUSED_RNN_UNROLL
        for (int m = 0; m < ROWS; m++) part[m][i] = multiply_add(part[m][i], weight, values[m]);
      }
    };
    int64_t k = 0;
    for (; k + kStep <= depth; k += kStep) add(k, kStep);
    if (k < depth) add(k, depth - k);
    FUSED_RNN_UNROLL
    for (int m = 0; m < ROWS; m++) {
      FUSED_RNN_UNROLL
      for (int i = 0; i < kUnits; i++) sums[m][first + i] = part[m][i];
    }
  }
}

// Calls body(row, product) for `valid` units, rows of `weights`, and all rows of `a`.
template <class Body>
FUSED_RNN_INLINE void for_each_product(const Element* weights, int64_t depth, int valid,
                                       const Rows& a, int64_t rows, Body body) {
  for (int64_t row = 0; row < rows;) {
    Vector sums[kRowsOfWeights][kWidth];
    int64_t done = 1;
    if (valid == kWidth && rows - row > 2) {
      add_products_of<kRowsOfWeights>(weights, depth, a, row, rows, sums);
      done = smaller(kRowsOfWeights, rows - row);
    } else if (valid == kWidth && rows - row >= 2) {
      add_products_of<2>(weights, depth, a, row, rows, sums);
      done = 2;
    } else {
      for (int i = 0; i < kWidth; i++) sums[0][i] = Vector{};
      add_products(weights, depth, valid, a[row], sums[0]);
    }
    for (int64_t m = 0; m < done; m++) body(row + m, sum_rows(sums[m]));
    row += done;
  }
}

// The input side of `valid` units from `unit` on of all rows of the share, with the biases that add
// to it.
template <class Cell>
static void project_units(const StepParams& p, const Share& share, int64_t unit, int valid) {
  constexpr int G = Cell::kGates;
  const LayerShape& s = p.shape;
  const int64_t d = share.direction, rows = rows_below(share, s.rows.batch);
  const bool whole_batch = rows == s.rows.batch;
  const Weights& w = p.weights[d];
  for (int gate = 0; gate < G; gate++) {
    const int64_t first = gate * s.hidden + unit;
    Vector bias{};
    if (w.b_ih) {
      bias = load(w.b_ih + first, valid);
      if (G != 3 || gate < 2) bias += load(w.b_hh + first, valid);
    }
    const auto project = [&](int64_t row, int64_t count) {
      const auto x = rows_of(p.x, row, s.input, share);
      const auto gx = rows_of(p.input_side, d * s.count + row, G * s.hidden, share);
      for_each_product(w.w_ih + first * s.input, s.input, valid, x, count,
                       [&](int64_t i, Vector sum) { store(gx[i] + first, sum + bias, valid); });
    };
    if (whole_batch) {  // whose rows lie together
      project(0, s.count);
    } else {
      for (int64_t t = 0; t < s.rows.timesteps; t++) project(t * s.rows.batch, rows);
    }
  }
}

// One step of those units.
template <class Cell>
static void few_units(const StepParams& p, const Share& share, const ForwardRows& r, int64_t rows,
                      int64_t unit, int valid) {
  constexpr int G = Cell::kGates;
  const int64_t hidden = p.shape.hidden;
  const Weights& w = p.weights[share.direction];
  Vector gh[kFewRows][G];
  for (int gate = 0; gate < G; gate++) {
    const int64_t first = gate * hidden + unit;
    const bool biased = G == 3 && gate == 2 && w.b_hh;
    const Vector bias = biased ? load(w.b_hh + first, valid) : Vector{};
    for_each_product(w.w_hh + first * hidden, hidden, valid, r.h_prev, rows,
                     [&](int64_t i, Vector sum) { gh[i][gate] = biased ? sum + bias : sum; });
  }
  for (int64_t i = 0; i < rows; i++) {
    Vector gx[G];
    for (int gate = 0; gate < G; gate++) gx[gate] = load(r.gx[i] + gate * hidden + unit, valid);
    forward_units<Cell>(r, i, unit, hidden, valid, gx, gh[i]);
  }
}

template <class Cell>
static void few_steps_of(const StepParams& p, const Share& share, Meeting* meeting) {
  constexpr int G = Cell::kGates, S = Cell::kSavedGates;
  const LayerShape& s = p.shape;
  const int64_t hidden = s.hidden, d = share.direction, y_width = s.directions * hidden;
  const int64_t state = d * s.rows.batch, rows = rows_below(share, s.rows.batch);
  const Units units(share, {nullptr, hidden, hidden, 1, 1, nullptr});
  const auto for_each_vector = [&](int64_t index, auto body) {
    for (int64_t j = share.panel_begin; j < share.panel_end; j++) {
      const int64_t unit = zigzag(j, share, index) * kWidth;
      body(unit, valid_lanes(unit, hidden));
    }
  };
  for_each_vector(0, [&](int64_t unit, int valid) { project_units<Cell>(p, share, unit, valid); });
  const auto h0 = rows_of(p.h0, state, hidden, share);
  const auto h_n = rows_of(p.h_n, state, hidden, share);
  const auto c_n = rows_of_or_null(p.c_n, state, hidden, share);
  for (int64_t i = 0; kRunningH<Cell> && i < rows; i++) copy_row(h0[i], h_n[i], units);
  for (int64_t index = 0; index < s.rows.timesteps; index++) {
    const Step step(s.rows, share, index);
    const int64_t row = step.t * s.rows.batch, at = d * s.count + row;
    ForwardRows r{rows_of(p.input_side, at, G * hidden, share),
                  h0,
                  kRunningH<Cell> ? h_n : RowsOf<float>{nullptr, 0},
                  rows_of_or_null(p.c0, state, hidden, share),
                  {},
                  rows_of(p.y + d * hidden, row, y_width, share),
                  c_n,
                  rows_of_or_null(S > 0 ? p.gates : nullptr, at, S * hidden, share),
                  rows_of_or_null(p.cells, at, hidden, share)};
    if (step.previous >= 0) {
      r.h_prev =
          rows_of<const Element>(p.y + d * hidden, step.previous * s.rows.batch, y_width, share);
      r.c_prev = {c_n.base, c_n.stride};
    }
    for_each_vector(
        index, [&](int64_t unit, int valid) { few_units<Cell>(p, share, r, rows, unit, valid); });
    for (int64_t i = 0; !kRunningH<Cell> && step.next < 0 && i < rows; i++) {
      copy_row(r.y[i], h_n[i], units);
    }
    if (meeting && step.next >= 0) meeting->wait();
  }
}

static void few_steps(const StepParams& p, const Share& share, Meeting* meeting) {
  for_cell(p.shape, [&]<class Cell, bool, bool>() {
    // Steps of the others have two products.
    if constexpr (!kResetBefore<Cell>) few_steps_of<Cell>(p, share, meeting);
  });
}
