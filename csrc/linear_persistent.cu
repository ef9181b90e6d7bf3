// Linear with experts for 1 to 32 tokens, one persistent block a multiprocessor: out = x weight^T + bias + base + experts.
//
//   x [tokens, in]   weight [out, in]   bias [out]   experts, gates [tokens, top_k]   out [tokens, out]
//   lora_a [E, rank, in]   lora_b [E, out, rank]   hidden [tokens, top_k, rank]
//   dtypes: float16, bfloat16, accumulated in float32; in divisible by 32, rank by 8
//   grid: one block a multiprocessor; the 16-row tiles of all weights of the group are dealt out evenly
//   panel: the output rows that a block computes at once, up to 16 * MT, as many as its registers can accumulate; x is read once
//   for each panel
//   block: 8 warps with a share of the input features each (split-K inside the block), 4 helper warps for the experts
//   shared memory (up to 201 KB): for each of the 8 warps a ring of STAGES stages (16 rows of 64 features of x or of the weight),
//   filled by cp.async; 9 partial tiles in float32 (chosen experts: before that what the helpers ask for); the hidden
//
// From a few tokens on, reading x again for every 16 or 32 rows takes as long as reading the weight. So a block owns panels, goes over
// the input features once for each, and partial sums meet once, in the panel's epilogue.
//
// The helper warps do the shrink, which is spread over all blocks, and multiply the hidden by the panel's rows of lora_b: a ninth partial
// sum. There are two kernels of everything here: AllExperts and ChosenExperts (linear_persistent_experts.cuh). Their machine code is what
// was measured, and moves with small changes: the helpers' code stands in the kernel itself, since as functions it becomes another.
//
// GPUs with less shared memory cannot run it (blocks_of() asks): for them the kernels are compiled empty, which halves the build time.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define LS_HAS_PERSISTENT 1
#else
#pragma nv_diag_suppress 177  // declared but never referenced
#endif

#include "linear_persistent_all_experts.cuh"
#include "linear_persistent_chosen_experts.cuh"

