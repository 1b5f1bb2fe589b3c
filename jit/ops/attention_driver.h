#pragma once
#include <array>
#include <cstdint>
#include <optional>

#include "cache/status.h"
#include "jit/kernel.h"
#include "jit/ops/attention.h"

/// attention's driver: checks a call and cuts it into ranges for the kernel.
namespace kiln::attention {

/// Strides in elements of a tensor [batch][head][row][column]. The innermost must be 1, the others are any: an input's
/// rows may overlap, repeat (0) and run backwards (below 0), an output's lie apart. One whose extent is 1 means
/// nothing.
struct Strides {
  std::int64_t batch = 0, head = 0, row = 0, column = 1;

  /// Of a contiguous [B][heads][rows][columns].
  static Strides contiguous(std::int64_t heads, std::int64_t rows, std::int64_t columns) {
    return {heads * rows * columns, rows * columns, columns, 1};
  }
};

/// One call: D, Dv, Hq / Hkv, causal and lse are the kernel's; the sizes here are run-time values.
struct Args {
  std::int64_t b = 0, hq = 0, hkv = 0, m = 0, n = 0;
  const std::uint16_t* q = nullptr; ///< bf16 bits [B,Hq,M,D]
  Strides q_strides;
  const std::uint16_t* k = nullptr; ///< [B,Hkv,N,D]
  Strides k_strides;
  const std::uint16_t* v = nullptr; ///< [B,Hkv,N,Dv]
  Strides v_strides;
  std::uint16_t* o = nullptr; ///< [B,Hq,M,Dv]; rows do not overlap, and lie apart from every input
  Strides o_strides;
  float* lse = nullptr;                 ///< f32 [B,Hq,M], contiguous; required exactly when the desc has lse=1
  const std::int32_t* kv_len = nullptr; ///< null (all n keys), or s32 [B] of 0 to n
  std::optional<float> scale;           ///< 1/√D when absent; finite, 0 or more
  int threads = 0;                      ///< 0: the engine's
  void* workspace = nullptr;            ///< null: the threads' own scratch
  std::uint64_t workspace_bytes = 0;
};

/// O and lse by this kernel. Checks every argument first; writes nothing when it returns an error.
Status run(const Kernel& kernel, const Args& args);
/// What run() would use of Args::workspace, whatever kv_len holds.
Result<std::uint64_t> workspace_bytes(const Kernel& kernel, const Args& args);

/// The op by definition, in float64 (reference_row for each): `o` f64 [B,Hq,M,Dv] and, unless null, `lse` f64 [B,Hq,M],
/// both contiguous. `desc` gives D, Dv and causal; of `args` the outputs, threads and workspace are ignored.
void reference(const KernelDesc& desc, const Args& args, double* o, double* lse);

} // namespace kiln::attention
