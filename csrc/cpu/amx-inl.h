// Matrix products by AMX: tiles of 16 rows of 64 bytes, multiplied as pairs of BFloat16 into sums
// of float.
//
// Assembly rather than intrinsics: the compiler then needs no support but its assembler's, and gcc
// 12's _tile_loadconfig does not say that it reads all of the configuration.

#if defined(FUSED_RNN_AMX)

constexpr int kTileRows = 32;  // of a product: two tiles above each other
constexpr int kTileDepth = 32;
constexpr int kTileWords = 256;
constexpr int kTileRowBytes = 64;

// Words of a panel before the tile that has depth k of a part of one of its vectors of columns. A
// vector's tiles lie one after the other, in the order in which a product reads them: 7% faster
// than beside those of other vectors, where they come from L3.
FUSED_RNN_INLINE int64_t tile_words_before(int64_t depth, int column, int64_t k, int part,
                                           int parts) {
  const int64_t blocks = ceil_div(depth, kTileDepth);
  return ((column * blocks + k / kTileDepth) * parts + part) * kTileWords;
}

template <int TILE>
FUSED_RNN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
FUSED_RNN_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(TILE), "r"(from), "r"(stride) : "memory");
}

template <int TILE>
FUSED_RNN_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(TILE), "r"(to), "r"(stride) : "memory");
}

template <int SUM, int A, int B>
FUSED_RNN_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

// Up to two columns of up to two halves of rows: sums in tiles 0 to 3, then A's, then B's.
constexpr int kColumnsAtATime = 2;
constexpr int kFirstTileOfA = 4;
constexpr int kFirstTileOfB = kFirstTileOfA + 1;  // of up to 16 rows

// Sums and A's tiles have as many rows as a product of up to 16 has; from 16 on, all have 16.
struct TileRows {
  int rows = 0;

