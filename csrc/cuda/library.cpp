// The CUDA library's border, and that of its emulation on CPU tensors: checks every argument, fills
// the plain structs, launches what the planner says.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../plan.h"
#include "../tensor_checks.h"
#include "grid_launch.h"
#include "instances.h"
#include "kernels.h"
#include "step_scan.h"

#if defined(FUSED_RNN_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fused_rnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

#if defined(FUSED_RNN_EMULATED)

constexpr const char* kDeviceName = "CPU";
bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }

// As an H100, but with so few SMs that a handful of rows fills them.
Device emulated_device{90, 6, 227 << 10, 16};
Device device_facts(int64_t) { return emulated_device; }

struct CurrentDevice {
  explicit CurrentDevice(int64_t) {}
};

#else

constexpr const char* kDeviceName = "CUDA";
bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

using CurrentDevice = torch::stable::accelerator::DeviceGuard;

// Whether the current device runs even one cluster of the kernel; too large a one is an error.
bool is_active(const Kernel<ForwardParams>& kernel, const LaunchShape& shape) {
  try {
    return kernel.active_clusters(shape) > 0;
  } catch (const std::runtime_error&) {
    return false;
  }
}

Device read_device_facts(int device) {
  const auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device));
    return value;
  };
  Device facts{};
  facts.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                     attribute(cudaDevAttrComputeCapabilityMinor);
  facts.processors = attribute(cudaDevAttrMultiProcessorCount);
  facts.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  facts.max_cluster = 1;
  if (facts.capability < 80) return facts;  // the planner refuses it
  const CurrentDevice guard(device);
  // Not what its generation allows: chips come with SMs switched off, and in slices.
  const auto& tiles = forward_tiles<CellKind::lstm, 2>();
  const auto* kernels = kernels_of<CellKind::lstm, ElementKind::bfloat16, ForwardParams>();
  for (size_t i = 0; i < tiles.size(); i++) {
    const auto layout = layout_of(tiles[i], cell_sizes(CellKind::lstm).gates, 2);
    const int cluster = tiles[i].cluster;
    if (tiles[i].grid || layout.shared_bytes > facts.shared_bytes) continue;
    const LaunchShape shape{cluster, 1, cluster, layout.threads, layout.shared_bytes, false};
    if (cluster == 1) {
      kernels[i].active_clusters(shape);  // throws where the library has no code for the device
    } else if (facts.capability >= 90 && cluster > facts.max_cluster &&
               is_active(kernels[i], shape)) {
      facts.max_cluster = cluster;
    }
  }
  return facts;
}

Device device_facts(int64_t device) {
  static std::mutex mutex;
  static std::array<std::optional<Device>, 64> known;
  STD_TORCH_CHECK(device >= 0 && device < static_cast<int64_t>(known.size()),
                  "device: expected an index from 0 to 63, got ", device);
  const std::lock_guard<std::mutex> lock(mutex);
  auto& facts = known[static_cast<size_t>(device)];
  if (!facts) facts = read_device_facts(static_cast<int>(device));
  return *facts;
}

#endif

CellKind cell_kind(int64_t index) {
  STD_TORCH_CHECK(index >= 0 && index < 5, "cell: expected 0 to 4, got ", index);
  return static_cast<CellKind>(index);
}

ElementKind element_kind(ScalarType type, bool tf32) {
  switch (type) {
    case ScalarType::BFloat16:
      return ElementKind::bfloat16;
    case ScalarType::Half:
      return ElementKind::float16;
    case ScalarType::Float:
      return tf32 ? ElementKind::tf32 : ElementKind::float32;
    default:
      STD_TORCH_CHECK(false, "gx: expected dtype Float, BFloat16 or Half, got ",
                      torch::headeronly::toString(type));
  }
}

template <class Params, CellKind kind>
const Kernel<Params>* kernels_of_cell(ElementKind element) {
  switch (element) {
    case ElementKind::bfloat16:
      return kernels_of<kind, ElementKind::bfloat16, Params>();
    case ElementKind::float16:
      return kernels_of<kind, ElementKind::float16, Params>();
    case ElementKind::tf32:
      return kernels_of<kind, ElementKind::tf32, Params>();
    default:
      return kernels_of<kind, ElementKind::float32, Params>();
  }
}

