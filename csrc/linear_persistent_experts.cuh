// What linear_persistent.cu and the two ways of its four helper warps share. A way is a class, of the kernel's template:
//
//   linear_persistent_all_experts.cuh      A and B of all experts: nothing waits for a list of those that were chosen
//   linear_persistent_chosen_experts.cuh   A and B of the experts that any token chose, from a list: for many experts
//
//   kHidden            elements of the hidden that there is room for in shared memory
//   kChosenOnly        the second way. Its helpers use the room of the eight warps' partial sums before them, so these wait for `free`
//   room_bytes<NT>()   bytes of that room, for so many floats of partial sums
//   Choice<TOKENS>     what the helpers know of the choice, in shared memory; init() is for all threads, before a __syncthreads()
//
// The namespaces all_experts and chosen_experts hold the steps that the helpers take in the kernel.
#pragma once
#include "cp_async.cuh"
#include "mma.cuh"

namespace ls {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;          // that multiply
constexpr int kHelpers = 4, kHelperThreads = 32 * kHelpers;  // that see to the experts
constexpr int kAllThreads = kThreads + kHelperThreads;
constexpr int kSlice = 64;  // features that a warp takes at once: a 128-byte line of each row
constexpr int kTile = 16;   // rows that are multiplied at once
constexpr int kMostTiles = 96;  // of one block
constexpr int kMostParts = 8;
constexpr int kIds = LS_FAST_TOKENS * LS_MAX_TOP_K;
// How often is asked for other blocks' part of the hidden until it is not waited for any longer; half a microsecond or more each time.
// (By the clock, a launch would give up that has been stopped for another process.)
constexpr int kPatience = 400;

// Barriers: of the eight warps; of the four; the eight have read what the four left.
enum { kMultiplying = 1, kHelping = 2, kSummed = 3 };

// Of the features: `splits`, each a slice for every warp, with any of which a block may begin; and `parts`, of some splits each,
// in which the shrink is shared out.
__host__ __device__ inline int splits_of(int in_features) { return (in_features + kSlice * kWarps - 1) / (kSlice * kWarps); }
__host__ __device__ inline int splits_each(int in_features) { return (splits_of(in_features) + kMostParts - 1) / kMostParts; }
__host__ __device__ inline int parts_of(int in_features) {
  return (splits_of(in_features) + splits_each(in_features) - 1) / splits_each(in_features);
}

// The hidden of the whole group, by the helpers and straight from A: for when blocks that hold a part of it do not come, because
// another stream's blocks, which may be waiting for the same reason, keep them from a multiprocessor.
template <class E> __device__ __noinline__ void shrink_alone(const GroupParams &p, const short *ids, E *hidden) {
  const int lane = threadIdx.x % 32, helper = threadIdx.x / 32 - kWarps, in = p.g.in_features;
  for (int i = 0; i < p.g.n_items; ++i) {
    const ls_item &item = p.g.items[i];
    for (int o = helper; o < p.g.tokens * p.g.top_k * item.rank; o += kHelpers) {
      const int entry = o / item.rank, expert = ids[entry];
      if (expert < 0) continue;
      const E *a = static_cast<const E *>(item.lora_a) + (int64_t(expert) * item.rank + o % item.rank) * in;
      const E *x = static_cast<const E *>(p.g.x) + int64_t(entry / p.g.top_k) * in;
      float sum = 0.f;
      for (int k = lane * 2; k < in; k += 64) {
        const float2 fa = unpack2<E>(*reinterpret_cast<const uint32_t *>(a + k)),
                     fx = unpack2<E>(*reinterpret_cast<const uint32_t *>(x + k));
        sum += fa.x * fx.x + fa.y * fx.y;
      }
      sum = warp_sum(sum);
      if (lane == 0) hidden[p.hidden[i] + o] = from_float<E>(p.g.gates[entry] * item.scaling * sum);
    }
  }
}

__device__ __forceinline__ float4 operator+(const float4 &a, const float4 &b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

// Waits, for one thread, until so many blocks have published their part of the hidden. False: not in reasonable time.
__device__ __forceinline__ bool wait_for_blocks(const GroupParams &p, unsigned blocks) {
  bool waits = true;
  const int patience = p.g.tuning & LS_TUNING_IMPATIENT ? 0 : kPatience;
  for (int asked = 0; shrinks_done(p.sync) < blocks && waits; ++asked) waits = asked < patience;
  return waits;
}

// What a block has to do, in shared memory: the registers of the warps that multiply are for sums.
struct Plan {
  int begin, n_tiles;  // of the weights
  int panels;
  int split;  // the part of the features that the block begins with
};

}  // namespace
}  // namespace ls
