#pragma once
#include <cstdint>

/// Runs AMX code on x86-64 machines without AMX: the illegal-instruction traps of tile instructions are carried out on
/// a tile file in memory (Intel SDM volume 2, LDTILECFG … TDPBF16PS), everything else runs natively. For tests: a trap
/// takes microseconds. A tile instruction that hardware would refuse, and any other illegal instruction, ends the
/// process with a message. One thread at a time.
namespace kiln::test {

class AmxEmulator {
public:
  AmxEmulator();
  ~AmxEmulator(); ///< gives SIGILL back to its former handler
  AmxEmulator(const AmxEmulator&) = delete;
  AmxEmulator& operator=(const AmxEmulator&) = delete;

  /// Tile instructions carried out since the constructor.
  std::int64_t executed() const;
};

/// True when this process may use tiles: CPUID says so and the system gives permission (asked for here).
bool amx_available();

} // namespace kiln::test
