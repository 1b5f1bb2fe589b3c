/* The whole C API from C: every call, the growth rule of its structs, and what bad arguments are told. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "api/kiln.h"

static int failures = 0, checks = 0;
#define CHECK(condition) (++checks, (condition) ? (void)0 : (void)(++failures, printf("%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, kiln_last_error())))
#define CHECK_ERROR(call, status, part) \
  do { \
    const kiln_status got = (call); \
    CHECK(got == (status)); \
    CHECK(strstr(kiln_last_error(), (part)) != NULL); \
  } while (0)

enum { M = 5, N = 37, K = 50 };
static int8_t a[M * K], b[N * K];
static int32_t c[M * N], expected[M * N];

static void make_inputs(void) {
  srand(1);
  for (int i = 0; i < M * K; ++i)
    a[i] = (int8_t)(rand() % 256 - 128);
  for (int i = 0; i < N * K; ++i)
    b[i] = (int8_t)(rand() % 256 - 128);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      int32_t sum = 0;
      for (int k = 0; k < K; ++k)
        sum += a[i * K + k] * b[j * K + k];
      expected[i * N + j] = sum;
    }
}

static kiln_int8_mm_desc the_desc(void) {
  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
  desc.m = M;
  desc.n = N;
  desc.k = K;
  return desc;
}

static kiln_int8_mm_args the_args(const kiln_pack* pack) {
  kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
  args.m = M;
  args.a = a;
  args.lda = K;
  args.b_pack = pack;
  args.c = c;
  args.ldc = N;
  return args;
}

static void poison(void) { memset(c, 0x55, sizeof c); }
static int is_right(void) { return memcmp(c, expected, sizeof c) == 0; }
static int is_untouched(void) {
  for (size_t i = 0; i < sizeof c; ++i)
    if (((unsigned char*)c)[i] != 0x55)
      return 0;
  return 1;
}

static int logged = 0;
static void sink(void* context, kiln_log_level level, const char* message) {
  (void)level;
  (void)message;
  ++*(int*)context;
}

static int host_runs = 0;
static void host_parallel_for(void* host, size_t count, void (*task)(void*, size_t), void* context) {
  ++*(int*)host;
  for (size_t i = count; i-- > 0;)
    task(context, i);
}

static void test_run(kiln_engine* engine) {
  kiln_int8_mm_desc desc = the_desc();
  kiln_kernel* kernel = NULL;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  kiln_pack* pack = NULL;
  CHECK(kiln_pack_create(engine, &desc.base, b, K, &pack) == KILN_OK);

  kiln_int8_mm_args args = the_args(pack);
  poison();
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(is_right());

  /* raw B, the caller's workspace */
  args.b_pack = NULL;
  args.b = b;
  args.ldb = K;
  uint64_t bytes = 0;
  CHECK(kiln_workspace_bytes(kernel, &args.base, &bytes) == KILN_OK);
  args.workspace_bytes = bytes;
  args.workspace = aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64 + 64));
  poison();
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(is_right());
  poison();
  args.workspace_bytes = bytes - 1;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "workspace_bytes");
  args.workspace = (char*)args.workspace + 1;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "aligned");
  free((char*)args.workspace - 1);

  /* every bad argument is named, and nothing is written */
  args = the_args(pack);
  args.m = 0;
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  args.m = 9;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "m is 9: allowed is 5 to 8");
  args = the_args(pack);
  args.lda = K - 1;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "lda is 49");
  args = the_args(pack);
  args.ldc = N - 1;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "ldc is 36");
  args = the_args(pack);
  args.a = NULL;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "a is null");
  args = the_args(pack);
  args.c = NULL;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "c is null");
  args = the_args(NULL);
  args.ldb = K;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "b is null");
  args = the_args(pack);
  args.b = b;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "one of the two");
  args = the_args(pack);
  args.b_layout = 7;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "b_layout is 7");
  args = the_args(pack);
  args.base.op = KILN_OP_ATTENTION;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "args.op is 5");
  args = the_args(pack);
  args.base.size = 3;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "args.size is 3");
  args = the_args(pack);
  args.base.threads = -1;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "threads is -1");
  CHECK_ERROR(kiln_run(kernel, NULL), KILN_INVALID_ARGUMENT, "args is null");
  CHECK_ERROR(kiln_run(NULL, &args.base), KILN_INVALID_ARGUMENT, "kernel is null");
  CHECK(is_untouched());

  kiln_int8_mm_desc other = the_desc();
  other.n = N + 1;
  kiln_kernel* other_kernel = NULL;
  CHECK(kiln_get(engine, &other.base, &other_kernel) == KILN_OK);
  args = the_args(pack);
  args.ldc = N + 1;
  CHECK_ERROR(kiln_run(other_kernel, &args.base), KILN_INVALID_ARGUMENT, "a pack of n=37 k=50");
  kiln_kernel_release(other_kernel);

  kiln_int8_mm_desc any = the_desc();
  any.m = KILN_ANY;
  CHECK(kiln_get(engine, &any.base, &other_kernel) == KILN_OK);
  args = the_args(pack);
  args.m = INT64_MAX;
  CHECK_ERROR(kiln_workspace_bytes(other_kernel, &args.base, &bytes), KILN_INVALID_ARGUMENT, "m is 9223372036854775807: allowed is 33 to 2147483647");
  CHECK_ERROR(kiln_run(other_kernel, &args.base), KILN_INVALID_ARGUMENT, "m is 9223372036854775807");
  kiln_kernel_release(other_kernel);

  kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
  CHECK(kiln_kernel_get_info(kernel, &info) == KILN_OK);
  CHECK(strcmp(info.op, "int8_mm") == 0 && info.m_min == 5 && info.m_max == 8);
  CHECK(strstr(info.desc, "n=37") != NULL);
  CHECK(strlen(info.pack_layout) > 0);
  CHECK(kiln_kernel_get_info(kernel, NULL) == KILN_INVALID_ARGUMENT);
  kiln_kernel_retain(kernel);
  kiln_kernel_release(kernel);
  kiln_kernel_release(kernel);
  kiln_pack_release(pack);
}

