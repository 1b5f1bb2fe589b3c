#pragma once
#include <cstdint>

namespace kiln {

/// What a child made by fork could not use if its parent was inside at that moment: libraries with locks of their own.
enum class ForkRegion : std::uint8_t {
  database, ///< SQLite
  generator ///< LLVM
};

/// A thread is inside while one of these lives. A fork waits until nobody is, at most a second: that is what a store or
/// a compile takes, several times over. Never one within another. A fork from within (by a host's log sink) waits in
/// vain.
class InForkRegion {
public:
  explicit InForkRegion(ForkRegion region);
  ~InForkRegion();
  InForkRegion(const InForkRegion&) = delete;
  InForkRegion& operator=(const InForkRegion&) = delete;

private:
  const ForkRegion region_;
  const unsigned process_;
};

/// Whether this process was forked all the same while a thread of its parent was inside, so that it must never enter.
bool was_forked_inside(ForkRegion region);

} // namespace kiln