namespace ls {
namespace {

// NT tiles of 8 tokens; a panel has up to MT tiles of 16 rows. A stage is 2 KB: a tile, 64 features wide, or with more tokens two
// tiles, 32 features wide, so that x takes half the registers.
template <class E, int NT, int MT, int STAGES, class Experts> struct Panel {
  static constexpr int kTokens = 8 * NT;
  static constexpr int kTiles = NT == 4 ? 2 : 1;  // of a stage; and so many times a warp goes over its stages for one slice
  static constexpr int kWide = kSlice / kTiles;   // features of a stage
  static constexpr int kSteps = kWide / 16;       // of the tensor cores
  static constexpr int kStageBytes = kTiles * kTile * kWide * 2;
  static constexpr int kStride = kTile * MT + 4, kPartial = kTokens * kStride;     // floats of a warp's partial sums of a panel
  static constexpr int kShrinkStride = kTile + 4, kShrinkPartial = kTokens * kShrinkStride;  // and a helper, for a tile of A
  static constexpr int kRoomBytes = Experts::template room_bytes<NT>(kWarps * kPartial);
  static constexpr int kRingBytes = kWarps * STAGES * kStageBytes, kPartialBytes = kRoomBytes + kPartial * 4;
  static constexpr int kBytes = kRingBytes + kPartialBytes + Experts::kHidden * 2;
  static_assert(NT <= 2 * kTiles && MT % kTiles == 0, "x is one stage, a panel a number of them");
  static_assert(kHelpers * kShrinkPartial <= kPartial, "a tile of A needs room");

  // What one stage is copied from: of each of its tiles the first row, and how many there are.
  struct alignas(16) Source {
    const char *first[kTiles];
    short rows[kTiles];
    bool is_x, is_last;  // of its list
  };
};

// Four rows of a result, as far as there are so many.
template <class E> __device__ __forceinline__ void store_results(const ls_item &item, int token, int row, const float4 &sums) {
  const float *sum = &sums.x;
  E *out = static_cast<E *>(item.out) + int64_t(token) * item.out_features + row;
  if (!item.bias && !item.base && item.out_features % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 8 == 0 && row < item.out_features) {
    *reinterpret_cast<uint2 *>(out) = make_uint2(pack2<E>(sum[0], sum[1]), pack2<E>(sum[2], sum[3]));
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < item.out_features) store_result<E>(item, token, row + i, sum[i]);
}

template <class E, int NT, int MT, int STAGES, class Experts> __global__ void __launch_bounds__(kAllThreads, 1)
    linear_persistent_kernel(const __grid_constant__ GroupParams p) {
#ifdef LS_HAS_PERSISTENT
  using Shape = Panel<E, NT, MT, STAGES, Experts>;
  using Source = typename Shape::Source;
  constexpr int kTiles = Shape::kTiles, kWide = Shape::kWide, kSteps = Shape::kSteps, kStageBytes = Shape::kStageBytes;
  constexpr int kMostPanels = (kMostTiles + MT - 1) / MT;
  extern __shared__ __align__(128) unsigned char raw[];
  __shared__ Source lists[kMostPanels + kMostTiles / kTiles];  // the stages of one slice: of every panel x and its tiles
  __shared__ short list_of[kMostPanels + 1];                   // where the stages of a panel begin
  __shared__ Plan plan_;
  __shared__ short ids[kIds];
  __shared__ float gates[kIds];
  __shared__ typename Experts::template Choice<Shape::kTokens> choice;
  __shared__ bool there;
  __shared__ __align__(8) uint64_t expanded_, free_;
  float *partial = reinterpret_cast<float *>(raw + Shape::kRingBytes), *more = partial + Shape::kRoomBytes / 4;
  E *hidden = reinterpret_cast<E *>(raw + Shape::kRingBytes + Shape::kPartialBytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, in = p.g.in_features;
  const volatile Plan &plan = plan_;
  const uint32_t expanded = shared_address(&expanded_);  // barrier: the helpers have written their partial sum of a panel
  const uint32_t free = shared_address(&free_);          // barrier: they need the room of the other warps' partial sums no longer
  pdl_trigger();
  {
    const unsigned total = p.begin[p.g.n_items];
    const int begin = total * blockIdx.x / gridDim.x, n_tiles = int(total * (blockIdx.x + 1) / gridDim.x) - begin;
    const int panels = (n_tiles + MT - 1) / MT, stages = (n_tiles + kTiles - 1) / kTiles;
    auto first_stage = [&](int panel) { return panels == 1 ? stages * panel : stages * panel / panels; };  // of the block's tiles
    for (int panel = warp; panel < panels; panel += kWarps + kHelpers) {
      const int first = first_stage(panel), n = 1 + first_stage(panel + 1) - first, at = panel + first;
      if (lane == 0) {
        list_of[panel] = short(at);
        if (panel == panels - 1) list_of[panels] = short(at + n);
      }
      for (int i = lane; i < n; i += 32) {
        Source source;
        source.is_x = i == 0, source.is_last = i == n - 1;
#pragma unroll
        for (int u = 0; u < kTiles; ++u) {
          const void *matrix = p.g.x;
          int row = u * kTile, rows = p.g.tokens;
          if (i > 0) {
            const int tile = (first + i - 1) * kTiles + u, at = begin + min(tile, n_tiles - 1), item = find_item(p, at);
            matrix = p.g.items[item].weight, row = (at - p.begin[item]) * kTile, rows = tile < n_tiles ? p.g.items[item].out_features : 0;
          }
          source.first[u] = static_cast<const char *>(matrix) + int64_t(row) * in * sizeof(E);
          source.rows[u] = short(max(0, min(rows - row, kTile)));
        }
        lists[at + i] = source;
      }
    }
    Experts::template init<Shape::kTokens>(choice);
    if (threadIdx.x == 0) {
      mbarrier_init(expanded, kHelperThreads);
      if constexpr (Experts::kChosenOnly) mbarrier_init(free, kHelperThreads);
      plan_ = Plan{begin, n_tiles, panels, int(blockIdx.x % splits_of(in))};
    }
  }
  __syncthreads();
  auto first_tile = [&](int panel) { return (list_of[panel] - panel) * kTiles; };
  auto tiles_of = [&](int panel) { return min(first_tile(panel + 1), plan.n_tiles) - first_tile(panel); };

  if (warp >= kWarps) {
    if (!p.has_rank) return;
    if constexpr (!Experts::kChosenOnly) {
      using namespace all_experts;
      const int thread = threadIdx.x - kThreads, helper = warp - kWarps, num_experts = p.g.num_experts, entries = p.g.tokens * p.g.top_k;
      const bool most = entries > num_experts;  // of the experts will have been chosen
      // Every `parts` blocks in a row have all parts of the features, and multiply the same tiles of A by them.
      const int parts = parts_of(in), row_of_blocks = blockIdx.x / parts, rows_of_blocks = p.sync ? gridDim.x / parts : 0;
      const int with_tiles = p.sync ? min(rows_of_blocks, p.shrink_begin[p.g.n_items]) : 0;
      const bool shrinks = row_of_blocks < with_tiles;
      pdl_wait();
      // What does not depend on each other is asked for at once: a round trip takes long beside the weights.
      constexpr int kEach = (kIds + kHelperThreads - 1) / kHelperThreads;
      short id[kEach];
      float gate[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int entry = thread + i * kHelperThreads;
        id[i] = entry < entries ? valid_id(p, entry) : short(-1), gate[i] = entry < entries ? __ldcg(p.g.gates + entry) : 0.f;
      }
      Shrink<E, Shape, NT> shrink(p, blockIdx.x % parts);
      if (shrinks) shrink.load(shrink_tile(p, row_of_blocks), shrink.first);
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (const int entry = thread + i * kHelperThreads; entry < entries) ids[entry] = id[i], gates[entry] = gate[i];
      barrier(kHelping, kHelperThreads);
      if (shrinks) shrink.run(row_of_blocks, rows_of_blocks, most, ids, gates, more);
      if (most) fill(p, ids, choice);
      for (int panel = 0; panel < plan.panels; ++panel) {
        const int begin = plan.begin + first_tile(panel), tiles = tiles_of(panel);
        if (panel > 0) barrier(kSummed, kAllThreads);
        using Expand = Expand<E, Shape, NT>;
        constexpr int kEarly = 2;  // tiles whose B is on its way while the hidden is waited for
        uint4 b[kEarly][Expand::kFirst][2];
#pragma unroll
        for (int q = 0; q < kEarly; ++q)
          if (const int m = helper + q * kHelpers; m < tiles) Expand(p, begin + m, hidden).load_first(ids, b[q]);
        if (panel == 0 && p.sync) collect<E>(p, with_tiles * parts, parts, plan.begin, plan.n_tiles, ids, hidden, there);
#pragma unroll
        for (int q = 0; q < kEarly; ++q)
          if (const int m = helper + q * kHelpers; m < tiles) Expand(p, begin + m, hidden).run(ids, choice, b[q], more + m * kTile);
        for (int m = helper + kEarly * kHelpers; m < tiles; m += kHelpers) {
          const Expand expand(p, begin + m, hidden);
          expand.load_first(ids, b[0]);
          expand.run(ids, choice, b[0], more + m * kTile);
        }
        mbarrier_arrive(expanded);
      }
    } else {
      using namespace chosen_experts;
      const int thread = threadIdx.x - kThreads, entries = p.g.tokens * p.g.top_k;
      // Every `parts` blocks in a row have all parts of the features, and multiply the same tiles of A by them.
      const int parts = parts_of(in), row_of_blocks = blockIdx.x / parts, rows_of_blocks = p.sync ? gridDim.x / parts : 0;
      const bool every = p.shrink_begin[p.g.n_items] <= rows_of_blocks;
      pdl_wait();
      // As above; and ids are not looked at yet: that would be a wait for them.
      constexpr int kEach = (kIds + kHelperThreads - 1) / kHelperThreads;
      int64_t given[kEach];
      float gate[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int entry = thread + i * kHelperThreads;
        given[i] = entry < entries ? given_id(p, entry) : -1, gate[i] = entry < entries ? __ldcg(p.g.gates + entry) : 0.f;
      }
      uint4 *room = reinterpret_cast<uint4 *>(partial) + thread;
      Shrink<E, Shape, NT> shrink(p, choice, every, blockIdx.x % parts, row_of_blocks, rows_of_blocks, room);
      if (row_of_blocks < min(rows_of_blocks, p.shrink_begin[p.g.n_items])) {
        shrink.begin_with_x();
        if (every) shrink.begin();
      }
      int id[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        id[i] = expert_of(p, given[i]);
        if (const int entry = thread + i * kHelperThreads; entry < entries) ids[entry] = short(id[i]), gates[entry] = gate[i];
      }
      choice.add(id, p.g.num_experts);
      barrier(kHelping, kHelperThreads);
      if (!every) choice.make_list(p.g.num_experts, p.g.tokens);
      const int with_tiles = min(rows_of_blocks, shrink.tiles());
      const bool shrinks = row_of_blocks < with_tiles;
      if (!every && shrinks) shrink.begin();
      if (shrinks) shrink.run(row_of_blocks, ids, gates, more);
      // Now, because A has arrived together with the ids, and other blocks wait for what becomes of it.
      if (every) choice.make_list(p.g.num_experts, p.g.tokens);
      choice.make_slots(ids, p.g.tokens, p.g.top_k);
      copy_commit();
      copy_wait<0>();  // also for what was asked for in vain: its room is used again
      for (int panel = 0; panel < plan.panels; ++panel) {
        const int begin = plan.begin + first_tile(panel), tiles = tiles_of(panel);
        Expand<E, Shape, NT> expand(p, choice, p.sync ? hidden : static_cast<const E *>(p.g.hidden), begin, tiles);
        if (panel > 0) barrier(kSummed, kAllThreads);
        if (panel == 0 && p.sync)
          collect<E, Pieces<NT>::kPieces>(p, with_tiles * parts, parts, plan.begin, plan.n_tiles, ids, room, hidden, there);
        if (panel == 0) mbarrier_arrive(free);
        expand.run(more);
        mbarrier_arrive(expanded);
      }
    }
    return;
  }

  // Slices of the features of this warp: every eighth, beginning with the block's part.
  auto slices = [&] { return (in + kSlice - 1) / kSlice; };
  auto first_slice = [&] { return plan.split * kWarps + warp; };
  auto next_slice = [&](int slice) { return slice + kWarps < splits_of(in) * kWarps ? slice + kWarps : warp; };
  auto times_of = [&](int slice) { return kTiles == 2 && slice * kSlice + kWide < in ? 2 : 1; };  // over the stages, `kWide` features each

  // Where 16 bytes of a row lie depends on the row, so that those of eight rows lie in different banks.
  constexpr int kRow = kWide * 2, kLanes = kRow / 16;  // lanes that copy a row
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(raw)) + warp * STAGES * kStageBytes;
  auto swizzled = [&](int row, int column) { return row * kRow + (column ^ (kLanes == 8 ? row % 8 : row / 2 % 4)) * 16; };
  const uint32_t to_lane = swizzled(lane / kLanes, lane % kLanes);
  const int from_lane = lane / kLanes * in + lane % kLanes * kUnit;

  // Copies, STAGES - 1 stages ahead of what is multiplied.
  int copy_panel = 0, copy_slice = 0, copy_time = 0, entry = 0;
  auto copy_next = [&] {
    copy_slice = next_slice(copy_slice);
    if (copy_slice == first_slice()) ++copy_panel;
  };
  auto copy_enter = [&] {  // the next slice that there is
    while (copy_panel < plan.panels && copy_slice >= slices()) copy_next();
    copy_time = 0, entry = -1;
    if (copy_panel < plan.panels) entry = list_of[copy_panel];
  };
  auto copy_start = [&] {
    copy_panel = 0, copy_slice = first_slice();
    copy_enter();
  };
  auto copy = [&](uint32_t stage, bool inputs, bool others) {
    if (entry < 0) return;
    const Source source = lists[entry];
    const int feature = copy_slice * kSlice + copy_time * kWide;
    if ((source.is_x ? inputs : others) && (kTiles == 2 || feature + lane % kLanes * kUnit < in)) {
#pragma unroll
      for (int u = 0; u < kTiles; ++u) {
        const E *from = reinterpret_cast<const E *>(source.first[u]) + (feature + from_lane);
#pragma unroll
        for (int r = 0; r < kTile; r += 32 / kLanes)
          if (lane / kLanes + r < source.rows[u])
            copy16(stage + (to_lane ^ (kLanes == 8 ? r % 8 * 16 : 0)) + (u * kTile + r) * kRow, from + r * in);
      }
    }
    ++entry;
    if (!source.is_last) return;
    if (++copy_time < times_of(copy_slice)) {
      entry = list_of[copy_panel];
      return;
    }
    copy_next();
    copy_enter();
  };
  // Before the wait only what no launch may still be writing: not x.
  copy_start();
  for (int s = 0; s < STAGES - 1; ++s) copy(ring + s * kStageBytes, false, true);
  pdl_wait();
  copy_start();
  for (int s = 0; s < STAGES - 1; ++s) copy(ring + s * kStageBytes, true, false);
  copy_commit();
#pragma unroll
  for (int s = 0; s < STAGES - 2; ++s) copy_commit();  // one for each stage, as everywhere below
  uint32_t stage = ring;
  auto arrived = [&] {  // the next stage; the one read before it is copied into
    copy_wait<STAGES - 2>();
    __syncwarp();
    copy(stage == ring ? ring + (STAGES - 1) * kStageBytes : stage - kStageBytes, true, true);
    copy_commit();
    const uint32_t rows = stage;
    stage = stage == ring + (STAGES - 1) * kStageBytes ? ring : stage + kStageBytes;
    return rows;
  };
  const int g = lane / 4, t = lane % 4;
  // Fragments are read for one step, 16 features: of 16 rows of a weight (in_stage: where this lane's row is), or of 16 tokens.
  const uint32_t in_stage = swizzled(lane % 16, lane / 16);

  uint32_t x[kSteps][kTiles][4];  // of 16 tokens: two for the first eight, two for the others
  auto read_x = [&] {
    const uint32_t rows = arrived() + swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int u = 0; u < kTiles; ++u)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) read_fragments((rows + u * kTile * kRow) ^ (step * 32), x[step][u]);
  };
  // One stage times x: `steps` is less than all where only half of its features are within in_features, which is divisible by 32.
  auto multiply = [&](float (*sum)[NT][4], int steps) {
    const uint32_t rows = arrived() + in_stage;
#pragma unroll
    for (int u = 0; u < kTiles; ++u)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step >= steps) break;
        uint32_t w[4];
        read_fragments((rows + u * kTile * kRow) ^ (step * 32), w);
#pragma unroll
        for (int n = 0; n < NT; ++n) mma<E>(sum[u][n], w[0], w[1], w[2], w[3], x[step][n / 2][n % 2 * 2], x[step][n / 2][n % 2 * 2 + 1]);
      }
  };
  auto steps_of = [&](int slice) { return kTiles == 1 && slice * kSlice + kSlice / 2 >= in ? kSteps / 2 : kSteps; };
  for (int panel = 0; panel < plan.panels; ++panel) {
    float acc[MT][NT][4] = {};
    const int tiles = tiles_of(panel);
    int slice = first_slice();
    do {
      if (slice >= slices()) continue;
      const int steps = steps_of(slice);
      for (int time = 0; time < times_of(slice); ++time) {
        read_x();
#pragma unroll
        for (int m = 0; m < MT; m += kTiles) {
          if (m >= tiles) break;
          multiply(acc + m, steps);
        }
      }
    } while ((slice = next_slice(slice)) != first_slice());

    if (panel > 0) barrier(kMultiplying, kThreads);  // the panel before this one has been summed up
    if constexpr (Experts::kChosenOnly)
      if (panel == 0 && p.has_rank) mbarrier_wait(free, 0);
    float *sums = partial + warp * Shape::kPartial + t * 2 * Shape::kStride + g;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      if (m >= tiles) break;
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[(n * 8 + i % 2) * Shape::kStride + m * kTile + i / 2 * 8] = acc[m][n][i];
    }
    barrier(kMultiplying, kThreads);
    if (p.has_rank) mbarrier_wait(expanded, panel % 2);
    const int quads = tiles * kTile / 4;  // of rows
    for (int i = threadIdx.x; i < quads * p.g.tokens; i += kThreads) {
      const int token = i / quads, r = (i - token * quads) * 4, tile = plan.begin + first_tile(panel) + r / kTile,
                item = find_item(p, tile);
      const float *at = partial + token * Shape::kStride + r;
      float4 sum = p.has_rank ? *reinterpret_cast<const float4 *>(more + token * Shape::kStride + r) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int k = 0; k < kWarps; ++k) sum = sum + *reinterpret_cast<const float4 *>(at + k * Shape::kPartial);
      store_results<E>(p.g.items[item], token, (tile - p.begin[item]) * kTile + r % kTile, sum);
    }
    if (p.has_rank && panel + 1 < plan.panels) arrive(kSummed, kAllThreads);
  }
