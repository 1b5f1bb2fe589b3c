#ifdef __linux__
#include "jit/os.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <linux/membarrier.h>
#include <memory>
#include <sched.h>
#include <spawn.h>
#include <string_view>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fmt/format.h>

namespace kiln::os {
namespace {

/// The first line of a small file of /proc or /sys; empty when there is none.
std::string first_line(const std::string& path) {
  std::array<char, 512> line{};
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "re"), std::fclose);
  if (!file || !std::fgets(line.data(), line.size(), file.get()))
    return {};
  line[std::strcspn(line.data(), "\n")] = 0;
  return line.data();
}

int affinity_cores() {
  // 8192 is the largest NR_CPUS that Linux can be built with; a mask smaller than the kernel's is refused.
  std::array<unsigned long, 8192 / (8 * sizeof(long))> mask{};
  if (sched_getaffinity(0, sizeof mask, reinterpret_cast<cpu_set_t*>(mask.data())) != 0)
    return 1;
  int cores = 0;
  for (unsigned long word : mask)
    cores += __builtin_popcountl(word);
  return std::max(cores, 1);
}

/// Whole cores that `quota` of each `period` microseconds amount to, rounded up.
int quota_cores(long long quota, long long period) {
  if (quota <= 0 || period <= 0)
    return INT_MAX;
  return static_cast<int>(std::min<long long>((quota + period - 1) / period, INT_MAX));
}

int quota_of_cgroup_v2(const std::string& directory) {
  long long quota = 0, period = 0;
  // `max 100000` means no quota and does not scan.
  if (std::sscanf(first_line(directory + "/cpu.max").c_str(), "%lld %lld", &quota, &period) != 2)
    return INT_MAX;
  return quota_cores(quota, period);
}

int quota_of_cgroup_v1(const std::string& directory) {
  const long long quota = std::atoll(first_line(directory + "/cpu.cfs_quota_us").c_str());
  return quota > 0 ? quota_cores(quota, std::atoll(first_line(directory + "/cpu.cfs_period_us").c_str())) : INT_MAX;
}

/// The tightest quota from `group` (`/a/b`, or `/`) up to the root of the hierarchy mounted at `mount`.
int tightest_quota(const std::string& mount, std::string group, int (*quota_of)(const std::string& directory)) {
  if (group == "/")
    group.clear();
  int cores = quota_of(mount + group);
  while (!group.empty()) {
    group.erase(std::min(group.rfind('/'), group.size() - 1));
    cores = std::min(cores, quota_of(mount + group));
  }
  return cores;
}

/// From /proc/self/cgroup (cgroups(7)): `0::/path` for version 2, `4:cpu,cpuacct:/path` for version 1.
int cgroup_cores() {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen("/proc/self/cgroup", "re"), std::fclose);
  std::array<char, 4096> line;
  int cores = INT_MAX;
  while (file && std::fgets(line.data(), line.size(), file.get())) {
    line[std::strcspn(line.data(), "\n")] = 0;
    const std::string_view text = line.data();
    const std::size_t controllers = text.find(':') + 1;
    const std::size_t path = text.find(':', controllers) + 1;
    if (controllers == 0 || path == 0)
      continue;
    const std::string list = fmt::format(",{},", text.substr(controllers, path - 1 - controllers));
    const std::string group(text.substr(path));
    if (list == ",,")
      cores = std::min(cores, tightest_quota("/sys/fs/cgroup", group, quota_of_cgroup_v2));
    else if (list.find(",cpu,") != std::string::npos)
      cores = std::min(cores, tightest_quota("/sys/fs/cgroup/cpu", group, quota_of_cgroup_v1));
  }
  return cores;
}

/// A memfd of this size, or -1.
int make_code_file(std::size_t size) {
  // Growing a file beyond this limit would raise SIGXFSZ in the host.
  rlimit limit;
  if (getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur < size)
    return -1;
  // From Linux 6.3 on, absent from Debian 12's headers (include/uapi/linux/memfd.h): the file is to be executable,
  // whatever vm.memfd_noexec has as default. Older kernels do not know the flag.
  constexpr unsigned kMfdExec = 0x10;
  int file = memfd_create("kiln-code", MFD_CLOEXEC | kMfdExec);
  if (file < 0 && errno == EINVAL)
    file = memfd_create("kiln-code", MFD_CLOEXEC);
  if (file >= 0 && ftruncate(file, static_cast<off_t>(size)) != 0) {
    close(file);
    return -1;
  }
  return file;
}

