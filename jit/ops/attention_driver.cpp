#include "jit/ops/attention_driver.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <string>

#include <fmt/format.h>

#include "jit/bf16.h"
#include "jit/floating_point.h"
#include "jit/ops/call_checks.h"

namespace kiln::attention {
namespace {

// ---------------------------------------------------------------- checks

constexpr BadArgument bad{"attention"};

constexpr double kMostRows = 0x1p52; ///< of a tensor: 2^61 bytes with the greatest head size

struct Extents {
  std::int64_t batches, heads, rows, columns;
  bool empty() const { return batches == 0 || heads == 0 || rows == 0 || columns == 0; }
};

/// Elements that a tensor takes, counted from the one at its pointer: [begin, end).
struct Span {
  std::int64_t begin = 0, end = 0;

  /// Of rows [0, rows) of every head of one batch; strides may be negative.
  static Span of(std::int64_t batch, std::int64_t rows, const Extents& e, const Strides& s) {
    const std::int64_t last_head = (e.heads - 1) * s.head, last_row = (rows - 1) * s.row;
    return {batch * s.batch + std::min<std::int64_t>(last_head, 0) + std::min<std::int64_t>(last_row, 0),
            batch * s.batch + std::max<std::int64_t>(last_head, 0) + std::max<std::int64_t>(last_row, 0) + e.columns};
  }
  void include(const Span& other) {
    *this = end == begin ? other : Span{std::min(begin, other.begin), std::max(end, other.end)};
  }
};

Span span_of(const Extents& e, const Strides& s) {
  Span span;
  if (!e.empty())
    for (const std::int64_t batch : {std::int64_t{0}, e.batches - 1})
      span.include(Span::of(batch, e.rows, e, s));
  return span;
}

/// Of K or V: the keys that each batch has.
Span span_of_keys(const Extents& e, const Strides& s, const std::int32_t* kv_len) {
  if (kv_len == nullptr)
    return span_of(e, s);
  Span span;
  for (std::int64_t batch = 0; batch < e.batches; ++batch)
    if (kv_len[batch] > 0 && e.heads > 0)
      span.include(Span::of(batch, kv_len[batch], e, s));
  return span;
}

/// A head of K or V. Without keys the tensor is empty: any pointer, any strides.
const std::uint16_t* head_of_keys(const Args& args, const std::uint16_t* data, const Strides& s, std::int64_t batch,
                                  std::int64_t head) {
  return args.n == 0 ? data : data + batch * s.batch + head * s.head;
}

/// An input's rows may overlap and repeat; whether an output's lie apart is for rows_lie_apart.
Status check_tensor(std::string_view name, const void* data, const Extents& e, const Strides& s) {
  if (s.column != 1)
    return bad(fmt::format("{}'s innermost stride", name), std::to_string(s.column), "1");
  if (!e.empty()) {
    double span = 0;
    for (const auto& [extent, stride] : {std::pair{e.batches, s.batch}, {e.heads, s.head}, {e.rows, s.row}})
      span += std::fabs(static_cast<double>(extent - 1) * static_cast<double>(stride));
    if (span > 0x1p60)
      return bad(fmt::format("{}'s strides", name), fmt::format("{}, {}, {}", s.batch, s.head, s.row),
                 "a tensor within 2^60 elements");
  }
  if (data == nullptr && !e.empty())
    return bad(name, "null", fmt::format("a {} x {} x {} x {} tensor", e.batches, e.heads, e.rows, e.columns));
  return check_aligned(bad, name, data, sizeof(std::uint16_t));
}

/// Whether each row of the tensor lies apart from every other: dimension by dimension from the smallest stride on.
bool rows_lie_apart(const Extents& e, const Strides& s) {
  std::array<std::pair<std::int64_t, std::int64_t>, 3> dimensions = {
      {{s.batch, e.batches}, {s.head, e.heads}, {s.row, e.rows}}};
  for (auto& [stride, extent] : dimensions)
    stride = extent > 1 ? std::abs(stride) : 0; // of one row, batch or head it means nothing
  std::sort(dimensions.begin(), dimensions.end());
  std::int64_t span = e.columns;
  for (const auto& [stride, extent] : dimensions) {
    if (extent <= 1)
      continue;
    if (stride < span)
      return false;
    span += (extent - 1) * stride;
  }
  return true;
}

struct Memory {
  std::string_view name;
  const void* data;
  Span bytes; ///< from `data`

