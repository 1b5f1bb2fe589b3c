#pragma once

namespace kiln::test {

/// Runs AVX-VNNI code on x86-64 machines without it: the illegal-instruction traps of the VEX form of vpdpbusd between
/// ymm registers are carried out on the signal frame (Intel SDM volume 2, VPDPBUSD; volume 1, 13.4 for the frame). For
/// tests: a trap takes microseconds. Any other illegal instruction ends the process. One thread at a time.
class AvxVnniEmulator {
public:
  AvxVnniEmulator();
  ~AvxVnniEmulator(); ///< gives SIGILL back to its former handler
  AvxVnniEmulator(const AvxVnniEmulator&) = delete;
  AvxVnniEmulator& operator=(const AvxVnniEmulator&) = delete;
};

} // namespace kiln::test
