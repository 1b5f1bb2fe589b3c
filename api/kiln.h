/* Kiln: run-time compiled kernels for inference engines, kept in a persistent cache.
 *
 * This header is the manual of the library. It is C11 and C++.
 *
 *   kiln_engine* engine;
 *   kiln_engine_create(NULL, &engine);
 *   kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
 *   desc.m = 1; desc.n = 4096; desc.k = 4096;
 *   kiln_pack* weights;
 *   kiln_pack_create(engine, &desc.base, b, 4096, &weights);
 *   kiln_kernel* kernel;
 *   kiln_get(engine, &desc.base, &kernel);
 *   kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
 *   args.m = 1; args.a = a; args.lda = 4096; args.b_pack = weights; args.c = c; args.ldc = 4096;
 *   kiln_run(kernel, &args.base);
 *
 * Rules that hold for every call
 * - Handles are opaque. Whoever receives a handle through an out parameter owns one reference and gives it up with the release or
 *   destroy call named there. Releasing NULL does nothing.
 * - A call that fails returns a status other than KILN_OK, leaves its out parameters NULL (or untouched when they are not pointers),
 *   writes no output tensor (but see kiln_run), and stores a message for kiln_last_error() on the calling thread.
 * - Every function may be called from any thread at any time, except that a handle must not be used during or after its last release.
 * - No call throws, aborts, installs signal handlers, or changes the floating-point state.
 * - A child made by fork may use every handle it inherited, whatever the parent's threads were doing: it has the kernels, and connections,
 *   files and threads of its own. The fork waits for threads inside the cache or a compiler, at most a second. Nothing is inherited
 *   through exec. The library may be unloaded (dlclose) once every handle has been given up; several copies of it may live in one
 *   process and share a cache.
 * - Structs that a caller fills begin with their size and, where they belong to an op, the op. They may grow at the end in later versions:
 *   a smaller struct is taken with its missing tail as zero, a larger one only when its unknown tail is zero
 *   (else KILN_INVALID_ARGUMENT). Initialise them with the _INIT macros.
 * - Strides are in elements; the innermost stride is 1.
 */
#ifndef KILN_H
#define KILN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define KILN_API __declspec(dllexport)
#else
#define KILN_API __attribute__((visibility("default")))
#endif

#define KILN_VERSION_MAJOR 0
#define KILN_VERSION_MINOR 1
#define KILN_VERSION_PATCH 0

/* ---------------------------------------------------------------- status */

typedef enum kiln_status {
  KILN_OK = 0,
  KILN_INVALID_ARGUMENT = 1, /* never allowed; the message names the argument, its value and what is allowed */
  KILN_UNSUPPORTED = 2,      /* valid, but nothing on this machine, or under the present toggles, can do it */
  KILN_NOT_FOUND = 3,
  KILN_OUT_OF_MEMORY = 4,
  KILN_IO = 5,
  KILN_INTEGRITY = 6, /* bytes that fail authentication or are not what they claim to be */
  KILN_COMPILE_FAILED = 7,
  KILN_BUSY = 8,
  KILN_MISS = 9, /* KILN_MISS=error and the kernel is in no cache */
  KILN_INTERNAL = 10
} kiln_status;

/* The lower-case name of a status: "ok", "invalid_argument", … Static. */
KILN_API const char* kiln_status_name(kiln_status status);

/* The message of the last failed call on this thread; "" when none has failed. Valid until the next failing call on this thread. */
KILN_API const char* kiln_last_error(void);

/* "0.1.0". Static. */
KILN_API const char* kiln_version(void);

/* ---------------------------------------------------------------- engine */

typedef struct kiln_engine kiln_engine;

/* Runs task(task_context, i) once for every i in [0, count), on any threads, and returns when all are done. `host` is
 * options.parallel_context. Kiln calls it from the thread that calls kiln_run, never while holding a lock. */
typedef void (*kiln_parallel_for)(void* host, size_t count, void (*task)(void* task_context, size_t index), void* task_context);

typedef enum kiln_log_level { KILN_LOG_TRACE, KILN_LOG_DEBUG, KILN_LOG_INFO, KILN_LOG_WARN, KILN_LOG_ERROR, KILN_LOG_OFF } kiln_log_level;
/* `message` is valid during the call only, has no newline. One call at a time, from any thread; must not call into the engine. */
typedef void (*kiln_log_sink)(void* context, kiln_log_level level, const char* message);

/* What a host may set itself. A NULL or 0 field leaves the value to the environment (see `kiln info`) and its default. */
typedef struct kiln_engine_options {
  size_t size;
  const char* cache_dir; /* absolute; over KILN_CACHE_DIR. Not used on a network file system: kiln_cache_path tells */
  const char* cache_mode; /* "rw", "ro" or "off"; over KILN_CACHE */
  int32_t threads; /* upper bound; the smaller of it and KILN_THREADS holds */
  int32_t reserved; /* 0 */
  kiln_parallel_for parallel_for; /* NULL: a pool of Kiln's own, started by the first parallel run */
  void* parallel_context;
  kiln_log_sink log_sink; /* NULL: stderr */
  void* log_context;
  uint64_t max_code_bytes; /* bound on loaded code in memory, default 64 MiB; kernels that are held stay beyond it */
} kiln_engine_options;
#define KILN_ENGINE_OPTIONS_INIT {sizeof(kiln_engine_options), 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* Reads the environment once. Touches neither disk nor threads until they are needed. `options` may be NULL.
 * Errors: a malformed environment variable or option (KILN_INVALID_ARGUMENT). */
