#include "jit/cuda/launch_plan.h"

#include <algorithm>
#include <limits>

#include <fmt/format.h>

namespace kiln::cuda {
namespace {

constexpr std::int64_t kMaxInt32 = std::numeric_limits<std::int32_t>::max();
/// The same for every SM that Kiln serves (CUDA C++ Programming Guide, technical specifications per compute
/// capability).
constexpr std::int64_t kMaxThreads = 1024, kMaxClusterX = 16;
/// Then workspace_bytes of any call stays within an int64.
constexpr std::int64_t kMaxWorkspace = std::int64_t{1} << 30;

struct Value {
  std::string_view name;
  std::int64_t min, max;
  std::int64_t (*get)(const LaunchPlan&);
  void (*set)(LaunchPlan&, std::int64_t);
};
#define KILN_PLAN_VALUE(field, min, max)                                                                               \
  {                                                                                                                    \
#field, min, max,                                                                                                  \
        [](const LaunchPlan&                                                                                           \
               p) { return std::int64_t{p.field}; },                                                                   \
                                                  [](LaunchPlan & p,                                                   \
                                                     std::int64_t v) { p.field = static_cast<decltype(p.field)>(v); }  \
  }
constexpr Value kValues[] = {
    KILN_PLAN_VALUE(tile_m, 1, 1 << 16),
    KILN_PLAN_VALUE(tile_n, 1, 1 << 16),
    KILN_PLAN_VALUE(split_k, 1, 1 << 10),
    KILN_PLAN_VALUE(threads, 1, kMaxThreads),
    KILN_PLAN_VALUE(smem_bytes, 0, 1 << 20),
    KILN_PLAN_VALUE(cluster_x, 0, kMaxClusterX),
    KILN_PLAN_VALUE(grid_n, 0, kMaxInt32),
    KILN_PLAN_VALUE(blocks_per_sm, 0, 64),
    KILN_PLAN_VALUE(workspace_fixed, 0, kMaxWorkspace),
    KILN_PLAN_VALUE(workspace_per_row, 0, kMaxWorkspace),
    KILN_PLAN_VALUE(workspace_per_block, 0, kMaxWorkspace),
    KILN_PLAN_VALUE(workspace_zeroed, 0, kMaxWorkspace),
    KILN_PLAN_VALUE(reduce_threads, 0, kMaxThreads),
    KILN_PLAN_VALUE(reduce_tile_m, 1, 1 << 16),
    KILN_PLAN_VALUE(reduce_tile_n, 1, 1 << 16),
};
#undef KILN_PLAN_VALUE

std::int64_t parts(std::int64_t size, std::int64_t step) {
  return (size + step - 1) / step;
}

std::uint32_t dimension(std::int64_t value) {
  return static_cast<std::uint32_t>(value);
}

} // namespace

LaunchPlan::Grid LaunchPlan::grid(std::int64_t m, std::int64_t n, int sm_count, std::int64_t batches) const {
  Grid grid;
  const std::int64_t cluster = std::max<std::int64_t>(cluster_x, 1);
  std::int64_t x = grid_n > 0 ? grid_n : parts(n, tile_n);
  if (blocks_per_sm > 0) {
    const std::int64_t room = std::max(std::int64_t{blocks_per_sm} * sm_count / cluster * cluster, cluster);
    const double tiles = static_cast<double>(parts(n, tile_n)) * static_cast<double>(parts(m, tile_m)) *
                         static_cast<double>(batches) * split_k; // more than an int64 holds, of absurd sizes
    x = tiles < static_cast<double>(room) ? static_cast<std::int64_t>(tiles) : room;
  } else {
    grid.y = dimension(parts(m, tile_m));
    grid.z = dimension(batches * split_k);
  }
  grid.x = dimension(parts(x, cluster) * cluster);
  return grid;
}

std::int64_t LaunchPlan::most_rows(std::int64_t n) const {
  constexpr std::int64_t kMaxGridY =
      65535; // CUDA C++ Programming Guide, technical specifications per compute capability
  const std::int64_t tiles =
      blocks_per_sm > 0 ? std::max<std::int64_t>(kMaxInt32 / split_k / std::max<std::int64_t>(parts(n, tile_n), 1), 1)
                        : kMaxGridY;
  return tiles * tile_m;
}

LaunchPlan::Grid LaunchPlan::reduce_grid(std::int64_t m, std::int64_t n) const {
  return {dimension(parts(n, reduce_tile_n)), dimension(parts(m, reduce_tile_m)), 1};
}

std::int64_t LaunchPlan::workspace_bytes(std::int64_t m, std::int64_t n, int sm_count, std::int64_t batches) const {
  std::int64_t bytes = workspace_fixed + workspace_per_row * parts(m, tile_m) * tile_m;
  if (workspace_per_block > 0) {
    const Grid g = grid(m, n, sm_count, batches);
    bytes += workspace_per_block * g.x * g.y * g.z;
  }
  return parts(std::max(bytes, workspace_zeroed), 256) * 256;
}

void LaunchPlan::append_to(PlanValues& values) const {
  for (const Value& value : kValues)
    values.emplace_back(value.name, value.get(*this));
}

Result<LaunchPlan> LaunchPlan::from(std::span<const std::pair<std::string, std::int64_t>> values) {
  LaunchPlan plan;
  for (const Value& value : kValues) {
    const auto is_it = [&](const auto& given) { return given.first == value.name; };
    const auto found = std::find_if(values.begin(), values.end(), is_it);
    if (found == values.end() || std::count_if(values.begin(), values.end(), is_it) != 1 || found->second < value.min ||
        found->second > value.max)
      return Status::error(Code::integrity, fmt::format("a launch plan where {} is missing, repeated or not {} to {}",
                                                        value.name, value.min, value.max));
    value.set(plan, found->second);
  }
  return plan;
}

} // namespace kiln::cuda
