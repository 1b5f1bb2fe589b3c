#include <algorithm>
#include <charconv>
#include <limits>

#include "jit/op.h"
#include "jit/ops/attention.h"
#include "jit/ops/fp8_block_bmm.h"
#include "jit/ops/int4_mm.h"
#include "jit/ops/int8_linear.h"
#include "jit/ops/int8_mm.h"
#include "tests/fuzz/fuzz.h"

/// Launch plans of every op: its name, then `name=value` lines.
namespace kiln::fuzz {
namespace {

using Values = std::vector<std::pair<std::string, std::int64_t>>;

std::string_view next_line(std::string_view& text) {
  const std::string_view line = text.substr(0, text.find('\n'));
  text.remove_prefix(std::min(line.size() + 1, text.size()));
  return line;
}

Values values_of(std::string_view text) {
  Values values;
  while (!text.empty()) {
    const std::string_view line = next_line(text);
    const std::size_t equals = std::min(line.find('='), line.size());
    std::int64_t value = 0;
    std::from_chars(line.data() + std::min(equals + 1, line.size()), line.data() + line.size(), value);
    values.emplace_back(line.substr(0, equals), value);
  }
  return values;
}

constexpr std::int64_t kMostRows = std::numeric_limits<std::int32_t>::max(); ///< of a call

void check(const cuda::LaunchPlan& plan) {
  for (const std::int64_t m : {std::int64_t{1}, kMostRows}) {
    expect(plan.threads > 0 && plan.tile_n > 0 && plan.tile_m > 0, "blocks do something");
    const cuda::LaunchPlan::Grid grid = plan.grid(m, kMostRows, 132, 1);
    expect(grid.x > 0 && grid.y > 0 && grid.z > 0, "a grid has blocks");
  }
}

void check(const int8_mm::Plan& plan) {
  expect(plan.layout.n_block > 0 && plan.n_step % plan.layout.n_block == 0, "a step is whole panels");
  expect(int8_mm::PackLayout::parse(plan.layout.id()).is_ok(), "the layout has a name");
  // The largest m, with what a driver may round up: this may not overflow.
  expect(plan.workspace_bytes((std::int64_t{1} << 31) + plan.m_step) >= 0, "a workspace has a size");
}

void check(const int8_linear::Plan& plan) {
  expect(plan.layout.n_block > 0 && plan.n_step % plan.layout.n_block == 0, "a step is whole panels");
  expect(int8_mm::PackLayout::parse(plan.layout.id()).is_ok(), "the layout has a name");
  const std::int64_t rows = kMostRows + plan.m_step;
  expect(plan.q_row_bytes * rows + plan.q_end_bytes >= 0, "the quantised rows have a size");
  expect(plan.workspace_bytes + plan.workspace_per_row * rows >= 0, "a workspace has a size");
}

void check(const int4_mm::Plan& plan) {
  expect(plan.layout != nullptr, "a plan has a layout");
  if (plan.launch)
    check(*plan.launch);
}

void check(const fp8_block_bmm::Plan& plan) {
  if (!plan.gpu)
    return;
  check(plan.gpu->launch);
  for (const cuda::TensorBox& box : {plan.gpu->boxes.x, plan.gpu->boxes.y, plan.gpu->boxes.z})
    expect((box.inner > 0) == (box.rows > 0) && box.inner <= 256 && box.rows <= 256, "a box is one that a map takes");
}

void check(const attention::Plan& plan) {
  expect(plan.block_rows > 0 && plan.workspace_bytes >= 0, "a block has rows, a workspace a size");
}

template <class Plan> bool accepts_as(const OpSpec& op, const Values& values) {
  const Result<Plan> plan = Plan::from(values);
  expect(op.bind_plan(values).is_ok() == plan.is_ok(), "the op takes the same plans");
  if (!plan) {
    expect_refusal(plan.status(), Code::integrity);
    return false;
  }
  for (const auto& value : plan->values())
    expect(std::count(values.begin(), values.end(), value) >= 1, "a plan is made of the values given");
  const Result<Plan> again = Plan::from(plan->values());
  expect(again && again->values() == plan->values(), "a plan is that of its values");
  check(*plan);
  return true;
}

bool accepts(ByteSpan input) {
  std::string_view text = text_of(input);
  const OpSpec* const op = find_op(next_line(text));
  if (op == nullptr)
    return false;
  const Values values = values_of(text);
  switch (op->id) {
  case OpId::int8_mm:
    return accepts_as<int8_mm::Plan>(*op, values);
  case OpId::int8_linear:
    return accepts_as<int8_linear::Plan>(*op, values);
  case OpId::int4_mm:
    return accepts_as<int4_mm::Plan>(*op, values);
  case OpId::fp8_block_bmm:
    return accepts_as<fp8_block_bmm::Plan>(*op, values);
  case OpId::attention:
    return accepts_as<attention::Plan>(*op, values);
  }
  return false;
}

std::string text_of(std::string_view op, const Values& values) {
  std::string text(op);
  text += '\n';
  for (const auto& [name, value] : values)
    text += name + "=" + std::to_string(value) + "\n";
  return text;
}

std::vector<Seed> seeds() {
  std::vector<Seed> all = {
      accepted("int8_mm\nn_block=16\nk_block=4\nm_step=6\nn_step=32\nworkspace_fixed=64\nworkspace_per_row=4096\n"),
      accepted("int8_mm\nn_block=256\nk_block=64\nm_step=65536\nn_step=65536\nworkspace_fixed=1099511627776\n"
               "workspace_per_row=4293918720\nother=1\n"),
      refused(
          "int8_mm\nn_block=16\nk_block=4\nm_step=6\nn_step=32\nworkspace_fixed=64\nworkspace_per_row=8589934592\n"),
      refused("int8_mm\nn_block=16\nn_block=16\nm_step=6\nn_step=32\nworkspace_fixed=64\nworkspace_per_row=4096\n"),
      refused("int8_mm\nn_block=16\nk_block=4\nm_step=6\nn_step=24\nworkspace_fixed=0\nworkspace_per_row=-1\n"),
      refused("int9_mm\n"),
      accepted("fp8_block_bmm\n"), // on a CPU
      accepted("int4_mm\nlayout=1\n"),
      refused("int4_mm\nlayout=99\n"),
      refused("int4_mm\nlayout=1\nthreads=1\n"),
      accepted("attention\nblock_rows=16\nworkspace_bytes=65536\nmakes_partials=1\n"),
      refused("attention\nblock_rows=0\nworkspace_bytes=65536\nmakes_partials=1\n"),
      refused("attention\nblock_rows=16\nworkspace_bytes=65536\nmakes_partials=2\n")};
  int8_linear::Plan linear;
  linear.q_row_bytes = 128;
  all.push_back(accepted(text_of("int8_linear", linear.values())));
  linear.workspace_per_row = -1;
  all.push_back(refused(text_of("int8_linear", linear.values())));
  cuda::LaunchPlan launch;
  launch.threads = 128;
  Values int4 = {{"layout", 1}};
  launch.append_to(int4);
  all.push_back(accepted(text_of("int4_mm", int4)));
  fp8_block_bmm::Plan bmm{.gpu = fp8_block_bmm::Plan::Gpu{.launch = launch, .boxes = {}}};
  all.push_back(accepted(text_of("fp8_block_bmm", bmm.values())));
  bmm.gpu->boxes.x = {.inner = 128, .rows = 64, .swizzle = 128};
  all.push_back(accepted(text_of("fp8_block_bmm", bmm.values())));
  bmm.gpu->boxes.x.swizzle = 48;
  all.push_back(refused(text_of("fp8_block_bmm", bmm.values())));
  return all;
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
