// What sm_90a alone has: WGMMA (products of a warpgroup straight from shared memory), TMA (tiles copied by a tensor map, with
// multicast), and thread-block clusters.
#pragma once
#include <cuda.h>

#include <type_traits>

#include "cp_async.cuh"

// Nothing of this is there when the compiler works for another GPU: the kernels that need it are then left empty, and
// has_sm90a() (tma.cu) says so.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LS_HAS_SM90A 1
#elif defined(__CUDA_ARCH__)
#pragma nv_diag_suppress 177  // declared but never referenced
#endif

namespace ls {

// Host code, tma.cu. A dimension of a tensor of 16-bit elements, the fastest first: how many, how far apart (in elements;
// of the first one 1), how many of them a copy takes.
struct Dimension {
  uint64_t size, stride;
  uint32_t box;
};
// Maps for copy_tile(); false: the driver cannot, or a size or an address is not divisible as it must be. `swizzled`: of 128
// bytes, which the box's first dimension then has.
bool make_map(CUtensorMap &map, int dtype, const void *tensor, const Dimension *dimensions, int n, bool swizzled);
// Whether such kernels run on the device.
bool has_sm90a(int device);

#ifdef LS_HAS_SM90A

// More of the barriers of cp_async.cuh. `block`: of the cluster, whose barrier at that address is meant.
__device__ __forceinline__ void mbarrier_inits_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Arrives, and so many bytes more have to.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(block)
      : "memory");
}

// Between writes of threads and copies that read them, by whoever copies, once it knows of the writes. (Whoever has written could do it,
// too, but where copies never cease it takes until they do.)
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Four floats of another block's shared memory.
__device__ __forceinline__ float4 load_remote(uint32_t address, int block) {
  float4 v;
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\nld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address), "r"(block)
               : "memory");
  return v;
}
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// Two matrices of 8 x 8, fragments as of the tensor cores, into shared memory, columns as rows of 16 bytes: lanes 0 to 7 say where those
// of the first go, lanes 8 to 15 those of the second.
__device__ __forceinline__ void write_transposed(uint32_t to, uint32_t first, uint32_t second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}

__device__ __forceinline__ uint4 read_shared(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

// Four floats, to or from shared memory.
__device__ __forceinline__ void write_floats(uint32_t to, const float *v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}
__device__ __forceinline__ void read_floats(uint32_t from, float *v) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(from) : "memory");
}

// A place in a ring of stages, and the parity of how often it has been gone round.
template <int kStages> struct RingPlace {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ void prefetch_map(const CUtensorMap &map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Copies of a tile. What lies outside of the tensor is zero. `blocks`: a bit for each block of the cluster that gets it, at the
// same addresses as this one.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap &map, uint32_t barrier, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(&map), "r"(c0), "r"(c1), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap &map, uint32_t barrier, int c0, int c1, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::
          "r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(barrier), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap &map, uint32_t barrier, int c0, int c1, int c2, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], "
      "%6;" ::"r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier), "h"(blocks)
      : "memory");
}
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap &map, uint32_t barrier, int c0, int c1, int c2, int c3,
                                          uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], "
      "%7;" ::"r"(to),
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier), "h"(blocks)
      : "memory");
}

// Of three and four dimensions, for this block alone.
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap &map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
               "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void copy_tile(uint32_t to, const CUtensorMap &map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
               "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
               : "memory");
}

// Of bytes as they lie, to this block alone; addresses and size divisible by 16.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void *from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier)
               : "memory");
}

