#include <kiln.h>
#include <stdio.h>

enum { M = 2, N = 4, K = 3 };

/* Prints why the last call failed; for use as `ok(call) && ok(call) …`. */
static int ok(kiln_status status) {
  if (status != KILN_OK)
    fprintf(stderr, "kiln: %s: %s\n", kiln_status_name(status), kiln_last_error());
  return status == KILN_OK;
}

int main(void) {
  const int8_t a[M][K] = {{1, -2, 3}, {-128, 127, 5}};
  const int8_t weights[N][K] = {{1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {-128, -128, -128}};
  int32_t c[M][N];

  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT; /* B is [N][K], as linear layers keep it */
  desc.m = M;
  desc.n = N;
  desc.k = K;
  kiln_int8_mm_args args = KILN_INT8_MM_ARGS_INIT;
  args.m = M;
  args.a = &a[0][0];
  args.lda = K;
  args.c = &c[0][0];
  args.ldc = N;

  kiln_engine* engine = NULL;
  kiln_pack* pack = NULL;     /* the weights, rearranged once for this machine */
  kiln_kernel* kernel = NULL; /* from memory, from disk, or compiled now */
  int done = ok(kiln_engine_create(NULL, &engine)) && ok(kiln_pack_create(engine, &desc.base, weights, K, &pack)) &&
             ok(kiln_get(engine, &desc.base, &kernel));
  if (done) {
    args.b_pack = pack;
    done = ok(kiln_run(kernel, &args.base));
  }
  if (done)
    for (int m = 0; m < M; ++m)
      printf("%d %d %d %d\n", (int)c[m][0], (int)c[m][1], (int)c[m][2], (int)c[m][3]);

  kiln_kernel_release(kernel);
  kiln_pack_release(pack);
  kiln_engine_destroy(engine);
  return done ? 0 : 1;
}