std::uint64_t file_id(int file) {
  struct stat status;
  return fstat(file, &status) == 0 ? (static_cast<std::uint64_t>(status.st_dev) << 48) ^ status.st_ino : 0;
}

/// The system's refusal, as what the caller can do about it.
Status refusal(const char* what) {
  const int error = errno;
  const Code code = error == ENOMEM || error == ENOSPC                                        ? Code::out_of_memory
                    : error == EACCES || error == EPERM || error == ENOSYS || error == EINVAL ? Code::unsupported
                                                                                              : Code::io;
  return Status::error(code, fmt::format("executable memory: {}: {}", what, std::strerror(error)));
}

Status write_through_file(const CodeMapping& mapping, std::size_t offset, ByteSpan bytes) {
  if (file_id(mapping.file) != mapping.file_id)
    return Status::error(Code::io, "executable memory: its file descriptor was closed by someone else");
  while (!bytes.empty()) {
    const ssize_t written = pwrite(mapping.file, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR)
      continue;
    if (written <= 0)
      return refusal("pwrite");
    bytes = bytes.subspan(static_cast<std::size_t>(written));
    offset += static_cast<std::size_t>(written);
  }
  return {};
}

Status write_through_view(const CodeMapping& mapping, std::size_t offset, ByteSpan bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t begin = offset / page * page, size = (offset + bytes.size() + page - 1) / page * page - begin;
  // An old size of 0 asks for a second mapping of the same shared pages (mremap(2)).
  void* view = mremap(mapping.address + begin, 0, size, MREMAP_MAYMOVE);
  if (view == MAP_FAILED)
    return refusal("mremap");
  Status status;
  if (madvise(view, size, MADV_DONTFORK) != 0 || mprotect(view, size, PROT_READ | PROT_WRITE) != 0)
    status = refusal("a writable view");
  else
    std::memcpy(static_cast<std::uint8_t*>(view) + (offset - begin), bytes.data(), bytes.size());
  munmap(view, size);
  return status;
}

} // namespace

int usable_cores() {
  return std::min(affinity_cores(), cgroup_cores());
}

CacheSizes cache_sizes() {
  CacheSizes sizes;
  for (int index = 0; index < 8; ++index) {
    const std::string directory = fmt::format("/sys/devices/system/cpu/cpu0/cache/index{}/", index);
    const std::string level = first_line(directory + "level");
    if (level.empty())
      break;
    if (first_line(directory + "type") == "Instruction")
      continue;
    long long size = 0;
    char unit = 0;
    std::sscanf(first_line(directory + "size").c_str(), "%lld%c", &size, &unit);
    const std::int64_t bytes = unit == 'M' ? size << 20 : unit == 'K' ? size << 10 : size;
    (level == "1" ? sizes.l1d : level == "2" ? sizes.l2 : sizes.l3) = bytes;
  }
  return sizes;
}

bool request_amx_tiles() {
#ifdef __x86_64__
  // arch/x86/include/uapi/asm/prctl.h, Documentation/arch/x86/xstate.rst; 18 is XFEATURE_XTILEDATA.
  constexpr long kArchReqXcompPerm = 0x1023;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, 18) == 0;
#else
  return false;
#endif
}

bool runs_privileged() {
  return getauxval(AT_SECURE) != 0;
}

Result<ProgramResult> run_program(const std::vector<std::string>& words) {
  const auto cannot = [&](int error) {
    return Status::error(Code::unsupported, fmt::format("{} cannot be run: {}", words.front(), std::strerror(error)));
  };
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0)
    return cannot(errno);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDERR_FILENO);
  std::vector<char*> arguments;
  for (const std::string& word : words)
    arguments.push_back(const_cast<char*>(word.c_str())); // which posix_spawn does not change
  arguments.push_back(nullptr);
  char* const no_environment[] = {nullptr};
  pid_t child = -1;
  const int error = posix_spawn(&child, words.front().c_str(), &actions, nullptr, arguments.data(), no_environment);
  posix_spawn_file_actions_destroy(&actions);
  ::close(ends[1]);
  ProgramResult result;
  constexpr std::size_t kMostOutput = 1 << 20;
  std::array<char, 4096> piece;
  for (ssize_t got; error == 0 && (got = ::read(ends[0], piece.data(), piece.size())) != 0;) {
    if (got < 0 && errno != EINTR)
      break;
    if (got > 0 && result.output.size() < kMostOutput)
      result.output.append(piece.data(), static_cast<std::size_t>(got));
  }
  ::close(ends[0]);
  if (error != 0)
    return cannot(error);
  int status = 0;
  while (::waitpid(child, &status, 0) < 0) {
    if (errno == EINTR)
      continue;
    return cannot(errno); // a host that ignores SIGCHLD has no exit statuses
  }
  result.exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

