#include <ctime>
#include <elf.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <fmt/format.h>

#include "jit/perf_file.h"

namespace kiln {
namespace {

constexpr std::uint32_t kMagic = 0x4A695444, kVersion = 1;
constexpr std::uint32_t kHeaderBytes = 40, kCodeLoadBytes = 56; ///< without name and code
constexpr std::uint32_t kCodeLoad = 0;                          ///< JIT_CODE_LOAD
#ifdef __x86_64__
constexpr std::uint32_t kMachine = EM_X86_64;
#else
constexpr std::uint32_t kMachine = EM_AARCH64;
#endif

/// The clock that `perf record -k mono` stamps its samples with.
std::uint64_t monotonic_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(now.tv_nsec);
}

Bytes header() {
  Writer out;
  out.u32(kMagic);
  out.u32(kVersion);
  out.u32(kHeaderBytes);
  out.u32(kMachine);
  out.u32(0); // padding
  out.u32(static_cast<std::uint32_t>(getpid()));
  out.u64(monotonic_ns());
  out.u64(0); // flags
  return out.take();
}

class Jitdump final : public PerfFile {
public:
  Jitdump(PrivateFile file, void* marker, std::size_t marker_size)
      : file_(std::move(file)), marker_(marker), marker_size_(marker_size) {}
  ~Jitdump() override {
    if (marker_)
      munmap(marker_, marker_size_);
  }

  Status add(const void* code, std::size_t size, std::string_view name) override {
    const std::uint64_t now = monotonic_ns();
    const auto address = reinterpret_cast<std::uint64_t>(code);
    Writer out;
    out.u32(kCodeLoad);
    out.u32(static_cast<std::uint32_t>(kCodeLoadBytes + name.size() + 1 + size));
    out.u64(now);
    out.u32(static_cast<std::uint32_t>(getpid()));
    out.u32(static_cast<std::uint32_t>(syscall(SYS_gettid)));
    out.u64(address); // virtual address
    out.u64(address); // where the code is now
    out.u64(size);
    out.u64(now); // index: perf names a file after it, so it must be unique in the process
    Bytes record = out.take();
    record.insert(record.end(), name.begin(), name.end());
    record.push_back(0);
    const auto* bytes = static_cast<const std::uint8_t*>(code);
    record.insert(record.end(), bytes, bytes + size);
    return file_.append(record);
  }

private:
  PrivateFile file_;
  void* marker_; ///< null when another engine of this process made the file
  std::size_t marker_size_;
};

} // namespace

Result<std::unique_ptr<PerfFile>> open_jitdump() {
  Result<PrivateFile> file = PrivateFile::open(fmt::format("jit-{}.dump", getpid()));
  if (!file)
    return file.status();
  const int descriptor = file->descriptor();
  void* marker = nullptr;
  const auto marker_size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  // Each writer keeps a shared lock. Whoever gets the exclusive one is the first, and what the file holds is left from
  // an earlier process with this number.
  if (flock(descriptor, LOCK_EX | LOCK_NB) == 0) {
    if (ftruncate(descriptor, 0) != 0)
      return file->failure("ftruncate");
    if (Status status = file->append(header()); !status)
      return status;
    // `perf record` learns of the file from the mapping of its first page as executable.
    marker = mmap(nullptr, marker_size, PROT_READ | PROT_EXEC, MAP_PRIVATE, descriptor, 0);
    if (marker == MAP_FAILED)
      return file->failure("mmap");
  }
  if (flock(descriptor, LOCK_SH) != 0)
    return file->failure("flock");
  return std::unique_ptr<PerfFile>(std::make_unique<Jitdump>(std::move(*file), marker, marker_size));
}

} // namespace kiln
