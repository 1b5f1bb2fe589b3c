#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "cache/status.h"
#include "jit/cuda/driver.h"
#include "jit/kernel.h"
#include "jit/ops/int4_mm.h"

/// int4_mm's driver: packs weights, checks a call, and puts it on a stream or on the CPU's threads.
namespace kiln::int4_mm {

/// Weights as they come, in host memory or in that of the GPU for which they are packed.
struct Weights {
  const void* w = nullptr;        ///< in one of the two forms
  const void* sz = nullptr;       ///< bf16 bits [K/group][N][2]
  std::int64_t inner_k_tiles = 0; ///< 0: uint8 [N][K/2], else T of the tensor-core layout
  DeviceKind place = DeviceKind::cpu;
  void* stream = nullptr; ///< CUstream whose work comes before they are read; for weights on a GPU
};

/// Weights rearranged once, in host memory or in that of a GPU. Immutable; one pack serves every m of its (n, k,
/// group).
class Pack {
public:
  /// For a desc of device cpu or cuda. Weights on a GPU take the way through the host: once for each model. Returns
  /// when the pack is there. Code::invalid_argument names what is wrong with the weights; Code::out_of_memory.
  static Result<Pack> make(const PackLayout& layout, const Weights& weights, const KernelDesc& desc, Runtime& runtime);
  Status save(const std::string& path) const;
  /// For this device. Code::io, Code::integrity (a damaged file, another format).
  static Result<Pack> load(const std::string& path, Device device, Runtime& runtime);

  const PackLayout& layout() const { return *layout_; }
  std::string layout_text() const; ///< `plain/g128`: with the group
  std::int64_t n() const { return n_; }
  std::int64_t k() const { return k_; }
  std::int64_t group() const { return group_; }
  Device device() const { return device_; }
  std::int64_t bytes() const { return layout_->bytes(n_, k_, group_); }
  /// Of the weights, and of the scales and zeros: host or device addresses.
  std::uint64_t w_address() const;
  std::uint64_t sz_address() const { return w_address() + static_cast<std::uint64_t>(layout_->sz_offset(n_, k_)); }

private:
  Pack(const PackLayout& layout, std::int64_t n, std::int64_t k, std::int64_t group, Device device)
      : layout_(&layout), n_(n), k_(k), group_(group), device_(device) {}
  Status allocate_host();
  Status move_to_device(Runtime& runtime);
  struct Free {
    void operator()(std::uint8_t* p) const;
  };
  const PackLayout* layout_;
  std::int64_t n_, k_, group_;
  Device device_;
  std::unique_ptr<std::uint8_t[], Free> host_;
  cuda::Buffer gpu_;
};

struct Args {
  std::int64_t m = 0;
  const std::uint16_t* x = nullptr; ///< bf16 bits [m][ldx]
  std::int64_t ldx = 0;
  const Pack* pack = nullptr;
  std::uint16_t* y = nullptr; ///< [m][ldy]
  std::int64_t ldy = 0;
  int threads = 0;           ///< CPU: 0: the engine's
  void* stream = nullptr;    ///< GPU: CUstream
  void* workspace = nullptr; ///< GPU: device memory, 256-byte aligned; null: of Kiln's own
  std::uint64_t workspace_bytes = 0;
};

/// Y = X · dequant(W). Checks every argument first; writes nothing when it returns an error. On a GPU the product is on
/// the stream when it returns.
Status run(const Kernel& kernel, const Args& args);
/// What run() would use of Args::workspace; 0 for a CPU kernel.
Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args);

} // namespace kiln::int4_mm
