// The CUDA library's border, and that of its emulation on CPU tensors: checks every argument, fills
// the plain structs, launches what the planner says.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../plan.h"
#include "../torch_compat.h"
#include "border.h"
#include "check_cuda.h"
#include "grid_launch.h"
#include "instances.h"
#include "kernels.h"
#include "stack_scan.h"
#include "step_scan.h"

#if defined(FUSED_RNN_EMULATED)
#include "emulator.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fused_rnn {
namespace {

// Throws what the work on the stream ended with. In a graph's capture there is nothing to wait for.
void check_stream([[maybe_unused]] void* stream) {
#if !defined(FUSED_RNN_EMULATED)
  if (!is_captured(stream)) check_cuda(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
#endif
}

// Runs what launches, on the stream; errors, and lines of the log, have what() it is in them.
template <class What, class Launch>
void run_logged(const What& what, void* stream, const Launch& launch) {
  const bool logs = is_logging();
  const char* where = ", in work that was launched before ";
  try {
    if (logs) {
      std::fprintf(stderr, "fused_rnn: %s\n", what().c_str());
      check_stream(stream);
    }
    where = ", in ";
    launch();
    if (logs) check_stream(stream);
  } catch (const std::exception& error) {
    // torch's own headers tell which call failed, and not why.
    std::string why = error.what();
    if (why.find("API call failed at") != std::string::npos) why = said_by_torch(why);
    throw std::runtime_error(why + where + what());
  }
}

#if defined(FUSED_RNN_EMULATED)

// As an H100, but with so few SMs that a handful of rows fills them.
Device emulated_device{90, 6, 227 << 10, 16};
Device device_facts(int64_t) { return emulated_device; }

struct CurrentDevice {
  explicit CurrentDevice(int64_t) {}
};

#else

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
  int is_shared = 0;  // older drivers do not know the question
  if (cudaDeviceGetAttribute(&is_shared, cudaDevAttrMpsEnabled, device) != cudaSuccess) {
    cudaGetLastError();
  }
  facts.is_shared = is_shared != 0;
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

ForcedRegime forced_regime(const std::string& name) {
  try {
    return regime_called(name);
  } catch (const std::invalid_argument& error) {
    STD_TORCH_CHECK(false, error.what());
  }
}

template <class Params>
constexpr const char* kPass = std::is_same_v<Params, ForwardParams> ? "forward" : "backward";

template <class Params>
const Kernel<Params>& kernel_at(const Border& b, int index) {
  const Kernel<Params>* kernels = find_kernels<Params>(b.cell, b.element);
  STD_TORCH_CHECK(kernels != nullptr, "cell: rnn_relu runs in float32 only");
  return kernels[index];
}

// `by_steps` is called where the plan is to run step by step; `like` is a tensor on the device.
template <class Params, class Tile, class BySteps>
void launch(const Border& b, const Plan<Tile>& plan, const Params& params, const Tensor& like,
            const Device& device, ForcedRegime forced, bool graph, int64_t stream,
            const BySteps& by_steps) {
  constexpr bool kTraining = !std::is_same_v<Params, ForwardParams>;
  STD_TORCH_CHECK(plan.regime != Regime::none,
                  "hidden_size: ", plan_refusal(b.problem(), device, kTraining, forced));
  void* on = reinterpret_cast<void*>(stream);
  const auto what = [&] {
    return launch_text(b, kPass<Params>, describe_plan(b.problem(), device, kTraining, forced),
                       params.rows.timesteps);
  };
  run_logged(what, on, [&] {
    if (plan.regime == Regime::steps) {
      by_steps(StepScan{b.cell, b.element, plan.shape, on, like.get_device_index(), graph});
      return;
    }
    const auto& kernel = kernel_at<Params>(b, plan.index);
    if (plan.regime == Regime::grid) {
      launch_over_grid(kernel, plan, params, like, like.get_device_index(), on);
    } else {
      kernel.launch(params, plan.shape, on);
    }
  });
}

void forward_op(int64_t cell, const Tensor& gx, std::vector<Tensor> w_hh,
                std::optional<Tensor> b_hn, const Tensor& h0, std::optional<Tensor> c0,
                int64_t hidden, std::optional<Tensor> lengths, std::optional<Tensor> offsets,
                std::optional<Tensor> resets, std::optional<Tensor> reset_h,
                std::optional<Tensor> reset_c, Tensor y, Tensor h_n, Tensor c_n, Tensor gates,
                Tensor cells, std::string regime, bool tf32, bool graph, int64_t stream) {
  const Border b = border(cell, gx, "gx", cell_sizes(cell_kind(cell)).gates, h0, hidden, tf32);
  const ForwardParams p =
      forward_params(b, {lengths, offsets, resets},
                     {gx, w_hh, b_hn, h0, c0, reset_h, reset_c, y, h_n, c_n, gates, cells});
  const int64_t index = gx.get_device_index();
  const CurrentDevice guard(static_cast<int32_t>(index));
  const Device device = device_facts(index);
  const ForcedRegime forced = forced_regime(regime);
  launch(b, plan_forward(b.problem(), device, forced), p, gx, device, forced, graph, stream,
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
                 std::string regime, bool tf32, bool graph, int64_t stream) {
  const Border b = border(cell, grad_gates, "grad_gates", cell_sizes(cell_kind(cell)).grad_gates,
                          h0, hidden, tf32);
  const BackwardParams p =
      backward_params(b, {lengths, offsets, resets},
                      {grad_y, grad_h_n, grad_c_n, grad_cells, w_hh, h0, c0, reset_h, reset_c, y,
                       gates, cells, grad_gates, grad_h0, grad_c0, grad_reset_h, grad_reset_c});
  const int64_t index = grad_gates.get_device_index();
  const CurrentDevice guard(static_cast<int32_t>(index));
  const Device device = device_facts(index);
  const ForcedRegime forced = forced_regime(regime);
  launch(b, plan_backward(b.problem(), device, forced), p, grad_gates, device, forced, graph,
         stream, [&](const StepScan& scan) { backward_by_steps(scan, p, w_hh); });
}

// One layer's part of a tensor of all layers; [1, ...].
Tensor of_layer(const Tensor& all, size_t layer) {
  Tensor tensor = all;
  return torch::stable::narrow(tensor, 0, static_cast<int64_t>(layer), 1);
}

std::optional<Tensor> of_layer(const std::optional<Tensor>& all, size_t layer) {
  if (!all) return {};
  return of_layer(*all, layer);
}

Tensor as_matrix(const Tensor& one) { return torch::stable::select(one, 0, 0); }

void check_count(const std::vector<Tensor>& tensors, const char* name, size_t count) {
  STD_TORCH_CHECK(tensors.size() == count, name, ": expected ", count, " tensors, got ",
                  tensors.size());
}

// What both passes of a stack have in common. `first` is its first layer.
StackScan stack_scan(const Border& first, size_t layers, const std::vector<Tensor>& w_ih,
                     std::vector<Tensor> kept, double scale, int64_t chunk, int64_t stream,
                     std::vector<int64_t> layer_streams) {
  STD_TORCH_CHECK(chunk > 0, "chunk: expected at least one timestep, got ", chunk);
  STD_TORCH_CHECK(layer_streams.size() == layers, "layer_streams: expected ", layers, ", got ",
                  layer_streams.size());
  check_count(w_ih, "w_ih", layers);
  for (size_t l = 0; l < layers; l++) {
    const int64_t columns = l > 0 || w_ih[0].dim() != 2 ? first.pitch : w_ih[0].size(1);
    check_dense(w_ih[l], "w_ih", first.type, {first.sizes.gates * first.pitch, columns});
  }
  if (!kept.empty()) check_count(kept, "kept", layers - 1);
  for (const Tensor& mask : kept) {
    check_dense(mask, "kept", ScalarType::Bool, {first.count, first.pitch});
  }
  return {first.cell,
          first.type == ScalarType::Float ? 4 : 2,
          chunk,
          stream,
          std::move(layer_streams),
          std::move(kept),
          scale};
}

// Of a stack whose chunk is the whole sequence, no two layers run side by side.
template <class Params, class Tile, class Run>
void launch_stack(const Border& b, const StackScan& scan, const Device& device, ForcedRegime forced,
                  const Plan<Tile>& plan, int64_t timesteps, const Run& run) {
  const auto layers = static_cast<int64_t>(scan.layer_streams.size());
  constexpr bool kTraining = !std::is_same_v<Params, ForwardParams>;
  const std::string reason =
      stack_refusal({b.problem(), layers, timesteps, kTraining}, device, forced);
  STD_TORCH_CHECK(reason.empty(), "stack of layers: ", reason);
  const auto what = [&] {
    return launch_text(b, kPass<Params>,
                       describe_plan(b.problem(), device, kTraining, forced, {layers, layers}),
                       timesteps) +
           "; " + std::to_string(layers) + " layers in chunks of " + std::to_string(scan.chunk);
  };
  run_logged(what, reinterpret_cast<void*>(scan.stream),
             [&] { run(kernel_at<Params>(b, plan.index), plan.shape); });
}

int64_t layers_at_once(const StackScan& scan, int64_t timesteps) {
  return scan.chunk < timesteps ? static_cast<int64_t>(scan.layer_streams.size()) : 1;
}

void stack_forward_op(int64_t cell, const Tensor& x, std::vector<Tensor> w_ih,
                      std::vector<Tensor> biases, std::vector<Tensor> w_hh,
                      std::optional<Tensor> b_hn, const Tensor& h0, std::optional<Tensor> c0,
                      std::vector<Tensor> kept, double scale, int64_t chunk, std::vector<Tensor> gx,
                      std::vector<Tensor> ys, Tensor h_n, Tensor c_n, std::vector<Tensor> gates,
                      std::vector<Tensor> cells, std::string regime, bool tf32, int64_t stream,
                      std::vector<int64_t> layer_streams) {
  const size_t layers = w_hh.size();
  STD_TORCH_CHECK(layers > 0, "w_hh: expected a matrix for each layer, got none");
  check_count(gx, "gx", layers);
  check_count(ys, "ys", layers);
  check_count(gates, "gates", layers);
  check_count(cells, "cells", layers);
  const int64_t hidden = w_hh[0].size(w_hh[0].dim() - 1);
  const Border b =
      border(cell, gx[0], "gx", cell_sizes(cell_kind(cell)).gates, of_layer(h0, 0), hidden, tf32);
  const StackScan scan =
      stack_scan(b, layers, w_ih, std::move(kept), scale, chunk, stream, std::move(layer_streams));
  if (!biases.empty()) check_count(biases, "biases", layers);
  for (const Tensor& bias : biases) {
    check_dense(bias, "biases", b.type, {b.sizes.gates * b.pitch});
  }
  check_dense(x, "x", b.type, {b.count, w_ih[0].size(1)});
  ForwardStack stack{{}, {x}, w_ih, biases, {}};
  for (size_t l = 0; l < layers; l++) {
    stack.layers.push_back(forward_params(b, {{}, {}, {}},
                                          {gx[l],
                                           {w_hh[l]},
                                           of_layer(b_hn, l),
                                           of_layer(h0, l),
                                           of_layer(c0, l),
                                           {},
                                           {},
                                           ys[l],
                                           of_layer(h_n, l),
                                           b.sizes.has_c ? of_layer(c_n, l) : c_n,
                                           gates[l],
                                           cells[l]}));
    if (b.cell == CellKind::gru) {
      stack.layers[l].c_n = float_output(of_layer(c_n, l), "c_n", {1, b.batch, b.pitch});
    }
    stack.gx.push_back(as_matrix(gx[l]));
    if (l + 1 < layers) stack.inputs.push_back(ys[l]);
  }
  const int64_t timesteps = stack.layers[0].rows.timesteps;
  const int64_t index = x.get_device_index();
  const CurrentDevice guard(static_cast<int32_t>(index));
  const Device device = device_facts(index);
  const ForcedRegime forced = forced_regime(regime);
  const auto plan = plan_forward(b.problem(), device, forced, layers_at_once(scan, timesteps));
  launch_stack<ForwardParams>(
      b, scan, device, forced, plan, timesteps,
      [&](const auto& kernel, const auto& shape) { run_forward(scan, stack, kernel, shape); });
}

void stack_backward_op(int64_t cell, std::optional<Tensor> grad_y, std::optional<Tensor> grad_h_n,
                       std::optional<Tensor> grad_c_n, std::vector<Tensor> w_ih,
                       std::vector<Tensor> w_hh, const Tensor& h0, std::optional<Tensor> c0,
                       std::vector<Tensor> kept, double scale, int64_t chunk,
                       std::vector<Tensor> ys, std::vector<Tensor> gates, std::vector<Tensor> cells,
                       std::vector<Tensor> grad_ys, std::vector<Tensor> grad_gates, Tensor grad_h0,
                       Tensor grad_c0, std::string regime, bool tf32, int64_t stream,
                       std::vector<int64_t> layer_streams) {
  const size_t layers = w_hh.size();
  STD_TORCH_CHECK(layers > 0, "w_hh: expected a matrix for each layer, got none");
  check_count(ys, "ys", layers);
  check_count(gates, "gates", layers);
  check_count(cells, "cells", layers);
  check_count(grad_ys, "grad_ys", layers - 1);
  check_count(grad_gates, "grad_gates", layers);
  const int64_t hidden = w_hh[0].size(w_hh[0].dim() - 1);
  const Border b = border(cell, grad_gates[0], "grad_gates", cell_sizes(cell_kind(cell)).grad_gates,
                          of_layer(h0, 0), hidden, tf32);
  const StackScan scan =
      stack_scan(b, layers, w_ih, std::move(kept), scale, chunk, stream, std::move(layer_streams));
  BackwardStack stack{{}, w_ih, {}, grad_ys};
  for (size_t l = 0; l < layers; l++) {
    const std::optional<Tensor> from_above = l + 1 < layers ? grad_ys[l] : grad_y;
    stack.layers.push_back(backward_params(b, {{}, {}, {}},
                                           {from_above,
                                            of_layer(grad_h_n, l),
                                            of_layer(grad_c_n, l),
                                            {},
                                            {w_hh[l]},
                                            of_layer(h0, l),
                                            of_layer(c0, l),
                                            {},
                                            {},
                                            ys[l],
                                            gates[l],
                                            cells[l],
                                            grad_gates[l],
                                            of_layer(grad_h0, l),
                                            b.sizes.has_c ? of_layer(grad_c0, l) : grad_c0,
                                            {},
                                            {}}));
    stack.grad_gates.push_back(as_matrix(grad_gates[l]));
  }
  const int64_t timesteps = stack.layers[0].rows.timesteps;
  const int64_t index = h0.get_device_index();
  const CurrentDevice guard(static_cast<int32_t>(index));
  const Device device = device_facts(index);
  const ForcedRegime forced = forced_regime(regime);
  const auto plan = plan_backward(b.problem(), device, forced, layers_at_once(scan, timesteps));
  launch_stack<BackwardParams>(
      b, scan, device, forced, plan, timesteps,
      [&](const auto& kernel, const auto& shape) { run_backward(scan, stack, kernel, shape); });
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
                        int64_t directions, bool training, std::string regime, int64_t device,
                        int64_t forward_layers, int64_t backward_layers) {
  return describe_plan(scan_problem(cell, element_bytes, hidden, batch, directions),
                       device_facts(device), training, forced_regime(regime),
                       {forward_layers, backward_layers});
}

StackProblem stack_problem(int64_t cell, int64_t element_bytes, int64_t hidden, int64_t batch,
                           int64_t directions, bool training, int64_t layers, int64_t timesteps) {
  return {scan_problem(cell, element_bytes, hidden, batch, directions), layers, timesteps,
          training};
}

std::string stack_refusal_op(int64_t cell, int64_t element_bytes, int64_t hidden, int64_t batch,
                             int64_t directions, bool training, std::string regime, int64_t device,
                             int64_t layers, int64_t timesteps) {
  const auto stack =
      stack_problem(cell, element_bytes, hidden, batch, directions, training, layers, timesteps);
  return stack_refusal(stack, device_facts(device), forced_regime(regime));
}

std::vector<int64_t> stack_chunks_op(int64_t cell, int64_t element_bytes, int64_t hidden,
                                     int64_t batch, int64_t directions, bool training,
                                     std::string regime, int64_t device, int64_t layers,
                                     int64_t timesteps) {
  const auto stack =
      stack_problem(cell, element_bytes, hidden, batch, directions, training, layers, timesteps);
  const StackPlan plan = plan_stack(stack, device_facts(device), forced_regime(regime));
  return {plan.forward, plan.backward};
}

#if defined(FUSED_RNN_EMULATED)
void seed_op(int64_t seed) { emulator::set_seed(static_cast<uint64_t>(seed)); }

void device_op(int64_t capability, int64_t processors, int64_t max_cluster, bool is_shared) {
  emulated_device.is_shared = is_shared;
  emulated_device.capability = static_cast<int>(capability);
  emulated_device.processors = static_cast<int>(processors);
  emulated_device.max_cluster = static_cast<int>(max_cluster);
}

void lose_a_cta_op() { emulator::lose_a_cta(); }
void delay_a_cta_op(int64_t rounds) { emulator::delay_a_cta(rounds); }
void fail_to_record_op() { emulator::fail_to_record(); }
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

// Torch 2.10 makes strings of the arguments as they stand: these are replaced before.
#define FUSED_RNN_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define FUSED_RNN_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

// Shapes and dtypes are in params.h. Outputs are written in place. Zero columns in `gates` and
// `cells` mean that they are not saved; gx and gates may be one tensor. `stream` is a cudaStream_t.
// tf32 lets the products of float32 be TF32; `graph` lets a scan step by step record a CUDA graph.
// `regime` is "" or the name of the one to force. `offsets` make rows packed; lengths, offsets and
// resets are on the tensors' device.
FUSED_RNN_LIBRARY(FUSED_RNN_NAMESPACE, m) {
  m.def(
      "scan_forward(int cell, Tensor gx, Tensor[] w_hh, Tensor? b_hn, Tensor h0, Tensor? c0, "
      "int hidden_size, Tensor? lengths, Tensor? offsets, Tensor? resets, Tensor? reset_h, "
      "Tensor? reset_c, Tensor(a!) y, Tensor(b!) h_n, Tensor(c!) c_n, Tensor(d!) gates, "
      "Tensor(e!) cells, str regime, bool tf32, bool graph, int stream) -> ()");
  m.def(
      "scan_backward(int cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_cells, Tensor[] w_hh, Tensor h0, Tensor? c0, int hidden_size, Tensor? lengths, "
      "Tensor? offsets, Tensor? resets, "
      "Tensor? reset_h, Tensor? reset_c, Tensor y, Tensor gates, Tensor cells, "
      "Tensor(a!) grad_gates, Tensor(b!) grad_h0, Tensor(c!) grad_c0, Tensor(d!)? grad_reset_h, "
      "Tensor(e!)? grad_reset_c, str regime, bool tf32, bool graph, int stream) -> ()");
  m.def(
      "refusal(int cell, int element_bytes, int hidden_size, int batch_size, int directions, "
      "bool training, str regime, int device) -> str");
  m.def(
      "describe(int cell, int element_bytes, int hidden_size, int batch_size, int directions, "
      "bool training, str regime, int device, int forward_layers=1, int backward_layers=1) -> str");
  // A stack of layers whose chunks of time run side by side; see stack_scan.h. b_hn, states and
  // their gradients are of all layers; c_n is also for GRU, h before it is rounded. `layer_streams`
  // are cudaStream_t's, one for each layer.
  m.def(
      "stack_forward(int cell, Tensor x, Tensor[] w_ih, Tensor[] biases, Tensor[] w_hh, "
      "Tensor? b_hn, Tensor h0, Tensor? c0, Tensor[] kept, float scale, int chunk, "
      "Tensor(a!)[] gx, Tensor(b!)[] ys, Tensor(c!) h_n, Tensor(d!) c_n, Tensor(e!)[] gates, "
      "Tensor(f!)[] cells, str regime, bool tf32, int stream, int[] layer_streams) -> ()");
  m.def(
      "stack_backward(int cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor[] w_ih, "
      "Tensor[] w_hh, Tensor h0, Tensor? c0, Tensor[] kept, float scale, int chunk, Tensor[] ys, "
      "Tensor[] gates, Tensor[] cells, Tensor(a!)[] grad_ys, Tensor(b!)[] grad_gates, "
      "Tensor(c!) grad_h0, Tensor(d!) grad_c0, str regime, bool tf32, int stream, "
      "int[] layer_streams) -> ()");
  m.def(
      "stack_refusal(int cell, int element_bytes, int hidden_size, int batch_size, "
      "int directions, bool training, str regime, int device, int layers, int timesteps) -> str");
  m.def(
      "stack_chunks(int cell, int element_bytes, int hidden_size, int batch_size, "
      "int directions, bool training, str regime, int device, int layers, int timesteps) -> int[]");
#if defined(FUSED_RNN_EMULATED)
  m.def("seed(int seed) -> ()");
  m.def("device(int capability, int processors, int max_cluster, bool is_shared=False) -> ()");
  m.def("lose_a_cta() -> ()");
  m.def("delay_a_cta(int rounds) -> ()");
  m.def("fail_to_record() -> ()");
#endif
}

FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, FUSED_RNN_DISPATCH_KEY, m) {
  m.impl("scan_forward", TORCH_BOX(&fused_rnn::forward_op));
  m.impl("scan_backward", TORCH_BOX(&fused_rnn::backward_op));
  m.impl("stack_forward", TORCH_BOX(&fused_rnn::stack_forward_op));
  m.impl("stack_backward", TORCH_BOX(&fused_rnn::stack_backward_op));
}

FUSED_RNN_LIBRARY_IMPL(FUSED_RNN_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("refusal", TORCH_BOX(&fused_rnn::refusal_op));
  m.impl("describe", TORCH_BOX(&fused_rnn::describe_op));
  m.impl("stack_refusal", TORCH_BOX(&fused_rnn::stack_refusal_op));
  m.impl("stack_chunks", TORCH_BOX(&fused_rnn::stack_chunks_op));
#if defined(FUSED_RNN_EMULATED)
  m.impl("seed", TORCH_BOX(&fused_rnn::seed_op));
  m.impl("device", TORCH_BOX(&fused_rnn::device_op));
  m.impl("lose_a_cta", TORCH_BOX(&fused_rnn::lose_a_cta_op));
  m.impl("delay_a_cta", TORCH_BOX(&fused_rnn::delay_a_cta_op));
  m.impl("fail_to_record", TORCH_BOX(&fused_rnn::fail_to_record_op));
#endif
}
