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
  // Whether other processes' kernels run beside ours (MPS), on SMs that would be ours.
  bool is_shared = false;
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

// `layers`: how many such layers run side by side.
Plan<ForwardTile> plan_forward(const ScanProblem& problem, const Device& device,
                               ForcedRegime forced = {}, int64_t layers = 1);
Plan<BackwardTile> plan_backward(const ScanProblem& problem, const Device& device,
                                 ForcedRegime forced = {}, int64_t layers = 1);

// Why there is no plan, or nothing when there is one.
std::string plan_refusal(const ScanProblem& problem, const Device& device, bool training,
                         ForcedRegime forced = {});

// How many layers of a stack run side by side in each pass.
struct LayersAtOnce {
  int64_t forward = 1, backward = 1;
};

// The kernels in a few words.
std::string describe_plan(const ScanProblem& problem, const Device& device, bool training,
                          ForcedRegime forced = {}, LayersAtOnce layers = {});

// A stack of layers of one shape, whose chunks of time run side by side, each as soon as what it
// starts from is there.
struct StackProblem {
  ScanProblem layer;
  int64_t layers, timesteps;
  bool training;
};

// Timesteps of a chunk in each pass; 0 where it is faster to run layer after layer.
struct StackPlan {
  int64_t forward = 0, backward = 0;
};

StackPlan plan_stack(const StackProblem& stack, const Device& device, ForcedRegime forced = {});

// Why its layers cannot run side by side, or nothing when they can.
std::string stack_refusal(const StackProblem& stack, const Device& device,
                          ForcedRegime forced = {});

}  // namespace fused_rnn
