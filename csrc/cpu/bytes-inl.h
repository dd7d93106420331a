// Products of whole numbers: a stepper's weights as bytes, and rows quantised for one step.
//
// A weight is its byte less 128, times a scale of its unit; an element of a row is a whole number
// from -127 to 127, times a scale of the row. Sums of products are exact, so that every instruction
// set gives the same: the scales come last.

#if !defined(FUSED_RNN_BFLOAT16)

// How a row's numbers lie, four that follow one another in depth at a time: as a word's bytes
// where instructions multiply and add these, AVX512-VNNI's or ARM's. With AVX2 as the bytes of
// their magnitudes, then their own; else as two pairs of 16 bits, of the even ones and of the odd.
#if FUSED_RNN_VECTOR_WIDTH == 16 || defined(__aarch64__)
constexpr int kQuadFloats = 1;
#else
constexpr int kQuadFloats = 2;
#endif

// The rows' numbers are padded to whole blocks of so many.
constexpr int kQuantisedBlock = 16;

static int64_t quantised_words(int64_t depth) {
  return ceil_div(depth, kQuantisedBlock) * (kQuantisedBlock / 4) * kQuadFloats;
}

FUSED_RNN_INLINE int largest_lane(VectorIndex v) {
  int largest = v[0];
  for (int i = 1; i < kWidth; i++) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

FUSED_RNN_INLINE int sum_lanes(VectorIndex v) {
  int sum = 0;
  for (int i = 0; i < kWidth; i++) sum += v[i];
  return sum;
}

FUSED_RNN_INLINE void store_quads(VectorIndex numbers, int64_t k, void* row) {
#if FUSED_RNN_VECTOR_WIDTH == 16 || defined(__aarch64__)
  typedef signed char Bytes __attribute__((vector_size(FUSED_RNN_VECTOR_WIDTH)));
  const Bytes bytes = __builtin_convertvector(numbers, Bytes);
  __builtin_memcpy((char*)row + k, &bytes, sizeof(bytes));
#elif FUSED_RNN_VECTOR_WIDTH == 8
  const __m256i both = _mm256_packs_epi32(_mm256_abs_epi32((__m256i)numbers), (__m256i)numbers);
  // Of each half of the register the first 8 bytes.
  const __m256i quads = _mm256_permute4x64_epi64(_mm256_packs_epi16(both, both), 0b1000);
  _mm_storeu_si128((__m128i*)((float*)row + k / 4 * kQuadFloats), _mm256_castsi256_si128(quads));
#else
  short* to = (short*)row + k;
  FUSED_RNN_UNROLL
  for (int i = 0; i < kWidth; i += 4) {
    to[i] = (short)numbers[i];
    to[i + 1] = (short)numbers[i + 2];
    to[i + 2] = (short)numbers[i + 1];
    to[i + 3] = (short)numbers[i + 3];
  }
#endif
}

static void quantise_row(const float* row, int64_t depth, void* numbers, float& scale, int& sum) {
  // As bits, magnitudes are in the order of their values, infinity and NaN last.
  VectorIndex largest{};
  for (int64_t k = 0; k < depth; k += kWidth) {
    const VectorIndex bits =
        (VectorIndex)((VectorBits)load(row + k, valid_lanes(k, depth)) & 0x7fffffffu);
    largest = bits > largest ? bits : largest;
  }
  const int magnitude_bits = largest_lane(largest);
  float magnitude;
  __builtin_memcpy(&magnitude, &magnitude_bits, sizeof(magnitude));
  // Of less than that the reciprocal would be infinite.
  const bool finite = magnitude_bits < 0x7f800000, any = finite && magnitude > 1e-35f;
  scale = finite ? magnitude / 127.0f : __builtin_nanf("");
  const float inverse = any ? 127.0f / magnitude : 0.0f;
  const VectorBits zero = (VectorBits)broadcast(kRoundToInteger);
  VectorIndex total{};
  const int64_t padded = ceil_div(depth, kQuantisedBlock) * kQuantisedBlock;
  for (int64_t k = 0; k < padded; k += kWidth) {
    Vector value{};
    if (any && k < depth) value = load(row + k, valid_lanes(k, depth)) * inverse;
    const VectorIndex rounded = (VectorIndex)((VectorBits)(value + kRoundToInteger) - zero);
    total += rounded;
    store_quads(rounded, k, numbers);
  }
  sum = sum_lanes(total);
}

// Rows [begin, end) of what they are quantised from, which lie `stride` apart.
static void quantise_rows(const StepRows& rows, int64_t depth, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row++) {
    quantise_row(rows.first + row * rows.stride, depth, rows.numbers + row * quantised_words(depth),
                 rows.scales[row], rows.sums[row]);
  }
}

#if FUSED_RNN_VECTOR_WIDTH == 16
#define FUSED_RNN_BYTES_TARGET __attribute__((target("avx512vnni")))
#elif defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
#define FUSED_RNN_BYTES_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define FUSED_RNN_DOT_PRODUCTS
#else
#define FUSED_RNN_BYTES_TARGET
#if defined(__ARM_FEATURE_DOTPROD)  // clang's header has them only then
#define FUSED_RNN_DOT_PRODUCTS
#endif
#endif

// add_quad: sum + the bytes of each word times those of the quad; with DOTS by instructions that
// not every CPU of the instruction set has.

#if FUSED_RNN_VECTOR_WIDTH == 16

template <bool DOTS>
FUSED_RNN_BYTES_TARGET FUSED_RNN_INLINE VectorIndex add_quad(VectorIndex sum, VectorBits words,
                                                             const void* quad) {
  int bytes;
  __builtin_memcpy(&bytes, quad, sizeof(bytes));
  return (VectorIndex)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)words, _mm512_set1_epi32(bytes));
}

