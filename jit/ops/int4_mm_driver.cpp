#include "jit/ops/int4_mm_driver.h"

#include <algorithm>
#include <charconv>
#include <cstring>

#include <fmt/format.h>

#include "jit/cuda/call.h"
#include "jit/ops/call_checks.h"
#include "jit/pack_file.h"
#include "jit/pages.h"

namespace kiln::int4_mm {
namespace {

constexpr std::int64_t kMaxSize = (std::int64_t{1} << 31) - 1;

constexpr BadArgument bad{"int4_mm"};

Status check_args(const Kernel& kernel, const Plan& plan, const Args& args) {
  const KernelDesc& desc = kernel.desc();
  const std::int64_t n = desc.value[kN], k = desc.value[kK], group = group_of(desc);
  if (Status s = check_m(kernel, args.m); !s)
    return s;
  const auto check_stride = [](std::string_view name, std::int64_t stride, std::int64_t columns) {
    return stride >= columns && stride <= kMaxSize
               ? Status()
               : bad(name, std::to_string(stride), fmt::format("{} to {}", columns, kMaxSize));
  };
  if (Status s = check_stride("ldx", args.ldx, k); !s)
    return s;
  if (Status s = check_stride("ldy", args.ldy, n); !s)
    return s;
  if (Status s = check_threads(kernel, args.threads); !s)
    return s;
  if (args.pack == nullptr)
    return bad("w_pack", "null", "a pack of these weights");
  const Pack& pack = *args.pack;
  if (pack.n() != n || pack.k() != k || pack.group() != group)
    return bad("w_pack", fmt::format("a pack of n={} k={} group={}", pack.n(), pack.k(), pack.group()),
               fmt::format("one of n={} k={} group={}", n, k, group));
  if (&pack.layout() != plan.layout)
    return bad("w_pack", fmt::format("a pack of layout {}", pack.layout().id),
               fmt::format("layout {}, which this kernel reads: make the pack for the kernel's device under the same "
                           "toggles",
                           plan.layout->id));
  if (!(pack.device() == desc.device))
    return bad("w_pack",
               pack.device().kind == DeviceKind::cpu ? "in host memory"
                                                     : fmt::format("memory of cuda:{}", pack.device().index),
               desc.device.kind == DeviceKind::cpu ? std::string("a pack in host memory")
                                                   : fmt::format("a pack in memory of cuda:{}", desc.device.index));
  if (args.m > 0 && k > 0 && args.x == nullptr)
    return bad("x", "null", fmt::format("a {} x {} matrix", args.m, k));
  if (args.m > 0 && n > 0 && args.y == nullptr)
    return bad("y", "null", fmt::format("a {} x {} matrix", args.m, n));
  return {};
}

// ---------------------------------------------------------------- CPU

/// Columns of one task: enough to hide its hand-over.
constexpr std::int64_t kColumnsPerTask = 16;

Status run_on_cpu(const Kernel& kernel, const Args& args) {
  struct Job {
    Call call;
    Entry entry;
  };
  const KernelDesc& desc = kernel.desc();
  Job job = {.call = {.x = args.x,
                      .ldx = args.ldx,
                      .w = reinterpret_cast<const std::uint8_t*>(args.pack->w_address()),
                      .sz = reinterpret_cast<const std::uint8_t*>(args.pack->sz_address()),
                      .y = args.y,
                      .ldy = args.ldy,
                      .m = args.m,
                      .n = desc.value[kN],
                      .k = desc.value[kK],
                      .group = group_of(desc)},
             .entry = reinterpret_cast<Entry>(reinterpret_cast<std::uintptr_t>(kernel.entry()))};
  const std::int64_t tasks = (job.call.n + kColumnsPerTask - 1) / kColumnsPerTask;
  const auto task = [](void* context, std::size_t index) {
    const Job& j = *static_cast<const Job*>(context);
    Call call = j.call;
    call.n_begin = static_cast<std::int64_t>(index) * kColumnsPerTask;
    call.n_end = std::min(call.n, call.n_begin + kColumnsPerTask);
    j.entry(&call);
  };
  if (args.threads == 1)
    for (std::int64_t i = 0; i < tasks; ++i)
      task(&job, static_cast<std::size_t>(i));
  else
    kernel.runtime().parallel.run(static_cast<std::size_t>(tasks), task, &job);
  return {};
}

// ---------------------------------------------------------------- GPU

/// 16 bytes: what a lane loads at once.
constexpr int kAlignment = 16;
constexpr std::int64_t kElements = kAlignment / 2;

Status check_gpu_args(const Args& args) {
  for (const auto& [name, stride] : {std::pair{"ldx", args.ldx}, std::pair{"ldy", args.ldy}})
    if (stride % kElements != 0)
      return bad(name, std::to_string(stride), fmt::format("a multiple of {} on a GPU", kElements));
  return {};
}

Status zero_outputs(const cuda::Module& module, const Args& args, std::int64_t n) {
  const Result<cuda::ContextScope> scope =
      cuda::ContextScope::enter(module.driver(), module.device_index(), static_cast<cuda::CUstream>(args.stream));
  if (!scope)
    return scope.status();
  if (Status s = cuda::check_pointer(module.driver(), scope->context(), module.device_index(), "int4_mm", "y", args.y);
      !s)
    return s;
  for (std::int64_t i = 0; i < args.m; ++i)
    if (Status s =
            module.driver().status(module.driver().api().cuMemsetD8Async(
                                       reinterpret_cast<std::uintptr_t>(args.y + i * args.ldy), 0,
                                       static_cast<std::size_t>(n) * 2, static_cast<cuda::CUstream>(args.stream)),
                                   "cuMemsetD8Async");
        !s)
      return s;
  return {};
}

/// The maps of one launch, and what they are made of.
struct Maps {
  cuda::Driver& driver;
  Boxes boxes;
  const KernelDesc& desc;
  const Args& args;
  std::int64_t rows;
  std::uint64_t x_address, y_address;
  cuda::TensorMap x, y;
};
/// cuda::Call::prepare.
Status make_maps(void* context) {
  constexpr int kBf16 = cuda::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  Maps& m = *static_cast<Maps*>(context);
  if (Status s = m.driver.tensor_maps().get(
          m.driver, cuda::matrix_view(m.x_address, kBf16, 2, m.desc.value[kK], m.rows, m.args.ldx), m.boxes.x, m.x);
      !s || m.boxes.y.inner == 0)
    return s;
  return m.driver.tensor_maps().get(
      m.driver, cuda::matrix_view(m.y_address, kBf16, 2, m.desc.value[kN], m.rows, m.args.ldy), m.boxes.y, m.y);
}

Status run_on_gpu(const Kernel& kernel, const Plan& plan, const Args& args) {
  if (Status s = check_gpu_args(args); !s)
    return s;
  cuda::Module& module = *kernel.cuda_module();
  const std::int64_t n = kernel.desc().value[kN];
  if (kernel.desc().value[kK] == 0)
    return zero_outputs(module, args, n);
  const std::int64_t most_rows = plan.launch->most_rows(n);
  for (std::int64_t row = 0; row < args.m; row += most_rows) {
    const std::int64_t rows = std::min(most_rows, args.m - row);
    const cuda::PointerArgument pointers[] = {{"x", args.x + row * args.ldx, kAlignment},
                                              {"y", args.y + row * args.ldy, kAlignment}};
    GpuParameters p = {.x = reinterpret_cast<std::uintptr_t>(pointers[0].address),
                       .w = args.pack->w_address(),
                       .sz = args.pack->sz_address(),
                       .y = reinterpret_cast<std::uintptr_t>(pointers[1].address),
                       .workspace = 0,
                       .m = static_cast<std::uint32_t>(rows),
                       .ldx = static_cast<std::uint32_t>(args.ldx),
                       .ldy = static_cast<std::uint32_t>(args.ldy)};
    Maps maps = {module.driver(), plan.boxes.value_or(Boxes()), kernel.desc(), args, rows, p.x, p.y, {}, {}};
    void* parameters[2 + GpuParameters::kCount] = {&maps.x, &maps.y,      &p.x, &p.w,   &p.sz,
                                                   &p.y,    &p.workspace, &p.m, &p.ldx, &p.ldy};
    const std::size_t without = plan.boxes ? 0 : 2;
    const cuda::Call call = {.op = "int4_mm",
                             .module = module,
                             .plan = *plan.launch,
                             .m = rows,
                             .n = n,
                             .stream = static_cast<cuda::CUstream>(args.stream),
                             .pointers = pointers,
                             .prepare = plan.boxes ? make_maps : nullptr,
                             .prepare_context = &maps,
                             .workspace = args.workspace,
                             .workspace_bytes = args.workspace_bytes};
    if (Status s = cuda::run(call, std::span(parameters).subspan(without), p.workspace); !s)
      return s;
  }
  return {};
}

} // namespace

Status run(const Kernel& kernel, const Args& args) {
  const Plan& plan = *static_cast<const Plan*>(kernel.plan());
  if (Status status = check_args(kernel, plan, args); !status)
    return status;
  if (args.m == 0 || kernel.desc().value[kN] == 0)
    return {};
  if (kernel.cuda_module() == nullptr)
    return run_on_cpu(kernel, args);
  if (!plan.launch)
    return Status::error(Code::internal, "int4_mm: a GPU kernel without a launch plan");
  return run_on_gpu(kernel, plan, args);
}

Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args) {
  const Plan& plan = *static_cast<const Plan*>(kernel.plan());
  if (Status s = check_m(kernel, args.m); !s)
    return s;
  const std::int64_t n = kernel.desc().value[kN];
  if (args.m == 0 || n == 0 || kernel.cuda_module() == nullptr || !plan.launch)
    return std::uint64_t{0};
  const std::int64_t rows = std::min(args.m, plan.launch->most_rows(n));
  return static_cast<std::uint64_t>(plan.launch->workspace_bytes(rows, n, kernel.cuda_module()->device().sm_count));
}

