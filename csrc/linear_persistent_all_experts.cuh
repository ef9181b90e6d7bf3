// The helper warps of linear_persistent.cu, with all experts.
//
//   Shrink   tiles of 16 rows of lora_a [E * rank, in] times all tokens; split-K over the blocks: each block takes one part of the
//            features and publishes float32 partial sums of the hidden in memory
//   collect  waits until all blocks have published, adds the parts up, rounds: hidden [tokens, top_k, rank] in shared memory
//   Expand   for each 16-row tile of the panel: lora_b [16, E * rank] (or with few choices an entry of it for each of them) times the
//            hidden, a partial sum for the epilogue
#pragma once
#include "linear_persistent_experts.cuh"

namespace ls {
namespace {

namespace all_experts {

// Which tile of all experts' A: of which linear, beginning with which row.
struct ShrinkTile {
  int item, row;
};
__device__ __forceinline__ ShrinkTile shrink_tile(const GroupParams &p, int tile) {
  int item = 0;
  while (tile >= p.shrink_begin[item + 1]) ++item;
  return ShrinkTile{item, (tile - p.shrink_begin[item]) * kTile};
}

// The helpers' shrink: tiles of A, every `stride`-th from `tile`, times one part of the features, for the other blocks to see.
template <class E, class Shape, int NT> struct Shrink {
  static constexpr int kChunks = kSlice * kWarps / kHelpers / kChunk;  // of a helper, of one split
  const GroupParams &p;
  const int part, first, last;  // splits
  uint4 w[kChunks][2], x[kChunks][NT];

  __device__ __forceinline__ Shrink(const GroupParams &params, int number)
      : p(params),
        part(number),
        first(number * splits_each(p.g.in_features)),
        last(min(first + splits_each(p.g.in_features), splits_of(p.g.in_features))) {}

  __device__ __forceinline__ void load(const ShrinkTile &at, int split) {
    const int helper = (threadIdx.x - kThreads) / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, in = p.g.in_features;
    const ls_item &item = p.g.items[at.item];
    const int feature = (split * kHelpers + helper) * kChunks * kChunk + t * kUnit, last_row = p.g.num_experts * item.rank - 1;
    const E *a = static_cast<const E *>(item.lora_a) + feature, *input = static_cast<const E *>(p.g.x) + feature;
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const bool inside = feature + c * kChunk < in;
#pragma unroll
      for (int h = 0; h < 2; ++h) w[c][h] = inside ? load_static(a + int64_t(min(at.row + h * 8 + g, last_row)) * in + c * kChunk) : zero;
#pragma unroll
      for (int n = 0; n < NT; ++n)
        x[c][n] = inside && n * 8 + g < p.g.tokens ? load_cached(input + int64_t(n * 8 + g) * in + c * kChunk) : zero;
    }
  }

  __device__ __forceinline__ bool chosen(const ShrinkTile &at, const short *ids) const {
    const int rank = p.g.items[at.item].rank, entries = p.g.tokens * p.g.top_k;
    bool any = false;
    for (int i = threadIdx.x % 32; i < entries; i += 32) any |= ids[i] >= at.row / rank && ids[i] <= (at.row + kTile - 1) / rank;
    return __any_sync(0xffffffffu, any);
  }

