#if defined(__aarch64__) && defined(__linux__)
#include "tests/smopa_shim.h"

#include <asm/sigcontext.h>
#include <atomic>
#include <csignal>
#include <cstring>
#include <sys/ucontext.h>
#include <unistd.h>

namespace kiln::test {
namespace {

// SMOPA and USMOPA ZAda.S, Pn/M, Pm/M, Zn.B, Zm.B: whether Zn is unsigned at bit 24, Zm at 16, Pm at 13, Pn at 10, Zn
// at 5, ZAda at 0.
constexpr std::uint32_t kUnsigned = 1u << 24, kSmopaMask = 0xffe0001c & ~kUnsigned, kSmopa = 0xa0800000;
constexpr std::uint32_t kMostWords = 4096;

// Word i is what UDF #i + 1 stands for. UDF: a word whose upper half is 0.
std::uint32_t words[kMostWords];
std::uint32_t word_count;
std::atomic<std::int64_t> executed_count;
struct sigaction former;

[[noreturn]] void refuse(const char* why) {
  static constexpr char kPrefix[] = "SMOPA shim: ";
  if (write(STDERR_FILENO, kPrefix, sizeof kPrefix - 1) < 0 || write(STDERR_FILENO, why, std::strlen(why)) < 0 ||
      write(STDERR_FILENO, "\n", 1) < 0)
    _exit(3);
  _exit(2);
}

struct Frame {
  std::uint8_t* sve = nullptr;
  std::uint8_t* za = nullptr;
};

/// The records of a signal frame: magic and size each, the last of magic 0; one may say where more of them are.
Frame frame_of(mcontext_t& machine) {
  Frame frame;
  std::uint8_t* record = machine.__reserved;
  std::uint8_t* more = nullptr;
  for (;;) {
    _aarch64_ctx head;
    std::memcpy(&head, record, sizeof head);
    if (head.magic == 0) {
      if (more == nullptr)
        return frame;
      record = more;
      more = nullptr;
      continue;
    }
    sve_context sve;
    if (head.magic == SVE_MAGIC) {
      std::memcpy(&sve, record, sizeof sve);
      if ((sve.flags & SVE_SIG_FLAG_SM) != 0 && head.size > sizeof sve)
        frame.sve = record;
    } else if (head.magic == ZA_MAGIC && head.size > sizeof(za_context)) {
      frame.za = record;
    } else if (head.magic == EXTRA_MAGIC) {
      extra_context extra;
      std::memcpy(&extra, record, sizeof extra);
      more = reinterpret_cast<std::uint8_t*>(extra.datap);
    }
    record += head.size;
  }
}

void smopa(std::uint32_t word, const Frame& frame) {
  if (frame.sve == nullptr)
    refuse("SMOPA outside streaming mode");
  if (frame.za == nullptr)
    refuse("SMOPA while ZA is off");
  sve_context sve;
  std::memcpy(&sve, frame.sve, sizeof sve);
  const unsigned vq = sve_vq_from_vl(sve.vl);
  const int n = sve.vl / 4;
  const auto* const a = reinterpret_cast<const std::int8_t*>(frame.sve + SVE_SIG_ZREG_OFFSET(vq, word >> 5 & 31));
  const auto* const b = reinterpret_cast<const std::int8_t*>(frame.sve + SVE_SIG_ZREG_OFFSET(vq, word >> 16 & 31));
  const std::uint8_t* const pa = frame.sve + SVE_SIG_PREG_OFFSET(vq, word >> 10 & 7);
  const std::uint8_t* const pb = frame.sve + SVE_SIG_PREG_OFFSET(vq, word >> 13 & 7);
  const auto active = [](const std::uint8_t* p, int byte) { return (p[byte / 8] >> byte % 8 & 1) != 0; };
  for (int i = 0; i < n; ++i) {
    const int vector = 4 * i + static_cast<int>(word & 3); // of ZA: horizontal slice i of za{t}.s
    std::uint8_t* const slice = frame.za + ZA_SIG_ZAV_OFFSET(vq, vector);
    for (int j = 0; j < n; ++j) {
      std::uint32_t sum; // unsigned: the sum wraps
      std::memcpy(&sum, slice + 4 * j, sizeof sum);
      for (int k = 0; k < 4; ++k)
        if (active(pa, 4 * i + k) && active(pb, 4 * j + k)) {
          const int of_a = (word & kUnsigned) != 0 ? static_cast<std::uint8_t>(a[4 * i + k]) : a[4 * i + k];
          sum += static_cast<std::uint32_t>(of_a * b[4 * j + k]);
        }
      std::memcpy(slice + 4 * j, &sum, sizeof sum);
    }
  }
}

void on_illegal_instruction(int signal, siginfo_t* info, void* context) {
  mcontext_t& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  std::uint32_t word;
  std::memcpy(&word, reinterpret_cast<const void*>(machine.pc), sizeof word);
  if (word == 0 || word > word_count) { // not ours
    if ((former.sa_flags & SA_SIGINFO) != 0)
      former.sa_sigaction(signal, info, context);
    else if (former.sa_handler != SIG_DFL && former.sa_handler != SIG_IGN)
      former.sa_handler(signal);
    else
      ::sigaction(SIGILL, &former, nullptr); // and the instruction again
    return;
  }
  smopa(words[word - 1], frame_of(machine));
  machine.pc += 4;
  executed_count.fetch_add(1, std::memory_order_relaxed);
}

} // namespace

SmopaShim::SmopaShim() {
  executed_count = 0;
  struct sigaction action {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  ::sigaction(SIGILL, &action, &former);
}

SmopaShim::~SmopaShim() {
  ::sigaction(SIGILL, &former, nullptr);
}

std::size_t SmopaShim::rewrite(CodeObject& code) {
  std::size_t count = 0;
  for (std::size_t at = 0; at + 4 <= code.image.size(); at += 4) {
    std::uint32_t word;
    std::memcpy(&word, code.image.data() + at, sizeof word);
    if ((word & kSmopaMask) != kSmopa)
      continue;
    std::uint32_t known = 0;
    while (known < word_count && words[known] != word)
      ++known;
    if (known == word_count) {
      if (word_count == kMostWords)
        refuse("too many different words");
      words[word_count++] = word;
    }
    const std::uint32_t undefined = known + 1;
    std::memcpy(code.image.data() + at, &undefined, sizeof undefined);
    ++count;
  }
  return count;
}

std::int64_t SmopaShim::executed() {
  return executed_count;
}

} // namespace kiln::test
#endif
