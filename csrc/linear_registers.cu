// Linear with experts for 1 to 32 tokens, weights loaded straight into registers: out = x weight^T + bias + base + experts.
//
//   x [tokens, in]   weight [out, in]   bias [out]   experts, gates [tokens, top_k]   out [tokens, out]
//   lora_a [E, rank, in]   lora_b [E, out, rank]   hidden [tokens, top_k, rank]
//   dtypes: float16, bfloat16, accumulated in float32; in and rank divisible by 8
//   tile: 16 * MT rows of one weight by 8 * NT tokens; block: 8 warps, each with its share of the input features (split-K inside
//   the block: partial sums meet in shared memory); grid: the row tiles of all linears of the group
//   shared memory: 8 partial tiles in float32; before that, the hidden
//
// For what linear_streaming.cu and linear_persistent.cu do not take or are slower at: in_features not divisible by 32, a hidden that
// is too large for them, the experts alone, without a weight (`ls_item.weight` NULL), and weights of 4 bits (four_bits.cuh,
// int4_tiles.cuh).
//
// The shrink runs in the first blocks of the grid: their tiles are rows of lora_a (of all experts, as one matrix) times all tokens,
// with split-K over kSplits blocks so that they are done long before the other blocks, which wait for them in their epilogue. Blocks
// start in the order of their index, and those with rows of lora_a wait for nobody: no block waits for one that cannot start.
#include "four_bits.cuh"
#include "int4_tiles.cuh"

