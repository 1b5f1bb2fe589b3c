#include "cache/bundle.h"

#include <algorithm>
#include <fmt/format.h>
#include <memory>
#include <zstd.h>

#include "cache/entry.h"

namespace kiln {
namespace {

constexpr std::array<std::uint8_t, 8> magic = {'K', 'I', 'L', 'N', 'B', 'N', 'D', 'L'};
constexpr std::uint32_t format_version = 1;
constexpr std::uint8_t compression_zstd = 1;
enum class Authentication : std::uint8_t { digest = 0, ed25519 = 1 };

constexpr std::size_t header_bytes = 8 + 4 + 1 + 1 + 4 + 32;
constexpr std::size_t index_entry_bytes = 32 + 32 + 4 + 4;
/// Kernels are a few KiB: higher levels take longer and gain nothing that is worth it.
constexpr int compression_level = 9;

std::size_t seal_bytes(Authentication authentication) {
  return authentication == Authentication::ed25519 ? sizeof(Signature) : sizeof(Digest);
}

void append(Bytes& out, ByteSpan bytes) {
  out.insert(out.end(), bytes.begin(), bytes.end());
}

Result<Bytes> compressed(ZSTD_CCtx* context, const Bytes& bytes) {
  Bytes out(ZSTD_compressBound(bytes.size()));
  const std::size_t size =
      ZSTD_compressCCtx(context, out.data(), out.size(), bytes.data(), bytes.size(), compression_level);
  if (ZSTD_isError(size))
    return Status::error(Code::internal, fmt::format("cannot compress: {}", ZSTD_getErrorName(size)));
  out.resize(size);
  return out;
}

Status not_made(std::string why) {
  return Status::error(Code::invalid_argument, "no bundle: " + std::move(why));
}

/// By key, each once.
Result<std::vector<const StoreRow*>> sorted(std::span<const StoreRow> rows) {
  if (rows.empty() || rows.size() > BundleLimits::entries)
    return not_made(fmt::format("{} kernels; allowed are 1 to {}", rows.size(), BundleLimits::entries));
  std::vector<const StoreRow*> out;
  for (const StoreRow& row : rows)
    out.push_back(&row);
  std::sort(out.begin(), out.end(), [](const StoreRow* a, const StoreRow* b) { return a->key < b->key; });
  for (std::size_t i = 1; i < out.size(); ++i)
    if (out[i - 1]->key == out[i]->key)
      return not_made(fmt::format("kernel {} is given twice", out[i]->key.hex()));
  return out;
}

} // namespace

Result<Bytes> make_bundle(std::span<const StoreRow> rows, const SecretKey* key) {
  const Result<std::vector<const StoreRow*>> in_order = sorted(rows);
  if (!in_order)
    return in_order.status();
  const std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> context(ZSTD_createCCtx(), &ZSTD_freeCCtx);
  if (!context)
    return Status::error(Code::out_of_memory, "no memory to compress");

  Writer index;
  Bytes entries;
  std::uint64_t all_bytes = 0;
  for (const StoreRow* row : *in_order) {
    if (const std::string fault = fault_of_texts(*row); !fault.empty())
      return not_made(fmt::format("kernel {}: {}", row->key.hex(), fault));
    const Bytes plain = entry_of(*row);
    all_bytes += plain.size();
    if (plain.size() > BundleLimits::entry_bytes || all_bytes > BundleLimits::all_bytes)
      return not_made(fmt::format("kernel {} has {} bytes, and those up to it have {}; allowed are {} and {}",
                                  row->key.hex(), plain.size(), all_bytes, BundleLimits::entry_bytes,
                                  BundleLimits::all_bytes));
    const Result<Bytes> stored = compressed(context.get(), plain);
    if (!stored)
      return stored.status();
    index.raw(row->key.bytes);
    index.raw(digest_of(*stored).bytes);
    index.u32(static_cast<std::uint32_t>(stored->size()));
    index.u32(static_cast<std::uint32_t>(plain.size()));
    append(entries, *stored);
  }

  const Authentication authentication = key != nullptr ? Authentication::ed25519 : Authentication::digest;
  Writer front;
  front.raw(magic);
  front.u32(format_version);
  front.u8(compression_zstd);
  front.u8(static_cast<std::uint8_t>(authentication));
  front.u32(static_cast<std::uint32_t>(rows.size()));
  front.raw(key != nullptr ? key->public_key().bytes : PublicKey().bytes);
  front.raw(index.bytes());
  Bytes out = front.take();
  if (key != nullptr)
    append(out, key->sign(out));
  else
    append(out, digest_of(out).bytes);
  append(out, entries);
  return out;
}

Status Bundle::damaged(std::string what) const {
  return Status::error(Code::integrity, fmt::format("{}: {}", path_, std::move(what)));
}

Result<Bundle> Bundle::open(FileDescriptor file, std::string path) {
  Bundle bundle;
  bundle.file_ = std::move(file);
  bundle.path_ = std::move(path);
  if (Status status = bundle.read_front(); !status)
    return status;
  return bundle;
}

/// Header, index and seal. Nothing of the index is looked at before the seal is found right.
Status Bundle::read_front() {
  const std::uint64_t file_bytes = size_of(file_);
  if (file_bytes < header_bytes)
    return damaged(fmt::format("no bundle: it has {} bytes, fewer than a header", file_bytes));
  const Result<Bytes> header = read_at(file_, path_, 0, header_bytes);
  if (!header)
    return header.status();
  Reader in(*header);
  const ByteSpan word = in.raw(magic.size());
  if (!std::equal(word.begin(), word.end(), magic.begin(), magic.end()))
    return damaged("no bundle: it does not begin with KILNBNDL");
  if (const std::uint32_t version = in.u32(); version != format_version)
    return Status::error(Code::unsupported,
                         fmt::format("{}: a bundle of format version {}; this version of Kiln reads {}", path_, version,
                                     format_version));
  if (const std::uint8_t compression = in.u8(); compression != compression_zstd)
    return damaged(fmt::format("compression {}; allowed is {} (zstd)", compression, compression_zstd));
  const std::uint8_t authentication_id = in.u8();
  if (authentication_id > static_cast<std::uint8_t>(Authentication::ed25519))
    return damaged(fmt::format("authentication {}; allowed are 0 (none) and 1 (Ed25519)", authentication_id));
  const auto authentication = static_cast<Authentication>(authentication_id);
  const std::uint32_t count = in.u32();
  if (count == 0 || count > BundleLimits::entries)
    return damaged(fmt::format("{} entries; allowed are 1 to {}", count, BundleLimits::entries));
  PublicKey key;
  const ByteSpan key_bytes = in.raw(key.bytes.size());
  std::copy(key_bytes.begin(), key_bytes.end(), key.bytes.begin());

  const std::size_t signed_bytes = header_bytes + count * index_entry_bytes;
  const std::size_t front_bytes = signed_bytes + seal_bytes(authentication);
  if (file_bytes < front_bytes)
    return damaged(fmt::format("cut short: it has {} bytes, its header and index take {}", file_bytes, front_bytes));
  const Result<Bytes> front = read_at(file_, path_, 0, front_bytes);
  if (!front)
    return front.status();
  const ByteSpan message = ByteSpan(*front).first(signed_bytes), seal = ByteSpan(*front).subspan(signed_bytes);
  // Read again: what is authenticated must be what was looked at.
  if (!std::equal(header->begin(), header->end(), message.begin()))
    return damaged("it changed while it was read");
  if (authentication == Authentication::ed25519) {
    Signature signature;
    std::copy(seal.begin(), seal.end(), signature.begin());
    if (!is_signed_by(key, message, signature))
      return damaged(fmt::format(
          "the signature is not that of key {}, which the bundle names: it was changed or damaged", key.id()));
    signer_ = key;
  } else {
    if (key != PublicKey())
      return damaged("it is unsigned, and yet names a key");
    const Digest digest = digest_of(message);
    if (!std::equal(seal.begin(), seal.end(), digest.bytes.begin()))
      return damaged("its digest is wrong: it was changed or damaged");
  }

  Reader index(message.subspan(header_bytes));
  std::uint64_t offset = front_bytes, all_bytes = 0;
  for (std::uint32_t i = 0; i < count; ++i) {
    Entry& entry = entries_.emplace_back();
    for (Digest* digest : {&entry.key, &entry.stored_digest}) {
      const ByteSpan bytes = index.raw(digest->bytes.size());
      std::copy(bytes.begin(), bytes.end(), digest->bytes.begin());
    }
    entry.stored_bytes = index.u32();
    entry.bytes = index.u32();
    entry.offset = offset;
    offset += entry.stored_bytes;
    all_bytes += entry.bytes;
    if (entry.bytes > BundleLimits::entry_bytes || entry.stored_bytes > ZSTD_compressBound(entry.bytes) ||
        all_bytes > BundleLimits::all_bytes)
      return damaged(
          fmt::format("entry {} has {} bytes ({} compressed), the entries up to it {}; allowed are {} and {}", i,
                      entry.bytes, entry.stored_bytes, all_bytes, BundleLimits::entry_bytes, BundleLimits::all_bytes));
    if (i > 0 && entries_[i - 1].key >= entry.key)
      return damaged(fmt::format("entry {} is not in the order of keys", i));
  }
  if (offset != file_bytes)
    return damaged(fmt::format("it has {} bytes, its entries end at {}: it was cut short or something follows its end",
                               file_bytes, offset));
  return {};
}

const Bundle::Entry* Bundle::find(const Digest& key) const {
  const auto found = std::lower_bound(entries_.begin(), entries_.end(), key,
                                      [](const Entry& entry, const Digest& wanted) { return entry.key < wanted; });
  return found != entries_.end() && found->key == key ? &*found : nullptr;
}

Result<StoreRow> Bundle::read(const Entry& entry) const {
  const Result<Bytes> stored = read_at(file_, path_, entry.offset, entry.stored_bytes);
  if (!stored)
    return stored.status();
  const auto bad = [&](std::string_view what) { return damaged(fmt::format("kernel {}: {}", entry.key.hex(), what)); };
  // Before the decompressor, and whatever else parses, sees a byte of it.
  if (digest_of(*stored) != entry.stored_digest)
    return bad("its digest is wrong: it was changed or damaged");
  if (ZSTD_getFrameContentSize(stored->data(), stored->size()) != entry.bytes ||
      ZSTD_findFrameCompressedSize(stored->data(), stored->size()) != stored->size())
    return bad("it is not one zstd frame of the size that the index says");
  Bytes plain(entry.bytes);
  if (ZSTD_decompress(plain.data(), plain.size(), stored->data(), stored->size()) != plain.size())
    return bad("it cannot be decompressed");

  StoreRow row;
  row.key = entry.key;
  if (const std::string fault = read_entry(plain, row); !fault.empty())
    return bad(fault);
  return row;
}

} // namespace kiln
