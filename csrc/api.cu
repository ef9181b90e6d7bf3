// What needs no kernel of its own: versions, errors, argument checks, and the two launches that make a group.
#include <algorithm>

#include "group.cuh"

#ifndef LS_ARCHITECTURES
#define LS_ARCHITECTURES "unknown architectures"
#endif
#define LS_TEXT2(x) #x
#define LS_TEXT(x) LS_TEXT2(x)

namespace ls {
namespace {

constexpr int kGridHeight = 65535;  // tokens that the other kernels take

// Whether linear_sm90.cu is the one for it.
bool takes_many(const ls_group &g) { return g.tokens > LS_FAST_TOKENS && (g.tuning & 3) == 0 && can_many(g); }

int check(const ls_group &g) {
  if (g.n_items < 1 || g.n_items > LS_MAX_GROUP || g.tokens < 0 || g.in_features < 1) return LS_ERROR_ARGUMENT;
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
  return g.tokens > kGridHeight && !takes_many(g) ? LS_ERROR_ARGUMENT : 0;
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

enum Kernel { kGeneric, kStream, kPanel, kRegisters, kMany };
constexpr int kFewColumns = 256;  // of the hidden for many tokens, that shrink_sm90.cu is faster for
constexpr int kStreamTokens = 2;  // beyond which linear_registers.cu is faster than the stream

// The stream multiplies the rows of A that were chosen, the others all of them: not worth it when few of many are.
bool can_shrink_inside(GroupParams &p, Kernel kernel) {
  const ls_group &g = p.g;
  if (kernel == kGeneric) return false;
  for (int i = 0; i < g.n_items; ++i)
    if (!aligned16(g.items[i].lora_a)) return false;
  if (kernel == kStream) return p.hidden_elements <= kHiddenInside;
  if (g.num_experts > 4 * g.tokens * g.top_k) return false;
  if (kernel == kPanel) return panel_can_shrink(p);
  for (int i = 0; i < g.n_items; ++i)
    if (g.tokens * g.top_k * g.items[i].rank > kHiddenInside) return false;
  return true;
}

// Measured on an H200 (csrc/README.md): the panel wherever its hidden is small enough.
Kernel choose(GroupParams &p) {
  if (takes_many(p.g)) return kMany;
  if (!fast(p.g)) return kGeneric;
  const int wanted = p.g.tuning & 3;
  const bool panel = (wanted == LS_TUNING_PANEL || wanted == 0) && can_panel(p);
  if (panel && (wanted == LS_TUNING_PANEL || !any_rank(p.g) || can_shrink_inside(p, kPanel))) return kPanel;
  if ((wanted == LS_TUNING_STREAM || (wanted == 0 && p.g.tokens <= kStreamTokens)) && can_stream(p)) return kStream;
  return kRegisters;
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
  if (group->tokens > LS_FAST_TOKENS) return std::max(elements, ls::takes_many(*group) ? ls::layout_hidden_many(p) : 0);
  const bool may_split = group->dtype != LS_FLOAT32;
  const int splits = elements <= ls::kPanelHidden ? std::max(ls::kSplits, ls::panel_parts(*group)) : ls::kSplits;
  return may_split ? elements * splits * 2 : elements;  // floats take two elements of 16 bits
}

LS_EXPORT int ls_linear_path(const ls_group *group) {
  if (ls::check(*group)) return -1;
  ls::GroupParams p;
  p.g = *group;
  ls::layout_hidden(p);
  const ls::Kernel kernel = ls::choose(p);
  return kernel == ls::kMany ? LS_PATH_MANY : kernel == ls::kGeneric ? LS_PATH_GENERIC : LS_PATH_FAST;
}

LS_EXPORT int ls_linear(const ls_group *group, void *stream) {
  int error = ls::check(*group);
  if (error) return error;
  if (group->tokens == 0) return 0;
  ls::DeviceGuard guard(group->device);
  if (guard.error != cudaSuccess) return guard.error;
  ls::GroupParams p;
  p.g = *group;
  ls::layout_hidden(p);
  const ls::Kernel kernel = ls::choose(p);
  if (kernel == ls::kMany) {
    const int64_t width = ls::layout_hidden_many(p) / p.g.tokens;
    if (width > 0) error = width > ls::kFewColumns ? ls::launch_shrink_many_ranks(p, stream) : ls::launch_shrink_few_ranks(p, stream);
    return error ? error : ls::launch_linear_many(p, stream);
  }
  const bool one_launch = !(p.g.tuning & LS_TUNING_TWO_LAUNCHES) && ls::any_rank(p.g) && ls::can_shrink_inside(p, kernel);
  p.sync = one_launch ? ls::next_sync(p.g.device, stream, kernel == ls::kStream ? int(p.hidden_elements) : 0) : nullptr;
  if (ls::any_rank(p.g) && !p.sync) {
    error = ls::launch_shrink(p, stream);
    if (error) return error;
  }
  switch (kernel) {
    case ls::kGeneric: return ls::launch_linear_generic(p, stream);
    case ls::kStream: return ls::launch_linear_stream(p, stream);
    case ls::kPanel: return ls::launch_linear_panel(p, stream);
    case ls::kRegisters: return ls::launch_linear_registers(p, stream);
    case ls::kMany: break;
  }
  return LS_ERROR_ARGUMENT;
}
