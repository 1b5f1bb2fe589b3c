#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "cache/bytes.h"
#include "cache/file_descriptor.h"
#include "cache/status.h"

struct stat;

namespace kiln {

/// A directory that nobody but the superuser and this process's user can have put in its place, or can take away.
///
/// It was reached from the root one part at a time, each opened relative to the one before and looked at while it was
/// open. Every directory on the way belongs to the superuser or the user, and group and others may not write it. One
/// with the sticky bit, such as /tmp, may be written by others: nobody can rename there what is not his; but nothing is
/// mounted in it that a user may have mounted (FUSE). A symbolic link is followed when it belongs to the superuser or
/// the user and lies in a directory that others may not write
/// (/home → /usr/home, ~/.cache → /scratch/me/cache); what it points to is walked by the same rules. The last part is
/// never a link.
///
/// In a user namespace that maps neither the superuser nor uid 65534 (sandboxes), owners outside it show as uid 65534
/// (user_namespaces(7)), and a directory on the way counts as the superuser's.
///
/// Access control lists need no look: what they grant shows in the group's bits (acl(5)).
class TrustedDirectory {
public:
  enum class Owner : std::uint8_t {
    user,              ///< this process's user
    user_or_superuser, ///< either
  };
  enum class Missing : std::uint8_t {
    create, ///< directories that are not there are made with mode 0700
    leave,  ///< Code::not_found
  };
  /// `path` is absolute; `owner` is asked of the last directory. Code::io when a part of it is not trusted: the message
  /// names that part, its owner and mode, what is needed and, where there is one, the command that mends it. Some 3 µs
  /// for each part of the path.
  static Result<TrustedDirectory> open(const std::string& path, Owner owner, Missing missing);

  /// Absolute and without links.
  const std::string& path() const { return path_; }
  std::string path_of(std::string_view name) const { return path_ + "/" + std::string(name); }
  /// For calls that take a directory (`openat`); open for nothing else (O_PATH).
  int descriptor() const { return directory_.get(); }

  // Of a file in this directory. Its name has no slash; a link under it is refused, never followed.

  enum class Privacy : std::uint8_t {
    own,    ///< belongs to the user, group and others may not write it
    secret, ///< nor read it
  };
  /// Its identity when it is a regular file of this privacy. Does not open it. Code::not_found, Code::io.
  Result<FileIdentity> check_file(const char* name, Privacy privacy) const;
  /// Likewise, and opens it for reading.
  Result<FileDescriptor> open_file(const char* name, Privacy privacy) const;
  /// Makes the file with mode 0600 and this content, whole or not at all. Ok too when it exists already, whatever is in
  /// it: of two processes that make it at once both go on with the first one's.
  Status create_file(const char* name, ByteSpan content) const;

private:
  TrustedDirectory() = default;
  FileDescriptor directory_;
  std::string path_;
};

/// Whether nobody but the superuser and this process's user may write what this describes.
bool others_may_write(const struct stat& info);
/// `PATH is not trusted: it is a directory of uid 7 with mode 0777; needed is …`
Status not_trusted(const std::string& path, const struct stat& info, std::string_view needed);
/// `uid 0 or 1000`: the superuser's and this process's user's.
std::string trusted_owners();

} // namespace kiln
