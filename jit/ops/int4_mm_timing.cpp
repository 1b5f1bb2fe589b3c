#include <optional>

#include "jit/cuda/timing.h"
#include "jit/ops/int4_mm_driver.h"

namespace kiln::int4_mm {
namespace {

/// Of a desc that leaves m open: where the unbounded class is at home.
constexpr std::int64_t kTimedRows = 1024;

/// Random weights and tokens of moderate size. The weights are packed by the first call, for its kernel's layout.
class Problem final : public TimingProblem {
public:
  Problem(const KernelDesc& desc, Runtime& runtime) : desc_(desc), runtime_(runtime) {}
  Status allocate(cuda::Driver& driver) {
    const std::int64_t m = rows(), n = desc_.value[kN], k = desc_.value[kK];
    Result<cuda::Buffer> x = cuda::filled_buffer(driver, desc_.device.index, 2 * m * k, values_);
    if (!x)
      return x.status();
    x_ = std::move(*x);
    Result<cuda::Buffer> y = cuda::filled_buffer(driver, desc_.device.index, 2 * m * n);
    if (!y)
      return y.status();
    y_ = std::move(*y);
    return {};
  }
  Status run(const Kernel& kernel, void* stream) override {
    if (Status s = pack_for(*static_cast<const Plan*>(kernel.plan())->layout); !s)
      return s;
    return int4_mm::run(kernel, {.m = rows(),
                                 .x = reinterpret_cast<const std::uint16_t*>(x_.address()),
                                 .ldx = desc_.value[kK],
                                 .pack = &*pack_,
                                 .y = reinterpret_cast<std::uint16_t*>(y_.address()),
                                 .ldy = desc_.value[kN],
                                 .stream = stream});
  }

private:
  std::int64_t rows() const { return desc_.value[kM] == kAny ? kTimedRows : desc_.value[kM]; }
  Status pack_for(const PackLayout& layout) {
    if (pack_ && &pack_->layout() == &layout)
      return {};
    const std::int64_t n = desc_.value[kN], k = desc_.value[kK];
    const auto repeated = [&](std::int64_t bytes) {
      std::vector<std::uint8_t> all(static_cast<std::size_t>(bytes));
      for (std::size_t i = 0; i < all.size(); ++i)
        all[i] = values_[i % values_.size()];
      return all;
    };
    const std::vector<std::uint8_t> w = repeated(n * k / 2), sz = repeated(k / group_of(desc_) * n * 4);
    KernelDesc desc = desc_;
    desc.value[kInnerKTiles] = 0;
    Result<Pack> made = Pack::make(layout, {.w = w.data(), .sz = sz.data()}, desc, runtime_);
    if (!made)
      return made.status();
    pack_ = std::move(*made);
    return {};
  }

  const KernelDesc desc_;
  Runtime& runtime_;
  const std::vector<std::uint8_t> values_ = cuda::random_pattern(0xBF); ///< below 2 as bf16
  cuda::Buffer x_, y_;
  std::optional<Pack> pack_;
};

} // namespace

Result<std::unique_ptr<TimingProblem>> timing_problem(const KernelDesc& desc, Runtime& runtime) {
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return driver.status();
  auto problem = std::make_unique<Problem>(desc, runtime);
  if (Status s = problem->allocate(**driver); !s)
    return s;
  return std::unique_ptr<TimingProblem>(std::move(problem));
}

} // namespace kiln::int4_mm