// ---------------------------------------------------------------- packs

void Pack::Free::operator()(std::uint8_t* p) const {
  free_pages(p);
}

std::uint64_t Pack::w_address() const {
  return device_.kind == DeviceKind::cpu ? reinterpret_cast<std::uintptr_t>(host_.get()) : gpu_.address();
}

std::string Pack::layout_text() const {
  return fmt::format("{}/g{}", layout_->id, group_);
}

Status Pack::allocate_host() {
  const std::int64_t size = std::max<std::int64_t>(bytes(), 64);
  host_.reset(static_cast<std::uint8_t*>(allocate_pages(static_cast<std::size_t>(size))));
  if (!host_)
    return Status::error(Code::out_of_memory,
                         fmt::format("int4_mm: no memory for a pack of {} bytes (n={} k={})", size, n_, k_));
  return {};
}

Status Pack::move_to_device(Runtime& runtime) {
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return driver.status();
  Result<cuda::Buffer> buffer = cuda::Buffer::allocate(**driver, device_.index, static_cast<std::uint64_t>(bytes()));
  if (!buffer)
    return Status::error(buffer.status().code(), fmt::format("int4_mm: a pack: {}", buffer.status().message()));
  if (bytes() > 0)
    if (Status s = buffer->write(host_.get(), static_cast<std::uint64_t>(bytes())); !s)
      return s;
  gpu_ = std::move(*buffer);
  host_.reset();
  return {};
}

