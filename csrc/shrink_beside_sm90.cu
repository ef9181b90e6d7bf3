// Shrink for few tokens on sm_90a (mma, clusters): hidden = gates * (x lora_a^T), beside linear_split_k_sm90.cu.
//
//   x [tokens, in]   lora_a [E, rank, in] for each linear   experts, gates [tokens, top_k]
//   hidden [tokens, width]: of all experts, times scaling and gate, 0 where a token did not choose; each linear's E * rank columns
//   padded to a multiple of 64
//   dtypes: float16, bfloat16, accumulated in float32; in and rank divisible by 8
//   tile: 16 or 32 tokens (M of the tensor cores) by 32 columns (N)
//   grid: (8 shares of the features, token tiles, column tiles); cluster: the shares of one tile (split-K), whose partial sums meet
//   through each other's shared memory (DSMEM)
//   block: 4 warps, each with its slice of the share; x and lora_a straight into registers
//   shared memory: a tile in float32, 5 KB; 16,384 registers: the linear's blocks run on the same multiprocessors, and begin as soon
//   as all of these run (PDL)
#include "mma.cuh"
#include "sm90.cuh"

namespace ls {
namespace {

constexpr int kSlices = 4, kThreads = kSlices * 32;
constexpr int kShares = 8;
constexpr int kTile = 16, kColumns = 32;  // tokens and columns that a warp multiplies at once
constexpr int kBlocks = 4;  // at once, on a multiprocessor

struct ShrinkBesideParams {
  const void *x, *lora_a[LS_MAX_GROUP];
  const int64_t *experts;
  const float *gates;
  void *hidden;
  float scaling[LS_MAX_GROUP];
  int rank[LS_MAX_GROUP];
  int begin[LS_MAX_GROUP + 1];  // first column of each linear
  int n_items, tokens, top_k, num_experts, in_features;
};

template <class E, int kTiles> __global__ void __launch_bounds__(kThreads, kBlocks)
    shrink_beside_kernel(const __grid_constant__ ShrinkBesideParams p) {
#ifdef LS_HAS_SM90A
  constexpr int kTokens = kTiles * kTile;
  constexpr int kAhead = kTiles == 1 ? 3 : 2;  // chunks of 32 features on their way
  constexpr int kStride = kColumns + 8;  // floats from token to token: fragments fall into different banks
  __shared__ __align__(16) float partial[kTokens * kStride];
  pdl_trigger();
  const int slice = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, share = blockIdx.x;
  const int first_token = blockIdx.y * kTokens, first_column = blockIdx.z * kColumns;
  auto item_of = [&](int column) {
    int item = 0;
    while (column >= p.begin[item + 1]) ++item;
    return item;
  };
  // Tiles do not cross linears, whose columns begin at multiples of 64.
  const int item = item_of(first_column), column = first_column - p.begin[item], rows = p.num_experts * p.rank[item];
  const E *const x = static_cast<const E *>(p.x), *const a = static_cast<const E *>(p.lora_a[item]);
  const int64_t in = p.in_features;
  const int chunks = (p.in_features + kChunk - 1) / kChunk, end = chunks * (share + 1) / kShares;
  const uint4 zero = make_uint4(0, 0, 0, 0);

  uint4 of_x[kAhead][kTiles][2], of_a[kAhead][4];  // this lane's of 16 tokens, of 8 columns
  auto load = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int feature = (chunk + i * kSlices) * kChunk + t * kUnit;
      const bool there = chunk + i * kSlices < end && feature < p.in_features;
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int token = first_token + m * 16 + half * 8 + g;
          of_x[i][m][half] = there && token < p.tokens ? load_shared_input(x + token * in + feature) : zero;
        }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = column + n * 8 + g;
        of_a[i][n] = there && row < rows ? load_static(a + row * in + feature) : zero;
      }
    }
  };
  int chunk = chunks * share / kShares + slice;
  load(chunk);

  // What a thread will add up: eight columns of a token. Their gate is asked for while the first features come.
  constexpr int kEach = kTokens / kShares, kUnits = kColumns / kUnit;
  static_assert(kEach * kUnits <= kThreads, "one each");
  const int row = share * kEach + threadIdx.x / kUnits, unit = threadIdx.x % kUnits, token = first_token + row;
  const bool adds = threadIdx.x < kEach * kUnits && token < p.tokens;
  float gate = 0.f;
  bool chosen = false;
  if (adds) {
    const int expert = (column + unit * kUnit) / p.rank[item];
    for (int j = 0; j < p.top_k && expert < p.num_experts; ++j) {  // the last columns may be of none
      const int64_t at = int64_t(token) * p.top_k + j;
      const float value = p.gates[at];
      if (p.experts[at] == expert) gate += value, chosen = true;
    }
    gate *= p.scaling[item];
  }

  float sums[kTiles][4][4] = {};
  while (chunk < end) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n) mma32<E>(sums[m][n], of_x[i][m], of_a[i][n]);
    chunk += kAhead * kSlices;
    if (chunk < end) load(chunk);
  }

  // The slices add up one after the other: always in the same order.
  float *const to = partial + g * kStride + t * 2;
  for (int turn = 0; turn < kSlices; ++turn) {
    if (turn == slice) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float2 *const at = reinterpret_cast<float2 *>(to + (m * 16 + half * 8) * kStride + n * 8);
            float2 sum = make_float2(sums[m][n][half * 2], sums[m][n][half * 2 + 1]);
            if (turn > 0) sum.x += at->x, sum.y += at->y;
            *at = sum;
          }
    }
    __syncthreads();
  }
  cluster_barrier();
  if (adds) {
    const uint32_t from = shared_address(partial) + (row * kStride + unit * kUnit) * 4;
    float4 low = make_float4(0.f, 0.f, 0.f, 0.f), high = low;
#pragma unroll
    for (int block = 0; block < kShares; ++block) {
      const float4 l = load_remote(from, block), h = load_remote(from + 16, block);
      low.x += l.x, low.y += l.y, low.z += l.z, low.w += l.w;
      high.x += h.x, high.y += h.y, high.z += h.z, high.w += h.w;
    }
    uint4 v = zero;
    if (chosen) {
      v.x = pack2<E>(low.x * gate, low.y * gate), v.y = pack2<E>(low.z * gate, low.w * gate);
      v.z = pack2<E>(high.x * gate, high.y * gate), v.w = pack2<E>(high.z * gate, high.w * gate);
    }
    const int64_t width = p.begin[p.n_items];
    *reinterpret_cast<uint4 *>(static_cast<E *>(p.hidden) + token * width + first_column + unit * kUnit) = v;
  }
  cluster_barrier();  // the others may still be reading this one's sums
