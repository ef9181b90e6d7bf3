// Expand for many tokens and few ranks: out = base + scaling * (gates * hidden) lora_b^T + bias, for every linear of a group, one
// launch.
//
//   hidden [tokens, sum over linears of E * rank] (x lora_a^T, of all experts)   experts, gates [tokens, top_k]
//   base [tokens, out] or none   lora_b [E, out, rank]   bias [out]   out [tokens, out]
//   rows of hidden and base may be parts of longer rows: hidden_stride, base_stride
//   dtypes: float16, bfloat16, accumulated in float32; E * rank of a linear at most 128
//   tile: 128 tokens (32 a warp) by 32 outputs a step; block: 4 warps; grid: token tiles times runs of steps of all linears
//   registers: the gated hidden of the warp's tokens, for all steps; a unit is 8 ranks of one expert (16 bytes), a chunk 4 units, one
//   for each lane of a fragment's row (mma.cuh: the inner dimension may be taken in any order)
//   shared memory: tiles of lora_b, two stages, filled by cp.async
//
// Reading the base and writing the outputs is what takes the time here, so the bias is added in the same pass. A step's part of the
// base is asked for one step ahead.
#include "cp_async.cuh"
#include "mma.cuh"

namespace ls {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpTokens = 32, kTokens = kThreads / 32 * kWarpTokens;  // of a warp: two fragments; of a block
constexpr int kColumns = 32;                                           // outputs of a step: four fragments
constexpr int kMostChunks = 4;
constexpr int kMostOutputs = 1 << 26;  // of one linear: units of B are counted in int
constexpr int kMostSteps = 64;         // of a block
constexpr int kHeadSteps = 4;          // as long as the beginning of a block takes
constexpr int kStages = 2;

// Of B, for so many outputs: every unit of them, one unit after the other, the gap so that four lanes' lie in different banks.
__host__ __device__ constexpr int tile_steps(int chunks) { return chunks <= 2 ? 4 : 2; }
__host__ __device__ constexpr int unit_bytes(int chunks) { return (tile_steps(chunks) * kColumns + 2) * 16; }
__host__ __device__ constexpr int stage_bytes(int chunks) { return 4 * chunks * unit_bytes(chunks); }

constexpr int blocks_at_once(int chunks) { return chunks <= 2 ? 4 : 3; }  // on a multiprocessor, for the registers they need

struct ExpandParams {
  ls_expand_args a;
  int begin[LS_MAX_GROUP + 1];  // first block of each linear
  int first[LS_MAX_GROUP];      // first unit of each linear's hidden
  int64_t width;                // units from one token's hidden to the next one's
  int steps;                    // of one block
};

__host__ __device__ inline int runs_of(int out, int steps) { return (out + steps * kColumns - 1) / (steps * kColumns); }

template <class E> __device__ __forceinline__ uint4 times(const uint4 &v, float factor) {
  uint4 result;
  const uint32_t *from = &v.x;
  uint32_t *to = &result.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = unpack2<E>(from[i]);
    to[i] = pack2<E>(f.x * factor, f.y * factor);
  }
  return result;
}

