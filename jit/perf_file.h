#pragma once
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

#include "cache/bytes.h"
#include "cache/status.h"

namespace kiln {

/// What `perf` reads about the code of one process. Not thread-safe.
class PerfFile {
public:
  virtual ~PerfFile() = default;
  virtual Status add(const void* code, std::size_t size, std::string_view name) = 0;
};

/// `/tmp/perf-PID.map`, where `perf report` looks: a line `START SIZE NAME` a kernel. Other JITs of the process may
/// append to it too. Source: tools/perf/Documentation/jit-interface.txt of the Linux sources.
Result<std::unique_ptr<PerfFile>> open_perf_map();

/// `jit-PID.dump` in the current directory, for `perf record -k mono` and `perf inject --jit`. Engines of one process
/// share it. Source: tools/perf/Documentation/jitdump-specification.txt of the Linux sources.
Result<std::unique_ptr<PerfFile>> open_jitdump();

/// A file that is appended to and readable by its owner alone. Opening refuses a link, anything but a plain file and a
/// file of another user, since /tmp belongs to everyone.
class PrivateFile {
public:
  static Result<PrivateFile> open(std::string path);
  PrivateFile(PrivateFile&& other) noexcept;
  PrivateFile& operator=(PrivateFile&&) = delete;
  ~PrivateFile();

  int descriptor() const { return descriptor_; }
  Status append(ByteSpan bytes) const;
  /// What went wrong with `what`, from errno.
  Status failure(std::string_view what) const;

private:
  PrivateFile(std::string path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}
  std::string path_;
  int descriptor_;
};

} // namespace kiln
