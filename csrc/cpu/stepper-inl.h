// A timestep of a few rows from weights that were packed in advance. The sums are those of the
// forward scan, in the same order: a stepper gives bit for bit what a sequence gives.

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
  const int64_t hidden = p.hidden;
  const Share all{0, 0, 1, p.batch, 0, 0};
  float* h = p.unprojected ? p.unprojected : p.h;
  const ForwardRows r{.h_prev = rows_of(p.h_prev, 0, p.output, all),
                      .c_prev = rows_of_or_null(p.c_prev, 0, hidden, all),
                      .y = rows_of(h, 0, hidden, all),
                      .c = rows_of_or_null(p.c, 0, hidden, all)};
  for (int64_t index = begin; index < end; index++) {
    const StepPanel<Word> side(p.w_ih, G, p.input, hidden, index);
    const StepPanel<Word> panel(p.w_hh, G, p.output, hidden, index);
    const int columns = G * panel.vectors, parts = panel.vectors * kStepParts;
    for (int64_t row = 0; row < p.batch; row += kStepRows) {
      const int rows = (int)smaller(kStepRows, p.batch - row);
      Vector input_tile[kTile], hidden_tile[kTile];
      multiply_step(columns, rows, p.input, p.x + row * p.x_stride, p.x_stride, side.data,
                    input_tile);
      multiply_step(columns, rows, p.output, r.h_prev[row], p.output, panel.data, hidden_tile);
      for (int m = 0; m < rows; m++) {
        for (int part = 0; part < parts; part++) {
          const int64_t unit = panel.unit + part * kWidth;
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
          forward_units<Cell>(r, row + m, unit, hidden, valid, gx, gh);
        }
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
