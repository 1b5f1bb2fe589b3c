#include <doctest/doctest.h>

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "backends/llvm/disassemble.h"
#include "backends/llvm/rows.h"
#include "backends/llvm/shared_object.h"
#include "cache/digest.h"
#include "jit/ops/int8_mm.h"
#include "tests/emulator.h"
#include "tests/int8_mm_kernel_check.h"

using namespace kiln;
using namespace kiln::test;

namespace {

/// Path of the shared object in this process; empty while it is not mapped.
std::string mapped_llvm() {
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);)
    if (line.find("libkiln-llvm") != std::string::npos)
      return line.substr(line.find('/'));
  return {};
}

/// The value, or a failed test; used where no test runs, too.
template <class T> T must(Result<T> result) {
  if (!result)
    throw std::runtime_error(result.status().message());
  return std::move(*result);
}

Target target_of(std::string_view text) {
  return must(Target::parse(text));
}

/// The targets that this generator makes different code for.
constexpr std::array kTargets = {"x86_64:", "x86_64:avx2", "x86_64:avx2,avx512f,avx512bw", "aarch64:neon"};

bool runs_here(const Target& target) {
  const Target host = detect_machine().target;
  return host.arch == target.arch && host.features.contains(target.features);
}

KernelDesc canonical_desc(std::int64_t m, std::int64_t n, std::int64_t k) {
  return int8_mm::op().canonical(int8_mm::make_desc(m, n, k));
}

CodeObject compile(const KernelDesc& desc, const Target& target) {
  return must(portable::int8_mm().compile(desc, target, portable::int8_mm().pack_layout(desc, target)));
}

/// The test program itself, run again in another process or from another place.
std::string run(const std::string& command) {
  std::string out;
  FILE* pipe = popen((emulator() + " " + command).c_str(), "r");
  REQUIRE(pipe != nullptr);
  for (std::array<char, 4096> buffer; std::size_t size = fread(buffer.data(), 1, buffer.size(), pipe);)
    out.append(buffer.data(), size);
  REQUIRE(pclose(pipe) == 0);
  return out;
}

/// Instructions of every innermost stretch between a label and a jump back to it.
std::vector<std::vector<std::string>> loops_of(const std::string& listing) {
  std::vector<std::string> lines;
  std::vector<std::pair<std::string, std::size_t>> labels;
  std::vector<std::vector<std::string>> loops;
  std::istringstream stream(listing);
  for (std::string line; std::getline(stream, line);) {
    if (line.ends_with(':')) {
      labels.emplace_back(line.substr(0, line.size() - 1), lines.size());
      continue;
    }
    const std::string instruction = line.substr(std::min<std::size_t>(line.size(), 42));
    lines.push_back(instruction);
    for (const auto& [label, begin] : labels)
      if (instruction.ends_with(" " + label))
        loops.emplace_back(lines.begin() + static_cast<std::ptrdiff_t>(begin), lines.end());
  }
  return loops;
}

int count_of(const std::vector<std::string>& instructions, std::string_view begin, std::string_view part = "") {
  int count = 0;
  for (const std::string& instruction : instructions)
    count += instruction.starts_with(begin) && instruction.find(part) != std::string::npos;
  return count;
}

std::string digests_of_all_targets() {
  std::string out;
  for (const char* target : kTargets)
    for (const std::int64_t m : {1, 100}) {
      const Bytes bytes = compile(canonical_desc(m, 100, 77), target_of(target)).serialise();
      out += digest_of(bytes).hex() + "\n";
    }
  return out;
}

} // namespace

TEST_CASE("nothing but a compile opens the shared object of LLVM") {
  const Implementation row = portable::int8_mm();
  const Target target = target_of("x86_64:avx2");
  const KernelDesc desc = canonical_desc(64, 64, 64);
  CHECK(row.supports(desc, target).is_ok());
  CHECK(row.pack_layout(desc, target) == "n16k2");
  CHECK(row.pack_layout(desc, target_of("aarch64:neon")) == "n16k1");
  CHECK_FALSE(row.supports(desc, target_of("nvptx:sm_90a")).is_ok());
  CHECK(mapped_llvm() == "");
  compile(desc, target);
  CHECK(mapped_llvm() != "");
}

TEST_CASE("the key names only features that change the code") {
  const Implementation row = portable::int8_mm();
  const KernelDesc desc = canonical_desc(64, 64, 64);
  CHECK(row.features_for(desc, target_of("x86_64:")).text() == "");
  CHECK(row.features_for(desc, target_of("x86_64:avx2,fma,avxvnni,bmi2")).text() == "avx2");
  CHECK(row.features_for(desc, target_of("x86_64:avx2,avx512f")).text() == "avx2");
  CHECK(row.features_for(desc, target_of("x86_64:avx2,fma,avx512f,avx512bw,avx512vl,avx512vnni")).text() ==
        "avx2,avx512f,avx512bw");
  CHECK(row.features_for(desc, target_of("aarch64:neon,dotprod,i8mm")).text() == "neon");
  CHECK(compile(desc, target_of("x86_64:avx2,fma,avxvnni")) == compile(desc, target_of("x86_64:avx2")));
}

