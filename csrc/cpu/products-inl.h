// What the gradients of a chunk's gates become: gradients of x, of the weights and of the biases.

// A chunk should stay in L2, but with few rows the gradients of large weights are added to too
// often. AMX waits for memory sooner than for products: backward of LSTM at (T, B, H) = (256, 64,
// 128) and (128, 32, 256) took 68 and 39 ms with 8 MiB, 44 and 32 with 2. Elsewhere small weights
// gain: on an Ice Lake training of 64 to 160 units was 1.07 to 1.19 times as fast with 1 MiB as
// with 8, of 192 1.0 to 1.13, of 256 0.97 to 1.04.
#if defined(FUSED_RNN_AMX)
constexpr int64_t kChunkBytes = 2 << 20, kChunkRows = 512;
constexpr int64_t kSmallChunkBytes = kChunkBytes, kSmallChunkRows = kChunkRows;
#else
constexpr int64_t kChunkBytes = 8 << 20, kChunkRows = 64;
constexpr int64_t kSmallChunkBytes = 1 << 20, kSmallChunkRows = 256;
#endif

constexpr int64_t kDepthGroup = 512;

// How many rows at a time the gradient of x has: as many as stay in L2 for all panels, if they are
// more than twice what a panel has columns; for every group the panels are read again, as the rows
// otherwise are for every panel. With AVX2 on a Zen 3 it took 1.2 times less at H=128 and 1.1 at
// 256.
FUSED_RNN_INLINE int64_t input_grad_rows(const PackedMatrix& w_ih, int64_t stride, int64_t rows) {
  constexpr int64_t kBytes = 256 << 10;
  const int64_t group = kBytes / (stride * (int64_t)sizeof(Element));
  return w_ih.parts > 1 || group < 2 * kMaxColumns * kWidth ? rows : group / kMaxRows * kMaxRows;
}

static void input_grad(const InputGradParams& p, int64_t row_begin, int64_t row_end,
                       float* memory) {
  const TileSession session;
  const int64_t input = p.w_ih.columns, depth = p.w_ih.depth, stride = p.grad_gates_stride;
  const Operand grads = operand_of(p.w_ih, {p.grad_gates + row_begin * stride, stride}, 0,
                                   row_end - row_begin, memory);
  Tiles<bool> tiles;  // whose `from` says whether grad_x is added to
  const auto pointwise = [&](const Tile<bool>& tile, const auto& pause) {
    const Columns& panel = tile.panel;
    for (int m = 0; m < tile.rows; m++) {
      for (int v = 0; v < panel.vectors; v++) {
        const int64_t column = panel.column + v * kWidth;
        const int valid = valid_lanes(column, input);
        Element* to = p.grad_x + (row_begin + tile.first + m) * input + column;
        Vector sum = tile.product[m * panel.vectors + v];
        if (tile.from) sum += load(to, valid);
        pause();
        store(to, sum, valid);
      }
    }
  };
  constexpr bool kOnTop[] = {false, true};
  const auto multiply_group = [&](int64_t row, int64_t end, int64_t begin, int64_t depth_end) {
    for_each_panel(p.w_ih, all_panels(p.w_ih), 1, 0, [&](Panel& panel) {
      panel.begin = begin;
      panel.end = depth_end;
      for_each_tile(row, end, panel, panel.vectors, [&](int64_t first, int rows) {
        tiles.add(panel.vectors, kOnTop[p.accumulate || begin > 0], grads, first, rows, panel,
                  pointwise);
      });
    });
  };
  const int64_t all = row_end - row_begin, group = input_grad_rows(p.w_ih, stride, all);
  // In parts, so much depth at a time that the rows' part stays in L2 for all panels.
  const int64_t depth_group = p.w_ih.parts > 1 ? kDepthGroup : depth;
  for (int64_t row = 0; row < all; row += group) {
    for (int64_t begin = 0; begin < depth; begin += depth_group) {
      multiply_group(row, smaller(row + group, all), begin, smaller(begin + depth_group, depth));
    }
  }
  tiles.finish(pointwise);
}

// Rows in parts are zero up to a multiple of a tile.
FUSED_RNN_INLINE int64_t transposed_rows(const TransposeParams& p) {
#if defined(FUSED_RNN_PARTS)
  if (p.parts > 1) return row_depth(p.rows);
#endif
  return p.rows;
}

FUSED_RNN_INLINE void store_transposed(const TransposeParams& p, int64_t column, int64_t row,
                                       Vector v) {
  Element* to = p.transposed + column * p.stride;
#if defined(FUSED_RNN_PARTS)
  if (p.parts > 1) {
    BFloat16* to_parts = (BFloat16*)to;
    Parts parts;
    unsigned& exceptional = exceptional_of(to_parts, p.rows);
    exceptional = cut(v, parts) | (row > 0 ? exceptional : 0);
    // The second half of a tile's depth comes after the first.
    const bool second_half = row % kTileDepth >= kWidth;
    FUSED_RNN_UNROLL
    for (int part = 0; part < kParts; part++) {
      float* words = words_at(to_parts, p.rows, part, row / kTileDepth * kTileDepth);
      const Vector nothing{};
      const Vector first = words_of(parts.part[part], nothing);
      store(words, second_half ? (Vector)((VectorBits)load(words) |
                                          (VectorBits)words_of(nothing, parts.part[part]))
                               : first);
    }
    return;
  }
#endif
  store(to + row, v);
}

