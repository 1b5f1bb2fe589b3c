#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "cache/status.h"

/// A writer of PTX text: typed virtual registers, labels and structured control flow, and the instructions that Kiln's
/// kernels use as functions that check their operands. Sections named here are those of NVIDIA's "Parallel Thread
/// Execution ISA", version 8.8, by title, since their numbers move from version to version.
///
/// Deterministic: the text depends on the calls alone. Values in SSA style: most functions return a fresh register;
/// those named `…_to`, and those that take a destination first, write into one that exists (loop-carried values).
namespace kiln::nvidia::ptx {

/// Registers are untyped but for their size and for predicates and f32, which PTX keeps apart; the instruction says
/// whether an integer is signed.
enum class Type : std::uint8_t { pred, b16, b32, b64, f32, count };

template <Type type> struct Register {
  std::int32_t id = -1; ///< −1: none yet
  bool operator==(const Register&) const = default;
};
using Pred = Register<Type::pred>;
using B16 = Register<Type::b16>;
using B32 = Register<Type::b32>;
using B64 = Register<Type::b64>;
using F32 = Register<Type::f32>;

/// A register or an integer constant.
template <Type type> struct Integer {
  Integer(Register<type> r) : reg(r) {}
  template <class T>
  requires std::is_integral_v<T> Integer(T v) : is_immediate(true), immediate(static_cast<std::int64_t>(v)) {}
  Register<type> reg{};
  bool is_immediate = false;
  std::int64_t immediate = 0;
};
using I32 = Integer<Type::b32>;
using I64 = Integer<Type::b64>;

/// A register or an f32 constant.
struct Float {
  Float(F32 r) : reg(r) {}
  Float(float v) : is_immediate(true), immediate(v) {}
  F32 reg{};
  bool is_immediate = false;
  float immediate = 0;
};

/// `@p` or `@!p` before an instruction; none by default.
struct Guard {
  Guard() = default;
  Guard(Pred p, bool negated = false) : pred(p), negated(negated) {}
  Pred pred{};
  bool negated = false;
};
inline Guard unless(Pred p) {
  return {p, true};
}

/// `[base + offset]`: of a 64-bit register in global memory, of a 32-bit one in shared memory.
template <Type type> struct Address {
  Address(Register<type> base, std::int64_t offset = 0) : base(base), offset(offset) {}
  Register<type> base;
  std::int64_t offset;
};
using GlobalAddress = Address<Type::b64>;
using SharedAddress = Address<Type::b32>;

struct Label {
  std::int32_t id = -1;
};

enum class Compare : std::uint8_t { eq, ne, lt, le, gt, ge };

/// The machine that a text is for: compute capability times ten; `a` stands for the instructions of that one
/// architecture (wgmma, setmaxnreg).
struct Sm {
  int number = 80;
  bool architecture_specific = false;
  bool operator==(const Sm&) const = default;
  std::string text() const; ///< `sm_90a`
};

/// One kernel entry. One thread. Remembers its first error, so that writing needs no checks in between.
class Writer {
public:
  /// `name` is the entry's. `threads` per block becomes `.reqntid`; `blocks_per_cluster` > 1 `.reqnctapercluster`;
  /// `blocks_per_sm` > 1 `.minnctapersm`: registers are limited so that so many blocks fit.
  /// Directives: "Performance-Tuning Directives", "Cluster Dimension Directives".
  Writer(Sm sm, std::string_view name, int threads, int blocks_per_cluster = 1, int blocks_per_sm = 1);

  /// Parameters in order, before anything else ("Kernel Function Parameters"). The register holds the value loaded.
  B64 parameter_b64(std::string_view name);
  B32 parameter_b32(std::string_view name);
  /// A 128-byte tensor map passed by value, 64-byte aligned; the register holds its generic address.
  B64 parameter_tensor_map(std::string_view name);

