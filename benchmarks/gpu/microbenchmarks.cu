// The six numbers that the time model of the CUDA kernels is made of (docs/cuda-kernels.md),
// measured on the GPU at hand. Prints one JSON object, times in clocks of an SM unless the name
// says more.
//
//   nvcc -std=c++20 -O3 -arch=sm_90a --expt-relaxed-constexpr microbenchmarks.cu -o microbenchmarks
//
// Clusters of up to 16 CTAs need compute capability 9.0 or newer.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../../csrc/cuda/primitives.h"

namespace {

using namespace fused_rnn;

constexpr int kRounds = 2000;
constexpr int kThreads = 256;
constexpr int kMaxShared = 200 << 10;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

__device__ void keep(float x) {
  if (x == 12345.678f) printf("\n");
}

enum class Way { words, pairs, bulk };

FUSED_RNN_DEVICE void send_bulk(uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// All-gather, as a step of the scan does it: every CTA sends `bytes` to every CTA of its cluster
// and waits for all that is sent to it. Clocks per round, of the first CTA.
template <Way way>
__global__ void __launch_bounds__(kThreads) all_gather(int cluster, int bytes, long long* clocks) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t at = shared_address(shared), barriers = at + 3 * cluster * bytes;
  const uint32_t rank = cluster_rank();
  if (thread_index() == 0) {
    barrier_init(barriers, 1);
    barrier_init(barriers + 8, 1);
    barrier_init_fence();
  }
  cluster_sync();
  const long long begin = clock64();
  for (int round = 0; round < kRounds; round++) {
    const uint32_t barrier = barriers + 8 * (round & 1);
    const uint32_t slot = at + (round & 1) * cluster * bytes + rank * bytes;
    if (thread_index() == 0) barrier_expect(barrier, cluster * bytes);
    if constexpr (way == Way::bulk) {
      const uint32_t from = at + 2 * cluster * bytes + (round & 1) * bytes;
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();
      if (thread_index() < cluster) {
        const uint32_t peer = (rank + thread_index()) % cluster;
        send_bulk(peer_address(slot, peer), from, bytes, peer_address(barrier, peer));
      }
    } else {
      constexpr int kWords = way == Way::pairs ? 2 : 1;
      const uint32_t words[2] = {rank, static_cast<uint32_t>(round)};
      for (int d = 0; d < cluster; d++) {
        const uint32_t peer = (rank + d) % cluster;
        const uint32_t to = peer_address(slot, peer), there = peer_address(barrier, peer);
        for (int i = thread_index() * kWords * 4; i < bytes; i += kThreads * kWords * 4) {
          send<kWords>(to + i, words, there);
        }
      }
    }
    barrier_wait<Order::acquire>(barrier, round >> 1 & 1);
  }
  const long long end = clock64();
  if (block_x() == 0 && thread_index() == 0) *clocks = (end - begin) / kRounds;
  cluster_sync();
}

__global__ void __launch_bounds__(kThreads) cluster_barrier(long long* clocks) {
  cluster_sync();
  const long long begin = clock64();
  for (int round = 0; round < kRounds; round++) cluster_sync();
  const long long end = clock64();
  if (block_x() == 0 && thread_index() == 0) *clocks = (end - begin) / kRounds;
}

// One word there and back between two CTAs, each waiting for the other: twice the latency of a
// message and of waking up from it.
__global__ void __launch_bounds__(32) wake_up(long long* clocks) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t at = shared_address(shared), barrier = at + 128;
  const uint32_t rank = cluster_rank();
  if (thread_index() == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  cluster_sync();
  const long long begin = clock64();
  if (thread_index() == 0) {
    for (int round = 0; round < kRounds; round++) {
      barrier_expect(barrier, 4);
      const uint32_t word[1] = {static_cast<uint32_t>(round)};
      if (rank == 1) barrier_wait<Order::acquire>(barrier, round & 1);
      send<1>(peer_address(at, rank ^ 1), word, peer_address(barrier, rank ^ 1));
      if (rank == 0) barrier_wait<Order::acquire>(barrier, round & 1);
    }
  }
  const long long end = clock64();
  if (block_x() == 0 && thread_index() == 0) *clocks = (end - begin) / kRounds;
  cluster_sync();
}

// The same through L2, with relaxed accesses of two CTAs anywhere on the device.
__global__ void __launch_bounds__(32) flag_through_l2(unsigned* flags, long long* clocks) {
  const int me = block_x() == 0 ? 0 : block_x() == gridDim.x - 1 ? 1 : 2;
  if (me == 2 || thread_index() != 0) return;
  const auto load = [&](int of) {
    unsigned x;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(flags + 64 * of) : "memory");
    return x;
  };
  const auto store = [&](unsigned x) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flags + 64 * me), "r"(x) : "memory");
  };
  // Bounded, so that a CTA which never starts ends in a wrong number and not in a hang.
  const auto wait_for = [&](unsigned x) {
    for (int spins = 0; spins < 1 << 22 && load(1 - me) != x; spins++) {
    }
  };
  const long long begin = clock64();
  for (unsigned round = 1; round <= kRounds; round++) {
    if (me == 1) wait_for(round);
    store(round);
    if (me == 0) wait_for(round);
  }
  if (me == 0) *clocks = (clock64() - begin) / kRounds;
}

