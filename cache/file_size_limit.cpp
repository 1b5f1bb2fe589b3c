#include "cache/file_size_limit.h"

#include <pthread.h>
#include <sys/resource.h>

#include <cerrno>
#include <ctime>

namespace kiln {
namespace {

sigset_t only_file_size() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGXFSZ);
  return set;
}

bool is_pending() {
  sigset_t pending;
  return ::sigpending(&pending) == 0 && sigismember(&pending, SIGXFSZ) == 1;
}

} // namespace

FileSizeLimit::FileSizeLimit() {
  rlimit limit;
  if (::getrlimit(RLIMIT_FSIZE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY)
    return;
  // One that is pending already is blocked already, and not ours to take away.
  const sigset_t set = only_file_size();
  blocks_ = !is_pending() && ::pthread_sigmask(SIG_BLOCK, &set, &mask_before_) == 0;
}

FileSizeLimit::~FileSizeLimit() {
  if (!blocks_)
    return;
  const int error = errno;
  const sigset_t set = only_file_size();
  const timespec now{};
  while (is_pending() && (::sigtimedwait(&set, nullptr, &now) == SIGXFSZ || errno == EINTR)) {
  }
  ::pthread_sigmask(SIG_SETMASK, &mask_before_, nullptr);
  errno = error;
}

} // namespace kiln
