// A matrix product as the kernels ask for it: rows as products take them, times a panel.
//
// AMX multiplies BFloat16 only, but fourteen times as many a second as AVX-512 multiplies floats. A
// float is the sum of three of them, each the rest rounded to nearest, and of the nine products of
// parts the six largest are taken (Henry, Tang and Heinecke, "Leveraging the bfloat16 Artificial
// Intelligence Datatype For Higher-Precision Computations", 2019). What is left out is at most
// 2^-23 of a product, and about 2^-26 on average, of either sign.
//
// Infinities are exceptional: the products of their parts would not be numbers. A row or a panel
// that has one, or a float that rounds to one, says so, and what it meets is computed from the sums
// of parts. AMX takes denormals as zero, so below 2^-110 a float loses its last parts.

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

// Parts as floats whose lower halves are zero, but for denormals, which lose theirs later on.
struct Parts {
  Vector part[kParts];
};

// For infinities, NaN and what rounds to infinity. Returns whether a lane is exceptional.
__attribute__((noinline)) static bool cut_unusual(Vector v, Parts& to) {
  constexpr float kLargest = 3.38953138925153547590e38f;
  typedef unsigned short Halves __attribute__((vector_size(kWidth * 2)));
  const auto round = [](Vector from) {
    const Halves halves = (Halves)_mm512_cvtneps_pbh((__m512)from);
    return (Vector)(__builtin_convertvector(halves, VectorBits) << 16);
  };
  const Vector within = clamp(v, -kLargest, kLargest);
  to.part[0] = round(within);
  Vector rest = v - to.part[0];
  to.part[1] = round(rest);
  rest -= to.part[1];
  // Of an infinity no number is left, and the parts so far add up to it.
  const __mmask16 numbers = _mm512_cmp_ps_mask((__m512)rest, (__m512)rest, _CMP_ORD_Q);
  to.part[2] = round((Vector)_mm512_maskz_mov_ps(numbers, (__m512)rest));
  return _mm512_cmp_ps_mask((__m512)v, (__m512)within, _CMP_NEQ_OQ) != 0;
}

// Ties are rounded away from zero, which is as good here: the next part has what is left.
FUSED_RNN_INLINE bool cut(Vector v, Parts& to) {
  const VectorBits magnitude = (VectorBits)v & 0x7fffffffu;
  if (_mm512_cmpge_epu32_mask((__m512i)magnitude, _mm512_set1_epi32(0x7f7f8000))) {
    return cut_unusual(v, to);
  }
  const auto round = [](Vector from) __attribute__((always_inline)) {
    return (Vector)(((VectorBits)from + 0x8000u) & 0xffff0000u);
  };
  to.part[0] = round(v);
  const Vector rest = v - to.part[0];
  to.part[1] = round(rest);
  to.part[2] = rest - to.part[1];
  return false;
}

// Words of one part. Where elements are in parts, the words of a tile's depth of 32 are elements i
// and i + 16 of it, which takes less shuffling than neighbours do.
FUSED_RNN_INLINE Vector words_of(Vector first_half, Vector second_half) {
  return (Vector)((VectorBits)first_half >> 16 | ((VectorBits)second_half & 0xffff0000u));
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

// The words of a tile's depth from k on.
FUSED_RNN_INLINE float* words_at(BFloat16* row, int64_t depth, int part, int64_t k) {
  return (float*)(row + part * row_depth(depth) + k);
}

static void cut_row(const float* from, int64_t depth, BFloat16* to) {
  bool exceptional = false;
  const auto at = [&](int64_t k) __attribute__((always_inline)) {
    if (k + kWidth <= depth) return load(from + k);
    return k < depth ? load_tail(from + k, (int)(depth - k)) : Vector{};
  };
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    Parts first, second;
    exceptional |= cut(at(k), first);
    exceptional |= cut(at(k + kWidth), second);
    FUSED_RNN_UNROLL
    for (int part = 0; part < kParts; part++) {
      store(words_at(to, depth, part, k), words_of(first.part[part], second.part[part]));
    }
  }
  exceptional_of(to, depth) = exceptional;
}

#else

static int64_t row_words(int64_t) { return 0; }

#endif

