#include "jit/ops/int8_linear_driver.h"

#include <algorithm>
#include <atomic>

#include <fmt/format.h>

#include "jit/floating_point.h"
#include "jit/ops/call_checks.h"
#include "jit/ops/int8_cut.h"

namespace kiln::int8_linear {
namespace {

using int8_mm::most_row_parts;
using int8_mm::Pack;
using int8_mm::part;
using int8_mm::Range;
using int8_mm::round_up;

// ---------------------------------------------------------------- checks

constexpr BadArgument bad{"int8_linear"};

Status check_matrix(std::string_view name, std::string_view stride_name, const void* data, Float type,
                    std::int64_t rows, std::int64_t columns, std::int64_t stride) {
  if (stride < columns)
    return bad(stride_name, std::to_string(stride), fmt::format("{} or more", columns));
  if (rows > 1 && stride > (std::int64_t{1} << 59) / rows)
    return bad(stride_name, std::to_string(stride), fmt::format("a matrix of at most 2^59 elements in {} rows", rows));
  if (data == nullptr && rows > 0 && columns > 0)
    return bad(name, "null", fmt::format("a {} x {} matrix", rows, columns));
  return check_aligned(bad, name, data, bytes_of(type));
}

Status check_vector(std::string_view name, const float* data, std::int64_t count) {
  if (data == nullptr && count > 0)
    return bad(name, "null", fmt::format("{} floats", count));
  return check_aligned(bad, name, data, sizeof(float));
}

Status check_pack(const Plan& plan, const Pack* pack, std::int64_t n, std::int64_t k) {
  if (pack == nullptr)
    return bad("w_pack", "null", fmt::format("a pack of n={} k={}", n, k));
  if (pack->device().kind != DeviceKind::cpu)
    return bad("w_pack", "a pack in memory of a GPU", "a pack in host memory");
  if (pack->n() != n || pack->k() != k)
    return bad("w_pack", fmt::format("a pack of n={} k={}", pack->n(), pack->k()),
               fmt::format("one of n={} k={}", n, k));
  if (pack->b_dtype() != int8_mm::BDtype::s8 || !(pack->layout() == plan.layout))
    return bad(
        "w_pack", fmt::format("a pack of layout {}", pack->id()),
        fmt::format("layout {}, which this kernel reads: make the pack under the same toggles", plan.layout.id()));
  return {};
}

Status check_args(const Kernel& kernel, const Plan& plan, const Args& args) {
  const KernelDesc& desc = kernel.desc();
  const std::int64_t n = desc.value[kN], k = desc.value[kK];
  if (Status s = check_m(kernel, args.m); !s)
    return s;
  if (Status s = check_matrix("x", "ldx", args.x, x_of(desc), args.m, k, args.ldx); !s)
    return s;
  if (Status s = check_matrix("y", "ldy", args.y, y_of(desc), args.m, n, args.ldy); !s)
    return s;
  if (Status s = check_pack(plan, args.pack, n, k); !s)
    return s;
  if (Status s = check_vector("ws", args.ws, n); !s)
    return s;
  if (!has_bias(desc) && args.bias != nullptr)
    return bad("bias", "given", "null with a kernel of bias=0");
  if (has_bias(desc))
    if (Status s = check_vector("bias", args.bias, n); !s)
      return s;
  return check_threads(kernel, args.threads);
}

// ---------------------------------------------------------------- cutting a call into ranges

/// How a call is cut. Every cut of rows leaves pieces that the kernel's class of m serves.
struct Cut {
  int8_mm::Parts parts;      ///< of columns and rows: a task each
  std::int64_t m_blocks = 1; ///< of each part: quantised rows that stay in the L2 cache
  /// Rows are quantised by tasks of their own, for all that multiply; else each task does its own.
  bool shared = false;
  std::int64_t rounds = 1;      ///< of the shared way: bound what is quantised at a time
  std::int64_t rows = 0;        ///< quantised at a time, at most
  std::int64_t rows_bytes = 0;  ///< of them
  std::int64_t call_bytes = 0;  ///< of the kernel's own workspace, one task
  std::int64_t terms_bytes = 0; ///< likewise
  std::int64_t tasks() const { return parts.n * parts.m; }
  std::int64_t task_bytes() const { return (shared ? 0 : rows_bytes) + call_bytes + terms_bytes; }
  std::int64_t bytes() const { return (shared ? rows_bytes : 0) + tasks() * task_bytes(); }
};

/// Elements of X from which tasks that quantise for all pay their second hand-over to the threads: a core quantises
/// some 20,000 of them in a microsecond.
constexpr std::int64_t kSharedElements = 1 << 18;
/// Quantised rows of one round: what a shared cache may hold.
constexpr std::int64_t kRoundBytes = 16 << 20;

/// Parts of `size` rows, each of `most` at most where the class allows it, and the rows of the largest.
std::int64_t row_blocks(const Kernel& kernel, const Plan& plan, std::int64_t least_size, std::int64_t& rows,
                        std::int64_t most) {
  if (rows <= most)
    return 1;
  const std::int64_t blocks =
      std::clamp<std::int64_t>((rows + most - 1) / most, 1, most_row_parts(kernel.m_range(), plan.m_step, least_size));
  if (blocks > 1)
    rows = (rows + blocks - 1) / blocks + plan.m_step;
  return blocks;
}

Cut cut_call(const Kernel& kernel, const Plan& plan, const Args& args, bool may_share = true) {
  const Runtime& runtime = kernel.runtime();
  const std::int64_t n = kernel.desc().value[kN], k = kernel.desc().value[kK];
  const std::int64_t row_bytes = std::max<std::int64_t>(plan.q_row_bytes + plan.workspace_per_row, 1);
  Cut cut;
  const int threads =
      args.threads > 0 ? std::min(args.threads, runtime.parallel.threads()) : runtime.parallel.threads();
  std::int64_t m = args.m, least_m = m; // rows of a round, at most and at least
  if (threads > 1 && int8_mm::worth_threads(m, n, k)) {
    const auto parts_of = [&](std::int64_t rows) {
      return int8_mm::parts_for(threads, rows, most_row_parts(kernel.m_range(), plan.m_step, rows), n, plan.n_step);
    };
    cut.parts = parts_of(m);
    cut.shared = may_share && cut.parts.n > 1 && m > 1 && m / cut.parts.m * k >= kSharedElements;
    if (cut.shared) {
      cut.rounds = row_blocks(kernel, plan, m, m, std::max<std::int64_t>(plan.m_step, kRoundBytes / row_bytes));
      if (cut.rounds > 1) {
        least_m = args.m / cut.rounds - plan.m_step;
        cut.parts.m = std::min(cut.parts.m, most_row_parts(kernel.m_range(), plan.m_step, least_m));
      }
    }
  }
  std::int64_t rows = m; // of one task
  if (cut.parts.m > 1) {
    rows = part(m, plan.m_step, cut.parts.m, 0).size() + plan.m_step;
    least_m = least_m / cut.parts.m - plan.m_step;
  }
  // Half of L2 for the quantised rows, the rest for the panels that stream through.
  cut.m_blocks = row_blocks(kernel, plan, least_m, rows,
                            std::max<std::int64_t>(plan.m_step, runtime.machine.l2_bytes / 2 / row_bytes));
  cut.rows = cut.shared ? m : rows;
  cut.rows_bytes = round_up(cut.rows * plan.q_row_bytes + plan.q_end_bytes, 64);
  cut.call_bytes = round_up(plan.workspace_bytes + rows * plan.workspace_per_row, 64);
  if (plan.terms) {
    // A kernel may read those of a whole step at N.
    const std::int64_t columns = round_up(n, plan.n_step) / cut.parts.n + (cut.parts.n == 1 ? 0 : plan.n_step);
    cut.terms_bytes =
        round_up(plan.layout.panels(columns) * plan.layout.n_block * TermsLayout::count(kernel.desc()) * 4, 64);
  }
  return cut;
}

// ---------------------------------------------------------------- running

struct Run {
  const KernelDesc& desc;
  const Plan& plan;
  const Args& args;
  Entry entry;
  Cut cut;
  Parallel& parallel;
  std::uint8_t* shared_rows = nullptr; ///< with cut.shared
  std::uint8_t* workspaces = nullptr;  ///< task_bytes() for each task; null: of the threads' scratch
  Range round{0, 0};                   ///< rows
  std::int64_t quantise_tasks = 1;
  std::atomic<bool> out_of_memory{false};

