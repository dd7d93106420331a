// A timestep of a few rows from weights that were packed in advance. The sums are those of the
// forward scan without parts, in the same order: a stepper gives bit for bit what a sequence gives,
// unless that is short enough to be computed from unpacked weights.

#if defined(FUSED_RNN_BFLOAT16)

constexpr void (*packed_step)(const PackedStepParams&, int64_t, int64_t) = nullptr;
constexpr void (*project_step)(const PackedStepParams&, int64_t, int64_t) = nullptr;

#else

constexpr int kStepParts = kStepWidth / kWidth;  // vectors of this instruction set in one of those
// Where vectors are narrower than the layout's, the registers hold the columns of a panel for one
// row only.
constexpr int kStepRows = kStepParts == 1 ? 6 : 1;

// tile [rows][columns][kStepParts] = a [rows, depth] times a panel of the stepper's layout.
template <class Word>
static void multiply_step(int columns, int rows, int64_t depth, const float* a, int64_t a_stride,
                          const Word* panel, Vector* tile) {
  if constexpr (kStepParts == 1) {
    multiply_words(columns, rows, depth, a, a_stride, panel, tile);
  } else {
    switch (columns) {
      case 1:
        return multiply_tile<kStepParts, 1>(depth, a, a_stride, panel, tile);
      case 2:
        return multiply_tile<2 * kStepParts, 1>(depth, a, a_stride, panel, tile);
      case 3:
        return multiply_tile<3 * kStepParts, 1>(depth, a, a_stride, panel, tile);
      default:
        return multiply_tile<4 * kStepParts, 1>(depth, a, a_stride, panel, tile);
    }
  }
}

// A chain each (tile-inl.h) of a row times a panel, two in turns: those of one product alone wait
// for each other, and for the cells' arithmetic at their end.
template <int COLUMNS>
__attribute__((noinline)) void multiply_chains(int64_t x_depth, int64_t h_depth, const float* x,
                                               const float* x_panel, const float* h,
                                               const float* h_panel, bool add, Vector* x_tile,
                                               Vector* h_tile) {
  Vector x_sum[COLUMNS], h_sum[COLUMNS];
  FUSED_RNN_UNROLL
  for (int column = 0; column < COLUMNS; column++) x_sum[column] = h_sum[column] = Vector{};
  const auto advance = [](Vector(&sum)[COLUMNS], Vector value,
                          const float*& panel) __attribute__((always_inline)) {
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++) {
      sum[column] = multiply_add(sum[column], value, load(panel + column * kWidth));
    }
    panel += COLUMNS * kWidth;
  };
  const int64_t both = smaller(x_depth, h_depth);
  for (int64_t k = 0; k < both; k++) {
    const Vector x_value = broadcast(x[k]), h_value = broadcast(h[k]);
    advance(x_sum, x_value, x_panel);
    advance(h_sum, h_value, h_panel);
  }
  for (int64_t k = both; k < x_depth; k++) advance(x_sum, broadcast(x[k]), x_panel);
  for (int64_t k = both; k < h_depth; k++) advance(h_sum, broadcast(h[k]), h_panel);
  FUSED_RNN_UNROLL
  for (int column = 0; column < COLUMNS; column++) {
    x_tile[column] = add ? x_tile[column] + x_sum[column] : x_sum[column];
    h_tile[column] = add ? h_tile[column] + h_sum[column] : h_sum[column];
  }
}

// The input's and the state's products of a row, each as multiply_tile has it.
template <int COLUMNS>
static void multiply_both(int64_t x_depth, int64_t h_depth, const float* x, const float* x_panel,
                          const float* h, const float* h_panel, Vector* x_tile, Vector* h_tile) {
  int64_t k = 0;
  for (; k == 0 || (k < x_depth && k < h_depth); k += kChain) {
    multiply_chains<COLUMNS>(smaller(kChain, x_depth - k), smaller(kChain, h_depth - k), x + k,
                             x_panel + k * COLUMNS * kWidth, h + k, h_panel + k * COLUMNS * kWidth,
                             k > 0, x_tile, h_tile);
  }
  const auto rest = [k](int64_t depth, const float* a, const float* panel, Vector* tile) {
    for (int64_t at = k; at < depth; at += kChain) {
      multiply_chain<COLUMNS, 1>(smaller(kChain, depth - at), a + at, 0,
                                 panel + at * COLUMNS * kWidth, true, tile);
    }
  };
  rest(x_depth, x, x_panel, x_tile);
  rest(h_depth, h, h_panel, h_tile);
}

// Which columns of a packed matrix of `units` columns a panel has, and where its data begin.
template <class Word>
struct StepPanel {
  int64_t unit;
  int vectors;  // per gate
  const Word* data;

  StepPanel(const void* matrix, int gates, int64_t depth, int64_t units, int64_t index) {
    unit = index * step_vectors(gates) * kStepWidth;
    vectors = (int)smaller(step_vectors(gates), ceil_div(units - unit, kStepWidth));
    data = (const Word*)matrix + unit * gates * (kOfHalves<Word> ? ceil_div(depth, 2) : depth);
  }
};