  static Memory of(std::string_view name, const std::uint16_t* data, const Span& elements) {
    return {name, data, {elements.begin * 2, elements.end * 2}};
  }
  /// Signed: what a tensor spans before its pointer may be more than the address.
  std::int64_t at(std::int64_t byte) const {
    return static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(data)) + byte;
  }
  bool overlaps(const Memory& other) const {
    return bytes.begin < bytes.end && other.bytes.begin < other.bytes.end &&
           at(bytes.begin) < other.at(other.bytes.end) && other.at(other.bytes.begin) < at(bytes.end);
  }
};

Status check_sizes(const Kernel& kernel, const Args& a) {
  const KernelDesc& desc = kernel.desc();
  const OpSpec& spec = op();
  const struct {
    Field field;
    std::int64_t value;
  } sizes[] = {{kB, a.b}, {kHq, a.hq}, {kHkv, a.hkv}, {kN, a.n}};
  for (const auto& size : sizes) {
    const FieldSpec& field = spec.fields[size.field];
    if (size.value < 0 || size.value > field.max)
      return bad(field.name, std::to_string(size.value), fmt::format("0 to {}", field.max));
  }
  if (Status s = check_m(kernel, a.m, "queries"); !s)
    return s;
  const std::int64_t group = group_of(desc);
  if (a.hq != a.hkv * group)
    return bad("hq", std::to_string(a.hq),
               fmt::format("{}, this kernel's group of {} for each of hkv={}", a.hkv * group, group, a.hkv));
  // As in the desc's check: what is computed from the sizes stays within an int64.
  const double rows = static_cast<double>(a.b) * static_cast<double>(a.hq) * static_cast<double>(std::max(a.m, a.n));
  if (rows > kMostRows)
    return bad("b·hq·max(m, n)", fmt::format("{} * {} * {}", a.b, a.hq, std::max(a.m, a.n)), "2^52 or less");
  return {};
}

Status check_args(const Kernel& kernel, const Args& a) {
  if (Status s = check_sizes(kernel, a); !s)
    return s;
  const KernelDesc& desc = kernel.desc();
  const std::int64_t d = desc.value[kD], dv = desc.value[kDv];
  const Extents q = {a.b, a.hq, a.m, d}, k = {a.b, a.hkv, a.n, d}, v = {a.b, a.hkv, a.n, dv}, o = {a.b, a.hq, a.m, dv};
  if (Status s = check_tensor("q", a.q, q, a.q_strides); !s)
    return s;
  if (Status s = check_tensor("k", a.k, k, a.k_strides); !s)
    return s;
  if (Status s = check_tensor("v", a.v, v, a.v_strides); !s)
    return s;
  if (Status s = check_tensor("o", a.o, o, a.o_strides); !s)
    return s;
  if (!o.empty() && !rows_lie_apart(o, a.o_strides))
    return bad("o's strides", fmt::format("{}, {}, {}", a.o_strides.batch, a.o_strides.head, a.o_strides.row),
               "strides by which no two rows of o overlap");
  const std::int64_t rows = a.b * a.hq * a.m;
  if (desc.value[kLse] != 0 && a.lse == nullptr && rows > 0)
    return bad("lse", "null", fmt::format("a {} x {} x {} tensor, which lse=1 asks for", a.b, a.hq, a.m));
  if (desc.value[kLse] == 0 && a.lse != nullptr)
    return bad("lse", "given", "null, as lse=0 says");
  if (Status s = check_aligned(bad, "lse", a.lse, sizeof(float)); !s)
    return s;
  if (Status s = check_aligned(bad, "kv_len", a.kv_len, sizeof(std::int32_t)); !s)
    return s;
  if (a.kv_len != nullptr)
    for (std::int64_t i = 0; i < a.b; ++i)
      if (a.kv_len[i] < 0 || a.kv_len[i] > a.n)
        return bad(fmt::format("kv_len[{}]", i), std::to_string(a.kv_len[i]), fmt::format("0 to n, {}", a.n));
  const Memory outputs[] = {Memory::of("o", a.o, span_of(o, a.o_strides)),
                            {"lse", a.lse, {0, a.lse == nullptr ? 0 : rows * 4}}};
  const Memory inputs[] = {Memory::of("q", a.q, span_of(q, a.q_strides)),
                           Memory::of("k", a.k, span_of_keys(k, a.k_strides, a.kv_len)),
                           Memory::of("v", a.v, span_of_keys(v, a.v_strides, a.kv_len)),
                           {"kv_len", a.kv_len, {0, a.kv_len == nullptr ? 0 : a.b * 4}}};
  for (const Memory& output : outputs)
    for (const Memory& input : inputs)
      if (output.overlaps(input))
        return bad(output.name, fmt::format("in memory that {} spans", input.name), "memory of its own");
  if (outputs[0].overlaps(outputs[1]))
    return bad("lse", "in memory that o spans", "memory of its own");
  if (a.scale && !(*a.scale >= 0 && std::isfinite(*a.scale)))
    return bad("scale", fmt::format("{}", *a.scale), "a finite number, 0 or more");
  return check_threads(kernel, a.threads);
}

float scale_of(const Args& args, std::int64_t d) {
  return args.scale ? *args.scale : static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
}

/// Never 0, which would make a NaN of the score of an invisible key, -infinity; the least of floats gives the same
/// sums.
float scale_log2e(const Args& args, std::int64_t d) {
  constexpr double kLog2E = 1.44269504088896341;
  return std::max(static_cast<float>(double{scale_of(args, d)} * kLog2E), std::numeric_limits<float>::min());
}

/// Keys that query 0 of the batch sees when keys had no end, and how many more the next query sees.
struct Visible {
  std::int64_t first, step;
};
Visible visible_of(const KernelDesc& desc, std::int64_t m, std::int64_t keys) {
  switch (static_cast<Causal>(desc.value[kCausal])) {
  case Causal::top_left:
    return {1, 1};
  case Causal::bottom_right:
    return {keys - m + 1, 1};
  default:
    return {keys, 0};
  }
}

// ---------------------------------------------------------------- cutting a call into ranges

constexpr std::int64_t round_up(std::int64_t v, std::int64_t step) {
  return (v + step - 1) / step * step;
}

/// How a call is cut: rows of each (batch, head of K and V) at multiples of the kernel's block, and keys where there
/// are few rows. The ranges depend on sizes alone, never on the number of threads: so do the results' last bits.
struct Cut {
  std::int64_t rows = 0;     ///< of a (batch, head of K and V)
  std::int64_t row_step = 1; ///< of a task
  std::int64_t row_parts = 1, key_step = 0, key_parts = 1;
  std::int64_t heads = 0;                          ///< batch · hkv
  bool stats = false;                              ///< kept for the driver
  std::int64_t stats_bytes = 0, partial_bytes = 0; ///< of the whole call
  std::int64_t workers = 1;                        ///< that share the tasks: the only field that depends on the threads
  std::int64_t worker_bytes = 0;
  std::int64_t tasks() const { return heads * row_parts * key_parts; }
  std::int64_t shared_bytes() const { return stats_bytes + partial_bytes; }
  std::int64_t all_bytes() const { return shared_bytes() + workers * worker_bytes; }
};

/// Tasks enough to balance, of keys enough for each that the merge does not count.
constexpr std::int64_t kTasksWanted = 32, kLeastKeysOfPart = 512, kKeyStep = 256;
/// Below this a task costs more to hand over than it brings.
constexpr double kOperationsPerTask = 4e6;

Cut cut_call(const Kernel& kernel, const Args& args) {
  const Plan& plan = *static_cast<const Plan*>(kernel.plan());
  const KernelDesc& desc = kernel.desc();
  const std::int64_t dv = desc.value[kDv];
  Cut cut;
  cut.heads = args.b * args.hkv;
  cut.rows = args.m * group_of(desc);
  const double operations_per_row = 2.0 * static_cast<double>(args.n) * static_cast<double>(desc.value[kD] + dv) + 1;
  cut.row_step = round_up(std::clamp(static_cast<std::int64_t>(kOperationsPerTask / operations_per_row),
                                     plan.block_rows, std::max(cut.rows, plan.block_rows)),
                          plan.block_rows);
  cut.row_parts = std::max<std::int64_t>((cut.rows + cut.row_step - 1) / cut.row_step, 1);
  cut.key_step = std::max<std::int64_t>(args.n, 1);
  if (plan.makes_partials && desc.value[kBatchInvariant] == 0 && cut.heads * cut.row_parts < kTasksWanted) {
    const std::int64_t parts =
        std::clamp<std::int64_t>(kTasksWanted / std::max<std::int64_t>(cut.heads * cut.row_parts, 1), 1,
                                 std::max<std::int64_t>(args.n / kLeastKeysOfPart, 1));
    if (parts > 1) {
      cut.key_step = round_up((args.n + parts - 1) / parts, kKeyStep);
      cut.key_parts = (args.n + cut.key_step - 1) / cut.key_step;
    }
  }
  const std::int64_t all_rows = cut.heads * cut.rows;
  cut.stats = cut.key_parts > 1 || desc.value[kLse] != 0;
  if (cut.stats)
    cut.stats_bytes = round_up(all_rows * cut.key_parts * 2 * 4, 64);
  if (cut.key_parts > 1)
    cut.partial_bytes = round_up(all_rows * cut.key_parts * dv * 4, 64);
  cut.worker_bytes = round_up(plan.workspace_bytes, 64);
  const Parallel& parallel = kernel.runtime().parallel;
  const double worth = operations_per_row * static_cast<double>(cut.heads * cut.rows) / kOperationsPerTask;
  cut.workers = args.threads > 0 ? std::min(args.threads, parallel.threads()) : parallel.threads();
  cut.workers = std::clamp<std::int64_t>(std::min(cut.tasks(), static_cast<std::int64_t>(std::min(worth, 0x1p30))), 1,
                                         cut.workers);
  return cut;
}

// ---------------------------------------------------------------- running

struct Run {
  const KernelDesc& desc;
  const Args& args;
  Entry entry;
  Cut cut;
  float scale_log2e;
  float *stats, *partials; ///< [head][key part][row][2] and [dv]; null when not wanted
  std::atomic<std::int64_t> next_task{0};
  std::atomic<bool> out_of_memory{false};