TEST_CASE("int8_mm equals the reference and stays inside its buffers") {
  const unsigned seed = std::random_device()();
  std::mt19937 random(seed);
  CAPTURE(seed);
  const std::int64_t sizes[] = {0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 257};
  const auto size = [&](std::int64_t least) { return std::max(least, sizes[random() % std::size(sizes)]); };
  for (const char* target_text : kTargets) {
    const Target target = target_of(target_text);
    if (!runs_here(target)) {
      MESSAGE("not executed on this machine: ", std::string(target_text));
      continue;
    }
    for (const std::int64_t m_class : int8_mm::kMClasses)
      for (int sample = 0; sample < 6; ++sample) {
        const std::int64_t n = size(1), k = sample == 0 ? 0 : size(0);
        const KernelDesc desc = canonical_desc(m_class == kAny ? 100 : m_class, n, k);
        const CodeObject code = compile(desc, target);
        const MRange range = int8_mm::op().m_range(desc);
        std::set<std::int64_t> rows{std::max<std::int64_t>(range.min, 1), std::min<std::int64_t>(range.max, 101)};
        rows.insert(m_class == kAny ? 33 + static_cast<std::int64_t>(random() % 32) : m_class - (m_class > 4 ? 1 : 0));
        INFO("target ", std::string(target_text));
        for (const std::int64_t m : rows)
          for (const Values values : kAllValues)
            for (const Guard guard : {Guard::after, Guard::before}) {
              const std::int64_t n_cut = random() % 2 ? n : 16 * (1 + static_cast<std::int64_t>(random() % 6));
              check_int8_mm_kernel(code, {m, n, k, n_cut, values, guard}, random);
            }
      }
  }
}

TEST_CASE("sums of a long K do not saturate") {
  std::mt19937 random(1);
  for (const char* target_text : kTargets) {
    const Target target = target_of(target_text);
    if (!runs_here(target))
      continue;
    const std::int64_t k = 140000; // 140000 · 2^14 > 2^31: the sum wraps
    check_int8_mm_kernel(compile(canonical_desc(3, 17, k), target), {3, 17, k, 17, Values::all_lowest, Guard::after},
                         random);
  }
}

TEST_CASE("same bytes every time, in every process, on every thread") {
  const std::string here = digests_of_all_targets();
  CHECK(digests_of_all_targets() == here);
  CHECK(run(own_program() + " --digests") == here);
  std::array<std::string, 4> elsewhere;
  {
    std::vector<std::jthread> threads;
    for (std::string& result : elsewhere)
      threads.emplace_back([&result] { result = digests_of_all_targets(); });
  }
  for (const std::string& result : elsewhere)
    CHECK(result == here);
}

TEST_CASE("the hot loop multiplies pairs in vectors and nothing one by one") {
  const CodeObject code = compile(canonical_desc(1024, 1024, 1024), target_of("x86_64:avx2"));
  const std::string listing = must(disassemble(code.arch, code.image, code.entries));
  INFO(listing);
  int multiplying = 0;
  for (const std::vector<std::string>& loop : loops_of(listing)) {
    CHECK(count_of(loop, "imul") == 0);
    CHECK(count_of(loop, "mul") == 0);
    CHECK(count_of(loop, "vpmulld") == 0);
    multiplying += count_of(loop, "vpmaddwd ymm") > 0;
  }
  CHECK(multiplying > 0);
  CHECK(listing.find("zmm") == std::string::npos);
  CHECK(code.vector_registers == 16);
  CHECK(code.general_registers <= 15);
}

TEST_CASE("aarch64: a flat image that multiplies in vectors") {
  for (const std::int64_t m : {1, 2, 3, 100}) {
    const CodeObject code = compile(canonical_desc(m, 100, 77), target_of("aarch64:neon,dotprod"));
    CHECK(code.arch == Arch::aarch64);
    CHECK(code.features.text() == "neon");
    CHECK(code.alignment == 64);
    const std::string listing = must(disassemble(code.arch, code.image, code.entries));
    INFO(listing);
    int multiplying = 0;
    for (const std::vector<std::string>& loop : loops_of(listing)) {
      multiplying += count_of(loop, "smlal v") > 0 && count_of(loop, "smlal2 v") > 0;
      CHECK(count_of(loop, "mul x") == 0);
      CHECK(count_of(loop, "mul w") == 0);
      CHECK(count_of(loop, "madd") == 0);
    }
    CHECK(multiplying > 0);
    CHECK(listing.find("adrp") == std::string::npos);
    CHECK(listing.find(" x18") == std::string::npos);
  }
}

