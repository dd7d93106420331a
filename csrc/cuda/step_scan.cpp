#include "step_scan.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <optional>

#include "check_cuda.h"
#include "graph.h"
#include "torch_call.h"

namespace fused_rnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// out = a b for each direction: a [D, B, K], b [D, K, N], out [D, B, N] in float32, whatever the
// operands are. Each call works on what the tensors hold by then, in the order of the stream.
class Product {
 public:
  Product(const Tensor& a, const Tensor& b, const Tensor& out)
      : a_(one(a)),
        b_(one(b)),
        out_(one(out)),
        is_float_(a.scalar_type() == ScalarType::Float),
        name_(a.size(0) == 1 ? "aten::mm" : "aten::bmm") {
#if defined(FUSED_RNN_EMULATED)
    b_ = torch::stable::to(b_, ScalarType::Float);
#endif
  }

  void operator()() const {
    using torch::stable::detail::from;
#if defined(FUSED_RNN_EMULATED)
    // torch's CPU products have no output wider than the operands.
    emulator::give(emulator::torch_stream, [*this] {
      call_torch(name_, "out",
                 std::array{from(torch::stable::to(a_, ScalarType::Float)), from(b_), from(out_)});
    });
#else
    if (is_float_) {
      call_torch(name_, "out", std::array{from(a_), from(b_), from(out_)});
    } else {
      call_torch(name_, "dtype_out",
                 std::array{from(a_), from(b_), from(ScalarType::Float), from(out_)});
    }
#endif
  }

 private:
  static Tensor one(const Tensor& tensor) {
    return tensor.size(0) == 1 ? torch::stable::select(tensor, 0, 0) : tensor;
  }

  Tensor a_, b_, out_;
  [[maybe_unused]] bool is_float_;
  const char* name_;
};

// [D, rows, columns] of the directions' matrices; a copy where there are two of them.
Tensor stacked(const std::vector<Tensor>& matrices) {
  const Tensor& first = matrices[0];
  if (matrices.size() == 1) return torch::stable::unsqueeze(first, 0);
  const std::array<int64_t, 3> sizes = {2, first.size(0), first.size(1)};
  const Tensor both = torch::stable::new_empty(first, sizes);
  for (size_t d = 0; d < matrices.size(); d++) {
    Tensor one = torch::stable::select(both, 0, static_cast<int64_t>(d));
    torch::stable::copy_(one, matrices[d]);
  }
  return both;
}

// What both scans have in common: W_hh in the one part or the two that the products of a step take,
// and memory.
struct Products {
  const Tensor w_hh;
  const int64_t directions, batch, pitch, gates;
  const bool has_inner;

  template <class Params>
  Products(const StepScan& scan, const Params& p, const std::vector<Tensor>& matrices)
      : w_hh(stacked(matrices)),
        directions(p.directions),
        batch(p.rows.batch),
        pitch(p.pitch),
        gates(cell_sizes(scan.cell).gates),
        has_inner(scan.cell == CellKind::gru_reset_before) {}

  int64_t outer_gates() const { return has_inner ? gates - 1 : gates; }
  // [D, (gates of the part)*pitch, pitch]
  Tensor outer_w() const { return part(0, outer_gates()); }
  Tensor inner_w() const { return part(outer_gates(), gates - outer_gates()); }

  Tensor memory(int64_t columns, ScalarType type) const {
    const std::array<int64_t, 3> sizes = {directions, batch, columns * pitch};
    return torch::stable::new_empty(w_hh, sizes, type);
  }
  Tensor sums(int64_t columns) const { return memory(columns, ScalarType::Float); }
  Tensor operand(int64_t columns) const { return memory(columns, w_hh.scalar_type()); }

 private:
  Tensor part(int64_t first, int64_t count) const {
    Tensor all = w_hh;
    return torch::stable::narrow(all, 1, first * pitch, count * pitch);
  }
};

Tensor transposed(const Tensor& matrices) { return torch::stable::transpose(matrices, 1, 2); }

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

// How many steps a graph has, an even number; 0: no graph. The host's least: recording a step costs
// what doing it costs and 5 us of instantiation, launching a graph of up to 16 steps 2.5 to 5 us
// (an H100, with products of torch and copies that Python recorded). The device does not mind: 5.7
// us a step in graphs of 8, 6.0 in graphs of 2.
int64_t steps_of_graph(int64_t count) {
  const auto half = std::lround(std::sqrt(0.2 * static_cast<double>(count)) / 2);
  return count < 4 ? 0 : 2 * std::clamp(half, 1L, 8L);
}

// The steps of a pass: `count` of them from `first` on, each `by` further.
struct StepOrder {
  int64_t first, count;
  int by;
};

