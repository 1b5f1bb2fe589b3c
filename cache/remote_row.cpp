#include "cache/remote_row.h"

#include <algorithm>
#include <array>
#include <fmt/format.h>

#include "cache/entry.h"

namespace kiln {
namespace {

constexpr std::array<std::uint8_t, 8> magic = {'K', 'I', 'L', 'N', '-', 'R', 'O', 'W'};
constexpr std::uint32_t format_version = 1;
/// With the format's version, so that processes of two versions share a database.
constexpr std::string_view name_prefix = "kiln:1:";

/// What is signed: all of the header but the signature, the kernel's key, and the digest of the entry. The magic
/// keeps it apart from what the same secret key signs elsewhere.
Bytes signed_message(const PublicKey& signer, const Digest& key, ByteSpan entry) {
  Writer writer;
  writer.raw(magic);
  writer.u32(format_version);
  writer.raw(signer.bytes);
  writer.raw(key.bytes);
  writer.raw(digest_of(entry).bytes);
  return writer.take();
}

/// As the store's column has it: the signer, then the signature.
Bytes seal_of(const PublicKey& signer, const Signature& signature) {
  Writer writer;
  writer.raw(signer.bytes);
  writer.raw(signature);
  return writer.take();
}

template <std::size_t size> std::array<std::uint8_t, size> array_of(Reader& in) {
  std::array<std::uint8_t, size> out{};
  const ByteSpan bytes = in.raw(size);
  std::copy(bytes.begin(), bytes.end(), out.begin());
  return out;
}

} // namespace

std::string remote_name_of(const Digest& key) {
  return fmt::format("{}{}", name_prefix, key.hex());
}

std::optional<Digest> key_of_remote_name(std::string_view name) {
  return name.starts_with(name_prefix) ? Digest::from_hex(name.substr(name_prefix.size())) : std::nullopt;
}

Result<Bytes> make_remote_row(const StoreRow& row, const SecretKey& key) {
  const auto no_row = [&](std::string_view why) {
    return Status::error(Code::invalid_argument,
                         fmt::format("kernel {} is not for a remote tier: {}", row.key.hex(), why));
  };
  if (const std::string fault = fault_of_texts(row); !fault.empty())
    return no_row(fault);
  const Bytes entry = entry_of(row);
  const std::size_t bytes = RemoteRowLimits::header_bytes + entry.size();
  if (bytes > RemoteRowLimits::bytes)
    return no_row(fmt::format("its row has {} bytes; allowed are {}", bytes, RemoteRowLimits::bytes));
  const PublicKey signer = key.public_key();
  Writer writer;
  writer.raw(magic);
  writer.u32(format_version);
  writer.raw(signer.bytes);
  writer.raw(key.sign(signed_message(signer, row.key, entry)));
  writer.raw(entry);
  return writer.take();
}

Result<StoreRow> read_remote_row(ByteSpan bytes, const Digest& key, const TrustedKeys& trusted) {
  const auto bad = [&](std::string_view why) {
    return Status::error(Code::integrity, fmt::format("kernel {}: {}", key.hex(), why));
  };
  if (bytes.size() < RemoteRowLimits::header_bytes || bytes.size() > RemoteRowLimits::bytes)
    return bad(fmt::format("its row has {} bytes; allowed are {} to {}", bytes.size(), RemoteRowLimits::header_bytes,
                           RemoteRowLimits::bytes));
  Reader header(bytes.first(RemoteRowLimits::header_bytes));
  if (array_of<magic.size()>(header) != magic)
    return bad("its row does not begin with KILN-ROW");
  if (const std::uint32_t version = header.u32(); version != format_version)
    return bad(fmt::format("its row is of format version {}; this version of Kiln reads {}", version, format_version));
  const PublicKey signer{array_of<sizeof(PublicKey)>(header)};
  const Signature signature = array_of<sizeof(Signature)>(header);
  if (!trusted.contains(signer))
    return bad(fmt::format("its row names key {}, which is not in the list of trusted keys", signer.id()));
  const ByteSpan entry = bytes.subspan(RemoteRowLimits::header_bytes);
  if (!is_signed_by(signer, signed_message(signer, key, entry), signature))
    return bad(fmt::format("the signature of its row is not that of key {}, which the row names: it was changed, or "
                           "made for another kernel",
                           signer.id()));
  StoreRow row;
  row.key = key;
  if (const std::string fault = read_entry(entry, row); !fault.empty())
    return bad(fault);
  row.signature = seal_of(signer, signature);
  return row;
}

std::optional<PublicKey> signer_of(const StoreRow& row) {
  Reader in(row.signature);
  const PublicKey signer{array_of<sizeof(PublicKey)>(in)};
  const Signature signature = array_of<sizeof(Signature)>(in);
  if (!in.finished() || !is_signed_by(signer, signed_message(signer, row.key, entry_of(row)), signature))
    return std::nullopt;
  return signer;
}

} // namespace kiln
