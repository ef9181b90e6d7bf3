// What every kernel file shares: dtypes, loads, programmatic dependent launch, launching on the right device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

#include "loraswitch.h"

#define LS_EXPORT extern "C" __attribute__((visibility("default")))

namespace ls {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(fp16 v) { return __half2float(v); }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
template <class E> __device__ __forceinline__ E from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }

// Two 16-bit values in one register, as floats and back.
template <class E> __device__ __forceinline__ float2 unpack2(uint32_t v);
template <> __device__ __forceinline__ float2 unpack2<bf16>(uint32_t v) {
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 unpack2<fp16>(uint32_t v) { return __half22float2(*reinterpret_cast<__half2 *>(&v)); }
template <class E> __device__ __forceinline__ uint32_t pack2(float a, float b);
template <> __device__ __forceinline__ uint32_t pack2<bf16>(float a, float b) {
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<uint32_t *>(&v);
}
template <> __device__ __forceinline__ uint32_t pack2<fp16>(float a, float b) {
  __half2 v = __floats2half2_rn(a, b);
  return *reinterpret_cast<uint32_t *>(&v);
}

// Static memory (weights) read once: past L1. Never for what a predecessor kernel may still be writing.
__device__ __forceinline__ uint4 load_static(const void *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// 16 bytes, coherent and kept in L1, because the warps of a block share them: activations; also from shared memory.
__device__ __forceinline__ uint4 load_cached(const void *p) { return *reinterpret_cast<const uint4 *>(p); }

// Programmatic dependent launch. `wait` returns when every earlier kernel of the stream has finished and its writes are
// visible; before it only static memory may be read, and nothing written. `trigger` lets the next launch begin. In a kernel
// that is launched with `overlap` (launch() below) every thread waits that reads or writes anything else; the others begin when
// their predecessor has ended. So a chain of them is as ordered as ordinary launches.
__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

inline bool aligned16(const void *p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// Makes `device` current for one launch and puts the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      changed_ = error == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  cudaError_t error;

 private:
  int before_ = 0;
  bool changed_ = false;
};

constexpr int kMaxDevices = 64;
// Of the device, asked for once; 1 if it cannot be asked.
inline int multiprocessors(int device) {
  static std::atomic<int> known[kMaxDevices];
  int count = known[device].load(std::memory_order_relaxed);
  if (count == 0) {
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
      cudaGetLastError();  // the launch will say what is wrong
      return 1;
    }
    known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Whether launches on the device may overlap their predecessor: the chip is sm_90 or newer AND the code CUDA picked was
// compiled for it (older PTX would lack the wait, and overlap would be a race). All kernels of the library are compiled
// for the same list of architectures, so one kernel answers for all of one parameter type.
template <class Params> inline bool may_overlap(void (*kernel)(Params), int device) {
  static std::atomic<signed char> known[kMaxDevices];  // 0 unknown, 1 yes, 2 no
  if (device < 0 || device >= kMaxDevices) return false;
  signed char k = known[device].load(std::memory_order_relaxed);
  if (k == 0) {
    cudaFuncAttributes attributes;
    bool yes = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    int major = 0;
    yes = yes && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9;
    k = yes ? 1 : 2;
    known[device].store(k, std::memory_order_relaxed);
  }
  return k == 1;
}

// Lets a kernel have so many bytes of dynamic shared memory on the current device. Told to CUDA once for each device: it keeps that, and
// being told takes the host a microsecond.
template <auto kKernel> inline cudaError_t allow_shared(int device, int bytes) {
  static std::atomic<bool> told[kMaxDevices];
  const bool known = device >= 0 && device < kMaxDevices;
  if (known && told[device].load(std::memory_order_relaxed)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (known && error == cudaSuccess) told[device].store(true, std::memory_order_relaxed);
  return error;
}

bool follows_ours(cudaStream_t stream);  // pdl.cu
void launched(cudaStream_t stream);

// `overlap`: the kernel may begin before its predecessor has ended, if that is a kernel of this library too. `cluster`: how many
// neighbouring blocks of the grid's first dimension form a thread block cluster.
template <class Params> inline int launch(void (*kernel)(Params), dim3 grid, dim3 block, const Params &params, void *stream, bool overlap,
                                          size_t dynamic_shared = 0, unsigned cluster = 1) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (overlap && follows_ours(config.stream)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
  if (error == cudaSuccess) launched(config.stream);
  if (error != cudaSuccess) cudaGetLastError();  // cleared, so that the framework does not meet it at its next call
  return static_cast<int>(error);
}

}  // namespace ls