namespace ls {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kIds = LS_FAST_TOKENS * LS_MAX_TOP_K;

// sum = A[row] x[token] over one part of the features, `row` of all experts' A: for every entry that chose that expert.
__device__ __forceinline__ void store_hidden(const GroupParams &p, int item_index, const short *ids, int token, int row, int split,
                                             float sum) {
  const ls_item &item = p.g.items[item_index];
  float *hidden = static_cast<float *>(p.g.hidden) + split * p.hidden_elements + p.hidden[item_index];
  for (int j = 0; j < p.g.top_k; ++j) {
    const int entry = token * p.g.top_k + j;
    if (ids[entry] == row / item.rank) hidden[int64_t(entry) * item.rank + row % item.rank] = p.g.gates[entry] * item.scaling * sum;
  }
}

// Weights that have the dtype of x: the kernel loads them as it loads rows of lora_a.
template <int NT> struct SameDtype {
  static constexpr bool kOwnLoads = false;
  static constexpr int kBlocks = NT == 1 ? 3 : 2, kShared = 0;
  static int shared_bytes(const ls_group &) { return 0; }
};

// NT tiles of 8 tokens, MT tiles of 16 rows, U chunks in flight (twice: double-buffered) of what has the dtype of x. W: how weights lie,
// and how they are multiplied; kBlocks: of a multiprocessor.
template <class E, int NT, int MT, int U, class W> __global__ void __launch_bounds__(kThreads, W::kBlocks)
    linear_kernel(const __grid_constant__ GroupParams p) {
  constexpr int kRows = 16 * MT;
  __shared__ __align__(16) float partial[kWarps][8 * NT][kRows + 4];  // and before that, the hidden
  static_assert(sizeof(partial) >= kHiddenInside * sizeof(E), "the hidden needs room");
  __shared__ short ids[kIds];
  pdl_trigger();
  const int shrink_tiles = p.sync ? p.shrink_begin[p.g.n_items] : 0;
  const bool shrinks = blockIdx.x < shrink_tiles;
  int item_index = 0;
  if (shrinks)
    while (blockIdx.x >= p.shrink_begin[item_index + 1]) ++item_index;
  else
    item_index = find_item(p, blockIdx.x);
  const ls_item &item = p.g.items[item_index];
  const int out = shrinks ? p.g.num_experts * item.rank : item.out_features, in = p.g.in_features, tokens = p.g.tokens;
  const int tile = blockIdx.x - (shrinks ? p.shrink_begin : p.begin)[item_index];
  const int row0 = (shrinks ? tile / kSplits : tile) * kRows;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const uint4 zero = make_uint4(0, 0, 0, 0);

  int row[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) row[m][h] = min(row0 + m * 16 + h * 8 + g, out - 1);  // excess rows are not stored

  float acc[MT][NT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.f;

  uint4 w[2][U][MT][2], x[2][U][NT];
  const void *rows = shrinks ? item.lora_a : item.weight;
  int first = 0, chunks = rows ? (in + kChunk - 1) / kChunk : 0;  // and one past the last
  if (shrinks) {
    const int all = chunks;
    first = all * (tile % kSplits) / kSplits, chunks = all * (tile % kSplits + 1) / kSplits;
  }
  const E *weight = static_cast<const E *>(rows) + t * kUnit;
  const E *input = static_cast<const E *>(p.g.x) + t * kUnit;

  auto load_weights = [&](int c0, uint4(&v)[U][MT][2]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool inside = (c0 + u) * kChunk + t * kUnit < in && c0 + u < chunks;
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) v[u][m][h] = inside ? load_static(weight + int64_t(row[m][h]) * in + (c0 + u) * kChunk) : zero;
    }
  };
  auto load_inputs = [&](int c0, uint4(&v)[U][NT]) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const bool inside = (c0 + u) * kChunk + t * kUnit < in && c0 + u < chunks;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int token = n * 8 + g;
        v[u][n] = inside && token < tokens ? load_cached(input + int64_t(token) * in + (c0 + u) * kChunk) : zero;
      }
    }
  };
  auto multiply = [&](const uint4(&wv)[U][MT][2], const uint4(&xv)[U][NT]) {
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < NT; ++n) mma32<E>(acc[m][n], wv[u][m], xv[u][n]);
  };

  constexpr int kStep = kWarps * U;
  int c = first + warp * U;
  W quantised;
  if constexpr (W::kOwnLoads) {
    if (!shrinks) quantised.begin(p.g, item, row);
  } else {
    load_weights(c, w[0]);
  }
  pdl_wait();
  if constexpr (W::kOwnLoads) {
    if (!shrinks) quantised.begin_inputs(p.g);
  }
  if (p.has_rank) {
    read_ids(p, ids, threadIdx.x, kThreads);
    __syncthreads();
  }
  ExpertColumns experts(p, item_index);
  const bool has_experts = item.rank > 0 && !shrinks;
  if (has_experts && warp < experts.chunks) {
    const ExpertColumns::Unit unit = experts.unit_of(warp, ids);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) experts.template prefetch_b<E>(unit, row[m][h]);
  }
  if constexpr (W::kOwnLoads) {
    if (!shrinks) {
      quantised.run(p.g, acc);
      chunks = 0;
    } else {
      load_weights(c, w[0]);  // not before: no registers for both
    }
  }
  load_inputs(c, x[0]);
  while (c < chunks) {
    load_weights(c + kStep, w[1]);
    load_inputs(c + kStep, x[1]);
    multiply(w[0], x[0]);
    c += kStep;
    if (c >= chunks) break;
    load_weights(c + kStep, w[0]);
    load_inputs(c + kStep, x[0]);
    multiply(w[1], x[1]);
    c += kStep;
  }
  uint4 ew[MT][2];
  if (has_experts && warp < experts.chunks) {
    const ExpertColumns::Unit unit = experts.unit_of(warp, ids);
#pragma unroll
    for (int m = 0; m < MT; ++m) experts.template load_b<E>(unit, row[m][0], row[m][1], ew[m]);
  }
  if (shrink_tiles && !shrinks) {
    if (threadIdx.x == 0)
      while (shrinks_done(p.sync) < shrink_tiles) {
      }
    __syncthreads();
    if (item.rank > 0) {
      E *hidden = reinterpret_cast<E *>(&partial[0][0][0]);
      const float *parts = static_cast<const float *>(p.g.hidden) + p.hidden[item_index];
      for (int i = threadIdx.x; i < tokens * p.g.top_k * item.rank; i += kThreads) {
        float sum = 0.f;
#pragma unroll
        for (int k = 0; k < kSplits; ++k) sum += __ldcg(parts + k * p.hidden_elements + i);
        hidden[i] = from_float<E>(sum);
      }
      experts.hidden = reinterpret_cast<const char *>(hidden);
      __syncthreads();
    }
  }
  if (has_experts) {
    uint4 ex[NT];
    for (int chunk = warp; chunk < experts.chunks; chunk += kWarps) {
      const ExpertColumns::Unit unit = experts.unit_of(chunk, ids);
      experts.template load_hidden<E, NT>(unit, ids, ex);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        if (chunk != warp) experts.template load_b<E>(unit, row[m][0], row[m][1], ew[m]);
#pragma unroll
        for (int n = 0; n < NT; ++n) mma32<E>(acc[m][n], ew[m], ex[n]);
      }
    }
    if (shrink_tiles) __syncthreads();  // `partial` is free
  }
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) partial[warp][n * 8 + t * 2 + i % 2][m * 16 + i / 2 * 8 + g] = acc[m][n][i];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * tokens; i += kThreads) {
    const int r = i % kRows, token = i / kRows;
    if (row0 + r >= out) continue;
    float sum = 0.f;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) sum += partial[k][token][r];
    if (shrinks)
      store_hidden(p, item_index, ids, token, row0 + r, tile % kSplits, sum);
    else
      store_result<E>(item, token, row0 + r, sum);
  }
  if (!shrink_tiles) return;
  if (shrinks) __syncthreads();
  if (threadIdx.x == 0) {
    if (shrinks) shrink_done(p.sync);
    if (leave(p.sync, gridDim.x)) *p.sync = Sync{0, 0, 0, 0};
  }
}

