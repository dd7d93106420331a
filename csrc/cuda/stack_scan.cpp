#include "stack_scan.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <functional>

#include "streams.h"
#include "torch_call.h"

namespace fused_rnn {
namespace {

using torch::stable::Tensor;

// out = what dropout leaves of values, which may be the same tensor.
void drop(const Tensor& values, const Tensor& kept, double scale, const Tensor& out) {
  using torch::stable::detail::from;
  call_torch("aten::native_dropout_backward", "out",
             std::array{from(values), from(kept), from(scale), from(out)});
}

// The timesteps of a chunk, and the rows they own.
struct Chunk {
  int64_t first, steps, batch;
  bool is_last;

  int64_t row0() const { return first * batch; }
  int64_t rows() const { return steps * batch; }
  Tensor of(const Tensor& matrix) const {  // [N, K]
    Tensor all = matrix;
    return torch::stable::narrow(all, 0, row0(), rows());
  }
  ScanRows of(const ScanRows& all) const {
    ScanRows part = all;
    part.timesteps = steps;
    part.count = rows();
    return part;
  }
};

void* ahead(void* memory, int64_t bytes) {
  return memory == nullptr ? nullptr : static_cast<char*>(memory) + bytes;
}
const void* ahead(const void* memory, int64_t bytes) {
  return memory == nullptr ? nullptr : static_cast<const char*>(memory) + bytes;
}

// The state a chunk starts from is that of the row before it; what of it is float32, c or GRU's h,
// is handed on in c_n.
ForwardParams part(const ForwardParams& whole, const Chunk& chunk, const CellSizes& sizes,
                   int element_bytes) {
  ForwardParams p = whole;
  const int64_t units = chunk.row0() * p.pitch, bytes = units * element_bytes;
  p.rows = chunk.of(whole.rows);
  p.gx = ahead(whole.gx, sizes.gates * bytes);
  p.y = ahead(whole.y, bytes);
  p.gates = ahead(whole.gates, sizes.saved_gates * bytes);
  if (whole.cells != nullptr) p.cells = whole.cells + units;
  if (chunk.first > 0) {
    p.h0 = ahead(whole.y, bytes - chunk.batch * p.pitch * element_bytes);
    p.c0 = whole.c_n;
  }
  return p;
}

// What the later chunk made of the gradients of its initial state lies where this one puts its own.
BackwardParams part(const BackwardParams& whole, const Chunk& chunk, const CellSizes& sizes,
                    int element_bytes) {
  BackwardParams p = whole;
  const int64_t units = chunk.row0() * p.pitch, bytes = units * element_bytes;
  p.rows = chunk.of(whole.rows);
  p.y = ahead(whole.y, bytes);
  p.gates = ahead(whole.gates, sizes.saved_gates * bytes);
  p.grad_y = ahead(whole.grad_y, bytes);
  p.grad_gates = ahead(whole.grad_gates, sizes.grad_gates * bytes);
  if (sizes.has_c) p.cells = whole.cells + units;
  if (chunk.first > 0) {
    p.h0 = ahead(whole.y, bytes - chunk.batch * p.pitch * element_bytes);
    if (sizes.has_c) p.c0 = p.cells - chunk.batch * p.pitch;
  }
  if (!chunk.is_last) {
    p.grad_h_n = whole.grad_h0;
    p.grad_c_n = whole.grad_c0;
  }
  return p;
}

// Runs all chunks of all layers; layers and chunks are counted in the order of the scans, from the
// layer that reads what comes from outside and the chunk that starts first. `product` makes what a
// scan reads from what the layer before it wrote.
void run_chunks(const StackScan& scan, const ScanRows& rows, bool is_backward,
                const std::function<void(size_t layer, const Chunk&)>& product,
                const std::function<void(size_t layer, const Chunk&, void* stream)>& launch) {
  const int layers = static_cast<int>(scan.layer_streams.size());
  const int64_t chunks = (rows.timesteps + scan.chunk - 1) / scan.chunk;
  const auto chunk_of = [&](int64_t number) {
    const int64_t index = is_backward ? chunks - 1 - number : number;
    const int64_t first = index * scan.chunk;
    return Chunk{first, std::min(scan.chunk, rows.timesteps - first), rows.batch,
                 index == chunks - 1};
  };
  // Of each layer: its input is there; its scan of a chunk of even, or odd, number has ended.
  const auto projected = [](int layer) { return 3 * layer; };
  const auto scanned = [](int layer, int64_t number) {
    return 3 * layer + 1 + static_cast<int>(number % 2);
  };
  Streams streams(scan.stream, scan.layer_streams, 3 * layers);
  // Along diagonals, since a stream gets its work in the order in which it can run: where a layer
  // is given its chunk, the one before it has been given the same chunk and the one after.
  for (int64_t diagonal = 0; diagonal < chunks + layers - 1; diagonal++) {
    for (int layer = 0; layer < layers; layer++) {
      const int64_t number = diagonal - layer;
      if (number < 0 || number >= chunks) continue;
      const Chunk chunk = chunk_of(number);
      const auto which = static_cast<size_t>(layer);
      if (layer > 0) streams.wait(0, scanned(layer - 1, number));
      streams.run(0, [&product, which, chunk](void*) { product(which, chunk); });
      streams.record(0, projected(layer));
      streams.wait(1 + layer, projected(layer));
      streams.run(1 + layer,
                  [&launch, which, chunk](void* stream) { launch(which, chunk, stream); });
      streams.record(1 + layer, scanned(layer, number));
    }
  }
  streams.finish();
}

}  // namespace

void run_forward(const StackScan& scan, const ForwardStack& stack,
                 const Kernel<ForwardParams>& kernel, const LaunchShape& shape) {
  using torch::stable::detail::from;
  const CellSizes sizes = cell_sizes(scan.cell);
  run_chunks(
      scan, stack.layers[0].rows, false,
      [&](size_t layer, const Chunk& chunk) {
        Tensor input = chunk.of(stack.inputs[layer]);
        if (layer > 0 && !scan.kept.empty()) {
          const Tensor dropped = torch::stable::empty_like(input);
          drop(input, chunk.of(scan.kept[layer - 1]), scan.scale, dropped);
          input = dropped;
        }
        std::optional<Tensor> bias;
        if (!stack.biases.empty()) bias = stack.biases[layer];
        call_torch("aten::linear", "out",
                   std::array{from(input), from(stack.w_ih[layer]), from(bias),
                              from(chunk.of(stack.gx[layer]))});
      },
      [&](size_t layer, const Chunk& chunk, void* stream) {
        kernel.launch(part(stack.layers[layer], chunk, sizes, scan.element_bytes), shape, stream);
      });
}

void run_backward(const StackScan& scan, const BackwardStack& stack,
                  const Kernel<BackwardParams>& kernel, const LaunchShape& shape) {
  using torch::stable::detail::from;
  const CellSizes sizes = cell_sizes(scan.cell);
  const size_t top = stack.layers.size() - 1;
  run_chunks(
      scan, stack.layers[0].rows, true,
      [&](size_t number, const Chunk& chunk) {
        if (number == 0) return;  // the last layer's gradient is the caller's
        const size_t layer = top - number;
        Tensor gates = chunk.of(stack.grad_gates[layer + 1]);
        // Of GRU's, those that face W_ih.
        const int64_t facing = sizes.gates * stack.layers[layer].pitch;
        gates = torch::stable::narrow(gates, 1, gates.size(1) - facing, facing);
        const Tensor grad = chunk.of(stack.grad_ys[layer]);
        call_torch("aten::mm", "out",
                   std::array{from(gates), from(stack.w_ih[layer + 1]), from(grad)});
        if (!scan.kept.empty()) drop(grad, chunk.of(scan.kept[layer]), scan.scale, grad);
      },
      [&](size_t number, const Chunk& chunk, void* stream) {
        kernel.launch(part(stack.layers[top - number], chunk, sizes, scan.element_bytes), shape,
                      stream);
      });
}

}  // namespace fused_rnn
