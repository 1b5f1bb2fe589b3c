#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include <llvm/IR/Module.h>

#include "backends/llvm/generator/attention_unit.h"
#include "backends/llvm/generator/codegen.h"
#include "backends/llvm/generator/ir.h"
#include "backends/llvm/generator/link.h"
#include "jit/executable_memory.h"
#include "tests/emulator.h"

/// attention's exp2, compiled as in its kernels for every width of vector that this machine has, against the C
/// library's in double. KILN_TEST_EXHAUSTIVE=1 takes every float of its domain, 1.1e9 (half a minute for each width).

using namespace kiln;
using namespace kiln::generator;

namespace {

/// exp2_of_score over an array, by vectors of `lanes`.
class Exp2 {
public:
  Exp2(const Target& target, int lanes) {
    initialise_llvm();
    llvm::LLVMContext context;
    llvm::Module module("kiln", context);
    auto* pointer = llvm::PointerType::get(context, 0);
    auto* integer = llvm::Type::getInt64Ty(context);
    auto* function = llvm::Function::Create(
        llvm::FunctionType::get(llvm::Type::getVoidTy(context), {pointer, pointer, integer}, false),
        llvm::GlobalValue::ExternalLinkage, "exp2_of_array", module);
    llvm::IRBuilder<> ir(llvm::BasicBlock::Create(context, "entry", function));
    auto* vector = llvm::FixedVectorType::get(ir.getFloatTy(), static_cast<unsigned>(lanes));
    Values none;
    loop(ir, ir.getInt64(0), function->getArg(2), lanes, none, [&](llvm::Value* i, Values&) {
      llvm::Value* offset = ir.CreateShl(i, 2);
      llvm::Value* x = ir.CreateAlignedLoad(vector, advance(ir, function->getArg(0), offset), llvm::Align(4));
      ir.CreateAlignedStore(exp2_of_score(ir, DotUnit::of(target), x), advance(ir, function->getArg(1), offset),
                            llvm::Align(4));
    });
    ir.CreateRetVoid();
    auto machine = make_target_machine(target);
    REQUIRE(machine.is_ok());
    auto object = compile_module(module, *function, **machine);
    REQUIRE(object.is_ok());
    const Result<FlatImage> image = link_flat(target.arch, std::move(*object), "exp2_of_array");
    REQUIRE_MESSAGE(image.is_ok(), (image ? "" : image.status().message()));
    const Result<const std::uint8_t*> loaded = memory_.load(image->bytes, 64);
    REQUIRE(loaded.is_ok());
    code_ = *loaded;
    entry_ = reinterpret_cast<Entry>(code_ + image->entry);
  }
  ~Exp2() {
    if (code_ != nullptr)
      memory_.release(code_);
  }
  Exp2(const Exp2&) = delete;
  Exp2& operator=(const Exp2&) = delete;

  /// Padded with zeros to whole vectors.
  std::vector<float> operator()(std::vector<float> x) const {
    const std::size_t count = x.size();
    x.resize((count + 63) / 64 * 64);
    std::vector<float> y(x.size());
    entry_(x.data(), y.data(), static_cast<std::int64_t>(x.size()));
    y.resize(count);
    return y;
  }

private:
  using Entry = void (*)(const float*, float*, std::int64_t);
  ExecutableMemory memory_;
  const std::uint8_t* code_ = nullptr;
  Entry entry_ = nullptr;
};

struct Vectors {
  Target target;
  int lanes;
};

/// As DotUnit has them.
std::vector<Vectors> vectors_here() {
  const Target host = detect_machine().target;
  if (host.arch == Arch::aarch64)
    return {{{.arch = host.arch, .features = {Feature::neon}}, 4}};
  std::vector<Vectors> all = {{{.arch = host.arch}, 4}}; // SSE2: products and sums rounded one by one
  for (const auto& [features, lanes] :
       {std::pair{Features{Feature::avx2, Feature::fma}, 8},
        {Features{Feature::avx2, Feature::fma, Feature::avx512f, Feature::avx512bw}, 16}})
    if (host.features.contains(features))
      all.push_back({{.arch = host.arch, .features = features}, lanes});
  return all;
}

/// Spacing of floats at y > 0, that of denormals below the least normal one.
double ulp_at(double y) {
  return std::ldexp(1.0, std::max(std::ilogb(y), -126) - 23);
}

constexpr float kLeast = -126; ///< below it a result may be 0: 2^-126 against 1, the greatest P of a row
constexpr float kZeroFrom = -127;

float float_of(std::uint32_t bits) {
  return std::bit_cast<float>(bits);
}

/// The worst error in ulp of the x that are above kLeast; the others are counted when they are wrong.
struct Worst {
  double ulp = 0;
  float x = 0;
  std::int64_t wrong = 0, count = 0;

