// A product of few rows, from a matrix that stays where it lies: packing it would cost more.

// The sums of six rows in two columns fill 16 registers, in four those of AVX-512.
constexpr int kUnpackedColumns = FUSED_RNN_VECTOR_WIDTH == 16 ? 4 : 2;
constexpr int kUnpackedRows = vector_rows(kUnpackedColumns);

// More rows are faster from packed weights, of BFloat16 soon: pairs of it are multiplied at twice
// the rate, and by AMX at many times (that limit is a guess, no such CPU has measured it).
#if !defined(FUSED_RNN_BFLOAT16)
constexpr int kMostUnpackedRows = 96;
#elif !defined(FUSED_RNN_AMX)
constexpr int kMostUnpackedRows = 16;
#else
constexpr int kMostUnpackedRows = 8;
#endif

// So many of the matrix's rows ahead are asked for: pieces of them, far apart.
constexpr int64_t kRowsAhead = 8;

// COLUMNS vectors of columns, of the last of which `valid` are there.
template <int COLUMNS>
struct UnpackedBlock {
  int64_t column;
  int valid;

  FUSED_RNN_INLINE_METHOD int valid_of(int v) const { return v == COLUMNS - 1 ? valid : kWidth; }
};

// sums [ROWS, COLUMNS] = or += what one chain of the depth, see tile-inl.h, gives of rows from
// `row` on.
template <int COLUMNS, int ROWS, class To>
static void unpacked_chain(const UnpackedParamsOf<Element, To>& p, UnpackedBlock<COLUMNS> block,
                           int64_t begin, int64_t row, Vector* sums) {
  Vector sum[ROWS][COLUMNS];
  FUSED_RNN_UNROLL
  for (int i = 0; i < ROWS; i++) {
    FUSED_RNN_UNROLL
    for (int v = 0; v < COLUMNS; v++) sum[i][v] = Vector{};
  }
  const Element* a = p.rows + row * p.rows_stride;
  const Element* const first = p.matrix + block.column;
  const Element* const last = first + (p.depth - 1) * p.columns;
  const Element* from = first + (begin + p.rotate) % p.depth * p.columns;
  const int64_t end = smaller(begin + kChain, p.depth);
  for (int64_t k = begin; k < end; k++) {
    prefetch(from + kRowsAhead * p.columns, 0, 1, COLUMNS);
    Vector b[COLUMNS];
    FUSED_RNN_UNROLL
    for (int v = 0; v < COLUMNS; v++) b[v] = load(from + v * kWidth, block.valid_of(v));
    FUSED_RNN_UNROLL
    for (int i = 0; i < ROWS; i++) {
      float value;
      convert(a[i * p.rows_stride + k], value);
      FUSED_RNN_UNROLL
      for (int v = 0; v < COLUMNS; v++) sum[i][v] += b[v] * value;
    }
    from = from == last ? first : from + p.columns;
  }
  for (int i = 0; i < ROWS; i++) {
    for (int v = 0; v < COLUMNS; v++) {
      Vector& to = sums[i * COLUMNS + v];
      to = begin > 0 ? to + sum[i][v] : sum[i][v];
    }
  }
}

template <int COLUMNS, int ROWS = kUnpackedRows, class To>
static void unpacked_rows(const UnpackedParamsOf<Element, To>& p, UnpackedBlock<COLUMNS> block,
                          int64_t begin, int64_t row, int rows, Vector* sums) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return unpacked_rows<COLUMNS, ROWS - 1>(p, block, begin, row, rows, sums);
    }
  }
  unpacked_chain<COLUMNS, ROWS>(p, block, begin, row, sums);
}

// Chains outside: for all rows, what one reads of the matrix stays in L2 even where its rows begin
// a power of two apart.
template <int COLUMNS, class To>
static void unpacked_block(const UnpackedParamsOf<Element, To>& p, UnpackedBlock<COLUMNS> block) {
  Vector sums[kMostUnpackedRows * COLUMNS];
  const int64_t tiles = ceil_div(p.row_count, kUnpackedRows);
  for (int64_t begin = 0; begin < p.depth; begin += kChain) {
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t row = p.row_count * tile / tiles;
      const int rows = (int)(p.row_count * (tile + 1) / tiles - row);
      unpacked_rows<COLUMNS>(p, block, begin, row, rows, sums + row * COLUMNS);
    }
  }
  for (int64_t row = 0; row < p.row_count; row++) {
    for (int v = 0; v < COLUMNS; v++) {
      To* to = p.to + row * p.columns + block.column + v * kWidth;
      Vector sum = sums[row * COLUMNS + v];
      if (p.accumulate) sum += load(to, block.valid_of(v));
      store(to, sum, block.valid_of(v));
    }
  }
}

template <int COLUMNS = kUnpackedColumns, class To>
static void unpacked_columns(const UnpackedParamsOf<Element, To>& p, int64_t column) {
  const int64_t columns = p.columns - column;
  if constexpr (COLUMNS > 1) {
    if (columns <= (COLUMNS - 1) * kWidth) return unpacked_columns<COLUMNS - 1>(p, column);
  }
  unpacked_block<COLUMNS>(p, {column, valid_lanes((COLUMNS - 1) * kWidth, columns)});
}

template <class To>
static void unpacked_product(const UnpackedParamsOf<Element, To>& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block++) {
    unpacked_columns(p, block * kUnpackedColumns * kWidth);
  }
}
