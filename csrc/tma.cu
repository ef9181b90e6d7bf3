// Tensor maps for TMA copies, and whether a device is an sm_90a. Host code only.
//
// cuTensorMapEncodeTiled of the driver makes the maps. It is looked up at run time, so that the library does not link libcuda.
// A map says where a tensor lies and how, and nothing else. So each thread keeps those that it has made: a call for many tokens
// takes a dozen, of which all but those of its input and its hidden are the same in every forward.
#include <cstring>
#include <memory>
#include <new>

#include "sm90.cuh"

namespace ls {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encode() {
  static std::atomic<Encode> known{nullptr};
  Encode function = known.load(std::memory_order_acquire);
  if (function) return function;
  void *found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  function = reinterpret_cast<Encode>(found);
  known.store(function, std::memory_order_release);
  return function;
}

constexpr int kMost = 5;  // dimensions that the driver takes

// All that a map depends on, without gaps: it is compared byte by byte.
struct Key {
  const void *tensor;
  cuuint64_t sizes[kMost], strides[kMost];  // in elements; in bytes
  cuuint32_t box[kMost];
  uint8_t dtype, dimensions, swizzled, made;  // made: 0 where nothing is kept yet
};
static_assert(sizeof(Key) == 8 + 2 * 8 * kMost + 4 * kMost + 4, "no gaps");

struct Kept {
  CUtensorMap map;
  Key key;
};

// Where a key's map is kept: one of two neighbours.
constexpr int kKept = 4096;  // a model of 32 layers has some 700; 1 MiB for each thread that calls for many tokens

int place_of(const Key &key) {
  uint64_t mixed = reinterpret_cast<uint64_t>(key.tensor) >> 4;
  mixed ^= key.sizes[0] * 0x9e3779b97f4a7c15 + key.sizes[1] * 0xc2b2ae3d27d4eb4f + key.box[1];
  mixed *= 0xff51afd7ed558ccd;
  return int(mixed >> 52);
}
static_assert(kKept == 1 << (64 - 52), "as many places as place_of() tells apart");

__global__ void sm90a_kernel() {
#ifdef LS_HAS_SM90A
  __shared__ uint64_t barrier;  // by which the host sees that this was compiled for such a GPU
  mbarrier_init(shared_address(&barrier), 1);
#endif
}

}  // namespace

bool make_map(CUtensorMap &map, int dtype, const void *tensor, const Dimension *dimensions, int n, bool swizzled) {
  Key key = {};
  key.tensor = tensor, key.dtype = uint8_t(dtype), key.dimensions = uint8_t(n), key.swizzled = swizzled, key.made = 1;
  cuuint32_t ones[kMost];
  for (int i = 0; i < n; ++i) {
    key.sizes[i] = dimensions[i].size, key.strides[i] = dimensions[i].stride * 2;
    key.box[i] = dimensions[i].box, ones[i] = 1;
  }
  thread_local std::unique_ptr<Kept[]> table;
  if (!table) table.reset(new (std::nothrow) Kept[kKept]());
  Kept *kept = nullptr;
  if (table) {
    kept = &table[place_of(key)];
    Kept *const neighbour = &table[place_of(key) ^ 1];
    for (Kept *each : {kept, neighbour})
      if (std::memcmp(&each->key, &key, sizeof key) == 0) {
        map = each->map;
        return true;
      }
    if (kept->key.made && !neighbour->key.made) kept = neighbour;
  }
  const Encode function = encode();
  const bool made = function && function(&map, dtype == LS_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, n,
                                         const_cast<void *>(tensor), key.sizes, key.strides + 1, key.box, ones,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  if (made && kept) kept->map = map, kept->key = key;
  return made;
}

bool has_sm90a(int device) {
  static std::atomic<signed char> known[kMaxDevices];  // 0 unknown, 1 yes, 2 no
  if (device < 0 || device >= kMaxDevices) return false;
  signed char k = known[device].load(std::memory_order_relaxed);
  if (k == 0) {
    const DeviceGuard guard(device);  // attributes of a kernel are the current device's
    int major = 0, minor = 0;
    cudaFuncAttributes attributes;
    bool yes = guard.error == cudaSuccess;
    yes = yes && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
    yes = yes && cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && minor == 0;
    yes = yes && cudaFuncGetAttributes(&attributes, sm90a_kernel) == cudaSuccess && attributes.sharedSizeBytes > 0;
    yes = yes && encode();
    if (!yes) cudaGetLastError();
    k = yes ? 1 : 2;
    known[device].store(k, std::memory_order_relaxed);
  }
  return k == 1;
}

}  // namespace ls
