// Router: experts, gates = top_k(softmax(x router^T)), of which no more are taken than sum to top_p; one launch for all tokens.
// With context (ls_router_context), the next token of each of as many sequences: the softmax is that of the decayed mean of the
// logits so far, and the sums go on. Those of a sequence whose token is padding stay as they are.
//
//   x [tokens, in]   router [E, in]   experts int64 [tokens, top_k]   gates float32 [tokens, top_k]
//   with context also: previous, sums float32 [tokens, E + 1] (the last column is the sum of the weights)   real bool [tokens]
//   dtypes of x and router: float32, float16, bfloat16, independently; logits, softmax and gates are float32
//   grid: a block of 8 warps for each token; a warp computes the logits of every eighth expert, warp 0 the softmax and top-k
//   shared memory: 256 logits
//
// Bytes: the router once from memory (64 KB for 8 experts at in = 4096, bf16), then from L2 for every further token. What takes
// the time is the launch and one round trip to memory, so many loads are in flight and nothing else is done about speed.
#include <cfloat>

#include "common.cuh"

namespace ls {
namespace {

constexpr int kThreads = 256;

struct RouterParams {
  const void *x, *router;
  int64_t *experts;
  float *gates;
  int in_features, num_experts, top_k, normalize;
  float top_p;
  const float *previous; // the rest with context only
  float *sums;
  const uint8_t *real;   // NULL: all are
  float decay;
};

template <class E> __device__ __forceinline__ float4 load4(const E *p) {
  if constexpr (sizeof(E) == 4) {
    return *reinterpret_cast<const float4 *>(p);
  } else {
    uint2 v = *reinterpret_cast<const uint2 *>(p);
    float2 a = unpack2<E>(v.x), b = unpack2<E>(v.y);
    return make_float4(a.x, a.y, b.x, b.y);
  }
}

template <class X, class R, int VEC, bool CONTEXT> __global__ void __launch_bounds__(kThreads)
    router_kernel(const __grid_constant__ RouterParams p) {
  __shared__ float logits[LS_MAX_EXPERTS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t token = blockIdx.x;
  pdl_trigger();
  pdl_wait();
  const X *x = static_cast<const X *>(p.x) + token * p.in_features;
  for (int e = warp; e < p.num_experts; e += kThreads / 32) {
    const R *row = static_cast<const R *>(p.router) + int64_t(e) * p.in_features;
    float sum = 0.f;
    if constexpr (VEC == 4) {
#pragma unroll 8
      for (int i = lane * 4; i < p.in_features; i += 128) {
        float4 a = load4(x + i), b = load4(row + i);
        sum += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
      }
    } else {
      for (int i = lane; i < p.in_features; i += 32) sum += to_float(x[i]) * to_float(row[i]);
    }
    sum = warp_sum(sum);
    if constexpr (CONTEXT) {
      const int64_t width = p.num_experts + 1;
      const float *previous = p.previous + token * width;
      const bool real = !p.real || p.real[token];
      const float weights = real ? p.decay * previous[p.num_experts] + 1.f : previous[p.num_experts];
      const float decayed = real ? p.decay * previous[e] + sum : previous[e];
      if (lane == 0) {
        p.sums[token * width + e] = decayed;
        if (e == 0) p.sums[token * width + p.num_experts] = weights;
        // 0: no real token yet. NaN weights stay NaN: rows without a past of their own.
        logits[e] = weights == 0.f ? sum : decayed / weights;
      }
    } else {
      if (lane == 0) logits[e] = sum;
    }
  }
  __syncthreads();
  if (warp != 0) return;

  // Each lane keeps the heights of experts lane, lane + 32, ...: their logits, but NaN and Inf are the largest finite number and
  // -Inf is the smallest, so that what is no expert or chosen already is below all.
  constexpr int kPerLane = LS_MAX_EXPERTS / 32;
  float mine[kPerLane];
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane + i * 32;
    const float logit = e < p.num_experts ? logits[e] : -INFINITY;
    top = fmaxf(top, logit);
    mine[i] = e < p.num_experts ? fminf(fmaxf(logit == logit ? logit : FLT_MAX, -FLT_MAX), FLT_MAX) : -INFINITY;
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
  float sum = 0.f;  // NaN if any logit is NaN or Inf, or if all are -Inf; and then so are all gates
#pragma unroll
  for (int i = 0; i < kPerLane; ++i)
    if (lane + i * 32 < p.num_experts) sum += expf(logits[lane + i * 32] - top);
  sum = warp_sum(sum);

  float chosen_sum = 0.f, my_gate = 0.f;
  int my_expert = p.num_experts;  // of what is not taken
  unsigned taken = 0;  // bit i: expert lane + 32 i is chosen already
  for (int j = 0; j < p.top_k; ++j) {
    if (p.top_p < 1.f && j > 0 && chosen_sum >= p.top_p) break;  // not so for NaN: all gates are to show it
    // Best remaining of this lane, then of the warp: of equal ones the lowest id. By logits: the exponentials of different ones
    // may be equal.
    float best = -INFINITY;
    int expert = LS_MAX_EXPERTS;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (!((taken >> i) & 1) && mine[i] > best) best = mine[i], expert = lane + i * 32;
#pragma unroll
    for (int o = 16; o; o >>= 1) {
      float other = __shfl_xor_sync(0xffffffffu, best, o);
      int other_expert = __shfl_xor_sync(0xffffffffu, expert, o);
      if (other > best || (other == best && other_expert < expert)) best = other, expert = other_expert;
    }
    const float gate = expf(logits[expert] - top) / sum;
    if (expert % 32 == lane) taken |= 1u << (expert / 32);
    chosen_sum += gate;
    if (lane == j) my_gate = gate, my_expert = expert;
  }
  if (lane < p.top_k) {
    p.experts[token * p.top_k + lane] = my_expert;
    p.gates[token * p.top_k + lane] = p.normalize ? my_gate / chosen_sum : my_gate;
  }
}

template <class X, class R> int launch_router(const RouterParams &p, int tokens, int device, void *stream) {
  bool vector = p.in_features % 4 == 0 && aligned16(p.x) && aligned16(p.router);
  auto kernel = p.sums ? (vector ? router_kernel<X, R, 4, true> : router_kernel<X, R, 1, true>)
                       : (vector ? router_kernel<X, R, 4, false> : router_kernel<X, R, 1, false>);
  return launch<RouterParams>(kernel, dim3(tokens), dim3(kThreads), p, stream, may_overlap(kernel, device));
}

template <class X> int dispatch_router(const RouterParams &p, int router_dtype, int tokens, int device, void *stream) {
  switch (router_dtype) {
    case LS_FLOAT32: return launch_router<X, float>(p, tokens, device, stream);
    case LS_FLOAT16: return launch_router<X, fp16>(p, tokens, device, stream);
    case LS_BFLOAT16: return launch_router<X, bf16>(p, tokens, device, stream);
  }
  return LS_ERROR_ARGUMENT;
}

int route(const RouterParams &p, int32_t tokens, int32_t x_dtype, int32_t router_dtype, int32_t device, void *stream) {
  if (tokens < 0 || p.in_features < 1 || p.num_experts < 1 || p.num_experts > LS_MAX_EXPERTS || p.top_k < 1 || p.top_k > LS_MAX_TOP_K ||
      p.top_k > p.num_experts || !(p.top_p > 0.f && p.top_p <= 1.f))
    return LS_ERROR_ARGUMENT;
  if (tokens == 0) return 0;
  if (!p.x || !p.router || !p.experts || !p.gates) return LS_ERROR_POINTER;
  DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  switch (x_dtype) {
    case LS_FLOAT32: return dispatch_router<float>(p, router_dtype, tokens, device, stream);
    case LS_FLOAT16: return dispatch_router<fp16>(p, router_dtype, tokens, device, stream);
    case LS_BFLOAT16: return dispatch_router<bf16>(p, router_dtype, tokens, device, stream);
  }
  return LS_ERROR_ARGUMENT;
}

}  // namespace
}  // namespace ls

LS_EXPORT int ls_router(const void *x, const void *router, int64_t *experts, float *gates, int32_t tokens, int32_t in_features,
                        int32_t num_experts, int32_t top_k, int32_t normalize, float top_p, int32_t x_dtype, int32_t router_dtype,
                        int32_t device, void *stream) {
  ls::RouterParams p{x, router, experts, gates, in_features, num_experts, top_k, normalize, top_p, nullptr, nullptr, nullptr, 0.f};
  return ls::route(p, tokens, x_dtype, router_dtype, device, stream);
}

LS_EXPORT int ls_router_context(const void *x, const void *router, const float *previous, const uint8_t *real, int64_t *experts,
                                float *gates, float *sums, float decay, int32_t tokens, int32_t in_features, int32_t num_experts,
                                int32_t top_k, int32_t normalize, float top_p, int32_t x_dtype, int32_t router_dtype, int32_t device,
                                void *stream) {
  if (!(decay >= 0.f && decay <= 1.f)) return LS_ERROR_ARGUMENT;
  if (tokens > 0 && (!previous || !sums)) return LS_ERROR_POINTER;
  ls::RouterParams p{x, router, experts, gates, in_features, num_experts, top_k, normalize, top_p, previous, sums, real, decay};
  return ls::route(p, tokens, x_dtype, router_dtype, device, stream);
}
