#include "api/cli/manifest.h"

#include <nlohmann/json.hpp>

#include "jit/op.h"
#include "tests/fuzz/fuzz.h"

/// Manifests of `kiln warmup`, and the JSON reader below them.
namespace kiln::fuzz {
namespace {

/// Every desc as an entry of its own.
std::string manifest_of(const std::vector<KernelDesc>& descs) {
  nlohmann::json kernels = nlohmann::json::array();
  for (const KernelDesc& desc : descs) {
    nlohmann::json entry;
    const std::string line = desc.text() + " ";
    std::string_view text = line;
    entry["op"] = std::string(text.substr(0, text.find(' ')));
    text.remove_prefix(text.find(' ') + 1);
    while (!text.empty()) {
      const std::size_t equals = text.find('='), end = text.find(' ');
      entry[std::string(text.substr(0, equals))] = std::string(text.substr(equals + 1, end - equals - 1));
      text.remove_prefix(end + 1);
    }
    kernels.push_back(std::move(entry));
  }
  return nlohmann::json{{"kernels", std::move(kernels)}}.dump();
}

bool accepts(ByteSpan input) {
  static MemoryFile file;
  const std::string& path = file.with(input);
  const Result<std::vector<KernelDesc>> descs = cli::read_manifest(path);
  if (!descs) {
    expect_refusal(descs.status(), Code::invalid_argument);
    expect(descs.status().message().starts_with(path + ":"), "a message begins with the place");
    return false;
  }
  expect(descs->size() <= 100'000, "a manifest asks for a bounded number of kernels");
  for (const KernelDesc& desc : *descs)
    expect(check_desc(desc).is_ok(), "a desc that was taken is in range");
  if (descs->size() <= 100) {
    const std::string text = manifest_of(*descs);
    const auto again = cli::read_manifest(file.with({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()}));
    expect(again && *again == *descs, "a manifest of the kernels means the same");
  }
  return true;
}

std::vector<Seed> seeds() {
  std::string many_members = "{\"" + std::string(1 << 15, 'n') + "\": [0";
  for (int i = 0; i < 1 << 14; ++i)
    many_members += ",0";
  many_members += "]}";
  return {accepted(R"({"kernels": [{"op": "int8_mm", "m": [1, 64, "any"], "n": 4096, "k": [512, 1024]},
 {"op": "int8_mm", "m": 1, "n": 1, "k": 1, "b_layout": "kn", "device": ["cpu", "cuda:1"]}]})"),
          accepted(R"({"kernels": []})"),
          refused(R"({"kernels": [{"op": "int8_mm", "m": 1.5e3, "n": null, "k": true}], "more": "\u00e9\n"})"),
          refused("{\"kernels\": [{\"op\": \"int8_mm\", \"m\": [[1]], \"m/~\": 1, \"m\": -0}]}"),
          refused("\xff\xfe{"),
          refused(std::string(1 << 20, '[')),
          refused(R"({"kernels": [{"op": "int8_mm", "n": )" + std::string(100'000, '[') + std::string(100'000, ']') +
                  "}]}"),
          refused(many_members)};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
