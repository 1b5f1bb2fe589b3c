#include "cache/lock_vfs.h"

#include <fcntl.h>
#include <sqlite3.h>
#include <unistd.h>

#include <cerrno>

#include <fmt/format.h>

#include "cache/process_descriptor.h"

namespace kiln {
namespace {

// The bytes that stand for SQLite's locks (sqlite.org/fileformat2.html#the_lock_byte_page).
constexpr off_t pending_byte = 0x40000000;
constexpr off_t reserved_byte = pending_byte + 1;
constexpr off_t shared_first = pending_byte + 2;
constexpr off_t shared_size = 510;

/// Ok with 0, or errno.
int set_lock(int file, short kind, off_t first, off_t size) {
  struct flock range {};
  range.l_type = kind;
  range.l_whence = SEEK_SET;
  range.l_start = first;
  range.l_len = size;
  int code = 0;
  do
    code = ::fcntl(file, F_OFD_SETLK, &range);
  while (code != 0 && errno == EINTR);
  return code == 0 ? 0 : errno;
}

/// Whether the system knows such locks at all: some sandboxes do not. Asked of a pipe: to close a second descriptor of
/// the database would drop the locks that SQLite takes there instead.
bool has_locks_of_descriptions() {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0)
    return true;
  struct flock range {};
  range.l_type = F_RDLCK;
  range.l_whence = SEEK_SET;
  range.l_len = 1;
  const bool known = ::fcntl(ends[0], F_OFD_GETLK, &range) == 0 || errno != EINVAL;
  ::close(ends[0]);
  ::close(ends[1]);
  return known;
}

int as_sqlite(int error, int otherwise) {
  if (error == EAGAIN || error == EACCES || error == ENOLCK)
    return SQLITE_BUSY;
  return error == 0 ? SQLITE_OK : otherwise;
}

} // namespace

struct LockVfs::Impl {
  /// What SQLite is given, and gives back.
  struct Registered {
    sqlite3_vfs vfs;
    Impl* impl;
  };
  /// SQLite's default file system, which does everything but lock. Its file lies after ours.
  sqlite3_vfs* behind = nullptr;
  Registered registered{};
  std::string name, path;
  FileIdentity expected;
  bool opened = false;
  ProcessDescriptor locks; ///< what the locks hang on; open as long as the connection is

  /// Is the file under the path the one that is expected, and the one that SQLite has open?
  int check(sqlite3_file* opened, int flags) {
    locks = ProcessDescriptor::open_at(AT_FDCWD, path.c_str(), flags | O_NOFOLLOW | O_NONBLOCK);
    if (!locks)
      return errno == ENOMEM ? SQLITE_NOMEM : SQLITE_CANTOPEN;
    int moved = 0;
    const int code = opened->pMethods->xFileControl(opened, SQLITE_FCNTL_HAS_MOVED, &moved);
    return locks.file().is_same_file(expected) && (code != SQLITE_OK || moved == 0) ? SQLITE_OK : SQLITE_CANTOPEN;
  }
};

