// Merge: weight = source + scaling * (sum_j gates[j] lora_b[e_j] lora_a[e_j] - the same sum for the token before, if its experts are
// given), for all linears of a model in one launch.
//
//   weight, source [out, in] or [in, out]   lora_a [E, rank, in]   lora_b [E, out, rank]   experts, gates [top_k], of one token
//   dtypes: float32, float16, bfloat16; the update is accumulated in float32 and rounded once
//   grid: tiles of 512 rows by 256 columns of all weights; block: 8 warps, each with strips of 64 columns
//   merge_narrow_kernel: few ranks in all, lora_a stays in registers, no shared memory; merge_wide_kernel: more, fragments of lora_a in
//   up to 88 KB of shared memory; merge_generic_kernel: float32, odd sizes
//
// Bytes: each adapted weight read and written once (25.9 GB for the seven linears of Llama-2-7B in bf16) plus a few megabytes of
// experts: nothing but memory traffic, as long as the low-rank product hides behind it. That product runs on tensor cores with the
// weight's columns as M and its rows as N, the columns of four 16-column fragments interleaved, so that a lane's accumulators are
// eight neighbouring columns of two rows: 16-byte loads of the source and 16-byte stores, four full 128-byte lines a warp instruction.
// The accumulators start from the source.
#include "mma.cuh"

