#include "cache/own_descriptor.h"

#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <optional>
#include <vector>

namespace kiln {
namespace {

/// Of the file or socket behind a descriptor; nothing when it stands for none.
std::optional<std::uint64_t> id_of(int descriptor) {
  struct stat info;
  if (::fstat(descriptor, &info) != 0)
    return std::nullopt;
  return (static_cast<std::uint64_t>(info.st_dev) << 48) ^ info.st_ino;
}

/// The descriptors of this process that a child must not keep.
struct OpenDescriptors {
  struct Entry {
    int descriptor;
    std::uint64_t id;
  };
  std::mutex mutex; ///< held from before a descriptor is made until it is listed, and while fork copies the process
  std::vector<Entry> entries;

  /// Lives as long as the process: threads may still hold some when static objects are destroyed.
  static OpenDescriptors& get() {
    static OpenDescriptors* const open = [] {
      auto* made = new OpenDescriptors;
      // Registered with this library's handle: glibc drops the handlers when it is unloaded.
      pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); }, [] { get().close_in_child(); });
      return made;
    }();
    return *open;
  }

  static void close_if_same(const Entry& entry) {
    if (id_of(entry.descriptor) == entry.id)
      ::close(entry.descriptor);
  }

  void close_in_child() {
    for (const Entry& entry : entries)
      close_if_same(entry);
    entries.clear();
    mutex.unlock();
  }
};

} // namespace

OwnDescriptor::Fork::Fork() {
  OpenDescriptors& open = OpenDescriptors::get();
  open.mutex.lock();
  try {
    open.entries.reserve(open.entries.size() + 1);
  } catch (...) {
    open.mutex.unlock();
    throw;
  }
}

OwnDescriptor::Fork::~Fork() {
  OpenDescriptors::get().mutex.unlock();
}

OwnDescriptor::OwnDescriptor(int descriptor) {
  if (descriptor < 0)
    return;
  const std::optional<std::uint64_t> id = id_of(descriptor);
  if (!id) {
    ::close(descriptor);
    return;
  }
  descriptor_ = descriptor;
  id_ = *id;
  process_ = ::getpid();
  OpenDescriptors::get().entries.push_back({descriptor, id_}); // room for it was made
}

bool OwnDescriptor::is_ours() const {
  return held() && process_ == ::getpid() && id_of(descriptor_) == id_;
}

void OwnDescriptor::close() {
  const int descriptor = std::exchange(descriptor_, -1);
  if (descriptor < 0 || process_ != ::getpid()) // a child's copy was closed when it was made
    return;
  OpenDescriptors& open = OpenDescriptors::get();
  const std::lock_guard guard(open.mutex);
  std::erase_if(open.entries, [&](const auto& entry) { return entry.descriptor == descriptor; });
  OpenDescriptors::close_if_same({descriptor, id_});
}

} // namespace kiln
