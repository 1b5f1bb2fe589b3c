#include "jit/op.h"

#include <algorithm>
#include <charconv>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "jit/ops/attention.h"
#include "jit/ops/fp8_block_bmm.h"
#include "jit/ops/int4_mm.h"
#include "jit/ops/int8_linear.h"
#include "jit/ops/int8_mm.h"

namespace kiln {
namespace {

constexpr std::string_view kAnyText = "any";

std::string allowed_values(const FieldSpec& field) {
  if (!field.choices.empty())
    return fmt::format("one of {}", fmt::join(field.choices, ", "));
  return fmt::format("an integer from {} to {}{}", field.min, field.max, field.any_allowed ? " or any" : "");
}

Status bad_field(const OpSpec& op, const FieldSpec& field, std::string_view value) {
  return Status::error(Code::invalid_argument,
                       fmt::format("{}: {}={}: allowed is {}", op.name, field.name, value, allowed_values(field)));
}

Result<Device> parse_device(std::string_view text) {
  if (text == "cpu")
    return Device{};
  if (text == "cuda")
    return Device{DeviceKind::cuda, 0};
  if (text.starts_with("cuda:")) {
    const std::string_view digits = text.substr(5);
    std::uint8_t index = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
    if (error == std::errc() && end == digits.data() + digits.size())
      return Device{DeviceKind::cuda, index};
  }
  return Status::error(Code::invalid_argument,
                       fmt::format("device={}: allowed is cpu, cuda or cuda:0 to cuda:255", text));
}

std::string value_text(const FieldSpec& field, std::int64_t value) {
  if (field.any_allowed && value == kAny)
    return std::string(kAnyText);
  if (!field.choices.empty() && value >= 0 && value < static_cast<std::int64_t>(field.choices.size()))
    return std::string(field.choices[static_cast<std::size_t>(value)]);
  return std::to_string(value);
}

} // namespace

std::string_view name_of(Dtype dtype) {
  constexpr std::string_view names[] = {"s8", "u8", "s32", "f32", "bf16", "f16", "e4m3", "e5m2"};
  return names[static_cast<int>(dtype)];
}

std::size_t size_of(Dtype dtype) {
  constexpr std::size_t sizes[] = {1, 1, 4, 4, 2, 2, 1, 1};
  return sizes[static_cast<int>(dtype)];
}

std::span<const OpSpec> op_table() {
  static const OpSpec table[] = {int8_mm::op(), int8_linear::op(), int4_mm::op(), fp8_block_bmm::op(), attention::op()};
  return table;
}

const OpSpec* find_op(OpId id) {
  for (const OpSpec& op : op_table())
    if (op.id == id)
      return &op;
  return nullptr;
}

const OpSpec* find_op(std::string_view name) {
  for (const OpSpec& op : op_table())
    if (op.name == name)
      return &op;
  return nullptr;
}

std::string known_op_names() {
  std::string names;
  for (const OpSpec& op : op_table())
    names += (names.empty() ? "" : ", ") + std::string(op.name);
  return names;
}

int find_field(const OpSpec& op, std::string_view name) {
  for (std::size_t i = 0; i < op.fields.size(); ++i)
    if (op.fields[i].name == name)
      return static_cast<int>(i);
  return -1;
}

std::vector<KernelDesc> one_for_each_kernel(std::span<const KernelDesc> descs) {
  std::vector<KernelDesc> chosen;
  for (const KernelDesc& desc : descs) {
    const OpSpec& op = *find_op(desc.op);
    const auto same = std::find_if(chosen.begin(), chosen.end(),
                                   [&](const KernelDesc& other) { return op.canonical(other) == op.canonical(desc); });
    const auto m = static_cast<std::size_t>(find_field(op, "m"));
    if (same == chosen.end())
      chosen.push_back(desc);
    else if (same->value[m] != kAny && (desc.value[m] == kAny || desc.value[m] > same->value[m]))
      *same = desc;
  }
  return chosen;
}

Result<std::int64_t> parse_field(const OpSpec& op, const FieldSpec& field, std::string_view text) {
  for (std::size_t i = 0; i < field.choices.size(); ++i)
    if (field.choices[i] == text)
      return static_cast<std::int64_t>(i);
  if (!field.choices.empty())
    return bad_field(op, field, text);
  if (field.any_allowed && text == kAnyText)
    return kAny;
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < field.min || value > field.max)
    return bad_field(op, field, text);
  return value;
}