  std::int64_t dv() const { return desc.value[kDv]; }
  std::int64_t group() const { return group_of(desc); }
  std::int64_t keys_of(std::int64_t batch) const { return args.kv_len == nullptr ? args.n : args.kv_len[batch]; }
  std::int64_t row_index(std::int64_t head, std::int64_t key_part, std::int64_t row) const {
    return (head * cut.key_parts + key_part) * cut.rows + row;
  }

  /// Takes tasks until none is left.
  void work(std::size_t worker) {
    const DefaultFloatingPoint scope; // each thread has its own
    std::uint8_t* workspace = nullptr;
    if (args.workspace != nullptr) {
      workspace = static_cast<std::uint8_t*>(args.workspace) + cut.shared_bytes() +
                  static_cast<std::int64_t>(worker) * cut.worker_bytes;
    } else {
      workspace = static_cast<std::uint8_t*>(thread_scratch(static_cast<std::size_t>(cut.worker_bytes)));
      if (workspace == nullptr && cut.worker_bytes > 0) {
        out_of_memory = true;
        return;
      }
    }
    for (std::int64_t i; (i = next_task.fetch_add(1, std::memory_order_relaxed)) < cut.tasks();)
      task(i, workspace);
  }

  void task(std::int64_t i, void* workspace) const {
    // Rows that see most come first, so that no thread starts on a long task at the end.
    const std::int64_t key_part = i % cut.key_parts, row_part = cut.row_parts - 1 - i / cut.key_parts % cut.row_parts,
                       head = i / (cut.key_parts * cut.row_parts);
    const std::int64_t batch = head / args.hkv, kv_head = head % args.hkv, q_head = kv_head * group();
    const std::int64_t row_begin = row_part * cut.row_step, row_end = std::min(cut.rows, row_begin + cut.row_step);
    const std::int64_t keys = keys_of(batch), key_begin = std::min(keys, key_part * cut.key_step),
                       key_end = std::min(keys, key_begin + cut.key_step);
    const Visible visible = visible_of(desc, args.m, keys);
    const std::int64_t first = row_index(head, key_part, row_begin);
    const Call call = {
        .q = args.q + batch * args.q_strides.batch + q_head * args.q_strides.head,
        .q_head_stride = args.q_strides.head,
        .q_row_stride = args.q_strides.row,
        .k = head_of_keys(args, args.k, args.k_strides, batch, kv_head),
        .k_row_stride = args.k_strides.row,
        .v = head_of_keys(args, args.v, args.v_strides, batch, kv_head),
        .v_row_stride = args.v_strides.row,
        .o = args.o + batch * args.o_strides.batch + q_head * args.o_strides.head,
        .o_head_stride = args.o_strides.head,
        .o_row_stride = args.o_strides.row,
        .row_begin = row_begin,
        .row_end = row_end,
        .key_begin = key_begin,
        .key_end = key_end,
        .visible = visible.first,
        .visible_step = visible.step,
        .scale_log2e = scale_log2e,
        .partial = cut.key_parts > 1 ? partials + first * dv() : nullptr,
        .stats = cut.stats ? stats + first * 2 : nullptr,
        .workspace = workspace,
        .group = group(),
        .d = desc.value[kD],
        .dv = dv(),
    };
    entry(&call);
  }

