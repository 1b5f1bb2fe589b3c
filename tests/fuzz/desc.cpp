#include "jit/desc.h"

#include <algorithm>

#include "api/cli/operands.h"
#include "jit/op.h"
#include "tests/fuzz/fuzz.h"

/// `op key=value …` lines: keys, manifests, the C API's fields, and the words of the command.
namespace kiln::fuzz {
namespace {

std::vector<std::string> words_of(std::string_view text) {
  std::vector<std::string> words;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(' '), text.size());
    if (end > 0)
      words.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return words;
}

bool has_any(const OpSpec& op, const KernelDesc& desc) {
  for (std::size_t i = 0; i < op.fields.size(); ++i)
    if (op.fields[i].any_allowed && desc.value[i] == kAny)
      return true;
  return false;
}

/// The sizes of a desc are found again from the shapes of its tensors.
void expect_sizes_from_shapes(const OpSpec& op, const KernelDesc& desc) {
  cli::Operands operands{.op = &op};
  for (const std::string& word : words_of(desc.text())) {
    const std::size_t equals = word.find('=');
    const int field = equals == std::string::npos ? -1 : find_field(op, word.substr(0, equals));
    if (equals != std::string::npos && (field < 0 || !op.fields[static_cast<std::size_t>(field)].required))
      operands.fields.emplace_back(word.substr(0, equals), word.substr(equals + 1));
  }
  std::vector<std::vector<std::int64_t>> shapes;
  for (const TensorSpec& tensor : op.tensors)
    shapes.push_back(tensor.shape(desc));
  const Result<KernelDesc> found =
      cli::desc_from_shapes(operands, [&](std::string_view name) -> const std::vector<std::int64_t>* {
        const auto tensor =
            std::find_if(op.tensors.begin(), op.tensors.end(), [&](const auto& t) { return t.name == name; });
        return tensor->is_present(desc) ? &shapes[static_cast<std::size_t>(tensor - op.tensors.begin())] : nullptr;
      });
  expect(found && *found == desc, "shapes give the sizes");
}

bool accepts(ByteSpan input) {
  const Result<KernelDesc> desc = parse_desc(text_of(input));
  const Result<KernelDesc> of_words = cli::desc_from_words(words_of(text_of(input)));
  expect(desc.is_ok() == of_words.is_ok(), "a line and its words are taken alike");
  if (!desc) {
    expect_refusal(desc.status(), Code::invalid_argument);
    expect_refusal(of_words.status(), Code::invalid_argument);
    return false;
  }
  expect(*desc == *of_words, "a line and its words mean the same");
  const std::string text = desc->text();
  const Result<KernelDesc> again = parse_desc(text);
  expect(again && *again == *desc && again->text() == text && again->hash() == desc->hash(),
         "a text is that of its desc");

  const OpSpec& op = *find_op(desc->op);
  expect(check_desc(*desc).is_ok(), "a desc that was taken is in range");
  const KernelDesc canonical = op.canonical(*desc);
  expect(op.canonical(canonical) == canonical, "canonical is idempotent");
  expect(check_desc(canonical).is_ok(), "a canonical desc is in range");
  const MRange range = op.m_range(canonical);
  expect(range.min <= range.max && 0 <= range.min, "a class of m has members");
  if (op.pack_desc != nullptr)
    expect(op.canonical(op.pack_desc(*desc)) == op.pack_desc(*desc), "a pack's desc is canonical");
  if (!has_any(op, *desc))
    expect_sizes_from_shapes(op, *desc);
  return true;
}

std::vector<Seed> seeds() {
  return {accepted("int8_mm m=16 n=4096 k=4096 b_layout=nk a_dtype=s8 c_dtype=s32"),
          accepted("int8_mm m=any n=1 k=0 b_layout=kn a_dtype=u8 device=cuda:7"),
          accepted("int8_mm m=2147483647 n=0 k=2147483647"),
          accepted("int8_mm m=3 n=16 k=16 c_dtype=bf16 rescale=scale rescale_per=tensor device=cuda"),
          accepted("int4_mm m=1 n=8 k=256 group=64 device=cuda"),
          accepted("int4_mm m=any n=16 k=512 group=128 inner_k_tiles=8 batch_invariant=1"),
          accepted("fp8_block_bmm b=8 m=1024 n=4096 k=7168 x_dtype=e5m2 z_dtype=f32 device=cuda"),
          accepted("fp8_block_bmm b=65535 m=any n=8 k=16 batch_invariant=1"),
          refused("fp8_block_bmm b=1 m=1 n=8 k=24"),
          refused("int4_mm m=1 n=8 k=100 group=64"),
          refused("int8_mm m=2147483647 n=2147483647 k=1"),
          refused("int8_mm m=1 n=1 k=-1"),
          refused("int8_mm m=1 n=any k=1 b=@file.npy"),
          refused("attention")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
