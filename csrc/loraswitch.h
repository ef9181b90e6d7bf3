/* The whole C ABI of the LoRA-Switch kernels. No framework header, no C++: any language can load the library.
 *
 * A function that launches or sets something returns 0 or a positive error code: cudaError_t for what CUDA reported, LS_ERROR_*
 * for arguments that cannot be launched. Of the others a comment says what they return. Nothing here allocates, copies, clears
 * memory or synchronises; every launch goes to the stream it is given and can be captured in a CUDA graph. All pointers are device
 * pointers unless a comment says otherwise.
 *
 * One word for one thing: a token has `top_k` experts (ids) and gates; an expert is lora_a[e] (rank x in) and
 * lora_b[e] (out x rank); linears that receive the same tensor form a group.
 */
#ifndef LORASWITCH_H
#define LORASWITCH_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LS_ABI_VERSION 9
#define LS_MAX_GROUP 8    /* linears in one launch */
#define LS_MAX_TOP_K 8
#define LS_MAX_EXPERTS 256
#define LS_MAX_RANK 256
#define LS_TUNING_STREAMING 1 /* ls_group.tuning: linear_streaming.cu wherever it can (up to 8 tokens) */
#define LS_TUNING_REGISTERS 2 /* linear_registers.cu */
#define LS_TUNING_PERSISTENT 3 /* linear_persistent.cu wherever it can */
#define LS_TUNING_TWO_LAUNCHES 4 /* added to any of them, or alone: the shrink in a launch of its own */
#define LS_TUNING_IMPATIENT 8 /* added: no block waits for another's part of the hidden, for tests (persistent, split K) */
#define LS_TUNING_NARROW 16 /* added: linear_sm90.cu takes 128 outputs at a time */
#define LS_TUNING_WIDE 32 /* added: it takes 256 */
#define LS_TUNING_SPLIT_K 64 /* added: linear_split_k_sm90.cu wherever it can */
#define LS_SPLIT_K_TOKENS 128 /* tokens that linear_split_k_sm90.cu takes */
#define LS_INT4_ROWS 8 /* weights in int4 are padded to a multiple of so many rows */
#define LS_INT4_FEATURES 1024 /* and of so many features */
#define LS_FAST_TOKENS 32 /* tokens that LS_PATH_FAST of ls_linear takes */

#define LS_ERROR_ARGUMENT 100001 /* a size, a count or a dtype outside what this header allows */
#define LS_ERROR_POINTER 100002  /* a pointer that must not be NULL is */

enum ls_dtype { LS_FLOAT32 = 0, LS_FLOAT16 = 1, LS_BFLOAT16 = 2 };
/* How a weight lies. CODE: 4 bits as bitsandbytes keeps NF4 and FP4, uint8 [out, in / 2], feature 2 i in the higher half of byte i, which
 * stand for ls_group.code[index] * scale, scales float32 [out, in / scale_block]. INT4: 4 bits as torchao packs them in tiles for tensor
 * cores, int32 [out / 8, in / 128, 32, 4], lane 4 g + t of the 32 having row g, and word j of its four features 32 j + 2 t + {0, 1} in bits
 * 0 and 16, those + 8 in bits 4 and 20, + 16 in 8 and 24, + 24 in 12 and 28; they stand for (q - 8) * scale + zero, scales bfloat16
 * [in / scale_block, out, 2] (scale, zero); out and in are padded to multiples of LS_INT4_ROWS and LS_INT4_FEATURES, of weight and scales alike. */
enum ls_format { LS_FORMAT_DTYPE = 0, LS_FORMAT_CODE = 1, LS_FORMAT_INT4 = 2 };
enum ls_path { LS_PATH_FAST = 0, LS_PATH_GENERIC = 1, LS_PATH_SM90 = 2 };

/* One linear of a group. */
typedef struct ls_item {
  const void *weight; /* [out, in], or [in, out] if the group is transposed; NULL: only base, bias and experts; 4 bits: see ls_format */
  const void *bias;   /* [out] or NULL */
  const void *base;   /* [tokens, out], added to the result, or NULL */
  const void *lora_a; /* [experts, rank, in]; NULL if rank is 0 */
  const void *lora_b; /* [experts, out, rank]; NULL if rank is 0 */
  void *out;          /* [tokens, out], written completely; may be `base` itself */
  float scaling;      /* lora_alpha / rank */
  int32_t out_features;
  int32_t rank;       /* 0: this linear has no adapter */
  int32_t format;     /* enum ls_format, the same for all linears of a group */
  const void *scales; /* of a weight of 4 bits, else NULL */
} ls_item;

/* out[t] = weight x[t] + bias + base[t] + scaling * sum_j gates[t,j] lora_b[e] (lora_a[e] x[t]), e = experts[t,j].
 * An id outside [0, num_experts) contributes nothing. Arithmetic is float32; the hidden of rank r is rounded to the dtype. */