  template <Type type> Register<type> make() { return {next_id_[static_cast<std::size_t>(type)]++}; }
  template <class R, std::size_t n> std::array<R, n> make() {
    std::array<R, n> registers;
    for (R& r : registers)
      r = fresh(R{});
    return registers;
  }
  B32 b32() { return make<Type::b32>(); }
  B64 b64() { return make<Type::b64>(); }
  F32 f32() { return make<Type::f32>(); }
  Pred pred() { return make<Type::pred>(); }

  /// A line of comment before the next instruction.
  void comment(std::string_view text);

  // ---- Special registers ("Special Registers")
  B32 thread() { return special("%tid.x"); }
  B32 block_x() { return special("%ctaid.x"); }
  B32 block_y() { return special("%ctaid.y"); }
  B32 block_z() { return special("%ctaid.z"); }
  B32 blocks_x() { return special("%nctaid.x"); }
  B32 rank_in_cluster() {
    require(90, 78, "cluster_ctarank");
    return special("%cluster_ctarank");
  }

  // ---- "Integer Arithmetic Instructions", "Logic and Shift Instructions": 32 bits unless said
  B32 mov(I32 a);
  void mov_to(B32 d, I32 a, Guard guard = {});
  void mov_to(B64 d, B64 a, Guard guard = {});
  B32 add(I32 a, I32 b);
  void add_to(B32 d, I32 a, I32 b, Guard guard = {});
  B32 sub(I32 a, I32 b);
  B32 mul(I32 a, I32 b);        ///< low 32 bits
  B32 mad(I32 a, I32 b, I32 c); ///< a·b + c, low 32 bits
  B32 min_u32(I32 a, I32 b);
  B32 min_s32(I32 a, I32 b);
  B32 max_s32(I32 a, I32 b);
  B32 div_u32(I32 a, I32 b);
  B32 and_(I32 a, I32 b);
  B32 or_(I32 a, I32 b);
  B32 xor_(I32 a, I32 b);
  B32 shl(I32 a, int bits);
  B32 shr(I32 a, int bits); ///< unsigned
  B64 add64(B64 a, I64 b);
  void add64_to(B64 d, B64 a, I64 b, Guard guard = {});
  B64 widen(B32 a); ///< unsigned
  B64 combine(B32 low, I32 high);
  B32 low(B64 a);             ///< the low 32 bits
  B64 mul_wide(I32 a, I32 b); ///< u32 × u32 → u64
  B64 mad_wide(I32 a, I32 b, B64 c);
  B64 mul64(B64 a, I64 b); ///< low 64 bits
  /// Any function of three bits: `table` is the function of (0xF0, 0xCC, 0xAA) ("lop3").
  B32 lop3(I32 a, I32 b, I32 c, int table);
  /// Bytes of {b, a} by selector ("prmt").
  B32 prmt(I32 a, I32 b, I32 selector);
  B32 select(Pred p, I32 a, I32 b);
  Pred compare_u32(Compare how, I32 a, I32 b);
  Pred compare_s32(Compare how, I32 a, I32 b);
  Pred both(Pred a, Pred b);
  Pred either(Pred a, Pred b);
  Pred always(bool value); ///< a constant that the assembler sees through

  // ---- "Floating-Point Instructions", "Half Precision Floating-Point Instructions", cvt
  F32 mov_f32(Float a);
  void mov_to(F32 d, Float a);
  F32 as_f32(B32 bits);
  B32 as_b32(F32 a);
  F32 add(Float a, Float b);
  void add_to(F32 d, Float a, Float b);
  F32 mul(Float a, Float b);
  void fma_to(F32 d, Float a, Float b, Float c); ///< round to nearest even
  F32 from_s32(B32 a);                           ///< round to nearest even
  B32 to_s32_saturated(F32 a);                   ///< round to nearest even; NaN gives 0
  B32 fma_bf16x2(B32 a, I32 b, I32 c);
  B32 negate_bf16x2(B32 a);
  B32 to_bf16x2(Float high, Float low); ///< round to nearest even
  B32 to_f16x2(Float high, Float low);  ///< round to nearest even; what is too large becomes an infinity
  /// Four s32 saturated to s8, `a` in the lowest byte ("cvt.pack").
  B32 pack_s8(B32 a, B32 b, B32 c, B32 d);

