// What a layer's cell is, the pointwise part of a step forward, and the rows of one backward.

// Calls body.operator()<Cell, PROJECTED, NORMED>(), for an LSTM that is projected or not and for
// cells that normalise or do not.
template <bool NORMED, class Body>
FUSED_RNN_INLINE void for_gated_cell(const LayerShape& s, Body body) {
  switch (s.cell) {
    case CellKind::gru:
      return body.template operator()<GruCell<Math>, false, NORMED>();
    case CellKind::gru_reset_before:
      return body.template operator()<GruResetBeforeCell<Math>, false, NORMED>();
    default:
      if (projected(s)) return body.template operator()<LstmCell<Math>, true, NORMED>();
      return body.template operator()<LstmCell<Math>, false, NORMED>();
  }
}

template <class Body>
FUSED_RNN_INLINE void for_cell(const LayerShape& s, Body body) {
  switch (s.cell) {
    case CellKind::rnn_tanh:
      return body.template operator()<RnnCell<Math, false>, false, false>();
    case CellKind::rnn_relu:
      return body.template operator()<RnnCell<Math, true>, false, false>();
    default:
#if !defined(FUSED_RNN_BFLOAT16)
      if (s.normed) return for_gated_cell<true>(s, body);
#endif
      return for_gated_cell<false>(s, body);
  }
}

// What is no template knows a cell's facts by its kind.
template <class Cell>
constexpr bool has_sizes(const CellSizes& s) {
  return s.gates == Cell::kGates && s.saved_gates == Cell::kSavedGates &&
         s.grad_gates == Cell::kGradGates && s.has_c == Cell::kHasC;
}
static_assert(has_sizes<RnnCell<Math, false>>(cell_sizes(CellKind::rnn_tanh)));
static_assert(has_sizes<RnnCell<Math, true>>(cell_sizes(CellKind::rnn_relu)));
static_assert(has_sizes<GruCell<Math>>(cell_sizes(CellKind::gru)));
static_assert(has_sizes<LstmCell<Math>>(cell_sizes(CellKind::lstm)));
static_assert(has_sizes<GruResetBeforeCell<Math>>(cell_sizes(CellKind::gru_reset_before)));

template <class Cell, bool MORE>
FUSED_RNN_INLINE Vector forward_cell(const ForwardRows& r, int64_t unit, int64_t hidden, int valid,
                                     const Vector* gx, const Vector* gh, Vector h_prev, Vector& c,
                                     Vector* saved) {
  if constexpr (MORE && Cell::kHasC) {
    if (r.peephole) {
      Vector peephole[3];
      load_peephole(r.peephole, unit, hidden, valid, peephole);
      return Cell::forward_peeping(peephole, gx, gh, c, saved);
    }
  }
  return Cell::forward(gx, gh, h_prev, c, saved);
}

// What a step of `valid` units from `unit` on of one row reads and writes besides its products.
// new_h(h_prev, c) computes the cell. MORE: whether there may be zoneout or peepholes, whose code
// alone, unused, made LSTM take 3% longer in training.
template <class Cell, bool MORE, class NewH>
FUSED_RNN_INLINE void update_units(const ForwardRows& r, int64_t row, int64_t unit, int64_t hidden,
                                   int valid, const Vector* saved, const NewH& new_h) {
  Vector h_prev{}, c{};
  const bool zoned = MORE && r.zoneout_h.any();
  if (Cell::kUsesPreviousH || zoned) h_prev = previous_h<Cell>(r, row, unit, valid);
  if constexpr (Cell::kHasC) c = load(r.c_prev[row] + unit, valid);
  const Vector c_prev = c;
  Vector h = new_h(h_prev, c);
  if constexpr (MORE && Cell::kSavedGates == 0) {
    if (r.cells.base) store(r.cells[row] + unit, h, valid);
  }
  if (zoned) h = zoned_out(r.zoneout_h, row, unit, valid, h_prev, h);
  if constexpr (MORE && Cell::kHasC) {
    if (r.zoneout_c.any()) c = zoned_out(r.zoneout_c, row, unit, valid, c_prev, c);
  }
  store(r.y[row] + unit, h, valid);
  if constexpr (kRunningH<Cell>) {
    if (r.h.base) store(r.h[row] + unit, h, valid);
  }
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

// The pointwise part of a step, gh being the hidden side.
template <class Cell, bool MORE = false>
FUSED_RNN_INLINE void forward_units(const ForwardRows& r, int64_t row, int64_t unit, int64_t hidden,
                                    int valid, const Vector* gx, const Vector* gh) {
  Vector saved[4];
  const auto new_h = [&](Vector h_prev, Vector& c) __attribute__((always_inline)) {
    return forward_cell<Cell, MORE>(r, unit, hidden, valid, gx, gh, h_prev, c, saved);
  };
  update_units<Cell, MORE>(r, row, unit, hidden, valid, saved, new_h);
}

// Rows of one step that have the same neighbours.
struct BackwardRows {
  RowsOf<const Element> grad_next;  // [Q*H] grad_gates of the next step, or null: h went no further
  RowsOf<const Element> grad_y;     // [P] or null
  RowsOf<const Element> gates;      // [S*H]
  RowsOf<const Element> y;          // [P]
  RowsOf<const Element> h_prev;     // [P]
  RowsOf<const float> cells;        // [H], of an RNN its h before zoneout, or null
  RowsOf<const float> c_prev;       // [H]
  RowsOf<const float> grad_cells;   // [H] or null
  RowsOf<Element> grad_gates;       // [Q*H]
  RowsOf<float> grad_h;             // [P] in: grad_h_n, or what went past the next step; out: past
                                    // this one, the carry (GRU) and what zoneout keeps
  RowsOf<float> grad_c;             // [H] in and out: the gradient of c
  RowsOf<const float> factor;       // [P] or null
  ZoneoutRows zoneout_h, zoneout_c;
  const float* peephole;  // [3*H] of all rows, or null
};

// Of h, from that of what the product took, which may be h times a factor.
FUSED_RNN_INLINE Vector through_factor(RowsOf<const float> factor, int64_t row, int64_t column,
                                       int valid, Vector grad) {
  return factor.base ? grad * load(factor[row] + column, valid) : grad;
}
