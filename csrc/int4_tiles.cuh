// Weights of 4 bits as torchao keeps them for tensor cores (Int4TilePackedTo4dTensor), multiplied as they lie:
// weight = (q - 8) * scale + zero.
//
//   weight [out / 8][in / 128][32][4] words of 32 bits, rows padded to 8, features to 1,024: the 16 bytes of lane 4 g + t of a tile are row
//   g; word j of them holds features 32 j + 2 t + {0, 1} in bits 0 and 16, those + 8 in bits 4 and 20, + 16 in 8 and 24, + 24 in 12 and 28
//   scales [in / scale_block][out][2] bfloat16 (scale, zero), padded likewise   x [tokens, in] bfloat16
//   tile: 16 * MT rows by 128 features at a time, for 8 * NT tokens (TOKENS, rounded up)
//   shared memory: x, a ring for each warp: a row for each token, all pieces side by side and 16 bytes more, so that no two lanes meet in
//   a bank
//
// Two neighbouring tiles of 8 rows are fragments of one product as they lie. 4 bits become 16 in three instructions for two values: with
// bits 0x4300 before them they are 128 + q in bfloat16, of which 136 are taken away, exactly. Scale and zero multiply float32 sums over
// the features that share them: of (q - 8) x, and of x alone, which is one more product, with ones.
#pragma once
#include "cp_async.cuh"
#include "mma.cuh"

namespace ls {

constexpr int kTileRows = LS_INT4_ROWS, kTileFeatures = 128;  // of a tile

// For up to TOKENS tokens: R chunks of weights in registers, RX of x in shared memory, in pieces of P features, of WARPS warps each.
template <class E, int TOKENS, int MT, int R, int RX, int P, int WARPS, int BLOCKS> struct Int4Tiles {
  static constexpr bool kOwnLoads = true;
  static constexpr int kBlocks = BLOCKS, NT = (TOKENS + 7) / 8;
  static constexpr int kParts = kTileFeatures / P, kSlots = RX * kParts, kPiece = P * 2;  // bytes
  static constexpr int kLanes = P / 8;  // copy a piece of one token
  static constexpr int kRow = kSlots * kPiece + 16;
  static constexpr int kShared = WARPS * TOKENS * kRow;
  static constexpr int kStep = WARPS;  // chunks from one of a warp's to its next
  static_assert(R % RX == 0, "chunks find their pieces by number");
  static int shared_bytes(const ls_group &g) { return WARPS * g.tokens * kRow; }

  const uint4 *weight;  // this lane's 16 bytes of tile 0, chunk 0
  const uint32_t *scales;  // of group 0, row 0
  uint32_t tile_at[MT][2], row_at[MT][2];
  uint32_t fragments;  // shared memory: this lane's of token 0, 1, ...
  int padded_rows;
  uint4 w[R][MT][2];
  uint32_t scale[R][MT][2];  // of the 32 features from 32 t on

  // Of those with features of x. (What is read of `group` lies in constant memory and takes no register.)
  __device__ __forceinline__ static int chunks(const ls_group &group) { return (group.in_features + kTileFeatures - 1) / kTileFeatures; }

  // Asks for the first weights: static memory, before the wait for other launches.
  __device__ __forceinline__ void begin(const ls_group &group, const ls_item &item, const int (&row)[MT][2]) {
    extern __shared__ __align__(16) char shared[];
    const int lane = threadIdx.x % 32;
    padded_rows = (item.out_features + kTileRows - 1) / kTileRows * kTileRows;
    weight = static_cast<const uint4 *>(item.weight) + lane;
    scales = static_cast<const uint32_t *>(item.scales);
    const uint32_t stride = (group.in_features + LS_INT4_FEATURES - 1) / LS_INT4_FEATURES * (LS_INT4_FEATURES / kTileFeatures) * 32;
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) row_at[m][h] = row[m][h], tile_at[m][h] = row[m][h] / kTileRows * stride;
    fragments = shared_address(shared) + threadIdx.x / 32 * group.tokens * kRow + lane % 4 * 4;
#pragma unroll
    for (int r = 0; r < R; ++r) load(group, threadIdx.x / 32 + r * kStep, r);
  }

  // Asks for the first pieces of x. After the wait.
  __device__ __forceinline__ void begin_inputs(const ls_group &group) const {
#pragma unroll
    for (int r = 0; r < RX; ++r)
#pragma unroll
      for (int part = 0; part < kParts; ++part) copy_input(group, threadIdx.x / 32 + r * kStep, r * kParts + part, part);
  }