Result<Pack> Pack::make(const PackLayout& layout, const Weights& weights, const KernelDesc& desc, Runtime& runtime) {
  const std::int64_t n = desc.value[kN], k = desc.value[kK], group = group_of(desc);
  const std::int64_t w_bytes = n * (k / 2), sz_bytes = k / group * n * 4;
  if (weights.w == nullptr && w_bytes > 0)
    return bad("w", "null", fmt::format("{} bytes of weights", w_bytes));
  if (weights.sz == nullptr && sz_bytes > 0)
    return bad("sz", "null", fmt::format("[{}][{}][2] bf16", k / group, n));
  if (weights.inner_k_tiles != 0 && k % (16 * weights.inner_k_tiles) != 0)
    return bad("k", std::to_string(k), fmt::format("a multiple of 16 · inner_k_tiles, {}", 16 * weights.inner_k_tiles));
  if (weights.place == DeviceKind::cuda && desc.device.kind == DeviceKind::cpu)
    return bad("weights.device", "cuda", "cpu for a desc of device cpu");

  Bytes w_copy, sz_copy, plain;
  const auto* w = static_cast<const std::uint8_t*>(weights.w);
  const auto* sz = static_cast<const std::uint8_t*>(weights.sz);
  if (weights.place == DeviceKind::cuda) {
    const Result<cuda::Driver*> driver = runtime.cuda();
    if (!driver)
      return driver.status();
    const auto fetch = [&](std::string_view name, const std::uint8_t*& data, std::int64_t bytes,
                           Bytes& copy) -> Status {
      const auto stream = static_cast<cuda::CUstream>(weights.stream);
      const Result<cuda::ContextScope> scope = cuda::ContextScope::enter(**driver, desc.device.index, stream);
      if (!scope)
        return scope.status();
      if (bytes == 0)
        return {};
      const Result<bool> capturing = cuda::is_capturing(**driver, stream);
      if (!capturing)
        return capturing.status();
      if (*capturing)
        return Status::error(Code::busy, "int4_mm: the stream of the weights is being captured into a graph: pack them "
                                         "before the capture begins");
      if (Status s = cuda::check_pointer(**driver, scope->context(), desc.device.index, "int4_mm", name, data); !s)
        return s;
      copy.resize(static_cast<std::size_t>(bytes));
      Status s = cuda::copy_to_host(**driver, desc.device.index, stream, copy.data(), data, copy.size());
      data = copy.data();
      return s;
    };
    if (Status s = fetch("w", w, w_bytes, w_copy); !s)
      return s;
    if (Status s = fetch("sz", sz, sz_bytes, sz_copy); !s)
      return s;
  }
  if (weights.inner_k_tiles != 0 && w_bytes > 0) {
    plain.resize(static_cast<std::size_t>(w_bytes));
    tensor_core_to_plain(reinterpret_cast<const std::int32_t*>(w), n, k, weights.inner_k_tiles, plain.data());
    w = plain.data();
  }

  Pack pack(layout, n, k, group, desc.device);
  if (Status s = pack.allocate_host(); !s)
    return s;
  // Alignment gaps are part of the file and its digest.
  std::memset(pack.host_.get(), 0, static_cast<std::size_t>(pack.bytes()));
  constexpr std::int64_t kBlocks = 32; // of a task's columns, in units of the layout's step
  struct Job {
    const PackLayout& layout;
    const std::uint8_t* w;
    const std::uint16_t* sz;
    std::int64_t n, k, group;
    std::uint8_t* out;
  } job = {layout, w, reinterpret_cast<const std::uint16_t*>(sz), n, k, group, pack.host_.get()};
  const std::int64_t columns = kBlocks * layout.n_step, tasks = k == 0 ? 0 : (n + columns - 1) / columns;
  runtime.parallel.run(
      static_cast<std::size_t>(tasks),
      [](void* context, std::size_t i) {
        const Job& j = *static_cast<const Job*>(context);
        const std::int64_t step = kBlocks * j.layout.n_step, begin = static_cast<std::int64_t>(i) * step;
        j.layout.pack(j.w, j.sz, j.n, j.k, j.group, begin, std::min(j.n, begin + step), j.out,
                      j.out + j.layout.sz_offset(j.n, j.k));
      },
      &job);
  if (desc.device.kind == DeviceKind::cuda)
    if (Status s = pack.move_to_device(runtime); !s)
      return s;
  return pack;
}

