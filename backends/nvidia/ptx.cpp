#include "backends/nvidia/ptx.h"

#include <fmt/format.h>

#include <bit>
#include <charconv>
#include <limits>

namespace kiln::nvidia::ptx {

namespace {

/// Register name prefixes, by Type. `%d…` for 64 bits, since a number may follow `%r` only once.
constexpr std::string_view kPrefix[] = {"%p", "%h", "%r", "%d", "%f"};
constexpr std::string_view kDeclared[] = {".pred", ".b16", ".b32", ".b64", ".f32"};

constexpr std::string_view kCompare[] = {"eq", "ne", "lt", "le", "gt", "ge"};

/// The first PTX version, times ten, that knows a target ("PTX Module Directives: .target", release notes).
int first_version(Sm sm) {
  struct Row {
    int sm, version;
  };
  constexpr Row kRows[] = {{80, 70},  {86, 71},  {87, 74},  {89, 78},  {90, 78},
                           {100, 86}, {101, 86}, {103, 88}, {120, 87}, {121, 88}};
  int version = 70;
  for (const Row& row : kRows)
    if (sm.number >= row.sm)
      version = row.version;
  return sm.number == 90 && sm.architecture_specific ? 80 : version;
}

} // namespace

std::string Sm::text() const {
  return fmt::format("sm_{}{}", number, architecture_specific ? "a" : "");
}

struct Writer::Operand {
  enum class Kind : std::uint8_t { reg, integer, real, address, text };
  Operand(B32 r) : type(Type::b32), value(r.id) {}
  Operand(B64 r) : type(Type::b64), value(r.id) {}
  Operand(B16 r) : type(Type::b16), value(r.id) {}
  Operand(F32 r) : type(Type::f32), value(r.id) {}
  Operand(Pred r) : type(Type::pred), value(r.id) {}
  template <Type t>
  Operand(Integer<t> i)
      : kind(i.is_immediate ? Kind::integer : Kind::reg), type(t), value(i.is_immediate ? i.immediate : i.reg.id) {}
  Operand(Float f)
      : kind(f.is_immediate ? Kind::real : Kind::reg), type(Type::f32),
        value(f.is_immediate ? std::bit_cast<std::int32_t>(f.immediate) : f.reg.id) {}
  template <Type t>
  Operand(Address<t> a) : kind(Kind::address), type(t), value(a.base.id), offset(static_cast<std::int32_t>(a.offset)) {}
  Operand(std::string_view t) : kind(Kind::text), text(t) {}
  template <class R> Operand(std::span<const R> registers) : vector(registers.size()) {
    static_assert(sizeof(R) == sizeof(std::int32_t));
    type = Operand(registers[0]).type;
    ids = reinterpret_cast<const std::int32_t*>(registers.data());
  }

