#include "api/cli/manifest.h"

#include <algorithm>

#include <fmt/format.h>

#include "api/cli/json_file.h"
#include "api/cli/operands.h"
#include "jit/op.h"

namespace kiln::cli {
namespace {

using nlohmann::json;

/// Lists multiply: a short file must not ask for more than anyone can want.
constexpr std::size_t kMaxKernels = 100'000;

Status bad_value(const JsonFile& file, const std::string& pointer, const json& value) {
  return file.error(pointer, fmt::format("is a value of type {}: give an integer or a name", value.type_name()));
}

/// The text that `key=value` would have.
Result<std::string> field_text(const JsonFile& file, const std::string& pointer, const json& value) {
  if (value.is_number_integer())
    return value.dump();
  if (value.is_string())
    return value.get<std::string>();
  return bad_value(file, pointer, value);
}

Result<std::string> checked_text(const JsonFile& file, const std::string& pointer, const OpSpec& op,
                                 const std::string& name, const json& value) {
  Result<std::string> text = field_text(file, pointer, value);
  if (!text || name == "device")
    return text;
  const Result<std::int64_t> parsed = parse_field(op, op.fields[static_cast<std::size_t>(find_field(op, name))], *text);
  return parsed ? text : file.error(pointer, parsed.status().message());
}

/// All fields of one kernel, each with the values that it takes in turn.
using FieldLists = std::vector<std::pair<std::string, std::vector<std::string>>>;

Result<FieldLists> field_lists(const JsonFile& file, const std::string& pointer, const OpSpec& op, const json& entry) {
  FieldLists lists;
  for (const auto& [name, value] : entry.items()) {
    if (name == "op")
      continue;
    const std::string at = pointer + "/" + name;
    if (name != "device" && find_field(op, name) < 0)
      return file.error(at, fmt::format("unknown field of {}: known are op, {}device", op.name, [&] {
                          std::string names;
                          for (const FieldSpec& field : op.fields)
                            names += std::string(field.name) + ", ";
                          return names;
                        }()));
    auto& [list_name, texts] = lists.emplace_back(name, std::vector<std::string>());
    const json values = value.is_array() ? value : json::array({value});
    if (values.empty())
      return file.error(at, "is an empty list: give a value");
    for (std::size_t i = 0; i < values.size(); ++i) {
      Result<std::string> text =
          checked_text(file, value.is_array() ? fmt::format("{}/{}", at, i) : at, op, name, values[i]);
      if (!text)
        return text.status();
      texts.push_back(std::move(*text));
    }
  }
  return lists;
}

Status append_kernels(const JsonFile& file, const std::string& pointer, const json& entry,
                      std::vector<KernelDesc>& descs) {
  if (!entry.is_object())
    return file.error(pointer, "is no object: give {\"op\": …, field: value, …}");
  if (!entry.contains("op") || !entry["op"].is_string())
    return file.error(entry.contains("op") ? pointer + "/op" : pointer,
                      fmt::format("needs \"op\" as a string: known are {}", known_op_names()));
  const OpSpec* op = find_op(entry["op"].get<std::string>());
  if (op == nullptr)
    return file.error(pointer + "/op",
                      fmt::format("unknown op '{}': known are {}", entry["op"].get<std::string>(), known_op_names()));
  const Result<FieldLists> lists = field_lists(file, pointer, *op, entry);
  if (!lists)
    return lists.status();

  std::vector<std::size_t> choice(lists->size(), 0);
  for (bool more = true; more;) {
    NamedTexts fields;
    for (std::size_t i = 0; i < lists->size(); ++i)
      fields.emplace_back((*lists)[i].first, (*lists)[i].second[choice[i]]);
    const Result<KernelDesc> desc = desc_from_fields(op->name, fields);
    if (!desc)
      return file.error(pointer, desc.status().message());
    if (descs.size() == kMaxKernels)
      return file.error(pointer, fmt::format("asks for more than {} kernels in all", kMaxKernels));
    descs.push_back(*desc);
    more = false;
    for (std::size_t i = 0; i < choice.size() && !more; ++i) {
      more = ++choice[i] < (*lists)[i].second.size();
      if (!more)
        choice[i] = 0;
    }
  }
  return {};
}

} // namespace

Result<std::vector<KernelDesc>> read_manifest(const std::string& path) {
  const Result<JsonFile> file = JsonFile::read(path);
  if (!file)
    return file.status();
  const json& root = file->root();
  if (!root.is_object() || !root.contains("kernels") || !root["kernels"].is_array())
    return file->error(
        "", "is no manifest: it needs an object with a list \"kernels\" (a model's config.json goes with --model)");
  for (const auto& [name, value] : root.items())
    if (name != "kernels")
      return file->error("/" + name, "unknown field: known is kernels");
  std::vector<KernelDesc> descs;
  for (std::size_t i = 0; i < root["kernels"].size(); ++i)
    if (Status status = append_kernels(*file, fmt::format("/kernels/{}", i), root["kernels"][i], descs); !status)
      return status;
  return descs;
}

} // namespace kiln::cli
