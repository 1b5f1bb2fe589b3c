#pragma once
#include <algorithm>
#include <string>
#include <zstd.h>

#include "cache/bundle.h"
#include "tests/fuzz/fuzz.h"

/// Bundles for the targets that read them. What a bundle is sealed with is no secret to who makes one, so what lies
/// behind the seal must stand on its own: these put it right.
namespace kiln::fuzz {

// As api/doc/bundle.md describes the file.
constexpr std::size_t kHeaderBytes = 50, kAuthenticationAt = 13, kCountAt = 14, kPublicKeyAt = 18;
constexpr std::size_t kIndexEntryBytes = 72, kStoredDigestAt = 32, kStoredBytesAt = 64;

/// With the digests that belong to it, and the key's signature where it has room for one; unchanged where there is
/// nothing to put right.
inline Bytes resealed(ByteSpan input, const SecretKey& key) {
  Bytes file(input.begin(), input.end());
  if (file.size() < kHeaderBytes)
    return file;
  const auto u32_at = [&](std::size_t at) { return Reader(ByteSpan(file).subspan(at)).u32(); };
  const bool is_signed = file[kAuthenticationAt] == 1;
  const std::size_t seal_bytes = is_signed ? sizeof(Signature) : sizeof(Digest);
  const std::uint64_t index_bytes = std::uint64_t{u32_at(kCountAt)} * kIndexEntryBytes;
  if (file.size() < kHeaderBytes + index_bytes + seal_bytes)
    return file;
  const auto put = [&](std::size_t at, ByteSpan bytes) {
    std::copy(bytes.begin(), bytes.end(), file.begin() + static_cast<std::ptrdiff_t>(at));
  };
  put(kPublicKeyAt, is_signed ? key.public_key().bytes : PublicKey().bytes);
  const std::size_t seal = kHeaderBytes + static_cast<std::size_t>(index_bytes);
  std::size_t stored = seal + seal_bytes;
  for (std::size_t entry = kHeaderBytes; entry < seal; entry += kIndexEntryBytes) {
    const std::size_t bytes = u32_at(entry + kStoredBytesAt);
    if (bytes > file.size() - stored)
      break;
    put(entry + kStoredDigestAt, digest_of(ByteSpan(file).subspan(stored, bytes)).bytes);
    stored += bytes;
  }
  const ByteSpan message = ByteSpan(file).first(seal);
  if (is_signed)
    put(seal, key.sign(message));
  else
    put(seal, digest_of(message).bytes);
  return file;
}

/// What follows the word `plain:` is one entry's bytes before compression, in a bundle that is sound but for them: no
/// fuzzer makes a frame of zstd's by chance. Other inputs are bundles.
inline Bytes bundle_in(ByteSpan input) {
  constexpr std::string_view word = "plain:";
  if (!text_of(input).starts_with(word))
    return Bytes(input.begin(), input.end());
  const ByteSpan plain = input.subspan(word.size());
  Bytes frame(ZSTD_compressBound(plain.size()));
  frame.resize(ZSTD_compress(frame.data(), frame.size(), plain.data(), plain.size(), 1));
  Writer out;
  out.raw({reinterpret_cast<const std::uint8_t*>("KILNBNDL"), 8});
  out.u32(1); // version
  out.u8(1);  // zstd
  out.u8(1);  // a seal of a signature's size
  out.u32(1); // entry
  out.raw(PublicKey().bytes);
  out.raw(digest_of(plain).bytes); // its key
  out.raw(Digest().bytes);
  out.u32(static_cast<std::uint32_t>(frame.size()));
  out.u32(static_cast<std::uint32_t>(plain.size()));
  out.raw(Signature());
  out.raw(frame);
  return out.take();
}

/// An entry's bytes, to go with `plain:`.
inline Bytes plain(const StoreRow& row) {
  Writer out;
  out.raw({reinterpret_cast<const std::uint8_t*>("plain:"), 6});
  for (const std::string* text : {&row.op, &row.desc, &row.isa, &row.target, &row.generator})
    out.string(*text);
  out.blob(row.code);
  return out.take();
}

inline StoreRow row_of(std::uint8_t key, std::size_t code_bytes) {
  StoreRow row;
  row.key.bytes.fill(key);
  row.op = "int8_mm";
  row.desc = "int8_mm m=1 n=64 k=64";
  row.isa = "avx2";
  row.target = "x86_64:avx2";
  row.generator = std::string(64, '0');
  row.code = Bytes(code_bytes, 0x90);
  return row;
}

inline bool same(const StoreRow& a, const StoreRow& b) {
  return a.key == b.key && a.op == b.op && a.desc == b.desc && a.isa == b.isa && a.target == b.target &&
         a.generator == b.generator && a.code == b.code;
}

} // namespace kiln::fuzz
