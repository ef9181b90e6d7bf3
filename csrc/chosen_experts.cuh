// The experts that the tokens of one launch of linear_persistent.cu chose, and how the rows of their lora_a and the units of their
// lora_b are dealt out. Arithmetic alone, for the host as well: tests/kernels/test_chosen_experts.py counts it out without a GPU.
#pragma once
#include "loraswitch.h"

#ifdef __CUDACC__
#define LS_UNROLL _Pragma("unroll")
#else
#define LS_UNROLL
#endif

namespace ls {

constexpr int kRanksOfUnit = 8;  // ranks are divisible by it: eight rows of lora_a, or a 16-byte load of lora_b, are of one expert
constexpr int kExpertWords = LS_MAX_EXPERTS / 32;  // of a set of experts, a bit for each

__host__ __device__ inline int count_bits(unsigned bits) {
#ifdef __CUDA_ARCH__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// How many experts of the set come before `expert`: its place in the list of the set.
__host__ __device__ inline int place_of(const unsigned *bits, int expert) {
  int n = 0;
  for (int word = 0; word < expert / 32; ++word) n += count_bits(bits[word]);
  return expert % 32 == 0 ? n : n + count_bits(bits[expert / 32] & ((1u << expert % 32) - 1));
}

// Tiles of 16 rows of lora_a of so many experts.
__host__ __device__ inline int shrink_tiles(int rank, int experts) { return (experts * (rank / kRanksOfUnit) + 1) / 2; }
__host__ __device__ inline int shrink_tiles(const ls_item *items, int n_items, int experts) {
  int n = 0;
  for (int i = 0; i < n_items; ++i) n += shrink_tiles(items[i].rank, experts);
  return n;
}

// One of them: two times eight rows.
struct ShrinkTile {
  int item;
  int place[2];  // of the expert in a list of experts; -1: there are no such rows
  int rank[2];   // the first of its ranks
};
__host__ __device__ inline ShrinkTile shrink_tile(const ls_item *items, int experts, int tile) {
  ShrinkTile at;
  at.item = 0;
  for (int n; tile >= (n = shrink_tiles(items[at.item].rank, experts)); ++at.item) tile -= n;
  const int units_each = items[at.item].rank / kRanksOfUnit;
  LS_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int unit = tile * 2 + h, place = unit / units_each;
    at.place[h] = place < experts ? place : -1, at.rank[h] = unit % units_each * kRanksOfUnit;
  }
  return at;
}

// The units of lora_b of a list of experts, four at a time, one for each lane of a row. There is always a first time: of a linear
// without ranks, or without chosen experts, the sum is zero.
struct Units {
  int left;         // times, with this one
  int place, unit;  // this lane's: of the expert in the list (there is none from the list's end on), and of its ranks
  int each;         // units of an expert

  __host__ __device__ Units() {}
  __host__ __device__ Units(int rank, int experts, int lane) {
    each = rank > 0 ? rank / kRanksOfUnit : 1;
    const int units = rank > 0 ? experts * each : 0;
    left = units > 4 ? (units + 3) / 4 : 1;
    place = rank > 0 ? lane / each : experts, unit = rank > 0 ? lane % each : 0;
  }
  __host__ __device__ bool next() {  // whether there is one more time
    for (unit += 4; unit >= each; unit -= each) ++place;
    return --left > 0;
  }
};

}  // namespace ls
