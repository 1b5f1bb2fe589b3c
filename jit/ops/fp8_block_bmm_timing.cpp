#include "jit/cuda/timing.h"
#include "jit/ops/fp8_block_bmm_driver.h"

namespace kiln::fp8_block_bmm {
namespace {

/// Of a desc that leaves m open: where the unbounded class is at home.
constexpr std::int64_t kTimedRows = 4096;

/// Random numbers of moderate size.
class Problem final : public TimingProblem {
public:
  Status allocate(const KernelDesc& desc, cuda::Driver& driver) {
    const std::int64_t b = desc.value[kB], n = desc.value[kN], k = desc.value[kK];
    const std::int64_t m = desc.value[kM] == kAny ? kTimedRows : desc.value[kM], k_blocks = blocks_of(k);
    const std::vector<std::uint8_t> values = cuda::random_pattern(0xBF), scales = cuda::float_pattern(0x1p-6f);
    struct Part {
      cuda::Buffer& buffer;
      std::int64_t bytes;
      std::span<const std::uint8_t> pattern;
    };
    for (const Part& part : {Part{x_, b * m * k, values}, // below 2 in both types
                             {y_, b * n * k, values},
                             {xs_, b * m * k_blocks * 4, scales},
                             {ys_, b * blocks_of(n) * k_blocks * 4, scales},
                             {z_, b * m * n * bytes_of(z_of(desc)), {}}}) {
      Result<cuda::Buffer> made = cuda::filled_buffer(driver, desc.device.index, part.bytes, part.pattern);
      if (!made)
        return made.status();
      part.buffer = std::move(*made);
    }
    tensors_ = {.m = m,
                .x = reinterpret_cast<const std::uint8_t*>(x_.address()),
                .x_stride_b = m * k,
                .ldx = k,
                .y = reinterpret_cast<const std::uint8_t*>(y_.address()),
                .xs = reinterpret_cast<const float*>(xs_.address()),
                .xs_stride_b = m * k_blocks,
                .xs_stride_m = k_blocks,
                .xs_stride_k = 1,
                .ys = reinterpret_cast<const float*>(ys_.address()),
                .z = reinterpret_cast<void*>(z_.address()),
                .z_stride_b = m * n,
                .ldz = n};
    return {};
  }
  Status run(const Kernel& kernel, void* stream) override {
    return fp8_block_bmm::run(kernel, {.tensors = tensors_, .stream = stream});
  }

private:
  cuda::Buffer x_, y_, xs_, ys_, z_;
  Tensors tensors_;
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

} // namespace kiln::fp8_block_bmm
