// The caller's stream, on which torch works too, and one for each of several lanes of work beside
// it. Lane 0 is the caller's. What is given to a lane runs in that order; between lanes the order
// is what records of events and waits for them say. The host waits for nothing.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "check_cuda.h"

#if defined(FUSED_RNN_EMULATED)
#include <functional>
#include <queue>
#include <stdexcept>

#include "emulator.h"
#endif

namespace fused_rnn {

#if defined(FUSED_RNN_EMULATED)

// Nothing runs until `finish`, which then takes at random one of the lanes that can go on.
class Streams {
 public:
  Streams(int64_t, const std::vector<int64_t>& others, int events)
      : lanes_(others.size() + 1),
        recorded_(static_cast<size_t>(events)),
        reached_(static_cast<size_t>(events)) {}

  template <class Work>
  void run(int lane, Work&& work) {
    push(lane, {[work = std::forward<Work>(work)] { work(nullptr); }});
  }

  void record(int lane, int event) {
    const int64_t number = ++recorded_[static_cast<size_t>(event)];
    push(lane, {[this, event, number] { reached_[static_cast<size_t>(event)] = number; }});
  }

  // For the last record of it.
  void wait(int lane, int event) {
    push(lane, {[] {}, event, recorded_[static_cast<size_t>(event)]});
  }

  // The caller's lane goes on when all the others are done.
  void finish() {
    size_t favourite = 0;
    while (true) {
      // One lane runs as long as it can, and longer than is fair: the others seem slow to it.
      if (emulator::random_below(8) == 0) favourite = random_lane();
      const size_t lane = is_ready(favourite) ? favourite : next_ready(random_lane());
      if (lane == lanes_.size()) break;
      const Task task = std::move(lanes_[lane].front());
      lanes_[lane].pop();
      task.work();
    }
    for (const auto& lane : lanes_) {
      if (!lane.empty()) throw std::runtime_error("streams wait for each other");
    }
  }

 private:
  struct Task {
    std::function<void()> work;
    int event = -1;  // to wait for before, until it has that number
    int64_t number = 0;
  };

  size_t random_lane() const {
    return static_cast<size_t>(emulator::random_below(static_cast<int>(lanes_.size())));
  }

  bool is_ready(size_t lane) const {
    if (lanes_[lane].empty()) return false;
    const Task& next = lanes_[lane].front();
    return next.event < 0 || reached_[static_cast<size_t>(next.event)] >= next.number;
  }

  // The first lane from this one on that can go on, or the number of lanes.
  size_t next_ready(size_t first) const {
    for (size_t i = 0; i < lanes_.size(); i++) {
      const size_t lane = (first + i) % lanes_.size();
      if (is_ready(lane)) return lane;
    }
    return lanes_.size();
  }

  void push(int lane, Task task) { lanes_[static_cast<size_t>(lane)].push(std::move(task)); }

  std::vector<std::queue<Task>> lanes_;
  std::vector<int64_t> recorded_, reached_;
};

#else

class Streams {
 public:
  Streams(int64_t caller, const std::vector<int64_t>& others, int events) {
    streams_.push_back(reinterpret_cast<cudaStream_t>(caller));
    for (int64_t other : others) streams_.push_back(reinterpret_cast<cudaStream_t>(other));
    for (int i = 0; i < events; i++) {
      cudaEvent_t event = nullptr;
      check_cuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
      events_.push_back(event);
    }
  }
  Streams(const Streams&) = delete;
  // Also after an error the caller's stream waits: memory of what still runs is about to be freed.
  // What waits for an event goes on waiting after it is destroyed.
  ~Streams() {
    for (size_t lane = is_finished_ ? streams_.size() : 1; lane < streams_.size(); lane++) {
      if (events_.empty()) break;
      cudaEventRecord(events_[0], streams_[lane]);
      cudaStreamWaitEvent(streams_[0], events_[0], 0);
    }
    for (cudaEvent_t event : events_) cudaEventDestroy(event);
  }

  template <class Work>
  void run(int lane, Work&& work) {
    work(static_cast<void*>(streams_[static_cast<size_t>(lane)]));
  }
  void record(int lane, int event) {
    check_cuda(
        cudaEventRecord(events_[static_cast<size_t>(event)], streams_[static_cast<size_t>(lane)]));
  }
  void wait(int lane, int event) {
    check_cuda(cudaStreamWaitEvent(streams_[static_cast<size_t>(lane)],
                                   events_[static_cast<size_t>(event)], 0));
  }
  void finish() {
    for (int lane = 1; lane < static_cast<int>(streams_.size()); lane++) {
      record(lane, 0);
      wait(0, 0);
    }
    is_finished_ = true;
  }

 private:
  bool is_finished_ = false;
  std::vector<cudaStream_t> streams_;
  std::vector<cudaEvent_t> events_;
};

#endif

}  // namespace fused_rnn
