// longjmp goes from stack to stack here, which its checked form takes for a mistake.
#undef _FORTIFY_SOURCE

#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <csetjmp>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "emulated_primitives.h"
#include "weak_memory.h"

namespace fused_rnn::emulator {

Place current;
thread_local void* torch_stream = nullptr;

namespace {

constexpr size_t kStackBytes = 128 << 10;
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

Machine machine;
std::mt19937_64 random_bits;
std::mutex one_launch_at_a_time;
// What becomes of the last CTA of the next cooperative launch.
bool cta_is_lost = false;
int64_t cta_delay = 0;
std::atomic<bool> recording_fails = false;
// Stacks live on: making one costs more than a small kernel.
std::vector<std::unique_ptr<char[]>> stacks;

int draw(int below) { return static_cast<int>(random_bits() % static_cast<uint64_t>(below)); }

Cta& cta() { return machine.ctas[static_cast<size_t>(current.rank)]; }

Warp& warp() {
  const int per_cta = machine.grid.threads / kLanes;
  return machine.warps[static_cast<size_t>(current.rank * per_cta + current.thread / kLanes)];
}

int lane() { return current.thread % kLanes; }

void leave_fiber() {
  if (_setjmp(machine.running->context) == 0) _longjmp(machine.scheduler, 1);
}

// Ends the launch. The fibers are left where they are; nothing on their stacks owns memory that
// outlives a launch.
[[noreturn]] void fail(const std::string& what) {
  if (machine.error.empty()) {
    machine.error = what + " (thread " + std::to_string(current.thread) + " of CTA " +
                    std::to_string(current.rank) + " of its cluster)";
  }
  _longjmp(machine.scheduler, 1);
}

// A thread may be stopped at any primitive, not only where it has to wait.
void preempt() {
  if (draw(16) == 0) leave_fiber();
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

// Every lane brings its inputs; the last one does the work for all.
template <class Work>
void collective(const Work& work) {
  Warp& w = warp();
  if (w.meeting.arrived + 1 == kLanes) work(w);
  meet(w.meeting, kLanes);
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

void land(const Copy& copy) {
  uint8_t* to = memory(copy.to, 16);
  if (copy.valid) {
    std::memcpy(to, copy.from, 16);
  } else {
    std::memset(to, 0, 16);
  }
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

namespace fused_rnn {

using namespace emulator;

uint32_t bits_of(float x) {
  uint32_t result;
  std::memcpy(&result, &x, 4);
  return result;
}

float float_of(uint32_t x) {
  float result;
  std::memcpy(&result, &x, 4);
  return result;
}

uint32_t shared_address(const void* p) {
  const auto offset = static_cast<const uint8_t*>(p) - cta().shared.data();
  return static_cast<uint32_t>(current.rank) << kOffsetBits | static_cast<uint32_t>(offset);
}

uint32_t peer_address(uint32_t address, uint32_t rank) {
  return rank << kOffsetBits | (address & ((1u << kOffsetBits) - 1));
}

float load_shared(uint32_t address) {
  float x;
  std::memcpy(&x, memory(address, 4), 4);
  return x;
}

void cluster_sync() {
  meet(machine.cluster_meeting, static_cast<int>(machine.fibers.size()));
  preempt();
}

void block_sync() {
  meet(cta().meetings[0], machine.grid.threads);
  preempt();
}

void warp_sync() { meet(warp().meeting, kLanes); }

void named_sync(int id, int threads) {
  if (id < 1 || id > 15) fail("named barriers have numbers from 1 to 15");
  meet(cta().meetings[id], threads);
  preempt();
}

void barrier_init(uint32_t barrier, uint32_t arrivals) {
  memory(barrier, 8);
  Barrier& b = machine.ctas[barrier >> kOffsetBits].barriers[barrier];
  b = Barrier{};
  b.arrivals = b.pending = static_cast<int>(arrivals);
  b.initialised_by = current.thread;
}

void barrier_init_fence() {
  for (auto& [address, barrier] : cta().barriers) {
    if (barrier.initialised_by == current.thread) barrier.fenced = true;
  }
}

void barrier_expect(uint32_t barrier, uint32_t bytes) {
  preempt();
  Barrier& b = barrier_at(barrier);
  if (b.pending == 0) fail("more arrivals at a barrier than it was initialised for");
  b.bytes += bytes;
  b.pending--;
  complete_if_due(b);
  preempt();
}

void barrier_wait(uint32_t barrier, uint32_t parity, Order order) {
  preempt();
  Barrier& b = barrier_at(barrier);
  wait_until([&b, parity] { return b.phase != parity; });
  if (order != Order::acquire) return;
  for (const Message& m : b.withheld) write(m);
  b.withheld.clear();
}

void send(uint32_t peer, const uint32_t* words, int count, uint32_t peer_barrier) {
  Message m{peer, peer_barrier, {}, count};
  std::copy_n(words, count, m.words);
  const bool hold = machine.holding_back && draw(4) == 0;
  (hold ? machine.held_back : machine.on_the_way).push_back(m);
  preempt();
}

void copy_async(uint32_t to, const void* from, bool valid) {
  const Copy copy{to, from, valid};
  if (draw(2) == 0) {
    land(copy);
  } else {
    machine.running->open.push_back(copy);
  }
}

void copy_commit() {
  machine.running->groups.push_back(std::move(machine.running->open));
  machine.running->open.clear();
}

void copy_wait(int pending) {
  auto& groups = machine.running->groups;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) land(copy);
    groups.pop_front();
  }
  preempt();
}

namespace {

uint64_t load(const uint32_t* from, int bytes) {
  return machine.memory.load(machine.running->view, from, bytes, random_bits);
}

void store(uint32_t* to, uint64_t value, int bytes) {
  machine.memory.store(to, value, bytes, random_bits);
  preempt();
}

}  // namespace

// Who polls is stopped where it asks for the time.
uint4 load_words(const uint32_t* from) {
  uint32_t words[4];
  for (int i = 0; i < 4; i++) words[i] = static_cast<uint32_t>(load(from + i, 4));
  return {words[0], words[1], words[2], words[3]};
}

uint4 load_pairs(const uint32_t* from) {
  const uint2 first = load_pair(from), second = load_pair(from + 2);
  return {first.x, first.y, second.x, second.y};
}

uint2 load_pair(const uint32_t* from) {
  const uint64_t pair = load(from, 8);
  return {static_cast<uint32_t>(pair), static_cast<uint32_t>(pair >> 32)};
}

void store_whole(uint32_t* to, const uint32_t (&words)[1]) { store(to, words[0], 4); }

void store_whole(uint32_t* to, const uint32_t (&words)[2]) {
  store(to, words[0] | uint64_t{words[1]} << 32, 8);
}

int64_t spin_clock() {
  leave_fiber();
  machine.running->spins = true;
  return machine.idle_rounds;
}

float shuffle_xor(float x, int mask) {
  Warp& w = warp();
  w.in[lane()][0] = bits_of(x);
  collective([mask](Warp& all) {
    for (int i = 0; i < kLanes; i++) all.out[i][0] = all.in[i ^ mask][0];
  });
  return float_of(w.out[lane()][0]);
}

uint32_t shuffle(uint32_t x, int from) {
  Warp& w = warp();
  w.in[lane()][0] = x;
  w.in[lane()][1] = static_cast<uint32_t>(from);
  collective([](Warp& all) {
    for (int i = 0; i < kLanes; i++) all.out[i][0] = all.in[all.in[i][1] % kLanes][0];
  });
  return w.out[lane()][0];
}

uint32_t ballot(bool bit) {
  Warp& w = warp();
  w.in[lane()][0] = bit ? 1u : 0u;
  collective([](Warp& all) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= all.in[i][0] << i;
    for (int i = 0; i < kLanes; i++) all.out[i][0] = bits;
  });
  return w.out[lane()][0];
}

namespace {

uint32_t halves(uint32_t low, uint32_t high) { return (low & 0xffff) | high << 16; }

// Of `count` 8 x 8 matrices whose row r of number i lies at the address that lane 8 * i + r gave.
void transpose_from_shared(Warp& w, int count) {
  for (int i = 0; i < kLanes; i++) {
    for (int m = 0; m < count; m++) {
      const auto element = [&](int row) {
        uint16_t value;
        std::memcpy(&value, memory(w.in[8 * m + row][0] + 2 * static_cast<uint32_t>(i / 4), 2), 2);
        return static_cast<uint32_t>(value);
      };
      w.out[i][m] = halves(element(2 * (i % 4)), element(2 * (i % 4) + 1));
    }
  }
}

// kDepth: of a product; a word holds two numbers of 16 bits or one of 32.
template <int kDepth>
void write_products(Warp& w, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  for (int i = 0; i < kLanes; i++) {
    for (int q = 0; q < 4; q++) {
      const int row = i / 4 + 8 * (q / 2), column = 2 * (i % 4) + q % 2;
      float sum = 0.0f;
      for (int k = 0; k < kDepth; k++) sum += a[row][k] * b[k][column];
      w.out[i][q] = bits_of(sum);
    }
  }
}

template <class Format>
void multiply_warp(Warp& w) {
  float a[16][16], b[16][8];
  for (int i = 0; i < kLanes; i++) {
    const int row = i / 4, k = 2 * (i % 4);
    for (int e = 0; e < 2; e++) {
      const auto half = [&](int word) { return Format::low(w.in[i][word] >> (16 * e)); };
      a[row][k + e] = half(0);
      a[row + 8][k + e] = half(1);
      a[row][k + 8 + e] = half(2);
      a[row + 8][k + 8 + e] = half(3);
      b[k + e][row] = half(4);
      b[k + 8 + e][row] = half(5);
    }
  }
  write_products(w, a, b);
}

// Tensor cores do not look at the bits below TF32's.
template <>
void multiply_warp<Tf32>(Warp& w) {
  float a[16][8], b[8][8];
  for (int i = 0; i < kLanes; i++) {
    const int row = i / 4, k = i % 4;
    const auto number = [&](int word) { return float_of(w.in[i][word] & 0xffffe000u); };
    a[row][k] = number(0);
    a[row + 8][k] = number(1);
    a[row][k + 4] = number(2);
    a[row + 8][k + 4] = number(3);
    b[k][row] = number(4);
    b[k + 4][row] = number(5);
  }
  write_products(w, a, b);
}

template <class Format>
void multiply_lane(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  Warp& w = warp();
  const uint32_t in[6] = {a.x, a.y, a.z, a.w, b0, b1};
  std::copy_n(in, 6, w.in[lane()]);
  collective(multiply_warp<Format>);
  for (int q = 0; q < 4; q++) sum[q] += float_of(w.out[lane()][q]);
}

// x with a relative error of up to `size`, always the same for the same x.
float with_error(float x, float size) {
  const uint32_t hash = bits_of(x) * 2654435761u;
  return x * (1.0f + size * (static_cast<float>(hash >> 8) * 0x1p-23f - 1.0f));
}

}  // namespace

void load_transposed(uint32_t (&m)[1], uint32_t row) {
  Warp& w = warp();
  w.in[lane()][0] = row;
  collective([](Warp& all) { transpose_from_shared(all, 1); });
  m[0] = w.out[lane()][0];
}

void load_transposed(uint32_t (&m)[4], uint32_t row) {
  Warp& w = warp();
  w.in[lane()][0] = row;
  collective([](Warp& all) { transpose_from_shared(all, 4); });
  std::copy_n(w.out[lane()], 4, m);
}

uint32_t transpose(uint32_t m) {
  Warp& w = warp();
  w.in[lane()][0] = m;
  collective([](Warp& all) {
    for (int i = 0; i < kLanes; i++) {
      const auto element = [&](int row) { return all.in[row * 4 + i / 8][0] >> (i / 4 % 2 * 16); };
      all.out[i][0] = halves(element(2 * (i % 4)), element(2 * (i % 4) + 1));
    }
  });
  return w.out[lane()][0];
}

uint32_t Bfloat16::pack(float low, float high) {
  const auto rounded = [](float x) {
    const uint32_t bits = bits_of(x);
    if (std::isnan(x)) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  };
  return halves(rounded(low), rounded(high));
}

float Bfloat16::low(uint32_t x) { return float_of(x << 16); }

void Bfloat16::multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  multiply_lane<Bfloat16>(sum, a, b0, b1);
}

uint32_t Float16::pack(float low, float high) {
  const _Float16 both[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t result;
  std::memcpy(&result, both, 4);
  return result;
}

float Float16::low(uint32_t x) {
  const auto bits = static_cast<uint16_t>(x);
  _Float16 result;
  std::memcpy(&result, &bits, 2);
  return static_cast<float>(result);
}

void Float16::multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  multiply_lane<Float16>(sum, a, b0, b1);
}

uint32_t Tf32::round(float x) {
  const uint32_t bits = bits_of(x);
  return std::isfinite(x) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

void Tf32::multiply(float (&sum)[4], const Fragment& a, uint32_t b0, uint32_t b1) {
  multiply_lane<Tf32>(sum, a, b0, b1);
}

float tanh_approx(float x) { return with_error(std::tanh(x), 0x1p-11f); }
float exp2_approx(float x) { return with_error(std::exp2(x), 0x1p-22f); }
float reciprocal_approx(float x) { return with_error(1.0f / x, 0x1p-23f); }
float exp_exact(float x) { return std::exp(x); }
float tanh_exact(float x) { return std::tanh(x); }

}  // namespace fused_rnn