namespace {

/// The database, as SQLite sees it.
struct File {
  sqlite3_file base;
  int level;                      ///< SQLITE_LOCK_NONE, …: of the locks held here
  const ProcessDescriptor* locks; ///< what they hang on
};
File& ours(sqlite3_file* file) {
  return *reinterpret_cast<File*>(file);
}
sqlite3_file* behind(sqlite3_file* file) {
  return reinterpret_cast<sqlite3_file*>(reinterpret_cast<File*>(file) + 1);
}

int lock(sqlite3_file* opened, int level) {
  File& file = ours(opened);
  if (level <= file.level)
    return SQLITE_OK;
  if (file.level == SQLITE_LOCK_NONE && !file.locks->is_ours())
    return SQLITE_IOERR_LOCK;
  const int descriptor = file.locks->get();
  // Whoever wants to write alone holds the pending byte, so that no new reader comes in between.
  if (level == SQLITE_LOCK_SHARED || (level == SQLITE_LOCK_EXCLUSIVE && file.level < SQLITE_LOCK_PENDING)) {
    const short kind = level == SQLITE_LOCK_SHARED ? F_RDLCK : F_WRLCK;
    if (const int error = set_lock(descriptor, kind, pending_byte, 1); error != 0)
      return as_sqlite(error, SQLITE_IOERR_LOCK);
  }
  if (level == SQLITE_LOCK_SHARED) {
    const int error = set_lock(descriptor, F_RDLCK, shared_first, shared_size);
    if (set_lock(descriptor, F_UNLCK, pending_byte, 1) != 0 && error == 0) {
      (void)set_lock(descriptor, F_UNLCK, shared_first, shared_size);
      return SQLITE_IOERR_UNLOCK;
    }
    if (error != 0)
      return as_sqlite(error, SQLITE_IOERR_LOCK);
  } else if (level == SQLITE_LOCK_RESERVED) {
    if (const int error = set_lock(descriptor, F_WRLCK, reserved_byte, 1); error != 0)
      return as_sqlite(error, SQLITE_IOERR_LOCK);
  } else {
    file.level = SQLITE_LOCK_PENDING; // kept where readers are still there: they end, and no new ones begin
    if (const int error = set_lock(descriptor, F_WRLCK, shared_first, shared_size); error != 0)
      return as_sqlite(error, SQLITE_IOERR_LOCK);
  }
  file.level = level;
  return SQLITE_OK;
}

int unlock(sqlite3_file* opened, int level) {
  File& file = ours(opened);
  if (level >= file.level)
    return SQLITE_OK;
  const int descriptor = file.locks->get();
  if (!file.locks->is_ours()) {
    // The locks went with the descriptor, whose number may be a file of the host's by now.
  } else if (level == SQLITE_LOCK_SHARED) {
    if (set_lock(descriptor, F_RDLCK, shared_first, shared_size) != 0)
      return SQLITE_IOERR_RDLOCK;
    if (set_lock(descriptor, F_UNLCK, pending_byte, 2) != 0) // and the reserved one
      return SQLITE_IOERR_UNLOCK;
  } else if (set_lock(descriptor, F_UNLCK, pending_byte, 2 + shared_size) != 0) {
    return SQLITE_IOERR_UNLOCK;
  }
  file.level = level;
  return SQLITE_OK;
}

int check_reserved_lock(sqlite3_file* opened, int* out) {
  const File& file = ours(opened);
  *out = file.level > SQLITE_LOCK_SHARED;
  if (*out != 0)
    return SQLITE_OK;
  struct flock range {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  range.l_start = reserved_byte;
  range.l_len = 1;
  if (::fcntl(file.locks->get(), F_OFD_GETLK, &range) != 0)
    return SQLITE_IOERR_CHECKRESERVEDLOCK;
  *out = range.l_type != F_UNLCK;
  return SQLITE_OK;
}

// Version 1: no shared memory, so no write-ahead log, and no memory mapping.
constexpr sqlite3_io_methods methods = {
    .iVersion = 1,
    .xClose = [](sqlite3_file* file) { return behind(file)->pMethods->xClose(behind(file)); },
    .xRead = [](sqlite3_file* file, void* buffer, int size,
                sqlite3_int64 at) { return behind(file)->pMethods->xRead(behind(file), buffer, size, at); },
    .xWrite = [](sqlite3_file* file, const void* data, int size,
                 sqlite3_int64 at) { return behind(file)->pMethods->xWrite(behind(file), data, size, at); },
    .xTruncate = [](sqlite3_file* file,
                    sqlite3_int64 size) { return behind(file)->pMethods->xTruncate(behind(file), size); },
    .xSync = [](sqlite3_file* file, int flags) { return behind(file)->pMethods->xSync(behind(file), flags); },
    .xFileSize = [](sqlite3_file* file,
                    sqlite3_int64* size) { return behind(file)->pMethods->xFileSize(behind(file), size); },
    .xLock = lock,
    .xUnlock = unlock,
    .xCheckReservedLock = check_reserved_lock,
    .xFileControl =
        [](sqlite3_file* file, int operation, void* argument) {
          return behind(file)->pMethods->xFileControl(behind(file), operation, argument);
        },
    .xSectorSize = [](sqlite3_file* file) { return behind(file)->pMethods->xSectorSize(behind(file)); },
    .xDeviceCharacteristics =
        [](sqlite3_file* file) { return behind(file)->pMethods->xDeviceCharacteristics(behind(file)); },
};

} // namespace

LockVfs::LockVfs() : impl_(std::make_unique<Impl>()) {}
LockVfs::~LockVfs() = default;

bool LockVfs::is_intact() const {
  return !impl_->opened || impl_->locks.is_ours();
}

int LockVfs::open(const std::string& path, const FileIdentity& expected, int flags, sqlite3** handle) {
  Impl& impl = *impl_;
  impl.behind = sqlite3_vfs_find(nullptr);
  if (impl.behind == nullptr)
    return SQLITE_CANTOPEN;
  impl.path = path;
  impl.expected = expected;
  impl.name = fmt::format("kiln-locks-{}", fmt::ptr(&impl)); // of this connection alone
  sqlite3_vfs& vfs = impl.registered.vfs;
  vfs = *impl.behind; // what is not replaced takes its own data with it
  vfs.pNext = nullptr;
  vfs.zName = impl.name.c_str();
  vfs.szOsFile += static_cast<int>(sizeof(File));
  vfs.xOpen = [](sqlite3_vfs* given, const char* file_name, sqlite3_file* file, int open_flags, int* out_flags) {
    Impl& self = *reinterpret_cast<Impl::Registered*>(given)->impl;
    file->pMethods = nullptr;
    int opened_with = 0;
    // Journals are not locked.
    const bool is_database = (open_flags & SQLITE_OPEN_MAIN_DB) != 0;
    const bool locks_here = is_database && has_locks_of_descriptions();
    sqlite3_file* const opened = locks_here ? behind(file) : file;
    opened->pMethods = nullptr;
    int code = self.behind->xOpen(self.behind, file_name, opened, open_flags, &opened_with);
    if (code == SQLITE_OK && is_database)
      // O_PATH: see has_locks_of_descriptions.
      code = self.check(opened, !locks_here ? O_PATH : (opened_with & SQLITE_OPEN_READWRITE) != 0 ? O_RDWR : O_RDONLY);
    if (code != SQLITE_OK) {
      if (opened->pMethods != nullptr)
        opened->pMethods->xClose(opened);
      file->pMethods = nullptr;
      return code;
    }
    self.opened = self.opened || is_database;
    if (locks_here)
      ours(file) = {{&methods}, SQLITE_LOCK_NONE, &self.locks};
    if (out_flags != nullptr)
      *out_flags = opened_with;
    return SQLITE_OK;
  };
  impl.registered.impl = &impl;
  if (const int code = sqlite3_vfs_register(&vfs, 0); code != SQLITE_OK)
    return code;
  const int code = sqlite3_open_v2(path.c_str(), handle, flags, impl.name.c_str());
  sqlite3_vfs_unregister(&vfs);
  return code;
}

} // namespace kiln
