// A matrix product as the kernels ask for it: rows as products take them, times a panel.
//
// AMX multiplies BFloat16 only, but fourteen times as many a second as AVX-512 multiplies floats. A
// float is the sum of three of them, each the rest rounded to nearest, and of the nine products of
// parts the six largest are taken (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations", 2019). What is left out is below 2^-25
// of a product, less than float's own rounding of it.
//
// Infinities are exceptional: the products of their parts would not be numbers. A row or a panel
// that has one, or a float beyond the largest BFloat16, says so, and what it meets is computed from
// the sums of parts. AMX takes denormals as zero, so below 2^-110 a float loses its last parts.

#if defined(FUSED_RNN_AMX) && !defined(FUSED_RNN_BFLOAT16)
#define FUSED_RNN_PARTS
constexpr int kParts = 3;
#else
constexpr int kParts = 1;
#endif

// Rows that a product takes.
struct Operand {
  const Element* rows;  // row i at rows + i * stride
  int64_t stride;
  const BFloat16* parts;  // row i in parts at parts + i * parts_stride, or null
  int64_t parts_stride;
};

#if defined(FUSED_RNN_PARTS)

typedef unsigned short Halves __attribute__((vector_size(kWidth * 2)));

FUSED_RNN_INLINE Halves to_halves(Vector v) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }

FUSED_RNN_INLINE Vector from_halves(Halves h) {
  return (Vector)(__builtin_convertvector(h, VectorBits) << 16);
}

// Whether a lane of v is exceptional.
FUSED_RNN_INLINE bool cut(Vector v, Halves (&parts)[kParts]) {
  constexpr float kLargest = 3.38953138925153547590e38f;
  const Vector within = clamp(v, -kLargest, kLargest);
  parts[0] = to_halves(within);
  Vector rest = v - from_halves(parts[0]);
  parts[1] = to_halves(rest);
  rest -= from_halves(parts[1]);
  // Of an infinity the rest is none, and what it was cut into still has it as its sum.
  const __mmask16 numbers = _mm512_cmp_ps_mask((__m512)rest, (__m512)rest, _CMP_ORD_Q);
  parts[2] = to_halves((Vector)_mm512_maskz_mov_ps(numbers, (__m512)rest));
  return _mm512_cmp_ps_mask((__m512)v, (__m512)within, _CMP_NEQ_OQ) != 0;
}

// A row in parts is [kParts][row_depth], then a word that says whether it is exceptional; the room
// up to the next row keeps neighbouring rows out of the same sets of the cache.
FUSED_RNN_INLINE int64_t row_depth(int64_t depth) {
  return ceil_div(depth, kTileDepth) * kTileDepth;
}

static int64_t row_words(int64_t depth) { return kParts * row_depth(depth) / 2 + kWidth; }

FUSED_RNN_INLINE unsigned& exceptional_of(BFloat16* row, int64_t depth) {
  return *(unsigned*)(row + kParts * row_depth(depth));
}

FUSED_RNN_INLINE void store_parts(const Halves (&parts)[kParts], BFloat16* row, int64_t depth,
                                  int64_t k) {
  FUSED_RNN_UNROLL
  for (int part = 0; part < kParts; part++) {
    _mm256_storeu_si256((__m256i*)(row + part * row_depth(depth) + k), (__m256i)parts[part]);
  }
}

static void cut_row(const float* from, int64_t depth, BFloat16* to) {
  bool exceptional = false;
  for (int64_t k = 0; k < row_depth(depth); k += kWidth) {
    Halves parts[kParts];
    exceptional |= cut(k < depth ? load(from + k, valid_lanes(k, depth)) : Vector{}, parts);
    store_parts(parts, to, depth, k);
  }
  exceptional_of(to, depth) = exceptional;
}

// Words of a panel's row number k / 2 in depth, of one part, counted in rows of vectors.
FUSED_RNN_INLINE int64_t part_row(int64_t k, int part) {
  constexpr int kRows = kTileDepth / 2;
  return (k / kTileDepth * kParts + part) * kRows + k % kTileDepth / 2;
}

static int64_t column_words(int64_t depth, int parts) {
  return parts > 1 ? kParts * row_depth(depth) / 2 : words(depth);
}

// Up to where packed matrices have zeros.
FUSED_RNN_INLINE int64_t filled_depth(int64_t depth, int parts) {
  return parts > 1 ? row_depth(depth) : words(depth) * kPairs;
}