// So many rows' gradients are added up before they go to the sum of all.
constexpr int64_t kSumBlock = 256;

static void transpose_grads(const TransposeParams& p, int64_t begin, int64_t end) {
  const int64_t first = begin * kWidth, last = smaller(end * kWidth, p.width);
  float *const lost = p.sums + p.width, *const block_sums = lost + p.width;
  for (int64_t column = first; !p.accumulate && column < last; column++) {
    p.sums[column] = lost[column] = block_sums[column] = 0.0f;
  }
  const int64_t row_end = transposed_rows(p);
  // Row blocks outside: memory is read in the order in which it lies.
  for (int64_t row = 0; row < row_end; row += kWidth) {
    const int rows = row < p.rows ? valid_lanes(row, p.rows) : 0;
    const bool ends_block = (row + kWidth) % kSumBlock == 0 || row + kWidth >= row_end;
    for (int64_t column = first; column < last; column += kWidth) {
      const int valid = valid_lanes(column, p.width);
      Vector block[kWidth], sum{};
      FUSED_RNN_UNROLL
      for (int i = 0; i < kWidth; i++) {
        block[i] = i < rows ? load(p.grads + (row + i) * p.width + column, valid) : Vector{};
        sum += block[i];
      }
      sum += load(block_sums + column, valid);
      if (ends_block) {
        CompensatedSum all{load(p.sums + column, valid), load(lost + column, valid)};
        all.add(sum);
        store(p.sums + column, all.sum, valid);
        store(lost + column, all.lost, valid);
        sum = Vector{};
      }
      store(block_sums + column, sum, valid);
      transpose(block);
      FUSED_RNN_UNROLL
      for (int i = 0; i < kWidth; i++) {
        if (i < valid) store_transposed(p, column + i, row, block[i]);
      }
    }
  }
}

#if defined(FUSED_RNN_AMX)
constexpr int kGradRows = kTileRows;
#else
constexpr int kGradRows = vector_rows(kMaxColumns);
#endif

// torch.nn adds up a product for every timestep, of as many rows as the batch has.
constexpr int64_t kGradChain = kChain / 2;

constexpr int64_t kGroupBytes = 512 << 10, kPanelWords = 4 << 10;

// Each chunk's sum starts at zero and is added as a whole: the rounding errors of a long sequence
// then grow with the square root of a chunk, not of the sequence.
static void weight_grad(const WeightGradParams& p, int64_t begin, int64_t end) {
  const TileSession session;
  const int64_t columns = p.packed.columns;
  const int64_t row_begin = begin * kGradRows, row_end = smaller(end * kGradRows, p.rows);
  const Operand grads{p.transposed, p.stride, (const BFloat16*)p.transposed,
                      p.stride * (int64_t)(sizeof(Element) / sizeof(BFloat16))};
  Tiles<WeightGradParams> tiles;
  const auto pointwise = [&](const Tile<WeightGradParams>& tile, const auto& pause) {
    const Columns& panel = tile.panel;
    for (int m = 0; m < tile.rows; m++) {
      const int64_t turned = tile.first + m + p.rotate;
      const int64_t row = turned < p.rows ? turned : turned - p.rows;
      for (int v = 0; v < panel.vectors; v++) {
        const int64_t column = panel.column + v * kWidth;
        const int valid = valid_lanes(column, columns);
        const int64_t at = row * columns + column;
        Vector sum = tile.product[m * panel.vectors + v];
        if (p.from_before) sum += load(p.sums + at, valid);
        pause();
        if (p.is_last) {
          store(p.grad + at, sum, valid);
        } else {
          store(p.sums + at, sum, valid);
        }
      }
    }
  };
  const auto ask = [&](const WeightGradParams& from, int64_t row, int rows, const Columns& panel) {
    if (!from.from_before) return;
    prefetch(from.sums + (row + from.rotate) % from.rows * columns + panel.column, columns, rows,
             panel.vectors);
  };
  // So many rows at a time that they stay in L2 for all panels; where these stay in L1, a tile's,
  // so that memory is written in the order in which it lies.
  const int64_t row_bytes = p.stride * (int64_t)sizeof(Element);
  const int64_t panel_words = column_words(p.packed.depth, p.packed.parts) * columns;
  const int64_t group = panel_words <= kPanelWords
                            ? kGradRows
                            : ceil_div(kGroupBytes, row_bytes * kGradRows) * kGradRows;
  for (int64_t first = row_begin; first < row_end; first += group) {
    for_each_panel(p.packed, all_panels(p.packed), 1, 0, [&](Panel& panel) {
      panel.chain = kGradChain;
      const auto add = [&](int64_t row, int rows) {
        tiles.add(panel.vectors, p, grads, row, rows, panel, pointwise, ask);
      };
      for_each_tile(first, smaller(first + group, row_end), panel, panel.vectors, add);
    });
  }
  tiles.finish(pointwise, ask);
}
