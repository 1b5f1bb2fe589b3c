#include "jit/code_object.h"

#include "jit/op.h"
#include "jit/ops/fp8_block_bmm.h"
#include "jit/ops/int8_mm.h"
#include "tests/fuzz/fuzz.h"

/// The code of a stored row: the bytes that a cache, a bundle or a remote tier hands out.
namespace kiln::fuzz {
namespace {

bool accepts(ByteSpan input) {
  const Result<CodeObject> object = CodeObject::parse(input);
  if (!object) {
    expect_refusal(object.status(), Code::integrity);
    return false;
  }
  const Bytes again = object->serialise();
  expect(std::equal(again.begin(), again.end(), input.begin(), input.end()), "an object has one form");
  for (const CodeObject::Entry& entry : object->entries)
    expect(entry.offset < object->image.size(), "an entry lies in the image");
  const kiln::Target needs = object->needs();
  expect(features_of(needs.arch).contains(needs.features), "features are those of the architecture");
  for (const OpSpec& op : op_table())
    if (const auto plan = op.bind_plan(object->plan); !plan)
      expect_refusal(plan.status(), Code::integrity);
  return true;
}

std::vector<Seed> seeds() {
  CodeObject x86;
  x86.image = {0xb8, 1, 0, 0, 0, 0xc3};
  x86.entries = {{"main", 0}, {"reduce", 5}};
  x86.features = {Feature::avx2, Feature::avx512vnni};
  x86.vector_registers = 32;
  x86.general_registers = 9;
  x86.plan = int8_mm::Plan().values();
  CodeObject arm = x86;
  arm.arch = Arch::aarch64;
  arm.features = {Feature::neon, Feature::sve};
  arm.vector_bits = 256;
  arm.entries = {{"main", 4}};
  // A cubin in a configuration that timing chose.
  CodeObject tuned;
  tuned.format = CodeFormat::cubin;
  tuned.image = {0x7f, 'E', 'L', 'F'};
  tuned.entries = {{"main", 0}};
  tuned.arch = Arch::nvptx;
  tuned.sm = 90;
  tuned.compiler = "driver 13.0";
  tuned.driver_version = 13000;
  tuned.configuration = "x2n128s4";
  tuned.tuned_for = "NVIDIA H200";
  tuned.plan = fp8_block_bmm::Plan{.gpu = fp8_block_bmm::Plan::Gpu{}}.values();
  CodeObject chosen = tuned, nameless = tuned;
  chosen.tuned_for.clear();
  nameless.configuration.clear();
  return {{x86.serialise(), true},    {arm.serialise(), true},       {tuned.serialise(), true},
          {chosen.serialise(), true}, {nameless.serialise(), false}, {CodeObject().serialise(), false}};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
