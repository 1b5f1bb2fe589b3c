#include "cache/bundle.h"

#include "tests/fuzz/bundle_bytes.h"

/// Bundles: header, index and entries, each input as it is and with the digests put right.
namespace kiln::fuzz {
namespace {

/// Every row, or nothing.
std::vector<StoreRow> rows_of(ByteSpan input) {
  static MemoryFile file;
  const std::string& path = file.with(input);
  Result<FileDescriptor> opened = open_for_reading(path, Ownership::any);
  expect(opened.is_ok(), "a file in memory can be opened");
  const Result<Bundle> bundle = Bundle::open(std::move(*opened), path);
  if (!bundle) {
    expect_refusal(bundle.status(), bundle.status().code() == Code::unsupported ? Code::unsupported : Code::integrity);
    expect(bundle.status().message().starts_with(path + ":"), "a message begins with the path");
    return {};
  }
  expect(!bundle->entries().empty() && bundle->entries().size() <= BundleLimits::entries, "entries are bounded");
  std::vector<StoreRow> rows;
  for (const Bundle::Entry& entry : bundle->entries()) {
    expect(bundle->find(entry.key) == &entry, "an entry is found by its key");
    Result<StoreRow> row = bundle->read(entry);
    if (!row) {
      expect_refusal(row.status(), Code::integrity);
      return {};
    }
    expect(row->key == entry.key, "a row has its entry's key");
    rows.push_back(std::move(*row));
  }
  return rows;
}

const SecretKey& signer() {
  static const Result<SecretKey> key = SecretKey::generate();
  return *key;
}

bool accepts(ByteSpan input) {
  const bool as_it_is = !rows_of(input).empty();
  const std::vector<StoreRow> rows = rows_of(resealed(bundle_in(input), signer()));
  if (rows.empty())
    return as_it_is;
  const Result<Bytes> made = make_bundle(rows, nullptr);
  expect(made.is_ok(), "rows that were read can be written");
  const std::vector<StoreRow> again = rows_of(*made);
  expect(std::equal(rows.begin(), rows.end(), again.begin(), again.end(), same), "a bundle of the rows means the same");
  return true;
}

std::vector<Seed> seeds() {
  const Bytes one = *make_bundle(std::vector{row_of(1, 64)}, nullptr);
  const Bytes two = *make_bundle(std::vector{row_of(1, 64), row_of(2, 0)}, nullptr);
  const Bytes sealed = *make_bundle(std::vector{row_of(3, 300)}, &signer());
  Bytes cut = two;
  cut.pop_back();
  Bytes version = one;
  ++version[8];
  return {{one, true}, {two, true}, {sealed, true}, {plain(row_of(5, 20)), true}, {cut, false}, {version, false}};
}

} // namespace
const Target target = {.accepts = accepts, .seeds = seeds, .largest_allocation_mb = 80}; // an entry may have 64 MiB
} // namespace kiln::fuzz
