// How CTAs of the whole grid pass blocks of words on to each other: through global memory, which
// for them is the L2 cache. docs/cuda-kernels.md says why it is right.
//
// A message is what all CTAs of one batch tile write for one step; they count from 1. What a lane
// writes of a block is one access. One of its bits is the message's tag, by which readers know it
// from what was in its place before; they wait for each access by itself. The bits that the tags
// displaced, one of each lane, are a word beside the block, with the number of the message.
#pragma once

#include "elements.h"
#include "params.h"

namespace fused_rnn {

template <class Element, int kMessageBytes>
class Exchange {
  static constexpr int kWords = Element::kWords, kBlockWords = kWarp * kWords;
  static constexpr int kMessageWords = kMessageBytes / 4;
  // Of one of the two messages, with what lies beside it.
  static constexpr int64_t kBufferWords = exchange_words(kMessageBytes, Element::kBytes) / 2;
  static_assert(kBufferWords % 4 == 0);  // so that 16 bytes can be loaded at a time
  static constexpr uint32_t kNan = 0xffffffffu;
  // The top bit of an exponent, of the second of two numbers or of the only one: any would do.
  static constexpr uint32_t kTagBit = 1u << 30;
  // The first message also waits for CTAs that have yet to begin, for as long as kernels of others
  // hold their SMs: an all-reduce may wait for a rank that is busy elsewhere. CUDA promises that
  // all CTAs of a grid run in the end, not when. NCCL gives up first, after ten minutes.
  static constexpr int64_t kFirstTimes = 128;

 public:
  // `given_up` is in shared memory.
  FUSED_RNN_DEVICE_MEMBER Exchange(const ExchangeParams& params, int tile, uint32_t* given_up)
      : given_up_(given_up), stalled_(params.stalled), patience_(params.patience) {
    const int64_t number = block_y() * params.tiles + tile;
    memory_ = params.memory + number * 2 * kBufferWords;
  }

  // By all threads, a block_sync before the first message.
  FUSED_RNN_DEVICE_MEMBER void start() const {
    if (thread_index() == 0) *given_up_ = 0;
  }

  // A block of a message, by a warp. All blocks have to be put, in every message.
  FUSED_RNN_DEVICE_MEMBER void put(int message, int block, const uint32_t (&words)[kWords]) const {
    const int lane = lane_index();
    const uint32_t displaced[2] = {ballot((words[0] & kTagBit) != 0), number_of(message)};
    uint32_t tagged[kWords];
    FUSED_RNN_UNROLL
    for (int w = 0; w < kWords; w++) tagged[w] = words[w];
    tagged[0] = (words[0] & ~kTagBit) | tag(message);
    store_whole(buffer(message) + block * kBlockWords + lane * kWords, tagged);
    if (lane == 0) store_whole(buffer(message) + kMessageWords + 2 * block, displaced);
  }

