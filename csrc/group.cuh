// A group of linears as the kernels receive it: the ABI's ls_group plus what the host works out once per launch.
#pragma once
#include "common.cuh"

namespace ls {

// How the blocks of one launch agree that the shrink is done. All zero before and after every launch.
struct alignas(16) Sync {
  unsigned ticket;  // linear_streaming.cu: next shrink task to hand out; behind the struct, a word for each element of the hidden
  unsigned done;    // tasks of the shrink that are finished
  unsigned left;    // blocks that need nothing more of this
  unsigned unused;
};

struct GroupParams {
  ls_group g;
  Sync *sync;                     // NULL: the shrink is a launch of its own, before this one
  int shrink_begin[LS_MAX_GROUP + 1];  // with sync: first shrink task of each linear
  int64_t hidden_elements;        // of all linears together
  int begin[LS_MAX_GROUP + 1];    // first block of each linear
  int has_rank;                   // any linear has experts
  int64_t hidden[LS_MAX_GROUP];   // first element of each linear's hidden, laid out [tokens, top_k, rank]
};

// Linear that block `b` works on.
__device__ __forceinline__ int find_item(const GroupParams &p, int b) {
  int i = 0;
  while (i + 1 < p.g.n_items && b >= p.begin[i + 1]) ++i;
  return i;
}

template <class E> __device__ __forceinline__ void store_result(const ls_item &item, int token, int row, float sum) {
  const int64_t at = int64_t(token) * item.out_features + row;
  if (item.bias) sum += to_float(static_cast<const E *>(item.bias)[row]);
  if (item.base) sum += to_float(static_cast<const E *>(item.base)[at]);
  static_cast<E *>(item.out)[at] = from_float<E>(sum);
}

constexpr int kSplits = 4;  // parts of the features in linear_registers.cu: each writes partial sums in float32, their readers add them up

// Announces that one task's part of the hidden is in memory: the writes of this thread, and those before the last barrier.
__device__ __forceinline__ void shrink_done(Sync *sync) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&sync->done) : "memory");
}
// For one thread of a block; a __syncthreads() after it makes the hidden visible to the others.
__device__ __forceinline__ unsigned shrinks_done(const Sync *sync) {
  unsigned n;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(n) : "l"(&sync->done) : "memory");
  return n;
}
// Called by one thread of each block when the block no longer needs `sync`. Returns whether it was the last block, which then resets it.
__device__ __forceinline__ bool leave(Sync *sync, unsigned blocks) {
  __threadfence();
  return atomicAdd(&sync->left, 1u) == blocks - 1;
}

constexpr int kPersistentHidden = 12288;  // elements of the hidden that a block of linear_persistent.cu has room for at most
constexpr int kStreamingTokens = 2;  // for more tokens linear_registers.cu is faster than linear_streaming.cu
constexpr int kHiddenInside = 2048;  // elements of the hidden (linear_registers.cu: of one linear's) that a block has room for on chip

Sync *next_sync(int device, void *stream, int words);  // workspace.cu

// Where each linear's hidden begins; returns the elements of all.
inline int64_t layout_hidden(GroupParams &p) {
  int64_t n = 0;
  for (int i = 0; i < p.g.n_items; ++i) {
    p.hidden[i] = n;
    n += (int64_t(p.g.tokens) * p.g.top_k * p.g.items[i].rank + 7) / 8 * 8;  // every linear's start 16-byte aligned
  }
  return p.hidden_elements = n;
}

// For many tokens: a row for each token, the ranks of all experts of each linear beginning at a multiple of so many columns.
constexpr int kSm90Features = 64;
inline int64_t layout_hidden_sm90(GroupParams &p) {
  int64_t width = 0;
  for (int i = 0; i < p.g.n_items; ++i) {
    p.hidden[i] = width;
    width += (p.g.num_experts * p.g.items[i].rank + kSm90Features - 1) / kSm90Features * kSm90Features;
  }
  return p.hidden_elements = p.g.tokens * width;
}

inline bool any_rank(const ls_group &g) {
  for (int i = 0; i < g.n_items; ++i)
    if (g.items[i].rank > 0) return true;
  return false;
}

int launch_shrink(GroupParams &p, void *stream);
int launch_shrink_few_ranks(GroupParams &p, void *stream);
int launch_shrink_many_ranks(GroupParams &p, void *stream);
bool can_streaming(const GroupParams &p);
bool can_sm90(const ls_group &g);
bool can_persistent(GroupParams &p);
bool persistent_takes_chosen(GroupParams &p);  // linear_persistent.cu reads A and B of chosen experts only, and shrinks inside
bool persistent_can_shrink(GroupParams &p);
int persistent_parts(const ls_group &g);  // as kSplits, in linear_persistent.cu
int launch_linear_streaming(GroupParams &p, void *stream);
int launch_linear_persistent(GroupParams &p, void *stream);
int launch_linear_registers(GroupParams &p, void *stream);
int launch_linear_sm90(GroupParams &p, void *stream);
bool can_split_k(const ls_group &g);
int64_t split_k_elements(const ls_group &g);  // that linear_split_k_sm90.cu needs behind the hidden
int split_k_words(const ls_group &g);  // of the workspace
int launch_linear_split_k(GroupParams &p, Sync *sync, void *stream);
int launch_linear_generic(GroupParams &p, void *stream);

}  // namespace ls