  __device__ __forceinline__ void load(const ls_group &group, int c, int r) {
    if (c >= chunks(group)) return;
    const uint32_t scale_group = uint32_t(c * kTileFeatures + threadIdx.x % 4 * 32) >> (__ffs(group.scale_block) - 1);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        w[r][m][h] = load_static(weight + tile_at[m][h] + c * 32);
        scale[r][m][h] = __ldg(scales + scale_group * padded_rows + row_at[m][h]);
      }
  }

  // Asks for a piece of x of all tokens; what lies past its features is zero.
  __device__ __forceinline__ void copy_input(const ls_group &group, int c, int slot, int part) const {
    if (c < chunks(group)) {
      const int lane = threadIdx.x % 32, feature = c * kTileFeatures + part * P + lane % kLanes * 8;
      const bool inside = feature < group.in_features;
      const char *from = static_cast<const char *>(group.x) + (lane / kLanes * int64_t(group.in_features) + feature) * 2;
      uint32_t to = fragments - lane % 4 * 4 + lane / kLanes * kRow + slot * kPiece + lane % kLanes * 16;
#pragma unroll 1
      for (int token = 0; token < TOKENS; token += 32 / kLanes) {
        if (token + lane / kLanes >= group.tokens) break;
        if (inside)
          copy16_kept(to, from);
        else
          store_zeros16(to);
        from += group.in_features * (32 / kLanes * 2), to += 32 / kLanes * kRow;
      }
    }
    copy_commit();
  }

  // The two values of `word` that begin at these bits, as bfloat16.
  __device__ __forceinline__ static uint32_t pair(uint32_t word, int bits) {
    const uint32_t less = 0x43084308u;  // 136
    uint32_t v;  // 128 + q. Written in C, these would be two instructions.
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(word >> bits), "n"(0x000f000f), "n"(0x43004300));
    __nv_bfloat162 d = __hsub2(*reinterpret_cast<const __nv_bfloat162 *>(&v), *reinterpret_cast<const __nv_bfloat162 *>(&less));
    return *reinterpret_cast<uint32_t *>(&d);
  }

  __device__ __forceinline__ static uint32_t word_of(const uint4 &v, int j) { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; }

  // Words of one piece: `sum` and `sum_of_x` go on from piece to piece, and into `acc` where scales end.
  __device__ __forceinline__ void multiply(const ls_group &group, int r, int slot, int part, float (&sum)[MT][NT][4],
                                           float (&sum_of_x)[NT][4], float (&acc)[MT][NT][4]) const {
    constexpr uint32_t kOnes = 0x3f803f80u;
    constexpr int kWords = P / 32;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int j = part * kWords + i;
      uint32_t x[NT][4];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const int token = min(n * 8 + lane / 4, group.tokens - 1);  // sums of excess tokens are not stored
#pragma unroll
        for (int k = 0; k < 4; ++k) x[n][k] = load_shared4(fragments + token * kRow + slot * kPiece + i * 64 + k * 16);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const uint32_t low = word_of(w[r][m][0], j), high = word_of(w[r][m][1], j);
          const uint32_t a0 = pair(low, 8 * k), a1 = pair(high, 8 * k), a2 = pair(low, 8 * k + 4), a3 = pair(high, 8 * k + 4);
#pragma unroll
          for (int n = 0; n < NT; ++n) mma<E>(sum[m][n], a0, a1, a2, a3, x[n][2 * k], x[n][2 * k + 1]);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) mma<E>(sum_of_x[n], kOnes, kOnes, kOnes, kOnes, x[n][2 * k], x[n][2 * k + 1]);
      }
      if (j != 3 && group.scale_block > (j == 1 ? 64 : 32)) continue;  // the next word has the same scales
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t both = __shfl_sync(0xffffffffu, scale[r][m][h], lane / 4 * 4 + j);
          const float factor = __uint_as_float(both << 16), zero = __uint_as_float(both & 0xffff0000u);
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float &to = acc[m][n][h * 2 + e];
              to = fmaf(factor, sum[m][n][h * 2 + e], fmaf(zero, sum_of_x[n][e], to));
            }
        }
      clear(sum, sum_of_x);
    }
  }

  __device__ __forceinline__ static void clear(float (&sum)[MT][NT][4], float (&sum_of_x)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum_of_x[n][i] = 0.f;
#pragma unroll
        for (int m = 0; m < MT; ++m) sum[m][n][i] = 0.f;
      }
  }

  // All of this warp's chunks.
  __device__ __forceinline__ void run(const ls_group &group, float (&acc)[MT][NT][4]) {
    float sum[MT][NT][4], sum_of_x[NT][4];
    clear(sum, sum_of_x);
    for (int c = threadIdx.x / 32; c < chunks(group);) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int slot = r % RX * kParts + part;
          copy_wait<kSlots - 1>();
          __syncwarp();  // other lanes' copies
          multiply(group, r, slot, part, sum, sum_of_x, acc);
          __syncwarp();  // nobody reads the slot any more
          copy_input(group, c + RX * kStep, slot, part);
        }
        load(group, c + R * kStep, r);
        c += kStep;
        if (c >= chunks(group)) break;
      }
    }
  }
};

}  // namespace ls