// Rows [begin, end) as a product with m takes them. `memory` is room for rows up to `end` in parts.
FUSED_RNN_INLINE Operand operand_of(const PackedMatrix& m, Rows rows, int64_t begin, int64_t end,
                                    float* memory) {
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

// Whether AMX takes a matrix in so many parts.
FUSED_RNN_INLINE bool in_tiles(int parts) {
#if defined(FUSED_RNN_AMX)
  return parts == kParts;
#else
  return false;
#endif
}

// Up to where the columns of packed matrices have zeros.
FUSED_RNN_INLINE int64_t filled_depth(int64_t depth, int parts) {
#if defined(FUSED_RNN_AMX)
  if (in_tiles(parts)) return ceil_div(depth, kTileDepth) * kTileDepth;
#endif
  return words(depth) * kPairs;
}

static int64_t column_words(int64_t depth, int parts) {
#if defined(FUSED_RNN_AMX)
  if (in_tiles(parts)) return filled_depth(depth, parts) / 2 * parts;
#endif
  return words(depth);
}

// Neighbouring columns of a matrix, of every gate.
struct Columns {
  int64_t column;  // first of them
  int vectors;     // per gate
};

// A block of columns of a packed matrix, the last one narrower.
struct Panel : Columns {
  int parts;
  int64_t depth;
  int64_t begin, end;      // what of the depth a product has
  int64_t chain = kChain;  // of its sums
  const float* data;
  bool* exceptional;  // or null
  bool in_halves;
  bool asks = false;    // for what comes next, the matrix being large
  mutable Ahead ahead;  // of the panel that comes next, if any

  Panel() = default;
  Panel(const PackedMatrix& m, int64_t index, int gates)
      : parts(m.parts), depth(m.depth), begin(0), end(m.depth), in_halves(m.in_halves) {
    column = index * m.vectors * kWidth;
    vectors = (int)smaller(m.vectors, ceil_div(m.columns - column, kWidth));
    data = m.data + column * gates * column_words(m.depth, m.parts);
    exceptional = m.exceptional ? m.exceptional + index : nullptr;
  }

  // That another panel of the matrix comes after this one.
  void ask_for(const PackedMatrix& m, int64_t next, int gates) {
    const Panel panel(m, next, gates);
    const char* first = (const char*)panel.data;
    ahead = {first, first + (int64_t)sizeof(float) * gates * panel.vectors * kWidth * m.depth};
  }
};

// What has all panels of a matrix, for products that are not a share's.
FUSED_RNN_INLINE Share all_panels(const PackedMatrix& m) {
  return {.panel_begin = 0, .panel_end = panel_count(m, kWidth)};
}

// Calls body for the share's panels of the matrix. Odd steps take them backwards: the last ones are
// still in the cache. Measured on a prototype: 4 to 8% where the packed weights exceed L2.
template <class Body>
FUSED_RNN_INLINE void for_each_panel(const PackedMatrix& m, const Share& share, int gates,
                                     int64_t step, Body body) {
  // What is left in L2 from the step before: of CPUs with AVX-512, which have 1 MiB or more.
  constexpr int64_t kCached = FUSED_RNN_VECTOR_WIDTH == 16 ? 1 << 20 : 512 << 10;
  const bool asks = kAsksAhead && m.columns * gates * m.depth * (int64_t)sizeof(float) > kCached;
  for (int64_t j = share.panel_begin; j < share.panel_end; j++) {
    Panel panel(m, zigzag(j, share, step), gates);
    panel.asks = asks;
    if (asks && j + 1 < share.panel_end) panel.ask_for(m, zigzag(j + 1, share, step), gates);
    body(panel);
  }
}

#if defined(FUSED_RNN_PARTS)

// The product of what the parts add up to.
__attribute__((noinline)) static void multiply_sums(int columns, int rows, const Panel& panel,
                                                    const BFloat16* a, int64_t a_stride,
                                                    Vector* tile) {
  const int64_t depth = panel.depth;
  for (int row = 0; row < rows; row++) {
    BFloat16* from = const_cast<BFloat16*>(a) + row * a_stride;
    for (int column = 0; column < columns; column++) {
      Vector sum{};
      for (int64_t k = panel.begin; k < panel.end; k++) {
        const int64_t first = k / kTileDepth * kTileDepth, word = k % kWidth;
        const bool second_half = k % kTileDepth >= kWidth;
        const auto half_of = [&](Vector words) {
          const VectorBits bits = (VectorBits)words;
          return (Vector)(second_half ? bits & 0xffff0000u : bits << 16);
        };
        Vector value{}, weight{};
        // The largest last: with less than what it was cut from, it might overflow.
        for (int part = kParts - 1; part >= 0; part--) {
          unsigned bits;
          __builtin_memcpy(&bits, words_at(from, depth, part, first) + word, sizeof(bits));
          value += half_of((Vector)(bits - VectorBits{}));
          weight += half_of(
              load(panel.data + tile_words_before(depth, column, k, part, kParts) + word * kWidth));
        }
        sum += value * weight;
      }
      tile[row * columns + column] = sum;
    }
  }
}

#endif

#if defined(FUSED_RNN_AMX)
constexpr int kMaxRows = kTileRows;
#else
constexpr int kMaxRows = 12;
#endif

// How many rows at a time a product with the panel takes.
FUSED_RNN_INLINE int tile_rows(const Panel& panel, int columns) {
#if defined(FUSED_RNN_AMX)
  if (in_tiles(panel.parts)) return kTileRows;
#endif
  return vector_rows(columns);
}

// Calls body(first row, rows) for tiles of [begin, end). Registers take tiles that differ by at
// most one row, as each has its latency to hide. AMX takes full ones and a rest: half a tile costs
// half.
template <class Body>
FUSED_RNN_INLINE void for_each_tile(int64_t begin, int64_t end, const Panel& panel, int columns,
                                    Body body) {
  const int64_t rows = end - begin, most = tile_rows(panel, columns);
  if (in_tiles(panel.parts)) {
    for (int64_t first = begin; first < end; first += most) {
      body(first, (int)smaller(most, end - first));
    }
    return;
  }
  const int64_t tiles = ceil_div(rows, most);
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t first = begin + rows * tile / tiles;
    body(first, (int)(begin + rows * (tile + 1) / tiles - first));
  }
}