static void test_descs(kiln_engine* engine) {
  kiln_kernel* kernel = (kiln_kernel*)1;
  kiln_int8_mm_desc desc = the_desc();
  CHECK_ERROR(kiln_get(NULL, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "engine is null");
  CHECK(kernel == NULL);
  CHECK_ERROR(kiln_get(engine, NULL, &kernel), KILN_INVALID_ARGUMENT, "desc is null");
  CHECK_ERROR(kiln_get(engine, &desc.base, NULL), KILN_INVALID_ARGUMENT, "kernel is null");
  desc.base.op = 77;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "unknown op 77");
  desc = the_desc();
  desc.base.device = 9;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "desc.device is 9");
  desc = the_desc();
  desc.base.device_index = 1;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "device_index is 1: allowed is 0 to 0");
  desc = the_desc();
  desc.base.device = KILN_DEVICE_CUDA;
  desc.base.device_index = 255; /* there is no driver, or no such GPU */
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_UNSUPPORTED, "");
  desc = the_desc();
  desc.n = -4;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "n=-4");
  desc = the_desc();
  desc.k = INT64_MAX;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "k=9223372036854775807");
  desc = the_desc();
  desc.a_dtype = KILN_F32;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "a_dtype is 3");
  desc = the_desc();
  desc.c_dtype = 6;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "c_dtype is 6");
  desc = the_desc();
  desc.rounding = 6;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "rounding is 6");
  desc = the_desc();
  desc.bias = KILN_ONE;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "bias is 1");
  desc = the_desc();
  desc.c_dtype = KILN_BF16;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "c_dtype=bf16 rescale=none");
  desc = the_desc();
  desc.b_layout = 3;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "b_layout is 3");
  desc = the_desc();
  desc.base.reserved = 1;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "reserved");
  desc = the_desc();
  desc.base.size = 8;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "size is 8");
  desc.base.size = 1u << 30;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "size is 1073741824");

  /* the struct of a later version: a tail of zeros is taken, anything else refused */
  struct {
    kiln_int8_mm_desc desc;
    int64_t later;
  } grown = {the_desc(), 0};
  grown.desc.base.size = sizeof grown;
  CHECK(kiln_get(engine, &grown.desc.base, &kernel) == KILN_OK);
  kiln_kernel_release(kernel);
  grown.later = 1;
  CHECK_ERROR(kiln_get(engine, &grown.desc.base, &kernel), KILN_INVALID_ARGUMENT, "does not know");
  CHECK(kernel == NULL);
}

/* Small enough to follow by hand: u8 weights, both zero points, bias, a rounded halving, relu, an output zero point, a clamp. */
static void test_epilogue(kiln_engine* engine, const char* directory) {
  const int8_t x[2][2] = {{1, 2}, {3, 4}};
  const uint8_t w[3][2] = {{131, 130}, {130, 131}, {131, 131}}; /* less 130: 1 0, 0 1, 1 1 */
  const int32_t a_zp = 1, b_zp = 130, bias[3] = {10, -20, 5}, mult[3] = {1 << 30, 1 << 30, 1 << 30}, shift[3] = {0, 0, 0};
  /* Σ (x − 1)(w − 130) + bias = {10, −19, 6}, {12, −17, 10}; halved away from zero {5, −10, 3}, {6, −9, 5}; relu, −100, at most −95. */
  const int8_t wanted[2][4] = {{-95, -100, -97, 77}, {-95, -100, -95, 77}};
  int8_t y[2][4];
  char path[512];
  kiln_kernel* kernel = NULL;
  kiln_pack *pack = NULL, *loaded = NULL, *other = NULL;
  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
  kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
  kiln_pack_info info = KILN_PACK_INFO_INIT;
  desc.m = 2;
  desc.n = 3;
  desc.k = 2;
  desc.b_dtype = KILN_U8;
  desc.c_dtype = KILN_S8;
  desc.a_zp = KILN_ONE;
  desc.b_zp = KILN_ONE;
  desc.bias = KILN_EACH;
  desc.rescale = KILN_RESCALE_Q_SCALE;
  desc.rounding = KILN_ROUND_AWAY;
  desc.act = KILN_ACT_RELU;
  desc.c_zp = KILN_ONE;
  desc.clamp = KILN_ONE;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  CHECK(kiln_pack_create(engine, &desc.base, w, 2, &pack) == KILN_OK);
  CHECK(kiln_pack_get_info(pack, &info) == KILN_OK && strstr(info.layout, "/u8") != NULL);
  args.m = 2;
  args.a = x;
  args.lda = 2;
  args.b_pack = pack;
  args.c = y;
  args.ldc = 4;
  args.a_zp = &a_zp;
  args.b_zp = &b_zp;
  args.bias = bias;
  args.mult = mult;
  args.shift = shift;
  args.c_zp = -100;
  args.lo = -128;
  args.hi = -95;
  memset(y, 77, sizeof y);
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(memcmp(y, wanted, sizeof y) == 0);

  /* The same with u8 activations that are 200 more, as their zero point is. */
  const uint8_t more_x[2][2] = {{201, 202}, {203, 204}};
  const int32_t more_a_zp = 201;
  kiln_kernel* of_u8 = NULL;
  desc.a_dtype = KILN_U8;
  CHECK(kiln_get(engine, &desc.base, &of_u8) == KILN_OK);
  desc.a_dtype = KILN_S8;
  args.a = more_x;
  args.a_zp = &more_a_zp;
  memset(y, 77, sizeof y);
  CHECK(kiln_run(of_u8, &args.base) == KILN_OK);
  CHECK(memcmp(y, wanted, sizeof y) == 0);
  kiln_kernel_release(of_u8);
  args.a = x;
  args.a_zp = &a_zp;

  snprintf(path, sizeof path, "%s/u8.pack", directory);
  CHECK(kiln_pack_save(pack, path) == KILN_OK);
  CHECK(kiln_pack_load(engine, &desc.base, path, &loaded) == KILN_OK);
  args.b_pack = loaded;
  memset(y, 77, sizeof y);
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(memcmp(y, wanted, sizeof y) == 0);

  memset(y, 77, sizeof y);
  args.bias = NULL;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "bias is null: allowed is 3 values");
  args.bias = bias;
  args.hi = -129;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "hi is -129: allowed is an integer from -128 to 127");
  args.hi = 127.5;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "hi is 127.5: allowed is an integer from -128 to 127");
  args.lo = -90;
  args.hi = -95;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "lo is -90: allowed is at most hi, -95");
  args.lo = -128;
  const int32_t bad_mult[3] = {1, 0, 1}, bad_shift[3] = {0, 31, -63};
  args.mult = bad_mult;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "mult[1] is 0: allowed is 1 to 2147483647");
  args.mult = mult;
  args.shift = bad_shift;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "shift[2] is -63: allowed is -62 to 31");
  args.shift = NULL;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "shift is null: allowed is 3 values");
  args.shift = shift;
  CHECK(y[0][0] == 77 && y[1][2] == 77);
  desc.b_dtype = KILN_S8;
  CHECK_ERROR(kiln_pack_load(engine, &desc.base, path, &other), KILN_INVALID_ARGUMENT, "/u8");
  kiln_kernel_release(kernel);
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  args.hi = -95;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "b_pack is a pack of u8: allowed is one of s8");
  kiln_kernel_release(kernel);
  kiln_pack_release(loaded);
  kiln_pack_release(pack);
  remove(path);
}