  // ---- "Data Movement and Conversion Instructions": ld, st, cp.async, mapa, createpolicy
  /// Into 1, 2 or 4 registers: an aligned access of that size.
  void load_shared(std::span<const B32> d, SharedAddress from, Guard guard = {});
  void load_shared(std::span<const F32> d, SharedAddress from, Guard guard = {});
  void store_shared(SharedAddress to, std::span<const B32> a, Guard guard = {});
  void store_shared(SharedAddress to, std::span<const F32> a, Guard guard = {});
  /// Of another block of the cluster: an address that `in_block` gave.
  void load_cluster(std::span<const B32> d, SharedAddress from, Guard guard = {});
  void load_cluster(std::span<const F32> d, SharedAddress from, Guard guard = {});
  /// Four registers into another block's shared memory, counted as 16 bytes by a mbarrier of that block ("st.async"):
  /// addresses that `in_block` gave.
  void store_async(SharedAddress to, std::span<const F32, 4> a, SharedAddress mbarrier);
  void store_async(SharedAddress to, std::span<const B32, 4> a, SharedAddress mbarrier);
  SharedAddress in_block(B32 shared_address, I32 rank);
  void load_global(std::span<const B32> d, GlobalAddress from, Guard guard = {});
  void load_global(std::span<const F32> d, GlobalAddress from, Guard guard = {});
  /// Data that no one writes while the kernel runs, through the read-only path.
  void load_constant(std::span<const B32> d, GlobalAddress from, Guard guard = {});
  /// The same, read once: past L1, and by `policy` first to leave L2.
  void load_stream(std::span<const B32> d, GlobalAddress from, B64 policy, Guard guard = {});
  B64 evict_first_policy();
  void store_global(GlobalAddress to, std::span<const B32> a, Guard guard = {});
  void store_global(GlobalAddress to, std::span<const F32> a, Guard guard = {});
  void store_global_b16(GlobalAddress to, B32 a, Guard guard = {}); ///< the low half
  void store_global_b8(GlobalAddress to, B32 a, Guard guard = {});  ///< the low byte
  /// 16 aligned bytes, of which the first `bytes` (a register or 16) are read and the rest zero. Past L1.
  void cp_async(SharedAddress to, GlobalAddress from, I32 bytes = 16, Guard guard = {});
  /// 4 aligned bytes, of which the first `bytes` are read and the rest zero. Through L1.
  void cp_async_word(SharedAddress to, GlobalAddress from, I32 bytes, Guard guard = {});
  /// 16 bytes that are read once: by `policy` first to leave L2.
  void cp_async_stream(SharedAddress to, GlobalAddress from, B64 policy, Guard guard = {});
  void cp_async_commit();
  /// Arrives at the mbarrier once this thread's copies so far are done: one of the arrivals that it was made for.
  void cp_async_mbarrier_arrive(SharedAddress mbarrier);
  /// A multiple of 16 bytes, 16-byte aligned on both sides, by the copy engine ("cp.async.bulk"), counted by the
  /// mbarrier. `policy`: of L2, or none. From sm_90 on.
  void copy_bulk(SharedAddress to, GlobalAddress from, I32 bytes, SharedAddress mbarrier, B64 policy, Guard guard = {});
  void cp_async_wait(int groups_left);

  /// Dynamic shared memory (`extern .shared`), aligned to 1024 bytes: its address. Once per kernel.
  B32 shared_memory();

