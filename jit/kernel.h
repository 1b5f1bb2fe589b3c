#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "cache/digest.h"
#include "cache/status.h"
#include "cache/table.h"
#include "jit/code_object.h"
#include "jit/desc.h"
#include "jit/executable_memory.h"
#include "jit/implementation.h"
#include "jit/loadable_code.h"
#include "jit/op.h"
#include "jit/parallel.h"
#include "jit/target.h"

namespace kiln {

namespace cuda {
class Driver;
class Module;
} // namespace cuda

/// Where a kernel came from when it was loaded.
enum class Source : std::uint8_t { memory, disk, compiled, builtin, remote };
std::string_view name_of(Source source);

/// What every kernel of an engine runs with; outlives them all.
struct Runtime {
  Machine machine;
  ExecutableMemory memory;
  Parallel parallel;
  std::string cuda_library; ///< what Driver::open is given

  /// `for_perf_map`: see ExecutableMemory. A null `host_function` means a pool of Kiln's own.
  Runtime(Machine m, bool for_perf_map, int threads, ParallelForFn host_function, void* host, std::string cuda);

  /// The NVIDIA driver, opened by the first call that succeeds.
  Result<cuda::Driver*> cuda() const;
};

/// Loaded and executable; immutable, safe to run from many threads. Movable so that a table can hold it.
class Kernel {
public:
  /// Code::unsupported when the machine lacks what the code needs, or it is PTX that nobody has assembled. A cubin is
  /// for its driver to judge.
  static Status check_machine(const Target& target, const Implementation& implementation, const KernelDesc& canonical,
                              const CodeObject& code);
  /// Loads code into executable memory, or a cubin into the driver. Fails with Code::unsupported when the machine lacks
  /// a feature that the code needs or refuses executable mappings, or the driver refuses the cubin; Code::integrity when
  /// its plan is not the op's.
  static Result<Kernel> load(Runtime& runtime, const Implementation& implementation, const KernelDesc& canonical,
                             const Digest& key, LoadableCode loadable);
  /// `reference`: a function of this library, for packs of `pack_layout`.
  static Result<Kernel> builtin(Runtime& runtime, const Implementation& implementation, const KernelDesc& canonical,
                                std::string_view pack_layout);

  Kernel(Kernel&& other) noexcept;
  Kernel& operator=(Kernel&&) = delete;
  ~Kernel();

  const OpSpec& op() const { return *op_; }
  const Implementation& implementation() const { return *implementation_; }
  const KernelDesc& desc() const { return desc_; } ///< canonical
  MRange m_range() const { return m_range_; }
  const Digest& key() const { return key_; }
  /// The code object without its image: that is text().
  const CodeObject& code() const { return code_; }
  ByteSpan text() const { return {text_, text_ == nullptr ? 0 : code_bytes_}; } ///< executable; empty for `reference`
  const void* entry() const { return entry_; }
  cuda::Module* cuda_module() const { return module_; } ///< of a GPU kernel, which has neither text nor entry
  std::size_t code_bytes() const { return code_bytes_; }
  const void* plan() const { return plan_.get(); } ///< the op's own type
  /// For the reader; they live as long as the kernel.
  struct Texts {
    std::string desc, features, key, pack_layout;
  };
  const Texts& texts() const { return texts_; }
  Runtime& runtime() const { return *runtime_; } ///< of its engine

  Source source = Source::compiled; ///< disk, compiled, builtin or remote
  std::int64_t compile_us = 0;      ///< of the process that compiled it
  std::int64_t load_us = 0;

private:
  Kernel() = default;
  Status bind(Runtime& runtime, const Implementation& implementation, const KernelDesc& canonical, CodeObject code);
  Runtime* runtime_ = nullptr;
  const OpSpec* op_ = nullptr;
  const Implementation* implementation_ = nullptr;
  KernelDesc desc_;
  MRange m_range_;
  Digest key_;
  CodeObject code_;
  const std::uint8_t* text_ = nullptr;
  std::size_t code_bytes_ = 0;
  cuda::Module* module_ = nullptr; ///< the driver's: never unloaded
  const void* entry_ = nullptr;
  std::shared_ptr<const void> plan_;
  Texts texts_;
};

using KernelTable = SharedTable<KernelDesc, Kernel>;
using KernelNode = KernelTable::Node;

/// A counted reference to a kernel; the kernel lives at least as long, also after its engine.
class KernelRef {
public:
  /// Takes over one reference.
  explicit KernelRef(KernelNode* node) : node_(node) {}
  KernelRef(KernelRef&& other) noexcept : node_(std::exchange(other.node_, nullptr)) {}
  KernelRef& operator=(KernelRef&& other) noexcept {
    std::swap(node_, other.node_);
    return *this;
  }
  ~KernelRef() {
    if (node_ != nullptr)
      KernelTable::release(node_);
  }
  const Kernel& operator*() const { return node_->value(); }
  const Kernel* operator->() const { return &node_->value(); }
  /// Gives the reference up to the caller, who must KernelTable::release() it.
  KernelNode* detach() { return std::exchange(node_, nullptr); }

private:
  KernelNode* node_;
};

} // namespace kiln
