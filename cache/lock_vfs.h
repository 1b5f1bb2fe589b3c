#pragma once
#include <memory>
#include <string>

#include "cache/file_descriptor.h"

struct sqlite3;

namespace kiln {

/// SQLite's file system for one connection, with other locks: those of open file descriptions (fcntl(2), F_OFD_SETLK)
/// in the place of the process's, on the same bytes (sqlite.org/lockingv3.html), so that other users of SQLite and Kiln
/// keep each other out as before.
///
/// Why: the locks that SQLite takes belong to the process. Two copies of SQLite in one process (two packages that each
/// bring their own Kiln, a plugin loaded with dlmopen) do not see each other's, write at the same time, and whichever
/// closes the file drops the other's locks. Those of open file descriptions lie between any two connections, and only
/// their own close drops them. Where the system has none, SQLite's own serve.
///
/// Never stays registered with SQLite, whose list of file systems is the host's too and may outlive this library.
class LockVfs {
public:
  LockVfs();
  ~LockVfs(); ///< after the connection is closed
  LockVfs(const LockVfs&) = delete;
  LockVfs& operator=(const LockVfs&) = delete;

  /// sqlite3_open_v2 of a file that exists. SQLITE_CANTOPEN when what lies under the path by then is not `expected`.
  int open(const std::string& path, const FileIdentity& expected, int flags, sqlite3** handle);

  /// Whether the descriptors are still the connection's. Where the host closed them, SQLite must not touch the
  /// connection again, not even to close it: their numbers may stand for files of the host's by now.
  bool is_intact() const;

private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

} // namespace kiln
