// Weights of 4 bits, as bitsandbytes keeps NF4 and FP4, multiplied on the tensor cores: weight = code[index] * scale.
//
//   weight [out, in / 2] bytes, feature 2 i in the higher half of byte i   scales [out, in / scale_block] float32   code [16] float32
//   tile: 16 rows by 64 features at a time, for 8 * NT tokens; a lane takes 16 features (8 bytes) of row g and of row g + 8
//   shared memory: the table, 256 entries of two values of the dtype, once for each lane: no two lanes meet in a bank
//
// A byte is looked up as a whole: two values, which are half of a fragment's register pair as they come. The scale is the same for all
// 64 features of a row, so it multiplies their sum, in float32, and not the values.
#pragma once
#include "mma.cuh"

namespace ls {

constexpr int kFeatures4 = 64;                  // features of a row in one chunk: no block of scales is smaller
constexpr int kTableThreads = 256;              // of a block, each of which makes one entry
constexpr int kTableBytes = kTableThreads * 32 * 4;  // dynamic shared memory

// U chunks in flight (twice: double-buffered).
template <class E, int NT, int MT, int U> struct FourBits {
  static constexpr bool kOwnLoads = true;
  static constexpr int kBlocks = 2, kShared = kTableBytes;
  static int shared_bytes(const ls_group &) { return kShared; }

  const unsigned char *weight;  // at this lane's features of chunk 0
  const float *scales;
  uint32_t row_at[MT][2], scales_at[MT][2];  // where this lane's rows begin in them
  const char *input, *table;
  const float *code;
  int in, tokens, chunks, first, step, scale_shift;
  uint2 w[2][U][MT][2];
  float scale[2][U][MT][2];

  // Asks for the first weights: static memory, before the wait for other launches.
  __device__ __forceinline__ void begin(const ls_group &group, const ls_item &item, const int (&row)[MT][2]) {
    constexpr int warps = kTableThreads / 32;
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32;
    in = group.in_features, tokens = group.tokens, chunks = in / kFeatures4, first = warp * U, step = warps * U;
    scale_shift = __ffs(group.scale_block / kFeatures4) - 1;
    input = static_cast<const char *>(group.x) + t * 32;
    table = shared + lane * 4;
    code = group.code;
    weight = static_cast<const unsigned char *>(item.weight) + t * 8;
    scales = static_cast<const float *>(item.scales);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        row_at[m][h] = uint32_t(row[m][h]) * uint32_t(in / 2);
        scales_at[m][h] = uint32_t(row[m][h]) * uint32_t(chunks >> scale_shift);
      }
    load(first, w[0], scale[0]);
    fill_table();
  }

  __device__ __forceinline__ void begin_inputs(const ls_group &) const {}

  // Thread i of 256 writes entry i for all lanes, each lane of its warp into another bank at a time. Needs a __syncthreads() after it.
  __device__ __forceinline__ void fill_table() const {
    const int lane = threadIdx.x % 32;
    uint32_t *entry = reinterpret_cast<uint32_t *>(const_cast<char *>(table) - lane * 4) + threadIdx.x * 32;
    const uint32_t pair = pack2<E>(__ldg(code + threadIdx.x / 16), __ldg(code + threadIdx.x % 16));
#pragma unroll
    for (int i = 0; i < 32; ++i) entry[(i + lane) % 32] = pair;
  }

  __device__ __forceinline__ void load(int c0, uint2 (&v)[U][MT][2], float (&s)[U][MT][2]) const {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int c = c0 + u;
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          v[u][m][h] = make_uint2(0, 0), s[u][m][h] = 0.f;  // past the end a value may be anything: its scale is zero
          if (c >= chunks) continue;
          asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                       : "=r"(v[u][m][h].x), "=r"(v[u][m][h].y)
                       : "l"(weight + row_at[m][h] + c * (kFeatures4 / 2)));
          s[u][m][h] = __ldg(scales + scales_at[m][h] + (c >> scale_shift));
        }
    }
  }

  // The two values of byte `i` of `word`.
  __device__ __forceinline__ uint32_t look_up(uint32_t word, int i) const {
    const uint32_t offset = (i == 0 ? word << 7 : word >> (8 * i - 7)) & 0x7f80u;  // 128 bytes an entry
    return *reinterpret_cast<const uint32_t *>(table + offset);
  }

  __device__ __forceinline__ void multiply(int c0, const uint2 (&v)[U][MT][2], const float (&s)[U][MT][2], float (&acc)[MT][NT][4]) const {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int c = c0 + u;
      uint4 x[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int token = n * 8 + g;
          x[n][k] = make_uint4(0, 0, 0, 0);
          if (c < chunks && token < tokens) x[n][k] = load_cached(input + (int64_t(token) * in + c * kFeatures4) * 2 + k * 16);
        }
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        float sum[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.f;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const uint32_t low = k == 0 ? v[u][m][0].x : v[u][m][0].y, high = k == 0 ? v[u][m][1].x : v[u][m][1].y;
          uint4 rows[2];
          rows[0] = make_uint4(look_up(low, 0), look_up(low, 1), look_up(low, 2), look_up(low, 3));
          rows[1] = make_uint4(look_up(high, 0), look_up(high, 1), look_up(high, 2), look_up(high, 3));
#pragma unroll
          for (int n = 0; n < NT; ++n) mma32<E>(sum[n], rows, x[n][k]);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n][i] += s[u][m][i / 2] * sum[n][i];
      }
    }
  }

  // All of this warp's chunks. After the wait.
  __device__ __forceinline__ void run(const ls_group &, float (&acc)[MT][NT][4]) {
    __syncthreads();  // the table
    for (int c = first; c < chunks;) {
      load(c + step, w[1], scale[1]);
      multiply(c, w[0], scale[0], acc);
      c += step;
      if (c >= chunks) break;
      load(c + step, w[0], scale[0]);
      multiply(c, w[1], scale[1], acc);
      c += step;
    }
  }
};

}  // namespace ls
