// A vector of floats through the compiler's vector extensions, and the functions cells need.
//
// Included once per instruction set, inside that set's namespace, with FUSED_RNN_VECTOR_WIDTH
// defined. Intrinsics only where the compiler does not find the instruction by itself: the rest
// serves x86, ARM and whatever else.

typedef float Vector __attribute__((vector_size(FUSED_RNN_VECTOR_WIDTH * 4)));
typedef unsigned VectorBits __attribute__((vector_size(FUSED_RNN_VECTOR_WIDTH * 4)));
typedef int VectorIndex __attribute__((vector_size(FUSED_RNN_VECTOR_WIDTH * 4)));
typedef float UnalignedVector
    __attribute__((vector_size(FUSED_RNN_VECTOR_WIDTH * 4), aligned(4), may_alias));

constexpr int kWidth = FUSED_RNN_VECTOR_WIDTH;

// The compilers keep accumulators in registers only where such loops disappear early.
#if defined(__clang__)
#define FUSED_RNN_UNROLL _Pragma("unroll")
#define FUSED_RNN_NO_UNROLL _Pragma("nounroll")
#else
#define FUSED_RNN_UNROLL _Pragma("GCC unroll 16")
#define FUSED_RNN_NO_UNROLL _Pragma("GCC unroll 1")
#endif
#define FUSED_RNN_INLINE_METHOD __attribute__((always_inline)) inline
#define FUSED_RNN_INLINE static FUSED_RNN_INLINE_METHOD

FUSED_RNN_INLINE Vector load(const float* p) { return *(const UnalignedVector*)p; }

FUSED_RNN_INLINE void store(float* p, Vector v) { *(UnalignedVector*)p = v; }

// x - 0 is x for every x; x + 0 would lose the sign of -0.
FUSED_RNN_INLINE Vector broadcast(float x) { return x - Vector{}; }

// The first `valid` of kWidth lanes; the others load as zero and are not stored.
//
// Stores are of whole pieces: a load of what a masked one leaves out waits until that is done, as
// if it were stored, and next rows of small layers lie there. RNNs of up to 15 units took 1.9
// to 2.6 times as long in inference; with AVX2, whose masked stores AMD is slow at, all cells 1.1
// to 1.6 times.
#if FUSED_RNN_VECTOR_WIDTH >= 8
FUSED_RNN_INLINE void store_pieces(float* p, __m256 v, int valid) {
  __m128 half = _mm256_castps256_ps128(v);
  if (valid & 4) {
    _mm_storeu_ps(p, half);
    half = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (valid & 2) {
    _mm_storel_pi((__m64*)p, half);
    half = _mm_movehl_ps(half, half);
    p += 2;
  }
  if (valid & 1) _mm_store_ss(p, half);
}
#endif

#if FUSED_RNN_VECTOR_WIDTH == 16
FUSED_RNN_INLINE Vector load_tail(const float* p, int valid) {
  return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << valid) - 1), p);
}

FUSED_RNN_INLINE void store_tail(float* p, Vector v, int valid) {
  const __m256 first = _mm512_castps512_ps256((__m512)v);
  if (valid < 8) return store_pieces(p, first, valid);
  // The last eight overlap the first: 1.05 times as fast as pieces at 15 units.
  const VectorIndex lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512 last = _mm512_permutexvar_ps((__m512i)(lanes + (valid - 8)), (__m512)v);
  _mm256_storeu_ps(p, first);
  _mm256_storeu_ps(p + valid - 8, _mm512_castps512_ps256(last));
}
#elif FUSED_RNN_VECTOR_WIDTH == 8
FUSED_RNN_INLINE VectorIndex tail_mask(int valid) {
  const VectorIndex lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  return lanes < valid - VectorIndex{};
}

FUSED_RNN_INLINE Vector load_tail(const float* p, int valid) {
  return (Vector)_mm256_maskload_ps(p, (__m256i)tail_mask(valid));
}

FUSED_RNN_INLINE void store_tail(float* p, Vector v, int valid) {
  store_pieces(p, (__m256)v, valid);
}
#else
__attribute__((noinline)) static Vector load_tail(const float* p, int valid) {
  float lanes[kWidth] = {};
  for (int i = 0; i < valid; i++) lanes[i] = p[i];
  return load(lanes);
}

__attribute__((noinline)) static void store_tail(float* p, Vector v, int valid) {
  float lanes[kWidth];
  store(lanes, v);
  for (int i = 0; i < valid; i++) p[i] = lanes[i];
}
#endif

FUSED_RNN_INLINE Vector load(const float* p, int valid) {
  return valid == kWidth ? load(p) : load_tail(p, valid);
}

FUSED_RNN_INLINE void store(float* p, Vector v, int valid) {
  if (valid == kWidth) {
    store(p, v);
  } else {
    store_tail(p, v, valid);
  }
}

