// Layers that normalise W_ih x, W_hh h and an LSTM's c on its way to h. Statistics of a row lie
// between its product and its pointwise part, so a product is stored, and a pass over each row does
// the rest. Shares are of rows.

// The rows of one step, as NormValuesOf.
template <class T>
struct NormedRows {
  RowsOf<T> ih, hh, c, scales;

  NormedRows(const NormValuesOf<T>& values, const LayerShape& s, int64_t row, const Share& share) {
    const int64_t gates = cell_sizes(s.cell).gates, first = share.direction * s.count + row;
    ih = rows_of_or_null(values.ih, first, gates * s.hidden, share);
    hh = rows_of_or_null(values.hh, first, gates * s.hidden, share);
    c = rows_of_or_null(values.c, first, s.hidden, share);
    scales = rows_of_or_null(values.scales, first, kNormScales, share);
  }
};

// Gates that are normalised together: GRU's r and z, then n; all of an LSTM's.
struct GateGroup {
  int index, gate, gates;
};

template <class Cell, class Body>
FUSED_RNN_INLINE void for_each_group(Body body) {
  if constexpr (Cell::kGates == 3) {
    body(GateGroup{0, 0, 2});
    body(GateGroup{1, 2, 1});
  } else {
    body(GateGroup{0, 0, Cell::kGates});
  }
}

// A group of a row of the input or hidden side. `normalised` and `scales` may be null.
static void normalise_group(const GateGroup& group, int64_t hidden, const float* gain,
                            const float* bias, float* values, float* normalised, float* scales) {
  const int64_t at = group.gate * hidden;
  const float scale = normalise(values + at, group.gates * hidden, gain + at,
                                bias ? bias + at : nullptr, normalised ? normalised + at : nullptr);
  if (scales) scales[group.index] = scale;
}

// The input side of a span, x times W_ih, whose rows begin at gx.
template <class Cell, class Span>
static void normalise_input_side(const ForwardParams& p, const Share& share, const Span& span,
                                 float* gx, int64_t gx_stride) {
  const Weights& w = p.weights[share.direction];
  for (int64_t t = span.begin; t < span.end; t++) {
    const int64_t row = offset(p.shape.rows, t);
    const NormedRows<float> saved(p.normed, p.shape, row, share);
    const auto side = rows_of(gx, row - span.first_row, gx_stride, share);
    for (int64_t i = 0; i < rows_below(share, batch_size(p.shape.rows, t)); i++) {
      for_each_group<Cell>([&](const GateGroup& group) {
        normalise_group(group, p.shape.hidden, w.norm.ih, w.b_ih, side[i],
                        saved.ih.base ? saved.ih[i] : nullptr,
                        saved.scales.base ? saved.scales[i] + kInputScale : nullptr);
      });
    }
  }
}

// What the pass over a row of one step needs beyond ForwardRows.
struct NormedStep {
  RowsOf<float> gh;  // [G*H] W_hh h, then normalised; an LSTM leaves its c and o there
  NormGainsOf<const float> gains;
  const float* bias;  // [G*H] b_hh, or null
  NormedRows<float> saved;
};

FUSED_RNN_INLINE void normalise_hidden_side(const NormedStep& n, const GateGroup& group,
                                            int64_t row, int64_t hidden) {
  normalise_group(group, hidden, n.gains.hh, n.bias, n.gh[row],
                  n.saved.hh.base ? n.saved.hh[row] : nullptr,
                  n.saved.scales.base ? n.saved.scales[row] + kHiddenScale : nullptr);
}

// gate i of a row of the input or hidden side.
template <int GATES>
FUSED_RNN_INLINE void load_gates(const float* side, int64_t unit, int64_t hidden, int valid,
                                 Vector (&gates)[GATES]) {
  FUSED_RNN_UNROLL
  for (int i = 0; i < GATES; i++) gates[i] = load(side + i * hidden + unit, valid);
}

// A row of one step, from the products on.
template <class Cell>
static void normed_gru_row(const ForwardRows& r, const NormedStep& n, int64_t row, int64_t hidden) {
  // With the reset gate before a product, r and z only.
  constexpr int kGates = kResetBefore<Cell> ? kResetGates : Cell::kGates;
  for_each_group<Cell>([&](const GateGroup& group) {
    if (group.gate < kGates) normalise_hidden_side(n, group, row, hidden);
  });
  for (int64_t unit = 0; unit < hidden; unit += kWidth) {
    const int valid = valid_lanes(unit, hidden);
    Vector gx[kGates], gh[kGates];
    load_gates(r.gx[row], unit, hidden, valid, gx);
    load_gates(n.gh[row], unit, hidden, valid, gh);
    if constexpr (kResetBefore<Cell>) {
      reset_gates_units<Cell>(r, row, unit, hidden, valid, gx, gh, r.gx[row] + hidden + unit);
    } else {
      forward_units<Cell, true>(r, row, unit, hidden, valid, gx, gh);
    }
  }
}