Result<KernelDesc> desc_from_fields(std::string_view op_name,
                                    std::span<const std::pair<std::string, std::string>> fields) {
  const OpSpec* op = find_op(op_name);
  if (op == nullptr)
    return Status::error(Code::invalid_argument,
                         fmt::format("unknown op '{}': known are {}", op_name, known_op_names()));
  KernelDesc desc;
  desc.op = op->id;
  std::vector<bool> given(op->fields.size());
  bool device_given = false;
  for (const auto& [name, value] : fields) {
    const int i = find_field(*op, name);
    const bool repeated = name == "device" ? device_given : i >= 0 && given[static_cast<std::size_t>(i)];
    if (repeated)
      return Status::error(Code::invalid_argument, fmt::format("{}: field {} is given twice", op->name, name));
    if (name == "device") {
      const Result<Device> device = parse_device(value);
      if (!device)
        return device.status();
      desc.device = *device;
      device_given = true;
      continue;
    }
    if (i < 0) {
      std::string names;
      for (const FieldSpec& field : op->fields)
        names += std::string(field.name) + ", ";
      return Status::error(Code::invalid_argument,
                           fmt::format("{}: unknown field '{}': known are {}device", op->name, name, names));
    }
    const Result<std::int64_t> parsed = parse_field(*op, op->fields[static_cast<std::size_t>(i)], value);
    if (!parsed)
      return parsed.status();
    desc.value[static_cast<std::size_t>(i)] = *parsed;
    given[static_cast<std::size_t>(i)] = true;
  }
  for (std::size_t i = 0; i < op->fields.size(); ++i) {
    if (given[i])
      continue;
    const FieldSpec& field = op->fields[i];
    if (field.required)
      return Status::error(Code::invalid_argument, fmt::format("{}: field {} is missing: give {}", op->name, field.name,
                                                               allowed_values(field)));
    desc.value[i] = field.default_value;
  }
  if (Status status = check_desc(desc); !status)
    return status;
  return desc;
}

Result<KernelDesc> parse_desc(std::string_view text) {
  std::vector<std::pair<std::string, std::string>> fields;
  std::string_view op;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(' '), text.size());
    const std::string_view word = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (word.empty())
      continue;
    if (op.empty()) {
      op = word;
      continue;
    }
    const std::size_t equals = word.find('=');
    if (equals == std::string_view::npos)
      return Status::error(Code::invalid_argument, fmt::format("'{}' is not of the form field=value", word));
    fields.emplace_back(word.substr(0, equals), word.substr(equals + 1));
  }
  return desc_from_fields(op, fields);
}

Status check_desc(const KernelDesc& desc) {
  const OpSpec* op = find_op(desc.op);
  if (op == nullptr)
    return Status::error(Code::invalid_argument,
                         fmt::format("unknown op {}: known are {}", static_cast<int>(desc.op), known_op_names()));
  for (std::size_t i = 0; i < op->fields.size(); ++i) {
    const FieldSpec& field = op->fields[i];
    const std::int64_t value = desc.value[i];
    const bool in_range = field.choices.empty() ? value >= field.min && value <= field.max
                                                : value >= 0 && value < static_cast<std::int64_t>(field.choices.size());
    if (!in_range && !(field.any_allowed && value == kAny))
      return bad_field(*op, field, value_text(field, value));
  }
  return op->check ? op->check(desc) : Status();
}

std::string KernelDesc::text() const {
  const OpSpec* spec = find_op(op);
  if (spec == nullptr)
    return "none";
  std::string out(spec->name);
  for (std::size_t i = 0; i < spec->fields.size(); ++i)
    out += fmt::format(" {}={}", spec->fields[i].name, value_text(spec->fields[i], value[i]));
  if (device.kind == DeviceKind::cuda)
    out += fmt::format(" device=cuda:{}", device.index);
  return out;
}

} // namespace kiln
