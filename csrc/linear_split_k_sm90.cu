// GEMM with experts for up to 128 tokens on sm_90a (WGMMA, TMA, stream-K), one launch: out = [x | hidden] [weight | lora_b]^T + bias,
// hidden = gates * (x lora_a^T).
//
//   x [tokens, in]   weight [out, in]   lora_a [E, rank, in]   lora_b [E, out, rank]   bias [out]   out [tokens, out]
//   experts, gates [tokens, top_k]
//   hidden [tokens, width]: of all experts, times scaling and gate, 0 where a token did not choose; each linear's E * rank columns
//   padded to a multiple of 64
//   dtypes: float16, bfloat16, accumulated in float32; in, out and rank divisible by 8, pointers aligned to 16 bytes
//   tile: 128 outputs, or columns of the hidden (M of the tensor cores), by all tokens (N: 8, 32, 64 or 128), K in steps of 64
//   grid: one block a multiprocessor; the steps of all tiles of the group, one after the other, are dealt out evenly (stream-K)
//   block: 384 threads: two consumer warpgroups (WGMMA), 64 outputs each, one producer warp (TMA), three that tell other blocks of
//   partials, make the hidden of them, and wait for all of it
//   shared memory: a ring of six to eight stages (weight tile and x tile, 128-byte swizzle), results, sums; up to 225 KB
//   partials: float32 of a tile for each block, and for each that shrinks; flags and counters (Sync): words; all in global memory
//
// So few tokens leave the weights' bytes as the limit: each is read once, by as many blocks as there are, whatever the shape of the
// linear. A block begins in the midst of a tile and ends in the midst of another. What it has of the first, it leaves in its
// partials; whoever has the beginning of a tile adds those of the others and writes the result. It waits for blocks of a lower
// blockIdx only, so it never waits for one that has no room to begin.
//
// The shrink comes first, in tiles of lora_a, whose features several blocks share; these then get less of the weights. The experts
// are more of K, as in linear_sm90.cu, at the beginning of a tile, and taken last of it, when the hidden has long been there. With 9 to
// 32 tokens, where there may be many, they are spread over the tile (stream_k.cuh), as whoever had them all would be the last one. All
// blocks wait for those that shrink. Should these not come, because another stream's blocks keep them from a multiprocessor, each
// computes the hidden by itself, which takes milliseconds.
//
// Of ranks that are small the copy engine takes a row of lora_b as long as one of 64 features, so for 8, 16 and 32 a step's experts
// are copied as they lie.
#include "split_k_exchange.cuh"