template <class Cell, class Word>
static void packed_step_of(const PackedStepParams& p, int64_t begin, int64_t end) {
  constexpr int G = Cell::kGates, kTile = kStepRows * kMaxColumns * kStepParts;
  constexpr int kColumns = G * step_vectors(G);  // of all panels but perhaps the last
  // Where registers hold both products of a row.
  constexpr bool kTogether = kStepParts == 1 && !kOfHalves<Word>;
  const int64_t hidden = p.hidden;
  const Share all{0, 0, 1, p.batch, 0, 0};
  float* h = p.unprojected ? p.unprojected : p.h;
  const ForwardRows r{.h_prev = rows_of(p.h_prev, 0, p.output, all),
                      .c_prev = rows_of_or_null(p.c_prev, 0, hidden, all),
                      .y = rows_of(h, 0, hidden, all),
                      .c = rows_of_or_null(p.c, 0, hidden, all)};
  // The cells of a panel's units, of row m of the tiles.
  const auto finish = [&](int64_t row, int m, int64_t first, int parts, const Vector* input_tile,
                          const Vector* hidden_tile) __attribute__((always_inline)) {
    for (int part = 0; part < parts; part++) {
      const int64_t unit = first + part * kWidth;
      if (unit >= hidden) break;
      const int valid = valid_lanes(unit, hidden);
      Vector gx[G], gh[G];
      FUSED_RNN_UNROLL
      for (int gate = 0; gate < G; gate++) {
        const int at = (m * G + gate) * parts + part;
        gx[gate] = input_tile[at];
        gh[gate] = hidden_tile[at];
        if (p.bias) gx[gate] += load(p.bias + gate * hidden + unit, valid);
      }
      if constexpr (G == 3) {
        if (p.hidden_bias) gh[2] += load(p.hidden_bias + unit, valid);
      }
      forward_units<Cell>(r, row, unit, hidden, valid, gx, gh);
    }
  };
  for (int64_t index = begin; index < end; index++) {
    const StepPanel<Word> side(p.w_ih, G, p.input, hidden, index);
    const StepPanel<Word> panel(p.w_hh, G, p.output, hidden, index);
    const int columns = G * panel.vectors, parts = panel.vectors * kStepParts;
    Vector input_tile[kTile], hidden_tile[kTile];
    if constexpr (kTogether) {
      if (p.batch == 1 && columns == kColumns) {
        multiply_both<kColumns>(p.input, p.output, p.x, side.data, p.h_prev, panel.data, input_tile,
                                hidden_tile);
        finish(0, 0, panel.unit, kColumns / G, input_tile, hidden_tile);
        continue;
      }
    }
    for (int64_t row = 0; row < p.batch; row += kStepRows) {
      const int rows = (int)smaller(kStepRows, p.batch - row);
      multiply_step(columns, rows, p.input, p.x + row * p.x_stride, p.x_stride, side.data,
                    input_tile);
      multiply_step(columns, rows, p.output, r.h_prev[row], p.output, panel.data, hidden_tile);
      for (int m = 0; m < rows; m++) {
        finish(row + m, m, panel.unit, parts, input_tile, hidden_tile);
      }
    }
  }
}

template <class Word>
static void packed_step_from(const PackedStepParams& p, int64_t begin, int64_t end) {
  switch (p.cell) {
    case CellKind::rnn_tanh:
      return packed_step_of<RnnCell<Math, false>, Word>(p, begin, end);
    case CellKind::rnn_relu:
      return packed_step_of<RnnCell<Math, true>, Word>(p, begin, end);
    case CellKind::gru:
      return packed_step_of<GruCell<Math>, Word>(p, begin, end);
    case CellKind::lstm:
      return packed_step_of<LstmCell<Math>, Word>(p, begin, end);
    case CellKind::gru_reset_before:
      return;  // stepper.cpp refuses it
  }
}

static void packed_step(const PackedStepParams& p, int64_t begin, int64_t end) {
  (p.half ? packed_step_from<HalfPair> : packed_step_from<float>)(p, begin, end);
}

template <class Word>
static void project_step_from(const PackedStepParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; index++) {
    const StepPanel<Word> panel(p.w_hr, 1, p.hidden, p.output, index);
    const int parts = panel.vectors * kStepParts;
    for (int64_t row = 0; row < p.batch; row += kStepRows) {
      const int rows = (int)smaller(kStepRows, p.batch - row);
      Vector tile[kStepRows * kMaxColumns * kStepParts];
      multiply_step(panel.vectors, rows, p.hidden, p.unprojected + row * p.hidden, p.hidden,
                    panel.data, tile);
      for (int m = 0; m < rows; m++) {
        for (int part = 0; part < parts; part++) {
          const int64_t unit = panel.unit + part * kWidth;
          if (unit >= p.output) break;
          store(p.h + (row + m) * p.output + unit, tile[m * parts + part],
                valid_lanes(unit, p.output));
        }
      }
    }
  }
}

static void project_step(const PackedStepParams& p, int64_t begin, int64_t end) {
  (p.half ? project_step_from<HalfPair> : project_step_from<float>)(p, begin, end);
}

#endif
