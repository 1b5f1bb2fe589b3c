#include "jit/ops/int8_mm_driver.h"
#include "jit/floating_point.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <tuple>

#include <fmt/format.h>

#include "jit/cuda/call.h"
#include "jit/ops/call_checks.h"
#include "jit/ops/int8_cut.h"
#include "jit/pack_file.h"
#include "jit/pages.h"

namespace kiln::int8_mm {
namespace {

// ---------------------------------------------------------------- checks

constexpr BadArgument bad{"int8_mm"};

/// A matrix argument of `rows` rows: present, and with a stride of at least its row length.
Status check_matrix(std::string_view name, std::string_view stride_name, const void* data, std::int64_t rows,
                    std::int64_t columns, std::int64_t stride) {
  if (stride < columns)
    return bad(stride_name, std::to_string(stride), fmt::format("{} or more", columns));
  if (rows > 1 && stride > (std::int64_t{1} << 60) / rows)
    return bad(stride_name, std::to_string(stride), fmt::format("a matrix of at most 2^60 elements in {} rows", rows));
  if (data == nullptr && rows > 0 && columns > 0)
    return bad(name, "null", fmt::format("a {} x {} matrix", rows, columns));
  return {};
}

Status check_pack(const Plan& plan, const Pack& pack, Device device, BDtype b_dtype, std::int64_t n, std::int64_t k) {
  const auto place = [](Device d) {
    return d.kind == DeviceKind::cpu ? std::string("a pack in host memory")
                                     : fmt::format("a pack in memory of cuda:{}", d.index);
  };
  if (!(pack.device() == device))
    return bad("b_pack", place(pack.device()), place(device));
  if (pack.n() != n || pack.k() != k)
    return bad("b_pack", fmt::format("a pack of n={} k={}", pack.n(), pack.k()), fmt::format("one of n={} k={}", n, k));
  if (pack.b_dtype() != b_dtype)
    return bad("b_pack", pack.b_dtype() == BDtype::u8 ? "a pack of u8" : "a pack of s8",
               b_dtype == BDtype::u8 ? "one of u8, the desc's b_dtype" : "one of s8, the desc's b_dtype");
  if (!(pack.layout() == plan.layout))
    return bad(
        "b_pack", fmt::format("a pack of layout {}", pack.layout().id()),
        fmt::format("layout {}, which this kernel reads: make the pack under the same toggles", plan.layout.id()));
  return {};
}

Status check_args(const Kernel& kernel, const Plan& plan, const Args& args, std::int64_t n, std::int64_t k) {
  if (Status s = check_m(kernel, args.m); !s)
    return s;
  if (Status s = check_matrix("a", "lda", args.a, args.m, k, args.lda); !s)
    return s;
  if (Status s = check_matrix("c", "ldc", args.c, args.m, n, args.ldc); !s)
    return s;
  if (Status s = check_threads(kernel, args.threads); !s)
    return s;
  if (args.pack != nullptr)
    return args.b == nullptr ? check_pack(plan, *args.pack, kernel.desc().device,
                                          static_cast<BDtype>(kernel.desc().value[kBDtype]), n, k)
                             : bad("b", "given beside b_pack", "one of the two");
  if (args.b == nullptr && n > 0 && k > 0)
    return bad("b", "null, and so is b_pack", "one of the two");
  const bool nk = args.b_layout == BLayout::nk;
  return check_matrix("b", "ldb", args.b, nk ? n : k, nk ? k : n, args.ldb);
}

// ---------------------------------------------------------------- cutting a call into ranges

/// How a call is cut: tasks for threads, row blocks that keep A in the L2 cache, and for a raw B the columns packed at
/// a time. Every cut of rows leaves pieces that the kernel's class of m serves.
struct Cut {
  std::int64_t n_parts = 1, m_parts = 1;
  std::int64_t m_blocks = 1;                                           ///< of each part
  std::int64_t chunk_columns = 0;                                      ///< of a raw B, 0 for a pack
  std::int64_t kernel_workspace = 0, chunk_bytes = 0, terms_bytes = 0; ///< of one task, multiples of 64
  std::int64_t tasks() const { return n_parts * m_parts; }
  std::int64_t task_bytes() const { return kernel_workspace + chunk_bytes + terms_bytes; }
};

Cut cut_call(const Kernel& kernel, const Plan& plan, const Args& args, std::int64_t n, std::int64_t k) {
  const Runtime& runtime = kernel.runtime();
  Cut cut;
  const int threads =
      args.threads > 0 ? std::min(args.threads, runtime.parallel.threads()) : runtime.parallel.threads();
  if (threads > 1 && worth_threads(args.m, n, k)) {
    const Parts parts =
        parts_for(threads, args.m, most_row_parts(kernel.m_range(), plan.m_step, args.m), n, plan.n_step);
    cut.n_parts = parts.n;
    cut.m_parts = parts.m;
  }
  std::int64_t rows = args.m; // at most, of one call of the kernel
  if (cut.m_parts > 1)
    rows = part(args.m, plan.m_step, cut.m_parts, 0).size() + plan.m_step;
  // Half of L2 for A's rows, the rest for the panels that stream through.
  const std::int64_t l2 = runtime.machine.l2_bytes;
  if (rows > plan.m_step && rows > l2 / 2 / std::max<std::int64_t>(k, 1)) {
    const std::int64_t rows_in_cache = std::max<std::int64_t>(plan.m_step, l2 / 2 / std::max<std::int64_t>(k, 1));
    cut.m_blocks = std::clamp<std::int64_t>(
        (rows + rows_in_cache - 1) / rows_in_cache, 1,
        most_row_parts(kernel.m_range(), plan.m_step, cut.m_parts > 1 ? args.m / cut.m_parts - plan.m_step : args.m));
    rows = (rows + cut.m_blocks - 1) / cut.m_blocks + plan.m_step;
  }
  cut.kernel_workspace = round_up(plan.workspace_bytes(rows), 64);
  const std::int64_t columns = round_up((n + cut.n_parts - 1) / cut.n_parts, plan.n_step);
  if (args.pack == nullptr) {
    const std::int64_t step_bytes = plan.n_step / plan.layout.n_block * plan.layout.panel_bytes(k);
    const std::int64_t columns_in_cache =
        std::max<std::int64_t>(1, l2 / 2 / std::max<std::int64_t>(step_bytes, 1)) * plan.n_step;
    cut.chunk_columns = std::min(columns_in_cache, columns);
    cut.chunk_bytes = plan.layout.bytes(cut.chunk_columns, k);
  }
  if (const Epilogue epilogue = Epilogue::of(kernel.desc()); !epilogue.is_absent())
    cut.terms_bytes = round_up(plan.layout.panels(args.pack == nullptr ? cut.chunk_columns : columns) *
                                   TermsLayout::of(epilogue).panel_bytes(plan.layout),
                               64);
  return cut;
}

// ---------------------------------------------------------------- running

struct Run {
  const Plan& plan;
  const Args& args;
  Entry entry;
  std::int64_t n, k;
  Cut cut;
  Epilogue epilogue;
  Scalars scalars;
  std::atomic<bool> out_of_memory{false};

