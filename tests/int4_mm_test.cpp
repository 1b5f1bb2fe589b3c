#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "api/session.h"
#include "backends/table.h"
#include "cache/file.h"
#include "jit/bf16.h"
#include "jit/ops/int4_mm_driver.h"
#include "tests/test_engine.h"

/// int4_mm without a GPU: both forms of the weights, the reference and the packs, against vectors made by PyTorch
/// (tests/data/int4/README.md).

using namespace kiln;
using namespace kiln::int4_mm;

namespace {

/// The data of a .npy file, whose shape its name tells.
template <class T> std::vector<T> data_of(const std::string& path) {
  const Result<Bytes> file = read_file(path);
  REQUIRE(file.is_ok());
  const std::size_t begin = 10 + (*file)[8] + 256u * (*file)[9];
  std::vector<T> data((file->size() - begin) / sizeof(T));
  std::memcpy(data.data(), file->data() + begin, data.size() * sizeof(T));
  return data;
}

struct Vector {
  std::string name;
  std::int64_t n, k, tiles, group, m;
  std::vector<std::uint8_t> w;
  std::vector<std::int32_t> packed;
  std::vector<std::uint16_t> sz, x, y;
};

std::vector<Vector> vectors() {
  std::vector<Vector> all;
  std::set<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator(KILN_TEST_DATA "/int4"))
    if (file.path().extension() == ".npy")
      names.insert(file.path().stem().stem());
  const std::regex form("n(\\d+)_k(\\d+)_t(\\d+)_g(\\d+)_m(\\d+)");
  for (const std::string& name : names) {
    std::smatch match;
    REQUIRE(std::regex_match(name, match, form));
    const std::string path = KILN_TEST_DATA "/int4/" + name;
    all.push_back({name, std::stoll(match[1]), std::stoll(match[2]), std::stoll(match[3]), std::stoll(match[4]),
                   std::stoll(match[5]), data_of<std::uint8_t>(path + ".w.npy"),
                   data_of<std::int32_t>(path + ".packed.npy"), data_of<std::uint16_t>(path + ".sz.npy"),
                   data_of<std::uint16_t>(path + ".x.npy"), data_of<std::uint16_t>(path + ".y.npy")});
  }
  REQUIRE(all.size() >= 6);
  return all;
}

/// ‖actual − expected‖ / ‖expected‖
double relative_error(const std::vector<std::uint16_t>& actual, const std::vector<std::uint16_t>& expected) {
  double error = 0, norm = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double e = float_of_bf16(expected[i]), d = float_of_bf16(actual[i]) - e;
    error += d * d;
    norm += e * e;
  }
  return std::sqrt(error / norm);
}

} // namespace

TEST_CASE("both forms of the weights turn into each other as PyTorch's do") {
  for (const Vector& v : vectors()) {
    CAPTURE(v.name);
    REQUIRE(v.w.size() == static_cast<std::size_t>(v.n * v.k / 2));
    REQUIRE(v.packed.size() * 4 == v.w.size());
    std::vector<std::int32_t> packed(v.packed.size());
    std::vector<std::uint8_t> plain(v.w.size());
    plain_to_tensor_core(v.w.data(), v.n, v.k, v.tiles, packed.data());
    CHECK(packed == v.packed);
    tensor_core_to_plain(v.packed.data(), v.n, v.k, v.tiles, plain.data());
    CHECK(plain == v.w);
  }
}

TEST_CASE("every T and a shape of several blocks: there and back is the same") {
  for (const std::int64_t tiles : {2, 4, 8}) {
    const std::int64_t n = 40, k = 16 * tiles * 3;
    std::vector<std::uint8_t> plain(static_cast<std::size_t>(n * k / 2)), back(plain.size());
    for (std::size_t i = 0; i < plain.size(); ++i)
      plain[i] = static_cast<std::uint8_t>(i * 37 + i / 256);
    std::vector<std::int32_t> packed(plain.size() / 4);
    plain_to_tensor_core(plain.data(), n, k, tiles, packed.data());
    tensor_core_to_plain(packed.data(), n, k, tiles, back.data());
    CHECK(back == plain);
  }
}