// Whether these rows or the panel have something that has no parts.
FUSED_RNN_INLINE bool is_exceptional(const Operand& a, int64_t first, int rows,
                                     const Panel& panel) {
  unsigned exceptional = 0;
#if defined(FUSED_RNN_PARTS)
  exceptional = *panel.exceptional;
  BFloat16* from = const_cast<BFloat16*>(a.parts) + first * a.parts_stride;
  for (int row = 0; row < rows; row++) {
    exceptional |= exceptional_of(from + row * a.parts_stride, panel.depth);
  }
#else
  (void)a, (void)first, (void)rows, (void)panel;
#endif
  return exceptional;
}

// tile [rows, columns] = rows of `a` from `first` on, times a panel of `columns` vectors. A product
// of a part of the depth begins where a tile does.
static void multiply(int columns, int rows, const Operand& a, int64_t first, const Panel& panel,
                     Vector* tile) {
#if defined(FUSED_RNN_PARTS)
  if (in_tiles(panel.parts)) {
    const BFloat16* from = a.parts + first * a.parts_stride;
    if (is_exceptional(a, first, rows, panel)) {
      return multiply_sums(columns, rows, panel, from, a.parts_stride, tile);
    }
    return multiply_tiles<kParts>(columns, rows, panel.depth, panel.begin, panel.end, from,
                                  a.parts_stride, row_depth(panel.depth), panel.data, tile);
  }
#endif
  const Element* from = a.rows + first * a.stride;
#if defined(FUSED_RNN_AMX) && defined(FUSED_RNN_BFLOAT16)
  multiply_tiles<1>(columns, rows, panel.depth, panel.begin, panel.end, from, a.stride, 0,
                    panel.data, tile);
#else
  multiply_words(columns, rows, panel.end - panel.begin, from + panel.begin, a.stride,
                 panel.data + words(panel.begin) * columns * kWidth, tile, panel.in_halves,
                 &panel.ahead, panel.chain);
#endif
}

// A tile whose product is there, for the pointwise part that follows. `from`: what that needs to
// know.
template <class From>
struct Tile {
  const From& from;
  int64_t first;
  int rows;
  const Columns& panel;
  const Vector* product;  // [rows, columns]
};

// Asks for nothing of what a tile's pointwise part reads.
struct AskForNothing {
  template <class From>
  void operator()(const From&, int64_t, int, const Columns&) const {}
};

