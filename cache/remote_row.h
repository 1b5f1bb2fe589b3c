#pragma once
#include <cstddef>
#include <optional>
#include <string>

#include "cache/bytes.h"
#include "cache/digest.h"
#include "cache/signing.h"
#include "cache/status.h"
#include "cache/store.h"

namespace kiln {

/// One kernel as a remote tier holds it: a header of fixed size with an Ed25519 signature, then an entry
/// (cache/entry.h). api/doc/remote.md describes it byte by byte.
struct RemoteRowLimits {
  static constexpr std::size_t header_bytes = 8 + 4 + 32 + 64;
  static constexpr std::size_t bytes = 512 << 10; ///< of a row with its header
};

/// The name under which a remote tier holds the kernel: `kiln:1:` and its key in hexadecimal.
std::string remote_name_of(const Digest& key);
/// The other way round; nothing for other names.
std::optional<Digest> key_of_remote_name(std::string_view name);

/// The same bytes for the same kernel and key. Code::invalid_argument when the row's texts cannot travel, or it passes
/// RemoteRowLimits::bytes.
Result<Bytes> make_remote_row(const StoreRow& row, const SecretKey& key);

/// The row, with its signature, when one of the trusted keys signed exactly these bytes for this kernel's key.
/// Code::integrity says why not. Nothing beyond the header is looked at before the signature is found right.
Result<StoreRow> read_remote_row(ByteSpan bytes, const Digest& key, const TrustedKeys& trusted);

/// Who signed the row that a remote tier once gave; nothing for other rows, or when the signature is not that of what
/// the row says.
std::optional<PublicKey> signer_of(const StoreRow& row);

} // namespace kiln
