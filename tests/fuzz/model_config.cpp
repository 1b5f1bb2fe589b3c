#include <algorithm>

#include "api/cli/model.h"
#include "jit/op.h"
#include "tests/fuzz/fuzz.h"

/// A model's config.json.
namespace kiln::fuzz {
namespace {

bool accepts(ByteSpan input) {
  static MemoryFile file;
  const std::string& path = file.with(input);
  const Result<std::vector<KernelDesc>> descs = cli::model_kernels(path, "w8a8", std::vector<std::int64_t>{1, 64});
  if (const auto heads = cli::model_kernels(path, "attention", std::vector<std::int64_t>{1, 64}); !heads) {
    expect_refusal(heads.status(), Code::invalid_argument);
    expect(heads.status().message().starts_with(path + ":"), "a message begins with the place");
  } else {
    for (const KernelDesc& desc : *heads)
      expect(desc.op == OpId::attention && check_desc(desc).is_ok(), "a desc that was taken is in range");
  }
  if (!descs) {
    expect_refusal(descs.status(), Code::invalid_argument);
    expect(descs.status().message().starts_with(path + ":"), "a message begins with the place");
    return false;
  }
  expect(!descs->empty(), "a model has kernels");
  for (auto desc = descs->begin(); desc != descs->end(); ++desc) {
    expect(check_desc(*desc).is_ok(), "a desc that was taken is in range");
    expect(std::find(descs->begin(), desc, *desc) == desc, "each desc is there once");
  }
  return true;
}

std::vector<Seed> seeds() {
  return {
      accepted(R"({"model_type": "qwen3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
"head_dim": 32, "intermediate_size": 128, "vocab_size": 1000, "other": [{"a": null}, 1e3]})"),
      accepted(R"({"model_type": "bert", "hidden_size": 64, "intermediate_size": 256})"),
      accepted(R"({"model_type": "deepseek_v3", "hidden_size": 64, "num_attention_heads": 4, "qk_nope_head_dim": 8,
"qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": null, "moe_intermediate_size": 32,
"intermediate_size": 128, "n_shared_experts": 1, "vocab_size": 1000})"),
      refused(R"({"model_type": "llama", "hidden_size": 16777216, "num_attention_heads": 16777216, "head_dim": 16777216,
"intermediate_size": 16777216, "vocab_size": 16777216})"),
      refused(R"({"model_type": 1})"),
      refused(R"({"model_type": )" + std::string(100'000, '[') + std::string(100'000, ']') + "}"),
  };
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
