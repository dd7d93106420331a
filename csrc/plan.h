// The choice of CUDA kernels: what is to be scanned and what the device can do -> tiles. Plain C++,
// so that every choice can be looked at, and tested, where there is no GPU.
#pragma once

#include <optional>
#include <string>

#include "cuda/kernels.h"
#include "cuda/tiles.h"

namespace fused_rnn {

struct Device {
  int capability;    // 10 * major + minor
  int processors;    // SMs
  int shared_bytes;  // that one CTA may have
  int max_cluster;   // CTAs; 1 where there are no clusters
};

struct ScanProblem {
  CellKind cell;
  int element_bytes;
  int64_t hidden, batch, directions;
};

// How a pass is run: W_hh on chip in clusters of CTAs, or across the whole grid, or a product and a
// pointwise kernel per step.
enum class Regime { none, cluster, grid, steps };
// What a user may force; by an empty name, nothing.
using ForcedRegime = std::optional<Regime>;

// Throws std::invalid_argument.
ForcedRegime regime_called(const std::string& name);

// How to launch a pass: a kernel of the tables in cuda/instances.h, or that of each step.
template <class Tile>
struct Plan {
  Regime regime = Regime::none;
  int index = -1;  // in its table
  Tile tile{};
  // Of one launch. A scan over the whole grid that does not fit at once takes several, one after
  // the other: batch tiles first, then directions.
  LaunchShape shape{};
  int64_t batch_tiles = 0;
  int64_t exchange_words = 0;  // of a scan over the whole grid: memory for each of its batch tiles
};

Plan<ForwardTile> plan_forward(const ScanProblem& problem, const Device& device,
                               ForcedRegime forced = {});
Plan<BackwardTile> plan_backward(const ScanProblem& problem, const Device& device,
                                 ForcedRegime forced = {});

// Why there is no plan, or nothing when there is one.
std::string plan_refusal(const ScanProblem& problem, const Device& device, bool training,
                         ForcedRegime forced = {});

// The kernels in a few words.
std::string describe_plan(const ScanProblem& problem, const Device& device, bool training,
                          ForcedRegime forced = {});

}  // namespace fused_rnn
