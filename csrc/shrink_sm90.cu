// Shrink for many tokens and few ranks on sm_90a (WGMMA, TMA, clusters): hidden = gates * (x lora_a^T), for linear_sm90.cu.
//
//   x [tokens, in]   lora_a [E * rank, in] for each linear   experts, gates [tokens, top_k]
//   hidden [tokens, width]: of all experts, times scaling and gate, 0 where a token did not choose; each linear's E * rank columns
//   padded to a multiple of 64
//   dtypes: float16, bfloat16, accumulated in float32
//   tile: 64 tokens by kGroups (1 to 4) times 64 columns, K in steps of 64
//   grid: (shares of the features, token tiles, column tiles); cluster: the shares of one tile (split-K), whose partial sums meet
//   through each other's shared memory (DSMEM)
//   block: 160 threads: four consumer warps (WGMMA), one producer warp (TMA); two blocks a multiprocessor, because clusters of larger
//   blocks would not all find room at once
//   shared memory: a ring of stages of 96 KB; afterwards, the partial sums
//
// With more columns (api.cu: kFewColumns) the shrink is a GEMM as large as a linear's, and linear_sm90.cu makes it.
#include "sm90.cuh"
#include "mma.cuh"

namespace ls {
namespace {

constexpr int kTokens = 64;               // of a block
constexpr int kFeatures = 64;             // of a step
constexpr int kColumns = kSm90Features;   // that are multiplied at once: rows of one linear's A
constexpr int kMostGroups = 4;            // of columns, of a block
constexpr int kThreads = 160;             // four warps that multiply, one that copies
constexpr int kMostShares = 8;            // parts of the features, one for each block of a cluster
constexpr int kInputBytes = kTokens * kFeatures * 2, kGroupBytes = kColumns * kFeatures * 2;

__host__ __device__ constexpr int stage_bytes(int groups) { return kInputBytes + groups * kGroupBytes; }
__host__ __device__ constexpr int stages_of(int groups) { return (96 << 10) / stage_bytes(groups); }
// Distance between the sums of two tokens that a block keeps for its cluster: eight rows of fragments fall into different banks.
__host__ __device__ constexpr int sums_stride(int groups) { return groups * kColumns + 8; }
constexpr int bytes_of(int groups) {
  const int ring = stages_of(groups) * stage_bytes(groups), sums = kTokens * sums_stride(groups) * 4;
  return (ring > sums ? ring : sums) + 1024;
}

struct ShrinkSm90Params {
  CUtensorMap x, lora_a[LS_MAX_GROUP];
  const int64_t *experts;
  const float *gates;
  void *hidden;
  float scaling[LS_MAX_GROUP];
  int rank[LS_MAX_GROUP];
  int begin[LS_MAX_GROUP + 1];  // first group of columns of each linear
  int n_items, tokens, top_k, num_experts, steps;
};

template <class E, int kGroups> __global__ void __launch_bounds__(kThreads, 2)
    shrink_sm90_kernel(const __grid_constant__ ShrinkSm90Params p) {
#ifdef LS_HAS_SM90A
  constexpr int kStages = stages_of(kGroups), kStageBytes = stage_bytes(kGroups), kStride = sums_stride(kGroups);
  extern __shared__ unsigned char raw[];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t ring = (shared_address(raw) + 1023) / 1024 * 1024, full = shared_address(barriers), empty = full + kStages * 8;
  float *const left = reinterpret_cast<float *>(raw + (ring - shared_address(raw)));  // sums, once the ring is not needed
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = blockIdx.x, shares = gridDim.x;
  const int first_token = blockIdx.y * kTokens, first_group = blockIdx.z * kGroups, groups = p.begin[p.n_items];
  const int begin = p.steps * share / shares, end = p.steps * (share + 1) / shares;
  auto item_of = [&](int group) {
    int item = 0;
    while (group >= p.begin[item + 1]) ++item;
    return item;
  };
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, 4);
    mbarrier_inits_done();
  }
  __syncthreads();
  RingPlace<kStages> place;
  if (warp == 4) {
    if (lane == 0) {
      const CUtensorMap *maps[kGroups];
      int rows[kGroups];
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int group = min(first_group + i, groups - 1), item = item_of(group);
        maps[i] = &p.lora_a[item], rows[i] = (group - p.begin[item]) * kColumns;
      }
      for (int step = begin; step < end; ++step, place.next()) {
        const uint32_t x = ring + place.stage * kStageBytes, barrier = full + place.stage * 8;
        mbarrier_wait(empty + place.stage * 8, place.parity ^ 1);
        mbarrier_expect(barrier, kStageBytes);
        copy_tile(x, p.x, barrier, step * kFeatures, first_token);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) copy_tile(x + kInputBytes + i * kGroupBytes, *maps[i], barrier, step * kFeatures, rows[i]);
      }
    }
  } else {
    float sums[kGroups][kColumns / 2] = {};
    for (int step = begin; step < end; ++step, place.next()) {
      const uint32_t x = ring + place.stage * kStageBytes;
      mbarrier_wait(full + place.stage * 8, place.parity);
#pragma unroll
      for (int i = 0; i < kGroups; ++i) hold(sums[i]);
      wgmma_begin();
#pragma unroll
      for (int k = 0; k < kFeatures / 16; ++k)
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
          wgmma<E>(sums[i], swizzled_matrix(x) + k * (32 >> 4), swizzled_matrix(x + kInputBytes + i * kGroupBytes) + k * (32 >> 4), true);
      wgmma_commit();
      wgmma_wait<0>();
#pragma unroll
      for (int i = 0; i < kGroups; ++i) hold(sums[i]);
      if (lane == 0) mbarrier_arrive(empty + place.stage * 8);
    }
    barrier(1, 128);  // all have read the ring
    float *const to = left + (warp * 16 + lane / 4) * kStride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int c = 0; c < kColumns / 2; c += 2)
        *reinterpret_cast<float2 *>(to + c / 2 % 2 * 8 * kStride + i * kColumns + c / 4 * 8) = make_float2(sums[i][c], sums[i][c + 1]);
  }
  __syncthreads();  // for racecheck, which does not know the next line
  cluster_barrier();

  // The block's share of the tokens, eight columns a thread.
  constexpr int kUnits = kGroups * kColumns / kUnit;
  const int each = kTokens / shares;
  for (int i = threadIdx.x; i < each * kUnits; i += kThreads) {
    const int row = share * each + i / kUnits, unit = i % kUnits, token = first_token + row, group = first_group + unit * kUnit / kColumns;
    if (token >= p.tokens || group >= groups) continue;
    const uint32_t from = ring + (row * kStride + unit * kUnit) * 4;
    float4 low = make_float4(0.f, 0.f, 0.f, 0.f), high = low;
#pragma unroll
    for (int block = 0; block < kMostShares; ++block) {
      if (block >= shares) break;
      const float4 a = load_remote(from, block), b = load_remote(from + 16, block);
      low.x += a.x, low.y += a.y, low.z += a.z, low.w += a.w;
      high.x += b.x, high.y += b.y, high.z += b.z, high.w += b.w;
    }
    const int item = item_of(group), column = (group - p.begin[item]) * kColumns + unit * kUnit % kColumns, expert = column / p.rank[item];
    float gate = 0.f;
    bool chosen = false;
    for (int j = 0; j < p.top_k && expert < p.num_experts; ++j) {  // the last columns may be of none
      const int64_t at = int64_t(token) * p.top_k + j;
      const float value = p.gates[at];
      if (p.experts[at] == expert) gate += value, chosen = true;
    }
    gate *= p.scaling[item];
    uint4 v = make_uint4(0, 0, 0, 0);
    if (chosen) {
      v.x = pack2<E>(low.x * gate, low.y * gate), v.y = pack2<E>(low.z * gate, low.w * gate);
      v.z = pack2<E>(high.x * gate, high.y * gate), v.w = pack2<E>(high.z * gate, high.w * gate);
    }
    const int64_t units = int64_t(groups) * (kColumns / kUnit);
    static_cast<uint4 *>(p.hidden)[token * units + first_group * (kColumns / kUnit) + unit] = v;
  }
  cluster_barrier();  // the others may still be reading this one's sums