#elif defined(__aarch64__)

template <bool DOTS>
FUSED_RNN_BYTES_TARGET FUSED_RNN_INLINE VectorIndex add_quad(VectorIndex sum, VectorBits words,
                                                             const void* quad) {
  const int8x16_t weights = (int8x16_t)(words ^ 0x80808080u);
  const int8x16_t numbers = vreinterpretq_s8_s32(vld1q_dup_s32((const int*)quad));
#if defined(FUSED_RNN_DOT_PRODUCTS)
  if constexpr (DOTS) return (VectorIndex)vdotq_s32((int32x4_t)sum, weights, numbers);
#endif
  // A product is 2^14 at most, so that the sum of two fits.
  const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(numbers));
  const int16x8_t high = vmull_high_s8(weights, numbers);
  return (VectorIndex)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
}

#elif FUSED_RNN_VECTOR_WIDTH == 8

template <bool DOTS>
FUSED_RNN_INLINE VectorIndex add_quad(VectorIndex sum, VectorBits words, const void* quad) {
  const __m256i magnitudes = (__m256i)broadcast_word((const float*)quad);
  const __m256i numbers = (__m256i)broadcast_word((const float*)quad + 1);
  // One factor has no sign for this instruction: the other gets both. A product is 127 squared at
  // most, so that the sum of two fits into 16 bits.
  const __m256i weights = _mm256_sign_epi8((__m256i)(words ^ 0x80808080u), numbers);
  const __m256i pairs = _mm256_maddubs_epi16(magnitudes, weights);
  return sum + (VectorIndex)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

#else

// Of each lane's two numbers of 16 bits, the sum of the products.
FUSED_RNN_INLINE VectorBits multiply_pairs(VectorBits a, VectorBits b) {
#if defined(__SSE2__)
  return (VectorBits)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const VectorIndex low = ((VectorIndex)a << 16 >> 16) * ((VectorIndex)b << 16 >> 16);
  return (VectorBits)(low + ((VectorIndex)a >> 16) * ((VectorIndex)b >> 16));
#endif
}

template <bool DOTS>
FUSED_RNN_INLINE VectorIndex add_quad(VectorIndex sum, VectorBits words, const void* quad) {
  unsigned pairs[2];
  __builtin_memcpy(pairs, quad, sizeof(pairs));
  const VectorBits none{};
  const VectorBits even = multiply_pairs(words & 0x00ff00ffu, none + pairs[0]);
  const VectorBits odd = multiply_pairs(words >> 8 & 0x00ff00ffu, none + pairs[1]);
  return (VectorIndex)((VectorBits)sum + even + odd);
}
#endif

// What a byte is more than its weight, where it is multiplied as it is.
#if defined(__aarch64__) || FUSED_RNN_VECTOR_WIDTH == 8
constexpr unsigned kExcess = 0;
#else
constexpr unsigned kExcess = 128;
#endif

// tile [ROWS, COLUMNS] = the quantised rows from `row` on times panel [words, COLUMNS], which are
// of ALL columns that lie side by side, without the units' scales.
template <int COLUMNS, int ROWS, int ALL, bool DOTS>
FUSED_RNN_BYTES_TARGET __attribute__((noinline)) void multiply_bytes(
    int64_t depth, const StepRows& rows, int64_t row, const ByteQuad* panel, Vector* tile) {
  const int64_t stride = quantised_words(depth), words = ceil_div(depth, 4);
  const float* numbers = rows.numbers + row * stride;
  const float* scales = rows.scales + row;
  const int* sums = rows.sums + row;
  VectorIndex sum[ROWS][COLUMNS];  // modulo 2^32: only the last needs to fit
  FUSED_RNN_UNROLL
  for (int m = 0; m < ROWS; m++) {
    const unsigned excess = kExcess * (unsigned)sums[m];
    FUSED_RNN_UNROLL
    for (int i = 0; i < COLUMNS; i++) sum[m][i] = (VectorIndex)(VectorBits{} - excess);
  }
  for (int64_t k = 0; k < words; k++) {
    VectorBits b[COLUMNS];
    FUSED_RNN_UNROLL
    for (int i = 0; i < COLUMNS; i++) b[i] = (VectorBits)load((const float*)(panel + i * kWidth));
    panel += ALL * kWidth;
    FUSED_RNN_UNROLL
    for (int m = 0; m < ROWS; m++) {
      FUSED_RNN_UNROLL
      for (int i = 0; i < COLUMNS; i++) {
        sum[m][i] = add_quad<DOTS>(sum[m][i], b[i], numbers + m * stride + k * kQuadFloats);
      }
    }
  }
  FUSED_RNN_UNROLL
  for (int m = 0; m < ROWS; m++) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      tile[m * ALL + i] = __builtin_convertvector(sum[m][i], Vector) * scales[m];
    }
  }
}

template <int COLUMNS, int ROWS, int ALL = COLUMNS>
static void multiply_bytes_of(int rows, int64_t depth, const StepRows& a, int64_t row,
                              const ByteQuad* panel, Vector* tile) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) {
      return multiply_bytes_of<COLUMNS, ROWS - 1, ALL>(rows, depth, a, row, panel, tile);
    }
  }
#if defined(__aarch64__)
  if (!cpu_has_dot_products()) {
    return multiply_bytes<COLUMNS, ROWS, ALL, false>(depth, a, row, panel, tile);
  }
#endif
  multiply_bytes<COLUMNS, ROWS, ALL, true>(depth, a, row, panel, tile);
}

#endif