KILN_API kiln_status kiln_engine_create(const kiln_engine_options* options, kiln_engine** engine);

/* Waits for a background compile in progress. Kernels and packs that are still held stay valid and can still run; they then still call
 * options.parallel_for. */
KILN_API void kiln_engine_destroy(kiln_engine* engine);

/* ---------------------------------------------------------------- descs: what to compute */

typedef enum kiln_op {
  KILN_OP_INT8_MM = 1,
  KILN_OP_INT8_LINEAR = 2,
  KILN_OP_INT4_MM = 3,
  KILN_OP_FP8_BLOCK_BMM = 4,
  KILN_OP_ATTENTION = 5
} kiln_op;

typedef enum kiln_device { KILN_DEVICE_CPU = 0, KILN_DEVICE_CUDA = 1 } kiln_device;

/* The head of every desc. */
typedef struct kiln_desc {
  size_t size; /* of the whole struct */
  int32_t op;  /* kiln_op */
  int32_t device; /* kiln_device */
  int32_t device_index;
  int32_t reserved; /* 0 */
} kiln_desc;

typedef enum kiln_dtype { KILN_S8 = 0, KILN_U8 = 1, KILN_S32 = 2, KILN_F32 = 3, KILN_BF16 = 4, KILN_F16 = 5, KILN_E4M3 = 6, KILN_E5M2 = 7 } kiln_dtype;
typedef enum kiln_b_layout {
  KILN_B_KN = 0, /* B is [K][N] */
  KILN_B_NK = 1  /* B is [N][K], as linear layers keep their weights */
} kiln_b_layout;

#define KILN_ANY (-1)

/* NVIDIA GPUs: a desc with base.device = KILN_DEVICE_CUDA and base.device_index = i, the GPU that CUDA counts as i.
 * - The driver (libcuda.so.1, CUDA 11.3 or later) is opened by the first call with such a desc; a host without one gets KILN_UNSUPPORTED there
 *   and runs everything else. No CUDA toolkit is needed. A child made by fork from a process that has used CUDA cannot (CUDA's rule):
 *   KILN_UNSUPPORTED.
 * - Kernels run in the context of args.stream; without a stream, or on a default one, in the caller's current context if it is of that GPU,
 *   else in the GPU's primary context, which the CUDA runtime and its users share. Any number of GPUs and contexts in one process.
 * - Tensors, packs and workspaces are device memory that the context can use: pointers to anything else are refused by name. kiln_run puts the
 *   work on args.stream and returns; it never waits. Its arguments may be reused at once, the memory when the stream has got there.
 * - A stream that is being captured into a CUDA graph: kernels that are loaded in its context are captured as any launch. Loading would end the
 *   capture, so there a kernel that is not loaded is KILN_BUSY and nothing is done: kiln_get and one kiln_run before the capture
 *   avoid that. kiln_get cannot see the stream: see kiln_get_for_stream.
 * - Loaded GPU code is never unloaded, as a stream or graph may still use it: a process keeps as many modules as it has used kernels, some tens
 *   of KiB each. */

typedef enum kiln_rescale {
  KILN_RESCALE_NONE = 0,
  KILN_RESCALE_SCALE = 1,       /* f32(acc) · scale */
  KILN_RESCALE_Q_SCALE = 2,     /* acc · mult / 2^(31 + shift) */
  KILN_RESCALE_SHIFT_RIGHT = 3, /* acc / 2^shift */
  KILN_RESCALE_SHIFT_LEFT = 4   /* acc · 2^shift */
} kiln_rescale;
typedef enum kiln_rescale_per { KILN_PER_TENSOR = 0, KILN_PER_CHANNEL = 1 } kiln_rescale_per;
/* Where a value lies half way between two integers. */
typedef enum kiln_rounding {
  KILN_ROUND_ZERO = 0,
  KILN_ROUND_AWAY = 1, /* from zero */
  KILN_ROUND_MINUS_INF = 2,
  KILN_ROUND_PLUS_INF = 3,
  KILN_ROUND_EVEN = 4,
  KILN_ROUND_ODD = 5
} kiln_rounding;
typedef enum kiln_act { KILN_ACT_NONE = 0, KILN_ACT_RELU = 1, KILN_ACT_LEAKY_RELU = 2 } kiln_act;
/* How often a value of the epilogue is given. */
typedef enum kiln_values {
  KILN_ABSENT = 0, /* the stage is left out */
  KILN_ONE = 1,
  KILN_EACH = 2 /* one for each row (a_zp) or column */
} kiln_values;

