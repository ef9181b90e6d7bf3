// GEMM with experts for many tokens on sm_90a (WGMMA, TMA, clusters): out = [x | hidden] [weight | lora_b]^T + bias.
//
//   x [tokens, in]   weight [out, in]   lora_b [E, out, rank]   bias [out]   out [tokens, out]
//   hidden [tokens, width]: of all experts, times their gates, 0 where a token did not choose; each linear's E * rank columns padded
//   to a multiple of 64 (shrink_sm90.cu, or this kernel with kShrink)
//   dtypes: float16, bfloat16, accumulated in float32; in, out and rank divisible by 8, pointers aligned to 16 bytes
//   tile: 128 tokens by kOutputs (128 or 256) outputs, K in steps of 64
//   cluster: 2 blocks with the same outputs and neighbouring tokens; each loads half of the weight tile for both (TMA multicast)
//   block: 384 threads: one producer warp (TMA) in the first warpgroup, two consumer warpgroups (WGMMA), 64 tokens each
//   grid: persistent, one block a multiprocessor; pairs of tiles of all linears of the group are shared out
//   shared memory: a ring of stages (x tile and weight tile, 128-byte swizzle), 192 KB; kShrink: gates of the tile's tokens
//
// The experts are more of the inner dimension K: with 8 experts of rank 8 one step after the 64 steps of in = 4096, and no trip to
// memory for a sum of two results. kShrink: weight is lora_a of all experts, and the epilogue multiplies by the gates instead.
#include "linear_sm90.cuh"