static void test_linear(kiln_engine* engine) {
  kiln_int8_linear_desc desc = KILN_INT8_LINEAR_DESC_INIT;
  desc.m = M;
  desc.n = N;
  desc.k = K;
  desc.x_dtype = KILN_F32;
  desc.y_dtype = KILN_F32;
  desc.bias = 1;
  kiln_kernel* kernel = NULL;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
  CHECK(kiln_kernel_get_info(kernel, &info) == KILN_OK);
  CHECK(strcmp(info.op, "int8_linear") == 0);

  /* a pack of int8_mm's is one of its own where the layouts agree, as on every path but `reference` */
  kiln_pack* pack = NULL;
  kiln_pack* pack_of_mm = NULL;
  const kiln_int8_mm_desc mm = the_desc();
  CHECK(kiln_pack_create(engine, &desc.base, b, K, &pack) == KILN_OK);
  CHECK(kiln_pack_create(engine, &mm.base, b, K, &pack_of_mm) == KILN_OK);
  kiln_pack_info of_pack = KILN_PACK_INFO_INIT, of_mm = KILN_PACK_INFO_INIT;
  CHECK(kiln_pack_get_info(pack, &of_pack) == KILN_OK);
  CHECK(kiln_pack_get_info(pack_of_mm, &of_mm) == KILN_OK);
  CHECK(strcmp(of_pack.layout, info.pack_layout) == 0);

  /* rows whose largest magnitude is 127 are their own q, and s is 1 */
  static float x[M * K], y[M * N], ws[N], bias[N];
  for (int i = 0; i < M * K; ++i)
    x[i] = i % K == 3 ? 127 : a[i] == -128 ? -127 : a[i];
  for (int j = 0; j < N; ++j) {
    ws[j] = (float)(j + 1);
    bias[j] = (float)-j;
  }
  kiln_int8_linear_args args = KILN_INT8_LINEAR_ARGS_INIT;
  args.m = M;
  args.x = x;
  args.ldx = K;
  args.w_pack = pack;
  args.ws = ws;
  args.bias = bias;
  args.y = y;
  args.ldy = N;
  for (int shared = 0; shared < 2; ++shared) {
    if (shared && strcmp(of_mm.layout, of_pack.layout) != 0)
      break;
    args.w_pack = shared ? pack_of_mm : pack;
    memset(y, 0, sizeof y);
    CHECK(kiln_run(kernel, &args.base) == KILN_OK);
    int wrong = 0;
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) {
        int32_t sum = 0;
        for (int k = 0; k < K; ++k)
          sum += (int32_t)x[i * K + k] * b[j * K + k];
        wrong += (double)y[i * N + j] != (double)sum * (j + 1) - j; /* small enough to be exact */
      }
    CHECK(wrong == 0);
  }

  /* the caller's workspace */
  uint64_t bytes = 0;
  CHECK(kiln_workspace_bytes(kernel, &args.base, &bytes) == KILN_OK);
  args.workspace = aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64));
  args.workspace_bytes = bytes;
  y[0] = 0;
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(y[0] != 0);
  free(args.workspace);
  args.workspace = NULL;

  /* what is wrong is named */
  args.bias = NULL;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "int8_linear: bias is null: allowed is 37 floats");
  args.bias = bias;
  args.w_pack = NULL;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "int8_linear: w_pack is null");
  kiln_kernel* none = NULL;
  desc.x_dtype = KILN_S8;
  CHECK_ERROR(kiln_get(engine, &desc.base, &none), KILN_INVALID_ARGUMENT, "x_dtype is 0: allowed is KILN_BF16 (4)");
  desc.x_dtype = KILN_BF16;
  desc.y_dtype = 77;
  CHECK_ERROR(kiln_get(engine, &desc.base, &none), KILN_INVALID_ARGUMENT, "y_dtype is 77");
  desc.y_dtype = KILN_F16;
  desc.bias = 2;
  CHECK_ERROR(kiln_get(engine, &desc.base, &none), KILN_INVALID_ARGUMENT, "bias is 2: allowed is 0 or 1");
  desc.bias = 0;
  desc.w_layout = 9;
  CHECK_ERROR(kiln_get(engine, &desc.base, &none), KILN_INVALID_ARGUMENT, "w_layout is 9");
  desc.w_layout = KILN_B_NK;
  desc.base.device = KILN_DEVICE_CUDA;
  CHECK(kiln_get(engine, &desc.base, &none) != KILN_OK);
  CHECK(none == NULL);
  kiln_kernel_release(kernel);
  kiln_pack_release(pack);
  kiln_pack_release(pack_of_mm);
}

