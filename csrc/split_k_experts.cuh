// Operands of linear_split_k_sm90.cu, and which experts a launch reads: all, or those that any token chose.
//
// What an expert's place is: of all experts its number, else where it stands in the list of those that were chosen, before those that were
// not. Columns of the hidden, and steps of the experts, follow each other by places. How many are read is known in the launch alone if
// experts are chosen, so every block makes the list and deals out the linears' steps by itself, and all come to the same. The shrink is of
// all experts, dealt out by the host, and waits for no list: its tiles are copied 128 rows at a time.
#pragma once
#include "linear_sm90.cuh"
#include "stream_k.cuh"

namespace ls {

static_assert(kFeatures == kSm90Features, "rows of the hidden are padded to steps");

struct SplitKParams : Schedule {
  int patience;  // see kPatience
  int tokens, top_k, num_experts, in_features;
  Sm90Linear linears[LS_MAX_GROUP];
  const void *lora_a[LS_MAX_GROUP], *lora_b[LS_MAX_GROUP], *input;
  void *hidden;
  const int64_t *experts;
  const float *gates;
  float *partials;    // of each block, and of each part of the shrink
  unsigned *flags;    // of each block: 1: its partials are there; whoever reads them puts it back to 0
  unsigned *arrived;  // of each tile of the shrink: how many partials are there
  Sync *sync;         // done: parts of the shrink; ticket: a block has given up waiting
  CUtensorMap x, hidden_map, weight[LS_MAX_GROUP], a_map[LS_MAX_GROUP], b_map[LS_MAX_GROUP];
};
static_assert(sizeof(SplitKParams) <= 4096, "as much as a launch takes on older drivers");

#ifdef LS_HAS_SM90A
// In shared memory.
template <bool kChosen> struct Chosen {};
template <> struct Chosen<true> {
  Schedule schedule;
  int count;                    // of experts that are read
  short list[LS_MAX_EXPERTS];   // these, ascending
  short place[LS_MAX_EXPERTS];  // of each expert

  // By a warp. An expert is read if a token chose it with a gate that is not 0.
  __device__ __forceinline__ void make(const SplitKParams &p, int blocks) {
    constexpr int kAtOnce = 8;
    const int lane = threadIdx.x % 32, choices = p.tokens * p.top_k;
    unsigned set = 0;  // lane i: of experts 32 i to 32 i + 31, a bit for each
    for (int first = 0; first < choices; first += 32 * kAtOnce) {
      int64_t ids[kAtOnce];
      float gates[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = first + i * 32 + lane;
        ids[i] = at < choices ? p.experts[at] : -1, gates[i] = at < choices ? p.gates[at] : 0.f;
      }
      if (first == 0 && lane == 0) schedule = p;
#pragma unroll 1
      for (int word = 0; word * 32 < p.num_experts; ++word) {
        unsigned mine = 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          if (ids[i] >> 5 == word && ids[i] < p.num_experts && gates[i] != 0.f) mine |= 1u << (int(ids[i]) & 31);
        mine = __reduce_or_sync(~0u, mine);
        if (lane == word) set |= mine;
      }
    }
    int n = 0;
    for (int word = 0; word * 32 < p.num_experts; ++word) n += __popc(__shfl_sync(~0u, set, word));
    for (int word = 0, yes = 0, no = n; word * 32 < p.num_experts; ++word) {
      const unsigned bits = __shfl_sync(~0u, set, word), before = (1u << lane) - 1;
      const int expert = word * 32 + lane;
      if (bits >> lane & 1)
        list[place[expert] = short(yes + __popc(bits & before))] = short(expert);
      else if (expert < p.num_experts)
        place[expert] = short(no + __popc(~bits & before));
      yes += __popc(bits), no += __popc(~bits);
    }
    __syncwarp();
    if (lane > 0) return;
    count = n;
    for (int i = 0; i < p.n_items; ++i) schedule.expert_steps[i] = (n * p.linears[i].units_each * kUnit + kFeatures - 1) / kFeatures;
    deal_out_linears(schedule, p.linears, blocks);
  }
};

// What the kernel asks, of either. Of the linears, and of places, only once the list is there.
template <bool kChosen> struct Experts {
  const SplitKParams &p;
  const Chosen<kChosen> &chosen;
  __device__ __forceinline__ const Schedule &linears() const {
    if constexpr (kChosen)
      return chosen.schedule;
    else
      return p;
  }
  __device__ __forceinline__ int first(Phase phase, int blocks, int block) const {
    return kChosen && phase == kShrink ? first_of(p, kShrink, blocks, block) : first_of(linears(), phase, blocks, block);
  }
  __device__ __forceinline__ Segment segment(Phase phase, int at, int last) const {
    return kChosen && phase == kShrink ? segment_of(p, p.linears, kShrink, at, last) : segment_of(linears(), p.linears, phase, at, last);
  }
  __device__ __forceinline__ int count() const {
    if constexpr (kChosen)
      return chosen.count;
    else
      return p.num_experts;
  }
  // The expert of a place; from count() on none: the number of experts, or more.
  __device__ __forceinline__ int at(int place) const {
    if constexpr (kChosen)
      return place < chosen.count ? chosen.list[place] : p.num_experts;
    else
      return place;
  }
  // The place of an expert, or of what is left behind the last one in a linear's hidden.
  __device__ __forceinline__ int place_of(int expert) const {
    if constexpr (kChosen)
      return expert < p.num_experts ? chosen.place[expert] : expert;
    else
      return expert;
  }
};
#endif

}  // namespace ls
