#include "backends/x86/int8_mm_vex.h"
#include "backends/x86/rows.h"

/// int8_mm with the VEX form of vpdpbusd on 256 bits, for CPUs without AVX-512. As in int8_mm_avx512vnni.cpp, A's sign
/// bits are flipped into the workspace and the accumulators begin at −128·Σ_k b; the pack is the same. What bounds it:
/// two vpdpbusd a cycle of 4 to 5 cycles latency; a tile of 6 rows has 12 accumulators and takes 8 loads for 12 of
/// them.
namespace kiln::x86 {
namespace {

using namespace asmjit::x86;
using int8_mm::PackLayout;

constexpr PackLayout kLayout{.n_block = 16, .k_block = 4};
constexpr Features kFeatures{Feature::avx2, Feature::avxvnni};

class Path : public VexPath {
public:
  using VexPath::VexPath;

  void convert_rows() {
    const Ymm flip = ymm0, bytes = ymm1;
    const std::uint64_t sign_bits = a_is_u8_ ? 0 : 0x8080808080808080; // u8 stay as they are
    begin_rows();
    if (shape_.k == 0 && !shape_.has_row_values())
      return;
    a_.mov(rax, sign_bits);
    a_.vmovq(Xmm(flip.id()), rax);
    a_.vpbroadcastq(flip, Xmm(flip.id()));
    emit_rows(
        a_, shape_, 32, 1,
        [&](const Gp& from, const Gp& to, int width, std::int64_t offset) {
          const int at = static_cast<int>(offset);
          switch (width) {
          case 32:
            a_.vpxor(bytes, flip, ptr(from, at));
            a_.vmovdqu(ptr(to, at), bytes);
            break;
          case 16:
            a_.vpxor(Xmm(bytes.id()), Xmm(flip.id()), ptr(from, at));
            a_.vmovdqu(ptr(to, at), Xmm(bytes.id()));
            break;
          case 8:
            a_.mov(rbx, ptr(from, at));
            a_.xor_(rbx, rax);
            a_.mov(ptr(to, at), rbx);
            break;
          case 4:
            a_.mov(ebx, ptr(from, at));
            a_.xor_(ebx, eax);
            a_.mov(ptr(to, at), ebx);
            break;
          case 2:
            a_.movzx(ebx, word_ptr(from, at));
            a_.xor_(ebx, eax);
            a_.mov(ptr(to, at), bx);
            break;
          default:
            a_.movzx(ebx, byte_ptr(from, at));
            a_.xor_(ebx, eax);
            a_.mov(ptr(to, at), bl);
          }
        },
        [&] {
          finish_row();
          if (shape_.has_row_values())
            a_.mov(rax, sign_bits);
        });
  }

  void begin_row_tile() {
    if (begin_at_offsets())
      return;
    const int rows = shape_.heights.max;
    const Ymm zero = product();
    a_.vpxor(zero, zero, zero);
    for (int half = 0; half < 2; ++half) {
      const Ymm first = acc(rows - 1, half);
      a_.vmovdqu(first, ptr(role::b_sums, 32 * half));
      a_.vpslld(first, first, 7);
      a_.vpsubd(first, zero, first);
      for (int row = 0; row + 1 < rows; ++row)
        a_.vmovdqa(acc(row, half), first);
    }
  }

  void step(int height, int index) {
    const int first = shape_.heights.max - height, set = index % tile_.sets;
    for (int half = 0; half < 2; ++half)
      a_.vmovdqu(b(half), panel_at(0, 64 * index + 32 * half));
    for (int row = first; row < shape_.heights.max; ++row) {
      a_.vpbroadcastd(broadcast(), ptr(role::a_k, static_cast<int>((row - first) * shape_.row_stride) + 4 * index));
      for (int half = 0; half < 2; ++half)
        a_.vex().vpdpbusd(acc(row, half, set), broadcast(), b(half));
    }
  }
};

Result<CodeObject> compile(const KernelDesc& desc, const Target&, std::string_view) {
  constexpr int bytes_per_element = 1;
  return compile_vex<Path>(desc, kLayout, kFeatures, bytes_per_element, true);
}

Result<CodeObject> compile_linear(const KernelDesc& desc, const Target&, std::string_view) {
  return compile_linear_vex<Path>(desc, kLayout, kFeatures, QuantisedRows::Form::u8);
}

} // namespace

Implementation int8_linear_avxvnni() {
  return linear_row(
      IsaPath::avxvnni, kFeatures,
      [](const KernelDesc& desc, const Target&) { return linear_vex_features(kFeatures, desc); },
      [](const KernelDesc&, const Target&) { return kLayout.id(); }, compile_linear);
}

Implementation int8_mm_avxvnni() {
  Implementation row = nest_row(
      IsaPath::avxvnni, kFeatures, [](const KernelDesc&, const Target&) { return kLayout.id(); }, compile);
  row.uses = [](const KernelDesc& desc, const Target&) { return vex_features(kFeatures, desc); };
  return row;
}

} // namespace kiln::x86