  // Of the first tile, the first split has been asked for.
  __device__ __forceinline__ void run(int tile, int stride, bool most, const short *ids, const float *gates, float *partial) {
    const int thread = threadIdx.x - kThreads, helper = thread / 32, g = thread % 32 / 4, t = thread % 4, top_k = p.g.top_k;
    for (bool loaded = true; tile < p.shrink_begin[p.g.n_items]; tile += stride, loaded = false) {
      const ShrinkTile at = shrink_tile(p, tile);
      if (!most && !chosen(at, ids)) continue;  // nobody will read it
      float sum[NT][4] = {};
      for (int split = first; split < last; ++split, loaded = false) {
        if (!loaded) load(at, split);
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
          for (int n = 0; n < NT; ++n) mma32<E>(sum[n], w[c], x[c][n]);
      }
      barrier(kHelping, kHelperThreads);  // the tile before this one has been summed up
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          partial[helper * Shape::kShrinkPartial + (n * 8 + t * 2 + i % 2) * Shape::kShrinkStride + i / 2 * 8 + g] = sum[n][i];
      barrier(kHelping, kHelperThreads);
      // Four rows of A and a token for each thread. Ranks are divisible by 8: the rows are of one expert.
      const ls_item &item = p.g.items[at.item];
      const int rank = item.rank, quad = thread % 4 * 4, row = at.row + quad, token = thread / 4;
      float *sums = static_cast<float *>(p.g.hidden) + part * p.hidden_elements + p.hidden[at.item];
      static_assert(Shape::kTokens <= kHelperThreads / 4, "one token for each thread");
      if (row >= p.g.num_experts * rank || token >= p.g.tokens) continue;
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int k = 0; k < kHelpers; ++k)
        total = total + *reinterpret_cast<const float4 *>(partial + k * Shape::kShrinkPartial + token * Shape::kShrinkStride + quad);
      for (int j = 0; j < top_k; ++j) {
        const int entry = token * top_k + j;
        if (ids[entry] != row / rank) continue;
        const float gate = gates[entry] * item.scaling;
        *reinterpret_cast<float4 *>(sums + int64_t(entry) * rank + row % rank) =
            make_float4(gate * total.x, gate * total.y, gate * total.z, gate * total.w);
      }
    }
    barrier(kHelping, kHelperThreads);
    if (thread == 0) shrink_done(p.sync);
  }
};

// The helpers: the hidden of the block's linears, once `published` blocks have published theirs.
template <class E> __device__ __forceinline__ void collect(const GroupParams &p, int published, int parts, int first_tile, int n_tiles,
                                                           const short *ids, E *hidden, volatile bool &there) {
  const int thread = threadIdx.x - kThreads;
  if (thread == 0) there = wait_for_blocks(p, published);
  const int last = find_item(p, first_tile + n_tiles - 1);
  const int begin = int(p.hidden[find_item(p, first_tile)]), end = int(last + 1 < p.g.n_items ? p.hidden[last + 1] : p.hidden_elements);
  barrier(kHelping, kHelperThreads);
  if (there) {
    static_assert(kMostParts == 8, "all in flight at once");
    const float *sums = static_cast<const float *>(p.g.hidden);
    for (int i = begin + thread * 4; i < end; i += kHelperThreads * 4) {
      float4 v[kMostParts];
#pragma unroll
      for (int k = 0; k < kMostParts; ++k)
        v[k] = k < parts ? __ldcg(reinterpret_cast<const float4 *>(sums + k * p.hidden_elements + i)) : make_float4(0.f, 0.f, 0.f, 0.f);
      const float4 sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
      *reinterpret_cast<uint2 *>(hidden + i) = make_uint2(pack2<E>(sum.x, sum.y), pack2<E>(sum.z, sum.w));
    }
  } else {
    shrink_alone<E>(p, ids, hidden);
  }
  barrier(kHelping, kHelperThreads);
  if (thread == 0 && leave(p.sync, gridDim.x)) *p.sync = Sync{0, 0, 0, 0};
}

// Where an expert's hidden lies among those of a token: which of its top_k; -1: the token did not choose it.
struct Slots {
  static constexpr int kMost = 2048;
  signed char of[kMost];  // [tokens][num_experts]
  bool useful;            // there is room, and no token has an expert twice
};

__device__ __forceinline__ void fill(const GroupParams &p, const short *ids, Slots &slots) {
  const int thread = threadIdx.x - kThreads, experts = p.g.num_experts, n = p.g.tokens * experts;
  if (thread == 0) slots.useful = n <= Slots::kMost;
  for (int i = thread; i < min(n, Slots::kMost); i += kHelperThreads) slots.of[i] = -1;
  barrier(kHelping, kHelperThreads);
  if (n <= Slots::kMost && thread < p.g.tokens)
    for (int j = 0; j < p.g.top_k; ++j) {
      const int e = ids[thread * p.g.top_k + j];
      if (e < 0) continue;
      if (slots.of[thread * experts + e] >= 0) slots.useful = false;
      slots.of[thread * experts + e] = static_cast<signed char>(j);
    }
  barrier(kHelping, kHelperThreads);
}

// A helper's part of the second product: what the experts add to one tile of the weight.
template <class E, class Shape, int NT> struct Expand {
  static constexpr int kFirst = 2;  // chunks of B that are asked for early
  ExpertColumns experts;
  int row, last;

  __device__ __forceinline__ Expand(const GroupParams &p, int tile, const E *hidden) : Expand(p, tile, find_item(p, tile), hidden) {}
  __device__ __forceinline__ Expand(const GroupParams &p, int tile, int item, const E *hidden) : experts(p, item) {
    if (p.sync) experts.hidden = reinterpret_cast<const char *>(hidden + p.hidden[item]);
    row = (tile - p.begin[item]) * kTile + threadIdx.x % 32 / 4, last = p.g.items[item].out_features - 1;
    if (experts.rank == 0) experts.chunks = 0;
  }
  __device__ __forceinline__ void load(int chunk, const short *ids, uint4 (&to)[2]) const {
    experts.template load_b<E>(experts.unit_of(chunk, ids), min(row, last), min(row + 8, last), to);
  }
  __device__ __forceinline__ void load_first(const short *ids, uint4 (&b)[kFirst][2]) const {
#pragma unroll
    for (int c = 0; c < kFirst; ++c)
      if (c < experts.chunks) load(c, ids, b[c]);
  }
  __device__ __forceinline__ void multiply(int chunk, const short *ids, const Slots &slots, const uint4 (&up)[2],
                                           float (&sum)[NT][4]) const {
    const ExpertColumns::Unit unit = experts.unit_of(chunk, ids);
    uint4 h[NT];
    if (experts.by_pair || !slots.useful) {
      experts.template load_hidden<E, NT>(unit, ids, h);
    } else {
      int slot[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int token = n * 8 + threadIdx.x % 32 / 4;
        slot[n] = unit.expert >= 0 && token < experts.tokens ? slots.of[token * experts.num_experts + unit.expert] : -1;
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int entry = (n * 8 + threadIdx.x % 32 / 4) * experts.top_k + slot[n];
        h[n] = make_uint4(0, 0, 0, 0);
        if (slot[n] >= 0) h[n] = load_cached(reinterpret_cast<const E *>(experts.hidden) + entry * experts.rank + unit.offset);
      }
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) mma32<E>(sum[n], up, h[n]);
  }
  // [kTokens][kStride] from `sums`. b: what load_first() loaded.
  __device__ __forceinline__ void run(const short *ids, const Slots &slots, const uint4 (&b)[kFirst][2], float *sums) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sum[NT][4] = {};
#pragma unroll
    for (int c = 0; c < kFirst; ++c)
      if (c < experts.chunks) multiply(c, ids, slots, b[c], sum);
    constexpr int kAhead = 4;
    for (int chunk = kFirst; chunk < experts.chunks; chunk += kAhead) {
      uint4 more[kAhead][2];
#pragma unroll
      for (int c = 0; c < kAhead; ++c)
        if (chunk + c < experts.chunks) load(chunk + c, ids, more[c]);
#pragma unroll
      for (int c = 0; c < kAhead; ++c)
        if (chunk + c < experts.chunks) multiply(chunk + c, ids, slots, more[c], sum);
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[(n * 8 + t * 2 + i % 2) * Shape::kStride + i / 2 * 8 + g] = sum[n][i];
  }
};

}  // namespace all_experts

struct AllExperts {
  static constexpr int kHidden = 4096;
  static constexpr bool kChosenOnly = false;
  template <int NT> static constexpr int room_bytes(int sums) { return sums * 4; }
  template <int TOKENS> using Choice = all_experts::Slots;
  template <int TOKENS> static __device__ __forceinline__ void init(Choice<TOKENS> &) {}
};

}  // namespace
}  // namespace ls