bool is_program(const std::string& path) {
  struct stat info;
  return ::stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) && ::access(path.c_str(), X_OK) == 0;
}

FileSystem describe_file_system(std::uint32_t number, std::string_view mount_type) {
  constexpr std::uint32_t fuse = 0x65735546;
  struct Row {
    std::uint32_t number; // statfs(2), include/uapi/linux/magic.h
    const char* name;
    bool over_network, in_memory;
  };
  constexpr Row rows[] = {
      {0x6969, "nfs", true, false},        {0xFF534D42, "cifs", true, false},     {0xFE534D42, "smb2", true, false},
      {0x517B, "smb", true, false},        {0x01021997, "9p", true, false},       {0x00C36400, "ceph", true, false},
      {0x0BD00BD0, "lustre", true, false}, {0x5346414F, "afs", true, false},      {0x6B414653, "kafs", true, false},
      {0x47504653, "gpfs", true, false},   {0x19830326, "beegfs", true, false},   {0x20030528, "orangefs", true, false},
      {0xAAD7AAEA, "panfs", true, false},  {0x73757245, "coda", true, false},     {0x564C, "ncp", true, false},
      {0x7461636F, "ocfs2", true, false},  {0x01161970, "gfs2", true, false},     {0x786F4256, "vboxsf", true, false},
      {0xBACBACBC, "vmhgfs", true, false}, {fuse, "fuse", true, false},           {0x01021994, "tmpfs", false, true},
      {0x858458F6, "ramfs", false, true},  {0xEF53, "ext4", false, false},        {0x58465342, "xfs", false, false},
      {0x9123683E, "btrfs", false, false}, {0x794C7630, "overlay", false, false}, {0x2FC12FC1, "zfs", false, false},
      {0xF2F52010, "f2fs", false, false},
  };
  // Over a disk or another directory of this machine. virtiofs is not among them: its other side is another machine.
  constexpr std::string_view local_fuse[] = {
      "fuseblk",        "fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.unionfs", "fuse.unionfs-fuse", "fuse.bindfs",
      "fuse.gocryptfs", "fuse.encfs",          "fuse.cryfs",    "fuse.ntfs-3g", "fuse.exfat",        "fuse.zfs"};
  for (const Row& row : rows) {
    if (row.number != number)
      continue;
    const bool is_local = std::find(std::begin(local_fuse), std::end(local_fuse), mount_type) != std::end(local_fuse);
    if (number == fuse && !mount_type.empty())
      return {std::string(mount_type), !is_local, false};
    return {row.name, row.over_network, row.in_memory};
  }
  return {"local"};
}

namespace {

/// The type of the mounted file system with this device number (proc(5), mountinfo); empty when there is none.
std::string mount_type_of(dev_t device) {
  const std::string wanted = fmt::format("{}:{}", major(device), minor(device));
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen("/proc/self/mountinfo", "re"), std::fclose);
  std::array<char, 8192> line;
  while (file && std::fgets(line.data(), line.size(), file.get())) {
    std::array<char, 32> numbers{};
    if (std::sscanf(line.data(), "%*d %*d %31s", numbers.data()) != 1 || wanted != numbers.data())
      continue;
    const std::string_view text = line.data();
    const std::size_t type = text.find(" - "); // ends the optional fields
    if (type != std::string_view::npos)
      return std::string(text.substr(type + 3, text.find(' ', type + 3) - (type + 3)));
  }
  return {};
}

} // namespace

FileSystem file_system_of(const std::string& path) {
  std::string there = path;
  struct statfs info;
  while (::statfs(there.c_str(), &info) != 0) {
    const std::size_t slash = there.rfind('/');
    if ((errno != ENOENT && errno != ENOTDIR && errno != ELOOP) || slash == std::string::npos || there == "/")
      return {"local"};
    there.erase(std::max<std::size_t>(slash, 1));
  }
  struct stat file;
  const bool in_user_space = static_cast<std::uint32_t>(info.f_type) == 0x65735546;
  FileSystem out = describe_file_system(static_cast<std::uint32_t>(info.f_type),
                                        in_user_space && ::stat(there.c_str(), &file) == 0 ? mount_type_of(file.st_dev)
                                                                                           : std::string());
  out.read_only = (info.f_flags & ST_RDONLY) != 0;
  return out;
}

