// longjmp goes from stack to stack here, which its checked form takes for a mistake.
#undef _FORTIFY_SOURCE

#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "emulated_machine.h"

namespace fused_rnn::emulator {

Place current;
thread_local void* torch_stream = nullptr;
Machine machine;
std::mt19937_64 random_bits;

void leave_fiber() {
  if (_setjmp(machine.running->context) == 0) _longjmp(machine.scheduler, 1);
}

void fail(const std::string& what) {
  if (machine.error.empty()) {
    machine.error = what + " (thread " + std::to_string(current.thread) + " of CTA " +
                    std::to_string(current.rank) + " of its cluster)";
  }
  _longjmp(machine.scheduler, 1);
}

void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  machine.running->ready = std::move(ready);
  leave_fiber();
}

void meet(Meeting& meeting, int participants) {
  const int64_t generation = meeting.generation;
  if (++meeting.arrived == participants) {
    meeting.arrived = 0;
    meeting.generation++;
  } else {
    wait_until([&meeting, generation] { return meeting.generation != generation; });
  }
}

uint8_t* memory(uint32_t address, size_t bytes) {
  const uint32_t rank = address >> kOffsetBits, offset = address & ((1u << kOffsetBits) - 1);
  if (rank >= machine.ctas.size() || offset + bytes > machine.ctas[rank].shared.size()) {
    fail("shared memory address out of range");
  }
  return machine.ctas[rank].shared.data() + offset;
}

Barrier& barrier_at(uint32_t address) {
  memory(address, 8);
  auto& barriers = machine.ctas[address >> kOffsetBits].barriers;
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("barrier used before it was initialised");
  return found->second;
}

void complete_if_due(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1;
    barrier.pending = barrier.arrivals;
  }
}

void write(const Message& m) {
  std::memcpy(memory(m.to, static_cast<size_t>(m.count) * 4), m.words,
              static_cast<size_t>(m.count) * 4);
}

void land(const Copy& copy) {
  uint8_t* to = memory(copy.to, 16);
  if (copy.valid) {
    std::memcpy(to, copy.from, 16);
  } else {
    std::memset(to, 0, 16);
  }
}

namespace {

constexpr size_t kStackBytes = 128 << 10;

std::mutex one_launch_at_a_time;
// What becomes of the last CTA of the next cooperative launch.
bool cta_is_lost = false;
int64_t cta_delay = 0;
std::atomic<bool> recording_fails = false;
// Stacks live on: making one costs more than a small kernel.
std::vector<std::unique_ptr<char[]>> stacks;

void deliver(const Message& m) {
  if (machine.ctas[m.to >> kOffsetBits].running == 0) fail("message to a CTA that has left");
  Barrier& barrier = barrier_at(m.barrier);
  if (!barrier.fenced) fail("message to a barrier that was not made visible to the cluster");
  if (draw(2) == 0) {
    write(m);
  } else {
    barrier.withheld.push_back(m);
  }
  barrier.bytes -= m.count * 4;
  complete_if_due(barrier);
}

void deliver_any() {
  auto& from = machine.on_the_way;
  std::swap(from[static_cast<size_t>(draw(static_cast<int>(from.size())))], from.back());
  const Message m = from.back();
  from.pop_back();
  deliver(m);
}

void fiber_main() {
  (*machine.kernel)();
  Fiber& fiber = *machine.running;
  for (const auto& group : fiber.groups) {
    if (!group.empty()) fail("a thread left before its copies arrived");
  }
  if (!fiber.open.empty()) fail("a thread left before its copies arrived");
  fiber.done = true;
  cta().running--;
  _longjmp(machine.scheduler, 1);
}

void resume(Fiber& fiber, size_t index) {
  machine.running = &fiber;
  current = fiber.place;
  fiber.spins = false;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.context, 1);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = stacks[index].get();
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
  setcontext(&start);
}

// `ctas` that run at once, of which `place` says where the one of a rank stands.
template <class PlaceOf>
void prepare(const Grid& grid, size_t ctas, const std::function<void()>& kernel,
             const PlaceOf& place) {
  const auto threads = static_cast<size_t>(grid.threads);
  machine = Machine{};
  machine.grid = grid;
  machine.kernel = &kernel;
  machine.ctas.resize(ctas);
  for (Cta& one : machine.ctas) {
    one.shared.assign(static_cast<size_t>(grid.shared_bytes), 0xff);  // NaN, read as anything
    one.running = grid.threads;
  }
  machine.warps.resize(ctas * threads / kLanes);
  machine.fibers.resize(ctas * threads);
  for (size_t i = 0; i < machine.fibers.size(); i++) {
    const int rank = static_cast<int>(i / threads);
    machine.fibers[i].place = place(rank);
    machine.fibers[i].place.thread = static_cast<int>(i % threads);
    machine.fibers[i].place.rank = rank;
  }
  while (stacks.size() < machine.fibers.size()) stacks.emplace_back(new char[kStackBytes]);
}

