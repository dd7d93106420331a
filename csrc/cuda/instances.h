// The kernels there are: one line, one tile, one kernel for each element type of its size.
//
// Of the tiles that are large enough for a layer the planner takes those with the least `hidden`,
// those of a cluster before those of the grid, and of these the first that the device can run;
// then, by the batch, among those that differ from it only in row_blocks. So the order of sums
// depends on cell, hidden_size, dtype and device alone.
#pragma once

#include <array>

#include "tiles.h"

namespace fused_rnn {

#if defined(FUSED_RNN_EMULATED)

// Small ones for emulation, in which every thread costs: with and without clusters, of several row
// blocks, split sums, odd numbers of gate groups, weights in registers, in shared memory and both.
// ForwardTile: hidden, cluster, row_blocks, unit_groups, split_k, register_steps, ring, grid.
inline constexpr std::array kLstmForward2 = {
    ForwardTile{16, 1, 1, 1, 1, 1, 2},       ForwardTile{32, 2, 1, 1, 2, 0, 4},
    ForwardTile{32, 2, 2, 1, 2, 0, 4},       ForwardTile{64, 4, 1, 2, 1, 3, 2},
    ForwardTile{32, 2, 1, 1, 2, 1, 2, true}, ForwardTile{32, 2, 2, 1, 2, 1, 2, true},
    ForwardTile{96, 3, 1, 2, 2, 2, 2, true},
};
inline constexpr std::array kGruForward2 = {
    ForwardTile{16, 1, 1, 2, 1, 1, 2},       ForwardTile{32, 2, 1, 1, 2, 1, 4},
    ForwardTile{32, 2, 2, 1, 2, 1, 4},       ForwardTile{64, 4, 1, 2, 1, 3, 2},
    ForwardTile{32, 2, 1, 2, 2, 0, 2, true}, ForwardTile{32, 2, 2, 2, 2, 0, 2, true},
    ForwardTile{96, 3, 1, 2, 2, 2, 2, true},
};
inline constexpr std::array kRnnForward2 = {
    ForwardTile{16, 1, 1, 2, 1, 1, 2},       ForwardTile{32, 2, 1, 1, 2, 1, 4},
    ForwardTile{32, 2, 2, 1, 2, 1, 4},       ForwardTile{64, 4, 1, 2, 1, 3, 2},
    ForwardTile{32, 2, 1, 1, 1, 1, 2, true}, ForwardTile{32, 2, 2, 1, 1, 1, 2, true},
    ForwardTile{96, 3, 1, 2, 2, 2, 2, true},
};
inline constexpr std::array kLstmForward4 = {
    ForwardTile{16, 1, 1, 1, 1, 1, 2},       ForwardTile{32, 2, 1, 1, 2, 1, 4},
    ForwardTile{32, 2, 2, 1, 2, 1, 4},       ForwardTile{64, 4, 1, 2, 1, 5, 2},
    ForwardTile{32, 2, 1, 1, 2, 1, 2, true}, ForwardTile{32, 2, 2, 1, 2, 1, 2, true},
    ForwardTile{96, 3, 1, 2, 2, 4, 2, true},
};
inline constexpr std::array kGruForward4 = kLstmForward4;
inline constexpr std::array kRnnForward4 = kLstmForward4;

// BackwardTile: hidden, cluster, row_blocks, warps, register_steps, ring, grid.
inline constexpr std::array kLstmBackward2 = {
    BackwardTile{16, 1, 1, 1, 4, 2},       BackwardTile{32, 2, 1, 2, 3, 4},
    BackwardTile{32, 2, 2, 2, 3, 4},       BackwardTile{64, 4, 1, 2, 0, 2},
    BackwardTile{32, 2, 1, 2, 1, 2, true}, BackwardTile{32, 2, 2, 2, 1, 2, true},
    BackwardTile{96, 3, 1, 2, 4, 2, true},
};
inline constexpr std::array kGruBackward2 = {
    BackwardTile{16, 1, 1, 1, 3, 2},       BackwardTile{32, 2, 1, 2, 1, 4},
    BackwardTile{32, 2, 2, 2, 1, 4},       BackwardTile{64, 8, 1, 2, 0, 2},
    BackwardTile{32, 2, 1, 2, 2, 2, true}, BackwardTile{32, 2, 2, 2, 2, 2, true},
    BackwardTile{96, 3, 1, 2, 0, 2, true},
};
inline constexpr std::array kRnnBackward2 = {
    BackwardTile{16, 1, 1, 1, 1, 2},       BackwardTile{32, 2, 1, 2, 1, 4},
    BackwardTile{32, 2, 2, 2, 1, 4},       BackwardTile{64, 4, 1, 2, 0, 2},
    BackwardTile{32, 2, 1, 2, 1, 2, true}, BackwardTile{32, 2, 2, 2, 1, 2, true},
    BackwardTile{96, 3, 1, 2, 1, 2, true},
};
inline constexpr std::array kLstmBackward4 = {
    BackwardTile{16, 1, 1, 1, 5, 2},       BackwardTile{32, 2, 1, 2, 8, 4},
    BackwardTile{32, 2, 2, 2, 8, 4},       BackwardTile{64, 4, 1, 2, 0, 2},
    BackwardTile{32, 2, 1, 2, 3, 2, true}, BackwardTile{32, 2, 2, 2, 3, 2, true},
    BackwardTile{96, 3, 1, 2, 8, 2, true},
};
inline constexpr std::array kGruBackward4 = {
    BackwardTile{16, 1, 1, 1, 5, 2},       BackwardTile{32, 2, 1, 2, 6, 4},
    BackwardTile{32, 2, 2, 2, 6, 4},       BackwardTile{64, 8, 1, 2, 0, 2},
    BackwardTile{32, 2, 1, 2, 0, 2, true}, BackwardTile{32, 2, 2, 2, 0, 2, true},
    BackwardTile{96, 3, 1, 2, 8, 2, true},
};
inline constexpr std::array kRnnBackward4 = {
    BackwardTile{16, 1, 1, 1, 2, 2},       BackwardTile{32, 2, 1, 2, 1, 4},
    BackwardTile{32, 2, 2, 2, 1, 4},       BackwardTile{64, 4, 1, 2, 0, 2},
    BackwardTile{32, 2, 1, 2, 2, 2, true}, BackwardTile{32, 2, 2, 2, 2, 2, true},
    BackwardTile{96, 3, 1, 2, 4, 2, true},
};

#else

// ForwardTile: hidden, cluster, row_blocks, unit_groups, split_k, register_steps, ring, grid.
inline constexpr std::array kLstmForward2 = {
    ForwardTile{64, 1, 1, 1, 1, 4, 4},
    ForwardTile{64, 1, 2, 1, 1, 4, 4},
    ForwardTile{64, 1, 4, 1, 1, 4, 4},
    ForwardTile{128, 1, 1, 2, 1, 8, 4},
    ForwardTile{128, 1, 2, 2, 1, 7, 4},
    ForwardTile{256, 4, 1, 1, 1, 16, 4},
    ForwardTile{256, 4, 2, 1, 1, 16, 4},
    ForwardTile{384, 8, 1, 1, 1, 18, 4},
    ForwardTile{384, 8, 2, 1, 1, 19, 4},
    ForwardTile{512, 16, 1, 1, 2, 16, 4},
    ForwardTile{512, 16, 2, 1, 2, 16, 4},
    ForwardTile{512, 8, 1, 1, 1, 20, 4},
    ForwardTile{640, 16, 1, 1, 2, 12, 4},
    ForwardTile{768, 16, 1, 1, 2, 12, 4},
    ForwardTile{512, 32, 1, 1, 4, 8, 4, true},
    ForwardTile{1024, 64, 1, 1, 4, 16, 4, true},
    ForwardTile{1024, 64, 4, 1, 4, 8, 2, true},
    ForwardTile{1536, 96, 1, 1, 4, 17, 4, true},
    ForwardTile{2048, 128, 1, 1, 4, 16, 4, true},
    ForwardTile{2112, 132, 1, 1, 4, 16, 4, true},
    ForwardTile{2304, 144, 1, 1, 4, 16, 4, true},
};
inline constexpr std::array kGruForward2 = {
    ForwardTile{64, 1, 1, 2, 2, 2, 4},
    ForwardTile{64, 1, 2, 2, 2, 2, 4},
    ForwardTile{128, 1, 1, 2, 1, 8, 4},
    ForwardTile{128, 1, 2, 2, 1, 8, 4},
    ForwardTile{256, 4, 1, 2, 2, 8, 4},
    ForwardTile{256, 4, 2, 2, 2, 7, 4},
    ForwardTile{384, 8, 1, 2, 4, 3, 4},
    ForwardTile{512, 16, 1, 2, 4, 8, 4},
    ForwardTile{512, 16, 2, 2, 4, 7, 4},
    ForwardTile{640, 16, 1, 1, 2, 6, 4},
    ForwardTile{768, 16, 1, 2, 4, 7, 4},
    ForwardTile{512, 32, 1, 2, 8, 4, 4, true},
    ForwardTile{1024, 64, 1, 2, 8, 8, 4, true},
    ForwardTile{1536, 96, 1, 2, 8, 10, 4, true},
    ForwardTile{2048, 128, 1, 2, 8, 10, 4, true},
};
inline constexpr std::array kRnnForward2 = {
    ForwardTile{64, 1, 1, 2, 1, 4, 4},           ForwardTile{64, 1, 4, 2, 1, 4, 4},
    ForwardTile{128, 1, 1, 2, 1, 8, 4},          ForwardTile{128, 1, 2, 2, 1, 8, 4},
    ForwardTile{256, 1, 1, 4, 1, 16, 4},         ForwardTile{256, 1, 2, 4, 1, 14, 4},
    ForwardTile{512, 4, 1, 2, 1, 32, 4},         ForwardTile{512, 4, 2, 2, 1, 32, 4},
    ForwardTile{1024, 16, 1, 2, 2, 32, 4},       ForwardTile{1024, 32, 1, 4, 8, 8, 4, true},
    ForwardTile{2048, 64, 1, 4, 8, 16, 4, true},
};
inline constexpr std::array kLstmForward4 = {
    ForwardTile{64, 1, 1, 1, 1, 8, 4},
    ForwardTile{64, 1, 2, 1, 1, 8, 4},
    ForwardTile{128, 2, 1, 1, 1, 16, 4},
    ForwardTile{256, 8, 1, 1, 2, 16, 4},
    ForwardTile{384, 16, 1, 1, 2, 14, 4},
    ForwardTile{512, 16, 1, 1, 2, 14, 4},
    ForwardTile{512, 64, 1, 1, 8, 8, 4, true},
    ForwardTile{768, 96, 1, 1, 8, 12, 4, true},
    ForwardTile{1024, 128, 1, 1, 8, 16, 4, true},
};
inline constexpr std::array kGruForward4 = kLstmForward4;
inline constexpr std::array kRnnForward4 = {
    ForwardTile{64, 1, 1, 2, 1, 8, 4},
    ForwardTile{64, 1, 2, 2, 1, 8, 4},
    ForwardTile{128, 1, 1, 2, 1, 16, 4},
    ForwardTile{256, 2, 1, 2, 1, 32, 4},
    ForwardTile{512, 8, 1, 2, 2, 32, 4},
    ForwardTile{768, 16, 1, 2, 2, 32, 4},
    ForwardTile{1024, 16, 1, 2, 2, 32, 2},
    ForwardTile{1024, 64, 1, 2, 8, 16, 4, true},
    ForwardTile{2048, 128, 1, 2, 8, 32, 4, true},
};

// BackwardTile: hidden, cluster, row_blocks, warps, register_steps, ring, grid.
inline constexpr std::array kLstmBackward2 = {
    BackwardTile{64, 1, 1, 4, 16, 4},           BackwardTile{64, 1, 2, 4, 12, 4},
    BackwardTile{128, 1, 1, 8, 32, 4},          BackwardTile{128, 1, 2, 8, 18, 2},
    BackwardTile{256, 4, 1, 8, 16, 4},          BackwardTile{256, 4, 2, 8, 14, 4},
    BackwardTile{384, 8, 1, 8, 12, 4},          BackwardTile{384, 8, 2, 8, 9, 4},
    BackwardTile{512, 16, 1, 8, 8, 4},          BackwardTile{512, 16, 2, 8, 8, 4},
    BackwardTile{512, 8, 1, 8, 10, 4},          BackwardTile{640, 16, 1, 8, 7, 4},
    BackwardTile{768, 16, 1, 8, 6, 4},          BackwardTile{512, 32, 1, 8, 16, 4, true},
    BackwardTile{1024, 64, 1, 8, 30, 4, true},  BackwardTile{1024, 64, 4, 8, 18, 2, true},
    BackwardTile{1536, 96, 1, 8, 31, 2, true},  BackwardTile{2048, 128, 1, 8, 30, 4, true},
    BackwardTile{2112, 132, 1, 8, 30, 4, true}, BackwardTile{2304, 144, 1, 8, 32, 4, true},
};
inline constexpr std::array kGruBackward2 = {
    BackwardTile{64, 1, 1, 4, 12, 4},           BackwardTile{64, 1, 2, 4, 12, 4},
    BackwardTile{128, 1, 1, 8, 24, 4},          BackwardTile{128, 1, 2, 8, 24, 4},
    BackwardTile{256, 4, 1, 8, 12, 4},          BackwardTile{256, 4, 2, 8, 12, 4},
    BackwardTile{384, 8, 1, 8, 9, 4},           BackwardTile{512, 16, 1, 8, 6, 4},
    BackwardTile{512, 16, 2, 8, 6, 4},          BackwardTile{640, 16, 1, 8, 6, 4},
    BackwardTile{768, 16, 1, 8, 5, 4},          BackwardTile{512, 32, 1, 8, 12, 4, true},
    BackwardTile{1024, 64, 1, 8, 24, 4, true},  BackwardTile{1536, 96, 1, 8, 32, 4, true},
    BackwardTile{2048, 128, 1, 8, 32, 4, true},
};
inline constexpr std::array kRnnBackward2 = {
    BackwardTile{64, 1, 1, 4, 4, 4},           BackwardTile{64, 1, 2, 4, 4, 4},
    BackwardTile{128, 1, 1, 8, 8, 4},          BackwardTile{128, 1, 2, 8, 8, 4},
    BackwardTile{256, 1, 1, 8, 16, 4},         BackwardTile{256, 1, 2, 8, 16, 4},
    BackwardTile{512, 4, 1, 8, 8, 4},          BackwardTile{512, 4, 2, 8, 8, 4},
    BackwardTile{1024, 16, 1, 8, 4, 4},        BackwardTile{1024, 32, 1, 8, 8, 4, true},
    BackwardTile{2048, 64, 1, 8, 16, 4, true},
};
inline constexpr std::array kLstmBackward4 = {
    BackwardTile{64, 1, 1, 4, 20, 4},         BackwardTile{64, 1, 2, 4, 19, 2},
    BackwardTile{128, 2, 1, 8, 24, 4},        BackwardTile{256, 8, 1, 8, 12, 4},
    BackwardTile{384, 16, 1, 8, 8, 4},        BackwardTile{512, 32, 1, 8, 24, 4, true},
    BackwardTile{768, 48, 1, 8, 24, 4, true}, BackwardTile{1024, 64, 1, 8, 24, 2, true},
};
inline constexpr std::array kGruBackward4 = {
    BackwardTile{64, 1, 1, 4, 20, 4},          BackwardTile{64, 1, 2, 4, 20, 2},
    BackwardTile{128, 2, 1, 8, 24, 4},         BackwardTile{256, 8, 1, 8, 12, 4},
    BackwardTile{384, 16, 1, 8, 7, 4},         BackwardTile{512, 16, 1, 8, 6, 2},
    BackwardTile{512, 32, 1, 8, 24, 4, true},  BackwardTile{768, 48, 1, 8, 24, 4, true},
    BackwardTile{1024, 64, 1, 8, 24, 2, true},
};
inline constexpr std::array kRnnBackward4 = {
    BackwardTile{64, 1, 1, 4, 8, 4},           BackwardTile{64, 1, 2, 4, 8, 4},
    BackwardTile{128, 1, 1, 8, 16, 4},         BackwardTile{256, 2, 1, 8, 12, 4},
    BackwardTile{512, 8, 1, 8, 6, 4},          BackwardTile{768, 16, 1, 8, 2, 2},
    BackwardTile{1024, 64, 1, 8, 16, 4, true}, BackwardTile{2048, 128, 1, 8, 28, 4, true},
};

#endif

template <CellKind kind, int element_bytes>
constexpr const auto& forward_tiles() {
  if constexpr (kind == CellKind::lstm) {
    if constexpr (element_bytes == 2)
      return kLstmForward2;
    else
      return kLstmForward4;
  } else if constexpr (kind == CellKind::gru) {
    if constexpr (element_bytes == 2)
      return kGruForward2;
    else
      return kGruForward4;
  } else {
    if constexpr (element_bytes == 2)
      return kRnnForward2;
    else
      return kRnnForward4;
  }
}

template <CellKind kind, int element_bytes>
constexpr const auto& backward_tiles() {
  if constexpr (kind == CellKind::lstm) {
    if constexpr (element_bytes == 2)
      return kLstmBackward2;
    else
      return kLstmBackward4;
  } else if constexpr (kind == CellKind::gru) {
    if constexpr (element_bytes == 2)
      return kGruBackward2;
    else
      return kGruBackward4;
  } else {
    if constexpr (element_bytes == 2)
      return kRnnBackward2;
    else
      return kRnnBackward4;
  }
}

// A tile as a type, as kernels take it.
template <ForwardTile tile>
struct ForwardTileOf {
  static constexpr ForwardTile value = tile;
  static constexpr int hidden = value.hidden, cluster = value.cluster;
  static constexpr int row_blocks = value.row_blocks, unit_groups = value.unit_groups;
  static constexpr int split_k = value.split_k, register_steps = value.register_steps;
  static constexpr int ring = value.ring;
  static constexpr bool grid = value.grid;
};

template <BackwardTile tile>
struct BackwardTileOf {
  static constexpr BackwardTile value = tile;
  static constexpr int hidden = value.hidden, cluster = value.cluster;
  static constexpr int row_blocks = value.row_blocks, warps = value.warps;
  static constexpr int register_steps = value.register_steps, ring = value.ring;
  static constexpr bool grid = value.grid;
};

// Those of the table, by their numbers: nvcc's host code cannot name a kernel that has a struct
// among its template arguments.
template <CellKind kind, int element_bytes, int index>
struct ForwardTileAt : ForwardTileOf<forward_tiles<kind, element_bytes>()[index]> {};

template <CellKind kind, int element_bytes, int index>
struct BackwardTileAt : BackwardTileOf<backward_tiles<kind, element_bytes>()[index]> {};

}  // namespace fused_rnn
