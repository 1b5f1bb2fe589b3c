#include <doctest/doctest.h>

#include <asmjit/core.h>

#include <asmjit/arm/a64assembler.h>

#include <fmt/format.h>
#include <map>
#include <regex>
#include <string>
#include <vector>

#include "backends/arm/emit.h"
#include "backends/arm/sve_words.h"
#include "tests/llvm_mc.h"

// Every function of sve_words.h over the extremes of each operand, all others varied with it, against llvm-mc.
using namespace kiln::arm::sve;
using asmjit::a64::sp;
using asmjit::a64::w;
using asmjit::a64::x;
using asmjit::a64::xzr;

namespace {

struct Example {
  std::string text;
  Word word;
};

std::string name(const Gp& reg) {
  return reg.isZR() ? "xzr" : reg.isSP() ? "sp" : fmt::format("x{}", reg.id());
}

const std::vector<std::uint32_t> kVectors = {0, 1, 15, 16, 30, 31}, kGoverning = {0, 1, 2, 6, 7},
                                 kPredicates = {0, 1, 8, 14, 15}, kTiles = {0, 1, 2, 3},
                                 kSliceRegisters = {12, 13, 14, 15};
const std::vector<Gp> kRegisters = {x(0), x(1), x(15), x(16), x(30)}, kBases = {x(0), x(1), x(17), x(30), sp};
const std::vector<Element> kElements = {Element::b, Element::h, Element::s, Element::d};
constexpr const char* kElementNames[] = {"b", "h", "s", "d"};
const char* name(Element e) {
  return kElementNames[static_cast<int>(e)];
}

/// Each list through all of its values while the others hold their first, their last and one between: what a swapped
/// or truncated field would show.
template <class F, class... T> void sweep(F&& f, const std::vector<T>&... lists) {
  const std::size_t most = std::max({lists.size()...});
  for (std::size_t i = 0; i < most; ++i)
    for (std::size_t fixed = 0; fixed < 3; ++fixed) {
      for (std::size_t moving = 0; moving < sizeof...(lists); ++moving) {
        std::size_t position = 0;
        const auto pick = [&](const auto& list) {
          const std::size_t at = position++ == moving ? i % list.size() : fixed * (list.size() - 1) / 2;
          return list[at];
        };
        // Braces keep the order of the picks.
        std::tuple<T...> values{pick(lists)...};
        std::apply(f, values);
      }
    }
}

std::vector<Example> examples() {
  std::vector<Example> all;
  const auto add_example = [&](std::string text, Word word) { all.push_back({std::move(text), word}); };
  using U = std::uint32_t;
  using I = int;

  // Vector length.
  const std::vector<I> multiples = {-32, -31, -1, 0, 1, 30, 31};
  sweep([&](Gp r, I i) { add_example(fmt::format("rdvl {}, #{}", name(r), i), rdvl(r, i)); }, kRegisters, multiples);
  sweep([&](Gp r, I i) { add_example(fmt::format("rdsvl {}, #{}", name(r), i), rdsvl(r, i)); }, kRegisters, multiples);

  // Predicates.
  sweep([&](Element e, U p) { add_example(fmt::format("ptrue p{}.{}", p, name(e)), ptrue(e, P{p})); }, kElements,
        kPredicates);
  const std::vector<Gp> limits = {x(0), x(1), x(17), x(30), xzr};
  sweep(
      [&](Element e, U p, Gp n, Gp m) {
        add_example(fmt::format("whilelt p{}.{}, {}, {}", p, name(e), name(n), name(m)), whilelt(e, P{p}, n, m));
      },
      kElements, kPredicates, limits, limits);

  const auto compare = [&](const char* operation, Word (*word)(Element, P, P, Z, int)) {
    sweep(
        [&](Element e, U d, U g, U n, I i) {
          add_example(fmt::format("{0} p{2}.{1}, p{3}/z, z{4}.{1}, #{5}", operation, name(e), d, g, n, i),
                      word(e, P{d}, P{g}, Z{n}, i));
        },
        kElements, kPredicates, kGoverning, kVectors, std::vector<I>{-16, -15, -1, 0, 1, 15});
  };
  compare("cmplt", cmplt);
  compare("cmpgt", cmpgt);
  compare("cmpeq", cmpeq);
  sweep(
      [&](U d, U g, U n, U m) {
        add_example(fmt::format("fcmlt p{}.s, p{}/z, z{}.s, #0.0", d, g, n), fcmlt_zero(P{d}, P{g}, Z{n}));
        add_example(fmt::format("fcmgt p{}.s, p{}/z, z{}.s, z{}.s", d, g, n, m), fcmgt(P{d}, P{g}, Z{n}, Z{m}));
      },
      kPredicates, kGoverning, kVectors, kVectors);

  // Memory.
  const std::vector<I> near = {-8, -7, -1, 0, 1, 6, 7};
  const auto vl = [](I i) { return i == 0 ? std::string() : fmt::format(", #{}, mul vl", i); };
  const auto bytes = [](I i) { return i == 0 ? std::string() : fmt::format(", #{}", i); };
  const auto loads = [&](const char* format, Word (*word)(Z, P, const Gp&, int), const std::vector<I>& immediates,
                         const auto& suffix) {
    sweep(
        [&](U z, U p, Gp base, I i) {
          add_example(fmt::format(fmt::runtime(format), z, p, name(base), suffix(i)), word(Z{z}, P{p}, base, i));
        },
        kVectors, kGoverning, kBases, immediates);
  };
  loads("ld1b {{ z{}.b }}, p{}/z, [{}{}]", ld1b, near, vl);
  loads("ld1rqb {{ z{}.b }}, p{}/z, [{}{}]", ld1rqb, {-128, -112, -16, 0, 16, 96, 112}, bytes);
  loads("ld1rw {{ z{}.s }}, p{}/z, [{}{}]", ld1rw, {0, 4, 128, 248, 252}, bytes);
  loads("ld1rd {{ z{}.d }}, p{}/z, [{}{}]", ld1rd, {0, 8, 256, 496, 504}, bytes);
  sweep(
      [&](U z, Gp base, I i) {
        add_example(fmt::format("ldr z{}, [{}{}]", z, name(base), vl(i)), ldr(Z{z}, base, i));
        add_example(fmt::format("str z{}, [{}{}]", z, name(base), vl(i)), str(Z{z}, base, i));
      },
      kVectors, kBases, std::vector<I>{-256, -255, -8, -7, -1, 0, 1, 7, 8, 254, 255});

  loads("ld1w {{ z{}.s }}, p{}/z, [{}{}]", ld1w, near, vl);
  sweep(
      [&](Element e, U z, U p, Gp base, I i) {
        constexpr const char* kNames[] = {"st1b", "st1h", "st1w"};
        add_example(fmt::format("{} {{ z{}.s }}, p{}, [{}{}]", kNames[static_cast<int>(e)], z, p, name(base), vl(i)),
                    st1_of_s(e, Z{z}, P{p}, base, i));
      },
      std::vector<Element>{Element::b, Element::h, Element::s}, kVectors, kGoverning, kBases, near);

  // Vectors.
  sweep([&](Element e, U z, I i) { add_example(fmt::format("mov z{}.{}, #{}", z, name(e), i), dup(e, Z{z}, i)); },
        kElements, kVectors, std::vector<I>{-128, -127, -1, 0, 1, 127});
  sweep(
      [&](Element e, U z, Gp r) {
        const std::string from = e == Element::d ? name(r) : fmt::format("w{}", r.id());
        add_example(fmt::format("mov z{}.{}, {}", z, name(e), from), dup(e, Z{z}, r));
      },
      kElements, kVectors, kRegisters);
  sweep(
      [&](U d, U n, U m) {
        add_example(fmt::format("sdot z{}.s, z{}.b, z{}.b", d, n, m), sdot(Z{d}, Z{n}, Z{m}));
        add_example(fmt::format("smmla z{}.s, z{}.b, z{}.b", d, n, m), smmla(Z{d}, Z{n}, Z{m}));
      },
      kVectors, kVectors, kVectors);
  using Three = Word (*)(Element, Z, Z, Z);
  for (const auto& [operation, word] : std::map<std::string, Three>{{"add", add}, {"uzp1", uzp1}, {"uzp2", uzp2}})
    sweep(
        [&, word = word, operation = operation](Element e, U d, U n, U m) {
          add_example(fmt::format("{0} z{2}.{1}, z{3}.{1}, z{4}.{1}", operation, name(e), d, n, m),
                      word(e, Z{d}, Z{n}, Z{m}));
        },
        kElements, kVectors, kVectors, kVectors);

  for (const auto& [operation, word] : std::map<std::string, Three>{{"sub", sub}, {"trn1", trn1}})
    sweep(
        [&, word = word, operation = operation](Element e, U d, U n, U m) {
          add_example(fmt::format("{0} z{2}.{1}, z{3}.{1}, z{4}.{1}", operation, name(e), d, n, m),
                      word(e, Z{d}, Z{n}, Z{m}));
        },
        kElements, kVectors, kVectors, kVectors);
  using WithImmediate = Word (*)(Element, Z, int);
  const auto immediates = [&](const char* operation, WithImmediate word, const std::vector<I>& values) {
    sweep(
        [&](Element e, U z, I i) {
          add_example(fmt::format("{0} z{2}.{1}, z{2}.{1}, #{3}", operation, name(e), z, i), word(e, Z{z}, i));
        },
        kElements, kVectors, values);
  };
  const std::vector<I> natural = {0, 1, 127, 128, 254, 255}, integers = {-128, -127, -1, 0, 1, 127};
  immediates("add", add, natural);
  immediates("sub", sub, natural);
  immediates("subr", subr, natural);
  immediates("umin", umin, natural);
  immediates("smax", smax, integers);
  immediates("smin", smin, integers);
  for (const U z : kVectors) {
    add_example(fmt::format("and z{0}.s, z{0}.s, #1", z), and_one(Element::s, Z{z}));
    add_example(fmt::format("and z{0}.d, z{0}.d, #1", z), and_one(Element::d, Z{z}));
    add_example(fmt::format("orr z{0}.d, z{0}.d, #0xfffffffffffffffe", z), or_not_one(Z{z}));
  }
  for (const Element e : kElements) {
    const I bits = 8 << static_cast<int>(e);
    sweep(
        [&](U d, U n, I i) {
          add_example(fmt::format("asr z{1}.{0}, z{2}.{0}, #{3}", name(e), d, n, i), asr(e, Z{d}, Z{n}, i));
          add_example(fmt::format("lsr z{1}.{0}, z{2}.{0}, #{3}", name(e), d, n, i), lsr(e, Z{d}, Z{n}, i));
        },
        kVectors, kVectors, std::vector<I>{1, 2, bits / 2 - 1, bits / 2, bits - 1, bits});
  }
  using Merging = Word (*)(Element, Z, P, Z);
  for (const auto& [operation, word] : std::map<std::string, Merging>{
           {"add", add}, {"mul", mul}, {"smax", smax}, {"smin", smin}, {"asr", asr}, {"lsl", lsl}, {"srshl", srshl}})
    sweep(
        [&, word = word, operation = operation](Element e, U d, U g, U m) {
          add_example(fmt::format("{0} z{2}.{1}, p{3}/m, z{2}.{1}, z{4}.{1}", operation, name(e), d, g, m),
                      word(e, Z{d}, P{g}, Z{m}));
        },
        kElements, kVectors, kGoverning, kVectors);
  sweep(
      [&](Element e, U d, U g, U n, U m) {
        add_example(fmt::format("neg z{1}.{0}, p{2}/m, z{3}.{0}", name(e), d, g, n), neg(e, Z{d}, P{g}, Z{n}));
        add_example(fmt::format("mla z{1}.{0}, p{2}/m, z{3}.{0}, z{4}.{0}", name(e), d, g, n, m),
                    mla(e, Z{d}, P{g}, Z{n}, Z{m}));
        add_example(fmt::format("mad z{1}.{0}, p{2}/m, z{3}.{0}, z{4}.{0}", name(e), d, g, n, m),
                    mad(e, Z{d}, P{g}, Z{n}, Z{m}));
        add_example(fmt::format("sel z{1}.{0}, p{2}, z{3}.{0}, z{4}.{0}", name(e), d, g, n, m),
                    sel(e, Z{d}, P{g}, Z{n}, Z{m}));
      },
      kElements, kVectors, kGoverning, kVectors, kVectors);
  sweep(
      [&](U d, U g, U n) {
        add_example(fmt::format("sxtw z{}.d, p{}/m, z{}.d", d, g, n), sxtw(Z{d}, P{g}, Z{n}));
        add_example(fmt::format("uxtw z{}.d, p{}/m, z{}.d", d, g, n), uxtw(Z{d}, P{g}, Z{n}));
        add_example(fmt::format("scvtf z{}.s, p{}/m, z{}.s", d, g, n), scvtf(Z{d}, P{g}, Z{n}));
        add_example(fmt::format("frintn z{}.s, p{}/m, z{}.s", d, g, n), frintn(Z{d}, P{g}, Z{n}));
        add_example(fmt::format("fcvtzs z{}.s, p{}/m, z{}.s", d, g, n), fcvtzs(Z{d}, P{g}, Z{n}));
        add_example(fmt::format("fcvt z{}.h, p{}/m, z{}.s", d, g, n), fcvt_h(Z{d}, P{g}, Z{n}));
        add_example(fmt::format("fmul z{0}.s, p{1}/m, z{0}.s, z{2}.s", d, g, n), fmul(Z{d}, P{g}, Z{n}));
        add_example(fmt::format("fmaxnm z{0}.s, p{1}/m, z{0}.s, z{2}.s", d, g, n), fmaxnm(Z{d}, P{g}, Z{n}));
      },
      kVectors, kGoverning, kVectors);
  sweep(
      [&](U d, U g, U n, U m) {
        add_example(fmt::format("fmla z{}.s, p{}/m, z{}.s, z{}.s", d, g, n, m), fmla(Z{d}, P{g}, Z{n}, Z{m}));
        add_example(fmt::format("fmad z{}.s, p{}/m, z{}.s, z{}.s", d, g, n, m), fmad(Z{d}, P{g}, Z{n}, Z{m}));
      },
      kVectors, kGoverning, kVectors, kVectors);
  sweep(
      [&](U d, U n, U m, I index) {
        add_example(fmt::format("fmul z{}.s, z{}.s, z{}.s[{}]", d, n, m, index), fmul(Z{d}, Z{n}, Z{m}, index));
      },
      kVectors, kVectors, kGoverning, std::vector<I>{0, 1, 2, 3});
  using Long = Word (*)(Z, Z, Z);
  for (const auto& [operation, word] : std::map<std::string, Long>{{"smullb", smullb},
                                                                   {"smullt", smullt},
                                                                   {"umullb", umullb},
                                                                   {"umullt", umullt},
                                                                   {"smlalb", smlalb},
                                                                   {"smlalt", smlalt}})
    sweep(
        [&, word = word, operation = operation](U d, U n, U m) {
          add_example(fmt::format("{} z{}.d, z{}.s, z{}.s", operation, d, n, m), word(Z{d}, Z{n}, Z{m}));
        },
        kVectors, kVectors, kVectors);
  sweep(
      [&](U d, U n, U m) {
        add_example(fmt::format("fmul z{}.s, z{}.s, z{}.s", d, n, m), fmul(Z{d}, Z{n}, Z{m}));
        for (const Element e : kElements)
          add_example(fmt::format("sclamp z{1}.{0}, z{2}.{0}, z{3}.{0}", name(e), d, n, m),
                      sclamp(e, Z{d}, Z{n}, Z{m}));
        add_example(fmt::format("udot z{}.s, z{}.b, z{}.b", d, n, m), udot(Z{d}, Z{n}, Z{m}));
        add_example(fmt::format("usdot z{}.s, z{}.b, z{}.b", d, n, m), usdot(Z{d}, Z{n}, Z{m}));
        add_example(fmt::format("usmmla z{}.s, z{}.b, z{}.b", d, n, m), usmmla(Z{d}, Z{n}, Z{m}));
      },
      kVectors, kVectors, kVectors);

  // SME.
  for (const auto& [text, mode] : std::map<std::string, Mode>{{" sm", Mode::sm}, {" za", Mode::za}, {"", Mode::both}}) {
    add_example("smstart" + text, smstart(mode));
    add_example("smstop" + text, smstop(mode));
  }
  for (const Gp& r : kRegisters) {
    add_example("mrs " + name(r) + ", TPIDR2_EL0", mrs_tpidr2(r));
    add_example("msr TPIDR2_EL0, " + name(r), msr_tpidr2(r));
  }
  for (U mask = 0; mask < 256; ++mask) {
    std::string list;
    for (int i = 0; i < 8; ++i)
      if (mask >> i & 1)
        list += fmt::format("{}za{}.d", list.empty() ? "" : ", ", i);
    add_example("zero {" + list + "}", zero(mask));
  }
  const std::vector<Slice> slices = {Slice::horizontal, Slice::vertical};
  const auto slice = [](U tile, Slice s, U ws, I offset) {
    return fmt::format("za{}{}.s[w{}, {}]", tile, s == Slice::horizontal ? "h" : "v", ws, offset);
  };
  const std::vector<I> offsets = {0, 1, 2, 3};
  sweep(
      [&](U tile, Slice s, U ws, I offset, U p, Gp base, Gp index) {
        const std::string memory =
            index.isZR() ? fmt::format("[{}]", name(base)) : fmt::format("[{}, {}, lsl #2]", name(base), name(index));
        add_example(fmt::format("st1w {{ {} }}, p{}, {}", slice(tile, s, ws, offset), p, memory),
                    st1w(ZaTile{tile}, s, w(ws), offset, P{p}, base, index));
      },
      kTiles, slices, kSliceRegisters, offsets, kGoverning, kBases, limits);
  sweep(
      [&](Slice s, U ws, I offset, U p, Gp base, Gp index) {
        const std::string memory =
            index.isZR() ? fmt::format("[{}]", name(base)) : fmt::format("[{}, {}]", name(base), name(index));
        add_example(fmt::format("ld1b {{ za0{}.b[w{}, {}] }}, p{}/z, {}", s == Slice::horizontal ? "h" : "v", ws,
                                offset, p, memory),
                    ld1b_za(s, w(ws), offset, P{p}, base, index));
      },
      slices, kSliceRegisters, std::vector<I>{0, 1, 7, 8, 14, 15}, kGoverning, kBases, limits);
  sweep(
      [&](U ws, I offset, Gp base) {
        add_example(fmt::format("str za[w{}, {}], [{}{}]", ws, offset, name(base), vl(offset)),
                    str_za(w(ws), offset, base));
      },
      kSliceRegisters, std::vector<I>{0, 1, 7, 8, 14, 15}, kBases);
  sweep(
      [&](U tile, U pn, U pm, U n, U m) {
        add_example(fmt::format("smopa za{}.s, p{}/m, p{}/m, z{}.b, z{}.b", tile, pn, pm, n, m),
                    smopa(ZaTile{tile}, P{pn}, P{pm}, Z{n}, Z{m}));
        add_example(fmt::format("usmopa za{}.s, p{}/m, p{}/m, z{}.b, z{}.b", tile, pn, pm, n, m),
                    usmopa(ZaTile{tile}, P{pn}, P{pm}, Z{n}, Z{m}));
        add_example(fmt::format("addha za{}.s, p{}/m, p{}/m, z{}.s", tile, pn, pm, n),
                    addha(ZaTile{tile}, P{pn}, P{pm}, Z{n}));
        add_example(fmt::format("addva za{}.s, p{}/m, p{}/m, z{}.s", tile, pn, pm, n),
                    addva(ZaTile{tile}, P{pn}, P{pm}, Z{n}));
      },
      kTiles, kGoverning, kGoverning, kVectors, kVectors);
  sweep(
      [&](U z, U p, U tile, Slice s, U ws, I offset) {
        add_example(fmt::format("mov z{}.s, p{}/m, {}", z, p, slice(tile, s, ws, offset)),
                    mova(Z{z}, P{p}, ZaTile{tile}, s, w(ws), offset));
      },
      kVectors, kGoverning, kTiles, slices, kSliceRegisters, offsets);
  // One that overwrites its operand follows, as it must.
  sweep(
      [&](U d, U n) {
        add_example(fmt::format("movprfx z{}, z{}", d, n), movprfx(Z{d}, Z{n}));
        add_example(fmt::format("asr z{0}.d, p0/m, z{0}.d, z{1}.d", d, (d + 1) % 32),
                    asr(Element::d, Z{d}, P{0}, Z{(d + 1) % 32}));
      },
      kVectors, kVectors);
  return all;
}

/// Registers that the text names: bit i for x{i} and w{i}, or for z{i}.
std::uint32_t named(const std::string& text, const std::regex& reg) {
  std::uint32_t mask = 0;
  for (std::sregex_iterator at(text.begin(), text.end(), reg), end; at != end; ++at)
    mask |= 1u << std::stoi((*at)[1]);
  return mask;
}

} // namespace