  void take(const Exp2& exp2, const std::vector<float>& xs) {
    const std::vector<float> ys = exp2(xs);
    for (std::size_t i = 0; i < xs.size(); ++i) {
      const double exact = std::exp2(double{xs[i]});
      const double error = std::fabs(ys[i] - exact) / (exact > 0 ? ulp_at(exact) : 0x1p-149);
      ++count;
      if (xs[i] <= kZeroFrom)
        wrong += ys[i] != 0 || std::signbit(ys[i]);
      else if (xs[i] < kLeast)
        wrong += ys[i] != 0 && !(error <= 2);
      else if (!(error <= ulp)) {
        ulp = error;
        x = xs[i];
      }
    }
  }
};

/// Every `step`-th float from a zero to `end`, of its sign.
void take_range(Worst& worst, const Exp2& exp2, float end, std::uint32_t step) {
  const std::uint32_t last = std::bit_cast<std::uint32_t>(end);
  constexpr std::size_t kAtOnce = 1 << 16;
  std::vector<float> xs;
  for (std::uint64_t bits = last & 0x8000'0000u; bits <= last;) {
    xs.clear();
    for (; xs.size() < kAtOnce && bits <= last; bits += step)
      xs.push_back(float_of(static_cast<std::uint32_t>(bits)));
    worst.take(exp2, xs);
  }
}

} // namespace

TEST_CASE("within 2 ulp of 2^x wherever a softmax asks, denormal results too where they are not 0") {
  const bool exhaustive = std::getenv("KILN_TEST_EXHAUSTIVE") != nullptr;
  for (const Vectors& vectors : vectors_here()) {
    const Exp2 exp2(vectors.target, vectors.lanes);
    Worst worst;
    const std::uint32_t step = exhaustive ? 1 : test::is_emulated() ? 4999 : 499; // primes
    take_range(worst, exp2, -200, step);
    take_range(worst, exp2, 8, step);
    // All floats around the multiples of 1/2, where the integer part changes, and at the last results before 0.
    std::vector<float> xs;
    for (int half = 0; half <= 2 * 150; ++half) {
      const std::uint32_t at = std::bit_cast<std::uint32_t>(static_cast<float>(half) / -2);
      for (std::uint32_t i = 0; i < 200; ++i) {
        xs.push_back(float_of(at + i));
        if (half > 0)
          xs.push_back(float_of(at - i));
      }
    }
    worst.take(exp2, xs);
    MESSAGE(vectors.lanes, " lanes: ", worst.ulp, " ulp at ", worst.x, ", the worst of ", worst.count);
    CHECK(worst.ulp > 0.1); // it measures
    CHECK(worst.ulp <= 2);
    CHECK(worst.wrong == 0);
  }
}

TEST_CASE("the ends of the domain") {
  constexpr float kInfinity = std::numeric_limits<float>::infinity(), kMax = std::numeric_limits<float>::max(),
                  kTiny = std::numeric_limits<float>::denorm_min(), kNaN = std::numeric_limits<float>::quiet_NaN();
  for (const Vectors& vectors : vectors_here()) {
    CAPTURE(vectors.lanes);
    const Exp2 exp2(vectors.target, vectors.lanes);
    const std::vector<float> ones = exp2({0.0f, -0.0f, -kTiny, -1e-38f, -1e-9f});
    for (const float y : ones)
      CHECK(y == 1);
    const std::vector<float> powers = exp2({-1, -2, -10, -24, -100, -126});
    CHECK(powers == std::vector<float>{0x1p-1f, 0x1p-2f, 0x1p-10f, 0x1p-24f, 0x1p-100f, 0x1p-126f});
    const std::vector<float> zeros =
        exp2({-127, -127.5f, -128, -149, -150, -1000, -1e6f, -0x1p23f, -0x1p24f, -1e30f, -kMax, -kInfinity});
    for (const float y : zeros)
      CHECK(std::bit_cast<std::uint32_t>(y) == 0);
    for (const float y : exp2({kNaN, -kNaN}))
      CHECK(std::isnan(y));
  }
}
