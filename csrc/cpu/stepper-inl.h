// A timestep of a few rows from weights that were packed in advance. The sums are those of the
// forward scan without parts, in the same order: a stepper gives bit for bit what a sequence gives,
// unless that is short enough to be computed from unpacked weights.

#if !defined(FUSED_RNN_BFLOAT16)

constexpr int kStepParts = kStepWidth / kWidth;  // vectors of this instruction set in one of those
// Where vectors are narrower than the layout's, the registers hold all columns of a panel for one
// row only. Of more rows so many columns are multiplied at a time.
constexpr int kStepColumns = kTwoColumnsAtATime ? 2 : kMaxColumns;
template <class Word>  // of which those of several numbers need registers to take them apart
constexpr int kStepRows =
    kStepParts == 1                                   ? 6
    : kTwoColumnsAtATime && kNumbersOf<Word> > kPairs ? 4
                                                      : vector_rows(kStepColumns);

// Calls multiply.operator()<COLUMNS, ROWS, ALL>(first) for pieces of the columns of a panel,
// `first` being a piece's first one, ALL how many there are, and ROWS those of a tile of `rows`, up
// to MOST.
template <int MOST, class Multiply>
FUSED_RNN_INLINE void for_pieces(int columns, int rows, Multiply multiply) {
  for_columns(columns, [&]<int COLUMNS>() {
    constexpr int ALL = COLUMNS * kStepParts;
    // Of two rows, two columns are too few sums to hide the latency of multiply-adds.
    constexpr int kWide = ALL % 4 == 0 ? 4 : ALL % 3 == 0 ? 3 : 2;
    if constexpr (kStepParts == 1) {
      multiply.template operator()<ALL, MOST, ALL>(0);
    } else if (rows == 1) {
      multiply.template operator()<ALL, 1, ALL>(0);
    } else if (rows == 2) {
      for (int i = 0; i < ALL; i += kWide) multiply.template operator()<kWide, 2, ALL>(i);
    } else if (kTwoColumnsAtATime && MOST == vector_rows(kStepColumns) && rows == 3) {
      for (int i = 0; i < ALL; i += kWide) multiply.template operator()<kWide, 3, ALL>(i);
    } else {
      for (int i = 0; i < ALL; i += kStepColumns) {
        multiply.template operator()<kStepColumns, MOST, ALL>(i);
      }
    }
  });
}

// tile [rows][columns][kStepParts] = those rows of `a`, from `row` on, times a panel of the
// stepper's layout.
template <class Word>
static void multiply_step(int columns, int rows, int64_t depth, const StepRows& a, int64_t row,
                          const Word* panel, Vector* tile) {
  const float* first = a.first + row * a.stride;
  if constexpr (kStepParts == 1 && kNumbersOf<Word> < 4) {
    multiply_words(columns, rows, depth, first, a.stride, panel, tile);
  } else {
    for_pieces<kStepRows<Word>>(columns, rows, [&]<int COLUMNS, int ROWS, int ALL>(int column) {
      const Word* words = panel + column * kWidth;
      if constexpr (kNumbersOf<Word> == 4) {
        multiply_bytes_of<COLUMNS, ROWS, ALL>(rows, depth, a, row, words, tile + column);
      } else {
        multiply_rows<COLUMNS, ROWS, ALL>(rows, depth, first, a.stride, words, tile + column);
      }
    });
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
    data = (const Word*)matrix + unit * gates * ceil_div(depth, kNumbersOf<Word>);
  }
};

// A sum of bytes' products, times the units' scales.
template <class Word>
FUSED_RNN_INLINE Vector scaled(Vector sum, const float* scales, int64_t column, int valid) {
  return kNumbersOf<Word> == 4 ? sum * load(scales + column, valid) : sum;
}

// Calls each(row, unit, valid, sums) for vectors of units of the panels [begin, end) of `matrix`
// and every row of `a`, sums being those of each gate, times the units' scales if there are any.
template <class Word, int G, class Each>
FUSED_RNN_INLINE void for_products(const void* matrix, const float* scales, int64_t depth,
                                   int64_t units, int64_t batch, const StepRows& a, int64_t begin,
                                   int64_t end, Each each) {
  for (int64_t index = begin; index < end; index++) {
    const StepPanel<Word> panel(matrix, G, depth, units, index);
    const int parts = panel.vectors * kStepParts;
    for (int64_t row = 0; row < batch; row += kStepRows<Word>) {
      const int rows = (int)smaller(kStepRows<Word>, batch - row);
      Vector tile[kStepRows<Word> * kMaxColumns * kStepParts];
      multiply_step(G * panel.vectors, rows, depth, a, row, panel.data, tile);
      for (int m = 0; m < rows; m++) {
        for (int part = 0; part < parts; part++) {
          const int64_t unit = panel.unit + part * kWidth;
          if (unit >= units) break;
          const int valid = valid_lanes(unit, units);
          Vector sums[G];
          FUSED_RNN_UNROLL
          for (int gate = 0; gate < G; gate++) {
            sums[gate] = scaled<Word>(tile[(m * G + gate) * parts + part], scales,
                                      gate * units + unit, valid);
          }
          each(row + m, unit, valid, sums);
        }
      }
    }
  }
}

