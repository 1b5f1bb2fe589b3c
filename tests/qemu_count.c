/* A TCG plugin for qemu's user mode: counts how often each guest instruction is executed between two marks that the
 * guest sets. Built with the host's compiler: it runs inside qemu.
 *
 *   QEMU_PLUGIN=libqemu_count.so,out=FILE qemu-aarch64 PROGRAM
 *
 * The guest marks by calling system number COUNT_SYSCALL, which no kernel has (qemu answers ENOSYS): first argument 1
 * sets every counter to zero, 2 writes FILE: a line `ADDRESS INSTRUCTIONS COUNT` (hexadecimal, decimal, decimal) for
 * each translated block that ran, ADDRESS being that of its first instruction in the guest, then a line `# complete`.
 * Blocks may overlap. The mark itself is not counted whole. For one thread; a block that a fault leaves early counts
 * whole.
 *
 * Debian has no header of qemu's plugin interface; what is used of it, as documented for API version 1 (qemu 4.2 … 8.2,
 * docs/devel/tcg-plugins): */
#define _POSIX_C_SOURCE 200809L
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t qemu_plugin_id_t;
struct qemu_info;
struct qemu_plugin_tb;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef void (*tb_translated_cb)(qemu_plugin_id_t, struct qemu_plugin_tb*);
typedef void (*syscall_cb)(qemu_plugin_id_t, unsigned vcpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t,
                           uint64_t, uint64_t, uint64_t, uint64_t);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, tb_translated_cb);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb*, enum qemu_plugin_op, void* counter,
                                                     uint64_t add);
extern void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, syscall_cb);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb*);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb*);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum {
  COUNT_SYSCALL = 0x4b494c4e,
  MARK_BEGIN = 1,
  MARK_END = 2
}; /* the same in tests/arm_instruction_count_test.cpp */

struct block {
  uint64_t address, instructions, count;
  struct block* next;
};
static struct block* blocks;
static pthread_mutex_t blocks_mutex = PTHREAD_MUTEX_INITIALIZER;
static const char* out_path;

static void on_translated(qemu_plugin_id_t id, struct qemu_plugin_tb* tb) {
  (void)id;
  struct block* block = calloc(1, sizeof *block); /* lives as long as qemu may run the block: to the end */
  if (block == NULL)
    abort();
  block->address = qemu_plugin_tb_vaddr(tb);
  block->instructions = qemu_plugin_tb_n_insns(tb);
  pthread_mutex_lock(&blocks_mutex);
  block->next = blocks;
  blocks = block;
  pthread_mutex_unlock(&blocks_mutex);
  qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &block->count, 1);
}

static void write_counts(void) {
  FILE* file = fopen(out_path, "w");
  if (file == NULL) {
    perror(out_path);
    return;
  }
  for (const struct block* block = blocks; block != NULL; block = block->next)
    if (block->count != 0)
      fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions, block->count);
  fprintf(file, "# complete\n");
  if (fclose(file) != 0)
    perror(out_path);
}

static void on_syscall(qemu_plugin_id_t id, unsigned vcpu, int64_t number, uint64_t mark, uint64_t a2, uint64_t a3,
                       uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)vcpu, (void)a2, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != COUNT_SYSCALL)
    return;
  pthread_mutex_lock(&blocks_mutex);
  if (mark == MARK_BEGIN)
    for (struct block* block = blocks; block != NULL; block = block->next)
      block->count = 0;
  else if (mark == MARK_END)
    write_counts();
  pthread_mutex_unlock(&blocks_mutex);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const struct qemu_info* info, int argc, char** argv) {
  (void)info;
  for (int i = 0; i < argc; ++i)
    if (strncmp(argv[i], "out=", 4) == 0)
      out_path = strdup(argv[i] + 4);
  if (out_path == NULL) {
    fprintf(stderr, "qemu_count: out=FILE is missing\n");
    return -1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, on_translated);
  qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
  return 0;
}