/* int8_mm: C[M,N] = A[M,K] · B[K,N]; A and B s8 or u8, exact s32 sums that wrap. Any sizes from 0 to 2^31 − 1. On its way to C a sum goes
 * through the stages that the desc names, in this order; a desc as its _INIT macro leaves it has none, and C is s32.
 * 1. a_zp, b_zp: acc = Σ_k (A[m,k] − a_zp) · (B[k,n] − b_zp), wrapping.
 * 2. bias: acc += bias[n], wrapping.
 * 3. rescale, of one or n values. The integer ones are exact: the product in 64 bits, division to nearest with ties by `rounding`, the low 32
 *    bits of the result (a divisor below 1 multiplies). KILN_RESCALE_SCALE: y = f32(acc) · scale, each rounded to nearest even.
 * 4. act: relu; or leaky_relu: negative values · slope_mult / 2^(31 + slope_shift) as with KILN_RESCALE_Q_SCALE, with KILN_RESCALE_SCALE · slope.
 * 5. c_zp is added in 64 bits, after y has been rounded once to s32, half to even, saturating (NaN, from an infinite y · slope 0, is 0).
 * 6. clamp to [lo, hi], else to what c_dtype holds. C is S8, U8 or S32, after KILN_RESCALE_SCALE also F32, BF16 or F16, rounded to nearest
 *    even, which have no c_zp.
 * The same bits on every ISA path. The stages, types and rounding are the desc's, and compiled into the kernel; the values are the call's
 * (kiln_int8_mm_args), so layers of one shape share a kernel.
 * m: the rows of the calls to come. One kernel serves a class of m (1; 2; 3–4; 5–8; 9–16; 17–32; 33 and more; on GPUs 16 and less; 17–32; 33–64;
 * 65 and more), so a host whose m changes asks anew for each and compiles at most seven kernels per (n, k). KILN_ANY stands for the last class.
 * GPUs: s8, and of the stages only KILN_RESCALE_SCALE with c_dtype KILN_BF16 or KILN_S8. */
typedef struct kiln_int8_mm_desc {
  kiln_desc base;
  int64_t m, n, k;
  int32_t b_layout; /* kiln_b_layout, of the B that is packed or passed raw */
  int32_t a_dtype;  /* KILN_S8, KILN_U8 */
  int32_t c_dtype;  /* KILN_S32, KILN_S8, KILN_U8; with KILN_RESCALE_SCALE also KILN_F32, KILN_BF16, KILN_F16 */
  int32_t reserved; /* 0 */
  int32_t rescale;     /* kiln_rescale */
  int32_t rescale_per; /* kiln_rescale_per: one value, or one for each of n */
  int32_t b_dtype;  /* KILN_S8, KILN_U8: of the B that is packed or passed raw */
  int32_t a_zp;     /* kiln_values: KILN_EACH for each row */
  int32_t b_zp;     /* kiln_values: KILN_EACH for each of n */
  int32_t bias;     /* KILN_ABSENT, KILN_EACH */
  int32_t rounding; /* kiln_rounding, of integer rescales and of leaky_relu after one or none */
  int32_t act;      /* kiln_act */
  int32_t c_zp;     /* KILN_ABSENT, KILN_ONE */
  int32_t clamp;    /* KILN_ABSENT, KILN_ONE: lo and hi */
} kiln_int8_mm_desc;
#define KILN_INT8_MM_DESC_INIT \
  {{sizeof(kiln_int8_mm_desc), KILN_OP_INT8_MM, KILN_DEVICE_CPU, 0, 0}, 0, 0, 0, KILN_B_NK, KILN_S8, KILN_S32, 0, KILN_RESCALE_NONE, KILN_PER_CHANNEL, \
   KILN_S8, KILN_ABSENT, KILN_ABSENT, KILN_ABSENT, KILN_ROUND_ZERO, KILN_ACT_NONE, KILN_ABSENT, KILN_ABSENT}

/* int8_linear: Y[M,N] = dequant(quant(X[M,K]) · W[K,N]) + bias: a linear layer with s8 weights and activations that are quantised row by row
 * as they come. In f32, for each row of X: a = max|x|, s = a / 127, r = 127 / a, q = x · r rounded half to even; where a is 0 or r is not finite,
 * s and q are 0. Then y = fma(f32(Σ q·w), s · ws[n], bias[n]), with +0 for an absent bias, rounded to Y's type to nearest even. Every operation is
 * rounded to nearest even without flushing denormals, whatever the caller's floating-point state: the same bits on every path. A row with a NaN or an
 * infinity is NaN whole, and no other row changes; a NaN is 0x7FC00000 (f32), 0x7FC0 (bf16), 0x7E00 (f16).
 * Any sizes from 0 to 2^31 − 1; m and its classes as in int8_mm. Packs are those of int8_mm: one made for either op serves the other where both tell the
 * same kiln_kernel_info.pack_layout. CPUs only. */
typedef struct kiln_int8_linear_desc {
  kiln_desc base;
  int64_t m, n, k;
  int32_t x_dtype;  /* KILN_BF16, KILN_F16 or KILN_F32 */
  int32_t y_dtype;  /* likewise */
  int32_t bias;     /* 0 or 1: whether there is one */
  int32_t w_layout; /* kiln_b_layout, of the W that is packed */
} kiln_int8_linear_desc;
#define KILN_INT8_LINEAR_DESC_INIT \
  {{sizeof(kiln_int8_linear_desc), KILN_OP_INT8_LINEAR, KILN_DEVICE_CPU, 0, 0}, 0, 0, 0, KILN_BF16, KILN_BF16, 0, KILN_B_NK}

/* int4_mm: Y[M,N] = X[M,K] · W; X and Y bf16, sums f32. A weight is w = (q − 8)·scale + zero with q from 0 to 15, and one bf16 scale and zero
 * for each n and `group` elements of K. n is a multiple of 8, k of the group.
 * Weights come in one of two forms of n·k/2 bytes: uint8 [n][k/2] with the even k in the high nibble (inner_k_tiles = 0), or the tensor-core
 * layout int32 [n/8][k/(T·16)][32][T/2] of aten::_weight_int4pack_mm, T = inner_k_tiles, k a multiple of 16·T. Scales and zeros are
 * [k/group][n][2]. All are packed once (kiln_int4_mm_pack_create); one pack serves every m.
 * m as in int8_mm, with the classes 1; 2–8; 9–16; 17–32; 33–64; 65–128; 129 and more.
 * batch_invariant: a row's bits do not depend on m (one kernel for all m). Results are equal from run to run in any case.
 * Within 4e-3 of the exact product (norm of the difference over the norm). CPUs have the reference only. */
