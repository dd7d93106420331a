// Everything the kernels ask of the hardware that C++ has no words for: all PTX of the project.
//
// The host twin, in which the same kernel sources run without a GPU, is emulated_primitives.h: it
// has every name below, with the meaning the PTX manual gives it.
#pragma once

#if defined(FUSED_RNN_EMULATED)
#include "emulated_primitives.h"
#else

#include <cstdint>

#define FUSED_RNN_DEVICE static __device__ __forceinline__
#define FUSED_RNN_DEVICE_MEMBER __device__ __forceinline__
#define FUSED_RNN_UNROLL _Pragma("unroll")
#define FUSED_RNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FUSED_RNN_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FUSED_RNN_HAS_CLUSTERS 0
#else
#define FUSED_RNN_HAS_CLUSTERS 1
#endif

namespace fused_rnn {

using Fragment = uint4;

enum class Order { relaxed, acquire };

FUSED_RNN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FUSED_RNN_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FUSED_RNN_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }

// The same number. What the compiler has made of it before is computed again, not kept, which would
// take registers all through a loop.
FUSED_RNN_DEVICE int known_anew(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

FUSED_RNN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

FUSED_RNN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FUSED_RNN_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }

// ---- Clusters: CTAs that write to each other's shared memory.

FUSED_RNN_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address in CTA `rank` of what lies at `address` here.
FUSED_RNN_DEVICE uint32_t peer_address(uint32_t address, uint32_t rank) {
  uint32_t peer;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer) : "r"(address), "r"(rank));
  return peer;
}

FUSED_RNN_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// ---- Barriers in shared memory that count the bytes sent to them.

FUSED_RNN_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes barriers of this thread's visible to the cluster, together with a cluster_sync.
FUSED_RNN_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The current phase waits for so many bytes more; counts as an arrival.
FUSED_RNN_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}

// Until the phase of this parity is complete. `acquire` sees what was sent to the barrier, which
// all lies in this CTA's shared memory. Of the whole cluster's scope it would throw away L1 as
// well, at every turn of the loop: some 300 clocks of a step on an H200.
template <Order order>
FUSED_RNN_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  static_assert(order == Order::acquire);
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Writes words to a CTA's shared memory and counts them at that CTA's barrier. Returns at once.
template <int kWords>
FUSED_RNN_DEVICE void send(uint32_t peer, const uint32_t* words, uint32_t peer_barrier) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 4) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, "
        "%4}, [%5];" ::"r"(peer),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(peer_barrier)
        : "memory");
  } else if constexpr (kWords == 1) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
            peer),
        "r"(words[0]), "r"(peer_barrier)
        : "memory");
  } else {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, "
        "[%3];" ::"r"(peer),
        "r"(words[0]), "r"(words[1]), "r"(peer_barrier)
        : "memory");
  }
}

// ---- Global memory that running CTAs share.

// 16 bytes, by four accesses of a word each.
FUSED_RNN_DEVICE uint4 load_words(const uint32_t* from) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}

// 16 bytes, by two accesses of two words each.
FUSED_RNN_DEVICE uint4 load_pairs(const uint32_t* from) {
  uint4 v;
  asm volatile(
      "{\n.reg .b64 first, second;\nld.relaxed.gpu.global.v2.b64 {first, second}, [%4];\n"
      "mov.b64 {%0, %1}, first;\nmov.b64 {%2, %3}, second;\n}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from)
      : "memory");
  return v;
}

// One access.
FUSED_RNN_DEVICE uint2 load_pair(const uint32_t* from) {
  uint2 v;
  asm volatile(
      "{\n.reg .b64 pair;\nld.relaxed.gpu.global.b64 pair, [%2];\nmov.b64 {%0, %1}, pair;\n}"
      : "=r"(v.x), "=r"(v.y)
      : "l"(from)
      : "memory");
  return v;
}

// One access, of a word or two.
FUSED_RNN_DEVICE void store_whole(uint32_t* to, const uint32_t (&words)[1]) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(words[0]) : "memory");
}