template <class Params>
const Kernel<Params>* find_kernels(CellKind cell, ElementKind element) {
  switch (cell) {
    case CellKind::rnn_tanh:
      return kernels_of_cell<Params, CellKind::rnn_tanh>(element);
    case CellKind::rnn_relu:
      return kernels_of_cell<Params, CellKind::rnn_relu>(element);
    case CellKind::gru:
      return kernels_of_cell<Params, CellKind::gru>(element);
    default:
      return kernels_of_cell<Params, CellKind::lstm>(element);
  }
}

void check(const Tensor& tensor, const char* name, ScalarType type, Shape shape) {
  STD_TORCH_CHECK(on_device(tensor), name, ": expected a ", kDeviceName, " tensor");
  check_dense(tensor, name, type, shape);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
                  ": expected memory aligned to 16 bytes");
}

const void* input(const Tensor& tensor, const char* name, ScalarType type, Shape shape) {
  check(tensor, name, type, shape);
  return tensor.const_data_ptr();
}

const void* input(const std::optional<Tensor>& tensor, const char* name, ScalarType type,
                  Shape shape) {
  return tensor ? input(*tensor, name, type, shape) : nullptr;
}

template <class Optional>
const float* float_input(const Optional& tensor, const char* name, Shape shape) {
  return static_cast<const float*>(input(tensor, name, ScalarType::Float, shape));
}

void* output(const Tensor& tensor, const char* name, ScalarType type, Shape shape) {
  check(tensor, name, type, shape);
  return tensor.mutable_data_ptr();
}

float* float_output(const Tensor& tensor, const char* name, Shape shape) {
  return static_cast<float*>(output(tensor, name, ScalarType::Float, shape));
}

// What both scans have in common.
struct Border {
  CellKind cell;
  CellSizes sizes;
  ScalarType type;
  ElementKind element;
  int64_t directions, batch, count, hidden, pitch;

  ScanProblem problem() const {
    return {cell, type == ScalarType::Float ? 4 : 2, hidden, batch, directions};
  }
};

struct RowArguments {
  const std::optional<Tensor>&lengths, &offsets, &resets;
};

Border border(int64_t cell, const Tensor& rows, const char* name, int64_t columns, const Tensor& h0,
              int64_t hidden, bool tf32) {
  Border b{};
  b.cell = cell_kind(cell);
  b.sizes = cell_sizes(b.cell);
  b.type = rows.scalar_type();
  b.element = element_kind(b.type, tf32);
  STD_TORCH_CHECK(h0.dim() == 3, "h0: expected [D, B, pitch], got shape ", shape_text(h0.sizes()));
  b.directions = h0.size(0);
  b.batch = h0.size(1);
  b.pitch = h0.size(2);
  b.hidden = hidden;
  STD_TORCH_CHECK(b.directions == 1 || b.directions == 2, "h0: expected 1 or 2 directions, got ",
                  b.directions);
  STD_TORCH_CHECK(b.batch > 0, "h0: expected at least one batch row, got none");
  STD_TORCH_CHECK(hidden > 0 && b.pitch >= hidden && b.pitch % kGroup == 0 && b.pitch < 1 << 20,
                  "h0: expected rows of a multiple of 8 columns from hidden_size = ", hidden,
                  " on, got ", b.pitch);
  STD_TORCH_CHECK(rows.dim() == 3, name, ": expected [D, N, ", columns, " * pitch], got shape ",
                  shape_text(rows.sizes()));
  b.count = rows.size(1);
  return b;
}

ScanRows scan_rows(const Border& b, const RowArguments& given) {
  ScanRows rows{};
  rows.batch = b.batch;
  rows.count = b.count;
  if (given.offsets) {
    rows.timesteps = given.offsets->numel();
    STD_TORCH_CHECK(given.lengths.has_value() && !given.resets.has_value(),
                    "offsets: packed rows need lengths, and cannot be reset");
    rows.offsets = static_cast<const int64_t*>(
        input(given.offsets, "offsets", ScalarType::Long, {rows.timesteps}));
  } else {
    STD_TORCH_CHECK(b.count % b.batch == 0, "gx: expected a multiple of the batch size ", b.batch,
                    " as its rows, got ", b.count);
    rows.timesteps = b.count / b.batch;
  }
  STD_TORCH_CHECK(rows.timesteps < int64_t{1} << 31, "gx: expected fewer than 2^31 timesteps, got ",
                  rows.timesteps);
  rows.lengths =
      static_cast<const int64_t*>(input(given.lengths, "lengths", ScalarType::Long, {b.batch}));
  rows.resets = static_cast<const uint8_t*>(
      input(given.resets, "resets", ScalarType::Bool, {rows.timesteps, b.batch}));
  return rows;
}