namespace ls {
namespace {

constexpr int kWeightBytes = kRows * kFeatures * 2;
constexpr int kMostBytes = 226 << 10;  // of shared memory
// Stages that keep the memory busy, where they hold little but weights: with more, all that the helpers ask for waits behind them
// (docs/kernel_log.md, "Bytes in flight").
constexpr int kEnoughStages = 6, kFewTokens = 32;
constexpr int kAhead = 2;  // stages on their way while a block exchanges its share of the shrink with others

template <int kTokens> struct Shape {
  static constexpr int kInputBytes = kTokens * kFeatures * 2, kStageBytes = kWeightBytes + kInputBytes;
  static constexpr int kResultBytes = kTokens * kRows * 2;
  static constexpr int kRoom = (kMostBytes - 1024 - kResultBytes) / kStageBytes;
  static constexpr int kStages = kTokens <= kFewTokens ? kEnoughStages : kRoom;
  static_assert(kStages <= kRoom && kStages > kAhead, "room for the stages, and for those on their way");
  static constexpr bool kSpread = kSpreads<kTokens>;
  static constexpr Phase kLastPhase = kSpread ? kExperts : kLinear;
  static constexpr int kSumBytes = kSpread ? kTokens * kRows * 4 : 0;  // of a tile, kept: of a block's first and last
  static constexpr int kBytes =
      1024 + kStages * kStageBytes + kResultBytes + 2 * kSumBytes;  // of shared memory, from an address divisible by 1,024
};

// lora_b of a step's experts is copied in whole rows of outputs, [experts][kRows][rank] in shared memory. Rank 8 is units for the
// tensor cores.
__host__ __device__ __forceinline__ bool as_it_lies(const Sm90Linear &linear) {
  return linear.units_each == 1 || linear.units_each == 2 || linear.units_each == 4;
}

#ifdef LS_HAS_SM90A
// The bias of the outputs of a thread's sums, its rows g and g + 8 of its warp's 16.
template <class E> __device__ __forceinline__ float2 bias_of(const Sm90Linear &linear, int output) {
  const E *const bias = static_cast<const E *>(linear.bias);
  if (!bias) return make_float2(0.f, 0.f);
  return make_float2(output < linear.columns ? to_float(bias[output]) : 0.f,
                     output + 8 < linear.columns ? to_float(bias[output + 8]) : 0.f);
}

// Writes 16 outputs of all tokens, by a warp: through `room` in shared memory, 32 bytes a token, so that eight of a token go together.
template <class E, int kTokens> __device__ __forceinline__ void write_outputs(const Sm90Linear &linear, int tokens, int first,
                                                                              uint32_t room, const float (&sums)[kTokens / 2]) {
  const int lane = threadIdx.x % 32;
  const float2 bias = bias_of<E>(linear, first + lane / 4);
  auto place_of = [&](int token, int unit) { return room + token * 32 + (unit ^ token / 4 % 2) * 16; };
  __syncwarp();
#pragma unroll
  for (int chunk = 0; chunk < kTokens / 8; ++chunk) {
    const float *const v = sums + chunk * 4;
    write_transposed(place_of(chunk * 8 + lane % 8, lane / 8 % 2), pack2<E>(v[0] + bias.x, v[1] + bias.x),
                     pack2<E>(v[2] + bias.y, v[3] + bias.y));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < (kTokens + 15) / 16; ++i) {
    const int token = i * 16 + lane / 2, unit = lane % 2;
    if (token < tokens && first + unit * kUnit < linear.columns)
      *reinterpret_cast<uint4 *>(static_cast<E *>(linear.out) + int64_t(token) * linear.columns + first + unit * kUnit) =
          read_shared(place_of(token, unit));
  }
}
#endif

template <class E, int kTokens> __global__ void __launch_bounds__(kThreads, 1)
    linear_split_k_kernel(const __grid_constant__ SplitKParams p) {
#ifdef LS_HAS_SM90A
  using S = Shape<kTokens>;
  constexpr int kStages = S::kStages, kStageBytes = S::kStageBytes;
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages + 3];
  const uint32_t ring = (shared_address(raw) + 1023) / 1024 * 1024, full = shared_address(barriers), empty = full + kStages * 8,
                 hidden_there = empty + kStages * 8, published = hidden_there + 8, shrunk = published + 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x, block = blocks - 1 - blockIdx.x;
  const Phase first_phase = block >= blocks - p.shrink_blocks ? kShrink : kLinear;
  pdl_trigger();
  if (threadIdx.x == kMultiplying) {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, kMultiplying);
    mbarrier_init(hidden_there, 1), mbarrier_init(published, 1), mbarrier_init(shrunk, 1);
    mbarrier_inits_done();
  } else if (warp == kThreads / 32 - 1) {  // descriptors: copies would wait for them
    const int i = lane % LS_MAX_GROUP, kind = lane / LS_MAX_GROUP;
    if (i < p.n_items && kind == 0) prefetch_map(p.weight[i]);
    if (i < p.n_items && kind == 1 && first_phase == kShrink && p.linears[i].steps) prefetch_map(p.a_map[i]);
    if (i < p.n_items && kind == 2 && p.linears[i].steps && !as_it_lies(p.linears[i])) prefetch_map(p.b_map[i]);
    if (lane == 31 && p.width) prefetch_map(p.hidden_map);
  }
  if (warp == kMultiplying / 32) {  // goes on: nobody else has anything to tell it
    __syncwarp();
    arrive(kBegin, kThreads);
  } else {
    barrier(kBegin, kThreads);
  }
  RingPlace<kStages> place;
  if (warp >= kMultiplying / 32) {
    if (warp > kMultiplying / 32) {
      exchange_partials<E, kTokens>(p, blocks, block, hidden_there, published, shrunk);
    } else if (lane == 0) {
      bool waited = false;  // for the hidden
      int ahead = 0;  // stages of the linears
      bool has_later = false;
      for (int phase = first_phase; phase <= S::kLastPhase; ++phase) {
        const int first = first_of(p, Phase(phase), blocks, block), last = first_of(p, Phase(phase), blocks, block + 1);
        if (phase == kLinear) has_later = ls::has_later<S::kSpread>(p, p.linears, first, last);
        for (int at = first; at < last;) {
          const Segment s = segment_of<S::kSpread>(p, p.linears, Phase(phase), at, last);
          const Turn turn = turn_of(Phase(phase), s, has_later, at == first || s.next == last);
          at = s.next;
          const Sm90Linear &linear = p.linears[s.item];
          const CUtensorMap &weight_map = phase == kShrink ? p.a_map[s.item] : p.weight[s.item], &b_map = p.b_map[s.item];
          const int own = s.own;
#pragma unroll 1
          for (int i = turn.from; i < turn.to; ++i, place.next()) {
            const uint32_t weight = ring + place.stage * kStageBytes, x = weight + kWeightBytes, barrier = full + place.stage * 8;
            mbarrier_wait(empty + place.stage * 8, place.parity ^ 1);
            // A fence takes until the copies of its multiprocessor have come, so as long as they never cease. So they do, for a moment.
            if (phase != kShrink && ahead++ == kAhead && p.pauses && first_phase == kShrink) mbarrier_wait(published, 0);
            if (i < own) {
              mbarrier_expect(barrier, kStageBytes);
              const int feature = (s.first + i) * kFeatures;
              copy_tile(weight, weight_map, barrier, feature, s.column);
              copy_tile(x, p.x, barrier, feature, 0);
              continue;
            }
            const int units = (s.first_expert + i - own) * kStepUnits;
            if (as_it_lies(linear)) {
              const int rank = linear.units_each * kUnit, experts = kFeatures / rank,
                        bytes = min(kRows, linear.columns - s.column) * rank * 2;
              mbarrier_expect(barrier, S::kInputBytes + experts * bytes);
              for (int e = 0; e < experts; ++e) {
                const int expert =
                    min(units * kUnit / rank + e, p.num_experts - 1);  // the last step's hidden may have columns of none: zeros
                const E *const from = static_cast<const E *>(p.lora_b[s.item]) + (int64_t(expert) * linear.columns + s.column) * rank;
                copy_bytes(weight + e * (kRows * rank * 2), from, bytes, barrier);
              }
            } else {
              mbarrier_expect(barrier, kStageBytes);
              if (linear.units_each % kStepUnits == 0)  // one expert's
                copy_tile(weight, b_map, barrier, units % linear.units_each * kUnit, s.column, units / linear.units_each);
              else
                for (int u = 0; u < kStepUnits; ++u)
                  copy_tile(weight + u * (kRows * 16), b_map, barrier, 0, s.column, (units + u) % linear.units_each,
                            (units + u) / linear.units_each);
            }
            if (!waited) mbarrier_wait(hidden_there, 0), waited = true;
            copy_tile(x, p.hidden_map, barrier, linear.hidden + units * kUnit, 0);
          }
        }
      }
    }
    return;
  }

