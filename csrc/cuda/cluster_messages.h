// How blocks of words go to other CTAs of a cluster: 16 bytes from a lane, so that an instruction
// has as few messages as can be. Each is counted at the receiver's barrier.
#pragma once

#include "elements.h"

namespace fused_rnn {

// kCount blocks, one after another, to the same place of every CTA. `to` and `barrier` are this
// CTA's addresses of them. Each CTA begins with itself, so that at no time all send to the same.
template <class Element, int kCluster, int kCount>
FUSED_RNN_DEVICE void send_to_all(uint32_t to, const uint32_t (&words)[kCount][Element::kWords],
                                  uint32_t barrier, int rank) {
  constexpr int kWords = Element::kWords, kBlockWords = kWarp * kWords;
  constexpr int kLanes = kBlockWords / 4, kPeers = kWarp / kLanes;  // of one instruction
  const int lane = lane_index(), piece = lane % kLanes;
  uint32_t pieces[kCount][4];
  FUSED_RNN_UNROLL
  for (int i = 0; i < kCount; i++) {
    FUSED_RNN_UNROLL
    for (int w = 0; w < 4; w++) {
      pieces[i][w] = shuffle(words[i][w % kWords], (4 * piece + w) / kWords);
    }
  }
  FUSED_RNN_UNROLL
  for (int first = 0; first < kCluster; first += kPeers) {
    const int nth = first + lane / kLanes;
    if (kCluster % kPeers != 0 && nth >= kCluster) continue;
    const uint32_t peer = (rank + nth) & (kCluster - 1);
    const uint32_t there = peer_address(to + piece * 16, peer);
    const uint32_t peer_barrier = peer_address(barrier, peer);
    FUSED_RNN_UNROLL
    for (int i = 0; i < kCount; i++) send<4>(there + i * kBlockWords * 4, pieces[i], peer_barrier);
  }
}

// Two blocks of pairs of float32, of which a lane has v[0], v[1] and v[2], v[3]: of two lanes side
// by side the first sends what both have of one block, the second what they have of the other.
// What is given is of the block that the lane sends: where its first lane's pair goes to at its
// owner, in this CTA's addresses.
FUSED_RNN_DEVICE void send_pairs(uint32_t block, const float (&v)[4], uint32_t barrier, int owner) {
  const int lane = lane_index(), odd = lane & 1;
  const float x = shuffle_xor(odd ? v[0] : v[2], 1), y = shuffle_xor(odd ? v[1] : v[3], 1);
  const uint32_t words[4] = {bits_of(odd ? x : v[0]), bits_of(odd ? y : v[1]),
                             bits_of(odd ? v[2] : x), bits_of(odd ? v[3] : y)};
  send<4>(peer_address(block + (lane - odd) * 8, owner), words, peer_address(barrier, owner));
}

}  // namespace fused_rnn
