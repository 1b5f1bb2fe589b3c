/* The linear layers of Qwen3-1.7B with 8-bit weights, run through Kiln as an inference engine would: a prefill of 64
 * tokens, then decode steps of one. Activations are bf16; each call quantises them, multiplies and gives bf16 again
 * (int8_linear). What stands between the layers (norms, attention) is left out, and weights and activations are random.
 * Every layer has weights of its own, so that a step reads all of them once and each call finds its weights in memory,
 * not in a CPU cache.
 *
 * The shapes are those of bench/models/qwen3-1.7b.json; `kiln warmup --model` on that file fills the cache for this
 * program. */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include <kiln.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
  HIDDEN = 2048,
  INTERMEDIATE = 6144,
  HEAD_DIM = 128,
  QUERY = 16 * HEAD_DIM,
  KEY_VALUE = 8 * HEAD_DIM,
  LAYERS = 28,
  VOCABULARY = 151936,
  PREFILL_TOKENS = 64
};

typedef struct linear {
  const char* name;
  int64_t n, k; /* outputs, inputs */
} linear;

enum { K_PROJ = 1, LM_HEAD = 7, KINDS = 8 };
static const linear kinds[KINDS] = {
    {"q_proj", QUERY, HIDDEN},           {"k_proj", KEY_VALUE, HIDDEN},       {"v_proj", KEY_VALUE, HIDDEN},
    {"o_proj", HIDDEN, QUERY},           {"gate_proj", INTERMEDIATE, HIDDEN}, {"up_proj", INTERMEDIATE, HIDDEN},
    {"down_proj", HIDDEN, INTERMEDIATE}, {"lm_head", VOCABULARY, HIDDEN},
};

typedef struct options {
  long layers;
  int once;                      /* each phase, for a quick look */
  double gops_limit, gbps_limit; /* of this machine; 0: not known */
} options;

typedef struct model {
  kiln_engine* engine;
  long layers;
  kiln_pack** packs;     /* layers · LM_HEAD, layer by layer, then the lm_head */
  float* scales;         /* of the weights: one for each output, the same for every layer */
  uint16_t* activations; /* bf16 */
  uint16_t* outputs;     /* bf16; large enough for every call */
} model;

/* What one kind of layer did in one phase. */
typedef struct measured {
  int64_t tokens;
  char isa[24];
  const char* source; /* of the first kiln_get */
  double first_get_us;
  double* run_us; /* one a call */
  size_t calls;
} measured;

static int ok(kiln_status status, const char* call) {
  if (status != KILN_OK)
    fprintf(stderr, "qwen3_host: %s: %s: %s\n", call, kiln_status_name(status), kiln_last_error());
  return status == KILN_OK;
}

static int allocated(const void* memory, const char* what) {
  if (memory == NULL)
    fprintf(stderr, "qwen3_host: no memory for %s; --layers takes fewer layers\n", what);
  return memory != NULL;
}

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return 1e6 * (double)t.tv_sec + 1e-3 * (double)t.tv_nsec;
}

/* Every value of s8 alike (splitmix64); the same seed gives the same bytes. */
static void fill_random(int8_t* out, size_t count, uint64_t seed) {
  for (size_t i = 0; i < count; i += sizeof seed) {
    uint64_t x = seed += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    memcpy(out + i, &x, count - i < sizeof x ? count - i : sizeof x);
  }
}

static float from_bf16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

/* To nearest even; not for NaN. */
static uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* Of the linear layer with this index in model.packs. */
static int kind_of(const model* m, long index) {
  return index < m->layers * LM_HEAD ? (int)(index % LM_HEAD) : LM_HEAD;
}

static kiln_int8_linear_desc desc_of(int kind, int64_t tokens) {
  kiln_int8_linear_desc desc = KILN_INT8_LINEAR_DESC_INIT;
  desc.m = tokens;
  desc.n = kinds[kind].n;
  desc.k = kinds[kind].k;
  return desc;
}

