// Matrices into the layout of PackedMatrix.

template <int GATES>
static void pack_gates_panel(const float* weights, const PackedMatrix& m, int64_t index) {
  const Panel panel(m, index, GATES);
  const int64_t k_stride = (int64_t)GATES * panel.vectors * kWidth;
  for (int gate = 0; gate < GATES; gate++) {
    for (int v = 0; v < panel.vectors; v++) {
      const int64_t unit = panel.column + v * kWidth;
      const int valid = valid_lanes(unit, m.columns);
      const float* from = weights + (gate * m.columns + unit) * m.depth;
      float* to = const_cast<float*>(panel.data) + (gate * panel.vectors + v) * kWidth;
      for (int64_t k = 0; k < m.depth; k += kWidth) {
        const int depth = valid_lanes(k, m.depth);
        Vector block[kWidth];
        FUSED_RNN_UNROLL
        for (int i = 0; i < kWidth; i++) {
          block[i] = i < valid ? load(from + i * m.depth + k, depth) : Vector{};
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

static void pack_gates(const PackGatesParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; index++) {
    switch (p.gates) {
      case 3:
        pack_gates_panel<3>(p.weights, p.packed, index);
        break;
      case 4:
        pack_gates_panel<4>(p.weights, p.packed, index);
        break;
      default:
        pack_gates_panel<1>(p.weights, p.packed, index);
    }
  }
}

// Columns of one row into a panel; returns where the next row goes.
FUSED_RNN_INLINE float* pack_row(const float* row, const Panel& panel, int64_t columns, float* to) {
  for (int v = 0; v < panel.vectors; v++) {
    const int64_t column = panel.column + v * kWidth;
    store(to, load(row + column, valid_lanes(column, columns)));
    to += kWidth;
  }
  return to;
}

static void pack_columns(const PackColumnsParams& p, int64_t begin, int64_t end) {
  const int64_t depth = p.packed.depth, columns = p.packed.columns;
  for (int64_t index = begin; index < end; index++) {
    const Panel panel(p.packed, index, 1);
    float* to = const_cast<float*>(panel.data);
    for (int64_t k = 0; k < depth; k++) {
      const int64_t row = k + p.rotate < depth ? k + p.rotate : k + p.rotate - depth;
      to = pack_row(p.matrix + row * columns, panel, columns, to);
    }
  }
}

// The same with o * tanh(c) of a projected LSTM, computed anew from what is saved.
FUSED_RNN_INLINE float* pack_unprojected_row(const BackwardCall& call, int64_t row,
                                             const Panel& panel, float* to) {
  const int64_t hidden = call.shape.hidden;
  const float* o = call.gates + (row * LstmCell<Math>::kSavedGates + 3) * hidden;
  const float* c = call.cells + row * hidden;
  for (int v = 0; v < panel.vectors; v++) {
    const int64_t unit = panel.column + v * kWidth;
    const int valid = valid_lanes(unit, hidden);
    store(to, load(o + unit, valid) * Math::tanh(load(c + unit, valid)));
    to += kWidth;
  }
  return to;
}

static void pack_rows(const PackRowsParams& p, int64_t begin, int64_t end) {
  const BackwardCall& call = *p.call;
  const LayerShape& shape = call.shape;
  const int64_t d = p.direction, output = shape.output, width = shape.directions * output;
  const float* y = call.y + d * output;
  const float* h0 = call.h0 + d * shape.rows.batch * output;
  const int64_t row_end = p.chunk.first_row + p.chunk.rows;
  const Share all{d, 0, 1, shape.rows.batch, 0, 0};
  for (int64_t index = begin; index < end; index++) {
    const Panel panel(p.packed, index, 1);
    float* to = const_cast<float*>(panel.data);
    if (p.source == RowSource::x) {
      for (int64_t row = p.chunk.first_row; row < row_end; row++) {
        to = pack_row(call.x + row * shape.input, panel, shape.input, to);
      }
      continue;
    }
    if (p.source == RowSource::unprojected) {
      for (int64_t row = p.chunk.first_row; row < row_end; row++) {
        to = pack_unprojected_row(call, d * shape.count + row, panel, to);
      }
      continue;
    }
    for (int64_t t = p.chunk.begin; t < p.chunk.end; t++) {
      const Step step(shape.rows, all, d == 1 ? shape.rows.timesteps - 1 - t : t);
      for (int64_t i = 0; i < step.from_previous; i++) {
        to = pack_row(y + (offset(shape.rows, step.previous) + i) * width, panel, output, to);
      }
      for (int64_t i = step.from_previous; i < step.rows; i++) {
        to = pack_row(h0 + i * output, panel, output, to);
      }
    }
  }
}
