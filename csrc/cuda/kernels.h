// The compiled kernels, as the library sees them: plain functions, in the order of instances.h.
#pragma once

#include "../layer_params.h"
#include "params.h"

namespace fused_rnn {

// tf32: float32 whose products are TF32.
enum class ElementKind { bfloat16, float16, float32, tf32 };

struct LaunchShape {
  int ctas, directions;  // the grid
  int cluster;           // CTAs of a cluster
  int threads;           // of a CTA
  int shared_bytes;
  bool cooperative;  // all CTAs are resident at once, or the launch fails
};

template <class Params>
struct Kernel {
  // On the stream, of the current device.
  void (*launch)(const Params&, const LaunchShape&, void* stream);
  // How many clusters the current device runs at a time.
  int (*active_clusters)(const LaunchShape&);
};

// One timestep of a cell. `inner` runs before the second product of a cell that has two in a step,
// and is null for the others.
template <class Params>
struct StepKernels {
  using Launch = void (*)(const Params&, const LaunchShape&, void* stream);
  Launch inner, outer;
};

template <class Params>
StepKernels<Params> step_kernels(CellKind cell, ElementKind element);

template <CellKind kind, ElementKind element, class Params>
const Kernel<Params>* kernels_of();

}  // namespace fused_rnn
