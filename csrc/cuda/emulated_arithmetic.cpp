// The primitives that compute, on the machine of emulator.cpp.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "emulated_machine.h"
#include "emulated_primitives.h"

namespace fused_rnn {

using namespace emulator;

uint32_t bits_of(float x) {
  uint32_t result;
  std::memcpy(&result, &x, 4);
  return result;
}

float float_of(uint32_t x) {
  float result;
  std::memcpy(&result, &x, 4);
  return result;
}

namespace {

uint32_t halves(uint32_t low, uint32_t high) { return (low & 0xffff) | high << 16; }

// Of `count` 8 x 8 matrices whose row r of number i lies at the address that lane 8 * i + r gave.
void transpose_from_shared(Warp& w, int count) {
  for (int i = 0; i < kLanes; i++) {
    for (int m = 0; m < count; m++) {
      const auto element = [&](int row) {
        uint16_t value;
        std::memcpy(&value, memory(w.in[8 * m + row][0] + 2 * static_cast<uint32_t>(i / 4), 2), 2);
        return static_cast<uint32_t>(value);
      };
      w.out[i][m] = halves(element(2 * (i % 4)), element(2 * (i % 4) + 1));
    }
  }
}

// kDepth: of a product; a word holds two numbers of 16 bits or one of 32.
template <int kDepth>
void write_products(Warp& w, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  for (int i = 0; i < kLanes; i++) {
    for (int q = 0; q < 4; q++) {
      const int row = i / 4 + 8 * (q / 2), column = 2 * (i % 4) + q % 2;
      float sum = 0.0f;
      for (int k = 0; k < kDepth; k++) sum += a[row][k] * b[k][column];
      w.out[i][q] = bits_of(sum);
    }
  }
}

template <class Format>
void multiply_warp(Warp& w) {
  float a[16][16], b[16][8];
  for (int i = 0; i < kLanes; i++) {
    const int row = i / 4, k = 2 * (i % 4);
    for (int e = 0; e < 2; e++) {
      const auto half = [&](int word) { return Format::low(w.in[i][word] >> (16 * e)); };
      a[row][k + e] = half(0);
      a[row + 8][k + e] = half(1);
      a[row][k + 8 + e] = half(2);
      a[row + 8][k + 8 + e] = half(3);
      b[k + e][row] = half(4);
      b[k + 8 + e][row] = half(5);
    }
  }
  write_products(w, a, b);
}

// Tensor cores do not look at the bits below TF32's.
template <>
void multiply_warp<Tf32>(Warp& w) {
  float a[16][8], b[8][8];
  for (int i = 0; i < kLanes; i++) {
    const int row = i / 4, k = i % 4;
    const auto number = [&](int word) { return float_of(w.in[i][word] & 0xffffe000u); };
    a[row][k] = number(0);
    a[row + 8][k] = number(1);
    a[row][k + 4] = number(2);
    a[row + 8][k + 4] = number(3);
    b[k][row] = number(4);
    b[k + 4][row] = number(5);
  }
  write_products(w, a, b);
}

template <class Format>
void multiply_lane(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  Warp& w = warp();
  const uint32_t in[6] = {a.x, a.y, a.z, a.w, b0, b1};
  std::copy_n(in, 6, w.in[lane()]);
  collective(multiply_warp<Format>);
  for (int q = 0; q < 4; q++) sum[q] += float_of(w.out[lane()][q]);
}

// x with a relative error of up to `size`, always the same for the same x.
float with_error(float x, float size) {
  const uint32_t hash = bits_of(x) * 2654435761u;
  return x * (1.0f + size * (static_cast<float>(hash >> 8) * 0x1p-23f - 1.0f));
}

}  // namespace

void load_transposed(uint32_t (&m)[1], uint32_t row) {
  Warp& w = warp();
  w.in[lane()][0] = row;
  collective([](Warp& all) { transpose_from_shared(all, 1); });
  m[0] = w.out[lane()][0];
}

void load_transposed(uint32_t (&m)[4], uint32_t row) {
  Warp& w = warp();
  w.in[lane()][0] = row;
  collective([](Warp& all) { transpose_from_shared(all, 4); });
  std::copy_n(w.out[lane()], 4, m);
}

uint32_t transpose(uint32_t m) {
  Warp& w = warp();
  w.in[lane()][0] = m;
  collective([](Warp& all) {
    for (int i = 0; i < kLanes; i++) {
      const auto element = [&](int row) { return all.in[row * 4 + i / 8][0] >> (i / 4 % 2 * 16); };
      all.out[i][0] = halves(element(2 * (i % 4)), element(2 * (i % 4) + 1));
    }
  });
  return w.out[lane()][0];
}

uint32_t Bfloat16::pack(float low, float high) {
  const auto rounded = [](float x) {
    const uint32_t bits = bits_of(x);
    if (std::isnan(x)) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return halves(rounded(low), rounded(high));
}

float Bfloat16::low(uint32_t x) { return float_of(x << 16); }

void Bfloat16::multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  multiply_lane<Bfloat16>(sum, a, b0, b1);
}

uint32_t Float16::pack(float low, float high) {
  const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t result;
  std::memcpy(&result, both, 4);
  return result;
}

float Float16::low(uint32_t x) {
  const auto bits = static_cast<uint16_t>(x);
  _Float16 result;
  std::memcpy(&result, &bits, 2);
  return static_cast<float>(result);
}

void Float16::multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  multiply_lane<Float16>(sum, a, b0, b1);
}

uint32_t Tf32::round(float x) {
  const uint32_t bits = bits_of(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

void Tf32::multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  multiply_lane<Tf32>(sum, a, b0, b1);
}

float tanh_approx(float x) { return with_error(std::tanh(x), 0x1p-11f); }
float exp2_approx(float x) { return with_error(std::exp2(x), 0x1p-22f); }
float reciprocal_approx(float x) { return with_error(1.0f / x, 0x1p-23f); }
float exp_exact(float x) { return std::exp(x); }
float tanh_exact(float x) { return std::tanh(x); }

}  // namespace fused_rnn
