// The table of functions that each instruction set offers to the library.
#pragma once

#include <cstdint>

#include "../scan_params.h"

namespace fused_rnn {

struct ScanKernels {
  const char* name;
  int64_t width;  // floats per vector

  // Packs panels [begin, end) of W_hh for the forward or the backward scan.
  void (*pack_forward)(CellKind cell, const PackParams& params, int64_t begin, int64_t end);
  void (*pack_backward)(CellKind cell, const PackParams& params, int64_t begin, int64_t end);

  // Runs all timesteps of the batch rows in `share`; shares are independent of each other.
  void (*forward)(CellKind cell, const ScanForwardParams& params, const RowShare& share);
  void (*backward)(CellKind cell, const ScanBackwardParams& params, const RowShare& share);
};

// Units per panel in vectors: four columns of a register tile, whether they are the gates of one
// vector of units or, where there is one value per unit, neighbouring vectors of units.
static constexpr int64_t vectors_per_panel(int gates) { return gates == 1 ? 4 : 1; }

extern const ScanKernels portable_kernels;
extern const ScanKernels avx2_kernels;
extern const ScanKernels avx512_kernels;

}  // namespace fused_rnn
