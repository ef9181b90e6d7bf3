// Linear with experts for 1 or 2 tokens (up to 8 in tests), weights streamed through shared memory: out = x weight^T + bias + base +
// experts.
//
//   x [tokens, in]   weight [out, in]   bias [out]   experts, gates [tokens, top_k]   out [tokens, out]
//   lora_a [E, rank, in]   lora_b [E, out, rank]   hidden [tokens, top_k, rank]
//   dtypes: float16, bfloat16, accumulated in float32; in divisible by 32, rank by 8
//   grid: as many blocks as run at once. The rows of all weights of the group, end to end, are dealt out evenly to the row, so no
//   block is left with a short last wave; a block goes over its rows in tiles of 16 * MT rows by 8 * NT tokens
//   block: 8 warps with a share of the input features each (split-K inside the block) and 1 warp for the shrink
//   shared memory: for each of the 8 warps a ring of STAGES stages (16 * MT rows of 64 features), filled by cp.async; partial sums;
//   the hidden; with SINGLE, x
//
// A warp's ring runs on across the borders of tiles and linears. The only barrier of the loop is one for each tile, where partial sums
// meet; before it x and the ids are waited for, and in the first tile the hidden. MT = NT = 1 and 3 stages are all that is compiled
// (launch_as()): what else was tried stands in docs/kernel_log.md.
//
// The shrink: the ninth warps of all blocks draw elements of the hidden (a row of a chosen expert's lora_a each) from a counter until
// all are drawn, publish them as words that hold a value and a flag, then collect all of them; the other warps need them in the epilogue
// of their first tile. A warp waits only for elements that a running warp has drawn: no block waits for one that cannot start.
#include "cp_async.cuh"
#include "mma.cuh"

namespace ls {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;  // that stream weights; one warp more shrinks
constexpr int kSlice = 64;  // features of one stage: a 128-byte line of each row
constexpr int kStages = 3;  // of each warp's ring: measured, docs/kernel_log.md
constexpr int kMostTokens = 8;
constexpr int kIds = kMostTokens * LS_MAX_TOP_K;

// Rows [row, row + rows) of linear `item`.
struct Tile {
  int item, row, rows;
};

// The next tile of at most kRows rows from global row `at`, not beyond `end` nor beyond its linear.
template <int kRows> __device__ __forceinline__ Tile next_tile(const GroupParams &p, int at, int end) {
  const int item = find_item(p, at);
  return Tile{item, at - p.begin[item], min(min(kRows, end - at), p.begin[item + 1] - at)};
}

// Where a warp's copies have got to.
template <class E, int kRows> struct Cursor {
  const GroupParams &p;
  int at, end, slice, slices, first;
  Tile tile;
  const E *weight;

  __device__ __forceinline__ Cursor(const GroupParams &params, int begin, int last, int first_slice, int n)
      : p(params), at(begin), end(last), slice(first_slice), slices(n), first(first_slice) {
    enter();
  }
  __device__ __forceinline__ void enter() {
    if (at >= end) return;
    tile = next_tile<kRows>(p, at, end);
    weight = static_cast<const E *>(p.g.items[tile.item].weight) + int64_t(tile.row) * p.g.in_features;
  }
  // Start copying this warp's next slice into `stage`; rows past the tile's end keep what was there. Always one group.
  __device__ __forceinline__ void copy(E *stage, int lane) {
    while (at < end && slice >= slices) {  // a warp may have no slice at all of a narrow weight
      at += tile.rows, slice = first;
      enter();
    }
    if (at < end) {
      const int column = lane % 8, feature = slice * kSlice + column * 8;
      if (feature < p.g.in_features) {
#pragma unroll
        for (int r = lane / 8; r < kRows; r += 4)
          if (r < tile.rows) copy16(stage + r * kSlice + (column ^ (r % 2 * 4)) * 8, weight + int64_t(r) * p.g.in_features + feature);
      }
      slice += kWarps;
      if (slice >= slices && first < slices) {
        at += tile.rows, slice = first;
        enter();
      }
    }
    copy_commit();
  }
};

// Barriers by number: of the streaming warps alone; x is in shared memory; the hidden is there.
enum { kWeights = 1, kInput = 2, kHidden = 3 };

// a . x over `in` features, by one warp; the loads of a go out before x is asked for.
template <class E, class Ready> __device__ __forceinline__ float dot(const E *a, const E *x, int in, Ready x_is_ready) {
  constexpr int kLoads = 16;
  const int lane = threadIdx.x % 32;
  float sum = 0.f;
  for (int step = 0; step < in; step += kLoads * 32 * kUnit) {
    const int begin = step + lane * kUnit;
    uint4 v[kLoads];
#pragma unroll
    for (int n = 0; n < kLoads; ++n)
      if (const int i = begin + n * 32 * kUnit; i < in) v[n] = load_static(a + i);
    x_is_ready();
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int i = begin + n * 32 * kUnit;
      if (i >= in) continue;
      const uint4 xv = load_cached(x + i);
      const uint32_t *pa = &v[n].x, *px = &xv.x;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float2 fa = unpack2<E>(pa[q]), fx = unpack2<E>(px[q]);
        sum += fa.x * fx.x + fa.y * fx.y;
      }
    }
  }
  return warp_sum(sum);
}

