// What a timestep of an LSTM in bfloat16 takes on tiles of one's choice, without torch: for looking
// for better entries of csrc/cuda/instances.h. Prints a line for each tile and batch size.
//
//   nvcc -std=c++20 -O3 -arch=sm_90a --expt-relaxed-constexpr tiles.cu -o tiles
//
// -DTILES='"tiles.inc"' names a file of other lines FORWARD(...) and BACKWARD(...), each a tile as
// in instances.h. They compile in a second each; -Xptxas -v says which of them spill.
//
// A step's time is the difference between a long and a short sequence, so that reading W_hh has no
// part in it; "sum" lets one see that two tiles compute the same.
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/plan.h"

using namespace fused_rnn;

namespace {

constexpr int kShort = 64, kLong = 320, kRepetitions = 7;
constexpr CellKind kCell = CellKind::lstm;
using Element = Bfloat16Element;
using Cell = CellOf<kCell, Element::Math>::Type;
constexpr int kGates = Cell::kGates;

// What the CTAs of a grid share, of any tile's messages.
constexpr size_t kExchangeBytes = 64 << 20;

struct Data {
  int hidden, batch;
  std::vector<void*> owned;
  __nv_bfloat16 *gx, *w_hh, *h0, *y, *h_n, *gates, *grad_y, *grad_gates;
  float *c0, *c_n, *cells, *grad_h0, *grad_c0;
  uint32_t *memory, *stalled;

  Data(int hidden, int batch) : hidden(hidden), batch(batch) {
    const size_t h = hidden, rows = size_t{kLong} * batch, states = batch * h;
    fill(gx, rows * kGates * h, 1.0f);
    fill(w_hh, kGates * h * h, 1.0f / std::sqrt(static_cast<float>(hidden)));
    for (auto* of_states : {&h0, &h_n}) fill(*of_states, states, 1.0f);
    for (auto* of_states : {&c0, &c_n, &grad_h0, &grad_c0}) fill(*of_states, states, 1.0f);
    for (auto* of_rows : {&y, &grad_y}) fill(*of_rows, rows * h, 1.0f);
    fill(gates, rows * kGates * h, 0.5f);
    fill(grad_gates, rows * kGates * h, 1.0f);
    fill(cells, rows * h, 1.0f);
    memory = allocate<uint32_t>(kExchangeBytes / sizeof(uint32_t));
    stalled = allocate<uint32_t>(1);
  }
  Data(const Data&) = delete;
  ~Data() {
    for (void* one : owned) cudaFree(one);
  }

  template <class T>
  T* allocate(size_t count) {
    void* one = nullptr;
    check_cuda(cudaMalloc(&one, count * sizeof(T)));
    owned.push_back(one);
    return static_cast<T*>(one);
  }

  // With pseudo-random numbers up to `scale`.
  template <class T>
  void fill(T*& to, size_t count, float scale) {
    static uint32_t state = 1;
    std::vector<T> host(count);
    for (T& x : host) {
      state = state * 1664525u + 1013904223u;
      x = static_cast<T>(scale * (static_cast<float>(state >> 8) / (1 << 23) - 1.0f));
    }
    to = allocate<T>(count);
    check_cuda(cudaMemcpy(to, host.data(), count * sizeof(T), cudaMemcpyHostToDevice));
  }