namespace ls {
namespace {

constexpr int kTokens = 128;                    // of a tile
constexpr int kFeatures = kSm90Features;        // of a step
constexpr int kThreads = 384;                   // four warps of which one copies, eight that multiply
constexpr int kCluster = 2;
constexpr int kInputBytes = kTokens * kFeatures * 2;
constexpr int kRingBytes = 192 << 10;

struct LinearSm90Params {
  CUtensorMap x, hidden, weight[LS_MAX_GROUP], lora_b[LS_MAX_GROUP];
  Sm90Linear linears[LS_MAX_GROUP];
  const int64_t *experts;
  const float *gates;
  int begin[LS_MAX_GROUP + 1];  // first pair of tiles of each linear
  int stride;                   // of the results; 0: the columns of each
  int n_items, tokens, top_k, num_experts;
  int steps;      // of in_features
  int row_pairs;  // pairs of tiles that cover all tokens
};

// Gates of a tile's tokens for the experts whose ranks are among its columns.
struct Gates {
  static constexpr int kStride = 256 / kUnit + 1;
  float of[kTokens][kStride];
};

// Of shared memory: what it takes to begin at a multiple of 1,024, the ring, and gates.
constexpr int bytes_of(bool shrinks) { return 1024 + kRingBytes + (shrinks ? int(sizeof(Gates)) : 0); }

struct Tile {
  int item, row, column;  // first token of the pair, first output
};
// The gates of 128 tokens, by the eight warps that multiply.
__device__ __forceinline__ void fill(const LinearSm90Params &p, Gates &gates, int first_token, int first_expert) {
  const int thread = threadIdx.x - 128;
  barrier(1, 256);  // the tile before this one is done with them
  for (int i = thread; i < int(sizeof(Gates) / 4); i += 256) (&gates.of[0][0])[i] = 0.f;
  barrier(1, 256);
  if (thread < kTokens && first_token + thread < p.tokens)
    for (int j = 0; j < p.top_k; ++j) {
      const int64_t at = int64_t(first_token + thread) * p.top_k + j, id = p.experts[at];
      const float gate = p.gates[at];
      if (id >= first_expert && id < min(first_expert + Gates::kStride, p.num_experts)) gates.of[thread][id - first_expert] += gate;
    }
  barrier(1, 256);
}

template <int kOutputs> __device__ __forceinline__ Tile tile_of(const LinearSm90Params &p, int pair) {
  int item = 0;
  while (pair >= p.begin[item + 1]) ++item;
  const int at = pair - p.begin[item];
  return Tile{item, at % p.row_pairs * (kCluster * kTokens), at / p.row_pairs * kOutputs};
}

// kShrink: the columns are ranks of experts, and the result is multiplied by their gates.
template <class E, int kOutputs, bool kShrink> __global__ void __launch_bounds__(kThreads, 1)
    linear_sm90_kernel(const __grid_constant__ LinearSm90Params p) {
#ifdef LS_HAS_SM90A
  constexpr int kWeightBytes = kOutputs * kFeatures * 2, kStageBytes = kInputBytes + kWeightBytes, kStages = kRingBytes / kStageBytes;
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t ring = (shared_address(raw) + 1023) / 1024 * 1024, full = shared_address(barriers), empty = full + kStages * 8;
  Gates &gates = *reinterpret_cast<Gates *>(raw + (ring - shared_address(raw)) + kRingBytes);
  const int rank = cluster_rank(), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, 8 * kCluster);
    mbarrier_inits_done();
  }
  cluster_barrier();
  RingPlace<kStages> place;
  const int first = blockIdx.x / kCluster, stride = gridDim.x / kCluster, pairs = p.begin[p.n_items];
  if (warp < 4) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      constexpr uint16_t kBoth = (1 << kCluster) - 1;
      for (int pair = first; pair < pairs; pair += stride) {
        const Tile tile = tile_of<kOutputs>(p, pair);
        const Sm90Linear &linear = p.linears[tile.item];
        const CUtensorMap &weight_map = p.weight[tile.item], &b_map = p.lora_b[tile.item];
        const int row = tile.row + rank * kTokens, steps = p.steps + linear.steps, half = tile.column + rank * (kOutputs / kCluster);
#pragma unroll 1
        for (int step = 0; step < steps; ++step, place.next()) {
          const uint32_t x = ring + place.stage * kStageBytes, weight = x + kInputBytes, barrier = full + place.stage * 8;
          mbarrier_wait(empty + place.stage * 8, place.parity ^ 1);
          mbarrier_expect(barrier, kStageBytes);
          if (step < p.steps) {
            copy_tile(x, p.x, barrier, step * kFeatures, row);
            copy_tile(weight + rank * (kWeightBytes / kCluster), weight_map, barrier, step * kFeatures, half, kBoth);
          } else {
            const int units = (step - p.steps) * kStepUnits;
            copy_tile(x, p.hidden, barrier, linear.hidden + units * kUnit, row);
            if (linear.units_each % kStepUnits == 0) {  // one expert's
              copy_tile(weight + rank * (kWeightBytes / kCluster), b_map, barrier, units % linear.units_each * kUnit, half,
                        units / linear.units_each, kBoth);
              continue;
            }
            for (int i = rank * (kStepUnits / kCluster); i < (rank + 1) * (kStepUnits / kCluster); ++i)
              copy_tile(weight + i * (kOutputs * 16), b_map, barrier, 0, tile.column, (units + i) % linear.units_each,
                        (units + i) / linear.units_each, kBoth);
          }
        }
      }
    }
  } else {
    more_registers<232>();
    const int group = warp / 4 - 1, g = lane / 4, t = lane % 4;
    float sums[kOutputs / 2];
    for (int pair = first; pair < pairs; pair += stride) {
      const Tile tile = tile_of<kOutputs>(p, pair);
      const Sm90Linear &linear = p.linears[tile.item];
      const int steps = p.steps + linear.steps;
      uint32_t before = 0;  // the barrier of the stage that products on their way still read
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const uint32_t x = ring + place.stage * kStageBytes, weight = x + kInputBytes;
        const bool swizzled = step < p.steps || linear.units_each % kStepUnits == 0;
        const uint64_t a = swizzled_matrix(x + group * (kInputBytes / 2)),
                       b = swizzled ? swizzled_matrix(weight) : unit_matrix(weight, kOutputs);
        const int on = swizzled ? 32 >> 4 : 2 * kOutputs * 16 >> 4;
        mbarrier_wait(full + place.stage * 8, place.parity);
        hold(sums);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kFeatures / 16; ++k) wgmma<E>(sums, a + k * (32 >> 4), b + k * on, step > 0 || k > 0);
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          if (lane < kCluster) mbarrier_arrive(before, lane);
        }
        before = empty + place.stage * 8;
        place.next();
      }
      wgmma_wait<0>();
      hold(sums);
      if (lane < kCluster) mbarrier_arrive(before, lane);

      const int first_token = tile.row + rank * kTokens, row = group * 64 + warp % 4 * 16 + g;
      if constexpr (kShrink) fill(p, gates, first_token, tile.column / kUnit / linear.units_each);
      const uint32_t *const bias = static_cast<const uint32_t *>(linear.bias);  // pairs
      const int stride = p.stride ? p.stride : linear.columns;
      E *const to = static_cast<E *>(linear.out) + int64_t(first_token + row) * stride + tile.column + t * 8;
      int of_expert = tile.column / kUnit % linear.units_each, expert = 0;  // the unit of the expert, and which of the tile's
