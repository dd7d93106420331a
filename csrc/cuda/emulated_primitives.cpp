// The primitives that move and wait, on the machine of emulator.cpp.
#include "emulated_primitives.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "emulated_machine.h"

namespace fused_rnn {

using namespace emulator;

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

}  // namespace fused_rnn
