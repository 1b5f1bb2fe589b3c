#include <algorithm>

#include "cache/digest.h"
#include "jit/ops/int8_mm_driver.h"
#include "tests/fuzz/fuzz.h"

/// Files of packed weights. Their checksum is no secret, so what lies behind it must stand on its own: each input is
/// tried as it is and with the right checksum.
namespace kiln::fuzz {
namespace {

using int8_mm::Pack;

/// As Pack::save documents the file.
Bytes header(std::string_view layout, std::int64_t n, std::int64_t k, const Digest& digest) {
  Writer w;
  for (const char c : std::string_view("KILNPACK"))
    w.u8(static_cast<std::uint8_t>(c));
  w.u32(1);
  w.string("int8_mm");
  w.string(layout);
  w.i64(n);
  w.i64(k);
  w.blob(digest.bytes);
  return w.take();
}

Bytes sealed(std::string_view layout, std::int64_t n, std::int64_t k, ByteSpan data) {
  Writer w;
  w.blob(header(layout, n, k, {}));
  w.blob(digest_of(data).bytes);
  Bytes file = header(layout, n, k, digest_of(w.bytes()));
  file.insert(file.end(), data.begin(), data.end());
  return file;
}

/// With the checksum that belongs to it; unchanged where there is none to put right.
Bytes resealed(ByteSpan input) {
  Reader r(input);
  r.u64(); // magic
  r.u32(); // version
  r.string();
  const std::string layout = r.string();
  const std::int64_t n = r.i64(), k = r.i64();
  const ByteSpan digest = r.blob();
  if (!r.ok() || digest.size() != sizeof(Digest::bytes))
    return Bytes(input.begin(), input.end());
  return sealed(layout, n, k, input.subspan(static_cast<std::size_t>(digest.data() + digest.size() - input.data())));
}

bool loads(ByteSpan input) {
  static MemoryFile file;
  const std::string& path = file.with(input);
  const Result<Pack> pack = Pack::load(path);
  if (!pack) {
    expect_refusal(pack.status(), Code::integrity);
    expect(pack.status().message().starts_with(path + ":"), "a message begins with the path");
    return false;
  }
  const auto* data = reinterpret_cast<const std::uint8_t*>(pack->panels());
  const Bytes again =
      sealed(pack->layout().id(), pack->n(), pack->k(), {data, static_cast<std::size_t>(pack->bytes())});
  expect(std::equal(again.begin(), again.end(), input.begin(), input.end()), "a pack has one form");
  const auto* sums = reinterpret_cast<const std::uint8_t*>(pack->sums());
  expect(sums - data == pack->layout().sums_offset(pack->n(), pack->k()), "sums follow the panels");
  return true;
}

bool accepts(ByteSpan input) {
  const bool as_it_is = loads(input);
  const bool with_checksum = loads(resealed(input));
  expect(!as_it_is || with_checksum, "a checksum put right does not spoil a pack");
  return with_checksum;
}

std::vector<Seed> seeds() {
  const Bytes small(128, 1), larger(4 * 64 + 128, 2); // one panel, four; their sums
  return {{sealed("n16k4", 1, 4, small), true},   {sealed("n5k3", 17, 9, larger), true},
          {sealed("n1k1", 0, 0, {}), true},       {sealed("n256k64", 2147483647, 2147483647, small), false},
          {sealed("n016k4", 1, 4, small), false}, {sealed("n16k4", -1, 4, small), false}};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
