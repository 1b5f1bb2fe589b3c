#include "cache/remote_row.h"

#include <algorithm>

#include "cache/entry.h"
#include "tests/fuzz/fuzz.h"

/// A row of the remote tier. The first byte says how the rest is meant: 0, as a server sends it; else as an entry that
/// a trusted key has signed, since no fuzzer gets past a signature.
namespace kiln::fuzz {
namespace {

const SecretKey& secret_key() {
  static const SecretKey key = [] {
    Result<SecretKey> made = SecretKey::generate();
    expect(made.is_ok(), "there are random bytes");
    return std::move(*made);
  }();
  return key;
}

StoreRow sample_row() {
  StoreRow row;
  row.key.bytes.fill(7);
  row.op = "int8_mm";
  row.desc = "int8_mm m=1 n=64 k=64";
  row.isa = "avx2";
  row.target = "x86_64:avx2";
  row.generator = std::string(64, 'a');
  row.code = {1, 2, 3};
  return row;
}

/// A row with this entry, and a true signature.
Bytes signed_row(ByteSpan entry, const Digest& key) {
  // Of the writer, which refuses most of them: the header of a sound row, signed anew.
  const Result<Bytes> sound = make_remote_row(sample_row(), secret_key());
  expect(sound.is_ok(), "a row can be written");
  Writer message, whole;
  for (Writer* writer : {&message, &whole})
    writer->raw(ByteSpan(*sound).first(RemoteRowLimits::header_bytes - sizeof(Signature)));
  message.raw(key.bytes);
  message.raw(digest_of(entry).bytes);
  whole.raw(secret_key().sign(message.bytes()));
  whole.raw(entry);
  return whole.take();
}

bool accepts(ByteSpan input) {
  if (input.empty())
    return false;
  static const TrustedKeys trusted{{secret_key().public_key()}};
  const Digest key = sample_row().key;
  const bool is_raw = input[0] == 0;
  const ByteSpan rest = input.subspan(1);
  const Result<StoreRow> row =
      is_raw ? read_remote_row(rest, key, trusted) : read_remote_row(signed_row(rest, key), key, trusted);
  if (!row) {
    expect_refusal(row.status(), Code::integrity);
    return false;
  }
  const Result<Bytes> again = make_remote_row(*row, secret_key());
  expect(again.is_ok(), "what is read can be written");
  const Bytes entry = entry_of(*row);
  const ByteSpan given = is_raw ? rest.subspan(RemoteRowLimits::header_bytes) : rest;
  expect(std::equal(entry.begin(), entry.end(), given.begin(), given.end()), "an entry has one form");
  expect(signer_of(*row) == secret_key().public_key(), "the signature stays with the row");
  return true;
}

std::vector<Seed> seeds() {
  const auto with = [](std::uint8_t first, ByteSpan rest, bool is_accepted) {
    Bytes bytes = {first};
    bytes.insert(bytes.end(), rest.begin(), rest.end());
    return Seed{bytes, is_accepted};
  };
  const Bytes row = *make_remote_row(sample_row(), secret_key()), entry = entry_of(sample_row());
  return {with(0, row, true), with(0, ByteSpan(row).first(row.size() - 1), false), with(0, entry, false),
          with(1, entry, true), with(1, ByteSpan(entry).first(20), false)};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
