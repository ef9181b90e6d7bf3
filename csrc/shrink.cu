// Shrink: hidden[t, j] = scaling * gates[t, j] * lora_a[e] x[t] with e = experts[t, j], for every linear of a group.
//
//   x [tokens, in]   lora_a [E, rank, in]   hidden [tokens, top_k, rank], one behind the other for the linears
//   dtypes: float32, float16, bfloat16; sums are float32
//   grid: (rows of all linears' hidden for one token / ROWS, tokens); block: 8 warps, each an eighth of the input features;
//   ROWS is 8 where there are many rows (they share their reads of x), else 1
//   shared memory: one partial sum for each warp and row
//
// A launch of its own, for the linear kernels that cannot do the shrink inside (see can_shrink_inside() in api.cu). It reads little
// (128 KB for two experts of rank 8 at in = 4096) and the next launch waits for it, so it is spread over many small blocks.
#include "group.cuh"

namespace ls {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 2;  // loads of x in flight before the expert is known

// sum[r] += eight features of x times those of row r of a.
template <class E, int ROWS> __device__ __forceinline__ void add(float (&sum)[ROWS], const uint4 &xv, const E *a, int in, int i) {
  const float2 x0 = unpack2<E>(xv.x), x1 = unpack2<E>(xv.y), x2 = unpack2<E>(xv.z), x3 = unpack2<E>(xv.w);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const uint4 av = load_cached(a + int64_t(r) * in + i);
    const float2 a0 = unpack2<E>(av.x), a1 = unpack2<E>(av.y), a2 = unpack2<E>(av.z), a3 = unpack2<E>(av.w);
    sum[r] += a0.x * x0.x + a0.y * x0.y + a1.x * x1.x + a1.y * x1.y;
    sum[r] += a2.x * x2.x + a2.y * x2.y + a3.x * x3.x + a3.y * x3.y;
  }
}

// One block: ROWS rows of one expert of one token. VEC elements a load.
template <class E, int VEC, int ROWS> __global__ void __launch_bounds__(kThreads) shrink_kernel(const __grid_constant__ GroupParams p) {
  __shared__ float partial[kThreads / 32][ROWS];
  const int item_index = find_item(p, blockIdx.x);
  const ls_item &item = p.g.items[item_index];
  const int rank = item.rank, in = p.g.in_features, token = blockIdx.y;
  const int row = (blockIdx.x - p.begin[item_index]) * ROWS;  // of the top_k * rank rows of this token
  const int j = row / rank, r0 = row % rank;
  pdl_wait();
  pdl_trigger();
  const int64_t slot = int64_t(token) * p.g.top_k + j;
  const int64_t e = p.g.experts[slot];
  const E *x = static_cast<const E *>(p.g.x) + int64_t(token) * in;
  uint4 ahead[kAhead];
  if constexpr (VEC == 8) {
#pragma unroll
    for (int n = 0; n < kAhead; ++n)
      if (const int i = (n * kThreads + threadIdx.x) * 8; i < in) ahead[n] = load_cached(x + i);
  }
  const float gate = p.g.gates[slot] * item.scaling;
  const bool valid = e >= 0 && e < p.g.num_experts;
  const E *a = static_cast<const E *>(item.lora_a) + (valid ? (e * rank + r0) * in : 0);
  float sum[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) sum[r] = 0.f;
  if (valid) {
    if constexpr (VEC == 8) {
#pragma unroll
      for (int n = 0; n < kAhead; ++n)
        if (const int i = (n * kThreads + threadIdx.x) * 8; i < in) add<E, ROWS>(sum, ahead[n], a, in, i);
#pragma unroll 4
      for (int i = (kAhead * kThreads + threadIdx.x) * 8; i < in; i += kThreads * 8) add<E, ROWS>(sum, load_cached(x + i), a, in, i);
    } else {
#pragma unroll 4
      for (int i = threadIdx.x; i < in; i += kThreads) {
        float xv = to_float(x[i]);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[r] += xv * to_float(a[int64_t(r) * in + i]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    sum[r] = warp_sum(sum[r]);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][r] = sum[r];
  }
  __syncthreads();
  if (threadIdx.x < ROWS) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) total += partial[w][threadIdx.x];
    E *hidden = static_cast<E *>(p.g.hidden) + p.hidden[item_index] + slot * rank + r0;
    hidden[threadIdx.x] = from_float<E>(valid ? gate * total : 0.f);
  }
}

template <class E, int VEC> int launch_shrink_as(GroupParams &p, void *stream) {
  int64_t rows = 0;
  bool by_eight = true;
  for (int i = 0; i < p.g.n_items; ++i) {
    rows += int64_t(p.g.top_k) * p.g.items[i].rank;
    by_eight = by_eight && p.g.items[i].rank % 8 == 0;
  }
  // One row for each block as long as they all run at once; with more rows, blocks of eight rows, which share their reads of x.
  const int per_block = by_eight && rows * p.g.tokens >= 768 ? 8 : 1;
  int n = 0;
  for (int i = 0; i < p.g.n_items; ++i) {
    p.begin[i] = n;
    n += p.g.top_k * p.g.items[i].rank / per_block;
  }
  p.begin[p.g.n_items] = n;
  auto kernel = per_block == 8 ? shrink_kernel<E, VEC, 8> : shrink_kernel<E, VEC, 1>;
  const int device = p.g.device;
  return launch<GroupParams>(kernel, dim3(n, p.g.tokens), dim3(kThreads), p, stream, may_overlap(kernel, device));
}

}  // namespace

int launch_shrink(GroupParams &p, void *stream) {
  bool vector = p.g.in_features % 8 == 0 && aligned16(p.g.x);
  for (int i = 0; i < p.g.n_items; ++i) vector = vector && aligned16(p.g.items[i].lora_a);
  switch (p.g.dtype) {
    case LS_FLOAT32: return launch_shrink_as<float, 1>(p, stream);
    case LS_FLOAT16: return vector ? launch_shrink_as<fp16, 8>(p, stream) : launch_shrink_as<fp16, 1>(p, stream);
    case LS_BFLOAT16: return vector ? launch_shrink_as<bf16, 8>(p, stream) : launch_shrink_as<bf16, 1>(p, stream);
  }
  return LS_ERROR_ARGUMENT;
}

}  // namespace ls
