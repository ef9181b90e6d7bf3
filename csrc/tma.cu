// Tensor maps for TMA copies, and whether a device is an sm_90a. Host code only.
//
// cuTensorMapEncodeTiled of the driver makes the maps. It is looked up at run time, so that the library does not link libcuda.
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

__global__ void sm90a_kernel() {
#ifdef LS_HAS_SM90A
  __shared__ uint64_t barrier;  // by which the host sees that this was compiled for such a GPU
  mbarrier_init(shared_address(&barrier), 1);
#endif
}

}  // namespace

bool make_map(CUtensorMap &map, int dtype, const void *tensor, const Dimension *dimensions, int n, bool swizzled) {
  constexpr int kMost = 5;  // that the driver takes
  cuuint64_t sizes[kMost], strides[kMost];
  cuuint32_t box[kMost], ones[kMost];
  for (int i = 0; i < n; ++i) {
    sizes[i] = dimensions[i].size, strides[i] = dimensions[i].stride * 2;
    box[i] = dimensions[i].box, ones[i] = 1;
  }
  const Encode function = encode();
  return function && function(&map, dtype == LS_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, n,
                              const_cast<void *>(tensor), sizes, strides + 1, box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
                              swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
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