  // kCount blocks of a message, from `first` on, to shared memory, by a warp, which has to fetch
  // the same of every message. What does not come in time is NaN, in every dtype, and so is all
  // after it.
  template <int kCount>
  FUSED_RNN_DEVICE_MEMBER void fetch(uint32_t* to, int message, int first) const {
    constexpr int kOfBlock = kBlockWords / 4, kPieces = kCount * kOfBlock;  // of 16 bytes
    constexpr int kRounds = ceil_div(kPieces, kWarp);                       // a piece to a lane
    constexpr int kBatch = ceil_div(kRounds, ceil_div(kRounds, 8));  // on their way at a time
    constexpr bool kWhole = kPieces % (kBatch * kWarp) == 0;
    constexpr int kBatchBlocks = kBatch * kWarp / kOfBlock;
    static_assert(kBatchBlocks <= kWarp);
    const int lane = lane_index();
    bool there = *given_up_ == 0;
#pragma unroll 1
    for (int round = 0; round < kRounds; round += kBatch) {
      const auto piece = [&](int i) { return (round + i) * kWarp + lane; };
      const auto exists = [&](int i) { return kWhole || piece(i) < kPieces; };
      const int block = round * (kWarp / kOfBlock) + lane;  // whose displaced bits the lane reads
      const bool has_block = lane < kBatchBlocks && block < kCount;
      const uint32_t* from = buffer(message) + first * kBlockWords + 4 * piece(0);
      const uint32_t* displaced_at = buffer(message) + kMessageWords + 2 * (first + block);

      // All that the lane reads is asked for at once, then again what was not of this message yet.
      Fragment pieces[kBatch];
      FUSED_RNN_UNROLL
      for (int i = 0; i < kBatch; i++) {
        const uint32_t nothing = exists(i) ? ~tag(message) : tag(message);
        pieces[i] = {nothing, nothing, nothing, nothing};
      }
      uint2 displaced = {0, has_block ? 0 : number_of(message)};
      const int64_t start = spin_clock();
      while (there) {
        if (displaced.y != number_of(message)) displaced = load_pair(displaced_at);
        FUSED_RNN_UNROLL
        for (int i = 0; i < kBatch; i++) {
          if ((wrong_tags(pieces[i], message) & kTagBit) != 0) {
            pieces[i] = load(from + 4 * i * kWarp);
          }
        }
        uint32_t wrong = displaced.y == number_of(message) ? 0 : kTagBit;
        FUSED_RNN_UNROLL
        for (int i = 0; i < kBatch; i++) wrong |= wrong_tags(pieces[i], message);
        if ((wrong & kTagBit) == 0) break;
        if (spin_clock() - start > (message == 1 ? kFirstTimes * patience_ : patience_)) {
          give_up(message);
          there = false;
        }
      }
      const auto store = [&](int i) {
        if (exists(i)) reinterpret_cast<Fragment*>(to)[piece(i)] = pieces[i];
      };
      // Nearly always no number is as large as to have its bit set.
      if (ballot(there && displaced.x == 0) == ~0u) {
        FUSED_RNN_UNROLL
        for (int i = 0; i < kBatch; i++) {
          restore(pieces[i], 0);
          store(i);
        }
        continue;
      }
      there = ballot(there) == ~0u;  // a lane's words are not whole without another's bits
      FUSED_RNN_UNROLL
      for (int i = 0; i < kBatch; i++) {
        const uint32_t bits = shuffle(displaced.x, (i * kWarp + lane) / kOfBlock);
        restore(pieces[i], bits >> (lane % kOfBlock * (4 / kWords)));
        if (!there) pieces[i] = {kNan, kNan, kNan, kNan};
        store(i);
      }
    }
  }

 private:
  FUSED_RNN_DEVICE uint32_t number_of(int message) { return static_cast<uint32_t>(message); }

  // In one place tags take turns, from that of memory which is zero.
  FUSED_RNN_DEVICE uint32_t tag(int message) {
    return ((number_of(message) + 1) >> 1 & 1) * kTagBit;
  }

  // Two are enough: whoever puts message m + 2 has all of m + 1, whose senders all had read m.
  FUSED_RNN_DEVICE_MEMBER uint32_t* buffer(int message) const {
    return memory_ + (message & 1) * kBufferWords;
  }

  FUSED_RNN_DEVICE Fragment load(const uint32_t* from) {
    return kWords == 1 ? load_words(from) : load_pairs(from);
  }

  // Has the tag's bit where an access was not of this message, and others of no meaning.
  FUSED_RNN_DEVICE uint32_t wrong_tags(const Fragment& piece, int message) {
    uint32_t wrong = (piece.x ^ tag(message)) | (piece.z ^ tag(message));
    if (kWords == 1) wrong |= (piece.y ^ tag(message)) | (piece.w ^ tag(message));
    return wrong;
  }

  // Puts back the displaced bits, of which the lowest are the piece's.
  FUSED_RNN_DEVICE void restore(Fragment& piece, uint32_t bits) {
    const auto of_lane = [bits](uint32_t word, int lane) {
      return (word & ~kTagBit) | (bits << (30 - lane) & kTagBit);
    };
    piece.x = of_lane(piece.x, 0);
    piece.z = of_lane(piece.z, kWords == 1 ? 2 : 1);
    if (kWords == 1) {
      piece.y = of_lane(piece.y, 1);
      piece.w = of_lane(piece.w, 3);
    }
  }

  FUSED_RNN_DEVICE_MEMBER void give_up(int message) const {
    *given_up_ = 1;
    *stalled_ = number_of(message);
  }

  uint32_t* const given_up_;
  uint32_t* const stalled_;
  const int64_t patience_;
  uint32_t* memory_;
};

}  // namespace fused_rnn