static uint16_t bf16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
static float of_bf16(uint16_t value) {
  const uint32_t bits = (uint32_t)value << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

enum { AB = 2, HQ = 4, HKV = 2, AM = 3, AN = 5, CAPACITY = 9, AD = 24, ADV = 16 };
/* q and o as [b][m][heads][columns], k and v as caches with room for more keys, which hold NaNs */
static uint16_t aq[AB][AM][HQ][AD], ak[AB][HKV][CAPACITY][AD], av[AB][HKV][CAPACITY][ADV], ao[AB][AM][HQ][ADV];
static float alse[AB][HQ][AM];

static kiln_attention_desc attention_desc(void) {
  kiln_attention_desc desc = KILN_ATTENTION_DESC_INIT;
  desc.b = AB;
  desc.hq = HQ;
  desc.hkv = HKV;
  desc.m = AM;
  desc.n = AN;
  desc.d = AD;
  desc.dv = ADV;
  return desc;
}

static kiln_attention_args attention_args(void) {
  kiln_attention_args args = KILN_ATTENTION_ARGS_INIT;
  args.b = AB;
  args.hq = HQ;
  args.hkv = HKV;
  args.m = AM;
  args.n = AN;
  args.q = aq;
  args.q_strides = (kiln_attention_strides){AM * HQ * AD, AD, HQ * AD};
  args.k = ak;
  args.k_strides = (kiln_attention_strides){HKV * CAPACITY * AD, CAPACITY * AD, AD};
  args.v = av;
  args.v_strides = (kiln_attention_strides){HKV * CAPACITY * ADV, CAPACITY * ADV, ADV};
  args.o = ao;
  args.o_strides = (kiln_attention_strides){AM * HQ * ADV, ADV, HQ * ADV};
  return args;
}

/* By definition, in double: whether ao (and alse) are what they should be. */
static int attention_is_right(int causal, const int32_t* kv_len, double scale, int with_lse) {
  int wrong = 0;
  for (int i = 0; i < AB; ++i)
    for (int head = 0; head < HQ; ++head)
      for (int m = 0; m < AM; ++m) {
        const int keys = kv_len != NULL ? kv_len[i] : AN, kv_head = head / (HQ / HKV);
        const int limit = causal == KILN_CAUSAL_NONE ? keys : causal == KILN_CAUSAL_TOP_LEFT ? m + 1 : keys - AM + m + 1;
        const int visible = limit < 0 ? 0 : limit < keys ? limit : keys;
        double sum = 0, o[ADV] = {0}, size = 0, error = 0;
        for (int n = 0; n < visible; ++n) {
          double score = 0;
          for (int d = 0; d < AD; ++d)
            score += (double)of_bf16(aq[i][m][head][d]) * of_bf16(ak[i][kv_head][n][d]);
          const double p = exp(score * scale); /* scores are small here */
          sum += p;
          for (int d = 0; d < ADV; ++d)
            o[d] += p * of_bf16(av[i][kv_head][n][d]);
        }
        for (int d = 0; d < ADV; ++d) {
          const double wanted = visible > 0 ? o[d] / sum : 0, found = of_bf16(ao[i][m][head][d]);
          size += wanted * wanted;
          error += (found - wanted) * (found - wanted);
        }
        wrong += !(sqrt(error) <= 1e-2 * sqrt(size)); /* so few values: twice the bound of the whole */
        if (with_lse)
          wrong += visible > 0 ? !(fabs(alse[i][head][m] - log(sum)) <= 1e-3 * fmax(1, fabs(log(sum)))) : alse[i][head][m] != -INFINITY;
      }
  return wrong == 0;
}

static int attention_is_untouched(void) {
  for (size_t i = 0; i < sizeof ao; ++i)
    if (((const unsigned char*)ao)[i] != 0x55)
      return 0;
  return 1;
}

static void test_attention(kiln_engine* engine) {
  memset(ak, 0xFF, sizeof ak);
  memset(av, 0xFF, sizeof av);
  for (size_t i = 0; i < sizeof aq / sizeof(uint16_t); ++i)
    ((uint16_t*)aq)[i] = bf16_of((float)(rand() % 200 - 100) / 100);
  for (int i = 0; i < AB * HKV; ++i)
    for (int n = 0; n < AN; ++n) {
      for (int d = 0; d < AD; ++d)
        ak[i / HKV][i % HKV][n][d] = bf16_of((float)(rand() % 200 - 100) / 100);
      for (int d = 0; d < ADV; ++d)
        av[i / HKV][i % HKV][n][d] = bf16_of((float)(rand() % 200) / 100);
    }
  const double default_scale = 1 / sqrt((double)AD);
  const int32_t kv_len[AB] = {1, 4};
  kiln_attention_desc desc = attention_desc();
  kiln_attention_args args = attention_args();
  kiln_kernel* kernel = NULL;
  for (int causal = KILN_CAUSAL_NONE; causal <= KILN_CAUSAL_BOTTOM_RIGHT; ++causal)
    for (int with_lse = 0; with_lse < 2; ++with_lse)
      for (int with_kv_len = 0; with_kv_len < 2; ++with_kv_len) {
        desc.causal = causal;
        desc.lse = with_lse;
        CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
        args = attention_args();
        args.kv_len = with_kv_len ? kv_len : NULL;
        args.lse = with_lse ? &alse[0][0][0] : NULL;
        memset(ao, 0x55, sizeof ao);
        CHECK(kiln_run(kernel, &args.base) == KILN_OK);
        CHECK(attention_is_right(causal, args.kv_len, default_scale, with_lse));
        args.scale = 0.75f;
        CHECK(kiln_run(kernel, &args.base) == KILN_OK);
        CHECK(attention_is_right(causal, args.kv_len, 0.75, with_lse));
        kiln_kernel_release(kernel);
      }

  /* one kernel for any b, n and hkv; 1/√d said outright is the same; the caller's workspace */
  static uint16_t first[AB][AM][HQ][ADV];
  desc = attention_desc();
  desc.b = desc.n = KILN_ANY;
  desc.hq = 2 * HQ;
  desc.hkv = 2 * HKV;
  desc.batch_invariant = 1;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
  CHECK(kiln_kernel_get_info(kernel, &info) == KILN_OK);
  CHECK(strcmp(info.op, "attention") == 0 && strcmp(info.pack_layout, "") == 0 && info.m_min == 0 && info.m_max == INT32_MAX);
  args = attention_args();
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  memcpy(first, ao, sizeof ao);
  args.scale = (float)default_scale;
  uint64_t bytes = 0;
  CHECK(kiln_workspace_bytes(kernel, &args.base, &bytes) == KILN_OK);
  args.workspace = aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64 + 64));
  args.workspace_bytes = bytes;
  memset(ao, 0x55, sizeof ao);
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(memcmp(first, ao, sizeof ao) == 0);
  free(args.workspace);

  /* batch_invariant: each query by itself has the same bits */
  for (int m = 0; m < AM; ++m) {
    args = attention_args();
    args.m = 1;
    args.q = &aq[0][m][0][0];
    args.o = &ao[0][m][0][0];
    memset(ao, 0x55, sizeof ao);
    CHECK(kiln_run(kernel, &args.base) == KILN_OK);
    for (int i = 0; i < AB; ++i)
      CHECK(memcmp(first[i][m], ao[i][m], sizeof ao[i][m]) == 0);
  }

  /* nothing to do, and rows that see nothing */
  memset(ao, 0x55, sizeof ao);
  args = attention_args();
  args.m = 0;
  args.q = args.o = NULL;
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(attention_is_untouched());
  args = attention_args();
  args.n = 0;
  args.k = args.v = NULL;
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  for (size_t i = 0; i < sizeof ao; ++i)
    CHECK(((const unsigned char*)ao)[i] == 0);

  /* what is wrong is named, and nothing is written */
  memset(ao, 0x55, sizeof ao);