#endif
}

// As many blocks as run on the device at once, one a multiprocessor; -1: none.
template <class E, int NT, int MT, int STAGES, class Experts> int blocks_of(int device) {
  static std::atomic<int> known[kMaxDevices];  // 0: not asked yet
  int blocks = known[device].load(std::memory_order_acquire);
  if (blocks != 0) return blocks;
  const DeviceGuard guard(device);  // attributes of a kernel are the current device's, and not every caller launches
  auto kernel = linear_persistent_kernel<E, NT, MT, STAGES, Experts>;
  constexpr int kBytes = Panel<E, NT, MT, STAGES, Experts>::kBytes;
  int limit = 0, major = 0;
  cudaFuncAttributes attributes;
  bool fits = guard.error == cudaSuccess;
  fits = fits && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9 && major < 12;
  fits = fits && cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess;
  fits = fits && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && int(attributes.sharedSizeBytes) + kBytes <= limit;
  fits = fits && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes) == cudaSuccess;
  if (!fits) cudaGetLastError();
  blocks = fits ? multiprocessors(device) : -1;
  known[device].store(blocks, std::memory_order_release);
  return blocks;
}

// Calls `act` with the shape for so many tokens: how many tiles of 8, tiles of a panel, stages. So many stages keep the memory busy. With
// more, all that the helpers ask for waits behind them (docs/kernel_log.md, "Bytes in flight").
template <class Experts, class Act> auto with_shape(const GroupParams &p, Act act) {
  const bool is_bf16 = p.g.dtype == LS_BFLOAT16;
#define LS_SHAPE(NT, MT, STAGES) \
  (is_bf16 ? act.template operator()<bf16, NT, MT, STAGES, Experts>() : act.template operator()<fp16, NT, MT, STAGES, Experts>())
  if (p.g.tokens <= 8) return LS_SHAPE(1, 12, 6);
  if (p.g.tokens <= 16) return LS_SHAPE(2, 8, 6);
  return LS_SHAPE(4, 6, 4);
#undef LS_SHAPE
}

