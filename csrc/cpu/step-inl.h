// A layer call of one timestep. Packing the weights would cost more than the step: they are read
// where they lie, as rows for dot products.

// sums[i] += the products of row i of `weights` [kWidth, depth] and `a`, lane by lane.
FUSED_RNN_INLINE void add_products(const Element* weights, int64_t depth, int valid,
                                   const Element* a, Vector (&sums)[kWidth]) {
  constexpr int kStep = kWidth * kPairs;
  int64_t k = 0;
  if (valid == kWidth) {
    for (; k + kStep <= depth; k += kStep) {
      const Vector value = load_words(a + k, kStep);
      FUSED_RNN_UNROLL
      for (int i = 0; i < kWidth; i++) {
        sums[i] = multiply_add(sums[i], load_words(weights + i * depth + k, kStep), value);
      }
    }
  }
  for (; k < depth; k += kStep) {
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
    switch (p.shape.cell) {
      case CellKind::rnn_tanh:
        step_units<RnnCell<Math, false>>(p, d, unit);
        break;
      case CellKind::rnn_relu:
        step_units<RnnCell<Math, true>>(p, d, unit);
        break;
      case CellKind::gru:
        step_units<GruCell<Math>>(p, d, unit);
        break;
      case CellKind::lstm:
        step_units<LstmCell<Math>>(p, d, unit);
        break;
      case CellKind::gru_reset_before:
        step_units<GruResetBeforeCell<Math>>(p, d, unit);
        break;
    }
  }
}
