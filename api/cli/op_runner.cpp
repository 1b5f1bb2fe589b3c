#include "api/cli/op_runner.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <memory>

#include <fmt/format.h>

#include "jit/bf16.h"
#include "jit/cuda/module.h"
#include "jit/floating_point.h"
#include "jit/ops/attention_driver.h"
#include "jit/ops/fp8_block_bmm_driver.h"
#include "jit/ops/int4_mm_driver.h"
#include "jit/ops/int8_linear_driver.h"
#include "jit/ops/int8_mm_driver.h"

namespace kiln::cli {
namespace {

std::int64_t row_length(const Tensor& matrix) {
  return matrix.shape[1];
}

// ---------------------------------------------------------------- tensors in GPU memory

/// The tensors of a desc as its kernel sees them: where they are, or copies on the desc's GPU.
class Operand {
public:
  /// A copy's rows begin at multiples of `row_bytes_multiple`.
  Status place(const KernelDesc& desc, const Runtime& runtime, const Tensor& tensor,
               std::size_t row_bytes_multiple = 1) {
    address_ = const_cast<std::uint8_t*>(tensor.buffer.data());
    row_bytes_ = tensor.shape.empty() || tensor.shape.front() == 0
                     ? tensor.buffer.size()
                     : tensor.buffer.size() / static_cast<std::size_t>(tensor.shape.front());
    if (desc.device.kind == DeviceKind::cpu || tensor.buffer.size() == 0)
      return {};
    const Result<cuda::Driver*> driver = runtime.cuda();
    if (!driver)
      return driver.status();
    const std::size_t row = row_bytes_, rows = tensor.buffer.size() / row;
    row_bytes_ = (row + row_bytes_multiple - 1) / row_bytes_multiple * row_bytes_multiple;
    Result<cuda::Buffer> buffer = cuda::Buffer::allocate(**driver, desc.device.index, rows * row_bytes_);
    if (!buffer)
      return buffer.status();
    gpu_ = std::move(*buffer);
    address_ = reinterpret_cast<void*>(gpu_.address());
    if (row_bytes_ == row)
      return gpu_.write(tensor.buffer.data(), tensor.buffer.size());
    std::vector<std::uint8_t> padded(rows * row_bytes_);
    for (std::size_t i = 0; i < rows; ++i)
      std::memcpy(&padded[i * row_bytes_], tensor.buffer.data() + i * row, row);
    return gpu_.write(padded.data(), padded.size());
  }
  std::size_t row_bytes() const { return row_bytes_; } ///< from a row to the next
  template <class T> T* as() const { return static_cast<T*>(address_); }
  Status bring_back(Tensor& tensor) const {
    return gpu_.bytes() == 0 ? Status() : gpu_.read(tensor.buffer.data(), tensor.buffer.size());
  }

private:
  void* address_ = nullptr;
  std::size_t row_bytes_ = 0;
  cuda::Buffer gpu_;
};

/// `call` by itself on a CPU; on a GPU, on the default stream, and then what it put there.
std::function<Status()> completed(const Kernel& kernel, std::function<Status()> call) {
  if (kernel.cuda_module() == nullptr)
    return call;
  return [&kernel, call = std::move(call)]() -> Status {
    if (Status s = call(); !s)
      return s;
    const cuda::Module& module = *kernel.cuda_module();
    const Result<cuda::ContextScope> scope = cuda::ContextScope::enter(module.driver(), module.device_index(), nullptr);
    if (!scope)
      return scope.status();
    return module.driver().status(module.driver().api().cuStreamSynchronize(nullptr), "cuStreamSynchronize");
  };
}

// ---------------------------------------------------------------- int8_mm

enum Int8MmTensor {
  kA,
  kB,
  kScale,
  kAZp,
  kBZp,
  kBias,
  kMult,
  kShift,
  kSlopeMult,
  kSlopeShift,
  kSlope,
  kCZp,
  kLo,
  kHi,
  kC
};

/// The values of an epilogue, out of the host's memory. `scale` may lie in a GPU's.
int8_mm::EpilogueValues int8_mm_values(const KernelDesc& desc, std::span<Tensor> tensors, const float* scale) {
  const auto array = [&](Int8MmTensor index) -> const std::int32_t* {
    return find_op(desc.op)->tensors[index].is_present(desc) ? tensors[index].as<std::int32_t>() : nullptr;
  };
  const auto scalar = [&](Int8MmTensor index) { return array(index) != nullptr ? *array(index) : 0; };
  const auto bound = [&](Int8MmTensor index) -> double {
    if (array(index) == nullptr)
      return 0;
    return tensors[index].dtype == Dtype::f32 ? *tensors[index].as<float>() : static_cast<double>(*array(index));
  };
  return {.a_zp = array(kAZp),
          .b_zp = array(kBZp),
          .bias = array(kBias),
          .mult = array(kMult),
          .shift = array(kShift),
          .scale = scale,
          .slope_mult = scalar(kSlopeMult),
          .slope_shift = scalar(kSlopeShift),
          .slope = array(kSlope) != nullptr ? *tensors[kSlope].as<float>() : 0,
          .c_zp = scalar(kCZp),
          .lo = bound(kLo),
          .hi = bound(kHi)};
}

/// Values such that most results are within an integer output's range.
void make_sensible_int8_mm(const KernelDesc& desc, std::span<Tensor> tensors) {
  const auto each = [&](Int8MmTensor index, auto&& change) {
    auto* const values = tensors[index].as<std::int32_t>();
    for (std::uint64_t i = 0; i < tensors[index].buffer.size() / sizeof *values; ++i)
      values[i] = change(values[i]);
  };
  const int8_mm::Epilogue epilogue = int8_mm::Epilogue::of(desc);
  // Of a sum of k products of values around ±74.
  const int sum_bits = 12 + static_cast<int>(std::bit_width(static_cast<std::uint64_t>(desc.value[int8_mm::kK]))) / 2;
  const int drop = epilogue.c_bytes() == 1 ? std::max(sum_bits - 6, 0) : 0;
  for (const auto index : {kAZp, kBZp, kCZp})
    each(index, [](std::int32_t v) { return v % 32; });
  each(kBias, [&](std::int32_t v) { return v % (1 << sum_bits); });
  for (const auto index : {kMult, kSlopeMult})
    each(index, [](std::int32_t v) { return (v & 0x3FFF'FFFF) | 0x4000'0000; });
  const bool left = epilogue.rescale == int8_mm::Rescale::shift_left;
  each(kShift, [&](std::int32_t) { return left ? 2 : drop; });
  each(kSlopeShift, [](std::int32_t) { return 2; });
  if (epilogue.rescale == int8_mm::Rescale::scale && !epilogue.has_float_output())
    for (std::uint64_t i = 0; i < tensors[kScale].buffer.size() / sizeof(float); ++i)
      tensors[kScale].as<float>()[i] = std::ldexp(tensors[kScale].as<float>()[i], -drop);
  for (const auto& [index, value] : {std::pair{kLo, -100}, {kHi, 100}})
    if (tensors[index].buffer.size() != 0) {
      if (tensors[index].dtype == Dtype::f32)
        *tensors[index].as<float>() = static_cast<float>(value);
      else
        *tensors[index].as<std::int32_t>() = epilogue.c_dtype == int8_mm::CDtype::u8 ? value + 110 : value;
    }
}

Result<Invocation> prepare_int8_mm(const Kernel& kernel, const KernelDesc& desc, std::span<Tensor> tensors) {
  const auto& plan = *static_cast<const int8_mm::Plan*>(kernel.plan());
  const auto b_layout = static_cast<int8_mm::BLayout>(desc.value[int8_mm::kBLayout]);
  Result<int8_mm::Pack> made = int8_mm::Pack::make(
      plan.layout, tensors[kB].as<void>(), row_length(tensors[kB]), b_layout, desc.value[int8_mm::kN],
      desc.value[int8_mm::kK], kernel.runtime().parallel, static_cast<int8_mm::BDtype>(desc.value[int8_mm::kBDtype]));
  if (!made)
    return made.status();
  if (desc.device.kind == DeviceKind::cuda)
    if (Status s = made->move_to(desc.device, kernel.runtime()); !s)
      return s;
  struct State {
    explicit State(int8_mm::Pack p) : pack(std::move(p)) {}
    int8_mm::Pack pack;
    Operand a, scale, c;
  };
  const auto state = std::make_shared<State>(std::move(*made));
  constexpr std::size_t gpu_row_multiple = 16; // of bytes of A, see kiln.h
  if (Status s = state->a.place(desc, kernel.runtime(), tensors[kA], gpu_row_multiple); !s)
    return s;
  for (const auto& [operand, index] : {std::pair{&state->scale, kScale}, {&state->c, kC}})
    if (Status s = operand->place(desc, kernel.runtime(), tensors[index]); !s)
      return s;
  const bool has_scale = int8_mm::Epilogue::of(desc).rescale == int8_mm::Rescale::scale;
  const int8_mm::Args args = {.m = desc.value[int8_mm::kM],
                              .a = state->a.as<void>(),
                              .lda = std::max(row_length(tensors[kA]), static_cast<std::int64_t>(state->a.row_bytes())),
                              .pack = &state->pack,
                              .c = state->c.as<void>(),
                              .ldc = row_length(tensors[kC]),
                              .values =
                                  int8_mm_values(desc, tensors, has_scale ? state->scale.as<const float>() : nullptr)};
  return Invocation{completed(kernel, [&kernel, args] { return int8_mm::run(kernel, args); }),
                    [state, tensors] { return state->c.bring_back(tensors[kC]); }};
}

void reference_int8_mm(const KernelDesc& desc, std::span<Tensor> tensors) {
  int8_mm::reference(int8_mm::Epilogue::of(desc), int8_mm_values(desc, tensors, tensors[kScale].as<float>()),
                     desc.value[int8_mm::kM], desc.value[int8_mm::kN], desc.value[int8_mm::kK], tensors[kA].as<void>(),
                     row_length(tensors[kA]), tensors[kB].as<void>(), row_length(tensors[kB]),
                     static_cast<int8_mm::BLayout>(desc.value[int8_mm::kBLayout]), tensors[kC].as<void>(),
                     row_length(tensors[kC]));
}

// ---------------------------------------------------------------- int8_linear

enum Int8LinearTensor { kLinearX, kLinearW, kLinearWs, kLinearBias, kLinearY };

Result<Invocation> prepare_int8_linear(const Kernel& kernel, const KernelDesc& desc, std::span<Tensor> tensors) {
  const auto& plan = *static_cast<const int8_linear::Plan*>(kernel.plan());
  Result<int8_mm::Pack> made =
      int8_mm::Pack::make(plan.layout, tensors[kLinearW].as<std::int8_t>(), row_length(tensors[kLinearW]),
                          static_cast<int8_linear::WLayout>(desc.value[int8_linear::kWLayout]),
                          desc.value[int8_linear::kN], desc.value[int8_linear::kK], kernel.runtime().parallel);
  if (!made)
    return made.status();
  const auto pack = std::make_shared<const int8_mm::Pack>(std::move(*made));
  const int8_linear::Args args = {.m = desc.value[int8_linear::kM],
                                  .x = tensors[kLinearX].as<void>(),
                                  .ldx = row_length(tensors[kLinearX]),
                                  .pack = pack.get(),
                                  .ws = tensors[kLinearWs].as<float>(),
                                  .bias = int8_linear::has_bias(desc) ? tensors[kLinearBias].as<float>() : nullptr,
                                  .y = tensors[kLinearY].as<void>(),
                                  .ldy = row_length(tensors[kLinearY])};
  return Invocation{[&kernel, pack, args] { return int8_linear::run(kernel, args); }, {}};
}

void reference_int8_linear(const KernelDesc& desc, std::span<Tensor> tensors) {
  const DefaultFloatingPoint scope;
  int8_linear::reference(desc, desc.value[int8_linear::kM], tensors[kLinearX].as<void>(), row_length(tensors[kLinearX]),
                         tensors[kLinearW].as<std::int8_t>(), row_length(tensors[kLinearW]),
                         tensors[kLinearWs].as<float>(),
                         int8_linear::has_bias(desc) ? tensors[kLinearBias].as<float>() : nullptr,
                         tensors[kLinearY].as<void>(), row_length(tensors[kLinearY]));
}

// ---------------------------------------------------------------- int4_mm

enum Int4MmTensor { kX, kW, kWPacked, kSz, kY };

Result<Invocation> prepare_int4_mm(const Kernel& kernel, const KernelDesc& desc, std::span<Tensor> tensors) {
  const auto& plan = *static_cast<const int4_mm::Plan*>(kernel.plan());
  const std::int64_t tiles = int4_mm::inner_k_tiles_of(desc);
  const int4_mm::Weights weights = {
      .w = tensors[tiles != 0 ? kWPacked : kW].as<void>(), .sz = tensors[kSz].as<void>(), .inner_k_tiles = tiles};
  Result<int4_mm::Pack> made = int4_mm::Pack::make(*plan.layout, weights, desc, kernel.runtime());
  if (!made)
    return made.status();
  struct State {
    explicit State(int4_mm::Pack p) : pack(std::move(p)) {}
    int4_mm::Pack pack;
    Operand x, y;
  };
  const auto state = std::make_shared<State>(std::move(*made));
  for (const auto& [operand, index] : {std::pair{&state->x, kX}, {&state->y, kY}})
    if (Status s = operand->place(desc, kernel.runtime(), tensors[index]); !s)
      return s;
  const int4_mm::Args args = {.m = desc.value[int4_mm::kM],
                              .x = state->x.as<const std::uint16_t>(),
                              .ldx = row_length(tensors[kX]),
                              .pack = &state->pack,
                              .y = state->y.as<std::uint16_t>(),
                              .ldy = row_length(tensors[kY])};
  return Invocation{completed(kernel, [&kernel, args] { return int4_mm::run(kernel, args); }),
                    [state, tensors] { return state->y.bring_back(tensors[kY]); }};
}

void reference_int4_mm(const KernelDesc& desc, std::span<Tensor> tensors) {
  const std::int64_t m = desc.value[int4_mm::kM], n = desc.value[int4_mm::kN], k = desc.value[int4_mm::kK];
  const std::int64_t tiles = int4_mm::inner_k_tiles_of(desc);
  std::vector<std::uint8_t> plain;
  const std::uint8_t* w = tensors[kW].as<std::uint8_t>();
  if (tiles != 0) {
    plain.resize(static_cast<std::size_t>(n * k / 2));
    int4_mm::tensor_core_to_plain(tensors[kWPacked].as<std::int32_t>(), n, k, tiles, plain.data());
    w = plain.data();
  }
  int4_mm::reference(m, n, k, int4_mm::group_of(desc), tensors[kX].as<std::uint16_t>(), k, w,
                     tensors[kSz].as<std::uint16_t>(), tensors[kY].as<std::uint16_t>(), n);
}

// ---------------------------------------------------------------- fp8_block_bmm

enum Fp8BlockBmmTensor { kFp8X, kFp8Y, kFp8Xs, kFp8Ys, kFp8Z };

/// Contiguous ones, wherever they lie.
fp8_block_bmm::Tensors fp8_tensors(const KernelDesc& desc, const void* x, const void* y, const void* xs, const void* ys,
                                   void* z) {
  using namespace fp8_block_bmm;
  const std::int64_t m = desc.value[kM], n = desc.value[kN], k = desc.value[kK];
  return {.m = m,
          .x = static_cast<const std::uint8_t*>(x),
          .x_stride_b = m * k,
          .ldx = k,
          .y = static_cast<const std::uint8_t*>(y),
          .xs = static_cast<const float*>(xs),
          .xs_stride_b = m * blocks_of(k),
          .xs_stride_m = blocks_of(k),
          .xs_stride_k = 1,
          .ys = static_cast<const float*>(ys),
          .z = z,
          .z_stride_b = m * n,
          .ldz = n};
}

Result<Invocation> prepare_fp8_block_bmm(const Kernel& kernel, const KernelDesc& desc, std::span<Tensor> tensors) {
  const auto operands = std::make_shared<std::array<Operand, 5>>();
  for (std::size_t i = 0; i < operands->size(); ++i)
    if (Status s = (*operands)[i].place(desc, kernel.runtime(), tensors[i]); !s)
      return s;
  const auto at = [&](Fp8BlockBmmTensor index) { return (*operands)[index].as<void>(); };
  const fp8_block_bmm::Args args = {.tensors =
                                        fp8_tensors(desc, at(kFp8X), at(kFp8Y), at(kFp8Xs), at(kFp8Ys), at(kFp8Z))};
  return Invocation{completed(kernel, [&kernel, args] { return fp8_block_bmm::run(kernel, args); }),
                    [operands, tensors] { return (*operands)[kFp8Z].bring_back(tensors[kFp8Z]); }};
}

void reference_fp8_block_bmm(const KernelDesc& desc, std::span<Tensor> tensors) {
  const DefaultFloatingPoint scope;
  fp8_block_bmm::reference(desc, fp8_tensors(desc, tensors[kFp8X].as<void>(), tensors[kFp8Y].as<void>(),
                                             tensors[kFp8Xs].as<void>(), tensors[kFp8Ys].as<void>(),
                                             tensors[kFp8Z].as<void>()));
}

// ---------------------------------------------------------------- attention

enum AttentionTensor { kQueries, kKeys, kValues, kO, kLogSums, kKvLen, kScoreScale };

attention::Args attention_args(const KernelDesc& desc, std::span<Tensor> tensors) {
  using attention::Strides;
  const auto of = [&](attention::Field field) { return desc.value[field]; };
  attention::Args args{.b = of(attention::kB),
                       .hq = of(attention::kHq),
                       .hkv = of(attention::kHkv),
                       .m = of(attention::kM),
                       .n = of(attention::kN)};
  args.q = tensors[kQueries].as<std::uint16_t>();
  args.q_strides = Strides::contiguous(args.hq, args.m, of(attention::kD));
  args.k = tensors[kKeys].as<std::uint16_t>();
  args.k_strides = Strides::contiguous(args.hkv, args.n, of(attention::kD));
  args.v = tensors[kValues].as<std::uint16_t>();
  args.v_strides = Strides::contiguous(args.hkv, args.n, of(attention::kDv));
  args.o = tensors[kO].as<std::uint16_t>();
  args.o_strides = Strides::contiguous(args.hq, args.m, of(attention::kDv));
  if (of(attention::kLse) != 0)
    args.lse = tensors[kLogSums].as<float>();
  if (tensors[kKvLen].buffer.size() != 0)
    args.kv_len = tensors[kKvLen].as<std::int32_t>();
  if (tensors[kScoreScale].buffer.size() != 0)
    args.scale = *tensors[kScoreScale].as<float>();
  return args;
}

/// Lengths within the keys; a scale that is one.
void make_sensible_attention(const KernelDesc& desc, std::span<Tensor> tensors) {
  const std::int64_t keys = desc.value[attention::kN] + 1;
  std::int32_t* const kv_len = tensors[kKvLen].as<std::int32_t>();
  for (std::uint64_t i = 0; i < tensors[kKvLen].buffer.size() / sizeof *kv_len; ++i)
    kv_len[i] = static_cast<std::int32_t>(static_cast<std::uint32_t>(kv_len[i]) % keys);
  if (tensors[kScoreScale].buffer.size() != 0)
    *tensors[kScoreScale].as<float>() = std::abs(*tensors[kScoreScale].as<float>());
}

/// Of the keys that each batch has.
Invocation::Work attention_work(const KernelDesc& desc, const attention::Args& args) {
  Invocation::Work work;
  KernelDesc batch = desc;
  batch.value[attention::kB] = 1;
  for (std::int64_t i = 0; i < args.b; ++i) {
    batch.value[attention::kN] = args.kv_len != nullptr ? args.kv_len[i] : args.n;
    work.operations += attention::op().operations(batch);
    work.bytes += attention::op().bytes(batch);
  }
  return work;
}

Result<Invocation> prepare_attention(const Kernel& kernel, const KernelDesc& desc, std::span<Tensor> tensors) {
  const attention::Args args = attention_args(desc, tensors);
  return Invocation{[&kernel, args] { return attention::run(kernel, args); }, {}, attention_work(desc, args)};
}

void reference_attention(const KernelDesc& desc, std::span<Tensor> tensors) {
  const attention::Args args = attention_args(desc, tensors);
  const std::size_t rows = static_cast<std::size_t>(args.b * args.hq * args.m);
  std::vector<double> o(rows * static_cast<std::size_t>(desc.value[attention::kDv])), lse(rows);
  attention::reference(desc, args, o.data(), lse.data());
  std::transform(o.begin(), o.end(), args.o, bf16_of_double);
  if (args.lse != nullptr)
    std::transform(lse.begin(), lse.end(), args.lse, [](double value) { return static_cast<float>(value); });
}

constexpr OpRunner kRunners[] = {
    {.op = OpId::int8_mm,
     .prepare = prepare_int8_mm,
     .reference = reference_int8_mm,
     .relative_bound = 0,
     .make_sensible = make_sensible_int8_mm},
    {.op = OpId::int8_linear, .prepare = prepare_int8_linear, .reference = reference_int8_linear, .relative_bound = 0},
    {.op = OpId::int4_mm, .prepare = prepare_int4_mm, .reference = reference_int4_mm, .relative_bound = 4e-3},
    {.op = OpId::fp8_block_bmm,
     .prepare = prepare_fp8_block_bmm,
     .reference = reference_fp8_block_bmm,
     .relative_bound = 4e-3},
    {.op = OpId::attention,
     .prepare = prepare_attention,
     .reference = reference_attention,
     .relative_bound = attention::kRelativeBound,
     .element_bound = {"lse", attention::kLseBound},
     .make_sensible = make_sensible_attention},
};

} // namespace

const OpRunner& runner_of(OpId op) {
  const auto runner =
      std::find_if(std::begin(kRunners), std::end(kRunners), [&](const OpRunner& row) { return row.op == op; });
  assert(runner != std::end(kRunners));
  return *runner;
}

Result<std::vector<Tensor>> random_tensors(const KernelDesc& desc, const Operands& operands) {
  std::vector<Tensor> tensors;
  for (const TensorSpec& spec : find_op(desc.op)->tensors) {
    // One that the desc does not have keeps its place, without an element.
    const bool present = spec.is_present(desc) && (!spec.optional || operands.gives(spec.name));
    const std::vector<std::int64_t> shape = present ? spec.shape(desc) : std::vector<std::int64_t>{0};
    Result<Tensor> tensor = make_tensor(spec.dtype(desc), shape);
    if (!tensor)
      return Status::error(tensor.status().code(),
                           fmt::format("tensor {} of {}: {}", spec.name, desc.text(), tensor.status().message()));
    if (!spec.output)
      fill_random(*tensor, tensors.size());
    tensors.push_back(std::move(*tensor));
  }
  if (const OpRunner& runner = runner_of(desc.op); runner.make_sensible != nullptr)
    runner.make_sensible(desc, tensors);
  for (std::size_t i = 0; i < tensors.size(); ++i)
    for (const auto& [name, value] : operands.values)
      if (name == find_op(desc.op)->tensors[i].name && value != "random")
        if (Status status = fill(tensors[i], value); !status)
          return Status::error(status.code(),
                               fmt::format("{}: {}={}: {}", find_op(desc.op)->name, name, value, status.message()));
  return tensors;
}

Result<Check> check_outputs(const KernelDesc& desc, std::span<Tensor> tensors) {
  const OpSpec& op = *find_op(desc.op);
  const OpRunner& runner = runner_of(desc.op);
  std::vector<Tensor> actual;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!op.tensors[i].output)
      continue;
    Result<Tensor> expected = make_tensor(tensors[i].dtype, tensors[i].shape);
    if (!expected)
      return expected.status();
    actual.push_back(std::exchange(tensors[i], std::move(*expected)));
  }
  runner.reference(desc, tensors);
  Check check{.ok = true};
  auto output = actual.begin();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (!op.tensors[i].output)
      continue;
    const Difference found = difference(*output, tensors[i]);
    const bool by_element = op.tensors[i].name == runner.element_bound.tensor;
    check.ok = check.ok &&
               (by_element ? found.element <= runner.element_bound.bound : found.relative <= runner.relative_bound);
    check.difference.max_abs = std::max(check.difference.max_abs, found.max_abs);
    check.difference.element = std::max(check.difference.element, found.element);
    if (!by_element)
      check.difference.relative = std::max(check.difference.relative, found.relative);
    tensors[i] = std::move(*output++);
  }
  return check;
}

} // namespace kiln::cli