// Value and flag in one word: whoever sees the flag has the value, and no fence is needed. Ranks are divisible by 8 here, so
// every word is written.
constexpr unsigned kThere = 0x10000;

// The warp that shrinks: hidden[t, j, r] = scaling * gates[t, j] * lora_a[e][r] x[t], one element a task.
template <class E, bool SINGLE> __device__ __forceinline__ void shrink(const GroupParams &p, const E *x, uint2 *copy) {
  volatile unsigned *words = reinterpret_cast<volatile unsigned *>(p.sync + 1);
  const int lane = threadIdx.x % 32, entries = p.g.tokens * p.g.top_k, tasks = p.shrink_begin[p.g.n_items];
  int task = lane == 0 ? int(atomicAdd(&p.sync->ticket, 1u)) : 0;
  const int id_lo = lane < entries ? valid_id(p, lane) : -1, id_hi = lane + 32 < entries ? valid_id(p, lane + 32) : -1;
  bool asked = !SINGLE;
  auto x_is_ready = [&] {
    if (!asked) barrier(kInput, kThreads + 32), asked = true;
  };
  for (task = __shfl_sync(0xffffffffu, task, 0); task < tasks;) {
    int i = 0;
    while (task >= p.shrink_begin[i + 1]) ++i;
    const ls_item &item = p.g.items[i];
    const int row = task - p.shrink_begin[i], entry = row / item.rank, in = p.g.in_features;  // of [tokens, top_k, rank]
    const int lo = __shfl_sync(0xffffffffu, id_lo, entry % 32), hi = __shfl_sync(0xffffffffu, id_hi, entry % 32);
    const int expert = entry < 32 ? lo : hi;
    const float gate = __ldcg(p.g.gates + entry);
    float sum = 0.f;
    if (expert >= 0) {
      const E *a = static_cast<const E *>(item.lora_a) + (int64_t(expert) * item.rank + row % item.rank) * in;
      sum = gate * item.scaling * dot<E>(a, x + int64_t(entry / p.g.top_k) * in, in, x_is_ready);
    }
    if (lane == 0) {
      const E value = from_float<E>(sum);
      words[p.hidden[i] + row] = kThere | *reinterpret_cast<const unsigned short *>(&value);
      task = int(atomicAdd(&p.sync->ticket, 1u));
    }
    task = __shfl_sync(0xffffffffu, task, 0);
  }
  x_is_ready();  // the others have announced it, needed or not
  for (int i = lane * 4; i < p.hidden_elements; i += 32 * 4) {
    uint4 v;
    do {
      asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "l"(words + i)
                   : "memory");
    } while (!(v.x && v.y && v.z && v.w));
    copy[i / 4] = make_uint2((v.x & 0xffff) | v.y << 16, (v.z & 0xffff) | v.w << 16);
  }
  arrive(kHidden, kThreads + 32);
  const bool last = __shfl_sync(0xffffffffu, lane == 0 && leave(p.sync, gridDim.x), 0);
  if (last)
    for (int i = lane; i <= p.hidden_elements / 4; i += 32) reinterpret_cast<uint4 *>(p.sync)[i] = make_uint4(0, 0, 0, 0);
}