  /// The ranges of keys of one row, in their order, and its lse.
  void merge_row(std::int64_t head, std::int64_t row, float* sums) const {
    const float* const first = stats + row_index(head, 0, row) * 2;
    const std::int64_t part_step = cut.rows * 2;
    float max = first[0], sum = first[1];
    if (cut.key_parts > 1) {
      max = -std::numeric_limits<float>::infinity();
      sum = 0;
      bool finite = true;
      for (std::int64_t part = 0; part < cut.key_parts; ++part)
        if (const float* s = first + part * part_step; s[1] != 0) {
          finite = finite && !std::isnan(s[0]);
          max = std::max(max, s[0]);
        }
      std::fill(sums, sums + dv(), 0.0f);
      for (std::int64_t part = 0; part < cut.key_parts; ++part) {
        const float* s = first + part * part_step;
        if (s[1] == 0)
          continue;
        const float factor = finite ? std::exp2(s[0] - max) : s[0] - s[0];
        const float* const partial = partials + row_index(head, part, row) * dv();
        sum += factor * s[1];
        for (std::int64_t i = 0; i < dv(); ++i)
          sums[i] += factor * partial[i];
      }
      const std::int64_t batch = head / args.hkv;
      std::uint16_t* const o = args.o + batch * args.o_strides.batch +
                               (head % args.hkv * group() + row % group()) * args.o_strides.head +
                               row / group() * args.o_strides.row;
      const float factor = sum == 0 ? 0.0f : 1 / sum;
      for (std::int64_t i = 0; i < dv(); ++i)
        o[i] = bf16_of_float(sums[i] * factor);
    }
    if (args.lse != nullptr)
      args.lse[(head * group() + row % group()) * args.m + row / group()] = lse_of(max, sum);
  }

