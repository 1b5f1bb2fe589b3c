#include "backends/arm/int8_mm_sve.h"

#include <utility>

#include <fmt/format.h>

#include "backends/arm/int8_linear.h"
#include "backends/arm/int8_mm_scalar.h"

namespace kiln::arm {

using asmjit::a64::Gp;

namespace {

Status check_vectors(const Target& target) {
  if (target.sve_bits < 256)
    return Status::error(Code::unsupported, "made for vectors of 256 bits or more: NEON's do as well at 128");
  return {};
}

Status supports(const KernelDesc& desc, const Target& target) {
  if (Status s = check_vectors(target); !s)
    return s;
  return supports_nest(desc, target);
}

Status supports_linear(const KernelDesc& desc, const Target& target) {
  if (Status s = check_vectors(target); !s)
    return s;
  return int8_linear::check_k(desc, kNestMaxK);
}

std::int32_t vector_bits(const Target& target) {
  return target.sve_bits;
}

std::string assumes(const Target& target) {
  return fmt::format(
      "each thread keeps the vector length of {} bits: on one that was given another (PR_SVE_SET_VL) the "
      "kernel is exact but multiplies without vectors",
      target.sve_bits);
}

} // namespace

void SvePath::clear() {
  a_.word(sve::ptrue(sve::Element::b, kAll));
  for (int unit = 0; unit < shape_.heights.max; ++unit)
    for (int vector = 0; vector < shape_.vectors(); ++vector)
      a_.word(sve::dup(sve::Element::s, acc(unit, vector), 0));
}

void SvePath::load_b(int to, const Gp& base, int offset) {
  const int vector = offset / shape_.vector_bytes;
  constexpr int kReach = 7; // LD1B (scalar plus immediate): −8 … 7 vectors
  // A64FX does two LD1B a cycle and one LDR (LLVM 19's model of it).
  a_.word(vector <= kReach ? sve::ld1b(z(to), kAll, base, vector) : sve::ldr(z(to), base, vector));
}

Result<CodeObject> emit_sve_nest(Assembler& a, const NestShape& shape, SvePath& path, Features features,
                                 const Target& target) {
  const asmjit::Label vectors = a.newLabel();
  a.word(sve::rdvl(role::scratch, 1));
  a.cmp(role::scratch, shape.vector_bytes);
  a.b_eq(vectors);
  if (shape.linear)
    emit_scalar_int8_linear(a, shape.layout, shape.k, shape.quantised_rows(), shape.linear->has_bias, shape.epilogue);
  else
    emit_scalar_int8_mm(a, shape.layout, shape.k, shape.epilogue, shape.plan().a_shift);
  a.bind(vectors);
  if (shape.linear) {
    SveLinearEpilogue epilogue(path.epilogue(SveEpilogue::Level::sve), shape.linear->has_bias);
    return emit_nest(a, shape, path, epilogue, features, target.sve_bits);
  }
  SveEpilogue epilogue =
      path.epilogue(features.has(Feature::sve2) ? SveEpilogue::Level::sve2 : SveEpilogue::Level::sve);
  return emit_nest(a, shape, path, epilogue, features, target.sve_bits);
}

Features sve_features(Features needs, const KernelDesc& desc, const Target& target) {
  if (target.features.has(Feature::sve2) && SveEpilogue::uses_sve2(int8_mm::Epilogue::of(desc)))
    needs.add(Feature::sve2);
  return NestShape::features(needs, desc, target);
}

int8_mm::PackLayout sve_pack_layout(const Target& target, int k_block) {
  return {.n_block = target.sve_bits / 128 * 12, .k_block = k_block};
}

int panel_vectors(int8_mm::PackLayout layout, const Target& target) {
  const int bytes = layout.n_block * layout.k_block, vector_bytes = target.sve_bits / 8;
  return vector_bytes > 0 && bytes % vector_bytes == 0 ? bytes / vector_bytes : 0;
}

Implementation sve_row(IsaPath isa, Features needs, std::string (*pack_layout)(const KernelDesc&, const Target&),
                       bool (*reads_layout)(std::string_view, const KernelDesc&, const Target&),
                       Result<CodeObject> (*compile)(const KernelDesc&, const Target&, std::string_view)) {
  Implementation row = nest_row(isa, needs, pack_layout, reads_layout, compile);
  row.vector_bits = vector_bits;
  row.supports = supports;
  row.assumes = assumes;
  return row;
}

Implementation sve_linear_row(Implementation product) {
  Implementation row = linear_row(std::move(product));
  row.supports = supports_linear;
  return row;
}

} // namespace kiln::arm