namespace ls {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTileRows = 512, kTileColumns = 256;  // tile of a block; each warp has 64 of the columns
constexpr int kStrip = 64, kStrips = kTileColumns / kStrip;
constexpr int kGroup = 4;                         // wide: steps of eight rows that use a fragment of A together
constexpr int kEntries = 2 * LS_MAX_TOP_K;        // experts to put in, experts to take out
constexpr int kMaxUnits = kEntries * LS_MAX_RANK / kUnit;
constexpr int kDeep = 4;                          // units (of eight ranks) that the four lanes of a row load at once
constexpr int kDeepBytes = kDeep * kUnit * kStrip * 2;  // their fragments for one strip
constexpr int kWideBlocks = 22;                   // of those in shared memory: 88 KB, which every GPU from sm_80 on has
constexpr int kWideShared = kWideBlocks * kDeepBytes;

struct Entry {
  int expert;  // -1: contributes nothing
  float gate;
};

// Expert j of this launch; the old ones come after the new ones, with negative gates.
__device__ __forceinline__ Entry read_entry(const ls_merge_args &p, int j) {
  const int64_t e = j < p.top_k ? p.experts[j] : p.old_experts[j - p.top_k];
  const float gate = j < p.top_k ? p.gates[j] : -p.old_gates[j - p.top_k];
  const bool valid = e >= 0 && e < p.num_experts;
  return Entry{valid ? int(e) : -1, valid ? gate : 0.f};  // a gate that is NaN must not survive its expert
}

__device__ __forceinline__ int count_entries(const ls_merge_args &p) { return p.old_experts ? 2 * p.top_k : p.top_k; }

// The part of a linear that this block works on: rows [row0, row_end), columns from column0.
struct Tile {
  int row0, row_end, column0;
};

__device__ __forceinline__ Tile find_tile(const ls_merge_item &item, int rows, int columns) {
  const int tile = int(int64_t(blockIdx.x) - item.first_tile), across = (columns + kTileColumns - 1) / kTileColumns;
  const int row0 = tile / across * kTileRows;
  return Tile{row0, min(row0 + kTileRows, rows), tile % across * kTileColumns};
}

// The source, read once: past L1. Coherent, because in place it is what the last merge wrote.
__device__ __forceinline__ uint4 load_source(const void *p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// Rows of A and B: kept in L1, because the warps of a block share them.
__device__ __forceinline__ void load_expert(const void *p, uint4 &v) {
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
}
__device__ __forceinline__ void load_expert(const void *p, uint2 &v) {
  asm volatile("ld.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
}
// The result, not needed again soon.
__device__ __forceinline__ void store_weight(void *p, const uint4 &v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
}

// Of 64 columns, lane (g, t) = (lane / 4, lane % 4) holds columns 8g .. 8g+7 of rows 2t and 2t+1 of a step of eight rows.
// Accumulator q of four is the fragment whose M index g stands for column 8g + 2q and g + 8 for column 8g + 2q + 1.
template <class E> __device__ __forceinline__ void to_accumulators(const uint4 (&w)[2], float (&acc)[4][4]) {
  const uint32_t *even = &w[0].x, *odd = &w[1].x;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const float2 a = unpack2<E>(even[q]), b = unpack2<E>(odd[q]);
    acc[q][0] = a.x, acc[q][1] = b.x, acc[q][2] = a.y, acc[q][3] = b.y;
  }
}
template <class E> __device__ __forceinline__ void from_accumulators(const float (&acc)[4][4], uint4 (&w)[2]) {
  uint32_t *even = &w[0].x, *odd = &w[1].x;
#pragma unroll
  for (int q = 0; q < 4; ++q) even[q] = pack2<E>(acc[q][0], acc[q][2]), odd[q] = pack2<E>(acc[q][1], acc[q][3]);
}

// Eight columns of four rows of A, a lane's part of 64 columns and 16 ranks, as the M fragments of the four accumulators.
__device__ __forceinline__ void transpose(const uint4 (&a)[4], uint32_t (&fragments)[4][4]) {
  const uint32_t *r0 = &a[0].x, *r1 = &a[1].x, *r2 = &a[2].x, *r3 = &a[3].x;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    fragments[q][0] = __byte_perm(r0[q], r1[q], 0x5410), fragments[q][1] = __byte_perm(r0[q], r1[q], 0x7632);
    fragments[q][2] = __byte_perm(r2[q], r3[q], 0x5410), fragments[q][3] = __byte_perm(r2[q], r3[q], 0x7632);
  }
}

// Four ranks of a row of B: scaled by the gate in float32, then rounded, for the N fragment.
template <class E> __device__ __forceinline__ void scale(uint32_t lo, uint32_t hi, float factor, uint32_t (&b)[2]) {
  const float2 x = unpack2<E>(lo), y = unpack2<E>(hi);
  b[0] = pack2<E>(x.x * factor, x.y * factor), b[1] = pack2<E>(y.x * factor, y.y * factor);
}

// 16-bit [out, in] weights, in % 8 == 0, rank % 8 == 0, 16-byte aligned; HALVES * 16 ranks, of all experts, at most.
// A stays in registers; the rows stream by, the next kRing steps of a warp on their way. No barrier.
template <class E, int HALVES> __global__ void __launch_bounds__(kThreads, 2) merge_narrow_kernel(const __grid_constant__ ls_merge_args p) {
  constexpr int kRing = 4 - (HALVES - 1);  // steps of eight rows whose source is on its way: what registers hold
  using Raw = typename std::conditional<HALVES == 2, uint4, uint2>::type;  // this lane's ranks of a row of B
  const ls_merge_item item = p.items[p.tile_item[blockIdx.x]];
  const int out = item.out_features, in = item.in_features, rank = item.rank;
  const Tile tile = find_tile(item, out, in);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  constexpr int kStepRows = kWarps / kStrips * 8;  // of the block
  const int first = tile.row0 + warp / kStrips * 8, column = tile.column0 + warp % kStrips * kStrip + g * 8;
  const bool inside = column < in;
  pdl_trigger();
  pdl_wait();

  // Rows beyond `end` are neither read nor written. What their registers hold meets no other row in the product.
  const int source_end = inside ? tile.row_end : 0;
  const int64_t element = int64_t(first + 2 * t) * in + column, stride = int64_t(kStepRows) * in;
  const E *source = static_cast<const E *>(item.source) + element;
  uint4 w[kRing][2] = {};
  auto load_next_source = [&](int row, uint4(&v)[2]) {
    if (row + 2 * t < source_end) v[0] = load_source(source);
    if (row + 2 * t + 1 < source_end) v[1] = load_source(source + in);
    source += stride;
  };
#pragma unroll
  for (int slot = 0; slot < kRing; ++slot) load_next_source(first + slot * kStepRows, w[slot]);
  __syncwarp();  // for the compiler: those are on their way before the experts' ids are waited for

  const int unit = HALVES == 2 ? t : t / 2, units_each = rank / kUnit;
  const int rank0 = unit % units_each * kUnit + (HALVES == 2 ? 0 : t % 2 * 4);
  Entry entry{-1, 0.f};
  if (unit < count_entries(p) * units_each) entry = read_entry(p, unit / units_each);
  const int up_end = entry.expert >= 0 ? tile.row_end : 0, expert = max(entry.expert, 0);
  const float factor = entry.gate * item.scaling;
  const E *up = static_cast<const E *>(item.lora_b) + (int64_t(expert) * out + first + g) * rank + rank0;
  Raw raw[kRing] = {};
  auto load_next_up = [&](int row, Raw &v) {
    if (row + g < up_end) load_expert(up, v);
    up += kStepRows * rank;
  };
  uint4 down[HALVES][4] = {};
#pragma unroll
  for (int i = 0; i < HALVES * 4; ++i)
    if (entry.expert >= 0 && inside)
      load_expert(static_cast<const E *>(item.lora_a) + (int64_t(expert) * rank + rank0 + i) * in + column, down[i / 4][i % 4]);
#pragma unroll
  for (int slot = 0; slot < kRing; ++slot) load_next_up(first + slot * kStepRows, raw[slot]);
  uint32_t a[HALVES][4][4];
#pragma unroll
  for (int half = 0; half < HALVES; ++half) transpose(down[half], a[half]);

  E *weight = static_cast<E *>(item.weight) + element;
  for (int begin = first; begin < tile.row_end; begin += kRing * kStepRows)
#pragma unroll
    for (int slot = 0; slot < kRing; ++slot) {
      const int row = begin + slot * kStepRows;
      float acc[4][4];
      to_accumulators<E>(w[slot], acc);
      const uint32_t *words = &raw[slot].x;
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        uint32_t b[2];
        scale<E>(words[half * 2], words[half * 2 + 1], factor, b);
#pragma unroll
        for (int q = 0; q < 4; ++q) mma<E>(acc[q], a[half][q][0], a[half][q][1], a[half][q][2], a[half][q][3], b[0], b[1]);
      }
      load_next_source(row + kRing * kStepRows, w[slot]);
      load_next_up(row + kRing * kStepRows, raw[slot]);
      uint4 result[2];
      from_accumulators<E>(acc, result);
      if (row + 2 * t < source_end) store_weight(weight, result[0]);
      if (row + 2 * t + 1 < source_end) store_weight(weight + in, result[1]);
      weight += stride;
    }
}