#endif
}

template <class E, int kTiles> int launch_tiles(const ShrinkBesideParams &p, dim3 grid, int device, void *stream) {
  constexpr auto kernel = shrink_beside_kernel<E, kTiles>;
  // A multiprocessor that has divided its memory otherwise takes no block of the linear before it is idle.
  const cudaError_t error = prefer_shared<kernel>(device);
  if (error != cudaSuccess) return error;
  // Never beside the launch before it: the linear that follows relies on x being there when this begins.
  return launch<ShrinkBesideParams>(kernel, grid, dim3(kThreads), p, stream, false, 0, kShares);
}

template <class E> int launch_dtype(const ShrinkBesideParams &p, dim3 grid, int device, void *stream) {
  return p.tokens <= kTile ? launch_tiles<E, 1>(p, grid, device, stream) : launch_tiles<E, 2>(p, grid, device, stream);
}

dim3 grid_of(const ls_group &g, int width) {
  const int tokens = g.tokens <= kTile ? kTile : 2 * kTile;
  return dim3(kShares, unsigned((g.tokens + tokens - 1) / tokens), unsigned(width / kColumns));
}

}  // namespace

// With more blocks than run at once, a launch of linear_split_k_sm90.cu itself is as good.
bool can_shrink_beside(const ls_group &g, int width) {
  const dim3 grid = grid_of(g, width);
  return int64_t(grid.x) * grid.y * grid.z <= int64_t(kBlocks) * multiprocessors(g.device);
}

int launch_shrink_beside(GroupParams &params, void *stream) {
  const ls_group &g = params.g;
  ShrinkBesideParams p;
  p.x = g.x, p.experts = g.experts, p.gates = g.gates, p.hidden = g.hidden;
  p.n_items = g.n_items, p.tokens = g.tokens, p.top_k = g.top_k, p.num_experts = g.num_experts, p.in_features = g.in_features;
  for (int i = 0; i < g.n_items; ++i) {
    p.lora_a[i] = g.items[i].lora_a, p.scaling[i] = g.items[i].scaling;
    p.rank[i] = g.items[i].rank, p.begin[i] = int(params.hidden[i]);
  }
  const int width = p.begin[g.n_items] = int(params.hidden_elements / g.tokens);
  const dim3 grid = grid_of(g, width);
  return g.dtype == LS_BFLOAT16 ? launch_dtype<bf16>(p, grid, g.device, stream) : launch_dtype<fp16>(p, grid, g.device, stream);
}

}  // namespace ls
