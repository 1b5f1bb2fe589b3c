#pragma once
#include <doctest/doctest.h>

#include <optional>
#include <span>
#include <vector>

#include "backends/table.h"
#include "jit/op.h"
#if defined(__aarch64__) && defined(__linux__)
#include "jit/target.h"
#include "tests/emulator.h"
#include "tests/smopa_shim.h"
#endif

namespace kiln::test {

/// The rows of the implementation table; under an emulator that computes SMOPA wrongly, the row `sme` of `op` (which
/// has the fields n and k) comes with products that SmopaShim carries out. One lives in each test case that walks them,
/// as doctest takes SIGILL for itself before each.
template <OpId op> class TableRows {
public:
  TableRows() {
#if defined(__aarch64__) && defined(__linux__)
    if (!is_emulated() || !detect_machine().target.features.has(Feature::sme))
      return;
    shim_.emplace();
    rows_.assign(implementation_table().begin(), implementation_table().end());
    for (Implementation& row : rows_)
      if (row.op == op && row.isa == IsaPath::sme) {
        compile_ = row.compile;
        row.compile = [](const KernelDesc& desc, const Target& target, std::string_view layout) {
          Result<CodeObject> code = compile_(desc, target, layout);
          if (code)
            CHECK(((SmopaShim::rewrite(*code) > 0) == (field(desc, "k") > 0) || field(desc, "n") == 0));
          return code;
        };
      }
#endif
  }
  std::span<const Implementation> all() const {
    return rows_.empty() ? implementation_table() : rows_;
  }
  /// Some µs a product.
  bool compute_slowly() const {
    return !rows_.empty();
  }

private:
#if defined(__aarch64__) && defined(__linux__)
  static std::int64_t field(const KernelDesc& desc, std::string_view name) {
    return desc.value[find_field(*find_op(op), name)];
  }
  static inline decltype(Implementation::compile) compile_;
  std::optional<SmopaShim> shim_;
#endif
  std::vector<Implementation> rows_;
};

} // namespace kiln::test