// The product of what the parts add up to.
__attribute__((noinline)) static void multiply_sums(int columns, int rows, int64_t depth,
                                                    const BFloat16* a, int64_t a_stride,
                                                    const float* panel, Vector* tile) {
  for (int row = 0; row < rows; row++) {
    for (int column = 0; column < columns; column++) {
      Vector sum{};
      for (int64_t k = 0; k < depth; k++) {
        Vector value{}, weight{};
        for (int part = 0; part < kParts; part++) {
          const BFloat16* from = a + row * a_stride + part * row_depth(depth) + k;
          value += (Vector)_mm512_set1_epi32((int)((unsigned)from->bits << 16));
          const VectorBits pairs =
              (VectorBits)load(panel + (part_row(k, part) * columns + column) * kWidth);
          weight += (Vector)(k % 2 ? pairs & 0xffff0000u : pairs << 16);
        }
        sum += value * weight;
      }
      tile[row * columns + column] = sum;
    }
  }
}

#else

static int64_t row_words(int64_t) { return 0; }

static int64_t column_words(int64_t depth, int) { return words(depth); }

FUSED_RNN_INLINE int64_t filled_depth(int64_t depth, int) { return words(depth) * kPairs; }

#endif

// Rows [begin, end) as a product with m takes them. `memory` is room for rows up to `end` in parts.
FUSED_RNN_INLINE Operand operand_of(const PackedMatrix& m, RowsOf<const Element> rows,
                                    int64_t begin, int64_t end, float* memory) {
  Operand operand{rows.base, rows.stride, nullptr, 0};
#if defined(FUSED_RNN_PARTS)
  if (m.parts > 1) {
    BFloat16* parts = (BFloat16*)memory;
    operand.parts = parts;
    operand.parts_stride = 2 * row_words(m.depth);
    for (int64_t i = begin; i < end; i++) {
      cut_row(rows[i], m.depth, parts + i * operand.parts_stride);
    }
  }
#endif
  return operand;
}

// A block of neighbouring columns of a packed matrix, the last one narrower.
struct Panel {
  int64_t column;  // first of them
  int vectors;     // per gate
  int parts;
  int64_t depth;
  const float* data;
  bool* exceptional;  // or null

  Panel(const PackedMatrix& m, int64_t index, int gates) : parts(m.parts), depth(m.depth) {
    column = index * m.vectors * kWidth;
    vectors = (int)smaller(m.vectors, ceil_div(m.columns - column, kWidth));
    data = m.data + column * gates * column_words(m.depth, m.parts);
    exceptional = m.exceptional ? m.exceptional + index : nullptr;
  }
};

#if defined(FUSED_RNN_AMX)
constexpr int kMaxRows = kTileRows;
#else
constexpr int kMaxRows = 12;
#endif

// How many rows at a time a product with the panel takes.
FUSED_RNN_INLINE int tile_rows(const Panel& panel, int columns) {
#if defined(FUSED_RNN_PARTS)
  return panel.parts > 1 ? kTileRows : vector_rows(columns);
#elif defined(FUSED_RNN_AMX)
  return kTileRows;
#else
  return vector_rows(columns);
#endif
}

// Calls body(first row, rows) for tiles of [begin, end) that differ by at most one row.
template <class Body>
FUSED_RNN_INLINE void for_each_tile(int64_t begin, int64_t end, const Panel& panel, int columns,
                                    Body body) {
  const int64_t rows = end - begin;
  const int64_t tiles = ceil_div(rows, tile_rows(panel, columns));
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t first = begin + rows * tile / tiles;
    body(first, (int)(begin + rows * (tile + 1) / tiles - first));
  }
}

// tile [rows, columns] = rows of `a` from `first` on, times a panel of `columns` vectors.
static void multiply(int columns, int rows, const Operand& a, int64_t first, const Panel& panel,
                     Vector* tile) {
#if defined(FUSED_RNN_PARTS)
  if (panel.parts > 1) {
    const BFloat16* from = a.parts + first * a.parts_stride;
    unsigned exceptional = *panel.exceptional;
    for (int row = 0; row < rows; row++) {
      exceptional |= exceptional_of((BFloat16*)from + row * a.parts_stride, panel.depth);
    }
    if (exceptional) {
      return multiply_sums(columns, rows, panel.depth, from, a.parts_stride, panel.data, tile);
    }
    return multiply_tiles<kParts>(columns, rows, panel.depth, from, a.parts_stride,
                                  row_depth(panel.depth), panel.data, tile);
  }
#elif defined(FUSED_RNN_AMX)
  return multiply_tiles<1>(columns, rows, panel.depth, a.rows + first * a.stride, a.stride, 0,
                           panel.data, tile);
#endif
#if !defined(FUSED_RNN_AMX) || defined(FUSED_RNN_PARTS)
  multiply_words(columns, rows, panel.depth, a.rows + first * a.stride, a.stride, panel.data, tile);
#endif
}
