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

template <class Cell>
static void step_units(const ForwardCall& p, int64_t d, int64_t unit) {
  constexpr int G = Cell::kGates, S = Cell::kSavedGates;
  const LayerShape& s = p.shape;
  const Weights& w = p.weights[d];
  const int64_t hidden = s.hidden, batch = s.rows.batch;
  const int valid = valid_lanes(unit, hidden);
  const Share all{d, 0, 1, batch, 0, 0};
  const int64_t y_width = s.directions * hidden;
  const ForwardRows r{
      {},
      rows_of(p.h0, d * batch, hidden, all),
      {},
      rows_of_or_null(p.c0, d * batch, hidden, all),
      rows_of(p.y + d * hidden, 0, y_width, all),
      rows_of_or_null(p.c_n, d * batch, hidden, all),
      rows_of_or_null(p.gates ? p.gates + d * s.count * S * hidden : nullptr, 0, S * hidden, all),
      rows_of_or_null(p.cells ? p.cells + d * s.count * hidden : nullptr, 0, hidden, all)};
  for (int64_t row = 0; row < batch; row++) {
    Vector gx[G], gh[G];
    for (int gate = 0; gate < G; gate++) {
      const int64_t first = gate * hidden + unit;
      const bool apart = G == 3 && gate == 2;  // GRU's r multiplies the hidden side of n
      Vector sums[kWidth] = {};
      add_products(w.w_ih + first * s.input, s.input, valid, p.x + row * s.input, sums);
      if (apart) {
        gx[gate] = sum_rows(sums);
        FUSED_RNN_UNROLL
        for (int i = 0; i < kWidth; i++) sums[i] = Vector{};
      }
      add_products(w.w_hh + first * hidden, hidden, valid, r.h_prev[row], sums);
      gh[gate] = sum_rows(sums);
      if (!apart) gx[gate] = Vector{};
      if (w.b_ih) {
        gx[gate] += load(w.b_ih + first, valid);
        gh[gate] += load(w.b_hh + first, valid);
      }
    }
    forward_units<Cell>(r, row, unit, hidden, valid, gx, gh);
    float* h_n = p.h_n + (d * batch + row) * hidden + unit;
    store(h_n, load(r.y[row] + unit, valid), valid);
  }
}

static void step(const ForwardCall& p, int64_t begin, int64_t end) {
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
    }
  }
}
