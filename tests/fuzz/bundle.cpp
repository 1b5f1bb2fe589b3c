#include "cache/bundle.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "tests/fuzz/fuzz.h"

/// Bundles (api/doc/bundle.md): header, index and entries of an unsigned one. A fuzzer finds no digest that fits, so
/// that each is made right before the parser sees the file.
namespace kiln::fuzz {
namespace {

constexpr std::size_t kCountAt = 14, kHeaderBytes = 50, kIndexEntryBytes = 72;
/// Larger entries are legal, and take longer than they teach.
constexpr std::uint32_t kMostBytesRead = 1 << 20;

std::uint32_t u32_at(const Bytes& bytes, std::size_t offset) {
  return Reader(ByteSpan(bytes).subspan(offset)).u32();
}

/// With the digests of what lies where the index says, as far as it lies in the file.
Bytes sealed(ByteSpan input) {
  Bytes file(input.begin(), input.end());
  if (file.size() < kHeaderBytes)
    return file;
  const std::uint64_t front = kHeaderBytes + std::uint64_t{u32_at(file, kCountAt)} * kIndexEntryBytes;
  if (front + sizeof(Digest) > file.size())
    return file;
  std::size_t offset = front + sizeof(Digest);
  const auto put_digest = [&](std::size_t at, std::size_t first, std::size_t size) {
    const Digest digest = digest_of(ByteSpan(file).subspan(first, size));
    std::copy(digest.bytes.begin(), digest.bytes.end(), file.begin() + static_cast<std::ptrdiff_t>(at));
  };
  for (std::size_t entry = kHeaderBytes; entry < front; entry += kIndexEntryBytes) {
    const std::uint32_t size = u32_at(file, entry + 64);
    if (size > file.size() - offset)
      break;
    put_digest(entry + 32, offset, size);
    offset += size;
  }
  put_digest(front, 0, front);
  return file;
}

Result<Bundle> opened(ByteSpan content) {
  static MemoryFile file;
  const std::string& path = file.with(content);
  return Bundle::open(FileDescriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC)), path);
}

bool same(const StoreRow& a, const StoreRow& b) {
  return a.key == b.key && a.op == b.op && a.desc == b.desc && a.isa == b.isa && a.target == b.target &&
         a.generator == b.generator && a.code == b.code;
}

bool accepts(ByteSpan input) {
  const Result<Bundle> bundle = opened(sealed(input));
  if (!bundle) {
    expect_refusal(bundle.status(), bundle.status().code() == Code::unsupported ? Code::unsupported : Code::integrity);
    return false;
  }
  const std::vector<Bundle::Entry>& entries = bundle->entries();
  expect(!entries.empty() && !bundle->signer(), "an unsigned bundle has kernels and no signer");
  std::vector<StoreRow> rows;
  bool whole = true;
  for (const Bundle::Entry& entry : entries) {
    expect(bundle->find(entry.key) == &entry, "each entry is found by its key");
    if (entry.bytes > kMostBytesRead)
      return true;
    Result<StoreRow> row = bundle->read(entry);
    whole = whole && row.is_ok();
    if (row)
      rows.push_back(std::move(*row));
    else
      expect_refusal(row.status(), Code::integrity);
  }
  if (!whole)
    return false;
  // Other bytes may stand for the same rows: frames differ.
  const Result<Bytes> again = make_bundle(rows, nullptr);
  expect(again.is_ok(), "what was read can be bundled");
  const Result<Bundle> second = opened(*again);
  expect(second && second->entries().size() == rows.size(), "a bundle holds the rows it was made of");
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Result<StoreRow> row = second->read(second->entries()[i]);
    expect(row && same(*row, rows[i]), "a row is read as it was bundled");
  }
  return true;
}

std::vector<Seed> seeds() {
  std::vector<StoreRow> rows(2);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i].key.bytes[0] = static_cast<std::uint8_t>(i + 1);
    rows[i].op = "int8_mm";
    rows[i].desc = "int8_mm m=1 n=64 k=64";
    rows[i].isa = "avx2";
    rows[i].target = "x86_64:avx2";
    rows[i].generator = std::string(64, 'a');
    rows[i].code = Bytes(40 * i, 0xc3);
  }
  const Bytes two = *make_bundle(rows, nullptr), one = *make_bundle({&rows[1], 1}, nullptr);
  Bytes signed_one = *make_bundle({&rows[1], 1}, &*SecretKey::generate());
  Bytes other_version = one, follows = one, out_of_order = two;
  other_version[8] = 2;
  follows.push_back(0);
  out_of_order[kHeaderBytes] = 9; // above the second key
  signed_one[kHeaderBytes] ^= 1;
  return {{two, true},
          {one, true},
          {other_version, false},
          {follows, false},
          {out_of_order, false},
          {signed_one, false},
          {Bytes(one.begin(), one.end() - 1), false}};
}

} // namespace
const Target target = {accepts, seeds, BundleLimits::entry_bytes >> 20};
} // namespace kiln::fuzz
