// compute-sanitizer's racecheck reports hazards in correct programs when some of a block's warps have met at a barrier of their
// own before all meet. csrc/linear_persistent.cu, which did so, uses a barrier in shared memory instead, as the last kernel here.
//
//   nvcc -std=c++17 -gencode arch=compute_90,code=sm_90 -o /tmp/alarm tests/kernels/racecheck_false_alarm.cu
//   compute-sanitizer --tool racecheck /tmp/alarm 0 5    # __syncthreads(): 1 hazard (0 0: none)
//   compute-sanitizer --tool racecheck /tmp/alarm 1 40   # a barrier by number: 1 hazard (1 5: none)
//   compute-sanitizer --tool racecheck /tmp/alarm 2 40   # a barrier in shared memory: none
//
// As seen on an H100 and an H200 with the compute-sanitizer of CUDA 13.0.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

__device__ __forceinline__ void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Threads 64 to 127 meet `times` times, write, and meet the others, who then read.
__global__ void by_syncthreads(int *out, int times) {
  __shared__ int values[64];
  const int t = threadIdx.x;
  if (t >= 64) {
    for (int i = 0; i < times; ++i) barrier(2, 64);
    values[t - 64] = t;
  }
  __syncthreads();
  if (t < 64) out[t] = values[63 - t];
}

__global__ void by_number(int *out, int times) {
  __shared__ int values[64];
  const int t = threadIdx.x;
  if (t >= 64) {
    for (int i = 0; i < times; ++i) barrier(2, 64);
    values[t - 64] = t;
    barrier(3, 128);
    return;
  }
  barrier(3, 128);
  out[t] = values[63 - t];
}

__global__ void in_shared_memory(int *out, int times) {
  __shared__ int values[64];
  __shared__ __align__(8) uint64_t written_;
  const int t = threadIdx.x;
  const uint32_t written = uint32_t(__cvta_generic_to_shared(&written_));
  if (t == 0) asm volatile("mbarrier.init.shared::cta.b64 [%0], 64;" ::"r"(written) : "memory");
  __syncthreads();
  if (t >= 64) {
    for (int i = 0; i < times; ++i) barrier(2, 64);
    values[t - 64] = t;
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(written) : "memory");
    return;
  }
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@!done bra again;\n}" ::"r"(written) : "memory");
  out[t] = values[63 - t];
}

int main(int argc, char **argv) {
  if (argc != 3) {
    fprintf(stderr, "%s KERNEL TIMES: 0 __syncthreads(), 1 a barrier by number, 2 a barrier in shared memory\n", argv[0]);
    return 2;
  }
  void (*const kernels[])(int *, int) = {by_syncthreads, by_number, in_shared_memory};
  int *out, found[64];
  cudaMalloc(&out, sizeof found);
  kernels[atoi(argv[1]) % 3]<<<1, 128>>>(out, atoi(argv[2]));
  const cudaError_t error = cudaMemcpy(found, out, sizeof found, cudaMemcpyDeviceToHost);
  for (int t = 0; t < 64; ++t)
    if (found[t] != 127 - t) return printf("wrong\n"), 1;
  return printf("%s\n", cudaGetErrorString(error)), error;
}