TEST_CASE("the reference is the exact product rounded; PyTorch's kernel is as near as its sums in f32 and bf16 weights "
          "let it") {
  for (const Vector& v : vectors()) {
    CAPTURE(v.name);
    std::vector<std::uint16_t> y(v.y.size());
    reference(v.m, v.n, v.k, v.group, v.x.data(), v.k, v.w.data(), v.sz.data(), y.data(), v.n);
    double theirs = 0, norm = 0;
    for (std::int64_t i = 0; i < v.m; ++i)
      for (std::int64_t j = 0; j < v.n; ++j) {
        long double exact = 0;
        for (std::int64_t p = 0; p < v.k; ++p) {
          const std::size_t g = static_cast<std::size_t>((p / v.group * v.n + j) * 2);
          const std::uint8_t byte = v.w[static_cast<std::size_t>((j * v.k + p) / 2)];
          const int q = p % 2 == 0 ? byte >> 4 : byte & 15;
          const float scale = float_of_bf16(v.sz[g]), zero = float_of_bf16(v.sz[g + 1]);
          exact += (static_cast<long double>(q - 8) * scale + zero) *
                   float_of_bf16(v.x[static_cast<std::size_t>(i * v.k + p)]);
        }
        const std::size_t at = static_cast<std::size_t>(i * v.n + j);
        CHECK(std::fabs(static_cast<double>(float_of_bf16(y[at]) - exact)) <=
              0x1.0001p-8 * std::fabs(static_cast<double>(exact)));
        const double difference = static_cast<double>(float_of_bf16(v.y[at]) - exact);
        theirs += difference * difference;
        norm += static_cast<double>(exact * exact);
      }
    CHECK(std::sqrt(theirs / norm) <= 3.4e-3); // tests/data/int4/README.md
  }
}

TEST_CASE("bf16 is rounded once, to nearest even") {
  CHECK(bf16_of_double(1.0) == 0x3F80);
  CHECK(bf16_of_double(1.0 + 0x1p-8) == 0x3F80);           // a tie, to even
  CHECK(bf16_of_double(1.0 + 0x1p-8 + 0x1p-40) == 0x3F81); // above it: a float between would make it a tie
  CHECK(bf16_of_double(1.0 + 3 * 0x1p-8) == 0x3F82);       // a tie, to even
  CHECK(bf16_of_double(1.0 + 3 * 0x1p-8 - 0x1p-40) == 0x3F81);
  CHECK(bf16_of_double(-1.0 - 0x1p-8 - 0x1p-40) == 0xBF81);
  CHECK(bf16_of_double(1e300) == 0x7F80);
  CHECK(bf16_of_double(-1e300) == 0xFF80);
  CHECK(bf16_of_double(std::nan("")) == 0x7FC0);
  CHECK(bf16_of_double(0x1p-133) == 0x0001); // the smallest denormal
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float f = float_of_bf16(static_cast<std::uint16_t>(bits));
    if (std::isnan(f))
      continue;
    CHECK(bf16_of_float(f) == bits);
    CHECK(bf16_of_double(f) == bits);
  }
}

TEST_CASE("packs of either form, through the engine and with strides, equal the reference") {
  const auto engine = test::make_engine({.threads = 2});
  for (const Vector& v : vectors())
    for (const bool from_tensor_core : {false, true}) {
      CAPTURE(v.name);
      const KernelDesc desc = make_desc(v.m, v.n, v.k, v.group, false, from_tensor_core ? v.tiles : 0);
      REQUIRE(check_desc(desc).is_ok());
      const Result<KernelRef> kernel = engine->get(desc);
      REQUIRE_MESSAGE(kernel.is_ok(), (kernel ? "" : kernel.status().message()));
      const Plan& plan = *static_cast<const Plan*>((*kernel)->plan());
      Weights weights = {.w = v.w.data(), .sz = v.sz.data()};
      if (from_tensor_core)
        weights = {.w = v.packed.data(), .sz = v.sz.data(), .inner_k_tiles = v.tiles};
      const Result<Pack> pack = Pack::make(*plan.layout, weights, desc, engine->runtime());
      REQUIRE_MESSAGE(pack.is_ok(), (pack ? "" : pack.status().message()));
      const std::int64_t ldx = v.k + 3, ldy = v.n + 5;
      std::vector<std::uint16_t> x(static_cast<std::size_t>(v.m * ldx), 0x7FC0); // NaN between the rows
      std::vector<std::uint16_t> y(static_cast<std::size_t>(v.m * ldy), 0x1234), expected = y;
      for (std::int64_t i = 0; i < v.m; ++i)
        std::copy_n(v.x.data() + i * v.k, v.k, x.data() + i * ldx);
      reference(v.m, v.n, v.k, v.group, v.x.data(), v.k, v.w.data(), v.sz.data(), expected.data(), ldy);
      const Status ran =
          run(**kernel, {.m = v.m, .x = x.data(), .ldx = ldx, .pack = &*pack, .y = y.data(), .ldy = ldy});
      CHECK_MESSAGE(ran.is_ok(), ran.message());
      CHECK(relative_error(y, expected) <= 1e-6); // but for the compiler's choice of fused multiply-adds, equal
      for (std::int64_t i = 0; i < v.m; ++i)
        for (std::int64_t j = v.n; j < ldy; ++j)
          CHECK(y[static_cast<std::size_t>(i * ldy + j)] == 0x1234);
    }
}