// Tiles one after the other: of each the product, then pointwise(tile, pause), which calls pause()
// as often as the tile has vectors of units. Before the product, or what comes last of it, is
// ask(from, first, rows, panel).
//
// Where AMX takes the product, it is computed in the pauses of the tile before: a core does the one
// while its tiles multiply. In parts LSTM and GRU at H = 128 to 1024 take 1.04 to 1.15 times less,
// in bfloat16 at H=512 1.1 to 1.2; smaller products of bfloat16 take up to 1.4 times longer then.
//
// Elsewhere tiles wait for others with the same panel, if it is a long one of a large matrix: a
// block of the panel (kBlock) is multiplied with all of them before the next block, which they ask
// for. So a panel comes to L1 once, and from L3 before it is needed. On an Ice Lake, on top
// of asking for whole panels, products of 16 to 64 rows take 1.1 to 1.25 times less at a depth of
// 512 and 1024, 1.5 to 2 times at 4096. With AVX2 only panels that fill half of L2 are long:
// shorter ones gained nothing on a Zen 3.
template <class From>
class Tiles {
  static constexpr int64_t kLeastOverlapped = kParts > 1 ? 0 : 1 << 14;  // of rows times depth

 public:
  template <class Pointwise, class Ask = AskForNothing>
  FUSED_RNN_INLINE_METHOD void add(int columns, const From& from, const Operand& a, int64_t first,
                                   int rows, const Panel& panel, const Pointwise& pointwise,
                                   const Ask& ask = {}) {
#if defined(FUSED_RNN_AMX)
    ask(from, first, rows, panel);
    if (in_tiles(panel.parts) && rows * (panel.end - panel.begin) >= kLeastOverlapped) {
      return overlap(columns, from, a, first, rows, panel, pointwise);
    }
    finish(pointwise);
#else
    if (is_long(panel, columns)) {
      return wait(columns, from, a, first, rows, panel, pointwise, ask);
    }
    finish(pointwise, ask);
    ask(from, first, rows, panel);
#endif
    Vector product[kMaxRows * kMaxColumns];
    multiply(columns, rows, a, first, panel, product);
    pointwise(Tile<From>{from, first, rows, panel, product}, [] {});
  }

  // What a tile without a product is given.
  template <class Pointwise, class Ask>
  void add_without_product(const From& from, int64_t first, int rows, const Panel& panel,
                           const Pointwise& pointwise, const Ask& ask) {
    finish(pointwise, ask);
    pointwise(Tile<From>{from, first, rows, panel, nullptr}, [] {});
  }

  // After the last one.
  template <class Pointwise, class Ask = AskForNothing>
  FUSED_RNN_INLINE_METHOD void finish(const Pointwise& pointwise, const Ask& ask = {}) {
#if defined(FUSED_RNN_AMX)
    (void)ask;
    if (!waits_) return;
    waits_ = false;
    pointwise(last(), [] {});
#else
    if (waiting_ > 0) finish_waiting(pointwise, ask);
#endif
  }

 private:
#if defined(FUSED_RNN_AMX)
  template <class Pointwise>
  __attribute__((noinline)) void overlap(int columns, const From& from, const Operand& a,
                                         int64_t first, int rows, const Panel& panel,
                                         const Pointwise& pointwise) {
    Vector* product = products_[product_ == products_[0] ? 1 : 0];
    if (!waits_ || is_exceptional(a, first, rows, panel)) {
      finish(pointwise);
      multiply(columns, rows, a, first, panel, product);
    } else {
      PausedProduct<kParts> paused;
      const int64_t pauses = rows_ * panel_.vectors;
#if defined(FUSED_RNN_PARTS)
      paused.start(columns, rows, panel.depth, panel.begin, panel.end,
                   a.parts + first * a.parts_stride, a.parts_stride, row_depth(panel.depth),
                   panel.data, product, pauses);
#else
      paused.start(columns, rows, panel.depth, panel.begin, panel.end, a.rows + first * a.stride,
                   a.stride, 0, panel.data, product, pauses);
#endif
      pointwise(last(), [&]() __attribute__((always_inline)) { paused.advance(); });
    }
    from_ = &from;
    first_ = first;
    rows_ = rows;
    panel_ = panel;
    product_ = product;
    waits_ = true;
  }

