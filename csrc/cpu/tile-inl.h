// The register tile that matrix products are made of where there is no AMX.
//
// Every sum is made of chains of kChain multiply-adds in the order of k, which are added up, so an
// element does not depend on the tile, batch, thread count or vector width it was computed with.
// The shorter the chains, the closer a sum is to the exact one: at H=512, of 256 each, y and the
// gradients of an LSTM were 1.1 to 1.4 times as far from it as torch.nn's, of 128 0.8 to 0.9 times.
// A chain's end costs a core 20 to 24 clocks: of the peak of a Zen 3 a tile of 6 rows reaches 97%
// with chains of 256, 96% of 128, 93% of 64.

constexpr int kMaxColumns = 4;

// Where this tile does all products and what was measured of AVX2 and AVX-512 holds.
#if defined(FUSED_RNN_AMX)
constexpr bool kOnX86WithoutAmx = false;
#else
constexpr bool kOnX86WithoutAmx = FUSED_RNN_VECTOR_WIDTH >= 8;
#endif

// Rows of a tile of `columns` vectors: as many as the registers hold. AVX-512 and ARM have 32, of
// which ARM's compiler takes one for each row's value: with AVX-512's rows it keeps sums in memory.
// Measured with AVX-512 on a prototype of this tile: 3 columns of 8 rows and 4 of 6 reach 92% of
// FMA peak, 4 of 4 reach 73%. AVX2's 16 are one too few for 4 columns of 3 rows with a register for
// each column, which reach 66% of it; 2 columns of 6 rows and then 2 more reach 99%. Without FMA
// that gains nothing.
constexpr bool kTwoColumnsAtATime = FUSED_RNN_VECTOR_WIDTH == 8;

constexpr int vector_rows(int columns) {
#if FUSED_RNN_VECTOR_WIDTH == 16
  constexpr int rows[] = {12, 12, 8, 6};
#elif defined(__aarch64__)
  constexpr int rows[] = {12, 10, 7, 5};
#else
  constexpr int rows[] = {8, 6, 4, kTwoColumnsAtATime ? 6 : 3};
#endif
  return rows[columns - 1];
}

FUSED_RNN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Two BFloat16 that follow one another in depth and become floats as they are read; the second is
// zero where depth is odd.
struct HalfPair {
  unsigned bits;
};

// Four weights that follow one another in depth, see bytes-inl.h.
struct ByteQuad {
  unsigned bits;
};

// Numbers of a word.
template <class Word>
constexpr int kNumbersOf = kPairs;
template <>
constexpr int kNumbersOf<HalfPair> = 2;
template <>
constexpr int kNumbersOf<ByteQuad> = 4;

template <class Word>
constexpr bool kOfHalves = false;
template <>
constexpr bool kOfHalves<HalfPair> = true;

constexpr int kLine = 64;  // bytes of the cache

// Memory that the next products will read, asked for while this one multiplies: where weights come
// from L3 or beyond, the first tile that meets a panel would wait for it. With AVX2 on a Zen 3,
// whose L2 has 512 KiB, products of 16 to 64 rows with matrices of 16 MiB take 1.15 to 1.45 times
// less; with AVX-512 on an Ice Lake, block after block (Tiles), 1.25 to 1.8 times. On a Xeon with
// AMX, whose L2 has 2 MiB, a prototype lost with AVX-512: there nobody asks.
struct Ahead {
  const char *next = nullptr, *end = nullptr;
  int64_t pace = kLine / 2;  // bytes for every word of depth, up to a line
};

constexpr bool kAsksAhead = kOnX86WithoutAmx;

// Whether a panel of so many columns may be in halves (PackedMatrix), so that what is read follows
// on what was read before. With all four side by side products took 1.05 times as long where
// weights are in L2, and 1.2 to 2 times beyond.
constexpr bool has_halves(int columns) { return kTwoColumnsAtATime && columns == 4; }

// Three rows of four columns do fit into AVX2's registers with a value of each row and one column
// at a time: from L2 88 GFLOP/s on a Zen 3. Two columns and then two more reach 65, for six sums
// are too few to hide their latency.
template <int COLUMNS, int ROWS>
constexpr bool kColumnAtATime = kTwoColumnsAtATime && COLUMNS == 4 && ROWS == 3;

// Of so many numbers there is a chain, see above.
constexpr int64_t kChain = 128 * kPairs;

// Of so much depth, of whole chains, a panel's halves lie together; and tiles are multiplied one
// after the other, before the next block of the panel (Tiles). Four columns of it have 32 KiB.
constexpr int64_t kBlock = (FUSED_RNN_VECTOR_WIDTH == 16 ? 1 : 2) * kChain;

