#include "jit/dump.h"

#include <filesystem>

#include <fmt/format.h>

#include "cache/file.h"

namespace kiln {

void dump_code(const std::string& directory, const Digest& key, IsaPath isa, const KernelDesc& desc,
               const CodeObject& code, const std::function<Result<std::string>(const CodeObject&)>& disassemble,
               const Log& log) {
  std::string text =
      fmt::format("# {}\n# isa {}, features {}\n# {} vector and {} general registers, {} bytes\n", desc.text(),
                  name_of(isa), code.features.text(), code.vector_registers, code.general_registers, code.image.size());
  for (const auto& [name, value] : code.plan)
    text += fmt::format("# plan {}={}\n", name, value);
  if (disassemble) {
    const Result<std::string> listing = disassemble(code);
    text += listing ? *listing : fmt::format("# no listing: {}\n", listing.status().message());
  }
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  const std::string stem = fmt::format("{}/{}-{}", directory, key.hex().substr(0, 16), name_of(isa));
  const ByteSpan text_bytes = {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()};
  const bool is_ptx = code.format == CodeFormat::ptx; // its own listing
  const std::string_view extension = is_ptx ? ".ptx" : code.format == CodeFormat::cubin ? ".cubin" : ".bin";
  Status status = write_file_atomically(stem + std::string(extension), {code.image});
  if (status && !is_ptx)
    status = write_file_atomically(stem + ".txt", {text_bytes});
  if (!status)
    log.warn(fmt::format("KILN_DUMP_DIR: {}", status.message()));
}

} // namespace kiln