  Call call_for(Range rows, Range columns, std::uint64_t steps) const {
    const std::int64_t k = desc.value[kK], panel = columns.begin / plan.layout.n_block;
    return {.product = {.a = nullptr,
                        .lda = 0,
                        .b = args.pack->panels() + panel * plan.layout.panel_bytes(k),
                        .b_sums = args.pack->sums() + columns.begin,
                        .c = static_cast<std::uint8_t*>(args.y) +
                             (rows.begin * args.ldy + columns.begin) * bytes_of(y_of(desc)),
                        .ldc = args.ldy,
                        .m = rows.size(),
                        .n = columns.size(),
                        .workspace = nullptr,
                        .terms = nullptr,
                        .scalars = nullptr,
                        .a_zp = nullptr,
                        .k = k,
                        .plan = nullptr,
                        .epilogue = nullptr,
                        .values = nullptr,
                        .row = rows.begin,
                        .column = columns.begin},
            .x = static_cast<const std::uint8_t*>(args.x) + rows.begin * args.ldx * bytes_of(x_of(desc)),
            .ldx = args.ldx,
            .ws = args.ws + columns.begin,
            .bias = args.bias != nullptr ? args.bias + columns.begin : nullptr,
            .steps = steps,
            .workspace = nullptr,
            .desc = &desc,
            .plan = &plan};
  }