enum class Function { tanh_approx, exp2_approx, reciprocal_approx, tanh_exact };

// Clocks of one call after the other, each on the result of the last, of a single warp.
template <Function function>
__global__ void __launch_bounds__(32) latency(float x, long long* clocks) {
  const long long begin = clock64();
  for (int round = 0; round < kRounds; round++) {
    if constexpr (function == Function::tanh_approx) x = fused_rnn::tanh_approx(x);
    if constexpr (function == Function::exp2_approx) x = fused_rnn::exp2_approx(x);
    if constexpr (function == Function::reciprocal_approx) x = fused_rnn::reciprocal_approx(x);
    if constexpr (function == Function::tanh_exact) x = fused_rnn::tanh_exact(x);
  }
  const long long end = clock64();
  keep(x);
  if (thread_index() == 0) *clocks = (end - begin) / kRounds;
}

struct Report {
  bool first = true;
  void add(const std::string& name, double value) {
    std::printf("%s\n  \"%s\": %g", first ? "{" : ",", name.c_str(), value);
    first = false;
  }
};

template <class Kernel, class... Arguments>
bool launch(Kernel kernel, int ctas, int cluster, int threads, int shared, Arguments... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "shared");
  if (cluster > 8) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "cluster size");
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "occupancy");
  if (clusters == 0) return false;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch");
  check(cudaDeviceSynchronize(), "kernel");
  return true;
}

}  // namespace

int main() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "device");
  if (device.major < 9) {
    std::fprintf(stderr, "needs compute capability 9.0 or newer, got %d.%d\n", device.major,
                 device.minor);
    return 1;
  }
  long long* clocks;
  unsigned* flags;
  check(cudaMallocManaged(&clocks, sizeof *clocks), "memory");
  check(cudaMalloc(&flags, 4096), "memory");
  Report report;
  report.add("sms", device.multiProcessorCount);

  for (int cluster : {2, 4, 8, 16}) {
    for (int bytes : {128, 512, 2048, 4096}) {
      const int shared = 4 * cluster * bytes + 64;
      if (shared > kMaxShared) continue;
      const std::string name =
          std::to_string(cluster) + "_ctas_" + std::to_string(bytes) + "_bytes";
      if (launch(all_gather<Way::words>, cluster, cluster, kThreads, shared, cluster, bytes,
                 clocks))
        report.add("all_gather_words_" + name, static_cast<double>(*clocks));
      if (launch(all_gather<Way::pairs>, cluster, cluster, kThreads, shared, cluster, bytes,
                 clocks))
        report.add("all_gather_pairs_" + name, static_cast<double>(*clocks));
      if (launch(all_gather<Way::bulk>, cluster, cluster, kThreads, shared, cluster, bytes, clocks))
        report.add("all_gather_bulk_" + name, static_cast<double>(*clocks));
    }
    if (launch(cluster_barrier, cluster, cluster, kThreads, 0, clocks)) {
      report.add("cluster_barrier_" + std::to_string(cluster), static_cast<double>(*clocks));
    }
    // How many clusters of a kernel that fills an SM run at a time.
    for (int shared : {48 << 10, kMaxShared}) {
      const auto kernel = all_gather<Way::words>;
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "");
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(static_cast<unsigned>(cluster));
      config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = static_cast<size_t>(shared);
      config.attrs = &attribute;
      config.numAttrs = 1;
      int clusters = 0;
      check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "occupancy");
      report.add("clusters_of_" + std::to_string(cluster) + "_with_" +
                     std::to_string(shared >> 10) + "_KB",
                 clusters);
    }
  }
  if (launch(wake_up, 2, 2, 32, 256, clocks)) {
    report.add("message_there_and_back", static_cast<double>(*clocks));
  }
  check(cudaMemset(flags, 0, 4096), "flags");
  flag_through_l2<<<device.multiProcessorCount, 32>>>(flags, clocks);
  check(cudaDeviceSynchronize(), "flag_through_l2");
  report.add("flag_through_l2_there_and_back", static_cast<double>(*clocks));

  latency<Function::tanh_approx><<<1, 32>>>(0.5f, clocks);
  check(cudaDeviceSynchronize(), "tanh_approx");
  report.add("tanh_approx", static_cast<double>(*clocks));
  latency<Function::exp2_approx><<<1, 32>>>(0.5f, clocks);
  check(cudaDeviceSynchronize(), "exp2_approx");
  report.add("exp2_approx", static_cast<double>(*clocks));
  latency<Function::reciprocal_approx><<<1, 32>>>(0.5f, clocks);
  check(cudaDeviceSynchronize(), "reciprocal_approx");
  report.add("reciprocal_approx", static_cast<double>(*clocks));
  latency<Function::tanh_exact><<<1, 32>>>(0.5f, clocks);
  check(cudaDeviceSynchronize(), "tanh_exact");
  report.add("tanh_exact", static_cast<double>(*clocks));
  std::printf("\n}\n");
  return 0;
}
