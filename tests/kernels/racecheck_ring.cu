// compute-sanitizer's racecheck takes an arrival at a barrier in shared memory for that thread's reads alone: one lane that arrives for
// its warp is reported, even behind bar.warp.sync, which orders the other lanes' reads before it. So each thread of
// csrc/linear_split_k_sm90.cu arrives for itself.
//
//   nvcc -std=c++17 -gencode arch=compute_90,code=sm_90 -o /tmp/ring tests/kernels/racecheck_ring.cu
//   compute-sanitizer --tool racecheck /tmp/ring 0    # the first lane of each warp arrives: hazards
//   compute-sanitizer --tool racecheck /tmp/ring 1    # each thread arrives: none
//
// As seen on an H200 with the compute-sanitizer of CUDA 13.0.
#include <cstdint>
#include <cstdio>
#include <cstdlib>

constexpr int kStages = 2, kBytes = 1024, kWarps = 2, kSteps = 64;

__device__ __forceinline__ uint32_t shared_address(const void *at) { return uint32_t(__cvta_generic_to_shared(at)); }
__device__ __forceinline__ void init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

// One warp copies into a ring of stages, two read them.
__global__ void ring(const uint32_t *in, uint32_t *out, bool each_arrives, unsigned all_lanes) {
  __shared__ __align__(128) uint32_t data[kStages][kBytes / 4];
  __shared__ __align__(8) uint64_t barriers[2 * kStages];
  const uint32_t full = shared_address(barriers), empty = full + kStages * 8, at = shared_address(data);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0)
    for (int i = 0; i < kStages; ++i) init(full + i * 8, 1), init(empty + i * 8, each_arrives ? kWarps * 32 : kWarps);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  if (warp == kWarps) {
    for (int i = 0; i < kSteps && lane == 0; ++i) {
      const int stage = i % kStages;
      wait(empty + stage * 8, i / kStages % 2 ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full + stage * 8), "r"(kBytes) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at + stage * kBytes),
                   "l"(in + i * (kBytes / 4)), "r"(kBytes), "r"(full + stage * 8)
                   : "memory");
    }
    return;
  }
  uint32_t sum = 0;
  for (int i = 0; i < kSteps; ++i) {
    const int stage = i % kStages;
    wait(full + stage * 8, i / kStages % 2);
    uint32_t v[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(at + stage * kBytes + threadIdx.x * 16)
                 : "memory");
    sum += v[0] ^ v[1] ^ v[2] ^ v[3];
    asm volatile("bar.warp.sync %0;" ::"r"(all_lanes) : "memory");
    if (each_arrives || lane == 0) arrive(empty + stage * 8);
  }
  out[threadIdx.x] = sum;
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