// The fields that both kinds of parameters have.
template <class Params>
void fill(Params& p, const Border& b, const RowArguments& rows, const std::vector<Tensor>& w_hh,
          const Tensor& h0, const std::optional<Tensor>& c0, const std::optional<Tensor>& reset_h,
          const std::optional<Tensor>& reset_c) {
  p.rows = scan_rows(b, rows);
  p.hidden = static_cast<int>(b.hidden);
  p.pitch = static_cast<int>(b.pitch);
  p.directions = static_cast<int>(b.directions);
  STD_TORCH_CHECK(static_cast<int64_t>(w_hh.size()) == b.directions, "w_hh: expected ",
                  b.directions, " matrices, got ", w_hh.size());
  for (size_t d = 0; d < w_hh.size(); d++) {
    p.w_hh[d] = input(w_hh[d], "w_hh", b.type, {b.sizes.gates * b.pitch, b.pitch});
  }
  const Shape states = {b.directions, b.batch, b.pitch};
  p.h0 = input(h0, "h0", b.type, states);
  STD_TORCH_CHECK(c0.has_value() == b.sizes.has_c, "c0: expected ",
                  c0 ? "None for this cell" : "a tensor for lstm");
  p.c0 = float_input(c0, "c0", states);
  p.reset_h = input(reset_h, "reset_h", b.type, states);
  p.reset_c = float_input(reset_c, "reset_c", states);
}

ForcedRegime forced_regime(const std::string& name) {
  try {
    return regime_called(name);
  } catch (const std::invalid_argument& error) {
    STD_TORCH_CHECK(false, error.what());
  }
}

// `by_steps` is called where the plan is to run step by step; `like` is a tensor on the device.
template <class Params, class Tile, class BySteps>
void launch(const Border& b, const Plan<Tile>& plan, const Params& params, const Tensor& like,
            const Device& device, ForcedRegime forced, int64_t stream, const BySteps& by_steps) {
  constexpr bool kTraining = !std::is_same_v<Params, ForwardParams>;
  STD_TORCH_CHECK(plan.regime != Regime::none,
                  "hidden_size: ", plan_refusal(b.problem(), device, kTraining, forced));
  void* on = reinterpret_cast<void*>(stream);
  try {
    if (plan.regime == Regime::steps) {
      by_steps(StepScan{b.cell, b.element, plan.shape, on});
      return;
    }
    const Kernel<Params>* kernels = find_kernels<Params>(b.cell, b.element);
    STD_TORCH_CHECK(kernels != nullptr, "cell: rnn_relu runs in float32 only");
    const Kernel<Params>& kernel = kernels[plan.index];
    if (plan.regime == Regime::grid) {
      launch_over_grid(kernel, plan, params, like, like.get_device_index(), on);
    } else {
      kernel.launch(params, plan.shape, on);
    }
  } catch (const std::exception& error) {
    STD_TORCH_CHECK(false, error.what(), ", in ", describe_plan(b.problem(), device, true, forced),
                    " of T=", params.rows.timesteps, " B=", b.batch, " H=", b.hidden);
  }
}

bool wanted(const Tensor& tensor) { return tensor.dim() != 3 || tensor.size(2) > 0; }