  Kind kind = Kind::reg;
  Type type = Type::b32;
  std::int64_t value = 0;
  std::int32_t offset = 0;
  std::size_t vector = 0; ///< `{…}` of so many registers
  const std::int32_t* ids = nullptr;
  std::string_view text;
};

Writer::Writer(Sm sm, std::string_view name, int threads, int blocks_per_cluster, int blocks_per_sm)
    : sm_(sm), name_(name), threads_(threads), blocks_per_cluster_(blocks_per_cluster), blocks_per_sm_(blocks_per_sm),
      version_(first_version(sm)) {
  body_.reserve(std::size_t{1} << 17);
  if (sm.number < 80)
    fail(fmt::format("{}: the least is sm_80", sm.text()));
  if (threads < 32 || threads > 1024 || threads % 32 != 0)
    fail(fmt::format("{} threads: allowed are multiples of 32 to 1024", threads));
  if (blocks_per_cluster < 1 || blocks_per_cluster > 8)
    fail(fmt::format("{} blocks per cluster: allowed are 1 to 8", blocks_per_cluster));
  if (blocks_per_cluster > 1)
    require(90, 78, ".reqnctapercluster");
}

void Writer::fail(std::string message) {
  if (error_.empty())
    error_ = std::move(message);
}

void Writer::require(int sm, int version, std::string_view what) {
  if (sm_.number < sm)
    fail(fmt::format("{} needs sm_{}, the target is {}", what, sm, sm_.text()));
  version_ = std::max(version_, version);
}

void Writer::require_specific(std::string_view what) {
  require(90, 80, what);
  if (sm_.number != 90 || !sm_.architecture_specific)
    fail(fmt::format("{} needs sm_90a, the target is {}", what, sm_.text()));
}

void Writer::append_number(std::int64_t value) {
  char digits[24];
  body_.append(digits, std::to_chars(digits, digits + sizeof digits, value).ptr);
}

void Writer::append(const Operand& o) {
  const auto reg = [&](Type type, std::int64_t id) {
    if (id < 0)
      fail("an operand is no register yet");
    body_ += kPrefix[static_cast<std::size_t>(type)];
    append_number(id);
  };
  if (o.vector != 0) {
    body_ += '{';
    for (std::size_t i = 0; i < o.vector; ++i) {
      if (i != 0)
        body_ += ", ";
      reg(o.type, o.ids[i]);
    }
    body_ += '}';
    return;
  }
  switch (o.kind) {
  case Operand::Kind::reg:
    reg(o.type, o.value);
    break;
  case Operand::Kind::integer:
    append_number(o.value);
    break;
  case Operand::Kind::real: // "Constants: Floating-Point Constants": 0f and eight hexadecimal digits
    fmt::format_to(std::back_inserter(body_), "0f{:08X}", static_cast<std::uint32_t>(o.value));
    break;
  case Operand::Kind::address:
    body_ += '[';
    reg(o.type, o.value);
    if (o.offset != 0) {
      body_ += " + ";
      append_number(o.offset);
    }
    body_ += ']';
    break;
  case Operand::Kind::text:
    body_ += o.text;
    break;
  }
}

void Writer::begin(Guard guard) {
  body_ += "  ";
  if (guard.pred.id >= 0) {
    body_ += guard.negated ? "@!" : "@";
    append(guard.pred);
    body_ += ' ';
  }
}

void Writer::emit(std::string_view opcode, std::initializer_list<Operand> operands, Guard guard) {
  begin(guard);
  body_ += opcode;
  bool first = true;
  for (const Operand& o : operands) {
    body_ += first ? " " : ", ";
    append(o);
    first = false;
  }
  body_ += ";\n";
}

/// Into a fresh register, which is returned.
template <class R, class... Operands> R Writer::result(std::string_view opcode, const Operands&... operands) {
  const R d = fresh(R{});
  emit(opcode, {d, operands...});
  return d;
}

void Writer::comment(std::string_view text) {
  for (const char c : text)
    if (c < ' ' || c > '~') { // the assembler refuses others even in comments
      fail(fmt::format("comment `{}` is not printable ASCII", text));
      return;
    }
  body_ += "  // ";
  body_ += text;
  body_ += '\n';
}

B64 Writer::parameter_b64(std::string_view name) {
  if (parameter_count_++ != 0)
    parameters_ += ",\n";
  fmt::format_to(std::back_inserter(parameters_), "  .param .u64 {}", name);
  return result<B64>("ld.param.u64", std::string_view(fmt::format("[{}]", name)));
}

B32 Writer::parameter_b32(std::string_view name) {
  if (parameter_count_++ != 0)
    parameters_ += ",\n";
  fmt::format_to(std::back_inserter(parameters_), "  .param .u32 {}", name);
  return result<B32>("ld.param.u32", std::string_view(fmt::format("[{}]", name)));
}

B64 Writer::parameter_tensor_map(std::string_view name) {
  if (parameter_count_++ != 0)
    parameters_ += ",\n";
  fmt::format_to(std::back_inserter(parameters_), "  .param .align 64 .b8 {}[128]", name);
  const B64 address = b64(), generic = b64();
  emit("mov.b64", {address, name});
  emit("cvta.param.u64", {generic, address});
  require(80, 77, "cvta.param");
  return generic;
}

B32 Writer::special(std::string_view name) {
  return result<B32>("mov.u32", name);
}

// ---- integers

B32 Writer::mov(I32 a) {
  const B32 d = b32();
  mov_to(d, a);
  return d;
}
void Writer::mov_to(B32 d, I32 a, Guard guard) {
  emit("mov.b32", {d, a}, guard);
}
void Writer::mov_to(B64 d, B64 a, Guard guard) {
  emit("mov.b64", {d, a}, guard);
}
B32 Writer::add(I32 a, I32 b) {
  const B32 d = b32();
  add_to(d, a, b);
  return d;
}
void Writer::add_to(B32 d, I32 a, I32 b, Guard guard) {
  emit("add.s32", {d, a, b}, guard);
}
B32 Writer::sub(I32 a, I32 b) {
  return result<B32>("sub.s32", a, b);
}
B32 Writer::mul(I32 a, I32 b) {
  return result<B32>("mul.lo.s32", a, b);
}
B32 Writer::mad(I32 a, I32 b, I32 c) {
  return result<B32>("mad.lo.s32", a, b, c);
}
B32 Writer::min_u32(I32 a, I32 b) {
  return result<B32>("min.u32", a, b);
}
B32 Writer::min_s32(I32 a, I32 b) {
  return result<B32>("min.s32", a, b);
}
B32 Writer::max_s32(I32 a, I32 b) {
  return result<B32>("max.s32", a, b);
}
B32 Writer::div_u32(I32 a, I32 b) {
  return result<B32>("div.u32", a, b);
}
B32 Writer::and_(I32 a, I32 b) {
  return result<B32>("and.b32", a, b);
}
B32 Writer::or_(I32 a, I32 b) {
  return result<B32>("or.b32", a, b);
}
B32 Writer::xor_(I32 a, I32 b) {
  return result<B32>("xor.b32", a, b);
}
B32 Writer::shl(I32 a, int bits) {
  if (bits < 0 || bits > 31)
    fail(fmt::format("shl by {}: allowed is 0 to 31", bits));
  return result<B32>("shl.b32", a, I32(bits));
}
B32 Writer::shr(I32 a, int bits) {
  if (bits < 0 || bits > 31)
    fail(fmt::format("shr by {}: allowed is 0 to 31", bits));
  return result<B32>("shr.u32", a, I32(bits));
}
B64 Writer::add64(B64 a, I64 b) {
  const B64 d = b64();
  add64_to(d, a, b);
  return d;
}
void Writer::add64_to(B64 d, B64 a, I64 b, Guard guard) {
  emit("add.s64", {d, a, b}, guard);
}
B64 Writer::widen(B32 a) {
  return result<B64>("cvt.u64.u32", a);
}
B32 Writer::low(B64 a) {
  return result<B32>("cvt.u32.u64", a);
}
B64 Writer::combine(B32 low, I32 high) {
  const B64 d = b64();
  const std::array<B32, 2> halves = {low, high.is_immediate ? mov(high) : high.reg};
  emit("mov.b64", {d, Operand(std::span<const B32>(halves))});
  return d;
}
B64 Writer::mul_wide(I32 a, I32 b) {
  return result<B64>("mul.wide.u32", a, b);
}
B64 Writer::mad_wide(I32 a, I32 b, B64 c) {
  return result<B64>("mad.wide.u32", a, b, c);
}
B64 Writer::mul64(B64 a, I64 b) {
  return result<B64>("mul.lo.s64", a, b);
}
B32 Writer::lop3(I32 a, I32 b, I32 c, int table) {
  if (table < 0 || table > 255)
    fail(fmt::format("lop3 table {}: allowed is 0 to 255", table));
  return result<B32>("lop3.b32", a, b, c, I32(table));
}
B32 Writer::prmt(I32 a, I32 b, I32 selector) {
  return result<B32>("prmt.b32", a, b, selector);
}
B32 Writer::select(Pred p, I32 a, I32 b) {
  return result<B32>("selp.b32", a, b, p);
}
Pred Writer::compare_u32(Compare how, I32 a, I32 b) {
  return result<Pred>(fmt::format("setp.{}.u32", kCompare[static_cast<std::size_t>(how)]), a, b);
}
Pred Writer::compare_s32(Compare how, I32 a, I32 b) {
  return result<Pred>(fmt::format("setp.{}.s32", kCompare[static_cast<std::size_t>(how)]), a, b);
}
Pred Writer::both(Pred a, Pred b) {
  return result<Pred>("and.pred", a, b);
}

Pred Writer::either(Pred a, Pred b) {
  return result<Pred>("or.pred", a, b);
}

Pred Writer::always(bool value) {
  const B32 zero = mov(0);
  return compare_u32(value ? Compare::eq : Compare::ne, zero, 0);
}

// ---- floating point

F32 Writer::mov_f32(Float a) {
  const F32 d = f32();
  mov_to(d, a);
  return d;
}
void Writer::mov_to(F32 d, Float a) {
  emit("mov.f32", {d, a});
}
F32 Writer::as_f32(B32 bits) {
  return result<F32>("mov.b32", bits);
}
B32 Writer::as_b32(F32 a) {
  return result<B32>("mov.b32", a);
}
F32 Writer::add(Float a, Float b) {
  const F32 d = f32();
  add_to(d, a, b);
  return d;
}
void Writer::add_to(F32 d, Float a, Float b) {
  emit("add.rn.f32", {d, a, b});
}
F32 Writer::mul(Float a, Float b) {
  return result<F32>("mul.rn.f32", a, b);
}
void Writer::fma_to(F32 d, Float a, Float b, Float c) {
  emit("fma.rn.f32", {d, a, b, c});
}
F32 Writer::from_s32(B32 a) {
  return result<F32>("cvt.rn.f32.s32", a);
}
B32 Writer::to_s32_saturated(F32 a) {
  return result<B32>("cvt.rni.s32.f32", a);
}
B32 Writer::fma_bf16x2(B32 a, I32 b, I32 c) {
  const B32 d = b32();
  // A constant goes through a register: the instruction takes none.
  const B32 br = b.is_immediate ? mov(b) : b.reg, cr = c.is_immediate ? mov(c) : c.reg;
  emit("fma.rn.bf16x2", {d, a, br, cr});
  return d;
}
B32 Writer::negate_bf16x2(B32 a) {
  return result<B32>("neg.bf16x2", a);
}
B32 Writer::to_bf16x2(Float high, Float low) {
  return result<B32>("cvt.rn.bf16x2.f32", high, low);
}
B32 Writer::to_f16x2(Float high, Float low) {
  return result<B32>("cvt.rn.f16x2.f32", high, low);
}
B32 Writer::pack_s8(B32 a, B32 b, B32 c, B32 d) {
  const B32 high = b32(), all = b32();
  emit("cvt.pack.sat.s8.s32.b32", {high, d, c, I32(0)});
  emit("cvt.pack.sat.s8.s32.b32", {all, b, a, high});
  return all;
}

// ---- memory

void Writer::check_offset(std::int64_t offset) {
  if (offset < std::numeric_limits<std::int32_t>::min() || offset > std::numeric_limits<std::int32_t>::max())
    fail(fmt::format("address offset {}: allowed are 32 bits with a sign", offset));
}

template <class R>
void Writer::transfer(std::string_view opcode, bool is_load, std::span<const R> registers, const Operand& address,
                      const Operand* policy, Guard guard) {
  if (registers.size() != 1 && registers.size() != 2 && registers.size() != 4) {
    fail(fmt::format("{} of {} registers: allowed are 1, 2 and 4", opcode, registers.size()));
    return;
  }
  check_offset(address.offset);
  if (address.offset % static_cast<std::int32_t>(4 * registers.size()) != 0)
    fail(fmt::format("{}: offset {} is not aligned to {} bytes", opcode, address.offset, 4 * registers.size()));
  begin(guard);
  body_ += opcode;
  if (registers.size() > 1) {
    body_ += ".v";
    append_number(static_cast<std::int64_t>(registers.size()));
  }
  body_ += std::is_same_v<R, F32> ? ".f32 " : ".b32 ";
  const Operand data = registers.size() > 1 ? Operand(registers) : Operand(registers[0]);
  append(is_load ? data : address);
  body_ += ", ";
  append(is_load ? address : data);
  if (policy != nullptr) {
    body_ += ", ";
    append(*policy);
  }
  body_ += ";\n";
}

void Writer::load_shared(std::span<const B32> d, SharedAddress from, Guard guard) {
  transfer("ld.shared", true, d, from, nullptr, guard);
}
void Writer::load_shared(std::span<const F32> d, SharedAddress from, Guard guard) {
  transfer("ld.shared", true, d, from, nullptr, guard);
}
void Writer::store_shared(SharedAddress to, std::span<const B32> a, Guard guard) {
  transfer("st.shared", false, a, to, nullptr, guard);
}
void Writer::store_shared(SharedAddress to, std::span<const F32> a, Guard guard) {
  transfer("st.shared", false, a, to, nullptr, guard);
}
void Writer::load_cluster(std::span<const B32> d, SharedAddress from, Guard guard) {
  require(90, 78, "ld.shared::cluster");
  transfer("ld.shared::cluster", true, d, from, nullptr, guard);
}
void Writer::load_cluster(std::span<const F32> d, SharedAddress from, Guard guard) {
  require(90, 78, "ld.shared::cluster");
  transfer("ld.shared::cluster", true, d, from, nullptr, guard);
}
void Writer::store_async(SharedAddress to, std::span<const F32, 4> a, SharedAddress mbarrier) {
  require(90, 81, "st.async");
  if (to.offset % 16 != 0)
    fail(fmt::format("st.async: offset {} is not aligned to 16 bytes", to.offset));
  emit("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32",
       {to, Operand(std::span<const F32>(a)), mbarrier});
}
void Writer::store_async(SharedAddress to, std::span<const B32, 4> a, SharedAddress mbarrier) {
  require(90, 81, "st.async");
  if (to.offset % 16 != 0)
    fail(fmt::format("st.async: offset {} is not aligned to 16 bytes", to.offset));
  emit("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32",
       {to, Operand(std::span<const B32>(a)), mbarrier});
}
SharedAddress Writer::in_block(B32 shared_address, I32 rank) {
  require(90, 78, "mapa");
  const B32 d = b32();
  emit("mapa.shared::cluster.u32", {d, shared_address, rank});
  return {d};
}
void Writer::load_global(std::span<const B32> d, GlobalAddress from, Guard guard) {
  transfer("ld.global", true, d, from, nullptr, guard);
}
void Writer::load_global(std::span<const F32> d, GlobalAddress from, Guard guard) {
  transfer("ld.global", true, d, from, nullptr, guard);
}
void Writer::load_constant(std::span<const B32> d, GlobalAddress from, Guard guard) {
  transfer("ld.global.nc", true, d, from, nullptr, guard);
}
void Writer::load_stream(std::span<const B32> d, GlobalAddress from, B64 policy, Guard guard) {
  require(80, 74, "ld.L2::cache_hint");
  const Operand hint = policy;
  transfer("ld.global.nc.L1::no_allocate.L2::cache_hint", true, d, from, &hint, guard);
}
B64 Writer::evict_first_policy() {
  require(80, 74, "createpolicy");
  return result<B64>("createpolicy.fractional.L2::evict_first.b64", Float(1.0f));
}
void Writer::store_global(GlobalAddress to, std::span<const B32> a, Guard guard) {
  transfer("st.global", false, a, to, nullptr, guard);
}
void Writer::store_global(GlobalAddress to, std::span<const F32> a, Guard guard) {
  transfer("st.global", false, a, to, nullptr, guard);
}
void Writer::store_global_b16(GlobalAddress to, B32 a, Guard guard) {
  const B16 half = make<Type::b16>();
  emit("cvt.u16.u32", {half, a});
  emit("st.global.b16", {to, half}, guard);
}
void Writer::store_global_b8(GlobalAddress to, B32 a, Guard guard) {
  emit("st.global.b8", {to, a}, guard);
}

void Writer::cp_async(SharedAddress to, GlobalAddress from, I32 bytes, Guard guard) {
  check_offset(from.offset);
  if (to.offset % 16 != 0 || from.offset % 16 != 0)
    fail(fmt::format("cp.async: offsets {} and {} must be multiples of 16", to.offset, from.offset));
  if (bytes.is_immediate && bytes.immediate != 16)
    fail(fmt::format("cp.async of {} bytes: allowed is 16, or a register", bytes.immediate));
  if (bytes.is_immediate)
    emit("cp.async.cg.shared.global", {to, from, I32(16)}, guard);
  else
    emit("cp.async.cg.shared.global", {to, from, I32(16), bytes}, guard);
}
void Writer::cp_async_word(SharedAddress to, GlobalAddress from, I32 bytes, Guard guard) {
  check_offset(from.offset);
  if (to.offset % 4 != 0 || from.offset % 4 != 0)
    fail(fmt::format("cp.async: offsets {} and {} must be multiples of 4", to.offset, from.offset));
  emit("cp.async.ca.shared.global", {to, from, I32(4), bytes}, guard);
}
void Writer::cp_async_stream(SharedAddress to, GlobalAddress from, B64 policy, Guard guard) {
  check_offset(from.offset);
  if (to.offset % 16 != 0 || from.offset % 16 != 0)
    fail(fmt::format("cp.async: offsets {} and {} must be multiples of 16", to.offset, from.offset));
  require(80, 74, "cp.async.L2::cache_hint");
  emit("cp.async.cg.shared.global.L2::cache_hint", {to, from, I32(16), policy}, guard);
}
void Writer::cp_async_commit() {
  emit("cp.async.commit_group", {});
}
void Writer::cp_async_mbarrier_arrive(SharedAddress mbarrier) {
  require(80, 70, "cp.async.mbarrier.arrive");
  emit("cp.async.mbarrier.arrive.noinc.shared.b64", {mbarrier});
}
void Writer::copy_bulk(SharedAddress to, GlobalAddress from, I32 bytes, SharedAddress mbarrier, B64 policy,
                       Guard guard) {
  require(90, 80, "cp.async.bulk");
  check_offset(from.offset);
  if (to.offset % 16 != 0 || from.offset % 16 != 0)
    fail(fmt::format("cp.async.bulk: offsets {} and {} must be multiples of 16", to.offset, from.offset));
  if (bytes.is_immediate && (bytes.immediate <= 0 || bytes.immediate % 16 != 0))
    fail(fmt::format("cp.async.bulk of {} bytes: allowed are multiples of 16", bytes.immediate));
  if (policy.id < 0)
    emit("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes", {to, from, bytes, mbarrier}, guard);
  else
    emit("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint",
         {to, from, bytes, mbarrier, policy}, guard);
}
void Writer::cp_async_wait(int groups_left) {
  emit("cp.async.wait_group", {I32(groups_left)});
}

B32 Writer::shared_memory() {
  if (uses_shared_)
    fail("shared memory is declared once");
  uses_shared_ = true;
  return result<B32>("mov.u32", std::string_view("shared"));
}

// ---- synchronisation

void Writer::barrier() {
  emit("bar.sync", {I32(0)});
}
void Writer::check_barrier(I32 id, int threads) {
  if ((id.is_immediate && (id.immediate < 0 || id.immediate > 15)) || threads <= 0 || threads % 32 != 0 ||
      threads > threads_)
    fail(fmt::format("barrier {} of {} threads: allowed are 0 to 15 and multiples of 32 to {}", id.immediate, threads,
                     threads_));
}
void Writer::barrier(I32 id, int threads) {
  check_barrier(id, threads);
  emit("bar.sync", {id, I32(threads)});
}
void Writer::barrier_arrive(I32 id, int threads) {
  check_barrier(id, threads);
  emit("bar.arrive", {id, I32(threads)});
}
void Writer::barrier_warp() {
  emit("bar.warp.sync", {I32(-1)});
}
void Writer::barrier_cluster_arrive() {
  require(90, 80, "barrier.cluster");
  emit("barrier.cluster.arrive.release.aligned", {});
}
void Writer::barrier_cluster_arrive_relaxed() {
  require(90, 80, "barrier.cluster");
  emit("barrier.cluster.arrive.relaxed.aligned", {});
}
void Writer::barrier_cluster_wait() {
  require(90, 80, "barrier.cluster");
  emit("barrier.cluster.wait.acquire.aligned", {});
}
void Writer::fence_device() {
  emit("fence.acq_rel.gpu", {});
}
B32 Writer::atomic_add_device(GlobalAddress at, I32 a) {
  return result<B32>("atom.acq_rel.gpu.global.add.u32", at, a);
}
void Writer::mbarrier_init(SharedAddress at, int arrivals) {
  if (arrivals < 1 || arrivals >= 1 << 20)
    fail(fmt::format("mbarrier of {} arrivals: allowed are 1 to 2^20 - 1", arrivals));
  emit("mbarrier.init.shared.b64", {at, I32(arrivals)});
}
void Writer::mbarrier_arrive(SharedAddress at, Guard guard) {
  require(80, 70, "mbarrier.arrive");
  emit("mbarrier.arrive.shared.b64", {b64(), at}, guard);
}
void Writer::mbarrier_arrive_cluster(SharedAddress at, Guard guard) {
  require(90, 80, "mbarrier.arrive.shared::cluster");
  emit("mbarrier.arrive.shared::cluster.b64", {std::string_view("_"), at}, guard);
}
void Writer::mbarrier_expect_bytes(SharedAddress at, I32 bytes, Guard guard) {
  require(90, 80, "mbarrier.arrive.expect_tx");
  emit("mbarrier.arrive.expect_tx.shared.b64", {b64(), at, bytes}, guard);
}
void Writer::mbarrier_wait(SharedAddress at, I32 parity) {
  require(90, 78, "mbarrier.try_wait");
  const Label again = label();
  bind(again);
  const Pred done = pred();
  emit("mbarrier.try_wait.parity.shared.b64", {done, at, parity});
  branch(again, unless(done));
}
void Writer::fence_mbarrier_init() {
  require(90, 80, "fence.mbarrier_init");
  emit("fence.mbarrier_init.release.cluster", {});
}
void Writer::fence_proxy_async() {
  require(90, 80, "fence.proxy.async");
  emit("fence.proxy.async.shared::cta", {});
}

// ---- matrices

void Writer::mma_bf16(std::span<const F32, 4> d, std::span<const B32, 4> a, std::span<const B32, 2> b,
                      std::span<const F32, 4> c) {
  emit("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
       {Operand(std::span<const F32>(d)), Operand(std::span<const B32>(a)), Operand(std::span<const B32>(b)),
        Operand(std::span<const F32>(c))});
}
void Writer::mma_s8(std::span<const B32, 4> d, std::span<const B32, 4> a, std::span<const B32, 2> b,
                    std::span<const B32, 4> c) {
  emit("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
       {Operand(std::span<const B32>(d)), Operand(std::span<const B32>(a)), Operand(std::span<const B32>(b)),
        Operand(std::span<const B32>(c))});
}
void Writer::ldmatrix(std::span<const B32> d, SharedAddress from, bool transposed) {
  if (d.size() != 1 && d.size() != 2 && d.size() != 4) {
    fail(fmt::format("ldmatrix of {} matrices: allowed are 1, 2 and 4", d.size()));
    return;
  }
  emit(fmt::format("ldmatrix.sync.aligned.m8n8.x{}{}.shared.b16", d.size(), transposed ? ".trans" : ""),
       {Operand(d), from});
}
void Writer::stmatrix(SharedAddress to, std::span<const B32> a, bool transposed) {
  require(90, 78, "stmatrix");
  if (a.size() != 1 && a.size() != 2 && a.size() != 4) {
    fail(fmt::format("stmatrix of {} matrices: allowed are 1, 2 and 4", a.size()));
    return;
  }
  emit(fmt::format("stmatrix.sync.aligned.m8n8.x{}{}.shared.b16", a.size(), transposed ? ".trans" : ""),
       {to, Operand(a)});
}
B32 Writer::transpose(B32 a) {
  require(80, 78, "movmatrix");
  return result<B32>("movmatrix.sync.aligned.m8n8.trans.b16", a);
}
B32 Writer::shuffle_xor(B32 a, int mask) {
  if (mask < 1 || mask > 31)
    fail(fmt::format("shfl.bfly by {}: allowed is 1 to 31", mask));
  return result<B32>("shfl.sync.bfly.b32", a, I32(mask), I32(31), I32(-1));
}
B32 Writer::uniform(B32 a) {
  return result<B32>("shfl.sync.idx.b32", a, I32(0), I32(31), I32(-1));
}
void Writer::wgmma_fence() {
  require_specific("wgmma.fence");
  emit("wgmma.fence.sync.aligned", {});
}
void Writer::wgmma_commit() {
  require_specific("wgmma.commit_group");
  emit("wgmma.commit_group.sync.aligned", {});
}
void Writer::wgmma_wait(int groups_left) {
  require_specific("wgmma.wait_group");
  if (groups_left < 0 || groups_left > 7)
    fail(fmt::format("wgmma.wait_group {}: allowed is 0 to 7", groups_left));
  emit("wgmma.wait_group.sync.aligned", {I32(groups_left)});
}
void Writer::wgmma_bf16(std::span<const F32> d, std::span<const B32, 4> a, B64 b_descriptor, int n, Pred accumulate) {
  require_specific("wgmma.mma_async");
  if (n < 8 || n > 256 || n % 8 != 0 || d.size() != static_cast<std::size_t>(n / 2)) {
    fail(fmt::format("wgmma m64n{}k16 with {} accumulators: n is a multiple of 8 to 256, with n/2 accumulators", n,
                     d.size()));
    return;
  }
  emit(fmt::format("wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16", n),
       {Operand(d), Operand(std::span<const B32>(a)), b_descriptor, accumulate, I32(1), I32(1), I32(0)});
}
void Writer::wgmma_bf16(std::span<const F32> d, B64 a_descriptor, B64 b_descriptor, int n, Pred accumulate) {
  require_specific("wgmma.mma_async");
  if (n < 8 || n > 256 || n % 8 != 0 || d.size() != static_cast<std::size_t>(n / 2)) {
    fail(fmt::format("wgmma m64n{}k16 with {} accumulators: n is a multiple of 8 to 256, with n/2 accumulators", n,
                     d.size()));
    return;
  }
  emit(fmt::format("wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16", n),
       {Operand(d), a_descriptor, b_descriptor, accumulate, I32(1), I32(1), I32(0), I32(0)});
}
void Writer::wgmma_s8(std::span<const B32> d, B64 a_descriptor, B64 b_descriptor, int n, Pred accumulate) {
  require_specific("wgmma.mma_async");
  const bool allowed = n >= 8 && n <= 256 && (n <= 32 ? n % 8 == 0 : n >= 48 && n % 16 == 0);
  if (!allowed || d.size() != static_cast<std::size_t>(n / 2)) {
    fail(
        fmt::format("wgmma m64n{}k32 with {} accumulators: n is 8, 16, 24, 32 or a multiple of 16 from 48 to 256, with "
                    "n/2 accumulators",
                    n, d.size()));
    return;
  }
  emit(fmt::format("wgmma.mma_async.sync.aligned.m64n{}k32.s32.s8.s8", n),
       {Operand(d), a_descriptor, b_descriptor, accumulate});
}
void Writer::wgmma_fp8(std::span<const F32> d, B64 a_descriptor, B64 b_descriptor, int n, Pred accumulate, bool a_e5m2,
                       bool b_e5m2) {
  require_specific("wgmma.mma_async");
  if (n < 8 || n > 256 || n % 8 != 0 || d.size() != static_cast<std::size_t>(n / 2)) {
    fail(fmt::format("wgmma m64n{}k32 with {} accumulators: n is a multiple of 8 to 256, with n/2 accumulators", n,
                     d.size()));
    return;
  }
  emit(fmt::format("wgmma.mma_async.sync.aligned.m64n{}k32.f32.{}.{}", n, a_e5m2 ? "e5m2" : "e4m3",
                   b_e5m2 ? "e5m2" : "e4m3"),
       {Operand(d), a_descriptor, b_descriptor, accumulate, I32(1), I32(1)});
}
void Writer::setmaxnreg(bool increase, int registers) {
  require_specific("setmaxnreg");
  if (registers < 24 || registers > 256 || registers % 8 != 0)
    fail(fmt::format("setmaxnreg {}: allowed are multiples of 8 from 24 to 256", registers));
  emit(increase ? "setmaxnreg.inc.sync.aligned.u32" : "setmaxnreg.dec.sync.aligned.u32", {I32(registers)});
}
void Writer::copy_tensor_2d(SharedAddress to, B64 tensor_map, I32 x, I32 y, SharedAddress mbarrier, Guard guard) {
  require(90, 80, "cp.async.bulk.tensor");
  if (to.offset % 128 != 0)
    fail(fmt::format("cp.async.bulk.tensor: shared offset {} is not a multiple of 128", to.offset));
  begin(guard);
  body_ += "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes ";
  append(to);
  body_ += ", [";
  append(tensor_map);
  body_ += ", {";
  append(x);
  body_ += ", ";
  append(y);
  body_ += "}], ";
  append(mbarrier);
  body_ += ";\n";
}

void Writer::copy_tensor_3d(SharedAddress to, B64 tensor_map, I32 x, I32 y, I32 z, SharedAddress mbarrier, int blocks,
                            B64 policy) {
  require(90, 80, "cp.async.bulk.tensor");
  if (to.offset % 128 != 0)
    fail(fmt::format("cp.async.bulk.tensor: shared offset {} is not a multiple of 128", to.offset));
  if (blocks < 0 || blocks >= 1 << 8)
    fail(fmt::format("cp.async.bulk.tensor to blocks {:#x}: allowed are 8 bits", blocks));
  B16 mask;
  if (blocks != 0) {
    mask = make<Type::b16>();
    emit("mov.b16", {mask, I32(blocks)});
  }
  body_ += "  cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes";
  body_ += blocks != 0 ? ".multicast::cluster" : "";
  body_ += policy.id >= 0 ? ".L2::cache_hint " : " ";
  append(to);
  body_ += ", [";
  append(tensor_map);
  body_ += ", {";
  append(x);
  body_ += ", ";
  append(y);
  body_ += ", ";
  append(z);
  body_ += "}], ";
  append(mbarrier);
  if (blocks != 0) {
    body_ += ", ";
    append(mask);
  }
  if (policy.id >= 0) {
    body_ += ", ";
    append(policy);
  }
  body_ += ";\n";
}
void Writer::prefetch_tensor_3d(B64 tensor_map, I32 x, I32 y, I32 z, B64 policy) {
  require(90, 80, "cp.async.bulk.prefetch.tensor");
  begin({});
  body_ += "cp.async.bulk.prefetch.tensor.3d.L2.global";
  body_ += policy.id >= 0 ? ".L2::cache_hint [" : " [";
  append(tensor_map);
  body_ += ", {";
  append(x);
  body_ += ", ";
  append(y);
  body_ += ", ";
  append(z);
  body_ += "}]";
  if (policy.id >= 0) {
    body_ += ", ";
    append(policy);
  }
  body_ += ";\n";
}
void Writer::store_tensor_3d(B64 tensor_map, I32 x, I32 y, I32 z, SharedAddress from, Guard guard) {
  require(90, 80, "cp.async.bulk.tensor");
  if (from.offset % 128 != 0)
    fail(fmt::format("cp.async.bulk.tensor: shared offset {} is not a multiple of 128", from.offset));
  begin(guard);
  body_ += "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [";
  append(tensor_map);
  body_ += ", {";
  append(x);
  body_ += ", ";
  append(y);
  body_ += ", ";
  append(z);
  body_ += "}], ";
  append(from);
  body_ += ";\n";
}
void Writer::bulk_commit() {
  require(90, 80, "cp.async.bulk.commit_group");
  emit("cp.async.bulk.commit_group", {});
}
void Writer::bulk_wait_read(int groups_left) {
  require(90, 80, "cp.async.bulk.wait_group");
  emit("cp.async.bulk.wait_group.read", {I32(groups_left)});
}
void Writer::prefetch_tensor_map(B64 tensor_map) {
  require(90, 80, "prefetch.tensormap");
  emit("prefetch.tensormap", {GlobalAddress(tensor_map)});
}

// ---- control flow

void Writer::bind(Label l, std::string_view name) {
  body_ += "$L";
  append_number(l.id);
  body_ += ':';
  if (!name.empty()) {
    body_ += " // ";
    body_ += name;
  }
  body_ += '\n';
}
void Writer::branch(Label to, Guard guard) {
  begin(guard);
  body_ += "bra $L";
  append_number(to.id);
  body_ += ";\n";
}
void Writer::exit(Guard guard) {
  emit("exit", {}, guard);
}

Result<std::string> Writer::finish() {
  exit();
  if (!error_.empty())
    return Status::error(Code::compile_failed, fmt::format("PTX of {}: {}", name_, error_));
  std::string out;
  out.reserve(body_.size() + 1024);
  fmt::format_to(std::back_inserter(out), ".version {}.{}\n.target {}\n.address_size 64\n", version_ / 10,
                 version_ % 10, sm_.text());
  if (uses_shared_)
    out += ".extern .shared .align 1024 .b8 shared[];\n";
  fmt::format_to(std::back_inserter(out), "\n.visible .entry {}(\n{}\n)\n.reqntid {}, 1, 1\n", name_, parameters_,
                 threads_);
  fmt::format_to(std::back_inserter(out), ".minnctapersm {}\n", blocks_per_sm_);
  if (blocks_per_cluster_ > 1)
    fmt::format_to(std::back_inserter(out), ".explicitcluster\n.reqnctapercluster {}, 1, 1\n", blocks_per_cluster_);
  out += "{\n";
  for (std::size_t type = 0; type < static_cast<std::size_t>(Type::count); ++type)
    if (next_id_[type] > 0)
      fmt::format_to(std::back_inserter(out), "  .reg {} {}<{}>;\n", kDeclared[type], kPrefix[type], next_id_[type]);
  out += '\n';
  out += body_;
  out += "}\n";
  return out;
}

} // namespace kiln::nvidia::ptx