struct Blocks {
  int device;
  template <class E, int NT, int MT, int STAGES, class Experts> int operator()() const {
    return blocks_of<E, NT, MT, STAGES, Experts>(device);
  }
};

struct Launch {
  GroupParams &p;
  void *stream;
  template <class E, int NT, int MT, int STAGES, class Experts> int operator()() const {
    auto kernel = linear_persistent_kernel<E, NT, MT, STAGES, Experts>;
    const int blocks = blocks_of<E, NT, MT, STAGES, Experts>(p.g.device), tiles = p.begin[p.g.n_items];
    return launch<GroupParams>(kernel, dim3(tiles < blocks ? tiles : blocks), dim3(kAllThreads), p, stream, may_overlap(kernel, p.g.device),
                               Panel<E, NT, MT, STAGES, Experts>::kBytes);
  }
};

void layout_tiles(GroupParams &p) {
  int weight = 0, a = 0;
  for (int i = 0; i < p.g.n_items; ++i) {
    p.begin[i] = weight, weight += (p.g.items[i].out_features + kTile - 1) / kTile;
    p.shrink_begin[i] = a, a += (p.g.num_experts * p.g.items[i].rank + kTile - 1) / kTile;
  }
  p.begin[p.g.n_items] = weight, p.shrink_begin[p.g.n_items] = a;
  p.has_rank = any_rank(p.g);
}