typedef struct kiln_int4_mm_desc {
  kiln_desc base;
  int64_t m, n, k;
  int32_t group;           /* 32, 64, 128 or 256 */
  int32_t inner_k_tiles;   /* 0, 2, 4 or 8: the form of the weights that are packed */
  int32_t batch_invariant; /* 0 or 1 */
  int32_t reserved;        /* 0 */
} kiln_int4_mm_desc;
#define KILN_INT4_MM_DESC_INIT {{sizeof(kiln_int4_mm_desc), KILN_OP_INT4_MM, KILN_DEVICE_CPU, 0, 0}, 0, 0, 0, 128, 0, 0, 0}

/* fp8_block_bmm: Z[b] = Σ_j (X[b,:,j] · Y[b,:,j]ᵀ) · xs[b,m,j] · ys[b,⌊n/128⌋,j], a batched product of 8-bit floats (OCP E4M3 and E5M2) scaled in blocks: j counts
 * blocks of 128 of K, the last one as short as it comes; xs has a scale for each row of X and block, ys one for 128 rows of Y and block. Each block's sum of products
 * is promoted to f32 before it is scaled. n is a multiple of 8, k of 16; b from 0 to 65535. Y is [b][n][k] and ys [b][⌈n/128⌉][⌈k/128⌉], both contiguous; X, xs and Z
 * have strides (kiln_fp8_block_bmm_args). Nothing is packed.
 * m: the rows of the calls to come. One kernel serves a class of m (up to 8; 16; 32; 64; 128; 256; 512; more), so that a host compiles at most eight per (b, n, k).
 * KILN_ANY stands for the last class. batch_invariant: a row's bits do not depend on m (one kernel for all m). Results are equal from run to run in any case.
 * A NaN makes its outputs NaN and no others; beyond F16's range they are infinite. Within 4e-3 of the exact product (norm of the difference over the norm), plus
 * 2^-12 · |X| · |Y| for the tensor cores' own sums. GPUs of compute capability 9.0 (sm_90a) only; CPUs have the reference only. */
typedef struct kiln_fp8_block_bmm_desc {
  kiln_desc base;
  int64_t b, m, n, k;
  int32_t x_dtype;         /* KILN_E4M3 or KILN_E5M2 */
  int32_t y_dtype;         /* likewise */
  int32_t z_dtype;         /* KILN_BF16, KILN_F16 or KILN_F32 */
  int32_t batch_invariant; /* 0 or 1 */
} kiln_fp8_block_bmm_desc;
#define KILN_FP8_BLOCK_BMM_DESC_INIT \
  {{sizeof(kiln_fp8_block_bmm_desc), KILN_OP_FP8_BLOCK_BMM, KILN_DEVICE_CPU, 0, 0}, 1, 0, 0, 0, KILN_E4M3, KILN_E4M3, KILN_BF16, 0}

/* Which keys a query sees, both counted from 0. */
typedef enum kiln_causal {
  KILN_CAUSAL_NONE = 0,        /* all */
  KILN_CAUSAL_TOP_LEFT = 1,    /* key j when j ≤ query i: prefill of a new sequence */
  KILN_CAUSAL_BOTTOM_RIGHT = 2 /* j ≤ i + n − m: the queries are the last of n tokens. With kv_len its value stands for n */
} kiln_causal;

/* attention: O[B,Hq,M,Dv] = softmax(scale · Q[B,Hq,M,D] · K[B,Hkv,N,D]ᵀ, visible keys only) · V[B,Hkv,N,Dv]; all four bf16. Query head h reads the
 * key and value head h·Hkv/Hq: grouped queries (GQA) for Hkv < Hq, one head for all (MQA) for Hkv = 1. The softmax is the online one (Milakov, Gimelshein:
 * Online normalizer calculation for softmax, 2018) over tiles of K and V, in the order of FlashAttention-2 (Dao, 2023): nothing of size M·N is kept.
 * Scores, maxima, sums and the products with V are f32; scale multiplies the f32 scores, never Q; P is rounded to bf16 where the machine multiplies
 * bf16, and O once at the end.
 * - d and dv: multiples of 8 from 8 to 256; they may differ (192 and 128 in latent attention). hq is a multiple of hkv. Any m and n from 0 to 2^31 − 1.
 * - A query that sees no key (n = 0, kv_len 0, or above the first key of KILN_CAUSAL_BOTTOM_RIGHT with m > n) has the row 0 and the lse −inf.
 * - lse = 1: the natural logarithm of Σ exp(scale · q·k) over the visible keys is returned too, within 1e-3 · max(1, |lse|).
 * - Keys and values that no query of the call may see are never read, whatever bits are there (a cache's unused capacity, tokens beyond kv_len).
 * - Within 6e-3 of the exact result (norm of the difference over the norm). The same bits from run to run and for any number of threads;
 *   batch_invariant = 1: a query's bits do not depend on m either, for one kernel for all m, which is slower with few of them.
 * d, dv, hq/hkv, causal, lse and the class of m are the kernel's; b, hkv, n, m within its class, strides, kv_len and scale are the call's: a model has one
 * kernel for each class. b, m and n may be KILN_ANY. There are at most four classes of m: 1; as many as make m·hq/hkv at most 12; at most 63; and all that is
 * more, for which KILN_ANY stands. CPUs only. */