#define REFUSED(change, part) \
  do { \
    args = attention_args(); \
    change; \
    CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, part); \
  } while (0)
  const int32_t longer[AB] = {0, AN + 1}, negative[AB] = {-1, 0};
  REFUSED(args.q = NULL, "attention: q is null: allowed is a 2 x 4 x 3 x 24 tensor");
  REFUSED(args.k = NULL, "attention: k is null");
  REFUSED(args.v = NULL, "attention: v is null");
  REFUSED(args.o = NULL, "attention: o is null");
  REFUSED(args.hq = 5, "attention: hq is 5: allowed is 4");
  REFUSED(args.n = -1, "attention: n is -1");
  REFUSED(args.scale = -0.5f, "attention: scale is -0.5: allowed is a finite number");
  REFUSED(args.scale = NAN, "attention: scale is nan");
  REFUSED(args.scale = INFINITY, "attention: scale is inf");
  REFUSED(args.kv_len = longer, "attention: kv_len[1] is 6: allowed is 0 to n, 5");
  REFUSED(args.kv_len = negative, "attention: kv_len[0] is -1");
  REFUSED(args.lse = &alse[0][0][0], "attention: lse is given: allowed is null, as lse=0 says");
  REFUSED(args.o = &aq[1][0][0][0], "attention: o is in memory that q spans");
  REFUSED(args.k_strides.row = INT64_MIN, "attention: k's strides is");
  REFUSED(args.o_strides.row = 0, "allowed is strides by which no two rows of o overlap");
  REFUSED(args.reserved = 1, "attention: reserved is 1: allowed is 0");
  REFUSED(args.base.op = KILN_OP_INT8_MM, "args.op is 1: the kernel computes attention");
  REFUSED(args.base.size = 64, "kiln_attention_args.size is 64");
#undef REFUSED
  kiln_kernel_release(kernel);
  desc = attention_desc();
  desc.lse = 1;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  args = attention_args();
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "attention: lse is null: allowed is a 2 x 4 x 3 tensor, which lse=1 asks for");
  kiln_kernel_release(kernel);
  CHECK(attention_is_untouched());

  const struct {
    int64_t hq, d, dv;
    int32_t causal, lse, batch_invariant, reserved;
    const char* part;
  } descs[] = {{3, 24, 16, 0, 0, 0, 0, "hq=3: allowed is a multiple of hkv, 2"},
               {4, 20, 16, 0, 0, 0, 0, "d=20: allowed is a multiple of 8 from 8 to 256"},
               {4, 24, 264, 0, 0, 0, 0, "dv=264: allowed is an integer from 8 to 256"},
               {4, 24, 16, 3, 0, 0, 0, "causal is 3: allowed is KILN_CAUSAL_NONE (0)"},
               {4, 24, 16, 0, 2, 0, 0, "lse is 2: allowed is 0 or 1"},
               {4, 24, 16, 0, 0, 2, 0, "batch_invariant is 2: allowed is 0 or 1"},
               {4, 24, 16, 0, 0, 0, 1, "reserved is 1: allowed is 0"}};
  for (size_t i = 0; i < sizeof descs / sizeof *descs; ++i) {
    desc = attention_desc();
    desc.hq = descs[i].hq;
    desc.d = descs[i].d;
    desc.dv = descs[i].dv;
    desc.causal = descs[i].causal;
    desc.lse = descs[i].lse;
    desc.batch_invariant = descs[i].batch_invariant;
    desc.reserved = descs[i].reserved;
    CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, descs[i].part);
    CHECK(kernel == NULL);
  }
  desc = attention_desc();
  kiln_pack* pack = NULL;
  CHECK_ERROR(kiln_pack_create(engine, &desc.base, ak, AD, &pack), KILN_INVALID_ARGUMENT, "attention: it has no weights to pack");
  CHECK_ERROR(kiln_pack_load(engine, &desc.base, "/nonexistent/x", &pack), KILN_INVALID_ARGUMENT, "attention: it has no weights to pack");
  CHECK(pack == NULL);
}

