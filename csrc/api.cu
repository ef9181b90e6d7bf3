// What needs no kernel of its own: versions, errors, argument checks, and the two launches that make a group.
#include "group.cuh"

#ifndef LS_ARCHITECTURES
#define LS_ARCHITECTURES "unknown architectures"
#endif
#define LS_TEXT2(x) #x
#define LS_TEXT(x) LS_TEXT2(x)

namespace ls {
namespace {

int check(const ls_group &g) {
  if (g.n_items < 1 || g.n_items > LS_MAX_GROUP || g.tokens < 0 || g.tokens > 65535 || g.in_features < 1) return LS_ERROR_ARGUMENT;
  if (g.dtype < LS_FLOAT32 || g.dtype > LS_BFLOAT16) return LS_ERROR_ARGUMENT;
  if (g.tokens > 0 && !g.x) return LS_ERROR_POINTER;
  for (int i = 0; i < g.n_items; ++i) {
    const ls_item &item = g.items[i];
    if (item.out_features < 1 || item.rank < 0 || item.rank > LS_MAX_RANK) return LS_ERROR_ARGUMENT;
    if (g.tokens > 0 && !item.out) return LS_ERROR_POINTER;
    if (item.rank > 0 && (!item.lora_a || !item.lora_b)) return LS_ERROR_POINTER;
  }
  if (any_rank(g)) {
    if (g.top_k < 1 || g.top_k > LS_MAX_TOP_K || g.num_experts < 1 || g.num_experts > LS_MAX_EXPERTS) return LS_ERROR_ARGUMENT;
    if (g.tokens > 0 && (!g.experts || !g.gates || !g.hidden)) return LS_ERROR_POINTER;
  }
  return 0;
}

bool fast(const ls_group &g) {
  if (g.dtype == LS_FLOAT32 || g.transposed || g.tokens > LS_FAST_TOKENS || g.in_features % 8) return false;
  if (!aligned16(g.x) || !aligned16(g.hidden)) return false;
  for (int i = 0; i < g.n_items; ++i) {
    const ls_item &item = g.items[i];
    if (item.rank % 8 || !aligned16(item.weight) || !aligned16(item.lora_b)) return false;
  }
  return true;
}

// The stream multiplies the rows of A that were chosen, linear.cu all of them: not worth it when few of many are.
bool can_shrink_inside(const GroupParams &p, bool streams) {
  const ls_group &g = p.g;
  if (streams && p.hidden_elements > kHiddenInside) return false;
  for (int i = 0; i < g.n_items; ++i)
    if (!aligned16(g.items[i].lora_a) || (!streams && g.tokens * g.top_k * g.items[i].rank > kHiddenInside)) return false;
  return streams || g.num_experts <= 4 * g.tokens * g.top_k;
}

}  // namespace
}  // namespace ls

LS_EXPORT int ls_abi_version(void) { return LS_ABI_VERSION; }

LS_EXPORT const char *ls_build_info(void) {
  return "nvcc " LS_TEXT(__CUDACC_VER_MAJOR__) "." LS_TEXT(__CUDACC_VER_MINOR__) ", " LS_ARCHITECTURES;
}

LS_EXPORT const char *ls_error_string(int code) {
  if (code == LS_ERROR_ARGUMENT) return "a size, count or dtype is outside what the kernels take";
  if (code == LS_ERROR_POINTER) return "a required pointer is NULL";
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

LS_EXPORT int ls_device_count(int *count) {
  cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) cudaGetLastError(), *count = 0;
  return error;
}

LS_EXPORT int ls_driver_version(int *version) { return cudaDriverGetVersion(version); }

namespace ls {
__global__ void probe_kernel() {}
}  // namespace ls

LS_EXPORT int ls_device_supported(int device) {
  ls::DeviceGuard guard(device);
  if (guard.error != cudaSuccess) return guard.error;
  cudaFuncAttributes attributes;  // fails with cudaErrorNoKernelImageForDevice where nothing in the library runs
  cudaError_t error = cudaFuncGetAttributes(&attributes, ls::probe_kernel);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

LS_EXPORT int64_t ls_hidden_elements(const ls_group *group) {
  ls::GroupParams p;
  p.g = *group;
  const int64_t elements = ls::layout_hidden(p);
  const bool may_split = group->dtype != LS_FLOAT32 && group->tokens <= LS_FAST_TOKENS;
  return may_split ? elements * ls::kSplits * 2 : elements;  // floats take two elements of 16 bits
}

LS_EXPORT int ls_linear_path(const ls_group *group) {
  if (ls::check(*group)) return -1;
  return ls::fast(*group) ? LS_PATH_FAST : LS_PATH_GENERIC;
}

static constexpr int kStreamTokens = 2;

LS_EXPORT int ls_linear(const ls_group *group, void *stream) {
  int error = ls::check(*group);
  if (error) return error;
  if (group->tokens == 0) return 0;
  ls::DeviceGuard guard(group->device);
  if (guard.error != cudaSuccess) return guard.error;
  ls::GroupParams p;
  p.g = *group;
  ls::layout_hidden(p);
  const bool fast = ls::fast(p.g);
  // Measured on an H200: up to kStreamTokens the stream is faster, beyond it the registers (csrc/README.md).
  const int kernel = p.g.tuning & 3;
  const bool streams = fast && (kernel == LS_TUNING_STREAM || (kernel == 0 && p.g.tokens <= kStreamTokens)) && ls::can_stream(p);
  const bool one_launch = fast && !(p.g.tuning & LS_TUNING_TWO_LAUNCHES) && ls::can_shrink_inside(p, streams);
  p.sync = ls::any_rank(p.g) && one_launch ? ls::next_sync(p.g.device, stream, streams ? int(p.hidden_elements) : 0) : nullptr;
  if (ls::any_rank(p.g) && !p.sync) {
    error = ls::launch_shrink(p, stream);
    if (error) return error;
  }
  if (!fast) return ls::launch_linear_generic(p, stream);
  return streams ? ls::launch_linear_stream(p, stream) : ls::launch_linear_registers(p, stream);
}