template <class E, int kChunks> __global__ void __launch_bounds__(kThreads, blocks_at_once(kChunks))
    expand_kernel(const __grid_constant__ ExpandParams p) {
  int i = 0;
  while (i + 1 < p.a.n_items && int(blockIdx.x) >= p.begin[i + 1]) ++i;
  const ls_expand_item &item = p.a.items[i];
  const int out = item.out_features, tokens = p.a.tokens, top_k = p.a.top_k;
  const int units_each = item.rank / kUnit, units = p.a.num_experts * units_each;
  const int block = int(blockIdx.x) - p.begin[i], runs = runs_of(out, p.steps);
  const int begin = block % runs * (p.steps * kColumns), end = min(begin + p.steps * kColumns, out);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_token = block / runs * kTokens + threadIdx.x / 32 * kWarpTokens;

  constexpr int kTile = tile_steps(kChunks) * kColumns;
  __shared__ __align__(16) unsigned char tiles[kStages * stage_bytes(kChunks)];
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(tiles));
  // This thread's output of a tile, none past the block's end. Units past the last one are the first, which meets a hidden of zero.
  auto copy_up = [&](int column, int stage) {
    const int output = threadIdx.x % kTile;
    if (column + output >= end) return;
    const uint4 *from = static_cast<const uint4 *>(item.lora_b) + int64_t(column + output) * units_each;
    constexpr int kApart = kThreads / kTile;
    int at = threadIdx.x / kTile, e = 0;  // the unit of an expert
#pragma unroll
    for (int unit = threadIdx.x / kTile; unit < 4 * kChunks; unit += kApart, at += kApart) {
      while (at >= units_each) at -= units_each, ++e;
      if (unit >= units) at = e = 0;
      copy16(shared + stage * stage_bytes(kChunks) + unit * unit_bytes(kChunks) + output * 16, from + int64_t(e) * out * units_each + at);
    }
  };
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (begin + stage * kTile < end) copy_up(begin + stage * kTile, stage);
    copy_commit();
  }

  const uint4 zero = make_uint4(0, 0, 0, 0);
  // Outputs 8 t to 8 t + 7 of tokens g, g + 8, g + 16 and g + 24, as they are written.
  const E *const base = static_cast<const E *>(item.base);
  uint4 ahead[4] = {zero, zero, zero, zero};
  auto load_base = [&](int column) {
#pragma unroll
    for (int n = 0; n < 4; ++n)
      if (column + t * 8 < end && warp_token + n * 8 + g < tokens)
        ahead[n] = *reinterpret_cast<const uint4 *>(base + (warp_token + n * 8 + g) * item.base_stride + column + t * 8);
  };
  if (base) load_base(begin);

  int expert[kChunks];  // whose this lane's units are; past the last one: nobody's
#pragma unroll
  for (int c = 0; c < kChunks; ++c) expert[c] = c * 4 + t < units ? (c * 4 + t) / units_each : -2;

  // The hidden, ids and gates of tokens g, g + 8, g + 16 and g + 24, in one trip to memory. Each of the four lanes of a token has
  // two of its ids.
  uint4 hidden[kChunks][2][2];
  uint32_t ids[4];  // two of 16 bits
  float gates[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int64_t token = min(warp_token + n * 8 + g, tokens - 1);
    const uint4 *from = static_cast<const uint4 *>(p.a.hidden) + token * p.width + p.first[i] + t;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) hidden[c][n / 2][n % 2] = expert[c] >= 0 ? load_cached(from + c * 4) : zero;
    ids[n] = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = half * 4 + t;
      int64_t id = -1;
      float gate = 0.f;
      if (j < top_k) id = p.a.experts[token * top_k + j], gate = p.a.gates[token * top_k + j];
      ids[n] |= (id >= 0 && id < p.a.num_experts ? uint32_t(id) : 0xffffu) << (half * 16);
      gates[n][half] = gate;
    }
  }
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    float factor[kChunks] = {};
    bool chosen[kChunks] = {};
#pragma unroll 1
    for (int j = 0; j < top_k; ++j) {
      const int e = __shfl_sync(0xffffffffu, ids[n], j % 4, 4) >> (j / 4 * 16) & 0xffffu;
      const float gate = __shfl_sync(0xffffffffu, j < 4 ? gates[n][0] : gates[n][1], j % 4, 4);
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (e == expert[c]) factor[c] += gate, chosen[c] = true;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint4 &v = hidden[c][n / 2][n % 2];
      v = chosen[c] ? times<E>(v, factor[c] * item.scaling) : zero;
    }
  }

  const uint4 *const bias = static_cast<const uint4 *>(item.bias);
  E *to = static_cast<E *>(item.out) + int64_t(warp_token + g) * out + begin + t * 8;
  const int64_t below = int64_t(8) * out;
  int stage = 0;