#pragma unroll
      for (int c = 0; c < kOutputs; c += 32) {
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          float *const sum = sums + (c / 8 + f) * 4;  // of two tokens two each
          if constexpr (kShrink) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const float gate = gates.of[row + half * 8][expert] * linear.scaling;
              sum[half * 2] = gate == 0.f ? 0.f : sum[half * 2] * gate;  // what was not chosen may be anything
              sum[half * 2 + 1] = gate == 0.f ? 0.f : sum[half * 2 + 1] * gate;
            }
            if (++of_expert == linear.units_each) of_expert = 0, ++expert;
          } else if (bias) {
            const float2 add = unpack2<E>(__ldg(bias + (min(tile.column + c + f * 8, linear.columns - 8) / 2 + t)));
            sum[0] += add.x, sum[1] += add.y, sum[2] += add.x, sum[3] += add.y;
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint4 v;
          uint32_t *const packed = &v.x;
#pragma unroll
          for (int f = 0; f < 4; ++f) packed[f] = pack2<E>(sums[(c / 8 + f) * 4 + half * 2], sums[(c / 8 + f) * 4 + half * 2 + 1]);
          transpose(v, t);
          if (first_token + row + half * 8 < p.tokens && tile.column + c + t * 8 < linear.columns)
            *reinterpret_cast<uint4 *>(to + int64_t(half * 8) * stride + c) = v;
        }
      }
    }
  }
  cluster_barrier();  // the other block may still count on this one's shared memory
#endif
}

// The time of one round, in arbitrary units. Measured on an H200: 51 to 53 for narrow tiles, which leave less room for a GPU at its
// power limit; so they have to be clearly faster.
constexpr int64_t kNarrowTime = 58, kWideTime = 100;

template <class E, int kOutputs, bool kShrink> int launch_kernel(const LinearSm90Params &p, int blocks, int device, void *stream) {
  constexpr auto kernel = linear_sm90_kernel<E, kOutputs, kShrink>;
  constexpr int kBytes = bytes_of(kShrink);
  const cudaError_t error = allow_shared<kernel>(device, kBytes);
  if (error != cudaSuccess) return error;
  return launch<LinearSm90Params>(kernel, dim3(unsigned(blocks)), dim3(kThreads), p, stream, false, kBytes, kCluster);
}