static void model_destroy(model* m) {
  if (m->packs != NULL)
    for (long i = 0; i <= m->layers * LM_HEAD; ++i)
      kiln_pack_release(m->packs[i]);
  free(m->packs);
  free(m->scales);
  free(m->activations);
  free(m->outputs);
  kiln_engine_destroy(m->engine);
}

/* On failure the model holds what was made so far: destroy it either way. */
static int model_create(model* m, long layers) {
  *m = (model){.layers = layers};
  const double start = now_us();
  if (!ok(kiln_engine_create(NULL, &m->engine), "kiln_engine_create"))
    return 0;
  const double created = now_us();

  m->packs = calloc((size_t)(layers * LM_HEAD + 1), sizeof *m->packs);
  m->scales = malloc((size_t)VOCABULARY * sizeof *m->scales);
  m->activations = malloc((size_t)PREFILL_TOKENS * INTERMEDIATE * sizeof *m->activations);
  m->outputs =
      malloc((size_t)PREFILL_TOKENS * INTERMEDIATE * sizeof *m->outputs); /* one row of the lm_head is smaller */
  int8_t* weights = malloc((size_t)VOCABULARY * HIDDEN);
  int done = allocated(m->packs, "packs") && allocated(m->scales, "scales") &&
             allocated(m->activations, "activations") && allocated(m->outputs, "outputs") &&
             allocated(weights, "weights");
  if (done) {
    int8_t* random = weights;
    fill_random(random, (size_t)PREFILL_TOKENS * INTERMEDIATE, 1);
    for (size_t i = 0; i < (size_t)PREFILL_TOKENS * INTERMEDIATE; ++i)
      m->activations[i] = to_bf16((float)random[i] / 50);
    for (size_t i = 0; i < VOCABULARY; ++i)
      m->scales[i] = (float)(1 + i % 100) / 10000;
  }

  uint64_t bytes = 0;
  for (long i = 0; done && i <= layers * LM_HEAD; ++i) {
    const kiln_int8_linear_desc desc = desc_of(kind_of(m, i), KILN_ANY);
    kiln_pack_info info = KILN_PACK_INFO_INIT;
    fill_random(weights, (size_t)(desc.n * desc.k), (uint64_t)i << 32);
    done = ok(kiln_pack_create(m->engine, &desc.base, weights, desc.k, &m->packs[i]), "kiln_pack_create") &&
           ok(kiln_pack_get_info(m->packs[i], &info), "kiln_pack_get_info");
    bytes += info.bytes;
  }
  free(weights);
  if (done)
    printf("Qwen3-1.7B, linear layers: %ld layers and lm_head, %.2f GB of random weights packed in %.1f s; engine "
           "created in %.0f us\n",
           layers, 1e-9 * (double)bytes, 1e-6 * (now_us() - created), created - start);
  return done;
}

/* `before`: the statistics before the kiln_get that gave the kernel. */
static int describe_first_get(const model* m, const kiln_kernel* kernel, const kiln_stats* before, measured* result) {
  kiln_stats after = KILN_STATS_INIT;
  kiln_kernel_info info = KILN_KERNEL_INFO_INIT;
  if (!ok(kiln_get_stats(m->engine, &after), "kiln_get_stats") ||
      !ok(kiln_kernel_get_info(kernel, &info), "kiln_kernel_get_info"))
    return 0;
  result->source = after.memory_hits > before->memory_hits ? "memory"
                   : after.disk_hits > before->disk_hits   ? "disk"
                   : after.compiled > before->compiled     ? "compiled"
                                                           : "built in";
  snprintf(result->isa, sizeof result->isa, "%s", info.isa);
  return 1;
}

