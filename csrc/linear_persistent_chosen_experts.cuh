// The helper warps of linear_persistent.cu, with the experts that any token chose.
//
//   Chosen   the list of the experts that any token chose, and where a token's hidden of each of them is
//   Shrink   tiles of 16 rows of the chosen experts' lora_a times all tokens; split-K over the blocks: each block takes one part of the
//            features and publishes float32 partial sums of the hidden in memory
//   collect  waits until all blocks have published, adds the parts up, rounds: hidden [tokens, top_k, rank] in shared memory
//   Expand   for each 16-row tile of the panel: lora_b [16, chosen ranks] times the hidden, a partial sum for the epilogue
#pragma once
#include "chosen_experts.cuh"
#include "linear_persistent_experts.cuh"

namespace ls {
namespace {

namespace chosen_experts {

// The id of an entry [tokens, top_k] as it was given, and the expert that it means, -1 if it is none.
__device__ __forceinline__ int64_t given_id(const GroupParams &p, int entry) {
  return __ldcg(reinterpret_cast<const long long *>(p.g.experts) + entry);
}
__device__ __forceinline__ int expert_of(const GroupParams &p, int64_t id) { return id >= 0 && id < p.g.num_experts ? int(id) : -1; }

constexpr int larger(int a, int b) { return a > b ? a : b; }

// What a helper thread asks for at once, in pieces of 16 bytes: of a split of a tile of A, of x for it, and at most.
template <int NT> struct Pieces {
  static constexpr int kPiecesOfA = 8, kPiecesOfX = 4 * NT;
  static constexpr int kPieces = larger(2 * (kPiecesOfA + kPiecesOfX), 3 * kPiecesOfA + kPiecesOfX);
};

// The experts that any token chose, ascending, and where a token's hidden of each of them lies among those of the token.
template <int TOKENS> struct Chosen {
  static constexpr int kMost = TOKENS * LS_MAX_TOP_K;
  static_assert(kMost <= LS_MAX_EXPERTS && kMost % 4 == 0, "filled four at a time; a place is a short");
  unsigned bits[kExpertWords];  // the set; empty at first
  int count;                    // of the list
  bool twice;                   // a token has an expert twice; false at first
  short list[kMost];
  alignas(4) signed char slots[TOKENS * kMost];  // [tokens][count]: which of a token's top_k it is; -1: the token did not choose it

  // The ids that this thread has read join the set. A barrier later, make_list().
  template <int N> __device__ __forceinline__ void add(const int (&id)[N], int num_experts) {
    for (int word = 0; word * 32 < num_experts; ++word) {
      unsigned mine = 0;
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (id[i] >> 5 == word) mine |= 1u << (id[i] & 31);
      mine = __reduce_or_sync(0xffffffffu, mine);
      if (threadIdx.x % 32 == 0 && mine) atomicOr(&bits[word], mine);
    }
  }
  __device__ __forceinline__ bool has(int expert) const { return bits[expert / 32] >> expert % 32 & 1; }

  // By all helpers, a barrier at the end.
  __device__ __forceinline__ void make_list(int num_experts, int tokens) {
    const int thread = threadIdx.x - kThreads, lane = thread % 32, n = place_of(bits, (num_experts + 31) / 32 * 32);
    for (int word = thread / 32; word * 32 < num_experts; word += kHelpers)
      if (const int expert = word * 32 + lane; has(expert)) list[place_of(bits, expert)] = short(expert);
    if (thread == 0) count = n;
    for (int i = thread; i < (tokens * n + 3) / 4; i += kHelperThreads) reinterpret_cast<int *>(slots)[i] = -1;
    barrier(kHelping, kHelperThreads);
  }

  // By all helpers, after make_list(), a barrier at the end. If a token has an expert twice, which is unusual, every choice of every
  // token gets a place of its own in the list.
  __device__ __forceinline__ void make_slots(const short *ids, int tokens, int top_k) {
    const int thread = threadIdx.x - kThreads;
    if (thread < tokens)
      for (int j = 0; j < top_k; ++j) {
        const int expert = ids[thread * top_k + j];
        if (expert < 0) continue;
        signed char &slot = slots[thread * count + place_of(bits, expert)];
        if (slot >= 0) twice = true;
        slot = static_cast<signed char>(j);
      }
    barrier(kHelping, kHelperThreads);
    if (!twice) return;
    const int entries = tokens * top_k;
    for (int i = thread; i < tokens * entries; i += kHelperThreads) {
      const int entry = i % entries;
      slots[i] = entry / top_k == i / entries && ids[entry] >= 0 ? static_cast<signed char>(entry % top_k) : static_cast<signed char>(-1);
    }
    for (int i = thread; i < entries; i += kHelperThreads) list[i] = ids[i];  // -1 stays -1: none
    if (thread == 0) count = entries;
    barrier(kHelping, kHelperThreads);
  }
};

// What a helper thread asks for itself lies in shared memory of its own, a piece of 16 bytes every kHelperThreads pieces: no other
// thread reads it, so there are no barriers. It is where the other warps' partial sums of the first panel come later.
__device__ __forceinline__ uint4 &piece(uint4 *room, int i) { return room[i * kHelperThreads]; }

// The helpers' shrink: tiles of A, every `stride`-th from `tile`, times one part of the features, for the other blocks to see.
//
// The tiles are those of the chosen experts, so A is asked for when the ids have been read. But if there is a tile of all experts for
// each row of blocks, each takes that one (`every`): it can be asked for together with the ids. Two to four stages, each a split of a
// tile, are on their way at once, so that a tile costs its bytes and not a trip to memory. x is the same for all tiles: a part of one
// split stays, of more it comes with each stage.
template <class E, class Shape, int NT> struct Shrink {
  static constexpr int kChunks = kSlice * kWarps / kHelpers / kChunk;  // of a helper, of one split
  static constexpr int kA = Pieces<NT>::kPiecesOfA, kX = Pieces<NT>::kPiecesOfX;
  static constexpr int kMany = (Pieces<NT>::kPieces - kX) / kA;  // stages where x stays
  static_assert(kA == 2 * kChunks && kX == NT * kChunks && kMany > 2 && Pieces<NT>::kPieces >= 2 * (kA + kX), "room for the stages");
  const GroupParams &p;
  const Chosen<Shape::kTokens> &chosen;
  const bool every;
  const int part, first, last;  // splits
  const int stride;
  uint4 *const room;
  int tile, split, stage;  // what is asked for next, and where

  __device__ __forceinline__ Shrink(const GroupParams &params, const Chosen<Shape::kTokens> &experts, bool all, int number, int begin,
                                    int stride, uint4 *room)
      : p(params),
        chosen(experts),
        every(all),
        part(number),
        first(number * splits_each(p.g.in_features)),
        last(min(first + splits_each(p.g.in_features), splits_of(p.g.in_features))),
        stride(stride),
        room(room),
        tile(begin),
        split(first),
        stage(0) {}

  __device__ __forceinline__ int experts() const { return every ? p.g.num_experts : chosen.count; }
  __device__ __forceinline__ int tiles() const {
    return every ? p.shrink_begin[p.g.n_items] : shrink_tiles(p.g.items, p.g.n_items, chosen.count);
  }
  __device__ __forceinline__ int expert(int place) const { return place < 0 || every ? place : chosen.list[place]; }
  __device__ __forceinline__ bool x_stays() const { return last - first == 1; }
  __device__ __forceinline__ int stages() const { return x_stays() ? kMany : 2; }
  __device__ __forceinline__ int pieces_of_a(int stage) const { return kX + stage * (x_stays() ? kA : kA + kX); }
  __device__ __forceinline__ int pieces_of_x(int stage) const { return x_stays() ? 0 : stage * (kA + kX); }
  // This thread's first feature of a split; with chunks of 32 from there on, all lanes of a warp are inside in_features, or none.
  __device__ __forceinline__ int feature(int split) const {
    return (split * kHelpers + (threadIdx.x - kThreads) / 32) * kChunks * kChunk + threadIdx.x % 4 * kUnit;
  }
  __device__ __forceinline__ int token(int n) const { return n * 8 + threadIdx.x % 32 / 4; }

  __device__ __forceinline__ void ask_for_x(int split, int at) const {
    const int in = p.g.in_features, from = feature(split);
    const E *x = static_cast<const E *>(p.g.x) + from;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int n = 0; n < NT; ++n)
        if (from + c * kChunk < in && token(n) < p.g.tokens) copy16(&piece(room, at + c * NT + n), x + int64_t(token(n)) * in + c * kChunk);
  }
  __device__ __forceinline__ void ask_for_a(int tile, int split, int at) const {
    const ShrinkTile of = shrink_tile(p.g.items, experts(), tile);
    const ls_item &item = p.g.items[of.item];
    const int in = p.g.in_features, from = feature(split);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool there = of.place[h] >= 0;  // in place of rows that there are not the first: nobody takes those sums
      const int owner = expert(there ? of.place[h] : of.place[0]), rank = there ? of.rank[h] : of.rank[0];
      const E *a = static_cast<const E *>(item.lora_a) + (int64_t(owner) * item.rank + rank + threadIdx.x % 32 / 4) * in + from;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (from + c * kChunk < in) copy16(&piece(room, at + c * 2 + h), a + c * kChunk);
    }
  }
  // One stage, if there is one more: always one group of copies.
  __device__ __forceinline__ void ask(bool with_x) {
    if (tile < tiles()) {
      ask_for_a(tile, split, pieces_of_a(stage));
      if (with_x && !x_stays()) ask_for_x(split, pieces_of_x(stage));
    }
    copy_commit();
    if (++split == last) split = first, tile += stride;
    if (++stage == stages()) stage = 0;
  }
  // Before begin(); needs no ids.
  __device__ __forceinline__ void begin_with_x() const { ask_for_x(first, pieces_of_x(0)); }
  __device__ __forceinline__ void begin() {
#pragma unroll 1
    for (int i = 0; i < stages(); ++i) ask(i > 0);
  }

