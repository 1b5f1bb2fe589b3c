#include "jit/code_object.h"

#include <algorithm>
#include <bit>
#include <string_view>

#include <fmt/format.h>

namespace kiln {
namespace {

constexpr std::uint32_t kMagic = 0x43'4e'4c'4b; // "KLNC" in the file
/// An object is written in the lowest version that has what it needs: of one object there is one form.
constexpr std::uint32_t kFormatVersion = 2, kFormatVersionConfigured = 3;

// Bounds far above what any op needs: they keep damaged input from asking for memory or time.
constexpr std::uint32_t kMaxEntries = 64;
constexpr std::uint32_t kMaxPlanValues = 256;
constexpr std::size_t kMaxNameLength = 64;
constexpr std::uint32_t kMaxAlignment = 4096;
constexpr std::int64_t kMaxVectorBits = 2048; // SVE's architectural bound
constexpr std::uint32_t kMaxRegisters = 256;
constexpr std::int32_t kMinSm = 10, kMaxSm = 999, kMaxDriverVersion = 1'000'000;
constexpr std::string_view kFormats[] = {"flat", "ptx", "cubin"};

Status damaged(std::string what) {
  return Status::error(Code::integrity, "damaged code object: " + std::move(what));
}

bool is_name(std::string_view name) {
  return !name.empty() && name.size() <= kMaxNameLength && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
  });
}

Status check_entry(const CodeObject& object, const CodeObject::Entry& entry) {
  if (!is_name(entry.name))
    return damaged(
        fmt::format("entry name of {} bytes is not 1…{} of [A-Za-z0-9_]", entry.name.size(), kMaxNameLength));
  if (entry.offset >= object.image.size())
    return damaged(
        fmt::format("entry {} at offset {} of an image of {} bytes", entry.name, entry.offset, object.image.size()));
  if (object.arch == Arch::aarch64 && entry.offset % 4 != 0)
    return damaged(fmt::format("entry {} at offset {}, not a multiple of 4", entry.name, entry.offset));
  return {};
}

/// What only code for GPUs has, and what it has not.
Status check_format(const CodeObject& object) {
  const bool gpu = object.arch == Arch::nvptx;
  if (gpu != (object.format != CodeFormat::flat))
    return damaged(fmt::format("format {} for {}", name_of(object.format), name_of(object.arch)));
  if (gpu ? object.sm < kMinSm || object.sm > kMaxSm : object.sm != 0)
    return damaged(fmt::format("SM {} for {}", object.sm, name_of(object.arch)));
  const bool assembled = object.format == CodeFormat::cubin;
  if (object.compiler.size() > kMaxNameLength || object.compiler.empty() == assembled)
    return damaged(
        fmt::format("a compiler's name of {} bytes for format {}", object.compiler.size(), name_of(object.format)));
  if (object.driver_version < 0 || object.driver_version > kMaxDriverVersion ||
      (!assembled && (object.driver_version != 0 || object.ptx_digest != Digest{})))
    return damaged(fmt::format("driver version {} for format {}", object.driver_version, name_of(object.format)));
  return {};
}

bool is_configured(const CodeObject& object) {
  return !object.configuration.empty() || !object.tuned_for.empty();
}

/// What is read by people, in keys and on terminals.
bool is_printable(std::string_view text) {
  return text.size() <= kMaxNameLength &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
}

Status check(const CodeObject& object) {
  if (object.image.empty())
    return damaged("the image is empty");
  if (Status status = check_format(object); !status)
    return status;
  if (!std::has_single_bit(object.alignment) || object.alignment > kMaxAlignment)
    return damaged(fmt::format("alignment {} is not a power of two up to {}", object.alignment, kMaxAlignment));
  if (const Features foreign = object.features.without(features_of(object.arch)); !foreign.empty())
    return damaged(fmt::format("{} is no feature of {}", foreign.text(), name_of(object.arch)));
  if (object.vector_bits < 0 || object.vector_bits > kMaxVectorBits || object.vector_bits % 128 != 0)
    return damaged(
        fmt::format("vector length {} is not a multiple of 128 up to {}", object.vector_bits, kMaxVectorBits));
  if (object.vector_registers > kMaxRegisters || object.general_registers > kMaxRegisters)
    return damaged(fmt::format("{} vector and {} general registers, at most {} are allowed", object.vector_registers,
                               object.general_registers, kMaxRegisters));
  if (!is_printable(object.configuration) || !is_printable(object.tuned_for) ||
      (object.configuration.empty() && !object.tuned_for.empty()))
    return damaged(fmt::format("a configuration of {} bytes, for a device's name of {}", object.configuration.size(),
                               object.tuned_for.size()));
  if (object.entries.empty())
    return damaged("it has no entry");
  for (auto entry = object.entries.begin(); entry != object.entries.end(); ++entry) {
    if (Status status = check_entry(object, *entry); !status)
      return status;
    if (std::any_of(object.entries.begin(), entry, [&](const auto& other) { return other.name == entry->name; }))
      return damaged(fmt::format("entry {} is there twice", entry->name));
  }
  for (auto value = object.plan.begin(); value != object.plan.end(); ++value) {
    if (!is_name(value->first))
      return damaged(fmt::format("a launch plan name of {} bytes is not 1…{} of [A-Za-z0-9_]", value->first.size(),
                                 kMaxNameLength));
    if (std::any_of(object.plan.begin(), value, [&](const auto& other) { return other.first == value->first; }))
      return damaged(fmt::format("launch plan value {} is there twice", value->first));
  }
  return {};
}

} // namespace