// tile [ROWS, COLUMNS], of rows ALL columns apart, = or += a [ROWS, depth] times panel, [words,
// BESIDE] for every BESIDE of the columns, of a depth of up to kBlock. Panels are words, floats as
// such or, of a stepper, pairs of halves.
template <int COLUMNS, int ROWS, int ALL = COLUMNS, int BESIDE = ALL, class Word>
__attribute__((noinline)) void multiply_block(int64_t depth, const Element* a, int64_t a_stride,
                                              const Word* panel, bool add, Vector* tile,
                                              Ahead* ahead = nullptr, int64_t chain = kChain) {
  Vector sum[ROWS][COLUMNS];
  const auto advance = [&](int64_t k, const Vector(&b)[COLUMNS],
                           auto value_at) __attribute__((always_inline)) {
    FUSED_RNN_UNROLL
    for (int row = 0; row < ROWS; row++) {
      const Vector value = value_at(a + row * a_stride + k);
      FUSED_RNN_UNROLL
      for (int column = 0; column < COLUMNS; column++) {
        sum[row][column] = multiply_add(sum[row][column], value, b[column]);
      }
    }
  };
  const int64_t block = depth * BESIDE * kWidth;
  const auto load_column = [&](int column) __attribute__((always_inline)) {
    return load((const float*)(panel + column / BESIDE * block + column % BESIDE * kWidth));
  };
  const auto load_panel = [&](Vector(&b)[COLUMNS]) __attribute__((always_inline)) {
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++) b[column] = load_column(column);
    panel += BESIDE * kWidth;
  };
  // A column at a time for all rows, whose values stay in registers.
  const auto advance_rows = [&](int64_t k) __attribute__((always_inline)) {
    Vector values[ROWS];
    FUSED_RNN_UNROLL
    for (int row = 0; row < ROWS; row++) values[row] = broadcast_word(a + row * a_stride + k);
    FUSED_RNN_UNROLL
    for (int column = 0; column < COLUMNS; column++) {
      const Vector weight = load_column(column);
      FUSED_RNN_UNROLL
      for (int row = 0; row < ROWS; row++) {
        sum[row][column] = multiply_add(sum[row][column], values[row], weight);
      }
    }
    panel += BESIDE * kWidth;
  };
  const auto word_at = [](const Element* p) { return broadcast_word(p); };
  // The sums' numbers from k on, below `end`.
  int64_t k = 0;
  const auto add_up = [&](int64_t end) __attribute__((always_inline)) {
    FUSED_RNN_UNROLL
    for (int row = 0; row < ROWS; row++) {
      FUSED_RNN_UNROLL
      for (int column = 0; column < COLUMNS; column++) sum[row][column] = Vector{};
    }
    Vector b[COLUMNS];
    if constexpr (kOfHalves<Word>) {
      for (; k < end; k += 2) {
        load_panel(b);
        Vector high[COLUMNS];
        FUSED_RNN_UNROLL
        for (int column = 0; column < COLUMNS; column++) {
          high[column] = (Vector)((VectorBits)b[column] & 0xffff0000u);
          b[column] = (Vector)((VectorBits)b[column] << 16);
        }
        advance(k, b, word_at);
        if (k + 1 < end) advance(k + 1, high, word_at);
      }
    } else {
      const auto multiply_word = [&](int64_t at) __attribute__((always_inline)) {
        if constexpr (kColumnAtATime<COLUMNS, ROWS>) {
          advance_rows(at);
        } else {
          load_panel(b);
          advance(at, b, word_at);
        }
      };
      if constexpr (kAsksAhead) {
        if (ahead && ahead->next < ahead->end) {
          const char* next = ahead->next;
          const int64_t pace = ahead->pace;
          FUSED_RNN_NO_UNROLL
          for (; k + kPairs <= end; k += kPairs) {
            __builtin_prefetch(next, 0, 2);
            next += pace;
            multiply_word(k);
          }
          ahead->next = next;
        }
      }
      for (; k + kPairs <= end; k += kPairs) multiply_word(k);
#if defined(FUSED_RNN_BFLOAT16)
      if (k < end) {
        load_panel(b);
        advance(k, b, [](const Element* p) { return broadcast_last(p); });
        k = end;
      }
#endif
    }
  };
  while (true) {
    const int64_t end = smaller(k + chain, depth);
    add_up(end);
    FUSED_RNN_UNROLL
    for (int row = 0; row < ROWS; row++) {
      FUSED_RNN_UNROLL
      for (int column = 0; column < COLUMNS; column++) {
        Vector* to = tile + row * ALL + column;
        *to = add ? *to + sum[row][column] : sum[row][column];
      }
    }
    if (end == depth) return;
    add = true;
  }
}

