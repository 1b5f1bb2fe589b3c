#include <cstdint>
#include <unistd.h>

#include <fmt/format.h>

#include "jit/perf_file.h"

namespace kiln {
namespace {

class PerfMap final : public PerfFile {
public:
  explicit PerfMap(PrivateFile file) : file_(std::move(file)) {}

  Status add(const void* code, std::size_t size, std::string_view name) override {
    // In one write, so that lines of several writers do not mix.
    const std::string line = fmt::format("{:x} {:x} {}\n", reinterpret_cast<std::uintptr_t>(code), size, name);
    return file_.append({reinterpret_cast<const std::uint8_t*>(line.data()), line.size()});
  }

private:
  PrivateFile file_;
};

} // namespace

Result<std::unique_ptr<PerfFile>> open_perf_map() {
  Result<PrivateFile> file = PrivateFile::open(fmt::format("/tmp/perf-{}.map", getpid()));
  if (!file)
    return file.status();
  return std::unique_ptr<PerfFile>(std::make_unique<PerfMap>(std::move(*file)));
}

} // namespace kiln