  __device__ __forceinline__ void multiply(int split, int stage, float (&sum)[NT][4]) const {
    const int from = feature(split);
    const uint4 zero = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (from + c * kChunk >= p.g.in_features) break;
      const uint4 a[2] = {piece(room, pieces_of_a(stage) + c * 2), piece(room, pieces_of_a(stage) + c * 2 + 1)};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4 x = token(n) < p.g.tokens ? piece(room, pieces_of_x(stage) + c * NT + n) : zero;
        mma32<E>(sum[n], a, x);
      }
    }
  }

  // After begin().
  __device__ __forceinline__ void run(int tile, const short *ids, const float *gates, float *partial) {
    const int thread = threadIdx.x - kThreads, helper = thread / 32, g = thread % 32 / 4, t = thread % 4, top_k = p.g.top_k;
    int stage = 0;
    for (; tile < tiles(); tile += stride) {
      const ShrinkTile at = shrink_tile(p.g.items, experts(), tile);
      const int of[2] = {expert(at.place[0]), expert(at.place[1])};
      if (every && !chosen.has(of[0]) && !(of[1] >= 0 && chosen.has(of[1]))) break;  // nobody will read it; and there is no other
      float sum[NT][4] = {};
      for (int split = first; split < last; ++split) {
        if (x_stays())
          copy_wait<kMany - 1>();
        else
          copy_wait<1>();
        multiply(split, stage, sum);
        ask(true);
        if (++stage == stages()) stage = 0;
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
      const int quad = thread % 4 * 4, token = thread / 4, owner = quad < kRanksOfUnit ? of[0] : of[1];
      const int rank = (quad < kRanksOfUnit ? at.rank[0] : at.rank[1]) + quad % kRanksOfUnit;
      float *sums = static_cast<float *>(p.g.hidden) + part * p.hidden_elements + p.hidden[at.item];
      static_assert(Shape::kTokens <= kHelperThreads / 4, "one token for each thread");
      if (owner < 0 || token >= p.g.tokens) continue;
      float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int k = 0; k < kHelpers; ++k)
        total = total + *reinterpret_cast<const float4 *>(partial + k * Shape::kShrinkPartial + token * Shape::kShrinkStride + quad);
      for (int j = 0; j < top_k; ++j) {
        const int entry = token * top_k + j;
        if (ids[entry] != owner) continue;
        const float gate = gates[entry] * item.scaling;
        *reinterpret_cast<float4 *>(sums + int64_t(entry) * item.rank + rank) =
            make_float4(gate * total.x, gate * total.y, gate * total.z, gate * total.w);
      }
    }
    barrier(kHelping, kHelperThreads);
    if (thread == 0) shrink_done(p.sync);
  }
};