  void quantise(std::int64_t i) const {
    const DefaultFloatingPoint scope;
    const Range rows = part(round.size(), 1, quantise_tasks, i);
    if (rows.size() == 0)
      return;
    Call call = call_for({round.begin + rows.begin, round.begin + rows.end}, {0, desc.value[kN]}, kQuantise);
    call.product.workspace = shared_rows + rows.begin * plan.q_row_bytes;
    entry(&call);
  }

  void multiply(std::int64_t i) {
    const Range rows = part(round.size(), plan.m_step, cut.parts.m, i / cut.parts.n);
    const Range columns = part(desc.value[kN], plan.n_step, cut.parts.n, i % cut.parts.n);
    if (rows.size() == 0 || columns.size() == 0)
      return;
    std::uint8_t* const workspace =
        workspaces != nullptr ? workspaces + i * cut.task_bytes()
                              : static_cast<std::uint8_t*>(thread_scratch(static_cast<std::size_t>(cut.task_bytes())));
    if (workspace == nullptr && cut.task_bytes() > 0) {
      out_of_memory = true;
      return;
    }
    auto* const terms =
        plan.terms ? reinterpret_cast<std::int32_t*>(workspace + (cut.task_bytes() - cut.terms_bytes)) : nullptr;
    if (terms != nullptr)
      make_terms(desc, plan.layout, plan.q_shift, args.pack->sums() + columns.begin, args.ws + columns.begin,
                 args.bias != nullptr ? args.bias + columns.begin : nullptr, columns.size(), terms);
    const DefaultFloatingPoint scope;
    for (std::int64_t b = 0; b < cut.m_blocks; ++b) {
      const Range block = part(rows.size(), plan.m_step, cut.m_blocks, b);
      const std::int64_t row = rows.begin + block.begin;
      Call call = call_for({round.begin + row, round.begin + rows.begin + block.end}, columns,
                           cut.shared ? kMultiply : kQuantise | kMultiply);
      call.product.workspace = cut.shared ? shared_rows + row * plan.q_row_bytes : workspace;
      call.product.terms = terms;
      call.workspace = workspace + (cut.shared ? 0 : cut.rows_bytes);
      entry(&call);
    }
  }

  void all() {
    for (std::int64_t i = 0; i < cut.rounds; ++i) {
      round = part(args.m, plan.m_step, cut.rounds, i);
      if (cut.shared) {
        quantise_tasks = std::min<std::int64_t>(round.size(), parallel.threads());
        parallel.run(
            static_cast<std::size_t>(quantise_tasks),
            [](void* context, std::size_t index) {
              static_cast<Run*>(context)->quantise(static_cast<std::int64_t>(index));
            },
            this);
      }
      if (cut.tasks() == 1)
        multiply(0);
      else
        parallel.run(
            static_cast<std::size_t>(cut.tasks()),
            [](void* context, std::size_t index) {
              static_cast<Run*>(context)->multiply(static_cast<std::int64_t>(index));
            },
            this);
    }
  }
};

} // namespace

Status run(const Kernel& kernel, const Args& args) {
  const Plan& plan = *static_cast<const Plan*>(kernel.plan());
  if (Status status = check_args(kernel, plan, args); !status)
    return status;
  if (args.m == 0 || kernel.desc().value[kN] == 0)
    return {};
  Run run = {.desc = kernel.desc(),
             .plan = plan,
             .args = args,
             .entry = reinterpret_cast<Entry>(reinterpret_cast<std::uintptr_t>(kernel.entry())),
             .cut = cut_call(kernel, plan, args),
             .parallel = kernel.runtime().parallel};
  if (args.workspace != nullptr) {
    if (Status s = check_workspace(kernel, args.workspace, args.workspace_bytes, run.cut.bytes()); !s)
      return s;
    run.shared_rows = static_cast<std::uint8_t*>(args.workspace);
    run.workspaces = run.shared_rows + (run.cut.shared ? run.cut.rows_bytes : 0);
    run.all();
  } else if (run.cut.shared) {
    const ScratchLease rows(static_cast<std::size_t>(run.cut.rows_bytes));
    run.shared_rows = static_cast<std::uint8_t*>(rows.data());
    if (run.shared_rows == nullptr) // nothing to share: each task quantises for itself
      run.cut = cut_call(kernel, plan, args, false);
    run.all();
  } else {
    run.all();
  }
  if (run.out_of_memory)
    return Status::error(
        Code::out_of_memory,
        fmt::format("int8_linear: no memory for {} bytes of workspace; the output is incomplete", run.cut.bytes()));
  return {};
}

Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args) {
  const Plan& plan = *static_cast<const Plan*>(kernel.plan());
  if (Status s = check_m(kernel, args.m); !s)
    return s;
  return static_cast<std::uint64_t>(cut_call(kernel, plan, args).bytes());
}

} // namespace kiln::int8_linear