template <class Cell, class Word>
static void packed_input_of(const PackedStepParams& p, int64_t begin, int64_t end) {
  constexpr int G = Cell::kGates;
  for_products<Word, G>(
      p.w_ih, p.scale_ih, p.input, p.hidden, p.batch, p.x, begin, end,
      [&](int64_t row, int64_t unit, int valid, const Vector* sums) __attribute__((always_inline)) {
        FUSED_RNN_UNROLL
        for (int gate = 0; gate < G; gate++) {
          const int64_t at = gate * p.hidden + unit;
          const Vector sum = p.bias ? sums[gate] + load(p.bias + at, valid) : sums[gate];
          store(p.input_side + row * G * p.hidden + at, sum, valid);
        }
      });
}

template <class Cell, class Word>
static void packed_step_of(const PackedStepParams& p, int64_t begin, int64_t end) {
  constexpr int G = Cell::kGates, kTile = kStepRows<Word> * kMaxColumns * kStepParts;
  constexpr int kColumns = G * step_vectors(G);  // of all panels but perhaps the last
  // Where registers hold both products of a row.
  constexpr bool kTogether = kStepParts == 1 && kNumbersOf<Word> == 1;
  const int64_t hidden = p.hidden;
  const Share all{0, 0, 1, p.batch, 0, 0};
  const ForwardRows r{.h_prev = {p.h_prev.first, p.h_prev.stride},
                      .c_prev = rows_of_or_null(p.c_prev, 0, hidden, all),
                      .y = rows_of(p.unprojected ? p.unprojected : p.h, 0, hidden, all),
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
        const int64_t at = (m * G + gate) * parts + part, column = gate * hidden + unit;
        gh[gate] = scaled<Word>(hidden_tile[at], p.scale_hh, column, valid);
        if (p.input_side) {
          gx[gate] = load(p.input_side + row * G * hidden + column, valid);
        } else {
          gx[gate] = scaled<Word>(input_tile[at], p.scale_ih, column, valid);
          if (p.bias) gx[gate] += load(p.bias + column, valid);
        }
      }
      if constexpr (G == 3) {
        if (p.hidden_bias) gh[2] += load(p.hidden_bias + unit, valid);
      }
      forward_units<Cell>(r, row, unit, hidden, valid, gx, gh);
    }
  };
  for (int64_t number = begin; number < end; number++) {
    const int64_t index = p.backwards ? end - 1 - (number - begin) : number;
    const StepPanel<Word> side(p.w_ih, G, p.input, hidden, index);
    const StepPanel<Word> panel(p.w_hh, G, p.output, hidden, index);
    const int columns = G * panel.vectors, parts = panel.vectors * kStepParts;
    Vector input_tile[kTile], hidden_tile[kTile];
    if constexpr (kTogether) {
      if (p.batch == 1 && columns == kColumns && !p.input_side) {
        multiply_both<kColumns>({p.input, p.x.first, side.data, input_tile},
                                {p.output, p.h_prev.first, panel.data, hidden_tile});
        finish(0, 0, panel.unit, kColumns / G, input_tile, hidden_tile);
        continue;
      }
    }
    for (int64_t row = 0; row < p.batch; row += kStepRows<Word>) {
      const int rows = (int)smaller(kStepRows<Word>, p.batch - row);
      if (!p.input_side) {
        multiply_step(columns, rows, p.input, p.x, row, side.data, input_tile);
      }
      multiply_step(columns, rows, p.output, p.h_prev, row, panel.data, hidden_tile);
      for (int m = 0; m < rows; m++) {
        finish(row + m, m, panel.unit, parts, input_tile, hidden_tile);
      }
    }
  }
}

// Calls body.operator()<Word>().
template <class Body>
FUSED_RNN_INLINE void for_word(StepWord word, Body body) {
  switch (word) {
    case StepWord::one_float:
      return body.template operator()<float>();
    case StepWord::two_halves:
      return body.template operator()<HalfPair>();
    case StepWord::four_bytes:
      return body.template operator()<ByteQuad>();
  }
}

// Calls body.operator()<Cell, Word>().
template <class Body>
FUSED_RNN_INLINE void for_packed_cell(const PackedStepParams& p, Body body) {
  for_word(p.word, [&]<class Word>() {
    switch (p.cell) {
      case CellKind::rnn_tanh:
        return body.template operator()<RnnCell<Math, false>, Word>();
      case CellKind::rnn_relu:
        return body.template operator()<RnnCell<Math, true>, Word>();
      case CellKind::gru:
        return body.template operator()<GruCell<Math>, Word>();
      case CellKind::lstm:
        return body.template operator()<LstmCell<Math>, Word>();
      case CellKind::gru_reset_before:
        return;  // stepper.cpp refuses it
    }
  });
}

static void packed_step(const PackedStepParams& p, int64_t begin, int64_t end) {
  for_packed_cell(p, [&]<class Cell, class Word>() { packed_step_of<Cell, Word>(p, begin, end); });
}

static void packed_input(const PackedStepParams& p, int64_t begin, int64_t end) {
  for_packed_cell(p, [&]<class Cell, class Word>() { packed_input_of<Cell, Word>(p, begin, end); });
}

static void project_step(const PackedStepParams& p, int64_t begin, int64_t end) {
  for_word(p.word, [&]<class Word>() {
    for_products<Word, 1>(
        p.w_hr, p.scale_hr, p.hidden, p.output, p.batch, p.cells, begin, end,
        [&](int64_t row, int64_t unit, int valid, const Vector* sums)
            __attribute__((always_inline)) { store(p.h + row * p.output + unit, *sums, valid); });
  });
}

#endif
