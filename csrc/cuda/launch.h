// From a tile to a function that launches its kernel. Included by the scan_*.cu files, which the
// build compiles once per element type and direction of time, side by side.
#pragma once

#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "../cells.h"
#include "check_cuda.h"
#include "instances.h"
#include "kernels.h"
#include "scan_backward.cuh"
#include "scan_forward.cuh"

namespace fused_rnn {

#if defined(FUSED_RNN_EMULATED)

template <auto kernel, class Params>
void launch_kernel(const Params& params, const LaunchShape& shape, void* stream) {
  const emulator::Grid grid{shape.ctas,    shape.directions,   shape.cluster,
                            shape.threads, shape.shared_bytes, shape.cooperative};
  emulator::give(stream, [grid, params] { emulator::run(grid, [&params] { kernel(params); }); });
}

template <auto kernel>
int active_clusters(const LaunchShape&) {
  return 1;
}

#else

struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  template <class Function>
  LaunchConfig(Function* kernel, const LaunchShape& shape) {
    if (shape.shared_bytes > 0) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      shape.shared_bytes));
    }
    config.gridDim =
        dim3(static_cast<unsigned>(shape.ctas), static_cast<unsigned>(shape.directions));
    config.blockDim = dim3(static_cast<unsigned>(shape.threads));
    config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
    if (shape.cluster == 1 && !shape.cooperative) return;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (shape.cooperative) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
      return;
    }
    if (shape.cluster > 8) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    }
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <auto kernel, class Params>
void launch_kernel(const Params& params, const LaunchShape& shape, void* stream) {
  LaunchConfig launch(kernel, shape);
  launch.config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&launch.config, kernel, params));
}

template <auto kernel>
int active_clusters(const LaunchShape& shape) {
  int clusters = 0;
  if (shape.cluster > 1) {
    LaunchConfig launch(kernel, shape);
    check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config));
    return clusters;
  }
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  shape.shared_bytes));
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &clusters, kernel, shape.threads, static_cast<size_t>(shape.shared_bytes)));
  return clusters * processors;
}

#endif

template <CellKind kind, class Math>
struct CellOf;
template <class Math>
struct CellOf<CellKind::rnn_tanh, Math> {
  using Type = RnnCell<Math, false>;
};
template <class Math>
struct CellOf<CellKind::rnn_relu, Math> {
  using Type = RnnCell<Math, true>;
};
template <class Math>
struct CellOf<CellKind::gru, Math> {
  using Type = GruCell<Math>;
};
template <class Math>
struct CellOf<CellKind::lstm, Math> {
  using Type = LstmCell<Math>;
};
template <class Math>
struct CellOf<CellKind::gru_reset_before, Math> {
  using Type = GruResetBeforeCell<Math>;
};

template <ElementKind kind>
using ElementOf = std::conditional_t<
    kind == ElementKind::bfloat16, Bfloat16Element,
    std::conditional_t<kind == ElementKind::float16, Float16Element,
                       std::conditional_t<kind == ElementKind::tf32, Tf32Element, FloatElement>>>;

template <CellKind kind, class Element, class Params, int... index>
const Kernel<Params>* kernel_table(std::integer_sequence<int, index...>) {
  using Cell = typename CellOf<kind, typename Element::Math>::Type;
  constexpr int kBytes = Element::kBytes;
  if constexpr (std::is_same_v<Params, ForwardParams>) {
    static constexpr Kernel<Params> kernels[] = {
        {launch_kernel<scan_forward<Cell, Element, ForwardTileAt<kind, kBytes, index>>, Params>,
         active_clusters<scan_forward<Cell, Element, ForwardTileAt<kind, kBytes, index>>>}...};
    return kernels;
  } else {
    static constexpr Kernel<Params> kernels[] = {
        {launch_kernel<scan_backward<Cell, Element, BackwardTileAt<kind, kBytes, index>, kind>,
                       Params>,
         active_clusters<
             scan_backward<Cell, Element, BackwardTileAt<kind, kBytes, index>, kind>>}...};
    return kernels;
  }
}

template <CellKind kind, ElementKind element, class Params>
const Kernel<Params>* kernels_of() {
  using Element = ElementOf<element>;
  // Not in 16 bits: relu's gradient jumps where a rounded h turns the sign of a sum.
  if constexpr (kind == CellKind::rnn_relu && Element::kBytes == 2) {
    return nullptr;
  } else {
    constexpr bool kForward = std::is_same_v<Params, ForwardParams>;
    constexpr size_t kCount = kForward ? forward_tiles<kind, Element::kBytes>().size()
                                       : backward_tiles<kind, Element::kBytes>().size();
    return kernel_table<kind, Element, Params>(
        std::make_integer_sequence<int, static_cast<int>(kCount)>());
  }
}

// All kernels of a cell for the element type and the direction of time that the build names.
#define FUSED_RNN_INSTANTIATE(kind)        \
  template const Kernel<FUSED_RNN_PARAMS>* \
  kernels_of<CellKind::kind, ElementKind::FUSED_RNN_ELEMENT, FUSED_RNN_PARAMS>();

}  // namespace fused_rnn
