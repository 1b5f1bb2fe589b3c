#pragma once
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

#include <fmt/format.h>

#include "api/kiln.h"
#include "cache/status.h"

/// What benches need as hosts of Kiln: handles that release themselves, errors that end the program.
namespace kiln::bench {

/// Removed with its contents at the end. In memory where the system has such a file system: thousands of rows are
/// stored with an fsync or two each, while a hit reads the page cache on any file system.
struct TemporaryDirectory {
  std::string path;
  explicit TemporaryDirectory(const std::string& in = "/dev/shm") {
    for (const std::string& parent : {in, std::filesystem::temp_directory_path().string()}) {
      path = parent + "/kiln-bench-XXXXXX";
      if (mkdtemp(path.data()) != nullptr)
        return;
    }
    fmt::print(stderr, "{}: no temporary directory can be made in {} or {}\n", program_invocation_short_name, in,
               std::filesystem::temp_directory_path().string());
    std::exit(1);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
};

[[noreturn]] inline void fail(const std::string& message) {
  fmt::print(stderr, "{}: {}\n", program_invocation_short_name, message);
  std::exit(1);
}

inline void check(kiln_status status, const char* what) {
  if (status != KILN_OK)
    fail(fmt::format("{}: {}: {}", what, kiln_status_name(status), kiln_last_error()));
}

template <class T> T take(Result<T> result) {
  if (!result)
    fail(result.status().message());
  return std::move(*result);
}

template <auto release> struct Releaser {
  template <class T> void operator()(T* handle) const { release(handle); }
};
using EngineHandle = std::unique_ptr<kiln_engine, Releaser<kiln_engine_destroy>>;
using KernelHandle = std::unique_ptr<kiln_kernel, Releaser<kiln_kernel_release>>;
using PackHandle = std::unique_ptr<kiln_pack, Releaser<kiln_pack_release>>;

/// Null: no cache on disk. `threads`: 0 for the engine's own choice.
inline EngineHandle make_engine(const char* cache_dir, int threads = 0) {
  kiln_engine_options options = KILN_ENGINE_OPTIONS_INIT;
  options.cache_dir = cache_dir;
  options.cache_mode = cache_dir ? "rw" : "off";
  options.threads = threads;
  kiln_engine* engine = nullptr;
  check(kiln_engine_create(&options, &engine), "kiln_engine_create");
  return EngineHandle(engine);
}

} // namespace kiln::bench
