#include "jit/target.h"

#include "tests/fuzz/fuzz.h"

/// Targets and lists of features, from options, rows of the cache and code objects.
namespace kiln::fuzz {
namespace {

void try_features(std::string_view text) {
  const Result<Features> features = Features::parse(text);
  if (!features)
    return expect_refusal(features.status(), Code::invalid_argument);
  const Result<Features> again = Features::parse(features->text());
  expect(again && *again == *features, "a list of features is that of its set");
  expect(features->text().size() == text.size(), "each feature is given once");
}

bool accepts(ByteSpan input) {
  const std::string_view text = text_of(input);
  try_features(text);
  const auto parsed = kiln::Target::parse(text);
  if (!parsed) {
    expect_refusal(parsed.status(), Code::invalid_argument);
    return false;
  }
  const auto again = kiln::Target::parse(parsed->text());
  expect(again && *again == *parsed && again->text() == parsed->text(), "a text is that of its target");
  expect(features_of(parsed->arch).contains(parsed->features), "features are those of the architecture");
  expect(parsed->features.has(Feature::sve) == (parsed->sve_bits != 0), "SVE has a vector length");
  expect(parsed->features.has(Feature::sme) == (parsed->sme_bits != 0), "SME has a vector length");
  expect((parsed->arch == Arch::nvptx) == (parsed->sm != 0), "an NVIDIA target has an SM");
  return true;
}

std::vector<Seed> seeds() {
  std::vector<Seed> seeds = {accepted("x86_64:"),      accepted("aarch64:sve,neon,sme;sme=512;sve=384"),
                             accepted("nvptx:sm_90a"), accepted("nvptx:sm_80"),
                             refused("avx2,fma"),      refused("aarch64:neon,sve;sve=0128"),
                             refused("nvptx:sm_9999a")};
  for (const KnownTarget& known : known_targets()) {
    seeds.push_back(accepted(known.name));
    seeds.push_back(accepted(known.text));
  }
  return seeds;
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
