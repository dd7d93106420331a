// The element types: how blocks of 8 units x 8 batch rows lie in shared memory and in a warp's
// registers, and how they are multiplied.
//
// After a product, and wherever the pointwise part runs, a lane has unit lane / 4 of a unit group
// and batch rows 2 * (lane % 4) and the next: two numbers of each gate ("lane order"). To be
// multiplied or stored, a block is exchanged into words, kWords per lane: word w of the lane is
// batch row `row(w)`, columns from `column()` on, of a row-major [8 rows][8 units] block. A block
// of words in shared memory is [word of lane 0, ...]: what a lane sends to the other CTAs as it is.
//
// A fragment of weights is two groups of 8 gate rows by one k step.
#pragma once

#include "primitives.h"
#include "tiles.h"

namespace fused_rnn {

FUSED_RNN_DEVICE int lane_index() { return thread_index() & (kWarp - 1); }
FUSED_RNN_DEVICE int warp_index() { return thread_index() / kWarp; }

// ---- Functions for csrc/cells.h.

struct CommonMath {
  using Value = float;
  // Comparisons with NaN are false: it stays one.
  FUSED_RNN_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }
  FUSED_RNN_DEVICE float relu_grad(float h, float d_h) { return h <= 0.0f ? 0.0f : d_h; }
};

// Within a quarter of bfloat16's last place.
struct Bfloat16Math : CommonMath {
  FUSED_RNN_DEVICE float tanh(float x) { return tanh_approx(x); }
  FUSED_RNN_DEVICE float sigmoid(float x) { return 0.5f * tanh_approx(0.5f * x) + 0.5f; }
};

// tanh.approx is as far off as half a last place of float16; these are nearly as fast.
struct Float16Math : CommonMath {
  static constexpr float kLog2E = 1.44269504f;
  FUSED_RNN_DEVICE float sigmoid(float x) {
    return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
  }
  FUSED_RNN_DEVICE float tanh(float x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
};

struct FloatMath : CommonMath {
  FUSED_RNN_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp_exact(-x)); }
  FUSED_RNN_DEVICE float tanh(float x) { return tanh_exact(x); }
};

// The sum of products on tensor cores: already in lane order, the first and the second group of 8.
struct TensorCoreSum {
  float v[4] = {};

  FUSED_RNN_DEVICE_MEMBER void add(const TensorCoreSum& other) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < 4; i++) v[i] += other.v[i];
  }

  FUSED_RNN_DEVICE_MEMBER void finish(float (&total)[4]) const {
    FUSED_RNN_UNROLL
    for (int i = 0; i < 4; i++) total[i] = v[i];
  }
};

// ---- 16-bit elements, multiplied on tensor cores.

template <class Format, class Functions>
struct HalfElement {
  using Math = Functions;
  using Stored = uint16_t;
  static constexpr int kBytes = 2;
  static constexpr int kWords = 1;
  // Products of a warp that are under way at a time, where each has a sum of its own.
  static constexpr int kDepth = 4;

  using Sum = TensorCoreSum;

  // One k step of the other operand: two blocks of words.
  struct Operand {
    uint32_t low, high;
  };

  // `whole` is known to the compiler, which cannot tell of an address that it is not null.
  FUSED_RNN_DEVICE Operand operand(const uint32_t* low, const uint32_t* high, bool whole = true) {
    const int lane = lane_index();
    return {low[lane], whole ? high[lane] : 0u};
  }

  FUSED_RNN_DEVICE void multiply(Sum& sum, const Fragment& a, const Operand& b) {
    Format::multiply(sum.v, a, b.low, b.high);
  }

  // Two numbers, of which the first lies at an even index.
  FUSED_RNN_DEVICE uint32_t pair(const Stored* from) {
    return *reinterpret_cast<const uint32_t*>(from);
  }

  FUSED_RNN_DEVICE void load_pair(const Stored* from, float (&v)[2]) {
    const uint32_t both = pair(from);
    v[0] = Format::low(both);
    v[1] = Format::high(both);
  }
  FUSED_RNN_DEVICE void store_pair(Stored* to, const float (&v)[2]) {
    *reinterpret_cast<uint32_t*>(to) = Format::pack(v[0], v[1]);
  }

  // Of a row-major matrix [.., k]: row(g) points to the lane's row of group g, or is null.
  template <class Row>
  FUSED_RNN_DEVICE Fragment fragment(const Row& row, int first, int k_end) {
    const int k = first + 2 * (lane_index() & 3);
    const auto load = [&](const Stored* from, int at) {
      return from != nullptr && at < k_end ? pair(from + at) : 0u;
    };
    const Stored *a = row(0), *b = row(1);
    return {load(a, k), load(b, k), load(a, k + 8), load(b, k + 8)};
  }

