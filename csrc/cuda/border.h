// The operators' border: every argument is checked here, or is an error that names it, and becomes
// part of a plain struct.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "../plan.h"
#include "../tensor_checks.h"
#include "kernels.h"
#include "params.h"

namespace fused_rnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

#if defined(FUSED_RNN_EMULATED)
inline constexpr const char* kDeviceName = "CPU";
inline bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
#else
inline constexpr const char* kDeviceName = "CUDA";
inline bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }
#endif

inline ElementKind element_kind(ScalarType type, const char* name, bool tf32) {
  switch (type) {
    case ScalarType::BFloat16:
      return ElementKind::bfloat16;
    case ScalarType::Half:
      return ElementKind::float16;
    case ScalarType::Float:
      return tf32 ? ElementKind::tf32 : ElementKind::float32;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype Float, BFloat16 or Half, got ",
                      torch::headeronly::toString(type));
  }
}

inline void check(const Tensor& tensor, const char* name, ScalarType type, Shape shape) {
  STD_TORCH_CHECK(on_device(tensor), name, ": expected a ", kDeviceName, " tensor");
  check_dense(tensor, name, type, shape);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
                  ": expected memory aligned to 16 bytes");
}

inline const void* input(const Tensor& tensor, const char* name, ScalarType type, Shape shape) {
  check(tensor, name, type, shape);
  return tensor.const_data_ptr();
}

inline const void* input(const std::optional<Tensor>& tensor, const char* name, ScalarType type,
                         Shape shape) {
  return tensor ? input(*tensor, name, type, shape) : nullptr;
}

template <class Optional>
const float* float_input(const Optional& tensor, const char* name, Shape shape) {
  return static_cast<const float*>(input(tensor, name, ScalarType::Float, shape));
}

inline void* output(const Tensor& tensor, const char* name, ScalarType type, Shape shape) {
  check(tensor, name, type, shape);
  return tensor.mutable_data_ptr();
}

inline float* float_output(const Tensor& tensor, const char* name, Shape shape) {
  return static_cast<float*>(output(tensor, name, ScalarType::Float, shape));
}

// What both scans have in common.
struct Border {
  const char* name;  // of the tensor whose rows the scan's are
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

inline Border border(int64_t cell, const Tensor& rows, const char* name, int64_t columns,
                     const Tensor& h0, int64_t hidden, bool tf32) {
  Border b{};
  b.name = name;
  b.cell = cell_kind(cell);
  b.sizes = cell_sizes(b.cell);
  b.type = rows.scalar_type();
  b.element = element_kind(b.type, name, tf32);
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

inline ScanRows scan_rows(const Border& b, const RowArguments& given) {
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
    STD_TORCH_CHECK(b.count % b.batch == 0, b.name, ": expected a multiple of the batch size ",
                    b.batch, " as its rows, got ", b.count);
    rows.timesteps = b.count / b.batch;
  }
  STD_TORCH_CHECK(rows.timesteps < int64_t{1} << 31, b.name,
                  ": expected fewer than 2^31 timesteps, got ", rows.timesteps);
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

inline bool wanted(const Tensor& tensor) { return tensor.dim() != 3 || tensor.size(2) > 0; }

// What a layer's forward scan is given, and where it writes.
struct ForwardTensors {
  const Tensor& gx;
  const std::vector<Tensor>& w_hh;
  const std::optional<Tensor>& b_hn;
  const Tensor& h0;
  const std::optional<Tensor>&c0, &reset_h, &reset_c;
  const Tensor &y, &h_n, &c_n, &gates, &cells;
};

inline ForwardParams forward_params(const Border& b, const RowArguments& rows,
                                    const ForwardTensors& t) {
  ForwardParams p{};
  fill(p, b, rows, t.w_hh, t.h0, t.c0, t.reset_h, t.reset_c);
  p.gx = input(t.gx, "gx", b.type, {b.directions, b.count, b.sizes.gates * b.pitch});
  p.b_hn = float_input(t.b_hn, "b_hn", {b.directions, b.pitch});
  p.y = output(t.y, "y", b.type, {b.count, b.directions * b.pitch});
  const Shape states = {b.directions, b.batch, b.pitch};
  p.h_n = output(t.h_n, "h_n", b.type, states);
  if (b.sizes.has_c) p.c_n = float_output(t.c_n, "c_n", states);
  if (wanted(t.gates)) {
    p.gates =
        output(t.gates, "gates", b.type, {b.directions, b.count, b.sizes.saved_gates * b.pitch});
  }
  if (b.sizes.has_c && wanted(t.cells)) {
    p.cells = float_output(t.cells, "cells", {b.directions, b.count, b.pitch});
  }
  return p;
}

struct BackwardTensors {
  const std::optional<Tensor>&grad_y, &grad_h_n, &grad_c_n, &grad_cells;
  const std::vector<Tensor>& w_hh;
  const Tensor& h0;
  const std::optional<Tensor>&c0, &reset_h, &reset_c;
  const Tensor &y, &gates, &cells, &grad_gates, &grad_h0, &grad_c0;
  const std::optional<Tensor>&grad_reset_h, &grad_reset_c;
};

inline BackwardParams backward_params(const Border& b, const RowArguments& rows,
                                      const BackwardTensors& t) {
  BackwardParams p{};
  fill(p, b, rows, t.w_hh, t.h0, t.c0, t.reset_h, t.reset_c);
  const Shape sequence = {b.count, b.directions * b.pitch};
  const Shape states = {b.directions, b.batch, b.pitch};
  p.y = input(t.y, "y", b.type, sequence);
  p.grad_y = input(t.grad_y, "grad_y", b.type, sequence);
  p.grad_h_n = float_input(t.grad_h_n, "grad_h_n", states);
  p.grad_c_n = float_input(t.grad_c_n, "grad_c_n", states);
  if (b.sizes.saved_gates > 0) {
    p.gates =
        input(t.gates, "gates", b.type, {b.directions, b.count, b.sizes.saved_gates * b.pitch});
  }
  p.grad_gates = output(t.grad_gates, "grad_gates", b.type,
                        {b.directions, b.count, b.sizes.grad_gates * b.pitch});
  p.grad_h0 = float_output(t.grad_h0, "grad_h0", states);
  if (b.sizes.has_c) {
    p.grad_cells = float_input(t.grad_cells, "grad_cells", {b.directions, b.count, b.pitch});
    p.cells = float_input(t.cells, "cells", {b.directions, b.count, b.pitch});
    p.grad_c0 = float_output(t.grad_c0, "grad_c0", states);
  }
  if (t.grad_reset_h) p.grad_reset_h = float_output(*t.grad_reset_h, "grad_reset_h", states);
  if (t.grad_reset_c) p.grad_reset_c = float_output(*t.grad_reset_c, "grad_reset_c", states);
  return p;
}

inline constexpr const char* kCellNames[] = {"rnn_tanh", "rnn_relu", "gru", "lstm",
                                             "gru_reset_before"};

// What is launched, in words: for errors and the log.
inline std::string launch_text(const Border& b, const char* pass, const std::string& kernels,
                               int64_t timesteps) {
  const char* type = b.element == ElementKind::tf32 ? "TF32" : torch::headeronly::toString(b.type);
  return std::string(pass) + " of " + kCellNames[static_cast<int>(b.cell)] + " " + type +
         " T=" + std::to_string(timesteps) + " B=" + std::to_string(b.batch) +
         " H=" + std::to_string(b.hidden) + " D=" + std::to_string(b.directions) + ": " + kernels;
}

}  // namespace fused_rnn