/* One row of two batches whose blocks of 128 have scales of their own: sums that can be told by hand. */
static void test_fp8(kiln_engine* engine) {
  enum { B = 2, M8 = 3, N8 = 136, K8 = 144, X_STRIDE = 160, Z_STRIDE = 144 };
  static uint8_t x[B * M8 * X_STRIDE], y[B * N8 * K8];
  static float xs[B * M8 * 2], ys[B * 2 * 2], z[B * M8 * Z_STRIDE];
  kiln_fp8_block_bmm_desc desc = KILN_FP8_BLOCK_BMM_DESC_INIT;
  kiln_kernel* kernel = NULL;
  desc.b = B;
  desc.m = M8;
  desc.n = N8;
  desc.k = K8;
  desc.z_dtype = KILN_F32;
  desc.y_dtype = KILN_E5M2;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
  CHECK(kiln_kernel_get_info(kernel, &info) == KILN_OK);
  CHECK(strcmp(info.op, "fp8_block_bmm") == 0);
  CHECK(strcmp(info.isa, "reference") == 0);
  CHECK(strcmp(info.pack_layout, "") == 0);
  CHECK(info.m_min == 0 && info.m_max == 8);

  memset(x, 0x38, sizeof x); /* 1 in e4m3 */
  memset(y, 0x40, sizeof y); /* 2 in e5m2 */
  for (int i = 0; i < B * M8 * 2; ++i)
    xs[i] = (float)(i + 1);
  for (int i = 0; i < B * 2 * 2; ++i)
    ys[i] = (float)(1 << i);
  for (int i = 0; i < B * M8 * Z_STRIDE; ++i)
    z[i] = -1;
  kiln_fp8_block_bmm_args args = KILN_FP8_BLOCK_BMM_ARGS_INIT;
  args.m = M8;
  args.x = x;
  args.ldx = B * X_STRIDE; /* [m][b][k] */
  args.x_stride_b = X_STRIDE;
  args.y = y;
  args.xs = xs; /* [b][⌈k/128⌉][m] */
  args.xs_stride_b = 2 * M8;
  args.xs_stride_k = M8;
  args.xs_stride_m = 1;
  args.ys = ys;
  args.z = z;
  args.ldz = Z_STRIDE;
  args.z_stride_b = M8 * Z_STRIDE;
  uint64_t bytes = 1;
  CHECK(kiln_workspace_bytes(kernel, &args.base, &bytes) == KILN_OK && bytes == 0);
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  int wrong = 0;
  for (int batch = 0; batch < B; ++batch)
    for (int i = 0; i < M8; ++i)
      for (int j = 0; j < Z_STRIDE; ++j) {
        const float* s = xs + batch * 2 * M8 + i;
        const float* t = ys + (batch * 2 + j / 128) * 2;
        const float want = j < N8 ? 256 * s[0] * t[0] + 32 * s[M8] * t[1] : -1;
        wrong += z[(batch * M8 + i) * Z_STRIDE + j] != want;
      }
  CHECK(wrong == 0);
  args.m = 0;
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  args.m = 9;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "fp8_block_bmm: m is 9: allowed is 0 to 8");
  args.m = M8;
  args.ldx = -1;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "fp8_block_bmm: ldx is -1: allowed is 0 to");
  args.ldx = X_STRIDE;
  args.z_stride_b = N8;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "fp8_block_bmm: z_stride_b is 136: allowed is one whose rows do not overlap");
  args.z_stride_b = M8 * Z_STRIDE;
  args.ys = NULL;
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "fp8_block_bmm: ys is null: allowed is [2][2][2] f32");
  kiln_kernel_release(kernel);

  kiln_pack* pack = NULL;
  CHECK_ERROR(kiln_pack_create(engine, &desc.base, y, K8, &pack), KILN_INVALID_ARGUMENT, "takes no packed weights");
  desc.x_dtype = KILN_BF16;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "x_dtype is 4: allowed is KILN_E4M3 (6) or KILN_E5M2 (7)");
  desc.x_dtype = KILN_E4M3;
  desc.z_dtype = KILN_S8;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "z_dtype is 0: allowed is KILN_BF16 (4)");
  desc.z_dtype = KILN_F16;
  desc.batch_invariant = 2;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "batch_invariant is 2: allowed is 0 or 1");
  desc.batch_invariant = 1;
  desc.k = 24;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "k=24: allowed is a multiple of 16");
  desc.k = K8;
  desc.n = 12;
  CHECK_ERROR(kiln_get(engine, &desc.base, &kernel), KILN_INVALID_ARGUMENT, "n=12: allowed is a multiple of 8");
}