// The lanes of a and b in turns: a0 b0 a1 b1 ..., the first half and the second.
FUSED_RNN_INLINE void interleave(Vector a, Vector b, Vector& low, Vector& high) {
#if FUSED_RNN_VECTOR_WIDTH == 16
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high =
      __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif FUSED_RNN_VECTOR_WIDTH == 8
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// rows[i][j] <-> rows[j][i], by log2(kWidth) perfect shuffles of the whole block.
FUSED_RNN_INLINE void transpose(Vector (&rows)[kWidth]) {
  FUSED_RNN_UNROLL
  for (int round = 1; round < kWidth; round *= 2) {
    Vector shuffled[kWidth];
    FUSED_RNN_UNROLL
    for (int i = 0; i < kWidth / 2; i++) {
      interleave(rows[i], rows[i + kWidth / 2], shuffled[2 * i], shuffled[2 * i + 1]);
    }
    FUSED_RNN_UNROLL
    for (int i = 0; i < kWidth; i++) rows[i] = shuffled[i];
  }
}

// The sum of each row's lanes, in the lane of the row's number: the same shuffles, adding on the
// way, so that each round has half as many rows as the one before.
template <int HALF = kWidth / 2>
FUSED_RNN_INLINE Vector sum_rows(Vector (&rows)[kWidth]) {
  FUSED_RNN_UNROLL
  for (int i = 0; i < HALF; i++) {
    Vector low, high;
    interleave(rows[i], rows[i + HALF], low, high);
    rows[i] = low + high;
  }
  if constexpr (HALF > 1) {
    return sum_rows<HALF / 2>(rows);
  } else {
    return rows[0];
  }
}

// Kahan's sum, with what rounding has taken from it: its error does not grow with the number of
// what is added.
struct CompensatedSum {
  Vector sum, lost;

  FUSED_RNN_INLINE_METHOD void add(Vector v) {
    const Vector wanted = v - lost, next = sum + wanted;
    const Vector rounded = (next - sum) - wanted;
    // Of infinity it is NaN, and nothing is lost.
    lost = (Vector)((VectorBits)rounded & (VectorBits)(rounded == rounded));
    sum = next;
  }
};

// 1.5 * 2^23: added to less than a third of it, the low bits of the sum are the nearest integer.
constexpr float kRoundToInteger = 12582912.0f;

// exp(x) = scale * (1 + fraction) with scale a power of two and |fraction| < 0.42; Cephes'
// polynomial. Wants -87.9 < x <= 89, where scale overflows to inf from 88.4 on. NaN gives NaN.
FUSED_RNN_INLINE void split_exp(Vector x, Vector& scale, Vector& fraction) {
  const Vector shifted = x * 1.44269504088896341f + kRoundToInteger;
  const Vector n = shifted - kRoundToInteger;
  scale = (Vector)(((VectorBits)shifted + 127u) << 23);
  Vector r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  // In three pairs, which wait for each other less than one after the other would.
  const Vector square = r * r;
  Vector q = r * 1.9875691500e-4f + 1.3981999507e-3f;
  q = q * square + (r * 8.3334519073e-3f + 4.1665795894e-2f);
  q = q * square + (r * 1.6666665459e-1f + 5.0000001201e-1f);
  fraction = square * q + r;
}

// x between two bounds; a NaN stays one.
FUSED_RNN_INLINE Vector clamp(Vector x, float low, float high) {
#if FUSED_RNN_VECTOR_WIDTH == 16
  // Of these instructions' operands, the second is the result where either is NaN. The masked
  // forms, with a full mask, are the ones that gcc does not warn about.
  const __m512 least = _mm512_mask_max_ps((__m512)x, 0xffff, _mm512_set1_ps(low), (__m512)x);
  return (Vector)_mm512_mask_min_ps(least, 0xffff, _mm512_set1_ps(high), least);
#elif FUSED_RNN_VECTOR_WIDTH == 8
  return (Vector)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)x));
#else
  // Comparisons with NaN are false.
  x = x < broadcast(low) ? broadcast(low) : x;
  return x > broadcast(high) ? broadcast(high) : x;
#endif
}

// What csrc/cells.h asks for. Both functions stay within 2.5 ulp where FMA exists.
struct Math {
  using Value = Vector;

  FUSED_RNN_INLINE Vector sigmoid(Vector x) {
    Vector scale, fraction;
    split_exp(clamp(-x, -87.0f, 89.0f), scale, fraction);
    return 1.0f / (scale * (fraction + 1.0f) + 1.0f);
  }

  // tanh(x) = e / (e + 2) with e = exp(2x) - 1, which keeps small x exact.
  FUSED_RNN_INLINE Vector tanh(Vector x) {
    Vector scale, fraction;
    split_exp(clamp(x + x, -40.0f, 40.0f), scale, fraction);
    const Vector e = scale * fraction + (scale - 1.0f);
    return e / (e + 2.0f);
  }

  FUSED_RNN_INLINE Vector relu(Vector x) { return x < Vector{} ? Vector{} : x; }

  // d_h where relu let its input through. A NaN h passes d_h on, as torch does.
  FUSED_RNN_INLINE Vector relu_grad(Vector h, Vector d_h) { return h <= Vector{} ? Vector{} : d_h; }
};