typedef struct ls_group {
  ls_item items[LS_MAX_GROUP];
  const void *x;           /* [tokens, in_features] */
  const int64_t *experts;  /* [tokens, top_k] */
  const float *gates;      /* [tokens, top_k] */
  void *hidden;            /* scratch of ls_hidden_elements() elements of the dtype, 16-byte aligned */
  int32_t n_items;
  int32_t tokens;
  int32_t in_features;
  int32_t num_experts;
  int32_t top_k;
  int32_t dtype;      /* enum ls_dtype, of everything but experts and gates */
  int32_t transposed; /* weights are [in, out] (GPT-2's Conv1D) */
  int32_t device;     /* CUDA device index */
  int32_t tuning;     /* 0: choose the kernel; LS_TUNING_* for tests and benchmarks */
  int32_t scale_block; /* weights of 4 bits: features that share a scale, a power of two: CODE: from 64 on, and it divides in_features;
                          INT4: 32 to 256; else 0 */
  const float *code;  /* CODE: the 16 values of an index, rounded to the dtype by the kernel; else NULL. Weights of 4 bits are taken for
                         at most LS_FAST_TOKENS tokens in a 16-bit dtype, INT4 in bfloat16; ranks divisible by 8, INT4: in_features too;
                         x, hidden, weights and lora_b aligned to 16 bytes: else LS_ERROR_ARGUMENT */
} ls_group;

/* One linear of a group, for ls_expand and ls_widen. */
typedef struct ls_expand_item {
  const void *lora_b; /* [experts, out, rank] */
  const void *bias;   /* [out] or NULL */
  const void *base;   /* [tokens, out] or NULL: nothing; what else the linear makes of the tokens */
  void *out;          /* [tokens, out], written completely; ls_widen: [out, experts * rank] */
  int64_t base_stride; /* elements from one row of `base` to the next */
  float scaling;      /* lora_alpha / rank */
  int32_t out_features;
  int32_t rank;
  int32_t reserved;
} ls_expand_item;

/* out[t] = base[t] + bias + scaling * sum_j gates[t,j] lora_b[e] hidden[t,e], e = experts[t,j], for every linear: what the
 * experts add for many tokens, once `hidden` (lora_a x, of all experts) is there. An id outside [0, num_experts) contributes
 * nothing. 16-bit dtypes; ranks, out_features and strides divisible by 8; at most 128 ranks of all experts of a linear; lora_b,
 * bias, base, out and hidden aligned to 16 bytes. Sums are float32; the hidden times its gate is rounded to the dtype.
 *
 * With more ranks that is a product for a library, which takes lora_b of all experts as one matrix: ls_widen writes
 * out[o, e * rank + q] = lora_b[e, o, q]. 16-bit dtypes; ranks divisible by 8; lora_b and out aligned to 16 bytes; bias, base,
 * scaling, hidden, experts, gates, tokens and top_k are not looked at. */
typedef struct ls_expand_args {
  ls_expand_item items[LS_MAX_GROUP];
  const void *hidden;     /* [tokens, the linears' experts * rank side by side] */
  const int64_t *experts; /* [tokens, top_k] */
  const float *gates;     /* [tokens, top_k] */
  int64_t hidden_stride;  /* elements from one row of `hidden` to the next; 0: its columns */
  int32_t n_items;
  int32_t tokens; /* any number */
  int32_t num_experts;
  int32_t top_k;
  int32_t dtype;
  int32_t device;
} ls_expand_args;

/* One adapted linear of a model, for ls_merge. The table lives in device memory. */
typedef struct ls_merge_item {
  void *weight;         /* [out, in] or [in, out], written completely */
  const void *source;   /* the same shape: what the experts are added to; may be `weight` (in place) */
  const void *lora_a;   /* [experts, rank, in] */
  const void *lora_b;   /* [experts, out, rank] */
  int64_t first_tile;   /* index of this linear's first tile in the launch */
  float scaling;
  int32_t out_features;
  int32_t in_features;
  int32_t rank;
  int32_t transposed;
  int32_t reserved;
} ls_merge_item;

/* weight = source + scaling * (sum_j gates[j] B A  -  sum_j old_gates[j] B A) for every linear of the table, one launch. */
typedef struct ls_merge_args {
  const ls_merge_item *items; /* [n_items], device memory */
  const int32_t *tile_item;   /* [n_tiles], device memory: which linear a tile belongs to */
  const int64_t *experts;     /* [top_k] */
  const float *gates;         /* [top_k] */
  const int64_t *old_experts; /* [top_k], taken out again, or NULL */
  const float *old_gates;     /* [top_k] or NULL */
  int64_t n_tiles;
  int32_t n_items;
  int32_t num_experts;
  int32_t top_k;
  int32_t dtype;
  int32_t fast;   /* 1 if ls_merge_is_fast() said so for every item */
  int32_t device;
  int32_t max_rank; /* the largest of the items' ranks */
  int32_t reserved;
} ls_merge_args;

