#pragma once
#include <cstdint>
#include <utility>

namespace kiln {

/// An open descriptor that belongs to this process alone: a child made by fork inherits none, because its copies are
/// closed before fork returns there. (Whoever makes one opens it with O_CLOEXEC or SOCK_CLOEXEC against exec.) Hosts
/// close descriptors that they did not open: neither use nor close touches one that now stands for something else.
class OwnDescriptor {
public:
  /// Calls `open`, which returns a descriptor or -1 with errno, while no fork can happen. Not held when it failed;
  /// errno tells why.
  template <class Open> static OwnDescriptor make(Open open) {
    const Fork no_fork;
    return OwnDescriptor(open());
  }

  OwnDescriptor() = default;
  ~OwnDescriptor() { close(); }
  OwnDescriptor(OwnDescriptor&& other) noexcept { *this = std::move(other); }
  OwnDescriptor& operator=(OwnDescriptor&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    std::swap(id_, other.id_);
    std::swap(process_, other.process_);
    return *this;
  }

  bool held() const { return descriptor_ >= 0; }
  int get() const { return descriptor_; }
  /// Whether it still stands for what was opened, in the process that opened it.
  bool is_ours() const;
  void close();

private:
  /// Keeps this process from being forked by another thread.
  struct Fork {
    Fork();
    ~Fork();
  };
  explicit OwnDescriptor(int descriptor); ///< within Fork

  int descriptor_ = -1;
  std::uint64_t id_ = 0; ///< of what was opened
  int process_ = 0;
};

} // namespace kiln