TEST_CASE("a listing has labels, bytes, and data where nothing runs") {
  // jmp +2; two bytes of data; ret
  const Bytes image{0xeb, 0x02, 0xff, 0xff, 0xc3};
  const std::vector<CodeObject::Entry> entries{{"main", 0}};
  CHECK(must(disassemble(Arch::x86_64, image, entries)) == "main:\n"
                                                           "     0: eb 02                             jmp L0\n"
                                                           "     2: ff ff                             .byte\n"
                                                           "L0:\n"
                                                           "     4: c3                                ret\n");
  const std::vector<CodeObject::Entry> outside{{"main", 5}};
  CHECK(disassemble(Arch::x86_64, image, outside).status().code() == Code::invalid_argument);
  CHECK(disassemble(Arch::nvptx, image, entries).status().code() == Code::unsupported);
}

TEST_CASE("the shared object answers every request, however wrong") {
  compile(canonical_desc(1, 1, 1), target_of("x86_64:"));
  void* handle = dlopen(mapped_llvm().c_str(), RTLD_NOW | RTLD_NOLOAD);
  REQUIRE(handle != nullptr);
  void* symbol = dlsym(handle, llvm_abi::kEntryPoint);
  REQUIRE(symbol != nullptr);
  const auto entry = reinterpret_cast<llvm_abi::EntryPoint>(symbol);
  using Answer = std::pair<std::uint32_t, std::string>;
  const auto ask = [&](ByteSpan request) {
    std::vector<Answer> answers;
    const auto give = [](void* context, std::uint32_t code, const std::uint8_t* data, std::size_t size) {
      static_cast<std::vector<Answer>*>(context)->emplace_back(code, std::string(data, data + size));
    };
    entry(request.data(), request.size(), give, &answers);
    REQUIRE(answers.size() == 1);
    return answers.front();
  };
  Writer right = portable::begin_request(llvm_abi::RequestKind::compile);
  right.string(canonical_desc(1, 1, 1).text());
  right.string("x86_64:");
  CHECK(ask(right.bytes()).first == static_cast<std::uint32_t>(Code::ok));
  for (std::size_t size = 0; size < right.bytes().size(); ++size) {
    const Answer answer = ask(ByteSpan(right.bytes()).first(size));
    CHECK(answer.first != static_cast<std::uint32_t>(Code::ok));
    CHECK(!answer.second.empty());
  }
  Bytes other_version = right.bytes(), other_generator = right.bytes();
  ++other_version[0];
  CHECK(ask(other_version).second.find("version 2") != std::string::npos);
  other_generator[12] ^= 1; // in the id's text, behind version and length
  CHECK(ask(other_generator).second.find("different builds") != std::string::npos);
  Writer unknown = portable::begin_request(static_cast<llvm_abi::RequestKind>(77));
  CHECK(ask(unknown.bytes()).second == "request kind 77 is not known");
  Writer other_target = portable::begin_request(llvm_abi::RequestKind::compile);
  other_target.string(canonical_desc(1, 1, 1).text());
  other_target.string("nvptx:sm_90a");
  CHECK(ask(other_target.bytes()).first == static_cast<std::uint32_t>(Code::unsupported));
}

TEST_CASE("without its shared object the path says what was looked for, and where") {
  char directory[] = "/tmp/kiln-llvm-test-XXXXXX";
  REQUIRE(mkdtemp(directory) != nullptr);
  const std::string copy = std::string(directory) + "/lonely";
  std::filesystem::copy_file(own_program(), copy);
  const std::string message = run(copy + " --status");
  CHECK(message.starts_with("unsupported: libkiln-llvm.so.0"));
  CHECK(message.find(std::string(directory) + "/libkiln-llvm.so.0") != std::string::npos);
  // A file of that name which is not the generator.
  std::ofstream(std::string(directory) + "/libkiln-llvm.so.0") << "nonsense";
  CHECK(run(copy + " --status").starts_with("unsupported: libkiln-llvm.so.0"));
  std::filesystem::remove_all(directory);
}

int main(int argc, char** argv) {
  const std::string_view mode = argc > 1 ? argv[1] : "";
  if (mode == "--digests") {
    std::fputs(digests_of_all_targets().c_str(), stdout);
    return 0;
  }
  if (mode == "--status") {
    const Result<CodeObject> code = portable::int8_mm().compile(canonical_desc(1, 1, 1), target_of("x86_64:"), "n16k2");
    std::fputs(code ? "ok" : (std::string(name_of(code.status().code())) + ": " + code.status().message()).c_str(),
               stdout);
    return 0;
  }
  return doctest::Context(argc, argv).run();
}