// NT tiles of 8 tokens, MT tiles of 16 rows, STAGES stages of a warp's ring. SINGLE: one token, its x in shared memory.
template <class E, int NT, int MT, int STAGES, bool SINGLE> __global__ void __launch_bounds__(kThreads + 32, 2)
    linear_streaming_kernel(const __grid_constant__ GroupParams p) {
  constexpr int kRows = 16 * MT;
  constexpr int kBuffers = NT * MT > 2 ? 1 : 2;  // two spare a barrier a tile, where shared memory allows
  extern __shared__ __align__(128) unsigned char raw[];
  constexpr int kTokens = SINGLE ? 1 : 8 * NT;
  __shared__ float partial[kBuffers][kWarps][kTokens][kRows + 4];
  __shared__ short ids[kIds];
  __shared__ __align__(16) uint2 hidden_copy[kHiddenInside / 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  E *ring = reinterpret_cast<E *>(raw) + warp * STAGES * kRows * kSlice;
  const int in = p.g.in_features, slices = (in + kSlice - 1) / kSlice, tokens = p.g.tokens;
  const int total = p.begin[p.g.n_items];
  const int begin = int(int64_t(total) * blockIdx.x / gridDim.x), end = int(int64_t(total) * (blockIdx.x + 1) / gridDim.x);
  pdl_trigger();
  E *single = reinterpret_cast<E *>(raw) + kWarps * STAGES * kRows * kSlice;  // x of the one token
  const E *all_x = SINGLE ? single : static_cast<const E *>(p.g.x);
  if (warp == kWarps) {
    pdl_wait();
    if (p.sync) shrink<E, SINGLE>(p, all_x, hidden_copy);
    return;
  }

  Cursor<E, kRows> ahead(p, begin, end, warp < slices ? warp : slices, slices);
  if (warp >= slices) ahead.at = end;
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) ahead.copy(ring + s * kRows * kSlice, lane);
  pdl_wait();
  if (SINGLE) {
    for (int i = threadIdx.x; i < in / kUnit; i += kThreads)
      reinterpret_cast<uint4 *>(single)[i] = load_cached(static_cast<const uint4 *>(p.g.x) + i);
    if (p.sync) arrive(kInput, kThreads + 32);
  }
  if (p.has_rank) read_ids(p, ids, threadIdx.x, kThreads);
  barrier(kWeights, kThreads);
  bool awaits = p.sync != nullptr;
  const E *input = all_x + t * kUnit;
  int stage = 0, buffer = 0;
  for (int at = begin; at < end; buffer = (buffer + 1) % kBuffers) {
    const Tile tile = next_tile<kRows>(p, at, end);
    at += tile.rows;
    const ls_item &item = p.g.items[tile.item];
    float acc[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.f;
    const int last = tile.row + tile.rows - 1;
    ExpertColumns experts(p, tile.item);
    if (p.sync) experts.hidden = reinterpret_cast<const char *>(hidden_copy) + p.hidden[tile.item] * 2;
    const bool has_experts = item.rank > 0 && warp < experts.chunks;
    uint4 ew[2], ex[NT];
    if (MT == 1 && has_experts)  // arrives while the weights do
      experts.template load_b<E>(experts.unit_of(warp, ids), min(tile.row + g, last), min(tile.row + g + 8, last), ew);

    for (int s = warp; s < slices; s += kWarps) {
      uint4 x[2][NT];
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const int token = n * 8 + g;
          x[c][n] = make_uint4(0, 0, 0, 0);
          if (token < tokens && s * kSlice + c * kChunk < in) x[c][n] = load_cached(input + int64_t(token) * in + s * kSlice + c * kChunk);
        }
      copy_wait<STAGES - 2>();
      __syncwarp();
      const E *rows = ring + stage * kRows * kSlice;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (s * kSlice + c * kChunk >= in) break;
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const E *row = rows + (m * 16 + g) * kSlice + ((c * 4 + t) ^ (g % 2 * 4)) * 8;
          const uint4 w[2] = {*reinterpret_cast<const uint4 *>(row), *reinterpret_cast<const uint4 *>(row + 8 * kSlice)};
#pragma unroll
          for (int n = 0; n < NT; ++n) mma32<E>(acc[m][n], w, x[c][n]);
        }
      }
      __syncwarp();
      // The stage read one step ago is free: everybody has passed the barrier after reading it.
      ahead.copy(ring + (stage == 0 ? STAGES - 1 : stage - 1) * kRows * kSlice, lane);
      stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    if (awaits) barrier(kHidden, kThreads + 32), awaits = false;
    if (has_experts) {
      for (int chunk = warp; chunk < experts.chunks; chunk += kWarps) {
        const ExpertColumns::Unit unit = experts.unit_of(chunk, ids);
        experts.template load_hidden<E, NT>(unit, ids, ex);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const int row = tile.row + m * 16 + g;
          if (MT > 1 || chunk != warp) experts.template load_b<E>(unit, min(row, last), min(row + 8, last), ew);
#pragma unroll
          for (int n = 0; n < NT; ++n) mma32<E>(acc[m][n], ew, ex[n]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n * 8 + t * 2 + i % 2 < (SINGLE ? 1 : tokens))
            partial[buffer][warp][n * 8 + t * 2 + i % 2][m * 16 + i / 2 * 8 + g] = acc[m][n][i];
    barrier(kWeights, kThreads);
    for (int i = threadIdx.x; i < kRows * tokens; i += kThreads) {
      const int r = i % kRows, token = i / kRows;
      if (r >= tile.rows) continue;
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) sum += partial[buffer][k][token][r];
      store_result<E>(item, token, tile.row + r, sum);
    }
    if (kBuffers == 1) barrier(kWeights, kThreads);
  }
}

