// The exported functions without a kernel of their own: versions, errors, argument checks, and ls_linear(), which chooses the kernel
// for a group of linears and launches it (choose(), can_shrink_inside()).
#include <algorithm>

#include "four_bits.cuh"
#include "int4_tiles.cuh"

#ifndef LS_ARCHITECTURES
#define LS_ARCHITECTURES "unknown architectures"
#endif
#define LS_TEXT2(x) #x
#define LS_TEXT(x) LS_TEXT2(x)

namespace ls {
namespace {

constexpr int kTuningKernel = 3;  // the bits of ls_group.tuning that name one of three kernels
constexpr int kGridHeight = 65535;  // of a grid, and so tokens that all kernels but linear_sm90.cu take

// Whether linear_split_k_sm90.cu is the one for it. Measured on an H200 (docs/kernel_log.md): always for more tokens than the others take.
// It reads A and B of all experts, so for fewer only where most are chosen anyway, and the hidden is too wide for linear_persistent.cu,
// or, from 17 on, the group is large.
bool takes_split_k(const ls_group &g) {
  constexpr int kWide = 512;  // columns of the hidden
  constexpr int kMany = 16;   // tokens that linear_persistent.cu is faster for
  constexpr int64_t kLarge = 64 << 20;  // bytes of weights
  if (g.tuning & LS_TUNING_SPLIT_K) return can_split_k(g);
  if (g.tuning || !can_split_k(g)) return false;
  if (g.tokens > LS_FAST_TOKENS) return true;
  if (g.tokens <= kStreamingTokens || g.tokens * g.top_k < g.num_experts) return false;
  int64_t weights = 0;
  for (int i = 0; i < g.n_items; ++i) {
    if (g.num_experts * g.items[i].rank >= kWide) return true;
    weights += int64_t(g.items[i].out_features) * g.in_features * 2;
  }
  return g.tokens > kMany && weights >= kLarge && g.tokens * g.top_k >= 2 * g.num_experts && any_rank(g);
}
// Whether linear_sm90.cu is.
bool takes_sm90(const ls_group &g) { return g.tokens > LS_FAST_TOKENS && (g.tuning & kTuningKernel) == 0 && can_sm90(g); }

bool fast(const ls_group &g) {
  if (g.dtype == LS_FLOAT32 || g.transposed || g.tokens > LS_FAST_TOKENS || g.in_features % 8) return false;
  if (!aligned16(g.x) || !aligned16(g.hidden)) return false;
  for (int i = 0; i < g.n_items; ++i) {
    const ls_item &item = g.items[i];
    if (item.rank % 8 || !aligned16(item.weight) || !aligned16(item.lora_b)) return false;
  }
  return true;
}

bool has_four_bits(const ls_group &g) { return g.items[0].format != LS_FORMAT_DTYPE; }

// Weights of 4 bits go to one kernel, so what it does not take is refused.
int check_four_bits(const ls_group &g) {
  const int block = g.scale_block;
  const bool int4 = g.items[0].format == LS_FORMAT_INT4;
  if (g.transposed || g.tokens > LS_FAST_TOKENS || block < 1 || (block & (block - 1))) return LS_ERROR_ARGUMENT;
  if (int4 ? g.dtype != LS_BFLOAT16 || block < 32 || block > 256 : g.dtype == LS_FLOAT32 || block < kFeatures4 || g.in_features % block)
    return LS_ERROR_ARGUMENT;
  if (!int4 && !g.code) return LS_ERROR_POINTER;
  for (int i = 0; i < g.n_items; ++i) {
    const ls_item &item = g.items[i];
    if (!item.weight || !item.scales) return LS_ERROR_POINTER;
    if (int4 && (reinterpret_cast<uintptr_t>(item.scales) & 3)) return LS_ERROR_ARGUMENT;  // scale and zero are read as one
    const int64_t rows = item.out_features + kTileRows, bytes = (g.in_features + LS_INT4_FEATURES) / 2;
    if (rows * bytes > UINT32_MAX) return LS_ERROR_ARGUMENT;  // offsets have 32 bits
  }
  return fast(g) ? 0 : LS_ERROR_ARGUMENT;
}

int check(const ls_group &g) {
  if (g.n_items < 1 || g.n_items > LS_MAX_GROUP || g.tokens < 0 || g.in_features < 1) return LS_ERROR_ARGUMENT;
  if (g.dtype < LS_FLOAT32 || g.dtype > LS_BFLOAT16) return LS_ERROR_ARGUMENT;
  if (g.tokens > 0 && !g.x) return LS_ERROR_POINTER;
  for (int i = 0; i < g.n_items; ++i) {
    const ls_item &item = g.items[i];
    if (item.out_features < 1 || item.rank < 0 || item.rank > LS_MAX_RANK) return LS_ERROR_ARGUMENT;
    if (item.format < LS_FORMAT_DTYPE || item.format > LS_FORMAT_INT4 || item.format != g.items[0].format) return LS_ERROR_ARGUMENT;
    if (item.scales && item.format == LS_FORMAT_DTYPE) return LS_ERROR_ARGUMENT;
    if (g.tokens > 0 && !item.out) return LS_ERROR_POINTER;
    if (item.rank > 0 && (!item.lora_a || !item.lora_b)) return LS_ERROR_POINTER;
  }
  if (any_rank(g)) {
    if (g.top_k < 1 || g.top_k > LS_MAX_TOP_K || g.num_experts < 1 || g.num_experts > LS_MAX_EXPERTS) return LS_ERROR_ARGUMENT;
    if (g.tokens > 0 && (!g.experts || !g.gates || !g.hidden)) return LS_ERROR_POINTER;
  }
  if (has_four_bits(g)) return check_four_bits(g);
  if (g.tokens > 0 && !g.hidden && takes_split_k(g)) return LS_ERROR_POINTER;
  return g.tokens > kGridHeight && !takes_sm90(g) ? LS_ERROR_ARGUMENT : 0;
}

enum Kernel { kGeneric, kStreaming, kPersistent, kRegisters, kSplitK, kSm90 };
constexpr int kFewColumns = 256;  // up to so many columns of the hidden, shrink_sm90.cu is faster than linear_sm90.cu

// Whether the kernel can compute the hidden itself. linear_streaming.cu, and linear_persistent.cu if there are many experts, read lora_a of
// the chosen ones only. Otherwise that of all is read, which does not pay if only few of many experts were chosen.
bool can_shrink_inside(GroupParams &p, Kernel kernel) {
  const ls_group &g = p.g;
  if (kernel == kGeneric) return false;
  for (int i = 0; i < g.n_items; ++i)
    if (!aligned16(g.items[i].lora_a)) return false;
  if (kernel == kStreaming) return p.hidden_elements <= kHiddenInside;
  if (kernel == kPersistent && persistent_takes_chosen(p)) return true;
  if (g.num_experts > 4 * g.tokens * g.top_k) return false;
  if (kernel == kPersistent) return persistent_can_shrink(p);
  for (int i = 0; i < g.n_items; ++i)
    if (g.tokens * g.top_k * g.items[i].rank > kHiddenInside) return false;
  return true;
}

// Measured on an H200 (docs/kernel_log.md): linear_persistent.cu wherever it shrinks inside, by the limits at the end of that file.
Kernel choose(GroupParams &p, bool split_k = true) {
  if (split_k && takes_split_k(p.g)) return kSplitK;
  if (takes_sm90(p.g)) return kSm90;
  if (!fast(p.g)) return kGeneric;
  if (has_four_bits(p.g)) return kRegisters;
  const int wanted = p.g.tuning & kTuningKernel;
  const bool panel = (wanted == LS_TUNING_PERSISTENT || wanted == 0) && can_persistent(p);
  if (panel && (wanted == LS_TUNING_PERSISTENT || !any_rank(p.g) || can_shrink_inside(p, kPersistent))) return kPersistent;
  if ((wanted == LS_TUNING_STREAMING || (wanted == 0 && p.g.tokens <= kStreamingTokens)) && can_streaming(p)) return kStreaming;
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
  int64_t elements = ls::layout_hidden(p), padded = 0;
  const bool split_k = ls::takes_split_k(*group);
  if (split_k || ls::takes_sm90(*group)) padded = ls::layout_hidden_sm90(p);
  if (split_k) padded += ls::split_k_elements(*group);
  if (group->tokens > LS_FAST_TOKENS) return std::max(elements, padded);
  const bool may_split = group->dtype != LS_FLOAT32;
  const int splits = elements <= ls::kPersistentHidden ? std::max(ls::kSplits, ls::persistent_parts(*group)) : ls::kSplits;
  if (may_split) elements *= splits * 2;  // floats take two elements of 16 bits
  return std::max(elements, padded);  // either may be called for, if there are no counters or x lies elsewhere
}

LS_EXPORT int ls_linear_path(const ls_group *group) {
  if (ls::check(*group)) return -1;
  ls::GroupParams p;
  p.g = *group;
  ls::layout_hidden(p);
  const ls::Kernel kernel = ls::choose(p);
  return kernel == ls::kSm90 || kernel == ls::kSplitK ? LS_PATH_SM90 : kernel == ls::kGeneric ? LS_PATH_GENERIC : LS_PATH_FAST;
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
  ls::Kernel kernel = ls::choose(p);
  if (kernel == ls::kSplitK) {
    ls::layout_hidden_sm90(p);
    if (ls::Sync *const sync = ls::next_sync(p.g.device, stream, ls::split_k_words(p.g))) return ls::launch_linear_split_k(p, sync, stream);
    ls::layout_hidden(p);
    kernel = ls::choose(p, false);
  }
  if (kernel == ls::kSm90) {
    const int64_t width = ls::layout_hidden_sm90(p) / p.g.tokens;
    if (width > 0) error = width > ls::kFewColumns ? ls::launch_shrink_many_ranks(p, stream) : ls::launch_shrink_few_ranks(p, stream);
    return error ? error : ls::launch_linear_sm90(p, stream);
  }
  const bool one_launch = !(p.g.tuning & LS_TUNING_TWO_LAUNCHES) && ls::any_rank(p.g) && ls::can_shrink_inside(p, kernel);
  p.sync = one_launch ? ls::next_sync(p.g.device, stream, kernel == ls::kStreaming ? int(p.hidden_elements) : 0) : nullptr;
  if (ls::any_rank(p.g) && !p.sync) {
    error = ls::launch_shrink(p, stream);
    if (error) return error;
  }
  switch (kernel) {
    case ls::kGeneric: return ls::launch_linear_generic(p, stream);
    case ls::kStreaming: return ls::launch_linear_streaming(p, stream);
    case ls::kPersistent: return ls::launch_linear_persistent(p, stream);
    case ls::kRegisters: return ls::launch_linear_registers(p, stream);
    case ls::kSplitK:
    case ls::kSm90: break;
  }
  return LS_ERROR_ARGUMENT;
}