// Now and then some warps get little or no time for a while, and some messages wait until nothing
// else can happen.
class Mood {
 public:
  explicit Mood(size_t warps) : idle_(warps, 0) {}

  void next_round() {
    if (round_ == next_change_) {
      next_change_ = round_ + (int64_t{64} << draw(4));
      for (int& percent : idle_) percent = draw(4) == 0 ? 97 : draw(3) == 0 ? 70 : 0;
    }
    if (round_ % 256 == 0) {
      machine.holding_back = draw(4) == 0;
      if (!machine.holding_back) release();
    }
    round_++;
  }

  bool starves(size_t warp) const { return draw(100) < idle_[warp]; }

  static void release() {
    auto& held = machine.held_back;
    machine.on_the_way.insert(machine.on_the_way.end(), held.begin(), held.end());
    held.clear();
  }

 private:
  std::vector<int> idle_;
  int64_t round_ = 0, next_change_ = 0;
};

// Runs the prepared cluster to its end, or to machine.error.
void schedule() {
  Mood mood(machine.warps.size());
  std::vector<size_t> live(machine.fibers.size());
  for (size_t i = 0; i < live.size(); i++) live[i] = i;
  const int delivery = 1 + draw(8);  // of 64: how soon messages arrive in this run
  int quiet_rounds = 0;
  while (!live.empty()) {
    mood.next_round();
    std::shuffle(live.begin(), live.end(), random_bits);
    bool progress = false, spinning = false;
    for (const size_t i : live) {
      Fiber& fiber = machine.fibers[i];
      if (quiet_rounds < 3 && mood.starves(i / kLanes)) continue;
      if (fiber.ready) {
        if (!fiber.ready()) continue;
        fiber.ready = nullptr;
      }
      resume(fiber, i);
      if (!machine.error.empty()) return;
      (fiber.spins ? spinning : progress) = true;
      if (draw(64) < delivery) machine.memory.perform_any(false, random_bits);
      // Delivered from here, not from a fiber: a failure must find the scheduler waiting.
      while (!machine.on_the_way.empty() && draw(64) < delivery) {
        if (_setjmp(machine.scheduler) == 0) deliver_any();
        if (!machine.error.empty()) return;
      }
    }
    live.erase(
        std::remove_if(live.begin(), live.end(), [](size_t i) { return machine.fibers[i].done; }),
        live.end());
    quiet_rounds = progress ? 0 : quiet_rounds + 1;
    if (quiet_rounds > 3 && !machine.memory.perform_any(true, random_bits)) {
      if (machine.on_the_way.empty()) Mood::release();
      if (machine.on_the_way.empty()) {
        if (spinning) {
          machine.idle_rounds++;
          continue;
        }
        machine.error = "deadlock: " + std::to_string(live.size()) + " threads wait in vain";
        return;
      }
      if (_setjmp(machine.scheduler) == 0) deliver_any();
      if (!machine.error.empty()) return;
    }
  }
  while (machine.memory.perform_any(true, random_bits)) {
  }
  if (!machine.on_the_way.empty() || !machine.held_back.empty()) {
    machine.error = "messages were still on their way when all threads had left";
  }
}

}  // namespace

unsigned char* shared_memory() { return cta().shared.data(); }

void run(const Grid& grid, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  const auto run_prepared = [] {
    schedule();
    if (!machine.error.empty()) throw std::runtime_error("emulated kernel: " + machine.error);
  };
  if (grid.cooperative) {
    const auto place = [&grid](int rank) { return Place{0, 0, rank % grid.x, rank / grid.x}; };
    prepare(grid, static_cast<size_t>(grid.x * grid.y - (cta_is_lost ? 1 : 0)), kernel, place);
    cta_is_lost = false;
    if (const int64_t rounds = std::exchange(cta_delay, 0); rounds > 0) {
      for (auto fiber = machine.fibers.end() - grid.threads; fiber != machine.fibers.end();
           fiber++) {
        fiber->ready = [rounds] { return machine.idle_rounds >= rounds; };
      }
    }
    run_prepared();
    return;
  }
  for (int y = 0; y < grid.y; y++) {
    for (int x = 0; x < grid.x / grid.cluster; x++) {
      const auto place = [&](int rank) { return Place{0, 0, x * grid.cluster + rank, y}; };
      prepare(grid, static_cast<size_t>(grid.cluster), kernel, place);
      run_prepared();
    }
  }
}

void lose_a_cta() {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  cta_is_lost = true;
}

void delay_a_cta(int64_t rounds) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  cta_delay = rounds;
}

void give(void* stream, std::function<void()> work) {
  if (stream == nullptr) {
    work();
  } else {
    static_cast<Recording*>(stream)->push_back(std::move(work));
  }
}

void fail_to_record() { recording_fails = true; }

bool fails_to_record() { return recording_fails.exchange(false); }

void set_seed(uint64_t seed) {
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  random_bits.seed(seed);
}

int random_below(int bound) { return draw(bound); }

}  // namespace fused_rnn::emulator
