// What the blocks of linear_split_k_sm90.cu tell each other: of their partial sums, and of the hidden, which is made of partial sums of
// the shrink. Or, where others do not come, by each block for itself.
#pragma once
#include "linear_sm90.cuh"
#include "stream_k.cuh"

namespace ls {

static_assert(kFeatures == kSm90Features, "rows of the hidden are padded to steps");

// Operands of linear_split_k_sm90.cu.
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

// How often is asked for other blocks' part of the hidden until it is not waited for any longer: so often, and once more for every so
// many bytes of lora_a. It takes half a microsecond or more each time. (By the clock, a launch would give up that has been stopped for
// another process.)
constexpr int kPatience = 2000, kBytesOfPatience = 1 << 19;

constexpr int kMultiplying = 256, kHelping = 96;
constexpr int kThreads = kMultiplying + 32 + kHelping;  // eight warps that multiply, one that copies, three that exchange
template <int kTokens> constexpr int kQuadsOfTile = kTokens * kRows / 4;  // of a block's partials: four floats each
// Of 9 to 32 tokens, the steps of experts are spread over a tile. With 8 that is slower, with more there is no room for the sums.
template <int kTokens> constexpr bool kSpreads = kTokens == 32;
// Named barriers: before anything; of the helpers; of consumers and helpers, or of consumers alone (kFlags).
constexpr int kBegin = 1, kHelpers = 2, kPartShrunk = 3, kPartTaken = 4, kPartialLeft = 5, kFlags = 6;

#ifdef LS_HAS_SM90A
// What an expert's hidden of a token is multiplied by; 0: it was not chosen, or is none.
__device__ __forceinline__ float gate_of(const SplitKParams &p, const Sm90Linear &linear, int token, int expert) {
  float gate = 0.f;
  if (token >= p.tokens || expert >= p.num_experts) return gate;
  for (int j = 0; j < p.top_k; ++j) {
    const int64_t at = int64_t(token) * p.top_k + j;
    const float value = p.gates[at];
    if (p.experts[at] == expert) gate += value;
  }
  return gate * linear.scaling;
}

// Of two experts, for a token and the next. All that it reads is asked for at once.
__device__ __forceinline__ void gates_of(const SplitKParams &p, const Sm90Linear &linear, int token, int low, int high, float (&gates)[4]) {
  int64_t ids[2][LS_MAX_TOP_K];
  float values[2][LS_MAX_TOP_K];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < LS_MAX_TOP_K; ++j) {
      const bool there = token + i < p.tokens && j < p.top_k;
      const int64_t at = int64_t(token + i) * p.top_k + j;
      ids[i][j] = there ? p.experts[at] : -1, values[i][j] = there ? p.gates[at] : 0.f;
    }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int expert = i / 2 ? high : low;
    float gate = 0.f;
#pragma unroll
    for (int j = 0; j < LS_MAX_TOP_K; ++j)
      if (ids[i % 2][j] == expert && expert < p.num_experts) gate += values[i % 2][j];
    gates[i] = gate * linear.scaling;
  }
}

// Waits, for one thread, until a counter has come to `wanted`. False: not in reasonable time, for this block or for another one.
__device__ __forceinline__ bool wait_for(const SplitKParams &p, const unsigned *counter, int wanted) {
  volatile unsigned *const given_up = &p.sync->ticket;
  for (int asked = 0;; ++asked) {
    unsigned there;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(counter) : "memory");
    if (int(there) >= wanted) return true;
    if (asked >= p.patience) {
      *given_up = 1;
      return false;
    }
    if (asked >= p.patience / 32 && *given_up) return false;
  }
}

// The hidden of the whole group, by a warp.
template <class E> __device__ __noinline__ void shrink_alone(const SplitKParams &p) {
  const int lane = threadIdx.x % 32, in = p.in_features;
  for (int i = 0; i < p.n_items; ++i) {
    const Sm90Linear &linear = p.linears[i];
    const int rank = linear.units_each * kUnit, columns = linear.steps * kFeatures;
    for (int token = 0; token < p.tokens; ++token) {
      E *const to = static_cast<E *>(p.hidden) + int64_t(token) * p.width + linear.hidden;
      const E *const x = static_cast<const E *>(p.input) + int64_t(token) * in;
      for (int first = 0; first < columns; first += rank) {
        const int expert = first / rank;
        const float gate = gate_of(p, linear, token, expert);
        if (gate == 0.f) {
          for (int c = first + lane; c < min(first + rank, columns); c += 32) to[c] = from_float<E>(0.f);
          continue;
        }
        for (int c = first; c < first + rank; ++c) {
          const E *const a = static_cast<const E *>(p.lora_a[i]) + int64_t(c) * in;
          float sum = 0.f;
          for (int k = lane * kUnit; k < in; k += 32 * kUnit) {
            const uint4 of_a = load_static(a + k), of_x = load_cached(x + k);
            const uint32_t *const pairs_a = &of_a.x, *const pairs_x = &of_x.x;
#pragma unroll
            for (int pair = 0; pair < kUnit / 2; ++pair) {
              const float2 fa = unpack2<E>(pairs_a[pair]), fx = unpack2<E>(pairs_x[pair]);
              sum += fa.x * fx.x + fa.y * fx.y;
            }
          }
          sum = warp_sum(sum);
          if (lane == 0) to[c] = from_float<E>(gate * sum);
        }
      }
    }
  }
}

