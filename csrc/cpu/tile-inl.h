// The register tile that every matrix product here is made of.
//
// Every sum is one chain of multiply-adds in the order of k, so an element does not depend on the
// tile, batch, thread count or vector width it was computed with.

constexpr int kMaxColumns = 4;
constexpr int kMaxRows = 12;

// Rows of a tile of `columns` vectors: as many as the registers hold. AVX-512 and ARM have 32.
// Measured with AVX-512 on a prototype of this tile: 3 columns of 8 rows and 4 of 6 reach 92% of
// FMA peak, 4 of 4 reach 73%.
constexpr int tile_rows(int columns) {
#if FUSED_RNN_VECTOR_WIDTH == 16 || defined(__aarch64__)
  constexpr int rows[] = {12, 12, 8, 6};
#else
  constexpr int rows[] = {8, 6, 4, 3};
#endif
  return rows[columns - 1];
}

FUSED_RNN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// tile [ROWS, COLUMNS] = a [ROWS, depth] times panel [depth, COLUMNS]. Panels are words, but for a
// stepper's, which may be BFloat16 that become floats as they are read.
template <int COLUMNS, int ROWS, class Stored>
__attribute__((noinline)) void multiply_tile(int64_t depth, const Element* a, int64_t a_stride,
                                             const Stored* panel, Vector* tile) {
  Vector sum[ROWS][COLUMNS];
  FUSED_RNN_UNROLL
  for (int row = 0; row < ROWS; row++) {
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++) sum[row][column] = Vector{};
  }
  const auto advance = [&](int64_t k, auto value_at) __attribute__((always_inline)) {
    Vector b[COLUMNS];
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++) b[column] = load(panel + column * kWidth);
    FUSED_RNN_UNROLL
    for (int row = 0; row < ROWS; row++) {
      const Vector value = value_at(a + row * a_stride + k);
      FUSED_RNN_UNROLL
      for (int column = 0; column < COLUMNS; column++) {
        sum[row][column] = multiply_add(sum[row][column], value, b[column]);
      }
    }
    panel += COLUMNS * kWidth;
  };
  int64_t k = 0;
  for (; k + kPairs <= depth; k += kPairs)
    advance(k, [](const Element* p) { return broadcast_word(p); });
#if defined(FUSED_RNN_BFLOAT16)
  if (k < depth) advance(k, [](const Element* p) { return broadcast_last(p); });
#endif
  FUSED_RNN_UNROLL
  for (int row = 0; row < ROWS; row++) {
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++)
      tile[row * COLUMNS + column] = sum[row][column];
  }
}

template <int COLUMNS, int ROWS = tile_rows(COLUMNS), class Stored>
void multiply_rows(int rows, int64_t depth, const Element* a, int64_t a_stride, const Stored* panel,
                   Vector* tile) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      multiply_rows<COLUMNS, ROWS - 1>(rows, depth, a, a_stride, panel, tile);
      return;
    }
  }
  multiply_tile<COLUMNS, ROWS>(depth, a, a_stride, panel, tile);
}

template <class Stored>
static void multiply(int columns, int rows, int64_t depth, const Element* a, int64_t a_stride,
                     const Stored* panel, Vector* tile) {
  switch (columns) {
    case 1:
      return multiply_rows<1>(rows, depth, a, a_stride, panel, tile);
    case 2:
      return multiply_rows<2>(rows, depth, a, a_stride, panel, tile);
    case 3:
      return multiply_rows<3>(rows, depth, a, a_stride, panel, tile);
    default:
      return multiply_rows<4>(rows, depth, a, a_stride, panel, tile);
  }
}

// Calls body(first row, rows) for tiles of [begin, end) that differ by at most one row.
template <class Body>
FUSED_RNN_INLINE void for_each_tile(int64_t begin, int64_t end, int columns, Body body) {
  const int64_t rows = end - begin;
  const int64_t tiles = ceil_div(rows, tile_rows(columns));
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t first = begin + rows * tile / tiles;
    body(first, (int)(begin + rows * (tile + 1) / tiles - first));
  }
}

// A block of neighbouring columns of a packed matrix, the last one narrower.
struct Panel {
  int64_t column;  // first of them
  int vectors;     // per gate
  const float* data;

  Panel(const PackedMatrix& m, int64_t index, int gates) {
    column = index * m.vectors * kWidth;
    vectors = (int)smaller(m.vectors, ceil_div(m.columns - column, kWidth));
    data = m.data + column * gates * words(m.depth);
  }
};

// Asks for `vectors` vectors of each row of a tile, which the end of a product will want: short
// pieces far apart are not foreseen by the hardware.
template <class T>
FUSED_RNN_INLINE void prefetch(const T* first, int64_t stride, int rows, int vectors) {
  constexpr int kLine = 64 / sizeof(T);
  for (int m = 0; m < rows; m++) {
    for (int i = 0; i < vectors * kWidth; i += kLine) __builtin_prefetch(first + m * stride + i);
  }
}

// How many of the kWidth elements from `first` are below `limit`.
FUSED_RNN_INLINE int valid_lanes(int64_t first, int64_t limit) {
  return (int)smaller(kWidth, limit - first);
}
