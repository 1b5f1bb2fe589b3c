#pragma once
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "jit/implementation.h"
#include "tests/aarch64_call.h"
#include "tests/emulator.h"
#include "tests/int8_mm_kernel_check.h"
#include "tests/llvm_mc.h"

/// What the tests of int8_mm's vector paths on aarch64 share: one table of shapes for all of them, and how to read a
/// listing.
namespace kiln::test {

/// A path on one of the layouts that it reads.
struct ArmPath {
  Implementation row;
  std::string layout;
  std::int64_t most_rows = kAny;        ///< that it serves from this layout
  Target target{.arch = Arch::aarch64}; ///< that it is compiled for
};

inline std::string name_of(const ArmPath& path) {
  return fmt::format("{} on {}", kiln::name_of(path.row.isa), path.layout);
}

inline KernelDesc canonical(std::int64_t m, std::int64_t n, std::int64_t k) {
  return int8_mm::op().canonical(int8_mm::make_desc(m, n, k));
}

inline CodeObject compile(const ArmPath& path, std::int64_t m, std::int64_t n, std::int64_t k) {
  Result<CodeObject> code = path.row.compile(canonical(m, n, k), path.target, path.layout);
  REQUIRE_MESSAGE(code.is_ok(), (code ? "" : code.status().message()));
  return std::move(*code);
}

inline CodeObject compile(const ArmPath& path, const KernelDesc& desc) {
  Result<CodeObject> code = path.row.compile(desc, path.target, path.layout);
  REQUIRE_MESSAGE(code.is_ok(), (code ? "" : code.status().message()));
  return std::move(*code);
}

inline bool serves(const ArmPath& path, std::int64_t m) {
  return path.most_rows == kAny || m <= path.most_rows;
}

inline constexpr std::int64_t kOneOfEachClass[] = {1, 2, 4, 8, 16, 32, 33};

// ---------------------------------------------------------------- what the code looks like

/// Under an emulator the host's programs are out of reach; the code is the same there.
inline bool has_llvm_mc() {
  return !is_emulated() && std::system("command -v llvm-mc-19 >/dev/null") == 0;
}

inline std::vector<std::string> listing(const CodeObject& code) {
  std::vector<std::uint32_t> words(code.image.size() / 4);
  std::memcpy(words.data(), code.image.data(), code.image.size());
  return disassemble(words);
}

inline bool begins_with(const std::string& line, std::initializer_list<const char*> mnemonics) {
  return std::any_of(mnemonics.begin(), mnemonics.end(),
                     [&](const char* mnemonic) { return line.starts_with(std::string(mnemonic) + " "); });
}

inline bool is_load(const std::string& line) {
  return begins_with(line, {"ldr", "ldp", "ld1b", "ld1rqb", "ld1rw", "ld1rd"});
}

/// x8 runs along A, x10 … x13 along the panels.
inline bool is_load_of_a(const std::string& line) {
  return is_load(line) && line.find("[x8") != std::string::npos;
}

/// The loops through K: bodies that end in a branch back over products, and contain no other branch.
inline std::vector<std::vector<std::string>> k_loops(const std::vector<std::string>& lines) {
  std::vector<std::vector<std::string>> loops;
  for (std::size_t i = 0; i < lines.size(); ++i) {
    int distance = 0;
    if (std::sscanf(lines[i].c_str(), "b.ne #%d", &distance) != 1 || distance >= 0)
      continue;
    std::vector<std::string> body(lines.begin() + static_cast<std::ptrdiff_t>(i) + distance / 4,
                                  lines.begin() + static_cast<std::ptrdiff_t>(i) + 1);
    const auto is_product = [](const std::string& l) { return begins_with(l, {"sdot", "smmla", "smull", "smull2"}); };
    const auto branches = [](const std::string& l) { return l[0] == 'b' || begins_with(l, {"tbz", "tbnz"}); };
    if (std::any_of(body.begin(), body.end(), is_product) && std::count_if(body.begin(), body.end(), branches) == 1)
      loops.push_back(std::move(body));
  }
  return loops;
}

struct Mix {
  int products = 0, weight_loads = 0, a_loads = 0, others = 0;
};

inline Mix mix_of(const std::vector<std::string>& loop) {
  Mix mix;
  for (const std::string& line : loop)
    if (begins_with(line, {"sdot", "smmla", "smull", "smull2", "sadalp"}))
      ++mix.products;
    else if (is_load(line))
      ++(is_load_of_a(line) ? mix.a_loads : mix.weight_loads);
    else
      ++mix.others;
  return mix;
}

#if defined(__aarch64__)

// ---------------------------------------------------------------- what the code computes

/// Calls `check(path)` for each path that this machine can execute. Says once which are left out.
template <class Check> void for_each_runnable(const std::vector<ArmPath>& paths, Check check) {
  const Target machine = detect_machine().target;
  for (const ArmPath& path : paths) {
    if (!machine.features.contains(path.row.needs) ||
        (path.row.vector_bits != nullptr && path.row.vector_bits(path.target) != path.row.vector_bits(machine))) {
      MESSAGE("not run here, the machine lacks its features: ", name_of(path));
      continue;
    }
    INFO(name_of(path));
    check(path);
  }
}

inline void check_kernel(const ArmPath& path, const KernelCase& c, std::mt19937& random) {
  check_int8_mm_kernel(compile(path, c.m, c.n, c.k), c, random, call_and_check_registers);
}

inline void check_every_m(const std::vector<ArmPath>& paths) {
  constexpr unsigned kSeed = 30;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  // Classes up to 32 whole; of the unbounded one more than a period of every path's row split (8 · 8 rows), in odd
  // steps.
  std::vector<std::int64_t> rows;
  for (std::int64_t m = 1; m <= 40; ++m)
    rows.push_back(m);
  for (std::int64_t m = 43; m <= 130; m += 9)
    rows.push_back(m);
  for_each_runnable(paths, [&](const ArmPath& path) {
    int turn = 0;
    for (const std::int64_t m : rows) {
      if (!serves(path, m))
        continue;
      for (const Guard guard : {Guard::after, Guard::before}) {
        const std::int64_t n = 1 + random() % (m > 40 ? 40 : 130), k = 1 + random() % (m % 3 == 0 ? 150 : 50);
        check_kernel(path, {.m = m, .n = n, .k = k, .n_cut = n, .values = kAllValues[turn++ % 4], .guard = guard},
                     random);
      }
    }
  });
}

inline void check_all_values(const std::vector<ArmPath>& paths) {
  constexpr unsigned kSeed = 31;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable(paths, [&](const ArmPath& path) {
    for (const std::int64_t m : {1, 2, 4, 7, 13, 35})
      for (const Values values : kAllValues)
        if (serves(path, m))
          check_kernel(path, {.m = m, .n = 29, .k = 200, .n_cut = 29, .values = values, .guard = Guard::after}, random);
  });
}

inline void check_every_remainder(const std::vector<ArmPath>& paths) {
  constexpr unsigned kSeed = 32;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable(paths, [&](const ArmPath& path) {
    const std::int64_t block = int8_mm::PackLayout::parse(path.layout)->n_block;
    for (const std::int64_t m : {1, 2, 3, 6, 15, 33}) {
      if (!serves(path, m))
        continue;
      for (std::int64_t k = 0; k <= 67; k += m < 15 ? 1 : 3) {
        const std::int64_t n = 1 + random() % 40;
        check_kernel(path, {.m = m, .n = n, .k = k, .n_cut = n, .values = Values::random, .guard = Guard::after},
                     random);
      }
      // One tile of columns and more: of four panels at most.
      const std::int64_t tiles = (m <= 2 ? 5 : 2) * block, last = std::min<std::int64_t>(tiles, 150);
      std::vector<std::int64_t> columns;
      for (std::int64_t n = 1; n <= last; n += last > 60 ? 3 : 1)
        columns.push_back(n);
      for (std::int64_t n = block; n <= tiles; n += block)
        if (n > last)
          columns.insert(columns.end(), {n - 1, n, n + 1});
      for (const std::int64_t n : columns)
        check_kernel(path, {.m = m, .n = n, .k = 21, .n_cut = n, .values = Values::random, .guard = Guard::after},
                     random);
    }
  });
}

inline void check_column_ranges(const std::vector<ArmPath>& paths) {
  constexpr unsigned kSeed = 33;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable(paths, [&](const ArmPath& path) {
    for (const std::int64_t m : {1, 2, 4, 8, 16, 40}) {
      if (!serves(path, m))
        continue;
      const std::int64_t step = int8_mm::Plan::from(compile(path, m, 333, 30).plan)->n_step;
      const std::int64_t n = std::max<std::int64_t>(333, 2 * step + 13), k = 30;
      for (const std::int64_t steps : {1, 2})
        check_kernel(path,
                     {.m = m, .n = n, .k = k, .n_cut = steps * step, .values = Values::random, .guard = Guard::after},
                     random);
    }
  });
}

/// Every stage and type, with the registers and the workspace that a caller gives.
inline void check_epilogues(const std::vector<ArmPath>& paths) {
  constexpr unsigned kSeed = 36;
  INFO("seed ", kSeed);
  std::mt19937 random(kSeed);
  for_each_runnable(paths, [&](ArmPath path) {
    path.target.features = detect_machine().target.features; // u8 rows by what it has for them
    const std::int64_t block = int8_mm::PackLayout::parse(path.layout)->n_block;
    const std::int64_t n = block > 24 ? std::min<std::int64_t>(block + 5, 197) : 2 * block - 3;
    int turn = 0;
    for (const std::int64_t m : {1, 2, 3, 5, 9, 16, 33})
      if (serves(path, m))
        for (const KernelDesc& desc : finished_descs(m, n, m % 2 == 1 ? 21 : 16)) {
          const Guard guard = ++turn % 2 == 0 ? Guard::before : Guard::after;
          check_finished_kernel(compile(path, desc), desc,
                                {.m = m,
                                 .n = n,
                                 .k = desc.value[int8_mm::kK],
                                 .n_cut = kAny,
                                 .values = kAllValues[turn % 4],
                                 .guard = guard},
                                random, call_and_check_registers);
        }
  });
}

inline void check_sums_wrap(const std::vector<ArmPath>& paths) {
  std::mt19937 random(34);
  // 2^17 products of (−128)·(−128) are 2^31: one more than s32 holds.
  constexpr std::int64_t k = std::int64_t{1} << 17;
  for_each_runnable(paths, [&](const ArmPath& path) {
    // Wide panels would only take memory and time: n is 3.
    if (int8_mm::PackLayout::parse(path.layout)->n_block > std::max(12, path.target.sve_bits / 128 * 12))
      return;
    for (const std::int64_t m : {1, 5})
      if (serves(path, m))
        check_kernel(path, {.m = m, .n = 3, .k = k, .n_cut = 3, .values = Values::all_lowest, .guard = Guard::after},
                     random);
  });
}

#endif

} // namespace kiln::test