static void test_packs(kiln_engine* engine, const char* directory) {
  kiln_int8_mm_desc desc = the_desc();
  kiln_pack *pack = NULL, *loaded = NULL;
  char path[512];
  snprintf(path, sizeof path, "%s/weights.pack", directory);
  CHECK(kiln_pack_create(engine, &desc.base, b, K, &pack) == KILN_OK);
  CHECK(kiln_pack_save(pack, path) == KILN_OK);
  CHECK(kiln_pack_load(engine, &desc.base, path, &loaded) == KILN_OK);
  kiln_pack_info info = KILN_PACK_INFO_INIT;
  CHECK(kiln_pack_get_info(loaded, &info) == KILN_OK);
  CHECK(info.n == N && info.k == K && info.bytes >= N * K && strcmp(info.op, "int8_mm") == 0);
  kiln_kernel* kernel = NULL;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  kiln_int8_mm_args args = the_args(loaded);
  poison();
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(is_right());
  kiln_pack_retain(loaded);
  kiln_pack_release(loaded);
  kiln_pack_release(loaded);

  desc.k = K + 1;
  CHECK_ERROR(kiln_pack_load(engine, &desc.base, path, &loaded), KILN_INVALID_ARGUMENT, "n=37 k=51");
  desc = the_desc();
  CHECK_ERROR(kiln_pack_create(engine, &desc.base, b, K - 1, &loaded), KILN_INVALID_ARGUMENT, "ldb is 49");
  CHECK_ERROR(kiln_pack_create(engine, &desc.base, NULL, K, &loaded), KILN_INVALID_ARGUMENT, "b is null");
  CHECK_ERROR(kiln_pack_save(NULL, path), KILN_INVALID_ARGUMENT, "pack is null");
  CHECK_ERROR(kiln_pack_save(pack, "/nonexistent/x"), KILN_NOT_FOUND, "/nonexistent/x");
  CHECK_ERROR(kiln_pack_load(engine, &desc.base, "/nonexistent/x", &loaded), KILN_NOT_FOUND, "/nonexistent/x");
  FILE* file = fopen(path, "r+b");
  fseek(file, 200, SEEK_SET);
  const int byte = fgetc(file);
  fseek(file, 200, SEEK_SET);
  fputc(byte ^ 1, file);
  fclose(file);
  CHECK_ERROR(kiln_pack_load(engine, &desc.base, path, &loaded), KILN_INTEGRITY, "checksum");
  CHECK(truncate(path, 20) == 0);
  CHECK_ERROR(kiln_pack_load(engine, &desc.base, path, &loaded), KILN_INTEGRITY, "header");
  CHECK(loaded == NULL);
  kiln_kernel_release(kernel);
  kiln_pack_release(pack);
}

/* The packs of one path are refused by the kernels of another that reads a different layout. */
static void test_pack_of_another_layout(const kiln_engine_options* options) {
  kiln_engine *by_llvm = NULL, *by_reference = NULL;
  setenv("KILN_FORCE", "portable", 1);
  CHECK(kiln_engine_create(options, &by_llvm) == KILN_OK);
  setenv("KILN_FORCE", "reference", 1);
  CHECK(kiln_engine_create(options, &by_reference) == KILN_OK);
  unsetenv("KILN_FORCE");
  kiln_int8_mm_desc desc = the_desc();
  kiln_pack* pack = NULL;
  kiln_kernel* kernel = NULL;
  CHECK(kiln_pack_create(by_llvm, &desc.base, b, K, &pack) == KILN_OK);
  CHECK(kiln_get(by_reference, &desc.base, &kernel) == KILN_OK);
  kiln_int8_mm_args args = the_args(pack);
  poison();
  CHECK_ERROR(kiln_run(kernel, &args.base), KILN_INVALID_ARGUMENT, "a pack of layout n16k");
  CHECK(is_untouched());
  kiln_kernel_release(kernel);
  kiln_pack_release(pack);
  kiln_engine_destroy(by_llvm);
  kiln_engine_destroy(by_reference);
}

static void test_ahead_of_time(kiln_engine* engine) {
  kiln_int8_mm_desc one = the_desc(), two = the_desc();
  one.m = 1;
  two.n = 64;
  const kiln_desc* list[] = {&one.base, &two.base};
  /* a result that cannot be filled is refused before any work */
  kiln_stats before = KILN_STATS_INIT, after = KILN_STATS_INIT;
  CHECK(kiln_get_stats(engine, &before) == KILN_OK);
  kiln_warmup_result no_result = {0, 0, 0, 0};
  kiln_tune_result no_tune_result = {(size_t)1 << 20, 0, 0, 0};
  CHECK_ERROR(kiln_warmup(engine, list, 2, NULL, &no_result), KILN_INVALID_ARGUMENT, "result.size is 0: set it with its _INIT macro");
  CHECK_ERROR(kiln_tune(engine, list, 2, &no_tune_result), KILN_INVALID_ARGUMENT, "result.size is 1048576: set it with its _INIT macro");
  CHECK(kiln_get_stats(engine, &after) == KILN_OK);
  CHECK(after.compiled == before.compiled && after.cache_puts == before.cache_puts);
  kiln_warmup_result result = KILN_WARMUP_RESULT_INIT;
  CHECK(kiln_warmup(engine, list, 2, NULL, &result) == KILN_OK);
  CHECK(result.compiled + result.hit == 2 && result.failed == 0);
  CHECK(kiln_warmup(engine, list, 2, NULL, &result) == KILN_OK);
  CHECK(result.hit == 2);
  CHECK(kiln_prefetch(engine, list, 2) == KILN_OK);
  CHECK(kiln_prefetch_wait(engine, 20000) == KILN_OK);
  CHECK_ERROR(kiln_prefetch_wait(engine, -1), KILN_INVALID_ARGUMENT, "timeout_ms is -1");
  CHECK_ERROR(kiln_warmup(engine, list, 2, "vax", &result), KILN_INVALID_ARGUMENT, "vax");
  CHECK_ERROR(kiln_warmup(engine, NULL, 2, NULL, &result), KILN_INVALID_ARGUMENT, "descs is null");
  kiln_tune_result tuned = KILN_TUNE_RESULT_INIT;
  CHECK(kiln_tune(engine, list, 2, &tuned) == KILN_OK); /* CPU kernels have one configuration */
  CHECK(tuned.tuned == 0 && tuned.without == 2 && tuned.failed == 0);
  CHECK_ERROR(kiln_tune(NULL, list, 2, &tuned), KILN_INVALID_ARGUMENT, "engine is null");
  CHECK_ERROR(kiln_tune(engine, NULL, 2, &tuned), KILN_INVALID_ARGUMENT, "descs is null");
  two.n = -1;
  CHECK_ERROR(kiln_tune(engine, list, 2, &tuned), KILN_INVALID_ARGUMENT, "descs[1]");
  CHECK_ERROR(kiln_prefetch(engine, list, 2), KILN_INVALID_ARGUMENT, "descs[1]");
  kiln_stats stats = KILN_STATS_INIT;
  CHECK(kiln_get_stats(engine, &stats) == KILN_OK);
  CHECK(stats.compiled >= 2 && stats.cache_rows >= 2 && stats.kernels >= 1);
  CHECK(strstr(kiln_cache_path(engine), "kernels.db") != NULL);
}

