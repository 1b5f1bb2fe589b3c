#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

#include <fmt/format.h>

#include "cache/file.h"
#include "cache/readable.h"
#include "tests/fuzz/fuzz.h"

namespace kiln::fuzz {
namespace {

/// Long enough for every construct of every format; speed falls with length. Larger seeds are only tried.
constexpr std::size_t kMaxBytes = 4096;

/// No parser needs more than a small multiple of its input; a run that hangs or grows is a finding.
constexpr const char* kLimits[] = {"-rss_limit_mb=1024", "-timeout=10", "-print_final_stats=1"};

/// Tries every seed, and writes those of a size to begin with into ./seeds. Returns libFuzzer's option that names them.
std::string seed_option() {
  std::filesystem::create_directory("seeds");
  std::string option;
  std::size_t count = 0;
  for (const Seed& seed : target.seeds()) {
    if (target.accepts(seed.bytes) != seed.is_accepted) {
      fmt::print(stderr, "seed {} is {}\n", count, seed.is_accepted ? "refused" : "accepted");
      std::abort();
    }
    const std::string path = fmt::format("seeds/{}", count++);
    if (seed.bytes.size() > kMaxBytes)
      continue;
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(seed.bytes.data()), static_cast<std::streamsize>(seed.bytes.size()));
    option += (option.empty() ? "-seed_inputs=" : ",") + path;
  }
  return option;
}

} // namespace

void expect(bool holds, std::string_view what) {
  if (holds)
    return;
  fmt::print(stderr, "not so: {}\n", what);
  std::abort();
}

void expect_refusal(const Status& status, Code code) {
  const std::string& message = status.message();
  if (status.code() != code)
    expect(false, fmt::format("a refusal is {}, not {}: {}", name_of(code), name_of(status.code()), message));
  expect(!message.empty(), "a refusal says why");
  expect(message.size() < 64 << 10, "a message is of bounded size");
  expect(message.size() > 16 << 10 || readable(message) == message, "a message is readable");
}

std::string_view text_of(ByteSpan bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

Seed accepted(std::string_view text) {
  return {Bytes(text.begin(), text.end()), true};
}

Seed refused(std::string_view text) {
  return {Bytes(text.begin(), text.end()), false};
}

MemoryFile::MemoryFile() : descriptor_(::memfd_create("fuzz", MFD_CLOEXEC)) {
  expect(descriptor_ >= 0 && ::fchmod(descriptor_, 0600) == 0, "there is memory for a file");
  path_ = fmt::format("/proc/self/fd/{}", descriptor_);
}

const std::string& MemoryFile::with(ByteSpan content) {
  overwrite(descriptor_, content);
  return path_;
}

TemporaryDirectory::TemporaryDirectory() {
  for (const char* pattern : {"/dev/shm/kiln-fuzz-XXXXXX", "/tmp/kiln-fuzz-XXXXXX"}) {
    path_ = pattern;
    if (::mkdtemp(path_.data()) != nullptr)
      return;
  }
  expect(false, "a temporary directory can be made");
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void overwrite(int descriptor, ByteSpan content) {
  expect(::ftruncate(descriptor, 0) == 0 && ::lseek(descriptor, 0, SEEK_SET) == 0 && write_all(descriptor, content),
         "a file can be written");
}

} // namespace kiln::fuzz

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  using namespace kiln::fuzz;
  // Options given on the command line come last, and hold.
  static std::vector<std::string> words = {(*argv)[0]};
  words.insert(words.end(), std::begin(kLimits), std::end(kLimits));
  words.push_back(fmt::format("-max_len={}", kMaxBytes));
  words.push_back(fmt::format("-malloc_limit_mb={}", target.largest_allocation_mb));
  words.push_back(seed_option());
  words.insert(words.end(), *argv + 1, *argv + *argc);
  static std::vector<char*> pointers;
  for (std::string& word : words)
    pointers.push_back(word.data());
  pointers.push_back(nullptr);
  *argc = static_cast<int>(words.size());
  *argv = pointers.data();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  kiln::fuzz::target.accepts({data, size});
  return 0;
}
