#include "backends/x86/int8_mm_vex.h"
#include "backends/x86/rows.h"

/// int8_mm with vpmaddwd (s16 × s16 → s32, two products a lane, exact: vpmaddubsw would saturate) and vpaddd, for CPUs
/// without VNNI. A is widened to s16 once per call into the workspace, B by vpmovsxbw on its way into a register, from
/// a pack of pairs along K. What bounds it: two vpmaddwd a cycle; with them and their additions a step of a 6-row tile
/// takes 26 vector operations of four pipes.
namespace kiln::x86 {
namespace {

using namespace asmjit::x86;
using int8_mm::PackLayout;

constexpr PackLayout kLayout{.n_block = 16, .k_block = 2};
constexpr Features kFeatures{Feature::avx2};

class Path : public VexPath {
public:
  using VexPath::VexPath;

  void convert_rows() {
    const Ymm words = ymm0;
    const auto widen = [&](const Vec& to, const Mem& from) {
      if (a_is_u8_)
        a_.vpmovzxbw(to, from);
      else
        a_.vpmovsxbw(to, from);
    };
    begin_rows();
    emit_rows(
        a_, shape_, 16, 2,
        [&](const Gp& from, const Gp& to, int width, std::int64_t offset) {
          const int at = static_cast<int>(offset);
          if (width == 16) {
            widen(words, ptr(from, at));
            a_.vmovdqu(ptr(to, 2 * at), words);
          } else if (width == 8) {
            widen(Xmm(words.id()), ptr(from, at));
            a_.vmovdqu(ptr(to, 2 * at), Xmm(words.id()));
          } else {
            for (int i = at; i < at + width; ++i) {
              if (a_is_u8_)
                a_.movzx(eax, byte_ptr(from, i));
              else
                a_.movsx(eax, byte_ptr(from, i));
              a_.mov(ptr(to, 2 * i), ax);
            }
          }
        },
        [&] { finish_row(); });
  }

  void begin_row_tile() {
    if (begin_at_offsets())
      return;
    for (int row = 0; row < shape_.heights.max; ++row)
      for (int half = 0; half < 2; ++half)
        a_.vpxor(acc(row, half), acc(row, half), acc(row, half));
  }

  void step(int height, int index) {
    const int first = shape_.heights.max - height, set = index % tile_.sets;
    for (int half = 0; half < 2; ++half)
      a_.vpmovsxbw(b(half), panel_at(0, 32 * index + 16 * half));
    for (int row = first; row < shape_.heights.max; ++row) {
      a_.vpbroadcastd(broadcast(), ptr(role::a_k, static_cast<int>((row - first) * shape_.row_stride) + 4 * index));
      for (int half = 0; half < 2; ++half) {
        a_.vpmaddwd(product(), broadcast(), b(half));
        a_.vpaddd(acc(row, half, set), acc(row, half, set), product());
      }
    }
  }
};

Result<CodeObject> compile(const KernelDesc& desc, const Target&, std::string_view) {
  constexpr int bytes_per_element = 2;
  return compile_vex<Path>(desc, kLayout, kFeatures, bytes_per_element, false);
}

Result<CodeObject> compile_linear(const KernelDesc& desc, const Target&, std::string_view) {
  return compile_linear_vex<Path>(desc, kLayout, kFeatures, QuantisedRows::Form::s16);
}

} // namespace

Implementation int8_linear_avx2() {
  return linear_row(
      IsaPath::avx2, kFeatures,
      [](const KernelDesc& desc, const Target&) { return linear_vex_features(kFeatures, desc); },
      [](const KernelDesc&, const Target&) { return kLayout.id(); }, compile_linear);
}

Implementation int8_mm_avx2() {
  Implementation row = nest_row(
      IsaPath::avx2, kFeatures, [](const KernelDesc&, const Target&) { return kLayout.id(); }, compile);
  row.uses = [](const KernelDesc& desc, const Target&) { return vex_features(kFeatures, desc); };
  return row;
}

} // namespace kiln::x86