// The address within the block's memory: above it is the number of the block in its cluster.
__device__ __forceinline__ uint64_t matrix_start(uint32_t address) { return (address & 0x3ffff) >> 4; }
// A matrix in shared memory as the tensor cores are told of it. Rows of 128 bytes (64 features), swizzled as the copy engine
// does it, from an address divisible by 1,024: 16 features on are 32 bytes on.
__device__ __forceinline__ uint64_t swizzled_matrix(uint32_t address) {
  return matrix_start(address) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
// Units of 16 bytes (eight features), those of all rows one after the other, then the next unit of all rows.
__device__ __forceinline__ uint64_t unit_matrix(uint32_t address, int rows) {
  return matrix_start(address) | uint64_t(rows) << 16 | uint64_t(128 >> 4) << 32;
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the newest N groups of products are done.
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// sums[4 i ...] (of row 16 w + g columns 8 i + 2 t and the next, then of row 16 w + g + 8; w: warp of the four, g: lane / 4,
// t: lane % 4) += 16 features of 64 rows `a` times those of 2 N rows `b`; or = if not `add`.
#define LS_8(i)                                                                                                                    \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), "+f"(sums[i + 6]), \
      "+f"(sums[i + 7])
#define LS_32(i) LS_8(i), LS_8(i + 8), LS_8(i + 16), LS_8(i + 24)
#define LS_4 "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
#define LS_NAMES_4 "%0, %1, %2, %3"
#define LS_16 LS_8(0), LS_8(8)
#define LS_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LS_NAMES_32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LS_NAMES_64                                                                  \
  LS_NAMES_32                                                                        \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LS_NAMES_128                                                                             \
  LS_NAMES_64                                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"             \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"             \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LS_WGMMA(columns, type, names, a, b, add, ...)                                                                                  \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
               " {" names "}, " a ", " b ", adds, 1, 1, 0, 0;\n}"                                                                       \
               : __VA_ARGS__                                                                                                            \
               : "l"(a_), "l"(b_), "r"(int(add_)))
#define LS_WGMMAS(type)                                                           \
  if constexpr (N == 4)                                                           \
    LS_WGMMA("8", type, LS_NAMES_4, "%4", "%5", "%6", LS_4);                      \
  else if constexpr (N == 16)                                                     \
    LS_WGMMA("32", type, LS_NAMES_16, "%16", "%17", "%18", LS_16);                \
  else if constexpr (N == 32)                                                     \
    LS_WGMMA("64", type, LS_NAMES_32, "%32", "%33", "%34", LS_32(0));             \
  else if constexpr (N == 64)                                                     \
    LS_WGMMA("128", type, LS_NAMES_64, "%64", "%65", "%66", LS_32(0), LS_32(32)); \
  else                                                                            \
    LS_WGMMA("256", type, LS_NAMES_128, "%128", "%129", "%130", LS_32(0), LS_32(32), LS_32(64), LS_32(96))
template <class E, int N> __device__ __forceinline__ void wgmma(float (&sums)[N], uint64_t a_, uint64_t b_, bool add_) {
  static_assert(N == 4 || N == 16 || N == 32 || N == 64 || N == 128, "8, 32, 64, 128 or 256 columns");
  if constexpr (std::is_same_v<E, bf16>) {
    LS_WGMMAS("bf16");
  } else {
    LS_WGMMAS("f16");
  }
}
#undef LS_WGMMAS
#undef LS_WGMMA
// The same with `a` in registers, as mma.sync has it: of this warp's 16 rows.
#define LS_WGMMA(columns, type, names, a0, a1, a2, a3, b, add, ...)                                                                     \
  asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
               " {" names "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b ", adds, 1, 1, 0;\n}"                                               \
               : __VA_ARGS__                                                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_), "r"(int(add_)))
#define LS_WGMMAS(type)                                                                                \
  if constexpr (N == 4)                                                                                \
    LS_WGMMA("8", type, LS_NAMES_4, "%4", "%5", "%6", "%7", "%8", "%9", LS_4);                         \
  else if constexpr (N == 16)                                                                          \
    LS_WGMMA("32", type, LS_NAMES_16, "%16", "%17", "%18", "%19", "%20", "%21", LS_16);                \
  else if constexpr (N == 32)                                                                          \
    LS_WGMMA("64", type, LS_NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37", LS_32(0));             \
  else if constexpr (N == 64)                                                                          \
    LS_WGMMA("128", type, LS_NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69", LS_32(0), LS_32(32)); \
  else                                                                                                 \
    LS_WGMMA("256", type, LS_NAMES_128, "%128", "%129", "%130", "%131", "%132", "%133", LS_32(0), LS_32(32), LS_32(64), LS_32(96))
template <class E, int N> __device__ __forceinline__ void wgmma(float (&sums)[N], const uint32_t (&a)[4], uint64_t b_, bool add_) {
  if constexpr (std::is_same_v<E, bf16>) {
    LS_WGMMAS("bf16");
  } else {
    LS_WGMMAS("f16");
  }
}
#undef LS_WGMMAS
#undef LS_WGMMA
#undef LS_NAMES_128
#undef LS_NAMES_64
#undef LS_NAMES_32
#undef LS_NAMES_16
#undef LS_NAMES_4
#undef LS_4
#undef LS_16
#undef LS_32
#undef LS_8
// Products on their way must not be moved across this.
template <int N> __device__ __forceinline__ void hold(float (&sums)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
#endif  // LS_HAS_SM90A

}  // namespace ls
