// The machine that emulator.cpp runs, as its primitives see it.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "weak_memory.h"

namespace fused_rnn::emulator {

constexpr int kLanes = 32;
// A shared address is the CTA's rank above so many bits of offset.
constexpr int kOffsetBits = 20;

struct Message {
  uint32_t to, barrier;
  uint32_t words[4];
  int count;
};

// An mbarrier: a phase is complete when all arrivals and all expected bytes are there.
struct Barrier {
  int arrivals = 0, pending = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  int initialised_by = -1;
  bool fenced = false;
  std::vector<Message> withheld;  // counted, but to be seen only by those who acquire
};

struct Meeting {
  int arrived = 0;
  int64_t generation = 0;
};

struct Cta {
  std::vector<uint8_t> shared;
  std::map<uint32_t, Barrier> barriers;
  std::map<int, Meeting> meetings;
  int running = 0;
};

struct Warp {
  Meeting meeting;
  uint32_t in[kLanes][6];
  uint32_t out[kLanes][4];
};

struct Copy {
  uint32_t to;
  const void* from;
  bool valid;
};

struct Fiber {
  Place place;
  jmp_buf context;
  bool started = false, done = false;
  bool spins = false;  // whether it has done nothing but ask for the time
  WeakMemory::View view;
  std::function<bool()> ready;  // what it waits for
  std::vector<Copy> open;       // copies of no group yet
  std::deque<std::vector<Copy>> groups;
};

// All there is of one cluster while it runs.
struct Machine {
  Grid grid;
  const std::function<void()>* kernel;
  std::vector<Cta> ctas;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  Meeting cluster_meeting;
  std::vector<Message> on_the_way, held_back;
  bool holding_back = false;
  WeakMemory memory;
  int64_t idle_rounds = 0;
  std::string error;
  jmp_buf scheduler;
};

extern Machine machine;
extern std::mt19937_64 random_bits;

inline int draw(int below) {
  return static_cast<int>(random_bits() % static_cast<uint64_t>(below));
}

// Of the running fiber.
inline Cta& cta() { return machine.ctas[static_cast<size_t>(current.rank)]; }

inline Warp& warp() {
  const int per_cta = machine.grid.threads / kLanes;
  return machine.warps[static_cast<size_t>(current.rank * per_cta + current.thread / kLanes)];
}

inline int lane() { return current.thread % kLanes; }

// Ends the launch. The fibers are left where they are; nothing on their stacks owns memory that
// outlives a launch.
[[noreturn]] void fail(const std::string& what);
void leave_fiber();

// A thread may be stopped at any primitive, not only where it has to wait.
inline void preempt() {
  if (draw(16) == 0) leave_fiber();
}

void wait_until(std::function<bool()> ready);
void meet(Meeting& meeting, int participants);

// Every lane brings its inputs; the last one does the work for all.
template <class Work>
void collective(const Work& work) {
  Warp& w = warp();
  if (w.meeting.arrived + 1 == kLanes) work(w);
  meet(w.meeting, kLanes);
}

// Of shared memory; a failure where there is none.
uint8_t* memory(uint32_t address, size_t bytes);
Barrier& barrier_at(uint32_t address);
void complete_if_due(Barrier& barrier);
void write(const Message& m);
void land(const Copy& copy);

}  // namespace fused_rnn::emulator