// Eight ranks of one expert. They are numbered through all experts of the launch.
struct alignas(8) Unit {
  short expert, place;  // -1: contributes nothing; ranks 8 place .. 8 place + 7
  float factor;
};

// Fragments of A for `strips` strips from column0 on and `count` times 32 ranks, in the order in which mma takes them: of a
// strip, of 32 ranks, of a half of those (four ranks of each unit), of an accumulator, of a lane.
template <class E> __device__ __forceinline__ void fill_fragments(uint4 *fragments, const Unit *units, const ls_merge_item &item,
                                                                  int column0, int strips, int count) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 2
  for (int i = threadIdx.x / 32; i < strips * count * 2; i += kWarps) {
    const int deep = i / 2 % count, strip = i / 2 / count, column = column0 + strip * kStrip + g * 8;
    const Unit unit = units[deep * kDeep + t];
    uint4 rows[4] = {};
    if (unit.expert >= 0 && column < item.in_features) {
      const int64_t row = int64_t(unit.expert) * item.rank + unit.place * kUnit + i % 2 * 4;
      const E *down = static_cast<const E *>(item.lora_a) + row * item.in_features + column;
#pragma unroll
      for (int k = 0; k < 4; ++k) load_expert(down + int64_t(k) * item.in_features, rows[k]);
    }
    uint32_t f[4][4];
    transpose(rows, f);
#pragma unroll
    for (int q = 0; q < 4; ++q) fragments[(i * 4 + q) * 32 + lane] = make_uint4(f[q][0], f[q][1], f[q][2], f[q][3]);
  }
}