// By a warp: when it returns, the hidden is where the copy engine finds it.
template <class E> __device__ __noinline__ void wait_for_hidden(const SplitKParams &p) {
  const bool there = __shfl_sync(~0u, threadIdx.x % 32 || wait_for(p, &p.sync->done, p.parts), 0);
  if (!there) shrink_alone<E>(p), __threadfence();
  async_fence();
  __syncwarp();
}

// The helpers: of the block's parts of the shrink, of all blocks' parts, and of the tile that it begins in the midst of. They arrive at
// three mbarriers, once each: at `hidden_there` when the hidden is where the copy engine finds it, and in a block that shrinks at
// `published` when it has done its part of that, and at `shrunk` when this is certain to have come first. (Flags in shared memory would
// do, but racecheck takes them for what they look like.)
template <class E, int kTokens> __device__ __forceinline__ void exchange_partials(const SplitKParams &p, int blocks, int block,
                                                                                  uint32_t hidden_there, uint32_t published,
                                                                                  uint32_t shrunk) {
  const int thread = threadIdx.x - (kMultiplying + 32), lane = thread % 32, g = lane / 4, t = lane % 4;
  const int first = first_of(p, kShrink, blocks, block), last = first_of(p, kShrink, blocks, block + 1);
  for (int part = first; part < last; ++part) {
    const int tile = part / p.shares, share = part - tile * p.shares;
    const Segment s = segment_of<kSpreads<kTokens>>(p, p.linears, kShrink, part, last);
    const Sm90Linear &linear = p.linears[s.item];
    const int rank = linear.units_each * kUnit;
    // A thread has what a consumer's thread has of eight tokens: two tokens of two columns.
    auto column_of = [&](int place) { return s.column + place / 32 * 16 + g; };
    float gates[4];
    auto find_gates = [&](int chunk, int place) {
      gates_of(p, linear, chunk * 8 + t * 2, column_of(place) / rank, (column_of(place) + 8) / rank, gates);
    };
    // The shares deal out all places of the tile's columns, for eight tokens after the other.
    const int places = s.column + 64 < s.columns ? kMultiplying : kMultiplying / 2, all = (p.tokens + 7) / 8 * places,
              begin = share * kHelping + thread;
    find_gates(begin / places, begin % places);
    barrier(kPartShrunk, kMultiplying + kHelping);
    if (thread == 0 && p.shares > 1) asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p.arrived + tile) : "memory");
    bool there = true;  // all that this warp adds up; if not, every block computes the hidden for itself
    if (lane == 0 && p.shares > 1 && share * kHelping < all) there = wait_for(p, p.arrived + tile, p.shares);
    there = __shfl_sync(~0u, there, 0);
    __syncwarp();  // what the first lane has seen, the others see: a shuffle alone does not promise that
    constexpr int kQuads = kQuadsOfTile<kTokens>;
    for (int at = begin; at < all && there; at += p.shares * kHelping) {
      const int chunk = at / places, place = at % places;
      const float4 *const from = reinterpret_cast<const float4 *>(p.partials) +
                                 int64_t(shrink_place(p, blocks, block, tile * p.shares)) * kQuads + chunk * kMultiplying + place;
      float4 v[kMostShares], sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int i = 0; i < kMostShares; ++i) v[i] = i < p.shares ? __ldcg(from + i * kQuads) : sum;
      if (at != begin) find_gates(chunk, place);
#pragma unroll
      for (int i = 0; i < kMostShares; ++i) sum.x += v[i].x, sum.y += v[i].y, sum.z += v[i].z, sum.w += v[i].w;
      const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
      const int token = chunk * 8 + t * 2;
      E *const to = static_cast<E *>(p.hidden) + int64_t(token) * p.width + linear.hidden + column_of(place);
#pragma unroll
      for (int i = 0; i < 4; ++i)  // what was not chosen may be anything
        if (token + i % 2 < p.tokens) to[i % 2 * p.width + i / 2 * 8] = from_float<E>(gates[i] == 0.f ? 0.f : sums[i] * gates[i]);
    }
    there = barrier_all(kHelpers, kHelping, there);
    if (thread == 0 && there) shrink_done(p.sync);
    if (part + 1 < last) arrive(kPartTaken, kMultiplying + kHelping);
  }
  if (first < last && thread == 0) {
    mbarrier_arrive(published);
    __threadfence();
    mbarrier_arrive(shrunk);
  }
  if (p.width && thread >= kHelping - 32) {
    // Not by the producer: the fence within it waits for copies that are on their way, and the next ones would be late.
    wait_for_hidden<E>(p);
    if (lane == 0) {
      mbarrier_arrive(hidden_there);
      if (first < last) mbarrier_wait(shrunk, 0);
      if (leave(p.sync, blocks)) {
        *p.sync = Sync{0, 0, 0, 0};
        if (p.shares > 1)
          for (int i = 0; i < p.parts / p.shares; ++i) p.arrived[i] = 0;
      }
    }
  }
  const int begin = first_of(p, kLinear, blocks, block), end = first_of(p, kLinear, blocks, block + 1);
  if (thread >= 32 || begin == end || segment_of<kSpreads<kTokens>>(p, p.linears, kLinear, begin, end).begin == 0) return;
  barrier(kPartialLeft, kMultiplying + 32);
  if (thread == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(p.flags + block) : "memory");
}
#endif

}  // namespace ls
