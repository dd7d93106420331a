// Runs CUDA kernels on the host, one fiber per thread, to find out whether they are right: the
// order in which threads run is random and unfair, what may arrive late does.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace fused_rnn::emulator {

struct Grid {
  int x, y;     // CTAs; x is a multiple of `cluster`
  int cluster;  // CTAs that run at once and may write to each other
  int threads;  // of a CTA
  int shared_bytes;
  bool cooperative;  // whether all CTAs run at once
};

// Where the running fiber stands.
struct Place {
  int thread, rank, block_x, block_y;
};
extern Place current;

unsigned char* shared_memory();

// Runs the kernel for every thread, cluster after cluster or all at once.
//
// Throws std::runtime_error when threads wait for each other in vain, when something is still on
// its way to a CTA that has left, or when a primitive is used against its rules.
void run(const Grid& grid, const std::function<void()>& kernel);

// Of the random choices in all that is run from now on.
void set_seed(uint64_t seed);

// One of the numbers below, by the same random choices.
int random_below(int bound);

// What a stream that records has been given. A stream is one of these, or null: then work runs as
// it is given.
using Recording = std::vector<std::function<void()>>;
void give(void* stream, std::function<void()> work);

// The stream that torch's operators are given to in this thread.
extern thread_local void* torch_stream;

// The next recording is an error.
void fail_to_record();
// To be asked once in each: whether it is that one.
bool fails_to_record();

// The last CTA of the next cooperative launch never gets to run.
void lose_a_cta();
// Or begins only when the others have waited for it in vain for so many rounds.
void delay_a_cta(int64_t rounds);

}  // namespace fused_rnn::emulator