  const int group = warp / 4;
  float sums[kTokens / 2];
  // Sums that are kept of a block's first tile and its last, each thread's own: four floats at a time, those of all threads side by side.
  auto kept_at = [&](bool is_last, int i) {
    return ring + kStages * kStageBytes + S::kResultBytes + is_last * S::kSumBytes + (i * kMultiplying + threadIdx.x) * 16;
  };
  bool has_later = false;
  for (int phase = first_phase; phase <= S::kLastPhase; ++phase) {
    const int first = first_of(p, Phase(phase), blocks, block), last = first_of(p, Phase(phase), blocks, block + 1);
    if (phase == kLinear) has_later = ls::has_later<S::kSpread>(p, p.linears, first, last);
    for (int at = first; at < last;) {
      const Segment s = segment_of<S::kSpread>(p, p.linears, Phase(phase), at, last);
      const Turn turn = turn_of(Phase(phase), s, has_later, at == first || s.next == last);
      const Sm90Linear &linear = p.linears[s.item];
      const int own = s.own, part = at;
      at = s.next;
      if (phase == kExperts && turn.from == turn.to) continue;
      uint32_t before = 0;  // the barrier of the stage that products on their way still read
#pragma unroll 1
      for (int i = turn.from; i < turn.to; ++i) {
        const uint32_t weight = ring + place.stage * kStageBytes, x = weight + kWeightBytes;
        const bool swizzled = i < own || linear.units_each % kStepUnits == 0,
                   in_rows = i >= own && as_it_lies(linear) && linear.units_each > 1;
        const uint64_t a = swizzled ? swizzled_matrix(weight + group * (kWeightBytes / 2)) : unit_matrix(weight + group * (64 * 16), kRows),
                       b = swizzled_matrix(x);
        const int on = swizzled ? 32 >> 4 : 2 * kRows * 16 >> 4;
        mbarrier_wait(full + place.stage * 8, place.parity);
        hold(sums);
        if (in_rows) {  // through registers: the tensor cores find no rows of 32 or 64 bytes by themselves
          const int rank = linear.units_each * kUnit, row = group * 64 + warp % 4 * 16 + lane % 16;
          uint32_t fragments[kFeatures / 16][4];
#pragma unroll
          for (int k = 0; k < kFeatures / 16; ++k)
            read_fragments(weight + (k * 16 / rank * kRows + row) * (rank * 2) + k * 16 % rank * 2 + lane / 16 * 16, fragments[k]);
          wgmma_begin();
#pragma unroll
          for (int k = 0; k < kFeatures / 16; ++k) wgmma<E>(sums, fragments[k], b + k * (32 >> 4), i > turn.from || k > 0);
          wgmma_commit();
          wgmma_wait<0>();  // the registers are free
        } else {
          wgmma_begin();
#pragma unroll
          for (int k = 0; k < kFeatures / 16; ++k) wgmma<E>(sums, a + k * on, b + k * (32 >> 4), i > turn.from || k > 0);
          wgmma_commit();
        }
        if (i > turn.from) {
          wgmma_wait<1>();
          mbarrier_arrive(before);  // each thread for itself: it may have read the stage through registers
        }
        before = empty + place.stage * 8;
        place.next();
      }
      wgmma_wait<0>();
      hold(sums);
      if (turn.from < turn.to) mbarrier_arrive(before);
      if constexpr (S::kSpread) {
        if (phase == kLinear && turn.to < s.length()) {
#pragma unroll
          for (int i = 0; i < kTokens / 8; ++i)
            if (turn.kept) write_floats(kept_at(s.next == last, i), sums + 4 * i);
          continue;
        }
        // Added at the end: sums that come from elsewhere before products would have the compiler wait for each of them.
#pragma unroll
        for (int i = 0; i < kTokens / 8; ++i) {
          if (phase != kExperts || !turn.kept) break;
          float kept[4];
          read_floats(kept_at(s.next == last, i), kept);
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[4 * i + j] += kept[j];
        }
      }

      // A thread's part of a partial is that of its sums: four floats at a time, of eight tokens, those of all threads side by side.
      const bool any = s.column + group * 64 < s.columns;  // of this warpgroup's outputs
      auto partial_of = [&](int place) { return reinterpret_cast<float4 *>(p.partials) + place * kQuadsOfTile<kTokens> + threadIdx.x; };
      if (phase == kShrink || s.begin > 0) {
        float4 *const to = partial_of(phase == kShrink ? shrink_place(p, blocks, block, part) : block);
        if (any) {
#pragma unroll
          for (int i = 0; i < kTokens / 8; ++i)
            __stcg(to + i * kMultiplying, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
        }
        if (phase == kShrink) {
          arrive(kPartShrunk, kMultiplying + kHelping);
          if (at < last) barrier(kPartTaken, kMultiplying + kHelping);
        } else {
          arrive(kPartialLeft, kMultiplying + 32);
        }
        continue;
      }
      // All that the others have of the tile is asked for at once: a trip to memory takes as long as several steps.
      int others = 0;
      for (const int end = at + s.steps - s.end; first_of(p, kLinear, blocks, block + 1 + others) < end;) ++others;
      if (others > 0) {
        for (int i = threadIdx.x; i < others; i += kMultiplying) {
          unsigned there, *const flag = p.flags + block + 1 + i;
          do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
          while (!there);
          *flag = 0;
        }
        barrier(kFlags, kMultiplying);
        constexpr int kQuads = kTokens / 8,
                      kAtOnce = kQuads >= 8   ? 2
                                : kQuads >= 4 ? 4
                                              : 8,
                      kBatch = kQuads >= 8 ? 8 : kQuads;  // 64 registers
        if (any) {
#pragma unroll
          for (int batch = 0; batch < kQuads; batch += kBatch)
            for (int first = 0; first < others; first += kAtOnce) {
              float4 v[kAtOnce][kBatch];
#pragma unroll
              for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int q = 0; q < kBatch; ++q)
                  v[i][q] = first + i < others ? __ldcg(partial_of(block + 1 + first + i) + (batch + q) * kMultiplying)
                                               : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
              for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int q = 0; q < kBatch; ++q) {
                  float *const sum = sums + (batch + q) * 4;
                  sum[0] += v[i][q].x, sum[1] += v[i][q].y, sum[2] += v[i][q].z, sum[3] += v[i][q].w;
                }
            }
        }
      }

      if (any)
        write_outputs<E, kTokens>(linear, p.tokens, s.column + warp * 16, ring + kStages * kStageBytes + warp * (kTokens * 32), sums);
    }
  }