// Rows of blocks, each of which takes tiles of A. After layout_tiles().
template <class Experts> int rows_of_blocks(const GroupParams &p) {
  const int blocks = with_shape<Experts>(p, Blocks{p.g.device}), tiles = p.begin[p.g.n_items];
  return (tiles < blocks ? tiles : blocks) / parts_of(p.g.in_features);
}

}  // namespace

int persistent_parts(const ls_group &g) { return parts_of(g.in_features); }

bool can_persistent(GroupParams &p) {
  if (p.g.tokens > LS_FAST_TOKENS || p.g.in_features % kChunk || p.g.device < 0 || p.g.device >= kMaxDevices) return false;
  for (int i = 0; i < p.g.n_items; ++i)
    if (!p.g.items[i].weight) return false;
  layout_tiles(p);
  const int blocks = with_shape<AllExperts>(p, Blocks{p.g.device});
  return blocks > 0 && p.begin[p.g.n_items] <= int64_t(blocks) * kMostTiles;
}

// The limits of both ways, measured on an H200 (docs/kernel_log.md).
//
// The list costs the trip to memory in which the ids come, so it pays only where it leaves out enough: not with 8 experts, however few
// tokens there are; not with twice as many choices as experts, when seven of eight experts or more are chosen; with as many, two of three
// are, and it does. For a token or two nobody has compared it with linear_streaming.cu.
bool persistent_takes_chosen(GroupParams &p) {
  constexpr int kFewExperts = 8, kMostShrinkTiles = 12;  // of A for a block
  const int experts = p.g.num_experts, choices = p.g.tokens * p.g.top_k;
  if (!any_rank(p.g) || p.g.tokens <= kStreamingTokens || experts <= kFewExperts || choices >= 2 * experts) return false;
  layout_tiles(p);
  const int rows = rows_of_blocks<ChosenExperts>(p), chosen = choices < experts ? choices : experts;  // as many as can be
  if (rows <= 0 || p.hidden_elements > ChosenExperts::kHidden) return false;
  return shrink_tiles(p.g.items, p.g.n_items, chosen) <= rows * kMostShrinkTiles;
}

bool persistent_can_shrink(GroupParams &p) {
  layout_tiles(p);
  const int rows = rows_of_blocks<AllExperts>(p);
  // Tiles of A for a block: with more, linear_streaming.cu (1 or 2 tokens) or linear_registers.cu is faster.
  const float most = p.g.tokens <= 8 ? 1.5f : 4.f;
  return rows > 0 && p.hidden_elements <= AllExperts::kHidden && p.shrink_begin[p.g.n_items] <= rows * most;
}

int launch_linear_persistent(GroupParams &p, void *stream) {
  const bool chosen = persistent_takes_chosen(p);
  layout_tiles(p);
  return chosen ? with_shape<ChosenExperts>(p, Launch{p, stream}) : with_shape<AllExperts>(p, Launch{p, stream});
}

}  // namespace ls