  void set(int wanted) {
    if (wanted == rows) return;
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    static_assert(sizeof(config) == 64, "as the instruction reads it");
    for (int tile = 0; tile < 8; tile++) {
      config.row_bytes[tile] = kTileRowBytes;
      config.rows[tile] = (uint8_t)(tile < kFirstTileOfB ? wanted : 16);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
    rows = wanted;
  }
};

static thread_local TileRows tile_rows_now;

// While a kernel runs on a thread. Tiles in use make the thread's switches slower.
struct TileSession {
  TileSession() { tile_rows_now.rows = 0; }
  ~TileSession() {
    if (tile_rows_now.rows > 0) asm volatile("tilerelease" ::: "memory");
    tile_rows_now.rows = 0;
  }
};

template <int N>
struct Number {
  static constexpr int value = N;
};

// Calls body(Number<0>), ..., body(Number<N - 1>).
template <int N, class Body>
FUSED_RNN_INLINE void for_each_number(Body body) {
  if constexpr (N > 0) {
    for_each_number<N - 1>(body);
    body(Number<N - 1>{});
  }
}

// Tiles of A and of a panel that are multiplied with each other, row strides in bytes.
struct TileBlock {
  const char* a;
  int64_t a_stride;
  int64_t lower_half;  // from the upper half of A's rows, in bytes
  const char* b;
  int64_t next_column;  // of B's tiles, in bytes
};

// Adds A times B; what a product before this one has loaded may be there still.
template <int COLUMNS, int HALVES, bool NEW_A = true, bool NEW_B = true>
FUSED_RNN_INLINE void multiply_block(const TileBlock& block) {
  static_assert(COLUMNS <= kColumnsAtATime && HALVES <= 2);
  constexpr int kB = kFirstTileOfA + HALVES;
  if constexpr (NEW_A) {
    for_each_number<HALVES>([&](auto half) __attribute__((always_inline)) {
      constexpr int h = decltype(half)::value;
      tile_load<kFirstTileOfA + h>(block.a + h * block.lower_half, block.a_stride);
    });
  }
  for_each_number<COLUMNS>([&](auto column) __attribute__((always_inline)) {
    constexpr int c = decltype(column)::value;
    if constexpr (NEW_B) tile_load<kB + c>(block.b + c * block.next_column, kTileRowBytes);
    for_each_number<HALVES>([&](auto half) __attribute__((always_inline)) {
      constexpr int h = decltype(half)::value;
      tile_multiply_add<h * COLUMNS + c, kFirstTileOfA + h, kB + c>();
    });
  });
}

// A product whose A has parts `part` bytes apart, with `blocks` blocks of depth and then what is
// left of A's depth in `rest`, if any.
struct TileProduct {
  TileBlock block;
  int64_t part;
  int64_t blocks;
  const char* rest;
  int rows;
};

// The first block of `column` and those beside it, whose sums are zero from here on.
template <int COLUMNS, int HALVES>
FUSED_RNN_INLINE TileBlock begin_columns(const TileProduct& p, int column) {
  for_each_number<COLUMNS * HALVES>(
      [](auto sum) __attribute__((always_inline)) { tile_zero<decltype(sum)::value>(); });
  TileBlock block = p.block;
  block.b += column * block.next_column;
  return block;
}

// Adds the product of a block and goes on to the next.
template <int PARTS, int COLUMNS, int HALVES>
FUSED_RNN_INLINE void add_block(const TileProduct& p, TileBlock& block) {
  constexpr int64_t kTileBytes = 4 * kTileWords;
  if constexpr (PARTS == 1) {
    multiply_block<COLUMNS, HALVES>(block);
  } else {
    // The smallest products first, each with a factor of the one before.
    const auto at = [&](int a, int b) __attribute__((always_inline)) {
      TileBlock parts = block;
      parts.a += a * p.part;
      parts.b += b * kTileBytes;
      return parts;
    };
    multiply_block<COLUMNS, HALVES>(at(0, 2));
    multiply_block<COLUMNS, HALVES, false, true>(at(0, 1));
    multiply_block<COLUMNS, HALVES, true, false>(at(1, 1));
    multiply_block<COLUMNS, HALVES, false, true>(at(1, 0));
    multiply_block<COLUMNS, HALVES, true, false>(at(2, 0));
    multiply_block<COLUMNS, HALVES, true, false>(at(0, 0));
  }
  block.a += kTileRowBytes;
  block.b += PARTS * kTileBytes;
}

// Adds what is left after the last whole block, and stores the sums.
template <int COLUMNS, int HALVES>
FUSED_RNN_INLINE void end_columns(const TileProduct& p, TileBlock block, int column, int columns,
                                  Vector* tile) {
  if (p.rest) {
    block.a = p.rest;
    block.a_stride = kTileRowBytes;
    block.lower_half = (p.rows - 16) * block.a_stride;
    multiply_block<COLUMNS, HALVES>(block);
  }
  const int64_t stride = columns * (int64_t)sizeof(Vector);
  for_each_number<HALVES>([&](auto half) __attribute__((always_inline)) {
    constexpr int h = decltype(half)::value;
    for_each_number<COLUMNS>([&](auto c) __attribute__((always_inline)) {
      constexpr int number = decltype(c)::value;
      Vector* to = tile + (h ? p.rows - 16 : 0) * columns + column + number;
      tile_store<h * COLUMNS + number>(to, stride);
    });
  });
}

template <int PARTS, int COLUMNS, int HALVES>
static void multiply_columns(const TileProduct& p, int column, int columns, Vector* tile) {
  TileBlock block = begin_columns<COLUMNS, HALVES>(p, column);
  for (int64_t i = 0; i < p.blocks; i++) add_block<PARTS, COLUMNS, HALVES>(p, block);
  end_columns<COLUMNS, HALVES>(p, block, column, columns, tile);
}

// A product waits 52 cycles for the one before it in a sum, and a core starts one every 16. What
// hides that is several sums at a time, or over a short depth those of the next columns, which a
// core begins before these end; then one column at a time is the faster, as less has to stay in L1.
// In parts, GFLOP/s of one and of two columns, 32 rows: 541 and 515 at a depth of 128, 513 and 420
// at 256, 336 and 366 at 512. 16 rows of two columns and of four: 534 and 421, 510 and 365, 293 and
// 277.
constexpr int64_t kShortDepth = 256;

// Of BFloat16 that a product copies, for the depth that does not fill a tile. Parts are zero there.
template <int PARTS>
constexpr int kRest = PARTS == 1 ? kTileRows * kTileDepth : 1;

template <int PARTS>
FUSED_RNN_INLINE TileProduct tile_product(int rows, int64_t depth, int64_t begin, int64_t end,
                                          const BFloat16* a, int64_t a_stride, int64_t part,
                                          const float* panel, BFloat16 (&rest)[kRest<PARTS>]) {
  const int64_t a_bytes = 2 * a_stride;
  const float* first_tile = panel + tile_words_before(depth, 0, begin, 0, PARTS);
  TileProduct p{{(const char*)(a + begin), a_bytes, (rows - 16) * a_bytes, (const char*)first_tile,
                 4 * tile_words_before(depth, 1, 0, 0, PARTS)},
                2 * part,
                PARTS == 1 ? (end - begin) / kTileDepth : ceil_div(end - begin, kTileDepth),
                nullptr,
                rows};
  const int64_t left = (end - begin) % kTileDepth;
  if (PARTS == 1 && left > 0) {
    const __mmask32 lanes = (__mmask32)((1u << left) - 1);
    const BFloat16* from = a + end - left;
    for (int row = 0; row < rows; row++) {
      _mm512_storeu_si512(rest + row * kTileDepth,
                          _mm512_maskz_loadu_epi16(lanes, from + row * a_stride));
    }
    p.rest = (const char*)rest;
  }
  return p;
}

// How many columns at a time a product takes.
template <int PARTS>
FUSED_RNN_INLINE int columns_at_a_time(int rows, int64_t depth) {
  return PARTS > 1 && rows > 16 && depth <= kShortDepth ? 1 : kColumnsAtATime;
}

// tile [rows, columns] = a [rows, depth] times a panel of `columns` vectors, both in PARTS parts,
// over depth [begin, end); the parts of `a` are `part` elements apart, and zero up to the next tile
// where there are several.
template <int PARTS>
static void multiply_tiles(int columns, int rows, int64_t depth, int64_t begin, int64_t end,
                           const BFloat16* a, int64_t a_stride, int64_t part, const float* panel,
                           Vector* tile) {
  BFloat16 rest[kRest<PARTS>];
  const TileProduct p =
      tile_product<PARTS>(rows, depth, begin, end, a, a_stride, part, panel, rest);
  tile_rows_now.set(rows < 16 ? rows : 16);
  // The halves of 17 to 31 rows have some in common, which come out the same twice.
  const bool halves = rows > 16;
  const int at_a_time = columns_at_a_time<PARTS>(rows, end - begin);
  for (int column = 0; column < columns; column += at_a_time) {
    const bool two = at_a_time == 2 && column + 1 < columns;
    if (halves) {
      two ? multiply_columns<PARTS, 2, 2>(p, column, columns, tile)
          : multiply_columns<PARTS, 1, 2>(p, column, columns, tile);
    } else {
      two ? multiply_columns<PARTS, 2, 1>(p, column, columns, tile)
          : multiply_columns<PARTS, 1, 1>(p, column, columns, tile);
    }
  }
}

// The same product, a block of depth at a time, for other work to come between: a core goes on with
// that while the tiles multiply. The sums stay in their tiles meanwhile.
template <int PARTS>
class PausedProduct {
 public:
  // advance() called `pauses` times completes it.
  void start(int columns, int rows, int64_t depth, int64_t begin, int64_t end, const BFloat16* a,
             int64_t a_stride, int64_t part, const float* panel, Vector* tile, int64_t pauses) {
    product_ = tile_product<PARTS>(rows, depth, begin, end, a, a_stride, part, panel, rest_);
    at_a_time_ = columns_at_a_time<PARTS>(rows, end - begin);
    tile_ = tile;
    column_ = 0;
    columns_ = columns;
    done_ = 0;
    credit_ = 0;
    pauses_ = pauses;
    of_columns_ = product_.blocks + (product_.rest ? 1 : 0);
    blocks_ = ceil_div(columns, at_a_time_) * of_columns_;
    tile_rows_now.set(rows < 16 ? rows : 16);
  }

