// A barrier for the threads of one parallel region, whatever their number turns out to be.
//
// The region's work is so many items, dealt out to the threads in ranges. A thread counts for as
// many items as it was dealt, so a barrier opens when the arrivals add up to all of them: nobody
// has to know how many threads were granted.
#pragma once

#include <cstdint>

namespace fused_rnn {

// Whether all threads of a region run at once: a barrier among threads that take turns would
// never open.
class Team {
 public:
  explicit Team(int64_t items) : items_(items) {}

  // Each thread calls this first, with the number of its items. True for all of them or false
  // for all; if false they must not meet at a barrier.
  bool assemble(int64_t items);

  // After the region: whether its threads went ahead.
  bool went_ahead() const { return state_ == kComplete; }

 private:
  enum : int { kWaiting, kComplete, kGivenUp };

  const int64_t items_;
  alignas(64) int state_ = kWaiting;
  alignas(64) int64_t present_ = 0;
};

class Barrier {
 public:
  explicit Barrier(int64_t items) : items_(items) {}

 private:
  friend class Meeting;
  const int64_t items_;
  alignas(64) int64_t arrived_ = 0;
};

// One thread's side of a barrier.
class Meeting {
 public:
  Meeting(Barrier* barrier, int64_t items) : barrier_(barrier), items_(items) {}

  // Returns when the threads with the other items have called it as often as this one.
  void wait();

 private:
  Barrier* barrier_;
  int64_t items_;
  int64_t target_ = 0;
};

}  // namespace fused_rnn
