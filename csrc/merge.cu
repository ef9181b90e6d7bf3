// Merge: the chosen experts of one token into the weights of every adapted linear of a model, one launch.
//
// Bytes: each adapted weight read and written once (25.9 GB for the seven linears of Llama-2-7B in bf16) plus a few
// megabytes of experts: nothing but memory traffic, as long as the low-rank product hides behind it. So that product
// runs on tensor cores, and with its columns permuted so that every lane ends up with eight neighbouring columns of a
// row: one 16-byte load of the source, one 16-byte store.
#include "common.cuh"

namespace ls {
namespace {

constexpr int kThreads = 256;
constexpr int kTileRows = 32, kStepColumns = 256, kTileColumns = 1024;
constexpr int kRankStep = 16;                     // of the stacked ranks of all chosen experts, one mma deep
constexpr int kEntries = 2 * LS_MAX_TOP_K;        // experts to put in, experts to take out

struct Entry {
  int expert;  // -1: contributes nothing
  float gate;
};

// The experts of this launch, old ones with negative gates, into shared memory.
__device__ __forceinline__ int read_entries(const ls_merge_args &p, Entry *entries) {
  const int n = p.old_experts ? 2 * p.top_k : p.top_k;
  if (threadIdx.x < n) {
    const int j = threadIdx.x;
    const int64_t e = j < p.top_k ? p.experts[j] : p.old_experts[j - p.top_k];
    const float gate = j < p.top_k ? p.gates[j] : -p.old_gates[j - p.top_k];
    entries[j] = Entry{e >= 0 && e < p.num_experts ? int(e) : -1, gate};
  }
  __syncthreads();
  return n;
}

template <class E> __device__ __forceinline__ void mma16(float (&c)[4], const uint2 (&a)[2], uint32_t b0, uint32_t b1) {
  if constexpr (sizeof(E) == 2) {
    if constexpr (std::is_same<E, bf16>::value) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0].x), "r"(a[1].x), "r"(a[0].y), "r"(a[1].y), "r"(b0), "r"(b1));
    } else {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                   : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                   : "r"(a[0].x), "r"(a[1].x), "r"(a[0].y), "r"(a[1].y), "r"(b0), "r"(b1));
    }
  }
}

// 16-bit [out, in] weights, in % 8 == 0, rank % 8 == 0, 16-byte aligned. Warps: 2 along rows x 4 along columns, each 16 x 64
// of a step of 32 x 256; a tile is kSteps of those along the columns, the next one's source on its way during this one.
template <class E> __global__ void __launch_bounds__(kThreads, 2) merge_kernel(const __grid_constant__ ls_merge_args p) {
  __shared__ Entry entries[kEntries];
  __shared__ __align__(16) E down[kRankStep][kStepColumns + 8];  // rows of A
  const ls_merge_item item = p.items[p.tile_item[blockIdx.x]];
  const int tile = int(int64_t(blockIdx.x) - item.first_tile);
  const int column_tiles = (item.in_features + kTileColumns - 1) / kTileColumns;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int out = item.out_features, in = item.in_features, rank = item.rank;
  const int row0 = tile / column_tiles * kTileRows + warp / 4 * 16 + g;
  const int first = tile % column_tiles * kTileColumns, last = min(first + kTileColumns, in);
  pdl_trigger();
  pdl_wait();

  uint4 w[2][2], next[2][2];  // [row g, row g + 8][32-column block]: eight columns each
  auto load_source = [&](int column0, uint4(&v)[2][2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int row = row0 + h * 8, column = column0 + warp % 4 * 64 + b * 32 + t * 8;
        if (row < out && column < last)
          v[h][b] = *reinterpret_cast<const uint4 *>(static_cast<const E *>(item.source) + int64_t(row) * in + column);
      }
  };
  load_source(first, next);
  const int n_entries = read_entries(p, entries);
  const int units_each = rank / 8, units = n_entries * units_each;  // a unit: eight ranks of one expert

  for (int column0 = first; column0 < last; column0 += kStepColumns) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int b = 0; b < 2; ++b) w[h][b] = next[h][b];
    if (column0 + kStepColumns < last) load_source(column0 + kStepColumns, next);
    float acc[2][4][4];  // [32-column block][8-column tile][fragment]
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
      for (int q = 0; q < 4; ++q) acc[b][q][0] = acc[b][q][1] = acc[b][q][2] = acc[b][q][3] = 0.f;
    for (int unit0 = 0; unit0 < units; unit0 += kRankStep / 8) {
      __syncthreads();
      for (int i = threadIdx.x; i < kRankStep * kStepColumns / 8; i += kThreads) {
        const int k = i / (kStepColumns / 8), column = i % (kStepColumns / 8) * 8, unit = unit0 + k / 8;
        const int expert = unit < units ? entries[unit / units_each].expert : -1;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (expert >= 0 && column0 + column < last) {
          const int r = unit % units_each * 8 + k % 8;
          v = *reinterpret_cast<const uint4 *>(static_cast<const E *>(item.lora_a) + (int64_t(expert) * rank + r) * in + column0 + column);
        }
        *reinterpret_cast<uint4 *>(&down[k][column]) = v;
      }
      // This lane's four ranks, 4t .. 4t+3 of the step, of rows g and g + 8: scaled by gate in float32, then rounded.
      const int unit = unit0 + t / 2;
      const Entry entry = unit < units ? entries[unit / units_each] : Entry{-1, 0.f};
      const float factor = entry.gate * item.scaling;
      uint2 up[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = row0 + h * 8;
        up[h] = make_uint2(0, 0);
        if (entry.expert >= 0 && row < out) {
          const int r = unit % units_each * 8 + t % 2 * 4;
          const uint2 v = *reinterpret_cast<const uint2 *>(static_cast<const E *>(item.lora_b) + (int64_t(entry.expert) * out + row) * rank + r);
          const float2 lo = unpack2<E>(v.x), hi = unpack2<E>(v.y);
          up[h] = make_uint2(pack2<E>(lo.x * factor, lo.y * factor), pack2<E>(hi.x * factor, hi.y * factor));
        }
      }
      __syncthreads();
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          // Column g of this 8-column tile stands for column 8 (g / 2) + 2 q + g % 2 of the 32-column block.
          const E *d = &down[t * 4][warp % 4 * 64 + b * 32 + g / 2 * 8 + q * 2 + g % 2];
          const auto *bits = reinterpret_cast<const unsigned short *>(d);
          constexpr int kStride = kStepColumns + 8;
          const uint32_t b0 = bits[0] | uint32_t(bits[kStride]) << 16, b1 = bits[2 * kStride] | uint32_t(bits[3 * kStride]) << 16;
          mma16<E>(acc[b][q], up, b0, b1);
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int row = row0 + h * 8, column = column0 + warp % 4 * 64 + b * 32 + t * 8;
        if (row >= out || column >= last) continue;
        uint32_t *v = &w[h][b].x;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const float2 old = unpack2<E>(v[q]);
          v[q] = pack2<E>(old.x + acc[b][q][h * 2], old.y + acc[b][q][h * 2 + 1]);
        }
        *reinterpret_cast<uint4 *>(static_cast<E *>(item.weight) + int64_t(row) * in + column) = w[h][b];
      }
  }
}

