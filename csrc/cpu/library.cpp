// The CPU library's border: checks every argument, fills the plain structs, shares out the work.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "features.h"
#include "kernels.h"

namespace fused_rnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many floating-point operations there is no parallel region: what one thread does in
// a few microseconds. Not tuned yet.
constexpr double kSerialFlops = 2e5;

const ScanKernels& kernels() {
  struct Candidate {
    const ScanKernels* kernels;
    bool runs;
  };
  const Candidate candidates[] = {
#if defined(FUSED_RNN_X86)
      {&avx512_kernels, cpu_has_avx512()},
      {&avx2_kernels, cpu_has_avx2()},
#endif
      {&portable_kernels, true},
  };
  const char* wanted = std::getenv("FUSED_RNN_CPU_CAPABILITY");
  const bool automatic = wanted == nullptr || *wanted == '\0';
  const ScanKernels* chosen = nullptr;
  std::string known;
  for (const Candidate& candidate : candidates) {
    const char* name = candidate.kernels->name;
    known += (known.empty() ? "" : ", ") + std::string(name);
    if (automatic ? chosen == nullptr && candidate.runs : std::strcmp(wanted, name) == 0) {
      STD_TORCH_CHECK(candidate.runs, "FUSED_RNN_CPU_CAPABILITY=", name,
                      ": this CPU does not have it");
      chosen = candidate.kernels;
    }
  }
  STD_TORCH_CHECK(chosen != nullptr, "FUSED_RNN_CPU_CAPABILITY: expected one of ", known, "; got '",
                  automatic ? "" : wanted, "'");
  return *chosen;
}

std::string capability() { return kernels().name; }

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// A dense float32 CPU tensor of just this shape.
void check(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected dtype Float, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(
      sizes.size() == shape.size() && std::equal(shape.begin(), shape.end(), sizes.begin()), name,
      ": expected shape ", shape_text(shape), ", got ", shape_text(sizes));
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
                  shape_text(tensor.strides()));
}

const float* input(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, shape);
  return tensor.const_data_ptr<float>();
}

const float* input(const std::optional<Tensor>& tensor, const char* name,
                   std::initializer_list<int64_t> shape) {
  return tensor ? input(*tensor, name, shape) : nullptr;
}

float* output(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  check(tensor, name, shape);
  return tensor.mutable_data_ptr<float>();
}

// The facts of csrc/cells.h that sizes depend on.
struct CellSizes {
  CellKind kind;
  int64_t gates, saved_gates, grad_gates;
  bool has_c;

  explicit CellSizes(int64_t index) {
    static constexpr int64_t table[4][4] = {{1, 0, 1, 0}, {1, 0, 1, 0}, {3, 4, 4, 0}, {4, 4, 4, 1}};
    STD_TORCH_CHECK(index >= 0 && index < 4, "cell: expected 0 to 3, got ", index);
    kind = static_cast<CellKind>(index);
    gates = table[index][0];
    saved_gates = table[index][1];
    grad_gates = table[index][2];
    has_c = table[index][3] != 0;
  }
};

struct ScanSizes {
  int64_t directions, count, batch, hidden;

  ScanSizes(const Tensor& h0, const Tensor& y) {
    STD_TORCH_CHECK(h0.dim() == 3, "h0: expected [D, B, H], got shape ", shape_text(h0.sizes()));
    STD_TORCH_CHECK(y.dim() == 2, "y: expected [N, D*H], got shape ", shape_text(y.sizes()));
    directions = h0.size(0);
    batch = h0.size(1);
    hidden = h0.size(2);
    count = y.size(0);
    STD_TORCH_CHECK(directions == 1 || directions == 2, "h0: expected 1 or 2 directions, got ",
                    directions);
    STD_TORCH_CHECK(hidden > 0, "h0: expected at least one hidden unit, got shape ",
                    shape_text(h0.sizes()));
  }
};

// Checks batch_sizes and fills `offsets`, which must live as long as the result.
RowLayout row_layout(const ScanSizes& sizes, const std::optional<Tensor>& batch_sizes,
                     std::vector<int64_t>& offsets) {
  const int64_t count = sizes.count, batch = sizes.batch;
  if (!batch_sizes) {
    STD_TORCH_CHECK(batch == 0 ? count == 0 : count % batch == 0,
                    "y: expected a multiple of the batch size ", batch, " as its rows, got ",
                    count);
    return {batch == 0 ? 0 : count / batch, batch, nullptr, nullptr};
  }
  STD_TORCH_CHECK(batch_sizes->is_cpu() && batch_sizes->dim() == 1 &&
                      batch_sizes->scalar_type() == ScalarType::Long &&
                      batch_sizes->is_contiguous(),
                  "batch_sizes: expected a contiguous int64 CPU tensor [T], got shape ",
                  shape_text(batch_sizes->sizes()), " or another dtype or device");
  const int64_t timesteps = batch_sizes->size(0);
  const int64_t* at = batch_sizes->const_data_ptr<int64_t>();
  offsets.resize(static_cast<size_t>(timesteps));
  int64_t total = 0, limit = batch;
  for (int64_t t = 0; t < timesteps; t++) {
    STD_TORCH_CHECK(at[t] >= 0 && at[t] <= limit, "batch_sizes: expected 0 to ", limit,
                    " rows at step ", t, ", never more than the step before or the batch, got ",
                    at[t]);
    offsets[static_cast<size_t>(t)] = total;
    total += at[t];
    limit = at[t];
  }
  STD_TORCH_CHECK(total == count, "batch_sizes: expected a sum of ", count, " rows, got ", total);
  return {timesteps, batch, at, offsets.data()};
}