// Calls step(number, stream), which gives a step's work to the stream and torch's part of it to
// torch's own, for each step or for those of a graph.
//
// The graph is of this call: it has the addresses of this call's tensors in it and goes with them.
// What differs between its launches is the number of the step alone, for which there are two words:
// a step reads one of them and writes the other.
template <class Step>
void run_steps(const StepScan& scan, const Tensor& like, const StepOrder& order, const Step& step) {
  int64_t done = 0;
  const auto run_until = [&](int64_t end, int64_t* next) {
    for (; done < end; done++) {
      const bool is_last = done + 1 == end;
      step(StepNumber{order.first + order.by * done, nullptr, is_last ? next : nullptr},
           scan.stream);
    }
  };
  const int64_t size = scan.records && !is_captured(scan.stream) ? steps_of_graph(order.count) : 0;
  if (size > 0) {
    const std::array<int64_t, 1> two = {2};
    const Tensor memory = torch::stable::new_empty(like, two, ScalarType::Long);
    auto* const words = static_cast<int64_t*>(memory.mutable_data_ptr());
    // At least one first: cuBLAS makes a handle and loads a kernel where it has not done so before.
    run_until(1 + (order.count - 1) % size, words);
    std::optional<Graph> graph;
    try {
      graph.emplace(scan.stream, scan.device, [&](void* stream) {
        for (int64_t i = 0; i < size; i++) {
          step(StepNumber{0, words + i % 2, words + (i + 1) % 2}, stream);
        }
      });
    } catch (const std::exception& error) {  // nothing of it has run
      if (is_logging()) {
        std::fprintf(stderr, "fused_rnn: no graph of %d steps is recorded: %s\n",
                     static_cast<int>(size), error.what());
      }
    }
    if (graph) {
      if (is_logging()) {
        std::fprintf(stderr, "fused_rnn: a graph of %d steps is launched %d times\n",
                     static_cast<int>(size), static_cast<int>((order.count - done) / size));
      }
      for (; done < order.count; done += size) graph->launch();
    }
  }
  run_until(order.count, nullptr);
}

}  // namespace

void forward_by_steps(const StepScan& scan, const ForwardParams& params,
                      const std::vector<Tensor>& w_hh, const Tensor& h_n) {
  const Products of(scan, params, w_hh);
  const auto kernels = step_kernels<ForwardStep>(scan.cell, scan.element);
  const Tensor sums = of.sums(of.outer_gates());
  // Of no columns where they are of no use.
  const bool uses_h = scan.cell == CellKind::gru || of.has_inner;
  const Tensor h = of.sums(uses_h), inner_operand = of.operand(of.has_inner),
               inner_sums = of.sums(of.has_inner);
  const Product outer(h_n, transposed(of.outer_w()), sums);
  const Product inner(inner_operand, transposed(of.inner_w()), inner_sums);

  ForwardStep step{params,
                   {-1, nullptr, nullptr},
                   floats(sums),
                   static_cast<float*>(h.mutable_data_ptr()),
                   inner_operand.mutable_data_ptr(),
                   floats(inner_sums)};
  kernels.outer(step, scan.shape, scan.stream);
  run_steps(scan, of.w_hh, {0, params.rows.timesteps, 1},
            [&](const StepNumber& number, void* stream) {
              step.number = number;
              outer();
              if (of.has_inner) {
                kernels.inner(step, scan.shape, stream);
                inner();
              }
              kernels.outer(step, scan.shape, stream);
            });
}

void backward_by_steps(const StepScan& scan, const BackwardParams& params,
                       const std::vector<Tensor>& w_hh) {
  const Products of(scan, params, w_hh);
  const auto kernels = step_kernels<BackwardStep>(scan.cell, scan.element);
  const Tensor sums = of.sums(1), operand = of.operand(of.outer_gates());
  const Tensor inner_operand = of.operand(of.has_inner), inner_sums = of.sums(of.has_inner);
  const Product outer(operand, of.outer_w(), sums);
  const Product inner(inner_operand, of.inner_w(), inner_sums);

  BackwardStep step{params,
                    {-1, nullptr, nullptr},
                    floats(sums),
                    operand.mutable_data_ptr(),
                    inner_operand.mutable_data_ptr(),
                    floats(inner_sums)};
  run_steps(scan, of.w_hh, {params.rows.timesteps - 1, params.rows.timesteps, -1},
            [&](const StepNumber& number, void* stream) {
              step.number = number;
              if (of.has_inner) {
                kernels.inner(step, scan.shape, stream);
                inner();
              }
              kernels.outer(step, scan.shape, stream);
              outer();
            });
  step.number = {-1, nullptr, nullptr};
  kernels.outer(step, scan.shape, scan.stream);
}

}  // namespace fused_rnn