/* One call of one layer: the kernel is asked for each time, as a host does whose number of tokens changes. */
static int run_layer(const model* m, long index, int64_t tokens, measured* result) {
  const int first = result->calls == 0;
  kiln_stats before = KILN_STATS_INIT;
  if (first && !ok(kiln_get_stats(m->engine, &before), "kiln_get_stats"))
    return 0;

  const kiln_int8_linear_desc desc = desc_of(kind_of(m, index), tokens);
  kiln_kernel* kernel = NULL;
  const double start = now_us();
  if (!ok(kiln_get(m->engine, &desc.base, &kernel), "kiln_get"))
    return 0;
  const double got = now_us();

  kiln_int8_linear_args args = KILN_INT8_LINEAR_ARGS_INIT;
  args.m = tokens;
  args.x = m->activations;
  args.ldx = desc.k;
  args.w_pack = m->packs[index];
  args.ws = m->scales;
  args.y = m->outputs;
  args.ldy = desc.n;
  const double ready = now_us();
  int done = ok(kiln_run(kernel, &args.base), "kiln_run");
  result->run_us[result->calls++] = now_us() - ready;

  if (first) {
    result->tokens = tokens;
    result->first_get_us = got - start;
    done = done && describe_first_get(m, kernel, &before, result);
  }
  kiln_kernel_release(kernel);
  return done;
}

/* One row of activations, as kiln_int8_linear_desc tells. Returns s. */
static float quantise(const uint16_t* x, int64_t k, int8_t* q) {
  float a = 0;
  for (int64_t i = 0; i < k; ++i) { /* not fmaxf, whose loop GCC 12 for aarch64 crashes on */
    const float magnitude = fabsf(from_bf16(x[i]));
    a = magnitude > a ? magnitude : a;
  }
  const float r = 127 / a;
  for (int64_t i = 0; i < k; ++i)
    q[i] = isfinite(r) ? (int8_t)nearbyintf(from_bf16(x[i]) * r) : 0;
  return isfinite(r) ? a / 127 : 0;
}

static int32_t dot(const int8_t* a, const int8_t* b, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i)
    sum += a[i] * b[i];
  return sum;
}

/* Compares a whole prefill result of one layer with what the definition gives, bit by bit. */
static int check_layer(const model* m) {
  const int64_t n = kinds[K_PROJ].n, k = kinds[K_PROJ].k;
  int8_t* weights = malloc((size_t)(n * k));
  int8_t* q = malloc((size_t)k);
  double unused_us;
  measured unused = {.run_us = &unused_us};
  int done = allocated(weights, "weights") && allocated(q, "a row") && run_layer(m, K_PROJ, PREFILL_TOKENS, &unused);
  if (done)
    fill_random(weights, (size_t)(n * k), (uint64_t)K_PROJ << 32);
  for (int64_t row = 0; done && row < PREFILL_TOKENS; ++row) {
    const float s = quantise(m->activations + row * k, k, q);
    for (int64_t column = 0; done && column < n; ++column) {
      const float sum = (float)dot(q, weights + column * k, k), t = s * m->scales[column];
      const uint16_t expected = to_bf16(fmaf(sum, t, 0)), got = m->outputs[row * n + column];
      done = got == expected;
      if (!done)
        fprintf(stderr, "qwen3_host: k_proj of layer 0 at [%d, %d]: %g, expected %g\n", (int)row, (int)column,
                (double)from_bf16(got), (double)from_bf16(expected));
    }
  }
  free(q);
  free(weights);
  if (done)
    printf("k_proj of layer 0, %d tokens: all %d results equal those of a plain loop\n", PREFILL_TOKENS,
           PREFILL_TOKENS * (int)n);
  return done;
}