  /// Columns [columns.begin, columns.end) with their panels at b, for every row block of `rows`.
  void columns_of(Range rows, Range columns, const std::int8_t* b, const std::int32_t* sums,
                  std::uint8_t* workspace) const {
    const bool finishes = cut.terms_bytes > 0;
    auto* const terms = reinterpret_cast<std::int32_t*>(workspace + cut.kernel_workspace + cut.chunk_bytes);
    if (finishes)
      make_terms(epilogue, args.values, plan.layout, k, plan.a_shift, sums, columns.begin, columns.size(), terms);
    for (std::int64_t i = 0; i < cut.m_blocks; ++i) {
      const Range block = part(rows.size(), plan.m_step, cut.m_blocks, i);
      const std::int64_t row = rows.begin + block.begin;
      const Call call = {.a = static_cast<const std::int8_t*>(args.a) + row * args.lda,
                         .lda = args.lda,
                         .b = b,
                         .b_sums = sums,
                         .c =
                             static_cast<std::uint8_t*>(args.c) + (row * args.ldc + columns.begin) * epilogue.c_bytes(),
                         .ldc = args.ldc,
                         .m = block.size(),
                         .n = columns.size(),
                         .workspace = workspace,
                         .terms = finishes ? terms : nullptr,
                         .scalars = finishes ? &scalars : nullptr,
                         .a_zp = epilogue.a_zp == AZp::row ? args.values.a_zp + row : nullptr,
                         .k = k,
                         .plan = &plan,
                         .epilogue = finishes ? &epilogue : nullptr,
                         .values = finishes ? &args.values : nullptr,
                         .row = row,
                         .column = columns.begin};
      entry(&call);
    }
  }