// The helpers: the hidden of the block's linears, once `published` blocks have published theirs.
template <class E, int PIECES> __device__ __forceinline__ void collect(const GroupParams &p, int published, int parts, int first_tile,
                                                                       int n_tiles, const short *ids, uint4 *room, E *hidden,
                                                                       volatile bool &there) {
  const int thread = threadIdx.x - kThreads;
  if (thread == 0) there = wait_for_blocks(p, published);
  const int last = find_item(p, first_tile + n_tiles - 1);
  const int begin = int(p.hidden[find_item(p, first_tile)]), end = int(last + 1 < p.g.n_items ? p.hidden[last + 1] : p.hidden_elements);
  barrier(kHelping, kHelperThreads);
  if (there) {
    // Four elements at a time, so that sums of all parts are asked for at once, of as many as there is room for.
    constexpr int kAtOnce = PIECES / kMostParts;
    static_assert(kMostParts == 8, "of the sum below");
    const float *sums = static_cast<const float *>(p.g.hidden) + begin;
    const int quads = (end - begin) / 4;
    for (int first = thread; first < quads; first += kHelperThreads * kAtOnce) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int k = 0; k < kMostParts; ++k)
          if (const int quad = first + i * kHelperThreads; quad < quads && k < parts)
            copy16(&piece(room, i * kMostParts + k), sums + k * p.hidden_elements + quad * 4);
      copy_commit();
      copy_wait<0>();
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int quad = first + i * kHelperThreads;
        if (quad >= quads) break;
        float4 v[kMostParts];
#pragma unroll
        for (int k = 0; k < kMostParts; ++k)
          v[k] = k < parts ? reinterpret_cast<const float4 &>(piece(room, i * kMostParts + k)) : make_float4(0.f, 0.f, 0.f, 0.f);
        const float4 sum = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
        *reinterpret_cast<uint2 *>(hidden + begin + quad * 4) = make_uint2(pack2<E>(sum.x, sum.y), pack2<E>(sum.z, sum.w));
      }
    }
  } else {
    shrink_alone<E>(p, ids, hidden);
  }
  barrier(kHelping, kHelperThreads);
  if (thread == 0 && leave(p.sync, gridDim.x)) *p.sync = Sync{0, 0, 0, 0};
}

