#pragma once
#include <csignal>

namespace kiln {

/// While one lives, a write of this thread beyond the process's limit on file sizes (RLIMIT_FSIZE) fails with EFBIG
/// only; without, it also raises SIGXFSZ, which ends a host that does not expect it. Nothing of the host's changes but
/// this thread's signal mask, which is put back. Costs one system call where there is no limit.
class FileSizeLimit {
public:
  FileSizeLimit();
  ~FileSizeLimit();
  FileSizeLimit(const FileSizeLimit&) = delete;
  FileSizeLimit& operator=(const FileSizeLimit&) = delete;

private:
  bool blocks_ = false;
  sigset_t mask_before_;
};

} // namespace kiln