template <class E, int NT, int MT, int U, class W = SameDtype<NT>> int launch_shape(GroupParams &p, void *stream) {
  int n = 0;
  for (int i = 0; i < p.g.n_items; ++i) {
    p.shrink_begin[i] = n;
    if (p.sync) n += (p.g.num_experts * p.g.items[i].rank + 16 * MT - 1) / (16 * MT) * kSplits;
  }
  p.shrink_begin[p.g.n_items] = n;
  for (int i = 0; i < p.g.n_items; ++i) {
    p.begin[i] = n;
    n += (p.g.items[i].out_features + 16 * MT - 1) / (16 * MT);
  }
  p.begin[p.g.n_items] = n;
  p.has_rank = any_rank(p.g);
  constexpr auto kernel = linear_kernel<E, NT, MT, U, W>;
  if (W::kShared) {
    const cudaError_t error = allow_shared<kernel>(p.g.device, W::kShared);
    if (error != cudaSuccess) return cudaGetLastError(), static_cast<int>(error);
  }
  return launch<GroupParams>(kernel, dim3(n), dim3(kThreads), p, stream, may_overlap(kernel, p.g.device), W::shared_bytes(p.g));
}

template <int TOKENS, int MT, int U, int R, int RX, int P, int BLOCKS> int launch_int4(GroupParams &p, void *stream) {
  using Tiles = Int4Tiles<bf16, TOKENS, MT, R, RX, P, kWarps, BLOCKS>;
  return launch_shape<bf16, Tiles::NT, MT, U, Tiles>(p, stream);
}

template <class E> int launch_as(GroupParams &p, void *stream) {
  if (p.g.items[0].format == LS_FORMAT_CODE) {
    if (p.g.tokens <= 8) return launch_shape<E, 1, 1, 4, FourBits<E, 1, 1, 4>>(p, stream);
    if (p.g.tokens <= 16) return launch_shape<E, 2, 1, 2, FourBits<E, 2, 1, 4>>(p, stream);
    return launch_shape<E, 4, 1, 1, FourBits<E, 4, 1, 2>>(p, stream);
  }
  if constexpr (std::is_same_v<E, bf16>) {
    if (p.g.items[0].format == LS_FORMAT_INT4) {
      if (p.g.tokens <= 2) return launch_int4<2, 1, 2, 3, 3, 128, 3>(p, stream);
      if (p.g.tokens <= 8) return launch_int4<8, 2, 1, 2, 2, 128, 2>(p, stream);
      if (p.g.tokens <= 16) return launch_int4<16, 2, 1, 2, 2, 128, 2>(p, stream);
      return launch_int4<32, 1, 1, 2, 1, 64, 2>(p, stream);
    }
  }
  if (p.g.tokens <= 8) return launch_shape<E, 1, 1, 4>(p, stream);
  if (p.g.tokens <= 16) return launch_shape<E, 2, 2, 2>(p, stream);
  return launch_shape<E, 4, 2, 1>(p, stream);
}

}  // namespace

int launch_linear_registers(GroupParams &p, void *stream) {
  return p.g.dtype == LS_BFLOAT16 ? launch_as<bf16>(p, stream) : launch_as<fp16>(p, stream);
}

}  // namespace ls