#endif
}

int tile_tokens(const ls_group &g) { return g.tokens <= 8 ? 8 : g.tokens <= 32 ? 32 : g.tokens <= 64 ? 64 : 128; }

template <class E, int kTokens> int launch_shape(SplitKParams &p, const ls_group &g, int blocks, void *stream) {
  constexpr auto kernel = linear_split_k_kernel<E, kTokens>;
  constexpr int kBytes = Shape<kTokens>::kBytes;
  const cudaError_t error = allow_shared<kernel>(g.device, kBytes);
  if (error != cudaSuccess) return error;
  const uint64_t in = g.in_features, tokens = g.tokens, width = p.width;
  const Dimension x[] = {{in, 1, kFeatures}, {tokens, in, kTokens}}, hidden[] = {{width, 1, kFeatures}, {tokens, width, kTokens}};
  bool made = make_map(p.x, g.dtype, g.x, x, 2, true) && (!width || make_map(p.hidden_map, g.dtype, g.hidden, hidden, 2, true));
  for (int i = 0; i < g.n_items && made; ++i) {
    const ls_item &item = g.items[i];
    const Dimension weight[] = {{in, 1, kFeatures}, {uint64_t(item.out_features), in, kRows}},
                    a[] = {{in, 1, kFeatures}, {uint64_t(g.num_experts) * item.rank, in, kRows}};
    made = make_map(p.weight[i], g.dtype, item.weight, weight, 2, true);
    if (!item.rank) continue;
    made = made && make_map(p.a_map[i], g.dtype, item.lora_a, a, 2, true) &&
           (as_it_lies(p.linears[i]) || make_b_map(p.b_map[i], g, item, kRows, kRows));
  }
  if (!made) return LS_ERROR_ARGUMENT;
  // Not beside the launch before it: x has to be there.
  return launch<SplitKParams>(kernel, dim3(unsigned(blocks)), dim3(kThreads), p, stream, false, kBytes);
}