// Any dtype, size, alignment and orientation: a thread an element.
template <class E> __global__ void __launch_bounds__(kThreads) merge_generic_kernel(const __grid_constant__ ls_merge_args p) {
  __shared__ Entry entries[kEntries];
  const ls_merge_item item = p.items[p.tile_item[blockIdx.x]];
  const int tile = int(int64_t(blockIdx.x) - item.first_tile);
  const int rows = item.transposed ? item.in_features : item.out_features;
  const int columns = item.transposed ? item.out_features : item.in_features;
  const int column_tiles = (columns + kTileColumns - 1) / kTileColumns;
  const int row0 = tile / column_tiles * kTileRows, column0 = tile % column_tiles * kTileColumns;
  pdl_trigger();
  pdl_wait();
  const int n_entries = read_entries(p, entries);
  for (int at = threadIdx.x; at < kTileRows * kTileColumns; at += kThreads) {
    const int row = row0 + at / kTileColumns, column = column0 + at % kTileColumns;
    if (row >= rows || column >= columns) continue;
    const int o = item.transposed ? column : row, i = item.transposed ? row : column;
    float sum = 0.f;
    for (int n = 0; n < n_entries; ++n) {
      if (entries[n].expert < 0) continue;
      const E *a = static_cast<const E *>(item.lora_a) + int64_t(entries[n].expert) * item.rank * item.in_features + i;
      const E *b = static_cast<const E *>(item.lora_b) + (int64_t(entries[n].expert) * item.out_features + o) * item.rank;
      float product = 0.f;
      for (int r = 0; r < item.rank; ++r) product += to_float(b[r]) * to_float(a[int64_t(r) * item.in_features]);
      sum += entries[n].gate * product;
    }
    const int64_t element = int64_t(row) * columns + column;
    static_cast<E *>(item.weight)[element] = from_float<E>(to_float(static_cast<const E *>(item.source)[element]) + item.scaling * sum);
  }
}

template <class E> int launch_merge(const ls_merge_args &p, void *stream) {
  auto kernel = merge_generic_kernel<E>;
  if constexpr (sizeof(E) == 2)
    if (p.fast) kernel = merge_kernel<E>;
  return launch<ls_merge_args>(kernel, dim3(unsigned(p.n_tiles)), dim3(kThreads), p, stream, may_overlap(kernel, p.device));
}

}  // namespace
}  // namespace ls

LS_EXPORT int64_t ls_merge_tiles(int32_t rows, int32_t columns) {
  return int64_t((rows + ls::kTileRows - 1) / ls::kTileRows) * ((columns + ls::kTileColumns - 1) / ls::kTileColumns);
}

LS_EXPORT int ls_merge_is_fast(const ls_merge_item *item, int32_t dtype) {
  return dtype != LS_FLOAT32 && !item->transposed && item->in_features % 8 == 0 && item->rank % 8 == 0 &&
         ls::aligned16(item->weight) && ls::aligned16(item->source) && ls::aligned16(item->lora_a) && ls::aligned16(item->lora_b);
}

LS_EXPORT int ls_merge(const ls_merge_args *args, void *stream) {
  const ls_merge_args &p = *args;
  if (p.n_tiles < 0 || p.n_tiles > 0x7fffffff || p.n_items < 0 || p.top_k < 1 || p.top_k > LS_MAX_TOP_K || p.num_experts < 1 ||
      p.num_experts > LS_MAX_EXPERTS)
    return LS_ERROR_ARGUMENT;
  if (p.n_tiles == 0) return 0;
  if (!p.items || !p.tile_item || !p.experts || !p.gates || (p.old_experts && !p.old_gates)) return LS_ERROR_POINTER;
  ls::DeviceGuard guard(p.device);
  if (guard.error != cudaSuccess) return guard.error;
  switch (p.dtype) {
    case LS_FLOAT32: return ls::launch_merge<float>(p, stream);
    case LS_FLOAT16: return ls::launch_merge<ls::fp16>(p, stream);
    case LS_BFLOAT16: return ls::launch_merge<ls::bf16>(p, stream);
  }
  return LS_ERROR_ARGUMENT;
}