// The same for any rank. A waits in shared memory for all rows of the tile; each of its fragments, once loaded, serves
// kGroup * 8 rows. If the ranks of all experts do not fit for the whole tile, for half or a quarter of its columns at a
// time, and if not even then, chunks of them pass by for every group of rows.
template <class E> __global__ void __launch_bounds__(kThreads, 2) merge_wide_kernel(const __grid_constant__ ls_merge_args p) {
  extern __shared__ uint4 fragments[];
  __shared__ Unit units[kMaxUnits];
  const ls_merge_item item = p.items[p.tile_item[blockIdx.x]];
  const int out = item.out_features, in = item.in_features, rank = item.rank;
  const Tile tile = find_tile(item, out, in);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  pdl_trigger();
  pdl_wait();

  const int units_each = rank / kUnit, n_units = count_entries(p) * units_each, deep = (n_units + kDeep - 1) / kDeep;
  int strips = kStrips;  // of the tile, at a time
  while (strips > 1 && strips * deep > kWideBlocks) strips /= 2;
  const int chunk = min(deep, kWideBlocks / strips);
  const int strip = warp % strips, step_rows = kWarps / strips * kGroup * 8;

  for (int strip0 = 0; strip0 < kStrips && tile.column0 + strip0 * kStrip < in; strip0 += strips) {
    const int column0 = tile.column0 + strip0 * kStrip, column = column0 + strip * kStrip + g * 8;
    const int source_end = column < in ? tile.row_end : 0;
    for (int row0 = tile.row0; row0 < tile.row_end; row0 += step_rows) {
      const int row = row0 + warp / strips * kGroup * 8;
      const int64_t element = int64_t(row + 2 * t) * in + column;
      uint4 w[kGroup][2] = {};
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const E *s = static_cast<const E *>(item.source) + element + int64_t(j) * 8 * in;
        if (row + j * 8 + 2 * t < source_end) w[j][0] = load_source(s);
        if (row + j * 8 + 2 * t + 1 < source_end) w[j][1] = load_source(s + in);
      }
      if (strip0 == 0 && row0 == tile.row0)  // once, and behind the first loads of the source
        for (int i = threadIdx.x; i < deep * kDeep; i += kThreads) {
          const Entry entry = i < n_units ? read_entry(p, i / units_each) : Entry{-1, 0.f};
          units[i] = Unit{short(entry.expert), short(i % units_each), entry.gate * item.scaling};
        }
      if (row0 == tile.row0 || chunk < deep) {
        __syncthreads();
        fill_fragments<E>(fragments, units, item, column0, strips, chunk);
        __syncthreads();
      }
      float acc[kGroup][4][4];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) to_accumulators<E>(w[j], acc[j]);
      int up_row[kGroup];  // where the rows of B begin in an expert; beyond the end any row will do
#pragma unroll
      for (int j = 0; j < kGroup; ++j) up_row[j] = min(row + j * 8 + g, out - 1) * rank;

      for (int begin = 0; begin < deep; begin += chunk) {
        const int count = min(chunk, deep - begin);
        if (begin > 0) {
          __syncthreads();
          fill_fragments<E>(fragments, units + begin * kDeep, item, column0, strips, count);
          __syncthreads();
        }
        if (row >= tile.row_end) continue;
        uint4 raw[kGroup];
        auto load_up = [&](const Unit &unit) {
          const E *up = static_cast<const E *>(item.lora_b) + int64_t(unit.expert) * out * rank + unit.place * kUnit;
#pragma unroll
          for (int j = 0; j < kGroup; ++j)
            if (unit.expert >= 0) {
              load_expert(up + up_row[j], raw[j]);
            } else {
              raw[j] = make_uint4(0, 0, 0, 0);
            }
        };
        Unit unit = units[begin * kDeep + t];
        load_up(unit);
        const uint4 *f = fragments + strip * count * 8 * 32 + lane;
#pragma unroll 1
        for (int i = 0; i < count; ++i, f += 8 * 32) {
          const float factor = unit.factor;
          uint32_t b[kGroup][2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
              const uint32_t *words = &raw[j].x + half * 2;
              scale<E>(words[0], words[1], factor, b[j]);
            }
            if (half == 1 && i + 1 < count) {  // the next ranks of B on their way during this product
              unit = units[(begin + i + 1) * kDeep + t];
              load_up(unit);
            }
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              const uint4 a = f[(half * 4 + q) * 32];
#pragma unroll
              for (int j = 0; j < kGroup; ++j) mma<E>(acc[j][q], a.x, a.y, a.z, a.w, b[j][0], b[j][1]);
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        E *d = static_cast<E *>(item.weight) + element + int64_t(j) * 8 * in;
        uint4 result[2];
        from_accumulators<E>(acc[j], result);
        if (row + j * 8 + 2 * t < source_end) store_weight(d, result[0]);
        if (row + j * 8 + 2 * t + 1 < source_end) store_weight(d + in, result[1]);
      }
    }
  }
}