  // Of its transpose: 16 columns from `first` on, as rows, by two groups of 8 rows, as k.
  template <class Row>
  FUSED_RNN_DEVICE Fragment fragment_transposed(const Row& row, int first, int end) {
    const int lane = lane_index();
    const auto load = [&](int group, int column) {
      const Stored* from = row(group, lane >> 2);
      column += first + 2 * (lane & 3);
      return transpose(from != nullptr && column < end ? pair(from + column) : 0u);
    };
    Fragment f;
    f.x = load(0, 0);
    f.y = load(0, 8);
    f.z = load(1, 0);
    f.w = load(1, 8);
    return f;
  }

  FUSED_RNN_DEVICE void to_words(const float (&v)[2], uint32_t (&words)[1]) {
    words[0] = transpose(Format::pack(v[0], v[1]));
  }
  FUSED_RNN_DEVICE int row(int) { return lane_index() >> 2; }
  FUSED_RNN_DEVICE int column() { return 2 * (lane_index() & 3); }

  // kCount blocks, one after another in shared memory and row-major there, to lane order.
  template <int kCount>
  FUSED_RNN_DEVICE void load_blocks(uint32_t address, float (&v)[kCount][2]) {
    constexpr int kMatrices = kCount == 1 ? 1 : 4;
    static_assert(kCount <= 4);
    const int lane = lane_index();
    const int row = kCount == 1 ? lane & 7 : (lane < 8 * kCount ? lane : 0);
    uint32_t m[kMatrices];
    load_transposed(m, address + row * 16);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kCount; i++) {
      v[i][0] = Format::low(m[i]);
      v[i][1] = Format::high(m[i]);
    }
  }

  FUSED_RNN_DEVICE float to_float(const Stored* from) { return Format::low(*from); }
  FUSED_RNN_DEVICE float rounded(float x) { return Format::low(Format::pack(x, 0.0f)); }
};

using Bfloat16Element = HalfElement<Bfloat16, Bfloat16Math>;
using Float16Element = HalfElement<Float16, Float16Math>;

// ---- float32, multiplied exactly. Each lane sums up a quarter of k, for all 8 rows of a block.

struct FloatElement {
  using Math = FloatMath;
  using Stored = float;
  static constexpr int kBytes = 4;
  static constexpr int kWords = 2;
  static constexpr int kDepth = 1;

  struct Sum {
    float v[2][8] = {};

    // Of the four lanes of a unit, each is left with the total of its two batch rows.
    FUSED_RNN_DEVICE_MEMBER void finish(float (&total)[4]) const {
      const bool upper = lane_index() & 2, odd = lane_index() & 1;
      FUSED_RNN_UNROLL
      for (int group = 0; group < 2; group++) {
        float half[4];
        FUSED_RNN_UNROLL
        for (int i = 0; i < 4; i++) {
          const float mine = upper ? v[group][4 + i] : v[group][i];
          const float others = upper ? v[group][i] : v[group][4 + i];
          half[i] = mine + shuffle_xor(others, 2);
        }
        FUSED_RNN_UNROLL
        for (int i = 0; i < 2; i++) {
          const float mine = odd ? half[2 + i] : half[i];
          const float others = odd ? half[i] : half[2 + i];
          total[2 * group + i] = mine + shuffle_xor(others, 1);
        }
      }
    }
  };

  // The 8 batch rows of two k: the lane's number modulo 4, and 4 more.
  struct Operand {
    float v[2][8];
  };

  FUSED_RNN_DEVICE Operand operand(const uint32_t* block, const uint32_t*, bool = true) {
    Operand b;
    const float* from = reinterpret_cast<const float*>(block) + (lane_index() & 3) * 8;
    FUSED_RNN_UNROLL
    for (int i = 0; i < 2; i++) {
      FUSED_RNN_UNROLL
      for (int n = 0; n < 8; n += 4) {
        const float4 x = *reinterpret_cast<const float4*>(from + 32 * i + n);
        b.v[i][n] = x.x;
        b.v[i][n + 1] = x.y;
        b.v[i][n + 2] = x.z;
        b.v[i][n + 3] = x.w;
      }
    }
    return b;
  }

  FUSED_RNN_DEVICE void multiply(Sum& sum, const Fragment& a, const Operand& b) {
    FUSED_RNN_UNROLL
    for (int n = 0; n < 8; n++) {
      sum.v[0][n] += float_of(a.x) * b.v[0][n];
      sum.v[1][n] += float_of(a.y) * b.v[0][n];
      sum.v[0][n] += float_of(a.z) * b.v[1][n];
      sum.v[1][n] += float_of(a.w) * b.v[1][n];
    }
  }

  FUSED_RNN_DEVICE void load_pair(const Stored* from, float (&v)[2]) {
    const float2 both = *reinterpret_cast<const float2*>(from);
    v[0] = both.x;
    v[1] = both.y;
  }
  FUSED_RNN_DEVICE void store_pair(Stored* to, const float (&v)[2]) {
    *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
  }

  template <class Row>
  FUSED_RNN_DEVICE Fragment fragment(const Row& row, int first, int k_end) {
    const int k = first + (lane_index() & 3);
    const auto load = [&](const Stored* from, int at) {
      return from != nullptr && at < k_end ? bits_of(from[at]) : 0u;
    };
    const Stored *a = row(0), *b = row(1);
    return {load(a, k), load(b, k), load(a, k + 4), load(b, k + 4)};
  }