TEST_CASE("files of packs: the same bytes back, damage is told") {
  const auto engine = test::make_engine({.threads = 2});
  const Vector v = vectors().front();
  const KernelDesc desc = make_desc(v.m, v.n, v.k, v.group);
  const Result<Pack> pack =
      Pack::make(*find_pack_layout("plain"), {.w = v.w.data(), .sz = v.sz.data()}, desc, engine->runtime());
  REQUIRE(pack.is_ok());
  const std::filesystem::path directory =
      std::filesystem::temp_directory_path() / ("kiln-int4-test-" + std::to_string(::getpid()));
  std::filesystem::create_directories(directory);
  const std::string path = directory / "w.pack";
  REQUIRE(pack->save(path).is_ok());
  const Result<Pack> loaded = Pack::load(path, {}, engine->runtime());
  REQUIRE(loaded.is_ok());
  CHECK(loaded->layout_text() == pack->layout_text());
  CHECK(std::memcmp(reinterpret_cast<const void*>(loaded->w_address()),
                    reinterpret_cast<const void*>(pack->w_address()), static_cast<std::size_t>(pack->bytes())) == 0);
  Bytes bytes = *read_file(path);
  for (std::size_t i = 0; i < bytes.size(); i += 1 + bytes.size() / 100) {
    Bytes bad = bytes;
    bad[i] ^= 4;
    REQUIRE(write_file_atomically(path, {bad}).is_ok());
    CHECK(Pack::load(path, {}, engine->runtime()).status().code() == Code::integrity);
  }
  std::filesystem::remove_all(directory);
}

TEST_CASE("classes of m, one for batch_invariant; the form of the weights changes no kernel") {
  const auto canonical = [](const KernelDesc& d) { return op().canonical(d); };
  std::int64_t first = 0;
  for (const std::int64_t bound : kMClasses) {
    const KernelDesc d = canonical(make_desc(bound, 64, 128, 32));
    CHECK(op().m_range(d).min == first);
    CHECK(canonical(d) == d);
    CHECK(canonical(make_desc(bound, 64, 128, 32, true)) == canonical(make_desc(1, 64, 128, 32, true)));
    CHECK(canonical(make_desc(bound, 64, 128, 32, false, 2)) == d);
    if (bound != kAny)
      first = bound + 1;
    CHECK(parse_desc(d.text()).is_ok());
    CHECK(*parse_desc(d.text()) == d);
  }
  CHECK(op().m_range(canonical(make_desc(7, 64, 128, 32, true))).min == 0);
  CHECK(op().pack_desc(make_desc(7, 64, 128, 32, true)) == op().pack_desc(make_desc(100, 64, 128, 32)));
}

TEST_CASE("descs that cannot be are refused by field") {
  const auto refused = [](const KernelDesc& d, std::string_view says) {
    const Status status = check_desc(d);
    CHECK(status.code() == Code::invalid_argument);
    CHECK_MESSAGE(status.message().find(says) != std::string::npos, status.message());
  };
  refused(make_desc(1, 12, 128, 32), "n=12: allowed is a multiple of 8");
  refused(make_desc(1, 16, 100, 32), "k=100: allowed is a multiple of the group, 32");
  refused(make_desc(1, 16, 128, 33), "group=4: allowed is one of 32, 64, 128, 256");
  refused(make_desc(1, 16, 64, 32, false, 3), "inner_k_tiles=");
  refused(make_desc(1, 16, 64, 32, false, 8), "k=64: allowed is a multiple of 16 · inner_k_tiles, 128");
}
