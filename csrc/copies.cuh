// Asynchronous copies into shared memory, and barriers among some of a block's warps.
#pragma once
#include "common.cuh"

namespace ls {

// 16 bytes, past L1. A group of copies is what a thread has started since its last copy_commit().
__device__ __forceinline__ void copy16(uint32_t to, const void *from) {  // `to`: an address of shared memory
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy16(void *to, const void *from) { copy16(static_cast<uint32_t>(__cvta_generic_to_shared(to)), from); }
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of this thread but the newest N have arrived.
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Barriers by number, of so many threads; 0 is __syncthreads().
__device__ __forceinline__ void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace ls
