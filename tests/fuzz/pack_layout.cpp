#include "jit/ops/int8_mm.h"
#include "tests/fuzz/fuzz.h"

/// Names of pack layouts, as in the headers of pack files.
namespace kiln::fuzz {
namespace {

bool accepts(ByteSpan input) {
  const auto layout = int8_mm::PackLayout::parse(text_of(input));
  if (!layout) {
    expect_refusal(layout.status(), Code::invalid_argument);
    return false;
  }
  expect(layout->id() == text_of(input), "a layout has one name");
  // The largest of the op's sizes: none of this may overflow.
  constexpr std::int64_t kLargest = (std::int64_t{1} << 31) - 1;
  for (const std::int64_t n : {std::int64_t{0}, std::int64_t{1}, kLargest})
    for (const std::int64_t k : {std::int64_t{0}, std::int64_t{1}, kLargest}) {
      expect(layout->sums_offset(n, k) >= n * k && layout->bytes(n, k) >= layout->sums_offset(n, k) + 4 * n,
             "a pack holds B and its sums");
      expect(layout->bytes(n, k) % 64 == 0, "a pack is whole cache lines");
    }
  return true;
}

std::vector<Seed> seeds() {
  return {accepted("n16k4"), accepted("n256k64"), accepted("n1k1"), refused("n016k4"), refused("n0k4"), refused("n16")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