  static float lse_of(float max, float sum) {
    if (std::isnan(max) || std::isnan(sum))
      return std::numeric_limits<float>::quiet_NaN();
    constexpr double kLn2 = 0.693147180559945309;
    return sum == 0 ? -std::numeric_limits<float>::infinity()
                    : static_cast<float>(double{max} * kLn2 + std::log(double{sum}));
  }
};

constexpr std::size_t kMaxHeadSize = 256;

} // namespace

Status run(const Kernel& kernel, const Args& args) {
  if (Status status = check_args(kernel, args); !status)
    return status;
  if (args.b == 0 || args.hq == 0 || args.m == 0)
    return {};
  const DefaultFloatingPoint scope; // of the merge
  const KernelDesc& desc = kernel.desc();
  const Cut cut = cut_call(kernel, args);
  Run run = {.desc = desc,
             .args = args,
             .entry = reinterpret_cast<Entry>(reinterpret_cast<std::uintptr_t>(kernel.entry())),
             .cut = cut,
             .scale_log2e = scale_log2e(args, desc.value[kD]),
             .stats = nullptr,
             .partials = nullptr};
  std::uint8_t* shared = static_cast<std::uint8_t*>(args.workspace);
  std::optional<ScratchLease> lease;
  std::unique_ptr<void, decltype(&std::free)> allocated(nullptr, &std::free);
  if (args.workspace != nullptr) {
    if (Status s = check_workspace(kernel, args.workspace, args.workspace_bytes, cut.all_bytes()); !s)
      return s;
  } else if (const auto bytes = static_cast<std::size_t>(cut.shared_bytes()); bytes > 0) {
    lease.emplace(bytes);
    shared = static_cast<std::uint8_t*>(lease->data());
    if (shared == nullptr) { // inside other calls' tasks, too deep for a lease
      allocated.reset(std::aligned_alloc(64, bytes));
      shared = static_cast<std::uint8_t*>(allocated.get());
    }
  }
  const auto no_memory = [&] {
    return Status::error(Code::out_of_memory,
                         fmt::format("attention: no memory for {} bytes of workspace; the output is incomplete",
                                     cut.shared_bytes() + cut.worker_bytes));
  };
  if (shared == nullptr && cut.shared_bytes() > 0)
    return no_memory();
  if (cut.shared_bytes() > 0) {
    run.stats = reinterpret_cast<float*>(shared);
    run.partials = reinterpret_cast<float*>(shared + cut.stats_bytes);
  }

  Parallel& parallel = kernel.runtime().parallel;
  if (cut.workers == 1)
    run.work(0);
  else
    parallel.run(
        static_cast<std::size_t>(cut.workers),
        [](void* context, std::size_t worker) { static_cast<Run*>(context)->work(worker); }, &run);
  if (run.out_of_memory)
    return no_memory();
  if (cut.stats) {
    std::array<float, kMaxHeadSize> sums;
    for (std::int64_t head = 0; head < cut.heads; ++head)
      for (std::int64_t row = 0; row < cut.rows; ++row)
        run.merge_row(head, row, sums.data());
  }
  return {};
}

Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args) {
  if (Status s = check_sizes(kernel, args); !s)
    return s;
  const DefaultFloatingPoint scope; // sizes are cut as in the call
  const Cut cut = cut_call(kernel, args);
  return static_cast<std::uint64_t>(cut.all_bytes());
}

void reference(const KernelDesc& desc, const Args& args, double* o, double* lse) {
  const std::int64_t d = desc.value[kD], dv = desc.value[kDv], group = args.hkv == 0 ? 1 : args.hq / args.hkv;
  for (std::int64_t batch = 0; batch < args.b; ++batch) {
    const std::int64_t keys = args.kv_len == nullptr ? args.n : args.kv_len[batch];
    const Visible visible = visible_of(desc, args.m, keys);
    for (std::int64_t head = 0; head < args.hq; ++head)
      for (std::int64_t m = 0; m < args.m; ++m) {
        const double row_lse = reference_row(
            args.q + batch * args.q_strides.batch + head * args.q_strides.head + m * args.q_strides.row,
            head_of_keys(args, args.k, args.k_strides, batch, head / group), args.k_strides.row,
            head_of_keys(args, args.v, args.v_strides, batch, head / group), args.v_strides.row,
            std::clamp<std::int64_t>(visible.first + m * visible.step, 0, keys), d, dv, double{scale_of(args, d)}, o);
        o += dv;
        if (lse != nullptr)
          *lse++ = row_lse;
      }
  }
}

} // namespace kiln::attention
