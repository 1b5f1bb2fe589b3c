#include "tests/avxvnni_emulator.h"

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace kiln::test {
namespace {

struct sigaction former;

constexpr int kXmmAt = 160, kYmmHighAt = 576; ///< in an XSAVE area in standard form

struct Ymm {
  std::uint8_t bytes[32];
};
Ymm read(const std::uint8_t* area, int id) {
  Ymm value;
  std::memcpy(value.bytes, area + kXmmAt + 16 * id, 16);
  std::memcpy(value.bytes + 16, area + kYmmHighAt + 16 * id, 16);
  return value;
}
void write(std::uint8_t* area, int id, const Ymm& value) {
  std::memcpy(area + kXmmAt + 16 * id, value.bytes, 16);
  std::memcpy(area + kYmmHighAt + 16 * id, value.bytes + 16, 16);
}

void on_illegal_instruction(int, siginfo_t*, void* frame) {
  auto* const context = static_cast<ucontext_t*>(frame);
  const auto* const code = reinterpret_cast<const std::uint8_t*>(context->uc_mcontext.gregs[REG_RIP]);
  // VEX.256.66.0F38.W0 50 /r between registers
  const bool is_it =
      code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x87) == 0x05 && code[3] == 0x50 && code[4] >> 6 == 3;
  if (!is_it) {
    constexpr char message[] = "AvxVnniEmulator: an illegal instruction that is no vpdpbusd\n";
    static_cast<void>(!::write(2, message, sizeof message - 1));
    _exit(1);
  }
  const int sums_id = (code[4] >> 3 & 7) | (~(code[1] >> 7) & 1) << 3, u8_id = ~(code[2] >> 3) & 15,
            s8_id = (code[4] & 7) | (~(code[1] >> 5) & 1) << 3;
  auto* const area = reinterpret_cast<std::uint8_t*>(context->uc_mcontext.fpregs);
  Ymm sums = read(area, sums_id);
  const Ymm u8 = read(area, u8_id), s8 = read(area, s8_id);
  for (int lane = 0; lane < 8; ++lane) {
    std::uint32_t sum;
    std::memcpy(&sum, sums.bytes + 4 * lane, 4);
    for (int i = 4 * lane; i < 4 * lane + 4; ++i)
      sum += static_cast<std::uint32_t>(int{u8.bytes[i]} * static_cast<std::int8_t>(s8.bytes[i]));
    std::memcpy(sums.bytes + 4 * lane, &sum, 4);
  }
  write(area, sums_id, sums);
  context->uc_mcontext.gregs[REG_RIP] += 5;
}

} // namespace

AvxVnniEmulator::AvxVnniEmulator() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &former);
}

AvxVnniEmulator::~AvxVnniEmulator() {
  sigaction(SIGILL, &former, nullptr);
}

} // namespace kiln::test
