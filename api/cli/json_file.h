#pragma once
#include <map>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "cache/status.h"

namespace kiln::cli {

/// A JSON file that somebody wrote by hand: its value, and where in the file each part of it stands.
class JsonFile {
public:
  /// Code::invalid_argument with path, line and what is wrong.
  static Result<JsonFile> read(const std::string& path);

  const nlohmann::json& root() const { return root_; }
  /// `PATH:LINE: FIELD: message`, the field given as a JSON pointer (RFC 6901, as `/kernels/2/n`; "" is the whole
  /// file).
  Status error(const std::string& pointer, std::string_view message) const;

private:
  explicit JsonFile(std::string path) : path_(std::move(path)) {}
  std::string path_;
  nlohmann::json root_;
  std::map<std::string, int> lines_; ///< of pointers near the root
};

} // namespace kiln::cli
