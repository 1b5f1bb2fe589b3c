#include <optional>

#include "jit/code_object.h"
#include "jit/kernel_key.h"
#include "jit/op.h"
#include "jit/ops/int8_mm.h"
#include "tests/fuzz/fuzz.h"

/// A row from elsewhere: the readable columns, the code, and the key that is the digest of what they say. Each input is
/// tried with the key that it gives and with the one that belongs to it.
namespace kiln::fuzz {
namespace {

constexpr std::string StoreRow::*kTexts[] = {&StoreRow::op, &StoreRow::desc, &StoreRow::isa, &StoreRow::target,
                                             &StoreRow::generator};

Bytes serialised(const StoreRow& row) {
  Writer out;
  out.raw(row.key.bytes);
  for (std::string StoreRow::*text : kTexts)
    out.string(row.*text);
  out.blob(row.code);
  return out.take();
}

std::optional<StoreRow> row_in(ByteSpan input) {
  Reader in(input);
  StoreRow row;
  const ByteSpan key = in.raw(row.key.bytes.size());
  std::copy(key.begin(), key.end(), row.key.bytes.begin());
  for (std::string StoreRow::*text : kTexts)
    row.*text = in.string();
  const ByteSpan code = in.blob();
  row.code.assign(code.begin(), code.end());
  return in.ok() ? std::optional(row) : std::nullopt;
}

void expect_row_refusal(const Status& status) {
  expect_refusal(status, status.code() == Code::unsupported ? Code::unsupported : Code::integrity);
}

bool accepts(ByteSpan input) {
  std::optional<StoreRow> row = row_in(input);
  if (!row)
    return false;
  const Result<KeyFields> fields = key_fields_of(*row);
  const Status as_it_is = check_row(*row);
  if (!fields) {
    expect_row_refusal(fields.status());
    expect(!as_it_is, "a row without key fields is refused");
    return false;
  }
  expect(fields->differences_from(*fields).empty(), "a row differs in nothing from itself");
  const Digest key = key_of(fields->text());
  expect(!as_it_is || key == row->key, "a row's key is the digest of what it says");
  row->key = key;
  const Status with_its_key = check_row(*row);
  if (!with_its_key) {
    expect_row_refusal(with_its_key);
    return false;
  }
  const Result<KernelDesc> desc = parse_desc(row->desc);
  expect(desc && desc->text() == row->desc && find_op(desc->op)->canonical(*desc) == *desc,
         "a row that is taken has a canonical desc");
  const Result<CodeObject> code = CodeObject::parse(row->code);
  expect(code && code->needs().text() == row->target, "a row that is taken says what its code needs");
  return true;
}

std::vector<Seed> seeds() {
  CodeObject code;
  code.image = {0xb8, 1, 0, 0, 0, 0xc3};
  code.entries = {{"main", 0}};
  code.features = {Feature::avx2};
  code.plan = int8_mm::Plan().values();
  StoreRow row;
  row.op = "int8_mm";
  row.desc = find_op(OpId::int8_mm)->canonical(*parse_desc("int8_mm m=1 n=64 k=64")).text();
  row.isa = "avx2";
  row.target = code.needs().text();
  row.generator = std::string(64, '0');
  row.code = code.serialise();
  StoreRow not_canonical = row, other_target = row, other_op = row, no_code = row;
  not_canonical.desc = "int8_mm m=100 n=64 k=64";
  other_target.target = "x86_64:avx512f";
  other_op.op = "int9_mm";
  no_code.code.clear();
  return {{serialised(row), true},
          {serialised(not_canonical), false},
          {serialised(other_target), false},
          {serialised(other_op), false},
          {serialised(no_code), false}};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
