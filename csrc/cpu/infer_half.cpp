// Inference in a half type, as the general way computes it (fused_rnn/backends/cpu.py): bfloat16 by
// kernels of its own where there are, but for relu; else in float32, what leaves a layer being
// rounded.
#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "border.h"
#include "calls.h"
#include "operands.h"

namespace fused_rnn {
namespace {

template <class E>
struct HalfInputs {
  const E *x, *h0;
  const float* c0;  // states are null for zeros
};

struct HalfResults {
  uint16_t *y, *h_n, *c_n;  // y may be null, and c_n is where there is no c
};

template <class E>
void run_half_stack(const KernelsOf<E>& isa, NumberType type, std::vector<ForwardCallOf<E>>& calls,
                    const HalfInputs<E>& given, const HalfResults& results) {
  const LayerShape& first = calls[0].shape;
  const int64_t rows = first.directions * first.rows.batch;
  const int64_t h_size = rows * first.output, c_size = rows * first.hidden;  // of a layer
  const int64_t y_size = first.count * first.directions * first.output;
  constexpr bool kInFloat32 = std::is_same_v<E, float>;
  const Memory zeros = memory(c_size), states = memory(h_size + c_size);
  std::fill_n(zeros.get(), c_size, 0.0f);
  const Threads threads = torch_threads();
  Memory halves;  // of a layer's output
  const auto rounded = [&](int64_t count) {
    if (!halves) halves = memory((count + 1) / 2);
    return reinterpret_cast<uint16_t*>(halves.get());
  };
  Memory input;  // keeps a layer's output until the next has read it
  for (size_t i = 0; i < calls.size(); i++) {
    const auto layer = static_cast<int64_t>(i);
    ForwardCallOf<E>& call = calls[i];
    const bool is_last = i + 1 == calls.size();
    Memory output = memory(y_size);
    call.x = i == 0 ? given.x : reinterpret_cast<const E*>(input.get());
    call.y = reinterpret_cast<E*>(output.get());
    if (!kInFloat32 && is_last && results.y) call.y = reinterpret_cast<E*>(results.y);
    call.h0 = given.h0 ? given.h0 + layer * h_size : reinterpret_cast<const E*>(zeros.get());
    call.h_n = states.get();
    if (results.c_n) {
      call.c0 = given.c0 ? given.c0 + layer * c_size : zeros.get();
      call.c_n = states.get() + h_size;
    }
    layer_forward(isa, call, threads);
    if (kInFloat32 && (results.y || !is_last)) {
      narrow(type, output.get(), y_size, is_last ? results.y : rounded(y_size));
      if (!is_last) widen(type, rounded(y_size), y_size, output.get());
    }
    narrow(type, call.h_n, h_size, results.h_n + layer * h_size);
    if (results.c_n) narrow(type, call.c_n, c_size, results.c_n + layer * c_size);
    input = std::move(output);
  }
}

// Whether the numbers are of the call's type, or will be.
bool fits(const InferCall& call, const Array& array) {
  return array.type == call.type || (call.autocast && array.type == NumberType::float32);
}

template <class E>
bool infer_elements(const KernelsOf<E>& isa, const LayerShape& first, int64_t layers,
                    const InferCall& call, bool swapped, const OutputShapes& shapes,
                    const Allocator& allocate) {
  const Array *h = call.states.h, *c = call.states.c;
  int64_t converted = Operands<E>::converted(call.x, swapped);
  bool fit = fits(call, call.x) && (!h || fits(call, *h)) && (!c || fits(call, *c));
  for (int64_t i = 0; fit && i < call.weight_count; i++) {
    const Array& weight = call.weights[i];
    fit = fits(call, weight) && weight.dimensions <= 3;
    if (fit) converted += Operands<E>::converted(weight);
  }
  if (!fit || converted > kMostConverted) return false;
  Operands<E> operands(call.type);
  std::vector<ForwardCallOf<E>> calls =
      read_stack<E>(first, layers, call, [&](const Array& weight) -> const void* {
        if (weight.dimensions == 2) return operands.elements(weight);
        return operands.floats(weight);
      });
  if (calls.empty()) return false;
  const HalfInputs<E> given{operands.elements(call.x, swapped), h ? operands.elements(*h) : nullptr,
                            c ? operands.floats(*c) : nullptr};
  HalfResults results{};
  if (shapes.y.size() > 0) results.y = allocate.halves(call.type, shapes.y, swapped);
  results.h_n = allocate.halves(call.type, shapes.h);
  if (cell_sizes(first.cell).has_c) results.c_n = allocate.halves(call.type, shapes.c);
  run_half_stack(isa, call.type, calls, given, results);
  return true;
}

}  // namespace

bool infer_half(const LayerShape& first, int64_t layers, const InferCall& call, bool swapped,
                const OutputShapes& shapes, const Allocator& allocate) {
  const KernelsOf<BFloat16>* native = kernels_of_half(call.type, first.cell);
  return native ? infer_elements(*native, first, layers, call, swapped, shapes, allocate)
                : infer_elements(kernels(), first, layers, call, swapped, shapes, allocate);
}

}  // namespace fused_rnn
