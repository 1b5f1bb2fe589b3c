#pragma once
#include <cstddef>
#include <cstdint>

#include "backends/x86/emit.h"
#include "backends/x86/int8_mm_nest.h"
#include "jit/implementation.h"
#include "jit/ops/int8_linear.h"

/// What int8_linear adds to a kernel of int8_mm: the rows of X quantised in front of the nest, and the results made of
/// its sums.
///
/// A row in the workspace is what the nest's K loop reads, and at its end (NestShape::row_zp_at) the row's s: NaN where
/// the row is to become NaN, whatever its elements are then.
namespace kiln::x86 {

/// How the K loop reads a quantised row.
struct QuantisedRows {
  enum class Form : std::uint8_t {
    u8, ///< q + 128
    s16,
    s8 ///< with `tail_zeros` zeros before the last k mod 64 elements, and zeros behind them to the end of their line
  } form;
  int8_linear::Float x; ///< what comes in
  std::int64_t k;
  std::int64_t row_stride; ///< bytes
  int tail_zeros = 0;
};

/// Emits the head of a kernel's entry: quantises when the call asks for it, and returns unless it asks for the
/// multiplication too. rdi keeps the Call; changes only what System V lets a callee change. For u8 and s8 rows.
void emit_quantiser_512(Assembler& a, const QuantisedRows& rows);
/// The same with 256-bit vectors, for u8 and s16 rows: AVX2, F16C for f16.
void emit_quantiser_256(Assembler& a, const QuantisedRows& rows);

/// The hooks of a path of int8_mm whose rows are there already. `Path` has an EpilogueEmitter of int8_linear's desc.
template <class Path> class LinearPath : public Path {
public:
  using Path::Path;
  void convert_rows() {
    this->a_.mov(asmjit::x86::rsi, asmjit::x86::ptr(asmjit::x86::rdi, offsetof(int8_linear::Call, workspace)));
    this->emitter_->prepare_shared(asmjit::x86::rdi, asmjit::x86::rsi);
  }
};

/// Makes the shape of an int8_mm that of an int8_linear with such an emitter and `scratch_bytes`.
void add_linear(NestShape& shape, const KernelDesc& desc, int scratch_bytes);
/// And its plan.
int8_linear::Plan linear_plan(const NestShape& shape, QuantisedRows::Form form);

/// A row of the implementation table, but for what differs between the nest's paths.
Implementation linear_row(IsaPath isa, Features needs, Features (*uses)(const KernelDesc&, const Target&),
                          std::string (*pack_layout)(const KernelDesc&, const Target&),
                          Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view));

} // namespace kiln::x86
