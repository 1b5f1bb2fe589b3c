#include "cache/file_lock.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include <fmt/format.h>

namespace kiln {
namespace {

std::uint64_t id_of(const struct stat& info) {
  return (static_cast<std::uint64_t>(info.st_dev) << 48) ^ info.st_ino;
}

/// The descriptors of this process that a child must not keep.
struct OpenFiles {
  struct File {
    int descriptor;
    std::uint64_t id;
  };
  std::mutex mutex; ///< held from before a descriptor is made until it is listed, and while fork copies the process
  std::vector<File> files;

  /// Lives as long as the process: threads may still hold locks when static objects are destroyed.
  static OpenFiles& get() {
    static OpenFiles* const files = [] {
      auto* made = new OpenFiles;
      // Registered with this library's handle: glibc drops the handlers when it is unloaded.
      pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); }, [] { get().close_in_child(); });
      return made;
    }();
    return *files;
  }

  static void close_if_same(const File& file) {
    struct stat info;
    if (::fstat(file.descriptor, &info) == 0 && id_of(info) == file.id)
      ::close(file.descriptor);
  }

  void close_in_child() {
    for (const File& file : files)
      close_if_same(file);
    files.clear();
    mutex.unlock();
  }
};

/// Ok with 0, or errno.
int try_lock(int file, std::uint64_t byte, FileLock::Kind kind) {
  struct flock range {};
  range.l_type = kind == FileLock::Kind::exclusive ? F_WRLCK : F_RDLCK;
  range.l_whence = SEEK_SET;
  range.l_start = static_cast<off_t>(byte);
  range.l_len = 1;
  return ::fcntl(file, F_OFD_SETLK, &range) == 0 ? 0 : errno;
}

} // namespace

Result<FileLock> FileLock::take(const std::string& path, std::uint64_t byte, Kind kind,
                                std::chrono::milliseconds patience, Missing missing) {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  const auto failed = [&](const char* doing, int error) {
    return Status::error(error == ENOENT ? Code::not_found : Code::io,
                         fmt::format("{}: cannot {}: {}", path, doing, std::strerror(error)));
  };
  // A shared lock needs a descriptor for reading, an exclusive one for writing. O_NONBLOCK: a pipe must not hang us.
  const int access = (missing == Missing::create ? O_RDWR | O_CREAT : kind == Kind::exclusive ? O_RDWR : O_RDONLY);
  FileLock lock;
  {
    OpenFiles& open_files = OpenFiles::get();
    const std::lock_guard guard(open_files.mutex);
    open_files.files.reserve(open_files.files.size() + 1);
    const int file = ::open(path.c_str(), access | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600);
    if (file < 0)
      return failed("open", errno);
    struct stat info;
    if (::fstat(file, &info) != 0 || !S_ISREG(info.st_mode) || info.st_uid != ::geteuid()) {
      ::close(file);
      return Status::error(Code::io, fmt::format("{}: needed is a file of uid {}", path, ::geteuid()));
    }
    lock.file_ = file;
    lock.file_id_ = id_of(info);
    lock.process_ = ::getpid();
    open_files.files.push_back({file, lock.file_id_});
  }
  auto pause = std::chrono::microseconds(250);
  for (;;) {
    const int error = try_lock(lock.file_, byte, kind);
    if (error == 0)
      return lock;
    if (error != EAGAIN && error != EACCES && error != EINTR)
      return failed("lock", error);
    const auto now = std::chrono::steady_clock::now();
    if (now >= deadline)
      return Status::error(Code::busy, fmt::format("{}: byte {} is locked by another", path, byte));
    lock.waited_ = true;
    std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(pause, deadline - now));
    pause = std::min(pause * 2, std::chrono::microseconds(4000));
  }
}

void FileLock::release() {
  const int file = std::exchange(file_, -1);
  if (file < 0 || process_ != ::getpid()) // a child's copy was closed when it was made
    return;
  OpenFiles& open_files = OpenFiles::get();
  const std::lock_guard guard(open_files.mutex);
  std::erase_if(open_files.files, [&](const OpenFiles::File& open) { return open.descriptor == file; });
  OpenFiles::close_if_same({file, file_id_}); // the only descriptor of its description: the lock goes with it
}

} // namespace kiln
