#include "cache/process_descriptor.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <vector>

namespace kiln {
namespace {

bool is_same(int descriptor, const FileIdentity& file) {
  struct stat info;
  return ::fstat(descriptor, &info) == 0 && identity_of(info).is_same_file(file);
}

/// The descriptors of this process that a child must not keep.
struct OpenDescriptors {
  struct Entry {
    int descriptor;
    FileIdentity file;
  };
  std::mutex mutex; ///< held from before a descriptor is made until it is listed, and while fork copies the process
  std::vector<Entry> entries;

  /// Lives as long as the process: threads may still hold locks when static objects are destroyed.
  static OpenDescriptors& get() {
    static OpenDescriptors* const descriptors = [] {
      auto* made = new OpenDescriptors;
      // Registered with this library's handle: glibc drops the handlers when it is unloaded.
      pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); }, [] { get().close_in_child(); });
      return made;
    }();
    return *descriptors;
  }

  void close_in_child() {
    for (const Entry& entry : entries)
      if (is_same(entry.descriptor, entry.file))
        ::close(entry.descriptor);
    entries.clear();
    mutex.unlock();
  }
};

} // namespace

ProcessDescriptor ProcessDescriptor::make(const std::function<int()>& make_descriptor) {
  OpenDescriptors& open = OpenDescriptors::get();
  const std::lock_guard guard(open.mutex);
  open.entries.reserve(open.entries.size() + 1);
  ProcessDescriptor out;
  const int descriptor = make_descriptor();
  if (descriptor < 0)
    return out;
  struct stat info;
  if (::fstat(descriptor, &info) != 0) {
    const int error = errno;
    ::close(descriptor);
    errno = error;
    return out;
  }
  out.descriptor_ = descriptor;
  out.file_ = identity_of(info);
  out.process_ = current_process();
  open.entries.push_back({descriptor, out.file_});
  return out;
}

ProcessDescriptor ProcessDescriptor::open_at(int directory, const char* path, int flags, mode_t mode) {
  return make([&] { return ::openat(directory, path, flags | O_CLOEXEC, mode); });
}

void ProcessDescriptor::prepare_for_forks() {
  OpenDescriptors::get();
}

bool ProcessDescriptor::is_ours() const {
  return descriptor_ >= 0 && process_ == current_process() && is_same(descriptor_, file_);
}

void ProcessDescriptor::close() {
  const int descriptor = std::exchange(descriptor_, -1);
  if (descriptor < 0 || process_ != current_process()) // a child's copy was closed when it was made
    return;
  OpenDescriptors& open = OpenDescriptors::get();
  const std::lock_guard guard(open.mutex);
  std::erase_if(open.entries, [&](const auto& entry) { return entry.descriptor == descriptor; });
  if (is_same(descriptor, file_))
    ::close(descriptor);
}

} // namespace kiln
