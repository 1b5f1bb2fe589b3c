#include "tests/amx_emulator.h"

#include <cmath>
#include <cpuid.h>
#include <csignal>
#include <cstring>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace kiln::test {
namespace {

constexpr int kTiles = 8, kMaxRows = 16, kRowBytes = 64;

struct Tile {
  int rows = 0, row_bytes = 0;
  std::uint8_t data[kMaxRows][kRowBytes] = {};
};

struct TileFile {
  std::uint8_t config[64] = {};
  Tile tiles[kTiles];
};

TileFile file;
std::int64_t executed_count;
struct sigaction former;

[[noreturn]] void refuse(const char* why) {
  static constexpr char kPrefix[] = "amx emulator: ";
  if (write(STDERR_FILENO, kPrefix, sizeof kPrefix - 1) < 0 || write(STDERR_FILENO, why, std::strlen(why)) < 0 ||
      write(STDERR_FILENO, "\n", 1) < 0)
    _exit(3);
  _exit(2);
}

void load_config(const std::uint8_t* from) {
  TileFile next;
  std::memcpy(next.config, from, sizeof next.config);
  if (from[0] > 1)
    refuse("ldtilecfg: palette above 1");
  for (int i = 1; i < 64; ++i) {
    const bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    if (from[i] != 0 && (reserved || from[0] == 0))
      refuse("ldtilecfg: a reserved byte is not 0");
  }
  for (int t = 0; t < kTiles; ++t) {
    next.tiles[t].row_bytes = from[16 + 2 * t] | from[17 + 2 * t] << 8;
    next.tiles[t].rows = from[48 + t];
    if (next.tiles[t].row_bytes > kRowBytes || next.tiles[t].rows > kMaxRows ||
        (next.tiles[t].rows == 0) != (next.tiles[t].row_bytes == 0))
      refuse("ldtilecfg: rows or bytes per row out of range");
  }
  file = next;
}

Tile& configured(int index) {
  if (index >= kTiles || file.tiles[index].rows == 0)
    refuse("a tile that is not configured");
  return file.tiles[index];
}

void check_product(const Tile& sums, const Tile& a, const Tile& b) {
  if (&sums == &a || &sums == &b || &a == &b)
    refuse("a product: the same tile twice");
  if (a.row_bytes % 4 != 0 || sums.row_bytes % 4 != 0 || sums.rows != a.rows || a.row_bytes / 4 != b.rows ||
      sums.row_bytes != b.row_bytes)
    refuse("a product: tiles of different shapes");
}

void multiply(Tile& sums, const Tile& a, const Tile& b, bool a_is_u8) {
  check_product(sums, a, b);
  for (int m = 0; m < a.rows; ++m) {
    std::uint32_t row[kRowBytes / 4];
    std::memcpy(row, sums.data[m], sizeof row);
    for (int k = 0; k < b.rows; ++k)
      for (int n = 0; n < sums.row_bytes / 4; ++n)
        for (int i = 0; i < 4; ++i)
          row[n] += static_cast<std::uint32_t>(
              (a_is_u8 ? int{a.data[m][4 * k + i]} : int{static_cast<std::int8_t>(a.data[m][4 * k + i])}) *
              static_cast<std::int8_t>(b.data[k][4 * n + i]));
    std::memcpy(sums.data[m], row, sizeof row);
  }
  for (int m = sums.rows; m < kMaxRows; ++m)
    std::memset(sums.data[m], 0, kRowBytes);
}

/// Denormals are zeros, of operands and of results.
float flushed(float v) {
  return std::fpclassify(v) == FP_SUBNORMAL ? std::copysign(0.0f, v) : v;
}

float bf16_at(const std::uint8_t* at) {
  const std::uint32_t bits = static_cast<std::uint32_t>(at[0]) << 16 | static_cast<std::uint32_t>(at[1]) << 24;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flushed(value);
}

/// TDPBF16PS: even and odd elements along the sum are added up apart, then together, then to the sums.
void multiply_bf16(Tile& sums, const Tile& a, const Tile& b) {
  check_product(sums, a, b);
  for (int m = 0; m < a.rows; ++m) {
    float row[kRowBytes / 4];
    std::memcpy(row, sums.data[m], sizeof row);
    for (int n = 0; n < sums.row_bytes / 4; ++n) {
      float parts[2] = {};
      for (int k = 0; k < b.rows; ++k)
        for (int i = 0; i < 2; ++i)
          parts[i] =
              flushed(std::fma(bf16_at(a.data[m] + 4 * k + 2 * i), bf16_at(b.data[k] + 4 * n + 2 * i), parts[i]));
      row[n] = flushed(flushed(row[n]) + flushed(parts[0] + parts[1]));
    }
    std::memcpy(sums.data[m], row, sizeof row);
  }
  for (int m = sums.rows; m < kMaxRows; ++m)
    std::memset(sums.data[m], 0, kRowBytes);
}

/// General register by its number in instructions.
std::uint64_t general_register(const ucontext_t* context, int number) {
  static constexpr int kIndex[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                     REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<std::uint64_t>(context->uc_mcontext.gregs[kIndex[number]]);
}

/// What follows the opcode. The tile instructions address memory by [base + index + displacement], where index 4 is
/// none, as for all of x86; those of configurations also by [rip + displacement].
struct Operands {
  int reg = 0, rm = 0;
  bool is_memory = false;
  std::uint8_t* address = nullptr;
  std::int64_t stride = 0;
  const std::uint8_t* end = nullptr;
};

Operands decode_operands(const std::uint8_t* at, int extend_index, int extend_base, const ucontext_t* context) {
  Operands out;
  const int mod = at[0] >> 6;
  out.reg = at[0] >> 3 & 7;
  out.rm = at[0] & 7;
  ++at;
  out.end = at;
  if (mod == 3)
    return out;
  out.is_memory = true;
  if (mod == 0 && out.rm == 5) {
    std::int32_t displacement;
    std::memcpy(&displacement, at, 4);
    out.end = at + 4;
    out.address = const_cast<std::uint8_t*>(out.end) + displacement;
    return out;
  }
  int base = out.rm | extend_base << 3;
  std::uint64_t address = 0;
  if (out.rm == 4) {
    const int scale = *at >> 6, index = (*at >> 3 & 7) | extend_index << 3;
    base = (*at & 7) | extend_base << 3;
    ++at;
    if (index != 4)
      out.stride = static_cast<std::int64_t>(general_register(context, index) << scale);
  }
  if (mod == 0 && (base & 7) == 5)
    refuse("an addressing form that kernels do not use");
  address = general_register(context, base);
  if (mod == 1) {
    address += static_cast<std::uint64_t>(static_cast<std::int64_t>(static_cast<std::int8_t>(*at)));
    at += 1;
  } else if (mod == 2) {
    std::int32_t displacement;
    std::memcpy(&displacement, at, 4);
    address += static_cast<std::uint64_t>(static_cast<std::int64_t>(displacement));
    at += 4;
  }
  out.address = reinterpret_cast<std::uint8_t*>(address);
  out.end = at;
  return out;
}

void on_illegal_instruction(int, siginfo_t*, void* opaque) {
  auto* context = static_cast<ucontext_t*>(opaque);
  const auto* code = reinterpret_cast<const std::uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  // Three-byte VEX, map 0F38, W0, 128 bits: C4 [R̄X̄B̄ 00010] [0 v̄v̄v̄v̄ 0 pp] opcode.
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0)
    refuse("an illegal instruction that is none of AMX");
  const int prefix = code[2] & 3, vvvv = ~(code[2] >> 3) & 15;
  const Operands operands = decode_operands(code + 4, ~(code[1] >> 6) & 1, ~(code[1] >> 5) & 1, context);
  enum { kNone, k66, kF3, kF2 };
  const int form = code[3] << 4 | prefix << 1 | (operands.is_memory ? 1 : 0);
  const auto form_of = [](int opcode, int with, bool memory) { return opcode << 4 | with << 1 | (memory ? 1 : 0); };
  if (form == form_of(0x49, kNone, true)) {
    load_config(operands.address);
  } else if (form == form_of(0x49, k66, true)) {
    std::memcpy(operands.address, file.config, sizeof file.config);
  } else if (form == form_of(0x49, kNone, false)) { // tilerelease
    file = TileFile();
  } else if (form == form_of(0x49, kF2, false)) {
    std::memset(configured(operands.reg).data, 0, sizeof(Tile::data));
  } else if (form == form_of(0x4b, kF2, true) || form == form_of(0x4b, k66, true)) { // tileloadd, tileloaddt1
    Tile& tile = configured(operands.reg);
    std::memset(tile.data, 0, sizeof tile.data);
    for (int row = 0; row < tile.rows; ++row)
      std::memcpy(tile.data[row], operands.address + row * operands.stride, static_cast<std::size_t>(tile.row_bytes));
  } else if (form == form_of(0x4b, kF3, true)) { // tilestored
    const Tile& tile = configured(operands.reg);
    for (int row = 0; row < tile.rows; ++row)
      std::memcpy(operands.address + row * operands.stride, tile.data[row], static_cast<std::size_t>(tile.row_bytes));
  } else if (form == form_of(0x5e, kF2, false) || form == form_of(0x5e, k66, false)) { // tdpbssd, tdpbusd
    multiply(configured(operands.reg), configured(operands.rm), configured(vvvv), prefix == k66);
  } else if (form == form_of(0x5c, kF3, false)) { // tdpbf16ps
    multiply_bf16(configured(operands.reg), configured(operands.rm), configured(vvvv));
  } else {
    refuse("a VEX instruction that is none of those emulated");
  }
  ++executed_count;
  context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(operands.end);
}

} // namespace

AmxEmulator::AmxEmulator() {
  file = TileFile();
  executed_count = 0;
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &former);
}

AmxEmulator::~AmxEmulator() {
  sigaction(SIGILL, &former, nullptr);
}

std::int64_t AmxEmulator::executed() const {
  return executed_count;
}

bool amx_available() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxTile = 1u << 24, kAmxInt8 = 1u << 25; // CPUID 7.0 EDX
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kAmxTile) == 0 || (edx & kAmxInt8) == 0)
    return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18; // asm/prctl.h: ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

} // namespace kiln::test
