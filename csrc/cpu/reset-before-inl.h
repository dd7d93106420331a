// The rows of a step, and what a GRU that resets before the product does with them: two products a
// step, the second of which takes what the first one gave.

// Rows of one step that all start from the same kind of state.
struct ForwardRows {
  RowsOf<float> gx;              // [G*H]
  RowsOf<const Element> h_prev;  // [P]
  RowsOf<float> h;               // [H] the running h, where kRunningH, or null in a single step
  RowsOf<const float> c_prev;    // [H]
  RowsOf<Element> between;       // [H] where kResetBefore, r * h_prev
  RowsOf<Element> y;             // [H] what the cell gives: h, if not yet projected
  RowsOf<float> c;               // [H] the running c
  RowsOf<Element> gates;         // [S*H] or null
  RowsOf<float> cells;           // [H] or null; of an RNN, what the cell gives before zoneout
  RowsOf<const Element> taken;   // [P] what the product takes: h_prev, or that times factor
  RowsOf<const float> factor;    // [P] or null
  ZoneoutRows zoneout_h;         // of y
  ZoneoutRows zoneout_c;
  const float* peephole;  // [3*H] of all rows, or null
};

// GRU's h is a running sum: where elements are not floats, it is kept beside y.
template <class Cell>
constexpr bool kRunningH = Cell::kUsesPreviousH && kPairs > 1;

template <class Cell>
constexpr bool kResetBefore = false;
template <>
constexpr bool kResetBefore<GruResetBeforeCell<Math>> = true;

constexpr int kResetGates = 2;  // of the first product: r and z

template <class Cell>
FUSED_RNN_INLINE Vector previous_h(const ForwardRows& r, int64_t row, int64_t unit, int valid) {
  if constexpr (kRunningH<Cell>) {
    if (r.h.base) return load(r.h[row] + unit, valid);
  }
  return load(r.h_prev[row] + unit, valid);
}

// r and z of `valid` units from `unit` on of one row. z is left where its input side was.
template <class Cell>
FUSED_RNN_INLINE void reset_gates_units(const ForwardRows& from, int64_t row, int64_t unit,
                                        int64_t hidden, int valid, const Vector* gx,
                                        const Vector* gh, float* z_to) {
  Vector r, z;
  const Vector h_prev = previous_h<Cell>(from, row, unit, valid);
  Vector between = Cell::forward_gates(gx, gh, h_prev, r, z);
  if (from.factor.base) between *= load(from.factor[row] + unit, valid);
  store(from.between[row] + unit, between, valid);
  store(z_to, z, valid);
  if (from.gates.base) {
    store(from.gates[row] + unit, r, valid);
    store(from.gates[row] + hidden + unit, z, valid);
  }
}

// n and h of the same.
template <class Cell>
FUSED_RNN_INLINE void candidate_units(const ForwardRows& from, int64_t row, int64_t unit,
                                      int64_t hidden, int valid, Vector gx, Vector gh, Vector z) {
  Vector n;
  const Vector h_prev = previous_h<Cell>(from, row, unit, valid);
  Vector h = Cell::forward_candidate(gx, gh, h_prev, z, n);
  if (from.zoneout_h.any()) h = zoned_out(from.zoneout_h, row, unit, valid, h_prev, h);
  store(from.y[row] + unit, h, valid);
  if constexpr (kRunningH<Cell>) {
    if (from.h.base) store(from.h[row] + unit, h, valid);
  }
  if (from.gates.base) store(from.gates[row] + 2 * hidden + unit, n, valid);
}

template <class Cell>
static void reset_gates_tile(const ForwardRows& r, const Operand& h, int64_t first, int rows,
                             const Panel& panel, const PackedMatrix& w_rz) {
  const int64_t hidden = w_rz.columns;
  const int columns = kResetGates * panel.vectors;
  Vector tile[kMaxRows * kMaxColumns];
  multiply(columns, rows, h, first, panel, tile);
  for (int v = 0; v < panel.vectors; v++) {
    const int64_t unit = panel.column + v * kWidth;
    const int valid = valid_lanes(unit, hidden);
    for (int m = 0; m < rows; m++) {
      float* z = r.gx[first + m] + hidden + unit;
      const Vector gx[] = {load(z - hidden, valid), load(z, valid)};
      const Vector gh[] = {tile[m * columns + v], tile[m * columns + panel.vectors + v]};
      reset_gates_units<Cell>(r, first + m, unit, hidden, valid, gx, gh, z);
    }
  }
}

template <class Cell>
static void candidate_tile(const ForwardRows& r, const Operand& between, int64_t first, int rows,
                           const Panel& panel, const PackedMatrix& w_n) {
  const int64_t hidden = w_n.columns;
  Vector tile[kMaxRows * kMaxColumns];
  multiply(panel.vectors, rows, between, first, panel, tile);
  for (int v = 0; v < panel.vectors; v++) {
    const int64_t unit = panel.column + v * kWidth;
    const int valid = valid_lanes(unit, hidden);
    for (int m = 0; m < rows; m++) {
      const float* gx = r.gx[first + m] + unit;
      candidate_units<Cell>(r, first + m, unit, hidden, valid, load(gx + 2 * hidden, valid),
                            tile[m * panel.vectors + v], load(gx + hidden, valid));
    }
  }
}