template <class F>
void for_range(bool parallel, int64_t count, const F& body) {
  if (parallel && count > 1) {
    torch::stable::parallel_for(0, count, 1, body);
  } else {
    body(0, count);
  }
}

using PackFunction = decltype(ScanKernels::pack_forward);

// [D, packed floats] the recurrent weights in the kernels' layout; `packed` gets each direction.
Tensor pack(const CellSizes& cell, const ScanSizes& sizes, const std::vector<Tensor>& w_hh,
            const ScanKernels& isa, PackFunction function, int64_t panel_gates, bool parallel,
            const float* packed[2]) {
  const int64_t hidden = sizes.hidden, width = isa.width;
  STD_TORCH_CHECK(static_cast<int64_t>(w_hh.size()) == sizes.directions,
                  "w_hh: expected one tensor for each of ", sizes.directions, " directions, got ",
                  w_hh.size());
  const float* weights[2];
  for (size_t d = 0; d < w_hh.size(); d++) {
    weights[d] = input(w_hh[d], "w_hh", {cell.gates * hidden, hidden});
  }
  const int64_t floats = (hidden + width - 1) / width * width * cell.gates * hidden;
  Tensor storage = torch::stable::new_empty(w_hh[0], {sizes.directions, floats});
  float* base = storage.mutable_data_ptr<float>();
  PackParams params[2];
  for (int64_t d = 0; d < sizes.directions; d++) {
    params[d] = {hidden, weights[d], base + d * floats};
    packed[d] = params[d].packed;
  }
  const int64_t units = vectors_per_panel(static_cast<int>(panel_gates)) * width;
  const int64_t panels = (hidden + units - 1) / units;
  for_range(parallel, sizes.directions * panels, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      function(cell.kind, params[i / panels], i % panels, i % panels + 1);
    }
  });
  return storage;
}

// Shares the batch rows of every direction out over the threads and runs body(share) on each.
template <class F>
void for_each_share(const ScanSizes& sizes, const RowLayout& rows, bool parallel, const F& body) {
  const int64_t threads = parallel ? torch::stable::get_num_threads() : 1;
  const int64_t batch = sizes.batch;
  const int64_t wanted = sizes.directions == 2 && threads % 2 == 0 ? threads / 2 : threads;
  const int64_t shares = std::max<int64_t>(1, std::min(wanted, batch));
  for_range(parallel, sizes.directions * shares, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t d = i / shares, s = i % shares;
      // Packed rows are sorted by length: dealing them out evens the work.
      body(rows.batch_sizes ? RowShare{d, s, shares, batch}
                            : RowShare{d, batch * s / shares, 1, batch * (s + 1) / shares});
    }
  });
}

bool worth_threads(const CellSizes& cell, const ScanSizes& sizes) {
  return 2.0 * static_cast<double>(sizes.directions * sizes.count) *
             static_cast<double>(cell.gates * sizes.hidden * sizes.hidden) >
         kSerialFlops;
}