  void task(std::size_t index) {
    const std::int64_t i = static_cast<std::int64_t>(index);
    const Range rows = part(args.m, plan.m_step, cut.m_parts, i / cut.n_parts);
    const Range columns = part(n, plan.n_step, cut.n_parts, i % cut.n_parts);
    if (rows.size() == 0 || columns.size() == 0)
      return;
    std::uint8_t* workspace =
        args.workspace != nullptr
            ? static_cast<std::uint8_t*>(args.workspace) + i * cut.task_bytes()
            : static_cast<std::uint8_t*>(thread_scratch(static_cast<std::size_t>(cut.task_bytes())));
    if (workspace == nullptr && cut.task_bytes() > 0) {
      out_of_memory = true;
      return;
    }
    std::optional<DefaultFloatingPoint> floating_point;
    if (epilogue.needs_floating_point())
      floating_point.emplace();
    if (args.pack != nullptr && columns.begin == 0) { // the whole of a call that is not shared
      columns_of(rows, columns, args.pack->panels(), args.pack->sums(), workspace);
      return;
    }
    const std::int64_t first_panel = columns.begin / plan.layout.n_block;
    if (args.pack != nullptr) {
      columns_of(rows, columns, args.pack->panels() + first_panel * plan.layout.panel_bytes(k),
                 args.pack->sums() + columns.begin, workspace);
      return;
    }
    auto* const panels = reinterpret_cast<std::int8_t*>(workspace + cut.kernel_workspace);
    auto* const sums = reinterpret_cast<std::int32_t*>(panels + plan.layout.sums_offset(cut.chunk_columns, k));
    for (std::int64_t begin = columns.begin; begin < columns.end; begin += cut.chunk_columns) {
      const Range chunk = {begin, std::min(columns.end, begin + cut.chunk_columns)};
      pack_panels(plan.layout, args.b, args.ldb, args.b_layout, n, k, chunk.begin / plan.layout.n_block,
                  plan.layout.panels(chunk.end), panels, sums, epilogue.b_dtype);
      columns_of(rows, chunk, panels, sums, workspace);
    }
  }
};

// ---------------------------------------------------------------- GPU

/// 16 bytes: what a thread loads at once.
constexpr int kGpuAlignment = 16;

Status check_gpu_args(const Args& args, const KernelDesc& desc) {
  constexpr std::int64_t kMaxStride = (std::int64_t{1} << 31) - 1;
  const bool raw = args.pack == nullptr;
  if (raw && args.b_layout != BLayout::nk)
    return bad("b_layout", "kn", "nk for a raw b on a GPU: pack it");
  for (const auto& [name, stride, step] :
       {std::tuple{"lda", args.lda, std::int64_t{kGpuAlignment}}, std::tuple{"ldc", args.ldc, std::int64_t{1}},
        std::tuple{"ldb", raw ? args.ldb : 0, std::int64_t{kGpuAlignment}}})
    if (stride % step != 0 || stride > kMaxStride)
      return bad(name, std::to_string(stride), fmt::format("a multiple of {} up to 2^31 - 1 on a GPU", step));
  if (desc.value[kRescale] == static_cast<std::int64_t>(Rescale::scale) && args.values.scale == nullptr)
    return bad("scale", "null",
               desc.value[kRescalePer] == static_cast<std::int64_t>(RescalePer::channel)
                   ? fmt::format("{} floats", desc.value[kN])
                   : std::string("one float"));
  return {};
}

/// The maps of one launch, and what they are made of.
struct Maps {
  cuda::Driver& driver;
  Boxes boxes;
  const KernelDesc& desc;
  std::int64_t rows, lda, ldb;
  std::uint64_t a_address, b_address;
  cuda::TensorMap a, b;
};
/// cuda::Call::prepare.
Status make_maps(void* context) {
  constexpr int kBytes = cuda::CU_TENSOR_MAP_DATA_TYPE_UINT8;
  Maps& m = *static_cast<Maps*>(context);
  const std::int64_t n = m.desc.value[kN], k = m.desc.value[kK];
  if (Status s = m.driver.tensor_maps().get(m.driver, cuda::matrix_view(m.a_address, kBytes, 1, k, m.rows, m.lda),
                                            m.boxes.a, m.a);
      !s)
    return s;
  return m.driver.tensor_maps().get(m.driver, cuda::matrix_view(m.b_address, kBytes, 1, k, n, m.ldb), m.boxes.b, m.b);
}

Status run_on_gpu(const Kernel& kernel, const Plan& plan, const Args& args) {
  const KernelDesc& desc = kernel.desc();
  if (Status s = check_gpu_args(args, desc); !s)
    return s;
  if (!plan.launch)
    return Status::error(Code::internal, "int8_mm: a GPU kernel without a launch plan");
  const std::int64_t n = desc.value[kN], k = desc.value[kK];
  const int c_bytes = Epilogue::of(desc).c_bytes();
  const std::uint64_t b = args.pack != nullptr ? args.pack->gpu_address() : reinterpret_cast<std::uintptr_t>(args.b);
  const std::int64_t ldb = args.pack != nullptr ? plan.layout.panel_bytes(k) : args.ldb;
  const std::int64_t rows_at_once = plan.launch->most_rows(n);
  for (std::int64_t row = 0; row < args.m; row += rows_at_once) {
    const std::int64_t rows = std::min(rows_at_once, args.m - row);
    std::array<cuda::PointerArgument, 4> pointers;
    std::size_t count = 0;
    void* const c = static_cast<std::uint8_t*>(args.c) + row * args.ldc * c_bytes;
    const std::int8_t* const a = static_cast<const std::int8_t*>(args.a) + row * args.lda;
    pointers[count++] = {"c", c, c_bytes};
    if (k > 0)
      pointers[count++] = {"a", a, kGpuAlignment};
    if (args.pack == nullptr && k > 0)
      pointers[count++] = {"b", args.b, kGpuAlignment};
    if (args.values.scale != nullptr)
      pointers[count++] = {"scale", args.values.scale, 4};
    GpuParameters p = {.a = reinterpret_cast<std::uintptr_t>(a),
                       .b = b,
                       .c = reinterpret_cast<std::uintptr_t>(c),
                       .scale = reinterpret_cast<std::uintptr_t>(args.values.scale),
                       .workspace = 0,
                       .m = static_cast<std::uint32_t>(rows),
                       .lda = static_cast<std::uint32_t>(args.lda),
                       .ldb = static_cast<std::uint32_t>(ldb),
                       .ldc = static_cast<std::uint32_t>(args.ldc)};
    Maps maps = {
        kernel.cuda_module()->driver(), plan.boxes.value_or(Boxes()), desc, rows, args.lda, ldb, p.a, p.b, {}, {}};
    void* parameters[2 + GpuParameters::kCount] = {&maps.a,      &maps.b, &p.a,   &p.b,   &p.c,  &p.scale,
                                                   &p.workspace, &p.m,    &p.lda, &p.ldb, &p.ldc};
    const std::size_t without = plan.boxes ? 0 : 2;
    const cuda::Call call = {.op = "int8_mm",
                             .module = *kernel.cuda_module(),
                             .plan = *plan.launch,
                             .m = rows,
                             .n = n,
                             .stream = static_cast<cuda::CUstream>(args.stream),
                             .pointers = {pointers.data(), count},
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
  const std::int64_t n = kernel.desc().value[kN], k = kernel.desc().value[kK];
  if (Status status = check_args(kernel, plan, args, n, k); !status)
    return status;
  if (args.m == 0 || n == 0)
    return {};
  if (kernel.cuda_module() != nullptr)
    return run_on_gpu(kernel, plan, args);
  const Epilogue epilogue = Epilogue::of(kernel.desc());
  if (Status status = check_values(epilogue, args.values, n); !status)
    return status;
  Run run = {plan,
             args,
             reinterpret_cast<Entry>(reinterpret_cast<std::uintptr_t>(kernel.entry())),
             n,
             k,
             cut_call(kernel, plan, args, n, k),
             epilogue,
             scalars_of(epilogue, args.values)};
  if (args.workspace != nullptr) {
    if (Status s =
            check_workspace(kernel, args.workspace, args.workspace_bytes, run.cut.tasks() * run.cut.task_bytes());
        !s)
      return s;
  }
  if (run.cut.tasks() == 1)
    run.task(0);
  else
    kernel.runtime().parallel.run(
        static_cast<std::size_t>(run.cut.tasks()),
        [](void* context, std::size_t index) { static_cast<Run*>(context)->task(index); }, &run);
  if (run.out_of_memory)
    return Status::error(
        Code::out_of_memory,
        fmt::format("int8_mm: no memory for {} bytes of workspace; the output is incomplete", run.cut.task_bytes()));
  return {};
}

Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args) {
  const Plan& plan = *static_cast<const Plan*>(kernel.plan());
  if (Status s = check_m(kernel, args.m); !s)
    return s;
  if (kernel.cuda_module() != nullptr)
    return args.m == 0 || !plan.launch ? 0
                                       : static_cast<std::uint64_t>(plan.launch->workspace_bytes(
                                             std::min(args.m, plan.launch->most_rows(kernel.desc().value[kN])),
                                             kernel.desc().value[kN], kernel.cuda_module()->device().sm_count));
  const Cut cut = cut_call(kernel, plan, args, kernel.desc().value[kN], kernel.desc().value[kK]);
  return static_cast<std::uint64_t>(cut.tasks() * cut.task_bytes());
}

// ---------------------------------------------------------------- packs

/// Panels packed by one task: enough to hide its hand-over, few enough to balance.
constexpr std::int64_t kPanelsPerTask = 16;

void Pack::Free::operator()(std::int8_t* p) const {
  free_pages(p);
}

constexpr std::string_view kU8Suffix = "/u8";
std::string_view without_suffix(std::string_view id) {
  return id.ends_with(kU8Suffix) ? id.substr(0, id.size() - kU8Suffix.size()) : id;
}

std::string Pack::id() const {
  return layout_.id() + std::string(b_dtype_ == BDtype::u8 ? kU8Suffix : "");
}

Result<Pack> Pack::allocate(PackLayout layout, BDtype b_dtype, std::int64_t n, std::int64_t k) {
  Pack pack;
  pack.layout_ = layout;
  pack.b_dtype_ = b_dtype;
  pack.n_ = n;
  pack.k_ = k;
  const std::int64_t bytes = std::max<std::int64_t>(pack.bytes(), 64);
  pack.data_.reset(static_cast<std::int8_t*>(allocate_pages(static_cast<std::size_t>(bytes))));
  if (!pack.data_)
    return Status::error(Code::out_of_memory,
                         fmt::format("int8_mm: no memory for a pack of {} bytes (n={} k={})", bytes, n, k));
  pack.sums_ = reinterpret_cast<std::int32_t*>(pack.data_.get() + layout.sums_offset(n, k));
  return pack;
}

Result<Pack> Pack::make(PackLayout layout, const void* b, std::int64_t ldb, BLayout b_layout, std::int64_t n,
                        std::int64_t k, Parallel& parallel, BDtype b_dtype) {
  const bool nk = b_layout == BLayout::nk;
  if (Status s = check_matrix("b", "ldb", b, nk ? n : k, nk ? k : n, ldb); !s)
    return s;
  Result<Pack> pack = allocate(layout, b_dtype, n, k);
  if (!pack)
    return pack;
  struct Job {
    const Pack& pack;
    const void* b;
    std::int64_t ldb;
    BLayout b_layout;
    std::int64_t panels;
  } job = {*pack, b, ldb, b_layout, layout.panels(n)};
  const std::int64_t tasks = (job.panels + kPanelsPerTask - 1) / kPanelsPerTask;
  parallel.run(
      static_cast<std::size_t>(tasks),
      [](void* context, std::size_t i) {
        const Job& j = *static_cast<const Job*>(context);
        const PackLayout& l = j.pack.layout_;
        const std::int64_t begin = static_cast<std::int64_t>(i) * kPanelsPerTask,
                           end = std::min(j.panels, begin + kPanelsPerTask);
        pack_panels(l, j.b, j.ldb, j.b_layout, j.pack.n_, j.pack.k_, begin, end,
                    j.pack.data_.get() + begin * l.panel_bytes(j.pack.k_), j.pack.sums_ + begin * l.n_block,
                    j.pack.b_dtype_);
      },
      &job);
  // The alignment gap after the sums is part of the file and its digest.
  const std::int64_t used = layout.sums_offset(n, k) + job.panels * layout.n_block * 4;
  std::memset(pack->data_.get() + used, 0, static_cast<std::size_t>(pack->bytes() - used));
  return pack;
}

Status Pack::move_to(Device device, Runtime& runtime) {
  const Result<cuda::Driver*> driver = runtime.cuda();
  if (!driver)
    return driver.status();
  const std::uint64_t size = static_cast<std::uint64_t>(bytes());
  Result<cuda::Buffer> buffer = cuda::Buffer::allocate(**driver, device.index, size);
  if (!buffer)
    return Status::error(buffer.status().code(), fmt::format("int8_mm: a pack: {}", buffer.status().message()));
  if (size > 0)
    if (Status s = buffer->write(data_.get(), size); !s)
      return s;
  gpu_ = std::move(*buffer);
  device_ = device;
  sums_ = nullptr;
  data_.reset();
  return {};
}

Status Pack::save(const std::string& path) const {
  Bytes copy;
  ByteSpan data = {reinterpret_cast<const std::uint8_t*>(data_.get()), static_cast<std::size_t>(bytes())};
  if (device_.kind == DeviceKind::cuda) {
    copy.resize(static_cast<std::size_t>(bytes()));
    if (!copy.empty())
      if (Status s = gpu_.read(copy.data(), copy.size()); !s)
        return s;
    data = copy;
  }
  return save_pack_file(path, op().name, id(), n_, k_, data);
}

Result<Pack> Pack::load(const std::string& path) {
  const Result<PackFile> file =
      load_pack_file(path, op().name, [](std::string_view id, std::int64_t n, std::int64_t k) -> std::int64_t {
        const Result<PackLayout> layout = PackLayout::parse(without_suffix(id));
        return layout ? layout->bytes(n, k) : -1;
      });
  if (!file)
    return file.status();
  const std::string_view id = without_suffix(file->layout);
  Result<Pack> pack =
      allocate(*PackLayout::parse(id), id.size() < file->layout.size() ? BDtype::u8 : BDtype::s8, file->n, file->k);
  if (pack && !file->data.empty())
    std::memcpy(pack->data_.get(), file->data.data(), file->data.size());
  return pack;
}

} // namespace kiln::int8_mm
