// cp.async copies into shared memory, named barriers (bar.sync) and mbarriers.
#pragma once
#include "common.cuh"

namespace ls {

// 16 bytes, past L1. A group of copies is what a thread has started since its last copy_commit().
__device__ __forceinline__ void copy16(uint32_t to, const void *from) {  // `to`: an address of shared memory
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ uint32_t shared_address(const void *p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void copy16(void *to, const void *from) { copy16(shared_address(to), from); }
// The same by way of L1, for what other blocks of the multiprocessor read too.
__device__ __forceinline__ void copy16_kept(uint32_t to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void store_zeros16(uint32_t to) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(to), "r"(0) : "memory");
}
__device__ __forceinline__ uint32_t load_shared4(uint32_t from) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(from) : "memory");
  return v;
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups of this thread but the newest N have arrived.
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Barriers by number, of so many threads; 0 is __syncthreads().
__device__ __forceinline__ void barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// The same as barrier(), and whether all of them say so.
__device__ __forceinline__ bool barrier_all(int id, int threads, bool so) {
  int all;
  asm volatile("{\n.reg .pred said, all;\nsetp.ne.b32 said, %1, 0;\nbar.red.and.pred all, %2, %3, said;\nselp.b32 %0, 1, 0, all;\n}"
               : "=r"(all)
               : "r"(int(so)), "r"(id), "r"(threads)
               : "memory");
  return all;
}

// Barriers in shared memory, which some threads arrive at and others wait for (sm_90 and up). Each time that all have arrived the
// parity changes; it begins with 0.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, int parity) {
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

}  // namespace ls
