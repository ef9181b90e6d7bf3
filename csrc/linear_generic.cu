// Linear with experts for every size, dtype and layout: out = x weight^T + bias + base + experts.
//
//   x [tokens, in]   weight [out, in], or [in, out] if transposed (Conv1D)   bias [out]   out [tokens, out]
//   lora_b [E, out, rank]   hidden [tokens, top_k, rank], from shrink.cu
//   dtypes: float32, float16, bfloat16; arithmetic is float32, on CUDA cores
//   rows_kernel ([out, in]): a warp for each row, 8 in a block; four tokens at once
//   columns_kernel ([in, out]): 32 columns a block, each of 8 warps every eighth input feature, so that loads are contiguous;
//   shared memory: 8 partial sums of 32 columns for four tokens
//
// For what the tensor-core kernels cannot take: float32, odd sizes, unaligned pointers, Conv1D, any number of tokens.
#include "group.cuh"

namespace ls {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 4;  // tokens whose sums a thread keeps at once

// What the experts add to row `row` of token `token`: lane `lane` of 32 takes every 32nd rank.
template <class E> __device__ __forceinline__ float expert_part(const GroupParams &p, int item_index, int token, int row, int lane) {
  const ls_item &item = p.g.items[item_index];
  const int rank = item.rank;
  float sum = 0.f;
  if (rank == 0) return sum;
  const E *hidden = static_cast<const E *>(p.g.hidden) + p.hidden[item_index];
  for (int j = 0; j < p.g.top_k; ++j) {
    const int64_t slot = int64_t(token) * p.g.top_k + j, e = p.g.experts[slot];
    if (e < 0 || e >= p.g.num_experts) continue;
    const E *b = static_cast<const E *>(item.lora_b) + (e * item.out_features + row) * rank;
    for (int r = lane; r < rank; r += 32) sum += to_float(b[r]) * to_float(hidden[slot * rank + r]);
  }
  return sum;
}

// [out, in] weights: a warp a row. VEC = 4: float32 with 16-byte loads.
template <class E, int VEC> __global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ GroupParams p) {
  const int item_index = find_item(p, blockIdx.x);
  const ls_item &item = p.g.items[item_index];
  const int row = (blockIdx.x - p.begin[item_index]) * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int in = p.g.in_features;
  pdl_trigger();
  pdl_wait();
  if (row >= item.out_features) return;
  const E *w = static_cast<const E *>(item.weight) + int64_t(row) * in;
  const E *x = static_cast<const E *>(p.g.x);
  for (int first = 0; first < p.g.tokens; first += kTokens) {
    const int count = min(kTokens, p.g.tokens - first);
    float sum[kTokens] = {};
    if (item.weight) {
#pragma unroll 4
      for (int i = lane * VEC; i < in; i += 32 * VEC) {
        float wv[VEC];
        if constexpr (VEC == 4) {
          *reinterpret_cast<float4 *>(wv) = *reinterpret_cast<const float4 *>(w + i);
        } else {
          wv[0] = to_float(w[i]);
        }
#pragma unroll
        for (int n = 0; n < kTokens; ++n) {
          if (n >= count) break;
          const E *xt = x + int64_t(first + n) * in + i;
#pragma unroll
          for (int v = 0; v < VEC; ++v) sum[n] += wv[v] * to_float(xt[v]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      if (n >= count) break;
      const float total = warp_sum(sum[n] + expert_part<E>(p, item_index, first + n, row, lane));
      if (lane == 0) store_result<E>(p.g.items[item_index], first + n, row, total);
    }
  }
}

// [in, out] weights: 32 columns a block, each warp every eighth input feature, so that a warp's loads are contiguous.
template <class E> __global__ void __launch_bounds__(kThreads) columns_kernel(const __grid_constant__ GroupParams p) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float partial[kWarps][kTokens][32];
  const int item_index = find_item(p, blockIdx.x);
  const ls_item &item = p.g.items[item_index];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column0 = (blockIdx.x - p.begin[item_index]) * 32, column = column0 + lane;
  const int in = p.g.in_features, out = item.out_features;
  pdl_trigger();
  pdl_wait();
  const E *w = static_cast<const E *>(item.weight);
  const E *x = static_cast<const E *>(p.g.x);
  for (int first = 0; first < p.g.tokens; first += kTokens) {
    const int count = min(kTokens, p.g.tokens - first);
    float sum[kTokens] = {};
    if (w && column < out) {
#pragma unroll 4
      for (int i = warp; i < in; i += kWarps) {
        const float wv = to_float(w[int64_t(i) * out + column]);
#pragma unroll
        for (int n = 0; n < kTokens; ++n)
          if (n < count) sum[n] += wv * to_float(x[int64_t(first + n) * in + i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTokens; ++n) partial[warp][n][lane] = sum[n];
    __syncthreads();
    // A warp a (token, column) pair: the experts' ranks are spread over its lanes.
    for (int i = warp; i < count * 32; i += kWarps) {
      const int n = i / 32, c = i % 32;
      if (column0 + c >= out) continue;
      float v = lane < kWarps ? partial[lane][n][c] : 0.f;
      v = warp_sum(v + expert_part<E>(p, item_index, first + n, column0 + c, lane));
      if (lane == 0) store_result<E>(p.g.items[item_index], first + n, column0 + c, v);
    }
    __syncthreads();
  }
}

template <class E, int VEC> int launch_generic_as(GroupParams &p, void *stream) {
  const int per_block = p.g.transposed ? 32 : kThreads / 32;
  int n = 0;
  for (int i = 0; i < p.g.n_items; ++i) {
    p.begin[i] = n;
    n += (p.g.items[i].out_features + per_block - 1) / per_block;
  }
  p.begin[p.g.n_items] = n;
  auto kernel = p.g.transposed ? columns_kernel<E> : rows_kernel<E, VEC>;
  const int device = p.g.device;
  return launch<GroupParams>(kernel, dim3(n), dim3(kThreads), p, stream, may_overlap(kernel, device));
}

}  // namespace

int launch_linear_generic(GroupParams &p, void *stream) {
  bool vector = p.g.in_features % 4 == 0 && aligned16(p.g.x);
  for (int i = 0; i < p.g.n_items; ++i) vector = vector && aligned16(p.g.items[i].weight);
  switch (p.g.dtype) {
    case LS_FLOAT32: return vector ? launch_generic_as<float, 4>(p, stream) : launch_generic_as<float, 1>(p, stream);
    case LS_FLOAT16: return launch_generic_as<fp16, 1>(p, stream);
    case LS_BFLOAT16: return launch_generic_as<bf16, 1>(p, stream);
  }
  return LS_ERROR_ARGUMENT;
}

}  // namespace ls
