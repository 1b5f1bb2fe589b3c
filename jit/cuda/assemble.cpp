#include "jit/cuda/assemble.h"

#include <cstdlib>
#include <filesystem>
#include <vector>

#include <fmt/format.h>

#include "cache/file.h"
#include "jit/os.h"

namespace kiln::cuda {
namespace {

CodeObject cubin_of(const CodeObject& ptx, Bytes image, std::string compiler, int driver_version) {
  CodeObject cubin = ptx;
  cubin.format = CodeFormat::cubin;
  cubin.image = std::move(image);
  cubin.compiler = std::move(compiler);
  cubin.driver_version = driver_version;
  cubin.ptx_digest = digest_of(ptx.image);
  return cubin;
}

/// A driver's log: NUL-terminated text in a buffer.
std::string text_of(const std::vector<char>& log) {
  std::string text(log.data());
  while (text.ends_with('\n'))
    text.pop_back();
  return text;
}

/// A directory of our own for temporary files, removed with all in it.
class TemporaryDirectory {
public:
  TemporaryDirectory() {
    std::string pattern = "/tmp/kiln-XXXXXX"; // not TMPDIR: only the configuration reads the environment
    if (mkdtemp(pattern.data()) != nullptr)   // mode 0700
      path_ = pattern;
  }
  ~TemporaryDirectory() {
    std::error_code error;
    if (!path_.empty())
      std::filesystem::remove_all(path_, error);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::string& path() const { return path_; } ///< empty when it could not be made

private:
  std::string path_;
};

} // namespace

Result<Assembled> assemble_with_driver(Driver& driver, int device_index, const CodeObject& ptx) {
  const Result<ContextScope> scope = ContextScope::enter(driver, device_index, nullptr);
  if (!scope)
    return scope.status();
  const Api& api = driver.api();
  RelaxedCapture relaxed(driver);
  constexpr std::size_t kLogBytes = 64 << 10;
  std::vector<char> info(kLogBytes), errors(kLogBytes);
  int names[] = {CU_JIT_INFO_LOG_BUFFER, CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES, CU_JIT_ERROR_LOG_BUFFER,
                 CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, CU_JIT_LOG_VERBOSE};
  // Integers travel as pointers; the sizes are written back to this array, which must outlive the link state.
  void* values[] = {info.data(), reinterpret_cast<void*>(kLogBytes - 1), errors.data(),
                    reinterpret_cast<void*>(kLogBytes - 1), reinterpret_cast<void*>(std::uintptr_t{1})};
  CUlinkState state = nullptr;
  if (Status s = driver.status(api.cuLinkCreate(5, names, values, &state), "cuLinkCreate"); !s)
    return s;
  std::string text(ptx.image.begin(), ptx.image.end()); // with the NUL that the driver wants
  void* image = nullptr;
  std::size_t size = 0;
  Status status = driver.status(
      api.cuLinkAddData(state, CU_JIT_INPUT_PTX, text.data(), text.size() + 1, "kiln.ptx", 0, nullptr, nullptr),
      "cuLinkAddData");
  if (status)
    status = driver.status(api.cuLinkComplete(state, &image, &size), "cuLinkComplete");
  Bytes cubin;
  if (status) {
    const auto* const bytes = static_cast<const std::uint8_t*>(image); // the link state's
    cubin.assign(bytes, bytes + size);
  }
  static_cast<void>(api.cuLinkDestroy(state));
  std::string log = text_of(errors);
  if (const std::string more = text_of(info); !more.empty())
    log += (log.empty() ? "" : "\n") + more;
  if (!status) {
    const Code code = status.code() == Code::out_of_memory ? Code::out_of_memory : Code::compile_failed;
    return Status::error(code, fmt::format("the driver (CUDA {}) rejects the PTX: {}{}{}", driver.version_text(),
                                           status.message(), log.empty() ? "" : "; its log: ", log));
  }
  Assembled made{cubin_of(ptx, std::move(cubin), fmt::format("driver {}", driver.version_text()), driver.version()),
                 std::move(log)};
  made.cubin.sm = (*driver.device(device_index))->sm; // the PTX may be an older one's
  return made;
}

Result<Assembled> assemble_with_ptxas(const std::string& ptxas, const CodeObject& ptx) {
  const TemporaryDirectory directory;
  if (directory.path().empty())
    return Status::error(Code::io, "ptxas needs a directory for temporary files, and none could be made");
  const std::string in = directory.path() + "/kernel.ptx", out = directory.path() + "/kernel.cubin";
  if (Status s = write_file_atomically(in, {ptx.image}); !s)
    return s;
  const Result<os::ProgramResult> version = os::run_program({ptxas, "--version"});
  if (!version)
    return version.status();
  // "Cuda compilation tools, release 12.9, V12.9.86"
  const std::size_t v = version->output.find(", V");
  const std::string number =
      v == std::string::npos ? "?" : version->output.substr(v + 3, version->output.find_first_of(" \n", v + 3) - v - 3);
  const std::string arch = Target{.arch = Arch::nvptx, .sm = ptx.sm}.text().substr(sizeof("nvptx:") - 1);
  const Result<os::ProgramResult> made = os::run_program({ptxas, "-v", "-arch=" + arch, "-o", out, in});
  if (!made)
    return made.status();
  if (made->exit_status != 0)
    return Status::error(Code::compile_failed, fmt::format("{} rejects the PTX for {}: {}", ptxas, arch, made->output));
  Result<Bytes> cubin = read_file(out);
  if (!cubin)
    return cubin.status();
  return Assembled{cubin_of(ptx, std::move(*cubin), "ptxas " + number.substr(0, 32), 0), made->output};
}

std::string find_ptxas(std::string_view path) {
  const auto runs = [](const std::string& file) { return os::is_program(file); };
  while (!path.empty()) {
    const std::size_t colon = path.find(':');
    const std::string_view directory = path.substr(0, colon);
    path.remove_prefix(std::min(path.size(), directory.size() + 1));
    if (!directory.starts_with('/'))
      continue; // relative: it would depend on where the host happens to stand
    if (const std::string file = fmt::format("{}/ptxas", directory); runs(file))
      return file;
  }
  if (const std::string file = "/usr/local/cuda/bin/ptxas"; runs(file))
    return file;
  return {};
}

std::string performance_warnings(std::string_view log) {
  std::string found;
  while (!log.empty()) {
    const std::size_t end = log.find('\n');
    const std::string_view line = log.substr(0, end);
    log.remove_prefix(end == std::string_view::npos ? log.size() : end + 1);
    const std::size_t code = line.find("(C75");
    if (code != std::string_view::npos && line.find(')', code) == code + 6)
      found += (found.empty() ? "" : "\n") + std::string(line);
  }
  return found;
}

} // namespace kiln::cuda
