/* A host that unloads Kiln while a name server still owes it an answer: nobody waits for that, and the thread that does
 * returns into code that is still there. Usage: remote_unload_test LIBKILN */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netdb.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "api/kiln.h"

static atomic_int lookups_begun, lookups_ended;

static double seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

static void sleep_ms(long ms) {
  const struct timespec time = {ms / 1000, ms % 1000 * 1000000};
  nanosleep(&time, NULL);
}

/* In the place of the system's, for Kiln too: a name server that answers after a while. */
__attribute__((visibility("default"))) int getaddrinfo(const char* name, const char* service,
                                                       const struct addrinfo* hints, struct addrinfo** list) {
  (void)name, (void)service, (void)hints, (void)list;
  atomic_fetch_add(&lookups_begun, 1);
  sleep_ms(2000);
  atomic_fetch_add(&lookups_ended, 1);
  return EAI_AGAIN;
}

static void check(int holds, const char* what) {
  if (holds)
    return;
  fprintf(stderr, "not so: %s\n", what);
  exit(1);
}

int main(int argc, char** argv) {
  check(argc == 2, "one argument");
  char directory[] = "/tmp/kiln-remote-unload.XXXXXX", trusted[64], cache[64];
  check(mkdtemp(directory) != NULL, "a directory can be made");
  snprintf(trusted, sizeof trusted, "%s/trusted.keys", directory);
  snprintf(cache, sizeof cache, "%s/cache", directory);
  FILE* const file = fopen(trusted, "w");
  check(file != NULL, "a file can be made");
  fputs("ed25519 fa1a402db971727b Hx7jZ4dAKpG60uXNjcD+VcUzbaT8d/fbK+uONY3C+7U=\n", file); /* of nobody */
  fclose(file);
  setenv("HOME", directory, 1);
  setenv("KILN_CACHE_DIR", cache, 1);
  setenv("KILN_TRUSTED_KEYS", trusted, 1);
  setenv("KILN_REMOTE", "redis://cache.test", 1);

  void* const library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  check(library != NULL, "the library opens");
  kiln_status (*create)(const kiln_engine_options*, kiln_engine**);
  void (*destroy)(kiln_engine*);
  kiln_status (*get)(kiln_engine*, const kiln_desc*, kiln_kernel**);
  void (*release)(kiln_kernel*);
  *(void**)&create = dlsym(library, "kiln_engine_create");
  *(void**)&destroy = dlsym(library, "kiln_engine_destroy");
  *(void**)&get = dlsym(library, "kiln_get");
  *(void**)&release = dlsym(library, "kiln_kernel_release");
  check(create && destroy && get && release, "the library has its functions");

  kiln_engine* engine = NULL;
  kiln_kernel* kernel = NULL;
  kiln_int8_mm_desc desc = KILN_INT8_MM_DESC_INIT;
  desc.m = 1;
  desc.n = 64;
  desc.k = 64;
  const double begun = seconds();
  check(create(NULL, &engine) == KILN_OK, "an engine is made");
  check(get(engine, &desc.base, &kernel) == KILN_OK, "a kernel is compiled");
  release(kernel);
  destroy(engine);
  check(dlclose(library) == 0, "the library closes");
  check(atomic_load(&lookups_begun) == 1 && atomic_load(&lookups_ended) == 0, "the name is still being looked up");
  check(seconds() - begun < 1.9, "nobody waits for it");
  for (int i = 0; i < 1000 && atomic_load(&lookups_ended) == 0; ++i)
    sleep_ms(10);
  check(atomic_load(&lookups_ended) == 1, "it ends");
  sleep_ms(200); /* its thread, too */

  char command[128];
  snprintf(command, sizeof command, "rm -rf '%s'", directory);
  return system(command) == 0 ? 0 : 1;
}
