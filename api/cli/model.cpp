#include "api/cli/model.h"

#include <algorithm>
#include <optional>

#include <fmt/format.h>

#include "api/cli/json_file.h"
#include "jit/op.h"
#include "jit/ops/attention.h"
#include "jit/ops/fp8_block_bmm.h"
#include "jit/ops/int8_linear.h"
#include "jit/ops/int8_mm.h"

namespace kiln::cli {
namespace {

/// A weight of [n][k].
struct Linear {
  std::int64_t n, k;
};

/// Reads the sizes in a config. The first thing that is wrong is kept, and later sizes read as 1.
class Config {
public:
  explicit Config(const JsonFile& file) : file_(file) {}

  std::int64_t size(const char* name) {
    if (const std::optional<std::int64_t> value = optional_size(name))
      return *value;
    if (status_.is_ok())
      status_ = file_.error("", fmt::format("lacks \"{}\", which model_type {} needs", name, model_type()));
    return 1;
  }
  /// Nothing where the field is missing or null.
  std::optional<std::int64_t> optional_size(const char* name) {
    const auto found = file_.root().find(name);
    if (found == file_.root().end() || found->is_null())
      return std::nullopt;
    const bool in_range =
        found->is_number_unsigned() && found->get<std::uint64_t>() >= 1 && found->get<std::uint64_t>() <= kMaxSize;
    if (!in_range && status_.is_ok())
      status_ = file_.error(std::string("/") + name,
                            fmt::format("{}: allowed is an integer from 1 to {}", found->dump(), kMaxSize));
    return in_range ? found->get<std::int64_t>() : 1;
  }
  std::int64_t head_dim(std::int64_t hidden, std::int64_t heads) {
    if (const std::optional<std::int64_t> given = optional_size("head_dim"))
      return *given;
    if (hidden % heads != 0 && status_.is_ok())
      status_ = file_.error("/num_attention_heads",
                            fmt::format("{} does not divide hidden_size {}, and there is no head_dim", heads, hidden));
    return hidden / heads;
  }
  std::string model_type() const {
    const auto found = file_.root().find("model_type");
    return found != file_.root().end() && found->is_string() ? found->get<std::string>() : "(none)";
  }
  const Status& status() const { return status_; }

private:
  /// Products of two and sums of a few stay far from overflow.
  static constexpr std::uint64_t kMaxSize = 1 << 24;
  const JsonFile& file_;
  Status status_;
};

void append_gated_mlp(std::vector<Linear>& linears, std::int64_t hidden, std::int64_t intermediate) {
  linears.insert(
      linears.end(),
      {{intermediate, hidden}, {2 * intermediate, hidden}, {hidden, intermediate}}); // gate or up, both, down
}

std::vector<Linear> llama(Config& config) {
  const std::int64_t hidden = config.size("hidden_size"), heads = config.size("num_attention_heads");
  const std::int64_t kv_heads = config.optional_size("num_key_value_heads").value_or(heads),
                     head = config.head_dim(hidden, heads);
  std::vector<Linear> linears = {
      {heads * head, hidden},                  // q
      {kv_heads * head, hidden},               // k, v
      {(heads + 2 * kv_heads) * head, hidden}, // qkv
      {hidden, heads * head},                  // o
  };
  append_gated_mlp(linears, hidden, config.size("intermediate_size"));
  linears.push_back({config.size("vocab_size"), hidden}); // lm_head
  return linears;
}

std::vector<Linear> bert(Config& config) {
  const std::int64_t hidden = config.size("hidden_size"), intermediate = config.size("intermediate_size");
  return {
      {hidden, hidden},       // query, key, value, attention output, pooler
      {3 * hidden, hidden},   // query, key and value
      {intermediate, hidden}, // intermediate
      {hidden, intermediate}, // output
  };
}

/// Latent attention and experts, as in the model's published modelling code.
std::vector<Linear> deepseek_v3(Config& config) {
  const std::int64_t hidden = config.size("hidden_size"), heads = config.size("num_attention_heads");
  const std::int64_t nope = config.size("qk_nope_head_dim"), rope = config.size("qk_rope_head_dim"),
                     value = config.size("v_head_dim");
  const std::int64_t kv_rank = config.size("kv_lora_rank"), moe_intermediate = config.size("moe_intermediate_size");
  std::vector<Linear> linears;
  if (const std::optional<std::int64_t> q_rank = config.optional_size("q_lora_rank"))
    linears = {{*q_rank, hidden}, {heads * (nope + rope), *q_rank}}; // q_a, q_b
  else
    linears = {{heads * (nope + rope), hidden}}; // q
  linears.insert(linears.end(), {
                                    {kv_rank + rope, hidden},          // kv_a
                                    {heads * (nope + value), kv_rank}, // kv_b
                                    {hidden, heads * value},           // o
                                });
  append_gated_mlp(linears, hidden, config.size("intermediate_size")); // the dense layers
  append_gated_mlp(linears, hidden, moe_intermediate);                 // each expert
  append_gated_mlp(linears, hidden, moe_intermediate * config.optional_size("n_shared_experts").value_or(1));
  linears.push_back({config.size("vocab_size"), hidden}); // lm_head
  return linears;
}

/// An attention layer: its heads and their sizes.
struct Heads {
  std::int64_t hq, hkv, d, dv;
  attention::Causal causal = attention::Causal::bottom_right; ///< prefill, its pieces and decode
};

Heads llama_heads(Config& config) {
  const std::int64_t heads = config.size("num_attention_heads");
  const std::int64_t head = config.head_dim(config.size("hidden_size"), heads);
  return {heads, config.optional_size("num_key_value_heads").value_or(heads), head, head};
}

Heads bert_heads(Config& config) {
  Heads heads = llama_heads(config);
  heads.causal = attention::Causal::none;
  return heads;
}

/// With keys and values of each head made from the latent ones first.
Heads deepseek_v3_heads(Config& config) {
  const std::int64_t heads = config.size("num_attention_heads");
  return {heads, heads, config.size("qk_nope_head_dim") + config.size("qk_rope_head_dim"), config.size("v_head_dim")};
}

struct ModelRow {
  std::string_view model_type;
  std::vector<Linear> (*linears)(Config&);
  Heads (*heads)(Config&);
};
/// Types that are not here are read as the first where they have its fields.
constexpr ModelRow kModels[] = {{"llama", llama, llama_heads},
                                {"qwen3", llama, llama_heads},
                                {"bert", bert, bert_heads},
                                {"deepseek_v3", deepseek_v3, deepseek_v3_heads}};

template <KernelDesc (*desc)(std::int64_t tokens, const Linear&)>
std::vector<KernelDesc> linear_layers(const ModelRow& model, Config& config, std::span<const std::int64_t> tokens) {
  const std::vector<Linear> linears = model.linears(config);
  std::vector<KernelDesc> descs;
  for (const std::int64_t count : tokens)
    for (const Linear& linear : linears)
      descs.push_back(desc(count, linear));
  return descs;
}

KernelDesc w8a8(std::int64_t tokens, const Linear& linear) {
  return int8_mm::make_desc(tokens, linear.n, linear.k);
}

/// As linear layers of language models have it: bf16 activations, no bias.
KernelDesc w8a8_dynamic(std::int64_t tokens, const Linear& linear) {
  return int8_linear::make_desc(tokens, linear.n, linear.k);
}
/// Weights in blocks of 128 × 128, as DeepSeek-V3 has them: on the GPUs that compute with them.
KernelDesc fp8_block(std::int64_t tokens, const Linear& linear) {
  KernelDesc desc = fp8_block_bmm::make_desc(1, tokens, linear.n, linear.k);
  desc.device = {DeviceKind::cuda, 0};
  return desc;
}

std::vector<KernelDesc> attention_layers(const ModelRow& model, Config& config, std::span<const std::int64_t> tokens) {
  const Heads heads = model.heads(config);
  std::vector<KernelDesc> descs;
  for (const std::int64_t count : tokens)
    descs.push_back(attention::make_desc(kAny, heads.hq, heads.hkv, count, kAny, heads.d, heads.dv, heads.causal));
  return descs;
}

struct SchemeRow {
  std::string_view name;
  std::vector<KernelDesc> (*descs)(const ModelRow&, Config&, std::span<const std::int64_t> tokens);
};
constexpr SchemeRow kSchemes[] = {
    {"w8a8", linear_layers<w8a8>},
    {"w8a8-dynamic", linear_layers<w8a8_dynamic>},
    {"fp8-block", linear_layers<fp8_block>},
    {"attention", attention_layers},
};

/// Of a comma list.
Result<std::vector<const SchemeRow*>> parse_schemes(std::string_view text) {
  std::vector<const SchemeRow*> schemes;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view name = text.substr(begin, end - begin);
    const auto row =
        std::find_if(std::begin(kSchemes), std::end(kSchemes), [&](const SchemeRow& r) { return r.name == name; });
    if (row == std::end(kSchemes)) {
      std::string names;
      for (const SchemeRow& known : kSchemes)
        names += (names.empty() ? "" : ", ") + std::string(known.name);
      return Status::error(Code::invalid_argument, fmt::format("--scheme {}: known are {}", name, names));
    }
    schemes.push_back(row);
    begin = end + 1;
  }
  return schemes;
}

} // namespace

