// What linear_sm90.cu and linear_split_k_sm90.cu share: a linear of the group as they take it, and how lora_b of all experts becomes
// more of the inner dimension K.
#pragma once
#include "mma.cuh"
#include "sm90.cuh"

namespace ls {

constexpr int kStepUnits = kSm90Features / kUnit;  // of 8 features, of a step

struct Sm90Linear {
  void *out;
  const void *bias;
  int columns;     // of the result
  int steps;       // of its experts' ranks
  int units_each;  // of one expert
  int hidden;      // where its hidden begins
  float scaling;   // of gates
};

inline int expert_steps(const ls_group &g, const ls_item &item) { return (g.num_experts * item.rank + kSm90Features - 1) / kSm90Features; }

// Of lora_b, for tiles of `rows` outputs. A step that lies in one expert is copied as the weight is, 128-byte swizzled, `whole_rows`
// outputs at a time; else a unit of each output at a time.
inline bool make_b_map(CUtensorMap &map, const ls_group &g, const ls_item &item, int rows, int whole_rows) {
  const uint64_t out = item.out_features, rank = item.rank, experts = g.num_experts;
  const Dimension units[] = {{kUnit, 1, kUnit}, {out, rank, uint32_t(rows)}, {rank / kUnit, kUnit, 1}, {experts, out * rank, 1}};
  const Dimension whole[] = {{rank, 1, kSm90Features}, {out, rank, uint32_t(whole_rows)}, {experts, out * rank, 1}};
  return rank % kSm90Features ? make_map(map, g.dtype, item.lora_b, units, 4, false) : make_map(map, g.dtype, item.lora_b, whole, 3, true);
}

// The i-th linear of the group.
inline Sm90Linear linear_of(const GroupParams &params, int i) {
  const ls_item &item = params.g.items[i];
  const int steps = expert_steps(params.g, item);
  return {item.out, item.bias, item.out_features, steps, item.rank / kUnit, int(params.hidden[i]), item.scaling};
}

}  // namespace ls
