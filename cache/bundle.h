#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cache/bytes.h"
#include "cache/digest.h"
#include "cache/signing.h"
#include "cache/status.h"
#include "cache/store.h"
#include "cache/trusted_file.h"

namespace kiln {

/// Kernels in one file that travels between machines: signed, compressed, and readable one by one. Its format is
/// described, byte by byte, in api/doc/bundle.md.

/// Far above what caches hold: they keep a damaged or hostile file from asking for memory or time. The writer keeps to
/// them, too.
struct BundleLimits {
  static constexpr std::uint32_t entries = 100'000;
  static constexpr std::uint32_t entry_bytes = 64u << 20; ///< of one entry, decompressed
  static constexpr std::uint64_t all_bytes = 1ull << 30;  ///< of all entries together, decompressed
};

/// The bundle of these rows: the same bytes for the same rows in any order (and the same version of libzstd), whatever
/// their times, hits and compile times, which it leaves out. Unsigned without a key. Code::invalid_argument when there
/// is no row, a key is there twice, or a limit is passed.
Result<Bytes> make_bundle(std::span<const StoreRow> rows, const SecretKey* key);

/// A bundle that is open for reading. open() has authenticated everything but the entries' bytes, of which it has the
/// authentic digests; read() authenticates those before it decompresses them. Reading is thread-safe and leaves the
/// file's position alone.
class Bundle {
public:
  struct Entry {
    Digest key;
    Digest stored_digest;           ///< of its bytes in the file
    std::uint32_t stored_bytes = 0; ///< compressed
    std::uint32_t bytes = 0;        ///< decompressed
    std::uint64_t offset = 0;       ///< in the file
  };

  /// Code::integrity when the file is no bundle, is damaged, or its signature is not that of the key it names;
  /// Code::unsupported for another version of the format. Whether that key is trusted is for the caller to decide.
  /// `path` is for messages.
  static Result<Bundle> open(FileDescriptor file, std::string path);

  /// Who signed it; nothing when it is unsigned. Then its digests tell rot from sound files, and nothing else.
  const std::optional<PublicKey>& signer() const { return signer_; }
  const std::vector<Entry>& entries() const { return entries_; } ///< in ascending order of their keys
  const Entry* find(const Digest& key) const;                    ///< null when it is not there

  /// The row without times (0) and hits. Code::integrity when it is not as it was when the bundle was made.
  Result<StoreRow> read(const Entry& entry) const;

  const FileDescriptor& file() const { return file_; }
  const std::string& path() const { return path_; }

private:
  Bundle() = default;
  Status read_front();
  Status damaged(std::string what) const;

  FileDescriptor file_;
  std::string path_;
  std::optional<PublicKey> signer_;
  std::vector<Entry> entries_;
};

} // namespace kiln
