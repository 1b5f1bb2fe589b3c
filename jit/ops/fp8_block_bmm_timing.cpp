#include <algorithm>

#include "jit/cuda/driver.h"
#include "jit/ops/fp8_block_bmm_driver.h"

namespace kiln::fp8_block_bmm {
namespace {

/// Of a desc that leaves m open: where the unbounded class is at home.
constexpr std::int64_t kTimedRows = 4096;

/// Random numbers of moderate size: what multiplies zeros draws less power, and runs at a higher clock.
class Problem final : public TimingProblem {
public:
  Status allocate(const KernelDesc& desc, cuda::Driver& driver) {
    const std::int64_t b = desc.value[kB], n = desc.value[kN], k = desc.value[kK];
    const std::int64_t m = desc.value[kM] == kAny ? kTimedRows : desc.value[kM], k_blocks = blocks_of(k);
    const auto take = [&](cuda::Buffer& buffer, std::int64_t bytes) -> Status {
      Result<cuda::Buffer> made = cuda::Buffer::allocate(driver, desc.device.index,
                                                         static_cast<std::uint64_t>(std::max<std::int64_t>(bytes, 16)));
      if (!made)
        return made.status();
      buffer = std::move(*made);
      return {};
    };
    for (const auto& [buffer, bytes] : {std::pair{&x_, b * m * k},
                                        {&y_, b * n * k},
                                        {&xs_, b * m * k_blocks * 4},
                                        {&ys_, b * blocks_of(n) * k_blocks * 4},
                                        {&z_, b * m * n * bytes_of(z_of(desc))}})
      if (Status s = take(*buffer, bytes); !s)
        return s;
    std::vector<std::uint8_t> values(1 << 20);
    std::uint32_t random = 1;
    for (std::uint8_t& value : values) {
      random = random * 1664525 + 1013904223;                 // Numerical Recipes, "An Even Quicker Generator"
      value = static_cast<std::uint8_t>(random >> 24) & 0xBF; // below 2 in both types
    }
    const std::vector<float> scales(values.size() / sizeof(float), 0x1p-6f);
    for (const auto& [buffer, from] : {std::pair{&x_, static_cast<const void*>(values.data())},
                                       {&y_, values.data()},
                                       {&xs_, scales.data()},
                                       {&ys_, scales.data()}})
      for (std::uint64_t at = 0; at < buffer->bytes(); at += values.size())
        if (Status s = buffer->write(from, std::min<std::uint64_t>(values.size(), buffer->bytes() - at), at); !s)
          return s;
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
