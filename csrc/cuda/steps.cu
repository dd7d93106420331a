// The kernels of single timesteps, all of them: they are small.
#include "launch.h"
#include "steps.cuh"

namespace fused_rnn {
namespace {

template <CellKind kind, ElementKind element, class Params>
StepKernels<Params> kernels_of_step() {
  using Element = ElementOf<element>;
  using Cell = typename CellOf<kind, typename Element::Math>::Type;
  constexpr bool kTwice = kHasInnerProduct<Cell>;
  if constexpr (std::is_same_v<Params, ForwardStep>) {
    StepKernels<Params> kernels{nullptr, launch_kernel<step_forward<Cell, Element, false>, Params>};
    if constexpr (kTwice) kernels.inner = launch_kernel<step_forward<Cell, Element, true>, Params>;
    return kernels;
  } else {
    StepKernels<Params> kernels{nullptr,
                                launch_kernel<step_backward<Cell, Element, false>, Params>};
    if constexpr (kTwice) kernels.inner = launch_kernel<step_backward<Cell, Element, true>, Params>;
    return kernels;
  }
}

template <CellKind kind, class Params>
StepKernels<Params> kernels_of_step(ElementKind element) {
  switch (element) {
    case ElementKind::bfloat16:
      return kernels_of_step<kind, ElementKind::bfloat16, Params>();
    case ElementKind::float16:
      return kernels_of_step<kind, ElementKind::float16, Params>();
    default:
      return kernels_of_step<kind, ElementKind::float32, Params>();
  }
}

}  // namespace

template <class Params>
StepKernels<Params> step_kernels(CellKind cell, ElementKind element) {
  switch (cell) {
    case CellKind::rnn_tanh:
      return kernels_of_step<CellKind::rnn_tanh, Params>(element);
    case CellKind::rnn_relu:
      return kernels_of_step<CellKind::rnn_relu, Params>(element);
    case CellKind::gru:
      return kernels_of_step<CellKind::gru, Params>(element);
    case CellKind::gru_reset_before:
      return kernels_of_step<CellKind::gru_reset_before, Params>(element);
    default:
      return kernels_of_step<CellKind::lstm, Params>(element);
  }
}

template StepKernels<ForwardStep> step_kernels(CellKind, ElementKind);
template StepKernels<BackwardStep> step_kernels(CellKind, ElementKind);

}  // namespace fused_rnn
