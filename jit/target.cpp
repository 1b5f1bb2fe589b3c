#include "jit/target.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <utility>

#include <fmt/format.h>

namespace kiln {
namespace {

struct FeatureRow {
  Feature feature;
  Arch arch;
  std::string_view name;
};

constexpr FeatureRow kFeatures[] = {
    {Feature::avx2, Arch::x86_64, "avx2"},
    {Feature::fma, Arch::x86_64, "fma"},
    {Feature::f16c, Arch::x86_64, "f16c"},
    {Feature::bmi2, Arch::x86_64, "bmi2"},
    {Feature::avxvnni, Arch::x86_64, "avxvnni"},
    {Feature::avx512f, Arch::x86_64, "avx512f"},
    {Feature::avx512bw, Arch::x86_64, "avx512bw"},
    {Feature::avx512vl, Arch::x86_64, "avx512vl"},
    {Feature::avx512dq, Arch::x86_64, "avx512dq"},
    {Feature::avx512vnni, Arch::x86_64, "avx512vnni"},
    {Feature::avx512bf16, Arch::x86_64, "avx512bf16"},
    {Feature::amx_tile, Arch::x86_64, "amx-tile"},
    {Feature::amx_int8, Arch::x86_64, "amx-int8"},
    {Feature::amx_bf16, Arch::x86_64, "amx-bf16"},
    {Feature::neon, Arch::aarch64, "neon"},
    {Feature::dotprod, Arch::aarch64, "dotprod"},
    {Feature::i8mm, Arch::aarch64, "i8mm"},
    {Feature::bf16, Arch::aarch64, "bf16"},
    {Feature::fp16, Arch::aarch64, "fullfp16"},
    {Feature::sve, Arch::aarch64, "sve"},
    {Feature::sve2, Arch::aarch64, "sve2"},
    {Feature::sme, Arch::aarch64, "sme"},
    {Feature::sme2, Arch::aarch64, "sme2"},
};

constexpr bool rows_follow_the_enum() {
  for (std::size_t i = 0; i < std::size(kFeatures); ++i)
    if (kFeatures[i].feature != static_cast<Feature>(i))
      return false;
  return std::size(kFeatures) == static_cast<std::size_t>(Feature::count);
}
static_assert(rows_follow_the_enum());

constexpr std::string_view kArchs[] = {"x86_64", "aarch64", "nvptx"};

// psABI levels from the x86-64 psABI (section "Micro-Architecture Levels"); processors as in LLVM 19's X86.td and
// AArch64Processors.td.
constexpr KnownTarget kKnownTargets[] = {
    {"x86-64-v3", "x86_64:avx2,fma,f16c,bmi2"},
    {"x86-64-v4", "x86_64:avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq"},
    {"alderlake", "x86_64:avx2,fma,f16c,bmi2,avxvnni"},
    {"cascadelake", "x86_64:avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"},
    {"sapphirerapids", "x86_64:avx2,fma,f16c,bmi2,avxvnni,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,"
                       "amx-tile,amx-int8,amx-bf16"},
    {"zen4", "x86_64:avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"},
    {"zen5", "x86_64:avx2,fma,f16c,bmi2,avxvnni,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16"},
    {"cortex-a53", "aarch64:neon"},
    {"cortex-a72", "aarch64:neon"},
    {"cortex-a55", "aarch64:neon,dotprod,fullfp16"},
    {"cortex-a76", "aarch64:neon,dotprod,fullfp16"},
    {"cortex-a78", "aarch64:neon,dotprod,fullfp16"},
    {"cortex-x1", "aarch64:neon,dotprod,fullfp16"},
    {"cortex-x2", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sve,sve2;sve=128"},
    {"cortex-x4", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sve,sve2;sve=128"},
    {"neoverse-n1", "aarch64:neon,dotprod,fullfp16"},
    {"neoverse-v1", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sve;sve=256"},
    {"neoverse-n2", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sve,sve2;sve=128"},
    {"neoverse-v2", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sve,sve2;sve=128"},
    {"neoverse-v3", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sve,sve2;sve=128"},
    {"graviton2", "aarch64:neon,dotprod,fullfp16"},                            // neoverse-n1
    {"graviton3", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sve;sve=256"},      // neoverse-v1
    {"graviton4", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sve,sve2;sve=128"}, // neoverse-v2
    {"ampere1", "aarch64:neon,dotprod,i8mm,bf16,fullfp16"},
    {"oryon-1", "aarch64:neon,dotprod,i8mm,bf16,fullfp16"},
    {"a64fx", "aarch64:neon,fullfp16,sve;sve=512"},
    {"apple-m1", "aarch64:neon,dotprod,fullfp16"},
    {"apple-m2", "aarch64:neon,dotprod,i8mm,bf16,fullfp16"},
    {"apple-m3", "aarch64:neon,dotprod,i8mm,bf16,fullfp16"},
    {"apple-m4", "aarch64:neon,dotprod,i8mm,bf16,fullfp16,sme,sme2;sme=512"},
};

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const std::size_t end = text.find(separator);
    parts.push_back(text.substr(0, end));
    if (end == std::string_view::npos)
      return parts;
    text.remove_prefix(end + 1);
  }
}

bool parse_decimal(std::string_view text, int& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc{} && end == text.data() + text.size() && text.front() != '-' && text.front() != '0';
}

template <class Rows, class Name> std::string joined(const Rows& rows, std::string_view separator, Name name) {
  std::string list;
  for (const auto& row : rows)
    list.append(list.empty() ? "" : separator).append(name(row));
  return list;
}

Status bad_target(std::string_view text, std::string_view why) {
  return Status::error(
      Code::invalid_argument,
      fmt::format(
          "target '{}': {}; give ARCH:FEATURE,… with ARCH one of {} (`;sve=BITS` and `;sme=BITS` follow on aarch64, "
          "nvptx is nvptx:sm_90a or sm_90a alone), or one of {}",
          text, why, joined(kArchs, ", ", [](std::string_view name) { return name; }),
          joined(kKnownTargets, ", ", [](const KnownTarget& known) { return known.name; })));
}

bool is_vector_length(Feature feature, int bits) {
  if (bits < 128 || bits > 2048 || bits % 128 != 0)
    return false;
  return feature != Feature::sme || std::has_single_bit(static_cast<unsigned>(bits));
}

/// Of `sve=256` and `sme=512`; empty when fine, else what is wrong.
std::string parse_vector_length(std::string_view part, Target& target) {
  const bool is_sve = part.starts_with("sve=");
  if (!is_sve && !part.starts_with("sme="))
    return fmt::format("'{}' is neither sve=BITS nor sme=BITS", part);
  int& bits = is_sve ? target.sve_bits : target.sme_bits;
  if (bits != 0)
    return fmt::format("'{}' repeats a vector length", part);
  if (part.size() == 4 || !parse_decimal(part.substr(4), bits) ||
      !is_vector_length(is_sve ? Feature::sve : Feature::sme, bits))
    return fmt::format("'{}' is not {} from 128 to 2048", part, is_sve ? "a multiple of 128" : "a power of two");
  return {};
}

std::string parse_nvptx(std::string_view text, Target& target) {
  std::string_view digits = text;
  if (digits.starts_with("sm_")) {
    digits.remove_prefix(3);
    if (digits.ends_with('a'))
      digits.remove_suffix(1);
    if (!digits.empty() && digits.size() <= 3 && parse_decimal(digits, target.sm) &&
        target.text() == fmt::format("nvptx:{}", text))
      return {};
  }
  return fmt::format("'{}' is not sm_NN, with an `a` from sm_{}a on", text, kFirstArchSpecificSm);
}

std::string parse_cpu(std::string_view text, Target& target) {
  const std::vector<std::string_view> parts = split(text, ';');
  const Result<Features> features = Features::parse(parts.front());
  if (!features)
    return features.status().message();
  target.features = *features;
  if (const Features foreign = target.features.without(features_of(target.arch)); !foreign.empty())
    return fmt::format("{} is no feature of {}", foreign.text(), name_of(target.arch));
  for (std::size_t i = 1; i < parts.size(); ++i)
    if (std::string why = parse_vector_length(parts[i], target); !why.empty())
      return why;
  if (target.features.has(Feature::sve) != (target.sve_bits != 0))
    return "the feature sve and sve=BITS go together";
  if (target.features.has(Feature::sme) != (target.sme_bits != 0))
    return "the feature sme and sme=BITS go together";
  for (const auto& [second, first] : {std::pair{Feature::sve2, Feature::sve}, {Feature::sme2, Feature::sme}})
    if (target.features.has(second) && !target.features.has(first))
      return fmt::format("the feature {} needs {}", name_of(second), name_of(first));
  return {};
}

} // namespace

std::string_view name_of(Arch arch) {
  return kArchs[static_cast<std::size_t>(arch)];
}
std::string_view name_of(Feature feature) {
  return kFeatures[static_cast<std::size_t>(feature)].name;
}

Features features_of(Arch arch) {
  Features features;
  for (const FeatureRow& row : kFeatures)
    if (row.arch == arch)
      features.add(row.feature);
  return features;
}

std::vector<Feature> Features::list() const {
  std::vector<Feature> features;
  for (const FeatureRow& row : kFeatures)
    if (has(row.feature))
      features.push_back(row.feature);
  return features;
}

std::string Features::text() const {
  return joined(list(), ",", [](Feature feature) { return name_of(feature); });
}

Result<Features> Features::parse(std::string_view text) {
  Features features;
  if (text.empty())
    return features;
  for (std::string_view name : split(text, ',')) {
    const auto row =
        std::find_if(std::begin(kFeatures), std::end(kFeatures), [&](const auto& r) { return r.name == name; });
    if (row == std::end(kFeatures))
      return Status::error(Code::invalid_argument,
                           fmt::format("unknown feature '{}'; known are {}", name,
                                       joined(kFeatures, ", ", [](const FeatureRow& r) { return r.name; })));
    if (features.has(row->feature))
      return Status::error(Code::invalid_argument, fmt::format("feature '{}' is given twice", name));
    features.add(row->feature);
  }
  return features;
}

std::string Target::text() const {
  if (arch == Arch::nvptx)
    return fmt::format("nvptx:sm_{}{}", sm, sm >= kFirstArchSpecificSm ? "a" : "");
  std::string text = fmt::format("{}:{}", name_of(arch), features.text());
  if (sve_bits != 0)
    text += fmt::format(";sve={}", sve_bits);
  if (sme_bits != 0)
    text += fmt::format(";sme={}", sme_bits);
  return text;
}

Result<Target> Target::parse(std::string_view text) {
  for (const KnownTarget& known : kKnownTargets)
    if (text == known.name)
      return parse(known.text);
  if (text.starts_with("sm_"))
    return parse(fmt::format("{}:{}", name_of(Arch::nvptx), text));
  const std::size_t colon = text.find(':');
  const auto arch = std::find(std::begin(kArchs), std::end(kArchs), text.substr(0, colon));
  if (colon == std::string_view::npos || arch == std::end(kArchs))
    return bad_target(text, "unknown name");
  Target target;
  target.arch = static_cast<Arch>(arch - std::begin(kArchs));
  const std::string_view rest = text.substr(colon + 1);
  const std::string why = target.arch == Arch::nvptx ? parse_nvptx(rest, target) : parse_cpu(rest, target);
  if (!why.empty())
    return bad_target(text, why);
  return target;
}

std::span<const KnownTarget> known_targets() {
  return kKnownTargets;
}

} // namespace kiln