  Tile<From> last() const { return {*from_, first_, rows_, panel_, product_}; }

  Vector products_[2][kMaxRows * kMaxColumns];
  // The last tile, and whether it waits for its pointwise part.
  const From* from_;
  int64_t first_;
  int rows_;
  Panel panel_;
  const Vector* product_ = nullptr;
  bool waits_ = false;
#else
  // At most so many tiles, whose products, of up to so many vectors each, leave room in L1.
  static constexpr int kMostTogether = 16, kMostVectors = 24;
  static_assert(!kAsksAhead ||
                (vector_rows(1) <= kMostVectors && 2 * vector_rows(2) <= kMostVectors &&
                 3 * vector_rows(3) <= kMostVectors && 4 * vector_rows(4) <= kMostVectors));
  static constexpr int64_t kLongPanel = FUSED_RNN_VECTOR_WIDTH == 16 ? 32 << 10 : 256 << 10;

  struct Waiting {
    const From* from;
    const Element* a;
    int64_t stride, first;
    int rows;
  };

  static int64_t bytes(int columns, int64_t depth) {
    return words(depth) * columns * kWidth * (int64_t)sizeof(float);
  }

  static bool is_long(const Panel& panel, int columns) {
    return panel.asks && bytes(columns, panel.end - panel.begin) > kLongPanel;
  }

  template <class Pointwise, class Ask>
  __attribute__((noinline)) void wait(int columns, const From& from, const Operand& a,
                                      int64_t first, int rows, const Panel& panel,
                                      const Pointwise& pointwise, const Ask& ask) {
    const bool another = panel.data != panel_.data || panel.begin != panel_.begin;
    if (another || waiting_ == kMostTogether) finish(pointwise, ask);
    if (another) {
      panel_ = panel;
      columns_ = columns;
    }
    tiles_[waiting_++] = {&from, a.rows + first * a.stride, a.stride, first, rows};
  }

  template <class Pointwise, class Ask>
  __attribute__((noinline)) void finish_waiting(const Pointwise& pointwise, const Ask& ask) {
    multiply_together(ask);
    const Vector* product = products_;
    for (int i = 0; i < waiting_; i++) {
      const Waiting& tile = tiles_[i];
      pointwise(Tile<From>{*tile.from, tile.first, tile.rows, panel_, product}, [] {});
      product += tile.rows * columns_;
    }
    waiting_ = 0;
  }

  template <class Ask>
  FUSED_RNN_INLINE_METHOD void multiply_together(const Ask& ask) {
    const int64_t depth = panel_.end - panel_.begin;
    for (int64_t k = 0; k == 0 || k < depth; k += kBlock) {
      const int64_t end = smaller(k + kBlock, depth);
      const float* block = panel_.data + words(panel_.begin + k) * columns_ * kWidth;
      Ahead ahead = ahead_of(k, end);
      Vector* product = products_;
      for (int i = 0; i < waiting_; i++) {
        const Waiting& tile = tiles_[i];
        if (end == depth) ask(*tile.from, tile.first, tile.rows, panel_);
        multiply_words(columns_, tile.rows, end - k, tile.a + panel_.begin + k, tile.stride, block,
                       product, panel_.in_halves, &ahead, panel_.chain, k > 0);
        product += tile.rows * columns_;
      }
    }
  }

  // What comes after numbers [k, end) of the panel's depth, for all tiles to ask for.
  Ahead ahead_of(int64_t k, int64_t end) const {
    const int64_t depth = panel_.end - panel_.begin;
    const char* next = panel_.ahead.next;
    int64_t most = panel_.ahead.end - next;
    if (end < depth) {
      next = (const char*)panel_.data + bytes(columns_, panel_.begin + end);
      most = bytes(columns_, depth - end);
    }
    const int64_t asked = smaller(most, bytes(columns_, end - k));
    const int64_t steps = waiting_ * words(end - k);
    return {next, next + asked, smaller(kLine, ceil_div(ceil_div(asked, steps), 16) * 16)};
  }

  Vector products_[kMostTogether * kMostVectors];
  Waiting tiles_[kMostTogether];
  Panel panel_{};
  int columns_ = 0, waiting_ = 0;
#endif
};