  // ---- "Parallel Synchronization and Communication Instructions"
  void barrier();                    ///< all threads of the block
  void barrier(I32 id, int threads); ///< those that name it; `threads` a multiple of 32
  /// The same without waiting: what this thread did before is done for those that wait there.
  void barrier_arrive(I32 id, int threads);
  void barrier_warp();           ///< all lanes; orders their memory accesses
  void barrier_cluster_arrive(); ///< release
  void barrier_cluster_arrive_relaxed();
  void barrier_cluster_wait(); ///< acquire
  void fence_device();         ///< fence.acq_rel.gpu
  B32 atomic_add_device(GlobalAddress at, I32 a);
  void mbarrier_init(SharedAddress at, int arrivals);
  void mbarrier_arrive(SharedAddress at, Guard guard = {});
  /// At one of any block of the cluster: an address that `in_block` gave. Orders this thread's reads before it; not its
  /// writes for other blocks, which would cost a fence of the whole GPU.
  void mbarrier_arrive_cluster(SharedAddress at, Guard guard = {});
  void mbarrier_expect_bytes(SharedAddress at, I32 bytes, Guard guard = {});
  /// Spins until the phase of this parity has completed.
  void mbarrier_wait(SharedAddress at, I32 parity);
  void fence_mbarrier_init(); ///< before the cluster or the copy engine sees new barriers
  void fence_proxy_async();   ///< ordinary writes to shared memory before the async proxy reads them

  // ---- "Warp-Level Matrix Instructions"
  /// D[16×8] += A[16×16] · B[16×8], bf16, f32 sums ("mma.m16n8k16").
  void mma_bf16(std::span<const F32, 4> d, std::span<const B32, 4> a, std::span<const B32, 2> b,
                std::span<const F32, 4> c);
  /// D[16×8] += A[16×32] · B[32×8], s8, s32 sums that wrap ("mma.m16n8k32").
  void mma_s8(std::span<const B32, 4> d, std::span<const B32, 4> a, std::span<const B32, 2> b,
              std::span<const B32, 4> c);
  /// One, two or four 8×8 matrices of 16-bit elements ("ldmatrix").
  void ldmatrix(std::span<const B32> d, SharedAddress from, bool transposed = false);
  /// One, two or four of them, back ("stmatrix"): lane l gives the address of row l mod 8 of matrix l / 8.
  void stmatrix(SharedAddress to, std::span<const B32> a, bool transposed = false);
  /// A fragment of an 8×8 matrix of 16-bit elements, transposed ("movmatrix").
  B32 transpose(B32 a);
  /// Another lane's value ("shfl.sync"): of the lane whose number differs in the bits of `mask`, or of lane 0, which
  /// the assembler then knows to be the same in all lanes.
  B32 shuffle_xor(B32 a, int mask);
  B32 uniform(B32 a);

  // ---- "Asynchronous Warpgroup Level Matrix Instructions": sm_90a
  void wgmma_fence();
  void wgmma_commit();
  void wgmma_wait(int groups_left);
  /// D[64×n] (+)= A[64×16] · B[16×n], bf16, A from registers, B K-major by descriptor. d has n/2 registers; n a
  /// multiple of 8 to 256. `accumulate` false: D is overwritten.
  void wgmma_bf16(std::span<const F32> d, std::span<const B32, 4> a, B64 b_descriptor, int n, Pred accumulate);
  /// The same with A in shared memory, K-major by descriptor.
  void wgmma_bf16(std::span<const F32> d, B64 a_descriptor, B64 b_descriptor, int n, Pred accumulate);
  /// D[64×n] (+)= A[64×32] · B[32×n], s8, both K-major by descriptor, s32 sums that wrap. n: 8, 16, 24, 32, or a
  /// multiple of 16 from 48 to 256.
  void wgmma_s8(std::span<const B32> d, B64 a_descriptor, B64 b_descriptor, int n, Pred accumulate);
  /// D[64×n] (+)= A[64×32] · B[32×n], each e4m3 or e5m2, both K-major by descriptor, f32 sums of the tensor core's own
  /// precision. n a multiple of 8 to 256.
  void wgmma_fp8(std::span<const F32> d, B64 a_descriptor, B64 b_descriptor, int n, Pred accumulate, bool a_e5m2,
                 bool b_e5m2);
  void setmaxnreg(bool increase, int registers);