// Any dtype, size, alignment and orientation: a thread an element.
template <class E> __global__ void __launch_bounds__(kThreads) merge_generic_kernel(const __grid_constant__ ls_merge_args p) {
  __shared__ Entry entries[kEntries];
  const ls_merge_item item = p.items[p.tile_item[blockIdx.x]];
  const int rows = item.transposed ? item.in_features : item.out_features;
  const int columns = item.transposed ? item.out_features : item.in_features;
  const Tile tile = find_tile(item, rows, columns);
  pdl_trigger();
  pdl_wait();
  const int n_entries = count_entries(p);
  if (threadIdx.x < n_entries) entries[threadIdx.x] = read_entry(p, threadIdx.x);
  __syncthreads();
  for (int at = threadIdx.x; at < kTileRows * kTileColumns; at += kThreads) {
    const int row = tile.row0 + at / kTileColumns, column = tile.column0 + at % kTileColumns;
    if (row >= tile.row_end || column >= columns) continue;
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
  int shared = 0;
  if constexpr (sizeof(E) == 2)
    if (p.fast) {
      const int units = p.max_rank / kUnit * p.top_k * (p.old_experts ? 2 : 1), deep = (units + kDeep - 1) / kDeep;
      kernel = units <= 2 ? merge_narrow_kernel<E, 1> : units <= 4 ? merge_narrow_kernel<E, 2> : merge_wide_kernel<E>;
      if (units > 4) {
        shared = deep * kStrips * kDeepBytes < kWideShared ? deep * kStrips * kDeepBytes : kWideShared;
        const cudaError_t error = allow_shared<merge_wide_kernel<E>>(p.device, kWideShared);
        if (error != cudaSuccess) return error;
      }
    }
  return launch<ls_merge_args>(kernel, dim3(unsigned(p.n_tiles)), dim3(kThreads), p, stream, may_overlap(kernel, p.device), shared);
}

}  // namespace
}  // namespace ls

LS_EXPORT int64_t ls_merge_tiles(int32_t rows, int32_t columns) {
  return int64_t((rows + ls::kTileRows - 1) / ls::kTileRows) * ((columns + ls::kTileColumns - 1) / ls::kTileColumns);
}

LS_EXPORT int ls_merge_is_fast(const ls_merge_item *item, int32_t dtype) {
  return dtype != LS_FLOAT32 && !item->transposed && item->in_features % 8 == 0 && item->rank > 0 && item->rank % 8 == 0 &&
         int64_t(item->out_features) * item->rank <= 0x7fffffff && ls::aligned16(item->weight) && ls::aligned16(item->source) &&
         ls::aligned16(item->lora_a) && ls::aligned16(item->lora_b);
}

LS_EXPORT int ls_merge(const ls_merge_args *args, void *stream) {
  const ls_merge_args &p = *args;
  if (p.n_tiles < 0 || p.n_tiles > 0x7fffffff || p.n_items < 0 || p.top_k < 1 || p.top_k > LS_MAX_TOP_K || p.num_experts < 1 ||
      p.num_experts > LS_MAX_EXPERTS || p.max_rank < 0 || p.max_rank > LS_MAX_RANK)
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