  template <class Row>
  FUSED_RNN_DEVICE Fragment fragment_transposed(const Row& row, int first, int end) {
    const int lane = lane_index();
    const auto load = [&](int k, int column) {
      const Stored* from = row(0, (lane & 3) + k);
      column += first + (lane >> 2);
      return from != nullptr && column < end ? bits_of(from[column]) : 0u;
    };
    return {load(0, 0), load(0, 8), load(4, 0), load(4, 8)};
  }

  FUSED_RNN_DEVICE void to_words(const float (&v)[2], uint32_t (&words)[2]) {
    words[0] = bits_of(v[0]);
    words[1] = bits_of(v[1]);
  }
  FUSED_RNN_DEVICE int row(int word) { return 2 * (lane_index() & 3) + word; }
  FUSED_RNN_DEVICE int column() { return lane_index() >> 2; }

  template <int kCount>
  FUSED_RNN_DEVICE void load_blocks(uint32_t address, float (&v)[kCount][2]) {
    const int lane = lane_index();
    FUSED_RNN_UNROLL
    for (int i = 0; i < kCount; i++) {
      FUSED_RNN_UNROLL
      for (int e = 0; e < 2; e++) {
        const int at = i * 64 + (2 * (lane & 3) + e) * 8 + (lane >> 2);
        v[i][e] = load_shared(address + at * 4);
      }
    }
  }

  FUSED_RNN_DEVICE float to_float(const Stored* from) { return *from; }
  FUSED_RNN_DEVICE float rounded(float x) { return x; }
};

// ---- float32, multiplied on tensor cores as TF32: rounded to nearest on its way into a product,
// and nowhere else. A fragment of weights lies as for FloatElement, and so does a block of words,
// which is [8 k][8 batch rows].

struct Tf32Element : FloatElement {
  static constexpr int kDepth = 4;
  using Sum = TensorCoreSum;

  struct Operand {
    uint32_t low, high;
  };

  FUSED_RNN_DEVICE Operand operand(const uint32_t* block, const uint32_t*, bool = true) {
    const uint32_t* from = block + (lane_index() & 3) * 8 + (lane_index() >> 2);
    return {Tf32::round(float_of(from[0])), Tf32::round(float_of(from[32]))};
  }

  FUSED_RNN_DEVICE void multiply(Sum& sum, const Fragment& a, const Operand& b) {
    Tf32::multiply(sum.v, a, b.low, b.high);
  }

  template <class Row>
  FUSED_RNN_DEVICE Fragment fragment(const Row& row, int first, int k_end) {
    return round(FloatElement::fragment(row, first, k_end));
  }

  template <class Row>
  FUSED_RNN_DEVICE Fragment fragment_transposed(const Row& row, int first, int end) {
    return round(FloatElement::fragment_transposed(row, first, end));
  }

  FUSED_RNN_DEVICE Fragment round(const Fragment& f) {
    return {Tf32::round(float_of(f.x)), Tf32::round(float_of(f.y)), Tf32::round(float_of(f.z)),
            Tf32::round(float_of(f.w))};
  }
};

// ---- What keeps products coming.

// How many sums the k steps of a warp take turns with, that has so many products in each: one that
// adds to the same sum as the one before has to wait for it. Tiles of more rows take turns too,
// which have no need to: a row's bits must not depend on the batch.
template <class Element>
constexpr int turns(int products) {
  return products < Element::kDepth ? Element::kDepth / products : 1;
}

// The total of a product's sums, added up in the order of their turns.
template <class Sum, int kTurns, int kProducts, int kBlocks>
FUSED_RNN_DEVICE void finish(Sum (&sums)[kTurns][kProducts][kBlocks], int product, int block,
                             float (&total)[4]) {
  Sum& sum = sums[0][product][block];
  if constexpr (kTurns > 1) {
    FUSED_RNN_UNROLL
    for (int turn = 1; turn < kTurns; turn++) sum.add(sums[turn][product][block]);
  }
  sum.finish(total);
}

// kCount fragments of weights that a lane has put into shared memory, a warp's apart; the next few
// are on their way before they are asked for.
template <class Element, int kCount>
class SharedWeights {
 public:
  FUSED_RNN_DEVICE_MEMBER explicit SharedWeights(const Fragment* from) : from_(from) {
    FUSED_RNN_UNROLL
    for (int i = 0; i < kAhead && i < kCount; i++) ahead_[i] = load_fragment(from_ + i * kWarp);
  }

  // In their order, each once.
  FUSED_RNN_DEVICE_MEMBER Fragment take(int i) {
    const Fragment weights = ahead_[i % kAhead];
    if (i + kAhead < kCount) ahead_[i % kAhead] = load_fragment(from_ + (i + kAhead) * kWarp);
    return weights;
  }

 private:
  static constexpr int kAhead = Element::kDepth;
  const Fragment* from_;
  Fragment ahead_[kAhead];
};

}  // namespace fused_rnn