template <class E> int launch_dtype(SplitKParams &p, const ls_group &g, int blocks, void *stream) {
  switch (tile_tokens(g)) {
    case 8: return launch_shape<E, 8>(p, g, blocks, stream);
    case 32: return launch_shape<E, 32>(p, g, blocks, stream);
    case 64: return launch_shape<E, 64>(p, g, blocks, stream);
    default: return launch_shape<E, 128>(p, g, blocks, stream);
  }
}

int64_t partial_elements(const ls_group &g) { return int64_t(multiprocessors(g.device)) * tile_tokens(g) * kRows * 2; }

}  // namespace

bool can_split_k(const ls_group &g) { return g.tokens <= LS_SPLIT_K_TOKENS && can_sm90(g); }

int64_t split_k_elements(const ls_group &g) { return 2 * partial_elements(g); }

int split_k_words(const ls_group &g) { return 2 * multiprocessors(g.device); }

int launch_linear_split_k(GroupParams &params, Sync *sync, void *stream) {
  const ls_group &g = params.g;
  SplitKParams p = {};
  p.n_items = g.n_items, p.tokens = g.tokens, p.top_k = g.top_k, p.num_experts = g.num_experts, p.in_features = g.in_features;
  p.steps = (g.in_features - 1) / kFeatures + 1, p.width = int(params.hidden_elements / g.tokens);
  p.input = g.x, p.hidden = g.hidden, p.experts = g.experts, p.gates = g.gates;
  p.sync = sync, p.flags = reinterpret_cast<unsigned *>(sync + 1), p.arrived = p.flags + multiprocessors(g.device);
  p.partials = reinterpret_cast<float *>(static_cast<uint16_t *>(g.hidden) + params.hidden_elements);  // its rows are divisible by 64
  int64_t bytes = 0;
  for (int i = 0; i < g.n_items; ++i) {
    bytes += int64_t(g.num_experts) * g.items[i].rank * g.in_features * 2;
    p.linears[i] = linear_of(params, i);
    p.lora_a[i] = g.items[i].lora_a, p.lora_b[i] = g.items[i].lora_b;
  }
  p.patience = g.tuning & LS_TUNING_IMPATIENT ? 0 : kPatience + int(bytes / kBytesOfPatience);
  const int blocks = deal_out(p, p.linears, multiprocessors(g.device));
  if (!blocks) return LS_ERROR_ARGUMENT;
  return g.dtype == LS_BFLOAT16 ? launch_dtype<bf16>(p, g, blocks, stream) : launch_dtype<fp16>(p, g, blocks, stream);
}

}  // namespace ls