void scan_forward(int64_t cell_index, const Tensor& gx, std::vector<Tensor> w_hh,
                  std::vector<Tensor> b_hh, const Tensor& h0, std::optional<Tensor> c0,
                  std::optional<Tensor> batch_sizes, Tensor y, Tensor h_n, Tensor c_n, Tensor gates,
                  Tensor cells) {
  const CellSizes cell(cell_index);
  const ScanSizes sizes(h0, y);
  const int64_t directions = sizes.directions, count = sizes.count, hidden = sizes.hidden;
  const int64_t batch = sizes.batch;
  std::vector<int64_t> offsets;
  ScanForwardParams p{};
  p.directions = directions;
  p.hidden = hidden;
  p.count = count;
  p.rows = row_layout(sizes, batch_sizes, offsets);
  p.gx = input(gx, "gx", {directions, count, cell.gates * hidden});
  p.h0 = input(h0, "h0", {directions, batch, hidden});
  p.y = output(y, "y", {count, directions * hidden});
  p.h_n = output(h_n, "h_n", {directions, batch, hidden});
  STD_TORCH_CHECK(c0.has_value() == cell.has_c, "c0: expected ",
                  cell.has_c ? "a tensor for lstm" : "None for this cell");
  if (cell.has_c) {
    p.c0 = input(c0, "c0", {directions, batch, hidden});
    p.c_n = output(c_n, "c_n", {directions, batch, hidden});
  }
  const bool save = gates.dim() == 3 && gates.size(2) > 0;
  if (save) {
    p.gates = output(gates, "gates", {directions, count, cell.saved_gates * hidden});
    if (cell.has_c) p.cells = output(cells, "cells", {directions, count, hidden});
  }
  STD_TORCH_CHECK(b_hh.empty() || static_cast<int64_t>(b_hh.size()) == directions,
                  "b_hh: expected none or one tensor for each of ", directions, " directions, got ",
                  b_hh.size());
  for (size_t d = 0; cell.kind == CellKind::gru && d < b_hh.size(); d++) {
    p.hidden_bias[d] = input(b_hh[d], "b_hh", {3 * hidden}) + 2 * hidden;
  }
  const ScanKernels& isa = kernels();
  const bool parallel = worth_threads(cell, sizes);
  const Tensor packed =
      pack(cell, sizes, w_hh, isa, isa.pack_forward, cell.gates, parallel, p.packed_weights);
  for_each_share(sizes, p.rows, parallel,
                 [&](const RowShare& share) { isa.forward(cell.kind, p, share); });
}

void scan_backward(int64_t cell_index, std::optional<Tensor> grad_y, std::optional<Tensor> grad_h_n,
                   std::optional<Tensor> grad_c_n, std::vector<Tensor> w_hh, const Tensor& h0,
                   std::optional<Tensor> c0, std::optional<Tensor> batch_sizes, const Tensor& y,
                   const Tensor& gates, const Tensor& cells, Tensor grad_gates, Tensor grad_h0,
                   Tensor grad_c0) {
  const CellSizes cell(cell_index);
  const ScanSizes sizes(h0, y);
  const int64_t directions = sizes.directions, count = sizes.count, hidden = sizes.hidden;
  const int64_t batch = sizes.batch;
  std::vector<int64_t> offsets;
  ScanBackwardParams p{};
  p.directions = directions;
  p.hidden = hidden;
  p.count = count;
  p.rows = row_layout(sizes, batch_sizes, offsets);
  p.grad_y = input(grad_y, "grad_y", {count, directions * hidden});
  p.grad_h_n = input(grad_h_n, "grad_h_n", {directions, batch, hidden});
  p.h0 = input(h0, "h0", {directions, batch, hidden});
  p.y = input(y, "y", {count, directions * hidden});
  if (cell.saved_gates > 0) {
    p.gates = input(gates, "gates", {directions, count, cell.saved_gates * hidden});
  }
  p.grad_gates = output(grad_gates, "grad_gates", {directions, count, cell.grad_gates * hidden});
  p.grad_h0 = output(grad_h0, "grad_h0", {directions, batch, hidden});
  STD_TORCH_CHECK(c0.has_value() == cell.has_c, "c0: expected ",
                  cell.has_c ? "a tensor for lstm" : "None for this cell");
  if (cell.has_c) {
    p.grad_c_n = input(grad_c_n, "grad_c_n", {directions, batch, hidden});
    p.c0 = input(c0, "c0", {directions, batch, hidden});
    p.cells = input(cells, "cells", {directions, count, hidden});
    p.grad_c0 = output(grad_c0, "grad_c0", {directions, batch, hidden});
  }
  const ScanKernels& isa = kernels();
  const bool parallel = worth_threads(cell, sizes);
  const Tensor packed =
      pack(cell, sizes, w_hh, isa, isa.pack_backward, 1, parallel, p.packed_weights);
  for_each_share(sizes, p.rows, parallel,
                 [&](const RowShare& share) { isa.backward(cell.kind, p, share); });
}

}  // namespace
}  // namespace fused_rnn

// The shapes of all arguments are in scan_params.h. Outputs are written in place; `gates` of an
// LSTM may be `gx` itself, and zero columns in `gates` mean that nothing is saved.
STABLE_TORCH_LIBRARY(fused_rnn_cpu, m) {
  m.def(
      "scan_forward(int cell, Tensor gx, Tensor[] w_hh, Tensor[] b_hh, Tensor h0, Tensor? c0, "
      "Tensor? batch_sizes, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) gates, "
      "Tensor(e!) cells) -> ()");
  m.def(
      "scan_backward(int cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor[] w_hh, "
      "Tensor h0, Tensor? c0, Tensor? batch_sizes, Tensor y, Tensor gates, Tensor cells, "
      "Tensor(a!) grad_gates, Tensor(b!) grad_h0, Tensor(c!) grad_c0) -> ()");
  m.def("capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CPU, m) {
  m.impl("scan_forward", TORCH_BOX(&fused_rnn::scan_forward));
  m.impl("scan_backward", TORCH_BOX(&fused_rnn::scan_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fused_rnn_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&fused_rnn::capability));
}
