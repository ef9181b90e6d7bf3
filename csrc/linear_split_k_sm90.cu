// GEMM with experts for up to 128 tokens on sm_90a (WGMMA, TMA, stream-K): out = [x | hidden] [weight | lora_b]^T + bias.
//
//   x [tokens, in]   weight [out, in]   lora_b [E, out, rank]   bias [out]   out [tokens, out]
//   hidden [tokens, width]: of all experts, times their gates, 0 where a token did not choose; each linear's E * rank columns padded
//   to a multiple of 64 (shrink_beside_sm90.cu, or this kernel with kShrink)
//   dtypes: float16, bfloat16, accumulated in float32; in, out and rank divisible by 8, pointers aligned to 16 bytes
//   tile: 128 outputs (M of the tensor cores) by all tokens (N: 8, 32, 64 or 128), K in steps of 64
//   grid: one block a multiprocessor; the steps of all tiles of the group, one after the other, are dealt out evenly (stream-K)
//   block: 288 threads: two consumer warpgroups (WGMMA), 64 outputs each, one producer warp (TMA)
//   shared memory: a ring of stages (weight tile and x tile, 128-byte swizzle), results of up to 64 tokens; 205 KB, so that
//   shrink_beside_sm90.cu has room beside it
//   partials, flags: float32 of a tile and a word for each block, in global memory
//
// So few tokens leave the weights' bytes as the limit: each is read once, by as many blocks as there are, whatever the shape of the
// linear. A block begins in the midst of a tile and ends in the midst of another. What it has of the first, it leaves in its
// partials; whoever has the beginning of a tile adds those of the others, of which all but one have long been there, and writes
// the result. It waits for blocks of lower numbers only, so it never waits for one that has no room to begin.
//
// The experts are more of K, as in linear_sm90.cu, at the beginning of a tile, and taken last of it. Their shrink is the launch before
// this one (PDL): this one begins beside it, streams weights, and waits for the hidden where it is needed. Of ranks that are small the
// copy engine takes a row of lora_b as long as one of 64 features, so for 8, 16 and 32 a step's experts are copied as they lie.
#include "linear_sm90.cuh"

