// The host twin of primitives.h: the kernels' sources as plain C++, in which every CUDA thread is a
// fiber of emulator.h. Asynchronous copies arrive late and out of order, shared memory is poisoned,
// and threads are stopped wherever hardware might stop them.
#pragma once

#include <cstdint>

#include "emulator.h"

#define FUSED_RNN_DEVICE static inline
#define FUSED_RNN_DEVICE_MEMBER inline
#define FUSED_RNN_UNROLL
#define FUSED_RNN_KERNEL(threads) static void
#define FUSED_RNN_SHARED(name) unsigned char* const name = emulator::shared_memory()
#define FUSED_RNN_HAS_CLUSTERS 1

namespace fused_rnn {

struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

using Fragment = uint4;

enum class Order { relaxed, acquire };

static inline int thread_index() { return emulator::current.thread; }
static inline int block_x() { return emulator::current.block_x; }
static inline int block_y() { return emulator::current.block_y; }
static inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulator::current.rank); }

static inline int known_anew(int x) { return x; }

uint32_t bits_of(float x);
float float_of(uint32_t x);

uint32_t shared_address(const void* p);
uint32_t peer_address(uint32_t address, uint32_t rank);
float load_shared(uint32_t address);

void cluster_sync();
void block_sync();
void warp_sync();
void named_sync(int id, int threads);

void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_init_fence();
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity, Order order);
void send(uint32_t peer, const uint32_t* words, int count, uint32_t peer_barrier);

template <Order order>
void barrier_wait(uint32_t barrier, uint32_t parity) {
  barrier_wait(barrier, parity, order);
}

template <int kWords>
void send(uint32_t peer, const uint32_t* words, uint32_t peer_barrier) {
  send(peer, words, kWords, peer_barrier);
}

void copy_async(uint32_t to, const void* from, bool valid);
void copy_commit();
void copy_wait(int pending);

template <int kPending>
void copy_wait() {
  copy_wait(kPending);
}

inline Fragment load_fragment(const Fragment* from) { return *from; }

uint4 load_words(const uint32_t* from);
uint4 load_pairs(const uint32_t* from);
uint2 load_pair(const uint32_t* from);
void store_whole(uint32_t* to, const uint32_t (&words)[1]);
void store_whole(uint32_t* to, const uint32_t (&words)[2]);
// Counts only while nothing else happens anywhere.
int64_t spin_clock();

float shuffle_xor(float x, int mask);
uint32_t shuffle(uint32_t x, int lane);
uint32_t ballot(bool bit);
void load_transposed(uint32_t (&m)[1], uint32_t row);
void load_transposed(uint32_t (&m)[4], uint32_t row);
uint32_t transpose(uint32_t m);

struct Bfloat16 {
  static uint32_t pack(float low, float high);
  static float low(uint32_t x);
  static float high(uint32_t x) { return low(x >> 16); }
  static void multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1);
};

struct Float16 {
  static uint32_t pack(float low, float high);
  static float low(uint32_t x);
  static float high(uint32_t x) { return low(x >> 16); }
  static void multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1);
};

struct Tf32 {
  static uint32_t round(float x);
  static void multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1);
};

// With errors as large as the manual allows the hardware's.
float tanh_approx(float x);
float exp2_approx(float x);
float reciprocal_approx(float x);
float exp_exact(float x);
float tanh_exact(float x);

}  // namespace fused_rnn