FUSED_RNN_DEVICE void store_whole(uint32_t* to, const uint32_t (&words)[2]) {
  asm volatile(
      "{\n.reg .b64 pair;\nmov.b64 pair, {%1, %2};\nst.relaxed.gpu.global.b64 [%0], pair;\n}" ::"l"(
          to),
      "r"(words[0]), "r"(words[1])
      : "memory");
}

// For who waits: clocks of the SM.
FUSED_RNN_DEVICE int64_t spin_clock() { return clock64(); }

// ---- Within a CTA.

FUSED_RNN_DEVICE void block_sync() { __syncthreads(); }
FUSED_RNN_DEVICE void warp_sync() { __syncwarp(); }

// `threads` of the CTA; id from 1 to 15.
FUSED_RNN_DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What this thread wrote itself. Volatile, so that it stays where it is among products.
FUSED_RNN_DEVICE uint4 load_fragment(const uint4* from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared_address(from)));
  return v;
}

FUSED_RNN_DEVICE float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

FUSED_RNN_DEVICE float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// That of a lane of the warp.
FUSED_RNN_DEVICE uint32_t shuffle(uint32_t x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

// A bit from every lane of the warp.
FUSED_RNN_DEVICE uint32_t ballot(bool bit) { return __ballot_sync(0xffffffffu, bit); }

// 16 bytes from global to shared memory, or zeros. Arrives some time before copy_wait returns.
FUSED_RNN_DEVICE void copy_async(uint32_t to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}

FUSED_RNN_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kPending groups of this thread's copies have arrived.
template <int kPending>
FUSED_RNN_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- 8 x 8 matrices of 16-bit numbers, spread over a warp: a lane has row lane / 4, columns
// 2 * (lane % 4) and the next.

// A transposed matrix from shared memory; lane i gives the address of row i.
FUSED_RNN_DEVICE void load_transposed(uint32_t (&m)[1], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(m[0])
               : "r"(row)
               : "memory");
}

// Four of them; lane 8 * i + j gives the address of row j of the i-th.
FUSED_RNN_DEVICE void load_transposed(uint32_t (&m)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// Volatile, or the compiler might move it into a branch that only some of a warp's lanes take.
FUSED_RNN_DEVICE uint32_t transpose(uint32_t m) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(m));
  return result;
}

// ---- 16-bit formats and their products on tensor cores: sum += a b with a 16 x 16, b 16 x 8.
// Volatile, or the compiler would move all of a step's products behind its last load.

struct Bfloat16 {
  FUSED_RNN_DEVICE uint32_t pack(float low, float high) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
  }
  FUSED_RNN_DEVICE float low(uint32_t x) { return __uint_as_float(x << 16); }
  FUSED_RNN_DEVICE float high(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
  FUSED_RNN_DEVICE void multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
};

struct Float16 {
  FUSED_RNN_DEVICE uint32_t pack(float low, float high) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
  }
  FUSED_RNN_DEVICE float low(uint32_t x) {
    float result;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %1;\ncvt.f32.f16 %0, low;\n}"
        : "=f"(result)
        : "r"(x));
    return result;
  }
  FUSED_RNN_DEVICE float high(uint32_t x) { return low(x >> 16); }
  FUSED_RNN_DEVICE void multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
};

// float32 with 10 bits of mantissa: sum += a b with a 16 x 8, b 8 x 8. A lane has of a the rows
// lane / 4 and 8 more, columns lane % 4 and 4 more; of b rows lane % 4 and 4 more, column lane / 4.
struct Tf32 {
  FUSED_RNN_DEVICE uint32_t round(float x) {
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
    return result;
  }
  FUSED_RNN_DEVICE void multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
};

// ---- Fast functions.

// Relative error up to 2^-11.
FUSED_RNN_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^x and 1 / x within 2 ulp or so.
FUSED_RNN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FUSED_RNN_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FUSED_RNN_DEVICE float exp_exact(float x) { return expf(x); }
FUSED_RNN_DEVICE float tanh_exact(float x) { return tanhf(x); }

}  // namespace fused_rnn

#endif
