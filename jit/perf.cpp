#include "jit/perf.h"

#include <mutex>

#include <fmt/format.h>

#include "cache/per_process.h"
#include "jit/perf_file.h"

namespace kiln {
namespace {

/// The file of this process: a child made by fork opens its own, under its own process id.
struct Reporting {
  std::mutex mutex;
  std::unique_ptr<PerfFile> file;
  bool failed = false;
};

} // namespace

struct PerfReporter::Impl {
  PerfMode mode;
  const Log& log;
  PerProcess<Reporting> reporting;
};

PerfReporter::PerfReporter(PerfMode mode, const Log& log) : impl_(new Impl{mode, log, {}}) {}
PerfReporter::~PerfReporter() = default;

void PerfReporter::loaded(const void* code, std::size_t size, std::string_view name) {
  if (impl_->mode == PerfMode::off)
    return;
  Reporting& reporting = impl_->reporting.get();
  const std::scoped_lock lock(reporting.mutex);
  if (reporting.failed)
    return;
  Status status;
  if (!reporting.file) {
    Result<std::unique_ptr<PerfFile>> opened = impl_->mode == PerfMode::map ? open_perf_map() : open_jitdump();
    if (opened)
      reporting.file = std::move(*opened);
    else
      status = opened.status();
  }
  if (status)
    status = reporting.file->add(code, size, name);
  if (!status) {
    reporting.failed = true;
    impl_->log.warn(fmt::format("KILN_PERF: {}; no further kernels are reported", status.message()));
  }
}

} // namespace kiln