// The width of the tiles, where each linear's pairs of them begin, and the launch. `weights`: as many rows as it has columns, or
// fewer: zero, then.
template <bool kShrink> int launch_many(LinearSm90Params &p, const ls_group &g, const void *const *weights, const int *rows, void *stream) {
  const uint64_t in = g.in_features, tokens = g.tokens;
  const Dimension x[] = {{in, 1, kFeatures}, {tokens, in, kTokens}};
  if (!make_map(p.x, g.dtype, g.x, x, 2, true)) return LS_ERROR_ARGUMENT;
  p.n_items = g.n_items, p.tokens = g.tokens;
  p.steps = (g.in_features - 1) / kFeatures + 1;
  p.row_pairs = (g.tokens - 1) / (kCluster * kTokens) + 1;
  auto lay_out = [&](int outputs) {
    int64_t pairs = 0;
    for (int i = 0; i < g.n_items; ++i) {
      p.begin[i] = int(pairs);
      pairs += int64_t((p.linears[i].columns + outputs - 1) / outputs) * p.row_pairs;
    }
    p.begin[g.n_items] = int(pairs);
    return pairs;
  };
  // Narrow tiles take more than half of the time of wide ones, but there may be no more rounds of them.
  const int at_once = multiprocessors(g.device) / kCluster;
  auto rounds = [&](int outputs) { return (lay_out(outputs) + at_once - 1) / at_once; };
  bool wide = rounds(256) * kWideTime <= rounds(128) * kNarrowTime;
  if (g.tuning & LS_TUNING_WIDE) wide = true;
  if (g.tuning & LS_TUNING_NARROW) wide = false;
  const int outputs = wide ? 256 : 128;
  const int64_t pairs = lay_out(outputs);
  if (pairs > INT32_MAX / kCluster) return LS_ERROR_ARGUMENT;
  for (int i = 0; i < g.n_items; ++i) {
    const Dimension weight[] = {{in, 1, kFeatures}, {uint64_t(rows[i]), in, uint32_t(outputs / kCluster)}};
    if (p.linears[i].columns && !make_map(p.weight[i], g.dtype, weights[i], weight, 2, true)) return LS_ERROR_ARGUMENT;
    if (!kShrink && g.items[i].rank && !make_b_map(p.lora_b[i], g, g.items[i], outputs, outputs / kCluster)) return LS_ERROR_ARGUMENT;
  }
  const int blocks = int(pairs < at_once ? pairs : at_once) * kCluster;
  const bool is_bf16 = g.dtype == LS_BFLOAT16;
  const auto launched = wide ? (is_bf16 ? launch_kernel<bf16, 256, kShrink> : launch_kernel<fp16, 256, kShrink>)
                             : (is_bf16 ? launch_kernel<bf16, 128, kShrink> : launch_kernel<fp16, 128, kShrink>);
  return launched(p, blocks, g.device, stream);
}

}  // namespace

bool can_sm90(const ls_group &g) {
  if (g.dtype == LS_FLOAT32 || g.transposed || g.in_features % kUnit || !has_sm90a(g.device)) return false;
  if (!aligned16(g.x) || !aligned16(g.hidden) || g.tokens > INT32_MAX - kCluster * kTokens) return false;
  for (int i = 0; i < g.n_items; ++i) {
    const ls_item &item = g.items[i];
    if (!item.weight || item.format || item.base || item.out_features % kUnit || item.rank % kUnit) return false;
    if (!aligned16(item.weight) || !aligned16(item.bias) || !aligned16(item.out)) return false;
    if (item.rank && (!aligned16(item.lora_a) || !aligned16(item.lora_b))) return false;
  }
  return true;
}

int launch_linear_sm90(GroupParams &params, void *stream) {
  const ls_group &g = params.g;
  LinearSm90Params p = {};
  const uint64_t tokens = g.tokens, width = params.hidden_elements / g.tokens;
  const Dimension hidden[] = {{width, 1, kFeatures}, {tokens, width, kTokens}};
  if (width && !make_map(p.hidden, g.dtype, g.hidden, hidden, 2, true)) return LS_ERROR_ARGUMENT;
  const void *weights[LS_MAX_GROUP];
  int rows[LS_MAX_GROUP];
  for (int i = 0; i < g.n_items; ++i)
    p.linears[i] = linear_of(params, i), weights[i] = g.items[i].weight, rows[i] = g.items[i].out_features;
  return launch_many<false>(p, g, weights, rows, stream);
}

int launch_shrink_many_ranks(GroupParams &params, void *stream) {
  const ls_group &g = params.g;
  LinearSm90Params p = {};
  p.experts = g.experts, p.gates = g.gates, p.top_k = g.top_k, p.num_experts = g.num_experts;
  p.stride = int(params.hidden_elements / g.tokens);
  const void *weights[LS_MAX_GROUP];
  int rows[LS_MAX_GROUP];
  for (int i = 0; i < g.n_items; ++i) {  // its shrink: lora_a of all experts, into the hidden
    const Sm90Linear linear = linear_of(params, i);
    uint16_t *const hidden = static_cast<uint16_t *>(g.hidden) + linear.hidden;
    p.linears[i] = {hidden, nullptr, linear.steps * kFeatures, 0, linear.units_each, 0, linear.scaling};
    weights[i] = g.items[i].lora_a, rows[i] = g.num_experts * g.items[i].rank;
  }
  return launch_many<true>(p, g, weights, rows, stream);
}

}  // namespace ls
