#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

/// Runs the PTX of one kernel without a GPU: what the writer's instructions mean ("Parallel Thread Execution ISA"),
/// lane by lane, warps interleaved at random. What is asynchronous on a GPU (copies, sums of wgmma, remote stores)
/// happens at any time between where it is asked for and where it is awaited, at random too: a kernel that reads too
/// early, reuses memory too early or waits for what never comes gives wrong results, an error or a deadlock that is
/// reported. It knows nothing of time, of the memory model beyond that, nor of proxies.
namespace kiln::test::ptx {

/// What a tensor map of rank 3 holds; innermost first.
struct TensorMap {
  std::uint8_t* base = nullptr;
  int element_bytes = 1;
  std::array<std::int64_t, 3> extents{};
  std::array<std::int64_t, 2> strides{}; ///< bytes
  std::array<int, 2> box{};
  int swizzle = 0; ///< bytes: 0 or 128
};

struct Parameter {
  std::uint64_t value = 0;
  const TensorMap* map = nullptr; ///< of a map's 128 bytes
};

/// Memory that the kernel may touch, as [begin, begin + bytes).
struct Range {
  const void* begin = nullptr;
  std::size_t bytes = 0;
  bool writable = false;
};

struct Launch {
  unsigned blocks = 1, shared_bytes = 0;
  std::vector<Parameter> parameters; ///< in the order of the entry's
  std::vector<Range> memory;
  std::uint64_t seed = 1;
};

/// Empty, or what went wrong first: where, and the line.
std::string run(std::string_view text, const Launch& launch);

} // namespace kiln::test::ptx
