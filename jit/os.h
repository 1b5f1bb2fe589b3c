#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cache/bytes.h"
#include "cache/status.h"
#include "jit/target.h"

/// What differs by operating system: one file per system (os_linux.cpp) implements all of it. Any thread may call any
/// of it.
namespace kiln::os {

/// Cores that the affinity mask and the CPU quota of this process leave it, at least 1.
int usable_cores();

/// Of core 0, in bytes; 0 where the system does not tell.
struct CacheSizes {
  std::int64_t l1d = 0, l2 = 0, l3 = 0;
};
CacheSizes cache_sizes();

/// Asks for AMX tile data for this process; false when the system refuses. May be repeated.
bool request_amx_tiles();

/// Arm keeps its identification registers for the system, so the system is asked. Meaningful on aarch64 only.
struct ArmProcessor {
  Features features;
  int sve_bits = 0, sme_bits = 0; ///< 0 without the feature
  std::string name;
};
ArmProcessor arm_processor();

/// Whether the process runs with rights its caller lacks (setuid, file capabilities), so that its environment is not to
/// be trusted.
bool runs_privileged();

/// Runs a program with an empty environment and no standard input, and waits for it.
struct ProgramResult {
  int exit_status = 0; ///< 128 + signal when one ended it
  std::string output;  ///< standard output and standard error; of more than 1 MiB the beginning
};
/// `words`: its path (absolute) and arguments. Code::unsupported when it cannot be run.
Result<ProgramResult> run_program(const std::vector<std::string>& words);
/// Whether a path is a file that this process may run.
bool is_program(const std::string& path);

/// What holds a path.
struct FileSystem {
  std::string name;          ///< `ext4`, `nfs`, `fuse.sshfs`, …; `local` for those that call for no remark
  bool over_network = false; ///< shared between machines, so that locks may not hold between them, or may hang
  bool in_memory = false;    ///< empty after a restart
  bool read_only = false;
};
/// Of the path, or of the nearest directory above it that exists.
FileSystem file_system_of(const std::string& path);
/// By the number that statfs(2) gives, and, for file systems in user space, which are one to it, by the type that
/// /proc/self/mountinfo gives (`fuse.sshfs`). Those that are not known to be local count as over a network.
FileSystem describe_file_system(std::uint32_t number, std::string_view mount_type);

/// Memory that is readable and executable at `address` and changes through `write_code` only. Shared with children made
/// by fork.
struct CodeMapping {
  std::uint8_t* address = nullptr;
  std::size_t size = 0;
  int file = -1; ///< what code is written to, so that no writable mapping is needed; -1 for anonymous memory
  std::uint64_t file_id = 0; ///< tells whether `file` is still ours: a host may close descriptors it did not open
};
/// `size` is a multiple of the page size. Code::unsupported when the system refuses executable mappings, out_of_memory
/// or io otherwise. Anonymous memory is written through a second mapping, which is writable and lives only meanwhile:
/// three times slower. It is for `perf`, which looks up names in its map for anonymous memory only, and where there can
/// be no file.
Result<CodeMapping> map_code(std::size_t size, bool anonymous);
/// Whether memory-deny-write-execute is on for this process (PR_SET_MDWE, systemd's MemoryDenyWriteExecute): no mapping
/// becomes executable that was not from the start.
bool denies_write_execute();
/// Replaces bytes of the mapping; instruction fetch is not synchronised by it.
Status write_code(const CodeMapping& mapping, std::size_t offset, ByteSpan bytes);
void unmap_code(const CodeMapping& mapping);
/// Every thread of this process drops instructions it fetched before: needed when code replaces other code, and on Arm
/// for any new code.
void synchronise_instruction_fetch();
/// For bytes that held other code before, which a processor forgets by what the compiler's cache clearing does: an
/// emulator may need more.
void forget_replaced_code(const CodeMapping& mapping, std::size_t offset, std::size_t size);

} // namespace kiln::os
