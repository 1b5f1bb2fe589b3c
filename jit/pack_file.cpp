#include "jit/pack_file.h"

#include <algorithm>
#include <array>

#include <fmt/format.h>

#include "cache/digest.h"
#include "cache/file.h"

namespace kiln {
namespace {

constexpr std::array<char, 8> kMagic = {'K', 'I', 'L', 'N', 'P', 'A', 'C', 'K'};
constexpr std::uint32_t kVersion = 1;
constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;

Bytes header(std::string_view op, std::string_view layout, std::int64_t n, std::int64_t k, const Digest& digest) {
  Writer w;
  for (const char c : kMagic)
    w.u8(static_cast<std::uint8_t>(c));
  w.u32(kVersion);
  w.string(op);
  w.string(layout);
  w.i64(n);
  w.i64(k);
  w.blob(digest.bytes);
  return w.take();
}

/// Over the header with a zero digest and the data, so that neither can be exchanged alone.
Digest digest_of_file(std::string_view op, std::string_view layout, std::int64_t n, std::int64_t k, ByteSpan data) {
  Writer w;
  w.blob(header(op, layout, n, k, {}));
  w.blob(digest_of(data).bytes);
  return digest_of(w.bytes());
}

} // namespace

Status save_pack_file(const std::string& path, std::string_view op, std::string_view layout, std::int64_t n,
                      std::int64_t k, ByteSpan data) {
  const Bytes head = header(op, layout, n, k, digest_of_file(op, layout, n, k, data));
  return write_file_atomically(path, {head, data});
}

Result<PackFile> load_pack_file(const std::string& path, std::string_view op,
                                std::int64_t (*data_bytes)(std::string_view layout, std::int64_t n, std::int64_t k)) {
  const Result<Bytes> file = read_file(path);
  if (!file)
    return file.status();
  const auto damaged = [&](std::string_view why) {
    return Status::error(Code::integrity, fmt::format("{}: not a pack of Kiln, or damaged: {}", path, why));
  };
  Reader r(*file);
  for (const char c : kMagic)
    if (r.u8() != static_cast<std::uint8_t>(c))
      return damaged("it does not begin with KILNPACK");
  if (const std::uint32_t version = r.u32(); version != kVersion)
    return damaged(fmt::format("format version {}, known is {}", version, kVersion));
  const std::string op_name = r.string();
  PackFile pack;
  pack.layout = r.string();
  pack.n = r.i64();
  pack.k = r.i64();
  const ByteSpan digest = r.blob();
  if (r.ok() && op_name != op)
    return damaged(fmt::format("its op is '{}', expected is {}", op_name, op));
  if (!r.ok() || pack.n < 0 || pack.k < 0 || pack.n > kMaxSize || pack.k > kMaxSize ||
      digest.size() != sizeof(Digest::bytes))
    return damaged("its header");
  const std::int64_t expected = data_bytes(pack.layout, pack.n, pack.k);
  if (expected < 0)
    return damaged("its header");
  const ByteSpan data = ByteSpan(*file).subspan(header(op, pack.layout, pack.n, pack.k, {}).size());
  if (static_cast<std::int64_t>(data.size()) != expected)
    return damaged(fmt::format("{} bytes of data, expected {}", data.size(), expected));
  Digest stored;
  std::copy(digest.begin(), digest.end(), stored.bytes.begin());
  if (!(stored == digest_of_file(op, pack.layout, pack.n, pack.k, data)))
    return damaged("its checksum");
  pack.data.assign(data.begin(), data.end());
  return pack;
}

} // namespace kiln
