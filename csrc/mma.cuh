// mma.sync fragments for few tokens, shared by the linear kernels; and the experts as more columns of the inner dimension.
//
// Rows of a weight are M, tokens are N. The sum over input features may be taken in any order, so a lane takes 16 contiguous bytes (8
// features) of row g = lane / 4 at feature 8 (lane % 4), of each 32, and uses them as its part of two k16 fragments: no shuffle between
// memory and the tensor core.
#pragma once
#include "group.cuh"

namespace ls {

constexpr int kUnit = 8;    // features in one 16-byte load
constexpr int kChunk = 32;  // features the four lanes of a row load at once

template <class E>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<fp16>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 32 features of 16 rows (this lane's: rows g and g + 8) times 32 features of 8 tokens (this lane's: token g).
template <class E> __device__ __forceinline__ void mma32(float (&c)[4], const uint4 (&w)[2], const uint4 &x) {
  mma<E>(c, w[0].x, w[1].x, w[0].y, w[1].y, x.x, x.y);
  mma<E>(c, w[0].z, w[1].z, w[0].w, w[1].w, x.z, x.w);
}

// 16 rows by 16 features from shared memory, as a product takes them: `at` is this lane's row (lane % 16) and half of the features.
__device__ __forceinline__ void read_fragments(uint32_t at, uint32_t (&v)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at)
               : "memory");
}

// Between two lanes: `high` of the lower one for `low` of the upper one.
__device__ __forceinline__ void exchange(uint32_t &low, uint32_t &high, int distance, bool upper) {
  const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
  if (upper)
    low = got;
  else
    high = got;
}
// Of four neighbouring lanes, the t-th gets the t-th words of all.
__device__ __forceinline__ void transpose(uint4 &v, int t) {
  exchange(v.x, v.y, 1, t & 1);
  exchange(v.z, v.w, 1, t & 1);
  exchange(v.x, v.z, 2, t & 2);
  exchange(v.y, v.w, 2, t & 2);
}

template <class E> __device__ __forceinline__ uint4 add8(const uint4 &a, const uint4 &b) {
  const uint32_t *pa = &a.x, *pb = &b.x;
  uint4 v;
  uint32_t *pv = &v.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 fa = unpack2<E>(pa[i]), fb = unpack2<E>(pb[i]);
    pv[i] = pack2<E>(fa.x + fb.x, fa.y + fb.y);
  }
  return v;
}

// The experts as more input features: after [W] x comes [B_e1 | B_e2 | ...] hidden, a unit of eight ranks (one 16-byte load
// of a row of B) at a time, four units (one for each lane of a row) a chunk. Few tokens: an entry, `rank` features, for
// every (token, j). More: an entry for every expert. The hidden of an expert that a token did not choose is zero.
struct ExpertColumns {
  const char *lora_b, *hidden;
  int rank, out, tokens, top_k, num_experts, units_each, units, chunks;
  bool by_pair;

  __device__ __forceinline__ ExpertColumns(const GroupParams &p, int item_index) {
    const ls_item &item = p.g.items[item_index];
    rank = item.rank, out = item.out_features;
    tokens = p.g.tokens, top_k = p.g.top_k, num_experts = p.g.num_experts;
    by_pair = tokens * top_k <= num_experts;
    units_each = rank / kUnit;
    units = (by_pair ? tokens * top_k : num_experts) * units_each;
    chunks = (units + 3) / 4;
    lora_b = static_cast<const char *>(item.lora_b);
    hidden = static_cast<const char *>(p.g.hidden) + p.hidden[item_index] * 2;
  }

  // This lane's unit of chunk `chunk`: its expert (-1: none), entry, and first rank.
  struct Unit {
    int expert, entry, offset;
  };
  __device__ __forceinline__ Unit unit_of(int chunk, const short *ids) const {
    const int unit = chunk * 4 + threadIdx.x % 4;
    if (unit >= units) return Unit{-1, 0, 0};
    const int entry = unit / units_each;
    return Unit{by_pair ? ids[entry] : entry, entry, unit % units_each * kUnit};
  }

  // Fragments of lora_b, for 16 rows whose g-th and (g+8)-th are row_lo and row_hi. Static memory: needs no wait.
  template <class E> __device__ __forceinline__ void load_b(const Unit &u, int row_lo, int row_hi, uint4 (&w)[2]) const {
    w[0] = w[1] = make_uint4(0, 0, 0, 0);
    if (u.expert < 0) return;
    const E *b = reinterpret_cast<const E *>(lora_b) + u.offset;
    w[0] = load_static(b + (int64_t(u.expert) * out + row_lo) * rank);
    w[1] = load_static(b + (int64_t(u.expert) * out + row_hi) * rank);
  }

  // Have load_b's memory on its way to L2. `ids` must be there if `by_pair`.
  template <class E> __device__ __forceinline__ void prefetch_b(const Unit &u, int row) const {
    if (u.expert < 0) return;
    const E *b = reinterpret_cast<const E *>(lora_b) + u.offset + (int64_t(u.expert) * out + row) * rank;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(b));
  }

  // Fragments of the hidden, for NT * 8 tokens. After the wait.
  template <class E, int NT> __device__ __forceinline__ void load_hidden(const Unit &u, const short *ids, uint4 (&x)[NT]) const {
    const int g = threadIdx.x % 32 / 4;
    const E *h = reinterpret_cast<const E *>(hidden) + u.offset;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = n * 8 + g;
      x[n] = make_uint4(0, 0, 0, 0);
      if (u.expert < 0 || token >= tokens) continue;
      if (by_pair) {
        if (u.entry / top_k == token) x[n] = load_cached(h + int64_t(u.entry) * rank);
      } else {
        bool found = false;
        for (int j = 0; j < top_k; ++j) {
          if (ids[token * top_k + j] != u.expert) continue;
          const uint4 v = load_cached(h + (int64_t(token) * top_k + j) * rank);
          x[n] = found ? add8<E>(x[n], v) : v;  // the same expert twice is unusual, and still right
          found = true;
        }
      }
    }
  }
};

// The expert of an entry [tokens, top_k], -1 if its id is none.
__device__ __forceinline__ short valid_id(const GroupParams &p, int entry) {
  const int64_t e = __ldcg(reinterpret_cast<const long long *>(p.g.experts) + entry);
  return e >= 0 && e < p.g.num_experts ? short(e) : short(-1);
}
__device__ __forceinline__ void read_ids(const GroupParams &p, short *ids, int thread, int threads) {
  for (int i = thread; i < p.g.tokens * p.g.top_k; i += threads) ids[i] = valid_id(p, i);
}

}  // namespace ls