  ScanRows rows(int timesteps) const {
    return {timesteps, batch, int64_t{timesteps} * batch, nullptr, nullptr, nullptr};
  }
};

constexpr ForwardLayout layout(const ForwardTile& tile) {
  return layout_of(tile, kGates, Element::kBytes);
}
constexpr BackwardLayout layout(const BackwardTile& tile) {
  return layout_of(tile, kCell, Element::kBytes);
}

template <class Tile, class Params, auto kernel, class Fill>
float milliseconds(const Data& data, int timesteps, const Fill& fill) {
  constexpr auto l = layout(Tile::value);
  const int rows = Tile::row_blocks * kGroup, tiles = (data.batch + rows - 1) / rows;
  const int cluster = Tile::grid ? 1 : Tile::cluster;
  const LaunchShape shape{tiles * Tile::cluster, 1, cluster, l.threads, l.shared_bytes, Tile::grid};
  Params params{};
  params.rows = data.rows(timesteps);
  params.exchange = {data.memory, data.stalled, int64_t{1} << 31, tiles, 0, 0};
  params.hidden = params.pitch = data.hidden;
  params.directions = 1;
  params.w_hh[0] = data.w_hh;
  params.h0 = data.h0;
  params.c0 = data.c0;
  params.y = data.y;
  fill(params);
  cudaEvent_t begin, end;
  check_cuda(cudaEventCreate(&begin));
  check_cuda(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < kRepetitions; i++) {
    if (Tile::grid) check_cuda(cudaMemset(data.memory, 0, kExchangeBytes));
    check_cuda(cudaEventRecord(begin));
    launch_kernel<kernel, Params>(params, shape, nullptr);
    check_cuda(cudaEventRecord(end));
    check_cuda(cudaEventSynchronize(end));
    float ms = 0;
    check_cuda(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(ms);
  }
  check_cuda(cudaEventDestroy(begin));
  check_cuda(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double sum_of(const __nv_bfloat16* device, size_t count) {
  std::vector<__nv_bfloat16> host(count);
  check_cuda(cudaMemcpy(host.data(), device, count * 2, cudaMemcpyDeviceToHost));
  double sum = 0;
  for (size_t i = 0; i < count; i++) sum += std::abs(__bfloat162float(host[i])) * (1 + i % 7);
  return sum / count;
}

template <class Tile, class Params, auto kernel, class Fill>
void report(const char* what, const Data& data, const __nv_bfloat16* result, size_t width,
            const Fill& fill) {
  float few = 0, many = 0;
  try {
    few = milliseconds<Tile, Params, kernel>(data, kShort, fill);
    many = milliseconds<Tile, Params, kernel>(data, kLong, fill);
  } catch (const std::exception& error) {
    std::printf("%-58s B=%-3d %s\n", what, data.batch, error.what());
    return;
  }
  std::printf("%-58s B=%-3d %6.3f us a step, %6.1f us before; sum %.6f\n", what, data.batch,
              1e3 * (many - few) / (kLong - kShort),
              1e3 * (few - kShort * (many - few) / (kLong - kShort)),
              sum_of(result, kLong * data.batch * width));
  std::fflush(stdout);
}

template <ForwardTile tile>
void forward(const char* what, int batch, bool saves) {
  using Tile = ForwardTileOf<tile>;
  const Data data(tile.hidden, batch);
  const auto fill = [&](ForwardParams& p) {
    p.gx = data.gx;
    p.h_n = data.h_n;
    p.c_n = data.c_n;
    p.gates = saves ? data.gates : nullptr;
    p.cells = saves ? data.cells : nullptr;
  };
  constexpr auto kernel = scan_forward<Cell, Element, Tile>;
  report<Tile, ForwardParams, kernel>(what, data, data.y, data.hidden, fill);
}

template <BackwardTile tile>
void backward(const char* what, int batch) {
  using Tile = BackwardTileOf<tile>;
  const Data data(tile.hidden, batch);
  report<Tile, BackwardParams, scan_backward<Cell, Element, Tile, kCell>>(
      what, data, data.grad_gates, kGates * data.hidden, [&](BackwardParams& p) {
        p.gates = data.gates;
        p.cells = data.cells;
        p.grad_y = data.grad_y;
        p.grad_gates = data.grad_gates;
        p.grad_h0 = data.grad_h0;
        p.grad_c0 = data.grad_c0;
      });
}

}  // namespace

#define FORWARD(...)                                                          \
  for (int batch : {8, 16}) {                                                 \
    forward<ForwardTile{__VA_ARGS__}>("forward " #__VA_ARGS__, batch, false); \
    forward<ForwardTile{__VA_ARGS__}>("saving  " #__VA_ARGS__, batch, true);  \
  }
#define BACKWARD(...) \
  for (int batch : {8, 16}) backward<BackwardTile{__VA_ARGS__}>("backward " #__VA_ARGS__, batch);

int main() {
#ifdef TILES
#include TILES
#else
  FORWARD(768, 16, 1, 1, 2, 12, 4)
  FORWARD(768, 48, 1, 1, 4, 12, 4, true)
  BACKWARD(768, 16, 1, 8, 6, 4)
#endif
}