typedef struct kiln_attention_desc {
  kiln_desc base;
  int64_t b, hq, hkv, m, n, d, dv;
  int32_t causal;          /* kiln_causal */
  int32_t lse;             /* 0 or 1: whether there is one */
  int32_t batch_invariant; /* 0 or 1 */
  int32_t reserved;        /* 0 */
} kiln_attention_desc;
#define KILN_ATTENTION_DESC_INIT \
  {{sizeof(kiln_attention_desc), KILN_OP_ATTENTION, KILN_DEVICE_CPU, 0, 0}, 1, 0, 0, 0, 0, 0, 0, KILN_CAUSAL_NONE, 0, 0, 0}

/* ---------------------------------------------------------------- kernels */

typedef struct kiln_kernel kiln_kernel;

/* The kernel for a desc: from memory (no lock), from disk, from KILN_REMOTE, or compiled now. Release with kiln_kernel_release.
 * One thread compiles a kernel, the others wait for it. Under KILN_MISS=fallback a kernel that would have to be compiled is compiled in the
 * background, and the caller gets a slow one (KILN_BUILTIN) that reads the same packs: get again for the compiled one.
 * Errors: KILN_INVALID_ARGUMENT, KILN_UNSUPPORTED (KILN_FORCE or KILN_DISABLE leave nothing that can do it), KILN_COMPILE_FAILED, KILN_MISS, KILN_OUT_OF_MEMORY. */
KILN_API kiln_status kiln_get(kiln_engine* engine, const kiln_desc* desc, kiln_kernel** kernel);

/* Like kiln_get, for a desc of a GPU and a caller that may be capturing `stream` (a CUstream or cudaStream_t): while it is, a kernel that is
 * not loaded is KILN_BUSY, and nothing is loaded or compiled, so that the capture goes on. kiln_get itself notices only captures by streams
 * that synchronise with the default stream; it loads in a way that leaves captures of other threads alone. */
KILN_API kiln_status kiln_get_for_stream(kiln_engine* engine, const kiln_desc* desc, void* stream, kiln_kernel** kernel);

KILN_API void kiln_kernel_retain(kiln_kernel* kernel);
KILN_API void kiln_kernel_release(kiln_kernel* kernel);

typedef enum kiln_source { KILN_FROM_MEMORY = 0, KILN_FROM_DISK = 1, KILN_COMPILED = 2, KILN_BUILTIN = 3, KILN_FROM_REMOTE = 4 } kiln_source;

/* Strings live as long as the kernel is held. */
typedef struct kiln_kernel_info {
  size_t size;
  const char* op;          /* "int8_mm" */
  const char* desc;        /* canonical text */
  const char* isa;         /* ISA path: "avx512vnni", "mma_sync", … */
  const char* backend;     /* "x86", "nvidia", "portable", "reference", … */
  const char* generator;   /* "asmjit", "llvm", "ptx", "none" */
  const char* features;    /* CPU features that the code uses, comma list */
  const char* key;         /* 64 hex digits; "" for "reference" */
  const char* pack_layout; /* id of the packed weights it reads, "" for an op without */
  int32_t source;          /* kiln_source: where it came from when it was loaded */
  uint32_t vector_registers, general_registers; /* that the code touches */
  uint32_t reserved;
  uint64_t code_bytes;
  int64_t m_min, m_max; /* the m it serves */
  int64_t compile_us;   /* by the process that compiled it */
  int64_t load_us;
  const char* configuration; /* of a kernel that can be made in several, as `kiln explain` shows it; else "" */
  const char* tuned_for;     /* the name of the GPU whose timing chose it (kiln_tune); "" for the heuristic's choice */
} kiln_kernel_info;
#define KILN_KERNEL_INFO_INIT {sizeof(kiln_kernel_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
KILN_API kiln_status kiln_kernel_get_info(const kiln_kernel* kernel, kiln_kernel_info* info);

/* ---------------------------------------------------------------- packed weights */

/* Weights rearranged once for this machine, in host memory or in that of the GPU that the desc names. One pack serves every m of its (n, k):
 * decode and prefill share it. Immutable; independent of the engine that made it. A pack in GPU memory belongs to the context that was used
 * to make it; releasing it frees the memory, which waits for the GPU. */
typedef struct kiln_pack kiln_pack;

/* Packs B of an int8_mm desc, or W of an int8_linear desc (its m is ignored, as what X and Y are). `b` is host memory, for a pack on a GPU too, and read during the call only; ldb ≥ n (KILN_B_KN)
 * or ≥ k (KILN_B_NK). */
KILN_API kiln_status kiln_pack_create(kiln_engine* engine, const kiln_desc* desc, const void* b, int64_t ldb, kiln_pack** pack);

/* The weights of an int4_mm. */
typedef struct kiln_int4_mm_weights {
  size_t size;
  const void* w;  /* in the form that the desc names */
  const void* sz; /* bf16 [k/group][n][2]: scale, zero */
  int32_t device; /* kiln_device: where both lie, host memory or the GPU of the desc */
  int32_t reserved; /* 0 */
  void* stream;   /* CUstream whose work so far comes before they are read; for weights on a GPU */
} kiln_int4_mm_weights;
#define KILN_INT4_MM_WEIGHTS_INIT {sizeof(kiln_int4_mm_weights), 0, 0, KILN_DEVICE_CPU, 0, 0}
/* Packs the weights of an int4_mm desc (its m and batch_invariant are ignored). They are read during the call, which returns when the pack is
 * there; those on a GPU are copied to the host and back. Errors: KILN_INVALID_ARGUMENT, KILN_OUT_OF_MEMORY, KILN_UNSUPPORTED. */
