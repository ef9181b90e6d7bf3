// Widen: lora_b of all experts of a linear as one matrix, for every linear of a group, one launch.
//
//   lora_b [E, out, rank]  ->  out [out, E * rank]: out[o, e * rank + q] = lora_b[e, o, q]
//   dtypes: float16, bfloat16; rank divisible by 8
//   grid: blocks of 256 threads, each copies 4 units of 16 bytes (8 ranks of one expert), neighbours in a row of the result; no shared
//   memory
//
// With many ranks the product of the hidden with this matrix is best left to cuBLAS, which wants it as the inner dimension.
#include "common.cuh"

namespace ls {
namespace {

constexpr int kUnit = 8, kThreads = 256, kEach = 4;  // ranks; units of a thread, all on their way at once

struct WidenParams {
  ls_expand_args a;
  int begin[LS_MAX_GROUP + 1];  // first block of each linear
};

__global__ void __launch_bounds__(kThreads) widen_kernel(const __grid_constant__ WidenParams p) {
  int i = 0;
  while (i + 1 < p.a.n_items && int(blockIdx.x) >= p.begin[i + 1]) ++i;
  const ls_expand_item &item = p.a.items[i];
  const unsigned out = item.out_features, units_each = item.rank / kUnit, width = p.a.num_experts * units_each;
  const unsigned units = out * width, first = (blockIdx.x - p.begin[i]) * (kThreads * kEach) + threadIdx.x;
  uint4 v[kEach];
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    const unsigned unit = first + k * kThreads, row = unit / width, column = unit - row * width, e = column / units_each;
    if (unit < units)
      v[k] = load_static(static_cast<const uint4 *>(item.lora_b) + ((e * out + row) * units_each + column - e * units_each));
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k)
    if (first + k * kThreads < units) static_cast<uint4 *>(item.out)[first + k * kThreads] = v[k];
}

int check(const ls_expand_args &a) {
  if (a.n_items < 1 || a.n_items > LS_MAX_GROUP || a.device < 0 || a.device >= kMaxDevices) return LS_ERROR_ARGUMENT;
  if (a.dtype != LS_FLOAT16 && a.dtype != LS_BFLOAT16) return LS_ERROR_ARGUMENT;
  if (a.num_experts < 1 || a.num_experts > LS_MAX_EXPERTS) return LS_ERROR_ARGUMENT;
  for (int i = 0; i < a.n_items; ++i) {
    const ls_expand_item &item = a.items[i];
    if (item.rank < kUnit || item.rank > LS_MAX_RANK || item.rank % kUnit || item.out_features < 1) return LS_ERROR_ARGUMENT;
    if (int64_t(item.out_features) * a.num_experts * (item.rank / kUnit) > INT32_MAX) return LS_ERROR_ARGUMENT;
    if (!item.lora_b) return LS_ERROR_POINTER;
    if (!aligned16(item.lora_b)) return LS_ERROR_ARGUMENT;
  }
  return 0;
}

}  // namespace
}  // namespace ls

LS_EXPORT int ls_widen_takes(const ls_expand_args *args) { return ls::check(*args) == 0; }

LS_EXPORT int ls_widen(const ls_expand_args *args, void *stream) {
  const int error = ls::check(*args);
  if (error) return error;
  ls::WidenParams p;
  p.a = *args;
  int blocks = 0;  // at most 8 * 2^31 / 2^10
  for (int i = 0; i < args->n_items; ++i) {
    const ls_expand_item &item = args->items[i];
    if (!item.out) return LS_ERROR_POINTER;
    if (!ls::aligned16(item.out)) return LS_ERROR_ARGUMENT;
    p.begin[i] = blocks;
    const int units = item.out_features * args->num_experts * (item.rank / ls::kUnit);
    blocks += (units - 1) / (ls::kThreads * ls::kEach) + 1;
  }
  p.begin[args->n_items] = blocks;
  ls::DeviceGuard guard(args->device);
  if (guard.error != cudaSuccess) return guard.error;
  return ls::launch<ls::WidenParams>(ls::widen_kernel, dim3(unsigned(blocks)), dim3(ls::kThreads), p, stream, false);
}
