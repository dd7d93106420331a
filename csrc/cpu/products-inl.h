// What the gradients of a chunk's gates become: gradients of x, of the weights and of the biases.

static void input_grad(const InputGradParams& p, int64_t row_begin, int64_t row_end) {
  const int64_t input = p.w_ih.columns;
  for (int64_t j = 0; j < panel_count(p.w_ih, kWidth); j++) {
    const Panel panel(p.w_ih, j, 1);
    for_each_tile(row_begin, row_end, panel.vectors, [&](int64_t first, int rows) {
      Vector tile[kMaxRows * kMaxColumns];
      multiply(panel.vectors, rows, p.w_ih.depth, p.grad_gates + first * p.grad_gates_stride,
               p.grad_gates_stride, panel.data, tile);
      for (int m = 0; m < rows; m++) {
        for (int v = 0; v < panel.vectors; v++) {
          const int64_t column = panel.column + v * kWidth;
          const int valid = valid_lanes(column, input);
          Element* to = p.grad_x + (first + m) * input + column;
          Vector sum = tile[m * panel.vectors + v];
          if (p.accumulate) sum += load(to, valid);
          store(to, sum, valid);
        }
      }
    });
  }
}

static void transpose_grads(const TransposeParams& p, int64_t begin, int64_t end) {
  const int64_t first = begin * kWidth, last = smaller(end * kWidth, p.width);
  for (int64_t column = first; !p.accumulate && column < last; column++) p.sums[column] = 0.0f;
  // Row blocks outside: memory is read in the order in which it lies.
  for (int64_t row = 0; row < p.rows; row += kWidth) {
    const int rows = valid_lanes(row, p.rows);
    for (int64_t column = first; column < last; column += kWidth) {
      const int valid = valid_lanes(column, p.width);
      Vector block[kWidth], sum{};
      FUSED_RNN_UNROLL
      for (int i = 0; i < kWidth; i++) {
        block[i] = i < rows ? load(p.grads + (row + i) * p.width + column, valid) : Vector{};
        sum += block[i];
      }
      store(p.sums + column, load(p.sums + column, valid) + sum, valid);
      transpose(block);
      FUSED_RNN_UNROLL
      for (int i = 0; i < kWidth; i++) {
        if (i < valid) store(p.transposed + (column + i) * p.stride + row, block[i]);
      }
    }
  }
}

constexpr int kGradRows = tile_rows(kMaxColumns);

// Each chunk's sum starts at zero and is added as a whole: the rounding errors of a long sequence
// then grow with the square root of a chunk, not of the sequence.
static void weight_grad(const WeightGradParams& p, int64_t begin, int64_t end) {
  const int64_t columns = p.packed.columns;
  for (int64_t j = 0; j < panel_count(p.packed, kWidth); j++) {
    const Panel panel(p.packed, j, 1);
    for (int64_t first = begin * kGradRows; first < smaller(end * kGradRows, p.rows);
         first += kGradRows) {
      const int rows = (int)smaller(kGradRows, p.rows - first);
      Vector tile[kMaxRows * kMaxColumns];
      if (p.accumulate) {
        prefetch(p.grad + (first + p.rotate) % p.rows * columns + panel.column, columns, rows,
                 panel.vectors);
      }
      multiply(panel.vectors, rows, p.packed.depth, p.transposed + first * p.stride, p.stride,
               panel.data, tile);
      for (int m = 0; m < rows; m++) {
        const int64_t row =
            first + m + p.rotate < p.rows ? first + m + p.rotate : first + m + p.rotate - p.rows;
        for (int v = 0; v < panel.vectors; v++) {
          const int64_t column = panel.column + v * kWidth;
          const int valid = valid_lanes(column, columns);
          float* to = p.grad + row * columns + column;
          Vector sum = tile[m * panel.vectors + v];
          if (p.accumulate) sum += load(to, valid);
          store(to, sum, valid);
        }
      }
    }
  }
}