namespace {

struct LayoutOfFile {
  const PackLayout* layout = nullptr;
  std::int64_t group = 0;
};

/// Of `ID/gGROUP`.
LayoutOfFile parse_layout(std::string_view text) {
  const std::size_t slash = text.rfind("/g");
  LayoutOfFile found;
  if (slash == std::string_view::npos)
    return found;
  const std::string_view digits = text.substr(slash + 2);
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), found.group);
  if (error == std::errc() && end == digits.data() + digits.size() && digits.front() != '0' &&
      std::find(std::begin(kGroups), std::end(kGroups), found.group) != std::end(kGroups))
    found.layout = find_pack_layout(text.substr(0, slash));
  return found;
}

std::int64_t data_bytes(std::string_view layout_text, std::int64_t n, std::int64_t k) {
  const LayoutOfFile found = parse_layout(layout_text);
  return found.layout == nullptr || n % 8 != 0 || k % found.group != 0 ? -1 : found.layout->bytes(n, k, found.group);
}

} // namespace

Status Pack::save(const std::string& path) const {
  const std::size_t size = static_cast<std::size_t>(bytes());
  if (device_.kind == DeviceKind::cpu)
    return save_pack_file(path, op().name, layout_text(), n_, k_, {host_.get(), size});
  Bytes copy(size);
  if (size > 0)
    if (Status s = gpu_.read(copy.data(), size); !s)
      return s;
  return save_pack_file(path, op().name, layout_text(), n_, k_, copy);
}

Result<Pack> Pack::load(const std::string& path, Device device, Runtime& runtime) {
  const Result<PackFile> file = load_pack_file(path, op().name, data_bytes);
  if (!file)
    return file.status();
  const LayoutOfFile found = parse_layout(file->layout);
  Pack pack(*found.layout, file->n, file->k, found.group, device);
  if (Status s = pack.allocate_host(); !s)
    return s;
  if (!file->data.empty())
    std::memcpy(pack.host_.get(), file->data.data(), file->data.size());
  if (device.kind == DeviceKind::cuda)
    if (Status s = pack.move_to_device(runtime); !s)
      return s;
  return pack;
}

} // namespace kiln::int4_mm