[[maybe_unused]] static void normed_lstm_row(const ForwardRows& r, const NormedStep& n, int64_t row,
                                             int64_t hidden) {
  using Cell = LstmCell<Math>;
  normalise_hidden_side(n, {0, 0, Cell::kGates}, row, hidden);
  float* c_seen = n.gh[row];
  float* o = c_seen + 3 * hidden;
  for (int64_t unit = 0; unit < hidden; unit += kWidth) {
    const int valid = valid_lanes(unit, hidden);
    Vector gx[Cell::kGates], gh[Cell::kGates], saved[Cell::kSavedGates];
    load_gates(r.gx[row], unit, hidden, valid, gx);
    load_gates(n.gh[row], unit, hidden, valid, gh);
    const Vector c_prev = load(r.c_prev[row] + unit, valid);
    Vector c = c_prev;
    forward_cell<Cell, true>(r, unit, hidden, valid, gx, gh, Vector{}, c, saved);
    store(c_seen + unit, c, valid);
    store(o + unit, saved[3], valid);
    if (r.zoneout_c.any()) c = zoned_out(r.zoneout_c, row, unit, valid, c_prev, c);
    store(r.c[row] + unit, c, valid);
    if (r.cells.base) store(r.cells[row] + unit, c, valid);
    for (int i = 0; r.gates.base && i < Cell::kSavedGates; i++) {
      store(r.gates[row] + i * hidden + unit, saved[i], valid);
    }
  }
  const float scale = normalise(c_seen, hidden, n.gains.c, n.gains.c_bias,
                                n.saved.c.base ? n.saved.c[row] : nullptr);
  if (n.saved.scales.base) n.saved.scales[row][kCellScale] = scale;
  for (int64_t unit = 0; unit < hidden; unit += kWidth) {
    const int valid = valid_lanes(unit, hidden);
    Vector h = load(o + unit, valid) * Math::tanh(load(c_seen + unit, valid));
    if (r.zoneout_h.any()) {
      h = zoned_out(r.zoneout_h, row, unit, valid, load(r.h_prev[row] + unit, valid), h);
    }
    store(r.y[row] + unit, h, valid);
  }
}

template <class Cell>
static void normed_row(const ForwardRows& r, const NormedStep& n, int64_t row, int64_t hidden) {
  if constexpr (Cell::kHasC) {
    normed_lstm_row(r, n, row, hidden);
  } else {
    normed_gru_row<Cell>(r, n, row, hidden);
  }
}

// n and h of a GRU that resets before the product.
template <class Cell>
static void normed_candidate_row(const ForwardRows& r, const NormedStep& n, int64_t row,
                                 int64_t hidden) {
  normalise_hidden_side(n, {1, kResetGates, 1}, row, hidden);
  const float* gx = r.gx[row];
  const float* gh = n.gh[row] + kResetGates * hidden;
  for (int64_t unit = 0; unit < hidden; unit += kWidth) {
    const int valid = valid_lanes(unit, hidden);
    candidate_units<Cell>(r, row, unit, hidden, valid, load(gx + 2 * hidden + unit, valid),
                          load(gh + unit, valid), load(gx + hidden + unit, valid));
  }
}

// What the pass over a row of one step backward needs beyond BackwardRows, whose grad_gates are the
// gradients of what the gates add up.
struct NormedGradStep {
  Rows grad_given;                // [H] of what the cell gives
  RowsOf<Element> grad_products;  // [2*G*H] of W_hh h, then of W_ih x
  RowsOf<float> grad_c_seen;      // [H] of the normalised c, LSTM only
  const NormGainsOf<const float>& gains;
  NormedRows<const float> saved;
};

// Which of a row's grad_gates is that of a gate's hidden or input side. GRU's are (hn, r, z, n).
constexpr int64_t grad_of_hidden(const CellSizes& sizes, int64_t gate) {
  return sizes.grad_gates > sizes.gates ? (gate + 1) % 3 : gate;
}

constexpr int64_t grad_of_input(const CellSizes& sizes, int64_t gate) {
  return sizes.grad_gates - sizes.gates + gate;
}

// Of a group of the row's gates: through the normalisations to the products.
template <class Cell>
static void normed_group_grads(const BackwardRows& r, const NormedGradStep& n,
                               const GateGroup& group, int64_t row, int64_t hidden) {
  const int64_t at = group.gate * hidden;
  constexpr CellSizes kSizes{Cell::kGates, Cell::kSavedGates, Cell::kGradGates, Cell::kHasC};
  const auto side = [&](int64_t gate_of_grads, const float* gain, const float* normalised,
                        float scale, Element* to) {
    normalise_backward(r.grad_gates[row] + gate_of_grads * hidden, group.gates * hidden, gain + at,
                       normalised + at, scale,
                       [&](int64_t i, int valid, Vector grad) { store(to + at + i, grad, valid); });
  };
  const float* scales = n.saved.scales[row] + group.index;
  Element* to = n.grad_products[row];
  side(grad_of_hidden(kSizes, group.gate), n.gains.hh, n.saved.hh[row], scales[kHiddenScale], to);
  side(grad_of_input(kSizes, group.gate), n.gains.ih, n.saved.ih[row], scales[kInputScale],
       to + Cell::kGates * hidden);
}

