// compute-sanitizer's racecheck takes an arrival at a barrier in shared memory for that thread's reads alone: one lane that arrives for
// its warp is reported, even behind bar.warp.sync, which orders the other lanes' reads before it. So each thread of
// csrc/linear_split_k_sm90.cu arrives for itself.
//
//   nvcc -std=c++17 -gencode arch=compute_90a,code=sm_90a -o /tmp/ring tests/kernels/racecheck_ring.cu
//   compute-sanitizer --tool racecheck /tmp/ring 0    # the first lane of each warp arrives: hazards
//   compute-sanitizer --tool racecheck /tmp/ring 1    # each thread arrives: none
//
// As seen on an H200 with the compute-sanitizer of CUDA 13.0.
#include <cstdio>
#include <cstdlib>

#include "../../csrc/sm90.cuh"

using namespace ls;

constexpr int kStages = 2, kBytes = 1024, kWarps = 2, kSteps = 64;

// One warp copies into a ring of stages, two read them.
__global__ void ring(const uint32_t *in, uint32_t *out, bool each_arrives, unsigned all_lanes) {
#ifdef LS_HAS_SM90A
  __shared__ __align__(128) uint32_t data[kStages][kBytes / 4];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t full = shared_address(barriers), empty = full + kStages * 8, at = shared_address(data);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0)
    for (int i = 0; i < kStages; ++i) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, each_arrives ? kWarps * 32 : kWarps);
  mbarrier_inits_done();
  __syncthreads();
  if (warp == kWarps) {
    for (int i = 0; i < kSteps && lane == 0; ++i) {
      const int stage = i % kStages;
      mbarrier_wait(empty + stage * 8, i / kStages % 2 ^ 1);
      mbarrier_expect(full + stage * 8, kBytes);
      copy_bytes(at + stage * kBytes, in + i * (kBytes / 4), kBytes, full + stage * 8);
    }
    return;
  }
  uint32_t sum = 0;
  for (int i = 0; i < kSteps; ++i) {
    const int stage = i % kStages;
    mbarrier_wait(full + stage * 8, i / kStages % 2);
    const uint4 v = read_shared(at + stage * kBytes + threadIdx.x * 16);
    sum += v.x ^ v.y ^ v.z ^ v.w;
    asm volatile("bar.warp.sync %0;" ::"r"(all_lanes) : "memory");
    if (each_arrives || lane == 0) mbarrier_arrive(empty + stage * 8);
  }
  out[threadIdx.x] = sum;
#endif
}

int main(int argc, char **argv) {
  if (argc != 2) {
    fprintf(stderr, "%s WHO: 0 the first lane of each warp arrives, 1 each thread\n", argv[0]);
    return 2;
  }
  uint32_t *in, *out;
  cudaMalloc(&in, kSteps * kBytes), cudaMalloc(&out, kWarps * 32 * 4), cudaMemset(in, 1, kSteps * kBytes);
  ring<<<1, kWarps * 32 + 32>>>(in, out, atoi(argv[1]), ~0u);
  const cudaError_t error = cudaDeviceSynchronize();
  return printf("%s\n", cudaGetErrorString(error)), error;
}
