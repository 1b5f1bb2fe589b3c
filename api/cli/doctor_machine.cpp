#include <dlfcn.h>
#include <sys/stat.h>

#include <chrono>

#include <fmt/format.h>

#include "api/cli/doctor.h"
#include "api/cli/output.h"
#include "cache/database.h"
#include "jit/cuda/driver.h"
#include "jit/os.h"

namespace kiln::cli {
namespace {

/// Which kernels go first when the cache is full depends on the clock.
void check_clock(Report& report) {
  // Kiln is younger than this day. The file of this command was there before this moment, too: where its time was kept.
  constexpr std::chrono::sys_days earliest = std::chrono::year(2025) / 1 / 1;
  constexpr std::int64_t day = 24 * 3600;
  const std::int64_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  struct stat program;
  const std::int64_t made = ::stat("/proc/self/exe", &program) == 0 ? std::int64_t{program.st_mtim.tv_sec} : 0;
  const char* const remedy = "what is stored now goes first when the cache is full: set the clock";
  if (now < std::chrono::system_clock::to_time_t(earliest))
    report.warn("clock", fmt::format("{} is in the past; {}", local_time_text(now), remedy));
  else if (now + day < made)
    report.warn("clock", fmt::format("{} is before this command was built or installed, {}; {}", local_time_text(now),
                                     local_time_text(made), remedy));
  else
    report.ok("clock", local_time_text(now));
}

void check_sqlite(Report& report) {
  const Result<std::string> version = sqlite_version();
  if (!version)
    return report.fail("SQLite", version.status().message());
  // What is known to damage files, from sqlite.org/wal.html#walresetbug. Kiln has a rollback journal.
  report.ok("SQLite", sqlite_may_lose_wal() ? fmt::format("{}: its write-ahead log can damage a file (mended in "
                                                          "3.51.3), and Kiln uses none",
                                                          *version)
                                            : *version);
}

/// The way code takes into memory: where it is written, and whether the system lets it run.
void check_code_memory(Report& report) {
  constexpr std::size_t some_pages = 64 << 10; // of any page size
  const char* const mdwe = os::denies_write_execute() ? "on" : "off";
  const Result<os::CodeMapping> mapping = os::map_code(some_pages, false);
  if (!mapping)
    return report.fail("code memory", fmt::format("{}: only reference kernels serve, slowly; let this process map "
                                                  "memory for execution (seccomp, SELinux execmem, noexec)",
                                                  mapping.status().message()));
  const bool in_file = mapping->file >= 0;
  const std::uint8_t byte = 0;
  const Status written = os::write_code(*mapping, 0, {&byte, 1});
  os::unmap_code(*mapping);
  if (!written)
    report.fail("code memory", written.message());
  else if (in_file)
    report.ok("code memory",
              fmt::format("a memfd, mapped read + execute and never writable; memory-deny-write-execute is {}", mdwe));
  else
    report.warn("code memory",
                fmt::format("anonymous, as no memfd can be had: loading a kernel takes three times as long; see the "
                            "limits on descriptors and file sizes, vm.memfd_noexec; memory-deny-write-execute is {}",
                            mdwe));
}

/// A machine without a GPU is fine, and so is one whose driver serves. Asks for each device's context, as a host would.
void check_nvidia_driver(Report& report, const Runtime& runtime) {
  const char* const name = "NVIDIA driver";
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) == nullptr)
    return report.ok(name, "none: kernels run on the CPU");
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return report.warn(name, driver.status().message());
  report.ok(name, "CUDA " + (*driver)->version_text());
  for (int i = 0; i < static_cast<int>((*driver)->devices().size()); ++i) {
    const cuda::DeviceInfo& device = (*driver)->devices()[static_cast<std::size_t>(i)];
    const Result<cuda::ContextScope> context = cuda::ContextScope::enter(**driver, i, nullptr);
    if (context)
      report.ok(fmt::format("cuda:{}", i), fmt::format("{}, {}", device.name, device.target().text()));
    else
      report.fail(fmt::format("cuda:{}", i), context.status().message());
  }
}

} // namespace

void check_machine(Report& report, Engine& engine) {
  report.ok("machine", fmt::format("{}, {}", engine.machine().cpu_name, engine.machine().target.text()));
  check_clock(report);
  check_sqlite(report);
  check_code_memory(report);
  check_nvidia_driver(report, engine.runtime());
}

} // namespace kiln::cli