int ls_abi_version(void);
const char *ls_build_info(void);       /* compiler and architectures, a static string in host memory */
const char *ls_error_string(int code); /* a static string in host memory */

/* Devices CUDA can use, into `count` (host memory). 35 (cudaErrorInsufficientDriver) or 100 (cudaErrorNoDevice) on a machine without
 * a usable GPU. */
int ls_device_count(int *count);
/* 0 if this library has code that runs on the device, else the reason. */
int ls_device_supported(int device);
/* CUDA's version that the driver supports, 13000 for 13.0, into `version` (host memory). */
int ls_driver_version(int *version);

/* Softmax of float32 logits over experts, then the top_k of them, ids ascending among equals, gates summing to 1 if
 * normalize. x [tokens, in] of x_dtype, router [num_experts, in] of router_dtype. One launch. Experts are taken, the likeliest first,
 * until their softmax sums to top_p, in (0, 1], or top_k are taken; for each that is not, the id is num_experts, of which no
 * function here reads anything, and the gate 0. With top_p 1 all top_k are. */
int ls_router(const void *x, const void *router, int64_t *experts, float *gates, int32_t tokens, int32_t in_features, int32_t num_experts,
              int32_t top_k, int32_t normalize, float top_p, int32_t x_dtype, int32_t router_dtype, int32_t device, void *stream);

/* The same for the next token of `tokens` sequences, by context: with z the token's own logits,
 *
 *   sums = decay * previous + (z, 1)            previous, sums float32 [tokens, num_experts + 1]
 *
 * or, where `real` [tokens] is 0 (NULL: it is 1 everywhere), sums = previous,
 * and the logits are sums[:num_experts] / sums[num_experts], or z where that is 0. decay is in [0, 1]; `sums` is written
 * completely and may not be `previous`. */
int ls_router_context(const void *x, const void *router, const float *previous, const uint8_t *real, int64_t *experts, float *gates,
                      float *sums, float decay, int32_t tokens, int32_t in_features, int32_t num_experts, int32_t top_k, int32_t normalize,
                      float top_p, int32_t x_dtype, int32_t router_dtype, int32_t device, void *stream);

/* Hands `bytes` of zeroed device memory to the library, 16-byte aligned: counters and words by which the blocks of a launch
 * tell each other that the shrink is done. It must stay allocated for as long as anything is launched. Once per device: a
 * second call is refused. Every stream takes 8 KiB for good, every launch that a stream captures 16 bytes, and 4 more for each
 * element of the hidden (up to 2 tokens), or 8 for each multiprocessor (linear_split_k_sm90.cu). Without it, or when it is used up,
 * ls_linear makes two launches, and linear_split_k_sm90.cu gives way to other kernels. A captured launch may run again (graph
 * replay), but not twice at a time. */
int ls_set_workspace(int32_t device, void *zeroed, int64_t bytes);
/* Bytes of it that no stream and no captured launch has taken yet; -1: none was given. */
int64_t ls_workspace_left(int32_t device);

/* Elements of the group's dtype that ls_linear needs in `hidden`, for these sizes and this number of tokens: fewer tokens may need more
 * (128 ask for 17 MB, where their blocks leave partial sums, 129 for none of it). */
int64_t ls_hidden_elements(const ls_group *group);
/* Which path ls_linear will take: enum ls_path, or -1 if the arguments are refused. */
int ls_linear_path(const ls_group *group);
/* The group's linears with their experts. One launch on the fast path (see ls_set_workspace), else two: the experts' shrink,
 * then everything else, the second starting early in a captured graph where the GPU has programmatic dependent launch (sm_90
 * and up). For many tokens (LS_PATH_SM90: from 33 on; from 3 on where a linear's experts have 512 ranks or more together, from 17 on where the group's weights
 * are large, see takes_split_k() in api.cu; on GPUs of compute capability 9.0, for sizes and pointers as on the fast path and
 * out_features divisible by 8) one launch up to LS_SPLIT_K_TOKENS, then two, as fast as a library's,
 * `hidden` then being a row for each token, and what an expert that the token did not choose made of it zero; it is multiplied by
 * lora_b of all experts, so that NaN in that of an expert which nobody chose shows in the result. `group` is host memory. */
int ls_linear(const ls_group *group, void *stream);

/* 1 if ls_expand takes a group of these sizes, dtype, lora_b and bias, else 0. `args` is host memory, here and below. */
int ls_expand_takes(const ls_expand_args *args);
/* One launch. */
int ls_expand(const ls_expand_args *args, void *stream);
/* The same for ls_widen. */
int ls_widen_takes(const ls_expand_args *args);
int ls_widen(const ls_expand_args *args, void *stream);

int64_t ls_merge_tiles(int32_t rows, int32_t columns); /* of the weight as stored */
int ls_merge_is_fast(const ls_merge_item *item, int32_t dtype); /* `item` is host memory */
int ls_merge(const ls_merge_args *args, void *stream); /* `args` is host memory */

#ifdef __cplusplus
}
#endif
#endif
