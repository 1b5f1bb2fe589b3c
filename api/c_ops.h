#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <string_view>

#include <fmt/format.h>

#include "api/kiln.h"
#include "cache/status.h"
#include "jit/desc.h"
#include "jit/engine.h"
#include "jit/kernel.h"
#include "jit/op.h"

namespace kiln {

/// Packed weights of some op, behind kiln_pack.
class AnyPack {
public:
  virtual ~AnyPack() = default;
  virtual OpId op() const = 0;
  virtual Status save(const std::string& path) const = 0;
  struct Info {
    const char* op;
    const char* layout;
    std::int64_t n, k;
    std::uint64_t bytes;
  };
  virtual Info info() const = 0; ///< its strings live as long as the pack
};

/// How the C structs of one op turn into the op's own types: one row an op, in c_ops_table().
struct COp {
  OpId op;
  Status (*desc)(const kiln_desc* given, KernelDesc& out);
  Status (*run)(const Kernel& kernel, const kiln_args* args);
  Result<std::uint64_t> (*workspace_bytes)(const Kernel& kernel, const kiln_args* args);
  Result<std::unique_ptr<AnyPack>> (*pack)(Engine& engine, const KernelDesc& desc, const void* b, std::int64_t ldb);
  Result<std::unique_ptr<AnyPack>> (*load_pack)(Engine& engine, const KernelDesc& desc, const std::string& path);
};

/// COp::run or COp::workspace_bytes of an op: what `use` makes of the arguments that `read` takes from C.
template <class Args, Status (*read)(const kiln_args*, Args&), auto use>
auto with_args(const Kernel& kernel, const kiln_args* given) -> decltype(use(kernel, Args())) {
  Args args;
  if (Status s = read(given, args); !s)
    return s;
  return use(kernel, args);
}

/// The packed weights of another op are Code::invalid_argument.
inline Status check_pack_op(const AnyPack& pack, OpId op, std::string_view name) {
  return pack.op() == op
             ? Status()
             : Status::error(Code::invalid_argument, fmt::format("{} is a pack for {}: allowed is one for {}", name,
                                                                 find_op(pack.op())->name, find_op(op)->name));
}

/// Null for an op that this version does not serve.
const COp* find_c_op(std::int32_t op);

} // namespace kiln

/// Behind the C handle: the op's row reads the pack it made.
struct kiln_pack {
  explicit kiln_pack(std::unique_ptr<kiln::AnyPack> p) : pack(std::move(p)) {}
  std::unique_ptr<kiln::AnyPack> pack;
  std::atomic<std::int64_t> references{1};
};