  FUSED_RNN_INLINE_METHOD void advance() {
    for (credit_ += blocks_; credit_ >= pauses_; credit_ -= pauses_) add_next();
  }

 private:
  void add_next() {
    const bool two = at_a_time_ == 2 && column_ + 1 < columns_;
    if (product_.rows > 16) {
      two ? add<2, 2>() : add<1, 2>();
    } else {
      two ? add<2, 1>() : add<1, 1>();
    }
  }

  template <int COLUMNS, int HALVES>
  FUSED_RNN_INLINE_METHOD void add() {
    if (done_ == 0) block_ = begin_columns<COLUMNS, HALVES>(product_, column_);
    if (done_ < product_.blocks) add_block<PARTS, COLUMNS, HALVES>(product_, block_);
    if (++done_ < of_columns_) return;
    end_columns<COLUMNS, HALVES>(product_, block_, column_, columns_, tile_);
    column_ += COLUMNS;
    done_ = 0;
  }

  TileProduct product_;
  TileBlock block_;
  Vector* tile_;
  int columns_, column_, at_a_time_;
  int64_t done_, of_columns_, blocks_, credit_, pauses_;
  BFloat16 rest_[kRest<PARTS>];
};

#else

struct [[maybe_unused]] TileSession {};  // there are no tiles to release

#endif