namespace ls {
namespace {

constexpr int kRows = 128;                    // outputs of a tile
constexpr int kFeatures = kSm90Features;      // of a step
constexpr int kThreads = 288;                 // eight warps that multiply, one that copies
constexpr int kMultiplying = 256;
constexpr int kWeightBytes = kRows * kFeatures * 2;
constexpr int kBytes = 205 << 10;             // of shared memory
constexpr int kRegisters = 128;               // of a thread; twelve warps' worth for nine, of which the shrink needs the rest

template <int kTokens> struct Shape {
  static constexpr int kInputBytes = kTokens * kFeatures * 2, kStageBytes = kWeightBytes + kInputBytes;
  static constexpr int kPart = kTokens < 64 ? kTokens : 64;  // tokens whose results are written at once
  static constexpr int kStride = kRows + 4;                  // floats from token to token: fragments fall into different banks
  static constexpr int kSumBytes = kPart * kStride * 4, kPartial = kTokens * kRows;  // floats of a block's partials
  static constexpr int kStages = (kBytes - 1024 - kSumBytes) / kStageBytes;
};

struct SplitKParams {
  CUtensorMap x, hidden, weight[LS_MAX_GROUP], b_map[LS_MAX_GROUP];
  Sm90Linear linears[LS_MAX_GROUP];
  const int64_t *experts;
  const float *gates;
  int begin[LS_MAX_GROUP + 1];  // first step of each linear's first tile
  int stride;                   // of the results; 0: the columns of each
  int n_items, tokens, top_k, num_experts;
  int steps;  // of in_features
  int follows_shrink;  // the launch before this one is its shrink, before which x was there
  const void *lora_b[LS_MAX_GROUP];
  float *partials;     // of each block
  unsigned *flags;     // 1: a block's partials are there; whoever reads them puts it back to 0
};

#ifdef LS_HAS_SM90A
__device__ __forceinline__ float gate_of(const SplitKParams &p, int token, int expert) {
  float gate = 0.f;
  for (int j = 0; j < p.top_k; ++j) {
    const int64_t at = int64_t(token) * p.top_k + j;
    const float value = p.gates[at];
    if (p.experts[at] == expert) gate += value;
  }
  return gate;
}

// Eight outputs of a token: with bias, or (kShrink) eight ranks of an expert, times its gate.
template <class E, bool kShrink>
__device__ __forceinline__ void store_unit(const SplitKParams &p, const Sm90Linear &linear, int token, int column, float (&v)[8]) {
  if constexpr (kShrink) {
    const int expert = column / kUnit / linear.units_each;  // the last columns may be of none
    const float gate = expert < p.num_experts ? gate_of(p, token, expert) * linear.scaling : 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = gate == 0.f ? 0.f : v[i] * gate;  // what was not chosen may be anything
  } else if (linear.bias) {
    const uint4 bias = load_static(static_cast<const E *>(linear.bias) + column);
    const uint32_t *const pairs = &bias.x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 add = unpack2<E>(pairs[i]);
      v[2 * i] += add.x, v[2 * i + 1] += add.y;
    }
  }
  const uint4 packed = make_uint4(pack2<E>(v[0], v[1]), pack2<E>(v[2], v[3]), pack2<E>(v[4], v[5]), pack2<E>(v[6], v[7]));
  const int64_t stride = p.stride ? p.stride : linear.columns;
  *reinterpret_cast<uint4 *>(static_cast<E *>(linear.out) + token * stride + column) = packed;
}
#endif

// lora_b of a step's experts is copied in whole rows of outputs, [experts][kRows][rank] in shared memory. Rank 8 is units for the
// tensor cores.
__host__ __device__ __forceinline__ bool as_it_lies(const Sm90Linear &linear) {
  return linear.units_each == 1 || linear.units_each == 2 || linear.units_each == 4;
}

// What a block has of a tile: steps `begin` to `end` of its `steps`, of which the first `experts` are the experts'.
struct Segment {
  int item, column, begin, end, steps, experts;
  __device__ __forceinline__ int first() const { return max(begin, experts) - experts; }  // of in_features
  __device__ __forceinline__ int own() const { return max(end, experts) - experts - first(); }
  __device__ __forceinline__ int length() const { return end - begin; }
};
__device__ __forceinline__ Segment segment_of(const SplitKParams &p, int step, int last) {
  Segment s;
  s.item = 0;
  while (step >= p.begin[s.item + 1]) ++s.item;
  s.experts = p.linears[s.item].steps, s.steps = p.steps + s.experts;
  const int at = step - p.begin[s.item], tile = at / s.steps;
  s.column = tile * kRows, s.begin = at - tile * s.steps, s.end = min(s.steps, s.begin + last - step);
  return s;
}

// kShrink: the outputs are ranks of experts, and the result is multiplied by their gates.
template <class E, int kTokens, bool kShrink> __global__ void __maxnreg__(kRegisters)
    linear_split_k_kernel(const __grid_constant__ SplitKParams p) {
#ifdef LS_HAS_SM90A
  using S = Shape<kTokens>;
  constexpr int kStages = S::kStages, kStageBytes = S::kStageBytes, kPart = S::kPart, kStride = S::kStride;
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t ring = (shared_address(raw) + 1023) / 1024 * 1024, full = shared_address(barriers), empty = full + kStages * 8;
  float *const results = reinterpret_cast<float *>(raw + (ring - shared_address(raw)) + kStages * kStageBytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = gridDim.x, block = blocks - 1 - blockIdx.x;
  auto first_of = [&](int block) { return int(int64_t(p.begin[p.n_items]) * block / blocks); };
  const int last = first_of(block + 1);
  pdl_trigger();
  if (warp == kMultiplying / 32) {  // descriptors: the first copies would wait for them
    if (lane < p.n_items) prefetch_map(p.weight[lane]);
    if (lane < p.n_items && p.linears[lane].steps && !as_it_lies(p.linears[lane])) prefetch_map(p.b_map[lane]);
    if (lane == 30) prefetch_map(p.x);
    if (lane == 31 && p.follows_shrink) prefetch_map(p.hidden);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, kMultiplying / 32);
    mbarrier_inits_done();
  }
  __syncthreads();
  RingPlace<kStages> place;
  if (warp == kMultiplying / 32) {
    if (lane != 0) return;
    bool waited = false;
    if (!p.follows_shrink) pdl_wait(), waited = true;
    for (int step = first_of(block); step < last;) {
      const Segment s = segment_of(p, step, last);
      const Sm90Linear &linear = p.linears[s.item];
      const CUtensorMap &weight_map = p.weight[s.item], &b_map = p.b_map[s.item];
      const int own = s.own(), length = s.length();
#pragma unroll 1
      for (int i = 0; i < length; ++i, place.next()) {
        const uint32_t weight = ring + place.stage * kStageBytes, x = weight + kWeightBytes, barrier = full + place.stage * 8;
        mbarrier_wait(empty + place.stage * 8, place.parity ^ 1);
        if (i < own) {
          mbarrier_expect(barrier, kStageBytes);
          const int feature = (s.first() + i) * kFeatures;
          copy_tile(weight, weight_map, barrier, feature, s.column);
          copy_tile(x, p.x, barrier, feature, 0);
          continue;
        }
        const int units = (s.begin + i - own) * kStepUnits;
        if (as_it_lies(linear)) {
          const int rank = linear.units_each * kUnit, experts = kFeatures / rank, bytes = min(kRows, linear.columns - s.column) * rank * 2;
          mbarrier_expect(barrier, S::kInputBytes + experts * bytes);
          for (int e = 0; e < experts; ++e) {
            const int expert = min(units * kUnit / rank + e, p.num_experts - 1);  // the last step's hidden may have columns of none: zeros
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
        if (!waited) pdl_wait(), waited = true;
        copy_tile(x, p.hidden, barrier, linear.hidden + units * kUnit, 0);
      }
      step += length;
    }
    return;
  }

  const int group = warp / 4, g = lane / 4, t = lane % 4;
  float sums[kTokens / 2];
  for (int step = first_of(block); step < last;) {
    const Segment s = segment_of(p, step, last);
    const Sm90Linear &linear = p.linears[s.item];
    const int own = s.own(), length = s.length();
    uint32_t before = 0;  // the barrier of the stage that products on their way still read
#pragma unroll 1
    for (int i = 0; i < length; ++i) {
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
        for (int k = 0; k < kFeatures / 16; ++k) wgmma<E>(sums, fragments[k], b + k * (32 >> 4), i > 0 || k > 0);
        wgmma_commit();
        wgmma_wait<0>();  // the registers are free
      } else {
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < kFeatures / 16; ++k) wgmma<E>(sums, a + k * on, b + k * (32 >> 4), i > 0 || k > 0);
        wgmma_commit();
      }
      if (i > 0) {
        wgmma_wait<1>();
        if (lane == 0) mbarrier_arrive(before);
      }
      before = empty + place.stage * 8;
      place.next();
    }
    wgmma_wait<0>();
    hold(sums);
    if (lane == 0) mbarrier_arrive(before);
    step += length;

    // A thread's part of a partial is that of its sums: four floats at a time, those of all threads side by side.
    auto partial_of = [&](int block) { return reinterpret_cast<float4 *>(p.partials) + block * (S::kPartial / 4) + threadIdx.x; };
    if (s.begin > 0) {
      float4 *const to = partial_of(block);
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i)
        __stcg(to + i * kMultiplying, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
      barrier(1, kMultiplying);
      if (threadIdx.x == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(p.flags + block) : "memory");
      continue;
    }
    // All that the others have of the tile is asked for at once: a trip to memory takes as long as several steps.
    int others = 0;
    for (const int end = step + s.steps - s.end; first_of(block + 1 + others) < end;) ++others;
    if (others > 0) {
      for (int i = threadIdx.x; i < others; i += kMultiplying) {
        unsigned there, *const flag = p.flags + block + 1 + i;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
        while (!there);
        *flag = 0;
      }
      barrier(1, kMultiplying);
      constexpr int kQuads = kTokens / 8,
                    kAtOnce = kQuads >= 8   ? 2
                              : kQuads >= 4 ? 4
                                            : 8,
                    kBatch = kQuads >= 8 ? 8 : kQuads;  // 64 registers
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

    // Through shared memory, so that neighbouring outputs of a token are written together.
    float *const to = results + t * 2 * kStride + group * 64 + warp % 4 * 16 + g;
#pragma unroll
    for (int part = 0; part < kTokens; part += kPart) {
      if (part >= p.tokens) break;
      barrier(1, kMultiplying);  // the results before have been read
#pragma unroll
      for (int c = 0; c < kPart / 8; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) to[(c * 8 + i % 2) * kStride + i / 2 * 8] = sums[(part / 8 + c) * 4 + i];
      barrier(1, kMultiplying);
      constexpr int kUnits = kRows / kUnit;
      for (int i = threadIdx.x; i < min(kPart, p.tokens - part) * kUnits; i += kMultiplying) {
        const int row = i / kUnits, unit = i % kUnits * kUnit;
        if (s.column + unit >= linear.columns) continue;
        const float4 *const from = reinterpret_cast<const float4 *>(results + row * kStride + unit);
        const float4 low = from[0], high = from[1];
        float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        store_unit<E, kShrink>(p, linear, part + row, s.column + unit, v);
      }
    }
  }
#endif
}

int tile_tokens(const ls_group &g) { return g.tokens <= 8 ? 8 : g.tokens <= 32 ? 32 : g.tokens <= 64 ? 64 : 128; }

int blocks_of(const ls_group &g, int steps) {
  constexpr int kLeastSteps = 4;
  const int blocks = multiprocessors(g.device), most = (steps + kLeastSteps - 1) / kLeastSteps;
  return most < blocks ? most : blocks;
}

template <class E, int kTokens, bool kShrink>
int launch_shape(SplitKParams &p, const ls_group &g, const void *const *weights, const int *rows, void *stream) {
  constexpr auto kernel = linear_split_k_kernel<E, kTokens, kShrink>;
  const cudaError_t error = allow_shared<kernel>(g.device, kBytes);
  if (error != cudaSuccess) return error;
  const uint64_t in = g.in_features, tokens = g.tokens;
  const Dimension x[] = {{in, 1, kFeatures}, {tokens, in, kTokens}};
  if (!make_map(p.x, g.dtype, g.x, x, 2, true)) return LS_ERROR_ARGUMENT;
  for (int i = 0; i < g.n_items; ++i) {
    const Dimension weight[] = {{in, 1, kFeatures}, {uint64_t(rows[i]), in, kRows}};
    if (p.linears[i].columns && !make_map(p.weight[i], g.dtype, weights[i], weight, 2, true)) return LS_ERROR_ARGUMENT;
    p.lora_b[i] = g.items[i].lora_b;
    if (!kShrink && p.linears[i].steps && !as_it_lies(p.linears[i]) && !make_b_map(p.b_map[i], g, g.items[i], kRows, kRows))
      return LS_ERROR_ARGUMENT;
  }
  if (const uint64_t width = p.follows_shrink) {
    const Dimension hidden[] = {{width, 1, kFeatures}, {tokens, width, kTokens}};
    if (!make_map(p.hidden, g.dtype, g.hidden, hidden, 2, true)) return LS_ERROR_ARGUMENT;
  }
  const dim3 grid(unsigned(blocks_of(g, p.begin[g.n_items])));
  return launch<SplitKParams>(kernel, grid, dim3(kThreads), p, stream, !kShrink && may_overlap(kernel, g.device), kBytes);
}

template <class E, bool kShrink>
int launch_dtype(SplitKParams &p, const ls_group &g, const void *const *weights, const int *rows, void *stream) {
  p.n_items = g.n_items, p.tokens = g.tokens, p.num_experts = g.num_experts, p.steps = (g.in_features - 1) / kFeatures + 1;
  int64_t steps = 0;
  for (int i = 0; i < g.n_items; ++i) {
    p.begin[i] = int(steps);
    steps += int64_t((p.linears[i].columns + kRows - 1) / kRows) * (p.steps + p.linears[i].steps);
  }
  if (steps > INT32_MAX) return LS_ERROR_ARGUMENT;
  p.begin[g.n_items] = int(steps);
  switch (tile_tokens(g)) {
    case 8: return launch_shape<E, 8, kShrink>(p, g, weights, rows, stream);
    case 32: return launch_shape<E, 32, kShrink>(p, g, weights, rows, stream);
    case 64: return launch_shape<E, 64, kShrink>(p, g, weights, rows, stream);
    default: return launch_shape<E, 128, kShrink>(p, g, weights, rows, stream);
  }
}

template <bool kShrink> int launch_any(SplitKParams &p, const ls_group &g, const void *const *weights, const int *rows, void *stream) {
  return g.dtype == LS_BFLOAT16 ? launch_dtype<bf16, kShrink>(p, g, weights, rows, stream)
                                : launch_dtype<fp16, kShrink>(p, g, weights, rows, stream);
}

// Elements of one launch's partials, behind the hidden: first the linear's, then those of its shrink.
int64_t partial_elements(const ls_group &g) { return int64_t(multiprocessors(g.device)) * tile_tokens(g) * kRows * 2; }
float *partials_of(const GroupParams &params, int launch) {
  const int64_t begin = params.hidden_elements + launch * partial_elements(params.g);  // rows of the hidden are divisible by 64
  return reinterpret_cast<float *>(static_cast<uint16_t *>(params.g.hidden) + begin);
}
int width_of(const GroupParams &params) { return int(params.hidden_elements / params.g.tokens); }
// By a launch of this kernel, with flags of its own.
bool shrinks_itself(const ls_group &g, int width) {
  return width > 0 && ((g.tuning & LS_TUNING_GEMM_SHRINK) || !can_shrink_beside(g, width));
}

int launch_shrink_split_k(const GroupParams &params, int width, void *stream, unsigned *flags) {
  const ls_group &g = params.g;
  SplitKParams p = {};
  p.experts = g.experts, p.gates = g.gates, p.top_k = g.top_k, p.stride = width;
  p.partials = partials_of(params, 1), p.flags = flags;
  const void *weights[LS_MAX_GROUP];
  int rows[LS_MAX_GROUP];
  fill_linears(params, true, p.linears, weights, rows);
  return launch_any<true>(p, g, weights, rows, stream);
}

}  // namespace

bool can_split_k(const ls_group &g) { return g.tokens <= LS_SPLIT_K_TOKENS && can_sm90(g); }

int64_t split_k_elements(const ls_group &g) { return 2 * partial_elements(g); }

int split_k_words(const GroupParams &params) {
  return multiprocessors(params.g.device) * (shrinks_itself(params.g, width_of(params)) ? 2 : 1);
}

int launch_linear_split_k(GroupParams &params, Sync *sync, void *stream) {
  const ls_group &g = params.g;
  const int width = width_of(params);
  unsigned *const flags = reinterpret_cast<unsigned *>(sync + 1);
  if (width > 0) {
    const int error = shrinks_itself(g, width) ? launch_shrink_split_k(params, width, stream, flags + multiprocessors(g.device))
                                               : launch_shrink_beside(params, stream);
    if (error) return error;
  }
  SplitKParams p = {};
  p.follows_shrink = width, p.partials = partials_of(params, 0), p.flags = flags;
  const void *weights[LS_MAX_GROUP];
  int rows[LS_MAX_GROUP];
  fill_linears(params, false, p.linears, weights, rows);
  return launch_any<false>(p, g, weights, rows, stream);
}

}  // namespace ls