#pragma unroll 1
  for (int column = begin; column < end; column += kColumns, to += kColumns) {
    const int step = (column - begin) / kColumns % tile_steps(kChunks);
    if (step == 0) {
      if (column > begin) {  // the tile before this one has been multiplied by all
        __syncthreads();
        if (column + (kStages - 1) * kTile < end) copy_up(column + (kStages - 1) * kTile, stage);
        copy_commit();
        stage = (stage + 1) % kStages;
      }
      copy_wait<kStages - 1>();
      __syncthreads();
    }
    float sums[2][4][4] = {};  // of outputs 8 t + 2 f and the next, for tokens g and g + 8
    if (base) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t *const pairs = &ahead[n].x;
#pragma unroll
        for (int f = 0; f < 4; ++f) {
          const float2 v = unpack2<E>(pairs[f]);
          sums[n / 2][f][n % 2 * 2] = v.x, sums[n / 2][f][n % 2 * 2 + 1] = v.y;
        }
      }
      load_base(column + kColumns);
    }
    if (bias) {
      const uint4 eight = __ldg(bias + min(column + t * 8, end - 8) / 8);
      const uint32_t *const pairs = &eight.x;
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const float2 add = unpack2<E>(pairs[f]);
#pragma unroll
        for (int m = 0; m < 2; ++m) sums[m][f][0] += add.x, sums[m][f][2] += add.x, sums[m][f][1] += add.y, sums[m][f][3] += add.y;
      }
    }
    // Fragment f multiplies outputs 2 f, 2 f + 1, 8 + 2 f, ...: of its results, a lane has two for each token, which in the order of
    // the fragments are eight neighbours.
    const unsigned char *const at =
        tiles + stage * stage_bytes(kChunks) + t * unit_bytes(kChunks) + (step * kColumns + g / 2 * 8 + g % 2) * 16;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint4 b[4];
#pragma unroll
      for (int f = 0; f < 4; ++f) b[f] = *reinterpret_cast<const uint4 *>(at + c * 4 * unit_bytes(kChunks) + f * 2 * 16);
      const uint4(&a)[2][2] = hidden[c];
#pragma unroll
      for (int n = 0; n < 8; ++n)
        mma<E>(sums[n % 2][n / 2], a[n % 2][0].x, a[n % 2][1].x, a[n % 2][0].y, a[n % 2][1].y, b[n / 2].x, b[n / 2].y);
#pragma unroll
      for (int n = 0; n < 8; ++n)
        mma<E>(sums[n % 2][n / 2], a[n % 2][0].z, a[n % 2][1].z, a[n % 2][0].w, a[n % 2][1].w, b[n / 2].z, b[n / 2].w);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      uint4 v;
      uint32_t *pairs = &v.x;
#pragma unroll
      for (int f = 0; f < 4; ++f) pairs[f] = pack2<E>(sums[n / 2][f][n % 2 * 2], sums[n / 2][f][n % 2 * 2 + 1]);
      if (column + t * 8 < end && warp_token + n * 8 + g < tokens) *reinterpret_cast<uint4 *>(to + n * below) = v;
    }
  }
}

// 0, or why the kernel does not take this; the pointers that differ from call to call are not looked at.
int check(const ls_expand_args &a) {
  if (a.n_items < 1 || a.n_items > LS_MAX_GROUP || a.device < 0 || a.device >= kMaxDevices) return LS_ERROR_ARGUMENT;
  if (a.tokens < 0 || a.tokens > INT32_MAX - kTokens) return LS_ERROR_ARGUMENT;
  if (a.dtype != LS_FLOAT16 && a.dtype != LS_BFLOAT16) return LS_ERROR_ARGUMENT;
  if (a.top_k < 1 || a.top_k > LS_MAX_TOP_K || a.num_experts < 1 || a.num_experts > LS_MAX_EXPERTS) return LS_ERROR_ARGUMENT;
  for (int i = 0; i < a.n_items; ++i) {
    const ls_expand_item &item = a.items[i];
    if (item.rank < kUnit || item.rank > LS_MAX_RANK || item.rank % kUnit) return LS_ERROR_ARGUMENT;
    if (a.num_experts * item.rank > kMostChunks * kChunk) return LS_ERROR_ARGUMENT;
    if (item.out_features < 8 || item.out_features > kMostOutputs || item.out_features % 8) return LS_ERROR_ARGUMENT;
    if (!item.lora_b) return LS_ERROR_POINTER;
    if (!aligned16(item.lora_b) || !aligned16(item.bias)) return LS_ERROR_ARGUMENT;
  }
  return 0;
}

