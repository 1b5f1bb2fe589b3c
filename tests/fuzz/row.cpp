#include <algorithm>

#include "jit/code_object.h"
#include "jit/kernel_key.h"
#include "jit/op.h"
#include "jit/ops/int8_mm.h"
#include "tests/fuzz/fuzz.h"

/// A row from elsewhere: the readable columns, the code, and the key that is the digest of what they say.
namespace kiln::fuzz {
namespace {

constexpr std::string StoreRow::*kTexts[] = {&StoreRow::op, &StoreRow::desc, &StoreRow::isa, &StoreRow::target,
                                             &StoreRow::generator};

/// The texts, a line each, then the code: a fuzzer finds texts of other lengths sooner than behind prefixes that it
/// would have to change too. The key is the digest of all that, unless it is put right.
Bytes serialised(const StoreRow& row) {
  Bytes out;
  for (std::string StoreRow::*text : kTexts) {
    out.insert(out.end(), (row.*text).begin(), (row.*text).end());
    out.push_back('\n');
  }
  out.insert(out.end(), row.code.begin(), row.code.end());
  return out;
}

StoreRow row_in(ByteSpan input) {
  StoreRow row;
  row.key = digest_of(input);
  for (std::string StoreRow::*text : kTexts) {
    const std::size_t end = std::min(text_of(input).find('\n'), input.size());
    row.*text = text_of(input.first(end));
    input = input.subspan(std::min(end + 1, input.size()));
  }
  row.code.assign(input.begin(), input.end());
  return row;
}

void expect_row_refusal(const Status& status) {
  expect_refusal(status, status.code() == Code::unsupported ? Code::unsupported : Code::integrity);
}

bool accepts(ByteSpan input) {
  StoreRow row = row_in(input);
  const Result<KeyFields> fields = key_fields_of(row);
  expect(!check_row(row), "a row whose key is not that of its fields is refused");
  if (!fields) {
    expect_row_refusal(fields.status());
    return false;
  }
  expect(fields->differences_from(*fields).empty(), "a row differs in nothing from itself");
  row.key = key_of(fields->text());
  const Status with_its_key = check_row(row);
  if (!with_its_key) {
    expect_row_refusal(with_its_key);
    return false;
  }
  const Result<KernelDesc> desc = parse_desc(row.desc);
  expect(desc && desc->text() == row.desc && find_op(desc->op)->canonical(*desc) == *desc,
         "a row that is taken has a canonical desc");
  const Result<CodeObject> code = CodeObject::parse(row.code);
  expect(code && code->needs().text() == row.target, "a row that is taken says what its code needs");
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