// A block of all columns, of which the registers hold two at a time where there may be halves. Of
// up to three rows, sums of two columns are too few to hide their latency.
template <int COLUMNS, int ROWS, int ALL, int BESIDE, class Word>
FUSED_RNN_INLINE void multiply_columns(int64_t depth, const Element* a, int64_t a_stride,
                                       const Word* panel, bool add, Vector* tile, Ahead* ahead,
                                       int64_t chain) {
  constexpr int kTogether = COLUMNS == ALL && has_halves(COLUMNS) && ROWS > 3 ? 2 : COLUMNS;
  for (int column = 0; column < COLUMNS; column += kTogether) {
    multiply_block<kTogether, ROWS, ALL, BESIDE>(
        depth, a, a_stride, panel + column * (BESIDE == ALL ? 1 : depth) * kWidth, add,
        tile + column, ahead, chain);
  }
}

template <int COLUMNS, int ROWS, int ALL = COLUMNS, int BESIDE = ALL, class Word>
void multiply_tile(int64_t depth, const Element* a, int64_t a_stride, const Word* panel,
                   Vector* tile, Ahead* ahead = nullptr, int64_t chain = kChain, bool add = false) {
  const int64_t block = has_halves(ALL) || depth == 0 ? kBlock : depth;
  for (int64_t k = 0; k == 0 || k < depth; k += block) {
    multiply_columns<COLUMNS, ROWS, ALL, BESIDE>(smaller(block, depth - k), a + k, a_stride, panel,
                                                 add || k > 0, tile, ahead, chain);
    panel += kBlock / kNumbersOf<Word> * ALL * kWidth;
  }
}

template <int COLUMNS, int ROWS = vector_rows(COLUMNS), int ALL = COLUMNS, int BESIDE = ALL,
          class Word>
void multiply_rows(int rows, int64_t depth, const Element* a, int64_t a_stride, const Word* panel,
                   Vector* tile, Ahead* ahead = nullptr, int64_t chain = kChain, bool add = false) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      multiply_rows<COLUMNS, ROWS - 1, ALL, BESIDE>(rows, depth, a, a_stride, panel, tile, ahead,
                                                    chain, add);
      return;
    }
  }
  multiply_tile<COLUMNS, ROWS, ALL, BESIDE>(depth, a, a_stride, panel, tile, ahead, chain, add);
}

// Calls body.operator()<columns>().
template <class Body>
FUSED_RNN_INLINE void for_columns(int columns, Body body) {
  switch (columns) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    default:
      return body.template operator()<4>();
  }
}

template <class Word>
static void multiply_words(int columns, int rows, int64_t depth, const Element* a, int64_t a_stride,
                           const Word* panel, Vector* tile, bool in_halves = false,
                           Ahead* ahead = nullptr, int64_t chain = kChain, bool add = false) {
  switch (columns) {
    case 1:
      return multiply_rows<1>(rows, depth, a, a_stride, panel, tile, ahead, chain, add);
    case 2:
      return multiply_rows<2>(rows, depth, a, a_stride, panel, tile, ahead, chain, add);
    case 3:
      return multiply_rows<3>(rows, depth, a, a_stride, panel, tile, ahead, chain, add);
    default:
      if constexpr (has_halves(4)) {
        constexpr int kRows = vector_rows(4);
        if (in_halves) {
          return multiply_rows<4, kRows, 4, 2>(rows, depth, a, a_stride, panel, tile, ahead, chain,
                                               add);
        }
      }
      return multiply_rows<4>(rows, depth, a, a_stride, panel, tile, ahead, chain, add);
  }
}

// Asks for `vectors` vectors of each row of a tile, which the end of a product will want: short
// pieces far apart are not foreseen by the hardware.
template <class T>
FUSED_RNN_INLINE void prefetch(const T* first, int64_t stride, int rows, int vectors) {
  constexpr int kStep = kLine / sizeof(T);
  for (int m = 0; m < rows; m++) {
    for (int i = 0; i < vectors * kWidth; i += kStep) __builtin_prefetch(first + m * stride + i);
  }
}

// How many of the kWidth elements from `first` are below `limit`.
FUSED_RNN_INLINE int valid_lanes(int64_t first, int64_t limit) {
  return (int)smaller(kWidth, limit - first);
}