Result<CodeMapping> map_code(std::size_t size, bool anonymous) {
  CodeMapping mapping;
  mapping.size = size;
  mapping.file = anonymous ? -1 : make_code_file(size);
  const int flags = MAP_SHARED | (mapping.file < 0 ? MAP_ANONYMOUS : 0);
  void* address = mmap(nullptr, size, PROT_READ | PROT_EXEC, flags, mapping.file, 0);
  if (address == MAP_FAILED) {
    Status status = refusal("mmap for execution");
    if (mapping.file >= 0)
      close(mapping.file);
    return status;
  }
  mapping.address = static_cast<std::uint8_t*>(address);
  if (mapping.file >= 0)
    mapping.file_id = file_id(mapping.file);
  return mapping;
}

bool denies_write_execute() {
  constexpr int kPrGetMdwe = 66, kRefuseExecGain = 1; // include/uapi/linux/prctl.h of Linux 6.3
  const int flags = prctl(kPrGetMdwe, 0, 0, 0, 0);
  return flags >= 0 && (flags & kRefuseExecGain) != 0;
}

Status write_code(const CodeMapping& mapping, std::size_t offset, ByteSpan bytes) {
  return mapping.file >= 0 ? write_through_file(mapping, offset, bytes) : write_through_view(mapping, offset, bytes);
}

void unmap_code(const CodeMapping& mapping) {
  munmap(mapping.address, mapping.size);
  if (mapping.file >= 0 && file_id(mapping.file) == mapping.file_id)
    close(mapping.file);
}

#ifdef __aarch64__
namespace {

/// Whether a function that was written over another through the file is what runs. True of every processor; qemu before
/// 8.1 takes `ic ivau` for nothing and goes on with its translation of the first.
bool runs_rewritten_code() {
  const Result<CodeMapping> page = map_code(static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), false);
  if (!page)
    return true;
  bool runs_old = false;
  for (const std::uint32_t value : {1u, 2u}) {
    Writer function;
    function.u32(0x52800000 | value << 5); // movz w0, #value
    function.u32(0xd65f03c0);              // ret
    if (!write_code(*page, 0, function.bytes()))
      break;
    char* code = reinterpret_cast<char*>(page->address);
    __builtin___clear_cache(code, code + function.bytes().size());
    runs_old = reinterpret_cast<std::uint32_t (*)()>(page->address)() != value;
  }
  unmap_code(*page);
  return !runs_old;
}

} // namespace
#endif

void forget_replaced_code([[maybe_unused]] const CodeMapping& mapping, [[maybe_unused]] std::size_t offset,
                          [[maybe_unused]] std::size_t size) {
#ifdef __aarch64__
  static const bool runs_what_is_written = runs_rewritten_code();
  if (!runs_what_is_written && mapping.file >= 0) {
    // Mapped anew, the same bytes of the same file: an emulator then forgets what it made of them.
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t begin = offset / page * page;
    static_cast<void>(mmap(mapping.address + begin, offset + size - begin, PROT_READ | PROT_EXEC,
                           MAP_SHARED | MAP_FIXED, mapping.file, static_cast<off_t>(begin)));
  }
#endif
}

void synchronise_instruction_fetch() {
  // A kernel without membarrier (before 4.16, or a sandbox) leaves what the processor does by itself, which is enough
  // on every x86-64 known to run Linux, whose caches see writes through another mapping.
  const auto barrier = [](int command) { return syscall(SYS_membarrier, command, 0, 0); };
  if (barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE) != 0 && errno == EPERM &&
      barrier(MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE) == 0)
    barrier(MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE);
}