#endif
}

template <class E, int kGroups> int launch_groups(const ShrinkSm90Params &p, dim3 grid, int device, void *stream) {
  constexpr auto kernel = shrink_sm90_kernel<E, kGroups>;
  const cudaError_t error = allow_shared<kernel>(device, bytes_of(kGroups));
  if (error != cudaSuccess) return error;
  return launch<ShrinkSm90Params>(kernel, grid, dim3(kThreads), p, stream, false, bytes_of(kGroups), grid.x);
}

template <class E> int launch_shares(const ShrinkSm90Params &p, dim3 grid, int groups, int device, void *stream) {
  static_assert(kMostGroups == 4, "one launch for each");
  switch (groups) {
    case 1: return launch_groups<E, 1>(p, grid, device, stream);
    case 2: return launch_groups<E, 2>(p, grid, device, stream);
    case 3: return launch_groups<E, 3>(p, grid, device, stream);
    default: return launch_groups<E, 4>(p, grid, device, stream);
  }
}

}  // namespace

int launch_shrink_few_ranks(GroupParams &params, void *stream) {
  const ls_group &g = params.g;
  ShrinkSm90Params p;
  const uint64_t in = g.in_features, tokens = g.tokens;
  const Dimension x[] = {{in, 1, kFeatures}, {tokens, in, kTokens}};
  if (!make_map(p.x, g.dtype, g.x, x, 2, true)) return LS_ERROR_ARGUMENT;
  p.experts = g.experts, p.gates = g.gates, p.hidden = g.hidden;
  p.n_items = g.n_items, p.tokens = g.tokens, p.top_k = g.top_k, p.num_experts = g.num_experts;
  p.steps = (g.in_features - 1) / kFeatures + 1;
  int groups = 0;
  for (int i = 0; i < g.n_items; ++i) {
    const uint64_t rows = uint64_t(g.num_experts) * g.items[i].rank;
    const Dimension a[] = {{in, 1, kFeatures}, {rows, in, kColumns}};
    if (rows && !make_map(p.lora_a[i], g.dtype, g.items[i].lora_a, a, 2, true)) return LS_ERROR_ARGUMENT;
    p.scaling[i] = g.items[i].scaling, p.rank[i] = g.items[i].rank;
    p.begin[i] = groups, groups += int((rows + kColumns - 1) / kColumns);
  }
  p.begin[g.n_items] = groups;

  const int of_block = groups < kMostGroups ? groups : kMostGroups;
  const int64_t rows = (g.tokens - 1) / kTokens + 1, columns = (groups - 1) / of_block + 1;
  // As many shares of the features as there are multiprocessors for: with twice as many blocks it took 1.4 times as long.
  int shares = 1;
  while (shares < kMostShares && shares * 2 <= p.steps && rows * columns * shares * 2 <= multiprocessors(g.device)) shares *= 2;
  if (rows > 65535) return LS_ERROR_ARGUMENT;
  const dim3 grid(shares, unsigned(rows), unsigned(columns));
  return g.dtype == LS_BFLOAT16 ? launch_shares<bf16>(p, grid, of_block, g.device, stream)
                                : launch_shares<fp16>(p, grid, of_block, g.device, stream);
}

}  // namespace ls