// The first `count` gates of a row, as forward saved them.
FUSED_RNN_INLINE void load_saved_gates(const BackwardRows& r, int64_t row, int64_t unit,
                                       int64_t hidden, int valid, int count, Vector* saved) {
  for (int i = 0; i < count; i++) saved[i] = load(r.gates[row] + i * hidden + unit, valid);
}

[[maybe_unused]] static void normed_lstm_grads(const BackwardRows& r, const NormedGradStep& n,
                                               int64_t row, int64_t hidden) {
  using Cell = LstmCell<Math>;
  const float* normalised = n.saved.c[row];
  float* grad_c_seen = n.grad_c_seen[row];
  Element* grads = r.grad_gates[row];
  const auto factors_at = [&](int64_t unit, int valid, Vector seen, Vector c_prev, Vector* factors)
                              __attribute__((always_inline)) {
                                Vector saved[4];
                                load_saved_gates(r, row, unit, hidden, valid, 4, saved);
                                Cell::factors(saved, Vector{}, Vector{}, seen, c_prev, factors);
                              };
  for (int64_t unit = 0; unit < hidden; unit += kWidth) {
    const int valid = valid_lanes(unit, hidden);
    Vector seen = load(normalised + unit, valid) * load(n.gains.c + unit, valid), factors[6];
    if (n.gains.c_bias) seen += load(n.gains.c_bias + unit, valid);
    factors_at(unit, valid, seen, Vector{}, factors);
    const Vector d_h = load(n.grad_given[row] + unit, valid);
    store(grad_c_seen + unit, d_h * factors[0], valid);
    store(grads + 3 * hidden + unit, d_h * factors[4], valid);
  }
  normalise_backward(
      grad_c_seen, hidden, n.gains.c, normalised, n.saved.scales[row][kCellScale],
      [&](int64_t unit, int valid, Vector d_c) __attribute__((always_inline)) {
        Vector carry = load(r.grad_c[row] + unit, valid), past{}, factors[6], of_gates[4];
        if (r.grad_cells.base) carry += load(r.grad_cells[row] + unit, valid);
        if (r.zoneout_c.any()) {
          past = past_the_step(r.zoneout_c, row, unit, valid, carry);
          carry -= past;
        }
        Vector peephole[3] = {};
        d_c += carry;
        if (r.peephole) {
          load_peephole(r.peephole, unit, hidden, valid, peephole);
          d_c += load(grads + 3 * hidden + unit, valid) * peephole[2];
        }
        factors_at(unit, valid, Vector{}, load(r.c_prev[row] + unit, valid), factors);
        Cell::backward_c(factors, d_c, carry, of_gates);
        if (r.peephole) carry += of_gates[0] * peephole[0] + of_gates[1] * peephole[1];
        for (int i = 0; i < 3; i++) store(grads + i * hidden + unit, of_gates[i], valid);
        store(r.grad_c[row] + unit, carry + past, valid);
      });
}

template <class Cell>
static void normed_gru_grads(const BackwardRows& r, const NormedGradStep& n, int64_t row,
                             int64_t hidden) {
  for (int64_t unit = 0; unit < hidden; unit += kWidth) {
    const int valid = valid_lanes(unit, hidden);
    Vector saved[4], factors[Cell::kFactors], grads[4], carry;
    load_saved_gates(r, row, unit, hidden, valid, Cell::kSavedGates, saved);
    const Vector h_prev = load(r.h_prev[row] + unit, valid);
    Cell::factors(saved, Vector{}, h_prev, Vector{}, Vector{}, factors);
    Cell::backward(factors, load(n.grad_given[row] + unit, valid), carry, grads);
    for (int i = kResetBefore<Cell> ? 1 : 0; i < Cell::kGradGates; i++) {
      store(r.grad_gates[row] + i * hidden + unit, grads[i], valid);
    }
    // Zoneout has left there what goes past the step.
    if (r.zoneout_h.any()) carry += load(r.grad_h[row] + unit, valid);
    store(r.grad_h[row] + unit, carry, valid);
  }
}

// A row of one step backward; of a GRU that resets before the product, without r and z.
template <class Cell>
static void normed_grad_row(const BackwardRows& r, const NormedGradStep& n, int64_t row,
                            int64_t hidden) {
  if constexpr (Cell::kHasC) {
    normed_lstm_grads(r, n, row, hidden);
  } else {
    normed_gru_grads<Cell>(r, n, row, hidden);
  }
  for_each_group<Cell>([&](const GateGroup& group) {
    if (kResetBefore<Cell> && group.gate < kResetGates) return;
    normed_group_grads<Cell>(r, n, group, row, hidden);
  });
}
