#include "api/cli/npy.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <fmt/ranges.h>

namespace kiln::cli {
namespace {

struct DescrRow {
  std::string_view descr;
  std::size_t element_bytes;
};
constexpr DescrRow kDescrs[] = {{"|i1", 1}, {"|u1", 1}, {"<u2", 2}, {"<f2", 2}, {"<i4", 4}, {"<f4", 4}};

constexpr std::string_view kMagic = "\x93NUMPY";
/// Far more than any array of these dtypes needs; bounds what a hostile header can make us read.
constexpr std::size_t kMaxHeader = 1 << 16;
constexpr std::size_t kMaxRank = 32;

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

Status bad_file(const std::string& path, std::string_view what) {
  return Status::error(Code::invalid_argument, fmt::format("{}: {}", path, what));
}

struct Header {
  std::string descr;
  bool fortran_order = false;
  std::vector<std::int64_t> shape;
};

/// The header's text is a Python dict of three entries: {'descr': '<i4', 'fortran_order': False, 'shape': (3, 4), }
class HeaderParser {
public:
  explicit HeaderParser(std::string_view text) : text_(text) {}

  /// Empty when fine, else what is wrong.
  std::string parse(Header& header) {
    bool has_descr = false, has_order = false, has_shape = false;
    if (!take('{'))
      return "the header is not a dict";
    while (!take('}')) {
      const std::optional<std::string> key = string();
      if (!key || !take(':'))
        return "the header is not a dict of names";
      bool fine = false;
      if (*key == "descr" && !has_descr)
        fine = has_descr = descr(header.descr);
      else if (*key == "fortran_order" && !has_order)
        fine = has_order = boolean(header.fortran_order);
      else if (*key == "shape" && !has_shape)
        fine = has_shape = tuple(header.shape);
      else
        return fmt::format("the header has an unknown or repeated entry '{}'", *key);
      if (!fine)
        return fmt::format("the header's entry '{}' cannot be read: allowed is {}", *key,
                           *key == "descr"   ? "the name of one dtype, no list of fields"
                           : *key == "shape" ? fmt::format("a tuple of at most {} extents ≥ 0", kMaxRank)
                                             : "True or False");
      if (!take(',') && !next_is('}'))
        return "the header is not a dict";
    }
    skip_space();
    if (!text_.empty())
      return "the header goes on after its dict";
    if (!has_descr || !has_order || !has_shape)
      return "the header lacks one of descr, fortran_order, shape";
    return {};
  }

private:
  void skip_space() { text_.remove_prefix(std::min(text_.find_first_not_of(" \t\r\n"), text_.size())); }
  bool next_is(char c) {
    skip_space();
    return text_.starts_with(c);
  }
  bool take(char c) {
    const bool there = next_is(c);
    text_.remove_prefix(there ? 1 : 0);
    return there;
  }
  std::optional<std::string> string() {
    const char quote = next_is('\'') ? '\'' : '"';
    if (!take(quote))
      return std::nullopt;
    const std::size_t end = text_.find(quote);
    if (end == std::string_view::npos)
      return std::nullopt;
    std::string value(text_.substr(0, end));
    text_.remove_prefix(end + 1);
    return value;
  }
  bool descr(std::string& value) {
    std::optional<std::string> text = string();
    if (!text)
      return false;
    value = std::move(*text);
    return true;
  }
  bool boolean(bool& value) {
    skip_space();
    for (const std::string_view word : {"True", "False"})
      if (text_.starts_with(word)) {
        text_.remove_prefix(word.size());
        value = word == "True";
        return true;
      }
    return false;
  }
  bool tuple(std::vector<std::int64_t>& values) {
    if (!take('('))
      return false;
    while (!take(')')) {
      skip_space();
      std::int64_t value = 0;
      const auto [end, error] = std::from_chars(text_.data(), text_.data() + text_.size(), value);
      if (error != std::errc() || value < 0 || values.size() == kMaxRank)
        return false;
      text_.remove_prefix(static_cast<std::size_t>(end - text_.data()));
      values.push_back(value);
      if (!take(',') && !next_is(')'))
        return false;
    }
    return true;
  }