KILN_API kiln_status kiln_int4_mm_pack_create(kiln_engine* engine, const kiln_int4_mm_desc* desc, const kiln_int4_mm_weights* weights, kiln_pack** pack);

/* Between the two forms of int4 weights (see kiln_int4_mm_desc), both n·k/2 bytes of host memory of any alignment, which must not overlap.
 * n is a multiple of 8, k of 16·inner_k_tiles, inner_k_tiles 2, 4 or 8. */
KILN_API kiln_status kiln_int4_to_tensor_core(const void* plain, int64_t n, int64_t k, int32_t inner_k_tiles, void* packed);
KILN_API kiln_status kiln_int4_from_tensor_core(const void* packed, int64_t n, int64_t k, int32_t inner_k_tiles, void* plain);

/* Writes the pack to a new file and renames it to `path`. The file names op, layout, sizes and carries a checksum.
 * Errors: KILN_NOT_FOUND (no such directory), KILN_IO. */
KILN_API kiln_status kiln_pack_save(const kiln_pack* pack, const char* path);
/* Loads what kiln_pack_save wrote, on a machine and under toggles whose kernels read this layout (else KILN_INVALID_ARGUMENT that names both).
 * Errors: KILN_NOT_FOUND, KILN_IO, KILN_INTEGRITY. */
KILN_API kiln_status kiln_pack_load(kiln_engine* engine, const kiln_desc* desc, const char* path, kiln_pack** pack);
KILN_API void kiln_pack_retain(kiln_pack* pack);
KILN_API void kiln_pack_release(kiln_pack* pack);

typedef struct kiln_pack_info {
  size_t size;
  const char* op;     /* lives as long as the pack is held */
  const char* layout; /* "n16k4", "plain/g128" */
  int64_t n, k;
  uint64_t bytes;
} kiln_pack_info;
#define KILN_PACK_INFO_INIT {sizeof(kiln_pack_info), 0, 0, 0, 0, 0}
KILN_API kiln_status kiln_pack_get_info(const kiln_pack* pack, kiln_pack_info* info);

/* ---------------------------------------------------------------- run */

/* The head of every args struct. */
typedef struct kiln_args {
  size_t size;
  int32_t op; /* kiln_op of the kernel */
  int32_t threads; /* upper bound for this call; 0: the engine's */
} kiln_args;

/* C[m,n] = A[m,k] · B with the n and k of the kernel. Buffers are read and written within m, n, k exactly and must not overlap.
 * Give b_pack, or b with ldb and b_layout: a raw B is packed piece by piece in workspace on each call. */