std::string_view name_of(CodeFormat format) {
  return kFormats[static_cast<std::size_t>(format)];
}

Bytes CodeObject::serialise() const {
  Writer out;
  out.u32(kMagic);
  out.u32(is_configured(*this) ? kFormatVersionConfigured : kFormatVersion);
  out.u8(static_cast<std::uint8_t>(arch));
  out.string(features.text());
  out.i64(vector_bits);
  out.u8(static_cast<std::uint8_t>(format));
  out.u32(static_cast<std::uint32_t>(sm));
  out.string(compiler);
  out.u32(static_cast<std::uint32_t>(driver_version));
  out.raw(ptx_digest.bytes);
  if (is_configured(*this)) {
    out.string(configuration);
    out.string(tuned_for);
  }
  out.u32(vector_registers);
  out.u32(general_registers);
  out.u32(alignment);
  out.u32(static_cast<std::uint32_t>(entries.size()));
  for (const Entry& entry : entries) {
    out.string(entry.name);
    out.u64(entry.offset);
  }
  out.u32(plan_version);
  out.u32(static_cast<std::uint32_t>(plan.size()));
  for (const auto& [name, value] : plan) {
    out.string(name);
    out.i64(value);
  }
  out.blob(image);
  return out.take();
}

Result<CodeObject> CodeObject::parse(ByteSpan bytes) {
  Reader in(bytes);
  if (const std::uint32_t magic = in.u32(); !in.ok() || magic != kMagic)
    return damaged("it does not begin with KLNC");
  const std::uint32_t version = in.u32();
  if (!in.ok() || (version != kFormatVersion && version != kFormatVersionConfigured))
    return damaged(
        fmt::format("format version {}, known are {} and {}", version, kFormatVersion, kFormatVersionConfigured));

  CodeObject object;
  const std::uint8_t arch = in.u8();
  if (arch > static_cast<std::uint8_t>(Arch::nvptx))
    return damaged(fmt::format("architecture number {} is unknown", arch));
  object.arch = static_cast<Arch>(arch);
  const std::string feature_names = in.string();
  Result<Features> features = Features::parse(feature_names);
  if (!features)
    return damaged(features.status().message());
  if (features->text() != feature_names) // of one object there is one form
    return damaged(fmt::format("the features {} are not in their order, {}", feature_names, features->text()));
  object.features = *features;

  const std::int64_t vector_bits = in.i64();
  if (vector_bits < 0 || vector_bits > kMaxVectorBits)
    return damaged(fmt::format("vector length {} is not within 0…{}", vector_bits, kMaxVectorBits));
  object.vector_bits = static_cast<std::int32_t>(vector_bits);
  const std::uint8_t format = in.u8();
  if (format >= std::size(kFormats))
    return damaged(fmt::format("format number {} is unknown", format));
  object.format = static_cast<CodeFormat>(format);
  object.sm = static_cast<std::int32_t>(in.u32());
  object.compiler = in.string();
  object.driver_version = static_cast<std::int32_t>(in.u32());
  if (const ByteSpan digest = in.raw(object.ptx_digest.bytes.size()); !digest.empty())
    std::copy(digest.begin(), digest.end(), object.ptx_digest.bytes.begin());
  if (version == kFormatVersionConfigured) {
    object.configuration = in.string();
    object.tuned_for = in.string();
    if (in.ok() && !is_configured(object))
      return damaged("it has no configuration, in the format of those that have one");
  }
  object.vector_registers = in.u32();
  object.general_registers = in.u32();
  object.alignment = in.u32();

  const std::uint32_t entry_count = in.u32();
  if (entry_count > kMaxEntries)
    return damaged(fmt::format("{} entries, at most {} are allowed", entry_count, kMaxEntries));
  for (std::uint32_t i = 0; i < entry_count && in.ok(); ++i) {
    std::string name = in.string();
    object.entries.push_back({std::move(name), in.u64()});
  }
  object.plan_version = in.u32();
  const std::uint32_t plan_count = in.u32();
  if (plan_count > kMaxPlanValues)
    return damaged(fmt::format("{} launch plan values, at most {} are allowed", plan_count, kMaxPlanValues));
  for (std::uint32_t i = 0; i < plan_count && in.ok(); ++i) {
    std::string name = in.string();
    object.plan.emplace_back(std::move(name), in.i64());
  }
  const ByteSpan image = in.blob();
  if (!in.finished())
    return damaged(in.ok() ? "bytes follow its end" : "it ends too early");
  object.image.assign(image.begin(), image.end());

  if (Status status = check(object); !status)
    return status;
  return object;
}

} // namespace kiln
