#include "api/cli/operands.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "api/cli/tensors.h"

namespace kiln::cli {
namespace {

Status bad_word(const std::string& message) {
  return Status::error(Code::invalid_argument, message);
}

std::string tensor_names(const OpSpec& op) {
  std::string names;
  for (const TensorSpec& tensor : op.tensors)
    names += std::string(tensor.name) + ", ";
  return names + "out";
}

const TensorSpec* find_tensor(const OpSpec& op, std::string_view name) {
  for (const TensorSpec& tensor : op.tensors)
    if (tensor.name == name || (tensor.output && name == "out"))
      return &tensor;
  return nullptr;
}

Status no_tensors(const Operands& operands) {
  for (const auto& [name, path] : operands.files)
    return bad_word(fmt::format("{}=@{}: this command takes no tensors", name, path));
  for (const auto& [name, value] : operands.values)
    return bad_word(fmt::format("{}={}: this command takes no tensors", name, value));
  return {};
}

bool is_named(const NamedTexts& texts, std::string_view name) {
  return std::any_of(texts.begin(), texts.end(), [&](const auto& text) { return text.first == name; });
}

Status add_file(Operands& operands, const std::string& name, const std::string& path) {
  const TensorSpec* tensor = find_tensor(*operands.op, name);
  if (tensor == nullptr)
    return bad_word(
        fmt::format("{}: unknown tensor '{}': known are {}", operands.op->name, name, tensor_names(*operands.op)));
  if (operands.gives(tensor->name))
    return bad_word(fmt::format("{}: tensor {} is given twice", operands.op->name, tensor->name));
  if (path.empty())
    return bad_word(fmt::format("{}: {}=@ lacks the name of a file", operands.op->name, name));
  operands.files.emplace_back(tensor->name, path);
  return {};
}

/// Stands for a size that is not known yet: shape(desc) shows where it comes back. No field has such a value.
std::int64_t placeholder(std::size_t field) {
  return -1'000'003 - static_cast<std::int64_t>(field);
}

/// The shape that a tensor of a partly known desc has, as `[m, 4096]`.
std::string asked_text(const OpSpec& op, const std::vector<std::int64_t>& shape) {
  std::vector<std::string> extents;
  for (const std::int64_t extent : shape) {
    extents.push_back(std::to_string(extent));
    for (std::size_t i = 0; i < op.fields.size(); ++i)
      if (extent == placeholder(i))
        extents.back() = op.fields[i].name;
  }
  return fmt::format("[{}]", fmt::join(extents, ", "));
}

} // namespace

bool Operands::gives(std::string_view tensor) const {
  return is_named(files, tensor) || is_named(values, tensor);
}

Result<Operands> parse_operands(std::span<const std::string> words) {
  Operands operands;
  if (words.empty())
    return bad_word(fmt::format("no op given: known are {}", known_op_names()));
  operands.op = find_op(words.front());
  if (operands.op == nullptr)
    return bad_word(fmt::format("unknown op '{}': known are {}", words.front(), known_op_names()));
  for (const std::string& word : words.subspan(1)) {
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos || equals == 0)
      return bad_word(fmt::format("'{}' is neither field=value nor tensor=@file.npy", word));
    const std::string name = word.substr(0, equals), value = word.substr(equals + 1);
    if (!value.starts_with('@')) {
      const TensorSpec* const tensor = find_field(*operands.op, name) < 0 ? find_tensor(*operands.op, name) : nullptr;
      if (tensor != nullptr && !tensor->optional)
        return bad_word(fmt::format("'{}': {} is a tensor: give {}=@file.npy", word, name, name));
      if (tensor != nullptr && operands.gives(name))
        return bad_word(fmt::format("{}: tensor {} is given twice", operands.op->name, name));
      (tensor != nullptr ? operands.values : operands.fields).emplace_back(name, value);
    } else if (Status status = add_file(operands, name, value.substr(1)); !status) {
      return status;
    }
  }
  return operands;
}

Result<KernelDesc> small_desc(const OpSpec& op) {
  NamedTexts fields;
  for (const FieldSpec& field : op.fields)
    if (field.required)
      fields.emplace_back(field.name, std::to_string(field.small));
  return desc_from_fields(op.name, fields);
}

Result<std::optional<Target>> parse_target(const std::optional<std::string>& text) {
  if (!text)
    return std::optional<Target>();
  Result<Target> target = Target::parse(*text);
  if (!target)
    return target.status();
  return std::optional<Target>(std::move(*target));
}

void take_device_of(const std::optional<Target>& target, KernelDesc& desc) {
  if (target && target->arch == Arch::nvptx && desc.device.kind == DeviceKind::cpu)
    desc.device = {DeviceKind::cuda, 0};
}

Result<KernelDesc> desc_from_words(std::span<const std::string> words) {
  const Result<Operands> operands = parse_operands(words);
  if (!operands)
    return operands.status();
  if (Status status = no_tensors(*operands); !status)
    return status;
  return desc_from_fields(operands->op->name, operands->fields);
}

Result<KernelDesc> desc_from_shapes(const Operands& operands, const GivenShape& given_shape) {
  const OpSpec& op = *operands.op;
  NamedTexts fields = operands.fields;
  KernelDesc probe;
  probe.op = op.id;
  for (std::size_t i = 0; i < op.fields.size(); ++i) {
    const FieldSpec& field = op.fields[i];
    probe.value[i] = field.required || field.any_allowed ? placeholder(i) : field.default_value;
    for (const auto& [name, text] : operands.fields)
      if (name == field.name) {
        const Result<std::int64_t> value = parse_field(op, field, text);
        if (!value)
          return value.status();
        probe.value[i] = *value;
      }
  }
  for (const TensorSpec& tensor : op.tensors) {
    const std::vector<std::int64_t>* given = given_shape(tensor.name);
    const std::vector<std::int64_t> asked = tensor.shape(probe);
    if (given == nullptr)
      continue;
    if (given->size() != asked.size())
      return bad_word(fmt::format("{0}: tensor {1} has shape {2}: {0} takes {3}", op.name, tensor.name,
                                  shape_text(*given), asked_text(op, asked)));
    for (std::size_t i = 0; i < op.fields.size(); ++i) {
      const auto at = std::find(asked.begin(), asked.end(), placeholder(i));
      if (at == asked.end() || probe.value[i] != placeholder(i))
        continue;
      probe.value[i] = (*given)[static_cast<std::size_t>(at - asked.begin())];
      fields.emplace_back(op.fields[i].name, std::to_string(probe.value[i]));
    }
  }

  const Result<KernelDesc> desc = desc_from_fields(op.name, fields);
  if (!desc)
    return desc;
  for (std::size_t i = 0; i < op.fields.size(); ++i)
    if (op.fields[i].any_allowed && desc->value[i] == kAny)
      return bad_word(fmt::format("{}: {}=any: to run, give a number", op.name, op.fields[i].name));
  for (const TensorSpec& tensor : op.tensors)
    if (operands.gives(tensor.name) && !tensor.is_present(*desc))
      return bad_word(fmt::format("{}: tensor {} is given: {} has none", op.name, tensor.name, desc->text()));
  for (const TensorSpec& tensor : op.tensors)
    if (const std::vector<std::int64_t>* given = given_shape(tensor.name);
        given != nullptr && *given != tensor.shape(*desc))
      return bad_word(fmt::format("{}: tensor {} has shape {}: {} takes {}", op.name, tensor.name, shape_text(*given),
                                  desc->text(), shape_text(tensor.shape(*desc))));
  return desc;
}

} // namespace kiln::cli