typedef struct kiln_int8_mm_args {
  kiln_args base;
  int64_t m; /* rows of this call, one of those that the kernel serves; m = 0 does nothing */
  const void* a; /* of a_dtype */
  int64_t lda; /* ≥ k */
  const kiln_pack* b_pack;
  const void* b; /* of b_dtype */
  int64_t ldb;
  int32_t b_layout; /* of b */
  int32_t reserved; /* 0 */
  void* c; /* of c_dtype */
  int64_t ldc; /* ≥ n */
  void* workspace; /* NULL: a per-thread arena of Kiln's, on a GPU a buffer for each stream. Else 64-byte (GPU: 256-byte) aligned, for this call alone */
  uint64_t workspace_bytes; /* ≥ what kiln_workspace_bytes tells for the same args */
  const float* scale; /* [n] or one, with KILN_RESCALE_SCALE; finite */
  void* stream; /* CUstream of a GPU kernel; NULL is CUDA's default stream */
  /* Values of the epilogue, each read only when the desc has its stage, and then checked: a value out of its range is KILN_INVALID_ARGUMENT. */
  const int32_t* a_zp;  /* [m] or one */
  const int32_t* b_zp;  /* [n] or one */
  const int32_t* bias;  /* [n] */
  const int32_t* mult;  /* [n] or one: 1 to 2^31 − 1 */
  const int32_t* shift; /* [n] or one: −62 to 31 with KILN_RESCALE_Q_SCALE, 0 to 62 with _SHIFT_RIGHT, 0 to 31 with _SHIFT_LEFT */
  int32_t slope_mult, slope_shift; /* as mult and shift of KILN_RESCALE_Q_SCALE */
  float slope; /* of leaky_relu with KILN_RESCALE_SCALE; finite */
  int32_t c_zp;
  double lo, hi; /* lo ≤ hi; integers within c_dtype; floats within it, or infinities */
} kiln_int8_mm_args;
#define KILN_INT8_MM_ARGS_INIT \
  {{sizeof(kiln_int8_mm_args), KILN_OP_INT8_MM, 0}, 0, 0, 0, 0, 0, 0, KILN_B_NK, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
/* On a GPU a and a raw b are 16-byte aligned, lda and ldb multiples of 16, and a raw b is KILN_B_NK. */

/* Y[m,n] = dequant(quant(X[m,k]) · W) + bias. Buffers are read and written within m, n, k exactly and must not overlap; each is aligned to its
 * elements. Nothing is allocated but the arena, which grows to what the largest call needs. */
typedef struct kiln_int8_linear_args {
  kiln_args base;
  int64_t m; /* rows of this call, one of those that the kernel serves; m = 0 does nothing */
  const void* x; /* of x_dtype */
  int64_t ldx; /* ≥ k */
  const kiln_pack* w_pack;
  const float* ws; /* [n] */
  const float* bias; /* [n] with a desc of bias = 1, else NULL */
  void* y; /* of y_dtype */
  int64_t ldy; /* ≥ n */
  void* workspace; /* NULL: a per-thread arena of Kiln's. Else 64-byte aligned, for this call alone */
  uint64_t workspace_bytes; /* ≥ what kiln_workspace_bytes tells for the same args */
} kiln_int8_linear_args;
#define KILN_INT8_LINEAR_ARGS_INIT {{sizeof(kiln_int8_linear_args), KILN_OP_INT8_LINEAR, 0}, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* Y[m,n] = X[m,k] · W. Buffers are read and written within m, n, k exactly and must not overlap. On a GPU x and y are 16-byte aligned, ldx and
 * ldy multiples of 8. */
typedef struct kiln_int4_mm_args {
  kiln_args base;
  int64_t m; /* rows of this call, one of those that the kernel serves; m = 0 does nothing */
  const void* x; /* bf16 */
  int64_t ldx; /* ≥ k */
  const kiln_pack* w_pack;
  void* y; /* bf16 */
  int64_t ldy; /* ≥ n */
  void* stream; /* CUstream of a GPU kernel; NULL is CUDA's default stream */
  void* workspace; /* GPU. NULL: a buffer of Kiln's for each stream (in a captured graph, memory of the graph's). Else 256-byte aligned device memory, for this call alone until the stream has passed it */
  uint64_t workspace_bytes; /* ≥ what kiln_workspace_bytes tells for the same args */
} kiln_int4_mm_args;
#define KILN_INT4_MM_ARGS_INIT {{sizeof(kiln_int4_mm_args), KILN_OP_INT4_MM, 0}, 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* Z[b,m,n] = X[b,m,k] · Y[b,n,k]ᵀ, scaled. Buffers are read and written within b, m, n, k exactly and must not overlap. Strides of b mean nothing while the desc's b is 1.
 * On a GPU x, y and z are 16-byte aligned, x_stride_b and ldx multiples of 16, z_stride_b and ldz of 8 (F32: 4); xs and ys are aligned to their elements everywhere. */
typedef struct kiln_fp8_block_bmm_args {
  kiln_args base;
  int64_t m; /* rows of this call, one of those that the kernel serves; m = 0 does nothing */
  const void* x; /* of x_dtype */
  int64_t x_stride_b, ldx; /* ≥ 0, in either order: [m][b][k] has x_stride_b = k and ldx = b·k; 0 repeats a row or a batch, less than k overlaps */
  const void* y; /* of y_dtype, contiguous */
  const float* xs;
  int64_t xs_stride_b, xs_stride_m, xs_stride_k; /* ≥ 0; 0 repeats one scale. Read as they lie: no transposed copy is needed */
  const float* ys; /* contiguous */
  void* z; /* of z_dtype */
  int64_t z_stride_b, ldz; /* ≥ n, in either order, without overlap */
  void* stream; /* CUstream of a GPU kernel; NULL is CUDA's default stream */
} kiln_fp8_block_bmm_args;
#define KILN_FP8_BLOCK_BMM_ARGS_INIT \
  {{sizeof(kiln_fp8_block_bmm_args), KILN_OP_FP8_BLOCK_BMM, 0}, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

/* In elements: from a batch, head or row of a tensor [b][heads][rows][columns] to the next; the columns of a row follow one another. Any number, in any order:
 * [b][rows][heads][columns] has a row stride of heads·columns and a head stride of columns; a cache with room for more than n keys has the head stride of its
 * capacity; keys and values may lie in one tensor. Of q, k and v, 0 reads the same again, less than the columns of a row overlaps; below 0 goes back from the
 * pointer, which is to the first element in the order above. One whose extent is 1 means nothing. A tensor spans at most 2^60 elements. */
typedef struct kiln_attention_strides {
  int64_t batch, head, row;
} kiln_attention_strides;

/* One call: o and, with a desc of lse = 1, lse. The output's memory, from its first element to its last, holds nothing of any other tensor of the call, and
 * no two rows of o overlap: else KILN_INVALID_ARGUMENT. Each pointer is aligned to its elements; NULL is for tensors without elements. Everything is
 * the caller's, read or written during the call only. */
typedef struct kiln_attention_args {
  kiln_args base;
  int64_t b;       /* batches */
  int64_t hq, hkv; /* in the kernel's ratio */
  int64_t m;       /* queries, of those that the kernel serves; m = 0 does nothing */
  int64_t n;       /* keys; with kv_len the greatest that it may hold */
  const void* q;   /* bf16 [b][hq][m][d] */
  kiln_attention_strides q_strides;
  const void* k;   /* bf16 [b][hkv][n][d] */
  kiln_attention_strides k_strides;
  const void* v;   /* bf16 [b][hkv][n][dv] */
  kiln_attention_strides v_strides;
  void* o;         /* bf16 [b][hq][m][dv] */
  kiln_attention_strides o_strides;
  float* lse;            /* [b][hq][m], contiguous, with a desc of lse = 1, else NULL */
  const int32_t* kv_len; /* NULL: n keys. Else [b], 0 to n: keys from there on are invisible */
  float scale;           /* 0: 1/√d. Else finite and above 0 */
  int32_t reserved;      /* 0 */
  void* workspace;       /* NULL: a per-thread arena of Kiln's. Else 64-byte aligned, for this call alone */
  uint64_t workspace_bytes; /* ≥ what kiln_workspace_bytes tells for the same args */
} kiln_attention_args;
#define KILN_ATTENTION_ARGS_INIT \
  {{sizeof(kiln_attention_args), KILN_OP_ATTENTION, 0}, 0, 0, 0, 0, 0, 0, {0, 0, 0}, 0, {0, 0, 0}, 0, {0, 0, 0}, 0, {0, 0, 0}, 0, 0, 0, 0, 0, 0}

/* Runs; returns when the output is complete (a GPU kernel: when it is on the stream). No lock, lookup or allocation (the first call of a thread may grow its arena,
 * the first fp8_block_bmm on a GPU makes a table of what its copy engine wants to know of tensors).
 * KILN_OUT_OF_MEMORY, when a thread's arena cannot grow, may leave part of the output written; with a workspace it does not occur. */
KILN_API kiln_status kiln_run(const kiln_kernel* kernel, const kiln_args* args);

/* How much workspace kiln_run would use for these args (pointers are not read). */
KILN_API kiln_status kiln_workspace_bytes(const kiln_kernel* kernel, const kiln_args* args, uint64_t* bytes);

/* ---------------------------------------------------------------- ahead of time */

/* Gets the kernels of these descs on one background thread, in order; returns at once. Failures are logged. Under KILN_MISS=error kernels
 * come from disk only. */
KILN_API kiln_status kiln_prefetch(kiln_engine* engine, const kiln_desc* const* descs, size_t count);
/* Waits until the prefetch list is empty, at most timeout_ms; KILN_BUSY when it is not. */
KILN_API kiln_status kiln_prefetch_wait(kiln_engine* engine, int64_t timeout_ms);

typedef struct kiln_warmup_result {
  size_t size;
  uint64_t hit, compiled, failed;
} kiln_warmup_result;
#define KILN_WARMUP_RESULT_INIT {sizeof(kiln_warmup_result), 0, 0, 0}
/* Makes sure that the cache on disk holds the kernels of these descs for `target` (NULL: this machine; else what `kiln info --target`
 * prints or a name it lists), without loading them. Goes on after a failure; then returns the first failure's status and message. */
KILN_API kiln_status kiln_warmup(kiln_engine* engine, const kiln_desc* const* descs, size_t count, const char* target, kiln_warmup_result* result);

typedef struct kiln_tune_result {
  size_t size;
  uint64_t tuned;   /* kernels whose fastest configuration is now in the cache */
  uint64_t without; /* descs whose kernel has but one configuration: nothing is done with them */
  uint64_t failed;
} kiln_tune_result;
#define KILN_TUNE_RESULT_INIT {sizeof(kiln_tune_result), 0, 0, 0}
/* GPU kernels that can be made in several configurations (tiles, stages, how K is split) are made in the one that a heuristic picks, without timing. This call times
 * the likely ones on the GPU that each desc names, at its m (KILN_ANY: 4096 rows), with the L2 cache flushed, and keeps the fastest kernel in the cache on disk, for
 * this GPU's name: every engine made later gets it there as any other, without timing; kernels that are in memory stay. Takes some tenths of a second for each
 * configuration, most of it in the driver's compiler, and leaves their code loaded; wants the GPU for itself. A tuned kernel's results are as equal from run to
 * run as any other's, and with batch_invariant as independent of m, but may differ in their last bits from those of another configuration.
 * Of several descs with one kernel the one with the largest m decides.
 * Goes on after a failure; then returns the first failure's status and message. Needs a cache that may be written (else KILN_UNSUPPORTED). */
KILN_API kiln_status kiln_tune(kiln_engine* engine, const kiln_desc* const* descs, size_t count, kiln_tune_result* result);

/* ---------------------------------------------------------------- statistics */

typedef struct kiln_stats {
  size_t size;
  uint64_t memory_hits, disk_hits, compiled, failed, fallbacks;
  uint64_t kernels, code_bytes, evictions; /* loaded now; thrown out of memory so far */
  uint64_t compile_us;                     /* sum */
  uint64_t cache_rows, cache_bytes;        /* on disk; 0 when the cache is off */
  uint64_t cache_refused, cache_errors;    /* rows that were not used; errors passed over */
  uint64_t system_hits, system_refused;    /* of KILN_CACHE_SYSTEM_DIR: those of disk_hits; kernels that failed authentication */
  uint64_t cache_misses;                   /* looked for on disk and found in no tier */
  uint64_t cache_puts, cache_evictions;    /* kernels stored on disk; evicted from there for want of room */
  uint64_t cache_busy;                     /* calls that went without the cache because other processes held its lock */
  /* The parts of cache_refused: changed or of another key; of another key file; no code that this version understands; for a machine with
   * other features; too large. */
  uint64_t cache_refused_mac, cache_refused_key_file, cache_refused_code, cache_refused_features, cache_refused_size;
  uint64_t remote_hits, remote_refused, remote_errors; /* of KILN_REMOTE: kernels loaded; rows not trusted; calls that failed */
} kiln_stats;
#define KILN_STATS_INIT {sizeof(kiln_stats), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
/* Counts since the engine was created, of this process. `kiln cache stats` has those of all processes that used the cache. */
KILN_API kiln_status kiln_get_stats(kiln_engine* engine, kiln_stats* stats);

/* The path of the cache database, "" when the cache is off. Lives as long as the engine. */
KILN_API const char* kiln_cache_path(kiln_engine* engine);

#ifdef __cplusplus
}
#endif
#endif
