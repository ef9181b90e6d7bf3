// A group of linears as the kernels receive it: the ABI's struct plus what the host works out once per launch.
#pragma once
#include "common.cuh"

namespace ls {

struct GroupParams {
  ls_group g;
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

inline int64_t layout_hidden(GroupParams &p) {
  int64_t n = 0;
  for (int i = 0; i < p.g.n_items; ++i) {
    p.hidden[i] = n;
    n += (int64_t(p.g.tokens) * p.g.top_k * p.g.items[i].rank + 7) / 8 * 8;  // every linear's start 16-byte aligned
  }
  return n;
}

inline bool any_rank(const ls_group &g) {
  for (int i = 0; i < g.n_items; ++i)
    if (g.items[i].rank > 0) return true;
  return false;
}

int launch_shrink(GroupParams &p, void *stream);
bool can_stream(const GroupParams &p);
int launch_linear_stream(GroupParams &p, void *stream);
int launch_linear_registers(GroupParams &p, void *stream);
int launch_linear_generic(GroupParams &p, void *stream);

}  // namespace ls