// A helper's part of the second product: what the experts add to every fourth tile of a panel of the weights, `tiles` from `begin` on.
// A lane takes the units of B (Units) one after the other through all of them, and asks for each kAhead of them before it is multiplied.
template <class E, class Shape, int NT> struct Expand {
  static constexpr int kAhead = 8;
  using List = Chosen<Shape::kTokens>;
  const GroupParams &p;
  const List &chosen;
  const E *hidden;  // of the group
  const int begin, tiles, count;

  struct Source {  // what is asked for next
    int tile, per_expert;  // elements
    const E *rows[2];      // this lane's, of the first expert
    Units units;
  };
  struct Step {  // what is multiplied next
    int tile;
    const uint4 *hidden;  // of the linear
    Units units;
  };
  Source source;
  Step step;
  uint4 b[kAhead][2];

  __device__ __forceinline__ Expand(const GroupParams &params, const List &experts, const E *hidden, int begin, int tiles)
      : p(params), chosen(experts), hidden(hidden), begin(begin), tiles(tiles), count(experts.count) {
    const int helper = (threadIdx.x - kThreads) / 32;
    enter(source, helper), enter(step, helper);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) load(b[i]);
  }
  __device__ __forceinline__ void enter(Source &at, int tile) const {
    at.tile = tile;
    if (tile >= tiles) return;
    const int i = find_item(p, begin + tile);
    const ls_item &item = p.g.items[i];
    const int rank = item.rank, row = (begin + tile - p.begin[i]) * kTile + threadIdx.x % 32 / 4, last = item.out_features - 1;
    at.per_expert = item.out_features * rank;
#pragma unroll
    for (int h = 0; h < 2; ++h) at.rows[h] = static_cast<const E *>(item.lora_b) + int64_t(min(row + h * 8, last)) * rank;
    at.units = Units(rank, count, threadIdx.x % 4);
  }
  __device__ __forceinline__ void enter(Step &at, int tile) const {
    at.tile = tile;
    if (tile >= tiles) return;
    const int i = find_item(p, begin + tile);
    at.hidden = reinterpret_cast<const uint4 *>(hidden + p.hidden[i]);
    at.units = Units(p.g.items[i].rank, count, threadIdx.x % 4);
  }
  __device__ __forceinline__ void load(uint4 (&to)[2]) {
    if (source.tile >= tiles) return;
    const int expert = source.units.place < count ? chosen.list[source.units.place] : -1;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      to[h] = make_uint4(0, 0, 0, 0);
      if (expert >= 0) to[h] = load_static(source.rows[h] + (int64_t(expert) * source.per_expert + source.units.unit * kUnit));
    }
    if (!source.units.next()) enter(source, source.tile + kHelpers);
  }
  __device__ __forceinline__ void multiply(const uint4 (&up)[2], float (&sum)[NT][4]) const {
    int slot[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = n * 8 + threadIdx.x % 32 / 4;
      slot[n] = step.units.place < count && token < p.g.tokens ? chosen.slots[token * count + step.units.place] : -1;
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int entry = (n * 8 + threadIdx.x % 32 / 4) * p.g.top_k + slot[n];
      uint4 h = make_uint4(0, 0, 0, 0);
      if (slot[n] >= 0) h = load_cached(step.hidden + entry * step.units.each + step.units.unit);
      mma32<E>(sum[n], up, h);
    }
  }
  // sums: [kTokens][kStride] for the panel. The hidden must be there.
  __device__ __forceinline__ void run(float *sums) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float sum[NT][4] = {};
    while (step.tile < tiles) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (step.tile >= tiles) break;
        multiply(b[i], sum);
        load(b[i]);
        if (step.units.next()) continue;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            sums[(n * 8 + t * 2 + k % 2) * Shape::kStride + step.tile * kTile + k / 2 * 8 + g] = sum[n][k];
            sum[n][k] = 0.f;
          }
        enter(step, step.tile + kHelpers);
      }
    }
  }
};

}  // namespace chosen_experts

struct ChosenExperts {
  static constexpr int kHidden = kPersistentHidden;
  static constexpr bool kChosenOnly = true;
  template <int NT> static constexpr int room_bytes(int sums) {
    return chosen_experts::larger(sums * 4, chosen_experts::Pieces<NT>::kPieces * kHelperThreads * 16);
  }
  template <int TOKENS> using Choice = chosen_experts::Chosen<TOKENS>;
  template <int TOKENS> static __device__ __forceinline__ void init(Choice<TOKENS> &chosen) {
    if (threadIdx.x < kExpertWords) chosen.bits[threadIdx.x] = 0;
    if (threadIdx.x == 0) chosen.twice = false;
  }
};

}  // namespace
}  // namespace ls