// What was found out about a device: the most shared memory beside the ring and, for a few widths, how many blocks fit at once.
struct Fit {
  static constexpr int kWidths = 16;
  std::atomic<int> room;  // 0: not asked yet
  std::atomic<int64_t> blocks[kWidths];  // of each width (in the upper half): as many as fit
};

template <class E, int NT, int MT, int STAGES, bool SINGLE> int launch_stream(GroupParams &p, void *stream) {
  constexpr int kRing = kWarps * STAGES * 16 * MT * kSlice * 2;
  auto kernel = linear_streaming_kernel<E, NT, MT, STAGES, SINGLE>;
  static Fit fits[kMaxDevices];
  Fit &fit = fits[p.g.device];
  int room = fit.room.load(std::memory_order_acquire);
  if (room == 0) {
    int limit = 0;
    cudaFuncAttributes attributes;
    cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, p.g.device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    room = limit - int(attributes.sharedSizeBytes) - kRing;
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRing + room);
    if (error != cudaSuccess) return error;
    fit.room.store(room, std::memory_order_release);
  }
  if constexpr (SINGLE)
    if (p.g.in_features * 2 > room) return launch_stream<E, NT, MT, STAGES, false>(p, stream);
  const int shared = kRing + (SINGLE ? p.g.in_features * 2 : 0);
  std::atomic<int64_t> &entry = fit.blocks[p.g.in_features / 256 % Fit::kWidths];
  int64_t known = entry.load(std::memory_order_relaxed);
  if (known >> 32 != p.g.in_features) {
    int sms = 0, each = 0;
    cudaError_t error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, p.g.device);
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads + 32, shared);
    if (error != cudaSuccess) return error;
    known = int64_t(p.g.in_features) << 32 | sms * (each < 1 ? 1 : each > 2 ? 2 : each);
    entry.store(known, std::memory_order_relaxed);
  }
  const int blocks = int(known & 0xffffffff);
  int n = 0;
  for (int i = 0; i < p.g.n_items; ++i) p.begin[i] = n, n += p.g.items[i].out_features;
  p.begin[p.g.n_items] = n;
  p.has_rank = any_rank(p.g);
  const int grid = n < blocks ? n : blocks;
  if (p.sync) {
    int rows = 0;
    for (int i = 0; i < p.g.n_items; ++i) p.shrink_begin[i] = rows, rows += p.g.tokens * p.g.top_k * p.g.items[i].rank;
    p.shrink_begin[p.g.n_items] = rows;
  }
  const bool overlap = may_overlap(kernel, p.g.device);
  return launch<GroupParams>(kernel, dim3(grid), dim3(kThreads + 32), p, stream, overlap, shared);
}

template <class E> int launch_as(GroupParams &p, void *stream) {
  return p.g.tokens == 1 ? launch_stream<E, 1, 1, kStages, true>(p, stream) : launch_stream<E, 1, 1, kStages, false>(p, stream);
}

}  // namespace

bool can_streaming(const GroupParams &p) {
  if (p.g.tokens > kMostTokens || p.g.in_features % kChunk || p.g.device < 0 || p.g.device >= kMaxDevices) return false;
  for (int i = 0; i < p.g.n_items; ++i)
    if (!p.g.items[i].weight) return false;
  return true;
}

int launch_linear_streaming(GroupParams &p, void *stream) {
  return p.g.dtype == LS_BFLOAT16 ? launch_as<bf16>(p, stream) : launch_as<fp16>(p, stream);
}

}  // namespace ls
