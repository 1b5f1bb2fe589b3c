#include <doctest/doctest.h>

#include <llvm/AsmParser/Parser.h>
#include <llvm/Support/ErrorHandling.h>
#include <llvm/Support/SourceMgr.h>

#include <thread>

#include "backends/llvm/generator/codegen.h"
#include "backends/llvm/generator/fatal_error.h"
#include "backends/llvm/generator/int8_mm.h"
#include "backends/llvm/generator/link.h"
#include "tests/int8_mm_kernel_check.h"

using namespace kiln;
using namespace kiln::generator;
using namespace kiln::test;

namespace {

/// Compiled and linked for the architecture as the generator does it, or why that is refused.
Result<FlatImage> flat_image(llvm::Module& module, llvm::Function& entry, Arch arch) {
  auto machine = make_target_machine({.arch = arch});
  REQUIRE(machine.is_ok());
  const std::string symbol = entry.getName().str();
  auto object = compile_module(module, entry, **machine);
  REQUIRE(object.is_ok());
  return link_flat(arch, std::move(*object), symbol);
}

Result<FlatImage> flat_image(const char* ir, Arch arch) {
  initialise_llvm();
  llvm::LLVMContext context;
  llvm::SMDiagnostic diagnostic;
  std::unique_ptr<llvm::Module> module = llvm::parseAssemblyString(ir, diagnostic, context);
  REQUIRE_MESSAGE(module != nullptr, diagnostic.getMessage().str());
  return flat_image(*module, *module->getFunction("entry"), arch);
}

/// IR, and what the message must say; empty where the architectures differ in what they stumble over.
struct Refused {
  const char *ir, *because;
};

} // namespace

TEST_CASE("constants and helpers fit a flat image, constants first") {
  const char* ir = R"(
    @table = internal constant [4 x i32] [i32 7, i32 70, i32 700, i32 7000]
    define internal i32 @helper(i64 %i) noinline {
      %p = getelementptr i32, ptr @table, i64 %i
      %v = load i32, ptr %p
      ret i32 %v
    }
    define i32 @entry(i64 %i) {
      %v = call i32 @helper(i64 %i)
      ret i32 %v
    })";
  for (const Arch arch : {Arch::x86_64, Arch::aarch64}) {
    const Result<FlatImage> image = flat_image(ir, arch);
    REQUIRE_MESSAGE(image.is_ok(), (image ? "" : image.status().message()));
    CHECK(image->entry >= 16);
    CHECK(image->bytes[0] == 7);
    CHECK(image->bytes[4] == 70);
  }
}

TEST_CASE("what a flat image cannot hold is refused by name") {
  const Refused cases[] = {
      {"declare void @outside() define void @entry() { call void @outside() ret void }", "outside"},
      {"@state = internal global i32 0 define i32 @entry() { %v = atomicrmw add ptr @state, i32 1 seq_cst ret i32 %v }",
       "writable"},
      {"define internal i32 @f() { ret i32 1 } define internal i32 @g() { ret i32 2 } "
       "@table = internal constant [2 x ptr] [ptr @f, ptr @g] "
       "define ptr @entry(i64 %i) { %p = getelementptr ptr, ptr @table, i64 %i %v = load ptr, ptr %p ret ptr %v }",
       ""},
      {"@tls = internal thread_local global i32 0 define i32 @entry() { %v = atomicrmw add ptr @tls, i32 1 seq_cst ret "
       "i32 %v }",
       ""},
      {"define double @entry(double %x) { %y = call double @llvm.exp2.f64(double %x) ret double %y } "
       "declare double @llvm.exp2.f64(double)",
       "exp2"},
  };
  for (const Arch arch : {Arch::x86_64, Arch::aarch64})
    for (const Refused& refused : cases) {
      INFO(std::string(refused.ir));
      const Result<FlatImage> image = flat_image(refused.ir, arch);
      REQUIRE_FALSE(image.is_ok());
      CHECK(image.status().code() == Code::compile_failed);
      INFO(image.status().message());
      CHECK(image.status().message().find(refused.because) != std::string::npos);
    }
}

TEST_CASE("a fatal error of LLVM is a value, on every thread, again and again") {
  for (int i = 0; i < 3; ++i) {
    std::string message;
    CHECK_FALSE(survives([] { llvm::report_fatal_error("no such thing"); }, message));
    CHECK(message == "no such thing");
    CHECK(survives([] {}, message));
  }
  std::string elsewhere;
  std::thread([&] { CHECK_FALSE(survives([] { llvm::report_bad_alloc_error("too much"); }, elsewhere)); }).join();
  CHECK(elsewhere == "too much");
}

TEST_CASE("what is emitted for NEON names no instruction of it, and is right on this machine, too") {
  const Arch host = detect_machine().target.arch;
  const unsigned seed = std::random_device()();
  std::mt19937 random(seed);
  CAPTURE(seed);
  initialise_llvm();
  for (const std::int64_t m : {1, 2, 4, 8, 100})
    for (const std::int64_t n : {1, 16, 57, 100})
      for (const std::int64_t k : {0, 1, 7, 8, 61}) {
        const KernelDesc desc = int8_mm::op().canonical(int8_mm::make_desc(m, n, k));
        const Target neon{.arch = Arch::aarch64, .features = {Feature::neon}};
        llvm::LLVMContext context;
        llvm::Module module("kiln", context);
        llvm::Function* entry = emit_int8_mm(module, desc, neon);
        const Result<FlatImage> image = flat_image(module, *entry, host);
        REQUIRE_MESSAGE(image.is_ok(), (image ? "" : image.status().message()));
        CodeObject code;
        code.image = image->bytes;
        code.entries = {{"main", image->entry}};
        code.plan = int8_mm_plan(desc, neon).values();
        for (const Guard guard : {Guard::after, Guard::before})
          check_int8_mm_kernel(code, {m, n, k, n, Values::random, guard}, random);
      }
}
