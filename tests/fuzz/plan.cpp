#include <algorithm>
#include <charconv>

#include "jit/ops/int8_mm.h"
#include "tests/fuzz/fuzz.h"

/// Launch plans, given as `name=value` lines.
namespace kiln::fuzz {
namespace {

using Values = std::vector<std::pair<std::string, std::int64_t>>;

Values values_of(std::string_view text) {
  Values values;
  while (!text.empty()) {
    const std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    const std::size_t equals = std::min(line.find('='), line.size());
    std::int64_t value = 0;
    std::from_chars(line.data() + std::min(equals + 1, line.size()), line.data() + line.size(), value);
    values.emplace_back(line.substr(0, equals), value);
  }
  return values;
}

bool accepts(ByteSpan input) {
  const Values values = values_of(text_of(input));
  const auto plan = int8_mm::Plan::from(values);
  expect(int8_mm::op().bind_plan(values).is_ok() == plan.is_ok(), "the op takes the same plans");
  if (!plan) {
    expect_refusal(plan.status(), Code::integrity);
    return false;
  }
  for (const auto& value : plan->values())
    expect(std::count(values.begin(), values.end(), value) == 1, "a plan is made of the values given");
  const auto again = int8_mm::Plan::from(plan->values());
  expect(again && again->values() == plan->values(), "a plan is that of its values");
  expect(plan->layout.n_block > 0 && plan->n_step % plan->layout.n_block == 0, "a step is whole panels");
  expect(int8_mm::PackLayout::parse(plan->layout.id()).is_ok(), "the layout has a name");
  // The largest m, with what a driver may round up: this may not overflow.
  expect(plan->workspace_bytes((std::int64_t{1} << 31) + plan->m_step) >= 0, "a workspace has a size");
  return true;
}

std::vector<Seed> seeds() {
  return {accepted("n_block=16\nk_block=4\nm_step=6\nn_step=32\nworkspace_fixed=64\nworkspace_per_row=4096\n"),
          accepted("n_block=256\nk_block=64\nm_step=65536\nn_step=65536\nworkspace_fixed=1099511627776\n"
                   "workspace_per_row=4293918720\nother=1\n"),
          refused("n_block=16\nk_block=4\nm_step=6\nn_step=32\nworkspace_fixed=64\nworkspace_per_row=8589934592\n"),
          refused("n_block=16\nn_block=16\nm_step=6\nn_step=32\nworkspace_fixed=64\nworkspace_per_row=4096\n"),
          refused("n_block=16\nk_block=4\nm_step=6\nn_step=24\nworkspace_fixed=0\nworkspace_per_row=-1\n")};
}

} // namespace
const Target target = {accepts, seeds};
} // namespace kiln::fuzz