  // ---- "cp.async.bulk.tensor": the copy engine, sm_90
  /// A box of a 2-dimensional tensor at element (x, y) into shared memory, counted by the mbarrier.
  void copy_tensor_2d(SharedAddress to, B64 tensor_map, I32 x, I32 y, SharedAddress mbarrier, Guard guard = {});
  /// Of a 3-dimensional one. `blocks`: bits of the cluster's blocks that get it, each at the same address and counted
  /// by its own mbarrier; 0: this block alone. `policy`: none, or that of L2.
  void copy_tensor_3d(SharedAddress to, B64 tensor_map, I32 x, I32 y, I32 z, SharedAddress mbarrier, int blocks = 0,
                      B64 policy = {});
  /// The same box into L2 alone ("cp.async.bulk.prefetch.tensor").
  void prefetch_tensor_3d(B64 tensor_map, I32 x, I32 y, I32 z, B64 policy = {});
  /// A box out of shared memory; what lies outside of the tensor is not written. Part of this thread's next group.
  void store_tensor_3d(B64 tensor_map, I32 x, I32 y, I32 z, SharedAddress from, Guard guard = {});
  void bulk_commit();
  /// Until all but `groups_left` of this thread's groups have read their shared memory.
  void bulk_wait_read(int groups_left);
  void prefetch_tensor_map(B64 tensor_map);

  // ---- "Control Flow Instructions"
  Label label() { return {next_label_++}; }
  void bind(Label l, std::string_view name = {});
  void branch(Label to, Guard guard = {});
  void exit(Guard guard = {});
  /// `body` when the predicate holds.
  template <class Body> void if_(Guard guard, Body body) {
    const Label end = label();
    branch(end, Guard{guard.pred, !guard.negated});
    body();
    bind(end);
  }
  /// `do body while (condition())`, where condition returns the predicate to go on.
  template <class Body> void loop(std::string_view name, Body body) {
    const Label begin = label();
    bind(begin, name);
    branch(begin, Guard(body()));
  }

  /// The whole text, or Code::compile_failed with the first operand that was refused. The writer is spent afterwards.
  Result<std::string> finish();

private:
  struct Operand;
  B32 fresh(B32) { return b32(); }
  B64 fresh(B64) { return b64(); }
  F32 fresh(F32) { return f32(); }
  Pred fresh(Pred) { return pred(); }
  B16 fresh(B16) { return make<Type::b16>(); }

  void emit(std::string_view opcode, std::initializer_list<Operand> operands, Guard guard = {});
  template <class R, class... Operands> R result(std::string_view opcode, const Operands&... operands);
  template <class R>
  void transfer(std::string_view opcode, bool is_load, std::span<const R> registers, const Operand& address,
                const Operand* policy, Guard guard);
  void append(const Operand& operand);
  void append_number(std::int64_t value);
  void begin(Guard guard);
  B32 special(std::string_view name);
  void require(int sm, int version, std::string_view what);
  void require_specific(std::string_view what);
  void fail(std::string message);
  void check_offset(std::int64_t offset);
  void check_barrier(I32 id, int threads);

  Sm sm_;
  std::string name_;
  int threads_, blocks_per_cluster_, blocks_per_sm_;
  int version_; ///< ten times the PTX version that the text needs
  bool uses_shared_ = false;
  std::string parameters_, body_, error_;
  int parameter_count_ = 0;
  std::int32_t next_id_[static_cast<std::size_t>(Type::count)] = {};
  std::int32_t next_label_ = 0;
};

} // namespace kiln::nvidia::ptx
