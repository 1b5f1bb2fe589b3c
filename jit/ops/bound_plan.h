#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "cache/status.h"

namespace kiln {

/// OpSpec::bind_plan of an op whose `Plan` is read by `Plan::from`.
template <class Plan>
Result<std::shared_ptr<const void>> bound_plan(std::span<const std::pair<std::string, std::int64_t>> values) {
  Result<Plan> plan = Plan::from(values);
  if (!plan)
    return plan.status();
  return std::shared_ptr<const void>(std::make_shared<const Plan>(std::move(*plan)));
}

} // namespace kiln