void forward_op(int64_t cell, const Tensor& gx, std::vector<Tensor> w_hh,
                std::optional<Tensor> b_hn, const Tensor& h0, std::optional<Tensor> c0,
                int64_t hidden, std::optional<Tensor> lengths, std::optional<Tensor> offsets,
                std::optional<Tensor> resets, std::optional<Tensor> reset_h,
                std::optional<Tensor> reset_c, Tensor y, Tensor h_n, Tensor c_n, Tensor gates,
                Tensor cells, std::string regime, bool tf32, int64_t stream) {
  const Border b = border(cell, gx, "gx", cell_sizes(cell_kind(cell)).gates, h0, hidden, tf32);
  ForwardParams p{};
  fill(p, b, {lengths, offsets, resets}, w_hh, h0, c0, reset_h, reset_c);
  p.gx = input(gx, "gx", b.type, {b.directions, b.count, b.sizes.gates * b.pitch});
  p.b_hn = float_input(b_hn, "b_hn", {b.directions, b.pitch});
  p.y = output(y, "y", b.type, {b.count, b.directions * b.pitch});
  const Shape states = {b.directions, b.batch, b.pitch};
  p.h_n = output(h_n, "h_n", b.type, states);
  if (b.sizes.has_c) p.c_n = float_output(c_n, "c_n", states);
  if (wanted(gates)) {
    p.gates =
        output(gates, "gates", b.type, {b.directions, b.count, b.sizes.saved_gates * b.pitch});
  }
  if (b.sizes.has_c && wanted(cells)) {
    p.cells = float_output(cells, "cells", {b.directions, b.count, b.pitch});
  }
  const int64_t index = gx.get_device_index();
  const CurrentDevice guard(static_cast<int32_t>(index));
  const Device device = device_facts(index);
  const ForcedRegime forced = forced_regime(regime);
  launch(b, plan_forward(b.problem(), device, forced), p, gx, device, forced, stream,
         [&](const StepScan& scan) { forward_by_steps(scan, p, w_hh, h_n); });
}

void backward_op(int64_t cell, std::optional<Tensor> grad_y, std::optional<Tensor> grad_h_n,
                 std::optional<Tensor> grad_c_n, std::optional<Tensor> grad_cells,
                 std::vector<Tensor> w_hh, const Tensor& h0, std::optional<Tensor> c0,
                 int64_t hidden, std::optional<Tensor> lengths, std::optional<Tensor> offsets,
                 std::optional<Tensor> resets, std::optional<Tensor> reset_h,
                 std::optional<Tensor> reset_c, const Tensor& y, const Tensor& gates,
                 const Tensor& cells, Tensor grad_gates, Tensor grad_h0, Tensor grad_c0,
                 std::optional<Tensor> grad_reset_h, std::optional<Tensor> grad_reset_c,
                 std::string regime, bool tf32, int64_t stream) {
  const Border b = border(cell, grad_gates, "grad_gates", cell_sizes(cell_kind(cell)).grad_gates,
                          h0, hidden, tf32);
  BackwardParams p{};
  fill(p, b, {lengths, offsets, resets}, w_hh, h0, c0, reset_h, reset_c);
  const Shape sequence = {b.count, b.directions * b.pitch};
  const Shape states = {b.directions, b.batch, b.pitch};
  p.y = input(y, "y", b.type, sequence);
  p.grad_y = input(grad_y, "grad_y", b.type, sequence);
  p.grad_h_n = float_input(grad_h_n, "grad_h_n", states);
  p.grad_c_n = float_input(grad_c_n, "grad_c_n", states);
  if (b.sizes.saved_gates > 0) {
    p.gates = input(gates, "gates", b.type, {b.directions, b.count, b.sizes.saved_gates * b.pitch});
  }
  p.grad_gates = output(grad_gates, "grad_gates", b.type,
                        {b.directions, b.count, b.sizes.grad_gates * b.pitch});
  p.grad_h0 = float_output(grad_h0, "grad_h0", states);
  if (b.sizes.has_c) {
    p.grad_cells = float_input(grad_cells, "grad_cells", {b.directions, b.count, b.pitch});
    p.cells = float_input(cells, "cells", {b.directions, b.count, b.pitch});
    p.grad_c0 = float_output(grad_c0, "grad_c0", states);
  }
  if (grad_reset_h) p.grad_reset_h = float_output(*grad_reset_h, "grad_reset_h", states);
  if (grad_reset_c) p.grad_reset_c = float_output(*grad_reset_c, "grad_reset_c", states);
  const int64_t index = grad_gates.get_device_index();
  const CurrentDevice guard(static_cast<int32_t>(index));
  const Device device = device_facts(index);
  const ForcedRegime forced = forced_regime(regime);
  launch(b, plan_backward(b.problem(), device, forced), p, grad_gates, device, forced, stream,
         [&](const StepScan& scan) { backward_by_steps(scan, p, w_hh); });
}

ScanProblem scan_problem(int64_t cell, int64_t element_bytes, int64_t hidden, int64_t batch,
                         int64_t directions) {
  STD_TORCH_CHECK(element_bytes == 2 || element_bytes == 4, "element_bytes: expected 2 or 4, got ",
                  element_bytes);
  return {cell_kind(cell), static_cast<int>(element_bytes), hidden, batch, directions};
}