template <class E> int launch_expand(ExpandParams &p, void *stream) {
  int chunks = 1, width = 0;
  for (int i = 0; i < p.a.n_items; ++i) {
    const int ranks = p.a.num_experts * p.a.items[i].rank;
    p.first[i] = width;
    width += ranks / kUnit;
    chunks = max(chunks, (ranks + kChunk - 1) / kChunk);
  }
  p.width = p.a.hidden_stride ? p.a.hidden_stride / kUnit : width;

  const int64_t row_tiles = (int64_t(p.a.tokens) + kTokens - 1) / kTokens;
  const int64_t at_once = int64_t(multiprocessors(p.a.device)) * blocks_at_once(chunks);
  int64_t least = INT64_MAX;
  for (int steps = 1; steps <= kMostSteps; ++steps) {
    int64_t blocks = 0;
    for (int i = 0; i < p.a.n_items; ++i) blocks += runs_of(p.a.items[i].out_features, steps) * row_tiles;
    const int64_t time = (blocks + at_once - 1) / at_once * (steps + kHeadSteps);
    if (time < least && blocks <= INT32_MAX) least = time, p.steps = steps;
  }
  if (least == INT64_MAX) return LS_ERROR_ARGUMENT;
  int64_t blocks = 0;
  for (int i = 0; i < p.a.n_items; ++i) {
    p.begin[i] = int(blocks);
    blocks += runs_of(p.a.items[i].out_features, p.steps) * row_tiles;
  }
  p.begin[p.a.n_items] = int(blocks);

  constexpr void (*kKernels[kMostChunks])(ExpandParams) = {expand_kernel<E, 1>, expand_kernel<E, 2>, expand_kernel<E, 3>,
                                                           expand_kernel<E, 4>};
  return launch<ExpandParams>(kKernels[chunks - 1], dim3(unsigned(blocks)), dim3(kThreads), p, stream, false);
}

}  // namespace
}  // namespace ls

LS_EXPORT int ls_expand_takes(const ls_expand_args *args) { return ls::check(*args) == 0; }

LS_EXPORT int ls_expand(const ls_expand_args *args, void *stream) {
  const int error = ls::check(*args);
  if (error) return error;
  if (args->tokens == 0) return 0;
  if (!args->hidden || !args->experts || !args->gates) return LS_ERROR_POINTER;
  int64_t width = 0;
  for (int i = 0; i < args->n_items; ++i) width += args->num_experts * args->items[i].rank;
  const bool apart = args->hidden_stride == 0 || args->hidden_stride >= width;
  if (!ls::aligned16(args->hidden) || !apart || args->hidden_stride % ls::kUnit) return LS_ERROR_ARGUMENT;
  for (int i = 0; i < args->n_items; ++i) {
    const ls_expand_item &item = args->items[i];
    if (!item.out) return LS_ERROR_POINTER;
    if (!ls::aligned16(item.out) || !ls::aligned16(item.base)) return LS_ERROR_ARGUMENT;
    if (item.base && (item.base_stride < item.out_features || item.base_stride % ls::kUnit)) return LS_ERROR_ARGUMENT;
  }
  ls::DeviceGuard guard(args->device);
  if (guard.error != cudaSuccess) return guard.error;
  ls::ExpandParams p;
  p.a = *args;
  return p.a.dtype == LS_BFLOAT16 ? ls::launch_expand<ls::bf16>(p, stream) : ls::launch_expand<ls::fp16>(p, stream);
}