TEST_CASE("every word is what llvm-mc-19 makes of its text, and names the registers of the text") {
  const std::vector<Example> all = examples();
  std::vector<std::string> lines;
  for (const Example& example : all)
    lines.push_back(example.text);
  const std::vector<std::uint32_t> expected = kiln::test::assemble(lines);
  const std::regex general("\\b[xw](\\d+)"), vectors("\\bz(\\d+)");
  for (std::size_t i = 0; i < all.size(); ++i) {
    INFO(all[i].text);
    CHECK(all[i].word.bits == expected[i]);
    CHECK(all[i].word.general == named(all[i].text, general));
    CHECK(all[i].word.vectors == named(all[i].text, vectors));
  }
  MESSAGE(all.size(), " instructions");
}

TEST_CASE("an operand out of its range gives an empty word") {
  const Word refused[] = {rdvl(x(0), 32),
                          rdsvl(x(0), -33),
                          ptrue(Element::b, P{16}),
                          ld1b(Z{32}, P{0}, x(0), 0),
                          ld1b(Z{0}, P{8}, x(0), 0),
                          ld1b(Z{0}, P{0}, x(0), 8),
                          ldr(Z{0}, x(0), 256),
                          ldr(Z{32}, x(0), 0),
                          str(Z{0}, x(0), -257),
                          ld1rqb(Z{0}, P{0}, x(0), 8),
                          ld1rqb(Z{0}, P{0}, x(0), 128),
                          ld1rw(Z{0}, P{0}, x(0), -4),
                          ld1rd(Z{0}, P{0}, x(0), 512),
                          ld1rd(Z{0}, P{0}, x(0), 4),
                          dup(Element::s, Z{0}, 128),
                          ld1w(Z{0}, P{0}, x(0), 8),
                          st1_of_s(Element::d, Z{0}, P{0}, x(0), 0),
                          st1_of_s(Element::b, Z{0}, P{8}, x(0), 0),
                          cmplt(Element::s, P{0}, P{0}, Z{0}, 16),
                          cmpgt(Element::s, P{0}, P{0}, Z{0}, -17),
                          add(Element::s, Z{0}, 256),
                          subr(Element::s, Z{0}, -1),
                          smax(Element::s, Z{0}, 128),
                          umin(Element::s, Z{0}, -1),
                          and_one(Element::h, Z{0}),
                          asr(Element::s, Z{0}, Z{0}, 0),
                          lsr(Element::s, Z{0}, Z{0}, 33),
                          neg(Element::s, Z{0}, P{8}, Z{0}),
                          mova(Z{0}, P{0}, ZaTile{4}, Slice::horizontal, w(12), 0),
                          mova(Z{0}, P{0}, ZaTile{0}, Slice::horizontal, w(12), 4),
                          addha(ZaTile{0}, P{8}, P{0}, Z{0}),
                          usmopa(ZaTile{0}, P{0}, P{8}, Z{0}, Z{0}),
                          fmul(Z{0}, Z{0}, Z{8}, 0),
                          fmul(Z{0}, Z{0}, Z{0}, 4),
                          zero(256),
                          str_za(w(11), 0, x(0)),
                          str_za(w(16), 0, x(0)),
                          str_za(w(12), 16, x(0)),
                          smopa(ZaTile{4}, P{0}, P{0}, Z{0}, Z{0}),
                          smopa(ZaTile{0}, P{8}, P{0}, Z{0}, Z{0}),
                          st1w(ZaTile{0}, Slice::vertical, w(12), 4, P{0}, x(0), x(0)),
                          ld1b_za(Slice::vertical, w(12), 16, P{0}, x(0), x(0))};
  for (const Word& word : refused) {
    CAPTURE(&word - refused);
    CHECK(word.bits == 0);
  }
  kiln::arm::Assembler a;
  a.word(dup(Element::s, Z{0}, 128));
  CHECK(a.finish({}, 0, {}).status().code() == kiln::Code::compile_failed);
}

TEST_CASE("words are constants") {
  static_assert(smstart(Mode::both).bits == 0xd503477f);
  static_assert(smopa(ZaTile{1}, P{0}, P{0}, Z{2}, Z{3}).vectors == 0b1100);
}