#ifdef __aarch64__
namespace {

/// In bits, by the instruction, which gives what this thread has: a system may lower it (PR_SVE_SET_VL, PR_SME_SET_VL).
/// As words, for assemblers that do not know SVE or SME (Arm Architecture Reference Manual, C8 and C9).
int sve_vector_bits() {
  register std::uint64_t bytes __asm__("x0");
  __asm__ volatile(".inst 0x04bf5020" : "=r"(bytes)); // rdvl x0, #1
  return static_cast<int>(8 * bytes);
}
/// Of streaming mode; no SVE is needed to ask.
int sme_vector_bits() {
  register std::uint64_t bytes __asm__("x0");
  __asm__ volatile(".inst 0x04bf5820" : "=r"(bytes)); // rdsvl x0, #1
  return static_cast<int>(8 * bytes);
}

/// MIDR_EL1 of core 0, else of the core this runs on, which the kernel reads for us if it says so; 0 when it does not.
std::uint64_t main_id() {
  const std::string text = first_line("/sys/devices/system/cpu/cpu0/regs/identification/midr_el1");
  constexpr int kHwcapCpuid = 11; // Documentation/arch/arm64/cpu-feature-registers.rst
  std::uint64_t id = std::strtoull(text.c_str(), nullptr, 16);
  if (id == 0 && (getauxval(AT_HWCAP) >> kHwcapCpuid & 1) != 0)
    __asm__("mrs %0, midr_el1" : "=r"(id));
  return id;
}

/// What LLVM's -mcpu calls the core, from implementer and part (arch/arm64/include/asm/cputype.h).
std::string core_name(std::uint64_t midr) {
  struct Row {
    unsigned implementer, part;
    const char* name;
  };
  constexpr Row rows[] = {
      {0x41, 0xd03, "cortex-a53"},  {0x41, 0xd05, "cortex-a55"},  {0x41, 0xd07, "cortex-a57"},
      {0x41, 0xd08, "cortex-a72"},  {0x41, 0xd09, "cortex-a73"},  {0x41, 0xd0a, "cortex-a75"},
      {0x41, 0xd0b, "cortex-a76"},  {0x41, 0xd0c, "neoverse-n1"}, {0x41, 0xd0d, "cortex-a77"},
      {0x41, 0xd40, "neoverse-v1"}, {0x41, 0xd41, "cortex-a78"},  {0x41, 0xd44, "cortex-x1"},
      {0x41, 0xd46, "cortex-a510"}, {0x41, 0xd47, "cortex-a710"}, {0x41, 0xd48, "cortex-x2"},
      {0x41, 0xd49, "neoverse-n2"}, {0x41, 0xd4d, "cortex-a715"}, {0x41, 0xd4e, "cortex-x3"},
      {0x41, 0xd4f, "neoverse-v2"}, {0x41, 0xd80, "cortex-a520"}, {0x41, 0xd81, "cortex-a720"},
      {0x41, 0xd82, "cortex-x4"},   {0x41, 0xd84, "neoverse-v3"}, {0x41, 0xd85, "cortex-x925"},
      {0x41, 0xd87, "cortex-a725"}, {0x41, 0xd8e, "neoverse-n3"}, {0x46, 0x001, "a64fx"},
      {0x51, 0x001, "oryon-1"},     {0xc0, 0xac3, "ampere1"},     {0xc0, 0xac4, "ampere1a"},
  };
  for (const Row& row : rows)
    if (row.implementer == (midr >> 24 & 0xff) && row.part == (midr >> 4 & 0xfff))
      return row.name;
  return midr != 0 ? fmt::format("aarch64, MIDR {:#010x}", midr) : "aarch64";
}

} // namespace
#endif

ArmProcessor arm_processor() {
  ArmProcessor processor;
#ifdef __aarch64__
  // arch/arm64/include/uapi/asm/hwcap.h; newer than some C libraries' headers.
  struct Capability {
    unsigned long kind;
    int bit;
    Feature feature;
  };
  constexpr Capability kCapabilities[] = {
      {AT_HWCAP, 1, Feature::neon},   {AT_HWCAP, 20, Feature::dotprod}, {AT_HWCAP2, 13, Feature::i8mm},
      {AT_HWCAP2, 14, Feature::bf16}, {AT_HWCAP, 10, Feature::fp16},    {AT_HWCAP, 22, Feature::sve},
      {AT_HWCAP2, 1, Feature::sve2},  {AT_HWCAP2, 23, Feature::sme},    {AT_HWCAP2, 37, Feature::sme2},
  };
  for (const Capability& capability : kCapabilities)
    if ((getauxval(capability.kind) >> capability.bit & 1) != 0)
      processor.features.add(capability.feature);
  if (processor.features.has(Feature::sve))
    processor.sve_bits = sve_vector_bits();
  if (processor.features.has(Feature::sme))
    processor.sme_bits = sme_vector_bits();
  processor.name = core_name(main_id());
#endif
  return processor;
}

} // namespace kiln::os
#endif
