/* The headers are C11, and every call in kiln.h can be made from C. header_test.cpp compiles the same lines as C++. */
#include <kiln.h>
#include <kiln_int4pack.h>

#include <stdio.h>
#include <string.h>

#ifdef __cplusplus
#define LANGUAGE "C++"
#else
#define LANGUAGE "C"
#endif

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) {                                                                                                \
      fprintf(stderr, "%s, line %d: %s\n", LANGUAGE, __LINE__, #condition);                                            \
      return 1;                                                                                                        \
    }                                                                                                                  \
  } while (0)

/* One call of each function: this links, and none of them minds a NULL. */
static int every_call_is_there(void) {
  char text[8];
  kiln_stats stats = KILN_STATS_INIT;
  kiln_pack_info pack = KILN_PACK_INFO_INIT;
  kiln_kernel_info kernel = KILN_KERNEL_INFO_INIT;
  kiln_warmup_result warmed = KILN_WARMUP_RESULT_INIT;
  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
  kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
  const kiln_desc* const descs[1] = {&desc.base};
  uint64_t bytes = 7;

  snprintf(text, sizeof text, "%d.%d.%d", KILN_VERSION_MAJOR, KILN_VERSION_MINOR, KILN_VERSION_PATCH);
  CHECK(strcmp(kiln_version(), text) == 0);
  CHECK(strcmp(kiln_status_name(KILN_OK), "ok") == 0);
  CHECK(kiln_last_error() != NULL && kiln_last_error()[0] == '\0');

  CHECK(kiln_engine_create(NULL, NULL) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_last_error()[0] != '\0');
  CHECK(kiln_get(NULL, &desc.base, NULL) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_kernel_get_info(NULL, &kernel) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_pack_create(NULL, &desc.base, NULL, 0, NULL) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_pack_save(NULL, NULL) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_pack_load(NULL, &desc.base, NULL, NULL) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_pack_get_info(NULL, &pack) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_run(NULL, &args.base) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_workspace_bytes(NULL, &args.base, &bytes) == KILN_INVALID_ARGUMENT && bytes == 7);
  CHECK(kiln_prefetch(NULL, descs, 1) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_prefetch_wait(NULL, 0) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_warmup(NULL, descs, 1, NULL, &warmed) == KILN_INVALID_ARGUMENT);
  CHECK(kiln_get_stats(NULL, &stats) == KILN_INVALID_ARGUMENT);
  kiln_cache_path(NULL);
  kiln_kernel_retain(NULL);
  kiln_kernel_release(NULL);
  kiln_pack_retain(NULL);
  kiln_pack_release(NULL);
  kiln_engine_destroy(NULL);
  return 0;
}

/* A struct's size tells its version: it stands first, and the initialisers set it. */
static int structs_begin_with_their_size(void) {
  kiln_engine_options options = KILN_ENGINE_OPTIONS_INIT;
  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
  kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
  kiln_stats stats = KILN_STATS_INIT;
  CHECK(offsetof(kiln_engine_options, size) == 0 && options.size == sizeof options && options.max_code_bytes == 0);
  CHECK(offsetof(kiln_int8_mm_desc, base) == 0 && offsetof(kiln_desc, size) == 0);
  CHECK(desc.base.size == sizeof desc && desc.base.op == KILN_OP_INT8_MM && desc.base.device == KILN_DEVICE_CPU);
  CHECK(desc.b_layout == KILN_B_NK && desc.a_dtype == KILN_S8 && desc.c_dtype == KILN_S32 && desc.reserved == 0);
  CHECK(offsetof(kiln_int8_mm_args, base) == 0 && offsetof(kiln_args, size) == 0);
  CHECK(args.base.size == sizeof args && args.base.op == KILN_OP_INT8_MM && args.b_layout == KILN_B_NK);
  CHECK(args.workspace == NULL && args.workspace_bytes == 0);
  kiln_attention_desc attention = KILN_ATTENTION_DESC_INIT;
  kiln_attention_args call = KILN_ATTENTION_ARGS_INIT;
  CHECK(offsetof(kiln_attention_desc, base) == 0 && offsetof(kiln_attention_args, base) == 0);
  CHECK(attention.base.size == sizeof attention && attention.base.op == KILN_OP_ATTENTION && attention.b == 1);
  CHECK(attention.causal == KILN_CAUSAL_NONE && attention.lse == 0 && attention.reserved == 0);
  CHECK(call.base.size == sizeof call && call.base.op == KILN_OP_ATTENTION && call.scale == 0 && call.o_strides.row == 0);
  CHECK(call.kv_len == NULL && call.workspace == NULL && call.workspace_bytes == 0);
  CHECK(stats.size == sizeof stats && stats.cache_errors == 0);
  return 0;
}

int main(void) { return every_call_is_there() || structs_begin_with_their_size(); }
