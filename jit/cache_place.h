#pragma once
#include <string>

#include "cache/store.h"
#include "jit/os.h"

namespace kiln {

/// Where the cache on disk lies, and its key.
struct CachePlace {
  std::string directory, key_directory;
  std::string moved; ///< why `directory` is not the one that was asked for, for people; empty when it is
  bool none = false; ///< no directory serves: the cache is off, and `moved` says so
};

using FileSystemOf = os::FileSystem (*)(const std::string& path);

/// Keeps the cache away from file systems over a network, wherever they are asked for: locks between machines do not
/// hold there or hang, and what others change appears late. In their place comes a directory of this machine, the first
/// that is fit: `/var/tmp/kiln-UID` (outlives a restart), `$XDG_RUNTIME_DIR/kiln`, `/tmp/kiln-UID`. The key goes with
/// the cache when it is over a network too: a moved cache has no use for one that lives longer, and not all such file
/// systems keep a file closed to others.
///
/// Makes nothing. All paths absolute; `runtime_directory` may be empty.
CachePlace place_cache(std::string directory, std::string key_directory, const std::string& runtime_directory,
                       FileSystemOf file_system_of);

} // namespace kiln
