#include "jit/cuda/timing.h"
#include "jit/ops/int8_mm_driver.h"

namespace kiln::int8_mm {
namespace {

/// Of a desc that leaves m open: where the unbounded class is at home.
constexpr std::int64_t kTimedRows = 4096;
/// Bytes that a GPU kernel's rows of A and B begin at multiples of.
constexpr std::int64_t kAlignment = 16;

/// Random bytes, B raw: a GPU kernel reads it as it does a pack.
class Problem final : public TimingProblem {
public:
  Status allocate(const KernelDesc& desc, cuda::Driver& driver) {
    const std::int64_t m = desc.value[kM] == kAny ? kTimedRows : desc.value[kM], n = desc.value[kN];
    const std::int64_t row = (desc.value[kK] + kAlignment - 1) / kAlignment * kAlignment;
    const std::vector<std::uint8_t> values = cuda::random_pattern(), scales = cuda::float_pattern(0x1p-14f);
    struct Part {
      cuda::Buffer& buffer;
      std::int64_t bytes;
      std::span<const std::uint8_t> pattern;
    };
    for (const Part& part : {Part{a_, m * row, values},
                             {b_, n * row, values},
                             {scale_, 4 * n, scales},
                             {c_, m * n * Epilogue::of(desc).c_bytes(), {}}}) {
      Result<cuda::Buffer> made = cuda::filled_buffer(driver, desc.device.index, part.bytes, part.pattern);
      if (!made)
        return made.status();
      part.buffer = std::move(*made);
    }
    args_ = {.m = m,
             .a = reinterpret_cast<const void*>(a_.address()),
             .lda = row,
             .b = reinterpret_cast<const void*>(b_.address()),
             .ldb = row,
             .b_layout = BLayout::nk,
             .c = reinterpret_cast<void*>(c_.address()),
             .ldc = n};
    if (Epilogue::of(desc).rescale == Rescale::scale)
      args_.values.scale = reinterpret_cast<const float*>(scale_.address());
    return {};
  }
  Status run(const Kernel& kernel, void* stream) override {
    Args args = args_;
    args.stream = stream;
    return int8_mm::run(kernel, args);
  }

private:
  cuda::Buffer a_, b_, scale_, c_;
  Args args_;
};

} // namespace

Result<std::unique_ptr<TimingProblem>> timing_problem(const KernelDesc& desc, Runtime& runtime) {
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return driver.status();
  auto problem = std::make_unique<Problem>();
  if (Status s = problem->allocate(desc, **driver); !s)
    return s;
  return std::unique_ptr<TimingProblem>(std::move(problem));
}

} // namespace kiln::int8_mm