static int ascending(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

static void print_row(int kind, measured* r, const options* limits) {
  qsort(r->run_us, r->calls, sizeof *r->run_us, ascending);
  const double us = r->run_us[r->calls / 2];
  const double weights = (double)(kinds[kind].n * kinds[kind].k), operations = 2 * (double)r->tokens * weights;
  printf("%-9s %3d x %6d x %4d  %-11s %-8s %7.1f %9.1f %7.0f %6.1f", kinds[kind].name, (int)r->tokens,
         (int)kinds[kind].n, (int)kinds[kind].k, r->isa, r->source, r->first_get_us, us, 1e-3 * operations / us,
         1e-3 * weights / us);
  if (limits->gops_limit > 0) {
    const double compute_us = 1e-3 * operations / limits->gops_limit, read_us = 1e-3 * weights / limits->gbps_limit;
    printf("  %.2f of %s", (compute_us > read_us ? compute_us : read_us) / us,
           compute_us > read_us ? "arithmetic" : "reading");
  }
  putchar('\n');
}

/* All layers for `tokens` tokens, then the lm_head for the last of them, `steps` times; prints the table. */
static int run_phase(const model* m, const char* name, int64_t tokens, size_t steps, const options* limits) {
  measured results[KINDS] = {{0}};
  double* samples = malloc(steps * (size_t)(m->layers * LM_HEAD + 2) * sizeof *samples);
  int done = allocated(samples, "samples");
  double* step_us = samples;
  for (int kind = 0; done && kind < KINDS; ++kind)
    results[kind].run_us = samples + steps + steps * (size_t)(m->layers * kind);

  for (size_t step = 0; done && step < steps; ++step) {
    const double start = now_us();
    for (long i = 0; done && i < m->layers * LM_HEAD; ++i)
      done = run_layer(m, i, tokens, &results[kind_of(m, i)]);
    done = done && run_layer(m, m->layers * LM_HEAD, 1, &results[LM_HEAD]);
    step_us[step] = now_us() - start;
  }
  if (done) {
    printf("\n%-9s %19s  %-11s %-8s %7s %9s %7s %6s%s\n", name, "M x N x K", "path", "source", "get us", "run us",
           "GOPS", "GB/s", limits->gops_limit > 0 ? "  fraction of the limit" : "");
    for (int kind = 0; kind < KINDS; ++kind)
      print_row(kind, &results[kind], limits);
    qsort(step_us, steps, sizeof *step_us, ascending);
    printf("one %s of %d token%s: %.2f ms (median of %zu)\n", name, (int)tokens, tokens == 1 ? "" : "s",
           1e-3 * step_us[steps / 2], steps);
  }
  free(samples);
  return done;
}

static int print_sources(const model* m) {
  kiln_stats stats = KILN_STATS_INIT;
  if (!ok(kiln_get_stats(m->engine, &stats), "kiln_get_stats"))
    return 0;
  printf("\nkernels: %llu compiled, %llu from disk, %llu times from memory\n", (unsigned long long)stats.compiled,
         (unsigned long long)stats.disk_hits, (unsigned long long)stats.memory_hits);
  return 1;
}

static int parse_options(int count, char** words, options* result) {
  *result = (options){.layers = LAYERS};
  for (int i = 1; i < count; ++i) {
    char *end = "", *end2 = "";
    if (strcmp(words[i], "--layers") == 0 && i + 1 < count) {
      result->layers = strtol(words[++i], &end, 10);
    } else if (strcmp(words[i], "--once") == 0) {
      result->once = 1;
    } else if (strcmp(words[i], "--limits") == 0 && i + 2 < count) {
      result->gops_limit = strtod(words[++i], &end);
      result->gbps_limit = strtod(words[++i], &end2);
      if (!(result->gops_limit > 0 && result->gbps_limit > 0))
        return 0;
    } else {
      return 0;
    }
    if (*end != '\0' || *end2 != '\0')
      return 0;
  }
  return result->layers >= 1 && result->layers <= LAYERS;
}

int main(int count, char** words) {
  options given;
  if (!parse_options(count, words, &given)) {
    fprintf(stderr,
            "usage: qwen3_host [--layers 1...%d] [--once] [--limits GOPS GBPS]\n"
            "  --once    one prefill and one decode step instead of several\n"
            "  --limits  what this machine can compute and read; adds each layer's fraction of it to the table\n",
            LAYERS);
    return 2;
  }
  model m;
  const int done = model_create(&m, given.layers) &&
                   run_phase(&m, "prefill", PREFILL_TOKENS, given.once ? 1 : 3, &given) &&
                   run_phase(&m, "decode", 1, given.once ? 1 : 10, &given) && print_sources(&m) && check_layer(&m);
  model_destroy(&m);
  return done ? 0 : 1;
}