static void* get_many(void* engine) {
  for (int i = 0; i < 200; ++i) {
    kiln_int8_mm_desc desc = the_desc();
    desc.n = 1 + i % 5;
    kiln_kernel* kernel = NULL;
    if (kiln_get(engine, &desc.base, &kernel) != KILN_OK)
      return "failed";
    kiln_kernel_release(kernel);
  }
  return NULL;
}

static void test_threads(kiln_engine* engine) {
  pthread_t threads[8];
  for (int i = 0; i < 8; ++i)
    pthread_create(&threads[i], NULL, get_many, engine);
  for (int i = 0; i < 8; ++i) {
    void* failed = NULL;
    pthread_join(threads[i], &failed);
    CHECK(failed == NULL);
  }
}

/* A call large enough to be shared goes through the host's own parallel_for. */
static void test_host_threads(kiln_engine* engine) {
  enum { BIG = 1500 };
  int8_t* big_a = calloc(64, BIG);
  int8_t* big_b = calloc(BIG, BIG);
  int32_t* big_c = malloc(64 * BIG * sizeof *big_c);
  big_a[3] = 2;
  big_b[5 * BIG + 3] = 7;
  kiln_int8_mm_desc desc = the_desc();
  desc.m = 64;
  desc.n = desc.k = BIG;
  kiln_kernel* kernel = NULL;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
  args.m = 64;
  args.a = big_a;
  args.b = big_b;
  args.c = big_c;
  args.lda = args.ldb = args.ldc = BIG;
  const int before = host_runs;
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(host_runs == before + 1);
  CHECK(big_c[5] == 14 && big_c[4] == 0 && big_c[63 * BIG + BIG - 1] == 0);
  args.base.threads = 1;
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(host_runs == before + 1);
  kiln_kernel_release(kernel);
  free(big_a);
  free(big_b);
  free(big_c);
}

int main(void) {
  char directory[] = "/tmp/kiln-c-api-test-XXXXXX", cache[600], keys[600];
  if (mkdtemp(directory) == NULL)
    return 2;
  snprintf(cache, sizeof cache, "%s/cache", directory);
  snprintf(keys, sizeof keys, "%s/data", directory);
  unsetenv("HOME"); /* the options' cache directory is place enough */
  setenv("XDG_DATA_HOME", keys, 1);
  make_inputs();

  CHECK(strcmp(kiln_version(), "0.1.0") == 0);
  CHECK(strcmp(kiln_status_name(KILN_INTEGRITY), "integrity") == 0);
  CHECK(strcmp(kiln_status_name((kiln_status)99), "unknown") == 0);
  CHECK(strcmp(kiln_status_name((kiln_status)256), "unknown") == 0);
  CHECK_ERROR(kiln_engine_create(NULL, NULL), KILN_INVALID_ARGUMENT, "engine is null");

  kiln_engine* engine = NULL;
  kiln_engine_options options = KILN_ENGINE_OPTIONS_INIT;
  options.cache_dir = "relative";
  CHECK_ERROR(kiln_engine_create(&options, &engine), KILN_INVALID_ARGUMENT, "cache_dir is 'relative'");
  options.cache_dir = cache;
  options.cache_mode = "sometimes";
  CHECK_ERROR(kiln_engine_create(&options, &engine), KILN_INVALID_ARGUMENT, "cache_mode is 'sometimes'");
  options.cache_mode = "rw";
  options.threads = -2;
  CHECK_ERROR(kiln_engine_create(&options, &engine), KILN_INVALID_ARGUMENT, "threads is -2");
  options.threads = 2;
  options.log_sink = sink;
  options.log_context = &logged;
  options.parallel_for = host_parallel_for;
  options.parallel_context = &host_runs;
  setenv("KILN_FORCE", "nonsense", 1);
  CHECK_ERROR(kiln_engine_create(&options, &engine), KILN_INVALID_ARGUMENT, "KILN_FORCE");
  unsetenv("KILN_FORCE");
  setenv("KILN_DISABLE", "nonsense", 1);
  CHECK(kiln_engine_create(&options, &engine) == KILN_OK);
  CHECK(logged == 1); /* the unknown name, said to the host's sink */
  unsetenv("KILN_DISABLE");

  test_run(engine);
  test_descs(engine);
  test_linear(engine);
  test_attention(engine);
  test_fp8(engine);
  test_packs(engine, directory);
  test_epilogue(engine, directory);
  test_pack_of_another_layout(&options);
  test_ahead_of_time(engine);
  test_threads(engine);
  test_host_threads(engine);

  /* kernels and packs outlive their engine */
  kiln_int8_mm_desc desc = the_desc();
  kiln_kernel* kernel = NULL;
  kiln_pack* pack = NULL;
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  CHECK(kiln_pack_create(engine, &desc.base, b, K, &pack) == KILN_OK);
  kiln_engine_destroy(engine);
  kiln_int8_mm_args args = the_args(pack);
  poison();
  CHECK(kiln_run(kernel, &args.base) == KILN_OK);
  CHECK(is_right());
  kiln_kernel_release(kernel);
  kiln_pack_release(pack);
  kiln_engine_destroy(NULL);
  kiln_kernel_release(NULL);
  kiln_pack_release(NULL);

  /* a second engine in the same process finds the kernels on disk */
  CHECK(kiln_engine_create(&options, &engine) == KILN_OK);
  CHECK(kiln_get(engine, &desc.base, &kernel) == KILN_OK);
  kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
  CHECK(kiln_kernel_get_info(kernel, &info) == KILN_OK);
  CHECK(info.source == KILN_FROM_DISK);
  kiln_kernel_release(kernel);
  kiln_engine_destroy(engine);

  char command[700];
  snprintf(command, sizeof command, "rm -rf %s", directory);
  CHECK(system(command) == 0);
  printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}