std::string refusal_op(int64_t cell, int64_t element_bytes, int64_t hidden, int64_t batch,
                       int64_t directions, bool training, std::string regime, int64_t device) {
  return plan_refusal(scan_problem(cell, element_bytes, hidden, batch, directions),
                      device_facts(device), training, forced_regime(regime));
}

std::string describe_op(int64_t cell, int64_t element_bytes, int64_t hidden, int64_t batch,
                        int64_t directions, bool training, std::string regime, int64_t device) {
  return describe_plan(scan_problem(cell, element_bytes, hidden, batch, directions),
                       device_facts(device), training, forced_regime(regime));
}

#if defined(FUSED_RNN_EMULATED)
void seed_op(int64_t seed) { emulator::set_seed(static_cast<uint64_t>(seed)); }

void device_op(int64_t capability, int64_t processors, int64_t max_cluster) {
  emulated_device.capability = static_cast<int>(capability);
  emulated_device.processors = static_cast<int>(processors);
  emulated_device.max_cluster = static_cast<int>(max_cluster);
}

void lose_a_cta_op() { emulator::lose_a_cta(); }
#endif

}  // namespace
}  // namespace fused_rnn

#if defined(FUSED_RNN_EMULATED)
#define FUSED_RNN_NAMESPACE fused_rnn_cuda_emulated
#define FUSED_RNN_DISPATCH_KEY CPU
#else
#define FUSED_RNN_NAMESPACE fused_rnn_cuda
#define FUSED_RNN_DISPATCH_KEY CUDA
#endif

// Shapes and dtypes are in params.h. Outputs are written in place. Zero columns in `gates` and
// `cells` mean that they are not saved; gx and gates may be one tensor. `stream` is a cudaStream_t.
// tf32 lets the products of float32 be TF32. `regime` is "" or the name of the one to force.
// `offsets` make rows packed; lengths, offsets and resets are on the tensors' device.
STABLE_TORCH_LIBRARY(FUSED_RNN_NAMESPACE, m) {
  m.def(
      "scan_forward(int cell, Tensor gx, Tensor[] w_hh, Tensor? b_hn, Tensor h0, Tensor? c0, "
      "int hidden_size, Tensor? lengths, Tensor? offsets, Tensor? resets, Tensor? reset_h, "
      "Tensor? reset_c, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) gates, "
      "Tensor(e!) cells, str regime, bool tf32, int stream) -> ()");
  m.def(
      "scan_backward(int cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_cells, Tensor[] w_hh, Tensor h0, Tensor? c0, int hidden_size, Tensor? lengths, "
      "Tensor? offsets, Tensor? resets, "
      "Tensor? reset_h, Tensor? reset_c, Tensor y, Tensor gates, Tensor cells, "
      "Tensor(a!) grad_gates, Tensor(b!) grad_h0, Tensor(c!) grad_c0, Tensor(d!)? grad_reset_h, "
      "Tensor(e!)? grad_reset_c, str regime, bool tf32, int stream) -> ()");
  m.def(
      "refusal(int cell, int element_bytes, int hidden_size, int batch_size, int directions, "
      "bool training, str regime, int device) -> str");
  m.def(
      "describe(int cell, int element_bytes, int hidden_size, int batch_size, int directions, "
      "bool training, str regime, int device) -> str");
#if defined(FUSED_RNN_EMULATED)
  m.def("seed(int seed) -> ()");
  m.def("device(int capability, int processors, int max_cluster) -> ()");
  m.def("lose_a_cta() -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, FUSED_RNN_DISPATCH_KEY, m) {
  m.impl("scan_forward", TORCH_BOX(&fused_rnn::forward_op));
  m.impl("scan_backward", TORCH_BOX(&fused_rnn::backward_op));
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("refusal", TORCH_BOX(&fused_rnn::refusal_op));
  m.impl("describe", TORCH_BOX(&fused_rnn::describe_op));
#if defined(FUSED_RNN_EMULATED)
  m.impl("seed", TORCH_BOX(&fused_rnn::seed_op));
  m.impl("device", TORCH_BOX(&fused_rnn::device_op));
  m.impl("lose_a_cta", TORCH_BOX(&fused_rnn::lose_a_cta_op));
#endif
}
