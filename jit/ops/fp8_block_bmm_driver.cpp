#include "jit/ops/fp8_block_bmm_driver.h"

#include <algorithm>
#include <cstring>

#include <fmt/format.h>

#include "jit/cuda/call.h"
#include "jit/floating_point.h"
#include "jit/ops/call_checks.h"

namespace kiln::fp8_block_bmm {
namespace {

constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;
/// Strides of batches, in elements: then every one is below the 2^40 bytes of a tensor map.
constexpr std::int64_t kMaxBatchStride = (std::int64_t{1} << 37) - 16;
/// On a GPU, of rows of X, Y and Z.
constexpr std::int64_t kAlignment = 16;

constexpr BadArgument bad{"fp8_block_bmm"};

struct Sizes {
  std::int64_t b, m, n, k;
};
Sizes sizes_of(const KernelDesc& desc, const Args& args) {
  return {desc.value[kB], args.tensors.m, desc.value[kN], desc.value[kK]};
}

Status check_strides(const Sizes& s, const Tensors& t) {
  if (t.ldz < s.n || t.ldz > kMaxSize)
    return bad("ldz", t.ldz, fmt::format("{} to {}", s.n, kMaxSize));
  for (const auto& [name, stride] :
       {std::pair{"ldx", t.ldx}, {"xs_stride_m", t.xs_stride_m}, {"xs_stride_k", t.xs_stride_k}})
    if (stride < 0 || stride > kMaxSize)
      return bad(name, stride, fmt::format("0 to {}", kMaxSize));
  if (s.b <= 1)
    return {}; // strides of batches mean nothing
  for (const auto& [name, stride, least] : {std::tuple{"x_stride_b", t.x_stride_b, std::int64_t{0}},
                                            {"z_stride_b", t.z_stride_b, s.n},
                                            {"xs_stride_b", t.xs_stride_b, std::int64_t{0}}})
    if (stride < least || stride > kMaxBatchStride)
      return bad(name, stride, fmt::format("{} to {}", least, kMaxBatchStride));
  // Batch after batch, or row after row with the batches between.
  if (t.z_stride_b < (s.m - 1) * t.ldz + s.n && t.ldz < (s.b - 1) * t.z_stride_b + s.n)
    return bad("z_stride_b", t.z_stride_b,
               fmt::format("one whose rows do not overlap those of ldz={}: {} or more, or at most {}", t.ldz,
                           (s.m - 1) * t.ldz + s.n, (t.ldz - s.n) / (s.b - 1)));
  return {};
}

Status check_args(const Kernel& kernel, const Sizes& s, const Args& args) {
  const Tensors& t = args.tensors;
  if (Status status = check_m(kernel, t.m); !status)
    return status;
  if (Status status = check_threads(kernel, args.threads); !status)
    return status;
  if (s.b == 0 || s.m == 0 || s.n == 0)
    return {};
  if (Status status = check_strides(s, t); !status)
    return status;
  const auto shape = [](std::int64_t x, std::int64_t y, std::int64_t z) {
    return fmt::format("[{}][{}][{}]", x, y, z);
  };
  if (t.z == nullptr)
    return bad("z", "null", shape(s.b, s.m, s.n));
  if (s.k == 0)
    return {};
  if (t.x == nullptr)
    return bad("x", "null", shape(s.b, s.m, s.k));
  if (t.y == nullptr)
    return bad("y", "null", shape(s.b, s.n, s.k));
  if (t.xs == nullptr)
    return bad("xs", "null", shape(s.b, s.m, blocks_of(s.k)) + " f32");
  if (t.ys == nullptr)
    return bad("ys", "null", shape(s.b, blocks_of(s.n), blocks_of(s.k)) + " f32");
  if (Status status = check_aligned(bad, "xs", t.xs, sizeof(float)); !status)
    return status;
  if (Status status = check_aligned(bad, "ys", t.ys, sizeof(float)); !status)
    return status;
  return check_aligned(bad, "z", t.z, bytes_of(z_of(kernel.desc())));
}

/// K = 0: sums of nothing. As few pieces of memory as Z has.
template <class Zero> Status zero_outputs(const Kernel& kernel, const Sizes& s, const Tensors& t, Zero zero) {
  const std::int64_t element = bytes_of(z_of(kernel.desc()));
  std::int64_t batches = s.b, rows = s.m, columns = s.n;
  if (t.ldz == s.n || rows == 1) {
    columns *= rows;
    rows = 1;
    if (t.z_stride_b == columns || batches == 1) {
      columns *= batches;
      batches = 1;
    }
  }
  for (std::int64_t b = 0; b < batches; ++b)
    for (std::int64_t i = 0; i < rows; ++i)
      if (Status status = zero(static_cast<std::uint8_t*>(t.z) + (b * t.z_stride_b + i * t.ldz) * element,
                               static_cast<std::size_t>(columns * element));
          !status)
        return status;
  return {};
}

// ---------------------------------------------------------------- CPU

Status run_on_cpu(const Kernel& kernel, const Sizes& s, const Args& args) {
  if (s.k == 0)
    return zero_outputs(kernel, s, args.tensors, [](std::uint8_t* row, std::size_t bytes) {
      std::memset(row, 0, bytes);
      return Status();
    });
  struct Job {
    Call call;
    Entry entry;
    std::int64_t n, tasks, workers;
  } job = {.call = {.desc = &kernel.desc(), .tensors = args.tensors, .b = 0, .n_begin = 0, .n_end = 0},
           .entry = reinterpret_cast<Entry>(reinterpret_cast<std::uintptr_t>(kernel.entry())),
           .n = s.n,
           .tasks = s.b * blocks_of(s.n),
           .workers = 1};
  const std::int64_t threads = kernel.runtime().parallel.threads();
  job.workers = std::min(job.tasks, args.threads > 0 ? std::min<std::int64_t>(args.threads, threads) : threads);
  const auto task = [](void* context, std::size_t index) {
    const Job& j = *static_cast<const Job*>(context);
    const DefaultFloatingPoint scope;
    Call call = j.call;
    const std::int64_t blocks = blocks_of(j.n);
    for (std::int64_t i = static_cast<std::int64_t>(index); i < j.tasks; i += j.workers) {
      call.b = i / blocks;
      call.n_begin = i % blocks * kBlock;
      call.n_end = std::min(j.n, call.n_begin + kBlock);
      j.entry(&call);
    }
  };
  kernel.runtime().parallel.run(static_cast<std::size_t>(job.workers), task, &job);
  return {};
}

// ---------------------------------------------------------------- GPU

/// Blocks along y and z (CUDA C++ Programming Guide, technical specifications per compute capability), and tiles that a
/// kernel counts in 32 bits.
constexpr std::int64_t kMaxGridYZ = 65535, kMaxTiles = kMaxSize;

Status check_gpu_strides(const Sizes& s, const Tensors& t, std::int64_t z_bytes) {
  const auto check = [](std::string_view name, std::int64_t stride, std::int64_t element) {
    return stride * element % kAlignment == 0
               ? Status()
               : bad(name, stride,
                     fmt::format("a multiple of {} on a GPU, {} bytes", kAlignment / element, kAlignment));
  };
  if (Status status = check("ldx", s.k > 0 ? t.ldx : 0, 1); !status)
    return status;
  if (Status status = check("ldz", t.ldz, z_bytes); !status)
    return status;
  if (s.b <= 1)
    return {};
  if (Status status = check("x_stride_b", s.k > 0 ? t.x_stride_b : 0, 1); !status)
    return status;
  return check("z_stride_b", t.z_stride_b, z_bytes);
}

int element_of(ZDtype type) {
  switch (type) {
  case ZDtype::bf16:
    return cuda::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  case ZDtype::f16:
    return cuda::CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  case ZDtype::f32:
    break;
  }
  return cuda::CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
}

/// Of one launch. The third stride of a single batch is any that a map allows.
Status make_maps(cuda::Driver& driver, const KernelDesc& desc, const Boxes& boxes, const Sizes& s, const Tensors& t,
                 GpuParameters& p) {
  const auto unsigned_of = [](std::int64_t value) { return static_cast<std::uint64_t>(value); };
  const auto make = [&](const cuda::TensorBox& box, std::uint64_t address, int type, std::int64_t element,
                        std::int64_t columns, std::int64_t rows, std::int64_t row_stride, std::int64_t batch_stride,
                        cuda::TensorMap& out) -> Status {
    if (box.inner == 0)
      return {};
    const cuda::TensorView view = {
        .address = address,
        .element = type,
        .extents = {unsigned_of(columns), unsigned_of(rows), unsigned_of(s.b)},
        .strides = {unsigned_of(row_stride * element), unsigned_of((s.b > 1 ? batch_stride : row_stride) * element)}};
    return driver.tensor_maps().get(driver, view, box, out);
  };
  if (Status status =
          make(boxes.x, p.x, cuda::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, s.k, s.m, t.ldx, t.x_stride_b, p.x_map);
      !status)
    return status;
  if (Status status = make(boxes.y, p.y, cuda::CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, s.k, s.n, s.k, s.n * s.k, p.y_map);
      !status)
    return status;
  const ZDtype z = z_of(desc);
  return make(boxes.z, p.z, element_of(z), bytes_of(z), s.n, s.m, t.ldz, t.z_stride_b, p.z_map);
}

Status launch(const Kernel& kernel, const Plan::Gpu& plan, const Sizes& s, const Tensors& t, void* stream) {
  cuda::Module& module = *kernel.cuda_module();
  const cuda::PointerArgument pointers[] = {
      {"x", t.x, kAlignment}, {"y", t.y, kAlignment}, {"xs", t.xs, 4}, {"ys", t.ys, 4}, {"z", t.z, kAlignment}};
  const auto address = [](const void* pointer) {
    return static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(pointer));
  };
  GpuParameters p = {.x_map = {},
                     .y_map = {},
                     .z_map = {},
                     .x = address(t.x),
                     .y = address(t.y),
                     .xs = address(t.xs),
                     .ys = address(t.ys),
                     .z = address(t.z),
                     .workspace = 0,
                     .x_stride_b = static_cast<std::uint64_t>(t.x_stride_b),
                     .z_stride_b = static_cast<std::uint64_t>(t.z_stride_b),
                     .xs_stride_b = static_cast<std::uint64_t>(t.xs_stride_b),
                     .m = static_cast<std::uint32_t>(s.m),
                     .ldx = static_cast<std::uint32_t>(t.ldx),
                     .ldz = static_cast<std::uint32_t>(t.ldz),
                     .xs_stride_m = static_cast<std::uint32_t>(t.xs_stride_m),
                     .xs_stride_k = static_cast<std::uint32_t>(t.xs_stride_k)};
  std::array<void*, GpuParameters::kCount> parameters = p.pointers();
  struct Maps { // need the context of the call
    cuda::Driver& driver;
    const KernelDesc& desc;
    const Boxes& boxes;
    const Sizes& sizes;
    const Tensors& tensors;
    GpuParameters& parameters;
  } maps = {module.driver(), kernel.desc(), plan.boxes, s, t, p};
  const cuda::Call call = {.op = "fp8_block_bmm",
                           .module = module,
                           .plan = plan.launch,
                           .m = s.m,
                           .n = s.n,
                           .batches = s.b,
                           .stream = static_cast<cuda::CUstream>(stream),
                           .pointers = pointers,
                           .prepare =
                               [](void* context) {
                                 Maps& m = *static_cast<Maps*>(context);
                                 return make_maps(m.driver, m.desc, m.boxes, m.sizes, m.tensors, m.parameters);
                               },
                           .prepare_context = &maps};
  return cuda::run(call, parameters, p.workspace);
}

Status run_on_gpu(const Kernel& kernel, const Plan& plan, const Sizes& s, const Args& args) {
  const std::int64_t z_bytes = bytes_of(z_of(kernel.desc()));
  if (Status status = check_gpu_strides(s, args.tensors, z_bytes); !status)
    return status;
  cuda::Module& module = *kernel.cuda_module();
  if (s.k == 0) {
    const auto stream = static_cast<cuda::CUstream>(args.stream);
    const Result<cuda::ContextScope> scope = cuda::ContextScope::enter(module.driver(), module.device_index(), stream);
    if (!scope)
      return scope.status();
    if (Status status = cuda::check_pointer(module.driver(), scope->context(), module.device_index(), "fp8_block_bmm",
                                            "z", args.tensors.z);
        !status)
      return status;
    return zero_outputs(kernel, s, args.tensors, [&](std::uint8_t* row, std::size_t bytes) {
      return module.driver().status(
          module.driver().api().cuMemsetD8Async(reinterpret_cast<std::uintptr_t>(row), 0, bytes, stream),
          "cuMemsetD8Async");
    });
  }
  const cuda::LaunchPlan& launch_plan = plan.gpu->launch;
  const std::int64_t row_tiles =
      launch_plan.blocks_per_sm > 0
          ? kMaxTiles / std::max<std::int64_t>(1, (s.n + launch_plan.tile_n - 1) / launch_plan.tile_n * s.b) /
                launch_plan.split_k
          : kMaxGridYZ;
  if (row_tiles < 1 || (launch_plan.blocks_per_sm == 0 && s.b * launch_plan.split_k > kMaxGridYZ))
    return Status::error(Code::unsupported,
                         fmt::format("fp8_block_bmm: b={} n={}: more tiles than a grid has blocks", s.b, s.n));
  const std::int64_t most_rows = std::min(row_tiles * launch_plan.tile_m, kMaxSize);
  for (std::int64_t row = 0; row < s.m; row += most_rows) {
    Sizes part = s;
    part.m = std::min(most_rows, s.m - row);
    Tensors t = args.tensors;
    t.x += row * t.ldx;
    t.xs += row * t.xs_stride_m;
    t.z = static_cast<std::uint8_t*>(t.z) + row * t.ldz * z_bytes;
    if (Status status = launch(kernel, *plan.gpu, part, t, args.stream); !status)
      return status;
  }
  return {};
}

} // namespace

Status run(const Kernel& kernel, const Args& args) {
  const Plan& plan = *static_cast<const Plan*>(kernel.plan());
  const Sizes sizes = sizes_of(kernel.desc(), args);
  if (Status status = check_args(kernel, sizes, args); !status)
    return status;
  if (sizes.b == 0 || sizes.m == 0 || sizes.n == 0)
    return {};
  if (kernel.cuda_module() == nullptr)
    return run_on_cpu(kernel, sizes, args);
  if (!plan.gpu)
    return Status::error(Code::internal, "fp8_block_bmm: a GPU kernel without a launch plan");
  return run_on_gpu(kernel, plan, sizes, args);
}

Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args) {
  if (Status status = check_m(kernel, args.tensors.m); !status)
    return status;
  return std::uint64_t{0};
}

} // namespace kiln::fp8_block_bmm
