// Matrix elements in registers: how they are loaded, stored, paired and multiplied.
//
// A vector of words holds what one multiply-add per lane takes: a float, or two BFloat16 that
// follow one another in depth. Words only travel in float vectors; nothing computes with them.

#if defined(FUSED_RNN_BFLOAT16)

constexpr int kPairs = 2;  // elements in a word
typedef unsigned short Elements __attribute__((vector_size(kWidth * 2)));

FUSED_RNN_INLINE __mmask16 lanes_below(int valid) { return (__mmask16)((1u << valid) - 1); }

FUSED_RNN_INLINE Vector widen(Elements e) {
  return (Vector)(__builtin_convertvector(e, VectorBits) << 16);
}

FUSED_RNN_INLINE Elements narrow(Vector v) { return (Elements)_mm512_cvtneps_pbh((__m512)v); }

FUSED_RNN_INLINE Elements load_elements(const BFloat16* p, int valid) {
  return valid == kWidth ? (Elements)_mm256_loadu_si256((const __m256i*)p)
                         : (Elements)_mm256_maskz_loadu_epi16(lanes_below(valid), p);
}

FUSED_RNN_INLINE Vector load(const BFloat16* p, int valid) {
  return widen(load_elements(p, valid));
}

FUSED_RNN_INLINE void store(BFloat16* p, Vector v) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)narrow(v));
}

FUSED_RNN_INLINE void store(BFloat16* p, Vector v, int valid) {
  if (valid == kWidth) {
    store(p, v);
  } else {
    _mm256_mask_storeu_epi16(p, lanes_below(valid), (__m256i)narrow(v));
  }
}

// Up to `valid` elements that lie together as words, zero beyond.
FUSED_RNN_INLINE Vector load_words(const BFloat16* p, int64_t valid) {
  return valid >= 2 * kWidth
             ? (Vector)_mm512_loadu_si512(p)
             : (Vector)_mm512_maskz_loadu_epi16((__mmask32)((1ull << valid) - 1), p);
}

// Words of two rows of elements.
FUSED_RNN_INLINE Vector pair(const Elements* rows) {
  return (Vector)(__builtin_convertvector(rows[0], VectorBits) |
                  __builtin_convertvector(rows[1], VectorBits) << 16);
}

// The word at p in every lane; of a single element, with zero.
FUSED_RNN_INLINE Vector broadcast_word(const BFloat16* p) {
  int word;
  __builtin_memcpy(&word, p, sizeof(word));
  return (Vector)_mm512_set1_epi32(word);
}

FUSED_RNN_INLINE Vector broadcast_last(const BFloat16* p) {
  return (Vector)_mm512_set1_epi32(p->bits);
}

FUSED_RNN_INLINE Vector multiply_add(Vector sum, Vector a, Vector b) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

FUSED_RNN_INLINE void convert(BFloat16 from, float& to) {
  const unsigned bits = (unsigned)from.bits << 16;
  __builtin_memcpy(&to, &bits, sizeof(to));
}

FUSED_RNN_INLINE void convert(BFloat16 from, BFloat16& to) { to = from; }

#else

constexpr int kPairs = 1;
typedef Vector Elements;

FUSED_RNN_INLINE Elements narrow(Vector v) { return v; }

FUSED_RNN_INLINE Elements load_elements(const float* p, int valid) { return load(p, valid); }

FUSED_RNN_INLINE Vector load_words(const float* p, int64_t valid) {
  return load(p, (int)(valid < kWidth ? valid : kWidth));
}

FUSED_RNN_INLINE Vector pair(const Elements* rows) { return rows[0]; }

FUSED_RNN_INLINE Vector broadcast_word(const float* p) { return broadcast(*p); }

FUSED_RNN_INLINE Vector multiply_add(Vector sum, Vector a, Vector b) { return sum + a * b; }

#endif

FUSED_RNN_INLINE void convert(float from, float& to) { to = from; }

FUSED_RNN_INLINE int64_t words(int64_t depth) { return ceil_div(depth, kPairs); }