Result<std::vector<KernelDesc>> model_kernels(const std::string& path, const std::string& scheme,
                                              std::span<const std::int64_t> tokens) {
  const Result<std::vector<const SchemeRow*>> schemes = parse_schemes(scheme);
  if (!schemes)
    return schemes.status();
  const Result<JsonFile> file = JsonFile::read(path);
  if (!file)
    return file.status();
  if (!file->root().is_object())
    return file->error("", "is no config.json: it needs an object with model_type, hidden_size and so on");
  if (const auto type = file->root().find("model_type");
      type != file->root().end() && !type->is_null() && !type->is_string())
    return file->error("/model_type", fmt::format("{}: allowed is a string", type->dump()));

  Config config(*file);
  const auto model = std::find_if(std::begin(kModels), std::end(kModels),
                                  [&](const ModelRow& row) { return row.model_type == config.model_type(); });
  std::vector<KernelDesc> descs;
  for (const SchemeRow* row : *schemes) {
    const std::vector<KernelDesc> asked = row->descs(model == std::end(kModels) ? kModels[0] : *model, config, tokens);
    if (!config.status())
      return config.status();
    for (const KernelDesc& desc : asked) {
      if (Status status = check_desc(desc); !status)
        return Status::error(status.code(), fmt::format("{}: {}", path, status.message()));
      if (std::find(descs.begin(), descs.end(), desc) == descs.end())
        descs.push_back(desc);
    }
  }
  return descs;
}

} // namespace kiln::cli
