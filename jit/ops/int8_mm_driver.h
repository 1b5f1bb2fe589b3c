#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "cache/status.h"
#include "jit/cuda/driver.h"
#include "jit/kernel.h"
#include "jit/ops/int8_mm.h"
#include "jit/ops/int8_mm_epilogue.h"

/// int8_mm's driver: packs weights, checks a call, and cuts it into ranges for a CPU kernel or puts it on a stream.
namespace kiln::int8_mm {

/// B rearranged once. Immutable; one pack serves every m of its (n, k).
class Pack {
public:
  /// Packs B, of b_dtype, on the caller's threads (`parallel`). Code::out_of_memory when it does not fit.
  static Result<Pack> make(PackLayout layout, const void* b, std::int64_t ldb, BLayout b_layout, std::int64_t n,
                           std::int64_t k, Parallel& parallel, BDtype b_dtype = BDtype::s8);
  /// The same pack in memory of a GPU, there when it returns. Code::unsupported, Code::out_of_memory.
  Status move_to(Device device, Runtime& runtime);
  /// See jit/pack_file.h.
  Status save(const std::string& path) const;
  /// Code::io, Code::integrity (a damaged file, another format).
  static Result<Pack> load(const std::string& path);

  PackLayout layout() const { return layout_; }
  BDtype b_dtype() const { return b_dtype_; } ///< of the elements as they were given
  std::string id() const;                     ///< `n16k4`, `n16k4/u8`
  std::int64_t n() const { return n_; }
  std::int64_t k() const { return k_; }
  std::int64_t bytes() const { return layout_.bytes(n_, k_); }
  Device device() const { return device_; }
  const std::int8_t* panels() const { return data_.get(); } ///< in host memory, as sums()
  const std::int32_t* sums() const { return sums_; }
  std::uint64_t gpu_address() const { return gpu_.address(); } ///< of the panels

private:
  struct Free {
    void operator()(std::int8_t* p) const;
  };
  static Result<Pack> allocate(PackLayout layout, BDtype b_dtype, std::int64_t n, std::int64_t k);
  PackLayout layout_;
  BDtype b_dtype_ = BDtype::s8;
  std::int64_t n_ = 0, k_ = 0;
  Device device_;
  cuda::Buffer gpu_;
  std::int32_t* sums_ = nullptr;              ///< into data_
  std::unique_ptr<std::int8_t[], Free> data_; ///< 64-byte aligned; on huge pages where the system has them
};

struct Args {
  std::int64_t m = 0;
  const void* a = nullptr; ///< of a_dtype
  std::int64_t lda = 0;
  const Pack* pack = nullptr; ///< or
  const void* b = nullptr;    ///< a raw B of b_dtype, packed piece by piece into workspace
  std::int64_t ldb = 0;
  BLayout b_layout = BLayout::nk;
  void* c = nullptr; ///< of c_dtype
  std::int64_t ldc = 0;
  EpilogueValues values;     ///< on a GPU in its memory
  int threads = 0;           ///< CPU: 0: the engine's
  void* stream = nullptr;    ///< GPU: CUstream
  void* workspace = nullptr; ///< null: the threads' own scratch; on a GPU memory of the stream's own
  std::uint64_t workspace_bytes = 0;
};

/// C = A · B and the epilogue by this kernel. Checks every argument first; writes nothing when it returns an error. On
/// a GPU the product is on the stream when it returns.
Status run(const Kernel& kernel, const Args& args);
/// What run() would use of Args::workspace.
Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args);

} // namespace kiln::int8_mm