  std::string_view text_;
};

/// The row for what a header says; byte order means nothing to one-byte types, and writers differ in it.
const DescrRow* find_descr(std::string_view descr) {
  const bool one_byte = descr.size() == 3 && descr[2] == '1';
  for (const DescrRow& row : kDescrs)
    if (row.descr == descr || (one_byte && row.descr.substr(1) == descr.substr(1)))
      return &row;
  return nullptr;
}

/// Text of the header, or what is wrong in `why`.
std::string read_header(std::FILE* file, std::string& why) {
  std::array<std::uint8_t, 8> start;
  if (std::fread(start.data(), 1, start.size(), file) != start.size() ||
      std::memcmp(start.data(), kMagic.data(), kMagic.size()) != 0) {
    why = "is not a .npy file";
    return {};
  }
  const int major = start[6], minor = start[7];
  if (major < 1 || major > 3 || minor != 0) {
    why = fmt::format("has .npy version {}.{}: allowed are 1.0, 2.0, 3.0", major, minor);
    return {};
  }
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  std::array<std::uint8_t, 4> length{};
  if (std::fread(length.data(), 1, length_bytes, file) != length_bytes) {
    why = "is cut short in its header";
    return {};
  }
  const std::size_t size = length[0] | length[1] << 8 | length[2] << 16 | static_cast<std::size_t>(length[3]) << 24;
  if (size > kMaxHeader) {
    why = fmt::format("has a header of {} bytes: allowed are {}", size, kMaxHeader);
    return {};
  }
  std::string text(size, '\0');
  if (std::fread(text.data(), 1, size, file) != size) {
    why = "is cut short in its header";
    return {};
  }
  return text;
}

} // namespace

std::string_view npy_descr(Dtype dtype) {
  switch (dtype) {
  case Dtype::s8:
    return "|i1";
  case Dtype::u8:
  case Dtype::e4m3:
  case Dtype::e5m2:
    return "|u1";
  case Dtype::s32:
    return "<i4";
  case Dtype::f32:
    return "<f4";
  case Dtype::bf16:
    return "<u2";
  case Dtype::f16:
    return "<f2";
  }
  return {};
}

Result<NpyArray> read_npy(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status))
    return bad_file(path, fmt::format("cannot be read: {}", error ? error.message() : "no such file"));
  if (!std::filesystem::is_regular_file(status))
    return bad_file(path, "is not a regular file");
  const std::uint64_t file_bytes = std::filesystem::file_size(path, error);
  const File file(std::fopen(path.c_str(), "rb"), std::fclose);
  if (file == nullptr || error)
    return bad_file(path, fmt::format("cannot be read: {}", std::strerror(errno)));

  std::string why;
  const std::string text = read_header(file.get(), why);
  if (!why.empty())
    return bad_file(path, why);
  Header header;
  if (why = HeaderParser(text).parse(header); !why.empty())
    return bad_file(path, why);
  if (header.fortran_order)
    return bad_file(path, "is in Fortran order: only C order is taken (numpy.ascontiguousarray)");
  const DescrRow* row = find_descr(header.descr);
  if (row == nullptr)
    return bad_file(path, fmt::format("has dtype '{}': allowed are {}", header.descr, [] {
                      std::vector<std::string_view> names;
                      for (const DescrRow& known : kDescrs)
                        names.push_back(known.descr);
                      return fmt::format("{}", fmt::join(names, ", "));
                    }()));

  const Result<std::uint64_t> bytes = bytes_of(header.shape, row->element_bytes);
  if (!bytes)
    return bad_file(path, bytes.status().message());
  const std::uint64_t position = static_cast<std::uint64_t>(std::ftell(file.get()));
  const std::uint64_t present = file_bytes >= position ? file_bytes - position : 0;
  if (present != *bytes)
    return bad_file(path, fmt::format("is {}: shape {} of {} takes {} bytes of data, the file has {}",
                                      present < *bytes ? "cut short" : "too long", shape_text(header.shape), row->descr,
                                      *bytes, present));
  Result<Buffer> buffer = Buffer::allocate(*bytes);
  if (!buffer)
    return buffer.status();
  if (std::fread(buffer->data(), 1, *bytes, file.get()) != *bytes)
    return bad_file(path, fmt::format("cannot be read: {}", std::strerror(errno)));
  return NpyArray{std::string(row->descr), std::move(header.shape), std::move(*buffer)};
}

Status write_npy(const std::string& path, const Tensor& tensor) {
  const auto failed = [&](std::string_view why) {
    return Status::error(Code::io, fmt::format("cannot write {}: {}", path, why));
  };
  std::error_code error;
  // Through links, so that a link stays one.
  const std::filesystem::path destination = std::filesystem::weakly_canonical(path, error);
  if (error)
    return failed(error.message());
  const auto status = std::filesystem::status(destination, error);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status))
    return failed("it is not a regular file");

  std::string shape;
  for (const std::int64_t extent : tensor.shape)
    shape += fmt::format("{}, ", extent);
  std::string header =
      fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", npy_descr(tensor.dtype), shape);
  // numpy.lib.format: magic, version, length and header together are a multiple of 64 bytes, the last one a newline.
  const std::size_t before = kMagic.size() + 2 + 2;
  header.append(63 - (before + header.size()) % 64, ' ');
  header += '\n';
  std::string start(kMagic);
  start += {'\x01', '\x00', static_cast<char>(header.size() & 0xFF), static_cast<char>(header.size() >> 8)};

  const std::string temporary = fmt::format("{}.{}.tmp", destination.native(), ::getpid());
  std::FILE* file = std::fopen(temporary.c_str(), "wbx");
  if (file == nullptr)
    return failed(std::strerror(errno));
  bool written = std::fwrite(start.data(), 1, start.size(), file) == start.size() &&
                 std::fwrite(header.data(), 1, header.size(), file) == header.size() &&
                 std::fwrite(tensor.buffer.data(), 1, tensor.buffer.size(), file) == tensor.buffer.size();
  int number = errno;
  if (std::fclose(file) != 0 && written) {
    number = errno;
    written = false;
  }
  if (written && std::rename(temporary.c_str(), destination.c_str()) == 0)
    return {};
  const std::string why = std::strerror(written ? errno : number);
  std::remove(temporary.c_str());
  return failed(why);
}

} // namespace kiln::cli
